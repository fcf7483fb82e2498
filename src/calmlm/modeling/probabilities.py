"""Mixing probabilities: what pointers make of the anchor's logits, where they are needed and a few at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers.modeling_utils import slice_logits_to_keep

from calmlm.connectors.gate import shares
from calmlm.connectors.pointer import point
from calmlm.state.call import Pointed

AT_ONCE = 2**24  # probabilities of an augmenting model that are held at a time

Head = Callable[[Tensor], Tensor]
"""From an augmenting model's last states to its own logits."""


def needed_for(labels: Tensor, shifted: Tensor | None, ignored: int) -> Tensor:
    """The positions whose prediction has a loss, (B, T) bool.

    Args:
        labels: (B, T) int64.
        shifted: the same, already moved to the positions that predict them; None where they are not.
        ignored: the label of what has no loss.
    """
    if shifted is not None:
        return shifted != ignored
    return torch.nn.functional.pad(labels[:, 1:] != ignored, (0, 1))


def pointed_logits(
    logits: Tensor,
    pointed: Pointed,
    heads: dict[str, Head],
    logits_to_keep: int | Tensor,
    needed: Tensor | None,
) -> Tensor:
    """The logits of the mixture, in the dtype of the anchor's.

    Args:
        logits: the anchor's, (B, K, V_B), or (K, V_B) where positions are chosen by a mask.
        pointed: what the pointers have found at all positions (B, T).
        heads: of the augmenting models, by name.
        logits_to_keep: which K of the T positions have logits, as the anchor takes it.
        needed: (B, T) bool, the positions that are changed; None for all.
    """
    size = logits.shape[-1]

    def rows(found: Tensor) -> Tensor:
        kept = slice_logits_to_keep(found, logits_to_keep).to(logits.device)
        return kept.reshape(-1, kept.shape[-1])

    anchor, flat = rows(pointed.anchor), logits.reshape(-1, size)
    parts = [
        (pointer, heads[name], rows(beside.states), None if beside.seen is None else rows(beside.seen[..., None])[:, 0])
        for name, (pointer, beside) in pointed.parts.items()
    ]

    def mixed(chosen: Tensor | slice) -> Tensor:
        said = [pointer.said(head(states[chosen]).to(logits.device), size) for pointer, head, states, _ in parts]

        def mix(own: Tensor, state: Tensor) -> Tensor:
            each = [(p, states[chosen], None if seen is None else seen[chosen]) for p, _, states, seen in parts]
            found = shares(list(each), state)
            return point(own, found if pointed.scale == 1 else pointed.scale * found, said).to(logits.dtype)

        if not torch.is_grad_enabled():
            return mix(flat[chosen], anchor[chosen])
        # Some tensors as large as the logits that take next to no time to make again.
        found: Tensor = checkpoint(mix, flat[chosen], anchor[chosen], use_reentrant=False, preserve_rng_state=False)  # type: ignore[no-untyped-call]
        return found

    most = max(1, AT_ONCE // max(len(pointer.table) if pointer.table is not None else size for pointer, *_ in parts))
    length = pointed.anchor.shape[1]
    where = [part.expand(-1, length, -1) for part in (pointed.spoken, None if needed is None else needed[..., None])
             if part is not None]  # fmt: skip
    if not where:
        return torch.cat([mixed(slice(i, i + most)) for i in range(0, len(flat), most)]).view(logits.shape)
    chosen = rows(torch.stack([part.to(logits.device) for part in where]).all(0))[:, 0].nonzero()[:, 0]
    # One part even where nothing is chosen: in training there has to be a gradient.
    new = torch.cat([mixed(chosen[i : i + most]) for i in range(0, max(1, len(chosen)), most)])
    return flat.index_copy(0, chosen, new).view(logits.shape)
