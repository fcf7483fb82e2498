"""Six kinds of tokenizers, made in a moment for a small corpus; vocabularies differ in size and in kind.

Training of two kinds comes out otherwise each time. Their vocabularies lie beside this file.
"""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
CORPUS = [
    "hello world, the quick brown fox is playing and jumps over 12 + 34 = 46 lazy dogs.",
    "def f(x):\n    return x + 1\n\tif y:\n\t\tpass",
    "naïve café 😀 héllo 👩‍👩‍👧 你好，世界 Привет мир",
] * 20
PLAIN = [CORPUS[0]] * 20
AWKWARD = [
    "hello playing foxes",
    "def f(x):\n\treturn  x+1\n\n\n    pass",
    "😀 héllo 👩‍👩‍👧‍👦 𝔘𝔫𝔦 🇨🇭",
    "你好，世界。漢字かな交じり文",
    "  leading   and    runs of     spaces  ",
    "tab\tand\r\nnew line",
    "12 + 34 = 46.",
    "<s> not special </s>",
]


STORED = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))


def _wrapped(backend: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
    )


def _byte_level(size: int) -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def _unigram() -> Tokenizer:
    pieces = [(piece, score) for piece, score in STORED["unigram"]]
    backend = Tokenizer(models.Unigram(pieces, unk_id=SPECIAL.index("<unk>"), byte_fallback=False))
    backend.add_special_tokens(SPECIAL)
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return backend


def _sentencepiece_bpe() -> Tokenizer:
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    pieces = [AddedToken(f"<0x{byte:02X}>", special=False, normalized=False) for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=460, special_tokens=[*SPECIAL, *pieces], show_progress=False)
    backend.train_from_iterator(PLAIN, trainer)
    return backend


def _wordpiece() -> Tokenizer:
    vocabulary = {piece: index for index, piece in enumerate(STORED["wordpiece"])}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="<unk>"))
    backend.add_special_tokens(SPECIAL)
    backend.normalizer = normalizers.BertNormalizer(lowercase=False)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    return backend


def _characters() -> Tokenizer:
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.decoder = decoders.Fuse()
    backend.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=60, special_tokens=SPECIAL, show_progress=False))
    return backend


KINDS = {
    "bytes": lambda: _byte_level(300),
    "bytes-large": lambda: _byte_level(420),
    "unigram": _unigram,
    "sentencepiece": _sentencepiece_bpe,
    "wordpiece": _wordpiece,
    "characters": _characters,
}


@cache
def tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """The tokenizer of this kind."""
    return _wrapped(KINDS[kind]())


def with_beginning(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """A copy that puts a special token before each text."""
    made = copy.deepcopy(tokenizer)
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", made.bos_token_id)]
    )
    return made


def first_space_only(made: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Let a tokenizer of SentencePiece's kind put its own space before a text alone, not before every part of one."""
    data = json.loads(made.backend_tokenizer.to_str())
    data["normalizer"] = None
    data["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    made._tokenizer = Tokenizer.from_str(json.dumps(data))
    return made
