"""The process of `everybit serve --ray`: it starts Ray and Serve on this machine, waits for a signal, and ends them.

Everything of Ray listens on this machine's own address only, and asks for a token that lives as long as the server:
whoever reaches Ray's ports could run code. Only Serve's HTTP proxy listens where the command says.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import secrets
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from everybit.errors import OutputError, SourceError, reason
from everybit.integrations.ray_serve.door import VARIABLE, DoorSettings
from everybit.integrations.ray_serve.log import Relay
from everybit.integrations.ray_serve.replica import Order, deployment
from everybit.server.app import Settings
from everybit.server.opening import Opening
from everybit.server.run import KEEP_ALIVE_S, bind

NAME = "everybit"
OLDEST = (2, 52)  # the first with tokens, without which every user of this machine could use Ray's ports
OBJECT_STORE_BYTES = 128 << 20  # requests and answers on their way, those above 100 KB
HEALTH_S = 2.0
START_S = 600.0
LAST_S = 10.0  # for the end of a replica after its last request
FLUSH_S = 0.5  # for the proxy to send what the replicas wrote last


def serve_on_ray(
    opening: Opening,
    settings: Settings,
    *,
    host: str,
    port: int,
    replicas: tuple[int, int],
    drain_s: float,
    log: Path | None,
) -> None:
    """Until a signal comes; from `replicas` (fewest, most) Serve runs as many as the load needs.

    Raises: OutputError, SourceError, and what a replica says that cannot start (as SourceError)
    """
    listener = bind(host, port)  # a port that is taken is known at once
    port = listener.getsockname()[1]
    listener.close()
    try:
        stream = log.open("a", encoding="utf-8") if log is not None else sys.stderr
    except OSError as error:
        raise OutputError(f"{log}: {error.strerror}: name a file that can be written with --log") from None
    folder = Path(tempfile.mkdtemp(prefix="everybit-", dir="/tmp"))  # short: sockets lie in it
    relay: Relay | None = None
    try:
        # Keys, hosts and their limits are the door's, once for all replicas.
        inner = replace(settings, keys=settings.keys.without_limits(), limits=replace(settings.limits, hosts=()))
        order = Order(opening, inner, folder)
        relay = Relay(order.log, stream)
        door = folder / "door"
        door.write_bytes(pickle.dumps(DoorSettings(settings.keys, settings.limits, order.log)))
        os.environ.update(_environment(door))
        with _Signals() as signals, _ray(folder):
            _start(order, host, port, replicas, drain_s, signals)
            if not signals.arrived:
                print(order.about.read_text(), file=sys.stderr)
                shown = f"[{host}]" if ":" in host else host
                print(f"everybit: ready on http://{shown}:{port}", file=sys.stderr, flush=True)
            signals.wait()
            _drain(drain_s, signals)
    finally:
        if relay is not None:
            relay.close()
        if log is not None:
            stream.close()
        shutil.rmtree(folder, ignore_errors=True)


def _environment(door: Path) -> dict[str, str]:
    """Before Ray is imported, which reads them then; its processes inherit them."""
    return {
        VARIABLE: str(door),
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "everybit.integrations.ray_serve.door:middlewares",
        "RAY_SERVE_LOG_TO_STDERR": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_AUTO_CONNECT": "0",  # a call that comes too late must not start another Ray
        # Its name is misleading: 0 makes every port of Ray a port of the loopback address, on Linux too.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
    }


class _Signals:
    """SIGTERM and SIGINT, instead of what they do otherwise; the second ends at once."""

    def __init__(self) -> None:
        self.arrived = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Signals:
        for one in (signal.SIGTERM, signal.SIGINT):
            self._before[one] = signal.signal(one, self._take)
        return self

    def __exit__(self, *error: object) -> None:
        for one, handler in self._before.items():
            signal.signal(one, handler)

    def again(self) -> None:
        """Ray sets handlers of its own."""
        for one in self._before:
            signal.signal(one, self._take)

    def _take(self, number: int, frame: object) -> None:
        self.arrived += 1

    def wait(self) -> None:
        while not self.arrived:
            time.sleep(0.1)


@contextlib.contextmanager
def _ray(folder: Path) -> Iterator[None]:
    """Ray on this machine, for the server alone. Raises: SourceError"""
    import ray

    if tuple(int(part) for part in ray.__version__.split(".")[:2]) < OLDEST:
        raise SourceError(f"Ray {ray.__version__} is here, --ray needs {OLDEST[0]}.{OLDEST[1]} or newer")
    logging.getLogger("ray").setLevel(logging.ERROR)
    try:
        ray.init(
            address="local",
            namespace=NAME,
            num_cpus=1,
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            configure_logging=False,
            log_to_driver=False,
            _temp_dir=str(folder / "ray"),
        )
        yield
    finally:
        ray.shutdown()


def _start(order: Order, host: str, port: int, replicas: tuple[int, int], drain_s: float, signals: _Signals) -> None:
    from ray import serve

    signals.again()
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    fewest, most = replicas
    room = order.settings.queue + 64  # what a batcher takes
    options: dict[str, Any] = {
        "name": NAME,
        "ray_actor_options": {"num_cpus": 0},  # the operator says how many, and with how many threads
        "max_ongoing_requests": room,
        "max_queued_requests": room,
        "health_check_period_s": HEALTH_S,
        "health_check_timeout_s": 30.0,
        "graceful_shutdown_timeout_s": max(drain_s, 0.1),
        "graceful_shutdown_wait_loop_s": 0.2,
    }
    if fewest == most:
        options["num_replicas"] = most
    else:
        options["autoscaling_config"] = {
            "min_replicas": fewest,
            "max_replicas": most,
            "initial_replicas": fewest,
            "target_ongoing_requests": order.opening.sequences,
            "upscale_delay_s": 5.0,
            "downscale_delay_s": 300.0,
        }
    failure: list[BaseException] = []

    def run() -> None:
        try:
            serve.start(
                proxy_location="HeadOnly",
                http_options={"host": host, "port": port, "keep_alive_timeout_s": KEEP_ALIVE_S},
            )
            serve.run(deployment(order, options), name=NAME, route_prefix="/")
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=run, name="everybit-start", daemon=True)
    thread.start()
    deadline = time.monotonic() + START_S
    while thread.is_alive() and not order.failed.exists() and not signals.arrived and time.monotonic() < deadline:
        thread.join(0.1)
    if order.failed.exists():
        raise SourceError(order.failed.read_text())
    if failure:
        raise SourceError(
            f"Ray Serve could not start ({reason(failure[0])}): see its documentation, or leave out --ray"
        )
    if thread.is_alive() and not signals.arrived:
        raise SourceError(f"the replicas were not ready within {START_S:g} s: give fewer of them, or a smaller model")


def _drain(drain_s: float, signals: _Signals) -> None:
    """What runs may finish for a while; new requests are refused by the door."""
    from ray import serve

    print(f"everybit: draining, {drain_s:g} s at most", file=sys.stderr, flush=True)
    before = signals.arrived
    deadline = time.monotonic() + drain_s + LAST_S
    with contextlib.suppress(Exception):  # whatever is left ends with Ray
        serve.delete(NAME, _blocking=False)
        while serve.status().applications and signals.arrived == before and time.monotonic() < deadline:
            time.sleep(0.1)
        if signals.arrived == before:
            time.sleep(FLUSH_S)
