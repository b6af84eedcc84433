"""A model with all its parts, small and random, written in the layouts that checkpoints come in."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from extensions.attention_maps import AttentionMaps
from model.autoencoder import AutoEncoder, AutoEncoderParams
from model.clip import CLIPParams, CLIPTextEncoder
from model.t5 import T5Encoder, T5Params
from model.transformer import Flux, FluxParams

State = dict[str, Tensor]
ROOT = Path(__file__).parent.parent

FLUX = FluxParams(
    vec_in_dim=48, context_in_dim=32, hidden_size=64, mlp_hidden=192, num_heads=2, depth=2, depth_single_blocks=3
)
T5 = T5Params(vocab_size=96, d_model=32, d_ff=80, d_kv=8, num_heads=3, num_layers=2)
CLIP = CLIPParams(vocab_size=90, hidden_size=48, intermediate_size=96, num_heads=3, num_layers=2)
AE = AutoEncoderParams(ch=8, ch_mult=(1, 2, 3), num_res_blocks=1, norm_groups=4, scale_factor=0.5, shift_factor=0.25)

AE_CONFIG = {"norm_num_groups": 4, "scaling_factor": 0.5, "shift_factor": 0.25}


def state(module: nn.Module, dtype: torch.dtype = torch.float32) -> State:
    """Random numbers for each of a module's tensors; always the same."""
    generator = torch.Generator().manual_seed(0)
    return {key: torch.randn(t.shape, generator=generator).to(dtype) for key, t in module.state_dict().items()}


def velocity(
    flux: Flux, img: Tensor, img_ids: Tensor, txt: Tensor, txt_ids: Tensor, timesteps: Tensor, y: Tensor,
    guidance: Tensor | None = None, **more,
) -> Tensor:  # fmt: skip
    """A transformer's velocity with the modulation of these timesteps; `more` as in Flux.forward."""
    modulation = flux.modulation(timesteps, y, guidance)
    return flux(img, img_ids, txt, txt_ids, modulation, **more)


def flux_state() -> State:
    return state(Flux(FLUX))


def t5_state() -> State:
    return state(T5Encoder(T5))


def clip_state() -> State:
    return state(CLIPTextEncoder(CLIP))


def ae_state() -> State:
    return state(AutoEncoder(AE))


def save(path: Path, tensors: State, metadata: dict[str, str] | None = None, config: dict | None = None) -> Path:
    """One safetensors file, in a folder that is made for it, with a config.json beside it where one is given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata)
    if config is not None:
        (path.parent / "config.json").write_text(json.dumps(config))
    return path


def save_shards(folder: Path, tensors: State, shards: int = 3) -> Path:
    """A folder of shards and their index; neighbouring keys lie in different shards."""
    names = [f"diffusion_pytorch_model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    index = {key: names[i % shards] for i, key in enumerate(tensors)}
    for name in names:
        save(folder / name, {key: tensors[key] for key in tensors if index[key] == name})
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


def save_model(folder: Path) -> Path:
    """A model folder with the official single files, its text encoders and its tokenizers."""
    save(folder / "flux1-dev.safetensors", flux_state())
    save(folder / "ae.safetensors", ae_state(), config=AE_CONFIG)
    save_encoders(folder)
    return folder


def save_diffusers_model(folder: Path) -> Path:
    """The same model as a diffusers folder, its transformer in shards."""
    save_shards(folder / "transformer", flux_to_diffusers(flux_state()))
    save(folder / "vae" / "diffusion_pytorch_model.safetensors", ae_to_diffusers(ae_state()), config=AE_CONFIG)
    save_encoders(folder)
    return folder


def save_encoders(folder: Path) -> None:
    save(folder / "text_encoder" / "model.safetensors", clip_state(), config={"num_attention_heads": CLIP.num_heads})
    save(folder / "text_encoder_2" / "model.safetensors", t5_state())
    for name, files in {"tokenizer": ["vocab.json", "merges.txt"], "tokenizer_2": ["tokenizer.json"]}.items():
        (folder / name).mkdir()
        for file in files:
            (folder / name / file).write_text("{}")


def flux_to_diffusers(state: State) -> State:
    """A transformer's tensors under diffusers' names: the way opposite to the program's, and written apart from it."""
    theirs: State = {}
    for key, tensor in state.items():
        stem, suffix = key.rsplit(".", 1)
        suffix = "weight" if suffix == "scale" else suffix
        if stem.endswith("qkv"):
            names = ["add_q_proj", "add_k_proj", "add_v_proj"] if "txt" in stem else ["to_q", "to_k", "to_v"]
            block = "transformer_blocks." + stem.split(".")[1]
            theirs |= {f"{block}.attn.{n}.{suffix}": t for n, t in zip(names, tensor.chunk(3))}
        elif stem.endswith("linear1"):
            parts = zip(["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"], tensor.split([64, 64, 64, 192]))
            theirs |= {f"single_transformer_blocks.{stem.split('.')[1]}.{n}.{suffix}": t for n, t in parts}
        elif stem == "final_layer.adaLN_modulation.1":
            shift, scale = tensor.chunk(2)
            theirs[f"norm_out.linear.{suffix}"] = torch.cat([scale, shift])
        else:
            theirs[f"{flux_name(stem)}.{suffix}"] = tensor
    return theirs


def flux_name(stem: str) -> str:
    """diffusers' name of a transformer's module that is neither joined nor reordered."""
    for ours, their in [
        ("double_blocks.", "transformer_blocks."),
        ("single_blocks.", "single_transformer_blocks."),
        ("img_mod.lin", "norm1.linear"),
        ("txt_mod.lin", "norm1_context.linear"),
        ("modulation.lin", "norm.linear"),
        ("img_attn.norm.query_norm", "attn.norm_q"),
        ("img_attn.norm.key_norm", "attn.norm_k"),
        ("txt_attn.norm.query_norm", "attn.norm_added_q"),
        ("txt_attn.norm.key_norm", "attn.norm_added_k"),
        (".norm.query_norm", ".attn.norm_q"),
        (".norm.key_norm", ".attn.norm_k"),
        ("img_attn.proj", "attn.to_out.0"),
        ("txt_attn.proj", "attn.to_add_out"),
        ("img_mlp.0", "ff.net.0.proj"),
        ("img_mlp.2", "ff.net.2"),
        ("txt_mlp.0", "ff_context.net.0.proj"),
        ("txt_mlp.2", "ff_context.net.2"),
        ("linear2", "proj_out"),
        ("final_layer.linear", "proj_out"),
        ("img_in", "x_embedder"),
        ("txt_in", "context_embedder"),
        ("time_in.", "time_text_embed.timestep_embedder."),
        ("vector_in.", "time_text_embed.text_embedder."),
        ("guidance_in.", "time_text_embed.guidance_embedder."),
        ("in_layer", "linear_1"),
        ("out_layer", "linear_2"),
    ]:
        stem = stem.replace(ours, their)
    return stem


def ae_to_diffusers(state: State, old: bool = False) -> State:
    """An autoencoder's tensors under diffusers' names, today's or the `old` ones of its attention."""
    attention = {"q": "query", "k": "key", "v": "value", "proj_out": "proj_attn"} if old else {}
    theirs: State = {}
    for key, tensor in state.items():
        words = key.split(".")
        if words[1] == "mid" and words[2] == "attn_1":
            name = {"norm": "group_norm", "proj_out": "to_out.0"}.get(words[3], f"to_{words[3]}")
            words[1:4] = ["mid_block", "attentions.0", attention.get(words[3], name)]
            tensor = tensor.flatten(1) if tensor.ndim == 4 else tensor
        elif words[1] == "mid":
            words[1:3] = ["mid_block", "resnets", str(int(words[2][-1]) - 1)]
        elif words[1] in ("down", "up"):
            level = int(words[2]) if words[1] == "down" else 2 - int(words[2])  # AE has three levels
            inner = ["resnets", words[4]] if words[3] == "block" else [f"{words[1]}samplers", "0", words[4]]
            words[1:5] = [f"{words[1]}_blocks", str(level), *inner]
        name = ".".join(words).replace("nin_shortcut", "conv_shortcut").replace("r.norm_out", "r.conv_norm_out")
        theirs[name] = tensor
    return theirs


def clip_to_openai(state: State) -> State:
    """A text encoder's tensors under OpenAI's names, q, k and v joined."""
    theirs: State = {}
    for key, tensor in state.items():
        words = key.split(".")
        if words[1] == "embeddings":
            theirs["token_embedding.weight" if words[2] == "token_embedding" else "positional_embedding"] = tensor
        elif words[1] == "final_layer_norm":
            theirs[f"ln_final.{words[2]}"] = tensor
        elif words[5] == "q_proj":
            joined = [state[key.replace("q_proj", name)] for name in ("q_proj", "k_proj", "v_proj")]
            theirs[f"transformer.resblocks.{words[3]}.attn.in_proj_{words[6]}"] = torch.cat(joined)
        elif words[5] not in ("k_proj", "v_proj"):
            inner = ".".join(words[4:]).replace("self_attn", "attn").replace("layer_norm", "ln_")
            inner = inner.replace("fc1", "c_fc").replace("fc2", "c_proj")
            theirs[f"transformer.resblocks.{words[3]}.{inner}"] = tensor
    return theirs


class Recorder(TorchDispatchMode):
    """Records the operations within and the tensors that they give; bytes: of all memory that they take."""

    def __init__(self):
        super().__init__()
        self.operations, self.tensors, self.bytes = [], [], 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        self.operations.append(operation)
        inputs = [x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)]
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor):
                self.tensors.append(tensor)  # kept, so that no later one gets its address
                if tensor.untyped_storage().data_ptr() not in inputs:
                    self.bytes += tensor.untyped_storage().nbytes()
        return out


def maps_of(pipeline: Any) -> AttentionMaps:
    return AttentionMaps(pipeline.defaults.depth, pipeline.defaults.depth_single_blocks)


PEAK = """
import sys, torch, generate, weights
from formats import components
from pathlib import Path

def status(name):
    return int(next(line for line in Path("/proc/self/status").read_text().splitlines() if name in line).split()[1])

small, source = (weights.pick("flux", "--flux", Path(name)) for name in sys.argv[1:])
components.load(small, "cpu", torch.bfloat16)  # what is needed once; too small to leave room for the other
before = status("VmRSS")
model = components.load(source, "cpu", torch.bfloat16)
for tensor in model.parameters():
    tensor.flatten().view(torch.uint8)[::4096].sum()
print(1024 * (status("VmHWM") - before), *sys.modules)
"""


def peak_memory(small: Path, file: Path) -> tuple[int, list[str]]:
    """Bytes at the peak of loading a transformer's file in bfloat16, in a process that has loaded a
    small one; and the modules that it has imported."""
    command = [sys.executable, "-c", PEAK, small, file]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    peak, *imported = done.stdout.split()
    return int(peak), imported
