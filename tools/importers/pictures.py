"""What A1111, Forge (with Forge Couple) and InvokeAI write into their pictures."""

import re
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta

from errors import LAYOUT, MISSING, InputError, read_text
from tools.importers import common
from tools.importers.common import Data, boxed, json_in, percent, plain, report, texts_in

SETTING = r'([A-Za-z_][\w /-]{0,60}): ("(?:\\.|[^"\\])*"|[^,]*)'
OURS = {"Steps": "steps", "Seed": "seed", "Distilled CFG Scale": "guidance"}
READ = {"Sampler", "Schedule type", "Size", "Version", "Model hash", "Lora hashes"}
NEUTRAL = (None, "", "1", 1, [])
Unit = Annotated[float, Meta(ge=0, le=1)]
ROWS = list[tuple[Unit, Unit, Unit, Unit, float]]


def from_a1111(path: Path, size: Any) -> Data:
    """A picture's `parameters`, or a text file of them: the prompt, "Negative prompt: ..." and a
    line of settings."""
    texts = texts_in(path)
    text = texts.get("parameters", "") if texts else read_text(path, LAYOUT)
    prompt, start, settings = text.rpartition("Steps: ")
    if not start:
        raise InputError(path, MISSING, "has no parameters as A1111 and Forge write them")
    prompt, _, negative = prompt.partition("Negative prompt:")
    found = {}
    for key, value in re.findall(SETTING, start + settings):
        found[key] = json_in(value, str, path) if value[:1] == '"' else value.strip()
    layout = couple(found, prompt, path) or {"prompt": plain(prompt), "regions": []}
    scale = json_in(found.pop("CFG scale", "1"), int | float, path)
    layout |= common.guided(negative.strip(), scale, "Distilled CFG Scale" in found)
    for theirs in OURS.keys() & found.keys():
        layout[OURS[theirs]] = json_in(found.pop(theirs), int | float, path)
    sides = re.fullmatch(r"(\d{1,9})x(\d{1,9})", found.get("Size", ""))
    sides = sides.groups() if sides else [texts.get("width"), texts.get("height")]
    layout |= dict(zip(("width", "height"), sides))
    layout |= common.sampling(sampler=found.get("Sampler"), schedule=found.get("Schedule type"))
    lost = (key for key in found.keys() - READ if found[key] not in NEUTRAL)
    report(f"{key} {found[key]}"[:60] for key in sorted(lost))
    return layout


def couple(settings: Data, prompt: str, path: Path) -> Data:
    """Forge Couple's prompts and regions, boxes or equal parts; taken out of the settings."""
    names = [key for key in settings if key.startswith("forge_couple")]
    own = {key.removeprefix("forge_couple_"): settings.pop(key) for key in names}
    mode = own.get("mode")
    if mode not in ("Advanced", "Basic"):
        return {}
    separator = own.get("separator", "").replace("\\n", "\n").strip()
    lines = [plain(line) for line in prompt.split(separator or "\n") if line.strip()]
    if mode == "Advanced":
        return coupled(json_in(own.get("mapping", ""), ROWS, path), lines)
    if own.get("background") == "Last Line":
        lines = lines[-1:] + lines[:-1]
    base = own.get("background") in ("First Line", "Last Line")
    count = len(lines) - base
    ends = [(Fraction(i, count), Fraction(i + 1, count)) for i in range(count)]
    is_row = own.get("direction") == "Horizontal"
    rows = [(*part, 0, 1, 1) if is_row else (0, 1, *part, 1) for part in ends]
    return coupled([(0, 1, 0, 1, 1)] * base + rows, lines)


def coupled(rows: list[tuple], prompts: list[str]) -> Data:
    """Regions of rows x0, x1, y0, y1, weight. If the first is the whole image, it is the base
    prompt's."""
    boxes = [[percent(edge) for edge in (x0, y0, x1, y1)] for x0, x1, y0, y1, _ in rows]
    layout = {"regions": boxed(prompts, boxes, "mapping")}
    for region, row in zip(layout["regions"], rows):
        region["strength"] = row[-1]
    if boxes[:1] == [["0%", "0%", "100%", "100%"]]:
        base = layout["regions"].pop(0)
        layout["prompt"] = base["prompt"]
        report([f"its weight {base['strength']:g}"] if base["strength"] != 1 else [])
    return layout


def from_invokeai(path: Path, size: Any) -> Data:
    texts = texts_in(path)
    if "invokeai_metadata" not in texts:
        raise InputError(path, MISSING, "carries no metadata of InvokeAI")
    found = json_in(texts["invokeai_metadata"], Data, path)
    layout = {key: found.get(key) for key in ("seed", "steps", "guidance")}
    layout |= {side: found.get(side) or texts[side] for side in ("width", "height")}
    layout |= common.sampling(sampler=found.get("scheduler"))
    scale = found.get("cfg_scale")
    layout |= common.guided(found.get("negative_prompt"), scale, found.get("guidance") is not None)
    lost = [key for key in ("loras", "strength") if found.get(key) not in NEUTRAL]
    if (found.get("canvas_v2_metadata") or {}).get("regionalGuidance"):
        lost.append("the regional layers, whose place in the image is not recorded")
    report(lost)
    return layout | {"prompt": plain(found.get("positive_prompt") or ""), "regions": []}
