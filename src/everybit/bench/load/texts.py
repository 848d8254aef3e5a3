"""Prompt texts of about so many tokens, prompts of an own file, and the reading of text files."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from io import StringIO
from pathlib import Path
from random import Random

from everybit.errors import SourceError

MOST_BYTES = 64 << 20  # of a text to draw from: it travels to every worker
_OPENING = 8  # 300^8 openings: no two texts share their start, hence no entry of a prefix cache, by accident
_SPARE = 64  # characters past a text's end in which a word border is looked for
_POOL = 40_000  # words of the text that stands in for a file

_WORDS = """
a able about above across act add after again age ago air all almost alone along already also always among amount an
and animal answer any appear area arm around as ask at away back ball base be bear beat beauty bed been before began
begin behind believe best better between big bird black blue boat body book both bottom box boy bring brought build
busy but by call came can car care carry case catch cause center certain change check child choose circle city class
clear close cloud cold color come common complete contain cook cool copy corner could count country course cover cross
cry cut dark day decide deep did differ direct distance do does dog done door down draw dream drive dry each early
earth ease east eat edge egg eight end energy enough even ever every example eye face fact fall family far farm fast
father fear feel feet few field fight figure fill final find fine fire first fish five floor flower fly follow food
foot for force form forward found four free friend from front full game garden gave get girl give glass go gold good
got grand grass great green ground group grow had half hand happen happy hard has have he head hear heart heat heavy
help her here high hill him his hold home horse hot hour house how hundred ice idea if in inch island it job join just
keep kind king knew know lake land language large last late laugh lay lead learn leave left less let letter level life
light like line list listen little live long look lost love low made main make man many map mark may mean measure men
milk mind minute money month moon more morning most mother mountain move much music must name near need never new next
night north note number ocean of off often old on once one only open order
"""
WORDS = _WORDS.split()


@dataclass(frozen=True)
class Texts:
    """Texts by name: the same name and seed give the same text, and a longer one begins as a shorter one does.

    Each is a few random English words, then a slice of `pool` from a random word on, which begins anew at its end.
    Its length is `tokens * chars_per_token`, to the nearest word border; with `count` (the tokens of a text; it has to
    be picklable) it is brought as near to `tokens` as whole words allow. Raises: SourceError
    """

    pool: str
    seed: int = 0
    chars_per_token: float = 4.0
    count: Callable[[str], int] | None = None

    def __post_init__(self) -> None:
        if not (self.chars_per_token > 0 and math.isfinite(self.chars_per_token)):
            raise SourceError(f"{self.chars_per_token} characters a token: expected a finite number above 0")
        if not self.pool:
            raise SourceError("a text without words to draw prompts from; expected some")

    def text(self, name: str, tokens: int) -> str:
        return self._slice(name, tokens) if self.count is None else _counted(self, name, tokens)

    def _slice(self, name: str, tokens: float) -> str:
        random = Random(f"{self.seed} {name}")
        opening = " ".join(random.choices(WORDS, k=_OPENING)) + " "
        size = max(1, round(tokens * self.chars_per_token))
        begin = self.pool.find(" ", random.randrange(len(self.pool))) + 1  # 0, the first word, past the last border
        end = begin + size + _SPARE
        body = self.pool[begin:end]
        if end > len(self.pool):
            again = self.pool + " "
            body = (body + " " + again * (1 + end // len(again)))[: size + _SPARE]
        return _cut(opening + body, size)


def random_words(seed: int = 0) -> Texts:
    """Common English words in random order; most tokenizers have a token for each."""
    pool = " ".join(Random(f"{seed} words").choices(WORDS, k=_POOL))
    return Texts(pool, seed, chars_per_token=len(pool) / _POOL)


def read_pool(path: Path, seed: int = 0) -> Texts:
    """Slices of a UTF-8 text file; its white space becomes single spaces. Raises: SourceError"""
    if path.is_file() and path.stat().st_size > MOST_BYTES:
        raise SourceError(f"{path}: {path.stat().st_size} bytes; expected {MOST_BYTES} at most: a part of it will do")
    return Texts(" ".join(read_text(path).split()), seed)


def _cut(text: str, size: int) -> str:
    """To `size` characters, at the nearest border of words; where none is near, in the middle of one."""
    borders = (text.find(" ", size, size + _SPARE), text.rfind(" ", max(1, size - _SPARE), size))
    return text[: min((at for at in borders if at > 0), key=lambda at: abs(at - size), default=size)]


@lru_cache(maxsize=1024)  # counting takes a thousand times as long as slicing, and prefixes return
def _counted(texts: Texts, name: str, tokens: int) -> str:
    """Three tries by proportion, then by halves until one word decides; the nearest of them all."""
    assert texts.count is not None
    best, best_off = "", math.inf
    low, asked, high = 0.0, float(tokens), math.inf
    for tries in range(20):
        text = texts._slice(name, asked)
        counted = texts.count(text)
        if counted < 1:
            raise SourceError(f"a tokenizer that finds {counted} tokens in {text[:40]!r}; expected 1 or more")
        if abs(counted - tokens) < best_off:
            best, best_off = text, abs(counted - tokens)
        low, high = (asked, high) if counted < tokens else (low, asked)
        if counted == tokens or (high - low) * texts.chars_per_token < 1:
            break
        asked *= tokens / counted
        if tries > 2 or not low < asked < high:
            asked = 2 * low if math.isinf(high) else (low + high) / 2
    return best


@dataclass(frozen=True)
class Prompt:
    """What one user of an own file says, turn after turn, and the most tokens of each answer, where the line tells."""

    texts: tuple[str, ...]
    output_tokens: int | None = None


def read_prompts(path: Path, shuffle: int | None = None) -> tuple[Prompt, ...]:
    """JSON lines {"prompt": TEXT} or {"messages": [TEXT, ...]}, with or without "output_tokens"; or plain lines.

    `shuffle` is the seed of their order; without one they keep it. Raises: SourceError
    """
    lines = [(number, line) for number, line in enumerate(read_text(path).split("\n"), 1) if line.strip()]
    if not lines:
        raise SourceError(f"{path}: no prompts; expected one a line")
    if lines[0][1].lstrip().startswith("{"):
        prompts = [_parse_prompt(f"{path}: line {number}", line) for number, line in lines]
    else:
        prompts = [Prompt((line.strip(),)) for _, line in lines]
    if shuffle is not None:
        Random(f"{shuffle} prompts").shuffle(prompts)
    return tuple(prompts)


def _parse_prompt(place: str, line: str) -> Prompt:
    document = read_object(place, line)
    found = document.get("messages", [document.get("prompt")])
    texts: list[str] = []
    for one in found if isinstance(found, list) else []:
        if isinstance(one, dict) and one.get("role") == "user":
            one = one.get("content")
        if not isinstance(one, str) or not one:
            texts = []
            break
        texts.append(one)
    if not texts or {"messages", "prompt"} <= document.keys():
        raise SourceError(
            f'{place}: expected "prompt": TEXT or "messages": texts of the user alone, none of them empty'
        )
    output = document.get("output_tokens")
    if output is not None and (not isinstance(output, int) or isinstance(output, bool) or output < 1):
        raise SourceError(f"{place}: output_tokens {output!r}; expected a whole number, 1 or more")
    return Prompt(tuple(texts), output)


def read_text(path: Path) -> str:
    """A UTF-8 file. Raises: SourceError"""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise SourceError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise SourceError(f"{path}: {error.strerror}; expected a UTF-8 text file") from None


def read_rows(path: Path) -> tuple[list[str], Iterator[tuple[int, dict[str, str]]]]:
    """The header of a CSV file, and its rows with their line numbers; empty lines are passed over.

    Raises: SourceError (for a row, when it is reached)
    """
    reader = csv.reader(StringIO(read_text(path), newline=""))

    def rows() -> Iterator[tuple[int, dict[str, str]]]:
        try:
            for row in reader:
                if not row:
                    continue
                if len(row) != len(header):
                    raise SourceError(f"{path}: line {reader.line_num}: {len(row)} columns; expected {len(header)}")
                yield reader.line_num, dict(zip(header, row, strict=True))
        except csv.Error as error:
            raise SourceError(f"{path}: line {reader.line_num}: not CSV ({error})") from None

    try:
        header = [name.strip() for name in next(reader, [])]
    except csv.Error as error:
        raise SourceError(f"{path}: line 1: not CSV ({error})") from None
    return header, rows()


def read_object(place: str, line: str) -> dict[str, object]:
    """A line of JSON lines. Raises: SourceError"""
    try:
        document = json.loads(line)
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        raise SourceError(f"{place}: {line.strip()[:40]!r}; expected a JSON object")
    return document
