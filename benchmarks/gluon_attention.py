"""A warp-specialized Gluon version of regional/kernel.py for Hopper, to be timed against it.

It has been compiled for sm_90 (tests/test_kernel.py) with Triton 3.6 and 3.9, and has never run.

One warp, the producer, loads the tiles of K and V through TMA into a ring of STAGES each. Two
warpgroups, the consumers, compute 64 rows of queries each, as FlashAttention-3 does (arXiv
2407.08608). They meet at mbarriers alone: no barrier makes the whole program wait, so that one
warpgroup's softmax may run during the other's products. The lists of tiles, the mask rule and the
blend are those of regional/kernel.py.

TMA reads two-dimensional views here: q, k and v must either be contiguous, or have their heads side
by side in memory, as views of a fused projection have. Weighted prompts are not supported.
"""

import math

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from regional.attention import MaskedAttention, Tokens
from regional.kernel import HEADS_TOGETHER, bits_allowed, empty_output, tile_lists

# Triton 3.6 has the second name only
async_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared

BLOCK_M, BLOCK_N, STAGES = 128, 128, 2
HALF = BLOCK_M // 2  # rows of a consumer
PRODUCER_REGISTERS, CONSUMER_REGISTERS = 24, 240  # of a thread; the default partition has 240 too

# The columns of `Tiles.queries` and of `Tiles.keys`, as in regional/kernel.py
ROW_BEGIN, ROW_END = gl.constexpr(0), gl.constexpr(1)
FULL_BEGIN, MIXED_BEGIN, KEYS_END = gl.constexpr(2), gl.constexpr(3), gl.constexpr(4)
QUERY_COLUMNS = gl.constexpr(5)
KEY_BITS, KEY_COLUMNS = gl.constexpr(1), gl.constexpr(2)


# ---------------------------------------------------------------------------------- on the GPU


@gluon.jit
def position(HEADS: gl.constexpr):
    """The tile of queries, the head and the image of this program, as in `regional_kernel`."""
    first = gl.program_id(0)
    return first // HEADS, gl.program_id(1) * HEADS + first % HEADS, gl.program_id(2)


@gluon.jit
def consume_tile(
    q, k_ring, v_ring, k_full, v_full, k_free, v_free, n, m_i, l_i, acc, scale, bits_q, bits_k,
    MIXED: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Add the ring's n-th tile to the running maximum, sum and output.

    bits_k points to the bits of the tile's keys; only a MIXED, a partial tile, reads them.
    """
    layout: gl.constexpr = acc.type.layout
    ROWS: gl.constexpr = q.shape[0]
    N: gl.constexpr = k_ring.shape[1]
    stage = n % STAGES
    phase = (n // STAGES) & 1
    mbarrier.wait(k_full.index(stage), phase)
    zeros = gl.zeros([ROWS, N], gl.float32, layout)
    k_tile = k_ring.index(stage).permute((1, 0))
    qk = warpgroup_mma(q, k_tile, zeros, use_acc=False, is_async=True)
    qk = warpgroup_mma_wait(num_outstanding=0, deps=(qk,))
    mbarrier.arrive(k_free.index(stage), count=1)
    if MIXED:
        columns = gl.arange(0, N, gl.SliceLayout(0, layout))
        allowed = bits_allowed(bits_q[:, None], gl.load(bits_k + columns)[None, :])
        qk = gl.where(allowed, qk, float("-inf"))
    m_ij = gl.maximum(m_i, gl.max(qk, 1) * scale)
    p = gl.exp2(qk * scale - m_ij[:, None])
    alpha = gl.exp2(m_i - m_ij)
    l_i = l_i * alpha + gl.sum(p, 1)
    acc = acc * alpha[:, None]
    p = gl.convert_layout(p.to(v_ring.dtype), gl.DotOperandLayout(0, layout, k_width=2))
    mbarrier.wait(v_full.index(stage), phase)
    acc = warpgroup_mma(p, v_ring.index(stage), acc, is_async=True)
    acc = warpgroup_mma_wait(num_outstanding=0, deps=(acc,))
    mbarrier.arrive(v_free.index(stage), count=1)
    return m_ij, l_i, acc


@gluon.jit
def consume(
    q_tiles, k_ring, v_ring, q_full, k_full, v_full, k_free, v_free,
    o, base, base_row, base_weight, queries, query_bits, keys, key_bits,
    o_b, o_h, o_l, base_b, base_h, base_l, scale,
    WHICH: gl.constexpr, BASE: gl.constexpr, HEADS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A consumer: rows 64 WHICH .. 64 WHICH + 64 of the tile of queries."""
    ROWS: gl.constexpr = q_tiles.shape[1]
    D: gl.constexpr = q_tiles.shape[2]
    N: gl.constexpr = k_ring.shape[1]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    of_rows: gl.constexpr = gl.SliceLayout(1, layout)
    tile, h, b = position(HEADS)
    entry = queries + tile * QUERY_COLUMNS
    start = gl.load(entry + ROW_BEGIN) + WHICH * ROWS
    end = gl.load(entry + ROW_END)
    full_begin = gl.load(entry + FULL_BEGIN)
    mixed_begin = gl.load(entry + MIXED_BEGIN)
    keys_end = gl.load(entry + KEYS_END)
    m_i = gl.full([ROWS], -1e38, gl.float32, of_rows)  # not -inf, as in regional/kernel.py
    l_i = gl.zeros([ROWS], gl.float32, of_rows)
    acc = gl.zeros([ROWS, D], gl.float32, layout)
    bits_q = gl.load(query_bits + (2 * tile + WHICH) * ROWS + gl.arange(0, ROWS, of_rows))
    mbarrier.wait(q_full, 0)
    q = q_tiles.index(WHICH)
    for i in range(full_begin, mixed_begin):
        m_i, l_i, acc = consume_tile(
            q, k_ring, v_ring, k_full, v_full, k_free, v_free, i - full_begin, m_i, l_i, acc, scale,
            bits_q, key_bits, False, STAGES,
        )  # fmt: skip
    for i in range(mixed_begin, keys_end):
        bits_k = key_bits + gl.load(keys + i * KEY_COLUMNS + KEY_BITS) * N
        m_i, l_i, acc = consume_tile(
            q, k_ring, v_ring, k_full, v_full, k_free, v_free, i - full_begin, m_i, l_i, acc, scale,
            bits_q, bits_k, True, STAGES,
        )  # fmt: skip
    acc = acc / gl.where(l_i == 0.0, 1.0, l_i)[:, None]  # a row with nothing allowed gives zeros
    store_blended(acc, o, base, base_row, base_weight, o_b, o_h, o_l, base_b, base_h, base_l, b, h,
                  start, end, BASE)  # fmt: skip


@gluon.jit
def store_blended(
    acc, o, base, base_row, base_weight, o_b, o_h, o_l, base_b, base_h, base_l, b, h, start, end,
    BASE: gl.constexpr,
):  # fmt: skip
    """Blend acc with the base branch's rows and write it to rows start .. end of the output."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])  # stores of 16 bytes
    acc = gl.convert_layout(acc, layout)
    rows = start + gl.arange(0, acc.shape[0], gl.SliceLayout(1, layout))
    d = gl.arange(0, acc.shape[1], gl.SliceLayout(0, layout))[None, :]
    inside = rows < end
    b = b.to(gl.int64)
    h = h.to(gl.int64)
    if BASE:
        weight = gl.load(base_weight + rows, mask=inside, other=0.0)[:, None]
        base_rows = gl.load(base_row + rows, mask=inside, other=0)[:, None]
        pointers = base + b * base_b + h * base_h + base_rows * base_l + d
        base_tile = gl.load(pointers, mask=weight != 0, other=0.0)
        acc = (1 - weight) * acc + weight * base_tile.to(gl.float32)
    out = o + b * o_b + h * o_h + rows[:, None] * o_l + d
    gl.store(out, acc.to(o.dtype.element_ty), mask=inside[:, None])


@gluon.jit
def produce(
    q, k, v, q_tiles, k_ring, v_ring, q_full, k_full, v_full, k_free, v_free, queries, keys,
    q_rows_b, q_rows_h, q_columns_h, k_rows_b, k_rows_h, k_columns_h,
    v_rows_b, v_rows_h, v_columns_h, HEADS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The producer: loads q once, then keeps the rings of K and V filled."""
    ROWS: gl.constexpr = q_tiles.shape[1]
    tile, h, b = position(HEADS)
    entry = queries + tile * QUERY_COLUMNS
    full_begin = gl.load(entry + FULL_BEGIN)
    keys_end = gl.load(entry + KEYS_END)
    q_row = b * q_rows_b + h * q_rows_h + gl.load(entry + ROW_BEGIN)
    mbarrier.expect(q_full, 2 * q.block_type.nbytes)
    for half in gl.static_range(2):
        async_load(q, [q_row + half * ROWS, h * q_columns_h], q_full, q_tiles.index(half))
    k_row = b * k_rows_b + h * k_rows_h
    v_row = b * v_rows_b + h * v_rows_h
    for i in range(full_begin, keys_end):
        n = i - full_begin
        stage = n % STAGES
        phase = ((n // STAGES) & 1) ^ 1  # the first wait for a stage finds it free
        row = gl.load(keys + i * KEY_COLUMNS)
        mbarrier.wait(k_free.index(stage), phase)
        mbarrier.expect(k_full.index(stage), k.block_type.nbytes)
        async_load(k, [k_row + row, h * k_columns_h], k_full.index(stage), k_ring.index(stage))
        mbarrier.wait(v_free.index(stage), phase)
        mbarrier.expect(v_full.index(stage), v.block_type.nbytes)
        async_load(v, [v_row + row, h * v_columns_h], v_full.index(stage), v_ring.index(stage))


@gluon.jit
def gluon_kernel(
    q, k, v, o, base, base_row, base_weight, queries, query_bits, keys, key_bits,
    q_rows_b, q_rows_h, q_columns_h, k_rows_b, k_rows_h, k_columns_h,
    v_rows_b, v_rows_h, v_columns_h, o_b, o_h, o_l, base_b, base_h, base_l, scale,
    BASE: gl.constexpr, HEADS: gl.constexpr, STAGES: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """`regional_kernel` with the same grid, lists and results; for q, k and v see `head_view`."""
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    q_tiles = gl.allocate_shared_memory(q.dtype, [2] + q.block_shape, q.layout)
    k_ring = gl.allocate_shared_memory(k.dtype, [STAGES] + k.block_shape, k.layout)
    v_ring = gl.allocate_shared_memory(v.dtype, [STAGES] + v.block_shape, v.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [1], barrier)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    mbarrier.init(q_full, count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(k_free.index(stage), count=2)  # both consumers have read it
        mbarrier.init(v_free.index(stage), count=2)
    fence_async_shared()
    gl.warp_specialize(
        [
            (consume, (
                q_tiles, k_ring, v_ring, q_full, k_full, v_full, k_free, v_free,
                o, base, base_row, base_weight, queries, query_bits, keys, key_bits,
                o_b, o_h, o_l, base_b, base_h, base_l, scale, 0, BASE, HEADS, STAGES,
            )),
            (consume, (
                q_tiles, k_ring, v_ring, q_full, k_full, v_full, k_free, v_free,
                o, base, base_row, base_weight, queries, query_bits, keys, key_bits,
                o_b, o_h, o_l, base_b, base_h, base_l, scale, 1, BASE, HEADS, STAGES,
            )),
            (produce, (
                q, k, v, q_tiles, k_ring, v_ring, q_full, k_full, v_full, k_free, v_free,
                queries, keys, q_rows_b, q_rows_h, q_columns_h, k_rows_b, k_rows_h, k_columns_h,
                v_rows_b, v_rows_h, v_columns_h, HEADS, STAGES,
            )),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip


# ---------------------------------------------------------------------------------- launching it


def head_view(x: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """x (B, H, L, D) as a matrix, and where to find head h of image b in it.

    Its row i is at row b * rows_b + h * rows_h + i, and its columns begin at h * columns_h; the
    matrix is returned with (rows_b, rows_h, columns_h). ValueError where TMA can't read x so.
    """
    batch, heads, length, head_dim = x.shape
    stride_b, stride_h, stride_l, _ = x.stride()
    if x.is_contiguous():
        return x.flatten(0, 2), (heads * length, length, 0)
    if x.stride(-1) == 1 and stride_h == head_dim and (batch == 1 or stride_b == length * stride_l):
        matrix = x.as_strided((batch * length, heads * head_dim), (stride_l, 1))
        return matrix, (length, 0, head_dim)
    raise ValueError("the Gluon kernel needs q, k, v contiguous or with heads side by side")


def shared_layout(rows: int, head_dim: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    """The layout in shared memory of a tile of so many rows."""
    element = gl.bfloat16 if dtype == torch.bfloat16 else gl.float16
    return gl.NVMMASharedLayout.get_default_for([rows, head_dim], element)


def gluon_attention(tokens: Tokens, dtype: torch.dtype, device: torch.device) -> MaskedAttention:
    """The Gluon kernel for tokens with these bits; like `kernel_attention`.

    ValueError for what it does not support: weights, other dtypes than 16-bit ones, heads of other
    sizes than 128.
    """
    if tokens.log_weight is not None or dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"the Gluon kernel supports neither weighted prompts nor {dtype}")
    plan, _ = tile_lists(tokens, BLOCK_M, BLOCK_N)
    plan = [x.to(device) for x in plan[:6]]  # it has no weights

    def masked(q: Tensor, k: Tensor, v: Tensor, base: Tensor | None = None) -> Tensor:
        batch, heads, length, head_dim = q.shape
        if head_dim != 128:
            raise ValueError(f"the Gluon kernel is not made for heads of {head_dim}")
        out = empty_output(q, length)
        has_base = base is not None
        base = base if has_base else out  # the launcher wants a pointer; it is not read
        descriptors, places = [], []
        for x, rows in (q, HALF), (k, BLOCK_N), (v, BLOCK_N):
            matrix, place = head_view(x)
            layout = shared_layout(rows, head_dim, dtype)
            descriptors.append(TensorDescriptor.from_tensor(matrix, [rows, head_dim], layout))
            places += place
        together = math.gcd(heads, HEADS_TOGETHER)
        gluon_kernel[len(plan[2]) * together, heads // together, batch](
            *descriptors, out, base, *plan, *places,
            *(stride for x in (out, base) for stride in x.stride()[:3]),
            math.log2(math.e) / head_dim**0.5,
            BASE=has_base, HEADS=together, STAGES=STAGES, num_warps=4, enable_fp_fusion=True,
            PRODUCER_REGISTERS=PRODUCER_REGISTERS, CONSUMER_REGISTERS=CONSUMER_REGISTERS,
        )  # fmt: skip
        return out

    return masked
