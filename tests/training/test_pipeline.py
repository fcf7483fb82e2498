"""A run from file to composition: what it writes, how it goes on after a stop, and what it never destroys."""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoTokenizer

import calmlm
from calmlm.cli import main
from calmlm.errors import CalmError, ConfigError, DataError
from calmlm.files.storage import replacing_folder
from calmlm.training import pipeline as run_module
from calmlm.training.pipeline import train
from calmlm.training.run_folder import RunFolder
from calmlm.training.schema import TrainingConfig, parse_config
from gguf_files import write_gguf
from tiny import tiny_model, tiny_tokenizer, tiny_tokens
from tokenizers_tiny import tokenizer
from training.callbacks import interrupt_at

BACKENDS = ["sft", "trainer"]
Settings = Callable[..., dict[str, Any]]


def go(values: dict[str, Any], **options: Any) -> Path:
    return train(parse_config(values), report=lambda line: None, **options).composition


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_run_gives_a_composition(backend: str, settings: Settings) -> None:
    values = settings(backend, num_train_epochs=4)
    values["data"]["eval"] = values["data"]["train"]
    lines: list[str] = []
    result = train(parse_config(values), report=lines.append)
    run = RunFolder(values["output"])

    assert result.composition == run.composition
    assert lines[-1].startswith("40 examples; ")
    model = calmlm.CalmForCausalLM.from_pretrained(run.composition)
    tokens = tiny_tokens()
    with torch.no_grad():
        composed = model(tokens).logits
        with model.disable_composition():
            assert not torch.equal(model(tokens).logits, composed)

    state = json.loads((run.last_checkpoint() / "trainer_state.json").read_text())
    losses = [entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry]
    assert losses[-1] < losses[0] - 0.1
    assert list(run.logs.glob("events.out.tfevents.*")), "TensorBoard's log"
    assert parse_config(yaml.safe_load(run.config.read_text())) == parse_config(values)
    assert not [path for path in run.path.iterdir() if path.name.startswith(".")], "no temporary files"


@pytest.mark.parametrize("backend", BACKENDS)
def test_checkpoints_hold_the_composition_alone(backend: str, settings: Settings) -> None:
    run = RunFolder(go(settings(backend)).parent)
    names = {path.name for path in run.checkpoints.glob("checkpoint-*")}
    assert names == {"checkpoint-15", "checkpoint-20"}, "save_total_limit keeps two"
    for folder in [*run.checkpoints.glob("checkpoint-*"), run.composition]:
        tensors = load_file(folder / "model.safetensors")
        assert tensors
        assert all(name.startswith("model.connectors.") for name in tensors)
        assert not list(folder.glob("*.bin*")) or {path.name for path in folder.glob("*.bin")} == {"training_args.bin"}
    assert calmlm.CalmForCausalLM.from_pretrained(run.last_checkpoint())


def test_tokenizer_is_saved_beside_the_composition(settings: Settings) -> None:
    from calmlm.tokens.lookup import load_tokenizer

    assert len(load_tokenizer([str(go(settings()))])) == 97


@pytest.mark.parametrize("backend", BACKENDS)
def test_resumed_equals_uninterrupted(backend: str, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    values = settings(backend, warmup_steps=0)
    whole = load_file(go({**values, "output": values["output"] + "-whole"}) / "model.safetensors")

    with monkeypatch.context() as patch:
        interrupt_at(8, run_module, patch)
        with pytest.raises(KeyboardInterrupt):
            go(values)
    run = RunFolder(values["output"])
    assert not run.composition.exists()
    assert run.last_checkpoint() == run.checkpoints / "checkpoint-5"
    resumed = load_file(go(values, resume=True) / "model.safetensors")
    for name, tensor in whole.items():
        torch.testing.assert_close(resumed[name], tensor, atol=1e-6, rtol=1e-5)


def test_the_seed_decides_the_first_weights_too(settings: Settings) -> None:
    values = settings(max_steps=1)
    first = load_file(go({**values, "output": values["output"] + "-1"}) / "model.safetensors")
    torch.manual_seed(12345)
    second = load_file(go({**values, "output": values["output"] + "-2"}) / "model.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_checkpoint_cut_short_is_passed_over(settings: Settings) -> None:
    run = RunFolder(go(settings()).parent)
    (run.checkpoints / "checkpoint-20" / "trainer_state.json").unlink()
    assert run.last_checkpoint() == run.checkpoints / "checkpoint-15"


def test_resume_without_a_checkpoint_starts_at_the_beginning(settings: Settings) -> None:
    lines: list[str] = []
    train(parse_config(settings()), resume=True, report=lines.append)
    assert "No complete checkpoint yet: starting at the beginning." in lines


def test_going_on_with_a_saved_composition(settings: Settings) -> None:
    values = settings()
    first = go(values)
    second = go({**values, "output": values["output"] + "-2", "model": {"composition": str(first)}})
    before, after = (load_file(folder / "model.safetensors") for folder in (first, second))
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_an_output_that_holds_files_is_refused(settings: Settings) -> None:
    values = settings()
    folder = go(values).parent
    before = snapshot(folder)
    with pytest.raises(ConfigError, match="Expected an empty folder for the output, but .* holds files; name another"):
        go(values)
    assert snapshot(folder) == before


@pytest.mark.parametrize("option", ["resume", "overwrite"])
def test_foreign_files_are_never_touched(option: str, settings: Settings) -> None:
    values = settings()
    Path(values["output"]).mkdir()
    (Path(values["output"]) / "thesis.tex").write_text("years of work")
    (Path(values["output"]) / "config.yaml").write_text("foo: 1")  # any program's
    with pytest.raises(ConfigError, match="Expected a run of calmlm in .*, but it holds other files"):
        go(values, **{option: True})


def test_resume_and_overwrite_exclude_each_other(settings: Settings) -> None:
    with pytest.raises(ConfigError, match="Expected --resume or --overwrite, but got both"):
        go(settings(), resume=True, overwrite=True)


def test_a_file_is_no_output(settings: Settings) -> None:
    values = settings()
    Path(values["output"]).write_text("")
    with pytest.raises(ConfigError, match="Expected a folder for the output, but .* is a file"):
        go(values)


def test_overwriting_keeps_the_old_result_until_the_new_one_is_there(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = settings()
    composition = go(values)
    before = snapshot(composition)
    with monkeypatch.context() as patch:
        interrupt_at(3, run_module, patch)
        with pytest.raises(KeyboardInterrupt):
            go(values, overwrite=True)
    assert snapshot(composition) == before
    values["trainer"]["learning_rate"] = 0.02
    go(values, overwrite=True)
    assert snapshot(composition).keys() == before.keys()
    assert snapshot(composition)["model.safetensors"] != before["model.safetensors"]


def broken(values: dict[str, Any], part: str, key: str, value: Any) -> dict[str, Any]:
    return {**values, part: {**values[part], key: value}}


@pytest.mark.parametrize(
    ("part", "key", "value", "message"),
    [
        ("model", "anchor", "no/such-model", r"The anchor must be the id or folder .*'no/such-model'"),
        ("model", "augmenting", "/no/such/folder", r"/no/such/folder"),
        ("model", "connections", [[99, 0]], r"layer of the augmenting model must lie between 0 and 3, but got 99"),
        ("model", "connections", [[1, 1], [1, 1]], r"given twice"),
        ("model", "connections", [], r"At least one connection"),
        ("model", "num_heads", 7, r"num_heads must be a whole number that divides the anchor's width 48, but got 7"),
        ("data", "train", "none.jsonl", r"Expected a data file at none.jsonl, but there is none"),
        ("data", "max_length", 4, r"line \d+: expected a prompt shorter than the context of 4 tokens"),
        ("data", "max_length", 500, r"data.max_length: expected at most 128, the shorter context"),
        ("model", "dtype", "bf16", r"dtype must be 'auto', .* but got 'bf16'"),
        ("model", "dtype", "int8", r"dtype must be 'auto', .* but got 'int8'"),
        (
            "trainer",
            "lr_scheduler_type",
            "wavy",
            r"trainer: expected arguments that SFTConfig takes, but it refused them",
        ),
    ],
)
def test_faults_are_found_before_anything_is_written(
    settings: Settings, part: str, key: str, value: Any, message: str
) -> None:
    values = settings()
    folder = go(values).parent
    before = snapshot(folder)
    with pytest.raises(CalmError, match=message) as caught:
        go(broken(values, part, key, value), overwrite=True)
    assert "\n" not in str(caught.value)
    assert snapshot(folder) == before


def test_files_that_are_missing_are_found_before_models_are_loaded(settings: Settings) -> None:
    """All of them at once: what is retained, the text of a stage, the text and the examples for connections."""
    values = broken(settings(), "data", "train", "none.jsonl")
    values["model"] |= {"anchor": "no/such-model", "plain_text": "plain.txt", "development": "some.jsonl"}
    values |= {"retain": {"text": "general.txt"}, "align": {"text": "stage.txt"}}
    with pytest.raises(ConfigError, match=r"^The run has 5 faults: ") as caught:
        go(values)
    assert all(name in str(caught.value) for name in ("none", "general", "stage", "plain", "some"))


@pytest.mark.parametrize(
    "options",
    [
        {"kind": "flamingo"},
        {"kind": "legonn"},
        {"kind": "legonn", "ingestor": "anchor", "top_k": 4},
        {"kind": "flamingo", "projection": "residual"},
    ],
    ids=str,
)
def test_other_connectors_train_save_and_generate(
    settings: Settings, options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    values = settings(max_steps=2)
    values["model"]["connector"] = {"rank": 4, **options}
    folder = go(values)
    model = calmlm.CalmForCausalLM.from_pretrained(folder)
    assert options.items() <= model.config.augmenting["augmenting"]["connector"].items()
    gates = [p for name, p in model.model.connectors.named_parameters() if name.endswith(("gate", "o_proj.up.weight"))]
    assert gates
    assert all(gate.abs().max() > 0 for gate in gates)
    assert main(["generate", str(folder), "--prompt", "1+2=", "--max-new-tokens", "3"]) == 0
    assert capsys.readouterr().out


def test_several_models_with_tokenizers_of_their_own(
    settings: Settings, tmp_path: Path, augmenting_folder: Path
) -> None:
    other = tokenizer("bytes")
    tiny_model("mistral", seed=4, vocab_size=len(other)).save_pretrained(tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    values = settings(max_steps=2)
    values["model"] |= {
        "augmenting": {"law": str(augmenting_folder), "code": str(tmp_path / "other")},
        "connections": {"law": 1, "code": "top"},
        "alignment": {"code": "retokenize"},
    }
    model = calmlm.CalmForCausalLM.from_pretrained(go(values))
    reads = {name: (entry["reads"], entry.get("alignment")) for name, entry in model.config.augmenting.items()}
    assert reads == {"law": ("tokens", None), "code": ("text", "retokenize")}


def test_no_tokenizer(settings: Settings, tmp_path: Path, augmenting_folder: Path) -> None:
    tiny_model("llama", seed=1).save_pretrained(tmp_path / "bare")
    values = broken(settings(), "model", "anchor", str(tmp_path / "bare"))
    with pytest.raises(DataError, match="Text needs a tokenizer, but none was found in .*bare; name a tokenizer's id"):
        go(values)


def test_a_tokenizer_by_name(settings: Settings, tmp_path: Path, anchor_folder: Path) -> None:
    tiny_model("llama", seed=1).save_pretrained(tmp_path / "bare")
    values = broken(settings(max_steps=1), "model", "anchor", str(tmp_path / "bare"))
    assert go({**values, "tokenizer": str(anchor_folder)}).is_dir()


class TestReplacingFolder:
    def test_new(self, tmp_path: Path) -> None:
        with replacing_folder(tmp_path / "a" / "b") as fresh:
            (fresh / "x").write_text("1")
        assert snapshot(tmp_path) == {"a/b/x": b"1"}

    def test_failure_leaves_the_old_one(self, tmp_path: Path) -> None:
        (tmp_path / "b").mkdir()
        (tmp_path / "b" / "x").write_text("old")
        with pytest.raises(KeyboardInterrupt), replacing_folder(tmp_path / "b") as fresh:
            (fresh / "x").write_text("new, and only ha")
            raise KeyboardInterrupt
        assert snapshot(tmp_path) == {"b/x": b"old"}
        assert [path.name for path in tmp_path.iterdir()] == ["b"]

    def test_replaces_as_a_whole(self, tmp_path: Path) -> None:
        (tmp_path / "b").mkdir()
        (tmp_path / "b" / "stale").write_text("old")
        with replacing_folder(tmp_path / "b") as fresh:
            (fresh / "x").write_text("new")
        assert snapshot(tmp_path) == {"b/x": b"new"}
        assert [path.name for path in tmp_path.iterdir()] == ["b"]


@pytest.mark.parametrize("best", [False, True])
@pytest.mark.parametrize("kept", [True, False])
def test_a_finished_run_stays_as_it_is(kept: bool, best: bool, settings: Settings) -> None:
    """Whether its composition is there, or was still to be written."""
    values = settings(max_steps=7, lr_scheduler_type="constant", save_steps=7)
    if best:
        values["data"]["eval"] = values["data"]["train"]
        values["trainer"] |= {
            "load_best_model_at_end": True,
            "eval_strategy": "steps",
            "eval_steps": 1,
            "save_steps": 1,
        }
        values["trainer"] |= {"learning_rate": 0.5, "save_total_limit": 1}  # so fast that the last step is not the best
    run = RunFolder(go(values).parent)
    before = load_file(run.composition / "model.safetensors")
    checkpoint = snapshot(run.last_checkpoint())
    if not kept:
        shutil.rmtree(run.composition)
    lines: list[str] = []
    result = train(parse_config(values), resume=True, report=lines.append)
    assert result.steps == 7
    assert any("nothing is left to train" in line for line in lines)
    after = load_file(run.composition / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert snapshot(run.last_checkpoint()) == checkpoint


@pytest.mark.parametrize("length", [{"max_steps": 7}, {"num_train_epochs": 1}], ids=str)
def test_a_finished_run_still_says_what_it_was(length: dict[str, Any], settings: Settings) -> None:
    """Its card told of no steps, and its result of a loss of 0."""
    values = settings(logging_steps=1, save_steps=1, **length)
    composition = go(values)
    card = (composition / "README.md").read_text()
    assert "| training loss | " in card
    lines: list[str] = []
    result = train(parse_config(values), resume=True, report=lines.append)
    assert (composition / "README.md").read_text() == card
    assert math.isnan(result.loss)
    assert sum("left to train" in line for line in lines) == 1


def damage(path: Path) -> None:
    """As a full disk leaves a file."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("empty", [True, False])
@pytest.mark.parametrize(
    "name", ["trainer_state.json", "config.json", "model.safetensors", "optimizer.pt", "rng_state.pth"]
)
def test_a_damaged_checkpoint_is_passed_over(name: str, empty: bool, settings: Settings) -> None:
    run = RunFolder(go(settings()).parent)
    path = run.checkpoints / "checkpoint-20" / name
    path.write_bytes(b"") if empty else damage(path)
    assert run.last_checkpoint() == run.checkpoints / "checkpoint-15"


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"connections": [[0, 0]]}, "connections"),
        ({"num_heads": 2}, "connector"),
        ({"connector": {"kind": "flamingo"}}, "connector"),
        ({"anchor": "another"}, "fingerprint of the anchor"),
    ],
)
def test_a_checkpoint_of_another_composition_is_not_gone_on_from(
    changed: dict[str, Any], named: str, settings: Settings, tmp_path: Path
) -> None:
    values = settings()
    run = RunFolder(go(values).parent)
    before = snapshot(run.path)
    if "anchor" in changed:
        tiny_model("llama", seed=77).save_pretrained(tmp_path / "another")
        shutil.copytree(tmp_path / "another", tmp_path / "other", dirs_exist_ok=True)
        for path in Path(values["model"]["anchor"]).glob("tokenizer*"):
            shutil.copy(path, tmp_path / "other")
        changed = {"anchor": str(tmp_path / "other")}
    values["model"] |= changed
    with pytest.raises(ConfigError, match=f"--resume: .*{named}"):
        go(values, resume=True)
    assert snapshot(run.path) == before


def test_a_checkpoint_without_its_optimizer_is_not_gone_on_from(settings: Settings) -> None:
    values = settings(save_only_model=True)
    go(values)
    with pytest.raises(ConfigError, match="--resume: expected optimizer.pt"):
        go(values, resume=True)


def test_other_settings_are_named(settings: Settings) -> None:
    values = settings()
    go(values)
    values["trainer"] |= {"learning_rate": 0.001, "num_train_epochs": 3}
    lines: list[str] = []
    train(parse_config(values), resume=True, report=lines.append)
    assert "Other settings than before: trainer.learning_rate, trainer.num_train_epochs." in lines
    assert not any(line.startswith("Other data") for line in lines)


def test_other_data_is_named(settings: Settings) -> None:
    values = settings()
    go(values)
    task = Path(values["data"]["train"])
    rows = task.read_text(encoding="utf-8").splitlines()
    values["trainer"]["num_train_epochs"] = 3
    for other, told in (
        ([*rows[1:], rows[1]], f"as many examples, {len(rows)}, but others"),
        (rows[1:], f"{len(rows) - 1} examples in place of {len(rows)}"),
    ):
        task.write_text("\n".join(other), encoding="utf-8")
        lines: list[str] = []
        train(parse_config(values), resume=True, report=lines.append)
        assert any(line.startswith(f"Other data than before: {told};") for line in lines), lines
        values["trainer"]["num_train_epochs"] += 1


@pytest.mark.parametrize(
    "refused",
    [
        {"per_device_train_batch_size": 0},
        {"optim": "adamw_bnb_8bit"},
        {"adam_beta1": 2.0},
        {"lr_scheduler_type": "cosine_with_min_lr"},
        {"lr_scheduler_kwargs": {"x": 1}},
        {"report_to": ["wandb"]},
        {"loss_type": "zzz"},
        {"gradient_accumulation_steps": 0},
        {"use_liger_kernel": True},
        {"seed": -1},
        {"data_seed": 2**40},
        {"max_steps": 0},
        {"num_train_epochs": 0},
        {"dataloader_drop_last": True, "per_device_train_batch_size": 64},
    ],
    ids=str,
)
def test_arguments_that_a_trainer_refuses_change_nothing(refused: dict[str, Any], settings: Settings) -> None:
    values = settings()
    run = RunFolder(go(values).parent)
    before = snapshot(run.path)
    with pytest.raises(ConfigError, match=r"^trainer[:.]"):
        go({**values, "trainer": values["trainer"] | refused}, overwrite=True)
    assert snapshot(run.path) == before


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("file/run", "Expected a folder for the output"),
        ("/proc/run", "Expected a folder for the output"),
        ("a\0b", "output: a path or an id must be a name that a file can have"),
    ],
)
def test_an_output_that_cannot_be_written(place: str, said: str, settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    values = settings()
    values["output"] = place if place.startswith("/") else str(tmp_path / place)
    with pytest.raises(ConfigError, match=said):
        go(values)


def test_ids_beyond_the_anchors_are_named(settings: Settings, anchor_folder: Path, tmp_path: Path) -> None:
    large = copy.deepcopy(AutoTokenizer.from_pretrained(anchor_folder))
    large.add_tokens([f"{first}+{second}" for first in range(10) for second in range(10)])
    large.save_pretrained(tmp_path / "large")
    values = settings() | {"tokenizer": str(tmp_path / "large")}
    with pytest.raises(CalmError, match="ids below|must lie below|share token ids"):
        go(values)
    assert not Path(values["output"]).exists()


def test_a_view_that_shows_nothing_is_refused(settings: Settings, tmp_path: Path) -> None:
    """The data are prompts and completions, and the view shows the content of messages."""
    values = settings()
    for role in ("anchor", "augmenting"):
        tiny_model("llama", vocab_size=len(tiny_tokenizer())).save_pretrained(tmp_path / role)
        tiny_tokenizer().save_pretrained(tmp_path / role)
        values["model"][role] = str(tmp_path / role)
    values["model"]["augmenting_view"] = "bare"
    with pytest.raises(ConfigError, match=r"model.augmenting_view: .* would see nothing"):
        go(values)


def test_an_empty_output_is_refused(settings: Settings) -> None:
    with pytest.raises(ConfigError, match="output: expected a folder"):
        parse_config(settings() | {"output": ""})


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_run_at_home_goes_on_there(
    backend: str, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trainer writes ``~`` out too: the checkpoints lie where the run looks for them."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.setenv("HOME", str(tmp_path))
    values = settings(backend, max_steps=5) | {"output": "~/runs/x"}
    run = RunFolder(tmp_path / "runs" / "x")
    assert go(values) == run.composition
    assert not list((tmp_path / "cwd").iterdir())
    values["trainer"]["max_steps"] = 8
    lines: list[str] = []
    train(parse_config(values), resume=True, report=lines.append)
    assert lines[0] == f"Going on from {run.checkpoints / 'checkpoint-5'}."
    config = TrainingConfig(
        "~/runs/y", parse_config(values).model, parse_config(values).data, trainer=values["trainer"]
    )
    assert train(config, report=lines.append).composition == tmp_path / "runs" / "y" / "composition"
    assert not list((tmp_path / "cwd").iterdir())


@pytest.mark.parametrize("backend", BACKENDS)
def test_words_are_trained_alone(backend: str, settings: Settings, tmp_path: Path) -> None:
    values = settings(backend, num_train_epochs=2, learning_rate=1e-2)
    (tmp_path / "plain.txt").write_text("the cat\n\nthe dog\n", encoding="utf-8")
    values["model"] |= {"words": "map", "connections": "none", "plain_text": str(tmp_path / "plain.txt")}
    composition = go(values)
    model = calmlm.CalmForCausalLM.from_pretrained(composition)
    words = model.model.connectors["augmenting"][-1]
    assert words.opening.item() > 0 and float(words.map.weight.abs().max()) > 0
    assert all(".map." not in name for name, p in model.named_parameters() if p.requires_grad)
    values["model"]["plain_text"] = str(tmp_path / "none.txt")
    with pytest.raises(DataError, match=r"none\.txt"):
        go(values, overwrite=True)
    assert calmlm.CalmForCausalLM.from_pretrained(composition)


@pytest.mark.parametrize("backend", BACKENDS)
def test_grafts_and_adapters_are_trained_and_gone_on_with(backend: str, settings: Settings, tmp_path: Path) -> None:
    values = settings(backend, num_train_epochs=1, learning_rate=1e-2, gradient_checkpointing=True)
    lines = [f"the quick fox {number} jumps over {number * 7} lazy dogs" for number in range(12)]
    (tmp_path / "plain.txt").write_text("\n".join(lines), encoding="utf-8")
    examples = [json.dumps({"prompt": line[:20], "completion": line[20:]}) for line in lines]
    (tmp_path / "development.jsonl").write_text("\n".join(examples), encoding="utf-8")
    values["model"] |= {
        "connections": "aligned-1", "connector": {"kind": "graft"}, "adapters": 2,
        "plain_text": str(tmp_path / "plain.txt"), "development": str(tmp_path / "development.jsonl"),
    }  # fmt: skip
    model = calmlm.CalmForCausalLM.from_pretrained(go(values))
    graft, adapters = model.model.connectors["augmenting"]
    assert graft.correction.weight.abs().max() > 0
    assert all(adapter.up.weight.abs().max() > 0 for adapter in adapters.maps.values())
    assert model.config.augmenting["augmenting"]["tried"]
    more = settings(backend, num_train_epochs=2, learning_rate=1e-2) | {"model": values["model"]}
    assert go(more, resume=True)
    more["model"] = {**values["model"], "adapters": 3}
    with pytest.raises(ConfigError, match="another adapters of augmenting"):
        go(more, resume=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_pointers_are_trained_and_gone_on_with(backend: str, settings: Settings) -> None:
    values = settings(backend, num_train_epochs=1, learning_rate=1e-2)
    values["model"] |= {"words": "pointer", "connections": "none"}
    composition = go(values)
    words = calmlm.CalmForCausalLM.from_pretrained(composition).model.connectors["augmenting"][-1]
    assert words.opening.item() > 0
    assert go(settings(backend, num_train_epochs=2, learning_rate=1e-2) | {"model": values["model"]}, resume=True)


@pytest.mark.filterwarnings("ignore:.*tie:UserWarning")
def test_models_in_gguf_files_are_trained_over(settings: Settings, tmp_path: Path) -> None:
    write_gguf(tmp_path / "m_B.gguf", seed=1)
    write_gguf(tmp_path / "m_A.gguf", seed=2, blocks=True)
    values = settings("sft", num_train_epochs=1)
    values["model"] |= {
        "anchor": {"id": str(tmp_path), "gguf_file": "m_B.gguf"},
        "augmenting": {"id": str(tmp_path), "gguf_file": "m_A.gguf", "dtype": "bfloat16"},
    }
    values["data"]["max_length"] = 64
    model = calmlm.CalmForCausalLM.from_pretrained(go(values))
    assert model.anchor.dtype == torch.float32 and model.augmenting["augmenting"].dtype == torch.bfloat16
    assert (
        main(["generate", str(Path(values["output"]) / "composition"), "--prompt", "the", "--max-new-tokens", "3"]) == 0
    )
    values["model"]["anchor"] = {"id": str(tmp_path), "gguf_file": "other.gguf"}
    values["output"] += "-other"
    with pytest.raises(CalmError, match=r"other\.gguf"):
        go(values)
    assert not Path(values["output"]).exists()


@pytest.mark.parametrize(
    ("dtype", "times", "said"), [("bfloat16", 30.0, 1), ("bfloat16", 0.3, 0), ("float32", 30.0, 0)]
)
def test_numbers_that_the_processor_is_slow_in_are_named(
    dtype: str, times: float, said: int, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("calmlm.training.pipeline.slowness", lambda _: times)
    values = settings(max_steps=1)
    values["model"]["dtype"] = dtype
    lines: list[str] = []
    train(parse_config(values), report=lines.append)
    message = f"This processor takes 30 times as long in {dtype} as in float32: set model.dtype=float32."
    assert lines.count(message) == said


@pytest.mark.parametrize(
    ("changes", "eager"),
    [
        ({}, True),
        ({"model": {"attn_implementation": "sdpa"}}, False),
        ({"model": {"dtype": "float32"}}, False),
        ({"trainer": {"packing": True}, "data": {"max_length": 64}}, False),
        ({"align": True}, True),
        ({"retain": True}, False),
    ],
)
def test_short_texts_are_learned_with_the_faster_attention(
    changes: dict[str, Any], eager: bool, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where bfloat16 is read on a processor, nothing is packed, no text is long, and no attention was chosen."""
    monkeypatch.setattr("calmlm.training.pipeline.slowness", lambda _: 1.0)
    monkeypatch.setattr("calmlm.bases.speed.SHORT", 16)
    long = tmp_path / "long.txt"
    long.write_text("7+2=9 " * 6 + "\n", encoding="utf-8")
    values = settings(max_steps=2)
    values["model"]["dtype"] = "bfloat16"
    for section, given in changes.items():
        if section == "align":
            short = tmp_path / "short.txt"
            short.write_text("7+2=9\n2+2=4\n", encoding="utf-8")
            values["align"] = {"text": str(short), "trainer": {"max_steps": 1}}
        elif section == "retain":
            values["retain"] = {"text": str(long)}
        else:
            values[section] |= given
    kinds: set[str] = set()
    forward = calmlm.CalmModel.forward

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            kinds.add(self.anchor.config._attn_implementation)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(calmlm.CalmModel, "forward", watched)
    lines: list[str] = []
    train(parse_config(values), report=lines.append)
    assert kinds == {"eager" if eager else "sdpa"}
    assert any(line.startswith("Attention is eager") for line in lines) == eager


def test_plain_text_alone_stands_for_the_recipe(settings: Settings, tmp_path: Path) -> None:
    text = tmp_path / "plain.txt"
    text.write_text("\n".join(f"{number}+{number}={2 * number} and so on" for number in range(12)), encoding="utf-8")
    values = settings(max_steps=2)
    values["model"] |= {"plain_text": str(text)}
    del values["model"]["connections"]
    entry = calmlm.CalmForCausalLM.from_pretrained(go(values)).config.augmenting["augmenting"]
    assert entry["connector"]["kind"] == "graft"
    assert entry["words"]["kind"] == "map"
    assert entry["adapters"]
