"""The ways to decode that an evaluation compares: modes with and without the draft adapter, at thresholds. No torch."""

from collections.abc import Sequence
from dataclasses import dataclass

from model.hf.options import AR, BLOCK_DIFFUSION, SPECULATIVE

LINEAR_ADAPTER, QUADRATIC_ADAPTER = (f"{mode}+adapter" for mode in SPECULATIVE)


@dataclass(frozen=True)
class Variant:
    """One way to decode: a mode, with or without the draft adapter, at a threshold of its own or the run's (None)."""

    mode: str
    with_adapter: bool = False
    threshold: float | None = None

    @property
    def name(self) -> str:
        """The variant's name in tables and reports: linear, linear+adapter, block_diffusion@0.9."""
        adapter = "+adapter" if self.with_adapter else ""
        return f"{self.mode}{adapter}" + ("" if self.threshold is None else f"@{self.threshold:g}")

    @property
    def is_lossless(self) -> bool:
        """Whether greedy outputs must equal greedy AR's."""
        return self.mode != BLOCK_DIFFUSION


def choose_variants(modes: Sequence[str], *, has_adapter: bool, thresholds: Sequence[float] = ()) -> list[Variant]:
    """List each mode once, speculative ones also with the adapter if there is one, then all but ar at every threshold.

    A sweep runs speculation also at 0, its default, where no draft is cut short.
    """
    variants = []
    for mode in dict.fromkeys(modes):
        variants.append(Variant(mode))
        if has_adapter and mode in SPECULATIVE:
            variants.append(Variant(mode, with_adapter=True))
    swept = [variant for variant in variants if variant.mode != AR]
    points = {mode: dict.fromkeys((0.0, *thresholds) if mode in SPECULATIVE else thresholds) for mode in modes}
    return variants + [Variant(v.mode, v.with_adapter, t) for v in swept if thresholds for t in points[v.mode]]
