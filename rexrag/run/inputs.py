"""What a run reads: questions, model, hints and retriever, looked at before anything is started."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rexrag.buffer.recovery import check_questions
from rexrag.buffer.settings import ReplaySettings
from rexrag.config import Config
from rexrag.data.questions import load_questions
from rexrag.engine.vllm_settings import check_heads
from rexrag.errors import ConfigError, counted
from rexrag.hints import HintPool, load_hints
from rexrag.model.checks import check_model
from rexrag.model.weight_proof import Canary
from rexrag.retrieval.open import check_retriever
from rexrag.retrieval.settings import RetrieverSettings
from rexrag.reward import is_user_reward, load_reward, try_reward
from rexrag.run.engine_choice import choose_engine
from rexrag.run.identity import first_step_of
from rexrag.run.limits import canary_prompts, check_limits
from rexrag.run.part_settings import copied, device_of, has_likelihood, replay_settings
from rexrag.run.plan import TrainRequest
from rexrag.types import Question


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a run reads, checked before anything is started; `notes` tell what was done with odd rows."""

    replay: ReplaySettings
    dev: tuple[Question, ...]
    test: tuple[Question, ...]
    hints: HintPool
    model_path: str
    canary: Canary
    notes: tuple[str, ...]


def read_inputs(request: TrainRequest) -> Inputs:
    """All files that the run reads, and the retriever, looked at before anything is started.

    Raises:
        UserError: the first one that cannot be used.
    """
    config = request.config
    skip, limit = config.data.skip_bad_rows, config.eval.max_questions

    notes: list[str] = []

    def load(paths: Sequence[Path]) -> tuple[Question, ...]:
        if not paths:
            return ()
        loaded = load_questions(paths, skip_bad_rows=skip, keep_rows=is_user_reward(config.reward.kind))
        notes.extend(loaded.notes)
        return loaded.questions

    model_path = model_path_of(request)
    model = check_model(model_path)
    if choose_engine(config).engine == "vllm":
        check_heads(
            model.config,
            device=device_of(config.rollout.num_gpus),
            tensor_parallel=config.rollout.tensor_parallel,
        )
    hints = load_hints(config.probe.hints, codec=model.codec, removable=config.probe.transfer == "hint_free")
    if hints.has_empty and config.correction.mixture != "none":
        raise ConfigError(
            f'probe.hints = {config.probe.hints}: has a "|" alone, a fork without a hint, which correction.mixture = '
            f'"{config.correction.mixture}" has no density for; take it out, or set correction.mixture = "none".'
        )
    check_retriever(copied(RetrieverSettings, config.retriever), top_k=config.env.top_k)
    train, dev, test = load(config.data.train), load(config.data.dev), load(config.data.eval)
    _check_reward(config, train)
    check_limits(config, model=model, hints=hints, questions=train)
    replay = replay_settings(
        config,
        folder=request.run.buffer,
        questions=train,
        log_file=request.run.log,
        first_step=first_step_of(request.run),
    )
    check_questions(replay.folder, replay.questions)
    return Inputs(
        replay=replay,
        dev=_some_of(dev, limit, what="dev", notes=notes),
        test=_some_of(test, limit, what="held-out", notes=notes),
        hints=hints,
        model_path=model_path,
        canary=canary_prompts(config, model=model, questions=train),
        notes=tuple(notes),
    )


def _some_of(
    questions: tuple[Question, ...], limit: int | None, *, what: str, notes: list[str]
) -> tuple[Question, ...]:
    """At most so many, spread evenly over the files: of each source its share."""
    if limit is None or len(questions) <= limit:
        return questions
    notes.append(f"{limit:,} of {counted(len(questions), f'{what} question')} are evaluated (eval.max_questions)")
    return tuple(questions[i * len(questions) // limit] for i in range(limit))


def model_path_of(request: TrainRequest) -> str:
    """Of the weights that the run begins with, or goes on with."""
    path = request.config.model.path if request.checkpoint is None else request.checkpoint
    assert path is not None, "the recipe was checked: a run has a model"
    return str(path)


def _check_reward(config: Config, questions: Sequence[Question]) -> None:
    kind = config.reward.kind
    reward = load_reward(kind, format_weight=config.reward.format_weight, never_negative=has_likelihood(config))
    if is_user_reward(kind) and questions:
        try_reward(reward, questions[0])
