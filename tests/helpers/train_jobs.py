"""Worker of train_many: runs each job of a JSON file, and records what every rank trained on and the noise it drew.

<run.dir>/noise_rank<r>.json   {"<split>/<sample index>": digest of noisy tokens and masking probabilities}
<run.dir>/tokens_rank<r>.json  {"<split>/<sample index>": digest of the clean tokens}

Both over all starts of the run in such a worker; the latest one of a sample.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from tests.helpers.worker import take_jobs


def main() -> None:
    """Run the jobs of argv[1] in order."""
    from conf.composition.compose import compose_run_config
    from pretrain.assemble import run_training
    from pretrain.step import microbatches

    draw = microbatches.add_noise
    for overrides in take_jobs():
        digests: dict[str, str] = {}
        contents: dict[str, str] = {}

        def recorded(
            batch: Any, source: Any, mask_token_id: int, digests: Any = digests, contents: Any = contents
        ) -> Any:
            noisy = draw(batch, source, mask_token_id)
            for row, index in enumerate(batch.sample_indices.tolist()):
                contents[f"{source.split}/{index}"] = digest_tokens(batch.tokens[row])
                if batch.loss_mask[row].any():
                    content = noisy.noisy_tokens[row].numpy().tobytes() + noisy.p_mask[row].numpy().tobytes()
                    digests[f"{source.split}/{index}"] = hashlib.sha256(content).hexdigest()
            return noisy

        microbatches.add_noise = recorded
        config = compose_run_config(overrides)
        run_training(config)
        _write(Path(config.run.dir), "noise", digests)
        _write(Path(config.run.dir), "tokens", contents)


def digest_tokens(tokens: Any) -> str:
    """Return a digest of the clean tokens [S] of one sequence."""
    return hashlib.sha256(np.asarray(tokens, dtype=np.int64).tobytes()).hexdigest()


def _write(run_dir: Path, kind: str, digests: dict[str, str]) -> None:
    import os

    path = run_dir / f"{kind}_rank{os.environ['RANK']}.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps(before | digests), encoding="utf-8")


if __name__ == "__main__":
    main()
