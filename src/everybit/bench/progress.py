"""How a run goes, on the terminal while it goes (rich), or a line now and then where there is none."""

from __future__ import annotations

import sys
from collections import Counter
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.table import Table

from everybit.bench.records import MS, Record
from everybit.bench.runner import Progress

_LINE_S = 10.0
_RECENT = 200


class Display:
    """Shown on stderr: stdout is for the result. `expected_s` and `count` give the ETA where they are known."""

    def __init__(self, title: str, expected_s: float | None, count: int | None, quiet: bool = False) -> None:
        self._console = Console(file=sys.stderr)
        self._title, self._expected_s, self._count, self._quiet = title, expected_s, count, quiet
        self._live: Live | None = None
        self._next_s = _LINE_S
        self._errors: Counter[str] = Counter()
        self._seen = self._tokens = 0

    def __enter__(self) -> Display:
        if not self._quiet and self._console.is_terminal:
            self._live = Live(console=self._console, auto_refresh=False, transient=True)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def __call__(self, progress: Progress) -> None:
        for record in progress.records[self._seen :]:
            self._tokens += record.output_tokens
            if record.error:
                self._errors[record.error] += 1
        self._seen = len(progress.records)
        if self._live is not None:
            self._live.update(self._table(progress), refresh=True)
        elif not self._quiet and progress.seconds >= self._next_s:
            self._next_s = progress.seconds + _LINE_S
            print(f"bench: {self._title}: {self._line(progress)}", file=sys.stderr)

    def _line(self, progress: Progress) -> str:
        text = f"{progress.seconds:.0f} s{self._eta(progress)}, {self._seen} done, {progress.running} running"
        return text + "".join(f", {count} {kind}" for kind, count in self._errors.most_common())

    def _eta(self, progress: Progress) -> str:
        shares = []
        if self._expected_s:
            shares.append(progress.seconds / self._expected_s)
        if self._count:
            shares.append(self._seen / self._count)
        share = max(shares, default=0.0)
        if not 0.01 < share < 1:
            return ", ending" if share >= 1 else ""
        return f" ({share:.0%}, {progress.seconds * (1 - share) / share:.0f} s to go)"

    def _table(self, progress: Progress) -> Table:
        table = Table(title=self._title, show_header=False, box=None)
        table.add_row("time", f"{progress.seconds:.0f} s{self._eta(progress)}")
        table.add_row("requests", f"{self._seen} done, {progress.running} running")
        recent = progress.records[-_RECENT:]
        table.add_row("first token", _shown([_first(r) for r in recent if r.first_ns is not None]))
        table.add_row("between tokens", _shown([gap for r in recent if (gap := _gap(r)) is not None]))
        table.add_row("tokens/s", f"{self._tokens / max(progress.seconds, 0.001):.1f}")
        if self._errors:
            table.add_row("failed", ", ".join(f"{count} {kind}" for kind, count in self._errors.most_common()))
        return table


def _first(record: Record) -> float:
    return ((record.first_ns or 0) - record.intended_ns) / MS


def _gap(record: Record) -> float | None:
    if record.output_tokens < 2 or len(record.times_ns) < 2:
        return None
    return (record.times_ns[-1] - record.times_ns[0]) / MS / (record.output_tokens - 1)


def _shown(values: list[float]) -> str:
    if not values:
        return "none yet"
    values = sorted(values)
    return f"{values[len(values) // 2]:.1f} ms median, {values[int(len(values) * 0.99)]:.1f} ms p99 (last {_RECENT})"
