"""Layers in FP8: how exact they are, which stored numbers they keep, and whole images."""

import json
from pathlib import Path

import pytest
import tiny
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.fx.experimental.proxy_tensor import make_fx

import weights
from errors import InputError
from extensions.lora import Change, LowRank, added, hooks_for, merge
from formats import components, recognize
from formats.fp8 import Fp8Linear, can_multiply, scaled_product, to_fp8, why_not
from runtime import choose
from runtime.choose import choose_fp8

FP8 = torch.float8_e4m3fn


def test_whether_a_device_multiplies_is_tried(monkeypatch):
    """With matrices as large as a layer's: cuBLASLt has sizes that it refuses."""
    assert can_multiply(torch.device("cpu")) and why_not(torch.device("cpu")) == ""
    shapes = []
    errors = [NotImplementedError, ValueError]

    def refuse(x, weight, *args, **kwargs):
        shapes.append((x.shape, weight.shape))
        raise errors[len(shapes) - 1]("no kernel for this GPU\nand a trace")

    monkeypatch.setattr(F, "scaled_mm", refuse)
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


@pytest.mark.parametrize("dtype, most", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("multiplies", [True, False])
def test_a_layer_in_fp8_is_near_the_layer(dtype, most, multiplies):
    """8 bits have 3 behind the point: weights err by 2.6 %, and inputs as much where they are rounded too."""
    torch.manual_seed(0)
    weight, bias, x = torch.randn(96, 128), torch.randn(96).to(dtype), torch.randn(2, 33, 128).to(dtype)
    weight *= torch.logspace(-3, 1, 96)[:, None]  # rows of all sizes, which one scale for all would drown
    layer = layer_of(weight, bias, multiplies)
    found = layer(x)
    assert found.dtype == dtype and found.shape == (2, 33, 96)
    exact = F.linear(x.double(), weight.double())
    for row in 0, 50, 95:
        is_rounded = dtype == torch.bfloat16 and row == 0
        assert error(found[..., row] - bias[row], exact[..., row]) < (0.3 if is_rounded else 0.05)
    assert torch.equal(layer(x, rows=slice(32, 64)), found[..., 32:64])
    numbers, scale = to_fp8(x.flatten(0, 1)) if multiplies else (x.flatten(0, 1), torch.ones(66, 1))
    emulated = F.linear(numbers.double() * scale.double(), layer.upcast().double(), bias.double())
    assert error(found.flatten(0, 1), emulated) < most


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


def source_of(tmp_path, state) -> recognize.Source:
    return weights.pick("flux", "--flux", tiny.save(tmp_path / "flux.safetensors", state))


def load(source: recognize.Source, merges: components.Merges = components.NOTHING, fp8: bool = True):
    return components.load(source, "cpu", torch.float32, merges, fp8=fp8)


def fp8_layers(flux) -> dict[str, Fp8Linear]:
    return {name: module for name, module in flux.named_modules() if isinstance(module, Fp8Linear)}


def test_the_blocks_matrices_and_no_others_become_fp8(tmp_path):
    state = tiny.flux_state()
    flux = load(source_of(tmp_path, state))
    double = [f"{s}_{leaf}" for s in ("img", "txt") for leaf in ("attn.qkv", "attn.proj", "mlp.0", "mlp.2")]
    expected = {f"double_blocks.{i}.{leaf}" for i in range(2) for leaf in double}
    assert fp8_layers(flux).keys() == expected | {f"single_blocks.{i}.linear{j}" for i in range(3) for j in (1, 2)}
    for name, layer in fp8_layers(flux).items():
        assert error(layer.upcast(), state[f"{name}.weight"]) < 0.03
        assert torch.equal(layer.bias, state[f"{name}.bias"])
    assert flux.img_in.weight.dtype == flux.double_blocks[0].img_mod.lin.weight.dtype == torch.float32


@pytest.mark.parametrize("shape", [(), (1,), ("rows",), ("rows", 1)])
def test_numbers_that_are_stored_in_fp8_are_kept(tmp_path, shape):
    """One scale for a matrix, or one for each of its rows; none counts as 1."""
    state = tiny.flux_state()
    expected = {}
    for name in [name for name in state if name.endswith(("linear1.weight", "linear2.weight"))]:
        numbers, scale = to_fp8(state[name])
        stored = scale.reshape(-1, *shape[1:])
        if "rows" not in shape:
            numbers = state[name].to(FP8)
            stored = torch.full(shape, 0.5)
            scale = torch.full((len(numbers), 1), 0.5)
        state |= {name: numbers, name.replace("weight", "scale_weight"): stored.contiguous()}
        expected[name.removesuffix(".weight")] = (numbers, scale)
    layers = fp8_layers(load(source_of(tmp_path, state)))
    for name, (numbers, scale) in expected.items():
        assert torch.equal(layers[name].weight.view(torch.uint8), numbers.view(torch.uint8))
        assert torch.equal(layers[name].scale, scale)


def test_joined_projections_keep_the_scales_of_their_parts(tmp_path):
    """Diffusers' q, k and v come with a scale each, and are one matrix here."""
    state = tiny.flux_to_diffusers(tiny.flux_state())
    parts = [f"transformer_blocks.0.attn.to_{p}.weight" for p in "qkv"]
    state |= {name: state[name].to(FP8) for name in parts}
    state |= {name.replace("weight", "weight_scale"): torch.tensor(0.25 * 2**i) for i, name in enumerate(parts)}
    layer = load(source_of(tmp_path, state)).double_blocks[0].img_attn.qkv
    assert torch.equal(layer.weight.float(), torch.cat([state[name].float() for name in parts]))
    assert layer.scale.flatten().tolist() == [0.25] * 64 + [0.5] * 64 + [1.0] * 64


@pytest.mark.parametrize("stored", [torch.float32, FP8])
def test_a_merged_lora_is_in_the_8_bits(tmp_path, stored):
    name, delta = "single_blocks.1.linear2.weight", torch.randn(64, 256)
    state = tiny.flux_state()
    state[name] = state[name].to(stored)
    flux = load(source_of(tmp_path, state), {name: lambda weight: weight + delta})
    assert error(flux.single_blocks[1].linear2.upcast(), state[name].float() + delta) < 0.03


def test_a_dora_of_a_region_sees_the_weight_that_the_8_bits_stand_for():
    torch.manual_seed(0)
    layer = torch.nn.ModuleDict({"0": layer_of(20 * torch.randn(24, 16), torch.zeros(24))})
    change = Change("0.weight", 6, 18, LowRank(torch.randn(12, 3), torch.randn(3, 16), 0.5), torch.rand(12, 1))
    x = torch.randn(1, 4, 16)
    with added(layer, hooks_for(layer, [(change, 0.8, torch.ones(4).bool())], torch.device("cpu"), x.dtype)):
        found = layer["0"](x) - layer["0"].forward(x)
    expected = merge(layer["0"].upcast(), [(change, 0.8)]) - layer["0"].upcast()
    torch.testing.assert_close(found, F.linear(x, expected), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("stored", [True, False])
def test_auto_keeps_fp8_files_on_gpus_that_multiply_them(tmp_path, monkeypatch, capsys, stored):
    """Of others it says why they do not."""
    state = tiny.flux_state()
    state |= {k: t.to(FP8) for k, t in state.items() if stored and t.ndim == 2}
    source = source_of(tmp_path, state)
    gpu, cpu, mps = map(torch.device, ("cuda", "cpu", "mps"))
    for problem in "too old", "":
        monkeypatch.setattr(choose, "why_not", lambda device, problem=problem: problem)
        assert choose_fp8("auto", source, gpu) == (stored and not problem)
        said = capsys.readouterr().err
        assert ("(too old)" in said and "when they are loaded" in said) == bool(stored and problem)
        assert choose_fp8("fp8", source, gpu)
        said = capsys.readouterr().err
        assert said.count("(too old): each call upcasts") == said.count("\n") == bool(problem)
    assert choose_fp8("fp8", source, cpu) and not choose_fp8("auto", source, cpu)
    assert not choose_fp8("none", source, gpu)
    with pytest.raises(InputError, match="--quantize fp8: Apple"):
        choose_fp8("fp8", source, mps)


def test_an_image_in_fp8_is_near_and_records_it(run):
    """And --config-from-metadata makes it again, bit for bit."""

    def latents(name, *flags, **how):
        out = ("--output", f"{name}.png", "--save-latents", f"{name}.safetensors", "--metadata")
        assert run(*out, *flags, **how).code == 0
        return load_file(f"{name}.safetensors")["latents"]

    given = ("--prompt", "x", "--width", 64, "--height", 64, "--steps", 2, "--seed", 1)
    exact = latents("exact", *given)
    small = latents("small", *given, "--quantize", "fp8")
    assert 1e-3 < error(small, exact) < 0.25
    assert json.loads(Path("small.json").read_text())["fp8"] is True
    assert torch.equal(latents("again", "--config-from-metadata", "small.png", "--trust-metadata", model=None), small)
