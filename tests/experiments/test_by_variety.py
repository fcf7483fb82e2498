"""Translation by variety: scores from counts, means and intervals, who is above whom, the page and its picture."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import pytest
from sacrebleu.metrics import BLEU, CHRF

from calmlm.experiments.real.by_variety import Written, compare, estimated, goals, page
from calmlm.experiments.real.picture import draw
from calmlm.experiments.real.presets import BaseModel, Method, Settings, Varieties, load_settings
from calmlm.experiments.real.report import write_report
from calmlm.experiments.real.sentence_counts import corpus, counted
from documents import ROOT

VARIETIES = Varieties(["xx_Latn", "yy_Latn"], [], ["zz_Latn"])
METHODS = {
    "m_B": Method("m_B", "m_B"),
    "m_B_examples": Method("m_B, examples", "m_B", examples=True),
    "m_A": Method("m_A", "m_A"),
    "lora": Method("LoRA", "lora", steps=1, learning_rate=1.0),
    "ours": Method("Ours", "composed", compose={"words": "map"}, steps=1, learning_rate=1.0),
}
SETTINGS = Settings("by", BaseModel("b"), BaseModel("a"), "d", VARIETIES, METHODS, headline="ours", written=3, items=3)
WANTED = ["the river reads a small letter", "many old houses stand here in winter", "he wrote about it twice"]


def blurred(text: str, share: float, seed: int) -> str:
    """A text of which some words are replaced."""
    chance = random.Random(f"{text} {seed}")
    return " ".join("xyz" if chance.random() < share else word for word in text.split())


def cell(shares: tuple[float, float], seed: int = 0, nats: float = 9.0, gain: float | None = None) -> dict[str, Any]:
    """What is stored of a method that gets so many words of either variety wrong."""
    written = [blurred(text, share, seed) for share in shares for text in WANTED]
    found = {"written": written, "scores": counted(written, WANTED * 2), "nats": [nats] * 9, "english_nats": [1.0]}
    swapped = None if gain is None else [nats + gain] * 3 + [nats + 2 * gain] * 6
    sizes = {"tested": [10] * 9, "english": [10]}
    found |= {"varieties": [v for v in VARIETIES.all for _ in range(3)], "swapped_nats": swapped, "sizes": sizes}
    machine = {"processor": "p", "cores": 1, "threads": 1, "device": "cpu"}
    return found | {"commit": "c0ffee00", "versions": {}, "machine": machine, "left_out": 0, "seconds": 1.0}


CELLS = {
    "m_B": {"0": cell((0.9, 0.6), gain=0.1)},
    "m_B_examples": {"0": cell((1.0, 0.3))},
    "m_A": {"0": cell((0.5, 0.5), gain=2.0)},
    "lora": {"0": cell((0.7, 0.7), 1), "1": cell((0.7, 0.7), 2)},
    "ours": {"0": cell((0.1, 0.4), 3, gain=1.0), "1": cell((0.2, 0.4), 4, gain=1.5)},
}


def test_scores_from_counts_are_sacrebleus() -> None:
    written = [blurred(text, 0.4, 5) for text in WANTED] + ["", "a sentence with a stop ."]
    wanted = [*WANTED, "nothing", "A sentence with a stop."]
    counts = counted(written, wanted)
    assert corpus("chrf", counts["chrf"]) == pytest.approx(CHRF().corpus_score(written, [wanted]).score)
    assert corpus("bleu", counts["bleu"]) == pytest.approx(BLEU().corpus_score(written, [wanted]).score)
    some = [1, 3, 4, 4]  # in any combination
    texts, targets = [written[i] for i in some], [wanted[i] for i in some]
    assert corpus("chrf", [counts["chrf"][i] for i in some]) == pytest.approx(
        CHRF().corpus_score(texts, [targets]).score
    )
    assert corpus("bleu", [counts["bleu"][i] for i in some]) == pytest.approx(
        BLEU().corpus_score(texts, [targets]).score
    )


def test_a_variety_is_scored_by_itself_and_over_seeds() -> None:
    found = Written(CELLS["ours"], VARIETIES.inside)
    texts = [cell["written"][3:] for cell in CELLS["ours"].values()]
    by_hand = [CHRF().corpus_score(written, [WANTED]).score for written in texts]
    assert found.score("chrf", "yy_Latn") == pytest.approx(sum(by_hand) / 2)
    assert found.mean("chrf", VARIETIES.inside) == pytest.approx(
        (found.score("chrf", "xx_Latn") + found.score("chrf", "yy_Latn")) / 2
    )


def test_intervals_hold_the_mean_and_differences_are_paired() -> None:
    ours, lora = Written(CELLS["ours"], VARIETIES.inside), Written(CELLS["lora"], VARIETIES.inside)
    one = estimated("chrf", VARIETIES.inside, ours)
    assert one.low < one.mean < one.high
    assert estimated("chrf", VARIETIES.inside, ours, ours).mean == 0.0
    same = Written({"0": CELLS["ours"]["0"]}, VARIETIES.inside)
    found = estimated("chrf", VARIETIES.inside, same, same)  # the same sentences are drawn for both
    assert (found.low, found.high) == (0.0, 0.0)
    gap = estimated("chrf", VARIETIES.inside, ours, lora)
    assert gap.mean == pytest.approx(one.mean - lora.mean("chrf", VARIETIES.inside))


def test_who_is_above_whom_where_there_is_something_to_communicate() -> None:
    found = compare(SETTINGS, CELLS)
    assert found["varieties"] == VARIETIES.inside
    # m_A gains 2 nats of 10 bytes in the first variety and 4 in the second, m_B 0.1 and 0.2.
    assert found["to_communicate"]["xx_Latn"] == pytest.approx(1.9 / 10 / 0.6931, rel=1e-3)
    assert found["known"] == VARIETIES.inside
    chrf = {name: row["chrf"] for name, row in found["methods"].items()}
    for name, row in found["methods"].items():
        m_b = {v: max(chrf["m_B"][v], chrf["m_B_examples"][v]) for v in VARIETIES.inside}
        above = {
            "m_B": sum(chrf[name][v] > m_b[v] for v in m_b),
            "m_A": sum(chrf[name][v] > chrf["m_A"][v] for v in m_b),
            "both": sum(chrf[name][v] > max(m_b[v], chrf["m_A"][v]) for v in m_b),
            "LoRA": sum(chrf[name][v] > chrf["lora"][v] for v in m_b),
        }
        assert row["above"] == above
    ours = found["methods"]["ours"]
    assert ours["above"]["m_A"] == 2
    assert ours["gain_all"].mean == pytest.approx((1.25 * 3 + 2.5 * 3) / 60 / 0.6931, rel=1e-3)
    assert "gain_all" not in found["methods"]["lora"]
    few = compare(dataclasses.replace(SETTINGS), {"ours": CELLS["ours"]})
    assert few["to_communicate"] == {}
    assert few["methods"]["ours"]["above"] == {}
    without = compare(SETTINGS, {name: found for name, found in CELLS.items() if name != "m_B_examples"})
    assert set(without["methods"]["ours"]["above"]) == {"m_A", "LoRA"}, (
        "the better one of two rows, of which one is missing"
    )
    without = {name: {"0": {**found["0"], "scores": None}} for name, found in CELLS.items()}
    for by_seed in without.values():  # cells that were stored before they held counts
        del by_seed["0"]["scores"]
    assert compare(SETTINGS, without)["methods"] == {}


@pytest.mark.parametrize("guided_share", [0.5, 0.95])
def test_what_is_written_with_guidance_is_compared_with_the_better_lora(guided_share: float) -> None:
    guided = {name: Method("Guided", METHODS[name].system, of=name, guidance=1.5) for name in ("lora", "ours")}
    methods = METHODS | {f"{name}_guided": method for name, method in guided.items()}
    cells = CELLS | {"ours_guided": {"0": cell((0.0, 0.1))}, "lora_guided": {"0": cell((guided_share,) * 2, 1)}}
    found = compare(dataclasses.replace(SETTINGS, methods=methods), cells)["methods"]
    better = "lora_guided" if guided_share < 0.7 else "lora"

    def above(name: str, lora: str) -> float:
        return float(found[name]["chrf_all"].mean - found[lora]["chrf_all"].mean)

    assert found["ours_guided"]["above_lora_all"].mean == pytest.approx(above("ours_guided", better))
    assert found["ours"]["above_lora_all"].mean == pytest.approx(above("ours", "lora"))
    assert found["lora_guided"]["above_lora_all"].mean == pytest.approx(above("lora_guided", "lora"))


def test_goals_and_page_name_the_headline(tmp_path: Path) -> None:
    found = compare(SETTINGS, CELLS)
    lines = goals(SETTINGS, found)
    assert lines[
        0
    ] == f"- `ours` above m_B, varieties of 2: {found['methods']['ours']['above']['m_B']}, asked for 2: " + (
        "reached;" if found["methods"]["ours"]["above"]["m_B"] == 2 else "**not reached**;"
    )
    text = page(SETTINGS, found, "plot.png")
    assert "| Ours (2 seeds) |" in text
    assert "![chrF above m_B, by what there is to communicate](plot.png)" in text
    rows = [line for line in text.splitlines() if line.startswith(("| xx", "| yy", "| zz"))]
    assert [row[2:4] for row in rows] == ["yy", "xx"]  # what m_A knows best first
    assert goals(SETTINGS, compare(SETTINGS, {"lora": CELLS["lora"]})) == []


def test_beside_the_headline_stands_lora_with_the_same_pairs() -> None:
    more = Method("LoRA, more", "lora", pairs=5, steps=1, learning_rate=1.0)
    methods = {**METHODS, "lora_more": more, "ours": dataclasses.replace(METHODS["ours"], pairs=5)}
    settings = dataclasses.replace(SETTINGS, methods=methods)
    text = page(settings, compare(settings, {**CELLS, "lora_more": CELLS["lora"]}), None)
    assert "| | gain | m_B | m_B, examples | m_A | LoRA, more | Ours |" in text


def test_the_picture_needs_its_figures(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    assert draw(SETTINGS, compare(SETTINGS, {"lora": CELLS["lora"]}), path) is None
    assert draw(SETTINGS, compare(SETTINGS, CELLS), path) == path
    assert path.read_bytes().startswith(b"\x89PNG")


def test_the_report_has_a_page_by_varieties(tmp_path: Path) -> None:
    result = {"rows": {}, "seeds": [0, 1]}
    names = [path.name for path in write_report(SETTINGS, result, CELLS, tmp_path)]
    assert names == ["by.json", "by.md", "by-by-variety.md", "by-by-variety.png"]
    assert all((tmp_path / name).is_file() for name in names)
    plain = dataclasses.replace(SETTINGS, headline="")
    assert [path.name for path in write_report(plain, result, CELLS, tmp_path)] == ["by.json", "by.md"]


def test_the_committed_file_asks_for_every_rival() -> None:
    settings = load_settings(ROOT / "configs" / "real" / "varieties.yaml")
    assert len(settings.varieties.inside) == 40
    assert {"m_A", "m_B", "cascade", "router", "ensemble", "lora", "full", "composed"} == {
        method.system for method in settings.methods.values()
    }
    assert settings.methods["random"].compose == settings.methods["composed"].compose
    assert settings.methods["swapped"].compose == settings.methods["composed"].compose
    assert settings.pairs <= 2500
