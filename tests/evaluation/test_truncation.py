"""lm-evaluation-harness truncates on the left; so it is where an augmenting model counts in tokens of its own."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

pytest.importorskip("lm_eval")

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

import calmlm
from calmlm.data.context import OwnContext, own_contexts
from calmlm.errors import DataError
from calmlm.evaluation.lm_eval_model import ComposedLM
from calmlm.evaluation.truncation import kept, windows
from compositions import awaken, greedy_without_cache
from tiny import tiny_model, tiny_tokenizer
from tokenizers_tiny import tokenizer

TEXT = "hello world, the quick brown fox is playing and jumps over 12 + 34 = 46 lazy dogs. "
pytestmark = pytest.mark.filterwarnings("ignore:The augmenting tokenizer has tokens that reach across")


def composed(family: str = "gpt2", length: int = 40, batch_size: int = 2, **options: Any) -> ComposedLM:
    """An augmenting model with letters for tokens, in the harness's hands."""
    ours, theirs = tokenizer("bytes-large"), tokenizer("characters")
    anchor = tiny_model("llama", vocab_size=len(ours), max_position_embeddings=120)
    sizes = {"max_position_embeddings": length} | ({"n_positions": length} if family == "gpt2" else {})
    small = tiny_model(family, seed=3, vocab_size=len(theirs), **sizes)
    model = calmlm.compose(anchor, small, 2, tokenizer=ours, augmenting_tokenizer=theirs, **options)
    return ComposedLM(awaken(model).eval(), ours, batch_size)


def ask(wrapped: ComposedLM, kind: str, *arguments: tuple[Any, ...]) -> list[Any]:
    return getattr(wrapped, kind)([Instance(kind, {}, each, 0) for each in arguments], disable_tqdm=True)  # type: ignore[arg-type]


@torch.no_grad()
def likelihood(wrapped: ComposedLM, read: list[int], scored: list[int]) -> float:
    ids = torch.tensor([[*read, *scored]])
    likely = wrapped.model(ids[:, :-1], use_cache=False).logits[0].log_softmax(-1)
    return float(likely[len(read) - 1 :].gather(1, torch.tensor(scored)[:, None]).sum())


@pytest.mark.parametrize("alignment", ["transcode", "retokenize"])
def test_a_long_document_is_scored_to_its_end(alignment: str) -> None:
    wrapped = composed(alignment=alignment)
    long, short = TEXT * 8, TEXT[:9]
    ids, first = tokenizer("bytes-large")(long).input_ids, tokenizer("bytes-large").bos_token_id
    assert len(ids) > 120
    found = ask(wrapped, "loglikelihood_rolling", (long,), (short,))
    # The anchor's windows first, each of them then as the augmenting model can read it.
    theirs = list(map(make_disjoint_window, get_rolling_token_windows(ids, first, 120, 1)))
    parts = [part for each in theirs for part in windows(own_contexts(wrapped.model), 120, *each)]
    assert [token for _, scored in parts for token in scored] == ids
    expected = sum(likelihood(wrapped, *part) for part in parts)
    assert found[0] == pytest.approx(expected, rel=1e-4)
    assert found[1] == pytest.approx(likelihood(wrapped, [first], wrapped.tok_encode(short)), rel=1e-4)


@pytest.mark.parametrize("alignment", ["transcode", "retokenize"])
def test_contexts_are_cut_on_the_left(alignment: str) -> None:
    """As much of a context is read as fits; the likelihood is that of the answer behind it."""
    wrapped, long = composed(alignment=alignment), (TEXT * 2).strip()
    ((score, greedy), (other, _)) = ask(wrapped, "loglikelihood", (long, " hello"), ("a fox", " world"))
    whole, _ = wrapped._encode_pair(long, " hello")
    answer = wrapped._encode_pair(long, " hello")[1]
    for start in range(len(whole)):
        try:
            expected = likelihood(wrapped, whole[start:], answer)
            break
        except DataError:
            continue
    assert start > 20
    assert score == pytest.approx(expected, rel=1e-4) and greedy in (True, False)
    assert other == pytest.approx(likelihood(wrapped, *wrapped._encode_pair("a fox", " world")), rel=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_context_is_read_as_a_whole(family: str) -> None:
    """With own tokens the harness's contexts are given text: they are read to their end, whatever comes behind."""
    wrapped = composed(family, length=100, alignment="own")
    questions = [("a fox pl", "aying"), ("a fox", " world, hello"), ("the quick br", "own"), ("the quick br", "eak")]
    for (context, answer), (found, _) in zip(questions, ask(wrapped, "loglikelihood", *questions), strict=True):
        before, scored = wrapped._encode_pair(context, answer)
        ids = torch.tensor([[*before, *scored]])[:, :-1]
        told = torch.arange(ids.shape[1])[None] < len(before)
        with torch.no_grad():
            likely = wrapped.model(ids, prompt_mask=told, use_cache=False).logits[0].log_softmax(-1)
        expected = float(likely[len(before) - 1 :].gather(1, torch.tensor(scored)[:, None]).sum())
        assert found == pytest.approx(expected, rel=1e-4)


def test_a_long_answer_is_scored_in_parts() -> None:
    wrapped = composed()
    ((score, greedy),) = ask(wrapped, "loglikelihood", ("a fox", " " + TEXT.strip()))
    parts = windows(own_contexts(wrapped.model), 120, *wrapped._encode_pair("a fox", " " + TEXT.strip()))
    assert len(parts) > 1 and not greedy
    assert score == pytest.approx(sum(likelihood(wrapped, *part) for part in parts), rel=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_prompts_are_cut_and_answers_end_with_the_positions(family: str, batch_size: int) -> None:
    wrapped = composed(family, batch_size=batch_size)
    settings: dict[str, Any] = {"until": ["#"], "max_gen_toks": 12}
    prompts = [TEXT * 2, "hello", TEXT[:20]]
    found = ask(wrapped, "generate_until", *((prompt, dict(settings)) for prompt in prompts))
    for prompt, answer in zip(prompts, found, strict=True):
        ids = kept(own_contexts(wrapped.model), wrapped.tok_encode(prompt), 12)
        assert (len(ids) < len(wrapped.tok_encode(prompt))) is (prompt == prompts[0])
        row = torch.tensor([ids])
        for _ in range(12):
            try:
                row = greedy_without_cache(wrapped.model, row, 1)
            except DataError:
                break
        assert wrapped.tok_decode(row[0, len(ids) :].tolist()).startswith(answer) and answer
    # More than there is room for in half of the positions: what fits is written.
    assert ask(wrapped, "generate_until", (TEXT * 2, {"until": ["#"], "max_gen_toks": 100}))[0]
    assert ask(wrapped, "generate_until", ("hello", {"until": ["#"], "max_gen_toks": 20, "num_beams": 2}))[0]


def test_the_anchor_alone_is_asked_as_ever() -> None:
    wrapped = composed()
    plain = HFLM(pretrained=wrapped.model.anchor, tokenizer=tokenizer("bytes-large"), device="cpu", max_length=120)
    prompt = (TEXT, {"until": ["#"], "max_gen_toks": 6})
    with wrapped.model.disable_composition():
        assert ask(wrapped, "loglikelihood", (TEXT, " fox")) == ask(plain, "loglikelihood", (TEXT, " fox"))
        assert len(ask(wrapped, "generate_until", prompt)[0]) > 0


def test_a_model_that_reads_prompts_reads_their_ends() -> None:
    ours = tiny_tokenizer()
    small = tiny_model("gpt2", seed=3, n_positions=12, max_position_embeddings=12)
    model = awaken(calmlm.compose(tiny_model("llama", max_position_embeddings=100), small, 2, refresh=False)).eval()
    wrapped = ComposedLM(model, ours, 2)
    settings: dict[str, Any] = {"until": ["#"], "max_gen_toks": 30}
    long, short = ask(wrapped, "generate_until", (TEXT, dict(settings)), ("hello", dict(settings)))
    same, alone = ask(wrapped, "generate_until", (TEXT[-12:], dict(settings)), ("hello", dict(settings)))
    assert long == same and short == alone and len(long) > 12


@pytest.mark.parametrize("batch_size", [1, 2])
def test_what_has_no_tokens_is_the_beginning_of_a_text(batch_size: int) -> None:
    """An empty prompt, and a context of white space, which the harness gives to what follows."""
    wrapped = composed(batch_size=batch_size)
    first = wrapped.prefix_token_id
    ((score, _), _) = ask(wrapped, "loglikelihood", (" ", "hello"), ("a fox", " world"))
    assert score == pytest.approx(likelihood(wrapped, [first], wrapped.tok_encode(" hello")), rel=1e-4)
    settings: dict[str, Any] = {"until": ["#"], "max_gen_toks": 4}
    (written, _) = ask(wrapped, "generate_until", ("", dict(settings)), ("hello", dict(settings)))
    expected = greedy_without_cache(wrapped.model, torch.tensor([[first]]), 4)[0, 1:]
    assert written == wrapped.tok_decode(expected.tolist()).split("#")[0]


def test_a_token_that_never_fits_is_said_to() -> None:
    (context,) = own_contexts(composed().model)
    tiny = OwnContext(context.name, 0, True, context.writer)
    with pytest.raises(DataError, match="single tokens fit into the context of 'augmenting'"):
        windows([tiny], 120, [5, 6], [7])


def test_the_model_goes_to_other_processes() -> None:
    wrapped = composed()
    again = pickle.loads(pickle.dumps(wrapped))
    request = ("a fox", " world")
    assert ask(again, "loglikelihood", request) == ask(wrapped, "loglikelihood", request)
