"""Where the mask forbids nothing, the library computes what the kernel would, faster.

Images are the same without this file: `kernel_attention` can take its place.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from regional.attention import MaskedAttention, Tokens, allowed
from regional.kernel import empty_output, kernel_attention, store_blended


def kernel_or_library(tokens: Tokens, dtype: torch.dtype, device: torch.device) -> MaskedAttention:
    """Masked attention on a GPU: the kernel, or the library if that does as well."""
    if tokens.log_weight is None and forbids_nothing(tokens.bits):
        return library_attention(tokens, device)
    return kernel_attention(tokens, dtype, device)


def forbids_nothing(bits: Tensor) -> bool:
    """Whether all tokens with bits, (L,) int64, may see each other."""
    values = bits[bits != 0].unique()
    return len(values) > 0 and bool(allowed(values[:, None], values[None, :]).all())


def library_attention(tokens: Tokens, device: torch.device) -> MaskedAttention:
    """The library's attention of the tokens with bits, which all see each other."""
    counts = tokens.bits.cpu() != 0
    row = torch.where(counts, counts.cumsum(0) - 1, -1)
    _, lengths = counts.unique_consecutive(return_counts=True)
    ends = lengths.cumsum(0).tolist()
    runs = [slice(*run) for run in zip([0, *ends], ends) if counts[run[0]]]
    row = row.to(device, torch.int32)
    base_row = tokens.base_row.to(device, torch.int32)
    base_weight = tokens.base_weight.to(device, torch.float32)

    def counting_rows(x: Tensor) -> Tensor:
        pieces = [x[:, :, run] for run in runs]
        return torch.cat(pieces, dim=2) if len(pieces) > 1 else pieces[0]

    def masked(q: Tensor, k: Tensor, v: Tensor, base: Tensor | None = None) -> Tensor:
        regional = F.scaled_dot_product_attention(*(counting_rows(x) for x in (q, k, v)))
        if base is None and regional.shape == q.shape:
            return regional
        return blend_op(regional, row, base, base_row, base_weight)

    return masked


@triton.jit
def blend_kernel(
    regional, row, o, base, base_row, base_weight,
    regional_b, regional_h, regional_l, o_b, o_h, o_l, base_b, base_h, base_l, L,
    D: tl.constexpr, ROWS: tl.constexpr, BASE: tl.constexpr,
):  # fmt: skip
    """One program writes ROWS tokens of one head; the grid is (tiles, heads, images).
    Token i is row row[i] of `regional`, or zeros where that is -1, blended with base."""
    h = tl.program_id(1)
    b = tl.program_id(2)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    source = tl.load(row + rows, mask=rows < L, other=-1)[:, None]
    pointers = regional + b.to(tl.int64) * regional_b + h.to(tl.int64) * regional_h
    pointers += source.to(tl.int64) * regional_l + tl.arange(0, D)[None]
    acc = tl.load(pointers, mask=source >= 0, other=0.0).to(tl.float32)
    strides = (o_b, o_h, o_l), (base_b, base_h, base_l)
    store_blended(acc, o, base, (base_row, base_weight), strides, (b, h), rows, L, BASE)


# An operator, so that torch.compile and the meta device know it.
@torch.library.custom_op("regional::blend", mutates_args=())
def blend_op(
    regional: Tensor, row: Tensor, base: Tensor | None, base_row: Tensor, base_weight: Tensor
) -> Tensor:  # fmt: skip
    """regional (B, H, n, D), base (B, H, L_base, D), row, base_row (L,) int32, base_weight (L,)
    float32 -> (B, H, L, D), laid out as (B, L, H, D)."""
    batch, heads, _, head_dim = regional.shape
    rows = 64
    out = empty_output(regional, len(row))
    base = out if base is None else base  # wanted as a pointer; it is not read
    blend_kernel[triton.cdiv(len(row), rows), heads, batch](
        regional, row, out, base, base_row, base_weight,
        *regional.stride()[:3], *out.stride()[:3], *base.stride()[:3], len(row),
        D=head_dim, ROWS=rows, BASE=base is not out, enable_fp_fusion=True,
    )  # fmt: skip
    return out


blend_op.register_fake(lambda regional, row, *rest: empty_output(regional, len(row)))
