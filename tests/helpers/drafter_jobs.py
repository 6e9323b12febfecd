"""Worker of train_drafters: `python -m lora.train` for each job of a JSON file, in one process group."""

import json
import sys
from pathlib import Path


def main() -> None:
    """Run the jobs of argv[1] in order."""
    from conf.composition.compose import compose_drafter_config
    from conf.schema import Device
    from lora.drafter.build import run_drafter
    from pretrain.health.compilations import CompilationCounter
    from pretrain.run.process_group import choose_device, start_process_group

    start_process_group(choose_device(Device.cpu), 5)
    counter = CompilationCounter()
    for overrides in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        run_drafter(compose_drafter_config(overrides))
        counter.read_step(0)
        assert counter.counts.compiled_kernels == 0, f"compiled: {counter.new}; lora/README.md says nothing is"


if __name__ == "__main__":
    main()
