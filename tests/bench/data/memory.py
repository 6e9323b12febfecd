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
import json, re, resource, sys
from conf.schema import DataConfig, InputConfig, PrepareConfig, SourceConfig, Split
from data_pipeline.prepare.run import prepare_source
request = json.loads(sys.argv[1])
if request["limit_bytes"]:
    resource.setrlimit(resource.RLIMIT_DATA, (request["limit_bytes"], request["limit_bytes"]))
source = SourceConfig(
    path=request["output"], input=InputConfig(files=request["corpus"], records=Split(request["records"]))
)
settings = PrepareConfig(shard_bytes=request["shard_bytes"], heldout_every=request["heldout_every"])
prepare_source("memory", source, DataConfig(tokenizer=request["tokenizer"], prepare=settings))
own = int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
print(1024 * max(own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss))
"""


def measure_memory() -> dict[str, Any]:
    """Return {peak_rss_bytes_by_corpus_size: {corpus bytes: largest peak RSS of the parent or a worker, bytes}}."""
    peaks = {}
    with tempfile.TemporaryDirectory() as name:
        for factor in FACTORS:
            corpus, tokenizer_dir = write_corpus(Path(name), factor)
            size = corpus.stat().st_size
            peaks[str(size)] = measure_peak(corpus, tokenizer_dir, Path(name, f"tokens_{factor}"))
            corpus.unlink()
    return {"peak_rss_bytes_by_corpus_size": peaks}


def measure_peak(
    corpus: Path,
    tokenizer_dir: Path,
    output: Path,
    limit_bytes: int = 0,
    records: str = "all",
    heldout_every: int = 1000,
) -> int:
    """Return the largest peak RSS, in bytes, of any process that prepares `corpus`.

    limit_bytes: of private memory each process may have (RLIMIT_DATA); 0: no limit. records, heldout_every: see
    conf.schema. Raises CalledProcessError if a process needs more.
    """
    request = {
        "corpus": str(corpus),
        "tokenizer": str(tokenizer_dir),
        "output": str(output),
        "limit_bytes": limit_bytes,
        "shard_bytes": SHARD_BYTES,
        "records": records,
        "heldout_every": heldout_every,
    }
    root = Path(__file__).resolve().parents[3]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", DRIVER, json.dumps(request)]
    return int(subprocess.run(command, cwd=root, env=environment, stdout=subprocess.PIPE, check=True).stdout)


if __name__ == "__main__":
    print(json.dumps(measure_memory(), indent=2))
