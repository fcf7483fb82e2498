"""Merging by task vectors, through mergekit: task arithmetic, TIES and DARE-TIES.

The task vector of the twin is its difference from m_B, ``tau = theta_twin - theta_B``. Task arithmetic (Ilharco et
al., 2023) adds ``w tau``; TIES (Yadav et al., 2023) keeps its largest entries only; DARE (Yu et al., 2024) keeps random
ones, scaled up. mergekit does so tensor by tensor: TIES takes the largest entries of each, where the paper takes those
of all, and DARE keeps the sum of each tensor's absolute values, where the paper divides by the share that is kept.
"""

from __future__ import annotations

import copy
import tempfile
from functools import partial
from pathlib import Path

from transformers import AutoModelForCausalLM, PreTrainedModel

from calmlm.baselines.given import Bases, Budget, Data, least_loss
from calmlm.baselines.soup import weighted
from calmlm.data.extras import require

__all__ = ["METHODS", "WEIGHTS", "fit", "merge"]

WEIGHTS = (0.1, 0.3, 0.5, 0.7, 0.9)  # of the task vector, the best of which is taken
DENSITY = 0.5  # share of its entries that TIES and DARE keep
METHODS = ("task_arithmetic", "ties", "dare_ties")


def merge(
    anchor: PreTrainedModel, twin: PreTrainedModel, method: str, *, weight: float, seed: int = 0
) -> PreTrainedModel:
    """Add part of the twin's task vector to the anchor.

    Args:
        anchor, twin: of one architecture.
        method: one of METHODS.
        weight: of the task vector.
        seed: of the entries that DARE keeps.

    Raises:
        MissingExtraError: without mergekit.
    """
    require("mergekit", "merging", f"The baseline {method!r}")
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge

    with tempfile.TemporaryDirectory() as folder:
        paths = {name: str(Path(folder) / name) for name in ("anchor", "twin", "merged")}
        anchor.save_pretrained(paths["anchor"])
        twin.save_pretrained(paths["twin"])
        parameters = {"weight": weight} if method == "task_arithmetic" else {"weight": weight, "density": DENSITY}
        plan = MergeConfiguration.model_validate(
            {
                "merge_method": method,
                "base_model": paths["anchor"],
                "models": [{"model": paths["twin"], "parameters": parameters}],
                # One task vector: normalised weights would make its weight 1, whatever was asked for.
                "parameters": {"normalize": False},
                "dtype": "float32",
            }
        )
        options = MergeOptions(
            copy_tokenizer=False, write_model_card=False, quiet=True, random_seed=seed, device="cpu", num_threads=1
        )
        run_merge(plan, paths["merged"], options)
        merged = AutoModelForCausalLM.from_pretrained(paths["merged"], dtype=anchor.dtype)
        merged.generation_config = copy.deepcopy(anchor.generation_config)  # mergekit writes none
        return merged.to(anchor.device).eval()


def _fit(method: str, bases: Bases, data: Data, budget: Budget) -> PreTrainedModel:
    anchor, twin = bases.merging_pair(f"Merging by {method}")
    # What is added is in proportion to its weight, by all three: one merge is enough.
    whole = merge(anchor, twin, method, weight=1.0, seed=budget.seed)
    tried = [weighted([anchor, whole], [1 - weight, weight]) for weight in WEIGHTS]
    return least_loss(tried, bases, data, budget)


fit = {method: partial(_fit, method) for method in METHODS}
"""Each method's baseline; nothing is trained, and the weight is chosen by the loss on the validation rows."""
