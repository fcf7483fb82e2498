"""Work on a Ray cluster: results by their calls, faults by their kind, and lost workers whose calls are run again."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from calmlm.errors import CalmError, ConfigError, DataError
from calmlm.experiments import cluster
from calmlm.experiments.cluster import done_on_ray

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # a cluster that nobody has asked for
        with cluster.cluster() as found:
            yield found


def test_calls_come_back_with_their_numbers(ray: Any) -> None:
    def double(value: int) -> int:
        if value == 3:
            raise ValueError("three")
        return 2 * value

    found = dict(done_on_ray(double, [(1,), (3,), (5,)]))
    assert (found[0], found[2]) == (2, 10)
    assert isinstance(found[1], ValueError)


def test_faults_of_calmlm_stay_what_they_are(ray: Any) -> None:
    def refuse() -> None:
        raise DataError("Expected a thing.")

    found = dict(done_on_ray(refuse, [()]))
    assert isinstance(found[0], DataError)
    assert str(found[0]) == "Expected a thing."


def test_a_killed_workers_call_is_run_again(ray: Any, tmp_path: Path) -> None:
    def work(folder: str, kills: int) -> int:
        place = Path(folder)
        tries = len(list(place.glob("try-*")))
        (place / f"try-{tries}").touch()
        if tries < kills:
            os.kill(os.getpid(), 9)
        return tries

    (tmp_path / "once").mkdir()
    (tmp_path / "always").mkdir()
    assert dict(done_on_ray(work, [(str(tmp_path / "once"), 1)])) == {0: 1}
    found = dict(done_on_ray(work, [(str(tmp_path / "always"), 99)]))[0]
    assert isinstance(found, CalmError)
    assert "its worker was lost 4 times" in str(found)
    assert len(list((tmp_path / "always").iterdir())) == cluster.RETRIES + 1


def test_a_cluster_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    class Ray:
        is_initialized = staticmethod(lambda: False)

        @staticmethod
        def init(**_: Any) -> None:
            raise ConnectionError("nobody answers")

    monkeypatch.setattr(cluster, "require", lambda *_: None)
    monkeypatch.setitem(sys.modules, "ray", Ray)
    with pytest.raises(ConfigError, match="ray_address must name a Ray cluster that can be reached, but 'x:1' cannot"):
        list(done_on_ray(print, [()], "x:1"))
