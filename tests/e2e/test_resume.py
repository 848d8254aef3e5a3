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

# Runs the real quantizer in its own process and kills it, as kill -9 does, at its n-th write, sync or rename.
RUN = """
import os, signal, sys
import everybit.quantize.statistics as statistics
model, out, text, stop = sys.argv[1:]
statistics.SAVE_EVERY_S = 0.0  # save after every sequence, so that kills fall between saves too
left = int(stop)
def counted(call):
    def wrapper(*args, **kwargs):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*args, **kwargs)
    return wrapper
os.fsync, os.replace, os.rename = counted(os.fsync), counted(os.replace), counted(os.rename)
import everybit
options = {"calibration_sequences": 6, "calibration_length": 48, "resume": True, "progress": False}
everybit.quantize(model, out, calibration=text, **options)
print(int(stop) - left)
"""


def run(model: Path, out: Path, text: Path, stop: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", RUN, str(model), str(out), str(text), str(stop)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def test_five_kills_then_the_same_bytes(tmp_path: Path, tiny_llama: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    undisturbed = run(tiny_llama, tmp_path / "undisturbed", text, 1 << 30)
    assert undisturbed.returncode == 0, undisturbed.stderr
    steps = int(undisturbed.stdout)
    rng = random.Random(7)
    out = tmp_path / "overlay"
    for _ in range(5):
        killed = run(tiny_llama, out, text, rng.randint(1, steps // 5))
        assert killed.returncode == -9, killed.stderr
        assert not out.exists(), "an unfinished overlay under its final name"
    assert run(tiny_llama, out, text, 1 << 30).returncode == 0
    assert digests(out) == digests(tmp_path / "undisturbed")
    assert not out.with_name("overlay.partial").exists()


def test_an_interrupted_run_is_not_overwritten_without_resume(tmp_path: Path, tiny_llama: Path) -> None:
    (tmp_path / "overlay.partial").mkdir()
    with pytest.raises(
        OutputError, match=r"overlay\.partial is left from an interrupted run: continue it with --resume"
    ):
        everybit.quantize(tiny_llama, tmp_path / "overlay", progress=False)


def test_resume_with_other_options_is_refused(tmp_path: Path, tiny_llama: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    assert run(tiny_llama, tmp_path / "overlay", text, 20).returncode == -9
    with pytest.raises(OutputError, match="belongs to a run with other options or another model"):
        everybit.quantize(tiny_llama, tmp_path / "overlay", bits=(2, 3), resume=True, progress=False)
