"""Languages in the comparison: number words and terms that only m_A has seen."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from calmlm.baselines.confidence_cascade import Confidence
from calmlm.comparison.contract import Answerer, Task
from calmlm.comparison.drawn import DrawnDomain
from calmlm.data.extras import require
from calmlm.experiments.kv_arithmetic.words import PHRASE_WORDS
from calmlm.experiments.kv_arithmetic.world import Example, final_answer
from calmlm.experiments.languages.tokenizer import build_tokenizer
from calmlm.experiments.languages.world import World

__all__ = ["Languages"]

_PHRASE = "|".join(sorted(PHRASE_WORDS, key=len, reverse=True))
_RUN = re.compile(rf"\b(?!(?:{_PHRASE})\b)[^\W\d_]+(?: (?!(?:{_PHRASE})\b)[^\W\d_]+)*")
"""Words that stand together and belong to no phrasing."""
_SURE = 0.5  # how probable m_A's value of a word has to be for the cascade to paste it


class Languages(DrawnDomain):
    """Arithmetic and translation: m_A knows low-resource languages, m_B others and arithmetic."""

    name = "languages"
    folder = "languages"

    def __init__(self, preset: Any, seed: int, cache: Path, report: Callable[[str], None]) -> None:
        super().__init__(preset, seed, cache, report)
        self.world: World = World(preset, seed)

    @classmethod
    def tasks_of(cls, preset: Any) -> dict[str, Task]:
        return {
            **{f"arithmetic_{language}": Task("exact_match", "combined") for language in preset.low},
            **{f"arithmetic_{language}": Task("exact_match", "retained") for language in preset.high},
            "arithmetic_figures": Task("exact_match", "retained"),
            "translation_low": Task("chrf", "augmenting"),
            "translation_high": Task("chrf", "retained"),
        }

    @classmethod
    def groups_of(cls, preset: Any) -> dict[str, list[str]]:
        return {
            "arithmetic_low": [f"arithmetic_{language}" for language in preset.low],
            "arithmetic_high": [f"arithmetic_{language}" for language in preset.high],
        }

    @cached_property
    def items(self) -> dict[str, list[Example]]:
        """Items by task; of what m_B is to have kept, D_C shows none."""
        world, preset = self.world, self.preset
        items: dict[str, list[Example]] = {}
        for task, language in {
            **{f"arithmetic_{language}": language for language in world.languages},
            "arithmetic_figures": None,
        }.items():
            rng = world.rng(f"evaluation-{task}")
            # What is to be kept is measured to half a point.
            count = preset.items if language in preset.low else 2 * preset.items
            items[task] = [world.item(rng, language) for _ in range(count)]
        for task, languages, which in (
            ("translation_low", preset.low, world.unseen_terms),
            ("translation_high", preset.high[1:], world.kept_terms),
        ):
            rng = world.rng(f"evaluation-{task}")
            items[task] = [world.translation(rng, rng.choice(languages), which) for _ in range(2 * preset.items)]
        shown = {world.request(term) for term in world.shown_terms}
        items["translation_low"] = [item for item in items["translation_low"] if item.prompt not in shown]
        kept = [task for task, about in self.tasks_of(preset).items() if about.skill == "retained"]
        return items | {task: [item for item in items[task] if item.prompt not in self.shown] for task in kept}

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        world = self.world
        words = [word for known in (world.words, world.terms) for texts in known.values() for word in texts]
        return build_tokenizer([*words, *world.pieces, "translate"], 2 * self.preset.highest)

    def cascade(self) -> Answerer:
        """m_A gives the value of each run of words; where it is sure, the figure is pasted in place of them."""
        calculate, told = self.answerer(self.anchor), self.answerer(self.augmenting)

        def run(prompts: Sequence[str], tokens: int | None = None) -> list[str]:
            values = self.values(sorted({words for prompt in prompts for words in _RUN.findall(prompt)}))
            pasted = [_RUN.sub(lambda match: values.get(match[0], match[0]), prompt) for prompt in prompts]
            answers = calculate(pasted, tokens)
            asked = [i for i, prompt in enumerate(prompts) if prompt.startswith("translate")]
            for i, text in zip(asked, told([prompts[i] for i in asked]) if asked else [], strict=True):
                answers[i] = text
            return answers

        return run

    def values(self, words: list[str]) -> dict[str, str]:
        """What m_A writes behind words, where it is sure and it is a figure."""
        if not words:
            return {}
        batch = self.tokenizer(words, padding=True, return_tensors="pt").to(self.augmenting.device)
        sure = Confidence(self.augmenting, _SURE)(batch["input_ids"], batch["attention_mask"])
        with torch.no_grad():
            logits = self.augmenting(**{k: batch[k] for k in ("input_ids", "attention_mask")}).logits[:, -1]
        texts = [text.strip() for text in self.tokenizer.batch_decode(logits.argmax(-1)[:, None])]
        return {w: text for w, text, s in zip(words, texts, sure.tolist(), strict=True) if s and text.isdigit()}

    def score(self, complete: Answerer, model: Any | None) -> dict[str, list[float]]:
        require("sacrebleu", "compare", "The experiment with languages")
        from sacrebleu.metrics import CHRF

        chrf, scores = CHRF(), {}
        for task, examples in self.items.items():
            texts = complete([example.prompt for example in examples])
            pairs = list(zip(texts, (example.completion for example in examples), strict=True))
            if self.tasks_of(self.preset)[task].metric == "chrf":
                scores[task] = [chrf.sentence_score(text, [right]).score / 100 for text, right in pairs]
            else:
                scores[task] = [float(final_answer(text) == final_answer(right)) for text, right in pairs]
        return scores

    @property
    def max_new_tokens(self) -> int:
        return 14

    @property
    def prompts(self) -> list[str]:
        return [example.prompt for example in self.items[f"arithmetic_{self.preset.low[0]}"][:8]]
