"""What writes English, behind one interface: a model alone, one after the other, a composition."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from calmlm.bases.structure import accepts
from calmlm.causal_lm import CalmForCausalLM
from calmlm.communication.tokenwise import token_nats
from calmlm.data.labels import IGNORE, encode_prompt
from calmlm.data.padding import pad_id, padded_left
from calmlm.experiments.fitting import prompt_argument
from calmlm.experiments.real.layout import AUGMENTING, batches, laid_out
from calmlm.experiments.real.measures import by_row, text_of
from calmlm.experiments.real.world import Item

__all__ = ["Alone", "Cascade", "Composed", "FirstLine", "Shown", "on_device", "told"]

T = TypeVar("T")
WRITTEN_AT_ONCE = 24


class Alone:
    """A language model.

    Args:
        model: m_A, m_B, or m_B after a training.
        tokenizer: its own.
        before: examples that it reads before each prompt, by variety; plain text has none.
        hears: whether it is also measured with another prompt: what it gets out of a text.

    Attributes:
        guidance: scale of classifier-free guidance with which it writes; None writes greedily.
    """

    guidance: float | None = None

    def __init__(
        self, model: Any, tokenizer: Any, before: Mapping[str, str] | None = None, hears: bool = False
    ) -> None:
        self.model, self.tokenizer, self.before, self.hears = model, tokenizer, before or {}, hears

    def nats(self, items: Sequence[Item], swapped: bool = False) -> list[float]:
        """Each target's negative log-probability."""
        if swapped:
            items = [replace(item, prompt=item.other) for item in items]
        return self.predicted(items)

    @torch.no_grad()
    def predicted(self, items: Sequence[Item], swapped: bool = False) -> list[float]:
        """The same, where ``swapped`` concerns what m_A reads alone."""
        texts = [text_of(i, self.tokenizer, self.before.get(i.variety, ""), swapped) for i in items]
        found = [0.0] * len(texts)
        for chosen in batches(texts):
            batch, width = laid_out([texts[index] for index in chosen], self.pad)
            labels = batch["labels"]
            nats = self.column_nats(on_device(batch, self.model.device), width)
            for index, value in zip(chosen, by_row(nats.cpu(), labels), strict=True):
                found[index] = value
        return found

    @property
    def pad(self) -> int:
        """What fills rows; no model attends to it."""
        return pad_id(self.tokenizer)

    def column_nats(self, batch: dict[str, Any], width: int) -> Tensor:
        """Negative log-probabilities (n,) of a batch's labels, which begin in the column ``width``."""
        given = {name: value for name, value in batch.items() if name != "labels"}
        labels = batch["labels"][:, width:]
        logits = self.logits(given, batch["labels"], width)
        counted = labels != IGNORE
        return token_nats(logits[:, :-1][counted], labels[counted])

    def logits(self, given: dict[str, Any], labels: Tensor, width: int) -> Tensor:
        """Logits of the columns from the one before ``width`` on."""
        ids, mask = given["input_ids"], given["attention_mask"]
        if isinstance(self.model, CalmForCausalLM):
            given = given | prompt_argument(self.model, labels, mask)
        elif accepts(self.model, "position_ids"):
            given = given | {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
        # A slice, which a number would give, is multiplied several times as slowly as a copy in bfloat16 on CPUs.
        columns = torch.arange(width - 1, ids.shape[1], device=ids.device)
        if accepts(self.model, "logits_to_keep"):
            return self.model(**given, use_cache=False, logits_to_keep=columns).logits
        return self.model(**given, use_cache=False).logits[:, columns]

    def write(self, items: Sequence[Item], new_tokens: int) -> list[str]:
        """Continuations: greedy ones, or with guidance."""
        prompts = [encode_prompt(self.before.get(item.variety, "") + item.prompt, self.tokenizer) for item in items]
        order = sorted(range(len(items)), key=lambda index: len(prompts[index]))
        found = [""] * len(items)
        for start in range(0, len(order), WRITTEN_AT_ONCE):
            chosen = order[start : start + WRITTEN_AT_ONCE]
            for index, text in zip(chosen, self._continued([prompts[i] for i in chosen], new_tokens), strict=True):
                found[index] = text
        return found

    @torch.no_grad()
    def _continued(self, prompts: Sequence[list[int]], new_tokens: int) -> list[str]:
        width = max(map(len, prompts))
        written = self.model.generate(
            **padded_left(prompts, width, self.pad, self.model.device),
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=self.pad,
            eos_token_id=self.tokenizer.eos_token_id,
            stopping_criteria=StoppingCriteriaList([FirstLine(self.tokenizer, width)]),
            **self.writing(),
        )
        return self.tokenizer.batch_decode(written[:, width:], skip_special_tokens=True)

    def writing(self) -> dict[str, Any]:
        """Further arguments of ``generate``."""
        return {} if self.guidance is None else {"guidance_scale": self.guidance}


class FirstLine(StoppingCriteria):
    """Ends a row where its first line ends, since no more of it is read.

    Args:
        tokenizer: of what is written.
        width: of the prompts.
    """

    def __init__(self, tokenizer: Any, width: int) -> None:
        self.tokenizer, self.width = tokenizer, width

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:  # type: ignore[override]
        texts = self.tokenizer.batch_decode(input_ids[:, self.width :], skip_special_tokens=True)
        return torch.tensor(["\n" in text.lstrip() for text in texts], device=input_ids.device)


class Composed(Alone):
    """A composition, whose augmenting model may read other rows' prompts.

    Args:
        model: the composition.
        tokenizer: the anchor's.
    """

    def __init__(self, model: CalmForCausalLM, tokenizer: Any) -> None:
        super().__init__(model, tokenizer, hears=True)

    def nats(self, items: Sequence[Item], swapped: bool = False) -> list[float]:
        """Each target's negative log-probability; with ``swapped``, m_A alone reads the other prompt."""
        return self.predicted(items, swapped)


class Shown(Composed):
    """A composition whose augmenting model reads examples of the variety that is asked in the place of its prefix.

    Args:
        model: the composition.
        tokenizer, augmenting_tokenizer: the models'.
        examples: by variety; plain text is read behind the model's own prefix.
    """

    def __init__(
        self, model: CalmForCausalLM, tokenizer: Any, augmenting_tokenizer: Any, examples: Mapping[str, str]
    ) -> None:
        super().__init__(model, tokenizer)
        self.augmenting_tokenizer, self.examples = augmenting_tokenizer, examples

    def predicted(self, items: Sequence[Item], swapped: bool = False) -> list[float]:
        """Each target's negative log-probability."""
        return self._by_variety(items, lambda chosen: super(Shown, self).predicted(chosen, swapped))

    def write(self, items: Sequence[Item], new_tokens: int) -> list[str]:
        """Greedy continuations."""
        return self._by_variety(items, lambda chosen: super(Shown, self).write(chosen, new_tokens))

    def _by_variety(self, items: Sequence[Item], work: Callable[[list[Item]], list[T]]) -> list[T]:
        found: dict[int, T] = {}
        for variety in dict.fromkeys(item.variety for item in items):
            chosen = [index for index, item in enumerate(items) if item.variety == variety]
            with self._shown(variety):
                found |= dict(zip(chosen, work([items[index] for index in chosen]), strict=True))
        return [found[index] for index in range(len(items))]

    @contextmanager
    def _shown(self, variety: str) -> Iterator[None]:
        if variety not in self.examples:
            yield
            return
        own = self.model.config.augmenting[AUGMENTING].get("prefix", [])
        self.model.set_augmenting_prefix(self.examples[variety], self.augmenting_tokenizer)
        try:
            yield
        finally:
            self.model.model.change_prefix(AUGMENTING, own)


class Cascade:
    """m_A translates, and m_B writes the answer behind the prompt and that translation.

    Args:
        translator: m_A.
        writer: m_B.
        new_tokens: of a translation, at most.
        tidy: what is made of m_A's text.

    Attributes:
        drafts: m_A's translations so far, by prompt.
    """

    hears = False

    def __init__(self, translator: Alone, writer: Alone, new_tokens: int, tidy: Callable[[str], str]) -> None:
        self.translator, self.writer, self.new_tokens, self.tidy = translator, writer, new_tokens, tidy
        self.drafts: dict[str, str] = {}

    def nats(self, items: Sequence[Item], swapped: bool = False) -> list[float]:
        """Each target's negative log-probability by m_B."""
        return self.writer.nats(self.with_drafts(items))

    def write(self, items: Sequence[Item], new_tokens: int) -> list[str]:
        """m_B's answers."""
        return self.writer.write(self.with_drafts(items), new_tokens)

    def with_drafts(self, items: Sequence[Item]) -> list[Item]:
        """The items with m_A's translation in their prompts; plain text stays as it is."""
        new = [item for item in items if item.prompt and item.prompt not in self.drafts]
        for item, text in zip(new, self.translator.write(new, self.new_tokens), strict=True):
            self.drafts[item.prompt] = self.tidy(text)
        return [
            replace(item, prompt=told(item.prompt, self.drafts[item.prompt])) if item.prompt else item for item in items
        ]


def told(prompt: str, draft: str) -> str:
    """A prompt and a translation of it, after which a better one is asked for."""
    return f"{prompt} {draft}\nEnglish:"


def on_device(batch: dict[str, Any], device: Any) -> dict[str, Any]:
    """A batch with all its tensors there."""
    return {
        name: value.to(device) if isinstance(value, Tensor) else on_device(value, device)
        for name, value in batch.items()
    }
