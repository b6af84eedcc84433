"""Weights in host memory: streamed blocks give the same bits; free memory decides what stays."""

import threading
import time
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
from formats import components, key_names, recognize
from formats import safetensors as files
from model.layers import Modulation
from model.transformer import Flux, FluxParams
from pipeline import Pipeline
from regional.attention import RegionalAttention
from regional.layout import Layout, Region
from regional.mask import region_tokens
from runtime import memory, offload
from runtime.offload import MODULATION, Streamed, group_of, laid_out
from sampler.flow import image_ids, text_ids

CPU = torch.device("cpu")
GPU = torch.device("cuda")


def random_flux() -> Flux:
    torch.manual_seed(0)
    return Flux(tiny.FLUX).requires_grad_(False)


def inputs(timesteps: float = 0.7) -> list[torch.Tensor]:
    torch.manual_seed(1)
    img, txt, y = torch.randn(1, 16, 64), torch.randn(1, 7, 32), torch.randn(1, 48)
    return [img, image_ids(64, 64), txt, text_ids(7), torch.tensor([timesteps]), y, torch.tensor([3.5])]


def blocks_of(flux: Flux) -> list[torch.nn.Module]:
    return [*flux.double_blocks, *flux.single_blocks]


def modulation_of(flux: Flux) -> list[Modulation]:
    return [layer for layer in flux.modules() if isinstance(layer, Modulation)]


@torch.inference_mode()
@pytest.mark.parametrize("pin", [False, True])
@pytest.mark.parametrize("streamed", [[0], [0, 3], [1, 2, 4], [0, 1, 2, 3, 4]])
def test_some_blocks_may_be_streamed_and_the_others_stay(streamed, pin, spy):
    """The same bits. Only streamed blocks are copied, each once a step and, pinned, in one copy."""
    resident, flux = random_flux(), random_flux()
    places = list(map(places_of, blocks_of(flux)))
    stream = Streamed([blocks_of(flux)[i] for i in streamed], CPU, pin)
    fetched = spy(stream, "fetch")
    for t in 0.9, 0.5, 0.1:
        assert torch.equal(tiny.velocity(flux, *inputs(t)), tiny.velocity(resident, *inputs(t)))
    turns = [*range(len(streamed))] * (1 if len(streamed) == 1 else 3)
    assert fetched == [(index,) for index in (*turns, 0)]
    copies = spy(torch.Tensor, "copy_")
    stream.fetch(0)
    assert len(copies) == (1 if pin else len(stream.weights[0]))
    for i in {*range(5)} - {*streamed}:
        assert places[i] == places_of(blocks_of(flux)[i])


def places_of(block: torch.nn.Module) -> dict[str, int]:
    return {name: weight.data_ptr() for name, weight in block.named_parameters()}


@torch.inference_mode()
def test_two_blocks_at_most_are_on_the_device():
    """While a block runs, its weights are in one buffer, the next block's in the other."""
    flux = random_flux()
    blocks = Streamed(blocks_of(flux), CPU)
    modulation = Streamed(modulation_of(flux), CPU)
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
        found |= {i} if places != [weight.data_ptr() for weight in host] else set()
    return found


@torch.inference_mode()
def test_modules_may_be_called_out_of_turn():
    layers = [torch.nn.Linear(4, 4).requires_grad_(False) for _ in range(4)]
    expected = [layer(torch.ones(4)) for layer in layers]
    streamed = Streamed(layers, CPU)
    for i in 2, 2, 0, 1, 3, 1, 0, 3, None, 3, 0:
        if i is None:
            streamed.release()
        else:
            assert torch.equal(layers[i](torch.ones(4)), expected[i])


def test_names_on_the_host_are_those_that_are_streamed():
    """What loading leaves in host memory is what Streamed takes care of, of FLUX.1 and of T5."""
    flux = random_flux()
    t5 = tiny.T5Encoder(tiny.T5)
    kinds = {
        "double_blocks": flux.double_blocks,
        "single_blocks": flux.single_blocks,
        "encoder.block": t5.encoder.block,
    }
    groups = {f"{kind}.{i}": [block] for kind, blocks in kinds.items() for i, block in enumerate(blocks)}
    for group, modules in {**groups, MODULATION: modulation_of(flux)}.items():
        owners = sum(Streamed(modules, CPU).owners, [])
        own = {id(getattr(owner, key)) for owner, key in owners}
        named = [*flux.named_parameters(), *t5.named_parameters()]
        streamed = {name for name, x in named if id(x) in own}
        assert streamed == {name for name, _ in named if group_of(name) == group} != set()
    assert group_of("final_layer.linear.weight") is None


REGION = Region(prompt="a red circle", box=(0, 0, 32, 64))
LAYOUT = Layout(prompt="a red circle", width=64, height=64, steps=2, regions=(REGION,))


def latents_of(made: Pipeline) -> torch.Tensor:
    return made.denoise(made.prepare(LAYOUT), 1)


def test_a_run_with_streamed_blocks_is_bit_equal(monkeypatch):
    """All of them, or some, as where some fit: what has to be streamed of both is, and nothing else."""
    expected = latents_of(Pipeline("pocket", device="cpu"))
    assert torch.equal(latents_of(Pipeline("pocket", device="cpu", offload="blocks")), expected)
    in_fp8 = [latents_of(Pipeline("pocket", device="cpu", quantize="fp8", offload=x)) for x in ("none", "blocks")]
    assert torch.equal(*in_fp8) and not torch.equal(in_fp8[0], expected)
    for excess, count, modulation in (1, 4, []), (4 * 10**6, 6, [MODULATION]):

        def some_blocks(source, *_, excess=excess, count=count, modulation=modulation):
            names = memory.fewest_blocks(blocks_in(memory.group_bytes(source, torch.float32)), excess)
            assert len(names) == (count if source.part == "flux" else 2)
            return names + (modulation if source.part == "flux" else [])

        monkeypatch.setattr(memory, "place", some_blocks)
        made = Pipeline("pocket", device="cpu", offload="blocks")
        assert torch.equal(latents_of(made), expected)
        assert [len(made.parts.loaded[part].streamed) for part in ("t5", "flux")] == [1, 1 + len(modulation)]


def blocks_in(sizes: dict[str | None, int]) -> dict[str, int]:
    return {group: size for group, size in sizes.items() if group not in (None, MODULATION)}


@torch.inference_mode()
def test_modulation_known_beforehand_is_fetched_once_and_the_same_to_the_bit(spy):
    flux = random_flux()
    levels = [1.0, 0.6, 0.2]
    *_, y, guidance = inputs()
    streamed = Streamed(modulation_of(flux), CPU)
    fetched = spy(streamed, "fetch")
    known = flux.modulations(levels, y, guidance)
    assert fetched == [(index,) for index in (*range(len(streamed.weights)), 0)]  # and the next layout's first
    streamed.release()
    for layer in modulation_of(flux):
        layer.lin.weight.fill_(torch.nan)  # they are not used any more
    fresh = random_flux()
    for level, modulation in zip(levels, known):
        assert torch.equal(flux(*inputs(level)[:4], modulation), tiny.velocity(fresh, *inputs(level)))


def test_modulation_is_made_once_for_all_seeds_of_a_layout(spy):
    made = spy(Flux, "modulations")
    pipeline = Pipeline("pocket", device="cpu")
    prepared = pipeline.prepare(LAYOUT)
    stronger = prepared._replace(layout=replace(prepared.layout, guidance=30.0))
    other = pipeline.prepare(replace(LAYOUT, prompt="a blue square"))
    found = []
    for each, seed, count in (prepared, 1, 1), (prepared, 2, 1), (stronger, 1, 2), (prepared, 1, 3), (other, 1, 4):
        found.append(pipeline.denoise(each, seed))
        assert len(made) == count
    assert torch.equal(found[0], found[3]) and not torch.equal(found[0], found[2])


@pytest.fixture(scope="module")
def full_size():
    """FLUX.1-dev's transformer and T5 as headers would give them."""
    with torch.device("meta"):
        modules = {"flux": Flux(FluxParams()), "t5": tiny.T5Encoder(components.T5Params())}
    found = {}
    for part, module in modules.items():
        names = next(names for names in key_names.KEY_NAMES if names.part == part)
        shapes = {name: tuple(t.shape) for name, t in module.state_dict().items()}
        tensors = {name: files.Stored(Path("x"), name, "BF16", shape, 0, 0) for name, shape in shapes.items()}
        found[part] = recognize.Source(part, Path(part), "", names, tensors, {}, {})
    return found


class LiveBytes(TorchDispatchMode):
    """The most bytes that tensors made meanwhile hold at a time."""

    live = most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {x.untyped_storage()._cdata for x in tree_iter((args, kwargs)) if isinstance(x, torch.Tensor)}
        out = function(*args, **(kwargs or {}))
        for x in tree_iter(out):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in given:
                size = x.untyped_storage().nbytes()
                weakref.finalize(x.untyped_storage(), self.add, -size)
                self.add(size)
        return out

    def add(self, size: int) -> None:
        self.live += size
        self.most = max(self.most, self.live)


@pytest.mark.parametrize("regions, gigabytes", [(0, 0.42), (4, 0.94), (16, 1.50)])
def test_the_room_that_is_counted_on_is_what_a_step_takes(monkeypatch, regions, gigabytes):
    """FLUX.1-dev at 1024 x 1024 in bfloat16, on the meta device; docs/full_size.md has the numbers."""
    on_meta = partial(torch.empty, dtype=torch.bfloat16, device="meta")
    sdpa = "torch.nn.functional.scaled_dot_product_attention"
    monkeypatch.setattr(sdpa, lambda q, k, v: torch.empty_like(q))
    rope = lambda ids, shape, *_: on_meta(1, shape[1], 64, 2).float()  # noqa: E731
    monkeypatch.setattr("model.transformer.known_rope", rope)
    columns = (
        Region(prompt="r", box=(1024 * i // regions, 0, 1024 * (i + 1) // regions, 1024)) for i in range(regions)
    )
    layout = replace(DEV, regions=tuple(columns))
    with torch.device("meta"):
        flux = Flux(FluxParams()).bfloat16().requires_grad_(False)
    hooks, text = {}, 512
    if regions:  # of the masked attention, as of the kernel, only the output is counted
        masked = lambda tokens: lambda q, k, v, base: torch.empty_like(q)  # noqa: E731
        attention = RegionalAttention(masked, region_tokens(layout).bits(512), 512, 4096, 0.3)
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


FOUR = tuple(Region(prompt="r", box=(x, y, x + 512, y + 512)) for x in (0, 512) for y in (0, 512))
DEV = Layout(
    prompt="p", width=1024, height=1024, steps=24, max_sequence_length=512, region_max_sequence_length=512, regions=FOUR
)


@pytest.mark.parametrize("offload, times", [("auto", 2), ("none", 2), ("blocks", 1)])
def test_a_layout_that_needs_more_room_is_decided_anew(monkeypatch, offload, times):
    """As on a GPU: the transformer is loaded again when a layout needs more room, and only then."""
    loaded = []
    parts = Pipeline("pocket", device="cpu", offload=offload).parts
    parts.device = GPU  # nothing is computed
    monkeypatch.setattr(parts, "load", lambda name, *_: (loaded.append(name), []))
    monkeypatch.setattr(parts, "drop", lambda *names: None)
    large = Layout(prompt="p", width=2048, height=2048, max_sequence_length=512)
    for layout in DEV, DEV, large, DEV, large:
        parts.get("flux", layout)
        parts.get("ae")
    assert loaded == ["flux", "ae", "flux"][: 1 + times]


DEV_ROOM = {fp8: memory.working_bytes(3072, DEV, torch.bfloat16, fp8) for fp8 in (False, True)}
PLACES = [  # part, --offload, GB that are free, fp8; blocks that are streamed, and whether the modulation is
    ("flux", "auto", 80, False, 0, False), ("flux", "auto", 26.5, False, 0, False),
    ("flux", "auto", 25.5, False, 0, True), ("flux", "auto", 2, False, 57, True), ("flux", "auto", 7.5, True, 25, True),
    # GPUs of 24, 16 and 12 GB
    ("flux", "auto", 23, False, 0, True), ("flux", "auto", 15, False, 18, True), ("flux", "auto", 11, False, 31, True),
    ("flux", "auto", 23, True, 0, False), ("flux", "auto", 11, True, 0, True), ("t5", "auto", 11.5, False, 0, False),
    ("t5", "auto", 7.5, False, 10, False), ("t5", "none", 1, False, 0, False), ("t5", "blocks", 80, False, 24, False),
    ("flux", "none", 80, False, 0, False), ("flux", "none", 1, False, 0, True), ("flux", "blocks", 80, False, 57, True),
]  # fmt: skip


@pytest.mark.parametrize("part, how, free, fp8, streamed, modulation", PLACES)
def test_as_few_blocks_are_streamed_as_free_memory_asks_for(
    full_size, monkeypatch, capsys, part, how, free, fp8, streamed, modulation
):
    """FLUX.1-dev with four regions at 1024 x 1024, in bfloat16 or fp8, and T5."""
    monkeypatch.setattr(memory, "free_memory", lambda device: int(free * 1e9))
    room = DEV_ROOM[fp8] if part == "flux" else memory.WORKING_T5
    given = torch.bfloat16, fp8, room
    placed = memory.place(full_size[part], how, GPU, *given)
    said = capsys.readouterr().err
    assert (len(placed), MODULATION in placed) == (streamed + modulation, modulation)
    report = f"{free:.1f} GB are free: {streamed} of its"
    assert report in said if how == "auto" else not said
    for device in CPU, torch.device("mps"):
        blocks = [name for name in placed if name != MODULATION] if how == "blocks" else []
        assert memory.place(full_size[part], how, device, *given) == blocks


@pytest.mark.parametrize("part, count", [("flux", 57), ("t5", 24)])
def test_what_is_streamed_is_enough_and_spread_evenly(full_size, part, count):
    sizes = blocks_in(memory.group_bytes(full_size[part], torch.bfloat16))
    names = list(sizes)
    assert len(names) == count
    for excess in range(10**8, sum(sizes.values()), 10**9):
        chosen = memory.fewest_blocks(sizes, excess)
        saved = sum(sizes[name] for name in chosen) - 2 * max(sizes[name] for name in chosen)
        assert saved >= excess or chosen == names
        assert saved - max(sizes.values()) < excess
        at = [names.index(name) for name in chosen]
        gaps = {(after - before) % len(names) for before, after in zip(at, at[1:] + at[:1])}
        assert max(gaps) - min(gaps) <= 1
    assert memory.fewest_blocks(sizes, 0) == memory.fewest_blocks(sizes, -1) == []


@pytest.mark.parametrize("fraction, held, used, free", [(1, 0, 0, 100), (1, 20, 5, 115), (0.25, 20, 5, 30)])
def test_free_memory_is_what_this_process_may_take(monkeypatch, fraction, held, used, free):
    """Of 140, 100 are free. What torch holds but does not use is free too."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100, 140))
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: fraction)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: held)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: used)
    assert memory.free_memory(GPU) == free


def test_files_are_read_ahead_if_they_fit(tmp_path, monkeypatch):
    read = []
    before = set(threading.enumerate())
    read_files = offload.read_files
    monkeypatch.setattr(offload, "read_files", read.append)
    source = weights.find("pocket").flux
    huge = {"x": next(iter(source.tensors.values()))._replace(file=tmp_path / "huge")}
    with open(tmp_path / "huge", "wb") as file:
        file.truncate(1 << 43)  # a sparse file
    for each in source, recognize.Source(**{**vars(source), "tensors": huge}):
        offload.read_ahead(each)
        for thread in set(threading.enumerate()) - before:
            thread.join()
        assert read == [{source.path}]
    read_files({tmp_path / "gone", source.path})  # a file that is gone is none of its business


def test_the_time_to_the_first_step_is_printed_once(run):
    start = time.perf_counter()
    done = run("--prompt", "x", "--width", 64, "--height", 64, "--steps", 1, "--seed", 1, 2)
    (line,) = [line for line in done.errors if "first step ended" in line]
    assert 0 < float(line.split()[4]) < time.perf_counter() - start + 0.1
