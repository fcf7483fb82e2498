"""What accelerate and transformers leave in the process's environment, which the next training would read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

PREFIXES = ("ACCELERATE_", "FSDP_")


@contextmanager
def environment_restored() -> Iterator[None]:
    """Behind this context, the variables that choose how accelerate trains are as they were before it.

    A training with FSDP sets them, and every later one in the process, or in processes that it starts, would use FSDP.
    """
    before = _chosen()
    try:
        yield
    finally:
        for name in _chosen().keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)


def _chosen() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith(PREFIXES)}
