"""Small adapters for the pocket model, trained with its weights frozen: two LoRAs, each a look, and a ControlNet.

    python -m pocket.adapters lora --look barred --minutes 10
    python -m pocket.adapters lora --look studded --minutes 10
    python -m pocket.adapters controlnet --minutes 20

A look is something that the pocket model has never seen and no caption mentions: the LoRA alone makes it. `barred`
objects have white bars across them, `studded` ones white studs. In half of the training only some objects have the
look, and the LoRA acts only on the tokens around those: that keeps it where it is put. A LoRA that is there already is
trained further.
The ControlNet is shown white edges on black, and the model learns to put its objects there.
"""

import argparse
import json
import math
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import weights
from extensions.controlnet import ControlNet, ControlNetParams, residual_after
from formats import components
from formats import key_names as namings
from model.attention import Block, rope_axes
from model.tokenizers import CLIPTokenizer, T5Tokenizer
from model.transformer import Flux
from pocket.latents import CANVASES, chunks
from pocket.scenes import (
    BACKGROUNDS,
    FINE,
    LOOKS,
    SHAPES,
    Scene,
    Thing,
    outline_mask,
    paint,
    place,
    random_looks,
    split,
    tiled,
)  # fmt: skip
from pocket.train import CLIP_LENGTH, sample_times, small_attention, text_prompt, trim, wider_caption
from pocket.train_autoencoder import to_tensor
from sampler.flow import image_ids, pack, text_ids

EDGE = 3  # pixels of a control edge
RANK, ALPHA = 16, 8
ADAPTED = re.compile(r"(double_blocks\.\d+\.img_(attn\.qkv|attn\.proj|mlp\.[02])|single_blocks\.\d+\.linear[12])")
TOKENS, TEXT = 1536, 32  # tokens in a step, text tokens of each prompt
POOL = 24  # a pool of scenes is this many times smaller than those that the model was trained on


# ------------------------------------------------------------------------------------------------ drawing


def stroke(thing: Thing, width: int, size: tuple[int, int]) -> np.ndarray:
    """Coverage of each pixel by a line along the border of an object, (height, width, 1) in [0, 1]."""
    points = [tuple(p) for p in (SHAPES[thing.shape] * np.array(thing.radius) + np.array(thing.center)) * FINE]
    fine = Image.new("L", (size[0] * FINE, size[1] * FINE))
    ImageDraw.Draw(fine).line([*points, *points[:2]], fill=255, width=width * FINE, joint="curve")
    return np.asarray(fine.reduce(FINE), dtype=np.float32)[..., None] / 255


def draw_looks(scene: Scene, looks: Iterable[str | None]) -> np.ndarray:
    """As scenes.draw, (height, width, 3) uint8, every object with its look or with None."""
    size, background = (scene.width, scene.height), np.array(BACKGROUNDS[scene.background], dtype=np.float32)
    picture = np.broadcast_to(background, (scene.height, scene.width, 3)).copy()
    for thing, look in zip(scene.things, looks):
        alpha = outline_mask(thing.shape, thing.center, thing.radius, size)
        colors = paint(thing.color, thing.pattern, size)
        if look:
            colors += tiled(LOOKS[look], size) * (np.array(BACKGROUNDS["white"]) - colors)
        picture += alpha[..., None] * (colors - picture)
    return picture.round().astype(np.uint8)


def draw_edges(scene: Scene) -> np.ndarray:
    """The control image: the borders of all objects in white on black, (height, width, 3) uint8."""
    size, picture = (scene.width, scene.height), np.zeros((scene.height, scene.width, 1), dtype=np.float32)
    for thing in scene.things:
        picture = np.maximum(picture * (1 - outline_mask(thing.shape, thing.center, thing.radius, size)[..., None]), 0)
        picture = np.maximum(picture, stroke(thing, EDGE, size))
    return (255 * picture).round().astype(np.uint8).repeat(3, axis=2)


# ------------------------------------------------------------------------------------------------ scenes, encoded once


class Pool(NamedTuple):
    """Scenes of one size; image tokens (N, L, 64); which tokens the adapter acts on (N, L, 1), or, for a ControlNet,
    the tokens of its control images (N, L, 64)."""

    width: int
    height: int
    weight: float
    scenes: list[Scene]
    img: Tensor
    extra: Tensor


def scene_with_boxes(rng: np.random.Generator, width: int, height: int, count: int) -> tuple[Scene, list]:
    boxes = split(rng, width, height, count)
    things = tuple(place(rng, random_looks(rng), box) for box in boxes)
    return Scene(width, height, str(rng.choice(list(BACKGROUNDS))), things), boxes


@torch.no_grad()
def make_pools(model: "Model", seed: int, picture: Callable, progress=print) -> list[Pool]:
    """`picture(rng, scene, boxes)` -> the picture and an array of what else the pool holds of it."""
    pools = []
    for (width, height), (count, weight, shares) in CANVASES.items():
        rng, shares = np.random.default_rng([seed, width, height]), np.array(shares[1:])  # there is always an object
        counts = 1 + rng.choice(len(shares), max(64, count // POOL), p=shares / shares.sum())
        made = [scene_with_boxes(rng, width, height, int(n)) for n in counts]
        pictures, extras = zip(*(picture(rng, *each) for each in made))
        img = pack(model.encode(pictures))
        extra = torch.from_numpy(np.stack(extras))
        extra = pack(model.encode(extras)) if extra.ndim == 4 else extra.float()
        pools.append(Pool(width, height, weight, [scene for scene, _ in made], img, extra))
        progress(f"{width} x {height}: {len(made)} scenes", flush=True)
    return pools


def with_look(look: str) -> Callable:
    """Half of the scenes have the look everywhere, half (of those with several objects) in some boxes."""

    def picture(rng: np.random.Generator, scene: Scene, boxes: list) -> tuple[np.ndarray, np.ndarray]:
        chosen = rng.random(len(boxes)) < (1 if rng.random() < 0.5 else 0.5)
        acts = np.full((scene.height // 16, scene.width // 16), chosen.all())
        for (x0, y0, x1, y1), here in zip(boxes, chosen):
            acts[y0 // 16 : y1 // 16, x0 // 16 : x1 // 16] = here
        return draw_looks(scene, [look if here else None for here in chosen]), acts.reshape(-1, 1)

    return picture


def with_edges(rng: np.random.Generator, scene: Scene, boxes: list) -> tuple[np.ndarray, np.ndarray]:
    return draw_looks(scene, [None] * len(boxes)), draw_edges(scene)


# ------------------------------------------------------------------------------------------------ training


class Batch(NamedTuple):
    """Noisy tokens and what the velocity should be, and all that the transformer is given besides."""

    noisy: Tensor
    target: Tensor
    t: Tensor
    img_ids: Tensor
    txt: Tensor
    y: Tensor
    extra: Tensor


class Model:
    """The pocket model, frozen."""

    def __init__(self):
        found, cpu = weights.find("pocket"), torch.device("cpu")
        self.flux: Flux = components.load(found.flux, cpu, torch.float32)
        self.t5, self.clip = (
            components.load(found.t5, cpu, torch.float32),
            components.load(found.clip, cpu, torch.float32),
        )
        self.autoencoder = components.load(found.ae, cpu, torch.float32)
        self.t5_tokenizer, self.clip_tokenizer = T5Tokenizer(found.t5_tokenizer), CLIPTokenizer(found.clip_tokenizer)

    def encode(self, pictures: Iterable[np.ndarray]) -> Tensor:
        return torch.cat([self.autoencoder.encode(to_tensor(part)) for part in chunks(list(pictures), 16)])

    @torch.no_grad()
    def batch(self, rng: np.random.Generator, pools: list[Pool]) -> Batch:
        shares = np.array([pool.weight for pool in pools])
        pool = pools[rng.choice(len(pools), p=shares / shares.sum())]
        rows = rng.integers(0, len(pool.scenes), max(2, TOKENS // (pool.img.shape[1] + TEXT)))
        scenes, img = [pool.scenes[i] for i in rows], pool.img[rows]
        length = TEXT if max(len(scene.things) for scene in scenes) <= 2 else 2 * TEXT
        txt = self.t5(self.t5_tokenizer([text_prompt(rng, scene) for scene in scenes], length)[0])
        y = self.clip(trim(self.clip_tokenizer([wider_caption(rng, scene) for scene in scenes], CLIP_LENGTH)[0]))
        t, eps = sample_times(len(img)), torch.randn_like(img)
        noisy = torch.lerp(img, eps, t[:, None, None])
        return Batch(noisy, eps - img, t, image_ids(pool.width, pool.height), txt, y, pool.extra[rows])

    def velocity(self, b: Batch, guidance: Tensor, **hooks) -> Tensor:
        ids = text_ids(b.txt.shape[1])
        modulation = self.flux.modulation(b.t, b.y, guidance)
        return self.flux(b.noisy, b.img_ids, b.txt, ids, modulation, attention=small_attention, **hooks)


def any_guidance(b: Batch) -> Tensor:
    """An adapter is to do the same at every guidance, (B,)."""
    return 1 + 4 * torch.rand(len(b.t))


def train(parameters: list[nn.Parameter], loss_of: Callable[[], Tensor], minutes: float, lr: float) -> None:
    """AdamW for this long; the learning rate falls over the last half."""
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0, betas=(0.9, 0.98))
    start, losses = time.monotonic(), []
    while (progress := (time.monotonic() - start) / (60 * minutes)) < 1:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        scale = min(1, (len(losses) + 1) / 30) * (1 if progress < 0.5 else math.cos((progress - 0.5) * math.pi))
        optimizer.param_groups[0]["lr"] = lr * scale
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if len(losses) % 50 == 0:
            seconds = (time.monotonic() - start) / len(losses)
            print(f"step {len(losses)} loss {np.mean(losses[-50:]):.4f} {seconds:.2f} s/step", flush=True)


class LoRA(nn.Module):
    """Low-rank additions to the linear layers of a frozen transformer's blocks; they act on the tokens of `acts`."""

    def __init__(self, flux: Flux):
        super().__init__()
        self.acts: dict[str, Tensor] = {}  # by stream, txt, img or both, (B, L, 1)
        self.down, self.up = nn.ParameterDict(), nn.ParameterDict()
        for name, linear in flux.named_modules():
            if ADAPTED.fullmatch(name):
                key = name.replace(".", "_")
                self.down[key] = nn.Parameter(torch.randn(RANK, linear.in_features) * linear.in_features**-0.5)
                self.up[key] = nn.Parameter(torch.zeros(linear.out_features, RANK))
                stream = "both" if "single" in name else "txt" if "txt" in name else "img"
                linear.register_forward_hook(self.adds(key, stream), with_kwargs=True)

    def adds(self, key: str, stream: str) -> Callable:
        def hook(linear: nn.Module, inputs: tuple[Tensor], more: dict[str, slice], out: Tensor) -> Tensor:
            up = self.up[key][more.get("rows", slice(None))]  # linear1 computes its outputs in two parts
            acts = self.acts[stream][:, -out.shape[1] :]  # the last block goes on with the image tokens alone
            return out + acts * (ALPHA / RANK) * (inputs[0] @ self.down[key].T @ up.T)

        return hook

    def go_on_from(self, file: Path) -> None:
        tensors = load_file(file)
        for key in self.down:
            self.down[key].data.copy_(tensors[f"lora_unet_{key}.lora_down.weight"])
            self.up[key].data.copy_(tensors[f"lora_unet_{key}.lora_up.weight"])

    def act_on(self, txt: Tensor, img: Tensor) -> None:
        self.acts = {"txt": txt, "img": img, "both": torch.cat([txt, img], dim=1)}

    def save(self, file: Path, look: str, note: str) -> None:
        tensors = {}
        for key in self.down:
            tensors[f"lora_unet_{key}.lora_down.weight"] = self.down[key].detach().bfloat16()
            tensors[f"lora_unet_{key}.lora_up.weight"] = self.up[key].detach().bfloat16()
            tensors[f"lora_unet_{key}.alpha"] = torch.tensor(float(ALPHA)).bfloat16()
        about = {"ss_base_model_version": "flux1", "ss_network_module": "networks.lora_flux", "note": note}
        about |= {"ss_network_dim": str(RANK), "ss_network_alpha": str(ALPHA), "ss_output_name": look}
        save_file(tensors, file, about)


def train_lora(look: str, minutes: float, out: Path) -> None:
    """Goes on from the file where there is one, with other scenes."""
    seed = 10 * out.exists() + list(LOOKS).index(look)
    model, rng = Model(), np.random.default_rng(seed)
    pools = make_pools(model, seed, with_look(look))
    lora = LoRA(model.flux)
    if out.exists():
        lora.go_on_from(out)

    def loss() -> Tensor:
        b = model.batch(rng, pools)
        # as in the regional steps, where the region's text is adapted too, or as in the plain ones, where it is not
        text = b.extra.all(dim=1, keepdim=True) * (torch.rand(len(b.t), 1, 1) < 0.5)
        lora.act_on(text.float().expand(-1, b.txt.shape[1], -1), b.extra)
        return (model.velocity(b, any_guidance(b)).float() - b.target).square().mean()

    train(list(lora.parameters()), loss, minutes, lr=4e-3)
    lora.save(out, look, f"for the pocket model: {look} objects, whatever the prompt; pocket/adapters.py")


def new_controlnet(flux: Flux) -> ControlNet:
    """The embedders and the first block of the pocket model, its MLPs halved: those of their units that weigh most."""
    params = asdict(flux.params)
    del params["out_channels"]
    params |= {"depth": 1, "depth_single_blocks": 0, "mlp_hidden": flux.params.mlp_hidden // 2}
    net = ControlNet(ControlNetParams(**params))
    state = {name: tensor for name, tensor in flux.state_dict().items() if name in net.state_dict()}
    for mlp in ("double_blocks.0.img_mlp", "double_blocks.0.txt_mlp"):
        first, second = state[f"{mlp}.0.weight"], state[f"{mlp}.2.weight"]
        units = (first.norm(dim=1) * second.norm(dim=0)).topk(params["mlp_hidden"]).indices.sort().values
        state |= {f"{mlp}.0.weight": first[units], f"{mlp}.2.weight": second[:, units]}
        state[f"{mlp}.0.bias"] = state[f"{mlp}.0.bias"][units]
    net.load_state_dict(state, strict=False)
    for linear in net.controlnet_x_embedder, net.controlnet_blocks[0]:  # at first it changes nothing
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
    return net


def train_controlnet(minutes: float, out: Path) -> None:
    model, rng = Model(), np.random.default_rng(2)
    pools = make_pools(model, len(LOOKS), with_edges)
    net, depth = new_controlnet(model.flux), model.flux.params.depth

    def loss() -> Tensor:
        b = model.batch(rng, pools)
        guidance = any_guidance(b)
        ids = text_ids(b.txt.shape[1])
        modulation = net.modulation(b.t, b.y, guidance)
        residuals = net(b.noisy, b.img_ids, b.txt, ids, modulation, b.extra)

        def add(x: Tensor, block: Block) -> Tensor:
            own = residuals[block.kind]
            return x + residual_after(block, own, depth, in_turn=False) if own else x

        return (model.velocity(b, guidance, after_block=add).float() - b.target).square().mean()

    train(list(net.parameters()), loss, minutes, lr=1e-3)
    save_controlnet(net, out)


def save_controlnet(net: ControlNet, out: Path) -> None:
    """In the names and the folder that diffusers has for InstantX's."""
    tensors, params = {}, net.params
    for name, tensor in net.state_dict().items():
        keys = [row.key for row in namings.controlnet_from_diffusers(name, {})]
        tensors |= {key: piece.bfloat16().contiguous() for key, piece in zip(keys, tensor.chunk(len(keys)))}
    out.mkdir(exist_ok=True)
    metadata = {"theta": str(params.theta), "note": "for the pocket model: edges of objects; pocket/adapters.py"}
    save_file(tensors, out / "diffusion_pytorch_model.safetensors", metadata)
    config = {
        "_class_name": "FluxControlNetModel", "in_channels": params.in_channels, "num_layers": params.depth,
        "num_single_layers": params.depth_single_blocks, "num_attention_heads": params.num_heads,
        "attention_head_dim": params.hidden_size // params.num_heads, "joint_attention_dim": params.context_in_dim,
        "pooled_projection_dim": params.vec_in_dim, "guidance_embeds": params.guidance_embed, "num_mode": None,
        "axes_dims_rope": rope_axes(params.hidden_size // params.num_heads),
    }  # fmt: skip
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    lora = commands.add_parser("lora")
    lora.add_argument("--look", choices=LOOKS, required=True)
    controlnet = commands.add_parser("controlnet")
    for command, minutes in (lora, 10), (controlnet, 20):
        command.add_argument("--minutes", type=float, default=minutes)
        command.add_argument("--folder", type=Path, default=Path("pocket/adapters"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(time.time_ns())
    args.folder.mkdir(exist_ok=True)
    if args.command == "lora":
        train_lora(args.look, args.minutes, args.folder / f"{args.look}.safetensors")
    else:
        train_controlnet(args.minutes, args.folder / "edges")


if __name__ == "__main__":
    main()
