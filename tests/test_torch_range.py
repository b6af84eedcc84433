"""The code runs on torch 2.11 to 2.13 and Triton from 3.6: it calls nothing of theirs that the
oldest ones lack.

GPU machines have the version that suits their driver, and one name that is missing there ends every
run. The names come from the wheels, see fixtures/torch_2.11_names.txt. Methods of tensors and of
other objects are not looked up.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TRAINING_AND_TESTS = ("pocket", "tests")  # which are not for GPU machines
FILES = [file for file in [*ROOT.glob("*.py"), *ROOT.glob("[a-z]*/*.py")] if file.parent.name not in TRAINING_AND_TESTS]
FIXTURE = Path(__file__).parent / "fixtures" / "torch_2.11_names.txt"


def read_names() -> dict[str, set[str]]:
    """The names of each module."""
    names = {}
    for line in FIXTURE.read_text().splitlines():
        if line.startswith("["):
            module = names.setdefault(line.strip("[]"), set())
        elif line and not line.startswith("#"):
            module.update(line.split())
    return names


NAMES = read_names()


def imported(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Each import of torch and Triton as (the local name, the dotted path that it stands for)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                first = alias.name.partition(".")[0]
                yield (alias.asname, alias.name) if alias.asname else (first, first)
                yield "", alias.name  # the module has to be there, whatever name it gets
        elif isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names:
                yield alias.asname or alias.name, f"{node.module}.{alias.name}"


def path_of(node: ast.AST, aliases: dict[str, str]) -> str | None:
    """The dotted path of a name, or of a chain of attributes, through the imports."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name) or node.id not in aliases:
        return None
    return ".".join([aliases[node.id], *reversed(parts)])


def chains(tree: ast.Module) -> Iterator[str]:
    """The dotted path of each name of torch or Triton that the code uses; not of those that it asks
    for by `if hasattr(torch.x, "y")`."""
    aliases = dict(imported(tree))
    yield from (path for _, path in imported(tree))
    asked_for = set()
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Name("hasattr"), args=[owner, ast.Constant(str(name))]):
                asked_for.add(f"{path_of(owner, aliases)}.{name}")
    for node in ast.walk(tree):
        path = path_of(node, aliases) if isinstance(node, ast.Attribute) else None
        if path and path not in asked_for:
            yield path


def missing(source: str) -> list[str]:
    """The paths in Python code that torch 2.11 and Triton 3.6 don't have."""
    found = set()
    for path in chains(ast.parse(source)):
        module, *rest = path.split(".")
        for name in rest if module in NAMES else ():
            if f"{module}.{name}" in NAMES:
                module = f"{module}.{name}"
                continue
            if name not in NAMES[module] and not name.startswith("__"):
                found.add(f"{module}.{name}")
            break  # of a class, or of a module that isn't listed
    return sorted(found)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_name_of_torch_is_in_the_oldest_version(file):
    assert missing(file.read_text()) == []


NEWER = "torch.nn.functional.linear_cross_entropy"
ASKED = "import torch\nif hasattr(torch.accelerator, 'graphs'):\n    torch.accelerator."
DISTRIBUTED = "import torch.distributed as dist\ndist.all_to_all_single\n"
EXAMPLES = {  # code -> what the oldest version lacks of it
    "import torch\ntorch.accelerator.empty_host_cache()": "torch.accelerator.empty_host_cache",
    "import torch as t\nx = t.cuda.caching_allocator_disabled": "torch.cuda.caching_allocator_disabled",
    "def f():\n    from torch.nn.functional import linear_cross_entropy": NEWER,
    "import torch.nn.functional as F\nF.linear_cross_entropy(1).sum()": NEWER,
    "from torch import nn\nnn.LinearCrossEntropyLoss()": "torch.nn.LinearCrossEntropyLoss",
    "import triton.language as tl\ntl.atomic_poll": "triton.language.atomic_poll",
    "import torch.accelerator.graphs": "torch.accelerator.graphs",
    "import torch\nx = torch.cuda.Event(enable_timing=True).elapsed\ntorch.__version__": "",
    f"{ASKED}graphs()": "",
    f"{ASKED}Graph()": "torch.accelerator.Graph",
    f"{DISTRIBUTED}other.accelerator.empty_host_cache": "",
}


@pytest.mark.parametrize("source", EXAMPLES)
def test_what_the_oldest_version_lacks_is_found(source):
    assert missing(source) == EXAMPLES[source].split()


def test_the_check_sees_the_code():
    """It would pass, too, if it found no name at all."""
    assert len(FILES) > 40
    used = {path for file in FILES for path in chains(ast.parse(file.read_text()))}
    assert {"torch.nn.functional.scaled_mm", "torch.cuda.Stream", "triton.language.dot"} <= used
