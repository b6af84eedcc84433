"""Imports point one way, late ones too: tools > pipeline > weights, extensions, runtime > formats > model."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OPTIONAL = {"formats", "extensions", "runtime", "tools"}
# What the files of a folder, or one file, may import of ours besides their own folder.
MAY_IMPORT = {
    "errors.py": set(),
    "settings.py": {"errors"},
    "model": {"errors"},
    "sampler": set(),
    "regional": {"errors", "model", "sampler"},
    "formats": {"errors", "model"},
    "weights.py": {"errors", "model", "formats"},
    "extensions": {"errors", "model", "sampler", "regional", "formats"},
    "runtime": {"errors", "model", "regional", "formats", "settings"},
    "pipeline.py": {"errors", "settings", "model", "sampler", "regional", "weights"} | (OPTIONAL - {"tools"}),
    "tools": {"errors", "settings", "model", "regional", "formats", "weights", "extensions"},
    "generate.py": {"errors", "settings", "regional", "pipeline", "formats", "tools"},
}
SINGLE = {place.removesuffix(".py") for place in MAY_IMPORT}
OURS = SINGLE | {"pocket", "benchmarks", "tests"}
NEVER = {"diffusers", "transformers", "peft", "pickle"}
CORE = {place for place in MAY_IMPORT if place not in OPTIONAL}


def imported(file: Path) -> set[str]:
    """The top-level names of all that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are by full names"
            names.add(node.module)
    return {name.split(".")[0] for name in names}


def files_in(place: str) -> list[Path]:
    return [ROOT / place] if place.endswith(".py") else sorted((ROOT / place).rglob("*.py"))


@pytest.mark.parametrize("place", MAY_IMPORT)
def test_imports_point_one_way(place):
    own = {place} if not place.endswith(".py") else set()
    for file in files_in(place):
        names = imported(file)
        assert names & OURS <= MAY_IMPORT[place] | own, file
        assert not names & NEVER, file


def test_every_file_of_the_program_is_in_the_table():
    files = {file for place in MAY_IMPORT for file in files_in(place)}
    assert set(ROOT.glob("*.py")) <= files
    folders = {file.parent.name for file in ROOT.glob("*/*.py")}
    assert folders - {"pocket", "benchmarks", "tests", "docs"} <= set(MAY_IMPORT)


def test_the_core_imports_what_can_be_skipped_in_three_files_alone():
    importing = {}
    for file in (file for place in CORE for file in files_in(place)):
        if found := imported(file) & OPTIONAL:
            importing[file.name] = found
    assert importing.keys() == {"generate.py", "pipeline.py", "weights.py"}
    assert importing["weights.py"] == {"formats"}
    assert importing["pipeline.py"] == {"formats", "extensions", "runtime"}
    assert importing["generate.py"] == {"formats", "tools"}


# What opens or parses files, and the files in which it may: the gate, and those that read or write the program's own.
READERS = {
    "open": {"errors.py", "tools/metadata.py", "tools/jobs.py", "formats/hub.py", "generate.py"},
    "json.loads": {"errors.py", "tools/convert.py", "tools/importers/common.py", "tools/metadata.py"},
    "ElementTree.fromstring": {"tools/importers/svg.py"},
    "json.load": set(),
    "msgspec.json.decode": {"errors.py"},
    "yaml.load": {"errors.py"},
    "yaml.safe_load": set(),
    "Image.open": {"errors.py"},
    "mmap.mmap": {"errors.py"},
    "safe_open": set(),
    "load_file": set(),
    "read_text": {"runtime/offload.py", "tools/package.py"},
    "read_bytes": {"tools/package.py"},
}


def calls_in(file: Path) -> set[str]:
    """The functions and methods that a file calls or passes on, as they are written; of Path's the name."""
    found = set()
    for call in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(call, ast.Call):
            used = [ast.unparse(node) for node in (call.func, *call.args)]
            found |= {
                name.rpartition(".")[2] if name.endswith((".read_text", ".read_bytes")) else name for name in used
            }
    return found


def names_from_the_gate(file: Path) -> set[str]:
    tree = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
    froms = [node for node in tree if isinstance(node, ast.ImportFrom) and node.module == "errors"]
    return {alias.name for node in froms for alias in node.names}


def test_files_come_in_through_the_gate_alone():
    for file in (file for place in MAY_IMPORT for file in files_in(place)):
        name = str(file.relative_to(ROOT))
        readers = calls_in(file) & READERS.keys() - names_from_the_gate(file)
        assert all(name in READERS[reader] for reader in readers), (name, readers)
