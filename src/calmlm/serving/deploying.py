"""Replicas on a Ray cluster, from their start to their end; nothing of them is left running behind it."""

from __future__ import annotations

import io
import logging
import os
import re
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from typing import Any

import grpc
import ray
from ray import serve
from ray.serve.config import ProxyLocation
from ray.serve.schema import ApplicationStatus, LoggingConfig

from calmlm.errors import CalmError, ConfigError, first_line
from calmlm.serving.fleet import Fleet
from calmlm.serving.replicas import Lease, Models, Replica

DEPLOYMENT = "replica"
REACH = 10  # seconds in which a cluster has to answer
POLL = 0.2  # seconds between two looks at Serve's status


@contextmanager
def deployed(
    models: Models, replicas: int, address: str | None, hidden: str | None, report: Callable[[str], None]
) -> Iterator[Fleet]:
    """Replicas that have all loaded their models; they are ended behind it.

    Args:
        models: what each loads.
        replicas: how many.
        address: of a Ray cluster on one of whose machines this runs; None starts one on this machine.
        hidden: name of an environment variable that Ray's processes may not see, or None.
        report: takes lines.

    Raises:
        CalmError: a replica cannot load the models.
        ConfigError: there is no such cluster.
    """
    with _cluster(address, replicas, hidden):
        name, found = f"calmlm-{secrets.token_hex(4)}", _serve_runs()
        try:
            handle = _deploy(models, replicas, address is None, name)
            _wait(name, report)
            limits = handle.limits.remote().result()
            yield Fleet(handle, limits, replicas, models.max_batch + models.max_queue, lambda: _running(name))
        finally:
            if address is not None:  # or else the cluster ends with all that is in it
                with suppress(Exception), _silence():  # a cluster that is gone has nothing left to end
                    serve.delete(name)
                    if not found and not serve.status().applications:
                        serve.shutdown()


@contextmanager
def _cluster(address: str | None, replicas: int, hidden: str | None) -> Iterator[None]:
    """A connection to a cluster; a local one is started, and ended, where none is named."""
    if address is not None and address.startswith("ray://"):
        raise ConfigError(
            "--ray-address must be that of a cluster on one of whose machines the server runs, but a client's address "
            "(ray://) was given: run the server there with --ray-address auto."
        )
    local: dict[str, Any] = {}
    if address is not None:
        _check_reached(address)
    else:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        cores = max(os.cpu_count() or 1, replicas)
        local = {"num_cpus": cores, "include_dashboard": False, "object_store_memory": 2**27}
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    try:
        with _unseen(hidden):
            ray.init(address=address or "local", log_to_driver=False, logging_level="error", **local)
    except Exception as error:  # Ray raises different errors, depending on what is not there
        raise _unreachable(address, first_line(error)) from error
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _leave)  # Ray's own handler aborts the process
    try:
        yield
    finally:
        with _silence():
            ray.shutdown()


def _leave(number: int, _frame: Any) -> None:
    """End in the middle of a start, and whatever was begun with it."""
    sys.exit(128 + number)


def _check_reached(address: str) -> None:
    """Ask a cluster whether it is there and lets us in; Ray itself would go on trying for minutes.

    Raises:
        ConfigError: it does not answer, or asks for a token.
    """
    if not address.rpartition(":")[2].isdecimal() or os.environ.get("RAY_USE_TLS", "0") != "0":
        return
    with grpc.insecure_channel(address) as channel:
        try:
            channel.unary_unary("/grpc.health.v1.Health/Check")(b"", timeout=REACH, wait_for_ready=True)
        except grpc.RpcError as error:
            raise _unreachable(address, f"no answer within {REACH} s") from error
        if os.environ.get("RAY_AUTH_MODE", "").lower() == "token":
            return
        try:
            channel.unary_unary("/ray.rpc.NodeInfoGcsService/GetClusterId")(b"", timeout=REACH)
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.UNAUTHENTICATED:
                raise _unreachable(address, "it asks for a token: set RAY_AUTH_MODE=token") from error


def _unreachable(address: str | None, why: str) -> ConfigError:
    if address is None:
        return ConfigError(f"--replicas needs Ray on this machine, but it does not start ({why}): see /tmp/ray.")
    return ConfigError(
        f"--ray-address must name a Ray cluster that can be reached, but {address!r} cannot ({why}): check it, or "
        f"leave it out for replicas on this machine."
    )


@contextmanager
def _unseen(hidden: str | None) -> Iterator[None]:
    """Without a variable of the environment, which processes inherit, and without the command, which Ray shows."""
    kept = None if hidden is None else os.environ.pop(hidden, None)
    known = ray._private.utils.get_entrypoint_name
    ray._private.utils.get_entrypoint_name = lambda: "calmlm serve"
    try:
        yield
    finally:
        ray._private.utils.get_entrypoint_name = known
        if hidden is not None and kept is not None:
            os.environ[hidden] = kept


def _silence() -> redirect_stdout[io.StringIO]:
    """Without what Ray prints of calls that end with Serve or with itself."""
    return redirect_stdout(io.StringIO())


def _serve_runs() -> bool:
    """Whether somebody has started Serve on the cluster."""
    try:
        ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
    except ValueError:
        return False
    return True


def _deploy(models: Models, replicas: int, alone: bool, name: str) -> Any:
    quiet = LoggingConfig(log_level="ERROR", enable_access_log=False)
    serve.start(proxy_location=ProxyLocation.Disabled, logging_config=quiet)
    # On a cluster, Serve would keep the replicas when this process is killed.
    lease = None if alone else ray.remote(num_cpus=0, max_restarts=-1)(Lease).remote()
    room = replicas * (models.max_batch + models.max_queue)
    app = serve.deployment(
        Replica,
        name=DEPLOYMENT,
        num_replicas=replicas,
        max_ongoing_requests=room + 8,  # a replica itself tells when it is full
        ray_actor_options=_resources(models.device, replicas, alone),
        health_check_period_s=1,
        health_check_timeout_s=60,
        graceful_shutdown_wait_loop_s=0.1,
        max_constructor_retry_count=1,
        logging_config=quiet,
    ).bind(models, lease)
    (handle,) = serve.run_many(
        [serve.RunTarget(app, name=name, route_prefix=None)], wait_for_applications_running=False
    )
    return handle


def _resources(device: str, replicas: int, alone: bool) -> dict[str, float]:
    """What a replica takes of the cluster: its part of this machine, or a core of another, and of GPUs."""
    found: dict[str, float] = {"num_cpus": max(1, (os.cpu_count() or 1) // replicas) if alone else 1}
    gpus = ray.cluster_resources().get("GPU", 0)
    if device != "cpu" and gpus:
        found["num_gpus"] = min(1.0, int(1000 * gpus / replicas) / 1000)
    return found


def _wait(name: str, report: Callable[[str], None]) -> None:
    """Wait until all replicas can be asked.

    Raises:
        CalmError: one of them cannot load the models.
    """
    said = ""
    while True:
        app = serve.status().applications.get(name)
        if app is not None:
            told = "\n".join(deployment.message for deployment in app.deployments.values())
            if app.status == ApplicationStatus.RUNNING:
                return
            if app.status in (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY):
                raise CalmError(f"Each replica must load what is served, but one cannot: {_cause(told or app.message)}")
            if "have taken more than" in told and not said:  # for want of cores, say
                said = told
                report(told)
        time.sleep(POLL)


def _cause(told: str) -> str:
    """The sentence of the error of calmlm's that ends a traceback, or its last line."""
    found = re.findall(r"^calmlm\.errors\.\w+: (.+)$", told, re.MULTILINE)
    lines = [line.strip() for line in told.splitlines() if line.strip()]
    return found[-1] if found else f"{lines[-1].rstrip('.')}." if lines else "see the logs of Ray."


def _running(name: str) -> int:
    """How many replicas can be asked."""
    app = serve.status().applications.get(name)
    states = {} if app is None else app.deployments[DEPLOYMENT].replica_states
    return sum(count for state, count in states.items() if state == "RUNNING")
