"""Reading a GGUF file once: transformers reads it anew for a configuration, a tokenizer and the weights.

A vocabulary of 262,000 tokens takes ten seconds each time.
"""

from __future__ import annotations

import importlib
import logging as standard
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

from transformers.utils import logging

_lock = threading.RLock()
_read: dict[tuple[Any, ...], Any] = {}
_depth = 0
_package: Any = None  # while its class is replaced
_loader: Any = None  # while its function is


@contextmanager
def reading_once() -> Iterator[None]:
    """Within this, a GGUF file is read once, however often it is opened; it stays as long as it does not change."""
    global _depth, _package, _loader
    with _lock:
        _depth += 1
    try:
        yield
    finally:
        with _lock:
            _depth -= 1
            if _depth == 0:
                if _package is not None:
                    _package.GGUFReader, _package = _package.GGUFReader.reader, None
                if _loader is not None:
                    _loader.load_gguf_checkpoint, _loader = _loader.load_gguf_checkpoint.load, None
                _read.clear()


def about_to_read() -> None:
    """Called before transformers opens a GGUF file; where there is none, the package is not even imported."""
    global _package, _loader
    _heed_progress_bars()
    with _lock:
        if _depth == 0 or _package is not None:
            return
        try:
            package: Any = importlib.import_module("gguf")
        except ImportError:  # whoever needs it says so
            return
        package.GGUFReader, _package = _Remembering(package.GGUFReader), package
        loader: Any = importlib.import_module("transformers.modeling_gguf_pytorch_utils")
        loader.load_gguf_checkpoint, _loader = _RememberingSettings(loader.load_gguf_checkpoint), loader


def truthful(load: Callable[[], tuple[Any, Any]]) -> tuple[Any, Any]:
    """What ``load`` gives: a model from a GGUF file, and a report.

    transformers warns of packed weights before it knows whether it packs any; of a file that it unpacks, as those of
    most architectures, the warning goes no further.
    """
    logger, held = standard.getLogger("transformers.quantizers.quantizer_gguf"), _Holding()
    logger.addFilter(held)
    try:
        model, report = load()
    finally:
        logger.removeFilter(held)
    if getattr(getattr(model, "hf_quantizer", None), "packed_modules", None):
        for record in held.records:
            logger.handle(record)
    return model, report


class _Holding(standard.Filter):
    def __init__(self) -> None:
        super().__init__()
        self.records: list[standard.LogRecord] = []

    def filter(self, record: standard.LogRecord) -> bool:
        about_packing = "weights packed" in record.getMessage()
        if about_packing:
            self.records.append(record)
        return not about_packing


def _heed_progress_bars() -> None:
    """Let the bar of GGUF files be switched off with transformers' others, which it is not by itself."""
    loader: Any = importlib.import_module("transformers.modeling_gguf_pytorch_utils")
    if hasattr(loader, "tqdm"):
        loader.tqdm = logging.tqdm


class _Remembering:
    """What stands in the place of the package's class meanwhile."""

    def __init__(self, reader: Any) -> None:
        self.reader = reader

    def __call__(self, path: Any, *options: Any) -> Any:
        return _remembered(path, options, lambda: self.reader(path, *options))


class _RememberingSettings:
    """What stands in the place of transformers' function: it parses the vocabulary for a configuration, too."""

    def __init__(self, load: Any) -> None:
        self.load = load

    def __call__(self, path: Any, return_tensors: bool = False, **options: Any) -> Any:
        if return_tensors or options:
            return self.load(path, return_tensors, **options)
        return deepcopy(_remembered(path, ("settings",), lambda: {"config": self.load(path)["config"]}))


def _remembered(path: Any, options: tuple[Any, ...], read: Callable[[], Any]) -> Any:
    found = os.stat(path)
    key = (os.path.realpath(path), found.st_mtime_ns, found.st_size, *options)
    with _lock:
        if key not in _read:
            _read[key] = read()
        return _read[key]
