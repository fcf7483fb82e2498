"""Conversations as data sets hold them: calls, reasoning, content in parts, tools, and columns full of nulls."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from calmlm.data import encode_examples, read_examples, read_jsonl
from calmlm.data.sources import HubDataset, load_examples
from calmlm.errors import DataError
from tiny import tiny_tokenizer

# As Qwen writes conversations: an earlier turn loses its reasoning, calls stand behind what is said.
CHATML = (
    "{% if tools %}<tools>{% for tool in tools %}{{ tool | tojson }}{% endfor %}</s>{% endif %}"
    "{% for m in messages %}<{{ m.role }}>"
    "{% if m.role == 'assistant' and loop.last and m.reasoning_content %}[{{ m.reasoning_content }}]{% endif %}"
    "{{ m.content }}"
    "{% for call in m.tool_calls or [] %}{% set f = call.function or call %}"
    "<call>{{ f.name }} {{ f.arguments | tojson }}</call>{% endfor %}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# As templates of models with pictures do: content is a list of parts, and nothing else is read.
PARTS = (
    "{% for m in messages %}<{{ m.role }}>{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}"
    "{% endfor %}</s>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
USER, CALL = {"role": "user", "content": "1+2?"}, {"function": {"name": "add", "arguments": {"a": 1}}}
ANSWER = {"role": "assistant", "content": "it is 3"}


def encoded(tmp_path: Path, record: dict[str, Any], template: str = CHATML) -> tuple[str, str]:
    """The text of a record's row, and the text that a loss is counted on."""
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(record), encoding="utf-8")
    tokenizer = tiny_tokenizer(chat_template=template)
    (row,) = encode_examples(read_examples(read_jsonl(path)), tokenizer, max_length=None).rows
    return tokenizer.decode(row["input_ids"]), tokenizer.decode([label for label in row["labels"] if label != -100])


def fault(tmp_path: Path, record: dict[str, Any], template: str = CHATML) -> str:
    with pytest.raises(DataError) as caught:
        encoded(tmp_path, record, template)
    message = str(caught.value)
    assert f"{tmp_path / 'data.jsonl'}, line 1: expected" in message
    return message


CALLED = '<user>1+2?</s><assistant><call>add {"a": 1}</call></s><tool>3</s><assistant>it is 3</s>'
LEARNED = '<call>add {"a": 1}</call></s>it is 3</s>'


@pytest.mark.parametrize(
    "call",
    [
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "assistant", "tool_calls": json.dumps([CALL])},
        {"role": "assistant", "tool_calls": [json.dumps(CALL)]},
        {"role": "assistant", "tool_calls": [{"id": "c1", "type": "function", **CALL}], "name": "me", "audio": None},
        {"role": "assistant", "content": [], "tool_calls": [CALL]},
    ],
    ids=str,
)
def test_a_call_may_come_without_words(call: dict[str, Any], tmp_path: Path) -> None:
    answer = {"role": "tool", "content": "3", "name": "add", "tool_call_id": "c1"}
    assert encoded(tmp_path, {"messages": [USER, call, answer, ANSWER]}) == (CALLED, LEARNED)


def test_null_is_missing_and_an_empty_list_of_calls_is_none(tmp_path: Path) -> None:
    strict = CHATML.replace("{{ m.content }}", "{% if 'tool_calls' in m or 'name' in m %}!{% endif %}{{ m.content }}")
    messages = [{**USER, "tool_calls": None, "name": None}, {**ANSWER, "tool_calls": []}]
    record = {"messages": messages, "tools": None, "text": None, "prompt": None, "chat_template_kwargs": None}
    assert encoded(tmp_path, record, strict) == ("<user>1+2?</s><assistant>it is 3</s>", "it is 3</s>")


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_is_learned_where_the_template_shows_it(key: str, tmp_path: Path) -> None:
    thought = {**ANSWER, key: "hm"}
    text, learned = encoded(tmp_path, {"messages": [USER, thought, USER, thought]})
    assert text == "<user>1+2?</s><assistant>it is 3</s><user>1+2?</s><assistant>[hm]it is 3</s>"
    assert learned == "it is 3</s>[hm]it is 3</s>"
    alone = {"role": "assistant", key: "hm"}
    assert encoded(tmp_path, {"messages": [USER, alone]})[1] == "[hm]</s>"


@pytest.mark.parametrize("silent", [{"role": "assistant", "content": None}, {"role": "user"}, {"role": "assistant"}])
def test_who_says_nothing_at_all_is_refused(silent: dict[str, Any], tmp_path: Path) -> None:
    assert "message 1" in fault(tmp_path, {"messages": [silent, ANSWER]})


def test_a_tool_may_answer_nothing(tmp_path: Path) -> None:
    call = {"role": "assistant", "tool_calls": [CALL]}
    text, _ = encoded(tmp_path, {"messages": [USER, call, {"role": "tool", "content": None}, ANSWER]})
    assert "<tool></s>" in text


@pytest.mark.parametrize("role", ["system", "developer"])
def test_roles_that_instruct(role: str, tmp_path: Path) -> None:
    record = {"messages": [{"role": role, "content": "be brief"}, USER, ANSWER]}
    assert encoded(tmp_path, record)[0].startswith(f"<{role}>be brief</s><user>")


def test_content_in_parts_of_text(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "1+", "image": None}, {"type": "text", "text": "2?"}]
    record = {"messages": [{"role": "user", "content": parts}, {**ANSWER, "content": [{"type": "text", "text": "3"}]}]}
    for template in (CHATML, PARTS):
        assert encoded(tmp_path, record, template) == ("<user>1+2?</s><assistant>3</s>", "3</s>")


def test_a_template_that_reads_parts_alone_is_given_parts(tmp_path: Path) -> None:
    record = {"messages": [USER, ANSWER, USER, ANSWER]}
    assert encoded(tmp_path, record, PARTS)[1] == "it is 3</s>it is 3</s>"


def test_parts_that_are_no_text_are_named(tmp_path: Path) -> None:
    picture = {"role": "user", "content": [{"type": "image", "image": "cat.png"}, {"type": "text", "text": "what?"}]}
    message = fault(tmp_path, {"messages": [picture, ANSWER]})
    assert "message 1" in message and "'image'" in message


@pytest.mark.parametrize("tools", [[{"name": "add"}], '[{"name": "add"}]', ['{"name": "add"}']], ids=str)
def test_tools_as_lists_and_as_json(tools: Any, tmp_path: Path) -> None:
    text, _ = encoded(tmp_path, {"messages": [USER, ANSWER], "tools": tools})
    assert text.startswith('<tools>{"name": "add"}</s><user>')


@pytest.mark.parametrize("tools", [[], "[]", None])
def test_no_tools_are_none(tools: Any, tmp_path: Path) -> None:
    template = "{% if tools is not none %}!{% endif %}" + CHATML
    assert encoded(tmp_path, {"messages": [USER, ANSWER], "tools": tools}, template)[0].startswith("<user>")


@pytest.mark.parametrize(
    ("record", "part"),
    [
        ({"messages": [USER, ANSWER], "tools": "add"}, "'tools'"),
        ({"messages": [USER, ANSWER], "tools": '{"name": '}, "'tools'"),
        ({"messages": [USER, {**ANSWER, "tool_calls": "add(1)"}]}, "'tool_calls'"),
        ({"messages": [USER, {**ANSWER, "tool_calls": [3]}]}, "'tool_calls'"),
        ({"messages": [USER, {**ANSWER, "tool_calls": 3}]}, "'tool_calls'"),
        ({"messages": [USER, ANSWER], "chat_template_kwargs": "fast"}, "'chat_template_kwargs'"),
        ({"messages": [USER, ANSWER], "chat_template_kwargs": {"tokenize": False}}, "'tokenize'"),
        ({"messages": [USER, {"role": "assistant", "content": {"text": "3"}}]}, "message 2"),
        ({"messages": [USER, {"role": "assistant", "content": 3}]}, "message 2"),
        ({"messages": [USER, {**ANSWER, "reasoning_content": "\ud800"}]}, "half of a character"),
        ({"messages": [USER, ANSWER], "tools": [{"name": "\ud800"}]}, "half of a character"),
    ],
    ids=lambda value: str(value)[:60].encode("ascii", "replace").decode(),
)
def test_what_cannot_be_meant_is_named(record: dict[str, Any], part: str, tmp_path: Path) -> None:
    assert part in fault(tmp_path, record)


def test_settings_of_the_template(tmp_path: Path) -> None:
    template = "{% if loud %}LOUD {% endif %}" + CHATML
    for given in ({"loud": True}, '{"loud": true}'):
        text, learned = encoded(tmp_path, {"messages": [USER, ANSWER], "chat_template_kwargs": given}, template)
        assert text.startswith("LOUD <user>") and learned == "it is 3</s>"


class TestExchanges:
    """Prompt and completion as lists of messages, as TRL takes them."""

    def test_the_completion_alone_is_learned(self, tmp_path: Path) -> None:
        record = {"prompt": [USER, ANSWER, USER], "completion": [ANSWER]}
        whole = "<user>1+2?</s><assistant>it is 3</s>" * 2
        assert encoded(tmp_path, record) == (whole, "it is 3</s>")

    def test_calls_in_a_completion(self, tmp_path: Path) -> None:
        call = {"role": "assistant", "tool_calls": [CALL]}
        record = {"prompt": [USER], "completion": [call, {"role": "tool", "content": "3"}, ANSWER], "tools": None}
        assert encoded(tmp_path, record) == (CALLED, LEARNED)

    def test_tools_and_settings_reach_the_template(self, tmp_path: Path) -> None:
        template = "{% if loud %}LOUD {% endif %}" + CHATML
        record = {"prompt": [USER], "completion": [ANSWER], "tools": '[{"name": "add"}]'}
        text, _ = encoded(tmp_path, {**record, "chat_template_kwargs": {"loud": True}}, template)
        assert text.startswith('LOUD <tools>{"name": "add"}</s>')

    @pytest.mark.parametrize(
        ("prompt", "completion", "part"),
        [
            ([USER], "it is 3", "list of messages in 'completion'"),
            ("1+2?", [ANSWER], "list of messages in 'prompt'"),
            ([], [ANSWER], "list of messages in 'prompt'"),
            ([USER], [], "list of messages in 'completion'"),
            ([USER], [USER], "a message of the role assistant in 'completion'"),
        ],
    )
    def test_halves_that_do_not_fit_are_named(self, prompt: Any, completion: Any, part: str, tmp_path: Path) -> None:
        assert part in fault(tmp_path, {"prompt": prompt, "completion": completion})

    def test_text_and_messages_are_two_formats(self, tmp_path: Path) -> None:
        path = tmp_path / "data.jsonl"
        records = [{"prompt": "a", "completion": "b"}, {"prompt": [USER], "completion": [ANSWER]}]
        path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
        with pytest.raises(DataError, match="line 2: .*as messages"):
            read_examples(read_jsonl(path))


def test_rows_of_a_data_set_in_which_every_message_has_every_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Arrow fills in nulls: in messages, in the arguments of calls, in the descriptions of tools."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    other = {"function": {"name": "half", "arguments": {"b": 2}}}
    tools = [{"name": "add", "parameters": {"a": {"type": "int"}}}, {"name": "half", "parameters": {"b": {}}}]
    rows = [
        {"messages": [USER, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "3"}, ANSWER]},
        {"messages": [USER, {"role": "assistant", "tool_calls": [other]}], "tools": tools},
        {"messages": [{"role": "user", "content": "hi", "name": "me"}, {**ANSWER, "reasoning_content": "hm"}]},
    ]
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "set" / "train.parquet")
    read = datasets.load_dataset(str(tmp_path / "set"), split="train")
    assert read[0]["messages"][0]["tool_calls"] is None, "or the test says nothing"
    tokenizer = tiny_tokenizer(chat_template=CHATML)
    found = encode_examples(load_examples([HubDataset(str(tmp_path / "set"))]), tokenizer, max_length=None).rows
    texts = [tokenizer.decode(row["input_ids"]) for row in found]
    assert texts[0] == CALLED
    assert '<call>half {"b": 2}</call>' in texts[1] and "null" not in texts[1]
    assert texts[2] == "<user>hi</s><assistant>[hm]it is 3</s>"


class TestWhereATurnEnds:
    """In templates that show an earlier turn otherwise, a turn's end is sought before the next one says anything."""

    # What is said gives way to calls, and only the last turn shows that it thinks.
    HIDING = (
        "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' and loop.last %}[thinks]{% endif %}"
        "{% if m.tool_calls %}<call>{{ m.tool_calls[0].function.name }}</call>{% else %}{{ m.content }}{% endif %}</s>"
        "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )

    def test_calls_in_every_place(self, tmp_path: Path) -> None:
        call, answer = {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "3"}
        messages = [USER, call, answer, call, answer, ANSWER, USER, call]
        text, learned = encoded(tmp_path, {"messages": messages}, self.HIDING)
        assert text.endswith("<user>1+2?</s><assistant>[thinks]<call>add</call></s>")
        assert learned == "<call>add</call></s>" * 2 + "it is 3</s>[thinks]<call>add</call></s>"

    def test_two_turns_of_the_assistant_in_a_row(self, tmp_path: Path) -> None:
        call = {"role": "assistant", "tool_calls": [CALL]}
        text, learned = encoded(tmp_path, {"messages": [USER, ANSWER, call, USER, ANSWER]}, self.HIDING)
        assert text == (
            "<user>1+2?</s><assistant>it is 3</s><assistant><call>add</call></s><user>1+2?</s>"
            "<assistant>[thinks]it is 3</s>"
        )
        assert learned == "it is 3</s><call>add</call></s>[thinks]it is 3</s>"

    def test_a_template_that_refuses_other_orders(self, tmp_path: Path) -> None:
        """Mistral's wants a tool's answer behind each call."""
        strict = (
            "{% for m in messages %}{% if m.role == 'tool' and not messages[loop.index0 - 1].tool_calls %}"
            "{{ raise_exception('a tool answers a call') }}{% endif %}{% endfor %}" + self.HIDING
        )
        call, answer = {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "3"}
        messages = [USER, ANSWER, USER, call, answer, call, answer, ANSWER]
        _, learned = encoded(tmp_path, {"messages": messages}, strict)
        assert learned == "it is 3</s>" + "<call>add</call></s>" * 2 + "[thinks]it is 3</s>"


PHI = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}[end]\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% else %}</s>{% endif %}"
)


@pytest.mark.parametrize("turns", [[USER, ANSWER], [USER, ANSWER, USER, ANSWER], [USER, ANSWER, USER]])
@pytest.mark.parametrize("mark", ["[end]\n", "[end]", ""])
def test_an_end_of_text_behind_any_conversation_is_no_part_of_earlier_turns(
    turns: list[dict[str, Any]], mark: str, tmp_path: Path
) -> None:
    _, learned = encoded(tmp_path, {"messages": turns}, PHI.replace("[end]\n", mark))
    answers = [f"it is 3{mark}" for turn in turns if turn is ANSWER]
    assert learned == "".join(answers) + ("</s>" if turns[-1] is ANSWER else "")
