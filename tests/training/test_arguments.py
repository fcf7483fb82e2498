"""The trainers' arguments: honoured in every form, or refused in a sentence before anything is written."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch._functorch import config as partitioning
from transformers import AutoTokenizer, TrainingArguments

from calmlm.errors import CalmError, ConfigError
from calmlm.training.arguments import FORMER, IDLE, LIMITS, MEASURED, OPTIM_ARGS, argument_types
from calmlm.training.backends import make_arguments, train_with
from calmlm.training.pipeline import train
from calmlm.training.run_folder import RunFolder
from calmlm.training.schema import load_config, parse_config
from calmlm.training.yaml import dump_yaml, parse_yaml
from tiny import tiny_model, tiny_tokenizer

BACKENDS = ["sft", "trainer"]
Settings = Callable[..., dict[str, Any]]


def go(values: dict[str, Any], **options: Any) -> Path:
    return train(parse_config(values), report=lambda line: None, **options).composition


def refused(values: dict[str, Any]) -> str:
    """What is said where a run cannot be begun; nothing has been written by then."""
    with pytest.raises(CalmError) as caught:
        go(values)
    assert not Path(values["output"]).exists(), "something was written"
    message = str(caught.value)
    assert "\n" not in message
    assert "but it refused them: " in message or message.endswith(".")
    return message


@pytest.mark.parametrize("backend", BACKENDS)
def test_names_of_elsewhere_are_led_to_what_there_is(backend: str, settings: Settings) -> None:
    """The nearest name is another thing: max_steps for max_seq_length, auto_find_batch_size for batch_size."""
    with pytest.raises(ConfigError) as caught:
        parse_config(settings(backend, **dict.fromkeys(FORMER, 1)))
    for key, instead in FORMER.items():
        assert f"'{key}' is no key in 'trainer'; {instead}." in str(caught.value)
    assert not FORMER.keys() & argument_types(backend).keys()
    named = {word for instead in FORMER.values() for word in re.findall(r"'(\w+)'", instead)}
    assert named - {"tokenizer"} <= argument_types(backend).keys()
    values = settings(backend, train_sampling_strategy="group_by_length", warmup_steps=0.1)
    assert make_arguments(backend, parse_config(values).trainer, RunFolder(values["output"]), evaluates=False)


COMPILER = {"torch_compile": True, "torch_compile_mode": "zzz"}
RECOMPUTED = {"activation_checkpointing": True}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        # acts on modules in training mode, or of known types
        ({"neftune_noise_alpha": 5}, "trainer.neftune_noise_alpha: expected none, since NEFTune adds noise"),
        ({"use_liger_kernel": True}, "trainer.use_liger_kernel: expected none"),
        ({"bf16_full_eval": True}, "trainer.bf16_full_eval: expected none"),
        ({"parallelism_config": {}}, "trainer.parallelism_config: expected none"),
        ({"parallelism_config": {"cp_size": 2}}, "trainer.parallelism_config: expected none"),
        # does nothing where it runs
        ({"fp16": True}, "trainer.fp16: expected a GPU"),
        ({"tf32": True}, "--tf32 requires"),
        # evaluation
        ({"eval_strategy": "steps"}, "trainer.eval_strategy: expected data.eval beside it"),
        ({"eval_on_start": True}, "trainer.eval_on_start: expected data.eval beside it"),
        ({"save_strategy": "best", "metric_for_best_model": "loss"}, "trainer.save_strategy: expected data.eval"),
        ({"metric_for_best_model": "accuracy"}, "trainer.metric_for_best_model: expected loss or"),
        ({"label_names": ["x"]}, "trainer.label_names: expected"),
        # the optimizer and its schedule
        ({"optim": "zzz"}, "zzz is not a valid OptimizerNames"),
        ({"optim_args": "foo=1"}, "trainer.optim_args: expected none for adamw_torch_fused, but got foo"),
        ({"optim": "sgd", "optim_args": "momentun=0.9"}, "trainer.optim_args: expected momentum or"),
        ({"optim": "sgd", "optim_args": "momentum"}, "trainer.optim_args: expected name=value"),
        ({"optim": "sgd", "optim_args": "momentum=a"}, "could not convert string to float"),
        ({"optim_target_modules": "all-linear"}, "trainer.optim_target_modules: expected galore or apollo"),
        ({"adam_epsilon": 0}, "trainer: expected weights that stay finite"),
        ({"weight_decay": -1}, "trainer.weight_decay: expected 0 or more"),
        ({"label_smoothing_factor": 2.5}, "trainer.label_smoothing_factor: expected 0 to 1"),
        ({"lr_scheduler_kwargs": "num_cycles=2"}, "trainer.lr_scheduler_kwargs: expected a mapping"),
        ({"lr_scheduler_kwargs": '{"num_cycles": 2'}, "Expecting ',' delimiter"),
        ({"lr_scheduler_type": "constant", "lr_scheduler_kwargs": {"x": 1}}, "expected none for constant, but got x"),
        ({"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": "x"}}, "unsupported operand"),
        ({"lr_scheduler_type": "inverse_sqrt", "lr_scheduler_kwargs": {"timescale": 0}}, "division by zero"),
        # batches
        ({"per_device_train_batch_size": 0}, "trainer.per_device_train_batch_size: expected 1 or more"),
        ({"per_device_eval_batch_size": 0}, "trainer.per_device_eval_batch_size: expected 1 or more"),
        ({"dataloader_num_workers": -1}, "trainer.dataloader_num_workers: expected 0 or more"),
        (
            {"dataloader_num_workers": 1, "dataloader_prefetch_factor": 0},
            "trainer.dataloader_prefetch_factor: expected",
        ),
        ({"dataloader_persistent_workers": True}, "persistent_workers option needs num_workers > 0"),
        ({"dataloader_multiprocessing_context": "zzz"}, "trainer.dataloader_multiprocessing_context: expected 'fork'"),
        ({"train_sampling_strategy": "group"}, "trainer.train_sampling_strategy: expected 'random' or"),
        # what is only tried in the first step
        (COMPILER, "Unrecognized mode=zzz"),
        (RECOMPUTED | {"activation_checkpointing_kwargs": {"zzz": 1}}, "Unexpected keyword arguments: zzz"),
        (RECOMPUTED | {"activation_checkpointing_kwargs": {"every_n_layers": 0}}, "1 or more for every_n_layers"),
        (RECOMPUTED | {"activation_checkpointing_kwargs": "zzz"}, "trainer.activation_checkpointing_kwargs: expected"),
        # files and words
        ({"accelerator_config": "/no/such.json"}, "No such file or directory: '/no/such.json'"),
        ({"accelerator_config": {"gradient_accumulation_kwargs": {"num_steps": 0}}}, "1 or more for num_steps"),
        ({"fsdp": True, "fsdp_config": "/no/such.json"}, "No such file or directory: '/no/such.json'"),
        ({"fsdp": True}, "Using fsdp only works in distributed training"),
        ({"log_level": "loud"}, "trainer.log_level: expected 'detail' or 'debug'"),
        ({"include_num_input_tokens_seen": "some"}, "trainer.include_num_input_tokens_seen: expected 'all' or"),
        ({"report_to": "zzz"}, "but got 'zzz'; choose one"),
        ({"debug": "zzz"}, "zzz is not a valid DebugOption"),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:torch.utils.checkpoint. the use_reentrant parameter")
def test_refused_before_anything_is_written(
    trainer: dict[str, Any], message: str, backend: str, settings: Settings
) -> None:
    values = settings(backend, max_steps=2, **trainer)
    values["model"]["connections"] = 2
    assert message in refused(values)


@pytest.mark.parametrize("value", [None, "false"])
def test_later_trainings_do_not_find_what_one_set_in_the_environment(
    value: str | None, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    if value is not None:
        monkeypatch.setenv("ACCELERATE_USE_FSDP", value)
    before = dict(os.environ)
    refused(settings("trainer", max_steps=2, fsdp=True, torch_compile=True))
    assert dict(os.environ) == before


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        ({"activation_offloading": True}, "trainer.activation_offloading: expected a GPU"),
        ({"eval_packing": True}, "trainer.eval_packing: expected packing beside it"),
        ({"packing": True, "packing_strategy": "zzz"}, "trainer.packing_strategy: expected 'bfd' or"),
        ({"loss_type": "zzz"}, "trainer.loss_type: expected 'nll' or 'dft'"),
        (
            {"loss_type": "dft", "label_smoothing_factor": 0.1},
            "label_smoothing_factor: expected 0 beside loss_type: dft",
        ),
        ({"truncation_mode": "keep_end"}, "trainer.truncation_mode: expected 'keep_start'"),
        ({"pad_to_multiple_of": 0}, "trainer.pad_to_multiple_of: expected 1 or more"),
        ({"pad_to_multiple_of": "zz"}, "invalid literal"),
        ({"router_aux_loss_coef": 0.1}, "no auxiliary loss to weight"),
        ({"eos_token": "zzz"}, "trainer.eos_token: expected a token of the tokenizer, but it has no 'zzz'"),
        ({"pad_token": "zzz"}, "trainer.pad_token: expected a token of the tokenizer, but it has no 'zzz'"),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:The `'keep_end'` truncation mode", "ignore:`pad_token` is deprecated")
def test_refused_of_trls(trainer: dict[str, Any], message: str, settings: Settings) -> None:
    assert message in refused(settings("sft", max_steps=2, **trainer))


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        ({"loss_type": "dft"}, "trainer.loss_type: expected nll beside words: pointer"),
        ({"router_aux_loss_coef": 0.1}, "trainer.router_aux_loss_coef: expected none beside words: pointer"),
        ({"metric_for_best_model": "entropy"}, "trainer.metric_for_best_model: expected loss beside words: pointer"),
    ],
    ids=str,
)
def test_what_trl_makes_of_states_is_refused_beside_pointers(
    trainer: dict[str, Any], message: str, settings: Settings
) -> None:
    values = settings("sft", max_steps=2, **trainer)
    values["model"] |= {"words": "pointer", "connections": "none"}
    assert message in refused(values)


def test_rows_of_several_texts(settings: Settings, tmp_path: Path) -> None:
    values = settings("sft", max_steps=2, packing=True, packing_strategy="wrapped")
    values["model"]["refresh"] = False
    assert "trainer.packing_strategy: expected 'bfd', since with refresh: false" in refused(values)
    tiny_model("opt", seed=1).save_pretrained(tmp_path / "opt")
    tiny_tokenizer().save_pretrained(tmp_path / "opt")
    values = settings("sft", max_steps=2, padding_free=True)
    values["model"]["anchor"] = str(tmp_path / "opt")
    assert "trainer.padding_free: expected an anchor that keeps texts apart" in refused(values)


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        ({"learning_rate": float("nan")}, "trainer.learning_rate: expected a finite number, but got nan."),
        ({"logging_steps": float("inf")}, "trainer.logging_steps: expected a finite number, but got inf."),
        ({"learning_rate": "1e-3"}, "trainer.learning_rate: expected a number, but got '1e-3'."),
        ({"max_steps": None}, "trainer.max_steps: expected a whole number, but got None."),
        ({"lr_scheduler_kwargs": [1]}, "trainer.lr_scheduler_kwargs: expected a mapping or text, but got [1]."),
        ({"liger_kernel_config": {"rope": 3}}, "trainer.liger_kernel_config.rope: expected true or false, but got 3."),
        ({"length_column_name": "x"}, "trainer.length_column_name: calmlm sets this itself"),
        ({"packing": True}, "trainer.packing: expected an argument of transformers' Trainer, but it is TRL's; set"),
    ],
    ids=str,
)
def test_faults_of_the_file(trainer: dict[str, Any], message: str, settings: Settings) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(settings("trainer", **trainer))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("save_strategy: no", {"save_strategy": "no"}),
        ("eval_strategy: no", {"eval_strategy": "no"}),
        ("logging_strategy: no", {"logging_strategy": "no"}),
        ("debug: [underflow_overflow]", {"debug": "underflow_overflow"}),
        ("debug: null", {"debug": ""}),
        ("optim_args: {momentum: 0.9, nesterov: true}", {"optim_args": "momentum=0.9,nesterov=True"}),
        ("fsdp: no", {"fsdp": None}),
        ("fsdp: true", {"fsdp": True}),
        ("fsdp: full_shard", {"fsdp": "full_shard"}),
        ("report_to: null", {"report_to": None}),
        ("adam_beta1: 0", {"adam_beta1": 0.0}),
        ("learning_rate: 1e-3", {"learning_rate": 0.001}),
        ("logging_steps: 0.1", {"logging_steps": 0.1}),
        ("max_grad_norm: .inf", {"max_grad_norm": float("inf")}),
        ("lr_scheduler_kwargs: '{\"num_cycles\": 2}'", {"lr_scheduler_kwargs": '{"num_cycles": 2}'}),
        ("lr_scheduler_kwargs: {num_cycles: 2}", {"lr_scheduler_kwargs": {"num_cycles": 2}}),
        ("run_name: '1e5'", {"run_name": "1e5"}),
        ("include_num_input_tokens_seen: no", {"include_num_input_tokens_seen": False}),
    ],
)
def test_forms_of_yaml(written: str, meant: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(
        f"output: x\nmodel: {{anchor: a, augmenting: b}}\ndata: {{train: t}}\nbackend: trainer\ntrainer:\n  {written}\n"
    )
    config = load_config(path)
    assert config.trainer == meant
    assert all(type(value) is type(meant[key]) for key, value in config.trainer.items())
    path.write_text(dump_yaml(config.to_dict()))
    assert load_config(path) == config


@pytest.mark.parametrize("report_to", [None, "none", ["none"], []], ids=str)
def test_no_reports(report_to: Any, settings: Settings) -> None:
    folder = go(settings("trainer", max_steps=1, report_to=report_to)).parent
    assert not (folder / "logs").exists()


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_argument_is_written_down_as_it_was_given(backend: str, settings: Settings) -> None:
    """The trainers change mappings that they are given."""
    given = {"gradient_accumulation_kwargs": {"num_steps": 2}}
    folder = go(settings(backend, max_steps=1, accelerator_config=given)).parent
    found = yaml.safe_load((folder / "config.yaml").read_text())
    assert found["trainer"]["accelerator_config"] == {"gradient_accumulation_kwargs": {"num_steps": 2}}


def test_text_that_looks_like_a_number() -> None:
    for text in ("1e5", "123e4567", "1.", ".5e1", "no", "null", "12", "~", "~/x"):
        assert parse_yaml(dump_yaml({"key": text}), "x") == {"key": text}
    assert parse_yaml(dump_yaml({"key": 1e-5}), "x") == {"key": 1e-5}


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_evaluations_measure(backend: str, settings: Settings) -> None:
    """The names that a best model can be chosen by are those that the trainers give."""
    values = settings(backend, max_steps=1, eval_strategy="steps", eval_steps=1, save_steps=1)
    values["data"]["eval"] = values["data"]["train"]
    state = json.loads((RunFolder(go(values).parent).last_checkpoint() / "trainer_state.json").read_text())
    names = {name.removeprefix("eval_") for entry in state["log_history"] for name in entry if name.startswith("eval_")}
    assert names == set(MEASURED[backend])
    values["trainer"] |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_accuracy"}
    assert "trainer.metric_for_best_model: expected" in refused(values | {"output": values["output"] + "-2"})


def test_names_are_the_trainers_own() -> None:
    """What stands in tables here must not fall behind the trainers."""
    from transformers.training_args import OptimizerNames

    assert set(IDLE) | set(LIMITS) <= argument_types("sft").keys()
    assert set(OPTIM_ARGS) <= {name.value for name in OptimizerNames}


@pytest.mark.parametrize("optim", sorted(OPTIM_ARGS))
def test_what_optimizers_read(optim: str, tmp_path: Path) -> None:
    """Each name that is let through changes the optimizer."""
    from transformers import Trainer

    def kwargs(**more: str) -> Any:
        made = make_arguments(
            "trainer", {"use_cpu": True, "optim": optim, **more}, RunFolder(tmp_path), evaluates=False
        )
        return {key: value for key, value in Trainer.get_optimizer_cls_and_kwargs(made)[1].items() if key != "lr"}

    for name in OPTIM_ARGS[optim]:
        found = kwargs(optim_args=f"{name}={'true' if name in ('nesterov', 'centered') else 0.25}")
        assert found != kwargs(), name
        assert name in found


def test_another_token_ends_each_text(settings: Settings, anchor_folder: Path) -> None:
    """TRL sets it behind calmlm's back: the rows are made by then."""
    from calmlm.training import pipeline

    ends: list[int] = []
    values = settings("sft", max_steps=1, eos_token="a")
    make = pipeline.make_trainer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            pipeline, "make_trainer", lambda *args: ends.extend(row["input_ids"][-1] for row in args[4]) or make(*args)
        )
        folder = go(values)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.eos_token == "a"
    assert set(ends) == {tokenizer.eos_token_id}
    generation = json.loads((folder / "generation_config.json").read_text())
    assert tokenizer.eos_token_id in generation["eos_token_id"]


class TestPadding:
    def anchored(self, values: dict[str, Any], folder: Path, tokenizer: Any) -> dict[str, Any]:
        tiny_model("llama", seed=1).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        values["model"]["anchor"] = str(folder)
        return values

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_a_pad_token_beyond_the_embeddings(self, backend: str, settings: Settings, tmp_path: Path) -> None:
        tokenizer = tiny_tokenizer()
        tokenizer.add_special_tokens({"pad_token": "<fill>"})
        values = self.anchored(settings(backend, max_steps=2), tmp_path / "anchor", tokenizer)
        assert "tokenizer: expected a pad token with an id below 97" in refused(values)

    @pytest.mark.filterwarnings("ignore:`pad_token` is deprecated")
    def test_one_that_is_named(self, settings: Settings, tmp_path: Path) -> None:
        tokenizer = tiny_tokenizer()
        tokenizer.add_tokens(["<fill>"])
        values = self.anchored(settings("sft", max_steps=2, pad_token="<fill>"), tmp_path / "anchor", tokenizer)
        assert "trainer.pad_token: expected a pad token with an id below 97" in refused(values)
        values["trainer"]["pad_token"] = "</s>"
        assert AutoTokenizer.from_pretrained(go(values)).pad_token == "</s>"

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_a_tokenizer_with_nothing_to_pad_with(self, backend: str, settings: Settings, tmp_path: Path) -> None:
        tokenizer = tiny_tokenizer()
        tokenizer.pad_token = tokenizer.eos_token = None
        values = self.anchored(settings(backend, max_steps=2), tmp_path / "anchor", tokenizer)
        assert "tokenizer: expected one with a pad token or an end-of-text token" in refused(values)

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_the_end_of_text_pads_where_there_is_nothing_else(
        self, backend: str, settings: Settings, tmp_path: Path
    ) -> None:
        tokenizer = tiny_tokenizer()
        tokenizer.pad_token = None
        values = self.anchored(settings(backend, max_steps=2), tmp_path / "anchor", tokenizer)
        other = settings(backend, max_steps=2) | {"output": values["output"] + "-2"}
        one, two = (load_file(go(each) / "model.safetensors") for each in (values, other))
        for name, tensor in one.items():
            torch.testing.assert_close(tensor, two[name])


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({"torch_compile": True, "activation_checkpointing_kwargs": {"keep": "matmuls"}}, True),
        ({"torch_compile": True, "activation_checkpointing_kwargs": {"use_reentrant": False}}, False),
        ({"torch_compile": True}, False),
        ({"activation_checkpointing_kwargs": {"keep": "matmuls"}}, False),
    ],
    ids=str,
)
def test_a_compiled_run_keeps_what_it_is_told_to(given: dict[str, Any], kept: bool) -> None:
    class Looking:
        args = TrainingArguments(activation_checkpointing=True, use_cpu=True, **given)

        def train(self, resume_from_checkpoint: str | None) -> bool:
            return bool(partitioning.aggressive_recomputation)

    assert train_with(Looking(), None) is kept
    assert not partitioning.aggressive_recomputation
