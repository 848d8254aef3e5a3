"""What is refused, in one line each; and that nothing a precision does not need is read."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from everybit.errors import EverybitError, FormatError, ModelError, PrecisionError, SourceError
from everybit.formats import Overlay
from everybit.integrations.vllm import config as config_module
from everybit.integrations.vllm import register
from everybit.integrations.vllm.config import OverlayConfig
from everybit.integrations.vllm.stream import translate
from tests.vllm import engine
from tests.vllm.overlays import build


@pytest.fixture(scope="module")
def overlay(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def quantization(overlay: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((overlay / "config.json").read_text())["quantization_config"]
    return found


def test_a_precision_that_is_not_there(overlay: Path, quantization: dict[str, object]) -> None:
    with pytest.raises(PrecisionError, match=r"bits 5 asked, the overlay has 3, 4, 6, 8"):
        engine.configure(overlay, quantization="everybit-5bit")
    overrides = {"quantization_config": {**quantization, "bits": 2}}
    with (
        pytest.raises(FormatError, match=r"_lut2 did not come while loading at 2 bits"),
        engine.model(overlay, hf_overrides=overrides),
    ):
        pass


def test_a_vllm_that_was_not_tested(quantization: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config_module, "version", lambda name: "0.34.1")
    with pytest.raises(ModelError, match=r"vllm 0\.34\.1 is installed, .* tested with vllm 0\.33") as caught:
        OverlayConfig.from_config(quantization)
    assert "\n" not in str(caught.value)


def test_a_model_that_is_no_overlay(overlay: Path) -> None:
    with pytest.raises(SourceError, match="not an overlay"):
        engine.configure(overlay.parent / "float", quantization="everybit-3bit")


def test_a_weight_whose_tensors_are_missing(overlay: Path, quantization: dict[str, object]) -> None:
    config = OverlayConfig.from_config(quantization)
    name = "model.layers.0.self_attn.q_proj.weight"
    with pytest.raises(EverybitError, match=r"q_proj.weight_cells did not come"):
        list(translate(config, [(f"{name}_plane0", torch.zeros(1))]))


def test_what_the_precision_does_not_need_is_dropped_unread(overlay: Path, quantization: dict[str, object]) -> None:
    register()
    register()  # again does no harm
    config = OverlayConfig.from_config({**quantization, "bits": [3]})
    with Overlay.open(overlay) as opened:
        config.taken = set(opened.weights)
        names = [name for name, _ in translate(config, ((name, None) for name in opened.names()))]
        needed = set(opened.plain_names())
        for weight in opened.weights:
            needed |= {f"{weight}_{suffix}" for suffix in ("plane0", "plane1", "plane2", "lut3", "scale")}
        assert set(names) == needed


def test_the_entry_point_is_cheap() -> None:
    code = "import sys; from everybit.integrations.vllm import register; print({'torch', 'vllm'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
