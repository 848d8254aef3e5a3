"""A config.json as it is read: each field checked, and what nobody asked for told apart from what does not matter."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from everybit.errors import ModelError
from everybit.formats.tensors import show

WIDEST, DEEPEST, LONGEST = 1_000_000, 10_000, 1_000_000_000  # beyond these a number is a mistake, not a model

_IRRELEVANT_ENDS = ("_token_id", "_token_index", "_token_ids", "_dropout", "_pdrop", "_dropout_prob", "_loss_coef")
_IRRELEVANT_BEGINS = ("_", "rope_", "time_step_", "summary_", "task_", "mup_", "mtp_use_")


@functools.cache
def irrelevant() -> frozenset[str]:
    """Fields without influence on size and speed, or read only in some families: never listed as unknown."""
    return frozenset((files("everybit.plan") / "configs" / "irrelevant.txt").read_text(encoding="utf-8").split())


def shown(name: str) -> str:
    """The name of a field as it stands, or what may be printed of it."""
    return name if name.isidentifier() else show(name)


def printable(text: str) -> str:
    """A name or a path as it stands, or escaped where it would command the terminal."""
    return text if text.isprintable() else show(text)


class Fields:
    """One config object; a field that is null is absent. `where` names it in errors.

    Raises: ModelError from every reader: a required field that is absent, a value of the wrong type or size
    """

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        self.config = {key: value for key, value in config.items() if value is not None}
        self.where = where
        self.family = self.text("model_type", "")
        self._read = {"model_type"}

    def has(self, *names: str) -> str | None:
        """The first of the names that the config has."""
        self._read.update(names)
        return next((name for name in names if name in self.config), None)

    def whole(self, *names: str, default: int | None = None, most: int = WIDEST, least: int = 1) -> int:
        """A whole number from `least` to `most`, under the first of its names that is there."""
        name = self.has(*names)
        if name is None:
            if default is None:
                raise ModelError(
                    f"{self.where}: the field {' or '.join(map(repr, names))} is missing, expected a whole number: "
                    "download the model's config.json again, or add the field"
                )
            return default
        value = self.config[name]
        if type(value) is not int or not least <= value <= most:
            raise ModelError(
                f"{self.where}: {name} {show(value)} arrived, expected a whole number from {least} to {most}: fix it"
            )
        return value

    def flag(self, name: str, default: bool) -> bool:
        found = self.has(name)
        value = self.config[found] if found else default
        if type(value) is not bool:
            raise ModelError(f"{self.where}: {name} {show(value)} arrived, expected true or false: fix it")
        return value

    def text(self, name: str, default: str) -> str:
        value = self.config.get(name, default)
        if not isinstance(value, str):
            raise ModelError(f"{self.where}: {name} {show(value)} arrived, expected a text: fix it")
        return value

    def listed(self, *names: str, length: int | None = None) -> list[Any] | None:
        """A list, of `length` things where that is known; None where the config has none (an empty one is none)."""
        name = self.has(*names)
        if name is None or self.config[name] == []:
            return None
        value = self.config[name]
        if not isinstance(value, list) or (length is not None and len(value) != length):
            raise ModelError(
                f"{self.where}: {name} {show(value)} arrived, expected a list"
                f"{f' with one entry for each of {length} layers' if length is not None else ''}: fix it"
            )
        return value

    def unknown(self) -> list[str]:
        """The fields that nobody read, that say something (not 0, false or empty) and that may matter, sorted."""
        said = {name for name, value in self.config.items() if value}
        left = said - self._read - irrelevant()
        return sorted(
            shown(name)
            for name in left
            if not name.startswith(_IRRELEVANT_BEGINS) and not name.endswith(_IRRELEVANT_ENDS)
        )
