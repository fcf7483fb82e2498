"""Two machines, which here are two network namespaces with a cable between them: they train together and go on."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import calmlm

SCRIPT = """
set -eu
ip link set lo up
unshare --net sleep 600 & other=$!
trap 'kill $other' EXIT
for _ in $(seq 100); do
    [ "$(readlink /proc/$other/ns/net)" != "$(readlink /proc/self/ns/net)" ] && break
    sleep 0.05
done
there() { nsenter --net --target $other -- "$@"; }
ip link add cable0 type veth peer name cable1 netns $other
ip addr add 10.77.0.1/24 dev cable0
ip link set cable0 up
there ip link set lo up
there ip addr add 10.77.0.2/24 dev cable1
there ip link set cable1 up
go() {
    there env GLOO_SOCKET_IFNAME=cable1 "$@" --node-rank 1 "${job[@]}" > "$log.1" 2>&1 & second=$!
    status=0
    env GLOO_SOCKET_IFNAME=cable0 "$@" --node-rank 0 "${job[@]}" > "$log.0" 2>&1 || status=$?
    wait $second || status=$?
    return $status
}
"""
BOTH = ["unshare", "--user", "--map-root-user", "--net"]


def reason_against() -> str:
    """Why there can be no second host here, or nothing."""
    for tool in ("unshare", "nsenter", "ip", "bash"):
        if shutil.which(tool) is None:
            return f"{tool} is not installed"
    tried = subprocess.run(
        [*BOTH, "bash", "-c", f"log=/dev/null; {SCRIPT}"], capture_output=True, text=True, timeout=60
    )
    return "" if tried.returncode == 0 else f"no network namespaces here: {tried.stderr.strip()[-200:]}"


@pytest.mark.slow
def test_two_hosts_train_and_go_on(settings: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    reason = reason_against()
    if reason:
        pytest.skip(reason)
    values = settings(max_steps=2, save_steps=1, per_device_train_batch_size=2, lr_scheduler_type="constant")
    config, output = tmp_path / "run.yaml", Path(values["output"])
    config.write_text(yaml.safe_dump(values), encoding="utf-8")
    paths = os.pathsep.join([str(Path(calmlm.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    start = f"{sys.executable} -m torch.distributed.run --nnodes 2 --nproc-per-node 1 --master-addr 10.77.0.1"

    def go(*more: str) -> None:
        job = " ".join(["-m", "calmlm.cli", "train", str(config), *more])
        script = f"log={tmp_path}/log; job=({job}); {SCRIPT}\ngo {start} --master-port 29501"
        done = subprocess.run(
            [*BOTH, "bash", "-c", script],
            env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=280,
        )
        said = [
            (tmp_path / f"log.{host}").read_text()[-2000:] for host in (0, 1) if (tmp_path / f"log.{host}").is_file()
        ]
        assert done.returncode == 0, "\n".join([done.stderr, *said])

    def state() -> dict[str, Any]:
        found: dict[str, Any] = json.loads((output / "checkpoints/checkpoint-2/trainer_state.json").read_text())
        return found

    go()
    whole, losses = load_file(output / "composition/model.safetensors"), state()["log_history"]
    assert {path.name for path in (output / "checkpoints/checkpoint-1").glob("rng_state*")} == {
        "rng_state_0.pth",
        "rng_state_1.pth",
    }
    shutil.rmtree(output / "checkpoints/checkpoint-2")
    shutil.rmtree(output / "composition")
    go("--resume")
    assert "checkpoint-1" in (tmp_path / "log.1").read_text(), "both go on from there"
    again = load_file(output / "composition/model.safetensors")
    for name, tensor in whole.items():
        torch.testing.assert_close(again[name], tensor)
    assert state()["global_step"] == 2
    assert [entry.get("loss") for entry in state()["log_history"]] == [entry.get("loss") for entry in losses]
