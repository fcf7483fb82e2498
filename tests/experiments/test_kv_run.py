"""Running the key-value experiment: training on examples, stages that resume, the report."""

import dataclasses
import json
import re

import pytest
import torch

import calmlm
from calmlm.errors import ConfigError
from calmlm.experiments.fitting import SupervisedTrainer, answer, collator, in_batches, preset_of
from calmlm.experiments.kv_arithmetic import run as run_module
from calmlm.experiments.kv_arithmetic.joined import CORE, GROUPS, VARIANTS, compose_bases, composition_examples
from calmlm.experiments.kv_arithmetic.measures import COLUMNS
from calmlm.experiments.kv_arithmetic.presets import PRESETS
from calmlm.experiments.kv_arithmetic.pretraining import BASES, new_model
from calmlm.experiments.kv_arithmetic.report import HALF_COLUMNS, HALVES, METHODS, markdown, summarise
from calmlm.experiments.kv_arithmetic.rows import encode
from calmlm.experiments.kv_arithmetic.run import run
from calmlm.experiments.kv_arithmetic.tokenizer import build_tokenizer
from calmlm.experiments.kv_arithmetic.world import Example, World
from calmlm.experiments.statistics import interval
from compositions import awaken
from tiny import tiny_model


def test_loss_at_supervised_positions_is_the_models_own_loss():
    tokenizer = build_tokenizer(29)
    world = World(PRESETS["tiny"], 0)
    rng = world.rng("test")
    rows = encode([world.general(rng) for _ in range(6)] + [world.row(rng) for _ in range(6)], tokenizer)
    batch = collator(tokenizer.pad_token_id)(rows)
    anchor, augmenting = new_model(tokenizer, (32, 2, 2), 0), new_model(tokenizer, (16, 4, 2), 1)
    encoder = compose_bases(world, anchor, augmenting, refresh=False)
    with torch.no_grad():  # what was just composed answers like the anchor, whatever it reads
        for weight in (p for p in encoder.parameters() if p.requires_grad):
            weight.add_(0.1 * torch.randn_like(weight))
    for model in (anchor, compose_bases(world, anchor, augmenting), encoder):
        ours = SupervisedTrainer.compute_loss(None, model, batch)
        assert torch.allclose(ours, model(**batch).loss, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere", "granite", "gpt2", "bloom"])
def test_the_loss_of_any_family_is_its_own(family):
    """Capped and scaled logits, and heads of other names; padding on the right changes nothing."""
    model = tiny_model(family)
    rows = [{"input_ids": list(range(3, 12 - i)), "labels": [-100, -100, *range(5, 12 - i)]} for i in range(4)]
    composed = awaken(calmlm.compose(tiny_model(family), tiny_model("mistral", seed=1), connections="top"))
    pointing = awaken(calmlm.compose(tiny_model(family), tiny_model("mistral", seed=1), "none", words="pointer"))
    for each in (model, composed, pointing):
        total = sum(
            each(input_ids=torch.tensor([row["input_ids"]]))
            .logits[0, 1:-1]
            .log_softmax(-1)
            .gather(1, torch.tensor(row["labels"][2:])[:, None])
            .sum()
            for row in rows
        )
        expected = -total / sum(len(row["labels"]) - 2 for row in rows)
        assert torch.allclose(SupervisedTrainer.compute_loss(None, each, collator(0)(rows)), expected, atol=1e-5)


def test_rows_are_supervised_at_values_only():
    tokenizer = build_tokenizer(29)
    row = encode([Example("abc 7 - de+ 12", "")], tokenizer)[0]
    supervised = [i for i in row["labels"] if i != -100]
    assert tokenizer.convert_ids_to_tokens(supervised) == ["▁7", "▁12"]


def test_batches_keep_the_curriculum_and_every_row():
    rows = [{"input_ids": [0] * (1 + i % 7), "labels": [i]} for i in range(100)]
    ordered = in_batches(rows, 4, seed=0, window=5)
    assert sorted(row["labels"][0] for row in ordered) == list(range(100))
    assert {row["labels"][0] for row in ordered[:20]} == set(range(20))


def test_a_batch_holds_no_row_twice_where_epochs_follow_each_other():
    rows = [{"input_ids": [0] * length, "labels": [length]} for length in range(1, 65)]
    ordered = in_batches([*rows, *rows[::-1], *rows], 16, seed=0)
    assert len(ordered) == 192
    batches = [ordered[start : start + 16] for start in range(0, 192, 16)]
    assert all(len({row["labels"][0] for row in batch}) == 16 for batch in batches)


def test_answers_do_not_depend_on_the_batch():
    tokenizer = build_tokenizer(29)
    model = new_model(tokenizer, (32, 2, 2), 0).eval()
    prompts = ["ab + cd =", "The value of abc plus defgh minus x is", "5 ->"]
    together = answer(model, tokenizer, prompts, 6)
    assert together == [answer(model, tokenizer, [prompt], 6)[0] for prompt in prompts]


def test_interval_by_hand():
    assert interval([100.0, 100.0], 200) == (pytest.approx(100 * 0.025 ** (1 / 400)), 100.0)
    low, high = interval([50.0], 100)
    assert low == pytest.approx(50 - 1.96 * 5, abs=0.5) and high == pytest.approx(50 + 1.96 * 5, abs=0.5)


def test_halves_share_no_key_and_know_what_they_do_not_know():
    world = World(PRESETS["tiny"], 0)
    (seen, unseen), (other_seen, other_unseen) = world.half(0), world.half(1)
    assert not set(seen + unseen) & set(other_seen + other_unseen)
    assert set(seen + unseen + other_seen + other_unseen) == set(world.keys)
    for name, half in (("first_half", 0), ("second_half", 1)):
        foreign = set(world.half(1 - half)[0] + world.half(1 - half)[1] + world.half(half)[1])
        words = {word for example in composition_examples(world, name)[:500] for word in example.prompt.split()}
        assert not words & foreign, VARIANTS[name].title
    rng = world.rng("test")
    rows = [world.row(rng, world.halves[0]).prompt for _ in range(200)]
    words = [re.findall(r"([a-z]+)(?:[^a-z?]{0,2}| [a-z+×=>-]+) (\d+|\?)", row) for row in rows]
    for word, value in (pair for row in words for pair in row):
        if word in world.halves[0]:
            assert value == str(world.value[word])
        if word in world.halves[1]:
            assert value == "?"


def test_unknown_preset_and_seeds_given_twice():
    with pytest.raises(ConfigError, match="one of tiny, small, paper"):
        preset_of(PRESETS, "huge")
    with pytest.raises(ConfigError, match="each once"):
        run("tiny", seeds=(1, 1))
    with pytest.raises(ConfigError, match="connectors, tokenizers, halves, but got thirds"):
        run("tiny", also=["thirds"])


def test_what_is_stored_alone_trains_nothing(tmp_path):
    with pytest.raises(ConfigError, match="models of seed 1 in .*, but they are not stored: name seeds that are"):
        run("tiny", (1,), tmp_path / "results", tmp_path / "cache", stored_only=True, report=pytest.fail)
    assert not (tmp_path / "cache").exists()


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["tiny", "paper"])
def test_run_resumes_and_reports(preset, tmp_path, monkeypatch):
    # The preset's data and stages on narrow models: the paper preset's own take minutes on a CPU.
    narrow = dataclasses.replace(PRESETS[preset], augmenting_size=(16, 8, 2), anchor_size=(32, 3, 2), heads=2)
    monkeypatch.setitem(PRESETS, preset, narrow)
    arguments = {"output": tmp_path / "results", "cache": tmp_path / "cache", "max_steps": 2, "items": 3}
    arguments["also"] = list(GROUPS) if preset == "tiny" else []  # the paper preset's answers are long
    result = run(preset, (0,), command="calmlm repro kv-arithmetic", report=lambda line: None, **arguments)
    written = json.loads((tmp_path / "results" / f"{preset}.json").read_text())
    assert written == json.loads(json.dumps(result))
    expected = METHODS if preset == "tiny" else ("m_A", "m_B", "cascade", *CORE)
    assert {(row["method"], row["column"]) for row in written["rows"]} == {(m, c) for m in expected for c in COLUMNS}
    for row in written["rows"]:
        assert 0 <= row["low"] <= row["mean"] <= row["high"] <= 100 and row["seeds"] == 1
    page = (tmp_path / "results" / f"{preset}.md").read_text()
    assert "[84.30]" in page and result["footer"] in page
    if preset == "tiny":
        halves = {(row["method"], row["column"]) for row in written["halves"]}
        assert halves == {(m, c) for m in HALVES for c in HALF_COLUMNS}
        assert written["restored"] and "exactly as before" in page

    def fail(*_):
        raise AssertionError("a stored stage was repeated")

    for name in ("train_composition", "score", "_join_halves"):
        monkeypatch.setattr(run_module, name, fail)
    for name, (tokenizer, _) in BASES.items():
        monkeypatch.setitem(BASES, name, (tokenizer, fail))
    again = run(preset, (0,), command="calmlm repro kv-arithmetic", report=lambda line: None, **arguments)
    assert again["rows"] == result["rows"]


def test_summary_and_table_with_two_seeds():
    table = {method: dict.fromkeys(COLUMNS, 50.0) for method in METHODS}
    rows = summarise({0: table, 1: table}, 100)
    assert len(rows) == len(METHODS) * len(COLUMNS)
    assert rows[0]["seeds"] == 2 and rows[0]["low"] < 50 < rows[0]["high"]
    result = {
        "preset": "tiny", "seeds": [0, 1], "rows": rows, "footer": "footer", "seconds": {"anchor": 1.0},
        "halves": [], "commits": ["d"],
        "parameters": {"m_A": 1, "m_B": 2, "added": 3}, "command": "c", "commit": "d", "versions": {"torch": "2"},
        "machine": {"processor": "p", "cores": 2, "threads": 2, "device": "no accelerator"},
    }  # fmt: skip
    assert "| Composed, D_C of keys arithmetic | 50.0 (" in markdown(result)
