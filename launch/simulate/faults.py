"""Judge simulated ranks: errors, hidden questions of the host, and ranks that disagree on collectives."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, permutations
from math import inf

from launch.simulate.collectives import Collective
from launch.simulate.rank_report import GIB, RankReport, Recording

PAIR = {"send", "receive"}

# Where the host waits for its device in a step, and why it must. Everything else that asks is a finding.
EXPLAINED_QUESTIONS = {
    "pretrain/health/heartbeat.py:Heartbeat.exchange": "losses and norm, by which a step is judged, and signals",
}


@dataclass(frozen=True)
class Fault:
    """Describes something that would stop or slow the job. line: of ours, `file:number`."""

    message: str
    line: str

    def __str__(self) -> str:
        return f"{self.line}: {self.message}" if self.line else self.message


def find_faults(reports: Sequence[RankReport], memory_bytes: float = inf) -> list[Fault]:
    """Return everything that the job should not do, the most serious first. memory_bytes: of a device."""
    errors = [Fault(f"rank {report.rank}: {report.error}", report.error_line) for report in reports if report.error]
    steps = {report.rank: report.step for report in reports if report.step is not None}
    too_large = [
        Fault(
            f"rank {rank} needs {step.peak / GIB:.2f} GiB, the device has {memory_bytes / GIB:.0f}", step.peak_at.line
        )
        for rank, step in steps.items()
        if step.peak > memory_bytes
    ]
    return [*errors, *too_large, *_list_mismatches(steps), *_list_hidden_questions(steps.values())]


def _list_hidden_questions(steps: Iterable[Recording]) -> Iterator[Fault]:
    seen = set()
    for step in steps:
        hidden = [question for question in step.questions if question.function not in EXPLAINED_QUESTIONS]
        for line, times in Counter(question.line for question in hidden).items():
            if line not in seen:
                seen.add(line)
                yield Fault(f"the host waits for its device, {times} times a step; nothing explains it", line)


def _list_mismatches(steps: dict[int, Recording]) -> Iterator[Fault]:
    """Compare what ranks call together: all ranks of a group the same, in order; of two ranks, sends and receives."""
    for one, other in combinations(steps, 2):
        mine, theirs = _split_by_group(steps[one]), _split_by_group(steps[other])
        for ranks in sorted(mine.keys() | theirs.keys()):
            if {one, other} <= set(ranks):
                calls = mine.get(ranks, []), theirs.get(ranks, [])
                yield from _find_first_difference(ranks, (one, calls[0]), (other, calls[1]))
    for sender, receiver in permutations(steps, 2):
        sent, received = (
            [
                item
                for item in steps[rank].collectives
                if item.operation == operation and item.ranks == (sender, receiver)
            ]
            for rank, operation in ((sender, "send"), (receiver, "receive"))
        )
        yield from _find_first_difference((sender, receiver), (sender, sent), (receiver, received))


def _split_by_group(step: Recording) -> dict[tuple[int, ...], list[Collective]]:
    """Return the collectives of a rank by the ranks of their group, without sends and receives."""
    groups: dict[tuple[int, ...], list[Collective]] = defaultdict(list)
    for item in step.collectives:
        if item.operation not in PAIR:
            groups[item.ranks].append(item)
    return groups


def _find_first_difference(
    ranks: tuple[int, ...], mine: tuple[int, list[Collective]], theirs: tuple[int, list[Collective]]
) -> Iterator[Fault]:
    """Yield the first call in which two ranks, each with its calls, differ."""
    (one, my_calls), (other, their_calls) = mine, theirs
    group = " and ".join(map(str, ranks)) if len(ranks) == 2 else f"{ranks[0]} to {ranks[-1]}"
    for number, (a, b) in enumerate(zip(my_calls, their_calls, strict=False), start=1):
        if (a.operation != b.operation and {a.operation, b.operation} != PAIR) or a.num_bytes != b.num_bytes:
            message = (
                f"number {number} of ranks {group} is {_describe(a)} on rank {one}, {_describe(b)} on rank {other}"
            )
            yield Fault(f"{message} ({b.line})", a.line)
            return
    shared = min(len(my_calls), len(their_calls))
    for caller, missing, calls in ((one, other, my_calls), (other, one, their_calls)):
        if len(calls) > shared:
            extra = calls[shared]
            message = f"rank {caller} calls {_describe(extra)}, number {shared + 1} of ranks {group}"
            yield Fault(f"{message}, rank {missing} does not: the job would hang", extra.line)


def _describe(item: Collective) -> str:
    return f"{item.operation} of {item.num_bytes} bytes"
