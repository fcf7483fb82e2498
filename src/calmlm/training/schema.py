"""What `calmlm train` reads: a YAML file, checked as a whole before anything is loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from calmlm.bases.forms import Form
from calmlm.config import gguf_name
from calmlm.data.labels import LossOn
from calmlm.data.sources import HubDataset
from calmlm.errors import ConfigError
from calmlm.files.paths import Place, expanded
from calmlm.training.arguments import OWNED, read_arguments
from calmlm.training.cache_settings import CacheConfig
from calmlm.training.fields import read_fields, read_what_fits, show, unknown_key
from calmlm.training.hub_token import KEY
from calmlm.training.yaml import parse_yaml

__all__ = [
    "OWNED",
    "AlignConfig",
    "DataConfig",
    "ModelConfig",
    "TrainingConfig",
    "connector_options",
    "load_config",
    "parse_config",
]


@dataclass(frozen=True)
class BaseConfig:
    """One base model with settings of its own.

    Args:
        id: its id or folder.
        revision: commit, branch or tag.
        gguf_file: a GGUF file there.
        dtype, device_map: as `from_pretrained` takes them.
        quantization_config: a quantisation of transformers, as a model's config.json describes it.
    """

    id: Place
    revision: str | None = None
    gguf_file: str | None = None
    dtype: str | None = None
    device_map: str | dict[str, Any] | None = None
    quantization_config: dict[str, Any] | None = None

    @property
    def name(self) -> str:
        """Its id or folder, with its file.

        Raises:
            ConfigError: for a file's name that cannot be one.
        """
        return gguf_name(self.id, self.gguf_file)

    @property
    def form(self) -> Form:
        """In which form it is loaded."""
        return Form(self.revision, None, self.dtype, self.device_map, self.quantization_config)


@dataclass(frozen=True)
class ModelConfig:
    """What to compose: `anchor` and `augmenting`, or `composition` to go on with a saved one.

    Args:
        anchor: id, folder or GGUF file of the anchor; or {id, revision, gguf_file, dtype, device_map,
            quantization_config}, which win over what stands here for all models.
        augmenting: the same for the augmenting model; or several, {name: ...}.
        composition: folder of a saved composition, instead of the two.
        revision: commit, branch or tag of the anchor.
        augmenting_revision: the same for the augmenting model.
        connections: "every-4" (the paper, the default), "top", "aligned-1", a number, or pairs [augmenting_layer,
            anchor_layer] counted from 0; several augmenting models may have their own, {name: ...}.
        num_heads: heads of each cross-attention; the anchor's own number when left out.
        connector: its kind ("cross_attention", "flamingo", "graft", "legonn") and the options of `calmlm.compose`.
        words: "map", to let augmenting models speak in the anchor's last state as well, or "pointer", to let them
            speak in its probabilities; or {name: ...}. With `connections: none` there alone.
        adapters: the rank of low-rank adapters on the anchor, or settings of `peft.LoraConfig`.
        init: "aligned", to let connections start from maps that `plain_text` teaches.
        plain_text: a file of plain text, a paragraph a line, from which maps are made. If nothing else says how the
            models are joined, it stands for all of `calmlm.compose`'s recipe: graft, map of words and adapters.
        development: a file of examples as in `data`, by which `connections: aligned-2` chooses.
        train_map: whether maps are trained as well; by default those of grafts are, and those of words not.
        refresh: whether augmenting models read generated tokens too.
        alignment: "own", "transcode" or "retokenize", for models with other tokenizers; or {name: ...}.
        augmenting_view: "bare" or "template", what augmenting models read of a conversation; or {name: ...}.
        augmenting_prefix: what augmenting models alone read before each text: a text, or messages; or {name: ...}.
        dtype: "bfloat16", "float16", "float32" or "auto" for the frozen models.
        device_map: as `from_pretrained` takes it.
        quantization_config: a quantisation of transformers, as a model's config.json describes it.
        attn_implementation: "sdpa", "eager", "flash_attention_2" and so on.
        trust_remote_code: whether code that comes with a model may run.
    """

    anchor: Place | BaseConfig | None = None
    augmenting: Place | BaseConfig | dict[str, Place | BaseConfig] | None = None
    composition: Place | None = None
    revision: str | None = None
    augmenting_revision: str | None = None
    connections: str | int | list[list[int]] | dict[str, Any] | None = None
    num_heads: int | None = None
    connector: dict[str, Any] = field(default_factory=dict)
    words: str | dict[str, str] | None = None
    adapters: int | dict[str, Any] | None = None
    init: str | None = None
    plain_text: Place | None = None
    development: Place | None = None
    train_map: bool | None = None
    refresh: bool = True
    alignment: str | dict[str, str] = "own"
    augmenting_view: str | dict[str, str] | None = None
    augmenting_prefix: str | list[dict[str, Any]] | dict[str, Any] | None = None
    dtype: str | None = None
    device_map: str | dict[str, Any] | None = None
    quantization_config: dict[str, Any] | None = None
    attn_implementation: str | None = None
    trust_remote_code: bool = False

    def faults(self) -> list[str]:
        if self.composition is not None:
            of_models = ("anchor", "augmenting", "revision", "augmenting_revision")
            of_reading = ("num_heads", "augmenting_view", "augmenting_prefix", "words")
            of_starts = ("adapters", "init", "plain_text", "development", "train_map")
            extra = [name for name in (*of_models, *of_reading, *of_starts) if getattr(self, name) is not None]
            extra += ["connector"] if self.connector else []
            extra += ["connections"] if self.connections is not None else []
            extra += ["refresh"] if not self.refresh else []
            extra += ["alignment"] if self.alignment != "own" else []
            return [
                f"model.{name}: expected nothing beside model.composition, which settles it, but got "
                f"{show(getattr(self, name))}."
                for name in extra
            ]
        if isinstance(self.augmenting, dict) and "id" in self.augmenting:
            keys = [field.name for field in dataclasses.fields(BaseConfig)]
            return [unknown_key(key, keys, "model.augmenting") for key in self.augmenting if key not in keys]
        known = connector_options()
        found = [unknown_key(key, known, "model.connector") for key in self.connector if key not in known]
        return found + [
            f"model.{name}: expected the id or folder of the {name} model, but it is missing."
            for name in ("anchor", "augmenting")
            if not getattr(self, name)
        ]

    @property
    def anchor_base(self) -> BaseConfig:
        """The anchor, with the settings for all models."""
        assert self.anchor is not None
        return self._base(self.anchor, self.revision)

    @property
    def augmenting_bases(self) -> BaseConfig | dict[str, BaseConfig]:
        """The augmenting model or models by name, with the settings for all models."""
        assert self.augmenting is not None
        if not isinstance(self.augmenting, dict):
            return self._base(self.augmenting, self.augmenting_revision)
        return {name: self._base(base, self.augmenting_revision) for name, base in self.augmenting.items()}

    def _base(self, given: str | BaseConfig, revision: str | None) -> BaseConfig:
        base = BaseConfig(given) if isinstance(given, str) else given
        return dataclasses.replace(
            base,
            revision=base.revision or revision,
            dtype=base.dtype or self.dtype,
            device_map=base.device_map if base.device_map is not None else self.device_map,
            quantization_config=base.quantization_config
            if base.quantization_config is not None
            else self.quantization_config,
        )


@dataclass(frozen=True)
class DataConfig:
    """What to learn from.

    Args:
        train: JSONL files, data sets ({dataset, split, name, revision}), or a list of these.
        eval: the same for evaluation; none when left out.
        max_length: tokens of an example at most; the shorter context of the two models when left out.
        loss_on: "completion" counts completions (or assistant messages) only, "all" every token.
    """

    train: Place | HubDataset | list[Place | HubDataset]
    eval: Place | HubDataset | list[Place | HubDataset] | None = None
    max_length: int | None = None
    loss_on: LossOn = "completion"

    def faults(self) -> list[str]:
        found = [
            f"data.{name}: expected at least one file or data set, but got an empty list."
            for name in ("train", "eval")
            if getattr(self, name) == []
        ]
        if self.max_length is not None and self.max_length < 2:
            found.append(f"data.max_length: expected 2 or more, but got {self.max_length}.")
        return found


OF_STAGES = (
    "gradient_accumulation_steps", "learning_rate", "logging_steps", "lr_scheduler_kwargs", "lr_scheduler_type",
    "max_grad_norm", "max_steps", "num_train_epochs", "per_device_train_batch_size", "save_steps", "save_strategy",
    "save_total_limit", "seed", "data_seed", "warmup_steps", "weight_decay",
)  # fmt: skip
"""What a stage may set for itself; everything else holds for the whole run."""


@dataclass(frozen=True)
class AlignConfig:
    """A stage before the data: plain text, all of whose tokens count. It needs no labels, and no text of the task.

    Args:
        text: a file of plain text, a paragraph a line; by default `model.plain_text`.
        trainer: how long and how fast it trains, over the run's own arguments: max_steps, learning_rate and so on.
    """

    text: Place | None = None
    trainer: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RetainConfig:
    """General text on which the composition is held to what the anchor alone predicts.

    Args:
        text: a file of plain text, a paragraph a line.
        weight: of the mean KL(anchor || composition), in nats, beside the loss of the data.
        lines: how many are read with each batch that is in memory: of each process, and each part that accumulates.
        positions: how many positions of a line are compared, others each time.
    """

    text: Place
    weight: float = 0.1
    lines: int = 2
    positions: int = 64

    def faults(self) -> list[str]:
        return [
            f"retain.{name}: expected more than 0, but got {getattr(self, name)}."
            for name in ("weight", "lines", "positions")
            if getattr(self, name) <= 0
        ]


@dataclass(frozen=True)
class TrainingConfig:
    """One training run.

    Args:
        output: the folder of the run: `config.yaml`, `checkpoints/`, `logs/` and, at the end, `composition/`.
        model: what to compose.
        data: what to learn from.
        tokenizer: id or folder of the tokenizer; the anchor's when left out.
        backend: "sft" for TRL's SFTTrainer, "trainer" for transformers' Trainer.
        trainer: arguments of SFTConfig or TrainingArguments.
        align: a stage on plain text before the data; none when left out.
        retain: general text on which the anchor's own predictions are kept; none when left out.
        activation_cache: whether what frozen augmenting models make of the data is kept for later epochs: "off",
            "memory" or "disk", or a mapping with more.
    """

    output: Place
    model: ModelConfig
    data: DataConfig
    tokenizer: Place | None = None
    backend: Literal["sft", "trainer"] = "sft"
    trainer: dict[str, Any] = field(default_factory=dict)
    align: AlignConfig | None = None
    retain: RetainConfig | None = None
    activation_cache: Literal["off", "memory", "disk"] | CacheConfig = "off"

    @property
    def cache(self) -> CacheConfig:
        """The activation cache's settings."""
        found = self.activation_cache
        return found if isinstance(found, CacheConfig) else CacheConfig(found)

    def to_dict(self) -> dict[str, Any]:
        """The file's values, without a token: a run writes them down, and its folder is given away."""
        values = dataclasses.asdict(self)
        values["trainer"].pop(KEY, None)
        return values


def connector_options() -> list[str]:
    """The options of a connector that stand under `model.connector`."""
    from calmlm.config import ConnectorConfig

    beside = ("num_heads", "train_map")
    return [option.name for option in dataclasses.fields(ConnectorConfig) if option.name not in beside]


def load_config(path: str | Path, overrides: Sequence[str] = (), output: str | None = None) -> TrainingConfig:
    """Read and check a configuration file.

    Args:
        path: a YAML file; paths within it are relative to the working directory, and ``~`` is the home folder.
        overrides: "key.subkey=value", the value in YAML; applied before the check.
        output: wins over the file's own.

    Raises:
        ConfigError: the file cannot be read, or has faults; all of them are named.
    """
    path = expanded(Path(path))
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except FileNotFoundError:
        raise ConfigError(f"Expected a configuration file at {path}, but there is none; check the path.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"Expected a readable text file at {path}, but it cannot be read ({error}); check the path."
        ) from None
    if not isinstance(values, dict):
        raise ConfigError(
            f"Expected a mapping in {path}, but got {show(values)}; start with 'output:', 'model:', 'data:'."
        )
    for override in overrides:
        _apply(override, values)
    if output is not None:
        values["output"] = output
    return parse_config(values, source=str(path))


def parse_config(values: Mapping[str, Any], source: str = "The configuration") -> TrainingConfig:
    """Check a configuration that is already a mapping.

    Raises:
        ConfigError: naming every fault.
    """
    faults: list[str] = []
    values = _with_off(values)
    config = read_fields(TrainingConfig, values, faults)
    # A key of the wrong type must not hide the faults of the others.
    model = read_what_fits(ModelConfig, values.get("model"))
    data, retain = read_what_fits(DataConfig, values.get("data")), read_what_fits(RetainConfig, values.get("retain"))
    cache = values.get("activation_cache")
    cache = read_what_fits(CacheConfig, {"mode": cache} if isinstance(cache, str) else cache)
    named = {fault.partition(":")[0] for fault in faults}
    for part in (model, data, retain, cache):
        found = part.faults() if part is not None else []
        faults += [fault for fault in found if fault.partition(":")[0] not in named]
    backend = values.get("backend", "sft")
    arguments = values.get("trainer", {})
    if backend in ("sft", "trainer") and isinstance(arguments, Mapping):
        arguments = read_arguments(backend, arguments, faults)
    align = values.get("align")
    if isinstance(align, Mapping):
        if not align.get("text") and (align.get("text") == "" or model is None or not model.plain_text):
            faults.append("align.text: expected a file of plain text, but neither this nor model.plain_text names one.")
        own = align.get("trainer", {})
        if backend in ("sft", "trainer") and isinstance(own, Mapping):
            checked = read_arguments(backend, own, faults, "align.trainer")
            faults += [
                f"align.trainer.{key}: expected an argument of a stage ({', '.join(OF_STAGES)}), but this one holds "
                f"for the whole run; set it under 'trainer'."
                for key in checked
                if key not in OF_STAGES
            ]
            if config is not None and config.align is not None:
                config = dataclasses.replace(config, align=dataclasses.replace(config.align, trainer=checked))
    if values.get("output") == "":
        faults.append("output: expected a folder, but it is empty; name one.")
    if faults or config is None:
        count = "one fault" if len(faults) == 1 else f"{len(faults)} faults"
        raise ConfigError(f"{source} has {count}: " + " ".join(faults))
    return dataclasses.replace(config, trainer=arguments)


def _with_off(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """The values with "off" where YAML reads it as false."""
    cache = values.get("activation_cache") if isinstance(values, Mapping) else None
    if cache is False:
        return {**values, "activation_cache": "off"}
    if isinstance(cache, Mapping) and cache.get("mode") is False:
        return {**values, "activation_cache": {**cache, "mode": "off"}}
    return values


def _apply(override: str, values: dict[str, Any]) -> None:
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError(
            f"Expected an override as key=value, but got '{override}'; write for example data.max_length=64."
        )
    value = parse_yaml(text, override)
    *parents, last = key.split(".")
    for parent in parents:
        child = values.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ConfigError(f"Expected a mapping at '{parent}' to set '{key}' in, but got {show(child)}; drop it.")
        values = child
    values[last] = value
