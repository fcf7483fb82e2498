"""The composition as a Hugging Face model: ``CalmModel`` gives states, ``CalmForCausalLM`` gives logits and a loss.

A call runs the augmenting models first (no gradients, outputs of the connected layers kept), then the anchor, whose
hooks add the cross-attentions layer by layer. A position sees the augmenting model's states up to its own token and
none beyond, so that the cross-attention is causal attention over another stream's keys and values.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask, create_masks_for_generate
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, slice_logits_to_keep

from calmlm import storage
from calmlm.backbone import Backbone, accepts, freeze, text_config
from calmlm.cache import CalmCache
from calmlm.config import CalmConfig, ConnectorConfig
from calmlm.connector import CrossAttention, eager_attention, rotary_angles
from calmlm.errors import ConfigError, DataError, ModelError
from calmlm.hooks import Call, CaptureHook, InjectHook, Slot, Stream
from calmlm.loading import load_composition

# Arguments that belong to the loss, which the composition computes itself.
LOSS_ARGUMENTS = ("num_items_in_batch", "shift_labels", "ignore_index")
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
        for index, (i, j) in enumerate(entry["connections"]):
            connector = CrossAttention(augmenting.size, anchor.size, **vars(options))
            connector.to(next(anchor.layers[j].parameters()).device)
            connectors.append(connector)
            hook = InjectHook(self.slot, name, index, i, connector)
            # First in line, so that outputs recorded by other hooks are those of the composition.
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

        With activation checkpointing the anchor's layers alone carry the training flag, which is what makes
        transformers checkpoint them; layers that apply dropout themselves keep it off and are not checkpointed.
        """
        super().train(mode)
        for base in self.bases():
            base.eval()
        if mode and not _has_dropout(text_config(self.anchor)):
            for layer in self._backbones[""].layers:
                if getattr(layer, "gradient_checkpointing", False):
                    layer.training = True
        return self

    def new_cache(self, anchor_cache: Cache | None = None) -> CalmCache:
        """An empty cache for this composition, around the anchor's own (a new dynamic one by default)."""
        if anchor_cache is None:
            anchor_cache = DynamicCache(config=text_config(self.anchor))
        return CalmCache.around(
            anchor_cache,
            {name: text_config(model) for name, model in self.augmenting.items()},
            {name: len(connectors) for name, connectors in self.connectors.items()},
        )

    def cache_for(self, past_key_values: Cache | None, use_cache: bool) -> CalmCache | None:
        """The cache that a call uses, given what its caller passed."""
        if past_key_values is None:
            return self.new_cache() if use_cache else None
        if isinstance(past_key_values, CalmCache):
            return past_key_values
        return self.new_cache(past_key_values)

    def begin(
        self,
        input_ids: Tensor | None,
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
            DataError: when there are no token ids, or ids that the augmenting model does not have.
        """
        if input_ids is None:
            raise DataError(
                "A composition must be given input_ids, because the augmenting model reads the same tokens, but got "
                "inputs_embeds alone: pass input_ids, or disable the composition."
            )
        call = Call()
        for name, model in self.augmenting.items():
            backbone = self._backbones[name]
            self._check_ids(input_ids, name)
            cross = cache.cross[name] if cache is not None else None
            call.streams[name] = self._stream(name, input_ids, attention_mask, position_ids, cross)
            arguments = base_arguments(
                backbone,
                input_ids=input_ids.to(model.get_input_embeddings().weight.device),
                attention_mask=_mask_of(attention_mask, f"augmenting.{name}"),
                position_ids=position_ids,
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
            positions = position_ids
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
        cache = self.cache_for(past_key_values, use_cache and backbone.cache_argument is not None)
        if position_ids is None:
            position_ids = self._positions(input_ids, attention_mask)
        call = self.begin(input_ids, attention_mask, position_ids, cache)
        arguments = base_arguments(
            backbone,
            input_ids=input_ids,
            attention_mask=_mask_of(attention_mask, "anchor"),
            position_ids=position_ids,
            cache=cache.anchor if cache is not None else None,
        )
        self.slot.call = call
        try:
            output = target(**arguments, **kwargs)
        finally:
            self.slot.call = None
        return output, cache

    def _positions(self, input_ids: Tensor | None, attention_mask: Any) -> Tensor | None:
        """Positions counted over real tokens, for models that add an embedding of the absolute position.

        Without them such a model counts padding on the left, and a padded row differs from the same row alone. Models
        with relative positions are left to count by themselves.
        """
        if input_ids is None or not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2:
            return None
        if not any(backbone.absolute_positions for backbone in self._backbones.values()):
            return None
        positions = attention_mask.long().cumsum(-1) - 1
        return positions.clamp(min=0)[:, -input_ids.shape[1] :]


class CalmForCausalLM(CalmPreTrainedModel, GenerationMixin):
    """A composition of frozen language models that trains, generates, saves and loads as one.

    Only the connectors have ``requires_grad``. Make one with ``calmlm.compose`` or ``from_pretrained``.
    """

    def __init__(self, config: CalmConfig, anchor: PreTrainedModel, augmenting: dict[str, PreTrainedModel]) -> None:
        super().__init__(config, anchor)
        self.model = CalmModel(config, anchor, augmenting)
        self._is_stateful = bool(getattr(anchor, "_is_stateful", False))
        if anchor.generation_config is not None:
            self.generation_config = copy.deepcopy(anchor.generation_config)
        self._keys_to_ignore_on_save = {n for n in self.state_dict() if not self.is_composition(n)}
        self.post_init()

    # What belongs to whom

    @property
    def anchor(self) -> PreTrainedModel:
        """The frozen anchor."""
        return self.model.anchor

    @property
    def augmenting(self) -> dict[str, PreTrainedModel]:
        """The frozen augmenting models, by name."""
        return dict(self.model.augmenting.items())

    @property
    def lm_head(self) -> nn.Module:
        """The anchor's output embeddings."""
        return self.anchor.get_output_embeddings()

    def get_input_embeddings(self) -> nn.Module:
        return self.anchor.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.anchor.get_output_embeddings()

    def get_decoder(self) -> nn.Module:
        return self.model

    @staticmethod
    def is_composition(name: str) -> bool:
        """Whether the tensor of this name belongs to the composition rather than to a base."""
        return name.startswith("model.connectors.")

    def composition_tensors(self, state_dict: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The composition's own tensors, by name."""
        state_dict = self.state_dict() if state_dict is None else state_dict
        return {name: tensor for name, tensor in state_dict.items() if self.is_composition(name)}

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Trainable and all parameters."""
        parameters = list(self.parameters())
        return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)

    def print_trainable_parameters(self) -> None:
        """Print how many parameters train, of how many, and what share that is."""
        trainable, total = self.get_nb_trainable_parameters()
        print(f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {100 * trainable / total:.4f}")

    @contextmanager
    def disable_composition(self) -> Iterator[CalmForCausalLM]:
        """Within this context the model is the anchor alone, bit for bit."""
        before = self.model.enabled
        self.model.enabled = False
        try:
            yield self
        finally:
            self.model.enabled = before

    # Calls

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits, and a loss where labels are given.

        Args:
            input_ids: (B, T) int64.
            attention_mask: (B, past + T), 1 at real tokens; padding may stand on either side.
            position_ids: (B or 1, T) int64; counted by the models themselves by default.
            past_key_values: the ``CalmCache`` of an earlier call, or an empty cache.
            labels: (B, T) int64, -100 where no loss is wanted; shifted inside, as everywhere in transformers.
            use_cache: whether to return a cache; by default in evaluation mode.
            logits_to_keep: how many of the last positions need logits, 0 for all; or their indices.
            kwargs: ``num_items_in_batch`` and ``shift_labels`` reach the loss, the rest the anchor.

        Returns:
            loss (scalar float32 or None), logits (B, T or fewer, vocabulary), past_key_values.
        """
        loss_arguments = {key: kwargs.pop(key) for key in LOSS_ARGUMENTS if kwargs.get(key) is not None}
        kwargs = {key: value for key, value in kwargs.items() if key not in LOSS_ARGUMENTS}
        kwargs.pop("return_dict", None)
        keeps = accepts(self.anchor, "logits_to_keep")
        if keeps:
            kwargs["logits_to_keep"] = logits_to_keep
        output, cache = self.model.run(
            self.anchor, input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, kwargs
        )
        logits = output.logits if keeps else slice_logits_to_keep(output.logits, logits_to_keep)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **loss_arguments)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=cache,
            hidden_states=getattr(output, "hidden_states", None),
            attentions=getattr(output, "attentions", None),
        )

    # Generation

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; with the composition disabled, the anchor's own ``generate``."""
        if not self.model.enabled:
            return self.anchor.generate(*args, **kwargs)
        return super().generate(*args, **kwargs)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        if self.model.backbone().cache_argument is None:
            generation_config.use_cache = model_kwargs["use_cache"] = False
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        cache = model_kwargs.get("past_key_values")
        if cache is None or isinstance(cache, CalmCache):
            return
        model_kwargs["past_key_values"] = self.model.new_cache(cache)
        if generation_config.is_assistant:
            model_kwargs["past_key_values"].activate_past_recording()

    def create_masks_for_generate(
        self,
        config: Any,
        inputs_embeds: Tensor,
        attention_mask: Any,
        past_key_values: Cache | None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """All masks of a step in one flat dictionary, as generation with a compilable cache wants them."""
        assert isinstance(past_key_values, CalmCache)
        masks: dict[str, Any] = {}

        def add(prefix: str, model: PreTrainedModel, cache: Cache) -> None:
            create = getattr(model, "create_masks_for_generate", create_masks_for_generate)
            made = create(
                config=model.config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                past_key_values=cache,
                position_ids=position_ids,
                **kwargs,
            )
            if isinstance(made, dict):
                masks.update({f"{prefix}/{key}": value for key, value in made.items()})
            else:
                masks[prefix] = made

        add("anchor", self.anchor, past_key_values.anchor)
        for name, model in self.model.augmenting.items():
            add(f"augmenting.{name}", model, past_key_values.augmenting[name])
            masks[f"cross.{name}"] = self.model.cross_mask(
                name, inputs_embeds, attention_mask, position_ids, past_key_values.cross[name]
            )
        return masks

    # Files

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Write the composition's tensors, its configuration and a model card; the bases are named, not copied.

        Args:
            save_directory: folder, made if needed.
            is_main_process: whether this process writes.
            state_dict: tensors to save instead of the model's own (distributed trainers gather them first).
            push_to_hub: whether to upload the folder afterwards; ``kwargs`` go to ``push_to_hub`` then.
        """
        if not is_main_process:
            return
        folder = Path(save_directory)
        if folder.is_file():
            raise ConfigError(f"save_directory must be a folder, but {str(folder)!r} is a file: choose another name.")
        config = storage.portable_config(self.config, folder)
        storage.write_tensors(folder, self.composition_tensors(state_dict))
        storage.write_text(folder / "config.json", config.to_json_string())
        storage.write_text(folder / "generation_config.json", self.generation_config.to_json_string())
        if not (folder / storage.CARD_NAME).exists():
            storage.write_text(folder / storage.CARD_NAME, storage.model_card(config))
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", folder.name), **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, *args: Any, **kwargs: Any) -> CalmForCausalLM:
        """Load a composition and, by their ids, its base models.

        Args:
            pretrained_model_name_or_path: folder or hub id of the composition.
            kwargs: ``anchor``, ``augmenting`` (loaded models, ids or folders to use instead of the recorded ones; a
                dictionary where there are several augmenting models), ``dtype``, ``device_map``,
                ``attn_implementation``, ``trust_remote_code``, ``revision``, ``token``, ``cache_dir``,
                ``local_files_only``, ``quantization_config``.

        Raises:
            CheckpointError: when the folder holds no composition, a damaged one, or one made on other bases.
            ModelError: when a base model cannot be loaded.
        """
        return load_composition(cls, pretrained_model_name_or_path, **kwargs)


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


def _mask_of(attention_mask: Any, prefix: str) -> Any:
    """One base model's part of the dictionary that ``create_masks_for_generate`` makes; other masks as they are."""
    if not isinstance(attention_mask, dict):
        return attention_mask
    if prefix in attention_mask:
        return attention_mask[prefix]
    start = f"{prefix}/"
    return {key[len(start) :]: value for key, value in attention_mask.items() if key.startswith(start)}


def _has_dropout(config: Any) -> bool:
    return any(
        isinstance(value, float) and not math.isclose(value, 0.0)
        for key, value in vars(config).items()
        if "drop" in key and "attention" not in key and "attn" not in key
    )


AutoConfig.register(CalmConfig.model_type, CalmConfig)
AutoModelForCausalLM.register(CalmConfig, CalmForCausalLM)
