"""Vocabularies are read without Python's garbage collector.

A large vocabulary is millions of small objects, none of them garbage. The collector would look at all of them again and
again while they are made, which takes a third of the time.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collector() -> Iterator[None]:
    """Let the collector rest meanwhile; afterwards it is as it was."""
    works = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if works:
            gc.enable()
