"""What all readers have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from calmlm.bases.families import Backbone
from calmlm.bases.placement import execution_device
from calmlm.bases.structure import accepts
from calmlm.connectors import Connector
from calmlm.connectors.cross_attention import CrossAttention, eager_attention
from calmlm.connectors.gate import ConvexGate
from calmlm.readers.inputs import Inputs
from calmlm.readers.kept_states import Reading, Recorder, gathered, placed
from calmlm.readers.preamble import Opening
from calmlm.state.call import Call, Slot, Stream
from calmlm.state.past import Past


class Reader(Protocol):
    """Runs one augmenting model for one call."""

    in_graphs: ClassVar[bool]

    def read(self, inputs: Inputs, past: Past) -> Stream:
        """Return the stream, its hidden states filled in."""
        ...

    def finish(self, past: Past) -> None:
        """Tidy up the past when the anchor has run."""
        ...


@dataclass
class Common:
    """What every reader holds: its name and model, the connected layers, the first connector, the configuration.

    ``ingest`` makes vectors of logits (B, S, V_A), where connectors that read a distribution take vectors instead.
    ``in_graphs`` tells whether torch can compile what it does.
    """

    in_graphs: ClassVar[bool] = True

    name: str
    model: nn.Module
    backbone: Backbone
    layers: tuple[int, ...]
    first: Connector
    config: PreTrainedConfig
    slot: Slot
    opening: Opening
    ingest: Callable[[Tensor], Tensor] | None

    def finish(self, past: Past) -> None:
        """Nothing, for most."""

    @property
    def connector(self) -> CrossAttention | ConvexGate:
        """The cross-attention of the first connection; all have the same options."""
        return self.first.attention

    def run(
        self,
        stream: Stream,
        *,
        head: bool = False,
        rows: Callable[[], list[Reading]] | None = None,
        **arguments: Any,
    ) -> Tensor | None:
        """Run the model without gradients; hooks on its connected layers put their outputs into ``stream``.

        Args:
            stream: of the call.
            head: whether the model's logits are wanted.
            rows: makes what the rows are known by, where the call reads whole texts: a recorder may know their states.
            arguments: of the model.

        Returns:
            with ``head``, the logits of the last position, (B, V_A).
        """
        recorder: Recorder | None = self.slot.recorder
        if recorder is None or rows is None or head:
            return self._run(stream, head, arguments)
        read = rows()
        if not read:
            return self._run(stream, head, arguments)
        known = recorder.recall(self.name, read)
        shared = self.layers[1:] if self.first.reads_distribution else ()  # all connections take the first one's
        if known is None:
            self._run(stream, head, arguments)
            hidden = {layer: states for layer, states in stream.hidden.items() if layer not in shared}
            whole = all(len(states) == len(read) for states in hidden.values())  # else an encoder makes several
            known = recorder.record(self.name, read, gathered(hidden, read)) if whole else None
        if known and known[0]:
            width = arguments["input_ids"].shape[1] if read[0].columns is not None else 0
            hidden = placed(known, read, width, execution_device(self.backbone.decoder))
            stream.hidden.update(hidden)
            if shared:
                stream.hidden.update(dict.fromkeys(shared, hidden[self.layers[0]]))
        return None

    def _run(self, stream: Stream, head: bool, arguments: dict[str, Any]) -> Tensor | None:
        arguments, before = self.opening.with_text(arguments)
        self.slot.call = Call({self.name: stream})
        try:
            with torch.no_grad():
                if self.first.reads_distribution:
                    logits = self.model(**arguments).logits[:, before:]
                    stream.cut(before)
                    stream.hidden.update(dict.fromkeys(self.layers, self.said(logits)))
                elif head:
                    if accepts(self.model, "logits_to_keep"):
                        arguments["logits_to_keep"] = self.backbone.kept(1, arguments["input_ids"])
                    logits = self.model(**arguments).logits
                else:
                    self.backbone.decoder(**arguments)
                    stream.cut(before)
                    return None
        finally:
            self.slot.call = None
        return logits[:, -1] if head else None

    def said(self, logits: Tensor) -> Tensor:
        """What connectors that read the model's output distribution are given of its logits."""
        return logits.softmax(-1, dtype=torch.float32) if self.ingest is None else self.ingest(logits)

    def attention(self, boolean_mask: bool) -> tuple[str, Any]:
        """The kind of attention and its function; only sdpa and eager take a mask of our own."""
        kind = self.config._attn_implementation
        if boolean_mask and kind not in ("eager", "sdpa"):
            kind = "sdpa"
        return kind, ALL_ATTENTION_FUNCTIONS.get_interface(kind, eager_attention)

    def masked(self, visible: Tensor) -> tuple[Tensor | None, Tensor | None, Any]:
        """From (B, 1, T, S) bool: the mask that the attention takes, which rows see anything (B, T), the attention.

        None for both where everything is visible.
        """
        kind, attention = self.attention(boolean_mask=True)
        if visible.shape[2] == 1 and visible.shape[3] and bool(visible.all()):
            return None, None, attention  # one step of decoding, as a rule
        anything = visible.any(-1, keepdim=True)
        seeing = anything[:, 0, :, 0]
        if self.connector.null_key is None:
            # A row that sees nothing must see something for softmax to be defined; its result is then dropped.
            visible = visible | ~anything
        if kind == "sdpa":
            return visible, seeing, attention
        dtype = self.connector.dtype
        additive = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
        return additive.masked_fill(~visible, torch.finfo(dtype).min), seeing, attention

    def on_device(self, value: Any) -> Any:
        return value.to(execution_device(self.backbone.decoder)) if isinstance(value, Tensor) else value
