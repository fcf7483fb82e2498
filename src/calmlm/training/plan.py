"""What a training will take, from configurations alone: parameters, operations, memory, cache and time.

Weights are never loaded: the models are laid out without memory. Operations are those of matrix products and attention;
a multiplication and an addition are two. Memory and time are estimates, and say so.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from calmlm.bases.families import Backbone, text_config
from calmlm.bases.opening import holds_decoder, saved_config
from calmlm.bases.origins import check_config, check_folder
from calmlm.composing.aligning import aligned_count, check_alignable, middle
from calmlm.composing.low_rank import planned_adapters
from calmlm.composing.manner import RECIPE, is_recipe
from calmlm.config import ALIGNED, ConnectorConfig, Pairs, resolve_connections
from calmlm.connectors import CONNECTORS, build_connector
from calmlm.errors import ConfigError, ModelError, first_line
from calmlm.tokens.gguf_files import reading_once
from calmlm.training.cache_settings import CacheConfig, bytes_of, number_bytes
from calmlm.training.run_checks import reads_no_text
from calmlm.training.schema import BaseConfig, TrainingConfig

__all__ = ["GPUS", "Base", "Part", "Plan", "Texts", "make_plan"]

GPUS = {
    "h100": (989e12, 80e9),
    "h200": (989e12, 141e9),
    "a100": (312e12, 80e9),
    "l40s": (362e12, 48e9),
    "4090": (165e12, 24e9),
}
"""Dense operations a second in bfloat16 and bytes of memory, as their makers state them."""
USED = 0.4
"""Share of a GPU's operations that a training reaches, as a rule."""
ADAM = 16
"""Bytes for each trained number: itself, its gradient and Adam's two means, in float32."""


@dataclass(frozen=True)
class Texts:
    """The examples that are planned for.

    Attributes:
        length: tokens of the anchor's in an example.
        labelled: how many of these are learned.
        rows: examples of a step, on one device.
        ratio: tokens of an augmenting model for one of the anchor's.
    """

    length: int = 512
    labelled: int = 128
    rows: int = 8
    ratio: float = 1.0


@dataclass(frozen=True)
class Base:
    """A base model as far as a plan needs it.

    Attributes:
        name: id or folder.
        parameters: all of them.
        linear: numbers that one token is multiplied with in each layer (of experts, those that are active).
        attended: width of the heads of all queries in each layer, which attention multiplies twice.
        saved: numbers that backward needs of a token in each layer, where its weights are frozen.
        inputs: more of these, where adapters stand beside its maps.
        vocabulary, size: of the head and of the states.
        adapted: numbers of the adapters that one augmenting model has beside its maps.
        adapted_from: the lowest of its layers that has some; None without.
        bytes: of one number.
        weight: of one weight, where these are quantised.
    """

    name: str
    parameters: int
    linear: tuple[int, ...]
    attended: int
    saved: int
    inputs: int
    vocabulary: int
    size: int
    heads: int
    adapted: int
    adapted_from: int | None
    bytes: int
    weight: float

    def forward(self, length: int, first: int = 0) -> float:
        """Operations for one text from the layer ``first`` on, without the head."""
        return sum(2.0 * each * length + 4.0 * length**2 * self.attended for each in self.linear[first:])

    def backward(self, length: int, first: int = 0, *, trained: bool = False) -> float:
        """Operations back to the layer ``first``: through what is frozen, or with gradients of all weights."""
        times = 2 if trained else 1
        return sum(2.0 * times * each * length + 8.0 * length**2 * self.attended for each in self.linear[first:])

    def head(self, labelled: int) -> float:
        """Operations of the head at some positions, forward."""
        return 2.0 * self.vocabulary * self.size * labelled


@dataclass(frozen=True)
class Part:
    """What joins one augmenting model.

    Attributes:
        pairs: its connections.
        trained: numbers that train.
        multiplied: numbers that a token of the anchor's is multiplied with.
        crossing: width of all cross-attentions.
        kept: numbers of a token of the model's in an activation cache.
        points: whether it speaks in probabilities, so that its head runs at labels.
        distributed: whether its connections read its distribution, so that its head runs everywhere.
        before_layer: whether its connections change what goes into their layers.
    """

    pairs: Pairs
    trained: int
    multiplied: int
    crossing: int
    kept: int
    points: bool
    distributed: bool
    before_layer: bool


@dataclass(frozen=True)
class Plan:
    """All figures.

    Attributes:
        anchor, augmenting, parts: what is joined.
        adapters: numbers of the adapters of all augmenting models.
        untouched: how many of the anchor's layers, from below, nothing trained changes.
        texts: planned for.
        devices: over how many processes the models are spread (FSDP); 1 for none.
        settings: of the activation cache.
    """

    anchor: Base
    augmenting: dict[str, Base]
    parts: dict[str, Part]
    adapters: int
    untouched: int
    texts: Texts
    devices: int = 1
    settings: CacheConfig = field(default_factory=CacheConfig)

    @property
    def keeps_anchor(self) -> bool:
        """Whether an activation cache holds the anchor's stream below the lowest connection."""
        return self.settings.keeps_anchor(self.untouched, len(self.anchor.linear))

    @property
    def trained(self) -> int:
        """Numbers that train."""
        return self.adapters + sum(part.trained for part in self.parts.values())

    def step(self, *, cached: bool = False) -> float:
        """Operations of a step on one device; ``cached``: with a warm activation cache."""
        texts, anchor = self.texts, self.anchor
        length = texts.length
        known = self.untouched if cached and self.keeps_anchor else 0
        total = anchor.forward(length, known) + anchor.backward(length, self.untouched)
        total += 2 * anchor.head(texts.labelled)
        total += 6.0 * self.adapters * length
        for name, base in self.augmenting.items():
            part = self.parts[name]
            theirs = round(length * texts.ratio)
            total += 0 if cached else base.forward(theirs)
            total += 6.0 * part.multiplied * length + 12.0 * part.crossing * length * theirs
            total += base.head(texts.labelled) if part.points else 0
            total += 0 if cached or not part.distributed else base.head(theirs)
        return total * texts.rows

    @property
    def full_fine_tuning(self) -> float:
        """Operations of a step that trains all of the anchor instead."""
        length, anchor = self.texts.length, self.anchor
        whole = anchor.forward(length) + anchor.backward(length, trained=True) + 3 * anchor.head(self.texts.labelled)
        return whole * self.texts.rows

    @property
    def memory(self) -> dict[str, int]:
        """Bytes on each device, by what for."""
        bases = [self.anchor, *self.augmenting.values()]
        tokens = self.texts.rows * self.texts.length
        layers = len(self.anchor.linear) - self.untouched
        each = self.anchor.saved + (self.anchor.inputs if self.adapters else 0)
        heads = [self.anchor.vocabulary, *(b.vocabulary for n, b in self.augmenting.items() if self.parts[n].points)]
        return {
            "frozen weights": int(sum(base.parameters * base.weight for base in bases)) // self.devices,
            "trained, with gradients and Adam": self.trained * ADAM // self.devices,
            "activations": tokens * layers * each * self.anchor.bytes,
            "logits": 3 * 4 * sum(heads) * self.texts.rows * self.texts.labelled,
        }

    def cache(self, examples: int) -> int:
        """Bytes of an activation cache over so many examples."""
        length = self.texts.length
        dtype = self.settings.dtype
        own = self.anchor.size * number_bytes(dtype, self.anchor.bytes) * length if self.keeps_anchor else 0
        theirs = sum(
            part.kept * number_bytes(dtype, self.augmenting[name].bytes) * round(length * self.texts.ratio)
            for name, part in self.parts.items()
        )
        most = None if self.settings.budget is None else bytes_of(self.settings.budget)
        return examples * (own + theirs) if most is None else min(most, examples * (own + theirs))

    def seconds(self, examples: int, speed: float, *, cached: bool = False) -> float:
        """How long one pass over so many examples takes at so many operations a second, on one device."""
        return self.step(cached=cached) / self.texts.rows * examples / (speed * USED)


@reading_once()
def make_plan(config: TrainingConfig, texts: Texts, devices: int = 1) -> Plan:
    """The plan of a training.

    Args:
        config: of which `model` counts.
        texts: planned for.
        devices: over how many the models are spread.

    Raises:
        ConfigError, ModelError: for models or connections that cannot be.
    """
    model = config.model
    if model.composition is not None:
        raise ConfigError("A plan needs model.anchor and model.augmenting, but got model.composition: name the two.")
    wanted = model.augmenting_bases
    given = wanted if isinstance(wanted, dict) else {"augmenting": wanted}
    common = model.dtype, model.quantization_config, model.trust_remote_code
    said = {name: getattr(model, name) for name in ("connections", "num_heads", "words", "init", "adapters", "refresh")}
    connector = {"connector" if key == "kind" else key: value for key, value in model.connector.items()}
    connector.pop("opened", None)
    recipe = is_recipe(model.plain_text, connector | said)
    wanted_adapters = RECIPE["adapters"] if recipe else model.adapters
    for name, base in given.items():
        if not holds_decoder(base.name, revision=base.revision, trust_remote_code=model.trust_remote_code):
            raise reads_no_text(name)
    anchor = _base(model.anchor_base, *common, "anchor", wanted_adapters)
    augmenting = {name: _base(base, *common, f"augmenting model {name!r}") for name, base in given.items()}
    parts = {name: _part(name, base, anchor, config, recipe) for name, base in augmenting.items()}
    adapters = anchor.adapted * len(augmenting)
    # A connection changes what comes out of its layer, or goes into it; words alone change the last state only.
    found = [(j, part.before_layer) for part in parts.values() for _, j in part.pairs]
    found += [] if anchor.adapted_from is None else [(anchor.adapted_from, True)]
    lowest = min((j for j, _ in found), default=len(anchor.linear) - 1)
    inside = bool(adapters) or any(inside for j, inside in found if j == lowest)
    untouched = lowest + (not inside)
    return Plan(anchor, augmenting, parts, adapters, untouched, texts, devices, config.cache)


def _part(name: str, base: Base, anchor: Base, config: TrainingConfig, recipe: bool) -> Part:
    model = config.model
    chosen = model.connections
    connections: Any = chosen.get(name, "every-4") if isinstance(chosen, dict) else chosen
    connections = connections or (RECIPE["connections"] if recipe else "every-4")
    sizes = len(base.linear), len(anchor.linear)
    searched = isinstance(connections, str) and connections.startswith(ALIGNED)
    if searched:
        pairs = middle(*sizes, aligned_count(connections))
    else:
        pairs = resolve_connections(connections, *sizes)
    options: dict[str, Any] = {"num_heads": model.num_heads}
    options["kind"] = RECIPE["connector"] if recipe else "cross_attention"
    options |= {key: value for key, value in model.connector.items() if not recipe or key != "kind"}
    if options["kind"] == "graft":
        options["train_map"] = model.train_map is not False
    if recipe or model.init is not None or searched:
        options = check_alignable(options["kind"], options)
    built = vars(ConnectorConfig.build(options, anchor.size, anchor.heads)).copy()
    kind = built.pop("kind")
    distribution = CONNECTORS[kind].reads_distribution
    width = base.size
    if distribution:
        width = anchor.size if built["ingestor"] == "anchor" else base.vocabulary
    trained = multiplied = 0
    for _ in pairs:
        with torch.device("meta"):
            connector = build_connector(kind, width, anchor.size, built)
        numbers = [p.numel() for p in connector.parameters() if p.requires_grad]
        trained += sum(numbers)
        multiplied += sum(p.numel() for p in connector.parameters() if p.ndim == 2)
    words = model.words.get(name) if isinstance(model.words, dict) else model.words
    words = words or (RECIPE["words"] if recipe else None)
    if words:
        trained += base.size + anchor.size + (4 if words == "map" else 2)
        trained += (base.size + 1) * anchor.size if words == "map" and model.train_map else 0
        # Forward alone, where neither side is trained.
        multiplied += base.size * anchor.size * (2 if model.train_map else 1) // 3 if words == "map" else 0
    layers = 1 if distribution else len({i for i, _ in pairs})
    kept = layers * width * (4 // base.bytes if distribution and built["ingestor"] != "anchor" else 1)
    kept += base.size if words else 0
    crossing = 0 if kind == "graft" else len(pairs) * anchor.size
    return Part(
        pairs, trained, multiplied, crossing, kept, words == "pointer", distribution, CONNECTORS[kind].before_layer
    )


def _base(given: BaseConfig, dtype: str | None, quantised: Any, trusted: bool, role: str, adapters: Any = None) -> Base:
    name, options = given.name, {"trust_remote_code": trusted}
    check_folder(name, role)
    try:
        config = saved_config(name, **({} if given.revision is None else {"revision": given.revision}), **options)
        check_config(config, name, role)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, **options)
    except ModelError:
        raise
    except Exception as error:  # transformers raises different errors, depending on what is missing
        raise ModelError(
            f"The {role} must be a causal language model whose configuration can be read, but {name!r} is not "
            f"({first_line(error)}): check its id or folder."
        ) from error
    backbone = Backbone.of(model, role, None)
    text: PreTrainedConfig = text_config(model)
    experts = getattr(text, "num_experts", None) or getattr(text, "num_local_experts", None)
    active = getattr(text, "num_experts_per_tok", None)
    share = active / experts if experts and active else 1.0
    heads = backbone.num_heads
    width = getattr(text, "head_dim", None) or backbone.size // heads
    kv = getattr(text, "num_key_value_heads", None) or heads
    inner = getattr(text, "intermediate_size", None) or 4 * backbone.size
    rank, adapted = (0, []) if adapters is None else planned_adapters(model, backbone.decoder, adapters)
    maps = [backbone.decoder.get_submodule(target) for target in adapted]
    inside = {module: place for place, layer in enumerate(backbone.layers) for module in layer.modules()}
    number = {"float32": 4, "float16": 2, "bfloat16": 2}.get(given.dtype or dtype or "", 0) or _stated(config)
    return Base(
        name,
        model.num_parameters(),
        tuple(int(_multiplied(layer, share)) for layer in backbone.layers),
        heads * width,
        # Inputs of both norms; queries, keys, values and what attention gives; gate, other half and product.
        2 * backbone.size + (2 * heads + 2 * kv) * width + 3 * inner,
        2 * backbone.size + heads * width + inner,
        backbone.vocab_size,
        backbone.size,
        heads,
        sum(rank * sum(_shape(module)) for module in maps),
        min((inside.get(module, 0) for module in maps), default=None),
        number,
        _weight(given.quantization_config or quantised, number),
    )


def _weight(quantised: Any, number: int) -> float:
    """Bytes of a weight in a quantisation of four or eight bits; in another, or none, those of a number."""
    text = str(quantised or "").lower()
    return 0.5 if "4bit" in text or "int4" in text else 1.0 if "8bit" in text or "int8" in text else float(number)


def _stated(config: PreTrainedConfig) -> int:
    """Bytes of a number in the form that a configuration states, or float32."""
    dtype = getattr(config, "dtype", None)
    return dtype.itemsize if isinstance(dtype, torch.dtype) else 4


def _shape(module: nn.Module) -> tuple[int, int]:
    """Inputs and outputs of a linear map."""
    rows, columns = module.weight.shape  # type: ignore[misc]
    return (int(rows), int(columns)) if isinstance(module, Conv1D) else (int(columns), int(rows))


def _multiplied(layer: nn.Module, share: float) -> float:
    """Numbers that a token is multiplied with in a layer; experts stand in stacked weights of three dimensions."""
    matrices = sum(p.numel() for p in layer.parameters() if p.ndim == 2)
    return matrices + share * sum(p.numel() for p in layer.parameters() if p.ndim == 3)
