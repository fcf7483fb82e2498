"""What tells the sentences and models of one cell from those of another, which no name of a file says."""

from __future__ import annotations

from typing import Any

from calmlm.bases.fingerprint import difference, fingerprint
from calmlm.errors import ConfigError
from calmlm.experiments.real.joined import Pair
from calmlm.experiments.real.world import World

__all__ = ["about_data", "about_models", "check_alike"]

KINDS = {"sentences": "sentences", "sizes": "sentences", "models": "models"}


def about_data(world: World) -> dict[str, Any]:
    """What a cell says of its sentences: which they are, and how long those are that are asked."""
    items = {"tested": world.tested, "english": world.english}
    sizes = {group: [item.size for item in chosen] for group, chosen in items.items()}
    return {"sentences": world.digest, "sizes": sizes}


def about_models(pair: Pair) -> dict[str, Any]:
    """What a cell says of the two models."""
    return {"models": {role: fingerprint(model) for role, model in vars(pair).items() if hasattr(model, "config")}}


def check_alike(cells: dict[str, dict[str, dict[str, Any]]], about: dict[str, Any] | None = None) -> None:
    """Raise where cells were made of other sentences or models than the others.

    Args:
        cells: by method and seed.
        about: what they have to say; otherwise that of the first of them. Cells of earlier versions say less.

    Raises:
        ConfigError: naming a cell.
    """
    expected = dict(about or {})
    for name, by_seed in cells.items():
        for seed, cell in by_seed.items():
            for key in (key for key in (about or KINDS) if key in cell):
                if _differ(key, expected.setdefault(key, cell[key]), cell[key]):
                    raise ConfigError(
                        f"Expected cells that are made of the same {KINDS[key]}, but that of {name}, seed {seed}, was "
                        f"made of others: name another folder with --output, or remove the cells that are not of these."
                    )


def _differ(key: str, one: Any, other: Any) -> bool:
    if key != "models":
        return bool(one != other)
    return one.keys() != other.keys() or any(difference(one[role], other[role]) is not None for role in one)
