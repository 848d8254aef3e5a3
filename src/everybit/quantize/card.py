"""The model card (README.md) of an overlay."""

from __future__ import annotations

from typing import Any

from everybit.formats.sizes import SizeReport

TEMPLATE = """---
library_name: everybit
base_model: {name}
base_model_relation: quantized
tags: [everybit, any-precision, quantized]
---
# {name}, every precision from {low} to {high} bits

An everybit overlay: one set of bit-planes; a b-bit model reads b of them and one codebook.

```python
import everybit  # first: it registers the format with transformers

model = everybit.load("this/folder", bits={middle})
model.set_precision({low})
```

| bits | bits per weight, codebooks counted | bytes read |
|---|---|---|
{rows}

Made by everybit {version} with the solver `{solver}`, codebook `{codebook}`, calibration `{calibration}`.
Quality on your own text: `everybit eval this/folder --text FILE --reference {name}`.
"""


def model_card(config: dict[str, Any], sizes: SizeReport) -> str:
    """Markdown with the size of every precision and how the overlay was made."""
    provenance = config["quantization_config"]["provenance"]
    bits = list(sizes.rows)
    calibration = provenance["calibration"]
    return TEMPLATE.format(
        name=provenance["source"]["name"],
        low=bits[0],
        high=bits[-1],
        middle=bits[len(bits) // 2],
        rows="\n".join(f"| {b} | {size.bpw:.2f} | {size.bytes:,} |" for b, size in sizes.rows.items()),
        version=provenance["everybit_version"],
        solver=provenance["solver"],
        codebook=config["quantization_config"]["codebook"],
        calibration=calibration.get("file", calibration["kind"]),
    )
