"""A request's JSON, read without guessing: every key once, numbers that are numbers, whole characters, not too deep."""

from __future__ import annotations

import json
import re
from typing import Any, NoReturn

import numpy as np

from everybit.server.problems import Problem

MOST_CONTAINERS = 100_000  # objects and lists of one body: reading them takes time
_HALF = re.compile(r"\\u[dD][89a-fA-F]")  # may be half of a character pair
_STEPS = np.zeros(256, np.int8)
_STEPS[list(b"[{")], _STEPS[list(b"]}")] = 1, -1


def read_json(body: bytes, depth: int) -> Any:
    """What `body` holds, nested at most `depth` deep. Cost: some 0.1 us a byte at the worst. Raises: Problem"""
    check_shape(body, depth)
    try:
        text = body.decode()
        found = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse, parse_float=_finite)
        if _HALF.search(text):
            json.dumps(found, ensure_ascii=False).encode()
    except UnicodeDecodeError:
        raise Problem(400, "the body is not UTF-8 text", code="invalid_json") from None
    except UnicodeEncodeError:
        problem = "the body has half of a character pair (\\ud800 to \\udfff alone)"
        raise Problem(400, problem, code="invalid_json") from None
    except ValueError as error:  # not JSON, or a number of more digits than Python reads
        why = f" ({error})" if isinstance(error, _RefusedError) else ""
        raise Problem(400, f"the body is not JSON{why}", code="invalid_json") from None
    return found


def check_shape(body: bytes, depth: int) -> None:
    """That JSON is not too deep and not in too many pieces; of what is not JSON, as far as it is. Raises: Problem"""
    if body.count(b"[") + body.count(b"{") <= depth:
        return
    marks = np.frombuffer(body.replace(b"\\\\", b"").replace(b'\\"', b""), np.uint8)
    steps = _STEPS[marks]
    steps[np.logical_xor.accumulate(marks == ord('"'))] = 0  # in texts
    if np.cumsum(steps, dtype=np.int32).max(initial=0) > depth:
        raise Problem(400, f"the body's JSON is nested more than {depth} deep", code="too_deep")
    if np.count_nonzero(steps > 0) > MOST_CONTAINERS:
        raise Problem(400, f"the body has more than {MOST_CONTAINERS} objects and lists", code="too_many")


class _RefusedError(ValueError):
    """Something that Python takes for JSON."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _RefusedError("an object has a key twice")
    return found


def _refuse(constant: str) -> NoReturn:
    raise _RefusedError(f"{constant} is no number")


def _finite(text: str) -> float:
    found = float(text)
    if found - found != 0:
        raise _RefusedError("a number is too large")
    return found
