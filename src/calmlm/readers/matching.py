"""How an augmenting model will read: the alignment of two tokenizers, its beginning and its prefix."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

from calmlm.bases.families import Backbone
from calmlm.errors import ConfigError, ModelError, warn
from calmlm.readers.preamble import check_opening
from calmlm.tokens.alignment import Alignment, without_embedding
from calmlm.tokens.beginning import Prefix, beginning_of, prefix_ids
from calmlm.tokens.retokenization import METHODS, Rewriting
from calmlm.tokens.views import VIEWS


def align(
    anchor: Backbone,
    augmenting: Backbone,
    tokenizer: PreTrainedTokenizerBase | None,
    augmenting_tokenizer: PreTrainedTokenizerBase | None,
    method: str = "own",
    view: str | None = None,
) -> Alignment | Rewriting | None:
    """The alignment between two models' tokenizers; None where they share token ids and see the same text.

    Raises:
        ConfigError: for an unknown method or view.
        ModelError: when a tokenizer or a chat template is missing or cannot be read.
    """
    if method not in METHODS:
        raise ConfigError(f"alignment must be one of {', '.join(METHODS)}, but got {method!r}: use one of these.")
    if view is not None and view not in VIEWS:
        raise ConfigError(
            f"augmenting_view must be one of {', '.join(VIEWS)}, or None for all of the text, but got {view!r}: use "
            f"one of these."
        )
    for given in (tokenizer, augmenting_tokenizer):
        if given is not None and not isinstance(given, PreTrainedTokenizerBase):
            raise ModelError(
                f"tokenizer and augmenting_tokenizer must be tokenizers of transformers, but got "
                f"{type(given).__name__}: load them with AutoTokenizer."
            )
    if tokenizer is not None and augmenting_tokenizer is not None:
        beyond = without_embedding(augmenting_tokenizer, augmenting.vocab_size)
        one_vocabulary = tokenizer.get_vocab() == augmenting_tokenizer.get_vocab()
        if view is not None or not one_vocabulary or (beyond and augmenting.vocab_size < anchor.vocab_size):
            found: Alignment | Rewriting
            if view is None and method == "transcode":
                found = Alignment.between(tokenizer, augmenting_tokenizer)
            else:
                found = Rewriting.between(tokenizer, augmenting_tokenizer, method, view)
                if method == "own" and not augmenting.branches:
                    warn(
                        "The augmenting model cannot take back what it has read, so that it reads generated text in "
                        "the anchor's pieces; text that is given it reads in its own tokens."
                    )
            found = found.filled(augmenting.vocab_size)
            if beyond and found.highest >= augmenting.vocab_size:
                found = found.without(beyond)
                warn(
                    f"{_some(list(beyond.values()))} of the augmenting tokenizer has no embedding in its model "
                    f"({augmenting.vocab_size} embeddings): the augmenting model reads nothing where it stands."
                )
            if isinstance(found, Rewriting) and found.late:
                warn(
                    "The augmenting tokenizer has tokens that reach across the ends of words, so that with "
                    "alignment='retokenize' its model hardly reads anything before a text ends: use 'transcode'."
                )
            if found.highest >= augmenting.vocab_size:
                raise ModelError(
                    f"The augmenting tokenizer's ids must lie below {augmenting.vocab_size}, the vocabulary of its "
                    f"model, but the text needs {found.highest}: pass that model's own tokenizer, or resize the "
                    f"model's embeddings."
                )
            return found
        if augmenting.vocab_size >= len(tokenizer):
            return None
    if view is not None:
        raise ModelError(
            "augmenting_view needs the tokenizers of both models, but one of them is missing: pass tokenizer and "
            "augmenting_tokenizer."
        )
    if anchor.vocab_size != augmenting.vocab_size:
        raise ModelError(
            f"The anchor and the augmenting model must share token ids or come with tokenizers, but their vocabularies "
            f"have {anchor.vocab_size} and {augmenting.vocab_size} entries: pass tokenizer and augmenting_tokenizer."
        )
    return None


def opening_entry(
    tokenizer: PreTrainedTokenizerBase | None,
    augmenting_tokenizer: PreTrainedTokenizerBase | None,
    alignment: Alignment | Rewriting | None,
    prefix: Prefix | None,
    view: str | None,
    backbone: Backbone,
) -> dict[str, Any]:
    """What an augmenting model reads before each text, as a part of its entry.

    Raises:
        ConfigError: for a prefix that it has no tokens or no positions for.
    """
    own = augmenting_tokenizer if augmenting_tokenizer is not None else (tokenizer if alignment is None else None)
    method = getattr(alignment, "method", "transcode")
    beginning = beginning_of(augmenting_tokenizer) if augmenting_tokenizer is not None else []
    if method != "own" and tokenizer is not None:
        # The anchor's tokens may bring a beginning themselves; a view writes one.
        theirs = beginning_of(tokenizer)
        brought = theirs if alignment is None else [i for index in theirs for i in _table(alignment).body[index]]
        beginning = [] if view is not None or (beginning and brought[: len(beginning)] == beginning) else beginning
    ids = [] if prefix is None else prefix_ids(own, prefix)
    beginning = [index for index in beginning if index < backbone.vocab_size]  # tokenizers may have more
    check_opening("the augmenting model", backbone, beginning, ids)
    return ({"beginning": beginning} if beginning else {}) | ({"prefix": ids} if ids else {})


def _table(alignment: Alignment | Rewriting) -> Alignment:
    return alignment if isinstance(alignment, Alignment) else alignment.alignment


def _some(contents: list[str]) -> str:
    """A few tokens by their contents, for a message."""
    shown = ", ".join(repr(content) for content in contents[:3])
    return f"The token {shown}" if len(contents) == 1 else f"Each of {len(contents)} tokens ({shown}, ...)"
