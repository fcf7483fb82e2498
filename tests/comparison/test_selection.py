"""Reading a comparison: faults are found before anything is trained."""

from __future__ import annotations

from pathlib import Path

import pytest

from calmlm.comparison.contract import GRAFTS
from calmlm.comparison.methods import ABLATIONS, METHODS
from calmlm.comparison.selection import load_config
from calmlm.errors import ConfigError

SMALL = Path(__file__).parents[2] / "configs" / "compare" / "small.yaml"


def written(folder: Path, text: str) -> Path:
    path = folder / "c.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_shipped_comparison_has_every_method() -> None:
    config = load_config(SMALL)
    cells = config.cells()
    assert {(c.domain, c.seed) for c in cells if c.method == "composed"} == {
        *(("kv_arithmetic", seed) for seed in (0, 1, 2)),
        *((domain, seed) for domain in ("languages", "code") for seed in (0, 1)),
        *(("visual", seed) for seed in (0, 1, 2)),
    }
    for domain in ("kv_arithmetic", "languages", "code"):
        assert {c.method for c in cells if c.domain == domain} >= set(METHODS) - set(GRAFTS)
    assert {c.method for c in cells if c.domain == "kv_arithmetic"} == {*METHODS, *ABLATIONS} - set(GRAFTS)
    assert len({c.path(Path("x")) for c in cells}) == len(cells)
    assert not {c.path(Path("x")) for c in cells} & {c.path(Path("x")) for c in load_config(SMALL, "tiny").cells()}


@pytest.mark.parametrize(
    ("text", "mentions"),
    [
        ("domains: {}", ["at least one experiment"]),
        ("domains: {kv_arithmetic: {seeds: [0, 0]}}", ["each once"]),
        ("domains: {kv_arithmetic: {seeds: [0], methods: [lorra]}}", ["lorra", "lora"]),
        ("domains: {kv_arithmetic: {seeds: [0], ablations: [heads=3]}}", ["heads=3"]),
        ("domains: {visual: {seeds: [0], methods: [lora]}}", ["lora", "composed_random"]),
        ("domains: {code: {seeds: [0], methods: [graft]}}", ["graft", "composed_random"]),
        ("domains: {code: {seeds: [0], ablations: [heads=1]}}", ["kv_arithmetic only"]),
        ("domains: {karaoke: {seeds: [0]}}", ["karaoke"]),
        ("domains: {code: {seeds: [0]}}\npreset: vast", ["vast"]),
        ("domains: {code: {seeds: [0]}}\nworkers: 0", ["workers"]),
        ("domains: {code: {seed: [0]}}", ["seed"]),
        ("domains: {code: {seeds: [0]}}\nparts: {}", ["parts"]),
        ("domain: {}", ["domain"]),
        ("domains: {code: {seeds: [0], methods: []}}", ["leave the key out"]),
        ("domains: {code: {seeds: [0], methods: [m_B, m_B]}}", ["m_B twice"]),
        ("domains: {code: {seeds: [-1]}}", ["from 0"]),
        ("domains: {code: {seeds: [0]}}\noutput: ''", ["output", "empty"]),
        ("preset: [", ["YAML"]),
        ("domains: {kv_arithmetic: {seeds: [0], methods: [x]}, code: {seeds: []}}", ["'x'|x", "seed"]),
    ],
)
def test_faults_are_named(tmp_path: Path, text: str, mentions: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(written(tmp_path, text))
    for mention in mentions:
        assert any(part in str(caught.value) for part in mention.split("|"))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="check the path"):
        load_config(tmp_path / "none.yaml")
