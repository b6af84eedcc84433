"""Fixtures that several files use, and how the kernel's tests run."""

import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

# small tensors: threads would only wait for each other, and long if something else runs here
os.environ.setdefault("OMP_NUM_THREADS", "1")
CACHE = tempfile.TemporaryDirectory()  # not the user's, also of the processes that tests start
os.environ["XDG_CACHE_HOME"] = CACHE.name

import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton, which some parts of torch do
collect_ignore = [] if importlib.util.find_spec("triton") else ["test_kernel.py"]  # there is none outside Linux

FIXTURES = Path(__file__).parent / "fixtures"
GOLDEN = FIXTURES / "golden"
WORKER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")


@pytest.fixture(scope="session")
def golden(tmp_path_factory) -> Path:
    """A folder with the golden cases and, made afresh (the same bits everywhere), the small checkpoints they need."""
    root = tmp_path_factory.mktemp("golden")
    shutil.copytree(GOLDEN, root, dirs_exist_ok=True)
    for name, folder in (("clip", "tokenizer"), ("t5", "tokenizer_2")):
        shutil.copytree(FIXTURES / "tokenizers" / name, root / "tokenizers" / folder)
    spec = importlib.util.spec_from_file_location("make_checkpoint", root / "make_checkpoint.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.write_all(root / "models")
    return root


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Attacks run only if -m names them, whatever else it asks for."""
    if "attack" not in config.option.markexpr:
        config.hook.pytest_deselected(items=[x for x in items if x.get_closest_marker("attack")])
        items[:] = [x for x in items if not x.get_closest_marker("attack")]


class Ran(NamedTuple):
    """What a run of generate.py gave: its exit code, the images it printed, the lines of stderr."""

    code: int
    made: list[str]
    errors: list[str]


@pytest.fixture
def model(golden) -> str:
    return str(golden / "models" / "flux-tiny-dev")


@pytest.fixture
def run(model, tmp_path, monkeypatch, capsys) -> Callable[..., Ran]:
    """run(*flags) runs generate.py in tmp_path, on a tiny random FLUX unless model is None."""
    import generate

    monkeypatch.chdir(tmp_path)
    for name in WORKER_VARIABLES:
        monkeypatch.delenv(name, raising=False)

    def run(*flags: str | int | Path, model: str | Path | None = model) -> Ran:
        capsys.readouterr()
        named = ["--model", str(model)] if model else []
        code = generate.main([*map(str, flags), *named, "--device", "cpu"])
        out, errors = capsys.readouterr()
        assert "Traceback" not in errors
        return Ran(code, out.split(), errors.splitlines())

    return run


@pytest.fixture
def spy(monkeypatch) -> Callable[[object, str], list[tuple]]:
    """spy(owner, name): the arguments of each call of owner.name from now on."""

    def spy(owner: object, name: str) -> list[tuple]:
        calls = []
        called = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *x, **more: calls.append(x) or called(*x, **more))
        return calls

    return spy
