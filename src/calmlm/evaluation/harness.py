"""Benchmarks through lm-evaluation-harness, for a composition, its anchor alone, or any model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

from calmlm.answering import TextModel
from calmlm.data.context import context_length
from calmlm.data.extras import require
from calmlm.errors import CalmError, ConfigError, DataError
from calmlm.files.results import plain

__all__ = ["TASKS", "evaluate"]

TASKS = Path(__file__).parent / "tasks"
"""calmlm's own tasks: FLORES-200, HumanEval, MBPP and CodeXGLUE, with code confined to the sandbox."""
UNSAID = ("alias", "name", "sample_len")
"""What the harness gives beside a task's metrics."""
SWAPPED = {"augmenting_models_read": "the context of another document"}
"""What is said beside metrics that are a control."""


def evaluate(
    source: str,
    tasks: Sequence[str],
    *,
    anchor_only: bool = False,
    swapped: bool = False,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    include: str | Path | None = None,
    data: str | Path | None = None,
    tokenizer: str | None = None,
    device: str = "auto",
    dtype: str | None = None,
    apply_chat_template: bool = False,
    trust_remote_code: bool = False,
    report: Callable[[dict[str, dict[str, Any]], list[str]], None] = lambda found, to_come: None,
) -> dict[str, dict[str, Any]]:
    """Run tasks of lm-evaluation-harness, those of ``TASKS`` among them.

    Args:
        source: folder or id of a composition.
        tasks: names of tasks, groups or tags.
        anchor_only: switch the composition off.
        swapped: let the augmenting models read another document's context: what is left then of what the composition
            gains is no communication.
        num_fewshot: examples in the prompt instead of the task's own number.
        limit: documents of each task.
        batch_size: prompts at a time.
        include: folder of further tasks.
        data: folder of local slices for calmlm's own tasks, instead of the data sets.
        tokenizer: id or folder, where the composition has none.
        device: a torch device, or "auto".
        dtype: of the base models, instead of their own.
        apply_chat_template: put each prompt into the tokenizer's chat template.
        trust_remote_code: whether code that comes with a model may run.
        report: takes the metrics of all tasks so far, and the names of those that are still to come, behind each of
            them.

    Returns:
        the metrics, by task, as plain data, with ``augmenting_models_read`` where that is not the same; of a task
        that came to an error beside others, ``failed`` with the reason.

    Raises:
        MissingExtraError: without lm-eval.
        ConfigError: for a task that does not exist, or one that cannot be asked of this composition.
        DataError: the harness could run none of the tasks.
        CalmError: there is no such composition.
    """
    require("lm_eval", "eval", "Evaluating on benchmarks")
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from calmlm.evaluation.lm_eval_model import ComposedLM
    from calmlm.evaluation.swapped_lm import SwappedLM

    if swapped and anchor_only:
        raise ConfigError(
            "Expected a composition that is switched on for its augmenting models to read another context, but got "
            "--anchor-only beside --swapped: leave one of both out."
        )
    for key, folder in (("include", include), ("data", data)):
        if folder is not None and not Path(folder).is_dir():
            raise ConfigError(f"{key}: expected a folder, but {folder} is none: check the path.")
    folders = [str(TASKS), *([] if include is None else [str(include)])]
    known = {"include_path": folders, "metadata": {} if data is None else {"folder": str(Path(data).resolve())}}
    manager = TaskManager(include_defaults=False, **known)
    if not set(tasks) <= set(manager.all_subtasks):  # reading the harness's own takes seconds
        manager = TaskManager(**known)
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown or not tasks:
        raise ConfigError(
            f"Expected names of lm-evaluation-harness's or calmlm's tasks, but got {', '.join(unknown) or 'none'}: "
            f"see `lm-eval ls tasks`, and {', '.join(sorted(path.stem for path in TASKS.glob('calm_*.yaml')))}."
        )
    text = TextModel.load(source, tokenizer=tokenizer, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    model = text.model
    if apply_chat_template and getattr(text.tokenizer, "chat_template", None) is None:
        raise ConfigError("Expected a tokenizer with a chat template, but this one has none: leave the template out.")
    viewed = [name for name, entry in model.config.augmenting.items() if entry.get("view")]
    if viewed and not apply_chat_template and not anchor_only:
        raise ConfigError(
            f"Expected prompts in the chat template, since the augmenting model {viewed[0]!r} reads the content of "
            "messages alone and would see nothing: pass --apply-chat-template."
        )
    names = manager.match_tasks(list(tasks))
    found: dict[str, dict[str, Any]] = {}
    failures: dict[str, CalmError] = {}
    with model.disable_composition() if anchor_only else nullcontext():
        wrapped = (SwappedLM if swapped else ComposedLM)(model, text.tokenizer, batch_size)
        for name in names:  # what cannot be read is found before anything is measured
            try:
                manager.load([name])
            except Exception as error:  # whatever a task's files, its data and the network give rise to
                raise error if isinstance(error, CalmError) else _failed(name, error, model) from error
        for place, name in enumerate(names, start=1):
            try:
                with _undescribed():
                    measured = simple_evaluate(
                        wrapped,
                        tasks=[name],
                        num_fewshot=num_fewshot,
                        limit=limit,
                        task_manager=manager,
                        log_samples=False,
                        apply_chat_template=apply_chat_template,
                    )
            except Exception as error:  # the others are measured all the same
                failures[name] = error if isinstance(error, CalmError) else _failed(name, error, model)
                continue
            assert measured is not None
            for task, metrics in measured["results"].items():
                found[task] = {key: value for key, value in plain(metrics).items() if key not in UNSAID}
                found[task] |= SWAPPED if swapped else {}
            report(found | _told(failures), names[place:])
    if not found:
        raise next(iter(failures.values()))
    return found | _told(failures)


def _told(failures: dict[str, CalmError]) -> dict[str, dict[str, Any]]:
    """What is said of tasks that came to an error, in the place of their metrics."""
    return {name: {"failed": str(failure)} for name, failure in failures.items()}


@contextmanager
def _undescribed() -> Iterator[None]:
    """The harness asks pip, git and others about this machine behind each task, in seconds; we say it ourselves."""
    with patch.multiple("lm_eval.evaluator", add_env_info=lambda storage: None, get_git_commit_hash=lambda: None):
        yield


def _failed(task: str, error: Exception, model: Any) -> DataError:
    """What is raised where the harness cannot run a task."""
    reason = (str(error).strip().splitlines() or ["there may be no documents"])[0]
    return DataError(
        f"Expected tasks and data that lm-evaluation-harness can run, but {task} came to a {type(error).__name__} "
        f"({reason}): check the data, the number of examples, and that prompts and answers fit into the context of "
        f"{context_length(model) or 'any number of'} tokens."
    )
