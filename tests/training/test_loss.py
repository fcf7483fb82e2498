"""The loss is what it says: the model, Trainer and TRL agree, and gradient accumulation changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerBase, set_seed

import calmlm
from calmlm.connectors.gate import OPENING
from calmlm.data import read_examples, read_jsonl
from calmlm.data.labels import encode_examples
from calmlm.training.backends import Rows, make_arguments, make_trainer
from calmlm.training.run_folder import RunFolder
from compositions import own, tiny_composition

BACKENDS = ["sft", "trainer"]


@pytest.fixture
def model() -> calmlm.CalmForCausalLM:
    return tiny_composition("llama", "gpt2")


@pytest.fixture
def rows(task: Path, tokenizer: PreTrainedTokenizerBase) -> Rows:
    """Eight examples with different numbers of tokens that count."""
    rows = encode_examples(read_examples(read_jsonl(task))[:6], tokenizer, max_length=64).rows
    return [*rows, {"input_ids": [5] * 30, "labels": [5] * 30}, {"input_ids": [7, 8, 9], "labels": [-100, -100, 9]}]


def reference(model: calmlm.CalmForCausalLM, rows: Rows) -> float:
    """Mean negative log-likelihood over all tokens that count, one row after the other, without padding."""
    total, count = 0.0, 0
    for row in rows:
        with torch.no_grad():
            logits = model(torch.tensor([row["input_ids"]])).logits[0]
        for position, label in enumerate(row["labels"][1:]):
            if label != -100:
                total -= logits[position].log_softmax(-1)[label].item()
                count += 1
    return total / count


def train_once(
    backend: str,
    model: Any,
    rows: Rows,
    tokenizer: Any,
    folder: Path,
    *,
    size: int,
    accumulate: int = 1,
    **options: Any,
) -> float:
    """One optimiser step over all rows, by plain gradient descent; the loss that the trainer logs."""
    arguments = {
        "use_cpu": True,
        "disable_tqdm": True,
        "max_steps": 1,
        "per_device_train_batch_size": size,
        "gradient_accumulation_steps": accumulate,
        "optim": "sgd",
        "learning_rate": 0.1,
        "max_grad_norm": 0,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        **options,
    }
    run = RunFolder(folder)
    made = make_arguments(backend, arguments, run, evaluates=False)
    set_seed(0)
    trainer = make_trainer(backend, model, made, tokenizer, rows, None, run)
    trainer.train()
    return next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)


def test_model_loss(model: calmlm.CalmForCausalLM, rows: Rows, tokenizer: PreTrainedTokenizerBase) -> None:
    batch = DataCollatorForSeq2Seq(tokenizer)(rows)
    with torch.no_grad():
        loss = model(**batch).loss.item()
    assert loss == pytest.approx(reference(model, rows), abs=1e-5)
    with torch.no_grad(), model.disable_composition():
        assert abs(model(**batch).loss.item() - loss) > 0.01, (
            "the composition must matter for this test to mean anything"
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_trainers_report_the_model_loss(
    backend: str, model: calmlm.CalmForCausalLM, rows: Rows, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    expected = reference(model, rows)
    assert train_once(backend, model, rows, tokenizer, tmp_path, size=len(rows)) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_pointers_loss_is_that_of_its_logits(
    backend: str, rows: Rows, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """Also with TRL, whose own loss takes states, where the composition refuses it."""
    model = tiny_composition("llama", "gpt2", words="pointer")
    with torch.no_grad():
        model.model.connectors["augmenting"][-1].opening.fill_(0.7 / OPENING)
    expected = reference(model, rows)
    with model.disable_composition():
        assert abs(reference(model, rows) - expected) > 0.01
    assert train_once(backend, model, rows, tokenizer, tmp_path, size=len(rows)) == pytest.approx(expected, abs=1e-4)
    if backend == "sft":
        ids = torch.tensor([[5, 6, 7]])
        with pytest.raises(calmlm.ModelError, match="needs the anchor's logits"):
            model(input_ids=ids, labels=ids, fused_lm_head=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_model_that_reads_prompts_reads_no_answers(
    backend: str, rows: Rows, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """With ``refresh=False`` every position of a prompt is visible, and nothing of what is to be learned."""
    model = tiny_composition("llama", "gpt2", refresh=False)
    rows = rows[:6]
    total, count = 0.0, 0
    for row in rows:
        labels = torch.tensor([row["labels"]])
        with torch.no_grad():
            logits = model(torch.tensor([row["input_ids"]]), prompt_mask=(labels != -100).cumsum(-1) == 0).logits
        chosen = labels[0, 1:] != -100
        losses = torch.nn.functional.cross_entropy(logits[0, :-1][chosen], labels[0, 1:][chosen], reduction="sum")
        total, count = total + losses.item(), count + int(chosen.sum())
    assert train_once(backend, model, rows, tokenizer, tmp_path, size=len(rows)) == pytest.approx(
        total / count, abs=1e-4
    )


def test_training_without_the_end_of_prompts_is_refused(rows: Rows) -> None:
    model = tiny_composition("llama", "gpt2", refresh=False).train()
    ids = torch.tensor([rows[0]["input_ids"]])
    with pytest.raises(calmlm.DataError, match="prompt_mask"):
        model.model(ids)
    model.model(ids, prompt_mask=torch.ones_like(ids, dtype=torch.bool))
    model.eval().model(ids)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_accumulation_changes_nothing(
    backend: str, model: calmlm.CalmForCausalLM, rows: Rows, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    start = {name: tensor.clone() for name, tensor in model.composition_tensors().items()}
    results = []
    for size, accumulate in ((8, 1), (2, 4), (1, 8)):
        model.load_state_dict(start, strict=False)
        loss = train_once(backend, model, rows, tokenizer, tmp_path, size=size, accumulate=accumulate)
        results.append((loss, {name: tensor.clone() for name, tensor in model.composition_tensors().items()}))
    whole_loss, whole = results[0]
    assert any(not torch.equal(whole[name], start[name]) for name in start)
    for loss, tensors in results[1:]:
        assert loss == pytest.approx(whole_loss, abs=1e-4)
        for name, tensor in tensors.items():
            torch.testing.assert_close(tensor, whole[name], atol=1e-6, rtol=1e-4)


def test_both_trainers_take_the_same_step(
    model: calmlm.CalmForCausalLM, rows: Rows, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    start = {name: tensor.clone() for name, tensor in model.composition_tensors().items()}
    ends = []
    for backend in BACKENDS:
        model.load_state_dict(start, strict=False)
        train_once(backend, model, rows, tokenizer, tmp_path, size=len(rows))
        ends.append({name: tensor.clone() for name, tensor in model.composition_tensors().items()})
    for name, tensor in ends[0].items():
        torch.testing.assert_close(tensor, ends[1][name], atol=1e-6, rtol=1e-4)


def test_packing_changes_nothing(
    model: calmlm.CalmForCausalLM, rows: Rows, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """Padding-free: one long row with positions that start anew, and no attention across them."""
    expected = reference(model, rows)
    loss = train_once("sft", model, rows, tokenizer, tmp_path, size=len(rows), padding_free=True)
    assert loss == pytest.approx(expected, abs=1e-4)


@pytest.fixture
def cut(tokenizer: PreTrainedTokenizerBase) -> Rows:
    """Prompts that end within what would be a token of the augmenting model's own, were they generated."""
    texts = [("3 h", "e+1"), ("1+v", "ela"), ("hel", "a 1")]
    rows = [[tokenizer(part)["input_ids"] for part in text] for text in texts]
    return [{"input_ids": p + c, "labels": [-100] * len(p) + c} for p, c in rows]


@pytest.mark.filterwarnings("ignore:.*label_smoothing_factor.*:FutureWarning")
@pytest.mark.parametrize("reads", ["tokens", "prompt", "text"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_smoothed_labels_are_those_of_the_next_token(
    backend: str, reads: str, cut: Rows, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """With next to nothing of it, smoothing changes next to nothing; and no answer becomes a prompt for it."""
    options = own("unigram") if reads == "text" else {"refresh": reads == "tokens"}
    model = tiny_composition("llama", "gpt2", **options)
    start = {name: tensor.clone() for name, tensor in model.composition_tensors().items()}
    losses = []
    for factor in (0.0, 1e-6):
        model.load_state_dict(start, strict=False)
        losses.append(
            train_once(backend, model, cut, tokenizer, tmp_path, size=len(cut), label_smoothing_factor=factor)
        )
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)


@pytest.mark.parametrize("options", [{"refresh": False}, own("unigram")], ids=["prompt", "own tokens"])
def test_losses_from_states_know_where_prompts_end(
    options: dict[str, Any], cut: Rows, tokenizer: PreTrainedTokenizerBase
) -> None:
    """TRL's trainers, for policies as well, hold the labels back from the composition; also beneath PEFT."""
    peft = pytest.importorskip("peft")
    utils = pytest.importorskip("trl.trainer.utils")
    model, batch = tiny_composition("llama", "gpt2", **options), DataCollatorForSeq2Seq(tokenizer)(cut)
    with torch.no_grad():
        likely = model(**batch).logits[:, :-1].log_softmax(-1)
        everything = model(**{key: value for key, value in batch.items() if key != "labels"}).logits[:, :-1]
    wanted = batch["labels"][:, 1:]
    kept, wanted = wanted != -100, wanted.clamp(min=0)[..., None]
    assert not torch.allclose(likely.gather(-1, wanted), everything.log_softmax(-1).gather(-1, wanted), atol=1e-3)
    utils.add_fused_lm_head(model)
    for one in (model.train(), peft.get_peft_model(model, peft.LoraConfig(target_modules=["up_proj"]))):
        found = one(**batch, fused_lm_head=True).log_probs
        torch.testing.assert_close(found[kept], likely.gather(-1, wanted)[..., 0][kept], atol=1e-5, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_anchor_of_experts(backend: str, rows: Rows, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    model = tiny_composition("mixtral", "gpt2")
    expected = reference(model, rows)
    assert train_once(backend, model, rows, tokenizer, tmp_path, size=len(rows)) == pytest.approx(expected, abs=1e-4)


def test_router_logits_come_out_where_they_are_asked_for(rows: Rows) -> None:
    model = tiny_composition("mixtral", "gpt2")
    ids = torch.tensor([rows[0]["input_ids"]])
    with torch.no_grad():
        for output in (model(ids, output_router_logits=True), model.model(ids, output_router_logits=True)):
            assert len(output.router_logits) == model.anchor.config.num_hidden_layers
        assert "router_logits" not in model(ids)
