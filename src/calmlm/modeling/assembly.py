"""``Assembly``: the base models of a composition and the connectors between them, joined and taken out.

It knows what each of them is and can do. What a call computes is ``calm_model``'s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from calmlm.bases.embeddings import embed_with, embedding_size
from calmlm.bases.families import Backbone
from calmlm.bases.freezing import freeze
from calmlm.bases.heads import head_logits
from calmlm.bases.peft_parts import scaling_tuners, train_added
from calmlm.bases.placement import device_map_of, execution_device
from calmlm.config import CalmConfig, ConnectorConfig, opening_of
from calmlm.connectors import CONNECTORS, Connector, build_connector
from calmlm.connectors.adapters import Adapters
from calmlm.connectors.ingestor import AnchorIngestor
from calmlm.connectors.pointer import Pointer
from calmlm.connectors.word_map import WordMap
from calmlm.errors import ModelError, warn
from calmlm.modeling.abilities import Abilities, can_cache
from calmlm.modeling.parent import CalmPreTrainedModel
from calmlm.modeling.probabilities import Head
from calmlm.readers import Opening, OwnReader, Reader, check_opening, make_reader
from calmlm.state.call import Slot
from calmlm.state.hooks import AdaptHook, attach, attach_adapters, attach_heads, attach_words, checkpoint_frozen, detach
from calmlm.state.merged_weights import Merge, check_map, map_of, merge, unmerge
from calmlm.tokens.alignment import Alignment
from calmlm.tokens.live_text import writer_of
from calmlm.tokens.retokenization import Rewriting
from calmlm.tokens.stream import Rewriter
from calmlm.tokens.transcoding import Transcoder
from calmlm.tokens.vocabularies import first_tokens


class Assembly(CalmPreTrainedModel):
    """An anchor, its augmenting models and the connectors between them.

    Args:
        config: the composition's configuration.
        anchor: the anchor, a causal language model.
        augmenting: the augmenting models by name, each a causal language model.
        alignments: how those that have tokens of their own write the text, by name: as data, or at work elsewhere.
    """

    def __init__(
        self,
        config: CalmConfig,
        anchor: PreTrainedModel,
        augmenting: dict[str, PreTrainedModel],
        alignments: Mapping[str, Alignment | Rewriting | Transcoder | Rewriter] | None = None,
    ) -> None:
        super().__init__(config, anchor)
        check_apart(anchor, augmenting.values())
        self.anchor = anchor
        self.augmenting = nn.ModuleDict(augmenting)
        self.connectors = nn.ModuleDict()
        self.ingestors = nn.ModuleDict()
        self.enabled = True
        self.scale = 1.0
        self.merged = False
        self.merges: list[Merge] = []
        self.active = set(augmenting)
        self.joined = dict.fromkeys(augmenting, 1)  # how often a model of this name has been
        self.slot = Slot()
        self._warned: set[str] = set()  # of what others have put into the bases
        self.transcoders = nn.ModuleDict({name: writer_of(found) for name, found in (alignments or {}).items()})
        self._find_parts()
        try:
            for name in augmenting:
                self._connect(name)
            self._make_readers()
        except BaseException:  # the bases may be somebody's, who goes on with them
            for name, model in augmenting.items():
                detach(self.slot, name, anchor, model)
            raise
        for base in self.bases():
            freeze(base)
        self.post_init()

    def __getstate__(self) -> dict[str, Any]:
        # Backbones and readers only point at modules of this model; they are made again when it is copied or unpickled.
        return {
            key: value for key, value in self.__dict__.items() if key not in ("_backbones", "_readers", "_openings")
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._find_parts()
        self._make_readers()

    def _find_parts(self) -> None:
        self._backbones = {"": Backbone.of(self.anchor, "anchor", self.config.anchor.get("layers_path"))}
        for name, model in self.augmenting.items():
            entry = self.config.augmenting[name]
            find = Backbone.of_encoder if entry["reads"] == "inputs" else Backbone.of
            self._backbones[name] = find(model, "augmenting model", entry.get("layers_path"))

        self._cacheable = {name: self._can_cache(name) for name in self._backbones}

    def _can_cache(self, name: str) -> bool:
        """Whether the augmenting model ``name``, or the anchor, can carry its past in a cache."""
        if not name:
            return can_cache(self._backbones[""], self.anchor, "tokens", opened=False)
        entry = self.config.augmenting[name]
        return can_cache(self._backbones[name], self.augmenting[name], entry["reads"], bool(opening_of(entry)))  # type: ignore[arg-type]

    def change_prefix(self, name: str, ids: Sequence[int]) -> None:
        """Let an augmenting model read these tokens before each text that begins from now on.

        Raises:
            ConfigError: for tokens that it does not have, or more than its positions.
        """
        check_opening(repr(name), self._backbones[name], self.config.augmenting[name].get("beginning", ()), ids)
        entry = self.config.augmenting[name]
        entry.pop("prefix", None)
        entry |= {"prefix": list(ids)} if ids else {}
        self._openings[name].change(opening_of(entry))
        self._cacheable[name] = self._can_cache(name)

    def _make_readers(self) -> None:
        self._readers: dict[str, Reader] = {}
        self._openings = {
            name: Opening(opening_of(self.config.augmenting[name]), model, self._backbones[name])
            for name, model in self.augmenting.items()
        }
        for name in self.augmenting:
            first: Connector = self.connectors[name][0]  # type: ignore[index,assignment]
            layers = tuple(sorted({i for i, _ in self.config.augmenting[name]["connections"]}))
            common = {
                "name": name,
                "model": self.augmenting[name],
                "backbone": self._backbones[name],
                "layers": layers,
                "first": first,
                "config": self.config,
                "slot": self.slot,
                "opening": self._openings[name],
                "ingest": self._ingest(name),
            }
            reads = self.config.augmenting[name]["reads"]
            transcoder, vocabulary = self.transcoders[name] if reads == "text" else None, self._backbones[""].vocab_size
            self._readers[name] = make_reader(reads, common, transcoder, vocabulary)

    def _ingest(self, name: str) -> Callable[[Tensor], Tensor] | None:
        """What makes vectors of a model's logits for its connectors; None where they take something else."""
        return partial(self.ingestors[name], embed=embed_with(self.anchor)) if name in self.ingestors else None

    def _connect(self, name: str) -> None:
        anchor, augmenting, entry = self._backbones[""], self._backbones[name], self.config.augmenting[name]
        options = vars(ConnectorConfig(**entry["connector"])).copy()
        kind = options.pop("kind")
        size = augmenting.vocab_size if CONNECTORS[kind].reads_distribution else augmenting.size
        if options["ingestor"] == "anchor":
            first = first_tokens(self.alignments.get(name), anchor.vocab_size, augmenting.vocab_size)
            self.ingestors[name] = AnchorIngestor(first, options["top_k"]).to(execution_device(augmenting.decoder))
            size = embedding_size(self.anchor)
        connectors = nn.ModuleList()
        for _, j in entry["connections"]:
            connector = build_connector(kind, size, anchor.size, options)
            connector.to(execution_device(anchor.layers[j]))
            connectors.append(connector)
        attach_heads(self.slot, name, self.anchor, self.augmenting[name])  # type: ignore[arg-type]
        attach(self.slot, name, entry["connections"], connectors, anchor.layers, augmenting.layers)
        if entry.get("words"):
            words = self._words(name).to(execution_device(self.anchor))
            connectors.append(words)
            attach_words(self.slot, name, words, self.connectors, anchor.decoder, augmenting.decoder)
        if entry.get("adapters"):
            connectors.append(Adapters(**entry["adapters"]).to(execution_device(self.anchor)))
            attach_adapters(self.slot, name, connectors, anchor.decoder, entry["adapters"]["targets"])
        self.connectors[name] = connectors

    def _words(self, name: str) -> WordMap | Pointer:
        anchor, augmenting, entry = self._backbones[""], self._backbones[name], self.config.augmenting[name]
        options = {key: value for key, value in entry["words"].items() if key not in ("kind", "scale")}
        if entry["words"].get("kind") == "pointer":
            found = self.alignments.get(name)
            table = None if found is None else first_tokens(found, anchor.vocab_size, augmenting.vocab_size)
            return Pointer(augmenting.size, anchor.size, table=table, **options)
        return WordMap(augmenting.size, anchor.size, **options)

    def merge_adapters(self) -> None:
        """Put the adapters into the weights beside which they stand, or do so again; see ``CalmForCausalLM``."""
        adapted: dict[str, dict[str, Any]] = {}
        for name, entry in self.config.augmenting.items():
            for target in (entry.get("adapters") or {}).get("targets", ()):
                adapted.setdefault(target, {})[name] = self.connectors[name]
        self.merges = merge(self.slot, self._backbones[""].decoder, adapted, self.merges)
        self.merged = True

    def unmerge_adapters(self) -> None:
        """Let the adapters stand beside the anchor's weights again."""
        unmerge(self.merges)
        self.merged, self.merges = False, []

    @property
    def points(self) -> bool:
        """Whether an augmenting model that is switched on speaks in probabilities: the logits are the anchor's and
        more."""
        entries = [self.config.augmenting[name] for name in self.active]
        return self.enabled and any((entry.get("words") or {}).get("kind") == "pointer" for entry in entries)

    @property
    def heads(self) -> dict[str, Head]:
        """What makes the own logits of the augmenting models that speak in probabilities, by name."""
        words = {name: self.config.augmenting[name].get("words") or {} for name in self.augmenting}
        return {
            name: partial(head_logits, self.augmenting[name], scale=found["scale"])
            for name, found in words.items()
            if found.get("kind") == "pointer"
        }

    def add(
        self,
        name: str,
        model: PreTrainedModel,
        entry: dict[str, Any],
        alignment: Alignment | Rewriting | None,
        tensors: dict[str, Tensor],
    ) -> None:
        """Join one more augmenting model with connectors that were trained elsewhere on the same anchor.

        Args:
            name: what to call it.
            model: the augmenting model.
            entry: its part of a ``CalmConfig``.
            alignment: the alignment of a model that has tokens of its own.
            tensors: its connectors' tensors, named as in ``self.connectors[name]``.

        Raises:
            ModelError: the model is the anchor, or adapters are merged and its own cannot be.
        """
        check_apart(self.anchor, [model])
        for target in (entry.get("adapters") or {}).get("targets", ()) if self.merged else ():
            check_map(target, map_of(self._backbones[""].decoder, target))
        self.augmenting[name] = model  # which refuses names of its own
        self.config.augmenting[name] = entry
        if alignment is not None:
            self.transcoders[name] = writer_of(alignment)
        self._find_parts()
        self._connect(name)
        for key, parameter in self.connectors[name].named_parameters():
            parameter.data = parameter.data.to(tensors[key].dtype)
        self.connectors[name].load_state_dict(tensors)
        self._make_readers()
        self.active.add(name)
        self.joined[name] = self.joined.get(name, 0) + 1
        if self.merged:
            self.merge_adapters()
        freeze(model)
        self.train(self.training)

    def remove(self, name: str) -> None:
        """Take one augmenting model out, with its connectors and hooks: the others are as they were without it."""
        detach(self.slot, name, self.anchor, self.augmenting[name])  # type: ignore[arg-type]
        del self.config.augmenting[name], self.augmenting[name], self.connectors[name]
        for parts in (self.transcoders, self.ingestors):
            if name in parts:
                del parts[name]
        self.active.discard(name)
        self._find_parts()
        self._make_readers()
        if self.merged:
            self.merge_adapters()

    @property
    def alignments(self) -> dict[str, Alignment | Rewriting]:
        """The alignments of the augmenting models that have tokens of their own."""
        return {name: transcoder.alignment for name, transcoder in self.transcoders.items()}  # type: ignore[misc]

    def bases(self) -> Iterator[PreTrainedModel]:
        """The frozen models: the anchor, then the augmenting models."""
        yield self.anchor
        yield from self.augmenting.values()

    def advancing(self) -> Iterator[PreTrainedModel]:
        """Those that go on with every token: the anchor, and the augmenting models that speak and read the text."""
        yield self.anchor
        for name in self.active:
            if self.reads_text(name):
                yield self.augmenting[name]  # type: ignore[misc]

    def reads_text(self, name: str) -> bool:
        """Whether the augmenting model ``name`` reads the text as it grows, in the anchor's tokens or its own."""
        return self.config.augmenting.get(name, {}).get("reads") in ("tokens", "text")

    @property
    def hf_device_map(self) -> dict[str, Any]:
        """Which part lies on which device, where a base was loaded with a device map; tools look for it here."""
        parts = {"anchor": self.anchor, **{f"augmenting.{name}": model for name, model in self.augmenting.items()}}
        found = device_map_of(parts)
        if found is None:
            raise AttributeError("none of the models was loaded with a device map")
        return found

    @property
    def device(self) -> torch.device:
        """Where inputs are expected: the anchor's embeddings compute there, wherever their weights lie."""
        return execution_device(self.anchor.get_input_embeddings())

    def backbone(self, name: str = "") -> Backbone:
        """The decoder of the augmenting model ``name``, or of the anchor."""
        return self._backbones[name]

    def shows(self, name: str, ids: Sequence[int]) -> bool:
        """Whether the augmenting model ``name`` reads anything of a text; through a view it may not."""
        writer = self.transcoders[name] if self.config.augmenting[name].get("view") else None
        return writer is None or bool(writer.write(ids))  # type: ignore[operator]

    def reader(self, name: str) -> Reader:
        """What runs the augmenting model ``name``."""
        return self._readers[name]

    def opening(self, name: str) -> Opening:
        """What the augmenting model ``name`` reads before each text."""
        return self._openings[name]

    def get_input_embeddings(self) -> nn.Module:
        return self.anchor.get_input_embeddings()

    def train(self, mode: bool = True) -> Self:
        """As in torch, except that the frozen bases stay in evaluation mode; what PEFT has put into them does not.

        With activation checkpointing the anchor's layers above the first connection carry the training flag, which is
        what makes transformers checkpoint them; those below keep no graph. Dropout stays off all the same.
        """
        super().train(mode)
        for one in self.merges if mode else ():
            one.weight = None  # some optimizers write where no tensor notices
        for base in self.bases():
            base.eval()
            train_added(base, mode)
        self._warn_of_tuners(mode)
        if mode:
            layers = self._backbones[""].layers
            checkpoint_frozen(layers[self.lowest() + 1 :], self.slot)
        return self

    def _warn_of_tuners(self, mode: bool) -> None:
        """Warn once of what others have put into the bases that does not do what it seems to."""
        if mode and "idle" not in self._warned:
            idle = [name for name, each in self.augmenting.items() if any(p.requires_grad for p in each.parameters())]
            if idle:
                self._warned.add("idle")
                warn(
                    f"Parameters of the augmenting model {idle[0]!r} ask for a gradient and get none, since nothing of "
                    f"augmenting models trains: with PEFT, name maps of the anchor alone, such as "
                    f"target_modules='.*anchor.*(q_proj|v_proj)'."
                )
        if "scaling" not in self._warned:
            found = scaling_tuners(self.anchor, _is_adapted)
            if found:
                self._warned.add("scaling")
                warn(
                    f"PEFT has put a {found[0]} around a map of the anchor that has adapters of the composition: it "
                    f"changes what they give as well, so that merge_and_unload() would change the result. Keep it "
                    f"beside the composition, or compose without adapters."
                )

    def lowest(self) -> int:
        """The lowest of the anchor's layers that something trained changes."""
        backbone = self._backbones[""]
        entries = self.config.augmenting.values()
        found = [j for entry in entries for _, j in entry["connections"]]
        targets = {name for entry in entries for name in (entry.get("adapters") or {}).get("targets", ())}
        adapted = {backbone.decoder.get_submodule(name) for name in targets}
        if adapted:
            inside = {module: place for place, layer in enumerate(backbone.layers) for module in layer.modules()}
            found += [inside.get(module, 0) for module in adapted]  # what stands in no layer may stand before all
        return min(found, default=len(backbone.layers) - 1)

    def untouched(self) -> int:
        """How many of the anchor's layers, from below, give what they give without a composition.

        The layer whose output a connection changes is one of them: what changes is made of its own output.
        """
        lowest = self.lowest()
        entries = self.config.augmenting.values()
        inside = any(entry.get("adapters") for entry in entries) or any(
            j == lowest and CONNECTORS[entry["connector"]["kind"]].before_layer
            for entry in entries
            for _, j in entry["connections"]
        )
        return lowest + (not inside)

    @property
    def abilities(self) -> Abilities:
        """What the models that are switched on can do together."""
        names = [name for name in self.augmenting if name in self.active]
        return Abilities(
            {name: self._backbones[name] for name in ("", *names)},
            {name: self.config.augmenting[name]["reads"] for name in names},
            {name: len(self._openings[name]) for name in names},
        )

    @property
    def reads_prompts(self) -> bool:
        """Whether an augmenting model that is switched on reads the prompt only (``refresh=False``)."""
        return any(self.config.augmenting[name]["reads"] == "prompt" for name in self.active)

    @property
    def wants_prompts(self) -> bool:
        """Whether it matters to a model that is switched on which tokens were given and not generated."""
        return self.reads_prompts or any(isinstance(self._readers[name], OwnReader) for name in self.active)

    @property
    def says_anything(self) -> bool:
        """Whether the composition's output may differ from the anchor's: it is on, and some connection has learned."""
        joined: list[Any] = [connector for name in self.active for connector in self.connectors[name]]  # type: ignore[union-attr,attr-defined]
        return self.enabled and not all(connector.is_identity for connector in joined)

    def try_padding(self) -> None:
        """Find out how the models read rows that are padded on the left now, and not in the first call with a mask."""
        for name, backbone in self._backbones.items():
            if not name or self.config.augmenting[name]["reads"] != "inputs":
                _ = backbone.pads_left


def check_apart(anchor: PreTrainedModel, augmenting: Iterable[Any]) -> None:
    """Raise where an augmenting model is the anchor itself, whose layers are then changed while it is read.

    Raises:
        ModelError: for such a one.
    """
    if any(model is anchor for model in augmenting):
        raise ModelError(
            "The anchor must be a model of its own, but got one model twice: load it a second time to compose it with "
            "itself."
        )


def _is_adapted(module: nn.Module) -> bool:
    """Whether adapters of a composition stand beside a map."""
    return any(isinstance(hook, AdaptHook) for hook in module._forward_hooks.values())
