"""Whether anything is communicated: the same items, but the augmenting models read another item's prompt.

What a composition gains over its anchor may come from more parameters and more training alone. The *pairing gain* is
what it loses when everything stays as it is but what its augmenting models read: the figure with the right prompt,
against the figure with another one of the same task.
"""

from __future__ import annotations

from calmlm.controls.ending import EndOfOther
from calmlm.controls.intervals import paired
from calmlm.controls.pairing import beside, listening, partners

__all__ = ["EndOfOther", "beside", "listening", "paired", "partners"]
