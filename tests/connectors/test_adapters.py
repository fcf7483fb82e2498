"""Adapters that belong to a composition: PEFT's own, beside an anchor that stays as it is."""

from __future__ import annotations

import copy
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import calmlm
from calmlm.connectors.adapters import JOINT, Adapters
from calmlm.errors import CheckpointError, ConfigError, MissingExtraError
from calmlm.files.inspection import describe
from compositions import assert_close, logits_of, tiny_composition
from tiny import FAMILIES as FAMILY_SIZES
from tiny import VOCAB_SIZE, tiny_model, tiny_tokens

QUIET: dict[str, Any] = {"connections": "none", "words": "map"}  # words are silent at the start
FAMILIES = ["llama", "gpt2", "gemma3_text", "opt", "qwen2", "gpt_neox"]


def adapted(family: str, adapters: Any = 3, **options: Any) -> calmlm.CalmForCausalLM:
    """A composition in which nothing but the adapters speaks."""
    model = tiny_composition(family, "mistral", awake=False, adapters=adapters, **QUIET, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapters_of(model).named_parameters():
            if name.endswith("up.weight"):
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def adapters_of(model: calmlm.CalmForCausalLM) -> Adapters:
    found = model.model.connectors["augmenting"][-1]
    assert isinstance(found, Adapters)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_they_are_pefts(family: str, dtype: torch.dtype) -> None:
    """Float32 adapters beside an anchor of either dtype."""
    model = adapted(family).eval()
    ids = tiny_tokens(2, 7)
    model.anchor.to(dtype)
    model.model.augmenting.to(dtype)
    settings: dict[str, Any] = {"fan_in_fan_out": True} if family == "gpt2" else {}
    other = get_peft_model(
        tiny_model(family, seed=1, attn_implementation="eager").to(dtype),
        LoraConfig(r=3, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM", **settings),
    )
    ours = dict(adapters_of(model).named_parameters())
    prefix = next(name for name, module in other.named_modules() if module is other.get_decoder()) + "."
    filled = 0
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            for theirs, own in ((".lora_A.default", "down"), (".lora_B.default", "up")):
                if theirs in name:
                    target = name.removeprefix(prefix).split(theirs)[0]
                    parameter.copy_(ours[f"maps.{target.replace('.', JOINT)}.{own}.weight"])
                    filled += 1
    assert filled == len(ours)
    found = logits_of(model, ids)
    assert_close(found, logits_of(other.eval(), ids), 1e-5)
    assert not torch.allclose(found, logits_of(model.anchor, ids), atol=1e-2)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_anchor_stays_as_it_is(family: str) -> None:
    anchor = tiny_model(family, seed=1)
    before = {name: type(module) for name, module in anchor.named_modules()}
    attributes = {name: set(vars(module)) for name, module in anchor.named_modules()}
    model = calmlm.compose(anchor, tiny_model("mistral"), adapters=2)
    assert {name: type(module) for name, module in anchor.named_modules()} == before
    assert {name: set(vars(module)) for name, module in anchor.named_modules()} == attributes
    assert not any(parameter.requires_grad for parameter in anchor.parameters())
    assert torch.equal(logits_of(model, tiny_tokens(1, 5)), logits_of(anchor, tiny_tokens(1, 5)))


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_checkpointing_changes_neither_loss_nor_gradients(family: str, use_reentrant: bool) -> None:
    model = adapted(family).train()
    ids = tiny_tokens(2, 7)
    results = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
            model.train()
        model.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        results.append((loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    (loss, expected), (again, found) = results
    assert torch.equal(again, loss)
    assert found.keys() == expected.keys()
    assert any("up.weight" in name for name in found)
    for name, gradient in found.items():
        assert_close(gradient, expected[name], 1e-6)


def test_settings_of_peft_are_taken() -> None:
    wanted = LoraConfig(r=4, lora_alpha=2, lora_dropout=0.5, target_modules=["q_proj"], layers_to_transform=[1])
    for adapters in (wanted, {"r": 4, "lora_alpha": 2, "lora_dropout": 0.5, "target_modules": ["q_proj"],
                              "layers_to_transform": [1]}):  # fmt: skip
        model = adapted("llama", adapters)
        entry = model.config.augmenting["augmenting"]["adapters"]
        assert list(entry["targets"]) == ["layers.1.self_attn.q_proj"]
        assert (entry["rank"], entry["scaling"], entry["dropout"]) == (4, 0.5, 0.5)
        ids = tiny_tokens(1, 5)
        assert torch.equal(logits_of(model, ids), logits_of(model, ids)), "dropout in evaluation"
        model.train()
        first, second = (model(input_ids=ids).logits for _ in range(2))
        assert not torch.equal(first, second), "no dropout in training"


def test_loading_needs_no_peft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted("gpt2")
    model.save_pretrained(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] == "peft"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "peft", None)
    small = copy.deepcopy(model.augmenting["augmenting"])
    again = calmlm.CalmForCausalLM.from_pretrained(tmp_path, anchor=copy.deepcopy(model.anchor), augmenting=small)
    assert torch.equal(logits_of(again, tiny_tokens(1, 5)), logits_of(model, tiny_tokens(1, 5)))


def test_two_models_bring_their_own() -> None:
    model, other = adapted("llama"), adapted("llama", 2)
    ids = tiny_tokens(1, 6)
    before = logits_of(model, ids)
    model.add_augmenting("other", other)
    both = logits_of(model, ids)
    assert not torch.allclose(both, before, atol=1e-3)
    model.disable_augmenting("other")
    assert torch.equal(logits_of(model, ids), before)
    model.disable_augmenting("augmenting")
    model.enable_augmenting("other")
    assert_close(logits_of(model, ids), logits_of(other, ids), 1e-6)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    llama, mistral = tiny_model("llama"), tiny_model("mistral")
    cases: list[tuple[Any, str]] = [
        ("many", "adapters must be a rank"),
        (True, "adapters must be a rank"),
        (0, "PEFT finds that they do not|it refuses them"),
        ({"r": 2, "target_modules": ["nothing"]}, "PEFT finds that they do not"),
        ({"r": 2, "ranks": 3}, "it refuses them"),
        ({"r": 2, "use_dora": True}, "but got use_dora"),
        ({"r": 2, "bias": "all"}, "but got bias"),
        ({"r": 2, "target_modules": "["}, "PEFT finds that they do not"),
        ({"r": 2, "lora_alpha": float("nan")}, "finite lora_alpha"),
        ({"r": 2, "lora_alpha": 0}, "finite lora_alpha"),
        ({"r": 2, "lora_dropout": 1.0}, "lora_dropout below 1"),
        ({"r": 2, "lora_bias": True}, "but got lora_bias"),
        ({"r": 2, "rank_pattern": {"q_proj": 4}}, "one rank, scaling and dropout"),
        ({"r": 2, "target_modules": ["embed_tokens"]}, "beside linear maps"),
        ({"r": 2, "target_modules": ["lm_head"]}, "'lm_head' is outside"),
    ]
    for adapters, message in cases:
        with pytest.raises(ConfigError, match=message):
            calmlm.compose(llama, mistral, adapters=adapters)
        assert type(llama.model.layers[0].self_attn.q_proj) is torch.nn.Linear
    model = adapted("llama")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    entry = config["augmenting"]["augmenting"]["adapters"]
    damaged: list[Any] = [{**entry, key: value} for key, value in (
        ("rank", "3"), ("rank", -1), ("dropout", 1.5), ("dropout", math.nan), ("scaling", math.inf),
        ("targets", {"layers.9.q": [1, 2]}), ("targets", {"": [1, 2]}), ("targets", {"norm": [48, 48]}),
        ("targets", {"layers.0.self_attn.q_proj": [48, 47]}),
    )]  # fmt: skip
    for wrong in (*damaged, {"rank": 3}):
        config["augmenting"]["augmenting"]["adapters"] = wrong
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError):
            calmlm.CalmForCausalLM.from_pretrained(tmp_path, anchor=model.anchor, augmenting=mistral)


def test_without_peft_they_name_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("calmlm.data.extras.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match="peft"):
        calmlm.compose(tiny_model("llama"), tiny_model("mistral"), adapters=2)


def test_inspect_and_the_card_name_them(tmp_path: Path) -> None:
    adapted("llama").save_pretrained(tmp_path)
    lines = dict(describe(str(tmp_path)))
    assert re.fullmatch(r"rank 3, beside \d+ maps of the anchor", lines["adapters"])
    assert "adapters (rank 3)" in (tmp_path / "README.md").read_text(encoding="utf-8")


ODD: dict[str, dict[str, Any]] = {
    "mixtral": {}, "olmoe": {}, "qwen2_moe": {},
    # Some layers have no experts, all have shared ones: linear maps of the names that the experts' maps once had.
    "deepseek_v3": {
        "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4,
        "intermediate_size": 48, "moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2,
        "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 16,
        "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "head_dim": 4, "v_head_dim": 8,
    },
    # The head has a linear map of the name that the layers' maps have.
    "roberta": {"is_decoder": True, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
                "intermediate_size": 48, "pad_token_id": 1},
    # Maps lie at places 0 and 1 of a list, as layers do.
    "ctrl": {"n_embd": 32, "n_layer": 3, "n_head": 4, "dff": 48, "n_positions": 64},
    # Its kernels take some maps' weights alone.
    "mamba2": {"hidden_size": 32, "num_hidden_layers": 3, "num_heads": 4, "head_dim": 16, "n_groups": 1,
               "state_size": 8},
}  # fmt: skip


@pytest.mark.parametrize("family", ODD)
def test_all_linear_maps_of_the_decoder_and_nothing_else(family: str) -> None:
    if family in FAMILY_SIZES:
        anchor = tiny_model(family, seed=1)
    else:
        config = AutoConfig.for_model(family, vocab_size=VOCAB_SIZE, **ODD[family])
        anchor = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    before = {name: type(module) for name, module in anchor.named_modules()}
    model = calmlm.compose(anchor, tiny_model("mistral"), 2, adapters=2)
    assert {name: type(module) for name, module in anchor.named_modules()} == before
    linear = {n for n, m in model.model.backbone().decoder.named_modules() if isinstance(m, (nn.Linear, Conv1D))}
    taken = {name for name in linear if name.endswith("mixer.out_proj")}
    assert set(model.config.augmenting["augmenting"]["adapters"]["targets"]) == linear - taken
    ids = tiny_tokens(2, 5)
    assert torch.equal(logits_of(model, ids), logits_of(anchor, ids))
    model.train()(input_ids=ids, labels=ids).loss.backward()
    assert any(
        bool(p.grad.any()) for n, p in model.named_parameters() if n.endswith("up.weight") and p.grad is not None
    )


@pytest.mark.parametrize("start", ["pissa", "olora", False])
def test_starts_that_change_the_anchor_are_refused_before_they_do(start: Any) -> None:
    anchor = tiny_model("llama", seed=1)
    before = copy.deepcopy(anchor.state_dict())
    with pytest.raises(ConfigError, match="must start as the anchor"):
        calmlm.compose(anchor, tiny_model("mistral"), adapters={"r": 2, "init_lora_weights": start})
    after = anchor.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


def test_two_compositions_take_turns_with_checkpointing() -> None:
    """Each finds its own call when a layer of their one anchor is run again."""
    anchor, ids = tiny_model("llama", seed=1), tiny_tokens(2, 7)
    models = [calmlm.compose(anchor, tiny_model("mistral", seed=seed), adapters=2, **QUIET) for seed in (2, 3)]
    for seed, model in enumerate(models):
        for name, parameter in adapters_of(model).named_parameters():
            if name.endswith("up.weight"):
                torch.nn.init.normal_(parameter, std=0.1 + seed)

    def gradients(model: calmlm.CalmForCausalLM) -> list[torch.Tensor]:
        model.train().zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        return [p.grad.clone() for p in adapters_of(model).parameters()]

    expected = [gradients(model) for model in models]
    for model in models:
        model.activation_checkpointing_enable({"use_reentrant": False})
        model.train()
    for model, wanted in [*zip(models, expected, strict=True)] * 2:
        for found, gradient in zip(gradients(model), wanted, strict=True):
            assert_close(found, gradient, 1e-6)


def test_an_adapter_of_peft_on_them_speaks_before_it_is_merged() -> None:
    """Where PEFT adapts a whole composition, it finds their maps as well."""
    model, ids = adapted("llama"), tiny_tokens(2, 7)
    before = logits_of(model, ids)
    settings = LoraConfig(r=2, target_modules=["down", "up"], task_type="CAUSAL_LM", init_lora_weights=False)
    torch.manual_seed(0)  # from which PEFT draws
    over = get_peft_model(model, settings)
    found = logits_of(over, ids)
    assert not torch.allclose(found, before, atol=1e-2)
    over.train()(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for name, p in over.named_parameters() if p.requires_grad)
    with over.eval().disable_adapter():
        assert torch.equal(logits_of(over, ids), before)
    assert not adapters_of(model).is_identity
    assert_close(logits_of(over.merge_and_unload(), ids), found, 1e-4)


def test_each_of_several_models_has_a_start_of_its_own() -> None:
    """With one start for all they would learn the same, and two would be worth one."""
    augmenting = {"one": tiny_model("gpt2", seed=2), "two": tiny_model("mistral", seed=3)}
    model = calmlm.compose(tiny_model("llama", seed=1), augmenting, 2, adapters=2)
    starts = [dict(model.model.connectors[name][-1].named_parameters()) for name in augmenting]
    for name, start in starts[0].items():
        assert torch.equal(start, starts[1][name]) == name.endswith("up.weight"), name


def test_dropout_that_peft_puts_into_a_base_is_on_in_training_alone() -> None:
    model, ids = adapted("llama"), tiny_tokens(1, 6)
    settings = LoraConfig(lora_dropout=0.5, target_modules=r".*anchor.*(q_proj|v_proj)", init_lora_weights=False)
    wrapped = get_peft_model(model, settings).train()  # type: ignore[arg-type]
    first, second = (wrapped(input_ids=ids).logits for _ in range(2))
    assert not torch.equal(first, second)
    wrapped.eval()
    assert torch.equal(logits_of(wrapped, ids), logits_of(wrapped, ids))
    assert not model.anchor.training
