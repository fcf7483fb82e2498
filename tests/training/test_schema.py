"""Training configurations: every fault is named at once, unknown keys get the nearest known one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from calmlm.data.sources import HubDataset
from calmlm.errors import ConfigError
from calmlm.training.backends import argument_types
from calmlm.training.schema import OWNED, ModelConfig, load_config, parse_config

ROOT = Path(__file__).parent.parent.parent


def minimal(**changes: Any) -> dict[str, Any]:
    return {"output": "runs/x", "model": {"anchor": "b", "augmenting": "a"}, "data": {"train": "t.jsonl"}} | changes


def fault(values: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(values)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_minimal() -> None:
    config = parse_config(minimal())
    assert config.backend == "sft"
    assert config.model == ModelConfig(anchor="b", augmenting="a")
    assert config.data.loss_on == "completion"


def test_example_file() -> None:
    config = load_config(ROOT / "configs" / "example.yaml")
    assert config.trainer["learning_rate"] == 3e-4


def test_sources() -> None:
    data = {
        "train": ["a.jsonl", {"dataset": "some/set", "name": "de"}],
        "eval": {"dataset": "some/set", "split": "test"},
    }
    config = parse_config(minimal(data=data))
    assert config.data.train == ["a.jsonl", HubDataset("some/set", "train", "de")]
    assert config.data.eval == HubDataset("some/set", "test")


@pytest.mark.parametrize("connections", ["every-4", "top", 3, [[3, 7], [7, 15]]])
def test_connections(connections: Any) -> None:
    config = parse_config(minimal(model={"anchor": "b", "augmenting": "a", "connections": connections}))
    assert config.model.connections == connections


def test_all_faults_at_once() -> None:
    message = fault(
        {
            "outptu": "runs/x",
            "model": {"anchor": "b", "num_heads": "four", "connector": {"rotery": True}},
            "data": {"train": [], "max_length": 1},
            "trainer": {"learning_rat": 1e-3, "max_length": 5},
        }
    )
    assert message == (
        "The configuration has 9 faults: "
        "'outptu' is no key at the top of the file; did you mean 'output'? "
        "output: expected text, but it is missing. "
        "model.num_heads: expected a whole number, but got 'four'. "
        "'rotery' is no key in 'model.connector'; did you mean 'rotary'? "
        "model.augmenting: expected the id or folder of the augmenting model, but it is missing. "
        "data.train: expected at least one file or data set, but got an empty list. "
        "data.max_length: expected 2 or more, but got 1. "
        "'learning_rat' is no key in 'trainer'; did you mean 'learning_rate'? "
        "trainer.max_length: calmlm sets this itself; set 'data.max_length'."
    )


def test_connector_options() -> None:
    message = fault(minimal(model={"anchor": "b", "augmenting": "a", "connector": {"rotery": True}}))
    assert message == (
        "The configuration has one fault: 'rotery' is no key in 'model.connector'; did you mean 'rotary'?"
    )


def test_missing_parts() -> None:
    message = fault({"output": "runs/x"})
    assert "model: expected a mapping with anchor, augmenting" in message
    assert "data: expected a mapping with train" in message


def test_missing_models() -> None:
    message = fault(minimal(model={"anchor": "b"}))
    assert "model.augmenting: expected the id or folder of the augmenting model, but it is missing." in message


def test_composition_stands_alone() -> None:
    assert parse_config(minimal(model={"composition": "runs/first/composition"})).model.anchor is None
    message = fault(minimal(model={"composition": "c", "anchor": "b", "connections": "top"}))
    assert "model.anchor: expected nothing beside model.composition" in message
    assert "model.connections: expected nothing beside model.composition" in message


@pytest.mark.parametrize(
    ("part", "value", "expected"),
    [
        ("output", 3, "output: expected text, but got 3."),
        ("backend", "ppo", "backend: expected 'sft' or 'trainer', but got 'ppo'."),
        ("trainer", {"learning_rate": "fast"}, "trainer.learning_rate: expected a number, but got 'fast'."),
        ("trainer", {"bf16": "yes"}, "trainer.bf16: expected true or false, but got 'yes'."),
        ("trainer", {"optim": 3}, "trainer.optim: expected OptimizerNames or text, but got 3."),
        ("trainer", [1], "trainer: expected a mapping, but got [1]."),
        ("data", {"train": 3}, "data.train: expected text or a mapping with dataset, split, name, revision or a list"),
        ("data", {"train": {"dataset": "x", "splt": "y"}}, "'splt' is no key in 'data.train'; did you mean 'split'?"),
        (
            "data",
            {"train": "t", "loss_on": "prompt"},
            "data.loss_on: expected 'completion' or 'all', but got 'prompt'.",
        ),
        (
            "model",
            {"anchor": "b", "augmenting": "a", "trust_remote_code": "yes"},
            "expected true or false, but got 'yes'.",
        ),
        (
            "model",
            {"anchor": "b", "augmenting": "a", "connections": [[1, "x"]]},
            "model.connections[0][1]: expected a whole",
        ),
        (
            "model",
            {"anchor": "b", "augmenting": {"law": 3}},
            "model.augmenting.law: expected text or a mapping with id, revision, gguf_file, dtype, device_map, "
            "quantization_config, but got 3.",
        ),
        (
            "model",
            {"anchor": "b", "augmenting": "a", "alignment": {"augmenting": True}},
            "model.alignment.augmenting: expected text, but got True.",
        ),
        (
            "model",
            {"anchor": "b", "augmenting": "a", "connections": True},
            "model.connections: expected text or a whole",
        ),
    ],
)
def test_wrong_values(part: str, value: Any, expected: str) -> None:
    assert expected in fault(minimal(**{part: value}))


@pytest.mark.parametrize("backend", ["sft", "trainer"])
def test_owned_arguments_exist(backend: str) -> None:
    """The list of arguments that calmlm sets itself must not fall behind the trainers."""
    names = argument_types("sft").keys()
    assert set(OWNED) - {"logging_dir"} <= names
    message = fault(minimal(backend=backend, trainer={"output_dir": "x"}))
    assert "trainer.output_dir: calmlm sets this itself; set 'output' at the top of the file." in message


class TestFile:
    def load(self, path: Path, text: str, *overrides: str) -> Any:
        path = path / "c.yaml"
        path.write_text(text, encoding="utf-8")
        return load_config(path, overrides)

    GOOD = "output: runs/x\nmodel: {anchor: b, augmenting: a}\ndata: {train: t.jsonl}\n"

    def test_overrides(self, tmp_path: Path) -> None:
        config = self.load(
            tmp_path, self.GOOD, "trainer.learning_rate=1e-3", "data.train=[a, b]", "model.connections=[[1, 2]]"
        )
        assert config.trainer["learning_rate"] == 1e-3
        assert config.data.train == ["a", "b"]
        assert config.model.connections == [[1, 2]]

    @pytest.mark.parametrize("override", ["data.max_length", "=3", "data..x=3"])
    def test_overrides_that_are_none(self, tmp_path: Path, override: str) -> None:
        with pytest.raises(ConfigError, match="Expected an override as key=value"):
            self.load(tmp_path, self.GOOD, override)

    def test_override_within_no_mapping(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="Expected a mapping at 'output' to set 'output.x' in, but got 'runs/x'"):
            self.load(tmp_path, self.GOOD, "output.x=3")

    def test_no_file(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="Expected a configuration file at .*none.yaml, but there is none"):
            load_config(tmp_path / "none.yaml")

    def test_no_yaml(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"c\.yaml, line 3: expected YAML, but it cannot be read"):
            self.load(tmp_path, "output: x\nmodel: {anchor: b\ndata: }")

    def test_key_given_twice(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"c\.yaml, line 2: .* \(the key 'output' is given twice\)"):
            self.load(tmp_path, "output: x\noutput: y\n")

    @pytest.mark.parametrize("text", ["", "- a\n", "text"])
    def test_no_mapping(self, tmp_path: Path, text: str) -> None:
        with pytest.raises(ConfigError, match="Expected a mapping in"):
            self.load(tmp_path, text)

    @pytest.mark.parametrize(("text", "value"), [("1e-3", 1e-3), ("2.5E+4", 2.5e4), (".5e1", 5.0), ("1e-3x", "1e-3x")])
    def test_numbers(self, tmp_path: Path, text: str, value: Any) -> None:
        config = self.load(tmp_path, self.GOOD, f"trainer.lr_scheduler_kwargs={{x: {text}}}")
        assert config.trainer["lr_scheduler_kwargs"] == {"x": value}


class TestHome:
    """``~`` is the home folder in every path of a configuration, and in nothing else."""

    @pytest.fixture(autouse=True)
    def home(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", "/home/ada")

    def test_every_path(self) -> None:
        config = parse_config(
            {
                "output": "~/runs/x",
                "model": {"anchor": "~/big", "augmenting": {"law": "~/law", "code": "some/id"}},
                "data": {
                    "train": ["~/a.jsonl", {"dataset": "~/set", "name": "~", "split": "~/train"}],
                    "eval": "~/e.jsonl",
                },
                "tokenizer": "~/tokenizer",
                "trainer": {"accelerator_config": "~/a.json", "fsdp_config": "~/f.json", "run_name": "~/no path"},
            }
        )
        assert config.output == "/home/ada/runs/x"
        assert config.model.anchor == "/home/ada/big"
        assert config.model.augmenting == {"law": "/home/ada/law", "code": "some/id"}
        assert config.data.train == ["/home/ada/a.jsonl", HubDataset("/home/ada/set", "~/train", "~")]
        assert config.data.eval == "/home/ada/e.jsonl"
        assert config.tokenizer == "/home/ada/tokenizer"
        assert config.trainer == {
            "accelerator_config": "/home/ada/a.json",
            "fsdp_config": "/home/ada/f.json",
            "run_name": "~/no path",
        }

    def test_other_forms(self) -> None:
        config = parse_config(minimal(model={"composition": "~/c"}, data={"train": {"dataset": "~/set"}}))
        assert config.model.composition == "/home/ada/c"
        assert config.data.train == HubDataset("/home/ada/set")
        assert parse_config(minimal(model={"anchor": "b", "augmenting": "~/a"})).model.augmenting == "/home/ada/a"
        assert parse_config(minimal(trainer={"deepspeed": "~/d.json"})).trainer["deepspeed"] == "/home/ada/d.json"

    def test_read_from_a_file_and_a_command_line(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(tmp_path))
        (tmp_path / "c.yaml").write_text(TestFile.GOOD)
        overrides = ["output=~/x", "data.train=[~/a, ~/b]", "model.anchor=~/big"]
        config = load_config("~/c.yaml", overrides)
        assert config.output == f"{tmp_path}/x"
        assert config.data.train == [f"{tmp_path}/a", f"{tmp_path}/b"]
        assert config.model.anchor == f"{tmp_path}/big"
        assert load_config("~/c.yaml", overrides, "~/y").output == f"{tmp_path}/y"


def test_a_base_with_settings_of_its_own() -> None:
    given = {"id": "~/m", "gguf_file": "x.gguf", "dtype": "bfloat16", "quantization_config": {"quant_method": "gguf"}}
    model = parse_config(
        minimal(model={"anchor": given, "augmenting": {"law": "l", "code": {"id": "c"}}, "dtype": "auto"})
    ).model
    anchor, bases = model.anchor_base, model.augmenting_bases
    assert anchor.name == str(Path("~/m").expanduser() / "x.gguf")
    assert anchor.form.dtype == "bfloat16"
    assert isinstance(bases, dict)
    assert {name: (base.name, base.dtype) for name, base in bases.items()} == {
        "law": ("l", "auto"),
        "code": ("c", "auto"),
    }


@pytest.mark.parametrize(
    ("augmenting", "message"),
    [
        ({"id": "a", "gguf_fil": "x.gguf"}, "did you mean 'gguf_file'"),
        ({"id": "a", "gguf_file": 3}, "model.augmenting"),
        ({"one": {"gguf_file": "x.gguf"}}, "model.augmenting"),
    ],
)
def test_faults_of_a_base(augmenting: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse_config(minimal(model={"anchor": "b", "augmenting": augmenting}))
