"""What reading another tokenizer costs: a training step and a decoded token, with and without an alignment.

    python benchmarks/alignment.py            # writes benchmarks/results/alignment_cpu.json, and prints it
    python benchmarks/alignment.py --rounds 3 # a quick look

Regime: one process, both compositions in turn (A B A B ...), after a warm-up, medians of the ratios round by round.
Both have the same models and connections and read equally many tokens: the second tokenizer has a token for each token
of the first, with other ids. So the ratio is the price of the alignment alone. What was timed is checked: with
``transcode`` both write the same tokens; with ``retokenize``, which reads a word when the next one begins, steps with a
cache give what the whole text gives.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measuring import VOCABULARY, gemma, keep, ratio, take_turns
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

import calmlm
from calmlm.experiments.record import device, origin

CONNECTIONS = [[1, 3], [3, 7], [5, 11]]
NEW = 64
SHAPES = (
    ("transcode", "training step", 4, 128),
    ("transcode", "training step", 8, 256),
    ("transcode", "decoding", 1, 64),
    ("transcode", "decoding", 8, 64),
    ("retokenize", "training step", 4, 128),
    ("retokenize", "decoding", 1, 64),
    ("retokenize", "decoding", 1, 1024),
)
GOAL = 1.03


def tokenizer(order: list[int]) -> PreTrainedTokenizerFast:
    """Words, one token each; ``order`` gives the id of each."""
    special = ["<pad>", "<bos>", "<eos>", "<unk>"]
    words = [*special, *(f"w{k}" for k in range(VOCABULARY - len(special)))]
    backend = Tokenizer(WordLevel(dict(zip(words, order, strict=True)), unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece(prefix="##")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )


def compositions() -> dict[str, calmlm.CalmForCausalLM]:
    """One that shares token ids, and for each alignment one that does not, with the same models and connections."""
    anchor, augmenting = gemma(512, 12, 0), gemma(256, 6, 1)
    shared = calmlm.compose(anchor, augmenting, CONNECTIONS)
    with torch.no_grad():
        for name, parameter in shared.model.connectors.named_parameters():
            if name.endswith("o_proj.weight"):  # an untrained one would add nothing
                parameter.normal_(std=0.02)
    # The same words with other ids, and the augmenting model's rows moved along with them.
    ids = list(range(VOCABULARY))
    moved = [*ids[:4], *reversed(ids[4:])]
    other = copy.deepcopy(augmenting)
    with torch.no_grad():
        other.get_input_embeddings().weight[moved] = augmenting.get_input_embeddings().weight.clone()
    made = {"shared": shared}
    for alignment in ("transcode", "retokenize"):
        made[alignment] = calmlm.compose(
            copy.deepcopy(anchor),
            copy.deepcopy(other),
            CONNECTIONS,
            tokenizer=tokenizer(ids),
            augmenting_tokenizer=tokenizer(moved),
            alignment=alignment,
        )
        made[alignment].load_state_dict(shared.composition_tensors(), strict=False)
        assert made[alignment].config.augmenting["augmenting"]["reads"] == "text"
    return made


@torch.no_grad()
def matches(shared: calmlm.CalmForCausalLM, apart: calmlm.CalmForCausalLM, ids: torch.Tensor) -> bool:
    """Whether the second computes what it should: the same as the first, or step by step the same as at once."""
    apart.eval()
    found = apart(ids, use_cache=False).logits
    reader: Any = apart.model.reader("augmenting")
    if reader.transcoder.lookback is not None:
        return bool(torch.allclose(shared.eval()(ids, use_cache=False).logits, found, atol=1e-4))
    cache, parts = None, []
    for part in (ids[:, :-8], *ids[:, -8:].split(1, dim=1)):
        output = apart(part, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        parts.append(output.logits)
    return bool(torch.allclose(torch.cat(parts, dim=1), found, atol=1e-4))


def training_step(composition: calmlm.CalmForCausalLM, ids: torch.Tensor) -> Callable[[], Any]:
    """Forward, backward, update."""
    trainable = [parameter for parameter in composition.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=0.0)

    def step() -> None:
        composition.train()
        composition(ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def decoding(composition: calmlm.CalmForCausalLM, ids: torch.Tensor) -> Callable[[], Any]:
    """Greedy generation of ``NEW`` tokens."""

    def write() -> torch.Tensor:
        composition.eval()
        return composition.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW, min_new_tokens=NEW
        )

    return write


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / f"alignment_{device()}.json")
    options = parser.parse_args()
    made = compositions()
    shared = made["shared"]
    generator = torch.Generator().manual_seed(0)
    cases = []
    for alignment, what, batch, length in SHAPES:
        apart = made[alignment]
        ids = torch.randint(4, VOCABULARY, (batch, length), generator=generator).to(device())
        make = training_step if what == "training step" else decoding
        works = make(shared, ids), make(apart, ids)
        match = matches(shared, apart, ids)
        if what == "decoding" and alignment == "transcode":
            match = match and torch.equal(works[0](), works[1]())
        seconds = take_turns(works, options.rounds)
        times, spread = ratio(seconds[1], seconds[0])
        case = {
            "alignment": alignment, "what": what, "batch": batch, "length": length,
            "seconds_shared": round(statistics.median(seconds[0]), 5),
            "time_x_shared": round(times, 4), "quartile_distance": round(spread, 4), "match": match,
        }  # fmt: skip
        print(case, flush=True)
        cases.append(case)
    result = {
        "benchmark": "alignment",
        "goal": f"at most {GOAL}",
        "rounds": options.rounds,
        "cases": cases,
        **origin("python benchmarks/alignment.py"),
    }
    keep(result, options.output)


if __name__ == "__main__":
    main()
