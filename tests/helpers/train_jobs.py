"""Worker of train_many: runs each job of a JSON file, and records what every rank trained on and the noise it drew.

<run.dir>/noise_rank<r>.json   {"<split>/<sample index>": digest of noisy tokens and masking probabilities}
<run.dir>/tokens_rank<r>.json  {"<split>/<sample index>": digest of the clean tokens}

A job with the override WHOLE computes all noisy blocks, live or not: what forwards of live ones are compared with. One
with REHEARSED computes every length before its first step, as a run on CUDA does.
<run.dir>/lengths_rank<r>.json {"<noisy positions of a forward>": how many forwards had as many}

All over all starts of the run in such a worker; the latest one of a sample.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from tests.helpers.worker import take_jobs

WHOLE = "whole"
REHEARSED = "rehearsed"


def main() -> None:
    """Run the jobs of argv[1] in order."""
    from conf.composition.compose import compose_run_config
    from pretrain.assemble import run_training
    from pretrain.step import microbatches
    from pretrain.step.rehearsal import rehearse
    from pretrain.trainer import Trainer

    draw, choose = microbatches.add_noise, microbatches.choose_positions
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

        lengths: dict[str, int] = {}

        def choose_recorded(
            block_ids: Any, is_live: Any, shard: Any, noisy_lengths: Any, lengths: Any = lengths, job: Any = overrides
        ) -> Any:
            positions = choose(block_ids, is_live, shard, noisy_lengths[-1:] if WHOLE in job else noisy_lengths)
            length = str(positions.noisy.shape[1])
            lengths[length] = lengths.get(length, 0) + 1
            return positions

        def prepare_kernels(self: Any, job: Any = overrides) -> None:
            if REHEARSED in job:
                rehearse(self.model, self.builder, self.loader.microbatches(self.state.samples_seen)[0])

        Trainer.prepare_kernels = prepare_kernels
        microbatches.add_noise, microbatches.choose_positions = recorded, choose_recorded
        config = compose_run_config([override for override in overrides if override not in (WHOLE, REHEARSED)])
        run_training(config)
        _write(Path(config.run.dir), "lengths", lengths)
        _write(Path(config.run.dir), "noise", digests)
        _write(Path(config.run.dir), "tokens", contents)


def digest_tokens(tokens: Any) -> str:
    """Return a digest of the clean tokens [S] of one sequence."""
    return hashlib.sha256(np.asarray(tokens, dtype=np.int64).tobytes()).hexdigest()


def _write(run_dir: Path, kind: str, digests: dict[str, Any]) -> None:
    import os

    path = run_dir / f"{kind}_rank{os.environ['RANK']}.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps(before | digests), encoding="utf-8")


if __name__ == "__main__":
    main()
