"""Between the two steps of training: vocabularies of the captions' words, and pools of scenes encoded once.

python -m pocket.latents --folder pocket/run
"""

import argparse
import io
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from tqdm import tqdm

from model.autoencoder import AutoEncoder
from pocket.scenes import Scene, Thing, caption, draw, random_scene
from pocket.train_autoencoder import PARAMS, to_tensor

# (width, height): scenes in the pool, weight of the canvas in training, fractions of scenes with 0, 1, 2 ... objects
CANVASES = {
    (64, 64): (5000, 1, (0.06, 0.94)),
    (96, 64): (2500, 0.5, (0.05, 0.95)),
    (64, 96): (2500, 0.5, (0.05, 0.95)),
    (96, 96): (8000, 1, (0.05, 0.75, 0.2)),
    (128, 64): (5000, 0.75, (0.05, 0.6, 0.35)),
    (64, 128): (5000, 0.75, (0.05, 0.6, 0.35)),
    (128, 128): (10000, 3, (0.05, 0.5, 0.2, 0.15, 0.1)),
    (160, 96): (2500, 1.25, (0.05, 0.5, 0.2, 0.25)),
    (96, 160): (2500, 1.5, (0.05, 0.5, 0.2, 0.25)),
    (192, 128): (2500, 2, (0.05, 0.55, 0.15, 0.15, 0.1)),
    (128, 192): (2500, 2.5, (0.05, 0.55, 0.15, 0.15, 0.1)),
    (192, 192): (3500, 4, (0.02, 0.7, 0.1, 0.08, 0.05, 0.05)),
    (256, 64): (2500, 1.5, (0.03, 0.8, 0.17)),
    (64, 256): (2500, 3, (0.03, 0.8, 0.17)),
    (256, 96): (2500, 2, (0.03, 0.75, 0.12, 0.1)),
    (96, 256): (3500, 4, (0.03, 0.75, 0.12, 0.1)),
    (256, 128): (3000, 2.5, (0.03, 0.65, 0.12, 0.08, 0.07, 0.05)),
    (128, 256): (4000, 5, (0.03, 0.65, 0.12, 0.08, 0.07, 0.05)),
    (256, 160): (2000, 2, (0.03, 0.7, 0.1, 0.07, 0.05, 0.05)),
    (160, 256): (3000, 4, (0.03, 0.7, 0.1, 0.07, 0.05, 0.05)),
    (256, 256): (6000, 8, (0.02, 0.6, 0.08, 0.06, 0.06, 0.06, 0.05, 0.04, 0.03)),
}
# Two regions of a square are tall, with one object each. Apart from CANVASES, by which adapters are trained: of their
# steps these would be half, with few scenes each.
TALL_CANVASES = dict.fromkeys(
    [(64, 192), (64, 224), (64, 240), (80, 208), (80, 240), (96, 192), (96, 224), (96, 240), (112, 224), (112, 240),
     (112, 256), (128, 224), (144, 224), (144, 256)],
    (1200, 3.5, (0.03, 0.92, 0.05)),
)  # fmt: skip


@dataclass
class Pool:
    """Scenes of one canvas size with their latents (N, 16, height / 8, width / 8), shifted and scaled."""

    width: int
    height: int
    weight: float
    scenes: list[Scene]
    latents: Tensor

    @property
    def tokens(self) -> int:
        return self.width * self.height // 256

    @classmethod
    def load_all(cls, folder: Path) -> list["Pool"]:
        pools = []
        for file in sorted(folder.glob("*.pt")):
            data = torch.load(file, weights_only=True)
            scenes = [scene_of(row) for row in json.loads(data.pop("scenes"))]
            pools.append(cls(scenes=scenes, **data))
        return pools


def scene_of(row: dict) -> Scene:
    things = tuple(Thing(**{k: tuple(v) if isinstance(v, list) else v for k, v in t.items()}) for t in row["things"])
    return Scene(row["width"], row["height"], row["background"], things)


def captions(count: int) -> list[str]:
    rng = np.random.default_rng(1)
    return ["a photo"] + [caption(rng, random_scene(rng, 256, 256, int(rng.integers(0, 9)))) for _ in range(count)]


def train_t5_vocabulary(lines: list[str], folder: Path) -> None:
    """spiece.model, whole words of the captions and single letters for all others."""
    model = io.BytesIO()
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,'-!?"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, model_type="bpe", vocab_size=256, hard_vocab_limit=False,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, required_chars=letters, minloglevel=2,
    )  # fmt: skip
    folder.mkdir(exist_ok=True)
    (folder / "spiece.model").write_bytes(model.getvalue())


def train_clip_vocabulary(lines: list[str], folder: Path) -> None:
    """vocab.json and merges.txt, the two special tokens last as in CLIP-L."""
    tokenizer = Tokenizer(models.BPE(continuing_subword_prefix="", end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Lowercase()
    words = Regex(r"[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=800, end_of_word_suffix="</w>", initial_alphabet=alphabet)
    tokenizer.train_from_iterator(lines, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    # as in CLIP: every letter, every letter at a word's end, what the merges make, the special tokens
    tokens = alphabet + [a + "</w>" for a in alphabet] + [m.replace(" ", "") for m in merges]
    tokens = list(dict.fromkeys(tokens)) + ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")


@torch.no_grad()
def encode(model: AutoEncoder, scenes: list[Scene]) -> Tensor:
    """In bfloat16, twice as fast on a CPU; the error, 0.004, is far below the noise that training adds."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return torch.cat([model.encode(to_tensor([draw(s) for s in part])) for part in chunks(scenes, 16)]).float()


def chunks(items: list, size: int) -> list[list]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def make_pools(run: Path) -> None:
    model = AutoEncoder(PARAMS).eval()
    model.load_state_dict(torch.load(run / "autoencoder.pt", weights_only=True)["average"])
    (run / "latents").mkdir(exist_ok=True)
    factors_file = run / "factors.json"
    for (width, height), (count, weight, shares) in tqdm((CANVASES | TALL_CANVASES).items()):
        file = run / "latents" / f"{width}x{height}.pt"
        if file.exists():
            continue
        rng = np.random.default_rng([width, height])
        counts = rng.choice(len(shares), count, p=np.array(shares) / sum(shares))
        scenes = [random_scene(rng, width, height, int(n)) for n in counts]
        latents = encode(model, scenes)
        if not factors_file.exists():  # from the first canvas: mean 0 and deviation 1
            factors = {"shift_factor": latents.mean().item(), "scaling_factor": 1 / latents.std().item()}
            factors_file.write_text(json.dumps(factors))
        factors = json.loads(factors_file.read_text())
        latents = ((latents - factors["shift_factor"]) * factors["scaling_factor"]).half()
        rows = json.dumps([asdict(s) for s in scenes])
        pool = {"width": width, "height": height, "weight": weight, "scenes": rows, "latents": latents}
        torch.save(pool, file.with_suffix(".new"))
        file.with_suffix(".new").rename(file)


def make_vocabularies(run: Path) -> None:
    lines = captions(20000)
    train_t5_vocabulary(lines, run / "tokenizer_2")
    train_clip_vocabulary(lines, run / "tokenizer")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("pocket/run"))
    run = parser.parse_args().folder
    if not (run / "tokenizer").exists():
        make_vocabularies(run)
    make_pools(run)
