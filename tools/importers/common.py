"""What the readers of other programs' files share."""

import json
import math
import re
from fractions import Fraction
from pathlib import Path
from typing import Any, get_args

import msgspec

from errors import MISSING, SOURCE, InputError, converted, opened, opened_image, parsed, shown, warn

Data = dict[str, Any]
LORA_OR_WEIGHT = r"<lora:[^<>]{1,200}>|\(([^()]{1,999}?):[\d.]{1,9}\)"
NAMES = ("heun", "dpmpp_2m", "simple", "beta")  # of samplers and schedules that layouts have too


def record(**kinds: Any) -> type[msgspec.Struct]:
    """A type of mappings with at least these keys; what may be None may be missing."""
    fields = [(n, k, None) if type(None) in get_args(k) else (n, k) for n, k in kinds.items()]
    return msgspec.defstruct("Record", fields, kw_only=True)


def texts_in(path: Path) -> Data:
    """The texts of a PNG, and its width and height; nothing of another file."""
    with opened(path, SOURCE) as file:
        if file.read(4) != b"\x89PNG":
            return {}
    with opened_image(path, 10**9) as image:  # not decoded
        texts = {key: text for key, text in image.info.items() if isinstance(text, str)}
        return texts | {"width": image.width, "height": image.height}


def json_in(text: str, kind: Any, path: Path) -> Any:
    """JSON of this type. These programs also write NaN, which msgspec refuses."""
    value = parsed(json.loads, text, path, "damaged JSON")
    return converted(value, kind, path, "not of the expected form")


def number(value: Any, key: str, path: Path) -> float:
    if type(value) not in (int, float) or not abs(value) < 10**6:  # NaN is not
        raise InputError(key, value, "expected a number below 1,000,000", path)
    return value


def percent(part: Any) -> str:
    """1/4 -> 25%. Rounded down, so borders stay on the same side of every pixel."""
    part = min(max(Fraction(str(part)), 0), 1)
    return f"{math.floor(part * 10**11) / 10**9:.9f}".rstrip("0").rstrip(".") + "%"


def boxed(prompts: list[str], boxes: list[Any], key: str) -> list[Data]:
    """Regions from their prompts and boxes. key: the boxes'."""
    if len(prompts) != len(boxes):
        raise InputError(key, MISSING, f"{len(boxes)} boxes, for {len(prompts)} prompts")
    return [{"prompt": prompt, "box": list(box)} for prompt, box in zip(prompts, boxes)]


def shape_of(rings: list[Any]) -> Data:
    """A box if the only ring is an upright rectangle, else polygons."""
    if len(rings) == 1 and len(rings[0]) == 4:
        (a, b), (c, d), (e, f), (g, h) = rings[0]
        if (a, b, e, f) in ((g, d, c, h), (c, h, g, d)):
            return {"box": [min(a, e), min(b, f), max(a, e), max(b, f)]}
    return {"polygon": [[list(point) for point in ring] for ring in rings]}


def plain(prompt: str) -> str:
    """A prompt without LoRAs and weights, which would be read as words."""
    lost = []
    for _ in range(3):  # in each other
        lost += [found[0] for found in re.finditer(LORA_OR_WEIGHT, prompt)]
        prompt = re.sub(LORA_OR_WEIGHT, r"\1", prompt)
    report(lost)
    return prompt.strip(" \n,")


def sampling(**names: Any) -> Data:
    """The layout's keys for a sampler and a schedule of these names."""
    names = {key: str(name).lower().replace("++ ", "pp_") for key, name in names.items() if name}
    report(f"{key} {name}" for key, name in names.items() if name not in ("euler", *NAMES))
    return {key: name for key, name in names.items() if name in NAMES}


def guided(negative: Any, scale: Any, is_flux: bool) -> Data:
    """The layout's keys for a negative prompt and a CFG scale; other models' scales are too high
    for FLUX.1."""
    found = {}
    if isinstance(negative, str) and plain(negative):
        found["negative_prompt"] = plain(negative)
    if is_flux and isinstance(scale, int | float) and scale > 1:
        found["true_cfg_scale"] = scale
    elif scale not in (None, 0, 1):
        report([f"cfg {scale}"])
    return found


def report(lost: Any) -> None:
    if text := ", ".join(lost):
        warn(f"a layout has no place for {shown(text)}")
