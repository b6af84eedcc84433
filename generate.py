"""Layouts in, pictures out.

    python generate.py --layout layout.yaml

reads the layout, encodes its prompts, denoises (the first steps regionally, the rest plainly), decodes and writes the
picture. What is not needed any more is dropped before the next part of the model is loaded. Of many layouts the prompts
are encoded first, then every picture is written as soon as it is made; a run that was stopped goes on where it was.
"""

import argparse
import contextlib
import glob
import itertools
import os
import random
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

STARTED = time.perf_counter()  # what is imported below takes a while

import torch
import yaml
from PIL import Image

import weights
from model.errors import InputError
from model.transformer import FluxParams
from regional.layout import CONTROL_FLAGS, MODES, Layout, Where, naming, read_layout
from regional.maps import AttentionMaps
from regional.outputs import (
    SUFFIXES,
    carried_by,
    check_writable,
    is_made_by,
    made_of,
    remove_unfinished,
    save_json,
    save_picture,
    save_tensor,
    say,
    settings,
    write,
)  # fmt: skip
from regional.pipeline import (
    ATTENTIONS,
    DTYPES,
    OFFLOAD,
    QUANTIZE,
    Pipeline,
    Prepared,
    text_lengths,
    with_model_defaults,
)
from regional.sheets import contact_sheet

SWEPT = (
    "base_ratio", "mask_inject_steps", "double_inject_interval", "single_inject_interval", "guidance", "steps",
    "method", "preset", "region_max_sequence_length",
)  # fmt: skip
MODEL_FLAGS = ("model", "flux", "t5", "clip", "ae")
CHUNK = 100  # layouts whose prompts are encoded together: at full size some 2 GB of memory


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--layout", type=Path, nargs="+", default=[], metavar="FILE", help="layouts, YAML files or folders of them; "
        "the flags below win over what they say")  # fmt: skip
    add("--output", metavar="FILE", help=".png, .jpg or .webp; {name}, {seed} and {sweep} in it are filled in; "
        "default: the layout's name, .png")  # fmt: skip
    add("--overwrite", action="store_true", help="replace an existing output")
    add("--save-latents", metavar="FILE", help="also write the latents before decoding (.safetensors)")
    add("--sweep", action="append", default=[], metavar="KEY=A,B", help="draw once for each value of this key, and a "
        "sheet of all; two sweeps draw all their combinations")  # fmt: skip
    add("--attention-maps", type=Path, metavar="DIR", help="also draw where each region's text is looked at")
    add("--metadata", action="store_true", help="also write what made a picture beside it, .json")
    add("--no-metadata", action="store_true", help="write nothing of it into the picture")
    add("--config-from-metadata", type=Path, metavar="PICTURE", help="make a picture again by what it carries")
    add("--shard", metavar="I/N", help="make only every N-th picture, from the I-th on, counted from 0; default: "
        "torchrun's or SLURM's rank")  # fmt: skip
    add("--prompt-cache", type=Path, metavar="DIR", help="keep encoded prompts here, for the next run")

    before = parser.add_argument_group("before paying")
    add = before.add_argument
    add("--preview", type=Path, metavar="FILE", help="draw the regions, without any model, and stop")
    add(
        "--check",
        action="store_true",
        help="check the layouts, say what they cost, and stop; exit code 0 if all are valid",
    )
    add("--plan", metavar="PROMPT", help="let a language model write a layout to --output, a .yaml, and stop; its "
        "key is OPENAI_API_KEY of the environment")  # fmt: skip
    add("--llm-url", metavar="URL", help="an OpenAI-compatible endpoint; default: OPENAI_BASE_URL of the environment")
    add("--llm-model", metavar="NAME")

    model = parser.add_argument_group("model")
    add = model.add_argument
    add("--model", help="a folder, a Hugging Face repository, or pocket, the built-in model (default)")
    for part in ("flux", "t5", "clip", "ae"):
        add(f"--{part}", metavar="PATH", help=f"take the {part} part from this file or folder")
    add("--device", default="auto", choices=["auto", "cuda", "cpu", "mps"])
    add("--dtype", default="auto", choices=["auto", *DTYPES], help="auto: float32 on a CPU, else bfloat16")
    add("--attention", default="auto", choices=["auto", *ATTENTIONS],
        help="how masked attention is computed; auto: the kernel on CUDA, where it needs a C "
        "compiler, else portable")  # fmt: skip
    add("--verbose", action="store_true", help="say which attention functions are used")
    add("--compile", action=argparse.BooleanOptionalAction, help="let torch.compile make the blocks: a minute more at "
        "the start, faster from then on")  # fmt: skip
    add("--quantize", default="auto", choices=QUANTIZE, help="fp8: the transformer's matrices in 8 "
        "bits; auto: if its file has them so and the GPU multiplies them")  # fmt: skip
    add("--offload", default="auto", choices=OFFLOAD, help="blocks: keep the transformer's and T5's "
        "blocks in host memory and copy each to the GPU ahead of its turn; auto: as many of them "
        "as do not fit")  # fmt: skip
    add("--parallel", choices=["ulysses"], help="share each picture's work out to the processes, one for each GPU, "
        "that torchrun --nproc-per-node N generate.py ... starts")  # fmt: skip

    add("--lora", dest="loras", action="append", nargs="+", metavar=("FILE", "SCALE"), default=argparse.SUPPRESS,
        help="a LoRA for the whole picture: a file, or a repository, org/name or org/name:file, and its scale; "
        "repeatable; in place of the layout's loras")  # fmt: skip

    control = parser.add_argument_group("one ControlNet, in place of the layout's", argument_default=argparse.SUPPRESS)
    add = control.add_argument
    add("--controlnet", metavar="MODEL", help="a file or folder, or a repository, org/name or org/name:file")
    add("--control-image", metavar="FILE", help="the picture that it follows")
    add("--control-mode", type=count_or_share, metavar="M", help=f"for union models: a number, or {', '.join(MODES)}")
    for key, meaning in ("scale", "default 0.7"), ("start", "share of the steps, from 0"), ("end", "and to 1"):
        add(f"--control-{key}", type=float, metavar="X", help=meaning)
    add("--preprocess", choices=["canny"], help="follow the edges in the picture (pip install opencv-python-headless)")

    layout = parser.add_argument_group("in place of the layout's keys", argument_default=argparse.SUPPRESS)
    add = layout.add_argument
    add("--prompt", help="the base prompt; enough for a picture without a layout")
    add("--background-prompt", metavar="PROMPT")
    add("--seed", type=int, nargs="+", metavar="N", help="several seeds make several pictures, named _SEED")
    for key in ("width", "height", "steps", "double-inject-interval", "single-inject-interval", "max-sequence-length"):
        add(f"--{key}", type=int, metavar="N")
    for key in ("guidance", "base-ratio"):
        add(f"--{key}", type=float, metavar="X")
    add("--mask-inject-steps", type=count_or_share, metavar="N", help="a count, or a share such as 40%%")
    add("--region-max-sequence-length", type=count_or_share, metavar="N", help="a count, or a share such as 25%%")
    add("--preset", choices=["published", "control"], help="control: settings that hold many regions better")
    add("--overlap", choices=["share", "last", "first", "smallest"])
    add("--image-attention", choices=["isolated", "open"], help="open: all image tokens see each other")
    add("--base-stream", choices=["separate", "shared"], help="shared: cheaper, not the published method")
    for kind in ("double", "single"):
        add(f"--{kind}-blocks", metavar="WHICH", help="which are masked: 'every 2', 0-18 or 0-4,8")
    add("--method", choices=["regional", "rpg", "plain"], help="rpg: compose whole pictures, as the paper's rival does")
    args = parser.parse_args(argv)
    if "loras" in args:
        args.loras = [lora_flag(parser, values) for values in args.loras]
    if control := {key: vars(args)[flag] for key, flag in CONTROL_FLAGS.items() if flag in args}:
        if not {"model", "image"} <= control.keys():
            parser.error("a ControlNet needs both --controlnet and --control-image")
        args.controlnets = [control]
    if args.parallel and (args.shard or args.attention_maps):
        parser.error("--parallel goes with neither --shard nor --attention-maps")
    if args.layout and args.config_from_metadata:
        parser.error("give a --layout or --config-from-metadata, not both")
    if not (args.layout or args.config_from_metadata or args.plan or "prompt" in args):
        parser.error("give a --layout, or at least a --prompt")
    return args


def count_or_share(text: str) -> int | str:
    return int(text) if text.lstrip("-").isdigit() else text


def lora_flag(parser: argparse.ArgumentParser, values: list[str]) -> dict[str, Any]:
    file, *scale = values
    try:
        return {"file": file, "scale": float(*scale)} if scale else {"file": file}
    except (TypeError, ValueError):
        parser.error(f"argument --lora: expected a file and perhaps its scale, a number, not {' '.join(values)}")


class Names(NamedTuple):
    """What goes into a picture's name: its layout's, and where there are others, the swept settings and the seed."""

    name: str
    sweep: tuple[str, ...]
    seed: tuple[str, ...]


class Job(NamedTuple):
    """One picture. where: how messages name its layout's keys. sheet: where the sheet of its sweep goes."""

    names: Names
    where: Where
    layout: Layout
    seed: int
    output: Path
    latents: Path | None
    sheet: Path | None


class Stop:
    """Ctrl-C and SIGTERM: the first lets the running step end, the second ends at once."""

    def __init__(self):
        self.steps, self.asked, self.asked_anywhere = 0, False, lambda asked: asked

    def __enter__(self) -> "Stop":
        self.before = {kind: signal.signal(kind, self.ask) for kind in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: object) -> None:
        for kind, handler in self.before.items():
            signal.signal(kind, handler)

    def ask(self, *signal_and_frame: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        say("generate.py: stopping after this step")

    def check(self) -> None:
        if self.asked_anywhere(self.asked):
            raise KeyboardInterrupt

    def after_step(self) -> None:
        self.steps += 1
        if self.steps == 1:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            say(f"the first step ended {time.perf_counter() - STARTED:.1f} s after the start")
        self.check()


def main(argv: list[str] | None = None) -> int:
    """Run the program; returns its exit code: 0, 2 for bad input, 1 for what the machine refuses or when some of many
    layouts failed, 130 for Ctrl-C and SIGTERM."""
    args = parse_args(argv)
    try:
        with Stop() as stop:
            return run(args, stop)
    except InputError as error:
        if not (args.parallel and os.environ.get("RANK", "0") != "0"):  # the first process says it for all
            say(f"generate.py: {error}")
        return 2
    except OSError as error:
        say(f"generate.py: {error}")
        return 1
    except torch.OutOfMemoryError as error:
        instead = {"--offload blocks": args.offload != "blocks", "--quantize fp8": args.quantize != "fp8"}
        tips = " or ".join(flag for flag, is_new in instead.items() if is_new) or "a smaller picture"
        say(f"generate.py: out of memory: {' '.join(str(error).split())} Try {tips}.")
        return 1
    except KeyboardInterrupt:
        say("generate.py: interrupted")
        return 130


def run(args: argparse.Namespace, stop: Stop) -> int:
    if args.parallel and os.environ.get("RANK", "0") != "0" and (args.plan is not None or args.check or args.preview):
        return 0
    if args.plan is not None:
        return write_the_plan(args)
    if args.check or args.preview:
        return look(args)
    if args.config_from_metadata:
        take_run_from(made_of(args.config_from_metadata), args)
    if weights.is_repository(args.model):  # complain before tens of gigabytes are downloaded
        plan_jobs(args, 1024, Failures(args))
    pipeline = Pipeline(
        args.model, args.flux, args.t5, args.clip, args.ae, device_of(args.device), args.dtype, args.attention,
        args.prompt_cache, args.verbose, bool(args.compile), args.quantize, args.offload,
        bool(args.parallel),
    )  # fmt: skip
    with contextlib.ExitStack() as stack:
        if pipeline.parallel:
            stack.callback(pipeline.parallel.close)
            stop.asked_anywhere = pipeline.parallel.is_any
            if pipeline.parallel.rank:  # the first process speaks for all, and writes
                nowhere = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(contextlib.redirect_stdout(nowhere))
                stack.enter_context(contextlib.redirect_stderr(nowhere))
        return draw(pipeline, args, stop)


def draw(pipeline: Pipeline, args: argparse.Namespace, stop: Stop) -> int:
    """Make all pictures, or those of this worker; returns the exit code."""
    failures = Failures(args)
    jobs = plan_jobs(args, pipeline.size, failures)
    index, count = shard_of(args)
    if count > 1:
        say(f"worker {index} of {count}: {len(jobs)} pictures")
    say(f"seed {', '.join(str(seed) for seed in dict.fromkeys(job.seed for job in jobs))}")
    if pipeline.checkpoint.name == "pocket":
        say("the built-in pocket model draws; for FLUX.1-dev add --model black-forest-labs/FLUX.1-dev, or its folder")
    by_layout = [list(group) for _, group in itertools.groupby(jobs, lambda job: id(job.layout))]
    for groups in (by_layout[i : i + CHUNK] for i in range(0, len(by_layout), CHUNK)):
        prepared = []
        for group in groups:
            stop.check()
            with failures:
                prepared += missing_of(group, pipeline, args)
        pipeline.drop("t5", "clip")
        if len(jobs) == 1:  # there may be no room for the transformer beside it
            pipeline.drop("ae")
        for job, ready, made_by in prepared:
            with failures:
                make(job, ready, made_by, pipeline, args, stop, alone=len(jobs) == 1)
        pipeline.drop("flux")
    if args.sweep and not failures.count and is_writer(pipeline):
        write_sheets(jobs, args)
    return 1 if failures.count else 0


class Failures:
    """A context in which one layout of many may fail: it is reported, and the others go on. Of one alone it is the
    program's error."""

    def __init__(self, args: argparse.Namespace):
        # of several processes that draw together one can't go on without the others
        self.count, self.alone = 0, len(layout_files(args)) <= 1 or bool(args.parallel)

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> bool:
        if self.alone or not isinstance(error, (InputError, OSError, torch.OutOfMemoryError)):
            return False
        say(f"generate.py: {' '.join(str(error).split())}")
        self.count += 1
        return True


def missing_of(group: list[Job], pipeline: Pipeline, args: argparse.Namespace) -> list[tuple[Job, Prepared, dict]]:
    """Those pictures of one layout that are still to be made, with the layout prepared and what makes them."""
    checkpoint, layout = pipeline.checkpoint, with_model_defaults(group[0].layout, pipeline.checkpoint.flux)
    files = {part: str(getattr(checkpoint, part).path) for part in ("flux", "t5", "clip", "ae")}
    used = {"model": checkpoint.name, "files": files, "dtype": str(pipeline.dtype), "torch": torch.__version__}
    # what changes a picture's last bits, or more
    how = {"fp8": pipeline.fp8, "compile": pipeline.compile, "processes": pipeline.parallel and pipeline.parallel.size}
    used |= {key: value for key, value in how.items() if value}
    used |= {"attention": args.attention} if args.attention != "auto" else {}
    used["given"] = {key: value for key in MODEL_FLAGS if (value := getattr(args, key))}
    missing = []
    for job in group:
        made_by = settings(layout, job.seed, used)
        others = [file for file in files_of(job, args) if not is_made_by(file, made_by)]
        if others or args.overwrite:
            check_files(others, args)
            missing.append((job, made_by))
        else:
            say(f"{job.output}: exists already, made by the same settings; it is kept")
            print(job.output)
    if not missing:
        return []
    prepared = pipeline.prepare(group[0].layout, group[0].where)
    return [(job, prepared, made_by) for job, made_by in missing]


def make(
    job: Job, prepared: Prepared, made_by: dict, pipeline: Pipeline, args: argparse.Namespace, stop: Stop, alone: bool
) -> None:
    stop.check()
    for file in files_of(job, args):
        remove_unfinished(file)
    maps = pipeline.maps() if args.attention_maps else None
    z = pipeline.latents(prepared, job.seed, maps, stop.after_step)
    if alone:
        pipeline.drop("flux")
    if not is_writer(pipeline):
        return
    if job.latents:
        save_tensor("latents", z, made_by, job.latents)
    image = pipeline.decode(z)
    write(job.output, partial(save_picture, image, None if args.no_metadata else made_by))
    if args.metadata:
        save_json(made_by, job.output.with_suffix(".json"))
    print(job.output, flush=True)
    if maps and maps.steps:
        save_maps(maps, args.attention_maps / job.output.stem, image, prepared.tokens.prompts, made_by)
    elif maps:
        say(f"{job.output}: no step of it is regional, so it has no attention maps")


def is_writer(pipeline: Pipeline) -> bool:
    return not pipeline.parallel or pipeline.parallel.rank == 0


# ------------------------------------------------------------------------------------------------ before paying


def write_the_plan(args: argparse.Namespace) -> int:
    from regional.plan import plan, write_plan

    output = Path(args.output or "plan.yaml")
    check_writable(output, args.overwrite)
    width, height = (getattr(args, side, 1024) for side in ("width", "height"))
    write_plan(plan(args.plan, width, height, args.llm_url, args.llm_model, say=say), output, args.overwrite)
    print(output)
    return 0


def look(args: argparse.Namespace) -> int:
    """--check and --preview: without a model, but for its sizes and tokenizers where they are at hand."""
    from regional.preview import preview, report

    checkpoint = (
        None if weights.is_repository(args.model) else weights.find(args.model, args.flux, args.t5, args.clip, args.ae)
    )
    params = weights.flux_params(checkpoint.flux) if checkpoint else FluxParams()
    size = int(weights.metadata_number(checkpoint.flux, "sample_size", 1024)) if checkpoint else 1024
    valid, layouts = True, []
    for file in layout_files(args):
        try:
            layout = read_layout(
                file, flags_of(args), size, made_of(args.config_from_metadata) if args.config_from_metadata else None
            )
        except InputError as error:
            say(f"generate.py: {error}")
            valid = False
            continue
        layouts.append((file, layout))
        if args.check:
            layout = with_model_defaults(layout, checkpoint.flux) if checkpoint else layout
            text, warnings = report(layout, params, text_lengths(layout, checkpoint) if checkpoint else None)
            print(f"{file or 'the command line'}: valid", text, sep="\n")
            for warning in warnings:
                say(f"warning: {warning}")
    if args.preview:
        for file, layout in layouts:
            output = args.preview.with_stem(f"{args.preview.stem}_{file.stem}") if len(layouts) > 1 else args.preview
            if output.suffix.lower() not in SUFFIXES:
                raise InputError(f"--preview {output}: the suffix must be one of {', '.join(SUFFIXES)}.")
            check_writable(output, args.overwrite)
            write(output, preview(layout).save)
            print(output)
    return 0 if valid else 2


# ------------------------------------------------------------------------------------------------ settings and files


def layout_files(args: argparse.Namespace) -> list[Path | None]:
    """The files that --layout names, of a folder all in it; [None] where the command line alone says what to draw."""
    files = []
    for path in args.layout:
        if not os.path.isdir(path):
            files.append(path)
        elif found := sorted(file for kind in ("yaml", "yml") for file in path.glob(f"*.{kind}")):
            files += found
        else:
            raise InputError(f"--layout {path}: there is no layout in this folder, no .yaml and no .yml.")
    return files or [None]


def flags_of(args: argparse.Namespace) -> dict[str, Any]:
    return {key: value for key, value in vars(args).items() if key in Layout.__struct_fields__ and key != "seed"}


def take_run_from(made_by: dict[str, Any], args: argparse.Namespace) -> None:
    """What a picture says of its run, where the command line says nothing: the model and how it was computed."""
    if not any(getattr(args, key) for key in MODEL_FLAGS):
        given = made_by.get("given")
        for key, value in (given if isinstance(given, dict) else {"model": made_by["model"]}).items():
            if key in MODEL_FLAGS:
                setattr(args, key, str(value))
    if args.compile is None:
        args.compile = made_by.get("compile") is True
    if args.quantize == "auto":
        args.quantize = "fp8" if made_by.get("fp8") is True else "none"
    for key, choices in ("dtype", DTYPES), ("attention", ATTENTIONS):
        if getattr(args, key) == "auto":
            value = str(made_by.get(key, "auto")).removeprefix("torch.")
            if value not in ("auto", *choices):
                expected = f"expected one of {', '.join(choices)}"
                raise InputError(f"{args.config_from_metadata}: {key} = {value!r}: {expected}.")
            setattr(args, key, value)


def plan_jobs(args: argparse.Namespace, size: int, failures: Failures) -> list[Job]:
    """The pictures of this run, or of this worker of several. `size` is the model's default width and height. Refuses,
    before any work, what could not be written."""
    sweeps = [parse_sweep(text) for text in args.sweep]
    if len(dict(sweeps)) < len(sweeps):
        raise InputError(f"the command line: --sweep {', '.join(args.sweep)}: a key is swept twice.")
    carried = made_of(args.config_from_metadata) if args.config_from_metadata else None
    index, count = shard_of(args)
    together, jobs, several = count > 1 or bool(args.parallel), [], len(layout_files(args)) > 1
    for file in layout_files(args):
        with failures:
            layouts = {}
            for values in itertools.product(*(values for _, values in sweeps)):
                swept = {key: value for (key, _), value in zip(sweeps, values)}
                label = tuple(f"{key}={value}" for key, value in swept.items())
                layouts[label] = read_layout(file, flags_of(args) | swept, size, carried)
            jobs += jobs_of(file or args.config_from_metadata, layouts, args, several, together)
    outputs = [path for job in jobs for path in (job.output, job.latents) if path]
    if len(set(outputs)) < len(outputs):
        twice = next(path for path in outputs if outputs.count(path) > 1)
        raise InputError(f"--output {twice}: several pictures would have this name; put {{name}} or {{seed}} into it.")
    read = {os.path.abspath(file) for file in layout_files(args) if file}
    for path in (path for job in jobs for path in files_of(job, args) if os.path.abspath(path) in read):
        raise InputError(f"--output {path}: that is a layout of this run.")
    if not several:
        for job in jobs:
            # if what is there and says how it was made is to be kept is seen later
            check_files([file for file in files_of(job, args) if not carried_by(file)], args)
    for sheet in {job.sheet for job in jobs if job.sheet}:
        check_writable(sheet, args.overwrite)
    return jobs[index::count]


def jobs_of(
    file: Path | None, layouts: dict[tuple[str, ...], Layout], args: argparse.Namespace, several: bool, sharded: bool
) -> list[Job]:
    seeds = list(dict.fromkeys(getattr(args, "seed", None) or [next(iter(layouts.values())).seed]))
    for seed in seeds:
        if seed is None and sharded:
            raise InputError(f"{file}: seed is missing: workers that share pictures can't all choose one at random.")
        if seed is not None and not 0 <= seed < 2**63:
            raise InputError(f"the command line: --seed {seed}: expected a number from 0 to 2^63 - 1.")
    name = file.stem if file else "picture"
    runs = [
        (layout, seed, Names(name, swept, (str(seed),) if len(seeds) > 1 else ()))
        for swept, layout in layouts.items()
        for seed in seeds
    ]
    names = [names for *_, names in runs] + ([Names(name, ("sheet",), ())] if args.sweep else [])
    output = args.output or ("{name}.png" if several or sharded else free_name(names))
    if not output.lower().endswith(SUFFIXES):
        raise InputError(f"--output {output}: the suffix must be one of {', '.join(SUFFIXES)}.")
    if args.save_latents and not args.save_latents.endswith(".safetensors"):
        raise InputError(f"--save-latents {args.save_latents}: the suffix must be .safetensors.")
    where, jobs, chosen = naming(file, flags_of(args)), [], random.randrange(2**32)
    for layout, seed, names in runs:
        path = filled(output, names, chosen if seed is None else seed)
        if seed is None:  # what is there already may be finished, by the seed that it has
            seed = (carried_by(path) or {"seed": chosen})["seed"]
        latents = filled(args.save_latents, names, seed) if args.save_latents else None
        sheet = filled(output, Names(name, ("sheet",), ()), seed) if args.sweep else None
        jobs.append(Job(names, where, layout, seed, path, latents, sheet))
    return jobs


def filled(template: str, names: Names, seed: int) -> Path:
    """The path with {name}, {seed} and {sweep} filled in; what tells pictures apart and is not in it is appended."""
    rest = [mark for key in ("sweep", "seed") if f"{{{key}}}" not in template for mark in getattr(names, key)]
    for key, value in {"name": names.name, "seed": str(seed), "sweep": "_".join(names.sweep)}.items():
        template = template.replace(f"{{{key}}}", value)
    path = Path(template)
    return path.with_stem("_".join([path.stem, *rest]))


def free_name(names: list[Names]) -> str:
    """The default template, or the first of {name}_1, {name}_2 ... where nothing is in the way."""
    templates = ["{name}.png", *(f"{{name}}_{i}.png" for i in range(1, 10000))]
    return next(t for t in templates if not any(filled(t, each, 0).exists() for each in names))


def files_of(job: Job, args: argparse.Namespace) -> list[Path]:
    """All that is written of a picture, each of which carries what made it; of attention maps the numbers."""
    files = [job.output] + ([job.latents] if job.latents else [])
    files += [job.output.with_suffix(".json")] if args.metadata else []
    return files + ([args.attention_maps / f"{job.output.stem}.safetensors"] if args.attention_maps else [])


def check_files(files: list[Path], args: argparse.Namespace) -> None:
    for file in files:
        if args.attention_maps and file.parent == args.attention_maps:
            args.attention_maps.mkdir(parents=True, exist_ok=True)
            for sheet in file.parent.glob(f"{glob.escape(file.stem)}_step*.png"):
                check_writable(sheet, args.overwrite)
        check_writable(file, args.overwrite)


def shard_of(args: argparse.Namespace) -> tuple[int, int]:
    """Which worker this is, of how many: --shard, or torchrun's or SLURM's variables."""
    if args.parallel:
        return 0, 1
    env = os.environ
    text = args.shard
    if text is None:
        pairs = (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS"))
        text = next((f"{env[rank]}/{env[size]}" for rank, size in pairs if rank in env and size in env), "0/1")
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise InputError(f"--shard {text}: expected I/N, a number from 0 on and how many there are, such as 0/4.")
    return int(index), int(count)


def device_of(name: str) -> str:
    """Of several GPUs the worker's own."""
    own = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID"))
    return f"cuda:{own}" if own and name in ("auto", "cuda") and torch.cuda.device_count() > 1 else name


def parse_sweep(text: str) -> tuple[str, list[Any]]:
    key, _, values = text.partition("=")
    key = key.strip().replace("-", "_")
    if key not in SWEPT or not values:
        raise InputError(f"the command line: --sweep {text}: expected one of {', '.join(SWEPT)}, then = and values.")
    try:
        return key, [yaml.safe_load(value) for value in values.split(",")]
    except yaml.YAMLError as error:
        raise InputError(f"the command line: --sweep {text}: its values can't be read.") from error


def write_sheets(jobs: list[Job], args: argparse.Namespace) -> None:
    """Of each sweep: a column for each value of the last key, a row for each of everything else."""
    if shard_of(args)[1] > 1:
        say("no sheet is made of a sweep that several workers share")
        return
    several = len({job.seed for job in jobs}) > 1
    for path in dict.fromkeys(job.sheet for job in jobs):
        rows = {}
        for job in (job for job in jobs if job.sheet == path):
            *others, column = job.names.sweep
            row = ", ".join([*others, *([f"seed {job.seed}"] if several else [])])
            rows.setdefault(row, {})[column] = Image.open(job.output)
        pictures = {row: list(images.values()) for row, images in rows.items()}
        write(path, contact_sheet(pictures, list(next(iter(rows.values())))).save)
        print(path)


def save_maps(maps: AttentionMaps, path: Path, image: Image.Image, prompts: list[str], made_by: dict) -> None:
    """A sheet for each regional step, path_step1.png and so on, and the numbers behind them, path.safetensors."""
    for i, sheet in enumerate(maps.sheets(image, prompts)):
        write(path.with_name(f"{path.name}_step{i + 1}.png"), sheet.save)
    save_tensor("maps", maps.maps, made_by, path.with_name(f"{path.name}.safetensors"))


if __name__ == "__main__":
    sys.exit(main())
