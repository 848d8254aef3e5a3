"""Definitions of lm-eval tasks over local JSON lines, worded as lm-eval's own of the same name.

| file | fields |
|---|---|
| arc_easy, piqa, openbook_qa, copa | query, choices, gold (a number) |
| lambada_openai | context, continuation |
| winogrande | context_options, continuation, gold |
| blimp_100 | good, bad |

The kind of a file is told by its fields, so that any name may be used.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from everybit.errors import SourceError

_ACC = {"metric": "acc", "aggregation": "mean", "higher_is_better": True}
_ACC_NORM = {"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True}
_PERPLEXITY = {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}
_QUESTION = "Question: "

# The fields that tell a kind, and what lm-eval is told about it.
KINDS: dict[tuple[str, ...], dict[str, Any]] = {
    ("query", "choices", "gold"): {
        "output_type": "multiple_choice",
        # ARC and PIQA are asked; sentences to be completed stand as they are.
        "doc_to_text": lambda doc: (
            f"{doc['query'].rstrip()}\nAnswer:" if doc["query"].startswith(_QUESTION) else doc["query"].rstrip()
        ),
        "doc_to_target": "gold",
        "doc_to_choice": "choices",
        "metric_list": [_ACC, _ACC_NORM],
    },
    ("context", "continuation"): {
        "output_type": "loglikelihood",
        "doc_to_text": "{{context}}",
        "doc_to_target": lambda doc: " " + doc["continuation"].strip(),
        "target_delimiter": "",
        "metric_list": [_PERPLEXITY, _ACC],
    },
    ("context_options", "continuation", "gold"): {
        "output_type": "multiple_choice",
        "doc_to_text": lambda doc: int(doc["gold"]),  # a number: the choices are contexts, the target is the same
        "doc_to_target": lambda doc: doc["continuation"].strip(),
        "doc_to_choice": "context_options",
        "metric_list": [_ACC],
    },
    ("good", "bad"): {
        "output_type": "multiple_choice",
        "doc_to_text": "",
        "doc_to_target": lambda doc: 0,
        "doc_to_choice": lambda doc: [doc["good"], doc["bad"]],
        "target_delimiter": "",
        "metric_list": [_ACC],
    },
}


def read_samples(name: str, folder: Path) -> list[dict[str, Any]]:
    """The samples of `folder`/NAME.jsonl. Raises: SourceError, naming the file and the line"""
    path = folder / f"{name}.jsonl"
    if not path.is_file():
        there = ", ".join(sorted(p.stem for p in folder.glob("*.jsonl"))) or "no *.jsonl"
        raise SourceError(f"--tasks {name}: no file {path}; the folder holds {there}")
    samples = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            sample = json.loads(line)
        except ValueError as error:
            raise SourceError(f"{path}: line {number} is not JSON ({error})") from None
        samples.append(sample)
        _check(path, number, sample, samples[0])
    if not samples:
        raise SourceError(f"{path}: an empty file; expected one JSON object per line")
    return samples


def local_task(name: str, folder: Path) -> dict[str, Any]:
    """The definition that lm-eval's `TaskManager.load` takes, over a local file. Raises: SourceError"""
    samples = read_samples(name, folder)

    def dataset(**_: Any) -> Any:
        from datasets import Dataset

        return {"test": Dataset.from_list(samples)}

    settings = KINDS[_kind(samples[0]) or ()]
    return {"task": name, "custom_dataset": _named(dataset, name), "test_split": "test", "num_fewshot": 0, **settings}


def _kind(sample: Any) -> tuple[str, ...] | None:
    return next((kind for kind in KINDS if isinstance(sample, dict) and set(kind) <= set(sample)), None)


def _check(path: Path, number: int, sample: Any, first: Any) -> None:
    kind = _kind(sample)
    if kind is None or kind != _kind(first):
        known = "; ".join(", ".join(fields) for fields in KINDS)
        raise SourceError(f"{path}: line {number} has not the fields of one kind of task: expected {known}")
    options = sample.get("choices", sample.get("context_options"))
    if options is not None and not (isinstance(options, list) and 0 <= int(sample["gold"]) < len(options)):
        raise SourceError(f"{path}: line {number}: gold {sample['gold']!r} is not the number of one of its choices")


def _named(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """lm-eval prints the function's name where a dataset's path would stand."""
    function.__name__ = f"local_{name}"
    return function
