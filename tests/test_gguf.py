"""formats/gguf.py: files by the package's writer load as the package reads them; damage is named."""

import struct
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
import tiny
import torch
from gguf import GGMLQuantizationType as Type
from test_weights import assert_same, load, refuse

import weights
from errors import InputError
from extensions.lora_files import read_lora
from formats import components
from formats import safetensors as files
from formats.gguf import CHUNK
from model.t5 import T5Encoder, T5Params
from model.transformer import Flux, FluxParams

SIZES = dict(depth=1, depth_single_blocks=1)
SMALL = FluxParams(32, 64, 32, 32, 32, 32, 1, **SIZES)
WIDE = FluxParams(256, 64, 256, 256, 256, 256, 2, **SIZES)  # rows of 256 numbers, as most types need
QUANTISABLE = [Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0, Type.BF16, Type.F16, Type.F32]
TESTED = {*QUANTISABLE, *(kind for kind in Type if hasattr(gguf.quants, kind.name))}  # which the package dequantizes

Stored = dict[str, tuple[np.ndarray, Type]]


def quantized(state: tiny.State, kind: Type) -> Stored:
    """Matrices in `kind` where its blocks fit, all else in float32; random blocks of those that the
    package can't write."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    random = np.random.default_rng(0)
    stored = {}
    for key, tensor in state.items():
        if tensor.ndim != 2 or tensor.shape[1] % block:
            stored[key] = tensor.numpy(), Type.F32
        elif kind in QUANTISABLE:
            stored[key] = gguf.quantize(tensor.numpy(), kind), kind
        else:  # bytes below 60, or a scale, two of them, might be infinite
            rows, columns = tensor.shape
            stored[key] = random.integers(0, 60, (rows, columns // block * size), dtype=np.uint8), kind
    return stored


def numbers(stored: Stored) -> tiny.State:
    return {key: torch.tensor(gguf.dequantize(array, kind)) for key, (array, kind) in stored.items()}


def save(path: Path, stored: Stored, prefix: str = "", **settings) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, "flux")
    writer.add_token_list(["a", "b"])
    writer.add_array("scores", [0.5, 1.5])
    for name, value in settings.items():
        getattr(writer, name)(value)
    for key, (array, kind) in stored.items():
        writer.add_tensor(prefix + key, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def to_llama_cpp(tensors: dict, layers: int) -> dict:
    """A T5 encoder's tensors under the names that llama.cpp's converter gives them."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.T5ENCODER, layers)
    return {names.get_name(key, try_suffixes=(".weight",)): tensor for key, tensor in tensors.items()}


@pytest.fixture(scope="module")
def wide():
    return tiny.state(Flux(WIDE))


@pytest.mark.parametrize("kind", sorted(TESTED), ids=lambda kind: kind.name)
def test_weights_are_what_the_package_makes_of_them(tmp_path, wide, kind):
    stored = quantized(wide, kind)
    assert sum(own == kind for _, own in stored.values()) > 20 and WIDE.hidden_size * 1024 > CHUNK
    path = save(tmp_path / "flux.gguf", stored)
    expected = numbers(stored)
    assert all(tensor.isfinite().all() for tensor in expected.values())
    assert_same(load("flux", path), expected)
    is_float = files.read_header(path).tensors["img_in.weight"].dtype in files.FLOATS
    assert is_float == (kind in (Type.F32, Type.F16, Type.BF16))  # which torch reads by itself
    if kind in (Type.Q5_1, Type.IQ4_XS):
        rounded = {key: t.bfloat16() for key, t in expected.items()}
        assert_same(load("flux", path, torch.bfloat16), rounded)


def test_prefix_alignment_version_and_file_name_do_not_matter(tmp_path):
    stored = quantized(tiny.flux_state(), Type.Q8_0)
    for name, prefix, alignment, version in (
        ("a.gguf", "model.diffusion_model.", 32, 3),
        ("b.gguf", "diffusion_model.", 8, 3),
        ("c.gguf", "", 4096, 3),
        ("d.safetensors", "", 32, 2),
    ):
        path = save(tmp_path / name, stored, prefix, add_custom_alignment=alignment, add_file_type=7)
        content = path.read_bytes()
        path.write_bytes(content[:4] + struct.pack("<I", version) + content[8:])
        assert_same(load("flux", path), numbers(stored))
    metadata = files.read_header(path).metadata
    assert metadata["general.file_type"] == "7" and "tokenizer.ggml.tokens" not in metadata
    path = tiny.save(tmp_path / "safetensors.gguf", tiny.flux_state())
    assert_same(load("flux", path), tiny.flux_state())


def test_projections_of_several_types_are_joined_by_their_numbers(tmp_path):
    state = tiny.flux_to_diffusers(tiny.flux_state())
    kinds = [Type.Q8_0, Type.Q4_0, Type.F16, Type.Q5_1, Type.BF16]
    by_kind = [quantized(state, kind) for kind in kinds]
    stored = {key: by_kind[i % len(kinds)][key] for i, key in enumerate(state)}
    plain = tiny.save(tmp_path / "plain.safetensors", numbers(stored))
    assert_same(load("flux", save(tmp_path / "flux.gguf", stored)), load("flux", plain).state_dict())


@pytest.mark.parametrize("kind", [Type.F32, Type.Q8_0], ids=lambda kind: kind.name)
def test_t5_in_llama_cpps_names_computes_what_the_safetensors_do(tmp_path, kind):
    """Also from a file with a decoder."""
    params = T5Params(vocab_size=96, d_model=32, d_ff=96, d_kv=16, num_heads=4, num_layers=2)
    stored = quantized(tiny.state(T5Encoder(params)), kind)
    decoder = dict.fromkeys(["dec.blk.0.attn_q.weight", "output.weight"], (np.zeros((2, 32), np.float32), Type.F32))
    path = save(tmp_path / "t5.gguf", to_llama_cpp(stored, 2) | decoder)
    source = weights.pick("t5", "--t5", path)
    assert components.t5_params(source) == params and source.key_names.name == "llama.cpp"
    ids = torch.arange(96).reshape(2, 48)
    ours = components.load(source, "cpu", torch.float32)
    assert_same(ours, numbers(stored))
    assert torch.equal(ours(ids), load("t5", tiny.save(tmp_path / "t5.safetensors", numbers(stored)))(ids))


def test_a_model_may_be_made_of_gguf_files(tmp_path):
    model = tiny.save_model(tmp_path / "model")
    flux, t5 = quantized(tiny.flux_state(), Type.Q4_1), quantized(tiny.t5_state(), Type.Q8_0)
    flux_file = save(tmp_path / "flux.gguf", flux, "model.diffusion_model.")
    t5_file = save(tmp_path / "t5" / "t5.gguf", to_llama_cpp(t5, 2))
    for places in {"flux": flux_file, "t5": t5_file}, {"flux": tmp_path, "t5": tmp_path / "t5"}:
        found = weights.find(model, **places)
        assert_same(components.load(found.flux, "cpu", torch.float32), numbers(flux))
        assert_same(components.load(found.t5, "cpu", torch.float32), numbers(t5))
    flux_file.rename(model / "flux.gguf")
    refuse("flux.gguf and flux1-dev.safetensors could each be", weights.find, model)
    (model / "flux1-dev.safetensors").unlink()
    assert weights.find(model).flux.path.name == "flux.gguf"


def text(string: str) -> bytes:
    return struct.pack("<Q", len(string)) + string.encode()


def pair(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def info(key: str, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return text(key) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def header(pairs: list[bytes], infos: list[bytes], version: int = 3, claims: tuple[int, int] | None = None) -> bytes:
    """A file of these pairs and tensors that `claims` to have more, with 64 bytes of data."""
    counts = claims or (len(infos), len(pairs))
    written = b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join(pairs) + b"".join(infos)
    return written + bytes(-len(written) % 32 + 64)


HUGE = 2**62
BAD = {
    "nothing but the magic": (b"GGUF", "its 4 bytes end inside the header"),
    "version 1": (header([], [], 1), "GGUF of version 1, expected 2 or 3"),
    "too many tensors": (header([], [info("a", (4,))], claims=(HUGE, 0)), "entries are more than 50,000"),
    "a key too long": (header([struct.pack("<Q", HUGE)], []), "end inside the header"),
    "a long array": (header([pair("a", 9, struct.pack("<IQ", 6, HUGE))], []), "end inside the header"),
    "a long vocabulary": (header([pair("a", 9, struct.pack("<IQ", 8, HUGE))], []), "end inside the header"),
    "an array of arrays": (header([pair("a", 9, struct.pack("<IQ", 9, 1))], []), "a is an array of the type 9"),
    "an unknown value": (header([pair("a", 77, b"")], []), "a is of the type 77"),
    "no alignment": (header([pair("general.alignment", 4, bytes(4))], []), "general.alignment = 0, expected a count"),
    "a worded alignment": (header([pair("general.alignment", 8, text("x"))], []), "general.alignment = 'x'"),
    "one of several files": (header([pair("split.count", 2, b"\3\0")], []), "one of several parts.*--merge"),
    "five dimensions": (header([], [info("a", (1,) * 5)]), "a has 5 dimensions, expected at most 4"),
    "an empty tensor": (header([], [info("a", (0, 4))]), r"a has shape \(4, 0\)"),
    "a tensor too large": (header([], [info("a", (HUGE, HUGE))]), "cut off, a ends at byte"),
    "a tensor too far": (header([], [info("a", (4,), offset=HUGE)]), "cut off, a ends at byte .* of 128"),
    "half a block": (header([], [info("a", (48,), Type.Q8_0)]), r"a has shape \(48,\), expected .* of 32 in Q8_0"),
    "an unknown type": (header([], [info("a", (4,), 99)]), "a is of GGUF's type 99, which is not supported"),
    "a key twice": (header([], [info("a", (4,)), info("a", (4,))]), "'a' is twice in the header"),
    "no tensors": (header([], []), "no FLUX.1 transformer in it: x.gguf is unknown"),
    "an LLM": (header([], [info("blk.0.attn_q.weight", (4,))]), "x.gguf is a language model in llama.cpp's names"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_header_is_one_sentence_and_soon(tmp_path, name):
    content, match = BAD[name]
    (tmp_path / "x.gguf").write_bytes(content)
    start = time.process_time()
    refuse(f"x.gguf.*({match})", load, "flux", tmp_path / "x.gguf")
    assert time.process_time() - start < 1


def test_a_vocabulary_that_the_file_cannot_hold_is_not_walked(tmp_path):
    (tmp_path / "x.gguf").write_bytes(header([pair("a", 9, struct.pack("<IQ", 8, HUGE))], []))
    with open(tmp_path / "x.gguf", "r+b") as file:
        file.truncate(90_000_000)  # of zeros, 11 million empty strings
    start = time.process_time()
    refuse("x.gguf: .*cut off or damaged", load, "flux", tmp_path / "x.gguf")
    assert time.process_time() - start < 1


def test_a_block_of_any_number_is_refused_soon(tmp_path):
    for number in "999999999", "9" * 5000:
        extra = {f"double_blocks.{number}.img_attn.qkv.bias": (np.zeros(4, np.float32), Type.F32)}
        path = save(tmp_path / "flux.gguf", quantized(tiny.flux_state(), Type.Q8_0) | extra)
        start = time.process_time()
        refuse("flux.gguf: double_blocks.2.* is missing", load, "flux", path)
        assert time.process_time() - start < 10


@pytest.mark.parametrize("kind", [Type.Q8_K, Type.Q8_1, Type.I8], ids=lambda kind: kind.name)
def test_types_without_a_way_back_are_named(tmp_path, wide, kind):
    block, size = gguf.GGML_QUANT_SIZES[kind]
    stored = quantized(wide, Type.F32)
    dtype = np.int8 if kind == Type.I8 else np.uint8
    stored["txt_in.weight"] = np.zeros((256, 256 // block * size), dtype), kind
    path = save(tmp_path / "flux.gguf", stored)
    refuse(f"flux.gguf: txt_in.weight is stored as {kind.name}, which is not supported", load, "flux", path)


def test_a_quantized_lora_is_refused(tmp_path):
    path = save(tmp_path / "lora.gguf", {"img_in.lora_A.weight": (np.zeros((4, 34), np.uint8), Type.Q8_0)})
    with torch.device("meta"):
        refuse("img_in.lora_A.weight is stored as GGUF Q8_0, which is", read_lora, path, {"flux": Flux(tiny.FLUX)})


def test_safetensors_cannot_pass_for_quantized(tmp_path):
    text = b'{"img_in.weight": {"dtype": "GGUF Q8_0", "shape": [64, 64], "data_offsets": [0, 4]}}'
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
    refuse("header is damaged", load, "flux", tmp_path / "x.safetensors")


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of infinite scales
@pytest.mark.parametrize("seed", range(4))
def test_damaged_files_are_refused_or_loaded(tmp_path, seed):
    """50 files each, cut or changed in some bytes, most of them in the header; none takes long."""
    path = save(tmp_path / "x.gguf", quantized(tiny.state(Flux(SMALL)), Type.Q8_0))
    whole = path.read_bytes()
    length = min(t.start for t in files.read_header(path).tensors.values())
    random = np.random.default_rng(seed)
    refused = 0
    for i in range(50):
        content = bytearray(whole)
        for at in random.integers(0, length if i % 5 else len(whole), random.integers(1, 4)):
            content[at : at + 8] = random.choice([0, 1, 255, random.integers(256)], 8).astype(np.uint8).tobytes()
        path.write_bytes(content[: random.integers(len(content))] if i % 4 == 0 else content)
        start = time.process_time()
        try:
            load("flux", path)
        except InputError as error:
            refused += "x.gguf" in str(error)
        assert time.process_time() - start < 5
    assert refused > 25


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
def test_loading_holds_the_weights_in_memory_once(tmp_path):
    params = FluxParams(64, 64, 768, 4096, 1024, 4096, 8, 1, 4)
    with torch.device("meta"):
        state = Flux(params).state_dict()
    blocks = {}  # of zeros, in Q8_0 where they can be
    for key, tensor in state.items():
        blocks[key] = np.zeros(tuple(tensor.shape), np.float32), Type.F32
        if tensor.ndim == 2:
            rows, columns = tensor.shape
            blocks[key] = np.zeros((rows, columns // 32 * 34), np.uint8), Type.Q8_0
    path = save(tmp_path / "flux.gguf", blocks)
    small = save(tmp_path / "small.gguf", quantized(tiny.flux_state(), Type.Q8_0))
    peak, imported = tiny.peak_memory(small, path)
    assert peak < 1.2 * 2 * sum(tensor.numel() for tensor in state.values())
    assert "gguf" in imported
