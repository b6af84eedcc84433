"""Layers in 8 bits: how exact they are, what of a file's numbers they keep, and whole pictures."""

import json

import pytest
import tiny
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.fx.experimental.proxy_tensor import make_fx

import generate
import pipeline
import weights
from errors import InputError
from extensions.lora import Addition, Change, LowRank, added, hooks_for, merge
from formats import recognize
from model.fp8 import Fp8Linear, can_multiply, scaled_product, to_fp8, why_not
from runtime.choose import choose_fp8
from sampler.flow import image_ids, text_ids

FP8 = torch.float8_e4m3fn
IN_FP8 = weights.Placement(in_fp8=weights.FP8_LAYERS.search)


def test_whether_a_device_multiplies_is_tried(monkeypatch):
    """With matrices as large as a layer's: cuBLASLt has sizes that it refuses."""
    assert can_multiply(torch.device("cpu")) and why_not(torch.device("cpu")) == ""
    shapes = []

    def refuse(x, weight, *args, **kwargs):
        shapes.append((x.shape, weight.shape))
        raise errors[len(shapes) - 1]("no kernel for this GPU\nand a trace")

    monkeypatch.setattr(F, "scaled_mm", refuse)
    errors = [NotImplementedError, ValueError]
    for index in range(len(errors)):
        device = torch.device("cpu", index)
        assert not can_multiply(device) and why_not(device) == "no kernel for this GPU"
    assert shapes == [((256, 256), (256, 256))] * 2


def layer_of(weight: torch.Tensor, bias: torch.Tensor, multiplies: bool = True) -> Fp8Linear:
    layer = Fp8Linear(weight.shape[1], weight.shape[0], multiplies)
    layer.weight.data, layer.scale.data = to_fp8(weight)
    layer.bias.data = bias
    return layer


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact.double()).norm() / exact.double().norm())


def test_numbers_in_fp8_use_its_whole_range():
    x = torch.randn(5, 64) * torch.tensor([1e-3, 1.0, 50.0, 1e4, 0.0])[:, None]
    numbers, scale = to_fp8(x)
    assert numbers.dtype == FP8 and torch.equal(numbers.float().abs().amax(1), torch.tensor([448.0] * 4 + [0.0]))
    rounding = ((numbers.float() * scale - x).abs() / x.abs().amax(1, keepdim=True))[:4]
    assert rounding.max() < 2**-4 and torch.isfinite(scale).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("multiplies", [True, False])
def test_a_layer_in_fp8_is_near_the_layer(dtype, multiplies):
    """8 bits have 3 behind the point: weights err by 2.6 %, and inputs as much where they are rounded too."""
    torch.manual_seed(0)
    weight, bias, x = torch.randn(96, 128), torch.randn(96).to(dtype), torch.randn(2, 33, 128).to(dtype)
    weight *= torch.logspace(-3, 1, 96)[:, None]  # rows of all sizes, which one scale for all would drown
    exact = F.linear(x.double(), weight.double(), bias.double())
    layer = layer_of(weight, bias, multiplies)
    found = layer(x)
    assert found.dtype == dtype and found.shape == exact.shape
    for row in 0, 50, 95:
        without = exact[..., row] - bias[row].double()
        assert error(found[..., row] - bias[row], without) < (0.3 if dtype == torch.bfloat16 and row == 0 else 0.05)
    assert torch.equal(layer(x, rows=slice(32, 64)), found[..., 32:64])
    numbers, scale = to_fp8(x.flatten(0, 1)) if multiplies else (x.flatten(0, 1), torch.ones(66, 1))
    emulated = F.linear(numbers.double() * scale.double(), layer.upcast().double(), bias.double()).view(2, 33, 96)
    assert error(found, emulated) < (1e-2 if dtype == torch.bfloat16 else 1e-5)


def test_the_product_is_an_operator_that_torch_can_trace():
    """torch.compile must not look into it: `scaled_mm` with a sliced bias fails on GPUs."""
    layer = layer_of(torch.randn(64, 32), torch.randn(64))
    x = torch.randn(1, 48, 32)
    traced = make_fx(lambda x: layer(x, rows=slice(32, None)))(x)
    called = {node.target for node in traced.graph.nodes if node.op == "call_function"}
    assert torch.ops.regional.scaled_product.default in called
    assert not any("scaled_mm" in str(target) for target in called)
    args = *to_fp8(x[0]), *to_fp8(torch.randn(64, 32)), layer.bias[:64], torch.bfloat16
    torch.library.opcheck(scaled_product, args, test_utils="test_faketensor")


# ------------------------------------------------------------------------------------------------ loading


def source_of(tmp_path, state, **metadata) -> recognize.Source:
    return weights.pick("flux", "--flux", tiny.save(tmp_path / "flux.safetensors", state, metadata or None))


def fp8_layers(flux) -> dict[str, Fp8Linear]:
    return {name: module for name, module in flux.named_modules() if isinstance(module, Fp8Linear)}


def test_the_blocks_matrices_and_no_others_become_fp8(tmp_path):
    flux = weights.load(source_of(tmp_path, tiny.flux_state()), "cpu", torch.float32, placement=IN_FP8)
    names = set(fp8_layers(flux))
    double = [f"{s}_{leaf}" for s in ("img", "txt") for leaf in ("attn.qkv", "attn.proj", "mlp.0", "mlp.2")]
    expected = {f"double_blocks.{i}.{leaf}" for i in range(2) for leaf in double}
    assert names == expected | {f"single_blocks.{i}.linear{j}" for i in range(3) for j in (1, 2)}
    state = tiny.flux_state()
    for name, layer in fp8_layers(flux).items():
        assert error(layer.upcast(), state[f"{name}.weight"]) < 0.03
        assert torch.equal(layer.bias, state[f"{name}.bias"])
    others = {name for name, tensor in flux.state_dict().items() if tensor.dtype == torch.float32}
    assert {"img_in.weight", "double_blocks.0.img_mod.lin.weight", "final_layer.linear.weight"} <= others


@pytest.mark.parametrize("shape", [(), (1,), ("rows",), ("rows", 1)])
def test_numbers_that_are_stored_in_fp8_are_kept(tmp_path, shape):
    """One scale for a matrix, or one for each of its rows; none counts as 1."""
    state, scaled = tiny.flux_state(), {}
    for name in [name for name in state if name.endswith("linear2.weight") or name.endswith("linear1.weight")]:
        numbers, scale = to_fp8(state[name])
        numbers = state[name].to(FP8) if shape in ((), (1,)) else numbers
        scale = torch.tensor(0.5).expand(len(numbers), 1) if shape in ((), (1,)) else scale
        stored = scale[0, 0].reshape(shape) if shape in ((), (1,)) else scale.reshape(-1, *shape[1:])
        scaled |= {name: numbers, name.replace("weight", "scale_weight"): stored.contiguous()}
        state[name] = (numbers, scale)
    others = {name: tensor for name, tensor in state.items() if isinstance(tensor, torch.Tensor)}
    flux = weights.load(source_of(tmp_path, others | scaled), "cpu", torch.float32, placement=IN_FP8)
    for name, layer in fp8_layers(flux).items():
        if name.endswith(("linear1", "linear2")):
            numbers, scale = state[f"{name}.weight"]
            assert torch.equal(layer.weight.view(torch.uint8), numbers.view(torch.uint8))
            assert torch.equal(layer.scale, scale)


def test_joined_projections_keep_the_scales_of_their_parts(tmp_path):
    """Diffusers' q, k and v come with a scale each, and are one matrix here."""
    state = tiny.flux_to_diffusers(tiny.flux_state())
    parts = [f"transformer_blocks.0.attn.to_{p}.weight" for p in "qkv"]
    scales = {name: torch.tensor(0.25 * 2**i) for i, name in enumerate(parts)}
    state |= {name: state[name].to(FP8) for name in parts}
    state |= {name.replace("weight", "weight_scale"): scale for name, scale in scales.items()}
    layer = (
        weights.load(source_of(tmp_path, state), "cpu", torch.float32, placement=IN_FP8).double_blocks[0].img_attn.qkv
    )
    assert torch.equal(layer.weight.float(), torch.cat([state[name].float() for name in parts]))
    assert layer.scale.flatten().tolist() == [s for scale in scales.values() for s in [scale.item()] * 64]


@pytest.mark.parametrize("stored", [torch.float32, FP8])
def test_a_merged_lora_is_in_the_8_bits(tmp_path, stored):
    name, delta = "single_blocks.1.linear2.weight", torch.randn(64, 256)
    state = tiny.flux_state()
    state[name] = state[name].to(stored)
    merges = {name: lambda weight: weight + delta}
    flux = weights.load(source_of(tmp_path, state), "cpu", torch.float32, merges, placement=IN_FP8)
    assert error(flux.single_blocks[1].linear2.upcast(), state[name].float() + delta) < 0.03


def test_a_dora_of_a_region_sees_the_weight_that_the_8_bits_stand_for():
    torch.manual_seed(0)
    layer = torch.nn.ModuleDict({"0": layer_of(20 * torch.randn(24, 16), torch.zeros(24))})
    change = Change("0.weight", 6, 18, LowRank(torch.randn(12, 3), torch.randn(3, 16), 0.5), torch.rand(12, 1))
    x = torch.randn(1, 4, 16)
    with added(layer, hooks_for(layer, [Addition(change, 0.8, torch.ones(4).bool())], torch.device("cpu"), x.dtype)):
        found = layer["0"](x) - layer["0"].forward(x)
    expected = merge(layer["0"].upcast(), [(change, 0.8)]) - layer["0"].upcast()
    torch.testing.assert_close(found, F.linear(x, expected), rtol=1e-4, atol=1e-3)


# ------------------------------------------------------------------------------------------------ choosing it


@pytest.mark.parametrize("stored", [True, False])
def test_auto_keeps_fp8_files_on_gpus_that_multiply_them(tmp_path, monkeypatch, capsys, stored):
    """Of others it says why they do not."""
    state = tiny.flux_state()
    state |= {k: t.to(FP8) for k, t in state.items() if stored and t.ndim == 2}
    source, card = source_of(tmp_path, state), torch.device("cuda")
    for problem in "", "too old":
        monkeypatch.setattr(pipeline, "why_not", lambda device, problem=problem: problem)
        assert choose_fp8("auto", source, card) == (stored and not problem)
        said = capsys.readouterr().err
        assert ("(too old)" in said and "when they are loaded" in said) == bool(stored and problem)
        assert choose_fp8("fp8", source, card)
        said = capsys.readouterr().err
        assert said.count("(too old): each call upcasts") == said.count("\n") == bool(problem)
    assert not choose_fp8("auto", source, torch.device("cpu"))
    assert choose_fp8("fp8", source, torch.device("cpu")) and not choose_fp8("none", source, card)
    with pytest.raises(InputError, match="--quantize fp8: Apple"):
        choose_fp8("fp8", source, torch.device("mps"))


def test_a_picture_in_fp8_is_near_and_says_so(golden, tmp_path):
    """And --config-from-metadata makes it again, bit for bit."""

    def draw(name, *flags):
        out = ["--output", tmp_path / f"{name}.png", "--save-latents", tmp_path / f"{name}.safetensors", "--metadata"]
        assert generate.main([str(arg) for arg in ["--device", "cpu", *out, *flags]]) == 0
        return load_file(tmp_path / f"{name}.safetensors")["latents"]

    model, layout = golden / "models" / "flux-tiny-dev", golden / "regional_3boxes_full" / "layout.yaml"
    exact = draw("exact", "--model", model, "--layout", layout)
    small = draw("small", "--model", model, "--layout", layout, "--quantize", "fp8")
    assert 1e-3 < error(small, exact) < 0.25
    assert json.loads((tmp_path / "small.json").read_text())["fp8"] is True
    assert torch.equal(draw("again", "--config-from-metadata", tmp_path / "small.png"), small)


@torch.inference_mode()
def test_a_forward_pass_in_fp8_is_near_on_the_pocket_model():
    source = weights.find("pocket").flux
    exact, small = (weights.load(source, "cpu", torch.float32, placement=p) for p in (weights.ON_DEVICE, IN_FP8))
    torch.manual_seed(0)
    img, txt, y = torch.randn(1, 64, 64), torch.randn(1, 64, exact.params.context_in_dim), torch.randn(1, 96)
    given = img, image_ids(128, 128), txt, text_ids(64), torch.tensor([0.7]), y[:, : exact.params.vec_in_dim]
    outs = [tiny.velocity(flux, *given, torch.tensor([3.5])) for flux in (exact, small)]
    assert error(outs[1], outs[0]) < 0.08
