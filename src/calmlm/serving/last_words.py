"""What uvicorn logs when a server ends while somebody still listens: one line and a traceback, which tell nothing."""

from __future__ import annotations

import logging
from asyncio import CancelledError

__all__ = ["end_quietly"]


class _Given(logging.Filter):
    """Drops what is logged about answers that are given up at the end."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        return not isinstance(error, CancelledError) and "timeout graceful shutdown exceeded" not in record.getMessage()


def end_quietly() -> None:
    """Called once uvicorn has set its logging up."""
    logging.getLogger("uvicorn.error").addFilter(_Given())
