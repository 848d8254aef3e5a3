"""Log-probabilities of a model that does not exist: always the same, and the nearer each other the more bits.

value = base + noise x 2^-bits, where base depends on the model and the token's place, and noise on the bits as well.
"""

from __future__ import annotations

import re
from hashlib import blake2b

_NOISE = 4.0  # nats at 0 bits; 2 bits are within 1 nat of the base, 8 bits within 0.016


def split_words(text: str) -> list[str]:
    """The mock's tokens of a prompt, which joined are the text."""
    return re.findall(r"\s*\S+|\s+$", text)


def logprob(identity: str, bits: int, context: str, token: str) -> float:
    """Between -9 and -0.2 nats."""
    base = -1.2 - 6.8 * _share(identity, context, token)
    return base + _NOISE * (2 * _share(identity, context, token, str(bits)) - 1) * 2.0**-bits


def likeliest(identity: str, bits: int, context: str, token: str, count: int) -> dict[str, float]:
    """`token` and others, `count` in all but at least one, the likeliest first."""
    names = [token, *(f" other{i}" for i in range(1, count))]
    found = {name: logprob(identity, bits, context, name) for name in names}
    return dict(sorted(found.items(), key=lambda pair: -pair[1]))


def _share(*what: str) -> float:
    """A number from 0 to 1 that depends on `what` alone."""
    digest = blake2b("\0".join(what).encode("utf-8", "replace"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
