"""Reading an overlay: everything checked when it is opened, data mapped and verified when it is first touched."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from everybit.errors import ChecksumError, FormatError
from everybit.formats.config import QuantizationConfig
from everybit.formats.files import read_inside
from everybit.formats.grid import Grid
from everybit.formats.inventory import CHECKSUM_PREFIX, check_checksums, check_tensors, find_shards
from everybit.formats.jsontext import parse_object
from everybit.formats.recognize import require_config, require_folder, require_overlay
from everybit.formats.shard import Shard
from everybit.formats.sizes import SizeReport
from everybit.formats.tensors import TensorSpec, show
from everybit.formats.weights import WeightSpec, require_bits


class Overlay:
    """An opened overlay folder. Make one with `Overlay.open`.

    `folder`, `config` (the whole config.json), `quantization`, `weights` by parameter name, `bits` (the precisions it
    holds), `metadata` (what the shards say beside checksums), `touched` (names of the tensors read so far).
    """

    def __init__(
        self, folder: Path, config: dict[str, Any], quantization: QuantizationConfig, shards: list[Shard], verify: bool
    ) -> None:
        self.folder = folder
        self.config = config
        self.quantization = quantization
        self.weights: dict[str, WeightSpec] = quantization.weights
        self.bits: tuple[int, ...] = quantization.bits
        self.metadata: dict[str, str] = {}
        self.touched: set[str] = set()
        self._shards = shards
        self._shard_of = {name: shard for shard in shards for name in shard.entries}
        self._verify = verify
        self._verified: set[str] = set()  # tensors whose checksum was right
        self._padded: set[str] = set()  # planes whose padding was zero
        for shard in shards:
            self.metadata |= {k: v for k, v in shard.metadata.items() if not k.startswith(CHECKSUM_PREFIX)}

    @classmethod
    def open(cls, folder: str | os.PathLike[str], verify: bool = True) -> Overlay:
        """Opens and checks an overlay; reads the JSON files and shard headers, no tensor data.

        `verify=False` skips the checksums of the data and padding (never the structural checks).
        Raises: FormatError
        """
        folder = Path(folder)
        names = require_folder(folder)
        require_config(folder, names)
        config = parse_object(read_inside(folder, "config.json"), str(folder / "config.json"))
        require_overlay(folder, names, config)
        where = f"{folder / 'config.json'}: quantization_config"
        quantization = QuantizationConfig.from_dict(config["quantization_config"], where)
        shards: list[Shard] = []
        try:
            find_shards(folder, names, shards)
            specs = {name: entry.spec for shard in shards for name, entry in shard.entries.items()}
            check_tensors(quantization, specs, str(folder))
            check_checksums(shards)
        except BaseException:
            for shard in shards:
                shard.close()
            raise
        return cls(folder, config, quantization, shards, verify)

    def names(self) -> list[str]:
        """Every stored tensor, planes and codebooks among them, sorted."""
        return sorted(self._shard_of)

    def plain_names(self) -> list[str]:
        """The tensors that are not quantized (embeddings, norms, biases), sorted."""
        own = {tensor for spec in self.weights.values() for tensor in spec.tensors()}
        return sorted(set(self._shard_of) - own)

    def spec_of(self, name: str) -> TensorSpec:
        """Dtype and shape of a stored tensor, from the header alone.

        Raises: FormatError
        """
        return self._find(name).entries[name].spec

    def dtype_of(self, name: str) -> str:
        """The safetensors dtype of a stored tensor.

        Raises: FormatError
        """
        return self.spec_of(name).dtype

    def tensor(self, name: str) -> NDArray[Any]:
        """A stored tensor as a read-only view on the file; BF16 comes as uint16. The first touch checks its sha256.

        Raises: FormatError, ChecksumError
        """
        shard = self._find(name)
        view = shard.view(name)
        self.touched.add(name)
        if self._verify and name not in self._verified:
            recorded = shard.metadata[CHECKSUM_PREFIX + name]
            found = hashlib.sha256(view.reshape(-1).view(np.uint8).data).hexdigest()
            if not hmac.compare_digest(found, recorded):
                raise ChecksumError(
                    f"{shard.path}: tensor {show(name)}: its sha256 is {found[:16]}..., expected {recorded[:16]}...: "
                    "the file is damaged, download it again"
                )
            self._verified.add(name)
        return view

    def mapped(self, name: str) -> NDArray[Any]:
        """As tensor, but unread and unverified: to hand an address on, before `planes` or `tensor` has verified it.

        Raises: FormatError
        """
        return self._find(name).view(name)

    def planes(self, parameter: str, bits: int) -> list[NDArray[np.uint8]]:
        """The first `bits` planes of a quantized weight, most significant first.

        Shapes: `bits` arrays u8[rows, ceil(K/8)]
        Raises: PrecisionError, FormatError, ChecksumError
        """
        spec = self._weight(parameter, bits)
        found = []
        for plane in range(bits):
            name = spec.plane_name(plane)
            view = self.tensor(name).reshape(spec.rows, -1)
            if (
                self._verify
                and name not in self._padded
                and spec.columns % 8
                and bool((view[:, -1] >> (spec.columns % 8)).any())
            ):
                raise FormatError(
                    f"{self._find(name).path}: tensor {show(name)}: bits after column {spec.columns} are set, "
                    "expected zero padding: quantize again, or download it again"
                )
            self._padded.add(name)
            found.append(view)
        return found

    def codebook(self, parameter: str, bits: int) -> dict[str, NDArray[Any]]:
        """The tensors of a weight's codebook that precision `bits` reads, as stored, by suffix.

        Raises: PrecisionError, FormatError, ChecksumError
        """
        spec = self._weight(parameter, bits)
        return {suffix: self.tensor(name) for suffix, name in spec.codebook_names(bits).items()}

    def table(self, parameter: str, bits: int) -> NDArray[np.float32]:
        """The value of every `bits`-bit code of every row, whatever the codebook kind.

        Shapes: f32[rows, 2^bits]
        Raises: PrecisionError, FormatError (a value that is not finite, numbers the kind forbids), ChecksumError
        """
        spec, arrays = self._weight(parameter, bits), self.codebook(parameter, bits)
        with self._naming(spec, bits):
            values = spec.book.expand(arrays, bits)
            _require_finite(values)
        return values

    def grid(self, parameter: str, bits: int) -> Grid | None:
        """The same values as even grids in cells, checked like `table`, where the codebook kind says them so.

        Raises: PrecisionError, FormatError, ChecksumError
        """
        spec, arrays = self._weight(parameter, bits), self.codebook(parameter, bits)
        with self._naming(spec, bits):
            grid = spec.book.grid(arrays, bits)
            if grid is not None:
                _require_finite(grid.ends(bits).reshape(spec.rows, -1))
        return grid

    def unit(self, parameter: str, bits: int) -> NDArray[np.float32] | None:
        """For each row a number of which its values are integer multiples, where the codebook kind has one.

        Shapes: f32[rows]
        Raises: PrecisionError, FormatError, ChecksumError
        """
        spec, arrays = self._weight(parameter, bits), self.codebook(parameter, bits)
        with self._naming(spec, bits):
            return spec.book.unit(arrays, bits)

    def sizes(self) -> SizeReport:
        """What each precision costs, and the folder as a whole; reads no data."""
        layout = {name: shard.entries[name].spec for name, shard in self._shard_of.items()}
        return SizeReport.of(self.weights.values(), self.bits, layout)

    def verify_all(self) -> None:
        """Reads and verifies every tensor, padding and codebook.

        Raises: FormatError, ChecksumError
        """
        for name in self.names():
            self.tensor(name)
        for name, spec in self.weights.items():
            self.planes(name, spec.planes)
            for bits in spec.bits:
                self.table(name, bits)

    def close(self) -> None:
        """Closes the files; arrays already handed out stay valid."""
        for shard in self._shards:
            shard.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> Overlay:
        """Itself: the files are read-only, so a copied model shares them."""
        return self

    def __enter__(self) -> Overlay:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @contextlib.contextmanager
    def _naming(self, spec: WeightSpec, bits: int) -> Iterator[None]:
        """Puts file and tensors before what a codebook's numbers are refused for."""
        try:
            yield
        except FormatError as error:
            names = list(spec.codebook_names(bits).values())
            where, named = self._find(names[-1]).path, " and ".join(map(show, names))
            raise FormatError(f"{where}: tensor{'s' if names[1:] else ''} {named}: {error}") from None

    def _find(self, name: str) -> Shard:
        if name not in self._shard_of:
            raise FormatError(f"{self.folder} has no tensor {show(name)}: names() lists what it has")
        return self._shard_of[name]

    def _weight(self, parameter: str, bits: int) -> WeightSpec:
        if parameter not in self.weights:
            raise FormatError(
                f"{self.folder} has no quantized weight {show(parameter)}: weights lists its {len(self.weights)}"
            )
        spec = self.weights[parameter]
        if spec.bits == self.bits:
            require_bits(bits, self.bits, "the overlay")
        else:
            require_bits(bits, spec.bits, f"weight {show(parameter)}")
        return spec


def _require_finite(values: NDArray[np.float32]) -> None:
    finite = np.isfinite(values).all(axis=1)
    if not finite.all():
        raise FormatError(
            f"row {int(np.flatnonzero(~finite)[0])} has a value that is not finite, expected finite codebooks: "
            "quantize again, or download it again"
        )
