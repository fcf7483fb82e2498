"""How models are joined: what ``compose`` was asked for, with its defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from calmlm.data.messages import check_text
from calmlm.errors import ConfigError

RECIPE: dict[str, Any] = {
    "connections": "aligned-1",
    "connector": "graft",
    "words": "map",
    "init": "aligned",
    "opened": True,
    "adapters": 16,
}
"""How models are joined where ``plain_text`` is given and nothing else is said; chosen by ``calmlm repro real``."""

UNSAID: dict[str, Any] = {
    "norm": True,
    "refresh": True,
    "gate": False,
    "rotary": False,
    "null_key": False,
    "projection": "linear",
    "ingestor": "learned",
}
"""Options of ``compose`` that say nothing of how models are joined; of all others, None does."""


def is_recipe(plain_text: Any, options: Mapping[str, Any]) -> bool:
    """Whether nothing but plain text says how models are joined, so that it is ``RECIPE`` that joins them.

    Args:
        plain_text: as ``compose`` takes it.
        options: those of its arguments that say how, by name; ones that are left out say nothing.
    """
    return plain_text is not None and all(value == UNSAID.get(name) for name, value in options.items())


@dataclass(frozen=True)
class Manner:
    """How models are joined.

    Attributes:
        connections, connector, words, init, adapters, opened, train_map, refresh, alignment, augmenting_view,
            augmenting_prefix: as ``compose`` takes them; some may be by name.
        options: those of ``calmlm.config.ConnectorConfig``.
        recipe: whether it is ``RECIPE``.
    """

    connections: Any
    connector: str
    words: Any
    init: str | None
    adapters: Any
    opened: bool
    train_map: bool | None
    refresh: bool
    alignment: Any
    augmenting_view: Any
    augmenting_prefix: Any
    options: dict[str, Any]
    recipe: bool

    @classmethod
    def of(cls, plain_text: Any, options: dict[str, Any], **asked: Any) -> Manner:
        """What was asked for, with the defaults of what was not.

        Args:
            plain_text: as ``compose`` takes it.
            options: of connectors, as they were given.
            asked: the others, as they were given.
        """
        said = {name: asked[name] for name in ("connections", "connector", "words", "init", "adapters", "refresh")}
        recipe = is_recipe(plain_text, said | options)
        if recipe:
            asked |= {name: value for name, value in RECIPE.items() if asked[name] is None}
        defaults = {"connections": "every-4", "connector": "cross_attention"}
        asked |= {name: default for name, default in defaults.items() if asked[name] is None}
        return cls(**asked | {"opened": bool(asked["opened"])}, options=options, recipe=recipe)

    def check(self, names: list[str], plain_text: Any, tokenizers: Any) -> None:
        """Raise for what names no augmenting model, and for starts that there are not.

        Args:
            names: the augmenting models'.
            plain_text, tokenizers: as ``compose`` takes them.

        Raises:
            ConfigError: naming the argument.
        """
        by_name = {
            "connections": self.connections,
            "alignment": self.alignment,
            "augmenting_view": self.augmenting_view,
            "augmenting_prefix": self.augmenting_prefix,
            "augmenting_tokenizer": tokenizers,
            "words": self.words,
        }
        _check_by_name(by_name, names)
        _check_starts(plain_text, self.init)


def of_one(given: Any, name: str, default: Any = None) -> Any:
    """What was given for all augmenting models, or by name for this one."""
    return given.get(name, default) if isinstance(given, Mapping) else given


def _check_by_name(arguments: dict[str, Any], names: list[str]) -> None:
    """Raise for arguments by name that name no augmenting model.

    Raises:
        ConfigError: naming argument and names.
    """
    for argument, given in arguments.items():
        unknown = sorted(set(given) - set(names)) if isinstance(given, Mapping) else []
        if unknown:
            raise ConfigError(
                f"{argument} must name augmenting models ({', '.join(names)}), but got {', '.join(unknown)}: use "
                f"their names."
            )


def _check_starts(plain_text: Any, init: Any) -> None:
    """Raise for starts of connections that there are not.

    Raises:
        ConfigError: for texts that are no list of texts, or another ``init``.
        DataError: for a text that cannot be written down.
    """
    if plain_text is not None and (
        isinstance(plain_text, str) or not all(isinstance(text, str) for text in plain_text)
    ):
        raise ConfigError(
            f"plain_text must be a list of texts, but got {type(plain_text).__name__} or other things in it: put each "
            f"line into a list."
        )
    for number, text in enumerate(plain_text or (), start=1):
        check_text(text, f"plain_text, text {number}")
    if init not in (None, "aligned"):
        raise ConfigError(f"init must be 'aligned', or None for noise, but got {init!r}: use one of these.")
