"""The restricted Python: functions do what their steps do, and judging runs them."""

from __future__ import annotations

import math
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from calmlm.comparison.domains.code import Code
from calmlm.experiments.code.judging import inputs_of, is_right, program
from calmlm.experiments.code.operations import OPERATIONS, Function, sample_function
from calmlm.experiments.code.presets import PRESETS
from calmlm.experiments.code.world import World, passages


def by_steps(function: Function, value: object) -> object:
    """The slow way: one operation after the other."""
    for operation, parameter in function.steps:
        text = operation.code.replace("{x}", "x").replace("{k}", parameter).replace("{c}", parameter)
        value = eval(text, {"x": value})
    return value


def test_a_function_is_its_steps_in_a_row() -> None:
    rng = random.Random(0)
    pairs = set()
    for _ in range(6000):
        function = sample_function(rng, OPERATIONS)
        pairs.add(tuple(operation.name for operation, _ in function.steps))
        space: dict[str, object] = {}
        exec(function.code, space)
        made = space[function.name]
        for value in inputs_of(function.takes):
            assert made(value) == by_steps(function, value), function.code  # type: ignore[operator]
    assert len(pairs) > 300


def test_names_and_descriptions_are_filled_in() -> None:
    rng = random.Random(0)
    names = {}
    for _ in range(3000):
        function = sample_function(rng, OPERATIONS)
        text = function.name + function.description(rng)
        assert "{" not in text and function.name.isidentifier()
        assert names.setdefault(function.name, function.expression) == function.expression


def drawn(name: str) -> Function:
    rng = random.Random(0)
    operation = next(operation for operation in OPERATIONS if operation.name == name)
    while True:
        function = sample_function(rng, OPERATIONS, [operation])
        if len(function.steps) == 1:
            return function


def test_judging_goes_by_what_the_code_does() -> None:
    function = drawn("sort")
    assert is_right("def f(numbers): return sorted(numbers)", function)
    assert is_right("def g(x): return list(sorted(x)) # other words\nrubbish after the line", function)
    for wrong in (
        "def f(x): return x",
        "def f(x): return sorted(x",
        "sorted(x)",
        "",
        "def f(x): raise SystemExit(0)",
        "def f(x): return f(x)",
        "def f(x): import os; os._exit(0)",
    ):
        assert not is_right(wrong, function), wrong


def test_judging_stops_what_does_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    from calmlm.experiments.code import judging

    monkeypatch.setattr(judging, "run_python", lambda text, seconds: __import__("subprocess") and _short(text))
    assert not judging._passes.__wrapped__(program("def f(x): return [1 for _ in iter(int, 1)]", drawn("sort")))


def _short(text: str) -> object:
    from calmlm.evaluation.sandbox import run_python

    return run_python(text, seconds=1.0)


def test_d_c_shows_some_functions_only() -> None:
    world, other = World(PRESETS["small"], 0), World(PRESETS["small"], 1)
    rng = world.rng("test")
    functions = [sample_function(rng, OPERATIONS) for _ in range(4000)]
    share = sum(world.shown(function) for function in {f.name: f for f in functions}.values()) / len(
        {f.name for f in functions}
    )
    assert abs(share - world.preset.composition_share) < 0.02
    assert any(world.shown(f) != other.shown(f) for f in functions)
    hidden = {world.function(rng, shown=False).name for _ in range(2000)}
    for _ in range(2000):
        example = world.composed(rng)
        if "(x): return" in example.prompt + example.completion and example.completion not in passages(False):
            text = example.prompt if example.prompt.startswith("def ") else example.completion
            name = text.removeprefix("def ").partition("(")[0]
            assert name not in hidden


def test_nothing_that_is_asked_is_shown_under_another_name(tmp_path: Path) -> None:
    world = World(PRESETS["small"], 0)
    rng = random.Random(0)
    shown = {world.function(rng, shown=True).expression for _ in range(20_000)}
    domain = Code(PRESETS["small"], 0, tmp_path, print)
    drawn = domain.drawn_items()
    for task in ("completion", "text_to_code", "code_to_text"):
        asked = [function.expression for _, function in domain.items[task] if function is not None]
        assert len(asked) > 100 and not set(asked) & shown
        assert {function.expression for _, function in drawn[task] if function is not None} & shown
        prompts = [example.prompt for example, _ in domain.items[task]]
        assert len(set(prompts)) == len(prompts)
    first = next(each for each in OPERATIONS if each.name == "first_{k}")
    names = {each.name for each in Function(((first, "3"),)).namesakes(OPERATIONS)}
    assert names == {"first_3", "take_3"}


def test_each_model_reads_its_own_kind_of_text() -> None:
    world = World(PRESETS["small"], 0)
    rng = world.rng("test")
    general = [world.general(rng) for _ in range(2000)]
    library = set(passages(False))
    assert not any("(x): return" in e.prompt + e.completion for e in general if e.completion not in library)
    special = [world.specialist(rng) for _ in range(2000)]
    assert not any("Name this" in e.prompt + e.completion or "Write this" in e.prompt for e in special)
    assert not set(passages(False)) & set(passages(True))


def test_the_tokenizer_gives_every_text_back() -> None:
    world = World(PRESETS["tiny"], 0)
    tokenizer = world.tokenizer()
    rng = world.rng("test")
    for draw in (world.specialist, world.general, world.composed):
        for _ in range(100):
            example = draw(rng)
            text = example.prompt + example.completion
            assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_scores_and_the_cascade(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    """With an m_B that names rightly and an m_A that knows every body, the cascade is right on functions."""
    domain = Code(PRESETS["tiny"], 0, tmp_path, lambda line: None)
    items = [item for name in ("completion", "text_to_code") for item in domain.items[name]]
    bodies = {f"def {function.name}(x): return": function.expression for _, function in items if function}
    names = {
        example.prompt.replace("Write this in Python: ", "Name this: "): function.name
        for example, function in items
        if function
    }
    domain.__dict__["anchor"], domain.__dict__["augmenting"] = names, bodies
    monkeypatch.setattr(
        domain, "answerer", lambda known: lambda prompts, tokens=None: [known.get(p, "no idea") for p in prompts]
    )
    scores = domain.score(domain.cascade(), None)
    assert set(scores) == set(Code.tasks_of(PRESETS["tiny"])) - {"library"}
    assert min(scores["completion"]) == min(scores["text_to_code"]) == 1.0
    assert max(scores["arithmetic"]) == 0.0
    right = {example.prompt: example.completion.strip() for task in domain.items.values() for example, _ in task}
    best = domain.score(lambda prompts, tokens=None: [right[prompt] for prompt in prompts], None)
    described = best.pop("code_to_text")  # one function may stand there twice, with two descriptions
    assert sum(described) / len(described) > 0.8
    assert all(min(values) > 0.99 for values in best.values())


def test_bits_per_byte_by_hand(tmp_path) -> None:  # type: ignore[no-untyped-def]
    """A model that gives every token the same probability takes the logarithm of their number for each."""
    domain = Code(PRESETS["tiny"], 0, tmp_path, lambda line: None)

    class Even:
        device = torch.device("cpu")
        config = LlamaConfig(vocab_size=len(domain.tokenizer))

        def __call__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
            return SimpleNamespace(logits=torch.zeros(*input_ids.shape, len(domain.tokenizer)))

    texts = domain.world.rng("evaluation-library").sample(passages(True), PRESETS["tiny"].passages)
    tokens = [len(domain.tokenizer(text, add_special_tokens=False).input_ids) + 1 for text in texts]
    expected = [n * math.log2(len(domain.tokenizer)) / len(t.encode()) for n, t in zip(tokens, texts, strict=True)]
    assert domain.bits_per_byte(Even()) == pytest.approx(expected, rel=1e-5)
