"""Key-value arithmetic in the comparison; its bases are those of `calmlm repro kv-arithmetic`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from calmlm.comparison.contract import Answerer, Task, TextDomain
from calmlm.comparison.methods import WITHOUT_PLAIN_TEXT
from calmlm.errors import ConfigError
from calmlm.experiments.fitting import Row
from calmlm.experiments.kv_arithmetic.joined import compose_bases, composition_examples
from calmlm.experiments.kv_arithmetic.measures import cascade, columns, is_right
from calmlm.experiments.kv_arithmetic.pretraining import BASES, augmenting_examples
from calmlm.experiments.kv_arithmetic.rows import encode
from calmlm.experiments.kv_arithmetic.run import SeedRun
from calmlm.experiments.kv_arithmetic.world import Example, World

__all__ = ["KeyValues"]


class KeyValues(TextDomain):
    """Keys whose values m_A knows, and an m_B that calculates."""

    name = "kv_arithmetic"
    folder = "kv_arithmetic"
    methods = WITHOUT_PLAIN_TEXT

    def __init__(self, preset: Any, seed: int, cache: Path, report: Callable[[str], None]) -> None:
        super().__init__(preset, seed, cache, report)
        self.run = SeedRun(preset, seed, cache, report)
        self.world = self.run.world

    @cached_property
    def items(self) -> dict[str, list[Example]]:
        """Items by task; of what m_B is to have kept, D_C shows none."""
        drawn = {name: items for name, items in columns(self.world).items() if name in self.tasks_of(self.preset)}
        return drawn | {"numeric": [item for item in drawn["numeric"] if item.prompt not in self.shown]}

    @cached_property
    def shown(self) -> set[str]:
        """The prompts of D_C."""
        return {example.prompt for example in composition_examples(self.world, "composed")}

    @classmethod
    def tasks_of(cls, preset: Any) -> dict[str, Task]:
        return {
            "key_value": Task("exact_match", "augmenting"),
            "numeric": Task("exact_match", "retained"),
            "keys_arithmetic": Task("exact_match", "combined"),
            "ood": Task("exact_match", "combined"),
            "ood_hard": Task("exact_match", "combined"),
        }

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.run.tokenizer("anchor")

    def train(self, name: str) -> tuple[PreTrainedModel, list[tuple[int, float]]]:
        return BASES[name][1](self.world, self.tokenizer)

    def corpus(self) -> list[Row]:
        return encode(augmenting_examples(self.world), self.tokenizer)

    def composition(self, count: int, purpose: str, **changes: Any) -> list[Row]:
        """Rows of D_C. Changes: ``share`` of the keys that it may use, ``substitutes`` for KV-SUBS instead.

        Raises:
            ConfigError: for a share with keys that are evaluated on.
        """
        world, share = self.world, changes.get("share")
        if share is not None:
            if round(len(world.keys) * share) > len(world.composition_keys):
                most = len(world.composition_keys) / len(world.keys)
                raise ConfigError(
                    f"share must be at most {most}, since the other keys are evaluated on, but got {share}: use less."
                )
            world = World(self.preset, self.seed)
            world.composition_keys = world.keys[: round(len(world.keys) * share)]
        variant = "composed_subs" if changes.get("substitutes") else "composed"
        return encode(composition_examples(world, variant, count, purpose), self.tokenizer)

    def compose(self, augmenting: PreTrainedModel, connector: str = "cross_attention", **options: Any) -> Any:
        return compose_bases(self.world, self.anchor, augmenting, connector, **options)

    def cascade(self) -> Answerer:
        look_up, calculate = self.answerer(self.augmenting), self.answerer(self.anchor)

        def run(prompts: Sequence[str], tokens: int | None = None) -> list[str]:
            return cascade(look_up, lambda pasted: calculate(pasted, tokens))(prompts)

        return run

    def score(self, complete: Answerer, model: Any | None) -> dict[str, list[float]]:
        scores = {}
        for task, examples in self.items.items():
            completions = complete([example.prompt for example in examples])
            scores[task] = [float(is_right(task, c, e)) for c, e in zip(completions, examples, strict=True)]
        return scores

    @property
    def max_new_tokens(self) -> int:
        return self.run.max_new_tokens

    @property
    def prompts(self) -> list[str]:
        return [example.prompt for example in self.items["keys_arithmetic"][:8]]
