"""Who answers on the page: the anchor, the augmenting models that write text, and the composition."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from calmlm.answering import TextModel
from calmlm.config import opening_of
from calmlm.data.context import stated_length
from calmlm.data.conversations import Conversations
from calmlm.data.labels import encode_prompt
from calmlm.errors import DataError
from calmlm.tokens.emitter import TextEmitter
from calmlm.tokens.lookup import find_tokenizer

__all__ = ["AugmentingVoice", "Voice", "augmenting_voices"]

Emit = Callable[[str], None]


@dataclass(frozen=True)
class Voice:
    """The anchor, or the composition.

    Attributes:
        text: the composition.
        anchor_only: whether it is the anchor.
    """

    text: TextModel
    anchor_only: bool = False

    def write(self, prompt: str, emit: Emit, *, max_new_tokens: int, templated: bool, scale: float = 1.0) -> list[int]:
        """Answer a prompt, the likeliest token each time.

        Args:
            prompt: the text before the answer.
            emit: takes pieces of text.
            max_new_tokens: tokens of the answer at most.
            templated: whether the prompt is what a user says.
            scale: of the composition; 0 is the anchor.

        Returns:
            the tokens of the answer.

        Raises:
            CalmError: the prompt cannot be answered.
        """
        with self.text.model.composition_scale(scale):
            return self.text.write(
                prompt,
                emit,
                max_new_tokens=max_new_tokens,
                anchor_only=self.anchor_only or scale == 0,
                apply_chat_template=templated,
                tell=lambda line: None,
            )


@dataclass(frozen=True)
class AugmentingVoice:
    """An augmenting model alone, behind the tokens that it reads before each text inside the composition.

    Attributes:
        name: of the model.
        model: itself.
        tokenizer: its own.
        opening: those tokens.
    """

    name: str
    model: Any
    tokenizer: Any
    opening: list[int]

    @torch.no_grad()
    def write(self, prompt: str, emit: Emit, *, max_new_tokens: int, templated: bool) -> list[int]:
        """Answer a prompt; see ``Voice.write``.

        A model without a chat template goes on from the text that a user says.
        """
        ids = self._read(prompt, templated)
        length = stated_length(self.model.config)
        room = max_new_tokens if length is None else min(max_new_tokens, length - len(ids))
        if not ids or room < 1:
            raise DataError(
                f"The prompt must have from 1 to {(length or 2) - 1} of the tokens of {self.name!r}, but it has "
                f"{len(ids)}: write another."
            )
        inputs = torch.tensor([ids], device=self.model.device)
        ends = self.tokenizer.eos_token_id
        written = self.model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=room,
            pad_token_id=ends if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id,
            streamer=TextEmitter(self.tokenizer, emit),
            num_beams=1,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
        )
        return list(written[0, len(ids) :].tolist())

    def _read(self, prompt: str, templated: bool) -> list[int]:
        if templated and getattr(self.tokenizer, "chat_template", None):
            said = [{"role": "user", "content": prompt}]
            return Conversations(self.tokenizer).render(said, "the prompt", add_generation_prompt=True)
        if not self.opening:
            return encode_prompt(prompt, self.tokenizer)
        return [*self.opening, *self.tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]]


def augmenting_voices(text: TextModel) -> list[AugmentingVoice]:
    """The augmenting models of a composition that write text and whose tokenizer is there."""
    found = []
    for name, entry in text.model.config.augmenting.items():
        base = text.model.augmenting[name]
        if entry["reads"] == "inputs" or not base.can_generate():
            continue
        shared = entry["reads"] in ("tokens", "prompt")
        own = text.tokenizer if shared else find_tokenizer(base.name_or_path) if base.name_or_path else None
        if own is not None:
            found.append(AugmentingVoice(name, base, own, opening_of(entry)))
    return found
