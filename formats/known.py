"""What of prompts and sizes a model can't read or draw: a sentence for each cause."""

import re
import string
from collections.abc import Iterable, Iterator
from typing import Any
from unicodedata import normalize

import msgspec

from errors import CONFIG, converted, parse_json, read_bytes
from formats.recognize import SUBFOLDER, Source
from model.tokenizers import T5Tokenizer

# What prompts for other programs hold, and what a layout has instead
FOREIGN = {
    r"\([^()]*[^\d\s()]\s*:\s*\d*\.?\d+\s*\)": "a region's strength",
    r"<(?:lora|lyco|hypernet):[^<>]*>": "loras",
    r"\bembedding:[\w.-]+": "a description",
    r"(?<![A-Z'\"] )\b(?:BREAK|AND|ADD(?:COL|ROW|BASE|COMM))\b(?=\s+\S)(?! [A-Z]{2})": "regions",
}


class Known(msgspec.Struct):
    """What a model was trained on: FLUX.1, or a small one that says so in its config.json."""

    sides: tuple[int, int] = (16, 8192)
    pixels: tuple[int, int] = (2**16, 2**21)
    sizes: str = "about 0.1 to 2 megapixels"
    words: dict[str, list[str]] = {}  # all, by their kinds
    example: str = ""


def known_of(flux: Source | None) -> Known:
    config = flux.config if flux else {}
    return converted(config.get("known", {}), Known, "config.json", "damaged")


class ModelIndex(msgspec.Struct, rename={"pipeline": "_class_name"}):
    """A diffusers folder's model_index.json."""

    pipeline: str = ""


def is_kontext(flux: Source) -> bool | None:
    """Is it FLUX.1 Kontext, by what its name, metadata or model_index.json say? Its tensors are
    FLUX.1-dev's. None where they say nothing."""
    if "kontext" in flux.path.name.lower():
        return True
    if "known" in flux.config:  # a small model of ours
        return False
    said = str(flux.metadata.get("modelspec.architecture", ""))
    folder = flux.path.parent
    index = (folder.parent if folder.name == SUBFOLDER["flux"] else folder) / "model_index.json"
    if index.exists():
        said += parse_json(read_bytes(index, CONFIG), ModelIndex, index).pipeline
    return "kontext" in said.lower() if said else None


def doubts_of_kontext(layouts: list[Any], flux: Source) -> Iterator[str]:
    having = [any(part.references for part in (layout, *layout.regions)) for layout in layouts]
    found = is_kontext(flux)
    if found and not all(having):
        yield f"{flux.path} is FLUX.1 Kontext, which without references draws as FLUX.1-dev does."
    if found is False and any(having):
        yield f"{flux.path} is not FLUX.1 Kontext, which alone has learned to use references."


def doubts_of_channels(layouts: list[Any], flux: Source) -> Iterator[str]:
    has_more = flux.shape("img_in.weight")[1] > flux.shape("final_layer.linear.weight")[0]
    if has_more and any(layout.guidance == 3.5 for layout in layouts):
        yield "guidance is 3.5, but FLUX.1 Fill and Canny are made for 30, and Depth for 10."


def doubts(layouts: list[Any], flux: Source | None, t5: T5Tokenizer | None) -> Iterator[str]:
    """Of resolved layouts. flux, t5: the model's, if they are here."""
    known = known_of(flux)
    beyond = {}
    prompts = [layout.prompt for layout in layouts]
    if not all(map(str.strip, prompts)):
        yield "prompt is empty: nothing says what the whole image shows."
    for layout in layouts:
        prompts += [region.prompt for region in layout.regions]
        prompts += [layout.background_prompt] * bool(layout.regions)
        size = (layout.width, layout.height)
        fits = known.pixels[0] <= layout.width * layout.height <= known.pixels[1]
        if not (fits and known.sides[0] <= min(size) <= max(size) <= known.sides[1]):
            beyond[f"{layout.width} x {layout.height}"] = None
    if beyond:
        yield f"{listed(beyond)} pixels: the model was trained on {known.sizes}."
    if flux:
        yield from doubts_of_kontext(layouts, flux)
        yield from doubts_of_channels(layouts, flux)
    text = normalize("NFKC", "\n".join(dict.fromkeys(prompts)))
    if known.words:
        learned = sum(known.words.values(), [""])
        words = dict.fromkeys(word.strip(string.punctuation) for word in text.split())
        if unknown := [word for word in words if word not in learned]:
            example = f"it draws such as {known.example!r}"
            yield f"the model has not learned the words {listed(unknown)}; {example}."
    elif t5:
        if unknown := [c for c in dict.fromkeys(text) if t5.unknown in t5.encode(c)[0]]:
            yield f"the model can't read {listed(unknown)}, which T5's vocabulary lacks."
    found = {}
    for pattern, instead in FOREIGN.items():
        found |= {match[0]: instead for match in re.finditer(pattern, text)}
    if found:
        instead = listed(dict.fromkeys(found.values()))
        yield f"{listed(found)}: FLUX.1 reads that as text; use {instead} instead."


def listed(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(names[:10]) + more
