"""The control in which m_A reads another item's prompt: how it trains, how it answers, and whom its answers fit."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteriaList

from calmlm.baselines.given import LOGITS, row_losses
from calmlm.comparison.contract import Answerer, Domain, TextDomain
from calmlm.controls import EndOfOther, beside, listening, partners
from calmlm.data.context import own_contexts
from calmlm.experiments.fitting import IGNORED, Row, fit
from calmlm.experiments.flops import Meter

__all__ = ["SWAPPED", "Swapped", "fit_swapped", "follows"]

SWAPPED = {"swapped": "composed", "swapped_trained": "composed", "graft_swapped": "graft"}
"""The methods in which m_A reads another item's prompt, each with the one in which it reads the right one."""
FITTING = ("exact_match", "pass@1")
"""Metrics by which an answer fits an item or does not."""


class Swapped:
    """Completes prompts, and scores rows, while m_A reads the prompt of another one of those that come together.

    Args:
        domain: the experiment.
        model: a composition.
    """

    def __init__(self, domain: TextDomain, model: Any) -> None:
        self.domain, self.model, self.names = domain, model, listening(model)
        self.read: list[tuple[dict[str, str], dict[str, str]]] = []
        """Of each call in turn, what was read in place of each prompt, and the answers by prompt."""

    def __call__(self, prompts: Sequence[str], tokens: int | None = None) -> list[str]:
        """The completions; the same for a prompt that comes several times."""
        ids = {prompt: self.domain.encode(prompt) for prompt in prompts}
        pairs = partners({prompt: len(found) for prompt, found in ids.items()}, self.domain.seed) if ids else {}
        order = sorted(pairs, key=lambda prompt: len(ids[prompt]))
        limits, size = own_contexts(self.model), self.domain.evaluation_batch_size
        size = 1 if any(each.learned for each in limits) else size
        answers: dict[str, str] = {}
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            rows, others = [ids[prompt] for prompt in chosen], [ids[pairs[prompt]] for prompt in chosen]
            batch = beside(self.names, rows, others, self._pad, self.model.device)
            width = batch["input_ids"].shape[1]
            ends = [EndOfOther(limits, others[0], width)] if size == 1 else []
            forced = {} if tokens is None else {"min_new_tokens": tokens}
            with torch.no_grad():
                written = self.model.generate(
                    **batch,
                    max_new_tokens=tokens or self.domain.max_new_tokens,
                    do_sample=False,
                    pad_token_id=self._pad,
                    stopping_criteria=StoppingCriteriaList(ends),
                    **self.domain.ends,
                    **forced,
                )
            texts = self.domain.tokenizer.batch_decode(written[:, width:], skip_special_tokens=True)
            texts = [text.strip() for text in texts] if self.domain.bare_answers else texts
            answers |= dict(zip(chosen, texts, strict=True))
        self.read.append((pairs, answers))
        return [answers[prompt] for prompt in prompts]

    @torch.no_grad()
    def losses(self, rows: Sequence[Row], batch_size: int) -> Tensor:
        """The mean cross-entropy of each row's labelled tokens, (rows,) float32, in nats."""
        paired, found = with_others(rows, self.domain.seed), torch.zeros(len(rows))
        vocabulary = self.model.config.get_text_config(decoder=True).vocab_size
        order = sorted(range(len(rows)), key=lambda index: len(paired[index]["input_ids"]), reverse=True)
        longest = max(max(len(row["input_ids"]), len(row["other"])) for row in paired)
        size = max(1, min(batch_size, LOGITS // (longest * vocabulary)))
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            batch = _collate(self.names, self._pad, [paired[index] for index in chosen])
            batch = {name: _to(part, self.model.device) for name, part in batch.items()}
            labels = batch.pop("labels")
            found[chosen] = row_losses(self.model(**batch, prompt_mask=labels == IGNORED).logits, labels).cpu()
        return found

    @property
    def _pad(self) -> int:
        return int(self.domain.tokenizer.pad_token_id)


def _to(part: Any, device: Any) -> Any:
    return part.to(device) if isinstance(part, Tensor) else {name: _to(each, device) for name, each in part.items()}


def with_others(rows: Sequence[Row], seed: int) -> list[Row]:
    """Rows with ``other``, what m_A reads: another row's prompt and the same completion. Rows without a prompt stay.

    A row that comes several times is one object as before.
    """
    starts = {id(row): _start(row) for row in rows}
    prompts = {id(row): tuple(row["input_ids"][: starts[id(row)]]) for row in rows}
    pairs = partners({prompt: len(prompt) for prompt in prompts.values() if prompt}, seed)
    made: dict[int, Row] = {}
    for row in rows:
        if id(row) not in made:
            prompt = prompts[id(row)]
            made[id(row)] = {**row, "other": [*pairs.get(prompt, ()), *row["input_ids"][len(prompt) :]]}
    return [made[id(row)] for row in rows]


def _start(row: Row) -> int:
    """Where the completion begins."""
    return next((place for place, label in enumerate(row["labels"]) if label != IGNORED), len(row["labels"]))


def _collate(names: Sequence[str], pad: int, rows: list[Row]) -> dict[str, Any]:
    batch = beside(names, [row["input_ids"] for row in rows], [row["other"] for row in rows], pad)
    width = batch["input_ids"].shape[1]
    labels = [[IGNORED] * (width - len(row["labels"])) + list(row["labels"]) for row in rows]
    return {**batch, "labels": torch.tensor(labels)}


def fit_swapped(domain: TextDomain, model: Any, meter: Meter) -> None:
    """Train a composition whose m_A reads another row's prompt from the first step."""
    rows, pad = with_others(domain.data.composition, domain.seed), int(domain.tokenizer.pad_token_id)
    collate = partial(_collate, listening(model), pad)
    fit(model, rows, pad, domain.stage, domain.seed, collate=collate, meter=meter)


def follows(domain: Domain, swapped: Swapped, scores: dict[str, list[float]]) -> dict[str, list[float]]:
    """Whether each item's answer fits the item whose prompt m_A read, and not its own; by task.

    Each answer is scored once more, in the place of the item that it may fit.

    Args:
        domain: the experiment.
        swapped: what answered.
        scores: of its answers.
    """
    asked: list[Sequence[str]] = []
    calls = iter(swapped.read)
    pairings: list[dict[str, str]] = []

    def moved(prompts: Sequence[str], tokens: int | None = None) -> list[str]:
        pairs, answers = next(calls)
        asked.append(prompts)
        pairings.append(pairs)
        readers = {other: prompt for prompt, other in pairs.items()}
        return [answers[readers[prompt]] for prompt in prompts]

    complete: Answerer = moved
    fitting = domain.score(complete, None)
    found = {}
    for (task, values), prompts, pairs in zip(fitting.items(), asked, pairings, strict=True):
        if domain.tasks_of(domain.preset)[task].metric not in FITTING:
            continue
        fits = dict(zip(prompts, values, strict=True))
        found[task] = [
            float(fits[pairs[prompt]] == 1 and own != 1) for prompt, own in zip(prompts, scores[task], strict=True)
        ]
    return found
