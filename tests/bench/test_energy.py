"""Counters in a made-up sysfs and a made-up NVML: sums, wrap-around, reasons, carbon."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from everybit.bench.energy import (
    Energy,
    Meter,
    Reading,
    Source,
    carbon,
    energy,
    find_meter,
    idle_power,
    parse_intensity,
)
from everybit.errors import SourceError

S = 1_000_000_000


@pytest.fixture(autouse=True)
def no_nvml(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)


def zone(root: Path, path: str, name: str, uj: int, span: int = 65_000_000_000) -> Path:
    folder = root / path
    folder.mkdir(parents=True)
    for file, text in (("name", name), ("energy_uj", uj), ("max_energy_range_uj", span)):
        (folder / file).write_text(f"{text}\n")
    return folder / "energy_uj"


def machine(root: Path) -> tuple[Meter, Path, Path]:
    package = zone(root, "intel-rapl:0", "package-0", 5_000_000)
    dram = zone(root, "intel-rapl:0:1", "dram", 1_000_000)
    zone(root, "intel-rapl:0:0", "core", 7)
    zone(root, "intel-rapl:1", "psys", 7)
    zone(root, "intel-rapl-mmio:0", "package-0", 7)
    return find_meter(root), package, dram


def test_packages_and_dram_are_added_and_nothing_twice(tmp_path):
    meter, package, dram = machine(tmp_path)
    assert meter.names == ("RAPL package-0 (intel-rapl:0)", "RAPL dram (intel-rapl:0:1)")
    start = meter.read(10 * S)
    package.write_text("25000000")
    dram.write_text("2000000")
    end = meter.read(20 * S)
    idle = idle_power([Reading(0, (0,)), Reading(S, (1_000_000,)), Reading(3 * S, (3_000_000,))])
    found = energy(meter, start, end, local=True, output_tokens=42, idle=idle)
    assert (found.status, found.joules, found.seconds, found.joules_per_output_token) == ("measured", 21.0, 10.0, 0.5)
    assert (found.idle_w, found.idle_sigma_w, found.joules_above_idle) == (1.0, 0.0, 11.0)


def test_a_counter_that_went_round_goes_on(tmp_path):
    counter = zone(tmp_path, "intel-rapl:0", "package-0", 64_999_000_000)
    meter = find_meter(tmp_path)
    start = meter.read(0)
    counter.write_text("1000000")
    end = meter.read(60 * S)
    assert energy(meter, start, end, local=True, output_tokens=1).joules == 2.0
    late = meter.read(126 * S)  # at 1000 W it could have gone round once more unseen
    unsure = energy(meter, end, late, local=True, output_tokens=1)
    assert unsure.status == "unavailable"
    assert "gone round" in unsure.reason


def test_reasons_for_no_figure(tmp_path):
    meter = find_meter(tmp_path)
    assert meter.read() is None
    assert energy(meter, None, None, local=True, output_tokens=1).reason == "no RAPL counter; pynvml is not installed"
    assert "another machine" in energy(meter, None, None, local=False, output_tokens=1).reason
    meter, package, _ = machine(tmp_path)
    start = meter.read(0)
    package.unlink()
    assert energy(meter, start, meter.read(S), local=True, output_tokens=1).reason == "a counter could not be read"


def test_one_hidden_package_hides_all(tmp_path, monkeypatch):
    machine(tmp_path)
    real = Path.read_text

    def guarded(self, *given, **more):
        if self.parent.name == "intel-rapl:0:1" and self.name == "energy_uj":
            raise PermissionError(self)
        return real(self, *given, **more)

    monkeypatch.setattr(Path, "read_text", guarded)
    meter = find_meter(tmp_path)
    assert meter.sources == ()
    assert meter.reason.startswith("RAPL is readable by root only")


def test_gpus(tmp_path, monkeypatch):
    class NVMLError(Exception):
        pass

    millijoules = [1000, 2000]
    fake = SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda i: i,
        nvmlDeviceGetTotalEnergyConsumption=lambda i: millijoules[i],
    )
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    meter = find_meter(tmp_path)
    assert meter.names == ("NVML GPU 0", "NVML GPU 1")
    start = meter.read(0)
    millijoules[1] += 500
    assert energy(meter, start, end := meter.read(S), local=True, output_tokens=0).joules == 0.5
    millijoules[0] = 0  # the driver was loaded anew
    assert energy(meter, end, meter.read(2 * S), local=True, output_tokens=0).status == "unavailable"

    def broken():
        raise NVMLError("no driver")

    fake.nvmlInit = broken
    assert "NVML: no driver" in find_meter(tmp_path).reason


def test_idle_power_has_an_error():
    steady = [Reading(i * S, (i * 2_000_000,)) for i in range(5)]
    assert idle_power(steady).sigma == 0
    uneven = idle_power([Reading(0, (0,)), Reading(S, (1_000_000,)), Reading(2 * S, (4_000_000,))])
    assert (uneven.watts, uneven.sigma) == (2.0, pytest.approx(1.0))
    with pytest.raises(SourceError, match="expected 3"):
        idle_power(steady[:2])


@pytest.mark.parametrize(
    ("text", "expected"),
    [("400", (400, 400, 400)), ("400+-50", (400, 350, 450)), ("350 - 450", (400, 350, 450)), ("1±0.5", (1, 0.5, 1.5))],
)
def test_intensity(text, expected):
    assert parse_intensity(text) == expected


@pytest.mark.parametrize("text", ["", "-4", "50+-60", "450-350", "nan", "1e3", "400g", "\u0661"])
def test_bad_intensity(text):
    with pytest.raises(SourceError, match="carbon intensity"):
        parse_intensity(text)


def test_carbon_carries_both_uncertainties():
    used = Energy("measured", joules=7.2e6, seconds=1000.0, idle_w=3600.0, idle_sigma_w=100.0, joules_above_idle=3.6e6)
    found = carbon(used, "400+-100")
    assert found is not None
    assert found.grams == (800, 600, 1000)
    low, high = 300 * (3.6e6 - 196e3) / 3.6e6, 500 * (3.6e6 + 196e3) / 3.6e6
    assert found.grams_above_idle == pytest.approx((400, low, high))
    assert carbon(Energy("unavailable", "why"), "400") is None


def test_sources_are_read_in_order():
    meter = Meter([Source("a", iter([0, 5]).__next__, 10), Source("b", iter([9, 11]).__next__)])
    meter.read(0)
    assert meter.read(1) == Reading(1, (5, 2), 0)
