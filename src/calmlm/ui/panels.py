"""What was found inside a composition, as HTML: a heat map, a row for each token, what each connection adds."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from torch import Tensor

from calmlm.communication.token_texts import shown
from calmlm.communication.trace import Trace

__all__ = ["CSS", "connection_table", "heat_map", "note", "token_table"]

CSS = """
.calm-scroll { overflow: auto; max-width: 100%; max-height: 34rem; }
.calm-scroll table { border-collapse: separate; border-spacing: 1px; width: auto; margin: 0; font-size: 0.8rem;
  border: none !important; }
.calm-scroll th, .calm-scroll td { padding: 2px 6px; text-align: right; white-space: nowrap; border: none; }
.calm-scroll th { font-weight: 500; color: var(--body-text-color); }
.calm-scroll th.token { text-align: left; font-family: var(--font-mono); position: sticky; left: 0; z-index: 1;
  background: var(--body-background-fill); }
.calm-heat thead th { writing-mode: vertical-rl; transform: rotate(180deg); text-align: left; padding: 4px 1px;
  font-family: var(--font-mono); }
.calm-heat thead th.corner { writing-mode: horizontal-tb; transform: none; }
.calm-heat thead th.past { font-style: italic; opacity: 0.7; }
.calm-heat td { min-width: 1.5rem; height: 1.5rem; padding: 0; border: 1px solid var(--border-color-primary); }
.calm-note { color: var(--body-text-color); opacity: 0.8; font-size: 0.85rem; margin: 0.25rem 0 0.5rem; }
#heat, #tokens, #added { padding: 0; }
footer { display: none !important; }
"""
SLIGHT = 1e-9  # what is shaded against where all is zero


def note(text: str) -> str:
    """A line of explanation."""
    return f'<p class="calm-note">{escape(text)}</p>'


def heat_map(trace: Trace, connection: str, head: int | None) -> str:
    """Which augmenting tokens each token of the answer attended to.

    Args:
        trace: of the answer.
        connection: the label of one that attends.
        head: from 0; None for the mean of all.
    """
    one = next((found for found in trace.attention if found.label == connection), None)
    if one is None or not one.weights.shape[2]:
        return note("This connection attended to nothing.")

    def chosen(part: Tensor) -> list[Any]:
        return (part.mean(0) if head is None else part[head]).tolist()

    heard, rows = trace.heard[one.model], chosen(one.weights)
    titles = [(shown(token), "" if stays else "past") for token, stays in zip(heard.tokens, heard.stays, strict=True)]
    if one.nothing is not None:
        titles.append(("(nothing)", "past"))
        rows = [[*row, rest] for row, rest in zip(rows, chosen(one.nothing), strict=True)]
    top = max(SLIGHT, *(weight for row in rows for weight in row))
    head_row = "".join(f'<th class="{kind}">{escape(title)}</th>' for title, kind in titles)
    body = ""
    for token, row in zip(trace.tokens, rows, strict=True):
        name = shown(token)
        cells = "".join(
            f'<td title="{escape(f"{name} → {title}: {weight:.3f}", quote=True)}" style="{_shade(weight / top)}"></td>'
            for weight, (title, _) in zip(row, titles, strict=True)
        )
        body += f'<tr><th class="token">{escape(name)}</th>{cells}</tr>'
    table = f'<table class="calm-heat"><thead><tr><th class="corner token"></th>{head_row}</tr></thead>{body}</table>'
    more = "" if all(heard.stays) else " Those in italics were read for a while, since the text could have ended there."
    said = f"Rows: the answer. Columns: what {one.model} had read. The darkest weight is {top:.2f}.{more}"
    return f'{note(said)}<div class="calm-scroll">{table}</div>'


def token_table(trace: Trace) -> str:
    """Log-probabilities, what each augmenting model is worth, and gates, for each token of the answer."""
    columns: list[tuple[str, Sequence[float], str, float]] = [
        ("log p, composition", trace.composition, ".2f", 0),
        ("log p, anchor", trace.anchor, ".2f", 0),
    ]
    for title, group in (("silenced", trace.silenced), ("swapped", trace.swapped)):
        columns += [(f"{name} {title}", values, "+.2f", _largest(values)) for name, values in group.items()]
    columns += [(f"gate, {label}", values, ".3f", 1) for label, values in trace.gates.items()]
    return _table("token", trace.tokens, columns)


def connection_table(trace: Trace) -> str:
    """What each connection adds, over what it is added to."""
    if not trace.contributions:
        return note("No connection adds anything to a state.")
    each = list(trace.contributions.values())
    means, most = [sum(values) / len(values) for values in each], [max(values) for values in each]
    top = max(SLIGHT, *most)
    columns: list[tuple[str, Sequence[float], str, float]] = [("mean", means, ".3f", top), ("most", most, ".3f", top)]
    return _table("connection", list(trace.contributions), columns)


def _table(first: str, names: Sequence[str], columns: Sequence[tuple[str, Sequence[float], str, float]]) -> str:
    """Rows with numbers, shaded where a column says which number is the darkest."""
    titles = "".join(f"<th>{escape(title)}</th>" for title, *_ in columns)
    body = ""
    for index, name in enumerate(names):
        cells = ""
        for _, values, form, top in columns:
            value = values[index]
            plain = format(value, form) if abs(value) >= 0.005 or form == ".3f" else "0.00"
            cells += f'<td style="{_shade(value / top if top else 0)}">{plain}</td>'
        body += f'<tr><th class="token">{escape(shown(name))}</th>{cells}</tr>'
    return (
        f'<div class="calm-scroll"><table><thead><tr><th class="token">{first}</th>{titles}</tr></thead>'
        f"{body}</table></div>"
    )


def _shade(share: float) -> str:
    """A background between none and full, orange for what is below zero."""
    color = "37, 99, 235" if share >= 0 else "234, 88, 12"
    return f"background: rgba({color}, {min(1.0, abs(share)):.3f})" + ("; color: white" if abs(share) > 0.6 else "")


def _largest(values: Sequence[float]) -> float:
    return max(SLIGHT, *(abs(value) for value in values))
