"""The name of a composition: trainers that load it once more get the composition, or are told why they cannot."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoProcessor, AutoTokenizer

import calmlm
from calmlm import CalmForCausalLM, CheckpointError
from calmlm.files.naming import IN_MEMORY, InMemory
from compositions import assert_helpful, awaken, logits_of, tiny_composition
from tiny import tiny_model, tiny_tokenizer, tiny_tokens

IDS = tiny_tokens(2, 7)


@pytest.fixture
def bases(tmp_path: Path) -> Path:
    """A folder with two base models, of which the anchor has a tokenizer."""
    tiny_model("llama", seed=1).save_pretrained(tmp_path / "anchor")
    tiny_tokenizer().save_pretrained(tmp_path / "anchor")
    tiny_model("gpt2", seed=2).save_pretrained(tmp_path / "augmenting")
    return tmp_path


@pytest.fixture
def fresh(bases: Path) -> CalmForCausalLM:
    """A composition in memory, awake."""
    return awaken(calmlm.compose(bases / "anchor", bases / "augmenting", 2))


@pytest.fixture
def saved(fresh: CalmForCausalLM, bases: Path) -> Path:
    """The same in a folder, without a tokenizer of its own."""
    fresh.save_pretrained(bases / "composition")
    return bases / "composition"


def reloaded(model: CalmForCausalLM, **options: Any) -> Any:
    """As TRL loads the reference of a model."""
    utils = pytest.importorskip("trl.trainer.utils")
    return utils.create_model_from_path(utils.get_config_model_id(model.config), **options)


# Loading a composition once more, by its name


def test_a_reload_gives_the_composition(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(saved.parent)
    model = CalmForCausalLM.from_pretrained("composition")
    monkeypatch.chdir("/")
    expected = logits_of(model, IDS)
    with model.disable_composition():
        assert not torch.equal(logits_of(model, IDS), expected)
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(model.config.name_or_path), IDS), expected)
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(model.name_or_path), IDS), expected)
    again = reloaded(model, dtype=model.dtype, attn_implementation=model.config._attn_implementation)
    assert type(again) is CalmForCausalLM
    assert torch.equal(logits_of(again, IDS), expected)


def test_a_composition_in_memory_cannot_be_loaded_by_its_name(fresh: CalmForCausalLM) -> None:
    for model in (fresh, tiny_composition(), copy.deepcopy(fresh), pickle.loads(pickle.dumps(fresh))):
        with pytest.raises(CheckpointError) as error:
            reloaded(model, dtype=model.dtype)
        assert_helpful(error.value, "in memory", "save it", "ref_model")
        with pytest.raises(CheckpointError, match="in memory"):
            CalmForCausalLM.from_pretrained(model.config.name_or_path)
        assert model.name_or_path == ""  # as of any model that was never loaded; PEFT asks for it


CHANGES: dict[str, Callable[[CalmForCausalLM], Any]] = {
    "another prefix": lambda model: model.set_augmenting_prefix("a fox:", tiny_tokenizer(), "first"),
    "one more model": lambda model: model.add_augmenting("more", tiny_composition()),
    "one model less": lambda model: model.remove_augmenting("second"),
    "a silent model": lambda model: model.disable_augmenting("second"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_composition_that_has_become_another_one_loses_its_name(bases: Path, change: str) -> None:
    calmlm.compose(
        bases / "anchor", {"first": bases / "augmenting", "second": bases / "augmenting"}, 2
    ).save_pretrained(bases / "two")
    model = CalmForCausalLM.from_pretrained(bases / "two")
    assert model.config.name_or_path == str(bases / "two")
    CHANGES[change](model)
    with pytest.raises(CheckpointError, match="in memory"):
        reloaded(model)
    if change == "a silent model":
        model.enable_augmenting("second")
        assert model.config.name_or_path == str(bases / "two")


def test_a_composition_that_trains_loses_its_name(saved: Path) -> None:
    """A second stage of training would otherwise be held against the first one's start."""
    model = CalmForCausalLM.from_pretrained(saved)
    model.eval()
    assert model.config.name_or_path == str(saved)
    model.requires_grad_(False).train()  # as below an adapter: nothing of it changes
    assert model.config.name_or_path == str(saved)
    model.model.connectors.requires_grad_(True)
    torch.nn.Sequential(model).train()  # as a wrapper does
    with pytest.raises(CheckpointError) as error:
        reloaded(model)
    assert_helpful(error.value, "trained")


def test_a_link_and_a_subfolder_name_the_folder_itself(saved: Path) -> None:
    link = saved.parent / "latest"
    link.symlink_to(saved)
    assert CalmForCausalLM.from_pretrained(link).config.name_or_path == str(saved)
    model = CalmForCausalLM.from_pretrained(saved.parent, subfolder="composition")
    assert model.config.name_or_path == str(saved)


def test_the_home_folder_is_found(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(saved.parent))
    model = CalmForCausalLM.from_pretrained("~/composition", anchor="~/anchor")
    assert model.config.name_or_path == str(saved)
    assert calmlm.compose("~/anchor", Path("~/augmenting"), 2).config.anchor["id"] == str(saved.parent / "anchor")
    model.save_pretrained("~/second")
    assert (saved.parent / "second" / "config.json").is_file()


def test_a_repository_keeps_its_id_and_a_revision_its_files(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    snapshot = saved.parent / "hub" / "models--someone--composition" / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    saved.rename(snapshot)
    (snapshot.parent.parent / "refs").mkdir()
    for ref in ("main", "v1"):
        (snapshot.parent.parent / "refs" / ref).write_text("0" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(saved.parent / "hub"))
    bases = {role: AutoModelForCausalLM.from_pretrained(saved.parent / role) for role in ("anchor", "augmenting")}
    assert CalmForCausalLM.from_pretrained("someone/composition", **bases).config.name_or_path == "someone/composition"
    model = CalmForCausalLM.from_pretrained("someone/composition", revision="v1", **bases)
    assert model.config.name_or_path == str(snapshot)


def test_loading_may_report_as_everywhere(saved: Path) -> None:
    model, report = AutoModelForCausalLM.from_pretrained(saved, output_loading_info=True)
    assert type(model) is CalmForCausalLM
    assert not report["missing_keys"]


# Its tokenizer


@pytest.mark.parametrize("auto", [AutoTokenizer, AutoProcessor])
def test_the_tokenizer_is_the_anchors_where_there_is_no_other(auto: Any, fresh: CalmForCausalLM, saved: Path) -> None:
    places = {
        "in memory": fresh.config.name_or_path,
        "copied": copy.deepcopy(fresh.config).name_or_path,
        "pickled": pickle.loads(pickle.dumps(fresh.config)).name_or_path,
        "loaded": CalmForCausalLM.from_pretrained(saved).config.name_or_path,
        "folder": saved,
    }
    for place in places.values():
        found = auto.from_pretrained(place, revision=None, trust_remote_code=False, padding_side="left")
        assert found.get_vocab() == tiny_tokenizer().get_vocab()
        assert found.padding_side == "left"


@pytest.mark.parametrize("auto", [AutoTokenizer, AutoProcessor])
def test_the_compositions_own_tokenizer_comes_first(auto: Any, saved: Path) -> None:
    own = tiny_tokenizer()
    own.add_tokens(["<own>"])
    own.save_pretrained(saved)
    assert len(auto.from_pretrained(saved)) == len(own)
    (saved / "tokenizer_config.json").unlink()
    assert len(auto.from_pretrained(saved)) == len(own)


@pytest.mark.parametrize("auto", [AutoTokenizer, AutoProcessor])
def test_no_tokenizer_anywhere(auto: Any, bases: Path) -> None:
    model = calmlm.compose(bases / "augmenting", tiny_model("llama", seed=1), 2)
    model.save_pretrained(bases / "composition")
    for name in (tiny_composition().config.name_or_path, model.config.name_or_path, bases / "composition", IN_MEMORY):
        with pytest.raises(CheckpointError) as error:
            auto.from_pretrained(name)
        assert_helpful(error.value, "processing_class")


def test_the_name_is_a_string_that_can_be_written() -> None:
    name = InMemory(anchor={"id": "x"})
    assert name == str(name) == IN_MEMORY
    assert copy.copy(name).anchor == pickle.loads(pickle.dumps(name)).anchor == {"id": "x"}
    config = tiny_composition().config
    assert config.to_dict()["_name_or_path"] == ""  # what others write into cards and logs
    assert yaml.safe_load(yaml.safe_dump({"base_model": config.to_dict()["_name_or_path"]})) == {"base_model": ""}
    assert IN_MEMORY not in config.to_json_string()


# Trainers


def data(kind: str) -> Any:
    datasets = pytest.importorskip("datasets")
    rows = [{"prompt": f"{i}+{i}=", "chosen": str(2 * i), "rejected": "no"} for i in range(8)]
    kept = {"dpo": ("prompt", "chosen", "rejected"), "kto": ("prompt", "completion", "label")}.get(kind, ("prompt",))
    rows = [row | {"completion": row["chosen"], "label": i % 2 == 0} for i, row in enumerate(rows)]
    return datasets.Dataset.from_list([{key: row[key] for key in kept} for row in rows])


def trainer_of(kind: str, model: Any, folder: Path, **options: Any) -> Any:
    """A trainer of TRL with a reference, that trains two steps."""
    trl = pytest.importorskip("trl")
    settings = {
        "output_dir": str(folder / "run"),
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "max_steps": 2,
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "bf16": False,
        "dataloader_pin_memory": False,
        "gradient_checkpointing": False,
    }
    if kind in ("grpo", "rloo"):
        settings |= {"beta": 0.1, "num_generations": 4, "max_completion_length": 5}
        options["reward_funcs"] = lambda completions, **_: [float(len(set(text))) for text in completions]
    if kind in ("dpo", "kto"):
        settings |= {"max_length": 32}
    name = kind.upper()
    arguments = getattr(trl, f"{name}Config")(**settings)
    return getattr(trl, f"{name}Trainer")(model=model, args=arguments, train_dataset=data(kind), **options)


@pytest.mark.parametrize("kind", ["grpo", "rloo", "dpo", "kto"])
def test_the_reference_of_a_trainer_is_the_composition(kind: str, saved: Path) -> None:
    """At the first step the policy is the reference: the divergence between them is zero."""
    model = CalmForCausalLM.from_pretrained(saved)
    trainer = trainer_of(kind, model, saved.parent)  # which finds the tokenizer by the name
    expected = logits_of(model, IDS)
    assert torch.equal(logits_of(trainer.ref_model, IDS), expected)
    trainer.train()
    first = trainer.state.log_history[0]
    divergence = {"grpo": "kl", "rloo": "kl", "dpo": "rewards/margins", "kto": "kl"}[kind]
    assert abs(first[divergence]) < 1e-5, first
    assert not torch.equal(logits_of(model, IDS), expected), "it trained"
    assert torch.equal(logits_of(trainer.ref_model, IDS), expected)


@pytest.mark.parametrize("kind", ["grpo", "rloo", "dpo", "kto"])
def test_a_trainer_says_that_a_composition_in_memory_has_no_reference(
    kind: str, fresh: CalmForCausalLM, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="must be saved before it can be loaded by its name"):
        trainer_of(kind, fresh, tmp_path)


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_a_copy_is_a_reference(kind: str, fresh: CalmForCausalLM, tmp_path: Path) -> None:
    trainer = trainer_of(kind, fresh, tmp_path, ref_model=copy.deepcopy(fresh))
    trainer.train()
    assert abs(trainer.state.log_history[0]["rewards/margins" if kind == "dpo" else "kl"]) < 1e-5


def test_supervised_training_finds_the_tokenizer(fresh: CalmForCausalLM, tmp_path: Path) -> None:
    """Without a ``processing_class``, as with any model."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    arguments = trl.SFTConfig(output_dir=str(tmp_path / "run"), use_cpu=True, report_to=[], max_steps=1, bf16=False)
    rows = datasets.Dataset.from_list([{"text": "1+1=2"}] * 8)
    trainer = trl.SFTTrainer(model=fresh, args=arguments, train_dataset=rows)
    assert trainer.processing_class.get_vocab() == tiny_tokenizer().get_vocab()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.create_model_card()
    assert IN_MEMORY not in (tmp_path / "run" / "README.md").read_text(encoding="utf-8")


def test_an_adapter_on_a_composition_is_loaded_onto_the_composition(saved: Path) -> None:
    peft = pytest.importorskip("peft")
    model = CalmForCausalLM.from_pretrained(saved)
    settings = peft.LoraConfig(r=2, target_modules=["up_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    adapted = peft.get_peft_model(model, settings)
    expected = logits_of(adapted, IDS)
    adapted.save_pretrained(saved.parent / "adapter")  # and no embeddings, whose size has not changed
    assert not [name for name in (saved.parent / "adapter").iterdir() if name.stat().st_size > 100_000]
    again = peft.AutoPeftModelForCausalLM.from_pretrained(saved.parent / "adapter")
    assert torch.allclose(logits_of(again, IDS), expected, atol=1e-5)
