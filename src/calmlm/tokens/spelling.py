"""How a tokenizer writes text in its tokens: byte-level, SentencePiece-like, WordPiece, end-of-word marks, words."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from calmlm.errors import ModelError
from calmlm.tokens.parts import parts_of

SPACE = "▁"
BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")


def _byte_alphabet() -> dict[str, int]:
    """The printable stand-ins that byte-level tokenizers write for bytes (GPT-2's table)."""
    kept = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    moved = [byte for byte in range(256) if byte not in kept]
    return {chr(byte): byte for byte in kept} | {chr(256 + k): byte for k, byte in enumerate(moved)}


BYTE_OF = _byte_alphabet()
CHARACTER_OF = {byte: character for character, byte in BYTE_OF.items()}


@dataclass(frozen=True)
class Spelling:
    """How a tokenizer writes text in its tokens.

    Attributes:
        kind: ``"bytes"`` (byte-level), ``"metaspace"`` (SentencePiece-like), ``"wordpiece"``, ``"suffix"`` (a mark at
            the end of words) or ``"words"`` (whole words, a space between).
        mark: the kind's own mark: the stand-in of a space, the prefix of a continuation, the suffix of a word.
        dummy_space: whether the first token of a text carries a space that is not in the text.
        every_segment: whether the first token after any special token does so as well.
    """

    kind: str
    mark: str = ""
    dummy_space: bool = False
    every_segment: bool = False

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, role: str) -> Spelling:
        """Read a tokenizer's spelling off its decoder.

        Raises:
            ModelError: when the tokenizer does not come from the tokenizers library, or writes text in another way.
        """
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ModelError(
                f"The tokenizer of the {role} must be a fast one to be aligned, but {type(tokenizer).__name__} is not: "
                f"convert it to a fast tokenizer first."
            )
        data = parts_of(backend)
        parts = {part["type"]: part for part in flat(data["decoder"], "decoders")}
        before = {part["type"]: part for part in flat(data["pre_tokenizer"], "pretokenizers")}
        normalizers = {part["type"]: part for part in flat(data["normalizer"], "normalizers")}
        model = data["model"]
        if "ByteLevel" in parts or "ByteLevel" in before:
            prefixed = bool(before.get("ByteLevel", {}).get("add_prefix_space"))
            return cls("bytes", dummy_space=prefixed, every_segment=prefixed)
        if "Metaspace" in parts:
            scheme = parts["Metaspace"].get("prepend_scheme", "always")
            mark = parts["Metaspace"].get("replacement", SPACE)
            return cls("metaspace", mark, scheme != "never", scheme == "always")
        replaced = [p for p in flat(data["decoder"], "decoders") if p["type"] == "Replace" and p.get("content") == " "]
        if replaced and "String" in replaced[0]["pattern"]:
            every = "Prepend" in normalizers or before.get("Metaspace", {}).get("prepend_scheme") == "always"
            return cls("metaspace", replaced[0]["pattern"]["String"], "Strip" in parts or every, every)
        if "Metaspace" in before:  # and no decoder, which few texts need
            scheme = before["Metaspace"].get("prepend_scheme", "always")
            mark = before["Metaspace"].get("replacement", SPACE)
            return cls("metaspace", mark, scheme != "never", scheme == "always")
        if model["type"] == "WordPiece" or "WordPiece" in parts:
            return cls("wordpiece", model.get("continuing_subword_prefix") or "##", True, True)
        suffix = parts.get("BPEDecoder", {}).get("suffix") or model.get("end_of_word_suffix")
        if suffix:
            return cls("suffix", suffix)
        if model["type"] == "WordLevel" and "Fuse" not in parts:
            return cls("words", "", True, True)
        return cls("plain")

    def bytes_of(self, token: str) -> bytes:
        """The bytes that ``token`` writes inside a text."""
        if self.kind == "bytes":
            try:
                return bytes(BYTE_OF[character] for character in token)
            except KeyError:  # an added token written as plain text
                return token.encode()
        if self.kind == "metaspace":
            if BYTE_TOKEN.fullmatch(token):
                return bytes([int(token[3:5], 16)])
            return token.replace(self.mark, " ").encode()
        if self.kind == "wordpiece":
            return token.removeprefix(self.mark).encode() if token.startswith(self.mark) else f" {token}".encode()
        if self.kind == "suffix":
            return (token.removesuffix(self.mark) + " " if token.endswith(self.mark) else token).encode()
        if self.kind == "words":
            return f" {token}".encode()
        return token.encode()


def in_word(character: str) -> bool:
    """Whether a character belongs to a word: a letter, a digit, or a mark on one; "" does not."""
    return character.isalnum() or (bool(character) and unicodedata.category(character)[0] == "M")


def flat(part: dict[str, Any] | None, children: str) -> list[dict[str, Any]]:
    """The parts of a tokenizer's component, those of sequences one by one."""
    if part is None:
        return []
    if part["type"] == "Sequence":
        return [leaf for child in part[children] for leaf in flat(child, children)]
    return [part]


def token_bytes(tokenizer: PreTrainedTokenizerBase, role: str = "anchor") -> list[bytes | None]:
    """The bytes that each token writes in the middle of a text, by id; None for special tokens and unused ids.

    Raises:
        ModelError: when the tokenizer cannot be read.
    """
    spelling = Spelling.of(tokenizer, role)
    vocabulary = tokenizer.get_vocab()
    table: list[bytes | None] = [None] * (max(vocabulary.values(), default=-1) + 1)
    added, special = tokenizer.added_tokens_decoder, set(tokenizer.all_special_ids)
    for token, index in vocabulary.items():
        if index in added and not BYTE_TOKEN.fullmatch(token):
            table[index] = None if added[index].special else added[index].content.encode()
        elif index not in special or BYTE_TOKEN.fullmatch(token):
            table[index] = spelling.bytes_of(token)
    return table
