"""Original Any-Precision checkpoints: imported bit for bit from their layout; hostile pickles are refused."""

from __future__ import annotations

import json
import time
import zipfile
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import everybit
from everybit.engine.runtime import Runtime
from everybit.errors import FormatError, SourceError
from everybit.formats import Overlay
from everybit.integrations.anyprec import import_anyprec, unpermute
from everybit.integrations.torch_pickle import TorchFile
from everybit.kernels import unpack_codes

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "anyprec": {"seed_precision": 3, "parent_precision": 5, "group_count": 1},
}


def permuted(codes: NDArray[np.uint8], planes: int) -> NDArray[np.int32]:
    """`qweight` of codes [N, K], weight by weight: the thread, the word and the bit that the original gives each."""
    rows, columns = codes.shape
    words = np.zeros((planes, rows, columns // 32), np.uint32)
    for k in range(columns):
        run, within = divmod(k, 1024)
        threads = 32 if (run + 1) * 1024 <= columns else columns % 1024 // 32
        quarter, thread = divmod(within // 8, threads)
        bit = (3 - quarter) * 8 + 7 - k % 8
        for plane in range(planes):
            value = codes[:, k].astype(np.uint32) >> (planes - 1 - plane) & 1
            words[plane, :, run * 32 + thread] |= value << np.uint32(bit)
    return words.view(np.int32)


def checkpoint(folder: Path, shape: tuple[int, int] = (6, 1120), **extra: Any) -> dict[str, Any]:
    """Writes a checkpoint of one weight, and returns what it holds."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 32, shape, np.uint8)
    luts = {b: rng.normal(size=(shape[0], 1 << b)).astype(np.float16) for b in (3, 4, 5)}
    state = OrderedDict({"model.embed_tokens.weight": torch.randn(7, 4).bfloat16(), "m.0.bias": torch.ones(3).half()})
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    state["m.0.rotary_emb.inv_freq"] = torch.ones(2)
    state["m.0.q.qweight"] = torch.from_numpy(permuted(codes, 5))
    for b, lut in luts.items():
        state[f"m.0.q.lut{b}"] = torch.from_numpy(lut)
    state |= extra
    state = OrderedDict((name, tensor) for name, tensor in state.items() if tensor is not None)
    folder.mkdir()
    torch.save(state, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return {"codes": codes, "luts": luts, "embedding": state["model.embed_tokens.weight"]}


@pytest.mark.parametrize("columns", [32, 96, 1024, 1120, 2048 + 32])
def test_planes_come_out_of_the_warps_order(columns: int) -> None:
    codes = np.random.default_rng(columns).integers(0, 256, (3, columns), np.uint8)
    assert np.array_equal(unpack_codes(unpermute(permuted(codes, 8)), columns), codes)


def test_codes_and_tables_are_imported_bit_for_bit(tmp_path: Path) -> None:
    wanted = checkpoint(tmp_path / "original")
    report = import_anyprec(tmp_path / "original", tmp_path / "out", CONFIG)
    assert (report.format, report.weights) == ("Any-Precision", 1)
    with Overlay.open(tmp_path / "out") as overlay:
        overlay.verify_all()
        assert overlay.bits == (3, 4, 5)
        for b in overlay.bits:
            codes = unpack_codes(overlay.planes("m.0.q.weight", b), 1120)
            assert np.array_equal(codes, wanted["codes"] >> (5 - b))
            assert np.array_equal(overlay.codebook("m.0.q.weight", b)[f"lut{b}"], wanted["luts"][b])
        # The tied head is stored once, the rotary table not at all; bfloat16 keeps its bits.
        assert overlay.plain_names() == ["m.0.bias", "model.embed_tokens.weight"]
        bits = wanted["embedding"].view(torch.uint16).numpy()
        assert np.array_equal(overlay.tensor("model.embed_tokens.weight"), bits)
        assert "anyprec" not in overlay.config


def test_a_whole_model_runs_as_its_overlay_does(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=160, num_hidden_layers=1, num_attention_heads=4,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "float")
    everybit.quantize(tmp_path / "float", tmp_path / "ours", bits=(3, 4, 5), codebook="table", progress=False)
    state: dict[str, Any] = {}
    with Overlay.open(tmp_path / "ours") as ours:
        for name in ours.plain_names():
            state[name] = torch.tensor(ours.tensor(name))
        for name, spec in ours.weights.items():
            module = name.removesuffix(".weight")
            codes = unpack_codes(ours.planes(name, 5), spec.columns)
            state[f"{module}.qweight"] = torch.from_numpy(permuted(codes, 5))
            for b in ours.bits:
                state[f"{module}.lut{b}"] = torch.tensor(ours.codebook(name, b)[f"lut{b}"])
    original = tmp_path / "original"
    original.mkdir()
    torch.save(state, original / "pytorch_model.bin")
    document = {**json.loads((tmp_path / "float" / "config.json").read_text()), "anyprec": CONFIG["anyprec"]}
    import_anyprec(original, tmp_path / "theirs", document)
    with (
        Runtime.open(tmp_path / "ours", threads=1) as ours_run,
        Runtime.open(tmp_path / "theirs", threads=1) as theirs_run,
    ):
        for b in (3, 4, 5):
            assert np.array_equal(ours_run.prefill(0, [1, 2, 3], b), theirs_run.prefill(0, [1, 2, 3], b))
            ours_run.reset(0)
            theirs_run.reset(0)


class Evil:
    """Pickles as a call of a function with arguments."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("function", [open, exec, np.save, __import__])
def test_a_pickle_that_would_write_a_file_is_refused(tmp_path: Path, function: Any) -> None:
    target = tmp_path / "written"
    arguments = {open: (str(target), "w"), exec: (f"open({str(target)!r}, 'w')",), np.save: (str(target), 0)}
    checkpoint(tmp_path / "original", evil=Evil(function, *arguments.get(function, ("this",))))
    if function is open:  # it is no empty threat
        torch.load(tmp_path / "original" / "pytorch_model.bin", weights_only=False)
        assert target.exists()
        target.unlink()
    with pytest.raises(
        SourceError, match=r"its pickle asks for .*; expected a dictionary of tensors .* nothing was run"
    ):
        import_anyprec(tmp_path / "original", tmp_path / "out", CONFIG)
    assert {p.name for p in tmp_path.iterdir()} == {"original"}


def rewrite(path: Path, change: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> None:
    """The same archive with other members."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    root = next(iter(members)).split("/")[0]
    members |= {f"{root}/{name}": data for name, data in change.items()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def text(value: str) -> bytes:
    return b"X" + len(value).to_bytes(4, "little") + value.encode()


def storage(kind: bytes = b"ByteStorage", key: bytes = text("0")) -> bytes:
    return b"(" + text("storage") + b"ctorch\n" + kind + b"\n" + key + text("cpu") + b"K\x01tQ"


def tensor(shape: bytes = b"K\x01\x85", strides: bytes = b"K\x01\x85", of: bytes = storage()) -> bytes:
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + of + b"K\x00" + shape + strides + b"tR"


# In pickle's own words: what would write past a storage, run code, or never end; and things that are no tensors.
WIDE = b"}" + text("shape") + b"M\x00\x10\x85s"  # 4096 numbers
SHARED = b")q\x00" + b"h\x00h\x00\x86q\x00" * 27  # what takes seconds to look through
PROGRAMS = {
    "memo": (b"}r\xff\xff\xff\xff.", "no tensor named"),
    "build tensor": (b"}" + text("a") + tensor() + WIDE + b"bs.", "sets attributes of a TensorRef"),
    "build storage": (storage() + b"}" + text("numbers") + b"K\x09sb.", "sets attributes of a _Storage"),
    "build function": (b"ctorch._utils\n_rebuild_tensor_v2\n}b.", "sets attributes of a function"),
    "function": (b"ctorch\nload\n.", "asks for 'torch load'"),
    "dotted": (b"ctorch._utils\n_rebuild_tensor_v2.__globals__\n.", "asks for 'torch._utils _rebuild_tensor_v2.__gl"),
    "call text": (b"ctorch\nByteStorage\n)R.", "calls a str"),
    "call with items": (b"ccollections\nOrderedDict\n}\x85R.", "calls a type"),
    "call with nothing": (b"ctorch._utils\n_rebuild_tensor_v2\n)R.", "calls a function"),
    "object": (b"(ccollections\nOrderedDict\no.", "instruction OBJ"),
    "instance": (b"(icollections\nOrderedDict\n.", "instruction INST"),
    "new object": (b"ccollections\nOrderedDict\n)\x81.", "instruction NEWOBJ"),
    "new object with names": (b"ccollections\nOrderedDict\n)}\x92.", "instruction NEWOBJ_EX"),
    "stacked global": (text("torch") + text("load") + b"\x93.", "instruction STACK_GLOBAL"),
    "extension": (b"\x82\x01.", "instruction EXT1"),
    "text id": (b"P0\n.", "instruction PERSID"),
    "append": (b"]K\x01a.", "instruction EMPTY_LIST"),
    "copy": (b")2\x86.", "instruction DUP"),
    "bytes": (b"C\x01a.", "instruction SHORT_BINBYTES"),
    "none": (b"N.", "instruction NONE"),
    "float": (b"G" + b"\0" * 8 + b".", "instruction BINFLOAT"),
    "key": (b"}K\x01K\x01s.", "no item of a dictionary named by text"),
    "item of a tensor": (tensor() + text("a") + b"K\x01s.", "no item of a dictionary"),
    "odd items": (b"}(" + text("a") + b"u.", "no item of a dictionary"),
    "key of a storage": (storage(key=b"K\x01") + b".", "refers to"),
    "shape of text": (tensor(shape=text("a")) + b".", "tensor of shape 'a'"),
    "negative": (tensor(strides=b"J\xff\xff\xff\xff\x85") + b".", r"strides \(-1,\)"),
    "past": (tensor(shape=b"K\x02\x85") + b".", r"\(2,\), strides \(1,\), passes its 1 numbers"),
    "too little": (b"\x86.", "takes more than it has"),
    "tuple": (b"K\x01K\x02\x86.", "holds a tuple, expected a dictionary of tensors"),
    "number": (b"}" + text("a") + b"K\x01s.", "'a' is a int, expected a tensor"),
    "unfinished": (b"}", "pickle exhausted"),
    "empty": (b"", "pickle exhausted before seeing STOP; expected a dictionary"),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_other_programs_are_refused(tmp_path: Path, name: str) -> None:
    program, wanted = PROGRAMS[name]
    checkpoint(tmp_path / "original", (2, 32))
    rewrite(tmp_path / "original" / "pytorch_model.bin", {"data.pkl": b"\x80\x02" + program})
    with pytest.raises(SourceError, match=wanted):
        import_anyprec(tmp_path / "original", tmp_path / "out", CONFIG)


@pytest.mark.parametrize(
    "program",
    [b"}" + SHARED + b"K\x01s.", SHARED + b"Q.", storage(key=SHARED) + b".", tensor(shape=SHARED) + b"."],
    ids=["key", "id", "key of a storage", "shape"],
)
def test_a_hundred_bytes_cannot_hold_the_reader_up(tmp_path: Path, program: bytes) -> None:
    checkpoint(tmp_path / "original", (2, 32))
    rewrite(tmp_path / "original" / "pytorch_model.bin", {"data.pkl": b"\x80\x02" + program})
    begin = time.process_time()
    with pytest.raises(SourceError, match="its pickle"):
        import_anyprec(tmp_path / "original", tmp_path / "out", CONFIG)
    assert time.process_time() - begin < 0.5


def test_a_state_dict_with_metadata_is_read(tmp_path: Path) -> None:
    layer = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1, bias=False))
    state = layer.state_dict()
    assert state._metadata  # type: ignore[attr-defined]
    state["view"] = state["0.weight"].T[1:]
    torch.save(state, tmp_path / "state.bin")
    with TorchFile(tmp_path, "state.bin") as file:
        assert list(file.tensors) == list(state)
        for name, wanted in state.items():
            assert np.array_equal(file.read(name), wanted.numpy())


def test_bounds_are_checked_again_when_a_tensor_is_read(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(3)}, tmp_path / "state.bin")
    with TorchFile(tmp_path, "state.bin") as file:
        file.tensors["a"] = replace(file.tensors["a"], shape=(4096,))
        with pytest.raises(SourceError, match="passes its 3 numbers"):
            file.read("a")


def test_strides_that_are_never_taken_may_be_anything(tmp_path: Path) -> None:
    torch.save({"a": torch.arange(3, dtype=torch.uint8)}, tmp_path / "state.bin")
    endless = b"\x8a\x0a" + b"\xff" * 9 + b"\x00"  # 2^72 - 1
    of = storage().replace(b"K\x01tQ", b"K\x03tQ")
    for shape, wanted in ((b"K\x01", [0]), (b"K\x00", [])):
        program = b"\x80\x02}" + text("a") + tensor(shape + b"\x85", endless + b"\x85", of) + b"s."
        rewrite(tmp_path / "state.bin", {"data.pkl": program})
        with TorchFile(tmp_path, "state.bin") as file:
            assert file.read("a").tolist() == wanted


def test_lying_archives_are_refused(tmp_path: Path) -> None:
    def attempt(name: str, wanted: str, change: Any = None, **extra: Any) -> None:
        checkpoint(tmp_path / name, (2, 32), **extra)
        if change is not None:
            change(tmp_path / name / "pytorch_model.bin")
        with pytest.raises((SourceError, FormatError), match=wanted):
            import_anyprec(tmp_path / name, tmp_path / "out", CONFIG)
        assert not (tmp_path / "out").exists()
        assert not (tmp_path / "out.partial").exists()

    attempt("short", "data/0.* has 3 plain bytes, expected 56", lambda p: rewrite(p, {"data/0": b"abc"}))
    attempt("deflated", "no plain bytes", lambda p: rewrite(p, {}, zipfile.ZIP_DEFLATED))
    attempt("big-endian", "not little-endian", lambda p: rewrite(p, {"byteorder": b"big"}))
    attempt("no-zip", "no zip archive", lambda p: p.write_bytes(b"\x80\x02}q\x00."))
    attempt("no-file", "is missing", lambda p: p.unlink())
    attempt("no-lut", "lut4' is None, expected F16", **{"m.0.q.lut4": None})
    attempt(
        "lut-shape", r"lut4' is \('F16', \(2, 8\)\), expected F16 \[2, 16\]", **{"m.0.q.lut4": torch.ones(2, 8).half()}
    )
    attempt("not-finite", "not finite", **{"m.0.q.lut4": torch.full((2, 16), torch.inf).half()})
    attempt("no-weight", r"no tensor named \*\.qweight", **{"m.0.q.qweight": None})
    attempt(
        "plane",
        r"holds a tensor 'm\.0\.q\.weight_plane0', which is the name of a plane or table of 'm\.0\.q\.weight'",
        **{"m.0.q.weight_plane0": torch.ones(1)},
    )
    with pytest.raises(SourceError, match=r"quantization_config .*'gptq'.* arrived beside it, expected one of them"):
        import_anyprec(
            tmp_path / "short", tmp_path / "out", {**CONFIG, "quantization_config": {"quant_method": "gptq"}}
        )
    with pytest.raises(SourceError, match="group_count 4 arrived, expected 1"):
        import_anyprec(tmp_path / "short", tmp_path / "out", {"anyprec": {**CONFIG["anyprec"], "group_count": 4}})


def test_strides_that_repeat_without_end_are_refused(tmp_path: Path) -> None:
    checkpoint(tmp_path / "original", (2, 32), wide=torch.ones(1).expand(1 << 40))
    with pytest.raises(SourceError, match=r"a tensor \(1099511627776,\), strides \(0,\), passes its 1 numbers"):
        import_anyprec(tmp_path / "original", tmp_path / "out", CONFIG)
