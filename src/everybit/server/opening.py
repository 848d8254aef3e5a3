"""What opens the models of a server, in one place: the command line fills it in, any process can carry it out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from everybit.batching.fluidity import Target
from everybit.engine.runtime import Backend
from everybit.server.served import Served


@dataclass(frozen=True)
class Opening:
    """Arguments of Served.open, for every model alike. Can be pickled."""

    models: dict[str, Path]
    bits: str
    plans: dict[str, Path]
    threads: int
    mode: str
    context: int | None
    sequences: int
    kv_dtype: str
    budget: int
    queue: int
    target: Target
    speculate: bool
    backend: Callable[..., Backend] | None = None
    adapter: Path | None = None

    def open(self) -> dict[str, Served]:
        """All or none. Raises: as Served.open"""
        opened: dict[str, Served] = {}
        try:
            for name, folder in self.models.items():
                opened[name] = Served.open(
                    name,
                    folder,
                    bits=self.bits,
                    plans=self.plans,
                    threads=self.threads,
                    mode=self.mode,
                    context=self.context,
                    sequences=self.sequences,
                    kv_dtype=self.kv_dtype,
                    budget=self.budget,
                    queue=self.queue,
                    target=self.target,
                    speculate=self.speculate,
                    backend=self.backend,
                    adapter=self.adapter,
                )
        except BaseException:
            close(opened)
            raise
        return opened

    def about(self, opened: dict[str, Served]) -> str:
        """A line for each model: what it is and how it runs."""
        lines = []
        for name, served in opened.items():
            bits = served.runtime.bits
            what = f"{min(bits)} to {max(bits)} bits" if bits else "float weights"
            what += f" with the adapter {self.adapter.name}" if self.adapter else ""
            threads = f"{served.runtime.threads} thread{'s' if served.runtime.threads > 1 else ''}"
            lines.append(f"everybit: {name}: {what}, {served.runtime.isa}, {threads}, {self.mode} mode")
        return "\n".join(lines)


def close(opened: dict[str, Served]) -> None:
    for served in opened.values():
        served.runtime.close()
