"""Scores of an answer: exact match, F1, and the reward that training maximises."""

from __future__ import annotations

import importlib
import math
import re
import string
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Final, Protocol

from rexrag.errors import ConfigError
from rexrag.types import Question

_ARTICLES: Final = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION: Final = str.maketrans("", "", string.punctuation)


class RewardFunction(Protocol):
    """The reward of one finished rollout."""

    def __call__(
        self, prediction: str | None, *, golds: Sequence[str], row: Mapping[str, object], valid_share: float
    ) -> float:
        """
        Args:
            prediction: the answer in the policy's own tokens; None: it gave none.
            golds: accepted answers.
            row: the question's row as it stood in the file.
            valid_share: share of the rollout's turns that had a complete action, in [0, 1].
        """


def normalize_answer(text: str) -> str:
    """SQuAD's normalisation: lower case, without punctuation and articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, golds: Sequence[str]) -> float:
    """1.0 if the prediction equals any gold answer after normalisation, else 0.0.

    Of a gold answer that normalisation leaves nothing of, such as the letter A, the text itself is compared.
    """
    normalized = normalize_answer(prediction)
    return float(
        any(normalized == kept if (kept := normalize_answer(gold)) else _alike(prediction, gold) for gold in golds)
    )


def f1_score(prediction: str, golds: Sequence[str]) -> float:
    """F1 of the bags of normalised words, best gold answer, in [0, 1]; of a gold answer without words, EM."""
    words = normalize_answer(prediction).split()
    return max((_word_f1(words, gold, prediction=prediction) for gold in golds), default=0.0)


def is_correct(em: float, f1: float, kind: str) -> bool:
    """Whether a rollout is correct (§2): em = 1, or f1 > 0 where the reward is `f1`. Format never counts."""
    return f1 > 0 if kind == "f1" else em == 1


def is_user_reward(kind: str) -> bool:
    """Whether `reward.kind` names a function of the user's own, `module:function`."""
    return ":" in kind


def load_reward(kind: str, *, format_weight: float = 0.0, never_negative: bool = False) -> RewardFunction:
    """The reward function that `reward.kind` names.

    Args:
        kind: `em`; `f1`; `em + format`: em + format_weight * share of valid turns; or `module:function`, a
            function of the user's own (prediction: str, golds: Sequence[str], row: Mapping[str, object]) -> float,
            imported from the Python path or the current folder. It is given "" where there was no answer.
        never_negative: the learner needs rewards of at least 0; those of the first three kinds are.

    Raises:
        ConfigError: an unknown kind, or a module or function that is not there or breaks. A function of the user's
            that raises, or whose result is no finite number or one below its bound, raises it when called.
    """
    if kind == "em":
        return _em_with_format(0.0)
    if kind == "f1":
        return _f1_reward
    if kind == "em + format":
        return _em_with_format(format_weight)
    if is_user_reward(kind):
        return _user_reward(kind, never_negative=never_negative)
    raise ConfigError(f"reward.kind = {kind!r} is unknown; it is em, f1, em + format, or module:function")


def _alike(prediction: str, gold: str) -> bool:
    return prediction.strip().casefold() == gold.strip().casefold()


def _word_f1(words: Sequence[str], gold: str, *, prediction: str) -> float:
    gold_words = normalize_answer(gold).split()
    if not gold_words:
        return float(_alike(prediction, gold))
    num_common = (Counter(words) & Counter(gold_words)).total()
    return 2 * num_common / (len(words) + len(gold_words))


def _em_with_format(weight: float) -> RewardFunction:
    def reward(prediction: str | None, *, golds: Sequence[str], row: Mapping[str, object], valid_share: float) -> float:
        em = 0.0 if prediction is None else exact_match(prediction, golds)
        return em + weight * valid_share

    return reward


def _f1_reward(prediction: str | None, *, golds: Sequence[str], row: Mapping[str, object], valid_share: float) -> float:
    return 0.0 if prediction is None else f1_score(prediction, golds)


def try_reward(reward: RewardFunction, question: Question) -> None:
    """Let a reward function of the user's meet a right answer and none, before the run does.

    Raises:
        ConfigError: it breaks, or its result cannot be used.
    """
    for prediction in (question.golden_answers[0], None):
        reward(prediction, golds=question.golden_answers, row=question.row, valid_share=1.0)


def _user_reward(kind: str, *, never_negative: bool) -> RewardFunction:
    function = _import_function(kind)

    def reward(prediction: str | None, *, golds: Sequence[str], row: Mapping[str, object], valid_share: float) -> float:
        try:
            value = function(prediction or "", golds, row)
        except Exception as error:
            # Fault boundary: whatever a user's function raises is told as the user's, with the place in its file.
            raise ConfigError(
                f"reward.kind = {kind!r} raised {type(error).__name__}: {error}{_place_of(error)} "
                f"for the answer {prediction!r}; correct it"
            ) from error
        if not isinstance(value, Real) or not math.isfinite(value):
            raise ConfigError(f"reward.kind = {kind!r} returned {value!r}; it must return a finite number")
        if never_negative and value < 0:
            raise ConfigError(
                f"reward.kind = {kind!r} returned {value!r} for the answer {prediction!r}; with correction.mixture = "
                '"normalized" a reward must be at least 0: add a constant to it, or set another mixture'
            )
        return float(value)

    return reward


def _import_function(kind: str) -> Callable[[str, Sequence[str], Mapping[str, object]], object]:
    module_name, _, function_name = kind.partition(":")
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.append(folder)  # a console script has its own folder there, not the one that it is run from
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(
            f"reward.kind = {kind!r}: module {module_name} cannot be imported ({error}); "
            f"put it on PYTHONPATH or into {folder}"
        ) from error
    except Exception as error:
        # Fault boundary: the module is the user's.
        raise ConfigError(
            f"reward.kind = {kind!r}: module {module_name} breaks when it is imported: "
            f"{type(error).__name__}: {error}{_place_of(error)}; "
            "correct it"
        ) from error
    function: Callable[..., object] | None = getattr(module, function_name, None)
    if not callable(function):
        raise ConfigError(f"reward.kind = {kind!r}: {module.__file__ or module_name} has no function {function_name}")
    return function


def _place_of(error: Exception) -> str:
    """Where in a file an error came up: of a syntax error where it is, else the innermost call."""
    if isinstance(error, SyntaxError):
        return f" ({error.filename}, line {error.lineno})"
    calls = traceback.extract_tb(error.__traceback__)
    return f" ({calls[-1].filename}, line {calls[-1].lineno})" if calls else ""
