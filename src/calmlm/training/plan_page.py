"""A plan as people read it."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from calmlm.training.plan import GPUS, USED, Plan

__all__ = ["EXAMPLES", "as_dict", "show"]

EXAMPLES = (10_000, 100_000, 1_000_000)


def as_dict(plan: Plan, gpu: str) -> dict[str, object]:
    """All figures of a plan, for JSON."""
    speed = GPUS[gpu][0]
    return {
        "parameters": {
            "anchor": plan.anchor.parameters,
            **{name: base.parameters for name, base in plan.augmenting.items()},
            "trained": plan.trained,
        },
        "connections": {name: [list(pair) for pair in part.pairs] for name, part in plan.parts.items()},
        "bytes_per_device": plan.memory,
        "step_flops": {
            "composition": plan.step(),
            "composition, warm cache": plan.step(cached=True),
            "full fine-tuning of the anchor": plan.full_fine_tuning,
        },
        "cache_bytes": {str(count): plan.cache(count) for count in EXAMPLES},
        "seconds_per_epoch": {
            str(count): {"cold": plan.seconds(count, speed), "warm": plan.seconds(count, speed, cached=True)}
            for count in EXAMPLES
        },
        "gpu": gpu,
        "devices": plan.devices,
        "texts": vars(plan.texts),
    }


def show(plan: Plan, gpu: str, console: Console) -> None:
    """Print a plan."""
    speed, room = GPUS[gpu]
    names = {"anchor": plan.anchor, **plan.augmenting}
    table = Table("", "parameters", "layers", "width")
    for name, base in names.items():
        table.add_row(Text(f"{name}: {base.name}"), f"{base.parameters:,}", str(len(base.linear)), f"{base.size:,}")
    table.add_row("trained", f"{plan.trained:,}", "", "")
    console.print(table)
    for name, part in plan.parts.items():
        pairs = ", ".join(f"{i} to {j}" for i, j in part.pairs) or "none"
        console.print(f"Connections of {name}, layers counted from 0: {pairs}.", highlight=False)
    texts = plan.texts
    table = Table("a step on one device", "operations", "of full fine-tuning", title_justify="left")
    table.title = f"{texts.rows} examples of {texts.length} tokens, {texts.labelled} of them learned"
    for what, flops in (
        ("composition", plan.step()),
        ("with a warm activation cache", plan.step(cached=True)),
        ("full fine-tuning of the anchor", plan.full_fine_tuning),
    ):
        table.add_row(what, f"{flops:.2e}", f"{flops / plan.full_fine_tuning:.2f}")
    console.print(table)
    total = sum(plan.memory.values())
    fits = "" if total <= room else f" [red]more than a {gpu} has: spread the models over more devices[/red]"
    table = Table("memory of a device, estimated", "GiB", caption=f"{total / 2**30:.1f} GiB in all{fits}")
    for what, size in plan.memory.items():
        table.add_row(what, f"{size / 2**30:.2f}")
    console.print(table)
    table = Table("D_C", "activation cache", "first epoch", "later ones", title_justify="left")
    table.title = f"One {gpu} at {USED:.0%} of {speed:.0e} operations a second"
    for count in EXAMPLES:
        times = (plan.seconds(count, speed, cached=cached) for cached in (False, True))
        table.add_row(f"{count:,}", f"{plan.cache(count) / 2**30:,.1f} GiB", *map(_time, times))
    console.print(table)


def _time(seconds: float) -> str:
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"
