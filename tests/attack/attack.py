"""An attack on everything that reads a file: is there one that ends in a traceback, takes long or fills the memory?

    python tests/attack/attack.py --seconds 120                    # a fresh seed, which is printed
    python tests/attack/attack.py --seed 7 --inputs 100000         # at length
    python tests/attack/attack.py --seed 7 --only lora --first 123 --inputs 1    # one input again

Good files of every kind are changed at random and read as the program reads them. An input may be read, or be an
InputError whose lines are printable and bounded; anything else, more than 2 s of CPU or 300 MB more memory is a
failure. The exit code is 1 if there was one.
"""

import argparse
import contextlib
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import inputs  # noqa: E402
import tiny  # noqa: E402
import torch  # noqa: E402
import yaml  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import save  # noqa: E402

import weights  # noqa: E402
from errors import InputError  # noqa: E402
from extensions import loading, pictures  # noqa: E402
from extensions.lora_files import read_lora  # noqa: E402
from formats import components  # noqa: E402
from model.tokenizers import CLIPTokenizer, T5Tokenizer  # noqa: E402
from model.transformer import FluxParams  # noqa: E402
from regional.layout import FLUX_DEV, Layout  # noqa: E402
from regional.mask import region_tokens  # noqa: E402
from regional.reader import read_layout  # noqa: E402
from runtime.prompt_cache import cached  # noqa: E402
from tools import compare, convert, flags, metadata, plan, preview, replay  # noqa: E402

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
SECONDS = 2.0
MEGABYTES = 300
COSTLY = ("preview", "report")  # kinds that take a second for each input: they are read in one of 50 rounds
File = tuple[str, bytes]
Mutate = Callable[[random.Random, bytes], bytes]


class Kind(NamedTuple):
    """Good examples with the name that the file has, how they are changed, what reads the file, and the files that lie
    beside it."""

    examples: list[File]
    mutate: Mutate
    read: Callable[[Path], Any]
    beside: Sequence[File] = ()


LAYOUT = {
    "prompt": "a fox and a hen", "width": 128, "height": 128, "steps": 4, "seed": 1, "base_ratio": 0.3,
    "background_prompt": "a meadow", "map": None, "double_blocks": "every 2", "overlap": "last",
    "regions": [
        {"prompt": "a fox", "box": [0, 0, "50%", 128], "strength": 1.5, "feather": 32},
        {"prompt": "a hen", "polygon": [[64, 0], [128, 0], [128, 128]], "loras": [{"file": "none", "scale": 0.5}]},
    ],
}  # fmt: skip
RECORDED = {
    **LAYOUT,
    "model": "pocket",
    "files": {},
    "dtype": "torch.float32",
    "given": {"model": "pocket"},
    "pictures": {},
}


def tokens_of(layout: Path) -> None:
    found = read_layout(layout, {})
    found.resolved(FLUX_DEV)
    if found.regions:
        region_tokens(found)


def costly(show: Callable[[Any], Any]) -> Callable[[Path], None]:
    """Shows a layout that is in JSON: YAML takes the longer part of the time."""
    return lambda file: show(read_layout(None, json.loads(file.read_text())))


def reported(layout: Layout) -> None:
    preview.report(layout, FluxParams(), None)


def naming_image(text: str) -> Callable[[Path], None]:
    """Reads an image through a layout that names it as this says."""

    def read(image: Path) -> None:
        layout = image.with_name("names.yaml")
        layout.write_text(f"prompt: a\nwidth: 64\nheight: 64\n{text.replace('IMAGE', image.name)}\n")
        found = read_layout(layout, {})
        if found.regions:
            region_tokens(found)
        if found.controlnets:
            pictures.control_image(found.controlnets[0].image, None, found)

    return read


def replayed(file: Path) -> None:
    command = flags.parse(["--config-from-metadata", str(file), "--check"], replay.replayed)
    read_layout(None, command.recorded)


def in_the_way(file: Path) -> None:
    """An image that lies where the output goes."""
    found = metadata.metadata_in(file)
    compare.matches(file, dict(RECORDED))
    if found:
        read_layout(None, {"prompt": "a", "seed": found["seed"]})


def converted(form: str, *more: str) -> Callable[[Path], None]:
    def read(file: Path) -> None:
        target = str(file.with_name("converted.yaml"))
        with contextlib.redirect_stderr(io.StringIO()) as text:
            code = convert.main(["--from", form, str(file), target, "--overwrite", *more])
        if code != 0:
            assert code == 2, f"exit code {code}: {text.getvalue()[-300:]}"
            raise InputError(file, 0, text.getvalue()[-200:].replace("\n", " "))

    return read


def loaded(part: str) -> Callable[[Path], None]:
    def read(file: Path) -> None:
        source = weights.pick(part, f"--{part}", file)
        components.check_loads(source, loading.CONTROLNET if part == "controlnet" else None)

    return read


def beside(part: str) -> Callable[[Path], None]:
    """Reads what lies next to this file: a folder with an index, or a config.json."""

    def read(file: Path) -> None:
        source = weights.pick(part, f"--{part}", file.parent)
        components.check_loads(source)

    return read


def prompt_cache(file: Path) -> None:
    """The one file of the cache folder is replaced by this one."""
    folder = file.with_name("cache")
    arguments = (folder, "t5", [[1, 2]], torch.device("cpu"))
    shutil.rmtree(folder, ignore_errors=True)
    cached(*arguments, lambda: torch.zeros(1, 2, 4))
    (kept,) = folder.iterdir()
    kept.write_bytes(file.read_bytes())
    cached(*arguments, lambda: torch.zeros(1, 2, 4))


MODULES = {part: None for part in ("flux", "t5", "clip")}


def lora(file: Path) -> None:
    read_lora(file, MODULES)


def planned(file: Path) -> None:
    plan.layout_of(file.read_bytes().decode(errors="replace"), 512, 512)


def clip_tokenizer(file: Path) -> None:
    CLIPTokenizer(file.parent)


def tensors(shapes: dict[str, tuple[int, ...]], settings: dict[str, str] | None = None) -> bytes:
    return save({key: torch.zeros(shape) for key, shape in shapes.items()}, settings)


def loras() -> list[tuple[str, bytes]]:
    h, mlp = tiny.FLUX.hidden_size, tiny.FLUX.mlp_hidden
    kohya = "lora_unet_single_blocks_0_linear1"
    peft = "transformer.single_transformer_blocks.0.proj_mlp"
    rows = 3 * h + mlp
    low_rank = {f"{kohya}.lora_up.weight": (rows, 4), f"{kohya}.lora_down.weight": (4, h)}
    settings = {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 8, "transformer.r": 4})}
    files = [
        tensors({**low_rank, f"{kohya}.alpha": ()}),
        tensors({f"{peft}.lora_A.weight": (4, h), f"{peft}.lora_B.weight": (mlp, 4)}, settings),
        tensors({f"{kohya}.lokr_w1": (4, 4), f"{kohya}.lokr_w2": (rows // 4, h // 4), f"{kohya}.alpha": ()}),
        tensors({f"{kohya}.hada_{x}": s for x, s in {
            "w1_a": (rows, 4), "w1_b": (4, h), "w2_a": (rows, 4), "w2_b": (4, h)}.items()}),
        tensors({**low_rank, f"{kohya}.dora_scale": (rows, 1)}),
        tensors({f"{kohya}.diff": (rows, h), f"{kohya}.diff_b": (rows,)}),
    ]  # fmt: skip
    return [("lora.safetensors", file) for file in files]


def gguf_file(folder: Path) -> bytes:
    import test_gguf

    path = test_gguf.save(folder / "made.gguf", test_gguf.quantized(tiny.flux_state(), test_gguf.Type.Q8_0))
    return path.read_bytes()


def conversions() -> dict[str, Kind]:
    """Each form that tools/convert.py reads, its examples made by the converter from a layout."""
    found = {}
    literal = inputs.either_or_python
    layout = {"prompt": "a fox and a hen", "width": 128, "height": 128, "background_prompt": "a meadow", "regions": [
        {"prompt": "a fox", "box": [0, 0, 64, 128]}, {"prompt": "a hen", "box": [64, 0, 128, 128]}]}  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "layout.yaml")
        file.write_text(yaml.safe_dump(layout))
        for form in convert.FORMS:
            target = Path(folder, f"{form}.json")
            with contextlib.redirect_stderr(io.StringIO()):
                assert convert.main(["--to", form, str(file), str(target)]) == 0, form
            more = [] if form not in ("forge", "rpg") else ["--size", "128", "128"]
            mutate = inputs.or_large(inputs.large_split, inputs.mutated_bytes) if form == "rpg" else literal
            beside = [(p.name, p.read_bytes()) for p in Path(folder).glob(f"{form}*") if p != target]
            example = (target.name, target.read_bytes())
            found[f"convert {form}"] = Kind([example], mutate, converted(form, *more), beside)
    of_image = {"image_id": 1, "category_id": 1}
    polygons = {
        "images": [{"id": 1, "width": 256, "height": 256, "file_name": "a.jpg"}],
        "categories": [{"id": 1, "name": "fox"}],
        "annotations": [
            {**of_image, "id": 1, "segmentation": [[0, 0, 200, 0, 200, 200, 0, 200]], "bbox": [0, 0, 200, 200]},
            {**of_image, "id": 2, "segmentation": [[9, 9, 99, 9, 99, 99]], "bbox": [9, 9, 90, 90], "iscrowd": 0},
        ],
    }  # fmt: skip
    found["convert coco polygons"] = Kind(
        [("coco.json", json.dumps(polygons).encode())],
        inputs.or_large(inputs.large_annotations, inputs.either),
        converted("coco"),
    )
    return found


def imports(folder: Path) -> dict[str, Kind]:
    """What is read of other programs' files without being written."""
    import test_importers as made

    here = os.getcwd()
    os.chdir(folder)
    pictures = {}
    graph = json.dumps(made.as_drawn(made.bboxes(), made.ORDER)).encode()
    graphs = [json.dumps(nodes).encode() for nodes, _ in made.WORKFLOWS.values()]
    for form, texts in {
        "comfyui": [{"prompt": nodes.decode(), "workflow": "{}"} for nodes in graphs] + [{"workflow": graph.decode()}],
        "a1111": [{"parameters": text} for text in made.PARAMETERS],
        "invokeai": [{"invokeai_metadata": json.dumps(made.INVOKE)}],
    }.items():
        pictures[form] = []
        for text in texts:
            made.png("x.png", **text)
            pictures[form].append(("x.png", Path("x.png").read_bytes()))
    os.chdir(here)
    mask = [("scan.png", inputs.image_bytes(Image.new("L", (128, 64), 255), "PNG"))]
    text = [("x.txt", text.encode()) for text in made.PARAMETERS]
    shapes = [*made.BOXES, *made.CURVES]
    drawings = [("x.svg", made.drawing(shape, size=size).encode()) for shape in shapes for size in made.SIZES]
    large = inputs.or_large(inputs.large_drawing, inputs.mutated_bytes)
    return {
        "comfyui": Kind([("x.json", data) for data in (*graphs, graph)], inputs.either, converted("comfyui"), mask),
        **{
            f"picture of {form}": Kind(found, inputs.mutated_png, converted(form), mask)
            for form, found in pictures.items()
        },
        "parameters": Kind(text, inputs.mutated_bytes, converted("a1111")),
        "svg": Kind(drawings, large, converted("svg")),
    }


def all_kinds(folder: Path) -> dict[str, Kind]:
    recorded = json.dumps(RECORDED).encode()
    image = Image.new("RGB", (64, 64), "red")
    image.paste("white", (0, 0, 32, 64))
    formats = [("x.png", inputs.image_bytes(image, form)) for form in FORMATS]
    formats += [("x.png", inputs.image_bytes(image.convert(mode), "PNG")) for mode in ("L", "P", "LA", "RGBA", "1")]
    exact = [example for example, form in zip(formats, FORMATS) if form not in ("JPEG", "WEBP", "GIF")]
    carrier = [("x.png", inputs.image_bytes(image, "PNG", recorded.decode()))]
    mutate_layout = inputs.or_large(inputs.large_layout, inputs.either)
    mutate_carrier = partial(inputs.mutated_carrier, recorded)
    layouts = [("x.yaml", json.dumps(LAYOUT).encode()), ("x.yaml", yaml.safe_dump(LAYOUT).encode())]
    layouts += [("x.yaml", file.read_bytes()) for file in sorted((ROOT / "examples").glob("*.yaml"))]
    pictures = [(file.name, file.read_bytes()) for file in sorted((ROOT / "examples").glob("*.png"))]
    with torch.device("meta"):
        MODULES.update(
            flux=components.Flux(tiny.FLUX),
            t5=components.T5Encoder(tiny.T5),
            clip=components.CLIPTextEncoder(tiny.CLIP),
        )
    latents = save({"latents": torch.zeros(1, 16, 2, 2)}, {"layout": json.dumps(RECORDED)})
    states = {"flux": tiny.flux_state(), "t5": tiny.t5_state(), "clip": tiny.clip_state(), "ae": tiny.ae_state()}
    files = {part: save({k: t.half() for k, t in state.items()}) for part, state in states.items()}
    index = {"weight_map": {key: f"m-0000{i % 2 + 1}-of-00002.safetensors" for i, key in enumerate(states["ae"])}}
    shards = [(f"m-0000{i + 1}-of-00002.safetensors", save(dict(list(states["ae"].items())[i::2]))) for i in range(2)]
    configs = [("config.json", json.dumps(tiny.AE_CONFIG | {"num_attention_heads": 3}).encode())]
    tokenizers = ROOT / "tests" / "fixtures" / "tokenizers"
    vocabulary, merges = ((name, (tokenizers / "clip" / name).read_bytes()) for name in ("vocab.json", "merges.txt"))
    index_file = ("m.safetensors.index.json", json.dumps(index).encode())
    near_index = [*shards, *configs]
    clip_config = ("config.json", b'{"num_attention_heads": 3}')
    ae_config = ("config.json", json.dumps(tiny.AE_CONFIG).encode())
    states_file = save({"states": torch.zeros(1, 2, 4)})
    answer = {"prompt": "a", "background_prompt": "b", "regions": [
        {"prompt": "c", "box": {"x0": 0, "y0": 0, "x1": 50, "y1": 100}},
        {"prompt": "d", "box": {"x0": 50, "y0": 0, "x1": 100, "y1": 100}}]}  # fmt: skip
    kinds = {
        "layout": Kind(layouts, mutate_layout, tokens_of, pictures),
        **{
            name: Kind(layouts[:1], lambda rng, _: inputs.costly_layout(rng).encode(), costly(show))
            for name, show in {"preview": preview.preview, "report": reported}.items()
        },
        "mask": Kind(formats, inputs.mutated_bytes, naming_image("regions: [{prompt: b, mask: IMAGE}]")),
        "map": Kind(exact, inputs.mutated_bytes, naming_image("map: IMAGE\nregions: [{prompt: b, color: '#ff0000'}]")),
        "control image": Kind(formats, inputs.mutated_bytes, naming_image("controlnets: [{model: a/b, image: IMAGE}]")),
        "image to replay": Kind(carrier, mutate_carrier, replayed),
        "image in the way": Kind(carrier, mutate_carrier, in_the_way),
        "metadata to replay": Kind([("x.json", recorded)], inputs.either, replayed),
        "latents to replay": Kind([("x.safetensors", latents)], inputs.mutated_header, replayed),
        **{
            part: Kind([(f"{part}.safetensors", data)], inputs.mutated_header, loaded(part), configs)
            for part, data in files.items()
        },
        "gguf": Kind([("flux.gguf", gguf_file(folder))], inputs.mutated_bytes, loaded("flux")),
        "index": Kind([index_file], inputs.either, beside("ae"), near_index),
        "config of clip": Kind([clip_config], inputs.either, beside("clip"), [("model.safetensors", files["clip"])]),
        "config of ae": Kind([ae_config], inputs.either, beside("ae"), [("model.safetensors", files["ae"])]),
        "lora": Kind(loras(), inputs.mutated_header, lora),
        "clip vocabulary": Kind([vocabulary], inputs.either, clip_tokenizer, [merges]),
        "clip merges": Kind([merges], inputs.mutated_bytes, clip_tokenizer, [vocabulary]),
        "prompt cache": Kind([("x.safetensors", states_file)], inputs.mutated_header, prompt_cache),
        "plan": Kind([("x.json", json.dumps(answer).encode())], inputs.either, planned),
        **conversions(),
        **imports(folder),
    }  # fmt: skip
    pocket = ROOT / "pocket" / "checkpoint" / "tokenizer_2" / "spiece.model"
    kinds["spiece.model"] = Kind([("spiece.model", pocket.read_bytes())], inputs.mutated_bytes, T5Tokenizer)
    return kinds


class Failure(NamedTuple):
    kind: str
    number: int
    what: str


class TooLong(Exception):
    """Raised by the timer where an input takes ten times as long as it may."""


def memory(name: str) -> int:
    """VmHWM or VmRSS of this process in bytes."""
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(name))


def attack_one(
    kind: Kind, name: str, number: int, seed: int, folder: Path, limit: float = SECONDS
) -> tuple[str, bool]:  # fmt: skip
    """What was wrong with the reading of one input, "" if nothing; and whether the input was refused."""
    rng = random.Random(f"{seed} {name} {number}")
    file_name, example = rng.choice(kind.examples)
    place = folder / name.replace(" ", "_")
    place.mkdir(exist_ok=True)
    for name_beside, data in kind.beside:
        if not (place / name_beside).exists():
            (place / name_beside).write_bytes(data)
    file = place / file_name
    file.write_bytes(kind.mutate(rng, example) if number else example)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again
    before, start = memory("VmRSS"), time.process_time()
    signal.setitimer(signal.ITIMER_REAL, 10 * SECONDS * 3)
    is_refused, wrong = False, ""
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            kind.read(file)
    except InputError as error:
        is_refused = True
        for line in str(error).split("\n"):
            if not line.isprintable() or len(line) > 4000:
                wrong = f"a message that can't be printed: {line[:200]!r}"
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if str(ROOT) in f.filename][-1]
        wrong = f"{type(error).__name__}: {str(error)[:150]!r} in {Path(frames.filename).name}:{frames.lineno}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    seconds, more = time.process_time() - start, (memory("VmHWM") - before) / 1e6
    if seconds > limit:
        wrong = wrong or f"{seconds:.1f} s of CPU"
    if more > MEGABYTES:
        wrong = wrong or f"{more:.0f} MB of memory"
    return wrong, is_refused


def attack(
    seed: int, count: int | None, seconds: float | None, only: list[str], first: int, limit: float
) -> list[Failure]:  # fmt: skip
    def alarm(*_: object) -> None:
        raise TooLong

    signal.signal(signal.SIGALRM, alarm)
    failures, counts, refused = [], Counter(), Counter()
    end = time.monotonic() + seconds if seconds else float("inf")
    with tempfile.TemporaryDirectory() as folder:
        kinds = {name: kind for name, kind in all_kinds(Path(folder)).items() if not only or name in only}
        for name, kind in kinds.items():  # Every good file is read, the first one twice: imports are paid for.
            attack_one(kind._replace(examples=kind.examples[:1]), name, 0, seed, Path(folder))
            for example in kind.examples:
                wrong, is_refused = attack_one(kind._replace(examples=[example]), name, 0, seed, Path(folder))
                if wrong or is_refused:
                    failures.append(Failure(name, 0, wrong or "the good file is refused"))
        number = first
        while (count is None or sum(counts.values()) < count) and time.monotonic() < end:
            for name, kind in kinds.items():
                if name in COSTLY and number % 50 != first % 50:
                    continue
                for _ in range(3):  # The other programs of a machine can slow down one reading, not three.
                    wrong, is_refused = attack_one(kind, name, number, seed, Path(folder), limit)
                    if not wrong.endswith("of CPU"):
                        break
                counts[name] += 1
                refused[name] += is_refused
                if wrong:
                    failures.append(Failure(name, number, wrong))
            number += 1
    for name, inputs_read in counts.items():
        print(f"{name:24}{inputs_read:8} inputs{refused[name]:8} refused")
    return failures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(4)))
    parser.add_argument("--inputs", type=int)
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--only", nargs="+", default=[])
    parser.add_argument("--first", type=int, default=1)
    parser.add_argument("--limit", type=float, default=SECONDS, help="seconds of CPU for an input; more if others run")
    args = parser.parse_args()
    print(f"seed {args.seed}", flush=True)
    found = attack(
        args.seed, args.inputs, args.seconds or (None if args.inputs else 120), args.only, args.first, args.limit
    )
    seen: Counter = Counter()
    for failure in found:
        what = f"{failure.kind}: {failure.what}"
        seen[what] += 1
        if seen[what] == 1:
            print(f"{failure.kind} {failure.number}: {failure.what}")
    print(f"{len(found)} failures of {len(seen)} kinds, seed {args.seed}")
    sys.exit(1 if found else 0)
