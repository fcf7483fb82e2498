"""Two tokenizers, one text: which augmenting tokens stand for an anchor token, and from where they may be seen.

The augmenting model reads the anchor's tokens *transcoded*: each anchor token's bytes, in the augmenting tokenizer's
ids, looked up in a table that is made once. The stream grows at its end alone and depends on past tokens alone, so it
is exactly causal: what training sees is what decoding sees. The price is that the augmenting model sees the anchor's
segmentation rather than its own; on text whose words are tokens of both, the two agree.

The frontier of anchor position t is the number of augmenting tokens whose bytes end at or before the end of token t.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerBase

from calmlm.errors import ModelError

SPACE = "▁"
ROLES = ("eos_token", "bos_token", "sep_token", "cls_token", "mask_token", "unk_token", "pad_token")
REWRITING = ("NFC", "NFD", "NFKC", "NFKD", "Nmt", "Lowercase", "StripAccents", "Precompiled")
BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")
LOOKBACK = 3
"""A character of UTF-8 has at most four bytes, so the three tokens before one decide what its first bytes complete."""


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
            ModelError: when the tokenizer is none of the tokenizers library, or writes text in another way.
        """
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ModelError(
                f"The tokenizer of the {role} must be a fast one to be aligned, but {type(tokenizer).__name__} is not: "
                f"convert it to a fast tokenizer first."
            )
        data = json.loads(backend.to_str())
        parts = {part["type"]: part for part in _flat(data["decoder"], "decoders")}
        before = {part["type"]: part for part in _flat(data["pre_tokenizer"], "pretokenizers")}
        normalizers = {part["type"]: part for part in _flat(data["normalizer"], "normalizers")}
        model = data["model"]
        if "ByteLevel" in parts or "ByteLevel" in before:
            prefixed = bool(before.get("ByteLevel", {}).get("add_prefix_space"))
            return cls("bytes", dummy_space=prefixed, every_segment=prefixed)
        if "Metaspace" in parts:
            scheme = parts["Metaspace"].get("prepend_scheme", "always")
            mark = parts["Metaspace"].get("replacement", SPACE)
            return cls("metaspace", mark, scheme != "never", scheme == "always")
        replaced = [p for p in _flat(data["decoder"], "decoders") if p["type"] == "Replace" and p.get("content") == " "]
        if replaced and "String" in replaced[0]["pattern"]:
            every = "Prepend" in normalizers or before.get("Metaspace", {}).get("prepend_scheme") == "always"
            return cls("metaspace", replaced[0]["pattern"]["String"], "Strip" in parts or every, every)
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


def _flat(part: dict[str, Any] | None, children: str) -> list[dict[str, Any]]:
    if part is None:
        return []
    if part["type"] == "Sequence":
        return [leaf for child in part[children] for leaf in _flat(child, children)]
    return [part]


def token_bytes(tokenizer: PreTrainedTokenizerBase, role: str = "anchor") -> list[bytes | None]:
    """The bytes that each token writes in the middle of a text, by id; None for special tokens and unused ids.

    Raises:
        ModelError: when the tokenizer cannot be read.
    """
    spelling = Spelling.of(tokenizer, role)
    table: list[bytes | None] = [None] * (max(tokenizer.get_vocab().values(), default=-1) + 1)
    added, special = tokenizer.added_tokens_decoder, set(tokenizer.all_special_ids)
    for token, index in tokenizer.get_vocab().items():
        if index in added and not BYTE_TOKEN.fullmatch(token):
            table[index] = None if added[index].special else added[index].content.encode()
        elif index not in special or BYTE_TOKEN.fullmatch(token):
            table[index] = spelling.bytes_of(token)
    return table


@dataclass(frozen=True)
class Alignment:
    """The table from one tokenizer to another.

    Attributes:
        body: for each anchor id, the augmenting ids of its bytes inside a text.
        start: the same at the start of a word that no space announces, where it differs.
        opens: anchor ids after which such a word may start: special tokens, and for WordPiece what ends no word.
        partial: bytes of anchor ids that are parts of characters, where the augmenting tokenizer cannot write bytes.
        characters: the augmenting ids of each character it knows; needed where there are such parts.
        unknown: the augmenting ids of a character that it does not know.
        fill: the augmenting id that stands where a row has no token.
        digest: sha256 over both tokenizers.
    """

    body: list[list[int]]
    start: dict[int, list[int]]
    opens: list[int]
    partial: dict[int, bytes]
    characters: dict[str, list[int]]
    unknown: list[int]
    fill: int
    digest: str

    @classmethod
    def between(cls, anchor: PreTrainedTokenizerBase, augmenting: PreTrainedTokenizerBase) -> Alignment:
        """Make the table from the anchor's tokenizer to the augmenting model's.

        Raises:
            ModelError: when one of them cannot be read, or the augmenting tokenizer cannot write the anchor's text.
        """
        writer, spelling = Writer(augmenting), Spelling.of(anchor, "anchor")
        pieces = token_bytes(anchor, "anchor")
        roles = _special_ids(anchor, augmenting)
        body: list[list[int]] = []
        start: dict[int, list[int]] = {}
        opens: list[int] = []
        partial: dict[int, bytes] = {}
        for index, piece in enumerate(pieces):
            if piece is None:
                body.append(roles.get(index, []))
                opens.append(index)
                if index == anchor.bos_token_id and augmenting.bos_token_id is not None:
                    start[index] = [augmenting.bos_token_id]  # one token may be both the beginning and the end
                continue
            ids = writer.write(piece)
            if ids is None:
                partial[index], ids = piece, []
            body.append(ids)
            text = piece.decode(errors="ignore")
            if not text[-1:].isalnum():
                opens.append(index)
            first = writer.write(piece.removeprefix(b" ") if spelling.dummy_space else piece, start=True)
            if first is not None and first != ids:
                start[index] = first
        if writer.spelling.kind != "wordpiece":
            leads = spelling if spelling.dummy_space else writer.spelling
            begin = (anchor.bos_token_id, anchor.cls_token_id)
            opens = [i for i in opens if pieces[i] is None and (leads.every_segment or i in begin)]
            opens = opens if leads.dummy_space else []
        unknown = [] if augmenting.unk_token_id is None else [augmenting.unk_token_id]
        return cls(
            body=body,
            start=start,
            opens=opens,
            partial=partial,
            characters=writer.characters() if partial else {},
            unknown=unknown,
            fill=augmenting.pad_token_id or 0,
            digest=digest(anchor, augmenting),
        )

    @property
    def highest(self) -> int:
        """The largest augmenting id in it."""
        rows = (*self.body, *self.start.values(), *self.characters.values(), self.unknown, [self.fill])
        return max(i for row in rows for i in row)

    def to_json(self) -> dict[str, Any]:
        """Plain data; ``from_json`` is the inverse."""
        data = dataclasses.asdict(self)
        data["partial"] = {index: piece.hex() for index, piece in self.partial.items()}
        return data

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Alignment:
        """An alignment from what ``to_json`` gave."""
        start = {int(index): ids for index, ids in data["start"].items()}
        partial = {int(index): bytes.fromhex(piece) for index, piece in data["partial"].items()}
        return cls(**{**data, "start": start, "partial": partial})


class Writer:
    """Writes bytes in the tokens of one tokenizer, without the rules that look beyond them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.spelling = Spelling.of(tokenizer, "augmenting model")
        self.backend = tokenizer.backend_tokenizer
        self.vocabulary = tokenizer.get_vocab()
        normalizers = _flat(json.loads(self.backend.to_str())["normalizer"], "normalizers")
        self.prepends = any(part["type"] == "Prepend" for part in normalizers)
        self.rewrite = _rewriting(normalizers)
        self.byte_ids = [self.vocabulary.get(f"<0x{byte:02X}>") for byte in range(256)]

    def characters(self) -> dict[str, list[int]]:
        """The ids of every character that stands alone in the vocabulary, or becomes such a one (case, accents)."""
        known = {chr(code) for code in range(128)}
        for token in self.vocabulary:
            text = self.spelling.bytes_of(token).decode(errors="ignore").strip()
            known |= set(text) if len(text) == 1 else set()
        rewrite = self.backend.normalizer if self.spelling.kind == "wordpiece" else self.rewrite
        if rewrite is not None:
            others = [chr(code) for code in range(128, 0x10000) if not 0xD800 <= code < 0xE000]
            known |= {c for c in others if (new := rewrite.normalize_str(c).strip()) and set(new) <= known}
        return {character: self.write(character.encode()) or [] for character in sorted(known)}

    def write(self, piece: bytes, start: bool = False) -> list[int] | None:
        """The ids for ``piece``; None when it holds parts of characters that the tokenizer cannot write.

        Args:
            piece: bytes of one token of the other tokenizer.
            start: whether it starts a word that no space announces.
        """
        if self.spelling.kind == "bytes":
            return self._tokenize("".join(CHARACTER_OF[byte] for byte in piece))
        ids: list[int] = []
        for text, raw in _characters(piece):
            if raw:
                written = [self.byte_ids[byte] for byte in raw]
                if None in written:
                    return None
                ids += [index for index in written if index is not None]
            else:
                ids += self._write_text(text, start and not ids)
        return ids

    def _write_text(self, text: str, start: bool) -> list[int]:
        kind, mark = self.spelling.kind, self.spelling.mark
        if kind in ("metaspace", "plain") and self.rewrite is not None:
            text = self.rewrite.normalize_str(text)
        if kind == "metaspace":
            prefix = mark if start and self.spelling.dummy_space and (self.prepends or text[:1] != " ") else ""
            return self._tokenize(prefix + text.replace(" ", mark))
        if kind == "wordpiece":
            return self._wordpieces(text, start)
        if kind in ("words", "suffix"):
            normalizer, splitter = self.backend.normalizer, self.backend.pre_tokenizer
            text = text if normalizer is None else normalizer.normalize_str(text)
            words = text.split() if splitter is None else [word for word, _ in splitter.pre_tokenize_str(text)]
            return [i for word in words for i in self._tokenize(word)]
        return self._tokenize(text)

    def _wordpieces(self, text: str, start: bool) -> list[int]:
        if self.backend.normalizer is not None:
            lead = text[: len(text) - len(text.lstrip())]
            text = lead + self.backend.normalizer.normalize_str(text.lstrip())
        ids: list[int] = []
        words = self.backend.pre_tokenizer.pre_tokenize_str(text) if self.backend.pre_tokenizer else [(text, (0, 0))]
        for word, (position, _) in words:
            begins = position > 0 or start or not word[0].isalnum()
            ids += self._tokenize(word) if begins else self._continue(word)
        return ids

    def _continue(self, word: str) -> list[int]:
        """Greedy longest pieces, as WordPiece does it, from the middle of a word on."""
        ids: list[int] = []
        while word:
            for end in range(len(word), 0, -1):
                index = self.vocabulary.get(self.spelling.mark + word[:end])
                if index is not None:
                    ids.append(index)
                    word = word[end:]
                    break
            else:
                return [self.tokenizer.unk_token_id] if self.tokenizer.unk_token_id is not None else ids
        return ids

    def _tokenize(self, text: str) -> list[int]:
        return [token.id for token in self.backend.model.tokenize(text)] if text else []


def _rewriting(parts: list[dict[str, Any]]) -> Any:
    """Those normalizers that change characters one by one (case, accents, compatibility forms), or None."""
    parts = [part for part in parts if part["type"] in REWRITING]
    if not parts:
        return None
    bare = json.loads(Tokenizer(models.WordLevel({}, unk_token="")).to_str())
    bare["normalizer"] = {"type": "Sequence", "normalizers": parts}
    return Tokenizer.from_str(json.dumps(bare)).normalizer


def _characters(piece: bytes) -> list[tuple[str, bytes]]:
    """Cut bytes into runs of whole characters (text, b"") and runs of other bytes ("", raw)."""
    runs: list[tuple[str, bytes]] = []
    while piece:
        try:
            runs.append((piece.decode(), b""))
            return runs
        except UnicodeDecodeError as error:
            if error.start:
                runs.append((piece[: error.start].decode(), b""))
            runs.append(("", piece[error.start : error.end]))
            piece = piece[error.end :]
    return runs


def _special_ids(anchor: PreTrainedTokenizerBase, augmenting: PreTrainedTokenizerBase) -> dict[int, list[int]]:
    """Special tokens by role, then by content; those without a counterpart say nothing to the augmenting model."""
    theirs = {token.content: index for index, token in augmenting.added_tokens_decoder.items() if token.special}
    theirs |= dict(zip(augmenting.all_special_tokens, augmenting.all_special_ids, strict=True))
    found = {}
    for index, token in anchor.added_tokens_decoder.items():
        if token.content in theirs:
            found[index] = [theirs[token.content]]
    for role in ROLES:  # one token may have several roles; the first of them counts
        ours, other = getattr(anchor, f"{role}_id", None), getattr(augmenting, f"{role}_id", None)
        if ours is not None and other is not None:
            found.setdefault(ours, [other])
    return found


def digest(anchor: PreTrainedTokenizerBase, augmenting: PreTrainedTokenizerBase) -> str:
    """sha256 over both tokenizers, so that a changed one is noticed; how they last padded or cut is no part of them."""
    mark = hashlib.sha256()
    for tokenizer in (anchor, augmenting):
        data = json.loads(tokenizer.backend_tokenizer.to_str()) | {"padding": None, "truncation": None}
        mark.update(json.dumps(data, sort_keys=True).encode())
    return mark.hexdigest()
