"""A stage on plain text before the data: the connections learn to carry what a text says, from texts without labels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from calmlm.bases.sharding import is_spread
from calmlm.data.context import own_contexts
from calmlm.data.formats import Example
from calmlm.data.labels import encode_examples
from calmlm.data.sources import read_lines
from calmlm.errors import ConfigError
from calmlm.files.storage import WEIGHTS_NAME
from calmlm.training.backends import make_arguments, make_trainer, set_packing_length, train_with
from calmlm.training.outcome import Report, save_result, take
from calmlm.training.run_checks import check_continues, check_ids, check_same
from calmlm.training.run_folder import RunFolder, steps_of
from calmlm.training.schema import TrainingConfig
from calmlm.training.yaml import dump_yaml

__all__ = ["AlignStage"]

ELSEWHERE = ("eval_", "hub_", "push_to_hub", "load_best_model_at_end", "metric_for_best_model", "greater_is_better")
"""Arguments of the run that this stage has no part in: it evaluates nothing and uploads nothing."""
EVALUATING = {"save_strategy": ("best",), "lr_scheduler_type": ("reduce_lr_on_plateau", "greedy")}
"""Arguments of the run that ask for evaluation by their value."""


class AlignStage:
    """The stage, with everything checked that can be checked before it begins.

    Attributes:
        begun: whether it has made the folder of the run, or an earlier run has.

    Args:
        config: of the run.
        model: the composition that the run trains.
        tokenizer: its own.
        max_length: tokens of a text at most.
        folder: of the run.

    Raises:
        CalmError: the text cannot be read, the arguments are refused, or an augmenting model would read none of it.
    """

    def __init__(
        self, config: TrainingConfig, model: Any, tokenizer: Any, max_length: int | None, folder: RunFolder
    ) -> None:
        assert config.align is not None
        self.config, self.model, self.tokenizer = config, model, tokenizer
        self.folder, self.begun = RunFolder(folder.align), False
        source = config.align.text or config.model.plain_text
        assert source is not None
        lines = read_lines(source)
        examples = [Example("text", {"text": line}, f"{source}, text {n}") for n, line in enumerate(lines, start=1)]
        own = own_contexts(model)
        encoded = encode_examples(examples, tokenizer, max_length=max_length, loss_on="all", own=own)
        self.rows, self.cut = encoded.rows, encoded.truncated
        self.name = f"{folder.path.absolute().name}-align"
        check_ids(model, self.rows)
        self._check()
        try:
            self.arguments = make_arguments(config.backend, self._arguments(), self.folder, evaluates=False)
            set_packing_length(self.arguments, max_length)
            self.trainer = make_trainer(config.backend, model, self.arguments, tokenizer, self.rows, None, self.folder)
        except ConfigError as error:
            raise ConfigError(f"align.{error}" if str(error).startswith("trainer") else str(error)) from error

    def _arguments(self) -> dict[str, Any]:
        """The run's arguments, as far as they concern the stage, and its own over them."""
        assert self.config.align is not None
        own = self.config.align.trainer
        given = {key: value for key, value in self.config.trainer.items() if not key.startswith(ELSEWHERE)}
        for key, values in EVALUATING.items():
            if given.get(key) in values:
                del given[key]
        if "num_train_epochs" in own:
            given.pop("max_steps", None)
        return {"run_name": self.name} | given | own

    def run(self, start: Callable[[], None], *, resume: bool, report: Report) -> None:
        """Train on the text, unless an earlier run has; the model holds the result, and so does `align/composition`.

        Args:
            start: makes the folder of the whole run.
            resume: whether to go on with what an earlier run left.
            report: takes a line of progress.

        Raises:
            ConfigError: what an earlier run left belongs to another composition.
        """
        done = self.folder.composition
        finished = resume and (done / WEIGHTS_NAME).is_file()
        checkpoint = self.folder.last_checkpoint() if resume and not finished else None
        if finished or checkpoint is not None:
            changed = self.folder.changes(self.config.to_dict())
            if changed:
                report(f"The stage on plain text was begun with other settings: {', '.join(changed)}.")
        if finished:
            check_same(self.model, done)
            report(f"The stage on plain text is done: {done}.")
            take(self.model, done)
            self.begun = True
            return
        if checkpoint is not None:
            check_continues(self.model, checkpoint)

        def begin() -> None:
            start()
            self.begun = True
            self.folder.start_in_one(self.arguments, dump_yaml(self.config.to_dict()), resume=resume)

        self.trainer.start = begin
        cut = f", of which {self.cut} are cut" if self.cut else ""
        report(f"First {len(self.rows)} plain texts{cut}.")
        if checkpoint is not None and steps_of(checkpoint) >= self.arguments.max_steps > 0:
            self.trainer.begin()
            take(self.model, checkpoint)  # Trainer would look at the limit behind one more step
        else:
            train_with(self.trainer, checkpoint)
        save_result(self.trainer, self.model, self.tokenizer, done, report)

    def _check(self) -> None:
        """Raise where an augmenting model reads no plain text, or one trainer could not follow another.

        Raises:
            ConfigError: naming what stands against it.
        """
        inner = self.model.model
        if inner.reads_prompts:
            raise ConfigError(
                "align: expected augmenting models that read all of a text, but with refresh: false one reads prompts "
                "alone, and plain text has none; leave one of both out."
            )
        for name in inner.active:
            if not any(inner.shows(name, row["input_ids"]) for row in self.rows):
                raise ConfigError(
                    f"align: expected augmenting models that read plain text, but {name!r} reads the content of "
                    f"conversations alone; leave model.augmenting_view or align out."
                )
        if is_spread(self.model) or self.config.trainer.get("fsdp") or self.config.trainer.get("deepspeed"):
            raise ConfigError(
                "align: expected a model that each process holds whole, but it is to be spread over processes; train "
                "on the text in a run of its own, and go on from its result as model.composition."
            )
