"""What the kernels of the decoder and of the training step share. `triton` is None where it is not installed."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
    from triton.language.extra import cuda
except ImportError:  # torch brings Triton where it has a GPU for it
    triton = tl = cuda = None

Tensor = torch.Tensor
__all__ = ["Tensor", "cuda", "fuse", "pdl", "rotate", "silu_and_mul", "tl", "triton", "wait_for_previous"]


@cache
def pdl() -> dict[str, bool]:
    """Launch options of programmatic dependent launch, from Hopper on: a kernel starts while the one before ends."""
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
    return {"PDL": hopper, "launch_pdl": hopper}


def fuse(layers: Sequence[Any], *more_rows: Tensor) -> tuple[Tensor, Tensor | None]:
    """The weights of linear layers with one input, stacked to (O, K), then `more_rows`; and their biases, (O,).

    The layers keep views of the new tensor, so that nothing is stored twice.
    """
    parts = [*(layer.weight.data for layer in layers), *more_rows]
    weight = torch.cat(parts)
    for layer, rows in zip(layers, weight.split([len(part) for part in parts]), strict=False):
        layer.weight.data = rows
    biases = [layer.bias for layer in layers]
    return weight, None if biases[0] is None else torch.cat([bias.data for bias in biases])


if triton:

    @triton.jit
    def wait_for_previous(PDL: tl.constexpr):
        """Let the next kernel be launched, then wait for what the one before has written."""
        if PDL:
            cuda.gdc_launch_dependents()
            cuda.gdc_wait()

    @triton.jit
    def rotate(one, two, cos, sin):
        """Both halves of a head, rotated; twin: `rope.rotate`."""
        return one * cos - two * sin, two * cos + one * sin

    @triton.jit
    def silu_and_mul(gate, up):
        """SwiGLU; twin: `functional.silu(gate) * up`."""
        return gate * tl.sigmoid(gate) * up

else:
    wait_for_previous = rotate = silu_and_mul = None
