"""Bases that a device map spreads: connectors compute where their layers do, and tools see the map."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import calmlm
from calmlm.bases.fingerprint import fingerprint
from calmlm.bases.placement import execution_device, real_parameters
from compositions import assert_close, assert_helpful, awaken, greedy_without_cache, logits_of, tiny_composition
from tiny import tiny_model, tiny_tokens

FAMILIES = {"llama": "llama", "mistral": "mistral", "gpt2": "gpt2"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases")
    for seed, family in enumerate(FAMILIES, start=1):
        tiny_model(family, seed=seed).save_pretrained(folder / family)
    return folder


def spread(model: Any, offloaded: tuple[str, ...]) -> dict[str, str]:
    """A device map that keeps all modules in memory, but those whose names hold one of ``offloaded`` on disk."""
    decoder = model.get_decoder()
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    layers = next(name for name, module in decoder.named_children() if isinstance(module, nn.ModuleList))
    names = [name for name, _ in model.named_children() if name != prefix]
    names += [f"{prefix}.{name}" for name, _ in decoder.named_children() if name != layers]
    names += [f"{prefix}.{layers}.{index}" for index in range(len(getattr(decoder, layers)))]
    return {name: "disk" if any(part in name for part in offloaded) else "cpu" for name in names}


def load(folder: Path, offloaded: tuple[str, ...]) -> Any:
    device_map = spread(AutoModelForCausalLM.from_pretrained(folder), offloaded)
    return AutoModelForCausalLM.from_pretrained(folder, device_map=device_map, offload_folder=str(folder / "offload"))


CONNECTORS: dict[str, dict[str, Any]] = {
    **{kind: {"connector": kind} for kind in ("cross_attention", "flamingo", "legonn")},
    "legonn with the anchor's embeddings": {"connector": "legonn", "ingestor": "anchor"},
}


@pytest.mark.parametrize("connector", CONNECTORS)
@pytest.mark.parametrize("families", [("llama", "mistral"), ("mistral", "gpt2")], ids="+".join)
def test_offloaded_layers_give_the_same_logits(folders: Path, families: tuple[str, str], connector: str) -> None:
    anchor, augmenting = families
    plain = awaken(calmlm.compose(folders / anchor, folders / augmenting, [(0, 1), (3, 3)], **CONNECTORS[connector]))
    pieces = (".1", ".3", "embed")  # GPT-2's embeddings are its head as well: accelerate keeps such in one place
    given = load(folders / anchor, pieces), load(folders / augmenting, pieces)
    model = awaken(calmlm.compose(*given, [(0, 1), (3, 3)], **CONNECTORS[connector]))
    assert not any(parameter.is_meta for parameter in model.model.connectors.parameters())
    ids = tiny_tokens(2, 9)
    assert_close(logits_of(model, ids), logits_of(plain, ids), 1e-5)
    assert model.device == torch.device("cpu")
    expected = greedy_without_cache(plain, ids, 5)
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None), expected)


def test_a_composition_loads_onto_offloaded_layers_with_all_its_weights(folders: Path, tmp_path: Path) -> None:
    plain = awaken(calmlm.compose(folders / "llama", folders / "mistral", 2))
    plain.save_pretrained(tmp_path / "composition")
    anchor = load(folders / "llama", ("layers.2", "layers.4"))
    model = calmlm.CalmForCausalLM.from_pretrained(tmp_path / "composition", anchor=anchor)
    ids = tiny_tokens(1, 7)
    assert_close(logits_of(model, ids), logits_of(plain, ids), 1e-5)
    model.save_pretrained(tmp_path / "again")
    again = calmlm.CalmForCausalLM.from_pretrained(tmp_path / "again")
    assert_close(logits_of(again, ids), logits_of(plain, ids), 1e-5)
    other = calmlm.compose(load(folders / "llama", ("layers.2",)), folders / "gpt2", 2)
    other.add_augmenting("second", tmp_path / "composition")
    assert not any(parameter.is_meta for parameter in other.model.connectors.parameters())


def test_trainer_trains_it_and_leaves_the_bases_where_they_are(folders: Path, tmp_path: Path) -> None:
    model = calmlm.compose(load(folders / "llama", ("layers.1", "layers.4")), folders / "mistral", 2)
    before = {name: tensor.clone() for name, tensor in model.composition_tensors().items()}
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True
    )
    rows = [{"input_ids": row, "labels": row} for row in tiny_tokens(4, 6)]
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    assert any(not torch.equal(tensor, before[name]) for name, tensor in model.composition_tensors().items())
    assert next(model.anchor.model.layers[1].parameters()).is_meta


def test_the_device_map_is_carried(folders: Path) -> None:
    model = calmlm.compose(load(folders / "llama", ("layers.2",)), folders / "mistral", 2)
    assert model.hf_device_map["model.anchor.model.layers.2"] == "disk"
    assert model.model.hf_device_map["anchor.model.layers.0"] == "cpu"
    assert not hasattr(tiny_composition(), "hf_device_map")
    assert not hasattr(tiny_composition().model, "hf_device_map")


@pytest.mark.parametrize(
    "devices", [{"": torch.device("meta")}, {"model.layers.0": 0, "model.layers.1": 1}, {"": "cpu"}], ids=str
)
def test_trainer_sees_on_the_composition_what_it_sees_on_the_anchor(
    devices: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_composition()
    monkeypatch.setattr(model.anchor, "hf_device_map", devices, raising=False)
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    found, expected = Trainer(model=model, args=arguments), Trainer(model=model.anchor, args=arguments)
    assert found.is_model_parallel == expected.is_model_parallel
    assert found.place_model_on_device == expected.place_model_on_device


def test_a_hook_tells_where_a_layer_computes() -> None:
    class Hook:
        execution_device = "meta"

    layer = nn.Linear(2, 2)
    assert execution_device(layer) == torch.device("cpu")
    layer._hf_hook = Hook()  # type: ignore[assignment]
    assert execution_device(layer) == torch.device("meta")
    assert execution_device(nn.Identity()) == torch.device("cpu")


def test_parameters_come_from_disk(folders: Path) -> None:
    plain = dict(AutoModelForCausalLM.from_pretrained(folders / "llama").named_parameters())
    model = load(folders / "llama", ("layers.1", "embed"))
    found = {name: tensor.clone() for name, tensor in real_parameters(model)}
    assert found.keys() == plain.keys()
    assert all(torch.equal(found[name], plain[name]) for name in plain)
    assert model.model.layers[1].mlp.up_proj.weight.is_meta


def test_a_fingerprint_knows_offloaded_weights(folders: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(folders / "llama")
    assert fingerprint(load(folders / "llama", ("layers.1",))) == fingerprint(plain)
    other = AutoModelForCausalLM.from_pretrained(folders / "llama")
    other.model.layers[1].mlp.up_proj.weight.data.add_(1)
    assert fingerprint(other)["values"] != fingerprint(plain)["values"]


def replicas(network: nn.Module) -> nn.Module:
    """What ``torch.nn.parallel.replicate`` makes for another device, on this one."""
    copies: dict[nn.Module, Any] = {module: module._replicate_for_data_parallel() for module in network.modules()}
    for module, copied in copies.items():
        for key, child in module._modules.items():
            copied._modules[key] = None if child is None else copies[child]
        for key, parameter in module._parameters.items():
            setattr(copied, key, None if parameter is None else parameter.detach().clone())
    return copies[network]


def test_data_parallel_is_refused() -> None:
    model = tiny_composition()
    ids = tiny_tokens(1, 5)
    replica: Any = replicas(model)
    with pytest.raises(calmlm.ModelError) as caught:
        replica(input_ids=ids)
    assert_helpful(caught.value, "DataParallel", "torchrun")
    with pytest.raises(calmlm.ModelError):
        replica.model(input_ids=ids)
    with replica.disable_composition(), torch.no_grad():
        found = replica(input_ids=ids).logits
    with model.disable_composition(), torch.no_grad():
        assert torch.equal(found, model(input_ids=ids).logits)
