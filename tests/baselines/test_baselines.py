"""The rival systems: each one's own mathematics by hand, and all of them from data to answers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import calmlm
from calmlm.baselines import BASELINES, Bases, Budget, Data
from calmlm.baselines.choosing import Routed
from calmlm.baselines.confidence_cascade import Confidence, best_threshold
from calmlm.baselines.fisher import EXAMPLES, diagonal_fisher, merge, scaled, spread
from calmlm.baselines.given import losses_of, padded
from calmlm.baselines.lora import rank_for
from calmlm.baselines.merging import METHODS, WEIGHTS
from calmlm.baselines.merging import merge as merge_vectors
from calmlm.baselines.mixture import NoisyTopKGate, _BalancedTrainer, upcycle
from calmlm.baselines.router import prompts_of, read
from calmlm.baselines.soup import greedy, uniform, weighted
from calmlm.baselines.text_tool import TextTool
from calmlm.errors import ModelError
from calmlm.experiments.fitting import IGNORED, Stage, answer
from calmlm.experiments.flops import Meter
from calmlm.experiments.kv_arithmetic.presets import PRESETS
from calmlm.experiments.kv_arithmetic.pretraining import new_model
from calmlm.experiments.kv_arithmetic.rows import encode
from calmlm.experiments.kv_arithmetic.tokenizer import build_tokenizer
from calmlm.experiments.kv_arithmetic.world import World
from calmlm.experiments.prompt_choice import Router, train_router
from compositions import assert_helpful, awaken
from tiny import tiny_model
from tokens.test_views import chatty

TOKENIZER = build_tokenizer(20)
PAD = TOKENIZER.pad_token_id


def model(seed: int, size: tuple[int, int, int] = (24, 2, 2)) -> Any:
    return new_model(TOKENIZER, size, seed).eval()


@pytest.fixture(scope="module")
def bases() -> Bases:
    return Bases(model(0), model(1, (16, 2, 2)), TOKENIZER, twin=model(2))


@pytest.fixture(scope="module")
def data() -> Data:
    world = World(PRESETS["tiny"], 0)
    rng = world.rng("baselines")
    rows = [
        encode([world.arithmetic(rng, world.composition_keys, ["plain"]) for _ in range(count)], TOKENIZER)
        for count in (24, 12)
    ]
    return Data(rows[0], encode([world.row(rng) for _ in range(24)], TOKENIZER), rows[1])


BUDGET = Budget(Stage(2, 8, 1e-2), seed=0, parameters=4000)


@pytest.mark.parametrize("name", BASELINES)
def test_each_goes_from_data_to_answers_and_leaves_the_bases_alone(name: str, bases: Bases, data: Data) -> None:
    before = [{k: v.clone() for k, v in m.state_dict().items()} for m in (bases.anchor, bases.augmenting, bases.twin)]
    fitted = BASELINES[name](bases, data, BUDGET)
    texts = answer(fitted, TOKENIZER, ["ab + cd =", "Compute 1 + 2. Result:"], 5)
    assert len(texts) == 2
    for old, base in zip(before, (bases.anchor, bases.augmenting, bases.twin), strict=True):
        assert all(torch.equal(tensor, old[key]) for key, tensor in base.state_dict().items())
    again = BASELINES[name](bases, data, BUDGET)
    assert answer(again, TOKENIZER, ["ab + cd =", "Compute 1 + 2. Result:"], 5) == texts


@pytest.mark.parametrize("name", ["soup", "soup_greedy", "fisher", "task_arithmetic", "ties", "dare_ties", "moe"])
def test_merging_wants_one_architecture(name: str, bases: Bases, data: Data) -> None:
    for twin, mention in ((None, "no twin"), (model(3, (16, 2, 2)), "tensors")):
        with pytest.raises(calmlm.ModelError) as caught:
            BASELINES[name](Bases(bases.anchor, bases.augmenting, TOKENIZER, twin), data, BUDGET)
        assert_helpful(caught.value, mention)


# Soups


def filled(value: float) -> Any:
    made = model(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.fill_(value)
    return made


def test_a_soup_is_the_mean() -> None:
    soup = uniform([filled(1.0), filled(2.0), filled(6.0)])
    assert all(torch.allclose(parameter, torch.tensor(3.0)) for parameter in soup.parameters())


def test_a_greedy_soup_takes_what_does_not_hurt() -> None:
    def score(candidate: Any) -> float:
        return -abs(float(next(candidate.parameters()).detach().flatten()[0]) - 2.0)

    models = [filled(9.0), filled(1.0), filled(2.0), filled(3.0)]
    found = greedy(models, score)
    value = float(next(found.parameters()).detach().flatten()[0])
    # The best alone is 2.0; with 1.0 it would be 1.5, worse; with 3.0 2.5, worse; with 9.0 5.5, worse.
    assert value == 2.0
    both = greedy([filled(1.0), filled(3.0)], score)
    assert float(next(both.parameters()).detach().flatten()[0]) == 2.0


# Fisher


def test_fisher_information_by_hand(data: Data) -> None:
    base, rows = model(0), data.composition[:3]
    found = diagonal_fisher(base, rows, PAD)
    name = "model.layers.1.mlp.down_proj.weight"
    weight = dict(base.named_parameters())[name]
    weight.requires_grad_(True)
    expected = torch.zeros_like(weight)
    for row in rows:
        logits = base(torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
        likelihood = sum(
            logits[place - 1, label] for place, label in enumerate(row["labels"]) if label != IGNORED and place
        )
        expected += torch.autograd.grad(likelihood, weight)[0] ** 2 / len(rows)
    assert torch.allclose(found[name], expected, rtol=1e-4, atol=1e-9)


def test_rows_are_looked_at_from_beginning_to_end() -> None:
    """A corpus may begin with its simplest rows."""
    rows = [{"input_ids": [i]} for i in range(10 * EXAMPLES + 3)]
    found = [row["input_ids"][0] for row in spread(rows)]
    assert len(set(found)) == EXAMPLES and found[0] == 0 and found[-1] >= 9.9 * EXAMPLES
    assert spread(rows[:5]) == rows[:5]


def test_fisher_merging_by_hand() -> None:
    models = [filled(1.0), filled(5.0)]
    fishers = [
        {name: torch.full_like(p, weight) for name, p in m.named_parameters()}
        for m, weight in zip(models, (3.0, 1.0), strict=True)
    ]
    merged = merge(models, fishers)
    assert all(torch.allclose(p, torch.tensor(2.0), atol=1e-5) for p in merged.parameters())  # (3 * 1 + 1 * 5) / 4
    nobody = [{name: torch.zeros_like(p) for name, p in m.named_parameters()} for m in models]
    assert all(torch.allclose(p, torch.tensor(3.0)) for p in merge(models, nobody).parameters())


def test_a_fisher_information_counts_by_its_shape_and_share() -> None:
    small = {"a": torch.tensor([1e-9, 3e-9]), "b": torch.tensor([[2e-9]])}
    large = {name: 1e12 * value for name, value in small.items()}
    for fisher in (small, large):
        made = scaled(fisher, 0.25)
        assert torch.allclose(made["a"], torch.tensor([0.125, 0.375])) and torch.allclose(made["b"], torch.tensor(0.25))
    nothing = {"a": torch.zeros(2)}
    assert torch.equal(scaled(nothing, 0.5)["a"], torch.zeros(2))


# Task vectors


def apart(first: Any, second: Any) -> Tensor:
    """The difference of two models, in one vector."""
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    return torch.cat([(b - a).detach().flatten() for a, b in pairs])


def test_task_arithmetic_adds_a_part_of_the_difference() -> None:
    anchor, twin = model(0), model(2)
    merged = merge_vectors(anchor, twin, "task_arithmetic", weight=0.3)
    assert torch.allclose(apart(anchor, merged), 0.3 * apart(anchor, twin), atol=1e-6)


def test_ties_adds_the_largest_entries_only() -> None:
    anchor, twin = model(0), model(2)
    merged = merge_vectors(anchor, twin, "ties", weight=1.0)
    name = "model.layers.1.mlp.down_proj.weight"
    whole, kept = (
        (dict(m.named_parameters())[name] - dict(anchor.named_parameters())[name]).detach().flatten()
        for m in (twin, merged)
    )
    large = whole.abs() >= whole.abs().quantile(0.5)
    assert torch.allclose(kept[large], whole[large], atol=1e-5)
    assert (kept[~large].abs() < 1e-6).float().mean() > 0.99


def test_dare_keeps_random_entries_scaled_up() -> None:
    anchor, twin = model(0), model(2)
    merged = merge_vectors(anchor, twin, "dare_ties", weight=1.0, seed=3)
    name = "model.layers.1.mlp.down_proj.weight"
    whole, kept = (
        (dict(m.named_parameters())[name] - dict(anchor.named_parameters())[name]).detach().flatten()
        for m in (twin, merged)
    )
    there = kept.abs() > 1e-6
    assert 0.4 < there.float().mean() < 0.6
    # All by one factor, so that the sum of sizes stays: about one over the share that is kept.
    factors = (kept / whole)[there & (whole.abs() > 1e-3)]
    assert factors.std() < 1e-3
    assert torch.allclose(kept.abs().sum(), whole.abs().sum(), rtol=1e-3)


@pytest.mark.parametrize("make", [lambda a, b: merge_vectors(a, b, "ties", weight=0.5), lambda a, b: upcycle([a, b])])
def test_what_is_made_of_trained_models_decodes_with_a_cache(make: Any) -> None:
    anchor, twin = model(0), model(2)
    anchor.config.use_cache = False  # the Trainer leaves it so
    anchor.generation_config.max_length = 77
    assert make(anchor, twin).generation_config.to_dict() == anchor.generation_config.to_dict()
    assert anchor.generation_config.use_cache is not False


@pytest.mark.parametrize("method", METHODS)
def test_what_is_added_is_in_proportion_to_its_weight(method: str) -> None:
    anchor, twin = model(0), model(2)
    part = merge_vectors(anchor, twin, method, weight=0.3, seed=1)
    whole = merge_vectors(anchor, twin, method, weight=1.0, seed=1)
    assert apart(anchor, part).abs().max() > 0.01
    assert torch.allclose(apart(anchor, part), apart(anchor, weighted([anchor, whole], [0.7, 0.3])), atol=1e-6)


def test_the_weight_with_the_lowest_loss_is_taken(bases: Bases, data: Data) -> None:
    merged = BASELINES["task_arithmetic"](bases, data, BUDGET)
    losses = {
        weight: float(
            losses_of(weighted([bases.anchor, bases.twin], [1 - weight, weight]), data.validation, PAD).mean()
        )
        for weight in WEIGHTS
    }
    best = min(losses, key=losses.__getitem__)
    best = weighted([bases.anchor, bases.twin], [1 - best, best])
    assert apart(merged, best).abs().max() < 1e-6


# Mixture of experts


def test_the_gate_is_its_formula() -> None:
    config = upcycle([model(0), model(1)]).config
    torch.manual_seed(0)
    gate = NoisyTopKGate(config)
    with torch.no_grad():
        gate.weight.normal_()
        gate.noise.normal_()
    states = torch.randn(7, 24)
    gate.eval()
    logits, weights, chosen = gate(states)
    clean = states @ gate.weight.T
    assert torch.allclose(logits, clean, atol=1e-6)
    kept = torch.full_like(clean, -torch.inf).scatter(1, clean.topk(2).indices, clean.topk(2).values)
    expected = kept.softmax(-1)
    assert torch.allclose(torch.zeros_like(clean).scatter(1, chosen, weights), expected, atol=1e-6)
    gate.train()
    torch.manual_seed(5)
    noisy, _, _ = gate(states)
    torch.manual_seed(5)
    scale = nn.functional.softplus(states @ gate.noise.T)
    assert torch.allclose(noisy, clean + torch.randn_like(clean) * scale, atol=1e-6)


def test_a_mixture_of_one_model_with_itself_is_that_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("calmlm.baselines.mixture.DIFFERENCE", 0.0)
    dense = model(0)
    mixture = upcycle([dense, copy.deepcopy(dense)]).eval()
    ids = torch.arange(5, 25).view(2, 10)
    with torch.no_grad():
        assert torch.allclose(mixture(ids).logits, dense(ids).logits, atol=1e-5)


def test_padding_is_not_balanced() -> None:
    mixture = upcycle([model(0), model(1)])
    loss = _BalancedTrainer.compute_loss
    ids = torch.arange(5, 25).view(2, 10)
    labels = ids.clone()
    padding = torch.full((2, 7), PAD)
    longer = {"input_ids": torch.cat((ids, padding), 1), "labels": torch.cat((labels, padding * 0 + IGNORED), 1)}
    with torch.no_grad():
        plain, padded_loss = (
            loss(None, mixture.eval(), batch) for batch in ({"input_ids": ids, "labels": labels}, longer)
        )
    assert torch.allclose(plain, padded_loss, atol=1e-6)


def test_a_mixture_of_another_family_is_refused() -> None:
    with pytest.raises(calmlm.ModelError) as caught:
        upcycle([tiny_model("gpt2"), tiny_model("gpt2")])
    assert_helpful(caught.value, "gpt2")


# Routing


class Echo:
    """Writes one token again and again."""

    def __init__(self, token: int) -> None:
        self.token, self.device, self.rows = token, torch.device("cpu"), 0

    def generate(self, input_ids: Tensor, attention_mask: Tensor, max_new_tokens: int, **_: Any) -> Tensor:
        self.rows += len(input_ids)
        return torch.cat((input_ids, input_ids.new_full((len(input_ids), max_new_tokens), self.token)), 1)


def test_each_row_goes_to_its_model() -> None:
    models = [Echo(7), Echo(8)]
    routed = Routed(models, lambda ids, mask: ids[:, 0] % 2)
    ids = torch.tensor([[2, 5], [3, 5], [4, 5]])
    out = routed.generate(ids, torch.ones_like(ids), max_new_tokens=2)
    assert out.tolist() == [[2, 5, 7, 7], [3, 5, 8, 8], [4, 5, 7, 7]]
    assert [m.rows for m in models] == [2, 1]


def test_a_router_learns_a_line() -> None:
    router = Router(model(0), 2)
    torch.manual_seed(0)
    states = torch.randn(200, 24)
    better = (states[:, 3] > 0.5).long()
    train_router(router, states, better)
    assert (router.score(states).argmax(-1) == better).float().mean() > 0.97


def test_prompts_end_before_the_first_label(data: Data) -> None:
    ids, mask = prompts_of(data.composition[:4], PAD, "cpu")
    for row, prompt, keep in zip(data.composition[:4], ids, mask, strict=True):
        kept = prompt[keep.bool()].tolist()
        assert row["input_ids"][: len(kept)] == kept
        assert row["labels"][len(kept)] != IGNORED
        assert all(label == IGNORED for label in row["labels"][: len(kept)])


def test_the_threshold_with_the_lowest_loss() -> None:
    confidence = torch.tensor([0.9, 0.2, 0.6, 0.8])
    small = torch.tensor([0.1, 3.0, 2.0, 0.2])
    anchor = torch.tensor([1.0, 1.0, 1.0, 1.0])
    assert best_threshold(confidence, small, anchor) == pytest.approx(0.8)
    assert best_threshold(confidence, anchor + 1, anchor) > 1  # the small model is never better
    assert best_threshold(confidence, anchor - 1, anchor) == pytest.approx(0.2)  # it always is
    # Rows that are equally sure go the same way.
    alike = torch.tensor([1.0, 1.0])
    assert best_threshold(alike, torch.tensor([0.0, 10.0]), torch.tensor([1.0, 0.0])) > 1
    assert best_threshold(alike, torch.tensor([0.0, 1.0]), torch.tensor([2.0, 0.0])) == pytest.approx(1.0)


def test_confidence_is_the_largest_probability() -> None:
    base = model(0)
    ids = torch.tensor([[5, 6, 7]])
    mask = torch.ones_like(ids)
    with torch.no_grad():
        expected = base(ids).logits[0, -1].softmax(-1).max()
    assert torch.allclose(Confidence(base, 0.5).of(ids, mask), expected)
    assert Confidence(base, float(expected) + 0.01)(ids, mask).tolist() == [0]
    assert Confidence(base, float(expected) - 0.01)(ids, mask).tolist() == [1]


def test_a_tool_answers_in_the_prompt() -> None:
    seen: list[str] = []

    class Reads(Echo):
        def generate(self, input_ids: Tensor, attention_mask: Tensor, max_new_tokens: int, **options: Any) -> Tensor:
            seen.extend(TOKENIZER.batch_decode(input_ids, skip_special_tokens=True))
            return super().generate(input_ids, attention_mask, max_new_tokens, **options)

    seven = TOKENIZER.convert_tokens_to_ids("▁7")
    tool = TextTool(Reads(seven), Echo(seven), TOKENIZER, form="{answer} | {prompt}")
    texts = answer(tool, TOKENIZER, ["ab + cd ="], 2)
    assert texts == ["7 7"]
    assert seen[0].endswith("ab + cd =")
    assert seen[0].startswith("7 7 7")


def test_a_tool_is_not_made_to_write_on() -> None:
    """How long an answer is to be at least is asked of m_B alone."""
    asked: list[dict[str, Any]] = []

    class Notes(Echo):
        def generate(self, input_ids: Tensor, attention_mask: Tensor, max_new_tokens: int, **options: Any) -> Tensor:
            asked.append(options)
            return super().generate(input_ids, attention_mask, max_new_tokens, **options)

    seven = TOKENIZER.convert_tokens_to_ids("▁7")
    ids = torch.tensor([TOKENIZER("ab + cd =").input_ids])
    tool = TextTool(Notes(seven), Notes(seven), TOKENIZER)
    tool.generate(ids, torch.ones_like(ids), max_new_tokens=4, min_new_tokens=4)
    assert ["min_new_tokens" in options for options in asked] == [False, True]


# LoRA and the setting


def test_the_rank_comes_nearest_to_the_budget() -> None:
    linear = nn.ModuleDict({"q_proj": nn.Linear(10, 20), "k_proj": nn.Linear(10, 10), "other": nn.Linear(5, 5)})
    # One rank costs 10 + 20 + 10 + 10 = 50 parameters.
    assert rank_for(linear, ["q_proj", "k_proj"], 410) == 8
    assert rank_for(linear, ["q_proj", "k_proj"], 10) == 1


def test_choices_do_not_depend_on_the_padding() -> None:
    """GPT-2 has learned its positions, and padding on the left must take none of them."""
    anchor = tiny_model("gpt2")
    prompts = [[5, 6, 7, 8], [9, 10]]
    ids = torch.tensor([prompts[0], [0, 0, *prompts[1]]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    alone = [torch.tensor([prompt]) for prompt in prompts]
    for of in (Confidence(anchor, 0.5).of, Router(anchor, 2).states):
        together = of(ids, mask)
        for index, each in enumerate(alone):
            assert torch.allclose(together[index], of(each, torch.ones_like(each))[0], atol=1e-5)


def test_one_pass_gives_a_prompts_state_and_the_rows_loss(data: Data) -> None:
    router, rows = Router(model(0), 2), data.composition
    states, losses = read(router, rows, PAD)
    assert torch.allclose(states, router.states(*prompts_of(rows, PAD, "cpu")), atol=1e-5)
    assert torch.allclose(losses, losses_of(router.anchor, rows, PAD), atol=1e-6)
    assert len({len(row["input_ids"]) for row in rows}) > 1


def test_a_mixture_has_no_room_for_biases() -> None:
    biased = [tiny_model("llama", seed=seed, attention_bias=True) for seed in (0, 1)]
    with pytest.raises(ModelError, match="no biases"):
        upcycle(biased)


def test_all_weights_train_in_full_precision(data: Data) -> None:
    anchor = tiny_model("llama", vocab_size=len(TOKENIZER), dtype=torch.bfloat16)
    budget = Budget(Stage(3, 8, 1e-4), seed=0, parameters=100)
    whole = Bases(copy.deepcopy(anchor).float(), model(1), TOKENIZER)
    low = BASELINES["fine_tuning"](Bases(anchor, model(1), TOKENIZER), data, budget)
    full = BASELINES["fine_tuning"](whole, data, budget)
    assert low.dtype == torch.bfloat16
    for name, weight in low.named_parameters():
        assert torch.equal(weight, full.get_parameter(name).to(torch.bfloat16)), name


def test_lora_finds_the_linear_maps_of_gpt2(data: Data) -> None:
    anchor = tiny_model("gpt2", vocab_size=len(TOKENIZER))
    wanted = 2 * sum(sum(m.weight.shape) for m in anchor.modules() if isinstance(m, Conv1D))
    meter = Meter()
    budget = Budget(Stage(2, 8, 1e-2), seed=0, parameters=wanted, meter=meter)
    tuned = BASELINES["lora"](Bases(anchor, model(1), TOKENIZER), data, budget)
    assert meter.trainable == wanted
    before, after = anchor.state_dict(), tuned.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.endswith(".weight") and ("attn" in name or "mlp" in name) for name in changed)


def test_losses_are_those_of_each_row(data: Data) -> None:
    base, rows = model(0), data.composition[:5]
    found = losses_of(base, rows, PAD, batch_size=2)
    for loss, row in zip(found, rows, strict=True):
        batch = padded([row], PAD)
        assert torch.allclose(loss, base(**batch).loss, atol=1e-5)


def test_losses_of_what_reads_prompts_alone_look_at_prompts_alone(data: Data) -> None:
    composed = awaken(calmlm.compose(model(0), model(1, (16, 2, 2)), connections=1, refresh=False)).eval()
    row = data.composition[0]
    first = next(i for i, label in enumerate(row["labels"]) if label != IGNORED)
    changed = {"input_ids": [*row["input_ids"][:-1], 9], "labels": [*row["labels"][:-1], 9]}
    one, other = (padded([r], PAD) for r in (row, changed))
    assert not torch.equal(one["input_ids"], other["input_ids"])
    # The logits of all tokens before the changed one, as the losses saw them: equal sums of all but the last loss.
    only_first = [
        {**r, "labels": [IGNORED] * first + [r["labels"][first]] + [IGNORED] * (len(r["labels"]) - first - 1)}
        for r in (row, changed)
    ]
    assert len(row["labels"]) - first > 1
    losses = losses_of(composed, only_first, PAD)
    assert torch.allclose(losses[0], losses[1], atol=1e-6)
    mask = torch.arange(len(row["labels"]))[None] < first
    logits = composed(one["input_ids"], prompt_mask=mask).logits[0, first - 1].log_softmax(-1)
    assert torch.allclose(losses[0], -logits[row["labels"][first]], atol=1e-5)


def test_a_tool_keeps_the_special_tokens_of_a_prompt() -> None:
    """Marks of a conversation are part of what m_B is asked; what the tokenizer puts before every text is not."""
    ours = chatty("bytes", "chatml")
    seen: list[str] = []

    class Said:
        device = torch.device("cpu")

        def __init__(self, text: str) -> None:
            self.text = text

        def generate(self, input_ids: Any, attention_mask: Any, **options: Any) -> Any:
            seen.extend(ours.decode(row[real.bool()]) for row, real in zip(input_ids, attention_mask, strict=True))
            told = torch.tensor([ours(self.text, add_special_tokens=False).input_ids] * len(input_ids))
            return torch.cat((input_ids, told), dim=1)

    prompts = ["<|im_start|>user\n12?<|im_end|>\n", "fox"]
    batch = ours(prompts, return_tensors="pt", padding=True, padding_side="left")
    TextTool(Said("46"), Said("12"), ours).generate(batch["input_ids"], batch["attention_mask"])
    assert seen[2:] == [f"12. {prompt}" for prompt in prompts]


@pytest.mark.parametrize("family", ["mamba", "falcon_mamba", "mamba2"])
def test_lora_leaves_out_what_cannot_be_adapted(family: str, bases: Bases, data: Data) -> None:
    pytest.importorskip("peft")
    size = {"vocab_size": len(bases.tokenizer), "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
    heads = {"num_heads": 4, "head_dim": 16, "n_groups": 1} if family == "mamba2" else {}
    anchor = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **size, **heads)).eval()
    budget = Budget(Stage(2, 4, 1e-3), 0, 500, 1e-3)
    adapted = BASELINES["lora"](Bases(anchor, bases.augmenting, bases.tokenizer), data, budget)
    assert adapted.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2, do_sample=False).shape[1] > 3


def test_a_mixture_knows_what_its_rows_are_padded_with(bases: Bases, data: Data) -> None:
    bases.anchor.config.pad_token_id = None
    budget = Budget(Stage(2, 4, 1e-3), 0, 500, 1e-3)
    assert BASELINES["moe"](bases, data, budget).config.pad_token_id == bases.tokenizer.pad_token_id
