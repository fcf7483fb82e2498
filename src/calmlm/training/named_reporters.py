"""What hears of a run's figures, by name: TensorBoard, Trackio, Weights & Biases and what else transformers knows."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from transformers.integrations import integration_utils

from calmlm.data.extras import require
from calmlm.errors import ConfigError, first_line, warn

__all__ = ["PROJECT", "Guarded", "check_reporters", "project_named"]

PROJECT = "calmlm"
PACKAGES = {"comet_ml": "comet_ml", "azure_ml": "azureml", "flyte": "flytekitplugins-deck-standard"}
"""What is to be installed where it has another name."""


def check_reporters(names: Sequence[str]) -> None:
    """Raise where one of these is unknown or not installed.

    Raises:
        ConfigError: naming it.
        MissingExtraError: for TensorBoard, which comes with an extra.
    """
    known, there = set(integration_utils.INTEGRATION_TO_CALLBACK), None
    for name in names:
        if name in ("none", "all"):
            continue
        if name == "tensorboard":
            require("tensorboard", "train", "Logging (trainer.report_to: tensorboard)")
            continue
        if name not in known:
            raise ConfigError(
                f"trainer.report_to: expected names among {', '.join(sorted(known))}, but got {name!r}; choose one, or "
                f"none."
            )
        there = there or integration_utils.get_available_reporting_integrations()
        if name not in there and name != "flyte":
            raise ConfigError(
                f"trainer.report_to: expected the package of {name!r}, but it is not installed; install it with: pip "
                f"install {PACKAGES.get(name, name)}, or leave {name!r} out."
            )


class Guarded:
    """A reporter that ends where its files cannot be written, and not the training with it.

    Args:
        reporter: a callback of transformers' own.
    """

    def __init__(self, reporter: Any) -> None:
        self.reporter, self.ended = reporter, False

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.reporter, name)
        return partial(self._call, found) if name.startswith("on_") else found

    def _call(self, event: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.ended:
            return None
        try:
            return event(*args, **kwargs)
        except OSError as error:
            self.ended = True
            warn(f"{type(self.reporter).__name__} ends here, because it cannot write ({first_line(error)}).")


@contextmanager
def project_named(arguments: Any) -> Iterator[None]:
    """Within this context, Weights & Biases takes the arguments' project as well; it knows an environment variable."""
    before = os.environ.get("WANDB_PROJECT")
    os.environ.setdefault("WANDB_PROJECT", arguments.project)
    try:
        yield
    finally:
        if before is None:
            del os.environ["WANDB_PROJECT"]
