"""What the engine promises about files and memory: few planes are few pages, bounded memory, no crash on cut files; and
that a user's mistakes end in one line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import everybit
from everybit.cli.main import main
from everybit.engine.runtime import Runtime
from everybit.errors import ContextError, ModelError, PrecisionError
from tests.conftest import REPOSITORY

PAGE = os.sysconf("SC_PAGE_SIZE")
FAULT_AROUND_BYTES = 64 << 10  # Linux maps the pages beside a fault that it has in memory anyway, up to so many
SLACK_BYTES = 150 << 20  # the interpreter, numpy, buffers of a step


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An overlay whose planes are hundreds of pages: a random Llama, 3 layers of width 1024 (50 M weights)."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("wide")
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=256,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).half().save_pretrained(folder / "float")
    everybit.quantize(folder / "float", folder / "overlay", bits=(2, 4, 8), solver="uniform", progress=False)
    shutil.rmtree(folder / "float")
    return folder / "overlay"


def python(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=False)


# The share of each plane's pages that this process has mapped, by /proc/self/pagemap (bit 63: present).
PAGES_SCRIPT = """
import json, sys
import numpy as np
from everybit.engine.runtime import Runtime

folder, bits, page = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
with Runtime.open(folder, threads=1) as runtime:
    runtime.prefill(0, [1, 2, 3], bits)
    runtime.decode([4], bits)
    overlay, shares = runtime.checkpoint.overlay, [[] for _ in range(8)]
    with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
        for spec in overlay.weights.values():
            for plane in range(spec.planes):
                view = overlay.mapped(spec.plane_name(plane))
                first, last = view.ctypes.data // page + 1, (view.ctypes.data + view.nbytes) // page  # whole pages
                pagemap.seek(first * 8)
                entries = np.frombuffer(pagemap.read((last - first) * 8), np.uint64)
                shares[plane].append([int((entries >> np.uint64(63)).sum()) * page, view.nbytes])
print(json.dumps(shares))
"""


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_precision_reads_its_planes_only(wide: Path, bits: int) -> None:
    done = python(PAGES_SCRIPT, wide, bits, PAGE)
    assert done.returncode == 0, done.stderr
    for plane, tensors in enumerate(json.loads(done.stdout)):
        for mapped, size in tensors:
            if plane < bits:
                assert mapped >= size - 2 * PAGE, f"plane {plane}"
            else:  # pages at one end, beside those of a neighbour in the file
                assert mapped <= FAULT_AROUND_BYTES < size, f"plane {plane}: {mapped} of {size} bytes"


RSS_SCRIPT = """
import json, sys
from everybit.engine.runtime import Runtime

folder, bits = sys.argv[1], int(sys.argv[2])
with Runtime.open(folder, threads=2) as runtime:
    runtime.prefill(0, list(range(200)), bits)
    for _ in range(3):
        runtime.decode([4], bits)
    overlay = runtime.checkpoint.overlay
    touched = sum(overlay.spec_of(name).nbytes for name in overlay.touched)
    known = touched + runtime.native.table_bytes + runtime.native.kv_bytes
    peak = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps({"known": known, "peak": peak, "weights": sum(w.parameters for w in overlay.weights.values())}))
"""


@pytest.mark.parametrize("bits", [2, 8])
def test_peak_memory(wide: Path, bits: int) -> None:
    done = python(RSS_SCRIPT, wide, bits)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["peak"] < found["known"] + SLACK_BYTES
    assert found["weights"] * 4 > SLACK_BYTES  # dense float32 weights would not fit: the bound can fail


CUT_SCRIPT = """
import os, sys
from pathlib import Path
from everybit.engine.runtime import Runtime
from everybit.errors import FormatError

folder, keep, verify = Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3] == "verify"
first, then = (int(bits) for bits in sys.argv[4:6])
with Runtime.open(folder, threads=2, verify=verify) as runtime:
    runtime.prefill(0, [1, 2, 3], first)
    path = folder / "model.safetensors"
    os.truncate(path, int(path.stat().st_size * keep))
    for _ in range(int(sys.argv[6])):
        try:
            runtime.decode([5], then)
            print("no error")
        except FormatError as error:
            print(type(error).__name__, str(error).replace(chr(10), "|"))
"""


@pytest.mark.parametrize("verify", ["verify", "trust"])
@pytest.mark.parametrize(("first", "then"), [(4, 4), (8, 8), (2, 8)])
@pytest.mark.parametrize("keep", [0.0, 0.3, 0.8])
def test_a_file_cut_short_under_a_running_model(
    wide: Path, tmp_path: Path, keep: float, first: int, then: int, verify: str
) -> None:
    shutil.copytree(wide, tmp_path / "overlay")
    done = python(CUT_SCRIPT, tmp_path / "overlay", keep, verify, first, then, 1)
    assert done.returncode == 0, f"ended with {done.returncode}: {done.stderr}"
    (line,) = done.stdout.splitlines()
    assert line.startswith(("FormatError", "ChecksumError")), line


def test_a_cut_file_stays_refused(wide: Path, tmp_path: Path) -> None:
    shutil.copytree(wide, tmp_path / "overlay")
    done = python(CUT_SCRIPT, tmp_path / "overlay", 0.3, "verify", 4, 4, 3)
    assert done.returncode == 0, f"ended with {done.returncode}: {done.stderr}"
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["FormatError"] * 3


def test_the_command_says_it_in_one_line(wide: Path, tmp_path: Path) -> None:
    """As a user meets it: the file is cut while `everybit generate` runs."""
    shutil.copytree(wide, tmp_path / "overlay")
    shutil.copy(REPOSITORY / "examples" / "models" / "prose-10m" / "tokenizer.json", tmp_path / "overlay")
    script = (
        "import os, sys\n"
        "from everybit.cli.main import main\n"
        "from everybit.engine import generate\n"
        "original = generate.Generation.__next__\n"
        "def cut(self):\n"
        "    if len(self.tokens) == 3:\n"
        "        os.truncate(os.path.join(sys.argv[1], 'model.safetensors'), 1000)\n"
        "    return original(self)\n"
        "generate.Generation.__next__ = cut\n"
        "sys.exit(main(['generate', sys.argv[1], '--prompt', '\\n', '--max-tokens', '20', '--threads', '2']))\n"
    )
    done = python(script, tmp_path / "overlay")
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith("everybit: error: ")
    assert "was cut short while it was in use: restore the file" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_context_is_a_limit(tiny_llama: Path) -> None:
    with Runtime.open(tiny_llama, threads=1, context=10) as runtime:
        with pytest.raises(ContextError, match="11 more make 11, the context is 10: shorten the text"):
            runtime.prefill(0, list(range(11)))
        runtime.prefill(0, list(range(10)))
        with pytest.raises(ContextError, match="10 tokens in sequence 0 and 1 more make 11"):
            runtime.decode([1])
        runtime.reset(0, 4)
        assert np.isfinite(runtime.decode([1])).all()
    with pytest.raises((ContextError, ModelError), match="context of 129"):
        Runtime.open(tiny_llama, context=129)


@pytest.mark.parametrize("token", [-1, 258, 2**40])
def test_tokens_out_of_range(tiny_llama: Path, token: int) -> None:
    with Runtime.open(tiny_llama, threads=1) as runtime:
        for call in (lambda: runtime.prefill(0, [1, token]), lambda: runtime.decode([token])):
            with pytest.raises(ModelError, match=f"token {token} arrived, the model knows 0 to 257"):
                call()
        with pytest.raises(ModelError, match="expected a list of at least one"):
            runtime.prefill(0, [])


def test_precisions_that_are_not_there(wide: Path, tiny_llama: Path) -> None:
    with Runtime.open(wide, threads=1) as runtime, pytest.raises(PrecisionError, match="bits 3 asked, the overlay has"):
        runtime.prefill(0, [1], 3)
    with (
        Runtime.open(tiny_llama, threads=1) as runtime,
        pytest.raises(PrecisionError, match="quantize the model first"),
    ):
        runtime.prefill(0, [1], 3)


def test_threads_and_instruction_sets(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for threads in (-1, 1000):
        with pytest.raises(ModelError, match=f"^{threads} threads arrived, expected 0 .one per processor. to "):
            Runtime.open(tiny_llama, threads=threads)
    monkeypatch.setenv("EVERYBIT_ISA", "foo")
    with pytest.raises(ModelError, match=r"instruction set 'foo' arrived .as an argument or in EVERYBIT_ISA.*scalar"):
        Runtime.open(tiny_llama)
    monkeypatch.setenv("EVERYBIT_ISA", "scalar")
    with Runtime.open(tiny_llama) as runtime:
        assert runtime.isa == "scalar"


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main([str(argument) for argument in arguments]) == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_an_architecture_the_engine_does_not_have(tiny_llama: Path, tmp_path: Path, capsys: Any) -> None:
    shutil.copytree(tiny_llama, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config |= {"architectures": ["FalconForCausalLM"], "model_type": "falcon"}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    line = refused(capsys, "generate", tmp_path / "model", "--prompt", "x")
    assert "architecture 'FalconForCausalLM' arrived, the engine has LlamaForCausalLM, " in line
    assert "run it with transformers instead" in line


def _break_mlp(tensors: dict[str, Any]) -> str:
    tensors["model.layers.1.mlp.down_proj.weight"][5, 7] = float("nan")
    return "model.layers.1.mlp.down_proj.weight"


def _break_norm(tensors: dict[str, Any]) -> str:
    tensors["model.layers.0.post_attention_layernorm.weight"][3] = float("inf")
    return "model.layers.0.post_attention_layernorm.weight"


@pytest.mark.parametrize("change", [_break_mlp, _break_norm])
@pytest.mark.parametrize("mode", ["exact", "default"])
def test_a_broken_weight_is_named(
    change: Callable[[dict[str, Any]], str], mode: str, tiny_llama: Path, tmp_path: Path, capsys: Any
) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny_llama, tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    name = change(tensors)
    save_file(tensors, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    arguments = ("generate", tmp_path / "model", "--prompt", "abc", "--threads", 1, "--mode", mode)
    line = refused(capsys, *arguments)
    assert "holds a number that is not finite: --debug-numerics" in line
    line = refused(capsys, *arguments, "--debug-numerics")
    assert name in line
    assert "is not finite" in line


def test_generate_imports_neither_torch_nor_transformers() -> None:
    """The whole command, also where both are installed."""
    prose = REPOSITORY / "examples" / "models" / "prose-10m"
    script = (
        "import sys; from everybit.cli.main import main\n"
        "code = main(['generate', sys.argv[1], '--prompt', 'Once', '--max-tokens', '2'])\n"
        "heavy = ('torch', 'transformers', 'matplotlib', 'safetensors', 'huggingface_hub')\n"
        "print([m for m in heavy if m in sys.modules]); sys.exit(code)"
    )
    done = python(script, prose)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "[]"), done.stderr


def test_eval_imports_neither_torch_nor_transformers(wide: Path, tmp_path: Path) -> None:
    shutil.copytree(wide, tmp_path / "overlay")
    shutil.copy(REPOSITORY / "examples" / "models" / "prose-10m" / "tokenizer.json", tmp_path / "overlay")
    (tmp_path / "text.txt").write_text("\t\t" * 4 + "a")
    script = (
        "import sys; from everybit.cli.main import main\n"
        "code = main(['eval', sys.argv[1], '--text', sys.argv[2], '--bits', '2', '--context', '4'])\n"
        "print([m for m in ('torch', 'transformers', 'matplotlib') if m in sys.modules]); sys.exit(code)"
    )
    done = python(script, tmp_path / "overlay", tmp_path / "text.txt")
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "[]"), done.stderr
