"""A comparison of a user's own two models on their own data: what stands in the file."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, Literal

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from calmlm.bases.forms import Form
from calmlm.bases.opening import saved_config
from calmlm.bases.origins import check_config, check_folder
from calmlm.data.context import stated_length
from calmlm.data.labels import LossOn
from calmlm.data.sources import HubDataset
from calmlm.errors import ModelError, first_line
from calmlm.experiments.fitting import Stage
from calmlm.files.paths import Place
from calmlm.tokens.lookup import find_tokenizer
from calmlm.training.schema import ModelConfig

__all__ = ["Known", "Own", "OwnTask", "Sources", "listed"]

Sources = Place | HubDataset | list[Place | HubDataset]


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

    data: Place | HubDataset | list[Place | HubDataset]
    metric: Literal["exact_match", "chrf", "bits_per_byte"] = "exact_match"
    skill: Literal["combined", "augmenting", "retained"] = "combined"
    stop: str | None = None


@dataclass(frozen=True)
class Known:
    """What was found out about the models and the data when the file was checked.

    Attributes:
        contents: digests of the data and of the models' folders or commits, so that a cell is known by what it was made
            of.
        shown: how many items of a task stand in D_C.
        read: how many of them stand in m_A's corpus.
        prompted: whether the examples of D_C tell a prompt from what is learned.
    """

    contents: dict[str, str]
    shown: dict[str, int]
    read: dict[str, int]
    prompted: bool


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
        max_length: tokens of a training example at most; the context of the models if None.
        max_new_tokens: of an answer.
        evaluation_batch_size: prompts that are answered together.
        validation: rows of D_C that no training sees; where a method has to choose, it chooses on these.
        known: set by `calmlm.comparison.own_checks.checked`.
    """

    model: ModelConfig
    composition: Place | HubDataset | list[Place | HubDataset]
    corpus: Place | HubDataset | list[Place | HubDataset]
    tasks: dict[str, Any]
    vanilla: Place | None = None
    twin: Place | None = None
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
    known: Known | None = field(default=None, metadata={"made": True})

    def __getstate__(self) -> dict[str, Any]:
        """Its fields alone: tokenizers and configurations are read again in another process."""
        return {each.name: getattr(self, each.name) for each in fields(self)}

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
        base = self.model.augmenting_bases
        assert not isinstance(base, dict)
        return base.name

    @property
    def anchor(self) -> str:
        """m_B's id or folder."""
        return self.model.anchor_base.name

    @property
    def about(self) -> str:
        """What a report says of it."""
        text = (
            f"m_A is `{self.augmenting}` and m_B `{self.anchor}`, with {len(self.tasks)} tasks. Every training takes "
            f"{self.steps} steps of {self.batch_size} examples, at a learning rate of {self.learning_rate:g}, or "
            f"{self.full_learning_rate:g} where all weights of m_B are trained. Seeds differ in the order of examples, "
            f"in new weights and in the rows that are held out; the items asked are the same, and intervals draw them "
            f"together."
        )
        if self.tokenizers[1] is None:
            text += " m_A has no tokenizer of its own and reads the anchor's tokens."
        if self.known is not None:
            text += "".join(f" **{count} items of {name} stand in D_C.**" for name, count in self.known.shown.items())
            text += "".join(
                f" **{count} items of {name} stand in m_A's corpus**, which continued pre-training, LoRA on it, "
                f"merging and the mixture of experts read as well."
                for name, count in self.known.read.items()
            )
        return text

    @property
    def revisions(self) -> dict[str, str | None]:
        """Of the anchor and the augmenting model, by what they are called."""
        return {name: form.revision for name, form in self.forms.items()}

    @property
    def forms(self) -> dict[str, Form]:
        """In which form the anchor and the augmenting model are loaded, by what they are called."""
        base = self.model.augmenting_bases
        assert not isinstance(base, dict)
        return {self.augmenting: base.form, self.anchor: self.model.anchor_base.form}

    @cached_property
    def tokenizers(self) -> tuple[PreTrainedTokenizerBase | None, PreTrainedTokenizerBase | None]:
        """m_B's and m_A's, as they lie beside the models."""
        remote = {"trust_remote_code": self.model.trust_remote_code}
        return (
            find_tokenizer(self.anchor, revision=self.revisions[self.anchor], **remote),
            find_tokenizer(self.augmenting, revision=self.revisions[self.augmenting], **remote),
        )

    @property
    def shares_tokenizer(self) -> bool:
        """Whether both models read the same tokens."""
        ours, theirs = self.tokenizers
        return ours is None or theirs is None or ours.get_vocab() == theirs.get_vocab()

    @cached_property
    def configs(self) -> dict[str, PreTrainedConfig]:
        """The configurations of the models that are named, by id or folder.

        Raises:
            ModelError: one of them cannot be read, or is a composition or an adapter.
        """
        found = {}
        named = {"anchor": self.anchor, "augmenting model": self.augmenting, "vanilla model": self.vanilla}
        roles = {source: role for role, source in reversed((named | {"twin": self.twin}).items()) if source}
        for source, role in reversed(roles.items()):
            check_folder(source, role)
            try:
                found[source] = saved_config(
                    source, revision=self.revisions.get(source), trust_remote_code=self.model.trust_remote_code
                )
            except (OSError, ValueError, KeyError, ImportError) as error:
                raise ModelError(
                    f"Expected the id or folder of a model, but {source!r} cannot be read ({first_line(error)}): check "
                    f"the name, the revision and your access to it."
                ) from error
            check_config(found[source], source, role)
        return found

    @property
    def contexts(self) -> tuple[int | None, int | None]:
        """How many tokens m_B and m_A take, each its own; where they share them, both the shorter; None for any."""
        ours, theirs = (stated_length(self.configs[source]) for source in (self.anchor, self.augmenting))
        if not self.shares_tokenizer:
            return ours, theirs
        shorter = min((length for length in (ours, theirs) if length is not None), default=None)
        return shorter, shorter


def listed(sources: Sources) -> list[str | HubDataset]:
    """One source or several, as a list."""
    return sources if isinstance(sources, list) else [sources]
