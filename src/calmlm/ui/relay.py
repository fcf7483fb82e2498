"""Text that a thread writes, for someone who asks for it piece by piece and may go away."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

__all__ = ["Relay"]

T = TypeVar("T")


class _GoneError(Exception):
    """Nobody asks for the text any more."""


class Relay(Generic[T]):
    """Runs something that emits text, and hands the text on while it is written.

    Args:
        write: is given what takes pieces of text, and returns a result.

    Attributes:
        result: what ``write`` has returned, once all text was taken.
    """

    def __init__(self, write: Callable[[Callable[[str], None]], T]) -> None:
        self.write = write
        self.result: T | None = None

    def __iter__(self) -> Iterator[str]:
        """All text so far, each time there is more.

        Ending the loop early ends the writing at its next piece, and waits for that.

        Raises:
            Exception: whatever ``write`` raises.
        """
        pieces: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        gone, failed = threading.Event(), list[BaseException]()

        def emit(piece: str) -> None:
            if gone.is_set():
                raise _GoneError
            pieces.put(piece)

        def run() -> None:
            try:
                self.result = self.write(emit)
            except BaseException as error:  # for the one who asks
                failed.append(error)
            finally:
                pieces.put(None)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        text = ""
        try:
            while (piece := pieces.get()) is not None:
                text += piece
                yield text
        finally:
            gone.set()
            thread.join()
        if failed:
            raise failed[0]
