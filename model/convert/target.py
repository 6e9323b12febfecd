"""Which paths a conversion may write to."""

from pathlib import Path

from conf.system.atomic import refuse_used_path
from conf.system.errors import UserError
from model.checkpoint import layout
from model.convert.conversion import IMPORT_STAGE
from model.convert.facts import is_hf_directory
from model.convert.hf_config import read_hf_config


def check_target(source: Path, target: Path, overwrite: bool) -> None:
    """Raises: UserError if `source` is not there, lies in `target` or around it, or `target` may not be replaced."""
    if not source.is_dir():
        raise UserError(f"{source} is not a directory: give a Hugging Face directory, a run folder or a step directory")
    inner, outer = source.resolve(), target.resolve()
    if inner == outer or inner in outer.parents or outer in inner.parents:
        raise UserError(f"{target} and {source} overlap: choose another directory to write to")
    if not overwrite:
        refuse_used_path(target)
    elif target.exists() and any(target.iterdir()) and not _is_conversion(target):
        raise UserError(
            f"{target} does not look like an earlier conversion (a tri-mode export, or a run folder with nothing but "
            "an imported checkpoint): remove it yourself if you mean it"
        )


def _is_conversion(target: Path) -> bool:
    """Whether losing `target` loses nothing but a conversion."""
    try:
        if is_hf_directory(target):
            return read_hf_config(target).is_nld
        return [layout.load_manifest(step).stage for step in layout.list_complete_steps(target)] == [IMPORT_STAGE]
    except UserError:
        return False
