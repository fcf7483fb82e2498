"""Encoders that are given several items per row, each at a place in the text, and encoders that classify."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

import calmlm
from compositions import assert_close, assert_helpful, awaken, logits_of, pad
from tiny import tiny_model, tiny_tokens

GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5, "pad_token_id": 0}
IMAGE = 7


def vision() -> ViTForImageClassification:
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=8, patch_size=4, num_channels=1, hidden_size=24, num_hidden_layers=3, num_attention_heads=4,
        intermediate_size=40, num_labels=6, initializer_range=0.3,
    )  # fmt: skip
    return ViTForImageClassification(config).eval()


@pytest.fixture(scope="module", params=["cross_attention", "flamingo", "legonn"])
def model(request: pytest.FixtureRequest) -> calmlm.CalmForCausalLM:
    options: dict[str, Any] = {"connector": request.param, "rotary": True, "null_key": True}
    return awaken(calmlm.compose(tiny_model("llama", seed=1), {"eyes": vision()}, 2, **options))


def text() -> Tensor:
    ids = tiny_tokens(2, 9)
    ids = ids.where(ids != IMAGE, IMAGE + 1)
    ids[0, 2] = ids[0, 5] = ids[1, 4] = IMAGE
    return ids


def eyes(pixels: Tensor, at: list[list[int]]) -> dict[str, dict[str, Tensor]]:
    return {"eyes": {"pixel_values": pixels, "at": torch.tensor(at)}}


PIXELS = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(3))
GIVEN = eyes(PIXELS, [[2, 5], [4, -1]])


def test_an_item_is_seen_from_its_token_on(model: calmlm.CalmForCausalLM) -> None:
    ids = text()
    full = logits_of(model, ids, augmenting_inputs=GIVEN)
    alone = logits_of(model.anchor, ids)
    assert torch.equal(full[0, :2], alone[0, :2])
    assert torch.equal(full[1, :4], alone[1, :4])
    for item, (row, column) in enumerate([(0, 2), (0, 5), (1, 4), (1, None)]):
        pixels = PIXELS.clone()
        pixels[item] += 1
        changed = logits_of(model, ids, augmenting_inputs=eyes(pixels, [[2, 5], [4, -1]]))
        assert torch.equal(changed[1 - row], full[1 - row])
        if column is None:  # an item that stands nowhere is not looked at
            assert torch.equal(changed, full)
            continue
        assert torch.equal(changed[row, :column], full[row, :column])
        assert (changed[row, column:] - full[row, column:]).abs().amax(-1).min() > 1e-5


@pytest.mark.parametrize("chunk", [1, 3, 4])
def test_items_are_cached(model: calmlm.CalmForCausalLM, chunk: int) -> None:
    ids, cache, parts = text(), None, []
    with torch.no_grad():
        for start in range(0, ids.shape[1], chunk):
            given = GIVEN if start == 0 else None  # the first call brings all of them
            output = model(
                ids[:, start : start + chunk], past_key_values=cache, use_cache=True, augmenting_inputs=given
            )
            cache = output.past_key_values
            parts.append(output.logits)
    assert_close(torch.cat(parts, 1), logits_of(model, ids, augmenting_inputs=GIVEN), 1e-4)


NOWHERE = torch.zeros(2, 0, dtype=torch.long)
NO_ITEMS: dict[str, dict[str, Any]] = {
    "empty": {"augmenting_inputs": {"eyes": {"pixel_values": PIXELS[:0], "at": NOWHERE}}},
    "at alone": {"augmenting_inputs": {"eyes": {"at": NOWHERE}}},
    "rows": {"composition_mask": torch.tensor([False, False])},
    "rows of each": {"composition_mask": torch.tensor([[False], [False]])},
}


@pytest.mark.parametrize("kind", NO_ITEMS)
def test_a_batch_without_items_is_the_anchors(model: calmlm.CalmForCausalLM, kind: str) -> None:
    ids, nothing = text(), NO_ITEMS[kind]
    assert torch.equal(logits_of(model, ids, **nothing), logits_of(model.anchor, ids))
    with torch.no_grad():
        first = model(ids[:, :4], **nothing, use_cache=True)
        more = {key: value for key, value in nothing.items() if key == "composition_mask"}
        second = model(ids[:, 4:], past_key_values=first.past_key_values, **more).logits
    assert_close(second, logits_of(model.anchor, ids)[:, 4:], 1e-4)
    for mode in ({}, {"num_beams": 3}):
        found = model.generate(ids, **GREEDY, **mode, **nothing)
        assert torch.equal(found, model.anchor.generate(ids, **GREEDY, **mode))
    model.train()
    model(ids, labels=ids, **nothing).loss.backward()
    model.eval()
    trained = {name: tensor.grad for name, tensor in model.named_parameters() if tensor.requires_grad}
    model.zero_grad()
    assert all(grad is not None and not grad.any() for grad in trained.values()), trained


def test_items_that_stand_nowhere_are_refused(model: calmlm.CalmForCausalLM) -> None:
    with pytest.raises(calmlm.DataError) as caught:
        model(text(), augmenting_inputs={"eyes": {"pixel_values": PIXELS, "at": NOWHERE}})
    assert_helpful(caught.value, "(2, 0)", "4 items")


@pytest.mark.parametrize("mode", [{}, {"num_beams": 3}, {"prefill_chunk_size": 4}], ids=["greedy", "beam", "chunked"])
def test_items_generate(model: calmlm.CalmForCausalLM, mode: dict[str, Any]) -> None:
    reference = {key: value for key, value in mode.items() if key == "num_beams"}
    expected = model.generate(text(), **GREEDY, **reference, augmenting_inputs=GIVEN, use_cache=False)
    assert torch.equal(model.generate(text(), **GREEDY, **mode, augmenting_inputs=GIVEN), expected)


def test_padding_changes_nothing(model: calmlm.CalmForCausalLM) -> None:
    ids = text()
    rows = [ids[0], ids[1, :6]]
    padded, mask = pad(rows, "left")
    shifted = eyes(PIXELS, [[2, 5], [7, -1]])
    found = logits_of(model, padded, mask, augmenting_inputs=shifted)
    alone = logits_of(model, rows[1][None], augmenting_inputs=eyes(PIXELS[2:3], [[4]]))
    assert_close(found[1, 3:], alone[0], 1e-5)


def test_a_classifier_speaks_through_its_classes_alone() -> None:
    model = awaken(calmlm.compose(tiny_model("llama"), {"eyes": vision()}, 2, connector="legonn"))
    ids = text()[:1]
    before = logits_of(model, ids, augmenting_inputs={"eyes": {"pixel_values": PIXELS[:1]}})
    with torch.no_grad():
        model.augmenting["eyes"].classifier.weight.zero_()
        model.augmenting["eyes"].classifier.bias.zero_()
    uniform = [logits_of(model, ids, augmenting_inputs={"eyes": {"pixel_values": PIXELS[i : i + 1]}}) for i in (0, 1)]
    assert not torch.allclose(before, uniform[0], atol=1e-3)
    assert torch.equal(*uniform)


def test_items_train_through_trainer_and_come_back(model: calmlm.CalmForCausalLM, tmp_path: Path) -> None:
    rows = [
        {"ids": text()[row], "pixels": PIXELS[2 * row : 2 * row + 2], "at": GIVEN["eyes"]["at"][row]} for row in (0, 1)
    ]

    def collate(batch: list[dict[str, Tensor]]) -> dict[str, Any]:
        ids = torch.stack([row["ids"] for row in batch])
        given = {
            "pixel_values": torch.cat([row["pixels"] for row in batch]),
            "at": torch.stack([r["at"] for r in batch]),
        }
        return {"input_ids": ids, "labels": ids, "augmenting_inputs": {"eyes": given}}

    frozen = {name: tensor.clone() for name, tensor in model.named_parameters() if not tensor.requires_grad}
    trained = {name: tensor.clone() for name, tensor in model.named_parameters() if tensor.requires_grad}
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"), max_steps=2, per_device_train_batch_size=2, use_cpu=True, report_to=[],
        remove_unused_columns=False, save_strategy="no", disable_tqdm=True, learning_rate=1e-2,
    )  # fmt: skip
    Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collate).train()
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], tensor) for name, tensor in frozen.items())
    assert all(not torch.equal(after[name], tensor) for name, tensor in trained.items())
    model.eval()
    model.save_pretrained(tmp_path / "composition")
    loaded = calmlm.CalmForCausalLM.from_pretrained(
        tmp_path / "composition", anchor=tiny_model("llama", seed=1), augmenting={"eyes": vision()}
    )
    found, expected = (logits_of(m, text(), augmenting_inputs=GIVEN) for m in (loaded, model))
    assert_close(found, expected, 1e-5)


@pytest.mark.parametrize(
    ("at", "mention"),
    [
        ([[2, 5, 1], [4, -1, 0]], "(2, 3)"),
        ([[0.5, 1.0], [1.0, 2.0]], "whole number"),
        ([[2, 5, 4, 1]], None),
        ([[2], [3], [4], [5]], "4 for 2 rows"),
        ([[2, 5], [4, -2]], "or -1"),
        ([[True, False], [True, True]], "whole number"),
    ],
)
def test_items_that_do_not_fit_are_refused(model: calmlm.CalmForCausalLM, at: Any, mention: str | None) -> None:
    given = eyes(PIXELS, at)
    if mention is None:  # one row's items, shared by both rows, as beams share them
        model(text(), augmenting_inputs=given)
        return
    with pytest.raises(calmlm.DataError) as caught:
        model(text(), augmenting_inputs=given)
    assert_helpful(caught.value, mention)


def test_items_survive_a_crop(model: calmlm.CalmForCausalLM) -> None:
    ids = text()
    full = logits_of(model, ids, augmenting_inputs=GIVEN)
    for seen, removed in ((4, 1), (9, 6), (9, 4), (9, 1), (3, 2)):
        with torch.no_grad():
            cache = model(ids[:, :seen], augmenting_inputs=GIVEN, use_cache=True).past_key_values
            cache.crop(-removed)
            again = model(ids[:, seen - removed :], past_key_values=cache, augmenting_inputs=GIVEN).logits
        assert_close(again, full[:, seen - removed :], 1e-4)


def test_later_items_are_refused(model: calmlm.CalmForCausalLM) -> None:
    with torch.no_grad():
        cache = model(text()[:, :5], augmenting_inputs=GIVEN, use_cache=True).past_key_values
        same = {"eyes": {key: value.clone() for key, value in GIVEN["eyes"].items()}}
        model(text()[:, 5:7], past_key_values=cache, augmenting_inputs=same)
        with pytest.raises(calmlm.DataError) as caught:
            model(text()[:, 7:], past_key_values=cache, augmenting_inputs=eyes(PIXELS + 1, [[2, 5], [4, -1]]))
    assert_helpful(caught.value, "once")


def test_a_call_that_ends_in_padding_before_an_item_is_refused(model: calmlm.CalmForCausalLM) -> None:
    ids, mask = pad([text()[0], text()[1, :3]], "left")
    with pytest.raises(calmlm.DataError) as caught:
        model(ids[:, :4], attention_mask=mask[:, :4], augmenting_inputs=eyes(PIXELS, [[2, 5], [8, -1]]), use_cache=True)
    assert_helpful(caught.value, "prefill_chunk_size")


@pytest.mark.parametrize(
    "given", [PIXELS, [PIXELS], {"eyes": PIXELS}, {"eyes": {"pixels": PIXELS}}, {"eyes": {"pixel_values": PIXELS[0]}}]
)
def test_inputs_that_no_encoder_takes_are_refused(model: calmlm.CalmForCausalLM, given: Any) -> None:
    with pytest.raises(calmlm.DataError) as caught:
        model(text()[:1], augmenting_inputs=given)
    assert_helpful(caught.value, "augmenting_inputs")
