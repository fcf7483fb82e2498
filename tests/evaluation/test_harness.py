"""Benchmarks through lm-evaluation-harness, on local slices in the formats of the data sets."""

from __future__ import annotations

import copy
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")

import numpy as np
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers.processors import TemplateProcessing
from transformers import GenerationConfig

import calmlm
from calmlm.cli import main
from calmlm.errors import ConfigError, DataError
from calmlm.evaluation.harness import TASKS, evaluate
from calmlm.evaluation.lm_eval_model import ComposedLM
from calmlm.evaluation.tasks import scoring
from calmlm.evaluation.unfinished import read_stored, settings_of
from compositions import assert_helpful, awaken
from tiny import tiny_model, tiny_tokenizer
from tokenizers_tiny import tokenizer as tokenizer_of

SLICES = Path(__file__).parent / "slices"
OWN = ["calm_humaneval", "calm_mbpp", "calm_code_to_text", "calm_flores_swh_Latn"]


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (SLICES / name).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def composition(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("harness")
    tokenizer = tiny_tokenizer()
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 2048}
    for name, seed in (("anchor", 0), ("augmenting", 1)):
        tiny_model("llama", seed=seed, **sizes).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    model = calmlm.compose(str(folder / "anchor"), str(folder / "augmenting"), connections=1)
    awaken(model).save_pretrained(folder / "composition")
    return str(folder / "composition")


def test_scores_by_hand() -> None:
    for doc in rows("openai_humaneval.test.jsonl"):
        assert scoring.humaneval(doc, [doc["canonical_solution"]]) == {"pass@1": 1.0}
        hostile = "    import os; os._exit(0)\n"
        for wrong in ("    return None\n", "    return (", "", "    raise SystemExit(0)\n", hostile):
            assert scoring.humaneval(doc, [wrong]) == {"pass@1": 0.0}
    doc = rows("mbpp.test.jsonl")[0]
    assert scoring.mbpp(doc, [doc["code"] + "\n[DONE] and more"]) == {"pass@1": 1.0}
    assert scoring.mbpp(doc, ["def add(a, b): return a - b"]) == {"pass@1": 0.0}
    asks = "\nif __name__ == '__main__':\n    n = int(input())\n"
    assert scoring.mbpp(doc, [doc["code"] + asks]) == {"pass@1": 1.0}
    assert scoring.chrf({"target": "one two"}, ["one two"])["chrf"] == pytest.approx(100.0)
    assert scoring.docstring_chrf({"docstring_tokens": ["one", "two"]}, ["xyz"])["chrf"] == 0.0
    assert scoring.docstring_chrf({"docstring_tokens": ["one", "two"]}, ["one two"])["chrf"] == pytest.approx(100.0)


def test_sentences_stand_side_by_side() -> None:
    found = scoring.sentences("swh_Latn", "eng_Latn", "openlanguagedata/flores_plus", folder=str(SLICES))
    assert [(r["source"], r["target"]) for r in found["test"]] == [
        (f"Nina vitabu {i}.", f"I have {i} books.") for i in range(3)
    ]
    assert len(found["dev"]) == 6


@pytest.mark.slow
def test_right_answers_score_full(composition: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the tasks ask for, in the prompts that a model is given, with examples of the right form."""
    asked: dict[str, str] = {}

    def answer(self: Any, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        texts = []
        for request in requests:
            asked[request.task_name] = request.args[0]
            target = request.doc.get("canonical_solution") or request.doc.get("code") or request.doc.get("target")
            texts.append(" ".join(request.doc["docstring_tokens"]) if "docstring" in request.doc else target)
        return texts

    monkeypatch.setattr(HFLM, "generate_until", answer)
    found = evaluate(composition, OWN, data=SLICES, device="cpu")
    best = {"calm_humaneval": "pass@1,none", "calm_mbpp": "pass@1,none"}
    for task in OWN:
        full = 1.0 if task in best else 100.0
        assert found[task][best.get(task, "chrf,none")] == pytest.approx(full)
    assert asked["calm_mbpp"].count("[DONE]") == 3 and asked["calm_mbpp"].endswith("[BEGIN]\n")
    examples = [asked["calm_mbpp"].index(f"adds {number}.") for number in (2, 3, 4)]
    assert examples == sorted(examples)
    question = asked["calm_code_to_text"].split("\n\n")[-1]
    assert question.startswith("def area") and "rectangle" not in question
    assert asked["calm_flores_swh_Latn"].count(" = I have") == 5
    assert asked["calm_flores_swh_Latn"].rstrip().endswith("=")


@pytest.mark.slow
def test_a_composition_is_measured_with_and_without(composition: str, tmp_path: Path) -> None:
    """The log likelihoods are the composition's own; switched off, they are the anchor's."""
    (tmp_path / "texts.jsonl").write_text('{"text": "the cat sat on the mat"}\n', encoding="utf-8")
    (tmp_path / "local_text.yaml").write_text(
        "task: local_text\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'texts.jsonl'}}}}}\n"
        "test_split: test\noutput_type: loglikelihood_rolling\n"
        'doc_to_text: ""\ndoc_to_target: "{{text}}"\nmetric_list: [{metric: bits_per_byte}]\n',
        encoding="utf-8",
    )
    both, alone = (
        evaluate(composition, ["local_text"], include=tmp_path, anchor_only=off, device="cpu")["local_text"]
        for off in (False, True)
    )
    anchor = HFLM(
        pretrained=calmlm.CalmForCausalLM.from_pretrained(composition).anchor, tokenizer=tiny_tokenizer(), device="cpu"
    )
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    plain = simple_evaluate(anchor, tasks=["local_text"], task_manager=TaskManager(include_path=str(tmp_path)))
    assert plain is not None
    name = "bits_per_byte,none"
    assert alone[name] == plain["results"]["local_text"][name]
    assert abs(both[name] - alone[name]) > 1e-4


@pytest.mark.slow
def test_the_command_writes_its_results(composition: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out.json"
    arguments = ["--tasks", "calm_humaneval", "--data", str(SLICES), "--limit", "1", "--device", "cpu"]
    assert main(["evaluate", composition, *arguments, "--output", str(path)]) == 0
    assert "pass@1" in capsys.readouterr().out
    written = json.loads(path.read_text(encoding="utf-8"))
    assert written["results"]["calm_humaneval"]["pass@1,none"] == 0.0
    assert {"commit", "versions", "machine", "command"} <= set(written)


def test_results_are_written_whatever_they_hold(
    composition: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """After hours of measuring, values that JSON has no form for, and a task that fails behind another one."""
    odd = {"a,none": np.float32(0.5), "b,none": math.nan, "c,none": len, "d,none": {1, 2}, "e,none": np.array([1])}

    def measured(model: Any, tasks: list[str], **options: Any) -> dict[str, Any]:
        if tasks == ["calm_mbpp"]:
            raise ZeroDivisionError("division by zero")
        return {"results": {tasks[0]: {**odd, "f,none": {(1, 2): torch.tensor(3)}, "alias": "x"}}}

    monkeypatch.setattr("lm_eval.simple_evaluate", measured)
    path = tmp_path / "out.json"
    arguments = ["--tasks", "calm_humaneval,calm_mbpp", "--data", str(SLICES), "--device", "cpu"]
    assert main(["evaluate", composition, *arguments, "--output", str(path)]) == 2
    printed = capsys.readouterr()
    assert "calm_mbpp came to a ZeroDivisionError" in printed.out
    assert "Expected all tasks to be measured, but calm_mbpp failed" in printed.err
    found = json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda name: pytest.fail(name))["results"]
    expected = {"a,none": 0.5, "b,none": None, "c,none": "<built-in function len>", "d,none": [1, 2], "e,none": [1]}
    assert found["calm_humaneval"] == expected | {"f,none": {"(1, 2)": 3}}
    assert list(found["calm_mbpp"]) == ["failed"]


def test_what_was_measured_outlives_an_interruption(
    composition: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(model: Any, tasks: list[str], **options: Any) -> dict[str, Any]:
        if tasks == ["calm_mbpp"]:
            raise KeyboardInterrupt
        return {"results": {tasks[0]: {"a,none": 0.5}}}

    monkeypatch.setattr("lm_eval.simple_evaluate", measured)
    path = tmp_path / "out.json"
    arguments = ["--tasks", "calm_humaneval,calm_mbpp", "--data", str(SLICES), "--device", "cpu"]
    assert main(["evaluate", composition, *arguments, "--output", str(path)]) == 130
    assert json.loads(path.read_text(encoding="utf-8"))["results"] == {"calm_humaneval": {"a,none": 0.5}}
    assert json.loads(path.read_text(encoding="utf-8"))["to_come"] == ["calm_mbpp"]


def test_a_run_that_was_killed_says_what_is_to_come_and_goes_on(
    composition: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []
    worth = {"calm_code_to_text": 0.25, "calm_humaneval": 0.5, "calm_mbpp": 0.75}
    broken = {"calm_humaneval": ZeroDivisionError, "calm_mbpp": KeyboardInterrupt}

    def measured(model: Any, tasks: list[str], **options: Any) -> dict[str, Any]:
        asked.extend(tasks)
        if tasks[0] in broken:
            raise broken[tasks[0]]
        return {"results": {tasks[0]: {"a,none": worth[tasks[0]]}}}

    monkeypatch.setattr("lm_eval.simple_evaluate", measured)
    whole, path = tmp_path / "whole.json", tmp_path / "out.json"
    command = ["evaluate", composition, "--tasks", ",".join(worth), "--data", str(SLICES), "--device", "cpu"]
    assert main([*command, "--output", str(path), "--resume"]) == 130  # nothing is stored yet
    found = json.loads(path.read_text(encoding="utf-8"))
    assert found["results"] == {"calm_code_to_text": {"a,none": 0.25}}
    assert found["to_come"] == ["calm_humaneval", "calm_mbpp"]
    # Once more: one task works, another fails beside it, which is measured again as well.
    broken = {"calm_mbpp": ZeroDivisionError}
    asked.clear()
    assert main([*command, "--output", str(path), "--resume"]) == 2
    assert asked == ["calm_humaneval", "calm_mbpp"]
    found = json.loads(path.read_text(encoding="utf-8"))
    assert found["to_come"] == []
    assert list(found["results"]["calm_mbpp"]) == ["failed"]
    broken = {}
    asked.clear()
    capsys.readouterr()
    assert main([*command, "--output", str(path), "--resume"]) == 0
    assert asked == ["calm_mbpp"]
    printed = capsys.readouterr().out
    assert all(name in printed for name in worth)
    # The file is that of a run that went through; asked for again, nothing is left to do.
    assert main([*command, "--output", str(whole)]) == 0
    found, expected = (json.loads(file.read_text(encoding="utf-8")) for file in (path, whole))
    assert {key: found[key] for key in ("results", "to_come", "settings")} == {
        key: expected[key] for key in ("results", "to_come", "settings")
    }
    assert found["results"] == {task: {"a,none": value} for task, value in worth.items()}
    asked.clear()
    assert main([*command, "--output", str(path), "--resume"]) == 0
    assert asked == []
    assert json.loads(path.read_text(encoding="utf-8"))["results"] == expected["results"]
    # Without --resume all is measured anew.
    assert main([*command, "--output", str(path)]) == 0
    assert asked == list(worth)


@pytest.mark.parametrize(
    "change", [["--limit", "2"], ["--anchor-only"], ["--swapped"], ["--tasks", "calm_mbpp"]], ids=lambda each: each[0]
)
def test_results_of_other_settings_are_not_gone_on_with(
    change: list[str], composition: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lm_eval.simple_evaluate", lambda model, tasks, **_: {"results": {tasks[0]: {"a": 1.0}}})
    path = tmp_path / "out.json"
    command = ["evaluate", composition, "--tasks", "calm_humaneval", "--data", str(SLICES), "--device", "cpu"]
    assert main([*command, "--output", str(path)]) == 0
    before = path.read_text(encoding="utf-8")
    name = change[0].removeprefix("--").replace("-", "_")
    with pytest.raises(ConfigError) as caught:
        read_stored(path, {**json.loads(before), "settings": {**json.loads(before)["settings"], name: "another"}})
    assert_helpful(caught.value, f"another {name}", str(path))
    assert main([*command, *change, "--output", str(path), "--resume"]) == 2
    assert path.read_text(encoding="utf-8") == before


def test_other_weights_are_not_gone_on_with(composition: str, tmp_path: Path) -> None:
    shutil.copytree(Path(composition).parent, tmp_path / "copy")
    place = tmp_path / "copy" / "composition"
    one = settings_of(str(place), ["a"], limit=None)
    model = calmlm.CalmForCausalLM.from_pretrained(place)
    with torch.no_grad():
        next(iter(model.composition_tensors().values())).mul_(1.5)
    model.save_pretrained(place)
    other = settings_of(str(place), ["a"], limit=None)
    assert {key for key in one if one[key] != other[key]} == {"weights"}


def test_another_prefix_is_not_gone_on_with(composition: str, tmp_path: Path) -> None:
    """All that decides about figures counts, not weights alone."""
    shutil.copytree(Path(composition).parent, tmp_path / "copy")
    place = tmp_path / "copy" / "composition"
    one = settings_of(str(place), ["a"])
    config = json.loads((place / "config.json").read_text())
    next(iter(config["augmenting"].values()))["prefix"] = [1, 2]
    (place / "config.json").write_text(json.dumps(config))
    assert settings_of(str(place), ["a"]) != one


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"results": {}, "to_come": null}',
        '{"results": {}, "to_come": "abc"}',
        '{"results": {}}',
        '{"results": {"a": 1}, "to_come": []}',
        "\x00",
    ],
)
def test_what_does_not_say_what_is_to_come_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    path.write_text(text)
    with pytest.raises(DataError) as caught:
        read_stored(path, {"settings": {}, "versions": {}, "commit": "x"})
    assert_helpful(caught.value, "--resume", str(path))
    assert read_stored(tmp_path / "none.json", {}) is None


def test_going_on_needs_a_file(composition: str, capsys: pytest.CaptureFixture[str]) -> None:
    for output in ([], ["--output", "/dev/null"]):
        assert main(["evaluate", composition, "--tasks", "calm_humaneval", "--resume", *output]) == 2
        assert "Expected the file in which results lie" in capsys.readouterr().err


def composed_lm(tokenizer: Any, anchor: Any = None, **options: Any) -> ComposedLM:
    """A composition in the harness's hands."""
    size = {"vocab_size": len(tokenizer)}
    model = calmlm.compose(
        anchor or tiny_model("llama", **size), tiny_model("mistral", seed=1, **size), connections=1, **options
    )
    return ComposedLM(awaken(model).eval(), tokenizer, 2)


def beginning(tokenizer: Any) -> Any:
    """A tokenizer that begins each text with a token of its own, as Llama's does."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    return tokenizer


def rolling(wrapped: ComposedLM, text: str) -> float:
    request = Instance("loglikelihood_rolling", {}, (text,), 0)
    return float(wrapped.loglikelihood_rolling([request], disable_tqdm=True)[0])


def test_a_text_begins_once() -> None:
    tokenizer = beginning(tokenizer_of("bytes"))
    wrapped = composed_lm(tokenizer)
    ids = tokenizer("hello world").input_ids
    assert ids[0] == tokenizer.bos_token_id
    with torch.no_grad():
        likely = wrapped.model(torch.tensor([ids])).logits[0].log_softmax(-1)
    expected = sum(float(likely[i - 1, ids[i]]) for i in range(1, len(ids)))
    assert rolling(wrapped, "hello world") == pytest.approx(expected, abs=1e-3)
    assert wrapped.tok_encode("hello world") == ids  # elsewhere as before


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece", "unigram", "characters"])
def test_what_is_written_keeps_its_first_space(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    wrapped = composed_lm(tokenizer)
    ids = tokenizer("world hello", add_special_tokens=False).input_ids
    for end in range(1, len(ids)):
        assert tokenizer.decode(ids[:end]) + wrapped.tok_decode(ids[end:]) == "world hello"
    assert wrapped.tok_decode(ids[-1]) == wrapped.tok_decode(ids[-1:])


def test_prompts_alone_give_no_probabilities() -> None:
    tokenizer = tiny_tokenizer()
    wrapped = composed_lm(tokenizer, refresh=False)
    with pytest.raises(ConfigError, match="refresh=False"):
        rolling(wrapped, "abc")
    with wrapped.model.disable_composition():
        assert rolling(wrapped, "abc") < 0


def test_settings_and_context_are_the_compositions(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = tiny_tokenizer()
    anchor = tiny_model("llama", vocab_size=len(tokenizer), max_position_embeddings=64)
    anchor.generation_config = GenerationConfig(repetition_penalty=9.0, num_beams=4, eos_token_id=[2, 5])
    wrapped = composed_lm(tokenizer, anchor)
    settings = wrapped.model.generation_config
    assert settings.num_beams in (None, 1) and settings.repetition_penalty in (None, 1.0)
    assert settings.eos_token_id == [2, 5] and wrapped.max_length == 64
    assert not caplog.records  # the harness would warn of a model that is no name


@pytest.mark.slow
def test_the_machine_is_not_described_by_the_harness(
    composition: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would run git and pip behind each task."""

    def started(command: Any, *arguments: Any, **options: Any) -> Any:
        pytest.fail(f"{command} was started")

    monkeypatch.setattr("subprocess.check_output", started)
    monkeypatch.setattr("torch.utils.collect_env.get_pretty_env_info", lambda: started("pip"))
    found = evaluate(composition, ["calm_code_to_text"], data=SLICES, limit=1, device="cpu")
    assert "chrf,none" in found["calm_code_to_text"]


def test_views_want_the_template(composition: str, tmp_path: Path) -> None:
    both = {name: str(Path(composition).parent / name) for name in ("anchor", "augmenting")}
    calmlm.compose(*both.values(), connections=1, augmenting_view="bare").save_pretrained(tmp_path / "viewed")
    with pytest.raises(ConfigError, match="--apply-chat-template"):
        evaluate(str(tmp_path / "viewed"), ["calm_humaneval"], data=SLICES, device="cpu")


def test_what_cannot_be_run_is_said_in_a_sentence(
    composition: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match="data: expected a folder"):
        evaluate(composition, ["calm_humaneval"], data=tmp_path / "nowhere", device="cpu")
    with pytest.raises(DataError, match=r"there is no .*openai_humaneval.test.jsonl: put it there"):
        evaluate(composition, ["calm_humaneval"], data=tmp_path, device="cpu")
    with pytest.raises(DataError, match=r"there is no .*flores_plus.amh_Ethi.test.jsonl"):
        evaluate(composition, ["calm_humaneval", "calm_flores"], data=SLICES, device="cpu")
    (tmp_path / "none.jsonl").touch()
    asks = {"good": SLICES / "openai_humaneval.test.jsonl", "empty": tmp_path / "none.jsonl"}
    for name, data in asks.items():
        (tmp_path / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
            'output_type: generate_until\ndoc_to_text: "{{prompt}}"\ndoc_to_target: "a"\n'
            "metric_list: [{metric: exact_match}]\n",
            encoding="utf-8",
        )
    with pytest.raises(DataError, match=r"but empty came to a StopIteration \(there may be no documents\)"):
        evaluate(composition, ["good", "empty"], include=tmp_path, device="cpu")
    arguments = ["evaluate", composition, "--tasks", "calm_humaneval", "--data", str(SLICES), "--device", "cpu"]
    assert main([*arguments, "--output", str(tmp_path)]) == 2
    assert "Expected a file that can be written" in capsys.readouterr().err


@pytest.mark.slow
def test_unknown_tasks_are_named(composition: str) -> None:
    with pytest.raises(ConfigError, match="calm_humanval.*calm_humaneval"):
        evaluate(composition, ["calm_humanval"], device="cpu")
    with pytest.raises(ConfigError, match="none"):
        evaluate(composition, [], device="cpu")


def test_every_task_is_listed() -> None:
    names = {path.stem for path in TASKS.glob("calm_*.yaml")}
    assert names >= set(OWN) and sum(name.startswith("calm_flores") for name in names) == 8


@pytest.mark.parametrize("single", ["$A </s>", "<s> $A </s>"])
@pytest.mark.parametrize("ends", [True, False])
def test_what_stands_behind_any_text_is_neither_given_nor_scored(single: str, ends: bool) -> None:
    tokenizer = copy.deepcopy(tokenizer_of("bytes"))
    tokenizer.add_special_tokens({"cls_token": "<s>", "sep_token": "</s>"})
    known = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=known)
    if not ends:
        tokenizer.bos_token = tokenizer.eos_token = None
        tokenizer.pad_token = "</s>"
    if not ends and not single.startswith("<s>"):
        with pytest.raises(ConfigError, match="neither"):
            composed_lm(tokenizer)
        return
    wrapped, before = composed_lm(tokenizer), [known[0][1]] * single.startswith("<s>")

    def plain(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    given, scored = wrapped._encode_pair("the brown", " fox")
    assert given == [*before, *plain("the brown")] and given + scored == [*before, *plain("the brown fox")]
    rows, masks = wrapped.tok_batch_encode(["the brown", "hello world hello"])
    assert rows[0][masks[0].bool()].tolist() == given
    assert rows[1].tolist() == [*before, *plain("hello world hello")]
    cut, _ = wrapped.tok_batch_encode(["hello world hello"], left_truncate_len=3)
    assert cut[0].tolist() == plain("hello world hello")[-3:]
    assert wrapped.tok_encode("the fox</s>")[-1] == known[1][1], "one that stands in the text stays"
    assert wrapped.eot_token_id == known[1][1]
    text = plain("hello world")
    with torch.no_grad():
        likely = wrapped.model(torch.tensor([[wrapped.prefix_token_id, *text]])).logits[0].log_softmax(-1)
    expected = sum(float(likely[place, token]) for place, token in enumerate(text))
    assert rolling(wrapped, "hello world") == pytest.approx(expected, abs=1e-3)
