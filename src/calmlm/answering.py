"""From a saved composition and a prompt to text, piece by piece."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TextStreamer, set_seed

import calmlm
from calmlm.data.context import context_length
from calmlm.data.labels import encode_prompt
from calmlm.data.messages import check_text
from calmlm.errors import ConfigError, DataError
from calmlm.tokens.chat import in_parts, takes_parts
from calmlm.tokens.lookup import load_tokenizer

COLDEST = 1e-4  # below such a temperature the likeliest token is the only one, and scores divided by it overflow


@dataclass(frozen=True)
class TextModel:
    """A composition with its tokenizer."""

    model: calmlm.CalmForCausalLM
    tokenizer: Any

    @classmethod
    def load(
        cls,
        source: str,
        *,
        tokenizer: str | None = None,
        device: str = "auto",
        dtype: str | None = None,
        trust_remote_code: bool = False,
    ) -> TextModel:
        """Load a composition and its tokenizer: the one named, else the composition's, else the anchor's.

        Args:
            source: folder or id of the composition.
            tokenizer: id or folder of a tokenizer.
            device: a torch device, or "auto" for a GPU where there is one.
            dtype: of the base models, instead of their own.
            trust_remote_code: whether code that comes with a model may run.

        Raises:
            CalmError: there is no such composition, model, tokenizer or device.
        """
        target = _device(device)
        model = calmlm.CalmForCausalLM.from_pretrained(source, dtype=dtype, trust_remote_code=trust_remote_code)
        places = [tokenizer] if tokenizer else [source, model.anchor.name_or_path]
        found = load_tokenizer(places, trust_remote_code=trust_remote_code, named=tokenizer is not None)
        return cls(model.to(target), found)

    def write(
        self,
        prompt: str,
        emit: Callable[[str], None],
        *,
        max_new_tokens: int,
        temperature: float = 0,
        seed: int | None = None,
        anchor_only: bool = False,
        drafting: bool = False,
        apply_chat_template: bool = False,
    ) -> None:
        """Continue `prompt`; `emit` takes each piece of text as soon as it is settled.

        Args:
            prompt: the text to go on from.
            emit: takes text.
            max_new_tokens: tokens to add at most; fewer where the context ends before.
            temperature: 0 takes the likeliest token each time.
            seed: makes sampling repeatable.
            anchor_only: switch the composition off.
            drafting: let the augmenting model draft.
            apply_chat_template: whether `prompt` is what a user says, to be put into the chat template.

        Raises:
            DataError: the prompt is empty or leaves no room in the context.
            ConfigError: no augmenting model of this composition can draft, the tokenizer has no chat template, or an
                augmenting model that reads the content of messages alone would see nothing.
        """
        check_text(prompt, "the prompt")
        ids = self._conversation(prompt) if apply_chat_template else encode_prompt(prompt, self.tokenizer)
        if not anchor_only:
            self._check_views(ids)
        if not ids:
            raise DataError("Expected a prompt of at least one token, but it has none; write some text.")
        context = context_length(self.model)
        if context is not None and len(ids) >= context:
            raise DataError(
                f"Expected a prompt shorter than the context of {context} tokens, but got {len(ids)}; shorten it."
            )
        room = max_new_tokens if context is None else min(max_new_tokens, context - len(ids))
        if seed is not None:
            set_seed(seed)
        sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature}
        # The anchor's own generation settings may sample, or ask for beams, which no stream can follow; None takes
        # them back without a warning.
        greedy: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        inputs = torch.tensor([ids], device=self.model.device)
        with self.model.disable_composition() if anchor_only else nullcontext():
            self.model.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=room,
                pad_token_id=self._padding(),
                streamer=_Streamer(self.tokenizer, emit),
                tokenizer=self.tokenizer,  # for strings that end a text
                num_beams=1,
                num_return_sequences=1,
                drafting=drafting,
                **(sampling if temperature > COLDEST else greedy),
            )

    def _conversation(self, prompt: str) -> list[int]:
        if getattr(self.tokenizer, "chat_template", None) is None:
            raise ConfigError(
                "Expected a tokenizer with a chat template, but this one has none: leave the template out."
            )
        messages: Any = [{"role": "user", "content": prompt}]
        if takes_parts(self.tokenizer):
            messages = in_parts(messages)
        rendered = self.tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, add_generation_prompt=True
        )
        return list(rendered["input_ids"])

    def _check_views(self, ids: list[int]) -> None:
        for name in self.model.model.active:
            if not self.model.model.shows(name, ids):
                raise ConfigError(
                    f"Expected a prompt in the chat template, since the augmenting model {name!r} reads the content "
                    f"of messages alone and would see nothing: pass --apply-chat-template."
                )

    def _padding(self) -> int | None:
        """One sequence needs no padding, but generate warns where it knows no token for it."""
        tokenizer = self.tokenizer
        return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


class _Streamer(TextStreamer):
    """transformers' streamer, with the text handed on instead of printed."""

    def __init__(self, tokenizer: Any, emit: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.emit = emit

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self.emit(text)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"Expected a device that torch can use, but got '{name}' ({reason}); use auto or cpu."
        ) from None
    return device
