"""The table from one tokenizer to another at its edges: ids that it lacks, roles that one token shares, families."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import calmlm
from calmlm.alignment import LOOKBACK, Alignment, Spelling
from calmlm.transcoding import Transcoder
from compositions import assert_close, assert_helpful, awaken, logits_of
from tiny import tiny_model
from tokenizers_tiny import tokenizer


def written(ours: Any, theirs: Any, ids: list[int]) -> list[int]:
    batch = torch.tensor([ids], dtype=torch.long)
    transcoder = Transcoder(Alignment.between(ours, theirs))
    return transcoder(batch, torch.ones_like(batch, dtype=torch.bool), torch.full((1, LOOKBACK), -1)).ids[0].tolist()


def test_a_tokenizer_is_looked_at_once_and_not_for_every_token(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, look = [], Spelling.of
    monkeypatch.setattr(Spelling, "of", lambda *given: calls.append(given) or look(*given))
    Alignment.between(tokenizer("bytes"), tokenizer("unigram"))
    assert len(calls) < 5
