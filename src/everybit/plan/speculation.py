"""What drafting tokens with fewer planes of the same weights gains (Leviathan et al. 2023, section 3.3)."""

from __future__ import annotations

from dataclasses import dataclass

from everybit.errors import SourceError


@dataclass(frozen=True, slots=True)
class Speculation:
    """`drafts` tokens a step, each right with probability `acceptance`; `draft_bits`: the precision that drafts."""

    drafts: int
    acceptance: float
    draft_bits: float

    def __post_init__(self) -> None:
        if not 1 <= self.drafts <= 64 or not 0 <= self.acceptance <= 1 or not 1 <= self.draft_bits <= 32:
            raise SourceError(f"{self}: expected 1 to 64 drafts, an acceptance from 0 to 1, and 1 to 32 bits: fix it")

    @property
    def tokens(self) -> float:
        """Expected tokens of a verified step, the one that verification itself yields included."""
        a = self.acceptance
        return self.drafts + 1.0 if a == 1 else (1 - a ** (self.drafts + 1)) / (1 - a)

    def gain(self, draft: float, verify: float) -> float:
        """Speed over plain decoding; `draft`, `verify`: their times over that of a plain step."""
        return self.tokens / (self.drafts * draft + verify)


def speculation_of(drafts: int | None, acceptance: float | None, draft_bits: float | None) -> Speculation | None:
    """Of options that belong together. Raises: SourceError"""
    if drafts is None and acceptance is None and draft_bits is None:
        return None
    if drafts is None or acceptance is None or draft_bits is None:
        raise SourceError("--drafts, --acceptance and --draft-bits belong together: give all three")
    return Speculation(drafts, acceptance, draft_bits)
