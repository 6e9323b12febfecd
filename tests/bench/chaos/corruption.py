"""Checkpoints damaged in every way there is a name for; the trainer's own check is to notice each.

Worker of tests.bench.chaos.damage (two ranks): `-m tests.bench.chaos.corruption TRIALS.json RESULTS.json`.
"""

import json
import os
import random
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

KINDS = ("flipped", "deleted", "truncated", "added", "swapped")


@dataclass(frozen=True)
class Damage:
    """kind: one of KINDS. file: its name in the step directory. place: byte that is flipped, or new size, or seed."""

    step_dir: str
    kind: str
    file: str
    place: int
    mask: int = 0


def list_all_files(step_dir: Path) -> list[Path]:
    """List the files of a step directory, the hidden ones too, sorted."""
    return sorted(path for path in step_dir.rglob("*") if path.is_file())


def draw_damage(step_dirs: list[Path], kind: str, source: random.Random) -> Damage:
    """Draw one way to damage one file of one of the checkpoints: small files as often as large ones."""
    step_dir = source.choice(step_dirs)
    file = source.choice([path for path in list_all_files(step_dir) if path.stat().st_size])
    place = source.randrange(file.stat().st_size)
    return Damage(str(step_dir), kind, file.relative_to(step_dir).as_posix(), place, source.randrange(1, 256))


@contextmanager
def damaged(damage: Damage) -> Iterator[None]:
    """Damage the checkpoint while the block runs and restore it afterwards."""
    path = Path(damage.step_dir) / damage.file
    original = Path(damage.step_dir).parent / f"original_{path.name}"
    shutil.copy2(path, original)
    added: list[Path] = []
    others = [other for other in list_all_files(Path(damage.step_dir)) if other.name != path.name]
    other = others[damage.place % len(others)]
    other_bytes = other.read_bytes() if damage.kind == "swapped" else None
    try:
        apply(damage, path, other, added)
        yield
    finally:
        shutil.move(original, path)
        if other_bytes is not None:
            other.write_bytes(other_bytes)
        for extra in added:
            extra.unlink()


def apply(damage: Damage, path: Path, other: Path, added: list[Path]) -> None:
    """Damage `path`. other: the file it changes places with. added: gets the file that is too many."""
    if damage.kind == "flipped":
        flip(path, damage.place, damage.mask)
    elif damage.kind == "deleted":
        path.unlink()
    elif damage.kind == "truncated":
        os.truncate(path, damage.place)
    elif damage.kind == "added":
        added.append(path.with_name(f"more_{path.name}"))
        shutil.copy2(path, added[0])
    else:
        content = path.read_bytes()
        path.write_bytes(other.read_bytes())
        other.write_bytes(content)


def flip(path: Path, place: int, mask: int) -> None:
    """Flip the bits `mask` of one byte."""
    with path.open("r+b") as file:
        file.seek(place)
        old = file.read(1)[0]
        file.seek(place)
        file.write(bytes([old ^ mask]))


def main() -> None:
    """Apply every damage of argv[1] in turn; what the ranks report of it goes to argv[2]."""
    import torch.distributed as dist

    from pretrain.run.integrity import find_damage_over_ranks

    dist.init_process_group("gloo")
    found: list[str | None] = []
    for values in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        damage = Damage(**values)
        assert find_damage_over_ranks(Path(damage.step_dir)) is None, f"{damage.step_dir} was not whole before"
        holder = damaged(damage)
        if dist.get_rank() == 0:
            holder.__enter__()
        dist.barrier()
        found.append(find_damage_over_ranks(Path(damage.step_dir)))
        dist.barrier()
        if dist.get_rank() == 0:
            holder.__exit__(None, None, None)
        dist.barrier()
    if dist.get_rank() == 0:
        Path(sys.argv[2]).write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
