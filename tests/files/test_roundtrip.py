"""A saved composition comes back as it was, holds nothing of its bases, and is never loaded in part or in doubt."""

from __future__ import annotations

import copy
import errno
import json
import pickle
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

import calmlm
from calmlm import CalmForCausalLM, CheckpointError, ConfigError
from calmlm.errors import CalmError, WriteError, is_full
from calmlm.exporting import export
from calmlm.files import publishing, storage
from calmlm.files.naming import CompositionTokenizer
from calmlm.modeling.calm_model import CalmModel
from compositions import assert_helpful, awaken, logits_of, tiny_composition
from tiny import tiny_model, tiny_tokens

IDS = tiny_tokens(2, 7)
OPTIONS = {"gate": True, "rotary": True, "query_key_bias": 1.5, "null_key": True, "num_heads": 6}


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A folder with two base models, ``anchor`` and ``augmenting``."""
    tiny_model("llama", seed=1).save_pretrained(tmp_path / "anchor")
    tiny_model("gpt2", seed=2).save_pretrained(tmp_path / "augmenting")
    return tmp_path


def from_folders(models: Path, **options: Any) -> CalmForCausalLM:
    return awaken(calmlm.compose(models / "anchor", models / "augmenting", **{"connections": 2, **options}))


@pytest.fixture
def saved(models: Path) -> Path:
    """A saved composition of those two."""
    from_folders(models).save_pretrained(models / "composition")
    return models / "composition"


# What comes back


@pytest.mark.parametrize("options", [{}, OPTIONS, {"norm": False, "connections": [(0, 3), (4, 3)]}], ids=str)
def test_the_same_logits_exactly(models: Path, options: dict[str, Any]) -> None:
    model = from_folders(models, **options)
    model.save_pretrained(models / "composition")
    again = CalmForCausalLM.from_pretrained(models / "composition")
    assert torch.equal(logits_of(again, IDS), logits_of(model, IDS))
    assert not again.training
    assert {n for n, p in again.named_parameters() if p.requires_grad} == set(again.composition_tensors())
    settings = {"do_sample": False, "max_new_tokens": 5, "pad_token_id": 0}
    assert torch.equal(again.generate(IDS, **settings), model.generate(IDS, **settings))
    # A second trip changes no byte.
    again.save_pretrained(models / "second")
    for name in ("model.safetensors", "config.json", "generation_config.json"):
        assert (models / "second" / name).read_bytes() == (models / "composition" / name).read_bytes(), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_compositions_own_dtype_comes_back(models: Path, dtype: torch.dtype) -> None:
    model = from_folders(models, dtype=torch.bfloat16, composition_dtype=dtype)
    model.save_pretrained(models / "composition")
    again = CalmForCausalLM.from_pretrained(models / "composition", dtype=torch.bfloat16)
    assert {p.dtype for p in again.anchor.parameters()} == {torch.bfloat16}
    assert {t.dtype for t in again.composition_tensors().values()} == {dtype}
    assert torch.equal(logits_of(again, IDS), logits_of(model, IDS))


def test_auto_classes_load_it(saved: Path) -> None:
    expected = logits_of(CalmForCausalLM.from_pretrained(saved), IDS)
    config = AutoConfig.from_pretrained(saved)
    assert type(config) is calmlm.CalmConfig
    assert config.augmenting["augmenting"]["connections"] == [[1, 1], [4, 4]]
    model = AutoModelForCausalLM.from_pretrained(saved)
    assert type(model) is CalmForCausalLM
    assert torch.equal(logits_of(model, IDS), expected)


def test_two_compositions_of_one_configuration_share_nothing(saved: Path) -> None:
    """As of every model of transformers, the configuration that is given is copied."""
    config = AutoConfig.from_pretrained(saved)
    before = config.to_dict()
    one, other = (AutoModelForCausalLM.from_pretrained(saved, config=config) for _ in range(2))
    assert one.config is not other.config
    one.model.change_prefix("augmenting", [5, 6])
    assert "prefix" not in other.config.augmenting["augmenting"]
    assert config.to_dict() == before


def test_options_reach_the_bases(saved: Path) -> None:
    model = CalmForCausalLM.from_pretrained(saved, dtype=torch.bfloat16, attn_implementation="sdpa")
    for base in model.model.bases():
        assert base.dtype == torch.bfloat16
        assert base.config._attn_implementation == "sdpa"
    assert model.config._attn_implementation == "sdpa"
    assert CalmForCausalLM.from_pretrained(saved, attn_implementation="eager").config._attn_implementation == "eager"


def test_how_it_generates_comes_back(saved: Path, tmp_path: Path) -> None:
    model = CalmForCausalLM.from_pretrained(saved)
    model.generation_config.update(max_new_tokens=7, repetition_penalty=1.3, eos_token_id=[5, 6])
    model.save_pretrained(tmp_path / "tuned")
    again = CalmForCausalLM.from_pretrained(tmp_path / "tuned")
    assert again.generation_config.to_dict() == model.generation_config.to_dict()
    assert again.generate(IDS, eos_token_id=None, do_sample=False).shape == (2, 7 + 7)
    assert again.anchor.generation_config.max_new_tokens is None
    # A folder without the file leaves the anchor's settings.
    (tmp_path / "tuned" / "generation_config.json").unlink()
    plain = CalmForCausalLM.from_pretrained(tmp_path / "tuned")
    assert plain.generation_config.to_dict() == plain.anchor.generation_config.to_dict()


@pytest.mark.parametrize("load", [CalmForCausalLM.from_pretrained, AutoModelForCausalLM.from_pretrained])
@pytest.mark.parametrize("saved_too", [True, False])
def test_how_it_generates_may_be_given(saved: Path, load: Any, saved_too: bool) -> None:
    if not saved_too:
        (saved / "generation_config.json").unlink()
    given = GenerationConfig(max_new_tokens=3, repetition_penalty=1.5)
    model = load(saved, generation_config=given)
    assert model.generation_config.to_dict() == given.to_dict()
    assert model.generation_config is not given
    for base in model.model.bases():
        assert base.generation_config.max_new_tokens is None


def test_how_it_generates_comes_back_from_the_hub(saved: Path, tmp_path: Path) -> None:
    """A repository's files lie under its name in the hub's cache, from where they are read without a network."""
    snapshot = tmp_path / "models--someone--composition" / "snapshots" / ("0" * 40)
    shutil.copytree(saved, snapshot)
    change = json.loads((snapshot / "generation_config.json").read_text()) | {"max_new_tokens": 5}
    (snapshot / "generation_config.json").write_text(json.dumps(change))
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("0" * 40)
    options = {
        "anchor": AutoModelForCausalLM.from_pretrained(saved.parent / "anchor"),
        "augmenting": AutoModelForCausalLM.from_pretrained(saved.parent / "augmenting"),
        "cache_dir": str(tmp_path),
        "local_files_only": True,
    }
    model = CalmForCausalLM.from_pretrained("someone/composition", **options)
    assert model.generation_config.max_new_tokens == 5
    (snapshot / "generation_config.json").unlink()
    model = CalmForCausalLM.from_pretrained("someone/composition", **options)
    assert model.generation_config.max_new_tokens is None


def test_a_copy_and_a_pickle_are_compositions_of_their_own() -> None:
    model = tiny_composition(**OPTIONS)
    expected = logits_of(model, IDS)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits_of(other, IDS), expected)
        # Changing it changes it alone: its hooks point at its own connectors and its own bases.
        with torch.no_grad():
            for connector in other.model.connectors["augmenting"]:
                connector.o_proj.weight.zero_()
        assert torch.equal(logits_of(other, IDS), logits_of(tiny_model("llama", seed=1), IDS))
        assert torch.equal(logits_of(model, IDS), expected)
        other.train()(input_ids=IDS, labels=IDS).loss.backward()
        assert all(p.grad is None for p in model.parameters())
        with torch.no_grad():
            other.augmenting["augmenting"].get_input_embeddings().weight.add_(1)
        assert torch.equal(logits_of(model, IDS), expected)


def test_a_state_dict_goes_back_and_forth() -> None:
    model, other = tiny_composition(), tiny_composition(awake=False)
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits_of(other, IDS), logits_of(model, IDS))
    names = set(model.state_dict())
    assert {f"model.anchor.{name}" for name in tiny_model("llama").state_dict()} <= names
    assert {f"model.augmenting.augmenting.{name}" for name in tiny_model("gpt2").state_dict()} <= names


# What lies in the folder


def test_the_folder_holds_the_composition_alone(saved: Path) -> None:
    assert {path.name for path in saved.iterdir()} == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
    }
    model = CalmForCausalLM.from_pretrained(saved)
    own = sum(t.numel() * t.element_size() for t in model.composition_tensors().values())
    size = sum(path.stat().st_size for path in saved.iterdir())
    assert own <= size <= own + 16_000
    assert set(load_file(saved / "model.safetensors")) == set(model.composition_tensors())
    bases = sum(p.numel() * p.element_size() for base in model.model.bases() for p in base.parameters())
    assert size < bases + own


def test_a_gathered_state_dict_may_be_given(models: Path) -> None:
    model = from_folders(models)
    gathered = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.save_pretrained(models / "composition", state_dict=gathered)
    assert set(load_file(models / "composition" / "model.safetensors")) == set(model.composition_tensors())
    model.save_pretrained(models / "nothing", is_main_process=False)
    assert not (models / "nothing").exists()


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
def test_a_state_dict_may_be_a_wrappers(prefix: str, models: Path) -> None:
    model = from_folders(models)
    state = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    model.save_pretrained(models / "composition", state_dict=state)
    assert set(load_file(models / "composition" / "model.safetensors")) == set(model.composition_tensors())


def test_a_model_that_is_spread_is_not_asked_for_its_tensors(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One process alone saves what was gathered: asking the model then would wait for the others."""
    model = calmlm.compose(models / "anchor", {"anchor": models / "augmenting", "b": tiny_model("qwen2", seed=3)}, 2)
    model.remove_augmenting("b")
    gathered = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def asked(*_: Any, **__: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(model, "state_dict", asked)
    model.save_pretrained(models / "composition", state_dict=gathered)
    assert len(load_file(models / "composition" / "model.safetensors")) == len(model._shapes) > 0


def test_an_unchanged_model_of_any_name_is_not_warned_of(models: Path) -> None:
    model = calmlm.compose(models / "anchor", {"anchor": models / "augmenting"}, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(models / "composition")


def test_another_state_dict_overwrites_nothing(saved: Path) -> None:
    model = CalmForCausalLM.from_pretrained(saved)
    before = (saved / "model.safetensors").read_bytes()
    with pytest.raises(ConfigError, match="state_dict must hold"):
        model.save_pretrained(saved, state_dict={"lm_head.weight": torch.zeros(1)})
    assert (saved / "model.safetensors").read_bytes() == before


def test_connections_that_peft_has_changed_overwrite_nothing(saved: Path) -> None:
    """Nothing could load what would lie there; merged, they are the composition's own again."""
    peft = pytest.importorskip("peft")
    model = CalmForCausalLM.from_pretrained(saved)
    before = (saved / "model.safetensors").read_bytes()
    settings = peft.LoraConfig(r=2, target_modules=r".*connectors.*\.q_proj", init_lora_weights=False)
    adapted = peft.get_peft_model(model, settings)
    with pytest.raises(ConfigError, match=r"merge_and_unload") as caught:
        model.save_pretrained(saved)
    assert_helpful(caught.value, "model.connectors")
    assert (saved / "model.safetensors").read_bytes() == before
    expected = logits_of(adapted, IDS)
    adapted.merge_and_unload().save_pretrained(saved)
    again = CalmForCausalLM.from_pretrained(saved)
    assert torch.allclose(logits_of(again, IDS), expected, atol=1e-4)


def test_a_changed_anchor_is_warned_of(models: Path) -> None:
    model = from_folders(models)
    with torch.no_grad():
        model.anchor.model.layers[0].self_attn.q_proj.weight.mul_(2)
    with pytest.warns(UserWarning, match="'anchor' has changed since it was composed"):
        model.save_pretrained(models / "composition")


def test_a_connection_that_is_cut_is_told(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The HTTP library's own errors, which are no OSError, come through huggingface_hub."""
    (cut,) = (kind for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError")

    def fail(*_: Any, **__: Any) -> None:
        raise cut("Server disconnected")

    for place in ("files.fetching", "files.naming", "files.loading", "exporting"):
        monkeypatch.setattr(f"calmlm.{place}.cached_file", fail)
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", fail)
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", fail)
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", fail)
    model = tiny_composition()
    model.config.anchor["id"] = model.config.augmenting["augmenting"]["id"] = "them/model"
    for what in (
        lambda: model.push_to_hub("me/model"),
        lambda: CalmForCausalLM.from_pretrained("me/model"),
        lambda: calmlm.compose("them/model", "them/model", 2),
        lambda: CompositionTokenizer.from_pretrained("me/model"),
        lambda: export("me/model", saved.parent / "export"),
    ):
        with pytest.raises(CalmError) as caught:
            what()
        assert_helpful(caught.value, "Server disconnected")


@pytest.mark.parametrize("damaged", ["model.safetensors", "generation_config.json"])
def test_a_damaged_file_leaves_an_anchor_that_was_passed_as_it_was(damaged: str, saved: Path) -> None:
    anchor = tiny_model("llama", seed=1)
    if damaged == "model.safetensors":
        save_file({}, saved / damaged)
    else:
        (saved / damaged).write_text("{")
    with pytest.raises(CheckpointError):
        CalmForCausalLM.from_pretrained(saved, anchor=anchor)
    assert not hooks_of(anchor)


def test_a_composition_that_cannot_be_made_leaves_its_anchor_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    anchor = tiny_model("llama", seed=1)

    def fail(self: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(CalmModel, "_make_readers", fail)
    with pytest.raises(MemoryError):
        calmlm.compose(anchor, tiny_model("gpt2", seed=2), 2)
    assert not hooks_of(anchor)


def hooks_of(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if module._forward_hooks or module._forward_pre_hooks]


def test_nothing_of_this_machine_is_written(saved: Path) -> None:
    for path in saved.iterdir():
        assert str(saved.parent).encode() not in path.read_bytes(), path.name


def test_a_card_that_a_person_wrote_stays(models: Path) -> None:
    model = from_folders(models)
    model.save_pretrained(models / "composition")
    card = models / "composition" / "README.md"
    assert "1 → 1, 4 → 4" in card.read_text(encoding="utf-8")
    card.write_text("mine")
    model.save_pretrained(models / "composition")
    assert card.read_text() == "mine"


# Where the bases are


def test_the_parent_folder_can_move(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    expected = logits_of(CalmForCausalLM.from_pretrained(saved), IDS)
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "moved"
    shutil.move(str(saved.parent), elsewhere)
    assert torch.equal(logits_of(CalmForCausalLM.from_pretrained(elsewhere / "composition"), IDS), expected)


def test_a_relative_path_and_another_directory(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(models)
    model = awaken(calmlm.compose("anchor", "augmenting", connections=2))
    model.save_pretrained("composition")
    monkeypatch.chdir("/")
    again = CalmForCausalLM.from_pretrained(models / "composition")
    assert torch.equal(logits_of(again, IDS), logits_of(model, IDS))


def test_a_relative_path_and_another_directory_before_it_is_saved(models: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(models)
    model = awaken(calmlm.compose("anchor", "augmenting", connections=2))
    (models / "elsewhere").mkdir()
    monkeypatch.chdir(models / "elsewhere")
    model.save_pretrained("composition")
    again = CalmForCausalLM.from_pretrained("composition")
    assert torch.equal(logits_of(again, IDS), logits_of(model, IDS))


def test_a_reloaded_composition_can_be_saved_elsewhere(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    model = CalmForCausalLM.from_pretrained(saved)
    other = tmp_path_factory.mktemp("other") / "deep" / "composition"
    model.save_pretrained(other)
    assert torch.equal(logits_of(CalmForCausalLM.from_pretrained(other), IDS), logits_of(model, IDS))


def test_bases_from_memory_must_be_passed(tmp_path: Path) -> None:
    model = tiny_composition()
    model.save_pretrained(tmp_path)
    for given in ({}, {"anchor": tiny_model("llama", seed=1)}, {"augmenting": tiny_model("gpt2", seed=2)}):
        with pytest.raises(CheckpointError) as error:
            CalmForCausalLM.from_pretrained(tmp_path, **given)
        assert_helpful(error.value, "from_pretrained", "augmenting=" if "anchor" in given else "anchor=")
    bases = {"anchor": tiny_model("llama", seed=1), "augmenting": tiny_model("gpt2", seed=2)}
    again = CalmForCausalLM.from_pretrained(tmp_path, **bases)
    assert torch.equal(logits_of(again, IDS), logits_of(model, IDS))
    named = {**bases, "augmenting": {"augmenting": tiny_model("gpt2", seed=2)}}
    assert torch.equal(logits_of(CalmForCausalLM.from_pretrained(tmp_path, **named), IDS), logits_of(model, IDS))
    with pytest.raises(CheckpointError) as error:
        CalmForCausalLM.from_pretrained(tmp_path, anchor=bases["anchor"], augmenting={"other": bases["augmenting"]})
    assert_helpful(error.value, "other", "augmenting")


OTHERS: dict[str, Callable[[], Any]] = {
    "other weights": lambda: tiny_model("llama", seed=9),
    "other shapes": lambda: tiny_model("llama", seed=1, intermediate_size=72),
    "other depth": lambda: tiny_model("llama", seed=1, num_hidden_layers=6),
    "other architecture": lambda: tiny_model("mistral", seed=1),
}


@pytest.mark.parametrize("role", ["anchor", "augmenting"])
@pytest.mark.parametrize("kind", OTHERS)
def test_another_base_is_an_error_that_names_both(saved: Path, kind: str, role: str) -> None:
    other = saved.parent / "impostor"
    OTHERS[kind]().save_pretrained(other)
    for given in (str(other), AutoModelForCausalLM.from_pretrained(other)):
        with pytest.raises(CheckpointError) as error:
            CalmForCausalLM.from_pretrained(saved, **{role: given})
        assert_helpful(error.value, role, "impostor")
    # The same when the folder of the base was filled with another model.
    shutil.rmtree(saved.parent / role)
    shutil.move(str(other), saved.parent / role)
    with pytest.raises(CheckpointError) as error:
        CalmForCausalLM.from_pretrained(saved)
    assert_helpful(error.value, role)


def test_the_same_base_in_another_dtype_is_the_same_base(saved: Path) -> None:
    CalmForCausalLM.from_pretrained(saved, dtype=torch.bfloat16)
    CalmForCausalLM.from_pretrained(saved, dtype=torch.float16)


def test_a_base_that_is_gone(saved: Path) -> None:
    shutil.rmtree(saved.parent / "augmenting")
    with pytest.raises(calmlm.ModelError) as error:
        CalmForCausalLM.from_pretrained(saved)
    assert_helpful(error.value, "augmenting")


# What is damaged


def cut(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def change_tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return damage


def change_config(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        data = json.loads((folder / "config.json").read_text())
        change(data)
        (folder / "config.json").write_text(json.dumps(data))

    return damage


FIRST = "model.connectors.augmenting.0.q_proj.weight"


def entry(data: dict[str, Any]) -> dict[str, Any]:
    return data["augmenting"]["augmenting"]


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "weights cut short": lambda folder: cut(folder / "model.safetensors"),
    "weights empty": lambda folder: (folder / "model.safetensors").write_bytes(b""),
    "weights are a pickle": lambda folder: torch.save({}, folder / "model.safetensors"),
    "weights gone": lambda folder: (folder / "model.safetensors").unlink(),
    "a tensor gone": change_tensors(lambda tensors: tensors.pop(FIRST)),
    "all tensors gone": change_tensors(lambda tensors: tensors.clear()),
    "a tensor too many": change_tensors(lambda tensors: tensors.update(extra=torch.zeros(2))),
    "a tensor of another shape": change_tensors(lambda tensors: tensors.update({FIRST: torch.zeros(3, 48)})),
    "a tensor under another name": change_tensors(lambda tensors: tensors.update(other=tensors.pop(FIRST))),
    "another model's weights": lambda folder: shutil.copy(
        folder.parent / "anchor" / "model.safetensors", folder / "model.safetensors"
    ),
    "configuration cut short": lambda folder: cut(folder / "config.json"),
    "configuration empty": lambda folder: (folder / "config.json").write_text(""),
    "configuration gone": lambda folder: (folder / "config.json").unlink(),
    "configuration is a list": lambda folder: (folder / "config.json").write_text("[1, 2]"),
    "configuration is binary": lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe\x00"),
    "another model's configuration": lambda folder: shutil.copy(
        folder.parent / "anchor" / "config.json", folder / "config.json"
    ),
    "no augmenting model": change_config(lambda data: data.pop("augmenting")),
    "augmenting model is text": change_config(lambda data: data.update(augmenting="text")),
    "augmenting entry is text": change_config(lambda data: data["augmenting"].update(augmenting="text")),
    "no anchor": change_config(lambda data: data.pop("anchor")),
    "no connections": change_config(lambda data: entry(data).pop("connections")),
    "connections are empty": change_config(lambda data: entry(data).update(connections=[])),
    "connections are no pairs": change_config(lambda data: entry(data).update(connections=[1, 2])),
    "connections out of range": change_config(lambda data: entry(data).update(connections=[[1, 1], [4, 99]])),
    "one connection fewer": change_config(lambda data: entry(data)["connections"].pop()),
    "no connector": change_config(lambda data: entry(data).pop("connector")),
    "a connector of unknown options": change_config(lambda data: entry(data)["connector"].update(depth=3)),
    "a connector of other options": change_config(lambda data: entry(data)["connector"].update(null_key=True)),
    "a number of heads that divides nothing": change_config(lambda data: entry(data)["connector"].update(num_heads=7)),
    "generation settings cut short": lambda folder: cut(folder / "generation_config.json"),
    "generation settings are a list": lambda folder: (folder / "generation_config.json").write_text("[1, 2]"),
    "a tensor of whole numbers": change_tensors(lambda tensors: tensors.update({FIRST: tensors[FIRST].long()})),
    "connections of one layer": change_config(lambda data: entry(data).update(connections=[[3]])),
    "a connector of nothing": change_config(lambda data: entry(data).update(connector={})),
    "a rank that is a word": change_config(lambda data: entry(data)["connector"].update(rank="zzz")),
    "an id that is a number": change_config(lambda data: data["anchor"].update(id=-1)),
    "a fingerprint that is a word": change_config(lambda data: data["anchor"].update(fingerprint="zzz")),
    "a fingerprint of lists": change_config(lambda data: data["anchor"]["fingerprint"].update(dtype=[])),
    "no order": change_config(lambda data: data.update(order=None)),
    "the anchor's size is a word": change_config(lambda data: data["text_config"].update(hidden_size="zzz")),
    "the anchor's kind is a number": change_config(lambda data: data["text_config"].update(model_type=3)),
    "no anchor configuration": change_config(lambda data: data.update(text_config="text")),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_folder_is_refused(saved: Path, kind: str) -> None:
    DAMAGES[kind](saved)
    with pytest.raises(CheckpointError) as error:
        CalmForCausalLM.from_pretrained(saved)
    assert_helpful(error.value, saved.name)


@pytest.mark.parametrize("name", ["anchor", "missing", "empty", "file"])
def test_what_is_no_composition_is_refused(models: Path, name: str) -> None:
    (models / "empty").mkdir()
    (models / "file").write_text("text")
    with pytest.raises(CheckpointError) as error:
        CalmForCausalLM.from_pretrained(models / name)
    assert_helpful(error.value, name)


def test_a_name_that_is_no_folder_is_refused() -> None:
    with pytest.raises(CheckpointError) as error:
        CalmForCausalLM.from_pretrained("no/such-composition")
    assert_helpful(error.value, "no/such-composition")


# Writing


@pytest.mark.parametrize("victim", ["model.safetensors", "config.json"])
def test_a_failure_while_writing_leaves_the_old_files(
    saved: Path, victim: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = CalmForCausalLM.from_pretrained(saved)
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    expected = logits_of(model, IDS)

    def fail(*args: Any, **_: Any) -> None:
        # Some of the file is written already, as when a disk is full.
        target = args[1] if victim == "model.safetensors" else args[0]
        Path(target).write_bytes(b"half a file")
        raise OSError("No space left on device")

    if victim == "model.safetensors":
        monkeypatch.setattr(storage, "save_file", fail)
    else:
        real = Path.write_text
        monkeypatch.setattr(
            Path, "write_text", lambda p, *a, **k: fail(p) if ".config.json" in p.name else real(p, *a, **k)
        )
    with torch.no_grad():
        for parameter in model.model.connectors.parameters():
            parameter.mul_(1.5)
    with pytest.raises(OSError, match="No space left"):
        model.save_pretrained(saved)
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    assert torch.equal(logits_of(CalmForCausalLM.from_pretrained(saved), IDS), expected)


def test_a_file_in_the_place_of_the_folder(models: Path) -> None:
    (models / "file").write_text("precious")
    with pytest.raises(calmlm.ConfigError) as error:
        from_folders(models).save_pretrained(models / "file")
    assert_helpful(error.value, "file")
    assert (models / "file").read_text() == "precious"


def test_the_loaded_weights_do_not_hang_on_the_file(saved: Path) -> None:
    # A composition is often saved over the folder that it was loaded from.
    model = CalmForCausalLM.from_pretrained(saved)
    expected = logits_of(model, IDS)
    model.save_pretrained(saved)
    assert torch.equal(logits_of(model, IDS), expected)
    (saved / "model.safetensors").write_bytes(b"gone")
    assert torch.equal(logits_of(model, IDS), expected)


# The hub


def test_pushing_uploads_the_composition_alone(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []
    files: dict[str, str] = {}
    model = from_folders(models)

    class Api:
        def __init__(self, token: Any = None) -> None:
            calls.append({"token": token})

        def create_repo(self, repo_id: str, **kwargs: Any) -> Any:
            calls.append({"created": repo_id, **kwargs})
            return SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, *, folder_path: str, **kwargs: Any) -> str:
            files.update({path.name: path.read_text(errors="replace") for path in Path(folder_path).iterdir()})
            calls.append(kwargs)
            return "done"

    monkeypatch.setattr(publishing, "HfApi", Api)
    with pytest.raises(ConfigError) as caught:  # a folder of this machine means nothing to others
        model.push_to_hub("someone/something")
    assert_helpful(caught.value, "hub ids", "compose from its id")
    assert calls == []

    model.config.anchor["id"], model.config.augmenting["augmenting"]["id"] = "someone/anchor", "someone/augmenting"
    model.add_model_tags("sft")
    usual = {"private": True, "commit_message": "first", "token": "t", "max_shard_size": "1GB", "tags": ["law", "calm"]}
    assert model.push_to_hub("someone/something", **usual) == "done"
    assert calls[0] == {"token": "t"}
    assert calls[1] == {"created": "someone/something", "private": True, "exist_ok": True}
    assert calls[2]["repo_id"] == "someone/something"
    assert calls[2]["commit_message"] == "first"
    assert set(files) == {"model.safetensors", "config.json", "generation_config.json", "README.md"}
    assert "someone/anchor" in files["README.md"]
    assert ModelCard(files["README.md"]).data.tags == ["calm", "composition", "sft", "law"]

    pushed: list[Any] = []
    monkeypatch.setattr(CalmForCausalLM, "push_to_hub", lambda _, *args, **kwargs: pushed.append((args, kwargs)))
    model.save_pretrained(models / "mine", push_to_hub=True, repo_id="someone/other", private=True)
    assert pushed == [(("someone/other",), {"private": True})]
    model.save_pretrained(models / "mine", push_to_hub=True)
    assert pushed[-1] == (("mine",), {})
    # What says how other models are saved goes to no upload, which takes none of it.
    model.save_pretrained(models / "mine", push_to_hub=True, max_shard_size="1GB", safe_serialization=True)
    assert pushed[-1] == (("mine",), {})


def test_pushing_uploads_the_tensors_that_were_given(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An average of the weights, say, or what a trainer has gathered: the same in the folder and on the hub."""
    uploaded: dict[str, torch.Tensor] = {}

    def upload(folder_path: str, **_: Any) -> str:
        uploaded.update(load_file(f"{folder_path}/model.safetensors"))
        return "done"

    api = SimpleNamespace(create_repo=lambda name, **_: SimpleNamespace(repo_id=name), upload_folder=upload)
    monkeypatch.setattr(publishing, "HfApi", lambda token=None: api)
    model = from_folders(models)
    model.config.anchor["id"], model.config.augmenting["augmenting"]["id"] = "someone/anchor", "someone/augmenting"
    given = {name: tensor + 1 for name, tensor in model.composition_tensors().items()}
    model.save_pretrained(models / "mine", state_dict=given, push_to_hub=True)
    written = load_file(models / "mine" / "model.safetensors")
    for name, tensor in given.items():
        assert torch.equal(uploaded[name], tensor)
        assert torch.equal(written[name], tensor)


def test_a_base_is_not_overwritten(models: Path) -> None:
    model, before = from_folders(models), (models / "anchor" / "model.safetensors").read_bytes()
    with pytest.raises(ConfigError) as error:
        model.save_pretrained(models / "anchor")
    assert_helpful(error.value, "anchor", "llama")
    assert (models / "anchor" / "model.safetensors").read_bytes() == before
    model.save_pretrained(models / "composition")
    model.save_pretrained(models / "composition")  # its own folder may be written again


def test_bases_inside_the_folder_are_found_again(models: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = models / "composition"
    shutil.copytree(models / "anchor", folder / "bases" / "anchor")
    model = awaken(calmlm.compose(folder / "bases" / "anchor", models / "augmenting", connections=2))
    model.save_pretrained(folder)
    moved = tmp_path_factory.mktemp("elsewhere") / "parent"
    shutil.copytree(models, moved)
    found = CalmForCausalLM.from_pretrained(moved / "composition")
    assert torch.equal(logits_of(found, IDS), logits_of(model, IDS))
    assert Path(found.config.anchor["id"]) == moved / "composition" / "bases" / "anchor"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "the disk is full"),
        (OSError(errno.EROFS, "Read-only file system"), "Read-only file system"),
    ],
    ids=str,
)
def test_what_cannot_be_written_leaves_what_was_there(
    error: Exception, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_composition()
    model.save_pretrained(tmp_path / "c")
    before = {path.name: path.read_bytes() for path in (tmp_path / "c").iterdir()}

    def full(tensors: Any) -> Any:
        def write(path: Path) -> None:
            path.write_bytes(b"half")
            raise error

        return write

    monkeypatch.setattr(storage, "tensor_writer", full)
    with pytest.raises(WriteError, match=reason) as found:
        model.save_pretrained(tmp_path / "c")
    assert isinstance(found.value, OSError) and is_full(found.value) == ("full" in reason)
    assert {path.name: path.read_bytes() for path in (tmp_path / "c").iterdir()} == before
    (tmp_path / "kept").mkdir()
    for place in ("new/c", "kept", "kept/c"):
        with pytest.raises(WriteError, match=reason):
            model.save_pretrained(tmp_path / place)
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_dir()) == ["c", "kept"]
    with pytest.raises(calmlm.ConfigError, match="it is empty"):
        model.save_pretrained("")
