"""Regional attention as one Triton kernel: the mask is one integer per token, tested in-line, and never stored.

The kernel is FlashAttention's online softmax (arXiv 2205.14135, 2307.08691) over lists of tiles.
Which tiles of keys a tile of queries may see in full, in part or not at all depends on the layout
alone: `tile_lists` finds it once for all heads, blocks and steps. The kernel goes through a query
tile's full tiles without any mask code, then through its partial tiles testing `bits_allowed`,
never meets the forbidden ones, and blends with the base branch as it writes. Where tokens weigh the
prompts of their regions (strength, feather), those pairs of tiles are partial ones too, and only
they read the weights. Where the mask forbids nothing, the library's attention is called instead.

On Hopper and newer, tiles come through TMA descriptors; elsewhere, and in Triton's interpreter (TRITON_INTERPRET=1: the
CPU, no bfloat16), through pointers. q, k and v may have any strides with the head dimension contiguous.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula
from triton.tools.tensor_descriptor import TensorDescriptor

from regional.attention import MaskedAttention, Tokens
from regional.mask import allowed

INTERPRETED = triton.knobs.runtime.interpret
# A partial tile's time over a full one's: its instructions on sm_90 are 1.9 (Triton 3.6) or
# 1.4 times (3.9) as many
MIXED_COST = 1.9
HEADS_TOGETHER = 8  # heads side by side in the grid; K and V of more would not fit into the L2

# The columns of `Tiles.queries` and of `Tiles.keys`
ROW_BEGIN, ROW_END = tl.constexpr(0), tl.constexpr(1)
FULL_BEGIN, MIXED_BEGIN, KEYS_END = tl.constexpr(2), tl.constexpr(3), tl.constexpr(4)
QUERY_COLUMNS = tl.constexpr(5)
KEY_ROW, KEY_BITS = tl.constexpr(0), tl.constexpr(1)
KEY_COLUMNS = tl.constexpr(2)


# ------------------------------------------------------------------------------------------------ on the GPU


@triton.jit
def bits_allowed(bits_q, bits_k):
    """This is the whole mask: `allowed` of regional/mask.py."""
    return (bits_q & bits_k) != 0


@triton.jit
def load_tile(x, stride_b, stride_h, stride_l, b, h, start, L, ROWS: tl.constexpr, D: tl.constexpr,
              TMA: tl.constexpr, RAGGED: tl.constexpr):  # fmt: skip
    """Load rows start .. start + ROWS of head h of image b, (ROWS, D); rows from L on are zeros.

    RAGGED tells the pointers that the rows may go that far; TMA checks by itself.
    """
    if TMA:
        tile = x.load([b, h, start, 0]).reshape(ROWS, D)
    else:
        row = tl.arange(0, ROWS)[:, None]
        x += b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h + start.to(tl.int64) * stride_l
        pointers = x + row * stride_l + tl.arange(0, D)[None]
        if RAGGED:
            tile = tl.load(pointers, mask=start + row < L, other=0.0)
        else:
            tile = tl.load(pointers)
    return tile


@triton.jit
def online_softmax(qk, v_tile, m_i, l_i, acc, scale):
    """Add a tile of scores and values to the running maximum (of scaled scores), sum and output."""
    m_ij = tl.maximum(m_i, tl.max(qk, 1) * scale)
    p = tl.exp2(qk * scale - m_ij[:, None])
    alpha = tl.exp2(m_i - m_ij)
    l_i = l_i * alpha + tl.sum(p, 1)
    acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * alpha[:, None], input_precision="ieee")
    return m_ij, l_i, acc


@triton.jit
def added_scores(log_weight, as_key, as_query, rows, rows_n, L, COLUMNS):
    """The log-weights of pairs of rows, (BLOCK_M, BLOCK_N); see `Tokens`."""
    column = tl.load(as_key + rows_n, mask=rows_n < L, other=0)
    weights = log_weight + (rows * COLUMNS)[:, None] + column[None, :]
    added = tl.load(weights, mask=rows[:, None] < L, other=0.0)
    column = tl.load(as_query + rows, mask=rows < L, other=0)
    weights = log_weight + column[:, None] + (rows_n * COLUMNS)[None, :]
    return added + tl.load(weights, mask=rows_n[None, :] < L, other=0.0)


@triton.jit
def store_blended(
    acc, o, base, base_row, base_weight, o_b, o_h, o_l, base_b, base_h, base_l, b, h, rows, end,
    D: tl.constexpr, BASE: tl.constexpr,
):  # fmt: skip
    """Blend acc (len(rows), D) with the base branch's rows and write the rows before `end`."""
    inside = rows < end
    b, h, d = b.to(tl.int64), h.to(tl.int64), tl.arange(0, D)[None]
    if BASE:
        weight = tl.load(base_weight + rows, mask=inside, other=0.0)[:, None]
        base_rows = tl.load(base_row + rows, mask=inside, other=0)[:, None]
        pointers = base + b * base_b + h * base_h + base_rows * base_l + d
        base_tile = tl.load(pointers, mask=weight != 0, other=0.0)
        acc = (1 - weight) * acc + weight * base_tile
    out = o + b * o_b + h * o_h + rows[:, None] * o_l + d
    tl.store(out, acc.to(o.dtype.element_ty), mask=inside[:, None])


@triton.jit
def regional_kernel(
    q, k, v, o, base, base_row, base_weight, queries, query_bits, keys, key_bits, as_key, as_query, log_weight,
    q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, o_b, o_h, o_l, base_b, base_h, base_l,
    L, COLUMNS, scale,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BASE: tl.constexpr, TMA: tl.constexpr,
    WEIGHTED: tl.constexpr, HEADS: tl.constexpr, MIXED_STAGES: tl.constexpr,
):  # fmt: skip
    """One program computes one tile of queries of one head.

    The grid is (tiles * HEADS, heads / HEADS, images): HEADS heads are side by side, so that the
    longest tiles of all of them start first. The lists are those of `Tiles`. scale is
    log2(e) / sqrt(D), because the hardware's exponential is of base 2. Strides are in elements,
    named tensor_axis.
    """
    tile = tl.program_id(0) // HEADS
    h = tl.program_id(1) * HEADS + tl.program_id(0) % HEADS
    b = tl.program_id(2)
    entry = queries + tile * QUERY_COLUMNS
    start = tl.load(entry + ROW_BEGIN)
    end = tl.load(entry + ROW_END)
    full_begin = tl.load(entry + FULL_BEGIN)
    mixed_begin = tl.load(entry + MIXED_BEGIN)
    keys_end = tl.load(entry + KEYS_END)
    rows = start + tl.arange(0, BLOCK_M)
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    if full_begin == keys_end:  # tokens of the base branch alone: there is nothing to load q for
        store_blended(acc, o, base, base_row, base_weight, o_b, o_h, o_l, base_b, base_h, base_l,
                      b, h, rows, end, D, BASE)  # fmt: skip
        return
    # The next tile's row is always loaded one iteration ahead, so that no load of K waits for it
    key_rows = keys + KEY_ROW
    start_n = tl.load(key_rows + full_begin * KEY_COLUMNS)
    q_tile = load_tile(q, q_b, q_h, q_l, b, h, start, L, BLOCK_M, D, TMA, RAGGED=True)
    # Not -inf: a row that has had no allowed key yet keeps this maximum, and exp2(-inf - m_i) is 0
    m_i = tl.full([BLOCK_M], -1e38, tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)

    for i in range(full_begin, mixed_begin):
        next_n = tl.load(key_rows + (i + 1) * KEY_COLUMNS)
        k_tile = load_tile(k, k_b, k_h, k_l, b, h, start_n, L, BLOCK_N, D, TMA, RAGGED=False)
        qk = tl.dot(q_tile, k_tile.T, input_precision="ieee")
        v_tile = load_tile(v, v_b, v_h, v_l, b, h, start_n, L, BLOCK_N, D, TMA, RAGGED=False)
        m_i, l_i, acc = online_softmax(qk, v_tile, m_i, l_i, acc, scale)
        start_n = next_n

    columns = tl.arange(0, BLOCK_N)
    bits_q = tl.load(query_bits + tile * BLOCK_M + tl.arange(0, BLOCK_M))
    for i in tl.range(mixed_begin, keys_end, num_stages=MIXED_STAGES):
        next_n = tl.load(key_rows + (i + 1) * KEY_COLUMNS)
        k_tile = load_tile(k, k_b, k_h, k_l, b, h, start_n, L, BLOCK_N, D, TMA, RAGGED=True)
        qk = tl.dot(q_tile, k_tile.T, input_precision="ieee")
        # The bits are loaded after the product, when its operands no longer need registers
        key_tile = tl.load(keys + i * KEY_COLUMNS + KEY_BITS)
        bits_k = tl.load(key_bits + key_tile * BLOCK_N + columns)
        if WEIGHTED:
            added = added_scores(log_weight, as_key, as_query, rows, start_n + columns, L, COLUMNS)
            qk += D**0.5 * added  # `scale` divides by the root again
        qk = tl.where(bits_allowed(bits_q[:, None], bits_k[None, :]), qk, float("-inf"))
        v_tile = load_tile(v, v_b, v_h, v_l, b, h, start_n, L, BLOCK_N, D, TMA, RAGGED=True)
        m_i, l_i, acc = online_softmax(qk, v_tile, m_i, l_i, acc, scale)
        start_n = next_n

    acc = acc / tl.where(l_i == 0.0, 1.0, l_i)[:, None]  # a row with nothing allowed gives zeros
    store_blended(acc, o, base, base_row, base_weight, o_b, o_h, o_l, base_b, base_h, base_l, b, h,
                  rows, end, D, BASE)  # fmt: skip


@triton.jit
def blend_kernel(
    regional, regional_row, o, base, base_row, base_weight,
    regional_b, regional_h, regional_l, o_b, o_h, o_l, base_b, base_h, base_l, L,
    D: tl.constexpr, ROWS: tl.constexpr, BASE: tl.constexpr,
):  # fmt: skip
    """One program writes ROWS tokens of one head; the grid is (tiles, heads, images).

    Token i is row regional_row[i] of `regional`, or zeros where that is -1, blended with base.
    """
    h, b = tl.program_id(1), tl.program_id(2)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    source = tl.load(regional_row + rows, mask=rows < L, other=-1)[:, None]
    pointers = regional + b.to(tl.int64) * regional_b + h.to(tl.int64) * regional_h
    pointers += source.to(tl.int64) * regional_l + tl.arange(0, D)[None]
    acc = tl.load(pointers, mask=source >= 0, other=0.0).to(tl.float32)
    store_blended(acc, o, base, base_row, base_weight, o_b, o_h, o_l, base_b, base_h, base_l, b, h,
                  rows, L, D, BASE)  # fmt: skip


# ------------------------------------------------------------------------------------------------ once per layout


class Tiles(NamedTuple):
    """What the kernel goes through; bits are int64, the rest int32. Constants name the columns.

    queries (n, 5): a tile's first row, the row after its last, and where in `keys` its full tiles
    begin, its partial tiles begin, and its tiles end; the longest lists first, so that the last
    programs to run are short ones.
    query_bits (n, block_m): the bits of those rows, zeros after the end.
    keys (m + 1, 2): a tile's first row, and its row in key_bits; the last row stands for no tile.
    key_bits (tiles, block_n): the bits of a key tile, zeros after its end.
    pairs: how many (query, key) are allowed.
    """

    queries: Tensor
    query_bits: Tensor
    keys: Tensor
    key_bits: Tensor
    pairs: int


def cut(bits: Tensor, block: int) -> list[tuple[int, int]]:
    """Cut the sequence into tiles of at most `block` tokens, [(start, end)].

    Tiles end where a run of equal bits ends if that run or the next is as long as one and a half tiles: a tile that
    straddles the border of a large region is mixed with everything. Short runs share tiles, half-empty ones cost more.
    """
    runs = bits.unique_consecutive(return_counts=True)[1].tolist()
    tiles, start, end = [], 0, 0
    for i, run in enumerate(runs):
        end += run
        while end - start > block:
            tiles.append((start, start + block))
            start += block
        if i + 1 == len(runs) or max(run, runs[i + 1]) >= 1.5 * block:
            tiles.append((start, end))
            start = end
    return tiles


def tile_lists(bits: Tensor, block_m: int, block_n: int, weights: tuple[Tensor, Tensor, Tensor] | None = None) -> Tiles:
    """bits: (L,) int64 on the CPU, best sorted; weights: log_weight, as_key and as_query of Tokens, there too. Exact:
    made from the rule itself, for each pair of distinct bits."""
    values, kind = bits.unique(return_inverse=True)
    rule = allowed(values[:, None], values[None, :]).float()

    def tokens_of_each_kind(tiles: list[tuple[int, int]]) -> Tensor:
        return torch.stack([kind[start:end].bincount(minlength=len(values)) for start, end in tiles]).float()

    query_tiles, key_tiles = cut(bits, block_m), cut(bits, block_n)
    pairs = tokens_of_each_kind(query_tiles) @ rule @ tokens_of_each_kind(key_tiles).T
    rows = torch.tensor([end - start for start, end in query_tiles])
    full = pairs == rows[:, None] * block_n
    if weights is not None:
        log_weight, as_key, as_query = weights
        columns = torch.arange(log_weight.shape[1])

        def weighs(tiles: list[tuple[int, int]]) -> Tensor:
            return torch.stack([log_weight[start:end].ne(0).any(0) for start, end in tiles]).float()

        def has(tiles: list[tuple[int, int]], column: Tensor) -> Tensor:
            return torch.stack([torch.isin(columns, column[start:end]) for start, end in tiles]).float()

        full &= weighs(query_tiles) @ has(key_tiles, as_key).T == 0
        full &= has(query_tiles, as_query) @ weighs(key_tiles).T == 0
    mixed = (pairs > 0) & ~full

    queries, keys = [], []
    order = (full.sum(1) + MIXED_COST * mixed.sum(1)).argsort(descending=True, stable=True).tolist()
    for i in order:
        full_begin = len(keys)
        keys += [(key_tiles[j][0], j) for j in full[i].nonzero().flatten().tolist()]
        mixed_begin = len(keys)
        keys += [(key_tiles[j][0], j) for j in mixed[i].nonzero().flatten().tolist()]
        queries.append((*query_tiles[i], full_begin, mixed_begin, len(keys)))
    keys.append((0, 0))  # the kernel loads the row after the last tile's
    return Tiles(
        torch.tensor(queries, dtype=torch.int32),
        padded(bits, [query_tiles[i] for i in order], block_m),
        torch.tensor(keys, dtype=torch.int32).reshape(-1, 2),
        padded(bits, key_tiles, block_n),
        int(pairs.sum(dtype=torch.float64)),
    )


def padded(values: Tensor, tiles: list[tuple[int, int]], block: int) -> Tensor:
    """The values of each tile's tokens, (len(tiles), block); zeros after a tile's end."""
    return torch.stack([F.pad(values[start:end], (0, block - (end - start))) for start, end in tiles])


# ------------------------------------------------------------------------------------------------ launching it


class Launch(NamedTuple):
    """Tile sizes, how the kernel is compiled for them, and how it loads; see tests/cross_compile.py."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    tma: bool
    mixed_stages: int = 1

    def weighted(self) -> "Launch":
        """With weights, which loaded stages ahead as K and V are would not fit into shared memory.

        Only the partial tiles' loop reads them; that of the full tiles stays pipelined.
        """
        return self._replace(mixed_stages=1)


def launch_for(dtype: torch.dtype, capability: tuple[int, int]) -> Launch:
    if dtype == torch.float32:  # IEEE products, which the tensor cores do not have
        return Launch(32, 32, num_warps=8, num_stages=1, tma=False, mixed_stages=1)
    if (9, 0) <= capability < (12, 0):  # data center GPUs from Hopper on: 227 KB of shared memory
        return Launch(128, 128, num_warps=8, num_stages=3, tma=True, mixed_stages=3)
    return Launch(128, 64, num_warps=8, num_stages=3, tma=False, mixed_stages=3)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    base: Tensor | None,
    base_row: Tensor,
    base_weight: Tensor,
    queries: Tensor,
    query_bits: Tensor,
    keys: Tensor,
    key_bits: Tensor,
    as_key: Tensor | None,
    as_query: Tensor | None,
    log_weight: Tensor | None,
    pairs: int,
    block_m: int,
    block_n: int,
    num_warps: int,
    num_stages: int,
    tma: bool,
    mixed_stages: int,
) -> Tensor:
    """Launch the kernel. q, k, v (B, H, L, D) and base (B, H, L_base, D) -> (B, H, L, D), laid out as (B, L, H, D)."""
    batch, heads, length, head_dim = q.shape
    out = empty_output(q, length)
    has_base = base is not None
    weighted = log_weight is not None
    base = base if has_base else out  # the launcher wants pointers; these are not read
    weights = (as_key, as_query, log_weight) if weighted else (base_row, base_row, base_weight)
    if head_dim not in (32, 64, 128) or q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"the kernel is not made for heads of {head_dim} in {q.dtype}")
    if any(x.stride(-1) != 1 for x in (q, k, v, base)):
        raise ValueError("the kernel needs q, k, v and base with a contiguous head dimension")
    if INTERPRETED and q.dtype == torch.bfloat16:
        raise ValueError("Triton's interpreter multiplies bfloat16 wrongly; use float32 or float16 there")
    tensors = q, k, v
    if tma:
        boxes = ([1, 1, rows, head_dim] for rows in (block_m, block_n, block_n))
        tensors = map(TensorDescriptor.from_tensor, tensors, boxes)
    together = math.gcd(heads, HEADS_TOGETHER)
    regional_kernel[len(queries) * together, heads // together, batch](
        *tensors, out, base, base_row, base_weight, queries, query_bits, keys, key_bits, *weights,
        *(stride for x in (q, k, v, out, base) for stride in x.stride()[:3]),
        length, weights[-1].shape[-1], math.log2(math.e) / head_dim**0.5,
        D=head_dim, BLOCK_M=block_m, BLOCK_N=block_n, BASE=has_base, TMA=tma, WEIGHTED=weighted,
        HEADS=together, MIXED_STAGES=mixed_stages,
        num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=True,
    )  # fmt: skip
    return out


def empty_output(q: Tensor, length: int) -> Tensor:
    """(B, H, length, D) in memory as (B, length, H, D), so that joining heads copies nothing."""
    batch, heads, _, head_dim = q.shape
    return q.new_empty(batch, length, heads, head_dim).transpose(1, 2)


# As an operator of torch, so that torch.compile, the meta device and FlopCounterMode know what it gives and costs
attend_op = torch.library.custom_op("regional::attend", attend, mutates_args=())
attend_op.register_fake(lambda q, *rest: empty_output(q, q.shape[2]))


@register_flop_formula(torch.ops.regional.attend)
def flops(q_shape, k_shape, v_shape, base_shape, base_row, base_weight, queries, query_bits, keys, key_bits, as_key,
          as_query, log_weight, pairs, *_, out_shape=None, **kwargs) -> int:  # fmt: skip
    """An allowed pair of tokens costs two products of 2 D operations in each head."""
    batch, heads, _, head_dim = q_shape
    return 4 * batch * heads * head_dim * pairs


def blend(
    regional: Tensor,
    regional_row: Tensor,
    base: Tensor | None,
    base_row: Tensor,
    base_weight: Tensor,
) -> Tensor:
    """The tokens' results from those of the ones that count.

    regional (B, H, n, D), base (B, H, L_base, D); regional_row, base_row (L,) int32 and base_weight
    (L,) float32 as in `blend_kernel` -> (B, H, L, D), laid out as (B, L, H, D).
    """
    batch, heads, _, head_dim = regional.shape
    length = len(regional_row)
    rows = 64
    out = empty_output(regional, length)
    has_base = base is not None
    base = base if has_base else out  # the launcher wants a pointer; it is not read
    blend_kernel[triton.cdiv(length, rows), heads, batch](
        regional, regional_row, out, base, base_row, base_weight,
        *(stride for x in (regional, out, base) for stride in x.stride()[:3]), length,
        D=head_dim, ROWS=rows, BASE=has_base, enable_fp_fusion=True,
    )  # fmt: skip
    return out


blend_op = torch.library.custom_op("regional::blend", blend, mutates_args=())
blend_op.register_fake(lambda regional, rows, *rest: empty_output(regional, len(rows)))


def forbids_nothing(bits: Tensor) -> bool:
    """Whether all tokens with bits, (L,) int64, may see each other, as without a mask."""
    values = bits[bits != 0].unique()
    return len(values) > 0 and bool(allowed(values[:, None], values[None, :]).all())


def library_attention(tokens: Tokens, device: torch.device) -> MaskedAttention:
    """The library's attention over the tokens that have bits, which all see each other."""
    counts = tokens.bits.cpu() != 0
    regional_row = torch.where(counts, counts.cumsum(0) - 1, -1)
    _, lengths = counts.unique_consecutive(return_counts=True)
    ends = lengths.cumsum(0).tolist()
    runs = [slice(start, end) for start, end in zip([0, *ends], ends) if counts[start]]
    given = regional_row.int(), tokens.base_row.int(), tokens.base_weight.float()
    regional_row, base_row, base_weight = (x.to(device) for x in given)

    def counting_rows(x: Tensor) -> Tensor:
        pieces = [x[:, :, run] for run in runs]
        return torch.cat(pieces, dim=2) if len(pieces) > 1 else pieces[0]

    def masked(q: Tensor, k: Tensor, v: Tensor, base: Tensor | None = None) -> Tensor:
        regional = F.scaled_dot_product_attention(*(counting_rows(x) for x in (q, k, v)))
        if base is None and regional.shape == q.shape:
            return regional
        return blend_op(regional, regional_row, base, base_row, base_weight)

    return masked


def kernel_attention(tokens: Tokens, dtype: torch.dtype, device: torch.device) -> MaskedAttention:
    """The kernel for tokens with these bits and q, k, v of this dtype on this device.

    It is the library's attention where the mask forbids nothing and nothing is weighed.
    """
    if tokens.log_weight is None and forbids_nothing(tokens.bits):
        return library_attention(tokens, device)
    launch = launch_for(dtype, torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0))
    weights = None
    if tokens.log_weight is not None:
        launch = launch.weighted()
        weights = tokens.log_weight.cpu(), tokens.as_key.int().cpu(), tokens.as_query.int().cpu()
    *lists, pairs = tile_lists(tokens.bits.cpu(), launch.block_m, launch.block_n, weights)
    blend_and_lists = [x.to(device) for x in (tokens.base_row.int(), tokens.base_weight.float(), *lists)]
    blend_and_lists += [x.to(device) for x in (*weights[1:], weights[0])] if weights else [None] * 3

    def masked(q: Tensor, k: Tensor, v: Tensor, base: Tensor | None = None) -> Tensor:
        return attend_op(q, k, v, base, *blend_and_lists, pairs, *launch)

    return masked


def runs_on(device: torch.device) -> bool:
    """True for NVIDIA's GPUs from Ampere on; others lack bfloat16 and the shared memory."""
    is_nvidia = device.type == "cuda" and torch.version.hip is None
    return is_nvidia and torch.cuda.get_device_capability(device) >= (8, 0)
