"""The Triton kernel: in Triton's interpreter or on a GPU, cross-compiled, and what can be counted."""

import itertools
import json
import os
import random
import subprocess
import sys
from functools import partial
from pathlib import Path

import msgspec
import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from tiny import Recorder
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

from benchmarks import model
from benchmarks.gluon_attention import gluon_attention, head_view
from model.attention import Block
from model.transformer import Flux, FluxParams
from regional import kernel
from regional.attention import RegionalAttention, Tokens, allowed, dense_attention, in_one_sequence, portable_attention
from regional.kernel import Launch, Plan, kernel_attention, tile_lists
from regional.layout import Layout, Region
from regional.mask import BACKGROUND_BIT, region_tokens
from runtime import unmasked
from runtime.unmasked import kernel_or_library
from sampler.flow import image_ids, text_ids

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on the CPU conftest.py asks for the interpreter
FLOAT16 = [torch.float16] if DEVICE == "cpu" else [torch.float16, torch.bfloat16]  # the interpreter has no bfloat16


def layout(*corners, width=1024, height=1024) -> Layout:
    regions = tuple(Region(prompt="r", box=box) for box in corners)
    return Layout(prompt="base", width=width, height=height, regions=regions)


def grid(columns: int, rows: int, width: int = 1024, height: int = 1024) -> Layout:
    xs, ys = ([size * i // n for i in range(n + 1)] for size, n in ((width, columns), (height, rows)))
    boxes = [(xs[i], ys[j], xs[i + 1], ys[j + 1]) for j in range(rows) for i in range(columns)]
    return layout(*boxes, width=width, height=height)


def overlapping(count: int, width: int = 1024, height: int = 1024, seed: int = 0) -> Layout:
    draw, boxes = random.Random(seed), []
    for _ in range(count):
        x, y = draw.randrange(width // 2), draw.randrange(height // 2)
        boxes.append((x, y, x + draw.randrange(width // 5, width // 2), y + draw.randrange(height // 5, height // 2)))
    return layout(*boxes, width=width, height=height)


def sorted_bits(layout: Layout, text_length: int) -> torch.Tensor:
    return region_tokens(layout).sorted()[0].bits(text_length)


def random_bits(regions: int, length: int, seed: int = 0) -> torch.Tensor:
    """Tokens that are each in up to three of the regions, in no order."""
    bits = 1 << torch.randint(regions, (3, length), generator=torch.Generator().manual_seed(seed))
    return bits[0] | bits[1] | bits[2]


small = {"width": 192, "height": 192}  # 144 image tokens
CASES = {
    "no regions": torch.ones(203, dtype=torch.int64),
    "full cover": sorted_bits(grid(2, 2, **small), 16),
    "one box on a background": sorted_bits(layout((32, 32, 128, 112), **small), 19),
    "overlaps": sorted_bits(overlapping(3, **small), 13),
    "overlaps, unsorted": region_tokens(overlapping(3, **small)).bits(13),
    "one-token regions": sorted_bits(layout((16, 16, 32, 32), (160, 0, 176, 16), (0, 0, 192, 96), **small), 7),
    "31 regions": random_bits(31, 211).sort()[0],
    "61 regions and a background, permuted": random_bits(61, 226).where(torch.arange(226) % 5 > 0, 1 << BACKGROUND_BIT),
    "rows with nothing allowed": random_bits(4, 197, seed=1).masked_fill(torch.arange(197) % 5 == 0, 0),
    "a whole tile with nothing allowed": torch.cat([torch.zeros(70, dtype=torch.int64), random_bits(2, 65)]),
    "nothing allowed": torch.zeros(40, dtype=torch.int64),
    "one token": torch.ones(1, dtype=torch.int64),
    "33 tokens": random_bits(3, 33),
}
CASE = pytest.mark.parametrize("bits", CASES.values(), ids=CASES)
# As launched for float32; and, on every device, both ways of loading with tiles of both shapes
LAUNCHES = {
    "float32's own": None,
    "pointers": Launch(64, 32, num_warps=4, num_stages=2, tma=False, mixed_stages=2),
    "TMA": Launch(32, 64, num_warps=4, num_stages=2, tma=True, mixed_stages=2),
}


@pytest.fixture(params=LAUNCHES)
def launched(request, monkeypatch):
    """Makes every launch one of this shape."""
    launch = LAUNCHES[request.param]
    if launch and launch.tma and DEVICE == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("this GPU has no TMA")
    if launch:
        monkeypatch.setattr(kernel, "launch_for", lambda *given: launch)


def blending_tokens(bits: torch.Tensor, base_length: int = 1, seed: int = 0) -> Tokens:
    """Tokens that blend with some of `base_length` base rows: not at all, in part, or wholly."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.rand(len(bits), generator=generator, dtype=torch.float64) * 1.5 - 0.25
    return Tokens(bits, torch.randint(base_length, (len(bits),), generator=generator), weight.clamp(0, 1))


def fused_qkv(length, dtype=torch.float32, batch=1, heads=1, head_dim=32, logits=1.0, seed=0) -> list[torch.Tensor]:
    """q, k, v as views of one fused projection (B, L, 3 D), on DEVICE."""
    generator = torch.Generator().manual_seed(seed)
    fused = torch.randn(batch, length, 3, heads, head_dim, generator=generator) * logits
    return list(fused.to(DEVICE, dtype).permute(2, 0, 3, 1, 4))


def unblended(bits: torch.Tensor) -> Tokens:
    return Tokens(bits, torch.zeros_like(bits), torch.zeros(len(bits)))


def plan_of(bits: torch.Tensor, block_m: int, block_n: int) -> Plan:
    return tile_lists(unblended(bits), block_m, block_n)[0]


def run(tokens: Tokens, q, k, v, base=None) -> torch.Tensor:
    return kernel_attention(on_device(tokens), q.dtype, q.device)(q, k, v, base)


def on_device(tokens: Tokens) -> Tokens:
    return Tokens(*(x if x is None else x.to(DEVICE) for x in tokens))


def in_float64(tokens: Tokens, *qkv_base: torch.Tensor) -> torch.Tensor:
    return dense_attention(on_device(tokens))(*(x.double() for x in qkv_base))


# ------------------------------------------------------------------------------------------------ the mask rule


@triton.jit
def table_of_the_rule(bits_q, bits_k, out, N: tl.constexpr):
    i = tl.arange(0, N)
    rule = kernel.bits_allowed(tl.load(bits_q + i)[:, None], tl.load(bits_k + i)[None, :])
    tl.store(out + i[:, None] * N + i[None, :], rule.to(tl.int8))


def test_the_line_of_triton_says_what_the_line_of_torch_says():
    few = torch.cat([torch.zeros(2, dtype=torch.int64), 1 << torch.arange(62), random_bits(3, 64)])
    bits_q, bits_k = few.to(DEVICE), few.flip(0).to(DEVICE)
    out = torch.full((128, 128), 7, dtype=torch.int8, device=DEVICE)
    table_of_the_rule[1,](bits_q, bits_k, out, N=128)
    assert torch.equal(out, allowed(bits_q[:, None], bits_k[None, :]).to(torch.int8))


# ------------------------------------------------------------------------------------------------ what it computes


@CASE
def test_float32_is_the_dense_reference(bits, launched):
    given = blending_tokens(bits)
    q, k, v = fused_qkv(len(bits))
    out = run(given, q, k, v)
    expected = in_float64(given, q, k, v)
    assert (out - expected).abs().max() < 2e-6
    assert not out[:, :, ~allowed(bits[:, None], bits[None, :]).any(1)].any()  # exact zeros


KINDS = [(32, torch.float32, 1.0), *((n, x, logits) for n, logits in ((64, 1.0), (128, 8.0)) for x in FLOAT16)]


@pytest.mark.parametrize("head_dim, dtype, logits", KINDS)
def test_two_images_three_heads_and_a_blend(dtype, head_dim, logits, launched):
    """The error is at most twice that of torch's own attention, also for scores up to some 500, where softmax picks
    single keys; and a weight of 1 copies exactly."""
    bits = CASES["61 regions and a background, permuted"]
    given = blending_tokens(bits, base_length=17)
    q, k, v = fused_qkv(len(bits), dtype, batch=2, heads=3, head_dim=head_dim, logits=logits)
    base = fused_qkv(17, dtype, batch=2, heads=3, head_dim=head_dim, seed=1)[0]
    out = run(given, q, k, v, base)
    assert out.shape == q.shape and out.transpose(1, 2).is_contiguous()  # heads join without a copy
    expected = in_float64(given, q, k, v, base)
    mask = allowed(bits[:, None], bits[None, :]).to(DEVICE)
    theirs = on_device(given).blend(F.scaled_dot_product_attention(q, k, v, attn_mask=mask), base)
    assert (out - expected).abs().max() <= max(2 * (theirs - expected).abs().max(), 1e-6)
    copied = given.base_weight == 1
    assert copied.any() and torch.equal(out[:, :, copied], base[:, :, given.base_row[copied].to(DEVICE)])


def weighing_tokens(length: int) -> Tokens:
    """Texts of 13 tokens, then image tokens that weigh them: some by the row, some not, some not at all to look at."""
    change = msgspec.structs.replace
    of = overlapping(3, **small)
    strong = [change(r, strength=s, feather=f) for r, s, f in zip(of.regions, (0, 1, 3), (0, 80, 0))]
    region = region_tokens(change(of, image_attention="open", regions=tuple(strong))).sorted()[0]
    return in_one_sequence(region.bits(length), 9, 9, torch.full((144,), 0.25).double(), region.log_weights())


def test_weights_of_texts_are_those_of_the_dense_reference(launched):
    given = weighing_tokens(13)
    q, k, v = fused_qkv(len(given.bits))
    base = fused_qkv(9 + 144, seed=1)[0]
    out, expected = run(given, q, k, v, base), in_float64(given, q, k, v, base)
    assert (out - expected).abs().max() < 2e-6
    assert (out - run(given._replace(log_weight=None), q, k, v, base)).abs().max() > 0.01


@pytest.mark.parametrize("block_m, block_n", [(32, 32), (16, 64)])
def test_tiles_whose_pairs_have_weights_are_mixed(block_m, block_n):
    tokens = weighing_tokens(80)
    plan, _ = tile_lists(tokens, block_m, block_n)
    plain = plan_of(tokens.bits, block_m, block_n)
    weights = tokens.log_weight[:, tokens.as_key] + tokens.log_weight[:, tokens.as_query].T
    for start, end, first, mixed, _ in plan.queries.tolist():
        for key, _ in plan.keys[first:mixed].tolist():
            assert not weights[start:end, key : key + block_n].any()
    assert counts(plain)[0].sum() > counts(plan)[0].sum() > 0


KERNEL = partial(kernel_attention, dtype=torch.float32, device=torch.device(DEVICE))


@pytest.mark.parametrize("base_ratio", [0.0, 0.3])
def test_regional_attention_with_it_is_that_with_the_portable_one(base_ratio):
    """Both branches, both kinds of block, masked and open ones; and compiled it is one graph."""
    bits, text = region_tokens(overlapping(3, **small)).sorted()[0].bits(11), 11
    given = bits.to(DEVICE), text, 144, base_ratio, lambda block: block.index == 0
    ours, portable = (RegionalAttention(make, *given) for make in (KERNEL, portable_attention))
    for kind, index in ("double", 0), ("double", 1), ("single", 0):
        length = len(bits) + (0 if base_ratio == 0 else text if kind == "double" else text + 144)
        q, k, v = fused_qkv(length, heads=2)
        out = ours(q, k, v, Block(kind, index))
        expected = portable(*(x.double() for x in (q, k, v)), Block(kind, index))
        assert (out - expected).abs().max() < 2e-6
    compiled = torch.compile(lambda *qkv: ours(*qkv, Block("single", 0)), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(q, k, v), out)


@pytest.mark.parametrize("masked_blocks, expected", [((0, 1), 2), ((0,), 4)])
def test_lists_are_made_for_the_blocks_that_ask(masked_blocks, expected):
    """One each for double and single blocks; where every block is masked, none without a mask."""
    asked = []
    bits = region_tokens(overlapping(3, **small)).sorted()[0].bits(11)
    make = lambda tokens: asked.append(tokens) or portable_attention(tokens)  # noqa: E731
    attention = RegionalAttention(make, bits, 11, 144, 0.3, lambda b: b.index in masked_blocks)
    assert not asked
    for block in [Block(kind, index) for kind in ("double", "single") for index in (0, 1)] * 2:
        attention(*fused_qkv(len(bits) + 11 + 144 * (block.kind == "single")), block)
    without_mask = [tokens for tokens in asked if tokens.bits.max() == 1]
    assert len(asked) == expected and len(without_mask) == expected - 2


def test_the_operators_say_of_themselves_what_they_do():
    """torch's own check: the schema, what the meta device is told, and that no argument is changed."""
    plan, pairs = tile_lists(unblended(CASES["33 tokens"]), 32, 32)
    q, k, v = fused_qkv(33, heads=2)
    launch = list(Launch(32, 32, num_warps=4, num_stages=1, tma=False))
    rows = torch.arange(38, dtype=torch.int32, device=DEVICE) - 5
    blend = k, rows, v, rows.clamp(min=0), torch.rand(38, device=DEVICE)
    attend = q, k, v, None, [x.to(DEVICE) for x in plan], pairs, launch
    for operator, given in (kernel.attend_op, attend), (unmasked.blend_op, blend):
        torch.library.opcheck(operator, given, test_utils=("test_schema", "test_faketensor"))
    q_meta, k_meta, v_meta, *plan = (x.to("meta") for x in (q, k, v, *plan))
    told = kernel.attend_op(q_meta, k_meta, v_meta, None, plan, pairs, launch)
    assert told.stride() == run(blending_tokens(CASES["33 tokens"]), q, k, v).stride()


def without_a_mask(base_only: int) -> Tokens:
    """Prompts and an image that all see each other, around tokens of the base branch alone."""
    bits = torch.where(torch.arange(90) < 60, 1, 3)
    return in_one_sequence(bits, base_only, 9, torch.linspace(0, 1, 40, dtype=torch.float64))


UNMASKED = {
    "no base branch": (without_a_mask(0), False),
    "double blocks": (without_a_mask(9), True),
    "single blocks": (without_a_mask(9 + 40), True),
    "some that nobody sees": (without_a_mask(9), False),
}


@pytest.mark.parametrize("tokens, has_base", UNMASKED.values(), ids=UNMASKED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_library_computes_what_has_no_mask(tokens, has_base, dtype, monkeypatch):
    """The kernel is not launched, and the result is that of the definition."""
    monkeypatch.setattr(kernel, "attend_op", None)
    given = fused_qkv(len(tokens.bits), dtype, batch=2, heads=3)
    if has_base:
        given.append(fused_qkv(49, dtype, batch=2, heads=3, seed=1)[0])
    out = kernel_or_library(on_device(tokens), dtype, given[0].device)(*given)
    assert (out - in_float64(tokens, *given)).abs().max() < (2e-6 if dtype == torch.float32 else 2e-3)
    unseen = tokens.bits == 0
    expected = given[3][:, :, tokens.base_row[unseen].to(DEVICE)] if has_base else 0 * out[:, :, unseen]
    assert torch.equal(out[:, :, unseen], expected)


def test_the_kernel_computes_what_has_a_mask_or_weights(monkeypatch):
    launches = []
    monkeypatch.setattr(kernel, "attend_op", lambda *given: launches.append(given))
    tokens = without_a_mask(9)
    columns = torch.zeros(99, dtype=torch.int64)
    for change in (
        {"bits": tokens.bits.masked_fill(torch.arange(99) == 98, 4)}, {"bits": columns},
        {"log_weight": torch.ones(99, 1), "as_key": columns, "as_query": columns},
    ):  # fmt: skip
        q, k, v = fused_qkv(99)
        kernel_or_library(on_device(tokens._replace(**change)), q.dtype, q.device)(q, k, v)
    assert len(launches) == 3


def test_strides_and_scores_of_any_kind(launched):
    """q, k and v laid out each in its own way, and scores so negative that no key seems worth a look."""
    bits = CASES["overlaps, unsorted"]
    length = len(bits)
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 3, length, 32, generator=generator).abs() * 30
    k = -torch.randn(2, length, 3, 32, generator=generator).abs().transpose(1, 2) * 30
    v = torch.randn(2, length, 5, 3, 32, generator=generator)[:, :, 4].transpose(1, 2)
    q, k, v = (x.to(DEVICE) for x in (q, k, v))
    given = blending_tokens(bits)
    assert (run(given, q, k, v) - in_float64(given, q, k, v)).abs().max() < 1e-3
    small_q = q / 900
    assert (run(given, small_q, k, v) - in_float64(given, small_q, k, v)).abs().max() < 2e-6


def test_what_it_is_not_made_for_is_refused():
    turned = fused_qkv(33)[0].mT.contiguous().mT
    refused = [("heads of 16", fused_qkv(33, head_dim=16)), ("float64", fused_qkv(33, torch.float64))]
    if DEVICE == "cpu":  # the interpreter multiplies it wrongly
        refused.append(("bfloat16", fused_qkv(33, torch.bfloat16)))
    for i in range(4):
        given = [*fused_qkv(33), fused_qkv(33)[0]]
        refused.append(("contiguous", [*given[:i], turned, *given[i + 1 :]]))
    for words, qkv in refused:
        with pytest.raises(ValueError, match=words):
            run(blending_tokens(CASES["33 tokens"]), *qkv)


# ------------------------------------------------------------------------------------------------ the lists of tiles


@pytest.mark.parametrize("block_m, block_n", [(64, 32), (16, 64), (128, 128)])
@CASE
def test_the_lists_are_the_mask(bits, block_m, block_n):
    """Put together again, tile by tile, they give the L x L mask: every pair in one tile or none."""
    length = len(bits)
    plan, pairs = tile_lists(unblended(bits), block_m, block_n)
    queries, query_bits, keys, key_bits = plan[2:6]
    mask, covered = torch.zeros(2, length, length + block_n, dtype=torch.int64)
    for (start, end, first, mixed, last), bits_q in zip(queries.tolist(), query_bits):
        assert 0 < end - start <= block_m
        assert torch.equal(bits_q[: end - start], bits[start:end]) and not bits_q[end - start :].any()
        for i in range(first, last):
            key, j = keys[i].tolist()
            here = slice(start, end), slice(key, key + block_n)
            rule = torch.ones(1, 1) if i < mixed else allowed(bits_q[: end - start, None], key_bits[j][None, :])
            covered[here] += rule.long()
            mask[here] |= rule.long()
    assert sorted(x for start, end, *_ in queries.tolist() for x in range(start, end)) == list(range(length))
    assert covered.max() <= 1 and not mask[:, length:].any()
    assert torch.equal(mask[:, :length].bool(), allowed(bits[:, None], bits[None, :])) and pairs == mask.sum()


def counts(plan: Plan) -> tuple[torch.Tensor, torch.Tensor]:
    """How many full and how many partial tiles of keys each tile of queries has."""
    _, _, full_begin, mixed_begin, keys_end = plan.queries.T
    return mixed_begin - full_begin, keys_end - mixed_begin


def cost(bits: torch.Tensor, block_m: int = 128, block_n: int = 128) -> float:
    """Time in tiles over that of the allowed pairs alone, if a mixed tile takes 2.1 times a full one's."""
    plan, pairs = tile_lists(unblended(bits), block_m, block_n)
    full, partial = (tiles.sum() for tiles in counts(plan))
    return float(full + 2.1 * partial) * block_m * block_n / pairs


@pytest.mark.published
@pytest.mark.parametrize("size", [(1024, 1024), (1280, 768)])
@pytest.mark.parametrize("block_n", [128, 64])
def test_tiles_cost_little_more_than_the_allowed_pairs(size, block_n):
    width, height = size
    box = layout((width // 4, height // 4, width * 3 // 4, height * 3 // 4), width=width, height=height)
    for regular in box, grid(2, 2, *size), grid(3, 1, *size), grid(4, 4, *size):
        assert cost(sorted_bits(regular, 512), 128, block_n) <= 1.3
    assert cost(sorted_bits(overlapping(8, *size), 512), 128, block_n) <= 2.1
    full, partial = counts(plan_of(sorted_bits(grid(4, 4), 512), 128, 128))  # regions fill whole tiles
    assert not partial.any() and (full == 6).all()


def test_neighbours_in_gray_code_are_cheaper():
    """Sorted by the bits as numbers, tiles would be mixed more often; and the longest lists come first."""
    for size in (1024, 1024), (1280, 768):
        regions = region_tokens(overlapping(8, *size))
        numbers = torch.cat([regions.bits(512)[: -len(regions.image_bits)], regions.image_bits.sort()[0]])
        assert cost(regions.sorted()[0].bits(512)) < 0.97 * cost(numbers)
    full, partial = counts(plan_of(numbers, 128, 128))
    work = full + kernel.MIXED_COST * partial
    assert (work.diff() <= 0).all() and work[0] > work[-1]


@pytest.mark.published
def test_the_predicted_times_are_those_on_record():
    """The kernel is in us, tiles or 8 heads fastest, by an earlier simulation; steps are in ms."""
    recorded = {"R = 4, quadrants": (289, 281), "3 strips": (351, 344), "one box and background": (448, 443)}
    for name, expected in recorded.items():
        head, _ = model.programs(model.tokens_of(model.LAYOUTS[name]))
        assert (model.simulated(head, together=1), model.simulated(head)) == pytest.approx(expected, rel=0.03), name
    steps = [model.step(regions) for regions in ([], model.LAYOUTS["R = 4, quadrants"])]
    assert steps == pytest.approx([129, 250], rel=0.02) and model.memory(4) == pytest.approx(18.8, abs=0.1)


# ------------------------------------------------------------------------------------------------ memory and work


@pytest.mark.parametrize("kind", ["double", "single"])
def test_no_square_tensor_and_no_memory_beyond_the_two_outputs(kind, monkeypatch):
    large = Launch(128, 64, num_warps=8, num_stages=1, tma=False, mixed_stages=1)
    monkeypatch.setattr(kernel, "launch_for", lambda *given: large)  # the interpreter is slow with many small tiles
    monkeypatch.setattr(kernel, "attend_op", kernel.attend)  # the mode does not look inside an operator
    region = region_tokens(layout((0, 0, 256, 256), (128, 128, 512, 512), width=512, height=512)).sorted()[0]
    text, image = 256, 1024
    bits = region.bits(text)
    length, base_length = len(bits) + text + (image if kind == "single" else 0), text + image
    q, k, v = fused_qkv(length)
    assert length > 8 * 1 * 32  # heads, head size: else q itself would look square

    def measure(make) -> tuple[int, bool]:
        attention = RegionalAttention(make, bits.to(DEVICE), text, image, 0.3)
        attention(q, k, v, Block(kind, 0))  # the lists are made at the first call
        with Recorder() as made:
            attention(q, k, v, Block(kind, 0))
        return made.bytes, any(sum(n >= length for n in tensor.shape) > 1 for tensor in made.tensors)

    taken, is_square = measure(KERNEL)
    outputs = (length + base_length) * 32 * 4
    assert not is_square and measure(dense_attention)[1]
    assert outputs <= taken <= outputs + 2**20 < outputs + length**2
    assert sum(x.nbytes for x in plan_of(bits, 128, 128)) < 2**20


@register_flop_formula(torch.ops.regional.attend)
def flops(q_shape, k_shape, v_shape, base_shape, plan, pairs, launch, **more) -> int:
    """An allowed pair of tokens costs two products of 2 D operations."""
    batch, heads, _, head_dim = q_shape
    return 4 * batch * heads * head_dim * pairs


@pytest.mark.published
def test_operations_of_a_full_size_step():
    """FLUX.1-dev at 1024 x 1024 on the meta device, in 10^12: plain, and disjoint regions."""
    with torch.device("meta"):
        flux = Flux(FluxParams())
    img, y, one = (torch.empty(shape, device="meta") for shape in ((1, 4096, 64), (1, 768), (1,)))

    def operations(text_tokens: int, **hooks) -> float:
        txt = torch.empty(1, text_tokens, 4096, device="meta")
        with FlopCounterMode(display=False) as counter:
            modulation = flux.modulation(one, y, one)
            flux(img, image_ids(1024, 1024), txt, text_ids(text_tokens), modulation, **hooks)
        return counter.get_total_flops() / 1e12

    assert operations(512) == pytest.approx(74.38, rel=0.002)
    for (columns, rows), expected in {(2, 2): 141.5, (4, 4): 219.8}.items():
        bits = sorted_bits(grid(columns, rows), 512)
        on_meta = partial(kernel_attention, dtype=torch.bfloat16, device=torch.device("meta"))
        attention = RegionalAttention(on_meta, bits, 512, 4096, 0.3)
        texts = 512 * (columns * rows + 1)
        counted = operations(texts, attention=attention, join=attention.join)
        assert counted == pytest.approx(expected, rel=0.002)


# ------------------------------------------------------------------------------------------------ the compiled code


@pytest.fixture(scope="module")
def compiled() -> dict[str, list[dict]]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("cross_compile.py")
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    assert f"{sum(map(len, made.values()))} kernels compiled, " in done.stderr
    return made


LIMITS = {80: 163, 89: 99, 90: 227, 100: 227, 120: 99}  # KiB of a program's shared memory


def test_what_hopper_gets_does_not_spill_and_uses_its_units(compiled):
    hopper = [x for x in compiled["regional"] if x["capability"] == 90 and not x["weighted"]]
    assert {x["head_dim"] for x in hopper if x["dtype"] == "bf16"} == {32, 64, 128}
    assert {x["dtype"] for x in hopper} == {"bf16", "fp16", "fp32"}
    for x in hopper:
        assert x["stack"] == x["LDL"] == x["STL"] == 0 and x["registers"] <= 255, x
        assert x["shared"] <= LIMITS[90] * 1024 == 232_448, x
        if x["dtype"] != "fp32":
            assert x["HGMMA"] and x["UTMALDG"] and not x["HMMA"], x
            assert x["tiles_in_flight"] == 3, x
    assert not any(x["HGMMA"] or x["HMMA"] for x in hopper if x["dtype"] == "fp32")  # IEEE products, not TF32
    largest = next(x for x in hopper if (x["dtype"], x["head_dim"]) == ("bf16", 128))
    full, partial = largest["loops"]
    assert full <= 540 and partial <= 2 * full  # 531 and 754 from Triton 3.9, 504 and 945 from 3.6
    assert max(largest["barriers"]) <= 5 and largest["registers"] <= 224


def test_what_other_gpus_get_fits_into_their_shared_memory(compiled):
    others = [x for x in compiled["regional"] if x["capability"] != 90 and not x["weighted"]]
    assert {x["capability"] for x in others} == {80, 89, 100, 120}
    for x in others:
        assert x["registers"] <= 255 and x["shared"] <= LIMITS[x["capability"]] * 1024, x
        assert x["LDL"] <= 16 and x["tma"] == (x["capability"] == 100), x  # Triton 3.6 spills a few outside the loops
        assert x["tiles_in_flight"] == 3, x
    assert {x["capability"] for x in compiled["blend"]} == {80, 89, 90, 100, 120}
    assert all(x["stack"] == x["LDL"] == x["STL"] == 0 for x in compiled["blend"])


def test_weights_of_prompts_cost_the_other_tiles_nothing(compiled):
    """The full tiles' loop is as deep and about as long as without. The other one spills, but fits."""
    for weighted in (x for x in compiled["regional"] if x["weighted"]):
        same = {key: weighted[key] for key in ("capability", "dtype", "head_dim", "base")}
        plain = next(x for x in compiled["regional"] if not x["weighted"] and same.items() <= x.items())
        assert weighted["loops"][0] <= 1.15 * plain["loops"][0]
        assert weighted["tiles_in_flight"] == plain["tiles_in_flight"] == 3
        assert weighted["shared"] <= LIMITS[weighted["capability"]] * 1024
        assert weighted["LDL"] <= 192


def test_the_gluon_kernel_compiles_without_spills_or_barriers_of_the_whole_program(compiled):
    found = compiled["gluon"]
    assert {x["dtype"] for x in found} == {"bf16", "fp16"}
    for x in found:
        assert x["stack"] == x["LDL"] == x["STL"] == 0 and x["shared"] <= LIMITS[90] * 1024, x
        # Triton makes 12 warps of the 4 + 4 + 1; setmaxnreg moves registers between them
        assert x["registers"] == 65_536 // (12 * 32) // 8 * 8 == 168, x
        assert x["HGMMA"] == 64 and x["UTMALDG"] and not x["HMMA"], x
        full, partial = x["loops"]
        assert full <= 500 and partial <= 2 * full  # 492, 712 from Triton 3.9, 448, 867 from 3.6
        assert x["barriers"] == [0, 0], x


@pytest.mark.parametrize("batch", [1, 2])
def test_the_gluon_kernel_finds_its_heads_in_matrices(batch):
    for x in (fused_qkv(7, batch=batch, heads=3)[1], torch.randn(batch, 3, 7, 32, device=DEVICE)):
        matrix, (rows_b, rows_h, columns_h) = head_view(x)
        for b, h in itertools.product(range(batch), range(3)):
            rows = slice(b * rows_b + h * rows_h, b * rows_b + h * rows_h + 7)
            assert torch.equal(matrix[rows, h * columns_h : h * columns_h + 32], x[b, h])
    with pytest.raises(ValueError, match="side by side"):
        head_view(torch.randn(batch, 7, 32, 3, device=DEVICE).permute(0, 3, 1, 2))


def test_the_gluon_kernel_refuses_what_it_does_not_support():
    device, plain = torch.device(DEVICE), on_device(blending_tokens(CASES["33 tokens"]))
    with pytest.raises(ValueError, match="float32"):
        gluon_attention(plain, torch.float32, device)
    with pytest.raises(ValueError, match="weighted"):
        gluon_attention(weighing_tokens(13), torch.float16, device)
    with pytest.raises(ValueError, match="heads of 32"):
        gluon_attention(plain, torch.float16, device)(*fused_qkv(33, torch.float16))
