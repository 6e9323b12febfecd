"""The ways to decode that an evaluation compares: modes with and without the draft adapter, at thresholds. No torch."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from model.hf.options import AR, BLOCK_DIFFUSION, QUADRATIC, SPECULATIVE

LINEAR_ADAPTER, QUADRATIC_ADAPTER = (f"{mode}+adapter" for mode in SPECULATIVE)


@dataclass(frozen=True)
class Variant:
    """One way to decode: a mode, with or without the draft adapter, at a threshold of its own or the run's (None).

    verifier_weight: AR's weight in verifying, as in DecodeOptions.
    """

    mode: str
    with_adapter: bool = False
    threshold: float | None = None
    verifier_weight: float = 1.0

    @property
    def family(self) -> str:
        """Mode and adapter: linear, linear+adapter."""
        return f"{self.mode}+adapter" if self.with_adapter else self.mode

    @property
    def name(self) -> str:
        """The variant's name in reports: linear+adapter, block_diffusion@0.9, quadratic~0.5 (AR's weight)."""
        threshold = "" if self.threshold is None else f"@{self.threshold:g}"
        weight = "" if self.verifier_weight == 1 else f"~{self.verifier_weight:g}"
        return self.family + threshold + weight

    @property
    def is_lossless(self) -> bool:
        """Whether greedy outputs must equal greedy AR's."""
        return self.mode != BLOCK_DIFFUSION and self.verifier_weight == 1


def choose_variants(
    modes: Sequence[str],
    *,
    has_adapter: bool,
    thresholds: Sequence[float] = (),
    verifier_weights: Sequence[float] = (),
) -> list[Variant]:
    """List each mode once, speculative ones also with the adapter if there is one, then all but ar at every threshold.

    Quadratic speculation follows once more for each of AR's weights in verifying. A sweep runs speculation also at 0,
    its default, where no draft is cut short.
    """
    variants = []
    for mode in dict.fromkeys(modes):
        variants.append(Variant(mode))
        if has_adapter and mode in SPECULATIVE:
            variants.append(Variant(mode, with_adapter=True))
    swept = [variant for variant in variants if variant.mode != AR]
    quadratic = [variant for variant in variants if variant.mode == QUADRATIC]
    variants += [replace(one, verifier_weight=weight) for one in quadratic for weight in verifier_weights]
    points = {mode: dict.fromkeys((0.0, *thresholds) if mode in SPECULATIVE else thresholds) for mode in modes}
    return variants + [Variant(v.mode, v.with_adapter, t) for v in swept if thresholds for t in points[v.mode]]
