"""Write training data for the two demo models: questions over a fifth of the keys, as in the first experiment.

    python examples/keys.py                      # writes runs/keys/train.jsonl, 20,000 records
    calmlm train examples/keys.yaml              # joins the demo models anew

The demo models come from the experiment's preset `small` and seed 0, and so do the keys and their values here.
"""

from __future__ import annotations

import json
from pathlib import Path

from calmlm.experiments.kv_arithmetic.joined import composition_examples
from calmlm.experiments.kv_arithmetic.presets import PRESETS
from calmlm.experiments.kv_arithmetic.world import World

COUNT = 20_000
TARGET = Path("runs/keys/train.jsonl")


def main() -> None:
    world = World(PRESETS["small"], seed=0)
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    with TARGET.open("w", encoding="utf-8") as file:
        for example in composition_examples(world, "composed", COUNT):
            file.write(json.dumps({"prompt": example.prompt, "completion": example.completion}) + "\n")
    print(f"{COUNT:,} records in {TARGET}")


if __name__ == "__main__":
    main()
