"""The code runs on torch 2.11 to 2.13 and Triton from 3.6: it calls nothing of theirs that the
oldest ones lack.

GPU machines have the version that suits their driver, and one name that is missing there ends every
run. The names come from the wheels, see fixtures/torch_2.11_names.txt. Methods of tensors and of
other objects are not looked up.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TRAINING_AND_TESTS = ("pocket", "tests")  # which are not for GPU machines
FILES = [file for file in [*ROOT.glob("*.py"), *ROOT.glob("[a-z]*/*.py")] if file.parent.name not in TRAINING_AND_TESTS]
NAMES = {}  # by module
for line in (Path(__file__).parent / "fixtures" / "torch_2.11_names.txt").read_text().splitlines():
    if line.startswith("["):
        module = NAMES.setdefault(line.strip("[]"), set())
    elif line and not line.startswith("#"):
        module.update(line.split())


def paths(source: str) -> Iterator[str]:
    """The dotted path of each name that Python code imports, or takes from what it has imported; not
    of those of torch that it asks for by `if hasattr(torch.x, "y")`."""
    nodes = list(ast.walk(ast.parse(source)))
    aliases = {}
    for node in nodes:
        for alias in node.names if isinstance(node, (ast.Import, ast.ImportFrom)) else ():
            name = f"{node.module}.{alias.name}" if isinstance(node, ast.ImportFrom) else alias.name
            yield name
            has_own_name = alias.asname or isinstance(node, ast.ImportFrom)
            first = alias.name.partition(".")[0]
            aliases[alias.asname or first] = name if has_own_name else first

    def path_of(node: ast.AST) -> str:
        first, *rest = re.match(r"[\w.]*", ast.unparse(node))[0].split(".")
        return ".".join([aliases.get(first, "of no import"), *rest])

    calls = [node for node in nodes if isinstance(node, ast.Call) and ast.unparse(node.func) == "hasattr"]
    asked_for = {f"{path_of(call.args[0])}.{ast.unparse(call.args[1])[1:-1]}" for call in calls}
    yield from {path_of(node) for node in nodes if isinstance(node, ast.Attribute)} - asked_for


def missing(source: str) -> list[str]:
    """The paths in Python code that torch 2.11 and Triton 3.6 don't have."""
    found = set()
    for path in paths(source):
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
EXAMPLES = {  # code -> what the oldest version lacks of it
    "import torch as t\nx = t.cuda.caching_allocator_disabled": "torch.cuda.caching_allocator_disabled",
    "def f():\n    from torch.nn.functional import linear_cross_entropy": NEWER,
    "import torch.nn.functional as F\nF.linear_cross_entropy(1).sum()": NEWER,
    "from torch import nn\nnn.LinearCrossEntropyLoss()": "torch.nn.LinearCrossEntropyLoss",
    "import triton.language as tl\ntl.atomic_poll": "triton.language.atomic_poll",
    "import torch.accelerator.graphs": "torch.accelerator.graphs",
    "import torch\nx = torch.cuda.Event(enable_timing=True).elapsed\ntorch.__version__": "",
    f"{ASKED}graphs()": "",
    f"{ASKED}Graph()": "torch.accelerator.Graph",
    "import torch.distributed as dist\ndist.all_to_all_single\nother.accelerator.empty_host_cache": "",
}


@pytest.mark.parametrize("source", EXAMPLES)
def test_what_the_oldest_version_lacks_is_found(source):
    assert missing(source) == EXAMPLES[source].split()


def test_the_check_sees_the_code():
    """It would pass, too, if it found no name at all."""
    used = {path for file in FILES for path in paths(file.read_text())}
    assert {"torch.nn.functional.scaled_mm", "torch.cuda.Stream", "triton.language.dot"} <= used
