"""What a killed run, a full disk or a lost worker leaves behind: the last good checkpoint, and no other."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from calmlm.errors import CalmError, ConfigError
from calmlm.files.storage import replacing_folder
from calmlm.training import going_on, pipeline
from calmlm.training.pipeline import train
from calmlm.training.run_folder import RunFolder
from calmlm.training.schema import parse_config
from calmlm.training.state_shards import Shards
from training.callbacks import interrupt_at, join

BACKENDS = ["sft", "trainer"]
Settings = Callable[..., dict[str, Any]]


def go(values: dict[str, Any], **options: Any) -> Path:
    return train(parse_config(values), report=lambda line: None, **options).composition


def steps(run: RunFolder) -> list[int]:
    return sorted(int(folder.name.split("-")[1]) for folder in run.checkpoints.iterdir())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_half_written_checkpoint_is_neither_read_nor_counted(
    backend: str, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trainer would keep the one of the highest step as the newest, and remove every whole one."""
    values = settings(backend, max_steps=8, save_steps=2, logging_steps=3, save_total_limit=1)
    whole = {**values, "output": values["output"] + "-whole"}
    expected = load_file(go(whole) / "model.safetensors")
    with monkeypatch.context() as patch:
        interrupt_at(5, pipeline, patch)
        with pytest.raises(KeyboardInterrupt):
            go(values)
    run = RunFolder(values["output"])
    half = run.checkpoints / "checkpoint-7"
    shutil.copytree(run.checkpoints / "checkpoint-4", half)
    (half / "model.safetensors").unlink()
    with monkeypatch.context() as patch:
        interrupt_at(7, pipeline, patch)
        with pytest.raises(KeyboardInterrupt):
            go(values, resume=True)
    assert steps(run) == [6] and run.last_checkpoint() == run.checkpoints / "checkpoint-6"
    found = load_file(go(values, resume=True) / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    histories = []
    for one in (run, RunFolder(whole["output"])):
        state = json.loads((one.last_checkpoint() / "trainer_state.json").read_text())
        kept = ("loss", "entropy", "mean_token_accuracy", "num_tokens", "num_input_tokens_seen", "step")
        histories.append([{key: entry[key] for key in kept if key in entry} for entry in state["log_history"]])
    assert histories[0] == histories[1], "also of steps that were trained before the interruption, and logged after it"
    assert [entry["step"] for entry in histories[0] if "loss" in entry] == [3, 6]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("schedule", ["cosine", "reduce_lr_on_plateau"])
def test_rates_that_are_changed_hold_when_a_run_goes_on(
    backend: str, schedule: str, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint would bring back the old ones, and a run that diverged would diverge again."""
    values = settings(backend, max_steps=8, save_steps=4, logging_steps=1, warmup_steps=2, lr_scheduler_type=schedule)
    values["data"]["eval"] = values["data"]["train"]
    rates, decays = {}, {}
    changed = {"learning_rate": 0.001, "weight_decay": 0.5, "adam_beta2": 0.9}
    for name, changes in {"before": {}, "after": changed}.items():
        values["output"] = values["output"].removesuffix("before") + name
        run = RunFolder(values["output"])
        with monkeypatch.context() as patch:
            interrupt_at(5, pipeline, patch)
            with pytest.raises(KeyboardInterrupt):
                go(values)
        values["trainer"] |= changes
        go(values, resume=True)
        state = json.loads((run.last_checkpoint() / "trainer_state.json").read_text())
        rates[name] = [entry["learning_rate"] for entry in state["log_history"] if "learning_rate" in entry]
        groups = torch.load(run.last_checkpoint() / "optimizer.pt", weights_only=True)["param_groups"]
        decays[name] = [(group["weight_decay"], group["betas"]) for group in groups]
    assert rates["after"][:4] == rates["before"][:4]
    assert rates["after"][4:] == pytest.approx([rate / 10 for rate in rates["before"][4:]])
    assert max(decay for decay, _ in decays["after"]) == 0.5
    assert {betas[1] for _, betas in decays["after"]} == {0.9}


def test_another_schedule_holds_from_the_first_step(settings: Settings) -> None:
    values = settings("trainer", max_steps=4, logging_steps=1, save_steps=4, lr_scheduler_type="linear", warmup_steps=0)
    go(values)
    values["trainer"] |= {"max_steps": 8}
    go(values, resume=True)
    state = json.loads((RunFolder(values["output"]).last_checkpoint() / "trainer_state.json").read_text())
    rates = [entry["learning_rate"] for entry in state["log_history"] if "learning_rate" in entry]
    assert rates[4:] == pytest.approx([0.01 * (8 - step) / 8 for step in range(4, 8)])


def test_another_optimizer_is_refused_when_a_run_goes_on(settings: Settings) -> None:
    values = settings("trainer", max_steps=2)
    go(values)
    values["trainer"] |= {"max_steps": 4}
    for name in ("sgd", "adafactor"):
        with pytest.raises(ConfigError, match=r"^--resume: expected the optimizer .* trainer.optim asks for another"):
            go({**values, "trainer": {**values["trainer"], "optim": name}}, resume=True)
    assert go({**values, "trainer": {**values["trainer"], "optim": "adamw_torch"}}, resume=True)


OURS = (".loss.png.calmlm-abcdef_1", "align/.config.yaml.calmlm-abcdef_1", "align/checkpoints/.running.json.calmlm-a_1")
OTHERS = ("align/.own", ".settings.json.20240101", "cache/.shard.safetensors.calmlm-abcdef_1", ".earlier.txt")


def test_what_a_killed_process_leaves_is_taken_back(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".config.yaml.calmlm-abcdef_1").write_text("half")
    run.check(resume=False, overwrite=False)  # nothing that one could miss
    for place in OURS + OTHERS:
        (run.path / place).parent.mkdir(parents=True, exist_ok=True)
        (run.path / place).write_text("half")
    for name in (".composition.77.old", ".composition.78.new", ".earlier.checkpoints"):
        (tmp_path / "run" / name).mkdir()
        (tmp_path / "run" / name / "x").write_text(name)
    run.start("x: 1", resume=True)
    with pytest.raises(KeyboardInterrupt), replacing_folder(run.composition):
        raise KeyboardInterrupt
    left = {str(path.relative_to(run.path)) for path in run.path.rglob("*") if path.is_file()}
    assert left == {"config.yaml", "composition/x", *OTHERS}, "files that others made stay"
    assert (run.composition / "x").read_text() == ".composition.77.old", "the result that was being replaced"


def test_an_earlier_run_goes_in_one_step(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is killed while it overwrites leaves no checkpoint that could be gone on from."""
    run = RunFolder(go(settings(max_steps=2, save_steps=1)).parent)

    def killed(path: Any, *args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        run.start("x: 1", resume=False)
    assert run.last_checkpoint() is None


def test_shards_without_an_index_are_swept(tmp_path: Path) -> None:
    store = Shards(tmp_path, {"a": 1})
    store.put(b"1" * 32, {"0": torch.ones(2, 3)})
    store.flush()
    kept = {path.name for path in tmp_path.iterdir()}
    for name, age in (("shard-dead-0000.safetensors", 7200), (".shard-x", 7200), ("shard-live-0000.safetensors", 0)):
        (tmp_path / name).write_text("x")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    again = Shards(tmp_path, {"a": 1})
    assert {path.name for path in tmp_path.iterdir()} == kept | {"shard-live-0000.safetensors"}
    assert torch.equal(again.get(b"1" * 32)["0"], torch.ones(2, 3))


@pytest.mark.parametrize("where", ["weights", "optimizer", "state"])
def test_a_disk_that_is_full_leaves_the_checkpoint_before(
    where: str, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = settings(max_steps=6, save_steps=2)
    run = RunFolder(values["output"])

    def full(*args: Any, **kwargs: Any) -> None:
        if where == "optimizer":
            raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")
        raise OSError(errno.ENOSPC, "No space left on device")

    class Fills(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                place = {
                    "weights": "calmlm.files.storage.save_file",
                    "optimizer": "torch.save",
                    "state": "transformers.trainer_callback.TrainerState.save_to_json",
                }[where]
                monkeypatch.setattr(place, full)

    join(Fills(), pipeline, monkeypatch)
    with pytest.raises(CalmError, match=r"^Expected to write the checkpoint of step 4 in .*the disk is full.*--resume"):
        go(values)
    assert steps(run) == [2] and run.last_checkpoint() == run.checkpoints / "checkpoint-2"
    monkeypatch.undo()
    assert go(values, resume=True).is_dir()


def test_a_cache_that_fills_the_disk_leaves_the_checkpoint_before(settings: Settings, tmp_path: Path) -> None:
    """The limit of a file's size stands for a full disk, and the operating system itself refuses."""
    values = settings(max_steps=6, save_steps=2) | {"activation_cache": "disk"}
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)

    class Limits(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))

    with pytest.MonkeyPatch.context() as patch:
        join(Limits(), pipeline, patch)
        try:
            with pytest.raises(CalmError, match=r"^Expected to write the checkpoint of step 4 .* but that failed"):
                go(values)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    run = RunFolder(values["output"])
    assert steps(run) == [2]
    states = Path(f"{values['output']}.activations")
    assert len(list(states.rglob("shard-*"))) == len(list(states.rglob("index-*"))), "no shard without an index"
    assert go(values, resume=True).is_dir()


# torch's signal handler may raise while torch itself opens a file, which nobody closes then.
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@pytest.mark.slow
def test_a_worker_that_is_lost(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    values = settings("trainer", max_steps=8, save_steps=2, dataloader_num_workers=1)
    parent = os.getpid()
    collate = pipeline.make_trainer

    def made(*args: Any) -> Any:
        trainer = collate(*args)
        inner, calls = trainer.data_collator, []

        def dies(rows: Any) -> Any:
            calls.append(0)
            if os.getpid() != parent and len(calls) == 6:
                os.kill(os.getpid(), signal.SIGKILL)
            return inner(rows)

        trainer.data_collator = dies
        return trainer

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "make_trainer", made)
        with pytest.raises(CalmError, match=r"^Expected the workers that load data to last, .*--resume"):
            go(values)
    assert RunFolder(values["output"]).last_checkpoint() is not None
    assert go(values, resume=True).is_dir()


def test_processes_that_find_different_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)

    def gather(found: list[Any], name: str) -> None:
        found[:] = [name, "none"]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    with pytest.raises(ConfigError, match=r"^--resume: expected all processes .*checkpoint-2, none; put the output"):
        going_on.check_agreement(Path("checkpoints/checkpoint-2"))
    assert going_on.check_agreement(None) is None


def test_states_of_the_first_batch_are_taken(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """A text that came in an earlier batch has the states that it had there, also beside one that is new."""
    from calmlm.training.activation_cache import ActivationCache
    from calmlm.training.cache_settings import CacheConfig
    from compositions import tiny_composition

    model = tiny_composition()
    cache = ActivationCache(CacheConfig("memory"), model, Path())
    one, other = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[9, 8, 7, 6]])
    with torch.no_grad(), cache.recording():
        model(one)
        for store in cache.stores.values():
            for record in store.records.values():
                for tensor in record.values():
                    tensor.add_(1.0)  # as if it had come out otherwise
        alone, both = model(one).logits, model(torch.cat([one, other])).logits
        again = model(torch.cat([one, other])).logits
    torch.testing.assert_close(both[:1], alone)
    assert torch.equal(both, again)
