"""The part of everybit that measures: `everybit-bench`. The whole is the distribution everybit."""

__version__ = "0.1.0"
