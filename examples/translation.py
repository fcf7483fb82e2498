"""Write training data for two real models: translations from 40 language varieties into English.

    scripts/models                                   # the two models, into models/
    python examples/translation.py                   # writes runs/translation/, from openlanguagedata/oldi_seed
    python examples/translation.py --data FILE       # the same without a connection
    calmlm train configs/real/train.yaml             # joins the models

The same sentences as in `calmlm repro translation`, seed 0. With --data, they come from a file of JSON lines, packed by
gzip or not, each with one sentence in all varieties: {"eng_Latn": "...", "arz_Arab": "...", ...}.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from calmlm.errors import CalmError
from calmlm.experiments.real.presets import load_settings
from calmlm.experiments.real.world import Item, World, read_sentences

SETTINGS = Path(__file__).parent.parent / "configs" / "real" / "varieties.yaml"


def write(path: Path, items: Sequence[Item]) -> None:
    plain = not any(item.prompt for item in items)
    rows = [{"text": i.target} if plain else {"prompt": i.prompt, "completion": i.completion} for i in items]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{len(items):,} records in {path}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write D_C, what is asked, and plain English.")
    parser.add_argument("--data", default=None, help="a file of sentences; openlanguagedata/oldi_seed by default")
    parser.add_argument("--output", type=Path, default=Path("runs/translation"))
    given = parser.parse_args(arguments)
    settings = load_settings(SETTINGS)
    try:
        world = World(settings, 0, read_sentences(settings, given.data))
    except CalmError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    given.output.mkdir(parents=True, exist_ok=True)
    write(given.output / "train.jsonl", world.composition())
    write(given.output / "eval.jsonl", world.weighed)
    write(given.output / "test.jsonl", world.written)
    write(given.output / "english.jsonl", world.english)
    plain = given.output / "plain.txt"
    plain.write_text("\n".join(world.lines(settings.plain_lines)) + "\n", encoding="utf-8")
    print(f"{settings.plain_lines} lines of English in {plain}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
