"""Times of one reply, and its performance figures."""

import time

from ..events import Performance
from ..generation.speculate import DraftFigures
from ..machine.backend import mx


class ReplyClock:
    """Times, in seconds on `time.perf_counter`: the request, the start of prefill, first and last token."""

    def __init__(self, encoding_seconds: float = 0.0):
        """Start now; the request was made `encoding_seconds` earlier."""
        mx.reset_peak_memory()
        self.prefill_start = self.first = self.last = time.perf_counter()
        self.requested = self.prefill_start - encoding_seconds
        self.tokens, self.seconds_thinking = 0, 0.0
        self.drafts = DraftFigures()

    def count_token(self, *, thinking: bool) -> None:
        """Count a token drawn now; `thinking` means inside a thought."""
        now = time.perf_counter()
        if not self.tokens:
            self.first = now
        elif thinking:
            self.seconds_thinking += now - self.last
        self.last = now
        self.tokens += 1

    def performance(self, prefilled: int) -> Performance:
        """Return the figures of a reply that read `prefilled` prompt tokens."""
        prefill, decode = self.first - self.prefill_start, self.last - self.first
        return Performance(
            seconds_to_first_token=self.first - self.requested if self.tokens else 0.0,
            prefill_tokens_per_s=prefilled / prefill if prefill else 0.0,
            decode_tokens_per_s=(self.tokens - 1) / decode if decode else 0.0,
            seconds=time.perf_counter() - self.requested,
            seconds_thinking=self.seconds_thinking,
            active_nbytes=mx.get_active_memory(),
            peak_nbytes=mx.get_peak_memory(),
            cache_nbytes=mx.get_cache_memory(),
            drafts_accepted=self.drafts.share,
            drafts_by_place=self.drafts.by_place,
            draft_cost=self.drafts.cost,
            draft_gain=self.drafts.gain,
        )
