"""Constrained decoding by llguidance: which tokens may come next, for JSON, a schema, a regex or a Lark grammar.

    grammars = Grammars(tokenizer_json, vocabulary, eos_ids)
    constraint = grammars.json_schema(schema).start()      # one for each sequence
    while not constraint.complete:
        constraint.limit(logits)
        constraint.accept(token := ...)                    # at a token of eos_ids the sequence ends

What a client sends is compiled twice: first in a process of its own (`_Guard`) that may take so much processor time
and memory and may crash. Conjunctions of regexes, for one, take llguidance exponential time (1.9: sixteen patterns in
an allOf, a second; twenty-four, minutes), which its own limits do not see.

A Grammars or Grammar may be used by many threads; a Constraint by one at a time (llguidance raises where two meet).
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import subprocess
import sys
import threading
import weakref
from collections import OrderedDict
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import IO, Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from everybit.errors import ModelError, RequestError, ShapeError, SourceError, reason

if __name__ != "__main__":  # the guard's process starts in half the time without them
    import numpy as np
    from numpy.typing import NDArray
    from tokenizers import Tokenizer as Backend

SCHEMA_BYTES_LIMIT = 64 * 1024
SCHEMA_DEPTH_LIMIT = 64
TEXT_BYTES_LIMIT = 16 * 1024
TOOLS_BYTES_LIMIT = 512 * 1024  # a grammar of tools.py: schemas that were checked one by one
GUARD_SECONDS = 0.15  # of processor time, however busy the machine is
GUARD_BYTES = 2 << 30
_GUARD_PATIENCE = 20.0  # seconds on the clock, for a machine that is very busy
_CACHED = 64
_END = "<|everybit_end|>"  # llguidance's end of text, a token of no model
# No more than a well-indented document has: small models write spaces without end where they may.
_WHITESPACE = r"[\x20\x0A\x0D\x09]{1,40}"
_ENDED = ("NoExtension", "NoExtensionBias", "EndOfSentence")


class Grammars:
    """Compiles grammars for one model. `vocabulary`: how many logits it gives; `eos_ids`: the tokens it stops at.

    Cost: half a second for 50 k tokens, and a process of some 20 MB that waits; `close` ends it, as does our own end
    Raises: SourceError (llguidance cannot read the tokenizer)
    """

    def __init__(self, tokenizer_json: str, vocabulary: int, eos_ids: Collection[int] = ()) -> None:
        self.vocabulary = vocabulary
        self.eos_ids = tuple(sorted(one for one in eos_ids if 0 <= one < vocabulary))
        try:
            backend = Backend.from_str(tokenizer_json)
            backend.no_truncation()
            backend.no_padding()
            backend.add_special_tokens([_END])
            self.end = int(backend.get_vocab(with_added_tokens=True)[_END])
            rows = max(vocabulary, backend.get_vocab_size())
            self.tokenizer = LLTokenizer(backend.to_str(), n_vocab=rows, eos_token=[self.end])
        except BaseException as error:  # a panic of the library is no Exception
            if isinstance(error, (KeyboardInterrupt, SystemExit, MemoryError)):
                raise
            raise SourceError(
                f"the tokenizer cannot be used for constrained decoding ({reason(error)}): it needs a ByteLevel or "
                "ByteFallback decoder"
            ) from None
        special = [i for i in range(rows) if self.tokenizer.is_special_token(i)]
        names = {i: str(backend.id_to_token(i) or f"<[{i}]>") for i in special}
        self.named_eos = tuple(i in names for i in self.eos_ids)
        self._guard = _Guard(rows, names, self.end)
        self._lock = threading.Lock()
        self._cache: OrderedDict[str, LLMatcher] = OrderedDict()
        self.limits = _limits()

    def json_object(self) -> Grammar:
        """Any JSON object."""
        return self.json_schema({"type": "object"})

    def json_schema(self, schema: Mapping[str, Any], parameter: str = "response_format") -> Grammar:
        """JSON valid by `schema` (Draft 2020-12, what llguidance knows of it: the rest is refused).

        Raises: RequestError
        """
        text = check_schema(schema, parameter)
        try:
            grammar = LLMatcher.grammar_from_json_schema(text, defaults={"whitespace_pattern": _WHITESPACE})
        except ValueError as error:
            raise RequestError(parameter, f"holds a schema that cannot be used: {_line(reason(error))}") from None
        return self._compile(grammar, parameter)

    def regex(self, pattern: str) -> Grammar:
        """Text that `pattern` matches as a whole; Rust's syntax, without look-around and back-references.

        Raises: RequestError
        """
        return self._compile(LLMatcher.grammar_from_regex(_text(pattern, "regex")), "regex")

    def lark(self, text: str) -> Grammar:
        """Text of a grammar in llguidance's dialect of Lark.

        Raises: RequestError
        """
        return self._compile(LLMatcher.grammar_from_lark(_text(text, "grammar")), "grammar")

    def tools(self, text: str) -> Grammar:
        """A grammar that tools.py wrote; what is wrong with it is wrong with a tool's `parameters`.

        Raises: RequestError
        """
        return self._compile(LLMatcher.grammar_from_lark(_text(text, "tools", TOOLS_BYTES_LIMIT)), "tools")

    def close(self) -> None:
        """End the waiting process; whatever compiles later starts it again."""
        self._guard.close()

    def _compile(self, grammar: str, parameter: str) -> Grammar:
        with self._lock:
            if (found := self._cache.get(grammar)) is not None:
                self._cache.move_to_end(grammar)
                return Grammar(self, found)
        if problem := self._guard.problem(grammar):
            raise RequestError(parameter, problem)
        matcher, problem = _matcher(self.tokenizer, grammar, self.limits)
        if problem:
            raise RequestError(parameter, problem)
        with self._lock:
            self._cache[grammar] = matcher
            if len(self._cache) > _CACHED:
                self._cache.popitem(last=False)
        return Grammar(self, matcher)


class Grammar:
    """A compiled grammar."""

    def __init__(self, grammars: Grammars, matcher: LLMatcher) -> None:
        self._grammars, self._matcher = grammars, matcher

    def start(self) -> Constraint:
        """The state of a new sequence. Cost: some 20 us"""
        return Constraint(self._grammars, self._matcher.deep_copy())


class Constraint:
    """Where one sequence is in its grammar."""

    def __init__(self, grammars: Grammars, matcher: LLMatcher) -> None:
        self._grammars, self._matcher = grammars, matcher
        self._mask = np.zeros((grammars.tokenizer.vocab_size + 31) // 32, np.int32)
        self._ended = False

    @property
    def complete(self) -> bool:
        """Whether nothing but the end may follow. Without eos_ids nothing at all may: the sequence must end here."""
        return self._ended or (self._matcher.is_stopped() and self._matcher.stop_reason() in _ENDED)

    def limit(self, logits: NDArray[np.float32]) -> None:
        """Set to -inf what may not come next. Where the text can end, all of eos_ids may come.

        Shapes:  logits f32[V]
        Mutates: logits
        Cost:    at V = 50 k some 40 us, and usually 10 to 100 us in llguidance
        Raises:  ModelError (llguidance gave up on the grammar: end the sequence)
        """
        ours = self._grammars
        if logits.shape != (ours.vocabulary,) or logits.dtype != np.float32:
            raise ShapeError(f"logits are {logits.dtype}{list(logits.shape)}, expected f32[{ours.vocabulary}]")
        if not self._ended:
            self._matcher.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)
            self._check()
        bits = np.unpackbits(self._mask.view(np.uint8), bitorder="little").view(np.bool_)
        end = self._ended or bool(bits[ours.end])
        forbidden = ~bits[: ours.vocabulary]
        if ours.end < ours.vocabulary:
            forbidden[ours.end] = True  # a row of the model that no token has
        for token, named in zip(ours.eos_ids, ours.named_eos, strict=True):
            # A grammar can name a special token; one that is text, say a newline, ends the sequence all the same.
            forbidden[token] = not (end or (named and bits[token]))
        if self._ended:
            forbidden[:] = True
            forbidden[list(ours.eos_ids)] = False
        np.copyto(logits, np.float32(-np.inf), where=forbidden)

    def accept(self, token: int) -> None:
        """The token that came.

        Raises: ModelError (limit forbids it, or llguidance gave up on the grammar: end the sequence)
        """
        if self._ended or (token in self._grammars.eos_ids and self._matcher.is_accepting()):
            self._ended = True
            return
        if not self._matcher.consume_token(token):
            raise ModelError(f"token {token} cannot follow by the grammar: {_line(self._matcher.get_error())}")
        self._check()

    def _check(self) -> None:
        matcher = self._matcher
        if matcher.is_error() or (matcher.is_stopped() and matcher.stop_reason() not in _ENDED):
            why = matcher.get_error() or matcher.stop_reason()
            raise ModelError(f"the grammar became too complex to follow ({_line(why)}): make it simpler")


def check_schema(schema: Any, parameter: str) -> str:
    """`schema` as JSON, if it is an object of a size that can be compiled.

    Raises: RequestError
    """
    if not isinstance(schema, Mapping):
        raise RequestError(parameter, f"holds a schema that is a {type(schema).__name__}: expected an object")
    level: list[Any] = [schema]
    for _ in range(SCHEMA_DEPTH_LIMIT):
        level = [
            item
            for one in level
            if isinstance(one, (Mapping, list, tuple))
            for item in (one.values() if isinstance(one, Mapping) else one)
        ]
    if level:
        raise RequestError(parameter, f"holds a schema nested deeper than {SCHEMA_DEPTH_LIMIT}: make it flatter")
    try:
        text = json.dumps(schema, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise RequestError(parameter, f"holds a schema that is no JSON: {_line(reason(error))}") from None
    if len(text) > SCHEMA_BYTES_LIMIT:
        raise RequestError(
            parameter, f"holds a schema of {len(text)} bytes, expected at most {SCHEMA_BYTES_LIMIT}: make it smaller"
        )
    return text


def _text(text: Any, parameter: str, limit: int = TEXT_BYTES_LIMIT) -> str:
    if not isinstance(text, str) or not text:
        raise RequestError(parameter, f"is a {type(text).__name__}: expected a text that is not empty")
    try:
        size = len(text.encode("utf-8"))
    except UnicodeEncodeError:
        raise RequestError(parameter, "holds half of a character pair: expected Unicode text") from None
    if size > limit:
        raise RequestError(parameter, f"has {size} bytes, expected at most {limit}: make it shorter")
    return text


def _line(problem: str) -> str:
    return " ".join(problem.replace("<non-verbose/>", "").split())[:300] or "no reason given"


def _limits() -> LLParserLimits:
    # A state takes 1 to 2 kB.
    return LLParserLimits(max_lexer_states=50_000, verbose_errors=False)


def _matcher(tokenizer: LLTokenizer, grammar: str, limits: LLParserLimits) -> tuple[LLMatcher, str]:
    """A matcher, and what is wrong with it. Some faults show at the first mask only (a $ref to itself)."""
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
    problem = matcher.get_error()
    if not problem:
        first = matcher.deep_copy()
        first.compute_bitmask()
        problem = first.get_error()
    return matcher, f"cannot be compiled: {_line(problem)}" if problem else ""


class _Guard:
    """A process that compiles first what is compiled here next, so that it takes the harm.

    It knows every token that a grammar can name, and single bytes for all the others: hazards depend on the grammar.
    """

    def __init__(self, rows: int, names: Mapping[int, str], end: int) -> None:
        self._vocabulary = json.dumps([rows, sorted(names.items()), end]).encode() + b"\n"
        self._lock = threading.Lock()
        self._running: list[subprocess.Popen[bytes]] = []  # one, or none
        self._ready = False
        self._start()
        weakref.finalize(self, _end, self._running)

    def problem(self, grammar: str) -> str:
        """What is wrong with a grammar; empty where it can be compiled, and takes no more than it may."""
        with self._lock:
            for _ in range(2):
                if not self._running:
                    self._start()
                if not self._ready and self._answer() is None and self._ended() != -signal.SIGKILL:
                    raise ModelError("the process that tries grammars does not start: its own error says why")
                self._ready = True
                self._write(json.dumps(grammar).encode() + b"\n")
                if (answer := self._answer()) is not None:
                    return answer
                ended = self._ended()
                self._start()  # it loads while others work
                if (
                    ended != -signal.SIGKILL
                ):  # which is not ours: somebody has ended it, and the grammar is not to blame
                    break
            return f"takes more than {GUARD_SECONDS} s, {GUARD_BYTES >> 30} GB or a deep stack to compile"

    def close(self) -> None:
        with self._lock:
            _end(self._running)

    def _start(self) -> None:
        _end(self._running)
        path = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
        self._running.append(
            subprocess.Popen(
                [sys.executable, "-m", "everybit.server.grammar"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=os.environ | {"PYTHONPATH": path},
                bufsize=0,
            )
        )
        self._ready = False
        self._write(self._vocabulary)

    def _write(self, line: bytes) -> None:
        pipe = self._running[0].stdin
        assert pipe is not None
        try:
            while line:
                line = line[pipe.write(line) :]
        except BrokenPipeError:
            pass  # then it does not answer either

    def _ended(self) -> int | None:
        """The exit code, for a process that has closed its output; None where it hangs."""
        try:
            return self._running[0].wait(1)
        except subprocess.TimeoutExpired:
            return None

    def _answer(self) -> str | None:
        pipe = self._running[0].stdout
        assert pipe is not None
        if not select.select([pipe], [], [], _GUARD_PATIENCE)[0] or not (line := pipe.readline()):
            return None
        return str(json.loads(line))


def _end(running: list[subprocess.Popen[bytes]]) -> None:
    for process in running:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()
    running.clear()


class _Vocabulary:
    """A tokenizer as llguidance wants one: the tokens that have names, nothing for the others, then every byte."""

    def __init__(self, rows: int, names: list[tuple[int, str]], end: int) -> None:
        self.tokens = [b""] * rows + [bytes([i]) for i in range(256)]
        for token, name in names:
            self.tokens[token] = name.encode()
        self.special_token_ids = [token for token, _ in names]
        self.eos_token_id, self.bos_token_id = end, None
        self._rows = rows

    def __call__(self, text: bytes) -> list[int]:
        return [self._rows + byte for byte in text]


def _serve(requests: IO[bytes], answers: IO[bytes]) -> None:
    """What the guard's process does, until its input ends or it comes to harm."""
    tokenizer = LLTokenizer(TokenizerWrapper(_Vocabulary(*json.loads(requests.readline()))))
    limits = _limits()
    resource.setrlimit(resource.RLIMIT_AS, (GUARD_BYTES, GUARD_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    answers.write(b'""\n')
    for line in iter(requests.readline, b""):
        signal.setitimer(signal.ITIMER_PROF, GUARD_SECONDS)  # then SIGPROF ends the process
        problem = _matcher(tokenizer, json.loads(line), limits)[1]
        signal.setitimer(signal.ITIMER_PROF, 0)
        answers.write(json.dumps(problem).encode() + b"\n")


def _main() -> None:
    # A stack that is smaller than any thread's of the server: what is too deep is too deep here first.
    threading.stack_size(2 << 20)
    pipes = sys.stdin.buffer, os.fdopen(sys.stdout.fileno(), "wb", buffering=0, closefd=False)
    thread = threading.Thread(target=_serve, args=pipes)
    thread.start()
    thread.join()


if __name__ == "__main__":
    _main()
