"""``CalmModel``: frozen base models joined by connectors, giving the anchor's last hidden state.

A call runs the augmenting models first (no gradients, outputs of the connected layers kept), then the anchor, whose
hooks add the cross-attentions layer by layer. A position sees the augmenting model's states up to its own token and
none beyond, so that the cross-attention is causal attention over another stream's keys and values.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from calmlm.backbone import Backbone, accepts, freeze, text_config
from calmlm.cache import CalmCache
from calmlm.config import CalmConfig, ConnectorConfig
from calmlm.connector import CrossAttention, eager_attention, rotary_angles
from calmlm.errors import DataError, ModelError
from calmlm.hooks import Call, CaptureHook, InjectHook, QuietCheckpoint, Slot, Stream

ATTENTION_FALLBACK = "sdpa"


class CalmPreTrainedModel(PreTrainedModel):
    """What ``CalmModel`` and ``CalmForCausalLM`` have in common."""

    config_class = CalmConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def __init__(self, config: CalmConfig, anchor: PreTrainedModel) -> None:
        # The cross-attentions take the anchor's kind of attention where it is a general one.
        kind = text_config(anchor)._attn_implementation
        general = kind == "eager" or kind in ALL_ATTENTION_FUNCTIONS
        config._attn_implementation_internal = kind if general else ATTENTION_FALLBACK
        super().__init__(config)

    def init_weights(self) -> None:
        """Nothing: the bases are pretrained and the connectors draw their own weights."""

    def enable_input_require_grads(self) -> None:
        """Nothing: gradients start at the first connection, so the bases' embeddings need none."""

    def _set_gradient_checkpointing(self, *args: Any, **kwargs: Any) -> None:
        super()._set_gradient_checkpointing(*args, **kwargs)
        self.train(self.training)


class CalmModel(CalmPreTrainedModel):
    """An anchor, its augmenting models and the connectors between them; gives the anchor's last hidden state.

    Args:
        config: the composition's configuration.
        anchor: the anchor, a causal language model.
        augmenting: the augmenting models by name, each a causal language model.
    """

    def __init__(self, config: CalmConfig, anchor: PreTrainedModel, augmenting: dict[str, PreTrainedModel]) -> None:
        super().__init__(config, anchor)
        self.anchor = anchor
        self.augmenting = nn.ModuleDict(augmenting)
        self.connectors = nn.ModuleDict()
        self.enabled = True
        self.slot = Slot()
        self._backbones = {"": Backbone.of(anchor, "anchor", config.anchor.get("layers_path"))}
        for name, model in augmenting.items():
            path = config.augmenting[name].get("layers_path")
            self._backbones[name] = Backbone.of(model, "augmenting model", path)
            self._connect(name)
        for base in self.bases():
            freeze(base)
        self.post_init()

    def __getstate__(self) -> dict[str, Any]:
        # The backbones only point at modules of this model; they are found again when it is copied or unpickled.
        return {key: value for key, value in self.__dict__.items() if key != "_backbones"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._backbones = {"": Backbone.of(self.anchor, "anchor", self.config.anchor.get("layers_path"))}
        for name, model in self.augmenting.items():
            path = self.config.augmenting[name].get("layers_path")
            self._backbones[name] = Backbone.of(model, "augmenting model", path)

    def _connect(self, name: str) -> None:
        anchor, augmenting, entry = self._backbones[""], self._backbones[name], self.config.augmenting[name]
        options = ConnectorConfig(**entry["connector"])
        connectors = nn.ModuleList()
        for _, j in entry["connections"]:
            connector = CrossAttention(augmenting.size, anchor.size, **vars(options))
            connector.to(next(anchor.layers[j].parameters()).device)
            connectors.append(connector)
        for index, (i, j) in reversed(list(enumerate(entry["connections"]))):
            hook = InjectHook(self.slot, name, index, i, connectors[index])
            # First in line, so that outputs recorded by other hooks are those of the composition; the last one first,
            # so that connections into one layer follow in their order, each on the result of the one before.
            anchor.layers[j].register_forward_hook(hook, prepend=True)
        for i in sorted({i for i, _ in entry["connections"]}):
            augmenting.layers[i].register_forward_hook(CaptureHook(self.slot, name, i))
        self.connectors[name] = connectors

    def bases(self) -> Iterator[PreTrainedModel]:
        """The frozen models: the anchor, then the augmenting models."""
        yield self.anchor
        yield from self.augmenting.values()

    def backbone(self, name: str = "") -> Backbone:
        """The decoder of the augmenting model ``name``, or of the anchor."""
        return self._backbones[name]

    def get_input_embeddings(self) -> nn.Module:
        return self.anchor.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        raise ModelError(
            "The embeddings of a composition must stay the anchor's own, but a replacement was given: "
            "change the anchor before composing."
        )

    def train(self, mode: bool = True) -> CalmModel:
        """As in torch, except that the frozen bases stay in evaluation mode.

        With activation checkpointing the anchor's layers above the first connection carry the training flag, which is
        what makes transformers checkpoint them; those below keep no graph. Dropout stays off all the same.
        """
        super().train(mode)
        for base in self.bases():
            base.eval()
        if mode:
            first = min(j for entry in self.config.augmenting.values() for _, j in entry["connections"])
            dropout = _has_dropout(text_config(self.anchor))
            for layer in self._backbones[""].layers[first + 1 :]:
                if getattr(layer, "gradient_checkpointing", False):
                    layer.training = True
                    checkpoint: Any = layer._gradient_checkpointing_func
                    if dropout and not isinstance(checkpoint, QuietCheckpoint):
                        vars(layer)["_gradient_checkpointing_func"] = QuietCheckpoint(layer, checkpoint)
        return self

    @property
    def can_cache(self) -> bool:
        """Whether every model in the composition can carry its past in a cache."""
        return all(backbone.cache_argument is not None for backbone in self._backbones.values())

    def new_cache(self, anchor_cache: Cache | None = None, length: int | None = None) -> CalmCache:
        """An empty cache for this composition, around the anchor's own (a new dynamic one by default).

        ``length`` is the number of tokens for which a static ``anchor_cache`` was made.
        """
        if anchor_cache is None:
            anchor_cache = DynamicCache(config=text_config(self.anchor))
        return CalmCache.around(
            anchor_cache,
            {name: text_config(model) for name, model in self.augmenting.items()},
            {name: len(entry["connections"]) for name, entry in self.config.augmenting.items()},
            length,
        )

    def cache_for(self, past_key_values: Cache | None, use_cache: bool) -> CalmCache | None:
        """The cache that a call uses, given what its caller passed."""
        if past_key_values is None:
            return self.new_cache() if use_cache else None
        if isinstance(past_key_values, CalmCache):
            past_key_values.check()
            return past_key_values
        return self.new_cache(past_key_values)

    def begin(
        self,
        input_ids: Tensor,
        attention_mask: Any,
        position_ids: Tensor | None,
        cache: CalmCache | None,
    ) -> Call:
        """Run the augmenting models and prepare what the anchor's hooks need.

        Args:
            input_ids: (B, T) int64, the new tokens.
            attention_mask: (B, past + T), a 4-D mask, a dictionary made by ``create_masks_for_generate``, or None.
            position_ids: (B or 1, T) int64, or None.
            cache: the composition's cache, or None.

        Raises:
            DataError: for ids that the augmenting model does not have.
        """
        call = Call()
        for name in self.augmenting:
            backbone = self._backbones[name]
            self._check_ids(input_ids, name)
            positions = _positions(backbone, position_ids, input_ids, attention_mask)
            backbone.check_length(f"augmenting model {name!r}", _length(input_ids, attention_mask, cache), positions)
            cross = cache.cross[name] if cache is not None else None
            call.streams[name] = self._stream(name, input_ids, attention_mask, position_ids, cross)
            arguments = base_arguments(
                backbone,
                input_ids=input_ids.to(next(backbone.decoder.parameters()).device),
                attention_mask=_mask_of(attention_mask, f"augmenting.{name}"),
                position_ids=positions,
                cache=cache.augmenting[name] if cache is not None else None,
            )
            self.slot.call = call
            try:
                with torch.no_grad():
                    backbone.decoder(**arguments)
            finally:
                self.slot.call = None
        return call

    def _check_ids(self, input_ids: Tensor, name: str) -> None:
        size = self._backbones[name].vocab_size
        # The comparison waits for the device, so it is made only where a token of the anchor's could fall outside.
        if size >= self._backbones[""].vocab_size or torch.compiler.is_compiling():
            return
        highest = int(input_ids.max())
        if highest >= size:
            raise DataError(
                f"Token ids must lie below {size}, the vocabulary of the augmenting model {name!r}, but got {highest}: "
                f"give both models a tokenizer whose ids they share."
            )

    def _stream(
        self, name: str, input_ids: Tensor, attention_mask: Any, position_ids: Tensor | None, cross: Cache | None
    ) -> Stream:
        connector: CrossAttention = self.connectors[name][0]  # type: ignore[index,assignment]
        if isinstance(attention_mask, dict):
            mask = attention_mask[f"cross.{name}"]
        else:
            mask = self.cross_mask(name, input_ids, attention_mask, position_ids, cross)
        rotation = None
        if connector.rotary:
            positions = _counted(input_ids, attention_mask) if position_ids is None else position_ids
            if positions is None:
                past = cross.get_seq_length() if cross is not None else 0
                positions = (torch.arange(input_ids.shape[1], device=input_ids.device) + past)[None]
            rotation = rotary_angles(positions if positions.ndim == 2 else positions[0], connector.head_dim)
        kind = self.config._attn_implementation
        return Stream(mask, rotation, cross, ALL_ATTENTION_FUNCTIONS.get_interface(kind, eager_attention))

    def cross_mask(
        self, name: str, inputs: Tensor, attention_mask: Any, position_ids: Tensor | None, cross: Cache | None
    ) -> Any:
        """The causal cross-attention mask for the new positions of ``inputs`` (B, T)."""
        connector: CrossAttention = self.connectors[name][0]  # type: ignore[index,assignment]
        shape_only = torch.empty((*inputs.shape[:2], 0), dtype=connector.q_proj.weight.dtype, device=inputs.device)
        return create_causal_mask(
            config=self.config,
            inputs_embeds=shape_only,
            attention_mask=attention_mask,
            past_key_values=cross,
            position_ids=position_ids,
            layer_idx=0,
            allow_is_causal_skip=connector.null_key is None,
        )

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """The anchor's last hidden state, (B, T, D_B), with the composition in it."""
        kwargs.pop("return_dict", None)
        output, cache = self.run(
            self._backbones[""].decoder,
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, kwargs,
        )  # fmt: skip
        return BaseModelOutputWithPast(
            last_hidden_state=output.last_hidden_state,
            past_key_values=cache,
            hidden_states=getattr(output, "hidden_states", None),
            attentions=getattr(output, "attentions", None),
        )

    def run(
        self,
        target: nn.Module,
        input_ids: Tensor | None,
        attention_mask: Any,
        position_ids: Tensor | None,
        past_key_values: Cache | None,
        inputs_embeds: Tensor | None,
        use_cache: bool | None,
        kwargs: dict[str, Any],
    ) -> tuple[Any, Cache | None]:
        """Run ``target`` (the anchor or its decoder) inside the composition; returns its output and the cache."""
        backbone = self._backbones[""]
        if not self.enabled:
            if isinstance(past_key_values, CalmCache):
                past_key_values = past_key_values.anchor
            given = {"position_ids": position_ids, "inputs_embeds": inputs_embeds, "use_cache": use_cache, **kwargs}
            given |= {"input_ids": input_ids, "attention_mask": attention_mask}
            if backbone.cache_argument is not None:
                given[backbone.cache_argument] = past_key_values
            output = target(**{key: value for key, value in given.items() if value is not None})
            return output, getattr(output, backbone.cache_argument or "past_key_values", None)
        if use_cache is None:
            use_cache = past_key_values is not None or (self.config.use_cache and not self.training)
        cache = self.cache_for(past_key_values, use_cache and self.can_cache)
        if input_ids is None or inputs_embeds is not None:
            raise DataError(
                "A composition must be given input_ids alone, because the augmenting model reads the same tokens, but "
                "got inputs_embeds: pass input_ids, or disable the composition."
            )
        positions = _positions(backbone, position_ids, input_ids, attention_mask)
        backbone.check_length("anchor", _length(input_ids, attention_mask, cache), positions)
        call = self.begin(input_ids, attention_mask, position_ids, cache)
        arguments = base_arguments(
            backbone,
            input_ids=input_ids,
            attention_mask=_mask_of(attention_mask, "anchor"),
            position_ids=positions,
            cache=cache.anchor if cache is not None else None,
        )
        self.slot.call = call
        try:
            output = target(**arguments, **kwargs)
        finally:
            self.slot.call = None
        return output, cache


def base_arguments(
    backbone: Backbone, *, input_ids: Tensor, attention_mask: Any, position_ids: Tensor | None, cache: Cache | None
) -> dict[str, Any]:
    """Arguments for one base model's call, without those that it does not know."""
    arguments: dict[str, Any] = {"input_ids": input_ids}
    if attention_mask is not None:
        arguments["attention_mask"] = attention_mask
    if position_ids is not None and backbone.takes_positions:
        arguments["position_ids"] = position_ids
    if cache is not None and backbone.cache_argument is not None:
        arguments[backbone.cache_argument] = cache
    if accepts(backbone.decoder, "use_cache"):
        arguments["use_cache"] = cache is not None
    return arguments


def _positions(
    backbone: Backbone, position_ids: Tensor | None, input_ids: Tensor, attention_mask: Any
) -> Tensor | None:
    """The positions that one base model gets: the caller's, or counted over real tokens where the model needs that.

    A model that adds an embedding of the absolute position would count padding on the left, so that a padded row would
    differ from the same row alone. A model with relative positions counts by itself, exactly as it does alone.
    """
    if position_ids is not None or not backbone.absolute_positions:
        return position_ids
    return _counted(input_ids, attention_mask)


def _counted(input_ids: Tensor, attention_mask: Any) -> Tensor | None:
    """Positions (B, T) of the new tokens, counted over the real ones; None where no 2-D mask tells which those are."""
    if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2:
        return None
    positions = attention_mask.long().cumsum(-1) - 1
    return positions.clamp(min=0)[:, -input_ids.shape[1] :]


def _length(input_ids: Tensor, attention_mask: Any, cache: CalmCache | None) -> int:
    """Tokens up to the end of this call, as far as shapes tell; only the device knows what a static cache holds."""
    if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
        return attention_mask.shape[1]
    past = cache.get_seq_length() if cache is not None else 0
    return input_ids.shape[1] + (past if isinstance(past, int) else 0)


def _mask_of(attention_mask: Any, prefix: str) -> Any:
    """One base model's part of the dictionary that ``create_masks_for_generate`` makes; other masks as they are."""
    if not isinstance(attention_mask, dict):
        return attention_mask
    if prefix in attention_mask:
        return attention_mask[prefix]
    start = f"{prefix}/"
    return {key[len(start) :]: value for key, value in attention_mask.items() if key.startswith(start)}


def _has_dropout(config: Any) -> bool:
    return any(isinstance(value, float) and value > 0 for key, value in vars(config).items() if "drop" in key)
