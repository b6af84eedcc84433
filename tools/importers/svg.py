"""SVG drawings. A region is a shape with a title, label or id of its own, or a group's others."""

import cmath
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from errors import CONFIG, LAYOUT, MISSING, InputError, parsed, read_text, shown, warn
from tools.importers.common import Data, number, report, shape_of

NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
COMMAND = r"([MLHVCSQTAZmlhvcsqtaz])([^MLHVCSQTAZmlhvcsqtaz]*)"
ARC = rf"({NUMBER})[\s,]*" * 3 + r"([01])[\s,]*([01])[\s,]*" + rf"({NUMBER})[\s,]*({NUMBER})"
TRANSFORM = r"(matrix|translate|scale|rotate|skewX|skewY)\s*\(([^()]*)\)"
SIZES = {"M": 2, "L": 2, "H": 1, "V": 1, "C": 6, "S": 4, "Q": 4, "T": 2, "A": 7, "Z": 1}
UNITS = {"": 1, "px": 1, "in": 96, "cm": 96 / 2.54, "mm": 96 / 25.4, "pt": 4 / 3, "pc": 16}
SHAPES = ("rect", "circle", "ellipse", "polygon", "polyline", "path")
LABEL = "{http://www.inkscape.org/namespaces/inkscape}label"
NEUTRAL = ("title", "desc", "defs", "style", "metadata", "namedview")
MADE_UP = rf"(?i)(svg|g|group|layer|frame|{'|'.join(SHAPES)})?[-_ \d]*"
Step = tuple[complex, complex, complex]  # where a transform has (1, 0), (0, 1) and the origin


def tree_in(path: Path) -> Element:
    text = read_text(path, CONFIG)
    if "<!DOCTYPE" in text:  # without one, there are no entities and nothing from outside
        raise InputError(path, MISSING, "document types are not read; remove its <!DOCTYPE ...>")
    if text.count("<") > 100_000:
        raise InputError(path, MISSING, "it has more than 50,000 elements")
    return parsed(ElementTree.fromstring, text, path, "damaged XML")


def moved(steps: list[Step], point: complex) -> complex:
    for x, y, origin in reversed(steps):
        point = point.real * x + point.imag * y + origin
    return point


def steps_of(transform: str) -> list[Step]:
    steps = []
    for name, text in re.findall(TRANSFORM, transform):
        values = [float(value) for value in re.findall(NUMBER, text)]
        a, b, c, d, e, f = [*values, 0, 0, 0, 0, 0][:6]
        turn = cmath.rect(1, math.radians(a))
        kinds: dict[str, Step] = {
            "matrix": (complex(a, b), complex(c, d), complex(e, f)),
            "translate": (1, 1j, complex(a, b)),
            "scale": (a, 1j * values[-1], 0),
            "rotate": (turn, 1j * turn, complex(b, c) * (1 - turn)),
            "skewX": (1, 1j + math.tan(math.radians(a)), 0),
            "skewY": (1 + 1j * math.tan(math.radians(a)), 1j, 0),
        }
        steps.append(kinds[name])
    return steps


def length(element: Element, path: Path, key: str) -> float:
    text = element.get(key, "0").strip()
    found = re.fullmatch(rf"({NUMBER})([a-z]*)", text)
    if not (found and found[2] in UNITS):
        raise InputError(key, text, "expected a length such as 10, 10px or 10mm", path)
    return number(float(found[1]) * UNITS[found[2]], key, path)


def outline(tag: str, element: Element, path: Path) -> str:
    """A shape as the data of a path."""
    if tag == "rect":
        x, y, w, h = (length(element, path, key) for key in ("x", "y", "width", "height"))
        return f"M{x},{y} h{w} v{h} h{-w} z"
    if tag in ("circle", "ellipse"):
        keys = ("cx", "cy", "r", "r") if tag == "circle" else ("cx", "cy", "rx", "ry")
        x, y, rx, ry = (length(element, path, key) for key in keys)
        half = f"a{rx},{ry} 0 1 1"
        return f"M{x - rx},{y} {half} {2 * rx},0 {half} {-2 * rx},0 z"
    return element.get("d") or "M" + element.get("points", "")


def curves(path: str) -> list[list[complex]]:
    """A path's rings, with eight lines for a curve."""
    rings = [[]]
    here = start = control = 0j
    for command, text in re.findall(COMMAND, path):
        kind = command.upper()
        values = re.findall(NUMBER, text)
        if kind == "A":
            values = [value for found in re.findall(ARC, text) for value in found]
        if kind == "Z":
            here = start
            rings.append([])
        for i in range(0, len(values) - SIZES[kind] + 1, SIZES[kind]):
            part = [float(value) for value in values[i : i + SIZES[kind]]]
            origin = here if command.islower() else 0j
            points = [origin + complex(*pair) for pair in zip(part[-2::-2], part[::-2])][::-1]
            if kind in "HV":
                across = [part[0] + origin.real, here.imag]
                points = [complex(*(across if kind == "H" else (here.real, part[0] + origin.imag)))]
            if kind == "M" and i == 0:
                start = points[0]
                rings.append([])
            elif not rings[-1]:
                rings[-1].append(here)
            if kind in "ST":
                points.insert(0, 2 * here - control)
            control = points[-2] if kind in "CSQT" else points[-1]
            if kind in "CSQT":
                rings[-1] += [bezier([here, *points], step / 8) for step in range(1, 8)]
            elif kind == "A":
                rings[-1] += arc(here, points[-1], *part[:5])
            here = points[-1]
            rings[-1].append(here)
    return rings


def bezier(points: list[complex], t: float) -> complex:
    while len(points) > 1:
        points = [a + (b - a) * t for a, b in zip(points, points[1:])]
    return points[0]


def arc(start: complex, end: complex, rx: float, ry: float, *how: float) -> list[complex]:
    """Points on an elliptic arc between two. how: its rotation, is it the large one, clockwise."""
    rotation, large, sweep = how
    if not (rx and ry) or start == end:
        return []
    turn = cmath.rect(1, math.radians(rotation))
    a, b = (complex((p / turn).real / abs(rx), (p / turn).imag / abs(ry)) for p in (start, end))
    half = (b - a) / 2  # on a circle of radius 1, or of more if that does not reach
    side = 1j * half / abs(half) * math.sqrt(max(0, 1 - abs(half) ** 2))
    center = (a + b) / 2 + (side if large != sweep else -side)
    angle = cmath.phase((b - center) / (a - center)) % math.tau - (0 if sweep else math.tau)
    around = [center + (a - center) * cmath.rect(1, angle * i / 24) for i in range(1, 24)]
    return [complex(p.real * abs(rx), p.imag * abs(ry)) * turn for p in around]


def name_of(element: Element) -> str:
    """A title, label or id that somebody wrote."""
    names = (element.findtext("{*}title"), element.get(LABEL), element.get("aria-label"))
    names = (*names, element.get("id", "").replace("_", " "))
    names = (" ".join((name or "").split()) for name in names)
    return next((name for name in names if not re.fullmatch(MADE_UP, name)), "")


def rings_in(element: Element, steps: list[Step], owner: Any, path: Path) -> Iterator[tuple]:
    """The rings in pixels of an element and those in it, each after its owner: a name, and the
    number of the element that has it."""
    tag = element.tag.rpartition("}")[2]
    style = f"{element.get('style')};display:{element.get('display')}"
    if tag in NEUTRAL or re.search(r"display:\s*none", style):
        return
    steps = steps + steps_of(element.get("transform", ""))
    if len(steps) > 99:
        raise InputError(path, MISSING, "its transforms are nested too deeply")
    if name := name_of(element):
        owner = (name, id(element))
    if tag in ("g", "a", "switch"):
        for child in element:
            yield from rings_in(child, steps, owner, path)
    elif tag in SHAPES:
        for ring in curves(outline(tag, element, path)[:LAYOUT]):
            points = [moved(steps, point) for point in ring]
            points = [(round(point.real, 2), round(point.imag, 2)) for point in points]
            yield owner or (element.get("id", tag), id(element)), points
    else:
        report([tag])


def read(path: Path, size: list[int] | None) -> Data:
    root = tree_in(path)
    view = [float(value) for value in re.findall(NUMBER, root.get("viewBox", ""))]
    own = [key for key in ("width", "height") if not root.get(key, "%").endswith("%")]
    sides = [length(root, path, key) for key in own] if len(own) == 2 else view[2:4]
    x0, y0, w, h = view or [0, 0, *sides]
    width, height = size or map(round, sides)
    x, y = width / w, height / h
    if root.get("preserveAspectRatio") != "none":
        x = y = min(x, y)
    origin = complex(width - x * w, height - y * h) / 2 - complex(x * x0, y * y0)
    found: dict[tuple, list] = {}
    count = 0
    for child in root:
        for owner, ring in rings_in(child, [(x, 1j * y, origin)], None, path):
            count += len(ring)
            if count > LAYOUT // 10:
                raise InputError(path, MISSING, "it has more points than a layout can")
            if len(ring) > 2:
                ring = [[number(value, owner[0], path) for value in point] for point in ring]
                found.setdefault(owner, []).append(ring)
    regions = [{"prompt": name, **shape_of(rings)} for (name, _), rings in found.items()]
    made_up = [region["prompt"] for region in regions if re.fullmatch(MADE_UP, region["prompt"])]
    if made_up:
        warn(f"shapes without a title or label need a prompt: {shown(', '.join(made_up))}")
    prompt = root.findtext("{*}title", "").strip()
    layout = {"prompt": prompt, "overlap": "last", "regions": regions}
    return layout if size else layout | {"width": width, "height": height}
