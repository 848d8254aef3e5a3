"""Results as one HTML file that needs no network: charts drawn here as SVG, a little script for looking closer."""

from everybit.bench.report.page import render, render_many, write_report, write_text

__all__ = ["render", "render_many", "write_report", "write_text"]
