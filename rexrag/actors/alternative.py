"""Scores of a finished rollout for hint-free transfer, by one prefill of its end (§5b).

probe     o' | hint | o''  ──▶  log π_v(o'' | o', what of the hint stays)
target    y_≤j | y_>j      ──▶  log π_v(y_>j | y_≤j, hint), with j and the hint drawn
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from rexrag.actors.draft import Alternative, Draft
from rexrag.engine.protocol import Engine, GenerateRequest
from rexrag.env.branch import Branch, branch_positions
from rexrag.hints import HintPool


async def score_probe(engine: Engine, draft: Draft, *, hints: HintPool, cache_salt: str) -> Alternative:
    """The continuation of a probe without the part of its hint that goes."""
    assert draft.hint_id is not None, "a probe has a hint"
    assert draft.branch_point is not None, "a probe has a branch"
    at = draft.prompt_length + draft.branch_point
    end = at + len(hints.ids(draft.hint_id))
    stays = at + hints.kept(draft.hint_id)
    if stays == end:
        return Alternative(start=end, scores=draft.logprobs[end:], version=draft.versions[-1])
    ids = [*draft.token_ids[:stays], *draft.token_ids[end:]]
    scores, version = await _score(engine, ids, start=stays, cache_salt=cache_salt)
    return Alternative(start=end, scores=scores, version=version)


async def score_target(
    engine: Engine, draft: Draft, *, hints: HintPool, branch: Branch, cache_salt: str, rng: random.Random
) -> Alternative:
    """What follows a branch position of a target, drawn uniformly, as if a hint, drawn from the pool, stood there.

    Without scores where the target does not go on with what stays of that hint: no such probe leads to it. Without a
    draw where the target has no turn.
    """
    positions = branch_positions([turn.start for turn in draft.turns], draft.action_starts, branch=branch)
    if not positions:
        return Alternative()
    hint_id = hints.sample(rng)
    _, at = rng.choice(positions)
    drawn = at - draft.prompt_length
    hint, kept = hints.ids(hint_id), hints.kept(hint_id)
    start = at + kept
    if tuple(draft.token_ids[at:start]) != hint[:kept]:
        return Alternative(branch=drawn, hint_id=hint_id)
    if start == draft.length:
        return Alternative(branch=drawn, hint_id=hint_id, start=start, scores=(), version=draft.versions[-1])
    ids = [*draft.token_ids[:at], *hint, *draft.token_ids[start:]]
    scores, version = await _score(engine, ids, start=at + len(hint), cache_salt=cache_salt)
    return Alternative(branch=drawn, hint_id=hint_id, start=start, scores=scores, version=version)


async def _score(engine: Engine, ids: Sequence[int], *, start: int, cache_salt: str) -> tuple[list[float], int]:
    """Log-probs of ids[start:] and the version that they are of. The token that the engine samples is not used."""
    generation = await engine.generate(
        GenerateRequest(prompt_ids=ids, max_tokens=1, greedy=True, cache_salt=cache_salt, score_from=start)
    )
    return generation.scores, generation.score_versions[0]
