"""The build backend of `pip install .`: it makes the package regional_flux, offline.

In the checkout, modules import each other by short names such as `errors`. Installed, these
could clash with other packages', so the package's name is put before them.
"""

import hashlib
import re
import tomllib
from base64 import urlsafe_b64encode
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile, ZipInfo

ROOT = Path(__file__).parents[1]
PACKAGE = "regional_flux"
FOLDERS = ("model", "sampler", "regional", "formats", "extensions", "runtime", "tools")
OURS = {*FOLDERS, *(path.stem for path in ROOT.glob("*.py"))}
INIT = """from regional_flux.pipeline import Pipeline
from regional_flux.regional.layout import Layout, Region
"""
WHEEL = """Wheel-Version: 1.0
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
    """The package's files: the program, the editor's page, and the pocket model."""
    files = {f"{PACKAGE}/__init__.py": INIT}
    places = [ROOT / folder for folder in FOLDERS]
    for path in [*ROOT.glob("*.py"), *(path for place in places for path in place.rglob("*.py"))]:
        text = path.read_text(encoding="utf-8")
        files[f"{PACKAGE}/{path.relative_to(ROOT).as_posix()}"] = with_full_names(text)
    data = [ROOT / "pocket" / "checkpoint", ROOT / "tools" / "editor" / "page"]
    for path in (path for place in data for path in place.rglob("*")):
        if path.is_file() and path.suffix != ".log":
            files[f"{PACKAGE}/{path.relative_to(ROOT).as_posix()}"] = path.read_bytes()
    return files


def with_full_names(text: str) -> str:
    """A module that imports ours from the package."""
    names = "|".join(OURS)
    text = re.sub(rf"(?m)^( *)import (?=({names})$)", rf"\1from {PACKAGE} import ", text)
    return re.sub(rf"(?m)^( *)from (?=({names})\b[\w.]* import )", rf"\1from {PACKAGE}.", text)
