"""calmlm: compose two frozen language models through trained cross-attentions.

    model = calmlm.compose("anchor-id-or-folder", "augmenting-id-or-folder", connections="every-4")

The names below are imported on first use, so that `import calmlm` costs nothing and needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from calmlm.errors import CalmError, CheckpointError, ConfigError, DataError, MissingExtraError, ModelError

if TYPE_CHECKING:
    from calmlm.causal_lm import CalmForCausalLM
    from calmlm.composing.making import compose
    from calmlm.config import CalmConfig
    from calmlm.decoding.drafting import DraftConfig
    from calmlm.modeling import CalmModel
    from calmlm.state.cache import CalmCache

__version__ = "0.1.0"

__all__ = [
    "CalmCache",
    "CalmConfig",
    "CalmError",
    "CalmForCausalLM",
    "CalmModel",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "DraftConfig",
    "MissingExtraError",
    "ModelError",
    "compose",
]

# No home may have the name of what lives in it: importing `calmlm.compose` would put the module where the function is.
_HOMES = {
    "CalmCache": "calmlm.state.cache",
    "CalmConfig": "calmlm.config",
    "CalmForCausalLM": "calmlm.causal_lm",
    "CalmModel": "calmlm.modeling",
    "DraftConfig": "calmlm.decoding.drafting",
    "compose": "calmlm.composing.making",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'calmlm' has no attribute '{name}'")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
