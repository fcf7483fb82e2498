"""The world of languages: who knows what, and what D_C leaves out."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from calmlm.comparison.domains.languages import Languages
from calmlm.experiments.kv_arithmetic.world import PHRASINGS, Example, final_answer
from calmlm.experiments.languages.presets import PRESETS
from calmlm.experiments.languages.tokenizer import build_tokenizer
from calmlm.experiments.languages.words import number_words, plain
from calmlm.experiments.languages.world import World


@pytest.fixture(scope="module")
def world() -> World:
    return World(PRESETS["small"], 0)


def operands(prompt: str) -> list[str]:
    """The operands of a prompt, by the phrasing that fits."""
    for phrasing in [*PHRASINGS.values()]:
        for sign in (phrasing.plus, phrasing.minus):
            start = f"{phrasing.start} " if phrasing.start else ""
            match = re.fullmatch(f"{re.escape(start)}(.+?){re.escape(sign)} (.+?){re.escape(phrasing.end)}", prompt)
            if match and not (phrasing.start == "" and ":" in prompt):
                return list(match.groups())
    return []


def test_number_words_are_the_languages_own() -> None:
    assert number_words("cy", 3) == ["un", "dau", "tri"]
    assert number_words("de", 21)[20] == "einundzwanzig"
    assert plain("Twenty-One") == "twenty one"


def test_answers_are_right(world: World) -> None:
    rng = world.rng("test")
    for language in world.languages:
        for _ in range(50):
            example = world.item(rng, language)
            first, second = operands(example.prompt)
            a, b = (world.words[language].index(word) + 1 for word in (first, second))
            assert final_answer(example.completion) in (str(a + b), str(a - b))


def test_d_c_shows_no_word_that_is_asked_for(world: World) -> None:
    rng = world.rng("test")
    seen = " ".join(f" {world.composed(rng).prompt} " for _ in range(8000))
    for language in world.preset.low:
        assert len(world.unseen_words[language]) >= 10
        for value in world.unseen_words[language]:
            word = world.words[language][value - 1]
            # A word may stand inside a longer one of D_C ("on" in "on bir"); alone as an operand it does not.
            alone = re.search(rf"(?:^|[^\w] ?|Compute |is |of |plus |minus |less ){word}(?: [+-]| =| ->| is|\.)", seen)
            whole = alone is not None and any(word == other for other in operands(alone[0]))
            assert not whole


def test_m_b_never_reads_a_low_resource_language(world: World) -> None:
    rng = world.rng("test")
    known = {w for language in world.preset.high for w in (*world.words[language], *world.terms[language])}
    low = {w for language in world.preset.low for w in world.words[language]} - known
    for _ in range(4000):
        example = world.general(rng)
        assert not low & set(operands(example.prompt))


def test_m_a_never_calculates(world: World) -> None:
    rng = world.rng("test")
    for _ in range(2000):
        example = world.specialist(rng)
        assert "=" not in example.completion
        assert example.completion == "" or example.prompt.startswith("translate ")


def test_the_tokenizer_gives_every_text_back(world: World) -> None:
    words = [w for known in (world.words, world.terms) for texts in known.values() for w in texts]
    tokenizer = build_tokenizer([*words, *world.pieces, "translate"], 60)
    rng = world.rng("test")
    for draw in (world.specialist, world.general, world.composed):
        for _ in range(300):
            for text in (lambda e: (e.prompt, e.completion))(draw(rng)):
                ids = tokenizer(text).input_ids
                assert tokenizer.unk_token_id not in ids
                assert tokenizer.decode(ids, skip_special_tokens=True).strip() == text


def test_the_cascade_pastes_what_m_a_is_sure_of(tmp_path) -> None:  # type: ignore[no-untyped-def]
    domain = Languages(PRESETS["tiny"], 0, tmp_path, lambda line: None)
    asked: list[list[str]] = []

    class Known(Languages):
        def values(self, words: list[str]) -> dict[str, str]:
            asked.append(words)
            return {"tri deg": "30", "un": "1"}

    domain.__class__ = Known
    pasted: list[str] = []
    domain.__dict__["anchor"], domain.__dict__["augmenting"] = "anchor", "augmenting"
    domain.answerer = lambda model: (  # type: ignore[method-assign]
        lambda prompts, tokens=None: (pasted.extend(prompts) if model == "anchor" else None) or [model] * len(prompts)
    )
    prompts = ["Compute tri deg + un. Result:", "The value of un minus zwei is", "translate ffrainc :"]
    assert domain.cascade()(prompts) == ["anchor", "anchor", "augmenting"]
    assert pasted[:2] == ["Compute 30 + 1. Result:", "The value of 1 minus zwei is"]
    assert set(asked[0]) >= {"tri deg", "un", "zwei"}


def test_scores_are_of_the_items(tmp_path) -> None:  # type: ignore[no-untyped-def]
    domain = Languages(PRESETS["tiny"], 0, tmp_path, lambda line: None)
    right = {e.prompt: e.completion for items in domain.items.values() for e in items}
    scores = domain.score(lambda prompts, tokens=None: [right[p] for p in prompts], None)
    assert set(scores) == set(Languages.tasks_of(PRESETS["tiny"]))
    assert all(min(values) > 0.99 for values in scores.values())
    none = domain.score(lambda prompts, tokens=None: ["" for _ in prompts], None)
    assert all(max(values) < 0.01 for values in none.values())
    assert isinstance(domain.items["translation_low"][0], Example)


def test_terms_of_the_evaluation_are_spelled_as_no_term_that_was_shown(tmp_path: Path) -> None:
    domain = Languages(PRESETS["small"], 0, tmp_path, print)
    shown = {f"translate {term} :" for term in domain.world.shown_terms}
    asked = {item.prompt for item in domain.items["translation_low"]}
    assert len(asked) > 50 and not asked & shown
    rng = domain.world.rng("composition")
    assert not asked & {domain.world.composed(rng).prompt for _ in range(3000)}
