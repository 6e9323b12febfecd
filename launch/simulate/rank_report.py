"""Hold what one simulated rank reports, and pass it between processes as JSON."""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from conf.system.atomic import atomic_write_text
from launch.simulate.collectives import Collective
from launch.simulate.live_memory import Allocation, TensorOrigin
from launch.simulate.step_recorder import Question, StepRecorder

GIB = 2**30
POINTS = 1000  # of the course of live bytes that are kept
LARGEST = 10
STATIC = ("weights", "adapter", "gradients", "optimizer")
HEAD = "output_layer"


@dataclass(frozen=True)
class Tensors:
    """Describes `count` tensors alike. num_bytes: of each. line: of ours that made them. phase: of the last one."""

    count: int
    num_bytes: int
    shape: tuple[int, ...]
    dtype: str
    module: str
    line: str
    phase: str


@dataclass(frozen=True)
class Recording:
    """Holds what a step, or an evaluation, did on one rank.

    before: live bytes at its beginning. peak: most live bytes, at `peak_at`. kinds, modules: bytes alive then, by what
    they are for, and of all but weights, gradients and optimizer by module. largest: LARGEST kinds of tensors among
    these, by the bytes of all of a kind. course: live bytes over time, at most POINTS. flops: by module. Modules of
    all layers go together.
    """

    before: int
    peak: int
    peak_at: TensorOrigin
    kinds: dict[str, int]
    modules: dict[str, int]
    largest: list[Tensors]
    course: list[int]
    collectives: list[Collective]
    questions: list[Question]
    flops: dict[str, int]

    @classmethod
    def of(cls, recorder: StepRecorder, start: int) -> "Recording":
        """Describe what was recorded since event number `start` of the memory."""
        memory = recorder.memory
        course = memory.replay(start)
        moment = max(range(len(course)), key=course.__getitem__)
        alive = memory.find_alive(start + moment)
        kinds, modules = Counter[str](), Counter[str]()
        for item in alive:
            kind = find_kind(item)
            kinds[kind] += item.num_bytes
            if kind not in STATIC:
                modules[join_layers(item.origin.module) or "other"] += item.num_bytes
        last = memory.allocations[memory.events[start + moment][0]]
        return cls(
            before=course[0],
            peak=course[moment],
            peak_at=last.origin,
            kinds=dict(kinds.most_common()),
            modules=dict(modules.most_common()),
            largest=join_alike(item for item in alive if find_kind(item) not in STATIC)[:LARGEST],
            course=thin_course(course),
            collectives=list(recorder.collectives),
            questions=list(recorder.questions),
            flops=sum_by_module(recorder.flops),
        )


@dataclass(frozen=True)
class RankReport:
    """Holds what one rank did. place: its number in each kind of group. groups: ranks of each kind that it belongs to.

    positions (computed), attended_pairs, scored_positions: of the rank's own microbatches, whole sequences.
    noisy_lengths: noisy positions of a sequence on the rank, by microbatch; none in the AR stage. saved_bytes: of the
    tensors that it writes of a checkpoint. error: what stopped it, with the line of ours; the recordings are missing.
    """

    rank: int
    seconds: float = 0.0
    place: dict[str, int] = field(default_factory=dict)
    groups: dict[str, list[int]] = field(default_factory=dict)
    parameters: int = 0
    positions: int = 0
    noisy_lengths: list[int] = field(default_factory=list)
    attended_pairs: int = 0
    scored_positions: int = 0
    step: Recording | None = None
    evaluation: Recording | None = None
    saved_bytes: int = 0
    error: str = ""
    error_line: str = ""

    def write(self, path: Path) -> None:
        """Write the report as JSON."""
        atomic_write_text(path, json.dumps(asdict(self)) + "\n")


def read_report(path: Path) -> RankReport:
    """Read what RankReport.write wrote."""
    values = json.loads(path.read_text(encoding="utf-8"))
    for name in ("step", "evaluation"):
        values[name] = values[name] and _read_recording(values[name])
    return RankReport(**values)


def _read_recording(values: dict[str, Any]) -> Recording:
    values["peak_at"] = TensorOrigin(**values["peak_at"])
    values["largest"] = [Tensors(**{**item, "shape": tuple(item["shape"])}) for item in values["largest"]]
    values["collectives"] = [Collective(**{**item, "ranks": tuple(item["ranks"])}) for item in values["collectives"]]
    values["questions"] = [Question(**item) for item in values["questions"]]
    return Recording(**values)


def join_alike(allocations: Iterable[Allocation]) -> list[Tensors]:
    """Return allocations of the same shape, format, module and line as one, those with most bytes together first."""
    groups: dict[tuple[Any, ...], list[Allocation]] = defaultdict(list)
    for item in allocations:
        key = item.num_bytes, item.shape, item.dtype, join_layers(item.origin.module), item.origin.line
        groups[key].append(item)
    joined = []
    for (num_bytes, shape, dtype, module, line), items in groups.items():
        joined.append(Tensors(len(items), num_bytes, shape, dtype, module, line, items[-1].origin.phase))
    return sorted(joined, key=lambda tensors: -tensors.count * tensors.num_bytes)


def find_kind(item: Allocation) -> str:
    """Return what an allocation is for."""
    if item.kind:
        return item.kind
    return "logits" if join_layers(item.origin.module).endswith(HEAD) else "activations"


def join_layers(module: str) -> str:
    """Return the name of a module with the numbers of layers replaced, so that those of all layers are one."""
    return re.sub(r"^decoder\.layers\.\d+(?=\.|$)", "layer", module)


def sum_by_module(flops: Counter[str]) -> dict[str, int]:
    """Return FLOPs by module, those of all layers together, the largest first."""
    by_module = Counter[str]()
    for module, number in flops.items():
        by_module[join_layers(module) or "other"] += number
    return dict(by_module.most_common())


def thin_course(course: list[int]) -> list[int]:
    """Return at most POINTS numbers: the largest of each of so many equal parts."""
    if len(course) <= POINTS:
        return course
    edges = [len(course) * index // POINTS for index in range(POINTS + 1)]
    return [max(course[first:last]) for first, last in pairwise(edges)]
