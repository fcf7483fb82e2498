"""What a composition is made of, as data: its connections, its connector's options and its configuration file."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from calmlm.errors import ConfigError

Pairs = tuple[tuple[int, int], ...]
"""Connections as ``(augmenting_layer, anchor_layer)``, both 0-based indices of decoder layers.

The pair ``(i, j)`` reads the output of the augmenting model's layer ``i`` and adds to the output of the anchor's
layer ``j``, which is the input of layer ``j + 1`` (paper, section 3.1).
"""

READS = ("tokens", "text", "prompt", "inputs")
"""What an augmenting model reads: the anchor's token ids, the same text in tokens of its own, the prompt alone, or (an
encoder) inputs of its own."""

GGUF = ".gguf"

NONE = "none"
WORDS = ("map", "pointer")
"""What an augmenting model may say: in the anchor's last state, see ``calmlm.connectors.word_map``, or in its
probabilities, see ``calmlm.connectors.pointer``."""

KINDS = ("cross_attention", "flamingo", "graft", "legonn")

OF_GRAFTS = ("opened", "train_map")
"""Options that a graft alone has; it has none of the others."""

ALIGNED = "aligned-"

PROJECTIONS = ("linear", "residual")

INGESTORS = ("learned", "anchor")
TOP_K = 16

EVERY = 4  # N_A / n in all experiments of the paper


def resolve_connections(
    connections: str | int | Sequence[Sequence[int]], augmenting_layers: int, anchor_layers: int
) -> Pairs:
    """Turn what a user may write into explicit pairs.

    Args:
        connections: one of

            * ``"every-4"``: every 4th layer of the augmenting model (3, 7, 11, ...; its last layer where it has fewer
              than four), spread evenly over the anchor, the last one on the anchor's last layer (paper, section 4);
            * ``"none"``: none at all, for models that are joined by words alone;
            * ``"top"``: as many as ``"every-4"``, on the topmost layers of both models: the backward pass is short;
            * an integer ``n``: ``n`` connections spread evenly over both models;
            * pairs ``(augmenting_layer, anchor_layer)``, 0-based.
        augmenting_layers: number of layers of the augmenting model, N_A.
        anchor_layers: number of layers of the anchor, N_B.

    Returns:
        the pairs, in the order of the anchor's layers.

    Raises:
        ConfigError: for an unknown form, no connection, an index out of range or a pair given twice.
    """
    if isinstance(connections, str):
        count = min(max(1, augmenting_layers // EVERY), anchor_layers)
        if connections == f"every-{EVERY}":
            if augmenting_layers < EVERY:
                return ((augmenting_layers - 1, anchor_layers - 1),)
            return tuple((EVERY * (k + 1) - 1, (k + 1) * anchor_layers // count - 1) for k in range(count))
        if connections == NONE:
            return ()
        if connections == "top":
            return tuple((augmenting_layers - count + k, anchor_layers - count + k) for k in range(count))
        raise ConfigError(
            f"connections must be 'every-{EVERY}', 'top', 'aligned-1', a number or pairs (augmenting_layer, "
            f"anchor_layer), but got {connections!r}: use one of these."
        )
    if isinstance(connections, int) and not isinstance(connections, bool):
        if not 1 <= connections <= min(augmenting_layers, anchor_layers):
            raise ConfigError(
                f"The number of connections must lie between 1 and {min(augmenting_layers, anchor_layers)} (the layers "
                f"of the shallower model), but got {connections}: choose a number in that range."
            )
        return tuple(
            ((k + 1) * augmenting_layers // connections - 1, (k + 1) * anchor_layers // connections - 1)
            for k in range(connections)
        )
    return _explicit_pairs(connections, augmenting_layers, anchor_layers)


def _explicit_pairs(connections: Any, augmenting_layers: int, anchor_layers: int) -> Pairs:
    try:
        pairs = [tuple(pair) for pair in connections]
    except TypeError:
        pairs = [()]
    if not pairs:
        raise ConfigError("At least one connection is needed, but got none: give pairs, a number or 'every-4'.")
    for pair in pairs:
        if len(pair) != 2 or not all(isinstance(i, int) and not isinstance(i, bool) for i in pair):
            raise ConfigError(
                f"A connection must be a pair (augmenting_layer, anchor_layer) of whole numbers, but got "
                f"{pair or connections!r}: write for example [[3, 7], [7, 15]]."
            )
        ranges = (("augmenting model", augmenting_layers), ("anchor", anchor_layers))
        for index, (role, count) in zip(pair, ranges, strict=True):
            if not 0 <= index < count:
                raise ConfigError(
                    f"A connection's layer of the {role} must lie between 0 and {count - 1}, but got {index} in "
                    f"{pair}: layers are counted from 0."
                )
        if pairs.count(pair) > 1:
            raise ConfigError(f"Each connection may be given once, but {pair} is given twice: remove one of them.")
    return ordered((i, j) for i, j in pairs)


def ordered(pairs: Iterable[tuple[int, int]]) -> Pairs:
    """Pairs in the order of the anchor's layers."""
    return tuple(sorted(pairs, key=lambda pair: (pair[1], pair[0])))


def gguf_name(source: str, file: str | None) -> str:
    """The name of a model that lies in a GGUF file of an id or folder: the two, joined by a slash.

    Raises:
        ConfigError: for a name that no GGUF file has, or one beside a source that names a file itself.
    """
    if file is None:
        return source
    if not isinstance(file, str) or not file.lower().endswith(GGUF) or split_gguf(source)[1] is not None:
        raise ConfigError(
            f"gguf_file must be the name of a .gguf file at {source!r}, but got {file!r}: name a file there."
        )
    if os.path.isabs(file) or ".." in Path(file).parts:
        raise ConfigError(f"gguf_file must lie at {source!r}, but got {file!r}: give its name there.")
    return f"{source.rstrip('/')}/{file}"


def split_gguf(name: str) -> tuple[str, str | None]:
    """The id or folder of a model, and its GGUF file; None for a model that does not lie in such a file."""
    place, slash, file = name.replace(os.sep, "/").rpartition("/")
    if not name.lower().endswith(GGUF):
        return name, None
    if os.path.isabs(name) or os.path.isfile(name) or os.path.isdir(place):
        return (place if slash else "."), file
    parts = name.split("/")  # an id of the hub has two parts
    return ("/".join(parts[:2]), "/".join(parts[2:])) if len(parts) > 2 else (name, None)


def opening_of(entry: dict[str, Any]) -> list[int]:
    """The tokens that an augmenting model reads before a text, from its entry in a ``CalmConfig``."""
    return [*(entry.get("beginning") or ()), *(entry.get("prefix") or ())]


def check_names(names: Iterable[str]) -> None:
    """Raise unless the names can name modules.

    Raises:
        ConfigError: for no name, or one that is empty or holds a dot.
    """
    from torch import nn

    names, taken = list(names), dir(nn.ModuleDict())
    if not names:
        raise ConfigError("At least one augmenting model is needed, but got none: pass one, or several by name.")
    for name in names:
        if not isinstance(name, str) or not name.isidentifier():
            raise ConfigError(
                f"The name of an augmenting model must be letters, digits and underscores, but got {name!r}: rename it."
            )
        if name in taken:
            raise ConfigError(
                f"The name of an augmenting model must be none that a torch module uses, but got {name!r}: rename it."
            )


@dataclass(frozen=True)
class ConnectorConfig:
    """Options of one set of connectors; the formulas stand in ``calmlm.connectors.cross_attention``.

    ``CrossAttention`` with everything off is the paper's equation letter by letter.

    Args:
        num_heads: attention heads N_H; must divide the anchor's width.
        norm: RMS-normalise both inputs first.
        gate: scale the result by ``tanh(g)``, one learned scalar that starts at zero.
        rotary: rotate queries and keys by their positions, so that attention knows distances.
        query_key_bias: start of a learned bias on queries and keys; with ``rotary`` it favours nearby positions.
        null_key: one learned key with a zero value, so that a position may attend to nothing.
        rank: width of the middle of low-rank projections; None for full ones.
        projection: how states come to the anchor's width, ``"linear"`` or ``"residual"``; see
            ``calmlm.connectors.projections``.
        ingestor: what turns the distribution that ``"legonn"`` reads into vectors: a ``"learned"`` table, or the
            ``"anchor"``'s own input embeddings, see ``calmlm.connectors.ingestor``.
        top_k: how many of the likeliest tokens the ingestor ``"anchor"`` takes; None for 16.
        kind: ``"cross_attention"`` (CALM), ``"flamingo"``, ``"graft"`` or ``"legonn"``; see ``calmlm.connectors``.
        opened: of a graft, whether its gate is open at the start.
        train_map: of a graft, whether a correction of its map is trained as well.
    """

    num_heads: int
    norm: bool = True
    gate: bool = False
    rotary: bool = False
    query_key_bias: float | None = None
    null_key: bool = False
    rank: int | None = None
    projection: str = "linear"
    ingestor: str = "learned"
    top_k: int | None = None
    kind: str = "cross_attention"
    opened: bool = False
    train_map: bool = True

    @classmethod
    def build(cls, options: dict[str, Any], anchor_size: int, default_heads: int) -> ConnectorConfig:
        """Check ``options`` against the anchor's width and fill in the number of heads.

        Raises:
            ConfigError: for an unknown option or a number of heads that does not fit.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(options) - set(known))
        if unknown:
            raise ConfigError(
                f"Connector options must be among {', '.join(known)}, but got {', '.join(unknown)}: correct the name."
            )
        heads = options.get("num_heads")
        if heads is None:
            # The anchor's own number, as in the paper; the next smaller one that divides the width where it does not.
            heads = next(h for h in range(min(default_heads, anchor_size), 0, -1) if anchor_size % h == 0)
        if not isinstance(heads, int) or isinstance(heads, bool) or heads < 1 or anchor_size % heads:
            raise ConfigError(
                f"num_heads must be a whole number that divides the anchor's width {anchor_size}, but got {heads}: "
                f"leave it out to take the anchor's own."
            )
        for name, kinds in _OPTION_TYPES.items():
            value = options.get(name)
            fits = isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))
            if name in options and value is not None and not fits:
                wanted = {bool: "true or false", int: "a whole number", str: "a name"}.get(kinds[0], "a number")
                raise ConfigError(f"{name} must be {wanted}, but got {value!r}: correct it or leave it out.")
        config = cls(**{**options, "num_heads": heads})
        if config.kind not in KINDS:
            raise ConfigError(
                f"The connector must be one of {', '.join(KINDS)}, but got {config.kind!r}: use one of these."
            )
        default = cls(config.num_heads, kind=config.kind)
        others = [name for name in _OPTION_TYPES if (name in OF_GRAFTS) != (config.kind == "graft") and name != "kind"]
        strange = [name for name in others if getattr(config, name) != getattr(default, name)]
        if strange:
            raise ConfigError(
                f"Connector options must belong to the connector {config.kind!r}, but got {', '.join(strange)}: leave "
                f"them out, or choose another connector."
            )
        if config.rank is not None and not 1 <= config.rank <= anchor_size:
            raise ConfigError(
                f"rank must lie between 1 and the anchor's width {anchor_size}, but got {config.rank}: leave it out "
                f"for full projections."
            )
        if config.rotary and (anchor_size // heads) % 2:
            raise ConfigError(
                f"rotary needs an even width per head, but {anchor_size} / {heads} is odd: choose another num_heads."
            )
        if config.projection not in PROJECTIONS:
            raise ConfigError(
                f"projection must be one of {', '.join(PROJECTIONS)}, but got {config.projection!r}: use one of these."
            )
        return config._with_ingestor()

    def _with_ingestor(self) -> ConnectorConfig:
        """Check what belongs to the ingestor, and fill in how many tokens it takes."""
        if self.ingestor not in INGESTORS:
            raise ConfigError(
                f"ingestor must be one of {', '.join(INGESTORS)}, but got {self.ingestor!r}: use one of these."
            )
        if self.ingestor == "anchor" and self.kind != "legonn":
            raise ConfigError(
                f"ingestor='anchor' needs the connector 'legonn', which reads a distribution, but got {self.kind!r}: "
                f"use connector='legonn', or leave ingestor out."
            )
        if self.top_k is None:
            return dataclasses.replace(self, top_k=TOP_K) if self.ingestor == "anchor" else self
        if self.ingestor != "anchor" or self.top_k < 1:
            raise ConfigError(
                f"top_k needs ingestor='anchor' and must be at least 1, but got {self.top_k} with {self.ingestor!r}: "
                f"leave it out."
            )
        return self


_OPTION_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("norm", "gate", "rotary", "null_key", *OF_GRAFTS), (bool,)),
    "query_key_bias": (float, int),
    **dict.fromkeys(("rank", "top_k"), (int,)),
    **dict.fromkeys(("kind", "projection", "ingestor"), (str,)),
}


class CalmConfig(PreTrainedConfig):
    """Configuration of a composition; what ``config.json`` beside its weights holds.

    Args:
        text_config: the anchor's configuration (so named that ``get_text_config()`` finds it).
        anchor: where the anchor comes from: ``{"id", "revision", "fingerprint"}``.
        augmenting: one entry per augmenting model, by name: ``{"id", "revision", "fingerprint", "reads",
            "connections", "connector"}``; ``reads`` is one of ``READS``, ``connections`` are explicit 0-based pairs.
            ``"words"`` are the options of a ``WordMap`` or a ``Pointer`` and its ``"kind"``, where there is one; with
            ``"scale"``, by which a pointer multiplies what the augmenting model's head gives.
            ``"beginning"`` and ``"prefix"`` are ids of the augmenting model's tokens that it reads before each text.
        order: the names in the order in which they were joined, in a saved file.
    """

    model_type = "calm"
    sub_configs_defaults: ClassVar = {"text_config": SubConfigSpec(AutoConfig, model_type="llama")}
    auto_map: ClassVar[
        dict[str, str]
    ] = {}  # no code comes with a composition; TRL asks every class that it does not know

    text_config: Any = None
    anchor: dict[str, Any] = dataclasses.field(default_factory=dict)
    augmenting: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    order: list[str] = dataclasses.field(default_factory=list)

    def __post_init__(self, **kwargs: Any) -> None:
        self.anchor = dict(self.anchor)
        # JSON forgets the order of names, and connections into one layer build on each other.
        names = sorted(
            self.augmenting, key=lambda name: self.order.index(name) if name in self.order else len(self.order)
        )
        # Compositions saved before there was anything else to read have no "reads".
        self.augmenting = {name: {"reads": "tokens"} | self.augmenting[name] for name in names}
        anchor, experts = self.text_config, None
        if isinstance(anchor, dict) and anchor.get("model_type") not in CONFIG_MAPPING:
            # The anchor brings code of its own; its configuration takes this one's place once it is loaded.
            self.text_config = PreTrainedConfig(**{k: v for k, v in anchor.items() if k != "model_type"})
        if isinstance(anchor, PreTrainedConfig):
            # transformers hands these two down to sub-configurations: without them the anchor's own would be unset.
            kwargs.setdefault("attn_implementation", anchor._attn_implementation)
            experts = anchor._experts_implementation
        super().__post_init__(**kwargs)
        self.text_config._experts_implementation_internal = experts  # the composition itself has no experts

    def to_dict(self) -> dict[str, Any]:
        """As in transformers; the name of a composition that was not saved stays in this process."""
        found = super().to_dict()
        if type(found.get("_name_or_path")) is not str:  # calmlm.files.naming.InMemory
            found["_name_or_path"] = ""
        return found

    @property
    def vocab_size(self) -> int:
        return self.get_text_config(decoder=True).vocab_size

    @property
    def hidden_size(self) -> int:
        return self.get_text_config(decoder=True).hidden_size

    @property
    def num_hidden_layers(self) -> int:
        return self.get_text_config(decoder=True).num_hidden_layers

    @property
    def num_attention_heads(self) -> int:
        return self.get_text_config(decoder=True).num_attention_heads

    @property
    def use_cache(self) -> bool:
        return getattr(self.get_text_config(decoder=True), "use_cache", True)

    @use_cache.setter
    def use_cache(self, value: bool) -> None:
        # Trainers switch it off; it is the anchor's setting.
        self.get_text_config(decoder=True).use_cache = value
