"""Before a run: layouts checked, previewed, or planned by a language model."""

from collections.abc import Callable
from pathlib import Path

import weights
from errors import InputError, print_error, shown, warn
from formats import components
from formats.hub import is_repository
from model.tokenizers import T5Tokenizer
from model.transformer import FluxParams
from regional.layout import FLUX_DEV, Defaults, Layout
from regional.mask import region_tokens
from settings import MODEL_KEYS
from tools.flags import Command
from tools.jobs import check_output, inputs_of, layout_files
from tools.metadata import check_suffix, check_writable, write
from tools.plan import plan, write_plan
from tools.preview import preview, report


def run_dry(command: Command, read: Callable[..., Layout]) -> int:
    """A dry run; returns the exit code. read: gives a layout by its file, overrides and size."""
    _, overrides, output, dry_run, _ = command
    if dry_run.plan is None:
        return check_layouts(command, read)
    file = Path(output.output or "plan.yaml")
    check_writable(file, output.overwrite)
    size = [overrides.get(key, 1024) for key in ("width", "height")]
    found = plan(dry_run.plan, *size, dry_run.llm_url, dry_run.llm_model)
    write_plan(found, file, output.overwrite)
    print(shown(file))
    return 0


def check_layouts(command: Command, read: Callable[..., Layout]) -> int:
    """--check and --preview, without reading weights."""
    settings, _, output, dry_run, _ = command
    files = layout_files(output)
    checkpoint = None  # A repository's headers may not be at hand.
    if not is_repository(settings.model):
        checkpoint = weights.find(*(getattr(settings, key) for key in MODEL_KEYS))
    params = components.flux_params(checkpoint.flux) if checkpoint else FluxParams()
    defaults = Defaults(**components.model_defaults(checkpoint.flux)) if checkpoint else FLUX_DEV
    layouts = []
    for file in files:
        try:
            layout = read(file, {}, defaults.size).filled(defaults)
        except InputError as error:
            print_error(error)
            continue
        layouts.append((file, layout))
        if dry_run.check:
            lengths = prompt_lengths(layout.styled(), checkpoint.t5_tokenizer) if checkpoint else None
            text, warnings = report(layout, params, lengths)
            print(f"{file or 'the command line'}: valid", text, sep="\n")
            for warning in warnings:
                warn(warning)
    inputs = inputs_of(command, [layout for _, layout in layouts])
    for file, layout in layouts if dry_run.preview else ():
        path = dry_run.preview
        if len(layouts) > 1:
            path = path.with_stem(f"{path.stem}_{file.stem}")
        check_suffix("--preview", path)
        check_output("--preview", path, inputs)
        check_writable(path, output.overwrite)
        write(path, preview(layout).save)
        print(shown(path))
    return 0 if len(layouts) == len(files) else 2


def prompt_lengths(layout: Layout, tokenizer: Path) -> list[int]:
    """The tokens of each prompt, the background's included, with the end token."""
    prompts = region_tokens(layout).prompts if layout.regions else []
    encode = T5Tokenizer(tokenizer).encode
    return [len(encode(prompt)[0]) + 1 for prompt in (layout.prompt, *prompts)]
