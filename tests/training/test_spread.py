"""A composition that is spread over processes is saved whole, or not at all and with a reason."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import calmlm
from calmlm import CalmForCausalLM
from calmlm.bases.fingerprint import fingerprint, has_changed
from calmlm.bases.sharding import gathered
from calmlm.training.pipeline import train
from calmlm.training.schema import parse_config
from compositions import SENTENCE, awaken, logits_of, tiny_composition
from spread import IDS, KINDS, train_one_step, work
from tiny import tiny_model


@pytest.fixture
def start(tmp_path: Path) -> Path:
    """A folder with a composition in ``start``."""
    tiny_model("llama", seed=1).save_pretrained(tmp_path / "anchor")
    tiny_model("mistral", seed=2).save_pretrained(tmp_path / "augmenting")
    awaken(calmlm.compose(tmp_path / "anchor", tmp_path / "augmenting", 2)).save_pretrained(tmp_path / "start")
    return tmp_path


def check(folder: Path, kind: str, world: int) -> None:
    """The result is that of one process; what one process of several cannot do is refused in a sentence."""
    expected = CalmForCausalLM.from_pretrained(folder / "start")
    train_one_step(expected)
    found = CalmForCausalLM.from_pretrained(folder / "result")
    assert torch.allclose(logits_of(found, IDS), logits_of(expected, IDS), atol=1e-5)
    assert set(load_file(folder / "result" / "model.safetensors")) == set(expected.composition_tensors())
    assert {"config.json", "tokenizer.json", "README.md"} <= {path.name for path in (folder / "result").iterdir()}
    for rank in range(world):
        seen = json.loads((folder / f"seen-{rank}.json").read_text())
        assert not seen["changed"]
        assert seen["same shapes"]
        assert seen["same counts"]
        assert seen["written"] == (kind == "ddp")
        for sentence in seen["refused"].values():
            assert (sentence == "") == (kind == "ddp")
            if sentence:
                assert SENTENCE.fullmatch(sentence), sentence
                assert "accelerator.get_state_dict" in sentence


@pytest.mark.parametrize("kind", KINDS)
def test_one_process_of_one(kind: str, start: Path) -> None:
    work(0, 1, kind, str(start))
    check(start, kind, 1)


@pytest.mark.slow
def test_two_processes(start: Path) -> None:
    torch.multiprocessing.spawn(work, args=(2, "fsdp2", str(start)), nprocs=2)
    check(start, "fsdp2", 2)


@pytest.mark.slow
def test_a_run_of_two_processes_equals_that_of_one(settings: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    values = settings(max_steps=4, save_steps=2, per_device_train_batch_size=2)
    cache = {"mode": "disk", "folder": str(tmp_path / "activations")}  # to which both add
    two = values | {"output": str(tmp_path / "two"), "activation_cache": cache}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(two))
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    paths = os.pathsep.join([str(Path(calmlm.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*run, "-m", "calmlm.cli", "train", str(tmp_path / "run.yaml")],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    values["trainer"]["per_device_train_batch_size"] = 4
    one = train(parse_config(values), report=lambda line: None).composition
    expected, found = load_file(one / "model.safetensors"), load_file(tmp_path / "two/composition/model.safetensors")
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=1e-4)
    assert len(list((tmp_path / "activations" / "augmenting").glob("index-*.arrow"))) == 2
    assert {path.name for path in (tmp_path / "two/composition").iterdir()} == {path.name for path in one.iterdir()}


# DeepSpeed, of which only the names are needed here


@pytest.fixture
def partitioned(monkeypatch: pytest.MonkeyPatch) -> CalmForCausalLM:
    """A composition as ZeRO-3 leaves it: each parameter is empty until it is gathered."""
    model = tiny_composition()

    @contextmanager
    def together(parameters: list[torch.nn.Parameter]) -> Iterator[None]:
        for parameter in parameters:
            parameter.data = parameter.ds_tensor
        yield
        for parameter in parameters:
            parameter.data = torch.empty(0)

    for index, parameter in enumerate(model.parameters()):
        parameter.ds_id, parameter.ds_shape, parameter.ds_tensor = index, parameter.shape, parameter.data
        parameter.data = torch.empty(0)
    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "deepspeed.zero", SimpleNamespace(GatheredParameters=together))
    return model


def test_partitioned_parameters_are_gathered(partitioned: CalmForCausalLM, tmp_path: Path) -> None:
    expected = tiny_composition()
    assert partitioned.get_nb_trainable_parameters() == expected.get_nb_trainable_parameters()
    assert not has_changed(partitioned.anchor, fingerprint(expected.anchor))
    with pytest.raises(calmlm.ConfigError, match="must be whole to be saved"):
        partitioned.save_pretrained(tmp_path)
    engine = torch.nn.Module()
    engine.module = partitioned
    state = gathered(engine, partitioned.is_composition)
    assert state is not None
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.composition_tensors().items())
    partitioned.save_pretrained(tmp_path, state_dict=state)
    assert len(load_file(tmp_path / "model.safetensors")) == len(state)


def test_gates_that_were_saved_without_a_dimension_are_read(tmp_path: Path) -> None:
    """FSDP2 takes none; earlier versions wrote them so."""
    model = tiny_composition(words="map", gate=True, null_key=True)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    scalars = [name for name, tensor in tensors.items() if tensor.shape == (1,) and not name.endswith("null_key")]
    assert {name.rsplit(".", 1)[-1] for name in scalars} >= {"gate", "gate_bias", "opening", "scale_anchor"}
    save_file({n: t.reshape(()) if n in scalars else t for n, t in tensors.items()}, tmp_path / "model.safetensors")
    again = CalmForCausalLM.from_pretrained(tmp_path, anchor=model.anchor, augmenting=model.augmenting["augmenting"])
    assert torch.equal(logits_of(again, IDS), logits_of(model, IDS))
