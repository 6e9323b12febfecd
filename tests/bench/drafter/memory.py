"""Memory of a training step at the released vocabulary: it must not grow with vocabulary x sequence.

`python -m tests.bench.drafter.memory VOCAB_SIZE LENGTH BLOCKS` prints the peak beyond the frozen weights in bytes.
"""

import json
import os
import subprocess
import sys
import threading
import time
from typing import Any

VOCAB_SIZES = (4096, 131072)
LENGTHS = (256, 1024)  # tokens of a sequence; the drafted blocks grow alike
BLOCK_SIZE, CHUNK_BLOCKS = 16, 2


def measure_memory() -> dict[str, Any]:
    """Return, by sequence length, peak bytes beyond the weights and the part that the larger vocabulary adds."""
    small, large = ({str(length): _measure(vocab_size, length) for length in LENGTHS} for vocab_size in VOCAB_SIZES)
    drafted = {str(length): length // BLOCK_SIZE * (BLOCK_SIZE - 1) for length in LENGTHS}
    return {
        "memory_vocab_size": VOCAB_SIZES[1],
        "memory_peak_bytes_by_sequence_length": large,
        "memory_vocabulary_bytes_by_sequence_length": {key: large[key] - small[key] for key in large},
        # What logits of drafter and verifier at all drafted positions would take, without their gradients.
        "memory_whole_logits_bytes_by_sequence_length": {
            key: 2 * positions * VOCAB_SIZES[1] * 4 for key, positions in drafted.items()
        },
    }


def _measure(vocab_size: int, length: int) -> int:
    arguments = map(str, (vocab_size, length, length // BLOCK_SIZE))
    # Freed blocks go back at once, so that the peak is what is in use and not what the allocator keeps.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.bench.drafter.memory", *arguments]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
    return int(json.loads(output))


def main() -> None:
    """Run one step of a small model with the large vocabulary, in the process that is measured."""
    import numpy as np
    import torch

    from conf.schema.drafter import AdapterConfig, DraftObjectiveConfig
    from lora.drafter.adapter import attach_new_adapter
    from lora.drafter.batches import build_draft_batch
    from lora.drafter.step import DraftStep
    from lora.examples.example_set import Example
    from model.hf.configuration_nemotron_labs_diffusion import NemotronLabsDiffusionConfig
    from model.hf.modeling_nemotron_labs_diffusion import NemotronLabsDiffusionModel

    vocab_size, length, blocks = map(int, sys.argv[1:])
    torch.set_num_threads(1)
    config = NemotronLabsDiffusionConfig(
        vocab_size=vocab_size, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=8192,
    )  # fmt: skip
    model = attach_new_adapter(NemotronLabsDiffusionModel(config), AdapterConfig(rank=8, alpha=32.0), seed=0)
    step = DraftStep(model, DraftObjectiveConfig(), config.mask_token_id, CHUNK_BLOCKS)
    example = Example(np.random.default_rng(0).integers(200, vocab_size, length), np.arange(length) > 0)
    batch = build_draft_batch([example], [0], blocks=blocks, block_size=BLOCK_SIZE, seed=0)
    before = _resident_bytes()
    with _Peak() as peak:
        loss, _ = step(batch)
        loss.backward()
    print(json.dumps(peak.bytes - before))


class _Peak:
    """Largest resident size while the block runs, sampled every millisecond."""

    def __enter__(self) -> "_Peak":
        self.bytes, self._stop = 0, False
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop = True
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop:
            self.bytes = max(self.bytes, _resident_bytes())
            time.sleep(0.001)


def _resident_bytes() -> int:
    import psutil

    return psutil.Process().memory_info().rss


if __name__ == "__main__":
    main()
