"""Benchmarks: the naive baseline is what it says, the machinery runs, and goes on after a participant
that fails: its row says why, and the exit code is 1."""

import importlib.util

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import redux, speed
from benchmarks.failures import Failures, reason
from benchmarks.naive import Naive
from model.transformer import Flux, FluxParams
from pocket.judge import random_case
from regional.layout import PRESETS
from sampler.flow import image_ids

if importlib.util.find_spec("triton"):
    from benchmarks import attention

SMALL = speed.PROXY._replace(
    params=FluxParams(
        vec_in_dim=48, context_in_dim=64, hidden_size=64, mlp_hidden=256, num_heads=2, depth=2, depth_single_blocks=3
    ),
    text_length=16, sizes=[(128, 128)], rounds=1, participants=[speed.OURS, speed.FP8, speed.NAIVE, speed.DIFFUSERS],
)  # fmt: skip
TWO = SMALL._replace(rounds=2, participants=[speed.OURS, speed.NAIVE])


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


def test_image_prompts_are_measured_by_the_preset(monkeypatch, tmp_path):
    monkeypatch.setattr(redux, "RUN", tmp_path)
    case = random_case(1, redux.REGIONS)
    for name, where in redux.SETTINGS.items():
        layout = redux.layout_of(case, name)
        assert all(getattr(layout, key) == value for key, value in PRESETS["control"].items())
        images = [bool(region.image_prompts) for region in layout.regions]
        assert images == [bool(where and where[0])] * redux.REGIONS
        assert len(layout.image_prompts) == (redux.REGIONS if where and where[1] else 0)


@pytest.mark.published
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


def test_a_goal_says_whether_it_is_reached():
    verdicts = [speed.Goal("", value, 1.5, 2.0).row().split("|")[-2].strip() for value in (1.4, 1.5, 2.0)]
    assert verdicts == ["missed", "met", "aim met"]
    assert not speed.report([speed.Goal("", 1.1, 1.05, 1.0, least=False)])
    assert not speed.report([speed.Goal("", float("nan"), float("inf"), 1.1, least=False)])


def fail(*args, **kwargs):
    raise RuntimeError("no kernel | image\nfor this GPU")


def rows_of(out: str, *cells: str) -> list[str]:
    return [line for line in out.splitlines() if all(f"| {cell} |" in line for cell in cells)]


@torch.inference_mode()
def test_a_step_that_fails_has_its_row_and_the_others_theirs(monkeypatch, capsys):
    """And so have whole runs that fail."""
    step = speed.Naive.step
    monkeypatch.setattr(speed.Naive, "step", lambda *x: fail if x[1] == 16 else step(*x))
    monkeypatch.setattr(speed.Naive, "run", fail)
    assert len(reason(ValueError("x" * 1000))) == 200
    failures = Failures()
    times, who = speed.compare(TWO, failures)
    speed.runs_table(who, TWO, times, failures)
    assert len(speed.proxy_goals(times)) == 2  # without R = 16
    out = capsys.readouterr().out
    assert rows_of(out, "128 x 128", "regional, 16", "naive") == [
        "| 128 x 128 | regional, 16 | naive | failed: RuntimeError: no kernel / image for this GPU |"
    ]
    for kind in "plain", "late", "regional, 4", "regional, 16":
        (row,) = rows_of(out, kind, "ours")
        assert float(row.split("|")[4]) > 0
    assert (speed.NAIVE, 4) in times and (speed.NAIVE, 16) not in times
    assert "failed: RuntimeError" in rows_of(out, "4", "naive")[-1]  # the run in one piece
    assert failures.exit_code() == 1 and len(failures.rows) == 2


@torch.inference_mode()
def test_a_participant_that_cannot_be_made_is_left_out(monkeypatch, capsys):
    monkeypatch.setattr(speed, "Naive", fail)
    failures = Failures()
    times, who = speed.compare(TWO, failures)
    assert list(who) == [speed.OURS] and {name for name, _ in times} == {speed.OURS}
    assert speed.goals_of(times, who) == [] and failures.exit_code() == 1
    assert "| naive | it can't be made | failed: RuntimeError" in capsys.readouterr().out


def test_a_call_that_fails_while_it_is_measured_has_no_further_turn():
    calls = []
    second_time = lambda: calls.append(None) or len(calls) == 2 and fail()  # noqa: E731
    found = speed.measured({"good": lambda: None, "bad": second_time}, TWO._replace(rounds=5))
    assert isinstance(found["bad"], RuntimeError) and found["good"] >= 0 and len(calls) == 2


@torch.inference_mode()
def test_a_gpu_that_fails_for_good_ends_no_other_table(monkeypatch, capsys):
    """Such an error comes when the GPU is waited for, and nobody knows whose it is."""
    monkeypatch.setattr(speed, "turns", fail)
    failures = Failures()
    times, who = speed.compare(TWO._replace(sizes=[(128, 128), (64, 128)]), failures)
    assert not times and len(who) == 2 and failures.exit_code() == 1
    out = capsys.readouterr().out
    assert "| 128 x 128 | all steps | failed: " in out and "| 64 x 128 | all steps | failed: " in out


@torch.inference_mode()
def test_runs_under_caps_go_through_the_pipeline_and_one_that_fails_has_its_row(monkeypatch, capsys):
    """Also when it is the first, whose time without a cap the others are compared with."""
    monkeypatch.setattr(speed, "CAPPED_RUNS", 1)
    assert speed.report(speed.caps(TWO, Failures()))
    assert "| bfloat16, streamed as needed | 12 |" in capsys.readouterr().out
    good = speed.pipeline_for

    def pipeline_for(source, setting, how):
        return fail() if how == {"quantize": "none", "offload": "none"} else good(source, setting, how)

    monkeypatch.setattr(speed, "pipeline_for", pipeline_for)
    failures = Failures()
    goals = speed.caps(TWO, failures)
    out = capsys.readouterr().out
    assert "| bfloat16 | 24 | failed: RuntimeError" in out and "| bfloat16, streamed as needed | 12 | " in out
    assert [goal.name.split(" under")[0] for goal in goals] == ["M3: fp8"] and failures.exit_code() == 1


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="there is no Triton here")
@torch.inference_mode()
def test_an_attention_that_fails_or_disagrees_has_its_row(monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    makers = {
        "raises": lambda tokens: fail,
        "wrong": lambda tokens: lambda q, k, v: torch.zeros_like(q),
        "can't be made": fail,
        attention.PORTABLE: attention.portable_attention,
    }
    monkeypatch.setattr(attention, "participants", lambda setting: makers)
    assert attention.run(attention.CPU._replace(sizes=[(128, 128)], calls=1, repeats=2)) == 1
    out = capsys.readouterr().out
    table = out.split("Four quadrants at")[0]
    says = {"raises": "no kernel", "wrong": "relative error of wrong is 1.0e+00", "can't be made": "no"}
    for name in (*says, attention.PORTABLE, attention.CEILING):
        rows = rows_of(table, name)
        assert len(rows) == 5
        for row in rows:
            if name in says:
                assert "failed: " in row and says[name] in row
            else:
                assert float(row.split("|")[4]) > 0
    assert "times plain attention" in out and "QK-RMSNorm and RoPE" in out
    attention.report({attention.KERNEL: 400.0, attention.CEILING: 600.0}, {})  # of those that did not fail
    assert "| useful TFLOP/s over the library's unmasked | 0.67 | 0.6 | 0.75 |" in capsys.readouterr().out
