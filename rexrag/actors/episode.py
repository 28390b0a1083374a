"""Episodes of one question: target rollouts, and the probes that fork from those that fail (§2, §3).

    prompt -> [turn -> search -> passages]* -> answer          a target
                 \\-> hint -> turn -> ... -> answer             a probe, forked the moment its target failed

Pure asyncio over the `Engine` and `Retriever` protocols. An episode never waits for another one.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from rexrag.actors.alternative import score_probe, score_target
from rexrag.actors.draft import Alternative, Draft
from rexrag.actors.engine import Engine, GenerateRequest, Generation
from rexrag.actors.scoring import NO_SCORES, Scorer, Scores
from rexrag.actors.seeds import draw_seed
from rexrag.env.actions import STOP_STRINGS, Answer, Malformed, Search, locate_action
from rexrag.env.branch import branch_point
from rexrag.env.codec import Codec
from rexrag.env.observation import render_feedback, render_observation
from rexrag.env.prompt import render_prompt
from rexrag.errors import RetrieverError
from rexrag.hints import HintPool
from rexrag.retrieval.protocol import Retriever
from rexrag.types import EndReason, EpisodeScore, GroupLease, Question, Trajectory, TrajectoryGroup, Turn, WeightVersion


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
    dead_end: Literal["rollout", "group"] = "rollout"
    scored: Literal["none", "probes", "all"] = "none"
    eval_episodes: int = 64
    prompt_template: str | None = None
    system_prompt: str | None = None


class GroupFailedError(Exception):
    """Too few rollouts of a group got through: its question is asked again."""


class EpisodeRunner:
    """Runs whole groups, and single greedy episodes for evaluation, over one engine.

    Example:
        >>> runner = EpisodeRunner(engine, retriever=r, codec=c, hints=h, scorer=s, settings=settings)
        >>> group = await runner.run_group(lease)                                    # doctest: +SKIP
    """

    def __init__(
        self,
        engine: Engine,
        *,
        retriever: Retriever,
        codec: Codec,
        hints: HintPool,
        scorer: Scorer,
        settings: EpisodeSettings,
    ) -> None:
        self._engine = engine
        self._retriever = retriever
        self._codec = codec
        self._hints = hints
        self._scorer = scorer
        self._settings = settings

    async def run_group(
        self, lease: GroupLease, *, on_progress: Callable[[int], None] | None = None
    ) -> TrajectoryGroup:
        """All targets of a question and the probes they spawn; `on_progress` gets the tokens just written.

        Raises:
            GroupFailedError: fewer than two targets (one where a group has one) ended without an outage.
        """
        episodes = [
            _Episode(
                self, lease.question, salt=self._salt(lease), names=_names(lease, rollout), on_progress=on_progress
            )
            for rollout in range(self._settings.group_size)
        ]
        verdict = _Verdict(num_targets=len(episodes))
        try:
            async with asyncio.TaskGroup() as tasks:
                running = [
                    tasks.create_task(self._target_and_probe(episode, row, lease, verdict))
                    for row, episode in enumerate(episodes)
                ]
        finally:
            self._engine.release(self._salt(lease))
        pairs = [task.result() for task in running]
        targets = [target for target, _ in pairs]
        usable = sum(not target.is_masked for target in targets)
        if usable < min(2, self._settings.group_size):
            raise GroupFailedError(
                f"{usable} of {len(targets)} targets of {lease.question.key} ended without an outage"
            )
        return TrajectoryGroup(
            group_id=lease.group_id,
            question_id=lease.question.key,
            data_source=lease.question.data_source,
            hops=lease.question.hops,
            trajectories=(*targets, *(probe for _, probe in pairs if probe is not None)),
        )

    async def evaluate(
        self, questions: Sequence[Question], *, on_score: Callable[[EpisodeScore], None] | None = None
    ) -> list[EpisodeScore]:
        """One greedy episode of each question, without probes.

        All share one prefix cache: what their prompts have in common is computed once.

        Raises:
            RetrieverError: the retriever failed in the end: an evaluation has no masked rows.
            RuntimeError: the weights changed on the way: the result would belong to no version.
        """
        version = self._engine.version
        salt = f"eval/{version.incarnation}/{version.step}"
        room = asyncio.Semaphore(self._settings.eval_episodes)

        async def one(question: Question) -> EpisodeScore:
            async with room:
                score = await self._evaluate_one(question, salt=salt, version=version)
            if on_score is not None:
                on_score(score)
            return score

        try:
            async with asyncio.TaskGroup() as tasks:
                running = [tasks.create_task(one(question)) for question in questions]
        except ExceptionGroup as group:
            raise group.exceptions[0] from None  # the others have the same cause
        finally:
            self._engine.release(salt)
        return [task.result() for task in running]

    async def _evaluate_one(self, question: Question, *, salt: str, version: WeightVersion) -> EpisodeScore:
        episode = _Episode(self, question, salt=salt, names=("eval", question.key), greedy=True)
        trajectory = await episode.run(episode.new_draft())
        if trajectory.is_masked:
            raise RetrieverError(f"the retriever failed while {question.key} was evaluated")
        if self._engine.version != version:
            raise RuntimeError(f"weights changed from {version} to {self._engine.version} during an evaluation")
        return EpisodeScore(
            question_id=question.key,
            data_source=question.data_source,
            hops=question.hops,
            version=version,
            em=trajectory.em,
            f1=trajectory.f1,
            num_searches=trajectory.num_searches,
            num_turns=trajectory.num_turns,
            num_malformed=trajectory.num_malformed,
            num_tokens=len(trajectory.token_ids) - trajectory.prompt_length,
            gold_retrieved=trajectory.gold_retrieved,
            end_reason=trajectory.end_reason,
            text=trajectory.text,
        )

    def _salt(self, lease: GroupLease) -> str:
        return f"{lease.version.incarnation}/{lease.version.step}/{lease.group_id}"

    async def _target_and_probe(
        self, episode: _Episode, row: int, lease: GroupLease, verdict: _Verdict
    ) -> tuple[Trajectory, Trajectory | None]:
        settings = self._settings
        draft = episode.new_draft()
        target = await episode.run(draft)
        verdict.add(target)
        if target.is_masked or target.correct or draft.branch_point is None:
            return target, None
        if settings.dead_end == "group" and not await verdict.all_failed():
            return target, None
        names = _names(lease, settings.group_size + row)
        rng = random.Random(draw_seed(settings.seed, *names, "probe"))
        if rng.random() >= settings.probe_rate:
            return target, None
        hint_id = self._hints.sample(rng)
        at = draft.prompt_length + draft.branch_point
        probe = _Episode(self, episode.question, salt=episode.salt, names=names, on_progress=episode.on_progress)
        return target, await probe.run(draft.fork(at=at, parent=row, hint_id=hint_id))


class _Verdict:
    """Whether all targets of a question failed, known once the last of them has ended."""

    def __init__(self, *, num_targets: int) -> None:
        self._left = num_targets
        self._any_correct = False
        self._known = asyncio.Event()

    def add(self, target: Trajectory) -> None:
        self._left -= 1
        self._any_correct |= target.correct
        if self._left == 0 or self._any_correct:
            self._known.set()

    async def all_failed(self) -> bool:
        await self._known.wait()
        return not self._any_correct


def _names(lease: GroupLease, rollout: int) -> tuple[str | int, ...]:
    return (lease.epoch, lease.question.key, lease.attempt, rollout)


class _Episode:
    """One rollout over its runner's parts: writes turns into a draft until it ends."""

    def __init__(
        self,
        runner: EpisodeRunner,
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
        self._runner = runner
        self._settings = runner._settings
        self._names = names
        self._greedy = greedy

    def new_draft(self) -> Draft:
        settings = self._settings
        prompt = render_prompt(
            self.question.question,
            codec=self._runner._codec,
            template=settings.prompt_template,
            system_prompt=settings.system_prompt,
        )
        draft = Draft.start(prompt, version=self._version)
        draft.gold_hits = [] if self._runner._scorer.knows_gold(self.question) else None
        return draft

    async def run(self, draft: Draft) -> Trajectory:
        """Write turns until the episode ends; a draft with a hint id begins with that hint."""
        while (end_reason := await self._turn(draft)) is None:
            pass
        if draft.parent is None:
            self._mark_branch(draft)
        masked = end_reason is EndReason.ENV_ERROR
        if not masked and not self._greedy:
            draft.alternative = await self._alternative(draft)
        scores = NO_SCORES if masked else self._score(draft)
        text = self._runner._codec.decode(draft.token_ids[draft.prompt_length :])
        return draft.finish(end_reason, scores=scores, text=text)

    async def _alternative(self, draft: Draft) -> Alternative | None:
        """Scores for hint-free transfer, where they are wanted of such a rollout."""
        runner, scored = self._runner, self._settings.scored
        if draft.parent is not None and scored != "none":
            return await score_probe(runner._engine, draft, hints=runner._hints, cache_salt=self.salt)
        if draft.parent is None and scored == "all":
            rng = random.Random(draw_seed(self._settings.seed, *self._names, "alternative"))
            return await score_target(
                runner._engine,
                draft,
                hints=runner._hints,
                branch=self._settings.branch,
                cache_salt=self.salt,
                rng=rng,
            )
        return None

    @property
    def _version(self) -> int:
        return self._runner._engine.version.step

    def _score(self, draft: Draft) -> Scores:
        num_turns = len(draft.turns)
        valid_share = (num_turns - draft.num_malformed) / num_turns if num_turns else 0.0
        return self._runner._scorer.score(draft.answer, question=self.question, valid_share=valid_share)

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
        return self._append_env(draft, render_feedback(action, codec=self._runner._codec))

    async def _generate(self, draft: Draft) -> Generation | None:
        """Let the policy write the rest of its turn, after the hint if one is due; None without room for a token."""
        settings, hints = self._settings, self._runner._hints
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
        generation = await self._runner._engine.generate(request)
        draft.timings["generate_s"] = draft.timings.get("generate_s", 0.0) + time.monotonic() - began
        if hint:
            draft.add_hint(hint, scores=generation.scores, versions=generation.score_versions)
        draft.add_policy(generation)
        if self.on_progress is not None:
            self.on_progress(len(hint) + len(generation.token_ids))
        return generation

    def _close_turn(self, draft: Draft) -> Search | Answer | Malformed:
        """Find the turn's action among its policy tokens, and cut what was written after it."""
        positions = draft.policy_positions()
        located = locate_action([draft.token_ids[i] for i in positions], codec=self._runner._codec)
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
            passages = await self._runner._retriever.search(action.query, top_k=settings.top_k)
        except RetrieverError:
            return EndReason.ENV_ERROR
        finally:
            draft.timings["search_s"] = draft.timings.get("search_s", 0.0) + time.monotonic() - began
        codec = self._runner._codec
        ids = render_observation(passages, codec=codec, max_tokens=settings.max_observation_tokens)
        end_reason = self._append_env(draft, ids)
        if end_reason is None:
            draft.num_searches += 1
            if draft.gold_hits is not None:
                shown = codec.decode(ids)
                draft.gold_hits.append(self._runner._scorer.shows_gold(self.question, passages=passages, shown=shown))
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
            longest_hint=self._runner._hints.longest,
        )
        draft.branch_point = None if at is None else at - draft.prompt_length
