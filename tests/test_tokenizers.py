"""Our tokenizers against transformers', on small vocabularies with the rules of the real ones."""

import random
import unicodedata
from pathlib import Path

import pytest
import torch

from errors import InputError
from model.tokenizers import CLIPTokenizer, T5Tokenizer

FIXTURES = Path(__file__).parent / "fixtures" / "tokenizers"
CLIP, T5_JSON, T5_PIECES = FIXTURES / "clip", FIXTURES / "t5" / "tokenizer.json", FIXTURES / "t5" / "spiece.model"

FIXED = [
    "", " ", "\n\t", "a", "A photo of a cat.", "two  blanks   three ",
    " leading and\u00a0no-break\u2003em blanks", "line one\nline two\r\nline three\u2028four",
    "The fox's tail, it'll wag; they're we've I'm I'd don't 'tis rock'n'roll",
    "IT'S UPPER'S CASE, MiXeD'Ll", "1 22 333 4,444.5 ½ ² Ⅷ ١٢٣", "café naïve Ångström",
    unicodedata.normalize("NFD", "café naïve Ångström ẹ́ ṩ"), "日本語のプロンプト、富士山の写真", "한국어 프롬프트",
    "ثعلب أحمر في الثلج", "लाल लोमड़ी बर्फ में", "🦊 fox👩🏽‍🚀in🏳️‍🌈space",
    "ﬁne ﬂow ＡＢＣ１２３！ ｱｲｳ İstanbul ẞ", "“curly” ‘quotes’ … — – « »",
    "!?.,;:-_/\\|()[]{}<>@#$%^&*+=~`'\"", "under_score-dash a/b/c e.g. x²+y²=z²",
    "nul\x00bell\x07escape\x1b[0m", "zero\u200bwidth\u200djoin soft\u00adhyphen\ufeff",
    "▁ a ▁▁ b", "<|startoftext|> hello <|endoftext|> world", "<|STARTOFTEXT|>a<|EndOfText|>",
    "word " * 120, "antidisestablishmentarianism" * 12, "🦊" * 60,
]  # fmt: skip
# transformers and tokenizer.json read these as special tokens, sentencepiece as text
SPECIAL = ["a </s> b", "<pad><pad>x", "one <extra_id_0> two<extra_id_99>.", "<unk>"]


def generated_prompts(count: int) -> list[str]:
    """Words of many scripts, cases and separators in random order: the same ones every time."""
    words = [word for prompt in FIXED for word in prompt.split()]
    words += "fox Snow 7 o'clock é 雪 's …".split()
    blanks = [" ", " ", " ", "", "  ", "\n", ", ", "-", "\t", "' ", ". "]
    rng = random.Random(0)
    return ["".join(rng.choice(words) + rng.choice(blanks) for _ in range(rng.randrange(1, 60))) for _ in range(count)]


PROMPTS = FIXED + generated_prompts(200)


def transformers():
    return pytest.importorskip("transformers", reason="compares with transformers, which is not installed")


def differing(ours, theirs, prompts: list[str], length: int) -> list[str]:
    expected = theirs(prompts, padding="max_length", truncation=True, max_length=length).input_ids
    ids, _ = ours(prompts, length)
    assert ids.shape == (len(prompts), length) and ids.dtype == torch.int64
    return [prompt for prompt, row, other in zip(prompts, ids.tolist(), expected) if row != other]


@pytest.mark.parametrize("length", [77, 20])
def test_our_clip_ids_are_those_of_transformers(length):
    theirs = transformers().CLIPTokenizerFast.from_pretrained(CLIP)
    assert differing(CLIPTokenizer(CLIP), theirs, PROMPTS, length) == []


@pytest.mark.parametrize("length", [512, 256, 24])
def test_our_t5_ids_are_those_of_transformers(length):
    theirs = transformers().T5TokenizerFast.from_pretrained(T5_JSON.parent)
    assert differing(T5Tokenizer(T5_JSON), theirs, PROMPTS + SPECIAL, length) == []


def test_both_files_of_t5_give_the_same_ids():
    """Whoever has only spiece.model must get the image of whoever has tokenizer.json."""
    assert torch.equal(T5Tokenizer(T5_JSON)(PROMPTS, 64)[0], T5Tokenizer(T5_PIECES)(PROMPTS, 64)[0])


STORED = [  # prompt, CLIP's ids and T5's, as transformers gives them
    ("", [812, 813], [1]),
    ("A photo of a cat.", [812, 320, 79, 546, 616, 520, 320, 66, 563, 269, 813],
     [11, 3, 70, 453, 58, 10, 4, 541, 5, 1]),
    ("The fox's tail, it'll wag; 42 times",
     [812, 513, 647, 343, 6, 338, 556, 692, 267, 72, 339, 6, 643, 632, 326, 282, 275, 273, 83, 72,
      76, 522, 813],
     [16, 8, 89, 249, 2, 6, 3, 339, 9, 3, 62, 2, 494, 238, 40, 184, 3, 555, 568, 33, 66, 24, 29, 1]),
    ("日本 🦊 café",
     [812, 162, 245, 98, 162, 250, 361, 172, 253, 99, 488, 628, 69, 127, 358, 813],
     [3, 2, 3, 2, 57, 54, 2, 1]),
]  # fmt: skip


@pytest.mark.parametrize("prompt, clip, t5", STORED)
def test_stored_ids_come_out_again(prompt, clip, t5):
    """The comparison for those who have no transformers."""
    assert CLIPTokenizer(CLIP)([prompt])[0].tolist() == [clip + [813] * (77 - len(clip))]
    for path in (T5_JSON, T5_PIECES):
        assert T5Tokenizer(path)([prompt], 32)[0].tolist() == [t5 + [0] * (32 - len(t5))]


@pytest.mark.parametrize("tokenizer, last", [(CLIPTokenizer(CLIP), 813), (T5Tokenizer(T5_JSON), 1)], ids=["clip", "t5"])
def test_a_long_prompt_keeps_its_end_token_and_reports_what_was_cut(tokenizer, last):
    prompt = "A photo of a cat. The fox's tail, it'll wag"
    ids, cut = tokenizer([prompt, "a"], 14)
    assert ids[0, -1] == last
    assert cut[0] and prompt.endswith(cut[0]) and cut[1] == ""
    kept, rest = tokenizer([prompt.removesuffix(cut[0])], 14)
    assert torch.equal(kept[0], ids[0]) and rest == [""]


def test_a_prompt_that_just_fits_loses_nothing():
    for tokenizer, needed in ((CLIPTokenizer(CLIP), 11), (T5Tokenizer(T5_JSON), 10), (T5Tokenizer(T5_PIECES), 10)):
        assert tokenizer(["A photo of a cat."], needed)[1] == [""]
        assert tokenizer(["A photo of a cat."], needed - 1)[1] == ["."]


@pytest.mark.parametrize("content", [None, "", "{", "[]", "version https://git-lfs.github.com/spec/v1"])
@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "tokenizer.json", "spiece.model"])
def test_a_bad_file_is_named(tmp_path, name, content):
    """None stands for a missing file, the last for a git-lfs pointer, which is what an unfinished clone holds."""
    for good in ("vocab.json", "merges.txt"):
        (tmp_path / good).write_bytes((CLIP / good).read_bytes())
    (tmp_path / name).unlink(missing_ok=True)
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=name) as caught:
        CLIPTokenizer(tmp_path) if name in ("vocab.json", "merges.txt") else T5Tokenizer(tmp_path / name)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


def test_a_vocabulary_of_another_model_is_refused(tmp_path):
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(InputError, match="not CLIP's vocabulary"):
        CLIPTokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text(T5_JSON.read_text().replace("</s>", "<end>"))
    with pytest.raises(InputError, match="not T5's vocabulary"):
        T5Tokenizer(tmp_path / "tokenizer.json")
