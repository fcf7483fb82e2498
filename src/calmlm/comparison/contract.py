"""What an experiment gives to the comparison: base models, data, a way to compose, and how answers are scored."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from calmlm.baselines import Bases, Budget, Data
from calmlm.experiments.fitting import Row, Stage, answer, fit
from calmlm.experiments.flops import Meter
from calmlm.experiments.record import Stages, device

__all__ = ["Answerer", "Domain", "Fitted", "Task", "TextDomain", "model_answerer"]

Skill = Literal["combined", "augmenting", "retained"]


class Answerer(Protocol):
    """Completes prompts."""

    def __call__(self, prompts: Sequence[str], tokens: int | None = None) -> list[str]:
        """The completions; with ``tokens``, exactly so many tokens are written, for timing."""
        ...


_VALIDATION = 400  # rows
MERGING = ("soup", "soup_greedy", "fisher", "task_arithmetic", "ties", "dare_ties", "moe")
"""Systems of two models of one architecture, for which a twin of m_B is trained."""
GRAFTS = ("graft", "graft_random", "graft_swapped")
"""Compositions that start from plain text which both models read."""
NEEDS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(MERGING, ("twin",)),
    **dict.fromkeys(("composed_random", "graft_random"), ("random",)),
    "composed_vanilla": ("vanilla",),
}
"""Base models that a method needs besides m_A and m_B."""


@dataclass(frozen=True)
class Task:
    """One column of the comparison.

    Attributes:
        metric: ``exact_match``, ``chrf`` or ``pass@1``, in per cent, or ``bits_per_byte``.
        skill: ``combined`` asks for both models, ``augmenting`` for m_A's alone, ``retained`` for what m_B could do
            before.
    """

    metric: str
    skill: Skill


@dataclass(frozen=True)
class Fitted:
    """A system that is ready to answer.

    Attributes:
        complete: answers prompts.
        model: the model behind it, where there is one that gives probabilities, or what gives them in its place.
    """

    complete: Answerer
    model: Any | None = None


def model_answerer(model: Any, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int) -> Answerer:
    """Completes prompts with a model, or whatever generates like one."""

    def run(prompts: Sequence[str], tokens: int | None = None) -> list[str]:
        forced = {} if tokens is None else {"min_new_tokens": tokens}
        return answer(model, tokenizer, prompts, tokens or max_new_tokens, extra=lambda start, ids: forced)

    return run


class Domain(ABC):
    """One experiment with one seed.

    Args:
        preset: the experiment's settings.
        seed: of everything random.
        cache: folder of the stages that all methods share.
        report: takes lines of progress.
    """

    name: ClassVar[str]
    folder: ClassVar[str]
    """Where its base models lie, among those of all experiments."""
    same_items: ClassVar[bool] = False
    """Whether all seeds are asked the same."""
    methods: ClassVar[tuple[str, ...] | None] = None
    """Names of the methods that can be run here; None for all."""

    def __init__(self, preset: Any, seed: int, cache: Path, report: Callable[[str], None]) -> None:
        self.preset, self.seed = preset, seed
        self.stages = Stages(cache / f"{preset.name}-{self.mark(preset)}" / f"seed-{seed}", f"seed {seed}", report)

    @classmethod
    def mark(cls, preset: Any) -> str:
        """Eight digits that stand for the settings."""
        return hashlib.sha256(json.dumps(dataclasses.asdict(preset)).encode()).hexdigest()[:8]

    @classmethod
    @abstractmethod
    def tasks_of(cls, preset: Any) -> dict[str, Task]:
        """The columns, with this preset."""

    @classmethod
    def methods_of(cls, preset: Any) -> tuple[str, ...] | None:
        """Names of the methods that can be run with this preset; None for all."""
        return cls.methods

    @classmethod
    def groups_of(cls, preset: Any) -> dict[str, list[str]]:
        """Columns that take several tasks together."""
        return {}

    @property
    def own(self) -> Mapping[str, Callable[[Meter], Fitted]]:
        """Methods that are done in this experiment's own way."""
        return {}

    @abstractmethod
    def prepare(self, method: str) -> None:
        """Train or load the base models of a method, and draw the data."""

    @abstractmethod
    def alone(self) -> Answerer:
        """m_B alone, which decoding times are relative to."""

    @abstractmethod
    def score(self, complete: Answerer, model: Any | None) -> dict[str, list[float]]:
        """The score of each item, by task; 0 to 1 where the metric is in per cent.

        Args:
            complete: what is scored.
            model: the model behind it, if there is one, for tasks that ask for probabilities.
        """

    @property
    @abstractmethod
    def prompts(self) -> list[Any]:
        """Prompts to time with."""


class TextDomain(Domain):
    """An experiment in which both models read text in one tokenizer, so that every method can be run."""

    full_rate: float = 1e-3  # where all weights of m_B are trained
    evaluation_batch_size: int = 200
    bare_answers: ClassVar[bool] = True
    """Whether answers come without the white space around them."""

    def __init__(self, preset: Any, seed: int, cache: Path, report: Callable[[str], None]) -> None:
        super().__init__(preset, seed, cache, report)
        self.trained: dict[str, dict[str, Any]] = {}
        """The tensors of compositions by name, by their connector; controls that train nothing take them."""

    @cached_property
    @abstractmethod
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of both models."""

    @abstractmethod
    def train(self, name: str) -> tuple[PreTrainedModel, list[tuple[int, float]]]:
        """Train ``anchor``, ``augmenting``, ``vanilla`` or ``random`` from nothing."""

    @abstractmethod
    def corpus(self) -> list[Row]:
        """What m_A was trained on."""

    @abstractmethod
    def composition(self, count: int, purpose: str, **changes: Any) -> list[Row]:
        """So many rows of D_C; another purpose draws other rows of the same kind."""

    @abstractmethod
    def compose(self, augmenting: PreTrainedModel, connector: str = "cross_attention", **options: Any) -> Any:
        """An untrained composition of a copy of m_B with a small model."""

    @abstractmethod
    def cascade(self) -> Answerer:
        """m_A's answer as text, then m_B."""

    @property
    @abstractmethod
    def max_new_tokens(self) -> int:
        """The longest answer."""

    # What follows ----------------------------------------------------------------------------------------------------

    def make(self, name: str) -> None:
        """Train a base model, unless it is stored."""

        def work() -> tuple[PreTrainedModel, dict[str, Any]]:
            model, losses = self.train_twin() if name == "twin" else self.train(name)
            return model, {"losses": losses, "parameters": model.num_parameters()}

        self.stages.do(name, work, self.tokenizer)

    def base(self, name: str) -> PreTrainedModel:
        """A base model: trained once, then loaded."""
        self.make(name)
        return AutoModelForCausalLM.from_pretrained(self.stages.folder / name).to(device()).eval()

    def train_twin(self) -> tuple[PreTrainedModel, list[tuple[int, float]]]:
        """A model of the anchor's architecture that knows what m_A knows: m_B trained further on m_A's corpus.

        It takes as many steps as m_A. Merging takes models that come from one checkpoint, so it does not begin from
        random weights.
        """
        # In lower precision most steps of a training of all weights would be rounded away.
        model = self.base("anchor").float()
        stage = dataclasses.replace(self.twin_stage, learning_rate=self.full_rate)
        return model, fit(model, self.corpus(), self.tokenizer.pad_token_id, stage, self.seed)

    @cached_property
    def anchor(self) -> PreTrainedModel:
        """m_B."""
        return self.base("anchor")

    @cached_property
    def augmenting(self) -> PreTrainedModel:
        """m_A."""
        return self.base("augmenting")

    def fresh_anchor(self) -> PreTrainedModel:
        """A copy of m_B, for a composition to hook into."""
        return copy.deepcopy(self.anchor)

    def bases(self, twin: bool = False) -> Bases:
        """What a baseline is given; a twin where it merges."""
        return Bases(self.anchor, self.augmenting, self.tokenizer, self.base("twin") if twin else None)

    @cached_property
    def data(self) -> Data:
        """What a baseline may see."""
        stage = self.stage
        rows = self.composition(stage.steps * stage.batch_size, "composition")
        known = {tuple(row["input_ids"]) for row in rows}
        drawn = self.composition(_VALIDATION * 8, "validation")
        unseen = [row for row in drawn if tuple(row["input_ids"]) not in known]
        return Data(rows, self.corpus(), unseen[:_VALIDATION])

    @property
    def stage(self) -> Stage:
        """The training of a composition, and of what is compared with it."""
        return self.preset.composition

    @property
    def twin_stage(self) -> Stage:
        """The training of the twin, but for its learning rate."""
        return self.preset.augmenting

    def budget(self, meter: Meter) -> Budget:
        """What a baseline may spend: what the composition spends; ``meter`` counts it."""
        added = self.compose(self.augmenting).get_nb_trainable_parameters()[0]
        return Budget(self.stage, self.seed, added, self.full_rate, meter)

    def prepare(self, method: str) -> None:
        _ = self.anchor, self.augmenting, self.data
        for name in NEEDS.get(method, ()):
            self.make(name)

    def alone(self) -> Answerer:
        return self.answerer(self.anchor)

    def encode(self, prompt: str) -> list[int]:
        """The ids of a prompt that is asked."""
        return list(self.tokenizer(prompt)["input_ids"])

    @property
    def ends(self) -> dict[str, Any]:
        """What ends an answer, for ``generate``; a model's own settings where that is empty."""
        return {"eos_token_id": self.tokenizer.eos_token_id}

    def answerer(self, model: Any) -> Answerer:
        """A model that completes this domain's prompts."""
        return model_answerer(model, self.tokenizer, self.max_new_tokens)
