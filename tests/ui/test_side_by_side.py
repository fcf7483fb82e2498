"""The page without a browser: who answers, what streams, what is shown of what was found."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from calmlm.answering import TextModel
from calmlm.cli import main
from calmlm.communication.looking import look
from calmlm.communication.trace import Attended, Heard, Trace
from calmlm.errors import DataError
from calmlm.ui.panels import connection_table, heat_map, token_table
from calmlm.ui.relay import Relay
from calmlm.ui.voices import augmenting_voices
from compositions import own, tiny_composition
from tiny import tiny_tokenizer
from tokenizers_tiny import tokenizer, with_beginning

gr = pytest.importorskip("gradio", reason="the page needs gradio")


def page_of(**options: Any) -> Any:
    from calmlm.ui.side_by_side import Page

    return Page(TextModel(tiny_composition(**options), tiny_tokenizer()), "tiny")


def test_all_answer_and_what_is_shown_is_what_was_found() -> None:
    page = page_of(null_key=True)
    text, prompt = page.text, "a [b] <i>"
    steps = list(page.ask(prompt, None, 6, False, 1, "augmenting 1 → 1", "mean of all heads"))
    assert steps[0][0] and not any(steps[0][1:3]) and len(steps) > 4  # it streams, one after another
    small, anchor, composed, _, tokens, added, trace, asked = steps[-1]
    pieces: dict[bool, list[str]] = {False: [], True: []}
    for alone, found in pieces.items():
        text.write(prompt, found.append, max_new_tokens=6, anchor_only=alone)
    assert composed == "".join(pieces[False]) and anchor == "".join(pieces[True]) != composed
    ids = torch.tensor([tiny_tokenizer()(prompt).input_ids])
    written = text.model.augmenting["augmenting"].generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert small == tiny_tokenizer().decode(written[0, ids.shape[1] :], skip_special_tokens=True)
    expected = look(text, prompt, max_new_tokens=6)
    assert trace.to_json() == expected.to_json()
    label = expected.attention[0].label
    assert page.heads == dict.fromkeys([one.label for one in expected.attention], len(expected.attention[0].weights))
    for chosen, weights in (("1", expected.attention[0].weights[1]), ("", expected.attention[0].weights.mean(0))):
        drawn = page.drawn(trace, label, chosen or "mean of all heads")
        assert drawn.count("<td") == weights.shape[0] * (weights.shape[1] + 1)
        assert f": {float(weights[2, 3]):.3f}" in drawn
    assert "&lt;" in page.drawn(trace, label, "0") and "<i>" not in page.drawn(trace, label, "0")
    assert (
        f"{expected.silenced['augmenting'][0]:+.2f}" in tokens and f"{max(expected.contributions[label]):.3f}" in added
    )
    drawn, update = page.chosen(trace, label, "99")
    assert update["value"] == "mean of all heads" and drawn == page.drawn(trace, label, update["value"])
    # The slider: the composition alone answers anew.
    *_, (again, note, *rest) = page.scaled(asked, 0, label, "0")
    assert again == anchor and "nothing is attended to" in note and rest == ["", "", None]
    *_, (half, _, _, _, found) = page.scaled(asked, 0.5, label, "0")
    assert found.scale == 0.5 and found.answer == half
    assert text.model.model.enabled and text.model.model.scale == 1
    assert list(page.scaled(None, 0.5, label, "0")) == []


def test_errors_are_shown_and_another_prompt_is_compared_with() -> None:
    page = page_of()
    with pytest.raises(gr.Error, match="write some"):
        list(page.ask(None, None, 4, False, 1, None, "0"))
    *_, last = page.ask("abc", " other ", 4, False, 1, None, "0")
    assert list(last[-2].swapped) == ["augmenting"] and "swapped" in last[-4]
    silent = page_of(connections="none", words="map")
    *_, last = silent.ask("abc", "", 4, False, 1, None, "0")
    assert not silent.heads and "words" in last[3] and "gate, augmenting words" in last[4]


def test_an_augmenting_model_answers_behind_its_own_opening(tmp_path: Any) -> None:
    theirs = with_beginning(tokenizer("bytes-large"))
    model = tiny_composition("llama", "mistral", **own("bytes-large"), augmenting_prefix="12 dogs")
    text = TextModel(model, tiny_tokenizer())
    model.augmenting["augmenting"].name_or_path = ""
    assert augmenting_voices(text) == []  # nobody knows its tokenizer
    theirs.save_pretrained(tmp_path)
    model.augmenting["augmenting"].name_or_path = str(tmp_path)
    (voice,) = augmenting_voices(text)
    found: list[str] = []
    new = voice.write("the quick", found.append, max_new_tokens=5, templated=False)
    entry = model.config.augmenting["augmenting"]
    ids = [*entry["beginning"], *entry["prefix"], *theirs("the quick", add_special_tokens=False).input_ids]
    alone = model.augmenting["augmenting"].generate(
        torch.tensor([ids]), max_new_tokens=5, do_sample=False, pad_token_id=0
    )
    assert new == alone[0, len(ids) :].tolist() and "".join(found) == theirs.decode(new, skip_special_tokens=True)
    with pytest.raises(DataError, match="'augmenting'"):
        voice.write("the quick fox " * 99, found.append, max_new_tokens=5, templated=False)
    theirs = voice.tokenizer
    theirs.chat_template = "{% for m in messages %}{% for p in m['content'] %}{{ p['text'] }}{% endfor %}{% endfor %}"
    asked = theirs("12 dogs", add_special_tokens=False).input_ids  # such a template leaves out what comes as text
    alone = model.augmenting["augmenting"].generate(
        torch.tensor([asked]), max_new_tokens=5, do_sample=False, pad_token_id=0
    )
    assert voice.write("12 dogs", found.append, max_new_tokens=5, templated=True) == alone[0, len(asked) :].tolist()
    theirs.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(DataError, match="the prompt: expected messages that the tokenizer's chat template accepts"):
        voice.write("12 dogs", found.append, max_new_tokens=5, templated=True)


def test_who_goes_away_ends_the_writing() -> None:
    written: list[int] = []
    ended = threading.Event()

    def write(emit: Callable[[str], None]) -> int:
        try:
            for index in range(10_000):
                written.append(index)
                emit("x")
                time.sleep(0.001)
        finally:
            ended.set()
        return len(written)

    texts = iter(Relay(write))
    assert next(texts) == "x" and next(texts) == "xx"
    texts.close()  # type: ignore[attr-defined]
    assert ended.is_set() and len(written) < 5_000

    def broken(emit: Callable[[str], None]) -> None:
        emit("a")
        raise KeyError("broken")

    texts = iter(Relay(broken))
    assert next(texts) == "a"
    with pytest.raises(KeyError):
        next(texts)
    whole = Relay(lambda emit: [emit(part) for part in "ab"] and 7)
    assert list(whole) == ["a", "ab"] and whole.result == 7


def test_panels_escape_and_mark() -> None:
    weights = torch.tensor([[[0.25, 0.0], [0.0, 0.75]], [[0.5, 0.0], [0.0, 0.0]]])
    trace = Trace(
        "p", "ab", ["<b>", '"'], 1.0, [-1.0, 0.001], [-2.0, -3.0],
        {"one": Heard(["<script>", "x"], [True, False])}, [Attended("one", (0, 1), weights, None)],
        {"one pointer": [0.5, 0.0]}, {}, {"one": [-4.0, 2.0]},
    )  # fmt: skip
    drawn = heat_map(trace, "one 0 → 1", 0)
    assert "<script>" not in drawn and "&lt;script&gt;" in drawn and 'class="past">x' in drawn
    assert "rgba(37, 99, 235, 1.000)" in drawn and "rgba(37, 99, 235, 0.333)" in drawn  # 0.75 and 0.25
    assert "weight is 0.38" in heat_map(trace, "one 0 → 1", None)
    assert "nothing" in heat_map(trace, "another", None)
    tokens = token_table(trace)
    assert "-4.00" in tokens and "rgba(234, 88, 12, 1.000)" in tokens and "gate, one pointer" in tokens
    assert "<b>" not in tokens and "No connection" in connection_table(trace)


def test_a_place_that_is_taken(anchor_folder: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["ui", "nowhere", "--port", str(taken.getsockname()[1])]) == 2
    assert "choose another" in capsys.readouterr().err
    assert main(["ui", str(anchor_folder), "--port", "0"]) == 2
    assert "error: " in capsys.readouterr().err
