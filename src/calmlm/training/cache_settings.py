"""The `activation_cache` section of a training's configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from calmlm.errors import ConfigError
from calmlm.files.paths import Place

__all__ = ["UNITS", "CacheConfig", "bytes_of", "number_bytes"]

PAYS = 4
UNITS = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}


@dataclass(frozen=True)
class CacheConfig:
    """The `activation_cache` section of a training's configuration; a mode alone stands for it as well.

    Args:
        mode: "off"; "memory", for the epochs of one run; or "disk", for later runs on the same data as well.
        folder: on disk, where; beside the run's folder, as `<output>.activations`, by default.
        budget: how much may be kept, such as "8GiB"; what does not fit is read anew each time.
        dtype: in which states are kept: "bfloat16", or "int8" with a scale for each token; by default the model's own,
            which changes nothing.
        anchor: whether the anchor's stream below the first layer that the composition changes is kept as well; by
            default where that saves a quarter of its layers.
        on_missing: for texts that are not there: "generate" their states, "skip" the examples, "warn" and generate,
            or "raise".
        on_generate: "cache" new states, or "delete" them after use.
    """

    mode: Literal["off", "memory", "disk"] = "off"
    folder: Place | None = None
    budget: str | None = None
    dtype: Literal["bfloat16", "int8"] | None = None
    anchor: bool | None = None
    on_missing: Literal["generate", "skip", "warn", "raise"] = "generate"
    on_generate: Literal["cache", "delete"] = "cache"

    def keeps_anchor(self, untouched: int, layers: int) -> bool:
        """Whether the stream of an anchor of so many layers is kept, the lowest of which stay ``untouched``."""
        return bool(untouched) and (PAYS * untouched >= layers if self.anchor is None else self.anchor)

    def faults(self) -> list[str]:
        """One sentence for each thing that cannot be."""
        found = []
        if self.folder is not None and self.mode != "disk":
            found.append(f"activation_cache.folder: expected mode: disk beside it, but got {self.mode}.")
        if self.budget is not None:
            try:
                bytes_of(self.budget)
            except ConfigError as error:
                found.append(f"activation_cache.budget: {error}")
        return found


def number_bytes(dtype: str | None, own: int) -> int:
    """The bytes of a number that is kept in a dtype, or as the models have it, in ``own`` bytes."""
    return {"int8": 1, "bfloat16": 2, None: own}[dtype]


def bytes_of(size: str) -> int:
    """The bytes of a size such as "8GiB".

    Raises:
        ConfigError: for something else.
    """
    number = size.rstrip("BKMGTi ")
    unit = size[len(number) :].strip()
    try:
        found = float(number) * UNITS[unit or "B"]
        if not 0 < found < float("inf"):
            raise ValueError
    except (ValueError, KeyError):
        raise ConfigError(
            f"Expected a size such as 8GiB or 500MiB, but got {size!r}: write one of these units."
        ) from None
    return int(found)
