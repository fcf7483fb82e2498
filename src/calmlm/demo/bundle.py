"""The trained models that come with calmlm, and the questions that none of them has seen.

augmenting/  anchor/  composition/    the models, with the tokenizer
questions.jsonl                       held-out expressions over keys, and their answers
origin.json                           the command that made all this, and from what
"""

from __future__ import annotations

import json
import platform
import shutil
from pathlib import Path
from typing import Any

import calmlm
from calmlm.data.jsonl import read_jsonl
from calmlm.demo import MODELS
from calmlm.errors import ModelError
from calmlm.files.storage import replacing_folder

HOME = MODELS

# What is copied from a seed's folder of the experiment, and the name that it gets here.
STAGES = {"augmenting": "augmenting", "anchor": "anchor", "composed": "composition"}
NEEDED = ("*.safetensors", "config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json")


def check(folder: Path = HOME) -> None:
    """Refuse to go on without the models.

    Raises:
        ModelError: they are not there.
    """
    missing = [name for name in (*STAGES.values(), "questions.jsonl") if not (folder / name).exists()]
    if missing:
        raise ModelError(
            f"Expected the demonstration's models in {folder}, but {', '.join(missing)} is missing; make them with: "
            f"calmlm repro kv-arithmetic --preset tiny --export {folder}."
        )


def questions(folder: Path = HOME) -> list[tuple[str, str]]:
    """The held-out expressions and what they come to."""
    return [(record.fields["prompt"], record.fields["answer"]) for record in read_jsonl(folder / "questions.jsonl")]


def pack(
    preset: str,
    seed: int,
    cache: Path,
    target: Path,
    *,
    max_steps: int | None = None,
    items: int | None = None,
    count: int = 200,
) -> None:
    """Put what a run of the experiment has trained where the demonstration finds it; `target` is replaced as a whole.

    Args:
        preset: of the experiment.
        seed: whose models to take; what is not in `cache` yet is trained now.
        cache: the experiment's folder of finished stages.
        target: the folder to write.
        max_steps: as the experiment was run with.
        items: likewise.
        count: how many held-out expressions to write.
    """
    import torch
    import transformers

    from calmlm.experiments.fitting import preset_of
    from calmlm.experiments.kv_arithmetic.presets import PRESETS
    from calmlm.experiments.kv_arithmetic.run import run_seed
    from calmlm.experiments.kv_arithmetic.world import DC_PHRASINGS, World, final_answer

    settings = preset_of(PRESETS, preset, max_steps, items)
    folder = Path(run_seed(settings, seed, cache, variants=["composed"])["folder"])
    world = World(settings, seed)
    chance = world.rng("demonstration")
    with replacing_folder(target) as fresh:
        for stage, name in STAGES.items():
            (fresh / name).mkdir()
            for pattern in NEEDED:
                for path in (folder / stage).glob(pattern):
                    shutil.copy2(path, fresh / name / path.name)
        with (fresh / "questions.jsonl").open("w", encoding="utf-8") as file:
            for _ in range(count):
                drawn = world.arithmetic(chance, world.unseen_keys, DC_PHRASINGS)
                record = {"prompt": drawn.prompt, "answer": final_answer(drawn.completion)}
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
        origin: dict[str, Any] = {
            "command": f"calmlm repro kv-arithmetic --preset {preset} --seeds {seed} --export src/calmlm/demo/models",
            "preset": preset,
            "seed": seed,
            "calmlm": calmlm.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        }
        (fresh / "origin.json").write_text(json.dumps(origin, indent=2) + "\n", encoding="utf-8")
