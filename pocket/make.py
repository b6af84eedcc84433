"""The pocket checkpoint from nothing, in one command that resumes where it was stopped.

    mkdir -p pocket/run && python -m pocket.make --folder pocket/run >> pocket/run/training.log

The autoencoder first, then the vocabularies and the pools of latents, then the transformer with both text encoders,
then the files of pocket/checkpoint. Some 6 to 12 hours on two idle CPU cores with bfloat16 instructions, by
the machine.
"""

import argparse
import shutil
from pathlib import Path

import torch

from pocket import latents, train, train_autoencoder
from pocket.export import export

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("pocket/run"))
    parser.add_argument("--output", type=Path, default=Path("pocket/checkpoint"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.folder.mkdir(parents=True, exist_ok=True)
    train_autoencoder.train(args.folder, steps=3400)
    if not (args.folder / "tokenizer").exists():
        latents.make_vocabularies(args.folder)
    latents.make_pools(args.folder)
    train.train_together(args.folder, steps=30000, distill=1200)
    export(args.folder, args.output)
    shutil.copy(args.folder / "training.log", args.output)
