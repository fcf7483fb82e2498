"""What calmlm adds to a trainer: it writes nothing before its first step is done, and uploads a composition whole.

Whether an optimizer, a compiler or a batch works shows in the first step. So the run's folder, its logs and a
repository on the hub are made when that step is done.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from calmlm.bases.reaching import UNREACHED
from calmlm.errors import ConfigError
from calmlm.files.card import CARD_NAME, Learned, model_card
from calmlm.files.storage import alignment_name, portable_config, write_text
from calmlm.training.named_reporters import project_named

if TYPE_CHECKING:
    from transformers import Trainer
else:
    Trainer = object


def reason_of(error: Exception) -> str:
    """An error in one line, with its kind where its text alone says little."""
    text = " ".join(str(error).split())[:300]
    spoken = isinstance(error, (ValueError, RuntimeError, OSError, ImportError)) and text
    return text if spoken else f"{type(error).__name__} {text}".strip()


class ComposedTrainer(Trainer):
    """Stands before ``Trainer``, or a subclass of it, in a class of both.

    Attributes:
        start: makes the run's folder; called once.
        learned: says what the card tells of the run.
        begun: whether the first step is done.
    """

    start: Callable[[], None] | None = None
    learned: Callable[[], Learned] | None = None
    begun = False

    def begin(self) -> None:
        """Make the places that the run writes to."""
        if not self.begun:
            if self.args.push_to_hub:
                self._make_repository()
            self.begun = True
            if self.start is not None:
                self.start()

    def _make_repository(self) -> None:
        try:
            super().init_hf_repo()
        except UNREACHED as error:
            raise ConfigError(
                f"trainer.push_to_hub: expected the hub to take the repository {self.args.hub_model_id!r}, but it did "
                f"not ({reason_of(error)}); check the name, the token and the network."
            ) from error

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        """Nothing before the first step is done, though Trainer asks for it when it is made."""
        if self.begun:
            super().init_hf_repo(*args, **kwargs)

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        """Save as Trainer does; a signal may ask for a checkpoint before the first step is done."""
        self.begin()
        super().save_model(*args, **kwargs)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the composition's card in place of the trainer's, where it is to be uploaded."""
        if self.args.push_to_hub and self.is_world_process_zero():
            folder = Path(self.args.output_dir)
            config = self.accelerator.unwrap_model(self.model).config
            learned = None if self.learned is None else self.learned()
            write_text(folder / CARD_NAME, model_card(portable_config(config, folder), learned))


class FirstStep(TrainerCallback):
    """Begins the run when its first step is done; TensorBoard and other reporters join then and hear what they missed.

    Args:
        trainer: the trainer that it is a callback of.
        reporters: callbacks that write.
    """

    def __init__(self, trainer: ComposedTrainer, reporters: Sequence[Any]) -> None:
        self.trainer, self.reporters = trainer, reporters
        self.missed: list[tuple[Any, dict[str, Any]]] = []
        self.over = False

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not self.over:
            self.missed.append((copy.copy(state), dict(logs or {})))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.over:
            if not (self.trainer.is_fsdp_enabled or self.trainer.is_deepspeed_enabled):  # each process has a part
                self._check_weights()
            self._join(args, control, **kwargs)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.over:  # everything had been trained before
            self._join(args, control, **kwargs)

    def on_push_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Trainer takes the files that it knows from a checkpoint; a composition has more."""
        folder = Path(args.output_dir)
        if not state.is_world_process_zero:
            return
        for path in (folder / f"checkpoint-{state.global_step}").glob("*"):
            if path.name == CARD_NAME or path.match(alignment_name("*")):
                shutil.copy(path, folder / path.name)

    def _check_weights(self) -> None:
        trained = [parameter for parameter in self.trainer.model.parameters() if parameter.requires_grad]
        if not all(bool(torch.isfinite(parameter).all()) for parameter in trained):
            raise ConfigError(
                "trainer: expected weights that stay finite, but the first step made some of them infinite or no "
                "number; look at learning_rate, adam_epsilon and the numbers' format."
            )

    def _join(self, args: Any, control: Any, **kwargs: Any) -> None:
        self.over = True
        self.trainer.begin()
        for reporter in self.reporters:
            self.trainer.add_callback(reporter)
            with project_named(args):
                reporter.on_train_begin(args, self.trainer.state, control, **kwargs)
            for state, logs in self.missed:
                reporter.on_log(args, state, control, logs=logs, **kwargs)
