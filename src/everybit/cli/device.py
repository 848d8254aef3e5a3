"""`--device`: a model on an NVIDIA GPU instead of this machine's processors. The only way from commands to torch."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from everybit.errors import SourceError

if TYPE_CHECKING:
    from everybit.engine.runtime import Backend

_OF_PROCESSORS = ("threads", "pin", "isa")


def add_device_options(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--device", default="cpu", metavar="cpu|cuda[:N]", help="default cpu; cuda needs everybit[gpu]")
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), help="of products on a GPU (default float16)")
    parser.add_argument("--most-bits", type=int, metavar="N", help="load no planes beyond N bits into a GPU's memory")


def backend_of(args: argparse.Namespace, mode: str) -> Callable[..., Backend] | None:
    """What `Runtime.open` makes the model run on; None: the processors. `mode`: the command's default.

    Raises: SourceError for options that do not go together, or without torch; ModelError where there is no such GPU
    """
    if args.device == "cpu":
        for name in ("dtype", "most_bits"):
            if getattr(args, name) is not None:
                raise SourceError(f"--{name.replace('_', '-')} {getattr(args, name)}: goes with --device cuda")
        return None
    given = [name for name in _OF_PROCESSORS if getattr(args, name, None)]
    if args.mode != mode:
        given.append("mode")
    if given:
        raise SourceError(f"--{given[0]} is of the processors: leave it out with --device {args.device}")
    if importlib.util.find_spec("torch") is None:
        raise SourceError(f"--device {args.device} needs torch, which is not installed: pip install 'everybit[gpu]'")
    from everybit.gpu.engine import Device, open_device

    open_device(args.device)
    return partial(Device, device=args.device, dtype=args.dtype or "float16", most_bits=args.most_bits)
