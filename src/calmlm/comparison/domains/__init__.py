"""The experiments that the comparison runs over."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from calmlm.comparison.contract import Domain
from calmlm.comparison.domains.code import Code
from calmlm.comparison.domains.kv_arithmetic import KeyValues
from calmlm.comparison.domains.languages import Languages
from calmlm.comparison.domains.own import OwnModels
from calmlm.comparison.domains.visual import Visual
from calmlm.experiments.code.presets import PRESETS as CODE_PRESETS
from calmlm.experiments.fitting import preset_of
from calmlm.experiments.kv_arithmetic.presets import PRESETS as KV_PRESETS
from calmlm.experiments.languages.presets import PRESETS as LANGUAGE_PRESETS
from calmlm.experiments.visual_arithmetic.presets import PRESETS as VISUAL_PRESETS

__all__ = ["DOMAINS", "kind_of"]

DOMAINS: dict[str, tuple[type[Domain], Mapping[str, Any]]] = {
    # The tiny preset of `calmlm repro` learns something, and takes too long for a look at all methods.
    KeyValues.name: (KeyValues, {**KV_PRESETS, "tiny": preset_of(KV_PRESETS, "tiny", max_steps=30, items=16)}),
    Languages.name: (Languages, LANGUAGE_PRESETS),
    Code.name: (Code, CODE_PRESETS),
    Visual.name: (Visual, {**VISUAL_PRESETS, "tiny": preset_of(VISUAL_PRESETS, "tiny", max_steps=30, items=16)}),
}
"""Each experiment and its presets."""


def kind_of(name: str) -> type[Domain]:
    """The experiment of this name; any other name is a user's, for two models of their own."""
    return DOMAINS[name][0] if name in DOMAINS else OwnModels
