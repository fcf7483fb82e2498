"""``CalmModel``: frozen base models joined by connectors, giving the anchor's last hidden state.

A call runs the augmenting models first (no gradients, outputs of the connected layers kept), then the anchor, whose
hooks add the cross-attentions layer by layer. A position sees the augmenting model's states up to its own token and
none beyond, so that the cross-attention is causal attention over another stream's keys and values.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep

from calmlm.bases.families import text_config
from calmlm.errors import DataError, ModelError
from calmlm.modeling.assembly import Assembly
from calmlm.modeling.shortcut import run_anchor
from calmlm.readers import (
    EncoderReader,
    Inputs,
    SharedReader,
    base_arguments,
    check_inputs,
    check_text,
    in_place,
    length_of,
    mask_of,
    needs_tokens,
    no_cache,
    positions_for,
    texts_of,
    without_items,
)
from calmlm.state.cache import Bearer, CalmCache
from calmlm.state.call import Call, Pointed
from calmlm.state.longrope import check_turn
from calmlm.state.merged_weights import merged_in
from calmlm.state.past import Past
from calmlm.state.recurrent import check_continues


class CalmModel(Assembly):
    """A composition that gives the anchor's last hidden state; its arguments are ``Assembly``'s."""

    @property
    def can_cache(self) -> bool:
        """Whether the anchor and every augmenting model that is switched on can carry their past in a cache."""
        return all(self._cacheable[name] for name in ("", *self.active))

    def new_cache(self, anchor_cache: Cache | None = None, length: int | None = None) -> CalmCache:
        """An empty cache for this composition, around the anchor's own (a new dynamic one by default).

        ``length`` is the number of tokens for which a static ``anchor_cache`` was made.
        """
        if anchor_cache is None:
            anchor_cache = DynamicCache(config=text_config(self.anchor))
        entries = {name: entry for name, entry in self.config.augmenting.items() if name in self.active}
        reading = [name for name, entry in entries.items() if entry["reads"] in ("tokens", "text")]
        apart = [name for name, entry in entries.items() if entry["reads"] != "tokens"]
        cache = CalmCache.around(
            anchor_cache,
            {name: text_config(self.augmenting[name]) for name in reading},  # type: ignore[arg-type]
            {name: len(entry["connections"]) + bool(entry.get("words")) for name, entry in entries.items()},
            length,
            apart,
            {name: len(self._openings[name]) for name in reading},
        )
        cache.bearers = self.bearers()
        return cache

    def bearers(self) -> dict[str, Bearer]:
        """The augmenting models that are switched on, as a cache remembers them."""
        return {name: Bearer(self.joined[name], self._openings[name].ids) for name in self.active}

    def cache_for(self, past_key_values: Cache | None, use_cache: bool) -> CalmCache | None:
        """The cache that a call uses, given what its caller passed."""
        if past_key_values is None:
            return self.new_cache() if use_cache else None
        if not self.can_cache:
            raise no_cache("past_key_values")
        if isinstance(past_key_values, CalmCache):
            past_key_values.check(self.bearers())
            return past_key_values
        return self.new_cache(past_key_values)

    def begin(self, inputs: Inputs, pasts: dict[str, Past]) -> Call:
        """Let every augmenting model read; returns what the anchor's hooks need.

        Raises:
            DataError: for ids that an augmenting model does not have, or inputs that it lacks.
        """
        streams, rows = {}, self._speaking(inputs.composed)
        for name, past in pasts.items():
            given = in_place(inputs, past, name) if self.reads_text(name) else (inputs, past)
            if isinstance(self._readers[name], EncoderReader) and name in rows and not past.frontier.length:
                given = without_items(inputs, name, rows[name]), past
            streams[name] = self._readers[name].read(*given)
        whole = torch.compiler.is_compiling() and all(self._readers[name].in_graphs for name in pasts)
        merged = frozenset() if whole else merged_in(self.merges, streams, rows, self.scale)
        return Call(streams, rows, scale=self.scale, merged=merged)

    def _speaking(self, rows: Tensor | None) -> dict[str, Tensor]:
        """The rows in which each augmenting model speaks, (B, 1, 1) bool by name, from a ``composition_mask``."""
        if rows is None:
            return {}
        rows = rows.bool()
        of_each = rows.unbind(1) if rows.ndim == 2 else [rows] * len(self.config.augmenting)
        return {name: one[:, None, None] for name, one in zip(self.config.augmenting, of_each, strict=True)}

    def cross_mask(self, name: str, like: Tensor, attention_mask: Any, positions: Tensor | None, cross: Cache) -> Any:
        """The cross-attention mask of a model that shares the anchor's ids, for positions like ``like`` (B, T)."""
        reader = self._readers[name]
        return reader.mask(like, attention_mask, positions, cross) if isinstance(reader, SharedReader) else None

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        augmenting_inputs: dict[str, dict[str, Any]] | None = None,
        prompt_mask: Tensor | None = None,
        composition_mask: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """The anchor's last hidden state, (B, T, D_B), or (N, D_B) of N positions, with the composition in it.

        Without ``prompt_mask`` (B, T), an augmenting model with ``refresh=False`` takes all tokens for the prompt;
        ``composition_mask``, (B,) or (B, models) bool, tells the rows that the composition, or each augmenting model,
        speaks in. ``logits_to_keep``: of so many last columns, of those in (K,) int64, or of the positions in (B, T)
        bool, states come back; 0 for all. Loss heads ask for logits of these alone.

        Raises:
            DataError: in training, where such a model would read what is to be learned.
            ModelError: where an augmenting model speaks in probabilities, which stand in no state.
        """
        if self.points:
            raise ModelError(
                "words='pointer' needs the anchor's logits, but a call for its last state arrived, as loss heads that "
                "take states make it: compose with words='map', or use a loss that calls CalmForCausalLM for logits, "
                "as transformers' Trainer and calmlm train do."
            )
        kwargs.pop("return_dict", None)
        inputs = Inputs(input_ids, attention_mask, position_ids, prompt_mask, augmenting_inputs, composition_mask)
        decoder = self._backbones[""].decoder
        output, cache, _ = self.run(decoder, inputs, past_key_values, inputs_embeds, use_cache, kwargs)
        states = output.last_hidden_state
        if isinstance(logits_to_keep, Tensor):
            logits_to_keep = logits_to_keep.to(states.device)
        states = slice_logits_to_keep(states, logits_to_keep)
        found = {"last_hidden_state": states, "past_key_values": cache}
        found |= {name: getattr(output, name, None) for name in ("hidden_states", "attentions")}
        routed = getattr(output, "router_logits", None)
        return (
            BaseModelOutputWithPast(**found)
            if routed is None
            else MoeModelOutputWithPast(**found, router_logits=routed)
        )

    def run(
        self,
        target: nn.Module,
        inputs: Inputs,
        past_key_values: Cache | None,
        inputs_embeds: Tensor | None,
        use_cache: bool | None,
        kwargs: dict[str, Any],
    ) -> tuple[Any, Cache | None, Pointed | None]:
        """Run ``target`` (the anchor or its decoder) inside the composition.

        Returns:
            its output, the cache, and what pointers need to change the logits, if there are any.

        Raises:
            DataError: when there are no token ids, or an augmenting model cannot read what it is given, or would read
                in training what is to be learned.
        """
        if self.enabled and getattr(self, "_is_replica", False):
            raise ModelError(
                "A composition must run in one process for each device, but torch.nn.DataParallel runs copies of it in "
                "threads, whose layers use the original's connectors: start it with torchrun, or let it see one GPU."
            )
        if not self.enabled:
            return *self._run_alone(target, inputs, past_key_values, inputs_embeds, use_cache, kwargs), None
        if inputs.ids is None or inputs_embeds is not None:
            raise needs_tokens()
        if inputs.prompt is None and self.training and self.reads_prompts:
            raise DataError(
                "An augmenting model with refresh=False needs to know where each prompt ends in training, but neither "
                "labels nor a prompt_mask arrived: pass prompt_mask, or call CalmForCausalLM with labels."
            )
        check_inputs(inputs, {name: entry["reads"] for name, entry in self.config.augmenting.items()})
        for name, text in (inputs.augmenting or {}).items():
            if self.reads_text(name):
                check_text(text, name, inputs.ids.shape[0])
        if past_key_values is None and not use_cache and inputs.positions is not None:
            inputs, use_cache = self._told_apart(inputs, use_cache)
        if use_cache is None:
            use_cache = past_key_values is not None or (self.config.use_cache and not self.training)
        cache = self.cache_for(past_key_values, use_cache and self.can_cache)
        backbone = self._backbones[""]
        if cache is not None:
            cache.check_rows(inputs.composed)
        if cache is not None and inputs.ids.shape[1] > 1:
            check_continues(self._backbones, cache)
        if cache is not None:
            check_turn(self.abilities.turns_at, cache, inputs.ids.shape[1], inputs.positions)
        backbone.check_padding("anchor", inputs.mask)
        if cache is None:  # with one, transformers takes a row for one text
            backbone.check_packing("anchor", inputs.positions, inputs.mask)
        positions = positions_for(backbone, inputs.positions, inputs.ids, inputs.mask)
        backbone.check_length("anchor", length_of(inputs.ids, inputs.mask, cache), positions)
        pasts = {
            name: cache.part(name) if cache is not None else Past() for name in self._readers if name in self.active
        }
        call = self.begin(inputs, pasts)
        arguments = base_arguments(
            backbone,
            input_ids=inputs.ids,
            attention_mask=mask_of(inputs.mask, "anchor"),
            position_ids=positions,
            cache=cache.anchor if cache is not None else None,
        )
        self.slot.call = call
        try:
            call_anchor = partial(target, **arguments, **kwargs)
            if cache is None and self.slot.recorder is not None:
                lower = list(backbone.layers[: self.untouched()])
                output = run_anchor(call_anchor, lower, self.slot.recorder, inputs, kwargs, text_config(self.anchor))
            else:
                output = call_anchor()
        finally:
            self.slot.call = None
        for name, past in pasts.items():
            self._readers[name].finish(past)
        if cache is not None:
            cache.advance(inputs.ids.shape[1])
        return output, cache, call.pointed

    def _told_apart(self, inputs: Inputs, use_cache: bool | None) -> tuple[Inputs, bool | None]:
        """The inputs of a call without a cache with what its readers need of packed rows, which get no cache then.

        Looking for them waits for the device.
        """
        readers: list[Any] = [self._readers[name] for name in self.active]
        apart = self.slot.recorder is not None or not all(isinstance(r, SharedReader) and r.packs for r in readers)
        apart = apart or any(self.reads_text(name) for name in inputs.augmenting or {})
        cached = use_cache is None and self.config.use_cache and not self.training
        if not apart and (torch.compiler.is_compiling() or not (cached or inputs.mask is not None)):
            return inputs, use_cache
        texts = texts_of(inputs)
        for name in inputs.augmenting or {} if texts is not None else ():
            if self.reads_text(name):
                raise DataError(
                    f"Each row must hold one text where the augmenting model {name!r} reads another one, but got "
                    f"position_ids that begin anew within a row: give each text a row of its own."
                )
        return replace(inputs, texts=texts if apart else None), use_cache if texts is None else False

    def _run_alone(
        self,
        target: nn.Module,
        inputs: Inputs,
        past_key_values: Cache | None,
        inputs_embeds: Tensor | None,
        use_cache: bool | None,
        kwargs: dict[str, Any],
    ) -> tuple[Any, Cache | None]:
        """The anchor with what its caller gave and nothing more."""
        argument = self._backbones[""].cache_argument or "past_key_values"
        given = {
            "input_ids": inputs.ids,
            "attention_mask": inputs.mask,
            "position_ids": inputs.positions,
            "inputs_embeds": inputs_embeds,
            "use_cache": use_cache,
            argument: past_key_values.anchor if isinstance(past_key_values, CalmCache) else past_key_values,
            **kwargs,
        }
        output = target(**{key: value for key, value in given.items() if value is not None})
        return output, getattr(output, argument, None)
