"""A sparsely-gated mixture of experts (Shazeer et al., 2017), made from dense models (Komatsuzaki et al., 2023).

The feed-forward layers of m_B and of its twin become the experts of transformers' own Mixtral; everything else is
m_B's. The gate is the noisy top-k gate, with transformers' load-balancing loss, and all of it is trained on D_C.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedModel, Trainer, set_seed
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

from calmlm.baselines.given import Bases, Budget, Data
from calmlm.errors import ModelError
from calmlm.experiments.fitting import fit as train

__all__ = ["NoisyTopKGate", "fit", "upcycle"]

COPIES = 2  # experts made of each dense layer
TOP_K = 2
BALANCE = 0.01  # weight of the load-balancing loss
DIFFERENCE = 0.01  # relative noise on all copies but the first, so that they can part
ALIGNMENT = 8  # widths that are no multiple of it are none for the grouped products of experts
DENSE = ("llama", "mistral")  # families whose layers are those of Mixtral, but for the experts


class NoisyTopKGate(MixtralTopKRouter):
    """The noisy top-k gate.

    ::

        H(x) = x W_g + e * softplus(x W_noise),  e ~ N(0, 1) in training, 0 otherwise
        G(x) = softmax(H(x) where it is among the k largest, -inf elsewhere)
    """

    def __init__(self, config: MixtralConfig) -> None:
        super().__init__(config)
        nn.init.normal_(self.weight, std=0.02)
        self.noise = nn.Parameter(torch.zeros(self.num_experts, self.hidden_dim))

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits H (tokens, experts), and weights and indices of the chosen experts, each (tokens, k)."""
        states = hidden_states.reshape(-1, self.hidden_dim)
        logits = nn.functional.linear(states, self.weight)
        if self.training:
            scale = nn.functional.softplus(nn.functional.linear(states, self.noise))
            logits = logits + torch.randn_like(logits) * scale
        best, chosen = logits.float().topk(self.top_k, dim=-1)
        return logits, best.softmax(-1).to(states.dtype), chosen


def upcycle(models: list[PreTrainedModel], copies: int = COPIES, top_k: int = TOP_K) -> MixtralForCausalLM:
    """A mixture whose experts are the feed-forward layers of the models, and whose other weights are the first one's.

    Raises:
        ModelError: for models of another family than Llama or Mistral.
    """
    first = models[0]
    if first.config.model_type not in DENSE:
        raise ModelError(
            f"A mixture of experts needs models of the families {' and '.join(DENSE)}, but got "
            f"{first.config.model_type}: leave this baseline out."
        )
    shared = {
        key: value
        for key, value in first.config.to_dict().items()
        if key not in ("model_type", "architectures", "transformers_version", "dtype")
    }
    config = MixtralConfig(
        **shared,
        num_local_experts=copies * len(models),
        num_experts_per_tok=top_k,
        router_aux_loss_coef=BALANCE,
    )
    mixture = MixtralForCausalLM(config).to(first.device)
    if any(width % ALIGNMENT for width in (config.hidden_size, config.intermediate_size)):
        mixture.set_experts_implementation("eager")
    shared_weights = {name: weight for name, weight in first.state_dict().items() if ".mlp." not in name}
    unexpected = mixture.load_state_dict(shared_weights, strict=False).unexpected_keys
    if unexpected or getattr(first.config, "mlp_bias", False):
        raise ModelError(
            "A mixture of experts needs models whose layers have no biases, but the anchor's have some: leave this "
            "baseline out."
        )
    with torch.no_grad():
        for index, layer in enumerate(mixture.model.layers):
            block: Any = layer.mlp
            block.gate = NoisyTopKGate(config).to(first.device)
            for expert in range(copies * len(models)):
                dense: Any = models[expert % len(models)].model.layers[index].mlp
                halves = torch.cat((dense.gate_proj.weight, dense.up_proj.weight))
                block.experts.gate_up_proj[expert] = _apart(halves, expert >= len(models))
                block.experts.down_proj[expert] = _apart(dense.down_proj.weight, expert >= len(models))
    # Not what follows from the configuration alone: the Trainer switches the cache off there.
    mixture.generation_config = copy.deepcopy(first.generation_config)
    return mixture


def _apart(weight: Tensor, is_copy: bool) -> Tensor:
    """A copy of a weight differs from it a little, or both would always learn the same."""
    return weight + DIFFERENCE * weight.std() * torch.randn_like(weight) if is_copy else weight


class _BalancedTrainer(Trainer):
    """The stock Trainer, with the load-balancing loss in the model's own."""

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **_: Any) -> Any:  # type: ignore[override]
        """Cross-entropy of the labelled tokens and the load-balancing loss, which counts no padding."""
        real = inputs["input_ids"] != model.config.pad_token_id
        real = real.flip(-1).cumsum(-1).flip(-1) > 0  # padding stands on the right
        output = model(**inputs, attention_mask=real.long(), output_router_logits=True)
        return (output.loss, output) if return_outputs else output.loss


def fit(bases: Bases, data: Data, budget: Budget) -> MixtralForCausalLM:
    """Make a mixture of m_B and its twin and train it on D_C."""
    anchor, twin = bases.merging_pair("A mixture of experts")
    set_seed(budget.seed)
    model = upcycle([anchor, twin]).float()  # all of it trains, and lower precision would swallow its steps
    model.config.pad_token_id = bases.tokenizer.pad_token_id  # what its rows are padded with
    train(
        model,
        data.composition,
        bases.tokenizer.pad_token_id,
        budget.full,
        budget.seed,
        trainer_class=_BalancedTrainer,
        meter=budget.meter,
    )
    return model.to(anchor.dtype).eval()
