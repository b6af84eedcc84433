"""Imports point one way: generate -> tools -> pipeline -> extensions, runtime -> weights -> formats, model."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "errors.py": set(),
    "model": {"model", "errors"},
    "sampler": {"sampler"},
    "formats": {"formats", "errors", "model"},
    "regional": {"regional", "model", "errors"},
    "regional/sampling.py": {"regional", "sampler", "model"},
    "settings.py": {"errors"},
    "weights.py": {"formats", "model", "errors"},
    "extensions": {"extensions", "weights", "regional", "sampler", "model", "formats", "errors"},
    "runtime": {"runtime", "weights", "regional", "model", "formats", "errors"},
    "prompts.py": {"extensions", "runtime", "weights", "regional", "model", "formats", "errors"},
    "pipeline.py": {
        "prompts",
        "settings",
        "extensions",
        "runtime",
        "weights",
        "regional",
        "sampler",
        "model",
        "formats",
        "errors",
    },
    "tools": {"tools", "settings", "weights", "regional", "model", "formats", "errors"},
    "generate.py": {"tools", "pipeline", "settings", "extensions", "regional", "formats", "errors"},
}
OURS = {
    "model", "sampler", "regional", "formats", "extensions", "runtime", "tools", "weights", "pipeline", "prompts",
    "settings", "errors",
    "generate", "pocket", "benchmarks", "tests",
}  # fmt: skip
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
