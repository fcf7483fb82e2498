"""What augmenting models understand inside a composition, against slow references; what is spoiled is warned of."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import calmlm
from calmlm.cli import main
from calmlm.communication import Communication, Listening, listen
from calmlm.communication.ear import Ear
from calmlm.communication.excerpts import Excerpt
from calmlm.tokens.spelling import token_bytes
from compositions import awaken
from tiny import tiny_model
from tokenizers_tiny import tokenizer, with_beginning

TEXTS = [
    ("the cat is", " a fox."),
    ("12 + 34 =", " 46 dogs"),
    ("hello", " world, the quick fox"),
    ("naïve", " café 😀"),
]


def composed(ours: Any, theirs: Any, **options: Any) -> calmlm.CalmForCausalLM:
    anchor = tiny_model("llama", seed=1, vocab_size=len(ours))
    own = tiny_model("qwen2", seed=2, vocab_size=len(theirs))
    return awaken(calmlm.compose(anchor, own, 2, tokenizer=ours, augmenting_tokenizer=theirs, **options))


def rows_of(ours: Any) -> list[dict[str, list[int]]]:
    rows = []
    for prompt, completion in TEXTS:
        before = ours(prompt, add_special_tokens=False).input_ids
        ids = [*before, *ours(completion, add_special_tokens=False).input_ids, ours.eos_token_id]
        rows.append({"input_ids": ids, "labels": [-100] * len(before) + ids[len(before) :]})
    return rows


@torch.no_grad()
def bits(model: Any, pairs: list[tuple[list[int], list[int]]], size: int) -> float:
    """Bits per byte of the second part of each row, one row and one token at a time."""
    total = 0.0
    for before, after in pairs:
        logits = model(input_ids=torch.tensor([[*before, *after]])).logits[0].log_softmax(-1)
        total -= sum(float(logits[len(before) + k - 1, index]) for k, index in enumerate(after))
    return total / size / math.log(2)


@pytest.mark.parametrize("alignment", ["own", "transcode"])
def test_figures_equal_slow_references(alignment: str) -> None:
    ours, theirs = tokenizer("bytes"), with_beginning(tokenizer("bytes-large"))
    model = composed(ours, theirs, alignment=alignment)
    found = listen(model, ours, rows_of(ours), augmenting_tokenizers={"augmenting": theirs})
    size = sum(len(completion.encode()) for _, completion in TEXTS)

    def pairs(tok: Any, opening: list[int], swap: int = 0) -> list[tuple[list[int], list[int]]]:
        prompts = [prompt for prompt, _ in TEXTS]
        prompts = [*prompts[swap:], *prompts[:swap]]
        return [
            ([*opening, *tok(p, add_special_tokens=False).input_ids], tok(c, add_special_tokens=False).input_ids)
            for p, (_, c) in zip(prompts, TEXTS, strict=True)
        ]

    anchor = bits(model.anchor, pairs(ours, []), size)
    opening = [theirs.bos_token_id]
    alone = bits(model.augmenting["augmenting"], pairs(theirs, opening), size)
    other = bits(model.augmenting["augmenting"], pairs(theirs, opening, 1), size)
    heard = found.augmenting["augmenting"]
    assert found.rows == len(TEXTS)
    assert found.anchor == pytest.approx(anchor, rel=1e-4)
    assert found.composition == pytest.approx(bits(model, pairs(ours, []), size), rel=0.2)
    assert heard.alone == pytest.approx(alone, rel=1e-4)
    assert heard.gain == pytest.approx(other - alone, abs=1e-3)
    assert found.anchor_gain == pytest.approx(bits(model.anchor, pairs(ours, [], 1), size) - anchor, abs=1e-3)
    if alignment == "own":
        assert heard.inside == pytest.approx(heard.alone, rel=1e-4)
    else:
        assert heard.inside is not None
        assert heard.inside != pytest.approx(heard.alone, rel=1e-3)


@pytest.mark.parametrize("alignment", ["own", "transcode", "tokens"])
def test_the_pairing_gain_is_what_another_prompt_costs(alignment: str) -> None:
    """The anchor reads each row as it is, the augmenting model the next row's prompt; one row at a time."""
    ours = tokenizer("bytes")
    theirs = ours if alignment == "tokens" else with_beginning(tokenizer("bytes-large"))
    model = composed(ours, theirs, alignment="own" if alignment == "tokens" else alignment)
    found = listen(model, ours, rows_of(ours), augmenting_tokenizers={"augmenting": theirs})
    parts = [[ours(part, add_special_tokens=False).input_ids for part in text] for text in TEXTS]
    costs: list[list[float]] = []
    for (prompt, completion), (other, _) in zip(parts, [*parts[1:], parts[0]], strict=True):
        width = max(len(prompt), len(other))
        ids, theirs_ids = ([0] * (width - len(part)) + part + completion for part in (prompt, other))
        masks = [[0] * (width - len(part)) + [1] * (len(part) + len(completion)) for part in (prompt, other)]
        told = torch.arange(len(ids))[None] < width
        given = {"input_ids": torch.tensor([theirs_ids]), "attention_mask": torch.tensor(masks[1:])}
        costs.append([])
        for swap in ({}, {"augmenting_inputs": {"augmenting": given}}):
            with torch.no_grad():
                logits = model(torch.tensor([ids]), attention_mask=torch.tensor(masks[:1]), prompt_mask=told, **swap)
            likely = logits.logits[0].log_softmax(-1)
            costs[-1].append(-sum(float(likely[width + k - 1, index]) for k, index in enumerate(completion)))
    size = sum(len(completion.encode()) for _, completion in TEXTS)
    right, other = (sum(cost[k] for cost in costs) / size / math.log(2) for k in (0, 1))
    assert abs(other - right) > 0.01
    assert found.swapped == pytest.approx(other, rel=1e-4)
    assert found.pairing_gain is not None
    assert found.pairing_gain[0] == pytest.approx(other - right, abs=1e-3)
    assert found.pairing_gain[1] < found.pairing_gain[0] < found.pairing_gain[2]
    assert any(title == "composition, another prompt read" for title, _ in found.lines())


@pytest.mark.parametrize("short", ["anchor", "augmenting"])
def test_another_prompt_is_cut_where_a_context_ends(short: str) -> None:
    """Each row fits by itself, the long completion behind the long prompt does not."""
    ours, theirs = tokenizer("bytes"), tokenizer("characters")
    sizes = {"anchor": 512, "augmenting": 512} | {short: 60}
    anchor, own = (
        tiny_model("gpt2", seed=seed, vocab_size=len(tok), n_positions=size, max_position_embeddings=size)
        for seed, tok, size in ((1, ours, sizes["anchor"]), (2, theirs, sizes["augmenting"]))
    )
    model = awaken(calmlm.compose(anchor, own, 2, tokenizer=ours, augmenting_tokenizer=theirs))
    many, few = "12 + 34 = 46 lazy dogs. " * 2, "a fox"
    parts = [[ours(text, add_special_tokens=False).input_ids for text in row] for row in ((few, many), (many, few))]
    rows = [{"input_ids": [*p, *c], "labels": [-100] * len(p) + c} for p, c in parts]
    found = listen(model, ours, rows, augmenting_tokenizers={"augmenting": theirs})
    assert found.pairing_gain is not None and found.augmenting["augmenting"].gain is not None
    size = len(many) + len(few)
    if short == "anchor":
        (short_prompt, long_part), (long_prompt, short_part) = parts
        room = 60 - len(long_part)
        assert 0 < room < len(long_prompt)
        cut = [(long_prompt[-room:], long_part), (short_prompt, short_part)]
        right = bits(model.anchor, [(p, c) for p, c in parts], size)
        assert found.anchor_gain == pytest.approx(bits(model.anchor, cut, size) - right, abs=1e-4)


def test_a_composition_that_hears_nothing_is_warned_of() -> None:
    ours = tokenizer("bytes")
    size = {"vocab_size": len(ours)}
    model = calmlm.compose(tiny_model("llama", seed=1, **size), tiny_model("qwen2", seed=2, **size), 2)
    untrained = listen(model, ours, rows_of(ours))
    assert untrained.pairing_gain is None and not any("Nothing is shown" in line for line in untrained.warnings())
    silent = Communication(4, 1.5, 1.4, 0.1, 0.5, swapped=1.4, pairing_gain=(0.0, -0.01, 0.01))
    (warning,) = silent.warnings()
    assert "0.000 (-0.010 to 0.010)" in warning
    model = awaken(calmlm.compose(tiny_model("llama", seed=1, **size), tiny_model("gpt2", **size), 2, refresh=False))
    assert listen(model, ours, rows_of(ours)).pairing_gain is None


def test_a_model_that_shares_the_ids_is_heard_as_it_is_alone() -> None:
    ours = tokenizer("bytes")
    model = composed(ours, ours)
    heard = listen(model, ours, rows_of(ours)).augmenting["augmenting"]
    assert heard.inside == pytest.approx(heard.alone, rel=1e-4)


@pytest.mark.parametrize("alignment", ["own", "transcode", "retokenize"])
def test_what_was_heard_is_not_measured_again(alignment: str) -> None:
    ours, theirs = tokenizer("bytes"), with_beginning(tokenizer("bytes-large"))
    model = composed(ours, theirs, alignment=alignment)
    whole, few = (
        listen(model, ours, rows_of(ours), others=others, augmenting_tokenizers={"augmenting": theirs})
        for others in (None, 2)
    )
    assert few.augmenting["augmenting"].alone == pytest.approx(whole.augmenting["augmenting"].alone, rel=1e-4)
    assert few.augmenting["augmenting"].inside == pytest.approx(whole.augmenting["augmenting"].inside, rel=1e-6)
    assert few.anchor == pytest.approx(whole.anchor, rel=1e-6)


def test_what_was_heard_is_believed_only_where_it_is_confirmed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that hears its own tokens and is run otherwise inside the composition, here with another head."""
    ours, theirs = tokenizer("bytes"), with_beginning(tokenizer("bytes-large"))
    model = composed(ours, theirs)
    given: dict[str, Any] = {"others": 2, "augmenting_tokenizers": {"augmenting": theirs}}
    right = listen(model, ours, rows_of(ours), **given).augmenting["augmenting"]
    heard = Ear._run

    def colder(self: Ear, *args: Any, **options: Any) -> None:
        head = self.base.get_output_embeddings().weight.data
        head.mul_(0.5)
        heard(self, *args, **options)
        head.mul_(2)

    monkeypatch.setattr(Ear, "_run", colder)
    found = listen(model, ours, rows_of(ours), **given).augmenting["augmenting"]
    assert found.alone == pytest.approx(right.alone, rel=1e-4)
    assert found.inside != pytest.approx(right.inside, rel=0.02)


@pytest.mark.parametrize("awake", [True, False])
def test_an_untrained_composition_needs_one_pass_of_the_anchor(awake: bool) -> None:
    ours = tokenizer("bytes")
    anchor, own = (tiny_model(family, seed=1, vocab_size=len(ours)) for family in ("llama", "qwen2"))
    model = calmlm.compose(anchor, own, 2)
    if awake:
        awaken(model)
    seen: list[int] = []
    anchor.register_forward_hook(lambda _, __, output: seen.append(len(output.logits)))
    own_seen: list[int] = []
    own.register_forward_hook(lambda _, __, output: own_seen.append(len(output.logits)))
    found = listen(model, ours, rows_of(ours), others=2)
    # The composition, the anchor, the anchor behind other rows' prompts, the composition whose m_A reads these; of m_A
    # what is heard, two rows, two others.
    assert sum(seen) == (4 + 4 + 2 + 2 if awake else 4 + 2)
    assert sum(own_seen) == 4 + 2 + 2
    completions = sum(len(completion.encode()) for _, completion in TEXTS)
    tokens = [(row["input_ids"][:-1], row["labels"].count(-100)) for row in rows_of(ours)]
    expected = bits(anchor, [(ids[:start], ids[start:]) for ids, start in tokens], completions)
    assert found.anchor == pytest.approx(expected, rel=1e-4)
    assert (found.composition == found.anchor) is not awake


def test_what_is_spoiled_and_what_is_silent_is_warned_of() -> None:
    healthy = Listening(alone=1.0, inside=1.02, gain=0.4, tokens_per_byte=0.3)
    assert Communication(4, 1.5, 1.4, 0.1, 0.5, {"a": healthy}).warnings() == []
    spoiled = Listening(alone=1.0, inside=1.2, gain=0.4, tokens_per_byte=0.3)
    (warning,) = Communication(4, 1.5, 1.4, 0.1, 0.5, {"a": spoiled}).warnings()
    assert "1.200" in warning
    assert "alignment='own'" in warning
    silent = Listening(alone=1.0, inside=1.0, gain=0.1, tokens_per_byte=0.3)
    (warning,) = Communication(4, 1.5, 1.4, 0.3, 0.5, {"a": silent}).warnings()
    assert "nothing to communicate" in warning


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours, theirs = tokenizer("bytes"), with_beginning(tokenizer("bytes-large"))
    for name, family, tok in (("anchor", "llama", ours), ("augmenting", "qwen2", theirs)):
        tiny_model(family, vocab_size=len(tok)).save_pretrained(tmp_path / name)
        tok.save_pretrained(tmp_path / name)
    model = awaken(calmlm.compose(tmp_path / "anchor", tmp_path / "augmenting", 2, alignment="own"))
    model.save_pretrained(tmp_path / "composition")
    lines = [json.dumps({"prompt": prompt, "completion": completion}) for prompt, completion in TEXTS]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    given = ["inspect", str(tmp_path / "composition"), "--text", str(tmp_path / "rows.jsonl")]
    assert main([*given, "--output", str(tmp_path / "found.json")]) == 0
    printed = capsys.readouterr().out
    assert "behind 1 token of its own" in printed
    assert "augmenting, inside" in printed
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))["results"]
    assert found["augmenting"]["augmenting"]["inside"] == pytest.approx(
        found["augmenting"]["augmenting"]["alone"], 1e-4
    )
    assert main([*given[:-1], str(tmp_path / "none.jsonl")]) == 2


@pytest.mark.parametrize("kind", ["bytes", "unigram"])
def test_the_mark_that_ends_a_turn_is_no_text(kind: str) -> None:
    ours = tokenizer(kind)
    pieces, end = token_bytes(ours, "anchor"), ours.eos_token_id

    def ids(text: str) -> list[int]:
        return list(ours(text, add_special_tokens=False).input_ids)

    before, said, line = ids("12 + 34 ="), ids(" 46 dogs"), ids("\n")
    follows = ids("hello")
    for behind in ([], [end], [end, *line], [end, end]):
        for more in ([], follows):
            row = [*before, *said, *behind, *more]
            labels = [-100] * len(before) + [*said, *behind] + [-100] * len(more)
            found = Excerpt.of({"input_ids": row, "labels": labels}, pieces, ours)
            assert found is not None and found.ids == [*before, *said], (behind, more)
    ended = [*before, *said, *line]
    found = Excerpt.of({"input_ids": ended, "labels": [-100] * len(before) + ended[len(before) :]}, pieces, ours)
    assert found is not None and found.ids == ended, "white space that no mark comes before is text"
