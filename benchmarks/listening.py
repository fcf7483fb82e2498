"""What a real augmenting model understands inside a composition, for each alignment.

    scripts/models                            # two models, into models/
    python benchmarks/listening.py --data oldi_seed.jsonl.gz     # writes benchmarks/results/listening.json

Gemma 3 270M and SmolLM2-135M-Instruct in bfloat16, each as the augmenting model of the other. The texts are sentences
of OLDI Seed in varieties that Gemma knows and SmolLM2 does not, each with its English: bits per byte of the English
sentence behind ``{source}\\nEnglish:``. The file has one sentence per line in all varieties, with their codes as keys.
"""

from __future__ import annotations

import argparse
import gzip
import json
from pathlib import Path
from typing import Any

from measuring import keep
from real import ANCHOR, AUGMENTING, load

import calmlm
from calmlm.communication import listen
from calmlm.data.formats import read_examples
from calmlm.data.jsonl import Record
from calmlm.data.labels import encode_examples
from calmlm.experiments.record import origin
from calmlm.tokens.lookup import find_tokenizer

VARIETIES = ("arz_Arab", "mag_Deva")
ENGLISH = "eng_Latn"


def sentences(path: Path, variety: str, count: int) -> list[Any]:
    """The first sentences that exist in a variety, as prompts and completions."""
    raw = path.read_bytes()
    text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode()
    rows = [json.loads(line) for line in text.split("\n") if line]
    pairs = [(row[variety], row[ENGLISH]) for row in rows if row.get(variety) and row.get(ENGLISH)]
    texts = [{"prompt": f"{source}\nEnglish:", "completion": f" {english}"} for source, english in pairs[:count]]
    return read_examples(Record(text, f"{path.name}, line {line}") for line, text in enumerate(texts, start=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--anchor", type=Path, default=ANCHOR)
    parser.add_argument("--augmenting", type=Path, default=AUGMENTING)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "listening.json")
    options = parser.parse_args()
    cases = []
    pair = options.anchor, options.augmenting
    for anchor, augmenting in (pair, pair[::-1]):
        ours, theirs = find_tokenizer(anchor), find_tokenizer(augmenting)
        for alignment in ("own", "transcode", "retokenize"):
            model = calmlm.compose(
                load(anchor), load(augmenting), tokenizer=ours, augmenting_tokenizer=theirs, alignment=alignment
            )
            for variety in VARIETIES:
                rows = encode_examples(sentences(options.data, variety, options.rows), ours, max_length=None).rows
                found = listen(model, ours, rows, others=32, augmenting_tokenizers={"augmenting": theirs})
                case = {
                    "anchor": anchor.stem,
                    "augmenting": augmenting.stem,
                    "alignment": alignment,
                    "variety": variety,
                    **found.augmenting["augmenting"].__dict__,
                    "anchor_bits": found.anchor,
                    "anchor_gain": found.anchor_gain,
                    "warnings": found.warnings(),
                }
                print(case, flush=True)
                cases.append(case)
    result = {"benchmark": "listening", "rows": options.rows, "cases": cases}
    result |= origin("python benchmarks/listening.py --data oldi_seed.jsonl.gz")
    keep(result, options.output)


if __name__ == "__main__":
    main()
