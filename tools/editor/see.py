"""What the model will see of a layout: mistakes, warnings, the token grid, what it costs."""

import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

import weights
from errors import InputError
from formats import components
from formats.hub import is_repository
from formats.known import doubts
from model.tokenizers import T5Tokenizer
from model.transformer import FluxParams
from regional.layout import FLUX_DEV, Defaults, Layout
from regional.mask import BACKGROUND_BIT, RegionTokens
from regional.reader import read_layout
from settings import MODEL_KEYS, Settings
from tools.cost import compared, resolved, stages
from tools.editor.folder import Folder
from tools.preview import doubts as grid_doubts
from tools.preview import grid_tokens

Data = dict[str, Any]
KEY = r"[a-z_]+(\[\d+\])?(\.\w+)*(?= )"  # the start of a warning: what it is about
NAME = r"[\w .-]{1,60}"  # of a key, as in a file
DEEPEST = 12  # levels of a layout's values


class Model:
    """What is known of a model without its weights."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.flux = None
        self.t5 = None
        self.defaults = FLUX_DEV
        self.params = FluxParams()
        self.name = settings.model or "pocket"
        if not is_repository(settings.model):
            checkpoint = weights.find(*(getattr(settings, key) for key in MODEL_KEYS))
            self.flux = checkpoint.flux
            self.t5 = T5Tokenizer(checkpoint.t5_tokenizer)
            self.defaults = Defaults(**components.model_defaults(checkpoint.flux))
            self.params = components.flux_params(checkpoint.flux)
            self.name = checkpoint.name
        self.length = lru_cache(1000)(lambda prompt: len(self.t5.encode(prompt)[0]) + 1)

    def read(self, folder: Folder, file: str, data: Data) -> Layout:
        """The layout of a page's values, whose paths start at its file. InputError as for a
        layout file."""
        check_names(data)
        base = folder.path(file).parent
        return read_layout(None, folder.rebased(data, base), self.defaults.size)

    def seen(self, folder: Folder, file: str, layout: Data) -> Data:
        data = layout
        errors = []
        try:
            layout = self.read(folder, file, data)
        except InputError as error:
            errors = [mistake(x) for x in getattr(error, "errors", [error])]
            missing = [re.fullmatch(r"regions\[(\d+)\]\.prompt", x["key"]) for x in errors]
            if not all(missing):
                return {"errors": errors}
            layout = self.read(folder, file, with_prompts(data, [int(x[1]) for x in missing]))
        layout = layout.filled(self.defaults)
        values = msgspec.structs.asdict(layout)
        full = resolved(layout, self.params)
        tokens = grid_tokens(full)
        warnings = tokens.warnings + grid_doubts(full, tokens)
        used = self.used(full, tokens)
        for entry in used:
            if entry["used"] and entry["used"] > entry["limit"]:
                count = f"has {entry['used']} tokens, and only the first {entry['limit']} are read"
                warnings.append(f"{entry['key']} {count}.")
        warnings += doubts([layout.resolved(self.defaults)], self.flux, self.t5)
        lines, times = compared(full, stages(full, self.params, tokens))
        return {
            "errors": errors,
            "warnings": [{"key": key_of(text), "text": text} for text in warnings],
            "values": {key: x for key, x in values.items() if isinstance(x, str | int | float)},
            "width": layout.width,
            "height": layout.height,
            "grid": runs(tokens, layout.width // 16),
            "regions": areas(tokens, len(layout.regions)),
            "tokens": used,
            "cost": {"times": round(times, 3), "lines": lines},
        }

    def used(self, layout: Layout, tokens: RegionTokens) -> list[Data]:
        """Prompt tokens, used and at most; used is None without the model's tokenizer."""
        keys = ["prompt"]
        for bit in tokens.prompt_bits if layout.regions else ():
            is_background = bit == BACKGROUND_BIT
            keys.append("background_prompt" if is_background else f"regions[{bit}].prompt")
        found = []
        for key, prompt in zip(keys, [layout.prompt, *tokens.prompts]):
            limit = layout.region_max_sequence_length
            if key == "prompt":
                limit = layout.max_sequence_length
            used = self.length(prompt) if self.t5 else None
            found.append({"key": key, "used": used, "limit": limit})
        return found


def with_prompts(data: Data, missing: list[int]) -> Data:
    """A layout whose regions are just drawn, to see their tokens."""
    regions = [*data["regions"]]
    for i in missing:
        regions[i] = regions[i] | {"prompt": "-"}
    return data | {"regions": regions}


def check_names(value: Any, depth: int = 0) -> None:
    """InputError for keys that no layout file can have, and for deep nesting."""
    if depth > DEEPEST:
        raise InputError("the layout", "...", f"nested deeper than {DEEPEST} levels")
    if isinstance(value, dict):
        for key in value:
            if not re.fullmatch(NAME, key):
                raise InputError("the layout", key, "no key of a layout can have this name")
    for part in value.values() if isinstance(value, dict) else value:
        if isinstance(part, dict | list):
            check_names(part, depth + 1)


def mistake(error: InputError) -> Data:
    key = "" if isinstance(error.key, Path) else str(error.key)
    return {"key": key, "text": str(error)}


def key_of(warning: str) -> str:
    """The key that a sentence starts with; empty for others."""
    found = re.match(KEY, warning)
    key = found[0] if found else ""
    return key if re.split(r"[.\[]", key)[0] in Layout.__struct_fields__ else ""


def runs(tokens: RegionTokens, width: int) -> Data:
    """The grid, row by row: [count, regions ...] for tokens of the same regions side by side;
    no region: background."""
    bits = tokens.image_bits.numpy()
    starts = np.flatnonzero(np.diff(bits, prepend=~bits[0]))
    counts = np.diff([*starts, len(bits)])
    sets = {}
    for value in np.unique(bits).tolist():
        sets[value] = [i for i in range(BACKGROUND_BIT) if value >> i & 1]
    found = [[count, *sets[bits[i]]] for count, i in zip(counts.tolist(), starts)]
    return {"width": width, "height": len(bits) // width, "runs": found}


def areas(tokens: RegionTokens, count: int) -> list[Data]:
    """Each region's tokens and fraction of the image."""
    cover = tokens.cover.numpy()
    inside = (cover > 0).sum(axis=1).tolist()
    fraction = cover.mean(axis=1).tolist()
    found = zip(inside[:count], fraction)
    return [{"tokens": number, "fraction": round(part, 4)} for number, part in found]
