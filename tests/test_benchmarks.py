"""Benchmarks go on after a participant that fails: its row says why, and the exit code is 1."""

import importlib.util
import sys

import pytest
import test_speed
import torch

from benchmarks import speed
from benchmarks.failures import Failures, reason

if importlib.util.find_spec("triton"):
    from benchmarks import attention

SMALL = test_speed.SMALL._replace(rounds=2, participants=[speed.OURS, speed.NAIVE])


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
    times, who = speed.compare(SMALL, failures)
    speed.runs_table(who, SMALL, times, failures)
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
    times, who = speed.compare(SMALL, failures)
    assert list(who) == [speed.OURS] and {name for name, _ in times} == {speed.OURS}
    assert speed.goals_of(times, who) == [] and failures.exit_code() == 1
    assert "| naive | it can't be made | failed: RuntimeError" in capsys.readouterr().out


def test_a_call_that_fails_while_it_is_measured_has_no_further_turn():
    calls = []
    second_time = lambda: calls.append(None) or len(calls) == 2 and fail()  # noqa: E731
    found = speed.measured({"good": lambda: None, "bad": second_time}, SMALL._replace(rounds=5))
    assert isinstance(found["bad"], RuntimeError) and found["good"] >= 0 and len(calls) == 2


@torch.inference_mode()
def test_a_gpu_that_fails_for_good_ends_no_other_table(monkeypatch, capsys):
    """Such an error comes when the GPU is waited for, and nobody knows whose it is."""
    monkeypatch.setattr(speed, "turns", fail)
    failures = Failures()
    times, who = speed.compare(SMALL._replace(sizes=[(128, 128), (64, 128)]), failures)
    assert not times and len(who) == 2 and failures.exit_code() == 1
    out = capsys.readouterr().out
    assert "| 128 x 128 | all steps | failed: " in out and "| 64 x 128 | all steps | failed: " in out


@torch.inference_mode()
def test_a_cap_under_which_a_run_fails_has_its_row(monkeypatch, capsys):
    """Also when it is the first, whose time without a cap the others are compared with."""
    monkeypatch.setattr(speed, "CAPPED_RUNS", 1)
    good = speed.pipeline_for

    def pipeline_for(source, setting, how):
        return fail() if how == {"quantize": "none", "offload": "none"} else good(source, setting, how)

    monkeypatch.setattr(speed, "pipeline_for", pipeline_for)
    failures = Failures()
    goals = speed.caps(SMALL, failures)
    out = capsys.readouterr().out
    assert "| bfloat16 | 24 | failed: RuntimeError" in out and "| bfloat16, streamed as needed | 12 | " in out
    assert [goal.name.split(" under")[0] for goal in goals] == ["M3: fp8"] and failures.exit_code() == 1


def test_the_runs_can_be_left_out(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(speed, "GPU", SMALL)
    monkeypatch.setattr(speed, "compare", lambda setting, failures: ({}, {}))
    for flags in [], ["--no-runs"]:
        monkeypatch.setattr(sys, "argv", ["speed.py", *flags])
        assert speed.main() == 0
        assert ("in one piece" in capsys.readouterr().out) == (not flags)


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
