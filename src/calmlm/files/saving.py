"""Saving a composition: its own tensors, its configuration, how it generates and reads, and a model card."""

from __future__ import annotations

import json
from pathlib import Path

from torch import Size, Tensor
from transformers import GenerationConfig

from calmlm.bases.sharding import is_sharded
from calmlm.config import CalmConfig
from calmlm.errors import ConfigError
from calmlm.files import storage
from calmlm.files.card import CARD_NAME, model_card
from calmlm.tokens.alignment import Alignment
from calmlm.tokens.retokenization import Rewriting


def save_composition(
    folder: Path,
    config: CalmConfig,
    tensors: dict[str, Tensor],
    generation: GenerationConfig,
    alignments: dict[str, Alignment | Rewriting],
) -> None:
    """Write all files of a composition, or none of them; a model card that is there already stays.

    Args:
        folder: where to; made if needed.
        config: the composition's, as it is in memory.
        tensors: its own, whole.
        generation: how it generates.
        alignments: of the augmenting models with tokens of their own, by name.
    """
    config = storage.portable_config(config, folder)
    files = {
        storage.WEIGHTS_NAME: storage.tensor_writer(tensors),
        "config.json": storage.text_writer(config.to_json_string()),
        storage.GENERATION_NAME: storage.text_writer(generation.to_json_string()),
    } | {
        storage.alignment_name(name): storage.text_writer(json.dumps(alignment.to_json()))
        for name, alignment in alignments.items()
    }
    if not (folder / CARD_NAME).exists():
        files[CARD_NAME] = storage.text_writer(model_card(config))
    storage.write_together(folder, files)


def own_tensors(state_dict: dict[str, Tensor], shapes: dict[str, Size]) -> dict[str, Tensor]:
    """The tensors of a composition in a state dict, which a wrapper may have named and may hold others.

    Args:
        state_dict: of the composition, or of DDP or torch.compile around it.
        shapes: of the composition's own tensors, by name.

    Raises:
        ConfigError: when some are missing or are not whole.
    """
    given = {name.replace("_orig_mod.", "").removeprefix("module."): t for name, t in state_dict.items()}
    missing = sorted(shapes.keys() - given.keys())
    if missing:
        raise ConfigError(
            f"state_dict must hold the composition's tensors as state_dict() names them, but {len(missing)} of "
            f"{len(shapes)} are missing, for example {missing[0]!r}: pass the composition's own."
        )
    found = {name: given[name] for name in shapes}
    check_whole(found, shapes)
    return found


def check_own(tensors: dict[str, Tensor], shapes: dict[str, Size]) -> None:
    """Raise for other tensors than those that a composition was made with, which nothing could load again.

    Raises:
        ConfigError: for such tensors.
    """
    others = sorted(tensors.keys() ^ shapes.keys())
    if others:
        raise ConfigError(
            f"The composition's tensors must be those that it was made with to be saved, but {len(others)} are missing "
            f"or others, for example {others[0]!r}, as PEFT leaves them: merge what it has added "
            f"(merge_and_unload()), or save PEFT's model."
        )


def check_whole(tensors: dict[str, Tensor], shapes: dict[str, Size]) -> None:
    """Raise for tensors of which this process holds a part only.

    Raises:
        ConfigError: for such tensors, or others of other shapes.
    """
    for name, tensor in tensors.items():
        # A process of FSDP1 holds a flat part, which has another shape.
        if is_sharded(tensor) or tensor.shape != shapes.get(name, tensor.shape):
            raise ConfigError(
                f"The composition's tensors must be whole to be saved, but {name!r} is spread over processes or of "
                f"another shape: gather them in all processes and pass them as state_dict "
                f"(accelerator.get_state_dict), or save with Trainer.save_model."
            )
