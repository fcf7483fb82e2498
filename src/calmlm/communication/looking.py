"""Looks into a composition while it answers one prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from calmlm.answering import TextModel
from calmlm.communication.probe import Probe
from calmlm.communication.token_texts import TokenTexts, texts_of_augmenting
from calmlm.communication.tokenwise import token_nats
from calmlm.communication.trace import Trace
from calmlm.communication.trace_page import show_trace
from calmlm.communication.trace_picture import draw_trace
from calmlm.controls import beside, listening
from calmlm.data.labels import encode_prompt
from calmlm.data.messages import check_text
from calmlm.errors import ConfigError, DataError
from calmlm.files.results import to_json, write_result

__all__ = ["check_looked_into", "look", "look_into", "look_to_files"]


def look(
    text: TextModel,
    prompt: str,
    *,
    answer: str | None = None,
    other: str | None = None,
    max_new_tokens: int = 64,
    apply_chat_template: bool = False,
) -> Trace:
    """Look into a composition while it answers a prompt, or while it reads an answer that is given.

    Args:
        text: the composition with its tokenizer.
        prompt: the text before the answer.
        answer: its text; None lets the composition write it, the likeliest token each time.
        other: a prompt that augmenting models read in place of the right one, to be compared with; None for none.
        max_new_tokens: of an answer that is written.
        apply_chat_template: whether both prompts are what a user says, to be put into the chat template.

    Raises:
        CalmError: the composition, which does not read text alone, or is switched off, or a prompt cannot be read.
    """
    check_looked_into(text.model)
    ids = text.read(prompt, apply_chat_template=apply_chat_template)
    others = None if other is None else text.read(other, apply_chat_template=apply_chat_template)
    if answer is None:
        new = text.write(
            prompt, lambda piece: None, max_new_tokens=max_new_tokens, apply_chat_template=apply_chat_template
        )
    else:
        check_text(answer, "the answer")
        new = _continued(text, ids, prompt, answer, apply_chat_template)
    if not new:
        raise DataError("Expected an answer of at least one token, but it has none; write some text.")
    return look_into(text.model, text.tokenizer, ids, new, others, prompt=prompt)


def look_to_files(
    source: str,
    prompt: str,
    json_file: Path | None = None,
    png_file: Path | None = None,
    *,
    answer: str | None = None,
    other: str | None = None,
    max_new_tokens: int = 64,
    apply_chat_template: bool = False,
    console: Console | None = None,
    **options: Any,
) -> None:
    """Look into a saved composition; write what is found to files, and print it.

    Args:
        source: folder or id of the composition.
        prompt: see ``look``, as for its other arguments.
        json_file, png_file: what to write; None for nothing.
        console: where to print; the terminal by default.
        options: of ``calmlm.answering.TextModel.load``.

    Raises:
        CalmError: there is no such composition, or one cannot look into it.
    """
    found = look(
        TextModel.load(source, **options),
        prompt,
        answer=answer,
        other=other,
        max_new_tokens=max_new_tokens,
        apply_chat_template=apply_chat_template,
    )
    try:  # the files come first: who reads what is printed may go away
        if json_file is not None:
            write_result(json_file, to_json(found.to_json(), indent=1) + "\n")
        if png_file is not None:
            draw_trace(found, png_file)
    finally:
        show_trace(found, console or Console())


def check_looked_into(model: Any) -> None:
    """Raise unless one can look into a composition.

    Raises:
        ConfigError: it is off, or has encoders with inputs of their own.
    """
    if not model.model.enabled:
        raise ConfigError(
            "A composition that is looked into must be on, but it is switched off or scaled to 0: leave "
            "disable_composition() and composition_scale(0)."
        )
    encoders = [name for name in model.model.active if model.config.augmenting[name]["reads"] == "inputs"]
    if encoders:
        raise ConfigError(
            f"A composition that is looked into must read text alone, but {encoders[0]!r} is an encoder with inputs of "
            f"its own: disable it first."
        )


@torch.no_grad()
def look_into(
    model: Any,
    tokenizer: Any,
    ids: Sequence[int],
    new: Sequence[int],
    other: Sequence[int] | None = None,
    *,
    prompt: str | None = None,
    texts: dict[str, TokenTexts] | None = None,
) -> Trace:
    """Look into a composition while it reads a prompt and its answer.

    Args:
        model: the composition.
        tokenizer: the anchor's.
        ids: the anchor's tokens of the prompt.
        new: those of the answer.
        other: those of a prompt that augmenting models read in place of the right one.
        prompt: its text; decoded from its tokens by default.
        texts: shows the augmenting models' tokens, by name; found by default.

    Raises:
        CalmError: the composition cannot read this, or cannot be looked into.
    """
    check_looked_into(model)
    if not ids or not new:
        raise DataError(
            f"A prompt and an answer must have at least one token each, but got {len(ids)} and {len(new)}: write some "
            f"text."
        )
    texts = texts_of_augmenting(model, tokenizer) if texts is None else texts
    inner = model.model
    # The last token is predicted and not read: there may be no room for it in a context, which ends the answer then.
    read, wanted = [*ids, *new[:-1]], list(new)
    training = model.training
    model.eval()
    try:
        probe = Probe(model, len(ids))
        with probe:
            spoken = _likely(model, read, wanted)
        with model.disable_composition():
            anchor = _likely(model, read, wanted)
        silenced, swapped = {}, {}
        for name in model.config.augmenting:
            if name in inner.active:
                with _silenced(inner, name):
                    without = _likely(model, read, wanted)
                silenced[name] = (spoken - without).tolist()
        for name in listening(model) if other else ():
            given = beside([name], [read], [[*(other or ()), *new[:-1]]], 0, model.device)
            swapped[name] = (spoken - _likely(model, read, wanted, given)).tolist()
    finally:
        model.train(training)
    return Trace(
        prompt=tokenizer.decode(list(ids)) if prompt is None else prompt,
        answer=tokenizer.decode(list(new), skip_special_tokens=True),
        tokens=TokenTexts(tokenizer)(new),
        scale=inner.scale,
        composition=spoken.tolist(),
        anchor=anchor.tolist(),
        heard=probe.heard(texts),
        attention=probe.attention(),
        gates=probe.gates(),
        contributions=probe.contributions(),
        silenced=silenced,
        swapped=swapped,
    )


def _likely(model: Any, read: Sequence[int], wanted: Sequence[int], given: dict[str, Any] | None = None) -> Tensor:
    """The log-probabilities (count,) float32 of the last tokens of a text; all before them were given.

    Args:
        model: the composition.
        read: ids of the text without its last token.
        wanted: those of the last tokens; all but the last one end ``read``.
        given: the call's inputs, which end as ``read`` does; these ids alone by default.
    """
    device = model.device
    inputs = {"input_ids": torch.tensor([read], device=device)} if given is None else given
    columns = torch.arange(inputs["input_ids"].shape[1], device=device)
    first = len(columns) - len(wanted)  # predicts the first of them
    logits = model(
        **inputs, prompt_mask=(columns <= first)[None], use_cache=False, logits_to_keep=columns[first:]
    ).logits
    return -token_nats(logits[0], torch.tensor(wanted, device=logits.device)).cpu()


@contextmanager
def _silenced(inner: Any, name: str) -> Iterator[None]:
    """Within this context an augmenting model of a composition is switched off."""
    inner.active.discard(name)
    try:
        yield
    finally:
        inner.active.add(name)


def _continued(text: TextModel, ids: list[int], prompt: str, answer: str, templated: bool) -> list[int]:
    """The tokens of an answer, as they stand behind its prompt where both are written as one text."""
    if not templated:
        whole = encode_prompt(prompt + answer, text.tokenizer)
        if whole[: len(ids)] == ids:
            return whole[len(ids) :]
    return list(text.tokenizer(answer, add_special_tokens=False, verbose=False)["input_ids"])
