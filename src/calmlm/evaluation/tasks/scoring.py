"""Documents and scores of the tasks in this folder; lm-evaluation-harness reads the names from their YAML files.

Code that a model writes runs in calmlm's sandbox, not in this process.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from calmlm.errors import DataError
from calmlm.evaluation.sandbox import run_python

_SECONDS, _MEMORY = 10.0, 1024 * 2**20


def documents(
    path: str,
    name: str | None = None,
    splits: dict[str, str] | None = None,
    folder: str | None = None,
    only: dict[str, list[int]] | None = None,
    **_: Any,
) -> dict[str, Any]:
    """The documents of a task, by split.

    Args:
        path, name: a data set's id and configuration.
        splits: our name of each split and the data set's.
        folder: where local slices lie instead: ``<last part of path>.<split>.jsonl``.
        only: the ``task_id`` of the documents that a split is to hold, in order.
    """
    from datasets import load_dataset

    found = {}
    for ours, theirs in (splits or {"test": "test"}).items():
        local = None if folder is None else Path(folder) / f"{path.rpartition('/')[2]}.{ours}.jsonl"
        if local is None:
            found[ours] = load_dataset(path, name, split=theirs)
        elif local.is_file():
            found[ours] = load_dataset("json", data_files=str(local), split="train")
        elif ours == "test":
            raise DataError(
                f"Expected a local slice of the documents that are asked, but there is no {local}: put it there."
            )
    for split, wanted in (only or {}).items():
        if split in found:
            rows = {row: index for index, row in enumerate(found[split]["task_id"])}
            found[split] = found[split].select([rows[each] for each in wanted if each in rows])
    return found


def sentences(source: str, target: str, path: str, folder: str | None = None, **_: Any) -> dict[str, Any]:
    """Sentences of two languages of FLORES side by side, from a data set with one language in each configuration."""
    from datasets import Dataset

    found = {}
    for ours, theirs in (("dev", "dev"), ("test", "devtest")):
        sides = []
        for language in (source, target):
            if folder is None:
                rows = documents(path, language, {ours: theirs})
            else:
                rows = documents(f"{path}.{language}", None, {ours: theirs}, folder)
            sides.append({row["id"]: row["text"] for row in rows.get(ours, [])})
        shared = sorted(set(sides[0]) & set(sides[1]))
        found[ours] = Dataset.from_list([{"id": i, "source": sides[0][i], "target": sides[1][i]} for i in shared])
    if folder is not None and not len(found["test"]):
        raise DataError(
            f"Expected sentences of {source} and {target} with the same ids among the test slices of {folder}, but "
            f"there are none: make them anew."
        )
    return found


def chrf(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """chrF1 of one sentence, as the paper reports it."""
    from sacrebleu.metrics import CHRF

    return {"chrf": CHRF(beta=1).sentence_score(results[0].strip(), [doc["target"].strip()]).score}


def code_without_docstring(doc: dict[str, Any]) -> str:
    """The prompt of code to text. The data set's ``code`` holds the docstring that is asked for; its tokens do not."""
    return f"{' '.join(doc['code_tokens'])}\n# What it does:"


def docstring(doc: dict[str, Any]) -> str:
    """The first paragraph of the docstring, on one line."""
    return " ".join(doc["docstring_tokens"])


def docstring_chrf(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """chrF1 of what is said of a function."""
    return chrf({"target": docstring(doc)}, results)


def humaneval(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Whether the completed function passes the task's own tests."""
    program = f"{doc['prompt']}{results[0]}\n{doc['test']}\ncheck({doc['entry_point']})\n"
    return {"pass@1": float(run_python(program, seconds=_SECONDS, memory=_MEMORY).passed)}


def mbpp(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Whether the function passes the task's own tests."""
    setup = doc.get("test_setup_code") or ""
    program = "\n".join([setup, results[0].split("[DONE]")[0], *doc["test_list"], ""])
    return {"pass@1": float(run_python(program, seconds=_SECONDS, memory=_MEMORY).passed)}
