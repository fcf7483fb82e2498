"""What each augmenting model brings into a composition: how it reads, where it is connected, how it speaks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from calmlm.bases.families import Backbone
from calmlm.bases.heads import check_last_state, head_scale
from calmlm.composing.aligning import aligned_count, check_alignable, middle
from calmlm.composing.given_models import is_decoder
from calmlm.composing.manner import Manner, of_one
from calmlm.config import ALIGNED, NONE, ConnectorConfig, resolve_connections
from calmlm.connectors import CONNECTORS
from calmlm.errors import ConfigError
from calmlm.readers.matching import align, opening_entry
from calmlm.readers.speaking import WORDS_BIAS, AnchorWords, check_grows, check_pointer, check_words, word_map
from calmlm.tokens.alignment import Alignment
from calmlm.tokens.retokenization import Rewriting
from calmlm.tokens.vocabularies import with_firsts


@dataclass(frozen=True)
class Anchor:
    """The anchor, as augmenting models are joined to it."""

    model: PreTrainedModel
    backbone: Backbone
    tokenizer: PreTrainedTokenizerBase | None
    words: AnchorWords


@dataclass
class Contribution:
    """What one augmenting model brings.

    Attributes:
        model: itself.
        entry: what the composition's configuration says of it.
        alignment: how it reads the anchor's text in tokens of its own; None where it does not.
        map: of its words, (D_B, D_A) and (D_B,); None where it has none.
        searched: how many connections are to be looked for; None where they were named.
    """

    model: PreTrainedModel
    entry: dict[str, Any]
    alignment: Alignment | Rewriting | None = None
    map: tuple[Tensor, Tensor] | None = None
    searched: int | None = None


def contribution_of(
    name: str,
    role: str,
    model: PreTrainedModel,
    entry: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase | None,
    anchor: Anchor,
    manner: Manner,
    layers_path: str | None,
) -> Contribution:
    """What an augmenting model brings, joined to the anchor in this manner.

    Args:
        name: of the model, by which the manner may say something of it alone.
        role: what to call it in messages.
        model: the model.
        entry: what is recorded of the model itself.
        tokenizer: its own.
        anchor: what it is joined to.
        manner: how.
        layers_path: where its layers are, if they are not found by themselves.

    Raises:
        ConfigError: for what does not fit this model.
        ModelError: for a model or tokenizers that cannot be composed.
    """
    brought = Contribution(model, entry)
    if is_decoder(model):
        backbone = Backbone.of(model, role, layers_path)
        backbone.probe(role)
        _reads_text(brought, name, backbone, tokenizer, anchor, manner)
    else:
        backbone = Backbone.of_encoder(model, role, layers_path)
        _reads_inputs(brought, role, backbone, manner)
    wanted = of_one(manner.connections, name, "every-4")
    sizes = len(backbone.layers), len(anchor.backbone.layers)
    if isinstance(wanted, str) and wanted.startswith(ALIGNED):
        brought.searched = aligned_count(wanted)
        pairs = middle(*sizes, brought.searched)
    else:
        pairs = resolve_connections(wanted, *sizes)
    words = of_one(manner.words, name)
    if words is not None:
        _speaks(brought, words, bool(pairs), role, backbone, anchor, manner)
    elif not pairs:
        raise ConfigError(
            f"connections={NONE!r} needs words, by which the {role} speaks, but got none: set words='map' or "
            f"'pointer', or give connections."
        )
    entry["connections"] = [list(pair) for pair in pairs]
    entry["connector"] = _connector(brought, bool(pairs), role, anchor, manner)
    return brought


def _reads_text(
    brought: Contribution,
    name: str,
    backbone: Backbone,
    tokenizer: PreTrainedTokenizerBase | None,
    anchor: Anchor,
    manner: Manner,
) -> None:
    """A decoder reads the text: in the anchor's tokens, or in its own."""
    method, view = of_one(manner.alignment, name, "own"), of_one(manner.augmenting_view, name)
    found = align(anchor.backbone, backbone, anchor.tokenizer, tokenizer, method, view)
    prefix = of_one(manner.augmenting_prefix, name)
    brought.entry |= opening_entry(anchor.tokenizer, tokenizer, found, prefix, view, backbone)
    if found is None:
        brought.entry["reads"] = "tokens" if manner.refresh else "prompt"
        return
    if not manner.refresh:
        raise ConfigError(
            "refresh=False needs models that share token ids, but the tokenizers differ: leave refresh on."
        )
    if manner.options["ingestor"] == "anchor" or of_one(manner.words, name) == "pointer":
        found = with_firsts(found, anchor.tokenizer, tokenizer)
    brought.alignment = found
    brought.entry |= {"alignment": method} | ({"view": view} if view is not None else {}) | {"reads": "text"}


def _reads_inputs(brought: Contribution, role: str, backbone: Backbone, manner: Manner) -> None:
    """An encoder reads inputs of its own."""
    brought.entry["reads"] = "inputs"
    if manner.recipe:
        raise ConfigError(
            f"plain_text alone must come with augmenting models that read text, but the {role} is an encoder: "
            f"leave plain_text out, or choose connections."
        )
    connector = manner.connector
    if connector in CONNECTORS and CONNECTORS[connector].reads_distribution and not backbone.vocab_size:
        raise ConfigError(
            f"connector={connector!r} needs an augmenting model with an output distribution, but the {role} is "
            f"an encoder without one: use 'cross_attention' or 'flamingo', or an encoder that classifies."
        )
    if manner.options["ingestor"] == "anchor":
        raise ConfigError(
            f"ingestor='anchor' needs an augmenting model that says tokens, but the {role} is an encoder: use "
            f"ingestor='learned'."
        )


def _speaks(
    brought: Contribution, words: str, connected: bool, role: str, backbone: Backbone, anchor: Anchor, manner: Manner
) -> None:
    """It speaks in the anchor's last state, or in its probabilities."""
    check_words(words, brought.entry["reads"], role)
    entry = brought.entry["words"] = {"kind": words, "bias": WORDS_BIAS if connected else 0.0}
    if words == "map":
        entry["train_map"] = bool(manner.train_map)
        brought.map = word_map(anchor.words, brought.model, backbone, brought.alignment, role)
        return
    entry["scale"] = head_scale(brought.model, backbone, role)
    check_last_state(anchor.model, anchor.backbone, "anchor")
    if brought.alignment is not None:
        check_pointer(brought.alignment, (anchor.backbone.vocab_size, backbone.vocab_size), role)


def _connector(brought: Contribution, connected: bool, role: str, anchor: Anchor, manner: Manner) -> dict[str, Any]:
    """The options of its connections, with those that the anchor decides."""
    options = manner.options | {"kind": manner.connector, "opened": manner.opened}
    options["rotary"] = options["rotary"] and brought.entry["reads"] != "prompt"
    if manner.connector == "graft":
        options["train_map"] = manner.train_map is not False
    aligned = manner.init is not None or brought.searched is not None
    if aligned:
        options = check_alignable(manner.connector, options)
    if manner.connector == "graft":
        check_grows(brought.entry["reads"], role, "a graft needs", "another connector")
        if connected and not aligned:
            raise ConfigError(
                "A graft must start from a map between both models' states, but got no init: set init='aligned' "
                "and give plain_text."
            )
    return vars(ConnectorConfig.build(options, anchor.backbone.size, anchor.backbone.num_heads))
