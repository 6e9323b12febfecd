"""Worker of train_many: runs each job of a JSON file, and records the noise every rank drew.

<run.dir>/noise_rank<r>.json   {"<split>/<sample index>": digest of noisy tokens and masking probabilities}
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    """Runs the jobs of argv[1] in order."""
    import torch.distributed as dist

    from conf.compose import compose_run_config
    from pretrain import microbatches
    from pretrain.trainer import run_training

    dist.init_process_group("gloo")  # one for all jobs: starting one costs seconds
    draw = microbatches.add_noise
    for overrides in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        digests: dict[str, str] = {}

        def recorded(batch: Any, source: Any, mask_token_id: int, digests: dict[str, str] = digests) -> Any:
            noisy = draw(batch, source, mask_token_id)
            for row, index in enumerate(batch.sample_indices.tolist()):
                if batch.loss_mask[row].any():
                    content = noisy.noisy_tokens[row].numpy().tobytes() + noisy.p_mask[row].numpy().tobytes()
                    digests[f"{source.split}/{index}"] = hashlib.sha256(content).hexdigest()
            return noisy

        microbatches.add_noise = recorded
        config = compose_run_config(overrides)
        run_training(config)
        _write(Path(config.run.dir), digests)
    dist.destroy_process_group()


def _write(run_dir: Path, digests: dict[str, str]) -> None:
    import os

    path = run_dir / f"noise_rank{os.environ['RANK']}.json"
    path.write_text(json.dumps(digests), encoding="utf-8")


if __name__ == "__main__":
    main()
