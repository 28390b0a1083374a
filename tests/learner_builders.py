"""Small trajectories, groups and models that the learner's tests are made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from rexrag.arrow import group_to_ipc
from rexrag.hints import HintPool
from rexrag.learner.learner_actor import LearnerSpec
from rexrag.learner.step import LearnerCore, LearnerSettings
from rexrag.model.attention import use_packed_attention
from rexrag.model.logprobs import token_logprobs
from rexrag.model.packing import PackRow, pack
from rexrag.model.saving import save_model
from rexrag.types import EndReason, Kind, Origin, StepBatch, Trajectory, TrajectoryGroup

VOCABULARY = 64
POOL = HintPool([[5, 6], [5, 6, 7], [5, 8]])
PROMPT = [1, 2, 3]

Part = tuple[Origin, Sequence[int]]


def trajectory(
    parts: Sequence[Part],
    *,
    reward: float = 0.0,
    parent: int | None = None,
    branch_point: int | None = None,
    hint_id: int | None = None,
    logprob: float | Sequence[float] = -1.0,
    version: int | Sequence[int] = 0,
    end_reason: EndReason = EndReason.ANSWER,
    num_malformed: int = 0,
    gold_retrieved: bool | None = None,
    prompt: Sequence[int] = PROMPT,
    action_starts: Sequence[int] | None = None,
    **alternative: object,
) -> Trajectory:
    """A row that is correct where its reward is above 0. `logprob` and `version` are of the tokens after the prompt.

    Without `action_starts` every turn is an action from its first token on.
    """
    tokens = [*prompt, *(token for _, ids in parts for token in ids)]
    origin = [Origin.PROMPT] * len(prompt) + [who for who, ids in parts for _ in ids]
    rest = len(tokens) - len(prompt)
    logprobs = np.zeros(len(tokens), np.float32)
    logprobs[len(prompt) :] = logprob
    logprobs[np.isin(origin, [Origin.PROMPT, Origin.ENV])] = 0.0
    versions = np.zeros(len(tokens), np.int32)
    versions[len(prompt) :] = np.broadcast_to(version, rest)
    starts = [at for at, who in enumerate(origin) if _begins_turn(origin, at, who)]
    return Trajectory(
        kind=Kind.TARGET if parent is None else Kind.PROBE,
        parent=parent,
        branch_point=branch_point,
        hint_id=hint_id,
        reward=reward,
        em=float(reward > 0),
        f1=float(reward > 0),
        correct=reward > 0,
        end_reason=end_reason,
        num_searches=1,
        num_malformed=num_malformed,
        gold_retrieved=gold_retrieved,
        prompt_length=len(prompt),
        token_ids=np.array(tokens, np.int32),
        origin=np.array(origin, np.uint8),
        behavior_logprob=logprobs,
        policy_version=versions,
        action_starts=np.array(starts if action_starts is None else action_starts, np.int32),
        **alternative,  # type: ignore[arg-type]
    )


def _begins_turn(origin: Sequence[Origin], at: int, who: Origin) -> bool:
    density = (Origin.POLICY, Origin.HINT)
    return who in density and origin[at - 1] not in density


def target(reward: float = 0.0, *, ids: Sequence[int] = (10, 11, 12), **fields: object) -> Trajectory:
    """A target of one stretch of policy tokens."""
    return trajectory([(Origin.POLICY, ids)], reward=reward, **fields)  # type: ignore[arg-type]


def probe(
    reward: float = 0.0, *, parent: int = 0, hint_id: int = 0, ids: Sequence[int] = (20, 21), **fields: object
) -> Trajectory:
    """A probe that keeps one token of its parent (`target`'s first), then a hint and `ids`."""
    parts = [(Origin.POLICY, [10]), (Origin.HINT, POOL.ids(hint_id)), (Origin.POLICY, ids)]
    return trajectory(parts, reward=reward, parent=parent, hint_id=hint_id, branch_point=1, **fields)  # type: ignore[arg-type]


def group(*rows: Trajectory, name: str = "r-0", hops: int | None = 2) -> TrajectoryGroup:
    return TrajectoryGroup(group_id=name, question_id=f"q-{name}", data_source="test", hops=hops, trajectories=rows)


def step_batch(groups: Sequence[TrajectoryGroup], *, step: int = 1) -> StepBatch:
    streams = tuple(group_to_ipc(one) for one in groups)
    return StepBatch(step=step, incarnation="r", groups=streams)


def tiny_model(seed: int = 0) -> LlamaForCausalLM:
    """A Llama with a tied output head."""
    model = small_model(LlamaConfig, seed=seed, max_position_embeddings=256, tie_word_embeddings=True)
    assert isinstance(model, LlamaForCausalLM)
    return model


def tokenizer() -> PreTrainedTokenizerFast:
    words = {f"w{i}": i for i in range(64)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")))  # type: ignore[no-untyped-call]


def small_model(architecture: Callable[..., PretrainedConfig], *, seed: int = 0, **fields: object) -> PreTrainedModel:
    """Two layers with grouped heads; weights of some scale, so that densities differ."""
    torch.manual_seed(seed)
    config = architecture(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.2,
        **fields,
    )
    model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    assert isinstance(model, PreTrainedModel)
    model.train(False)
    return model


def learner_spec(folder: Path, *, settings: LearnerSettings, **fields: object) -> LearnerSpec:
    """Of a learner over the model in `folder`/model, which is a tiny one unless there is one."""
    if not (folder / "model").exists():
        save_model(tiny_model(), tokenizer(), folder / "model")
    spec = LearnerSpec(
        model=folder / "model",
        settings=settings,
        hints=[POOL.ids(i) for i in range(len(POOL))],
        kept=[0] * len(POOL),
        threads=1,
        device="cpu",
        seed=0,
        evidence_folder=folder,
    )
    return replace(spec, **fields)  # type: ignore[arg-type]


def core(
    folder: Path,
    *,
    settings: LearnerSettings,
    model: PreTrainedModel | None = None,
    reference: PreTrainedModel | None = None,
) -> LearnerCore:
    return LearnerCore(
        model or tiny_model(), settings=settings, hints=POOL, evidence_folder=folder / "evidence", reference=reference
    )


def random_groups(num_groups: int = 3, *, seed: int = 0, version: int = 0) -> list[TrajectoryGroup]:
    """Groups of three targets and a probe with different prompts, observations in between, and mixed rewards."""
    rng = np.random.default_rng(seed)
    groups = []
    for g in range(num_groups):
        prompt = rng.integers(1, VOCABULARY, 4).tolist()
        rows = []
        for i in range(3):
            first, env, last = (rng.integers(9, VOCABULARY, int(n)).tolist() for n in rng.integers(2, 7, 3))
            parts: list[Part] = [(Origin.POLICY, first), (Origin.ENV, env), (Origin.POLICY, last)]
            branch = len(first) + len(env)
            rows.append(
                trajectory(
                    parts, reward=float(i == 2), branch_point=branch, prompt=prompt, logprob=-3.0, version=version
                )
            )
            if i == 0:
                kept = parts[:2]
        hint = int(rng.integers(len(POOL)))
        parts = [*kept, (Origin.HINT, POOL.ids(hint)), (Origin.POLICY, rng.integers(9, VOCABULARY, 4).tolist())]
        at = sum(len(ids) for _, ids in kept)
        rows.append(
            trajectory(
                parts, reward=1.0, parent=0, branch_point=at, hint_id=hint, prompt=prompt, logprob=-2.0, version=version
            )
        )
        groups.append(group(*rows, name=f"r-{g}"))
    return groups


def solved_group(number: int, *, version: int = 0) -> TrajectoryGroup:
    """Two rows that are right, and that the policy was sure of."""
    rows = [target(1.0, ids=(20 + number, 12), version=version, logprob=-0.01) for _ in range(2)]
    return group(*rows, name="right")


def mixed_batch(step: int) -> StepBatch:
    """Of random groups and a solved one, which the version before the step has written."""
    groups = [*random_groups(seed=step, version=step - 1), solved_group(step, version=step - 1)]
    return step_batch(groups, step=step)


def _in_order_of_tokens(group: TrajectoryGroup) -> list[int]:
    """As a step packs its rows."""
    return sorted(range(len(group.trajectories)), key=lambda i: group.trajectories[i].token_ids.tolist())


def recorded_by(
    model: LlamaForCausalLM, groups: Sequence[TrajectoryGroup], *, budget: int = 4096
) -> list[TrajectoryGroup]:
    """The groups as if `model` itself had sampled them, scored in the packing that a step without probes uses."""
    use_packed_attention(model)
    places = [(g, i) for g, one in enumerate(groups) for i in _in_order_of_tokens(one)]
    rows = []
    for g, i in places:
        row = groups[g].trajectories[i]
        rows.append(PackRow(token_ids=row.token_ids, trained=np.flatnonzero(row.has_density), group=g))
    scores: dict[tuple[int, int], Trajectory] = {}
    for micro in pack(rows, budget=budget):
        values = token_logprobs(model, micro).split([len(rows[r].trained) for r in micro.rows])  # type: ignore[no-untyped-call]
        for r, value in zip(micro.rows, values, strict=True):
            g, i = places[r]
            logprobs = np.zeros(len(rows[r].token_ids), np.float32)
            logprobs[rows[r].trained] = value.numpy()
            scores[g, i] = replace(groups[g].trajectories[i], behavior_logprob=logprobs)
    return [
        replace(one, trajectories=tuple(scores[g, i] for i in range(len(one.trajectories))))
        for g, one in enumerate(groups)
    ]


def first_gradient(learner: LearnerCore, *, beta1: float = 0.9) -> Mapping[str, torch.Tensor]:
    """The gradient of the learner's first update, read back from AdamW's first moment."""
    moments = learner.trainer_state().optimizer
    return {key.removeprefix("exp_avg/"): m / (1 - beta1) for key, m in moments.items() if key.startswith("exp_avg/")}
