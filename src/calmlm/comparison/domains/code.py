"""Code in the comparison: m_A has read code alone, m_B English and its arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from calmlm.baselines.given import losses_of
from calmlm.comparison.contract import Answerer, Task
from calmlm.comparison.drawn import DrawnDomain
from calmlm.data.extras import require
from calmlm.experiments.code.judging import is_right
from calmlm.experiments.code.operations import Function
from calmlm.experiments.code.world import World, passages
from calmlm.experiments.fitting import IGNORED
from calmlm.experiments.kv_arithmetic.rows import encode
from calmlm.experiments.kv_arithmetic.world import Example

__all__ = ["Code"]


class Code(DrawnDomain):
    """Functions of one line: completing them, writing them from English, saying what they do."""

    name = "code"
    folder = "code"

    def __init__(self, preset: Any, seed: int, cache: Path, report: Callable[[str], None]) -> None:
        super().__init__(preset, seed, cache, report)
        self.world: World = World(preset, seed)

    @classmethod
    def tasks_of(cls, preset: Any) -> dict[str, Task]:
        return {
            "completion": Task("pass@1", "augmenting"),
            "text_to_code": Task("pass@1", "combined"),
            "code_to_text": Task("chrf", "combined"),
            "naming": Task("exact_match", "retained"),
            "arithmetic": Task("exact_match", "retained"),
            "library": Task("bits_per_byte", "augmenting"),
        }

    @cached_property
    def items(self) -> dict[str, list[tuple[Example, Function | None]]]:
        """Items: D_C shows none of these functions, nor their expressions under another name, and none comes twice; of
        what m_B is to have kept, it shows none either.
        """
        return {task: [items[index] for index in self.kept(items)] for task, items in self.drawn_items().items()}

    def kept(self, items: list[tuple[Example, Function | None]]) -> list[int]:
        """Which of the items that were drawn are asked."""
        prompts = [example.prompt for example, _ in items]

        def unseen(example: Example, function: Function | None) -> bool:
            return example.prompt not in self.shown if function is None else self.world.unseen(function)

        return [
            index
            for index, (example, function) in enumerate(items)
            if prompts.index(example.prompt) == index and unseen(example, function)
        ]

    def drawn_items(self) -> dict[str, list[tuple[Example, Function | None]]]:
        """Functions that D_C does not show by their names, and what m_B could do before."""
        world, count = self.world, self.preset.items
        items: dict[str, list[tuple[Example, Function | None]]] = {}
        for task in ("completion", "text_to_code", "code_to_text"):
            rng = world.rng(f"evaluation-{task}")
            items[task] = []
            for _ in range(count):
                function = world.function(rng, shown=False)
                example = world.completion(function) if task == "completion" else getattr(world, task)(function, rng)
                items[task].append((example, function))
        for task in ("naming", "arithmetic"):
            rng = world.rng(f"evaluation-{task}")
            items[task] = [(getattr(world, task)(rng), None) for _ in range(count)]
        return items

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.world.tokenizer()

    def cascade(self) -> Answerer:
        """m_B names what is asked for, and m_A completes the function of that name, or one that was begun; other
        prompts go to m_B."""
        name, complete = self.answerer(self.anchor), self.answerer(self.augmenting)
        asked, begun = "Write this in Python: ", "(x): return"

        def run(prompts: Sequence[str], tokens: int | None = None) -> list[str]:
            answers: dict[int, str] = {}
            where = [i for i, prompt in enumerate(prompts) if prompt.startswith(asked)]
            named = name([prompts[i].replace(asked, "Name this: ") for i in where]) if where else []
            heads = {i: f"def {(text.split() or ['f'])[0]}{begun}" for i, text in zip(where, named, strict=True)}
            tasks = heads | {i: prompt for i, prompt in enumerate(prompts) if prompt.endswith(begun)}
            bodies = complete(list(tasks.values()), tokens) if tasks else []
            for i, body in zip(tasks, bodies, strict=True):
                answers[i] = f"{heads[i]} {body}" if i in heads else body
            rest = [i for i in range(len(prompts)) if i not in tasks]
            texts = name([prompts[i] for i in rest], tokens) if rest else []
            answers |= dict(zip(rest, texts, strict=True))
            return [answers[i] for i in range(len(prompts))]

        return run

    def score(self, complete: Answerer, model: Any | None) -> dict[str, list[float]]:
        require("sacrebleu", "compare", "The experiment with code")
        from sacrebleu.metrics import CHRF

        chrf = CHRF()
        scores: dict[str, list[float]] = {}
        for task, items in self.items.items():
            texts = complete([example.prompt for example, _ in items])
            scores[task] = []
            for text, (example, function) in zip(texts, items, strict=True):
                right = example.completion.strip()
                if task == "code_to_text":
                    value = chrf.sentence_score(text, [right]).score / 100
                elif function is not None:
                    head = f"{example.prompt} " if task == "completion" else ""
                    value = float(is_right(head + text, function))
                else:
                    value = float(text == right)
                scores[task].append(value)
        if isinstance(model, PreTrainedModel):
            scores["library"] = self.bits_per_byte(model)
        return scores

    def bits_per_byte(self, model: Any) -> list[float]:
        """Bits for each byte of passages of the standard library that no training has seen, by passage."""
        rng = self.world.rng("evaluation-library")
        texts = rng.sample(passages(True), min(self.preset.passages, len(passages(True))))
        rows = encode([Example("", text) for text in texts], self.tokenizer)
        losses = losses_of(model, rows, self.tokenizer.pad_token_id)
        counts = [sum(label != IGNORED for label in row["labels"]) for row in rows]
        return [
            float(loss) * count / math.log(2) / len(text.encode())
            for loss, count, text in zip(losses, counts, texts, strict=True)
        ]

    @property
    def max_new_tokens(self) -> int:
        return 48

    @property
    def prompts(self) -> list[str]:
        return [example.prompt for example, _ in self.items["text_to_code"][:8]]
