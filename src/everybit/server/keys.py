"""API keys: whose a request is, and how much of the server each may use at once."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from everybit.errors import SourceError

VARIABLE = "EVERYBIT_API_KEY"
_LEAST = 16  # characters
_OPTIONS = {"concurrency": (1, 1 << 20), "priority": (-1000, 1000)}


@dataclass
class Key:
    """`concurrency` requests at once; a smaller `priority` goes first. `name` is what logs and caches know it by."""

    name: str
    digest: bytes = field(repr=False)
    concurrency: int = 1 << 20
    priority: int = 0
    running: int = 0


class Keys:
    """All keys of a server. Without any, everybody may come in."""

    def __init__(self, keys: list[Key]) -> None:
        self._keys = keys
        self.anybody = Key("", b"")

    def __bool__(self) -> bool:
        return bool(self._keys)

    @classmethod
    def read(cls, path: Path | None, environment: Mapping[str, str] = os.environ) -> Keys:
        """A file with a line `NAME KEY [concurrency=N] [priority=N]` for each key, and one key in $EVERYBIT_API_KEY.

        Raises: SourceError; no message holds a key
        """
        keys: list[Key] = []
        if path is not None:
            try:
                lines = path.read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise SourceError(f"{path} cannot be read ({type(error).__name__}): expected a file of keys") from None
            keys = [_key(line.split(), f"{path}, line {i}") for i, line in enumerate(lines, 1) if _says(line)]
            if not keys:
                raise SourceError(f"{path} holds no key: expected lines of NAME KEY [concurrency=N] [priority=N]")
        if found := environment.get(VARIABLE, "").strip():
            keys.append(_key(["default", found], f"${VARIABLE}"))
        for what, values in (("name", [key.name for key in keys]), ("key", [key.digest for key in keys])):
            if len(set(values)) < len(keys):
                raise SourceError(f"{path or VARIABLE} has a {what} twice: each user needs their own")
        return cls(keys)

    def without_limits(self) -> Keys:
        """For a server behind another, which has counted already."""
        return Keys([replace(key, concurrency=_OPTIONS["concurrency"][1]) for key in self._keys])

    def find(self, authorization: str) -> Key | None:
        """The key in an Authorization header (bytes, as Latin-1). Takes as long for a wrong key as for a right one."""
        if not self._keys:
            return self.anybody
        scheme, _, secret = authorization.partition(" ")
        secret = secret.strip() if scheme.lower() == "bearer" else ""
        given = hashlib.sha256(secret.encode("latin-1", "backslashreplace")).digest()
        found = [key for key in self._keys if hmac.compare_digest(key.digest, given)]
        return found[0] if found else None


def _says(line: str) -> bool:
    return bool(line.strip()) and not line.lstrip().startswith("#")


def _key(words: list[str], where: str) -> Key:
    if len(words) < 2 or len(words[1]) < _LEAST:
        raise SourceError(f"{where}: expected NAME KEY [concurrency=N] [priority=N], a key of {_LEAST} characters")
    key = Key(words[0], _digest(words[1]))
    for word in words[2:]:
        option, _, value = word.partition("=")
        if option not in _OPTIONS or not re.fullmatch(r"-?[0-9]{1,9}", value):
            raise SourceError(f"{where}: an option is wrong, expected concurrency=N or priority=N")
        lowest, highest = _OPTIONS[option]
        if not lowest <= int(value) <= highest:
            raise SourceError(f"{where}: {option}={int(value)}, expected {lowest} to {highest}")
        setattr(key, option, int(value))
    return key


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).digest()
