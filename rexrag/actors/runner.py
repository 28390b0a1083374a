"""Episodes of one question: target rollouts, and the probes that fork from those that fail (§2).

target ─▶ failed ─▶ fork, hint ─▶ probe        with `dead_end = "rollout"` the moment it fails,
                                               with "group" when all targets of the question have
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import replace

from rexrag.actors.episode import Episode, EpisodeParts
from rexrag.actors.seeds import draw_seed
from rexrag.errors import RetrieverError, RunFailure, UserError, counted
from rexrag.retrieval.protocol import RetrieverState
from rexrag.types import EpisodeScore, GroupLease, Question, Trajectory, TrajectoryGroup, WeightVersion


class GroupFailedError(Exception):
    """Too few rollouts of a group got through: its question is asked again."""


class EpisodeRunner:
    """Runs whole groups, and single greedy episodes for evaluation, over one engine.

    Example:
        >>> runner = EpisodeRunner(parts)                                            # doctest: +SKIP
        >>> group = await runner.run_group(lease)                                    # doctest: +SKIP
    """

    def __init__(self, parts: EpisodeParts) -> None:
        self._parts = parts

    def searches(self) -> RetrieverState:
        """How the retriever does, and what its searches came to."""
        counts = self._parts.searches
        return replace(self._parts.retriever.state(), empty=counts.empty, failed=counts.failed)

    async def run_group(
        self, lease: GroupLease, *, on_progress: Callable[[int], None] | None = None
    ) -> TrajectoryGroup:
        """All targets of a question and the probes they spawn; `on_progress` gets the tokens just written.

        Raises:
            GroupFailedError: fewer than two targets (one where a group has one) ended without an outage.
            RetrieverSetupError: no search can be answered under these settings.
        """
        salt = self._salt(lease)
        episodes = [
            Episode(self._parts, lease.question, salt=salt, names=_names(lease, rollout), on_progress=on_progress)
            for rollout in range(self._parts.settings.group_size)
        ]
        verdict = _Verdict(num_targets=len(episodes))
        try:
            async with asyncio.TaskGroup() as tasks:
                running = [
                    tasks.create_task(self._target_and_probe(episode, row, lease, verdict))
                    for row, episode in enumerate(episodes)
                ]
        except ExceptionGroup as group:
            raise _told(group) from None
        finally:
            self._parts.engine.release(salt)
        pairs = [task.result() for task in running]
        targets = [target for target, _ in pairs]
        usable = sum(not target.is_masked for target in targets)
        if usable < min(2, self._parts.settings.group_size):
            raise GroupFailedError(
                f"{usable} of {counted(len(targets), 'target')} of {lease.question.key} ended without an outage: "
                f"{verdict.failure}"
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
        version = self._parts.engine.version
        salt = f"eval/{version.incarnation}/{version.step}"
        room = asyncio.Semaphore(self._parts.settings.eval_episodes)

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
            raise _told(group) from None
        finally:
            self._parts.engine.release(salt)
        return [task.result() for task in running]

    async def _evaluate_one(self, question: Question, *, salt: str, version: WeightVersion) -> EpisodeScore:
        episode = Episode(self._parts, question, salt=salt, names=("eval", question.key), greedy=True)
        draft = episode.new_draft()
        trajectory = await episode.run(draft)
        if trajectory.is_masked:
            raise RetrieverError(f"a search for {question.key} failed: {draft.failure}")
        if self._parts.engine.version != version:
            raise RuntimeError(f"weights changed from {version} to {self._parts.engine.version} during an evaluation")
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
            num_refused=trajectory.num_refused,
            num_tokens=len(trajectory.token_ids) - trajectory.prompt_length,
            gold_retrieved=trajectory.gold_retrieved,
            end_reason=trajectory.end_reason,
            text=trajectory.text,
        )

    def _salt(self, lease: GroupLease) -> str:
        return f"{lease.version.incarnation}/{lease.version.step}/{lease.group_id}/{lease.grant}"

    async def _target_and_probe(
        self, episode: Episode, row: int, lease: GroupLease, verdict: _Verdict
    ) -> tuple[Trajectory, Trajectory | None]:
        settings = self._parts.settings
        draft = episode.new_draft()
        target = await episode.run(draft)
        verdict.add(target, failure=draft.failure)
        if target.is_masked or target.correct or draft.branch_point is None:
            return target, None
        if settings.dead_end == "group" and not await verdict.all_failed():
            return target, None
        names = _names(lease, settings.group_size + row)
        rng = random.Random(draw_seed(settings.seed, *names, "probe"))
        if rng.random() >= settings.probe_rate:
            return target, None
        hint_id = self._parts.hints.sample(rng)
        at = draft.prompt_length + draft.branch_point
        probe = Episode(self._parts, episode.question, salt=episode.salt, names=names, on_progress=episode.on_progress)
        return target, await probe.run(draft.fork(at=at, parent=row, hint_id=hint_id))


class _Verdict:
    """Whether all targets of a question failed, known once the last of them has ended; why the last outage came."""

    def __init__(self, *, num_targets: int) -> None:
        self._left = num_targets
        self._any_correct = False
        self._known = asyncio.Event()
        self.failure: str | None = None

    def add(self, target: Trajectory, *, failure: str | None) -> None:
        self.failure = failure or self.failure
        self._left -= 1
        self._any_correct |= target.correct
        if self._left == 0 or self._any_correct:
            self._known.set()

    async def all_failed(self) -> bool:
        await self._known.wait()
        return not self._any_correct


def _told(group: ExceptionGroup[Exception]) -> Exception:
    """Of errors that came up together the one to tell: what ends a run before what befell one rollout."""
    errors = sorted(group.exceptions, key=lambda error: not isinstance(error, RunFailure | UserError))
    return _told(errors[0]) if isinstance(errors[0], ExceptionGroup) else errors[0]


def _names(lease: GroupLease, rollout: int) -> tuple[str | int, ...]:
    return (lease.epoch, lease.question.key, lease.attempt, rollout)
