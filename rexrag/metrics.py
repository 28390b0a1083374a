"""Keys of `metrics.jsonl` and of TensorBoard: `area/name`, each with one line that says what it is.

A metric without a value in a step is None, never NaN. Shares lie in [0, 1]; times are seconds; § refers to the
algorithm's specification. Rows masked as `env_error` count nowhere but in `env_error/count`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

_descriptions: dict[str, str] = {}


def _metric(key: str, description: str) -> str:
    assert key not in _descriptions, f"{key} is defined twice"
    _descriptions[key] = description
    return key


# The step.
STEP: Final = _metric("step", "Learner step, counted from 1; a skipped step counts.")
VERSION: Final = _metric("version", "Version of the weights after the step.")

# Rollouts of the step's groups, before the filter.
TARGET_COUNT: Final = _metric("target/count", "Target rollouts of the step.")
TARGET_EM: Final = _metric("target/em", "Mean exact match of target rollouts.")
TARGET_F1: Final = _metric("target/f1", "Mean F1 of target rollouts.")
TARGET_REWARD: Final = _metric("target/reward", "Mean reward of target rollouts.")
TARGET_DEAD_END_RATE: Final = _metric(
    "target/dead_end_rate", "Share of target rollouts that ended without being correct."
)
TARGET_UNPROBEABLE_RATE: Final = _metric(
    "target/unprobeable_rate", "Share of dead-end targets without a branch point at which the budgets allow a probe."
)
TARGET_LIMIT_RATE: Final = _metric(
    "target/limit_rate", "Share of target rollouts that ended at the turn or token limit."
)
TARGET_VALID_ACTION_RATE: Final = _metric(
    "target/valid_action_rate", "Share of the targets' turns with a complete action."
)
TARGET_REFLECT_RATE: Final = _metric(
    "target/reflect_rate", "Share of targets that wrote the words of a hint by themselves."
)
TARGET_RETRIEVAL_RECALL: Final = _metric(
    "target/retrieval_recall", "Share of targets that were given a gold passage, among those where that is known."
)
TARGET_SEARCHES: Final = _metric("target/searches", "Mean answered searches of a target.")
TARGET_TURNS: Final = _metric("target/turns", "Mean model turns of a target.")
TARGET_TOKENS: Final = _metric("target/tokens", "Mean tokens of a target after the prompt, observations included.")
TARGET_POLICY_TOKENS: Final = _metric("target/policy_tokens", "Mean tokens that the policy wrote in a target.")
TARGET_GENERATE_S: Final = _metric("target/generate_s", "Mean seconds that a target waited for the engine.")
TARGET_SEARCH_S: Final = _metric("target/search_s", "Mean seconds that a target waited for the retriever.")
SEARCH_REFUSED: Final = _metric(
    "search/refused", "Searches of target rollouts whose query the retriever refused: too long, say."
)
PROBE_COUNT: Final = _metric("probe/count", "Probes of the step, before the filter.")
PROBE_EM: Final = _metric("probe/em", "Mean exact match of probes.")
PROBE_F1: Final = _metric("probe/f1", "Mean F1 of probes.")
PROBE_REWARD: Final = _metric("probe/reward", "Mean reward of probes.")
PROBE_DEAD_END_RATE: Final = _metric("probe/dead_end_rate", "Share of probes that ended without being correct.")
PROBE_SEARCHES: Final = _metric("probe/searches", "Mean answered searches of a probe, its prefix included.")
PROBE_TURNS: Final = _metric("probe/turns", "Mean model turns of a probe, its prefix included.")
PROBE_TOKENS: Final = _metric("probe/tokens", "Mean tokens of a probe after the prompt, prefix and hint included.")
ENV_ERROR_COUNT: Final = _metric("env_error/count", "Rows masked because the environment failed.")

# Groups.
GROUP_COUNT: Final = _metric("group/count", "Groups of the step.")
GROUP_DEAD_END_RATE: Final = _metric("group/dead_end_rate", "Share of groups without a correct target.")
GROUP_RESCUED: Final = _metric(
    "group/rescued", "Share of groups whose targets all failed and of which a probe is correct."
)
GROUP_INFORMATIVE: Final = _metric("group/informative", "Share of groups with a row that has an advantage.")
GROUP_FILTERED_FLAT: Final = _metric("group/filtered_flat", "Groups that the filter left with equal rewards (§8).")
DEAD_NEVER_RETRIEVED: Final = _metric(
    "dead/never_retrieved", "Share of dead groups that mostly answered without a gold passage."
)
DEAD_NOT_USED: Final = _metric(
    "dead/not_used", "Share of dead groups that mostly answered wrongly although gold was retrieved."
)
DEAD_MALFORMED: Final = _metric(
    "dead/malformed", "Share of dead groups that mostly reached a limit with malformed turns."
)
DEAD_LIMIT: Final = _metric("dead/limit", "Share of dead groups that mostly reached a limit with well-formed turns.")
RESCUED_NEVER_RETRIEVED: Final = _metric(
    "rescued/never_retrieved", "Share of `dead/never_retrieved` groups that a probe rescued."
)
RESCUED_NOT_USED: Final = _metric("rescued/not_used", "Share of `dead/not_used` groups that a probe rescued.")
RESCUED_MALFORMED: Final = _metric("rescued/malformed", "Share of `dead/malformed` groups that a probe rescued.")
RESCUED_LIMIT: Final = _metric("rescued/limit", "Share of `dead/limit` groups that a probe rescued.")

# Mixture, filter, weights.
MIXTURE_ALPHA: Final = _metric(
    "mixture/alpha",
    "α of §5: probes' share of the step's rows after the filter, with trajectory weights p/(1 + p) of `probe.rate` p.",
)
FILTER_RHO: Final = _metric("filter/rho", "ρ of §8: probes kept per target in this step; 1 without a filter.")
FILTER_SUCCESS: Final = _metric("filter/success", "m of §8 after the step: running success rate of probes.")
FILTER_KEPT: Final = _metric("filter/kept", "Probes that the filter kept.")
WEIGHT_MEAN: Final = _metric("weight/mean", "Mean weight w of §6 over the tokens that were trained on.")
WEIGHT_P95: Final = _metric("weight/p95", "95th percentile of w.")
WEIGHT_MAX: Final = _metric("weight/max", "Largest w.")
WEIGHT_ESS_TARGET: Final = _metric(
    "weight/ess_target",
    "Effective sample size (Σw)²/(n·Σw²) of the targets' tokens; with `normalized` of A·w by its size.",
)
WEIGHT_ESS_PROBE: Final = _metric(
    "weight/ess_probe",
    "Effective sample size (Σw)²/(n·Σw²) of the probes' tokens; with `normalized` of A·w by its size.",
)
WEIGHT_BY_MIXTURE: Final = _metric(
    "weight/by_mixture", "Of what the rows' log-weights amount to, the share that is owed to probe mixing."
)
WEIGHT_BY_STALENESS: Final = _metric(
    "weight/by_staleness", "The share that is owed to tokens of older versions, the engine's arithmetic included."
)
WEIGHT_BY_MISMATCH: Final = _metric(
    "weight/by_mismatch", "The share on tokens of the current version: engine and learner compute differently."
)
WEIGHT_TRUNCATED_SHARE: Final = _metric(
    "weight/truncated_share", "Share of tokens whose staleness weight was cut to the cap."
)
WEIGHT_MASKED_SHARE: Final = _metric("weight/masked_share", "Share of tokens whose staleness weight was masked.")

GRADIENT_PROBE_SHARE: Final = _metric(
    "gradient/probe_share",
    "Of the sizes of A·w, summed over the trained tokens, the share of probes: how much of the gradient they carry.",
)
GRADIENT_HINT: Final = _metric(
    "gradient/hint_n", "The share of the probes with hint n, counted from 0 in the order of the pool."
)

# Staleness of the step's tokens, in learner steps.
STALENESS_MEAN: Final = _metric("staleness/mean", "Mean age of policy and hint tokens when consumed.")
STALENESS_MAX: Final = _metric("staleness/max", "Age of the oldest token when consumed.")

# Objective and update.
LOSS_TOTAL: Final = _metric("loss/total", "Objective of §7, KL and the penalty that preserves included.")
LOSS_CLIP_LOW_SHARE: Final = _metric("loss/clip_low_share", "Share of tokens whose ratio was clipped from below.")
LOSS_CLIP_HIGH_SHARE: Final = _metric("loss/clip_high_share", "Share of tokens whose ratio was clipped from above.")
LOSS_DUAL_CLIP_SHARE: Final = _metric("loss/dual_clip_share", "Share of tokens on which the dual clip acted.")
PRESERVE_LOSS: Final = _metric(
    "preserve/loss", "Penalty on what the kept rows of solved groups lost in likelihood, its weight included (§7)."
)
PRESERVE_COSINE: Final = _metric(
    "preserve/cosine",
    "Cosine between the gradients of the objective and of that penalty; below 0 the step would undo what was right, "
    "and that part of it is taken out (§7).",
)
PRESERVE_ROWS: Final = _metric("preserve/rows", "Rows of solved groups that are kept for it.")
POLICY_ENTROPY: Final = _metric("policy/entropy", "Mean entropy at the trained positions, nats.")
POLICY_KL_REF: Final = _metric(
    "policy/kl_ref", "Mean k3 estimate of the KL to the reference model per trained policy token."
)
POLICY_MISMATCH_KL: Final = _metric(
    "policy/mismatch_kl", "k3 estimate of KL(engine ‖ learner) on policy tokens sampled under the current version."
)
POLICY_CORRECT_LOGPROB: Final = _metric(
    "policy/correct_logprob", "Mean log-prob of the policy tokens of correct rows that were trained on."
)
GRAD_NORM: Final = _metric("optimizer/grad_norm", "Gradient norm before clipping; None without a finite gradient.")
LEARNING_RATE: Final = _metric("optimizer/learning_rate", "Learning rate of the step's update.")
UPDATED: Final = _metric(
    "optimizer/updated", "1 where the weights changed, 0 where no row had an advantage or the step was skipped."
)
BAD_STEPS: Final = _metric("optimizer/bad_steps", "Consecutive steps skipped for a non-finite loss or gradient.")

# What was attempted (all rows of the step) against what was trained on (rows with a forward pass).
ATTEMPTED_ROWS: Final = _metric("attempted/rows", "Rows of the step, before the filter.")
ATTEMPTED_HOPS: Final = _metric("attempted/hops", "Mean hops of the attempted rows' questions, where known.")
ATTEMPTED_SEARCHES: Final = _metric("attempted/searches", "Mean answered searches of attempted rows.")
ATTEMPTED_TOKENS: Final = _metric("attempted/tokens", "Mean tokens of attempted rows, prompt included.")
ATTEMPTED_PROBE_SHARE: Final = _metric("attempted/probe_share", "Share of probes among attempted rows.")
ATTEMPTED_AGE: Final = _metric("attempted/age", "Mean age of the oldest token of attempted rows.")
TRAINED_ROWS: Final = _metric("trained/rows", "Rows that had a forward pass.")
TRAINED_HOPS: Final = _metric("trained/hops", "Mean hops of the trained rows' questions, where known.")
TRAINED_SEARCHES: Final = _metric("trained/searches", "Mean answered searches of trained rows.")
TRAINED_TOKENS: Final = _metric("trained/tokens", "Mean tokens of trained rows, prompt included.")
TRAINED_PROBE_SHARE: Final = _metric("trained/probe_share", "Share of probes among trained rows.")
TRAINED_AGE: Final = _metric("trained/age", "Mean age of the oldest token of trained rows.")
TRAINED_LOSS_TOKENS: Final = _metric(
    "trained/loss_tokens",
    "Tokens with loss in the step, rows without forward pass included; N of §7 with weights per token.",
)

# Speed.
TIME_STEP: Final = _metric(
    "time/step_s", "Time of the loop's step, waiting for its groups included; checkpoint and evaluation are not."
)
TIME_UPDATE: Final = _metric("time/update_s", "Time of the learner's forward and backward passes and of the update.")
TIME_LEARNER_WAIT: Final = _metric("time/learner_wait_s", "Time that the learner waited for the step's groups.")
LEARNER_MICRO_BATCHES: Final = _metric("learner/micro_batches", "Forward and backward passes of the step.")
LEARNER_TOKENS_PER_S: Final = _metric("learner/tokens_per_s", "Tokens of trained rows per second of `time/update_s`.")
LEARNER_SHARED_SHARE: Final = _metric(
    "learner/shared_share", "Share of the trained rows' tokens read from a shared prefix in place of computed again."
)
ROLLOUT_TOKENS_PER_S: Final = _metric(
    "rollout/tokens_per_s", "Tokens that all actors sampled per second since the step before."
)
ROLLOUT_ACTORS: Final = _metric("rollout/actors", "Rollout actors at work at the end of the step.")
ROLLOUT_ACTORS_WANTED: Final = _metric(
    "rollout/actors_wanted", "Rollout actors that were asked for at the end of the step."
)
ROLLOUT_REPLACED: Final = _metric("rollout/replaced", "Actors that died or broke and were replaced, since the start.")

ENGINE_CANARY_KL: Final = _metric(
    "engine/canary_kl",
    "k3 estimate of KL(engine ‖ learner) per token of the canary, right after new weights; the worst actor's.",
)
ENGINE_SWITCH_S: Final = _metric(
    "engine/switch_s",
    "Seconds in which an engine took in new weights and generated nothing: they had come while it did; the worst "
    "actor's.",
)
ENGINE_PROOF_S: Final = _metric(
    "engine/proof_s", "Seconds until an engine had proved its new weights, beside its generation; the worst actor's."
)
ENGINE_UNPROVEN: Final = _metric(
    "engine/unproven", "Weight updates of which neither the canary nor the bits can tell them from those before."
)

# Searches of all actors since the step before.
SEARCH_EMPTY: Final = _metric("search/empty", "Searches that were answered and found nothing.")
SEARCH_FAILED: Final = _metric(
    "search/failed", "Searches that could not be made in the end: their episodes are masked as `env_error`."
)
SEARCH_RETRIED: Final = _metric("search/retried", "Attempts of searches after their first.")
SEARCH_OUTAGES: Final = _metric(
    "search/outages", "Outages of the retriever that began, summed over the actors, each of which meets it by itself."
)
SEARCH_OUTAGE_S: Final = _metric(
    "search/outage_s", "Seconds in which the retriever did not answer, summed over the actors."
)

# Warnings: 1 while a bound is passed, else 0.
WARNING_ESS: Final = _metric(
    "warning/low_ess",
    "The effective sample size of targets is below .1, or that of probes where weights are no shares.",
)
WARNING_TRUNCATION: Final = _metric("warning/truncation", "More than a tenth of the staleness weights was cut.")
WARNING_REFLECTING: Final = _metric("warning/reflecting", "More than a fifth of the targets write a hint's words.")
WARNING_FORGETTING: Final = _metric(
    "warning/forgetting", "Correct rows are less likely than in the ten steps before, by half of their log-prob."
)
WARNING_LOSSES: Final = _metric("warning/losses", "Three rollout actors or more died within ten steps.")
WARNING_REFUSED: Final = _metric("warning/refused", "The search server refuses more queries than it answers.")
WARNING_MISMATCH: Final = _metric("warning/mismatch", "`policy/mismatch_kl` is above .01.")

# Histograms.
HISTOGRAM_WEIGHT: Final = _metric("histogram/weight", "Weights w of the trained tokens.")
HISTOGRAM_AGE: Final = _metric("histogram/age", "Age of the oldest token of each attempted row.")
HISTOGRAM_ATTEMPTED_TOKENS: Final = _metric(
    "histogram/attempted_tokens", "Tokens of each attempted row, prompt included."
)
HISTOGRAM_TRAINED_TOKENS: Final = _metric("histogram/trained_tokens", "Tokens of each trained row, prompt included.")
HISTOGRAM_ATTEMPTED_HOPS: Final = _metric("histogram/attempted_hops", "Hops of each attempted row's question.")
HISTOGRAM_TRAINED_HOPS: Final = _metric("histogram/trained_hops", "Hops of each trained row's question.")


def hint_key(hint_id: int) -> str:
    """The key of a hint, one of those that `gradient/hint_n` describes."""
    return GRADIENT_HINT.removesuffix("n") + str(hint_id)


def hint_of(key: str) -> int | None:
    """The hint of such a key."""
    number = key.removeprefix(GRADIENT_HINT.removesuffix("n"))
    return int(number) if number != key and number.isdigit() else None


def described(key: str) -> str:
    """The key under which `DESCRIPTIONS` has another."""
    return key if hint_of(key) is None else GRADIENT_HINT


DESCRIPTIONS: Final[Mapping[str, str]] = MappingProxyType(_descriptions)
"""Every key with its line, histograms (`histogram/…`, TensorBoard only) included."""
