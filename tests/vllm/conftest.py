"""These tests need vLLM, which wants a transformers of its own: scripts/vllm_tests.sh makes an environment for them."""

from __future__ import annotations

import os
from importlib.util import find_spec

os.environ["VLLM_TARGET_DEVICE"] = "cpu"  # before vllm is imported: its Python alone does not say what it is for
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
collect_ignore_glob = [] if find_spec("vllm") else ["test_*.py"]
