"""generate.py as a user runs it: files, messages, exit codes, and what two runs have in common."""

import gc
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
import weights
from errors import InputError
from model.attention import plain_attention
from model.clip import CLIPTextEncoder
from model.t5 import T5Encoder
from model.transformer import Flux, FluxParams
from regional.attention import dense_attention, portable_attention
from regional.layout import Layout
from regional.mask import RegionTokens
from runtime import choose
from tools.metadata import EXIF_DESCRIPTION, write

ROOT = Path(__file__).parent.parent
A = {
    "prompt": "a harbour at dawn",
    "background_prompt": "the sea",
    "width": 96,
    "height": 64,
    "steps": 3,
    "seed": 3,
    "max_sequence_length": 32,
    "mask_inject_steps": 2,
    "regions": [{"prompt": "a red boat", "box": [0, 0, 48, 64]}, {"prompt": "a lighthouse", "box": [32, 16, 96, 48]}],
}
B = {**A, "prompt": "a forest", "width": 64, "regions": [{"prompt": "a fox", "box": [16, 16, 48, 48]}], "seed": 5}


@pytest.fixture
def make(golden, tmp_path, monkeypatch):
    """make(layout, *flags) runs generate.py in tmp_path on a tiny random FLUX and gives its exit code."""
    monkeypatch.chdir(tmp_path)

    def run(layout: dict, *flags: str, model: Path = golden / "models" / "flux-tiny-dev") -> int:
        Path("layout.yaml").write_text(yaml.safe_dump(layout))
        return generate.main(["--layout", "layout.yaml", "--model", str(model), "--device", "cpu", *flags])

    return run


def latents(make, layout, *flags) -> torch.Tensor:
    file = Path("z.safetensors")
    assert make(layout, "--output", "z.png", "--save-latents", str(file), "--overwrite", *flags) == 0
    return load_file(file)["latents"]


# ------------------------------------------------------------------------------------------------ what is computed


def test_no_regions_no_steps_and_beta_one_are_plain_flux_bit_for_bit(make):
    plain = latents(make, {**A, "regions": []})
    assert torch.equal(plain, latents(make, A, "--mask-inject-steps", "0"))
    assert torch.equal(plain, latents(make, A, "--base-ratio", "1"))
    assert not torch.equal(plain, latents(make, A))


def test_no_regions_calls_the_model_as_if_regions_did_not_exist(make, monkeypatch):
    """The plain path itself: plain attention, and no join function is passed."""
    seen, forward = [], Flux.forward

    def watched(self, *args, **hooks):
        seen.append((args[7] is plain_attention, set(hooks)))
        return forward(self, *args, **hooks)

    monkeypatch.setattr(Flux, "forward", watched)
    latents(make, {**A, "regions": []})
    assert seen == [(True, {"modulation"})] * 3
    seen.clear()
    latents(make, A)
    assert seen == [(False, {"join", "modulation"})] * 2 + [(True, {"modulation"})]


@pytest.fixture
def kernel():
    """The kernel's module, in Triton's interpreter (see conftest.py)."""
    module = pytest.importorskip("regional.kernel")
    if not module.INTERPRETED:
        pytest.skip("there is a GPU")
    return module


def test_the_kernel_draws_what_the_portable_attention_draws(make, monkeypatch, kernel):
    monkeypatch.setattr(kernel, "launch_for", lambda *_: kernel.Launch(128, 128, num_warps=8, num_stages=2, tma=True))
    ours, theirs = latents(make, A, "--attention", "kernel"), latents(make, A, "--attention", "portable")
    assert not torch.equal(ours, theirs) and (ours - theirs).abs().max() < 1e-5


def test_auto_is_the_portable_attention_without_a_gpu(make, capsys):
    latents(make, A, "--verbose")
    errors = capsys.readouterr().err
    assert "masked attention: portable" in errors and "unmasked attention: as torch chooses" in errors


def test_which_attention_is_chosen(monkeypatch, kernel):
    def chosen(name: str, device: str):
        return choose.choose_attention(name, torch.device(device), torch.bfloat16, False)

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert chosen("auto", "cuda").func is chosen("kernel", "cuda").func is kernel.kernel_attention
    assert chosen("auto", "mps") is chosen("auto", "cpu") is chosen("portable", "cuda") is portable_attention
    assert chosen("dense", "cuda") is dense_attention
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert chosen("auto", "cuda") is portable_attention
    with pytest.raises(InputError, match="Ampere"):
        chosen("kernel", "cuda")


@pytest.mark.parametrize(
    "wrong", [{"device": "gpu"}, {"dtype": "float16"}, {"attention": "x"}, {"quantize": "fp9"}, {"offload": "block"}]
)
def test_a_pipeline_refuses_what_it_does_not_know(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(InputError, match=f"--{name} {value}"):
        pipeline.Pipeline("pocket", **{"device": "cpu", **wrong})


def test_the_librarys_fastest_attention_is_preferred(monkeypatch):
    """On a GPU; here a tensor that says it is on one. The shape that is timed is that of the base branch."""
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


@pytest.mark.parametrize("dtype, interpreted", [("float32", False), ("bfloat16", True)])
def test_the_kernel_is_refused_where_it_cannot_run(make, monkeypatch, capsys, kernel, dtype, interpreted):
    monkeypatch.setattr(kernel, "INTERPRETED", interpreted)
    assert make(A, "--attention", "kernel", "--dtype", dtype) == 2
    assert "--attention kernel" in capsys.readouterr().err and not list(Path().glob("*.png"))


def test_the_kernel_without_triton_is_an_error(make, monkeypatch, capsys):
    monkeypatch.delattr("regional.kernel", raising=False)
    monkeypatch.setitem(sys.modules, "regional.kernel", None)
    assert make(A, "--attention", "kernel") == 2
    assert "Triton is missing" in capsys.readouterr().err


def test_sorting_the_tokens_changes_nothing_but_their_order(make, monkeypatch):
    ours = latents(make, A)
    tokens = RegionTokens.sorted
    monkeypatch.setattr(RegionTokens, "sorted", lambda self: (self, torch.arange(len(self.image_bits))))
    unsorted = latents(make, A)
    assert not torch.equal(ours, unsorted) and (ours - unsorted).abs().max() < 1e-5
    monkeypatch.setattr(RegionTokens, "sorted", lambda self: (self, tokens(self)[1]))  # other bits than the order's
    assert (ours - latents(make, A)).abs().max() > 1e-2


# ------------------------------------------------------------------------------------------------ other methods


def test_the_plain_method_is_plain_flux(make):
    assert torch.equal(latents(make, A, "--method", "plain"), latents(make, {**A, "regions": []}))


def test_one_region_by_rpg_is_plain_flux_with_its_prompt(make):
    """Over the whole picture, at base_ratio 0 and in all steps, its composition is that of one picture."""
    whole = {**A, "regions": [{"prompt": "a red boat", "box": [0, 0, 96, 64]}]}
    composed = latents(make, whole, "--method", "rpg", "--base-ratio", "0", "--mask-inject-steps", "100%")
    own = latents(make, {**A, "prompt": "a red boat", "regions": []})
    assert (composed - own).abs().max() < 1e-5


def test_rpg_composes_and_then_goes_on_plainly(make):
    composed = latents(make, A, "--method", "rpg")
    assert not torch.equal(composed, latents(make, A)) and not torch.equal(
        composed, latents(make, A, "--method", "plain")
    )
    assert torch.equal(latents(make, A, "--method", "rpg", "--base-ratio", "1"), latents(make, A, "--method", "plain"))


def test_a_shorter_text_for_regions_is_what_the_model_gets(make, monkeypatch):
    seen, forward = [], Flux.forward

    def recording(self, img, img_ids, txt, *args, **hooks):
        seen.append(txt.shape[1])
        return forward(self, img, img_ids, txt, *args, **hooks)

    monkeypatch.setattr(Flux, "forward", recording)
    latents(make, A, "--region-max-sequence-length", "8")
    assert seen == [32 + 3 * 8] * 2 + [32]  # two regions and the background


def test_texts_as_long_as_the_base_prompts_are_the_default(make):
    assert torch.equal(latents(make, A), latents(make, A, "--region-max-sequence-length", "32"))


# ------------------------------------------------------------------------------------------------ sweeps and maps


def test_a_sweep_makes_every_picture_and_a_sheet(make, capsys):
    assert make(A, "--sweep", "base_ratio=0,0.3", "--sweep", "mask-inject-steps=0,40%", "--seed", "1", "2") == 0
    made = capsys.readouterr().out.split()
    assert len(made) == 9 and made[-1] == "layout_sheet.png"
    assert set(made[:8]) == {
        f"layout_base_ratio={beta}_mask_inject_steps={steps}_{seed}.png"
        for beta in ("0", "0.3") for steps in ("0", "40%") for seed in (1, 2)
    }  # fmt: skip
    with Image.open("layout_sheet.png") as sheet:
        assert (
            sheet.size[0] == 2 * 96 + 8 and sheet.size[1] > 4 * 64
        )  # a column for each T, a row for each beta and seed
    for name in made[:8]:
        made_by = json.loads(Image.open(name).text["layout"])
        said = f"base_ratio={made_by['base_ratio']:g}_mask_inject_steps={made_by['mask_inject_steps']}"
        assert name == f"layout_{said}_{made_by['seed']}.png"


def test_a_swept_picture_is_the_one_that_flags_make(make):
    assert make(A, "--sweep", "method=plain,regional", "--output", "a.png") == 0
    assert make(A, "--method", "plain", "--output", "b.png") == 0
    assert Image.open("a_method=plain.png").tobytes() == Image.open("b.png").tobytes()


@pytest.mark.parametrize(
    "sweep, told",
    [("prompt=a,b", "base_ratio"), ("base_ratio=2", "base-ratio"), ("base_ratio", "base_ratio"), ("steps=[", "steps")],
)
def test_a_sweep_that_makes_no_sense_is_an_error(make, capsys, sweep, told):
    assert make(A, "--sweep", sweep) == 2
    assert told in capsys.readouterr().err and not list(Path().glob("*.png"))


def test_a_sweep_overwrites_nothing(make):
    Path("z_sheet.png").write_text("mine")
    assert make(A, "--sweep", "base_ratio=0,0.1", "--output", "z.png") == 2
    assert Path("z_sheet.png").read_text() == "mine" and not Path("z_base_ratio=0.png").exists()


def test_a_key_swept_twice_is_an_error(make, capsys):
    assert make(A, "--sweep", "base_ratio=0,0.1", "--sweep", "base-ratio=0.2") == 2
    assert "twice" in capsys.readouterr().err


def test_maps_overwrite_nothing_and_say_when_there_are_none(make, capsys):
    Path("maps").mkdir()
    Path("maps/a_step7.png").write_text("mine")
    assert make(A, "--attention-maps", "maps", "--output", "a.png") == 2
    assert not Path("a.png").exists()
    assert make(A, "--attention-maps", "maps", "--output", "b.png", "--method", "plain") == 0
    assert "no attention maps" in capsys.readouterr().err and not Path("maps/b.safetensors").exists()


def test_attention_maps_are_shares_inside_the_regions(make):
    plain = latents(make, A)
    assert torch.equal(plain, latents(make, A, "--attention-maps", "maps"))  # watching changes nothing
    maps = load_file("maps/z.safetensors")["maps"]
    assert maps.shape == (2, 5, 3, 24)  # steps; 2 double and 3 single blocks; 2 regions and the background; tokens
    assert maps.min() >= 0 and maps.sum(2).max() <= 1.001
    left = torch.zeros(4, 6, dtype=torch.bool)
    left[:, :3] = True
    assert (maps[:, :, 0] > 0).eq(left.flatten()).all()  # the first region's text is looked at in its box, only there
    for step in 1, 2:
        assert Image.open(f"maps/z_step{step}.png").size[0] == 5 * 96 + 4 * 8
    assert not Path("maps/z_step3.png").exists()


def test_a_region_without_strength_is_not_looked_at(make):
    first, second = A["regions"]
    assert make({**A, "regions": [{**first, "strength": 0}, second]}, "--attention-maps", "m", "--output", "z.png") == 0
    maps = load_file("m/z.safetensors")["maps"]
    assert not maps[:, :, 0].any() and maps[:, :, 1].any()


def test_defaults_written_out_change_nothing(make):
    """Strength 1, no feather, the layout's own steps and ratio: the published method to the bit."""
    own = {"strength": 1, "feather": 0, "mask_inject_steps": 2, "base_ratio": 0.3}
    more = {
        "image_attention": "isolated",
        "base_stream": "separate",
        "double_blocks": "every 1",
        "single_blocks": "0-99",
    }
    written = {**A, **more, "regions": [{**region, **own} for region in A["regions"]]}
    assert torch.equal(latents(make, A), latents(make, written))


@pytest.mark.parametrize(
    "change",
    [{"strength": 2}, {"feather": 48}, {"mask_inject_steps": 1}, {"base_ratio": 0.1}],
    ids=lambda change: next(iter(change)),
)
def test_each_setting_of_a_region_does_something(make, change):
    first, second = A["regions"]
    ours = latents(make, {**A, "regions": [{**first, **change}, second]})
    assert ours.isfinite().all() and (ours - latents(make, A)).abs().max() > 1e-3


@pytest.mark.parametrize(
    "flags", [["--image-attention", "open"], ["--base-stream", "shared"], ["--single-blocks", "0"]]
)
def test_each_variant_does_something(make, flags):
    ours = latents(make, A, *flags)
    assert ours.isfinite().all() and (ours - latents(make, A)).abs().max() > 1e-3


def test_the_library_example_of_the_readme_runs(monkeypatch):
    monkeypatch.chdir(ROOT)
    code = (ROOT / "README.md").read_text().split("```python\n")[1].split("```")[0]
    names = {}
    exec(code.replace("seed in (1, 2, 3)", "seed in (1,)"), names)
    assert names["picture"].size == (256, 256) and len(names["pictures"]) == 1


def test_a_second_layout_in_the_same_process_is_as_in_a_fresh_one(make, golden, tmp_path):
    latents(make, A)
    second = latents(make, B)
    args = ["--layout", "layout.yaml", "--model", golden / "models" / "flux-tiny-dev", "--device", "cpu"]
    command = [sys.executable, ROOT / "generate.py", *args, "--output", "f.png", "--save-latents", "f.safetensors"]
    subprocess.run([str(c) for c in command], check=True, cwd=tmp_path)
    assert torch.equal(second, load_file("f.safetensors")["latents"])


def test_the_order_of_the_regions_has_no_effect(make):
    turned = {**A, "regions": A["regions"][::-1]}
    assert (latents(make, A) - latents(make, turned)).abs().max() < 1e-5


def test_the_background_prompt_does_not_matter_where_nothing_is_uncovered(make):
    full = {**A, "regions": [{"prompt": "a red boat", "box": [0, 0, 96, 64]}]}
    assert torch.equal(latents(make, full), latents(make, full, "--background-prompt", "the desert"))


def test_a_flag_wins_over_the_layout(make):
    assert torch.equal(latents(make, A, "--steps", "2", "--seed", "9"), latents(make, {**A, "steps": 2, "seed": 9}))


def test_defaults_of_steps_and_text_length_come_from_the_model(make, golden, monkeypatch):
    seen = []
    monkeypatch.setattr(
        pipeline, "sample", lambda flux, layout, *_, **__: (seen.append(layout), torch.zeros(1, 16, 8, 12))[1]
    )
    short = {key: A[key] for key in ("prompt", "width", "height", "seed")}
    for name in ("dev", "schnell"):
        make(short, "--output", f"{name}.png", model=golden / "models" / f"flux-tiny-{name}")
    assert [(layout.steps, layout.max_sequence_length) for layout in seen] == [(24, 512), (4, 256)]


def test_the_encoders_are_gone_before_the_transformer_is_loaded_and_it_before_the_autoencoder(make, monkeypatch):
    alive, before = {}, {id(o) for o in gc.get_objects()}  # other tests' models, kept by their fixtures

    def watch(name: str, kinds: tuple) -> None:
        load = getattr(weights, name)

        def loading(*args):
            gc.collect()
            alive[name] = [type(o).__name__ for o in gc.get_objects() if type(o) in kinds and id(o) not in before]
            return load(*args)

        monkeypatch.setattr(weights, name, loading)

    watch("load_flux", (T5Encoder, CLIPTextEncoder))
    watch("load_autoencoder", (T5Encoder, CLIPTextEncoder, Flux))
    latents(make, A)
    assert alive == {"load_flux": [], "load_autoencoder": []}


# ------------------------------------------------------------------------------------------------ files


def test_a_png_carries_what_made_it(make):
    assert make(A, "--output", "a.png") == 0
    text = Image.open("a.png").text
    assert text["parameters"].startswith("a harbour at dawn\nSteps: 3") and "Seed: 3" in text["parameters"]
    made_by = json.loads(text["layout"])
    assert made_by["seed"] == 3 and made_by["regions"][1]["prompt"] == "a lighthouse" and made_by["base_ratio"] == 0.3
    assert made_by["model"].endswith("flux-tiny-dev") and made_by["dtype"] == "torch.float32"
    assert made_by["files"]["ae"].endswith("ae.safetensors")


@pytest.mark.parametrize("suffix, kind", [(".jpg", "JPEG"), (".webp", "WEBP"), (".png", "PNG")])
def test_the_suffix_decides_the_format(make, suffix, kind):
    assert make(A, "--output", f"a{suffix}") == 0
    image = Image.open(f"a{suffix}")
    assert image.format == kind and image.size == (96, 64)
    if suffix != ".png":
        assert json.loads(image.getexif()[EXIF_DESCRIPTION])["seed"] == 3


def test_several_seeds_make_several_pictures(make, capsys):
    assert make(A, "--seed", "7", "8", "--output", "a.png", "--save-latents", "z.safetensors") == 0
    assert capsys.readouterr().out.split() == ["a_7.png", "a_8.png"]
    assert not torch.equal(load_file("z_7.safetensors")["latents"], load_file("z_8.safetensors")["latents"])
    assert torch.equal(load_file("z_8.safetensors")["latents"], latents(make, A, "--seed", "8"))


def test_latents_are_saved_as_the_vae_gets_them(make):
    z = latents(make, A)
    assert z.shape == (1, 16, 8, 12) and z.dtype == torch.float32


def test_an_existing_output_is_kept_unless_told(make, capsys):
    Path("a.png").write_text("precious")
    assert make(A, "--output", "a.png") == 2
    assert Path("a.png").read_text() == "precious" and "--overwrite" in capsys.readouterr().err
    assert make(A, "--output", "a.png", "--overwrite") == 0
    assert Image.open("a.png").size == (96, 64)


def test_without_an_output_name_nothing_is_overwritten(make):
    assert make(A) == 0 and make(A) == 0
    assert Path("layout.png").exists() and Path("layout_1.png").exists()


def test_an_unfinished_file_never_has_the_final_name(tmp_path):
    def broken(file):
        file.write_text("half")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError):
        write(tmp_path / "a.png", broken)
    assert list(tmp_path.iterdir()) == []


def test_a_random_seed_is_printed_and_repeats_the_picture(make, capsys):
    layout = {key: value for key, value in A.items() if key != "seed"}
    first = latents(make, layout)
    seed = capsys.readouterr().err.split("seed ")[1].split()[0]
    assert torch.equal(first, latents(make, layout, "--seed", seed))


def test_dots_in_a_layouts_name_stay(make, golden):
    assert make(A) == 0
    Path("layout.yaml").rename("scene.v2.yaml")
    assert generate.main(["--layout", "scene.v2.yaml", "--steps", "1", "--model", str(golden / "models" / "flux-tiny-dev")]) == 0
    assert Path("scene.v2.png").exists()


def test_a_layout_too_long_for_a_jpeg_is_left_out_with_a_warning(make, capsys):
    assert make({**A, "background_prompt": "sea " * 20000}, "--output", "a.jpg") == 0
    assert "does not carry it" in capsys.readouterr().err
    assert EXIF_DESCRIPTION not in Image.open("a.jpg").getexif()


def test_ctrl_c_keeps_the_pictures_that_are_finished(make, monkeypatch, capsys):
    sample = pipeline.sample

    def interrupted(flux, layout, tokens, conditioning, seed, *rest, **more):
        if seed == 3:
            raise KeyboardInterrupt
        return sample(flux, layout, tokens, conditioning, seed, *rest, **more)

    monkeypatch.setattr(pipeline, "sample", interrupted)
    assert make(A, "--seed", "1", "2", "3", "4", "--output", "a.png") == 130
    assert capsys.readouterr().out.split() == ["a_1.png", "a_2.png"] and Path("a_2.png").exists()


def test_tokenizers_of_another_model_are_refused(make, golden, tmp_path, capsys):
    model = tmp_path / "mixed"
    shutil.copytree(golden / "models" / "flux-tiny-dev", model)
    vocab = json.loads((model / "tokenizer" / "vocab.json").read_text())
    vocab["<|endoftext|>"] += 1000
    (model / "tokenizer" / "vocab.json").write_text(json.dumps(vocab))
    assert make(A, "--output", "a.png", model=model) == 2
    error = capsys.readouterr().err
    assert "tokenizer" in error and "don't match" in error


def test_a_prompt_needs_no_layout(make, golden, capsys):
    flags = [
        "--prompt",
        "a fox",
        "--width",
        "64",
        "--height",
        "64",
        "--steps",
        "1",
        "--model",
        str(golden / "models" / "flux-tiny-dev"),
    ]
    assert generate.main(flags) == 0
    assert capsys.readouterr().out.split() == ["picture.png"]


def test_a_cut_prompt_is_reported_with_the_text_that_was_cut(make, capsys):
    assert make({**A, "prompt": "one two three four five six " * 10 + "and a swan"}, "--output", "a.png") == 0
    error = capsys.readouterr().err
    assert "warning: 32 text tokens" in error and "and a swan" in error


# ------------------------------------------------------------------------------------------------ mistakes


def test_mistakes_end_with_code_two_and_one_sentence(make, golden, tmp_path, capsys):
    good = golden / "models" / "flux-tiny-dev"
    whole = (good / "flux1-dev.safetensors").read_bytes()
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
        (["--ae", str(good / "flux1-dev.safetensors")], ["--ae", "flux1-dev.safetensors"]),
        (["--model", "empty"], ["--model", "empty"]),
        (["--model", "nowhere"], ["--model", "nowhere"]),
        (["--output", "a.gif"], ["--output", "a.gif"]),
        (["--output", "nowhere/a.png"], ["nowhere"]),
        (["--output", "folder.png", "--overwrite"], ["folder.png"]),
        (["--output", "x" * 252 + ".png"], ["x.png"]),
        (["--save-latents", "z.png"], ["--save-latents z.png"]),
        (["--seed", "-4"], ["--seed", "-4"]),
        (["--width", "1000"], ["--width", "1000"]),
        (["--height", "8"], ["--height", "8"]),
        (["--steps", "0"], ["--steps", "0"]),
        (["--base-ratio", "1.5"], ["--base-ratio", "1.5"]),
        (["--mask-inject-steps", "many"], ["--mask-inject-steps", "many"]),
    ]
    if not torch.cuda.is_available():
        mistakes.append((["--device", "cuda"], ["--device", "cuda"]))
    for flags, names in mistakes:
        assert make(A, *flags) == 2, flags
        out, error = capsys.readouterr()
        last = error.strip().splitlines()[-1]
        assert last.startswith("generate.py: ") and all(name in last for name in names), (flags, error)
        assert "Traceback" not in error and out == ""
    assert [str(path) for path in Path().glob("*.png")] == ["folder.png"]


@pytest.mark.parametrize("flags", [["--stepz", "3"], ["--steps", "three"], [], ["--overlap", "topmost"]])
def test_a_wrong_flag_ends_with_code_two(flags, capsys):
    with pytest.raises(SystemExit) as caught:
        generate.main(flags)
    assert caught.value.code == 2
    assert "Traceback" not in capsys.readouterr().err
