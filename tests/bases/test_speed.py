"""The dtype that a machine is fast in."""

from __future__ import annotations

import pytest
import torch

from calmlm.bases import speed


def test_float32_takes_as_long_as_itself() -> None:
    assert speed.slowness(torch.float32) == 1.0
    assert speed.slowness(torch.bfloat16) > 0


@pytest.mark.parametrize(("times", "chosen"), [(0.3, torch.bfloat16), (30.0, torch.float32)])
def test_the_faster_one_is_taken(times: float, chosen: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "slowness", lambda dtype: times)
    assert speed.faster_dtype("cpu") == chosen
    assert speed.faster_dtype("cuda") == torch.bfloat16
