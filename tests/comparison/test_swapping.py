"""The control in which m_A reads another item's prompt: what it trains, what it answers, and what is reported of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from calmlm.comparison import methods
from calmlm.comparison.contract import Task
from calmlm.comparison.domains import DOMAINS
from calmlm.comparison.earlier import keep_fuller
from calmlm.comparison.gains import pairing_of, pairing_table
from calmlm.comparison.methods import METHODS
from calmlm.comparison.page import markdown
from calmlm.comparison.selection import Part
from calmlm.comparison.summary import summarise
from calmlm.comparison.swapping import Swapped, fit_swapped, follows, with_others
from calmlm.comparison.workers import run
from calmlm.controls import beside
from calmlm.experiments.flops import Meter
from comparisons import cell, comparison
from compositions import awaken


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> Any:
    kind, presets = DOMAINS["code"]
    domain = kind(presets["tiny"], 0, tmp_path_factory.mktemp("bases"), lambda line: None)
    domain.prepare("composed")
    return domain


def test_a_row_is_read_with_another_ones_prompt() -> None:
    rows = [
        {"input_ids": [1, 2, 3, 9], "labels": [-100, -100, -100, 9]},
        {"input_ids": [4, 5, 6, 8, 8], "labels": [-100, -100, -100, 8, 8]},
        {"input_ids": [7, 7], "labels": [7, 7]},
    ]
    made = with_others([*rows, rows[0]], 0)
    assert [row["other"] for row in made] == [[4, 5, 6, 9], [1, 2, 3, 8, 8], [7, 7], [4, 5, 6, 9]]
    assert made[0] is made[3] and "other" not in rows[0]


def test_answers_are_those_of_calls_by_hand(code: Any) -> None:
    model = awaken(code.compose(code.base("augmenting"))).eval()
    swapped = Swapped(code, model)
    prompts = [example.prompt for example, _ in code.items["naming"]][:5]
    found = swapped([*prompts, prompts[0]], 6)
    ((pairs, answers),) = swapped.read
    assert set(pairs) == set(prompts) == set(pairs.values()) and found[0] == found[-1]
    for prompt, answer in zip(prompts, found, strict=False):
        assert pairs[prompt] != prompt and answers[prompt] == answer
        ids, other = (code.tokenizer(text)["input_ids"] for text in (prompt, pairs[prompt]))
        batch = beside(["augmenting"], [ids], [other], code.tokenizer.pad_token_id)
        made = model.generate(
            **batch, max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=code.tokenizer.pad_token_id,
            eos_token_id=code.tokenizer.eos_token_id,
        )  # fmt: skip
        new = made[0, batch["input_ids"].shape[1] :]
        assert code.tokenizer.decode(new, skip_special_tokens=True).strip() == answer
    plain = code.answerer(model)(prompts, 6)
    assert plain != found[:-1]


def test_losses_are_those_of_calls_by_hand(code: Any) -> None:
    model = awaken(code.compose(code.base("augmenting"))).eval()
    rows = [row for row in code.data.validation if row["labels"][0] == -100][:6]
    found = Swapped(code, model).losses(rows, 4)
    for row, paired, loss in zip(rows, with_others(rows, code.seed), found, strict=True):
        batch = beside(["augmenting"], [row["input_ids"]], [paired["other"]], 0)
        with torch.no_grad():
            likely = model(**batch).logits[0].log_softmax(-1)
        tail = [label for label in row["labels"] if label != -100]
        each = [float(likely[k - len(tail) - 1, label]) for k, label in enumerate(tail)]
        assert float(loss) == pytest.approx(-sum(each) / len(tail), rel=1e-4)


def test_an_answer_that_fits_the_other_item_follows(code: Any) -> None:
    """Answers that are right for the item that m_A read about, for the item itself, or for none."""

    class Told(Swapped):
        def __call__(self, prompts: Any, tokens: int | None = None) -> list[str]:
            task = next(t for t, items in code.items.items() if [e.prompt for e, _ in items] == list(prompts))
            rights = {example.prompt: example.completion.strip() for example, _ in code.items[task]}
            order = list(rights)
            pairs = dict(zip(order, [*order[1:], order[0]], strict=True))
            answers = {prompt: rights[pairs[prompt]] for prompt in order}
            answers[order[0]] = rights[order[0]]
            answers[order[1]] = "none"
            self.read.append((pairs, answers))
            return [answers[prompt] for prompt in prompts]

    told = Told(code, None)
    scores = code.score(told, None)
    found = follows(code, told, scores)
    assert set(found) == {"completion", "text_to_code", "naming", "arithmetic"}
    for task in ("naming", "arithmetic"):
        assert len(found[task]) == len(scores[task])
        assert found[task][:2] == [0.0, 0.0] and scores[task][:2] == [1.0, 0.0]
        for followed, right in zip(found[task][2:], scores[task][2:], strict=True):
            assert followed + right == 1.0  # two items may have one answer, which then follows none


def test_nothing_more_is_trained(code: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control has the tensors of the composition, and m_A reads what stands in its place in training."""
    fitted = methods.composed(code, Meter())
    monkeypatch.setattr(methods, "fit", None)  # would fail if called
    meter = Meter()
    swapped = METHODS["swapped"].fit(code, meter)
    assert isinstance(swapped.complete, Swapped) and (meter.trainable, meter.flops) == (0, 0.0)
    assert fitted.model is not None
    tensors = fitted.model.composition_tensors()
    for name, tensor in swapped.complete.model.composition_tensors().items():
        assert torch.equal(tensor, tensors[name])
    assert any(bool((tensor != 0).any()) for name, tensor in tensors.items() if "o_proj" in name)
    meter = Meter()
    model = code.compose(code.base("augmenting"))
    fit_swapped(code, model, meter)
    assert meter.trainable == model.get_nb_trainable_parameters()[0] and meter.flops > 0
    assert any(not torch.equal(tensor, tensors[name]) for name, tensor in model.composition_tensors().items())


def test_pairing_gains_by_hand() -> None:
    tasks = {"one": Task("exact_match", "combined"), "two": Task("bits_per_byte", "augmenting")}
    right = {"one": {0: [1.0] * 80 + [0.0] * 20}, "two": {0: [1.0, 2.0] * 50}}
    other = {"one": {0: [0.0] * 60 + [1.0] * 20 + [0.0] * 20}, "two": {0: [1.5, 2.5] * 50}}
    cells = [{"method": "swapped", "seed": 0, "follows": {"one": [1.0] * 30 + [0.0] * 70}}]
    one, two = pairing_of({"composed": right, "swapped": other}, cells, tasks, {}, False)
    assert one["gain"][0] == 60.0 and 50 < one["gain"][1] < 60 < one["gain"][2] < 70
    assert one["follow"][0] == 30.0 and one["follow"][1] < 30 < one["follow"][2]
    assert two["gain"] == [0.5, 0.5, 0.5] and "follow" not in two
    lines = pairing_table([one, two])
    assert any("| +60.0 (" in line and "| 30.0 (" in line for line in lines)
    assert any("| +0.500 (" in line and line.endswith("| - |") for line in lines)
    assert pairing_of({"composed": right}, [], tasks, {}, False) == []


def test_what_is_not_there_yet_is_left_out_with_a_remark(tmp_path: Path) -> None:
    config = comparison(tmp_path, kv_arithmetic=Part([0]))
    planned = {each.method: each for each in config.cells()}
    stored = [(planned[name], cell(name, 0, share)) for name, share in (("composed", 0.9), ("m_B", 0.1))]
    result = summarise(config, stored, len(planned), None)
    assert result["pairing"] == {"kv_arithmetic": []}
    page = markdown(result)
    assert "have no cells yet" in page and "m_A reads another prompt" not in page
    other = cell("swapped", 0, 0.2) | {"follows": {"keys_arithmetic": [1.0] * 50 + [0.0] * 50}}
    whole = summarise(config, [*stored, (planned["swapped"], other)], len(planned), None)
    page = markdown(whole)
    assert "have no cells yet" not in page
    assert "| CALM, m_A reads another prompt | keys arithmetic | exact match | 1 | +70.0 (" in page
    assert "| its controls | CALM, m_A reads another prompt | exact match | 1 | +70.0 (" in page
    # An earlier report that had more cells keeps its own; one from before these controls has none.
    fewer = {**result, "cells": {**result["cells"], "by_experiment": {"kv_arithmetic": 1}}}
    assert keep_fuller(fewer, whole)["pairing"] == whole["pairing"]
    before = {key: value for key, value in whole.items() if key != "pairing"}
    assert markdown(keep_fuller(fewer, before)).count("pairing gain") == 0
    only = comparison(tmp_path, kv_arithmetic=Part([0], ["composed", "m_B"]))
    assert summarise(only, stored, 2, None)["pairing"] == {}


@pytest.mark.slow
@pytest.mark.parametrize("domain", ["code", "languages", "kv_arithmetic"])
def test_a_comparison_with_the_controls(domain: str, tmp_path: Path) -> None:
    config = comparison(tmp_path, **{domain: Part([0], ["m_B", "composed", "swapped", "swapped_trained"])})
    result = run(config, report=lambda line: None)
    assert result["cells"]["finished"] == 4
    assert {row["method"] for row in result["pairing"][domain]} == {"swapped", "swapped_trained"}
    assert any("follow" in row for row in result["pairing"][domain])
    stored = list((tmp_path / "cells").rglob("*swapped*.json"))
    assert len(stored) == 2
    assert all("follows" in json.loads(path.read_text(encoding="utf-8")) for path in stored)
