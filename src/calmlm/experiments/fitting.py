"""Training on rows of ids and labels with the stock Hugging Face Trainer, and answering prompts in batches."""

from __future__ import annotations

import dataclasses
import multiprocessing
import random
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from transformers import (
    LlamaForCausalLM,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

from calmlm.causal_lm import CalmForCausalLM
from calmlm.data.context import own_contexts
from calmlm.data.labels import IGNORE as IGNORED
from calmlm.errors import ConfigError
from calmlm.experiments.flops import Meter
from calmlm.readers import prompt_mask_of

__all__ = [
    "IGNORED",
    "Stage",
    "SupervisedTrainer",
    "answer",
    "check_seeds",
    "collator",
    "fit",
    "in_batches",
    "preset_of",
    "prompt_argument",
]

P = TypeVar("P")
Row = dict[str, Any]
"""``input_ids`` and ``labels``, lists of equal length, and whatever a collator of the experiment's own wants."""


@dataclass(frozen=True)
class Stage:
    """One training: how long, in what batches, at what peak learning rate (cosine decay to zero)."""

    steps: int
    batch_size: int
    learning_rate: float
    weight_decay: float = 0.1


def preset_of(presets: Mapping[str, P], name: str, max_steps: int | None = None, items: int | None = None) -> P:
    """A preset of an experiment by its name.

    Args:
        presets: dataclasses with stages and a number of ``items``.
        name: which of them.
        max_steps: cuts every training, and its batches to 16 rows, for a trial.
        items: evaluation items per column, instead of the preset's.

    Raises:
        ConfigError: for an unknown name.
    """
    if name not in presets:
        raise ConfigError(f"The preset must be one of {', '.join(presets)}, but got {name!r}: choose one of these.")
    changed: dict[str, Any] = {} if items is None else {"items": items}
    preset: Any = presets[name]
    for field in dataclasses.fields(preset):
        stage = getattr(preset, field.name)
        if max_steps is not None and isinstance(stage, Stage):
            steps, size = min(max_steps, stage.steps), min(16, stage.batch_size)
            changed[field.name] = dataclasses.replace(stage, steps=steps, batch_size=size)
    return dataclasses.replace(preset, **changed)


def check_seeds(seeds: Sequence[int]) -> None:
    """Raise unless there is a seed, and each is given once and is one that NumPy takes.

    Raises:
        ConfigError: otherwise.
    """
    if not seeds or len(set(seeds)) != len(seeds) or not all(0 <= seed < 2**32 for seed in seeds):
        raise ConfigError(
            f"At least one seed is needed, each once and from 0 to 2^32 - 1, but got {list(seeds)}: write for example "
            "0,1,2."
        )


def in_batches(rows: list[Row], batch_size: int, seed: int, window: int = 30) -> list[Row]:
    """Order ``rows`` so that the rows of a batch have about one length: within each window of batches, sort, cut into
    batches and shuffle these. The order of windows stays, so a curriculum survives.

    A window ends where a row comes again, or a batch would be made of one row's copies.
    """
    rng = random.Random(seed)
    ordered: list[Row] = []
    for window_rows in _windows(rows, window * batch_size):
        group = sorted(window_rows, key=lambda row: len(row["input_ids"]))
        batches = [group[i : i + batch_size] for i in range(0, len(group), batch_size)]
        rng.shuffle(batches)
        ordered += [row for batch in batches for row in batch]
    return ordered


def _windows(rows: list[Row], size: int) -> Iterator[list[Row]]:
    found: list[Row] = []
    seen: set[int] = set()
    for row in rows:
        if len(found) == size or id(row) in seen:
            yield found
            found, seen = [], set()
        found.append(row)
        seen.add(id(row))
    if found:
        yield found


def collator(pad: int, masked: bool = False) -> Callable[[list[Row]], dict[str, Any]]:
    """Return a function that pads rows on the right and stacks them.

    Args:
        pad: the padding token.
        masked: whether padding is told from text. It stands where a causal model never looks back from, so that only a
            model that writes the text in tokens of its own has to know.
    """
    return partial(_collate, pad, masked)  # which can be sent to workers


def _collate(pad: int, masked: bool, rows: list[Row]) -> dict[str, Any]:
    width = max(len(row["input_ids"]) for row in rows)
    ids = torch.full((len(rows), width), pad)
    labels = torch.full((len(rows), width), IGNORED)
    for i, row in enumerate(rows):
        ids[i, : len(row["input_ids"])] = torch.tensor(row["input_ids"])
        labels[i, : len(row["labels"])] = torch.tensor(row["labels"])
    batch = {"input_ids": ids, "labels": labels}
    if masked:
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        batch["attention_mask"] = (torch.arange(width) < lengths[:, None]).long()
    return batch


def prompt_argument(model: Any, labels: torch.Tensor, mask: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """What tells a model for which it matters which tokens are given, or it would read what is asked for.

    Args:
        model: any; others need none.
        labels: (B, T) int64, -100 for tokens that are given.
        mask: the attention mask (B, T), by which rows may begin behind padding.
    """
    if not isinstance(model, CalmForCausalLM) or not (model.model.enabled and model.model.wants_prompts):
        return {}
    batch = {"labels": labels, "attention_mask": mask}
    return {"prompt_mask": prompt_mask_of(batch, first=model.model.reads_prompts)}


def _own_positions(model: Any) -> bool:
    """Whether an augmenting model has learned positions for tokens of its own, of which padding would take some."""
    return isinstance(model, CalmForCausalLM) and any(context.learned for context in own_contexts(model))


PLAIN_HEADS = (LlamaForCausalLM, MistralForCausalLM)
"""Models whose logits are a linear map of the decoder's last state, and nothing more."""


class SupervisedTrainer(Trainer):
    """The stock Trainer, but the loss is the mean over the labelled positions of a batch.

    Where the head of the model is known to be plain, the vocabulary's logits are computed at these positions only.
    """

    def compute_loss(  # type: ignore[override]
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
        **_: Any,
    ) -> Any:
        """Mean cross-entropy over the labelled positions: of the whole batch, where this is a part of one."""
        given = {key: value for key, value in inputs.items() if key != "labels"}
        given |= prompt_argument(model, inputs["labels"], inputs.get("attention_mask"))
        labels = inputs["labels"][:, 1:]
        supervised = labels != IGNORED
        plain = isinstance(getattr(model, "anchor", model), PLAIN_HEADS)
        if plain and getattr(getattr(model, "model", None), "points", False):  # no state tells the logits
            kept = torch.nn.functional.pad(supervised, (0, 1))
            logits = model(**given, use_cache=False, logits_to_keep=kept).logits
        elif plain:
            logits = model.lm_head(model.model(**given).last_hidden_state[:, :-1][supervised])
        else:
            logits = model(**given, use_cache=False).logits[:, :-1][supervised]
        loss = torch.nn.functional.cross_entropy(logits.float(), labels[supervised])
        if num_items_in_batch is not None and self.args.gradient_accumulation_steps > 1:
            # The parts' losses add up, or are divided by their number.
            parts = 1 if self.model_accepts_loss_kwargs else self.args.gradient_accumulation_steps
            loss = loss * parts * supervised.sum() / num_items_in_batch
        return (loss, None) if return_outputs else loss


def fit(
    model: PreTrainedModel,
    rows: list[Row],
    pad: int,
    stage: Stage,
    seed: int,
    collate: Callable[[list[Row]], dict[str, Any]] | None = None,
    trainer_class: type[Trainer] = SupervisedTrainer,
    meter: Meter | None = None,
    rows_at_once: int | None = None,
    **options: Any,
) -> list[tuple[int, float]]:
    """Train the parameters of ``model`` that require gradients; return (step, loss) as logged.

    Args:
        model: any causal language model, a composition among them.
        rows: what to learn, in order.
        pad: the padding token.
        stage: how long and how fast.
        seed: of the order of batches.
        collate: makes a batch of rows; by default ids and labels, padded on the right.
        trainer_class: ``Trainer`` itself for models that are not causal language models.
        meter: counts the operations of the training.
        rows_at_once: how many rows of a batch are in memory together; all by default.
        options: further arguments of TrainingArguments.
    """
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=stage.steps,
            per_device_train_batch_size=rows_at_once or stage.batch_size,
            gradient_accumulation_steps=stage.batch_size // (rows_at_once or stage.batch_size),
            learning_rate=stage.learning_rate,
            weight_decay=stage.weight_decay,
            lr_scheduler_type="cosine",
            warmup_steps=min(50, stage.steps // 10),
            adam_beta2=0.98,
            optim="adamw_torch_fused",
            train_sampling_strategy="sequential",
            logging_steps=max(1, stage.steps // 20),
            save_strategy="no",
            report_to=[],
            disable_tqdm=multiprocessing.parent_process() is not None or not sys.stderr.isatty(),
            seed=seed,
            use_cpu=not torch.cuda.is_available(),
            remove_unused_columns=False,
            **options,
        )
        ordered = in_batches(rows, stage.batch_size, seed) if "input_ids" in rows[0] else rows
        trainer = trainer_class(
            model=model,
            args=arguments,
            train_dataset=ordered,
            data_collator=collate or collator(pad, masked=_own_positions(model)),
        )
        trainer.remove_callback(PrinterCallback)  # the losses are returned
        trainer.train()
        if meter is not None:
            meter.probe(trainer, ordered, stage.steps)
    model.eval()
    return [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]


@torch.no_grad()
def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_new_tokens: int,
    batch_size: int = 200,
    extra: Callable[[int, torch.Tensor], dict[str, Any]] | None = None,
) -> list[str]:
    """Complete each prompt greedily; return the completions' texts.

    ``extra`` gives further arguments of ``generate`` for the batch that begins with that prompt and has these ids.
    """
    texts: list[str] = []
    for start in range(0, len(prompts), batch_size):
        batch = tokenizer(list(prompts[start : start + batch_size]), padding=True, return_tensors="pt").to(model.device)
        further = extra(start, batch["input_ids"]) if extra is not None else {}
        ids = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            **further,
        )
        new = ids[:, batch["input_ids"].shape[1] :]
        texts += [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]
    return texts
