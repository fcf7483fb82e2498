"""Sentences in many varieties, split by sentence: what a model learns in one language is asked in none."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from calmlm.data.sources import HubDataset, read_hub
from calmlm.errors import DataError, first_line
from calmlm.experiments.real.presets import PARTS, Settings

__all__ = ["Item", "World", "as_text", "asked", "read_sentences"]

Sentence = dict[str, str]
"""One sentence, by variety."""
PART = "part"
"""The key of a row's part, one of ``PARTS``."""

EXAMPLE = 120  # characters of a sentence that is shown as an example


@dataclass(frozen=True)
class Item:
    """One text to be predicted.

    Attributes:
        prompt: what is given; empty for plain text.
        target: what is to be written, without the space before it.
        variety: of the prompt.
        sentence: a number that is the same in all varieties.
        other: the prompt of another sentence in the same variety.
    """

    prompt: str
    target: str
    variety: str
    sentence: int
    other: str = ""

    @property
    def completion(self) -> str:
        """What follows the prompt."""
        return f" {self.target}" if self.prompt else self.target

    @property
    def size(self) -> int:
        """Bytes of the target."""
        return len(self.target.encode())


def as_text(examples: Sequence[Item]) -> str:
    """Examples as a text before a prompt."""
    return "".join(f"{item.prompt}{item.completion}\n\n" for item in examples)


def asked(source: str) -> str:
    """The prompt for a translation."""
    return f"{source}\nEnglish:"


def read_sentences(settings: Settings, source: str | Path | None = None) -> list[dict[str, Any]]:
    """The rows of a data set, each with its ``part`` where the data set is split already.

    Args:
        settings: the experiment's.
        source: a file of JSON lines, packed by gzip or not, instead of the settings' id on the hub; where there are
            splits, ``{split}`` in its name stands for each.

    Raises:
        DataError: there are no rows, or something else is there.
    """
    found: list[dict[str, Any]] = []
    for part, split in (settings.splits or {"": "train"}).items():
        if source is not None:
            rows = _read_file(Path(str(source).replace("{split}", split)))
        else:
            rows = _together(_of_hub(HubDataset(settings.data, split=split, name=settings.subset)), settings)
        found += [{**row, PART: part} if part else row for row in rows]
    return found


def _of_hub(source: HubDataset) -> list[dict[str, Any]]:
    try:
        return [record.fields for record in read_hub(source)]
    except DataError as error:
        raise DataError(f"{str(error).rstrip('.')}; or name a file of its rows with --data.") from error


def _read_file(path: Path) -> list[dict[str, Any]]:
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8")
        rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    except (OSError, EOFError, ValueError) as error:
        raise DataError(
            f"Expected lines of JSON in {path}, but they cannot be read ({first_line(error)}): name another file."
        ) from None
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"Expected an object of JSON in each line of {path}, but got something else: name another.")
    return rows


def _together(rows: Iterable[dict[str, Any]], settings: Settings) -> list[dict[str, Any]]:
    """One row for each sentence: the hub's own, or made of one for each sentence and variety.

    Raises:
        DataError: rows of another form.
    """
    found: dict[Any, dict[str, Any]] = {}
    for number, row in enumerate(rows):
        if isinstance(row.get("translation"), dict):
            found[number] = {settings.keys.get(key, key): text for key, text in row["translation"].items()}
        elif {"id", "iso_639_3", "iso_15924", "text"} <= row.keys():
            found.setdefault(row["id"], {})[f"{row['iso_639_3']}_{row['iso_15924']}"] = row["text"]
        else:
            raise DataError(
                f"Expected rows with 'translation', or with 'id', 'iso_639_3', 'iso_15924' and 'text', in "
                f"{settings.data}, but got {', '.join(row)}: name other data, or a file with --data."
            )
    return list(found.values())


def _in_parts(rows: Sequence[dict[str, Any]], settings: Settings) -> list[dict[str, Any]]:
    """As many rows for the test and for development as the settings ask for, each from its part, then the training's.

    Raises:
        DataError: a part has too few.
    """
    training, development, test = ([row for row in rows if row[PART] == part] for part in PARTS)
    for part, there, asked_for in (("test", test, settings.test), ("development", development, settings.development)):
        if len(there) < asked_for:
            raise DataError(f"Expected {asked_for} sentences for {part}, but got {len(there)}: lower {part}.")
    return [*test[: settings.test], *development[: settings.development], *training]


class World:
    """What is trained on and what is asked. The split is always the same; the seed draws from the training part.

    Args:
        settings: the experiment's.
        seed: of D_C, its order and the examples.
        rows: of the data set.

    Raises:
        DataError: the rows lack a variety, or are too few.
    """

    def __init__(self, settings: Settings, seed: int, rows: Sequence[dict[str, Any]]) -> None:
        self.settings, self.seed = settings, seed
        keys = [settings.english, *settings.varieties.all]
        missing = [key for key in keys if not any(row.get(key) for row in rows)]
        if missing:
            raise DataError(
                f"Expected sentences in {', '.join(keys)}, but the data have none in {', '.join(missing)}: name other "
                f"data, or other varieties."
            )
        whole = [row for row in rows if all(row.get(key) for key in keys)]
        # A few stand there twice; of those in two parts, the part that is asked keeps them.
        whole.sort(key=lambda row: PARTS.index(row.get(PART, PARTS[0])))
        by_english = {str(row[settings.english]): row for row in whole}
        texts = {english: {key: str(row[key]) for key in keys} for english, row in by_english.items()}
        short = {english for english, text in texts.items() if max(map(len, text.values())) <= settings.longest}
        self.longer = [
            text
            for english, text in texts.items()
            if english not in short and by_english[english].get(PART, PARTS[0]) == PARTS[0]
        ]
        kept = [row for english, row in by_english.items() if english in short]
        self.left_out = len(by_english) - len(kept)
        random.Random("split").shuffle(kept)
        if settings.splits:
            kept = _in_parts(kept, settings)
        needed = settings.test + settings.development + settings.pairs + settings.plain + settings.shots
        if len(kept) < needed:
            raise DataError(
                f"Expected at least {needed} sentences in all varieties, but got {len(kept)}: lower pairs, plain, test "
                f"or development."
            )
        kept = [texts[str(row[settings.english])] for row in kept]
        self.test, rest = kept[: settings.test], kept[settings.test :]
        self.development, self.training = rest[: settings.development], rest[settings.development :]

    @property
    def digest(self) -> str:
        """16 digits that stand for all sentences and their order."""
        parts = json.dumps([self.test, self.development, self.training, self.longer], ensure_ascii=False)
        return hashlib.sha256(parts.encode("utf-8", "surrogatepass")).hexdigest()[:16]

    @cached_property
    def drawn(self) -> list[Sentence]:
        """The training sentences in the seed's order: D_C's pairs, its plain lines, then those that it leaves."""
        found = list(self.training)
        random.Random(f"drawn-{self.seed}").shuffle(found)
        return found

    def composition(self, pairs: int | None = None) -> list[Item]:
        """D_C, in its order: pairs of its varieties, and plain English.

        Args:
            pairs: how many; those of the settings by default. Any above these are sentences that are too long in some
                variety, each in one where it is not.

        Raises:
            DataError: there are not so many.
        """
        settings, varieties = self.settings, self.settings.varieties.inside
        count = settings.pairs if pairs is None else pairs
        in_turn = [varieties[index % len(varieties)] for index in range(count)]
        sentences = [*self.drawn[: settings.pairs], *self._further(in_turn[settings.pairs :])]
        items = [self._item(*item, index) for index, item in enumerate(zip(sentences, in_turn, strict=True))]
        others = {variety: [item.prompt for item in items if item.variety == variety] for variety in varieties}
        items = [
            dataclasses.replace(item, other=others[item.variety][(index // len(varieties)) - 1])
            for index, item in enumerate(items)
        ]
        lines = self.drawn[settings.pairs : settings.pairs + settings.plain]
        plain = [self._plain(sentence, count + index) for index, sentence in enumerate(lines)]
        mixed = [*items, *plain]
        random.Random(f"order-{self.seed}").shuffle(mixed)
        return mixed

    def _further(self, varieties: Sequence[str]) -> list[Sentence]:
        """A sentence for each variety, short enough in it and in English, of those too long in another."""
        english, longest = self.settings.english, self.settings.longest
        left = [sentence for sentence in self.longer if len(sentence[english]) <= longest]
        random.Random(f"further-{self.seed}").shuffle(left)
        found: list[Sentence] = []
        for variety in varieties:
            place = next((place for place, sentence in enumerate(left) if len(sentence[variety]) <= longest), None)
            if place is None:
                raise DataError(
                    f"Expected {len(varieties)} further sentences of at most {longest} characters, but {variety} has "
                    f"none after {len(found)}: lower a method's pairs."
                )
            found.append(left.pop(place))
        return found

    def examples_in(self, varieties: Sequence[str]) -> list[Item]:
        """Examples for a prompt, which D_C does not hold in any language: short ones in these varieties in turn."""
        settings = self.settings
        rest = self.drawn[settings.pairs + settings.plain :]
        short = sorted(rest, key=lambda s: len(s[settings.english]) > EXAMPLE)[: settings.shots]
        return [self._item(s, varieties[index % len(varieties)], index) for index, s in enumerate(short)]

    @cached_property
    def examples(self) -> list[Item]:
        """Those that one text shows before all prompts."""
        return self.examples_in(self.settings.shown or self.settings.varieties.inside)

    @property
    def shown(self) -> str:
        """The examples as a text before a prompt."""
        return as_text(self.examples)

    def examples_of(self, variety: str) -> list[Item]:
        """Those that a model alone reads before a prompt in a variety."""
        return self.examples_in([variety]) if self.settings.shots_in == "own" else self.examples

    @cached_property
    def before(self) -> dict[str, str]:
        """The examples that a model alone reads before a prompt, as text, by variety."""
        return {variety: as_text(self.examples_of(variety)) for variety in self.settings.varieties.all}

    def lines(self, count: int) -> list[str]:
        """Plain English of the training sentences, those outside D_C first."""
        used = self.settings.pairs + self.settings.plain
        return [s[self.settings.english] for s in [*self.drawn[used:], *self.drawn[:used]][:count]]

    @property
    def tested(self) -> list[Item]:
        """What is asked: the same sentences in each variety."""
        return self._in_each(self.test[: self.settings.items], self.settings.varieties.all)

    @property
    def weighed(self) -> list[Item]:
        """Development pairs of D_C's varieties."""
        return self._in_each(self.development[: self.settings.weighed], self.settings.varieties.inside)

    @property
    def written(self) -> list[Item]:
        """What is translated: test sentences of the varieties inside and outside D_C."""
        varieties = self.settings.varieties
        return self._in_each(self.test[: self.settings.written], [*varieties.inside, *varieties.outside])

    @property
    def english(self) -> list[Item]:
        """Test sentences' English, as plain text."""
        return [self._plain(s, index) for index, s in enumerate(self.test[: self.settings.english_items])]

    def _in_each(self, sentences: Sequence[Sentence], varieties: Sequence[str]) -> list[Item]:
        return [
            self._item(sentence, variety, index, sentences[index - 1])
            for variety in varieties
            for index, sentence in enumerate(sentences)
        ]

    def _item(self, sentence: Sentence, variety: str, index: int, other: Sentence | None = None) -> Item:
        prompt = "" if other is None else asked(other[variety])
        return Item(asked(sentence[variety]), sentence[self.settings.english], variety, index, prompt)

    def _plain(self, sentence: Sentence, index: int) -> Item:
        return Item("", sentence[self.settings.english], self.settings.english, index)
