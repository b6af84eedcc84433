"""Linear layers in 8-bit floating point (float8_e4m3fn): half of bfloat16's memory, and twice
its speed on GPUs that multiply in it. Value = number * scale; a weight has a scale for each
output, an input one for each token, recomputed each time.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import ScalingType

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max


def to_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (L, D) -> numbers (L, D), each row's largest 448, and scales (L, 1) in float32."""
    scale = (x.abs().amax(dim=-1, keepdim=True).float() / LARGEST).clamp(min=1e-12)
    return (x / scale).to(FP8), scale


@cache
def why_not(device: torch.device) -> str:
    """Why this device, with this build of torch, lacks the product that Fp8Linear needs; empty if
    it has it, as Ada, Hopper and newer do. It is tried at a plausible layer size."""
    x = torch.zeros(256, 256, device=device)
    try:
        scaled_product(*to_fp8(x), *to_fp8(x), x[0], torch.bfloat16)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError) as error:  # what it can't multiply torch refuses with either
        return str(error).partition("\n")[0] or type(error).__name__
    return ""


def can_multiply(device: torch.device) -> bool:
    return not why_not(device)


@torch.library.custom_op("regional::scaled_product", mutates_args=())
def scaled_product(
    x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, dtype: torch.dtype
) -> Tensor:
    """x (L, in) and weight (out, in) in float8_e4m3fn, with scales (L, 1) and (out, 1) -> (L, out).

    It is its own operator because torch 2.13 cannot compile `scaled_mm` for a GPU if the bias
    is a slice of a larger one, as in `single_blocks.linear1`.
    """
    on_gpu = x.is_cuda
    out_dtype = torch.bfloat16 if on_gpu else dtype  # a GPU has no other for scales by rows
    scales = x_scale, ScalingType.RowWise, scale.t(), ScalingType.RowWise
    how = {"bias": bias.to(out_dtype), "output_dtype": out_dtype, "use_fast_accum": on_gpu}
    return F.scaled_mm(x, weight.t(), *scales, **how).to(dtype)


@scaled_product.register_fake
def product_like(x, x_scale, weight, scale, bias, dtype):
    return x.new_empty(x.shape[0], weight.shape[0], dtype=dtype)


class Fp8Linear(nn.Module):
    """weight (out, in) in float8_e4m3fn, scale (out, 1) in float32, bias (out,) in any dtype.

    Where the device can't multiply such numbers, `multiplies` is false and each call upcasts them.
    """

    def __init__(self, in_features: int, out_features: int, multiplies: bool):
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.multiplies = multiplies
        weight = torch.empty(out_features, in_features, dtype=FP8)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scale = nn.Parameter(torch.empty(out_features, 1), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False)

    def upcast(self, rows: slice = slice(None)) -> Tensor:
        return self.weight[rows].float() * self.scale[rows]

    def forward(self, x: Tensor, rows: slice = slice(None)) -> Tensor:
        """x (B, L, in) -> (B, L, out), or the outputs `rows` of it."""
        if not self.multiplies:
            return F.linear(x, self.upcast(rows).to(x.dtype), self.bias[rows])
        layer = self.weight[rows], self.scale[rows], self.bias[rows]
        out = scaled_product(*to_fp8(x.flatten(0, -2)), *layer, x.dtype)
        return out.unflatten(0, x.shape[:-1])
