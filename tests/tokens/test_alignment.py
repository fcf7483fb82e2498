"""Two tokenizers, one text: the augmenting stream is causal, cached rightly, and exact where both can write bytes."""

from __future__ import annotations

import copy
import itertools
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

import calmlm
from calmlm.tokens.alignment import LOOKBACK, Alignment
from calmlm.tokens.retokenization import Rewriting
from calmlm.tokens.stream import Rewriter
from calmlm.tokens.transcoding import Transcoder
from compositions import assert_close, assert_helpful, awaken, greedy_without_cache, logits_of, pad
from tiny import tiny_model
from tokenizers_tiny import AWKWARD, KINDS, tokenizer

PAIRS = [
    ("bytes", "unigram"),
    ("unigram", "bytes"),
    ("bytes-large", "wordpiece"),
    ("bytes", "characters"),
    ("characters", "bytes-large"),
    ("sentencepiece", "bytes"),
    ("bytes", "sentencepiece"),
    ("wordpiece", "bytes"),
]
FAMILIES = ["llama", "gpt2", "gemma3_text", "opt", "qwen3", "bloom"]
LOSSLESS = [pair for pair in PAIRS if set(pair) <= {"bytes", "bytes-large", "sentencepiece"}]
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6, "pad_token_id": 0}


def composition(pair: tuple[str, str], **options: Any) -> calmlm.CalmForCausalLM:
    index = PAIRS.index(pair)
    ours, theirs = tokenizer(pair[0]), tokenizer(pair[1])
    options = {"alignment": "transcode", **options}
    model = calmlm.compose(
        tiny_model(FAMILIES[index % 6], vocab_size=len(ours)),
        tiny_model(FAMILIES[(index + 1) % 6], vocab_size=len(theirs)),
        2,
        tokenizer=ours,
        augmenting_tokenizer=theirs,
        **options,
    )
    return awaken(model)


CASES = [(pair, method) for pair in PAIRS for method in ("transcode", "own")]


@pytest.fixture(params=CASES, ids=lambda case: "+".join((*case[0], case[1])), scope="module")
def case(request: pytest.FixtureRequest) -> tuple[tuple[str, str], str]:
    return request.param


@pytest.fixture(scope="module")
def pair(case: tuple[tuple[str, str], str]) -> tuple[str, str]:
    return case[0]


@pytest.fixture(scope="module")
def model(case: tuple[tuple[str, str], str]) -> calmlm.CalmForCausalLM:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*cannot take back.*")  # Bloom
        return composition(case[0], alignment=case[1])


def whole(transcoder: Transcoder, ids: list[int]) -> tuple[list[int], list[int]]:
    batch = torch.tensor([ids], dtype=torch.long)
    block = transcoder(batch, torch.ones_like(batch, dtype=torch.bool), torch.full((1, LOOKBACK), -1))
    return block.ids[0].tolist(), block.owner[0].tolist()


def step_by_step(transcoder: Transcoder, ids: list[int]) -> tuple[list[int], list[int]]:
    previous, found, owners = torch.full((1, LOOKBACK), -1), [], []
    for position, index in enumerate(ids):
        token = torch.tensor([[index]])
        block = transcoder(token, torch.ones(1, 1, dtype=torch.bool), previous)
        found += block.ids[0].tolist()
        owners += (block.owner[0] + position).tolist()
        previous = torch.cat((previous[:, 1:], token), dim=1)
    return found, owners


@pytest.mark.parametrize(("ours", "theirs"), list(itertools.permutations(KINDS, 2)))
def test_every_pair_is_written_alike_at_once_and_step_by_step(ours: str, theirs: str) -> None:
    transcoder = Transcoder(Alignment.between(tokenizer(ours), tokenizer(theirs)))
    for text in AWKWARD:
        ids = tokenizer(ours)(text).input_ids
        assert whole(transcoder, ids) == step_by_step(transcoder, ids), text


@given(text=st.text(max_size=40))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.parametrize(("ours", "theirs"), LOSSLESS)
def test_bytes_survive_and_any_text_is_written_alike(ours: str, theirs: str, text: str) -> None:
    transcoder = Transcoder(Alignment.between(tokenizer(ours), tokenizer(theirs)))
    ids = tokenizer(ours)(text, add_special_tokens=False).input_ids
    assert whole(transcoder, ids) == step_by_step(transcoder, ids)
    expected = tokenizer(ours).decode(ids, clean_up_tokenization_spaces=False)
    found = tokenizer(theirs).decode(whole(transcoder, ids)[0], clean_up_tokenization_spaces=False)
    # A SentencePiece decoder takes one leading space for its own.
    assert found.removeprefix(" ") == expected.removeprefix(" ")


def test_an_owner_never_stands_before_its_bytes_end() -> None:
    # The emoji comes in several byte tokens; its one Unigram token belongs to the last of them.
    ours, theirs = tokenizer("bytes"), tokenizer("unigram")
    ids = ours("😀", add_special_tokens=False).input_ids
    assert len(ids) > 1
    found, owners = whole(Transcoder(Alignment.between(ours, theirs)), ids)
    assert theirs.decode(found) == "😀"
    assert set(owners) == {len(ids) - 1}


def test_special_tokens_keep_their_roles() -> None:
    ours, theirs = tokenizer("bytes"), tokenizer("unigram")
    table = Alignment.between(ours, theirs).body
    assert table[ours.bos_token_id] == [theirs.bos_token_id]
    assert table[ours.eos_token_id] == [theirs.eos_token_id]


@pytest.mark.parametrize("method", ["transcode", "retokenize"])
@pytest.mark.parametrize("ours_special", [False, True])
@pytest.mark.parametrize("theirs_special", [False, True])
def test_tokens_that_both_have_added_are_the_same_token(method: str, ours_special: bool, theirs_special: bool) -> None:
    """As chat models have marks of tools and thoughts, which some of them call special."""
    ours, theirs = copy.deepcopy(tokenizer("bytes")), copy.deepcopy(tokenizer("bytes-large"))
    ours.add_tokens([AddedToken("<tool_call>", special=ours_special, normalized=False)])
    theirs.add_tokens([AddedToken("<tool_call>", special=theirs_special, normalized=False)])
    ids = ours("hello <tool_call> fox", add_special_tokens=False).input_ids
    if method == "transcode":
        written = [i for index in ids for i in Alignment.between(ours, theirs).body[index]]
    else:
        written = [index for index, _ in Rewriter(Rewriting.between(ours, theirs, method, None)).write([*ids, 2])]
    assert written.count(theirs.convert_tokens_to_ids("<tool_call>")) == 1
    assert theirs.decode(written, skip_special_tokens=False).startswith("hello <tool_call> fox")


def test_alignment_is_plain_data() -> None:
    alignment = Alignment.between(tokenizer("bytes"), tokenizer("unigram"))
    assert Alignment.from_json(json.loads(json.dumps(alignment.to_json()))) == alignment


def test_steps_equal_teacher_forcing(pair: tuple[str, str], model: calmlm.CalmForCausalLM) -> None:
    for text in AWKWARD:
        ids = tokenizer(pair[0])(text, return_tensors="pt").input_ids
        full = logits_of(model, ids)
        with model.disable_composition():
            assert not torch.allclose(logits_of(model, ids), full, atol=1e-3)
        with torch.no_grad():
            output = model(ids[:, :1], use_cache=True)
            found = [output.logits]
            for position in range(1, ids.shape[1]):
                found.append(model(ids[:, position : position + 1], past_key_values=output.past_key_values).logits)
        assert_close(torch.cat(found, dim=1), full, 1e-4)


def test_a_later_byte_changes_no_earlier_logit(pair: tuple[str, str], model: calmlm.CalmForCausalLM) -> None:
    ids = tokenizer(pair[0])("hello 😀 world, 你好 playing", return_tensors="pt").input_ids
    before = logits_of(model, ids)
    for position in range(1, ids.shape[1]):
        changed = ids.clone()
        changed[0, position] = (changed[0, position] + 5) % 50 + 4
        if changed[0, position] != ids[0, position]:
            after = logits_of(model, changed)
            assert_close(after[:, :position], before[:, :position], 1e-5)
            assert not torch.allclose(after[:, position:], before[:, position:], atol=1e-4)


def test_padding_and_batches_change_nothing(pair: tuple[str, str], model: calmlm.CalmForCausalLM) -> None:
    ours = tokenizer(pair[0])
    batch = ours(AWKWARD, return_tensors="pt", padding=True)
    found = logits_of(model, batch.input_ids, batch.attention_mask)
    for row, mask, text in zip(found, batch.attention_mask, AWKWARD, strict=True):
        assert_close(row[mask.bool()], logits_of(model, ours(text, return_tensors="pt").input_ids)[0], 1e-5)


@pytest.mark.parametrize("mode", [{}, {"num_beams": 3}, {"prefill_chunk_size": 4}], ids=["greedy", "beam", "chunked"])
def test_generation_equals_its_uncached_reference(
    pair: tuple[str, str], model: calmlm.CalmForCausalLM, mode: dict[str, Any]
) -> None:
    batch = tokenizer(pair[0])(AWKWARD[:4], return_tensors="pt", padding=True)
    reference = {key: value for key, value in mode.items() if key == "num_beams"}
    expected = model.generate(**batch, **GREEDY, **reference, use_cache=False)
    assert torch.equal(model.generate(**batch, **GREEDY, **mode), expected)


def test_assisted_generation_equals_greedy(pair: tuple[str, str], model: calmlm.CalmForCausalLM) -> None:
    ids = tokenizer(pair[0])("hello hello hello playing", return_tensors="pt").input_ids
    expected = model.generate(ids, **GREEDY, use_cache=False)
    assert torch.equal(model.generate(ids, **GREEDY, prompt_lookup_num_tokens=3), expected)


def test_connector_options_hold_across_tokenizers() -> None:
    model = composition(PAIRS[0], rotary=True, query_key_bias=1.5, null_key=True, gate=True)
    batch = tokenizer("bytes")(AWKWARD, return_tensors="pt", padding=True)
    found = logits_of(model, batch.input_ids, batch.attention_mask)
    for row, mask, text in zip(found, batch.attention_mask, AWKWARD, strict=True):
        single = logits_of(model, tokenizer("bytes")(text, return_tensors="pt").input_ids)[0]
        assert_close(row[mask.bool()], single, 1e-5)
    expected = model.generate(**batch, **GREEDY, use_cache=False)
    assert torch.equal(model.generate(**batch, **GREEDY), expected)


def test_the_alignment_is_saved_and_loading_needs_no_tokenizer(tmp_path: Path) -> None:
    model = composition(PAIRS[0])
    model.anchor.save_pretrained(tmp_path / "m_B")
    model.augmenting["augmenting"].save_pretrained(tmp_path / "m_A")
    model.save_pretrained(tmp_path / "composition")
    loaded = calmlm.CalmForCausalLM.from_pretrained(
        tmp_path / "composition", anchor=tmp_path / "m_B", augmenting=tmp_path / "m_A", attn_implementation="eager"
    )
    ids = tokenizer("bytes")("hello 😀", return_tensors="pt").input_ids
    assert_close(logits_of(loaded, ids), logits_of(model, ids), 1e-6)
    (tmp_path / "composition" / "alignment.augmenting.json").write_text("{")
    with pytest.raises(calmlm.CheckpointError) as caught:
        calmlm.CalmForCausalLM.from_pretrained(
            tmp_path / "composition", anchor=tmp_path / "m_B", augmenting=tmp_path / "m_A"
        )
    assert_helpful(caught.value, "alignment.augmenting.json")


DAMAGED: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "of another composition": lambda data: data | {"body": [[999], *data["body"][1:]]},
    "a short table": lambda data: data | {"body": data["body"][:5], "start": {"7": [3]}},
    "marks beyond the table": lambda data: data | {"opens": [10**6]},
    "no ids": lambda data: data | {"body": [["a"]] * len(data["body"])},
    "no characters": lambda data: data | {"characters": None},
    "no object": lambda data: [data],  # type: ignore[dict-item, return-value]
}


@pytest.mark.parametrize("alignment", ["transcode", "own"])
@pytest.mark.parametrize("kind", DAMAGED)
def test_an_alignment_that_does_not_fit_is_refused(kind: str, alignment: str, tmp_path: Path) -> None:
    model = composition(PAIRS[0], alignment=alignment)
    model.save_pretrained(tmp_path)
    path = tmp_path / "alignment.augmenting.json"
    data = json.loads(path.read_text())
    damage = DAMAGED[kind]
    changed = damage(data) if alignment == "transcode" else data | {"alignment": damage(data["alignment"])}
    path.write_text(json.dumps(changed))
    anchor, augmenting = copy.deepcopy(model.anchor), copy.deepcopy(model.augmenting["augmenting"])
    with pytest.raises(calmlm.CheckpointError) as caught:
        calmlm.CalmForCausalLM.from_pretrained(tmp_path, anchor=anchor, augmenting=augmenting)
    assert_helpful(caught.value, "alignment.augmenting.json")


@pytest.mark.parametrize(
    "change", [{"stable": [[[], "letter"]]}, {"unknown": {}}, {"tokenizer": {"model": 5}}], ids=str
)
def test_other_parts_that_are_damaged_are_refused(change: dict[str, Any], tmp_path: Path) -> None:
    model = composition(PAIRS[0], alignment="own")
    model.save_pretrained(tmp_path)
    path = tmp_path / "alignment.augmenting.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    anchor, augmenting = copy.deepcopy(model.anchor), copy.deepcopy(model.augmenting["augmenting"])
    with pytest.raises(calmlm.CheckpointError) as caught:
        calmlm.CalmForCausalLM.from_pretrained(tmp_path, anchor=anchor, augmenting=augmenting)
    assert_helpful(caught.value, "alignment.augmenting.json")


def test_a_mask_of_four_dimensions_is_refused() -> None:
    model = composition(PAIRS[0])
    with pytest.raises(calmlm.DataError) as caught:
        model(torch.tensor([[5, 6, 7]]), attention_mask=torch.ones(1, 1, 3, 3, dtype=torch.bool))
    assert_helpful(caught.value, "attention_mask")


@pytest.mark.filterwarnings("ignore:.*cannot take back:UserWarning")
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("mistral", {"sliding_window": 5}),
        ("gemma3_text", {"sliding_window": 5}),
        ("gpt_neo", {"window_size": 5}),
        ("mpt", {}),
        ("bloom", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_rows_that_advance_unequally_keep_their_distances(family: str, options: dict[str, Any]) -> None:
    ours, theirs = tokenizer("bytes-large"), tokenizer("bytes")
    anchor = tiny_model("llama", vocab_size=len(ours))
    augmenting = tiny_model(family, vocab_size=len(theirs), **options)
    model = awaken(calmlm.compose(anchor, augmenting, 2, rotary=True, tokenizer=ours, augmenting_tokenizer=theirs))
    texts = ("hello playing foxes world the quick", "你好，世界。 hello", "  12 + 34 = 46 lazy dogs are fine")
    ids, mask = pad([torch.tensor(ours(text).input_ids) for text in texts], "left")
    free: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0, "eos_token_id": None}
    expected = greedy_without_cache(model, ids, 12, mask)
    assert torch.equal(model.generate(ids, attention_mask=mask, **free), expected)
    beams = [model.generate(ids, attention_mask=mask, num_beams=3, use_cache=use, **free) for use in (True, False)]
    assert torch.equal(*beams)


@given(text=st.text(min_size=2, max_size=20), cut=st.floats(0, 1))
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_in_two_calls_equals_one(
    pair: tuple[str, str], model: calmlm.CalmForCausalLM, text: str, cut: float
) -> None:
    ids = tokenizer(pair[0])(text, return_tensors="pt").input_ids
    if ids.shape[1] < 2:
        return
    place = 1 + int(cut * (ids.shape[1] - 2))
    with torch.no_grad():
        first = model(ids[:, :place], use_cache=True)
        second = model(ids[:, place:], past_key_values=first.past_key_values)
    assert_close(torch.cat((first.logits, second.logits), 1), logits_of(model, ids), 1e-4)


def test_cropping_a_batch_and_going_on_equals_never_having_gone_there() -> None:
    ours = tokenizer("bytes-large")
    model = composition(("bytes-large", "wordpiece"))
    texts = ("hello playing foxes", "你好，世界。漢字", "12 + 34 = 46.")
    ids, mask = pad([torch.tensor(ours(text).input_ids) for text in texts], "left")
    with torch.no_grad():
        cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
        for removed in (3, 1, 5):
            cache.crop(-removed)
            kept = cache.get_seq_length()
            again = model(ids[:, kept:], attention_mask=mask, past_key_values=cache).logits
            assert_close(again, logits_of(model, ids, mask)[:, kept:], 1e-4)


def test_a_text_too_long_for_the_augmenting_models_positions_is_refused() -> None:
    ours, theirs = tokenizer("bytes-large"), tokenizer("bytes")
    augmenting = tiny_model("gpt2", vocab_size=len(theirs), n_positions=12, max_position_embeddings=12)
    model = calmlm.compose(
        tiny_model("llama", vocab_size=len(ours)), augmenting, 2, tokenizer=ours, augmenting_tokenizer=theirs
    )
    with pytest.raises(calmlm.DataError) as caught:
        model(ours("hello playing foxes", return_tensors="pt").input_ids)
    assert_helpful(caught.value, "at most 12 tokens", "'augmenting'")


def test_rows_that_advance_in_turn_leave_no_empty_columns() -> None:
    ours, theirs = tokenizer("bytes-large"), tokenizer("bytes")
    model = awaken(
        calmlm.compose(
            tiny_model("llama", vocab_size=len(ours)),
            tiny_model("gpt2", vocab_size=len(theirs)),
            2,
            tokenizer=ours,
            augmenting_tokenizer=theirs,
        )
    )
    long, short = ours.convert_tokens_to_ids("Ġand"), ours.convert_tokens_to_ids("a")
    rows = torch.tensor([[long, short] * 10, [short, long] * 10])
    cache = None
    with torch.no_grad():
        for column in range(rows.shape[1]):
            cache = model(rows[:, column : column + 1], past_key_values=cache, use_cache=True).past_key_values
    frontier = cache.frontiers["augmenting"]
    assert frontier.width == int((frontier.owner >= 0).sum(1).max())
    assert frontier.width == cache.augmenting["augmenting"].get_seq_length()


def test_shapes_that_do_not_fit_are_refused() -> None:
    model = composition(PAIRS[0])
    ids = torch.tensor([[5, 6, 7], [5, 6, 8]])
    for arguments, mention in (
        ({"input_ids": ids[0]}, "(3,)"),
        ({"input_ids": ids.float()}, "input_ids"),
        ({"input_ids": ids, "attention_mask": torch.ones(2, 2, dtype=torch.long)}, "(2, 2)"),
        ({"input_ids": ids, "attention_mask": torch.ones(1, 3, dtype=torch.long)}, "(1, 3)"),
    ):
        with pytest.raises(calmlm.DataError) as caught:
            model(**arguments)
        assert_helpful(caught.value, mention)
    cache = model(ids[:1], use_cache=True).past_key_values
    with pytest.raises(calmlm.DataError) as caught:
        model(ids, past_key_values=cache)
    assert_helpful(caught.value, "rows")


def test_arguments_by_name_must_name_models() -> None:
    ours, theirs = tokenizer("bytes"), tokenizer("unigram")
    pair = tiny_model("llama", vocab_size=len(ours)), {"law": tiny_model("gpt2", vocab_size=len(theirs))}
    for options in ({"alignment": {"lawyer": "retokenize"}}, {"augmenting_view": {"lawyer": "bare"}}):
        with pytest.raises(calmlm.ConfigError) as caught:
            calmlm.compose(*pair, 1, tokenizer=ours, augmenting_tokenizer=theirs, **options)
        assert_helpful(caught.value, "lawyer", "law")
    for wrong in ({"tokenizer": "bytes"}, {"augmenting_tokenizer": [theirs]}, {"alignment": None}):
        with pytest.raises(calmlm.CalmError) as caught:
            calmlm.compose(*pair, 1, **{"tokenizer": ours, "augmenting_tokenizer": theirs, **wrong})
        assert_helpful(caught.value)
