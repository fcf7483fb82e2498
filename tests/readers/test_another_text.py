"""An augmenting model that reads another text in the anchor's place reads that text, and nothing else changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import calmlm
from calmlm.readers import Inputs, in_place
from calmlm.state.call import Stream
from calmlm.state.past import Past
from compositions import assert_close, assert_helpful, awaken, logits_of, pad
from tiny import tiny_model
from tokenizers_tiny import tokenizer

KINDS = ["shared", "shared-null", "transcode", "own"]
PROMPTS = ["the cat is", "12 + 34 = 46 and", "hello"]
OTHERS = ["naïve foxes are", "hello", "a dog, a cat, a fox"]
COMPLETIONS = [" a fox.", " 46 dogs", " world"]
GRAFT = {"connector": "graft", "init": "aligned", "plain_text": [*PROMPTS, *OTHERS, *COMPLETIONS] * 8}
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def composed(kind: str, attention: str = "sdpa", **options: Any) -> calmlm.CalmForCausalLM:
    ours = tokenizer("bytes")
    theirs = ours if kind.startswith("shared") else tokenizer("bytes-large")
    size = {"attn_implementation": attention, "max_position_embeddings": 512}
    anchor = tiny_model("llama", seed=1, vocab_size=len(ours), **size)
    own = tiny_model("qwen2", seed=2, vocab_size=len(theirs), **size)
    usual = {"alignment": "transcode"} if kind == "transcode" else {}
    if kind == "shared-null":
        usual |= {"null_key": True, "rotary": True}
    made = calmlm.compose(anchor, own, 2, tokenizer=ours, augmenting_tokenizer=theirs, **{**usual, **options})
    return awaken(made).eval()


def encoded(texts: list[str]) -> list[Tensor]:
    ours = tokenizer("bytes")
    return [torch.tensor(ours(text, add_special_tokens=False).input_ids) for text in texts]


def batch(completed: bool = True) -> dict[str, Any]:
    """The anchor reads [padding, prompt, completion], the augmenting model another prompt in the prompt's place."""
    count = len(PROMPTS)
    ids, mask = pad([*encoded(PROMPTS), *encoded(OTHERS)], "left")
    given = {"augmenting": {"input_ids": ids[count:], "attention_mask": mask[count:]}}
    ids, mask, width = ids[:count], mask[:count], ids.shape[1]
    labels = torch.full_like(ids, -100)
    if completed:
        tails, real = pad(encoded(COMPLETIONS), "right")
        ids, mask = torch.cat((ids, tails), dim=1), torch.cat((mask, real), dim=1)
        labels = torch.cat((labels, tails.masked_fill(real == 0, -100)), dim=1)
    return {"ids": ids, "mask": mask, "labels": labels, "given": given, "width": width}


def hidden(model: calmlm.CalmForCausalLM, inputs: Inputs) -> tuple[Stream, Past]:
    """What the augmenting model makes of a call."""
    past = Past()
    return model.model.reader("augmenting").read(*in_place(inputs, past, "augmenting")), past


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_anchors_own_text_changes_nothing(kind: str, attention: str) -> None:
    model, made = composed(kind, attention), batch()
    ids, mask, width = made["ids"], made["mask"], made["width"]
    for columns in (width, ids.shape[1]):
        given = {"augmenting": {"input_ids": ids[:, :columns], "attention_mask": mask[:, :columns]}}
        with torch.no_grad():
            plain = model(ids, attention_mask=mask, labels=made["labels"])
            found = model(ids, attention_mask=mask, labels=made["labels"], augmenting_inputs=given)
        real = mask.bool()
        assert_close(found.logits[real], plain.logits[real], 1e-6)
        assert float(found.loss) == pytest.approx(float(plain.loss), abs=1e-6)
    # Without any padding there is nothing to tell apart.
    row = encoded(["the cat is a fox."])[0][None]
    found = logits_of(model, row, augmenting_inputs={"augmenting": {"input_ids": row}})
    assert_close(found, logits_of(model, row), 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_reads_the_other_text_as_if_it_stood_alone(kind: str) -> None:
    """Row by row the same states as for the other prompt with the completion, without padding or another row."""
    model, made = composed(kind), batch()
    told = made["labels"] == -100
    inputs = Inputs(made["ids"], made["mask"], None, told, made["given"], None, told)
    stream, past = hidden(model, inputs)
    frontier = past.frontier
    for row, (other, completion) in enumerate(zip(encoded(OTHERS), encoded(COMPLETIONS), strict=True)):
        text = torch.cat((other, completion))[None]
        given = (torch.arange(text.shape[1]) < len(other))[None]
        alone, one = hidden(model, Inputs(text, None, None, given, None, None, given))
        if frontier.tokens is None:
            columns = slice(made["width"] - len(other), made["width"] + len(completion))
            before: Any = slice(None)
        else:
            columns = _columns(frontier, row)
            before = _columns(one.frontier, 0)
            assert frontier.tokens[row, columns].tolist() == one.frontier.tokens[0, before].tolist()
        for layer, states in alone.hidden.items():
            assert_close(stream.hidden[layer][row, columns], states[0, before], 1e-5)


def _columns(frontier: Any, row: int) -> list[int]:
    if frontier.chosen is not None:
        return [column for column in frontier.chosen[row].tolist() if column >= 0]
    return (frontier.owner[row] >= 0).nonzero()[:, 0].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_another_prompt_changes_what_follows_it(kind: str) -> None:
    model, made = composed(kind), batch()
    with torch.no_grad():
        plain = model(made["ids"], attention_mask=made["mask"], labels=made["labels"])
        found = model(made["ids"], attention_mask=made["mask"], labels=made["labels"], augmenting_inputs=made["given"])
    assert (plain.logits[:, made["width"]] - found.logits[:, made["width"]]).abs().amax(-1).min() > 1e-3
    # A row alone, without the padding that it has beside others: the same.
    ids, mask, width = made["ids"][1:2, 2:], made["mask"][1:2, 2:], made["width"] - 2
    given = {name: part[1:2, 2:] for name, part in made["given"]["augmenting"].items()}
    told = (torch.arange(ids.shape[1]) < width)[None]
    alone = logits_of(model, ids, mask, augmenting_inputs={"augmenting": given}, prompt_mask=told)
    real = mask[0].bool()
    assert_close(alone[0][real], found.logits[1, 2:][real], 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_generation(kind: str) -> None:
    """With a cache, in pieces and with beams as without a cache; greedy decoding is teacher forcing's own choice."""
    model, made = composed(kind), batch(completed=False)
    given = {"attention_mask": made["mask"], "augmenting_inputs": made["given"]}
    expected = model.generate(made["ids"], **GREEDY, **given, use_cache=False)
    assert torch.equal(model.generate(made["ids"], **GREEDY, **given), expected)
    asked = {**GREEDY, **given, "return_dict_in_generate": True, "output_logits": True}
    whole, pieces = (model.generate(made["ids"], **asked, prefill_chunk_size=size) for size in (None, 5))
    assert torch.equal(whole.sequences, expected) and torch.equal(pieces.sequences, expected)
    assert_close(pieces.logits[0], whole.logits[0], 1e-5)
    plain = model.generate(made["ids"], **GREEDY, attention_mask=made["mask"])
    assert not torch.equal(plain, expected)
    beams = {"num_beams": 3, "num_return_sequences": 2}
    expected_beams = model.generate(made["ids"], **GREEDY, **given, **beams, use_cache=False)
    assert torch.equal(model.generate(made["ids"], **GREEDY, **given, **beams), expected_beams)
    mask = torch.nn.functional.pad(made["mask"], (0, GREEDY["max_new_tokens"]), value=1)
    prompt = torch.arange(expected.shape[1])[None].expand(len(expected), -1) < made["width"]
    logits = logits_of(model, expected, mask, augmenting_inputs=made["given"], prompt_mask=prompt)
    assert torch.equal(logits[:, made["width"] - 1 : -1].argmax(-1), expected[:, made["width"] :])


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_with_a_cache(kind: str) -> None:
    model, made = composed(kind), batch()
    ids, mask, told = made["ids"], made["mask"], made["labels"] == -100
    whole = logits_of(model, ids, mask, augmenting_inputs=made["given"], prompt_mask=told)
    cache, parts, end = None, [], 0
    for piece in ids.split((made["width"], *[1] * (ids.shape[1] - made["width"])), dim=1):
        end += piece.shape[1]
        with torch.no_grad():
            output = model(
                piece,
                attention_mask=mask[:, :end],
                past_key_values=cache,
                use_cache=True,
                augmenting_inputs=made["given"],
                prompt_mask=told,
            )
        cache = output.past_key_values
        parts.append(output.logits)
    real = mask.bool()
    assert_close(torch.cat(parts, dim=1)[real], whole[real], 1e-5)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        *((kind, {}) for kind in KINDS),
        *((kind, {"words": "map"}) for kind in ("shared", "own")),
        *((kind, GRAFT) for kind in ("shared", "own")),
    ],
)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_position_beside_padding_sees_nothing(kind: str, attention: str, options: dict[str, Any]) -> None:
    """There the anchor's states are its own, forwards and backwards without a number that is none."""
    model, made = composed(kind, attention, **options), batch()
    model.train()
    output = model(made["ids"], attention_mask=made["mask"], labels=made["labels"], augmenting_inputs=made["given"])
    output.loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients and all(bool(grad.isfinite().all()) for grad in gradients)
    unseen = made["mask"][:, : made["width"]].bool() & ~made["given"]["augmenting"]["attention_mask"].bool()
    assert unseen.any()
    with model.disable_composition(), torch.no_grad():
        anchor = model(made["ids"], attention_mask=made["mask"]).logits
    found = output.logits.detach()[:, : made["width"]][unseen]
    assert_close(found, anchor[:, : made["width"]][unseen], 1e-5)


def test_given_positions_are_the_anchors() -> None:
    """The augmenting model counts its own, over its own text."""
    model, made = composed("shared-null"), batch()
    positions = (made["mask"].cumsum(-1) - 1).clamp(min=0)
    expected = logits_of(model, made["ids"], made["mask"], augmenting_inputs=made["given"])
    found = logits_of(model, made["ids"], made["mask"], augmenting_inputs=made["given"], position_ids=positions)
    real = made["mask"].bool()
    assert_close(found[real], expected[real], 1e-5)


def test_an_unconditional_text_is_read_itself() -> None:
    """Classifier-free guidance calls the composition on another text, which nothing is read in place of."""
    model = composed("shared")
    ids, other = encoded(["the cat is"])[0][None], encoded(["12 dogs"])[0][None]
    given = {"augmenting": {"input_ids": ids.flip(1)}}
    found = model.generate(ids, **{**GREEDY, "max_new_tokens": 1}, guidance_scale=3.0, negative_prompt_ids=other,
                           augmenting_inputs=given)  # fmt: skip
    one = logits_of(model, ids, augmenting_inputs=given)[:, -1].log_softmax(-1)
    two = logits_of(model, other)[:, -1].log_softmax(-1)
    assert int(found[0, -1]) == int((3 * (one - two) + two).argmax())


@pytest.mark.parametrize(
    ("given", "mention"),
    [
        ({"pixel_values": torch.zeros(3, 3, 8, 8)}, "pixel_values"),
        ({"input_ids": torch.zeros(3, 4)}, "input_ids"),
        ({"input_ids": torch.ones(3, 4, dtype=torch.long), "attention_mask": torch.ones(3, 5)}, "(3, 5)"),
        ({"input_ids": torch.ones(2, 4, dtype=torch.long)}, "2 for 3 rows"),
    ],
)
def test_what_cannot_be_read_is_refused(given: dict[str, Any], mention: str) -> None:
    model, made = composed("shared"), batch()
    with pytest.raises(calmlm.DataError) as caught:
        model(made["ids"], augmenting_inputs={"augmenting": given})
    assert_helpful(caught.value, "augmenting_inputs", mention)


def test_what_cannot_be_done_is_refused() -> None:
    model, made = composed("shared"), batch(completed=False)
    given = {"attention_mask": made["mask"], "augmenting_inputs": made["given"]}
    with pytest.raises(calmlm.ConfigError) as caught:
        model.generate(made["ids"], **GREEDY, **given, cache_implementation="static")
    assert_helpful(caught.value, "static")
    with pytest.raises(calmlm.ConfigError) as caught:
        model.generate(made["ids"][:1], **GREEDY, augmenting_inputs=made["given"], drafting=True)
    assert_helpful(caught.value, "another text")
    with pytest.raises(calmlm.DataError) as caught:
        model(made["ids"], attention_mask=made["mask"][:, None, None], augmenting_inputs=made["given"])
    assert_helpful(caught.value, "padding mask")
    model = composed("shared", refresh=False)
    with pytest.raises(calmlm.DataError) as caught:
        model(made["ids"], augmenting_inputs=made["given"])
    assert_helpful(caught.value, "prompt alone")
