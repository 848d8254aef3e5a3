"""Prometheus metrics, much under the names of vLLM's with another prefix, and with the precision as a label."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from everybit.batching.batcher import Event
from everybit.server.generation import Generation
from everybit.server.served import Served
from everybit.server.worker import Load

_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
_WINDOW_S = 5.0  # over which tokens a second are counted


class Metrics:
    """Of one server. Counters grow in the worker's thread and the event loop; both may read them."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"everybit:{name}", text, ["model", *labels], registry=self._registry)

        def histogram(name: str, text: str, buckets: Sequence[float] = _SECONDS) -> Histogram:
            return Histogram(f"everybit:{name}", text, ["model"], registry=self._registry, buckets=buckets)

        def counter(name: str, text: str, labels: Sequence[str]) -> Counter:
            return Counter(f"everybit:{name}", text, labels, registry=self._registry)

        self._running = gauge("num_requests_running", "Sequences that run")
        self._waiting = gauge("num_requests_waiting", "Sequences that wait")
        self._kv = gauge("kv_cache_usage_perc", "Share of KV blocks that sequences hold, 0 to 1")
        self._bits = gauge("auto_bits", "Precision of auto requests now")
        self._gain = gauge("spec_decode_predicted_gain", "Tokens a second with speculation over without, as predicted")
        self._preempted = gauge("num_preemptions", "Sequences put back for others, since the start")
        self._cached = gauge("prefix_cache_hit_tokens", "Tokens not computed because they were cached, since the start")
        self._drafted = gauge("spec_decode_num_draft_tokens", "Drafted tokens", "draft")
        self._accepted = gauge("spec_decode_num_accepted_tokens", "Drafted tokens that were right", "draft")
        self._lost = Gauge("everybit:log_lines_lost", "Log lines that could not be written", registry=self._registry)
        self._prompt = counter("prompt_tokens", "Tokens of prompts", ["model"])
        self._tokens = counter("generation_tokens", "Tokens written", ["model", "bits"])
        self._ended = counter("request_success", "Requests that ended", ["model"])
        self._first = histogram("time_to_first_token_seconds", "From a request's start to its first token")
        self._whole = histogram("e2e_request_latency_seconds", "From a request's start to its end")
        self.by_bits: dict[str, dict[str, int]] = {}
        self._recent: dict[str, deque[tuple[float, int]]] = {}

    def step(self, served: Served, events: Sequence[Event]) -> None:
        """After a step, in the worker's thread."""
        counts = self.by_bits.setdefault(served.name, {})
        new: dict[str, int] = {}
        for event in events:
            if event.token is not None:
                label = str(served.label(event.bits))
                new[label] = new.get(label, 0) + 1
        for label, number in new.items():
            counts[label] = counts.get(label, 0) + number
            self._tokens.labels(served.name, label).inc(number)
        now, recent = time.monotonic(), self._recent.setdefault(served.name, deque())
        recent.append((now, sum(new.values())))
        while recent and recent[0][0] < now - _WINDOW_S:
            recent.popleft()

    def tokens_per_s(self, name: str) -> float:
        """Over the last seconds."""
        since = time.monotonic() - _WINDOW_S
        return sum(number for at, number in list(self._recent.get(name, ())) if at >= since) / _WINDOW_S

    def ended(self, name: str, generation: Generation) -> None:
        if generation.complete:
            self._ended.labels(name).inc()
        self._prompt.labels(name).inc(generation.usage.prompt_tokens)
        self._whole.labels(name).observe(generation.seconds)
        if generation.first_s is not None:
            self._first.labels(name).observe(generation.first_s)

    def text(self, models: Mapping[str, Served], loads: Mapping[str, Load], lost: int) -> bytes:
        """In Prometheus' format."""
        for name in models:
            counts = loads[name].counts
            self._running.labels(name).set(counts.running)
            self._waiting.labels(name).set(counts.waiting)
            self._kv.labels(name).set(1 - counts.blocks_available / counts.blocks)
            self._preempted.labels(name).set(counts.preempted)
            self._cached.labels(name).set(counts.tokens_cached)
            self._bits.labels(name).set(loads[name].bits)
            speculated = loads[name].speculated
            self._gain.labels(name).set(speculated.gain)
            for gauge, found in ((self._drafted, speculated.drafted), (self._accepted, speculated.accepted)):
                for source, tokens in found.items():
                    gauge.labels(name, source).set(tokens)
        self._lost.set(lost)
        return generate_latest(self._registry)

    def status(self, served: Served, load: Load, queue: int) -> dict[str, Any]:
        """What the page shows."""
        counts = load.counts
        return {
            "bits_now": load.bits,
            "running": counts.running,
            "waiting": counts.waiting,
            "queue_limit": queue,
            "kv_blocks": counts.blocks,
            "kv_blocks_free": counts.blocks_available,  # those that are cached and held by nobody, too
            "kv_blocks_cached": counts.blocks_cached,
            "tokens_per_s": round(self.tokens_per_s(served.name), 2),
            "tokens_by_bits": dict(self.by_bits.get(served.name, {})),
        }
