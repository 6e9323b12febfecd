"""Cases of the forms of attention that `make bench-gpu` compares with ours, at its shape, under the joint mask."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from model.attention.visibility import build_regular_layout, compute_dense_mask, find_visible_keys
from tests.bench.gpu.attention import AUTOTUNED, FLASH_FORMS, FLEX_FORMS, FlexForm, build_flex_form
from tests.kernels.attention_cases import BLOCK_SIZE, HEAD_DIM
from tests.kernels.case import Draw, Tensors, differentiate

# FlashAttention 4 is compiled by tests/kernels/flash; what inductor searches for is chosen by measuring on a device.
NOT_HERE = (*FLASH_FORMS, AUTOTUNED)


@dataclass(frozen=True)
class BenchCase:
    """Attention of one layer over [noisy | clean] of a sequence, in a form of the bench."""

    name: str
    form: FlexForm
    length: int
    query_heads: int
    key_heads: int

    def draw(self, draw: Draw) -> Tensors:
        """Return heads and the output's gradient [1, n, 2S, D]."""
        heads = {"query": self.query_heads, "key": self.key_heads, "value": self.key_heads}
        inputs = {name: draw(1, number, 2 * self.length, HEAD_DIM) for name, number in heads.items()}
        gradient = draw(1, self.query_heads, 2 * self.length, HEAD_DIM)
        return {**{name: tensor.requires_grad_() for name, tensor in inputs.items()}, "gradient": gradient}

    def run(self, inputs: Tensors) -> Tensors:
        """Return output and gradients, as the bench computes them on the inputs' device."""
        keys = find_visible_keys(build_regular_layout(self.length, BLOCK_SIZE), doubled=True)
        attend = build_flex_form(keys.to(inputs["query"].device), self.form)
        return differentiate(attend, inputs, inputs["gradient"])

    def compute_reference(self, inputs: Tensors) -> Tensors:
        """Return the same, from one dense softmax over masked scores."""
        mask = compute_dense_mask(build_regular_layout(self.length, BLOCK_SIZE), doubled=True)[:, None]

        def attend(*heads: Tensor) -> Tensor:
            return scaled_dot_product_attention(*heads, attn_mask=mask, enable_gqa=True)

        return differentiate(attend, inputs, inputs["gradient"])


def list_bench_cases(length: int, query_heads: int, key_heads: int, label: str) -> list[BenchCase]:
    """Return a case for every form of FlexAttention's own kernels."""
    forms = {name: form for name, form in FLEX_FORMS.items() if name not in NOT_HERE}
    words = {name: name.removeprefix("flex, ").replace(",", "").replace(" ", "_") for name in forms}
    sizes = (length, query_heads, key_heads)
    return [BenchCase(f"bench/{words[name]}/{label}", form, *sizes) for name, form in forms.items()]
