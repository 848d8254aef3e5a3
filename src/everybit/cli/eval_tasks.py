"""The task suites of `everybit eval --tasks`: loaded, run at every precision, shown."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from everybit.errors import SourceError

if TYPE_CHECKING:
    from everybit.engine.runtime import Runtime
    from everybit.tokenizer import Tokenizer

Scores = list[dict[str, Any]]  # task, metric, value, stderr (or None), samples


def load(names: str, folder: str | None) -> dict[str, Any]:
    """The tasks that `--tasks` names, in its order, each once. Raises: SourceError"""
    wanted = list(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
    if not wanted:
        raise SourceError(f"--tasks {names!r} names no task: expected names such as piqa,arc_easy")
    if folder is not None and not Path(folder).expanduser().is_dir():
        raise SourceError(f"--tasks-data {folder}: no such folder; expected one that holds NAME.jsonl")
    if importlib.util.find_spec("lm_eval") is None:
        raise SourceError('--tasks needs lm-eval, which is not installed: pip install "everybit[tasks]"')
    from everybit.integrations.lm_eval import load_tasks

    return load_tasks(wanted, Path(folder).expanduser() if folder is not None else None)


def score(
    tasks: dict[str, Any],
    tokenizer: Tokenizer,
    runtime: Runtime,
    bits: Sequence[int],
    reference: Runtime | None,
    limit: int | None,
) -> dict[str, Any]:
    """`{"float": scores or None, "rows": [{"bits": b, "scores": scores}, ...]}`. Raises: as Runtime"""
    from everybit.integrations.lm_eval import EverybitLM, evaluate_tasks

    def run(model: Runtime, at: int | None) -> Scores:
        return [vars(one) for one in evaluate_tasks(EverybitLM(model, tokenizer, at), tasks, limit)]

    floats = run(reference, None) if reference is not None else None
    return {"float": floats, "rows": [{"bits": b, "scores": run(runtime, b)} for b in bits]}


def table(scores: dict[str, Any]) -> str:
    """One line per task and metric, one column per precision, standard errors in brackets."""
    from everybit.evaluate.report import align

    columns: list[tuple[str, Scores]] = [("float", scores["float"])] if scores["float"] else []
    columns += [(f"{row['bits']} bits", row["scores"]) for row in scores["rows"]]
    lines = [["task", "metric", "samples", *(name for name, _ in columns)]]
    for i, one in enumerate(columns[0][1]):
        lines.append([one["task"], one["metric"], f"{one['samples']:,}", *(_cell(found[i]) for _, found in columns)])
    return f"{align(lines)}\nstandard errors in brackets"


def _cell(one: dict[str, Any]) -> str:
    value, stderr = one["value"], one["stderr"]
    text = f"{value:.4f}" if abs(value) < 100 else f"{value:.4g}"
    return text if stderr is None else f"{text} ({stderr:.2g})"
