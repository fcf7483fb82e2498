"""Tiny compositions, and the few questions that most tests ask of them."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

import calmlm
from tiny import tiny_model, tiny_tokenizer
from tokenizers_tiny import tokenizer, with_beginning


def awaken(model: calmlm.CalmForCausalLM, *, seed: int = 0, scale: float = 1.0) -> calmlm.CalmForCausalLM:
    """Give every tensor of the composition random values, so that what it adds is as large as the anchor's own states.

    An untrained composition adds exactly zero: a test that forgets to wake it up passes whatever the code does.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.model.connectors.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            if name.endswith("norm.weight"):
                parameter.copy_(1 + 0.3 * noise)
            elif parameter.dim() == 2 and name.endswith("weight"):
                parameter.copy_(scale * noise * parameter.shape[1] ** -0.5)
            elif name.endswith("gate"):
                parameter.fill_(0.8)
            else:
                parameter.copy_(0.5 * noise)
    return model


def tiny_composition(
    anchor: str = "llama",
    augmenting: str = "gpt2",
    connections: Any = 2,
    *,
    anchor_options: dict[str, Any] | None = None,
    augmenting_options: dict[str, Any] | None = None,
    attn_implementation: str = "eager",
    awake: bool = True,
    **options: Any,
) -> calmlm.CalmForCausalLM:
    """A composition of two tiny models with different weights, awake unless told otherwise."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = calmlm.compose(
            tiny_model(anchor, seed=1, attn_implementation=attn_implementation, **(anchor_options or {})),
            tiny_model(augmenting, seed=2, attn_implementation=attn_implementation, **(augmenting_options or {})),
            connections=connections,
            **options,
        )
    return awaken(model) if awake else model


def own(theirs: str, ours: str | None = None) -> dict[str, Any]:
    """Options of a composition whose augmenting model has this tokenizer, and its anchor the second or the tiny one."""
    other, anchor = with_beginning(tokenizer(theirs)), tiny_tokenizer() if ours is None else tokenizer(ours)
    return {
        "tokenizer": anchor,
        "augmenting_tokenizer": other,
        "anchor_options": {"vocab_size": len(anchor)},
        "augmenting_options": {"vocab_size": len(other)},
    }


@torch.no_grad()
def logits_of(model: Any, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
    """Logits (B, T, V) without any cache."""
    return model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **kwargs).logits


@torch.no_grad()
def logits_in_pieces(model: Any, input_ids: Tensor, pieces: tuple[int, ...]) -> Tensor:
    """The same, read in pieces of these lengths with a cache."""
    cache, parts = None, []
    for piece in input_ids.split(pieces, dim=1):
        output = model(input_ids=piece, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        parts.append(output.logits)
    return torch.cat(parts, dim=1)


def assert_close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    """Largest difference at most ``tolerance``, or that part of the largest value where values exceed one."""
    assert found.shape == expected.shape
    found, expected = found.detach(), expected.detach()
    limit = tolerance * max(1.0, float(expected.abs().max()))
    assert float((found - expected).abs().max()) <= limit


def pad(rows: list[Tensor], side: str, pad_id: int = 0) -> tuple[Tensor, Tensor]:
    """Ids and mask (B, longest) of ``rows``, each (length,), padded on one side."""
    longest = max(len(row) for row in rows)
    ids = torch.full((len(rows), longest), pad_id)
    mask = torch.zeros((len(rows), longest), dtype=torch.long)
    for index, row in enumerate(rows):
        where = slice(longest - len(row), None) if side == "left" else slice(0, len(row))
        ids[index, where], mask[index, where] = row, 1
    return ids, mask


@torch.no_grad()
def greedy_without_cache(
    model: Any,
    input_ids: Tensor,
    steps: int,
    attention_mask: Tensor | None = None,
    eos_token_id: int | None = None,
    given: Tensor | None = None,
) -> Tensor:
    """The reference for generation: ``steps`` new ids per row, everything computed anew at each step.

    Of ``input_ids`` all tokens were given, or those that ``given`` (B, T) bool names.
    """
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    given = torch.ones_like(input_ids, dtype=torch.bool) if given is None else given
    for _ in range(steps):
        # One row at a time and without its padding: no mask and no batch can go wrong here.
        following = [
            model(input_ids=row[keep.bool()][None], use_cache=False, **told(model, prompt[keep.bool()]))
            .logits[0, -1]
            .argmax()
            for row, keep, prompt in zip(input_ids, mask, given, strict=True)
        ]
        input_ids = torch.cat((input_ids, torch.stack(following)[:, None]), dim=1)
        mask = torch.cat((mask, torch.ones_like(mask[:, :1])), dim=1)
        given = torch.cat((given, torch.zeros_like(given[:, :1])), dim=1)
    return input_ids


def told(model: Any, given: Tensor) -> dict[str, Tensor]:
    """What says which of a row's tokens were ``given`` (T,) bool, where that matters."""
    inner = getattr(model, "model", None)
    if not getattr(inner, "enabled", False) or not inner.wants_prompts:
        return {}
    return {"prompt_mask": given[None]}


# "<what was expected> must ..., but <what arrived>: <what to do>."
SENTENCE = re.compile(r"['\"\w].*\b(must|may|needs|need|needed|be given)\b.*\bbut\b.+[:;] .+\.", re.DOTALL)


def assert_helpful(error: BaseException, *mentions: str) -> None:
    """The error is calmlm's own, one sentence that says what was expected, what arrived and what to do."""
    assert isinstance(error, calmlm.CalmError), type(error)
    message = str(error)
    assert "\n" not in message, message
    assert SENTENCE.fullmatch(message), message
    assert not re.search(r"(?<!\.)\. [A-Z]", message), f"more than one sentence: {message}"
    for mention in mentions:
        assert mention in message, f"{mention!r} is not in: {message}"


class Streamer:
    """Keeps the tokens that it is given, and -1 for the end."""

    def __init__(self) -> None:
        self.tokens: list[int] = []

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.tokens.append(-1)
