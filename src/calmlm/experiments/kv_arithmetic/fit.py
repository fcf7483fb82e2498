"""Training on examples with the stock Hugging Face Trainer, and answering prompts in batches."""

from __future__ import annotations

import random
import re
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments

from calmlm.experiments.kv_arithmetic.presets import Stage
from calmlm.experiments.kv_arithmetic.world import Example

__all__ = ["SupervisedTrainer", "answer", "collator", "encode", "fit", "in_batches"]

_IGNORED = -100
_FIGURES = re.compile(r"▁?-?\d+|▁\?")  # a question mark behind a space stands only where a word has no value


def encode(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, joint: str = ""
) -> list[dict[str, list[int]]]:
    """Tokenise examples; the loss falls on the completion and the end of text.

    An example without a completion is a row of keys and values: its loss falls on the figures in the prompt and on the
    sign that stands for "no value". ``joint`` is what a tokenizer that adds no space itself needs between a prompt and
    its completion.
    """
    prompts = tokenizer([e.prompt for e in examples]).input_ids
    completions = tokenizer([joint + e.completion for e in examples], add_special_tokens=False).input_ids
    figures = {i for token, i in tokenizer.get_vocab().items() if _FIGURES.fullmatch(token)}
    rows = []
    for example, prompt, completion in zip(examples, prompts, completions, strict=True):
        if example.completion:
            target = [*completion, tokenizer.eos_token_id]
            rows.append({"input_ids": prompt + target, "labels": [_IGNORED] * len(prompt) + target})
        else:
            rows.append({"input_ids": prompt, "labels": _values_only(prompt, figures, ends=bool(joint))})
    return rows


def _values_only(ids: list[int], figures: set[int], ends: bool) -> list[int]:
    """Labels of a row: its values, and where those are spelled in digits also what ends them."""
    before = [_IGNORED, *ids]
    return [i if i in figures or (ends and b in figures) else _IGNORED for i, b in zip(ids, before, strict=False)]


def in_batches(
    rows: list[dict[str, list[int]]], batch_size: int, seed: int, window: int = 30
) -> list[dict[str, list[int]]]:
    """Order ``rows`` so that the rows of a batch have about one length: within each window of batches, sort, cut into
    batches and shuffle these. The order of windows stays, so a curriculum survives."""
    rng = random.Random(seed)
    ordered: list[dict[str, list[int]]] = []
    for start in range(0, len(rows), window * batch_size):
        group = sorted(rows[start : start + window * batch_size], key=lambda row: len(row["input_ids"]))
        batches = [group[i : i + batch_size] for i in range(0, len(group), batch_size)]
        rng.shuffle(batches)
        ordered += [row for batch in batches for row in batch]
    return ordered


def collator(pad: int) -> Callable[[list[dict[str, list[int]]]], dict[str, torch.Tensor]]:
    """Return a function that pads rows on the right and stacks them."""

    def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        width = max(len(row["input_ids"]) for row in rows)
        ids = torch.full((len(rows), width), pad)
        labels = torch.full((len(rows), width), _IGNORED)
        for i, row in enumerate(rows):
            ids[i, : len(row["input_ids"])] = torch.tensor(row["input_ids"])
            labels[i, : len(row["labels"])] = torch.tensor(row["labels"])
        # Padding stands on the right, where a causal model never looks back from: no attention mask is needed.
        return {"input_ids": ids, "labels": labels}

    return collate


class SupervisedTrainer(Trainer):
    """The stock Trainer, but the vocabulary's logits are computed at supervised positions only."""

    def compute_loss(  # type: ignore[override]
        self, model: Any, inputs: dict[str, torch.Tensor], return_outputs: bool = False, **_: Any
    ) -> Any:
        """Mean cross-entropy over the labelled positions."""
        hidden = model.model(input_ids=inputs["input_ids"]).last_hidden_state[:, :-1]
        labels = inputs["labels"][:, 1:]
        supervised = labels != _IGNORED
        loss = torch.nn.functional.cross_entropy(model.lm_head(hidden[supervised]), labels[supervised])
        return (loss, None) if return_outputs else loss


def fit(
    model: PreTrainedModel,
    rows: list[dict[str, list[int]]],
    pad: int,
    stage: Stage,
    seed: int,
    **options: Any,
) -> list[tuple[int, float]]:
    """Train the parameters of ``model`` that require gradients; return (step, loss) as logged."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=stage.steps,
            per_device_train_batch_size=stage.batch_size,
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
            disable_tqdm=True,
            seed=seed,
            use_cpu=not torch.cuda.is_available(),
            remove_unused_columns=False,
            **options,
        )
        trainer = SupervisedTrainer(
            model=model,
            args=arguments,
            train_dataset=in_batches(rows, stage.batch_size, seed),
            data_collator=collator(pad),
        )
        trainer.train()
    model.eval()
    return [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]


@torch.no_grad()
def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_new_tokens: int,
    batch_size: int = 200,
) -> list[str]:
    """Complete each prompt greedily; return the completions' texts."""
    texts: list[str] = []
    for start in range(0, len(prompts), batch_size):
        batch = tokenizer(list(prompts[start : start + batch_size]), padding=True, return_tensors="pt").to(model.device)
        ids = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        new = ids[:, batch["input_ids"].shape[1] :]
        texts += [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]
    return texts
