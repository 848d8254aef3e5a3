"""Completions streamed from an OpenAI-compatible server over HTTP/1.1, with the time of every piece.

Standard library only, and as little work a piece as can be: the client shares the processors with the server.
"""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Stream:
    """When a request was sent and when its tokens came, in ns; `bits` of the tokens where the server tells."""

    sent_ns: int
    tokens_ns: list[int] = field(default_factory=list)
    bits: list[int] = field(default_factory=list)
    status: int = 0
    problem: str = ""


async def stream(port: int, body: dict[str, Any], path: str = "/v1/completions") -> Stream:
    """One request. A piece counts as the tokens of its `bits`, or as one where the server does not tell."""
    found = Stream(time.perf_counter_ns())
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
        data = json.dumps({**body, "stream": True}).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
        writer.write(head.encode() + f"Content-Length: {len(data)}\r\n\r\n".encode() + data)
        found.status = int((await reader.readline()).split()[1])
        while line := await reader.readline():
            if line.startswith(b"data: {"):
                now, document = time.perf_counter_ns(), json.loads(line[6:])
                if "error" in document:
                    found.problem = str(document["error"])
                    break
                choices = document.get("choices") or [{}]
                bits = document.get("bits")
                if bits is None:
                    bits = [] if choices[0].get("finish_reason") and not choices[0].get("text") else [0]
                found.bits += bits
                found.tokens_ns += [now] * len(bits)
            elif found.status != 200 and line.startswith(b"{"):
                found.problem = line.decode()[:200]
        writer.close()
    except OSError as error:
        found.problem = f"{type(error).__name__}: {error}"
    return found
