"""Step 2 of the pocket checkpoint: the transformer and both text encoders, trained together on scenes. Resumable.

    python -m pocket.train --folder pocket/run --steps 30000 --distill 1200

First a rectified flow is learned (`--steps`), with the guidance input fixed at 1. Then the network learns to answer in
one pass what two passes of classifier-free guidance would (`--distill`), as FLUX.1-dev did.
"""

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from sentencepiece import SentencePieceProcessor
from torch import Tensor, nn

from model.attention import Block
from model.clip import CLIPParams, CLIPTextEncoder
from model.t5 import T5Encoder, T5Params
from model.tokenizers import CLIPTokenizer, T5Tokenizer
from model.transformer import Flux, FluxParams
from pocket.latents import Pool
from pocket.scenes import Scene, Thing, caption, random_looks
from sampler.flow import image_ids, pack, text_ids

CLIP_LENGTH = 77
TEXT_LENGTHS = (16, 32, 64)
TOKENS = 4096  # tokens in a step of one process, text and image; 8192 in a step of two
GRID = 32  # tokens along each side of the area in which a canvas is placed at random


class Pocket(nn.Module):
    """Everything that is trained together: `flux`, `t5` and `clip`."""

    def __init__(self, run: Path):
        super().__init__()
        t5_vocab = SentencePieceProcessor(model_file=str(run / "tokenizer_2" / "spiece.model")).vocab_size()
        clip_vocab = len(json.loads((run / "tokenizer" / "vocab.json").read_text()))
        self.t5 = T5Encoder(T5Params(t5_vocab, d_model=128, d_ff=256, d_kv=32, num_heads=4, num_layers=2))
        self.clip = CLIPTextEncoder(CLIPParams(clip_vocab, 64, 128, num_heads=2, num_layers=2))
        # theta 100: few tokens to a side need few wavelengths
        self.flux = Flux(FluxParams(64, 64, 64, 128, 160, 640, 5, depth=2, depth_single_blocks=5, theta=100))
        self.apply(init)
        for module in self.flux.modules():  # adaLN-zero: every block starts as the identity
            if hasattr(module, "lin"):
                nn.init.zeros_(module.lin.weight)
        nn.init.zeros_(self.flux.final_layer.adaLN_modulation[1].weight)
        nn.init.zeros_(self.flux.final_layer.linear.weight)

    def forward(self, img: Tensor, img_ids: Tensor, t: Tensor, guidance: Tensor, t5: Tensor, clip: Tensor) -> Tensor:
        txt = self.t5(t5)
        ids = text_ids(txt.shape[1])
        modulation = self.flux.modulation(t, self.clip(clip), guidance)
        return self.flux(img, img_ids, txt, ids, modulation, attention=small_attention)


def init(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=module.in_features**-0.5 * 0.7)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    if isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.5)


def small_attention(q: Tensor, k: Tensor, v: Tensor, block: Block) -> Tensor:
    """Written out: in bfloat16 on a CPU, both ways, 1.4 (L = 320) to 4.4 (L = 48) times as fast as the library's."""
    return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(dim=-1).type_as(v) @ v


def wider_caption(rng: np.random.Generator, scene: Scene) -> str:
    """What CLIP is shown: the caption of a larger picture that this scene may be a part of.

    In regional prompting every region is drawn under the base prompt's CLIP vector, so the vector must not decide what
    is drawn; it only sets the tone.
    """
    if rng.random() < 0.2:
        return ""
    others = tuple(Thing(*random_looks(rng)) for _ in range(rng.integers(0, 8)))
    own = scene.things if rng.random() < 0.8 else ()
    return caption(rng, Scene(scene.width, scene.height, scene.background, own + others))


def text_prompt(rng: np.random.Generator, scene: Scene) -> str:
    draw = rng.random()
    return "" if draw < 0.08 else "a photo" if draw < 0.1 else caption(rng, scene)


class Batches:
    """Random batches; all processes agree on the canvas, each draws its own scenes."""

    def __init__(self, run: Path, rank: int, seed: int):
        self.pools = Pool.load_all(run / "latents")
        self.t5 = T5Tokenizer(run / "tokenizer_2" / "spiece.model")
        self.clip = CLIPTokenizer(run / "tokenizer")
        self.shared, self.own = np.random.default_rng(seed), np.random.default_rng([seed, rank + 1])

    def next(self) -> tuple[Tensor, Tensor, list[str], list[str], int]:
        """Latent tokens (B, L, 64), their ids, prompts for T5 and for CLIP, and the text length."""
        weights = np.array([p.weight for p in self.pools])
        pool = self.pools[self.shared.choice(len(self.pools), p=weights / weights.sum())]
        least = 0 if pool.tokens <= 40 else 1
        length = int(self.shared.choice(TEXT_LENGTHS[least:]))
        rows = self.own.integers(0, len(pool.scenes), max(2, TOKENS // (pool.tokens + length)))
        scenes = [pool.scenes[i] for i in rows]
        prompts = [text_prompt(self.own, s) for s in scenes]
        img = pack(pool.latents[rows].float())
        wide = [wider_caption(self.own, s) for s in scenes]
        return img, self.placed(image_ids(pool.width, pool.height)), prompts, wide, length

    def placed(self, ids: Tensor) -> Tensor:
        """The positions (1, L, 3) moved to a random place: a region of an image lies anywhere, but its prompt always
        has position 0, so the model has to see its text at every distance from its image tokens."""
        room = GRID - 1 - ids.amax(dim=1)[0]
        row, column = (int(self.own.integers(0, limit + 1)) for limit in room[1:])
        return ids + torch.tensor([0, row, column])


def sample_times(count: int, tokens: int = 0) -> Tensor:
    """Noise levels in (0, 1), logit-normal. For canvases of 128 tokens and more 30 % are drawn from a wider
    distribution nearer to 1: there the layout of a large image is decided, in the first steps of sampling."""
    t = torch.sigmoid(torch.randn(count) + 0.3)
    if tokens < 128:
        return t
    return torch.where(torch.rand(count) < 0.3, torch.sigmoid(0.8 * torch.randn(count) + 1.5), t)


def flow_loss(model: Pocket, batches: Batches) -> Tensor:
    img, img_ids, prompts, wide, length = batches.next()
    t, eps = sample_times(*img.shape[:2]), torch.randn_like(img)
    noisy = torch.lerp(img, eps, t[:, None, None])
    ids, clip_ids = batches.t5(prompts, length)[0], batches.clip(wide, CLIP_LENGTH)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        velocity = model(noisy, img_ids, t, torch.ones(len(img)), ids, trim(clip_ids))
    return (velocity.float() - (eps - img)).square().mean()


def trim(clip_ids: Tensor) -> Tensor:
    """Drop the columns behind every end of text: CLIP is causal, they change nothing."""
    return clip_ids[:, : clip_ids.argmax(dim=1).max() + 1]


def distill_loss(model: Pocket, teacher: Pocket, batches: Batches) -> Tensor:
    """One pass with guidance g against the teacher's two passes."""
    img, img_ids, prompts, wide, length = batches.next()
    t, g = sample_times(*img.shape[:2]), 1 + 4 * torch.rand(len(img))
    noisy = torch.lerp(img, torch.randn_like(img), t[:, None, None])
    ids, empty = batches.t5(prompts, length)[0], batches.t5([""] * len(img), length)[0]
    clip_ids = trim(batches.clip(wide, CLIP_LENGTH)[0])
    one = torch.ones(len(img))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.no_grad():
            with_text = teacher(noisy, img_ids, t, one, ids, clip_ids).float()
            without = teacher(noisy, img_ids, t, one, empty, clip_ids).float()
        velocity = model(noisy, img_ids, t, g, ids, clip_ids)
    return (velocity.float() - torch.lerp(without, with_text, g[:, None, None])).square().mean()


class Optimizer:
    """Muon for the matrices of the transformer's blocks, AdamW for the rest; gradients averaged over the processes."""

    def __init__(self, model: Pocket):
        blocks = [*model.flux.double_blocks.parameters(), *model.flux.single_blocks.parameters()]
        matrices = {id(p) for p in blocks if p.ndim == 2}
        rest = [p for p in model.parameters() if id(p) not in matrices]
        self.parameters = list(model.parameters())
        self.parts = [
            torch.optim.Muon(
                [p for p in blocks if p.ndim == 2],
                lr=2e-3,
                weight_decay=0.0,
                ns_steps=4,
                adjust_lr_fn="match_rms_adamw",
            ),
            torch.optim.AdamW(rest, lr=1.5e-3, weight_decay=0.0, betas=(0.9, 0.98)),
        ]
        self.lrs = [2e-3, 1.5e-3]

    def step(self, scale: float) -> None:
        """Apply the gradients with the learning rates times `scale`."""
        if dist.is_initialized():
            flat = torch.cat([p.grad.flatten() for p in self.parameters])
            dist.all_reduce(flat)
            flat /= dist.get_world_size()
            for p, g in zip(self.parameters, flat.split([p.numel() for p in self.parameters])):
                p.grad = g.view_as(p)
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for part, lr in zip(self.parts, self.lrs):
            part.param_groups[0]["lr"] = lr * scale
            part.step()
            part.zero_grad()


def learning_rate(step: int, steps: int) -> float:
    """Warm up, hold, and fall to nothing over the last 40 %."""
    return min(1, (step + 1) / 200, max(0.01, (1 - step / steps) / 0.4))


class State:
    """All that training carries from step to step, kept in one file: the network, the average of its weights, the
    optimizer, and from the distillation on the teacher."""

    def __init__(self, run: Path):
        self.run, self.file = run, run / "flux.pt"
        self.model, self.average = Pocket(run), frozen(run)
        self.average.load_state_dict(self.model.state_dict())
        self.optimizer, self.teacher, self.step = Optimizer(self.model), None, 0
        self.averaged = 0  # steps in the average: with the distillation it begins anew
        if self.file.exists():
            self.resume(torch.load(self.file, weights_only=True))

    def resume(self, saved: dict) -> None:
        self.model.load_state_dict(saved["model"])
        self.average.load_state_dict(saved["average"])
        for part, state in zip(self.optimizer.parts, saved["optimizer"]):
            part.load_state_dict(state)
        self.step, self.averaged = saved["step"], saved.get("averaged", saved["step"])
        if saved["teacher"]:
            self.teacher = frozen(self.run)
            self.teacher.load_state_dict(saved["teacher"])

    def begin_distillation(self) -> None:
        """The averaged weights become the teacher, and the student goes on from them."""
        self.teacher = frozen(self.run)
        self.teacher.load_state_dict(self.average.state_dict())
        self.model.load_state_dict(self.average.state_dict())
        self.optimizer, self.averaged = Optimizer(self.model), 0

    def update(self, loss: Tensor, scale: float) -> None:
        loss.backward()
        self.optimizer.step(scale)
        self.step += 1
        self.averaged += 1
        weight = 1 - min(0.999, self.averaged / (self.averaged + 10))
        torch._foreach_lerp_(list(self.average.parameters()), [p.detach() for p in self.model.parameters()], weight)

    def save(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": [part.state_dict() for part in self.optimizer.parts],
            "teacher": self.teacher.state_dict() if self.teacher else {},
            "step": self.step,
            "averaged": self.averaged,
        }
        torch.save(state, self.file.with_suffix(".new"))
        self.file.with_suffix(".new").rename(self.file)


def frozen(run: Path) -> Pocket:
    return Pocket(run).requires_grad_(False)


def train(run: Path, steps: int, distill: int, rate: float) -> None:
    """Train for `steps` in all and distil for `distill` more, from wherever the state in `run` stands. rate: a factor
    of the learning rates of the first part."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        dist.init_process_group("gloo")
    torch.set_num_threads(1)
    torch.manual_seed(0)  # all processes start from the same weights
    state = State(run)
    batches = Batches(run, rank, seed=state.step)
    torch.manual_seed(state.step * world + rank + 1)
    start, losses, saved = time.monotonic(), [], time.monotonic()
    while state.step < steps + distill:
        if state.step < steps:
            loss = flow_loss(state.model, batches)
            scale = rate * learning_rate(state.step, steps)
        else:
            if state.teacher is None:
                state.begin_distillation()
            loss = distill_loss(state.model, state.teacher, batches)
            scale = 0.3 * learning_rate(state.step - steps, distill)
        state.update(loss, scale)
        losses.append(loss.item())
        if rank == 0 and state.step % 100 == 0:
            seconds = (time.monotonic() - start) / len(losses)
            print(f"step {state.step} loss {np.mean(losses[-100:]):.4f} {seconds:.3f} s/step", flush=True)
        if rank == 0 and (state.step in (steps, steps + distill) or time.monotonic() - saved > 300):
            state.save()
            saved = time.monotonic()


def train_together(run: Path, steps: int, distill: int, rate: float = 1, processes: int = 2) -> None:
    """`train` in so many processes of one thread, whose gradients are averaged."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29611", "WORLD_SIZE": str(processes)}
    torch.multiprocessing.spawn(start, (run, steps, distill, rate), nprocs=processes)


def start(rank: int, run: Path, steps: int, distill: int, rate: float) -> None:
    os.environ["RANK"] = str(rank)
    train(run, steps, distill, rate)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("pocket/run"))
    parser.add_argument("--steps", type=int, default=30000)
    parser.add_argument("--distill", type=int, default=1200)
    parser.add_argument("--rate", type=float, default=1, help="of the learning rates; 0.5 to go on from a checkpoint")
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    train_together(args.folder, args.steps, args.distill, args.rate, args.processes)
