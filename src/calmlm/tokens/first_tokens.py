"""What each token of an augmenting model stands for in the anchor's vocabulary: the first token of the same bytes."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from calmlm.connectors.pointer import NOTHING
from calmlm.tokens.alignment import shared_tokens
from calmlm.tokens.pieces import Writer
from calmlm.tokens.spelling import token_bytes

NEVER_SAID = ("bos_token", "cls_token", "mask_token", "unk_token", "pad_token")


def first_tokens(
    anchor: PreTrainedTokenizerBase, augmenting: PreTrainedTokenizerBase, anchor_size: int, augmenting_size: int
) -> Tensor:
    """The anchor's token for each of the augmenting model's, (V_A,) int32; ``NOTHING`` where it has none.

    Its end-of-text token stands for the anchor's.

    Args:
        anchor, augmenting: the tokenizers.
        anchor_size, augmenting_size: how many tokens the models have.
    """
    writer = Writer(anchor, "anchor")
    shared = shared_tokens(augmenting, anchor)
    silent = {getattr(augmenting, f"{role}_id", None) for role in NEVER_SAID}
    table = [NOTHING] * augmenting_size
    for index, piece in enumerate(token_bytes(augmenting, "augmenting model")[:augmenting_size]):
        if index in shared:
            ids = [] if index in silent else [shared[index]]
        else:
            ids = [] if piece is None else writer.write(piece) or []
        if ids and ids[0] != anchor.unk_token_id and ids[0] < anchor_size:
            table[index] = ids[0]
    ours, theirs = anchor.eos_token_id, augmenting.eos_token_id
    if ours is not None and theirs is not None and ours < anchor_size and theirs < augmenting_size:
        table[theirs] = ours
    return torch.tensor(table, dtype=torch.int32)
