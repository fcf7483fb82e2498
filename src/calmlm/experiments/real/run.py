"""Running the experiment with two real models: a cell for each method and seed, stored when it is done."""

from __future__ import annotations

import copy
import dataclasses
import gc
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from calmlm.bases.speed import faster_dtype
from calmlm.errors import CalmError, ConfigError, first_line
from calmlm.experiments.fitting import check_seeds
from calmlm.experiments.real.alike import about_data, about_models, check_alike
from calmlm.experiments.real.ensemble import Ensemble
from calmlm.experiments.real.joined import (
    Pair,
    Trained,
    composed,
    fine_tuned,
    fresh_for,
    open_lora,
    open_pair,
    open_trained,
    save_lora,
    save_trained,
    train_composition,
    with_lora,
)
from calmlm.experiments.real.layout import AUGMENTING
from calmlm.experiments.real.measures import System, first_line_of, measure, translations
from calmlm.experiments.real.picking import Routed
from calmlm.experiments.real.presets import BaseModel, Method, Settings, load_settings
from calmlm.experiments.real.report import INTERVAL, summarise, write_report
from calmlm.experiments.real.systems import Alone, Cascade, Composed, Shown, told
from calmlm.experiments.real.world import World, as_text, read_sentences
from calmlm.experiments.record import device, origin
from calmlm.files.results import to_json, write_result
from calmlm.files.storage import check_writable
from calmlm.tokens.beginning import prefix_ids

__all__ = ["cell_path", "run", "seeds_of"]

TRAININGS: dict[str, Callable[[Pair, Method, World], Trained]] = {
    "lora": with_lora,
    "full": fine_tuned,
    "composed": train_composition,
}
KEPT: dict[str, Callable[..., None]] = {"lora": save_lora, "composed": save_trained}
"""What saves a trained system with ``keep``."""
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
SHARED = ("nats", "swapped_nats", "english_nats", "parameters", "training_seconds", "losses")
"""What a row that writes otherwise has of the row that it is."""
BY_WORDS = {"connections": "none", "words": "map"}


def cell_path(output: Path, settings: Settings, name: str, seed: int) -> Path:
    """Where the cell of a method and a seed lies; other settings have another file."""
    return output / "cells" / f"{name}-seed-{seed}-{settings.mark(name)}.json"


def seeds_of(method: Method, seeds: Sequence[int]) -> list[int]:
    """The seeds that a method has cells for: 0 alone where nothing depends on it."""
    return list(seeds) if method.seeded else [0]


def run(
    config: str | Path = "configs/real/translation.yaml",
    seeds: Sequence[int] = (0, 1, 2),
    rows: Sequence[str] | None = None,
    output: str | Path = "experiments/real/results",
    models: str | Path = "models",
    *,
    data: str | Path | None = None,
    anchor: str | None = None,
    augmenting: str | None = None,
    steps: int | None = None,
    items: int | None = None,
    threads: int | None = None,
    dtype: str | None = None,
    stored_only: bool = False,
    keep: str | Path | None = None,
    command: str | None = None,
    report: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Make the cells that are missing, and write the report over all that are stored.

    Args:
        config: a file of ``configs/real``.
        seeds: each draws its own D_C, examples and starts of trainings.
        rows: methods to make, by name; all by default.
        output: folder of the report and of ``cells``.
        models: folder of the models' files.
        data: a file of JSON lines, one sentence in all varieties in each, with ``{split}`` in its name where the data
            set is split; the settings' data set by default.
        anchor, augmenting: ids or folders of other models.
        steps: upper limit for the steps of each training, for a trial.
        items: upper limit for the items of each measure, for a trial.
        threads: of torch; its own number by default.
        dtype: bfloat16 or float32, in which the base models compute; by default the faster one on this machine.
        stored_only: whether to report on what is stored and make nothing.
        keep: folder for the trained compositions and LoRA, one folder for each row and seed that is made.
        command: that the cells name as their origin.
        report: called with each line of progress.

    Returns:
        what the report's JSON file holds.

    Raises:
        ConfigError: for a file with faults, unknown rows or seeds, or an output that cannot be written to.
        ModelError, DataError: models or data that cannot be loaded.
        CalmError: rows that failed, after all others are made and the report is written.
    """
    settings = load_settings(config).cut(steps, items)
    if anchor is not None:
        settings = dataclasses.replace(settings, anchor=BaseModel(anchor))
    if augmenting is not None:
        settings = dataclasses.replace(settings, augmenting=BaseModel(augmenting))
    check_seeds(seeds)
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, but got {dtype!r}: choose one of these.")
    names, folder = settings.chosen(rows), Path(output)
    check_writable(folder / f"{settings.name}.json")
    kept = None if keep is None else Path(keep)
    if kept is not None:
        check_writable(kept / "any")
    if threads is not None:
        torch.set_num_threads(threads)
    # A seed after the other, so that a run that is stopped has whole ones.
    wanted = dict.fromkeys((name, seed if settings.methods[name].seeded else 0) for seed in seeds for name in names)
    failed: list[str] = []
    missing = not stored_only and not all(cell_path(folder, settings, *key).is_file() for key in wanted)
    if missing or (data is not None and not stored_only):
        sentences = read_sentences(settings, data)
        first = World(settings, seeds[0], sentences)  # says what is wrong with them before models are loaded
        check_alike(stored(settings, folder, seeds), about_data(first))
    if missing:
        chosen = DTYPES[dtype] if dtype else faster_dtype(device())
        pair = open_pair(settings.anchor, settings.augmenting, models, chosen)
        check_alike(stored(settings, folder, seeds), about_models(pair))
        for name, seed in wanted:
            path = cell_path(folder, settings, name, seed)
            if path.is_file():  # made before, or by another run meanwhile
                continue
            report(f"{name}, seed {seed} ...")
            try:
                world, read = World(settings, seed, sentences), _reader(settings, folder, seed)
                cell = make_cell(settings, name, pair, world, report, kept, command, read)
            except CalmError as error:  # of one row; the others go on
                report(f"{name}, seed {seed}: {error}")
                failed.append(f"{name}, seed {seed} ({error})")
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            write_result(path, to_json({"method": name, "seed": seed, **cell, **origin(command)}) + "\n")
            report(f"{name}, seed {seed}: {cell['seconds']:.0f} s")
            gc.collect()  # a composition and its hooks hold each other
    cells = stored(settings, folder, seeds)
    check_alike(cells)
    result = {
        "experiment": "real",
        "name": settings.name,
        "seeds": list(seeds),
        "rows": summarise(settings, cells),
        "interval": INTERVAL,
        "settings": dataclasses.asdict(settings),
    }
    for path in write_report(settings, result, cells, folder):
        report(f"wrote {path}")
    if failed:
        raise CalmError(
            f"Expected to make all cells, but {len(failed)} failed: {'; '.join(failed)}; the others are stored, so "
            f"correct these rows and run it again."
        )
    return result


def _reader(settings: Settings, folder: Path, seed: int) -> Callable[[str], dict[str, Any]]:
    """What reads another row's cell of a seed."""

    def read(name: str) -> dict[str, Any]:
        path = cell_path(folder, settings, name, seed if settings.methods[name].seeded else 0)
        if not path.is_file():
            raise ConfigError(
                f"Expected the cell of {name}, whose bits per byte are this row's, but there is none: make it first."
            )
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found

    return read


def make_cell(
    settings: Settings,
    name: str,
    pair: Pair,
    world: World,
    report: Callable[[str], None],
    kept: Path | None = None,
    command: str | None = None,
    read: Callable[[str], dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Train and measure one method; a composition or LoRA is saved below ``kept`` before it is measured.

    ``read`` gives another row's cell: one that is written with guidance shares its figures.
    """
    start = time.perf_counter()
    method = settings.methods[name]
    if method.guidance is not None:
        assert method.of is not None
        assert read is not None
        source = read(method.of)
        system, about = opened(settings, method.of, pair, world, report, kept, command)
        system.guidance = method.guidance  # type: ignore[attr-defined]
        about |= {key: source[key] for key in SHARED if key in source}
        writing = time.perf_counter()
        found = translations(system, world)
        found["measuring_seconds"] = {"written": round(time.perf_counter() - writing, 1)}
    else:
        system, about = opened(settings, name, pair, world, report, kept, command, anew=True)
        found = measure(system, world, settings.swapped, report)
    return {
        "settings": dataclasses.asdict(method),
        "dtype": str(pair.anchor.dtype).removeprefix("torch."),
        **about_models(pair),
        "left_out": world.left_out,
        **about_data(world),
        "varieties": [item.variety for item in world.tested],
        **about,
        **found,
        "seconds": round(time.perf_counter() - start, 1),
    }


def opened(
    settings: Settings,
    name: str,
    pair: Pair,
    world: World,
    report: Callable[[str], None],
    kept: Path | None,
    command: str | None,
    anew: bool = False,
) -> tuple[System, dict[str, Any]]:
    """The system of a row, and what is to be said of it; what was kept is not trained again, and its row has said it.

    Args:
        kept: folder of what is kept, if there is one.
        command: that is run.
        anew: whether to train what this row trains all the same.

    Raises:
        ConfigError: what was kept is of another seed.
    """
    method = settings.methods[name]
    if method.of is not None:
        model = opened(settings, method.of, pair, world, report, kept, command)[0].model  # type: ignore[attr-defined]
        report(f"measures {method.of} of seed {world.seed} with examples of the variety that is asked")
        about = {"parameters": model.get_nb_trainable_parameters()[0]}
        return Shown(model, pair.tokenizer, pair.augmenting_tokenizer, world.before), about
    place = None if kept is None or method.system not in KEPT else kept / f"{name}-seed-{world.seed}"
    if place is not None and not anew and (place / "origin.json").is_file():
        return _writing(pair, method, _kept(settings, name, pair, world, place)), {}
    system, about = prepared(pair, method, world, report)
    if place is not None:
        try:
            KEPT[method.system](system.model, place, settings, command, settings.mark(name))  # type: ignore[attr-defined]
        except (OSError, SafetensorError) as error:
            report(f"{name}, seed {world.seed}: what it trained is not kept in {place} ({first_line(error)})")
    return system, about


def prepared(pair: Pair, method: Method, world: World, report: Callable[[str], None]) -> tuple[System, dict[str, Any]]:
    """The system of a method, and what is to be said of it."""
    before = world.before if method.examples else None
    ours = Alone(pair.anchor, pair.tokenizer, before, hears=True)
    theirs = Alone(pair.augmenting, pair.augmenting_tokenizer, before, hears=True)
    if method.system in ("m_A", "m_B"):
        return (theirs if method.system == "m_A" else ours), {}
    if method.system == "router":
        router = Routed(ours, theirs)
        return router, {"routed": router.fit(world.weighed)}
    if method.system == "cascade":
        return cascade(pair, method, world), {}
    if method.system == "ensemble":
        untrained = dataclasses.replace(method, compose=BY_WORDS)
        ensemble = Ensemble(composed(pair, untrained, world), pair.tokenizer, pair.augmenting_tokenizer)
        return ensemble, {"development": ensemble.choose(world.weighed), "weight": ensemble.weight}
    trained = TRAININGS[method.system](pair, method, world)
    report(f"trained {trained.parameters:,} parameters in {trained.seconds:.0f} s")
    about = {
        "parameters": trained.parameters,
        "training_seconds": trained.seconds,
        "losses": trained.losses,
    }
    return _writing(pair, method, trained.model), about


def _writing(pair: Pair, method: Method, model: Any) -> Alone:
    """The system of a method that trains, with what it trained."""
    return Composed(model, pair.tokenizer) if method.system == "composed" else Alone(model, pair.tokenizer)


def _kept(settings: Settings, name: str, pair: Pair, world: World, place: Path) -> Any:
    """What a row trained that was kept in this folder.

    Raises:
        ConfigError: it was trained with other settings, or another seed.
    """
    method, mark = settings.methods[name], settings.mark(name)
    if json.loads((place / "origin.json").read_text(encoding="utf-8")).get("mark", mark) != mark:
        raise ConfigError(
            f"Expected in {place} what {name} trains with these settings, but it was trained with others: name another "
            f"folder with --keep."
        )
    if method.system == "lora":
        return open_lora(place, pair, method, world.seed)
    small = copy.deepcopy(pair.augmenting) if method.augmenting == "real" else fresh_for(pair, world)
    model = open_trained(place, dataclasses.replace(pair, anchor=copy.deepcopy(pair.anchor), augmenting=small))
    prefix = prefix_ids(pair.augmenting_tokenizer, world.shown) if method.examples else []
    if model.config.augmenting[AUGMENTING].get("prefix", []) != prefix:
        raise ConfigError(
            f"Expected in {place} the composition of seed {world.seed}, but its m_A reads other examples: name "
            f"another folder with --keep."
        )
    return model


def cascade(pair: Pair, method: Method, world: World) -> Cascade:
    """m_A translates after the examples; with ``examples``, m_B has seen what m_A makes of each after the others."""
    new_tokens = world.settings.new_tokens

    def translator(before: Mapping[str, str]) -> Alone:
        return Alone(pair.augmenting, pair.augmenting_tokenizer, before)

    drafted: dict[str, str] = {}  # by the examples' text, which many varieties may share
    if method.examples:
        for examples in (world.examples_of(variety) for variety in world.before):
            text = as_text(examples)
            if text in drafted:
                continue
            drafted[text] = ""
            for index, item in enumerate(examples):
                rest = as_text([other for place, other in enumerate(examples) if place != index])
                draft = translator({item.variety: rest}).write([item], new_tokens)[0]
                drafted[text] += f"{told(item.prompt, first_line_of(draft))}{item.completion}\n\n"
    before = {variety: drafted.get(text, "") for variety, text in world.before.items()}
    return Cascade(translator(world.before), Alone(pair.anchor, pair.tokenizer, before), new_tokens, first_line_of)


def stored(settings: Settings, folder: Path, seeds: Sequence[int]) -> dict[str, dict[str, dict[str, Any]]]:
    """All cells of these settings and seeds that are stored, by method and seed."""
    cells: dict[str, dict[str, dict[str, Any]]] = {}
    for name, method in settings.methods.items():
        paths = {seed: cell_path(folder, settings, name, seed) for seed in seeds_of(method, seeds)}
        found = {
            str(seed): json.loads(path.read_text(encoding="utf-8")) for seed, path in paths.items() if path.is_file()
        }
        if found:
            cells[name] = found
    return cells
