"""LoRA on m_B (Hu et al., 2021), through PEFT, with as many added parameters as the composition has."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn
from transformers import set_seed
from transformers.pytorch_utils import Conv1D

from calmlm.baselines.given import Bases, Budget, Data
from calmlm.data.extras import require
from calmlm.experiments.fitting import Row
from calmlm.experiments.fitting import fit as train

__all__ = ["fit", "fit_on_corpus", "rank_for"]

UNFIT = {kind: {"out_proj", "conv1d"} for kind in ("mamba", "mamba2", "falcon_mamba", "falcon_h1")}
"""Maps that PEFT adapts in no model of these types, since their kernels take the weights as they are."""
MAPS = (nn.Linear, Conv1D)  # GPT-2 and its kin have linear maps of transformers' own


def fit(bases: Bases, data: Data, budget: Budget) -> Any:
    """LoRA on D_C."""
    return _fit(bases, data.composition, budget)


def fit_on_corpus(bases: Bases, data: Data, budget: Budget) -> Any:
    """LoRA on what m_A was trained on."""
    return _fit(bases, data.corpus, budget)


def rank_for(model: nn.Module, targets: list[str], parameters: int) -> int:
    """The rank, at least 1, whose adapters on ``targets`` come nearest to so many parameters."""
    each = sum(
        sum(module.weight.shape)
        for name, module in model.named_modules()
        if isinstance(module, MAPS) and name.split(".")[-1] in targets
    )
    return max(1, round(parameters / each))


def _fit(bases: Bases, rows: list[Row], budget: Budget) -> Any:
    require("peft", "compare", "The baseline 'lora'")
    from peft import LoraConfig, get_peft_model

    model = copy.deepcopy(bases.anchor)
    head = model.get_output_embeddings()
    targets = sorted(
        {
            name.split(".")[-1]
            for name, module in model.named_modules()
            if isinstance(module, MAPS) and module is not head
        }
        - UNFIT.get(model.config.model_type, set())
    )
    rank = rank_for(model, targets, budget.parameters)
    set_seed(budget.seed)
    transposed = any(isinstance(module, Conv1D) for module in model.modules())
    settings = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=targets, task_type="CAUSAL_LM", fan_in_fan_out=transposed
    )
    adapted = get_peft_model(model, settings)
    # The adapters live inside `model`, which is what trains and generates.
    train(model, rows, bases.tokenizer.pad_token_id, budget.stage, budget.seed, meter=budget.meter)
    return adapted.merge_and_unload().eval()
