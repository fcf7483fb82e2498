"""How a composition enters its base models: persistent forward hooks on their layers.

The hooks are plain callable objects, so that a composition can be copied and pickled, and the bases' own state-dict
names stay as they are. All state of a call lives in one ``Call`` object that the model puts into the ``Slot`` which its
hooks share, and takes out when the call ends; each thread has its own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache

from calmlm.bases.structure import last_state, state_of, with_last_state, with_state
from calmlm.connectors import Connector
from calmlm.connectors.cross_attention import Attention, Rotation
from calmlm.connectors.word_map import WordMap, mix


@dataclass
class Stream:
    """One augmenting model's part of a call.

    Attributes:
        mask: cross-attention mask in the form that ``attention`` takes, or None.
        rotation: rotary angles of the new anchor positions, or None.
        key_rotation: rotary angles of the new augmenting positions, or None.
        cache: keys and values of earlier positions, one layer per connection, or None.
        attention: the attention function.
        seeing: (B, T) bool, which anchor positions see anything at all; None where all do.
        visible: (B, 1, T, S) bool, which augmenting positions each anchor position sees; None where each sees the one
            that stands beside it, and those before.
        hidden: outputs of the model's connected layers, by layer, each (B, S_new, D_A); empty when it read nothing new.
    """

    mask: Tensor | None
    rotation: Rotation | None
    key_rotation: Rotation | None
    cache: Cache | None
    attention: Attention
    seeing: Tensor | None = None
    visible: Tensor | None = None
    hidden: dict[int, Tensor] = field(default_factory=dict)


@dataclass
class Call:
    """Everything that one forward call of a composition shares with its hooks.

    Attributes:
        streams: of the augmenting models, by name.
        composed: (B, 1, 1) bool, the rows that the connections change; None for all.
    """

    streams: dict[str, Stream] = field(default_factory=dict)
    composed: Tensor | None = None


class Slot(threading.local):
    """Where hooks find the call that their thread is in, if it is in one; a copy is empty."""

    def __init__(self) -> None:
        self.call: Call | None = None

    def __reduce__(self) -> tuple[type[Slot], tuple[()]]:
        return Slot, ()


class CaptureHook:
    """On a layer of an augmenting model: keeps the layer's output for the connections that read it."""

    def __init__(self, slot: Slot, name: str, layer: int) -> None:
        self.slot, self.name, self.layer = slot, name, layer

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        call = self.slot.call
        if call is not None and self.name in call.streams:
            call.streams[self.name].hidden[self.layer] = state_of(output)


class InjectHook:
    """On a layer of the anchor: adds one connection's cross-attention to the layer's output."""

    def __init__(self, slot: Slot, name: str, connection: int, layer: int, connectors: nn.ModuleList) -> None:
        self.slot, self.name, self.connection, self.layer, self.connectors = slot, name, connection, layer, connectors

    @property
    def connector(self) -> Connector:
        """Looked up at each call: PEFT puts a copy that trains in its place."""
        return self.connectors[self.connection]  # type: ignore[return-value]

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        new = self.change(state_of(output))
        return None if new is None else with_state(output, new)

    def change(self, state: Tensor) -> Tensor | None:
        """The anchor's state (B, T, D_B) with this connection in it; None where there is nothing to add."""
        call = self.slot.call
        if call is None or self.name not in call.streams:
            return None
        stream = call.streams[self.name]
        device = state.device
        if self.layer in stream.hidden:
            hidden = stream.hidden[self.layer].to(device)
            keys, values = self.connector.keys_values(hidden, _on(device, stream.key_rotation))
            if stream.cache is not None:
                keys, values = stream.cache.update(keys, values, self.connection)
        elif stream.cache is not None and stream.cache.get_seq_length(self.connection):
            past = stream.cache.layers[self.connection]
            keys, values = past.keys, past.values
        else:
            return self._unread(state)
        mask, seeing = _on(device, stream.mask), _on(device, stream.seeing)
        # By name: transformers' DebugUnderflowOverflow takes every tensor among positional arguments for numbers.
        rotation, attention = _on(device, stream.rotation), stream.attention
        new = self.connector(state, keys, values, mask=mask, rotation=rotation, attention=attention, seeing=seeing)
        return new if call.composed is None else torch.where(_on(device, call.composed), new, state)

    def _unread(self, state: Tensor) -> Tensor | None:
        """The state if the augmenting model has read nothing yet: it does not change.

        In training, zero times the sum of the connection's parameters is added. Otherwise a batch of which no
        augmenting model reads anything would have no gradient.
        """
        if not (torch.is_grad_enabled() and self.connector.training):
            return None
        return state + 0 * torch.stack([p.sum() for p in self.connector.parameters()]).sum().to(state)


LAST = -1
"""Stands for the last state, behind a model's last layer and norm, among the layers of a ``Stream``."""


class CaptureLastHook(CaptureHook):
    """On the decoder of an augmenting model: keeps its last state."""

    def __init__(self, slot: Slot, name: str) -> None:
        super().__init__(slot, name, LAST)

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        call = self.slot.call
        if call is not None and self.name in call.streams:
            call.streams[self.name].hidden[LAST] = last_state(output)


class WordsHook(InjectHook):
    """On the anchor's decoder: mixes what augmenting models say into its last state; the first one does it for all."""

    def __init__(self, slot: Slot, name: str, connectors: nn.ModuleDict) -> None:
        super().__init__(slot, name, LAST, LAST, nn.ModuleList())
        self.joined = connectors

    def words(self, name: str) -> tuple[WordMap | None, int]:
        """A model's map, or None, and its place: it is the last of its connections."""
        connectors: Any = self.joined[name]
        found = connectors[-1]
        return found if isinstance(found, WordMap) else None, len(connectors) - 1

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        call = self.slot.call
        if call is None:
            return None
        speaking = [name for name in call.streams if self.words(name)[0] is not None]
        if not speaking or speaking[0] != self.name:
            return None
        state = last_state(output)
        parts = [self._part(name, call.streams[name], state) for name in speaking]
        found = [part for part in parts if part is not None]
        if not found:
            return None
        new = mix(state, found)
        if call.composed is not None:
            new = torch.where(_on(state.device, call.composed), new, state)
        return with_last_state(output, new)

    def _part(self, name: str, stream: Stream, anchor: Tensor) -> tuple[WordMap, Tensor, Tensor | None] | None:
        """A model's map, its last state at each of the anchor's new positions, and where it has read anything."""
        words, place = self.words(name)
        assert words is not None
        states = stream.hidden.get(LAST)
        states = states if states is None else states.to(anchor.device)
        if stream.visible is None:  # one state for each position
            if stream.cache is not None and states is not None:
                little = states[:, None, :, :1]  # so that the cache counts these positions
                stream.cache.update(little, little, place)
            return None if states is None else (words, states, _on(anchor.device, stream.seeing))
        if stream.cache is not None:
            if states is not None:
                states = stream.cache.update(states[:, None], states[:, None, :, :0], place)[0][:, 0]
            elif stream.cache.get_seq_length(place):
                states = stream.cache.layers[place].keys[:, 0]
        if states is None or states.shape[1] == 0:
            return None
        last = last_seen(stream.visible).to(anchor.device)
        chosen = states.gather(1, last.clamp(min=0)[..., None].expand(-1, -1, states.shape[-1]))
        return words, chosen, last >= 0


class InjectBeforeHook(InjectHook):
    """On a layer of the anchor: changes the layer's input instead."""

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:  # type: ignore[override]
        if args:
            new = self.change(args[0])
            return None if new is None else ((new, *args[1:]), kwargs)
        new = self.change(kwargs["hidden_states"])
        return None if new is None else (args, {**kwargs, "hidden_states": new})


def attach(
    slot: Slot,
    name: str,
    pairs: Sequence[Sequence[int]],
    connectors: nn.ModuleList,
    anchor_layers: nn.ModuleList,
    augmenting_layers: nn.ModuleList,
) -> None:
    """Put the hooks of one augmenting model on the layers of both models.

    Args:
        slot: of the composition.
        name: of the augmenting model.
        pairs: its connections (augmenting_layer, anchor_layer).
        connectors: one for each connection.
        anchor_layers, augmenting_layers: of both models.
    """
    for index, (i, j) in reversed(list(enumerate(pairs))):
        # First in line, so that outputs recorded by other hooks are those of the composition; the last one first, so
        # that connections into one layer follow in their order, each on the result of the one before.
        if connectors[index].before_layer:
            before = InjectBeforeHook(slot, name, index, i, connectors)
            anchor_layers[j].register_forward_pre_hook(before, prepend=True, with_kwargs=True)
        else:
            anchor_layers[j].register_forward_hook(InjectHook(slot, name, index, i, connectors), prepend=True)
    for i in sorted({i for i, _ in pairs}):
        augmenting_layers[i].register_forward_hook(CaptureHook(slot, name, i))


def attach_words(slot: Slot, name: str, connectors: nn.ModuleDict, anchor: nn.Module, augmenting: nn.Module) -> None:
    """Put the hooks of an augmenting model's words on the decoders of both models."""
    anchor.register_forward_hook(WordsHook(slot, name, connectors), prepend=True)
    augmenting.register_forward_hook(CaptureLastHook(slot, name))


def last_seen(visible: Tensor) -> Tensor:
    """The last of the positions that each one sees, -1 for none: (B, 1, T, S) bool to (B, T) int64."""
    width = visible.shape[-1]
    if not width:
        return visible.new_full((visible.shape[0], visible.shape[2]), -1, dtype=torch.long)
    columns = torch.arange(1, width + 1, device=visible.device)
    return (visible[:, 0] * columns).amax(-1) - 1


def detach(slot: Slot, name: str, *models: nn.Module) -> None:
    """Take the hooks of one augmenting model in the composition of ``slot`` off these models."""
    for model in models:
        for module in model.modules():
            for hooks in (module._forward_hooks, module._forward_pre_hooks):
                for key in [key for key, hook in hooks.items() if _belongs(hook, slot, name)]:
                    del hooks[key]
                    module._forward_pre_hooks_with_kwargs.pop(key, None)


def _belongs(hook: Any, slot: Slot, name: str) -> bool:
    return isinstance(hook, (CaptureHook, InjectHook)) and hook.slot is slot and hook.name == name


def _on(device: torch.device, value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(tensor.to(device) for tensor in value)
    return value if value is None else value.to(device)


class QuietCheckpoint:
    """A checkpointing function for a layer that applies dropout in its own forward: runs it in evaluation mode."""

    def __init__(self, layer: nn.Module, checkpoint: Callable[..., Any]) -> None:
        self.layer, self.checkpoint = layer, checkpoint

    def __call__(self, forward: Callable[..., Any], *args: Any) -> Any:
        def quiet(*inner: Any) -> Any:
            self.layer.training = False
            try:
                return forward(*inner)
            finally:
                self.layer.training = True

        return self.checkpoint(quiet, *args)


def checkpoint_quietly(layers: Iterable[nn.Module], config: PreTrainedConfig) -> None:
    """Let transformers checkpoint the activations of frozen layers, whose dropout stays off all the same.

    Args:
        layers: those that keep a graph; only layers with ``gradient_checkpointing`` are changed.
        config: of the decoder that they belong to.
    """
    dropout = any(isinstance(value, float) and value > 0 for key, value in vars(config).items() if "drop" in key)
    for layer in layers:
        if getattr(layer, "gradient_checkpointing", False):
            layer.training = True
            checkpoint: Any = layer._gradient_checkpointing_func
            if dropout and not isinstance(checkpoint, QuietCheckpoint):
                vars(layer)["_gradient_checkpointing_func"] = QuietCheckpoint(layer, checkpoint)
