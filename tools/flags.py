"""The command line: its flags are the fields of Output, DryRun, Settings, Layout and Control."""

import argparse
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec
from msgspec import Struct, inspect

from errors import MISSING, InputError
from regional.layout import Control, Layout
from regional.reader import CONTROL_FLAGS
from settings import MODEL_KEYS, Settings, about, recorded
from tools.metadata import read_metadata

ABOUT = """Layouts in, images out.

    python generate.py --layout layout.yaml"""
NO_FLAGS = ("seed", "map", "loras", "controlnets", "regions")  # keys of Layout
TYPES = {inspect.IntType: int, inspect.FloatType: float, inspect.StrType: str}
TYPES |= {inspect.CustomType: Path}
FIELDS = "{name}, {seed} and {sweep}"
Text = str | None
File = Path | None
Paths = tuple[Path, ...]


class Output(Struct, frozen=True, kw_only=True):
    """Which images the command line asks for, and what is written of each."""

    layout: Annotated[Paths, about("layout files, or folders of them")] = ()
    output: Annotated[Text, about(f"may contain {FIELDS}; default: the layout's name, .png")] = None
    overwrite: Annotated[bool, about("replace existing files")] = False
    seed: Annotated[tuple[int, ...], about("one image for each, named _SEED")] = ()
    sweep: Annotated[tuple[str, ...], about("KEY=A,B: an image for each value, and a sheet")] = ()
    save_latents: Annotated[Text, about("also write the latents, .safetensors")] = None
    attention_maps: Annotated[File, about("also write maps of attention to this folder")] = None
    metadata: Annotated[bool, about("also write the metadata next to the image, .json")] = False
    no_metadata: Annotated[bool, about("do not embed the metadata in the image")] = False
    config_from_metadata: Annotated[File, about("repeat the run that an image records")] = None
    shard: Annotated[Text, about("I/N: every N-th image from I; or torchrun's, SLURM's")] = None


class DryRun(Struct, frozen=True, kw_only=True):
    """What to do instead of generating images."""

    check: Annotated[bool, about("validate the layouts and print what they cost")] = False
    preview: Annotated[File, about("draw the regions into this image file")] = None
    plan: Annotated[Text, about("have a language model write a layout for a prompt")] = None
    llm_url: Annotated[Text, about("OpenAI-compatible endpoint; default: OPENAI_BASE_URL")] = None
    llm_model: Annotated[Text, about("the language model's name; its key: OPENAI_API_KEY")] = None


class Command(NamedTuple):
    """A parsed command line. overrides: keys of the layout. metadata: of an image to repeat."""

    settings: Settings
    overrides: dict[str, Any]
    output: Output
    dry_run: DryRun
    metadata: dict[str, Any] | None


def parse(argv: list[str] | None = None) -> Command:
    parser = make_parser()
    given = vars(parser.parse_args(argv))

    def of(struct: type[Struct]) -> dict[str, Any]:
        return {key: given[key] for key in struct.__struct_fields__ if key in given}

    output = msgspec.convert(of(Output), Output)
    dry_run = DryRun(**of(DryRun))
    overrides = {key: value for key, value in of(Layout).items() if key != "seed"}
    if "lora" in given:
        overrides["loras"] = [lora_of(parser, values) for values in given["lora"]]
    control = {key: given[flag] for key, flag in CONTROL_FLAGS.items() if flag in given}
    if control:
        overrides["controlnets"] = [control]
    if control and not {"model", "image"} <= control.keys():
        parser.error("a ControlNet needs both --controlnet and --control-image")
    if "parallel" in given and (output.shard or output.attention_maps):
        parser.error("--parallel goes with neither --shard nor --attention-maps")
    if output.layout and output.config_from_metadata:
        parser.error("give a --layout or --config-from-metadata, not both")
    if not (output.layout or output.config_from_metadata or dry_run.plan or "prompt" in overrides):
        parser.error("give a --layout, or at least a --prompt")
    settings = of(Settings)
    metadata = None
    if output.config_from_metadata:
        metadata = read_metadata(output.config_from_metadata)
        found = repeated(metadata, output.config_from_metadata)
        if settings.keys() & set(MODEL_KEYS):  # Files of one model are not mixed with another's.
            found = {key: value for key, value in found.items() if key not in MODEL_KEYS}
        settings = found | settings
    return Command(Settings(**settings), overrides, output, dry_run, metadata)


def make_parser() -> argparse.ArgumentParser:
    layout_keys = [key for key in Layout.__struct_fields__ if key not in NO_FLAGS]
    how = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=ABOUT, formatter_class=how)
    add_flags(parser, Output)
    add_flags(parser.add_argument_group("dry run"), DryRun)
    add_flags(parser.add_argument_group("model"), Settings)
    control = parser.add_argument_group("one ControlNet, which replaces the layout's")
    add_flags(control, Control, CONTROL_FLAGS)
    overrides = parser.add_argument_group("overrides of the layout's keys")
    add_flags(overrides, Layout, {key: key for key in layout_keys})
    overrides.add_argument(
        "--lora", action="append", nargs="+", metavar=("FILE", "SCALE"), default=argparse.SUPPRESS,
        help="a LoRA for the whole image, which replaces the layout's: a file, or org/name or "
        "org/name:file of a repository, and its scale; repeatable")  # fmt: skip
    return parser


def add_flags(group: Any, struct: type[Struct], names: dict[str, str] | None = None) -> None:
    """A flag for each field of a struct, or for those in `names`, by the field's type and text."""
    for field in inspect.type_info(struct).fields:
        name = names.get(field.name) if names else field.name
        if name is None:
            continue
        kind = field.type
        text = ""
        while isinstance(kind, inspect.Metadata):
            text = text or (kind.extra_json_schema or {}).get("description", "")
            kind = kind.type
        kinds = getattr(kind, "types", (kind,))
        how: dict[str, Any] = {"help": text.replace("%", "%%"), "default": argparse.SUPPRESS}
        choices = [value for each in kinds for value in getattr(each, "values", ()) if value]
        if isinstance(kind, inspect.BoolType):
            how["action"] = argparse.BooleanOptionalAction if name == "compile" else "store_true"
        elif choices:
            how["choices"] = choices
        elif isinstance(kind, inspect.VarTupleType):
            how |= {"action": "extend", "nargs": "+"}
            kinds = (kind.item_type,)
        types = [TYPES[type(each)] for each in kinds if type(each) in TYPES]
        if types:
            how["type"] = count_or_percentage if types == [int, str] else types[0]
            how["metavar"] = "N" if int in types else name.rpartition("_")[2].upper()
        group.add_argument("--" + name.replace("_", "-"), **how)


def count_or_percentage(text: str) -> int | str:
    return int(text) if text.lstrip("-").isdigit() else text


def lora_of(parser: argparse.ArgumentParser, values: list[str]) -> dict[str, Any]:
    file, *scale = values
    try:
        return {"file": file, "scale": float(*scale)} if scale else {"file": file}
    except (TypeError, ValueError):
        parser.error(f"argument --lora: expected a file and a scale, not {' '.join(values)}")


def repeated(metadata: dict[str, Any], file: Path) -> dict[str, Any]:
    """The settings of the run that an image records; InputError names the image's file."""
    settings = recorded(metadata)
    try:
        Settings(**settings).checked()
    except InputError as error:
        raise InputError(file, MISSING, f"in its metadata, {error}") from None
    return settings
