"""What the experiment with two real models is: its models, data, sizes and methods, as one YAML file says them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from calmlm.errors import ConfigError
from calmlm.experiments.fitting import Stage
from calmlm.training.fields import read_fields
from calmlm.training.yaml import parse_yaml

__all__ = ["PARTS", "BaseModel", "Method", "Settings", "Varieties", "load_settings"]

PARTS = ("training", "development", "test")
"""What sentences are for."""

LATER: dict[str, Any] = {"shots_in": "turn", "shown": [], "subset": None, "splits": {}, "keys": {}}
"""Settings that cells were stored without: they count in a cell's mark where they differ from these."""


LATER_OF_METHODS = ("retain", "pairs", "guidance")
"""The same of a method: they count where they are given."""


@dataclass(frozen=True)
class BaseModel:
    """A base model: its id, and the GGUF file that stands for it where there is no hub."""

    id: str
    file: str | None = None


@dataclass(frozen=True)
class Method:
    """One line of the table.

    Attributes:
        title: how the report calls it.
        system: what it is. ``m_A`` and ``m_B`` alone; ``cascade``: m_A translates, m_B is given that; ``router``: m_B's
            state at the prompt says which of the two answers; ``ensemble``: both models' probabilities at one weight;
            ``lora`` and ``full`` train m_B; ``composed``: a composition.
        examples: whether some examples are read first: by the model alone, or in a composition or ensemble by m_A.
        compose: arguments of ``calmlm.compose``; ``plain_text`` is filled in.
        augmenting: ``real``, or ``random`` for fresh weights in the same architecture.
        reads: what m_A reads in training: its ``own`` row's prompt, or that of an ``other`` row of the same variety.
        rank: of LoRA's matrices.
        steps, learning_rate, batch_size: of the training; no steps for what is not trained.
        rows_at_once: how many rows of a batch are in memory together; all by default.
        pairs: of its D_C, where it has more than the others': theirs, and sentences that are too long in some variety,
            each in one where it is not.
        retain: weight of a loss that holds the composition to what m_B alone says on plain English outside D_C; none by
            default.
        of: a composition's row: this one trains nothing and measures that composition, while m_A reads the examples
            that a model alone reads.
        guidance: with ``of``, any row: this one is that row, and writes with classifier-free guidance of this scale
            (Ho and Salimans, 2022; transformers' ``guidance_scale``) instead of greedily. What is left behind is what
            would be written without the sentence.
    """

    title: str
    system: Literal["m_A", "m_B", "cascade", "router", "ensemble", "lora", "full", "composed"]
    examples: bool = False
    compose: dict[str, Any] = field(default_factory=dict)
    augmenting: Literal["real", "random"] = "real"
    reads: Literal["own", "other"] = "own"
    rank: int = 22
    steps: int = 0
    learning_rate: float = 0.0
    batch_size: int = 16
    rows_at_once: int | None = None
    pairs: int | None = None
    retain: float | None = None
    of: str | None = None
    guidance: float | None = None

    @property
    def seeded(self) -> bool:
        """Whether anything about it depends on the seed."""
        return (
            self.examples
            or self.of is not None
            or self.steps > 0
            or self.system == "cascade"
            or self.augmenting == "random"
        )

    @property
    def stage(self) -> Stage:
        """Its training."""
        return Stage(self.steps, self.batch_size, self.learning_rate, weight_decay=0.0)


@dataclass(frozen=True)
class Varieties:
    """The languages' varieties, by their keys in the data.

    Attributes:
        inside: those of D_C.
        outside: those that D_C does not show.
        apart: further ones outside D_C, which m_A knows less of; reported by themselves.
    """

    inside: list[str]
    outside: list[str]
    apart: list[str] = field(default_factory=list)

    @property
    def all(self) -> list[str]:
        """All of them."""
        return [*self.inside, *self.outside, *self.apart]


@dataclass(frozen=True)
class Settings:
    """Everything that a cell depends on besides its seed.

    Attributes:
        name: of the experiment's files.
        anchor, augmenting: m_B and m_A.
        data: id of the data set, whose rows hold one sentence in all varieties.
        varieties: which are used.
        methods: the lines of the table, in order.
        subset: of the data set, as ``datasets`` calls its configurations.
        splits: ``{part: split}`` for a data set that is split already, for the parts training, development and test;
            otherwise its rows are split by sentence.
        keys: ``{key of the hub's rows: key}``, where these differ.
        english: the key of what is translated into.
        longest: sentences that are longer than so many characters in any variety are left out.
        pairs: D_C's, spread evenly over its varieties; each is another sentence.
        plain: lines of plain English beside them in D_C, which m_A has nothing to add to.
        shots: examples that a method with ``examples`` reads first.
        shots_in: the examples of a model alone: all ``inside`` in turn, or in the variety that is asked, as papers have
            it (``own``). A composition reads one text before all prompts, with varieties in turn.
        headline: the row that the page by varieties is about.
        shown: the varieties that are shown in turn; those inside D_C by default.
        plain_lines: lines of plain English that ``calmlm.compose`` takes as ``plain_text``.
        test, development: sentences that are kept for either.
        items: of the test sentences, how many are asked in each variety.
        weighed: of the development sentences, how many choose the ensemble's weight, in each variety of D_C.
        english_items: test sentences whose English is read as plain text.
        written: test sentences that are translated in each variety, for chrF.
        new_tokens: of a translation, at most.
        swapped: whether m_A's part is also measured with another sentence of the same variety.
    """

    name: str
    anchor: BaseModel
    augmenting: BaseModel
    data: str
    varieties: Varieties
    methods: dict[str, Method]
    english: str = "eng_Latn"
    longest: int = 300
    pairs: int = 1920
    plain: int = 192
    shots: int = 5
    plain_lines: int = 500
    test: int = 400
    development: int = 200
    items: int = 50
    weighed: int = 20
    english_items: int = 100
    written: int = 12
    new_tokens: int = 80
    swapped: bool = True
    shots_in: Literal["turn", "own"] = "turn"
    shown: list[str] = field(default_factory=list)
    headline: str = ""
    subset: str | None = None
    splits: dict[str, str] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)

    def cut(self, steps: int | None, items: int | None) -> Settings:
        """The same with fewer steps of each training, or fewer items of each measure, for a trial."""
        changed: dict[str, Any] = {}
        if steps is not None:
            changed["methods"] = {
                name: dataclasses.replace(method, steps=min(steps, method.steps))
                for name, method in self.methods.items()
            }
        if items is not None:
            for measure in ("items", "weighed", "english_items", "written"):
                changed[measure] = min(items, getattr(self, measure))
        return dataclasses.replace(self, **changed)

    def chosen(self, names: Sequence[str] | None) -> list[str]:
        """The methods of these names, or all, in the order of the file.

        Raises:
            ConfigError: for a name that there is not.
        """
        unknown = sorted(set(names or ()) - set(self.methods))
        if unknown:
            raise ConfigError(
                f"Rows must be among {', '.join(self.methods)}, but got {', '.join(unknown)}: use names of the file."
            )
        return [name for name in self.methods if names is None or name in names]

    def shows(self, name: str) -> bool:
        """Whether a method reads examples, or the one that it is with guidance does."""
        method = self.methods[name]
        if method.of is None:
            return method.examples
        return method.guidance is None or self.shows(method.of)

    def lora_beside(self, name: str) -> str:
        """The row of LoRA that has seen the same D_C as a method: the first one, or "lora" where there is none."""
        pairs = self._pairs(name)
        rows = [row for row, found in self.methods.items() if found.system == "lora" and found.of is None]
        return next((row for row in rows if self._pairs(row) == pairs), "lora")

    def _pairs(self, name: str) -> int | None:
        method = self.methods[name]
        return method.pairs if method.of is None else self._pairs(method.of)

    def guided(self, name: str) -> str | None:
        """The row that a method is with guidance; None without."""
        method = self.methods[name]
        return None if method.guidance is None else method.of

    def mark(self, name: str) -> str:
        """Eight digits that stand for all that a cell of a method depends on, but for its seed."""
        later = {key: value for key, value in LATER.items() if getattr(self, key) == value}
        left_out = {"methods", "name", "headline", *later}
        shared = {key: value for key, value in dataclasses.asdict(self).items() if key not in left_out}
        own = self._asked(name)
        for key in ("rows_at_once", "of"):  # as in cells that were stored without them
            if own[key] is None:
                del own[key]
        return hashlib.sha256(json.dumps([shared, own], sort_keys=True).encode()).hexdigest()[:8]

    def _asked(self, name: str) -> dict[str, Any]:
        """What a method's cells depend on; what came later counts where it is given."""
        own = {key: value for key, value in dataclasses.asdict(self.methods[name]).items() if key != "title"}
        own = {key: value for key, value in own.items() if key not in LATER_OF_METHODS or value is not None}
        return own | ({"of": self._asked(own["of"])} if own["of"] is not None else {})

    def faults(self) -> list[str]:
        """One sentence for each thing that cannot be."""
        found = []
        for name, method in self.methods.items():
            if method.steps and method.system not in ("lora", "full", "composed"):
                found.append(f"methods.{name}.steps: expected none, since {method.system} is not trained.")
            if method.steps and method.learning_rate <= 0:
                found.append(f"methods.{name}.learning_rate: expected more than 0, but got {method.learning_rate}.")
            if method.rows_at_once is not None and method.batch_size % max(1, method.rows_at_once):
                found.append(f"methods.{name}.rows_at_once: expected a part of {method.batch_size} rows.")
            if method.pairs is not None and not (method.pairs > self.pairs and method.steps):
                found.append(f"methods.{name}.pairs: expected more than {self.pairs}, for what is trained.")
            if method.retain is not None and not (method.retain > 0 and method.system == "composed" and method.steps):
                found.append(f"methods.{name}.retain: expected more than 0, for a composition that is trained.")
            if method.guidance is not None:
                source = self.methods.get(method.of or "")
                plain = Method(method.title, method.system, of=method.of, guidance=method.guidance)
                if source is None or source.guidance is not None or source.system in ("cascade", "router", "ensemble"):
                    found.append(f"methods.{name}.of: expected what generates by itself, but got {method.of}.")
                elif method.system != source.system or method != plain or not 1 < method.guidance < math.inf:
                    found.append(
                        f"methods.{name}: expected the system of {method.of} and a guidance above 1, and nothing else."
                    )
            elif method.of is not None:
                source = self.methods.get(method.of)
                if source is None or source.system != "composed" or source.of is not None or not source.examples:
                    found.append(f"methods.{name}.of: expected a composition with examples, but got {method.of}.")
                if method.system != "composed" or method.compose or method.steps:
                    found.append(f"methods.{name}: expected system 'composed' and nothing to train beside 'of'.")
            elif bool(method.compose) != (method.system == "composed"):
                found.append(f"methods.{name}.compose: expected arguments for system 'composed', and none for others.")
        if self.headline and self.headline not in self.methods:
            found.append(f"headline: expected one of the methods, but got {self.headline}.")
        if self.splits and set(self.splits) != set(PARTS):
            found.append(f"splits: expected {', '.join(PARTS)}, but got {', '.join(self.splits)}.")
        for variety in self.shown:
            if variety not in self.varieties.inside:
                found.append(f"shown: expected varieties inside D_C, but got {variety}.")
        asked = {"items": self.test, "english_items": self.test, "written": self.items, "weighed": self.development}
        for measure, most in asked.items():
            if not 2 <= getattr(self, measure) <= most:
                found.append(f"{measure}: expected 2 to {most}, but got {getattr(self, measure)}.")
        return found


def load_settings(path: str | Path) -> Settings:
    """Read a file of ``configs/real``.

    Raises:
        ConfigError: there is no such file, or it holds something else; all faults at once.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"Expected a YAML file at {path}, but it cannot be read ({error}): check the path.") from None
    faults: list[str] = []
    settings = read_fields(Settings, parse_yaml(text, str(path)), faults)
    if settings is not None:
        faults += settings.faults()
    if settings is None or faults:
        raise ConfigError(f"{path}: {' '.join(faults)}")
    return settings
