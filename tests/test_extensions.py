"""What sampling hands to extensions is enough for other samplers, two velocities, a cache, more tokens
and channels."""

import dataclasses
import inspect
import math
import re
from pathlib import Path

import pytest
import tiny
import torch
from msgspec.structs import replace
from test_parity import random, randomized
from torch import Tensor

from extensions.controlnet import more_channels
from extensions.rpg import composed
from model.attention import plain_attention
from model.transformer import Flux, text_then_image
from pipeline import Pipeline
from regional.attention import RegionalAttention, dense_attention, portable_attention
from regional.extension import Branches, Conditioning
from regional.layout import Defaults, Layout, Region
from regional.mask import region_tokens
from regional.sampling import Run, by, modulations, noise_levels, sample
from sampler.flow import image_ids, noise, pack, text_ids, unpack

IMAGE = 16
TEXT = 5
STEPS = 4
DEFAULTS = Defaults(STEPS, TEXT, 64, tiny.FLUX.depth, tiny.FLUX.depth_single_blocks)
REGIONS = (Region(prompt="a", box=(0, 0, 32, 64)), Region(prompt="b", box=(16, 16, 64, 64)))
PLAIN = Layout(prompt="p", width=64, height=64).resolved(DEFAULTS)
LAYOUT = Layout(prompt="p", width=64, height=64, mask_inject_steps=2, regions=REGIONS).resolved(DEFAULTS)
GUIDANCE = torch.tensor([3.5])
IDS = image_ids(64, 64)
TOKENS = region_tokens(LAYOUT)
CONDITIONING = Conditioning(random(1, TEXT, 32), random(3, TEXT, 32, seed=2), random(1, 48, seed=3))


@pytest.fixture(scope="module")
def flux() -> Flux:
    return randomized(Flux(tiny.FLUX))


def latents(flux: Flux, *extensions, layout: Layout = LAYOUT) -> Tensor:
    tokens = TOKENS if layout.regions else None
    return sample(flux, layout, tokens, CONDITIONING, 1, by(portable_attention), extensions)


def euler(flux: Flux, velocity) -> Tensor:
    """A plain run by a velocity (img, timesteps (1,)), written apart from the sampler."""
    levels = noise_levels(PLAIN, flux.params)
    img = pack(noise(64, 64, 1)).double().float()
    for t, t_next in zip(levels, levels[1:]):
        img = img + (t_next - t) * velocity(img.double(), torch.tensor([t])).float()
    return unpack(img, 64, 64)


def plain_velocity(flux: Flux, img: Tensor, t: Tensor, ids: Tensor = IDS) -> Tensor:
    return tiny.velocity(flux, img, ids, CONDITIONING.txt, text_ids(TEXT), t, CONDITIONING.y, GUIDANCE)


def watch(seen: list, what):
    """An extension that only adds what(given, step) of each pass to `seen`."""

    def extend(forward, branches):
        return lambda given, step: (seen.append(what(given, step)), forward(given, step))[1]

    return extend


def difference(x: Tensor, y: Tensor) -> float:
    return (x - y).abs().max().item()


def test_sample_is_short_and_knows_no_extension():
    assert len(inspect.getsource(sample).splitlines()) <= 45 and len(inspect.signature(sample).parameters) <= 9
    names = r"lora|controlnet|ulysses|parallel|attention_map"
    assert not re.search(names, inspect.getsource(inspect.getmodule(sample)).split('"""', 2)[2], re.IGNORECASE)


def test_without_extensions_a_plain_run_is_the_loop_written_out(flux):
    assert torch.equal(latents(flux, layout=PLAIN), euler(flux, lambda img, t: plain_velocity(flux, img, t)))


def heun(velocity, img: Tensor, levels: list[float]) -> Tensor:
    """Heun's method asks for a second velocity in each step, at its end."""
    for step, (t, t_next) in enumerate(zip(levels, levels[1:])):
        first = velocity(img, t, step).float()
        second = velocity(img + (t_next - t) * first, t_next, step).float()
        img = img + (t_next - t) * (first + second) / 2
    return img


@pytest.mark.parametrize("ratio", [None, 0.3], ids=["plain", "regional"])
def test_heun_takes_the_modulation_by_its_timestep(flux, ratio):
    """Against fresh modulation; a timestep that is not known is computed, and the step is as before."""
    tokens, order = TOKENS.sorted()
    known = modulations(flux, LAYOUT, CONDITIONING.y)
    levels = noise_levels(LAYOUT, flux.params)
    assert list(known[0]) == levels[:-1]
    asked = []
    run = Run(flux, LAYOUT, tokens, CONDITIONING, order, known, [watch(asked, lambda _, step: step)])
    txt = CONDITIONING.txt
    more = {}
    velocity = run.velocity(txt, Branches(tokens.image_bits, order, TEXT))
    if ratio:
        ratios = torch.full((IMAGE,), ratio)
        velocity = by(dense_attention)(run, ratios)
        txt = torch.cat([CONDITIONING.regions.flatten(0, 1)[None], txt], dim=1)
        attention = RegionalAttention(dense_attention, tokens.bits(TEXT), TEXT, IMAGE, ratios)
        more = {"attention": attention, "join": attention.join}

    def fresh(img: Tensor, t: float, step: int) -> Tensor:
        given = IDS[:, order], txt, text_ids(txt.shape[1]), torch.tensor([t]), CONDITIONING.y, GUIDANCE
        return tiny.velocity(flux, img.double(), *given, **more)

    img = pack(noise(64, 64, 1))[:, order]
    assert torch.equal(heun(velocity, img, levels), heun(fresh, img, levels))
    assert asked == [step for step in range(STEPS) for _ in range(2)] and list(known[0]) == levels


def recorded(flux: Flux, layout: Layout) -> tuple[list, Tensor]:
    """Each pass of a run, as (its branches, step, what it was given, the velocity), and the latents."""
    passes = []

    def extend(forward, branches):
        def kept(given, step):
            passes.append((branches, step, given, forward(given, step)))
            return passes[-1][-1]

        return kept

    conditioning = CONDITIONING._replace(y=random(4, 48, seed=3)) if layout.method == "rpg" else CONDITIONING
    method = composed if layout.method == "rpg" else by(portable_attention)
    return passes, sample(flux, layout, TOKENS, conditioning, 1, method, [extend])


STAGED = {"steps": 9, "mask_inject_steps": 6, "regions": (replace(REGIONS[0], mask_inject_steps=3), REGIONS[1])}


@pytest.mark.parametrize("method", ["regional", "rpg", "plain"])
def test_both_velocities_of_a_heun_step_are_of_its_kind_and_their_own_level(flux, method, spy):
    """The modulation of both is made before the first step: by then its weights are streamed away."""
    late = spy(Flux, "modulation")
    layout = Layout(prompt="p", width=64, height=64, **STAGED, sampler="heun", method=method).resolved(DEFAULTS)
    passes, _ = recorded(flux, layout)
    assert late == []
    levels = torch.tensor(noise_levels(layout, flux.params)).tolist()
    expected = [(step, t) for step in range(9) for t in levels[step : step + 2] if t > 0]
    many = 4 if method == "rpg" else 1
    split = 2 * layout.regional_steps()
    times = [time for time in expected[:split] for _ in range(many)] + expected[split:]
    assert [(step, given.timesteps.item()) for _, step, given, _ in passes] == times
    plain = passes[-1][0]
    assert all(branches is plain for branches, *_ in passes[split * many :])
    if method == "regional":
        stages = [id(branches) for branches, *_ in passes]
        assert [stages.count(x) for x in dict.fromkeys(stages)] == [6, 6, 5]
    for *_, given, _ in passes:
        fresh = flux.modulation(given.timesteps, given.y, GUIDANCE)
        assert all(torch.equal(x, y) for own, other in zip(given.modulation, fresh) for x, y in zip(own, other))


def test_a_multistep_method_forgets_where_the_kind_of_step_changes(flux):
    """There, as at t = 1 whose log-SNR is infinite, it steps as Euler does."""
    layout = Layout(prompt="p", width=64, height=64, **STAGED, sampler="dpmpp_2m").resolved(DEFAULTS)
    passes, _ = recorded(flux, layout)
    as_euler = []
    for (_, step, given, velocity), (*_, after, _) in zip(passes, passes[1:]):
        end = given.img + (after.timesteps - given.timesteps) * velocity
        if difference(end, after.img) < 1e-5:
            as_euler.append(step)
    assert as_euler == [0, 1, 3, 6]


def true_cfg(flux: Flux, txt: Tensor, y: Tensor, scale: float):
    """From the velocity by a negative prompt, away to that by the prompt."""

    def extend(forward, branches):
        def mixed(given, step):
            other = given._replace(
                txt=txt, txt_ids=text_ids(TEXT), modulation=flux.modulation(given.timesteps, y, given.guidance), y=y,
                attention=plain_attention, join=text_then_image,
            )  # fmt: skip
            return torch.lerp(forward(other, step), forward(given, step), scale)

        return mixed

    return extend


def test_two_velocities_can_be_mixed(flux):
    txt, y = random(1, TEXT, 32, seed=8), random(1, 48, seed=9)

    def velocity(img: Tensor, t: Tensor) -> Tensor:
        negative = tiny.velocity(flux, img, IDS, txt, text_ids(TEXT), t, y, GUIDANCE)
        return negative + 2.5 * (plain_velocity(flux, img, t) - negative)

    cfg = true_cfg(flux, txt, y, 2.5)
    assert difference(latents(flux, cfg, layout=PLAIN), euler(flux, velocity)) < 1e-5
    assert difference(latents(flux, true_cfg(flux, txt, y, 1.0)), latents(flux)) < 1e-5
    assert difference(latents(flux, cfg), latents(flux)) > 1e-2


def in_two_parts(flux: Flux, after: int):
    def extend(forward, branches):
        def parts(given, step):
            seam = given.modulation, given.attention, given.join, given.after_block
            first = flux.blocks(flux.embed(*given[:4]), *seam, last=after)
            return flux.decode(flux.blocks(first, *seam, first=after), given.modulation)

        return parts

    return extend


@pytest.mark.parametrize("after", [0, 1, 2, 3, 5])
def test_a_cache_may_skip_blocks(flux, after):
    """It can run them in part; the first block is enough for most caches."""
    assert torch.equal(latents(flux, in_two_parts(flux, after)), latents(flux))


def references(tokens: Tensor, ids: Tensor):
    """As Kontext: image tokens that are read and not denoised, which every region sees."""
    count = tokens.shape[1]

    def longer(branches: Branches) -> RegionalAttention:
        bits = torch.cat([branches.region_bits, torch.full((count,), -1)])
        ratio = torch.cat([branches.base_ratio, torch.zeros(count)])
        lengths = branches.text_length, len(ratio)
        return RegionalAttention(portable_attention, bits, *lengths, ratio, branches.is_masked)

    def extend(forward, branches):
        def with_references(given, step):
            if branches.base_ratio is not None:
                given = given._replace(attention=longer(branches))
            img, img_ids = torch.cat([given.img, tokens], dim=1), torch.cat([given.img_ids, ids], dim=1)
            return forward(given._replace(img=img, img_ids=img_ids), step)[:, :-count]

        return with_references

    return extend


def test_image_tokens_can_be_appended(flux):
    tokens, ids = random(1, 6, 64, seed=8), image_ids(48, 32) + torch.tensor([1, 0, 0])
    own = references(tokens, ids)

    def velocity(img: Tensor, t: Tensor) -> Tensor:
        both = torch.cat([IDS, ids], dim=1)
        return plain_velocity(flux, torch.cat([img, tokens], dim=1), t, ids=both)[:, :IMAGE]

    assert torch.equal(latents(flux, own, layout=PLAIN), euler(flux, velocity))
    seen = []
    found = latents(flux, watch(seen, lambda given, _: given.img.shape[1]), own)
    assert difference(found, latents(flux)) > 1e-2 and seen == [IMAGE + 6] * STEPS


def joined(layout: Layout) -> tuple[torch.Tensor, torch.Tensor]:
    """The latents of a layout by a model that also reads an image's, and those without regions by an Euler loop."""
    wide = randomized(Flux(dataclasses.replace(tiny.FLUX, in_channels=128)))
    image = pack(random(1, 16, 8, 8, seed=8))
    expected = euler(wide, lambda img, t: plain_velocity(wide, torch.cat([img, image], dim=-1), t))
    return latents(wide, more_channels(image), layout=layout), expected


def test_latents_can_be_joined_by_channel():
    """As FLUX.1-Fill and -Canny."""
    found, expected = joined(PLAIN)
    assert torch.equal(found, expected)


@pytest.mark.published
def test_joined_latents_follow_the_order_of_the_tokens():
    """In a regional run whose base branch has all the weight."""
    only_base = {"base_ratio": 1.0, "mask_inject_steps": STEPS}
    everywhere = replace(LAYOUT, regions=tuple(replace(x, **only_base) for x in LAYOUT.regions), **only_base)
    assert difference(*joined(everywhere)) < 1e-5


def test_the_pages_example_logs_every_blocks_entropy():
    page = Path(__file__).parent.parent / "docs" / "extensions.md"
    example, use = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    assert len([line for line in example.splitlines() if line.strip()]) <= 15
    pipeline = Pipeline("pocket", device="cpu")
    layout = Layout(prompt="a red circle", width=64, height=64, steps=2)
    names = {"torch": torch, "pipeline": pipeline, "layout": layout}
    exec(example + use, names)
    depth, single = pipeline.defaults[-2:]
    blocks = [("double", i) for i in range(depth)] + [("single", i) for i in range(single)]
    assert [entry[:3] for entry in names["log"]] == [(step, *block) for step in range(2) for block in blocks]
    tokens = names["prepared"].conditioning.txt.shape[1] + 16
    assert all(0 < entropy < math.log(tokens) for *_, entropy in names["log"])
    assert torch.equal(names["latents"], pipeline.denoise(names["prepared"], seed=1))
