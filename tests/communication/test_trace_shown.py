"""A trace in a terminal and as a picture, whatever its tokens are."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from matplotlib.image import imread
from rich.console import Console

from calmlm.communication.token_texts import shown
from calmlm.communication.trace import Attended, Heard, Trace
from calmlm.communication.trace_page import show_trace, strongest
from calmlm.communication.trace_picture import draw_trace

ODD = ["[red]", ":key:", " $x_1$", "\n", "日本", "\\xf0", "\x1b[0m", "  "]


def trace(columns: int = 3, connections: int = 2) -> Trace:
    rows = len(ODD)
    weights = [torch.rand(2, rows, columns, generator=torch.Generator().manual_seed(k)) for k in range(connections)]
    weights = [part / part.sum(-1, keepdim=True) for part in weights]
    return Trace(
        "a [b] 1:100:2", "".join(ODD), ODD, 1.0, [-0.001] * rows, [-2.5] * rows,
        {"one": Heard([f"{ODD[k % rows]}{k}" for k in range(columns)], [True] * columns)},
        [Attended("one", (k, k + 1), part, None) for k, part in enumerate(weights)],
        {"one pointer": [0.25] * rows}, {"one 0 → 1": [0.5] * (rows - 1) + [1.5]}, {"one": [2.499] * rows},
    )  # fmt: skip


def test_tokens_are_words() -> None:
    assert [shown(token) for token in ODD] == ["[red]", ":key:", "␣$x_1$", "\\n", "日本", "\\xf0", "\\x1b[0m", "␣␣"]
    assert shown(" a b ") == "␣a b␣" and shown("") == ""


def test_in_a_terminal() -> None:
    found = trace()
    page = Console(file=io.StringIO(), width=140)
    show_trace(found, page)
    text = page.file.getvalue()  # type: ignore[attr-defined]
    assert "[red]" in text and text.count(":key:") > 1
    assert "\x1b" not in text.replace("\\x1b", "") and "-0.00" not in text
    assert "+2.50" in text and "0.625" in text and "1.500" in text and "a [b] 1:100:2" in text
    mean = (found.attention[0].weights.mean(0) + found.attention[1].weights.mean(0)) / 2
    for row, (token, weight) in enumerate(strongest(found, "one")):
        assert weight == float(mean[row].max()) and token == found.heard["one"].tokens[int(mean[row].argmax())]
    assert strongest(trace(columns=0), "one") == strongest(trace(connections=0), "one") == [("", 0.0)] * len(ODD)


def test_as_a_picture(tmp_path: Path) -> None:
    sizes = []
    for columns, connections in ((3, 1), (200, 2), (0, 1), (3, 0)):
        draw_trace(trace(columns, connections), tmp_path / "trace.png")
        sizes.append(imread(tmp_path / "trace.png").shape[:2])
    assert sizes[1][0] > sizes[0][0] > sizes[3][0] and sizes[1][1] > 2 * sizes[0][1]
