"""A composition on benchmarks whose augmenting models read another document's context: a control, and no result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from calmlm.controls import EndOfOther, beside, listening, partners
from calmlm.data.context import own_contexts
from calmlm.errors import ConfigError
from calmlm.evaluation.lm_eval_model import ComposedLM, Ending
from calmlm.evaluation.truncation import kept

__all__ = ["SwappedLM"]


class SwappedLM(ComposedLM):
    """The harness's model; the anchor reads each request, and the augmenting models another document's context.

    What is scored or generated stands behind both. Documents of one task are paired, those of one length where there
    are any.
    """

    def __init__(self, model: Any, tokenizer: Any, batch_size: int) -> None:
        super().__init__(model, tokenizer, batch_size)
        self.names = listening(model)
        if not self.names:
            raise ConfigError(
                "Another document's context must have an augmenting model that reads the text as it grows, but this "
                "composition has none that is switched on: evaluate without --swapped."
            )
        self._contexts: dict[str, str] = {}  # what is read in place of each context
        self._read: dict[tuple[int, ...], tuple[list[int], int]] = {}  # in place of what is scored, and tokens given
        self._batch: list[list[int]] = []  # what is read in place of the prompts that are encoded last

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
        """As in the harness, which tells only here which document a request belongs to."""
        self._pair(requests)
        return super().loglikelihood(requests, disable_tqdm)

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
        """As in the harness, which tells only here which document a request belongs to."""
        self._pair(requests)
        return super().generate_until(requests, disable_tqdm)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Refused: such a text has no context.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            "--swapped needs tasks in which something follows a context, but this one scores whole texts: choose "
            "others."
        )

    def _pair(self, requests: Any) -> None:
        """Find another document of the same task for each one, by the contexts of its requests."""
        documents: dict[str, dict[Any, list[str]]] = {}
        for request in requests:
            contexts = documents.setdefault(str(request.task_name), {}).setdefault(request.doc_id, [])
            if request.args[0] not in contexts:
                contexts.append(request.args[0])
        for found in documents.values():
            lengths = {key: sum(len(self.tok_encode(text)) for text in key) for key in map(tuple, found.values())}
            for own, others in partners(lengths).items():
                for place, context in enumerate(own):
                    self._contexts[context] = others[min(place, len(others) - 1)]

    # Probabilities

    def _note(self, requests: Any) -> None:
        """Keep, for ``_model_call``, what is read in place of each text."""
        self._read.clear()
        self._expect(requests)
        limits = own_contexts(self.model)
        encoded = {key[0]: before for key, before, _ in requests if key is not None}
        for key, before, scored in requests:
            if key is None:
                raise ConfigError(
                    "--swapped needs requests that fit into the contexts of all models, but one is scored in parts: "
                    "use fewer examples in the prompt."
                )
            other = kept(limits, encoded[self._contexts[key[0]]], len(scored))
            other = other[-max(1, self.max_length + 1 - len(scored)) :]
            whole = self._whole(before, scored)
            self._read.setdefault(whole, ([*other, *scored[:-1]][-self.max_length :], len(scored) - 1))

    def _model_call(self, inps: Tensor, *arguments: Any, **options: Any) -> Tensor:
        """The logits of rows that are padded on the right, from rows that stand beside what is read in their place."""
        rows: list[Sequence[int]] = []
        others, told = [], []
        for ids in inps.tolist():
            whole = self._text_of(ids, self._read)
            assert whole is not None
            other, scored = self._read[whole]
            rows.append(whole)
            others.append(other)
            told.append(scored)
        batch = beside(self.names, rows, others, 0, inps.device)
        width = batch["input_ids"].shape[1]
        given = torch.arange(width, device=inps.device) < width - torch.tensor(told, device=inps.device)[:, None]
        with torch.no_grad():
            logits = self.model(**batch, prompt_mask=given).logits
        found_logits = logits.new_zeros((*inps.shape, logits.shape[-1]))
        for row, ids in enumerate(rows):
            found_logits[row, : len(ids)] = logits[row, width - len(ids) :]
        return found_logits

    # Generation

    def tok_batch_encode(self, strings: Any, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
        """As in the harness; keeps besides what is read in place of these prompts."""
        ids, masks = super().tok_batch_encode([self._contexts[text] for text in strings], *arguments, **options)
        self._batch = [row[real.bool()].tolist() for row, real in zip(ids, masks, strict=True)]
        return super().tok_batch_encode(strings, *arguments, **options)

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
        limits, new = own_contexts(self.model), max_length - context.shape[1]
        masks = options.pop("attention_mask", torch.ones_like(context)).bool()
        rows = [kept(limits, row[real].tolist(), new) for row, real in zip(context, masks, strict=True)]
        others = [kept(limits, ids, new) for ids in self._batch]
        # What an ended row is filled up with would be read on with, and take positions.
        size = 1 if any(each.learned for each in limits) else len(rows)
        written = []
        for start in range(0, len(rows), size):
            chosen = slice(start, start + size)
            batch = beside(self.names, rows[chosen], others[chosen], self.tokenizer.pad_token_id, context.device)
            ids = batch.pop("input_ids")
            model: Any = self._model  # type: ignore[has-type]
            if size == 1:
                self._model = Ending(model, EndOfOther(limits, others[start], ids.shape[1]))
            try:
                found = HFLM._model_generate(self, ids, ids.shape[1] + new, stop, **batch, **options)
            finally:
                self._model = model
            written += list(torch.cat((context[chosen], found[:, ids.shape[1] :]), dim=1))
        return torch.nn.utils.rnn.pad_sequence(written, batch_first=True, padding_value=self.tokenizer.pad_token_id)
