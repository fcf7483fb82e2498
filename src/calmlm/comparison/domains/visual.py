"""Visual arithmetic in the comparison: m_A is an image encoder, so that only some methods can be run.

It writes no text, has no tokenizer and no language model's shape: there is nothing to merge, to route to or to train
m_B on, but the composition, its connectors and controls, and the cascade "classify, then calculate".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from transformers import LlamaForCausalLM, PreTrainedModel, ViTForImageClassification

from calmlm.comparison.contract import Answerer, Domain, Fitted, Task
from calmlm.experiments.flops import Meter
from calmlm.experiments.kv_arithmetic.world import final_answer
from calmlm.experiments.record import device
from calmlm.experiments.visual_arithmetic.joined import VARIANTS, train_composition
from calmlm.experiments.visual_arithmetic.measures import columns, composition, pipeline, text_model
from calmlm.experiments.visual_arithmetic.pretraining import (
    build_visual_tokenizer,
    new_encoder,
    train_anchor,
    train_encoder,
)
from calmlm.experiments.visual_arithmetic.world import HARD_PHRASINGS, OOD_PHRASINGS, Example, World

__all__ = ["Visual"]


class Visual(Domain):
    """Handwritten digits that m_A recognises, and an m_B that calculates; prompts are examples with their pictures."""

    name = "visual"
    folder = "visual_arithmetic"
    methods = ("m_B", *VARIANTS, "cascade")

    def __init__(self, preset: Any, seed: int, cache: Path, report: Callable[[str], None]) -> None:
        super().__init__(preset, seed, cache, report)
        self.world, self.tokenizer = World(preset, seed), build_visual_tokenizer()

    @cached_property
    def items(self) -> dict[str, list[Example]]:
        """Items by task; what m_B is to have kept is asked in phrasings that D_C does not show."""
        rng, count = self.world.rng("evaluation-kept"), self.preset.items
        phrasings = (*OOD_PHRASINGS, *HARD_PHRASINGS)
        return columns(self.world) | {"numeric": [self.world.numeric(rng, phrasings) for _ in range(count)]}

    @classmethod
    def tasks_of(cls, preset: Any) -> dict[str, Task]:
        return {
            "naming": Task("exact_match", "augmenting"),
            "numeric": Task("exact_match", "retained"),
            "images": Task("exact_match", "combined"),
            "images_pairs": Task("exact_match", "combined"),
            "ood": Task("exact_match", "combined"),
            "ood_hard": Task("exact_match", "combined"),
        }

    def prepare(self, method: str) -> None:
        _ = self.anchor, getattr(self, VARIANTS[method].encoder) if method in VARIANTS else self.encoder

    def _base(self, name: str, train: Callable[[], tuple[PreTrainedModel, Any]], kind: Any, text: bool = False) -> Any:
        def work() -> tuple[PreTrainedModel, dict[str, Any]]:
            model, losses = train()
            return model, {"losses": losses, "parameters": model.num_parameters()}

        self.stages.do(name, work, self.tokenizer if text else None)
        return kind.from_pretrained(self.stages.folder / name).to(device()).eval()

    @cached_property
    def anchor(self) -> Any:
        """m_B."""
        return self._base("anchor", lambda: train_anchor(self.world, self.tokenizer), LlamaForCausalLM, text=True)

    @cached_property
    def encoder(self) -> Any:
        """m_A."""
        return self._base("encoder", lambda: train_encoder(self.world), ViTForImageClassification)

    @cached_property
    def random(self) -> Any:
        """An encoder that nothing was trained of."""
        return self._base("random", lambda: (new_encoder(self.world, 1000 + self.seed), []), ViTForImageClassification)

    @property
    def own(self) -> Mapping[str, Callable[[Meter], Fitted]]:
        return {
            "m_B": lambda meter: Fitted(self.alone()),
            "cascade": lambda meter: Fitted(self._pipeline()),
            **{name: partial(self._composed, name) for name in VARIANTS},
        }

    def alone(self) -> Answerer:
        return lambda prompts, tokens=None: text_model(self.anchor, self.tokenizer, tokens)(list(prompts))

    def _pipeline(self) -> Answerer:
        def run(prompts: Sequence[Any], tokens: int | None = None) -> list[str]:
            calculate = text_model(self.anchor, self.tokenizer, tokens)
            return pipeline(self.encoder, calculate, self.world)(list(prompts))

        return run

    def _composed(self, name: str, meter: Meter) -> Fitted:
        eyes = getattr(self, VARIANTS[name].encoder)
        model, _ = train_composition(self.world, self.tokenizer, self.anchor, eyes, name, meter)

        def run(prompts: Sequence[Any], tokens: int | None = None) -> list[str]:
            return composition(model, self.tokenizer, self.world, tokens)(list(prompts))

        return Fitted(run)

    def score(self, complete: Answerer, model: Any | None) -> dict[str, list[float]]:
        scores = {}
        for task, examples in self.items.items():
            texts = complete(examples)  # type: ignore[arg-type]
            scores[task] = [
                float(final_answer(text) == final_answer(example.completion))
                for text, example in zip(texts, examples, strict=True)
            ]
        return scores

    @property
    def prompts(self) -> list[Example]:
        return self.items["images"][:8]
