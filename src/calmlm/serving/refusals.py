"""Errors in the shape that OpenAI's clients read."""

from __future__ import annotations

import json
from typing import Any

from starlette.responses import JSONResponse

TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class Json(JSONResponse):
    """JSON in ASCII, in which half a character that a request brought can be shown as well."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode()


class RefusalError(Exception):
    """A request that is not answered.

    Args:
        status: of HTTP.
        message: what was expected, what arrived, what to do.
        param: the field that is wrong, or None.
        code: a word for programs, or None.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def __reduce__(self) -> tuple[type[RefusalError], tuple[int, str, str | None, str | None]]:
        """Pickled by what it was made of, so that it comes from a replica as itself."""
        return type(self), (self.status, str(self), self.param, self.code)

    @property
    def body(self) -> dict[str, Any]:
        """The error as JSON."""
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    @property
    def response(self) -> Json:
        """The error as a response."""
        waits = {"Retry-After": "1"} if self.status in (429, 503) else {}
        names = {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}
        return Json(self.body, self.status, headers=waits | names)


def no_model(name: str) -> RefusalError:
    """A request for a model that is not served."""
    return RefusalError(404, f"The model {name!r} does not exist: see /v1/models.", "model", "model_not_found")


def wrong_request(errors: list[Any]) -> RefusalError:
    """The first fault of a request that has not the right form."""
    error = errors[0] if errors else {"loc": (), "msg": "it cannot be read"}
    places = [str(part) for part in error.get("loc", ()) if part != "body"]
    if error.get("type") == "json_invalid":
        return RefusalError(400, "The request body must be JSON, but it cannot be read: send JSON.")
    where = ".".join(places) or "The request body"
    told = str(error.get("msg", "it is wrong")).removeprefix("Value error, ").rstrip(".")
    return RefusalError(400, f"{where} is wrong: {told}.", places[0] if places else None)
