"""``compose``: pretrained language models in, one composition out."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from transformers import GenerationMixin, PreTrainedModel, PreTrainedTokenizerBase

from calmlm.bases.families import Backbone, text_config
from calmlm.bases.fingerprint import fingerprint
from calmlm.bases.opening import load_anchor, load_any
from calmlm.bases.origins import Origin, check_whole, expanded, named_origin, origin_in_memory
from calmlm.causal_lm import CalmForCausalLM
from calmlm.config import CalmConfig, ConnectorConfig, check_names, resolve_connections
from calmlm.connectors import CONNECTORS
from calmlm.errors import ConfigError, ModelError
from calmlm.tokens.alignment import Alignment, without_embedding
from calmlm.tokens.beginning import Prefix, beginning_of, prefix_ids
from calmlm.tokens.lookup import find_tokenizer
from calmlm.tokens.retokenization import METHODS, Rewriting
from calmlm.tokens.views import VIEWS

DEFAULT_NAME = "augmenting"
NOT_RECORDED = frozenset(
    ("subfolder", "variant", "gguf_file", "config", "key_mapping", "ignore_mismatched_sizes", "adapter_kwargs")
)
"""Options of ``from_pretrained`` that make another model of what lies at an id, as all settings of its configuration
do, except the following."""
FREE = frozenset(("dtype", "quantization_config"))

Source: TypeAlias = str | Path | PreTrainedModel
Choice: TypeAlias = str | Mapping[str, str]
Connections: TypeAlias = str | int | Sequence[Sequence[int]]


def compose(
    anchor: Source,
    augmenting: Source | Mapping[str, Source],
    connections: Connections | Mapping[str, Connections] = "every-4",
    num_heads: int | None = None,
    *,
    norm: bool = True,
    gate: bool = False,
    rotary: bool = False,
    query_key_bias: float | None = None,
    null_key: bool = False,
    rank: int | None = None,
    connector: str = "cross_attention",
    refresh: bool = True,
    alignment: Choice = "transcode",
    augmenting_view: Choice | None = None,
    augmenting_prefix: Prefix | Mapping[str, Prefix] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    augmenting_tokenizer: PreTrainedTokenizerBase | Mapping[str, PreTrainedTokenizerBase] | None = None,
    dtype: torch.dtype | str | None = None,
    composition_dtype: torch.dtype = torch.float32,
    device_map: Any = None,
    revision: str | None = None,
    augmenting_revision: str | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    layers_path: str | None = None,
    augmenting_layers_path: str | None = None,
    **load_options: Any,
) -> CalmForCausalLM:
    """Join a frozen anchor and frozen augmenting models by trainable cross-attentions.

    The result starts out as the anchor, bit for bit; only the connections train.

    Args:
        anchor: the large model m_B: a hub id, a folder or a loaded causal language model. One that was changed after it
            was loaded has no name by which the composition could load it again: save it first, or pass it each time.
        augmenting: the small model m_A, likewise; or several, by name. A named model without a language-modelling head
            (a text, image or sound encoder) reads ``augmenting_inputs`` of its own instead of the text.
        connections: ``"every-4"`` (the paper's), ``"top"``, a number, or pairs ``(augmenting_layer, anchor_layer)``,
            0-based: the output of the first layer is read into the output of the second. See
            ``calmlm.config.resolve_connections``. Several augmenting models may have their own, by name.
        num_heads: heads of the cross-attentions; by default the anchor's own number.
        norm, gate, rotary, query_key_bias, null_key, rank: connector options, see ``calmlm.config.ConnectorConfig``.
        connector: ``"cross_attention"`` (CALM), ``"flamingo"`` or ``"legonn"``, see ``calmlm.connectors``.
        refresh: whether augmenting decoders read generated tokens too; False is the paper's ablation "m_A as encoder".
        tokenizer, augmenting_tokenizer: the models' tokenizers. Those that lie beside a model's id are found by
            themselves; two models without tokenizers are taken to share token ids if their vocabularies are equally
            large. Where the tokenizers differ, the augmenting model reads the same bytes in its own tokens.
        alignment: how an augmenting model with another tokenizer reads: ``"transcode"`` writes each of the anchor's
            tokens in its own, ``"own"`` gives it at every position the tokens that its tokenizer gives to the text so
            far, ``"retokenize"`` these as soon as no continuation can change them. Several augmenting models may have
            their own, by name.
        augmenting_view: what an augmenting model reads of a conversation in the anchor's chat template: None for all of
            it, ``"bare"`` for the messages' content alone, ``"template"`` for the messages in its own chat template.
            Several augmenting models may have their own, by name.
        augmenting_prefix: what an augmenting model alone reads before each text: an instruction, or a few examples. A
            text, or messages for its chat template. Several augmenting models may have their own, by name.
        dtype: dtype of the base models, ``"auto"`` by default for ids and folders.
        composition_dtype: dtype of the connections.
        device_map, attn_implementation, trust_remote_code: passed to all ``from_pretrained`` calls; remote code is off
            by default.
        revision, augmenting_revision: which revision of the anchor and of the augmenting models to load.
        layers_path, augmenting_layers_path: where a model's layers are, if they are not found by themselves.
        load_options: passed to all ``from_pretrained`` calls as well (``token``, ``quantization_config``, ...); those
            that make another model of what lies at an id (``variant``, settings of its configuration) are refused.

    Returns:
        the composition, in evaluation mode.

    Raises:
        ConfigError: for names, connections or options that do not fit.
        ModelError: for a model that cannot be loaded or composed or has adapters, or tokenizers that cannot be aligned.
    """
    shared = {"dtype": dtype, "device_map": device_map, "attn_implementation": attn_implementation, **load_options}
    shared["trust_remote_code"] = trust_remote_code
    sources = dict(augmenting) if isinstance(augmenting, Mapping) else {DEFAULT_NAME: augmenting}
    check_names(sources)
    by_name = {
        "connections": connections,
        "alignment": alignment,
        "augmenting_view": augmenting_view,
        "augmenting_prefix": augmenting_prefix,
        "augmenting_tokenizer": augmenting_tokenizer,
    }
    for argument, given in by_name.items():
        unknown = sorted(set(given) - set(sources)) if isinstance(given, Mapping) else []
        if unknown:
            raise ConfigError(
                f"{argument} must name augmenting models ({', '.join(sources)}), but got {', '.join(unknown)}: use "
                f"their names."
            )
    _check_options(sorted(set(load_options) & NOT_RECORDED))
    if load_options and not any(_is_name(source) for source in (anchor, *sources.values())):
        raise ConfigError(
            f"Options beyond compose's own may only go to models that are loaded here, but all are loaded already and "
            f"got {', '.join(sorted(load_options))}: check the spelling or leave them out."
        )
    hub: dict[str, Any] = {key: shared[key] for key in ("token", "cache_dir", "local_files_only") if key in shared}
    remote = {**hub, "trust_remote_code": trust_remote_code}
    anchor_model, origin = _opened(anchor, "anchor", load_anchor, revision, hub, shared)
    anchor_backbone = Backbone.of(anchor_model, "anchor", layers_path)
    anchor_entry = _entry(anchor_model, origin, layers_path)  # before it runs: RWKV scales its weights then
    anchor_backbone.probe("anchor")
    if tokenizer is None:
        tokenizer = _tokenizer_of(anchor_model, origin, **remote)

    models: dict[str, PreTrainedModel] = {}
    entries: dict[str, dict[str, Any]] = {}
    alignments: dict[str, Alignment | Rewriting] = {}
    for name, source in sources.items():
        role = "augmenting model" if len(sources) == 1 else f"augmenting model {name!r}"
        model, origin = _opened(source, role, load_any, augmenting_revision, hub, shared)
        named = isinstance(augmenting, Mapping)
        if not isinstance(model, PreTrainedModel) or (not named and not is_decoder(model)):
            # Says what is wrong with it; an encoder's inputs come by name, so the encoder itself has to.
            Backbone.of(model, role, augmenting_layers_path)
        if any(model is other for other in (anchor_model, *models.values())):
            raise ModelError(
                f"The {role} must be a model of its own, but got one model twice: "
                f"load it a second time to compose it with itself."
            )
        entry = _entry(model, origin, augmenting_layers_path)
        if is_decoder(model):
            backbone = Backbone.of(model, role, augmenting_layers_path)
            backbone.probe(role)
            theirs = (
                augmenting_tokenizer.get(name) if isinstance(augmenting_tokenizer, Mapping) else augmenting_tokenizer
            )
            if theirs is None:
                theirs = _tokenizer_of(model, origin, **remote)
            method = alignment.get(name, "transcode") if isinstance(alignment, Mapping) else alignment
            view = augmenting_view.get(name) if isinstance(augmenting_view, Mapping) else augmenting_view
            found = align(anchor_backbone, backbone, tokenizer, theirs, method, view)
            prefix = augmenting_prefix.get(name) if isinstance(augmenting_prefix, Mapping) else augmenting_prefix
            entry |= _opening(tokenizer, theirs, found, prefix, view, backbone)
            if found is not None:
                alignments[name] = found
                entry |= {"alignment": method} | ({"view": view} if view is not None else {})
            entry["reads"] = "text" if found is not None else "tokens"
            if not refresh:
                if found is not None:
                    raise ConfigError(
                        "refresh=False needs models that share token ids, but the tokenizers differ: leave refresh on."
                    )
                entry["reads"] = "prompt"
        else:
            backbone = Backbone.of_encoder(model, role, augmenting_layers_path)
            entry["reads"] = "inputs"
            if connector in CONNECTORS and CONNECTORS[connector].reads_distribution and not backbone.vocab_size:
                raise ConfigError(
                    f"connector={connector!r} needs an augmenting model with an output distribution, but the {role} is "
                    f"an encoder without one: use 'cross_attention' or 'flamingo', or an encoder that classifies."
                )
        wanted = connections.get(name, "every-4") if isinstance(connections, Mapping) else connections
        pairs = resolve_connections(wanted, len(backbone.layers), len(anchor_backbone.layers))
        options = {
            "num_heads": num_heads,
            "norm": norm,
            "gate": gate,
            "rotary": rotary and entry["reads"] != "prompt",
            "query_key_bias": query_key_bias,
            "null_key": null_key,
            "rank": rank,
            "kind": connector,
        }
        entry["connections"] = [list(pair) for pair in pairs]
        entry["connector"] = vars(ConnectorConfig.build(options, anchor_backbone.size, anchor_backbone.num_heads))
        models[name], entries[name] = model, entry

    config = CalmConfig(
        text_config=text_config(anchor_model),
        anchor=anchor_entry,
        augmenting=entries,
    )
    composed = CalmForCausalLM(config, anchor_model, models, alignments)
    composed.model.connectors.to(composition_dtype)
    return composed.eval()


def _is_name(source: Any) -> bool:
    return isinstance(source, (str, Path))


def is_decoder(model: PreTrainedModel) -> bool:
    """Whether an augmenting model reads text as the anchor does, rather than inputs of its own."""
    speaks = isinstance(model, GenerationMixin) and model.get_output_embeddings() is not None
    return speaks and not model.config.is_encoder_decoder


def _check_options(given: list[str]) -> None:
    """Raise for options that change what lies at an id, which nobody would know of when the composition is loaded.

    Raises:
        ConfigError: naming them.
    """
    if given:
        raise ConfigError(
            f"A model must be all that lies at its id or folder, but {', '.join(given)} would change that: save the "
            f"model that you want with save_pretrained, and compose from its own folder."
        )


def _opened(
    source: Any, role: str, load: Callable[..., PreTrainedModel], revision: str | None, hub: Any, shared: Any
) -> tuple[Any, Origin]:
    """A base model, loaded where it is named, and its origin."""
    if not _is_name(source):
        check_whole(source, role)
        if not isinstance(source, PreTrainedModel):
            return source, ("", None)  # Backbone says what is wrong with it
        origin, certain = origin_in_memory(source, revision)
        if not certain:
            warnings.warn(
                f"The {role} in memory is called {origin[0]!r}, which is neither a folder here nor in the hub's cache: "
                f"pass its id or full path itself, or loading the composition may not find it.",
                stacklevel=3,
            )
        return source, origin
    name = expanded(source)
    origin = named_origin(name, revision, **hub)
    model = load(name, role, revision=origin[1], **shared)
    given = {key for key, value in shared.items() if value is not None and key not in FREE}
    _check_options(sorted(given & set(model.config.to_dict())))
    return model, origin


def _entry(model: PreTrainedModel, origin: Origin, layers_path: str | None) -> dict[str, Any]:
    entry = {"id": origin[0], "revision": origin[1], "fingerprint": fingerprint(model)}
    return entry | ({"layers_path": layers_path} if layers_path else {})


def _tokenizer_of(model: PreTrainedModel, origin: Origin, **options: Any) -> PreTrainedTokenizerBase | None:
    """The tokenizer that lies where a model lies, or where a model in memory came from; None where there is none."""
    source, revision = origin if origin[0] else (model.name_or_path, None)
    return find_tokenizer(source, revision=revision, **options) if source else None


def _opening(
    tokenizer: PreTrainedTokenizerBase | None,
    augmenting_tokenizer: PreTrainedTokenizerBase | None,
    alignment: Alignment | Rewriting | None,
    prefix: Prefix | None,
    view: str | None,
    backbone: Backbone,
) -> dict[str, Any]:
    """What an augmenting model reads before each text, as a part of its entry."""
    own = augmenting_tokenizer if augmenting_tokenizer is not None else (tokenizer if alignment is None else None)
    if prefix is not None and own is None:
        raise ConfigError(
            "augmenting_prefix needs the augmenting model's tokenizer, but there is none: pass augmenting_tokenizer."
        )
    method = getattr(alignment, "method", "transcode")
    beginning = beginning_of(augmenting_tokenizer) if augmenting_tokenizer is not None else []
    if method != "own" and tokenizer is not None:
        # The anchor's tokens may bring a beginning themselves; a view writes one.
        theirs = beginning_of(tokenizer)
        brought = theirs if alignment is None else [i for index in theirs for i in _table(alignment).body[index]]
        beginning = [] if view is not None or (beginning and brought[: len(beginning)] == beginning) else beginning
    ids = [] if prefix is None or own is None else prefix_ids(own, prefix)
    if max([*beginning, *ids], default=-1) >= backbone.vocab_size:
        beginning = [index for index in beginning if index < backbone.vocab_size]
        ids = [index for index in ids if index < backbone.vocab_size]
    return ({"beginning": beginning} if beginning else {}) | ({"prefix": ids} if ids else {})


def _table(alignment: Alignment | Rewriting) -> Alignment:
    return alignment if isinstance(alignment, Alignment) else alignment.alignment


def align(
    anchor: Backbone,
    augmenting: Backbone,
    tokenizer: PreTrainedTokenizerBase | None,
    augmenting_tokenizer: PreTrainedTokenizerBase | None,
    method: str = "transcode",
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
                    warnings.warn(
                        "The augmenting model cannot take back what it has read, so that it reads generated text in "
                        "the anchor's pieces; text that is given it reads in its own tokens.",
                        stacklevel=3,
                    )
            found = found.filled(augmenting.vocab_size)
            if beyond and found.highest >= augmenting.vocab_size:
                found = found.without(beyond)
                warnings.warn(
                    f"{_some(list(beyond.values()))} of the augmenting tokenizer has no embedding in its model "
                    f"({augmenting.vocab_size} embeddings): the augmenting model reads nothing where it stands.",
                    stacklevel=3,
                )
            if isinstance(found, Rewriting) and found.late:
                warnings.warn(
                    "The augmenting tokenizer has tokens that reach across the ends of words, so that with "
                    "alignment='retokenize' its model hardly reads anything before a text ends: use 'transcode'.",
                    stacklevel=3,
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


def _some(contents: list[str]) -> str:
    """A few tokens by their contents, for a message."""
    shown = ", ".join(repr(content) for content in contents[:3])
    return f"The token {shown}" if len(contents) == 1 else f"Each of {len(contents)} tokens ({shown}, ...)"
