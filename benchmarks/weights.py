"""The way of a version from the learner into the engines: latency, pause, proof, bytes alive; over sizes of a model.

    python benchmarks/weights.py [--actors 2] [--versions 5] [--engine torch|vllm] [--only NAME ...] [--out FILE]

A real learner and rollout actors on one machine's Ray, weights in float32, nothing generated meanwhile. *Latency* is
from the order to export until all actors have switched and proved it; *switch* the pause of an engine between two
passes; *proof* what comes after it, beside generation; *copied* the time in which this machine copies as many bytes
once, in this process: what the switch cannot be below.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import ray
from machine import origin
from ray._private import internal_api

from rexrag.config import Config
from rexrag.learner.learner_actor import LearnerActor, LearnerSpec, start_export, start_learner
from rexrag.model.weight_proof import canary_of
from rexrag.preparation.tiny_model import make_tiny_model
from rexrag.processes import Share
from rexrag.recipe import flatten, make_config
from rexrag.retrieval.bm25 import build_bm25
from rexrag.run.fleet import Fleet
from rexrag.run.part_settings import learner_settings, rollout_settings
from rexrag.run.remote import call, result_of
from rexrag.types import WeightVersion

MODELS: Final = {
    "0.5 MB": {"width": 64, "num_layers": 2, "feed_forward": 128},
    "14 MB": {"width": 256, "num_layers": 4, "feed_forward": 768},
    "0.5 GB": {"width": 1024, "num_layers": 12, "feed_forward": 2560},
    "1.5 GB": {"width": 1536, "num_layers": 16, "feed_forward": 3840},
}
"""Shapes by their size in float32."""
TEXTS: Final = ("Who is it? It is a.",)
CANARY: Final = canary_of([[i % 6 for i in range(256)]] * 4)
WAIT_S: Final = 600.0


class Nobody:
    """In place of a buffer: no actor leases anything."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--versions", type=int, default=5, help="of which the first is not counted")
    parser.add_argument("--engine", choices=("torch", "vllm"), default="torch")
    parser.add_argument("--only", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--out", type=Path)
    words = parser.parse_args()
    head = origin()
    ray.init(address="local", include_dashboard=False, log_to_driver=False, configure_logging=False)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in words.only:
            rows.append(measure(name, Path(folder) / name.replace(" ", "-"), words=words))
            print(json.dumps(rows[-1]), flush=True)
    if words.out:
        words.out.write_text(json.dumps({**head, "rows": rows}, indent=1) + "\n")


def measure(name: str, folder: Path, *, words: argparse.Namespace) -> dict[str, object]:
    """A few versions of one model, one after the other."""
    folder.mkdir()
    (folder / "corpus.jsonl").write_text('{"id": "1", "contents": "Who\\nIt is a."}\n')
    build_bm25(folder / "corpus.jsonl", folder / "index")
    model = make_tiny_model(TEXTS, folder / "model", seed=0, num_heads=8, num_kv_heads=8, **MODELS[name])
    values: dict[str, Any] = {"retriever.path": folder / "index", "model.path": str(model), "rollout.dtype": "float32"}
    values |= {"env.max_trajectory_tokens": 400, "rollout.engine": words.engine, "rollout.episodes_per_actor": 4}
    values |= {"env.max_turn_tokens": 64, "env.max_observation_tokens": 64, "learner.autocast": "float32"}
    config = make_config({**flatten(Config()), **values}, sources={})
    learner = start_learner(
        LearnerSpec(
            model=model,
            settings=learner_settings(config),
            hints=[[1, 2]],
            kept=[0],
            threads=1,
            device="cpu",
            seed=0,
            evidence_folder=folder,
            canary=CANARY,
        ),
        share=Share(threads=1),
    )
    loaded = result_of(call(learner, LearnerActor.ready), what="the benchmark waits for the learner")
    version = WeightVersion(incarnation="benchmark", step=0)
    nobody: Any = ray.remote(Nobody)
    fleet = Fleet(
        rollout_settings(config, model_path=str(model), num_threads=1),
        num_actors=words.actors,
        num_groups=1,
        share=Share(threads=1),
        version=version,
        buffer=nobody.remote(),
        on_death=lambda actor_id: None,
    )
    until(lambda: fleet.is_ready, fleet)
    latencies: list[float] = []
    switches: list[float] = []
    proofs: list[float] = []
    alive: list[float] = []
    for step in range(1, words.versions + 2):
        # Looking at the store takes time: at the last version only, which is not timed.
        look = (lambda: alive.append(bytes_alive())) if step > words.versions else (lambda: None)
        began = time.monotonic()
        published = start_export(learner, "float32", num_buckets=loaded.num_buckets)
        fleet.publish(WeightVersion(incarnation="benchmark", step=step), published)
        until(lambda: fleet.is_current, fleet, look=look)
        report = fleet.report()
        assert report.switch_s is not None, "a version was proved"
        assert report.proof_s is not None, "a version was proved"
        latencies.append(time.monotonic() - began)
        switches.append(report.switch_s)
        proofs.append(report.proof_s)
    fleet.stop(timeout_s=5.0)
    ray.kill(learner)
    num_bytes = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    return {
        "model": name,
        "engine": words.engine,
        "actors": words.actors,
        "bytes": num_bytes,
        "buckets": loaded.num_buckets,
        "latency_s": round(statistics.median(latencies[1:-1]), 4),
        "switch_s": round(statistics.median(switches[1:-1]), 4),
        "proof_s": round(statistics.median(proofs[1:-1]), 4),
        "copied_s": round(copy_s(num_bytes), 4),
        "versions_alive": round(max(alive) / num_bytes, 2),
    }


def until(is_done: Callable[[], bool], fleet: Fleet, *, look: Callable[[], object] = lambda: None) -> None:
    end = time.monotonic() + WAIT_S
    while not is_done():
        fleet.check()
        look()
        time.sleep(0.002)
        assert time.monotonic() < end, "the actors do not answer"


def bytes_alive() -> float:
    """Bytes of objects in this node's object store."""
    address = ray.get_runtime_context().gcs_address
    told: str = internal_api.memory_summary(address, stats_only=True)  # type: ignore[no-untyped-call]
    found = re.search(r"Plasma memory usage (\d+) MiB", told)
    assert found, "Ray tells what its object store holds"
    return float(found[1]) * 2**20


def copy_s(num_bytes: int) -> float:
    source = np.ones(num_bytes // 4, np.float32)
    target = np.empty_like(source)
    np.copyto(target, source)  # maps the pages
    began = time.perf_counter()
    np.copyto(target, source)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
