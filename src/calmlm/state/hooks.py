"""How a composition enters its base models: persistent forward hooks on their layers.

The hooks are plain callable objects, so that a composition can be copied and pickled, and the bases' own state-dict
names stay as they are. All state of a call lives in one ``Call`` object that the model puts into the ``Slot`` which its
hooks share, and takes out when the call ends; each thread has its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from calmlm.bases.freezing import apart
from calmlm.bases.structure import last_state, state_of, with_last_state, with_state
from calmlm.connectors.adapters import Adapters
from calmlm.connectors.gate import ConvexGate
from calmlm.connectors.graft import Graft
from calmlm.connectors.pointer import Pointer
from calmlm.connectors.word_map import WordMap, mix
from calmlm.errors import ModelError
from calmlm.state.beside import Beside, states_beside
from calmlm.state.call import Call, Pointed, Slot


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
    def connector(self) -> Any:
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
        if is_a(self.connector, Graft):
            found = states_beside(stream, self.layer, self.connection, device)
            if found is None:
                return self._unread(state)
            rows = _on(device, call.rows.get(self.name))
            parts = [part for part in (found.seen, found.ends, rows) if part is not None]
            return call.scaled(state, self.connector(state, found.states, _all(parts)))
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
        return call.kept([self.name], state, call.scaled(state, new))

    def _unread(self, state: Tensor) -> Tensor | None:
        """The state if the augmenting model has read nothing yet: it does not change.

        In training, zero times the sum of the connection's parameters is added. Otherwise a batch of which no
        augmenting model reads anything would have no gradient.
        """
        if not (torch.is_grad_enabled() and self.connector.training):
            return None
        return state + nothing_of([self.connector]).to(state)


def is_a(module: Any, kind: type[nn.Module]) -> bool:
    """Whether a module is of this kind, or PEFT's copy of such a one that trains in its place."""
    return isinstance(getattr(module, "original_module", module), kind)


def nothing_of(modules: Iterable[nn.Module]) -> Tensor:
    """Zero times the sum of their parameters, a scalar."""
    return 0 * torch.stack([p.sum() for module in modules for p in module.parameters()]).sum()


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

    kind: type[ConvexGate] = WordMap

    def __init__(self, slot: Slot, name: str, connectors: nn.ModuleDict) -> None:
        super().__init__(slot, name, LAST, LAST, nn.ModuleList())
        self.joined = connectors

    def words(self, name: str) -> tuple[Any, int]:
        """A model's words of this kind, or None, and their place: they are the last of its connections."""
        connectors: Any = self.joined[name]
        place = next((index for index, found in enumerate(connectors) if is_a(found, self.kind)), -1)
        return (None, place) if place < 0 else (connectors[place], place)

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        call = self.slot.call
        if call is None:
            return None
        speaking = [name for name in call.streams if self.words(name)[0] is not None]
        if not speaking or speaking[0] != self.name:
            return None
        state = last_state(output)
        parts, silent = {}, []
        for name in speaking:
            words, place = self.words(name)
            found = states_beside(call.streams[name], LAST, place, state.device)
            if found is None:
                silent.append(words)
            else:
                parts[name] = (words, call.beside(name, found))
        silent = [words for words in silent if torch.is_grad_enabled() and words.training]
        if silent:  # or a batch of which no augmenting model reads anything would have no gradient
            output = with_last_state(output, state + nothing_of(silent).to(state))
        new = self.say(call, output, parts) if parts else None
        return output if new is None and silent else new

    def say(self, call: Call, output: Any, parts: dict[str, tuple[Any, Beside]]) -> Any:
        """The decoder's output with what these models say, from their words and their last states."""
        state = last_state(output)
        new = mix(state, [(words, found.states, found.seen) for words, found in parts.values()])
        return with_last_state(output, call.kept(parts, state, call.scaled(state, new)))


class PointHook(WordsHook):
    """On the anchor's decoder: keeps what pointers need until the anchor's logits are there."""

    kind = Pointer

    def say(self, call: Call, output: Any, parts: dict[str, tuple[Any, Beside]]) -> None:
        state = last_state(output)
        call.pointed = Pointed(state, parts, call.spoken(parts, state.device), call.scale)


class AdaptHook:
    """On a linear map of the anchor's decoder: adds what an adapter makes of the map's input to its output."""

    def __init__(self, slot: Slot, name: str, target: str, connectors: nn.ModuleList) -> None:
        self.slot, self.name, self.target, self.connectors = slot, name, target, connectors

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        call = self.slot.call
        if call is None or self.name not in call.streams or call.adapted is module:
            return None
        adapters: Any = next(found for found in self.connectors if is_a(found, Adapters))
        new = call.scaled(output, (output + adapters.of(self.target)(args[0])).to(output.dtype))
        rows = call.rows.get(self.name)
        if rows is None:
            return new
        if output.ndim != 3 or len(output) != len(rows):
            raise ModelError(
                f"composition_mask needs adapters on maps that take whole rows, but {self.target!r} of the anchor "
                f"takes tokens alone: leave it out, or choose other target_modules."
            )
        return call.kept([self.name], output, new)


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


class HeadHook:
    """On the head of a base model, which is frozen: lets it multiply all rows at once."""

    def __init__(self, slot: Slot, name: str) -> None:
        self.slot, self.name = slot, name

    def __call__(self, head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        return apart(args)


def attach_heads(slot: Slot, name: str, *models: PreTrainedModel) -> None:
    """Put the hooks of one augmenting model on the heads of both models, where they have one."""
    for model in models:
        head = model.get_output_embeddings()
        if isinstance(head, nn.Module):
            head.register_forward_pre_hook(HeadHook(slot, name))


def attach_words(
    slot: Slot, name: str, words: ConvexGate, connectors: nn.ModuleDict, anchor: nn.Module, augmenting: nn.Module
) -> None:
    """Put the hooks of an augmenting model's words on the decoders of both models; pointers come behind all maps."""
    if isinstance(words, Pointer):
        anchor.register_forward_hook(PointHook(slot, name, connectors))
    else:
        anchor.register_forward_hook(WordsHook(slot, name, connectors), prepend=True)
    augmenting.register_forward_hook(CaptureLastHook(slot, name))


def attach_adapters(
    slot: Slot, name: str, connectors: nn.ModuleList, anchor: nn.Module, targets: Iterable[str]
) -> None:
    """Put the hooks of an augmenting model's adapters on the maps of the anchor's decoder."""
    for target in targets:
        anchor.get_submodule(target).register_forward_hook(AdaptHook(slot, name, target, connectors))


def detach(slot: Slot, name: str, *models: nn.Module) -> None:
    """Take the hooks of one augmenting model in the composition of ``slot`` off these models."""
    for model in models:
        for module in model.modules():
            for hooks in (module._forward_hooks, module._forward_pre_hooks):
                for key in [key for key, hook in hooks.items() if _belongs(hook, slot, name)]:
                    del hooks[key]
                    module._forward_pre_hooks_with_kwargs.pop(key, None)


def _belongs(hook: Any, slot: Slot, name: str) -> bool:
    return isinstance(hook, (AdaptHook, CaptureHook, HeadHook, InjectHook)) and hook.slot is slot and hook.name == name


def _all(parts: Sequence[Tensor]) -> Tensor | None:
    """Where all of these hold, (B, T) bool; None for everywhere."""
    found = None
    for part in parts:
        part = part[..., 0] if part.ndim == 3 else part
        found = part if found is None else found & part
    return found


def _on(device: torch.device, value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(tensor.to(device) for tensor in value)
    return value if value is None else value.to(device)


class Checkpoint:
    """A checkpointing function for a frozen layer: its hooks find their call when it is run again, its dropout is off.

    Args:
        layer: one that takes the training flag to be checkpointed.
        slot: of the composition.
        checkpoint: transformers' own function.
    """

    def __init__(self, layer: nn.Module, slot: Slot, checkpoint: Callable[..., Any]) -> None:
        self.layer, self.slot, self.checkpoint = layer, slot, checkpoint

    def __call__(self, forward: Callable[..., Any], *args: Any) -> Any:
        call = self.slot.call

        def again(*inner: Any) -> Any:
            before, self.slot.call = self.slot.call, call
            self.layer.training = False
            try:
                return forward(*inner)
            finally:
                self.layer.training = True
                self.slot.call = before

        return self.checkpoint(again, *args)


def checkpoint_frozen(layers: Iterable[nn.Module], slot: Slot) -> None:
    """Let transformers checkpoint the activations of frozen layers, whose dropout stays off all the same.

    Args:
        layers: those that keep a graph; only layers with ``gradient_checkpointing`` are changed.
        slot: of the composition.
    """
    for layer in layers:
        if getattr(layer, "gradient_checkpointing", False):
            layer.training = True
            checkpoint: Any = layer._gradient_checkpointing_func
            if isinstance(checkpoint, Checkpoint):  # of another composition around the same anchor, perhaps
                checkpoint = checkpoint.checkpoint
            vars(layer)["_gradient_checkpointing_func"] = Checkpoint(layer, slot, checkpoint)
