"""Weights in host memory: streamed blocks compute the same to the bit; what stays there is decided by what is free."""

import json
import subprocess
import sys
import threading
import weakref
from functools import partial

import pytest
import tiny
import torch
from msgspec.structs import replace
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import generate
import weights
from formats import key_names as namings
from formats import recognize
from formats import safetensors as files
from model.layers import Modulation
from model.transformer import Flux, FluxParams
from pipeline import Pipeline
from regional.attention import RegionalAttention
from regional.layout import Layout, Region
from regional.mask import region_tokens
from runtime import memory, offload
from runtime.offload import FLUX_BLOCKS, FLUX_MODULATION, T5_BLOCKS, Streamed
from sampler.flow import image_ids, text_ids

CPU = torch.device("cpu")


def random_flux() -> Flux:
    torch.manual_seed(0)
    return Flux(tiny.FLUX).requires_grad_(False)


def inputs(timesteps: float = 0.7) -> list[torch.Tensor]:
    torch.manual_seed(1)
    img, txt, y = torch.randn(1, 16, 64), torch.randn(1, 7, 32), torch.randn(1, 48)
    return [img, image_ids(64, 64), txt, text_ids(7), torch.tensor([timesteps]), y, torch.tensor([3.5])]


def blocks_of(flux: Flux) -> list[torch.nn.Module]:
    return [*flux.double_blocks, *flux.single_blocks]


def stream_all(flux: Flux) -> tuple[Streamed, Streamed]:
    layers = [layer for layer in flux.modules() if isinstance(layer, Modulation)]
    return Streamed(blocks_of(flux), CPU), Streamed(layers, CPU)


# ------------------------------------------------------------------------------------------------ streaming


@torch.inference_mode()
def test_streamed_blocks_compute_the_same_bits():
    resident, streamed = random_flux(), random_flux()
    stream_all(streamed)
    for timesteps in 0.9, 0.5, 0.1:
        assert torch.equal(streamed(*inputs(timesteps)), resident(*inputs(timesteps)))


@torch.inference_mode()
def test_two_blocks_at_most_are_on_the_device():
    """While a block runs, its weights are in one buffer, the next block's in the other, and all else on the host."""
    flux, seen = random_flux(), []
    blocks, modulation = stream_all(flux)
    host = [weight.data_ptr() for block in blocks.weights for *_, weight in block]

    def look(block, args):
        in_buffers = {
            i for i, each in enumerate(blocks.weights) for owner, key, weight in each
            if owner._parameters[key].data_ptr() != weight.data_ptr()
        }  # fmt: skip
        seen.append((blocks_of(flux).index(block), in_buffers))
        following = blocks.weights[(seen[-1][0] + 1) % 5]
        for view, (*_, weight) in zip(blocks.views(blocks.buffers[-1], (seen[-1][0] + 1) % 5), following):
            assert torch.equal(view, weight)

    for block in blocks_of(flux):
        block.register_forward_pre_hook(look)
    flux(*inputs())
    assert seen == [(i, {i}) for i in range(5)]
    assert len(blocks.buffers) == 2 and [w.data_ptr() for b in blocks.weights for *_, w in b] == host
    modulation.release()
    assert not modulation.buffers and all(
        owner._parameters[key].data_ptr() == weight.data_ptr() for m in modulation.weights for owner, key, weight in m
    )


@torch.inference_mode()
def test_each_layers_weights_are_fetched_once_for_all_steps():
    """And one more time the first's, for the next layout."""
    flux, fetched = random_flux(), []
    _, modulation = stream_all(flux)
    fetch = modulation.fetch
    modulation.fetch = lambda index: (fetched.append(index), fetch(index))
    *_, y, guidance = inputs()
    flux.modulations([1.0, 0.7, 0.4, 0.1], y, guidance)
    assert fetched == [*range(len(modulation.weights)), 0]


@torch.inference_mode()
def test_modules_may_be_called_out_of_turn():
    layers = [torch.nn.Linear(4, 4).requires_grad_(False) for _ in range(4)]
    expected = [layer(torch.ones(4)) for layer in layers]
    streamed = Streamed(layers, CPU)
    for i in 2, 2, 0, 1, 3, 1, 0, 3:
        assert torch.equal(layers[i](torch.ones(4)), expected[i])
    streamed.release()
    for i in 3, 0:
        assert torch.equal(layers[i](torch.ones(4)), expected[i])


def test_names_on_the_host_are_those_that_are_streamed():
    """What loading leaves in host memory is just what Streamed takes care of, for FLUX.1 and for T5."""
    flux, t5 = random_flux(), tiny.T5Encoder(tiny.T5)
    blocks, modulation = stream_all(flux)
    t5_blocks = Streamed(list(t5.encoder.block), CPU)

    def streamed(module, *streams):
        own = {id(stream_owner._parameters[key]) for s in streams for m in s.weights for stream_owner, key, _ in m}
        return {name for name, parameter in module.named_parameters() if id(parameter) in own}

    def found(module, pattern):
        return {name for name, _ in module.named_parameters() if pattern.search(name)}

    assert streamed(flux, blocks, modulation) == found(flux, FLUX_BLOCKS) != found(flux, FLUX_MODULATION)
    assert streamed(flux, modulation) == found(flux, FLUX_MODULATION)
    assert streamed(t5, t5_blocks) == found(t5, T5_BLOCKS)


@pytest.mark.parametrize("flags", [(), ("--quantize", "fp8")], ids=["float32", "fp8"])
def test_a_run_with_streamed_blocks_is_bit_equal(golden, tmp_path, flags):
    layout, model = golden / "regional_3boxes_full" / "layout.yaml", golden / "models" / "flux-tiny-dev"
    latents = []
    for how in "none", "blocks":
        name = tmp_path / f"{how}.safetensors"
        args = ["--model", model, "--layout", layout, "--device", "cpu", "--offload", how, *flags]
        args += ["--output", tmp_path / f"{how}.png", "--save-latents", name]
        assert generate.main([str(arg) for arg in args]) == 0
        latents.append(load_file(name)["latents"])
    assert torch.equal(*latents)


# ------------------------------------------------------------------------------------------------ modulation up front


@torch.inference_mode()
def test_modulation_known_beforehand_is_the_same_to_the_bit():
    flux, levels = random_flux(), [1.0, 0.6, 0.2]
    *_, y, guidance = inputs()
    known = flux.modulations(levels, y, guidance)
    for layer in [layer for layer in flux.modules() if isinstance(layer, Modulation)]:
        layer.lin.weight.fill_(torch.nan)  # they are not used any more
    fresh = random_flux()
    for level, modulation in zip(levels, known):
        assert torch.equal(flux(*inputs(level), modulation=modulation), fresh(*inputs(level)))


def test_modulation_is_made_once_for_all_seeds_of_a_layout(monkeypatch):
    made, modulations = [], Flux.modulations
    monkeypatch.setattr(Flux, "modulations", lambda *args: made.append(args) or modulations(*args))
    pipeline = Pipeline("pocket", device="cpu")
    layout = Layout(prompt="a red circle", width=64, height=64, steps=2)
    prepared = pipeline.prepare(layout)
    for seed in 1, 2:
        pipeline.denoise(prepared, seed)
    assert len(made) == 1
    stronger = prepared._replace(layout=replace(prepared.layout, guidance=30.0))
    assert not torch.equal(pipeline.denoise(stronger, 1), pipeline.denoise(prepared, 1)) and len(made) == 3
    pipeline.denoise(pipeline.prepare(Layout(prompt="a blue square", width=64, height=64, steps=2)), 1)
    assert len(made) == 4


# ------------------------------------------------------------------------------------------------ what fits


@pytest.fixture(scope="module")
def full_size():
    """FLUX.1-dev's transformer and T5 as headers would give them."""
    with torch.device("meta"):
        modules = {"flux": Flux(FluxParams()), "t5": tiny.T5Encoder(weights.T5Params())}
    return {
        part: recognize.Source(
            part, weights.Path(f"{part}.safetensors"), "", next(n for n in namings.NAMINGS if n.part == part),
            {name: files.Stored(weights.Path("x"), name, "BF16", tuple(t.shape), 0, 2 * t.numel())
             for name, t in module.state_dict().items()}, {}, {},
        )
        for part, module in modules.items()
    }  # fmt: skip


def test_weights_of_full_size_on_the_card(full_size):
    """The issue's limits: 17.5 GB in bfloat16, 8.8 GB in fp8, without the modulation layers."""
    in_bfloat16 = memory.resident_bytes(full_size["flux"], torch.bfloat16)
    in_fp8 = memory.resident_bytes(full_size["flux"], torch.bfloat16, fp8=True)
    assert 17.2e9 < in_bfloat16 <= 17.5e9 and 8.6e9 < in_fp8 <= 8.8e9
    assert memory.resident_bytes(full_size["t5"], torch.bfloat16) == pytest.approx(9.52e9, rel=0.01)


class LiveBytes(TorchDispatchMode):
    """The most bytes that tensors made meanwhile hold at a time."""

    def __init__(self):
        super().__init__()
        self.live, self.most, self.storages = 0, 0, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {x.untyped_storage()._cdata for x in tree_iter((args, kwargs)) if isinstance(x, torch.Tensor)}
        out = function(*args, **(kwargs or {}))
        for x in tree_iter(out):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in given | self.storages.keys():
                self.count(x.untyped_storage())
        return out

    def count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self.storages[key] = weakref.ref(storage, lambda _: self.gone(key, size))
        self.live += size
        self.most = max(self.most, self.live)

    def gone(self, key: int, size: int) -> None:
        self.live -= size
        del self.storages[key]


def attention_on_meta(tokens):
    """What the kernel takes: its output."""
    return lambda q, k, v, base: q.new_empty(q.transpose(1, 2).shape).transpose(1, 2)


@pytest.mark.parametrize("regions, gigabytes", [(0, 0.43), (1, 0.83), (4, 0.97), (16, 1.55)])
def test_the_room_that_is_counted_on_is_what_a_step_takes(full_size, monkeypatch, regions, gigabytes):
    """FLUX.1-dev at 1024 x 1024 in bfloat16, on the meta device; docs/full_size.md has the numbers."""
    on_meta = partial(torch.empty, dtype=torch.bfloat16, device="meta")
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda q, k, v: torch.empty_like(q))
    monkeypatch.setattr("model.transformer.known_rope", lambda ids, shape, *_: on_meta(1, shape[1], 64, 2).float())
    edges = [1024 * i // regions for i in range(regions + 1)] if regions else []
    columns = tuple(Region(prompt="r", box=(x0, 0, x1, 1024)) for x0, x1 in zip(edges, edges[1:]))
    layout = replace(DEV, regions=columns)
    with torch.device("meta"):
        flux = Flux(FluxParams()).bfloat16().requires_grad_(False)
    hooks, text = {}, 512
    if regions:
        attention = RegionalAttention(attention_on_meta, region_tokens(layout).bits(512), 512, 4096, 0.3)
        hooks, text = {"attention": attention, "join": attention.join}, 512 * (regions + 1)
    one, y = torch.empty(1, device="meta"), on_meta(1, 768)
    with torch.inference_mode():
        modulation = flux.modulations([1.0], y, one)[0]
        img, txt = on_meta(1, 4096, 64), on_meta(1, text, 4096)
        with LiveBytes() as bytes_:
            flux(img, image_ids(1024, 1024), txt, text_ids(text), one, y, one, modulation=modulation, **hooks)
    assert bytes_.most / 1e9 == pytest.approx(gigabytes, abs=0.006)
    monkeypatch.setattr(memory, "VALUES_PER_PIXEL", 0)
    counted_on = memory.working_bytes(full_size["flux"], layout, torch.bfloat16, fp8=False)
    assert bytes_.most < counted_on < 1.5 * bytes_.most


FOUR = tuple(Region(prompt="r", box=(512 * i, 512 * j, 512 * i + 512, 512 * j + 512)) for i in (0, 1) for j in (0, 1))
DEV = Layout(prompt="p", steps=24, max_sequence_length=512, region_max_sequence_length=512, regions=FOUR)


def test_a_layout_that_needs_more_room_is_decided_anew(monkeypatch):
    """As on a card: the transformer is loaded again when a layout needs more than was counted on, and only then."""
    loaded = []
    drawing = Pipeline("pocket", device="cpu")
    drawing.parts.device = torch.device("cuda")  # nothing is computed
    monkeypatch.setattr(drawing.parts, "load", lambda name, *_: (loaded.append(name), []))
    monkeypatch.setattr(drawing.parts, "drop", lambda *names: None)
    small, large = (DEV, Layout(prompt="p", width=2048, height=2048, max_sequence_length=512))
    for layout in small, small, large, small, large:
        drawing.parts.get("flux", layout)
        drawing.parts.get("ae")
    assert loaded == ["flux", "ae", "flux"]


@pytest.mark.parametrize(
    "part, free, fp8, expected",
    [
        ("flux", 80, False, False),
        ("flux", 23, False, False),  # a card of 24 GB
        ("flux", 15.5, False, True),
        ("flux", 15.5, True, False),
        ("flux", 7.5, True, True),
        ("t5", 11.5, False, False),  # a card of 12 GB
        ("t5", 7.5, False, True),
    ],
)
def test_blocks_are_streamed_where_they_do_not_fit(full_size, monkeypatch, capsys, part, free, fp8, expected):
    monkeypatch.setattr(memory, "free_memory", lambda device: int(free * 1e9))
    card = torch.device("cuda")
    assert memory.stays_on_host(full_size[part], "auto", card, torch.bfloat16, fp8, DEV) == expected
    said = capsys.readouterr().err
    assert f"{free:.1f} GB are free" in said and ("streamed" in said) == expected
    assert memory.stays_on_host(full_size[part], "blocks", card, torch.bfloat16, fp8, DEV)
    assert not memory.stays_on_host(full_size[part], "none", card, torch.bfloat16, fp8, DEV)
    assert not memory.stays_on_host(full_size[part], "auto", CPU, torch.bfloat16, fp8, DEV)
    assert not capsys.readouterr().err


def test_free_memory_keeps_to_the_part_that_this_process_may_take(monkeypatch):
    def card(free, fraction, reserved, allocated):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 140))
        monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: fraction)
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: reserved)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: allocated)
        return memory.free_memory(torch.device("cuda"))

    assert card(100, 1.0, 0, 0) == 100
    assert card(100, 1.0, 20, 5) == 115  # what torch holds but does not use is free too
    assert card(100, 0.25, 20, 5) == 30


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_full_size_runs_on_small_cards():
    """Random weights; torch refuses to take more than 24 GB, or 12 GB."""
    assert subprocess.run([sys.executable, "benchmarks/speed.py", "--caps"], timeout=900).returncode == 0


# ------------------------------------------------------------------------------------------------ loading


def test_files_are_read_ahead_if_they_fit(tmp_path, monkeypatch):
    read = []

    def wait():
        for thread in set(threading.enumerate()) - before:
            thread.join()

    before = set(threading.enumerate())
    monkeypatch.setattr(offload, "read_files", read.append)
    source = weights.find("pocket").flux
    offload.read_ahead(source)
    wait()
    assert read == [{source.path}]
    huge = {"x": next(iter(source.tensors.values()))._replace(file=tmp_path / "huge")}
    with open(tmp_path / "huge", "wb") as file:
        file.truncate(1 << 43)  # a sparse file
    offload.read_ahead(recognize.Source(**{**vars(source), "tensors": huge}))
    wait()
    assert len(read) == 1


def test_reading_ahead_survives_a_file_that_is_gone(tmp_path):
    (tmp_path / "there").write_bytes(bytes(100))
    offload.read_files({tmp_path / "gone", tmp_path / "there"})


def test_the_time_to_the_first_step_is_said_once(golden, tmp_path, capsys):
    args = ["--model", golden / "models" / "flux-tiny-schnell", "--prompt", "x", "--width", 64, "--height", 64]
    args += ["--seed", 1, 2, "--output", tmp_path / "a.png", "--metadata"]
    assert generate.main([str(arg) for arg in args]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "first step ended" in line]
    assert len(said) == 1 and 0 < float(said[0].split()[4]) < 600
    assert "fp8" not in json.loads((tmp_path / "a_1.json").read_text())
