"""``compose``: pretrained language models in, one composition out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from calmlm.bases.families import Backbone, text_config
from calmlm.bases.forms import SAME, Form, forms
from calmlm.bases.opening import load_anchor, load_any
from calmlm.causal_lm import CalmForCausalLM
from calmlm.composing.aligning import search, start_aligned
from calmlm.composing.contribution import Anchor, Contribution, contribution_of
from calmlm.composing.given_models import (
    NOT_RECORDED,
    check_options,
    entry_of,
    is_decoder,
    is_name,
    opened_model,
    tokenizer_of,
)
from calmlm.composing.low_rank import build_adapters
from calmlm.composing.manner import Manner, of_one
from calmlm.config import CalmConfig, check_names
from calmlm.connectors.adapters import Adapters
from calmlm.connectors.word_map import WordMap
from calmlm.errors import ConfigError, ModelError
from calmlm.readers.speaking import AnchorWords
from calmlm.tokens.beginning import Prefix
from calmlm.tokens.gguf_files import reading_once

DEFAULT_NAME = "augmenting"

Source: TypeAlias = str | Path | PreTrainedModel
Choice: TypeAlias = str | Mapping[str, str]
Connections: TypeAlias = str | int | Sequence[Sequence[int]]


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
    options = {
        "num_heads": num_heads, "norm": norm, "gate": gate, "rotary": rotary, "query_key_bias": query_key_bias,
        "null_key": null_key, "rank": rank, "projection": projection, "ingestor": ingestor, "top_k": top_k,
    }  # fmt: skip
    manner = Manner.of(
        plain_text, options, connections=connections, connector=connector, words=words, init=init, adapters=adapters,
        opened=opened, train_map=train_map, refresh=refresh, alignment=alignment, augmenting_view=augmenting_view,
        augmenting_prefix=augmenting_prefix,
    )  # fmt: skip
    sources = dict(augmenting) if isinstance(augmenting, Mapping) else {DEFAULT_NAME: augmenting}
    check_names(sources)
    manner.check(list(sources), plain_text, augmenting_tokenizer)
    check_options(sorted(set(load_options) & NOT_RECORDED))
    if load_options and not any(is_name(source) for source in (anchor, *sources.values())):
        raise ConfigError(
            f"Options beyond compose's own may only go to models that are loaded here, but all are loaded already and "
            f"got {', '.join(sorted(load_options))}: check the spelling or leave them out."
        )
    shared = {"attn_implementation": attn_implementation, **load_options, "trust_remote_code": trust_remote_code}
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
    anchor_model, origin = opened_model(anchor, "anchor", load_anchor, form, hub, shared)
    backbone = Backbone.of(anchor_model, "anchor", layers_path)
    anchor_entry = entry_of(anchor_model, origin, layers_path)  # before it runs: RWKV scales its weights then
    backbone.probe("anchor")
    if tokenizer is None:
        tokenizer = tokenizer_of(anchor_model, origin, **remote)
    side = Anchor(anchor_model, backbone, tokenizer, AnchorWords(anchor_model, backbone, tokenizer, plain_text))
    # Each model's start from numbers of their own: from the same ones they would learn the same.
    adapted = () if manner.adapters is None else sources
    freedom = {name: build_adapters(anchor_model, backbone.decoder, manner.adapters) for name in adapted}
    brought: dict[str, Contribution] = {}
    for name, source in sources.items():
        role = "augmenting model" if len(sources) == 1 else f"augmenting model {name!r}"
        model, origin = opened_model(source, role, load_any, own_forms[name], hub, shared)
        named = isinstance(augmenting, Mapping)
        if not isinstance(model, PreTrainedModel) or (not named and not is_decoder(model)):
            # Says what is wrong with it; an encoder's inputs come by name, so the encoder itself has to.
            Backbone.of(model, role, augmenting_layers_path)
        if any(model is other for other in (anchor_model, *(its.model for its in brought.values()))):
            raise ModelError(
                f"The {role} must be a model of its own, but got one model twice: "
                f"load it a second time to compose it with itself."
            )
        entry = entry_of(model, origin, augmenting_layers_path)
        theirs = of_one(augmenting_tokenizer, name)
        if theirs is None and is_decoder(model):
            theirs = tokenizer_of(model, origin, **remote)
        brought[name] = contribution_of(name, role, model, entry, theirs, side, manner, augmenting_layers_path)
        if name in freedom:
            entry["adapters"] = freedom[name][0]
    config = CalmConfig(
        text_config=text_config(anchor_model),
        anchor=anchor_entry,
        augmenting={name: its.entry for name, its in brought.items()},
    )
    for name, its in brought.items():
        if its.searched is not None and development is not None:
            given = (its.model, its.alignment, tokenizer, plain_text, development, its.searched)
            pairs, tried = search(config, anchor_model, name, *given)
            config.augmenting[name] |= {"connections": [list(pair) for pair in pairs], "tried": tried}
    alignments = {name: its.alignment for name, its in brought.items() if its.alignment is not None}
    composed = CalmForCausalLM(config, anchor_model, {name: its.model for name, its in brought.items()}, alignments)
    composed.model.connectors.to(composition_dtype)
    for name, its in brought.items():
        connectors: Any = composed.model.connectors[name]
        for each in connectors:
            if isinstance(each, WordMap):
                assert its.map is not None
                each.start(*its.map)
            elif isinstance(each, Adapters):
                each.load_state_dict(freedom[name][1])
        if manner.init is not None or its.searched is not None:
            start_aligned(composed, name, tokenizer, plain_text)
    return composed.eval()
