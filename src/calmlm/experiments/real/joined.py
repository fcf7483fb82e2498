"""The two models, and what is trained on D_C: compositions, LoRA and all weights of m_B."""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GgufConfig, PreTrainedModel, set_seed

import calmlm
from calmlm.bases.families import Backbone
from calmlm.bases.forms import Form
from calmlm.bases.opening import load_base
from calmlm.data.extras import require
from calmlm.data.formats import Example
from calmlm.data.labels import encode_examples, encode_prompt
from calmlm.data.padding import pad_id
from calmlm.errors import ConfigError, ModelError, first_line
from calmlm.experiments.fitting import Row, SupervisedTrainer, fit
from calmlm.experiments.real.layout import AUGMENTING, reading_others
from calmlm.experiments.real.presets import BaseModel, Method, Settings
from calmlm.experiments.real.world import Item, World
from calmlm.experiments.record import device, origin
from calmlm.files.loading import read_config
from calmlm.files.results import to_json, write_result
from calmlm.files.storage import alignment_name, replacing_folder
from calmlm.readers.matching import align
from calmlm.tokens.gguf_files import reading_once
from calmlm.tokens.lookup import load_tokenizer
from calmlm.tokens.vocabularies import with_firsts
from calmlm.training.retaining import Retained, RetainingTrainer

__all__ = [
    "Pair",
    "Trained",
    "composed",
    "fine_tuned",
    "fresh",
    "fresh_for",
    "open_lora",
    "open_pair",
    "open_trained",
    "rows_of",
    "save_lora",
    "save_trained",
    "train_composition",
    "with_lora",
]

LORA = "lora.safetensors"
HELD_LINES, HELD_POSITIONS = 4, 48
"""How many lines are read with each part of a batch where a method retains, and at how many columns."""


@dataclass(frozen=True)
class Pair:
    """Both base models in one dtype, with their tokenizers; none of them is changed."""

    anchor: PreTrainedModel
    augmenting: PreTrainedModel
    tokenizer: Any
    augmenting_tokenizer: Any


@dataclass(frozen=True)
class Trained:
    """What a training gives.

    Attributes:
        model: as it is measured.
        parameters: how many were trained.
        seconds: that the training took.
        losses: (step, loss) as logged.
    """

    model: Any
    parameters: int
    seconds: float
    losses: list[tuple[int, float]]


@reading_once()
def open_pair(
    anchor: BaseModel, augmenting: BaseModel, models: str | Path, dtype: torch.dtype = torch.bfloat16
) -> Pair:
    """Load both models and their tokenizers.

    Args:
        anchor, augmenting: what to load: the file, if one is named, or else the id.
        models: the folder of the files.
        dtype: in which they compute. The weights are rounded to bfloat16 all the same: those of one pair are equal.

    Raises:
        ModelError: there is no such file or model.
        DataError: a model has no tokenizer.
    """
    ours, theirs = _place(anchor, models), _place(augmenting, models)
    both = (_loaded(ours, "anchor").to(dtype), _loaded(theirs, "augmenting model").to(dtype))
    return Pair(*both, *map(_tokenizer, (ours, theirs)))


def _place(model: BaseModel, models: str | Path) -> str:
    if model.file is None:
        return model.id
    path = Path(models) / model.file
    if not path.is_file():
        raise ModelError(
            f"Expected the model {model.id} in {path}, but there is no such file: run scripts/models, name another "
            f"folder with --models, or name an id with --anchor and --augmenting."
        )
    return str(path)


def _loaded(source: str, role: str) -> PreTrainedModel:
    form = Form(dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True))
    return load_base(source, role, **form.options(source)).to(device()).eval()


def _tokenizer(source: str) -> Any:
    return load_tokenizer([source])


def fresh(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """A model of the same architecture that has learned nothing."""
    set_seed(seed)
    return AutoModelForCausalLM.from_config(model.config).to(model.device, model.dtype).eval()


def fresh_for(pair: Pair, world: World) -> PreTrainedModel:
    """The m_A of a seed that has learned nothing."""
    return fresh(pair.augmenting, 1000 + world.seed)


def rows_of(items: Sequence[Item], tokenizer: Any, others: bool = False) -> list[Row]:
    """D_C as ids and labels, each text with its end.

    Args:
        items: pairs and plain lines.
        tokenizer: the anchor's.
        others: whether rows hold what m_A reads instead, as ``other``.
    """
    examples = [
        Example("prompt-completion", {"prompt": item.prompt, "completion": item.completion}, f"item {number}")
        if item.prompt
        else Example("text", {"text": item.target}, f"item {number}")
        for number, item in enumerate(items)
    ]
    rows: list[Row] = list(encode_examples(examples, tokenizer, max_length=None).rows)  # type: ignore[arg-type]
    if others:
        for row, item in zip(rows, items, strict=True):
            row["other"] = encode_prompt(item.other, tokenizer) if item.other else None
    return rows


def composed(pair: Pair, method: Method, world: World) -> calmlm.CalmForCausalLM:
    """The composition of a method, untrained."""
    arguments = dict(method.compose)
    if "words" in arguments or "init" in arguments:
        arguments["plain_text"] = world.lines(world.settings.plain_lines)
    if method.examples:
        arguments["augmenting_prefix"] = world.shown
    small = pair.augmenting if method.augmenting == "real" else fresh_for(pair, world)
    set_seed(world.seed)
    return calmlm.compose(
        copy.deepcopy(pair.anchor),
        {AUGMENTING: copy.deepcopy(small)},
        tokenizer=pair.tokenizer,
        augmenting_tokenizer={AUGMENTING: pair.augmenting_tokenizer},
        **arguments,
    )


def train_composition(pair: Pair, method: Method, world: World) -> Trained:
    """Compose and train on D_C."""
    model = composed(pair, method, world)
    others = method.reads == "other"
    rows = rows_of(world.composition(method.pairs), pair.tokenizer, others)
    collate = reading_others(pad_id(pair.tokenizer)) if others else None
    holding = {"trainer_class": held_to(pair, method, world)} if method.retain else {}
    return _trained(model, rows, pair, method, world.seed, collate, **holding)


def held_to(pair: Pair, method: Method, world: World) -> type[SupervisedTrainer]:
    """A trainer that also holds a composition to m_B's predictions on plain English, lines outside D_C first."""
    lines = encode_examples(
        [Example("text", {"text": line}, "plain") for line in world.lines(world.settings.plain_lines)],
        pair.tokenizer,
        max_length=None,
    )
    rows = [row["input_ids"] for row in lines.rows]
    assert method.retain is not None
    text = Retained(rows, method.retain, HELD_LINES, HELD_POSITIONS, pad_id(pair.tokenizer), world.seed)
    return type("HeldTrainer", (RetainingTrainer, SupervisedTrainer), {"retained": text})


def save_trained(
    model: calmlm.CalmForCausalLM, folder: Path, settings: Settings, command: str | None, mark: str | None = None
) -> None:
    """Save a trained composition in bfloat16, as its bases' weights are, with their ids and where it comes from.

    Args:
        model: the composition.
        folder: to write.
        settings: the experiment's.
        command: that is run.
        mark: what stands for all that it depends on; see ``Settings.mark``.
    """
    tensors = {name: tensor.detach().to(torch.bfloat16) for name, tensor in model.composition_tensors().items()}
    model.config.anchor["id"] = settings.anchor.id
    model.config.augmenting[AUGMENTING]["id"] = settings.augmenting.id
    about = {**({"mark": mark} if mark else {}), **origin(command)}
    with replacing_folder(folder) as fresh:
        model.save_pretrained(fresh, state_dict=tensors)
        write_result(fresh / "origin.json", to_json(about, indent=2) + "\n")


def open_trained(folder: str | Path, pair: Pair) -> calmlm.CalmForCausalLM:
    """Load a composition around the models of a pair.

    How m_A writes m_B's text is made from both tokenizers where it is not in the folder: it is twice as large as all
    that was trained, and the tokenizers come with the models.

    Args:
        folder: a saved composition.
        pair: the models.

    Raises:
        CheckpointError: there is no such composition, or it belongs to other models.
    """
    given: dict[str, Any] = {"anchor": pair.anchor, "augmenting": pair.augmenting}
    entry = read_config(folder).augmenting.get(AUGMENTING, {})
    name = alignment_name(AUGMENTING)
    if entry.get("reads") != "text" or not Path(folder).is_dir() or (Path(folder) / name).exists():
        return calmlm.CalmForCausalLM.from_pretrained(folder, **given)
    with tempfile.TemporaryDirectory() as whole:
        shutil.copytree(folder, whole, dirs_exist_ok=True)
        (Path(whole) / name).write_text(json.dumps(aligned(pair).to_json()), encoding="utf-8")
        return calmlm.CalmForCausalLM.from_pretrained(whole, **given)


def aligned(pair: Pair) -> Any:
    """How m_A writes m_B's text in tokens of its own."""
    ours, theirs = Backbone.of(pair.anchor, "anchor", None), Backbone.of(pair.augmenting, "augmenting model", None)
    found = align(ours, theirs, pair.tokenizer, pair.augmenting_tokenizer, "own", None)
    assert found is not None
    return with_firsts(found, pair.tokenizer, pair.augmenting_tokenizer)


def with_lora(pair: Pair, method: Method, world: World) -> Trained:
    """Train low-rank matrices beside all linear maps of m_B, in float32.

    Raises:
        MissingExtraError: without PEFT.
    """
    model = _lora(pair, method, world.seed)
    return _trained(model, rows_of(world.composition(method.pairs), pair.tokenizer), pair, method, world.seed)


def _lora(pair: Pair, method: Method, seed: int) -> Any:
    """m_B with low-rank matrices that have learned nothing, which are all that trains."""
    require("peft", "compare", "LoRA")
    from peft import LoraConfig, get_peft_model

    model = copy.deepcopy(pair.anchor)
    set_seed(seed)
    settings = LoraConfig(r=method.rank, lora_alpha=2 * method.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    get_peft_model(model, settings)  # the matrices live inside `model`, which is what trains and writes
    return model


def save_lora(model: Any, folder: Path, settings: Settings, command: str | None, mark: str) -> None:
    """Save the matrices that ``with_lora`` trained, in float32, with where they come from.

    Args:
        model: m_B with them inside.
        folder: to write.
        settings: the experiment's.
        command: that is run.
        mark: what stands for all that they depend on; see ``Settings.mark``.
    """
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}
    about = {"mark": mark, "anchor": settings.anchor.id, **origin(command)}
    with replacing_folder(folder) as fresh:
        save_file(tensors, fresh / LORA)
        write_result(fresh / "origin.json", to_json(about, indent=2) + "\n")


def open_lora(folder: Path, pair: Pair, method: Method, seed: int) -> Any:
    """m_B with the matrices that were kept in a folder.

    Raises:
        ConfigError: they are of another shape, or there are none.
    """
    model = _lora(pair, method, seed)
    wanted = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    try:
        found = load_file(folder / LORA)
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"Expected in {folder} the trained matrices of {method.title}, but they cannot be read "
            f"({first_line(error)}): name another folder with --keep."
        ) from error
    if {name: tensor.shape for name, tensor in found.items()} != {name: p.shape for name, p in wanted.items()}:
        raise ConfigError(
            f"Expected in {folder} the trained matrices of {method.title}, but they are of other sizes: name another "
            f"folder with --keep."
        )
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(found[name])
    return model


def fine_tuned(pair: Pair, method: Method, world: World) -> Trained:
    """Train all weights of m_B: in float32, or most steps would be rounded away, computing in the pair's dtype."""
    model = copy.deepcopy(pair.anchor).float().requires_grad_(True)
    rows = rows_of(world.composition(method.pairs), pair.tokenizer)
    found = _trained(model, rows, pair, method, world.seed, bf16=pair.anchor.dtype == torch.bfloat16)
    model.to(pair.anchor.dtype)
    return found


def _trained(
    model: Any,
    rows: list[Row],
    pair: Pair,
    method: Method,
    seed: int,
    collate: Callable[[list[Row]], dict[str, Any]] | None = None,
    **options: Any,
) -> Trained:
    parameters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    start = time.perf_counter()
    given = {"collate": collate, "rows_at_once": method.rows_at_once, **options}
    losses = fit(model, rows, pad_id(pair.tokenizer), method.stage, seed, **given) if method.steps else []
    return Trained(model, parameters, round(time.perf_counter() - start, 1), losses)
