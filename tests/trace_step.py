"""Print what one joint training step enters: files, functions and dataclasses of this repository.

    python -m tests.trace_step [--list]

The second step of a toy run is traced, after everything that is built once exists. The numbers say how much a reader
of the training step has to open; tests/pretrain/test_trainer.py bounds them.
"""

import argparse
import re
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("conf", "data_pipeline", "model", "pretrain", "lora", "launch")


@dataclass
class Trace:
    """Names of what was entered: files relative to the repository root, functions as file:name, dataclasses."""

    files: set[str] = field(default_factory=set)
    functions: set[str] = field(default_factory=set)
    dataclasses: set[str] = field(default_factory=set)

    def enter(self, frame: FrameType, event: str, argument: Any) -> None:
        """Count the call if it is of this repository; this is the function for sys.setprofile."""
        if event != "call":
            return
        code = frame.f_code
        if code.co_filename == "<string>":  # what dataclasses generate
            self._enter_generated(frame)
            return
        path = Path(code.co_filename)
        if not path.is_relative_to(ROOT):
            return
        name = path.relative_to(ROOT).as_posix()
        if name.startswith(FOLDERS):
            self.files.add(name)
            self.functions.add(f"{name}:{code.co_qualname}")

    def _enter_generated(self, frame: FrameType) -> None:
        owner = type(frame.f_locals.get("self"))
        if frame.f_code.co_name == "__init__" and owner.__module__.startswith(FOLDERS):
            self.dataclasses.add(f"{owner.__module__}.{owner.__qualname__}")


def list_forms() -> list[str]:
    """Return the dataclasses that data become between file and loss, as data_pipeline/batch.py names them."""
    from data_pipeline import batch

    return re.findall(r"^    ([A-Z]\w+) ", batch.__doc__ or "", re.MULTILINE)


def trace_joint_step(directory: Path) -> Trace:
    """Trace the second step of a joint run of the toy model in `directory`, on this process alone."""
    from conf.composition.compose import compose_run_config
    from tests.helpers.toy_data import make_toy_data, tokens_of

    data = make_toy_data(directory / "data")
    overrides = ["stage=joint", *data.overrides(), tokens_of(3), f"run.root={directory}", "run.name=trace"]
    config = compose_run_config([*overrides, "data.prefetch_steps=0"])
    trace = Trace()
    with_trainer(config, lambda trainer: _trace_second_step(trainer, trace))
    return trace


def with_trainer(config: Any, use: Callable[[Any], None]) -> None:
    """Call `use` with a trainer of `config` that starts from fresh weights."""
    from pretrain.assemble import build_trainer
    from pretrain.resume.start_point import agree_on_start
    from pretrain.run.model_parallel import model_parallel_groups
    from pretrain.run.run_data import open_data
    from pretrain.run.session import RunSession

    data = open_data(config)
    groups = model_parallel_groups(config.parallel, config.runtime.timeout_minutes, config.train.seed)
    with RunSession(Path(config.run.dir), config.runtime) as session, groups:
        use(build_trainer(config, data, agree_on_start(config, data), session))


def _trace_second_step(trainer: Any, trace: Trace) -> None:
    trainer.train_step()
    sys.setprofile(trace.enter)
    try:
        trainer.train_step()
    finally:
        sys.setprofile(None)


def main() -> None:
    """Trace a step and print the counts, with --list also the names."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--list", action="store_true", help="print every name, not only how many there are")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        trace = trace_joint_step(Path(directory))
    built = {name.rpartition(".")[2]: name for name in trace.dataclasses}
    forms = {built[form] for form in list_forms() if form in built}
    for kind, names in {**vars(trace), "dataclasses between file and loss": forms}.items():
        print(f"{len(names)} {kind}")
        if arguments.list:
            print("\n".join(f"  {name}" for name in sorted(names)))


if __name__ == "__main__":
    main()
