"""What was found inside a composition, for a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from calmlm.communication.token_texts import printable, shown
from calmlm.communication.trace import Trace

__all__ = ["show_trace", "strongest"]

KEPT = "\n\t"


def show_trace(trace: Trace, console: Console) -> None:
    """Print an answer, what happened at each of its tokens, and what each connection adds.

    Args:
        trace: of the answer.
        console: where to print.
    """
    # A Text is shown as it is: in a string, rich would take [red] for a colour, and :100: for a picture.
    for title, text in (("prompt", trace.prompt), ("answer", trace.answer)):
        console.print(Text.assemble((title, "bold"), f"  {printable(text, KEPT)}"))
    console.print(_tokens(trace))
    if trace.contributions:
        console.print(_connections(trace))


def strongest(trace: Trace, name: str) -> list[tuple[str, float]]:
    """The token of an augmenting model that each token of the answer attended to most, and its weight.

    The weight is the mean over all connections of the model and their heads; "" and 0 where nothing was seen.

    Args:
        trace: of the answer.
        name: of the augmenting model.
    """
    weights = [one.weights.mean(0) for one in trace.attention if one.model == name]
    if not weights or not weights[0].shape[1]:
        return [("", 0.0)] * len(trace.tokens)
    mean = sum(weights[1:], weights[0]) / len(weights)
    best, columns = mean.max(-1)
    tokens = trace.heard[name].tokens
    pairs = zip(best.tolist(), columns.tolist(), strict=True)
    return [(tokens[column], weight) if weight > 0 else ("", 0.0) for weight, column in pairs]


def _tokens(trace: Trace) -> Table:
    table = Table(title="each token of the answer, log-probabilities in nats", title_justify="left", title_style="dim")
    table.add_column("token", no_wrap=True)
    cells = [[shown(token) for token in trace.tokens]]

    def column(title: str, values: list[str], justify: str = "right") -> None:
        table.add_column(Text(title), justify=justify)  # type: ignore[arg-type]
        cells.append(values)

    column("composition", [_number(value) for value in trace.composition])
    column("anchor", [_number(value) for value in trace.anchor])
    for title, group in (("silenced", trace.silenced), ("swapped", trace.swapped)):
        for name, values in group.items():
            column(f"{name} {title}", [_number(value, "+.2f") for value in values])
    for label, values in trace.gates.items():
        column(f"gate {label}", [f"{value:.2f}" for value in values])
    for name in dict.fromkeys(one.model for one in trace.attention):
        best = strongest(trace, name)
        column(f"{name} attended to", [f"{shown(t)} {w:.2f}" if t else "" for t, w in best], "left")
    for row in zip(*cells, strict=True):
        table.add_row(*map(Text, row))
    return table


def _number(value: float, form: str = ".2f") -> str:
    """A number with two digits; what is rounded to zero has no sign."""
    return format(round(value, 2) + 0.0, form if round(value, 2) else ".2f")


def _connections(trace: Trace) -> Table:
    table = Table("connection", title="added, over what it is added to", title_justify="left", title_style="dim")
    for title in ("mean", "most"):
        table.add_column(title, justify="right")
    for label, values in trace.contributions.items():
        table.add_row(Text(label), f"{sum(values) / len(values):.3f}", f"{max(values):.3f}")
    return table
