"""Prompts to token ids, as the two text encoders were trained to read them: the ids of transformers' tokenizers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import sentencepiece
import tokenizers
import torch
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers
from torch import Tensor

from errors import MISSING, InputError

START, END = "<|startoftext|>", "<|endoftext|>"
T = TypeVar("T")
# A prompt -> its ids without special tokens, and a function that gives the text of the ids from the n-th on.
Encode = Callable[[str], tuple[list[int], Callable[[int], str]]]


class CLIPTokenizer:
    """Byte-level BPE of lower-cased text: `<|startoftext|>`, the prompt, then `<|endoftext|>` up to the length.

    The folder holds CLIP's own vocab.json and merges.txt; the rules around them are written down here. Text is not
    repaired with ftfy; transformers doesn't do that any more either.
    """

    def __init__(self, folder: Path):
        vocab_file, merges_file = Path(folder) / "vocab.json", Path(folder) / "merges.txt"
        vocab = _parse(vocab_file, json.loads)
        if not isinstance(vocab, dict) or START not in vocab or END not in vocab:
            raise InputError(vocab_file, MISSING, f"not CLIP's vocabulary, it lacks {START} or {END}")
        self.start, self.end = vocab[START], vocab[END]
        tokenizer = tokenizers.Tokenizer(_parse(merges_file, lambda data: _bpe(vocab, data)))
        one_blank = normalizers.Replace(Regex(r"\s+"), " ")
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), one_blank, normalizers.Lowercase()])
        # special tokens, English contractions, words, single digits, runs of anything else
        pieces = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
        split = pre_tokenizers.Split(Regex(pieces), behavior="removed", invert=True)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
        tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in (START, END)])
        self.encode = _with_offsets(tokenizer)

    def __call__(self, prompts: list[str], length: int = 77) -> tuple[Tensor, list[str]]:
        """Ids (N, length), and for each prompt the end of it that did not fit, "" where all of it did."""
        return _rows(prompts, length, self.encode, [self.start], [self.end], pad=self.end)


class T5Tokenizer:
    """SentencePiece's unigrams: the prompt, `</s>`, then `<pad>` up to the length.

    Reads either file that carries the vocabulary: tokenizer.json, or spiece.model as Google published it. Their ids
    differ for a few stray control and combining characters, and for `</s>`, `<pad>` and `<extra_id_0>` written out in
    a prompt, which tokenizer.json takes for the special tokens and spiece.model for text.
    """

    def __init__(self, path: Path):
        if Path(path).suffix == ".json":
            tokenizer = _parse(path, tokenizers.Tokenizer.from_buffer)
            tokenizer.no_truncation()
            tokenizer.no_padding()
            self.encode, ids = _with_offsets(tokenizer), [tokenizer.token_to_id(name) for name in ("</s>", "<pad>")]
        else:
            pieces = _parse(path, lambda data: sentencepiece.SentencePieceProcessor(model_proto=data))
            self.encode, ids = _with_decoding(pieces), [pieces.eos_id(), pieces.pad_id()]
        if None in ids or -1 in ids:
            raise InputError(path, MISSING, "not T5's vocabulary, it lacks </s> or <pad>")
        self.end, self.pad = ids

    def __call__(self, prompts: list[str], length: int) -> tuple[Tensor, list[str]]:
        """Ids (N, length), and for each prompt the end of it that did not fit, "" where all of it did."""
        return _rows(prompts, length, self.encode, [], [self.end], self.pad)


def _parse(path: Path, parse: Callable[[bytes], T]) -> T:
    """`parse` applied to the file. Whatever goes wrong is the file's fault; tokenizers raises bare Exceptions."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise InputError(path, MISSING, f"this tokenizer file can't be read ({error.strerror})") from error
    if not data.strip():
        raise InputError(path, MISSING, "this tokenizer file is empty")
    try:
        return parse(data)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(". ")
        raise InputError(path, MISSING, f"this tokenizer file is damaged: {reason}") from error


def _bpe(vocab: dict[str, int], merges: bytes) -> models.BPE:
    lines = [line for line in merges.decode().split("\n") if line.strip() and not line.startswith("#version")]
    return models.BPE(vocab, [tuple(line.split()) for line in lines], end_of_word_suffix="</w>", unk_token=END)


def _with_offsets(tokenizer: tokenizers.Tokenizer) -> Encode:
    def encode(prompt):
        encoding = tokenizer.encode(prompt, add_special_tokens=False)
        return encoding.ids, lambda n: prompt[encoding.offsets[n][0] :]

    return encode


def _with_decoding(pieces: sentencepiece.SentencePieceProcessor) -> Encode:
    def encode(prompt):
        ids = pieces.encode(prompt)
        return ids, lambda n: pieces.decode(ids[n:])

    return encode


def _rows(prompts: list[str], length: int, encode: Encode, before: list[int], after: list[int], pad: int):
    room = length - len(before) - len(after)
    rows, cut = [], []
    for prompt in prompts:
        ids, text_from = encode(prompt)
        row = before + ids[:room] + after
        rows.append(row + [pad] * (length - len(row)))
        cut.append(text_from(room).strip() if len(ids) > room else "")
    return torch.tensor(rows), cut
