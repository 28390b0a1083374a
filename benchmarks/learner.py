"""The learner's step on a GPU against the card's own ceiling, a large matrix product in the same run.

    python benchmarks/learner.py [--shape NAME ...] [--tokens N ...] [--micro-batch N ...] [--out FILE]

Full fine-tuning of a model with random weights, made from its shape alone: forward and backward passes, log-probs over
the whole vocabulary, weights of the correction, AdamW with float32 master weights. Rows are like those of a search
agent: prompt, then turns of policy tokens with observations between them, which are read but not trained; five rows
share a prompt. MFU counts the products that a step needs (6 for each weight and packed token, the head for trained
tokens alone, causal attention) over the time from the batch to the updated weights, as a share of the ceiling.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import mkdtemp
from typing import Final

import numpy as np
import torch
from machine import origin
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, Qwen2Config, Qwen3Config

from rexrag import metrics as keys
from rexrag.arrow import group_to_ipc
from rexrag.hints import HintPool
from rexrag.learner.correction import CorrectionSettings
from rexrag.learner.loss import LossSettings
from rexrag.learner.mixture_weights import ProbeSettings
from rexrag.learner.optimizer import OptimizerSettings
from rexrag.learner.step import LearnerCore, LearnerSettings
from rexrag.types import EndReason, Kind, Origin, StepBatch, Trajectory, TrajectoryGroup

GROUP_SIZE: Final = 5
PROMPT_TOKENS: Final = 128
TURN_TOKENS: Final = 96
OBSERVATION_TOKENS: Final = 200
NUM_TURNS: Final = 3
CEILING_SIZE: Final = 8192
_VOCABULARY: Final = 151_936

SHAPES: Final[dict[str, Callable[[], PreTrainedConfig]]] = {
    "qwen3-0.6b": lambda: Qwen3Config(
        vocab_size=_VOCABULARY, tie_word_embeddings=True, max_position_embeddings=4096, hidden_size=1024,
        intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8, head_dim=128,
    ),
    "qwen2.5-3b": lambda: Qwen2Config(
        vocab_size=_VOCABULARY, tie_word_embeddings=True, max_position_embeddings=4096, hidden_size=2048,
        intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16, num_key_value_heads=2,
    ),
    "tiny": lambda: Qwen3Config(
        vocab_size=512, tie_word_embeddings=True, max_position_embeddings=2048, hidden_size=64, intermediate_size=128,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    ),
}  # fmt: skip

SETTINGS: Final = LearnerSettings(
    correction=CorrectionSettings(mixture="normalized", bound="truncate", cap=2.0, low=0.5, high=2.0),
    loss=LossSettings(
        baseline="joint", clip_low=0.2, clip_high=0.2, dual_clip=3.0, kl_coef=0.0, train_hints=True,
        train_prefix=True, preserve=1.0, preserve_knee=0.5, preserve_rows=16,
    ),
    optimizer=OptimizerSettings(
        learning_rate=1e-6, warmup_steps=0, decay_steps=0, beta1=0.9, beta2=0.99, weight_decay=0.0, max_grad_norm=1.0
    ),
    probe=ProbeSettings(rate=0.5, branch="answer", transfer="hinted", filter="none"),
    max_staleness=2, max_length=4096, micro_batch_tokens=4096, autocast="bfloat16", gradient_checkpointing=False,
    max_bad_steps=3,
)  # fmt: skip
"""What `rexrag train` takes by default, in bfloat16; spelt out, so that pydantic is not needed to measure."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """One shape, step size and micro-batch; times are medians of the steps after the first."""

    shape: str
    parameters: int
    micro_batch_tokens: int
    rows: int
    row_tokens: int
    packed_tokens: int
    trained_tokens: int
    step_s: float
    update_s: float
    row_tokens_per_s: float
    packed_tokens_per_s: float
    tflops: float
    mfu: float
    peak_gb: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["qwen3-0.6b"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[16384, 65536], help="of the rows of a step")
    parser.add_argument("--micro-batch", type=int, nargs="+", default=[16384], help="packed tokens of a pass")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--out", type=Path)
    words = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ceiling = matmul_tflops(device)
    print(f"ceiling: {ceiling:.0f} TFLOP/s", flush=True)
    results = []
    for shape in words.shape:
        for micro_batch in words.micro_batch:
            model = AutoModelForCausalLM.from_config(SHAPES[shape](), dtype=torch.float32).to(device)  # type: ignore[no-untyped-call]
            for num_tokens in words.tokens:
                result = measure(
                    model, shape=shape, num_tokens=num_tokens, micro_batch=micro_batch, steps=words.steps,
                    ceiling=ceiling,
                )  # fmt: skip
                print(json.dumps(asdict(result)), flush=True)
                results.append(result)
            del model
            torch.cuda.empty_cache()
    if words.out is not None:
        found = {
            **origin(),
            "ceiling_tflops": round(ceiling, 1),
            "results": [asdict(result) for result in results],
        }
        words.out.write_text(json.dumps(found, indent=1) + "\n")


def matmul_tflops(device: torch.device) -> float:
    """Of a bfloat16 product of two large random matrices; a small one where there is no GPU."""
    size = CEILING_SIZE if device.type == "cuda" else 1024
    left, right = torch.randn(2, size, size, device=device, dtype=torch.bfloat16)
    times = []
    for _ in range(12):
        began = _now(device)
        left @ right
        times.append(_now(device) - began)
    return 2 * size**3 / float(np.median(times[2:])) / 1e12


def measure(
    model: PreTrainedModel, *, shape: str, num_tokens: int, micro_batch: int, steps: int, ceiling: float
) -> Result:
    """Steps of as many rows as have `num_tokens` together."""
    device = model.device
    settings = replace(SETTINGS, micro_batch_tokens=micro_batch)
    learner = LearnerCore(model, settings=settings, hints=HintPool([[5, 6]]), evidence_folder=Path(mkdtemp()))
    groups = random_groups(num_tokens, vocabulary=int(model.config.vocab_size), seed=0)
    times, updates = [], []
    for step in range(1, steps + 1):
        streams = tuple(group_to_ipc(_aged(group, step - 1)) for group in groups)
        if step == 2 and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        began = _now(device)
        metrics = learner.step(StepBatch(step=step, incarnation="b", groups=streams)).metrics
        times.append(_now(device) - began)
        updates.append(float(metrics[keys.TIME_UPDATE] or 0.0))
    rows = [row for group in groups for row in group.trajectories]
    row_tokens = sum(len(row.token_ids) - 1 for row in rows)
    packed = round(row_tokens * (1.0 - float(metrics[keys.LEARNER_SHARED_SHARE] or 0.0)))
    trained = sum(int((row.origin == Origin.POLICY).sum()) for row in rows)
    work = step_flops(model, rows=rows, packed_tokens=packed, trained_tokens=trained) / 1e12
    seconds = float(np.median(times[1:]))
    return Result(
        shape=shape,
        parameters=sum(p.numel() for p in model.parameters()),
        micro_batch_tokens=micro_batch,
        rows=len(rows),
        row_tokens=row_tokens,
        packed_tokens=packed,
        trained_tokens=trained,
        step_s=round(seconds, 4),
        update_s=round(float(np.median(updates[1:])), 4),
        row_tokens_per_s=round(row_tokens / seconds),
        packed_tokens_per_s=round(packed / seconds),
        tflops=round(work / seconds, 1),
        mfu=round(work / seconds / ceiling, 4),
        peak_gb=round(torch.cuda.max_memory_allocated() / 1e9, 2) if device.type == "cuda" else 0.0,
    )


def step_flops(model: PreTrainedModel, *, rows: Sequence[Trajectory], packed_tokens: int, trained_tokens: int) -> float:
    """Floating-point operations of the products of one step, backward passes twice the forward ones.

    A shared prefix is attended over once: its queries are those of the row that brings it.
    """
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    linear = sum(p.numel() for name, p in model.named_parameters() if "layers" in name and p.ndim == 2)
    num_sharing = len(rows) - len(rows) // GROUP_SIZE
    scores = sum(len(row.token_ids) ** 2 / 2 for row in rows) - num_sharing * PROMPT_TOKENS**2 / 2
    attention = 4 * config.num_attention_heads * head_dim * config.num_hidden_layers * scores
    return float(
        3 * (2 * linear * packed_tokens + attention + 2 * config.vocab_size * config.hidden_size * trained_tokens)
    )


def random_groups(num_tokens: int, *, vocabulary: int, seed: int) -> list[TrajectoryGroup]:
    """Groups of five rows with a prompt in common, rewards both 0 and 1 in each."""
    rng = np.random.default_rng(seed)
    length = PROMPT_TOKENS + NUM_TURNS * TURN_TOKENS + (NUM_TURNS - 1) * OBSERVATION_TOKENS
    groups = []
    for number in range(max(1, round(num_tokens / length / GROUP_SIZE))):
        prompt = rng.integers(9, vocabulary, PROMPT_TOKENS)
        rows = tuple(
            _row(prompt, rng.integers(9, vocabulary, length - PROMPT_TOKENS), i % 2) for i in range(GROUP_SIZE)
        )
        name = f"g{number}"
        groups.append(
            TrajectoryGroup(group_id=name, question_id=name, data_source="random", hops=None, trajectories=rows)
        )
    return groups


def _row(prompt: np.ndarray, rest: np.ndarray, reward: int) -> Trajectory:
    turn = [Origin.POLICY] * TURN_TOKENS
    origin = [Origin.PROMPT] * len(prompt)
    starts = []
    for number in range(NUM_TURNS):
        origin += [Origin.ENV] * OBSERVATION_TOKENS if number else []
        starts.append(len(origin))
        origin += turn
    kinds = np.array(origin, np.uint8)
    return Trajectory(
        kind=Kind.TARGET, parent=None, branch_point=None, hint_id=None, reward=float(reward), em=float(reward),
        f1=float(reward), correct=bool(reward), end_reason=EndReason.ANSWER, num_searches=NUM_TURNS - 1,
        num_malformed=0, gold_retrieved=None, prompt_length=len(prompt),
        token_ids=np.concatenate([prompt, rest]).astype(np.int32), origin=kinds,
        behavior_logprob=np.where(kinds == Origin.POLICY, -12.0, 0.0).astype(np.float32),
        policy_version=np.zeros(len(kinds), np.int32), action_starts=np.array(starts, np.int32),
    )  # fmt: skip


def _aged(group: TrajectoryGroup, version: int) -> TrajectoryGroup:
    """The group as if the learner's weights had sampled it."""
    for row in group.trajectories:
        row.policy_version[row.prompt_length :] = version
    return group


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
