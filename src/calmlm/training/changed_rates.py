"""Rates that are changed when a run goes on: a checkpoint alone would bring back those that it was written with."""

from __future__ import annotations

from typing import Any

from calmlm.errors import ConfigError

__all__ = ["let_hold", "settings_of"]

SETTINGS = ("weight_decay", "betas", "eps")
"""Entries of an optimizer's groups that settings decide and no step changes; the learning rate is the schedule's."""


def settings_of(optimizer: Any) -> list[dict[str, Any]]:
    """What each group of an optimizer is made with."""
    return [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]


def let_hold(made: list[dict[str, Any]], optimizer: Any, schedule: Any, before: float | None, now: float) -> None:
    """Let the settings of now hold for an optimizer and a schedule that have taken up the state of a checkpoint.

    Args:
        made: what the optimizer was made with, see ``settings_of``.
        optimizer: of the run.
        schedule: of its learning rate.
        before: the learning rate that the checkpoint's run was given; None where nobody knows.
        now: the learning rate that this run is given.

    Raises:
        ConfigError: the checkpoint's optimizer is of another kind.
    """
    groups = optimizer.param_groups
    if any(own.keys() - group.keys() for group, own in zip(groups, made, strict=True)):
        raise ConfigError(
            "--resume: expected the optimizer that the checkpoint was written with, but trainer.optim asks for another "
            "one; take that back, or start anew from that checkpoint as model.composition."
        )
    for group, own in zip(groups, made, strict=True):
        group.update({key: own[key] for key in SETTINGS if key in own})
    rates = [own.get("initial_lr", own["lr"]) for own in made]
    factors = getattr(schedule, "lr_lambdas", None)  # of the rate at the start, by the step
    if factors is not None:  # the schedule may be another one, too: over more steps, say
        found = [rate * factor(schedule.last_epoch) for rate, factor in zip(rates, factors, strict=True)]
        if schedule.base_lrs == rates and found == [group["lr"] for group in groups]:
            return
        more = {"base_lrs": rates}
    elif before not in (None, now, 0.0):
        found, more = [group["lr"] * now / before for group in groups], {}
    else:
        return
    for group, rate, current in zip(groups, rates, found, strict=True):
        group |= {"lr": current} | ({"initial_lr": rate} if "initial_lr" in group else {})
    schedule.load_state_dict({**schedule.state_dict(), **more, "_last_lr": found})
