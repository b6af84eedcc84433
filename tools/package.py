"""The build backend of `pip install .`: it makes the package regional_flux, offline.

In the checkout, modules import each other by short names such as `errors`. Installed, these
could clash with other packages', so the package's name is put before them.
"""

import ast
import hashlib
import tomllib
from base64 import urlsafe_b64encode
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile, ZipInfo

ROOT = Path(__file__).parents[1]
PACKAGE = "regional_flux"
FOLDERS = ("model", "sampler", "regional", "formats", "extensions", "runtime", "tools")
MODULES = sorted(ROOT.glob("*.py"))
for folder in FOLDERS:
    MODULES += sorted((ROOT / folder).rglob("*.py"))
OURS = {*FOLDERS, *(path.stem for path in MODULES if path.parent == ROOT)}
INIT = """from regional_flux.pipeline import Pipeline
from regional_flux.regional.layout import Layout, Region

__all__ = ["Layout", "Pipeline", "Region"]
"""
WHEEL = """Wheel-Version: 1.0
Generator: regional_flux
Root-Is-Purelib: true
Tag: py3-none-any
"""
METADATA = """Metadata-Version: 2.4
Name: {name}
Version: {version}
Summary: {description}
License-Expression: {license}
License-File: LICENSE
Requires-Python: {requires-python}
"""


def build_wheel(folder: str, settings: Any = None, metadata: Any = None) -> str:
    """Write the wheel into a folder; returns its name. pip calls it, by PEP 517."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needs = [f"Requires-Dist: {requirement}\n" for requirement in project["dependencies"]]
    scripts = [f"{key} = {value}\n" for key, value in project["scripts"].items()]
    name = f"{PACKAGE}-{project['version']}"
    files = package_files() | {
        f"{name}.dist-info/METADATA": METADATA.format(**project) + "".join(needs),
        f"{name}.dist-info/WHEEL": WHEEL,
        f"{name}.dist-info/entry_points.txt": "[console_scripts]\n" + "".join(scripts),
        f"{name}.dist-info/licenses/LICENSE": (ROOT / "LICENSE").read_bytes(),
    }
    record = ""
    file_name = f"{name}-py3-none-any.whl"
    with ZipFile(Path(folder, file_name), "w") as wheel:
        for file, data in files.items():
            data = data.encode() if isinstance(data, str) else data
            digest = urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")
            record += f"{file},sha256={digest},{len(data)}\n"
            wheel.writestr(ZipInfo(file), data, ZIP_DEFLATED)
        wheel.writestr(f"{name}.dist-info/RECORD", f"{record}{name}.dist-info/RECORD,,\n")
    return file_name


def package_files() -> dict[str, str | bytes]:
    """The package's files: the program, and the pocket model."""
    files = {f"{PACKAGE}/__init__.py": INIT}
    for path in MODULES:
        text = path.read_text(encoding="utf-8")
        files[f"{PACKAGE}/{path.relative_to(ROOT).as_posix()}"] = with_full_names(text)
    for path in sorted((ROOT / "pocket" / "checkpoint").rglob("*")):
        if path.is_file() and path.suffix != ".log":
            files[f"{PACKAGE}/{path.relative_to(ROOT).as_posix()}"] = path.read_bytes()
    return files


def with_full_names(text: str) -> str:
    """A module that imports ours, by any statement, from the package."""
    lines = text.splitlines(keepends=True)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom):
            name = node.module
            statement = f"from {PACKAGE}."
        elif isinstance(node, ast.Import):
            name = node.names[0].name
            statement = f"from {PACKAGE} import "
        else:
            continue
        if name.split(".")[0] in OURS:
            line = lines[node.lineno - 1]
            start = node.col_offset
            rest = line[start:].split(maxsplit=1)[1]
            lines[node.lineno - 1] = line[:start] + statement + rest
    return "".join(lines)
