"""Plans: parameters to the last one, operations and cache beside what is counted, and what is printed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertModel, LlamaConfig, ViTModel

import calmlm
from calmlm.cli import main
from calmlm.errors import ConfigError, ModelError
from calmlm.experiments.flops import Meter
from calmlm.training.activation_cache import bytes_needed
from calmlm.training.plan import GPUS, Plan, Texts, make_plan
from calmlm.training.schema import load_config, parse_config
from documents import ROOT
from tiny import tiny_model, tiny_tokenizer, tiny_tokens

LINES = [f"{number} and {number} are {2 * number}" for number in range(12)]
CASES: dict[str, dict[str, Any]] = {
    "every-4": {},
    "top, gated": {"connections": "top", "connector": {"gate": True, "norm": False}},
    "rank, null key": {"connections": 2, "connector": {"rank": 8, "null_key": True, "query_key_bias": 1.0}},
    "flamingo": {"connections": 2, "connector": {"kind": "flamingo"}},
    "legonn": {"connections": 2, "connector": {"kind": "legonn"}},
    "words": {"connections": "none", "words": "map"},
    "pointer and adapters": {"connections": 1, "words": "pointer", "adapters": 4},
}
FAMILIES = [("llama", "gpt2"), ("mixtral", "mistral"), ("gpt_neox", "qwen2"), ("gpt2", "gemma3_text")]


@pytest.fixture
def folders(tmp_path: Path, request: pytest.FixtureRequest) -> dict[str, str]:
    anchor, augmenting = request.param
    for name, family, seed in (("anchor", anchor, 1), ("augmenting", augmenting, 2)):
        tiny_model(family, seed=seed).save_pretrained(tmp_path / name)
    return {name: str(tmp_path / name) for name in ("anchor", "augmenting")}


def planned(folders: dict[str, Any], case: dict[str, Any], texts: Texts) -> Plan:
    values = {"output": "x", "model": {**folders, **case}, "data": {"train": "x.jsonl"}}
    return make_plan(parse_config(values), texts)


def made(folders: dict[str, str], case: dict[str, Any]) -> calmlm.CalmForCausalLM:
    options = {**case, **case.get("connector", {})}
    options.pop("connector", None)
    kind = options.pop("kind", "cross_attention")
    return calmlm.compose(folders["anchor"], folders["augmenting"], connector=kind, **options)


@pytest.mark.parametrize(
    ("folders", "case"),
    [*((FAMILIES[0], case) for case in CASES), *((pair, "every-4") for pair in FAMILIES[1:])],
    indirect=["folders"],
)
def test_figures_are_those_of_the_composition(folders: dict[str, str], case: str) -> None:
    length, rows = 24, 3
    plan = planned(folders, CASES[case], Texts(length, length - 1, rows))
    model = made(folders, CASES[case])
    assert plan.trained == model.get_nb_trainable_parameters()[0]
    assert plan.anchor.parameters == model.anchor.num_parameters()
    assert plan.untouched == model.model.untouched()
    entry = model.config.augmenting["augmenting"]
    assert [list(pair) for pair in plan.parts["augmenting"].pairs] == entry["connections"]
    examples = [{"input_ids": row, "labels": row} for row in tiny_tokens(rows, length).tolist()]
    assert plan.cache(rows) == pytest.approx(
        bytes_needed(model.model, examples, None, anchor=plan.keeps_anchor), rel=0.01
    )


PLAIN = {"plain_text": "plain.txt"}
JOINED: dict[str, dict[str, Any]] = {
    "maps of words that train": {"words": "map", "train_map": True},
    "the recipe": PLAIN,
    "the recipe, maps that stay": {**PLAIN, "train_map": False},
    "plain text and heads": {**PLAIN, "num_heads": 2},
    "plain text and a kind": {**PLAIN, "connector": {"kind": "cross_attention"}},
    "plain text and an option": {**PLAIN, "connector": {"gate": True}},
    "plain text, prompts": {**PLAIN, "refresh": False},
    "aligned, with a gate": {**PLAIN, "connections": "top", "init": "aligned"},
    "an expression": {"adapters": {"r": 2, "target_modules": ".*q_proj"}, "connections": "top"},
    "ends of names": {"adapters": {"r": 2, "target_modules": ["self_attn.q_proj"]}},
    "one layer": {
        "adapters": {"r": 2, "target_modules": ["q_proj"], "layers_to_transform": [3]}, "connections": "top",
    },
    "all but some": {"adapters": {"r": 2, "exclude_modules": ["q_proj"]}},
}  # fmt: skip


@pytest.mark.parametrize("folders", [("llama", "mistral")], indirect=True)
def test_whatever_says_how_models_are_joined(folders: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "plain.txt").write_text("\n".join(LINES * 2))
    for name, case in JOINED.items():
        given = {**case, **({"plain_text": str(tmp_path / "plain.txt")} if "plain_text" in case else {})}
        plan = planned(folders, given, Texts(24, 23, 3))
        options = {**case, **case.get("connector", {})}
        options["connector"] = options.pop("kind", None)
        if "plain_text" in case:
            made = tiny_tokenizer()
            options |= {"plain_text": LINES * 2, "tokenizer": made, "augmenting_tokenizer": made}
        model = calmlm.compose(folders["anchor"], folders["augmenting"], **options)
        assert plan.trained == model.get_nb_trainable_parameters()[0], name
        assert plan.untouched == model.model.untouched(), name
    two = {"one": folders["augmenting"], "two": folders["augmenting"]}
    plan = planned({**folders, "augmenting": two}, {"adapters": 2}, Texts())
    assert plan.trained == calmlm.compose(folders["anchor"], two, adapters=2).get_nb_trainable_parameters()[0]
    with pytest.raises(ConfigError, match="none of its maps is among target_modules"):
        planned(folders, {"adapters": {"r": 2, "target_modules": ["query"]}}, Texts())


@pytest.mark.parametrize(
    ("folders", "case"), [*((FAMILIES[0], case) for case in CASES), (FAMILIES[2], "every-4")], indirect=["folders"]
)
def test_operations_are_what_is_counted(folders: dict[str, str], case: str) -> None:
    length, rows = 48, 2
    plan = planned(folders, CASES[case], Texts(length, length, rows))
    model = made(folders, CASES[case]).train()
    ids = tiny_tokens(rows, length)
    meter = Meter()
    with meter.counting():
        model(ids, labels=ids, use_cache=False).loss.backward()
    assert plan.step() == pytest.approx(meter.flops, rel=0.12)
    anchor = model.anchor.requires_grad_(True)
    meter = Meter()
    with meter.counting(), model.disable_composition():
        anchor(ids, labels=ids, use_cache=False).loss.backward()
    assert plan.full_fine_tuning == pytest.approx(meter.flops, rel=0.12)


@pytest.mark.parametrize("folders", [("llama", "gpt2")], indirect=True, ids="+".join)
def test_a_warm_cache_saves_what_never_changes(folders: dict[str, str]) -> None:
    even, top = (planned(folders, {"connections": where}, Texts(64, 16, 4)) for where in ("every-4", "top"))
    assert even.step(cached=True) < even.step()
    assert top.step(cached=True) < 0.6 * top.step()
    assert planned(folders, {"adapters": 4}, Texts()).untouched == 0
    spread = make_plan(parse_config({"output": "x", "model": folders, "data": {"train": "x"}}), Texts(), devices=4)
    alone = make_plan(parse_config({"output": "x", "model": folders, "data": {"train": "x"}}), Texts())
    assert spread.memory["frozen weights"] == pytest.approx(alone.memory["frozen weights"] / 4, abs=1)


def test_large_models_are_planned_without_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    LlamaConfig(
        hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, intermediate_size=14336,
        vocab_size=128256, dtype=torch.bfloat16, architectures=["LlamaForCausalLM"],
    ).save_pretrained(tmp_path / "big")  # fmt: skip
    LlamaConfig(
        hidden_size=896, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2, intermediate_size=4864,
        vocab_size=151936, tie_word_embeddings=True, dtype=torch.bfloat16, architectures=["LlamaForCausalLM"],
    ).save_pretrained(tmp_path / "[old]")  # fmt: skip
    config = tmp_path / "run.yaml"
    config.write_text(
        f"output: {tmp_path / 'run'}\nmodel: {{anchor: {tmp_path / 'big'}, augmenting: '{tmp_path / '[old]'}'}}\n"
        f"data: {{train: nothing.jsonl}}\ntrainer: {{per_device_train_batch_size: 4}}\n"
    )
    assert main(["plan", str(config), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"]["anchor"] == 8_030_261_248
    assert found["bytes_per_device"]["frozen weights"] == 2 * (8_030_261_248 + found["parameters"]["augmenting"])
    assert found["texts"]["rows"] == 4
    assert found["step_flops"]["composition"] < found["step_flops"]["full fine-tuning of the anchor"]
    assert main(["plan", str(config), "--gpu", "4090", "--devices", "2", "--length", "100", "--labelled", "10"]) == 0
    printed = capsys.readouterr().out
    assert "8,030,261,248" in printed
    assert "[old]" in printed
    assert "1,000,000" in printed
    assert main(["plan", str(config), "--gpu", "abacus"]) == 2
    assert "--gpu must be one of h100" in capsys.readouterr().err
    assert main(["plan", str(config), "--length", "8"]) == 2
    assert "--labelled must be at most --length, 8, but got 128" in capsys.readouterr().err


def test_the_table_in_the_docs_is_what_is_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    shown = [line for line in text.splitlines() if line.startswith(("| 0.5B", "| 2B"))]
    found = []
    for name, file, devices in (("0.5B and 8B", "8b", 1), ("2B and 70B", "70b", 8)):
        for where in ("every-4", "top"):
            config = load_config(f"configs/plan/{file}.yaml", [f"model.connections={where}"])
            plan = make_plan(config, Texts(), devices)
            full, hours = plan.full_fine_tuning, [plan.seconds(10**n, GPUS["h100"][0]) / 3600 for n in (4, 5, 6)]
            found.append(
                f"| {name} | {where} | {plan.step() / full:.2f} | {plan.step(cached=True) / full:.2f} "
                f"| {sum(plan.memory.values()) / 2**30:.1f} | {plan.cache(10_000) / 2**30:.0f} "
                f"| {hours[0]:.2f} h | {hours[1]:.2f} h | {hours[2]:.1f} h |"
            )
    assert shown == found


def test_what_cannot_be_planned(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="anchor must be a causal language model whose configuration can be read, but"):
        planned({"anchor": str(tmp_path / "none"), "augmenting": "x"}, {}, Texts())
    for name in ("anchor", "augmenting"):
        tiny_model("llama").save_pretrained(tmp_path / name)
    folders = {name: str(tmp_path / name) for name in ("anchor", "augmenting")}
    made(folders, {}).save_pretrained(tmp_path / "composed")
    with pytest.raises(ModelError, match=r"must be a single model, but .*composed' is a composition"):
        planned({**folders, "augmenting": str(tmp_path / "composed")}, {}, Texts())
    values = {"output": "x", "model": {"composition": "y"}, "data": {"train": "x"}}
    with pytest.raises(ConfigError, match="A plan needs model.anchor and model.augmenting"):
        make_plan(parse_config(values), Texts())


@pytest.mark.parametrize("kind", [BertModel, ViTModel])
def test_an_encoder_is_refused_as_in_training(tmp_path: Path, kind: Any) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "anchor")
    kind.config_class(architectures=[kind.__name__]).save_pretrained(tmp_path / "eyes")
    with pytest.raises(ConfigError, match="expected models that read the data's text, but 'eyes' is an encoder"):
        planned({"anchor": str(tmp_path / "anchor"), "augmenting": {"eyes": str(tmp_path / "eyes")}}, {}, Texts())


def test_code_that_comes_with_a_model_runs_where_the_file_says_so(tmp_path: Path) -> None:
    mine, usual = tmp_path / "mine", tmp_path / "usual"
    model = tiny_model("llama")
    for folder in (mine, usual):
        model.save_pretrained(folder)
    (mine / "modeling_planned.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class PlannedConfig(LlamaConfig):\n    model_type = 'planned'\n"
        "class PlannedForCausalLM(LlamaForCausalLM):\n    config_class = PlannedConfig\n"
    )
    names = {"AutoConfig": "PlannedConfig", "AutoModelForCausalLM": "PlannedForCausalLM"}
    config = json.loads((mine / "config.json").read_text()) | {
        "model_type": "planned",
        "architectures": ["PlannedForCausalLM"],
        "auto_map": {auto: f"modeling_planned.{name}" for auto, name in names.items()},
    }
    (mine / "config.json").write_text(json.dumps(config))
    folders = {"anchor": str(usual), "augmenting": str(mine)}
    plan = planned({**folders, "trust_remote_code": True}, {}, Texts())
    assert plan.augmenting["augmenting"].parameters == model.num_parameters()
    with pytest.raises(ModelError, match="whose configuration can be read, but"):  # nothing of it runs unasked
        planned(folders, {}, Texts())


def test_the_shipped_configuration_is_planned() -> None:
    models = ROOT / "models"
    if not models.is_dir():
        pytest.skip("the real models are not in models/: run scripts/models")
    assert main(["plan", str(ROOT / "configs" / "real" / "train.yaml")]) == 0
