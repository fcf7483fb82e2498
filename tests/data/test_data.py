"""Reading, checking and tokenizing data: what is learned from what, and one clear sentence for each fault."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from calmlm.data import Example, encode_examples, read_examples, read_jsonl
from calmlm.data.labels import encode_prompt
from calmlm.data.sources import HubDataset, load_examples
from calmlm.errors import DataError
from calmlm.tokens.lookup import find_tokenizer, load_tokenizer
from tiny import tiny_model, tiny_tokenizer

PAIR = {"prompt": "1+1=", "completion": "2"}
CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}


def write(path: Path, *lines: str | dict[str, Any]) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return path


def fault(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        read_examples(read_jsonl(path))
    return str(caught.value).replace(str(path), "FILE")


def encode(tokenizer: PreTrainedTokenizerBase, fields: dict[str, Any], **options: Any) -> dict[str, list[int]]:
    kind: Any = {"prompt": "prompt-completion", "messages": "messages", "text": "text"}[next(iter(fields))]
    options.setdefault("max_length", None)
    return encode_examples([Example(kind, fields, "FILE, line 1")], tokenizer, **options).rows[0]


def learned(tokenizer: PreTrainedTokenizerBase, row: dict[str, list[int]]) -> str:
    """The text that a loss is counted on."""
    return tokenizer.decode([label for label in row["labels"] if label != -100])


class TestReading:
    def test_examples_of_each_format(self, tmp_path: Path) -> None:
        for record in (PAIR, CHAT, {"text": "abc"}):
            examples = read_examples(read_jsonl(write(tmp_path / "data.jsonl", record, "", record)))
            assert [example.fields for example in examples] == [record, record]
            assert [example.place.rsplit(", ")[-1] for example in examples] == ["line 1", "line 3"]

    def test_other_keys_are_dropped(self, tmp_path: Path) -> None:
        (example,) = read_examples(read_jsonl(write(tmp_path / "data.jsonl", {**PAIR, "id": 7})))
        assert example.fields == PAIR

    def test_line_separators_within_strings_end_no_line(self, tmp_path: Path) -> None:
        path = tmp_path / "data.jsonl"
        path.write_text(json.dumps({"text": "a\u2028b\x85c"}, ensure_ascii=False), encoding="utf-8")
        assert read_jsonl(path)[0].fields == {"text": "a\u2028b\x85c"}

    def test_windows_files(self, tmp_path: Path) -> None:
        path = tmp_path / "data.jsonl"
        path.write_bytes(b'\xef\xbb\xbf{"text": "ab"}\r\n{"text": "cd"}\r\n')
        assert [record.fields["text"] for record in read_jsonl(path)] == ["ab", "cd"]

    def test_missing_file(self, tmp_path: Path) -> None:
        assert fault(tmp_path / "none.jsonl") == "Expected a data file at FILE, but there is none; check the path."

    def test_folder_for_a_file(self, tmp_path: Path) -> None:
        assert "cannot be read (Is a directory)" in fault(tmp_path)

    @pytest.mark.parametrize("content", ["", "\n \n"])
    def test_empty_file(self, tmp_path: Path, content: str) -> None:
        assert "Expected at least one JSON object in FILE, but the file is empty" in fault(
            write(tmp_path / "data.jsonl", content)
        )

    def test_malformed_line_is_named_by_its_number(self, tmp_path: Path) -> None:
        message = fault(write(tmp_path / "data.jsonl", PAIR, PAIR, '{"prompt": "1+1=", "completion": '))
        assert message == (
            "FILE, line 3: expected one JSON object, but got malformed JSON (Expecting value at character 34); "
            "mend or remove the line."
        )

    @pytest.mark.parametrize(("line", "kind"), [("[1]", "array"), ('"a"', "string"), ("3", "number"), ("null", "null")])
    def test_line_that_is_no_object(self, tmp_path: Path, line: str, kind: str) -> None:
        assert f"line 2: expected a JSON object, but got a JSON {kind};" in fault(
            write(tmp_path / "data.jsonl", PAIR, line)
        )

    def test_other_encoding(self, tmp_path: Path) -> None:
        path = tmp_path / "data.jsonl"
        path.write_bytes(b'{"text": "ok"}\n{"text": "\xff"}')
        assert "line 2: expected UTF-8 text" in fault(path)

    def test_too_deep_nesting(self, tmp_path: Path) -> None:
        assert "line 1: expected one JSON object" in fault(write(tmp_path / "data.jsonl", '{"a":' * 100_000))

    def test_unknown_fields(self, tmp_path: Path) -> None:
        message = fault(write(tmp_path / "data.jsonl", {"question": "a", "answer": "b"}))
        assert (
            "expected the fields 'prompt' and 'completion', or 'messages', or 'text', but got 'question', 'answer'"
            in (message)
        )

    def test_missing_field(self, tmp_path: Path) -> None:
        assert "line 2: expected the fields" in fault(write(tmp_path / "data.jsonl", PAIR, {"prompt": "1"}))

    def test_mixed_formats(self, tmp_path: Path) -> None:
        message = fault(write(tmp_path / "data.jsonl", PAIR, {"text": "abc"}))
        assert message == (
            "FILE, line 2: expected 'prompt' and 'completion' as in FILE, line 1, but got 'text'; "
            "keep one format in all data of a run."
        )

    def test_two_formats_in_one_record(self, tmp_path: Path) -> None:
        assert "line 1: expected one format" in fault(write(tmp_path / "data.jsonl", {**PAIR, "text": "abc"}))

    def test_wrong_type(self, tmp_path: Path) -> None:
        assert "line 1: expected a string in 'completion', but got int" in fault(
            write(tmp_path / "data.jsonl", {"prompt": "1+1=", "completion": 2})
        )

    def test_empty_completion(self, tmp_path: Path) -> None:
        assert "line 1: expected text in 'completion', but it is empty" in fault(
            write(tmp_path / "data.jsonl", {"prompt": "1+1=", "completion": ""})
        )

    @pytest.mark.parametrize(
        ("messages", "part"),
        [
            ([], "expected a list of messages"),
            ("hi", "expected a list of messages"),
            (["hi"], "expected 'role' and 'content' as strings in message 1"),
            ([{"role": "user"}], "expected 'role' and 'content' as strings in message 1"),
            ([{"role": "robot", "content": "hi"}], "expected the role of message 1 to be one of"),
            ([{"role": "user", "content": "hi"}], "expected a message of the role assistant, but there is none"),
        ],
    )
    def test_messages_that_are_none(self, tmp_path: Path, messages: Any, part: str) -> None:
        assert part in fault(write(tmp_path / "data.jsonl", {"messages": messages}))

    def test_several_files_in_order(self, tmp_path: Path) -> None:
        first, second = (write(tmp_path / name, {"text": name}) for name in ("a.jsonl", "b.jsonl"))
        assert [example.fields["text"] for example in load_examples([str(first), str(second)])] == [
            "a.jsonl",
            "b.jsonl",
        ]

    def test_data_set_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        datasets = pytest.importorskip("datasets")
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        (tmp_path / "set").mkdir()
        write(tmp_path / "set" / "train.jsonl", PAIR, PAIR, PAIR)
        examples = load_examples([HubDataset(str(tmp_path / "set"), split="train[:2]")])
        assert [example.fields for example in examples] == [PAIR, PAIR]
        assert examples[1].place.endswith("row 2")

    def test_unknown_data_set(self, tmp_path: Path) -> None:
        pytest.importorskip("datasets")
        with pytest.raises(
            DataError, match="Expected a data set 'no/such-set' with the split 'train', but it could not"
        ):
            load_examples([HubDataset("no/such-set")])


class TestEncoding:
    def test_completion_only(self, tokenizer: PreTrainedTokenizerBase) -> None:
        row = encode(tokenizer, PAIR)
        assert tokenizer.decode(row["input_ids"]) == "1+1=2</s>"
        assert learned(tokenizer, row) == "2</s>"
        assert len(row["labels"]) == len(row["input_ids"])

    def test_all(self, tokenizer: PreTrainedTokenizerBase) -> None:
        row = encode(tokenizer, PAIR, loss_on="all")
        assert row["labels"] == row["input_ids"]

    def test_text_counts_in_full(self, tokenizer: PreTrainedTokenizerBase) -> None:
        assert learned(tokenizer, encode(tokenizer, {"text": "abc"})) == "abc</s>"

    def test_messages_count_the_assistant_only(self, tokenizer: PreTrainedTokenizerBase) -> None:
        row = encode(tokenizer, {"messages": [*CHAT["messages"], *CHAT["messages"]]})
        assert learned(tokenizer, row) == "yo</s>yo</s>"

    def test_prompt_has_the_ids_that_it_has_in_generation(self, tokenizer: PreTrainedTokenizerBase) -> None:
        row = encode(tokenizer, PAIR)
        prompt = encode_prompt(PAIR["prompt"], tokenizer)
        assert row["input_ids"][: len(prompt)] == prompt
        assert row["labels"][: len(prompt)] == [-100] * len(prompt)

    def test_long_completions_are_cut(self, tokenizer: PreTrainedTokenizerBase) -> None:
        encoded = encode_examples(
            [Example("prompt-completion", {"prompt": "ab", "completion": "c" * 50}, "FILE, line 1")],
            tokenizer,
            max_length=7,
        )
        assert tokenizer.decode(encoded.rows[0]["input_ids"]) == "abccccc"
        assert encoded.truncated == 1

    def test_prompt_longer_than_the_context(self, tokenizer: PreTrainedTokenizerBase) -> None:
        with pytest.raises(DataError) as caught:
            encode(tokenizer, {"prompt": "abcdefgh", "completion": "i"}, max_length=8)
        assert str(caught.value) == (
            "FILE, line 1: expected a prompt shorter than the context of 8 tokens, but got 8; shorten it, or raise "
            "max_length if the models allow it."
        )

    def test_nothing_to_predict(self, tokenizer: PreTrainedTokenizerBase) -> None:
        tokenizer = tiny_tokenizer()
        tokenizer.eos_token = None
        with pytest.raises(DataError, match="line 1: expected text of two tokens or more, but got 1"):
            encode(tokenizer, {"text": "a"})

    def test_messages_without_a_template(self) -> None:
        with pytest.raises(DataError, match="line 1: expected a tokenizer with a chat template for 'messages'"):
            encode(tiny_tokenizer(chat_template=None), CHAT)

    def test_template_that_refuses(self) -> None:
        tokenizer = tiny_tokenizer(chat_template="{{ raise_exception('no system message') }}")
        with pytest.raises(DataError, match=r"line 1: expected messages .* refused them \(no system message\)"):
            encode(tokenizer, CHAT)

    def test_template_that_hides_the_answer(self) -> None:
        tokenizer = tiny_tokenizer(
            chat_template="{{ messages|length }}{% for m in messages %}{{ m['role'] }}{% endfor %}"
        )
        with pytest.raises(DataError, match="renders message 2 the same way"):
            encode(tokenizer, {"messages": [*CHAT["messages"], CHAT["messages"][0]]})


class TestTokenizer:
    def test_first_place_that_has_one(self, anchor_folder: Path, augmenting_folder: Path) -> None:
        found = load_tokenizer([None, str(augmenting_folder), str(anchor_folder)])
        assert len(found) == 97

    @pytest.mark.parametrize("family", ["gpt2", "gemma3_text", "opt"])
    def test_made_up_ones_do_not_count(self, family: str, tmp_path: Path) -> None:
        """For these transformers gives an empty tokenizer where there is none."""
        tiny_model(family).save_pretrained(tmp_path)
        assert find_tokenizer(tmp_path) is None

    def test_none_anywhere(self, augmenting_folder: Path) -> None:
        with pytest.raises(DataError) as caught:
            load_tokenizer([str(augmenting_folder)])
        assert str(caught.value) == (
            f"Text needs a tokenizer, but none was found in {augmenting_folder}; name a tokenizer's id or folder with "
            f"--tokenizer, or `tokenizer:` in the file."
        )

    def test_named_one_that_is_none(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="none was found in .*; name another"):
            load_tokenizer([str(tmp_path)], named=True)


class TestConversations:
    """Chat templates and records as they are found in the wild."""

    REASONING = (
        "{% for m in messages %}<{{ m.role }}>"
        "{% if m.role == 'assistant' and loop.last %}[thinks]{% endif %}{{ m.content }}</s>"
        "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )

    @pytest.mark.parametrize("answer", ["yo", "<b>x</b>", "[thinks]", "</s", "x"])
    def test_reasoning_that_only_the_last_turn_shows(self, answer: str) -> None:
        tokenizer = tiny_tokenizer(chat_template=self.REASONING)
        turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": answer}]
        row = encode(tokenizer, {"messages": [*turns, *turns, *turns]})
        text = f"<user>hi</s><assistant>{answer}</s>"
        assert tokenizer.decode(row["input_ids"]) == text * 2 + f"<user>hi</s><assistant>[thinks]{answer}</s>"
        assert learned(tokenizer, row) == f"{answer}</s>" * 2 + f"[thinks]{answer}</s>"

    def test_a_mark_that_the_next_opening_ends_with_is_not_taken_for_the_end(self) -> None:
        template = (
            "{% for m in messages %}[{{ m.role }}]\n{% if m.role == 'assistant' and loop.last %}(thinks){% endif %}"
            "{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[assistant]\n{% endif %}"
        )
        with pytest.raises(DataError, match="expected a chat template"):
            encode(tiny_tokenizer(chat_template=template), {"messages": [*CHAT["messages"], *CHAT["messages"]]})

    def test_a_turn_whose_end_cannot_be_told_is_refused(self) -> None:
        template = "{% for m in messages %}<{{ m.role }}>{% if loop.last %}!{% endif %}{{ m.content }}{% endfor %}"
        turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
        with pytest.raises(DataError, match="expected a chat template"):
            encode(tiny_tokenizer(chat_template=template), {"messages": [*turns, *turns]})

    def test_tools_reach_the_template(self, tmp_path: Path) -> None:
        template = (
            "{% if tools %}[{% for tool in tools %}{{ tool.name }}{% endfor %}]{% endif %}{% for m in messages %}"
            "<{{ m.role }}>{% if m.tool_calls %}call {{ m.tool_calls[0].name }}{% else %}{{ m.content }}{% endif %}!"
            "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
        )
        tokenizer = tiny_tokenizer(chat_template=template)
        messages = [
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": None, "tool_calls": [{"name": "add"}]},
            {"role": "tool", "content": "3"},
            {"role": "assistant", "content": "it is 3"},
        ]
        path = write(tmp_path / "data.jsonl", {"messages": messages, "tools": [{"name": "add"}]})
        (row,) = encode_examples(read_examples(read_jsonl(path)), tokenizer, max_length=None).rows
        whole = "[add]<user>hi!<assistant>call add!<tool>3!<assistant>it is 3!"
        assert tokenizer.decode(row["input_ids"]) == whole
        assert learned(tokenizer, row) == "call add!it is 3!"

    @pytest.mark.parametrize("tools", ["add", [1]])
    def test_tools_that_are_none(self, tools: Any, tmp_path: Path) -> None:
        assert "in 'tools'" in fault(write(tmp_path / "data.jsonl", {**CHAT, "tools": tools}))

    def test_only_an_assistant_that_calls_may_say_nothing(self, tmp_path: Path) -> None:
        for silent in ({"role": "user", "content": None}, {"role": "assistant", "content": None}):
            messages = [silent, *CHAT["messages"]]
            assert "message 1" in fault(write(tmp_path / "data.jsonl", {"messages": messages}))


def test_an_end_of_text_that_stands_in_a_prompt_stays(tokenizer: PreTrainedTokenizerBase) -> None:
    end = tokenizer.eos_token
    assert encode_prompt(f"a{end}", tokenizer)[-1] == tokenizer.eos_token_id
    row = encode(tokenizer, {"prompt": f"a{end}", "completion": "b"})
    assert learned(tokenizer, row) == f"b{end}"


def test_halves_of_characters_are_refused(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    for record in ({"prompt": "a\ud800", "completion": "b"}, {"text": "\udc00"}):
        assert "half of a character" in fault(write(tmp_path / "data.jsonl", json.dumps(record)))
    messages = [{"role": "user", "content": "\ud800"}, CHAT["messages"][1]]
    assert "half of a character" in fault(write(tmp_path / "data.jsonl", json.dumps({"messages": messages})))


def test_a_number_of_thousands_of_digits_is_refused(tmp_path: Path) -> None:
    assert "line 1: expected one JSON object" in fault(write(tmp_path / "data.jsonl", '{"text": ' + "1" * 5000 + "}"))


def test_files_may_be_packed(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(PAIR).encode()))
    assert [record.fields for record in read_jsonl(path)] == [PAIR]
    path.write_bytes(path.read_bytes()[:-12])
    assert "cannot be unpacked" in fault(path)


@pytest.mark.parametrize(
    ("name", "content"), [("x.parquet", b"PAR1..."), ("x.csv", b"prompt,completion"), ("x", b"PK\x03\x04")]
)
def test_tables_are_named_as_such(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    assert "write {dataset: FOLDER}" in fault(tmp_path / name)
    with pytest.raises(DataError, match="a folder in 'dataset', but .* is a file"):
        load_examples([HubDataset(str(tmp_path / name))])


def test_a_null_is_told_from_a_missing_column(tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text("prompt,completion,other\na, b,\nc,None,\n", encoding="utf-8")
    with pytest.raises(DataError, match="row 2: expected a string in 'completion', but it is null"):
        load_examples([HubDataset(str(tmp_path))])
