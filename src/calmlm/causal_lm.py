"""``CalmForCausalLM``: a composition as a Hugging Face causal language model."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast, MoeCausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from calmlm.bases.fingerprint import check_fingerprint
from calmlm.bases.origins import warn_of_changes
from calmlm.bases.sharding import shape_of
from calmlm.bases.structure import accepts
from calmlm.config import CalmConfig, check_names
from calmlm.decoding.loops import CalmGenerationMixin
from calmlm.errors import ConfigError, WriteError, unwritten
from calmlm.files import saving, storage
from calmlm.files.loading import load_composition
from calmlm.files.naming import CompositionProcessor, CompositionTokenizer, check_saved, name_of, rename
from calmlm.files.paths import named
from calmlm.files.publishing import Published
from calmlm.modeling import CalmModel, CalmPreTrainedModel
from calmlm.modeling.probabilities import needed_for, pointed_logits
from calmlm.readers import Inputs, given_of, prompt_mask_of, prompt_of, starts_of
from calmlm.tokens.alignment import Alignment
from calmlm.tokens.beginning import Prefix, prefix_ids
from calmlm.tokens.retokenization import Rewriting
from calmlm.tokens.stream import Rewriter
from calmlm.tokens.transcoding import Transcoder

# Arguments that belong to the loss, which the composition computes itself.
LOSS_ARGUMENTS = ("num_items_in_batch", "shift_labels", "ignore_index")
# Arguments that other models are saved with, which an upload does not take: a composition is one file of safetensors.
SAVING_ARGUMENTS = (
    "distributed_checkpoint",
    "max_shard_size",
    "safe_serialization",
    "save_original_format",
    "save_peft_format",
    "variant",
)


class CalmForCausalLM(Published, CalmPreTrainedModel, CalmGenerationMixin):
    """A composition of frozen language models that trains, generates, saves and loads as one.

    Only the connectors have ``requires_grad``. Make one with ``calmlm.compose`` or ``from_pretrained``.
    """

    def __init__(
        self,
        config: CalmConfig,
        anchor: PreTrainedModel,
        augmenting: dict[str, PreTrainedModel],
        alignments: Mapping[str, Alignment | Rewriting | Transcoder | Rewriter] | None = None,
    ) -> None:
        super().__init__(config, anchor)
        self.model = CalmModel(config, anchor, augmenting, alignments)
        self._keeps_logits = accepts(anchor, "logits_to_keep")
        if anchor.generation_config is not None:
            self.generation_config = copy.deepcopy(anchor.generation_config)
        self._note_tensors()
        self.post_init()
        self.register_forward_pre_hook(_tell_prompts, with_kwargs=True)
        self._place: str | None = None  # where this composition can be loaded once more
        self._rename()

    # What belongs to whom

    @property
    def hf_quantizer(self) -> Any:
        """What has quantised the anchor, which PEFT asks when it merges into it; none is an AttributeError."""
        return self.anchor.hf_quantizer

    @property
    def _is_stateful(self) -> bool:  # type: ignore[override]
        """Whether a model that speaks keeps a state from which no token can be taken back."""
        model = getattr(self, "model", None)  # transformers may ask before there is one
        return model is not None and any(getattr(base, "_is_stateful", False) for base in model.advancing())

    @property
    def anchor(self) -> PreTrainedModel:
        """The frozen anchor."""
        return self.model.anchor

    @property
    def augmenting(self) -> dict[str, PreTrainedModel]:
        """The frozen augmenting models, by name."""
        return dict(self.model.augmenting.items())

    @property
    def hf_device_map(self) -> dict[str, Any]:
        """Which part lies on which device, where a base was loaded with a device map; tools look for it here."""
        return {f"model.{name}": device for name, device in self.model.hf_device_map.items()}

    @property
    def device(self) -> torch.device:
        """Where inputs are expected: the anchor's embeddings compute there, wherever their weights lie."""
        return self.model.device

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

    def _note_tensors(self) -> None:
        """Take note of which tensors are the composition's; a trainer that spreads the model could not be asked."""
        state = self.state_dict()
        self._keys_to_ignore_on_save = {name for name in state if not self.is_composition(name)}
        self._shapes = {name: tensor.shape for name, tensor in state.items() if self.is_composition(name)}

    def set_augmenting_prefix(
        self,
        prefix: Prefix | None,
        augmenting_tokenizer: PreTrainedTokenizerBase | None = None,
        name: str | None = None,
    ) -> None:
        """Give an augmenting model something else to read before each text, in the place of its prefix.

        It holds for texts that begin from now on, and is saved with the composition. Nothing is trained.

        Args:
            prefix: a text, or messages for the chat template of its tokenizer; None for nothing.
            augmenting_tokenizer: of the augmenting model; not needed for None.
            name: of the augmenting model, where there are several.

        Raises:
            ConfigError: for an unknown name, a model that reads no text, or a prefix without a tokenizer.
        """
        known = list(self.config.augmenting)
        if (name is None and len(known) > 1) or (name is not None and name not in known):
            raise ConfigError(
                f"name must be one of the augmenting models {', '.join(known)}, but got {name!r}: name one of these."
            )
        name = known[0] if name is None else name
        if self.config.augmenting[name]["reads"] == "inputs":
            raise ConfigError(
                f"augmenting_prefix is for models that read text, but {name!r} is an encoder: name another one."
            )
        self.model.change_prefix(name, [] if prefix is None else prefix_ids(augmenting_tokenizer, prefix))
        self._settle()

    def composition_tensors(self, state_dict: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The composition's own tensors, by name.

        Raises:
            ConfigError: when ``state_dict`` lacks some, or processes hold parts of them, or PEFT has changed them.
        """
        if state_dict is not None:
            return saving.own_tensors(state_dict, self._shapes)
        tensors = {name: tensor for name, tensor in self.state_dict().items() if self.is_composition(name)}
        saving.check_whole(tensors, self._shapes)
        saving.check_own(tensors, self._shapes)
        return tensors

    def _rename(self) -> None:
        """Set the name by which trainers load a reference and a tokenizer: where this composition lies, or nowhere."""
        rename(self, self._place if self.model.active == set(self.model.augmenting) else None)

    def train(self, mode: bool = True) -> CalmForCausalLM:
        """As in torch; a composition that trains is no longer what lies where it was loaded."""
        if mode and any(parameter.requires_grad for parameter in self.model.connectors.parameters()):
            self._place = None
            self._rename()
        return super().train(mode)

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Trainable and all parameters, those of a model that is spread over processes counted as a whole."""
        sizes = [(math.prod(shape_of(p)), p.requires_grad) for p in self.parameters()]
        return sum(size for size, trains in sizes if trains), sum(size for size, _ in sizes)

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

    @contextmanager
    def composition_scale(self, scale: float) -> Iterator[CalmForCausalLM]:
        """Within this context all that the composition adds is multiplied by ``scale``: 0 is the anchor, bit for bit.

        That is what connections and words add to the anchor's states, what adapters add to the outputs of its maps, and
        the share that pointers have of its probabilities. Contexts inside each other multiply.

        Args:
            scale: from 0 to 1.

        Raises:
            ConfigError: for another one.
        """
        if not isinstance(scale, (int, float)) or isinstance(scale, bool) or not 0 <= scale <= 1:
            raise ConfigError(f"scale must be a number from 0, the anchor, to 1, but got {scale!r}: choose one.")
        before = self.model.enabled, self.model.scale
        self.model.scale = float(scale) * self.model.scale
        self.model.enabled = self.model.enabled and self.model.scale > 0
        try:
            yield self
        finally:
            self.model.enabled, self.model.scale = before

    def merge_adapters(self) -> None:
        """Compute with the adapters' weights inside the anchor's from now on: the same sums, rounded elsewhere.

        A token of a small anchor costs a quarter less so. The merged weights take as much memory as those that the
        adapters stand beside, which stay as they are: the anchor is itself bit for bit where the composition is off.
        Calls that want gradients or are compiled, and batches with a ``composition_mask`` or a ``composition_scale``,
        are computed as before. What changes, by training or loading, is merged again; after others have written to a
        parameter's ``.data``, as PEFT does to merge its own adapters, call this once more.

        Raises:
            ModelError: the anchor's weights are quantised or not in memory, or PEFT has put something around them.
        """
        self.model.merge_adapters()

    def unmerge_adapters(self) -> None:
        """Take ``merge_adapters`` back."""
        self.model.unmerge_adapters()

    # Several augmenting models

    def add_augmenting(
        self, name: str, source: str | Path | CalmForCausalLM, *, source_name: str | None = None, **options: Any
    ) -> None:
        """Join an augmenting model whose connections were trained in another composition on the same anchor.

        Nothing is trained: both sets of connections then work side by side, at the sum of their costs.

        Args:
            name: what to call it here.
            source: the other composition: a folder, a hub id or a loaded one, which stays as it is.
            source_name: which of its augmenting models to take, where it has several.
            options: passed to ``from_pretrained`` for a folder or an id.

        Raises:
            ConfigError: for a name that is taken or cannot be used, or a ``source_name`` that is missing.
            CheckpointError: when the other composition was made on another anchor.
        """
        self._check_new_name(name)
        if isinstance(source, CalmForCausalLM):
            other = source
            ours, theirs = self.config.anchor, other.config.anchor
            check_fingerprint(
                self.anchor,
                theirs.get("fingerprint"),
                "anchor",
                f"{theirs.get('id') or '(in memory)'} of the other composition",
                f"{ours.get('id') or '(in memory)'} of this one",
            )
        else:
            other = type(self).from_pretrained(source, anchor=self.anchor, **options)
        names = list(other.config.augmenting)
        taken = source_name if source_name is not None else names[0]
        if taken in names and (source_name is not None or len(names) == 1):
            entry = copy.deepcopy(other.config.augmenting[taken])
            tensors = {key: tensor.clone() for key, tensor in other.model.connectors[taken].state_dict().items()}
            self.model.add(name, other.augmenting[taken], entry, other.model.alignments.get(taken), tensors)
        if other is not source:  # it was loaded around this anchor, so its hooks have to go
            for loaded in names:
                other.model.remove(loaded)
        if name not in self.model.augmenting:
            raise ConfigError(
                f"source_name must be one of the augmenting models of that composition ({', '.join(names)}), but got "
                f"{source_name!r}: name one of them."
            )
        self._settle()

    def remove_augmenting(self, name: str) -> None:
        """Take one augmenting model out; the last one cannot be.

        Raises:
            ConfigError: for a name that there is not, or the last one.
        """
        self._check_name(name)
        if len(self.model.augmenting) == 1:
            raise ConfigError(
                f"A composition must keep one augmenting model, but {name!r} is the last: use disable_composition() or "
                f"the anchor itself."
            )
        self.model.remove(name)
        self._settle()

    def _settle(self) -> None:
        """After the composition has become another one."""
        self._note_tensors()
        self._place = None
        self._rename()

    def enable_augmenting(self, name: str) -> None:
        """Let one augmenting model speak again after ``disable_augmenting``; caches begin anew."""
        self._check_name(name)
        self.model.active.add(name)
        self._rename()

    def disable_augmenting(self, name: str) -> None:
        """Silence one augmenting model until ``enable_augmenting``; caches begin anew."""
        self._check_name(name)
        self.model.active.discard(name)
        self._rename()

    def _check_name(self, name: str) -> None:
        if name not in self.model.augmenting:
            raise ConfigError(
                f"The name must be one of the augmenting models ({', '.join(self.model.augmenting)}), but got "
                f"{name!r}: use one of these."
            )

    def _check_new_name(self, name: str) -> None:
        check_names([name])
        if name in self.model.augmenting:
            raise ConfigError(f"An augmenting model needs a name of its own, but {name!r} is taken: choose another.")

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
        augmenting_inputs: dict[str, dict[str, Any]] | None = None,
        prompt_mask: Tensor | None = None,
        composition_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits, and a loss where labels are given.

        Args:
            input_ids: (B, T) int64.
            attention_mask: (B, past + T), 1 at real tokens; padding may stand on either side.
            position_ids: (B or 1, T) int64, counted from 0 in every family; by the models themselves by default.
            past_key_values: the ``CalmCache`` of an earlier call, or an empty cache.
            labels: (B, T) int64, -100 where no loss is wanted; shifted inside, as everywhere in transformers, but for
                ``shift_labels`` beside them, which stand for the positions that have logits, as many and no more.
            use_cache: whether to return a cache; by default in evaluation mode.
            logits_to_keep: how many of the last positions need logits, 0 for all; or which columns, (K,) int64; or
                which positions, (B, T) bool.
            augmenting_inputs: inputs of augmenting encoders, by name: ``{"eyes": {"pixel_values": ...}}``.
            prompt_mask: (B, T) bool, which tokens were given and not generated. An augmenting model with
                ``refresh=False`` reads these alone; one with tokens of its own reads them as a whole, to their end. By
                default they are those without a label; without labels, all for the first and none for the second.
            composition_mask: (B,) bool, the rows that the composition speaks in, all by default; the others are the
                anchor's own. Or (B, models) bool, which augmenting models speak in which row, in the order in which
                ``model.augmenting`` names them: a row is what it would be with the others switched off.
            kwargs: ``num_items_in_batch`` and ``shift_labels`` reach the loss, the rest the anchor.

        Returns:
            loss (scalar float32 or None), logits (B, T or fewer, vocabulary), or (N, vocabulary) of N positions,
            past_key_values.
        """
        loss_arguments = {key: kwargs.pop(key) for key in LOSS_ARGUMENTS if kwargs.get(key) is not None}
        kwargs = {key: value for key, value in kwargs.items() if key not in LOSS_ARGUMENTS}
        kwargs.pop("return_dict", None)
        if isinstance(logits_to_keep, Tensor) and hasattr(self.model, "hf_device_map"):
            logits_to_keep = logits_to_keep.cpu()  # from where positions are chosen on any device
        if self._keeps_logits:
            tokens = input_ids if input_ids is not None else inputs_embeds
            kwargs["logits_to_keep"] = self.model.backbone().kept(logits_to_keep, tokens)
        told = None
        if prompt_mask is None and labels is not None:
            starts = starts_of(labels, attention_mask, position_ids)
            prompt_mask, told = prompt_of(labels, starts), given_of(labels, past_key_values, starts)
        output, cache, pointed = self.model.run(
            self.anchor,
            Inputs(input_ids, attention_mask, position_ids, prompt_mask, augmenting_inputs, composition_mask, told),
            past_key_values, inputs_embeds, use_cache, kwargs,
        )  # fmt: skip
        logits = output.logits if self._keeps_logits else slice_logits_to_keep(output.logits, logits_to_keep)
        if pointed is not None:
            needed = None
            if labels is not None and self.training:
                shifted = loss_arguments.get("shift_labels")
                whole = shifted is not None and shifted.shape == labels.shape  # or it says so of some positions alone
                needed = needed_for(labels, shifted if whole else None, loss_arguments.get("ignore_index", -100))
            logits = pointed_logits(logits, pointed, self.model.heads, logits_to_keep, needed)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **loss_arguments)
        found = {"loss": loss, "logits": logits, "past_key_values": cache}
        found |= {name: getattr(output, name, None) for name in ("hidden_states", "attentions")}
        if getattr(output, "router_logits", None) is None:
            return CausalLMOutputWithPast(**found)
        # Asked for, by trainers too, where the anchor is a mixture of experts; its router is frozen as all of it is.
        aux_loss = getattr(output, "aux_loss", None)
        return MoeCausalLMOutputWithPast(**found, aux_loss=aux_loss, router_logits=output.router_logits)

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
        if not str(save_directory):
            raise ConfigError("save_directory must be a folder, but it is empty: name one.")
        folder = Path(named(save_directory))
        if folder.is_file():
            raise ConfigError(f"save_directory must be a folder, but {str(folder)!r} is a file: choose another name.")
        storage.check_free(folder)
        tensors = self.composition_tensors(state_dict)
        if state_dict is None:
            entries = self.config.augmenting.items()
            told = [(name, self.augmenting[name], entry) for name, entry in entries]
            warn_of_changes([("anchor", self.anchor, self.config.anchor), *told])
        try:
            saving.save_composition(folder, self.config, tensors, self.generation_config, self.model.alignments)
        except (OSError, SafetensorError) as error:
            raise WriteError(
                f"Expected to write a composition in {folder}, but that failed ({unwritten(error)}), and what was "
                f"there stays: make room, or choose another folder."
            ) from error
        if push_to_hub:
            given = {key: value for key, value in kwargs.items() if key not in SAVING_ARGUMENTS}
            given |= {} if state_dict is None else {"state_dict": state_dict}
            self.push_to_hub(given.pop("repo_id", folder.name), **given)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, *args: Any, **kwargs: Any) -> CalmForCausalLM:
        """Load a composition and, by their ids, its base models.

        Args:
            pretrained_model_name_or_path: folder or hub id of the composition.
            kwargs: ``anchor``, ``augmenting`` (loaded models, ids or folders to use instead of the recorded ones; a
                dictionary where there are several augmenting models), ``dtype``, ``device_map``,
                ``attn_implementation``, ``trust_remote_code``, ``revision``, ``token``, ``cache_dir``,
                ``local_files_only``, ``quantization_config``, ``generation_config`` (instead of the saved one).

        Raises:
            CheckpointError: when the folder holds no composition, a damaged one, or one made on other bases.
            ModelError: when a base model cannot be loaded.
        """
        source, report = named(pretrained_model_name_or_path), kwargs.pop("output_loading_info", False)
        check_saved(source)
        model = load_composition(cls, source, **kwargs)
        model._place = name_of(source, kwargs)
        model._rename()
        # It is loaded as a whole, or not at all.
        amiss: dict[str, Any] = {key: set() for key in ("missing_keys", "unexpected_keys", "mismatched_keys")}
        return (model, amiss | {"error_msgs": []}) if report else model  # type: ignore[return-value]


def _tell_prompts(model: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    """Say which tokens are prompts where TRL asks for a loss from states: it keeps the labels to itself."""
    inner: Any = model.model
    asked = kwargs.get("fused_lm_head") and kwargs.get("labels") is not None and kwargs.get("prompt_mask") is None
    if not asked or not inner.wants_prompts:
        return None
    return args, {**kwargs, "prompt_mask": prompt_mask_of(kwargs, first=inner.reads_prompts)}


AutoConfig.register(CalmConfig.model_type, CalmConfig)
AutoModelForCausalLM.register(CalmConfig, CalmForCausalLM)
AutoTokenizer.register(CalmConfig, tokenizer_class=CompositionTokenizer)
AutoProcessor.register(CalmConfig, CompositionProcessor)
# Trainer smooths the labels of classes that stand here as those of causal models, shifted by one, and of others as not.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[CalmConfig.model_type] = CalmForCausalLM.__name__
