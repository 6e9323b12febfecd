"""Compares a resumed run's data with its checkpoint's: what may change, and where each source is read on."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from conf.system.errors import UserError
from data_pipeline.order import BlendOrder, SourceOrder
from model.checkpoint.layout import CheckpointManifest
from pretrain.run.run_data import RunData


@dataclass(frozen=True)
class DataChange:
    """Compares `data` of a run that resumes with those its checkpoint was trained on.

    manifest, step_dir: the checkpoint's. former: order of the samples in which it was trained.
    """

    data: RunData
    manifest: CheckpointManifest
    step_dir: Path
    former: BlendOrder

    def check(self, is_allowed: bool) -> None:
        """Refuse other contents of sources or sequences unless allowed; shares and sources may change.

        is_allowed: resume.allow_data_change. Raises UserError listing what changed.
        """
        changes = [*self._describe_form(), *_describe_other_content(self.data.train.order, self.former)]
        if changes and not is_allowed:
            raise UserError(
                f"{self.step_dir} was trained on other data ({'; '.join(changes)}). Give back the former data, or "
                "continue on the new data with resume.allow_data_change=true."
            )

    @property
    def is_same_blend(self) -> bool:
        """Whether the samples go on as they were."""
        return self.data.train.order.means_the_same_as(self.former)

    @cached_property
    def order(self) -> BlendOrder:
        """Order of the samples from here on: the checkpoint's own, or a new one where the blend has changed."""
        return self.data.train.order.follow(self.former, self.manifest.samples_seen)

    def describe(self) -> Iterator[str]:
        """Yield lines on a changed blend, which source goes on where; none where the samples go on as they were."""
        if form := list(self._describe_form()):
            yield (
                f"resume: sequences are others than before ({'; '.join(form)}): each source goes on after as much of "
                "its epoch as was read; where their order is another, parts of this epoch come twice and others not "
                "at all"
            )
        if self.is_same_blend:
            return
        shares = {source.sha256: source.share for source in self.former.live}
        parts = [_describe_source(source, shares.get(source.sha256)) for source in self.order.sources]
        yield f"resume: a new blend begins at sample {self.order.first_sample}: " + "; ".join(filter(None, parts))

    def _describe_form(self) -> Iterator[str]:
        then, now = self.manifest.data, self.data.train.fingerprint()
        for key in sorted(then | now):
            if then.get(key) != now.get(key):
                yield f"{key}: {then.get(key)} then, {now.get(key)} now"


def compare_data(data: RunData, manifest: CheckpointManifest, step_dir: Path) -> DataChange:
    """Compare data with a manifest's. Raises: UserError if the manifest does not hold the order of its samples."""
    return DataChange(data, manifest, step_dir, BlendOrder.from_dict(manifest.data_position, str(step_dir)))


def with_order(data: RunData, order: BlendOrder | None) -> RunData:
    """Return `data` with its training samples in `order`; as they are without one."""
    return data if order is None else replace(data, train=replace(data.train, order=order))


def _describe_source(source: SourceOrder, former_share: float | None) -> str:
    if not source.slots:
        return f"{source.name} left out after {source.read} sequences" if former_share else ""
    then = "new" if former_share is None else f"{former_share:.1%}"
    return f"{source.name} {then} -> {source.share:.1%}, from its sequence {source.read}"


def _describe_other_content(order: BlendOrder, former: BlendOrder) -> Iterator[str]:
    """Yield sources that hold something else under their former name, and a blend with nothing of the former one."""
    known = {source.sha256 for source in former.sources}
    names = {source.name: source.sha256 for source in former.live}
    replaced = [source for source in order.live if source.name in names and source.sha256 not in known]
    for source in replaced:
        yield f"sources: {source.name} is {names[source.name][:12]} then, {source.sha256[:12]} now"
    if not replaced and not {source.sha256 for source in order.live} & {source.sha256 for source in former.live}:
        yield f"sources: {', '.join(names)} then, none of them now"
