"""weights.py and formats/ on small random checkpoints in every format, full-size headers, and foreign files."""

import gzip
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import tiny
import torch
from safetensors.torch import load_file

import weights
from errors import InputError
from formats import components, key_names, recognize
from formats import hub as hub_files
from formats import safetensors as files
from model.autoencoder import AutoEncoder, AutoEncoderParams
from model.clip import CLIPTextEncoder
from model.t5 import T5Encoder
from model.transformer import Flux, FluxParams

CPU = "cpu"
F32, BF16, FP8 = torch.float32, torch.bfloat16, torch.float8_e4m3fn

STATE = {"flux": tiny.flux_state, "t5": tiny.t5_state, "clip": tiny.clip_state, "ae": tiny.ae_state}


def load(part, path, dtype=F32):
    return components.load(weights.pick(part, f"--{part}", Path(path)), CPU, dtype)


def flux_file(tmp_path, tensors=None, metadata=None, name="flux"):
    return tiny.save(tmp_path / f"{name}.safetensors", tiny.flux_state() if tensors is None else tensors, metadata)


def assert_same(module, expected):
    found = module.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def refuse(match, call, *args, **kwargs):
    """The call fails with one sentence that matches."""
    with pytest.raises(InputError, match=match) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


def published(name):
    """The names and shapes of a published checkpoint, as a file's tensors."""
    file = Path(__file__).parent / "fixtures" / "keys" / f"{name}.json.gz"
    shapes = json.loads(gzip.decompress(file.read_bytes()))
    return {key: SimpleNamespace(shape=tuple(shape)) for key, shape in shapes.items()}


PUBLISHED = {
    "flux_dev_bfl": (key_names.same_name, Flux, FluxParams()),
    "flux_dev_diffusers": (key_names.flux_from_diffusers, Flux, FluxParams()),
    "flux_schnell_bfl": (key_names.same_name, Flux, FluxParams(guidance_embed=False)),
    "flux_schnell_diffusers": (key_names.flux_from_diffusers, Flux, FluxParams(guidance_embed=False)),
    "autoencoder_bfl": (key_names.same_name, AutoEncoder, AutoEncoderParams()),
    "autoencoder_diffusers": (key_names.ae_from_diffusers, AutoEncoder, AutoEncoderParams()),
    "t5_v1_1_xxl_encoder_hf": (key_names.t5_from_hf, T5Encoder, components.T5Params()),
    "clip_l_text_hf": (key_names.same_name, CLIPTextEncoder, components.CLIPParams()),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_and_shapes_are_those_of_the_published_checkpoints(name):
    rows_of, kind, params = PUBLISHED[name]
    file = published(name)
    with torch.device("meta"):
        state = kind(params).state_dict()
    used = set()
    for key, tensor in state.items():
        rows = rows_of(key, file)
        used |= {row.key for row in rows}
        found = recognize.stacked_shape(rows, file)
        assert found + (1,) * (tensor.ndim - len(found)) == tensor.shape, key
    assert file.keys() - used <= {"encoder.embed_tokens.weight"}


@pytest.mark.parametrize("save, names", [(tiny.save_model, "BFL"), (tiny.save_diffusers_model, "diffusers")])
def test_both_formats_of_a_model_give_its_weights_and_sizes(tmp_path, save, names):
    found = weights.find(save(tmp_path / "model"))
    for part in STATE:
        module = components.load(getattr(found, part), CPU, F32)
        assert_same(module, STATE[part]())
        assert not module.training and not any(p.requires_grad for p in module.parameters())
    assert found.flux.key_names.name == found.ae.key_names.name == names
    assert components.flux_params(found.flux) == tiny.FLUX
    assert components.t5_params(found.t5) == tiny.T5
    assert components.clip_params(found.clip) == tiny.CLIP
    assert components.ae_params(found.ae) == tiny.AE


def test_schnell_and_metadata_have_defaults_of_their_own(tmp_path):
    sizes = {"steps": 24, "max_sequence_length": 512, "size": 1024, "depth": 2, "depth_single_blocks": 3}
    metadata = {"theta": "500", "sample_size": "256", "max_sequence_length": "64"}
    source = weights.pick("flux", "--flux", flux_file(tmp_path, None, metadata))
    assert components.flux_params(source).theta == 500
    assert components.model_defaults(source) == sizes | {"size": 256, "max_sequence_length": 64}
    assert components.model_defaults(weights.pick("flux", "--flux", flux_file(tmp_path))) == sizes
    state = {key: t for key, t in tiny.flux_state().items() if not key.startswith("guidance_in.")}
    for tensors in state, tiny.flux_to_diffusers(state):
        source = weights.pick("flux", "--flux", flux_file(tmp_path, tensors))
        assert components.model_defaults(source) == sizes | {"steps": 4, "max_sequence_length": 256}
        module = components.load(source, CPU, F32)
        assert not module.params.guidance_embed
        assert_same(module, state)


def test_both_files_of_a_wide_table_or_either_serve_t5(tmp_path):
    state = tiny.t5_state()
    twin = {"encoder.embed_tokens.weight": state["shared.weight"].clone()}
    alone = {key: t for key, t in state.items() if key != "shared.weight"} | twin
    extra = {"decoder.final_layer_norm.weight": torch.zeros(3), "lm_head.weight": torch.zeros(3)}
    for i, tensors in enumerate([state | twin, alone, state | extra]):
        assert_same(load("t5", tiny.save(tmp_path / f"{i}.safetensors", tensors)), state)


def test_clip_loads_in_all_its_spellings(tmp_path):
    state = tiny.clip_state()
    bare = {key.removeprefix("text_model."): t for key, t in state.items()}
    openai = tiny.clip_to_openai(state)
    extra = {
        "text_model.embeddings.position_ids": torch.arange(77)[None],
        "text_projection.weight": torch.zeros(2, 2),
        "logit_scale": torch.zeros(()),
        "vision_model.encoder.layers.0.self_attn.q_proj.weight": torch.zeros(2, 2),
    }
    config = {"num_attention_heads": tiny.CLIP.num_heads}
    for i, tensors in enumerate([state, bare, openai, state | extra, openai | {"text_projection": torch.zeros(2, 2)}]):
        module = load("clip", tiny.save(tmp_path / str(i) / "clip.safetensors", tensors, config=config))
        assert module.params == tiny.CLIP
        assert_same(module, state)
    state = tiny.state(CLIPTextEncoder(components.CLIPParams(90, 128, 96, 2, 1)))  # without a config, heads of 64
    assert load("clip", tiny.save(tmp_path / "clip.safetensors", state)).params.num_heads == 2


def test_the_autoencoder_loads_with_diffusers_old_names(tmp_path):
    tensors = tiny.ae_to_diffusers(tiny.ae_state(), old=True)
    assert_same(load("ae", tiny.save(tmp_path / "vae.safetensors", tensors, config=tiny.AE_CONFIG)), tiny.ae_state())


def test_an_all_in_one_file_serves_all_parts(tmp_path):
    clip, t5 = (f"text_encoders.{name}.transformer." for name in ("clip_l", "t5xxl"))
    tensors = {"text_encoders.clip_l.logit_scale": torch.zeros(())}
    for part, prefix in {"flux": "model.diffusion_model.", "clip": clip, "t5": t5, "ae": "vae."}.items():
        tensors |= {prefix + key: t for key, t in STATE[part]().items()}
    path = tiny.save(tmp_path / "all.safetensors", tensors, config=tiny.AE_CONFIG | {"num_attention_heads": 3})
    for part in STATE:
        assert_same(load(part, path), STATE[part]())
    tiny.save_encoders(tmp_path)
    assert weights.find(path).t5.prefix == weights.find(tmp_path, clip=tmp_path / "text_encoder").t5.prefix


def test_weights_are_cast_and_changing_them_leaves_the_file_alone(tmp_path):
    state = tiny.flux_state()
    expected = {key: t.bfloat16() for key, t in state.items()}
    for i, tensors in enumerate([state, tiny.flux_to_diffusers(state)]):
        path = tiny.save(tmp_path / f"{i}.safetensors", tensors)
        before = path.read_bytes()
        assert_same(load("flux", path, BF16), expected)
        load("flux", path).img_in.weight.zero_()
        assert path.read_bytes() == before


def quantized(state, scaled, shape=()):
    """Matrices in fp8, each with a scale of its own under a key that ends in `scaled`, and their true values."""
    stored, expected = dict(state), dict(state)
    for i, key in enumerate(key for key, t in state.items() if t.ndim == 2):
        scale = torch.full([state[key].shape[0] if n == "N" else 1 for n in shape], 0.01 + i / 100)
        stored[key] = (state[key] / scale.reshape(-1, 1)).to(FP8)
        expected[key] = stored[key].float() * scale.reshape(-1, 1)
        stored[key.removesuffix("weight") + scaled] = scale
    return stored, expected


def test_plain_fp8_is_read_as_the_numbers_it_holds(tmp_path):
    for dtype in FP8, torch.float8_e5m2:
        stored = {key: t.to(dtype) for key, t in tiny.flux_state().items()}
        assert_same(load("flux", flux_file(tmp_path, stored), BF16), {key: t.bfloat16() for key, t in stored.items()})


@pytest.mark.parametrize("shape", [(), (1,), ("N",), ("N", 1)])
def test_both_spellings_of_scaled_fp8_are_multiplied_out(tmp_path, shape):
    for scaled in "scale_weight", "weight_scale":
        stored, expected = quantized(tiny.flux_state(), scaled, shape)
        assert_same(load("flux", flux_file(tmp_path, stored)), expected)


def note(form):
    return torch.tensor(list(json.dumps({"format": form}).encode()), dtype=torch.uint8)


def test_input_scales_and_markers_change_nothing(tmp_path):
    stored, expected = quantized(tiny.t5_state(), "scale_weight")
    stem = "encoder.block.0.layer.0.SelfAttention.q"
    stored |= {"scaled_fp8": torch.zeros(2).to(FP8), f"{stem}.scale_input": torch.ones(())}
    stored[f"{stem}.comfy_quant"] = note("float8_e4m3fn")
    layers = json.dumps({"layers": {stem: {"format": "float8_e5m2"}}})
    path = tiny.save(tmp_path / "t5.safetensors", stored, {"_quantization_metadata": layers})
    assert_same(load("t5", path), expected)


def test_projections_with_different_scales_are_joined_by_their_values(tmp_path):
    stored, expected = quantized(tiny.flux_to_diffusers(tiny.flux_state()), "weight_scale")
    assert_same(
        load("flux", tiny.save_shards(tmp_path / "fp8", stored)),
        load("flux", tiny.save_shards(tmp_path / "plain", expected)).state_dict(),
    )


# what is added to a transformer in scaled FP8 -> the message
UNREADABLE = {
    "img_in.weight_scale_2.*does not belong": {"img_in.weight_scale_2": torch.ones(())},
    "img_in.pre_quant_scale.*does not belong": {"img_in.pre_quant_scale": torch.ones(())},
    "img_in.scale.*does not belong": {"img_in.scale": torch.ones(())},
    "img_in.weight_scale.*does not belong": {"img_in.weight": torch.ones(64, 64)},  # for no FP8 weight
    r"img_in.weight_scale is F32 of shape \(2, 2\), expected one float": {"img_in.weight_scale": torch.ones(2, 2)},
    "img_in.comfy_quant says the format nvfp4; only float8": {"img_in.comfy_quant": note("nvfp4")},
    "img_in.weight is stored as I8": {"img_in.weight": torch.zeros(64, 64, dtype=torch.int8)},
    r"img_in.extra, of shape \(3,\), is a key that does not belong": {"img_in.extra": torch.zeros(3)},
}


def test_what_cannot_be_read_is_named_with_its_key(tmp_path):
    stored, _ = quantized(tiny.flux_state(), "weight_scale")
    for match, added in UNREADABLE.items():
        tensors = stored | added
        if "I8" in match:
            del tensors["img_in.weight_scale"]
        refuse(f"flux.safetensors: {match}", load, "flux", flux_file(tmp_path, tensors))
    metadata = {"_quantization_metadata": json.dumps({"layers": {"img_in": {"format": "mxfp8"}}})}
    refuse("img_in says the format mxfp8; only float8", load, "flux", flux_file(tmp_path, None, metadata))


@pytest.mark.parametrize("names", ["BFL", "diffusers"])
def test_any_missing_key_is_named_with_its_file_and_shape(tmp_path, names):
    state = tiny.flux_state() if names == "BFL" else tiny.flux_to_diffusers(tiny.flux_state())
    source = weights.pick("flux", "--flux", tiny.save(tmp_path / "x.safetensors", state))
    for key in state:
        tensors = {other: t for other, t in source.tensors.items() if other != key}
        match = f"x.safetensors: {key} is missing.*FLUX.1 transformer in {names} names"
        refuse(match, components.check_loads, replace(source, tensors=tensors))
    for part in "t5", "clip", "ae":
        *state, (key, _) = STATE[part]().items()
        path = tiny.save(tmp_path / "y.safetensors", dict(state), config=tiny.AE_CONFIG)
        refuse(f"y.safetensors: {key} is missing, expected with shape", load, part, path)


@pytest.mark.parametrize("shape", [(), (64,), (65, 64), (64, 64, 1), (1, 64, 64)])
def test_a_misshapen_key_is_named_with_what_was_expected(tmp_path, shape):
    for key in "img_in.weight", "txt_in.weight", "double_blocks.1.img_attn.proj.weight":
        path = flux_file(tmp_path, tiny.flux_state() | {key: torch.zeros(shape)})
        refuse(r"flux.safetensors: \w+.* has shape .*, expected", load, "flux", path)


def test_all_keys_are_checked_before_a_weight_is_read(tmp_path, monkeypatch):
    path = flux_file(tmp_path, tiny.flux_state() | {"surplus": torch.zeros(1)})
    for reading in "read", "view":
        monkeypatch.setattr(files, reading, lambda tensor: pytest.fail("a weight was read"))
    refuse("surplus", load, "flux", path)


def test_heads_groups_and_channels_that_do_not_fit_are_named(tmp_path):
    path = tiny.save(tmp_path / "clip.safetensors", tiny.clip_state(), config={"num_attention_heads": 5})
    refuse("5 heads do not divide the hidden size 48", load, "clip", path)
    path = tiny.save(tmp_path / "vae" / "ae.safetensors", tiny.ae_state())
    refuse("do not fit 32 norm groups", load, "ae", path)
    tensors = tiny.flux_state() | {"double_blocks.0.img_attn.norm.query_norm.scale": torch.zeros(7)}
    path = flux_file(tmp_path, tensors)
    refuse(r"img_in.weight has shape \(64, 64\), expected a multiple of 7 rows", load, "flux", path)
    state = tiny.state(AutoEncoder(AutoEncoderParams(ch=8, ch_mult=(1, 2), z_channels=4, norm_groups=4)))
    path = tiny.save(tmp_path / "vae.safetensors", state, config=tiny.AE_CONFIG)
    refuse("an autoencoder of 4 latent channels; FLUX.1's has 16", load, "ae", path)


FOREIGN = {
    "LoRA": {"lora_unet_double_blocks_0_img_attn_proj.lora_down.weight": (4, 8)},
    "a LoRA": {"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": (4, 8)},
    "is a LoRA": {"double_blocks.0.img_attn.norm.key_norm.scale": (8,), "img_in.lora_A.weight": (4, 128)},
    "a LoRA;": {"double_blocks.0.processor.qkv_lora1.down.weight": (4, 8)},
    "XLabs IP-Adapter": {"double_blocks.0.processor.ip_adapter_double_stream_k_proj.weight": (8, 8)},
    "a ControlNet": {"double_blocks.0.img_attn.qkv.weight": (24, 8), "controlnet_blocks.0.weight": (8, 8)},
    "a ControlNet; those": {"transformer_blocks.0.attn.to_q.weight": (8, 8), "controlnet_x_embedder.weight": (8, 64)},
    "Mistoline": {"controlnet_blocks.0.linear.weight": (8, 8)},
    "FLUX.2": {"double_blocks.0.img_attn.qkv.weight": (24, 8), "double_stream_modulation_img.lin.weight": (48, 8)},
    "Chroma": {"double_blocks.0.img_attn.qkv.weight": (24, 8), "distilled_guidance_layer.in_proj.weight": (8, 8)},
    "FLUX.1 Redux": {"redux_up.weight": (12, 8), "redux_down.weight": (8, 12)},
    "bitsandbytes": {"double_blocks.0.img_attn.qkv.weight.quant_state.bitsandbytes__nf4": (8,)},
    "nunchaku": {"transformer_blocks.0.attn.to_q.qweight": (8, 8), "transformer_blocks.0.attn.to_q.wscales": (8, 8)},
    "is a T5 encoder in": {"encoder.block.0.layer.0.SelfAttention.q.weight": (8, 8)},
    "is unknown .one of its keys is something": {"something.weight": (8, 8)},
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_file_of_another_kind_is_named(tmp_path, name):
    path = tiny.save(tmp_path / "x.safetensors", {key: torch.zeros(shape) for key, shape in FOREIGN[name].items()})
    refuse(f"--flux .*x.safetensors: no FLUX.1 transformer in it: .*{name}", load, "flux", path)


WHOLE = b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}'
TWO_IN_FOUR = WHOLE.replace(b"8", b"4")  # two numbers in four bytes
NOT_SAFETENSORS = [
    ("x.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "git-lfs pointer"),
    ("x.safetensors", b"GGUF\x03\0\0\0\0\0\0\0", "cut off or damaged, its 12 bytes end inside the header"),
    ("x.gguf", b"<!DOCTYPE html><html></html>", "not a safetensors file, nor GGUF"),
    ("x.ckpt", b"PK\x03\x04" + bytes(100), "pickled checkpoints can run code"),
    ("x.safetensors", b"", "not a safetensors file"),
    ("x.safetensors", b"\x02\0\0\0\0\0\0\0[]", "not a safetensors file"),
    ("x.safetensors", b"\x03\0\0\0\0\0\0\0{x}", "damaged"),
    ("x.safetensors", b'\x09\0\0\0\0\0\0\0{"a": {}}', "header is damaged"),
    ("x.safetensors", len(TWO_IN_FOUR).to_bytes(8, "little") + TWO_IN_FOUR + bytes(8), "header is damaged"),
]


@pytest.mark.parametrize("name, content, match", NOT_SAFETENSORS)
def test_a_file_that_is_not_safetensors_is_named(tmp_path, name, content, match):
    (tmp_path / name).write_bytes(content)
    refuse(f"{name}: .*{match}", load, "flux", tmp_path / name)


def test_a_truncated_file_is_named_with_its_size(tmp_path):
    path = flux_file(tmp_path)
    whole = path.read_bytes()
    size = len(whole)
    for kept in size - 1, 100, 8:
        path.write_bytes(whole[:kept])
        inside = f"cut off inside the header, after {kept} bytes"
        match = inside if kept <= 100 else f"cut off, only {kept:,} of {size:,} bytes"
        refuse(f"flux.safetensors: {match}", load, "flux", path)


def test_single_files_come_before_diffusers_folders(tmp_path):
    tiny.save_diffusers_model(tmp_path)
    flux_file(tmp_path, name="flux1-dev")
    tiny.save(tmp_path / "ae.safetensors", tiny.ae_state(), config=tiny.AE_CONFIG)
    found = weights.find(tmp_path)
    assert (found.flux.path.name, found.ae.path.name) == ("flux1-dev.safetensors", "ae.safetensors")
    found = weights.find(tmp_path, flux=tmp_path / "transformer", ae=tmp_path / "vae")
    assert found.flux.key_names.name == found.ae.key_names.name == "diffusers"


def test_of_a_folders_files_the_one_transformer_is_taken(tmp_path):
    """LoRAs and ControlNets are passed over; two transformers have to be told apart."""
    tiny.save_model(tmp_path)
    for i, name in enumerate(FOREIGN):
        tensors = {key: torch.zeros(shape) for key, shape in FOREIGN[name].items()}
        if name != "is a T5 encoder in":
            tiny.save(tmp_path / f"{i}.safetensors", tensors)
    assert weights.find(tmp_path).flux.path.name == "flux1-dev.safetensors"
    flux_file(tmp_path, name="a").rename(tmp_path / "a.sft")
    refuse("a.sft and flux1-dev.safetensors could each be.*--flux", weights.find, tmp_path)
    assert weights.find(tmp_path, flux=tmp_path / "a.sft").flux.path.name == "a.sft"


SHARD = "diffusion_pytorch_model-00002-of-00003.safetensors"
INDEX = "diffusion_pytorch_model.safetensors.index.json"
DAMAGED = [  # a file of the folder, what is written to it, and the message
    (SHARD, None, f"the shard {SHARD} is missing"),
    (INDEX, None, "00001-of-00003.safetensors: a shard without its"),
    (INDEX, "{", "index.json: damaged"),
    ("config.json", '{"quantization_config": {"quant_method": "torchao"}}', r"quantized by diffusers \(torchao\)"),
]


@pytest.mark.parametrize("file, text, match", DAMAGED)
def test_what_is_wrong_with_a_folder_is_named(tmp_path, file, text, match):
    path = tiny.save_diffusers_model(tmp_path) / "transformer" / file
    path.write_text(text) if text else path.unlink()
    refuse(match, weights.find, tmp_path)


def test_what_is_not_there_or_does_not_fit_is_named_with_its_flag(tmp_path):
    refuse(f"--model {tmp_path}/no: there is no such", weights.find, f"{tmp_path}/no")
    refuse("no FLUX.1 transformer in it: no safetensors or GGUF file; name one with --flux", weights.find, tmp_path)
    tiny.save(tmp_path / "ae.safetensors", tiny.ae_state(), config=tiny.AE_CONFIG)
    refuse("ae.safetensors is a FLUX.1 autoencoder in BFL names", weights.find, tmp_path)
    model = tiny.save_model(tmp_path / "model")
    for part in STATE:
        refuse(f"--{part} /nowhere: there is no such", weights.find, model, **{part: "/nowhere"})
    wide = tiny.state(T5Encoder(components.T5Params(96, 40, 80, 8, 3, 1)))
    path = tiny.save(tmp_path / "wide" / "t5.safetensors", wide)
    refuse("t5.safetensors: this T5 encoder is 40 wide, but .* expects 32.*--t5", weights.find, model, t5=path)


def test_the_pocket_model_is_the_default_unless_all_parts_are_given(tmp_path, monkeypatch):
    monkeypatch.setattr(recognize, "POCKET", tmp_path / "pocket")
    model = tiny.save_model(tmp_path / "model")
    found = weights.find(None, model, model / "text_encoder_2", model / "text_encoder", model / "ae.safetensors")
    assert found.t5_tokenizer == model / "tokenizer_2" / "tokenizer.json"
    tiny.save_model(tmp_path / "pocket")
    assert weights.find() == weights.find("pocket")
    assert weights.find().name == "pocket"


def test_tokenizers_come_from_the_model_folder_or_beside_the_encoder(tmp_path):
    model, other = tiny.save_model(tmp_path / "model"), tiny.save_model(tmp_path / "other")
    found = weights.find(model, t5=other / "text_encoder_2")
    assert found.clip_tokenizer == model / "tokenizer"
    assert found.t5_tokenizer == other / "tokenizer_2" / "tokenizer.json"
    path = tiny.save(tmp_path / "alone" / "deeper" / "t5.safetensors", tiny.t5_state())
    (model / "tokenizer_2" / "spiece.model").write_bytes(b"")  # tokenizer.json is preferred
    assert weights.find(model, t5=path).t5_tokenizer == model / "tokenizer_2" / "tokenizer.json"
    (model / "tokenizer_2" / "tokenizer.json").unlink()
    assert weights.find(model).t5_tokenizer.name == "spiece.model"


def test_absent_tokenizers_are_fetched_from_schnell(tmp_path, monkeypatch):
    """Or else, out of reach, asked for in one sentence."""
    model, hub = tiny.save_model(tmp_path / "model"), tiny.save_model(tmp_path / "hub")
    for name in ("vocab.json", "merges.txt"):
        (model / "tokenizer" / name).unlink()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    refuse("no tokenizer/ with vocab.json and merges.txt is near .copy tokenizer/.*out of reach", weights.find, model)
    fetch = Mock(return_value=hub)
    monkeypatch.setattr(hub_files, "fetch", fetch)
    assert weights.find(model).clip_tokenizer == hub / "tokenizer"
    assert fetch.call_args.args[:2] == ("black-forest-labs/FLUX.1-schnell", [["tokenizer/*", "tokenizer_2/*"]])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
def test_loading_holds_the_weights_in_memory_once(tmp_path):
    """In BFL's names and in diffusers', where joined projections come apart."""
    with torch.device("meta"):
        flux = Flux(FluxParams(hidden_size=1024, mlp_hidden=4096, num_heads=8, depth=1, depth_single_blocks=4))
    state = {key: torch.zeros(t.shape, dtype=BF16) for key, t in flux.state_dict().items()}
    theirs = {}
    for key, tensor in state.items():
        *firsts, last = [row.key for row in key_names.flux_from_diffusers(key, {})]
        theirs |= {name: tensor[:1024].clone() for name in firsts}
        theirs[last] = tensor[1024 * len(firsts) :].clone()
    small = flux_file(tmp_path, name="small")
    for tensors in state, theirs:
        path = flux_file(tmp_path, tensors)
        peak, imported = tiny.peak_memory(small, path)
        assert peak < 1.15 * path.stat().st_size
        assert "gguf" not in imported


def test_what_was_saved_is_what_is_read(tmp_path):
    """Against safetensors' own reader, in every dtype that is read, at odd offsets."""
    tensors = {f"{i}": torch.randn(3, 2 * i + 1).to(dtype) for i, dtype in enumerate(files.DTYPES.values())}
    path = tiny.save(tmp_path / "x.safetensors", tensors)
    for key, tensor in load_file(path).items():
        found = files.read(files.read_header(path).tensors[key])
        assert found.dtype == tensor.dtype and torch.equal(found.float(), tensor.float())
