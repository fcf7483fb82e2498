"""Work on the machines of a Ray cluster: many calls of one function, each run again where its worker is lost."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from calmlm.data.extras import require
from calmlm.errors import CalmError, ConfigError, first_line

__all__ = ["RETRIES", "cluster", "done_on_ray"]

RETRIES = 3
"""How often a call is run again whose worker was killed, or whose machine is gone."""


@contextmanager
def cluster(address: str | None = None) -> Iterator[Any]:
    """The module ``ray``, connected to a cluster; a local one is started, and ended, where none is named.

    Args:
        address: of a cluster, such as ``auto`` or ``ray://host:10001``.

    Raises:
        ConfigError: it cannot be reached.
        MissingExtraError: without ray.
    """
    require("ray", "ray", "workers: ray")
    import ray

    if ray.is_initialized():
        yield ray
        return
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
    local = {} if address is not None else {"num_cpus": os.cpu_count(), "include_dashboard": False}
    try:
        ray.init(address=address or "local", **quiet, **local)
    except Exception as error:  # Ray raises different errors, depending on what is not there
        raise ConfigError(
            f"ray_address must name a Ray cluster that can be reached, but {address!r} cannot ({first_line(error)}): "
            f"check it, or leave it out for a cluster on this machine."
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def done_on_ray(
    function: Callable[..., Any], calls: Sequence[tuple[Any, ...]], address: str | None = None
) -> Iterator[tuple[int, Any]]:
    """Run all calls, one core each; yield the number and the result of each as it is done.

    Args:
        function: can be sent to other machines, on which calmlm is installed.
        calls: arguments of each call.
        address: of a cluster; one on this machine by default.

    Yields:
        the number of a call and its result, or what it raised: a CalmError where its worker was lost too often.
    """
    with cluster(address) as ray:
        task = ray.remote(num_cpus=1, max_retries=RETRIES)(function)
        waiting = {task.remote(*arguments): number for number, arguments in enumerate(calls)}
        while waiting:
            done, _ = ray.wait(list(waiting), num_returns=1)
            for reference in done:
                number = waiting.pop(reference)
                try:
                    yield number, ray.get(reference)
                except (
                    ray.exceptions.WorkerCrashedError,
                    ray.exceptions.NodeDiedError,
                    ray.exceptions.ObjectLostError,
                ):
                    lost = f"its worker was lost {RETRIES + 1} times, for want of memory perhaps"
                    yield number, CalmError(f"Expected a call to be run, but {lost}: look at Ray's logs.")
                except ray.exceptions.RayTaskError as error:
                    yield number, error.cause if isinstance(error.cause, Exception) else error
                except ray.exceptions.RayError as error:  # for want of memory, or of a machine
                    yield number, CalmError(f"Expected a call to be run, but Ray could not ({first_line(error)}).")
