"""kill -9 at random moments, resume: the same bytes as an undisturbed run."""

from __future__ import annotations

import hashlib
import random
import subprocess
import sys
from pathlib import Path

import pytest

import everybit
from everybit.errors import OutputError

TEXT = "The quick brown fox jumps over the lazy dog while nobody is looking. " * 40

# Runs the real quantizer in its own process and kills it, as kill -9 does, at its n-th write, sync or rename, or at the
# n-th rename to a path that holds a word. What it solved and tuned goes into a log.
RUN = """
import os, signal, sys
import everybit.quantize.build as build, everybit.quantize.statistics as statistics, everybit.quantize.tuner as tuner
model, out, text, log, word, stop = sys.argv[1:]
statistics.SAVE_EVERY_S = 0.0  # save after every sequence, so that kills fall between saves too
left = int(stop)
def counted(call):
    def wrapper(*args, **kwargs):
        global left
        left -= word in str(args[-1])
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*args, **kwargs)
    return wrapper
def logged(call, note):
    def wrapper(*args, **kwargs):
        result = call(*args, **kwargs)
        with open(log, "a") as file:
            print(note(*args), file=file)
        return result
    return wrapper
os.fsync, os.replace, os.rename = counted(os.fsync), counted(os.replace), counted(os.rename)
build.solve_parameter = logged(build.solve_parameter, lambda spec, *rest: spec.name)
tuner.Tuner.tune = logged(tuner.Tuner.tune, lambda self, weights, fixed, bits, *rest: f"tuned {bits}")
import everybit
options = {"calibration_sequences": 6, "calibration_length": 48, "tune_steps": 8, "resume": True, "progress": False}
everybit.quantize(model, out, calibration=text, **options)
"""


def run(model: Path, out: Path, text: Path, stop: int = 1 << 30, word: str = "") -> subprocess.CompletedProcess[str]:
    arguments = [model, out, text, out.with_name(out.name + ".log"), word, stop]
    command = [sys.executable, "-c", RUN, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def test_five_kills_then_the_same_bytes(tmp_path: Path, tiny_llama: Path) -> None:
    """One while measuring, one while solving, one while tuning, two anywhere in what is left."""
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    undisturbed = run(tiny_llama, tmp_path / "undisturbed", text)
    assert undisturbed.returncode == 0, undisturbed.stderr
    rng = random.Random(7)
    out = tmp_path / "overlay"
    for word, stop in (("statistics", 2), ("solutions", 5), ("tuned3", 1), ("", rng.randint(1, 8)), ("", 9)):
        killed = run(tiny_llama, out, text, stop, word)
        assert killed.returncode == -9, killed.stderr
        assert not out.exists(), "an unfinished overlay under its final name"
    resumed = run(tiny_llama, out, text)
    assert resumed.returncode == 0, resumed.stderr
    assert digests(out) == digests(tmp_path / "undisturbed")
    assert not out.with_name("overlay.partial").exists()
    once, log = ((tmp_path / f"{name}.log").read_text().splitlines() for name in ("undisturbed", "overlay"))
    assert len(once) == len(set(once)) == 14 + 3
    # Done twice are only what was about to be stored as the kill came: the fifth weight, and the tables of 3 bits.
    again = list(log)
    for line in once:
        again.remove(line)
    assert again[:2] == [once[4], "tuned 3"]
    assert len(again) <= 2 + 2


def test_an_interrupted_run_is_not_overwritten_without_resume(tmp_path: Path, tiny_llama: Path) -> None:
    (tmp_path / "overlay.partial").mkdir()
    with pytest.raises(
        OutputError, match=r"overlay\.partial is left from an interrupted run: continue it with --resume"
    ):
        everybit.quantize(tiny_llama, tmp_path / "overlay", progress=False)


def test_resume_with_other_options_is_refused(tmp_path: Path, tiny_llama: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    assert run(tiny_llama, tmp_path / "overlay", text, 5).returncode == -9
    with pytest.raises(OutputError, match="belongs to a run with other options or another model"):
        everybit.quantize(tiny_llama, tmp_path / "overlay", bits=(2, 3), resume=True, progress=False)
