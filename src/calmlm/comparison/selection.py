"""What a comparison runs: read from YAML, checked before anything is trained."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from calmlm.comparison.cells import Cell
from calmlm.comparison.domains import DOMAINS, kind_of
from calmlm.comparison.methods import ABLATIONS, METHODS
from calmlm.comparison.own_checks import checked, reasons
from calmlm.comparison.own_settings import Own
from calmlm.errors import ConfigError
from calmlm.experiments.fitting import check_seeds
from calmlm.files.paths import Place, expanded
from calmlm.training.fields import read_fields
from calmlm.training.yaml import parse_yaml

__all__ = ["CompareConfig", "Part", "load_config"]


@dataclass(frozen=True)
class Part:
    """One experiment of the comparison.

    Attributes:
        seeds: one run for each.
        methods: which systems; all of them if None.
        ablations: which changes of the composition are tried on the first seed.
        own: for an experiment of the user's: their models and data.
    """

    seeds: list[int]
    methods: list[str] | None = None
    ablations: list[str] = field(default_factory=list)
    own: Own | None = None


@dataclass(frozen=True)
class CompareConfig:
    """A comparison.

    Attributes:
        domains: the experiments, by name; a name of one's own is an experiment with models of one's own.
        preset: their sizes: ``tiny`` or ``small``; the report is called after it.
        output: folder of the report.
        cache: folder of finished cells.
        bases: folder of base models, which all methods and `calmlm repro` share.
        workers: processes, one thread each; every one takes an experiment with a seed. "ray": the cores of a Ray
            cluster, where a lost worker's cells are made again.
        ray_address: of that cluster; one on this machine by default.
    """

    domains: dict[str, Any]
    preset: str = "small"
    output: Place = "experiments/compare/results"
    cache: Place = "runs/compare"
    bases: Place = "runs"
    workers: int | Literal["ray"] = 2
    ray_address: str | None = None
    parts: dict[str, Part] = field(default_factory=dict, metadata={"made": True})

    def cells(self) -> list[Cell]:
        """All cells, in order."""
        found = []
        for name, part in self.parts.items():
            preset = self.preset_of(name)
            methods = part.methods or kind_of(name).methods_of(preset) or METHODS
            for seed in part.seeds:
                found += [Cell(name, method, preset, seed) for method in methods]
            found += [Cell(name, ablation, preset, part.seeds[0]) for ablation in part.ablations]
        return found

    def preset_of(self, name: str) -> Any:
        """The settings of an experiment."""
        return self.parts[name].own or DOMAINS[name][1][self.preset]


def load_config(path: Path, preset: str | None = None) -> CompareConfig:
    """Read a comparison.

    Args:
        path: a YAML file.
        preset: instead of the file's.

    Raises:
        ConfigError: for a file that cannot be read, and for each fault in it, all in one message.
    """
    path = expanded(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise ConfigError(f"{path}: expected a YAML file, but it cannot be read ({reason}); check the path.") from None
    values = parse_yaml(text, str(path))
    faults: list[str] = []
    config = read_fields(CompareConfig, values, faults)
    parts: dict[str, Part] = {}
    if config is not None:
        config = config if preset is None else replace(config, preset=preset)
        for name, value in config.domains.items():
            if name not in DOMAINS and not (isinstance(value, dict) and "own" in value):
                faults.append(
                    f"domains: expected experiments among {', '.join(DOMAINS)}, or one with 'own' models, but got "
                    f"{name!r}."
                )
            elif not isinstance(name, str) or not name.replace("_", "").isalnum():
                faults.append(f"domains: expected names of letters, digits and underscores, but got {name!r}.")
            elif (part := read_fields(Part, value, faults, f"domains.{name}")) is not None:
                if part.own is not None:
                    own = checked(part.own, faults, f"domains.{name}.own")
                    if own is None:
                        continue
                    part = replace(part, own=own)
                faults += _faults_of(name, part, config.preset)
                parts[name] = part
        if not config.domains:
            faults.append("domains: expected at least one experiment, but there is none.")
        for key in ("output", "cache", "bases"):
            if not getattr(config, key).strip():
                faults.append(f"{key}: expected a folder, but got an empty name.")
        if not config.preset.replace("_", "").replace("-", "").isalnum():
            faults.append(f"preset: expected a name of letters, digits, '_' and '-', but got {config.preset!r}.")
        if config.workers != "ray" and config.workers < 1:
            faults.append(f"workers: expected at least 1, but got {config.workers}.")
    if faults or config is None:
        raise ConfigError(f"{path}: " + " ".join(faults))
    return replace(config, parts=parts)


def _faults_of(name: str, part: Part, preset: str) -> list[str]:
    faults = []
    if name in DOMAINS and part.own is not None:
        faults.append(f"domains.{name}.own: {name} is an experiment of calmlm's; give yours another name.")
    if name in DOMAINS and preset not in DOMAINS[name][1]:
        faults.append(f"preset: expected one of {', '.join(DOMAINS[name][1])} for {name}, but got {preset!r}.")
    try:
        check_seeds(part.seeds)
    except ConfigError as error:
        faults.append(f"domains.{name}.seeds: {error}")
    if part.methods == []:
        faults.append(f"domains.{name}.methods: expected at least one, but there is none; leave the key out for all.")
    possible = kind_of(name).methods or tuple(METHODS)
    why = reasons(part.own) if part.own is not None else {}
    faults += [
        f"domains.{name}.methods: {method} cannot be run here, since {reason}; leave it out."
        for method in part.methods or []
        if (reason := why.get(method)) is not None
    ]
    for key, known in (("methods", possible), ("ablations", tuple(ABLATIONS))):
        given = getattr(part, key) or []
        unknown, twice = sorted(set(given) - set(known)), sorted({each for each in given if given.count(each) > 1})
        if unknown:
            faults.append(
                f"domains.{name}.{key}: expected names among {', '.join(known)}, but got {', '.join(unknown)}."
            )
        if twice:
            faults.append(f"domains.{name}.{key}: expected each once, but got {', '.join(twice)} twice.")
    if part.ablations and name != "kv_arithmetic":
        faults.append(f"domains.{name}.ablations: ablations are made on kv_arithmetic only; remove them here.")
    return faults
