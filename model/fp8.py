"""Linear layers in 8-bit floating point (float8_e4m3fn): half of bfloat16's memory, twice its speed where a card can.

A weight has one scale for each output, an input one for each token, found anew each time: value = number * scale.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import ScalingType

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max


def to_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (L, D) -> numbers (L, D) in float8_e4m3fn and scales (L, 1) in float32, so that each row's largest is 448."""
    x = x.float()
    scale = (x.abs().amax(dim=-1, keepdim=True) / LARGEST).clamp(min=1e-12)
    return (x / scale).to(FP8), scale


def can_multiply(device: torch.device) -> bool:
    """CPUs do, and NVIDIA's GPUs from Ada and Hopper on."""
    return device.type == "cpu" or device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


class Fp8Linear(nn.Module):
    """weight (out, in) in float8_e4m3fn, scale (out, 1) in float32, bias (out,) in the dtype of the inputs.

    Where the device can't multiply such numbers, `multiplies` is false and the weight is widened for each call.
    """

    def __init__(self, in_features: int, out_features: int, multiplies: bool):
        super().__init__()
        self.in_features, self.out_features, self.multiplies = in_features, out_features, multiplies
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=FP8), requires_grad=False)
        self.scale = nn.Parameter(torch.empty(out_features, 1), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False)

    def widened(self, rows: slice = slice(None)) -> Tensor:
        return self.weight[rows].float() * self.scale[rows]

    def forward(self, x: Tensor, rows: slice = slice(None)) -> Tensor:
        """x (B, L, in) -> (B, L, out), or the outputs `rows` of it."""
        if not self.multiplies:
            return F.linear(x, self.widened(rows).to(x.dtype), self.bias[rows])
        numbers, scale = to_fp8(x.flatten(0, -2))
        out = F.scaled_mm(
            numbers, self.weight[rows].t(),
            scale, ScalingType.RowWise, self.scale[rows].t(), ScalingType.RowWise,
            bias=self.bias[rows].bfloat16() if x.is_cuda else self.bias[rows],
            output_dtype=torch.bfloat16 if x.is_cuda else x.dtype,  # all that GPUs give for scales by rows
        )  # fmt: skip
        return out.to(x.dtype).unflatten(0, x.shape[:-1])
