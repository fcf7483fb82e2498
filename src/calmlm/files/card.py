"""The model card of a composition: what it is made of, what it learned from, and how well it does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResultEntry

from calmlm.config import CalmConfig, split_gguf

CARD_NAME = "README.md"
START, END = "<!-- evaluations:start -->", "<!-- evaluations:end -->"
ALONE = "This folder holds the trained connections only (CALM, arXiv 2401.02412). Loading fetches the base models."
WHOLE = (
    "This folder holds the trained connections (CALM, arXiv 2401.02412) and the base models. Loading fetches nothing."
)


@dataclass(frozen=True)
class Learned:
    """What a composition was trained on, and what came out.

    Attributes:
        datasets: ids of the hub.
        lines: about the data, in words.
        figures: by name, as they are to be shown.
    """

    datasets: Sequence[str] = ()
    lines: Sequence[str] = ()
    figures: Mapping[str, str] = field(default_factory=dict)


def model_card(config: CalmConfig, learned: Learned | None = None, results: Sequence[EvalResultEntry] = ()) -> str:
    """The model card of a composition, as Markdown with the hub's metadata on top.

    Args:
        config: as it is saved, with the bases named as others find them.
        learned: what it was trained on, where that is known.
        results: of benchmarks.
    """
    learned = learned or Learned()
    sources = [config.anchor, *config.augmenting.values()]
    named = [entry["id"] for entry in sources if entry.get("id") and not entry["id"].startswith((".", "/"))]
    head = _items("base_model", [split_gguf(name)[0] for name in named])
    head += _items("datasets", learned.datasets)
    rows = [f"| anchor | {_place(config.anchor)} | {config.anchor.get('revision') or ''} | |"]
    for name, entry in config.augmenting.items():
        rows.append(f"| {name} | {_place(entry)} | {entry.get('revision') or ''} | {_connections(entry)} |")
    parts = [
        f"---\nlibrary_name: calmlm\npipeline_tag: text-generation\ntags:\n- calm\n- composition\n{head}---",
        "# A composition of frozen language models",
        ALONE,
        "| role | model | revision | connections (augmenting layer → anchor layer, 0-based) |\n|---|---|---|---|\n"
        + "\n".join(rows),
        "```python\nimport calmlm\n\nmodel = calmlm.CalmForCausalLM.from_pretrained(folder)\n```",
    ]
    if learned.lines or learned.datasets:
        lines = learned.lines or [f"`{name}`" for name in learned.datasets]
        parts.append("## Data\n\n" + "\n".join(f"- {line}" for line in lines))
    if learned.figures:
        shown = "\n".join(f"| {name} | {value} |" for name, value in learned.figures.items())
        parts.append(f"## Training\n\n| | |\n|---|---|\n{shown}")
    return with_results("\n\n".join(parts) + "\n", results)


def with_results(card: str, results: Sequence[EvalResultEntry]) -> str:
    """A card with a table of results of benchmarks, in the place of the one that is there; the rest stays.

    Args:
        card: Markdown.
        results: none leave the card as it is.
    """
    if not results:
        return card
    rows = [
        f"| {entry.dataset_id} | {entry.task_id} | {_shown(entry.value)} | {entry.notes or ''} |" for entry in results
    ]
    table = "\n".join([START, "", "| data set | task | value | |", "|---|---|---|---|", *rows, "", END])
    before, mark, rest = card.partition(START)
    if mark and END in rest:
        return before + table + rest.partition(END)[2]
    return f"{card.rstrip()}\n\n## Evaluations\n\n{table}\n"


def with_bases(card: str) -> str:
    """A card of a composition, as that of a folder that holds the base models as well."""
    return card.replace(ALONE, WHOLE)


def _items(key: str, values: Sequence[str]) -> str:
    """A key of the metadata and its values, each once; nothing where there are none."""
    items = "".join(f"- {value}\n" for value in dict.fromkeys(values))
    return f"{key}:\n{items}" if items else ""


def _place(entry: dict[str, Any]) -> str:
    """An id, or the name of a folder or file: where it lies is of this machine."""
    source = entry.get("id") or ""
    return Path(source).name if source.startswith((".", "/")) else source or "given in memory"


def _connections(entry: dict[str, Any]) -> str:
    words = entry.get("words")
    parts = [f"{i} → {j}" for i, j in entry["connections"]]
    parts += [f"words ({words.get('kind', 'map')})"] if words else []
    parts += [f"adapters (rank {entry['adapters']['rank']})"] if entry.get("adapters") else []
    return ", ".join(parts)


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
