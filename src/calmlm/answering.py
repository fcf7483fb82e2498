"""From a saved composition and a prompt to text, piece by piece."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteriaList, set_seed

import calmlm
from calmlm.data.context import EndOfContext, context_length, own_contexts, prompt_length
from calmlm.data.conversations import Conversations
from calmlm.data.labels import encode_prompt
from calmlm.data.messages import check_text
from calmlm.errors import ConfigError, DataError
from calmlm.tokens.emitter import TextEmitter
from calmlm.tokens.lookup import load_tokenizer
from calmlm.tokens.text_ends import ends_of

STRONGEST = 100  # guidance, beyond which scores overflow in float16
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
        merge_adapters: bool = False,
    ) -> TextModel:
        """Load a composition and its tokenizer: the one named, else the composition's, else the anchor's.

        Args:
            source: folder or id of the composition.
            tokenizer: id or folder of a tokenizer.
            device: a torch device, or "auto" for a GPU where there is one.
            dtype: of the base models, instead of their own.
            trust_remote_code: whether code that comes with a model may run.
            merge_adapters: whether adapters lie inside the anchor's weights; see ``CalmForCausalLM.merge_adapters``.

        Raises:
            CalmError: there is no such composition, model, tokenizer or device.
        """
        target = device_of(device)
        model = calmlm.CalmForCausalLM.from_pretrained(source, dtype=dtype, trust_remote_code=trust_remote_code)
        places = [tokenizer] if tokenizer else [source, model.anchor.name_or_path]
        found = load_tokenizer(places, trust_remote_code=trust_remote_code, named=tokenizer is not None)
        model.to(target)
        if merge_adapters:
            model.merge_adapters()
        return cls(model, found)

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
        guidance_scale: float | None = None,
        apply_chat_template: bool = False,
        tell: Callable[[str], None] | None = None,
    ) -> list[int]:
        """Continue `prompt`; `emit` takes each piece of text as soon as it is settled.

        What was written is emitted to its end, whatever ends it.

        Args:
            prompt: the text to go on from.
            emit: takes text.
            max_new_tokens: tokens to add at most; fewer where a context ends before.
            temperature: 0 takes the likeliest token each time.
            seed: makes sampling repeatable.
            anchor_only: switch the composition off.
            drafting: let the augmenting model draft.
            guidance_scale: of classifier-free guidance: above 1, the text is further from what would follow the last
                token of the prompt alone. Costs twice the time.
            apply_chat_template: whether `prompt` is what a user says, to be put into the chat template.
            tell: takes a line where a context ended the text; it goes to stderr by default.

        Returns:
            the tokens that were written.

        Raises:
            DataError: the prompt is empty or leaves no room in a context.
            ConfigError: no augmenting model of this composition can draft, the tokenizer has no chat template, or an
                augmenting model that reads the content of messages alone would see nothing.
        """
        if guidance_scale is not None and not 1 <= guidance_scale <= STRONGEST:
            raise ConfigError(
                f"guidance_scale must be from 1, which is none, to {STRONGEST}, but got {guidance_scale}: choose one."
            )
        ids = self.read(prompt, apply_chat_template=apply_chat_template)
        if not anchor_only:
            self._check_views(ids)
        if seed is not None:
            set_seed(seed)
        sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature}
        # The anchor's own generation settings may sample, or ask for beams, which no stream can follow; None takes
        # them back without a warning.
        greedy: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        inputs = torch.tensor([ids], device=self.model.device)
        streamer = TextEmitter(self.tokenizer, emit)
        with self.model.disable_composition() if anchor_only else nullcontext():
            room = self._room(ids, max_new_tokens)
            end = EndOfContext(own_contexts(self.model), len(ids))
            try:
                written = self.model.generate(
                    inputs,
                    attention_mask=torch.ones_like(inputs),
                    max_new_tokens=room,
                    pad_token_id=self._padding(),
                    eos_token_id=sorted(self._ends()) or None,
                    streamer=streamer,
                    stopping_criteria=StoppingCriteriaList([end]),
                    tokenizer=self.tokenizer,  # for strings that end a text
                    num_beams=1,
                    num_return_sequences=1,
                    drafting=drafting,
                    guidance_scale=guidance_scale,
                    **(sampling if temperature > COLDEST else greedy),
                )
            except BaseException:
                streamer.end()  # which holds a word back until the next one comes
                raise
        new = written[0, len(ids) :].tolist()
        if end.full is not None:
            context = f"the context of the augmenting model {end.full.name!r} ends, {end.full.length} of its own tokens"
        elif room < max_new_tokens and len(new) == room and new[-1] not in self._ends():
            context = f"the context ends, {len(ids) + room} tokens"
        else:
            return new
        (tell or _say)(f"The text stops where {context}.")
        return new

    def read(self, prompt: str, *, apply_chat_template: bool = False) -> list[int]:
        """The token ids of a prompt, as ``write`` takes it.

        Raises:
            DataError: the prompt is empty, the chat template refuses it, or the tokenizer is another model's.
            ConfigError: the tokenizer has no chat template.
        """
        check_text(prompt, "the prompt")
        ids = self._conversation(prompt) if apply_chat_template else encode_prompt(prompt, self.tokenizer)
        if not ids:
            raise DataError("Expected a prompt of at least one token, but it has none; write some text.")
        self.check_ids(ids)
        return ids

    def check_ids(self, ids: Sequence[int]) -> None:
        """Raise for tokens that the anchor does not have: the tokenizer is another model's.

        Raises:
            DataError: naming the token.
        """
        size, most = self.model.model.backbone().vocab_size, max(ids, default=0)
        if most >= size:
            raise DataError(
                f"Expected a tokenizer with ids below {size}, the anchor's vocabulary, but it gives {most}; name the "
                f"anchor's own."
            )

    def _room(self, ids: list[int], wanted: int) -> int:
        """How many tokens may follow a prompt.

        Raises:
            DataError: it leaves no room in a context.
        """
        length = context_length(self.model)
        if length is not None and len(ids) >= length:
            raise DataError(
                f"Expected a prompt shorter than the context of {length} tokens, but got {len(ids)}; shorten it."
            )
        prompt = prompt_length(self.model)
        if prompt is not None and len(ids) > prompt:
            raise DataError(
                f"Expected a prompt of at most {prompt} tokens, the context of an augmenting model that reads it, but "
                f"got {len(ids)}; shorten it."
            )
        for context in own_contexts(self.model):
            if context.readable(ids) < len(ids):
                raise DataError(
                    f"Expected a prompt that fits into the context of the augmenting model {context.name!r}, "
                    f"{context.length} of its own tokens, but it takes {context.count(ids)}; shorten it."
                )
        return wanted if length is None else min(wanted, length - len(ids))

    def _ends(self) -> frozenset[int]:
        """The tokens that end a text by themselves."""
        return ends_of(self.model, self.tokenizer)

    def _conversation(self, prompt: str) -> list[int]:
        if getattr(self.tokenizer, "chat_template", None) is None:
            raise ConfigError(
                "Expected a tokenizer with a chat template, but this one has none: leave the template out."
            )
        return Conversations(self.tokenizer).render(
            [{"role": "user", "content": prompt}], "the prompt", add_generation_prompt=True
        )

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


def generate_rows(model: Any, input_ids: Tensor, attention_mask: Tensor, **options: Any) -> Tensor:
    """``model.generate`` for prompts padded on the left, each ended where the positions of an augmenting model end.

    Such a model has tokens of its own, so that rows differ in what they take. Where there is one, they are written one
    by one: what fills up a row that has ended would be read on with.
    """
    contexts = [c for c in own_contexts(model) if c.learned] if isinstance(model, calmlm.CalmForCausalLM) else []
    if not contexts:
        return model.generate(input_ids=input_ids, attention_mask=attention_mask, **options)
    written = []
    for row, real in zip(input_ids, attention_mask.bool(), strict=True):
        ids = row[real][None]
        end = StoppingCriteriaList([EndOfContext(contexts, ids.shape[1])])
        found = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), stopping_criteria=end, **options)
        written.append(torch.cat((row, found[0, ids.shape[1] :])))
    return torch.nn.utils.rnn.pad_sequence(written, batch_first=True, padding_value=options["pad_token_id"])


def _say(line: str) -> None:
    """A line on stderr; on a terminal the text stands in the line before."""
    print(("\n" if sys.stdout.isatty() else "") + line, file=sys.stderr, flush=True)


def device_of(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # on the device meta there are no values
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"Expected a device that torch can use, but got '{name}' ({reason}); use auto or cpu."
        ) from None
    return device
