"""One episode: turns of the policy and what the environment answers, until it ends (§2, §3).

    prompt -> [turn -> search -> passages]* -> answer          a target
                 \\-> hint -> turn -> ... -> answer             a probe, written into a fork of a failed target

Pure asyncio over the `Engine` and `Retriever` protocols. An episode never waits for another one.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

from rexrag.actors.alternative import score_probe, score_target
from rexrag.actors.draft import Alternative, Draft
from rexrag.actors.scoring import NO_SCORES, Scorer, Scores
from rexrag.actors.seeds import draw_seed
from rexrag.engine.protocol import Engine, GenerateRequest, Generation
from rexrag.env.actions import STOP_STRINGS, Answer, Malformed, Search, locate_action
from rexrag.env.branch import branch_point
from rexrag.env.codec import Codec
from rexrag.env.observation import render_feedback, render_observation, render_refusal
from rexrag.env.prompt import render_prompt
from rexrag.errors import QueryRefusedError, RetrieverError
from rexrag.hints import HintPool
from rexrag.retrieval.protocol import Retriever
from rexrag.types import EndReason, Question, Trajectory, Turn


@dataclass(frozen=True, kw_only=True)
class EpisodeSettings:
    """Limits of `environment` and switches of §2; token counts include prompt, hint and observations.

    Attributes:
        dead_end: probe each failed target the moment it fails, or those of a question whose targets all failed.
        scored: rollouts that are scored for hint-free transfer when they end (§5b).
        eval_episodes: greedy episodes of an evaluation that run at once; more than the engine has room for push
            each other's prefixes out of its cache.
    """

    group_size: int
    max_turns: int
    max_turn_tokens: int
    max_observation_tokens: int
    max_trajectory_tokens: int
    top_k: int
    probe_rate: float
    branch: Literal["answer", "turn"]
    seed: int
    dead_end: Literal["rollout", "group"]
    scored: Literal["none", "probes", "all"]
    eval_episodes: int
    prompt_template: str | None
    system_prompt: str | None


@dataclass
class SearchCounts:
    """Searches of all episodes of an actor: those that found nothing, and those that could not be made."""

    empty: int = 0
    failed: int = 0


@dataclass(frozen=True, kw_only=True)
class EpisodeParts:
    """What an episode is played with; shared by all episodes of an actor."""

    engine: Engine
    retriever: Retriever
    codec: Codec
    hints: HintPool
    scorer: Scorer
    settings: EpisodeSettings
    searches: SearchCounts = field(default_factory=SearchCounts)


class Episode:
    """One rollout: writes turns into a draft until it ends.

    Args:
        salt: of its prefix entries in the engine's cache.
        names: what its draws are seeded by.
        on_progress: gets the number of tokens just written.
    """

    def __init__(
        self,
        parts: EpisodeParts,
        question: Question,
        *,
        salt: str,
        names: tuple[str | int, ...],
        greedy: bool = False,
        on_progress: Callable[[int], None] | None = None,
    ) -> None:
        self.question = question
        self.salt = salt
        self.on_progress = on_progress
        self._parts = parts
        self._settings = parts.settings
        self._names = names
        self._greedy = greedy

    def new_draft(self) -> Draft:
        settings = self._settings
        prompt = render_prompt(
            self.question.question,
            codec=self._parts.codec,
            template=settings.prompt_template,
            system_prompt=settings.system_prompt,
        )
        draft = Draft.start(prompt, version=self._version)
        draft.gold_hits = [] if self._parts.scorer.knows_gold(self.question) else None
        return draft

    async def run(self, draft: Draft) -> Trajectory:
        """Write turns until the episode ends; a draft with a hint id begins with that hint.

        Raises:
            RetrieverSetupError: no search can be answered under these settings.
            ConfigError: a reward function of the user's own broke.
        """
        while (end_reason := await self._turn(draft)) is None:
            pass
        if draft.parent is None:
            self._mark_branch(draft)
        masked = end_reason is EndReason.ENV_ERROR
        if not masked and not self._greedy:
            draft.alternative = await self._alternative(draft)
        scores = NO_SCORES if masked else await self._score(draft)
        text = self._parts.codec.decode(draft.token_ids[draft.prompt_length :])
        return draft.finish(end_reason, scores=scores, text=text)

    async def _alternative(self, draft: Draft) -> Alternative | None:
        """Scores for hint-free transfer, where they are wanted of such a rollout."""
        parts, scored = self._parts, self._settings.scored
        if draft.parent is not None and scored != "none":
            return await score_probe(parts.engine, draft, hints=parts.hints, cache_salt=self.salt)
        if draft.parent is None and scored == "all":
            rng = random.Random(draw_seed(self._settings.seed, *self._names, "alternative"))
            return await score_target(
                parts.engine,
                draft,
                hints=parts.hints,
                branch=self._settings.branch,
                cache_salt=self.salt,
                rng=rng,
            )
        return None

    @property
    def _version(self) -> int:
        return self._parts.engine.version.step

    async def _score(self, draft: Draft) -> Scores:
        num_turns = len(draft.turns)
        valid_share = (num_turns - draft.num_malformed) / num_turns if num_turns else 0.0
        return await self._parts.scorer.score(draft.answer, question=self.question, valid_share=valid_share)

    async def _turn(self, draft: Draft) -> EndReason | None:
        """One model turn and what the environment answers; the reason if the episode ends with it."""
        generation = await self._generate(draft)
        if generation is None:
            return EndReason.LENGTH
        action = self._close_turn(draft)
        if isinstance(action, Answer):
            draft.answer = action.text
            return EndReason.ANSWER
        out_of_tokens = draft.length >= self._settings.max_trajectory_tokens
        if out_of_tokens and isinstance(action, Malformed) and generation.finish == "length":
            return EndReason.LENGTH
        if len(draft.turns) > self._settings.max_turns:
            return EndReason.TURNS
        if isinstance(action, Search):
            return await self._search(draft, action)
        return self._append_env(draft, render_feedback(action, codec=self._parts.codec))

    async def _generate(self, draft: Draft) -> Generation | None:
        """Let the policy write the rest of its turn, after the hint if one is due; None without room for a token."""
        settings, hints = self._settings, self._parts.hints
        hint_due = draft.hint_id is not None and draft.length - draft.prompt_length == draft.branch_point
        hint = hints.ids(draft.hint_id) if hint_due and draft.hint_id is not None else ()
        start = draft.length + len(hint)
        room = min(draft.turn_start + settings.max_turn_tokens, settings.max_trajectory_tokens) - start
        if room < 1:
            return None
        request = GenerateRequest(
            prompt_ids=[*draft.token_ids, *hint],
            max_tokens=room,
            stop=STOP_STRINGS,
            greedy=self._greedy,
            seed=draw_seed(settings.seed, *self._names, len(draft.turns), "tokens"),
            cache_salt=self.salt,
            score_from=draft.length if hint else None,
        )
        began = time.monotonic()
        generation = await self._parts.engine.generate(request)
        draft.generate_s += time.monotonic() - began
        if hint:
            draft.add_hint(hint, scores=generation.scores, versions=generation.score_versions)
        draft.add_policy(generation)
        if self.on_progress is not None:
            self.on_progress(len(hint) + len(generation.token_ids))
        return generation

    def _close_turn(self, draft: Draft) -> Search | Answer | Malformed:
        """Find the turn's action among its policy tokens, and cut what was written after it."""
        positions = draft.policy_positions()
        located = locate_action([draft.token_ids[i] for i in positions], codec=self._parts.codec)
        if located.end < len(positions):
            draft.cut(positions[located.end])
        name = {Search: "search", Answer: "answer", Malformed: "malformed"}[type(located.action)]
        action_start = None if located.start is None else positions[located.start]
        draft.turns.append(Turn(start=draft.turn_start, end=draft.length, action=name, action_start=action_start))
        if name == "malformed":
            draft.num_malformed += 1
        return located.action

    async def _search(self, draft: Draft, action: Search) -> EndReason | None:
        settings = self._settings
        began = time.monotonic()
        try:
            passages = await self._parts.retriever.search(action.query, top_k=settings.top_k)
        except QueryRefusedError:
            draft.num_refused += 1
            draft.turns[-1] = replace(draft.turns[-1], action="refused")
            return self._append_env(draft, render_refusal(codec=self._parts.codec))
        except RetrieverError as error:
            self._parts.searches.failed += 1
            draft.failure = str(error)
            return EndReason.ENV_ERROR
        finally:
            draft.search_s += time.monotonic() - began
        self._parts.searches.empty += not passages
        codec = self._parts.codec
        ids, num_shown = render_observation(passages, codec=codec, max_tokens=settings.max_observation_tokens)
        end_reason = self._append_env(draft, ids)
        if end_reason is None:
            draft.num_searches += 1
            if draft.gold_hits is not None:
                shown = codec.decode(ids)
                is_gold = self._parts.scorer.shows_gold(self.question, passages=passages[:num_shown], shown=shown)
                draft.gold_hits.append(is_gold)
        return end_reason

    def _append_env(self, draft: Draft, ids: list[int]) -> EndReason | None:
        """Append an observation or feedback if a turn fits after it; otherwise the episode ends there."""
        if draft.length + len(ids) >= self._settings.max_trajectory_tokens:
            return EndReason.LENGTH
        draft.add_env(ids, version=self._version)
        return None

    def _mark_branch(self, draft: Draft) -> None:
        settings = self._settings
        at = branch_point(
            draft.turns,
            branch=settings.branch,
            prompt_length=draft.prompt_length,
            length=draft.length,
            max_turns=settings.max_turns,
            max_turn_tokens=settings.max_turn_tokens,
            max_trajectory_tokens=settings.max_trajectory_tokens,
            longest_hint=self._parts.hints.longest,
        )
        draft.branch_point = None if at is None else at - draft.prompt_length
