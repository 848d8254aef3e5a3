"""Token counts and pauses as random variables, written as short texts: `parse_length`, `parse_seconds`."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Literal

from everybit.bench.load.texts import read_rows
from everybit.bench.records import SECOND
from everybit.errors import SourceError

MOST_TOKENS = 10_000_000  # above any model's context: more is a mistake in a file or an option
MOST_SECONDS = 86_400
FORMS = "128, 64-256, normal:256,64, lognormal:median=512,sigma=0.8, exp:200{file}; each with :min=N and :max=N"
PARAMETERS = {"normal": ("mean", "sd"), "lognormal": ("median", "sigma"), "exp": ("mean",)}
# The columns for prompt and output, by the tools that wrote the file.
COLUMNS = (
    ("prompt", "output"),
    ("num_prefill_tokens", "num_decode_tokens"),
    ("ContextTokens", "GeneratedTokens"),
    ("Request tokens", "Response tokens"),
)
_NUMBER = r"(\d{1,15}(?:\.\d{1,15})?)"
_LIMIT = re.compile(rf":(min|max)={_NUMBER}$")

Column = Literal["prompt", "output"]


@dataclass(frozen=True)
class Distribution:
    """Whole numbers (tokens or ns) of one distribution; what falls outside `least` to `most` becomes the nearer."""

    text: str
    kind: str
    values: tuple[float, ...]  # its parameters, or the rows of the file
    least: int
    most: int
    file: str = ""

    def draw(self, random: Random) -> int:
        first, last = self.values[0], self.values[-1]
        match self.kind:
            case "constant":
                drawn = first
            case "uniform":
                drawn = random.randint(int(first), int(last))
            case "normal":
                drawn = random.normalvariate(first, last)
            case "lognormal":
                drawn = random.lognormvariate(math.log(first), last)
            case "exp":
                drawn = random.expovariate(1 / first)
            case _:
                drawn = self.values[random.randrange(len(self.values))]
        return self.limit(drawn)

    def limit(self, value: float) -> int:
        return min(max(round(value), self.least), self.most)


@dataclass(frozen=True)
class Lengths:
    """Tokens of prompts and outputs: independent, or rows of one file where both name it."""

    prompt: Distribution
    output: Distribution

    def draw(self, random: Random) -> tuple[int, int]:
        if self.prompt.file and self.prompt.file == self.output.file:
            row = random.randrange(len(self.prompt.values))
            return self.prompt.limit(self.prompt.values[row]), self.output.limit(self.output.values[row])
        return self.prompt.draw(random), self.output.draw(random)

    def describe(self) -> dict[str, Any]:
        return {"prompt": self.prompt.text, "output": self.output.text}


def parse_lengths(prompt: str, output: str) -> Lengths:
    """Raises: SourceError"""
    return Lengths(parse_length(prompt, "prompt"), parse_length(output, "output"))


def parse_length(text: str, column: Column = "prompt") -> Distribution:
    """Tokens. `column` says which of a file's two lengths is meant. Raises: SourceError"""
    body, limits = _split_limits(text, 1)
    least, most = limits.get("min", 1), limits.get("max", MOST_TOKENS)
    if not 1 <= least <= most <= MOST_TOKENS:
        raise SourceError(f"length {text!r}: expected 1 <= min <= max <= {MOST_TOKENS:,}")
    kind, file = "file", ""
    if body.startswith("file:"):
        file = body.removeprefix("file:")
        values: Sequence[float] = _read_column(Path(file), column)
    else:
        kind, values = _parse(body, 1) or _refuse("length", text, " or file:lengths.csv")
        if not (values[0] >= 1 and max(values) <= MOST_TOKENS):
            raise SourceError(f"length {text!r}: expected 1 to {MOST_TOKENS:,} tokens")
    return Distribution(text, kind, tuple(values), least, most, file)


def parse_seconds(text: str) -> Distribution:
    """Pauses in seconds, drawn in ns. Raises: SourceError"""
    body, limits = _split_limits(text, SECOND)
    least, most = limits.get("min", 0), limits.get("max", MOST_SECONDS * SECOND)
    if not 0 <= least <= most <= MOST_SECONDS * SECOND:
        raise SourceError(f"seconds {text!r}: expected 0 <= min <= max <= {MOST_SECONDS}")
    kind, values = _parse(body, SECOND) or _refuse("seconds", text, "")
    return Distribution(text, kind, values, least, most)


def _refuse(what: str, text: str, file: str) -> tuple[str, tuple[float, ...]]:
    raise SourceError(f"{what} {text!r}: expected one of {FORMS.format(file=file)}")


def _split_limits(text: str, unit: int) -> tuple[str, dict[str, int]]:
    limits: dict[str, int] = {}
    while (found := _LIMIT.search(text)) and found[1] not in limits:
        limits[found[1]] = round(float(found[2]) * unit)
        text = text[: found.start()]
    return text, limits


def _parse(text: str, unit: int) -> tuple[str, tuple[float, ...]] | None:
    """Kind and parameters in units of 1/`unit`; None where the text is no such form."""
    if found := re.fullmatch(rf"{_NUMBER}(?:-{_NUMBER})?", text):
        ends = [float(one) * unit for one in found.groups() if one is not None]
        whole = all(unit > 1 or end.is_integer() for end in ends)
        return (("constant", "uniform")[len(ends) - 1], tuple(ends)) if whole and ends[0] <= ends[-1] else None
    kind, _, rest = text.partition(":")
    names, parts = PARAMETERS.get(kind, ()), rest.split(",")
    if not names or len(names) != len(parts):
        return None
    values = []
    for name, part in zip(names, parts, strict=True):
        found = re.fullmatch(rf"(?:{name}=)?{_NUMBER}", part.strip())
        if not found:
            return None
        values.append(float(found[1]) * (1 if name == "sigma" else unit))
    if values[0] == 0 or (kind == "lognormal" and values[1] > 10):
        return None
    return kind, tuple(values)


def _read_column(path: Path, column: Column) -> list[int]:
    header, rows = read_rows(path)
    pair = next((pair for pair in COLUMNS if set(pair) <= set(header)), None)
    if pair is None:
        wanted = " or ".join(",".join(pair) for pair in COLUMNS)
        raise SourceError(f"{path}: columns {','.join(header)[:200]!r}; expected {wanted}")
    name = pair[0 if column == "prompt" else 1]
    values = [to_tokens(path, line, name, row[name]) for line, row in rows]
    if not values:
        raise SourceError(f"{path}: no lengths below its header")
    return values


def to_tokens(path: Path, line: int, name: str, value: object) -> int:
    """A count of tokens in a file: text or a number, 0 and less included. Raises: SourceError"""
    try:
        tokens = int(value) if isinstance(value, (str, int)) and not isinstance(value, bool) else None
    except ValueError:
        tokens = None
    if tokens is None or abs(tokens) > MOST_TOKENS:
        raise SourceError(
            f"{path}: line {line}: {name} {str(value)[:40]!r}; expected a whole number, at most {MOST_TOKENS:,} tokens"
        )
    return tokens
