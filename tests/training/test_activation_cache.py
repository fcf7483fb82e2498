"""The activation cache: what it gives back is what the models would make, and nothing that is stale, broken or missing
is taken for it."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import calmlm
from calmlm.errors import CheckpointError, ConfigError, DataError
from calmlm.readers.kept_states import gathered, placed, reading, readings
from calmlm.training.activation_cache import ActivationCache, bytes_needed
from calmlm.training.cache_settings import CacheConfig, bytes_of
from calmlm.training.pipeline import train
from calmlm.training.schema import parse_config
from calmlm.training.state_shards import Shards
from compositions import own, pad, tiny_composition
from readers.test_items import vision
from tiny import FAMILIES, tiny_model, tiny_tokens

Settings = Callable[..., dict[str, Any]]
LINES = [f"the quick fox {number} jumps over {number * 7} lazy dogs" for number in range(12)]
SHARED = {"anchor_options": {"vocab_size": 97}, "augmenting_options": {"vocab_size": 97}}
COMPOSITIONS: dict[str, dict[str, Any]] = {
    "shared ids": {},
    "shared ids, windows": {"augmenting": "gemma3_text", "augmenting_options": {"sliding_window": 3}},
    "shared ids, rotary, pointer": {"augmenting": "mistral", "rotary": True, "words": "pointer", **SHARED},
    "own tokens, map, graft": {
        "augmenting": "mistral", "connector": "graft", "init": "aligned", "plain_text": LINES, "words": "map",
        **own("bytes-large", "sentencepiece"),
    },
    "own tokens, prefix, windows": {
        **own("sentencepiece", "bytes"), "augmenting": "gemma3_text", "augmenting_prefix": "2+2=4 ",
    },
    "transcoded": {"alignment": "transcode", **own("sentencepiece", "bytes-large")},
    "retokenized": {"alignment": "retokenize", **own("bytes-large", "sentencepiece")},
    "prompts": {"refresh": False, **SHARED},
    "what it would say": {"connector": "legonn", **SHARED},
    "what it would say, words": {"connector": "legonn", "words": "map", **SHARED},
}  # fmt: skip


def made(name: str) -> calmlm.CalmForCausalLM:
    options = dict(COMPOSITIONS[name])
    if "augmenting_options" in options and "windows" in name:
        options["augmenting_options"] = {**options["augmenting_options"], "sliding_window": 3}
    return tiny_composition(options.pop("anchor", "llama"), options.pop("augmenting", "gpt2"), **options)


def rows_of(model: Any, count: int = 6) -> list[dict[str, list[int]]]:
    """Rows of several lengths with a prompt each."""
    generator = torch.Generator().manual_seed(1)
    size = min(model.config.get_text_config(decoder=True).vocab_size, 90)
    found = []
    for number in range(count):
        ids = torch.randint(3, size, (5 + 2 * number,), generator=generator).tolist()
        found.append({"input_ids": ids, "labels": [-100] * (2 + number) + ids[2 + number :]})
    return found


def batch_of(rows: list[dict[str, list[int]]], side: str = "right") -> dict[str, Tensor]:
    ids, mask = pad([torch.tensor(row["input_ids"]) for row in rows], side)
    labels = pad([torch.tensor(row["labels"]) for row in rows], side, -100)[0]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@contextmanager
def counting(model: Any, name: str = "augmenting") -> Iterator[list[int]]:
    """How many rows the augmenting model has run on."""
    seen: list[int] = []
    decoder = model.model.backbone(name).decoder
    handle = decoder.register_forward_hook(lambda module, args, out: seen.append(1))
    try:
        yield seen
    finally:
        handle.remove()


def cache_of(model: Any, folder: Path, mode: str = "memory", **options: Any) -> ActivationCache:
    options = {"anchor": True, **options}
    return ActivationCache(CacheConfig(mode, **options), model, folder, lambda line: None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "mode"),
    [*((name, "disk") for name in COMPOSITIONS), ("shared ids", "memory"), ("own tokens, map, graft", "memory")],
)
def test_what_is_read_back_is_what_the_model_makes(name: str, mode: str, tmp_path: Path) -> None:
    """In other batches, with other padding and on the other side of it."""
    model = made(name)
    rows = rows_of(model)
    sides = ["right"] if name == "prompts" else ["right", "left"]
    batches = [batch_of(rows[:3]), batch_of(rows[3:])]
    others = [batch_of([rows[0], rows[5], rows[2]], side) for side in sides] + [batch_of([rows[4]])]
    model.train()
    expected = [model(**batch, use_cache=False) for batch in others]
    with cache_of(model, tmp_path, mode).recording():
        for batch in batches:
            model(**batch, use_cache=False)
    cache = cache_of(model, tmp_path, mode) if mode == "disk" else None  # another run
    if cache is None:
        cache = cache_of(model, tmp_path)
        with cache.recording():
            for batch in batches:
                model(**batch, use_cache=False)
    with cache.recording(), counting(model) as ran:
        for batch, before in zip(others, expected, strict=True):
            found = model(**batch, use_cache=False)
            real = batch["attention_mask"].bool()
            assert torch.allclose(found.logits[real], before.logits[real], atol=1e-4)
            assert abs(found.loss.item() - before.loss.item()) < 2e-5
    assert not ran
    if name != "retokenized":  # which reads nothing of a text without a boundary
        assert cache.counts.texts == sum(len(batch["input_ids"]) for batch in others)
    # The states matter: without the composition the logits are others.
    with model.disable_composition():
        alone = model(**others[0], use_cache=False).logits
    real = others[0]["attention_mask"].bool()
    assert not torch.allclose(alone[real], expected[0].logits[real], atol=1e-2)


def test_gradients_are_the_same(tmp_path: Path) -> None:
    model = made("own tokens, map, graft")
    batch = batch_of(rows_of(model))
    cache = cache_of(model, tmp_path)
    gradients = []
    for _ in range(3):
        model.zero_grad()
        with cache.recording():
            model.train()
            model(**batch, use_cache=False).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    model.zero_grad()
    model(**batch, use_cache=False).loss.backward()
    assert gradients[0]
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            for found in gradients:
                assert torch.allclose(found[name], parameter.grad, atol=1e-5)


TOP: dict[str, dict[str, Any]] = {
    **{family: {"anchor": family, "connections": [(1, -1)]} for family in sorted(FAMILIES)},
    "llama, words alone": {"connections": "none", "words": "map", **SHARED},
    "llama, words alone, pointer": {"connections": "none", "words": "pointer", **SHARED},
    "llama, own tokens": {"connections": [(1, -2)], **own("sentencepiece", "bytes-large")},
}


@pytest.mark.parametrize("name", TOP)
def test_the_anchor_runs_from_its_first_connection(name: str, tmp_path: Path) -> None:
    options = dict(TOP[name])
    if isinstance(options["connections"], list):
        depth = len(
            calmlm.compose(tiny_model(options.get("anchor", "llama")), tiny_model("gpt2")).model.backbone().layers
        )
        options["connections"] = [(i, depth + j) for i, j in options["connections"]]
    model = tiny_composition(**options)
    low = model.model.untouched()
    assert low >= 1
    rows = rows_of(model)
    sides = ["right", "left"] if model.model.backbone().pads_left else ["right"]
    batches = [batch_of([rows[0], rows[4], rows[2]], side) for side in sides]
    model.train()
    expected = []
    for batch in batches:
        model.zero_grad()
        output = model(**batch, use_cache=False)
        output.loss.backward()
        expected.append((output.logits, [p.grad.clone() for p in model.parameters() if p.grad is not None]))
    cache = cache_of(model, tmp_path)
    ran: list[int] = []
    with cache.recording():
        model(**batch_of(rows), use_cache=False)
        works = cache.shortcuts[low].works
        layer = model.model.backbone().layers[low - 1]
        probe = next(
            module for module in layer.modules() if isinstance(module, torch.nn.Linear) or "Conv1D" in str(type(module))
        )
        handle = probe.register_forward_hook(lambda *_: ran.append(1))
        for batch, (logits, gradients) in zip(batches, expected, strict=True):
            model.zero_grad()
            output = model(**batch, use_cache=False)
            output.loss.backward()
            real = batch["attention_mask"].bool()
            assert torch.allclose(output.logits[real], logits[real], atol=5e-5)
            found = [p.grad for p in model.parameters() if p.grad is not None]
            assert all(torch.allclose(one, other, atol=1e-4) for one, other in zip(found, gradients, strict=True))
        handle.remove()
    assert works is (name not in NEED_LOWER_LAYERS)
    assert bool(ran) is not works
    assert torch.allclose(
        model(**batches[0], use_cache=False).logits, expected[0][0], atol=5e-5
    )  # nothing is left behind


NEED_LOWER_LAYERS: set[str] = set()
"""Families whose upper layers want more of the lower ones than their states; they are run as a whole."""


def test_items_of_encoders_are_kept(tmp_path: Path) -> None:
    model = calmlm.compose(tiny_model("llama", seed=1), {"eyes": vision()}, connections=2)
    for parameter in model.model.connectors.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    images = torch.randn(3, 1, 8, 8)
    ids = tiny_tokens(3, 6)
    given = [{"eyes": {"pixel_values": images[order]}} for order in ([0, 1, 2], [2, 0, 1])]
    expected = model(ids, augmenting_inputs=given[1], use_cache=False).logits
    cache = cache_of(model, tmp_path, "disk")
    with cache.recording():
        model(ids, augmenting_inputs=given[0], use_cache=False)
    cache = cache_of(model, tmp_path, "disk")
    with cache.recording(), counting(model, "eyes") as ran:
        assert torch.allclose(model(ids, augmenting_inputs=given[1], use_cache=False).logits, expected, atol=1e-5)
    assert not ran


def test_generation_is_left_alone(tmp_path: Path) -> None:
    model = made("shared ids")
    ids = tiny_tokens(2, 5)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, **options)
    cache = cache_of(model, tmp_path)
    with cache.recording():
        assert torch.equal(model.generate(ids, **options), expected)
        assert torch.equal(model.generate(ids, **options), expected)
    assert cache.counts.texts == cache.counts.generated == 0


# What a text is known by


def test_a_text_is_known_by_all_that_decides_on_its_states() -> None:
    ids, real = (
        torch.tensor([[5, 6, 7, 0], [0, 5, 6, 7], [5, 6, 8, 0]]),
        torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1], [1, 1, 1, 0]]),
    )
    found = readings(ids, real)
    assert found[0].key == found[1].key != found[2].key
    assert [row.columns.tolist() for row in found if row.columns is not None] == [[0, 1, 2], [1, 2, 3], [0, 1, 2]]
    positions = torch.tensor([[0, 1, 2, 3]])
    placed_otherwise = readings(ids, real, positions)
    assert placed_otherwise[0].key not in (found[0].key, placed_otherwise[1].key)
    assert reading([b"ab", b"c"], None, 0).key != reading([b"a", b"bc"], None, 0).key


def test_holes_and_packing_make_other_texts(tmp_path: Path) -> None:
    """What changes the distance of two tokens, or whether they belong together, is not taken for the same text."""
    model = tiny_composition("llama", "llama", [(1, 3)], **SHARED)
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    holes, mask = torch.tensor([[5, 6, 7, 0, 0, 8, 9, 10]]), torch.tensor([[1, 1, 1, 0, 0, 1, 1, 1]])
    packed = {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]])}
    calls = [
        ({"input_ids": ids}, [True] * 6),
        ({"input_ids": holes, "attention_mask": mask}, mask[0].bool().tolist()),
        ({"input_ids": ids, **packed}, [True] * 6),
        ({"input_ids": ids[:, :3]}, [True] * 3),  # the first of the packed texts, which is known by then
    ]
    with torch.no_grad():
        expected = [model(**given, use_cache=False).logits[0][keep] for given, keep in calls]
        with cache_of(model, tmp_path).recording():
            for _ in range(2):
                for (given, keep), before in zip(calls, expected, strict=True):
                    assert torch.allclose(model(**given, use_cache=False).logits[0][keep], before, atol=2e-5)


def test_what_else_an_anchor_is_given_is_heeded(tmp_path: Path) -> None:
    model = tiny_composition("gpt2", "gpt2", [(1, 3)], **SHARED)
    ids = tiny_tokens(1, 6)
    other = {"token_type_ids": torch.full_like(ids, 7)}
    with torch.no_grad(), cache_of(model, tmp_path).recording():
        first = model(ids, use_cache=False).logits
        second = model(ids, use_cache=False, **other).logits
    with torch.no_grad():
        assert not torch.allclose(first, second, atol=1e-2)
        assert torch.allclose(second, model(ids, use_cache=False, **other).logits, atol=2e-5)
    experts = tiny_composition("mixtral", "gpt2", [(1, 3)], **SHARED).train()
    given = {"labels": ids, "output_router_logits": True, "use_cache": False}
    expected = experts(ids, **given).aux_loss
    with cache_of(experts, tmp_path).recording():
        for _ in range(2):
            assert experts(ids, **given).aux_loss.item() == pytest.approx(expected.item(), rel=1e-4)


def test_adapters_before_all_layers_leave_nothing_unchanged() -> None:
    options = {"word_embed_proj_dim": 20, "vocab_size": 97}
    adapters = {"r": 4, "target_modules": ["project_in"]}
    model = tiny_composition("opt", "gpt2", [(1, 4)], adapters=adapters, anchor_options=options)
    assert model.model.untouched() == 0


def test_rows_go_out_and_come_back() -> None:
    ids, real = torch.tensor([[5, 6, 0], [0, 5, 6]]), torch.tensor([[1, 1, 0], [0, 1, 1]])
    hidden = {1: torch.randn(2, 3, 4), 3: torch.randn(2, 3, 4)}
    rows = readings(ids, real)
    back = placed(gathered(hidden, rows), rows, 3, torch.device("cpu"))
    for layer, states in hidden.items():
        assert torch.equal(back[layer][real.bool()], states[real.bool()])
        assert not back[layer][~real.bool()].any()


# Runs


def run(values: dict[str, Any]) -> tuple[dict[str, Tensor], list[str]]:
    lines: list[str] = []
    result = train(parse_config(values), overwrite=True, report=lines.append)
    model = calmlm.CalmForCausalLM.from_pretrained(result.composition)
    return model.composition_tensors(), lines


@pytest.mark.parametrize("backend", ["sft", "trainer"])
def test_a_run_ends_with_the_same_weights(backend: str, settings: Settings, tmp_path: Path) -> None:
    expected, _ = run(settings(backend))
    for cache in ("memory", {"mode": "disk", "folder": str(tmp_path / "kept")}):
        found, lines = run({**settings(backend), "activation_cache": cache})
        for name, tensor in expected.items():
            assert torch.allclose(found[name], tensor, atol=1e-5), name
        assert any(line.startswith("Activation cache: 40 texts") for line in lines)
        assert any("40 were generated" in line for line in lines)
    again, lines = run({**settings(backend), "activation_cache": cache})  # another run on the same data
    assert any(line.startswith("Activation cache: 80 texts") and " 0 were generated" in line for line in lines)
    assert all(torch.allclose(again[name], tensor, atol=1e-5) for name, tensor in expected.items())


def test_missing_states_are_generated_skipped_or_refused(settings: Settings, task: Path, tmp_path: Path) -> None:
    half = tmp_path / "half.jsonl"
    half.write_text("\n".join(task.read_text().splitlines()[:20]))
    values = settings("trainer", num_train_epochs=1)
    cache = {"mode": "disk", "folder": str(tmp_path / "kept")}
    run({**values, "data": {"train": str(half)}, "activation_cache": cache})
    with pytest.raises(DataError, match="states of all 40 examples in .*kept, but those of .. are missing: make them"):
        run({**values, "activation_cache": {**cache, "on_missing": "raise"}})
    _, lines = run({**values, "activation_cache": {**cache, "on_missing": "skip", "on_generate": "delete"}})
    skipped = next(line for line in lines if "are skipped" in line)
    there = 40 - int(skipped.split()[0])
    assert 20 <= there < 40  # sums may come twice
    assert any(line.startswith(f"{there} examples;") for line in lines)
    _, lines = run({**values, "activation_cache": {**cache, "on_missing": "warn", "on_generate": "delete"}})
    assert lines.count("The activation cache lacks states of 'augmenting': they are generated.") == 1
    _, lines = run({**values, "activation_cache": {**cache, "on_generate": "delete"}})
    assert any("0.0 MiB of them kept" in line for line in lines)
    other = {
        **values,
        "data": {"train": str(half)},
        "activation_cache": {"mode": "disk", "folder": str(tmp_path / "no")},
    }
    other["activation_cache"]["on_missing"] = "skip"
    with pytest.raises(DataError, match="those of 20 are missing"):
        run(other)


@pytest.mark.parametrize("name", ["shared ids", "own tokens, prefix, windows", "prompts"])
def test_texts_of_packed_rows_are_known_by_themselves(name: str, tmp_path: Path) -> None:
    """What was read in a packed row is known in another one, and in a row of its own; the anchor's stream as well."""
    model = made(name).train()
    rows = rows_of(model)

    def packed(chosen: list[int]) -> dict[str, Tensor]:
        some = [rows[index] for index in chosen]
        labels = [[-100, *row["labels"][1:]] for row in some]
        places = [list(range(len(row["input_ids"]))) for row in some]
        parts = {"input_ids": [row["input_ids"] for row in some], "labels": labels, "position_ids": places}
        return {key: torch.tensor([[number for one in part for number in one]]) for key, part in parts.items()}

    calls = [packed([4, 0, 5]), packed([3, 1, 2, 0]), batch_of(rows[:3]), batch_of(rows[3:])]
    expected = [model(**given, use_cache=False).loss.item() for given in calls]
    cache = cache_of(model, tmp_path)
    with cache.recording():
        for given in (packed([0, 1, 2]), packed([5, 4, 3])):
            model(**given, use_cache=False)
        assert all(cache.known(rows))
        with counting(model) as ran, counting(model, "") as all_layers:
            found = [model(**given, use_cache=False).loss.item() for given in calls]
    assert not ran
    assert len(all_layers) == 4
    assert cache.counts.generated == 6
    assert found == pytest.approx(expected, abs=1e-5)


def test_rows_that_cut_texts_are_refused(settings: Settings) -> None:
    values = {**settings("sft", packing=True, packing_strategy="wrapped"), "activation_cache": "memory"}
    values["data"]["max_length"] = 32
    with pytest.raises(ConfigError, match="trainer.packing_strategy: expected 'bfd' beside activation_cache"):
        run(values)


def test_evaluation_is_kept_too(settings: Settings, task: Path, tmp_path: Path) -> None:
    half = tmp_path / "half.jsonl"
    half.write_text("\n".join(task.read_text().splitlines()[:20]))
    cache = {"mode": "disk", "folder": str(tmp_path / "kept")}
    run({**settings("trainer"), "data": {"train": str(half)}, "activation_cache": cache})
    data = {"train": str(half), "eval": str(task)}  # whose other states are missing
    assert run({**settings("trainer"), "data": data, "activation_cache": {**cache, "on_missing": "raise"}})[1]


def test_too_small_a_disk_is_found_before_the_first_step(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    values = {**settings("trainer"), "activation_cache": "disk"}
    with pytest.raises(
        ConfigError, match=r"needs [\d,]+ bytes in .*run.activations, but its disk has 1,000 left: name"
    ):
        run(values)
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert run({**values, "activation_cache": {"mode": "disk", "budget": "500B"}})[1]


@pytest.mark.parametrize("dtype", [None, "int8"])
def test_the_room_that_is_asked_for_counts_retained_and_plain_text(
    dtype: Any, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the retained text as many lines as the run's batches read, of the plain text all."""
    numbers = random.Random(0)
    texts = {"general": 1000, "plain": 30}
    for name, count in texts.items():
        lines = ["".join(numbers.choices("0123456789+-=", k=100)) for _ in range(count)]
        (tmp_path / name).write_text("\n".join(lines))
    values = settings("trainer", save_strategy="no")  # 20 steps, and so 40 lines
    values["activation_cache"] = {"mode": "disk", "dtype": dtype}
    values |= {"retain": {"text": str(tmp_path / "general")}, "align": {"text": str(tmp_path / "plain")}}
    _, lines = run(values)
    said, kept = (next(line for line in lines if what in line) for what in ("cache takes", " of them kept"))
    assert said.endswith(" MiB for 40 examples and 70 other texts, as some of them say.")
    needed, taken = (re.search(r"([\d.]+) MiB", line) for line in (said, kept))
    assert needed and taken
    assert float(needed[1]) == pytest.approx(float(taken[1]), abs=0.11)
    assert float(taken[1]) > 0.6

    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 500_000})())
    values = {**values, "output": str(tmp_path / "other")}
    with pytest.raises(ConfigError, match=r"needs [\d,]+ bytes in .*other.activations, but its disk has 500,000"):
        run(values)
    assert not (tmp_path / "other").exists()
    assert run({**values, "retain": None, "align": None})[1]


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, None) for name in COMPOSITIONS), ("shared ids", "int8"), ("prompts", "int8")]
)
def test_the_room_that_is_asked_for_is_what_is_taken(name: str, dtype: Any, tmp_path: Path) -> None:
    model = made(name)
    rows = rows_of(model)
    cache = cache_of(model, tmp_path, dtype=dtype)
    with cache.recording():
        for row in rows:
            model(**batch_of([row]), use_cache=False)
    assert cache.counts.bytes == pytest.approx(bytes_needed(model.model, rows, dtype, anchor=True), rel=0.05)
    assert cache.known(rows) == [True] * len(rows)
    other = {**rows[-1], "input_ids": rows[-1]["input_ids"][::-1]}
    assert cache.known([other]) == [False]


def test_what_does_not_fit_is_read_each_time(tmp_path: Path) -> None:
    model = made("shared ids")
    rows = rows_of(model)
    lines: list[str] = []
    whole = bytes_needed(model.model, rows, None, anchor=True)
    config = CacheConfig("memory", anchor=True, budget=f"{whole // 2}B")
    cache = ActivationCache(config, model, tmp_path, lines.append)
    expected = [model(**batch_of([row]), use_cache=False).loss.item() for row in rows]
    with cache.recording():
        for _ in range(2):
            found = [model(**batch_of([row]), use_cache=False).loss.item() for row in rows]
            assert found == pytest.approx(expected, abs=1e-5)
    assert 0 < cache.counts.bytes <= whole // 2
    assert len(lines) == 1
    assert "is full" in lines[0]


@pytest.mark.parametrize(("dtype", "most"), [("bfloat16", 0.01), ("int8", 0.04)])
def test_smaller_numbers_change_little(dtype: Any, most: float, tmp_path: Path) -> None:
    model = made("own tokens, map, graft")
    batch = batch_of(rows_of(model))
    expected = model(**batch, use_cache=False).logits
    cache = cache_of(model, tmp_path, "disk", dtype=dtype)
    with cache.recording():
        for _ in range(2):
            found = model(**batch, use_cache=False).logits
    real = batch["attention_mask"].bool()
    assert 0 < ((found - expected)[real].norm() / expected[real].norm()).item() < most


# Files


ABOUT = {"format": 1, "layers": [1]}


def record(number: int, length: int = 3) -> dict[str, Tensor]:
    return {"1": torch.full((length, 2), float(number)), "3": torch.full((length, 5), float(-number))}


def test_shards_are_found_again_by_other_runs(tmp_path: Path) -> None:
    one, other = Shards(tmp_path, ABOUT, 100), Shards(tmp_path, ABOUT, 100)
    for number in range(6):
        (one if number % 2 else other).put(bytes([number]) * 32, record(number, number + 1))
    one.flush()
    other.flush()
    assert len(list(tmp_path.glob("shard-*.safetensors"))) >= 4
    assert len(list(tmp_path.glob("index-*.arrow"))) == 2
    again = Shards(tmp_path, ABOUT)
    assert len(again) == 6
    for number in range(6):
        found = again.get(bytes([number]) * 32)
        assert found is not None
        assert all(torch.equal(found[name], tensor) for name, tensor in record(number, number + 1).items())
    assert again.get(b"x" * 32) is None


def test_of_two_runs_that_take_one_folder_the_last_one_has_it(tmp_path: Path) -> None:
    """Or what one of them has read would be taken for what the other one reads."""
    first, last = Shards(tmp_path, ABOUT), Shards(tmp_path, {**ABOUT, "layers": [2]})
    first.put(b"a" * 32, record(1))
    last.put(b"b" * 32, record(2))
    with pytest.raises(ConfigError, match=r"needs a folder of its own, but .* has been taken since by a run with"):
        first.flush()
    last.flush()
    again = Shards(tmp_path, {**ABOUT, "layers": [2]})
    assert b"a" * 32 not in again
    assert b"b" * 32 in again


def test_an_interrupted_shard_counts_as_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = Shards(tmp_path, ABOUT)
    shards.put(b"a" * 32, record(1))
    shards.flush()

    class Stop(BaseException):
        """A process that is killed."""

    def stop(*_: Any) -> None:
        raise Stop

    shards.put(b"b" * 32, record(2))
    monkeypatch.setattr(Shards, "_index", stop)  # between the shard and its index
    with pytest.raises(Stop):
        shards.flush()
    monkeypatch.undo()
    again = Shards(tmp_path, ABOUT)
    assert len(again) == 1
    again.put(b"b" * 32, record(2))
    again.flush()
    assert Shards(tmp_path, ABOUT).get(b"b" * 32) is not None


def test_foreign_and_damaged_folders_are_refused(tmp_path: Path) -> None:
    shards = Shards(tmp_path, ABOUT)
    shards.put(b"a" * 32, record(1))
    shards.flush()
    with pytest.raises(CheckpointError, match="must hold states of this composition's .*, but .* another layers: name"):
        Shards(tmp_path, {**ABOUT, "layers": [2]})
    next(tmp_path.glob("shard-*")).write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="must be a shard of an activation cache, but it cannot be read"):
        Shards(tmp_path, ABOUT).get(b"a" * 32)
    next(tmp_path.glob("index-*")).write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="must be an index of an activation cache, but it cannot be read"):
        Shards(tmp_path, ABOUT)
    (tmp_path / "about.json").write_text("{")
    with pytest.raises(CheckpointError, match="another form"):
        Shards(tmp_path, {})


def test_a_full_disk_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = Shards(tmp_path, ABOUT)
    shards.put(b"a" * 32, record(1))

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("calmlm.training.state_shards.save_file", full)
    with pytest.raises(ConfigError, match="needs room on the disk of .*, but writing failed .*No space left"):
        shards.flush()


def test_a_disk_that_fills_at_the_end_costs_no_training(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("calmlm.training.state_shards.save_file", full)
    values = settings("trainer", max_steps=2, save_steps=1)
    values["activation_cache"] = "disk"
    expected, _ = run(settings("trainer", max_steps=2))
    found, lines = run(values)
    assert all(torch.allclose(found[name], tensor, atol=1e-5) for name, tensor in expected.items())
    assert (Path(values["output"]) / "checkpoints" / "checkpoint-2" / "trainer_state.json").is_file()
    told = [line for line in lines if "needs room" in line]
    assert 0 < len(told) == len(set(told)) <= 2  # of both models, once each
    assert all(line.endswith("goes on without what it has just read.") for line in told)


def test_another_model_is_refused(tmp_path: Path) -> None:
    model = made("shared ids")
    batch = batch_of(rows_of(model))
    with cache_of(model, tmp_path, "disk").recording():
        model(**batch, use_cache=False)
    other = calmlm.compose(tiny_model("llama", seed=1), tiny_model("gpt2", seed=9), connections=2)
    with pytest.raises(CheckpointError, match="another model"):
        cache_of(other, tmp_path, "disk")
    narrow = calmlm.compose(
        tiny_model("llama", seed=1), tiny_model("gpt2", seed=2, layer_norm_epsilon=0.5), connections=2
    )
    with pytest.raises(CheckpointError, match="another model"):  # the same weights
        cache_of(narrow, tmp_path, "disk")
    deeper = calmlm.compose(tiny_model("llama", seed=1), tiny_model("gpt2", seed=2), connections=[(0, 1)])
    with pytest.raises(CheckpointError, match="another layers"):
        cache_of(deeper, tmp_path, "disk")


def test_another_quantised_model_is_refused(tmp_path: Path) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    def quantised(seed: int) -> Any:
        model = tiny_model("llama", seed=seed)
        quantize_(model, Int8WeightOnlyConfig())
        return calmlm.compose(tiny_model("llama", seed=1), model, connections=2)

    for _ in range(2):
        cache = cache_of(quantised(2), tmp_path, "disk")
        with cache.recording():
            cache.model(tiny_tokens(1, 6), use_cache=False)
    assert cache.counts.generated == 0
    with pytest.raises(CheckpointError, match="another model"):
        cache_of(quantised(9), tmp_path, "disk")


def test_a_budget_holds_for_all_runs_on_a_folder(tmp_path: Path) -> None:
    model = made("shared ids")
    for seed in range(4):
        cache = cache_of(model, tmp_path, "disk", budget="8KiB")
        with cache.recording():
            model(tiny_tokens(2, 9, seed=seed) if seed else tiny_tokens(2, 9), use_cache=False)
    kept = sum(path.stat().st_size for path in tmp_path.rglob("shard-*"))
    assert 0 < kept <= 9 << 10


def test_a_folder_that_holds_nothing_takes_other_settings(tmp_path: Path) -> None:
    model = made("shared ids")
    cache_of(model, tmp_path, "disk")
    cache_of(model, tmp_path, "disk", dtype="int8")


def test_numbers_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    model = made("shared ids")
    with torch.no_grad():
        model.augmenting["augmenting"].get_input_embeddings().weight[7] = math.nan
    cache = cache_of(model, tmp_path)
    ids = torch.tensor([[5, 6, 7]])
    with (
        pytest.raises(DataError, match="finite states of the augmenting model 'augmenting', but got NaN"),
        cache.recording(),
    ):
        model(ids, use_cache=False)


# Settings


def test_settings_are_read(settings: Settings) -> None:
    assert parse_config(settings()).cache.mode == "off"
    for given, mode in ((False, "off"), ("off", "off"), ("memory", "memory"), ({"mode": False}, "off")):
        assert parse_config({**settings(), "activation_cache": given}).cache.mode == mode
    faulty = {"mode": "memory", "folder": "x", "budget": "8 apples"}
    with pytest.raises(ConfigError) as caught:
        parse_config({**settings(), "activation_cache": faulty})
    assert "activation_cache.folder: expected mode: disk beside it" in str(caught.value)
    assert "activation_cache.budget: Expected a size such as 8GiB or 500MiB, but got '8 apples'" in str(caught.value)
    with pytest.raises(
        ConfigError, match="activation_cache: expected 'off' or 'memory' or 'disk' or a mapping with mode"
    ):
        parse_config({**settings(), "activation_cache": "tape"})


def test_the_anchors_stream_is_kept_where_it_pays() -> None:
    assert [CacheConfig("disk").keeps_anchor(count, 8) for count in (0, 1, 2, 7)] == [False, False, True, True]
    assert [CacheConfig("disk", anchor=True).keeps_anchor(count, 8) for count in (0, 1)] == [False, True]
    assert not CacheConfig("disk", anchor=False).keeps_anchor(7, 8)


def test_sizes() -> None:
    for wrong in ("inf", "nan", "-5GiB", "0"):
        with pytest.raises(ConfigError, match="Expected a size such as"):
            bytes_of(wrong)
    assert [bytes_of(size) for size in ("8GiB", "1.5 MiB", "200", "7B")] == [8 << 30, 1572864, 200, 7]
    assert json.dumps(bytes_of("2KiB")) == "2048"
