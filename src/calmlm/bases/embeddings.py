"""A model's input embeddings, asked for vectors wherever their weights lie and in whatever form."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from calmlm.bases.placement import execution_device
from calmlm.errors import ModelError, first_line


def embed_with(model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    """From token ids (...) to their vectors (..., D), by the input embeddings that the model has at the call."""

    def embed(ids: Tensor) -> Tensor:
        embeddings = model.get_input_embeddings()
        found: Tensor = embeddings(ids.to(execution_device(embeddings)))
        return found

    return embed


@torch.no_grad()
def embedding_size(model: PreTrainedModel) -> int:
    """The width D of the vectors that ``embed_with`` gives.

    Raises:
        ModelError: when the embeddings give something else.
    """
    try:
        found = embed_with(model)(torch.zeros((1, 2), dtype=torch.long))
        wrong = None if found.shape[:-1] == (1, 2) and found.is_floating_point() and not found.is_meta else "no vectors"
    except Exception as error:  # whatever the code of a model raises
        wrong = first_line(error)
    if wrong is not None:
        raise ModelError(
            f"ingestor='anchor' needs an anchor whose input embeddings can be read, but those of "
            f"{type(model).__name__} cannot ({wrong}): use ingestor='learned'."
        )
    return found.shape[-1]
