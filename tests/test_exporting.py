"""An export holds all that a composition needs, changes none of it, and appears whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from transformers import AutoTokenizer

import calmlm
from calmlm import CalmForCausalLM, CheckpointError, ConfigError, ModelError, exporting
from calmlm.cli import main
from calmlm.exporting import export
from compositions import assert_helpful, awaken, logits_of
from gguf_files import write_gguf
from readers.test_items import vision
from tiny import tiny_model, tiny_tokenizer, tiny_tokens
from tokenizers_tiny import tokenizer

IDS = tiny_tokens(2, 7)


def base(folder: Path, family: str, seed: int, tokens: Any = None, **options: Any) -> Path:
    tiny_model(family, seed=seed, **options).save_pretrained(folder)
    if tokens is not None:
        tokens.save_pretrained(folder)
    return folder


def shared(place: Path) -> CalmForCausalLM:
    """Two folders; the anchor's weights lie in several files, and beside them what is no part of the model."""
    anchor = base(place / "big", "llama", 1, tiny_tokenizer())
    tiny_model("llama", seed=1).save_pretrained(anchor, max_shard_size="20KB")
    (anchor / "model.safetensors").unlink()
    for name in ("optimizer.pt", "trainer_state.json", "pytorch_model.bin", "run.py", "notes.txt", "keys.json"):
        (anchor / name).write_text("{}")
    (anchor / "LICENSE").write_text("free")
    return calmlm.compose(anchor, base(place / "small", "gpt2", 2), 2, words="pointer")


def several(place: Path) -> CalmForCausalLM:
    """Two augmenting models, one of which is the anchor itself, and the other has a tokenizer of its own."""
    words, ours = tokenizer("bytes-large"), tokenizer("bytes")
    anchor = base(place / "big", "llama", 1, ours, vocab_size=len(ours))
    law = base(place / "law", "mistral", 2, words, vocab_size=len(words))
    return calmlm.compose(anchor, {"law": law, "self": anchor}, 2, alignment={"law": "own"})


def files_of_blocks(place: Path) -> CalmForCausalLM:
    """GGUF files, one of them among others."""
    for name, seed in (("one", 1), ("other", 2), ("third", 3)):
        (place / "files").mkdir(parents=True, exist_ok=True)
        write_gguf(place / "files" / f"{name}.gguf", seed=seed)
    for name in ("notes.txt", "config.json", "README.md", "keys.json"):  # of something else
        (place / "files" / name).write_text("{}")
    (place / "files" / "NOTICE.md").write_text("free")
    shutil.move(place / "files" / "other.gguf", place / "other.gguf")
    return calmlm.compose(place / "files" / "one.gguf", place / "other.gguf", 2)


def cached(place: Path) -> CalmForCausalLM:
    """Ids of the hub, whose files lie in its cache as links."""
    for number, (name, family) in enumerate((("big", "llama"), ("small", "gpt2"))):
        made = base(place / "made" / name, family, number + 1, tiny_tokenizer() if name == "big" else None)
        home = place / "cache" / f"models--them--{name}"
        snapshot = home / "snapshots" / (str(number) * 40)
        for folder in (snapshot, home / "blobs", home / "refs"):
            folder.mkdir(parents=True)
        (home / "refs" / "main").write_text(snapshot.name)
        for path in made.iterdir():
            shutil.move(path, home / "blobs" / path.name)
            (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    return calmlm.compose("them/big", "them/small", 2)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = str(tmp_path / "there" / "cache")
    for name in ("huggingface_hub.constants.HF_HUB_CACHE", "huggingface_hub.constants.HUGGINGFACE_HUB_CACHE"):
        monkeypatch.setattr(name, found, raising=False)
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", found)
    assert found == constants.HF_HUB_CACHE


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("make", [shared, several, files_of_blocks, cached], ids=lambda make: make.__name__)
def test_it_loads_where_nothing_else_is(make: Callable[[Path], CalmForCausalLM], tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.mkdir()
    model = awaken(make(there))
    model.save_pretrained(there / "composition")
    expected = logits_of(model, IDS)
    words = AutoTokenizer.from_pretrained(there / "composition").get_vocab()
    assert main(["export", str(there / "composition"), str(tmp_path / "out" / "export")]) == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["export"]
    shutil.move(tmp_path / "out" / "export", tmp_path / "moved")
    shutil.rmtree(there)
    again = CalmForCausalLM.from_pretrained(tmp_path / "moved")
    assert torch.equal(logits_of(again, IDS), expected)
    assert AutoTokenizer.from_pretrained(tmp_path / "moved").get_vocab() == words
    config = json.loads((tmp_path / "moved" / "config.json").read_text())
    entries = [config["anchor"], *config["augmenting"].values()]
    assert all(entry["id"].startswith("./") and entry["revision"] is None for entry in entries)
    names = {path.relative_to(tmp_path / "moved").as_posix() for path in (tmp_path / "moved").rglob("*")}
    assert not any(path.is_symlink() for path in (tmp_path / "moved").rglob("*"))
    assert not any(
        name.endswith((".bin", ".pt", ".py", "trainer_state.json", "notes.txt", "keys.json")) for name in names
    )
    assert str(tmp_path) not in "".join(
        path.read_text() for path in (tmp_path / "moved").rglob("*.json") if "tokenizer" not in path.name
    )
    card = (tmp_path / "moved" / "README.md").read_text()
    assert "Loading fetches nothing" in card
    assert str(tmp_path) not in card
    if make is shared:
        assert "anchor/LICENSE" in names
        assert "anchor/model.safetensors.index.json" in names
    if make is several:
        assert config["augmenting"]["self"]["id"] == "./anchor"  # copied once
        assert "augmenting/self" not in names
    if make is files_of_blocks:
        assert {name for name in names if name.startswith("anchor/")} == {"anchor/one.gguf", "anchor/NOTICE.md"}
        assert {name for name in names if name.endswith(".gguf")} == {
            "anchor/one.gguf",
            "augmenting/augmenting/other.gguf",
        }
    if make is cached:
        assert "them/big" in card and "0" * 40 in card
    again.save_pretrained(tmp_path / "moved")  # its own folder may be written again
    assert torch.equal(logits_of(CalmForCausalLM.from_pretrained(tmp_path / "moved"), IDS), expected)


def test_an_encoder_comes_along(tmp_path: Path) -> None:
    vision().save_pretrained(tmp_path / "eyes")
    anchor = base(tmp_path / "big", "llama", 1)
    model = calmlm.compose(anchor, {"eyes": tmp_path / "eyes"}, 2)
    model.save_pretrained(tmp_path / "composition")
    export(tmp_path / "composition", tmp_path / "export")
    assert type(CalmForCausalLM.from_pretrained(tmp_path / "export").augmenting["eyes"]) is type(vision())


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    anchor, small = base(tmp_path / "big", "llama", 1), base(tmp_path / "small", "gpt2", 2)
    awaken(calmlm.compose(anchor, small, 2)).save_pretrained(tmp_path / "composition")
    return tmp_path / "composition"


def untouched(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_stands_there_stays(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "export"
    for overwrite in (False, True):  # an empty folder, then an export
        out.mkdir(exist_ok=True)
        export(saved, out, overwrite=overwrite)
    with pytest.raises(ConfigError) as caught:
        export(saved, out)
    assert_helpful(caught.value, str(out), "--overwrite")
    other = tmp_path / "photos"
    other.mkdir()
    (other / "cat.png").write_text("meow")
    (tmp_path / "file").write_text("text")
    (tmp_path / "link").symlink_to(other)
    before = untouched(tmp_path)
    for place in (other, saved, tmp_path / "big", tmp_path, tmp_path / "file", tmp_path / "link", tmp_path / "file/x"):
        with pytest.raises(ConfigError) as caught:
            export(saved, place, overwrite=True)
        assert_helpful(caught.value)
    assert main(["export", str(saved), str(other)]) == 2
    assert capsys.readouterr().err.startswith("error: The export must go to an empty folder")
    # An export that holds what is exported: its own models.
    calmlm.compose(out / "anchor", tmp_path / "small", 2).save_pretrained(tmp_path / "inner")
    with pytest.raises(ConfigError) as caught:
        export(tmp_path / "inner", out, overwrite=True)
    assert_helpful(caught.value, "apart")
    shutil.rmtree(tmp_path / "inner")
    assert untouched(tmp_path) == before


def test_a_failure_leaves_nothing(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(kind: type[Exception], *mentions: str) -> None:
        before = untouched(tmp_path)
        with pytest.raises(kind) as caught:
            export(saved, tmp_path / "out" / "export")
        assert_helpful(caught.value, *mentions)
        assert not (tmp_path / "out" / "export").exists()
        assert untouched(tmp_path) == before

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=10))
        refused(ConfigError, "needs room for", "0.00 GB left")
    with monkeypatch.context() as patch:

        def full(*args: Any) -> None:
            raise OSError(28, "No space left on device")

        patch.setattr(exporting.shutil, "copyfile", full)
        refused(ConfigError, "No space left")
    with monkeypatch.context() as patch:  # something that the model needs is left behind
        patch.setattr(exporting, "SETTINGS", ())
        refused(ModelError, "would not load", str(tmp_path / "out" / "export"))
    tiny_model("llama", seed=7).save_pretrained(tmp_path / "big")  # another model lies there now
    refused(CheckpointError, "has changed", str(tmp_path / "big"))
    (tmp_path / "small" / "model.safetensors").rename(tmp_path / "elsewhere")
    (tmp_path / "small" / "model.safetensors").symlink_to(tmp_path / "elsewhere")
    refused(CheckpointError, "leads out of")
    (tmp_path / "small" / "model.safetensors").unlink()
    refused(ModelError, "lacks model.safetensors")
    shutil.rmtree(tmp_path / "small")
    refused(ModelError, "no longer at", "'augmenting'")
    calmlm.compose(tiny_model(), tiny_model("gpt2"), 2).save_pretrained(saved)
    refused(ModelError, "given in memory")
    names = json.loads((saved / "config.json").read_text())
    names["augmenting"] = {"../../up": names["augmenting"]["augmenting"]}
    names["order"] = ["../../up"]
    (saved / "config.json").write_text(json.dumps(names))
    refused(ConfigError, "'../../up'")
    names["anchor"]["id"] = "nobody/nothing"
    names["augmenting"] = {"augmenting": names["augmenting"]["../../up"]}
    (saved / "config.json").write_text(json.dumps(names))
    refused(ModelError, "'nobody/nothing'")


def test_weights_that_an_index_names_elsewhere(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "big" / "model.safetensors").rename(tmp_path / "secret")
    index = {"metadata": {}, "weight_map": {"a": "../secret"}}
    (tmp_path / "big" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError) as caught:
        export(saved, tmp_path / "export")
    assert_helpful(caught.value, "'../secret'", "leads out of")


def test_code_comes_along_and_stays_off(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "small" / "own.py").write_text("raise SystemExit\n")
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    path = tmp_path / "small" / "config.json"
    path.write_text(json.dumps(config | {"auto_map": {"AutoTokenizer": ["own.Words", None]}}))
    export(saved, tmp_path / "export")
    assert (tmp_path / "export" / "augmenting" / "augmenting" / "own.py").is_file()
    path.write_text(json.dumps(config | {"auto_map": {"AutoConfig": "someone/code--own.Config"}}))
    with pytest.raises(ModelError) as caught:
        export(saved, tmp_path / "second")
    assert_helpful(caught.value, "someone/code")
