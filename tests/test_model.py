"""The networks by themselves: names and sizes of the published checkpoints, the seam of the transformer, RoPE."""

import gzip
import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import velocity
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from model.attention import Block, apply_rope, plain_attention, rope, rope_axes
from model.autoencoder import AutoEncoder, AutoEncoderParams, to_uint8
from model.clip import CLIPParams, CLIPTextEncoder
from model.layers import timestep_embedding
from model.t5 import T5Encoder, T5Params
from model.transformer import Flux, FluxParams, text_then_image
from runtime.choose import fastest_backends

KEYS = Path(__file__).parent / "fixtures" / "keys"
SMALL = FluxParams(8, 8, 6, 10, hidden_size=64, mlp_hidden=128, num_heads=2, depth=2, depth_single_blocks=3)
WORDS, ROWS, COLUMNS = 5, 2, 3


def small_flux(params: FluxParams = SMALL, dtype: torch.dtype = torch.float64) -> Flux:
    torch.manual_seed(0)
    return Flux(params).to(dtype).requires_grad_(False)


def inputs(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    img, txt, y = (torch.randn(2, *shape, generator=generator) for shape in ((ROWS * COLUMNS, 8), (WORDS, 10), (6,)))
    image = torch.cartesian_prod(torch.arange(1), torch.arange(ROWS), torch.arange(COLUMNS)).float()
    return {
        "img": img.to(dtype), "img_ids": image.expand(2, -1, -1),
        "txt": txt.to(dtype), "txt_ids": torch.zeros(2, WORDS, 3),
        "timesteps": torch.tensor([0.3, 0.9]), "y": y.to(dtype), "guidance": torch.full((2,), 3.5),
    }  # fmt: skip


@pytest.mark.parametrize(
    "module, params, listed",
    [
        (Flux, FluxParams(), "flux_dev_bfl"), (Flux, FluxParams(guidance_embed=False), "flux_schnell_bfl"),
        (AutoEncoder, AutoEncoderParams(), "autoencoder_bfl"), (T5Encoder, T5Params(), "t5_v1_1_xxl_encoder_hf"),
        (CLIPTextEncoder, CLIPParams(), "clip_l_text_hf"),
    ],
)  # fmt: skip
def test_our_parameters_are_those_of_the_published_checkpoint(module, params, listed):
    """With equal names and shapes, official files load without a mapping."""
    with gzip.open(KEYS / f"{listed}.json.gz", "rt") as file:
        expected = json.load(file)
    expected.pop("encoder.embed_tokens.weight", None)  # in T5's list twice: it is shared.weight
    with torch.device("meta"):
        network = module(params)
    assert {name: list(tensor.shape) for name, tensor in network.state_dict().items()} == expected


def test_a_fresh_table_is_random():
    """As pocket/train.py needs it; on the meta device there is nothing to fill."""
    torch.manual_seed(0)
    t5 = T5Encoder(T5Params(vocab_size=500, d_model=64, d_ff=8, d_kv=8, num_heads=2, num_layers=1))
    clip = CLIPTextEncoder(CLIPParams(500, 64, 8, num_heads=2, num_layers=1))
    for table in t5.shared, clip.text_model.embeddings.token_embedding:
        assert abs(table.weight.std() - 1) < 0.05 and abs(table.weight.mean()) < 0.05 and table.weight.requires_grad


def test_attention_is_asked_by_every_block_in_order():
    asked = []

    def recording(q: Tensor, k: Tensor, v: Tensor, block: Block) -> Tensor:
        asked.append((block, q.shape, k.shape, v.shape))
        return plain_attention(q, k, v, block)

    velocity(small_flux(), **inputs(), attention=recording)
    blocks = [Block("double", index) for index in range(2)] + [Block("single", index) for index in range(3)]
    assert asked == [(block, *[(2, 2, WORDS + ROWS * COLUMNS, 32)] * 3) for block in blocks]


def test_the_fastest_backends_are_those_that_work():
    """On a CPU torch has one that does not store all scores; it is chosen by timing, so a GPU may give any order."""
    q = torch.randn(1, 2, 40, 32, device="cuda" if torch.cuda.is_available() else "cpu")
    backends = fastest_backends(q)
    assert backends and SDPBackend.MATH not in backends
    for backend in backends:
        with sdpa_kernel(backend):
            assert torch.nn.functional.scaled_dot_product_attention(q, q, q).isfinite().all()


@pytest.mark.parametrize("version, asked", [(None, False), (91500, False), (91900, True)])
def test_cudnn_is_left_out_where_it_reads_out_of_bounds(monkeypatch, version, asked):
    """It did so until version 9.15.0; only the trial is checked: a CPU has no such backend."""
    tried = []
    monkeypatch.setattr(torch.backends.cuda, "cudnn_sdp_enabled", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: version)
    monkeypatch.setattr("runtime.choose.sdpa_kernel", lambda x: tried.append(x) or nullcontext())
    fastest_backends(torch.randn(1, 1, 4, 32))
    assert (SDPBackend.CUDNN_ATTENTION in tried) == asked and SDPBackend.FLASH_ATTENTION in tried


def test_attention_written_out_is_plain_attention():
    """softmax(q k' / sqrt(d)) v, the definition, against the fused function; and every block uses what it is given."""

    def written_out(q: Tensor, k: Tensor, v: Tensor, block: Block) -> Tensor:
        weights = (q @ k.mT / q.shape[-1] ** 0.5).exp()
        return weights / weights.sum(-1, keepdim=True) @ v

    flux = small_flux()
    plain = velocity(flux, **inputs())
    torch.testing.assert_close(velocity(flux, **inputs(), attention=written_out), plain, rtol=0, atol=1e-12)
    for chosen in [Block("double", 0), Block("double", 1), Block("single", 0), Block("single", 2)]:
        ours = lambda q, k, v, block: v if block == chosen else plain_attention(q, k, v, block)  # noqa: E731, B023
        assert not torch.allclose(velocity(flux, **inputs(), attention=ours), plain)


def test_join_makes_the_sequence_of_the_single_blocks():
    """It is given states and position tables alike, so reordering the text rows of both changes nothing."""
    flux, calls = small_flux(), []

    def backwards(txt: Tensor, img: Tensor) -> Tensor:
        calls.append((txt.shape, img.shape))
        return text_then_image(txt.flip(1), img)

    turned = velocity(flux, **inputs(), join=backwards)
    torch.testing.assert_close(turned, velocity(flux, **inputs()), rtol=0, atol=1e-12)
    image = ROWS * COLUMNS
    assert calls == [((2, WORDS, 64), (2, image, 64)), ((2, WORDS, 16, 2), (2, image, 16, 2))]


def test_join_may_repeat_the_image():
    """Regional prompting runs a second image stream through the single blocks; what comes last is decoded."""
    flux, lengths = small_flux(), []

    def two_streams(txt: Tensor, img: Tensor) -> Tensor:
        return torch.cat([txt, img, img], dim=1)

    def first_stream_unseen(q: Tensor, k: Tensor, v: Tensor, block: Block) -> Tensor:
        if block.kind == "double":
            return plain_attention(q, k, v, block)
        lengths.append(q.shape[2])
        seen = torch.ones(q.shape[2], dtype=torch.bool)
        seen[WORDS : WORDS + ROWS * COLUMNS] = False
        return plain_attention(q, k[:, :, seen], v[:, :, seen], block)

    got = velocity(flux, **inputs(), attention=first_stream_unseen, join=two_streams)
    assert lengths == [WORDS + 2 * ROWS * COLUMNS] * 3
    torch.testing.assert_close(got, velocity(flux, **inputs()), rtol=0, atol=1e-12)


def test_images_of_a_batch_do_not_meet_and_guidance_may_be_none():
    both, flux = inputs(), small_flux()
    alone = velocity(flux, **{name: tensor[1:] for name, tensor in both.items()})
    torch.testing.assert_close(velocity(flux, **both)[1:], alone, rtol=0, atol=1e-12)
    flux = small_flux(replace(SMALL, guidance_embed=False))
    assert torch.equal(velocity(flux, **both), velocity(flux, **{**both, "guidance": None}))


def test_guidance_reaches_a_bfloat16_model_rounded_once():
    """The published code multiplies by 1000 in bfloat16, which makes 3504 of 3500 and so other sinusoids altogether."""
    seen = {}
    flux = small_flux(dtype=torch.bfloat16)
    for name in ("time_in", "guidance_in"):
        getattr(flux, name).register_forward_pre_hook(lambda module, args, name=name: seen.update({name: args[0]}))
    given = inputs(torch.bfloat16)
    velocity(flux, **given)
    for name, value in (("time_in", given["timesteps"]), ("guidance_in", given["guidance"])):
        assert torch.equal(seen[name], timestep_embedding(value, 256, torch.float32).bfloat16())
    rounded = timestep_embedding(torch.tensor([3.504]), 256, torch.float32)
    assert (seen["guidance_in"][:1].float() - rounded).abs().max() > 1


def test_sinusoids_are_cosines_then_sines_of_a_thousand_t():
    """Frequencies fall from 1 to almost 1 / 10000; at t = pi / 1000 the first cosine is -1."""
    embedding = timestep_embedding(torch.tensor([torch.pi / 1000, 0.0]).double(), 256, torch.float64)
    assert embedding.shape == (2, 256)
    assert embedding[0, 0].item() == pytest.approx(-1) and embedding[0, 128].item() == pytest.approx(0, abs=1e-6)
    assert embedding[0, 255].item() == pytest.approx(torch.pi * 10000 ** (-127 / 128), rel=1e-6)
    assert torch.equal(embedding[1], torch.cat([torch.ones(128), torch.zeros(128)]).double())


def scores(q: Tensor, k: Tensor, ids: Tensor) -> Tensor:
    table = rope(ids, rope_axes(q.shape[-1]), 10_000, torch.float64)
    return apply_rope(q, table) @ apply_rope(k, table).transpose(-1, -2)


def test_rope_sees_only_distances():
    """Shifting all positions alike leaves every product of a query and a key; moving one axis alone does not."""
    generator = torch.Generator().manual_seed(2)
    q, k = (torch.randn(1, 2, 12, 64, generator=generator, dtype=torch.float64) for _ in range(2))
    ids = torch.randint(0, 90, (1, 12, 3), generator=generator).double()
    torch.testing.assert_close(scores(q, k, ids + torch.tensor([3, 17, -40])), scores(q, k, ids), rtol=0, atol=1e-10)
    for axis in range(3):
        moved = ids.clone()
        moved[:, :6, axis] += 1
        assert not torch.allclose(scores(q, k, moved), scores(q, k, ids))


def test_rope_turns_pairs_and_keeps_lengths():
    """Position 0 turns nothing; elsewhere neighbouring pairs turn, the first of each axis by the position itself."""
    x = torch.randn(1, 1, 3, 32, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    ids = torch.tensor([[[0, 0, 0], [0, 2, 0], [5, 7, 9]]]).double()
    turned = apply_rope(x, rope(ids, (4, 14, 14), 10_000, torch.float64))
    assert torch.equal(turned[:, :, 0], x[:, :, 0])
    pairs, turned_pairs = (torch.view_as_complex(t.unflatten(-1, (-1, 2))) for t in (x, turned))
    torch.testing.assert_close(turned_pairs.abs(), pairs.abs())
    assert torch.equal(turned[0, 0, 1, :4], x[0, 0, 1, :4])  # this token's text position is 0
    turn = torch.polar(*torch.tensor([1.0, 2.0]).double())
    torch.testing.assert_close(turned_pairs[0, 0, 1, 2] / pairs[0, 0, 1, 2], turn)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_rope_rounds_its_halves_before_they_are_interleaved(dtype):
    """The bits are those of rounding the interleaved result, of which no wider copy is made."""
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(2, 3, 50, 32, generator=generator, dtype=torch.float64).to(dtype)
    ids = torch.randint(0, 90, (1, 50, 3), generator=generator).double()
    table = rope(ids, rope_axes(32), 10_000, torch.promote_types(dtype, torch.float32))
    even, odd = x.to(table.dtype).unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = table.unsqueeze(1).unbind(-1)
    rotated = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    assert torch.equal(apply_rope(x, table), rotated.flatten(-2).to(dtype))
    nodes = make_fx(apply_rope)(x, table).graph.nodes
    (stack,) = [node for node in nodes if node.target is torch.ops.aten.stack.default]
    assert stack.meta["tensor_meta"].dtype == dtype


def test_rope_is_exact_far_out():
    """Angles in float64: at row 4000 a float32 angle would be wrong in the fourth digit of its sine."""
    assert rope_axes(128) == (16, 56, 56) and rope_axes(32) == (4, 14, 14)
    table = rope(torch.tensor([[[0.0, 4000.0, 0.0]]]), (16, 56, 56), 10_000)
    angles = torch.tensor([4000 * 10_000 ** (-2 * i / 56) for i in range(28)], dtype=torch.float64)
    expected = torch.stack([angles.cos(), angles.sin()])
    assert table.dtype == torch.float32 and (table[0, 0, 8:36].T.double() - expected).abs().max() < 1e-7


def test_the_autoencoder_changes_sizes_by_eight():
    small = AutoEncoder(AutoEncoderParams(ch=32)).requires_grad_(False)
    latents = small.encode(torch.zeros(1, 3, 32, 48))
    assert latents.shape == (1, 16, 4, 6) and small.decode(latents).shape == (1, 3, 32, 48)


def test_images_are_clamped_and_rounded():
    values = torch.tensor([-2.0, -1.0, 0.0, 0.9955, 0.9965, 3.0])  # 254.43 and 254.55 in between
    image = to_uint8(values.expand(1, 3, 1, 6))
    assert image.shape == (1, 1, 6, 3) and image.dtype == torch.uint8
    assert image[0, 0, :, 0].tolist() == [0, 0, 128, 254, 255, 255]
