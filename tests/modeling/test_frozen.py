"""Only the composition trains: the bases keep their values, their evaluation mode and no gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import calmlm
from calmlm.errors import ConfigError
from calmlm.modeling.recomputing import keeping_compiled
from compositions import assert_close, logits_of, tiny_composition
from tiny import tiny_tokenizer, tiny_tokens

CONNECTIONS = [(1, 2), (3, 3)]


def gradients(model: calmlm.CalmForCausalLM, ids: Tensor, **kwargs: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids, **kwargs).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@contextmanager
def saving(model: calmlm.CalmForCausalLM) -> Iterator[dict[int, int]]:
    """The bytes of what is saved for backward meanwhile, by address, the weights left out."""
    kept: dict[int, int] = {}
    weights = {tensor.data_ptr() for tensor in model.parameters()}

    def note(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in weights:
            kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield kept


@pytest.mark.parametrize("anchor", ["llama", "gpt2", "mixtral"])
def test_optimiser_steps_leave_every_base_tensor_as_it_was(anchor: str) -> None:
    model = tiny_composition(anchor, "gemma", CONNECTIONS, gate=True, null_key=True, query_key_bias=0.5)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    # Everything goes to the optimiser, with weight decay: what is frozen must not depend on a user's care.
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.5)
    model.train()
    for step in range(4):
        ids = tiny_tokens(2, 8, seed=step)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, tensor in model.state_dict().items():
        if model.is_composition(name):
            assert not torch.equal(tensor, before[name]), f"{name} did not train"
        else:
            assert torch.equal(tensor, before[name]), f"{name} moved"


def test_gradients_are_the_compositions_alone() -> None:
    model = tiny_composition(connections=CONNECTIONS).train()
    _, found = gradients(model, tiny_tokens())
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert set(found) == trainable
    assert all(model.is_composition(name) for name in trainable)
    assert all(gradient.abs().max() > 0 for gradient in found.values())
    for base in model.model.bases():
        assert all(p.grad is None and not p.requires_grad for p in base.parameters())


def test_no_graph_is_kept_below_the_first_connection() -> None:
    model = tiny_composition(connections=CONNECTIONS).train()
    needs: dict[tuple[str, int], bool] = {}

    def note(key: tuple[str, int]) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            state = output[0] if isinstance(output, tuple) else output
            needs[key] = state.requires_grad

        return hook

    for name in ("", "augmenting"):
        for index, layer in enumerate(model.model.backbone(name).layers):
            layer.register_forward_hook(note((name, index)))
    saved: list[int] = []
    frozen = {p.data_ptr() for base in model.model.bases() for p in base.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        loss = model(input_ids=tiny_tokens(), labels=tiny_tokens()).loss
    first = min(layer for _, layer in CONNECTIONS)
    for (name, index), needed in needs.items():
        assert needed == (name == "" and index >= first), (name, index)
    below = {p.data_ptr() for layer in model.model.backbone().layers[: first + 1] for p in layer.parameters()}
    assert not below & set(saved), "weights of a layer below the first connection were saved for backward"
    assert frozen & set(saved), "layers above it must carry the gradient"
    loss.backward()


@pytest.mark.parametrize("options", [{"use_reentrant": False}, {"use_reentrant": True}, {"keep": "matmuls"}], ids=str)
@pytest.mark.parametrize("anchor", ["llama", "gpt2", "falcon", "opt", "gemma2"])
def test_checkpointing_changes_neither_loss_nor_gradients(anchor: str, options: dict[str, Any]) -> None:
    model = tiny_composition(anchor, "qwen2", CONNECTIONS, rotary=anchor == "llama", null_key=True).train()
    ids = tiny_tokens(2, 7)
    loss, expected = gradients(model, ids)
    model.activation_checkpointing_enable(options)
    # Trainer calls train() after it switches checkpointing on.
    model.train()
    if anchor == "falcon" and "keep" in options:  # whose layers add to what the last product of theirs gave, in place
        with pytest.raises(ConfigError, match="but this anchor writes over them; leave keep out"):
            gradients(model, ids)
        return
    runs = []
    layer = model.model.backbone().layers[-1]
    inner = next(m for m in layer.modules() if not list(m.children()) and list(m.parameters()))
    handle = inner.register_forward_hook(lambda *_: runs.append(1))
    again, found = gradients(model, ids)
    handle.remove()
    assert len(runs) == 2, "the last layer was not recomputed, so nothing was checkpointed"
    assert torch.equal(again, loss)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert_close(gradient, expected[name], 1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")  # of torch's compiler, about what it traces
@pytest.mark.parametrize("anchor", ["llama", "falcon"])
def test_kept_matrix_products_where_torch_compiles(anchor: str) -> None:
    model = tiny_composition(anchor, "qwen2", CONNECTIONS, null_key=True).train()
    ids = tiny_tokens(2, 24)
    loss, expected = gradients(model, ids)

    def saved(around: Any) -> int:
        torch._dynamo.reset()
        # Without code for a processor, which takes a minute to make; what is kept is decided before.
        called = torch.compile(model, backend="aot_eager_decomp_partition")
        model.zero_grad()
        with around, saving(model) as kept:
            found = called(input_ids=ids, labels=ids, use_cache=False).loss
        found.backward()
        assert_close(found, loss, 1e-5)
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                assert_close(parameter.grad, expected[name], 1e-5)
        return sum(kept.values())

    plain, less = saved(nullcontext()), saved(keeping_compiled())
    model.activation_checkpointing_enable({"keep": "matmuls"})
    model.train()
    assert saved(keeping_compiled()) < plain
    # The compiler's work alone: what checkpointing keeps by itself would not be counted.
    assert saved(keeping_compiled()) == less


@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral", "gpt2"])
def test_kept_matrix_products_are_not_made_again(family: str) -> None:
    model = tiny_composition(family, "qwen2", CONNECTIONS).train()
    ids = tiny_tokens(4, 40)

    def measured() -> tuple[int, int]:
        with FlopCounterMode(display=False) as counter, saving(model) as kept:
            gradients(model, ids)
        return counter.get_total_flops(), sum(kept.values())

    flops, saved = measured()
    model.activation_checkpointing_enable({"keep": "matmuls"})
    model.train()
    again, less = measured()
    assert again == flops
    assert less < saved
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    assert measured()[0] > flops
    with pytest.raises(ConfigError, match="expected keep: matmuls without use_reentrant, but got keep: norms"):
        model.activation_checkpointing_enable({"keep": "norms"})


DROPOUT = {
    "gpt2": {"resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0.3},
    "opt": {"dropout": 0.3, "attention_dropout": 0.3},
    "falcon": {"attention_dropout": 0.3, "parallel_attn": False},
    "bloom": {"hidden_dropout": 0.3, "attention_dropout": 0.3},
    "llama": {"attention_dropout": 0.3},
    "biogpt": {"hidden_dropout_prob": 0.3, "activation_dropout": 0.3, "attention_probs_dropout_prob": 0.3},
    "xglm": {"dropout": 0.3, "attention_dropout": 0.3, "activation_dropout": 0.3, "layerdrop": 0.3},
    "gpt_neox": {"hidden_dropout": 0.3, "attention_dropout": 0.3},
    "stablelm": {"hidden_dropout": 0.3, "attention_dropout": 0.3},
    "phi": {"resid_pdrop": 0.3, "embd_pdrop": 0.3, "attention_dropout": 0.3},
}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", DROPOUT)
def test_dropout_in_the_bases_stays_off(family: str, checkpointing: bool) -> None:
    model = tiny_composition(family, "llama", CONNECTIONS, anchor_options=DROPOUT[family])
    other = tiny_composition("llama", family, CONNECTIONS, augmenting_options=DROPOUT[family])
    ids = tiny_tokens(2, 7)
    for composition in (model, other):
        expected = composition.eval()(input_ids=ids, labels=ids, use_cache=False).loss
        if checkpointing:
            composition.activation_checkpointing_enable({"use_reentrant": False})
        composition.train()
        found, first = gradients(composition, ids)
        assert torch.equal(found, expected.detach())
        _, second = gradients(composition, ids)
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_training_mode_reaches_the_composition_only() -> None:
    model = tiny_composition().train()
    assert model.training
    assert model.model.connectors.training
    assert not any(module.training for base in model.model.bases() for module in base.modules())
    model.eval()
    assert not model.training


def test_bf16_bases_train_a_float32_composition() -> None:
    model = tiny_composition(anchor_options={"dtype": torch.bfloat16}, augmenting_options={"dtype": torch.bfloat16})
    assert {p.dtype for p in model.model.connectors.parameters()} == {torch.float32}
    assert {p.dtype for base in model.model.bases() for p in base.parameters()} == {torch.bfloat16}
    ids = tiny_tokens(2, 8)
    loss, found = gradients(model.train(), ids)
    assert all(g.dtype == torch.float32 and g.isfinite().all() and g.abs().max() > 0 for g in found.values())
    exact = tiny_composition()
    assert loss.item() == pytest.approx(exact(input_ids=ids, labels=ids).loss.item(), rel=0.02)


@pytest.mark.parametrize("options", [{}, {"rotary": True, "query_key_bias": 1.0, "null_key": True, "gate": True}])
@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_autocast_runs_close_to_float32(attn_implementation: str, options: dict[str, Any]) -> None:
    model = tiny_composition(attn_implementation=attn_implementation, **options).train()
    ids = tiny_tokens(2, 8)
    loss, expected = gradients(model, ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again, found = gradients(model, ids)
    assert again.item() == pytest.approx(loss.item(), rel=0.02)
    for name, gradient in found.items():
        assert gradient.dtype == torch.float32
        cosine = torch.nn.functional.cosine_similarity(gradient.flatten(), expected[name].flatten(), dim=0)
        assert cosine > 0.95, name


def test_a_bf16_composition_on_bf16_bases_is_close_to_float32() -> None:
    options = {"anchor_options": {"dtype": torch.bfloat16}, "augmenting_options": {"dtype": torch.bfloat16}}
    model = tiny_composition(composition_dtype=torch.bfloat16, **options)
    ids = tiny_tokens(2, 8)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert_close(logits_of(model, ids).float(), logits_of(tiny_composition(), ids), 0.1)


GRAFTED = {
    "connector": "graft", "init": "aligned", "opened": True,
    "plain_text": [f"the quick fox {number} jumps over {number * 7} lazy dogs" for number in range(9)],
    "tokenizer": tiny_tokenizer(), "augmenting_tokenizer": tiny_tokenizer(),
}  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [{}, {**GRAFTED, "adapters": 2, "connections": 1}, {"words": "map", "connections": 1},
     {"words": "pointer", "connections": 1}],
    ids=["attention", "graft and adapters", "map", "pointer"],
)  # fmt: skip
def test_connections_that_peft_saves_train(options: dict[str, Any]) -> None:
    """PEFT puts a copy that trains in the place of a module that is to be saved."""
    peft = pytest.importorskip("peft")
    composition = tiny_composition(**options)
    before = logits_of(composition, tiny_tokens(2, 8))
    settings = peft.LoraConfig(
        r=2, target_modules=r".*anchor\.model\.layers\.\d+\.self_attn\.q_proj",
        modules_to_save=["connectors.augmenting.0", "connectors.augmenting.1"],
    )  # fmt: skip
    model = peft.get_peft_model(composition, settings).train()
    ids = tiny_tokens(2, 8)
    assert_close(logits_of(model.eval(), ids), before, 1e-5)
    model.train()(input_ids=ids, labels=ids).loss.backward()
    training = [p for name, p in model.named_parameters() if "connectors" in name and p.requires_grad]
    assert training
    parts: dict[str, list[Any]] = {}
    for name, parameter in model.named_parameters():
        if "connectors.augmenting." in name and parameter.requires_grad:
            parts.setdefault(name.split("connectors.augmenting.")[1][0], []).append(parameter)
    for part, of_part in parts.items():
        assert any(p.grad is not None and p.grad.abs().max() > 0 for p in of_part), part
