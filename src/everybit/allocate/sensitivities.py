"""How much each unit minds each precision, measured once and kept in a file beside the overlay.

The file holds one entry for each overlay, text and setting, so that a second budget costs nothing, and a run that was
killed goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from everybit.allocate.divergence import Divergence
from everybit.allocate.units import Unit, assignment
from everybit.engine.plan import Plan, write_json
from everybit.errors import FormatError, OutputError
from everybit.formats import Overlay
from everybit.formats.files import read_inside
from everybit.formats.jsontext import parse_object
from everybit.formats.tensors import show

MARK, VERSION = "everybit_sensitivities", 1
SAVE_S = 5.0  # what a kill can cost, beside one batch
BATCH = 8

Costs = dict[str, dict[int, float]]  # unit name, choice -> nats per token


class Store:
    """The measured costs of one overlay, text and setting. Make one with `Store.open`; `save` writes `costs`."""

    def __init__(self, path: Path, entries: dict[str, Any], settings: Mapping[str, Any], costs: Costs) -> None:
        self.path = path
        self.settings = dict(settings)
        self.costs = costs
        self._entries = entries

    @classmethod
    def open(cls, path: Path, settings: Mapping[str, Any]) -> Store:
        """What `path` has for these settings; nothing if there is no such file.

        Raises: FormatError (another or a damaged file)
        """
        entries: dict[str, Any] = {}
        if path.exists():
            remedy = "remove it, or name another with --cache"
            found = parse_object(read_inside(path.parent, path.name), str(path), remedy)
            if found.get(MARK) != VERSION or set(found) != {MARK, "entries"} or not isinstance(found["entries"], dict):
                raise FormatError(f"{path} is not a file of sensitivities that this everybit wrote: {remedy}")
            entries = found["entries"]
        key = _key(settings)
        costs: Costs = {}
        entry = entries.get(key, {"settings": settings, "costs": {}})
        try:
            for unit, of_unit in entry["costs"].items():
                costs[unit] = {int(choice): float(cost) for choice, cost in of_unit.items()}
                if not all(0 <= cost < math.inf for cost in costs[unit].values()):
                    raise ValueError
        except (AttributeError, KeyError, TypeError, ValueError):
            raise FormatError(f"{path}: entry {show(key)} is damaged: remove the file and measure again") from None
        return cls(path, entries, settings, costs)

    def save(self) -> None:
        """Writes the whole file anew. Raises: OutputError"""
        costs = {unit: {str(choice): cost for choice, cost in sorted(of.items())} for unit, of in self.costs.items()}
        self._entries[_key(self.settings)] = {"settings": self.settings, "costs": costs}
        try:
            write_json(self.path, {MARK: VERSION, "entries": self._entries})
        except OutputError as error:
            raise OutputError(f"{error}, such as --cache FILE") from None


def measure(
    identity: str,
    units: Sequence[Unit],
    make_divergence: Callable[[Plan], Divergence],
    store: Store,
    progress: bool = True,
) -> Costs:
    """The cost of every unit at every choice: KL to the model at its highest precisions when only that unit is lowered.

    What `store` has is not measured again. `make_divergence` is called only if something is missing.

    Cost:    one pass of the text for each unit and choice but the highest
    Mutates: `store` and its file
    Raises:  OutputError
    Source:  Yao et al., HAWQ-V3 (arXiv:2011.10680), section 3.4, with KL measured in place of a Hessian trace
    """
    top = {unit.name: unit.choices[-1] for unit in units}

    def plan(unit: Unit, choice: int) -> Plan:
        return Plan(identity, assignment(units, {**top, unit.name: choice}), 0.0, 0)

    missing = [
        (unit, choice) for unit in units for choice in unit.choices[:-1] if choice not in store.costs.get(unit.name, {})
    ]
    if missing:
        divergence = make_divergence(Plan(identity, assignment(units, top), 0.0, 0))
        saved = time.monotonic()
        with tqdm(total=len(missing), unit="run", desc="sensitivities", disable=None if progress else True) as bar:
            for start in range(0, len(missing), BATCH):
                batch = missing[start : start + BATCH]
                for (unit, choice), kl in zip(batch, divergence.of([plan(*one) for one in batch]), strict=True):
                    store.costs.setdefault(unit.name, {})[choice] = max(kl, 0.0)
                bar.update(len(batch))
                if time.monotonic() - saved > SAVE_S:
                    store.save()
                    saved = time.monotonic()
        store.save()
    return {
        unit.name: {choice: store.costs.get(unit.name, {}).get(choice, 0.0) for choice in unit.choices}
        for unit in units
    }


def settings_of(overlay: Overlay, identity: str, **more: Any) -> dict[str, Any]:
    """What the figures depend on, beside `more`: the overlay's weights and the rest of its config."""
    model = {key: value for key, value in overlay.config.items() if key != "quantization_config"}
    text = json.dumps(model, sort_keys=True)
    return {"overlay": identity, "config": hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest(), **more}


def _key(settings: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
