"""The layout file: YAML in, a checked Layout out."""

import difflib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fractions import Fraction
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, NoReturn, get_args, get_type_hints

import msgspec
import numpy as np
import yaml
from msgspec import Meta
from msgspec.structs import replace

from errors import MISSING, InputError, InputErrors, check_file, describe
from regional.images import read_color, read_image, read_mask, readable
from regional.layout import BLOCKS, HEX, PERCENT, PRESETS, SHAPES, Control, Layout, Part, Position, Region

MAX_BYTES = 1_000_000  # of a layout file; YAML takes up to 12 s and 280 MB for so many
MAX_NUMBER = 100  # characters of a number in it; a file full of 1:1:1:1... would take hours

REPOSITORY = r"\w[\w.-]*/\w[\w.-]*(:.+)?"  # org/name, or one of its files
Points = Annotated[tuple[tuple[Position, Position], ...], Meta(min_length=3)]
# the flags of a ControlNet's keys
CONTROL_FLAGS = {key: f"control_{key}" for key in ("image", "mode", "scale", "start", "end")}
CONTROL_FLAGS |= {"model": "controlnet", "preprocess": "preprocess"}


@contextmanager
def naming(file: Path | None, overrides: dict[str, Any]) -> Iterator[None]:
    """Within it, InputErrors about a layout's keys get the name of its file, or of the flag that a
    key comes from."""
    try:
        yield
    except InputError as error:
        for mistake in getattr(error, "errors", [error]):
            if flag := flag_of(str(mistake.key), overrides):
                mistake.key = flag
                mistake.source = "the command line"
        raise error.within(file or "the command line") from None


def flag_of(key: str, overrides: dict[str, Any]) -> str | None:
    root, entry, field, rest = re.match(r"(?s)(\w*)(\[\d+\])?\.?(\w*)(.*)", key).groups()
    if root not in overrides or entry and root not in ("loras", "controlnets"):
        return None
    flag = {"loras": "lora", "controlnets": CONTROL_FLAGS.get(field, "controlnet")}.get(root, root)
    return f"--{flag.replace('_', '-')}{rest}"


def read_layout(file: Path | None, overrides: dict[str, Any], size: int = 1024, metadata: dict | None = None) -> Layout:
    """Read a layout. Paths in it come out absolute or relative to the working directory.

    overrides: keys from the command line, which take precedence. size: width and height where
    neither gives them. metadata: those of the image `file`, in place of a layout file's keys.

    Raises InputError, or InputErrors for several mistakes: one sentence each that names the file,
    the key and the value.
    """
    with naming(file, overrides):
        if metadata is None:
            data = read_yaml(file) if file else {}
            folder = file.parent if file else Path()
        else:
            known = fields_of(Layout)
            data = {key: value for key, value in metadata.items() if key in known}
            folder = Path()  # metadata hold paths from the working directory
        if isinstance(data, dict):
            data |= overrides
            data.setdefault("width", size)
            data.setdefault("height", size)
        mistakes = InputErrors()
        with mistakes:
            check_types(data, Layout, "", mistakes)
        mistakes.raise_any()
        layout = msgspec.convert(data, Layout)
        preset = PRESETS[layout.preset](len(layout.regions))
        layout = replace(layout, **{key: preset[key] for key in preset.keys() - data.keys()})
        layout = checked(layout, folder, overrides, mistakes)
        mistakes.raise_any()
        return layout


# ------------------------------------------------------------------------------------------- YAML

TAG = "tag:yaml.org,2002:"
TYPES = {TAG + name for name in ("str", "int", "float", "bool", "null", "merge")}


class Loader(yaml.SafeLoader):
    """YAML with the values of JSON: no tags, no key written twice, of bounded size."""

    def __init__(self, text: str):
        super().__init__(text)
        self.sizes: dict[yaml.Node, int] = {}  # how much text each stands for, aliases written out

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        event = self.peek_event()
        if tag := getattr(event, "tag", None):
            refuse(event, f"{describe(tag)}: tags are not supported")
        node = super().compose_node(parent, index)
        if isinstance(event, yaml.AliasEvent):
            return node if node in self.sizes else refuse(event, "a value that holds itself")
        parts = []
        if isinstance(node, yaml.ScalarNode):
            check_scalar(node)
        elif isinstance(node, yaml.MappingNode):
            check_keys([key for key, _ in node.value])
            parts = [part for pair in node.value for part in pair]
        else:
            parts = node.value
        size = 1 + len(node.value) + sum(self.sizes[part] for part in parts)
        if size > 2 * MAX_BYTES:
            refuse(node, "too much text, with each alias counted as what it stands for")
        self.sizes[node] = size
        return node


def check_scalar(node: yaml.ScalarNode) -> None:
    if node.tag not in TYPES:
        kind = describe(node.tag.removeprefix(TAG))
        refuse(node, f"{kind} is not a type of a layout's values; write text in quotes")
    if len(node.value) > MAX_NUMBER and node.tag != TAG + "str":
        refuse(node, f"a number of more than {MAX_NUMBER} characters")
    pairs = node.value.encode("utf-16", "surrogatepass")  # as JSON writes an emoji
    node.value = pairs.decode("utf-16", "surrogatepass")


def check_keys(keys: list[yaml.Node]) -> None:
    seen = set()
    for key in keys:
        is_word = key.tag == TAG + "str" and re.fullmatch(r"[\w .-]{1,60}", key.value)
        if not is_word and key.tag != TAG + "merge":
            name = describe(key.value) if isinstance(key, yaml.ScalarNode) else "that is a list"
            refuse(key, f"invalid key {name}")
        if key.value in seen:  # YAML would take the last
            refuse(key, f"the key {key.value} is written twice")
        seen.add(key.value)


def refuse(part: yaml.Node | yaml.Event, problem: str) -> NoReturn:
    raise yaml.MarkedYAMLError(problem=problem, problem_mark=part.start_mark)


def read_yaml(file: Path) -> Any:
    try:
        check_file(file, MAX_BYTES)
        return yaml.load(file.read_text(encoding="utf-8"), Loader)
    except FileNotFoundError:
        problem = "there is no such layout file"
    except (OSError, UnicodeDecodeError) as error:
        problem = f"cannot be read as a text file ({error})"
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        problem = place + (getattr(error, "problem", None) or str(error))
        if "'\\t'" in problem:
            problem = f"{place}a tab is used for indentation, YAML wants spaces"
    except (LookupError, ValueError, RecursionError) as error:  # such as 0x_ or [[[[...
        problem = f"a value that YAML can't read ({error})"
    raise InputError(file, MISSING, problem)


# ------------------------------------------------------------------------------------------ types


@cache
def fields_of(struct: type[Part]) -> dict[str, tuple[Any, type[Part] | None]]:
    """Each key's type, and for lists of parts that of an entry."""
    found = {}
    for name, kind in get_type_hints(struct, include_extras=True).items():
        entry = next(iter(get_args(get_args(kind)[0])), None)
        is_part = isinstance(entry, type) and issubclass(entry, Part)
        found[name] = (Annotated[list, *kind.__metadata__], entry) if is_part else (kind, None)
    return found


def check_types(data: Any, struct: type[Part], path: str, mistakes: InputErrors) -> None:
    """Check the keys of a mapping one by one, for msgspec stops at its first mistake."""
    if not isinstance(data, dict):
        key = path.removesuffix(".") or "the layout"
        raise InputError(key, data, "expected a mapping of keys to values")
    for field in msgspec.structs.fields(struct):
        with mistakes:
            if field.required and field.name not in data:
                raise InputError(path + field.name, MISSING, "missing")
    for key, value in data.items():
        with mistakes:
            entry = check_type(value, struct, key, path)
            for i, part in enumerate(value if entry else ()):
                with mistakes:
                    check_types(part, entry, f"{path}{key}[{i}].", mistakes)


def check_type(value: Any, struct: type[Part], key: str, path: str) -> type[Part] | None:
    """InputError for a value not of its key's type; returns the type of its entries, if it has."""
    known = fields_of(struct)
    if key not in known:
        close = difflib.get_close_matches(key, known, 1)
        hint = f"did you mean {close[0]}" if close else f"known keys are {', '.join(known)}"
        raise InputError(path + key, value, f"no such key, {hint}")
    kind, entry = known[key]
    try:
        if isinstance(value, str):
            value.encode()
        msgspec.convert(value, kind)
        return entry
    except UnicodeEncodeError:
        raise InputError(path + key, value, "invalid Unicode (unpaired surrogate)") from None
    except msgspec.ValidationError as error:
        problem, _, inner = str(error).partition(" - at `$")
    inner = inner.removesuffix("`")
    value = value_at(value, inner)
    meaning = kind.__metadata__[-1].description
    options = [part for part in get_args(get_args(kind)[0]) if isinstance(part, str)]
    if "regex" in problem or problem.startswith("Invalid enum"):
        problem = f"expected {', '.join(options) or meaning}"
    else:
        problem = f"{problem[0].lower()}{problem[1:].replace('`', '')} ({meaning})"
    if "expected str" in problem and isinstance(value, (bool, int, float)):
        problem += "; write it in quotes"
    raise InputError(path + key + inner, value, problem)


def value_at(data: Any, path: str) -> Any:
    """The value at a path such as regions[1].box."""
    for key, index in re.findall(r"([^.\[\]]+)|\[(\d+)\]", path):
        data = data[int(index)] if index else data[key]
    return data


# ---------------------------------------------------------------------------- what types can't say


def checked(layout: Layout, folder: Path, overrides: dict, mistakes: InputErrors) -> Layout:
    """The layout with paths from the working directory and shapes in pixels."""
    if layout.map is not None:
        layout = replace(layout, map=str(folder / layout.map))
        with mistakes:
            readable(read_image, layout.map, "map")
    for key in ("width", "height"):
        with mistakes:
            value = getattr(layout, key)
            low = value // 16 * 16
            if value != low:
                problem = f"not a multiple of 16, the nearest are {low} and {low + 16}"
                raise InputError(key, value, problem)
    for key in ("double_blocks", "single_blocks"):
        with mistakes:
            blocks = getattr(layout, key)
            if isinstance(blocks, str) and not re.search(BLOCKS, blocks):
                problem = 'expected "every 2", "0-18", "0-4, 8" or a list of indices'
                raise InputError(key, blocks, problem)
    found = {}
    for name, check in CHECKS.items():
        found[name] = []
        beside = Path() if name in overrides else folder
        for i, part in enumerate(getattr(layout, name)):
            with mistakes:
                found[name].append(check(part, layout, beside, f"{name}[{i}]"))
    return replace(layout, **{name: tuple(parts) for name, parts in found.items()})


def checked_lora(lora: Any, layout: Layout, folder: Path, path: str) -> Any:
    lora = replace(lora, file=located(folder, lora.file))
    if getattr(lora, "image", None) is not None:
        lora = replace(lora, image=str(folder / lora.image))
        readable(read_image, lora.image, f"{path}.image")
    return lora


def checked_control(control: Control, layout: Layout, folder: Path, path: str) -> Control:
    if control.start >= control.end:
        problem = f"not before its end, {control.end:g}"
        raise InputError(f"{path}.start", control.start, problem)
    if control.region is not None and control.region >= len(layout.regions):
        problem = f"the layout has {len(layout.regions)} regions, counted from 0"
        raise InputError(f"{path}.region", control.region, problem)
    image = str(folder / control.image)
    readable(read_image, image, f"{path}.image")
    return replace(control, model=located(folder, control.model), image=image)


def located(folder: Path, name: str) -> str:
    """A file or folder by its path from the layout's folder; a repository of the hub as it is."""
    path = folder / name
    if os.path.exists(path):  # False also for names that no file can have
        if not path.is_file() and not path.is_dir():
            raise InputError(path, MISSING, "neither a file nor a folder")
        return str(path)
    if re.fullmatch(REPOSITORY, name):
        return name
    return f"./{path}" if re.fullmatch(REPOSITORY, str(path)) else str(path)  # no repository


def checked_region(region: Region, layout: Layout, folder: Path, path: str) -> Region:
    loras = tuple(checked_lora(lora, layout, folder, path) for lora in region.loras)
    shapes = [key for key in SHAPES if getattr(region, key) is not None]
    if len(shapes) != 1:
        has = " and ".join(shapes) or "no shape"
        problem = f"{has}, a region needs exactly one of {', '.join(SHAPES)}"
        raise InputError(path, MISSING, problem)
    (kind,) = shapes
    shape = getattr(region, kind)
    key = f"{path}.{kind}"
    if kind == "mask":
        shape = str(folder / shape)
        inside = readable(read_mask, shape, key)
        check_mask(inside, layout, key, Path(shape), "nothing in it is white, no pixel reaches 128")
    elif kind == "color":
        check_color(shape, layout, key)
    else:
        shape = (box_in_pixels if kind == "box" else polygons_in_pixels)(shape, layout, key)
    return replace(region, loras=loras, **{kind: shape})


def box_in_pixels(box: tuple, layout: Layout, key: str) -> tuple[float, ...]:
    sides = (layout.width, layout.height) * 2
    edges = [pixels(value, side, f"{key}[{i}]") for i, (value, side) in enumerate(zip(box, sides))]
    for axis, low, high in zip("xy", edges, edges[2:]):
        if low >= high:
            problem = f"the box is empty, {axis}0 must be smaller than {axis}1"
            raise InputError(key, list(box), problem)
    return tuple(edges)


def polygons_in_pixels(polygon: tuple, layout: Layout, key: str) -> tuple:
    """A list of points, or several of them, as a list of lists of points."""
    for kind in (Points, tuple[Points, ...]):
        with suppress(msgspec.ValidationError, UnicodeEncodeError):
            polygons = msgspec.convert(polygon, kind)
            break
    else:
        problem = "expected at least three points [x, y], or lists of them"
        raise InputError(key, list(polygon), problem)
    sides = (layout.width, layout.height)
    return tuple(
        tuple(
            tuple(pixels(value, side, f"{key}[{i}]") for value, side in zip(point, sides))
            for i, point in enumerate(points)
        )
        for points in ([polygons] if kind is Points else polygons)
    )


def pixels(value: float | str, side: int, key: str) -> float:
    """A position in pixels, from pixels or a percentage of the side."""
    place = value
    if isinstance(value, str):
        if not re.fullmatch(PERCENT, value):
            raise InputError(key, value, "expected pixels, or a percentage such as 25%")
        place = Fraction(value[:-1]) * side / 100
    if not 0 <= place <= side:
        raise InputError(key, value, f"outside the image, expected 0 to {side} pixels")
    return float(place)


def check_color(color: Any, layout: Layout, key: str) -> None:
    value = list(color) if isinstance(color, tuple) else color
    if layout.map is None:
        raise InputError(key, color, "a color needs the layout's map, an image, and there is none")
    is_hex = isinstance(color, str) and re.search(HEX, color)
    is_index = isinstance(color, int) and 0 <= color < 2**24
    is_rgb = isinstance(color, tuple) and all(0 <= value <= 255 for value in color)
    if not (is_hex or is_index or is_rgb):
        raise InputError(key, value, 'expected "#rrggbb", [r, g, b] from 0 to 255, or an index')
    inside = readable(partial(read_color, color=color), layout.map, key)
    check_mask(inside, layout, key, value, "nothing in the map is of this color")


def check_mask(inside: np.ndarray, layout: Layout, key: str, value: Any, empty: str) -> None:
    height, width = inside.shape
    if abs(width * layout.height - height * layout.width) > max(layout.width, layout.height):
        size = f"{layout.width} x {layout.height}"
        raise InputError(key, value, f"aspect ratio {width} x {height} does not match {size}")
    if not inside.any():
        raise InputError(key, value, empty)


CHECKS = {"regions": checked_region, "loras": checked_lora, "controlnets": checked_control}
