"""How a composition generates: transformers' loops, with caches and masks of several models, drafts, and the switch.

All that transformers keeps private and a composition changes stands here; the tests of generation are its judges.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    GenerationMixin,
    PreTrainedModel,
    StoppingCriteriaList,
    SynthIDTextWatermarkLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
from transformers.cache_utils import Cache
from transformers.masking_utils import create_masks_for_generate

from calmlm.bases.structure import accepts
from calmlm.config import CalmConfig
from calmlm.decoding.drafting import AugmentingCandidateGenerator, DraftConfig, Drafter
from calmlm.decoding.limits import Bounded, DraftLimits
from calmlm.decoding.own_drafts import OwnDrafts
from calmlm.decoding.stopping import Gate, check_new_tokens, positions_before
from calmlm.errors import ConfigError
from calmlm.modeling import CalmModel
from calmlm.readers import OwnReader, needs_tokens, no_cache
from calmlm.state.cache import CalmCache, static_length, without_attention
from calmlm.state.longrope import check_turn, turns
from calmlm.state.past import Announced

# Arguments that only a composition takes.
OWN_ARGUMENTS = ("augmenting_inputs", "prompt_mask", "composition_mask")
# Prefixes of the arguments that give an anchor something other than text.
MODALITIES = ("pixel_", "image_", "video_", "input_features", "input_values", "audio_", "second_per_grid")
# Arguments that assisted generation hands on to itself.
LOOP_ARGUMENTS = ("cached_tokens", "earlier_tokens", "whole_mask")


class CalmGenerationMixin(GenerationMixin):
    """``generate`` of a composition."""

    model: CalmModel
    config: CalmConfig

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
            return self.model.anchor.generate(*args, **_without_own(kwargs))
        if kwargs.get("inputs_embeds") is not None:
            raise needs_tokens()
        if self._asked("assistant_early_exit", args, kwargs) is not None:
            raise ConfigError(
                "Early exit must leave out layers of one model, but assistant_early_exit was given to a composition, "
                "whose connections may stand in them: use drafting=True."
            )
        if self._asked("prefill_chunk_size", args, kwargs) is not None and not self.model.can_cache:
            raise no_cache("prefill_chunk_size")
        assisted = kwargs.get("assistant_model") is not None or self._asked("prompt_lookup_num_tokens", args, kwargs)
        if assisted and self._is_stateful:
            raise _keeps()
        given = (args[0] if args else None, kwargs.get("inputs"), kwargs.get("input_ids"))
        ids = next((found for found in given if found is not None), None)
        if drafting:
            kwargs["assistant_model"] = self._drafter(drafting, ids, args, kwargs)
        if self.model.wants_prompts:  # drafted and generated tokens are no part of the prompt
            if ids is None:  # generation begins with one token then
                rows = kwargs.get("composition_mask")
                ids = torch.ones((1 if rows is None else len(rows), 1), dtype=torch.long, device=self.device)
            mask = kwargs.get("attention_mask")  # longer than the ids where a cache holds the beginning of the text
            whole = mask if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] > ids.shape[1] else ids
            kwargs.setdefault("prompt_mask", torch.ones_like(whole, dtype=torch.bool))
        return super().generate(*args, **kwargs)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """The anchor's own, with the composition disabled; ``generate_batch`` and a paged cache come here.

        Raises:
            ConfigError: otherwise.
        """
        if not self.model.enabled:
            return self.model.anchor.init_continuous_batching(*args, **kwargs)
        raise ConfigError(
            "Continuous batching must keep one paged cache, but a composition keeps one for each of its models: use "
            "generate() with a batch, without cache_implementation='paged', or disable the composition."
        )

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        if not self.model.can_cache:
            if model_kwargs.get("past_key_values") is not None:
                raise no_cache("past_key_values")
            generation_config.use_cache = model_kwargs["use_cache"] = False
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        cache = model_kwargs.get("past_key_values")
        if cache is None or isinstance(cache, CalmCache):
            return
        model_kwargs["past_key_values"] = self.model.new_cache(cache)
        if generation_config.is_assistant:
            model_kwargs["past_key_values"].activate_past_recording()

    def _prefill(
        self, input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """As in transformers; a prompt that comes in pieces is known as a whole."""
        cache = model_kwargs.get("past_key_values")
        if generation_config.prefill_chunk_size is None or not isinstance(cache, CalmCache):
            return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)
        mask, before = model_kwargs.get("attention_mask"), int(cache.get_seq_length())
        real = torch.ones_like(input_ids, dtype=torch.bool)
        whole = True  # whether the ids hold what the cache holds
        if isinstance(mask, Tensor) and mask.ndim == 2:
            whole, real = mask.shape[1] == input_ids.shape[1], mask[:, -input_ids.shape[1] :].bool()
        cache.announced = Announced(input_ids, real, 0 if whole else before)
        try:
            return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)
        finally:
            cache.announced = None

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        pictures = [key for key, value in model_kwargs.items() if key.startswith(MODALITIES) and value is not None]
        if pictures:
            raise ConfigError(
                f"A composition must generate from text alone, but got {', '.join(pictures)} for its anchor: leave "
                f"them out, or generate with disable_composition()."
            )
        # What only the anchor's forward names reaches it through ours: token_type_ids, output_router_logits.
        theirs = [key for key in model_kwargs if not accepts(self, key) and accepts(self.model.anchor, key)]
        super()._validate_model_kwargs({key: value for key, value in model_kwargs.items() if key not in theirs})

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> Any:
        processors = super()._get_logits_processor(*args, **kwargs)
        given = {key: value for key, value in (kwargs.get("model_kwargs") or {}).items() if key in OWN_ARGUMENTS}
        for processor in processors:
            if isinstance(processor, UnbatchedClassifierFreeGuidanceLogitsProcessor) and processor.model is self:
                self._check_guidance(kwargs.get("generation_config") or args[0])
                processor.model = _Unconditional(self, given)
        return processors

    @staticmethod
    def _check_guidance(config: Any) -> None:
        """Raise where transformers' guidance would read beside the wrong rows.

        Raises:
            ConfigError: for beams, whose second texts it leaves where they were.
        """
        if (config.num_beams or 1) > 1:
            raise ConfigError(
                f"guidance_scale must come with one beam, because the text that it moves away from does not follow "
                f"them, but got num_beams={config.num_beams}: leave one of both out."
            )

    def _asked(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A generation setting: of this call, of its generation_config, or of the model's."""
        given = args[1] if len(args) > 1 else kwargs.get("generation_config")
        found = kwargs[name] if name in kwargs else getattr(given, name, None)
        return getattr(self.generation_config, name, None) if found is None else found

    def _drafter(self, drafting: Any, ids: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Drafter:
        """What generation takes for an assistant, once it is known that it can draft."""
        if drafting is not True and not isinstance(drafting, DraftConfig):
            raise ConfigError(f"drafting must be True or a DraftConfig, but got {drafting!r}: use one of these.")

        def asked(name: str) -> Any:
            return self._asked(name, args, kwargs)

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
            "another text for an augmenting model": any(
                map(self.model.reads_text, kwargs.get("augmenting_inputs") or {})
            ),
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
        room, text = self.model.abilities.max_positions, kwargs["input_ids"].shape[1]
        before = positions_before(kwargs["input_ids"], kwargs["model_kwargs"].get("position_ids"))
        lengths = [length - before for length in self.model.abilities.turns_at]
        if room is not None:
            config = copy.copy(config)
            room -= before
            config.max_length = max(text + 1, min(config.max_length, room + 1))
            kwargs["generation_config"] = config
        given = kwargs["model_kwargs"]
        limits = DraftLimits(self.model, given["past_key_values"], given["earlier_tokens"], config.max_length, lengths)
        if isinstance(assistant, Drafter):
            if isinstance(self.model.reader(assistant.name), OwnReader):
                return OwnDrafts(self.model, assistant, limits)
            wanted = ("input_ids", "logits_processor", "generation_config", "model_kwargs")
            return AugmentingCandidateGenerator(self.model, assistant, limits, **{key: kwargs[key] for key in wanted})
        arguments = {key: value for key, value in given.items() if key not in LOOP_ARGUMENTS}
        kwargs["model_kwargs"] = arguments if isinstance(assistant, CalmGenerationMixin) else _without_own(arguments)
        # Prompt lookup uses max_length as a place in the text that it copies from.
        return Bounded(super()._get_candidate_generator(*args, **kwargs), limits)

    def _assisted_decoding(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        """transformers' loop over drafts, which ends exactly where decoding token by token would.

        Several tokens may be accepted at once; it looks for the end behind the last of them only, reads the whole text
        again where a cache holds the beginning, and shortens a mask that is longer than the text. All of that is put
        right here.

        Raises:
            ConfigError: for what draws on a past that cannot be taken back when a draft is refused.
        """
        cache, config = kwargs.get("past_key_values"), kwargs["generation_config"]
        if not self.model.can_cache:
            raise no_cache("assisted generation")
        if cache is None:
            raise ConfigError(
                "Assisted generation must have a cache, but got use_cache=False: leave that out, or drafts and prompt "
                "lookup."
            )
        if not isinstance(cache, CalmCache) or not cache.is_croppable:
            raise _keeps()
        processors = kwargs.get("logits_processor") or ()
        keeping = {
            f"guidance_scale={config.guidance_scale}": config.guidance_scale not in (None, 1),
            "a SynthID watermark": any(isinstance(one, SynthIDTextWatermarkLogitsProcessor) for one in processors),
        }
        for what, found in keeping.items():
            if found:
                raise ConfigError(
                    f"Assisted generation must come with processors that keep nothing from call to call, but got "
                    f"{what}: leave it out, or drafts and prompt lookup."
                )
        mask = kwargs.get("attention_mask")
        total = mask.shape[1] if mask is not None else getattr(config, "_mask_length", input_ids.shape[1])
        # Fewer tokens than the mask has columns: only those that are not in the cache were given.
        kwargs["earlier_tokens"] = earlier = total - input_ids.shape[1]
        kwargs["cached_tokens"] = cache.get_seq_length() - earlier
        check_new_tokens(input_ids.shape[1] - kwargs["cached_tokens"], input_ids)
        if kwargs["cached_tokens"] > 0 and (config.output_hidden_states or config.output_attentions):
            raise ConfigError(
                f"The states of assisted generation must begin with the text, but past_key_values hold "
                f"{kwargs['cached_tokens']} of its tokens: leave output_hidden_states and output_attentions out, or "
                f"the cache."
            )
        kwargs["whole_mask"] = mask
        recorded = cache.recording()
        gate = Gate(kwargs["stopping_criteria"], kwargs.get("streamer"), input_ids.shape[1], cache, earlier)
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
        self._begin_anew_beyond_turn(input_ids, kwargs)
        return super().prepare_inputs_for_generation(input_ids, *args, **kwargs)

    def _begin_anew_beyond_turn(self, input_ids: Tensor, kwargs: dict[str, Any]) -> None:
        """Empty the cache and have the whole text read again where it grows beyond what the cache was made for.

        Raises:
            DataError: where the beginning of the text is not known any more.
        """
        cache, lengths = kwargs.get("past_key_values"), self.model.abilities.turns_at
        if not isinstance(cache, CalmCache) or not lengths:
            return
        given, positions = kwargs.get("next_sequence_length"), kwargs.get("position_ids")
        new = input_ids.shape[1] if given is None else given
        positions = None if positions is None else positions[..., -new:]
        if turns(lengths, cache, new, positions) is None:
            return
        if int(cache.get_seq_length()) + new != input_ids.shape[1]:
            check_turn(lengths, cache, new, positions)
        cache.reset()
        kwargs["next_sequence_length"] = None

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

        def take(prefix: str, made: Any) -> None:
            if isinstance(made, dict):
                masks.update({f"{prefix}/{key}": value for key, value in made.items()})
            else:
                masks[prefix] = made

        def add(prefix: str, model: PreTrainedModel, cache: Cache) -> None:
            if without_attention(cache):  # it takes the padding mask of the new tokens
                given = isinstance(attention_mask, Tensor) and attention_mask.ndim == 2
                masks[prefix] = attention_mask[:, -inputs_embeds.shape[1] :] if given else None
                return
            create = getattr(model, "create_masks_for_generate", create_masks_for_generate)
            before = self.model.opening(prefix.removeprefix("augmenting.")) if prefix != "anchor" else None
            if before:
                before.fill(cache, inputs_embeds.shape[0])
                given = before.attention(attention_mask, inputs_embeds.shape[1], static_length(cache))
                if given is not None and not (isinstance(given, Tensor) and given.ndim == 2):
                    take(prefix, given)
                    return
            made = create(
                config=model.config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask if before is None else before.mask(attention_mask),
                past_key_values=cache,
                position_ids=position_ids if before is None else before.positions(position_ids),
                **kwargs,
            )
            take(prefix, made)

        add("anchor", self.model.anchor, past_key_values.anchor)
        for name, own in past_key_values.augmenting.items():
            add(f"augmenting.{name}", self.model.augmenting[name], own)
            masks[f"cross.{name}"] = self.model.cross_mask(
                name, inputs_embeds, attention_mask, position_ids, past_key_values.cross[name]
            )
        return masks


def _keeps() -> ConfigError:
    return ConfigError(
        "Assisted generation must be able to take tokens back, but this composition's cache is static, quantised or "
        "recurrent: leave drafts and prompt lookup out."
    )


class _Unconditional:
    """The composition as classifier-free guidance calls it: on another text, in the same rows, beside the same inputs.

    Args:
        model: the composition.
        given: what ``generate`` was given of ``OWN_ARGUMENTS``.
    """

    def __init__(self, model: CalmGenerationMixin, given: dict[str, Any]) -> None:
        self.model, self.given = model, dict(given)
        self.prompt: Tensor | None = None
        # The prompt's columns say nothing of a text that begins elsewhere: its items stand at the beginning, and no
        # model reads another text in its place.
        items = (self.given.get("augmenting_inputs") or {}).items()
        encoders = [(name, own) for name, own in items if not model.model.reads_text(name)]
        inputs = {name: {k: v.clamp(max=0) if k == "at" else v for k, v in own.items()} for name, own in encoders}
        if items:
            self.given["augmenting_inputs"] = inputs

    def __call__(self, input_ids: Tensor, **kwargs: Any) -> Any:
        if self.prompt is None:
            self.prompt = torch.ones_like(input_ids, dtype=torch.bool)
        if "prompt_mask" in self.given:
            self.given["prompt_mask"] = self.prompt
        rows = self.given.get("composition_mask")
        if rows is not None and len(rows) < len(input_ids):
            self.given["composition_mask"] = rows.repeat_interleave(len(input_ids) // len(rows), 0)
        return self.model(input_ids, **kwargs, **self.given)


def _without_own(arguments: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in arguments.items() if key not in OWN_ARGUMENTS}
