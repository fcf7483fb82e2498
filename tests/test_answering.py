"""Text from a composition: it ends where a context ends, in whichever model's tokens, and nothing of it is lost."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

import calmlm
from calmlm.answering import TextModel
from calmlm.cli import main
from calmlm.data.context import OwnContext, own_contexts
from calmlm.errors import DataError
from compositions import awaken, greedy_without_cache
from tiny import tiny_model, tiny_tokenizer
from tokenizers_tiny import tokenizer

PROMPT = "hello world"


def text_model(length: int, alignment: str = "transcode", **options: Any) -> TextModel:
    """An anchor that goes on for long, and an augmenting model with so many positions for letters."""
    ours, theirs = tokenizer("bytes-large"), tokenizer("characters")
    anchor = tiny_model("llama", vocab_size=len(ours), max_position_embeddings=512)
    anchor.generation_config.eos_token_id = None
    sizes = {"n_positions": length, "max_position_embeddings": length}
    small = tiny_model("gpt2", seed=3, vocab_size=len(theirs), **sizes)
    model = calmlm.compose(
        anchor, small, 2, tokenizer=ours, augmenting_tokenizer=theirs, alignment=alignment, **options
    )
    return TextModel(awaken(model).eval(), ours)


def written(text: TextModel, prompt: str = PROMPT, count: int = 100, **options: Any) -> tuple[str, list[str]]:
    pieces: list[str] = []
    told: list[str] = []
    text.write(prompt, pieces.append, max_new_tokens=count, tell=told.append, **options)
    return "".join(pieces), told


def expected(text: TextModel, prompt: str = PROMPT) -> str:
    """Everything that can be written: tokens one by one until the text does not fit into the augmenting model."""
    ids = torch.tensor([text.tokenizer(prompt).input_ids])
    while True:
        try:
            ids = greedy_without_cache(text.model, ids, 1)
        except DataError:
            return text.tokenizer.decode(ids[0, len(text.tokenizer(prompt).input_ids) :], skip_special_tokens=True)


@pytest.mark.filterwarnings("ignore:The augmenting tokenizer has tokens that reach across")
@pytest.mark.parametrize("alignment", ["transcode", "retokenize"])
@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 1}], ids=["greedy", "sampled"])
def test_a_text_ends_where_an_augmenting_models_positions_end(alignment: str, options: dict[str, Any]) -> None:
    text = text_model(30, alignment)
    found, told = written(text, **options)
    assert len(text.tokenizer(PROMPT + found).input_ids) > 4
    assert told == ["The text stops where the context of the augmenting model 'augmenting' ends, 30 of its own tokens."]
    if not options:
        assert found == expected(text)


def test_a_text_that_fits_ends_without_a_word() -> None:
    text = text_model(64)
    assert written(text, count=2)[1] == []
    found, told = written(text, anchor_only=True, count=60)
    assert told == [] and len(found) > 60


def test_the_anchors_own_context_is_told_of() -> None:
    text = text_model(4000)
    found, told = written(text, "h" * 500)
    assert found and told == ["The text stops where the context ends, 512 tokens."]


def test_a_long_prompt_is_counted_in_the_augmenting_models_tokens() -> None:
    text = text_model(16)
    with pytest.raises(DataError, match=r"'augmenting', 16 of its own tokens, but it takes 23; shorten it"):
        written(text, "hello world hello world")
    assert written(text, "hello world hello world", anchor_only=True)[0]


def test_models_with_the_fewest_positions_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several augmenting models: one with the anchor's tokens that drafts, two with tokens of their own."""
    ours, theirs = tokenizer("bytes-large"), tokenizer("characters")
    anchor = tiny_model("llama", vocab_size=len(ours), max_position_embeddings=512)
    anchor.generation_config.eos_token_id = None
    drafter = tiny_model("mistral", seed=2, vocab_size=len(ours), max_position_embeddings=512)
    wide, narrow = (
        tiny_model("gpt2", seed=seed, vocab_size=len(theirs), n_positions=n, max_position_embeddings=n)
        for seed, n in ((3, 90), (4, 40))
    )
    own = dict.fromkeys(("wide", "narrow"), theirs)
    model = calmlm.compose(
        anchor,
        {"drafter": drafter, "wide": wide, "narrow": narrow},
        2,
        tokenizer=ours,
        augmenting_tokenizer={"drafter": ours, **own},
    )
    text = TextModel(awaken(model, scale=0.3).eval(), ours)
    plain = written(text)
    assert plain[0] == expected(text) and "'narrow'" in plain[1][0]
    assert written(text, drafting=True) == plain
    model.disable_augmenting("narrow")
    longer = written(text)
    assert longer[0] == expected(text) and "'wide'" in longer[1][0]


def test_a_model_that_reads_prompts_counts_prompts_alone() -> None:
    ours = tiny_tokenizer()
    anchor = tiny_model("llama", max_position_embeddings=100)
    anchor.generation_config.eos_token_id = None
    small = tiny_model("gpt2", seed=3, n_positions=12, max_position_embeddings=12)
    text = TextModel(awaken(calmlm.compose(anchor, small, 2, refresh=False)).eval(), ours)
    found, told = written(text, "a" * 12, 40)
    assert len(found) > 20 and told == []
    with pytest.raises(DataError, match="at most 12 tokens, the context of an augmenting model that reads it"):
        written(text, "a" * 13)


def test_what_was_written_before_an_error_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """The streamer holds the last word back until the next one begins."""
    text, pieces = text_model(4000), []
    whole = written(text, count=8)[0]
    calls = []
    forward = text.model.forward

    def stopped(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) > 8:
            raise KeyboardInterrupt
        return forward(*args, **kwargs)

    monkeypatch.setattr(text.model, "forward", stopped)
    with pytest.raises(KeyboardInterrupt):
        text.write(PROMPT, pieces.append, max_new_tokens=20)
    assert "".join(pieces) == whole


def test_the_command_says_it_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = text_model(30)
    for name, model, given in (
        ("anchor", text.model.anchor, text.tokenizer),
        ("small", text.model.augmenting["augmenting"], tokenizer("characters")),
    ):
        model.save_pretrained(tmp_path / name)
        given.save_pretrained(tmp_path / name)
    model = calmlm.compose(str(tmp_path / "anchor"), str(tmp_path / "small"), 2)
    model.save_pretrained(tmp_path / "composition")
    capsys.readouterr()
    assert main(["generate", str(tmp_path / "composition"), "--prompt", PROMPT, "--device", "cpu"]) == 0
    shown = capsys.readouterr()
    assert len(shown.out) > 5
    last = shown.err.replace("\r", "\n").splitlines()[-1]
    assert last == "The text stops where the context of the augmenting model 'augmenting' ends, 30 of its own tokens."


def test_a_text_model_goes_to_other_processes() -> None:
    text = text_model(30, "retokenize")
    again = pickle.loads(pickle.dumps(text))
    assert written(again) == written(text)
    assert pickle.loads(pickle.dumps(own_contexts(text.model)[0])).length == 30


@pytest.mark.filterwarnings("ignore:The augmenting tokenizer has tokens that reach across")
def test_counting_in_steps_is_counting_at_once() -> None:
    for alignment in ("transcode", "retokenize"):
        (context,) = own_contexts(text_model(30, alignment).model)
        assert isinstance(context, OwnContext)
        ids = tokenizer("bytes-large")("hello world 😀 naïve café, 12 + 34 = 46 你好").input_ids
        steps = sum(context.count(ids[: place + 1], place) for place in range(len(ids)))
        assert steps == context.count(ids)
        room = context.readable(ids)
        assert context.count(ids[:room]) <= 30 < context.count(ids[: room + 1])


def test_a_chat_template_that_refuses_a_prompt() -> None:
    text = text_model(64)
    text.tokenizer.chat_template = "{{ raise_exception('say the language') }}"
    try:
        with pytest.raises(DataError, match=r"the prompt: expected messages .* it refused them \(say the"):
            written(text, apply_chat_template=True)
    finally:
        text.tokenizer.chat_template = None
