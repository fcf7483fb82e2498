"""`push_to_hub` of a trainer: refused where nobody could load the composition, and whole where everybody can."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from calmlm.errors import ConfigError
from calmlm.training import pipeline
from calmlm.training.pipeline import train
from calmlm.training.run_folder import RunFolder
from calmlm.training.schema import parse_config
from tiny import tiny_model
from tokenizers_tiny import tokenizer

BACKENDS = ["sft", "trainer"]
Settings = Callable[..., dict[str, Any]]


class Hub:
    """Stands in for the hub: keeps what it is sent, and says what was called."""

    def __init__(self, place: Path) -> None:
        self.place, self.calls, self.down = place, [], False
        self.repository: dict[str, Any] = {}

    def create_repo(self, repo_id: str, **options: Any) -> Any:
        if self.down:
            raise OSError("no network")
        self.calls.append("create_repo")
        self.repository = {"id": repo_id, **options}
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(self, *, repo_id: str, folder_path: str, **options: Any) -> Any:
        if self.down:
            raise OSError("no network")
        self.calls.append(f"upload {options.get('path_in_repo') or options['commit_message']}")
        target = self.place / repo_id / (options.get("path_in_repo") or "")
        ignored = shutil.ignore_patterns(*(options.get("ignore_patterns") or ()))
        shutil.copytree(folder_path, target, ignore=ignored, dirs_exist_ok=True)
        done: Future[str] = Future()
        done.set_result("commit")
        return done if options.get("run_as_future") else "commit"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    found = Hub(tmp_path / "hub")
    monkeypatch.setattr("transformers.trainer.hf_api", lambda: found)
    return found


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bases have ids of the hub."""
    make = pipeline._model

    def named(*args: Any) -> Any:
        model = make(*args)
        model.config.anchor |= {"id": "them/big", "revision": "abc"}
        for name, entry in model.config.augmenting.items():
            entry["id"] = f"them/{name}"
        return model

    monkeypatch.setattr(pipeline, "_model", named)


def go(values: dict[str, Any]) -> Path:
    return train(parse_config(values), report=lambda line: None).composition


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("strategy", ["end", "every_save", "checkpoint", "all_checkpoints"])
def test_bases_without_ids_are_refused(strategy: str, backend: str, settings: Settings, hub: Hub) -> None:
    values = settings(backend, max_steps=2, push_to_hub=True, hub_model_id="me/composed", hub_strategy=strategy)
    with pytest.raises(ConfigError, match=r"^trainer.push_to_hub: .* must have hub ids .* 'anchor' comes from"):
        go(values)
    assert not hub.calls
    assert not Path(values["output"]).exists()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("strategy", ["end", "every_save", "all_checkpoints"])
@pytest.mark.usefixtures("published")
def test_what_is_uploaded_can_be_loaded(
    strategy: str, backend: str, settings: Settings, hub: Hub, tmp_path: Path
) -> None:
    other = tokenizer("bytes")  # another tokenizer: an alignment lies beside the weights
    tiny_model("mistral", seed=4, vocab_size=len(other)).save_pretrained(tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    values = settings(backend, max_steps=4, save_steps=2, push_to_hub=True, hub_model_id="me/c", hub_strategy=strategy)
    values["model"] |= {"augmenting": {"law": str(tmp_path / "other")}}
    uploads: list[dict[str, str]] = []
    upload = hub.upload_folder

    def noted(**options: Any) -> Any:
        result = upload(**options)
        found = hub.place / "me/c" / (options.get("path_in_repo") or "")
        uploads.append({path.name: path.read_text() for path in found.iterdir() if path.suffix in (".md", ".json")})
        return result

    hub.upload_folder = noted  # type: ignore[method-assign]
    composition = go(values)
    assert hub.calls[0] == "create_repo"
    assert hub.calls[-1] == "upload End of training"
    assert len([call for call in hub.calls if call.startswith("upload")]) == {"end": 1, "every_save": 3}.get(
        strategy, 5
    )
    config = json.loads((composition / "config.json").read_text())
    for files in uploads:
        assert {"README.md", "config.json", "generation_config.json", "alignment.law.json"} <= set(files)
        assert "# A composition of frozen language models" in files["README.md"]
        assert "| law | them/law |" in files["README.md"]
        assert "base_model:\n- them/big\n- them/law\n" in files["README.md"]
        assert json.loads(files["config.json"])["anchor"]["id"] == "them/big"
        assert files["alignment.law.json"] == (composition / "alignment.law.json").read_text()
        assert "tokenizer_config.json" in files
    repository = hub.place / "me/c"
    assert json.loads((repository / "config.json").read_text())["augmenting"] == config["augmenting"]
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (composition, repository))
    assert ours.keys() == theirs.keys()
    assert all((ours[name] == theirs[name]).all() for name in ours)
    for card in (composition / "README.md", repository / "README.md"):
        text = card.read_text()
        assert "trl" not in text.lower()
        assert f"- trained on `{Path(values['data']['train']).name}`" in text
        assert "| steps | 4 |" in text
        assert str(tmp_path) not in text


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.usefixtures("published")
def test_settings_of_the_repository(backend: str, settings: Settings, hub: Hub) -> None:
    """Without a name it is called as the run is; nothing is made there before the first step is done."""
    values = settings(backend, max_steps=1, push_to_hub=True, hub_private_repo=True, hub_token="secret")
    with pytest.raises(ConfigError, match="Unrecognized mode"):
        go(values | {"trainer": values["trainer"] | {"torch_compile": True, "torch_compile_mode": "zzz"}})
    assert not hub.calls
    go(values)
    assert hub.repository["id"] == Path(values["output"]).name
    assert (hub.repository["private"], hub.repository["token"]) == (True, "secret")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.usefixtures("published")
def test_a_token_is_sent_and_never_written(backend: str, settings: Settings, hub: Hub, tmp_path: Path) -> None:
    """Neither the run's folder nor the repository holds it, though trainers pickle their arguments into both."""
    token = "hf_" + "SecretOfTheHub" * 2
    values = settings(backend, max_steps=2, save_steps=1, push_to_hub=True, hub_token=token)
    values |= {"align": {"text": str(tmp_path / "text"), "trainer": {"max_steps": 1}}}
    (tmp_path / "text").write_text("1+2\n3+4\n")
    sent: list[Any] = []
    upload = hub.upload_folder

    def noted(**options: Any) -> Any:
        sent.append(options["token"])
        return upload(**options)

    hub.upload_folder = noted  # type: ignore[method-assign]
    go(values)
    assert hub.repository["token"] == token
    assert sent == [token] * len(sent)
    assert len(sent) == 3, "two checkpoints and the end"
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    arguments = [path for path in files if path.name == "training_args.bin"]
    assert len(arguments) > 3, "those of the checkpoints, of the stage and of the repository"
    assert torch.load(arguments[0], weights_only=False).hub_token is None
    assert not [path for path in files if token.encode() in path.read_bytes()]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.usefixtures("published")
def test_a_hub_out_of_reach(backend: str, settings: Settings, hub: Hub) -> None:
    """At the beginning nothing is written for it; at the end the composition is there all the same."""
    values = settings(backend, max_steps=2, push_to_hub=True, hub_model_id="me/c", hub_strategy="end")
    hub.down = True
    with pytest.raises(ConfigError, match=r"^trainer.push_to_hub: .*'me/c', but it did not \(no network\); check"):
        go(values)
    run = RunFolder(values["output"])
    assert not run.path.exists()
    hub.down = False
    made = pipeline.upload

    def cut(*args: Any) -> None:
        hub.down = True
        made(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "upload", cut)
        with pytest.raises(ConfigError, match=r"^trainer.push_to_hub: .*no network.* the composition lies in"):
            go(values)
    assert (run.composition / "model.safetensors").is_file()
    with pytest.raises(ConfigError, match=r"^trainer.push_to_hub: .*no network"):  # with nothing left to train
        train(parse_config(values), resume=True, report=lambda line: None)
    hub.down = False
    calls = len(hub.calls)
    train(parse_config(values), resume=True, report=lambda line: None)
    assert hub.calls[calls:] == ["create_repo", "upload End of training"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_card_where_nothing_is_uploaded(backend: str, settings: Settings) -> None:
    run = RunFolder(go(settings(backend, max_steps=2, save_steps=1)).parent)
    assert {path.name for path in run.checkpoints.iterdir()} == {"checkpoint-1", "checkpoint-2"}
    card = (run.composition / "README.md").read_text()
    assert all((folder / "README.md").read_text().startswith(card[:60]) for folder in run.checkpoints.iterdir())
