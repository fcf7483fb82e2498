"""What is found out about a user's own models and data before anything is trained, and which methods they allow."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from calmlm.baselines.mixture import DENSE
from calmlm.bases.opening import check_dtype
from calmlm.bases.origins import commit_of
from calmlm.comparison.contract import GRAFTS
from calmlm.comparison.methods import METHODS
from calmlm.comparison.own_settings import Known, Own, OwnTask, Sources, listed
from calmlm.composing.aligning import check_alignable
from calmlm.config import ConnectorConfig, resolve_connections
from calmlm.data.context import stated_length
from calmlm.data.extras import require
from calmlm.data.formats import CONVERSATIONS, Example
from calmlm.data.sources import load_examples, read_lines
from calmlm.errors import CalmError, ConfigError, DataError, ModelError
from calmlm.readers.speaking import check_words
from calmlm.tokens.retokenization import METHODS as ALIGNMENTS
from calmlm.training.fields import read_fields
from calmlm.training.schema import ModelConfig

__all__ = ["checked", "reasons"]

OWN_TOKENS = ("router", "confidence_cascade", "text_tool", "composed_encoder")
"""Methods in which m_A reads the anchor's tokens."""
PROMPTED = ("router", "confidence_cascade", "composed_encoder", "swapped_trained")
"""Methods that look at the prompts of D_C."""
WORDS_ONLY = ("router", "confidence_cascade", "text_tool")
"""Methods that write answers, and give no probabilities."""


def reasons(own: Own) -> dict[str, str | None]:
    """All methods, each with the reason why it cannot be run, or None where it can."""
    why: dict[str, str | None] = dict.fromkeys(METHODS)
    why["cascade"] = "it pastes m_A's answer in a way of each experiment's own; 'text_tool' does so for any"
    if own.model.plain_text is None:
        why |= dict.fromkeys(GRAFTS, "it needs 'own.model.plain_text', by which a graft starts")
    if own.vanilla is None:
        why["composed_vanilla"] = "it needs 'own.vanilla', m_A before its training"
    if all(task.metric == "bits_per_byte" for task in own.tasks.values()):
        why |= dict.fromkeys(WORDS_ONLY, "it gives no probabilities, and all tasks ask for bits per byte")
    if own.known is not None and not own.known.prompted:
        why |= dict.fromkeys(PROMPTED, "it looks at prompts, and the loss on D_C falls on whole texts")
    if not own.shares_tokenizer:
        why |= dict.fromkeys(OWN_TOKENS, "the two models have different tokenizers")
    config = own.configs[own.anchor]
    if config.model_type not in DENSE:
        families = " and ".join(DENSE)
        why["moe"] = f"it is made of models of the families {families}, and the anchor's is {config.model_type}"
    elif getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False):
        why["moe"] = "it is made of layers without biases, and the anchor's have some"
    return why


def checked(own: Own, faults: list[str], where: str) -> Own | None:
    """The same with its tasks read and what is known of its models and data; None where there are faults.

    Args:
        own: as it stands in a file.
        faults: one sentence for each fault is appended.
        where: dotted path within the file.
    """
    before = len(faults)
    faults += [f"{where}.{fault}" for fault in _faults_of(own)]
    tasks = {}
    for name, value in own.tasks.items():
        task = read_fields(OwnTask, value, faults, f"{where}.tasks.{name}")
        if not str(name).replace("_", "").isalnum():
            faults.append(f"{where}.tasks: expected names of letters, digits and underscores, but got {name!r}.")
        if task is not None and task.stop == "":
            faults.append(f"{where}.tasks.{name}.stop: expected some text, but it is empty; leave it out.")
        tasks[str(name)] = task
    if not tasks:
        faults.append(f"{where}.tasks: expected at least one, but there is none.")
    if len(faults) > before:
        return None
    own = replace(own, tasks=tasks)
    try:
        _check_models(own)
        known = _know(own)
    except CalmError as error:
        faults.append(f"{where}: {error}")
        return None
    return replace(own, known=known)


def _faults_of(own: Own) -> list[str]:
    """What is wrong without looking at any model or data."""
    found = list(own.model.faults())
    if own.model.composition is not None or isinstance(own.model.augmenting, dict | None):
        found.append("model: expected an anchor and one augmenting model; name both.")
    if "kind" in own.model.connector:
        found.append("model.connector.kind: each connector is a method of its own; leave it out.")
    found += [
        f"model.{name}: expected the default here, since all methods have the same data, on one device; leave it out."
        for name in ("refresh", "augmenting_view", "augmenting_prefix", "device_map", "development")
        if getattr(own.model, name) != getattr(ModelConfig(), name)
    ]
    found += [
        f"{name}: expected at least 1, but got {getattr(own, name)}."
        for name in ("steps", "batch_size", "max_new_tokens", "evaluation_batch_size", "validation")
        if getattr(own, name) < 1
    ]
    found += [
        f"{name}: expected a number above 0, but got {getattr(own, name)}."
        for name in ("learning_rate", "full_learning_rate")
        if not 0 < getattr(own, name) < math.inf
    ]
    if not 0 <= own.weight_decay < math.inf:
        found.append(f"weight_decay: expected 0 or more, but got {own.weight_decay}.")
    if own.max_length is not None and own.max_length < 2:
        found.append(f"max_length: expected 2 or more, but got {own.max_length}.")
    return found


def _check_models(own: Own) -> None:
    """Raise unless the models can be read and fit together."""
    configs, (ours, theirs) = own.configs, own.tokenizers
    if ours is None:
        raise ModelError(f"Expected an anchor with a tokenizer, but {own.anchor!r} has none: save one beside it.")
    sizes = {source: config.get_text_config(decoder=True).vocab_size for source, config in configs.items()}
    if theirs is None and sizes[own.augmenting] != sizes[own.anchor]:
        raise ModelError(
            f"Expected an augmenting model with a tokenizer, or with the anchor's vocabulary, but {own.augmenting!r} "
            f"has none that can be loaded, and {sizes[own.augmenting]} entries instead of {sizes[own.anchor]}: save "
            f"its tokenizer beside it."
        )
    if own.vanilla is not None and sizes[own.vanilla] != sizes[own.augmenting]:
        raise ModelError(
            f"Expected a vanilla model with the augmenting model's vocabulary of {sizes[own.augmenting]} entries, but "
            f"{own.vanilla!r} has {sizes[own.vanilla]}: name the model that the augmenting one was trained from."
        )
    if own.twin is not None and _shapes(configs[own.twin], own) != _shapes(configs[own.anchor], own):
        raise ModelError(
            f"Expected a twin of the anchor's architecture and size, but {own.twin!r} has other weights than "
            f"{own.anchor!r}: name another, or none to have it trained."
        )

    # m_A's context is about other tokens where it has a tokenizer of its own.
    apart = () if own.shares_tokenizer else (own.augmenting, own.vanilla)
    contexts = [stated_length(config) for source, config in configs.items() if source not in apart]
    context = min((length for length in contexts if length is not None), default=None)
    if own.max_length is not None and context is not None and own.max_length > context:
        raise ConfigError(
            f"max_length must be at most {context}, the shortest context of the models, but got {own.max_length}: "
            f"lower it or leave it out."
        )
    _check_composition(own)


def _check_composition(own: Own) -> None:
    """Raise unless the composition can be made as it is asked for."""
    model, (anchor, augmenting) = own.model, (own.configs[name] for name in (own.anchor, own.augmenting))
    anchor, augmenting = (config.get_text_config(decoder=True) for config in (anchor, augmenting))
    above, below = (getattr(config, "num_hidden_layers", None) for config in (augmenting, anchor))
    if isinstance(model.connections, dict) or isinstance(model.words, dict):
        name = "connections" if isinstance(model.connections, dict) else "words"
        raise ConfigError(f"{name} must be those of one augmenting model, but got a mapping: write them alone.")
    if above is not None and below is not None:
        resolve_connections("every-4" if model.connections is None else model.connections, above, below)
    options = {**model.connector, "kind": "cross_attention", "num_heads": model.num_heads}
    ConnectorConfig.build(options, anchor.hidden_size, getattr(anchor, "num_attention_heads", None) or 1)
    check_dtype(model.dtype)
    if model.words is not None:
        check_words(model.words, "tokens", "augmenting model")
    if model.init is not None:
        check_alignable("cross_attention", model.connector)
        if model.plain_text is None:
            raise ConfigError("init='aligned' needs plain_text, but there is none: name a file.")
    if model.plain_text is not None:
        read_lines(model.plain_text)
    if model.adapters is not None:
        require("peft", "compare", "model.adapters")
    if model.alignment not in ALIGNMENTS:
        known = " or ".join(repr(method) for method in ALIGNMENTS)
        raise ConfigError(f"alignment must be {known}, but got {model.alignment!r}: use one of these.")


def _shapes(config: PreTrainedConfig, own: Own) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=own.model.trust_remote_code)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _know(own: Own) -> Known:
    composition, corpus = (load_examples(listed(sources)) for sources in (own.composition, own.corpus))
    learned, read = ({_text_of(example) for example in examples} for examples in (composition, corpus))
    contents = {"composition": _digest_of(composition), "corpus": _digest_of(corpus), **dict(_models_of(own))}
    if own.model.plain_text is not None:
        lines = "\n".join(read_lines(own.model.plain_text))
        contents["plain_text"] = hashlib.sha256(lines.encode()).hexdigest()
    shown: dict[str, int] = {}
    known: dict[str, int] = {}
    for name, task in own.tasks.items():
        examples = _load_task(task.data, task.metric)
        contents[f"tasks.{name}"] = _digest_of(examples)
        for found, texts in ((shown, learned), (known, read)):
            if count := sum(_text_of(example) in texts for example in examples):
                found[name] = count
    for examples in (composition, corpus):
        if examples[0].format in CONVERSATIONS:
            raise DataError(
                f"{examples[0].place}: expected 'prompt' and 'completion', or 'text', but got 'messages', which the "
                f"tasks could not be asked in: write the conversation out."
            )
    return Known(contents, shown, known, composition[0].format == "prompt-completion" and own.loss_on == "completion")


def _text_of(example: Example) -> str:
    """All that a record says, whatever white space is in it and however it is cut into fields."""
    return "".join("".join(str(part) for part in example.fields.values()).split())


def _load_task(sources: Sources, metric: str) -> list[Example]:
    examples = load_examples(listed(sources))
    if metric == "chrf":
        require("sacrebleu", "compare", "The metric chrf")
    formats = ("prompt-completion", "text") if metric == "bits_per_byte" else ("prompt-completion",)
    if examples[0].format not in formats:
        wanted = "'prompt' and 'completion'" + (" or 'text'" if len(formats) > 1 else "")
        raise DataError(
            f"{examples[0].place}: expected the fields {wanted} for the metric {metric}, but got "
            f"{examples[0].format}: rename the fields or take another metric."
        )
    return examples


def _models_of(own: Own) -> Iterator[tuple[str, str]]:
    """What tells one state of each model from another: its files, or its commit."""
    for source in own.configs:
        if Path(source).is_dir():
            yield source, _digest_of_files(sorted(path for path in Path(source).iterdir() if path.is_file()))
        else:
            yield source, str(commit_of(source))


def _digest_of(examples: Sequence[Example]) -> str:
    """16 digits that stand for the text of examples."""
    text = json.dumps([example.fields for example in examples], ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _digest_of_files(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.name.encode())
        try:
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise DataError(
                f"Expected a readable file at {path}, but it cannot be read ({error.strerror}); check the path."
            ) from None
    return digest.hexdigest()[:16]
