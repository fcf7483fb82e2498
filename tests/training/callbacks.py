"""Callbacks for trainers that are made elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import TrainerCallback


def join(callback: TrainerCallback, module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a callback join the trainers that ``module`` makes from now on."""
    make = module.make_trainer

    def made(*args: Any) -> Any:
        trainer = make(*args)
        trainer.add_callback(callback)
        return trainer

    monkeypatch.setattr(module, "make_trainer", made)


def interrupt_at(step: int, module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the runs of trainers that ``module`` makes stop as by Ctrl-C at the end of a step."""

    class Interrupt(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == step:
                raise KeyboardInterrupt

    join(Interrupt(), module, monkeypatch)
