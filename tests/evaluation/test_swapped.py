"""A benchmark in which the augmenting model reads another document's context, against calls by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")

import torch
from lm_eval.api.instance import Instance

import calmlm
from calmlm.cli import main
from calmlm.controls import beside
from calmlm.errors import ConfigError, DataError
from calmlm.evaluation.harness import evaluate
from calmlm.evaluation.swapped_lm import SwappedLM
from compositions import awaken
from tiny import tiny_model, tiny_tokenizer
from tokenizers_tiny import tokenizer

DOCUMENTS = ["the cat is", "hello world, the quick fox is", "12 + 34 ="]
CHOICES = [" a fox.", " 46 dogs and cats", " x"]
KINDS = ["tokens", "transcode", "own"]


def composed(kind: str) -> SwappedLM:
    ours = tokenizer("bytes")
    theirs = ours if kind == "tokens" else tokenizer("bytes-large")
    anchor = tiny_model("llama", seed=1, vocab_size=len(ours), max_position_embeddings=200)
    own = tiny_model("gpt2", seed=2, vocab_size=len(theirs), max_position_embeddings=200, n_positions=200)
    options = {} if kind == "tokens" else {"alignment": kind}
    made = calmlm.compose(anchor, own, 2, tokenizer=ours, augmenting_tokenizer=theirs, **options)
    return SwappedLM(awaken(made).eval(), ours, 2)


def requests(kind: str, *arguments: tuple[int, tuple[Any, ...]], task: str = "one") -> list[Instance]:
    return [Instance(kind, {}, each, 0, metadata=(task, doc, 1)) for doc, each in arguments]  # type: ignore[arg-type]


def read_by(wrapped: SwappedLM, context: str, tail: list[int]) -> dict[str, Any]:
    """A call for one row: the context, what is read in its place, and the same tokens behind both."""
    ids, other = (wrapped.tok_encode(text) for text in (context, wrapped._contexts[context]))
    return beside(["augmenting"], [[*ids, *tail]], [[*other, *tail]], 0)


@pytest.mark.parametrize("kind", KINDS)
def test_probabilities_by_hand(kind: str) -> None:
    wrapped = composed(kind)
    asked = [(doc, (context, choice)) for doc, context in enumerate(DOCUMENTS) for choice in CHOICES]
    found = wrapped.loglikelihood(requests("loglikelihood", *asked), disable_tqdm=True)
    assert set(wrapped._contexts) == set(wrapped._contexts.values()) == set(DOCUMENTS)
    for (_, (context, choice)), (score, _) in zip(asked, found, strict=True):
        assert wrapped._contexts[context] != context
        _, scored = wrapped._encode_pair(context, choice)
        batch = read_by(wrapped, context, scored)
        columns = torch.arange(batch["input_ids"].shape[1])[None]
        with torch.no_grad():
            logits = wrapped.model(**batch, prompt_mask=columns < columns.shape[1] - len(scored)).logits
        likely = logits[0, -len(scored) - 1 : -1].log_softmax(-1)
        assert score == pytest.approx(float(likely.gather(1, torch.tensor(scored)[:, None]).sum()), abs=1e-3)
        with torch.no_grad():
            plain = wrapped.model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        assert (plain[0, -1] - logits[0, -1]).abs().max() > 1e-3


def test_a_text_that_ends_in_the_token_of_padding_is_no_other() -> None:
    """The harness fills rows up with zeros: each text is found once, the longer one first, as rows come."""
    wrapped = composed("own")
    texts = {(5, 6, 0): "longer", (5, 6): "shorter"}
    wrapped._expect([(None, [*text], [7]) for text in texts])
    assert [wrapped._text_of([5, 6, 0, 0], texts) for _ in texts] == list(texts)
    assert wrapped._text_of([5, 7, 0], texts) is None


@pytest.mark.parametrize("kind", KINDS)
def test_generation_by_hand(kind: str) -> None:
    wrapped = composed(kind)
    settings = {"max_gen_toks": 6, "until": []}
    asked = [(doc, (context, settings)) for doc, context in enumerate(DOCUMENTS)]
    found = wrapped.generate_until(requests("generate_until", *asked), disable_tqdm=True)
    for (_, (context, _)), text in zip(asked, found, strict=True):
        batch = read_by(wrapped, context, [])
        made = wrapped.model.generate(**batch, max_new_tokens=6, do_sample=False, pad_token_id=0)
        assert text == wrapped.tok_decode(made[0, batch["input_ids"].shape[1] :].tolist())


def test_documents_are_paired_within_their_task() -> None:
    wrapped = composed("tokens")
    asked = [(doc, (f"{context} {part}", " x")) for doc, context in enumerate(DOCUMENTS[:2]) for part in ("a", "b")]
    one = requests("loglikelihood", *asked)
    two = requests("loglikelihood", (0, ("fox", " x")), (1, ("dog", " x")), task="two")
    wrapped.loglikelihood([*one, *two], disable_tqdm=True)
    assert wrapped._contexts["fox"] == "dog" and wrapped._contexts["dog"] == "fox"
    assert wrapped._contexts["the cat is a"] == "hello world, the quick fox is a"
    assert wrapped._contexts["the cat is b"] == "hello world, the quick fox is b"


def test_what_has_no_other_context_is_refused() -> None:
    wrapped = composed("tokens")
    with pytest.raises(DataError, match="two different prompts"):
        wrapped.loglikelihood(requests("loglikelihood", (0, ("fox", " x")), (0, ("fox", " y"))), disable_tqdm=True)
    with pytest.raises(ConfigError, match="whole texts"):
        wrapped.loglikelihood_rolling(requests("loglikelihood_rolling", (0, ("fox",))), disable_tqdm=True)
    size = {"vocab_size": len(tokenizer("bytes"))}
    blind = calmlm.compose(tiny_model("llama", **size), tiny_model("gpt2", **size), 2, refresh=False)
    with pytest.raises(ConfigError, match="has none that is switched on"):
        SwappedLM(blind, tokenizer("bytes"), 2)


def test_the_command_names_what_it_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours = tiny_tokenizer()
    for name, seed in (("anchor", 0), ("augmenting", 1)):
        tiny_model("llama", seed=seed, vocab_size=len(ours)).save_pretrained(tmp_path / name)
        ours.save_pretrained(tmp_path / name)
    model = awaken(calmlm.compose(str(tmp_path / "anchor"), str(tmp_path / "augmenting"), 1))
    model.save_pretrained(tmp_path / "composition")
    lines = [json.dumps({"text": text, "answer": " fox"}) for text in DOCUMENTS]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "local.yaml").write_text(
        "task: local\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'texts.jsonl'}}}}}\n"
        "test_split: test\noutput_type: loglikelihood\n"
        'doc_to_text: "{{text}}"\ndoc_to_target: "{{answer}}"\nmetric_list: [{metric: perplexity}]\n',
        encoding="utf-8",
    )
    given = ["evaluate", str(tmp_path / "composition"), "--tasks", "local", "--include", str(tmp_path)]
    output = tmp_path / "out.json"
    assert main([*given, "--device", "cpu", "--swapped", "--output", str(output)]) == 0
    assert "the context of another document" in capsys.readouterr().out
    swapped = json.loads(output.read_text(encoding="utf-8"))["results"]["local"]
    assert swapped["augmenting_models_read"] == "the context of another document"
    plain = evaluate(str(tmp_path / "composition"), ["local"], include=tmp_path, device="cpu")["local"]
    assert "augmenting_models_read" not in plain
    assert plain["perplexity,none"] != pytest.approx(swapped["perplexity,none"], rel=1e-4)
    assert main([*given, "--swapped", "--anchor-only"]) == 2
    assert "--anchor-only beside --swapped" in capsys.readouterr().err
