"""The report says by itself what it was held to and where it falls short."""

from __future__ import annotations

from calmlm.experiments.kv_arithmetic.report import goals


def cells(**means: float) -> dict[tuple[str, str], dict[str, float]]:
    """Rows by method and column, from names such as ``composed__ood``."""
    return {tuple(name.split("__")): {"mean": mean} for name, mean in means.items()}  # type: ignore[misc]


def test_a_goal_that_is_missed_says_by_how_much() -> None:
    lines = goals(cells(composed__key_value=90.0, composed__ood=77.75, cascade__ood=100.0, composed_random__ood=30.5))
    assert lines == [
        "- at least 90 on Key-Value: 90.0 against 90.0, reached;",
        "- within 2 points of the cascade on Keys arithmetic (OOD): 77.8 against 100.0, "
        "**not reached, 20.2 points short**;",
        "- a random m_A at most 25 in every column with keys: 30.5, **not reached, 5.5 points over**.",
    ]


def test_goals_above_their_bound_are_reached() -> None:
    lines = goals(cells(composed__numeric=98.0, m_B__numeric=100.0, composed_random__key_value=25.0))
    assert [line.endswith(("reached;", "reached.")) for line in lines] == [True, True]
