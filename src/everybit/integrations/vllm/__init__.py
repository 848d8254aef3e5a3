"""Overlays in vLLM, through the entry point `everybit` of the group `vllm.general_plugins`.

`vllm serve OVERLAY` serves the most bits it has, `--quantization everybit-3bit` any other precision: docs/vllm.md.
"""

from __future__ import annotations


def register() -> None:
    """Tell vLLM of the format. Called in each of its processes; again does no harm."""
    from everybit.integrations.vllm.config import register_methods

    register_methods()
