"""What an augmenting model reads if a table from token to token is not enough, as data.

``retokenize`` gives the augmenting model the tokens that its tokenizer gives to the text, but only up to the last
boundary that no continuation can move. A *view* leaves the anchor's chat template out, or puts the augmenting model's
own in its place.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from calmlm.tokens.alignment import Alignment, checked_ids, digest, shared_tokens
from calmlm.tokens.beginning import beginning_of
from calmlm.tokens.boundaries import stable_pairs
from calmlm.tokens.collecting import without_collector
from calmlm.tokens.parts import literal, read_backend, remember
from calmlm.tokens.spelling import Spelling, token_bytes
from calmlm.tokens.views import Template, speaker_of

METHODS = ("own", "transcode", "retokenize")


@dataclass(frozen=True)
class Rewriting:
    """Everything that writing the stream needs, as data.

    Attributes:
        alignment: the table from token to token, and the roles of special tokens in it.
        method: ``"own"``, ``"transcode"`` or ``"retokenize"``.
        view: None, ``"bare"`` or ``"template"``.
        pieces: the bytes of the anchor's tokens, None for special ones.
        tokenizer: the augmenting tokenizer, as the tokenizers library saves it.
        unknown: its token for what it cannot write, or None.
        stable: pairs of classes of characters between which no token of its reaches across.
        anchor_template: what encloses messages in the anchor's chat template, with a view.
        own_template: the same for the augmenting tokenizer, in its ids, with the view ``"template"``.
        begin: its token for the beginning of a text, or None.
        dummy: whether the anchor's first token of a text carries a space that is not in the text, and whether its first
            token after any special one does so as well.
        beginning: the special tokens that the augmenting tokenizer puts before a text. Its model reads them before this
            stream. If a text brings them itself, they are not written again.
    """

    alignment: Alignment
    method: str
    view: str | None
    pieces: list[bytes | None]
    tokenizer: str
    unknown: str | None
    stable: list[tuple[str, str]]
    anchor_template: Template | None
    own_template: Template | None
    begin: int | None
    dummy: tuple[bool, bool]
    beginning: list[int] = dataclasses.field(default_factory=list)

    @classmethod
    @without_collector()
    def between(
        cls,
        anchor: PreTrainedTokenizerBase,
        augmenting: PreTrainedTokenizerBase,
        method: str,
        view: str | None,
    ) -> Rewriting:
        """Prepare the stream from the anchor's tokenizer to the augmenting model's.

        Raises:
            ModelError: when a tokenizer cannot be read, or a chat template that the view needs is missing.
        """
        alignment = Alignment.between(anchor, augmenting)
        if view is not None:
            alignment = dataclasses.replace(alignment, digest=digest(anchor, augmenting, templates=True))
        pieces = token_bytes(anchor, "anchor")
        # A token that both tokenizers have is not text. If it is not special, its own tokenizer finds it in a text.
        special = {index for index, token in augmenting.added_tokens_decoder.items() if token.special}
        for index, other in shared_tokens(anchor, augmenting).items():
            if method == "transcode" or other in special:
                pieces[index] = None
        ours = theirs = None
        if view is not None:
            ours = Template.of(anchor, pieces, "anchor")
        if view == "template":
            own = token_bytes(augmenting, "augmenting model")
            theirs = Template.in_ids(augmenting, own, "augmenting model")
        stable = sorted(stable_pairs(augmenting)) if method != "transcode" else []
        spelling = Spelling.of(anchor, "anchor")
        backend = augmenting.backend_tokenizer
        saved = backend.to_str()
        remember(saved, literal(backend))
        begins = augmenting.bos_token_id is not None and augmenting("a").input_ids[:1] == [augmenting.bos_token_id]
        return cls(
            alignment=alignment,
            method=method,
            view=view,
            pieces=pieces,
            tokenizer=saved,
            unknown=augmenting.unk_token,
            stable=stable,
            anchor_template=ours,
            own_template=theirs,
            begin=augmenting.bos_token_id if begins and method != "own" else None,
            dummy=(spelling.dummy_space, spelling.every_segment),
            beginning=beginning_of(augmenting) if method == "own" else [],
        )

    @property
    def highest(self) -> int:
        """The largest augmenting id that a text may need: special tokens come from the table and the template alone."""
        backend = read_backend(self.tokenizer)
        special = {index for index, token in backend.get_added_tokens_decoder().items() if token.special}
        own = self.own_template
        rows = () if own is None else (*own.openings.values(), *own.closings.values(), *own.beginnings.values())
        ids = (set(backend.get_vocab().values()) - special).union(*rows, () if self.begin is None else (self.begin,))
        return max((self.alignment.highest, *ids))

    @property
    def late(self) -> bool:
        """Whether tokens reach across the ends of words, so that hardly anything is read before a text ends."""
        ends = {("letter", "space"), ("space", "letter")}  # an end-of-word mark leaves the second only
        return self.method == "retokenize" and not ends & set(self.stable)

    def filled(self, vocabulary: int) -> Rewriting:
        """See ``Alignment.filled``."""
        return dataclasses.replace(self, alignment=self.alignment.filled(vocabulary))

    def without(self, ids: Collection[int]) -> Rewriting:
        """See ``Alignment.without``."""
        saved = json.loads(self.tokenizer)
        gone = {token["content"] for token in saved["added_tokens"] if token["id"] in ids}
        saved["added_tokens"] = [token for token in saved["added_tokens"] if token["id"] not in ids]
        own = self.own_template
        if own is not None:
            openings, closings, beginnings = (
                {name: tuple(i for i in row if i not in ids) for name, row in part.items()}
                for part in (own.openings, own.closings, own.beginnings)
            )
            own = dataclasses.replace(own, openings=openings, closings=closings, beginnings=beginnings)
        return dataclasses.replace(
            self,
            alignment=self.alignment.without(ids),
            tokenizer=json.dumps(saved),
            unknown=None if self.unknown in gone else self.unknown,
            own_template=own,
            begin=None if self.begin in ids else self.begin,
        )

    @property
    def digest(self) -> str:
        """sha256 over both tokenizers."""
        return self.alignment.digest

    def to_json(self) -> dict[str, Any]:
        """Plain data; ``from_json`` is the inverse."""
        return {
            "method": self.method,
            "view": self.view,
            "alignment": self.alignment.to_json(),
            "pieces": [None if piece is None else piece.hex() for piece in self.pieces],
            "tokenizer": json.loads(self.tokenizer),
            "unknown": self.unknown,
            "stable": [list(pair) for pair in self.stable],
            "anchor_template": None if self.anchor_template is None else vars(self.anchor_template),
            "own_template": None if self.own_template is None else vars(self.own_template),
            "begin": self.begin,
            "dummy": list(self.dummy),
            "beginning": self.beginning,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Rewriting:
        """What ``to_json`` gave."""
        if data["method"] not in METHODS:
            raise ValueError(f"unknown method {data['method']!r}")
        saved = json.dumps(data["tokenizer"])
        read_backend(saved)
        return cls(
            alignment=Alignment.from_json(data["alignment"]),
            method=data["method"],
            view=data["view"],
            pieces=[None if piece is None else bytes.fromhex(piece) for piece in data["pieces"]],
            tokenizer=saved,
            unknown=_text_or_none(data["unknown"]),
            stable=[(_text(left), _text(right)) for left, right in data["stable"]],
            anchor_template=_template(data["anchor_template"]),
            own_template=_template(data["own_template"]),
            begin=None if data["begin"] is None else checked_ids([data["begin"]])[0],
            dummy=(bool(data["dummy"][0]), bool(data["dummy"][1])),
            beginning=checked_ids(data.get("beginning", [])),
        )


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is no text")
    return value


def _text_or_none(value: Any) -> str | None:
    return None if value is None else _text(value)


def _template(data: dict[str, dict[str, Any]] | None) -> Template | None:
    if data is None:
        return None
    symbols = {
        part: {role: tuple(checked_ids(row)) for role, row in data[part].items()}
        for part in ("openings", "closings", "beginnings")
    }
    tails = {role: [tuple(checked_ids(row)) for row in rows] for role, rows in data["tails"].items()}
    unclosed = {speaker_of(name) for name in symbols["openings"]} - set(symbols["closings"])
    if unclosed:
        raise ValueError(f"nothing closes the messages of {sorted(unclosed)[0]}")
    return Template(**symbols, tails=tails)
