"""Ten sentences in six varieties, translated by two real models and by their composition, side by side."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from transformers import StoppingCriteriaList

from calmlm.bases.speed import faster_dtype
from calmlm.data.jsonl import read_jsonl
from calmlm.data.labels import encode_prompt
from calmlm.demo import TRANSLATION
from calmlm.errors import ModelError
from calmlm.experiments.real.joined import open_pair, open_trained
from calmlm.experiments.real.layout import AUGMENTING
from calmlm.experiments.real.measures import first_line_of
from calmlm.experiments.real.presets import BaseModel
from calmlm.experiments.real.systems import FirstLine
from calmlm.experiments.real.world import asked
from calmlm.experiments.record import device
from calmlm.files.loading import read_config
from calmlm.tokens.emitter import TextEmitter

__all__ = ["FILES", "Sentence", "Speaker", "sentences", "show", "speakers"]

FILES = {
    "anchor": "smollm2-135m-instruct/SmolLM2-135M-Instruct.Q4_1.gguf",
    "augmenting": "gemma-3-270m/gemma-3-270m-q4_k_m.gguf",
}
"""Where ``scripts/models`` puts the two models, below its folder."""
STYLES = {"m_B": "yellow", "m_A": "cyan", "composition": "bold green"}
NEW_TOKENS = 40


@dataclass(frozen=True)
class Sentence:
    """What is translated, and what it means."""

    language: str
    source: str
    english: str


@dataclass(frozen=True)
class Speaker:
    """One of the three that translate.

    Attributes:
        model: generates.
        tokenizer: its own.
        before: the examples that it reads first, as text; the composition's m_A has them in its prefix.
        alone: in which it generates: a context that switches the composition off.
    """

    model: Any
    tokenizer: Any
    before: str = ""
    alone: Callable[[], AbstractContextManager[Any]] = nullcontext

    @torch.no_grad()
    def translate(self, source: str, heard: Callable[[str], None] = lambda text: None) -> str:
        """The first line that it writes; ``heard`` is called with what there is so far."""
        ids = torch.tensor([encode_prompt(self.before + asked(source), self.tokenizer)], device=self.model.device)
        streamer = _Hearing(self.tokenizer, heard)
        with self.alone():
            written = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                pad_token_id=self.tokenizer.eos_token_id,
                streamer=streamer,
                stopping_criteria=StoppingCriteriaList([FirstLine(self.tokenizer, ids.shape[1])]),
            )
        return first_line_of(self.tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True))


class _Hearing(TextEmitter):
    """Hands on what there is so far."""

    def __init__(self, tokenizer: Any, heard: Callable[[str], None]) -> None:
        super().__init__(tokenizer, self._take)
        self.heard, self.text = heard, ""

    def _take(self, text: str) -> None:
        self.text += text
        self.heard(first_line_of(self.text))


def sentences() -> list[Sentence]:
    """The ten that come with calmlm."""
    return [Sentence(**record.fields) for record in read_jsonl(TRANSLATION / "sentences.jsonl")]


def speakers(models: str | Path) -> dict[str, Speaker]:
    """m_B, m_A and their composition, by name.

    Args:
        models: the folder that ``scripts/models`` filled.

    Raises:
        ModelError: a model is not there.
    """
    missing = [str(Path(models) / file) for file in FILES.values() if not (Path(models) / file).is_file()]
    if missing:
        raise ModelError(
            f"Expected two models in {models}, but there is no {' and no '.join(missing)}: run scripts/models first, "
            f"or name its folder with --models."
        )
    folder = TRANSLATION / "composition"
    config = read_config(folder)
    entry = config.augmenting[AUGMENTING]
    ours, theirs = BaseModel(config.anchor["id"], FILES["anchor"]), BaseModel(entry["id"], FILES["augmenting"])
    pair = open_pair(ours, theirs, models, faster_dtype(device()))
    model = open_trained(folder, pair)
    before = pair.augmenting_tokenizer.decode(entry["prefix"])
    return {
        "m_B": Speaker(model, pair.tokenizer, before, model.disable_composition),
        "m_A": Speaker(pair.augmenting, pair.augmenting_tokenizer, before),
        "composition": Speaker(model, pair.tokenizer),
    }


def show(models: str | Path = "models", console: Console | None = None) -> list[dict[str, str]]:
    """Print the demonstration; return what each has written, by name, for each sentence.

    Args:
        models: the folder that ``scripts/models`` filled.
        console: where to print; the terminal when left out.

    Raises:
        ModelError: a model is not there.
    """
    console = console or Console()
    start = time.perf_counter()
    with console.status("Loading two models ..."):
        found = speakers(models)
    shown = {name: f"[{style}]{name}[/]" for name, style in STYLES.items()}
    console.print(
        f"{shown['m_B']}: SmolLM2-135M-Instruct writes English. {shown['m_A']}: Gemma 3 270M reads many languages. "
        f"{shown['composition']}: both, frozen, and what was trained between them. All three read the same five "
        f"examples first.\n"
    )
    answers: list[dict[str, str]] = []
    for sentence in sentences():
        heard = dict.fromkeys(found, "")
        with Live(_table(sentence, heard), console=console, refresh_per_second=8) as live:

            def update(name: str, text: str, live: Live = live, heard: dict[str, str] = heard) -> None:
                heard[name] = text
                live.update(_table(sentence, heard))  # noqa: B023

            for name, speaker in found.items():
                update(name, speaker.translate(sentence.source, lambda text, name=name: update(name, text)))  # type: ignore[misc]
        answers.append(heard)
        console.print()
    console.print(f"{time.perf_counter() - start:.0f} s", style="dim", highlight=False)
    return answers


def _table(sentence: Sentence, heard: dict[str, str]) -> Table:
    """One sentence and what there is of its translations."""
    table = Table(
        *heard,
        title=f"{sentence.language}: {escape(sentence.source)}\n[dim]{escape(sentence.english)}[/dim]",
        title_justify="left",
        title_style="",
        expand=True,
    )
    for column, name in zip(table.columns, heard, strict=True):
        column.style = column.header_style = STYLES[name]
        column.ratio = 1
    table.add_row(*(escape(text) for text in heard.values()))
    return table
