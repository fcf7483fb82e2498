"""What all models of calmlm are to transformers: attention, gradient checkpointing, and no weights to draw."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from calmlm.bases.families import text_config
from calmlm.config import CalmConfig
from calmlm.errors import ModelError
from calmlm.modeling.recomputing import with_kept

ATTENTION_FALLBACK = "sdpa"


class CalmPreTrainedModel(PreTrainedModel):
    """What ``CalmModel`` and ``CalmForCausalLM`` have in common."""

    config_class = CalmConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def __init__(self, config: CalmConfig, anchor: PreTrainedModel) -> None:
        # The cross-attentions take the anchor's kind of attention where it is a general one.
        kind = text_config(anchor)._attn_implementation
        general = kind == "eager" or kind in ALL_ATTENTION_FUNCTIONS
        config._attn_implementation_internal = kind if general else ATTENTION_FALLBACK
        super().__init__(config)

    def init_weights(self) -> None:
        """Nothing: the bases are pretrained and the connectors draw their own weights."""

    def set_input_embeddings(self, value: nn.Module) -> None:
        raise _fixed("a replacement was given")

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        raise _fixed("a replacement was given")

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Module:
        """Nothing for the size that they have; transformers would change the anchor's own before it asks.

        Raises:
            ModelError: for another size.
        """
        found: nn.Module = self.get_input_embeddings()
        rows = getattr(found, "num_embeddings", None) or found.weight.shape[0]  # type: ignore[index,union-attr]
        wanted = rows if new_num_tokens is None else new_num_tokens
        wanted = wanted if pad_to_multiple_of is None else -(-wanted // pad_to_multiple_of) * pad_to_multiple_of
        if wanted != rows:
            raise _fixed(f"{wanted} tokens were asked for in the place of {rows}")
        return found

    def enable_input_require_grads(self) -> None:
        """Nothing: gradients start at the first connection, so the bases' embeddings need none."""

    def _set_gradient_checkpointing(self, *args: Any, **kwargs: Any) -> None:
        if "gradient_checkpointing_func" in kwargs:
            kwargs["gradient_checkpointing_func"] = with_kept(kwargs["gradient_checkpointing_func"])
        super()._set_gradient_checkpointing(*args, **kwargs)
        self.train(self.training)


def _fixed(asked: str) -> ModelError:
    """The error for embeddings that would be others."""
    return ModelError(
        f"The embeddings of a composition must stay the anchor's own, but {asked}: change the anchor before composing."
    )
