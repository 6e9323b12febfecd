"""One conversion in a process of its own: `python -m tests.helpers.measure_conversion FROM TO` prints JSON.

peak_bytes: resident memory above what the imports took. cpu_seconds: of the conversion alone.
"""

import json
import re
import sys
import time
from pathlib import Path


def resident_bytes(field: str) -> int:
    """Read VmRSS (now) or VmHWM (largest since the last reset) of this process."""
    match = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return int(match[1]) * 1024


def main() -> None:
    from model.convert import __main__ as command
    from model.convert import conversion  # noqa: F401 (the command imports it later; imports are not measured)

    Path("/proc/self/clear_refs").write_text("5")  # the largest resident size starts again from the current one
    imports = resident_bytes("VmRSS")
    begin = time.process_time()
    status = command.main(["--from", sys.argv[1], "--to", sys.argv[2]])
    seconds = time.process_time() - begin
    print(json.dumps({"status": status, "peak_bytes": resident_bytes("VmHWM") - imports, "cpu_seconds": seconds}))


if __name__ == "__main__":
    main()
