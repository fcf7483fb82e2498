"""The systems that are compared: what each trains, and what then answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from transformers import PreTrainedModel

from calmlm.baselines import BASELINES
from calmlm.comparison.contract import GRAFTS, MERGING, Fitted, TextDomain
from calmlm.comparison.swapping import Swapped, fit_swapped
from calmlm.experiments.fitting import fit
from calmlm.experiments.flops import Meter

__all__ = ["ABLATIONS", "METHODS", "REFERENCE", "TITLES", "WITHOUT_PLAIN_TEXT", "Method", "compose"]


@dataclass(frozen=True)
class Method:
    """One system.

    Attributes:
        title: its name in a table.
        fit: from an experiment and a meter of what is spent to what answers.
    """

    title: str
    fit: Callable[[TextDomain, Meter], Fitted]


def _of(domain: TextDomain, model: Any) -> Fitted:
    return Fitted(domain.answerer(model), model if isinstance(model, PreTrainedModel) else None)


def base(name: str, domain: TextDomain, meter: Meter) -> Fitted:
    """One of the two models alone."""
    return _of(domain, getattr(domain, name))


def compose(
    domain: TextDomain,
    meter: Meter,
    augmenting: str = "augmenting",
    connector: str = "cross_attention",
    data: dict[str, Any] | None = None,
    **options: Any,
) -> Fitted:
    """A composition, trained on D_C.

    Args:
        domain: the experiment.
        meter: counts the training.
        augmenting: the base model that stands for m_A.
        connector: one of calmlm's.
        data: changes of D_C, as the experiment knows them.
        options: of `calmlm.compose`, instead of the experiment's.
    """
    stage = domain.stage
    model = domain.compose(domain.base(augmenting), connector, **options)
    count = stage.steps * stage.batch_size
    rows = domain.composition(count, "composition", **data) if data else domain.data.composition
    fit(model, rows, domain.tokenizer.pad_token_id, stage, domain.seed, meter=meter)
    return _of(domain, model)


def composed(domain: TextDomain, meter: Meter, connector: str = "cross_attention") -> Fitted:
    """The composition of m_A and m_B, whose tensors the experiment keeps for the control that trains nothing."""
    fitted = compose(domain, meter, connector=connector)
    assert fitted.model is not None
    tensors = fitted.model.composition_tensors()
    domain.trained[connector] = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
    return fitted


def swapped(domain: TextDomain, meter: Meter, connector: str = "cross_attention") -> Fitted:
    """The same composition, but m_A reads another item's prompt; nothing more is trained."""
    if connector not in domain.trained:  # its cell was made in another run: the same seed gives the same tensors
        composed(domain, Meter(), connector)
    model = domain.compose(domain.base("augmenting"), connector)
    model.load_state_dict(domain.trained[connector], strict=False)
    return _read_swapped(domain, model)


def swapped_trained(domain: TextDomain, meter: Meter) -> Fitted:
    """A composition whose m_A reads another item's prompt in training as well."""
    model = domain.compose(domain.base("augmenting"))
    fit_swapped(domain, model, meter)
    return _read_swapped(domain, model)


def _read_swapped(domain: TextDomain, model: Any) -> Fitted:
    made = Swapped(domain, model.eval())
    return Fitted(made, made)


def baseline(name: str, domain: TextDomain, meter: Meter) -> Fitted:
    """One of the rival systems."""
    model = BASELINES[name](domain.bases(twin=name in MERGING), domain.data, domain.budget(meter))
    return _of(domain, model)


def cascade(domain: TextDomain, meter: Meter) -> Fitted:
    """m_A's answer as text, then m_B; nothing is trained."""
    return Fitted(domain.cascade(), None)


METHODS: dict[str, Method] = {
    "m_A": Method("m_A alone", partial(base, "augmenting")),
    "m_B": Method("m_B alone", partial(base, "anchor")),
    "composed": Method("CALM", composed),
    "swapped": Method("CALM, m_A reads another prompt", swapped),
    "swapped_trained": Method("CALM, trained with other prompts", swapped_trained),
    "composed_random": Method("CALM, random m_A", partial(compose, augmenting="random")),
    "composed_vanilla": Method("CALM, vanilla m_A", partial(compose, augmenting="vanilla")),
    "composed_encoder": Method("CALM, m_A as encoder", partial(compose, refresh=False)),
    "fine_tuning": Method("Fine-tuning on D_C", partial(baseline, "fine_tuning")),
    "continued_pretraining": Method("Continued pre-training", partial(baseline, "continued_pretraining")),
    "lora": Method("LoRA on D_C", partial(baseline, "lora")),
    "lora_full_data": Method("LoRA on m_A's corpus", partial(baseline, "lora_full_data")),
    "soup": Method("Model soup", partial(baseline, "soup")),
    "soup_greedy": Method("Greedy soup", partial(baseline, "soup_greedy")),
    "fisher": Method("Fisher averaging", partial(baseline, "fisher")),
    "task_arithmetic": Method("Task arithmetic", partial(baseline, "task_arithmetic")),
    "ties": Method("TIES", partial(baseline, "ties")),
    "dare_ties": Method("DARE-TIES", partial(baseline, "dare_ties")),
    "moe": Method("Mixture of experts", partial(baseline, "moe")),
    "router": Method("Router", partial(baseline, "router")),
    "confidence_cascade": Method("Confidence cascade", partial(baseline, "confidence_cascade")),
    "text_tool": Method("Tool use as text", partial(baseline, "text_tool")),
    "cascade": Method("Cascade", cascade),
    "flamingo": Method("CALM, Flamingo connector", partial(compose, connector="flamingo")),
    "legonn": Method("CALM, LegoNN connector", partial(compose, connector="legonn")),
    "graft": Method("Graft", partial(composed, connector="graft")),
    "graft_random": Method("Graft, random m_A", partial(compose, augmenting="random", connector="graft")),
    "graft_swapped": Method("Graft, m_A reads another prompt", partial(swapped, connector="graft")),
    "composed_map": Method("CALM and map of words", partial(compose, words="map")),
    "composed_pointer": Method("CALM and pointer", partial(compose, words="pointer")),
    "pointer": Method("Pointer alone", partial(compose, connections="none", words="pointer")),
}
WITHOUT_PLAIN_TEXT = tuple(name for name in METHODS if name not in GRAFTS)
"""Those of calmlm's own experiments: what each of their models reads is all that there is."""
TITLES = {name: method.title for name, method in METHODS.items()}

REFERENCE = "reference"  # the composition on the seed of the ablations alone: a row, and no cell of its own

ABLATIONS: dict[str, Method] = {
    "connections=1": Method("one connection", partial(compose, connections=[(3, 0)])),
    "connections=4": Method("four connections", partial(compose, connections=[(3, 0), (3, 1), (3, 2), (3, 3)])),
    "connections=paper": Method("evenly spaced", partial(compose, connections=2)),
    "connections=late": Method("into the last two layers", partial(compose, connections=[(3, 2), (3, 3)])),
    "heads=1": Method("one head", partial(compose, num_heads=1)),
    "heads=16": Method("sixteen heads", partial(compose, num_heads=16)),
    "gate=on": Method("with a gate", partial(compose, gate=True)),
    "norm=off": Method("without norms", partial(compose, norm=False)),
    "rotary=off": Method("without rotary positions and bias", partial(compose, rotary=False, query_key_bias=None)),
    "null_key=off": Method("without a null key", partial(compose, null_key=False)),
    "rank=16": Method("projections of rank 16", partial(compose, rank=16)),
    "share=0.05": Method("D_C over 5 % of the keys", partial(compose, data={"share": 0.05})),
    "share=0.1": Method("D_C over 10 % of the keys", partial(compose, data={"share": 0.1})),
    "reading=subs": Method("D_C of KV-SUBS", partial(compose, data={"substitutes": True})),
}
"""Changes of one thing at a time, on key-value arithmetic."""
