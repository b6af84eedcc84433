"""The command line: flags are the fields of Output, DryRun, Settings, Layout and Control."""

import argparse
import difflib
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple, NoReturn, get_type_hints

import msgspec
from msgspec import Struct, inspect

from errors import MISSING, InputError, flag
from regional.layout import Control, Layout, Start
from settings import Name, Settings

ABOUT = "Layouts in, images out. A layout's keys may also be given as flags."
USAGE = "python generate.py --layout layout.yaml [--seed 1-5] [--output FILE] [more flags]"
LORA = "a LoRA for the whole image, as --controlnet, and its scale; repeatable"
NO_FLAGS = ("seed", "map", "loras", "controlnets", "regions")  # keys of Layout
NO_FLAGS = (*NO_FLAGS, "image", "control_image", "image_prompts")
LAYOUT_FLAGS = {key: key for key in Layout.__struct_fields__ if key not in NO_FLAGS}
START_FLAGS = {"file": "image", "denoise": "denoise"}
CONTROL_FLAGS = {key: f"control_{key}" for key in ("image", "mode", "scale", "start", "end")}
CONTROL_FLAGS = {"model": "controlnet", **CONTROL_FLAGS, "preprocess": "preprocess"}
GROUPS = {  # of --help, by their first flags
    "layout": "images",
    "save_latents": "files beside an image, and making one again",
    "check": "in place of images",
    "model": "the model",
    "device": "speed and memory",
    "prompt": "what is drawn",
    "base_ratio": "how regions are kept apart",
    "image": "an image to start from",
    "controlnet": "a ControlNet and LoRAs, which replace the layout's",
}
TYPES = {
    inspect.IntType: int,
    inspect.FloatType: float,
    inspect.StrType: str,
    inspect.CustomType: Path,
}
File = Path | None
Replay = Callable[..., tuple[dict[str, Any], dict[str, Any]]]


class Output(Struct, frozen=True, kw_only=True):
    """Which images the command line asks for, and what is written of each."""

    layout: Annotated[tuple[Path, ...], "layout files, or folders of them"] = ()
    output: Annotated[Name, "may contain {name}, {seed}, {sweep}; default: {name}.png"] = None
    overwrite: Annotated[bool, "replace existing files"] = False
    update: Annotated[bool, "draw again what a changed layout drew before"] = False
    same_code: Annotated[bool, "and what another version of this program drew"] = False
    seed: Annotated[tuple[int, ...], "1 2 3 or 1-90: one image for each, named _seedN"] = ()
    sweep: Annotated[tuple[str, ...], "KEY=A,B: an image for each value, and a sheet"] = ()
    shard: Annotated[Name, "I/N: every N-th image from I; or torchrun's, SLURM's"] = None
    save_latents: Annotated[Name, "also write the latents, .safetensors"] = None
    attention_maps: Annotated[File, "also write maps of attention to this folder"] = None
    metadata: Annotated[bool, "also write the metadata next to the image, .json"] = False
    no_metadata: Annotated[bool, "do not embed the metadata in the image"] = False
    config_from_metadata: Annotated[File, "repeat the run that an image records"] = None
    repaint: Annotated[tuple[int, ...], "draw only these regions of that image anew"] = ()
    region_prompt: Annotated[tuple[str, ...], "I TEXT: another prompt for region I of it"] = ()
    trust_metadata: Annotated[bool, "whatever models and files the metadata name"] = False
    decode: Annotated[File, "draw the latents that --save-latents wrote"] = None
    log: Annotated[File, "append a line for each image to this .jsonl file"] = None


class DryRun(Struct, frozen=True, kw_only=True):
    """What to do instead of generating images."""

    check: Annotated[bool, "validate the layouts and print what they cost"] = False
    preview: Annotated[File, "draw the regions into this image file"] = None
    edit: Annotated[File, "edit this layout, a folder's or an image's in the browser"] = None
    host: Annotated[Name, "the editor's address; default: 127.0.0.1, this machine alone"] = None
    plan: Annotated[Name, "have a language model write a layout for a prompt"] = None
    llm_url: Annotated[Name, "OpenAI-compatible endpoint; default: OPENAI_BASE_URL"] = None
    llm_model: Annotated[Name, "the language model's name; its key: OPENAI_API_KEY"] = None


class Command(NamedTuple):
    """overrides: keys of layouts. recorded: those of an image to repeat."""

    settings: Settings
    overrides: dict[str, Any]
    output: Output
    dry_run: DryRun
    recorded: dict[str, Any] | None


@contextmanager
def naming(file: Path | None, overrides: dict[str, Any]) -> Iterator[None]:
    """Within it, an InputError about a layout's key gets its file, or the key's flag."""
    here = "the command line"
    try:
        yield
    except InputError as error:
        for mistake in getattr(error, "errors", [error]):
            parts = re.match(r"(?s)(\w*)(\[\d+\])?\.?(\w*)(.*)", str(mistake.key))
            key, entry, field, rest = parts.groups()
            flags = {"loras": "lora"}
            flags["controlnets"] = CONTROL_FLAGS.get(field, "controlnet")
            flags["image"] = START_FLAGS.get(field, "image")
            if key in overrides and (key in flags or not entry):
                mistake.key = flag(flags.get(key, key)) + rest
                mistake.source = here
            mistake.within(file or here)
        raise


def parse(argv: list[str] | None = None, replay: Replay | None = None) -> Command:
    """replay: tools.replay.replayed, for the flags that need it."""
    parser = make_parser()
    given = vars(parser.parse_args(argv))
    if "seed" in given:
        given["seed"] = [seed for part in given["seed"] for seed in part]

    def of(struct: type[Struct]) -> dict[str, Any]:
        return {key: given[key] for key in struct.__struct_fields__ if key in given}

    output = msgspec.convert(of(Output), Output)
    dry_run = DryRun(**of(DryRun))
    overrides = {key: given[key] for key in LAYOUT_FLAGS if key in given}
    if "lora" in given:
        overrides["loras"] = [lora_of(parser, values) for values in given["lora"]]
    start = {key: given[name] for key, name in START_FLAGS.items() if name in given}
    if start and not output.repaint:
        overrides["image"] = start
        if "file" not in start:
            parser.error("--denoise goes with --image or --repaint")
    if output.repaint and "file" in start:
        parser.error("--repaint is of the image of --config-from-metadata, not of an --image")
    if (output.repaint or output.region_prompt) and not output.config_from_metadata:
        parser.error("--repaint and --region-prompt go with --config-from-metadata")
    control = {key: given[name] for key, name in CONTROL_FLAGS.items() if name in given}
    if control.keys() == {"image"}:
        overrides["control_image"] = control.pop("image")
    if control:
        overrides["controlnets"] = [control]
        if not {"model", "image"} <= control.keys():
            parser.error("a ControlNet needs both --controlnet and --control-image")
    if "parallel" in given and (output.shard or output.attention_maps):
        parser.error("--parallel goes with neither --shard nor --attention-maps")
    file = output.config_from_metadata or output.decode
    if bool(output.layout) + bool(output.config_from_metadata) + bool(output.decode) > 1:
        parser.error("give one of --layout, --config-from-metadata and --decode")
    if output.same_code and not output.update:
        parser.error("--same-code goes with --update")
    if dry_run.edit and (overrides or of(Output)):
        parser.error("--edit goes with flags of the model and of speed alone")
    if dry_run.host and not dry_run.edit:
        parser.error("--host goes with --edit")
    is_dry = dry_run.plan or dry_run.edit
    if not (output.layout or file or is_dry or "prompt" in overrides):
        parser.error("give a --layout, or at least a --prompt")
    settings = of(Settings)
    keys = None
    if file:
        again = sys.argv[1:] if argv is None else argv
        settings, keys = replay(output, settings, overrides, again)
        if output.repaint:
            area = {"repaint": {"regions": output.repaint}}
            keys["image"] = {"file": str(file), **area, **start}
    return Command(Settings(**settings), overrides, output, dry_run, keys)


class Parser(argparse.ArgumentParser):
    """Mistakes are InputErrors, without the usage."""

    def error(self, message: str) -> NoReturn:
        key, _, problem = message.removeprefix("argument ").partition(": ")
        if key == "unrecognized arguments":
            key = re.split(r"[\s=]", problem)[0]
            close = difflib.get_close_matches(key, self._option_string_actions, 1)
            problem = ", did you mean ".join(["no such flag", *close])
        raise InputError(key, MISSING, f"{problem}; see --help".lstrip("; "))


def make_parser() -> Parser:
    how = partial(argparse.HelpFormatter, max_help_position=34)
    parser = Parser(usage=USAGE, description=ABOUT, formatter_class=how)
    add_flags(parser, Output)
    add_flags(parser, DryRun)
    add_flags(parser, Layout, LAYOUT_FLAGS)
    add_flags(parser, Start, START_FLAGS)
    add_flags(parser, Settings)
    group = add_flags(parser, Control, CONTROL_FLAGS)
    how = {"action": "append", "nargs": "+", "metavar": ("FILE", "SCALE")}
    group.add_argument("--lora", help=LORA, default=argparse.SUPPRESS, **how)
    return parser


def add_flags(parser: Parser, struct: type[Struct], names: dict[str, str] | None = None) -> Any:
    """Flags for a struct's keys, all or those in `names`, by their types and descriptions; the
    last one's group."""
    hints = get_type_hints(struct, include_extras=True)
    fields = {field.name: field.type for field in inspect.type_info(struct).fields}
    for key, name in (names or dict(zip(fields, fields))).items():
        if name in GROUPS:
            group = parser.add_argument_group(GROUPS[name])
        kind = fields[key]
        kinds = getattr(kind, "types", (kind,))
        text = hints[key].__metadata__[-1].replace("%", "%%")
        how: dict[str, Any] = {"help": text, "default": argparse.SUPPRESS}
        if isinstance(kind, inspect.BoolType):
            how["action"] = "store_true"
            if key == "compile":
                how["action"] = argparse.BooleanOptionalAction
        elif isinstance(kind, inspect.VarTupleType):
            how |= {"action": "extend", "nargs": "+"}
            kinds = (kind.item_type,)
        choices = [value for each in kinds for value in getattr(each, "values", ()) if value]
        types = [TYPES[type(each)] for each in kinds if type(each) in TYPES]
        if types:
            is_count = types[0] is int and (choices or str in types)
            how["type"] = count_or_text if is_count else types[0]
            if key == "seed":
                how["type"] = seeds
            how["metavar"] = "N" if int in types else name.rpartition("_")[2].upper()
        elif choices:
            how["choices"] = choices
        group.add_argument(flag(name), **how)
    return group


def count_or_text(text: str) -> int | str:
    return int(text) if text.lstrip("-").isdigit() else text


def seeds(text: str) -> range:
    """Of 7 or 1-90."""
    if found := re.fullmatch(r"([0-9]{1,19})(?:-([0-9]{1,19}))?", text):
        low, high = int(found[1]), int(found[2] or found[1])
        if low <= high < min(low + 100_000, 2**63):
            return range(low, high + 1)
    raise argparse.ArgumentTypeError(f"expected seeds, such as 1 2 3 or 1-90, not {text}")


def lora_of(parser: argparse.ArgumentParser, values: list[str]) -> dict[str, Any]:
    file, *scale = values
    try:
        return {"file": file, "scale": float(*scale)} if scale else {"file": file}
    except (TypeError, ValueError):
        parser.error(f"argument --lora: expected a file and a scale, not {' '.join(values)}")
