"""Regional attention as one Triton kernel: the mask is one integer per token, tested in-line.

It is FlashAttention's online softmax (arXiv 2205.14135, 2307.08691) over lists of tiles:
which key tiles a query tile sees in full, in part or not at all, found by `tile_lists`
once for all heads, blocks and steps. The kernel goes through the full tiles without
mask code, then through the partial ones, testing `bits_allowed`, and blends with the
base branch as it writes. Tiles with weights count as partial.

Hopper and newer load tiles by TMA descriptors, other GPUs by pointers, and so does
Triton's interpreter (TRITON_INTERPRET=1: the CPU, no bfloat16).
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from regional.attention import MaskedAttention, Tokens, allowed

INTERPRETED = triton.knobs.runtime.interpret
MIXED_COST = 1.9  # a partial tile over a full one, on sm_90
HEADS_TOGETHER = 8  # in the grid; K and V of more do not fit into L2


@triton.jit
def bits_allowed(bits_q, bits_k):
    """The whole mask, as `allowed` in regional/attention.py."""
    return (bits_q & bits_k) != 0


@triton.jit
def load_tile(x, strides, head, start, L, ROWS: tl.constexpr, D: tl.constexpr,
              TMA: tl.constexpr, RAGGED: tl.constexpr):  # fmt: skip
    """Rows start .. start + ROWS of a head (b, h); zeros from L on, where RAGGED allows it."""
    b, h = head
    if TMA:
        tile = x.load([b, h, start, 0]).reshape(ROWS, D)
    else:
        stride_b, stride_h, stride_l = strides
        x += b.to(tl.int64) * stride_b
        x += h.to(tl.int64) * stride_h
        x += start.to(tl.int64) * stride_l
        row = tl.arange(0, ROWS)[:, None]
        pointers = x + row * stride_l + tl.arange(0, D)[None]
        if RAGGED:
            tile = tl.load(pointers, mask=start + row < L, other=0.0)
        else:
            tile = tl.load(pointers)
    return tile


@triton.jit
def online_softmax(qk, v_tile, m_i, l_i, acc, scale):
    """Add a tile of scores and values to the running maximum, sum and output."""
    m_ij = tl.maximum(m_i, tl.max(qk, 1) * scale)
    p = tl.exp2(qk * scale - m_ij[:, None])
    alpha = tl.exp2(m_i - m_ij)
    l_i = l_i * alpha + tl.sum(p, 1)
    acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * alpha[:, None], input_precision="ieee")
    return m_ij, l_i, acc


@triton.jit
def added_scores(log_weight, as_key, as_query, rows, rows_n, L, COLUMNS):
    """The log-weights of pairs of rows, as in `Tokens`."""
    column = tl.load(as_key + rows_n, mask=rows_n < L, other=0)
    weights = log_weight + (rows * COLUMNS)[:, None] + column[None, :]
    added = tl.load(weights, mask=rows[:, None] < L, other=0.0)
    column = tl.load(as_query + rows, mask=rows < L, other=0)
    weights = log_weight + column[:, None] + (rows_n * COLUMNS)[None, :]
    return added + tl.load(weights, mask=rows_n[None, :] < L, other=0.0)


@triton.jit
def store_blended(acc, o, base, blend, strides, head, rows, end, BASE: tl.constexpr):
    """Blend acc with the base branch's rows and write the rows before `end`. blend: base_row
    and base_weight; strides: those of o and of base."""
    base_row, base_weight = blend
    (o_b, o_h, o_l), (base_b, base_h, base_l) = strides
    b = head[0].to(tl.int64)
    h = head[1].to(tl.int64)
    inside = rows < end
    d = tl.arange(0, acc.shape[1])[None]
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
    q, k, v, o, base,
    base_row, base_weight, queries, query_bits, keys, key_bits, as_key, as_query, log_weight,
    q_b, q_h, q_l, k_b, k_h, k_l, v_b, v_h, v_l, o_b, o_h, o_l, base_b, base_h, base_l,
    L, COLUMNS, scale,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BASE: tl.constexpr,
    TMA: tl.constexpr, WEIGHTED: tl.constexpr, HEADS: tl.constexpr, MIXED_STAGES: tl.constexpr,
):  # fmt: skip
    """One program computes one tile of queries of one head.

    The grid is (tiles * HEADS, heads / HEADS, images): of HEADS heads side by side the
    longest tiles start first. The second line of arguments is `Plan`; scale is
    log2(e) / sqrt(D), as the hardware's exponential is of base 2.
    """
    tile = tl.program_id(0) // HEADS
    head = (tl.program_id(2), tl.program_id(1) * HEADS + tl.program_id(0) % HEADS)
    blend = (base_row, base_weight)
    out_strides = ((o_b, o_h, o_l), (base_b, base_h, base_l))
    entry = queries + 5 * tile
    start = tl.load(entry)
    end = tl.load(entry + 1)
    full_begin = tl.load(entry + 2)
    mixed_begin = tl.load(entry + 3)
    keys_end = tl.load(entry + 4)
    rows = start + tl.arange(0, BLOCK_M)
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    if full_begin == keys_end:  # tokens of the base branch alone
        store_blended(acc, o, base, blend, out_strides, head, rows, end, BASE)
        return
    # The next tile's row is loaded one iteration ahead: no load of K waits for it.
    start_n = tl.load(keys + 2 * full_begin)
    q_tile = load_tile(q, (q_b, q_h, q_l), head, start, L, BLOCK_M, D, TMA, RAGGED=True)
    # Not -inf: rows without an allowed key so far keep it, and exp2(-inf - m_i) is 0.
    m_i = tl.full([BLOCK_M], -1e38, tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)

    for i in range(full_begin, mixed_begin):
        next_n = tl.load(keys + 2 * (i + 1))
        k_tile = load_tile(k, (k_b, k_h, k_l), head, start_n, L, BLOCK_N, D, TMA, RAGGED=False)
        qk = tl.dot(q_tile, k_tile.T, input_precision="ieee")
        v_tile = load_tile(v, (v_b, v_h, v_l), head, start_n, L, BLOCK_N, D, TMA, RAGGED=False)
        m_i, l_i, acc = online_softmax(qk, v_tile, m_i, l_i, acc, scale)
        start_n = next_n

    columns = tl.arange(0, BLOCK_N)
    bits_q = tl.load(query_bits + tile * BLOCK_M + tl.arange(0, BLOCK_M))
    for i in tl.range(mixed_begin, keys_end, num_stages=MIXED_STAGES):
        next_n = tl.load(keys + 2 * (i + 1))
        k_tile = load_tile(k, (k_b, k_h, k_l), head, start_n, L, BLOCK_N, D, TMA, RAGGED=True)
        qk = tl.dot(q_tile, k_tile.T, input_precision="ieee")
        # The bits come after the product, when its operands no longer need registers.
        key_tile = tl.load(keys + 2 * i + 1)
        bits_k = tl.load(key_bits + key_tile * BLOCK_N + columns)
        if WEIGHTED:
            added = added_scores(log_weight, as_key, as_query, rows, start_n + columns, L, COLUMNS)
            qk += D**0.5 * added  # `scale` divides by the root again
        qk = tl.where(bits_allowed(bits_q[:, None], bits_k[None, :]), qk, float("-inf"))
        v_tile = load_tile(v, (v_b, v_h, v_l), head, start_n, L, BLOCK_N, D, TMA, RAGGED=True)
        m_i, l_i, acc = online_softmax(qk, v_tile, m_i, l_i, acc, scale)
        start_n = next_n

    # A row with nothing allowed gives zeros.
    acc = acc / tl.where(l_i == 0.0, 1.0, l_i)[:, None]
    store_blended(acc, o, base, blend, out_strides, head, rows, end, BASE)


class Plan(NamedTuple):
    """What the kernel knows of a sequence's tokens, in its arguments' order.

    queries: (n, 5) int32, a tile's first row, the row after its last, and where in `keys`
        its full tiles begin, its partial tiles begin, and its tiles end; the longest lists
        come first.
    query_bits: (n, block_m) int64, those rows' bits, then zeros.
    keys: (m + 1, 2) int32, a tile's first row, and its row in key_bits.
    key_bits: (tiles, block_n) int64.
    The rest are of `Tokens`, in 32 bits; weights are empty without any.
    """

    base_row: Tensor
    base_weight: Tensor
    queries: Tensor
    query_bits: Tensor
    keys: Tensor
    key_bits: Tensor
    as_key: Tensor
    as_query: Tensor
    log_weight: Tensor


def cut(bits: Tensor, block: int) -> list[slice]:
    """Cut the sequence into tiles of at most `block` tokens. They end where a long run of
    equal bits does: across its border a tile would be partial with everything. Short runs
    share tiles: half-empty ones cost more."""
    runs = bits.unique_consecutive(return_counts=True)[1].tolist()
    tiles = []
    start = end = 0
    for run, following in zip(runs, [*runs[1:], math.inf]):
        end += run
        while end - start > block:
            tiles.append(slice(start, start + block))
            start += block
        if max(run, following) >= 1.5 * block:
            tiles.append(slice(start, end))
            start = end
    return tiles


def tile_lists(tokens: Tokens, block_m: int, block_n: int) -> tuple[Plan, int]:
    """The plan, on the CPU, and how many (query, key) are allowed: from the rule itself,
    for each pair of distinct bits."""
    tokens = Tokens(*(x if x is None else x.cpu() for x in tokens))
    bits = tokens.bits
    query_tiles = cut(bits, block_m)
    key_tiles = cut(bits, block_n)
    values, kind = bits.unique(return_inverse=True)
    rule = allowed(values[:, None], values[None, :]).float()
    kinds = F.one_hot(kind, len(values))
    rows = torch.tensor([tile.stop - tile.start for tile in query_tiles])
    pairs = per_tile(kinds, query_tiles) @ rule @ per_tile(kinds, key_tiles).T
    full = pairs == rows[:, None] * block_n
    weighing = (torch.empty(0, 0),) * 3
    if tokens.log_weight is not None:
        weighing = tokens[3:]
        weighs = tokens.log_weight != 0
        as_key = F.one_hot(tokens.as_key, weighs.shape[1])
        as_query = F.one_hot(tokens.as_query, weighs.shape[1])
        full &= per_tile(weighs, query_tiles) @ per_tile(as_key, key_tiles).T == 0
        full &= per_tile(as_query, query_tiles) @ per_tile(weighs, key_tiles).T == 0
    mixed = (pairs > 0) & ~full

    work = full.sum(1) + MIXED_COST * mixed.sum(1)
    order = work.argsort(descending=True, stable=True).tolist()
    queries = []
    keys = []
    for i in order:
        begins = []
        for seen in full, mixed:
            begins.append(len(keys))
            keys += [(key_tiles[j].start, j) for j in seen[i].nonzero().flatten().tolist()]
        queries.append((query_tiles[i].start, query_tiles[i].stop, *begins, len(keys)))
    keys.append((0, 0))  # the kernel loads the row after the last tile's
    log_weight, as_key, as_query = weighing
    plan = Plan(
        base_row=tokens.base_row.int(),
        base_weight=tokens.base_weight.float(),
        queries=torch.tensor(queries).int(),
        query_bits=padded(bits, [query_tiles[i] for i in order], block_m),
        keys=torch.tensor(keys).int(),
        key_bits=padded(bits, key_tiles, block_n),
        as_key=as_key.int(),
        as_query=as_query.int(),
        log_weight=log_weight,
    )
    return plan, int(pairs.sum(dtype=torch.float64))


def per_tile(counts: Tensor, tiles: list[slice]) -> Tensor:
    """The sum of each tile's rows of counts, (len(tiles), n) float32."""
    return torch.stack([counts[tile].sum(0) for tile in tiles]).float()


def padded(values: Tensor, tiles: list[slice], block: int) -> Tensor:
    """The values of each tile's tokens, then zeros, (len(tiles), block)."""
    return torch.stack([F.pad(values[t], (0, block - (t.stop - t.start))) for t in tiles])


class Launch(NamedTuple):
    """Tile sizes, how the kernel is compiled, and how it loads."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    tma: bool
    mixed_stages: int = 1


def launch_for(dtype: torch.dtype, capability: tuple[int, int], weighted: bool = False) -> Launch:
    if dtype == torch.float32:  # IEEE products, which tensor cores lack
        return Launch(32, 32, num_warps=8, num_stages=1, tma=False)
    mixed = 1 if weighted else 3  # Weights loaded stages ahead would not fit.
    if (9, 0) <= capability < (12, 0):  # from Hopper on: 227 KB of shared memory
        return Launch(128, 128, num_warps=8, num_stages=3, tma=True, mixed_stages=mixed)
    return Launch(128, 64, num_warps=8, num_stages=3, tma=False, mixed_stages=mixed)


def attend(
    q: Tensor, k: Tensor, v: Tensor, base: Tensor | None, plan: list[Tensor], pairs: int,
    launch: list[int],
) -> Tensor:  # fmt: skip
    """Launch the kernel with the fields of a Plan and a Launch: q, k, v (B, H, L, D), base
    (B, H, L_base, D) -> (B, H, L, D)."""
    plan = Plan(*plan)
    launch = Launch(*launch)
    batch, heads, length, head_dim = q.shape
    out = empty_output(q, length)
    has_base = base is not None
    base = base if has_base else out  # the launcher wants a pointer; it is not read
    dtypes = (torch.float16, torch.bfloat16, torch.float32)
    if head_dim not in (32, 64, 128) or q.dtype not in dtypes:
        raise ValueError(f"the kernel is not made for heads of {head_dim} in {q.dtype}")
    if any(x.stride(-1) != 1 for x in (q, k, v, base)):
        raise ValueError("the kernel needs a contiguous head dimension")
    if INTERPRETED and q.dtype == torch.bfloat16:
        raise ValueError("Triton's interpreter multiplies bfloat16 wrongly; use float32")
    tensors = (q, k, v)
    if launch.tma:
        rows = (launch.block_m, launch.block_n, launch.block_n)
        boxes = [[1, 1, n, head_dim] for n in rows]
        tensors = map(TensorDescriptor.from_tensor, tensors, boxes)
    strides = [stride for x in (q, k, v, out, base) for stride in x.stride()[:3]]
    together = math.gcd(heads, HEADS_TOGETHER)
    regional_kernel[len(plan.queries) * together, heads // together, batch](
        *tensors, out, base, *plan, *strides,
        length, plan.log_weight.shape[-1], math.log2(math.e) / head_dim**0.5,
        D=head_dim, BLOCK_M=launch.block_m, BLOCK_N=launch.block_n, BASE=has_base,
        TMA=bool(launch.tma), WEIGHTED=plan.log_weight.numel() > 0, HEADS=together,
        MIXED_STAGES=launch.mixed_stages, num_warps=launch.num_warps,
        num_stages=launch.num_stages, enable_fp_fusion=True,
    )  # fmt: skip
    return out


def empty_output(q: Tensor, length: int) -> Tensor:
    """(B, H, length, D), laid out so that joining heads copies nothing."""
    batch, heads, _, head_dim = q.shape
    return q.new_empty(batch, length, heads, head_dim).transpose(1, 2)


# torch.compile, the meta device and FlopCounterMode know what an operator does.
attend_op = torch.library.custom_op("regional::attend", attend, mutates_args=())
attend_op.register_fake(lambda q, *rest: empty_output(q, q.shape[2]))


def kernel_attention(tokens: Tokens, dtype: torch.dtype, device: torch.device) -> MaskedAttention:
    on_gpu = device.type == "cuda"
    capability = torch.cuda.get_device_capability(device) if on_gpu else (0, 0)
    launch = launch_for(dtype, capability, tokens.log_weight is not None)
    plan, pairs = tile_lists(tokens, launch.block_m, launch.block_n)
    plan = [x.to(device) for x in plan]

    def masked(q: Tensor, k: Tensor, v: Tensor, base: Tensor | None = None) -> Tensor:
        return attend_op(q, k, v, base, plan, pairs, list(launch))

    return masked


def runs_on(device: torch.device) -> bool:
    """True for NVIDIA's GPUs from Ampere on; others lack bfloat16 or shared memory."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)
