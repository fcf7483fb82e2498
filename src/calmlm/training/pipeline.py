"""One training run: from a checked configuration to a composition on disk."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from calmlm.bases.sharding import is_spread
from calmlm.bases.speed import faster_attention, slowness
from calmlm.communication import listen, tokenizers_of
from calmlm.data.context import context_length, own_contexts, prompt_length
from calmlm.data.formats import Example
from calmlm.data.jsonl import read_jsonl
from calmlm.data.labels import encode_examples
from calmlm.data.sources import HubDataset, load_examples, read_lines
from calmlm.errors import ConfigError, DataError
from calmlm.tokens.lookup import load_tokenizer
from calmlm.training.activation_cache import ActivationCache
from calmlm.training.align_stage import AlignStage
from calmlm.training.backends import (
    Rows,
    batches_of,
    make_arguments,
    make_trainer,
    set_end,
    set_packing_length,
    train_with,
    upload,
)
from calmlm.training.cache_settings import UNITS
from calmlm.training.curves import draw_curves
from calmlm.training.going_on import check_agreement, mark_of, other_data
from calmlm.training.learned import learned
from calmlm.training.outcome import Report, save_result, take
from calmlm.training.process_environment import environment_restored
from calmlm.training.retaining import Retained
from calmlm.training.run_checks import (
    check_continues,
    check_ids,
    check_inputs,
    check_saving,
    check_views,
    in_one_go,
    texts_read,
)
from calmlm.training.run_folder import RunFolder, best_of, state_of, steps_of
from calmlm.training.schema import ModelConfig, TrainingConfig
from calmlm.training.whole_checkpoints import is_fsdp2
from calmlm.training.yaml import dump_yaml

SLOW = 2.0  # times as long as in float32, from which on it is said
LISTENED_TO = 16  # rows of which is told what the augmenting models understand


@dataclass(frozen=True)
class TrainingResult:
    """What a run gave: where its composition lies, and the mean loss over the steps that were trained, if any were."""

    composition: Path
    steps: int
    loss: float


@environment_restored()
def train(
    config: TrainingConfig, *, resume: bool = False, overwrite: bool = False, report: Report = print
) -> TrainingResult:
    """Train a composition and save it in `<output>/composition`.

    Everything that can be wrong with the configuration, the data and the models is found before anything is written.

    Args:
        config: what to train on what.
        resume: go on from the last complete checkpoint in the output folder; from the start where there is none.
        overwrite: replace an earlier run; its composition stays until the new one is complete.
        report: takes a line of progress.

    Raises:
        CalmError: with one sentence about what is wrong.
    """
    folder = RunFolder(config.output)
    evaluates = config.data.eval is not None
    _, arguments, train_examples, eval_examples, *_ = in_one_go(
        lambda: folder.check(resume=resume, overwrite=overwrite),
        lambda: make_arguments(config.backend, config.trainer, folder, evaluates=evaluates),
        lambda: load_examples(_listed(config.data.train)),
        lambda: load_examples(_listed(config.data.eval)) if evaluates else None,
        *texts_read(config, begun=resume and folder.last_checkpoint() is not None),
    )
    set_seed(arguments.seed)  # new connections draw their weights at random
    # A tokenizer that is named is settled before the models are aligned; otherwise compose finds it beside the anchor.
    tokenizer = _tokenizer(config) if config.tokenizer is not None else None
    model = _model(config.model, tokenizer)
    check_inputs(model)
    tokenizer = tokenizer or _tokenizer(config)
    set_end(tokenizer, getattr(arguments, "eos_token", None))

    max_length = _max_length(config.data.max_length, context_length(model))
    rows = _encode(train_examples, model, tokenizer, config, max_length, report)
    eval_rows = None
    if eval_examples is not None:
        eval_rows = _encode(eval_examples, model, tokenizer, config, max_length, report)
    for given in (rows, eval_rows or []):
        check_ids(model, given)
    check_views(model, rows)
    check_saving(model, tokenizer, checkpoints=arguments.save_strategy != "no")
    set_packing_length(arguments, max_length)

    mark = mark_of(rows)
    cache = _cache(config, model, arguments, report)
    if cache is not None:
        rows = _with_states(rows, cache, report)

    checkpoint = folder.last_checkpoint() if resume else None
    if resume:
        check_agreement(checkpoint)
        report(
            f"Going on from {checkpoint}." if checkpoint else "No complete checkpoint yet: starting at the beginning."
        )
    if checkpoint is not None:
        other = bool(arguments.deepspeed) or bool(arguments.fsdp and not is_fsdp2(arguments))
        check_continues(model, checkpoint, other_files=other)
        changed = folder.changes(config.to_dict())
        if changed:
            report(f"Other settings than before: {', '.join(changed)}.")
        if differs := other_data(checkpoint, mark):
            report(f"Other data than before: {differs}; the rows come in another order from here on.")
    trainer = make_trainer(config.backend, model, arguments, tokenizer, rows, eval_rows, folder)
    trainer.data = mark
    trainer.learned = lambda: learned(
        _listed(config.data.train), _listed(config.data.eval), len(train_examples), trainer.state
    )
    trainer.retained = _retained(config, model, tokenizer, max_length, arguments.seed)
    stage = None
    if config.align is not None and checkpoint is None:
        stage = AlignStage(config, model, tokenizer, max_length, folder)
    if cache is not None:
        general = trainer.retained.rows_read(batches_of(trainer)) if trainer.retained is not None else []
        plain = stage.rows if stage is not None else []
        _check_room([*rows, *(eval_rows or []), *general, *plain], len(rows), cache, report)

    def start() -> None:
        kept = resume or (stage is not None and stage.begun)  # the stage lies in the folder
        folder.start_in_one(arguments, dump_yaml(config.to_dict()), resume=kept)

    trainer.start = start
    if cache is not None:
        for one in (trainer, *([stage.trainer] if stage is not None else [])):
            one.before_saving = cache.flush  # so that what a checkpoint has read is what a resumed run reads
    if checkpoint is None:
        _listen(model, tokenizer, rows, report)
    trainable, total = model.get_nb_trainable_parameters()
    report(f"{len(rows)} examples; {trainable:,} of {total:,} parameters train.")
    _warn_of_slow_numbers(model, report)
    general = [{"input_ids": row} for row in trainer.retained.rows] if trainer.retained is not None else []
    read = [*rows, *(eval_rows or []), *general]  # without those of a stage, which a run that goes on does not read
    with contextlib.nullcontext() if cache is None else cache.recording(), contextlib.ExitStack() as training:
        if stage is not None:
            with _attention(config, stage.rows, model, report, of_stage=True):
                stage.run(start, resume=resume, report=report)
            set_seed(arguments.seed)  # the same steps follow, whether the stage was run now or before
        training.enter_context(_attention(config, read, model, report))
        done = 0 if checkpoint is None else steps_of(checkpoint)
        if checkpoint is not None and done >= arguments.max_steps > 0:
            report(f"All {arguments.max_steps} steps are done: nothing is left to train.")
            trainer.begin()
            # Trainer would look at the limit behind one more step.
            take(model, best_of(checkpoint) if arguments.load_best_model_at_end else checkpoint)
            trainer.state = state_of(checkpoint)  # of which the card and the pictures tell
            steps, loss = done, math.nan
        else:
            outcome = train_with(trainer, checkpoint)
            steps, loss = outcome.global_step, outcome.training_loss
            if steps == done:
                report(f"All {steps} steps are done: nothing was left to train.")
                loss = math.nan
    if cache is not None:
        report(cache.summary())
    if trainer.is_world_process_zero():
        draw_curves(trainer.state.log_history, folder, report)
    save_result(trainer, model, tokenizer, folder.composition, report, trainer.learned())
    if arguments.push_to_hub:
        upload(trainer, folder.composition)
    return TrainingResult(folder.composition, steps, loss)


def _warn_of_slow_numbers(model: Any, report: Report) -> None:
    """Say so where frozen models compute in a dtype that this processor has no instructions for."""
    base = next(model.anchor.parameters())
    if base.device.type != "cpu" or base.dtype not in (torch.bfloat16, torch.float16):
        return
    times = slowness(base.dtype)
    if times > SLOW:
        name = str(base.dtype).removeprefix("torch.")
        report(f"This processor takes {times:.0f} times as long in {name} as in float32: set model.dtype=float32.")


@contextlib.contextmanager
def _attention(
    config: TrainingConfig, texts: Rows, model: Any, report: Report, *, of_stage: bool = False
) -> Iterator[None]:
    """The faster attention for these texts, where the configuration names none and packs none."""
    given = config.trainer | (config.align.trainer if of_stage and config.align is not None else {})
    packed = any(given.get(key) for key in ("packing", "eval_packing", "padding_free"))
    if packed or config.model.attn_implementation is not None:
        yield
        return
    with faster_attention(model, max(len(text["input_ids"]) for text in texts)) as other:
        if other:
            report("Attention is eager while it trains: faster for short texts in bfloat16 on a processor.")
        yield


def _retained(config: TrainingConfig, model: Any, tokenizer: Any, max_length: int | None, seed: int) -> Retained | None:
    """The general text of a run, if it has any, cut where the context of a model ends.

    Raises:
        ConfigError: for a composition whose augmenting models read no text as it grows, or text that has tokens for
            which models have no embedding.
        DataError: the file holds no text.
    """
    settings = config.retain
    if settings is None:
        return None
    other = [name for name in model.model.augmenting if not model.model.reads_text(name)]
    if other:
        raise ConfigError(
            f"retain: expected augmenting models that read the text as it grows, but {other[0]!r} does not; leave it "
            f"out."
        )
    rows = [list(tokenizer(line, verbose=False)["input_ids"])[:max_length] for line in read_lines(settings.text)]
    check_ids(model, [{"input_ids": row} for row in rows], "retain.text", "the text has")
    for context in own_contexts(model):
        rows = [row[: context.readable(row, [False] * len(row))] for row in rows]
    if not any(len(row) > 1 for row in rows):
        raise DataError(f"Expected lines of two tokens or more in {settings.text}, but got none; name other text.")
    pad = tokenizer.pad_token_id
    return Retained(rows, settings.weight, settings.lines, settings.positions, pad, seed)


def _cache(config: TrainingConfig, model: Any, arguments: Any, report: Report) -> ActivationCache | None:
    """The activation cache of a run, if it has one."""
    settings = config.cache
    if settings.mode == "off":
        return None
    if getattr(arguments, "packing", None) and arguments.packing_strategy != "bfd":
        raise ConfigError(
            f"trainer.packing_strategy: expected 'bfd' beside activation_cache, which knows whole texts, but "
            f"{arguments.packing_strategy!r} cuts them; leave one of the two out."
        )
    precision = "bf16" if arguments.bf16 else "fp16" if arguments.fp16 else "none"
    folder = Path(settings.folder or f"{config.output}.activations")
    return ActivationCache(settings, model, folder, report, precision)


def _with_states(rows: Rows, cache: ActivationCache, report: Report) -> Rows:
    """The examples that a run trains on: where others are not wanted, those whose states are there.

    Raises:
        DataError: none are left, where those without states are skipped; or some lack states, where none may.
    """
    if cache.config.on_missing not in ("skip", "raise"):
        return rows
    known = cache.known(rows)
    missing = known.count(False)
    if missing == len(rows) or (missing and cache.config.on_missing == "raise"):
        raise DataError(
            f"Expected the states of all {len(rows)} examples in {cache.folder}, but those of {missing} are "
            f"missing: make them with activation_cache.on_missing=generate."
        )
    if missing:
        report(f"{missing} of {len(rows)} examples are skipped: the activation cache lacks their states.")
    return [row for row, there in zip(rows, known, strict=True) if there]


def _check_room(texts: Rows, examples: int, cache: ActivationCache, report: Report) -> None:
    """Say what the states of all that a run reads take; there has to be room for them.

    Args:
        texts: the examples, what is evaluated, what is retained, and the text of a stage before.
        examples: how many of them are examples.
        cache: of the run.
        report: takes a line.

    Raises:
        ConfigError: there is less room.
    """
    needed = cache.check_room(texts)
    beside = f" and {len(texts) - examples} other texts" if len(texts) > examples else ""
    report(
        f"The activation cache takes {needed / UNITS['MiB']:,.1f} MiB for {examples} examples{beside}, as some of them "
        f"say."
    )


def _listen(model: Any, tokenizer: Any, rows: Rows, report: Report) -> None:
    """Say what the augmenting models understand of a few rows, and what they should not go on without."""
    if is_spread(model) or any(parameter.is_meta for parameter in model.parameters()):
        return
    try:
        found = listen(model, tokenizer, rows[:LISTENED_TO], augmenting_tokenizers=tokenizers_of(model))
    except Exception:  # texts without prompts, encoders, ...: a first look must not end a run
        return
    for name, heard in found.augmenting.items():
        if heard.alone is not None and heard.inside is not None:
            report(
                f"Before training, in bits per byte of {found.rows} completions, fewer being better: {name} "
                f"{heard.inside:.3f} inside the composition and {heard.alone:.3f} alone, the anchor {found.anchor:.3f}."
            )
    for warning in found.warnings():
        report(f"warning: {warning}")


def _listed(sources: str | HubDataset | list[str | HubDataset] | None) -> list[str | HubDataset]:
    if sources is None:
        return []
    return sources if isinstance(sources, list) else [sources]


def _tokenizer(config: TrainingConfig) -> Any:
    model = config.model
    if config.tokenizer is not None:
        return load_tokenizer([config.tokenizer], trust_remote_code=model.trust_remote_code, named=True)
    if model.composition is not None:
        return load_tokenizer(
            [model.composition, *_anchor_of(model.composition)], trust_remote_code=model.trust_remote_code
        )
    base = model.anchor_base
    return load_tokenizer([base.name], revision=base.revision, trust_remote_code=model.trust_remote_code)


def _anchor_of(composition: str) -> list[str]:
    """The anchor that a saved composition names, as an id or folder that can be loaded from here."""
    from calmlm.files.loading import read_config
    from calmlm.files.storage import resolve_source

    recorded = (read_config(composition).anchor or {}).get("id")
    return [resolve_source(recorded, Path(composition))] if recorded else []


def _model(config: ModelConfig, tokenizer: Any) -> Any:
    """The composition to train, from two or more models or from a saved one."""
    import calmlm

    options = {
        key: value
        for key in ("dtype", "device_map", "quantization_config", "attn_implementation")
        if (value := getattr(config, key)) is not None
    }
    if config.composition is not None:
        return calmlm.CalmForCausalLM.from_pretrained(
            config.composition, trust_remote_code=config.trust_remote_code, **options
        )
    anchor, augmenting = config.anchor_base, config.augmenting_bases
    fields = ("revision", "dtype", "device_map", "quantization_config")
    places: Any
    own: dict[str, Any]
    if isinstance(augmenting, dict):
        places = {name: base.name for name, base in augmenting.items()}
        own = {f"augmenting_{key}": {name: getattr(base, key) for name, base in augmenting.items()} for key in fields}
    else:
        places, own = augmenting.name, {f"augmenting_{key}": getattr(augmenting, key) for key in fields}
    options |= {key: value for key in fields if (value := getattr(anchor, key)) is not None}
    connector = {"connector" if key == "kind" else key: value for key, value in config.connector.items()}
    return calmlm.compose(
        anchor.name,
        places,
        config.connections,
        config.num_heads,
        tokenizer=tokenizer,
        words=config.words,
        adapters=config.adapters,
        init=config.init,
        plain_text=None if config.plain_text is None else read_lines(config.plain_text),
        development=None if config.development is None else [r.fields for r in read_jsonl(config.development)],
        train_map=config.train_map,
        refresh=config.refresh,
        alignment=config.alignment,
        augmenting_view=config.augmenting_view,
        augmenting_prefix=config.augmenting_prefix,
        trust_remote_code=config.trust_remote_code,
        **connector,
        **options,
        **own,
    )


def _max_length(wanted: int | None, context: int | None) -> int | None:
    if wanted is not None and context is not None and wanted > context:
        raise ConfigError(
            f"data.max_length: expected at most {context}, the shorter context of the two models, but got {wanted}; "
            f"lower it or leave it out."
        )
    return wanted if wanted is not None else context


def _encode(
    examples: list[Example],
    model: Any,
    tokenizer: Any,
    config: TrainingConfig,
    max_length: int | None,
    report: Report,
) -> Rows:
    own = own_contexts(model)
    encoded = encode_examples(
        examples,
        tokenizer,
        max_length=max_length,
        loss_on=config.data.loss_on,
        prompt_length=prompt_length(model),
        own=own,
    )
    if encoded.truncated:
        report(f"{encoded.truncated} of {len(encoded.rows)} examples were cut at {max_length} tokens.")
    for context in own:
        if context.name in encoded.outgrown:
            report(
                f"{encoded.outgrown[context.name]} of {len(encoded.rows)} examples were cut where the context of "
                f"{context.name!r} ends, after {context.length} of its own tokens."
            )
    return encoded.rows
