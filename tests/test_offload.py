"""Weights in host memory: streamed blocks give the same bits; free memory decides what stays."""

import threading
import weakref
from functools import partial
from pathlib import Path

import pytest
import tiny
import torch
from msgspec.structs import replace
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import weights
from formats import key_names, recognize
from formats import safetensors as files
from model.layers import Modulation
from model.transformer import Flux, FluxParams
from pipeline import Pipeline
from regional.attention import RegionalAttention
from regional.layout import Layout, Region
from regional.mask import region_tokens
from runtime import memory, offload
from runtime.memory import Placement
from runtime.offload import FLUX_MODULATION, Streamed, block_of, laid_out
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


def counted(stream: Streamed) -> list[int]:
    """The modules that it fetches from now on."""
    fetched = []
    fetch = stream.fetch
    stream.fetch = lambda index: (fetched.append(index), fetch(index))
    return fetched


@torch.inference_mode()
@pytest.mark.parametrize("pin", [False, True])
@pytest.mark.parametrize("streamed", [[0], [0, 3], [1, 2, 4], [0, 1, 2, 3, 4]])
def test_some_blocks_may_be_streamed_and_the_others_stay(streamed, pin):
    """The same bits. Only streamed blocks are copied, each once a step and, pinned, in one copy."""
    resident = random_flux()
    flux = random_flux()
    places = list(map(places_of, blocks_of(flux)))
    stream = Streamed([blocks_of(flux)[i] for i in streamed], CPU, pin)
    fetched = counted(stream)
    for t in 0.9, 0.5, 0.1:
        assert torch.equal(tiny.velocity(flux, *inputs(t)), tiny.velocity(resident, *inputs(t)))
    turns = 1 if len(streamed) == 1 else 3
    assert fetched == [*range(len(streamed))] * turns + [0]
    with Copies() as made:
        stream.fetch(0)
    assert made.count == (1 if pin else len(stream.weights[0]))
    for i in {*range(5)} - {*streamed}:
        assert places[i] == places_of(blocks_of(flux)[i])


def places_of(block: torch.nn.Module) -> dict[str, int]:
    return {name: weight.data_ptr() for name, weight in block.named_parameters()}


class Copies(TorchDispatchMode):
    """Counts the copies."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten.copy_.default
        return function(*args, **(kwargs or {}))


@torch.inference_mode()
def test_two_blocks_at_most_are_on_the_device():
    """While a block runs, its weights are in one buffer, the next block's in the other."""
    flux = random_flux()
    blocks, modulation = stream_all(flux)
    seen = []

    def look(block, args):
        index = blocks_of(flux).index(block)
        seen.append((index, away(blocks)))
        following = blocks.weights[(index + 1) % 5]
        assert all(map(torch.equal, laid_out(blocks.buffers[-1], following), following))

    for block in blocks_of(flux):
        block.register_forward_pre_hook(look)
    tiny.velocity(flux, *inputs())
    assert seen == [(i, {i}) for i in range(5)] and len(blocks.buffers) == 2
    modulation.release()
    assert not modulation.buffers and not away(modulation)


def away(stream: Streamed) -> set[int]:
    """The modules whose weights are not those in host memory."""
    found = set()
    for i, (owners, host) in enumerate(zip(stream.owners, stream.weights)):
        places = [getattr(owner, key).data_ptr() for owner, key in owners]
        if places != [weight.data_ptr() for weight in host]:
            found.add(i)
    return found


@torch.inference_mode()
def test_each_layers_weights_are_fetched_once_for_all_steps():
    """And one more time the first's, for the next layout."""
    flux = random_flux()
    _, modulation = stream_all(flux)
    fetched = counted(modulation)
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
    """What loading leaves in host memory is what Streamed takes care of, of FLUX.1 and of T5."""
    flux = random_flux()
    t5 = tiny.T5Encoder(tiny.T5)
    blocks, modulation = stream_all(flux)
    t5_blocks = Streamed(list(t5.encoder.block), CPU)

    def streamed(module, *streams):
        layers = [layer for stream in streams for owners in stream.owners for layer in owners]
        own = {id(getattr(owner, key)) for owner, key in layers}
        return {name for name, parameter in module.named_parameters() if id(parameter) in own}

    def found(module, placement):
        return {name for name, _ in module.named_parameters() if placement.on_host(name)}

    names = ["double_blocks.0", "double_blocks.1", *(f"single_blocks.{i}" for i in range(3))]
    assert streamed(flux, blocks) == found(flux, Placement(names, False))
    assert streamed(flux, blocks, modulation) == found(flux, Placement(names, True))
    assert streamed(flux, modulation) == found(flux, Placement([], True))
    of_t5 = ["encoder.block.0", "encoder.block.1"]
    assert streamed(t5, t5_blocks) == found(t5, Placement(of_t5, True))
    some = Streamed([flux.double_blocks[1], flux.single_blocks[2]], CPU)
    two = ["double_blocks.1", "single_blocks.2"]
    assert streamed(flux, some) == found(flux, Placement(two, False))
    assert not found(flux, Placement([], False)) and block_of("final_layer.linear.weight") is None


REGION = Region(prompt="a red circle", box=(0, 0, 32, 64))
LAYOUT = Layout(prompt="a red circle", width=64, height=64, steps=2, regions=(REGION,))


def latents_of(**settings) -> torch.Tensor:
    made = Pipeline("pocket", device="cpu", **settings)
    return made.denoise(made.prepare(LAYOUT), 1)


@pytest.fixture(scope="module")
def expected():
    return latents_of()


def test_a_run_with_streamed_blocks_is_bit_equal(expected):
    assert torch.equal(latents_of(offload="blocks"), expected)
    in_fp8 = latents_of(quantize="fp8")
    assert torch.equal(latents_of(quantize="fp8", offload="blocks"), in_fp8)
    assert not torch.equal(in_fp8, expected)


@pytest.mark.parametrize("excess, count, modulation", [(1, 4, False), (4 * 10**6, 6, True)])
def test_a_run_with_some_blocks_streamed_is_bit_equal(
    monkeypatch, expected, excess, count, modulation
):  # fmt: skip
    """As where some of the blocks fit: what has to be streamed of both is, and nothing else."""

    def some_blocks(source, *_):
        sizes = memory.block_bytes(memory.weight_bytes(source, torch.float32))
        names = memory.fewest_blocks(sizes, excess)
        assert len(names) == (count if source.part == "flux" else 2)
        return Placement(names, modulation and source.part == "flux")

    monkeypatch.setattr(memory, "place", some_blocks)
    made = Pipeline("pocket", device="cpu", offload="blocks")
    assert torch.equal(made.denoise(made.prepare(LAYOUT), 1), expected)
    loaded = made.parts.loaded
    assert [len(loaded[part].streamed) for part in ("t5", "flux")] == [1, 1 + modulation]


@torch.inference_mode()
def test_modulation_known_beforehand_is_the_same_to_the_bit():
    flux = random_flux()
    levels = [1.0, 0.6, 0.2]
    *_, y, guidance = inputs()
    known = flux.modulations(levels, y, guidance)
    for layer in [layer for layer in flux.modules() if isinstance(layer, Modulation)]:
        layer.lin.weight.fill_(torch.nan)  # they are not used any more
    fresh = random_flux()
    for level, modulation in zip(levels, known):
        assert torch.equal(flux(*inputs(level)[:4], modulation), tiny.velocity(fresh, *inputs(level)))


def test_modulation_is_made_once_for_all_seeds_of_a_layout(monkeypatch):
    made = []
    modulations = Flux.modulations
    monkeypatch.setattr(Flux, "modulations", lambda *args: made.append(args) or modulations(*args))
    pipeline = Pipeline("pocket", device="cpu")
    prepared = pipeline.prepare(LAYOUT)
    for seed in 1, 2:
        pipeline.denoise(prepared, seed)
    assert len(made) == 1
    stronger = prepared._replace(layout=replace(prepared.layout, guidance=30.0))
    assert not torch.equal(pipeline.denoise(stronger, 1), pipeline.denoise(prepared, 1)) and len(made) == 3
    pipeline.denoise(pipeline.prepare(replace(LAYOUT, prompt="a blue square")), 1)
    assert len(made) == 4


@pytest.fixture(scope="module")
def full_size():
    """FLUX.1-dev's transformer and T5 as headers would give them."""
    with torch.device("meta"):
        modules = {"flux": Flux(FluxParams()), "t5": tiny.T5Encoder(weights.T5Params())}
    found = {}
    for part, module in modules.items():
        names = next(names for names in key_names.KEY_NAMES if names.part == part)
        tensors = {
            name: files.Stored(Path("x"), name, "BF16", tuple(t.shape), 0, 2 * t.numel())
            for name, t in module.state_dict().items()
        }
        found[part] = recognize.Source(part, Path(part), "", names, tensors, {}, {})
    return found


def test_weights_of_full_size_on_the_gpu(full_size):
    """At most 17.5 GB in bfloat16 and 8.8 GB in FP8, without the modulation layers."""
    in_bfloat16 = resident(full_size["flux"])
    in_fp8 = resident(full_size["flux"], fp8=True)
    assert 17.2e9 < in_bfloat16 <= 17.5e9 and 8.6e9 < in_fp8 <= 8.8e9
    assert resident(full_size["t5"]) == pytest.approx(9.52e9, rel=0.01)


def resident(source: recognize.Source, fp8: bool = False) -> int:
    sizes = memory.weight_bytes(source, torch.bfloat16, fp8)
    return sum(size for name, size in sizes.items() if not FLUX_MODULATION.match(name))


class LiveBytes(TorchDispatchMode):
    """The most bytes that tensors made meanwhile hold at a time."""

    def __init__(self):
        super().__init__()
        self.live = 0
        self.most = 0
        self.storages = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = [x for x in tree_iter((args, kwargs)) if isinstance(x, torch.Tensor)]
        given = {x.untyped_storage()._cdata for x in given}
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


@pytest.mark.parametrize("regions, gigabytes", [(0, 0.42), (4, 0.94), (16, 1.50)])
def test_the_room_that_is_counted_on_is_what_a_step_takes(monkeypatch, regions, gigabytes):
    """FLUX.1-dev at 1024 x 1024 in bfloat16, on the meta device; docs/full_size.md has the numbers."""
    on_meta = partial(torch.empty, dtype=torch.bfloat16, device="meta")
    sdpa = "torch.nn.functional.scaled_dot_product_attention"
    monkeypatch.setattr(sdpa, lambda q, k, v: torch.empty_like(q))
    rope = lambda ids, shape, *_: on_meta(1, shape[1], 64, 2).float()  # noqa: E731
    monkeypatch.setattr("model.transformer.known_rope", rope)
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
            flux(img, image_ids(1024, 1024), txt, text_ids(text), modulation, **hooks)
    assert bytes_.most / 1e9 == pytest.approx(gigabytes, abs=0.006)
    monkeypatch.setattr(memory, "VALUES_PER_PIXEL", 0)
    counted_on = memory.working_bytes(3072, layout, torch.bfloat16, fp8=False)
    assert bytes_.most < counted_on < 1.5 * bytes_.most


FOUR = tuple(Region(prompt="r", box=(512 * i, 512 * j, 512 * i + 512, 512 * j + 512)) for i in (0, 1) for j in (0, 1))
DEV = Layout(prompt="p", steps=24, max_sequence_length=512, region_max_sequence_length=512, regions=FOUR)


@pytest.mark.parametrize("offload, times", [("auto", 2), ("none", 2), ("blocks", 1)])
def test_a_layout_that_needs_more_room_is_decided_anew(monkeypatch, offload, times):
    """As on a GPU: the transformer is loaded again when a layout needs more room, and only then."""
    loaded = []
    parts = Pipeline("pocket", device="cpu", offload=offload).parts
    parts.device = torch.device("cuda")  # nothing is computed
    monkeypatch.setattr(parts, "load", lambda name, *_: (loaded.append(name), []))
    monkeypatch.setattr(parts, "drop", lambda *names: None)
    large = Layout(prompt="p", width=2048, height=2048, max_sequence_length=512)
    for layout in DEV, DEV, large, DEV, large:
        parts.get("flux", layout)
        parts.get("ae")
    assert loaded == ["flux", "ae", "flux"][: 1 + times]


@pytest.mark.parametrize(
    "part, free, fp8, streamed, modulation",
    [
        ("flux", 80, False, 0, False),
        ("flux", 26.5, False, 0, False),
        ("flux", 25.5, False, 0, True),
        ("flux", 23, False, 0, True),  # a GPU of 24 GB
        ("flux", 15, False, 18, True),  # of 16 GB
        ("flux", 11, False, 31, True),  # of 12 GB
        ("flux", 2, False, 57, True),
        ("flux", 23, True, 0, False),
        ("flux", 11, True, 0, True),
        ("flux", 7.5, True, 25, True),
        ("t5", 11.5, False, 0, False),
        ("t5", 7.5, False, 10, False),
    ],
)
def test_as_few_blocks_are_streamed_as_free_memory_asks_for(
    full_size, monkeypatch, capsys, part, free, fp8, streamed, modulation
):
    """FLUX.1-dev with four regions at 1024 x 1024, in bfloat16 or fp8, and T5."""
    monkeypatch.setattr(memory, "free_memory", lambda device: int(free * 1e9))
    gpu = torch.device("cuda")
    source = full_size[part]
    room = memory.WORKING_T5
    if part == "flux":
        room = memory.working_bytes(3072, DEV, torch.bfloat16, fp8)
    placement = memory.place(source, "auto", gpu, torch.bfloat16, fp8, room)
    said = capsys.readouterr().err
    assert (len(placement.blocks), placement.modulation) == (streamed, modulation)
    assert f"{free:.1f} GB are free" in said
    assert (f"{streamed} of its" in said) if streamed else ("stay on the GPU" in said)


@pytest.mark.parametrize("part", ["flux", "t5"])
def test_what_is_streamed_is_enough_and_spread_evenly(full_size, part):
    sizes = memory.block_bytes(memory.weight_bytes(full_size[part], torch.bfloat16))
    names = list(sizes)
    assert len(names) == {"flux": 57, "t5": 24}[part]
    for excess in range(10**8, sum(sizes.values()), 10**9):
        chosen = memory.fewest_blocks(sizes, excess)
        saved = sum(sizes[name] for name in chosen) - 2 * max(sizes[name] for name in chosen)
        assert saved >= excess or chosen == names
        assert saved - max(sizes.values()) < excess
        at = [names.index(name) for name in chosen]
        gaps = {(after - before) % len(names) for before, after in zip(at, at[1:] + at[:1])}
        assert max(gaps) - min(gaps) <= 1
    assert memory.fewest_blocks(sizes, 0) == memory.fewest_blocks(sizes, -1) == []


def test_offload_none_and_blocks_are_what_they_say(full_size, monkeypatch, capsys):
    gpu = torch.device("cuda")
    given = (torch.bfloat16, False, memory.WORKING_T5)
    for part, count in ("flux", 57), ("t5", 24):
        for free in 1, 80:
            monkeypatch.setattr(memory, "free_memory", lambda device, free=free: free * 10**9)
            blocks, modulation = memory.place(full_size[part], "blocks", gpu, *given)
            assert len(blocks) == count and modulation == (part == "flux")
            fits = part == "t5" or free == 80
            assert memory.place(full_size[part], "none", gpu, *given) == Placement([], not fits)
        for device in CPU, torch.device("mps"):
            assert memory.place(full_size[part], "auto", device, *given) == Placement([], False)
        assert memory.place(full_size[part], "blocks", CPU, *given) == Placement(blocks, False)
    assert not capsys.readouterr().err


def test_free_memory_keeps_to_the_part_that_this_process_may_take(monkeypatch):
    def gpu(free, fraction, reserved, allocated):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 140))
        monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: fraction)
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: reserved)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: allocated)
        return memory.free_memory(torch.device("cuda"))

    assert gpu(100, 1.0, 0, 0) == 100
    assert gpu(100, 1.0, 20, 5) == 115  # what torch holds but does not use is free too
    assert gpu(100, 0.25, 20, 5) == 30


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


def test_the_time_to_the_first_step_is_printed_once(run):
    done = run("--prompt", "x", "--width", 64, "--height", 64, "--steps", 1, "--seed", 1, 2)
    (line,) = [line for line in done.errors if "first step ended" in line]
    assert 0 < float(line.split()[4]) < 600
