"""What a run ends with: a composition and its tokenizer, written whole and taken up again."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from calmlm.bases.sharding import gathered
from calmlm.errors import CalmError, first_line
from calmlm.files.card import CARD_NAME, Learned, model_card
from calmlm.files.storage import WEIGHTS_NAME, portable_config, read_tensors, replacing_folder, write_text

__all__ = ["Report", "save_result", "take"]

Report = Callable[[str], None]


def take(model: Any, saved: Path) -> None:
    """Let a composition hold the tensors of a checkpoint, or of a result."""
    tensors = read_tensors(saved / WEIGHTS_NAME, model.composition_tensors().items(), str(saved))
    model.load_state_dict(tensors, strict=False)


def save_result(
    trainer: Any, model: Any, tokenizer: Any, target: Path, report: Report = print, learned: Learned | None = None
) -> None:
    """Write a trained composition and its tokenizer; every process has to call this, and the first one writes.

    Args:
        trainer: which may have spread the model over processes.
        model: the composition.
        tokenizer: its own.
        target: a folder, replaced as a whole.
        report: takes a line about what could not be saved.
        learned: what its card says of the training.
    """
    state = gathered(trainer.model_wrapped, model.is_composition)
    if trainer.is_world_process_zero():
        _save(model, tokenizer, target, report, state, learned)
    trainer.accelerator.wait_for_everyone()


def _save(
    model: Any, tokenizer: Any, target: Path, report: Report, state: dict[str, Any] | None, learned: Learned | None
) -> None:
    """Save the result of a run; where that cannot be, in a folder for temporary files.

    Raises:
        CalmError: it does not lie where it was to be; the message says where it does.
    """

    def save(place: Path) -> None:
        with replacing_folder(place) as fresh:
            write_text(fresh / CARD_NAME, model_card(portable_config(model.config, fresh), learned))
            model.save_pretrained(fresh, state_dict=state)
            with tempfile.TemporaryDirectory() as private:
                aside = Path(private) / "tokenizer"  # half of its files would be taken for all
                aside.mkdir()
                try:
                    tokenizer.save_pretrained(aside)
                    shutil.copytree(aside, fresh, dirs_exist_ok=True)
                except Exception as error:  # the weights took longer
                    report(
                        f"The tokenizer could not be saved beside the composition ({first_line(error)}): name one with "
                        f"--tokenizer."
                    )

    try:
        save(target)
    except (OSError, SafetensorError) as error:
        second = Path(tempfile.mkdtemp(prefix="calmlm-")) / target.name
        try:
            save(second)
        except (OSError, SafetensorError):
            raise error from None
        raise CalmError(
            f"Expected to save the composition in {target}, but that failed ({first_line(error)}), so it lies in "
            f"{second}: move it."
        ) from error
