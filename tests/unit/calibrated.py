"""Stand-ins for `quantize.calibrate.Calibrated`, and texts of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch


@dataclass
class Ready:
    """A model and sequences that are there already."""

    model: Any
    sequences: list[torch.Tensor]


class Untouchable:
    """Fails the test when either is asked for."""

    @property
    def model(self) -> Any:
        pytest.fail("the model was loaded")

    @property
    def sequences(self) -> list[torch.Tensor]:
        pytest.fail("the sequences were made")


def texts(count: int, length: int) -> list[torch.Tensor]:
    """Sequences [1, length] of seeded tokens."""
    return list(torch.from_numpy(np.random.default_rng(5).integers(3, 96, (count, 1, length))))
