"""LoRAs: what each family's files do to each weight, against sums done by hand and against peft and diffusers; and
LoRAs of single regions, against whole-picture ones and token by token."""

import dataclasses
import json

import pytest
import tiny
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

import generate
from errors import InputError
from extensions.lora import Addition, Change, Full, Kronecker, LowRank, added, hooks_for, merge
from extensions.lora_files import read_lora
from extensions.region_lora import can_be_regional, stream_of, tokens_of
from model.clip import CLIPTextEncoder
from model.layers import FusedLinear
from model.t5 import T5Encoder
from model.transformer import Flux
from regional.sampling import Branches

H, MLP = tiny.FLUX.hidden_size, tiny.FLUX.mlp_hidden
with torch.device("meta"):
    MODULES = {"flux": Flux(tiny.FLUX), "t5": T5Encoder(tiny.T5), "clip": CLIPTextEncoder(tiny.CLIP)}


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def layers(part: str = "flux") -> dict[str, nn.Linear]:
    return {name: m for name, m in MODULES[part].named_modules() if isinstance(m, nn.Linear)}


def read_file(tmp_path, tensors, metadata=None, modules=MODULES):
    file = tmp_path / "lora.safetensors"
    save_file({key: tensor.clone().contiguous() for key, tensor in tensors.items()}, file, metadata)
    return read_lora(file, modules)


def deltas(lora, part: str = "flux", scale: float = 1.0, base: dict[str, torch.Tensor] | None = None):
    """What a file adds to each tensor (of `base`, or of zeros), in float64."""
    shapes = {name: tensor.shape for name, tensor in MODULES[part].state_dict().items()}
    found = {}
    for name in dict.fromkeys(change.name for change in lora.changes[part]):
        weight = base[name] if base else torch.zeros(shapes[name], dtype=torch.float64)
        found[name] = merge(weight, [(c, scale) for c in lora.changes[part] if c.name == name])
        if base and found[name].shape == weight.shape:
            found[name] = found[name] - weight
    return found


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name].double(), rtol=1e-9, atol=1e-9, msg=name)


# ------------------------------------------------------------------------------------------------ families of files


def low_rank(rows: int, columns: int, rank: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """up, down, and their product."""
    up, down = rand(rows, rank), rand(rank, columns, seed=1)
    return up, down, up.double() @ down.double()


@pytest.mark.parametrize(
    "part, prefix", [("flux", "lora_unet_"), ("clip", "lora_te1_"), ("t5", "lora_te3_"), ("t5", "lora_te2_")]
)
def test_kohya(part, prefix, tmp_path):
    tensors, expected = {}, {}
    for i, (name, layer) in enumerate(layers(part).items()):
        up, down, product = low_rank(layer.out_features, layer.in_features)
        key = prefix + name.replace(".", "_")
        tensors |= {f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down}
        if i % 3:  # some without an alpha, which is then the rank; so is an alpha of 0
            tensors[f"{key}.alpha"] = torch.tensor(0.0 if i % 3 == 2 else 6.0)
        expected[f"{name}.weight"] = product * (1.5 if i % 3 == 1 else 1)
    lora = read_file(tmp_path, tensors)
    assert_same(deltas(lora, part), expected)
    assert not lora.unknown and not any(lora.changes[p] for p in MODULES if p != part)


@pytest.mark.parametrize(
    "prefix", ["transformer.", "base_model.model.", "base_model.model.transformer.", "", "diffusion_model."]
)
def test_diffusers_and_peft(prefix, tmp_path):
    """Fused layers come in parts: each has its rows, parts may be missing, ranks may differ; the last modulation's
    halves are swapped."""
    tensors, expected = {}, {}
    stored = tiny.flux_to_diffusers({key: tensor for key, tensor in tiny.flux_state().items()})
    theirs = {key.removesuffix(".weight"): t.shape for key, t in stored.items() if t.ndim == 2}
    for i, (key, (rows, columns)) in enumerate(theirs.items()):
        up, down, _ = low_rank(rows, columns, rank=2 + i % 3)
        if key.endswith("to_k"):
            continue
        tensors |= {f"{prefix}{key}.lora_A.weight": down, f"{prefix}{key}.lora_B.weight": up}
    whole = {key: torch.zeros(shape, dtype=torch.float64) for key, shape in theirs.items()}
    for key in whole:
        if f"{prefix}{key}.lora_A.weight" in tensors:
            whole[key] = (
                tensors[f"{prefix}{key}.lora_B.weight"].double() @ tensors[f"{prefix}{key}.lora_A.weight"].double()
            )
    for name in layers():
        expected[f"{name}.weight"] = joined(whole, name)
    assert_same(deltas(read_file(tmp_path, tensors)), expected)


def joined(theirs: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """One of our layers' matrices from diffusers' by tiny.py's naming, which is the test's own."""
    shape = layers()[name].weight.shape
    numbered = torch.arange(shape.numel(), dtype=torch.float64).reshape(shape)
    result = torch.zeros(shape, dtype=torch.float64)
    for key, rows in tiny.flux_to_diffusers({f"{name}.weight": numbered}).items():
        result[(rows[:, 0] / shape[1]).long()] = theirs[key.removesuffix(".weight")]
    return result


def test_peft_settings_in_the_header(tmp_path):
    settings = {
        "transformer.r": 4, "transformer.lora_alpha": 8, "transformer.alpha_pattern": {"attn.to_q": 2},
        "text_encoder.lora_alpha": 1, "text_encoder.use_rslora": True,
    }  # fmt: skip
    q, k, te = low_rank(H, H), low_rank(H, H), low_rank(48, 48)
    tensors = {
        "transformer.transformer_blocks.0.attn.to_q.lora_A.weight": q[1],
        "transformer.transformer_blocks.0.attn.to_q.lora_B.weight": q[0],
        "transformer.transformer_blocks.0.attn.to_k.lora_A.weight": k[1],
        "transformer.transformer_blocks.0.attn.to_k.lora_B.weight": k[0],
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight": te[1],
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_B.weight": te[0],
    }
    lora = read_file(tmp_path, tensors, {"lora_adapter_metadata": json.dumps(settings)})
    qkv = deltas(lora)["double_blocks.0.img_attn.qkv.weight"]
    torch.testing.assert_close(qkv[:H], q[2] * 2 / 4)
    torch.testing.assert_close(qkv[H : 2 * H], k[2] * 8 / 4)
    assert not qkv[2 * H :].any()
    clip = deltas(lora, "clip")["text_model.encoder.layers.0.self_attn.q_proj.weight"]
    torch.testing.assert_close(clip, te[2] / 4**0.5)


@pytest.mark.parametrize("prefix", ["", "diffusion_model."])
def test_xlabs(prefix, tmp_path):
    sizes = {
        "double_blocks.1.processor.qkv_lora1": ("double_blocks.1.img_attn.qkv", 3 * H, H),
        "double_blocks.1.processor.proj_lora1": ("double_blocks.1.img_attn.proj", H, H),
        "double_blocks.1.processor.qkv_lora2": ("double_blocks.1.txt_attn.qkv", 3 * H, H),
        "double_blocks.1.processor.proj_lora2": ("double_blocks.1.txt_attn.proj", H, H),
        "single_blocks.2.processor.qkv_lora": ("single_blocks.2.linear1", 3 * H, H),
        "single_blocks.2.processor.proj_lora": ("single_blocks.2.linear2", H, H + MLP),
    }
    tensors, expected = {}, {}
    for key, (name, rows, columns) in sizes.items():
        up, down, product = low_rank(rows, columns)
        tensors |= {f"{prefix}{key}.up.weight": up, f"{prefix}{key}.down.weight": down}
        expected[f"{name}.weight"] = torch.zeros(layers()[name].weight.shape, dtype=torch.float64)
        expected[f"{name}.weight"][:rows] = product
    assert_same(deltas(read_file(tmp_path, tensors)), expected)


def test_onetrainer(tmp_path):
    """Flat diffusers names, and the newer form: BFL's layers in numbered parts."""
    up, down, product = low_rank(H, H)
    mlp_up, mlp_down, mlp_product = low_rank(MLP, H)
    tensors = {
        "lora_transformer_transformer_blocks_0_attn_to_v.lora_up.weight": up,
        "lora_transformer_transformer_blocks_0_attn_to_v.lora_down.weight": down,
        "lora_transformer_single_transformer_blocks_1_proj_mlp.lora_up.weight": mlp_up,
        "lora_transformer_single_transformer_blocks_1_proj_mlp.lora_down.weight": mlp_down,
        "transformer.double_blocks.1.img_attn.qkv.1.lora_up.weight": up,
        "transformer.double_blocks.1.img_attn.qkv.1.lora_down.weight": down,
        "transformer.single_blocks.2.linear1.3.lora_up.weight": mlp_up,
        "transformer.single_blocks.2.linear1.3.lora_down.weight": mlp_down,
    }
    zero = torch.zeros(H, H, dtype=torch.float64)
    expected = {
        "double_blocks.0.img_attn.qkv.weight": torch.cat([zero, zero, product]),
        "single_blocks.1.linear1.weight": torch.cat([zero, zero, zero, mlp_product]),
        "double_blocks.1.img_attn.qkv.weight": torch.cat([zero, product, zero]),
        "single_blocks.2.linear1.weight": torch.cat([zero, zero, zero, mlp_product]),
    }
    assert_same(deltas(read_file(tmp_path, tensors)), expected)


def test_comfyui_with_text_encoders_differences_and_replacements(tmp_path):
    up, down, product = low_rank(3 * H, H)
    te_up, te_down, te_product = low_rank(48, 48)
    t5_up, t5_down, t5_product = low_rank(24, 32)
    tensors = {
        "diffusion_model.double_blocks.0.txt_attn.qkv.lora_B.weight": up,
        "diffusion_model.double_blocks.0.txt_attn.qkv.lora_A.weight": down,
        "diffusion_model.double_blocks.0.txt_attn.qkv.diff_b": rand(3 * H),
        "diffusion_model.double_blocks.0.img_attn.norm.query_norm.w_norm": rand(32),
        "diffusion_model.img_in.diff": rand(H, 64),
        "diffusion_model.txt_in.set_weight": rand(H, 32),
        "text_encoders.clip_l.transformer.text_model.encoder.layers.1.mlp.fc2.lora_down.weight": rand(2, 96),
        "text_encoders.clip_l.transformer.text_model.encoder.layers.1.mlp.fc2.lora_up.weight": rand(48, 2),
        "text_encoder.text_model.encoder.layers.0.self_attn.k_proj.lora_linear_layer.down.weight": te_down,
        "text_encoder.text_model.encoder.layers.0.self_attn.k_proj.lora_linear_layer.up.weight": te_up,
        "text_encoders.t5xxl.transformer.encoder.block.1.layer.0.SelfAttention.q.lora_A.weight": t5_down,
        "text_encoders.t5xxl.transformer.encoder.block.1.layer.0.SelfAttention.q.lora_B.weight": t5_up,
    }
    base = {name: tensor.double() for name, tensor in tiny.flux_state().items()}
    lora = read_file(tmp_path, tensors)
    expected = {
        "double_blocks.0.txt_attn.qkv.weight": product,
        "double_blocks.0.txt_attn.qkv.bias": rand(3 * H),
        "double_blocks.0.img_attn.norm.query_norm.scale": rand(32),
        "img_in.weight": rand(H, 64),
        "txt_in.weight": rand(H, 32).double() - base["txt_in.weight"],
    }
    assert_same(deltas(lora, base=base), expected)
    assert_same(
        deltas(lora, "clip"),
        {
            "text_model.encoder.layers.1.mlp.fc2.weight": rand(48, 2).double() @ rand(2, 96).double(),
            "text_model.encoder.layers.0.self_attn.k_proj.weight": te_product,
        },
    )
    assert_same(deltas(lora, "t5"), {"encoder.block.1.layer.0.SelfAttention.q.weight": t5_product})


def test_lycoris(tmp_path):
    """LoKr's alpha counts only where a factor is itself a product; LoHa's always."""
    w1, w2, a, b = rand(4, 8), rand(3 * H // 4, H // 8), rand(H // 4, 5), rand(5, H // 8)
    h = [rand(H, 3, seed=i) if i % 2 == 0 else rand(3, H, seed=i) for i in range(4)]
    tensors = {
        "lycoris_double_blocks_0_img_attn_qkv.lokr_w1": w1,
        "lycoris_double_blocks_0_img_attn_qkv.lokr_w2": w2,
        "lycoris_double_blocks_0_img_attn_qkv.alpha": torch.tensor(1e10),
        "lycoris_transformer_blocks_1_attn_to_k.lokr_w1": w1,
        "lycoris_transformer_blocks_1_attn_to_k.lokr_w2_a": a,
        "lycoris_transformer_blocks_1_attn_to_k.lokr_w2_b": b,
        "lycoris_transformer_blocks_1_attn_to_k.alpha": torch.tensor(2.0),
        "diffusion_model.double_blocks.1.txt_attn.proj.hada_w1_a": h[0],
        "diffusion_model.double_blocks.1.txt_attn.proj.hada_w1_b": h[1],
        "diffusion_model.double_blocks.1.txt_attn.proj.hada_w2_a": h[2],
        "diffusion_model.double_blocks.1.txt_attn.proj.hada_w2_b": h[3],
        "diffusion_model.double_blocks.1.txt_attn.proj.alpha": torch.tensor(6.0),
    }
    kron = torch.kron(w1.double(), (a.double() @ b.double())) * 2 / 5
    zero = torch.zeros(H, H, dtype=torch.float64)
    d = [x.double() for x in h]
    found = deltas(read_file(tmp_path, tensors))
    expected = {
        "double_blocks.0.img_attn.qkv.weight": torch.kron(w1.double(), w2.double()),
        "double_blocks.1.img_attn.qkv.weight": torch.cat([zero, kron, zero]),
        "double_blocks.1.txt_attn.proj.weight": (d[0] @ d[1]) * (d[2] @ d[3]) * 6 / 3,
    }
    assert found.keys() == expected.keys()
    for name, delta in expected.items():  # the products of factors are made in float32
        torch.testing.assert_close(found[name], delta, rtol=1e-5, atol=1e-5)


def test_a_control_lora_widens_the_input_and_replaces_norms(tmp_path):
    up, down, product = low_rank(H, 128)
    tensors = {
        "img_in.lora_A.weight": down,
        "img_in.lora_B.weight": up,
        "img_in.lora_B.bias": rand(H),
        "double_blocks.0.img_attn.norm.key_norm.scale": rand(32),
    }
    base = {name: tensor.double() for name, tensor in tiny.flux_state().items()}
    found = deltas(read_file(tmp_path, tensors), base=base)
    padded = torch.cat([base["img_in.weight"], torch.zeros(H, 64, dtype=torch.float64)], dim=1)
    torch.testing.assert_close(found["img_in.weight"], padded + product)
    torch.testing.assert_close(found["img_in.bias"], rand(H).double())
    key = "double_blocks.0.img_attn.norm.key_norm.scale"
    torch.testing.assert_close(base[key] + found[key], rand(32).double())


@pytest.mark.parametrize("dim", [0, 1])
def test_dora(dim, tmp_path):
    """Each row, or each column, of the changed weight gets the length that is stored; a scale goes part of the way."""
    up, down, product = low_rank(3 * H, H)
    magnitude = rand(3 * H, 1).abs() if dim == 1 else rand(1, H).abs()
    key = "lora_unet_double_blocks_0_img_attn_qkv"
    tensors = {f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down, f"{key}.dora_scale": magnitude}
    name = "double_blocks.0.img_attn.qkv.weight"
    base = {n: tensor.double() for n, tensor in tiny.flux_state().items()}
    lora = read_file(tmp_path, tensors)
    changed = base[name] + product
    expected = changed / changed.norm(dim=dim, keepdim=True) * magnitude.double()
    torch.testing.assert_close(base[name] + deltas(lora, base=base)[name], expected)
    torch.testing.assert_close(deltas(lora, base=base, scale=0.5)[name], (expected - base[name]) / 2)


def test_numbers_are_read_in_whatever_float_they_are_stored(tmp_path):
    key = "lora_unet_img_in"
    for dtype in (torch.float16, torch.bfloat16, torch.float8_e4m3fn):
        up, down = rand(H, 4).to(dtype), rand(4, 64).to(dtype)
        lora = read_file(tmp_path, {f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down})
        assert_same(deltas(lora), {"img_in.weight": up.double() @ down.double()})


# ------------------------------------------------------------------------------------------------ against libraries


@pytest.mark.parametrize("method", ["lora", "dora", "rslora", "loha", "lokr"])
def test_files_of_peft(method, tmp_path):
    """peft's own merge of its own adapter, on diffusers' transformer, in float64."""
    peft, diffusers = pytest.importorskip("peft"), pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.FluxTransformer2DModel(
        in_channels=64, num_layers=2, num_single_layers=3, attention_head_dim=32, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=48, guidance_embeds=True, axes_dims_rope=(4, 14, 14),
    ).double()  # fmt: skip
    targets = ["attn.to_q", "attn.to_v", "attn.add_k_proj", "proj_mlp", "proj_out", "norm_out.linear", "norm1.linear"]
    settings = {
        "lora": lambda: peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets),
        "dora": lambda: peft.LoraConfig(r=4, lora_alpha=4, target_modules=targets, use_dora=True),
        "rslora": lambda: peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, use_rslora=True),
        "loha": lambda: peft.LoHaConfig(r=3, alpha=3, target_modules=targets),
        "lokr": lambda: peft.LoKrConfig(r=3, alpha=3, target_modules=targets, decompose_factor=4),
    }[method]()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    wrapped = peft.get_peft_model(model, settings)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name or "hada_" in name or "lokr_" in name:
                parameter.copy_(torch.randn_like(parameter.float()) * (0.1 if "magnitude" not in name else 1))
    with torch.no_grad():
        for name, tensor in wrapped.state_dict().items():
            if "lora_" in name or "hada_" in name or "lokr_" in name:
                tensor.copy_(tensor.float())  # as the file holds it
    metadata = (
        {"lora_adapter_metadata": json.dumps({"lora_alpha": settings.lora_alpha, "use_rslora": method == "rslora"})}
        if hasattr(settings, "lora_alpha")
        else None
    )
    tensors = {key: tensor.float() for key, tensor in peft.get_peft_model_state_dict(wrapped).items()}
    with torch.device("meta"):
        flux = Flux(dataclasses.replace(tiny.FLUX, mlp_hidden=4 * H))
    lora = read_file(tmp_path, tensors, metadata, {"flux": flux})
    assert not lora.unknown
    after = wrapped.merge_and_unload().state_dict()
    names = [f"{name}.weight" for name, layer in flux.named_modules() if isinstance(layer, nn.Linear)]
    changed = {name for name in names if not torch.equal(ours(before, name), ours(after, name))}
    assert {change.name for change in lora.changes["flux"]} == changed and len(changed) > 10
    for name in changed:
        found = merge(ours(before, name), [(change, 1.0) for change in lora.changes["flux"] if change.name == name])
        torch.testing.assert_close(found, ours(after, name), rtol=1e-6, atol=1e-6)


def ours(theirs: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """Our tensor of this name from a diffusers state."""
    parts = [theirs[key] for key in tiny.flux_to_diffusers({name: torch.zeros(4 * H + 3 * H, 1)[: rows_of(name)]})]
    return torch.cat(parts[0].chunk(2)[::-1]) if "adaLN" in name else torch.cat(parts)


def rows_of(name: str) -> int:
    """tiny.py splits linear1 by its own sizes; only the names matter here."""
    return 3 * H + MLP if "linear1" in name else 6


@pytest.mark.parametrize("family", ["kohya", "xlabs"])
def test_diffusers_converts_files_to_the_same(family, tmp_path):
    """Its converters know the fused layers of the single blocks by FLUX.1's sizes alone, so those are left out."""
    conversion = pytest.importorskip("diffusers.loaders.lora_conversion_utils")
    convert = getattr(conversion, f"_convert_{family}_flux_lora_to_diffusers")
    tensors = {}
    for name, layer in layers().items():
        up, down, _ = low_rank(layer.out_features, layer.in_features)
        if family == "kohya" and "linear1" not in name and "blocks" in name:
            key = f"lora_unet_{name.replace('.', '_')}"
            tensors |= {f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down, f"{key}.alpha": torch.tensor(2.0)}
        if family == "xlabs" and "double_blocks" in name and "attn" in name:
            block, stream, kind = name.split(".")[1:]
            key = f"double_blocks.{block}.processor.{kind}_lora{1 if 'img' in stream else 2}"
            tensors |= {f"{key}.up.weight": up, f"{key}.down.weight": down}
    converted = convert({key: tensor.clone() for key, tensor in tensors.items()})
    assert len(tensors) >= 16 and not any(key in tensors for key in converted)
    expected = deltas(read_file(tmp_path, converted))
    found = deltas(read_file(tmp_path, tensors))
    assert found.keys() == expected.keys()
    for name in found:  # it divides alpha between up and down in float32
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------ errors


def refuse(tmp_path, tensors, *words):
    with pytest.raises(InputError) as error:
        read_file(tmp_path, tensors)
    assert all(word in str(error.value) for word in words), error.value


def test_files_that_do_not_fit_are_refused(tmp_path):
    key = "lora_unet_double_blocks_0_img_attn_qkv"
    up, down, _ = low_rank(3 * H, H)
    refuse(tmp_path, {"unet.down.0.weight": up}, "none of its keys is known", "unet.down.0.weight")
    refuse(tmp_path, {f"{key}.lora_up.weight": up}, f"{key}.lora_up.weight", "no counterpart")
    refuse(
        tmp_path,
        {f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": rand(5, H)},
        "lora_up",
        "(192, 4)",
        "(192, 5)",
    )
    refuse(
        tmp_path,
        {f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": rand(4, 3072)},
        "lora_down",
        "(4, 3072)",
        "(4, 64)",
    )
    refuse(
        tmp_path,
        {f"{key}.lora_up.weight": rand(9216, 4), f"{key}.lora_down.weight": down},
        "(9216, 4)",
        "another model",
    )
    refuse(tmp_path, {f"{key}.lokr_w1": rand(4, 4), f"{key}.lokr_w2": rand(4, 4)}, "(192, 64)", "(16, 16)")
    refuse(tmp_path, {f"{key}.lora_up.weight": up.int(), f"{key}.lora_down.weight": down}, "I32", "not supported")


def test_unknown_keys_are_kept_for_the_report(tmp_path):
    key = "lora_unet_double_blocks_0_img_attn_qkv"
    up, down, _ = low_rank(3 * H, H)
    tensors = {f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down}
    strange = ["lora_unet_double_blocks_7_img_attn_qkv.lora_up.weight", f"{key}.lora_sideways"]
    assert set(read_file(tmp_path, tensors | {name: up for name in strange}).unknown) == set(strange)


# ------------------------------------------------------------------------------------------------ for some tokens


ON_CPU = torch.device("cpu"), torch.float64


@pytest.mark.parametrize("term", ["low rank", "kronecker", "full"])
def test_additions_are_the_merged_layer_token_by_token(term):
    """Two terms on overlapping tokens: each token's result is that of a layer whose weight holds its terms."""
    torch.manual_seed(0)
    layer = nn.Sequential(FusedLinear(12, 24)).double()
    terms = {
        "low rank": [LowRank(rand(24, 3), rand(3, 12), 0.5), LowRank(rand(24, 5), rand(5, 12), 2.0)],
        "kronecker": [Kronecker(rand(4, 3), rand(6, 4), 0.5), Kronecker(rand(6, 2), rand(4, 6), 1.0)],
        "full": [Full(rand(24, 12)), Full(rand(24, 12, seed=3))],
    }[term]
    tokens = torch.tensor([[1, 1, 1, 0, 0, 0], [0, 1, 1, 1, 0, 0]]).bool()
    changes = [Change("0.weight", 0, 24, each) for each in terms] + [Change("0.bias", 3, 9, Full(rand(6)))]
    scales = 0.7, -1.5, 2.0
    additions = [Addition(c, s, t) for c, s, t in zip(changes, scales, [*tokens, tokens[0]])]
    x = torch.randn(2, 6, 12, dtype=torch.float64)
    before = layer(x)
    with added(layer, hooks_for(layer, additions, *ON_CPU)):
        found = layer(x)
    torch.testing.assert_close(layer(x), before, rtol=0, atol=0)  # nothing is left behind
    weight, bias = layer[0].weight.data, layer[0].bias.data
    for i in range(6):
        own = [a for a in additions if a.tokens[i]]
        w = merge(weight, [(a.change, a.scale) for a in own if a.change.name == "0.weight"])
        b = merge(bias, [(a.change, a.scale) for a in own if a.change.name == "0.bias"])
        torch.testing.assert_close(found[:, i], nn.functional.linear(x[:, i], w, b))
    assert torch.equal(found[:, 4:], before[:, 4:])
    with added(layer, hooks_for(layer, additions, *ON_CPU)):  # some rows alone, of the last tokens alone
        torch.testing.assert_close(layer[0](x[:, 2:], rows=slice(5, 17)), found[:, 2:, 5:17])


def test_a_vectors_addition_gives_each_token_its_own_output():
    modulation = nn.ModuleDict({"modulation": nn.ModuleDict({"lin": nn.Linear(12, 24)})}).double()
    tokens = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 0]]).bool()
    changes = [Change("modulation.lin.weight", 0, 24, LowRank(rand(24, 3), rand(3, 12), s)) for s in (0.5, 2.0)]
    additions = [Addition(change, 0.7, own) for change, own in zip(changes, tokens)]
    layer, vector = modulation["modulation"]["lin"], torch.randn(2, 1, 12, dtype=torch.float64)
    with added(modulation, hooks_for(modulation, additions, *ON_CPU)):
        found = layer(vector)
    for i in range(4):
        weight = merge(layer.weight.data, [(a.change, a.scale) for a in additions if a.tokens[i]])
        torch.testing.assert_close(found[:, i], nn.functional.linear(vector[:, 0], weight, layer.bias))


def test_a_dora_for_some_tokens_is_the_merged_one():
    layer = nn.Sequential(nn.Linear(12, 24)).double()
    change = Change("0.weight", 6, 18, LowRank(rand(12, 3), rand(3, 12), 0.5), magnitude=rand(12, 1).abs())
    x = torch.randn(1, 4, 12, dtype=torch.float64)
    with added(layer, hooks_for(layer, [Addition(change, 0.8, torch.ones(4).bool())], *ON_CPU)):
        found = layer(x)
    merged = merge(layer[0].weight.data, [(change, 0.8)])
    torch.testing.assert_close(found, nn.functional.linear(x, merged, layer[0].bias))


def test_streams_of_all_of_flux():
    streams = {name: stream_of(name) for name in MODULES["flux"].state_dict()}
    assert streams["double_blocks.1.img_mlp.0.weight"] == "img" and streams["double_blocks.0.txt_mod.lin.bias"] == "txt"
    assert streams["single_blocks.2.linear1.weight"] == "both" and streams["final_layer.linear.weight"] == "img"
    without = {name.split(".")[0] for name, stream in streams.items() if stream is None}
    assert without == {"time_in", "vector_in", "guidance_in"}
    norm = Change("double_blocks.0.img_attn.norm.key_norm.scale", 0, 32, Full(rand(32)))
    assert not can_be_regional(norm)


def test_tokens_of_a_region():
    mine = torch.tensor([1, 1, 0, 0, 1, 0, 0]).bool()  # two texts of two tokens, three image tokens

    def branches(**more) -> Branches:
        return Branches(torch.zeros(7, dtype=torch.long), torch.arange(3), 2, **more)

    step = tokens_of(mine, branches(streams=2))
    assert step["txt"].tolist() == [True, True, False, False, False, False] and step["img"].tolist() == [
        True,
        False,
        False,
    ]
    assert step["both"].tolist() == step["txt"].tolist() + 2 * step["img"].tolist()
    assert tokens_of(mine, branches(has_base=False))["both"].tolist() == mine.tolist()
    everywhere = tokens_of(torch.tensor([1, 1, 0, 0, 1, 1, 1]).bool(), branches(streams=2))
    assert everywhere["txt"].tolist() == [True, True, False, False, True, True]  # the base prompt's tokens too
    assert tokens_of(mine[4:], branches())["both"].tolist() == [False, False, True, False, False]


# ------------------------------------------------------------------------------------------------ in pictures

LAYOUT = {
    "prompt": "a harbour at dawn", "width": 96, "height": 64, "steps": 3, "seed": 3, "max_sequence_length": 32,
    "mask_inject_steps": "100%", "base_ratio": 0,
}  # fmt: skip
LEFT, RIGHT = [0, 0, 48, 64], [48, 0, 96, 64]


@pytest.fixture
def latents(golden, tmp_path, monkeypatch):
    """latents(regions, **keys) draws on a tiny random FLUX, in float32."""
    monkeypatch.chdir(tmp_path)

    def run(regions, *flags, **keys):
        (tmp_path / "layout.yaml").write_text(yaml.safe_dump(LAYOUT | keys | {"regions": regions}))
        flags = [
            "--layout",
            "layout.yaml",
            "--model",
            str(golden / "models" / "flux-tiny-dev"),
            "--device",
            "cpu",
            *flags,
        ]
        flags += ["--output", "z.png", "--save-latents", "z.safetensors", "--overwrite"]
        assert generate.main(flags) == 0
        return load_file("z.safetensors")["latents"]

    return run


@pytest.fixture
def lora(golden, tmp_path):
    """One with modulation layers in it, of rank 4; and another one of rank 2, of attention alone."""
    tensors = load_file(golden / "models" / "lora" / "lora_bfl_comfy.safetensors")
    small = {}
    for key, tensor in tensors.items():
        if "attn.qkv" in key or "linear1" in key:
            small[key] = tensor[:2] if "lora_A" in key else tensor[:, :2].neg().contiguous()
    save_file({k: t.contiguous() for k, t in small.items()}, tmp_path / "small.safetensors")
    return str(golden / "models" / "lora" / "lora_bfl_comfy.safetensors")


def region(box, *loras, prompt="a red boat"):
    return {
        "prompt": prompt,
        "box": box,
        "loras": [dict(zip(("file", "scale", "plain_steps"), each)) for each in loras],
    }


def test_three_spellings_give_the_same_picture(latents, golden, tmp_path):
    files = sorted((golden / "models" / "lora").glob("*.safetensors"))
    first, *others = (latents([region(LEFT), region(RIGHT)], "--lora", str(file), "1.5") for file in files)
    assert len(others) == 2 and all((first - other).abs().max() < 1e-5 for other in others)


def test_outside_its_region_nothing_changes_to_the_bit(latents, lora):
    without = latents([region(LEFT), region(RIGHT)])
    left = latents([region(LEFT, (lora, 1.5)), region(RIGHT)])
    assert torch.equal(left[..., 6:], without[..., 6:])
    assert (left[..., :6] - without[..., :6]).abs().mean() > 0.01
    both = latents([region(LEFT, (lora, 1.5)), region(RIGHT, (lora, -0.5), ("small.safetensors", 2.0))])
    assert torch.equal(both[..., :6], left[..., :6])  # nor does another one elsewhere, of the same file or another rank
    assert (both[..., 6:] - without[..., 6:]).abs().mean() > 0.01


@pytest.mark.parametrize(
    "keys", [{}, {"base_ratio": 0.3}, {"base_ratio": 0.3, "mask_inject_steps": 1}, {"mask_inject_steps": 0}]
)
def test_over_the_whole_picture_it_is_the_merged_one(latents, lora, keys):
    whole = [0, 0, 96, 64]
    merged = latents([region(whole)], "--lora", lora, "1.5", **keys)
    regional = latents([region(whole, (lora, 1.5, True))], **keys)
    assert (merged - latents([region(whole)], **keys)).abs().mean() > 0.01
    assert (merged - regional).abs().max() < 1e-4


def test_in_the_plain_steps_it_acts_if_asked_to(latents, lora):
    keys = {"mask_inject_steps": 1, "base_ratio": 0.3}
    two = latents([region(LEFT, (lora, 1.5)), region(RIGHT)], **keys)
    assert (two - latents([region(LEFT, (lora, 1.5, True)), region(RIGHT)], **keys)).abs().mean() > 0.003
    zero = {"mask_inject_steps": 0}
    assert torch.equal(latents([region(LEFT, (lora, 1.5))], **zero), latents([region(LEFT)], **zero))


def test_overlaps_add(latents, lora):
    """Two regions over the same pixels with half of a LoRA each are one region with all of it."""
    halves = latents([region(LEFT, (lora, 0.5)), region(LEFT, (lora, 0.5), prompt="a boat"), region(RIGHT)])
    # their text tokens have half of it each; so the text layers are left out of what is compared: all have 0.5
    other = latents([region(LEFT, (lora, 1.0)), region(LEFT, prompt="a boat"), region(RIGHT)])
    assert torch.equal(halves[..., 6:], other[..., 6:])
    assert (halves[..., :6] - other[..., :6]).abs().mean() > 1e-4


def test_a_control_lora_reads_its_picture(latents, tmp_path, capsys):
    """By hand: the same network with a wider input, given the picture's latents beside the noisy ones."""
    rank, hidden = 3, 128
    up, down = 0.2 * rand(hidden, rank), 0.2 * rand(rank, 128)
    save_file({"img_in.lora_A.weight": down, "img_in.lora_B.weight": up}, tmp_path / "depth.safetensors")
    Image.fromarray((rand(64, 96, 3) * 60 + 128).clip(0, 255).byte().numpy()).save("depth.png")
    Image.new("RGB", (96, 64)).save("black.png")
    entry = {"file": "depth.safetensors", "image": "depth.png"}
    regions = [region(LEFT), region(RIGHT)]
    first = latents(regions, loras=[entry])
    assert (first - latents(regions, loras=[entry | {"image": "black.png"}])).abs().mean() > 0.01
    # what the noisy latents' half of it does is an ordinary LoRA; without the picture's half the picture says nothing
    save_file(
        {"img_in.lora_A.weight": down[:, :64].contiguous(), "img_in.lora_B.weight": up}, tmp_path / "half.safetensors"
    )
    wide = torch.cat([down[:, :64], torch.zeros(rank, 64)], dim=1)
    save_file({"img_in.lora_A.weight": wide, "img_in.lora_B.weight": up}, tmp_path / "depth.safetensors")
    assert (latents(regions, loras=[entry]) - latents(regions, "--lora", "half.safetensors")).abs().max() < 1e-4
    capsys.readouterr()
    for loras, words in (
        ([{"file": "depth.safetensors"}], ["loras[0].file = depth.safetensors", "needs an image"]),
        ([{"file": "half.safetensors", "image": "depth.png"}], ["loras[0].file = half.safetensors", "takes no image"]),
        ([entry | {"image": "none.png"}], ["loras[0].image = none.png", "no such file"]),
        ([entry, entry], ["only one control LoRA"]),
    ):
        with pytest.raises(AssertionError):
            latents(regions, loras=loras)
        said = capsys.readouterr().err
        assert all(word in said for word in words), said


def test_by_composition_each_region_is_drawn_with_its_own(latents, lora):
    keys = {"method": "rpg", "base_ratio": 0}
    left = latents([region(LEFT, (lora, 1.5)), region(RIGHT)], **keys)
    without = latents([region(LEFT), region(RIGHT)], **keys)
    assert (left[..., :6] - without[..., :6]).abs().mean() > 0.01


def test_what_cannot_be_regional_is_left_out_and_said(latents, capsys, tmp_path):
    tensors = {
        "lora_unet_time_in_in_layer.lora_up.weight": rand(128, 2),
        "lora_unet_time_in_in_layer.lora_down.weight": rand(2, 256),
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": rand(192, 2),
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": rand(2, 48),
    }  # fmt: skip
    save_file(tensors, tmp_path / "vectors.safetensors")
    without, left = latents([region(LEFT)]), latents([region(LEFT, ("vectors.safetensors", 1.0))])
    assert torch.equal(without, left)
    said = capsys.readouterr().err
    assert "regions[0].loras[0].file" in said and "time_in.in_layer.weight" in said and "mlp.fc1" in said


def test_a_t5_part_changes_its_regions_prompt_alone(latents, tmp_path):
    key = "lora_te3_encoder_block_0_layer_0_SelfAttention_q"
    save_file(
        {f"{key}.lora_up.weight": rand(64, 2), f"{key}.lora_down.weight": rand(2, 64)}, tmp_path / "t5.safetensors"
    )
    without = latents([region(LEFT), region(RIGHT)])
    left = latents([region(LEFT, ("t5.safetensors", 1.0)), region(RIGHT)])
    assert (left[..., :6] - without[..., :6]).abs().mean() > 1e-3
    torch.testing.assert_close(
        left[..., 6:], without[..., 6:], rtol=0, atol=1e-4
    )  # encoded one by one, not eight at once


@pytest.mark.parametrize(
    "loras, flags, words",
    [
        ([{"file": "none.safetensors"}], (), ["loras[0].file = none.safetensors", "no such file"]),
        ([{"file": "x.safetensors", "scale": float("nan")}], (), ["loras[0].scale", "nan"]),
        ([{"file": "x.safetensors", "skale": 1}], (), ["loras[0].skale = 1", "did you mean scale"]),
        ([], ("--lora", "none.safetensors"), ["none.safetensors", "no such file"]),
    ],
)
def test_mistakes_get_one_sentence(loras, flags, words, golden, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "layout.yaml").write_text(yaml.safe_dump(LAYOUT | {"loras": loras}))
    flags = ["--layout", "layout.yaml", "--model", str(golden / "models" / "flux-tiny-dev"), "--device", "cpu", *flags]
    assert generate.main(flags) == 2
    said = capsys.readouterr().err
    assert all(word in said for word in words) and said.count("\n") <= 2, said
