"""Running a comparison: cells that are missing are made, in several processes, and the report is written."""

from __future__ import annotations

import logging
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from calmlm.baselines.merging import METHODS as VECTOR_METHODS
from calmlm.comparison.cells import Cell
from calmlm.comparison.domains import kind_of
from calmlm.comparison.earlier import keep_fuller, read_report
from calmlm.comparison.selection import CompareConfig
from calmlm.comparison.summary import summarise, write_report
from calmlm.data.extras import require
from calmlm.errors import CalmError, ConfigError
from calmlm.experiments.cluster import done_on_ray
from calmlm.files.results import write_result
from calmlm.files.storage import probe_folder

__all__ = ["run"]

Group = tuple[str, int]
"""An experiment and a seed: its cells share base models, and one process makes them."""

_PACKAGES: dict[str, tuple[tuple[str, str], ...]] = {
    "languages": (("num2words", "compare"), ("babel", "compare"), ("sacrebleu", "compare")),
    "code": (("sacrebleu", "compare"),),
    **dict.fromkeys(("lora", "lora_full_data"), (("peft", "compare"),)),
    **dict.fromkeys(VECTOR_METHODS, (("mergekit", "merging"),)),
}
"""Optional packages of an experiment or a method, each with the extra that brings it."""


def run(
    config: CompareConfig,
    *,
    stored_only: bool = False,
    keep: bool = False,
    command: str | None = None,
    report: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Make what is missing and write the report.

    Args:
        config: methods, experiments, seeds.
        stored_only: make nothing; report on the cells that are there.
        keep: keep from the report that is there each experiment of which it had more cells.
        command: the command that the report names as its origin.
        report: takes lines of progress.

    Returns:
        what the JSON file holds.

    Raises:
        CalmError: there is nothing to report on, a cell failed, or what is to be kept is no report.
        ConfigError: a folder cannot be written to.
        MissingExtraError: a method or an experiment needs a package that is not installed.
    """
    cache, cells = Path(config.cache), config.cells()
    missing = [cell for cell in cells if cell.stored(cache) is None]
    _check_folder("output", Path(config.output))
    earlier = read_report(Path(config.output) / f"{config.preset}.json") if keep else None
    report(f"{len(cells)} cells, {len(cells) - len(missing)} of them stored")
    if missing and not stored_only:
        _check_folder("cache", cache)
        _check_folder("bases", Path(config.bases))
        _check_extras(missing)
        _make(missing, config, report)
    stored = [(cell, found) for cell in cells if (found := cell.stored(cache)) is not None]
    if not stored and missing and not stored_only:
        raise _failure(missing, cache)
    if not stored:
        raise CalmError(f"Expected finished cells in {cache}, but there are none: run without --stored-only first.")
    failed = [] if stored_only else [cell for cell in missing if cell.stored(cache) is None]
    result = summarise(config, stored, len(cells), command)
    result = result if earlier is None else keep_fuller(result, earlier)
    for path in write_report(result, Path(config.output), report):
        report(f"wrote {path}")
    if failed:
        raise _failure(failed, cache)
    return result


def _failure(failed: list[Cell], cache: Path) -> CalmError:
    first = failed[0]
    reason = first.failure(cache)
    named = f"{first.method} of {first.domain}, seed {first.seed}"
    return CalmError(
        f"Expected all cells to be finished, but {len(failed)} failed, the first of them {named} ({reason}): see "
        f"{cache / 'log'}, and start the comparison again to make what is missing."
    )


def _check_folder(key: str, folder: Path) -> None:
    """Find out before anything is trained whether a folder can be written to."""
    try:
        probe_folder(folder)
    except OSError as error:
        raise ConfigError(
            f"{key}: expected a folder that can be written to, but {folder} is none ({error.strerror}): name another."
        ) from None


def _check_extras(cells: list[Cell]) -> None:
    for cell in cells:
        for package, extra in _PACKAGES.get(cell.domain, ()) + _PACKAGES.get(cell.method, ()):
            require(package, extra, f"{cell.method!r} on {cell.domain}")


def _make(missing: list[Cell], config: CompareConfig, report: Callable[[str], None]) -> None:
    groups: dict[Group, list[Cell]] = {}
    for cell in missing:
        groups.setdefault((cell.domain, cell.seed), []).append(cell)
    cache = Path(config.cache)
    if config.workers == "ray":
        _make_on_ray(list(groups.values()), config)
        return
    if config.workers == 1:
        with _progress(missing, cache):
            for cells in groups.values():
                _make_group(cells, config, report)
        return
    # Threads and the interpreter's state do not survive a fork: each worker starts anew.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        int(config.workers), mp_context=context, initializer=_quiet, initargs=(os.getpid(),)
    ) as pool:
        futures = [pool.submit(_make_group, cells, config) for cells in groups.values()]
        try:
            with _progress(missing, cache) as show:
                waiting: set[Future[None]] = set(futures)
                while waiting:
                    done, waiting = wait(waiting, timeout=1.0, return_when=FIRST_EXCEPTION)
                    show()
                    for future in done:
                        future.result()
        except BrokenProcessPool:
            for cell in missing:
                if cell.stored(cache) is None:
                    cell.fail(cache, CalmError("a worker was stopped from outside, for want of memory perhaps"))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list((pool._processes or {}).values()):
                process.terminate()
            raise


def _make_on_ray(groups: list[list[Cell]], config: CompareConfig) -> None:
    """Make all groups on a cluster, and put what other machines have made where it belongs."""
    cache = Path(config.cache)
    output, cache_there, bases = (str(Path(place).absolute()) for place in (config.output, config.cache, config.bases))
    there = replace(config, output=output, cache=cache_there, bases=bases)
    with _progress([cell for cells in groups for cell in cells], cache) as show:
        for number, found in done_on_ray(_group_on_ray, [(cells, there) for cells in groups], config.ray_address):
            if isinstance(found, Exception):
                for cell in groups[number]:
                    if cell.stored(cache) is None:
                        cell.fail(cache, found)
            else:
                for cell, (made, reason) in zip(groups[number], found, strict=True):
                    if made is not None and cell.stored(cache) is None:  # the machines share no folder
                        write_result(cell.path(cache), made)
                    elif made is None and reason is not None:
                        cell.fail(cache, CalmError(reason))
            show()


def _group_on_ray(cells: list[Cell], config: CompareConfig) -> list[tuple[str | None, str | None]]:
    """Make a group here; the text of each cell's file, or why there is none."""
    import torch

    torch.set_num_threads(1)
    _make_group(cells, config)
    cache = Path(config.cache)
    found: list[tuple[str | None, str | None]] = []
    for cell in cells:
        made = cell.stored(cache) is not None
        text = cell.path(cache).read_text(encoding="utf-8") if made else None
        found.append((text, None if made else cell.failure(cache)))
    return found


def _quiet(parent: int) -> None:
    """One thread for each worker, and no bars of its own; it ends when its parent does."""
    import threading

    import torch
    from transformers.utils import logging as messages

    torch.set_num_threads(1)
    messages.disable_progress_bar()
    messages.set_verbosity_error()
    logging.getLogger("transformers").setLevel(logging.ERROR)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(2.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _make_group(cells: list[Cell], config: CompareConfig, report: Callable[[str], None] | None = None) -> None:
    """All missing cells of an experiment with a seed, in order; none is made twice."""
    cache = Path(config.cache)
    log = cache / "log"
    for folder in (log, cache / "locks"):
        folder.mkdir(parents=True, exist_ok=True)
    path = log / f"{cells[0].domain}-{cells[0].seed}.txt"

    def say(line: str) -> None:
        with suppress(OSError), path.open("a", encoding="utf-8") as file:  # a full disk ends no cell
            file.write(f"{time.strftime('%H:%M:%S')} {line}\n")
        if report is not None:
            report(line)

    kind = kind_of(cells[0].domain)
    domain = None
    failed: list[Cell] = []
    # What another process is making is left to it, and waited for at the end.
    for patience in (0, -1):
        for cell in cells:
            lock = FileLock(cache / "locks" / f"{cell.path(cache).name}.lock", timeout=patience)
            with suppress(Timeout), lock:
                if cell.stored(cache) is None and cell not in failed:
                    try:
                        domain = domain or kind(cell.preset, cell.seed, Path(config.bases) / kind.folder, say)
                        cell.do(domain, cache, say)
                    except Exception as error:  # whatever one method comes to, the others are made all the same
                        failed.append(cell)
                        domain = None
                        cell.fail(cache, error)
                        # What a user can mend takes one sentence, which ends the comparison.
                        details = "" if isinstance(error, CalmError) else f"\n{traceback.format_exc()}"
                        say(f"{cell.domain}, seed {cell.seed}: {cell.method} failed{details}")


@contextmanager
def _progress(missing: list[Cell], cache: Path) -> Iterator[Callable[[], None]]:
    """A bar on stderr; what it is told to show counts the cells that lie on disk."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("cells"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("cells", total=len(missing))

        def show() -> None:
            bar.update(task, completed=sum(cell.path(cache).is_file() for cell in missing))

        yield show
