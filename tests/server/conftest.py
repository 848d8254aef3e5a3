"""A tiny model with a chat template, and a real server for it in a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

import everybit

TEMPLATE = """\
{%- if tools %}{{ '<|tools|>' }}{% for tool in tools %}{{ tool | tojson }}{% endfor %}
For a call write <tool_call>{"name": NAME, "arguments": {...}}</tool_call>
{% endif %}
{%- for message in messages %}{{ '<|' + message.role + '|>' + message.content }}
{%- if message.tool_calls %}{% for call in message.tool_calls %}<tool_call>
{{ {'name': call.function.name, 'arguments': call.function.arguments} | tojson }}
</tool_call>{% endfor %}{% endif %}
{{- '\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""


@pytest.fixture(scope="session")
def chat_overlay(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, a token for each byte, room for 4,096 tokens, precisions 2, 3, 4, 6 and 8."""
    source = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(tiny_llama, source)
    config = json.loads((source / "config.json").read_text())
    config["max_position_embeddings"] = 4096
    (source / "config.json").write_text(json.dumps(config))
    settings = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": TEMPLATE}))
    out = source.parent / "overlay"
    everybit.quantize(source, out, bits=(2, 3, 4, 6, 8), solver="tree", calibration="none")
    return out


@dataclass
class Running:
    """A server process that is ready. `url` without a slash at its end; `log`: where its JSON lines are."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path
    headers: dict[str, str] = field(default_factory=dict)

    def client(self, timeout_s: float = 60) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=timeout_s, headers=self.headers, trust_env=False)

    def post(self, path: str, body: Any, **more: Any) -> httpx.Response:
        with self.client() as client:
            return client.post(path, json=body, **more)

    def get(self, path: str) -> httpx.Response:
        with self.client() as client:
            return client.get(path)

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    def stop(self, timeout_s: float = 30) -> int:
        """SIGTERM, and the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout_s)


@contextlib.contextmanager
def running(
    folder: Path, *options: str, log: Path, environment: dict[str, str] | None = None, ready_s: float = 60
) -> Iterator[Running]:
    """`everybit serve chat=FOLDER OPTIONS` on a free port, until the block ends."""
    command = [sys.executable, "-m", "everybit.cli.main", "serve", f"chat={folder}", "--port", "0", "--log", str(log)]
    process = subprocess.Popen(
        [*command, "--threads", "1", *options], stderr=subprocess.PIPE, env={**os.environ, **(environment or {})}
    )
    assert process.stderr is not None
    said, deadline = b"", time.monotonic() + ready_s
    try:
        while not (found := re.search(rb"ready on (http://\S+)\n", said)):
            if not select.select([process.stderr], [], [], max(0, deadline - time.monotonic()))[0]:
                raise TimeoutError(f"the server was not ready in time: {said.decode()}")
            new = os.read(process.stderr.fileno(), 65536)
            if not new:
                raise RuntimeError(f"the server ended with {process.wait()}: {said.decode()}")
            said += new
        yield Running(process, found[1].decode(), log)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        process.stderr.close()


@pytest.fixture(scope="session")
def server(chat_overlay: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """One server that many tests share: leave nothing running in it."""
    with running(chat_overlay, log=tmp_path_factory.mktemp("server") / "log.jsonl") as found:
        yield found


def events(response: httpx.Response) -> list[Any]:
    """The documents of a stream of server-sent events; "[DONE]" as it is."""
    found = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
    return [one if one == "[DONE]" else json.loads(one) for one in found]
