"""The report's three faces: JSON, table, plot."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from everybit.errors import OutputError
from everybit.evaluate import FloatQuality, Report, Row, check_plot, figure, plot

ROWS = [
    Row(2, 3.5, 1000, 40.0, 2.0, 0.5, 3.0, 0.5),
    Row(4, 6.0, 2000, math.inf, math.nan, 0.01, 0.1, 0.9),
    Row(8, 40.0, 9000, 10.0, 1.0, 0.0, 0.0, 1.0),
]
REPORT = Report(FloatQuality(9.99, 0.99, 16.0, 4000), ROWS, tokens=123, text_bytes=456)
BARE = Report(None, [Row(3, None, None, 5.0, 1.0, None, None, None)], tokens=1, text_bytes=1)


def test_json_is_the_documented_document() -> None:
    document = json.loads(REPORT.json(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert list(document) == ["float", "rows", "intervals"]
    assert document["float"] == {"ppl": 9.99, "bits_per_byte": 0.99, "bpw": 16.0, "bytes": 4000}
    keys = ["bits", "bpw", "bytes", "ppl", "bits_per_byte", "kl_mean", "kl_p99", "top1"]
    keys += ["kl_interval", "ppl_ratio", "ppl_ratio_interval"]
    assert [list(row) for row in document["rows"]] == [keys] * 3
    assert (document["rows"][1]["ppl"], document["rows"][1]["bits_per_byte"]) == (None, None)
    assert json.loads(BARE.json())["float"] is None


def test_table_is_aligned_and_drops_what_was_not_measured() -> None:
    lines = REPORT.table().splitlines()
    assert lines[0].split() == ["bits", "bpw", "bytes", "perplexity", "bits/byte", "KL", "mean", "KL", "p99", "top-1"]
    assert len({len(line) for line in lines[:-1]}) == 1
    assert lines[1].split() == ["float", "16.00", "4,000", "9.9900", "0.9900"]
    assert BARE.table().splitlines()[0].split() == ["bits", "perplexity", "bits/byte"]


@pytest.mark.parametrize(("suffix", "magic"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".SVG", b"<?xml")])
@pytest.mark.parametrize("report", [REPORT, BARE])
def test_plot_is_what_its_suffix_says(tmp_path: Path, report: Report, suffix: str, magic: bytes) -> None:
    path = tmp_path / f"quality{suffix}"
    plot(report, path)
    assert path.read_bytes().startswith(magic)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_svg_is_the_same_each_time_and_shows_the_points(tmp_path: Path) -> None:
    plot(REPORT, tmp_path / "a.svg")
    plot(REPORT, tmp_path / "b.svg")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert "(zero at 8 bits)" in (tmp_path / "a.svg").read_text()


def test_points_that_no_log_axis_can_hold_are_left_out() -> None:
    axis = Figure().subplots()
    figure._draw_kl(axis, REPORT)
    assert [list(line.get_xdata()) for line in axis.lines] == [[3.5, 6.0], [3.5, 6.0]]  # 8 bits: KL is zero
    axis = Figure().subplots()
    figure._draw_perplexity(axis, REPORT)
    assert list(axis.lines[0].get_xdata()) == [3.5, 40.0]  # 4 bits: infinite


def test_plots_that_cannot_be_written_are_refused_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OutputError, match=r"cannot plot to '\.pdf'; expected \.png or \.svg"):
        check_plot(tmp_path / "a.pdf")
    with pytest.raises(OutputError, match="does not exist"):
        check_plot(tmp_path / "absent" / "a.png")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(OutputError, match=r'pip install "everybit\[quantize\]"'):
        check_plot(tmp_path / "a.png")
