"""Adapters merged into the weights beside which they stand: the same text, an anchor that stays as it is."""

from __future__ import annotations

import copy
import pickle
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, OFTConfig, get_peft_model
from torch import nn
from torch.nn.functional import linear
from torch.nn.utils import prune
from torch.nn.utils.parametrize import register_parametrization

import calmlm
from calmlm.connectors.adapters import Adapters
from calmlm.errors import ModelError
from calmlm.state.merged_weights import MergedForward
from compositions import assert_close, logits_of, tiny_composition
from readers.test_own_text import PAIRS, composed
from tiny import tiny_tokens
from tokenizers_tiny import tokenizer

FAMILIES = ["llama", "gpt2", "gemma3_text", "opt", "qwen2", "gpt_neox", "falcon"]
IDS = tiny_tokens(3, 7)


def adapted(family: str = "llama", adapters: Any = 3, **options: Any) -> calmlm.CalmForCausalLM:
    """A composition with connections, words and adapters that all speak."""
    model = tiny_composition(family, "mistral", words="map", adapters=adapters, **options).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.model.connectors.named_parameters():
            if name.endswith("up.weight"):
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def maps_of(model: calmlm.CalmForCausalLM) -> list[nn.Module]:
    return [module for module in model.anchor.modules() if isinstance(vars(module).get("forward"), MergedForward)]


def count_adapters(model: calmlm.CalmForCausalLM) -> list[int]:
    """How many adapters compute in the calls that follow."""
    calls = [0]
    for module in model.modules():
        if isinstance(module, Adapters):
            for adapter in module.maps.values():
                adapter.dropout.register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_merging_changes_roundings_alone(family: str, dtype: torch.dtype) -> None:
    model = adapted(family).to(dtype)
    before, alone = logits_of(model, IDS), logits_of(model.anchor, IDS)
    model.merge_adapters()
    calls = count_adapters(model)
    merged = logits_of(model, IDS)
    assert calls == [0]
    exact = logits_of(copy.deepcopy(model).float(), IDS)
    rounded, error = (float((found.float() - exact).abs().max()) for found in (before, merged))
    assert error <= 2 * rounded + 1e-5
    with model.disable_composition():
        assert torch.equal(logits_of(model, IDS), alone)
    assert torch.equal(logits_of(model.anchor, IDS), alone)
    model.unmerge_adapters()
    assert torch.equal(logits_of(model, IDS), before)
    assert not maps_of(model)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_merged_map_is_its_sum_by_hand(family: str) -> None:
    model = adapted(family)
    model.merge_adapters()
    found: Any = model.model.connectors["augmenting"][-1]
    inner = model.anchor.get_decoder()
    for target in model.config.augmenting["augmenting"]["adapters"]["targets"]:
        module, adapter = inner.get_submodule(target), found.of(target)
        weight = module.weight.T if family == "gpt2" else module.weight
        x = torch.randn(2, 3, weight.shape[1])
        merge = vars(module)["forward"].merges[0]
        merge.update()
        expected = linear(x, weight, module.bias) + adapter.scaling * (x @ adapter.down.weight.T @ adapter.up.weight.T)
        assert_close(linear(x, merge.weight, module.bias), expected, 1e-5)


def test_rows_scales_and_gradients_are_computed_as_before() -> None:
    model = adapted()
    mask = torch.tensor([True, False, True])
    with torch.no_grad():
        rows = model(IDS, composition_mask=mask).logits
        with model.composition_scale(0.5):
            half = model(IDS).logits
    whole = model(IDS, labels=IDS)
    whole.loss.backward()
    gradients = [p.grad.clone() for p in model.model.connectors.parameters() if p.grad is not None]
    model.zero_grad()
    model.merge_adapters()
    with torch.no_grad():
        assert torch.equal(model(IDS, composition_mask=mask).logits, rows)
        with model.composition_scale(0.5):
            assert torch.equal(model(IDS).logits, half)
    model(IDS, labels=IDS).loss.backward()
    found = [p.grad for p in model.model.connectors.parameters() if p.grad is not None]
    assert len(found) == len(gradients) > 20
    assert all(torch.equal(one, other) for one, other in zip(found, gradients, strict=True))
    model.train()
    with torch.no_grad():
        calls = count_adapters(model)
        model(IDS)
    assert calls != [0]


def test_what_changes_is_merged_again(tmp_path: Path) -> None:
    model = adapted()
    model.merge_adapters()
    first = logits_of(model, IDS)
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    model.eval()
    calls = count_adapters(model)
    trained = logits_of(model, IDS)
    assert calls == [0]
    assert not torch.allclose(trained, first, atol=1e-3)
    model.unmerge_adapters()
    assert_close(trained, logits_of(model, IDS), 1e-5)
    model.merge_adapters()
    model.to(torch.float64)
    assert_close(logits_of(model, IDS), trained.double(), 1e-5)
    model.float()
    with torch.no_grad():
        model.anchor.get_decoder().layers[0].mlp.up_proj.weight.mul_(2)
    merged = logits_of(model, IDS)
    model.unmerge_adapters()
    assert_close(merged, logits_of(model, IDS), 1e-5)


def _halved(module: Any, args: Any, output: Any) -> Any:
    return 0.5 * output


class Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


TARGET = "layers.0.mlp.up_proj"
CHANGES: dict[str, Any] = {
    "values": lambda maps, one, of: setattr(one.up.weight, "data", 2 * one.up.weight.data),
    "parameter": lambda maps, one, of: setattr(one.down, "weight", nn.Parameter(-one.down.weight.detach())),
    "map": lambda maps, one, of: setattr(one, "up", nn.Linear(one.up.in_features, one.up.out_features, bias=False)),
    "in place": lambda maps, one, of: one.down.weight.mul_(3),
    "scaling": lambda maps, one, of: setattr(one, "scaling", 5.0),
    "adapter": lambda maps, one, of: maps.maps.__setitem__(maps.key(TARGET), nn.Sequential(one, nn.ReLU())),
    "all adapters": lambda maps, one, of: setattr(maps, "maps", nn.ModuleDict({**maps.maps, maps.key(TARGET): Off()})),
    "hook": lambda maps, one, of: one.up.register_forward_hook(_halved),
    "forward": lambda maps, one, of: setattr(one, "forward", lambda x: 0.0),
    "pruned": lambda maps, one, of: prune.l1_unstructured(one.up, "weight", 0.5),
    "parametrised": lambda maps, one, of: register_parametrization(one.up, "weight", Doubled()),
    "anchor pruned": lambda maps, one, of: prune.l1_unstructured(of, "weight", 0.5),
    "anchor parametrised": lambda maps, one, of: register_parametrization(of, "weight", Doubled()),
    "anchor hooked": lambda maps, one, of: of.register_forward_hook(_halved),
}


class Off(nn.Module):
    def forward(self, x: torch.Tensor) -> float:
        return 0.0


@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_each_kind_of_change_is_seen(change: str) -> None:
    model, same = adapted(), adapted()
    for each in (model, same):
        if each is model:
            each.merge_adapters()
        first = logits_of(each, IDS)
        torch.manual_seed(3)
        adapters: Any = each.model.connectors["augmenting"][-1]
        CHANGES[change](adapters, adapters.of(TARGET), each.anchor.get_decoder().get_submodule(TARGET))
    found, expected = logits_of(model, IDS), logits_of(same, IDS)
    assert not torch.allclose(expected, first, atol=1e-3)
    assert_close(found, expected, 1e-5)


@torch.no_grad()
def test_what_is_made_of_other_parameters_is_not_merged() -> None:
    """Nobody would notice that these change."""
    for place in ("adapter", "anchor"):
        model = adapted()
        adapters: Any = model.model.connectors["augmenting"][-1]
        of = model.anchor.get_decoder().get_submodule(TARGET)
        prune.l1_unstructured(adapters.of(TARGET).up if place == "adapter" else of, "weight", 0.5)
        with pytest.raises(ModelError, match="up_proj"):
            model.merge_adapters()


def test_training_that_changes_nothing_leaves_a_merged_model() -> None:
    model = adapted()
    model.merge_adapters()
    first, calls = logits_of(model, IDS), count_adapters(model)
    for _ in range(2):
        model.train()
        model.eval()
        assert torch.equal(logits_of(model, IDS), first) and calls == [0]


def test_text_is_the_same_with_every_way_of_writing() -> None:
    model = adapted()
    ways: list[dict[str, Any]] = [{}, {"num_beams": 3}, {"cache_implementation": "static"}, {"drafting": True}]
    texts = [model.generate(IDS[:1], max_new_tokens=6, do_sample=False, **way) for way in ways]
    model.merge_adapters()
    for way, text in zip(ways, texts, strict=True):
        assert torch.equal(model.generate(IDS[:1], max_new_tokens=6, do_sample=False, **way), text)


def test_several_models_are_merged_together_and_apart() -> None:
    model, other = adapted(), adapted(adapters=2)
    model.merge_adapters()
    model.add_augmenting("other", other)
    calls = count_adapters(model)
    both = logits_of(model, IDS)
    assert calls == [0]
    model.unmerge_adapters()
    assert_close(both, logits_of(model, IDS), 1e-5)
    model.merge_adapters()
    model.disable_augmenting("other")
    one = logits_of(model, IDS)
    model.unmerge_adapters()
    assert torch.equal(one, logits_of(model, IDS)), "one of two speaks through hooks"
    model.merge_adapters()
    model.remove_augmenting("other")
    calls[0] = 0
    assert_close(logits_of(model, IDS), one, 1e-5)
    assert calls == [0]


def test_compositions_that_share_an_anchor_merge_their_own() -> None:
    model = adapted()
    small = copy.deepcopy(model.augmenting["augmenting"])
    other = calmlm.compose(model.anchor, small, adapters=2)
    alone = logits_of(other, IDS)
    expected = logits_of(model, IDS)
    model.merge_adapters()
    assert torch.equal(logits_of(other, IDS), alone)
    other.merge_adapters()
    assert_close(logits_of(other, IDS), alone, 1e-6)
    assert_close(logits_of(model, IDS), expected, 1e-5)
    model.unmerge_adapters()
    assert len(maps_of(other)) == len(maps_of(model)) > 0
    other.unmerge_adapters()
    assert not maps_of(other)
    assert torch.equal(logits_of(model, IDS), expected)


def test_copies_files_and_threads(tmp_path: Path) -> None:
    model = adapted()
    model.merge_adapters()
    expected = logits_of(model, IDS)
    bare = copy.deepcopy(model)
    bare.unmerge_adapters()
    assert len(pickle.dumps(model)) < 1.2 * len(pickle.dumps(bare))
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        calls = count_adapters(again)
        assert torch.equal(logits_of(again, IDS), expected)
        assert calls == [0]
        assert all(vars(module)["forward"].module is module for module in maps_of(again))
        again.unmerge_adapters()
        assert maps_of(model)
    model.save_pretrained(tmp_path / "merged")
    model.unmerge_adapters()
    model.save_pretrained(tmp_path / "plain")
    names = ("model.safetensors", "config.json")
    assert all((tmp_path / "merged" / n).read_bytes() == (tmp_path / "plain" / n).read_bytes() for n in names)
    model.merge_adapters()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: logits_of(model, IDS), range(8)))
    assert all(torch.equal(logits, expected) for logits in found)


def test_what_others_put_around_a_merged_map_counts_once() -> None:
    """Offloading, tracing and the like wrap the forward method; hooks still know what it has done."""
    model = adapted()
    expected = logits_of(model, IDS)
    model.merge_adapters()
    for module in maps_of(model):
        inner = module.forward
        module.forward = lambda x, inner=inner: inner(x)
    assert_close(logits_of(model, IDS), expected, 1e-5)
    model.unmerge_adapters()
    assert torch.equal(logits_of(model, IDS), expected)


def test_merging_beside_calls_of_other_threads() -> None:
    model = adapted()
    expected = logits_of(model, IDS)
    with ThreadPoolExecutor(3) as pool:
        calls = [pool.submit(logits_of, model, IDS) for _ in range(12)]
        while not all(call.done() for call in calls):
            model.merge_adapters()
            time.sleep(0.01)
            model.unmerge_adapters()
            time.sleep(0.01)
    for call in calls:
        assert_close(call.result(), expected, 1e-4)


def test_peft_around_merged_adapters_is_heard() -> None:
    model = adapted()
    model.merge_adapters()
    settings = LoraConfig(target_modules=r".*connectors.*(down|up)", r=2, init_lora_weights=False)
    wrapped = get_peft_model(model, settings).eval()  # type: ignore[arg-type]
    merged = logits_of(wrapped, IDS)
    with torch.enable_grad():
        assert_close(merged, wrapped(input_ids=IDS, use_cache=False).logits, 1e-5)


def test_writes_that_no_tensor_notices() -> None:
    model = adapted()
    model.merge_adapters()
    weight = model.model.connectors["augmenting"][-1].maps["layers__0__mlp__up_proj"].up.weight
    first = logits_of(model, IDS)
    model.train()
    weight.data.mul_(3)
    model.eval()
    second = logits_of(model, IDS)
    assert not torch.allclose(second, first, atol=1e-3)
    weight.data = torch.zeros_like(weight)
    third = logits_of(model, IDS)
    weight.data = torch.ones_like(weight)
    for found, value in ((third, 0.0), (logits_of(model, IDS), 1.0)):
        other = adapted()
        other.model.connectors["augmenting"][-1].maps["layers__0__mlp__up_proj"].up.weight.data.fill_(value)
        assert_close(found, logits_of(other, IDS), 1e-5)


@pytest.mark.slow
def test_a_compiled_anchor_has_one_graph() -> None:
    model = adapted()
    expected = logits_of(model, IDS)
    model.merge_adapters()
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model.anchor.compile(backend=backend, dynamic=True)
    assert_close(logits_of(model, IDS), expected, 1e-5)
    assert len(graphs) == 1
    logits_of(model, IDS)
    assert len(graphs) == 1
    torch._dynamo.reset()


@pytest.mark.slow
def test_a_compiled_composition_has_one_graph() -> None:
    """Its adapters stand beside the weights then: whether these are up to date cannot be asked within a graph."""
    model = adapted()
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = model.generate(IDS, **options)
    model.merge_adapters()
    torch._dynamo.reset()
    model.forward = torch.compile(model.forward, fullgraph=True, backend="eager")  # type: ignore[method-assign]
    found = model.generate(IDS, cache_implementation="static", disable_compile=True, **options)
    assert torch.equal(found, expected)
    torch._dynamo.reset()


def test_a_model_that_cannot_be_merged_does_not_join() -> None:
    model = adapted(adapters={"r": 2, "target_modules": ["q_proj"]})
    other = adapted(adapters={"r": 2, "target_modules": ["up_proj"]})
    model.merge_adapters()
    merged = logits_of(model, IDS)
    model.anchor.get_decoder().layers[0].mlp.up_proj.forward = lambda x: x
    with pytest.raises(ModelError, match="another tool has put something in the place of 'layers.0.mlp.up_proj'"):
        model.add_augmenting("other", other)
    assert list(model.augmenting) == ["augmenting"]
    del model.anchor.get_decoder().layers[0].mlp.up_proj.forward
    assert torch.equal(logits_of(model, IDS), merged)


def test_what_cannot_be_merged_is_refused() -> None:
    model = adapted()
    wrapped = get_peft_model(model, LoraConfig(target_modules=r".*connectors.*(down|up)", r=2))  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=r"something around the adapters of .* use the composition without merging"):
        wrapped.base_model.model.merge_adapters()
    model = adapted()
    target = model.anchor.get_decoder().layers[1].mlp.up_proj
    target.weight = nn.Parameter(target.weight.to("meta"), requires_grad=False)
    with pytest.raises(ModelError, match=r"'layers.1.mlp.up_proj' of the anchor has weights that are quantised"):
        model.merge_adapters()
    assert not maps_of(model), "half of them are merged"
    model = adapted()
    target = model.anchor.get_decoder().layers[0].mlp.up_proj
    target.forward = target.forward  # as tools leave it that take their own wrapper off
    model.merge_adapters()
    assert target in maps_of(model)
    model.unmerge_adapters()
    target.forward = lambda x: x
    with pytest.raises(ModelError, match="another tool has put something in the place of"):
        model.merge_adapters()


def test_a_composition_without_adapters_is_as_it_was() -> None:
    model = tiny_composition("llama", "mistral").eval()
    before = logits_of(model, IDS)
    model.merge_adapters()
    assert torch.equal(logits_of(model, IDS), before)
    assert not maps_of(model)


ON_THE_ANCHOR = r".*anchor\..*(q_proj|v_proj)"


def wrapped_in(model: Any, settings: Any) -> Any:
    """A model in a tuner of PEFT's that has learned something."""
    found = get_peft_model(model, settings).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in found.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return found


def test_lora_around_a_map_is_heard_beside_merged_adapters() -> None:
    model = adapted()
    alone = logits_of(model, IDS)
    wrapped = wrapped_in(model, LoraConfig(target_modules=ON_THE_ANCHOR, r=2))
    before = logits_of(wrapped, IDS)
    assert float((before - alone).abs().max()) > 0.1
    model.merge_adapters()
    assert len(maps_of(model)) > 0
    calls = count_adapters(model)
    assert_close(logits_of(wrapped, IDS), before, 1e-4)
    assert calls == [0]
    wrapped.merge_adapter()
    assert_close(logits_of(wrapped, IDS), before, 1e-4)
    wrapped.unmerge_adapter()
    assert_close(logits_of(wrapped, IDS), before, 1e-4)
    assert_close(logits_of(wrapped.merge_and_unload(), IDS), before, 1e-4)
    model.unmerge_adapters()
    assert_close(logits_of(model, IDS), before, 1e-4)


TUNERS = {
    "lora": LoraConfig(target_modules=ON_THE_ANCHOR, r=2),
    "dora": LoraConfig(target_modules=ON_THE_ANCHOR, r=2, use_dora=True),
    "ia3": IA3Config(target_modules=ON_THE_ANCHOR, feedforward_modules=[]),
    "oft": OFTConfig(target_modules=ON_THE_ANCHOR, oft_block_size=4, r=0),
}


@pytest.mark.slow
def test_compiled_steps_of_a_model_with_own_tokens_take_merged_weights() -> None:
    """They cannot be one graph, and what is between graphs is asked whether weights are up to date."""
    model = composed(PAIRS[0], adapters=2)
    ids = tokenizer(PAIRS[0][0])("hello world", return_tensors="pt").input_ids
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    torch._dynamo.reset()
    torch._dynamo.utils.clear_compilation_metrics()
    model.merge_adapters()
    model.forward = torch.compile(model.forward, backend="eager")
    for factor in (1.0, -0.5):
        with torch.no_grad():
            for name, parameter in model.model.connectors.named_parameters():
                if name.endswith("up.weight"):
                    parameter.normal_(generator=torch.Generator().manual_seed(2)).mul_(factor)
        calls = count_adapters(model)
        found = model.generate(ids, disable_compile=True, **options)
        assert calls == [0]
        with torch.compiler.set_stance("force_eager"):
            assert torch.equal(found, model.generate(ids, **options))
            assert torch.equal(found, model.generate(ids, use_cache=False, **options))
    files = {str(found.co_filename) for found in torch._dynamo.utils.get_compilation_metrics()}
    assert any("calm_model" in file for file in files)
    assert not any("merged_weights" in file for file in files)


@pytest.mark.parametrize("kind", TUNERS)
@pytest.mark.parametrize("adapters", [3, None])
def test_tuners_that_would_not_merge_are_told(kind: str, adapters: int | None) -> None:
    """Around a map with adapters, what scales or turns its result does so with what they add."""
    model = tiny_composition(adapters=3) if adapters else tiny_composition()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        wrapped = wrapped_in(adapted() if adapters else model, copy.deepcopy(TUNERS[kind]))
        wrapped.train().eval()
    found = [str(each.message) for each in told if "merge_and_unload() would change" in str(each.message)]
    assert len(found) == (1 if adapters and kind != "lora" else 0)
    before = logits_of(wrapped, IDS)
    merged = logits_of(wrapped.merge_and_unload(), IDS)
    assert (float((merged - before).abs().max()) > 1e-3) == bool(found), "it says so where it is so"


def test_parameters_that_never_train_are_told() -> None:
    for targets, count in ((["q_proj", "v_proj"], 1), (ON_THE_ANCHOR, 0)):
        wrapped = get_peft_model(tiny_composition("llama", "llama"), LoraConfig(target_modules=targets, r=2))
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            wrapped.train().train()
        assert sum("name maps of the anchor alone" in str(each.message) for each in told) == count
