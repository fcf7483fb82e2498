"""A comparison of a user's own two models: any family, one tokenizer or two, and what is said where that cannot be."""

from __future__ import annotations

import json
import math
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import GenerationConfig

import calmlm
from calmlm.baselines.given import losses_of
from calmlm.comparison.contract import GRAFTS
from calmlm.comparison.domains.own import OwnModels, _size
from calmlm.comparison.methods import METHODS
from calmlm.comparison.selection import CompareConfig, load_config
from calmlm.comparison.swapping import SWAPPED, Swapped, fit_swapped
from calmlm.comparison.workers import _make_group, run
from calmlm.data.labels import encode_prompt
from calmlm.errors import CalmError, ConfigError, DataError
from calmlm.experiments.fitting import IGNORED, Stage, fit
from calmlm.experiments.flops import Meter
from compositions import awaken
from tiny import tiny_model, tiny_tokenizer
from tokenizers_tiny import tokenizer as tokenizer_of

MERGING = {"soup", "soup_greedy", "fisher", "task_arithmetic", "ties", "dare_ties"}
ANCHORS_TOKENS = {"router", "confidence_cascade", "text_tool", "composed_encoder"}


def save(folder: Path, family: str, tokenizer: Any, seed: int = 0, **overrides: Any) -> str:
    tiny_model(family, seed=seed, vocab_size=len(tokenizer), **overrides).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def write(path: Path, records: list[dict[str, str]]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def sums(count: int) -> list[dict[str, str]]:
    return [{"prompt": f"{i} + {i + 1} =", "completion": f" {2 * i + 1}"} for i in range(count)]


@pytest.fixture
def values(tmp_path: Path) -> dict[str, Any]:
    """What stands in a file, over a Llama and a Mistral with one tokenizer."""
    tokenizer = tiny_tokenizer()
    return {
        "preset": "mine",
        "output": str(tmp_path / "out"),
        "cache": str(tmp_path / "cache"),
        "bases": str(tmp_path / "bases"),
        "workers": 1,
        "domains": {
            "law": {
                "seeds": [0],
                "own": {
                    "model": {
                        "anchor": save(tmp_path / "anchor", "llama", tokenizer),
                        "augmenting": save(tmp_path / "small", "mistral", tokenizer, 1),
                        "connections": "top",
                        "num_heads": 2,
                    },
                    "composition": write(tmp_path / "c.jsonl", sums(20)),
                    "corpus": write(tmp_path / "corpus.jsonl", [{"text": f"item {i} is {i * i}"} for i in range(8)]),
                    "tasks": {
                        "both": {"data": write(tmp_path / "both.jsonl", sums(5)), "stop": "\n"},
                        "near": {"data": str(tmp_path / "both.jsonl"), "metric": "chrf", "skill": "augmenting"},
                        "kept": {"data": str(tmp_path / "both.jsonl"), "skill": "retained"},
                        "bits": {
                            "data": str(tmp_path / "corpus.jsonl"),
                            "metric": "bits_per_byte",
                            "skill": "augmenting",
                        },
                    },
                    "steps": 2,
                    "batch_size": 4,
                    "max_new_tokens": 4,
                },
            }
        },
    }


def config_of(folder: Path, values: dict[str, Any]) -> CompareConfig:
    path = folder / "own.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return load_config(path)


def test_paths_at_home(tmp_path: Path, values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every path of the file, and the file's own."""
    monkeypatch.setenv("HOME", str(tmp_path))

    def at_home(found: Any) -> Any:
        if isinstance(found, dict):
            return {key: at_home(value) for key, value in found.items()}
        if isinstance(found, list):
            return [at_home(value) for value in found]
        return found.replace(str(tmp_path), "~") if isinstance(found, str) else found

    here = values["domains"]["law"]["own"]
    here |= {"vanilla": here["model"]["augmenting"], "twin": here["model"]["anchor"]}
    here["corpus"] = [here["corpus"]]
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(values))
    (tmp_path / "b.yaml").write_text(yaml.safe_dump(at_home(values)))
    assert str(tmp_path) not in (tmp_path / "b.yaml").read_text()
    plain, homely = load_config(tmp_path / "a.yaml"), load_config(Path("~/b.yaml"))
    assert homely.parts == plain.parts
    assert (homely.output, homely.cache, homely.bases) == (plain.output, plain.cache, plain.bases)


def test_what_workers_are_sent(tmp_path: Path, values: dict[str, Any]) -> None:
    """Models of one's own, also once their tokenizers and configurations have been read, and calmlm's experiments."""
    config = config_of(tmp_path, values)
    assert config.parts["law"].own is not None
    assert config.parts["law"].own.tokenizers and config.parts["law"].own.configs
    for each in (config, load_config(Path(__file__).parents[2] / "configs" / "compare" / "small.yaml")):
        work, cells, sent = ForkingPickler.loads(ForkingPickler.dumps((_make_group, each.cells(), each)))
        assert (work, cells, sent) == (_make_group, each.cells(), each)


def own(values: dict[str, Any]) -> dict[str, Any]:
    return values["domains"]["law"]["own"]


def plain_text(folder: Path) -> str:
    (folder / "plain.txt").write_text("\n".join(f"the quick fox {n} jumps over {n * 7} dogs" for n in range(12)))
    return str(folder / "plain.txt")


def domain_of(folder: Path, values: dict[str, Any]) -> OwnModels:
    preset = config_of(folder, values).preset_of("law")
    return OwnModels(preset, 0, folder / "bases" / "own", lambda line: None)


@pytest.mark.slow
def test_every_method_that_fits_runs(tmp_path: Path, values: dict[str, Any], capsys: Any) -> None:
    own(values)["vanilla"] = save(tmp_path / "vanilla", "mistral", tiny_tokenizer(), 2)
    own(values)["model"] |= {"adapters": 2, "plain_text": plain_text(tmp_path)}
    config = config_of(tmp_path, values)
    result = run(config, report=lambda line: None)
    assert capsys.readouterr().out == ""  # what is to be said goes through `report`
    methods = {row["method"] for row in result["rows"]}
    assert methods == set(METHODS) - {"cascade"}
    assert {row["method"] for row in result["pairing"]["law"]} == set(SWAPPED)
    assert result["cells"]["finished"] == result["cells"]["planned"] == len(methods)
    for method in methods:
        rows = {row["task"]: row for row in result["rows"] if row["method"] == method}
        assert {"law/both", "law/near", "law/kept"} <= set(rows)
        assert all(math.isfinite(row["mean"]) for row in rows.values())
        assert ("law/bits" in rows) == (method not in ("router", "confidence_cascade", "text_tool", *SWAPPED))
    assert (tmp_path / "out" / "mine.json").is_file()
    page = (tmp_path / "out" / "mine.md").read_text(encoding="utf-8")
    assert "## law" in page and str(tmp_path / "anchor") in page and "calmlm's own experiments" not in page
    assert {path.stem for path in (tmp_path / "out").glob("*.png")} == {
        "mine-accuracy",
        "mine-forgetting",
        "mine-flops",
    }
    assert "size of D_C" not in page and "5 items of both stand in D_C" in page
    ways = {"composed", "flamingo", "legonn", "composed_map", "composed_pointer", "pointer", *GRAFTS}
    assert {answer["method"] for answer in result["answers"]["law"]} == methods - ways


@pytest.mark.parametrize("theirs", ["bytes", "unigram"])
def test_another_prompt_in_tokens_of_its_own(theirs: str, tmp_path: Path, values: dict[str, Any]) -> None:
    """m_A with learned positions, for which rows are asked one by one, and bits per byte behind prompts."""
    own(values)["model"]["anchor"] = save(tmp_path / "a", "llama", tokenizer_of("bytes"))
    own(values)["model"]["augmenting"] = save(tmp_path / "b", "gpt2", tokenizer_of(theirs))
    own(values)["tasks"]["bits_behind"] = {**own(values)["tasks"]["bits"], "data": own(values)["tasks"]["both"]["data"]}
    domain = domain_of(tmp_path, values)
    model = awaken(domain.compose(domain.base("augmenting"))).eval()
    swapped = Swapped(domain, model)
    found, plain = domain.score(swapped, swapped), domain.score(domain.answerer(model), model)
    assert set(found) == {"both", "near", "kept", "bits_behind"} == set(plain) - {"bits"}
    assert len(found["bits_behind"]) == 5 and found["bits_behind"] != pytest.approx(plain["bits_behind"], rel=1e-4)
    assert len(swapped.read) == 3
    fit_swapped(domain, model.train(), Meter())
    assert all(bool(p.isfinite().all()) for p in model.model.connectors.parameters())


def test_a_control_keeps_the_white_space_that_others_keep(tmp_path: Path, values: dict[str, Any]) -> None:
    """An answer that begins with `stop` is an empty one, whoever writes it."""
    domain = domain_of(tmp_path, values)
    model = domain.compose(domain.base("augmenting")).eval()
    swapped, prompts = Swapped(domain, model), ["hello world", "12 + 34 =", "a fox and a dog"]
    with model.disable_composition():
        found, plain = swapped(prompts), domain.answerer(model)(prompts)
    assert found == plain != [text.strip() for text in plain]


@pytest.mark.slow
def test_two_tokenizers_and_other_families(tmp_path: Path, values: dict[str, Any]) -> None:
    own(values)["model"]["anchor"] = save(tmp_path / "a", "gpt2", tokenizer_of("bytes"), n_embd=36, n_head=4)
    own(values)["model"]["augmenting"] = save(tmp_path / "b", "gpt_neox", tokenizer_of("unigram"))
    config = config_of(tmp_path, values)
    result = run(config, report=lambda line: None)
    methods = {row["method"] for row in result["rows"]}
    assert methods == set(METHODS) - ANCHORS_TOKENS - {"cascade", "composed_vanilla", "moe", *GRAFTS}
    assert methods >= MERGING


def test_the_small_model_answers_in_its_own_tokens(tmp_path: Path, values: dict[str, Any]) -> None:
    own(values)["model"]["augmenting"] = save(tmp_path / "b", "gpt_neox", tokenizer_of("unigram"))
    domain = domain_of(tmp_path, values)
    prompts = ["hello world", "12 + 34 ="]
    theirs = tokenizer_of("unigram")
    expected = []
    for prompt in prompts:
        ids = torch.tensor([encode_prompt(prompt, theirs)])
        written = domain.augmenting.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False
        )
        expected.append(theirs.decode(written[0, ids.shape[1] :], skip_special_tokens=True))
    assert domain.answerer(domain.augmenting)(prompts) == expected
    assert domain.answerer(domain.anchor)(prompts) != expected


def test_answers_end_where_they_are_told_to(tmp_path: Path, values: dict[str, Any]) -> None:
    domain = domain_of(tmp_path, values)
    rights = [record["completion"] for record in sums(5)]

    def complete(prompts: Any, tokens: int | None = None) -> list[str]:
        return [f"{right}\nand more" for right in rights[:-1]] + [f"\n{rights[-1]}"]

    scores = domain.score(complete, None)
    assert scores["both"] == [1.0, 1.0, 1.0, 1.0, 0.0]
    assert scores["kept"] == [0.0] * 4 + [1.0]  # nothing ends these, and spaces around them do not count
    assert "bits" not in scores and 0 < scores["near"][0] < 1


def test_bits_per_byte_are_those_of_the_tokens_one_by_one(tmp_path: Path, values: dict[str, Any]) -> None:
    own(values)["tasks"]["bits"]["data"] = write(tmp_path / "b.jsonl", [{"prompt": "1 +", "completion": " 2 = 3"}])
    domain = domain_of(tmp_path, values)
    ids = domain.tokenizer("1 + 2 = 3").input_ids
    begin = len(domain.tokenizer("1 +").input_ids)
    with torch.no_grad():
        likely = domain.anchor(torch.tensor([ids])).logits[0].log_softmax(-1)
    bits = -sum(float(likely[i - 1, ids[i]]) for i in range(begin, len(ids))) / math.log(2)
    scores = domain.score(lambda prompts, tokens=None: [""] * len(prompts), domain.anchor)
    assert scores["bits"] == pytest.approx([bits / len(" 2 = 3")], rel=1e-5)


def test_what_is_held_out_is_not_trained_on(tmp_path: Path, values: dict[str, Any]) -> None:
    own(values)["composition"] = write(tmp_path / "twice.jsonl", sums(20) * 2)
    own(values)["steps"] = 40
    data = domain_of(tmp_path, values).data
    trained = {tuple(row["input_ids"]) for row in data.composition}
    held = {tuple(row["input_ids"]) for row in data.validation}
    assert not trained & held and len(trained | held) == 20 and len(data.validation) == 8
    assert len(data.composition) == len(data.corpus) == 160
    other = OwnModels(config_of(tmp_path, values).preset_of("law"), 1, tmp_path, lambda line: None).data
    assert other.composition != data.composition


def test_a_cell_is_known_by_the_contents(tmp_path: Path, values: dict[str, Any]) -> None:
    def name() -> str:
        return config_of(tmp_path, values).cells()[0].path(Path()).name

    before = name()
    assert name() == before
    write(tmp_path / "both.jsonl", sums(6))
    changed = name()
    assert changed != before
    tiny_model("llama", seed=3, vocab_size=97).save_pretrained(tmp_path / "anchor")
    assert name() not in (before, changed)


@pytest.mark.parametrize(
    ("path", "value", "mentions"),
    [
        (("own", "tasks"), {}, "at least one"),
        (("own", "tasks", "both", "metric"), "accuracy", "exact_match"),
        (("own", "tasks", "both", "stop"), "", "stop"),
        (("own", "steps"), 0, "steps"),
        (("own", "model", "augmenting"), {"a": "x", "b": "y"}, "one augmenting model"),
        (("own", "model", "refresh"), False, "refresh"),
        (("own", "model", "connector"), {"kind": "flamingo"}, "method of its own"),
        (("own", "model", "anchor"), "nowhere/at-all", "nowhere/at-all"),
        (("own", "composition"), "nothing.jsonl", "nothing.jsonl"),
        (("own", "composition"), [], "list of them is empty"),
        (("own", "corpus"), [], "list of them is empty"),
        (("own", "tasks", "both", "data"), [], "list of them is empty"),
        (("own", "known"), {"contents": {}, "shown": {}, "read": {}, "prompted": True}, "known"),
        (("own", "learning_rate"), 0, "above 0"),
        (("own", "learning_rate"), float("inf"), "above 0"),
        (("own", "weight_decay"), -1.0, "weight_decay"),
        (("own", "max_length"), 10**6, "at most 128"),
        (("own", "model", "connections"), "every-x", "every-x"),
        (("own", "model", "connections"), 100, "100"),
        (("own", "model", "num_heads"), 7, "num_heads"),
        (("own", "model", "connector"), {"ranks": 2}, "ranks"),
        (("own", "model", "alignment"), "guess", "alignment"),
        (("own", "model", "dtype"), "bf16", "dtype"),
        (("own", "model", "dtype"), "int8", "dtype"),
        (("own", "twin"), "nowhere/at-all", "nowhere/at-all"),
        (("own", "vanilla"), "nowhere/at-all", "nowhere/at-all"),
        (("own", "model", "device_map"), "auto", "device_map"),
        (("own", "model", "augmenting"), "nowhere/at-all", "nowhere/at-all"),
        (("methods",), ["cascade"], "text_tool"),
        (("methods",), ["composed_vanilla"], "vanilla"),
        (("methods",), ["lorra"], "lorra"),
        (("ablations",), ["heads=1"], "kv_arithmetic only"),
    ],
)
def test_faults_are_found_before_anything_runs(
    tmp_path: Path, values: dict[str, Any], path: tuple[str, ...], value: Any, mentions: str
) -> None:
    place = values["domains"]["law"]
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(ConfigError, match=mentions):
        config_of(tmp_path, values)


@pytest.mark.parametrize("path", [("model", "anchor"), ("model", "augmenting"), ("vanilla",), ("twin",)], ids="/".join)
def test_compositions_and_adapters_are_no_models_to_compare(
    tmp_path: Path, values: dict[str, Any], path: tuple[str, ...]
) -> None:
    place = own(values)
    for key in path[:-1]:
        place = place[key]
    composition = tmp_path / "composition"
    calmlm.compose(tmp_path / "anchor", tmp_path / "small", 1).save_pretrained(composition)
    write(tmp_path / "adapter_config.json", [{}])
    for folder, mentions in ((composition, "is a composition"), (tmp_path, "without adapters")):
        place[path[-1]] = str(folder)
        with pytest.raises(ConfigError, match=mentions):
            config_of(tmp_path, values)


def test_the_shipped_file_can_be_filled_in(tmp_path: Path, values: dict[str, Any], monkeypatch: Any) -> None:
    shipped = yaml.safe_load((Path(__file__).parents[2] / "configs" / "compare" / "own.yaml").read_text("utf-8"))
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "big-general-model", "llama", tiny_tokenizer())
    save(tmp_path / "small-law-model", "mistral", tiny_tokenizer(), 1)
    for name in ("law-and-general", "law-texts", "law-questions", "law-summaries", "statutes", "arithmetic"):
        write(tmp_path / f"{name}.jsonl", sums(5))
    config = config_of(tmp_path, shipped)
    assert {cell.method for cell in config.cells()} == set(METHODS) - {"cascade", "composed_vanilla", *GRAFTS}


def test_models_that_do_not_fit_are_named(tmp_path: Path, values: dict[str, Any]) -> None:
    model = own(values)["model"]
    own(values)["twin"] = save(tmp_path / "deep", "llama", tiny_tokenizer(), num_hidden_layers=3)
    with pytest.raises(ConfigError, match="twin of the anchor's architecture"):
        config_of(tmp_path, values)
    own(values)["twin"] = save(tmp_path / "twin", "llama", tiny_tokenizer(), 5)
    own(values)["vanilla"] = save(tmp_path / "v", "mistral", tokenizer_of("bytes"))
    with pytest.raises(ConfigError, match="vanilla model with the augmenting model's vocabulary of 97"):
        config_of(tmp_path, values)
    del own(values)["vanilla"]
    config_of(tmp_path, values)
    tiny_model("mistral", vocab_size=120).save_pretrained(tmp_path / "bare")
    with pytest.raises(ConfigError, match="120 entries instead of 97"):
        config_of(tmp_path, {**values, **_with(values, {**model, "augmenting": str(tmp_path / "bare")})})
    tiny_model("mistral").save_pretrained(tmp_path / "same")
    config = config_of(tmp_path, {**values, **_with(values, {**model, "augmenting": str(tmp_path / "same")})})
    assert "no tokenizer of its own" in config.preset_of("law").about


def test_settings_of_the_composition_reach_it(tmp_path: Path, values: dict[str, Any]) -> None:
    model = own(values)["model"]
    model |= {"words": "map", "adapters": 2, "init": "aligned", "plain_text": plain_text(tmp_path)}
    domain = domain_of(tmp_path, values)
    parts = domain.compose(domain.base("augmenting")).model.connectors["augmenting"]
    assert [type(part).__name__ for part in parts[-2:]] == ["WordMap", "Adapters"]
    assert parts[0].gate is not None and parts[0].v_proj.weight.equal(torch.eye(len(parts[0].v_proj.weight)))
    for changed, message in (
        ({"words": "letters"}, "words must be one of"),
        ({"words": {"law": "map"}}, "words must be those of one"),
        ({"plain_text": None}, "init='aligned' needs plain_text"),
        ({"plain_text": str(tmp_path / "none.txt")}, "none.txt"),
        ({"development": "x.jsonl"}, "development: expected the default here"),
    ):
        with pytest.raises(CalmError, match=message):
            config_of(tmp_path, {**values, **_with(values, {**model, **changed})})


def test_a_graft_starts_from_plain_text(tmp_path: Path, values: dict[str, Any]) -> None:
    """It takes words, adapters and connections from the settings, and none of cross-attention's options."""
    with pytest.raises(ConfigError, match="graft cannot be run here, since it needs 'own.model.plain_text'"):
        config_of(tmp_path, {**values, "domains": {"law": {**values["domains"]["law"], "methods": ["graft"]}}})
    model = own(values)["model"]
    model |= {"connector": {"rotary": True, "gate": True}, "words": "map", "adapters": 2}
    model |= {"plain_text": plain_text(tmp_path), "connections": [[0, 1]]}
    domain = domain_of(tmp_path, values)
    assert domain.trained == {}
    fitted = METHODS["graft"].fit(domain, Meter())
    assert fitted.model is not None
    found = fitted.model.config.augmenting["augmenting"]
    assert found["connector"]["kind"] == "graft" and found["connector"]["opened"]
    assert (found["connections"], found["words"]["kind"], "adapters" in found) == ([[0, 1]], "map", True)
    swapped = METHODS["graft_swapped"].fit(domain, Meter()).complete
    assert isinstance(swapped, Swapped) and list(domain.trained) == ["graft"]
    for name, tensor in swapped.model.composition_tensors().items():
        assert torch.equal(tensor, domain.trained["graft"][name])
    model["connections"] = None
    parts = domain_of(tmp_path, values).compose(domain.base("augmenting"), "graft").model.connectors["augmenting"]
    assert [type(part).__name__ for part in parts] == ["Graft", "WordMap", "Adapters"]


def _with(values: dict[str, Any], model: dict[str, Any]) -> dict[str, Any]:
    return {"domains": {"law": {"seeds": [0], "own": {**own(values), "model": model}}}}


def test_what_cannot_be_asked_of_a_method_is_left_out(tmp_path: Path, values: dict[str, Any]) -> None:
    def methods() -> set[str]:
        return {cell.method for cell in config_of(tmp_path, values).cells()}

    assert {"router", "text_tool", "composed_encoder"} <= methods()
    own(values)["loss_on"] = "all"
    assert methods() & ANCHORS_TOKENS == {"text_tool"}
    assert methods() & set(SWAPPED) == {"swapped"}  # a text without a prompt has no other one to train on
    own(values)["tasks"] = {"bits": own(values)["tasks"]["bits"]}
    assert not methods() & ANCHORS_TOKENS
    own(values)["loss_on"] = "completion"
    own(values)["composition"] = write(tmp_path / "m.jsonl", [{"messages": [{"role": "assistant", "content": "a"}]}])
    with pytest.raises(ConfigError, match="but got 'messages'"):
        methods()


def test_answers_are_greedy_and_end_at_any_end(tmp_path: Path, values: dict[str, Any]) -> None:
    anchor = tiny_model("llama", vocab_size=97)
    anchor.generation_config = GenerationConfig(
        do_sample=True, temperature=9.0, num_beams=3, repetition_penalty=5.0, eos_token_id=[2, 40]
    )
    anchor.save_pretrained(tmp_path / "anchor")
    domain = domain_of(tmp_path, values)
    assert domain.anchor.generation_config.eos_token_id == [2, 40]
    ids = domain.tokenizer("1 + 2 =", return_tensors="pt").input_ids
    expected: list[int] = []
    with torch.no_grad():
        while len(expected) < 4 and not set(expected) & {2, 40}:
            logits = anchor(torch.cat((ids, torch.tensor([expected], dtype=torch.long)), dim=1)).logits
            expected.append(int(logits[0, -1].argmax()))
    assert domain.answerer(domain.anchor)(["1 + 2 ="]) == [domain.tokenizer.decode(expected, skip_special_tokens=True)]
    for made in (domain.fresh_anchor(), domain.compose(domain.augmenting)):
        assert made.generation_config.num_beams in (None, 1) and not made.generation_config.do_sample


def test_one_vocabulary_with_two_ends_is_read_with_each_models_own(tmp_path: Path, values: dict[str, Any]) -> None:
    theirs = tiny_tokenizer()
    theirs.eos_token = "!"
    save(tmp_path / "small", "mistral", theirs, 1)
    domain = domain_of(tmp_path, values)
    assert domain.settings.shares_tokenizer
    assert theirs.eos_token_id in domain.augmenting.generation_config.eos_token_id
    assert theirs.eos_token_id not in domain.anchor.generation_config.eos_token_id


def test_a_data_set_is_known_by_its_records(tmp_path: Path, values: dict[str, Any]) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    own(values)["corpus"] = {"dataset": str(folder)}
    names = []
    for count in (6, 7):
        write(folder / "data.jsonl", [{"text": f"line {i}"} for i in range(count)])
        names.append(config_of(tmp_path, values).cells()[0].path(Path()).name)
    assert names[0] != names[1]


def test_how_many_are_answered_together_changes_no_cell(tmp_path: Path, values: dict[str, Any]) -> None:
    names = []
    for size in (4, 16):
        own(values)["evaluation_batch_size"] = size
        names.append(config_of(tmp_path, values).cells()[0].path(Path()).name)
    assert names[0] == names[1]


def test_names_are_checked(tmp_path: Path, values: dict[str, Any]) -> None:
    for name, mentions in (("code", "another name"), ("a/b", "letters, digits"), (2024, "letters, digits")):
        with pytest.raises(ConfigError, match=mentions):
            config_of(tmp_path, {**values, "domains": {name: values["domains"]["law"]}})
    with pytest.raises(ConfigError, match="preset"):
        config_of(tmp_path, {**values, "preset": "../x"})


def test_reasons_name_the_tokenizers_and_the_family(tmp_path: Path, values: dict[str, Any]) -> None:
    own(values)["model"] |= {"anchor": save(tmp_path / "a", "gpt2", tokenizer_of("bytes")), "num_heads": None}
    for method, mentions in (("router", "different tokenizers"), ("moe", "gpt2")):
        values["domains"]["law"]["methods"] = [method]
        with pytest.raises(ConfigError, match=mentions):
            config_of(tmp_path, values)


def test_data_that_does_not_fit_is_named(tmp_path: Path, values: dict[str, Any]) -> None:
    own(values)["tasks"]["both"]["data"] = write(tmp_path / "t.jsonl", [{"text": "a text"}])
    with pytest.raises(ConfigError, match="'prompt' and 'completion' for the metric exact_match"):
        config_of(tmp_path, values)
    own(values)["tasks"]["both"]["data"] = write(tmp_path / "t.jsonl", [{"prompt": "a" * 125, "completion": "b"}])
    with pytest.raises(DataError, match="line 1: expected at most 128 tokens.* 129 with the answer"):
        domain_of(tmp_path, values)
    own(values)["tasks"]["both"]["data"] = str(tmp_path / "both.jsonl")
    own(values)["composition"] = write(tmp_path / "few.jsonl", sums(3))
    with pytest.raises(DataError, match="at least 5"):
        _ = domain_of(tmp_path, values).data


def test_losses_do_not_depend_on_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    rows = [{"input_ids": list(range(3, 8 + i)), "labels": [IGNORED, *range(4, 8 + i)]} for i in range(6)]
    whole = losses_of(model, rows, 0)
    monkeypatch.setattr("calmlm.baselines.given.LOGITS", 2 * 12 * 97)
    assert torch.allclose(losses_of(model, rows, 0), whole, atol=1e-6)


def test_items_of_the_composition_data_are_found_whatever_their_spaces(tmp_path: Path, values: dict[str, Any]) -> None:
    own(values)["composition"] = write(tmp_path / "dc.jsonl", [{"prompt": "1 + 2 =", "completion": " 3"}] * 9)
    own(values)["corpus"] = write(tmp_path / "corpus.jsonl", [{"text": "1 + 2 = 4"}, {"text": "1 + 2 = 5"}] * 9)
    items = [{"prompt": "1 + 2 =", "completion": "3\n"}, {"prompt": "1 + 2", "completion": "= 4"}]
    own(values)["tasks"]["both"]["data"] = write(tmp_path / "both.jsonl", items)
    config = config_of(tmp_path, values)
    known = config.preset_of("law").known
    assert known is not None
    assert known.shown["both"] == known.read["both"] == 1
    about = config.parts["law"].own.about
    assert "**1 items of both stand in D_C.**" in about and "**1 items of both stand in m_A's corpus**" in about


def test_the_first_token_of_a_text_may_be_a_part_of_a_character(tmp_path: Path, values: dict[str, Any]) -> None:
    anchor = save(tmp_path / "bytes", "llama", tokenizer_of("bytes"))
    own(values)["model"] |= {"anchor": anchor, "augmenting": anchor}
    text = "\U0001f600 a"
    own(values)["tasks"]["bits"]["data"] = write(tmp_path / "b.jsonl", [{"text": text}])
    domain = domain_of(tmp_path, values)
    ids = [i for i in domain.tokenizer(text).input_ids if i not in domain.tokenizer.all_special_ids]
    size = _size(domain.tokenizer, ids[0])
    assert size < 4 or len(domain.tokenizer.decode([ids[0]])) == 1
    assert sum(_size(domain.tokenizer, index) for index in ids) == len(text.encode())


def apart(folder: Path, values: dict[str, Any], positions: int, **model: Any) -> None:
    """An augmenting model with letters for tokens and so many learned positions."""
    letters = {"n_positions": positions, "max_position_embeddings": positions}
    own(values)["model"] |= {
        "anchor": save(folder / "long", "llama", tokenizer_of("bytes-large"), max_position_embeddings=400),
        "augmenting": save(folder / "letters", "gpt2", tokenizer_of("characters"), 1, **letters),
        "connections": 1,
        "num_heads": None,
        **model,
    }


def test_an_augmenting_model_with_few_positions_for_its_own_tokens(tmp_path: Path, values: dict[str, Any]) -> None:
    """Padding takes none of them, and answers end with them."""
    apart(tmp_path, values, 36)
    own(values)["tasks"] = {"both": {"data": write(tmp_path / "asked.jsonl", sums(2))}}
    domain = domain_of(tmp_path, values)
    model = domain.compose(domain.augmenting)
    # Half of the rows are long for the anchor, the others for the augmenting model.
    texts = ["hello " * 5, "0123456789" * 3]
    records = [{"prompt": text, "completion": f" {i}"} for i in range(2) for text in texts]
    rows = domain._encoded(write(tmp_path / "c.jsonl", records))
    lengths = {len(row["input_ids"]) for row in rows}
    assert max(lengths) - min(lengths) > 10
    fit(model, rows, domain._pad, Stage(1, 4, 1e-3), 0)
    model.generation_config.eos_token_id = None
    whole = domain.answerer(model)([*texts, "12"], 30)
    assert all(0 < len(domain.tokenizer(text).input_ids) < 30 for text in whole[:2])
    assert domain.answerer(model)(["12"], 30) == whole[2:]


def test_examples_are_counted_as_a_composition_reads_them(tmp_path: Path, values: dict[str, Any]) -> None:
    """The anchor's pieces, written in letters; the whole text in tokens of its own may be shorter."""
    theirs = tokenizer_of("bytes-large")
    apart(tmp_path, values, 36)
    own(values)["model"]["alignment"] = "transcode"
    own(values)["model"]["augmenting"] = save(
        tmp_path / "words", "gpt2", theirs, 1, n_positions=36, max_position_embeddings=36
    )
    own(values)["model"]["anchor"] = save(
        tmp_path / "bytes", "llama", tokenizer_of("characters"), max_position_embeddings=400
    )
    text = "the quick brown fox is playing and jumps over"
    assert len(encode_prompt(text, theirs)) < 20 and len(text) > 36
    lines: list[str] = []
    own(values)["composition"] = write(tmp_path / "c.jsonl", [{"prompt": "the", "completion": text[3:]}] * 20)
    domain = domain_of(tmp_path, values)
    domain.stages.report = lines.append
    rows = domain._encoded(domain.settings.composition, composed=True)
    assert {len(row["input_ids"]) for row in rows} == {36}
    assert lines == ["20 of 20 examples were cut where m_A's context ends, after 36 of its own tokens."]
    own(values)["tasks"] = {"both": {"data": write(tmp_path / "asked.jsonl", [{"prompt": text, "completion": "x"}])}}
    with pytest.raises(DataError, match=r"asked.jsonl, line 1: .* 36 of m_A's own tokens, but got 45"):
        domain_of(tmp_path, values)
    del own(values)["model"]["alignment"]  # its own
    domain = domain_of(tmp_path, values)
    lengths = {len(row["input_ids"]) for row in domain._encoded(domain.settings.composition, composed=True)}
    assert lengths == {len(text) + 1}
