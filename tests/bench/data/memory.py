"""How much memory `data_pipeline.prepare` takes as the corpus grows."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.bench.data.tokenization import write_corpus

FACTORS = (1, 4, 16)  # copies of the standard library's sources (7 MB each)
SHARD_BYTES = 8e6

# A process of its own, whose children are all workers; prints the largest peak of any of them in bytes. A peak that
# getrusage gives for a child can be the parent's at its fork, which is counted here anyway.
DRIVER = """
import re, resource, sys
limit = int(sys.argv[4])
if limit:
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
from conf.schema import DataConfig, InputConfig, PrepareConfig, SourceConfig
from data_pipeline.prepare.run import prepare_source
source = SourceConfig(path=sys.argv[3], input=InputConfig(files=sys.argv[1]))
prepare_source("memory", source, DataConfig(tokenizer=sys.argv[2], prepare=PrepareConfig(shard_bytes=float(sys.argv[5]))))
own = int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
print(1024 * max(own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss))
"""


def measure_memory() -> dict[str, Any]:
    """{peak_rss_bytes_by_corpus_size: {bytes of the corpus: largest peak RSS of the parent or a worker, bytes}}."""
    peaks = {}
    with tempfile.TemporaryDirectory() as name:
        for factor in FACTORS:
            corpus, tokenizer_dir = write_corpus(Path(name), factor)
            size = corpus.stat().st_size
            peaks[str(size)] = measure_peak(corpus, tokenizer_dir, Path(name, f"tokens_{factor}"))
            corpus.unlink()
    return {"peak_rss_bytes_by_corpus_size": peaks}


def measure_peak(
    corpus: Path, tokenizer_dir: Path, output: Path, limit_bytes: int = 0, shard_bytes: float = SHARD_BYTES
) -> int:
    """Largest peak RSS, in bytes, of any process that prepares `corpus`.

    limit_bytes: of private memory each process may have (RLIMIT_DATA); 0: no limit. Raises CalledProcessError.
    """
    arguments = [str(corpus), str(tokenizer_dir), str(output), str(limit_bytes), str(shard_bytes)]
    root = Path(__file__).resolve().parents[3]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-c", DRIVER, *arguments]
    return int(subprocess.run(command, cwd=root, env=environment, stdout=subprocess.PIPE, check=True).stdout)


if __name__ == "__main__":
    print(json.dumps(measure_memory(), indent=2))
