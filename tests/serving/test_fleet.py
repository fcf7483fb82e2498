"""What clients are told where replicas are lost, full or wrong; stand-ins tell what replicas would."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from ray.exceptions import ActorDiedError

from calmlm.serving import fleet
from calmlm.serving.desk import Part, Start
from calmlm.serving.fleet import Fleet
from calmlm.serving.protocol import CompletionRequest
from calmlm.serving.refusals import RefusalError

FULL = RefusalError(429, "Full.", code="queue_full")


class Call:
    """An answer of one replica's: what it tells, an error perhaps."""

    def __init__(self, script: list[Any]) -> None:
        self.script, self.cancelled = iter(script), False

    def __aiter__(self) -> Call:
        return self

    async def __anext__(self) -> Any:
        await asyncio.sleep(0)
        entry = next(self.script, None)
        if entry is None:
            raise StopAsyncIteration
        if isinstance(entry, ActorDiedError):
            raise entry
        return entry

    def cancel(self) -> None:
        self.cancelled = True


class Handle:
    """Stands for a deployment: each call gets the next script."""

    def __init__(self, *scripts: list[Any]) -> None:
        self.calls, self.asked = [Call(script) for script in scripts], list[CompletionRequest]()

    def options(self, **_given: Any) -> Handle:
        return self

    def remote(self, asked: CompletionRequest) -> Call:
        self.asked.append(asked)
        return self.calls[len(self.asked) - 1]


def parts(*texts: str, end: bool = False) -> list[Part]:
    last = len(texts) - 1
    return [Part(0, text, ord(text), 0, "stop" if end and place == last else None) for place, text in enumerate(texts)]


START, DEAD = Start("one", (3,), 1), ActorDiedError()


def told(handle: Handle, *, stream: bool = True) -> str:
    """The text that a client is told."""
    desk = Fleet(handle, {"one": 128}, 2, 8, lambda: 2)
    asked = CompletionRequest(model="one", prompt="abc", stream=stream)

    async def run() -> list[Any]:
        gone = asyncio.get_running_loop().create_future()
        return [entry async for entry in desk.write(asked, gone)]

    found = asyncio.run(run())
    assert desk.idle.is_set()
    assert found[0] == START and found.count(START) == 1
    return "".join(part.text for entry in found[1:] for part in entry)


def test_what_is_written_again_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet, "PAUSE", 0)
    lost = [START, parts("a"), parts("b", "c"), DEAD]
    again = [START, parts("a", "b"), parts("c", "d"), parts("e", end=True)]
    for stream in (True, False):
        handle = Handle(lost, [DEAD], [START, parts("a")], again)  # the third ends before its text does
        assert told(handle, stream=stream) == "abcde"
        assert len(handle.asked) == 4
        assert handle.asked[0].seed is not None and len({asked.seed for asked in handle.asked}) == 1
    other = [START, parts("a", "b"), parts("x", "d"), parts("e", end=True)]
    with pytest.raises(RefusalError, match="writes it otherwise") as found:
        told(Handle(lost, other))
    assert (found.value.status, found.value.code) == (503, "replica_lost")
    assert told(Handle(lost, other), stream=False) == "abxde"  # nobody had been told another text
    handle = Handle(*[[START, DEAD]] * 5)
    with pytest.raises(RefusalError, match="lost with 4 replicas"):
        told(handle)
    assert len(handle.asked) == fleet.RETRIES + 1


def test_a_replica_that_is_full_leads_to_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet, "PAUSE", 0)
    whole = [START, parts("a", end=True)]
    assert told(Handle([FULL], whole)) == "a"
    with pytest.raises(RefusalError) as found:
        told(Handle([FULL], [FULL], whole))
    assert found.value is FULL
    assert told(Handle([DEAD], *[[FULL]] * 5, whole)) == "a"  # what was accepted waits
    wrong = RefusalError(400, "Wrong.")
    with pytest.raises(RefusalError) as found:
        told(Handle([wrong], whole))
    assert found.value is wrong


def test_a_client_that_goes_is_waited_for_no_more() -> None:
    handle = Handle([START, *[parts("a")] * 1000])
    desk = Fleet(handle, {"one": 128}, 2, 8, lambda: 2)

    async def run() -> None:
        gone = asyncio.get_running_loop().create_future()
        answer = desk.write(CompletionRequest(model="one", prompt="abc", stream=True), gone)
        await anext(answer)
        await anext(answer)
        assert not desk.idle.is_set()
        desk.drain()
        with pytest.raises(RefusalError, match="shutting down"):
            await anext(desk.write(CompletionRequest(model="one", prompt="abc"), gone))
        assert not desk.idle.is_set()
        await answer.aclose()

    asyncio.run(run())
    assert handle.calls[0].cancelled and desk.idle.is_set()
