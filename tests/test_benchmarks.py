"""The benchmarks run, and what does not hang on the clock holds; the committed figures reach what they are meant to."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def run(script: str, tmp_path: Path, *options: str, rounds: str = "--rounds 1") -> dict[str, Any]:
    output = tmp_path / "result.json"
    command = [sys.executable, str(BENCHMARKS / script), *rounds.split(), "--output", str(output), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == json.loads(output.read_text(encoding="utf-8"))
    return json.loads(output.read_text(encoding="utf-8"))


@pytest.mark.slow
def test_decode(tmp_path: Path) -> None:
    options = "--models random words --batches 1 --prompts 16 --modes eager --threads 1"
    found = run("decode.py", tmp_path, *options.split())
    plain, drafted = found["cases"]
    assert plain["tokens_match"] and drafted["tokens_match"]
    assert (plain["drafting"], drafted["drafting"]) == (False, True)
    assert plain["flops_x_floor_without_connections"] <= 1.03
    assert 1 < plain["flops_x_floor"] < 1.2
    assert 0 <= drafted["acceptance"] <= 1
    assert found["prefill"][0]["peak_x_floor"] <= 1.2
    words = {case["words"]: case["flops_x_without"] for case in found["words"]}
    assert 1 < words["map"] <= 1.02 and words["map"] < words["pointer"]


@pytest.mark.slow
def test_alignment(tmp_path: Path) -> None:
    assert all(case["match"] for case in run("alignment.py", tmp_path)["cases"])


@pytest.mark.slow
def test_serve(tmp_path: Path) -> None:
    found = run("serve.py", tmp_path, *"--clients 4 --seconds 2 --prompts 3".split(), rounds="")
    assert (found["clients"], found["wrong"], found["lost"]) == (4, 0, 0)
    assert found["throughput_x_sequential"] > 0 and found["throughput_x_anchor"] > 0
    assert 0 < found["p50_s"] <= found["p95_s"]


REAL = [
    BENCHMARKS.parent / "models" / "smollm2-135m-instruct" / "SmolLM2-135M-Instruct.Q4_1.gguf",
    BENCHMARKS.parent / "models" / "gemma-3-270m" / "gemma-3-270m-q4_k_m.gguf",
]


@pytest.mark.slow
@pytest.mark.skipif(
    not all(path.is_file() for path in REAL), reason="the real models are not in models/: run scripts/models"
)
def test_real(tmp_path: Path) -> None:
    found = run("real.py", tmp_path, *"--batch 2 --new 6".split())
    assert {case["what"] for case in found["cases"]} == {"training step", "prefill", "decoding"}
    steps = [case for case in found["cases"] if case["what"] == "decoding" and case["alignment"] == "own"]
    assert all(0 < case["augmenting_tokens_per_step"] < 4 for case in steps)
    trained = f"pointer={BENCHMARKS.parent}/src/calmlm/demo/translation/composition"
    options = f"--alignments --compositions {trained} --what decoding --modes eager merged --batch 2 --new 6"
    cases = run("real.py", tmp_path, *options.split())["cases"]
    assert [case["mode"] for case in cases] == ["eager", "eager", "merged", "merged"]


@pytest.mark.slow
def test_quality(tmp_path: Path) -> None:
    options = f"--experiment keys --preset tiny --steps 2 --items 2 --seeds 0 --threads 1 --folder {tmp_path}/runs"
    found = run("quality.py", tmp_path, *options.split(), rounds="")
    assert {row["method"] for row in found["keys"]} == {"plain", "saving", "even", "top"}
    cells = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("runs/keys/*/seed-0/*.json")}
    plain, saving = (cells[name]["losses"] for name in ("plain", "saving"))
    assert plain[0][1] == pytest.approx(saving[0][1], abs=1e-4) and len(plain) == len(saving) == 2
    # Another machine has no trainings: what is known stays.
    again = options.replace("--seeds 0", "--seeds 1 --stored-only").replace(f"{tmp_path}/runs", f"{tmp_path}/none")
    kept = run("quality.py", tmp_path, *again.split(), rounds="")
    assert kept["keys"] == found["keys"] and len(kept["origins"]) == len(found["origins"]) + 1


@pytest.mark.slow
def test_train(tmp_path: Path) -> None:
    found = run("train.py", tmp_path, *"--models tiny --batch 2 --threads 1 --no-compiled".split())
    ours = [case for case in found["cases"] if case["method"] == "calmlm"]
    assert {(case["placement"], case["cache"]) for case in ours} == {
        (placement, cache) for placement in ("even", "top") for cache in ("off", "warm")
    }
    counted = [case for case in ours if case["checkpointing"] != "nothing"]
    assert all(1 <= case["flops_x_limit"] <= found["goals"]["flops_x_limit"] for case in counted)
    saved = {(case["placement"], case["cache"], case["checkpointing"]): case["saved_mib"] for case in ours}
    for placement in ("even", "top"):
        every, some, none = (saved[placement, "off", kept] for kept in (None, "matmuls", "nothing"))
        assert every > some > none
    peaks = {(case["loss"], case["length"]): case["peak_mib"] for case in found["memory"]}
    assert peaks["full", 256] > 3 * peaks["full", 64]
    for loss in ("trainer", "sft"):
        assert peaks[loss, 256] < 1.2 * peaks[loss, 64]


def test_committed_results_of_training() -> None:
    path = BENCHMARKS / "results" / "train_cpu.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    ours = [case for case in found["cases"] if case["method"] == "calmlm" and case["checkpointing"] != "nothing"]
    assert {case["models"] for case in ours} == {"tiny", "real"}
    assert all(case["flops_x_limit"] <= found["goals"]["flops_x_limit"] for case in ours if not case["compiled"])
    both = {(case["models"], case["placement"]): case for case in ours if case["compiled"] and case["checkpointing"]}
    goals = found["goals"]
    assert both.keys() == {(models, placement) for models in ("tiny", "real") for placement in ("even", "top")}
    assert all(both["tiny", key]["saved_mib"] <= goals["saved_mib"][key] for key in ("even", "top"))
    assert all(both["real", key]["time_x_floor"] <= goals["time_x_floor"][key] for key in ("even", "top"))


def test_committed_results_of_decoding() -> None:
    path = BENCHMARKS / "results" / "decode_cpu.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    cases, goals = found["cases"], found["goals"]
    assert all(case["tokens_match"] for case in cases)
    first = next(c for c in cases if (c["batch"], c["prompt"], c["mode"], c["drafting"]) == (1, 64, "eager", False))
    assert first["time_x_floor"] <= goals["time_x_floor"]
    assert first["flops_x_floor_without_connections"] <= goals["flops_x_floor_without_connections"]
    long = next(case for case in found["prefill"] if (case["batch"], case["prompt"]) == (1, 512))
    assert long["time_x_floor"] <= goals["prefill_time_x_floor"]
    assert long["peak_x_floor"] <= goals["prefill_peak_x_floor"]
    known = next(case for case in cases if case["models"] == "known" and case["drafting"])
    assert known["speed_x_anchor"] >= goals["drafting_speed_x_anchor"]
