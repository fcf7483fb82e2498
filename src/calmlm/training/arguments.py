"""The trainers' arguments: read in every form that YAML gives them, and refused where they could not do their work."""

from __future__ import annotations

import dataclasses
import enum
import math
import typing
from collections.abc import Collection, Iterator, Mapping
from importlib.util import find_spec
from typing import Any

from calmlm.data.extras import require
from calmlm.files.paths import Place
from calmlm.modeling.recomputing import KEEP, MATMULS
from calmlm.training.fields import read_value, show, unknown_key

# Set by calmlm itself, so a file must not set them as well: key -> what to do instead.
OWNED = {
    "output_dir": "set 'output' at the top of the file",
    "logging_dir": "logs lie in the folder 'logs' of the output",
    "max_length": "set 'data.max_length'",
    "completion_only_loss": "set 'data.loss_on'",
    "assistant_only_loss": "set 'data.loss_on'",
    "dataset_text_field": "name the field 'text'",
    "dataset_kwargs": "calmlm tokenizes the data itself",
    "length_column_name": "calmlm tokenizes the data itself",
    "model_init_kwargs": "set these under 'model'",
    "trust_remote_code": "set 'model.trust_remote_code'",
    "chat_template_path": "name a tokenizer that has the template",
    "resume_from_checkpoint": "use --resume",
    "remove_unused_columns": "calmlm tokenizes the data itself",
}

# What trainers are given elsewhere, or were in earlier versions, and has no near name here: key -> what to do instead.
FORMER = {
    "batch_size": "set 'per_device_train_batch_size'",
    "group_by_length": "set 'train_sampling_strategy' to group_by_length",
    "lr": "set 'learning_rate'",
    "max_seq_length": "set 'data.max_length'",
    "no_cuda": "set 'use_cpu'",
    "overwrite_output_dir": "use --overwrite",
    "peft_config": "set 'model.adapters'",
    "save_safetensors": "remove it, since nothing else is saved",
    "tokenizer": "set 'tokenizer' at the top of the file",
    "warmup_ratio": "set 'warmup_steps', which takes a share of all steps as well",
}

# What YAML may hold where the trainers' own annotations say less than they take.
FORMS: dict[str, Any] = {
    "accelerator_config": Place | dict[str, Any] | None,
    "deepspeed": Place | dict[str, Any] | None,
    "fsdp_config": Place | dict[str, Any] | None,
    "fsdp": bool | str | None,
    "debug": str | list[str] | None,
    "optim_args": str | dict[str, Any] | None,
    "parallelism_config": dict[str, Any] | None,
}

# Arguments that would do nothing, and say nothing: key -> why.
IDLE = {
    "neftune_noise_alpha": "NEFTune adds noise to embeddings in training mode, and those of a composition stay frozen",
    "use_liger_kernel": "Liger changes the layers of models that it knows, and a composition is none of them",
    "bf16_full_eval": "it acts on evaluations outside of training, and there are none",
    "fp16_full_eval": "it acts on evaluations outside of training, and there are none",
    "parallelism_config": "a text or a layer of a composition cannot be split over devices",
}

LIMITS: dict[str, tuple[float, float]] = {
    "per_device_train_batch_size": (1, math.inf),
    "per_device_eval_batch_size": (1, math.inf),
    "gradient_accumulation_steps": (1, math.inf),
    "eval_accumulation_steps": (1, math.inf),
    "pad_to_multiple_of": (1, math.inf),
    "dataloader_num_workers": (0, math.inf),
    "dataloader_prefetch_factor": (1, math.inf),
    "seed": (0, 2**32 - 1),
    "data_seed": (0, 2**32 - 1),
    "label_smoothing_factor": (0, 1),
    "weight_decay": (0, math.inf),
    "max_grad_norm": (0, math.inf),
    "eval_delay": (0, math.inf),
}

CHOICES: dict[str, Collection[Any]] = {
    "include_num_input_tokens_seen": ("all", "non_padding", "no"),
    "truncation_mode": ("keep_start",),  # rows are cut before they reach the trainer, at their ends
}
"""Beside those that the trainers' own fields name."""

OPTIM_ARGS = {
    "adamw_torch": (),
    "adamw_torch_fused": (),
    "adafactor": (),
    "sgd": ("momentum", "dampening", "weight_decay", "nesterov"),
    "adagrad": ("lr_decay", "weight_decay", "eps"),
    "rmsprop": ("momentum", "alpha", "eps", "weight_decay", "centered"),
}
"""What optimizers read of `optim_args`; they drop the rest without a word."""

MEASURED = {
    "trainer": ("loss", "runtime", "samples_per_second", "steps_per_second"),
    "sft": (
        "loss", "runtime", "samples_per_second", "steps_per_second", "entropy", "mean_token_accuracy", "num_tokens",
    ),
}  # fmt: skip
"""What an evaluation gives, by backend."""


def argument_class(backend: str) -> type:
    """The class of a backend's arguments.

    Raises:
        MissingExtraError: the backend is not installed.
    """
    if backend == "sft":
        require("trl", "train", "The training backend 'sft'")
        from trl import SFTConfig

        return SFTConfig
    from transformers import TrainingArguments

    return TrainingArguments


def argument_types(backend: str) -> dict[str, Any]:
    """All arguments that a backend's configuration takes, with their annotations."""
    cls = argument_class(backend)
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


def read_arguments(backend: str, given: Mapping[str, Any], faults: list[str], place: str = "trainer") -> dict[str, Any]:
    """The arguments in the forms that the trainer takes; a sentence is added to `faults` for each that has none.

    Whole numbers stand for numbers, YAML's ``no`` for the word, mappings and lists for what is a line of text there.
    """
    types, found = argument_types(backend), {}
    for key, value in given.items():
        if key in OWNED:
            faults.append(f"{place}.{key}: calmlm sets this itself; {OWNED[key]}.")
        elif key not in types:
            faults.append(_unknown(key, types.keys() - OWNED.keys(), backend, place))
        else:
            found[key] = _read(key, types[key], value, faults, place)
    return found


def _unknown(key: str, known: Collection[str], backend: str, place: str) -> str:
    if backend == "trainer" and find_spec("trl") is not None and key in argument_types("sft"):
        return f"{place}.{key}: expected an argument of transformers' Trainer, but it is TRL's; set backend: sft."
    if key in FORMER:
        return f"'{key}' is no key in '{place}'; {FORMER[key]}."
    return unknown_key(key, known, place)


def _read(key: str, hint: Any, value: Any, faults: list[str], place: str) -> Any:
    where, before = f"{place}.{key}", len(faults)
    if value is False and "no" in _words(hint):
        return "no"  # which YAML reads as false
    value = read_value(FORMS.get(key, hint), value, faults, where)
    if len(faults) > before:
        return value
    if isinstance(value, float) and not math.isfinite(value) and not (key == "max_grad_norm" and value > 0):
        faults.append(f"{where}: expected a finite number, but got {show(value)}.")
    if key == "debug":
        return value if isinstance(value, str) else " ".join(value or [])
    if key == "optim_args" and isinstance(value, dict):
        return ",".join(f"{name}={setting}" for name, setting in value.items())
    return value or None if key == "fsdp" else value


def _words(hint: Any) -> set[str]:
    """The values of the enumerations in an annotation."""
    kinds = [part for part in typing.get_args(hint) if isinstance(part, type) and issubclass(part, enum.Enum)]
    return {member.value for kind in kinds for member in kind}


def faults_of(backend: str, made: Any, *, evaluates: bool) -> list[str]:
    """What the trainer would find out in the middle of training, or never.

    Args:
        backend: which trainer.
        made: an instance of its class of arguments.
        evaluates: whether there are data to evaluate on.
    """
    return [f"trainer{fault}" for fault in _faults(backend, made, evaluates)]


def _faults(backend: str, made: Any, evaluates: bool) -> Iterator[str]:
    yield from _single(made)
    yield from _evaluation(backend, made, evaluates)
    yield from _optimizing(made)
    if made.max_steps == 0 or (made.max_steps < 0 and made.num_train_epochs <= 0):
        yield (
            f": expected at least one step, but max_steps is {made.max_steps} and num_train_epochs "
            f"{made.num_train_epochs}; raise one of them."
        )
    if made.label_names not in (None, ["labels"]):
        yield f".label_names: expected [labels], as calmlm calls them, but got {show(made.label_names)}; leave it out."
    if getattr(made, "eval_packing", None) and not made.packing:
        yield (
            ".eval_packing: expected packing beside it, since only then are packed texts told apart, but it is off; "
            "set it as well."
        )
    if made.device.type == "cpu":
        for key in ("fp16", "activation_offloading"):
            if getattr(made, key, False):
                yield f".{key}: expected a GPU, but training is to run on the CPU; leave it out."
    kwargs = made.activation_checkpointing_kwargs or {}
    every = kwargs.get("every_n_layers", 1) if isinstance(kwargs, dict) else None
    if not isinstance(every, int) or every < 1:
        yield (
            f".activation_checkpointing_kwargs: expected a mapping, with 1 or more for every_n_layers, but got "
            f"{show(kwargs)}; mend it."
        )
    elif kwargs.get(KEEP, MATMULS) != MATMULS or (KEEP in kwargs and kwargs.get("use_reentrant")):
        yield (
            f".activation_checkpointing_kwargs: expected keep: {MATMULS} without use_reentrant, but got "
            f"{show(kwargs)}; leave one of them out."
        )


def _single(made: Any) -> Iterator[str]:
    """Faults of one argument by itself."""
    for key, why in IDLE.items():
        value = getattr(made, key, None)
        if value not in (None, False, 0):
            yield f".{key}: expected none, since {why}, but got {show(value)}; leave it out."
    for key, (low, high) in LIMITS.items():
        value = getattr(made, key, None)
        if isinstance(value, (int, float)) and not low <= value <= high:
            asked = f"{low} or more" if high == math.inf else f"{low} to {high}"
            yield f".{key}: expected {asked}, but got {value}; choose another."
    named = {field.name: field.metadata["choices"] for field in dataclasses.fields(made) if "choices" in field.metadata}
    for key, choices in {**named, **CHOICES}.items():
        value = getattr(made, key, None)
        if value is not None and value not in choices:
            yield f".{key}: expected {' or '.join(map(repr, choices))}, but got {show(value)}; choose another."
    if made.label_smoothing_factor and getattr(made, "loss_type", "nll") != "nll":
        yield (
            f".label_smoothing_factor: expected 0 beside loss_type: {made.loss_type}, which smooths nothing, but got "
            f"{made.label_smoothing_factor}; leave one of both out."
        )
    steps = (made.accelerator_config.gradient_accumulation_kwargs or {}).get("num_steps", 1)
    if not isinstance(steps, int) or steps < 1:
        yield (
            f".accelerator_config: expected 1 or more for num_steps, but got {show(steps)}; set "
            f"gradient_accumulation_steps instead."
        )


def _evaluation(backend: str, made: Any, evaluates: bool) -> Iterator[str]:
    """Faults of what is measured, and of what waits for it."""
    asked = made.eval_strategy != "no"
    for key, on in (("eval_strategy", asked), ("eval_on_start", made.eval_on_start)):
        if on and not evaluates:
            yield f".{key}: expected data.eval beside it, but there is none; name data, or leave this out."
    best = ["save_strategy"] if made.save_strategy == "best" else []
    best += ["load_best_model_at_end"] if made.load_best_model_at_end else []
    if best and not (asked and evaluates):
        yield f".{best[0]}: expected data.eval and an eval_strategy to find the best by, but there is none; add them."
    metric, known = made.metric_for_best_model, MEASURED[backend]
    if getattr(made, "router_aux_loss_coef", None):
        known = (*known, "aux_loss")
    if metric is None and "save_strategy" in best:
        yield f".save_strategy: expected metric_for_best_model beside 'best', but it is missing; name {known[0]!r}."
    if metric is not None and metric.removeprefix("eval_") not in known:
        yield f".metric_for_best_model: expected {' or '.join(known)}, but got {show(metric)}; choose another."


def _optimizing(made: Any) -> Iterator[str]:
    """Faults of the optimizer's and the schedule's own arguments."""
    pairs = [pair.partition("=") for pair in (made.optim_args or "").replace(" ", "").split(",") if made.optim_args]
    if not all(key and value for key, _, value in pairs):
        yield f".optim_args: expected name=value with commas, but got {show(made.optim_args)}; write it so."
        pairs = []
    known = OPTIM_ARGS.get(made.optim.value)
    unread = [key for key, _, _ in pairs if known is not None and key not in known]
    if unread:
        yield (
            f".optim_args: expected {' or '.join(known or ()) or 'none'} for {made.optim.value}, but got "
            f"{', '.join(unread)}; leave it out, or choose another optim."
        )
    if made.optim_target_modules and not made.optim.value.startswith(("galore", "apollo")):
        yield (
            f".optim_target_modules: expected galore or apollo as optim, which alone read it, but got "
            f"{made.optim.value}; leave it out."
        )
    kwargs, schedule = made.lr_scheduler_kwargs or {}, made.lr_scheduler_type.value
    if not isinstance(kwargs, dict):
        yield f".lr_scheduler_kwargs: expected a mapping, but got {show(kwargs)}; write name: value."
    elif kwargs and schedule.startswith("constant"):
        yield f".lr_scheduler_kwargs: expected none for {schedule}, but got {', '.join(kwargs)}; leave it out."
