"""The next token of a text, from the logits behind it: as ``generate`` takes it, or drawn with a seed of its own."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import LogitsProcessorList

LEAST = -9999.0  # stands for the logarithm of no probability, as in OpenAI's API; JSON has no infinity
COLDEST = 1e-4  # below such a temperature the likeliest token is the only one, and scores divided by it overflow


@dataclass(frozen=True)
class Sampling:
    """How a request wants tokens to be taken.

    Attributes:
        temperature: 0 takes the likeliest; None is the model's own setting, or 1.
        top_p: the smallest set of tokens with this probability; None is the model's own setting, or 1.
        seed: makes the text repeatable, whatever else is written at the same time.
        presence: taken from the logit of a token that has been written.
        frequency: the same, for each time.
        bias: added to logits, by token.
        logprobs: how many of the likeliest tokens to tell beside the one that was taken; None tells nothing.
    """

    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    presence: float = 0.0
    frequency: float = 0.0
    bias: dict[int, float] = field(default_factory=dict)
    logprobs: int | None = None


@dataclass(frozen=True)
class Drawn:
    """A token that was taken.

    Attributes:
        token: its id.
        logprob: natural logarithm of the model's own probability; None where nobody asked.
        top: the likeliest tokens and theirs.
    """

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Grammar(Protocol):
    """What a text may go on with."""

    def allowed(self, vocabulary: int) -> Tensor:
        """Which tokens may follow, (vocabulary,) bool."""
        ...

    def take(self, token: int) -> None:
        """Go on behind a token."""
        ...


class Chooser:
    """Takes the tokens of one text.

    Args:
        model: the composition or base model, whose generation settings hold where the request says nothing.
        prompt: the tokens that were given.
        sampling: what the request says.
        grammar: what the text has to follow, or None.
        device: where the logits are.
    """

    def __init__(
        self, model: Any, prompt: Sequence[int], sampling: Sampling, grammar: Grammar | None, device: torch.device
    ) -> None:
        own = model.generation_config
        temperature = _first(sampling.temperature, own.temperature, 1.0)
        draws = temperature > COLDEST
        self.sampling, self.grammar, self.given = sampling, grammar, len(prompt)
        self.processors = _processors(model, prompt, draws, temperature, _first(sampling.top_p, own.top_p, 1.0), device)
        self.generator: torch.Generator | None = None
        if draws:
            seed = int.from_bytes(os.urandom(7)) if sampling.seed is None else sampling.seed % 2**63
            self.generator = torch.Generator(device=device).manual_seed(seed)

    @property
    def plain(self) -> bool:
        """Whether it takes the likeliest token, and nothing changes the logits before."""
        changed = self.sampling.presence or self.sampling.frequency or self.sampling.bias or self.grammar is not None
        return self.generator is None and not self.processors and not changed

    def choose(self, ids: Sequence[int], logits: Tensor) -> int:
        """One token behind ``ids``, from logits (vocabulary,)."""
        scores = logits.to(torch.float32, copy=True)
        self._bias(ids, scores)
        if self.grammar is not None:
            scores.masked_fill_(~self.grammar.allowed(len(scores)).to(scores.device), float("-inf"))
        if self.processors:
            text = torch.tensor([ids], device=scores.device)
            scores = self.processors(text, scores[None])[0]
        if self.generator is None:
            token = int(scores.argmax())
        else:
            token = int(torch.multinomial(scores.softmax(-1), 1, generator=self.generator))
        if self.grammar is not None:
            self.grammar.take(token)
        return token

    def _bias(self, ids: Sequence[int], scores: Tensor) -> None:
        changes = Counter(self.sampling.bias)
        if self.sampling.presence or self.sampling.frequency:
            for token, times in Counter(ids[self.given :]).items():
                changes[token] -= self.sampling.presence + self.sampling.frequency * times  # type: ignore[assignment]
        if changes:
            tokens = torch.tensor(list(changes), device=scores.device)
            scores[tokens] += torch.tensor(list(changes.values()), dtype=torch.float32, device=scores.device)


def choose(choosers: Sequence[Chooser], texts: Sequence[Sequence[int]], logits: Tensor) -> list[Drawn | Exception]:
    """The next token of each text, from logits (texts, vocabulary); an error where one text has none."""
    likeliest = logits.argmax(-1).tolist() if any(chooser.plain for chooser in choosers) else []
    found: list[Drawn | Exception] = []
    for row, (chooser, ids) in enumerate(zip(choosers, texts, strict=True)):
        try:
            token = likeliest[row] if chooser.plain else chooser.choose(ids, logits[row])
            found.append(_told(token, logits[row], chooser.sampling.logprobs))
        except Exception as error:  # logits that are no numbers, or a grammar that nothing follows
            found.append(error)
    return found


def _told(token: int, logits: Tensor, count: int | None) -> Drawn:
    if count is None:
        return Drawn(token)
    own = logits.float().log_softmax(-1).clamp(min=LEAST)
    values, tokens = own.topk(min(count, len(own)))
    return Drawn(token, float(own[token]), tuple(zip(tokens.tolist(), values.tolist(), strict=True)))


def _first(*values: float | None) -> float:
    return next(value for value in values if value is not None)


def _processors(
    model: Any, prompt: Sequence[int], draws: bool, temperature: float, top_p: float, device: torch.device
) -> LogitsProcessorList:
    """What ``generate`` of transformers makes of logits before it takes a token; its own loop keeps it private."""
    settings: dict[str, Any] = {"do_sample": draws, "num_beams": 1, "num_return_sequences": 1}
    if model.generation_config.pad_token_id is None:
        settings["pad_token_id"] = 0  # nothing is padded here, and transformers would say each time what it takes
    if draws:
        settings |= {"temperature": temperature, "top_p": top_p, "top_k": model.generation_config.top_k or 0}
    config, _ = model._prepare_generation_config(None, **settings)
    model._prepare_special_tokens(config, kwargs_has_attention_mask=True, device=device)
    ids = torch.tensor([list(prompt)], device=device)
    return model._get_logits_processor(
        config, input_ids_seq_length=len(prompt), encoder_input_ids=ids, device=device, model_kwargs={}
    )
