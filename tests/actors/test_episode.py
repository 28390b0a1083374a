"""Episodes over a scripted engine: real tokenizer, real index, exact control of what the policy writes."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from rexrag.actors.episode import EpisodeParts, EpisodeSettings
from rexrag.actors.runner import EpisodeRunner, GroupFailedError
from rexrag.actors.scoring import Scorer
from rexrag.actors.seeds import draw_seed
from rexrag.arrow import group_from_ipc, group_to_ipc
from rexrag.engine.protocol import EngineStats, GenerateRequest, Generation
from rexrag.env.codec import Codec
from rexrag.env.observation import REFUSAL, render_refusal
from rexrag.env.prompt import render_prompt
from rexrag.errors import QueryRefusedError, RetrieverError, RetrieverSetupError
from rexrag.hints import HintPool
from rexrag.preparation.tiny_model import make_word_tokenizer
from rexrag.retrieval.bm25 import BM25Retriever, build_bm25
from rexrag.retrieval.protocol import RetrieverState
from rexrag.reward import load_reward
from rexrag.types import (
    EndReason,
    GroupLease,
    Kind,
    Origin,
    Passage,
    Question,
    Trajectory,
    TrajectoryGroup,
    WeightVersion,
)

FIRST = "<think> I need the country of Homs . </think>\n<search>country of Homs</search>"
WRONG = "<think> Homs is in Syria . </think>\n<answer>Syria</answer>"
HINT = "<think> That is only one step . Next I need"
GO_ON = " the currency of Syria . </think>\n<search>currency of Syria</search>"
RIGHT = "<think> The currency of Syria is the Pound . </think>\n<answer>Pound</answer>"
CORPUS = ["Homs is a city in Syria .", "The currency of Syria is the Pound ."]
VERSION = WeightVersion(incarnation="1", step=3)


class ScriptedEngine:
    """Writes, for a prompt, the text whose key ends it (the longest key wins); scores are minus one."""

    def __init__(self, codec: Codec, script: Mapping[str, str]) -> None:
        self._codec = codec
        self._script = script
        self.version = VERSION
        self.requests: list[GenerateRequest] = []
        self.released: list[str] = []

    async def generate(self, request: GenerateRequest) -> Generation:
        await asyncio.sleep(0)
        self.requests.append(request)
        prompt = self._codec.decode(request.prompt_ids)
        key = max((key for key in self._script if prompt.endswith(key)), key=len)
        ids = self._codec.encode(self._script[key])
        cut = ids[: request.max_tokens]
        num_scores = 0 if request.score_from is None else len(request.prompt_ids) - request.score_from
        return Generation(
            token_ids=cut,
            logprobs=[-0.5] * len(cut),
            versions=[VERSION.step] * len(cut),
            finish="stop" if len(cut) == len(ids) else "length",
            scores=[-1.0] * num_scores,
            score_versions=[VERSION.step] * num_scores,
        )

    async def update_weights(
        self, version: WeightVersion, weights: Mapping[str, npt.NDArray[np.generic]] | None
    ) -> float:
        raise AssertionError("episodes do not change weights")

    async def bit_sum(self) -> int | None:
        return None

    def release(self, cache_salt: str) -> None:
        self.released.append(cache_salt)

    def stats(self) -> EngineStats:
        raise AssertionError("episodes do not ask for statistics")

    async def close(self) -> None:
        return None


class FailingRetriever:
    """Fails every search, or those with a word in their query."""

    def __init__(self, error: Exception | None = None, *, word: str = "") -> None:
        self._error = error or RetrieverError("http://x/retrieve failed 6 times: status 500 (index lost)")
        self._word = word

    async def search(self, query: str, *, top_k: int) -> Sequence[Passage]:
        if self._word in query:
            raise self._error
        return [Passage(id="1", title="Syria", text="The currency of Syria is the Pound .")]

    def state(self) -> RetrieverState:
        return RetrieverState(outages=2, is_down=True)

    async def close(self) -> None:
        return None


@pytest.fixture(scope="module")
def codec() -> Codec:
    texts = [FIRST, WRONG, HINT, GO_ON, RIGHT, "What is the currency of the country of Homs ?", *CORPUS]
    return Codec(make_word_tokenizer(texts, context=512))


@pytest.fixture(scope="module")
def retriever(tmp_path_factory: pytest.TempPathFactory) -> BM25Retriever:
    folder = tmp_path_factory.mktemp("index")
    rows = [{"id": str(i), "contents": f'"{text.split()[0]}"\n{text}'} for i, text in enumerate(CORPUS)]
    corpus = folder / "corpus.jsonl"
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows))
    build_bm25(corpus, folder / "index")
    return BM25Retriever(folder / "index")


def settings(**changes: object) -> EpisodeSettings:
    values: dict[str, object] = {
        "group_size": 2,
        "max_turns": 4,
        "max_turn_tokens": 60,
        "max_observation_tokens": 60,
        "max_trajectory_tokens": 500,
        "top_k": 1,
        "probe_rate": 1.0,
        "branch": "answer",
        "seed": 0,
        "dead_end": "rollout",
        "scored": "none",
        "eval_episodes": 64,
        "prompt_template": None,
        "system_prompt": None,
        **changes,
    }
    return EpisodeSettings(**values)  # type: ignore[arg-type]


def lease() -> GroupLease:
    question = Question(
        id="7",
        data_source="test",
        question="What is the currency of the country of Homs ?",
        golden_answers=("Pound",),
        hops=2,
    )
    return GroupLease(group_id="1-0", question=question, epoch=0, attempt=0, version=VERSION)


def run(
    codec: Codec,
    retriever: BM25Retriever | FailingRetriever,
    script: Mapping[str, str],
    **changes: object,
) -> tuple[TrajectoryGroup, ScriptedEngine]:
    engine = ScriptedEngine(codec, script)
    return asyncio.run(make_runner(codec, retriever, engine, **changes).run_group(lease())), engine


def make_runner(
    codec: Codec, retriever: BM25Retriever | FailingRetriever, engine: ScriptedEngine, **changes: object
) -> EpisodeRunner:
    return EpisodeRunner(
        EpisodeParts(
            engine=engine,
            retriever=retriever,
            codec=codec,
            hints=HintPool([codec.encode(HINT)], kept=[len(codec.encode("<think>"))]),
            scorer=Scorer(load_reward("em"), kind="em"),
            settings=settings(**changes),
        )
    )


DEAD_END = {"": FIRST, "in Syria . </information>": WRONG, "I need": GO_ON, "Pound . </information>": RIGHT}


def policy_text(codec: Codec, row: Trajectory, origin: Origin) -> str:
    return codec.decode([int(i) for i in row.token_ids[row.origin == origin]])


def test_probe_leaves_the_dead_end(codec: Codec, retriever: BM25Retriever) -> None:
    group, engine = run(codec, retriever, DEAD_END)
    targets, probes = group.trajectories[:2], group.trajectories[2:]
    assert [row.em for row in targets] == [0.0, 0.0]
    assert [(row.kind, row.em, row.parent) for row in probes] == [(Kind.PROBE, 1.0, 0), (Kind.PROBE, 1.0, 1)]
    assert all(row.end_reason is EndReason.ANSWER for row in group.trajectories)
    assert [row.num_searches for row in group.trajectories] == [1, 1, 2, 2]
    assert targets[0].gold_retrieved is False
    assert probes[0].gold_retrieved is True
    assert engine.released == ["1/3/1-0/1"]


def test_probe_keeps_its_parents_prefix_and_records_the_hint(codec: Codec, retriever: BM25Retriever) -> None:
    group, engine = run(codec, retriever, DEAD_END)
    target, probe = group.trajectories[0], group.trajectories[2]
    hint = codec.encode(HINT)
    assert probe.branch_point == target.branch_point
    assert probe.branch_point is not None
    at = probe.prompt_length + probe.branch_point
    assert codec.decode([int(i) for i in target.token_ids[at : at + 3]]).split()[0] == "<answer>"
    for column in ("token_ids", "origin", "behavior_logprob", "policy_version"):
        assert (getattr(probe, column)[:at] == getattr(target, column)[:at]).all()
    assert probe.token_ids[at : at + len(hint)].tolist() == hint
    assert (probe.origin[at : at + len(hint)] == Origin.HINT).all()
    assert (probe.behavior_logprob[at : at + len(hint)] == -1.0).all()
    assert (probe.origin[at + len(hint) :] != Origin.HINT).all()
    forks = [request for request in engine.requests if request.score_from is not None]
    assert [len(request.prompt_ids) - int(request.score_from or 0) for request in forks] == [len(hint)] * 2


def test_limits_count_kept_tokens_and_hint(codec: Codec, retriever: BM25Retriever) -> None:
    _, engine = run(codec, retriever, DEAD_END)
    fork = next(request for request in engine.requests if request.score_from is not None)
    kept = len(codec.encode("<think> Homs is in Syria . </think>\n"))
    assert fork.max_tokens == 60 - kept - len(codec.encode(HINT))


def test_right_targets_are_not_probed(codec: Codec, retriever: BM25Retriever) -> None:
    group, _ = run(codec, retriever, {"": RIGHT})
    assert [row.kind for row in group.trajectories] == [Kind.TARGET, Kind.TARGET]
    assert [row.reward for row in group.trajectories] == [1.0, 1.0]
    assert all(row.branch_point is not None for row in group.trajectories)


def test_a_probe_is_not_probed_again(codec: Codec, retriever: BM25Retriever) -> None:
    group, _ = run(codec, retriever, {"": WRONG, "I need": " Syria . </think>\n<answer>Syria</answer>"})
    assert [row.kind for row in group.trajectories].count(Kind.PROBE) == 2


def test_malformed_turns_get_feedback_and_end_at_the_turn_limit(codec: Codec, retriever: BM25Retriever) -> None:
    group, _ = run(codec, retriever, {"": "<think> Homs </think>\n</search>"}, max_turns=1, probe_rate=0.0)
    row = group.trajectories[0]
    assert (row.end_reason, row.num_turns, row.num_malformed) == (EndReason.TURNS, 2, 2)
    assert (row.origin == Origin.ENV).any()
    assert row.origin[-1] == Origin.POLICY


def test_token_limit_ends_an_episode(codec: Codec, retriever: BM25Retriever) -> None:
    prompt = len(render_prompt(lease().question.question, codec=codec))
    group, _ = run(codec, retriever, DEAD_END, max_trajectory_tokens=prompt + 20, probe_rate=0.0)
    row = group.trajectories[0]
    assert row.end_reason is EndReason.LENGTH
    assert len(row.token_ids) <= prompt + 20


def test_outage_masks_and_in_the_end_fails_the_group(codec: Codec) -> None:
    with pytest.raises(GroupFailedError, match="0 of 2 targets"):
        run(codec, FailingRetriever(), DEAD_END)


def test_the_cause_of_an_outage_is_told_where_it_ends_something(codec: Codec) -> None:
    with pytest.raises(GroupFailedError, match=r"without an outage: http://x/retrieve failed .*index lost"):
        run(codec, FailingRetriever(), DEAD_END)
    runner = make_runner(codec, FailingRetriever(), ScriptedEngine(codec, DEAD_END))
    with pytest.raises(RetrieverError, match=r"a search for test/7 failed: http://x/retrieve failed .*index lost"):
        asyncio.run(runner.evaluate([lease().question]))


def test_a_refused_query_gets_feedback_and_is_counted(codec: Codec) -> None:
    refusing = FailingRetriever(QueryRefusedError("status 422"), word="country")
    script = {"": FIRST, "Pound . </information>": RIGHT}
    script[codec.decode(render_refusal(codec=codec))] = GO_ON
    group, engine = run(codec, refusing, script, probe_rate=0.0)
    for row in group.trajectories:
        assert (row.num_refused, row.num_searches, row.num_malformed, row.em) == (1, 1, 0, 1.0)
        feedback = codec.encode(REFUSAL)
        assert codec.decode(feedback) in policy_text(codec, row, Origin.ENV)
    [score] = asyncio.run(make_runner(codec, refusing, engine).evaluate([lease().question]))
    assert (score.num_refused, score.num_searches, score.em) == (1, 1, 1.0)
    assert group_from_ipc(group_to_ipc(group)).trajectories[0].num_refused == 1


def test_a_probe_keeps_what_was_refused_before_its_branch(codec: Codec) -> None:
    refusing = FailingRetriever(QueryRefusedError("status 422"), word="country")
    script = {"": FIRST, codec.decode(render_refusal(codec=codec)): WRONG, "I need": GO_ON, "</information>": RIGHT}
    group, _ = run(codec, refusing, script)
    probe = next(row for row in group.trajectories if row.kind is Kind.PROBE)
    assert (probe.num_refused, probe.num_searches) == (1, 1)


def test_a_wrong_set_up_ends_groups_and_evaluations_as_it_is(codec: Codec) -> None:
    wrong = FailingRetriever(RetrieverSetupError("http://x/retrieve: status 404 (Not Found)"))
    with pytest.raises(RetrieverSetupError, match="status 404"):
        run(codec, wrong, DEAD_END)
    with pytest.raises(RetrieverSetupError, match="status 404"):
        asyncio.run(make_runner(codec, wrong, ScriptedEngine(codec, DEAD_END)).evaluate([lease().question]))


def test_a_users_reward_does_not_hold_up_the_event_loop_and_is_called_alone(codec: Codec) -> None:
    at_once: list[int] = []
    running = 0
    has_ticked = threading.Event()

    def slow(*args: object, **columns: object) -> float:
        nonlocal running
        running += 1
        has_ticked.wait(30)
        at_once.append(running)
        running -= 1
        return 0.5

    async def score() -> tuple[int, list[float]]:
        scorer = Scorer(slow, kind="mine:score")
        scoring = [asyncio.create_task(scorer.score("x", question=lease().question, valid_share=1.0)) for _ in range(3)]
        ticks = 0
        while not all(task.done() for task in scoring):
            ticks += 1
            if ticks > 5:
                has_ticked.set()
            await asyncio.sleep(0.005)
        return ticks, [task.result().reward for task in scoring]

    ticks, rewards = asyncio.run(score())
    assert ticks > 5
    assert (rewards, at_once) == ([0.5] * 3, [1] * 3)


def test_policy_answer_alone_is_scored(codec: Codec, retriever: BM25Retriever) -> None:
    """An answer tag inside an observation or a hint is no answer."""
    group, _ = run(codec, retriever, DEAD_END, probe_rate=0.0)
    row = group.trajectories[0]
    assert "Pound" not in policy_text(codec, row, Origin.POLICY)
    assert row.em == 0.0


def test_turns_are_recorded_with_the_start_of_their_action(codec: Codec, retriever: BM25Retriever) -> None:
    group, _ = run(codec, retriever, DEAD_END)
    for row in group.trajectories:
        tags = [codec.decode([int(row.token_ids[at])]).strip() for at in row.action_starts]
        assert tags == ["<search>"] * (row.num_turns - 1) + ["<answer>"]
        assert len(row.turn_starts) == row.num_turns
    group, _ = run(codec, retriever, {"": "<think> Homs </think>"}, max_turns=0, probe_rate=0.0)
    assert group.trajectories[0].action_starts.tolist() == [len(group.trajectories[0].token_ids)]


def test_groups_are_probed_only_once_all_targets_failed(codec: Codec, retriever: BM25Retriever) -> None:
    group, _ = run(codec, retriever, DEAD_END, dead_end="group", group_size=3)
    assert [row.parent for row in group.trajectories] == [None, None, None, 0, 1, 2]

    class OneRight(ScriptedEngine):
        """The first target is right, and slower than the others fail."""

        async def generate(self, request: GenerateRequest) -> Generation:
            self.requests.append(request)
            if len(self.requests) > 1:
                return await ScriptedEngine(codec, DEAD_END).generate(request)
            await asyncio.sleep(0.05)
            return await ScriptedEngine(codec, {"": RIGHT}).generate(request)

    runner = EpisodeRunner(
        EpisodeParts(
            engine=OneRight(codec, DEAD_END),
            retriever=retriever,
            codec=codec,
            hints=HintPool([codec.encode(HINT)]),
            scorer=Scorer(load_reward("em"), kind="em"),
            settings=settings(dead_end="group", group_size=3),
        )
    )
    group = asyncio.run(runner.run_group(lease()))
    assert sorted(row.correct for row in group.trajectories) == [False, False, True]


def test_a_probe_is_scored_without_the_part_of_its_hint_that_goes(codec: Codec, retriever: BM25Retriever) -> None:
    group, engine = run(codec, retriever, DEAD_END, scored="probes")
    target, probe = group.trajectories[0], group.trajectories[2]
    assert (target.alternative_logprob, target.alternative_branch) == (None, None)
    assert probe.branch_point is not None
    at = probe.prompt_length + probe.branch_point
    kept, end = at + len(codec.encode("<think>")), at + len(codec.encode(HINT))
    request = engine.requests[-1]
    assert list(request.prompt_ids) == [*probe.token_ids[:kept], *probe.token_ids[end:]]
    assert (request.score_from, request.max_tokens) == (kept, 1)
    has_score = probe.has_density & (np.arange(len(probe.token_ids)) >= end)
    assert probe.alternative_logprob is not None
    assert probe.alternative_logprob.tolist() == np.where(has_score, -1.0, 0.0).tolist()
    assert probe.score_version == VERSION.step


def test_with_turns_as_branches_a_target_draws_the_start_of_one(codec: Codec, retriever: BM25Retriever) -> None:
    for seed in range(5):
        group, _ = run(codec, retriever, DEAD_END, scored="all", seed=seed, probe_rate=0.0, branch="turn")
        for row in group.trajectories:
            assert row.alternative_branch is not None
            assert row.prompt_length + row.alternative_branch in row.turn_starts


def test_a_target_without_a_turn_draws_nothing(codec: Codec, retriever: BM25Retriever) -> None:
    prompt = len(render_prompt(lease().question.question, codec=codec))
    group, _ = run(codec, retriever, DEAD_END, scored="all", max_trajectory_tokens=prompt, probe_rate=0.0)
    assert [(row.num_turns, row.alternative_branch) for row in group.trajectories] == [(0, None), (0, None)]


def test_a_target_is_scored_with_a_hint_where_it_goes_on_like_one(codec: Codec, retriever: BM25Retriever) -> None:
    thoughts = {**DEAD_END, "": FIRST}
    groups = [run(codec, retriever, thoughts, scored="all", seed=seed, probe_rate=0.0) for seed in range(20)]
    fits = 0
    for group, engine in groups:
        for row in group.trajectories:
            assert row.alternative_branch is not None
            assert row.alternative_hint_id == 0
            at = row.prompt_length + row.alternative_branch
            turns = zip(row.turn_starts, row.action_starts, strict=True)
            assert any(start <= at <= last for start, last in turns)
            hint, think = codec.encode(HINT), codec.encode("<think>")
            if row.token_ids[at : at + len(think)].tolist() != think:
                assert (row.alternative_logprob, row.score_version) == (None, None)
                continue
            fits += 1
            start = at + len(think)
            assert row.alternative_logprob is not None
            assert (row.alternative_logprob[:start] == 0.0).all()
            assert (row.alternative_logprob[start:] == np.where(row.has_density[start:], -1.0, 0.0)).all()
            assert [*row.token_ids[:at], *hint, *row.token_ids[start:]] in [list(r.prompt_ids) for r in engine.requests]
    assert 0 < fits < 40


@pytest.mark.parametrize("scored", ["none", "probes", "all"])
def test_groups_survive_arrow(codec: Codec, retriever: BM25Retriever, scored: str) -> None:
    group, _ = run(codec, retriever, DEAD_END, scored=scored)
    back = group_from_ipc(group_to_ipc(group))
    for before, after in zip(group.trajectories, back.trajectories, strict=True):
        assert (before.token_ids == after.token_ids).all()
        assert (before.action_starts == after.action_starts).all()
        assert (before.alternative_logprob is None) == (after.alternative_logprob is None)
        if before.alternative_logprob is not None:
            assert (before.alternative_logprob == after.alternative_logprob).all()
        for name in ("reward", "parent", "text", "alternative_branch", "alternative_hint_id", "score_version"):
            assert getattr(before, name) == getattr(after, name)


def test_same_seed_same_requests(codec: Codec, retriever: BM25Retriever) -> None:
    first, second = (run(codec, retriever, DEAD_END, probe_rate=0.5)[1].requests for _ in range(2))
    assert first == second
    assert len({request.seed for request in first}) == len(first)


def test_seeds_do_not_run_into_each_other(tmp_path: Path) -> None:
    assert draw_seed(0, "a", "bc") != draw_seed(0, "ab", "c")
    assert draw_seed(0, 1) != draw_seed(0, "1")
    assert 0 <= draw_seed(5, "x") < 2**63
