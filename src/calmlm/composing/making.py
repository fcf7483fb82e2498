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
from calmlm.bases.forms import SAME, Form, forms, recorded
from calmlm.bases.heads import check_last_state, head_scale
from calmlm.bases.opening import load_anchor, load_any
from calmlm.bases.origins import Origin, check_whole, expanded, named_origin, origin_in_memory
from calmlm.causal_lm import CalmForCausalLM
from calmlm.composing.aligning import aligned_count, check_alignable, middle, search, start_aligned
from calmlm.composing.low_rank import build_adapters
from calmlm.config import ALIGNED, NONE, CalmConfig, ConnectorConfig, check_names, resolve_connections, split_gguf
from calmlm.connectors import CONNECTORS
from calmlm.connectors.adapters import Adapters
from calmlm.connectors.word_map import WordMap
from calmlm.errors import ConfigError, ModelError
from calmlm.readers.matching import align, opening_entry
from calmlm.readers.speaking import WORDS_BIAS, AnchorWords, check_grows, check_pointer, check_words, word_map
from calmlm.tokens.alignment import Alignment
from calmlm.tokens.beginning import Prefix
from calmlm.tokens.gguf_files import reading_once
from calmlm.tokens.lookup import find_tokenizer
from calmlm.tokens.retokenization import Rewriting
from calmlm.tokens.vocabularies import with_firsts

DEFAULT_NAME = "augmenting"
NOT_RECORDED = frozenset(("subfolder", "variant", "config", "key_mapping", "ignore_mismatched_sizes", "adapter_kwargs"))
"""Options of ``from_pretrained`` that make another model of what lies at an id, as all settings of its configuration
do."""

RECIPE: dict[str, Any] = {
    "connections": "aligned-1",
    "connector": "graft",
    "words": "map",
    "init": "aligned",
    "opened": True,
    "adapters": 16,
}
"""How models are joined where ``plain_text`` is given and nothing else is said; chosen by ``calmlm repro real``."""

UNSAID: dict[str, Any] = {
    "norm": True,
    "refresh": True,
    "gate": False,
    "rotary": False,
    "null_key": False,
    "projection": "linear",
    "ingestor": "learned",
}
"""Options of ``compose`` that say nothing of how models are joined; of all others, None does."""

Source: TypeAlias = str | Path | PreTrainedModel
Choice: TypeAlias = str | Mapping[str, str]
Connections: TypeAlias = str | int | Sequence[Sequence[int]]


def is_recipe(plain_text: Any, options: Mapping[str, Any]) -> bool:
    """Whether nothing but plain text says how models are joined, so that it is ``RECIPE`` that joins them.

    Args:
        plain_text: as ``compose`` takes it.
        options: those of its arguments that say how, by name; ones that are left out say nothing.
    """
    return plain_text is not None and all(value == UNSAID.get(name) for name, value in options.items())


@reading_once()
def compose(
    anchor: Source,
    augmenting: Source | Mapping[str, Source],
    connections: Connections | Mapping[str, Connections] | None = None,
    num_heads: int | None = None,
    *,
    norm: bool = True,
    gate: bool = False,
    rotary: bool = False,
    query_key_bias: float | None = None,
    null_key: bool = False,
    rank: int | None = None,
    projection: str = "linear",
    ingestor: str = "learned",
    top_k: int | None = None,
    connector: str | None = None,
    words: str | Mapping[str, str] | None = None,
    adapters: Any = None,
    init: str | None = None,
    opened: bool | None = None,
    train_map: bool | None = None,
    plain_text: Sequence[str] | None = None,
    development: Sequence[Mapping[str, Any]] | None = None,
    refresh: bool = True,
    alignment: Choice = "own",
    augmenting_view: Choice | None = None,
    augmenting_prefix: Prefix | Mapping[str, Prefix] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    augmenting_tokenizer: PreTrainedTokenizerBase | Mapping[str, PreTrainedTokenizerBase] | None = None,
    gguf_file: str | None = None,
    augmenting_gguf_file: str | Mapping[str, str] | None = None,
    dtype: torch.dtype | str | None = None,
    augmenting_dtype: Any = SAME,
    composition_dtype: torch.dtype = torch.float32,
    device_map: Any = None,
    augmenting_device_map: Any = SAME,
    quantization_config: Any = None,
    augmenting_quantization_config: Any = SAME,
    revision: str | None = None,
    augmenting_revision: str | Mapping[str, str] | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    layers_path: str | None = None,
    augmenting_layers_path: str | None = None,
    **load_options: Any,
) -> CalmForCausalLM:
    """Join a frozen anchor and frozen augmenting models by trainable cross-attentions.

    The result starts out as the anchor, bit for bit, unless ``opened`` says otherwise; only the connections train.

    Without ``plain_text`` the default is the paper's CALM. With it, and nothing said of how the models are joined
    (``connections``, ``connector`` and its options, ``words``, ``init``, ``adapters``, ``refresh``), the default is
    ``RECIPE``, what did best with two real models: a graft that starts from what both know, a map of words, and
    adapters.

    Args:
        anchor: the large model m_B: a hub id, a folder or a loaded causal language model. One that was changed after it
            was loaded has no name by which the composition could load it again: save it first, or pass it each time.
        augmenting: the small model m_A, likewise; or several, by name. A named model without a language-modelling head
            (a text, image or sound encoder) reads ``augmenting_inputs`` of its own instead of the text.
        connections: ``"every-4"`` (the paper's, the default), ``"top"``, a number, or pairs ``(augmenting_layer,
            anchor_layer)``, 0-based: the output of the first layer is read into the output of the second. See
            ``calmlm.config.resolve_connections``. ``"aligned-2"`` looks for the two that communicate most before any
            training, on ``development``. Several augmenting models may have their own, by name.
        num_heads: heads of the cross-attentions; by default the anchor's own number.
        norm, gate, rotary, query_key_bias, null_key, rank, projection: connector options, see
            ``calmlm.config.ConnectorConfig``.
        ingestor, top_k: options of the connector ``"legonn"``: ``ingestor="anchor"`` gives the anchor the ``top_k``
            likeliest next tokens of the augmenting model in its own input embeddings.
        connector: ``"cross_attention"`` (CALM, the default), ``"flamingo"``, ``"graft"`` or ``"legonn"``, see
            ``calmlm.connectors``.
        words: ``"map"`` lets augmenting models speak in the anchor's last state as well, through a map that is computed
            from both vocabularies, see ``calmlm.connectors.word_map``; ``"pointer"`` mixes their probabilities into the
            anchor's, see ``calmlm.connectors.pointer``. With ``connections="none"`` there alone. Several augmenting
            models may have their own, by name.
        adapters: the rank of low-rank adapters on the anchor, or settings of ``peft.LoraConfig``. They belong to the
            composition: they train and are saved with it, and are off with it.
        init: ``"aligned"`` lets connections start from maps between both models' states that are fitted on
            ``plain_text``, see ``calmlm.composing.aligning``; by default they start from noise.
        opened: of grafts, whether their gates are open at the start, so that they speak before they are trained; by
            default those of the recipe are.
        train_map: whether maps are trained as well as gates; by default those of grafts are corrected by training, and
            those of words stay.
        plain_text: a few hundred sentences of what the anchor is to write, without labels: of these maps of states are
            made, and maps of words take from them how often tokens stand in text (by default from text that the anchor
            writes itself).
        development: a few dozen examples with prompts and completions, as ``calmlm train`` takes them, by which
            ``"aligned-2"`` chooses; without them it takes the middle of both models.
        refresh: whether augmenting decoders read generated tokens too; False is the paper's ablation "m_A as encoder".
        tokenizer, augmenting_tokenizer: the models' tokenizers. Those that lie beside a model's id are found by
            themselves; two models without tokenizers are taken to share token ids if their vocabularies are equally
            large. Where the tokenizers differ, the augmenting model reads the same bytes in its own tokens.
        alignment: how an augmenting model with another tokenizer reads: ``"own"`` gives it at every position the tokens
            that its tokenizer gives to the text so far, ``"transcode"`` writes each of the anchor's tokens by itself,
            ``"retokenize"`` gives it its own tokens as soon as no continuation can change them. Several augmenting
            models may have their own, by name.
        augmenting_view: what an augmenting model reads of a conversation in the anchor's chat template: None for all of
            it, ``"bare"`` for the messages' content alone, ``"template"`` for the messages in its own chat template.
            Several augmenting models may have their own, by name.
        augmenting_prefix: what an augmenting model alone reads before each text: an instruction, or a few examples. A
            text, or messages for its chat template. Several augmenting models may have their own, by name.
        gguf_file, augmenting_gguf_file: a GGUF file at the model's id or in its folder. What is called
            ``"folder/file.gguf"`` names it as well.
        dtype: dtype of the base models, ``"auto"`` by default for ids and folders.
        composition_dtype: dtype of the connections.
        device_map, quantization_config: as ``from_pretrained`` takes them.
        augmenting_dtype, augmenting_device_map, augmenting_quantization_config: the same for the augmenting models,
            which take the anchor's by default; None for none.
        revision, augmenting_revision: which revision of the anchor and of the augmenting models to load. Settings of
            several augmenting models may be their own, by name.
        attn_implementation, trust_remote_code: passed to all ``from_pretrained`` calls; remote code is off by default.
        layers_path, augmenting_layers_path: where a model's layers are, if they are not found by themselves.
        load_options: passed to all ``from_pretrained`` calls as well (``token``, ``cache_dir``, ...); those that
            make another model of what lies at an id (``variant``, settings of its configuration) are refused.

    Returns:
        the composition, in evaluation mode.

    Raises:
        ConfigError: for names, connections or options that do not fit.
        ModelError: for a model that cannot be loaded or composed or has adapters, or tokenizers that cannot be aligned.
    """
    plain_text = list(plain_text) if plain_text is not None and not isinstance(plain_text, str) else plain_text
    recipe = is_recipe(
        plain_text,
        {
            "connections": connections, "connector": connector, "num_heads": num_heads, "words": words, "init": init,
            "adapters": adapters, "query_key_bias": query_key_bias, "rank": rank, "top_k": top_k, "norm": norm,
            "refresh": refresh, "gate": gate, "rotary": rotary, "null_key": null_key, "projection": projection,
            "ingestor": ingestor,
        },
    )  # fmt: skip
    if recipe:
        connections, connector, words, init, open_, adapters = RECIPE.values()
        opened = open_ if opened is None else opened
    connections = "every-4" if connections is None else connections
    connector, opened = "cross_attention" if connector is None else connector, bool(opened)
    shared = {"attn_implementation": attn_implementation, **load_options, "trust_remote_code": trust_remote_code}
    sources = dict(augmenting) if isinstance(augmenting, Mapping) else {DEFAULT_NAME: augmenting}
    check_names(sources)
    by_name = {
        "connections": connections,
        "alignment": alignment,
        "augmenting_view": augmenting_view,
        "augmenting_prefix": augmenting_prefix,
        "augmenting_tokenizer": augmenting_tokenizer,
        "words": words,
    }
    _check_by_name(by_name, list(sources))
    _check_starts(plain_text, init)
    _check_options(sorted(set(load_options) & NOT_RECORDED))
    if load_options and not any(_is_name(source) for source in (anchor, *sources.values())):
        raise ConfigError(
            f"Options beyond compose's own may only go to models that are loaded here, but all are loaded already and "
            f"got {', '.join(sorted(load_options))}: check the spelling or leave them out."
        )
    hub: dict[str, Any] = {key: shared[key] for key in ("token", "cache_dir", "local_files_only") if key in shared}
    remote = {**hub, "trust_remote_code": trust_remote_code}
    form = Form(revision, gguf_file, dtype, device_map, quantization_config)
    own_forms = forms(
        list(sources),
        form,
        several=isinstance(augmenting, Mapping),
        revision=augmenting_revision,
        gguf_file=augmenting_gguf_file,
        dtype=augmenting_dtype,
        device_map=augmenting_device_map,
        quantization_config=augmenting_quantization_config,
    )
    anchor_model, origin = _opened(anchor, "anchor", load_anchor, form, hub, shared)
    anchor_backbone = Backbone.of(anchor_model, "anchor", layers_path)
    anchor_entry = _entry(anchor_model, origin, layers_path)  # before it runs: RWKV scales its weights then
    anchor_backbone.probe("anchor")
    if tokenizer is None:
        tokenizer = _tokenizer_of(anchor_model, origin, **remote)

    models: dict[str, PreTrainedModel] = {}
    entries: dict[str, dict[str, Any]] = {}
    alignments: dict[str, Alignment | Rewriting] = {}
    anchor_words = AnchorWords(anchor_model, anchor_backbone, tokenizer, plain_text)
    searched: dict[str, int] = {}
    # Each model's start from numbers of their own: from the same ones they would learn the same.
    adapted = () if adapters is None else sources
    freedom = {name: build_adapters(anchor_model, anchor_backbone.decoder, adapters) for name in adapted}
    maps: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for name, source in sources.items():
        role = "augmenting model" if len(sources) == 1 else f"augmenting model {name!r}"
        model, origin = _opened(source, role, load_any, own_forms[name], hub, shared)
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
        speaks = _of(words, name)
        if is_decoder(model):
            backbone = Backbone.of(model, role, augmenting_layers_path)
            backbone.probe(role)
            theirs = _of(augmenting_tokenizer, name)
            if theirs is None:
                theirs = _tokenizer_of(model, origin, **remote)
            method, view = _of(alignment, name, "own"), _of(augmenting_view, name)
            found = align(anchor_backbone, backbone, tokenizer, theirs, method, view)
            entry |= opening_entry(tokenizer, theirs, found, _of(augmenting_prefix, name), view, backbone)
            if found is not None and (ingestor == "anchor" or speaks == "pointer"):
                found = with_firsts(found, tokenizer, theirs)
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
            if recipe:
                raise ConfigError(
                    f"plain_text alone must come with augmenting models that read text, but the {role} is an encoder: "
                    f"leave plain_text out, or choose connections."
                )
            _check_encoder(backbone, connector, ingestor, role)
        wanted = _of(connections, name, "every-4")
        sizes = len(backbone.layers), len(anchor_backbone.layers)
        if isinstance(wanted, str) and wanted.startswith(ALIGNED):
            searched[name] = aligned_count(wanted)
            pairs = middle(*sizes, searched[name])
        else:
            pairs = resolve_connections(wanted, *sizes)
        if speaks is not None:
            check_words(speaks, entry["reads"], role)
            entry["words"] = {"kind": speaks, "bias": WORDS_BIAS if pairs else 0.0}
            if speaks == "map":
                entry["words"]["train_map"] = bool(train_map)
                maps[name] = word_map(anchor_words, model, backbone, alignments.get(name), role)
            else:
                entry["words"]["scale"] = head_scale(model, backbone, role)
                check_last_state(anchor_model, anchor_backbone, "anchor")
                if name in alignments:
                    check_pointer(alignments[name], (anchor_backbone.vocab_size, backbone.vocab_size), role)
        elif not pairs:
            raise ConfigError(
                f"connections={NONE!r} needs words, by which the {role} speaks, but got none: set words='map' or "
                f"'pointer', or give connections."
            )
        options = {
            "num_heads": num_heads,
            "norm": norm,
            "gate": gate,
            "rotary": rotary and entry["reads"] != "prompt",
            "query_key_bias": query_key_bias,
            "null_key": null_key,
            "rank": rank,
            "projection": projection,
            "ingestor": ingestor,
            "top_k": top_k,
            "kind": connector,
            "opened": opened,
        } | ({"train_map": train_map is not False} if connector == "graft" else {})
        if init is not None or name in searched:
            options = check_alignable(connector, options)
        if connector == "graft":
            check_grows(entry["reads"], role, "a graft needs", "another connector")
            if pairs and init is None and name not in searched:
                raise ConfigError(
                    "A graft must start from a map between both models' states, but got no init: set init='aligned' "
                    "and give plain_text."
                )
        if name in freedom:
            entry["adapters"] = freedom[name][0]
        entry["connections"] = [list(pair) for pair in pairs]
        entry["connector"] = vars(ConnectorConfig.build(options, anchor_backbone.size, anchor_backbone.num_heads))
        models[name], entries[name] = model, entry

    config = CalmConfig(
        text_config=text_config(anchor_model),
        anchor=anchor_entry,
        augmenting=entries,
    )
    for name, count in searched.items():
        if development is not None:
            pairs, tried = search(
                config,
                anchor_model,
                name,
                models[name],
                alignments.get(name),
                tokenizer,
                plain_text,
                development,
                count,
            )
            config.augmenting[name] |= {"connections": [list(pair) for pair in pairs], "tried": tried}
    composed = CalmForCausalLM(config, anchor_model, models, alignments)
    composed.model.connectors.to(composition_dtype)
    for name in entries:
        parts: Any = composed.model.connectors[name]
        for part in parts:
            if isinstance(part, WordMap):
                part.start(*maps[name])
            elif isinstance(part, Adapters):
                part.load_state_dict(freedom[name][1])
        if init is not None or name in searched:
            start_aligned(composed, name, tokenizer, plain_text)
    return composed.eval()


def _of(given: Any, name: str, default: Any = None) -> Any:
    """What was given for all augmenting models, or by name for this one."""
    return given.get(name, default) if isinstance(given, Mapping) else given


def _check_by_name(arguments: dict[str, Any], names: list[str]) -> None:
    """Raise for arguments by name that name no augmenting model.

    Raises:
        ConfigError: naming argument and names.
    """
    for argument, given in arguments.items():
        unknown = sorted(set(given) - set(names)) if isinstance(given, Mapping) else []
        if unknown:
            raise ConfigError(
                f"{argument} must name augmenting models ({', '.join(names)}), but got {', '.join(unknown)}: use "
                f"their names."
            )


def _check_starts(plain_text: Any, init: Any) -> None:
    """Raise for starts of connections that there are not.

    Raises:
        ConfigError: for texts that are no list of texts, or another ``init``.
    """
    if plain_text is not None and (
        isinstance(plain_text, str) or not all(isinstance(text, str) for text in plain_text)
    ):
        raise ConfigError(
            f"plain_text must be a list of texts, but got {type(plain_text).__name__} or other things in it: put each "
            f"line into a list."
        )
    if init not in (None, "aligned"):
        raise ConfigError(f"init must be 'aligned', or None for noise, but got {init!r}: use one of these.")


def _check_encoder(backbone: Backbone, connector: str, ingestor: str, role: str) -> None:
    """Raise for an encoder that lacks what a connector takes.

    Raises:
        ConfigError: naming the connector's option.
    """
    if connector in CONNECTORS and CONNECTORS[connector].reads_distribution and not backbone.vocab_size:
        raise ConfigError(
            f"connector={connector!r} needs an augmenting model with an output distribution, but the {role} is "
            f"an encoder without one: use 'cross_attention' or 'flamingo', or an encoder that classifies."
        )
    if ingestor == "anchor":
        raise ConfigError(
            f"ingestor='anchor' needs an augmenting model that says tokens, but the {role} is an encoder: use "
            f"ingestor='learned'."
        )


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
    source: Any, role: str, load: Callable[..., PreTrainedModel], form: Form, hub: Any, shared: Any
) -> tuple[Any, Origin]:
    """A base model, loaded where it is named, and its origin."""
    if not _is_name(source):
        check_whole(source, role)
        if not isinstance(source, PreTrainedModel):
            return source, ("", None)  # Backbone says what is wrong with it
        if form.gguf_file is not None and split_gguf(source.name_or_path)[1] is None:
            source.name_or_path = form.name(source.name_or_path)
        origin, certain = origin_in_memory(source, form.revision)
        if not certain:
            warnings.warn(
                f"The {role} in memory is called {origin[0]!r}, which is neither a folder here nor in the hub's cache: "
                f"pass its id or full path itself, or loading the composition may not find it.",
                stacklevel=3,
            )
        return source, origin
    name = form.name(expanded(source))
    origin = named_origin(name, form.revision, **hub)
    model = load(name, role, revision=origin[1], **shared, **form.options(name))
    given = {key for key, value in shared.items() if value is not None}
    _check_options(sorted(given & set(model.config.to_dict())))
    return model, origin


def _entry(model: PreTrainedModel, origin: Origin, layers_path: str | None) -> dict[str, Any]:
    entry = {"id": origin[0], "revision": origin[1], "fingerprint": fingerprint(model), **recorded(model, origin[0])}
    return entry | ({"layers_path": layers_path} if layers_path else {})


def _tokenizer_of(model: PreTrainedModel, origin: Origin, **options: Any) -> PreTrainedTokenizerBase | None:
    """The tokenizer that lies where a model lies, or where a model in memory came from; None where there is none."""
    source, revision = origin if origin[0] else (model.name_or_path, None)
    return find_tokenizer(source, revision=revision, **options) if source else None
