"""The two trainers: TRL's SFTTrainer and transformers' Trainer, given the same ids and labels."""

from __future__ import annotations

import contextlib
import copy
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import DataCollatorForSeq2Seq, Trainer, get_scheduler
from transformers.integrations import TensorBoardCallback, get_reporting_integration_callbacks
from transformers.trainer_utils import SchedulerType

from calmlm.bases.reaching import UNREACHED
from calmlm.bases.sharding import is_spread
from calmlm.errors import CalmError, ConfigError
from calmlm.files.publishing import check_published
from calmlm.modeling.recomputing import KEEP, keeping_compiled
from calmlm.readers import prompt_mask_of
from calmlm.training.arguments import MEASURED, argument_class, argument_types, faults_of
from calmlm.training.failures import reason_outside
from calmlm.training.first_step import ComposedTrainer, FirstStep, reason_of
from calmlm.training.going_on import ResumedTrainer
from calmlm.training.hub_token import KEY, UnwrittenToken
from calmlm.training.lean_loss import lean
from calmlm.training.named_reporters import PROJECT, Guarded, check_reporters
from calmlm.training.retaining import RetainingTrainer
from calmlm.training.run_folder import RunFolder
from calmlm.training.watching import WatchedTrainer
from calmlm.training.whole_checkpoints import WholeCheckpoints

__all__ = [
    "Rows",
    "argument_types",
    "batches_of",
    "make_arguments",
    "make_trainer",
    "set_end",
    "set_packing_length",
    "train_with",
    "upload",
]

Rows = list[dict[str, list[int]]]
SAMPLED = 1000  # steps of a schedule that are looked at, of however many


def make_arguments(backend: str, arguments: Mapping[str, Any], folder: RunFolder, *, evaluates: bool) -> Any:
    """SFTConfig or TrainingArguments, with calmlm's defaults below what the user set.

    Raises:
        ConfigError: an argument has a value that the class refuses, or that could not do its work.
        MissingExtraError: the backend, or TensorBoard, is not installed.
    """
    # New layers with a zero output, not a whole network: they learn at rates that would break a pretrained model.
    defaults: dict[str, Any] = {
        "learning_rate": 3e-4,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.03,
        "logging_steps": 10,
        "report_to": ["tensorboard"],
        "run_name": os.path.basename(os.path.abspath(folder.path)),
        "project": PROJECT,
        "include_num_input_tokens_seen": "non_padding",  # and so tokens a second
        "save_total_limit": 2,
        "dataloader_pin_memory": torch.cuda.is_available(),  # without a GPU it only warns
        "bf16": torch.cuda.is_available() and torch.cuda.is_bf16_supported() and not arguments.get("fp16"),
        # Frozen bases keep few activations; recomputing both of them costs more than it saves. (The older name of the
        # setting loses against the newer one, so this must not stand beside it.)
        **({} if "gradient_checkpointing" in arguments else {"activation_checkpointing": False}),
        "eval_strategy": "epoch" if evaluates else "no",
    }
    cls = argument_class(backend)
    # A copy, since the trainers change what they are given: it is written down as it was.
    merged = copy.deepcopy({**defaults, **arguments, "output_dir": str(folder.checkpoints)})
    if merged.get("push_to_hub") and not merged.get("hub_model_id"):
        merged["hub_model_id"] = folder.path.resolve().name  # or it would be "checkpoints"
    if merged.get(KEY):
        merged[KEY] = UnwrittenToken(merged[KEY])
    if merged["report_to"] is None:
        merged["report_to"] = "none"
    if backend == "sft":
        merged.setdefault("router_aux_loss_coef", 0.0)  # of a mixture of experts, whose router is frozen
        merged["max_length"] = None  # rows are cut before they get there; see set_packing_length
    check_reporters(_as_list(merged["report_to"]))
    try:
        made = cls(**merged)
    except Exception as error:  # whatever its checks, its files and its packages give rise to
        raise ConfigError(
            f"trainer: expected arguments that {cls.__name__} takes, but it refused them: {reason_of(error)}"
        ) from error
    faults = faults_of(backend, made, evaluates=evaluates)
    if faults:
        raise ConfigError(" ".join(faults))
    return made


def set_packing_length(arguments: Any, max_length: int | None) -> None:
    """Where examples are packed, pack them to `max_length`.

    Raises:
        ConfigError: no length is known.
    """
    if getattr(arguments, "packing", False):
        if max_length is None:
            raise ConfigError("trainer.packing: expected data.max_length beside it, since the models state no context.")
        arguments.max_length = max_length


def set_end(tokenizer: Any, token: str | None) -> None:
    """Let another token end each text, if one is named.

    Raises:
        ConfigError: the tokenizer has no such token.
    """
    if token is not None and token not in tokenizer.get_vocab():
        raise ConfigError(
            f"trainer.eos_token: expected a token of the tokenizer, but it has no {token!r}; name one of its own."
        )
    if token is not None:
        tokenizer.eos_token = token


def make_trainer(
    backend: str,
    model: Any,
    arguments: Any,
    tokenizer: Any,
    train: Rows,
    evaluation: Rows | None,
    folder: RunFolder,
) -> Any:
    """A trainer over rows of `input_ids` and `labels`, ready for `train()`; nothing is written yet.

    Raises:
        ConfigError: it refuses its arguments, or the composition does.
    """
    _check_padding(model, arguments, tokenizer)
    _check_packing(model, arguments)
    if backend == "sft" and model.model.points:
        _check_pointed(arguments)
    if arguments.push_to_hub:
        try:
            check_published(model.config)
        except ConfigError as error:
            raise ConfigError(f"trainer.push_to_hub: {error}") from None
    build = _sft_trainer if backend == "sft" else _plain_trainer
    place = arguments.output_dir
    with tempfile.TemporaryDirectory() as elsewhere:
        arguments.output_dir = elsewhere  # which the trainers make when they are made themselves
        try:
            trainer = build(model, arguments, tokenizer, train, evaluation)
            _try_out(trainer, arguments, train, evaluation)
        except CalmError:
            raise
        except Exception as error:
            raise _refusal(error) from error
        finally:
            arguments.output_dir = place
    reporters = [trainer.pop_callback(kind) for kind in get_reporting_integration_callbacks(arguments.report_to)]
    for reporter in reporters:
        if isinstance(reporter, TensorBoardCallback):
            reporter.logging_dir = str(folder.logs)
    trainer.add_callback(FirstStep(trainer, [Guarded(reporter) for reporter in reporters]))
    trainer.run = folder
    return trainer


def batches_of(trainer: Any) -> int:
    """How many batches a trainer will have in memory one after the other, in all processes together."""
    steps = trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())[-1]
    return int(steps * trainer.args.gradient_accumulation_steps * trainer.args.world_size)


def train_with(trainer: Any, checkpoint: Path | None) -> Any:
    """Train, from a checkpoint on if there is one; returns what the trainer does.

    Raises:
        CalmError: the disk is full, or a worker or another process is lost.
        ConfigError: for whatever the trainer finds out about its arguments in its first step.
    """
    args = trainer.args
    kept = args.torch_compile and args.activation_checkpointing and KEEP in (args.activation_checkpointing_kwargs or {})
    try:
        with keeping_compiled() if kept else contextlib.nullcontext():
            return trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except CalmError:
        raise
    except Exception as error:
        outside = reason_outside(error, trainer.run)
        if outside is not None:
            raise outside from error
        if trainer.begun:
            raise
        raise _refusal(error) from error


def _refusal(error: Exception) -> ConfigError:
    """What to raise in place of an error that a trainer came to before its first step was done."""
    return ConfigError(
        f"trainer: expected arguments that the trainer can begin with, but it refused them: {reason_of(error)}"
    )


def upload(trainer: Any, composition: Path) -> None:
    """Upload what was trained, with the tokenizer and the composition's card.

    Raises:
        ConfigError: the hub refuses or cannot be reached.
    """
    try:
        trainer.push_to_hub(commit_message="End of training", revision=trainer.args.hub_revision)
    except UNREACHED as error:
        raise ConfigError(
            f"trainer.push_to_hub: expected the hub to take the repository {trainer.args.hub_model_id!r}, but it did "
            f"not ({reason_of(error)}); the composition lies in {composition}, from where push_to_hub can upload it."
        ) from error


def _check_padding(model: Any, arguments: Any, tokenizer: Any) -> None:
    """Settle what rows are padded with.

    Raises:
        ConfigError: there is no such token, or the models have no embedding for it.
    """
    named = getattr(arguments, "pad_token", None)
    if named is not None and named not in tokenizer.get_vocab():
        raise ConfigError(
            f"trainer.pad_token: expected a token of the tokenizer, but it has no {named!r}; name one of its own."
        )
    if named is not None:
        tokenizer.pad_token = named
    elif tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    found, size = tokenizer.pad_token_id, model.model.abilities.shared_ids
    if found is None:
        raise ConfigError(
            "tokenizer: expected one with a pad token or an end-of-text token, which rows of a batch are filled up "
            "with, but it has neither; give it one and save it, then name its folder."
        )
    if found >= size:
        raise ConfigError(
            f"{'tokenizer' if named is None else 'trainer.pad_token'}: expected a pad token with an id below {size}, "
            f"the models' vocabulary, but {tokenizer.pad_token!r} has {found}; use another token for padding, the "
            f"end-of-text token for example."
        )


def _check_packing(model: Any, arguments: Any) -> None:
    """Raise where several texts are to share a row, and something cannot tell them apart.

    Raises:
        ConfigError: naming the argument.
    """
    keys = [key for key in ("packing", "eval_packing", "padding_free") if getattr(arguments, key, None)]
    if not keys:
        return
    cut = "packing" in keys and arguments.packing_strategy == "wrapped"  # rows that say nothing of their texts
    if cut and model.model.reads_prompts:
        raise ConfigError(
            "trainer.packing_strategy: expected 'bfd', since with refresh: false an augmenting model reads the prompt "
            "of each text, but 'wrapped' does not tell texts apart; leave it out."
        )
    if cut or is_spread(model):
        return
    anchor = model.model.backbone()
    for name in model.model.augmenting:
        if model.config.augmenting[name]["reads"] == "tokens":
            _ = model.model.backbone(name).packs  # found out before anything is compiled
    if not anchor.packs:
        raise ConfigError(
            f"trainer.{keys[0]}: expected an anchor that keeps texts apart whose positions begin anew within a row, "
            f"but {type(anchor.decoder).__name__} does not; leave it out."
        )


def _check_pointed(arguments: Any) -> None:
    """Raise where something is asked for that TRL computes from states, where pointers have no say.

    Raises:
        ConfigError: naming the argument.
    """
    metric = (arguments.metric_for_best_model or "").removeprefix("eval_")
    asked = {
        "loss_type": (arguments.loss_type != "nll", "nll"),
        "router_aux_loss_coef": (bool(arguments.router_aux_loss_coef), "none"),
        "metric_for_best_model": (metric in {*MEASURED["sft"], "aux_loss"} - {*MEASURED["trainer"]}, "loss"),
    }
    for key, (refused, expected) in asked.items():
        if refused:
            raise ConfigError(
                f"trainer.{key}: expected {expected} beside words: pointer, whose loss comes from logits and not from "
                f"TRL, but got {getattr(arguments, key)!r}; leave it out, or choose words: map."
            )


def _try_out(trainer: Any, arguments: Any, train: Rows, evaluation: Rows | None) -> None:
    """Make what the trainer would make later: batches, and a learning rate for every step.

    Raises:
        ConfigError: there are no batches, or several GPUs for one process.
    """
    if trainer.args.n_gpu > 1:
        raise ConfigError(
            f"trainer: expected one process for each GPU, but one process sees {trainer.args.n_gpu} of them; start it "
            f"with torchrun --nproc_per_node {trainer.args.n_gpu}, or let it see one (CUDA_VISIBLE_DEVICES)."
        )
    batches = trainer.get_train_dataloader()
    if not len(batches):
        raise ConfigError(
            f"trainer: expected batches, but dataloader_drop_last leaves none of {len(train)} examples; lower "
            f"per_device_train_batch_size."
        )
    if evaluation:
        trainer.get_eval_dataloader()
    parallel = trainer.accelerator.parallelism_config
    if parallel is not None and (parallel.cp_enabled or parallel.sp_enabled or parallel.tp_enabled):
        raise ConfigError(
            "Expected processes that each hold the whole composition, or FSDP, but accelerate is set up to split texts "
            "or layers; take the sizes of its parallelism_config back."
        )
    if trainer.is_deepspeed_enabled:
        return  # which may bring a schedule of its own
    steps = trainer.set_initial_training_values(arguments, batches)[-1]
    schedule = get_scheduler(
        arguments.lr_scheduler_type,
        optimizer=torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=arguments.learning_rate),
        num_warmup_steps=arguments.get_warmup_steps(steps),
        num_training_steps=steps,
        scheduler_specific_kwargs=arguments.lr_scheduler_kwargs,
    )
    if arguments.lr_scheduler_type in (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY):
        schedule.step(1.0)
        return
    for step in range(0, steps + 1, max(1, steps // SAMPLED)):
        schedule.lr_lambdas[0](step)


def _sft_trainer(model: Any, arguments: Any, tokenizer: Any, train: Rows, evaluation: Rows | None) -> Any:
    from datasets import Dataset
    from trl import SFTTrainer

    class Composed(ComposedTrainer, WholeCheckpoints, SFTTrainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            # TRL computes logits from states by itself, and what pointers say stands in no state.
            computed = Trainer.compute_loss if points else SFTTrainer.compute_loss
            return computed(self, model, lean_inputs(self, inputs, return_outputs), return_outputs, **kwargs)

    points = model.model.points

    # What is retained stands outside of what watches the gates: it is none of the batch.
    class Held(RetainingTrainer, WatchedTrainer, ResumedTrainer, Composed):
        pass

    trainer = Held(
        model=model,
        args=arguments,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(train),
        eval_dataset=Dataset.from_list(evaluation) if evaluation else None,
    )
    trainer.data_collator = with_prompts(trainer.data_collator, model)
    return trainer


def lean_inputs(trainer: Any, inputs: Any, return_outputs: bool) -> Any:
    """A batch that asks for logits where there are labels; whoever wants to see them is given all."""
    alone = not (return_outputs or trainer.label_smoother or trainer.compute_loss_func)
    return lean(inputs) if alone else inputs


def _plain_trainer(model: Any, arguments: Any, tokenizer: Any, train: Rows, evaluation: Rows | None) -> Any:
    class Composed(ComposedTrainer, WholeCheckpoints, Trainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            return super().compute_loss(model, lean_inputs(self, inputs, return_outputs), return_outputs, **kwargs)

    # What is retained stands outside of what watches the gates: it is none of the batch.
    class Held(RetainingTrainer, WatchedTrainer, ResumedTrainer, Composed):
        pass

    return Held(
        model=model,
        args=arguments,
        processing_class=tokenizer,
        train_dataset=train,
        eval_dataset=evaluation,
        # Despite its name the collator for any rows with labels: it pads those with -100.
        data_collator=with_prompts(DataCollatorForSeq2Seq(tokenizer), model),
    )


def with_prompts(collate: Any, model: Any) -> Any:
    """A collator that also says which tokens belong to prompts, where that matters to the composition.

    It could not tell by itself where a trainer keeps the labels from it, as TRL's does, and Trainer to smooth them.
    """
    return WithPrompts(collate, model.model.reads_prompts) if model.model.wants_prompts else collate


@dataclass
class WithPrompts:
    """A collator that also says which tokens belong to prompts; an object, so that workers can be sent it.

    Attributes:
        collate: makes the batch.
        first: whether only what stands before the first label is meant, and not all that has no label.
    """

    collate: Callable[[Any], dict[str, Any]]
    first: bool

    def __call__(self, rows: Any) -> dict[str, Any]:
        batch = self.collate(rows)
        batch["prompt_mask"] = prompt_mask_of(batch, first=self.first)
        return batch


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]
