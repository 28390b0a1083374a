"""The engine over vLLM: against a bare loop over the same vLLM, against the torch engine, and both in bfloat16.

    .venv-vllm/bin/python benchmarks/engine_vllm.py [--model FOLDER] [--episodes 64] [--threads N] [--work DIR]
                                                    [--out FILE]

*Actor*: the episodes of `engine.py`, with searches, through the runner of a rollout actor. *Bare*: what its engine was
asked, turn by turn, put to vLLM's own `LLMEngine` in a loop: no environment, no search, no event loop, no texts; each
turn of an episode as soon as the one before it is over, as many tokens as were sampled.

*Sizes*: the same requests to both engines, in float32, for models made on the spot. *Precision*: rows that each engine
sampled, their recorded log-probs against a plain float32 pass; `mismatch_kl` is the k3 estimate of
KL(engine ‖ learner).
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
from engine import SETTINGS, VERSION, Dtype, Prepared, prepare, read_arguments, run_episodes, settings_of
from machine import origin
from transformers import AutoModelForCausalLM, LlamaConfig

from rexrag.engine.protocol import Engine, GenerateRequest, Generation
from rexrag.engine.settings import EngineSettings
from rexrag.engine.torch_engine import TorchEngine
from rexrag.engine.vllm_engine import VllmEngine
from rexrag.engine.vllm_environment import prepare as prepare_environment
from rexrag.engine.vllm_settings import Place, core_settings
from rexrag.env.codec import Codec
from rexrag.model.loading import load_config, load_model, load_tokenizer

SIZES: Final[dict[str, dict[str, Any]]] = {
    "0.4M": {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 192},
    "10M": {"hidden_size": 320, "num_hidden_layers": 7, "num_attention_heads": 5, "intermediate_size": 1024},
    "135M": {"hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "intermediate_size": 1536},
}
"""Shapes by their parameters; the last is SmolLM2's."""
VOCABULARY: Final = {"0.4M": 4096, "10M": 4096, "135M": 49152}
NUM_ROWS: Final = 64
PROMPT_TOKENS: Final = 192
NEW_TOKENS: Final = 64
GOAL_OF_BARE: Final = 0.9
DTYPES: Final[tuple[Dtype, ...]] = ("float32", "bfloat16")
KINDS: Final = ("torch", "vllm")


class NoText:
    """A codec for models without a tokenizer: nothing ends a turn."""

    eos_ids: frozenset[int] = frozenset()

    def decode(self, ids: Sequence[int], /) -> str:
        return "x" * len(ids)


class RecordingEngine(VllmEngine):
    """Remembers what each episode asked of it, turn by turn, and how many tokens it got."""

    def __init__(self, folder: Path, *, settings: EngineSettings, codec: Codec) -> None:
        super().__init__(folder, settings=settings, place=Place(), codec=codec, version=VERSION)
        self.turns: dict[Any, list[tuple[GenerateRequest, int]]] = {}

    async def generate(self, request: GenerateRequest) -> Generation:
        generation = await super().generate(request)
        self.turns.setdefault(asyncio.current_task(), []).append((request, len(generation.token_ids)))
        return generation


def make_engine(kind: str, folder: Path, *, settings: EngineSettings, codec: Any) -> Engine:  # noqa: ANN401
    if kind == "vllm":
        return VllmEngine(folder, settings=settings, place=Place(), codec=codec, version=VERSION)
    return TorchEngine(load_model(folder, dtype="float32"), settings=settings, codec=codec, version=VERSION)


def actor_against_bare(prepared: Prepared, *, threads: int) -> dict[str, object]:
    """Tokens a second of episodes, and of their requests alone."""
    settings = settings_of(
        "float32", rows=len(prepared.questions), max_length=SETTINGS.max_trajectory_tokens, threads=threads
    )
    codec = Codec(load_tokenizer(prepared.model))
    engine = RecordingEngine(prepared.model, settings=settings, codec=codec)
    run = asyncio.run(run_episodes(engine, prepared=prepared, codec=codec, dtype="float32"))
    bare_s, tokens = bare_loop(prepared.model, list(engine.turns.values()), settings=settings)
    assert tokens == run.stats.sampled_tokens, f"{tokens} tokens for {run.stats.sampled_tokens}"
    share = bare_s / run.seconds
    return {
        "episodes": len(prepared.questions),
        "actor": run.summary(),
        "bare": {"seconds": round(bare_s, 2), "tokens_per_s": round(tokens / bare_s, 1)},
        "share_of_bare": round(share, 3),
        "goal": share >= GOAL_OF_BARE,
    }


def bare_loop(
    folder: Path, episodes: Sequence[Sequence[tuple[GenerateRequest, int]]], *, settings: EngineSettings
) -> tuple[float, int]:
    """Seconds and sampled tokens of the same requests in vLLM's own engine."""
    from vllm import LLMEngine, SamplingParams  # reads the environment as it is now

    from rexrag.engine.vllm_core import engine_args

    core = core_settings(folder, config=load_config(folder), settings=settings, place=Place(), eos_ids=frozenset())
    engine = LLMEngine.from_engine_args(engine_args(core))
    turns = dict.fromkeys(range(len(episodes)), 0)

    def ask(episode: int) -> None:
        request, tokens = episodes[episode][turns[episode]]
        params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, logprobs=0, detokenize=False)
        prompt = {"prompt_token_ids": list(request.prompt_ids), "cache_salt": request.cache_salt}
        engine.add_request(f"{episode}-{turns[episode]}", prompt, params)

    began, sampled = time.perf_counter(), 0
    for episode in turns:
        ask(episode)
    while engine.has_unfinished_requests():
        for output in engine.step():
            if not output.finished:
                continue
            sampled += len(output.outputs[0].token_ids)
            episode = int(output.request_id.partition("-")[0])
            turns[episode] += 1
            if turns[episode] < len(episodes[episode]):
                ask(episode)
    seconds = time.perf_counter() - began
    engine.engine_core.shutdown()
    return seconds, sampled


def over_sizes(work: Path, *, threads: int) -> list[dict[str, object]]:
    """Each engine's tokens a second for the same requests: prompts that are all new, none of them ends early."""
    rows: list[dict[str, object]] = []
    for name, shape in SIZES.items():
        folder = work / f"llama-{name}"
        config = LlamaConfig(
            vocab_size=VOCABULARY[name],
            num_key_value_heads=max(1, shape["num_attention_heads"] // 3),
            head_dim=shape["hidden_size"] // shape["num_attention_heads"],
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=None,
            **shape,
        )
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
        model.save_pretrained(folder)
        for kind in KINDS:
            rows.append(
                {
                    "parameters": name,
                    "counted": sum(parameter.numel() for parameter in model.parameters()),
                    "engine": kind,
                    **asyncio.run(speed(kind, folder, vocabulary=VOCABULARY[name], threads=threads)),
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    return rows


async def speed(kind: str, folder: Path, *, vocabulary: int, threads: int) -> dict[str, float]:
    settings = settings_of("float32", rows=NUM_ROWS, max_length=PROMPT_TOKENS + NEW_TOKENS, threads=threads)
    began = time.perf_counter()
    engine = make_engine(kind, folder, settings=settings, codec=NoText())
    ready_s = time.perf_counter() - began
    rng = random.Random(0)

    async def batch(number: int, *, new_tokens: int) -> float:
        requests = [
            GenerateRequest(
                prompt_ids=[rng.randrange(vocabulary) for _ in range(PROMPT_TOKENS)],
                max_tokens=new_tokens,
                seed=row,
                cache_salt=str(number),
            )
            for row in range(NUM_ROWS)
        ]
        began = time.perf_counter()
        await asyncio.gather(*(engine.generate(request) for request in requests))
        engine.release(str(number))
        return time.perf_counter() - began

    await batch(0, new_tokens=4)  # the first passes pay for what is set up once
    prefill_s = await batch(1, new_tokens=1)
    seconds = await batch(2, new_tokens=NEW_TOKENS)
    await engine.close()
    return {
        "ready_s": round(ready_s, 2),
        "seconds": round(seconds, 2),
        "tokens_per_s": round(NUM_ROWS * NEW_TOKENS / seconds, 1),
        "prompt_tokens_per_s": round(NUM_ROWS * PROMPT_TOKENS / prefill_s, 1),
    }


def mismatch(prepared: Prepared, *, threads: int) -> list[dict[str, object]]:
    """What the engines recorded against what a learner in float32 has for the same tokens."""
    codec = Codec(load_tokenizer(prepared.model))
    prompts = [codec.encode(question.question) for question in prepared.questions]
    judge = load_model(prepared.model, dtype="float32")
    rows: list[dict[str, object]] = []
    for kind in KINDS:
        for dtype in DTYPES:
            settings = settings_of(dtype, rows=len(prompts), max_length=256, threads=threads)
            engine = make_engine(kind, prepared.model, settings=settings, codec=NoText())
            began = time.perf_counter()
            sampled = asyncio.run(sample(engine, prompts))
            seconds = time.perf_counter() - began
            rows.append(
                {"engine": kind, "dtype": dtype, "seconds": round(seconds, 1), **against(judge, prompts, sampled)}
            )
            print(json.dumps(rows[-1]), flush=True)
    return rows


async def sample(engine: Engine, prompts: Sequence[Sequence[int]]) -> list[Generation]:
    try:
        return await asyncio.gather(
            *(
                engine.generate(GenerateRequest(prompt_ids=prompt, max_tokens=NEW_TOKENS, seed=row))
                for row, prompt in enumerate(prompts)
            )
        )
    finally:
        await engine.close()


@torch.inference_mode()
def against(judge: Any, prompts: Sequence[Sequence[int]], sampled: Sequence[Generation]) -> dict[str, object]:  # noqa: ANN401
    gaps = []
    for prompt, generation in zip(prompts, sampled, strict=True):
        ids = torch.tensor([[*prompt, *generation.token_ids]])
        logits = judge(ids).logits[0, len(prompt) - 1 : -1].double()
        logprobs = logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0]
        gaps.append(logprobs - torch.tensor(generation.logprobs, dtype=torch.float64))
    gap = torch.cat(gaps)
    return {
        "tokens": len(gap),
        "not_finite": int((~gap.isfinite()).sum()),
        "mismatch_kl": float((gap.exp() - 1 - gap).mean()),
        "mean_gap": float(gap.abs().mean()),
        "largest_gap": float(gap.abs().max()),
        "beyond_a_fifth": float((gap.exp() - 1).abs().gt(0.2).double().mean()),
    }


def main() -> None:
    arguments = read_arguments(__doc__, out="engine_vllm.json")
    head = {**origin(), "threads": arguments.threads}
    prepare_environment("cpu")
    torch.set_num_threads(arguments.threads)
    arguments.work.mkdir(parents=True, exist_ok=True)
    prepared = prepare(arguments.work, model=arguments.model, num_episodes=arguments.episodes)
    compared = actor_against_bare(prepared, threads=arguments.threads)
    print(json.dumps(compared), flush=True)
    result = {
        **head,
        "episodes": compared,
        "sizes": over_sizes(arguments.work, threads=arguments.threads),
        "precision": mismatch(prepared, threads=arguments.threads),
    }
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
