"""Running the anchor from the first layer that a composition changes: what is below never changes, and may be known."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from calmlm.bases.structure import last_state, state_of, with_state
from calmlm.readers import Inputs
from calmlm.readers.kept_states import Reading, States, gathered, placed, readings_of

__all__ = ["ANCHOR", "Shortcut", "run_anchor", "skipping"]

ANCHOR = ""
"""The name under which a recorder knows the anchor."""
HARMLESS = {"logits_to_keep", "return_dict"}
LENGTHS = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}
"""What collators say of packed rows beside their positions, which say the same."""
SHOWN = ("output_hidden_states", "output_attentions", "output_router_logits")
"""What a configuration asks of all layers."""
CLOSE = 1e-3  # of the largest number; another way to the same state may round otherwise, a wrong one is far off


def run_anchor(
    call: Callable[[], Any],
    lower: Sequence[nn.Module],
    recorder: Any,
    inputs: Inputs,
    named: dict[str, Any],
    config: Any,
) -> Any:
    """Run the anchor on whole texts; where a recorder keeps its lower layers' states, from there on.

    Args:
        call: runs it, with its hooks.
        lower: its layers below the first that the composition changes.
        recorder: see ``calmlm.readers.kept_states``; ``keeps_anchor`` says whether it wants these states, and
            ``shortcuts`` holds what is known about leaving layers out, by their number.
        inputs: of the composition's call.
        named: further arguments of the anchor; with one that may change its states, it is run as a whole.
        config: the anchor's.
    """
    mask = inputs.mask
    plain = mask is None or (isinstance(mask, Tensor) and mask.ndim == 2)
    other = {name for name, value in named.items() if value is not None} - HARMLESS - LENGTHS
    shows_more = any(getattr(config, name, False) for name in SHOWN)
    if not getattr(recorder, "keeps_anchor", False) or other or shows_more or not plain or not len(lower):
        return call()
    shortcut = recorder.shortcuts.setdefault(len(lower), Shortcut(lower))
    return shortcut.run(recorder, readings_of(inputs), inputs.ids.shape[1], call)


def _outcome(output: Any) -> Tensor:
    """What a run of the anchor, or of its decoder, comes to."""
    found = getattr(output, "logits", None)
    return last_state(output) if found is None else found


class Shortcut:
    """The lower layers of a decoder, which may be left out where what comes out of them is known.

    Args:
        layers: the lower ones, at least one.

    Attributes:
        works: whether the layers above can do without them; None until it was tried.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self.layers = list(layers)
        self.works: bool | None = None
        self._forms: list[Any] = []

    def run(self, recorder: Any, rows: list[Reading], width: int, call: Callable[[], Any]) -> Any:
        """Run the decoder, with known states where the recorder has them.

        Args:
            recorder: see ``calmlm.readers.kept_states``.
            rows: of the call.
            width: its columns.
            call: runs the decoder, with its hooks.
        """
        if self.works is None:
            self.works = self._try(call)
        if not self.works:
            return call()
        known: list[States] | None = recorder.recall(ANCHOR, rows)
        top = len(self.layers) - 1
        if known is None:
            with _capturing(self.layers) as outputs:
                output = call()
            known = recorder.record(ANCHOR, rows, gathered({top: state_of(outputs[top])}, rows))
            if known is None:
                return output
        device = next(self.layers[0].parameters()).device
        state = placed(known, rows, width, device)[top]
        with skipping(self.layers, self._forms, state):
            return call()

    @torch.no_grad()
    def _try(self, call: Callable[[], Any]) -> bool:
        """Whether the decoder comes to the same without its lower layers, given what comes out of them."""
        with _capturing(self.layers) as outputs:
            expected = _outcome(call())
        # Forms alone: the layers pass on whatever state they are given.
        self._forms = [with_state(output, torch.zeros(0)) for output in outputs]
        try:
            with skipping(self.layers, self._forms, state_of(outputs[-1])):
                found = _outcome(call())
        except Exception:  # of a decoder whose upper layers want what the lower ones left somewhere
            return False
        real = expected.isfinite()
        return bool((found - expected)[real].abs().max() <= CLOSE * expected[real].abs().max().clamp(min=1))


@contextmanager
def skipping(layers: Sequence[nn.Module], forms: Sequence[Any], state: Tensor) -> Iterator[None]:
    """Within this context the layers do nothing, and ``state`` (B, T, D) comes out of the last one.

    Args:
        layers: the lower layers of a decoder, in order.
        forms: an output of each, whose hidden state is replaced.
        state: what comes out of the last one.
    """

    def passing(form: Any, last: bool) -> Callable[..., Any]:
        def forward(*given: Any, **named: Any) -> Any:
            return with_state(form, state if last else (given[0] if given else named["hidden_states"]))

        return forward

    before = [vars(layer).get("forward") for layer in layers]  # which accelerate may have put there
    for index, (layer, form) in enumerate(zip(layers, forms, strict=True)):
        layer.forward = passing(form, index == len(layers) - 1)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            if own is None:
                del layer.forward
            else:
                layer.forward = own  # type: ignore[method-assign]


@contextmanager
def _capturing(layers: Sequence[nn.Module]) -> Iterator[list[Any]]:
    """The outputs of layers, as soon as they have run."""
    outputs: list[Any] = [None] * len(layers)

    def hook_of(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, given: Any, output: Any) -> None:
            outputs[index] = output

        return hook

    handles = [layer.register_forward_hook(hook_of(index), prepend=True) for index, layer in enumerate(layers)]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
