"""Writing: the same bytes whatever the order and however often it was killed; stock safetensors reads them."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from everybit.errors import FormatError, OutputError, ShapeError
from everybit.formats import Overlay, OverlayWriter, TensorSpec
from tests.unit import formats_tiny as tiny

SHARD_BYTES = [1 << 30, 200]


def new(folder: Path, shard_bytes: int = 200) -> OverlayWriter:
    return OverlayWriter(folder, tiny.TENSORS, tiny.CONFIG, shard_bytes)


def group(key: str) -> dict[str, np.ndarray]:
    tensors = tiny.arrays()
    return {name: tensors[name] for name in tiny.GROUPS[key]}


def complete(folder: Path, shard_bytes: int = 200) -> None:
    """Resumes and finishes, as the builder does."""
    with new(folder, shard_bytes) as writer:
        if not writer.complete:
            for key in tiny.GROUPS:
                if key not in writer.done:
                    writer.write_group(key, group(key))
        writer.finish()


@pytest.mark.parametrize("shard_bytes", SHARD_BYTES)
def test_stock_safetensors_reads_the_shards(tmp_path: Path, shard_bytes: int) -> None:
    folder, expected = tiny.write(tmp_path / "out", shard_bytes), tiny.arrays()
    found = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            assert file.metadata()["format"] == "pt"
            for name in file.keys():  # noqa: SIM118  safe_open is no mapping
                tensor = file.get_tensor(name)
                raw = tensor.contiguous().reshape(-1).view(dtype=__import__("torch").uint8).numpy().tobytes()
                assert raw == expected[name].tobytes()
                found.add(name)
    assert found == set(expected)


def test_names_are_those_of_hugging_face(tmp_path: Path) -> None:
    one = sorted(path.name for path in tiny.write(tmp_path / "one", 1 << 30).iterdir())
    assert one == ["config.json", "model.safetensors"]
    several = tiny.write(tmp_path / "several", 500)
    names = sorted(path.name for path in several.iterdir())
    assert names[:3] == ["config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert names[3:] == ["model.safetensors.index.json"]
    index = json.loads((several / names[3]).read_text())
    assert index["metadata"] == {"total_size": sum(spec.nbytes for spec in tiny.TENSORS.values())}
    assert set(index["weight_map"]) == set(tiny.TENSORS)


def test_data_and_even_sizes_are_aligned(tmp_path: Path) -> None:
    specs = dict(tiny.TENSORS)
    specs |= {"x": TensorSpec("U8", (3,)), "y": TensorSpec("F64", (5,)), "z": TensorSpec("F32", (64, 3))}
    specs |= {"empty": TensorSpec("F32", (0, 3))}
    with OverlayWriter(tmp_path / "out", specs, tiny.CONFIG) as writer:
        for name, spec in specs.items():
            writer.write(name, np.zeros(spec.shape, spec.numpy))
        writer.finish()
    shard = Overlay.open(tmp_path / "out")._shards[0]
    assert min(entry.begin for entry in shard.entries.values()) % 64 == 0
    for entry in shard.entries.values():
        assert entry.begin % entry.spec.itemsize == 0
        if entry.spec.nbytes % 64 == 0:
            assert entry.begin % 64 == 0


@pytest.mark.parametrize("shard_bytes", SHARD_BYTES)
def test_the_order_of_writing_does_not_show(tmp_path: Path, shard_bytes: int) -> None:
    expected = tiny.fingerprint(tiny.write(tmp_path / "out", shard_bytes))
    tensors = tiny.arrays()
    with new(tmp_path / "other", shard_bytes) as writer:
        for name in reversed(tensors):
            writer.write(name, tensors[name])
        writer.finish()
    assert tiny.fingerprint(tmp_path / "other") == expected


def test_views_that_are_not_contiguous(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("everybit.formats.writer.CHUNK_BYTES", 7)
    expected = tiny.fingerprint(tiny.write(tmp_path / "out"))
    with new(tmp_path / "other", 1 << 30) as writer:
        for name, array in tiny.arrays().items():
            writer.write(name, np.asfortranarray(array) if array.ndim > 1 else array)
        writer.finish()
    assert tiny.fingerprint(tmp_path / "other") == expected


@pytest.mark.parametrize("stop", range(len(tiny.GROUPS) + 1))
def test_resume_after_any_group(tmp_path: Path, stop: int) -> None:
    expected = tiny.fingerprint(tiny.write(tmp_path / "out", 200))
    keys = list(tiny.GROUPS)
    with new(tmp_path / "other") as writer:
        for key in keys[:stop]:
            writer.write_group(key, group(key))
    with new(tmp_path / "other") as writer:
        assert writer.done == set(keys[:stop])
    complete(tmp_path / "other")
    assert tiny.fingerprint(tmp_path / "other") == expected


def test_a_torn_journal(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    expected = tiny.fingerprint(tiny.write(tmp_path / "whole", 1 << 30))
    with new(folder, 1 << 30) as writer:
        for key in list(tiny.GROUPS)[:2]:
            writer.write_group(key, group(key))
    journal = folder / "journal.jsonl"
    whole = journal.read_bytes()
    ends = [index + 1 for index, byte in enumerate(whole) if byte == ord("\n")]
    assert len(ends) == 3
    around = {end + shift for end in ends for shift in (-2, -1, 0, 1)}
    for cut in sorted(around | set(range(0, len(whole), 40))):
        journal.write_bytes(whole[:cut])
        with new(folder, 1 << 30) as writer:
            assert writer.done == set(list(tiny.GROUPS)[: max(sum(end <= cut for end in ends) - 1, 0)])
    journal.write_bytes(whole[:-5])
    with new(folder, 1 << 30) as writer:  # what follows a torn line must not be glued to it
        writer.write_group("s", group("s"))
    with new(folder, 1 << 30) as writer:
        assert writer.done == {"a.weight", "s"}
    complete(folder, 1 << 30)
    assert tiny.fingerprint(folder) == expected


def test_a_group_whose_bytes_changed_is_written_again(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    expected = tiny.fingerprint(tiny.write(tmp_path / "whole", 200))
    with new(folder) as writer:
        writer.write_group("a.weight", group("a.weight"))
        writer.write_group("s", group("s"))
        shard, slot = writer._slots["a.weight_lut3"]
    with (folder / shard.file).open("r+b") as file:
        file.seek(slot.begin)
        file.write(b"\xff")
    with new(folder) as writer:
        assert writer.done == {"s"}
    complete(folder)
    assert tiny.fingerprint(folder) == expected


def test_a_shard_that_vanished_is_written_again(tmp_path: Path) -> None:
    expected = tiny.fingerprint(tiny.write(tmp_path / "whole", 200))
    with new(tmp_path / "out") as writer:
        writer.write_group("a.weight", group("a.weight"))
    next((tmp_path / "out").glob("model-00002*")).unlink()
    with new(tmp_path / "out") as writer:
        assert writer.done == set()
    complete(tmp_path / "out")
    assert tiny.fingerprint(tmp_path / "out") == expected


def test_a_journal_of_another_run_is_refused(tmp_path: Path) -> None:
    new(tmp_path / "out").close()
    message = "belongs to a run with other options or another model: use the same options to resume it, or delete"
    with pytest.raises(OutputError, match=message):
        new(tmp_path / "out", 300)
    with pytest.raises(OutputError, match=message):
        OverlayWriter(tmp_path / "out", tiny.TENSORS, {**tiny.CONFIG, "other": 1}, 200)
    (tmp_path / "out" / "journal.jsonl").write_bytes(b"{}\n")
    with pytest.raises(OutputError, match=r"journal\.jsonl is damaged: delete"):
        new(tmp_path / "out")


def test_a_folder_with_a_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    new(tmp_path).close()  # other files do not disturb
    (tmp_path / "journal.jsonl").unlink()
    with pytest.raises(OutputError, match=r"already holds a model \('model-00001-of-.*'\): choose a new folder"):
        new(tmp_path)


def test_a_finished_folder_is_recognised(tmp_path: Path) -> None:
    expected = tiny.fingerprint(tiny.write(tmp_path / "out", 200))
    with new(tmp_path / "out") as writer:
        assert writer.complete
        with pytest.raises(OutputError, match=r"is complete: call finish\(\) and use it"):
            writer.write_group("s", group("s"))
        writer.finish()
    assert tiny.fingerprint(tmp_path / "out") == expected
    with pytest.raises(OutputError, match="already holds a model"):
        OverlayWriter(tmp_path / "out", tiny.TENSORS, {**tiny.CONFIG, "other": 1}, 200)
    shard = next((tmp_path / "out").glob("*.safetensors"))
    shard.write_bytes(b"\0" + shard.read_bytes()[1:])
    with pytest.raises(OutputError, match="already holds a model"):
        new(tmp_path / "out")


def test_an_unfinished_folder_is_no_overlay(tmp_path: Path) -> None:
    with new(tmp_path / "out", 1 << 30) as writer:
        for key in tiny.GROUPS:
            writer.write_group(key, group(key))
    with pytest.raises(FormatError, match=r"is an unfinished overlay: run the same .* with --resume"):
        Overlay.open(tmp_path / "out")
    (tmp_path / "out" / "config.json").write_text(json.dumps(tiny.CONFIG))
    with pytest.raises(FormatError, match="the header length is 0, the file was never finished"):
        Overlay.open(tmp_path / "out")


def test_finish_wants_every_tensor(tmp_path: Path) -> None:
    with new(tmp_path / "out") as writer:
        writer.write_group("a.weight", group("a.weight"))
        with pytest.raises(OutputError, match=r"9 of 16 tensors were never written, 'b.experts_affine2' among them"):
            writer.finish()
    assert not (tmp_path / "out" / "config.json").exists()


def test_misuse(tmp_path: Path) -> None:
    tensors = tiny.arrays()
    with new(tmp_path / "out") as writer:
        with pytest.raises(ShapeError, match="tensor 'nope' is not in the layout"):
            writer.write("nope", tensors["scale"])
        with pytest.raises(ShapeError, match=r"'scale': float64 \[\] arrived, expected float32 \[\] \(F32\)"):
            writer.write("scale", tensors["scale"].astype(np.float64))
        with pytest.raises(ShapeError, match=r"'a.weight_plane0': uint8 \[3, 6\] arrived, expected uint8 \[6, 3\]"):
            writer.write("a.weight_plane0", tensors["a.weight_plane0"].T)
        with pytest.raises(ShapeError, match="'scale': >f4"):
            writer.write("scale", tensors["scale"].astype(">f4"))
        writer.write_group("s", group("s"))
        with pytest.raises(OutputError, match="group 's' is already on disk"):
            writer.write_group("s", group("s"))
        with pytest.raises(OutputError, match="tensor 'scale' was already written"):
            writer.write("scale", tensors["scale"])
    with pytest.raises(OutputError, match="is closed: make a new OverlayWriter to resume"):
        writer.write("norm.weight", tensors["norm.weight"])


def test_config_and_tensors_must_agree(tmp_path: Path) -> None:
    specs = {name: spec for name, spec in tiny.TENSORS.items() if name != "a.weight_lut3"}
    with pytest.raises(FormatError, match=r"tensor 'a\.weight_lut3' is missing, the config says weight 'a\.weight'"):
        OverlayWriter(tmp_path / "out", specs, tiny.CONFIG)
    with pytest.raises(FormatError, match="quant_method None arrived"):
        OverlayWriter(tmp_path / "out", specs, {})
    with pytest.raises(OutputError, match="shard_bytes 0 arrived, expected at least 1"):
        new(tmp_path / "out", 0)
    with pytest.raises(OutputError, match=r"tensor name 'x\\ud800' cannot be stored"):
        OverlayWriter(tmp_path / "out", {**tiny.TENSORS, "x\ud800": TensorSpec("U8", (1,))}, tiny.CONFIG)
    assert not (tmp_path / "out").exists()


def test_no_space_is_found_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(1000, 900, 100))
    with pytest.raises(OutputError, match=r"needs \d+ more bytes, the disk has 100 free: free some"):
        new(tmp_path / "out")


def test_a_disk_that_fills_up_can_be_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = tiny.fingerprint(tiny.write(tmp_path / "whole", 200))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with new(tmp_path / "out") as writer:
        writer.write_group("s", group("s"))
        with monkeypatch.context() as patch:
            patch.setattr("everybit.formats.writer._write_at", full)
            with pytest.raises(
                OutputError, match=r"the disk is full, the overlay needs \d+ bytes in all: free some and"
            ):
                writer.write_group("a.weight", group("a.weight"))
        assert writer.done == {"s"}
    complete(tmp_path / "out")
    assert tiny.fingerprint(tmp_path / "out") == expected


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        new(tmp_path / "file" / "out")


def test_two_processes_do_not_share_a_folder(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SLOW_RUN, str(tmp_path / "out"), "10"], env=_environment(), stdout=subprocess.PIPE
    ) as other:
        assert other.stdout
        other.stdout.readline()
        try:
            with pytest.raises(OutputError, match="is being written by another run: wait for it"):
                new(tmp_path / "out")
        finally:
            other.kill()
    complete(tmp_path / "out")


SLOW_RUN = """
import sys, time, pathlib
from tests.unit import formats_tiny as tiny
from everybit.formats import OverlayWriter
tensors = tiny.arrays()
with OverlayWriter(pathlib.Path(sys.argv[1]), tiny.TENSORS, tiny.CONFIG, 200) as writer:
    print("open", flush=True)
    for key, names in tiny.GROUPS.items():
        if not writer.complete and key not in writer.done:
            writer.write_group(key, {name: tensors[name] for name in names})
            time.sleep(float(sys.argv[2]))
    writer.finish()
"""


def _environment() -> dict[str, str]:
    paths = [str(Path(tiny.__file__).parents[2]), *sys.path]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def test_kill_at_random_moments_gives_the_same_bytes(tmp_path: Path) -> None:
    expected = tiny.fingerprint(tiny.write(tmp_path / "whole", 200))
    rng = np.random.default_rng(0)
    killed = 0
    for _ in range(12):
        run = subprocess.Popen(
            [sys.executable, "-c", SLOW_RUN, str(tmp_path / "out"), "0.01"], env=_environment(), stdout=subprocess.PIPE
        )
        assert run.stdout
        run.stdout.readline()  # the writer is open: kill it somewhere in the 40 ms or so that follow
        time.sleep(float(rng.uniform(0, 0.05)))
        run.send_signal(signal.SIGKILL)
        killed += run.wait() != 0
        run.stdout.close()
    complete(tmp_path / "out")
    assert killed
    assert tiny.fingerprint(tmp_path / "out") == expected


def test_a_kill_at_every_step_of_finishing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every write, rename and removal of finish() in turn is the last thing a run does."""
    expected = tiny.fingerprint(tiny.write(tmp_path / "whole", 200))
    steps = 0
    while True:
        left = [steps]

        def step(real, left=left):  # type: ignore[no-untyped-def]
            def call(*args, **options):  # type: ignore[no-untyped-def]
                if not left[0]:
                    raise KeyboardInterrupt
                left[0] -= 1
                return real(*args, **options)

            return call

        folder = tmp_path / f"out{steps}"
        finished = False
        with new(folder) as writer, monkeypatch.context() as patch:
            for key in tiny.GROUPS:
                writer.write_group(key, group(key))
            patch.setattr("everybit.formats.writer._write_at", step(sys.modules[OverlayWriter.__module__]._write_at))
            patch.setattr(Path, "replace", step(Path.replace))
            patch.setattr(Path, "unlink", step(Path.unlink))
            patch.setattr("os.fsync", step(os.fsync))
            try:
                writer.finish()
                finished = True
            except KeyboardInterrupt:
                pass
        complete(folder)
        assert tiny.fingerprint(folder) == expected
        if finished:
            break
        steps += 1
    assert steps > 10


def test_a_disk_that_fills_up_inside_a_journal_line(tmp_path: Path) -> None:
    class Full:
        """The journal's file on a disk with room for five more bytes."""

        def __init__(self, file) -> None:  # type: ignore[no-untyped-def]
            self.file, self.left = file, 5

        def __getattr__(self, name: str):  # type: ignore[no-untyped-def]
            return getattr(self.file, name)

        def write(self, data: memoryview) -> int:
            if not self.left:
                raise OSError(errno.ENOSPC, "No space left on device")
            taken, self.left = self.left, 0
            return self.file.write(data[:taken])  # type: ignore[no-any-return]

    with new(tmp_path / "out") as writer:
        assert writer._journal
        whole = writer._journal._file
        writer._journal._file = Full(whole)  # type: ignore[assignment]
        with pytest.raises(OutputError, match="the disk is full"):
            writer.write_group("s", group("s"))
        writer._journal._file = whole  # room again
        writer.write_group("s", group("s"))
    with new(tmp_path / "out") as writer:
        assert writer.done == {"s"}
