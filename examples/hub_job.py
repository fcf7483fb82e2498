# /// script
# requires-python = ">=3.11"
# dependencies = ["calmlm[train]"]
# ///
"""Train a composition of two models on a data set, as one file that brings its own environment.

    uv run examples/hub_job.py --anchor big --augmenting small --data pairs.jsonl --output runs/job
    hf jobs uv run --flavor a10g-small --secrets HF_TOKEN examples/hub_job.py \\
        --anchor owner/big --augmenting owner/small --data owner/pairs --push-to me/composed

A job's disk is gone when it ends, so that there `--push-to` is where the result goes. The data are prompts and
completions, messages or texts: JSONL files, or data sets of the hub by id.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from calmlm.errors import CalmError
from calmlm.training.pipeline import train
from calmlm.training.schema import parse_config


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a composition of two models.")
    parser.add_argument("--anchor", required=True, help="id or folder of the large model")
    parser.add_argument("--augmenting", required=True, help="id or folder of the small one")
    parser.add_argument("--data", required=True, help="a JSONL file, or the id of a data set")
    parser.add_argument("--split", default="train", help="of a data set")
    parser.add_argument("--output", default="runs/job", help="the run's folder")
    parser.add_argument("--push-to", help="a repository of the hub for the result; HF_TOKEN has to be set")
    parser.add_argument("--connections", default="every-4")
    parser.add_argument("--words", choices=["map", "pointer"], help="let the small model speak in the anchor's words")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=16, help="rows of a step")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--dtype", help="of the frozen models: bfloat16, float16 or float32")
    return parser.parse_args(arguments)


def settings(given: argparse.Namespace) -> dict[str, Any]:
    """What a file for `calmlm train` would say."""
    local = given.data.endswith(".jsonl") or os.path.isfile(given.data)
    model = {"anchor": given.anchor, "augmenting": given.augmenting, "connections": given.connections}
    model |= {key: value for key, value in (("words", given.words), ("dtype", given.dtype)) if value is not None}
    trainer: dict[str, Any] = {
        "max_steps": given.steps,
        "per_device_train_batch_size": given.batch,
        "learning_rate": given.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": max(1, given.steps // 20),
        "save_steps": max(1, given.steps // 4),
        "report_to": "none",
    }
    if given.push_to:
        trainer |= {"push_to_hub": True, "hub_model_id": given.push_to, "hub_strategy": "end"}
    data = given.data if local else {"dataset": given.data, "split": given.split}
    return {"output": given.output, "model": model, "data": {"train": data}, "trainer": trainer}


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        print(train(parse_config(settings(parsed(arguments))), resume=False).composition)
    except CalmError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
