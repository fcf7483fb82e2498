"""What a composition of two real models costs, and what it costs that m_A reads its own tokens.

    scripts/models                            # the two models, into models/
    python benchmarks/real.py                 # writes benchmarks/results/real_cpu.json, and prints it
    python benchmarks/real.py --rounds 3      # a quick look
    python benchmarks/real.py --anchor DIR --augmenting DIR
    python benchmarks/real.py --compositions pointer=FOLDER      # trained ones beside the others
    python benchmarks/real.py --what decoding --modes eager merged compiled       # both models compiled, too

SmolLM2-135M-Instruct is the anchor, Gemma 3 270M the augmenting model; both in bfloat16. Two compositions of the same
models, one with ``alignment="own"``, one with ``"transcode"``. Two kinds of text: an answer in English after a question
in Devanagari, and the other way round. Regime: one process, all works in turn, medians of the ratios round by round.
The floor is what both models take by themselves: their forward passes for a training step and for a prompt; decoding
token by token, m_A without its head, for a generated token. ``merged``: adapters inside the anchor's weights
(``merge_adapters``). ``compiled``: that, and torch.compile of the steps of both models, alone and in the compositions,
with static caches; m_A's in a composition grows.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measuring import keep, peak_bytes, ratio, take_turns
from transformers import GgufConfig, PreTrainedModel, StaticCache

import calmlm
from calmlm.bases.families import text_config
from calmlm.bases.forms import Form
from calmlm.bases.opening import load_base
from calmlm.experiments.real.joined import Pair, open_trained
from calmlm.experiments.record import device, origin
from calmlm.readers import Inputs
from calmlm.state.past import Past
from calmlm.tokens.lookup import find_tokenizer

MODELS = Path(__file__).parent.parent / "models"
ANCHOR = MODELS / "smollm2-135m-instruct" / "SmolLM2-135M-Instruct.Q4_1.gguf"
AUGMENTING = MODELS / "gemma-3-270m" / "gemma-3-270m-q4_k_m.gguf"
ENGLISH = (
    "The river rises in the mountains and flows through three large cities before it reaches the sea.",
    "Many people in the village keep goats, and in winter they bring them down from the hills.",
    "The old library was built in the nineteenth century and holds more than ten thousand books.",
    "In summer the temperature rises above forty degrees, and the market opens only in the evening.",
)
DEVANAGARI = (
    "नदी पहाड़ों से निकलती है और समुद्र तक पहुँचने से पहले तीन बड़े शहरों से होकर बहती है।",
    "गाँव के बहुत से लोग बकरियाँ पालते हैं और सर्दियों में उन्हें पहाड़ियों से नीचे ले आते हैं।",
    "पुराना पुस्तकालय उन्नीसवीं सदी में बना था और उसमें दस हज़ार से ज़्यादा किताबें हैं।",
    "गर्मियों में तापमान चालीस डिग्री से ऊपर चला जाता है और बाज़ार केवल शाम को खुलता है।",
)
WORKS = ("training step", "prefill", "decoding")
MODES = ("eager", "merged", "compiled")
TEXTS = {
    "English": [(f"{asked}\nEnglish:", f" {answer}") for asked, answer in zip(DEVANAGARI, ENGLISH, strict=True)],
    "Devanagari": [(f"{asked}\nHindi:", f" {answer}") for asked, answer in zip(ENGLISH, DEVANAGARI, strict=True)],
}
ALIGNMENTS = ("own", "transcode")
NEW = 48
GOAL = 1.1


def load(source: Path) -> PreTrainedModel:
    """A model in bfloat16, from a folder or a GGUF file."""
    form = Form(dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True))
    return load_base(str(source), "model", **form.options(str(source))).to(device()).eval()


def rows_of(tokenizer: Any, language: str, count: int) -> dict[str, torch.Tensor]:
    """A batch of texts and their labels, padded on the right."""
    rows = []
    for index in range(count):
        prompt, answer = TEXTS[language][index % len(TEXTS[language])]
        ids = tokenizer(prompt + answer, add_special_tokens=False).input_ids
        rows.append((ids, len(tokenizer(prompt, add_special_tokens=False).input_ids)))
    width = max(len(ids) for ids, _ in rows)
    fill = [(ids + [0] * (width - len(ids)), [-100] * start + ids[start:], len(ids)) for ids, start in rows]
    return {
        "input_ids": torch.tensor([ids for ids, _, _ in fill], device=device()),
        "labels": torch.tensor([labels + [-100] * (width - len(labels)) for _, labels, _ in fill], device=device()),
        "attention_mask": torch.tensor([[1] * n + [0] * (width - n) for _, _, n in fill], device=device()),
    }


@torch.no_grad()
def tokens_read(model: calmlm.CalmForCausalLM, rows: dict[str, torch.Tensor]) -> int:
    """How many tokens the augmenting model reads in a training step, branches included."""
    reader: Any = model.model.reader("augmenting")
    seen: list[int] = []
    reader.run = lambda stream, **given: seen.append(given["input_ids"].numel())
    try:
        told = rows["labels"] == -100
        reader.read(Inputs(rows["input_ids"], rows["attention_mask"], None, told, None, None, told), Past())
    finally:
        del reader.run
    return sum(seen)


def training_step(model: calmlm.CalmForCausalLM, rows: dict[str, torch.Tensor]) -> Callable[[], Any]:
    """Forward, backward, update."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=0.0)

    def step() -> None:
        model.train()
        model(**rows, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def forced(
    model: Any, prompt: torch.Tensor, answer: list[int], config: Any = None, **options: Any
) -> Callable[[], Any]:
    """Decoding, token by token, of a given answer.

    With the configuration of the anchor, or of a model alone, its cache is static, and what is compiled is its steps.
    """

    @torch.no_grad()
    def write() -> None:
        if model.training:
            model.eval()
        given = options | {"use_cache": True, "past_key_values": None}
        if config is not None:
            given["past_key_values"] = StaticCache(config=config, max_cache_len=prompt.shape[1] + len(answer))
        with torch.compiler.set_stance("force_eager"):
            output = model(prompt, **given)
        for index in answer:
            step = torch.tensor([[index]], device=prompt.device)
            output = model(step, **given | {"past_key_values": output.past_key_values})

    return write


def compile_models(pair: Pair, made: dict[str, calmlm.CalmForCausalLM]) -> None:
    """Compile both models, alone and in each composition. There m_A's cache grows."""
    torch._dynamo.config.recompile_limit = 64  # compositions share code, each with shapes of its own
    modules: list[Any] = [pair.anchor, pair.augmenting.get_decoder(), *made.values()]
    for module in modules:
        module.compile()
    for model in made.values():
        augmenting: Any = model.model.augmenting["augmenting"]
        augmenting.get_decoder().compile(dynamic=True)


def made_of(pair: Pair, alignments: list[str], trained: dict[str, Path]) -> dict[str, calmlm.CalmForCausalLM]:
    """The compositions of these models, each with copies of its own; ``trained``: folders of some, by name."""
    made = {}
    for name in alignments:
        copies = copy.deepcopy((pair.anchor, pair.augmenting))
        tokenizers = {"tokenizer": pair.tokenizer, "augmenting_tokenizer": pair.augmenting_tokenizer}
        made[name] = calmlm.compose(*copies, alignment=name, **tokenizers)
    return made | {name: open_trained(folder, copy.deepcopy(pair)) for name, folder in trained.items()}


def works_of(
    pair: Pair, made: dict[str, calmlm.CalmForCausalLM], language: str, batch: int, new: int, static: bool = False
) -> tuple[dict[str, list[Callable[[], Any]]], dict[str, Any]]:
    """What is timed, the compositions first and the floor last, and what it reads."""
    ours, theirs, anchor, small = pair.tokenizer, pair.augmenting_tokenizer, pair.anchor, pair.augmenting
    rows = rows_of(ours, language, batch)
    prompt, answer = TEXTS[language][0]
    ids = torch.tensor([ours(prompt, add_special_tokens=False).input_ids], device=device())
    told = ours(answer, add_special_tokens=False).input_ids[:new]
    own = theirs(prompt + answer).input_ids
    start = len(theirs(prompt).input_ids)
    own_prompt = torch.tensor([own[:start]], device=device())
    own_rows = theirs([p + a for p, a in TEXTS[language]], padding=True, return_tensors="pt").to(device())
    repeated = {key: value.repeat(-(-batch // len(value)), 1)[:batch] for key, value in own_rows.items()}

    @torch.no_grad()
    def floor() -> None:
        anchor.eval()
        anchor(rows["input_ids"], attention_mask=rows["attention_mask"], use_cache=False)
        small.get_decoder()(**repeated, use_cache=False)

    @torch.no_grad()
    def read(model: Any) -> None:
        if model.training:
            model.eval()  # which takes as long as a part of a token
        model(ids, **asked, use_cache=True, logits_to_keep=1)

    @torch.no_grad()
    def read_alone() -> None:
        anchor(ids, use_cache=True, logits_to_keep=1)
        small.get_decoder()(own_prompt, use_cache=True)

    asked = {"prompt_mask": torch.ones_like(ids, dtype=torch.bool)}
    configs = [text_config(model) if static else None for model in (anchor, small)]
    own_answer = own[start : start + len(told)]
    by_both = [forced(anchor, ids, told, configs[0]), forced(small.get_decoder(), own_prompt, own_answer, configs[1])]
    written = [forced(model, ids, told, configs[0], **asked) for model in made.values()]
    works: dict[str, list[Callable[[], Any]]] = {
        "training step": [*(training_step(model, rows) for model in made.values()), floor],
        "prefill": [*(partial(read, model) for model in made.values()), read_alone],
        "decoding": [*written, lambda: [work() for work in by_both]],
    }
    return works, {"rows": rows, "prompt": ids, "answer": told}


def cases_of(
    pair: Pair,
    made: dict[str, calmlm.CalmForCausalLM],
    rounds: int,
    batch: int,
    new: int,
    what: list[str],
    modes: list[str],
) -> list[dict[str, Any]]:
    """All cases of these compositions."""
    cases = []
    for mode in modes:
        for model in made.values() if mode != "eager" else ():
            model.merge_adapters()
        if mode == "compiled":
            compile_models(pair, made)
        for language in TEXTS:
            works, texts = works_of(pair, made, language, batch, new, mode == "compiled")
            for kind in what if mode == "eager" else ["decoding"]:
                cases += timed_cases(kind, works[kind], made, texts, rounds, {"completion": language, "mode": mode})
    return cases


def timed_cases(
    what: str,
    turns: list[Callable[[], Any]],
    made: dict[str, calmlm.CalmForCausalLM],
    texts: dict[str, Any],
    rounds: int,
    where: dict[str, str],
) -> list[dict[str, Any]]:
    """One work of all compositions and the floor, in turn."""
    cases = []
    seconds = take_turns(turns, rounds)
    base = seconds[list(made).index("transcode")] if "transcode" in made else None
    for place, (name, model) in enumerate(made.items()):
        times, spread = ratio(seconds[place], seconds[-1])
        case = {
            "what": what,
            **where,
            "alignment": name,
            "seconds": round(statistics.median(seconds[place]), 3),
            "time_x_floor": round(times, 3),
            "time_x_transcode": round(ratio(seconds[place], base)[0], 3) if base else None,
            "quartile_distance": round(spread, 3),
        }
        if what == "training step":
            case |= {
                "anchor_tokens": int(texts["rows"]["attention_mask"].sum()),
                "augmenting_tokens": tokens_read(model, texts["rows"]),
                "peak_mib": round(peak_bytes(turns[place], model) / 2**20),
            }
        if what == "decoding":
            read = per_step(model, texts["prompt"], texts["answer"])
            case |= {"tokens": len(texts["answer"]), "augmenting_tokens_per_step": read}
        print(case, flush=True)
        cases.append(case)
    return cases


@torch.no_grad()
def per_step(model: calmlm.CalmForCausalLM, prompt: torch.Tensor, answer: list[int]) -> float:
    """How many tokens the augmenting model reads for each generated one."""
    reader: Any = model.model.reader("augmenting")
    seen: list[int] = []
    run = type(reader).run

    def count(stream: Any, **given: Any) -> Any:
        seen.append(given["input_ids"].shape[1])
        return run(reader, stream, **given)

    reader.run = count
    try:
        with torch.compiler.set_stance("force_eager"):
            forced(model, prompt, answer, prompt_mask=torch.ones_like(prompt, dtype=torch.bool))()
    finally:
        del reader.run
    return round(sum(seen[1:]) / max(1, len(answer)), 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=16, help="rows of a training step")
    parser.add_argument("--new", type=int, default=NEW, help="tokens of an answer at most")
    parser.add_argument("--anchor", type=Path, default=ANCHOR)
    parser.add_argument("--augmenting", type=Path, default=AUGMENTING)
    parser.add_argument("--what", nargs="+", default=list(WORKS), choices=WORKS)
    parser.add_argument("--modes", nargs="+", default=["eager"], choices=MODES)
    parser.add_argument("--alignments", nargs="*", default=list(ALIGNMENTS), choices=ALIGNMENTS, help="of default ones")
    parser.add_argument("--compositions", nargs="+", default=[], metavar="NAME=FOLDER", help="trained ones of the two")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / f"real_{device()}.json")
    options = parser.parse_args()
    for path in (options.anchor, options.augmenting):
        if not path.exists():
            parser.error(f"{path} does not exist: run scripts/models, or name the models")
    places = options.anchor, options.augmenting
    pair = Pair(*map(load, places), *map(find_tokenizer, places))
    sizes = options.rounds, options.batch, options.new
    trained = {name: Path(folder) for name, _, folder in (given.partition("=") for given in options.compositions)}
    cases = cases_of(pair, made_of(pair, options.alignments, trained), *sizes, options.what, options.modes)
    result = {
        "benchmark": "real",
        "anchor": options.anchor.stem,
        "augmenting": options.augmenting.stem,
        "dtype": "bfloat16",
        "goal": f"own at most {GOAL} x transcode on English completions",
        "rounds": options.rounds,
        "batch": options.batch,
        "cases": cases,
        **origin(" ".join(["python benchmarks/real.py", *sys.argv[1:]])),
    }
    keep(result, options.output)


if __name__ == "__main__":
    main()
