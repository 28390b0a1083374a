"""A run over several Ray nodes that is hurt again and again, nodes included.

    python benchmarks/node_chaos.py --steps 150 --out benchmarks/results/node_chaos.json
    python benchmarks/chaos_table.py                     # the sections of docs/results.md

As `chaos.py`, on a cluster of four nodes on this machine: a head that offers nothing, a node for the learner, two for
rollout actors. A node that is lost is replaced at once by another.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from chaos import KILLED, SERVER_FAULTS, Chaos, SearchServer, make_parts, text_of
from machine import commit
from ray.cluster_utils import Cluster

NODE_FAULTS: Final = ("rollout node", "node of learner and buffer", "rollout node told to go")
FAULTS: Final = (*KILLED, "driver", *NODE_FAULTS, *SERVER_FAULTS)
SETTINGS: Final = (
    "learner.resources={learner=1}",
    "rollout.resources={rollout=1}",
    "learner.threads=1",
    "rollout.threads_per_actor=1",
)


class NodeChaos(Chaos):
    """Adds the loss of nodes to the faults."""

    ending = Chaos.ending | {"node of learner and buffer"}

    def __init__(self, folder: Path, *, steps: int, faults: Sequence[str], seed: int, timeout_s: float) -> None:
        super().__init__(folder, steps=steps, faults=faults, seed=seed, timeout_s=timeout_s)
        self._cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
        self._learner_node = self._new_node("learner")
        self._rollout_nodes = [self._new_node("rollout") for _ in range(2)]

    def shut_down(self) -> None:
        """End all nodes."""
        self._cluster.shutdown()  # type: ignore[no-untyped-call]

    def _new_node(self, resource: str) -> Any:  # noqa: ANN401
        return self._cluster.add_node(num_cpus=1, resources={resource: 1})

    def _environment(self) -> dict[str, str]:
        return {**os.environ, "RAY_ADDRESS": self._cluster.address}

    def _words(self) -> list[str]:
        return [word for setting in SETTINGS for word in ("--set", setting)]

    def _root_pid(self, process: subprocess.Popen[bytes]) -> int:
        return os.getpid()  # whose children the nodes are, and theirs the parts

    def _play_fault(self, fault: str, process: subprocess.Popen[bytes], server: SearchServer) -> bool:
        if fault == "rollout node":
            self._cluster.remove_node(self._rollout_nodes.pop(0), allow_graceful=False)
            self._rollout_nodes.append(self._new_node("rollout"))
        elif fault == "rollout node told to go":
            self._drain(self._rollout_nodes.pop(0))
            self._rollout_nodes.append(self._new_node("rollout"))
        elif fault == "node of learner and buffer":
            self._cluster.remove_node(self._learner_node, allow_graceful=False)
            self._learner_node = self._new_node("learner")
        else:
            return super()._play_fault(fault, process, server)
        return True

    def _drain(self, node: Any) -> None:  # noqa: ANN401
        ray = str(Path(sys.executable).parent / "ray")
        why = ("--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "preempted")
        where = ("--address", self._cluster.address, "--node-id", node.node_id)
        subprocess.run([ray, "drain-node", *where, *why, "--deadline-remaining-seconds=600"], check=True, timeout=120)


def play(folder: Path, *, steps: int, faults: Sequence[str], seed: int = 0, timeout_s: float = 3600.0) -> str:
    """Make the parts, play, and report as JSON."""
    began_at = commit()
    folder.mkdir(parents=True, exist_ok=True)
    make_parts(folder)
    chaos = NodeChaos(folder, steps=steps, faults=faults, seed=seed, timeout_s=timeout_s)
    try:
        return text_of(chaos.play(), began_at=began_at)
    finally:
        chaos.shut_down()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--rounds", type=int, default=1, help="how often each fault happens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("runs/node-chaos"), help="folder of the run; must be new")
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the report")
    asked = parser.parse_args()
    text = play(asked.work.resolve(), steps=asked.steps, faults=FAULTS * asked.rounds, seed=asked.seed)
    print(text)
    asked.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
