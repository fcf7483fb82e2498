"""Contexts in training, each in its own model's tokens: what runs over is cut, or named before anything is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from calmlm.errors import ConfigError, DataError
from calmlm.training import pipeline
from calmlm.training.pipeline import train
from calmlm.training.schema import parse_config
from tiny import tiny_model, tiny_tokenizer
from tokenizers_tiny import tokenizer

Settings = Callable[..., dict[str, Any]]
LONG = {"prompt": "hello ", "completion": "world " * 40}


@pytest.fixture
def apart(settings: Settings, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """A function that gives settings for an augmenting model with letters for tokens and so many learned positions."""

    def make(records: list[dict[str, Any]], length: int = 40, family: str = "gpt2", **model: Any) -> dict[str, Any]:
        ours, theirs = tokenizer("bytes-large"), tokenizer("characters")
        sizes = {"max_position_embeddings": length} | ({"n_positions": length} if family == "gpt2" else {})
        for name, made, given in (
            ("big", tiny_model("llama", vocab_size=len(ours), max_position_embeddings=512), ours),
            ("small", tiny_model(family, vocab_size=len(theirs), **sizes), theirs),
        ):
            made.save_pretrained(tmp_path / name)
            given.save_pretrained(tmp_path / name)
        (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
        values = settings(max_steps=2, per_device_train_batch_size=2)
        values["model"] |= {"anchor": str(tmp_path / "big"), "augmenting": str(tmp_path / "small"), **model}
        values["data"]["train"] = str(tmp_path / "data.jsonl")
        return values

    return make


def rows_of(values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> tuple[list[dict[str, list[int]]], list[str]]:
    """The rows that are trained on, and the lines that are told."""
    found: list[dict[str, list[int]]] = []
    lines: list[str] = []
    make = pipeline.make_trainer

    def kept(backend: str, model: Any, arguments: Any, tokens: Any, rows: Any, *rest: Any) -> Any:
        found.extend(rows)
        return make(backend, model, arguments, tokens, rows, *rest)

    monkeypatch.setattr(pipeline, "make_trainer", kept)
    train(parse_config(values), report=lines.append)
    return found, lines


@pytest.mark.filterwarnings("ignore:The augmenting tokenizer has tokens that reach across")
@pytest.mark.parametrize("alignment", ["transcode", "retokenize"])
def test_completions_are_cut_where_the_augmenting_model_ends(
    alignment: str, apart: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = apart([LONG, {"prompt": "a", "completion": "b"}, LONG, LONG], alignment=alignment)
    values["data"]["eval"] = values["data"]["train"]
    rows, lines = rows_of(values, monkeypatch)
    told = "3 of 4 examples were cut where the context of 'augmenting' ends, after 40 of its own tokens."
    assert lines.count(told) == 2  # the data for evaluation as well
    text = tokenizer("bytes-large").decode(rows[0]["input_ids"])
    assert 30 < len(text) <= 41 and LONG["prompt"] + LONG["completion"].startswith(text[6:]) * text[6:] == text
    assert len(rows[0]["labels"]) == len(rows[0]["input_ids"])
    assert rows[0]["labels"][-1] == rows[0]["input_ids"][-1]


@pytest.mark.parametrize("where", ["train", "eval"])
def test_prompts_that_fill_it_are_named_before_anything_is_written(where: str, apart: Any, tmp_path: Path) -> None:
    values = apart([LONG])
    path = tmp_path / "long.jsonl"
    path.write_text("\n".join(map(json.dumps, [LONG, {"prompt": "hello " * 10, "completion": "x"}])), encoding="utf-8")
    values["data"][where] = str(path)
    message = r"long.jsonl, line 2: expected the prompt and one token more .*'augmenting', 40 of its own tokens.* 6\d;"
    with pytest.raises(DataError, match=message):
        train(parse_config(values), report=lambda line: None)
    assert not Path(values["output"]).exists()


def test_general_text_is_cut_where_the_augmenting_model_ends(apart: Any, tmp_path: Path) -> None:
    values = apart([{"prompt": "a", "completion": "b"}] * 2)
    (tmp_path / "general.txt").write_text("world " * 40, encoding="utf-8")
    values["retain"] = {"text": str(tmp_path / "general.txt")}
    assert train(parse_config(values), report=lambda line: None).steps == 2


def test_general_text_beyond_the_vocabulary_is_named_before_anything_is_written(apart: Any, tmp_path: Path) -> None:
    values, ours = apart([{"prompt": "a", "completion": "b"}] * 2), tokenizer("bytes-large")
    last = len(ours) - 1
    tiny_model("llama", vocab_size=last, max_position_embeddings=512).save_pretrained(tmp_path / "big")
    text = ours.decode([last])
    assert last in ours(text)["input_ids"]
    (tmp_path / "general.txt").write_text(f"a{text} b", encoding="utf-8")
    values["retain"] = {"text": str(tmp_path / "general.txt")}
    with pytest.raises(ConfigError, match=f"retain.text: expected ids below {last}, .* but the text has {last};"):
        train(parse_config(values), report=lambda line: None)
    assert not Path(values["output"]).exists()


def test_a_context_that_is_only_stated_counts_in_the_models_own_tokens(
    apart: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The letters of an augmenting model with relative positions are no tokens of the anchor's."""
    values = apart([LONG, LONG], length=64, family="llama")
    values["data"]["max_length"] = 100  # of the anchor's tokens
    rows, lines = rows_of(values, monkeypatch)
    assert "2 of 2 examples were cut where the context of 'augmenting' ends, after 64 of its own tokens." in lines
    assert len(tokenizer("bytes-large").decode(rows[0]["input_ids"])) in range(55, 66)
    values["data"]["max_length"] = 600
    with pytest.raises(ConfigError, match="expected at most 512"):
        train(parse_config(values), overwrite=True, report=lambda line: None)


def test_each_of_several_models_counts(apart: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = tokenizer("bytes")
    values = apart([LONG, LONG], length=200)
    made = tiny_model("gpt2", vocab_size=len(theirs), n_positions=50, max_position_embeddings=50)
    made.save_pretrained(tmp_path / "other")
    theirs.save_pretrained(tmp_path / "other")
    values["model"]["augmenting"] = {"letters": str(tmp_path / "small"), "bytes": str(tmp_path / "other")}
    rows, lines = rows_of(values, monkeypatch)
    assert [line for line in lines if "were cut" in line] == [
        "2 of 2 examples were cut where the context of 'letters' ends, after 200 of its own tokens.",
        "2 of 2 examples were cut where the context of 'bytes' ends, after 50 of its own tokens.",
    ]
    assert len(rows[0]["input_ids"]) < 60


@pytest.mark.parametrize("backend", ["sft", "trainer"])
def test_a_model_that_reads_prompts_counts_prompts(
    backend: str, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its positions end after twelve tokens, and the rows go on."""
    tiny_model("llama", seed=1).save_pretrained(tmp_path / "big")
    tiny_tokenizer().save_pretrained(tmp_path / "big")
    tiny_model("gpt2", n_positions=12, max_position_embeddings=12).save_pretrained(tmp_path / "small")
    values = settings(backend, max_steps=2, per_device_train_batch_size=2)
    values["model"] |= {"anchor": str(tmp_path / "big"), "augmenting": str(tmp_path / "small"), "refresh": False}
    path = tmp_path / "data.jsonl"
    values["data"]["train"] = str(path)
    records = [{"prompt": "a" * 12, "completion": "b" * 50}, {"prompt": "a", "completion": "b"}]
    path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    rows, lines = rows_of(values, monkeypatch)
    assert len(rows[0]["input_ids"]) == 63 and not [line for line in lines if "cut" in line]
    path.write_text(json.dumps({"prompt": "a" * 13, "completion": "b"}), encoding="utf-8")
    with pytest.raises(DataError, match="data.jsonl, line 1: expected a prompt of at most 12 tokens"):
        train(parse_config(values), overwrite=True, report=lambda line: None)


def test_positions_that_begin_behind_the_padding_are_no_texts(settings: Settings, tmp_path: Path) -> None:
    """RoBERTa's configuration states two more positions than a text can have."""
    tiny_tokenizer().save_pretrained(tmp_path / "big")
    sizes = {"hidden_size": 20, "num_attention_heads": 2, "intermediate_size": 30, "num_hidden_layers": 4}
    from transformers import RobertaConfig, RobertaForCausalLM

    config = RobertaConfig(vocab_size=97, max_position_embeddings=34, is_decoder=True, pad_token_id=1, **sizes)
    RobertaForCausalLM(config).save_pretrained(tmp_path / "small")
    tiny_model("llama", seed=1).save_pretrained(tmp_path / "big")
    values = settings("trainer", max_steps=2)
    values["model"] |= {"anchor": str(tmp_path / "big"), "augmenting": str(tmp_path / "small")}
    (tmp_path / "data.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b" * 50}), encoding="utf-8")
    values["data"]["train"] = str(tmp_path / "data.jsonl")
    lines: list[str] = []
    train(parse_config(values), report=lines.append)
    assert "1 of 1 examples were cut at 32 tokens." in lines
