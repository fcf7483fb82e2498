"""What is served: compositions over one anchor, the anchor alone, and the augmenting models alone, by name."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from calmlm.answering import device_of
from calmlm.causal_lm import CalmForCausalLM
from calmlm.config import CalmConfig
from calmlm.data.context import EndOfContext
from calmlm.errors import CheckpointError, ConfigError, DataError, ModelError
from calmlm.files.loading import read_config
from calmlm.files.paths import expanded
from calmlm.serving.batching import try_out
from calmlm.serving.grammar import SchemaWriter
from calmlm.serving.lanes import BaseLane, CompositionLane, Lane, Speaking
from calmlm.serving.union import united
from calmlm.tokens.lookup import find_tokenizer, load_tokenizer
from calmlm.tokens.spelling import token_bytes
from calmlm.tokens.text_ends import ends_of

STATED_NOWHERE = 4096  # tokens of a text where no model states a context


@dataclass
class Served:
    """One model of the catalogue.

    Attributes:
        name: by which requests choose it.
        lane: that writes its texts.
        tokenizer: of its texts.
        beside: other lanes in whose batches its texts may stand, and who speaks in their rows there.
        limit: tokens of a prompt and its answer at most.
    """

    name: str
    lane: Lane
    tokenizer: Any
    limit: int
    beside: list[tuple[CompositionLane, Speaking]] = field(default_factory=list)
    _writer: SchemaWriter | None = None

    @property
    def ends(self) -> frozenset[int]:
        """The tokens that end a text by themselves."""
        return ends_of(self.lane.model, self.tokenizer)

    @property
    def stops(self) -> tuple[str, ...]:
        """Strings that end a text by themselves."""
        given = self.lane.model.generation_config.stop_strings
        return tuple([given] if isinstance(given, str) else given or ())

    @cached_property
    def bytes_of(self) -> list[bytes | None]:
        """The bytes of each token; none where the tokenizer cannot be read."""
        try:
            return token_bytes(self.tokenizer, "served model")
        except ModelError:
            return []

    def schema_writer(self) -> SchemaWriter:
        """Makes grammars; made when it is first asked for."""
        if self._writer is None:
            self._writer = SchemaWriter(self.tokenizer, self.lane.known_ids, set(self.ends))
        return self._writer

    def context(self, given: int) -> EndOfContext | None:
        """What ends a text where a context of an augmenting model's own tokens does."""
        contexts = self.lane.contexts
        return EndOfContext(contexts, given) if contexts else None

    def beside_for(self, ids: Sequence[int], room: int) -> list[tuple[CompositionLane, Speaking]]:
        """``beside`` for a prompt and so many tokens behind it: where there is room for them."""
        known = self.lane.known_ids
        return [(lane, speaking) for lane, speaking in self.beside if lane.takes(ids, room, known)]

    def check(self, ids: Sequence[int]) -> None:
        """Raise unless the models can read a prompt and write behind it.

        Raises:
            DataError: for an empty prompt, unknown tokens, or one that is too long.
        """
        if not ids:
            raise DataError("The prompt must have at least one token, but it has none: write some text.")
        if not all(0 <= token < self.lane.known_ids for token in (min(ids), max(ids))):
            raise DataError(
                f"Token ids of the prompt must lie from 0 to below {self.lane.known_ids}, but got {max(ids)}: use this "
                f"model's tokenizer."
            )
        if len(ids) >= self.limit:
            raise DataError(
                f"The prompt must be shorter than the context of {self.limit} tokens, but it has {len(ids)}: shorten "
                f"it."
            )
        most = self.lane.prompt_length
        if most is not None and len(ids) > most:
            raise DataError(
                f"The prompt must have at most {most} tokens, the context of an augmenting model that reads it, but it "
                f"has {len(ids)}: shorten it."
            )
        for context in self.lane.contexts:
            if context.readable(ids) < len(ids):
                raise DataError(
                    f"The prompt must fit into the context of the augmenting model {context.name!r}, {context.length} "
                    f"of its own tokens, but it takes {context.count(ids)}: shorten it."
                )
        blind = self.lane.shows(ids)
        if blind is not None:
            raise DataError(
                f"The prompt must come as messages, since the augmenting model {blind!r} reads the content of messages "
                f"alone, but got a text in which it would see nothing: ask for a chat completion."
            )


class Catalogue:
    """All that a server serves, by name.

    Args:
        compositions: loaded compositions by name, around one anchor.
        tokenizer: of the anchor.
        max_tokens: of a prompt and its answer; None leaves it to the models.
        bases: names of the anchor and of augmenting models that are served alone, with their tokenizers.
    """

    def __init__(
        self,
        compositions: dict[str, CalmForCausalLM],
        tokenizer: Any,
        max_tokens: int | None = None,
        bases: Sequence[tuple[str, PreTrainedModel, Any, str | None]] = (),
    ) -> None:
        self.models: dict[str, Served] = {}
        lanes = {name: CompositionLane(model, name) for name, model in compositions.items()}
        for name, lane in lanes.items():
            self._add(name, lane, tokenizer, max_tokens)
        anchor = next(iter(compositions.values())).anchor
        beside_anchor: list[tuple[CompositionLane, Speaking]] = [(lane, False) for lane in lanes.values()]
        if len(lanes) > 1:
            whole, rows = united(compositions)
            together = CompositionLane(whole, ", ".join(lanes), several=True)
            try_out(together)
            for name in lanes:
                self.models[name].beside = [(together, rows[name])]
            beside_anchor.insert(0, (together, (False,) * len(whole.augmenting)))
        for name, model, own, layers_path in bases:
            self._add(name, BaseLane(model, layers_path), own, max_tokens)
            if model is anchor:
                self.models[name].beside = beside_anchor

    def _add(self, name: str, lane: Lane, tokenizer: Any, max_tokens: int | None) -> None:
        try_out(lane)
        tokenizer("a", verbose=False)  # the first call may change its state, which other threads could read later
        stated = lane.length if lane.length is not None else max_tokens or STATED_NOWHERE
        self.models[name] = Served(name, lane, tokenizer, min(stated, max_tokens or stated))

    @property
    def max_length(self) -> int:
        """Tokens of the longest text that any of them takes."""
        return max(served.limit for served in self.models.values())


def named(folders: Sequence[str]) -> dict[str, str]:
    """The places of compositions by the names under which they are served: ``name=folder``, or the folder's own.

    Raises:
        ConfigError: for a name that stands for two of them.
    """
    found: dict[str, str] = {}
    for given in folders:
        name, equals, place = given.partition("=")
        place = expanded(place)
        if not equals or not place or "/" in name:
            place = expanded(given)
            name = Path(os.path.abspath(place)).name if Path(place).exists() else place
        if not name or name in found:
            raise ConfigError(
                f"Each composition must have a name of its own, but {name!r} stands for two: write NAME=FOLDER."
            )
        found[name] = place
    return found


def check_places(places: dict[str, str]) -> dict[str, CalmConfig]:
    """The configurations of compositions, before anything large is loaded.

    Raises:
        CheckpointError: for what is no composition, one on another anchor, or a folder with links that lead out of it.
    """
    configs = {}
    for name, place in places.items():
        _check_links(Path(place))
        configs[name] = read_config(place)
        encoders = [key for key, entry in configs[name].augmenting.items() if entry["reads"] == "inputs"]
        if encoders:
            raise ConfigError(
                f"A composition that is served must read text alone, but {encoders[0]!r} in {name!r} is an encoder "
                f"with inputs of its own: call it from Python."
            )
    first, *others = configs
    for other in others:
        one, two = (configs[key].anchor for key in (first, other))
        if (one.get("fingerprint") or one.get("id")) != (two.get("fingerprint") or two.get("id")):
            raise CheckpointError(
                f"All compositions of one server must have the same anchor, but {first!r} stands on "
                f"{_short(one.get('id'))} and {other!r} on {_short(two.get('id'))}: start a server for each."
            )
    return configs


def _check_links(folder: Path) -> None:
    """Raise where a link in a folder, or below it, leads out of it."""
    for place, folders, files in os.walk(folder):
        for path in (Path(place) / name for name in sorted([*folders, *files])):
            if path.is_symlink() and folder.resolve() not in Path(os.path.realpath(path)).parents:
                raise CheckpointError(
                    f"{str(folder)!r} must hold its own files, but {path.relative_to(folder).as_posix()} is a link "
                    f"that leads out of it: copy the file."
                )


def load(
    places: dict[str, str],
    *,
    tokenizer: str | None = None,
    device: str = "auto",
    dtype: str | None = None,
    max_tokens: int | None = None,
    merge_adapters: bool = False,
) -> Catalogue:
    """Load compositions with their bases, each base once.

    Args:
        places: folders or ids by name.
        tokenizer: id or folder of the anchor's tokenizer, where the compositions have none.
        device: a torch device, or "auto" for a GPU where there is one.
        dtype: of the base models, instead of their own.
        max_tokens: of a prompt and its answer; None leaves it to the models.
        merge_adapters: whether adapters lie inside the anchor's weights, for batches in which all rows want them.

    Raises:
        CalmError: there is no such composition, model, tokenizer or device, or they do not belong together.
    """
    configs, target = check_places(places), device_of(device)
    words = None if tokenizer is None else load_tokenizer([tokenizer], named=True)
    loaded: dict[str, CalmForCausalLM] = {}
    known: list[tuple[dict[str, Any], PreTrainedModel]] = []
    for name, place in places.items():
        given: dict[str, Any] = {}
        if loaded:
            given["anchor"] = next(iter(loaded.values())).anchor
            same = {key: _known(known, entry) for key, entry in configs[name].augmenting.items()}
            given["augmenting"] = {key: model for key, model in same.items() if model is not None}
        model = CalmForCausalLM.from_pretrained(
            place, dtype=dtype, trust_remote_code=False, use_safetensors=True, **given
        )
        loaded[name] = model.to(target)
        if merge_adapters:
            model.merge_adapters()
        known += [(configs[name].augmenting[key], base) for key, base in model.augmenting.items()]
    first = next(iter(loaded.values()))
    if words is None:
        words = load_tokenizer([next(iter(places.values())), first.anchor.name_or_path])
    return Catalogue(loaded, words, max_tokens, _bases(loaded, words))


def _known(known: list[tuple[dict[str, Any], PreTrainedModel]], entry: dict[str, Any]) -> PreTrainedModel | None:
    """An augmenting model that was loaded for an earlier composition and is this one."""
    keys = ("fingerprint", "revision", "dequantize")
    for other, model in known:
        if entry.get("fingerprint") and all(entry.get(key) == other.get(key) for key in keys):
            return model
    return None


def _bases(loaded: dict[str, CalmForCausalLM], tokenizer: Any) -> list[tuple[str, PreTrainedModel, Any, str | None]]:
    """The anchor and the augmenting models that write text themselves, by the names of their ids."""
    first = next(iter(loaded.values()))
    found: list[tuple[str, PreTrainedModel, Any, str | None]] = []
    taken, seen = set(loaded), list[PreTrainedModel]()

    def add(config: dict[str, Any], fallback: str, model: PreTrainedModel, own: Any) -> None:
        if own is None or any(model is other for other in seen):
            return
        name = _short(config.get("id")) or fallback
        name = fallback if name in taken else name
        if name in taken:
            raise ConfigError(f"A composition must not be called {name!r}, but one is: write NAME=FOLDER.")
        seen.append(model)
        taken.add(name)
        found.append((name, model, own, config.get("layers_path")))

    add(first.config.anchor, "anchor", first.anchor, tokenizer)
    for composition, model in loaded.items():
        for key, entry in model.config.augmenting.items():
            base = model.augmenting[key]
            shared = entry["reads"] in ("tokens", "prompt")
            own = tokenizer if shared else find_tokenizer(base.name_or_path)
            add(entry, f"{composition}/{key}", base, own)
    return found


def _short(name: Any) -> str:
    """The id of a model on a hub, or the name of its folder: nobody needs to know where that lies."""
    text = str(name or "")
    return Path(text).name if text.startswith((".", "/", "~")) or Path(text).exists() else text
