"""The first losses of a run are the same, whatever is switched on: within 1e-5 of each other in float32.

The activation cache, packing, several processes (DDP and FSDP2), and compilation; each for models with one tokenizer,
with two, with a pointer, and for what reads prompts or images alone.
"""

from __future__ import annotations

import copy
import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from spread import part, run
from tiny import tiny_model, tiny_tokenizer
from tokenizers_tiny import tokenizer, with_beginning

STEPS, TOLERANCE = 3, 1e-5
SYSTEMS: dict[str, dict[str, Any]] = {
    "one tokenizer": {},
    "two tokenizers": {"augmenting": "other"},
    "transcoded": {"augmenting": "other", "alignment": "transcode"},
    "pointer": {"augmenting": "other", "words": "pointer"},
    "map": {"augmenting": "other", "words": "map"},
    "prompts": {"refresh": False},
    "encoder": {},
}
SWITCHES: dict[str, dict[str, Any]] = {
    "cache": {"activation_cache": "memory"},
    "padding-free": {"trainer": {"padding_free": True}},
    "padding-free, cache": {"trainer": {"padding_free": True}, "activation_cache": "memory"},
    "packed": {"trainer": {"packing": True}},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models of all systems, and twelve sums."""
    folder = tmp_path_factory.mktemp("models")
    other = with_beginning(tokenizer("unigram"))
    for name, model, own in (
        ("anchor", tiny_model("llama", seed=1), tiny_tokenizer()),
        ("augmenting", tiny_model("mistral", seed=2), tiny_tokenizer()),
        ("other", tiny_model("gpt2", seed=2, vocab_size=len(other)), other),
    ):
        model.save_pretrained(folder / name)
        own.save_pretrained(folder / name)
    sums = [{"prompt": f"{'+'.join('1' * (1 + i % 4))}=", "completion": str(1 + i % 4)} for i in range(12)]
    (folder / "sums.jsonl").write_text("\n".join(map(json.dumps, sums)))
    return folder


@pytest.fixture
def values(models: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """The configuration of a system's run; keyword arguments change its trainer's."""

    def make(system: str, **trainer: Any) -> dict[str, Any]:
        options = dict(SYSTEMS[system])
        return {
            "output": str(tmp_path / system),
            "model": {
                "anchor": str(models / "anchor"),
                "augmenting": str(models / options.pop("augmenting", "augmenting")),
                "connections": "top",
                **options,
            },
            "data": {"train": str(models / "sums.jsonl"), "max_length": 32},
            "trainer": {
                "use_cpu": True, "disable_tqdm": True, "max_steps": STEPS, "per_device_train_batch_size": 12,
                "optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "warmup_steps": 0,
                "logging_steps": 1, "save_strategy": "no", "report_to": "none", **trainer,
            },
            **({"encoder": True} if system == "encoder" else {}),
        }  # fmt: skip

    return make


def losses(values: dict[str, Any]) -> list[float]:
    shutil.rmtree(values["output"], ignore_errors=True)
    found: list[float] = run(copy.deepcopy(values))["losses"]
    assert len(found) == STEPS
    assert found[-1] < found[0] - 0.05
    return found


QUICK = ("two tokenizers", "prompts")


@pytest.mark.parametrize(
    "system",
    [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in SYSTEMS if name != "encoder"],
)
def test_cached_or_packed(system: str, values: Callable[..., dict[str, Any]]) -> None:
    expected = losses(values(system))
    for name, switch in SWITCHES.items():
        switched = values(system, **switch.get("trainer", {})) | {k: v for k, v in switch.items() if k != "trainer"}
        assert losses(switched) == pytest.approx(expected, abs=TOLERANCE), name


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")  # of torch's compiler, about what it traces
@pytest.mark.parametrize("system", ["one tokenizer", "two tokenizers", "pointer", "encoder"])
def test_compiled(system: str, values: Callable[..., dict[str, Any]]) -> None:
    compiled = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    expected = losses(values(system))
    torch._dynamo.reset()
    assert losses(values(system, **compiled)) == pytest.approx(expected, abs=TOLERANCE)
    if system != "encoder":
        torch._dynamo.reset()
        assert losses(values(system, **compiled, padding_free=True)) == pytest.approx(expected, abs=TOLERANCE)
    if system == "two tokenizers":
        torch._dynamo.reset()
        keeping = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"keep": "matmuls"}}
        switched = values(system, **compiled, **keeping) | {"activation_cache": "memory"}
        assert losses(switched) == pytest.approx(expected, abs=TOLERANCE)


def several(folder: Path, runs: dict[str, dict[str, Any]], **environment: str) -> None:
    """Two processes that go through these trainings."""
    with socket.socket() as place:
        place.bind(("localhost", 0))
        environment["PORT"] = str(place.getsockname()[1])
    torch.multiprocessing.spawn(part, args=(2, str(folder), copy.deepcopy(runs), environment), nprocs=2)


FSDP2 = {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}}
RAM = {**FSDP2, "fsdp_config": {**FSDP2["fsdp_config"], "cpu_ram_efficient_loading": True}}
PROCESSES: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "ddp": ({"ddp_backend": "gloo"}, {}),
    "fsdp2": (FSDP2, {}),
    "fsdp2, loaded in one process": (RAM, {"EMPTY_BUT_IN_THE_FIRST": "1", "ACCELERATE_USE_FSDP": "true"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", PROCESSES)
def test_two_processes(kind: str, values: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """Each process begins with its part of the seeded composition, each part of which learns."""
    trainer, environment = PROCESSES[kind]
    alone = {name: run(values(name)) for name in SYSTEMS}
    for name in SYSTEMS:
        shutil.rmtree(tmp_path / name, ignore_errors=True)
    several(tmp_path, {name: values(name, per_device_train_batch_size=6, **trainer) for name in SYSTEMS}, **environment)
    for name, expected in alone.items():
        for rank in range(2):
            found = torch.load(tmp_path / f"{name}-{rank}.pt", weights_only=True)
            assert found["losses"] == pytest.approx(expected["losses"], abs=TOLERANCE), (name, rank)
            assert found["kind"].startswith("FSDP") == ("fsdp" in kind)
            assert found["before"].keys() == expected["before"].keys()
            for key, tensor in found["before"].items():
                whole = expected["before"][key]
                if "fsdp" in kind:
                    parts = whole.chunk(2)
                    whole = parts[rank] if rank < len(parts) else whole[:0]
                assert torch.equal(tensor, whole), (name, rank, key)
            assert found["learns"] == dict.fromkeys(found["before"], True), (name, rank)


@pytest.mark.slow
def test_a_run_goes_on_among_another_number_of_processes(values: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """From one process to two with FSDP2, and back: the losses are those of a run that was never interrupted."""
    saving = {"save_strategy": "steps", "save_steps": 1, "optim": "adamw_torch", "learning_rate": 0.01}
    expected = run(values("pointer", **saving, max_steps=6))["losses"]
    shutil.rmtree(tmp_path / "pointer")
    run(values("pointer", **saving, max_steps=2))
    parted = {**saving, **FSDP2, "per_device_train_batch_size": 6, "max_steps": 4}
    several(tmp_path, {"pointer": {**values("pointer", **parted), "resume": True}})
    kept = {path.name for path in (tmp_path / "pointer/checkpoints/checkpoint-4").iterdir()}
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "config.json"} <= kept
    assert not any("fsdp" in name for name in kept)  # which would hold the frozen bases
    found = run(values("pointer", **saving, max_steps=6), resume=True)["losses"]
    assert found == pytest.approx(expected, abs=1e-4)
