"""Step 1 of the pocket checkpoint: its autoencoder, trained on drawn scenes. Resumes from its own state file.

python -m pocket.train_autoencoder --folder pocket/run --steps 5000
"""

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from model.autoencoder import AutoEncoder, AutoEncoderParams
from pocket.scenes import draw, random_scene

# Four channels to a group at least: with one, GroupNorm would erase flat colours.
PARAMS = AutoEncoderParams(ch=16, ch_mult=(1, 2, 4, 4), num_res_blocks=1, norm_groups=4, scale_factor=1, shift_factor=0)


def to_tensor(pictures: list[np.ndarray]) -> Tensor:
    """uint8 pictures (H, W, 3) -> (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def batch(rng: np.random.Generator, size: int, count: int) -> Tensor:
    """`count` scenes of `size` x `size` pixels, busy ones as often as simple ones."""
    return to_tensor([draw(random_scene(rng, size, size, int(rng.integers(0, 2 + size // 48)))) for _ in range(count)])


def loss_of(model: AutoEncoder, picture: Tensor) -> tuple[Tensor, Tensor]:
    """Training loss, and the mean squared error in it."""
    mean, logvar = model.encoder(picture).float().chunk(2, dim=1)
    logvar = logvar.clamp(-30, 10)
    out = model.decoder(mean + (0.5 * logvar).exp() * torch.randn_like(mean)).float()
    error = out - picture
    edges = sum((error.diff(dim=d)).abs().mean() for d in (2, 3))
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    mse = error.square().mean()
    return mse + 0.1 * error.abs().mean() + 0.1 * edges + 2e-4 * kl, mse


def psnr(model: AutoEncoder, picture: Tensor) -> float:
    with torch.no_grad():
        out = model.decode(model.encode(picture)).clamp(-1, 1)
    return 10 * math.log10(4 / F.mse_loss(out, picture).item())


def canvas_of(step: int, steps: int) -> tuple[int, int]:
    """Side length in pixels and batch size: small scenes, and in the last 40 % of the steps larger ones half the time.

    GroupNorm normalizes over the whole canvas, so a decoder that only saw small ones would drift on large flat areas.
    """
    if step < 0.6 * steps or step % 2 == 0:
        return 64, 24
    return (128, 8) if step % 4 == 1 else (256, 2)


def train(run: Path, steps: int, lr: float = 3e-3) -> None:
    """Train for `steps` in all with a cosine learning rate, from wherever the state in `run` stands."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = AutoEncoder(PARAMS)
    average = AutoEncoder(PARAMS).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0, betas=(0.9, 0.99))
    state_file = run / "autoencoder.pt"
    step = 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    else:
        average.load_state_dict(model.state_dict())

    def save() -> None:
        state = {"model": model.state_dict(), "average": average.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save({**state, "step": step}, state_file.with_suffix(".new"))
        state_file.with_suffix(".new").rename(state_file)

    torch.manual_seed(step)
    rng = np.random.default_rng(step)
    held_out = batch(np.random.default_rng(10**6), 128, 16)
    losses = []
    start = time.monotonic()
    while step < steps:
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss, mse = loss_of(model, batch(rng, *canvas_of(step, steps)))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        decay = min(0.998, step / (step + 10))
        torch._foreach_lerp_(list(average.parameters()), [p.detach() for p in model.parameters()], 1 - decay)
        losses.append(mse.item())
        if step % 200 == 0 or step == steps:
            print(
                f"autoencoder step {step} train {10 * math.log10(4 / np.mean(losses)):.2f} dB, "
                f"held out {psnr(average, held_out):.2f} dB, {time.monotonic() - start:.0f} s since the start",
                flush=True,
            )
            losses.clear()
            save()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("pocket/run"))
    parser.add_argument("--steps", type=int, default=5000)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    train(args.folder, args.steps)
