"""``calmlm serve``: load, listen, and finish what was accepted before the end."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from calmlm.data.extras import require
from calmlm.errors import ConfigError

if TYPE_CHECKING:
    from calmlm.serving.desk import Desk

KEY = "CALMLM_API_KEY"
STUCK = 30  # seconds that clients have to read what is written for them, once the server ends


@dataclass(frozen=True)
class Options:
    """Where and how to serve.

    Attributes:
        host: to listen at.
        port: to listen at; 0 takes a free one.
        api_key: what requests have to bring; None reads ``CALMLM_API_KEY``, and asks for nothing where that is empty.
        max_batch: texts that are written at a time.
        max_queue: texts that may wait besides.
        max_tokens: of a prompt and its answer; None leaves it to the models.
        max_body: bytes of a request.
        tokenizer: id or folder, where the compositions have none.
        device: of the models.
        dtype: of the base models; None keeps their own.
        drafts: tokens that are drafted at a time for a text that is written alone; 0 for none.
        replicas: processes that each load all models, on a Ray cluster; None serves from this process alone.
        ray_address: of the cluster; None starts one on this machine where there are replicas.
        merge_adapters: whether adapters lie inside the anchor's weights.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    max_batch: int = 32
    max_queue: int = 256
    max_tokens: int | None = None
    max_body: int = 2**20
    tokenizer: str | None = None
    device: str = "auto"
    dtype: str | None = None
    drafts: int = 8
    replicas: int | None = None
    ray_address: str | None = None
    merge_adapters: bool = False


def serve(folders: Sequence[str], options: Options, report: Callable[[str], None]) -> None:
    """Serve compositions until a signal comes; what was accepted is finished then.

    Args:
        folders: of the compositions, or ``name=folder``.
        options: where and how.
        report: takes lines.

    Raises:
        CalmError: something cannot be served; nothing was begun then.
    """
    for package in ("fastapi", "uvicorn", "prometheus_client"):
        require(package, "serve", "calmlm serve")
    on_ray = options.replicas is not None or options.ray_address is not None
    if on_ray:
        require("ray", "ray", "calmlm serve with replicas")
    if options.replicas is not None and options.replicas < 1:
        raise ConfigError(f"--replicas must be at least 1, but got {options.replicas}: write another number.")
    from calmlm.serving.catalogue import check_places, named

    key = options.api_key if options.api_key is not None else os.environ.get(KEY) or None
    if key is not None and not key.strip():
        raise ConfigError("--api-key must be a word, but got none: leave it out, or write one.")
    places = named(folders)
    check_places(places)
    listener = listen_at(options.host, options.port)
    with listener, _desk(places, options, on_ray, report) as desk:
        _listen(desk, options, key, listener, report)
    report("All that was accepted is answered.")


@contextmanager
def _desk(places: dict[str, str], options: Options, on_ray: bool, report: Callable[[str], None]) -> Iterator[Desk]:
    """What answers: an engine in this process, or replicas."""
    if on_ray:
        from calmlm.serving.deploying import deployed
        from calmlm.serving.replicas import Models

        there = {name: os.path.abspath(place) if os.path.exists(place) else place for name, place in places.items()}
        words = options.tokenizer
        words = os.path.abspath(words) if words is not None and os.path.exists(words) else words
        models = Models(
            there, words, options.device, options.dtype, options.max_tokens, options.max_batch, options.max_queue,
            options.drafts, options.merge_adapters,
        )  # fmt: skip
        with deployed(models, options.replicas or 1, options.ray_address, KEY, report) as fleet:
            yield fleet
        return
    from calmlm.serving.catalogue import load
    from calmlm.serving.desk import EngineDesk
    from calmlm.serving.engine import Engine

    report(f"Loading {', '.join(places)} and the models beneath ...")
    catalogue = load(
        places,
        tokenizer=options.tokenizer,
        device=options.device,
        dtype=options.dtype,
        max_tokens=options.max_tokens,
        merge_adapters=options.merge_adapters,
    )
    engine = Engine(options.max_batch, options.max_queue, catalogue.max_length, options.drafts)
    engine.start()
    try:
        yield EngineDesk(catalogue, engine)
    finally:
        engine.close()


def _listen(
    desk: Desk, options: Options, key: str | None, listener: socket.socket, report: Callable[[str], None]
) -> None:
    """Answer requests until a signal has come and what was accepted is finished."""
    import uvicorn

    from calmlm.serving.app import make_app
    from calmlm.serving.last_words import end_quietly

    app = make_app(desk, api_key=key, max_body=options.max_body)
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, lifespan="off", server_header=False,
        timeout_graceful_shutdown=STUCK,
    )  # fmt: skip

    class Server(uvicorn.Server):
        """A signal lets it finish what was accepted; a second one ends it at once."""

        def handle_exit(self, sig: int, frame: Any) -> None:
            if desk.draining:
                self.should_exit = self.force_exit = True
                return
            desk.drain()
            threading.Thread(target=self._end, daemon=True).start()

        def _end(self) -> None:
            desk.idle.wait()
            self.should_exit = True

    end_quietly()
    report(f"Serving {', '.join(desk.limits)} at {opened(listener)}/v1")
    Server(config).run(sockets=[listener])


def opened(listener: socket.socket) -> str:
    """The address of a socket, at which clients may come from now on."""
    listener.listen()
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def listen_at(host: str, port: int) -> socket.socket:
    """A socket to listen at, so that a port that is taken is known before anything is loaded.

    Raises:
        ConfigError: it cannot be had.
    """
    made = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family, kind, protocol)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
    except (OSError, OverflowError, UnicodeError) as error:
        if made is not None:
            made.close()
        said = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"--host and --port must name a place to listen at, but {host}:{port} is none ({said}): choose another."
        ) from None
    made.set_inheritable(True)
    return made
