"""Whether compositions are as good when everything that saves time and memory is switched on.

    python benchmarks/quality.py --experiment keys --seeds 0,1,2
    scripts/models && python examples/translation.py && python benchmarks/quality.py --experiment real
    python benchmarks/quality.py --stored-only          # writes benchmarks/results/quality.json

``keys``: the key-value experiment (docs/key-value.md), exact match in per cent. ``real``: the recipe of
configs/real/train.yaml, bits per byte of the English sentences that no training has seen. ``plain``: transformers'
Trainer, padded batches, all logits, all activations kept. ``saving``: ``backend: sft`` with rows of a batch as one row
without padding, logits where there are labels, an activation cache, the anchor's layers recomputed but for their matrix
products; the real pair trains in bfloat16 both times. ``even`` and ``top`` are other connections, trained as ``plain``.

Each training is stored under runs/quality/ when it is done, and never repeated. Figures of an earlier result
that are not stored, of other seeds or another machine, stay in the result; ``origins`` names the runs behind it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measuring import keep
from transformers import DataCollatorForSeq2Seq, Trainer, set_seed

import calmlm
from calmlm.communication.excerpts import Excerpt
from calmlm.communication.losses import nats_of
from calmlm.data.labels import encode_examples
from calmlm.data.sources import load_examples
from calmlm.experiments.fitting import in_batches, preset_of
from calmlm.experiments.kv_arithmetic.joined import compose_bases, composition_examples
from calmlm.experiments.kv_arithmetic.measures import COLUMNS, columns, models, score
from calmlm.experiments.kv_arithmetic.presets import PRESETS
from calmlm.experiments.kv_arithmetic.rows import encode
from calmlm.experiments.kv_arithmetic.run import SeedRun
from calmlm.experiments.real.resampling import Figures, bits_of, difference
from calmlm.experiments.record import origin
from calmlm.experiments.statistics import rows_of
from calmlm.files.storage import write_text
from calmlm.tokens.lookup import load_tokenizer
from calmlm.tokens.spelling import token_bytes
from calmlm.training.activation_cache import ActivationCache
from calmlm.training.backends import make_arguments, make_trainer, train_with
from calmlm.training.cache_settings import CacheConfig
from calmlm.training.pipeline import train
from calmlm.training.run_folder import RunFolder
from calmlm.training.schema import load_config

SAVING = {
    "padding_free": True,
    "activation_checkpointing": True,
    "activation_checkpointing_kwargs": {"keep": "matmuls"},
}
KEYS: dict[str, tuple[Any, bool]] = {
    "plain": ([(3, 0), (3, 1)], False),
    "saving": ([(3, 0), (3, 1)], True),
    "even": ([(1, 1), (3, 3)], False),
    "top": ([(2, 2), (3, 3)], False),
}
"""Connections and whether everything is switched on; the first two are the experiment's own."""
BUDGET = "1GiB"
RECIPE = Path("configs/real/train.yaml")
TESTS = "runs/translation/test.jsonl"


def stored(path: Path, work: Callable[[], dict[str, Any]], *, only: bool) -> dict[str, Any] | None:
    """What ``work`` gives, made once."""
    if path.is_file():
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found
    if only:
        return None
    print(f"{path.stem} ...", flush=True)
    made = work() | origin("python benchmarks/quality.py")
    write_text(path, json.dumps(made) + "\n")
    return made


def train_keys(name: str, here: SeedRun) -> dict[str, Any]:
    """Train one composition of the key-value experiment, and ask it."""
    connections, saving = KEYS[name]
    world, tokenizer = here.world, here.tokenizer("anchor")
    stage = world.preset.composition
    model = compose_bases(world, here.base("anchor"), here.base("augmenting"), connections=connections)
    rows = in_batches(encode(composition_examples(world, "composed"), tokenizer), stage.batch_size, world.seed)
    folder = RunFolder(here.folder / "quality" / name)
    given = {
        "max_steps": stage.steps, "per_device_train_batch_size": stage.batch_size, "weight_decay": stage.weight_decay,
        "learning_rate": stage.learning_rate, "lr_scheduler_type": "cosine", "warmup_steps": min(50, stage.steps // 10),
        "adam_beta2": 0.98, "optim": "adamw_torch_fused", "train_sampling_strategy": "sequential", "seed": world.seed,
        "save_strategy": "no", "report_to": "none", "logging_steps": max(1, stage.steps // 20), "disable_tqdm": True,
    }  # fmt: skip
    set_seed(world.seed)
    if saving:
        arguments = make_arguments("sft", given | SAVING, folder, evaluates=False)
        settings = CacheConfig("memory", budget=BUDGET)
        cache = ActivationCache(settings, model, folder.path / "unused", print, "none")
        trainer = make_trainer("sft", model, arguments, tokenizer, rows, None, folder)
        with cache.recording():
            train_with(trainer, None)
    else:
        arguments = make_arguments("trainer", given, folder, evaluates=False)
        collate = DataCollatorForSeq2Seq(tokenizer)
        trainer = Trainer(model, arguments, train_dataset=rows, data_collator=collate)
        trainer.train()
    losses = [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    scores = score(models(model.eval(), tokenizer, here.max_new_tokens), columns(world))
    return {"losses": losses, "scores": scores, "connections": connections}


def train_real(name: str, folder: Path, steps: int | None) -> dict[str, Any]:
    """Train the recipe of the real pair, and read sentences that it has not seen."""
    changed = ["data.eval=null", "trainer.save_strategy=no", "trainer.disable_tqdm=true"]
    if name == "saving":
        changed += ["backend=sft", *(f"trainer.{key}={json.dumps(value)}" for key, value in SAVING.items())]
        changed += [f"activation_cache={{mode: memory, budget: {BUDGET}}}"]
    if steps:
        changed += [f"trainer.max_steps={steps}"]
    result = train(load_config(RECIPE, changed, str(folder)), overwrite=True)
    model = calmlm.CalmForCausalLM.from_pretrained(result.composition, dtype=torch.bfloat16).eval()
    tokenizer = load_tokenizer([str(result.composition)])
    rows = encode_examples(load_examples([TESTS]), tokenizer, max_length=None).rows
    pieces = token_bytes(tokenizer)
    texts = [text for row in rows if (text := Excerpt.of(row, pieces, tokenizer)) is not None]
    with torch.no_grad():
        nats = nats_of(model, [text.row for text in texts])
    return {"nats": nats, "sizes": [text.size for text in texts], "loss": result.loss}


def earlier_keys(result: dict[str, Any]) -> dict[int, dict[str, dict[str, float]]]:
    """What an earlier result has of the key-value experiment: ``scores[seed][method][column]``."""
    scores: dict[int, dict[str, dict[str, float]]] = {}
    for row in result.get("keys", []):
        for seed, share in row["per_seed"].items():
            scores.setdefault(int(seed), {}).setdefault(row["method"], {})[row["column"]] = share
    return scores


def keys_of(scores: dict[int, dict[str, dict[str, float]]], items: int) -> list[dict[str, Any]]:
    """The table of the key-value experiment."""
    names = [name for name in KEYS if any(name in table for table in scores.values())]
    return rows_of(scores, items, names, COLUMNS)


def real_of(found: dict[str, Any]) -> dict[str, Any]:
    """Bits per byte of both trainings of the real pair, and how much worse it is with everything switched on."""
    sizes = torch.tensor(found["plain"]["sizes"], dtype=torch.float64)
    plain, saving = (
        Figures(torch.tensor([found[name]["nats"]], dtype=torch.float64), sizes) for name in ("plain", "saving")
    )
    return {
        "sentences": len(sizes),
        "plain": vars(bits_of(plain)),
        "saving": vars(bits_of(saving)),
        "saving_minus_plain": vars(difference(saving, plain)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiment", nargs="+", choices=["keys", "real"], default=["keys", "real"])
    parser.add_argument("--preset", choices=list(PRESETS), default="small", help="of the key-value experiment")
    parser.add_argument("--seeds", default="0,1,2", help="of the key-value experiment")
    parser.add_argument("--only", nargs="+", choices=list(KEYS), default=list(KEYS), help="of the key-value trainings")
    parser.add_argument("--steps", type=int, help="cuts each training, for a trial")
    parser.add_argument("--items", type=int, help="questions of each column")
    parser.add_argument("--threads", type=int, help="of PyTorch")
    parser.add_argument("--stored-only", action="store_true", help="report on what is stored, train nothing")
    parser.add_argument("--folder", type=Path, default=Path("runs/quality"), help="where trainings are stored")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "quality.json")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    only = options.stored_only
    earlier = json.loads(options.output.read_text(encoding="utf-8")) if options.output.is_file() else {}
    result: dict[str, Any] = {"benchmark": "quality"} | {
        key: earlier[key] for key in ("keys", "real") if key in earlier
    }
    if "keys" in options.experiment:
        preset = preset_of(PRESETS, options.preset, options.steps, options.items)
        scores = earlier_keys(earlier)
        for seed in map(int, options.seeds.split(",")):
            here = SeedRun(preset, seed, options.folder / "keys", print)
            if not only:
                for base in ("augmenting", "anchor"):
                    here.train(base)
            cells = {
                name: stored(here.folder / f"{name}.json", partial(train_keys, name, here), only=only)
                for name in options.only
            }
            scores.setdefault(seed, {}).update({name: cell["scores"] for name, cell in cells.items() if cell})
        result["keys"] = keys_of(dict(sorted(scores.items())), preset.items)
    if "real" in options.experiment:
        folder = options.folder / "real"
        cells = {
            name: stored(folder / f"{name}.json", partial(train_real, name, folder / name, options.steps), only=only)
            for name in ("plain", "saving")
        }
        if all(cells.values()):
            result["real"] = real_of(cells)
    own = origin(" ".join(["python benchmarks/quality.py", *sys.argv[1:]]))
    before = [known for known in earlier.get("origins", [{key: earlier.get(key) for key in own}]) if known["commit"]]
    keep(result | own | {"origins": [*before, own]}, options.output)


if __name__ == "__main__":
    main()
