"""The benchmark of whole steps: the naive baseline is what it says, and the machinery runs."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import speed
from benchmarks.failures import Failures
from benchmarks.naive import Naive
from model.transformer import Flux, FluxParams
from regional.attention import allowed
from regional.layout import Layout, Region
from regional.mask import region_tokens
from sampler.flow import image_ids, text_ids

TEXT, WIDTH, HEIGHT = 5, 96, 64
IMAGE = WIDTH * HEIGHT // 256
PARAMS = FluxParams(
    vec_in_dim=12, context_in_dim=20, hidden_size=96, mlp_hidden=192, num_heads=3, depth=2, depth_single_blocks=3
)


def layout(*boxes: tuple[int, int, int, int]) -> Layout:
    return Layout(prompt="", width=WIDTH, height=HEIGHT, regions=tuple(Region(prompt="", box=box) for box in boxes))


LAYOUTS = {
    "one box": layout((16, 16, 64, 48)),
    "halves": layout((0, 0, 48, 64), (48, 0, 96, 64)),
    "overlapping": layout((0, 0, 64, 48), (32, 16, 96, 64), (48, 0, 80, 32)),
}
LAYOUT = pytest.mark.parametrize("bits", [region_tokens(x).bits(TEXT) for x in LAYOUTS.values()], ids=LAYOUTS)


@pytest.fixture(scope="module")
def flux() -> Flux:
    torch.manual_seed(0)
    model = Flux(PARAMS).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return model.requires_grad_(False)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def naive(flux: Flux, bits: torch.Tensor, ratio: float, is_masked=lambda block: True) -> Naive:
    mask = allowed(bits[:, None], bits[None, :])
    return Naive(flux, image_ids(WIDTH, HEIGHT), TEXT, mask, ratio, is_masked)


GIVEN = (torch.tensor([0.7]).double(), random(1, 12), torch.tensor([3.5]).double())


# ------------------------------------------------------------------------------------------------ the naive baseline


@LAYOUT
def test_its_late_step_is_plain_flux(flux, bits):
    img, txt = random(1, IMAGE, 64), random(1, TEXT, 20)
    ours = flux(img, image_ids(WIDTH, HEIGHT), txt, text_ids(TEXT), flux.modulation(*GIVEN))
    theirs = naive(flux, bits, 0.3).late_step(img, txt, *GIVEN)
    assert (ours - theirs).abs().max() < 1e-10 * theirs.abs().max()


def test_its_operations_are_those_of_the_published_code():
    """FLUX.1-dev at 1024 x 1024 on the meta device, in 10^12; ours are in test_kernel.py."""
    with torch.device("meta"):
        flux = Flux(FluxParams())
    img, txt, y, one = (torch.empty(shape, device="meta") for shape in ((1, 4096, 64), (1, 512, 4096), (1, 768), (1,)))

    def operations(regions: int, late: bool = False) -> float:
        length = 512 * regions + 4096
        mask = torch.empty(length, length, dtype=torch.bool, device="meta")
        steps = Naive(flux, image_ids(1024, 1024), 512, mask, 0.3)
        with FlopCounterMode(display=False) as counter:
            if late:
                steps.late_step(img, txt, one, y, one)
            else:
                steps.regional_step(img, txt, txt.expand(regions, -1, -1), one, y, one)
        return counter.get_total_flops() / 1e12

    assert operations(4) == pytest.approx(168.4, rel=0.001)
    assert operations(4, late=True) == pytest.approx(105.6, rel=0.001)


# ------------------------------------------------------------------------------------------------ the machinery

SMALL = speed.PROXY._replace(
    params=FluxParams(
        vec_in_dim=48, context_in_dim=64, hidden_size=64, mlp_hidden=256, num_heads=2, depth=2, depth_single_blocks=3
    ),
    text_length=16, sizes=[(128, 128)], rounds=1, participants=[speed.OURS, speed.FP8, speed.NAIVE, speed.DIFFUSERS],
)  # fmt: skip


@pytest.fixture
def uncompiled(monkeypatch):
    monkeypatch.setattr(speed, "compiled", lambda flux: flux)


@torch.inference_mode()
def test_all_participants_compute_the_same(uncompiled):
    """Steps of every kind, and whole runs, on weights that they share; fp8 nearly."""
    who = speed.participants(SMALL, Failures())
    for kind, regions in {"plain": 0, "late": 4, 4: 4}.items():
        given = speed.scene(SMALL, 128, 128, regions)
        steps = {name: step() for name, x in who.items() if (step := x.step(kind, given))}
        runs = {name: latents for name, x in who.items() if (latents := x.run(given)) is not None}
        rivals = {speed.DIFFUSERS} & who.keys() if kind == "plain" else {speed.NAIVE}
        assert steps.keys() == {speed.OURS, speed.FP8} | rivals and runs.keys() == steps.keys() - {speed.DIFFUSERS}
        for outs in (steps, runs):
            for name, out in outs.items():
                error = (out - outs[speed.OURS]).norm() / outs[speed.OURS].norm()
                assert error < (1e-2 if name == speed.FP8 else 1e-5), (name, kind)


def test_what_our_weights_take_on_the_gpu():
    """FLUX.1-dev's, in 10^9 bytes: without the modulation layers, in bfloat16 and in fp8."""
    with torch.device("meta"):
        flux = Flux(FluxParams()).bfloat16()
    assert speed.weight_bytes(flux) / speed.GB == pytest.approx(23.80, abs=0.01)
    assert speed.weight_bytes(flux, all_of_them=False) / speed.GB == pytest.approx(17.35, abs=0.01)
    assert speed.weight_bytes(speed.in_fp8(flux), all_of_them=False) / speed.GB == pytest.approx(8.75, abs=0.01)


@torch.inference_mode()
def test_the_tables_are_printed(uncompiled, capsys):
    failures = Failures()
    times, who = speed.compare(SMALL, failures)
    speed.runs_table(who, SMALL, times, failures)
    speed.report(speed.proxy_goals(times) + speed.goals_of(times, who))
    out = capsys.readouterr().out
    cells = "| regional, 16 | naive |", "| 4 | fp8 |", "| G5: naive / fp8", "naive / ours, R = 16 |"
    assert all(cell in out for cell in cells)
    assert not failures.exit_code()


@torch.inference_mode()
def test_runs_under_caps_go_through_the_pipeline(monkeypatch, capsys):
    monkeypatch.setattr(speed, "CAPPED_RUNS", 1)
    assert speed.report(speed.caps(SMALL, Failures()))
    assert "| bfloat16, streamed as needed | 12 |" in capsys.readouterr().out


def test_a_goal_says_whether_it_is_reached():
    verdicts = [speed.Goal("", value, 1.5, 2.0).row().split("|")[-2].strip() for value in (1.4, 1.5, 2.0)]
    assert verdicts == ["missed", "met", "aim met"]
    assert not speed.report([speed.Goal("", 1.1, 1.05, 1.0, least=False)])
    assert not speed.report([speed.Goal("", float("nan"), float("inf"), 1.1, least=False)])
