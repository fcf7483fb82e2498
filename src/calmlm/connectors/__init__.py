"""The connectors that a user can choose from; each one's formula stands in its own file.

Those that attend follow one small protocol: ``keys_values(hidden, rotation)`` of new augmenting positions, which can be
cached, and ``forward(anchor, keys, values, mask, rotation, attention, seeing)``, the new anchor states. ``attention``
is the ``CrossAttention`` inside; ``before_layer`` tells whether a connection ``(i, j)`` works on the input of the
anchor's layer ``j`` or on its output; ``reads_distribution`` whether it takes the augmenting model's output
distribution instead of the states of its layer ``i``. A ``Graft`` takes the one state that stands beside each of the
anchor's positions: ``forward(anchor, augmenting, where)``. ``is_identity`` tells of each whether all of the anchor's
states are left as they are, as at the start.
"""

from __future__ import annotations

from typing import Any, TypeAlias

from calmlm.config import OF_GRAFTS
from calmlm.connectors.cross_attention import CrossAttention
from calmlm.connectors.flamingo import Flamingo
from calmlm.connectors.graft import Graft
from calmlm.connectors.legonn import LegoNN

Connector: TypeAlias = CrossAttention | Flamingo | Graft | LegoNN
"""Reads states of one layer into another."""

CONNECTORS: dict[str, Any] = {"cross_attention": CrossAttention, "flamingo": Flamingo, "graft": Graft, "legonn": LegoNN}


def build_connector(kind: str, augmenting_size: int, anchor_size: int, options: dict[str, Any]) -> Connector:
    """A new connector of this kind, the identity at its start.

    Args:
        kind: a key of ``CONNECTORS``.
        augmenting_size: width of what it reads: D_A; of a distribution the augmenting vocabulary, or the width of the
            vectors that an ``AnchorIngestor`` made of it.
        anchor_size: D_B.
        options: the connector options of ``calmlm.config.ConnectorConfig`` other than its kind.
    """
    own = {"graft": OF_GRAFTS, "legonn": ("ingestor",)}.get(kind, ())
    others = {*OF_GRAFTS, "ingestor", "top_k"} - {*own}
    given = {key: value for key, value in options.items() if key not in others}
    return CONNECTORS[kind](augmenting_size, anchor_size, **given)
