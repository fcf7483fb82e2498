"""``compose``: two pretrained language models in, one composition out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from calmlm.backbone import Backbone, fingerprint, load_base, text_config
from calmlm.causal_lm import CalmForCausalLM
from calmlm.config import CalmConfig, ConnectorConfig, resolve_connections
from calmlm.errors import ModelError
from calmlm.tokenizers import find_tokenizer

DEFAULT_NAME = "augmenting"


def compose(
    anchor: str | Path | PreTrainedModel,
    augmenting: str | Path | PreTrainedModel,
    connections: str | int | Sequence[Sequence[int]] = "every-4",
    num_heads: int | None = None,
    *,
    norm: bool = True,
    gate: bool = False,
    rotary: bool = False,
    query_key_bias: float | None = None,
    null_key: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
    augmenting_tokenizer: PreTrainedTokenizerBase | None = None,
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
    """Join a frozen anchor and a frozen augmenting model by trainable cross-attentions.

    The result starts out as the anchor, bit for bit; only the connections train.

    Args:
        anchor: the large model m_B: a hub id, a folder or a loaded causal language model.
        augmenting: the small model m_A, likewise.
        connections: ``"every-4"`` (the paper's), ``"top"``, a number, or pairs ``(augmenting_layer, anchor_layer)``,
            0-based: the output of the first layer is read into the output of the second. See
            ``calmlm.config.resolve_connections``.
        num_heads: heads of the cross-attentions; by default the anchor's own number.
        norm, gate, rotary, query_key_bias, null_key: connector options, see ``calmlm.config.ConnectorConfig``.
        tokenizer, augmenting_tokenizer: the models' tokenizers. Those that lie beside a model's id are found by
            themselves; two models without tokenizers are taken to share token ids if their vocabularies are equally
            large.
        dtype: dtype of the base models, ``"auto"`` by default for ids and folders.
        composition_dtype: dtype of the connections.
        device_map, attn_implementation, trust_remote_code: passed to both ``from_pretrained`` calls; remote code is off
            by default.
        revision, augmenting_revision: which revision of the anchor and of the augmenting model to load.
        layers_path, augmenting_layers_path: where a model's layers are, if they are not found by themselves.
        load_options: passed to both ``from_pretrained`` calls as well (``token``, ``quantization_config``, ...).

    Returns:
        the composition, in evaluation mode.

    Raises:
        ConfigError: for connections or connector options that do not fit.
        ModelError: for a model that cannot be loaded or composed, or vocabularies that do not match.
    """
    shared = {"dtype": dtype, "device_map": device_map, "attn_implementation": attn_implementation, **load_options}
    sources = {"anchor": (anchor, revision), "augmenting model": (augmenting, augmenting_revision)}
    models = {}
    for role, (source, base_revision) in sources.items():
        if isinstance(source, (str, Path)):
            source = load_base(str(source), role, revision=base_revision, trust_remote_code=trust_remote_code, **shared)
        models[role] = source
    anchor_model, augmenting_model = models["anchor"], models["augmenting model"]
    if anchor_model is augmenting_model:
        raise ModelError(
            "The anchor and the augmenting model must be two models, but the same one was given twice: "
            "load it a second time to compose it with itself."
        )
    anchor_backbone = Backbone.of(anchor_model, "anchor", layers_path)
    augmenting_backbone = Backbone.of(augmenting_model, "augmenting model", augmenting_layers_path)
    for backbone, role in ((anchor_backbone, "anchor"), (augmenting_backbone, "augmenting model")):
        backbone.probe(role)

    pairs = resolve_connections(connections, len(augmenting_backbone.layers), len(anchor_backbone.layers))
    options = {
        "num_heads": num_heads,
        "norm": norm,
        "gate": gate,
        "rotary": rotary,
        "query_key_bias": query_key_bias,
        "null_key": null_key,
    }
    connector = ConnectorConfig.build(options, anchor_backbone.size, anchor_backbone.num_heads)
    options = {"trust_remote_code": trust_remote_code, **load_options}
    if tokenizer is None:
        tokenizer = _tokenizer_of(anchor_model, revision, **options)
    if augmenting_tokenizer is None:
        augmenting_tokenizer = _tokenizer_of(augmenting_model, augmenting_revision, **options)
    check_vocabularies(anchor_backbone, augmenting_backbone, tokenizer, augmenting_tokenizer)

    config = CalmConfig(
        text_config=text_config(anchor_model),
        anchor=_entry(anchor_model, revision, layers_path),
        augmenting={
            DEFAULT_NAME: {
                **_entry(augmenting_model, augmenting_revision, augmenting_layers_path),
                "connections": [list(pair) for pair in pairs],
                "connector": vars(connector),
            }
        },
    )
    model = CalmForCausalLM(config, anchor_model, {DEFAULT_NAME: augmenting_model})
    model.model.connectors.to(composition_dtype)
    return model.eval()


def _entry(model: PreTrainedModel, revision: str | None, layers_path: str | None) -> dict[str, Any]:
    entry = {"id": model.name_or_path or "", "revision": revision, "fingerprint": fingerprint(model)}
    return entry | ({"layers_path": layers_path} if layers_path else {})


def _tokenizer_of(model: PreTrainedModel, revision: str | None, **options: Any) -> PreTrainedTokenizerBase | None:
    """The tokenizer that lies beside a loaded model's id or folder, or None."""
    hub = {key: options[key] for key in ("token", "cache_dir", "local_files_only") if key in options}
    trust_remote_code = options.get("trust_remote_code", False)
    if not model.name_or_path:
        return None
    return find_tokenizer(model.name_or_path, revision=revision, trust_remote_code=trust_remote_code, **hub)


def check_vocabularies(
    anchor: Backbone,
    augmenting: Backbone,
    tokenizer: PreTrainedTokenizerBase | None,
    augmenting_tokenizer: PreTrainedTokenizerBase | None,
) -> None:
    """Raise unless the two models share token ids.

    Raises:
        ModelError: when both tokenizers are known and differ, or when the sizes tell that the ids cannot be shared.
    """
    if tokenizer is not None and augmenting_tokenizer is not None:
        ours, theirs = tokenizer.get_vocab(), augmenting_tokenizer.get_vocab()
        if ours != theirs:
            token = min(set(ours.items()) ^ set(theirs.items()))[0]
            raise ModelError(
                f"The anchor and the augmenting model must have the same tokenizer, but theirs differ, for example in "
                f"{token!r} (ids {ours.get(token, 'none')} and {theirs.get(token, 'none')}): choose others."
            )
        if augmenting.vocab_size >= len(ours):
            return
    if anchor.vocab_size != augmenting.vocab_size:
        raise ModelError(
            f"The anchor and the augmenting model must share token ids, but their vocabularies have "
            f"{anchor.vocab_size} and {augmenting.vocab_size} entries: choose models with one tokenizer, or pass the "
            f"tokenizers if the larger one is only padded."
        )
