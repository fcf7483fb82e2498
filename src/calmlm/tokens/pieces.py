"""Writing bytes in the tokens of one tokenizer, without the rules that look beyond them."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

from calmlm.errors import ModelError
from calmlm.tokens.parts import SavedTokenizer, part, parts_of
from calmlm.tokens.spelling import CHARACTER_OF, Spelling, flat, in_word

CUTTING = ("Split", "Punctuation", "Digits", "UnicodeScripts", "FixedLength")
REWRITING = ("NFC", "NFD", "NFKC", "NFKD", "Nmt", "Lowercase", "StripAccents", "Precompiled")


class Writer:
    """Writes bytes in the tokens of one tokenizer, without the rules that look beyond them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase | SavedTokenizer) -> None:
        self.tokenizer = tokenizer
        self.spelling = Spelling.of(tokenizer, "augmenting model")
        self.backend = tokenizer.backend_tokenizer
        self.vocabulary = tokenizer.get_vocab()
        data = parts_of(self.backend)
        normalizers = flat(data["normalizer"], "normalizers")
        self.prepends = any(part["type"] == "Prepend" for part in normalizers)
        self.rewrite = _rewriting(normalizers)
        self.cut = _cutting(data)
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
            piece = b" " + piece if start and self.spelling.dummy_space and piece[:1] != b" " else piece
            return self._tokenize("".join(CHARACTER_OF[byte] for byte in piece))
        ids: list[int] = []
        if start and self._is_announced(piece):
            ids += self._tokenize(self.spelling.mark)
        for text, raw in _characters(piece):
            if raw:
                written = [self.byte_ids[byte] for byte in raw]
                if None in written:
                    return None
                ids += [index for index in written if index is not None]
            else:
                ids += self._write_text(text, start and not ids)
        return ids

    def _is_announced(self, piece: bytes) -> bool:
        """Whether a space stands by itself before a word's first bytes: before nothing, and before no character."""
        if self.spelling.kind != "metaspace" or not self.spelling.dummy_space:
            return False
        return not piece or bool(_characters(piece)[0][1])

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
            begins = position > 0 or start or not in_word(word[0])
            ids += self._tokenize(word) if begins else self._continue(word)
        return ids

    def _continue(self, word: str) -> list[int]:
        """Cut greedily into the longest pieces, as WordPiece does, from the middle of a word on."""
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
        words = [text] if self.cut is None else [word for word, _ in self.cut.pre_tokenize_str(text)]
        try:
            return [token.id for word in words if word for token in self.backend.model.tokenize(word)]
        except Exception as error:  # the library raises a bare exception if its unknown token is not in the vocabulary
            raise ModelError(
                f"The tokenizer of the augmenting model must have a token for what it does not know, but it fails at "
                f"{text!r} ({str(error).strip().rstrip('.')}): give it an unknown token."
            ) from error


def _rewriting(parts: list[dict[str, Any]]) -> Any:
    """Those normalizers that change characters one by one (case, accents, compatibility forms), or None."""
    space = {"String": " "}  # which becomes the mark, as everywhere
    parts = [
        each
        for each in parts
        if each["type"] in REWRITING or (each["type"] == "Replace" and each.get("pattern") != space)
    ]
    if not parts:
        return None
    return part("normalizer", {"type": "Sequence", "normalizers": parts})


def _cutting(data: dict[str, Any]) -> Any:
    """What cuts a text into the tokens of a vocabulary of whole words, or None for models that cut by themselves."""
    parts = [each for each in flat(data["pre_tokenizer"], "pretokenizers") if each["type"] in CUTTING]
    if data["model"]["type"] != "WordLevel" or not parts:
        return None
    return part("pre_tokenizer", {"type": "Sequence", "pretokenizers": parts})


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
