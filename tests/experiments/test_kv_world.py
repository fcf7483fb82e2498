"""The key-value world: keys, texts and their tokens."""

import random
import re

import pytest

from calmlm.experiments.kv_arithmetic.measures import cascade, columns, is_right
from calmlm.experiments.kv_arithmetic.presets import PRESETS
from calmlm.experiments.kv_arithmetic.pretraining import TOKENIZERS
from calmlm.experiments.kv_arithmetic.tokenizer import build_tokenizer
from calmlm.experiments.kv_arithmetic.words import PHRASE_WORDS, word_values
from calmlm.experiments.kv_arithmetic.world import Example, Expression, World, final_answer

TINY = PRESETS["tiny"]


def test_solution_by_hand():
    expression = Expression((12, 5, 20), ("+", "-"))
    assert expression.restated() == "12 + 5 - 20"
    assert expression.solution() == "12 + 5 = 17 - 20 = -3"
    assert final_answer(expression.solution()) == "-3"
    assert Expression((3, 4), ("×",)).solution() == "3 × 4 = 12"


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_world_depends_on_preset_and_seed_alone(name):
    world, again, other = World(PRESETS[name], 0), World(PRESETS[name], 0), World(PRESETS[name], 1)
    assert world.value == again.value
    assert world.value != other.value
    assert columns(world) == columns(again)
    assert not set(world.composition_keys) & set(world.unseen_keys)
    reserved = set(word_values(20)) | {word.lower() for word in PHRASE_WORDS}
    assert not reserved & set(world.value)
    assert all(re.fullmatch("[a-z]{2,6}", key) for key in world.value)
    assert len(world.value) == PRESETS[name].keys


def test_unseen_columns_hold_unseen_keys_only():
    world = World(TINY, 0)
    seen = set(world.composition_keys)
    for column, items in columns(world).items():
        words = {word for item in items for word in re.findall(r"(?<![A-Za-z])[a-z]+(?![A-Za-z])", item.prompt)}
        keys = words & set(world.value)
        if column == "numeric":
            assert not keys
        elif column == "keys_arithmetic_seen":
            assert keys and keys <= seen
        else:
            assert keys and not keys & seen


@pytest.mark.parametrize("largest", [99, 9])
def test_tokenizer_round_trip(largest):
    tokenizer = build_tokenizer(largest)
    world = World(TINY, 0)
    rng = random.Random(0)
    texts = ["What is ab + seventeen subtracted with cde? Answer: -7 - 3 = -10", "(a) -> 10 - 24, 25000", "Q x"]
    texts += [world.general(rng).prompt for _ in range(50)] + [world.row(rng).prompt for _ in range(50)]
    for text in texts:
        ids = tokenizer(text).input_ids
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("kind", ["bpe", "characters"])
def test_the_other_tokenizers_round_trip(kind):
    world = World(TINY, 0)
    tokenizer = TOKENIZERS[kind](world)
    rng = random.Random(0)
    texts = ["What is ab + seventeen subtracted with cde? Answer: -7 - 3 = -10", "12 -> 10 - 24, 25000", "Q x"]
    texts += [world.general(rng).prompt for _ in range(50)] + [world.row(rng).prompt for _ in range(50)]
    for text in texts:
        ids = tokenizer(text).input_ids
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    if kind == "characters":
        assert len(tokenizer("abc + 12").input_ids) == 1 + len("abc + 12")
    else:
        assert "▁Answer" in tokenizer.get_vocab()
        assert tokenizer.convert_tokens_to_ids(["<pad>", "<bos>", "<eos>", "<unk>"]) == [0, 1, 2, 3]


def test_tokenizer_survives_saving(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = build_tokenizer(20)
    tokenizer.save_pretrained(tmp_path)
    text = "abcde + 20 - -7 ="
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded(text).input_ids == tokenizer(text).input_ids
    assert tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids) == [
        "<bos>", "▁ab", "cd", "e", "▁+", "▁20", "▁-", "▁-7", "▁=",
    ]  # fmt: skip


def test_prompt_and_completion_tokenise_as_one_text():
    tokenizer = build_tokenizer(99)
    world = World(TINY, 0)
    rng = random.Random(1)
    for _ in range(50):
        example = world.general(rng)
        parts = tokenizer(example.prompt).input_ids + tokenizer(example.completion, add_special_tokens=False).input_ids
        assert parts == tokenizer(f"{example.prompt} {example.completion}").input_ids


def test_cascade_pastes_what_m_a_says():
    asked = []

    def look_up(words):
        asked.extend(words)
        return [{"ab": "3", "xyz": "4"}[word] for word in words]

    def echo(prompts):
        return list(prompts)

    prompts = ["What is ab + xyz? Answer:", "The value of xyz plus 5 is"]
    assert cascade(look_up, echo)(prompts) == ["What is 3 + 4? Answer:", "The value of 4 plus 5 is"]
    assert asked == ["ab", "xyz"]


def test_key_value_is_exact_and_the_rest_by_final_answer():
    example = Example("ab + cd =", "1 + 2 = 3")
    assert is_right("numeric", "0 + 3 = 3", example)
    assert not is_right("key_value", "0 + 3 = 3", example)
    assert not is_right("ood", "1 + 2 = 4", example)
