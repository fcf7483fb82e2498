"""The augmenting model's state that stands beside each of the anchor's positions: the last one that it sees."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from calmlm.state.call import Stream


class Beside(NamedTuple):
    """What stands beside the anchor's new positions.

    Attributes:
        states: (B, T, D_A).
        seen: (B, T) bool, which positions see anything at all; None for all of them.
        ends: (B, T) bool, at which of them one of the augmenting model's tokens ends; None for all of them.
    """

    states: Tensor
    seen: Tensor | None
    ends: Tensor | None


def states_beside(stream: Stream, layer: int, place: int, device: torch.device) -> Beside | None:
    """The states of one layer beside the anchor's new positions; None where nothing was read yet.

    Args:
        stream: of the augmenting model.
        layer: which of its layers.
        place: of the connection in the stream's cache, which keeps the states for later calls.
        device: where the anchor computes.
    """
    states = stream.hidden.get(layer)
    states = states if states is None else states.to(device)
    if stream.visible is None:  # one state for each position
        if stream.cache is not None and states is not None:
            little = states[:, None, :, :1]  # so that the cache counts these positions
            stream.cache.update(little, little, place)
        return None if states is None else Beside(states, _on(device, stream.seeing), None)
    if stream.cache is not None:
        if states is not None:
            states = stream.cache.update(states[:, None], states[:, None, :, :0], place)[0][:, 0]
        elif stream.cache.get_seq_length(place):
            states = stream.cache.layers[place].keys[:, 0].to(device)
    if states is None or states.shape[1] == 0:
        return None
    last = last_seen(stream.visible)
    ends = None if stream.owner is None else _ends(stream.owner, last)
    last = last.to(device)
    chosen = states.gather(1, last.clamp(min=0)[..., None].expand(-1, -1, states.shape[-1]))
    return Beside(chosen, last >= 0, _on(device, ends))


def last_seen(visible: Tensor) -> Tensor:
    """The last of the positions that each one sees, -1 for none: (B, 1, T, S) bool to (B, T) int64."""
    width = visible.shape[-1]
    if not width:
        return visible.new_full((visible.shape[0], visible.shape[2]), -1, dtype=torch.long)
    columns = torch.arange(1, width + 1, device=visible.device)
    return (visible[:, 0] * columns).amax(-1) - 1


def _ends(owner: tuple[Tensor, int], last: Tensor) -> Tensor:
    """Where the last position that is seen belongs to the very position that sees it, (B, T) bool."""
    owners, length = owner
    position = torch.arange(length - last.shape[1], length, device=last.device)
    return (last >= 0) & (owners.gather(1, last.clamp(min=0)) == position)


def _on(device: torch.device, value: Tensor | None) -> Tensor | None:
    return value if value is None else value.to(device)
