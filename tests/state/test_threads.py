"""Threads may share one composition: what a call shares with the layers it changes is its thread's own."""

from __future__ import annotations

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from compositions import logits_of, pad, tiny_composition
from decoding.test_cache_generation import COMPOSITIONS, GREEDY
from tiny import tiny_tokens


class Together:
    """On every layer of a model: lets a thread go on only when the other one has come as far."""

    def __init__(self, model: Any) -> None:
        self.barrier = threading.Barrier(2, timeout=30)
        layers = [*model.model.backbone().layers, *model.model.backbone("augmenting").layers]
        self.handles = [layer.register_forward_pre_hook(self, prepend=True) for layer in layers]

    def __call__(self, *_: Any) -> None:
        self.barrier.wait()

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


@pytest.mark.parametrize("name", ["llama+gpt2, all options", "gpt2+mistral"])
def test_calls_side_by_side_are_those_one_after_the_other(name: str) -> None:
    model = tiny_composition(**COMPOSITIONS[name])
    texts = [tiny_tokens(1, 9, seed=seed) for seed in (1, 2)]
    expected = [logits_of(model, text) for text in texts]
    together = Together(model)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda text: logits_of(model, text), texts))
    together.remove()
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_a_call_beside_the_first_padded_one() -> None:
    """How a model reads padding is tried out within the first call that has some."""
    model = tiny_composition("gpt2", "llama")
    ids, mask = pad([tiny_tokens(1, 9)[0], tiny_tokens(1, 4)[0]], "left")
    expected = logits_of(copy.deepcopy(model), ids, mask)
    plain = logits_of(model, ids)
    stop = threading.Event()

    def beside() -> bool:
        right = True
        while not stop.is_set():
            right = right and torch.equal(logits_of(model, ids), plain)
        return right

    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(beside)
        try:
            for _ in range(20):
                for backbone in model.model._backbones.values():
                    vars(backbone).pop("pads_left", None)
                assert torch.equal(logits_of(model, ids, mask), expected)
        finally:
            stop.set()
        assert other.result()


@pytest.mark.parametrize(
    "options", [{}, {"drafting": True}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 2}], ids=str
)
def test_generation_in_threads(options: dict[str, Any]) -> None:
    model = tiny_composition()
    texts = [tiny_tokens(1, length, seed=length) for length in (4, 7, 9, 12)]

    def generate(text: torch.Tensor) -> torch.Tensor:
        return model.generate(text, **{**GREEDY, "max_new_tokens": 12, **options})

    expected = [generate(text) for text in texts]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(generate, texts))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_copies_have_slots_of_their_own() -> None:
    model = tiny_composition()
    ids = tiny_tokens(1, 6)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert copied.model.slot is not model.model.slot
        assert torch.equal(logits_of(copied, ids), logits_of(model, ids))
