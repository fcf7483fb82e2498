"""The garbage collector rests while vocabularies are read, and then it works again."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest

from calmlm.tokens import lookup
from calmlm.tokens.collecting import without_collector
from tokenizers_tiny import tokenizer


def test_it_is_as_it_was_afterwards() -> None:
    with pytest.raises(ZeroDivisionError), without_collector():
        assert not gc.isenabled()
        _ = 1 / 0
    assert gc.isenabled()
    gc.disable()
    try:
        with without_collector():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_tokenizers_are_found_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer("bytes").save_pretrained(tmp_path)
    read, working = lookup.AutoTokenizer.from_pretrained, []

    def noted(*args: Any, **options: Any) -> Any:
        working.append(gc.isenabled())
        return read(*args, **options)

    monkeypatch.setattr(lookup.AutoTokenizer, "from_pretrained", noted)
    assert lookup.find_tokenizer(tmp_path) is not None
    assert working == [False] and gc.isenabled()
