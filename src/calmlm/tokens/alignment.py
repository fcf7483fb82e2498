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
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from calmlm.tokens.collecting import without_collector
from calmlm.tokens.pieces import Writer
from calmlm.tokens.spelling import BYTE_TOKEN, Spelling, in_word, token_bytes

ROLES = ("eos_token", "bos_token", "sep_token", "cls_token", "mask_token", "unk_token", "pad_token")
VERSION = "2:"
"""What digests begin with; those of the first version begin with nothing."""
LOOKBACK = 3
"""A character of UTF-8 has at most four bytes, so the three tokens before one decide what its first bytes complete."""


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
        digest: sha256 over both tokenizers, and with a view over their chat templates.
        firsts: for each augmenting id, the anchor's first token of its bytes, None where it has none; empty where no
            connector asks for them.
    """

    body: list[list[int]]
    start: dict[int, list[int]]
    opens: list[int]
    partial: dict[int, bytes]
    characters: dict[str, list[int]]
    unknown: list[int]
    fill: int
    digest: str
    firsts: list[int | None] = dataclasses.field(default_factory=list)

    @classmethod
    @without_collector()
    def between(cls, anchor: PreTrainedTokenizerBase, augmenting: PreTrainedTokenizerBase) -> Alignment:
        """Make the table from the anchor's tokenizer to the augmenting model's.

        Raises:
            ModelError: when one of them cannot be read, or the augmenting tokenizer cannot write the anchor's text.
        """
        writer, spelling = Writer(augmenting), Spelling.of(anchor, "anchor")
        pieces = token_bytes(anchor, "anchor")
        roles, shared = _special_ids(anchor, augmenting), shared_tokens(anchor, augmenting)
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
            if index in shared:
                body.append([shared[index]])
                if not in_word(piece.decode(errors="ignore")[-1:]):
                    opens.append(index)
                continue
            ids = writer.write(piece)
            if ids is None:
                partial[index], ids = piece, []
            body.append(ids)
            if index not in partial and not in_word(piece.decode(errors="ignore")[-1:]):
                opens.append(index)
            first = writer.write(piece.removeprefix(b" ") if spelling.dummy_space else piece, start=True)
            if first is not None and first != ids:
                start[index] = first
        if writer.spelling.kind != "wordpiece":
            leads = spelling if spelling.dummy_space else writer.spelling
            begin = (anchor.bos_token_id, anchor.cls_token_id)
            added = anchor.added_tokens_decoder.items()
            apart = {index for index, token in added if not BYTE_TOKEN.fullmatch(token.content)}
            apart |= {index for index, piece in enumerate(pieces) if piece is None}
            opens = sorted(i for i in apart if leads.every_segment or i in begin)
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
        """The largest augmenting id that a text may need."""
        rows = (*self.body, *self.start.values(), *self.characters.values(), self.unknown)
        return max((i for row in rows for i in row), default=-1)

    def filled(self, vocabulary: int) -> Alignment:
        """The same for a model with so many embeddings. It may lack the padding token, which attention never sees."""
        return self if self.fill < vocabulary else dataclasses.replace(self, fill=0)

    def without(self, ids: Collection[int]) -> Alignment:
        """The same where these augmenting ids are never written: what they would stand for says nothing."""

        def kept(row: list[int]) -> list[int]:
            return [index for index in row if index not in ids]

        return dataclasses.replace(
            self,
            body=[kept(row) for row in self.body],
            start={index: kept(row) for index, row in self.start.items()},
            characters={character: kept(row) for character, row in self.characters.items()},
            unknown=kept(self.unknown),
        )

    def to_json(self) -> dict[str, Any]:
        """Plain data; ``from_json`` is the inverse."""
        data = dataclasses.asdict(self)
        data["partial"] = {index: piece.hex() for index, piece in self.partial.items()}
        return data

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Alignment:
        """Read an alignment from the data that ``to_json`` gave.

        Raises:
            ValueError, KeyError, TypeError, AttributeError: the data are something else.
        """
        made = cls(
            body=[checked_ids(ids) for ids in data["body"]],
            start={int(index): checked_ids(ids) for index, ids in data["start"].items()},
            opens=checked_ids(data["opens"]),
            partial={int(index): bytes.fromhex(piece) for index, piece in data["partial"].items()},
            characters={str(character): checked_ids(ids) for character, ids in data["characters"].items()},
            unknown=checked_ids(data["unknown"]),
            fill=checked_ids([data["fill"]])[0],
            digest=str(data["digest"]),
            firsts=data.get("firsts", []),
        )
        checked_ids([index for index in made.firsts if index is not None])
        beyond = max((*made.start, *made.opens, *made.partial), default=-1)
        if beyond >= len(made.body):
            raise ValueError(f"it says nothing of token {beyond}")
        return made


def checked_ids(ids: Any) -> list[int]:
    """Return the same list if it holds token ids.

    Raises:
        ValueError: for anything but a list of whole numbers from 0 on.
    """
    if not isinstance(ids, list) or not all(type(index) is int and index >= 0 for index in ids):
        raise ValueError(f"expected a list of token ids, but found {str(ids)[:40]}")
    return ids


def shared_tokens(anchor: PreTrainedTokenizerBase, augmenting: PreTrainedTokenizerBase) -> dict[int, int]:
    """Tokens with the same content that were added to both vocabularies, special or not; no bytes spell them."""
    theirs = {token.content: index for index, token in augmenting.added_tokens_decoder.items()}
    theirs |= dict(zip(augmenting.all_special_tokens, augmenting.all_special_ids, strict=True))
    return {
        index: theirs[token.content]
        for index, token in anchor.added_tokens_decoder.items()
        if token.content in theirs and not BYTE_TOKEN.fullmatch(token.content)
    }


def without_embedding(augmenting: PreTrainedTokenizerBase, size: int) -> dict[int, str]:
    """Tokens that were added to a tokenizer and have no embedding in a model of ``size`` ids, with their content.

    Some classes of tokenizers add a token that their model has never seen (transformers' Qwen2: ``<|endoftext|>``).
    """
    return {i: token.content for i, token in augmenting.added_tokens_decoder.items() if i >= size}


def _special_ids(anchor: PreTrainedTokenizerBase, augmenting: PreTrainedTokenizerBase) -> dict[int, list[int]]:
    """Special tokens by content, then by role. A token without a counterpart gives the augmenting model nothing."""
    found = {index: [other] for index, other in shared_tokens(anchor, augmenting).items()}
    for role in ROLES:  # one token may have several roles; the first of them counts
        ours, other = getattr(anchor, f"{role}_id", None), getattr(augmenting, f"{role}_id", None)
        if ours is not None and other is not None:
            found.setdefault(ours, [other])
    return found


def digest(
    anchor: PreTrainedTokenizerBase, augmenting: PreTrainedTokenizerBase, *, templates: bool = False, old: bool = False
) -> str:
    """sha256 over both tokenizers, which shows a change of either; their last padding and truncation do not count.

    Args:
        anchor, augmenting: the tokenizers.
        templates: whether their chat templates matter.
        old: whether it is compared with one that says no version, which took longer.
    """
    mark = hashlib.sha256()
    for tokenizer in (anchor, augmenting):
        # The padding token has no meaning, and users often set it by hand.
        roles = {role: getattr(tokenizer, f"{role}_id", None) for role in ROLES if role != "pad_token"}
        rest = {"roles": roles, "template": tokenizer.chat_template if templates else None}
        saved = tokenizer.backend_tokenizer.to_str()
        if old:
            data = json.loads(saved) | {"padding": None, "truncation": None} | rest
            mark.update(json.dumps(data, sort_keys=True).encode())
        else:
            mark.update(saved[saved.index('"added_tokens":') :].encode())  # padding and truncation stand before it
            mark.update(json.dumps(rest, sort_keys=True).encode())
    return mark.hexdigest() if old else VERSION + mark.hexdigest()


def is_of(mark: str, anchor: PreTrainedTokenizerBase, augmenting: PreTrainedTokenizerBase, *, templates: bool) -> bool:
    """Whether a ``digest`` of any version is that of these tokenizers."""
    return mark == digest(anchor, augmenting, templates=templates, old=not mark.startswith(VERSION))
