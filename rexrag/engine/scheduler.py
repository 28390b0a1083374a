"""What the next forward pass computes: admission, prefix reuse, chunked prefill. Pure: no tensors, no waiting.

    waiting ──admit (first come, first served)──▶ running ──finish──▶ its slot becomes a prefix entry
                                                    │
      each pass: one token of every sequence that decodes, and up to `prefill_tokens` tokens of prompts

A prefix is shared only within a salt. What a finished sequence left is taken over by its continuation, and copied
for another request (a probe, a second rollout). What a running sequence is just computing is waited for, then copied:
the prompt of a group is computed once.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from rexrag.engine.protocol import GenerateRequest
from rexrag.engine.slots import PrefixEntry, SlotTable, common_prefix


@dataclass(eq=False)
class LiveSequence:
    """A request on its way.

    Attributes:
        token_ids: prompt and sampled tokens.
        cached: how many of them have keys and values in the slot.
        source, shared: the running sequence whose first `shared` tokens will be copied as soon as it has them.
    """

    request: GenerateRequest
    token_ids: list[int]
    slot: int = -1
    cached: int = 0
    source: LiveSequence | None = None
    shared: int = 0
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    score_versions: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, request: GenerateRequest) -> LiveSequence:
        return cls(request=request, token_ids=list(request.prompt_ids))

    @property
    def sampled_ids(self) -> list[int]:
        return self.token_ids[len(self.request.prompt_ids) :]

    @property
    def wants_scores(self) -> bool:
        return self.request.score_from is not None and not self.logprobs

    @property
    def shareable(self) -> int:
        """Most tokens whose keys and values may come from elsewhere: the hidden states of the rest are needed."""
        if self.wants_scores and self.request.score_from is not None:
            return min(self.request.score_from, len(self.token_ids)) - 1
        return len(self.token_ids) - 1


@dataclass(frozen=True, kw_only=True)
class SlotCopy:
    """Copy the first positions of a slot, before the pass and in order."""

    source: int
    target: int
    length: int


@dataclass(frozen=True, kw_only=True)
class PlannedSpan:
    """Tokens [start, end) of a sequence that the pass computes."""

    sequence: LiveSequence
    start: int
    end: int

    @property
    def completes(self) -> bool:
        """A token is sampled after it."""
        return self.end == len(self.sequence.token_ids)


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    copies: list[SlotCopy]
    spans: list[PlannedSpan]


class Scheduler:
    """Holds the sequences of an engine and decides pass by pass.

    Args:
        prefill_tokens: most prompt tokens of one pass, exceeded only by tokens that must be scored together.

    Life cycle: `add`, then per pass `plan`, `advance` for each of its spans, `finish` for what ended.
    """

    def __init__(self, *, num_slots: int, prefill_tokens: int) -> None:
        self._slots = SlotTable(num_slots)
        self._prefill_tokens = prefill_tokens
        self._waiting: deque[LiveSequence] = deque()
        self._running: list[LiveSequence] = []
        self.reused_tokens = 0

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def add(self, sequence: LiveSequence) -> None:
        self._waiting.append(sequence)

    def plan(self) -> StepPlan:
        """The next pass; without spans if there is nothing to do."""
        copies: list[SlotCopy] = []
        # Before admission: a source that has finished may lose its slot to a request admitted now.
        for sequence in self._running:
            self._follow(sequence, copies)
        while self._waiting and self._admit(self._waiting[0], copies):
            self._running.append(self._waiting.popleft())
        spans = []
        budget = self._prefill_tokens
        for sequence in self._running:
            if sequence.source is not None:
                continue
            pending = len(sequence.token_ids) - sequence.cached
            length = pending if pending == 1 else self._chunk(sequence, budget)
            if length:
                spans.append(PlannedSpan(sequence=sequence, start=sequence.cached, end=sequence.cached + length))
                budget -= length if pending > 1 else 0
        assert spans or not self._running, "a running sequence waits for one that does not move"
        return StepPlan(copies=copies, spans=spans)

    def advance(self, span: PlannedSpan) -> None:
        """The pass has computed a span."""
        span.sequence.cached = span.end

    def finish(self, sequence: LiveSequence) -> None:
        """A sequence has ended; what its slot holds is kept for its continuation."""
        self._running.remove(sequence)
        entry = PrefixEntry(salt=sequence.request.cache_salt, token_ids=sequence.token_ids[: sequence.cached])
        self._slots.retain(sequence.slot, entry)

    def drop(self, sequence: LiveSequence) -> None:
        """Nobody waits for a sequence any more, running or not."""
        if sequence in self._waiting:
            self._waiting.remove(sequence)
            return
        self._running.remove(sequence)
        self._slots.free(sequence.slot)
        for follower in self._running:
            if follower.source is sequence:
                self._find_source(follower)

    def release(self, salt: str) -> None:
        """Forget the prefix entries of a salt."""
        self._slots.release(salt)

    def invalidate(self) -> None:
        """All keys and values are void: running sequences start again, entries are forgotten."""
        self._slots.release()
        for sequence in self._running:
            sequence.cached = 0
        for sequence in self._running:
            self._find_source(sequence)

    def _chunk(self, sequence: LiveSequence, budget: int) -> int:
        """How many pending tokens fit the budget; the positions that give scores are never parted."""
        pending = len(sequence.token_ids) - sequence.cached
        length = min(pending, max(budget, 0))
        if length and sequence.wants_scores and length < pending:
            before_scores = sequence.shareable - sequence.cached
            return pending if before_scores <= 0 else min(length, before_scores)
        return length

    def _admit(self, sequence: LiveSequence, copies: list[SlotCopy]) -> bool:
        """Give a waiting sequence a slot with the longest prefix there is; False without a slot."""
        limit = sequence.shareable
        salt = sequence.request.cache_salt
        entry_slot, entry_length = self._slots.longest_match(salt, sequence.token_ids[:limit])
        self._find_source(sequence)
        if entry_length and entry_length >= sequence.shared:
            sequence.source, sequence.shared = None, 0
            self._reuse_entry(sequence, slot=entry_slot, length=entry_length, copies=copies)
            return True
        slot = self._slots.take()
        if slot is None:
            return False
        sequence.slot = slot
        self._follow(sequence, copies)
        return True

    def _reuse_entry(self, sequence: LiveSequence, *, slot: int, length: int, copies: list[SlotCopy]) -> None:
        """Take an entry over if all of it is used or there is no other slot; else copy from it."""
        is_continuation = length == len(self._slots.entry(slot).token_ids)
        target = None if is_continuation else self._slots.take(keep=slot)
        if target is None:
            self._slots.claim(slot)
            sequence.slot = slot
        else:
            self._slots.touch(slot)
            sequence.slot = target
            copies.append(SlotCopy(source=slot, target=target, length=length))
        sequence.cached = length
        self.reused_tokens += length

    def _find_source(self, sequence: LiveSequence) -> None:
        """The earlier running sequence of this salt with the longest common prefix, if any, becomes the source."""
        sequence.source, sequence.shared = None, 0
        limit = sequence.shareable
        for other in self._running:
            if other is sequence:
                break
            if other.request.cache_salt != sequence.request.cache_salt:
                continue
            # The newest token of a sequence that decodes is not in the cache yet.
            reachable = min(limit, max(other.cached, len(other.token_ids) - 1))
            shared = common_prefix(other.token_ids[:reachable], sequence.token_ids[:reachable])
            if shared > max(sequence.shared, sequence.cached):
                sequence.source, sequence.shared = other, shared

    def _follow(self, sequence: LiveSequence, copies: list[SlotCopy]) -> None:
        """Copy from the source if it has computed what is shared."""
        source = sequence.source
        if source is None or source.cached < sequence.shared:
            return
        copies.append(SlotCopy(source=source.slot, target=sequence.slot, length=sequence.shared))
        sequence.cached = sequence.shared
        self.reused_tokens += sequence.shared
        sequence.source, sequence.shared = None, 0
