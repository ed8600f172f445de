"""How much of a log-probability is rounding: the model once more, with all that it computes rounded anew.

In bf16 a sum over 256 tokens is off by about a nat, and by another amount once a few weights have moved.
Called by `rcpo.reference.maker`.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

SIGNIFICANT_BITS = 8
"""Of bf16, the hidden one included."""


@contextlib.contextmanager
def rounded_anew(model: PreTrainedModel) -> Iterator[None]:
    """While open, about half of the embeddings' numbers go to a neighbour among bf16 numbers: every sum
    behind them is another, and may be rounded to another side. Draws nothing from torch's own generators."""
    generator = torch.Generator().manual_seed(0)

    def move(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        draws = 2 * torch.rand(output.shape, generator=generator).to(output.device) - 1
        spacing = torch.ldexp(torch.ones_like(draws), torch.frexp(output.float()).exponent - SIGNIFICANT_BITS)
        return (output.float() + draws * spacing).to(output.dtype)

    handle = model.get_input_embeddings().register_forward_hook(move)
    try:
        yield
    finally:
        handle.remove()
