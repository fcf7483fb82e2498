"""``CalmForCausalLM``: a composition as a Hugging Face causal language model."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedModel, StoppingCriteriaList
from transformers.cache_utils import Cache
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep

from calmlm import storage
from calmlm.alignment import Alignment
from calmlm.backbone import accepts, check_fingerprint
from calmlm.cache import CalmCache
from calmlm.config import CalmConfig, check_names
from calmlm.drafting import AugmentingCandidateGenerator, DraftConfig, Drafter
from calmlm.errors import ConfigError
from calmlm.loading import load_composition
from calmlm.modeling import CalmModel, CalmPreTrainedModel, needs_tokens
from calmlm.readers import Inputs, prompt_of
from calmlm.rewriting import Rewriting
from calmlm.stopping import Bounded, Gate, check_new_tokens

# Arguments that only a composition takes.
OWN_ARGUMENTS = ("augmenting_inputs", "prompt_mask", "composition_mask")
# Arguments that assisted generation hands on to itself.
LOOP_ARGUMENTS = ("cached_tokens", "earlier_tokens", "whole_mask")
# Arguments that belong to the loss, which the composition computes itself.
LOSS_ARGUMENTS = ("num_items_in_batch", "shift_labels", "ignore_index")


class CalmForCausalLM(CalmPreTrainedModel, GenerationMixin):
    """A composition of frozen language models that trains, generates, saves and loads as one.

    Only the connectors have ``requires_grad``. Make one with ``calmlm.compose`` or ``from_pretrained``.
    """

    def __init__(
        self,
        config: CalmConfig,
        anchor: PreTrainedModel,
        augmenting: dict[str, PreTrainedModel],
        alignments: dict[str, Alignment | Rewriting] | None = None,
    ) -> None:
        super().__init__(config, anchor)
        self.model = CalmModel(config, anchor, augmenting, alignments)
        self._keeps_logits = accepts(anchor, "logits_to_keep")
        self._is_stateful = any(getattr(base, "_is_stateful", False) for base in self.model.bases())
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
                theirs.get("id") or "the other composition's anchor",
                ours.get("id") or "this one's anchor",
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
        self._keys_to_ignore_on_save = {n for n in self.state_dict() if not self.is_composition(n)}

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

    def enable_augmenting(self, name: str) -> None:
        """Let one augmenting model speak again after ``disable_augmenting``; caches begin anew."""
        self._check_name(name)
        self.model.active.add(name)

    def disable_augmenting(self, name: str) -> None:
        """Silence one augmenting model until ``enable_augmenting``; caches begin anew."""
        self._check_name(name)
        self.model.active.discard(name)

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
            position_ids: (B or 1, T) int64; counted by the models themselves by default.
            past_key_values: the ``CalmCache`` of an earlier call, or an empty cache.
            labels: (B, T) int64, -100 where no loss is wanted; shifted inside, as everywhere in transformers.
            use_cache: whether to return a cache; by default in evaluation mode.
            logits_to_keep: how many of the last positions need logits, 0 for all; or their indices.
            augmenting_inputs: inputs of augmenting encoders, by name: ``{"eyes": {"pixel_values": ...}}``.
            prompt_mask: (B, T) bool, which tokens an augmenting model with ``refresh=False`` may read; by default those
                before the first label, or all where there are no labels.
            composition_mask: (B,) bool, the rows that the composition speaks in, all by default; the others are the
                anchor's own.
            kwargs: ``num_items_in_batch`` and ``shift_labels`` reach the loss, the rest the anchor.

        Returns:
            loss (scalar float32 or None), logits (B, T or fewer, vocabulary), past_key_values.
        """
        loss_arguments = {key: kwargs.pop(key) for key in LOSS_ARGUMENTS if kwargs.get(key) is not None}
        kwargs = {key: value for key, value in kwargs.items() if key not in LOSS_ARGUMENTS}
        kwargs.pop("return_dict", None)
        if self._keeps_logits:
            kwargs["logits_to_keep"] = logits_to_keep
        if prompt_mask is None and labels is not None:
            prompt_mask = prompt_of(labels)
        output, cache = self.model.run(
            self.anchor,
            Inputs(input_ids, attention_mask, position_ids, prompt_mask, augmenting_inputs, composition_mask),
            past_key_values, inputs_embeds, use_cache, kwargs,
        )  # fmt: skip
        logits = output.logits if self._keeps_logits else slice_logits_to_keep(output.logits, logits_to_keep)
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

    def generate(self, *args: Any, drafting: bool | DraftConfig | None = None, **kwargs: Any) -> Any:
        """As in transformers; with the composition disabled, the anchor's own ``generate``.

        Args:
            args: as in transformers.
            drafting: whether, or how, the augmenting model proposes tokens that the composition then checks. Greedy
                decoding gives the same tokens, sampling the same distribution. One row at a time.
            kwargs: as in transformers; ``augmenting_inputs`` and ``composition_mask`` besides.

        Raises:
            ConfigError: when this composition, or this kind of generation, cannot draft.
        """
        if not self.model.enabled:
            return self.anchor.generate(*args, **_without_own(kwargs))
        if kwargs.get("inputs_embeds") is not None:
            raise needs_tokens()
        if self._asked("assistant_early_exit", args, kwargs) is not None:
            raise ConfigError(
                "Early exit must leave out layers of one model, but assistant_early_exit was given to a composition, "
                "whose connections may stand in them: use drafting=True."
            )
        if drafting:
            kwargs["assistant_model"] = self._drafter(drafting, args, kwargs)
        ids = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
        reads = [self.config.augmenting[name]["reads"] for name in self.model.active]
        if ids is not None and "prompt" in reads:  # drafted and generated tokens are no part of the prompt
            kwargs.setdefault("prompt_mask", torch.ones_like(ids, dtype=torch.bool))
        return super().generate(*args, **kwargs)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        if not self.model.can_cache:
            generation_config.use_cache = model_kwargs["use_cache"] = False
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        cache = model_kwargs.get("past_key_values")
        if cache is None or isinstance(cache, CalmCache):
            return
        model_kwargs["past_key_values"] = self.model.new_cache(cache)
        if generation_config.is_assistant:
            model_kwargs["past_key_values"].activate_past_recording()

    def _asked(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A generation setting: of this call, of its generation_config, or of the model's."""
        given = args[1] if len(args) > 1 else kwargs.get("generation_config")
        found = kwargs[name] if name in kwargs else getattr(given, name, None)
        return getattr(self.generation_config, name, None) if found is None else found

    def _drafter(self, drafting: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Drafter:
        """What generation takes for an assistant, once it is known that it can draft."""
        if drafting is not True and not isinstance(drafting, DraftConfig):
            raise ConfigError(f"drafting must be True or a DraftConfig, but got {drafting!r}: use one of these.")

        def asked(name: str) -> Any:
            return self._asked(name, args, kwargs)

        ids = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
        rows = (ids.shape[0] if isinstance(ids, Tensor) and ids.ndim == 2 else 1) * (asked("num_return_sequences") or 1)
        static = str(asked("cache_implementation")).endswith("static")
        recurrent = self._is_stateful or not self.model.can_cache
        refused = {
            "another assistant_model": kwargs.get("assistant_model") is not None,
            "prompt lookup": asked("prompt_lookup_num_tokens") is not None,
            "beams": (asked("num_beams") or 1) > 1,
            f"{rows} rows": rows > 1,
            "a static cache": static or getattr(kwargs.get("past_key_values"), "is_compileable", False),
            "use_cache=False": asked("use_cache") is False,
            "a model that carries its past in a form of its own": recurrent,
            "output_hidden_states": bool(asked("output_hidden_states")),
            "output_attentions": bool(asked("output_attentions")),
        }
        for what, found in refused.items():
            if found:
                raise ConfigError(
                    f"Drafting must come with one row, no beams, a dynamic cache and no states asked for, but got "
                    f"{what}: leave one of both out."
                )
        return Drafter(self.model, DraftConfig() if drafting is True else drafting)

    def _get_candidate_generator(self, *args: Any, **kwargs: Any) -> Any:
        assistant, config = kwargs.get("assistant_model"), kwargs["generation_config"]
        # A draft must not reach beyond the positions that the models have learned.
        room = self.model.max_positions
        if room is not None:
            config = copy.copy(config)
            config.max_length = min(config.max_length, room + 1 - kwargs["model_kwargs"].get("earlier_tokens", 0))
            kwargs["generation_config"] = config
        if isinstance(assistant, Drafter):
            wanted = ("input_ids", "logits_processor", "generation_config", "model_kwargs")
            return AugmentingCandidateGenerator(self.model, assistant, **{key: kwargs[key] for key in wanted})
        arguments = {key: value for key, value in kwargs["model_kwargs"].items() if key not in LOOP_ARGUMENTS}
        kwargs["model_kwargs"] = arguments if isinstance(assistant, CalmForCausalLM) else _without_own(arguments)
        generator = super()._get_candidate_generator(*args, **kwargs)
        # Prompt lookup takes max_length for a place in the text that it copies from.
        return generator if room is None else Bounded(generator, config.max_length)

    def _assisted_decoding(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        """transformers' loop over drafts, which ends exactly where decoding token by token would.

        Several tokens may be accepted at once; it looks for the end behind the last of them only, reads the whole text
        again where a cache holds the beginning, and shortens a mask that is longer than the text. All of that is put
        right here.

        Raises:
            ConfigError: for what draws on a past that cannot be taken back when a draft is refused.
        """
        cache, config = kwargs["past_key_values"], kwargs["generation_config"]
        if not isinstance(cache, CalmCache) or not cache.is_croppable:
            raise ConfigError(
                "Assisted generation must be able to take tokens back, but this composition's cache is quantised or "
                "recurrent: leave drafts and prompt lookup out."
            )
        if config.guidance_scale not in (None, 1):
            raise ConfigError(
                "Assisted generation must come with processors that keep nothing from call to call, but got "
                f"guidance_scale={config.guidance_scale}: leave it out, or drafts and prompt lookup."
            )
        mask = kwargs.get("attention_mask")
        total = mask.shape[1] if mask is not None else getattr(config, "_mask_length", input_ids.shape[1])
        # Fewer tokens than the mask has columns: only those that are not in the cache were given.
        kwargs["earlier_tokens"] = earlier = total - input_ids.shape[1]
        kwargs["cached_tokens"] = cache.get_seq_length() - earlier
        check_new_tokens(input_ids.shape[1] - kwargs["cached_tokens"], input_ids)
        kwargs["whole_mask"] = mask
        recorded = cache.recording()
        gate = Gate(kwargs["stopping_criteria"], kwargs.get("streamer"), input_ids.shape[1], cache)
        kwargs["stopping_criteria"] = StoppingCriteriaList([gate])
        kwargs["streamer"] = gate if kwargs.get("streamer") is not None else None
        try:
            output = gate.cut(super()._assisted_decoding(input_ids, *args, **kwargs))
        finally:
            gate.close()
            for layer in cache.recording():
                layer.record_past = layer in recorded
        if isinstance(kwargs.get("assistant_model"), Drafter):
            kwargs["assistant_model"].settings.statistics.tokens -= gate.beyond
        return output

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        *args: Any,
        cached_tokens: int | None = None,
        earlier_tokens: int = 0,
        whole_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """As in transformers; what assisted generation has to know of a cache from before comes in three arguments.

        Raises:
            DataError: when the cache holds all of the text, or more.
        """
        if cached_tokens and kwargs.get("is_first_iteration"):
            kwargs["next_sequence_length"] = input_ids.shape[1] - cached_tokens
        if whole_mask is not None:
            columns = earlier_tokens + input_ids.shape[1] - whole_mask.shape[1]
            kwargs["attention_mask"] = nn.functional.pad(whole_mask, (0, columns), value=1)
        new = kwargs.get("next_sequence_length")
        if new is not None:
            check_new_tokens(new, input_ids)
        return super().prepare_inputs_for_generation(input_ids, *args, **kwargs)

    def _prepare_static_cache(self, *args: Any, **kwargs: Any) -> CalmCache:
        cache = super()._prepare_static_cache(*args, **kwargs)
        # Its layers do not tell for how many tokens it was made when all of them are sliding windows.
        return self.model.new_cache(cache, self._previous_max_cache_length)

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
        for name, own in past_key_values.augmenting.items():
            add(f"augmenting.{name}", self.augmenting[name], own)
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
        files = {
            storage.WEIGHTS_NAME: storage.tensor_writer(self.composition_tensors(state_dict)),
            "config.json": storage.text_writer(config.to_json_string()),
            "generation_config.json": storage.text_writer(self.generation_config.to_json_string()),
        } | {
            storage.alignment_name(name): storage.text_writer(json.dumps(alignment.to_json()))
            for name, alignment in self.model.alignments.items()
        }
        if not (folder / storage.CARD_NAME).exists():
            files[storage.CARD_NAME] = storage.text_writer(storage.model_card(config))
        storage.write_together(folder, files)
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", folder.name), **kwargs)

    def push_to_hub(  # type: ignore[override]
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
    ) -> str:
        """Upload the composition's tensors, configuration and model card to a repository, made if needed.

        Args:
            repo_id: name of the repository, with its owner.
            commit_message: of the upload.
            private: whether a new repository is private; the hub's default where None.
            token: the hub's access token; the stored one by default.
            revision: branch to upload to.
            create_pr: whether to open a pull request instead.

        Returns:
            the address of the commit.

        Raises:
            ConfigError: when a base model has no hub id, so that nobody else could load the composition.
        """
        storage.check_published(self.config)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            api = HfApi(token=token)
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            return api.upload_folder(
                folder_path=folder,
                repo_id=repo_id,
                commit_message=commit_message or "Upload a composition",
                revision=revision,
                create_pr=create_pr,
            )

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


def _without_own(arguments: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in arguments.items() if key not in OWN_ARGUMENTS}


AutoConfig.register(CalmConfig.model_type, CalmConfig)
AutoModelForCausalLM.register(CalmConfig, CalmForCausalLM)
