"""What becomes of a case, and the table of all that README.md holds between two marks."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.kernels.flash.cubin import Cubin

README = Path(__file__).with_name("README.md")
BEGIN, END = "<!-- table: written by python -m tests.kernels.flash --write -->", "<!-- end of the table -->"
DIRECTIONS = ("forward", "backward")
LABELS = {"h100": "H100", "b200": "B200"}
REFUSED = "refused"


@dataclass(frozen=True)
class Direction:
    """Holds what compiling the forward or the backward of a case gave: an error, or kernels.

    cubins: those compiled for it; none where it runs the kernels of a case before it. keys_per_call: of how many keys
    the mask decides at once, which FlashAttention 4 allows in Blackwell's forward.
    """

    seconds: float
    error: str | None
    cubins: Sequence[Cubin]
    keys_per_call: int


@dataclass(frozen=True)
class Outcome:
    """Holds what became of a case.

    seconds, error: of torch's lowering. directions: by name; none where torch did not lower the case.
    """

    mask: str
    blocks: tuple[int, int]
    seconds: float
    error: str | None
    directions: Mapping[str, Direction]

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> "Outcome":
        """Return what `dataclasses.asdict` made a dictionary of."""
        directions = {
            name: Direction(**item | {"cubins": [Cubin(**cubin) for cubin in item["cubins"]]})
            for name, item in found["directions"].items()
        }
        return cls(found["mask"], tuple(found["blocks"]), found["seconds"], found["error"], directions)

    def find_error(self, direction: str) -> str | None:
        """Return why there is no kernel for this direction; None: there is."""
        if direction in self.directions:
            return self.directions[direction].error
        return self.error or "torch lowers to something else than FlashAttention 4"


def find_main_kernel(cubins: Iterable[Cubin]) -> Cubin:
    """Return the kernel that attends; others prepare or convert what it reads and writes."""
    [found] = [cubin for cubin in cubins if re.search(r"flash_(fwd|bwd)_sm\d", cubin.name)]
    return found


def format_cell(outcome: Outcome, direction: str, reasons: list[str]) -> str:
    """Return what is known of one direction of a case; a reason of refusal by its number in `reasons`."""
    error = outcome.find_error(direction)
    if error is None:
        cubins = outcome.directions[direction].cubins
        if not cubins:
            return "same kernels"
        main = find_main_kernel(cubins)
        many = outcome.directions[direction].keys_per_call
        return f"{main.registers} registers, {main.stack} B" + (f", {many} keys a call" if many > 1 else "")
    if error not in reasons:
        reasons.append(error)
    return f"{REFUSED} ({reasons.index(error) + 1})"


def format_tables(outcomes: Mapping[str, Sequence[Outcome]]) -> str:
    """Return a table for every device kind, and the numbered reasons below."""
    reasons: list[str] = []
    lines = []
    for kind, found in outcomes.items():
        lines += [f"| {LABELS[kind]}: mask | blocks | forward | backward |", "|---|---|---|---|"]
        for outcome in found:
            cells = [format_cell(outcome, direction, reasons) for direction in DIRECTIONS]
            lines.append(f"| {outcome.mask} | {outcome.blocks[0]} x {outcome.blocks[1]} | {cells[0]} | {cells[1]} |")
        lines.append("")
    return "\n".join([*lines, *(f"{number}. {reason}" for number, reason in enumerate(reasons, 1))])


def write_tables(text: str, path: Path = README) -> None:
    """Put the tables between the marks of the document."""
    before, after = path.read_text(encoding="utf-8").split(BEGIN)[0], path.read_text(encoding="utf-8").split(END)[1]
    path.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", encoding="utf-8")


def read_refusals(path: Path = README) -> dict[tuple[str, str, str], tuple[bool, bool]]:
    """Return by kind, mask and blocks whether forward and backward are refused, as the document says."""
    labels = {label: kind for kind, label in LABELS.items()}
    refusals, kind = {}, ""
    text = path.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0]
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if found := re.fullmatch(r"(\w+): mask", cells[0]):
            kind = labels[found[1]]
        elif len(cells) == 4 and not cells[0].startswith("---"):
            refusals[kind, cells[0], cells[1]] = (cells[2].startswith(REFUSED), cells[3].startswith(REFUSED))
    return refusals


def list_refusals(outcomes: Mapping[str, Sequence[Outcome]]) -> dict[tuple[str, str, str], tuple[bool, bool]]:
    """Return the same of what was found now."""
    return {
        (kind, outcome.mask, f"{outcome.blocks[0]} x {outcome.blocks[1]}"): (
            outcome.find_error("forward") is not None,
            outcome.find_error("backward") is not None,
        )
        for kind, found in outcomes.items()
        for outcome in found
    }
