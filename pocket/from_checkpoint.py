"""A run folder that goes on from an exported checkpoint: its weights, its tokenizers, no optimizer state.

    python -m pocket.from_checkpoint --checkpoint pocket/checkpoint --folder pocket/run
    python -m pocket.latents --folder pocket/run
    python -m pocket.train --folder pocket/run --steps 2700 --distill 350 --rate 0.5
    python -m pocket.export --folder pocket/run --output pocket/checkpoint

This is how the steps from 25,000 on were trained, in three stages (pocket/checkpoint/training.log).
"""

import argparse
import json
import shutil
from pathlib import Path

import torch

from formats import components
from model.autoencoder import AutoEncoder
from pocket.train import State
from pocket.train_autoencoder import PARAMS
from weights import find


def begin(checkpoint: Path, run: Path) -> None:
    """Write autoencoder.pt, factors.json, flux.pt and the tokenizers to `run`."""
    run.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(checkpoint / name, run / name, dirs_exist_ok=True)
    found = find(checkpoint)
    loaded = {
        part: components.load(getattr(found, part), torch.device("cpu"), torch.float32)
        for part in ("flux", "t5", "clip", "ae")
    }
    config = json.loads((checkpoint / "vae" / "config.json").read_text())
    factors = {name: config[name] for name in ("shift_factor", "scaling_factor")}
    (run / "factors.json").write_text(json.dumps(factors))
    autoencoder = AutoEncoder(PARAMS)  # whose latents are neither shifted nor scaled
    autoencoder.load_state_dict(loaded["ae"].state_dict())
    torch.save({"average": autoencoder.state_dict()}, run / "autoencoder.pt")
    state = State(run)
    for part in ("flux", "t5", "clip"):
        for network in (state.model, state.average):
            getattr(network, part).load_state_dict(loaded[part].state_dict())
    state.save()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=Path("pocket/checkpoint"))
    parser.add_argument("--folder", type=Path, default=Path("pocket/run"))
    args = parser.parse_args()
    if (args.folder / "flux.pt").exists():
        parser.error(f"{args.folder}/flux.pt exists; a run in progress is not overwritten")
    begin(args.checkpoint, args.folder)
