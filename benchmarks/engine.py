"""The torch engine against transformers' `generate`: the same greedy episodes with searches, one after the other.

    python benchmarks/engine.py [--model FOLDER] [--episodes 64] [--threads N] [--work DIR] [--out FILE]

Both run the program's own episodes over the geography world and its BM25 index; only the engine differs. The peer
calls `model.generate` for all unfinished episodes at once, turn by turn, with prompts computed anew and the same
stop strings, in float32 or bfloat16, whichever generates faster here. Greedy, so that both write the same episodes:
the result counts how many are equal. Wall time means something on an idle machine only (`load`,
`load_at_end`); on a busy one compare CPU time, with --threads 1.

Without --model SmolLM2-135M-Instruct is fetched and learns the format of episodes from a few demonstrations first,
once per work folder.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from machine import commit, machine
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from rexrag.actors.episode import EpisodeParts, EpisodeSettings
from rexrag.actors.runner import EpisodeRunner
from rexrag.actors.scoring import Scorer
from rexrag.data.questions import load_questions
from rexrag.engine.protocol import Engine, EngineStats, Finish, GenerateRequest, Generation
from rexrag.engine.settings import EngineSettings
from rexrag.engine.stops import StopFinder
from rexrag.engine.torch_engine import TorchEngine
from rexrag.env.codec import Codec
from rexrag.hints import load_hints
from rexrag.model.fetching import fetch_smollm2
from rexrag.model.loading import fastest_dtype, load_model, load_tokenizer
from rexrag.preparation.warmstart import PromptSettings, warm_start
from rexrag.retrieval.bm25 import BM25Retriever, build_bm25
from rexrag.reward import load_reward
from rexrag.types import EpisodeScore, Question, WeightVersion
from rexrag.worlds.write import write_world

Dtype = Literal["float32", "bfloat16"]

VERSION = WeightVersion(incarnation="benchmark", step=0)
SYSTEM_PROMPT = "You search before you answer."
SETTINGS = EpisodeSettings(
    group_size=1,
    max_turns=4,
    max_turn_tokens=96,
    max_observation_tokens=128,
    max_trajectory_tokens=768,
    top_k=2,
    probe_rate=0.0,
    branch="answer",
    seed=0,
    dead_end="rollout",
    scored="none",
    eval_episodes=64,
    prompt_template=None,
    system_prompt=SYSTEM_PROMPT,
)
NUM_DEMONSTRATIONS = 96
_YIELDS = 64


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What the episodes need, on disk."""

    model: Path
    index: Path
    questions: Sequence[Question]


class TransformersEngine:
    """The peer: one `generate` for all episodes that wait for a turn, which is all unfinished ones."""

    version = VERSION

    def __init__(self, model: PreTrainedModel, *, tokenizer: PreTrainedTokenizerFast, codec: Codec) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._codec = codec
        self._stops = StopFinder(codec.decode)
        self._pending: list[tuple[GenerateRequest, asyncio.Future[Generation]]] = []
        self._task: asyncio.Task[None] | None = None
        self._sampled = self._prefilled = 0
        self._seconds = 0.0

    async def generate(self, request: GenerateRequest) -> Generation:
        future: asyncio.Future[Generation] = asyncio.get_running_loop().create_future()
        self._pending.append((request, future))
        if self._task is None:
            self._task = asyncio.create_task(self._run_batch())
        return await future

    async def update_weights(
        self, version: WeightVersion, weights: Mapping[str, npt.NDArray[np.generic]] | None
    ) -> float:
        raise NotImplementedError("the benchmark changes no weights")

    async def bit_sum(self) -> int | None:
        return None

    def release(self, cache_salt: str) -> None:
        return

    def stats(self) -> EngineStats:
        return EngineStats(
            sampled_tokens=self._sampled,
            prefilled_tokens=self._prefilled,
            reused_tokens=0,
            running=0,
            waiting=len(self._pending),
            forward_s=self._seconds,
        )

    async def close(self) -> None:
        return

    async def _run_batch(self) -> None:
        # The retriever answers in this process: after a few rounds all unfinished episodes have asked.
        for _ in range(_YIELDS):
            await asyncio.sleep(0)
        batch, self._pending, self._task = self._pending, [], None
        began = time.perf_counter()
        rows = self._generate_rows([request for request, _ in batch])
        self._seconds += time.perf_counter() - began
        for (request, future), row in zip(batch, rows, strict=True):
            generation = self._cut(request, row)
            self._sampled += len(generation.token_ids)
            self._prefilled += len(request.prompt_ids)
            future.set_result(generation)

    @torch.inference_mode()
    def _generate_rows(self, requests: Sequence[GenerateRequest]) -> list[list[int]]:
        """New tokens of each row, padding and all, from one left-padded call."""
        longest = max(len(request.prompt_ids) for request in requests)
        ids = torch.zeros(len(requests), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, request in enumerate(requests):
            ids[row, longest - len(request.prompt_ids) :] = torch.tensor(list(request.prompt_ids))
            mask[row, longest - len(request.prompt_ids) :] = 1
        output = self._model.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max(request.max_tokens for request in requests),
            do_sample=False,
            eos_token_id=sorted(self._codec.eos_ids),
            pad_token_id=min(self._codec.eos_ids),
            stop_strings=list(requests[0].stop),
            tokenizer=self._tokenizer,
        )
        rows: list[list[int]] = output[:, longest:].tolist()
        return rows

    def _cut(self, request: GenerateRequest, row: list[int]) -> Generation:
        """The tokens up to the one that ends the turn; log-probs are not asked of the peer."""
        row = row[: request.max_tokens]
        end = len(row)
        finish: Finish = "length"
        for index, token in enumerate(row):
            if token in self._codec.eos_ids:
                end, finish = index + 1, "eos"
                break
            if self._stops.completes(row[: index + 1], request.stop):
                end, finish = index + 1, "stop"
                break
        tokens = row[:end]
        return Generation(token_ids=tokens, logprobs=[0.0] * end, versions=[0] * end, finish=finish)


@dataclass(kw_only=True)
class Run:
    """One engine's episodes, and what they took."""

    dtype: str
    seconds: float
    cpu_seconds: float
    stats: EngineStats
    scores: list[EpisodeScore] = field(repr=False)

    def summary(self) -> dict[str, object]:
        tokens = self.stats.sampled_tokens
        return {
            "dtype": self.dtype,
            "seconds": round(self.seconds, 2),
            "cpu_seconds": round(self.cpu_seconds, 2),
            "sampled_tokens": tokens,
            "tokens_per_s": round(tokens / self.seconds, 1),
            "tokens_per_cpu_s": round(tokens / self.cpu_seconds, 1),
            "prefilled_tokens": self.stats.prefilled_tokens,
            "reused_tokens": self.stats.reused_tokens,
            "episodes_per_minute": round(60 * len(self.scores) / self.seconds, 2),
            "searches_per_episode": round(float(np.mean([score.num_searches for score in self.scores])), 2),
            "em": round(float(np.mean([score.em for score in self.scores])), 3),
        }


def prepare(work: Path, *, model: Path | None, num_episodes: int) -> Prepared:
    """World, index and a model that knows the format, made in `work` where they are missing."""
    world, index, started = work / "world", work / "index", work / "model"
    if not world.exists():
        write_world("geo", world, seed=0, size={"demonstrations": NUM_DEMONSTRATIONS})
        build_bm25(world / "corpus.jsonl", index)
    if model is None:
        model = started
        if not started.exists():
            warm_start(
                fetch_smollm2(progress=print),
                demonstrations=world / "demonstrations.jsonl",
                out=started,
                seed=0,
                learning_rate=1e-4,
                batch_size=16,
                epochs=1,
                prompt=PromptSettings(system_prompt=SYSTEM_PROMPT),
                threads=torch.get_num_threads(),
                progress=lambda p: print(f"warm start {p.update}/{p.num_updates}, loss {p.loss:.3f}", flush=True),
            )
    questions = load_questions([world / "test.jsonl"])
    return Prepared(model=model, index=index, questions=list(questions.questions)[:num_episodes])


async def run_episodes(engine: Engine, *, prepared: Prepared, codec: Codec, dtype: str) -> Run:
    """All episodes at once, greedy."""
    retriever = BM25Retriever(prepared.index)
    runner = EpisodeRunner(
        EpisodeParts(
            engine=engine,
            retriever=retriever,
            codec=codec,
            hints=load_hints(None, codec=codec),
            scorer=Scorer(load_reward("em", format_weight=0.0), kind="em"),
            settings=SETTINGS,
        )
    )
    began, began_cpu = time.perf_counter(), time.process_time()
    scores = await runner.evaluate(prepared.questions)
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - began_cpu
    stats = engine.stats()
    await engine.close()
    await retriever.close()
    return Run(dtype=dtype, seconds=seconds, cpu_seconds=cpu_seconds, stats=stats, scores=scores)


def fastest_peer_dtype(
    prepared: Prepared, *, codec: Codec, tokenizer: PreTrainedTokenizerFast
) -> tuple[Dtype, dict[str, float]]:
    """Which precision generates faster: seconds of 8 tokens for 16 short prompts, after a first call."""
    seconds: dict[str, float] = {}
    ids = codec.encode(prepared.questions[0].question)
    requests = [GenerateRequest(prompt_ids=ids, max_tokens=8, stop=("</search>",))] * 16
    dtypes: tuple[Dtype, Dtype] = ("float32", "bfloat16")
    for dtype in dtypes:
        engine = TransformersEngine(load_model(prepared.model, dtype=dtype), tokenizer=tokenizer, codec=codec)
        engine._generate_rows(requests[:1])
        began = time.perf_counter()
        engine._generate_rows(requests)
        seconds[dtype] = round(time.perf_counter() - began, 3)
    return min(dtypes, key=lambda dtype: seconds[dtype]), seconds


def settings_of(dtype: Dtype, *, rows: int, max_length: int, threads: int) -> EngineSettings:
    return EngineSettings(
        max_sequences=rows, max_length=max_length, dtype=dtype, inflight="keep", num_threads=threads, device="cpu"
    )


def read_arguments(description: str | None, *, out: str) -> argparse.Namespace:
    """What the benchmarks of engines are told; `out` names the file of figures."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--episodes", type=int, default=64)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--work", type=Path, default=Path("runs/benchmark-engine"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / out)
    return parser.parse_args()


def main() -> None:
    args = read_arguments(__doc__, out="engine.json")
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    prepared = prepare(args.work, model=args.model, num_episodes=args.episodes)
    where = {**machine(), "threads": args.threads}
    tokenizer = load_tokenizer(prepared.model)
    codec = Codec(tokenizer)
    own = asyncio.run(_run_own(prepared, codec=codec, num_threads=args.threads))
    print("torch engine", own.summary(), flush=True)
    dtype, tried = fastest_peer_dtype(prepared, codec=codec, tokenizer=tokenizer)
    model = load_model(prepared.model, dtype=dtype)
    peer_engine = TransformersEngine(model, tokenizer=tokenizer, codec=codec)
    peer = asyncio.run(run_episodes(peer_engine, prepared=prepared, codec=codec, dtype=dtype))
    print("transformers generate", peer.summary(), flush=True)
    equal = sum(a.text == b.text for a, b in zip(own.scores, peer.scores, strict=True))
    result = {
        "benchmark": "greedy episodes with searches, torch engine against transformers generate",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": {**where, "load_at_end": round(os.getloadavg()[0], 2)},
        "episodes": len(prepared.questions),
        "equal_episodes": equal,
        "torch_engine": own.summary(),
        "transformers_generate": {**peer.summary(), "seconds_of_16_rows_by_dtype": tried},
        "speedup_tokens_per_s": _ratio(
            own.stats.sampled_tokens / own.seconds, peer.stats.sampled_tokens / peer.seconds
        ),
        "speedup_tokens_per_cpu_s": _ratio(
            own.stats.sampled_tokens / own.cpu_seconds, peer.stats.sampled_tokens / peer.cpu_seconds
        ),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def _ratio(own: float, peer: float) -> float:
    return round(own / peer, 2)


async def _run_own(prepared: Prepared, *, codec: Codec, num_threads: int) -> Run:
    dtype = fastest_dtype()
    engine = TorchEngine(
        load_model(prepared.model, dtype="float32"),
        settings=settings_of(
            dtype,
            rows=len(prepared.questions),
            max_length=SETTINGS.max_trajectory_tokens,
            threads=num_threads,
        ),
        codec=codec,
        version=VERSION,
    )
    return await run_episodes(engine, prepared=prepared, codec=codec, dtype=dtype)


if __name__ == "__main__":
    main()
