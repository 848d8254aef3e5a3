"""A mock in a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict

from everybit.bench.loop import exact_loop
from everybit.bench.mock.script import Script
from everybit.bench.mock.server import Mock
from everybit.errors import SourceError


def serve(script: Script, host: str = "127.0.0.1", port: int = 0) -> None:
    """Serves until SIGINT or SIGTERM; says on stderr when it is ready. Raises: SourceError"""
    # What exists now stays: no collection has to walk through it while nothing is sent.
    gc.collect()
    gc.freeze()
    with asyncio.Runner(loop_factory=exact_loop) as runner:
        runner.run(_serve(script, host, port))


@contextlib.contextmanager
def running(script: Script) -> Iterator[str]:
    """A mock in a process of its own; its base URL, ending in /v1. It ends with this block or this process.

    Raises: SourceError
    """
    command = [sys.executable, "-m", "everybit.bench.mock"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stderr is not None
    try:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps(asdict(script)) + "\n")
            process.stdin.flush()
        said = process.stderr.readline()
        found = re.fullmatch(r"mock: ready on (\S+)\n", said)
        if found is None:
            said += process.stderr.read()
            raise SourceError(said.strip().rpartition("\n")[2] or "the mock ended before it was ready")
        yield f"{found[1]}/v1"
    finally:
        process.kill()  # it has nothing to lose
        process.wait()
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        process.stderr.close()


async def _serve(script: Script, host: str, port: int) -> None:
    mock, over = Mock(script), asyncio.Event()
    port = await mock.start(host, port)
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, over.set)
    scheme = "http" if script.tls_certificate is None else "https"
    shown = f"[{host}]" if ":" in host else host
    print(f"mock: ready on {scheme}://{shown}:{port}", file=sys.stderr, flush=True)
    await over.wait()
    await mock.close()
