"""Measuring what a precision costs: perplexity, bits per byte, KL to the float model, top-1 agreement.

    model, reference = evaluate.EngineModel.open("overlay", 512), evaluate.EngineModel.open("model", 512)
    windows = evaluate.windows(Tokenizer.open("overlay"), evaluate.read_documents(path), context=512)
    report = evaluate.evaluate(model, model.bits, windows, reference, set_precision=model.set_precision)
    print(report.table())

Importing this package imports numpy but neither torch nor matplotlib.
"""

from __future__ import annotations

from everybit.evaluate.engine import EngineModel
from everybit.evaluate.figure import check_plot, plot
from everybit.evaluate.quality import evaluate
from everybit.evaluate.report import FloatQuality, Report, Row
from everybit.evaluate.text import Windows, context_length, windows
from everybit.texts import read_documents, split_documents

__all__ = [
    "EngineModel",
    "FloatQuality",
    "Report",
    "Row",
    "Windows",
    "check_plot",
    "context_length",
    "evaluate",
    "plot",
    "read_documents",
    "split_documents",
    "windows",
]
