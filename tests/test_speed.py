"""The benchmark of whole steps: the naive baseline is what it says, and the machinery runs."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import speed
from benchmarks.failures import Failures
from benchmarks.naive import Naive
from model.transformer import Flux, FluxParams
from sampler.flow import image_ids


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


SMALL = speed.PROXY._replace(
    params=FluxParams(
        vec_in_dim=48, context_in_dim=64, hidden_size=64, mlp_hidden=256, num_heads=2, depth=2, depth_single_blocks=3
    ),
    text_length=16, sizes=[(128, 128)], rounds=1, participants=[speed.OURS, speed.FP8, speed.NAIVE, speed.DIFFUSERS],
)  # fmt: skip


@torch.inference_mode()
def test_all_participants_compute_the_same_and_have_their_rows(monkeypatch, capsys):
    """Steps of every kind, and whole runs, on weights that they share; fp8 nearly."""
    monkeypatch.setattr(speed, "compiled", lambda flux: flux)
    failures = Failures()
    times, who = speed.compare(SMALL, failures)
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
    speed.runs_table(who, SMALL, times, failures)
    speed.report(speed.proxy_goals(times) + speed.goals_of(times, who))
    out = capsys.readouterr().out
    cells = "| regional, 16 | naive |", "| 4 | fp8 |", "| G5: naive / fp8", "naive / ours, R = 16 |"
    assert all(cell in out for cell in cells)
    assert not failures.exit_code()


def test_what_our_weights_take_on_the_gpu():
    """FLUX.1-dev's, in 10^9 bytes: without the modulation layers, in bfloat16 and in fp8."""
    with torch.device("meta"):
        flux = Flux(FluxParams()).bfloat16()
    sizes = [speed.weight_bytes(flux), speed.weight_bytes(flux, all_of_them=False)]
    sizes.append(speed.weight_bytes(speed.in_fp8(flux), all_of_them=False))
    assert [size / speed.GB for size in sizes] == pytest.approx([23.80, 17.35, 8.75], abs=0.01)


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
