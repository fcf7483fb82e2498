"""A composition as lm-evaluation-harness sees it. All that is overridden of the harness's own class stands here."""

from __future__ import annotations

from typing import Any

from lm_eval.models.huggingface import HFLM
from transformers import GenerationConfig

from calmlm.data.context import context_length
from calmlm.errors import ConfigError

__all__ = ["ComposedLM"]


class ComposedLM(HFLM):  # type: ignore[misc]
    """The harness's model of transformers, with what a composition needs.

    Args:
        model: a composition.
        tokenizer: its own.
        batch_size: prompts at a time.
    """

    def __init__(self, model: Any, tokenizer: Any, batch_size: int) -> None:
        # A benchmark's settings for generation are its own; whatever the model was saved with would come on top.
        given = model.generation_config
        model.generation_config = GenerationConfig(
            bos_token_id=given.bos_token_id, eos_token_id=given.eos_token_id, pad_token_id=given.pad_token_id
        )
        super().__init__(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=batch_size,
            device=str(model.device),
            backend="causal",
            max_length=context_length(model),
        )
        # A token that stands before what is decoded: some decoders take a space from the beginning of a text.
        self._before = tokenizer.encode("a", add_special_tokens=False)[-1:]

    def tok_decode(self, tokens: Any, skip_special_tokens: bool = True) -> str:
        """Text of tokens that go on from others, with the space that they may begin with."""
        if isinstance(tokens, int):
            tokens = [tokens]
        head = self.tokenizer.decode(self._before, skip_special_tokens=skip_special_tokens)
        whole = self.tokenizer.decode([*self._before, *tokens], skip_special_tokens=skip_special_tokens)
        if head and whole.startswith(head):
            return whole[len(head) :]
        return self.tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """The harness puts a beginning of text before what it scores; the tokenizer's own would be a second one."""
        given = vars(self)["add_bos_token"]
        self.add_bos_token = False
        try:
            return super().loglikelihood_rolling(requests, disable_tqdm)
        finally:
            self.add_bos_token = given

    def _loglikelihood_tokens(self, requests: Any, *arguments: Any, **options: Any) -> Any:
        composed = self.model.model
        if composed.enabled and composed.reads_prompts:
            raise ConfigError(
                "Tasks that ask for probabilities need augmenting models that read generated tokens as well, but this "
                "composition was made with refresh=False: choose tasks that generate."
            )
        return super()._loglikelihood_tokens(requests, *arguments, **options)
