"""A handful of questions side by side, then the accuracy on all of them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

import calmlm
from calmlm.demo import bundle
from calmlm.experiments.fitting import answer
from calmlm.experiments.kv_arithmetic.world import final_answer

SHOWN = 6
MAX_NEW_TOKENS = 16

ROLES = {
    "augmenting model": "knows what number each key stands for, has never seen a sum",
    "anchor": "calculates, has never seen a key",
    "composition": "both, frozen, with trained cross-attentions between them",
}


def show(folder: Path = bundle.HOME, console: Console | None = None) -> dict[str, float]:
    """Print the demonstration and return the accuracies in per cent, by role.

    Args:
        folder: where the models lie.
        console: where to print; the terminal when left out.

    Raises:
        ModelError: the models are not there.
    """
    bundle.check(folder)
    console = console or Console()
    start = time.perf_counter()
    asked = bundle.questions(folder)
    prompts, truths = [prompt for prompt, _ in asked], [truth for _, truth in asked]
    tokenizer = AutoTokenizer.from_pretrained(folder / "anchor")
    models = _models(folder)
    for role, model in models.items():
        console.print(f"[bold]{role}[/bold]: {ROLES[role]} ({_size(model)})")
    answers = {role: _answers(model, tokenizer, prompts) for role, model in models.items()}

    table = Table("expression over held-out keys", "answer", *ROLES, title=None)
    for row in range(min(SHOWN, len(asked))):
        marks = [_marked(answers[role][row], truths[row]) for role in ROLES]
        table.add_row(escape(prompts[row]), escape(truths[row]), *marks)
    console.print(table)

    accuracy = {role: 100.0 * _right(answers[role], truths) / len(asked) for role in ROLES}
    shares = ", ".join(f"{role} {share:.0f} %" for role, share in accuracy.items())
    console.print(f"Right on {len(asked)} held-out expressions: {shares}.")
    console.print(f"{time.perf_counter() - start:.0f} s", style="dim", highlight=False)
    return accuracy


def _models(folder: Path) -> dict[str, Any]:
    """The two models and their composition."""
    augmenting = AutoModelForCausalLM.from_pretrained(folder / "augmenting").eval()
    anchor = AutoModelForCausalLM.from_pretrained(folder / "anchor").eval()
    composition = calmlm.CalmForCausalLM.from_pretrained(folder / "composition")
    return {"augmenting model": augmenting, "anchor": anchor, "composition": composition}


def _size(model: Any) -> str:
    if isinstance(model, calmlm.CalmForCausalLM):
        return f"{model.get_nb_trainable_parameters()[0] / 1e6:.2f}M added"
    return f"{model.num_parameters() / 1e6:.2f}M parameters"


@torch.no_grad()
def _answers(model: Any, tokenizer: Any, prompts: list[str]) -> list[str]:
    return [final_answer(text) for text in answer(model, tokenizer, prompts, MAX_NEW_TOKENS)]


def _marked(given: str, truth: str) -> str:
    short = given if len(given) <= 18 else given[:15] + "..."
    mark = "[green]✓[/green]" if given == truth else "[red]✗[/red]"
    return f"{mark} {escape(short)}"


def _right(given: list[str], truths: list[str]) -> int:
    return sum(a == b for a, b in zip(given, truths, strict=True))
