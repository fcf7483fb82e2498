"""What a saved composition is made of, read from its own files without loading the two models."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from calmlm.config import CalmConfig, ConnectorConfig, opening_of
from calmlm.errors import CheckpointError
from calmlm.files import storage
from calmlm.files.fetching import fetch
from calmlm.files.loading import read_config

PREFIX = "model.connectors."  # of the names of a composition's tensors


def describe(source: str) -> list[tuple[str, str]]:
    """Titles and values, in the order of reading.

    Args:
        source: folder or id of a composition.

    Raises:
        CheckpointError: there is no composition, or it is damaged.
    """
    config = read_config(source)
    weights = fetch(source, storage.WEIGHTS_NAME, {})
    lines = [("composition", source), ("anchor", _base(config.anchor or {}, config.text_config))]
    for name, entry in (config.augmenting or {}).items():
        title = name if len(config.augmenting or {}) > 1 else "augmenting"
        pairs = ", ".join(f"{i} -> {j}" for i, j in entry["connections"])
        pairs = f"{pairs} (layer of {title} -> layer of anchor, counted from 0)" if pairs else "none"
        lines += [
            (title, _base(entry)),
            ("reads", _reads(entry)),
            ("connections", pairs),
            ("connector", _connector(entry["connector"]) if entry["connections"] else "none"),
        ]
        if entry.get("words"):
            lines.append(("words", _words(entry["words"])))
        if entry.get("adapters"):
            adapters = entry["adapters"]
            lines.append(("adapters", f"rank {adapters['rank']}, beside {len(adapters['targets'])} maps of the anchor"))
    alignments = [weights.parent / storage.alignment_name(name) for name in config.augmenting or {}]
    size = sum(path.stat().st_size for path in (weights, *alignments) if path.is_file())
    return [*lines, ("parameters", _parameters(weights, config)), ("size", f"{size / 1e6:,.1f} MB")]


def _connector(options: dict[str, Any]) -> str:
    """The kind, the heads of one that has any, and what is not as by default."""
    kind, heads = options.get("kind", ConnectorConfig.kind), options["num_heads"]
    usual = vars(ConnectorConfig(heads))
    parts = [kind] + ([] if kind == "graft" else [f"{heads} heads"])
    parts += [f"{key} {value}" for key, value in options.items() if key != "kind" and value != usual.get(key)]
    return ", ".join(parts)


def _words(words: dict[str, Any]) -> str:
    if words.get("kind") == "pointer":
        return "into the anchor's probabilities, as a pointer"
    how = "trained as well" if words.get("train_map") else "computed from both vocabularies"
    return f"into the anchor's last state, through a map {how}"


def _reads(entry: dict[str, Any]) -> str:
    words = {
        "tokens": "the anchor's tokens",
        "text": f"the text in tokens of its own ({entry.get('alignment', 'transcode')})",
        "prompt": "the prompt, once",
        "inputs": "inputs of its own",
    }
    view = f", {entry['view']} view of conversations" if entry.get("view") else ""
    before = opening_of(entry)
    behind = f", behind {len(before)} token{'s' if len(before) > 1 else ''} of its own" if before else ""
    return words[entry["reads"]] + view + behind


def _base(entry: dict[str, Any], config: Any = None) -> str:
    fingerprint = entry.get("fingerprint") or {}
    parts = [entry.get("id") or "(in memory, without an id)", fingerprint.get("architecture")]
    parts.append(f"revision {entry['revision']}" if entry.get("revision") else None)
    if config is not None:
        parts.append(f"{config.num_hidden_layers} layers, width {config.hidden_size}")
    return ", ".join(part for part in parts if part)


def _parameters(weights: Path, config: CalmConfig) -> str:
    """How many train, and how many more stay as they were computed."""
    kept = _kept(config)
    try:
        with safe_open(weights, framework="pt") as file:
            sizes = {name: math.prod(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(
            f"Expected a readable {weights.name} in {weights.parent}, but it is damaged or cut short ({error}); save "
            f"the composition again or fetch it anew."
        ) from error
    fixed = sum(size for name, size in sizes.items() if name.startswith(kept))
    return f"{sum(sizes.values()) - fixed:,}" + (f", and {fixed:,} of maps that are not trained" if fixed else "")


def _kept(config: CalmConfig) -> tuple[str, ...]:
    """The beginnings of the names of tensors that training leaves as they are."""
    found = []
    for name, entry in config.augmenting.items():
        places = range(len(entry["connections"])) if entry["connector"].get("kind") == "graft" else ()
        found += [f"{place}.{part}" for place in places for part in ("map.", "mean", "deviation")]
        words = entry.get("words") or {}
        if words and words.get("kind") != "pointer" and not words.get("train_map"):
            found.append(f"{len(entry['connections'])}.map.")
        found = [part if part.startswith(PREFIX) else f"{PREFIX}{name}.{part}" for part in found]
    return tuple(found)
