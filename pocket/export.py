"""The last step of the pocket checkpoint: from training states to files in the official layout, in bfloat16.

python -m pocket.export --folder pocket/run --output pocket/checkpoint
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from formats.key_names import ae_name_in_diffusers
from pocket.latents import CANVASES
from pocket.scenes import BACKGROUNDS, COLORS, PATTERNS, SHAPES
from pocket.train import Pocket
from pocket.train_autoencoder import PARAMS


def bfloat16(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in module.state_dict().items()}


def write(folder: Path, tensors: dict[str, Tensor], config: dict, name: str = "model") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / f"{name}.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def diffusers_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The autoencoder under the names that its Hugging Face folder has, attention as matrices."""
    renamed = {ae_name_in_diffusers(name, len(PARAMS.ch_mult)): tensor for name, tensor in tensors.items()}
    return {key: t[:, :, 0, 0].contiguous() if ".to_" in key and t.ndim == 4 else t for key, t in renamed.items()}


def known() -> dict:
    """What the model is trained on, as formats/known.py reads it."""
    sides = [side for size in CANVASES for side in size]
    pixels = [width * height for width, height in CANVASES]
    words = {"patterns": PATTERNS, "colors": COLORS, "shapes": SHAPES, "backgrounds": BACKGROUNDS}
    words["others"] = ["a", "and", "on", "background", "photo"]
    return {
        "sides": [min(sides), max(sides)], "pixels": [min(pixels), max(pixels)],
        "sizes": f"{min(sides)} to {max(sides)} pixels a side",
        "words": {kind: list(names) for kind, names in words.items()},
        "example": "a striped red circle, a dotted blue star on a white background",
    }  # fmt: skip


def export(run: Path, output: Path) -> None:
    model = Pocket(run)
    model.load_state_dict(torch.load(run / "flux.pt", weights_only=True)["average"])
    flux, t5, clip = model.flux.params, model.t5.params, model.clip.params
    output.mkdir(parents=True, exist_ok=True)
    metadata = {"theta": str(flux.theta), "sample_size": "256", "max_sequence_length": "64", "format": "pt"}
    save_file(bfloat16(model.flux), output / "flux1-pocket.safetensors", metadata=metadata)
    (output / "config.json").write_text(json.dumps({"known": known()}, indent=2) + "\n")
    write(output / "text_encoder_2", bfloat16(model.t5), {
        "architectures": ["T5EncoderModel"], "model_type": "t5", "feed_forward_proj": "gated-gelu",
        "vocab_size": t5.vocab_size, "d_model": t5.d_model, "d_ff": t5.d_ff, "d_kv": t5.d_kv,
        "num_heads": t5.num_heads, "num_layers": t5.num_layers,
    })  # fmt: skip
    write(output / "text_encoder", bfloat16(model.clip), {
        "architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "hidden_act": "quick_gelu",
        "vocab_size": clip.vocab_size, "hidden_size": clip.hidden_size, "intermediate_size": clip.intermediate_size,
        "num_attention_heads": clip.num_heads, "num_hidden_layers": clip.num_layers,
    })  # fmt: skip
    autoencoder = torch.load(run / "autoencoder.pt", weights_only=True)["average"]
    tensors = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in autoencoder.items()}
    write(output / "vae", diffusers_names(tensors), {
        "_class_name": "AutoencoderKL", "latent_channels": PARAMS.z_channels, "layers_per_block": PARAMS.num_res_blocks,
        "block_out_channels": [PARAMS.ch * m for m in PARAMS.ch_mult], "norm_num_groups": PARAMS.norm_groups,
        **json.loads((run / "factors.json").read_text()),
    }, name="diffusion_pytorch_model")  # fmt: skip
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(run / name, output / name, dirs_exist_ok=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("pocket/run"))
    parser.add_argument("--output", type=Path, default=Path("pocket/checkpoint"))
    args = parser.parse_args()
    export(args.folder, args.output)
