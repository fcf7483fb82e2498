"""The command line: exit statuses, one line for each fault, and the way from two models to text."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    PreTrainedTokenizerBase,
    T5Config,
    T5ForConditionalGeneration,
)

import calmlm
from calmlm.cli import main
from calmlm.commands.options import standard_input
from calmlm.data.sources import read_lines
from calmlm.files.inspection import describe
from compositions import tiny_composition
from tiny import tiny_model, tiny_tokenizer
from tokenizers_tiny import tokenizer


@pytest.fixture
def config(tmp_path: Path, anchor_folder: Path, augmenting_folder: Path) -> Path:
    """A configuration file that trains for two steps; its output is `run` beside it."""
    data = tmp_path / "train.jsonl"
    data.write_text("\n".join(json.dumps({"prompt": f"{n}+1=", "completion": str(n + 1)}) for n in range(8)))
    path = tmp_path / "config.yaml"
    values = {
        "output": str(tmp_path / "run"),
        "model": {"anchor": str(anchor_folder), "augmenting": str(augmenting_folder)},
        "data": {"train": str(data)},
        "trainer": {"use_cpu": True, "disable_tqdm": True, "max_steps": 2, "report_to": "none", "learning_rate": 0.1},
    }
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(scope="session")
def composition(tmp_path_factory: pytest.TempPathFactory, anchor_folder: Path, augmenting_folder: Path) -> Path:
    """A saved composition without a tokenizer of its own, whose connectors have an effect."""
    folder = tmp_path_factory.mktemp("composition")
    model = calmlm.compose(str(anchor_folder), str(augmenting_folder), "top")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0.0, 0.5, generator=generator)
    model.save_pretrained(folder)
    return folder


def fault(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """Run a command that must fail: status 2, nothing on stdout, one line for the error on stderr, no traceback."""
    status = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    lines = [line for line in captured.err.replace("\r", "\n").splitlines() if line.startswith("error: ")]
    assert status == 2
    assert captured.out == ""
    assert "Traceback" not in captured.err
    assert len(lines) == 1
    assert captured.err.endswith(lines[0] + "\n"), "the error is the last thing said"
    return lines[0].removeprefix("error: ")


class TestProgram:
    def test_version(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["--version"]) == 0
        assert capsys.readouterr().out.strip() == calmlm.__version__

    def test_help(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["--help"]) == 0
        shown = capsys.readouterr().out
        for command in ("train", "generate", "inspect", "demo", "repro"):
            assert command in shown

    def test_unknown_option(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["generate", "--nonsense"]) == 2
        assert "No such option: --nonsense" in capsys.readouterr().err

    def test_interrupt(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], config: Path) -> None:
        def interrupted(*args: Any, **kwargs: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr("calmlm.training.pipeline.train", interrupted)
        assert main(["train", str(config)]) == 130
        said = capsys.readouterr().err
        assert "Traceback" not in said
        assert said.splitlines()[-1] == "Interrupted."

    @pytest.mark.parametrize("write", ["text", "tensors", "pickled"])
    def test_a_full_disk(
        self, write: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], config: Path
    ) -> None:
        full = Path("/dev/full")
        if not full.is_char_device():
            pytest.skip("this system has no device that is always full")

        def train(*args: Any, **kwargs: Any) -> None:
            if write == "text":
                full.write_text("x" * 100_000, encoding="utf-8")
            elif write == "tensors":  # it would put a file in the device's place
                raise SafetensorError("I/O error: No space left on device (os error 28)")
            else:
                torch.save({"x": torch.zeros(100_000)}, full)

        monkeypatch.setattr("calmlm.training.pipeline.train", train)
        assert "the disk is full" in fault(capsys, "train", config)

    def test_faults_of_ours_keep_their_traceback(self, monkeypatch: pytest.MonkeyPatch, config: Path) -> None:
        def broken(*args: Any, **kwargs: Any) -> None:
            raise ZeroDivisionError

        monkeypatch.setattr("calmlm.training.pipeline.train", broken)
        with pytest.raises(ZeroDivisionError):
            main(["train", str(config)])

    @pytest.mark.slow
    def test_as_a_process(self, tmp_path: Path) -> None:
        environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
        done = subprocess.run(
            [sys.executable, "-m", "calmlm", "generate", str(tmp_path), "--prompt", "x"],
            capture_output=True, text=True, timeout=120, env=environment,
        )  # fmt: skip
        assert done.returncode == 2
        assert done.stdout == ""
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1


class TestTrain:
    def test_train_then_generate(self, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["train", str(config)]) == 0
        folder = capsys.readouterr().out.strip().splitlines()[-1]
        assert folder == str(tmp_path / "run" / "composition")
        assert main(["generate", folder, "--prompt", "1+1=", "--max-new-tokens", "3"]) == 0
        assert capsys.readouterr().out.endswith("\n")

    def test_overrides_and_output(self, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        other = tmp_path / "other"
        assert main(["train", str(config), "trainer.max_steps=1", "backend=trainer", "--output", str(other)]) == 0
        written = yaml.safe_load((other / "config.yaml").read_text())
        assert (written["output"], written["backend"], written["trainer"]["max_steps"]) == (str(other), "trainer", 1)

    def test_resume_and_overwrite(self, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["train", str(config)]) == 0
        capsys.readouterr()
        assert "holds files; name another output" in fault(capsys, "train", config)
        assert main(["train", str(config), "--resume"]) == 0
        assert main(["train", str(config), "--overwrite"]) == 0

    def test_faults_of_the_file(self, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
        message = fault(capsys, "train", config, "data.max_lenght=5", "backend=x")
        assert "has 2 faults:" in message
        assert "'max_lenght' is no key in 'data'; did you mean 'max_length'?" in message

    def test_no_file(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert fault(capsys, "train", tmp_path / "none.yaml").startswith("Expected a configuration file at ")

    @pytest.mark.parametrize(
        ("content", "part"),
        [
            ("", "Expected at least one JSON object in"),
            (
                '{"prompt": "1", "completion": "2"}\n{"prompt": "1"',
                "line 2: expected one JSON object, but got malformed",
            ),
            ('{"prompt": "1", "completion": "2"}\n{"text": "1"}', "line 2: expected 'prompt' and 'completion' as in"),
            (
                json.dumps({"prompt": "1" * 200, "completion": "2"}),
                "line 1: expected a prompt shorter than the context of",
            ),
        ],
    )
    def test_faults_of_the_data(
        self, content: str, part: str, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "train.jsonl").write_text(content)
        assert part in fault(capsys, "train", config)
        assert not (tmp_path / "run").exists()

    def test_unknown_model(self, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        message = fault(capsys, "train", config, "model.anchor=no/such-model")
        assert message.startswith("The anchor must be the id or folder of a causal language model, but 'no/such-model'")
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize(
        ("connections", "part"),
        [
            ("[[0, 50]]", "layer of the anchor must lie between 0 and 4, but got 50"),
            ("[[0, 1], [0, 1]]", "given twice"),
            ("[]", "At least one connection is needed"),
            ("every-5", "connections must be"),
        ],
    )
    def test_connections(
        self, connections: str, part: str, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert part in fault(capsys, "train", config, f"model.connections={connections}")
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize("family", ["bert", "t5"])
    def test_model_that_is_no_decoder(
        self, family: str, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        model: Any
        if family == "bert":
            sizes = {"hidden_size": 20, "num_attention_heads": 2, "intermediate_size": 30, "num_hidden_layers": 4}
            model = BertForMaskedLM(BertConfig(vocab_size=97, **sizes))
        else:
            model = T5ForConditionalGeneration(
                T5Config(vocab_size=97, d_model=20, d_kv=10, d_ff=30, num_layers=2, num_heads=2)
            )
        with torch.no_grad():
            for parameter in model.parameters():  # fresh ones are so small that little passes between positions
                if parameter.dim() == 2:
                    parameter.normal_(0.0, 0.3)
        model.save_pretrained(tmp_path / family)
        message = fault(capsys, "train", config, f"model.augmenting={tmp_path / family}")
        assert message.startswith("The augmenting model must be ")

    def test_an_encoder(self, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """Data of text have no inputs for it; the folder of the run is not begun."""
        sizes = {"hidden_size": 20, "num_attention_heads": 2, "intermediate_size": 30, "num_hidden_layers": 4}
        BertModel(BertConfig(vocab_size=97, **sizes)).save_pretrained(tmp_path / "bert")
        message = fault(capsys, "train", config, f"model.augmenting={{eyes: {tmp_path / 'bert'}}}")
        assert message.startswith("model.augmenting: expected models that read the data's text, but 'eyes'")
        assert not (tmp_path / "run").exists()

    def test_vocabularies_that_do_not_match(
        self, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        tiny_model("llama", vocab_size=50).save_pretrained(tmp_path / "small")
        message = fault(capsys, "train", config, f"model.augmenting={tmp_path / 'small'}")
        assert "vocabularies have 97 and 50 entries" in message

    def test_no_tokenizer(self, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        tiny_model("llama", seed=1).save_pretrained(tmp_path / "bare")
        message = fault(capsys, "train", config, f"model.anchor={tmp_path / 'bare'}")
        assert message.startswith("Text needs a tokenizer, but none was found in ")


class TestGenerate:
    def run(self, capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
        capsys.readouterr()
        assert main(["generate", *map(str, arguments)]) == 0
        return capsys.readouterr().out.removesuffix("\n")

    def expected(self, model: Any, tokenizer: PreTrainedTokenizerBase, prompt: str, count: int) -> str:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)
        return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)

    def test_composition_and_anchor(
        self,
        composition: Path,
        anchor_folder: Path,
        tokenizer: PreTrainedTokenizerBase,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        composed = calmlm.CalmForCausalLM.from_pretrained(composition)
        anchor = AutoModelForCausalLM.from_pretrained(anchor_folder)
        with_composition = self.run(capsys, composition, "--prompt", "12 + 3", "--max-new-tokens", "9")
        without = self.run(capsys, composition, "--prompt", "12 + 3", "--max-new-tokens", "9", "--anchor-only")
        assert with_composition == self.expected(composed, tokenizer, "12 + 3", 9)
        assert (
            self.run(capsys, composition, "--prompt", "12 + 3", "--max-new-tokens", "9", "--draft") == with_composition
        )
        assert without == self.expected(anchor, tokenizer, "12 + 3", 9)
        assert with_composition != without

    def test_adapters_are_merged_and_prompts_guide(
        self,
        composition: Path,
        tokenizer: PreTrainedTokenizerBase,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        bare = calmlm.CalmForCausalLM.from_pretrained(composition)
        merged: list[Any] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(calmlm.CalmForCausalLM, "merge_adapters", lambda model: merged.append(model))
            self.run(capsys, composition, "--prompt", "12 + 3", "--max-new-tokens", "2", "--merge-adapters")
        assert len(merged) == 1
        text = self.run(capsys, composition, "--prompt", "12 + 3", "--max-new-tokens", "9", "--guidance-scale", "5")
        ids = tokenizer("12 + 3", return_tensors="pt")["input_ids"]
        given = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 9, "do_sample": False}
        out = bare.generate(ids, **given, guidance_scale=5.0)
        assert text == tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        arguments = ["generate", str(composition), "--prompt", "a", "--draft", "--guidance-scale", "2"]
        assert main(arguments) != 0
        assert "guidance_scale" in capsys.readouterr().err
        for scale in ("nan", "inf", "-1"):
            assert main(["generate", str(composition), "--prompt", "a", f"--guidance-scale={scale}"]) != 0
            assert "guidance_scale must be from 1, which is none, to 100" in capsys.readouterr().err

    def test_sampling_is_repeatable(self, composition: Path, capsys: pytest.CaptureFixture[str]) -> None:
        texts = [
            self.run(capsys, composition, "--prompt", "a", "--temperature", "2", "--seed", seed)
            for seed in ("1", "1", "2")
        ]
        assert texts[0] == texts[1] != texts[2]

    def test_ends_with_the_context(self, composition: Path, capsys: pytest.CaptureFixture[str]) -> None:
        text = self.run(capsys, composition, "--prompt", "a" * 120, "--max-new-tokens", "1000", "--temperature", "1")
        assert len(text) <= 8

    def test_prompt_fromstandard_input(
        self, composition: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from io import StringIO

        monkeypatch.setattr("sys.stdin", StringIO("12 + 3"))
        piped = self.run(capsys, composition, "--prompt", "-", "--max-new-tokens", "9")
        assert piped == self.run(capsys, composition, "--prompt", "12 + 3", "--max-new-tokens", "9")

    def test_long_prompt(self, composition: Path, capsys: pytest.CaptureFixture[str]) -> None:
        message = fault(capsys, "generate", composition, "--prompt", "a" * 128)
        assert message == "Expected a prompt shorter than the context of 128 tokens, but got 128; shorten it."

    def test_empty_prompt(self, composition: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert "Expected a prompt of at least one token" in fault(capsys, "generate", composition, "--prompt", "")

    def test_device(self, composition: Path, capsys: pytest.CaptureFixture[str]) -> None:
        message = fault(capsys, "generate", composition, "--prompt", "a", "--device", "gpu")
        assert message.startswith("Expected a device that torch can use, but got 'gpu'")
        message = fault(capsys, "generate", composition, "--prompt", "a", "--device", "meta")
        assert message.startswith("Expected a device that torch can use, but got 'meta'")

    def test_no_composition(self, anchor_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        for folder in (anchor_folder, tmp_path, tmp_path / "none"):
            fault(capsys, "generate", folder, "--prompt", "a")

    def test_tokenizer(
        self, tmp_path: Path, anchor_folder: Path, augmenting_folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        tiny_model("llama", seed=1).save_pretrained(tmp_path / "bare")
        calmlm.compose(str(tmp_path / "bare"), str(augmenting_folder)).save_pretrained(tmp_path / "composed")
        message = fault(capsys, "generate", tmp_path / "composed", "--prompt", "a")
        assert message.startswith("Text needs a tokenizer, but none was found in ")
        assert "--tokenizer" in message
        text = self.run(capsys, tmp_path / "composed", "--prompt", "a", "--tokenizer", anchor_folder)
        assert text == self.run(capsys, tmp_path / "composed", "--prompt", "a", "--tokenizer", anchor_folder)
        other = tmp_path / "other"
        tokenizer("bytes-large").save_pretrained(other)
        message = fault(capsys, "generate", tmp_path / "composed", "--prompt", "hello world", "--tokenizer", other)
        assert "ids below 97, the anchor's vocabulary" in message
        rows = tmp_path / "rows.jsonl"
        rows.write_text('{"prompt": "hello", "completion": " world"}\n', encoding="utf-8")
        assert main(["inspect", str(tmp_path / "composed"), "--text", str(rows), "--tokenizer", str(other)]) == 2
        assert "ids below 97, the anchor's vocabulary" in capsys.readouterr().err

    def test_damaged_weights(self, composition: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        for name in ("config.json", "model.safetensors"):
            content = (composition / name).read_bytes()
            (tmp_path / name).write_bytes(content[:-100] if name == "model.safetensors" else content)
        assert "damaged" in fault(capsys, "generate", tmp_path, "--prompt", "a")
        assert "damaged" in fault(capsys, "inspect", tmp_path)


def test_a_terminal_that_is_not_utf8(composition: Path, anchor_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", shown)
    monkeypatch.setattr("calmlm.answering.TextModel.write", lambda self, prompt, emit, **options: emit("caf\u00e9"))
    arguments = ["generate", str(composition), "--prompt", "1", "--tokenizer", str(anchor_folder)]
    assert main(arguments) == 0
    shown.flush()
    assert shown.buffer.getvalue() == b"caf?\n"  # type: ignore[attr-defined]


def test_standard_input_that_is_not_utf8(
    composition: Path, anchor_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9"), encoding="utf-8"))
    told = fault(capsys, "generate", composition, "--prompt", "-", "--tokenizer", anchor_folder)
    assert told == "Expected UTF-8 text on standard input, but byte 3 is none; convert it."


def test_ends_of_lines_onstandard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a\r\nb\rc\n\xc3\xa9")))
    assert standard_input() == "a\nb\nc\n\u00e9"


def test_a_mark_of_byte_order_is_no_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Editors on Windows put one before a file; data files are read without it as well."""
    raw = b"\xef\xbb\xbfcaf\xc3\xa9\r\n\xef\xbb\xbfx"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(raw)))
    assert standard_input() == "caf\u00e9\n\ufeffx"
    (tmp_path / "plain.txt").write_bytes(raw)
    assert read_lines(str(tmp_path / "plain.txt")) == ["caf\u00e9", "\ufeffx"]


def test_a_chat_template_that_is_missing(composition: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_tokenizer(chat_template=None).save_pretrained(tmp_path)
    arguments = ("generate", composition, "--prompt", "1", "--tokenizer", tmp_path, "--apply-chat-template")
    assert "Expected a tokenizer with a chat template" in fault(capsys, *arguments)


def test_a_view_asks_for_conversations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The text alone would be the anchor's: what a view does not show is not read."""
    ours = tiny_tokenizer()
    for name in ("big", "small"):
        tiny_model("llama", vocab_size=len(ours)).save_pretrained(tmp_path / name)
        ours.save_pretrained(tmp_path / name)
    model = calmlm.compose(str(tmp_path / "big"), str(tmp_path / "small"), 1, augmenting_view="bare")
    model.save_pretrained(tmp_path / "viewed")
    arguments = ("generate", tmp_path / "viewed", "--prompt", "1+1", "--max-new-tokens", "2")
    assert "pass --apply-chat-template" in fault(capsys, *arguments)
    assert main([*map(str, arguments), "--apply-chat-template"]) == 0
    assert main([*map(str, arguments), "--anchor-only"]) == 0


def test_inspect(composition: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(composition)]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["composition"] == str(composition)
    assert lines["connections"].startswith("3 -> 4 ")
    assert "LlamaForCausalLM, 5 layers, width 48" in lines["anchor"]
    assert "MistralForCausalLM" in lines["augmenting"]
    trainable, _ = calmlm.CalmForCausalLM.from_pretrained(composition).get_nb_trainable_parameters()
    assert lines["parameters"] == f"{trainable:,}"


GRAFTED: dict[str, Any] = {
    "connector": "graft",
    "init": "aligned",
    "plain_text": ["a fox and a dog, 12 + 34"] * 8,
    "tokenizer": tiny_tokenizer(),
}


@pytest.mark.parametrize("options", [GRAFTED, {}, {"train_map": True}], ids=["graft", "words", "trained words"])
def test_inspect_counts_maps_that_are_not_trained_apart(tmp_path: Path, options: dict[str, Any]) -> None:
    model = tiny_composition("llama", "gpt2", 1, words="map", **options)
    model.save_pretrained(tmp_path)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    sizes = {name: tensor.numel() for name, tensor in model.composition_tensors().items()}
    learned = sum(size for name, size in sizes.items() if name in trained)
    rest = sum(sizes.values()) - learned
    assert (rest == 0) == ("train_map" in options)
    told = f", and {rest:,} of maps that are not trained" if rest else ""
    assert dict(describe(str(tmp_path)))["parameters"] == f"{learned:,}{told}"


def test_inspect_looks_into_an_answer(composition: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = "--json", tmp_path / "new" / "trace.json", "--png", tmp_path / "trace.png"
    given = ("inspect", composition, "--prompt", "7 [b] + 8", "--other-prompt", "x", "--max-new-tokens", "4")
    assert main([*map(str, (*given, *files))]) == 0
    shown = capsys.readouterr().out
    assert "connections" in shown and "7 [b] + 8" in shown and "augmenting 3 → 4" in shown
    found = json.loads(files[1].read_text(encoding="utf-8"))
    assert len(found["tokens"]) == len(found["swapped"]["augmenting"]) == 4
    assert files[3].read_bytes().startswith(b"\x89PNG")
    assert main([*map(str, (*given, "--answer", " = 15"))]) == 0
    assert "= 15" in capsys.readouterr().out
    assert "write --prompt TEXT" in fault(capsys, "inspect", composition, "--png", tmp_path / "other.png")
    assert "write --text FILE" in fault(capsys, "inspect", composition, "--output", tmp_path / "other.json")
    assert "cannot" in fault(capsys, *given, "--json", tmp_path)
    assert not (tmp_path / "other.png").exists()


def test_files_are_written_before_a_pipe_is_closed(
    composition: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `| head` does while a table is printed."""
    monkeypatch.setattr("calmlm.communication.looking.show_trace", lambda *arguments: sys.exit(1))
    given = ("inspect", composition, "--prompt", "7 + 8", "--max-new-tokens", "2", "--json", tmp_path / "trace.json")
    with pytest.raises(SystemExit):
        main([*map(str, given)])
    assert len(json.loads((tmp_path / "trace.json").read_text(encoding="utf-8"))["tokens"]) == 2


def test_seeds_that_are_none(capsys: pytest.CaptureFixture[str]) -> None:
    message = fault(capsys, "repro", "kv-arithmetic", "--preset", "tiny", "--seeds", "one")
    assert message == "Expected seeds as whole numbers from 0 with commas, but got 'one'; write 0,1,2."


class TestHome:
    """A shell leaves ``~`` as it is within quotes and behind ``=``; the program reads it as the home folder."""

    @pytest.fixture(autouse=True)
    def home(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        monkeypatch.setenv("HOME", str(tmp_path))
        return tmp_path

    def caught(self, monkeypatch: pytest.MonkeyPatch, name: str, *command: str) -> dict[str, Any]:
        """What a command passes to the library."""
        found: dict[str, Any] = {}

        def library(*args: Any, **kwargs: Any) -> Any:
            found.update(kwargs, args=args)
            return {}

        monkeypatch.setattr(name, library)
        assert main(list(command)) == 0
        return found

    def test_train(self, config: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["train", "~/config.yaml", "output=~/x", "data.train=~/train.jsonl"]) == 0
        assert capsys.readouterr().out.splitlines()[-1] == str(home / "x" / "composition")
        assert main(["train", "~/config.yaml", "--output=~/y"]) == 0
        assert (home / "y" / "composition").is_dir()
        assert not list((home / "elsewhere").iterdir())

    def test_generate_and_inspect(
        self, composition: Path, anchor_folder: Path, home: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (home / "composed").symlink_to(composition)
        (home / "words").symlink_to(anchor_folder)
        arguments = ["--prompt", "~/1", "--max-new-tokens", "2"]
        assert main(["generate", "~/composed", *arguments, "--tokenizer=~/words"]) == 0
        assert main(["inspect", "~/composed"]) == 0
        assert str(home / "composed") in capsys.readouterr().out

    def test_evaluate(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        found = self.caught(
            monkeypatch, "calmlm.evaluation.harness.evaluate",
            "evaluate", "~/c", "--tasks=~/task.yaml, hellaswag", "--output=~/out/r.json", "--include=~/tasks",
            "--data=~/data", "--tokenizer=~/t",
        )  # fmt: skip
        assert found["args"] == (str(home / "c"), [str(home / "task.yaml"), "hellaswag"])
        assert (found["include"], found["data"], found["tokenizer"]) == (home / "tasks", home / "data", f"{home}/t")
        assert (home / "out" / "r.json").is_file()
        assert not list((home / "elsewhere").iterdir())

    def test_compare(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (home / "c.yaml").write_text("domains: {code: {seeds: [0]}}\noutput: ~/o\ncache: ~/c\nbases: ~/b\n")
        settings = self.caught(monkeypatch, "calmlm.comparison.workers.run", "compare", "~/c.yaml")["args"][0]
        assert (settings.output, settings.cache, settings.bases) == (f"{home}/o", f"{home}/c", f"{home}/b")
        options = ["--output=~/1", "--cache=~/2", "--bases=~/3"]
        settings = self.caught(monkeypatch, "calmlm.comparison.workers.run", "compare", "~/c.yaml", *options)["args"][0]
        assert (settings.output, settings.cache, settings.bases) == (f"{home}/1", f"{home}/2", f"{home}/3")

    @pytest.mark.parametrize("experiment", ["kv_arithmetic", "visual_arithmetic"])
    def test_repro(self, experiment: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        options = ["--preset=tiny", "--output=~/o", "--cache=~/c"]
        packed: list[Any] = []
        monkeypatch.setattr("calmlm.demo.bundle.pack", lambda *args, **kwargs: packed.extend(args))
        options += ["--export=~/e"] if experiment == "kv_arithmetic" else []
        name = f"calmlm.experiments.{experiment}.run.run"
        found = self.caught(monkeypatch, name, "repro", experiment.replace("_", "-"), *options)
        assert found["args"][2:] == (home / "o", home / "c")
        assert packed[2:] == ([home / "c", home / "e"] if packed else [])
        assert bool(packed) == (experiment == "kv_arithmetic")

    def test_repro_real(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        options = [f"--{name}=~/{name}" for name in ("config", "data", "models", "anchor", "augmenting", "output")]
        options += ["--rows=lora, m_B", "--seeds=1,2"]
        found = self.caught(monkeypatch, "calmlm.experiments.real.run.run", "repro", "real", *options)
        assert found["args"] == (home / "config", [1, 2], ["lora", "m_B"], home / "output", home / "models")
        assert found["data"] == home / "data"
        assert (found["anchor"], found["augmenting"]) == (f"{home}/anchor", f"{home}/augmenting")
