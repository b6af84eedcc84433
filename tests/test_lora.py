"""LoRAs: what each family's files do to each weight, by hand and against peft and diffusers; LoRAs
of single regions against merged ones, and token by token."""

import dataclasses
import json
import zlib
from functools import partial

import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close

from errors import InputError
from extensions.lora import Change, Full, Kronecker, LowRank, added, hooks_for, merge
from extensions.lora_files import read_lora
from extensions.region_lora import can_be_regional, stream_of, tokens_of
from model.clip import CLIPTextEncoder
from model.layers import FusedLinear
from model.t5 import T5Encoder
from model.transformer import Flux
from pipeline import Pipeline
from regional.extension import Branches
from regional.reader import read_layout

H = tiny.FLUX.hidden_size
MLP = tiny.FLUX.mlp_hidden
with torch.device("meta"):
    MODULES = {"flux": Flux(tiny.FLUX), "t5": T5Encoder(tiny.T5), "clip": CLIPTextEncoder(tiny.CLIP)}
BASE = {name: tensor.double() for name, tensor in tiny.flux_state().items()}
QKV = "lora_unet_double_blocks_0_img_attn_qkv"
KOHYA = ".lora_up.weight", ".lora_down.weight"
PEFT = ".lora_B.weight", ".lora_A.weight"
XLABS = ".up.weight", ".down.weight"


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def low_rank(key: str, rows: int, columns: int, names: tuple[str, str] = KOHYA, rank: int = 4):
    """A layer's two tensors in a file, each key's its own, and their product."""
    up, down = rand(rows, rank, seed=zlib.crc32(key.encode())), rand(rank, columns, seed=1)
    return {key + names[0]: up, key + names[1]: down}, up.double() @ down.double()


def layers(part: str = "flux") -> dict[str, nn.Linear]:
    return {name: m for name, m in MODULES[part].named_modules() if isinstance(m, nn.Linear)}


def zeros(shape) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.float64)


def read_file(tmp_path, tensors, metadata=None, modules=MODULES):
    file = tmp_path / "lora.safetensors"
    save_file({key: tensor.clone().contiguous() for key, tensor in tensors.items()}, file, metadata)
    return read_lora(file, modules)


def assert_adds(lora, expected, part: str = "flux", scale: float = 1.0, base=None, tolerance=1e-9):
    """What a file adds to each tensor (of `base`, or of zeros), in float64. tolerance: 1e-5 where products of
    factors are made in float32."""
    assert expected.keys() == {change.name for change in lora.changes[part]}
    for name, delta in expected.items():
        weight = base[name] if base else zeros(MODULES[part].state_dict()[name].shape)
        found = merge(weight, [(change, scale) for change in lora.changes[part] if change.name == name])
        before = nn.functional.pad(weight, (0, found.shape[-1] - weight.shape[-1]))
        assert_close(found - before, delta.double(), rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("part, number", [("flux", ""), ("clip", "1"), ("t5", "3"), ("t5", "2")])
def test_kohya(part, number, tmp_path):
    tensors = {}
    expected = {}
    for i, (name, layer) in enumerate(layers(part).items()):
        key = f"lora_{'te' if number else 'unet'}{number}_{name.replace('.', '_')}"
        own, product = low_rank(key, layer.out_features, layer.in_features)
        tensors |= own
        if i % 3:  # some without an alpha, which is then the rank; so is an alpha of 0
            tensors[f"{key}.alpha"] = torch.tensor(0.0 if i % 3 == 2 else 6.0)
        expected[f"{name}.weight"] = product * (1.5 if i % 3 == 1 else 1)
    lora = read_file(tmp_path, tensors)
    assert_adds(lora, expected, part)
    assert not lora.unknown and not any(lora.changes[p] for p in MODULES if p != part)


@pytest.mark.parametrize("prefix", ["", "transformer.", "base_model.model.transformer.", "diffusion_model."])
def test_diffusers_and_peft(prefix, tmp_path):
    """Fused layers come in parts: each has its rows, parts may be missing, ranks may differ; the
    last modulation's halves are swapped."""
    tensors = {}
    whole = {}
    theirs = {key: x for key, x in tiny.flux_to_diffusers(tiny.flux_state()).items() if x.ndim == 2}
    for i, (key, x) in enumerate(theirs.items()):
        own, whole[key] = low_rank(prefix + key.removesuffix(".weight"), *x.shape, PEFT, rank=2 + i % 3)
        if "to_k" in key:
            whole[key] = zeros(x.shape)
        else:
            tensors |= own
    expected = {f"{name}.weight": ours(whole, f"{name}.weight") for name in layers()}
    assert_adds(read_file(tmp_path, tensors), expected)


CLIP = "text_model.encoder.layers"
QUERY = "encoder.block.1.layer.0.SelfAttention.q"
NAMES = [  # a file's name of a layer, the layer, and its rows
    (XLABS, "double_blocks.1.processor.qkv_lora1", "double_blocks.1.img_attn.qkv", 0, 3 * H),
    (XLABS, "double_blocks.1.processor.proj_lora1", "double_blocks.1.img_attn.proj", 0, H),
    (XLABS, "double_blocks.1.processor.qkv_lora2", "double_blocks.1.txt_attn.qkv", 0, 3 * H),
    (XLABS, "diffusion_model.double_blocks.1.processor.proj_lora2", "double_blocks.1.txt_attn.proj", 0, H),
    (XLABS, "single_blocks.2.processor.qkv_lora", "single_blocks.2.linear1", 0, 3 * H),
    (XLABS, "single_blocks.2.processor.proj_lora", "single_blocks.2.linear2", 0, H),
    # OneTrainer's: flat names of diffusers, and the newer form, BFL's layers in numbered parts
    (KOHYA, "lora_transformer_transformer_blocks_0_attn_to_v", "double_blocks.0.img_attn.qkv", 2 * H, 3 * H),
    (KOHYA, "lora_transformer_single_transformer_blocks_1_proj_mlp", "single_blocks.1.linear1", 3 * H, 3 * H + MLP),
    (KOHYA, "transformer.double_blocks.0.img_attn.qkv.1", "double_blocks.0.img_attn.qkv", H, 2 * H),
    (KOHYA, "transformer.single_blocks.0.linear1.3", "single_blocks.0.linear1", 3 * H, 3 * H + MLP),
    # ComfyUI's and old diffusers'
    (KOHYA, f"text_encoders.clip_l.transformer.{CLIP}.1.mlp.fc2", f"{CLIP}.1.mlp.fc2", 0, 48),
    (XLABS, f"text_encoder.{CLIP}.0.self_attn.k_proj.lora_linear_layer", f"{CLIP}.0.self_attn.k_proj", 0, 48),
    (PEFT, f"text_encoders.t5xxl.transformer.{QUERY}", QUERY, 0, 24),
]


def test_each_familys_names_are_known(tmp_path):
    tensors = {}
    expected = {part: {} for part in MODULES}
    for names, key, layer, start, stop in NAMES:
        part = next(part for part in MODULES if layer in layers(part))
        weight = layers(part)[layer].weight
        own, product = low_rank(key, stop - start, weight.shape[1], names)
        tensors |= own
        expected[part].setdefault(f"{layer}.weight", zeros(weight.shape))[start:stop] += product
    lora = read_file(tmp_path, tensors)
    for part in MODULES:
        assert_adds(lora, expected[part], part)


def test_differences_and_replacements(tmp_path):
    """A convolution's trailing dimensions of 1 mean nothing."""
    tensors, product = low_rank("diffusion_model.double_blocks.0.txt_attn.qkv", 3 * H, H, PEFT)
    tensors |= {
        "diffusion_model.double_blocks.0.txt_attn.qkv.diff_b": rand(3 * H),
        "diffusion_model.double_blocks.0.img_attn.norm.query_norm.w_norm": rand(32),
        "diffusion_model.img_in.diff": rand(H, 64)[..., None, None],
        "diffusion_model.txt_in.set_weight": rand(H, 32),
    }
    expected = {
        "double_blocks.0.txt_attn.qkv.weight": product,
        "double_blocks.0.txt_attn.qkv.bias": rand(3 * H),
        "double_blocks.0.img_attn.norm.query_norm.scale": rand(32),
        "img_in.weight": rand(H, 64),
        "txt_in.weight": rand(H, 32).double() - BASE["txt_in.weight"],
    }
    assert_adds(read_file(tmp_path, tensors), expected, base=BASE)


def test_peft_settings_in_the_header(tmp_path):
    settings = {
        "transformer.r": 4, "transformer.lora_alpha": 8, "transformer.alpha_pattern": {"attn.to_q": 2},
        "text_encoder.lora_alpha": 1, "text_encoder.use_rslora": True,
    }  # fmt: skip
    name = f"{CLIP}.0.self_attn.q_proj"
    tensors, q = low_rank("transformer.transformer_blocks.0.attn.to_q", H, H, PEFT)
    own, k = low_rank("transformer.transformer_blocks.0.attn.to_k", H, H, PEFT)
    more, te = low_rank(f"text_encoder.{name}", 48, 48, PEFT)
    lora = read_file(tmp_path, tensors | own | more, {"lora_adapter_metadata": json.dumps(settings)})
    assert_adds(lora, {"double_blocks.0.img_attn.qkv.weight": torch.cat([q * 2 / 4, k * 8 / 4, 0 * q])})
    assert_adds(lora, {f"{name}.weight": te / 4**0.5}, "clip")


def test_lycoris(tmp_path):
    """LoKr's alpha counts only where a factor is itself a product; LoHa's always."""
    w1, w2, a, b = rand(4, 8), rand(3 * H // 4, H // 8), rand(H // 4, 5), rand(5, H // 8)
    h = [rand(H, 3, seed=i) if i % 2 == 0 else rand(3, H, seed=i) for i in range(4)]
    first, second = "lycoris_double_blocks_0_img_attn_qkv", "lycoris_transformer_blocks_1_attn_to_k"
    third = "diffusion_model.double_blocks.1.txt_attn.proj"
    tensors = {
        f"{first}.lokr_w1": w1, f"{first}.lokr_w2": w2, f"{first}.alpha": torch.tensor(1e10),
        f"{second}.lokr_w1": w1, f"{second}.lokr_w2_a": a, f"{second}.lokr_w2_b": b,
        f"{second}.alpha": torch.tensor(2.0),
        f"{third}.hada_w1_a": h[0], f"{third}.hada_w1_b": h[1], f"{third}.hada_w2_a": h[2],
        f"{third}.hada_w2_b": h[3], f"{third}.alpha": torch.tensor(6.0),
    }  # fmt: skip
    kron = torch.kron(w1.double(), (a.double() @ b.double())) * 2 / 5
    d = [x.double() for x in h]
    expected = {
        "double_blocks.0.img_attn.qkv.weight": torch.kron(w1.double(), w2.double()),
        "double_blocks.1.img_attn.qkv.weight": torch.cat([0 * kron, kron, 0 * kron]),
        "double_blocks.1.txt_attn.proj.weight": (d[0] @ d[1]) * (d[2] @ d[3]) * 6 / 3,
    }
    assert_adds(read_file(tmp_path, tensors), expected, tolerance=1e-5)


def test_a_control_lora_widens_the_input_and_replaces_norms(tmp_path):
    key = "double_blocks.0.img_attn.norm.key_norm.scale"
    tensors, product = low_rank("img_in", H, 128, PEFT)
    lora = read_file(tmp_path, tensors | {"img_in.lora_B.bias": rand(H), key: rand(32)})
    expected = {"img_in.weight": product, "img_in.bias": rand(H), key: rand(32).double() - BASE[key]}
    assert_adds(lora, expected, base=BASE)
    assert lora.is_control


@pytest.mark.parametrize("shape", [(3 * H, 1), (3 * H,), (1, H)], ids=str)
def test_dora(shape, tmp_path):
    """Each row, or each column, of the changed weight gets the length that is stored; a scale goes
    part of the way."""
    tensors, product = low_rank(QKV, 3 * H, H)
    magnitude = rand(*shape).abs()
    lora = read_file(tmp_path, tensors | {f"{QKV}.dora_scale": magnitude})
    weight = BASE["double_blocks.0.img_attn.qkv.weight"]
    changed = weight + product
    lengths = changed.norm(dim=0 if shape[0] == 1 else 1, keepdim=True)
    expected = changed / lengths * magnitude.double().reshape(lengths.shape) - weight
    for scale in (1.0, 0.5):
        assert_adds(
            lora, {"double_blocks.0.img_attn.qkv.weight": scale * expected}, base=BASE, scale=scale, tolerance=1e-6
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_numbers_are_read_in_whatever_float_they_are_stored(dtype, tmp_path):
    tensors = {key: x.to(dtype) for key, x in low_rank("lora_unet_img_in", H, 64)[0].items()}
    up, down = tensors.values()
    assert_adds(read_file(tmp_path, tensors), {"img_in.weight": up.double() @ down.double()})


@pytest.mark.parametrize("method", ["lora", "dora", "rslora", "loha", "lokr"])
def test_files_of_peft(method, tmp_path):
    """peft's own merge of its own adapter, on diffusers' transformer, in float64."""
    peft = pytest.importorskip("peft")
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.FluxTransformer2DModel(
        in_channels=64, num_layers=2, num_single_layers=3, attention_head_dim=32, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=48, guidance_embeds=True, axes_dims_rope=(4, 14, 14),
    ).double()  # fmt: skip
    targets = ["attn.to_q", "attn.to_v", "attn.add_k_proj", "proj_mlp", "proj_out", "norm_out.linear", "norm1.linear"]
    kind, more = {
        "lora": (peft.LoraConfig, {"r": 4, "lora_alpha": 6}),
        "dora": (peft.LoraConfig, {"r": 4, "lora_alpha": 4, "use_dora": True}),
        "rslora": (peft.LoraConfig, {"r": 4, "lora_alpha": 6, "use_rslora": True}),
        "loha": (peft.LoHaConfig, {"r": 3, "alpha": 3}),
        "lokr": (peft.LoKrConfig, {"r": 3, "alpha": 3, "decompose_factor": 4}),
    }[method]
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    wrapped = peft.get_peft_model(model, kind(target_modules=targets, **more))
    for name, tensor in wrapped.state_dict().items():  # float32, as the file holds it
        if any(word in name for word in ("lora_", "hada_", "lokr_")):
            tensor.copy_((torch.randn(tensor.shape) * (0.1 if "magnitude" not in name else 1)).float())
    tensors = {key: x.float() for key, x in peft.get_peft_model_state_dict(wrapped).items()}
    settings = {"lora_alpha": more.get("lora_alpha"), "use_rslora": method == "rslora"}
    metadata = {"lora_adapter_metadata": json.dumps(settings)} if "lora_alpha" in more else None
    with torch.device("meta"):
        flux = Flux(dataclasses.replace(tiny.FLUX, mlp_hidden=4 * H))
    lora = read_file(tmp_path, tensors, metadata, {"flux": flux})
    after = wrapped.merge_and_unload().state_dict()
    names = [f"{name}.weight" for name, x in flux.named_modules() if isinstance(x, nn.Linear)]
    changed = {name for name in names if not torch.equal(ours(before, name), ours(after, name))}
    assert not lora.unknown and {c.name for c in lora.changes["flux"]} == changed and len(changed) > 10
    for name in changed:
        found = merge(ours(before, name), [(change, 1.0) for change in lora.changes["flux"] if change.name == name])
        assert_close(found, ours(after, name), rtol=1e-6, atol=1e-6)


def ours(theirs: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """Our tensor of this name from a diffusers state; only tiny.py's names matter, not its sizes."""
    rows = 3 * H + MLP if "linear1" in name else 6
    parts = [theirs[key] for key in tiny.flux_to_diffusers({name: torch.zeros(rows, 1)})]
    return torch.cat(parts[0].chunk(2)[::-1]) if "adaLN" in name else torch.cat(parts)


UP, DOWN = (f"{QKV}{name}" for name in KOHYA)
FITS = {UP: (192, 4), DOWN: (4, H)}
WRONG = [
    ({"unet.down.0.weight": (192, 4)}, ["none of its keys is known", "unet.down.0.weight"]),
    ({UP: (192, 4)}, [UP, "no counterpart"]),
    (FITS | {DOWN: (5, H)}, ["lora_up", "(192, 4)", "(192, 5)"]),
    (FITS | {DOWN: (4, 3072)}, ["lora_down", "(4, 3072)", "(4, 64)"]),
    (FITS | {UP: (9216, 4)}, ["(9216, 4)", "another model"]),
    (FITS | {DOWN: ()}, ["lora_down", "()", "a matrix"]),
    (FITS | {f"{QKV}.dora_scale": (64,)}, ["lora.safetensors", "dora_scale", "(64,)", "(192, 1) or (1, 64)"]),
    ({f"{QKV}.lokr_w1": (4, 4), f"{QKV}.lokr_w2": (4, 4)}, ["(192, 64)", "(16, 16)"]),
    ({f"{QKV}.lokr_w1": (4,), f"{QKV}.lokr_w2": (4, 4)}, ["lokr_w1", "(4,)", "a matrix"]),
]


@pytest.mark.parametrize("shapes, words", WRONG)
def test_files_that_do_not_fit_are_refused(shapes, words, tmp_path):
    with pytest.raises(InputError) as error:
        read_file(tmp_path, {key: torch.ones(shape) for key, shape in shapes.items()})
    assert all(word in str(error.value) for word in words), error.value


def test_integers_are_refused_and_unknown_keys_kept_for_the_report(tmp_path):
    tensors, _ = low_rank(QKV, 3 * H, H)
    with pytest.raises(InputError, match="I32, which is not supported"):
        read_file(tmp_path, tensors | {UP: tensors[UP].int()})
    strange = ["lora_unet_double_blocks_7_img_attn_qkv.lora_up.weight", f"{QKV}.lora_sideways"]
    lora = read_file(tmp_path, tensors | {name: tensors[UP] for name in strange})
    assert set(lora.unknown) == set(strange) and not lora.is_control


DORA = Change("0.weight", 6, 18, LowRank(rand(12, 3), rand(3, 12), 0.5), magnitude=rand(12, 1).abs())
CHANGES = {
    "low rank": [LowRank(rand(24, 3), rand(3, 12), 0.5), LowRank(rand(24, 5), rand(5, 12), 2.0)],
    "kronecker": [Kronecker(rand(4, 3), rand(6, 4), 0.5), Kronecker(rand(6, 2), rand(4, 6), 1.0)],
    "full": [Full(rand(24, 12)), Full(rand(24, 12, seed=3))],
}
CHANGES = {name: [Change("0.weight", 0, 24, term) for term in terms] for name, terms in CHANGES.items()}
CHANGES["dora"] = [DORA, Change("0.weight", 18, 24, LowRank(rand(6, 3), rand(3, 12), 2.0))]
CHANGES["vector"] = [change._replace(name="modulation.lin.weight") for change in CHANGES["low rank"]]


@pytest.mark.parametrize("case", CHANGES)
def test_additions_are_the_merged_layer_token_by_token(case):
    """Two changes on overlapping tokens, and one of the bias: each token's result is that of a layer
    whose weight holds its changes; of one vector, too, each token gets its own output."""
    torch.manual_seed(0)
    module = nn.ModuleDict({"0": FusedLinear(12, 24), "modulation": nn.ModuleDict({"lin": FusedLinear(12, 24)})})
    module = module.double()
    tokens = torch.tensor([[1, 1, 1, 0, 0, 0], [0, 1, 1, 1, 0, 0]]).bool()
    name = CHANGES[case][0].name.removesuffix(".weight")
    layer = module.get_submodule(name)
    changes = [*CHANGES[case], Change(f"{name}.bias", 3, 9, Full(rand(6)))]
    additions = list(zip(changes, (0.7, -1.5, 2.0), [*tokens, tokens[0]]))
    x = torch.randn(2, 1 if case == "vector" else 6, 12, dtype=torch.float64)
    before = layer(x)
    with added(module, hooks_for(module, additions, torch.device("cpu"), torch.float64)):
        found = layer(x)
        last = layer(x[:, -4:], rows=slice(5, 17))
    assert torch.equal(layer(x), before)  # nothing is left behind
    assert_close(last, found[:, -4:, 5:17] if case != "vector" else found[..., 5:17])  # some rows of the last tokens
    for i in range(6):
        own = [(change, scale) for change, scale, where in additions if where[i]]
        w, b = (merge(y, [z for z in own if z[0].name.endswith(end)]) for end, y in layer.state_dict().items())
        assert_close(found[:, i], nn.functional.linear(x.expand(-1, 6, -1)[:, i], w, b))
    assert torch.equal(found[:, 4:], before.expand_as(found)[:, 4:])


def test_streams_of_all_of_flux():
    streams = {name: stream_of(name) for name in MODULES["flux"].state_dict()}
    known = {"double_blocks.1.img_mlp.0.weight": "img", "double_blocks.0.txt_mod.lin.bias": "txt"}
    known |= {"single_blocks.2.linear1.weight": "both", "final_layer.linear.weight": "img"}
    assert known.items() <= streams.items()
    without = {name.split(".")[0] for name, stream in streams.items() if stream is None}
    assert without == {"time_in", "vector_in", "guidance_in"}
    assert not can_be_regional(Change("double_blocks.0.img_attn.norm.key_norm.scale", 0, 32, Full(rand(32))))


TOKENS = [  # two prompts of two tokens, three image tokens; behind the prompts the base prompt's tokens
    ("1100100", {"streams": 2}, "110000", 2),
    ("1100100", {"has_base": False}, "1100", 1),
    ("1100111", {"streams": 2}, "110011", 2),  # everywhere: the base prompt's tokens too
    ("100", {}, "00", 1),
]


@pytest.mark.parametrize("mine, more, txt, streams", TOKENS)
def test_tokens_of_a_region(mine, more, txt, streams):
    mine, txt = (torch.tensor([bit == "1" for bit in bits]) for bits in (mine, txt))
    found = tokens_of(mine, Branches(torch.zeros(7, dtype=torch.long), torch.arange(3), 2, **more), lambda x: x)
    assert torch.equal(found["img"], mine[-3:]) and torch.equal(found["txt"], txt)
    assert torch.equal(found["both"], torch.cat([txt] + [mine[-3:]] * streams))


LAYOUT = {
    "prompt": "a harbor at dawn", "width": 96, "height": 64, "steps": 2, "seed": 3, "max_sequence_length": 32,
    "mask_inject_steps": "100%", "base_ratio": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def pipeline(golden):
    return Pipeline(golden / "models" / "flux-tiny-dev", device="cpu")


@pytest.fixture
def latents(pipeline, tmp_path, monkeypatch):
    """latents(regions, **keys): of a tiny random FLUX, in float32."""
    monkeypatch.chdir(tmp_path)

    def latents(regions, **keys):
        return pipeline.denoise(pipeline.prepare(read_layout(None, LAYOUT | keys | {"regions": regions})), 3)

    return latents


@pytest.fixture(scope="module")
def lora(golden) -> str:
    """One with modulation layers in it, of rank 4."""
    return str(golden / "models" / "lora" / "lora_bfl_comfy.safetensors")


def region(box, *loras, prompt="a red boat"):
    entries = [dict(zip(("file", "scale", "plain_steps"), each)) for each in loras]
    return {"prompt": prompt, "box": box, "loras": entries}


left = partial(region, [0, 0, 48, 64])
right = partial(region, [48, 0, 96, 64])
whole = partial(region, [0, 0, 96, 64])


def mean(x: torch.Tensor, y: torch.Tensor) -> float:
    return (x - y).abs().mean().item()


def test_three_spellings_give_the_same_image_and_so_does_the_flag(latents, golden, run):
    files = sorted((golden / "models" / "lora").glob("*.safetensors"))
    entries = [{"file": str(file), "scale": 1.5} for file in files]
    first, *others = (latents([left(), right()], loras=[entry]) for entry in entries)
    assert len(others) == 2 and all((first - other).abs().max() < 1e-5 for other in others)
    keys = ["--prompt", LAYOUT["prompt"], "--width", 96, "--height", 64, "--steps", 2, "--seed", 3]
    keys += ["--max-sequence-length", 32, "--lora", files[0], 1.5]
    assert run(*keys, "--save-latents", "z.safetensors").code == 0
    assert torch.equal(load_file("z.safetensors")["latents"], latents([], loras=entries[:1]))


@pytest.mark.published
def test_outside_its_region_nothing_changes_to_the_bit(latents, lora):
    small = {}  # of rank 2, of attention alone
    for key, x in load_file(lora).items():
        if "attn.qkv" in key or "linear1" in key:
            small[key] = (x[:2] if "lora_A" in key else x[:, :2].neg()).contiguous()
    save_file(small, "small.safetensors")
    without = latents([left(), right()])
    one = latents([left((lora, 1.5)), right()])
    assert torch.equal(one[..., 6:], without[..., 6:])
    assert mean(one[..., :6], without[..., :6]) > 0.01
    both = latents([left((lora, 1.5)), right((lora, -0.5), ("small.safetensors", 2.0))])
    assert torch.equal(both[..., :6], one[..., :6])  # nor by others elsewhere, of another rank
    assert mean(both[..., 6:], without[..., 6:]) > 0.01


OVER_ALL = [{}, {"base_ratio": 0.3}, {"base_ratio": 0.3, "mask_inject_steps": 1}, {"mask_inject_steps": 0}]


@pytest.mark.parametrize("keys", OVER_ALL)
def test_over_the_whole_image_it_is_the_merged_one(latents, lora, keys):
    merged = latents([whole()], loras=[{"file": lora, "scale": 1.5}], **keys)
    assert mean(merged, latents([whole()], **keys)) > 0.01
    assert (merged - latents([whole((lora, 1.5, True))], **keys)).abs().max() < 1e-4


def test_it_acts_in_plain_steps_if_asked_to_and_in_compositions(latents, lora):
    keys = {"mask_inject_steps": 1, "base_ratio": 0.3}
    asked, not_asked = (latents([left((lora, 1.5, plain)), right()], **keys) for plain in (True, False))
    assert mean(asked, not_asked) > 0.003
    two = [left((lora, 1.5)), right()], [left(), right()]
    assert torch.equal(*(latents(each, mask_inject_steps=0) for each in two))
    found, without = (latents(each, method="rpg") for each in two)
    assert mean(found[..., :6], without[..., :6]) > 0.01


def test_a_control_lora_reads_its_image(latents):
    """By hand: what the noisy latents' half of it does is an ordinary LoRA; without the image's
    half the image changes nothing."""
    up, down = 0.2 * rand(128, 3), 0.2 * rand(3, 128)
    half = down[:, :64].contiguous()
    wide = torch.cat([half, torch.zeros(3, 64)], dim=1)
    for name, own in {"depth": down, "half": half, "wide": wide}.items():
        save_file({"img_in.lora_A.weight": own, "img_in.lora_B.weight": up}, f"{name}.safetensors")
    Image.fromarray((rand(64, 96, 3) * 60 + 128).clip(0, 255).byte().numpy()).save("depth.png")
    Image.new("RGB", (96, 64)).save("black.png")

    def found(*given):
        entries = [{"file": f"{lora}.safetensors", "image": image and f"{image}.png"} for lora, image in given]
        return latents([left(), right()], loras=entries)

    assert mean(found(("depth", "depth")), found(("depth", "black"))) > 0.01
    assert (found(("wide", "depth")) - found(("half", None))).abs().max() < 1e-4
    for words, *given in (
        ("depth.safetensors: a control LoRA", ("depth", None)),
        ("half.safetensors: a control LoRA", ("half", "depth")),
        (r"loras\[0\].image = none.png: there is no such file", ("depth", "none")),
        (r"loras\[0\].file = none.safetensors.*no such file", ("none", None)),
        ("only one control LoRA", ("depth", "depth"), ("depth", "depth")),
    ):
        with pytest.raises(InputError, match=words):
            found(*given)


def test_what_cannot_be_regional_is_left_out_with_a_warning(latents, capsys):
    tensors, _ = low_rank("lora_unet_time_in_in_layer", 128, 256)
    tensors |= low_rank("lora_te1_text_model_encoder_layers_0_mlp_fc1", 192, 48)[0]
    save_file(tensors | {"lora_unet_else.lora_up.weight": rand(2, 2)}, "vectors.safetensors")
    found = latents([left(("vectors.safetensors", 1.0))])
    warnings = capsys.readouterr().err
    assert torch.equal(latents([left()]), found)
    for words in ("regions[0].loras[0].file", "time_in.in_layer.weight", "mlp.fc1", "1 unrecognized keys"):
        assert words in warnings


@pytest.mark.published
def test_a_t5_part_changes_its_regions_prompt_alone(latents):
    save_file(low_rank("lora_te3_encoder_block_0_layer_0_SelfAttention_q", 64, 64)[0], "t5.safetensors")
    found, without = latents([left(("t5.safetensors", 1.0)), right()]), latents([left(), right()])
    assert mean(found[..., :6], without[..., :6]) > 1e-3
    assert_close(found[..., 6:], without[..., 6:], rtol=0, atol=1e-4)
