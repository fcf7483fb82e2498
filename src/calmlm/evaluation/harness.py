"""Benchmarks through lm-evaluation-harness, for a composition, its anchor alone, or any model."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from calmlm.data.extras import require
from calmlm.errors import ConfigError
from calmlm.generation.text import TextModel

__all__ = ["TASKS", "evaluate"]

TASKS = Path(__file__).parent / "tasks"
"""calmlm's own tasks: FLORES-200, HumanEval, MBPP and CodeXGLUE, with code confined to the sandbox."""


def evaluate(
    source: str,
    tasks: Sequence[str],
    *,
    anchor_only: bool = False,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    include: str | Path | None = None,
    data: str | Path | None = None,
    tokenizer: str | None = None,
    device: str = "auto",
    trust_remote_code: bool = False,
) -> dict[str, dict[str, Any]]:
    """Run tasks of lm-evaluation-harness, those of ``TASKS`` among them.

    Args:
        source: folder or id of a composition.
        tasks: names of tasks, groups or tags.
        anchor_only: switch the composition off.
        num_fewshot: examples in the prompt instead of the task's own number.
        limit: documents of each task.
        batch_size: prompts at a time.
        include: folder of further tasks.
        data: folder of local slices for calmlm's own tasks, instead of the data sets.
        tokenizer: id or folder, where the composition has none.
        device: a torch device, or "auto".
        trust_remote_code: whether code that comes with a model may run.

    Returns:
        the metrics, by task.

    Raises:
        MissingExtraError: without lm-eval.
        ConfigError: for a task that does not exist.
        CalmError: there is no such composition.
    """
    require("lm_eval", "eval", "Evaluating on benchmarks")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    folders = [str(TASKS), *([] if include is None else [str(include)])]
    manager = TaskManager(include_path=folders, metadata={} if data is None else {"folder": str(Path(data).resolve())})
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown or not tasks:
        raise ConfigError(
            f"Expected names of lm-evaluation-harness's or calmlm's tasks, but got {', '.join(unknown) or 'none'}: "
            f"see `lm-eval ls tasks`, and {', '.join(sorted(path.stem for path in TASKS.glob('calm_*.yaml')))}."
        )
    text = TextModel.load(source, tokenizer=tokenizer, device=device, trust_remote_code=trust_remote_code)
    model = text.model
    with model.disable_composition() if anchor_only else nullcontext():
        wrapped = HFLM(
            pretrained=model,
            tokenizer=text.tokenizer,
            batch_size=batch_size,
            device=str(model.device),
            backend="causal",
        )
        found = simple_evaluate(
            wrapped, tasks=list(tasks), num_fewshot=num_fewshot, limit=limit, task_manager=manager, log_samples=False
        )
    assert found is not None
    return {
        task: {name: value for name, value in metrics.items() if not name.startswith("alias")}
        for task, metrics in found["results"].items()
    }
