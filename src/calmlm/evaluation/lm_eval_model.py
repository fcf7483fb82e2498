"""A composition as lm-evaluation-harness sees it. All that is overridden of the harness's own class stands here."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteriaList

from calmlm.data.context import EndOfContext, OwnContext, context_length, own_contexts, prompt_length
from calmlm.errors import ConfigError
from calmlm.evaluation.truncation import kept, windows
from calmlm.tokens.text_ends import around, end_of

__all__ = ["ComposedLM", "Ending"]


class ComposedLM(HFLM):  # type: ignore[misc]
    """The harness's model of transformers, with what a composition needs.

    Args:
        model: a composition.
        tokenizer: its own.
        batch_size: prompts at a time.
    """

    def __init__(self, model: Any, tokenizer: Any, batch_size: int) -> None:
        # A benchmark's settings for generation are its own; whatever the model was saved with would come on top.
        given = model.generation_config
        model.generation_config = GenerationConfig(
            bos_token_id=given.bos_token_id, eos_token_id=given.eos_token_id, pad_token_id=given.pad_token_id
        )
        before, self._behind = around(tokenizer)
        known = tokenizer.bos_token_id is not None or tokenizer.eos_token_id is not None
        if not known and not before:
            raise ConfigError(
                "Evaluation needs a tokenizer with a beginning or an end of text, but this one has neither: give it "
                "one and save it."
            )
        with _unwarned():
            super().__init__(
                prefix_token_id=None if known else before[0],
                pretrained=model,
                tokenizer=tokenizer,
                batch_size=batch_size,
                device=str(model.device),
                backend="causal",
                max_length=context_length(model),
            )
        self._given: dict[tuple[int, ...], int] = {}  # how many tokens of what is scored were given
        self._coming: Counter[tuple[int, ...]] = Counter()  # how many rows of it the harness has not asked for yet
        # A token that stands before what is decoded: some decoders take a space from the beginning of a text.
        self._before = tokenizer.encode("a", add_special_tokens=False)[-1:]

    def tok_decode(self, tokens: Any, skip_special_tokens: bool = True) -> str:
        """Text of tokens that go on from others, with the space that they may begin with."""
        if isinstance(tokens, int):
            tokens = [tokens]
        head = self.tokenizer.decode(self._before, skip_special_tokens=skip_special_tokens)
        whole = self.tokenizer.decode([*self._before, *tokens], skip_special_tokens=skip_special_tokens)
        if head and whole.startswith(head):
            return whole[len(head) :]
        return self.tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """A context of white space may have no tokens of its own; it is the beginning of a text then, as none is."""
        before, scored = super()._encode_pair(context, continuation)
        return before or self._beginning, scored

    @property
    def eot_token_id(self) -> int | None:
        """What training ends texts with."""
        return end_of(self.tokenizer)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, left_truncate_len: int | None = None, **options: Any
    ) -> list[int]:
        """As in the harness, without what the tokenizer puts behind any text: something is to follow."""
        ids = list(super().tok_encode(string, add_special_tokens=add_special_tokens, **options))
        if self._has_end(ids, string):
            ids = ids[: -len(self._behind)]
        return ids[-left_truncate_len:] if left_truncate_len else ids

    def _has_end(self, ids: list[int], string: str) -> bool:
        """Whether tokens of a text end with what the tokenizer puts behind any, which the text itself does not."""
        count = len(self._behind)
        if not count or ids[-count:] != self._behind:
            return False
        plain = self.tokenizer.encode(string, add_special_tokens=False)
        return not plain or plain[-len(ids) :] != ids[-len(plain) :]

    def tok_batch_encode(
        self, strings: list[str], padding_side: str = "left", left_truncate_len: int | None = None, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """As in the harness, but nothing stands behind a prompt; one without tokens is the beginning of a text."""
        room = None if left_truncate_len is None else left_truncate_len + len(self._behind)
        ids, masks = super().tok_batch_encode(strings, padding_side, room, **options)
        if padding_side == "left" and self._has_end(ids[0][masks[0].bool()].tolist(), strings[0]):
            ids, masks = (part[:, : -len(self._behind)] for part in (ids, masks))
        if left_truncate_len:
            ids, masks = (part[:, -left_truncate_len:] for part in (ids, masks))
        empty = ~masks.bool().any(1)
        if not self._beginning or not empty.any():
            return ids, masks
        if not ids.shape[1]:
            ids, masks = (torch.zeros((len(part), 1), dtype=torch.long) for part in (ids, masks))
        ids[empty, -1], masks[empty, -1] = self._beginning[0], 1
        return ids, masks

    @property
    def _beginning(self) -> list[int]:
        """What the harness takes an empty context for, where the tokenizer has such a token."""
        return [] if self.prefix_token_id is None else [self.prefix_token_id]

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """The harness puts a beginning of text before what it scores; the tokenizer's own would be a second one."""
        given = vars(self)["add_bos_token"]
        self.add_bos_token = False
        try:
            return super().loglikelihood_rolling(requests, disable_tqdm)
        finally:
            self.add_bos_token = given

    def _loglikelihood_tokens(self, requests: Any, *arguments: Any, **options: Any) -> Any:
        """The harness truncates in the anchor's tokens; what does not fit in other models' is cut before."""
        composed = self.model.model
        if composed.enabled and composed.reads_prompts:
            raise ConfigError(
                "Tasks that ask for probabilities need augmenting models that read generated tokens as well, but this "
                "composition was made with refresh=False: choose tasks that generate."
            )
        contexts = own_contexts(self.model)
        if not contexts:
            self._note(requests)
            return super()._loglikelihood_tokens(requests, *arguments, **options)
        parts = [windows(contexts, self.max_length, before, scored) for _, before, scored in requests]
        # What is scored in parts has no key, under which the harness would keep a part for the whole.
        keyed = [
            (request[0] if len(part) == 1 else None, *window)
            for request, part in zip(requests, parts, strict=True)
            for window in part
        ]
        with self._row_by_row(contexts, split=len(keyed) > len(parts)):
            self._note(keyed)
            scores = iter(super()._loglikelihood_tokens(keyed, *arguments, **options))
        found = [[next(scores) for _ in part] for part in parts]
        return [(sum(score for score, _ in each), all(greedy for _, greedy in each)) for each in found]

    def _note(self, requests: Any) -> None:
        """Keep how much of each text is given, for ``_model_call``, which the harness does not tell."""
        self._given.clear()
        self._expect(requests)
        if self.model.model.enabled and self.model.model.wants_prompts:
            for _, before, scored in requests:
                whole = self._whole(before, scored)
                count = max(0, len(whole) - len(scored) + 1)
                self._given[whole] = min(count, self._given.get(whole, count))

    def _whole(self, before: Sequence[int], scored: Sequence[int]) -> tuple[int, ...]:
        """What the harness has a model read of a request."""
        return tuple([*before, *scored][-(self.max_length + 1) : -1])

    def _expect(self, requests: Any) -> None:
        """Count the rows that will come; requests that differ in their last token alone come as one, as a rule."""
        texts = [(tuple([*before, *scored][:-1]), self._whole(before, scored)) for _, before, scored in requests]
        self._coming = Counter(dict(texts).values() if self.logits_cache else [whole for _, whole in texts])

    def _text_of(self, row: Sequence[int], known: Mapping[tuple[int, ...], Any]) -> tuple[int, ...] | None:
        """The text of a row among those that are known; None where it is none of them.

        The harness fills rows up with zeros, and does not say from where on. Longer texts come first.
        """
        lengths = sorted({len(ids) for ids in known}, reverse=True)
        texts = (tuple(row[:length]) for length in lengths if not any(row[length:]))
        found = [text for text in texts if text in known]
        whole = next((text for text in found if self._coming[text] > 0), found[0] if found else None)
        if whole is not None:
            self._coming[whole] -= 1
        return whole

    def _model_call(self, inps: Tensor, *arguments: Any, **options: Any) -> Tensor:
        """What stands before the scored tokens was given as a whole: a model with tokens of its own reads it so."""
        if not self._given:
            return super()._model_call(inps, *arguments, **options)
        told = torch.zeros_like(inps, dtype=torch.bool)
        for row, ids in enumerate(inps.tolist()):
            whole = self._text_of(ids, self._given)
            told[row, : 0 if whole is None else self._given[whole]] = True
        with torch.no_grad():
            return self.model(inps, prompt_mask=told).logits

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
        """The harness truncates in the anchor's tokens; a text ends besides where another model's positions end."""
        contexts, prompt = own_contexts(self.model), prompt_length(self.model)
        if not contexts and (prompt is None or context.shape[1] <= prompt):
            return super()._model_generate(context, max_length, stop, **options)
        new = max_length - context.shape[1]
        masks = options.pop("attention_mask", torch.ones_like(context)).bool()
        known = [row[real].tolist() for row, real in zip(context, masks, strict=True)]
        rows = [kept(contexts, ids if prompt is None else ids[-prompt:], new) for ids in known]
        if not any(each.learned for each in contexts):
            return self._generated(context, rows, new, stop, options)
        # What an ended row is filled up with would be read on with, and take positions.
        written = [
            self._generated(row[None], [ids], new, stop, options, EndOfContext(contexts, len(ids)))
            for row, ids in zip(context, rows, strict=True)
        ]
        pad, width = self.tokenizer.pad_token_id, max(row.shape[1] for row in written)
        return torch.cat([torch.nn.functional.pad(row, (0, width - row.shape[1]), value=pad) for row in written])

    def _generated(
        self,
        context: Tensor,
        rows: list[list[int]],
        new: int,
        stop: list[str],
        options: dict[str, Any],
        end: EndOfContext | None = None,
    ) -> Tensor:
        """What the harness generates behind rows of ids, put behind ``context``, which it takes them for."""
        width = max(len(row) for row in rows)
        pad = self.tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=context.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=context.device)
        model: Any = self._model  # type: ignore[has-type]
        self._model = model if end is None else Ending(model, end)
        try:
            written = super()._model_generate(ids, width + new, stop, attention_mask=mask, **options)
        finally:
            self._model = model
        return torch.cat((context, written[:, width:]), dim=1)

    @contextmanager
    def _row_by_row(self, contexts: Sequence[OwnContext], split: bool) -> Iterator[None]:
        """One row at a time where positions end: the harness fills rows up with tokens, which would take some.

        Of texts that are split, it would take parts for one another that have the same tokens and are scored from
        different ones on.
        """
        settings: dict[str, Any] = self.__dict__
        given = {name: settings[name] for name in ("batch_size_per_gpu", "logits_cache")}
        if any(each.learned for each in contexts):
            settings["batch_size_per_gpu"] = 1
        if split:
            settings["logits_cache"] = False
        try:
            yield
        finally:
            settings.update(given)


@contextmanager
def _unwarned() -> Iterator[None]:
    """Within this context the harness does not warn of a model that was loaded before, as all of ours are."""
    logger = logging.getLogger(HFLM.__module__)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


class Ending:
    """A model whose texts end earlier.

    Args:
        model: what generates.
        end: ends its texts, besides what else does.
    """

    def __init__(self, model: Any, end: EndOfContext) -> None:
        self.model, self.end = model, end

    def generate(self, stopping_criteria: Any = (), **options: Any) -> Any:
        """As the model does."""
        return self.model.generate(stopping_criteria=StoppingCriteriaList([*stopping_criteria, self.end]), **options)
