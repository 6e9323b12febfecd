"""The ways to decode that are compared on a trained model."""

from dataclasses import dataclass

BLOCK_THRESHOLDS = (0.5, 0.7, 0.9)
DRAFT_THRESHOLDS = (0.1, 0.2, 0.4)
MASK_GROUPS = (1, 2, 3, 4, 6, 8, None)
QUADRATIC_THRESHOLDS = (0.1, 0.3)
SHORT_BLOCKS = (4, 8)
SHORT_BLOCK_GROUPS = (1, 2, None)


@dataclass(frozen=True)
class Setting:
    """A mode with its options; None is that mode's default."""

    mode: str
    with_adapter: bool = False
    threshold: float | None = None
    block_length: int | None = None
    mask_groups: int | None = None

    @property
    def family(self) -> str:
        """The name of its colour: linear, linear+adapter, ..."""
        return self.mode + ("+adapter" if self.with_adapter else "")

    @property
    def name(self) -> str:
        """The setting's name, such as quadratic+adapter, block 4, 2 groups, threshold 0.1."""
        block = "" if self.block_length is None else f", block {self.block_length}"
        groups = "" if self.mask_groups is None else f", {self.mask_groups} group{'s' * (self.mask_groups > 1)}"
        return self.family + block + groups + ("" if self.threshold is None else f", threshold {self.threshold:g}")


def list_settings(*, has_adapter: bool) -> list[Setting]:
    """List all settings, AR first."""
    settings = [Setting("ar"), *(Setting("block_diffusion", threshold=value) for value in BLOCK_THRESHOLDS)]
    for with_adapter in (False, True)[: 1 + has_adapter]:
        settings += [Setting("linear", with_adapter, threshold) for threshold in (None, *DRAFT_THRESHOLDS)]
        settings += [Setting("quadratic", with_adapter, mask_groups=groups) for groups in MASK_GROUPS]
        settings += [Setting("quadratic", with_adapter, threshold) for threshold in QUADRATIC_THRESHOLDS]
        for length in SHORT_BLOCKS:
            settings.append(Setting("linear", with_adapter, block_length=length))
            settings += [
                Setting("quadratic", with_adapter, block_length=length, mask_groups=groups)
                for groups in SHORT_BLOCK_GROUPS
            ]
    return settings
