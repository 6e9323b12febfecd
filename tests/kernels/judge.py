"""Say what is wrong with the outcome of cases."""

import re

from launch.simulate.device_kind import KINDS
from tests.kernels.compiled import Kernel
from tests.kernels.processes import Outcome

MAX_ERROR = 1e-3  # relative, in float16
# Of a decoding layer after a prefill, which rounds a dozen times: uncompiled, float16 differs by 1.1e-3 to 1.2e-3.
MAX_DECODING_ERROR = 1.5e-3
TARGETS = {"h100": "sm_90a", "b200": "sm_100a"}
# Shapes with tails that no recipe has, which spill a little; forms that the bench compares with ours.
NOT_SHIPPED = re.compile(r"/small$|^bench/")


def find_faults(kind: str, outcomes: dict[str, Outcome]) -> list[str]:
    """Return in lines what does not compile, fit, use tensor cores or compute the right numbers, or spills."""
    faults = []
    for name, outcome in outcomes.items():
        if outcome.error is not None:
            faults.append(f"{kind}: {name} does not compile: {outcome.error.strip().splitlines()[-1]}")
        elif not outcome.kernels:
            faults.append(f"{kind}: {name} compiles no kernel")
        faults += [
            f"{kind}: {name}: {kernel.name} {text}" for kernel in outcome.kernels for text in _judge(kernel, kind)
        ]
        if not NOT_SHIPPED.search(name):
            faults += [f"{kind}: {name}: {text}" for text in find_spills(outcome)]
        limit = MAX_DECODING_ERROR if name.startswith("decoding/") else MAX_ERROR
        wrong = {result: error for result, error in (outcome.errors or {}).items() if not error <= limit}
        faults += [f"{name}: {result} differs by {error:.1e} from float64" for result, error in wrong.items()]
    return faults


def _judge(kernel: Kernel, kind: str) -> list[str]:
    faults = {
        f"is for {kernel.target}, not {TARGETS[kind]}": kernel.target != TARGETS[kind],
        f"needs {kernel.shared} bytes of shared memory": kernel.shared > KINDS[kind].shared_per_block,
        "fits no multiprocessor": kernel.blocks == 0,
        "multiplies without tensor cores": kernel.multiplies and kernel.tensor_core == 0,
    }
    return [text for text, is_fault in faults.items() if is_fault]


def find_spills(outcome: Outcome) -> list[str]:
    """Return in lines which kernels spill, and how much."""
    return [
        f"{kernel.name} spills {kernel.spill_stores} / {kernel.spill_loads} bytes"
        for kernel in outcome.kernels
        if kernel.spill_stores + kernel.spill_loads
    ]
