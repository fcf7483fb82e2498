"""Tool use as text: m_A answers the prompt, and its answer is pasted before the prompt that m_B gets."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from calmlm.baselines.given import Bases, Budget, Data
from calmlm.data.labels import encode_prompt

__all__ = ["TextTool", "fit"]

TOOL_TOKENS = 24


class TextTool:
    """m_A as a tool of m_B.

    Args:
        anchor, augmenting: m_B and m_A.
        tokenizer: of both; pads on the left.
        form: how the tool's answer and the prompt are put together.
    """

    def __init__(
        self, anchor: Any, augmenting: Any, tokenizer: PreTrainedTokenizerBase, form: str = "{answer}. {prompt}"
    ) -> None:
        self.anchor, self.augmenting, self.tokenizer, self.form = anchor, augmenting, tokenizer, form

    @cached_property
    def lead(self) -> int:
        """How many tokens the tokenizer puts before a text; all others of a prompt, special ones too, are its own."""
        return len(encode_prompt("a", self.tokenizer)) - len(self.tokenizer("a", add_special_tokens=False).input_ids)

    @property
    def device(self) -> torch.device:
        """Where prompts have to be."""
        return self.anchor.device

    @torch.no_grad()
    def generate(self, input_ids: Tensor, attention_mask: Tensor, **options: Any) -> Tensor:
        """Each row's ids and m_B's answer to the prompt with m_A's answer in it, as if it followed the bare prompt."""
        # How long the answer is to be is asked of m_B; the tool stops where it has answered.
        asked = {key: value for key, value in options.items() if key != "min_new_tokens"}
        told = self.augmenting.generate(
            input_ids=input_ids, attention_mask=attention_mask, **{**asked, "max_new_tokens": TOOL_TOKENS}
        )
        width = input_ids.shape[1]
        answers = self.tokenizer.batch_decode(told[:, width:], skip_special_tokens=True)
        rows = zip(input_ids, attention_mask.bool(), strict=True)
        prompts = [self.tokenizer.decode(row[real][self.lead :]) for row, real in rows]
        texts = [self.form.format(answer=a.strip(), prompt=p) for a, p in zip(answers, prompts, strict=True)]
        ids = [encode_prompt(text, self.tokenizer) for text in texts]
        batch = self.tokenizer.pad({"input_ids": ids}, padding=True, return_tensors="pt").to(self.device)
        written = self.anchor.generate(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **options)
        return torch.cat((input_ids, written[:, batch["input_ids"].shape[1] :]), dim=1)


def fit(bases: Bases, data: Data, budget: Budget) -> TextTool:
    """Nothing is trained."""
    return TextTool(bases.anchor, bases.augmenting, bases.tokenizer)
