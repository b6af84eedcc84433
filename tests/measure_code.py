"""Figures of the code: how long it is, how dense, how deep its imports go. The suite asserts some of them.

python tests/measure_code.py            # from the source alone
python tests/measure_code.py --trace    # also which files a starter image enters
"""

import ast
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
CORE = (
    "generate.py",
    "pipeline.py",
    "weights.py",
    "settings.py",
    "errors.py",
    "model",
    "sampler",
    "regional",
)
SKIPPABLE = ("formats", "extensions", "runtime", "tools")
METHOD = (
    "model/attention.py",
    "model/layers.py",
    "model/transformer.py",
    "sampler",
    "regional/mask.py",
    "regional/attention.py",
    "regional/kernel.py",
    "regional/sampling.py",
)
NETWORKS = ("model/", "formats/")  # networks, tokenizers, formats
TRACE = """
import sys
entered = set()
def profile(frame, event, argument):
    if event == "call" and frame.f_code.co_name != "<module>":
        entered.add(frame.f_code.co_filename)
import threading
import generate
threading.setprofile(profile)
sys.setprofile(profile)
code = generate.main(["--layout", "layout.yaml", "--steps", "3", "--overwrite", "--output", sys.argv[1]])
sys.setprofile(None)
print(*sorted(entered), sep="\\n")
sys.exit(code)
"""


def files_in(places: tuple[str, ...]) -> list[Path]:
    """The Python files of these files and folders of the repository, sorted."""
    found = set()
    for place in places:
        path = ROOT / place
        found |= {path} if path.is_file() else set(path.rglob("*.py"))
    return sorted(found)


@cache
def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def lines_in(places: tuple[str, ...]) -> int:
    return sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files_in(places))


def bytes_per_line(places: tuple[str, ...]) -> float:
    """Bytes of a non-blank line, the mean, its indentation and line feed included."""
    lines = [line for file in files_in(places) for line in file.read_bytes().splitlines(keepends=True)]
    lines = [line for line in lines if line.strip()]
    return sum(map(len, lines)) / len(lines)


def parallel_assignments(places: tuple[str, ...]) -> list[str]:
    """Assignments such as `a, b = x, y` with a tuple on both sides that do not only swap."""
    found = []
    for file in files_in(places):
        for node in ast.walk(tree_of(file)):
            if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Tuple):
                continue
            target = node.targets[0]
            if not isinstance(target, ast.Tuple):
                continue
            names = sorted(ast.unparse(element) for element in target.elts)
            if names != sorted(ast.unparse(element) for element in node.value.elts):
                found.append(f"{file.relative_to(ROOT)}:{node.lineno}")
    return found


def functions(places: tuple[str, ...]) -> list[tuple[str, int, int]]:
    """Every function but the GPU's: where it is, its lines, and its parameters without `self`."""
    found = []
    for file in files_in(places):
        for node in ast.walk(tree_of(file)):
            is_function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
            if is_function and "triton.jit" not in map(ast.unparse, node.decorator_list):
                arguments = node.args
                names = [x.arg for x in arguments.posonlyargs + arguments.args + arguments.kwonlyargs]
                count = len([name for name in names if name not in ("self", "cls")])
                name = f"{file.relative_to(ROOT)}:{node.name}"
                found.append((name, node.end_lineno - node.lineno + 1, count))
    return found


def imports_of(file: Path) -> set[Path]:
    """Our own files that a file imports anywhere in it, also late."""
    found = set()
    for node in ast.walk(tree_of(file)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            path = ROOT / f"{name.replace('.', '/')}.py"
            if path.is_file():
                found.add(path)
    return found


def longest_chain(start: Path, seen: tuple[Path, ...] = ()) -> tuple[Path, ...]:
    """The longest chain of imports that begins with a file. ValueError for an import cycle."""
    if start in seen:
        names = " > ".join(str(path.relative_to(ROOT)) for path in (*seen, start))
        raise ValueError(f"an import cycle: {names}")
    chains = [longest_chain(path, (*seen, start)) for path in imports_of(start)]
    return (start, *max(chains, key=len, default=()))


def chain_to_the_method() -> int:
    """Files along generate.py -> pipeline -> regional/sampling.py -> regional/mask.py -> its imports."""
    sampling, mask = ROOT / "regional/sampling.py", ROOT / "regional/mask.py"
    return len(shortest_chain(ROOT / "generate.py", sampling)) + len(shortest_chain(sampling, mask)) - 1


def shortest_chain(start: Path, end: Path) -> list[Path]:
    chains = [[start]]
    seen = {start}
    while chains:
        chain = chains.pop(0)
        if chain[-1] == end:
            return chain
        for path in sorted(imports_of(chain[-1]) - seen):
            seen.add(path)
            chains.append([*chain, path])
    raise ValueError(f"{start} does not import {end}")


def entered_files() -> list[str]:
    """The program's files in which a function runs for the starter image."""
    with tempfile.TemporaryDirectory() as folder:
        return files_entered_by([sys.executable, "-c", TRACE, f"{folder}/image.png"])


def files_entered_by(command: list[str]) -> list[str]:
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    paths = [Path(line) for line in result.stdout.splitlines() if line.endswith(".py")]
    ours = [str(path.relative_to(ROOT)) for path in paths if path.is_relative_to(ROOT)]
    return [path for path in ours if path.startswith(CORE + SKIPPABLE)]


def main() -> None:
    everything = CORE + SKIPPABLE
    print(f"core {lines_in(CORE)} lines, in all {lines_in(everything)}, the method {lines_in(METHOD)}")
    for place in everything:
        print(f"  {place:14} {lines_in((place,)):5}")
    tests = tuple(str(path.relative_to(ROOT)) for path in (ROOT / "tests").glob("*.py"))
    counted = tuple(t for t in tests if t not in ("tests/mutations.py", "tests/test_cuda.py"))
    print(f"tests {lines_in(counted)} lines, {lines_in(counted) / lines_in(everything):.2f} for a line of the program")
    for name, places in ("core", CORE), ("in all", everything):
        parallel = parallel_assignments(places)
        per_line = 1000 * len(parallel) / lines_in(places)
        print(f"{name}: {bytes_per_line(places):.1f} bytes a line, {per_line:.1f} parallel assignments in 1,000 lines")
    long = [f"{name} ({lines} lines, {count} parameters)" for name, lines, count in functions(everything)
            if lines > 80 or count > 9]  # fmt: skip
    print(f"functions over 80 lines or 9 parameters: {', '.join(long) or 'none'}")
    chain = longest_chain(ROOT / "generate.py")
    print(f"longest chain of imports {len(chain)}: {' > '.join(str(p.relative_to(ROOT)) for p in chain)}")
    print(f"generate.py to regional/mask.py: {chain_to_the_method()}")
    if "--trace" in sys.argv:
        entered = entered_files()
        core = [path for path in entered if not path.startswith(NETWORKS)]
        print(
            f"a starter image enters {len(entered)} files, {len(core)} without networks and formats: {', '.join(core)}"
        )


if __name__ == "__main__":
    main()
