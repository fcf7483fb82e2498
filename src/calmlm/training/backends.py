"""The two trainers: TRL's SFTTrainer and transformers' Trainer, given the same ids and labels."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Mapping
from typing import Any

from calmlm.data.extras import require
from calmlm.errors import CalmError, ConfigError
from calmlm.training.run_folder import RunFolder

Rows = list[dict[str, list[int]]]


def argument_types(backend: str) -> dict[str, Any]:
    """All arguments that a backend's configuration takes, with their annotations."""
    cls = _arguments_class(backend)
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


def make_arguments(backend: str, arguments: Mapping[str, Any], folder: RunFolder, *, evaluates: bool) -> Any:
    """SFTConfig or TrainingArguments, with calmlm's defaults below what the user set.

    Raises:
        ConfigError: an argument has a value that the class refuses.
        MissingExtraError: the backend, or TensorBoard, is not installed.
    """
    import torch

    # New layers with a zero output, not a whole network: they learn at rates that would break a pretrained model.
    defaults: dict[str, Any] = {
        "learning_rate": 3e-4,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.03,
        "logging_steps": 10,
        "report_to": ["tensorboard"],
        "save_total_limit": 2,
        "dataloader_pin_memory": torch.cuda.is_available(),  # without a GPU it only warns
        "bf16": torch.cuda.is_available() and torch.cuda.is_bf16_supported() and not arguments.get("fp16"),
        # Frozen bases keep few activations; recomputing both of them costs more than it saves. (The older name of the
        # setting loses against the newer one, so this must not stand beside it.)
        **({} if "gradient_checkpointing" in arguments else {"activation_checkpointing": False}),
        "eval_strategy": "epoch" if evaluates else "no",
    }
    cls = _arguments_class(backend)
    merged = {**defaults, **arguments, "output_dir": str(folder.checkpoints)}
    if backend == "sft":
        merged.setdefault("router_aux_loss_coef", 0.0)  # of a mixture of experts, whose router is frozen
        merged["max_length"] = None  # rows are cut before they get there; see set_packing_length
    if "tensorboard" in _as_list(merged["report_to"]):
        require("tensorboard", "train", "Logging (trainer.report_to: tensorboard)")
    try:
        made = cls(**merged)
    except (TypeError, ValueError, ImportError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"trainer: expected arguments that {cls.__name__} takes, but it refused them: {reason}"
        ) from error
    _check(made)
    return made


def _check(arguments: Any) -> None:
    """What the trainers would find out in the middle, or never."""
    from transformers.utils import is_liger_kernel_available

    for name in ("seed", "data_seed"):
        seed = getattr(arguments, name)
        if seed is not None and not 0 <= seed < 2**32:
            raise ConfigError(f"trainer.{name}: expected 0 to {2**32 - 1}, but got {seed}; choose another.")
    if arguments.gradient_accumulation_steps < 1:
        raise ConfigError(
            f"trainer.gradient_accumulation_steps: expected 1 or more, but got "
            f"{arguments.gradient_accumulation_steps}; raise it."
        )
    if arguments.max_steps == 0 or (arguments.max_steps < 0 and arguments.num_train_epochs <= 0):
        raise ConfigError(
            f"trainer: expected at least one step, but max_steps is {arguments.max_steps} and num_train_epochs "
            f"{arguments.num_train_epochs}; raise one of them."
        )
    if arguments.use_liger_kernel and not is_liger_kernel_available():
        raise ConfigError("trainer.use_liger_kernel: expected the package liger-kernel, but it is not installed.")


def set_packing_length(arguments: Any, max_length: int | None) -> None:
    """Where examples are packed, pack them to `max_length`.

    Raises:
        ConfigError: no length is known.
    """
    if getattr(arguments, "packing", False):
        if max_length is None:
            raise ConfigError("trainer.packing: expected data.max_length beside it, since the models state no context.")
        arguments.max_length = max_length


def make_trainer(
    backend: str,
    model: Any,
    arguments: Any,
    tokenizer: Any,
    train: Rows,
    evaluation: Rows | None,
    folder: RunFolder,
) -> Any:
    """A trainer over rows of `input_ids` and `labels`, ready for `train()`.

    Raises:
        ConfigError: it refuses its arguments.
    """
    from transformers.integrations import TensorBoardCallback

    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    build = _sft_trainer if backend == "sft" else _plain_trainer
    try:
        trainer = build(model, arguments, tokenizer, train, evaluation)
        if not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):  # these make them once the model is spread
            # What it would find out in the middle: an unknown optimizer or schedule, batches of no rows.
            trainer.create_optimizer_and_scheduler(num_training_steps=max(arguments.max_steps, 1))
            batches = len(trainer.get_train_dataloader())
            if not batches:
                raise ConfigError(
                    f"trainer: expected batches, but dataloader_drop_last leaves none of {len(train)} examples; lower "
                    f"per_device_train_batch_size."
                )
            trainer.optimizer = trainer.lr_scheduler = None
    except CalmError:
        raise
    except (  # OSError: no network for push_to_hub
        ValueError, TypeError, KeyError, AttributeError, ImportError, RuntimeError, NotImplementedError, OSError
    ) as error:  # fmt: skip
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"trainer: expected arguments that the trainer can begin with, but it refused them: {reason}"
        ) from error
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback):
            callback.logging_dir = str(folder.logs)
    return trainer


def _sft_trainer(model: Any, arguments: Any, tokenizer: Any, train: Rows, evaluation: Rows | None) -> Any:
    from datasets import Dataset
    from trl import SFTTrainer

    trainer = SFTTrainer(
        model=model,
        args=arguments,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(train),
        eval_dataset=Dataset.from_list(evaluation) if evaluation else None,
    )
    if model.model.reads_prompts:
        # TRL keeps the labels from the model, which would take whole rows for their prompts.
        trainer.data_collator = _with_prompts(trainer.data_collator)
    return trainer


def _with_prompts(collate: Callable[[Any], dict[str, Any]]) -> Callable[[Any], dict[str, Any]]:
    """A collator that also says which tokens belong to the prompt."""
    from calmlm.readers import prompt_of

    def collated(rows: Any) -> dict[str, Any]:
        batch = collate(rows)
        batch["prompt_mask"] = prompt_of(batch["labels"])
        return batch

    return collated


def _plain_trainer(model: Any, arguments: Any, tokenizer: Any, train: Rows, evaluation: Rows | None) -> Any:
    from transformers import DataCollatorForSeq2Seq, Trainer

    # Despite its name the collator for any rows with labels: it pads those with -100.
    collate = DataCollatorForSeq2Seq(tokenizer)
    return Trainer(
        model=model,
        args=arguments,
        processing_class=tokenizer,
        train_dataset=train,
        eval_dataset=evaluation,
        data_collator=_with_prompts(collate) if model.model.reads_prompts else collate,
    )


def _arguments_class(backend: str) -> type:
    if backend == "sft":
        require("trl", "train", "The training backend 'sft'")
        from trl import SFTConfig

        return SFTConfig
    from transformers import TrainingArguments

    return TrainingArguments


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]
