"""At every position that predicts, an augmenting model has read what its own tokenizer makes of the text so far."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import calmlm
from calmlm.readers import Inputs
from calmlm.state.past import Past
from compositions import assert_close, awaken, logits_of, pad
from tiny import tiny_model
from tokenizers_tiny import AWKWARD, tokenizer, with_beginning

SCRIPTS = [
    "the cat, the dog and 12 foxes are playing.",
    "القطة تجلس على السجادة.",
    "बिल्ली चटाई पर बैठी है।",
    "བོད་ཀྱི་སྐད་ཡིག",
    "你好，世界。汉字",
    "แมวนั่งบนเสื่อ",
    "😀👩‍👩‍👧‍👦 🇨🇭!",
    "def f(x):\n\treturn  x+1\n\n\n    pass",
    "قطة cat बिल्ली 猫  😀\n12",
]
# Anchor, augmenting tokenizer, and their families.
PAIRS = [
    ("bytes", "bytes-large", "llama", "gemma3_text"),
    ("bytes-large", "bytes", "gpt2", "llama"),
    ("bytes", "sentencepiece", "mistral", "qwen3"),
    ("sentencepiece", "bytes-large", "qwen2", "gpt2"),
    ("bytes", "unigram", "llama", "mistral"),
    ("bytes-large", "wordpiece", "gpt_neox", "opt"),
    ("sentencepiece", "unigram", "gemma3_text", "llama"),
    ("sentencepiece", "wordpiece", "llama", "qwen2"),
    ("bytes", "characters", "opt", "phi3"),
]


def composed(pair: tuple[str, str, str, str], **options: Any) -> calmlm.CalmForCausalLM:
    ours, theirs = tokenizer(pair[0]), tokenizer(pair[1])
    anchor = tiny_model(pair[2], seed=1, vocab_size=len(ours), attn_implementation="sdpa", max_position_embeddings=512)
    own = tiny_model(pair[3], seed=2, vocab_size=len(theirs), attn_implementation="sdpa", max_position_embeddings=512)
    options = {"tokenizer": ours, "augmenting_tokenizer": theirs, "alignment": "own", **options}
    return awaken(calmlm.compose(anchor, own, 2, **options))


def text_so_far(ours: Any, ids: list[int]) -> str:
    """The whole characters in the bytes of anchor tokens."""
    from calmlm.tokens.spelling import Spelling, token_bytes

    pieces = token_bytes(ours)
    raw = b"".join(pieces[index] or b"" for index in ids)
    raw = raw.removeprefix(b" ") if Spelling.of(ours, "anchor").dummy_space else raw
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        return raw[: error.start].decode()


@torch.no_grad()
def states_alone(model: calmlm.CalmForCausalLM, ids: list[int], layers: list[int]) -> dict[int, Tensor]:
    """Outputs of layers of the augmenting model, run by itself on ``ids``: {layer: (length, D)}."""
    found: dict[int, Tensor] = {}
    backbone = model.model.backbone("augmenting")
    handles = [
        backbone.layers[layer].register_forward_hook(
            lambda _, __, output, layer=layer: found.update(
                {layer: (output[0] if isinstance(output, tuple) else output)[0]}
            )
        )
        for layer in layers
    ]
    backbone.decoder(input_ids=torch.tensor([ids]), use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def states_inside(
    model: calmlm.CalmForCausalLM, ids: Tensor, mask: Tensor | None = None, told: Tensor | None = None
) -> tuple[dict[int, Tensor], Tensor]:
    """What the augmenting model read, {layer: (B, S, D)}, and what each position sees of it, (B, T, S) bool."""
    reader = model.model.reader("augmenting")
    stream = reader.read(Inputs(ids, mask, None, told, None), Past())
    assert stream.mask is not None
    seen = stream.mask[:, 0].bool()
    return stream.hidden, seen if stream.seeing is None else seen & stream.seeing[..., None]


def check(model: calmlm.CalmForCausalLM, found: Any, row: int, place: int, ids: list[int], opening: list[int]) -> None:
    """The states that a position sees are those of the model alone on ``ids`` behind ``opening``."""
    hidden, seen = found
    columns = seen[row, place].nonzero()[:, 0]
    assert len(columns) == len(ids), (len(columns), len(ids))
    if not ids:
        return
    expected = states_alone(model, [*opening, *ids], sorted(hidden))
    for layer, states in hidden.items():
        assert_close(states[row, columns], expected[layer][len(opening) :], 1e-9)


@pytest.mark.parametrize("options", [{}, {"prefix": "a fox: "}], ids=["plain", "prefix"])
@pytest.mark.parametrize("begins", [False, True], ids=["", "beginning"])
@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
def test_states_are_those_of_the_model_alone(pair: Any, begins: bool, options: dict[str, Any]) -> None:
    theirs = with_beginning(tokenizer(pair[1])) if begins else tokenizer(pair[1])
    given = {"augmenting_prefix": options["prefix"]} if options else {}
    model = composed(pair, augmenting_tokenizer=theirs, **given).double()
    ours = tokenizer(pair[0])
    opening = theirs("").input_ids if begins else []
    opening = opening + (theirs(options["prefix"], add_special_tokens=False).input_ids if options else [])
    for text in SCRIPTS[:: 3 if options or begins else 1]:
        ids = ours(text, add_special_tokens=False).input_ids
        found = states_inside(model, torch.tensor([ids]))
        for place in range(0, len(ids), 1 if len(ids) < 40 else 5):
            so_far = text_so_far(ours, ids[: place + 1])
            expected = theirs(so_far, add_special_tokens=False).input_ids
            check(model, found, 0, place, expected, opening)


@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
def test_a_prompt_is_read_to_its_end_and_stays(pair: Any) -> None:
    ours, theirs = tokenizer(pair[0]), tokenizer(pair[1])
    model = composed(pair).double()
    for text in (SCRIPTS[0], SCRIPTS[2]):
        prompt = ours(text, add_special_tokens=False).input_ids
        answer = ours(" fox 12", add_special_tokens=False).input_ids
        ids = torch.tensor([[*prompt, *answer]])
        told = torch.arange(ids.shape[1])[None] < len(prompt)
        found = states_inside(model, ids, told=told)
        settled = theirs(text_so_far(ours, prompt), add_special_tokens=False).input_ids
        check(model, found, 0, len(prompt) - 1, settled, [])
        # Before its end it sees no more than what ends there.
        seen = found[1][0]
        assert (seen[1 : len(prompt)] >= seen[: len(prompt) - 1]).all()
        columns = seen[-1].nonzero()[:, 0]
        expected = states_alone(model, settled, sorted(found[0]))
        for layer, states in found[0].items():
            assert_close(states[0, columns[: len(settled)]], expected[layer], 1e-9)
        if pair[1].startswith("bytes"):
            whole = theirs(text_so_far(ours, ids[0].tolist()), add_special_tokens=False).input_ids
            check(model, found, 0, ids.shape[1] - 1, whole, [])


@pytest.mark.parametrize("pair", PAIRS[:4], ids="+".join)
def test_nothing_of_later_generated_text_is_seen(pair: Any) -> None:
    model, ours = composed(pair), tokenizer(pair[0])
    for text in AWKWARD[:4]:
        ids = ours(text, return_tensors="pt", add_special_tokens=False).input_ids
        before = logits_of(model, ids)
        for place in range(1, ids.shape[1], 3):
            changed = ids.clone()
            changed[:, place:] = (changed[:, place:] * 7 + 11) % len(ours)
            assert_close(logits_of(model, changed)[:, :place], before[:, :place], 1e-4)


@pytest.mark.parametrize("options", [{}, {"augmenting_prefix": "a fox: "}], ids=str)
@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
def test_steps_pieces_batches_and_padding_equal_teacher_forcing(pair: Any, options: dict[str, Any]) -> None:
    model, ours = composed(pair, augmenting_tokenizer=with_beginning(tokenizer(pair[1])), **options), tokenizer(pair[0])
    rows = [ours(text, add_special_tokens=False).input_ids for text in (AWKWARD[2], AWKWARD[0], SCRIPTS[8])]
    full = [logits_of(model, torch.tensor([row])) for row in rows]
    prompts = [len(row) // 2 for row in rows]
    for row, expected in zip(rows, full, strict=True):
        ids, cache, parts = torch.tensor([row]), None, []
        with torch.no_grad():
            for piece in ids.split([1, 4, *[1] * (len(row) - 5)], dim=1):
                output = model(piece, past_key_values=cache, use_cache=True)
                cache = output.past_key_values
                parts.append(output.logits)
        assert_close(torch.cat(parts, dim=1), expected, 2e-4)
    for side in ("left", "right"):
        ids, mask = pad([torch.tensor(row) for row in rows], side)
        if side == "right" or model.model.backbone().pads_left:
            padded = logits_of(model, ids, mask)
            for index, expected in enumerate(full):
                assert_close(padded[index][mask[index].bool()], expected[0], 2e-4)
    # With prompts: labels tell the same as a prompt mask, and decoding step by step goes on from a prompt.
    for row, count in zip(rows, prompts, strict=True):
        ids = torch.tensor([row])
        told = torch.arange(len(row))[None] < count
        with torch.no_grad():
            expected = model(ids, prompt_mask=told, use_cache=False).logits
            found = model(ids, labels=ids.masked_fill(told, -100), use_cache=False).logits
            assert_close(found, expected, 1e-6)
            output = model(ids[:, :count], prompt_mask=told[:, :count], use_cache=True)
            parts = [output.logits]
            for place in range(count, len(row)):
                step = ids[:, place : place + 1]
                output = model(step, past_key_values=output.past_key_values, prompt_mask=told[:, :count])
                parts.append(output.logits)
        assert_close(torch.cat(parts, dim=1), expected, 2e-4)


def test_what_a_text_brings_itself_is_not_read_twice() -> None:
    pair = PAIRS[0]
    model = composed(pair, augmenting_tokenizer=with_beginning(tokenizer(pair[1]))).double()
    ours, theirs = tokenizer(pair[0]), tokenizer(pair[1])
    ids = [ours.bos_token_id, *ours("hello fox", add_special_tokens=False).input_ids]
    found = states_inside(model, torch.tensor([ids]))
    check(model, found, 0, len(ids) - 1, theirs("hello fox").input_ids, [theirs.bos_token_id])


def test_a_prefix_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = composed(PAIRS[0], augmenting_prefix="the quick brown fox " * 5)
    backbone, lengths = model.model.backbone("augmenting"), []
    backbone.decoder.register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    ids = tokenizer("bytes")("hello", return_tensors="pt", add_special_tokens=False).input_ids
    for _ in range(2):
        model.generate(ids.expand(3, -1), max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0)
    opening = len(model.model.opening("augmenting"))
    assert [shape[1] for shape in lengths].count(opening) == 1


def test_a_step_goes_on_where_the_text_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """A long text is not read again for each token."""
    from calmlm.tokens.live_text import OwnStream

    model, read = composed(PAIRS[0]), []
    take = OwnStream.read
    monkeypatch.setattr(OwnStream, "read", lambda *given: read.append(1) or take(*given))
    ids = tokenizer("bytes")("hello world " * 9, return_tensors="pt", add_special_tokens=False).input_ids
    ids = ids.expand(2, -1)
    model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert len(read) < 3 * ids.numel()
