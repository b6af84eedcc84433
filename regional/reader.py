"""The layout file: YAML in, a checked Layout out. Below this nobody checks again."""

import difflib
import os
import re
from collections.abc import Callable
from contextlib import contextmanager
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, get_args, get_type_hints

import msgspec
import numpy as np
import yaml
from msgspec import Struct

from errors import InputError, describe, is_broken, shown
from regional.images import check_file, read_color, read_mask, read_picture, readable
from regional.layout import MAX_REGIONS, MODES, PRESETS, SHAPES, SHARE, Control, Layout, Region

MAX_BYTES = 1_000_000  # of a layout file; YAML takes up to 12 s and 280 MB for so many


MAX_NUMBER = 100  # characters of a number in it; a file full of 1:1:1:1... would take hours


Where = Callable[[str], str]  # the path of a key -> how messages name it


REPOSITORY = r"\w[\w.-]*/\w[\w.-]*(:.+)?"  # org/name, or one of its files


# the command line's names of a ControlNet's keys
CONTROL_FLAGS = {key: f"control_{key}" for key in ("image", "mode", "scale", "start", "end")}


CONTROL_FLAGS |= {"model": "controlnet", "preprocess": "preprocess"}


def where_of(file: Path | None, overrides: dict[str, Any]) -> Where:
    """How messages name a key of a layout: by its file, or by the flag that it comes from."""
    name = shown(file or "the command line")

    def where(path: str) -> str:
        if path.startswith("controlnets[") and "controlnets" in overrides:
            return f"the command line: --{CONTROL_FLAGS[path.rpartition('.')[2]].replace('_', '-')}"
        return f"the command line: --{path.replace('_', '-')}" if path in overrides else f"{name}: {path}"

    return where


@contextmanager
def naming(file: Path | None, overrides: dict[str, Any]):
    """Until branch b is merged."""
    try:
        yield
    except InputError as error:
        key = str(error.key)
        if re.match(r"controlnets\[", key) and "controlnets" in overrides:
            name, _, rest = key.rpartition(".")[2].partition(" ")
            error.key = f"the command line: --{CONTROL_FLAGS[name].replace('_', '-')} {rest}".strip()
        elif re.match(r"controlnets\[", key):
            error.source = shown(file or "the command line")
        raise


def read_layout(
    file: Path | None, overrides: dict[str, Any], size: int = 1024, carried: dict[str, Any] | None = None
) -> Layout:
    """Read a layout, with `overrides` (from the command line) in place of what it says and `size` x `size` pixels
    where neither says anything. Mask paths come out absolute or relative to the working directory. carried: in place of
    the file, what a picture carries of how it was made.

    Raises InputError, one sentence that names the file, the key and the value.
    """
    written = read_yaml(file) if file and carried is None else {}
    if carried is not None:
        written = {key: value for key, value in carried.items() if key in Layout.__struct_fields__}
    if not isinstance(written, dict):
        raise InputError(f"{shown(file)}: expected a mapping of keys to values, found {describe(written)}.")
    data = {"width": size, "height": size, **written, **overrides}
    name, where = shown(file or "the command line"), where_of(file, overrides)
    layout = convert(data, where, name)
    settings = PRESETS[layout.preset](len(layout.regions))
    layout = msgspec.structs.replace(layout, **{key: value for key, value in settings.items() if key not in data})
    folder = file.parent if file and carried is None else Path()
    replace = msgspec.structs.replace

    def picture(file: str | None) -> str | None:
        return None if file is None else str(folder / file)

    def placed(loras: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(replace(lora, file=beside(folder, lora.file)) for lora in loras)

    regions = [
        in_pixels(replace(r, mask=picture(r.mask), loras=placed(r.loras)), layout, where(f"regions[{i}]"))
        for i, r in enumerate(layout.regions)
    ]
    loras, controls = layout.loras, layout.controlnets
    if "loras" not in overrides:
        loras = [replace(lora, image=picture(lora.image)) for lora in placed(loras)]
    if "controlnets" not in overrides:
        controls = [replace(c, model=beside(folder, c.model), image=picture(c.image)) for c in controls]
    layout = replace(
        layout, map=picture(layout.map), loras=tuple(loras), controlnets=tuple(controls), regions=tuple(regions)
    )
    check(layout, where)
    return layout


def in_pixels(region: Region, layout: Layout, where: str) -> Region:
    """The region with its box and polygons in pixels, and its polygons a list of lists of points."""

    def pixels(value: Any, side: int, key: str) -> float:
        if isinstance(value, str) and re.fullmatch(SHARE, value):
            return float(Fraction(value[:-1]) * side / 100)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or abs(value) > 1e9:
            raise InputError(f"{where}.{key} = {describe(value)}: expected pixels, or a share such as 25%.")
        return float(value)

    sides = (layout.width, layout.height)
    box, polygon = region.box, region.polygon
    if box is not None:
        box = tuple(pixels(value, side, f"box[{i}]") for i, (value, side) in enumerate(zip(box, sides * 2)))
    if polygon is not None:
        polygon = tuple(
            tuple(tuple(pixels(value, side, "polygon") for value, side in zip(point, sides)) for point in points)
            for points in polygons_of(polygon, f"{where}.polygon")
        )
    return msgspec.structs.replace(region, box=box, polygon=polygon)


def polygons_of(polygon: Any, where: str) -> list[Any]:
    def is_point(value: Any) -> bool:
        return (
            isinstance(value, (list, tuple))
            and len(value) == 2
            and not any(isinstance(v, (list, tuple)) for v in value)
        )

    polygons = [polygon] if all(map(is_point, polygon)) else polygon
    for points in polygons:
        if not isinstance(points, (list, tuple)) or len(points) < 3 or not all(map(is_point, points)):
            raise InputError(
                f"{where} = {describe(list(polygon))}: expected at least three points [x, y], or lists of them."
            )
    return polygons


def beside(folder: Path, name: str) -> str:
    """A file or folder by its path from the layout's folder; as it is if it can only be a repository of the hub."""
    path = folder / name
    exists = os.path.exists(path)  # False also for names that no file can have
    if is_broken(name) or exists and not (path.is_file() or path.is_dir()):
        raise InputError(f"{shown(path)}: it is neither a file nor a folder.")
    if exists:
        return str(path)
    if re.fullmatch(REPOSITORY, name):
        return name
    return f"./{path}" if re.fullmatch(REPOSITORY, str(path)) else str(path)  # no repository: its error would mislead


TAG = "tag:yaml.org,2002:"


TAGS = {TAG + name for name in ("map", "seq", "str", "int", "float", "bool", "null")}


def read_yaml(file: Path) -> Any:
    """A layout file's values: those that JSON has, of a bounded number, with no key written twice."""
    try:
        check_file(file, MAX_BYTES)
        loader = yaml.SafeLoader(file.read_text(encoding="utf-8"))
        node = loader.get_single_node()
        if node is None:
            return None
        check_node(node, {})
        return loader.construct_document(node)
    except FileNotFoundError:
        raise InputError(f"{shown(file)}: there is no such layout file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{shown(file)}: cannot be read as a text file ({shown(error)}).") from None
    except yaml.YAMLError as error:
        raise InputError(f"{shown(file)}: {yaml_problem(error)}.") from None
    except (AttributeError, LookupError, TypeError, ValueError, RecursionError) as error:  # values such as !!int ""
        raise InputError(f"{shown(file)}: a value that YAML can't read ({shown(error)}).") from None


def check_node(node: yaml.Node, sizes: dict[int, int]) -> int:
    """How much text a node stands for, each alias counted as what it stands for. YAMLError for what no layout holds.
    sizes: those of the nodes seen, by their ids; 0 while we are in one."""
    if id(node) in sizes:
        return sizes[id(node)] or refuse(node, "a value that holds itself")
    sizes[id(node)] = 0
    if node.tag not in TAGS:
        refuse(node, f"{describe(node.tag.removeprefix(TAG))} is no kind of value of a layout; write text in quotes")
    size = 1
    if isinstance(node, yaml.ScalarNode):
        size += len(node.value)
        if size > MAX_NUMBER and node.tag != TAG + "str":
            refuse(node, f"a number of more than {MAX_NUMBER} characters")
        if is_broken(node.value):  # whole pairs, as JSON writes an emoji, are put together
            node.value = node.value.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")
    elif isinstance(node, yaml.MappingNode):
        check_keys([key for key, _ in node.value])
        size += sum(len(key.value) + check_node(value, sizes) for key, value in node.value)
    else:
        size += sum(check_node(value, sizes) for value in node.value)
    if size > 2 * MAX_BYTES:
        refuse(node, "too much text, with each alias counted as what it stands for")
    sizes[id(node)] = size
    return size


def check_keys(keys: list[yaml.Node]) -> None:
    """YAMLError for keys that are no words, and for one written twice: plain YAML lets the last one win silently."""
    seen = set()
    for key in keys:
        if key.tag not in (TAG + "str", TAG + "merge") or not re.fullmatch(r"[\w .-]{1,60}|<<", key.value):
            name = describe(key.value) if isinstance(key, yaml.ScalarNode) else "that is a list"
            refuse(key, f"the key {name} is no word")
        if key.value in seen:
            refuse(key, f"the key {key.value} is written twice")
        seen.add(key.value)


def refuse(node: yaml.Node, problem: str) -> NoReturn:
    raise yaml.YAMLError(f"line {node.start_mark.line + 1}: {problem}")


def yaml_problem(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = " ".join((getattr(error, "problem", None) or str(error)).split())
    if "'\\t'" in problem:
        problem = "a tab is used for indentation, YAML wants spaces"
    return f"line {mark.line + 1}, column {mark.column + 1}: {shown(problem)}" if mark else shown(problem)


def convert(data: dict, where: Where, name: str) -> Layout:
    """Check types, ranges and names. msgspec's error holds the path of the culprit; the value is looked up there."""
    try:
        return msgspec.convert(data, Layout)
    except msgspec.ValidationError as error:
        message, _, path = str(error).rpartition(" - at `$")
        message, path = (message, path) if message else (path, "")  # nothing is said of the root
    except UnicodeEncodeError as error:
        raise InputError(f"{name}: {describe(error.object)}: half of a surrogate pair is no text.") from None
    path = path.rstrip("`").lstrip(".")
    if field := re.search(r"(?s)unknown field `(.*)`", message):
        known = struct_at(path)
        value = describe(value_at(data, path)[field[1]])
        key = f"{path}.{field[1]}" if path else field[1]
        raise InputError(f"{where(shown(key))} = {value}: no such key{hint(field[1], known)}.")
    if field := re.search(r"missing required field `(.*)`", message):
        raise InputError(f"{name}: {path + '.' if path else ''}{field[1]} is missing.")
    value, message = value_at(data, path), shown(message[0].lower() + message[1:].replace("`", ""))
    quote = "; write it in quotes" if "expected str" in message and isinstance(value, (bool, int, float)) else ""
    raise InputError(f"{where(path)} = {describe(value)}: {message}{quote}.")


def struct_at(path: str) -> type[Struct]:
    """What stands at a path such as regions[1].loras[0]."""
    struct = Layout
    for key in re.findall(r"([^.\[\]]+)\[\d+\]", path):
        struct = get_args(get_type_hints(struct)[key])[0]
    return struct


def value_at(data: Any, path: str) -> Any:
    """The value at a path such as regions[1].box."""
    for key, index in re.findall(r"([^.\[\]]+)|\[(\d+)\]", path):
        data = data[int(index)] if index else data[key]
    return data


def hint(key: str, known: type[Struct]) -> str:
    close = difflib.get_close_matches(key, known.__struct_fields__, 1)
    return f", did you mean {close[0]}" if close else f"; known keys are {', '.join(known.__struct_fields__)}"


def check(layout: Layout, where: Where) -> None:
    """What types alone do not say."""
    for key in ("width", "height"):
        if (value := getattr(layout, key)) % 16:
            low = value // 16 * 16
            raise InputError(f"{where(key)} = {value}: not a multiple of 16, the nearest are {low} and {low + 16}.")
    check_steps(layout.mask_inject_steps, where("mask_inject_steps"))
    for key in ("double_blocks", "single_blocks"):
        try:
            layout.is_masked(key.removesuffix("_blocks"), 0)
        except ValueError as error:
            expected = 'expected "every 2", "0-18", "0-4, 8" or a list of indices'
            raise InputError(f"{where(key)} = {describe(str(error))}: {expected}.") from None
    length = layout.region_max_sequence_length
    if isinstance(length, str) and not (re.fullmatch(SHARE, length) and 0 < float(length[:-1]) <= 100):
        name = f"{where('region_max_sequence_length')} = {describe(length)}"
        raise InputError(f"{name}: expected a count, or a share of max_sequence_length such as 25%.")
    for key in ("prompt", "background_prompt"):
        check_text(getattr(layout, key), where(key))
    if len(layout.regions) > MAX_REGIONS:
        raise InputError(f"{where('regions')} has {len(layout.regions)} entries: at most {MAX_REGIONS} are possible.")
    if layout.map:
        readable(read_picture, layout.map, where("map"))
    for i, region in enumerate(layout.regions):
        check_region(region, layout, where(f"regions[{i}]"))
    for i, lora in enumerate(layout.loras):
        if lora.image:
            readable(read_picture, lora.image, where(f"loras[{i}].image"))
    for i, control in enumerate(layout.controlnets):
        check_control(control, layout, lambda key, i=i: where(f"controlnets[{i}].{key}"))


def check_steps(value: int | str, where: str) -> None:
    if isinstance(value, str):
        if not re.fullmatch(SHARE, value) or float(value[:-1]) > 100:
            raise InputError(f"{where} = {describe(value)}: expected a count, or a share such as 40%.")
    elif value < 0:
        raise InputError(f"{where} = {value}: expected a count of steps from 0 on.")


def check_text(text: str, where: str) -> None:
    if is_broken(text):
        raise InputError(f"{where} = {describe(text)}: half of a surrogate pair is no text.")


def check_region(region: Region, layout: Layout, where: str) -> None:
    if not region.prompt.strip():
        raise InputError(f"{where}.prompt = {describe(region.prompt)}: a region needs a prompt.")
    check_text(region.prompt, f"{where}.prompt")
    shapes = [key for key in SHAPES if getattr(region, key) is not None]
    if len(shapes) != 1:
        has = " and ".join(shapes) or "no shape"
        raise InputError(f"{where} has {has}: a region needs exactly one of {', '.join(SHAPES)}.")
    if region.mask_inject_steps is not None:
        check_steps(region.mask_inject_steps, f"{where}.mask_inject_steps")
    if region.box:
        check_box(region.box, layout, f"{where}.box")
    elif region.polygon:
        check_polygon(region.polygon, layout, f"{where}.polygon")
    elif region.mask:
        check_mask(region.mask, layout, f"{where}.mask", read_mask, "white, no pixel reaches 128")
    else:
        check_color(region.color, layout, f"{where}.color")


def check_polygon(polygons: Any, layout: Layout, where: str) -> None:
    for x, y in (point for points in polygons for point in points):
        if not (0 <= x <= layout.width and 0 <= y <= layout.height):
            raise InputError(f"{where} has the point [{x:g}, {y:g}], outside {layout.width} x {layout.height}.")


def check_color(color: Any, layout: Layout, where: str) -> None:
    if layout.map is None:
        raise InputError(f"{where} = {describe(color)}: a color needs the layout's map, a picture, and there is none.")
    shown = describe(list(color) if isinstance(color, tuple) else color)
    is_text = isinstance(color, str) and re.fullmatch("#[0-9a-fA-F]{6}", color)
    is_index = isinstance(color, int) and 0 <= color < 2**24
    if not (is_text or is_index or isinstance(color, tuple) and all(0 <= value <= 255 for value in color)):
        raise InputError(f'{where} = {shown}: expected "#rrggbb", [r, g, b] from 0 to 255, or an index.')
    read = partial(read_color, color=color)
    check_mask(layout.map, layout, f"{where} = {shown}: map", read, "of this color")


def check_box(box: tuple[float, ...], layout: Layout, where: str) -> None:
    numbers = [int(v) if v == int(v) else v for v in box] if all(abs(v) < 1e9 for v in box) else list(box)
    x0, y0, x1, y1 = box
    for name, value, end, side in (
        ("x0", x0, layout.width, "width"), ("y0", y0, layout.height, "height"),
        ("x1", x1, layout.width, "width"), ("y1", y1, layout.height, "height"),
    ):  # fmt: skip
        if not 0 <= value <= end:
            raise InputError(f"{where} = {numbers}: {name} = {value:g} lies outside {side} {end}.")
    for low, high, axis in ((x0, x1, "x"), (y0, y1, "y")):
        if low >= high:
            raise InputError(f"{where} = {numbers}: the box is empty, {axis}0 must be smaller than {axis}1.")


def check_control(control: Control, layout: Layout, where: Where) -> None:
    if control.start >= control.end:
        raise InputError(f"{where('start')} = {control.start:g}: not before its end, {control.end:g}.")
    if isinstance(control.mode, str) and control.mode not in MODES:
        raise InputError(
            f"{where('mode')} = {describe(control.mode)}: expected a number, or one of {', '.join(MODES)}."
        )
    if control.region is not None and control.region >= len(layout.regions):
        count = len(layout.regions)
        raise InputError(f"{where('region')} = {control.region}: the layout has {count} regions, counted from 0.")
    readable(read_picture, control.image, where("image"))


def check_mask(mask: str, layout: Layout, where: str, read: Callable[[str], np.ndarray], what: str) -> None:
    inside = readable(read, mask, where)
    height, width = inside.shape
    if abs(width * layout.height - height * layout.width) > max(layout.width, layout.height):
        raise InputError(
            f"{where} = {shown(mask)}: its {width} x {height} pixels have not the aspect ratio of "
            f"{layout.width} x {layout.height}."
        )
    if not inside.any():
        raise InputError(f"{where} = {shown(mask)}: nothing in it is {what}.")
