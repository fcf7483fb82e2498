"""Writing goes on where it was: a step costs its own tokens, and what is kept changes nothing."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch

import calmlm
import calmlm.tokens.stream
from calmlm.tokens.retokenization import Rewriting
from calmlm.tokens.stream import Rewriter
from compositions import awaken, pad
from tiny import tiny_model
from tokenizers_tiny import AWKWARD
from tokens.test_views import chatty, rendered

OURS, THEIRS = chatty("bytes", "chatml"), chatty("unigram", "chatml")
CASES = [("retokenize", None), ("transcode", "bare"), ("retokenize", "bare"), ("transcode", "template")]


def rewriter(method: str, view: str | None) -> Rewriter:
    return Rewriter(Rewriting.between(OURS, THEIRS, method, view)).eval()


def conversation(view: str | None) -> list[int]:
    if view is None:
        return list(OURS("\n".join(AWKWARD)).input_ids)
    return rendered(OURS, [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(AWKWARD)])


def stepped(writer: Rewriter, ids: list[int], draw: random.Random) -> list[tuple[int, int]]:
    """The stream of calls with a few tokens each, some of which are taken back, as drafts are."""
    out: list[tuple[int, int]] = []
    done = 0
    while done < len(ids):
        length = draw.choice([1, 1, 1, 2, 5, 40])
        new, past = torch.tensor([ids[done : done + length]]), torch.tensor([[-1, *ids[:done]]])
        block = writer(new, torch.ones_like(new, dtype=torch.bool), past)
        accepted = draw.randint(1, new.shape[1])
        pairs = zip(block.ids[0].tolist(), block.owner[0].tolist(), strict=True)
        out += [(token, done + owner) for token, owner in pairs if owner < accepted]
        done += accepted
    return out


@pytest.mark.parametrize(("method", "view"), CASES)
@pytest.mark.parametrize("kept", [1, 3, 4096])
def test_the_stream_of_steps_is_that_of_the_whole_text(
    method: str, view: str | None, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calmlm.tokens.stream, "KEPT", kept)
    writer, ids = rewriter(method, view), conversation(view)
    expected = rewriter(method, view).write(ids)
    assert expected
    for seed in range(3):
        assert stepped(writer, ids, random.Random(seed)) == expected
        assert len(writer._places) <= max(kept, 2)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}], ids=str)
def test_a_step_takes_its_own_tokens_alone(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    made = calmlm.compose(
        tiny_model("llama", vocab_size=len(OURS)),
        tiny_model("gpt2", vocab_size=len(THEIRS)),
        2,
        tokenizer=OURS,
        augmenting_tokenizer=THEIRS,
        alignment="retokenize",
        augmenting_view="bare",
    )
    model = awaken(made)
    rows = [torch.tensor(conversation("bare")[:length]) for length in (60, 43)]
    ids, mask = pad(rows[:1] if "prompt_lookup_num_tokens" in options else rows, "left")
    taken: list[int] = []
    take = calmlm.tokens.stream.TextStream.take

    def counted(self: Any, token: int) -> list[int]:
        taken.append(token)
        return take(self, token)

    monkeypatch.setattr(calmlm.tokens.stream.TextStream, "take", counted)
    settings = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "max_new_tokens": 10}
    model.generate(ids, attention_mask=mask, **settings, **options)
    real, beams = int(mask.sum()), options.get("num_beams", 1)
    # Of a draft it is looked up first what there is room for. From the beginning it would be ten times the prompt.
    assert len(taken) <= (2 * real + 8 * 10 * len(ids)) * beams


def test_a_copy_writes_by_itself() -> None:
    writer, ids = rewriter("retokenize", "bare"), conversation("bare")
    stepped(writer, ids, random.Random(0))
    copied = copy.deepcopy(writer)
    assert not copied._places
    assert stepped(copied, ids, random.Random(1)) == writer.write(ids)
