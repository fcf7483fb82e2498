"""A comparison of a user's own two models on their own data: what stands in the file, checked before anything runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerBase

from calmlm.backbone import first_line
from calmlm.baselines.mixture import DENSE
from calmlm.comparison.methods import METHODS
from calmlm.data.context import stated_length
from calmlm.data.formats import Example
from calmlm.data.sources import HubDataset, load_examples
from calmlm.data.tokenizing import LossOn
from calmlm.errors import CalmError, DataError, ModelError
from calmlm.experiments.fitting import Stage
from calmlm.tokenizers import find_tokenizer
from calmlm.training.config import ModelConfig
from calmlm.training.fields import read_fields

__all__ = ["Own", "OwnTask", "Sources", "listed"]

Sources = str | HubDataset | list[str | HubDataset]
OWN_TOKENS = ("router", "confidence_cascade", "text_tool", "composed_encoder")
"""Methods in which m_A reads the anchor's tokens."""
DERIVED = ("contents", "shown")
"""What is found out rather than given."""
BLOCK = 1 << 20


@dataclass(frozen=True)
class OwnTask:
    """A column of the comparison.

    Attributes:
        data: what is asked: records with ``prompt`` and ``completion``, or ``text`` for bits per byte.
        metric: ``exact_match`` and ``chrf`` of what is generated, or ``bits_per_byte`` of the completion.
        skill: ``combined`` asks for both models, ``augmenting`` for m_A's alone, ``retained`` for what m_B could do
            before.
        stop: an answer ends before it, a line break for example; models that were not trained to end go on.
    """

    data: str | HubDataset | list[str | HubDataset]
    metric: Literal["exact_match", "chrf", "bits_per_byte"] = "exact_match"
    skill: Literal["combined", "augmenting", "retained"] = "combined"
    stop: str | None = None


@dataclass(frozen=True)
class Own:
    """Two models, what they are trained on, and what they are asked.

    Attributes:
        model: the two models and their connections, as in `calmlm train`.
        composition: D_C.
        corpus: what m_A was trained on, or some of it.
        tasks: columns by name, each an `OwnTask`.
        vanilla: m_A before it was trained on the corpus, for the control `composed_vanilla`.
        twin: a model of the anchor's architecture that knows what m_A knows, for merging; trained if None.
        steps, batch_size, learning_rate, weight_decay: of every training.
        full_learning_rate: where all weights of m_B are trained.
        loss_on: as in `calmlm train`.
        max_length: tokens of a training example at most; the shorter context of the two models if None.
        max_new_tokens: of an answer.
        evaluation_batch_size: prompts that are answered together.
        validation: rows of D_C that no training sees; where a method has to choose, it chooses on these.
        contents: digests of the data files and of the models' folders, so that a cell is known by what it was made of.
        shown: how many items of a task stand in D_C.
    """

    model: ModelConfig
    composition: str | HubDataset | list[str | HubDataset]
    corpus: str | HubDataset | list[str | HubDataset]
    tasks: dict[str, Any]
    vanilla: str | None = None
    twin: str | None = None
    steps: int = 1000
    batch_size: int = 16
    learning_rate: float = 3e-4
    full_learning_rate: float = 5e-5
    weight_decay: float = 0.1
    loss_on: LossOn = "completion"
    max_length: int | None = None
    max_new_tokens: int = 64
    evaluation_batch_size: int = 16
    validation: int = 200
    contents: dict[str, str] = field(default_factory=dict)
    shown: dict[str, int] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What cells and stages are called after."""
        return "own"

    @property
    def stage(self) -> Stage:
        """Every training of a composition, and of what is compared with it."""
        return Stage(self.steps, self.batch_size, self.learning_rate, self.weight_decay)

    @property
    def augmenting(self) -> str:
        """m_A's id or folder."""
        assert isinstance(self.model.augmenting, str)
        return self.model.augmenting

    @property
    def anchor(self) -> str:
        """m_B's id or folder."""
        assert self.model.anchor is not None
        return self.model.anchor

    @property
    def about(self) -> str:
        """What a report says of it."""
        return (
            f"m_A is `{self.augmenting}` and m_B `{self.anchor}`, with {len(self.tasks)} tasks. Every training takes "
            f"{self.steps} steps of {self.batch_size} examples, at a learning rate of {self.learning_rate:g}, or "
            f"{self.full_learning_rate:g} where all weights of m_B are trained. Seeds differ in the order of examples, "
            f"in new weights and in the rows that are held out."
            + "".join(f" **{count} items of {name} stand in D_C.**" for name, count in self.shown.items() if count)
        )

    @cached_property
    def tokenizers(self) -> tuple[PreTrainedTokenizerBase | None, PreTrainedTokenizerBase | None]:
        """m_B's and m_A's, as they lie beside the models."""
        remote = {"trust_remote_code": self.model.trust_remote_code}
        return (
            find_tokenizer(self.anchor, revision=self.model.revision, **remote),
            find_tokenizer(self.augmenting, revision=self.model.augmenting_revision, **remote),
        )

    @property
    def shares_tokenizer(self) -> bool:
        """Whether both models read the same tokens."""
        ours, theirs = self.tokenizers
        return ours is None or theirs is None or ours.get_vocab() == theirs.get_vocab()

    def methods(self) -> dict[str, str | None]:
        """All methods, each with the reason why it cannot be run here, or None where it can."""
        why: dict[str, str | None] = dict.fromkeys(METHODS)
        why["cascade"] = "it pastes m_A's answer in a way of each experiment's own; 'text_tool' does so for any"
        if self.vanilla is None:
            why["composed_vanilla"] = "it needs 'own.vanilla', m_A before its training"
        if not self.shares_tokenizer:
            why |= dict.fromkeys(OWN_TOKENS, "the two models have different tokenizers")
        family = self._configs[0].model_type
        if family not in DENSE:
            why["moe"] = f"it is made of models of the families {' and '.join(DENSE)}, and the anchor's is {family}"
        return why

    @cached_property
    def _configs(self) -> list[PreTrainedConfig]:
        found = []
        for source, revision in (
            (self.anchor, self.model.revision),
            (self.augmenting, self.model.augmenting_revision),
        ):
            try:
                found.append(
                    AutoConfig.from_pretrained(
                        source, revision=revision, trust_remote_code=self.model.trust_remote_code
                    )
                )
            except (OSError, ValueError) as error:
                raise ModelError(
                    f"Expected the id or folder of a model, but {source!r} cannot be read ({first_line(error)}): check "
                    f"the name, the revision and your access to it."
                ) from error
        return found

    @property
    def context(self) -> int | None:
        """The shorter context of the two models, in tokens; None where neither states one."""
        return min((length for length in map(stated_length, self._configs) if length is not None), default=None)

    def checked(self, faults: list[str], where: str) -> Own | None:
        """The same with its tasks read and its contents digested; None where there are faults.

        Args:
            faults: one sentence for each fault is appended.
            where: dotted path within the file.
        """
        before = len(faults)
        faults += [f"{where}.{fault}" for fault in self.model.faults()]
        if self.model.composition is not None or not isinstance(self.model.augmenting, str):
            faults.append(f"{where}.model: expected an anchor and one augmenting model; name both.")
        if "kind" in self.model.connector:
            faults.append(f"{where}.model.connector.kind: each connector is a method of its own; leave it out.")
        for name in ("refresh", "augmenting_view", "device_map"):
            if getattr(self.model, name) != getattr(ModelConfig(), name):
                faults.append(
                    f"{where}.model.{name}: expected the default here, since all methods read the same text on one "
                    f"device; leave it out."
                )
        for name in ("steps", "batch_size", "max_new_tokens", "evaluation_batch_size", "validation"):
            if getattr(self, name) < 1:
                faults.append(f"{where}.{name}: expected at least 1, but got {getattr(self, name)}.")
        if self.max_length is not None and self.max_length < 2:
            faults.append(f"{where}.max_length: expected 2 or more, but got {self.max_length}.")
        faults += [f"{where}: '{name}' is no key; remove it." for name in DERIVED if getattr(self, name)]
        tasks = {}
        for name, value in self.tasks.items():
            task = read_fields(OwnTask, value, faults, f"{where}.tasks.{name}")
            if not str(name).replace("_", "").isalnum():
                faults.append(f"{where}.tasks: expected names of letters, digits and underscores, but got {name!r}.")
            if task is not None and task.stop == "":
                faults.append(f"{where}.tasks.{name}.stop: expected some text, but it is empty; leave it out.")
            tasks[str(name)] = task
        if not tasks:
            faults.append(f"{where}.tasks: expected at least one, but there is none.")
        if len(faults) > before:
            return None
        made = replace(self, tasks=tasks)
        contents, shown = {}, {}
        try:
            contents, shown = dict(made._digests()), made._count_shown()
            _ = made._configs
            if made.tokenizers[0] is None:
                faults.append(f"{where}.model.anchor: expected a model with a tokenizer, but {made.anchor!r} has none.")
        except CalmError as error:
            faults.append(f"{where}: {error}")
        return None if len(faults) > before else replace(made, contents=contents, shown=shown)

    def _count_shown(self) -> dict[str, int]:
        load_examples(listed(self.corpus))
        learned = {json.dumps(example.fields) for example in load_examples(listed(self.composition))}
        counts = {}
        for name, task in self.tasks.items():
            examples = load_examples(listed(task.data))
            check_format(examples[0], task.metric)
            counts[name] = sum(json.dumps(example.fields) in learned for example in examples)
        return counts

    def _digests(self) -> Iterator[tuple[str, str]]:
        for sources in [self.composition, self.corpus, *(task.data for task in self.tasks.values())]:
            for source in listed(sources):
                if isinstance(source, str):
                    yield source, _digest_of([Path(source)])
        for model in (self.anchor, self.augmenting, self.vanilla, self.twin):
            if model is not None and Path(model).is_dir():
                yield model, _digest_of(sorted(path for path in Path(model).iterdir() if path.is_file()))


def listed(sources: Sources) -> list[str | HubDataset]:
    """One source or several, as a list."""
    return sources if isinstance(sources, list) else [sources]


def check_format(example: Example, metric: str) -> None:
    """Raise unless a task's metric can be taken of such an example.

    Raises:
        DataError: otherwise.
    """
    formats = ("prompt-completion", "text") if metric == "bits_per_byte" else ("prompt-completion",)
    if example.format not in formats:
        wanted = "'prompt' and 'completion'" + (" or 'text'" if len(formats) > 1 else "")
        raise DataError(
            f"{example.place}: expected the fields {wanted} for the metric {metric}, but got {example.format}: rename "
            "the fields or take another metric."
        )


def _digest_of(files: list[Path]) -> str:
    """16 digits that stand for the contents of files.

    Raises:
        DataError: one of them cannot be read.
    """
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.name.encode())
        try:
            with path.open("rb") as file:
                while block := file.read(BLOCK):
                    digest.update(block)
        except OSError as error:
            raise DataError(
                f"Expected a readable file at {path}, but it cannot be read ({error.strerror}); check the path."
            ) from None
    return digest.hexdigest()[:16]
