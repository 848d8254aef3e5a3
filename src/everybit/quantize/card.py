"""The model card (README.md) of an overlay."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from everybit.errors import FormatError, OutputError
from everybit.formats.files import open_inside
from everybit.formats.sizes import SizeReport

CARD = "README.md"
BEGIN, END = "<!-- everybit eval -->", "<!-- end of everybit eval -->"
_LICENCE = re.compile(r"^(license|license_name|license_link): *[\w.+:/-]+ *$", re.MULTILINE)

TEMPLATE = """---
library_name: everybit
base_model: {base}
base_model_relation: quantized
{licence}tags: [everybit, any-precision, quantized]
---
# {name}, {precisions}

An everybit overlay: one set of bit-planes; a b-bit model reads b of them and one codebook.

| bits | bits per weight, codebooks counted | bytes read |
|---|---|---|
{rows}

With the engine, without torch: `everybit generate this/folder --prompt "Once upon a time" --bits {middle}`, or
`everybit serve this/folder` for an OpenAI-compatible server at every precision. In transformers:

```python
import everybit  # first: it registers the format with transformers

model = everybit.load("this/folder", bits={middle})
model.set_precision({low})
```

In vLLM, with everybit installed beside it: `vllm serve this/folder --quantization everybit-{middle}bit`.

Made by everybit {version} with the solver `{solver}`, codebook `{codebook}`, calibration {calibration}.

{begin}
Quality on your own text: `everybit eval this/folder --text FILE --reference {name}`; `--card` writes it here.
{end}
"""


def model_card(config: dict[str, Any], sizes: SizeReport, source: Path | None = None) -> str:
    """Markdown with the size of every precision and how the overlay was made; the licence is that which the card in
    `source`, the float model's folder, names."""
    provenance = config["quantization_config"]["provenance"]
    bits = list(sizes.rows)
    return TEMPLATE.format(
        name=plain(provenance["source"]["name"]),
        base=_yaml(provenance["source"]["name"]),
        licence="" if source is None else _licence(source),
        low=bits[0],
        precisions=f"every precision from {bits[0]} to {bits[-1]} bits" if len(bits) > 1 else f"{bits[0]} bits",
        middle=bits[len(bits) // 2],
        rows="\n".join(f"| {b} | {size.bpw:.2f} | {size.bytes:,} |" for b, size in sizes.rows.items()),
        version=provenance["everybit_version"],
        solver=provenance["solver"],
        codebook=config["quantization_config"]["codebook"],
        calibration=_calibration(provenance["calibration"]),
        begin=BEGIN,
        end=END,
    )


def read_card(folder: Path) -> str:
    """The folder's card. Raises: OutputError where there is none, FormatError where it links to elsewhere"""
    if not os.path.lexists(folder / CARD):
        raise OutputError(f"{folder / CARD} is not there, expected the card that everybit quantize wrote")
    try:
        with open_inside(folder, CARD) as file:
            return file.read().decode()
    except UnicodeDecodeError:
        raise OutputError(f"{folder / CARD} is not UTF-8, expected the card that everybit quantize wrote") from None


def plain(name: str) -> str:
    """A file's name as it may stand in a card."""
    return re.sub(r"[^\w.+() -]", "_", name)


def _yaml(name: str) -> str:
    """As a text of YAML: quoted, which JSON does alike, unless it is a plain word that YAML has no meaning for."""
    meant = {"null", "true", "false", "yes", "no", "on", "off", "y", "n"}
    simple = re.fullmatch(r"[A-Za-z][\w.-]*(/[\w.-]+)?", name, re.ASCII) and name.lower() not in meant
    return name if simple else json.dumps(name)


def write_quality(folder: Path, table: str, how: str) -> None:
    """Puts what `everybit eval` measured into the folder's card, in the place of what it measured before.

    Raises: OutputError
    """
    path, card = folder / CARD, read_card(folder)
    before, begin, rest = card.partition(BEGIN)
    _, end, after = rest.partition(END)
    if begin and not end:
        raise OutputError(f"{path} has {BEGIN} without {END}: remove the one or add the other")
    if not begin:
        before, after = card.rstrip() + "\n\n", "\n"
    partial = path.with_name(CARD + ".partial")
    try:
        partial.unlink(missing_ok=True)  # of a killed run, or a link to elsewhere
        with open(partial, "x", encoding="utf-8") as file:
            file.write(f"{before}{BEGIN}\n{how}\n\n```text\n{table}\n```\n{END}{after}")
        partial.replace(path)
    except OSError as error:
        raise OutputError(f"cannot write {path} ({error.strerror or error}): make the folder writable") from error


def _calibration(record: dict[str, Any]) -> str:
    what = f"`{record.get('file', record['kind'])}`"
    if "sequences" in record and "length" in record:
        what += f" ({record['sequences']} sequences of up to {record['length']} tokens)"
    return what


def _licence(source: Path) -> str:
    """The lines of the card's metadata that name it; none where there is no card, or nothing plain in it."""
    try:
        with open_inside(source, CARD) as file:
            card = file.read(1 << 20).decode("utf-8", errors="replace")
    except FormatError:
        return ""
    if not card.startswith("---\n"):
        return ""
    found = _LICENCE.finditer(card[4:].partition("\n---")[0])
    return "".join(f"{match.group().rstrip()}\n" for match in found)
