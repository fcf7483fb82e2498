"""A user's own two models in the comparison, on their own data."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

import calmlm
from calmlm.answering import generate_rows
from calmlm.baselines import Data
from calmlm.baselines.given import losses_of
from calmlm.bases.forms import Form
from calmlm.bases.opening import load_base
from calmlm.comparison.contract import Answerer, Task, TextDomain
from calmlm.comparison.own_checks import reasons
from calmlm.comparison.own_settings import Own, Sources, listed
from calmlm.comparison.swapping import Swapped
from calmlm.composing.manner import RECIPE
from calmlm.data.context import OwnContext, stated_length
from calmlm.data.extras import require
from calmlm.data.formats import Example
from calmlm.data.labels import encode_examples, encode_prompt
from calmlm.data.sources import load_examples, read_lines
from calmlm.errors import ConfigError, DataError
from calmlm.experiments.fitting import IGNORED, Row, Stage
from calmlm.experiments.record import device
from calmlm.tokens.alignment import Alignment
from calmlm.tokens.beginning import beginning_of
from calmlm.tokens.live_text import writer_of
from calmlm.tokens.retokenization import Rewriting
from calmlm.tokens.spelling import token_bytes
from calmlm.tokens.text_ends import end_of

__all__ = ["OwnModels"]

_TIMED = 8  # prompts
_BEGINNING = 200  # characters of a text that stand for a prompt where there is none


class OwnModels(TextDomain):
    """Two models that somebody has, and their data; all that follows is as in the other experiments.

    Where the tokenizers differ, m_A alone answers in its own.
    """

    name = "own"
    folder = "own"
    same_items = True
    bare_answers = False  # one that begins with what `stop` says is empty, whoever writes it

    def __init__(self, preset: Own, seed: int, cache: Path, report: Callable[[str], None]) -> None:
        super().__init__(preset, seed, cache, report)
        self.settings = preset
        self.full_rate = preset.full_learning_rate
        self.evaluation_batch_size = preset.evaluation_batch_size
        self.items = {name: load_examples(listed(task.data)) for name, task in preset.tasks.items()}
        for name, examples in self.items.items():
            self._check_lengths(name, examples)

    @classmethod
    def tasks_of(cls, preset: Any) -> dict[str, Task]:
        return {name: Task(task.metric, task.skill) for name, task in preset.tasks.items()}

    @classmethod
    def methods_of(cls, preset: Any) -> tuple[str, ...] | None:
        return tuple(name for name, reason in reasons(preset).items() if reason is None)

    @classmethod
    def mark(cls, preset: Any) -> str:
        # How many prompts are answered together changes no answer.
        return super().mark(dataclasses.replace(preset, evaluation_batch_size=1))

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        tokenizer = self.settings.tokenizers[0]
        assert tokenizer is not None  # asked for when the file was read
        return _padding(tokenizer, self.settings.configs[self.settings.anchor])

    @cached_property
    def augmenting_tokenizer(self) -> PreTrainedTokenizerBase:
        """m_A's, where it has one."""
        theirs = self.settings.tokenizers[1]
        return self.tokenizer if theirs is None else _padding(theirs, self.settings.configs[self.settings.augmenting])

    # The models ------------------------------------------------------------------------------------------------------

    def base(self, name: str) -> PreTrainedModel:
        own = self.settings
        source = {"anchor": own.anchor, "augmenting": own.augmenting, "vanilla": own.vanilla, "twin": own.twin}
        found = source.get(name)
        if found is not None:
            form = own.forms.get(found, Form(dtype=own.model.dtype))
            model = load_base(
                found,
                name,
                revision=form.revision,
                **{**form.options(found), "dtype": form.dtype or torch.float32},
                attn_implementation=own.model.attn_implementation,
                trust_remote_code=own.model.trust_remote_code,
            )
        elif name == "random":
            set_seed(1000 + self.seed)
            model = AutoModelForCausalLM.from_config(
                self.augmenting.config, trust_remote_code=own.model.trust_remote_code
            )
        else:
            self.make(name)
            model = load_base(
                str(self.stages.folder / name),
                name,
                trust_remote_code=own.model.trust_remote_code,
                dtype=own.model.dtype or torch.float32,
            )
        tokenizer = self.tokenizer if name in ("anchor", "twin") else self.augmenting_tokenizer
        if model.config.pad_token_id is None:
            model.config.pad_token_id = tokenizer.pad_token_id
        # Greedy, whatever the model's own settings are; all that is made of it takes these over.
        model.generation_config = GenerationConfig(
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=_ends(model.generation_config, tokenizer),
            pad_token_id=tokenizer.pad_token_id,
        )
        return model.to(device()).eval()

    def make(self, name: str) -> None:
        if name == "twin" and self.settings.twin is None:
            super().make(name)

    def train(self, name: str) -> tuple[PreTrainedModel, list[tuple[int, float]]]:
        raise AssertionError(f"{name} is given, not trained")

    def compose(self, augmenting: PreTrainedModel, connector: str = "cross_attention", **options: Any) -> Any:
        model = self.settings.model
        set_seed(self.seed + 2)
        usual: dict[str, Any] = {
            "connections": model.connections,
            "alignment": model.alignment,
            "words": model.words,
            "adapters": model.adapters,
            "train_map": model.train_map,
            "plain_text": None if model.plain_text is None else read_lines(model.plain_text),
        }
        if connector == "graft":  # it has none of the others' options
            usual |= {name: RECIPE[name] for name in ("init", "opened")}
            usual |= {} if model.connections is not None else {"connections": RECIPE["connections"]}
        else:
            usual |= {**model.connector, "num_heads": model.num_heads}
            usual |= {} if connector == "legonn" else {"init": model.init}
        return calmlm.compose(
            self.fresh_anchor(),
            augmenting,
            connector=connector,
            tokenizer=self.tokenizer,
            augmenting_tokenizer=self.augmenting_tokenizer,
            **{**usual, **options},
        )

    @property
    def stage(self) -> Stage:
        return self.settings.stage

    @property
    def twin_stage(self) -> Stage:
        return self.settings.stage

    def cascade(self) -> Answerer:
        raise ConfigError("A cascade pastes m_A's answer in a way of each experiment's own: use 'text_tool'.")

    # The data --------------------------------------------------------------------------------------------------------

    @property
    def _pad(self) -> int:
        return int(self.tokenizer.pad_token_id)

    def _check_lengths(self, name: str, examples: list[Example]) -> None:
        """Raise for an item that one of the models could not read, or not answer; say how many answers are too long."""
        answered = self.settings.tasks[name].metric != "bits_per_byte"
        longer = 0
        for example in examples:
            text = example.fields["prompt"] if answered else "".join(example.fields.values())
            tokenizers = (self.tokenizer, self.augmenting_tokenizer)
            for tokenizer, context in zip(tokenizers, self.settings.contexts, strict=True):
                length = len(encode_prompt(text, tokenizer)) + (self.max_new_tokens if answered else 0)
                if context is not None and length > context:
                    raise DataError(
                        f"{example.place}: expected at most {context} tokens, the context of the models, but got "
                        f"{length}{' with the answer' if answered else ''}: shorten it, or lower "
                        f"max_new_tokens."
                    )
                if answered and length == self.max_new_tokens:
                    raise DataError(f"{example.place}: expected a prompt, but it is empty: write one.")
            for own in self._own_contexts:
                count = own.count(encode_prompt(text, self.tokenizer))
                if count > own.length:
                    raise DataError(
                        f"{example.place}: expected text that the anchor's tokens spell in at most {own.length} of "
                        f"m_A's own tokens, but got {count}: shorten it."
                    )
            if answered:
                whole = encode_prompt(example.fields["completion"], self.tokenizer)
                longer += len(whole) > self.max_new_tokens
        if longer:
            self.stages.report(f"{longer} of {len(examples)} answers of {name} are longer than max_new_tokens.")

    @cached_property
    def _own_contexts(self) -> list[OwnContext]:
        """m_A's, where it reads the anchor's text in tokens of its own; as compositions will have it."""
        own = self.settings
        length = stated_length(own.configs[own.augmenting])
        if own.shares_tokenizer or length is None:
            return []
        model, pair = own.model, (self.tokenizer, self.augmenting_tokenizer)
        found = (
            Alignment.between(*pair)
            if model.alignment == "transcode"
            else Rewriting.between(*pair, str(model.alignment), None)
        )
        room = length - len(beginning_of(self.augmenting_tokenizer) if model.alignment == "own" else ())
        return [OwnContext("m_A", room, True, writer_of(found).eval())]

    def _encoded(self, sources: Sources, *, composed: bool = False) -> list[Row]:
        """The rows of some data; where they train compositions, no longer than m_A can read."""
        limits = [limit for limit in (self.settings.max_length, self.settings.contexts[0]) if limit is not None]
        examples = load_examples(listed(sources))
        longest = min(limits, default=None)
        own = self._own_contexts if composed else []
        encoded = encode_examples(examples, self.tokenizer, max_length=longest, loss_on=self.settings.loss_on, own=own)
        if encoded.truncated:
            self.stages.report(f"{encoded.truncated} of {len(encoded.rows)} examples were cut at {longest} tokens.")
        for name, count in encoded.outgrown.items():
            self.stages.report(
                f"{count} of {len(encoded.rows)} examples were cut where {name}'s context ends, after {own[0].length} "
                f"of its own tokens."
            )
        if longest is not None and not self.settings.shares_tokenizer:
            self._check_theirs(examples)
        return encoded.rows

    def _check_theirs(self, examples: list[Example]) -> None:
        """Raise for an example that m_A could not read in its own tokens."""
        limit = stated_length(self.settings.configs[self.settings.augmenting])
        for example in examples:
            length = len(encode_prompt("".join(example.fields.values()), self.augmenting_tokenizer)) + 1
            if limit is not None and length > limit:
                raise DataError(
                    f"{example.place}: expected at most {limit} of the augmenting model's tokens, but got {length}: "
                    f"shorten it."
                )

    def _repeated(self, rows: list[Row]) -> list[Row]:
        """As many rows as a training takes: each epoch in an order of its own."""
        rng, count = random.Random(f"own-{self.seed}"), self.settings.steps * self.settings.batch_size
        repeated: list[Row] = []
        while len(repeated) < count:
            repeated += rng.sample(rows, len(rows))
        return repeated[:count]

    def corpus(self) -> list[Row]:
        return self._repeated(self._encoded(self.settings.corpus))

    @cached_property
    def _split(self) -> tuple[list[Row], list[Row]]:
        """What is held out of D_C, and the rest."""
        rows = self._encoded(self.settings.composition, composed=True)
        random.Random(f"own-validation-{self.seed}").shuffle(rows)
        # A fifth of a small D_C; the same text on both sides would make the choice on what was learned.
        held = rows[: min(self.settings.validation, len(rows) // 5)]
        known = {tuple(row["input_ids"]) for row in held}
        rest = [row for row in rows if tuple(row["input_ids"]) not in known]
        if not held or not rest:
            raise DataError(
                f"Expected at least 5 different examples in D_C, a fifth of which is held out, but got {len(rows)}: "
                "add more."
            )
        return held, rest

    def composition(self, count: int, purpose: str, **changes: Any) -> list[Row]:
        held, rest = self._split
        return held if purpose == "validation" else self._repeated(rest)

    @cached_property
    def data(self) -> Data:
        return Data(self.composition(0, "composition"), self.corpus(), self.composition(0, "validation"))

    # What is asked ---------------------------------------------------------------------------------------------------

    def _tokenizer_of(self, model: Any) -> PreTrainedTokenizerBase:
        """m_A alone reads its own tokens, all else the anchor's."""
        return self.augmenting_tokenizer if model is self.__dict__.get("augmenting") else self.tokenizer

    def encode(self, prompt: str) -> list[int]:
        return encode_prompt(prompt, self.tokenizer)

    @property
    def ends(self) -> dict[str, Any]:
        return {}

    def answerer(self, model: Any) -> Answerer:
        tokenizer = self._tokenizer_of(model)

        def run(prompts: Sequence[str], tokens: int | None = None) -> list[str]:
            texts: list[str] = []
            size = self.settings.evaluation_batch_size
            for start in range(0, len(prompts), size):
                ids = [encode_prompt(prompt, tokenizer) for prompt in prompts[start : start + size]]
                batch = tokenizer.pad({"input_ids": ids}, padding=True, return_tensors="pt").to(model.device)
                with torch.no_grad():
                    written = generate_rows(
                        model,
                        batch["input_ids"],
                        batch["attention_mask"],
                        max_new_tokens=tokens or self.max_new_tokens,
                        do_sample=False,
                        pad_token_id=tokenizer.pad_token_id,
                        **({} if tokens is None else {"min_new_tokens": tokens}),
                    )
                new = written[:, batch["input_ids"].shape[1] :]
                texts += tokenizer.batch_decode(new, skip_special_tokens=True)
            return texts

        return run

    def score(self, complete: Answerer, model: Any | None) -> dict[str, list[float]]:
        scores: dict[str, list[float]] = {}
        for name, task in self.settings.tasks.items():
            examples = self.items[name]
            if task.metric == "bits_per_byte":
                # Of a text without a prompt, none could be read in its place.
                if model is not None and not (isinstance(model, Swapped) and examples[0].format == "text"):
                    scores[name] = self._bits_per_byte(model, examples)
                continue
            rights = [example.fields["completion"].strip() for example in examples]
            answers = complete([example.fields["prompt"] for example in examples])
            if task.stop is not None:
                answers = [answer.split(task.stop)[0] for answer in answers]
            scores[name] = _scored(task.metric, [answer.strip() for answer in answers], rights)
        return scores

    def _bits_per_byte(self, model: Any, examples: list[Example]) -> list[float]:
        tokenizer = self._tokenizer_of(model)
        rows = encode_examples(examples, tokenizer, max_length=None).rows
        end = end_of(tokenizer)
        rows = [_without(end, row) for row in rows]
        size = self.settings.evaluation_batch_size
        if isinstance(model, Swapped):
            losses = model.losses(rows, size)
        else:
            losses = losses_of(model, rows, int(tokenizer.pad_token_id), size)
        counts = [sum(label != IGNORED for label in row["labels"][1:]) for row in rows]
        # A text's first token is predicted only where the tokenizer puts something before it.
        unasked = [row["input_ids"][0] if row["labels"][0] != IGNORED else None for row in rows]
        sizes = [
            len(example.fields["text" if example.format == "text" else "completion"].encode())
            - (0 if first is None else _size(tokenizer, first))
            for example, first in zip(examples, unasked, strict=True)
        ]
        return [
            float(loss) * count / math.log(2) / max(1, size)
            for loss, count, size in zip(losses, counts, sizes, strict=True)
        ]

    @property
    def max_new_tokens(self) -> int:
        return self.settings.max_new_tokens

    @property
    def prompts(self) -> list[str]:
        examples = [example for each in self.items.values() for example in each]
        asked = [example.fields["prompt"] for example in examples if example.format == "prompt-completion"]
        return (asked or [example.fields["text"][:_BEGINNING] for example in examples])[:_TIMED]


def _size(tokenizer: PreTrainedTokenizerBase, token: int) -> int:
    """How many bytes of a text a token stands for, at its beginning."""
    text = tokenizer.decode([token], skip_special_tokens=True)
    if "\ufffd" in text:  # a part of a character
        return len(token_bytes(tokenizer, "model")[token] or b"")
    return len(text.encode())


def _ends(settings: Any, tokenizer: PreTrainedTokenizerBase) -> list[int] | None:
    """All tokens that end an answer: the tokenizer's, and the model's own."""
    given = getattr(settings, "eos_token_id", None)
    ends = {end_of(tokenizer), *(given if isinstance(given, list) else [given])} - {None}
    return sorted(ends) or None


def _padding(tokenizer: PreTrainedTokenizerBase, config: Any) -> PreTrainedTokenizerBase:
    """The tokenizer, padding on the left, and with its end of text where the model knows no padding token."""
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None or tokenizer.pad_token_id >= config.get_text_config(decoder=True).vocab_size:
        if tokenizer.eos_token is None:
            raise DataError(
                "Expected a tokenizer with a padding token or an end of text, but it has neither: set one and save it."
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _without(end: int | None, row: Row) -> Row:
    """A row without the end of text, which no byte of the text stands for."""
    if end is None or row["input_ids"][-1] != end or len(row["input_ids"]) < 3:
        return row
    return {name: values[:-1] for name, values in row.items()}


def _scored(metric: str, answers: Sequence[str], rights: Sequence[str]) -> list[float]:
    if metric == "exact_match":
        return [float(answer == right) for answer, right in zip(answers, rights, strict=True)]
    require("sacrebleu", "compare", "The metric chrf")
    from sacrebleu.metrics import CHRF

    chrf = CHRF()
    return [chrf.sentence_score(answer, [right]).score / 100 for answer, right in zip(answers, rights, strict=True)]
