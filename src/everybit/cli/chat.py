"""`everybit chat OVERLAY`: a conversation in the terminal, at any precision, which may change between two answers."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from everybit.cli.device import add_device_options, backend_of
from everybit.cli.options import add_machine_options, parse_bits
from everybit.errors import EverybitError, PrecisionError, SourceError

if TYPE_CHECKING:
    from everybit.batching.batcher import Batcher
    from everybit.batching.precision import Auto
    from everybit.engine.runtime import Runtime
    from everybit.tokenizer import Tokenizer

HELP = "/bits N|auto changes the precision, /new begins anew, /quit ends; Ctrl-C stops an answer"


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "chat", help="talk to a model in the terminal", description=f"Talk to a model in the terminal: {HELP}."
    )
    parser.add_argument("overlay", metavar="MODEL", help="folder made by everybit quantize, or a float model folder")
    parser.add_argument("--bits", default="auto", metavar="auto|N", help="precision (default auto)")
    parser.add_argument("--adapter", metavar="FOLDER", help="put a LoRA adapter that PEFT saved on every precision")
    parser.add_argument("--system", metavar="TEXT", help="instructions that stand before the conversation")
    parser.add_argument("--max-tokens", type=int, default=512, metavar="N", help="of an answer (default 512)")
    parser.add_argument("--temperature", type=float, default=0.7, metavar="T", help="default 0.7")
    parser.add_argument("--top-p", type=float, default=0.95, metavar="P", help="default 0.95")
    parser.add_argument("--seed", type=int, help="of the draws (default: another each time)")
    parser.add_argument("--context", type=int, metavar="N", help="room for so many tokens (default: the model's own)")
    add_machine_options(parser, "fast", "default: fast")
    add_device_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.max_tokens < 1:
        raise SourceError(f"--max-tokens {args.max_tokens}: expected 1 or more")
    if importlib.util.find_spec("jinja2") is None:
        raise SourceError("chatting needs jinja2, which is not installed: pip install 'everybit[serve]'")
    from everybit.batching.batcher import Batcher
    from everybit.engine.runtime import Runtime
    from everybit.engine.sampling import Sampling
    from everybit.server.template import ChatTemplate
    from everybit.tokenizer import Tokenizer

    Sampling(temperature=args.temperature, top_p=args.top_p, seed=args.seed or 0)  # or it is refused, at once
    backend = backend_of(args, "fast")
    mode = "default" if backend else args.mode
    with Runtime.open(
        args.overlay, threads=args.threads, mode=mode, context=args.context, adapter=args.adapter, backend=backend
    ) as runtime:
        conversation = Conversation(
            runtime, Batcher(runtime), Tokenizer.open(args.overlay), ChatTemplate.open(args.overlay), args
        )
        adapter = f", the adapter {args.adapter}" if args.adapter else ""
        print(f"everybit: {runtime.isa}, {conversation.precision()}{adapter}. {HELP}", file=sys.stderr)
        if conversation.template is None:
            print("everybit: the model has no chat template, so it goes on with what you write", file=sys.stderr)
        talk(conversation, _lines())
    return 0


class Conversation:
    """What was said, and how answers are made. The KV cache keeps what two turns have in common."""

    def __init__(
        self, runtime: Runtime, batcher: Batcher, tokenizer: Tokenizer, template: Any, args: argparse.Namespace
    ) -> None:
        self.runtime, self.batcher, self.tokenizer, self.template = runtime, batcher, tokenizer, template
        self._args = args
        self._turn = 0
        self.bits: int | Auto = 0
        self.set_bits(args.bits)
        self.begin()

    def begin(self) -> None:
        self.messages: list[dict[str, str]] = []
        if self._args.system:
            self.messages.append({"role": "system", "content": self._args.system})

    def set_bits(self, text: str) -> None:
        """Raises: PrecisionError"""
        from everybit.batching.precision import Auto
        from everybit.engine.generate import choose_bits

        have = self.runtime.bits
        if text == "auto":
            self.bits = Auto(min(have), max(have)) if have else 0
            return
        found = parse_bits(text)
        if len(found) != 1:
            raise PrecisionError(f"bits {text!r} arrived, expected auto or one precision")
        choose_bits(self.runtime, found[0])
        self.bits = found[0]

    def precision(self) -> str:
        if not self.runtime.bits:
            return "float weights"
        return (
            f"{self.bits} bits"
            if isinstance(self.bits, int)
            else f"auto, {self.bits.floor} to {self.bits.ceiling} bits"
        )

    def answer(self, text: str, show: Callable[[str], None]) -> str:
        """Says `text` and returns a line of figures about the answer, which goes through `show` as it comes.

        Raises: RequestError, ContextError; the conversation is then as it was
        """
        from everybit.batching.scheduler import Request
        from everybit.engine.sampling import Sampling

        said = [*self.messages, {"role": "user", "content": text}]
        if self.template is None:
            prompt = self.tokenizer.encode("".join(message["content"] for message in said))
        else:
            prompt = self.tokenizer.encode(self.template.render(said), add_special_tokens=False)
        args, self._turn = self._args, self._turn + 1
        seed = args.seed if args.seed is not None else int.from_bytes(os.urandom(7), "little")
        sampling = Sampling(temperature=args.temperature, top_p=args.top_p, seed=seed)
        more = max(1, min(args.max_tokens, self.runtime.context - len(prompt)))
        begin, stream = time.perf_counter(), self.tokenizer.stream(prompt[-8:])
        self.batcher.submit(Request(self._turn, tuple(prompt), more, self.bits), sampling, self.tokenizer.eos_ids)
        pieces: list[str] = []
        counts: dict[Any, int] = {}
        first = 0.0
        try:
            while self.batcher.busy:
                for event in self.batcher.step():
                    first = first or time.perf_counter() - begin
                    if event.problem:
                        raise EverybitError(event.problem)
                    if event.token is not None:
                        counts[event.bits] = counts.get(event.bits, 0) + 1
                        pieces.append(stream.add(event.token))
                        show(pieces[-1])
        except KeyboardInterrupt:
            self.batcher.cancel(self._turn)
        pieces.append(stream.finish())
        show(pieces[-1])
        self.messages = [*said, {"role": "assistant", "content": "".join(pieces)}]
        seconds, tokens = time.perf_counter() - begin - first, sum(counts.values())
        by_bits = (
            ", ".join(f"{n} at {bits} bits" for bits, n in counts.items()) if self.runtime.bits else f"{tokens} tokens"
        )
        rate = f", {(tokens - 1) / seconds:.1f} tokens/s" if tokens > 1 else ""
        return f"{by_bits or 'nothing'}, first after {first:.2f} s{rate}"


def talk(conversation: Conversation, lines: Iterator[str]) -> None:
    for line in lines:
        word, _, rest = line.strip().partition(" ")
        try:
            if word == "/quit":
                return
            if word == "/new":
                conversation.begin()
            elif word == "/bits":
                conversation.set_bits(rest.strip())
                print(f"everybit: {conversation.precision()}", file=sys.stderr)
            elif word.startswith("/"):
                print(f"everybit: {word} is unknown: {HELP}", file=sys.stderr)
            elif line.strip():
                figures = conversation.answer(line.rstrip("\n"), lambda piece: print(piece, end="", flush=True))
                print()
                print(f"everybit: {figures}", file=sys.stderr)
        except EverybitError as error:
            print(f"everybit: error: {error}", file=sys.stderr)
        except KeyboardInterrupt:  # while an answer was prepared
            print(file=sys.stderr)


def _lines() -> Iterator[str]:
    """What is typed, until the end of the input."""
    if sys.stdin.isatty() and importlib.util.find_spec("readline"):
        importlib.import_module("readline")  # lets input() edit lines
    while True:
        try:
            yield input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        except KeyboardInterrupt:
            print(file=sys.stderr)
