"""`pip install .`, offline: the package regional_flux has the program and its model, and takes no other name."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from measure_code import CORE, SKIPPABLE, files_in
from packaging.requirements import Requirement
from PIL import Image
from test_imports import imported

from tools.package import OURS

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
IMPORT_ALL = """
import importlib, pkgutil, sys
import regional_flux
from regional_flux import Layout, Pipeline, Region
modules = pkgutil.walk_packages(regional_flux.__path__, "regional_flux.")
names = {module.name for module in modules}
for name in names:
    importlib.import_module(name)
assert Pipeline is sys.modules["regional_flux.pipeline"].Pipeline
Region(prompt="r"), Layout(prompt="l").resolved
print(*sorted(names))
print(*sorted(name for name in sys.modules if "." not in name))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The folder that pip installed the package to."""
    target = tmp_path_factory.mktemp("installed")
    flags = ["--no-index", "--no-deps", "--quiet", "--disable-pip-version-check", "--target", target]
    before = sorted(path.name for path in ROOT.iterdir())
    subprocess.run([sys.executable, "-m", "pip", "install", *flags, ROOT], check=True, cwd=target)
    assert sorted(path.name for path in ROOT.iterdir()) == before
    return target


def run(installed: Path, folder: Path, *command: str | Path) -> str:
    """What a command prints that finds our modules in the installed package alone."""
    env = os.environ | {"PYTHONPATH": str(installed), "PYTHONSAFEPATH": "1"}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_all_modules_can_be_imported_and_none_by_a_short_name(installed, tmp_path):
    modules, top = run(installed, tmp_path, sys.executable, "-c", IMPORT_ALL).splitlines()
    files = [path.relative_to(ROOT).with_suffix("") for path in files_in(CORE + SKIPPABLE)]
    expected = {f"regional_flux.{'.'.join(path.parts).removesuffix('.__init__')}" for path in files}
    assert set(modules.split()) == expected
    assert not OURS & set(top.split()) and "regional_flux" in top.split()
    folders = {path.name.partition("-")[0] for path in installed.iterdir()}
    assert folders == {"bin", "regional_flux"}


def test_the_command_draws_what_the_checkout_draws(installed, tmp_path, monkeypatch):
    import generate

    monkeypatch.chdir(tmp_path)
    flags = ["--layout", str(ROOT / "layout.yaml"), "--steps", "2", "--device", "cpu", "--output"]
    assert generate.main([*flags, "ours.png"]) == 0
    run(installed, tmp_path, installed / "bin" / "regional-flux", *flags, "theirs.png")
    with Image.open("ours.png") as ours, Image.open("theirs.png") as theirs:
        assert ours.tobytes() == theirs.tobytes()


def test_the_package_has_the_model_and_no_training_or_tests(installed):
    package = installed / "regional_flux"
    assert not any((package / name).exists() for name in ("tests", "benchmarks", "docs", "pocket/train.py"))
    assert sum(path.stat().st_size for path in package.rglob("*") if path.suffix != ".pyc") < 15_000_000


def test_no_import_has_a_short_name(installed):
    """Nor those that run late."""
    files = list((installed / "regional_flux").rglob("*.py"))
    assert not [path for path in files if imported(path) & OURS]
    assert sum("regional_flux" in imported(path) for path in files) > 30


def test_the_package_requires_what_the_tests_run_with():
    """pyproject.toml's ranges hold the versions of requirements.txt, name by name."""
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    tested = [Requirement(line.partition("#")[0]) for line in lines]
    tested = {x.name: x for x in tested if not x.name.startswith("pytest")}
    ranges = {x.name: x for x in map(Requirement, PROJECT["dependencies"])}
    assert tested.keys() == ranges.keys()
    for name, requirement in tested.items():
        version = re.search(r"[\d.]+", str(requirement.specifier))[0]
        assert ranges[name].specifier.contains(version), name
        assert str(ranges[name].marker) == str(requirement.marker)
    assert ranges["torch"].specifier.contains("2.11.0") and not ranges["torch"].specifier.contains("2.14.0")
    assert f"Python {PROJECT['requires-python'].removeprefix('>=')}" in (ROOT / "README.md").read_text(encoding="utf-8")
