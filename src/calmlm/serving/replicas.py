"""One of several replicas on a Ray cluster: it loads the models, and its own engine writes what it is asked for."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import ray
from prometheus_client import Metric
from ray import serve
from ray.exceptions import ActorDiedError, RayError
from transformers.utils import logging as messages

from calmlm.serving.catalogue import load
from calmlm.serving.desk import EngineDesk, Told
from calmlm.serving.engine import Engine
from calmlm.serving.protocol import ChatRequest, CompletionRequest, TokenizeRequest
from calmlm.serving.refusals import RefusalError

TERM = 5  # seconds from one look at the lease to the next


@dataclass(frozen=True)
class Models:
    """What each replica loads, and how much it takes on. Ray shows these values to whoever may look into its state.

    Attributes:
        places: folders, the same on each machine, or ids, by name.
        tokenizer: id or folder, where the compositions have none.
        device: of the models.
        dtype: of the base models; None keeps their own.
        max_tokens: of a prompt and its answer; None leaves it to the models.
        max_batch: texts that are written at a time.
        max_queue: texts that may wait besides.
        drafts: tokens that are drafted at a time for a text that is written alone; 0 for none.
        merge_adapters: whether adapters lie inside the anchor's weights.
    """

    places: dict[str, str]
    tokenizer: str | None
    device: str
    dtype: str | None
    max_tokens: int | None
    max_batch: int
    max_queue: int
    drafts: int
    merge_adapters: bool = False


class Lease:
    """An actor that ends with the process that made it, whatever ends that; replicas on a cluster end with it."""

    def holds(self) -> bool:
        """Asked by replicas."""
        return True


class Replica:
    """What Ray Serve runs several times.

    Args:
        models: what it loads.
        lease: a handle of a Lease's, without which there is nobody to write for; None where the cluster ends as well.

    Raises:
        CalmError: it cannot be loaded on this machine.
    """

    def __init__(self, models: Models, lease: Any = None) -> None:
        messages.disable_progress_bar()
        logging.getLogger("transformers").setLevel(logging.ERROR)
        given = {
            name: getattr(models, name) for name in ("tokenizer", "device", "dtype", "max_tokens", "merge_adapters")
        }
        catalogue = load(models.places, **given)
        self._engine = Engine(models.max_batch, models.max_queue, catalogue.max_length, models.drafts)
        self._engine.start()
        self._desk = EngineDesk(catalogue, self._engine)
        if lease is not None:
            threading.Thread(target=_end_with, args=(lease,), daemon=True).start()

    def check_health(self) -> None:
        """Asked by Ray Serve, which replaces a replica that raises."""
        if not self._engine.alive:
            raise RuntimeError("The engine has ended.")

    async def limits(self) -> dict[str, int]:
        """Tokens of a text at most, by model."""
        return self._desk.limits

    async def figures(self) -> tuple[str, list[Metric]]:
        """The name of this replica, and what it counts."""
        return serve.get_replica_context().replica_id.unique_id, list(self._engine.metrics.registry.collect())

    async def tokens(self, asked: TokenizeRequest) -> list[int] | RefusalError:
        """The tokens of a text or a conversation, or why there are none."""
        try:
            return await self._desk.tokens(asked)
        except RefusalError as error:
            return error

    async def write(self, asked: CompletionRequest | ChatRequest) -> AsyncGenerator[Told | RefusalError]:
        """What the engine writes for a request, or why it does not; it is given up when the call is cancelled."""
        gone: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        try:
            async with aclosing(self._desk.write(asked, gone)) as told:
                async for entry in told:
                    yield entry
        except RefusalError as error:
            yield error


def _end_with(lease: Any) -> None:
    """Ask a lease from time to time, and end all replicas when it is dead."""
    name = serve.get_replica_context().app_name
    while True:
        time.sleep(TERM)
        try:
            ray.get(lease.holds.remote(), timeout=TERM)
        except ActorDiedError:
            serve.delete(name, _blocking=False)
            return
        except RayError:  # a network that is slow ends nothing
            continue
