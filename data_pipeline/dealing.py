"""Deal the sequences of a global batch to microbatches and data-parallel ranks, so that all compute about as much.

A rank that computes less waits for the others before the weights change. What a sequence costs is known without
reading it (work.py), so every rank deals the whole global batch by itself, alike, and asks nobody.

Sequences are sorted by cost and grouped into microbatches: equal ones together, for the longest sets what a microbatch
computes, or spread, heavy ones with light ones; whichever leaves the fullest rank less to do. Microbatches are sorted
in turn and dealt in rounds, one to each rank: the heaviest of a round to the rank that has least so far. Then the
totals of two ranks differ by at most the largest difference within a round: if a has s less than b, it takes the
heavier of the two, which leaves between s and minus their difference. With one microbatch per rank nothing can be
balanced, and a sequence that alone outweighs the mean stays the load of its rank.

    costs     9 8 7 4 3 1     two ranks, one sequence per microbatch; in order they would do 19 and 13
    rank 0    9   | 4 | 3     = 16
    rank 1      8 | 7 |   1   = 16
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean


@dataclass(frozen=True)
class Deal:
    """Says which places of a global batch each microbatch holds, and how evenly that spreads the work.

    microbatches: places by rank and microbatch. rank_imbalance: the work of the fullest rank over the mean;
    microbatch_imbalance: of the fullest microbatch; `undealt`: of the same batch dealt in order. None: not known.
    """

    microbatches: list[list[list[int]]]
    rank_imbalance: float | None = None
    microbatch_imbalance: float | None = None
    undealt_rank_imbalance: float | None = None
    undealt_microbatch_imbalance: float | None = None


def deal_in_order(num_sequences: int, micro_batch_size: int, num_ranks: int) -> Deal:
    """Deal sequences as they come: place (m * ranks + r) * size + b is sequence b of microbatch m of rank r."""
    groups = _cut(range(num_sequences), micro_batch_size)
    return Deal([groups[rank::num_ranks] for rank in range(num_ranks)])


def deal_evenly(
    costs: Sequence[float], micro_batch_size: int, num_ranks: int, cost_together: Callable[[list[int]], float]
) -> Deal:
    """Deal sequences by their costs; cost_together: what a microbatch of these places costs."""
    descending = sorted(range(len(costs)), key=lambda place: -costs[place])
    num_groups = len(costs) // micro_batch_size
    together = _cut(descending, micro_batch_size)
    spread = [descending[first::num_groups] for first in range(num_groups)]
    deals = [_deal_in_rounds(groups, num_ranks, cost_together) for groups in (together, spread)]
    dealt = min(deals, key=lambda deal: max(sum(map(cost_together, groups)) for groups in deal))
    undealt = deal_in_order(len(costs), micro_batch_size, num_ranks).microbatches
    return Deal(dealt, *_measure(dealt, cost_together), *_measure(undealt, cost_together))


def _deal_in_rounds(
    groups: list[list[int]], num_ranks: int, cost_together: Callable[[list[int]], float]
) -> list[list[list[int]]]:
    """Return the groups of each rank, heaviest first."""
    costs = [cost_together(group) for group in groups]
    descending = sorted(range(len(groups)), key=lambda number: -costs[number])
    dealt: list[list[list[int]]] = [[] for _ in range(num_ranks)]
    totals = [0.0] * num_ranks
    for first in range(0, len(groups), num_ranks):
        emptiest = sorted(range(num_ranks), key=totals.__getitem__)
        for rank, number in zip(emptiest, descending[first : first + num_ranks], strict=True):
            dealt[rank].append(sorted(groups[number]))
            totals[rank] += costs[number]
    return dealt


def _measure(dealt: list[list[list[int]]], cost_together: Callable[[list[int]], float]) -> tuple[float, float]:
    """Return the work of the fullest rank over the mean, and that of the fullest microbatch."""
    costs = [[cost_together(group) for group in groups] for groups in dealt]
    return _compare([sum(of_rank) for of_rank in costs]), _compare([cost for of_rank in costs for cost in of_rank])


def _compare(costs: list[float]) -> float:
    return max(costs) / fmean(costs)


def _cut(places: Sequence[int], size: int) -> list[list[int]]:
    return [list(places[first : first + size]) for first in range(0, len(places), size)]
