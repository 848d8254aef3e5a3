"""Strict JSON: objects without duplicate keys, from bytes nobody vouches for."""

from __future__ import annotations

import json
from typing import Any

from everybit.errors import FormatError
from everybit.formats.tensors import show


def parse_object(text: bytes, where: str, remedy: str = "download it again") -> dict[str, Any]:
    """The JSON object in `text`; `where` names it in the error.

    Raises: FormatError
    """
    try:
        found = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        raise FormatError(f"{where} is not UTF-8 text (byte {error.start}): {remedy}") from None
    except RecursionError:
        raise FormatError(f"{where} is nested too deeply, expected a plain JSON object: {remedy}") from None
    except _DuplicateKeyError as error:
        raise FormatError(f"{where} has the key {error} twice, expected each key once: {remedy}") from None
    except ValueError as error:  # JSONDecodeError, or an integer past Python's digit limit
        raise FormatError(f"{where} is not valid JSON ({str(error)[:100]}): {remedy}") from None
    if not isinstance(found, dict):
        raise FormatError(f"{where} holds a JSON {type(found).__name__}, expected an object: {remedy}")
    return found


class _DuplicateKeyError(ValueError):
    """A JSON object names one key twice."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _DuplicateKeyError(show(twice))
    return found
