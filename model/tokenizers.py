"""Prompts to token ids, those of transformers' tokenizers."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor

from errors import MISSING, TOKENIZER, Count, InputError, parse_json, parsed, read_bytes

START = "<|startoftext|>"
END = "<|endoftext|>"
# Special tokens, English contractions, words, single digits, runs of anything else
PIECES = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
# A prompt's ids without special tokens, and what gives the text from the n-th on
Encoded = tuple[list[int], Callable[[int], str]]


class PromptTokenizer:
    """`before`, the prompt, `end`, then `pad` up to the length."""

    encode: Callable[[str], Encoded]
    before: list[int] = []
    end: int
    pad: int

    def __call__(self, prompts: list[str], length: int = 77) -> tuple[Tensor, list[str]]:
        """Ids (N, length), and for each prompt its end that did not fit, or ""."""
        room = length - len(self.before) - 1
        rows = []
        cut = []
        for prompt in prompts:
            ids, text_from = self.encode(prompt)
            row = self.before + ids[:room] + [self.end]
            rows.append(row + [self.pad] * (length - len(row)))
            cut.append(text_from(room).strip() if len(ids) > room else "")
        return torch.tensor(rows), cut


class CLIPTokenizer(PromptTokenizer):
    """Byte-level BPE of lower-cased text: START, the prompt, then END up to the length."""

    def __init__(self, folder: Path):
        file = folder / "vocab.json"
        vocab = parse_json(read_bytes(file, TOKENIZER), dict[str, Count], file)
        if START not in vocab or END not in vocab:
            raise InputError(file, MISSING, f"not CLIP's vocabulary, it lacks {START} or {END}")
        tokenizer = Tokenizer(tokenizer_file(folder / "merges.txt", partial(bpe, vocab)))
        one_blank = normalizers.Replace(Regex(r"\s+"), " ")
        lower = normalizers.Lowercase()
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), one_blank, lower])
        split = pre_tokenizers.Split(Regex(PIECES), behavior="removed", invert=True)
        in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, in_bytes])
        both = [AddedToken(x, normalized=False, special=True) for x in (START, END)]
        tokenizer.add_special_tokens(both)
        self.encode = partial(by_offsets, tokenizer)
        self.before = [vocab[START]]
        self.end = self.pad = vocab[END]


class T5Tokenizer(PromptTokenizer):
    """SentencePiece's unigrams: the prompt, `</s>`, then `<pad>` up to the length.

    It reads tokenizer.json, or Google's spiece.model, which differ for a few control and
    combining characters, and for special tokens in a prompt: to spiece.model they are text.
    """

    def __init__(self, path: Path):
        if path.suffix == ".json":
            tokenizer = tokenizer_file(path, Tokenizer.from_buffer)
            tokenizer.no_truncation()
            tokenizer.no_padding()
            self.encode = partial(by_offsets, tokenizer)
            ids = list(map(tokenizer.token_to_id, ("</s>", "<pad>", "<unk>")))
        else:
            pieces = tokenizer_file(path, lambda data: SentencePieceProcessor(model_proto=data))
            self.encode = partial(by_decoding, pieces)
            ids = [pieces.eos_id(), pieces.pad_id(), pieces.unk_id()]
        if None in ids or -1 in ids:
            raise InputError(path, MISSING, "not T5's vocabulary, it lacks a token")
        self.end, self.pad, self.unknown = ids


def tokenizer_file(path: Path, parse: Callable[[bytes], Any]) -> Any:
    data = read_bytes(path, TOKENIZER)
    if not data.strip():
        raise InputError(path, MISSING, "not a tokenizer file, it is empty")
    return parsed(parse, data, path, "not a tokenizer file that can be read")


def bpe(vocab: dict[str, int], merges: bytes) -> models.BPE:
    lines = [line for line in merges.decode().split("\n") if not line.startswith("#version")]
    pairs = [tuple(line.split()) for line in lines if line.strip()]
    return models.BPE(vocab, pairs, end_of_word_suffix="</w>", unk_token=END)


def by_offsets(tokenizer: Tokenizer, prompt: str) -> Encoded:
    encoding = tokenizer.encode(prompt, add_special_tokens=False)
    return encoding.ids, lambda n: prompt[encoding.offsets[n][0] :]


def by_decoding(pieces: SentencePieceProcessor, prompt: str) -> Encoded:
    ids = pieces.encode(prompt)
    return ids, lambda n: pieces.decode(ids[n:])
