"""Packed rows: each text is read as if it had a row of its own, by every model, in loss, gradients and logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import calmlm
from calmlm.readers import given_of, prompt_of, starts_of
from compositions import assert_close, assert_helpful, awaken, logits_of, own, pad, tiny_composition
from readers.test_items import vision
from tiny import tiny_model, tiny_tokenizer
from tokens.test_views import chatty, rendered

LINES = [f"the quick fox {number} jumps over {number * 7} lazy dogs" for number in range(12)]
SHARED = {"anchor_options": {"vocab_size": 97}, "augmenting_options": {"vocab_size": 97}}
OURS = chatty("bytes", "chatml")
VIEW = {
    **own("sentencepiece"),
    "tokenizer": OURS,
    "anchor_options": {"vocab_size": len(OURS)},
    "augmenting_view": "bare",
}
SYSTEMS: dict[str, dict[str, Any]] = {
    "shared ids": {"null_key": True, "rotary": True},
    "shared ids, prefix": {
        "tokenizer": tiny_tokenizer(), "augmenting_tokenizer": tiny_tokenizer(), "augmenting_prefix": "2+2=4 ",
        "words": "map",
    },
    "shared ids, of a family that mixes texts": {"augmenting": "bloom", "words": "map"},
    "own tokens": {"rotary": True, **own("sentencepiece", "bytes")},
    "own tokens, prefix, windows": {
        "augmenting": "gemma3_text", "augmenting_prefix": "2+2=4 ", "null_key": True, **own("unigram"),
    },
    "own tokens, graft, pointer": {
        "augmenting": "mistral", "connector": "graft", "init": "aligned", "plain_text": LINES, "words": "pointer",
        **own("bytes-large", "sentencepiece"),
    },
    "own tokens, map": {"augmenting": "qwen3", "anchor": "gpt2", "words": "map", **own("bytes", "unigram")},
    "transcoded": {"alignment": "transcode", "rotary": True, "words": "map", **own("sentencepiece", "bytes-large")},
    "transcoded, pointer": {"alignment": "transcode", "words": "pointer", "anchor": "qwen3", **own("bytes", "unigram")},
    "retokenized": {"alignment": "retokenize", **own("bytes", "unigram")},
    "prompts": {"refresh": False, "anchor": "gemma3_text", **SHARED},
    "a view": VIEW,
    "what it would say": {"connector": "legonn", **own("bytes")},
    "adapters": {"adapters": {"r": 4, "target_modules": ["v_proj"]}, **own("unigram")},
}  # fmt: skip
ROUNDED = ("map", "prefix", "mixes", "graft", "pointer", "transcoded", "prompts")  # something computes in float32
LENGTHS = (9, 3, 1, 6, 5)  # of the texts; the first three share a row, and the other two
PROMPTS = (4, 0, 0, 2, 4)  # how many of their tokens have no label


def made(name: str) -> calmlm.CalmForCausalLM:
    options = dict(SYSTEMS[name])
    if "windows" in name:
        options["augmenting_options"] = {**options["augmenting_options"], "sliding_window": 3}
    kind = "eager" if options.get("augmenting") == "bloom" else "sdpa"
    model = tiny_composition(
        options.pop("anchor", "llama"), options.pop("augmenting", "gpt2"), attn_implementation=kind, **options
    )
    return model.double()


def texts_of(name: str, model: Any) -> list[Tensor]:
    """Texts of these lengths; for a view, conversations that begin as the lines do."""
    if name == "a view":
        contents = [[{"role": "user", "content": line[:length]}] for line, length in zip(LINES, LENGTHS, strict=False)]
        return [torch.tensor(rendered(OURS, messages)) for messages in contents]
    size = min(model.config.get_text_config(decoder=True).vocab_size, 97)
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, size, (length,), generator=generator) for length in LENGTHS]


def packed(texts: list[Tensor]) -> dict[str, Tensor]:
    """Two rows of equal width, in which padding is a text of its own; labelled as TRL's collator does it."""
    labels = [text.clone() for text in texts]
    for label, prompt in zip(labels, PROMPTS, strict=True):
        label[: max(prompt, 1)] = -100
    parts = {"input_ids": texts, "labels": labels, "position_ids": [torch.arange(len(text)) for text in texts]}
    rows = {name: [torch.cat(part[:3]), torch.cat(part[3:])] for name, part in parts.items()}
    return {name: pad(row, "right", -100 if name == "labels" else 0)[0] for name, row in rows.items()}


def unpacked(texts: list[Tensor]) -> dict[str, Tensor]:
    """A row for each, in which the first token may have a label, which nothing predicts."""
    ids, mask = pad(texts, "right")
    labels = ids.masked_fill(mask == 0, -100)
    for label, prompt in zip(labels, PROMPTS, strict=True):
        label[:prompt] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def step(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(**batch, num_items_in_batch=torch.tensor(17), use_cache=False).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", SYSTEMS)
def test_loss_and_gradients_are_those_of_a_row_for_each_text(name: str) -> None:
    """In float64; a millionth where gates, distributions or positions are computed in float32."""
    model = made(name).train()
    texts = texts_of(name, model)
    loss, gradients = step(model, packed(texts))
    expected, others = step(model, unpacked(texts))
    tolerance = 1e-6 if any(part in name for part in ROUNDED) else 1e-9
    assert_close(loss, expected, 1e-6)  # which transformers computes in float32
    assert gradients.keys() == others.keys()
    assert any(bool(gradient.any()) for gradient in gradients.values())
    for key, gradient in gradients.items():
        assert_close(gradient, others[key], tolerance)


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_text_changes_nothing_in_the_others(name: str) -> None:
    model = made(name)
    texts = texts_of(name, model)
    numbers = [torch.full_like(text, place) for place, text in enumerate(texts)]
    number = pad([torch.cat(numbers[:3]), torch.cat(numbers[3:])], "right", -1)[0]
    with torch.no_grad():
        model.train()
        expected = model(**packed(texts)).logits
        for place, text in enumerate(texts):
            other = [t if t is not text else t.roll(1) + (t < 50).long() for t in texts]
            found = model(**packed(other)).logits
            same = number != place
            assert_close(found[same], expected[same], 1e-6)
            assert not torch.allclose(found[~same], expected[~same], atol=1e-3)


@pytest.mark.parametrize("connector", ["cross_attention", "legonn"])
def test_items_are_seen_in_their_own_texts(connector: str) -> None:
    """One for each text, or as many as stand in it; also where rows hold different numbers of texts."""
    options: dict[str, Any] = {"connector": connector, "rotary": True, "null_key": True}
    model = awaken(
        calmlm.compose(tiny_model("llama", seed=1, attn_implementation="sdpa"), {"eyes": vision()}, 2, **options)
    )
    model = model.double().train()
    texts = texts_of("", model)
    pixels = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(3)).double()
    seven = {"pixel_values": torch.cat((pixels, pixels[:2]))}  # padding is two texts more
    loss, gradients = step(model, packed(texts) | {"augmenting_inputs": {"eyes": seven}})
    expected, others = step(model, unpacked(texts) | {"augmenting_inputs": {"eyes": {"pixel_values": pixels}}})
    assert_close(loss, expected, 1e-6)
    for key, gradient in gradients.items():
        assert_close(gradient, others[key], 1e-6)
    at = torch.tensor([[2, 12, -1], [1, 4, 7]])  # the last of the first text's row, and two of one text
    apart = torch.tensor([[2, -1], [-1, -1], [0, -1], [1, 4], [1, -1]])
    some = torch.cat((pixels, pixels[:1] + 1))
    rows = torch.zeros(10, 1, 8, 8).double()
    rows[0], rows[4], rows[6], rows[7], rows[8] = some[0], some[1], some[3], some[4], some[5]
    loss, gradients = step(model, packed(texts) | {"augmenting_inputs": {"eyes": {"pixel_values": some, "at": at}}})
    given = {"pixel_values": rows, "at": apart}
    expected, others = step(model, unpacked(texts) | {"augmenting_inputs": {"eyes": given}})
    assert_close(loss, expected, 1e-6)
    for key, gradient in gradients.items():
        assert_close(gradient, others[key], 1e-6)
    with pytest.raises(calmlm.DataError) as caught:
        model(**packed(texts), augmenting_inputs={"eyes": {"pixel_values": pixels}})
    assert_helpful(caught.value, "'at'", "7 texts")


def test_what_cannot_be_told_apart_is_refused() -> None:
    model = tiny_composition(**own("unigram"))
    given = packed(texts_of("", model))
    del given["labels"]
    with pytest.raises(calmlm.DataError) as caught:
        model(**given, use_cache=True)
    assert_helpful(caught.value, "use_cache=False")
    for other in (model, tiny_composition()):
        with pytest.raises(calmlm.DataError) as caught:
            other(**given, attention_mask=torch.ones_like(given["input_ids"]), use_cache=False)
        assert_helpful(caught.value, "attention_mask must be left out")
        assert other.eval()(**given).past_key_values is None  # which would take a row for one text
        assert torch.equal(other(**given).logits, logits_of(other, **given))
    text = {"augmenting": {"input_ids": given["input_ids"]}}
    with pytest.raises(calmlm.DataError) as caught:
        model(**given, augmenting_inputs=text)
    assert_helpful(caught.value, "row of its own")


def test_what_was_given_does_not_hang_on_the_label_of_a_first_token() -> None:
    labels = torch.tensor([[5, 5, -100, 5, -100, -100, 5, 5]])
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0]])
    starts = starts_of(labels, None, positions)
    assert starts[0].tolist() == [True, False, False, False, True, False, False, True]
    prompt = [True, False, False, False, True, True, False, True]
    given = [False, False, True, False, True, True, False, True]
    for label in (5, -100):
        labels[starts] = label
        assert prompt_of(labels, starts)[0].tolist() == prompt
        assert given_of(labels, None, starts)[0].tolist() == given
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1]])
    assert starts_of(labels, mask, positions).nonzero().tolist() == [[0, 2]]
