"""FLUX.1 Redux for the pocket model: a small SigLIP and a projector, trained with the model frozen.

    python -m pocket.redux --minutes 3 5

An image of one object gives 16 tokens, which follow those of a prompt. First they are to be what the frozen T5 makes of
the object's caption, "a striped red star", in 16 tokens. Then the frozen transformer, given these tokens after a prompt
that does not say what the object is, is to answer what it answers to a caption that does. `--minutes` of the
processor's time are for the first and for the second. The image gives the object alone: its background is any, and the
prompt says which one is drawn.
"""

import argparse
import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from extensions.redux import Projector, ProjectorParams
from extensions.siglip import Siglip, SiglipParams
from pocket.adapters import Model
from pocket.scenes import (
    BACKGROUNDS,
    COLORS,
    PATTERNS,
    PERIOD,
    SHAPES,
    Scene,
    Thing,
    draw,
    part_of,
    place,
    random_looks,
    split,
)
from pocket.train import CLIP_LENGTH, GRID, sample_times, small_attention, trim, wider_caption
from pocket.train_autoencoder import to_tensor
from sampler.flow import image_ids, pack, text_ids

SIGLIP = SiglipParams(hidden_size=96, mlp_hidden=384, num_heads=4, num_layers=4, patch_size=16, image_size=64)
PROJECTOR = ProjectorParams(width=96, hidden_size=384, context_in_dim=128)
LOOKS = list(itertools.product(COLORS, PATTERNS, SHAPES))
# (width, height): the scenes that are encoded, and how many objects they have at most
CANVASES = {
    (64, 64): (160, 1), (96, 96): (160, 1), (128, 128): (240, 1), (128, 64): (160, 1), (64, 128): (160, 1),
    (192, 128): (160, 1), (128, 192): (160, 1), (192, 192): (120, 4), (256, 128): (80, 4), (256, 256): (80, 4),
}  # fmt: skip
VAGUE = ("an object", "a photo", "something")
TOKENS = 1024  # in a step, of scenes and their prompts


def reference(rng: np.random.Generator, looks: tuple[str, str, str], is_any: bool = False) -> np.ndarray:
    """A picture (H, W, 3) uint8 of one object of these looks, of any size and place, on any background: a square of 64
    or 128 pixels, so that in SigLIP's patches patterns repeat as they do in tokens; is_any: of any size, and patterns
    begin anywhere."""
    width = height = int(rng.choice([64, 128]))
    left = top = 0
    if is_any:
        width, height = (int(side) for side in rng.integers(5, 13, 2) * 16)
        left, top = (int(x) for x in rng.integers(0, PERIOD, 2))
    thing = place(rng, looks, part_of(rng, width, height, least=round(0.7 * width)))
    center = (thing.center[0] + left, thing.center[1] + top)
    thing = Thing(*looks, center=center, radius=thing.radius)
    scene = Scene(width + left, height + top, str(rng.choice(list(BACKGROUNDS))), (thing,))
    return draw(scene)[top:, left:]


class Adapter(nn.Module):
    def __init__(self):
        super().__init__()
        self.siglip = Siglip(SIGLIP)
        self.projector = Projector(PROJECTOR)
        nn.init.normal_(self.siglip.embeddings.position_embedding.weight, std=0.1)

    def forward(self, pictures: list[np.ndarray]) -> Tensor:
        """Pictures (H, W, 3) uint8 -> tokens (B, 16, 128)."""
        size = (SIGLIP.image_size, SIGLIP.image_size)
        small = [np.array(Image.fromarray(x).resize(size, Image.Resampling.BICUBIC)) for x in pictures]
        return self.projector(self.siglip(to_tensor(small)))


class Pictures:
    """References of all looks: each is kept, and one in seven that is asked for is new. Some are as the
    autoencoder gives them back."""

    def __init__(self, model: Model, rng: np.random.Generator):
        self.rng = rng
        self.known = {looks: [reference(rng, looks)] for looks in LOOKS}
        for known in self.known.values():
            with torch.no_grad():
                pixels = model.autoencoder.decode(model.encode(known)).clamp(-1, 1)
            known.append(((pixels[0].permute(1, 2, 0) + 1) * 127.5).round().byte().numpy())

    def of(self, looks: tuple[str, str, str]) -> np.ndarray:
        known = self.known[looks]
        if self.rng.random() < 0.3:
            known.append(reference(self.rng, looks, is_any=self.rng.random() < 0.2))
            return known[-1]
        return known[self.rng.integers(len(known))]


def train(adapter: Adapter, loss_of: Callable[[], tuple[Tensor, str]], minutes: float, lr: float) -> None:
    """Muon for the matrices and AdamW for the rest, for so many minutes of this thread's time; the learning rate falls
    over the last half. loss_of: a step's loss, and what is shown of it now and then."""
    layers = [*adapter.siglip.encoder.parameters(), *adapter.projector.parameters()]
    matrices = [x for x in layers if x.ndim == 2]
    rest = [x for x in adapter.parameters() if not any(x is y for y in matrices)]
    muon = torch.optim.Muon(matrices, lr=lr, weight_decay=0.0, ns_steps=4, adjust_lr_fn="match_rms_adamw")
    parts = [muon, torch.optim.AdamW(rest, lr=lr, weight_decay=0.0, betas=(0.9, 0.98))]
    start = time.thread_time()
    losses = []
    while (progress := (time.thread_time() - start) / (60 * minutes)) < 1:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss, shown = loss_of()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(adapter.parameters(), 1.0)
        scale = min(1, (len(losses) + 1) / 30) * (1 if progress < 0.5 else np.cos((progress - 0.5) * np.pi))
        for part in parts:
            part.param_groups[0]["lr"] = lr * scale
            part.step()
            part.zero_grad()
        losses.append(loss.item())
        if len(losses) % 50 == 0:
            seconds = (time.thread_time() - start) / len(losses)
            print(f"step {len(losses)} loss {np.mean(losses[-50:]):.4f}{shown} {seconds:.2f} s/step", flush=True)


def train_to_captions(adapter: Adapter, model: Model, pictures: Pictures, minutes: float) -> None:
    captions = [Thing(*looks).caption for looks in LOOKS]
    with torch.no_grad():
        wanted = model.t5(model.t5_tokenizer(captions, SIGLIP.tokens)[0])
    scale = wanted.std()

    def loss() -> tuple[Tensor, str]:
        rows = pictures.rng.integers(0, len(LOOKS), 48)
        found = adapter([pictures.of(LOOKS[i]) for i in rows]).float()
        nearest = torch.cdist(found.detach().flatten(1), wanted.flatten(1)).argmin(1)
        right = np.mean([[a == b for a, b in zip(LOOKS[i], LOOKS[j])] for i, j in zip(rows, nearest)], axis=0)
        shown = f", color {right[0]:.2f} pattern {right[1]:.2f} shape {right[2]:.2f},"
        return ((found - wanted[rows]) / scale).square().mean(), shown

    train(adapter, loss, minutes, lr=4e-3)


class Scenes:
    """Scenes with their latents (N, L, 64), by the size of their canvas."""

    def __init__(self, model: Model, rng: np.random.Generator):
        self.rng = rng
        self.pools = {}
        for (width, height), (count, most) in CANVASES.items():
            scenes = []
            for i in range(count):
                boxes = split(rng, width, height, 1 + i % most)
                if len(boxes) == 1 and rng.random() < 0.3:
                    boxes = [part_of(rng, width, height)]
                things = tuple(place(rng, random_looks(rng), box) for box in boxes)
                scenes.append(Scene(width, height, str(rng.choice(list(BACKGROUNDS))), things))
            with torch.no_grad():
                self.pools[width, height] = scenes, pack(model.encode([draw(scene) for scene in scenes]))

    def some(self) -> tuple[list[Scene], Tensor, Tensor]:
        """Scenes of one size and of as many objects, their latents, and positions at a random place."""
        width, height = list(self.pools)[self.rng.integers(len(self.pools))]
        scenes, latents = self.pools[width, height]
        most = CANVASES[width, height][1]
        count = int(self.rng.integers(1, most + 1))
        fitting = [i for i, scene in enumerate(scenes) if len(scene.things) == count]
        rows = self.rng.choice(fitting, max(2, TOKENS // (latents.shape[1] + 16 + 16 * count)))
        ids = image_ids(width, height)
        room = GRID - ids.amax(dim=1)[0, 1:].numpy()
        place_of = torch.tensor([0, *(int(self.rng.integers(0, most)) for most in room)])
        return [scenes[i] for i in rows], latents[rows], ids + place_of


def prompts(rng: np.random.Generator, scene: Scene) -> tuple[str, str]:
    """What the teacher reads, which says all, and the student, which sees the objects as images."""
    names = ", ".join(thing.caption for thing in scene.things)
    vague = str(rng.choice(VAGUE))
    if rng.random() < 0.25:
        return names, vague
    on = f"a {scene.background} background"
    return f"{names} on {on}", on if rng.random() < 0.2 else f"{vague} on {on}"


def train_by_the_transformer(
    adapter: Adapter, model: Model, pictures: Pictures, scenes: Scenes, minutes: float
) -> None:
    rng = pictures.rng

    def loss() -> tuple[Tensor, str]:
        some, img, ids = scenes.some()
        things = [thing for scene in some for thing in scene.things]
        own = adapter([pictures.of((x.color, x.pattern, x.shape)) for x in things])
        own = own.reshape(len(some), -1, own.shape[-1])
        length = int(rng.choice([16, 16, 64]))
        with torch.no_grad():
            full, vague = zip(*(prompts(rng, scene) for scene in some))
            said = model.t5(model.t5_tokenizer(full, max(length, 16 * len(some[0].things)))[0])
            txt = model.t5(model.t5_tokenizer(vague, length)[0])
            clip_ids = model.clip_tokenizer([wider_caption(rng, scene) for scene in some], CLIP_LENGTH)[0]
            y = model.clip(trim(clip_ids))
            t = sample_times(*img.shape[:2])
            noisy = torch.lerp(img, torch.randn_like(img), t[:, None, None])
            modulation = model.flux.modulation(t, y, 1 + 4 * torch.rand(len(t)))
            hook = {"attention": small_attention}
            wanted = model.flux(noisy, ids, said, text_ids(said.shape[1]), modulation, **hook)
        txt = torch.cat([txt, own], dim=1)
        found = model.flux(noisy, ids, txt, text_ids(txt.shape[1]), modulation, **hook)
        return (found.float() - wanted.float()).square().mean(), ""

    train(adapter, loss, minutes, lr=1e-3)


def save(adapter: Adapter, folder: Path) -> None:
    """In the folders and names of black-forest-labs/FLUX.1-Redux-dev, in bfloat16."""
    p = SIGLIP
    siglip = {
        "architectures": ["SiglipVisionModel"], "model_type": "siglip_vision_model", "hidden_size": p.hidden_size,
        "intermediate_size": p.mlp_hidden, "num_attention_heads": p.num_heads, "num_hidden_layers": p.num_layers,
        "image_size": p.image_size, "patch_size": p.patch_size, "hidden_act": "gelu_pytorch_tanh",
        "vision_use_head": False,
    }  # fmt: skip
    redux = {"redux_dim": PROJECTOR.width, "txt_in_features": PROJECTOR.context_in_dim}
    parts = {
        "image_encoder/model": ("vision_model.", adapter.siglip, siglip),
        "image_embedder/diffusion_pytorch_model": (
            "",
            adapter.projector,
            {"_class_name": "ReduxImageEncoder", **redux},
        ),
    }
    for name, (prefix, module, config) in parts.items():
        file = folder / f"{name}.safetensors"
        file.parent.mkdir(parents=True, exist_ok=True)
        tensors = {prefix + key: x.bfloat16().contiguous() for key, x in module.state_dict().items()}
        save_file(tensors, file, {"format": "pt", "note": "for the pocket model; pocket/redux.py"})
        (file.parent / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, nargs=2, default=(3, 5))
    parser.add_argument("--folder", type=Path, default=Path("pocket/adapters/redux"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    model = Model()
    pictures = Pictures(model, rng)
    adapter = Adapter()
    print(f"{sum(x.numel() for x in adapter.parameters()):,} parameters", flush=True)
    print("to what T5 makes of captions", flush=True)
    train_to_captions(adapter, model, pictures, args.minutes[0])
    save(adapter, args.folder)
    print("by the transformer's answers", flush=True)
    train_by_the_transformer(adapter, model, pictures, Scenes(model, rng), args.minutes[1])
    save(adapter, args.folder)


if __name__ == "__main__":
    main()
