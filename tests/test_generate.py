"""What is computed: which attention, which prompts, which components; and what mistakes lead to."""

import gc
import inspect
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend

import generate
import pipeline
from errors import InputError
from model.attention import plain_attention
from model.clip import CLIPTextEncoder
from model.t5 import T5Encoder
from model.transformer import Flux, FluxParams
from regional.attention import dense_attention, portable_attention
from regional.layout import Layout
from regional.mask import RegionTokens
from regional.reader import read_layout
from runtime import choose
from runtime.unmasked import kernel_or_library
from settings import Settings

ROOT = Path(__file__).parent.parent
BOAT = {"prompt": "a red boat", "box": [0, 0, 48, 64]}
TOWER = {"prompt": "a lighthouse", "box": [32, 16, 96, 48]}
A = {
    "prompt": "a harbor at dawn",
    "background_prompt": "the sea",
    "width": 96,
    "height": 64,
    "steps": 3,
    "seed": 3,
    "max_sequence_length": 32,
    "mask_inject_steps": 2,
    "regions": [BOAT, TOWER],
}


@pytest.fixture(scope="module")
def tiny_pipeline(golden):
    return pipeline.Pipeline(golden / "models" / "flux-tiny-dev", device="cpu")


@pytest.fixture
def latents(tiny_pipeline):
    """latents(key=value ...) denoises A with these keys changed."""

    def latents(extensions=(), **changes) -> torch.Tensor:
        layout = read_layout(None, A | changes)
        return tiny_pipeline.denoise(tiny_pipeline.prepare(layout), layout.seed, extensions)

    return latents


@pytest.fixture
def calls(monkeypatch) -> list[inspect.BoundArguments]:
    """The arguments of each forward pass of the transformer from now on."""
    seen = []
    forward = Flux.forward

    def watched(self, *args, **kwargs):
        seen.append(inspect.signature(forward).bind(self, *args, **kwargs))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(Flux, "forward", watched)
    return seen


# -------------------------------------------------------------------------------- what is computed


def test_no_regions_no_steps_and_beta_one_are_plain_flux_bit_for_bit(latents):
    plain = latents(regions=[])
    assert plain.shape == (1, 16, 8, 12) and plain.dtype == torch.float32
    for changes in {"mask_inject_steps": 0}, {"base_ratio": 1}, {"method": "plain"}:
        assert torch.equal(plain, latents(**changes))
    assert not torch.equal(plain, latents())


def test_no_regions_calls_the_model_as_if_regions_did_not_exist(latents, calls):
    """In the plain steps there is plain attention, and the sequence is joined as FLUX does."""

    def is_plain(call: inspect.BoundArguments) -> tuple[bool, bool]:
        call.apply_defaults()
        usual = inspect.signature(Flux.blocks if hasattr(Flux, "blocks") else Flux.forward).parameters["join"].default
        return call.arguments["attention"] is plain_attention, call.arguments["join"] is usual

    latents(regions=[])
    assert [is_plain(call) for call in calls] == [(True, True)] * 3
    calls.clear()
    latents()
    assert [is_plain(call) for call in calls] == [(False, False)] * 2 + [(True, True)]


def test_shorter_prompts_of_regions_are_what_the_model_gets(latents, calls):
    full = latents()
    calls.clear()
    latents(region_max_sequence_length=8)
    lengths = [call.arguments["txt"].shape[1] for call in calls]
    assert lengths == [32 + 3 * 8] * 2 + [32]  # two regions and the background
    assert torch.equal(full, latents(region_max_sequence_length=32))


def test_sorting_the_tokens_changes_nothing_but_their_order(latents, monkeypatch):
    ours = latents()
    tokens = RegionTokens.sorted
    monkeypatch.setattr(RegionTokens, "sorted", lambda self: (self, torch.arange(len(self.image_bits))))
    unsorted = latents()
    assert not torch.equal(ours, unsorted) and (ours - unsorted).abs().max() < 1e-5
    # Bits in another order than the tokens' would be wrong.
    monkeypatch.setattr(RegionTokens, "sorted", lambda self: (self, tokens(self)[1]))
    assert (ours - latents()).abs().max() > 1e-2


def test_the_order_of_the_regions_has_no_effect(latents):
    assert (latents() - latents(regions=[TOWER, BOAT])).abs().max() < 1e-5


def test_the_background_prompt_does_not_matter_where_nothing_is_uncovered(latents):
    full = [{"prompt": "a red boat", "box": [0, 0, 96, 64]}]
    assert torch.equal(latents(regions=full), latents(regions=full, background_prompt="the desert"))


def test_one_region_by_rpg_is_plain_flux_with_its_prompt(latents):
    """Over the whole image, at base_ratio 0 and in all steps, the composition is one image."""
    whole = [{"prompt": "a red boat", "box": [0, 0, 96, 64]}]
    composed = latents(regions=whole, method="rpg", base_ratio=0, mask_inject_steps="100%")
    assert (composed - latents(prompt="a red boat", regions=[])).abs().max() < 1e-5


def test_rpg_composes_and_then_continues_plainly(latents):
    composed = latents(method="rpg")
    plain = latents(method="plain")
    assert not torch.equal(composed, latents()) and not torch.equal(composed, plain)
    assert torch.equal(latents(method="rpg", base_ratio=1), plain)


def test_defaults_written_out_change_nothing(latents):
    """Strength 1, no feather, the layout's own steps and ratio: the published method to the bit."""
    own = {"strength": 1, "feather": 0, "mask_inject_steps": 2, "base_ratio": 0.3}
    more = {"image_attention": "isolated", "base_stream": "separate", "double_blocks": "every 1"}
    regions = [{**region, **own} for region in A["regions"]]
    assert torch.equal(latents(), latents(**more, single_blocks="0-99", regions=regions))


@pytest.mark.parametrize(
    "changes",
    [
        {"regions": [{**BOAT, "strength": 2}, TOWER]},
        {"regions": [{**BOAT, "feather": 48}, TOWER]},
        {"regions": [{**BOAT, "mask_inject_steps": 1}, TOWER]},
        {"regions": [{**BOAT, "base_ratio": 0.1}, TOWER]},
        {"image_attention": "open"},
        {"base_stream": "shared"},
        {"single_blocks": "0"},
    ],
    ids=str,
)
def test_each_setting_does_something(latents, changes):
    ours = latents(**changes)
    assert ours.isfinite().all() and (ours - latents()).abs().max() > 1e-3


def test_defaults_of_steps_and_text_length_come_from_the_model(golden, monkeypatch):
    seen = []

    def sample(flux, layout, *_, **__):
        seen.append((layout.steps, layout.max_sequence_length))
        return torch.zeros(1, 16, 8, 12)

    monkeypatch.setattr(pipeline, "sample", sample)
    layout = Layout(prompt="a harbor", width=96, height=64)
    for name in ("dev", "schnell"):
        tiny = pipeline.Pipeline(golden / "models" / f"flux-tiny-{name}", device="cpu")
        tiny.denoise(tiny.prepare(layout), 1)
    assert seen == [(24, 512), (4, 256)]


def test_the_encoders_are_gone_before_the_transformer_and_it_before_the_vae(run, monkeypatch):
    alive = {}
    before = {id(thing) for thing in gc.get_objects()}  # other tests' models, kept by fixtures
    load = pipeline.Parts.load
    kinds = (T5Encoder, CLIPTextEncoder, Flux)

    def loading(self, name, *rest):
        gc.collect()
        found = [x for x in gc.get_objects() if type(x) in kinds and id(x) not in before]
        alive[name] = [type(x).__name__ for x in found]
        return load(self, name, *rest)

    monkeypatch.setattr(pipeline.Parts, "load", loading)
    assert run("--prompt", "a fox", "--width", 64, "--height", 64, "--steps", 1).made == ["picture.png"]
    assert alive["flux"] == alive["ae"] == [] and {"t5", "clip"} <= alive.keys()


def test_a_second_layout_in_the_same_process_is_as_in_a_fresh_one(latents, model, tmp_path):
    other = {"prompt": "a forest", "width": 64, "regions": [{"prompt": "a fox", "box": [16, 16, 48, 48]}]}
    latents()
    second = latents(**other)
    (tmp_path / "layout.yaml").write_text(yaml.safe_dump(A | other))
    flags = ["--model", model, "--device", "cpu", "--output", "f.png", "--save-latents", "f.safetensors"]
    command = [sys.executable, ROOT / "generate.py", "--layout", "layout.yaml", *flags]
    subprocess.run(command, check=True, cwd=tmp_path)
    assert torch.equal(second, load_file(tmp_path / "f.safetensors")["latents"])


def test_the_library_example_of_the_readme_runs(monkeypatch):
    monkeypatch.chdir(ROOT)
    code = (ROOT / "README.md").read_text().split("```python\n")[1].split("```")[0]
    names = {}
    exec(code.replace("seed in (1, 2, 3)", "seed in (1,)"), names)
    images = [value for value in names.values() if isinstance(value, Image.Image)]
    lists = [value for value in names.values() if isinstance(value, list)]
    assert images[0].size == (256, 256) and [len(images) for images in lists] == [1]
    assert generate.Pipeline is pipeline.Pipeline


def test_a_pipeline_takes_settings_or_their_fields(model, tiny_pipeline):
    assert tiny_pipeline.settings == Settings(model=model, device="cpu")
    assert pipeline.Pipeline(Settings(model=model, device="cpu")).metadata == tiny_pipeline.metadata
    with pytest.raises(TypeError, match="dtipe"):
        pipeline.Pipeline(model, dtipe="float32")


@pytest.mark.parametrize(
    "name, value",
    [("device", "gpu"), ("dtype", "float16"), ("attention", "x"), ("quantize", "fp9"), ("offload", "block")],
)
def test_a_pipeline_refuses_unknown_settings(name, value):
    with pytest.raises(InputError, match=f"--{name} {value}"):
        pipeline.Pipeline("pocket", **{"device": "cpu", name: value})


# ------------------------------------------------------------------------------- which attention


@pytest.fixture
def kernel():
    """The kernel's module, in Triton's interpreter (see conftest.py)."""
    module = pytest.importorskip("regional.kernel")
    if not module.INTERPRETED:
        pytest.skip("there is a GPU")
    return module


def test_the_kernel_generates_what_the_portable_attention_does(tiny_pipeline, model, monkeypatch, kernel):
    launch = kernel.Launch(128, 128, num_warps=8, num_stages=2, tma=True)
    monkeypatch.setattr(kernel, "launch_for", lambda *_: launch)
    prepared = tiny_pipeline.prepare(read_layout(None, A | {"steps": 1, "mask_inject_steps": 1}))
    other = pipeline.Pipeline(model, device="cpu", attention="kernel")
    ours = other.denoise(prepared, 1)
    theirs = tiny_pipeline.denoise(prepared, 1)
    assert not torch.equal(ours, theirs) and (ours - theirs).abs().max() < 1e-5


def test_which_attention_is_chosen(monkeypatch, kernel):
    def chosen(name: str, device: str):
        return choose.choose_attention(name, torch.device(device), torch.bfloat16, False)

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert chosen("auto", "cuda").func is chosen("kernel", "cuda").func is kernel_or_library
    assert chosen("auto", "mps") is chosen("auto", "cpu") is chosen("portable", "cuda") is portable_attention
    assert chosen("dense", "cuda") is dense_attention
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert chosen("auto", "cuda") is portable_attention
    with pytest.raises(InputError, match="Ampere"):
        chosen("kernel", "cuda")


def test_the_librarys_fastest_attention_is_preferred(monkeypatch):
    """On a GPU; here a tensor that claims to be on one. The base branch's shape is timed."""
    asked = []
    fastest = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION]
    monkeypatch.setattr(choose, "timed_backends", lambda shape, *where: (asked.append((shape, *where)), fastest)[1])
    monkeypatch.setattr(choose, "sdpa_kernel", lambda backends, set_priority: (backends, set_priority))

    class OnGPU:
        device, dtype, shape = torch.device("cuda"), torch.bfloat16, (1, 32, 8)

    with torch.device("meta"):
        flux = Flux(FluxParams(hidden_size=64, num_heads=2, depth=1, depth_single_blocks=1))
    layout = Layout(prompt="", width=96, height=64)
    chosen = choose.library_attention(flux, layout, OnGPU(), False)
    assert chosen == ([*fastest, SDPBackend.MATH], True)
    assert asked == [((1, 2, 32 + 24, 32), torch.bfloat16, torch.device("cuda"))]


@pytest.fixture
def layout(tmp_path) -> str:
    (tmp_path / "layout.yaml").write_text(yaml.safe_dump(A | {"steps": 2, "mask_inject_steps": 1}))
    return "layout.yaml"


@pytest.mark.parametrize("dtype, interpreted", [("float32", False), ("bfloat16", True)])
def test_the_kernel_is_refused_where_it_cannot_run(run, layout, monkeypatch, kernel, dtype, interpreted):
    monkeypatch.setattr(kernel, "INTERPRETED", interpreted)
    ran = run("--layout", layout, "--attention", "kernel", "--dtype", dtype)
    assert ran.code == 2 and "--attention kernel" in ran.errors[-1] and not list(Path().glob("*.png"))


def test_the_kernel_without_triton_is_an_error(run, layout, monkeypatch):
    monkeypatch.delattr("regional.kernel", raising=False)
    monkeypatch.setitem(sys.modules, "regional.kernel", None)
    ran = run("--layout", layout, "--attention", "kernel")
    assert ran.code == 2 and "Triton is missing" in ran.errors[-1]


# ------------------------------------------------------------------------------- attention maps


def test_attention_maps_are_fractions_inside_the_regions(run, layout):
    """Observing changes nothing."""
    flags = ["--layout", layout, "--output", "z.png", "--overwrite", "--save-latents", "z.safetensors"]
    assert run(*flags, "--verbose").code == 0
    plain = load_file("z.safetensors")["latents"]
    assert run(*flags, "--attention-maps", "maps").code == 0
    assert torch.equal(plain, load_file("z.safetensors")["latents"])
    maps = load_file("maps/z.safetensors")["maps"]
    assert maps.shape == (1, 5, 3, 24)  # steps; 2 double and 3 single blocks; prompts; tokens
    assert maps.min() >= 0 and maps.sum(2).max() <= 1.001
    left = torch.zeros(4, 6, dtype=torch.bool)
    left[:, :3] = True
    assert (maps[:, :, 0] > 0).eq(left.flatten()).all()  # the first region's prompt, in its box
    assert Image.open("maps/z_step1.png").size[0] == 5 * 96 + 4 * 8
    assert not Path("maps/z_step2.png").exists()


def test_a_region_without_strength_gets_no_attention(tiny_pipeline):
    prepared = tiny_pipeline.prepare(read_layout(None, A | {"regions": [{**BOAT, "strength": 0}, TOWER]}))
    maps = tiny_pipeline.maps()
    tiny_pipeline.denoise(prepared, 3, [maps.extend])
    assert not maps.maps[:, :, 0].any() and maps.maps[:, :, 1].any()


def test_maps_overwrite_nothing_and_report_when_there_are_none(run, layout):
    Path("maps").mkdir()
    Path("maps/a_step7.png").write_text("mine")
    assert run("--layout", layout, "--attention-maps", "maps", "--output", "a.png").code == 2
    assert not Path("a.png").exists()
    ran = run("--layout", layout, "--attention-maps", "maps", "--output", "b.png", "--method", "plain")
    assert ran.code == 0 and "no attention maps" in ran.errors[-1]
    assert not Path("maps/b.safetensors").exists()


# ----------------------------------------------------------------------------- the command line


def test_a_flag_overrides_the_layout_and_what_is_automatic_is_reported(run, layout, latents):
    flags = ["--output", "z.png", "--save-latents", "z.safetensors", "--verbose"]
    ran = run("--layout", layout, "--steps", 3, "--mask-inject-steps", 2, "--seed", 9, *flags)
    assert ran.code == 0 and torch.equal(load_file("z.safetensors")["latents"], latents(seed=9))
    assert "masked attention: portable" in ran.errors
    assert "unmasked attention: as torch chooses" in ran.errors


def test_a_cut_prompt_is_reported_with_what_was_cut(tiny_pipeline, capsys):
    prompt = "one two three four five six " * 10 + "and a swan"
    tiny_pipeline.prepare(read_layout(None, A | {"prompt": prompt}))
    error = capsys.readouterr().err
    assert "warning: " in error and "32 tokens" in error and "and a swan" in error


def test_tokenizers_of_another_model_are_refused(run, golden, tmp_path):
    model = tmp_path / "mixed"
    shutil.copytree(golden / "models" / "flux-tiny-dev", model)
    vocab = json.loads((model / "tokenizer" / "vocab.json").read_text())
    vocab["<|endoftext|>"] += 1000
    (model / "tokenizer" / "vocab.json").write_text(json.dumps(vocab))
    ran = run("--prompt", "a fox", "--output", "a.png", model=model)
    assert ran.code == 2 and "tokenizer" in ran.errors[-1] and "don't match" in ran.errors[-1]


def test_mistakes_end_with_code_two_and_one_sentence(run, layout, model):
    whole = Path(model, "flux1-dev.safetensors").read_bytes()
    Path("cut.safetensors").write_bytes(whole[:100000])
    Path("pointer.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    Path("model.ckpt").write_bytes(b"PK\x03\x04")
    save_file({"lora_unet_double_blocks_0_img_mod_lin.lora_down.weight": torch.zeros(4, 4)}, "lora.safetensors")
    Path("empty").mkdir()
    Path("folder.png").mkdir()
    mistakes = [
        (["--flux", "cut.safetensors"], ["cut.safetensors", "100,000"]),
        (["--flux", "pointer.safetensors"], ["pointer.safetensors", "git-lfs"]),
        (["--flux", "model.ckpt"], ["model.ckpt", "pickle"]),
        (["--flux", "lora.safetensors"], ["lora.safetensors", "LoRA"]),
        (["--flux", "gone.safetensors"], ["--flux", "gone.safetensors"]),
        (["--ae", f"{model}/flux1-dev.safetensors"], ["--ae", "flux1-dev.safetensors"]),
        (["--model", "empty"], ["--model", "empty"]),
        (["--model", "nowhere"], ["--model", "nowhere"]),
        (["--output", "a.gif"], ["--output", "a.gif"]),
        (["--output", "nowhere/a.png"], ["nowhere"]),
        (["--output", "folder.png", "--overwrite"], ["folder.png"]),
        (["--output", "x" * 252 + ".png"], ["x.png"]),
        (["--save-latents", "z.png"], ["--save-latents z.png"]),
        (["--seed", "-4"], ["--seed", "-4"]),
        (["--width", "1000"], ["width", "1000"]),
        (["--height", "8"], ["height", "8"]),
        (["--steps", "0"], ["steps", "0"]),
        (["--base-ratio", "1.5"], ["base-ratio", "1.5"]),
        (["--mask-inject-steps", "many"], ["mask-inject-steps", "many"]),
    ]
    for flags, names in mistakes:
        named = model if "--model" not in flags else None
        code, made, errors = run("--layout", layout, *flags, model=named)
        assert code == 2 and made == [], flags
        assert errors[-1].startswith("generate.py: ") and all(name in errors[-1] for name in names), errors
    assert [str(path) for path in Path().glob("*.png")] == ["folder.png"]


@pytest.mark.parametrize("device", ["gpu"] + ["cuda:1"] * (not torch.cuda.is_available()))
def test_a_device_that_is_not_there_is_an_error(device, capsys):
    assert generate.main(["--prompt", "x", "--device", device]) == 2
    assert f"generate.py: --device {device}: " in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--stepz", "3"], ["--steps", "three"], [], ["--overlap", "topmost"]])
def test_a_wrong_flag_ends_with_code_two(flags, capsys):
    with pytest.raises(SystemExit) as caught:
        generate.main(flags)
    assert caught.value.code == 2
    assert "Traceback" not in capsys.readouterr().err
