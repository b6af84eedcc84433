"""Imports point one way: generate -> regional, sampler, weights -> model."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "model": {"model"},
    "sampler": {"sampler"},
    "regional": {"regional", "model"},
    "regional/sampling.py": {"regional", "sampler", "model"},
    "regional/memory.py": {"regional", "weights", "model"},
    "regional/pipeline.py": {"regional", "sampler", "weights", "model"},
    "weights.py": {"model"},
    "generate.py": {"regional", "sampler", "weights", "model"},
}
OURS = {"model", "sampler", "regional", "weights", "generate", "pocket", "benchmarks", "tests"}
NEVER = {"diffusers", "transformers", "peft", "pickle"}


def imported(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("place", MAY_IMPORT)
def test_imports_point_one_way(place):
    files = {ROOT / place} if place.endswith(".py") else set((ROOT / place).glob("*.py"))
    files -= {ROOT / other for other in MAY_IMPORT if other != place}
    assert files
    for file in files:
        names = imported(file)
        assert names & OURS <= MAY_IMPORT[place], file
        assert not names & NEVER, file
