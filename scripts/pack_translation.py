"""Put a trained composition of the real pair where `calmlm demo translation` finds it.

    calmlm repro translation --rows composed --seeds 0 --keep runs/translation/kept
    python scripts/pack_translation.py runs/translation/kept/composed-seed-0

The examples that m_A reads first are replaced by those of configs/real/train.yaml, which stand in no data set. What
both tokenizers tell is left out: it is made again when the models are loaded.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from calmlm.demo import TRANSLATION
from calmlm.demo.translating import FILES
from calmlm.files.storage import replacing_folder, write_text
from calmlm.tokens.beginning import prefix_ids
from calmlm.tokens.lookup import load_tokenizer
from calmlm.training.schema import load_config

ROOT = Path(__file__).parent.parent
COPIED = ("config.json", "generation_config.json", "model.safetensors", "origin.json")


def main() -> None:
    parser = argparse.ArgumentParser(description="Pack a composition for calmlm demo translation.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--models", type=Path, default=Path("models"))
    given = parser.parse_args()
    text = load_config(ROOT / "configs" / "real" / "train.yaml").model.augmenting_prefix
    assert isinstance(text, str)
    tokenizer = load_tokenizer([str(given.models / FILES["augmenting"])])
    config = json.loads((given.folder / "config.json").read_text(encoding="utf-8"))
    for entry in config["augmenting"].values():
        entry["prefix"] = prefix_ids(tokenizer, text)
    origin = json.loads((given.folder / "origin.json").read_text(encoding="utf-8"))
    origin["packed"] = "python scripts/pack_translation.py"
    with replacing_folder(TRANSLATION / "composition") as fresh:
        for name in COPIED:
            shutil.copy2(given.folder / name, fresh / name)
        write_text(fresh / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
        write_text(fresh / "origin.json", json.dumps(origin, indent=2) + "\n")


if __name__ == "__main__":
    main()
