"""Run the trainer of one rank of a job on fake tensors: `python -m launch.simulate.one_rank CONFIG REPORT --rank R`.

CONFIG: a resolved config.yaml whose global batch is what is simulated. The process must have been started in a
fake_cuda_environment, without dynamo; REPORT is the JSON file of a RankReport, which launch.simulate reads.
"""

import argparse
import os
import sys
from pathlib import Path
from types import TracebackType

import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from conf.composition.compose import load_run_config
from conf.system.entry import quiet_libraries
from launch.simulate.device_kind import KINDS
from launch.simulate.fake_device import pretend
from launch.simulate.rank_report import RankReport
from launch.simulate.step_recorder import OWN, ROOT
from pretrain.checkpointing.helper_processes import end_with_parent

KERNELS_OF_DEVICES = ("transformer_engine", "apex", "amp_C")  # libraries whose kernels fake tensors cannot enter


def main() -> None:
    """Simulate the rank and write its report; an error of the training code is a finding, and is written there."""
    parser = argparse.ArgumentParser(prog="python -m launch.simulate.one_rank", description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("report", type=Path)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--gpus", type=int, required=True)
    parser.add_argument("--kind", default="h100", choices=KINDS)
    parser.add_argument("--document-tokens", type=int)
    parser.add_argument("--scored-share", type=float, default=1.0)
    arguments = parser.parse_args()
    end_with_parent(os.getppid())
    quiet_libraries("torch.distributed")
    sys.modules.update(dict.fromkeys(KERNELS_OF_DEVICES))  # type: ignore[arg-type]
    config = load_run_config(arguments.config)
    dist.init_process_group("fake", rank=arguments.rank, world_size=arguments.gpus, store=FakeStore())
    pretend(KINDS[arguments.kind])
    from launch.plan.step_work import SequenceKind
    from launch.simulate.rank_work import simulate_rank  # megatron-core looks for the libraries when it is imported

    try:
        report = simulate_rank(config, SequenceKind(arguments.document_tokens, arguments.scored_share))
    except Exception as error:
        message = f"{type(error).__name__}: {error}".strip()
        report = RankReport(arguments.rank, error=message, error_line=find_last_own_line(error.__traceback__))
    report.write(arguments.report)


def find_last_own_line(trace: TracebackType | None) -> str:
    """Return the innermost line of ours in a traceback, `file:number`."""
    line = ""
    while trace is not None:
        path = trace.tb_frame.f_code.co_filename
        if path.startswith(OWN):
            line = f"{Path(path).relative_to(ROOT)}:{trace.tb_lineno}"
        trace = trace.tb_next
    return line


if __name__ == "__main__":
    main()
