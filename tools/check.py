"""Before a run: layouts checked, previewed, edited, or planned by a language model."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import weights
from errors import InputError, info, print_error, shown, warn
from extensions.extras import check_together
from formats import components
from formats.hub import is_repository
from formats.known import doubts, known_of
from model.tokenizers import T5Tokenizer
from model.transformer import FluxParams
from regional.layout import FLUX_DEV, Defaults, Layout
from regional.mask import region_tokens
from settings import MODEL_KEYS, Settings
from tools.cost import evaluations, resolved, stages
from tools.flags import Command, naming
from tools.jobs import POCKET, check_output, inputs_of, layout_files, read
from tools.metadata import check_suffix, check_writable, conditions, read_timings, write
from tools.plan import plan, write_plan
from tools.preview import grid_tokens, preview, report


def run_dry(command: Command, make: Callable[[Settings], Any]) -> int:
    """A dry run; returns the exit code. make: Pipeline, for the editor."""
    settings, overrides, output, dry_run, _ = command
    if dry_run.edit:
        from tools.editor import edit

        return edit(command, make)
    checkpoint = None  # A repository's headers may not be at hand.
    defaults = FLUX_DEV
    if not is_repository(settings.model):
        checkpoint = weights.find(*(getattr(settings, key) for key in MODEL_KEYS))
        defaults = Defaults(**components.model_defaults(checkpoint.flux))
    if dry_run.plan is None:
        return check_layouts(command, checkpoint, defaults)
    file = Path(output.output or "plan.yaml")
    check_suffix("--output", file, (".yaml", ".yml"))
    check_writable(file, output.overwrite)
    size = [overrides.get(key, defaults.size) for key in ("width", "height")]
    if checkpoint and checkpoint.name == "pocket":
        info(POCKET)
    known = known_of(checkpoint.flux if checkpoint else None)
    found = plan(dry_run.plan, *size, dry_run.llm_url, dry_run.llm_model, known=known)
    write_plan(found, file, output.overwrite)
    print(shown(file))
    return 0


def check_layouts(command: Command, checkpoint: Any, defaults: Defaults) -> int:
    """--check and --preview, without reading weights."""
    settings, _, output, dry_run, _ = command
    files = layout_files(output)
    flux = checkpoint.flux if checkpoint else None
    t5 = T5Tokenizer(checkpoint.t5_tokenizer) if checkpoint and dry_run.check else None
    params = components.flux_params(flux) if flux else FluxParams()
    layouts = []
    for file in files:
        try:
            layout = read(command, file, {}, defaults.size).filled(defaults)
            if flux:
                with naming(file, command.overrides):
                    check_together(layout, params)
        except InputError as error:
            print_error(error)
            continue
        layouts.append((file, layout))
        if dry_run.check:
            lengths = prompt_lengths(layout.styled(), t5) if t5 else None
            text, warnings = report(layout, params, lengths)
            text += estimate(layout, params, settings)
            print(f"{file or 'the command line'}: valid", text, sep="\n")
            for warning in [*warnings, *doubts([layout.resolved(defaults)], flux, t5)]:
                warn(warning)
    inputs = inputs_of(command, [layout for _, layout in layouts])
    drawn = set()
    for file, layout in layouts if dry_run.preview else ():
        path = dry_run.preview
        if len(files) > 1:
            path = path.with_stem(f"{path.stem}_{file.stem}")
        if path in drawn:
            raise InputError("--preview", path, "several layouts would have this name")
        drawn.add(path)
        check_suffix("--preview", path)
        check_output("--preview", path, inputs)
        check_writable(path, output.overwrite)
        write(path, preview(layout).save)
        print(shown(path))
    return 0 if len(layouts) == len(files) else 2


def prompt_lengths(layout: Layout, t5: T5Tokenizer) -> list[int]:
    """The tokens of each prompt, the background's included, with the end token."""
    prompts = region_tokens(layout).prompts if layout.regions else []
    return [len(t5.encode(prompt)[0]) + 1 for prompt in (layout.prompt, *prompts)]


def estimate(layout: Layout, params: FluxParams, settings: Settings) -> str:
    """A line on what it takes, by this machine's latest run, of this size if there is one."""
    size = (layout.width, layout.height)
    way = conditions(settings)
    runs = [run for key, run in read_timings().items() if key.startswith(way)]
    runs.sort(key=lambda run: (run.layout.width, run.layout.height) == size)
    with suppress(Exception):  # There is none; its mask is gone; another version's layout.
        run = runs[-1]
        seconds = run.seconds * work(layout, params) / work(run.layout, params, 1)
        time = f"{seconds:.{int(seconds < 10)}f} s"
        if seconds >= 7200:
            time = f"{seconds / 3600:,.0f} hours"
        text = f"\nsteps: about {time}"
        if (run.layout.width, run.layout.height) == size and run.memory:
            text += f" and {run.memory / 1e9:.1f} GB on the GPU"
        return f"{text}, from a run of {run.layout.width} x {run.layout.height} here"
    return ""


def work(layout: Layout, params: FluxParams, start: int = 0) -> int:
    """The FLOPs of the steps from this one on."""
    layout = resolved(layout, params)
    total = 0
    for end, flops, _ in stages(layout, params, grid_tokens(layout)):
        end = max(start, end)
        total += evaluations(layout, start, end) * flops
        start = end
    return total
