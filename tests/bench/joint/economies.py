"""Work without an effect on the loss, from counts alone, which we leave out: the last layer's, and that of dead blocks.

Dead blocks are left out in whole eighths of the noisy half (model/attention/live.py).
"""

from typing import Any

from conf.schema import Objective
from pretrain.costs import count_step_flops
from tests.bench.joint.cases import BLOCK_SIZE, Case, build_input


def count_economies(case: Case) -> dict[str, Any]:
    """Return shares of the useful FLOPs.

    last_layer_positions: MLP and output projection of the last layer's positions without loss. empty_blocks: positions
    of noisy blocks without a masked token, in expectation over training's masking probabilities, uniform in (0, 1]:
    a block of n has none with probability 1 / (n + 1); at this case's fixed half there are none.
    """
    counts, model = build_input(case, Objective.joint).counts, case.model
    total = sum(count_step_flops(model, counts.positions, counts.attended_pairs, counts.clean + counts.masked))
    unscored = counts.positions - counts.clean - counts.masked
    after_attention = model.hidden_size * (model.query_width + 3 * model.ffn_hidden_size)
    layers = 6 * model.num_layer_parameters * counts.positions
    return {
        "last_layer_positions": 6 * after_attention * unscored / total,
        "empty_blocks": layers / 2 / (BLOCK_SIZE + 1) / total,
    }
