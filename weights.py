"""Where a model's components are: which file feeds which network."""

from pathlib import Path
from typing import NamedTuple

from formats.components import ae_params, check_loads, clip_params, flux_params, t5_params
from formats.hub import Name, locate
from formats.recognize import WHAT, Source, find_model, pick, tokenizer_folder
from formats.safetensors import wrong


class Checkpoint(NamedTuple):
    """Where a model's components are. name: what the user called it. clip_tokenizer:
    a folder. t5_tokenizer: a tokenizer.json or spiece.model. redux: as it was given."""

    name: str
    flux: Source
    t5: Source
    clip: Source
    ae: Source
    clip_tokenizer: Path
    t5_tokenizer: Path
    redux: Name = None


def find(
    model: Name = None, flux: Name = None, t5: Name = None, clip: Name = None, ae: Name = None,
    redux: Name = None,
) -> Checkpoint:  # fmt: skip
    """A model's components, from headers alone. model: a repository, folder, all-in-one
    file or "pocket", the default. The others override components."""
    given = {"flux": flux, "t5": t5, "clip": clip, "ae": ae}
    missing = [part for part in given if not given[part]]
    place = find_model(str(model or "pocket"), missing) if model or missing else None
    sources = {}
    for part, path in given.items():
        own = locate(path, [], f"--{part} {path}") if path else place
        sources[part] = pick(part, f"--{part}" if path else "--model", own)
    check_widths(**sources)
    for source in sources.values():  # before minutes of loading
        check_loads(source)
    # The default model's tokenizers fit only its own encoders.
    near = place if model or not clip else None
    files = [["vocab.json", "merges.txt"]]
    clip_folder = tokenizer_folder("tokenizer", files, sources["clip"], near)
    near = place if model or not t5 else None
    files = [["tokenizer.json"], ["spiece.model"]]
    folder = tokenizer_folder("tokenizer_2", files, sources["t5"], near)
    t5_file = next(folder / file for (file,) in files if (folder / file).is_file())
    name = str(flux or model or "pocket")
    return Checkpoint(name, *sources.values(), clip_folder, t5_file, redux)


def check_widths(flux: Source, t5: Source, clip: Source, ae: Source) -> None:
    """InputError if the transformer expects text encoders of another width."""
    sizes = flux_params(flux)
    ae_params(ae)
    for source, width, expected in (
        (t5, t5_params(t5).d_model, sizes.context_in_dim),
        (clip, clip_params(clip).hidden_size, sizes.vec_in_dim),
    ):
        if width != expected:
            found = f"this {WHAT[source.part]} is {width} wide"
            problem = f"{found}, but {flux.path} expects {expected}"
            advice = f"name one that fits with --{source.part}"
            raise wrong(source.path, f"{problem}; {advice}")
