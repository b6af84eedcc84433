"""Layouts in, pictures out.

    python generate.py --layout layout.yaml

reads the layout, encodes its prompts, denoises (the first steps regionally, the rest plainly), decodes and writes the
picture. What is not needed any more is dropped before the next part of the model is loaded. Of many layouts the prompts
are encoded first, then every picture is written as soon as it is made; a run that was stopped goes on where it was.
"""

import argparse
import contextlib
import itertools
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from errors import InputError, say
from formats.hub import is_repository
from pipeline import Pipeline, Prepared
from regional.layout import MODES
from regional.reader import CONTROL_FLAGS
from runtime.choose import ATTENTIONS, DTYPES, OFFLOAD, QUANTIZE
from tools.jobs import (
    CHUNK,
    MODEL_FLAGS,
    Failures,
    Job,
    files_of,
    is_writer,
    missing_of,
    plan_jobs,
    shard_of,
    write_sheets,
)
from tools.map_sheets import save_maps
from tools.metadata import made_of, remove_unfinished, save_json, save_picture, save_tensor, write
from tools.plan import write_the_plan
from tools.preview import look

STARTED = time.perf_counter()  # what is imported below takes a while


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
        help="how masked attention is computed; auto: the kernel on CUDA, else portable")  # fmt: skip
    add("--verbose", action="store_true", help="say which attention functions are used")
    add("--compile", action=argparse.BooleanOptionalAction, help="let torch.compile make the blocks: a minute more at "
        "the start, faster from then on")  # fmt: skip
    add("--quantize", default="auto", choices=QUANTIZE, help="fp8: the transformer's matrices in 8 "
        "bits; auto: if its file has them so and the GPU multiplies them")  # fmt: skip
    add("--offload", default="auto", choices=OFFLOAD, help="blocks: keep the transformer's and T5's "
        "blocks in host memory and copy each to the GPU ahead of its turn; auto: where they do not fit")  # fmt: skip
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
    if is_repository(args.model):  # complain before tens of gigabytes are downloaded
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


def make(
    job: Job, prepared: Prepared, made_by: dict, pipeline: Pipeline, args: argparse.Namespace, stop: Stop, alone: bool
) -> None:
    stop.check()
    for file in files_of(job, args):
        remove_unfinished(file)
    maps = pipeline.maps() if args.attention_maps else None
    z = pipeline.latents(prepared, job.seed, [maps.extend] if maps else [], stop.after_step)
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


def device_of(name: str) -> str:
    """Of several GPUs the worker's own."""
    own = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID"))
    return f"cuda:{own}" if own and name in ("auto", "cuda") and torch.cuda.device_count() > 1 else name


if __name__ == "__main__":
    sys.exit(main())
