"""Print tables of the pages, from the figures in `results/`.

docs/asynchrony.md: of `buffer.py`, `simulate.py`, `asynchrony.py`; docs/retrieval.md: of `indexes.py`,
`retrieval.py`, `retrieval_client.py`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

RESULTS: Final = Path(__file__).resolve().parent / "results"
SHOWN_ACTORS: Final = (32, 64, 128)


def tables() -> list[str]:
    """Of simulated runs, of real ones, of the buffer, in the order of the page."""
    simulated, real, buffer = (
        json.loads((RESULTS / f"{name}.json").read_text()) for name in ("simulate", "asynchrony", "buffer")
    )
    return [simulation(simulated["results"]), runs(real["results"]), of_buffer(buffer)]


def retrieval_tables() -> list[str]:
    """Of the kinds of index, of the servers, of their client, in the order of the page."""
    indexes, servers, client = (
        json.loads((RESULTS / f"{name}.json").read_text()) for name in ("indexes", "retrieval", "retrieval_client")
    )
    return [of_indexes(indexes["rows"]), of_servers(servers["corpora"]), of_client(client["loads"])]


def of_client(loads: Sequence[dict[str, Any]]) -> str:
    """Searches at a server that runs already."""
    rows = [[str(load["batch_size"]), *(f"{load[key]:,.0f}" for key in ("qps", "p50_ms", "p99_ms"))] for load in loads]
    return _table(["`retriever.batch_size`", "queries a second", "p50, ms", "p99, ms"], rows)


def simulation(results: Sequence[dict[str, Any]]) -> str:
    """How busy the learner is."""
    spreads = sorted({result["spread"] for result in results})
    heads = [f"{num} actors, spread {spread}" for spread in spreads for num in SHOWN_ACTORS]
    rows = []
    for staleness in sorted({result["max_staleness"] for result in results}):
        busy = [
            1 - result["idle"]
            for spread in spreads
            for num in SHOWN_ACTORS
            for result in results
            if (result["spread"], result["actors"], result["max_staleness"]) == (spread, num, staleness)
        ]
        rows.append([f"S = {staleness}", *(f"{share:.2f}" for share in busy)])
    return _table(["learner at work", *heads], rows)


def runs(results: Sequence[dict[str, Any]]) -> str:
    """Real runs on one machine."""
    heads = ["load", "S", "seconds a step", "learning", "their groups", "learner idle", "of the bound", "age", "EM"]
    rows = [
        [
            result["load"],
            str(result["max_staleness"]),
            f"{result['step_s']:.2f}",
            f"{result['train_s']:.2f}",
            f"{result['generate_s']:.2f}",
            f"{result['idle']:.2f}",
            "–" if result["max_staleness"] == 0 else f"{result['of_bound']:.2f}",
            f"{result['staleness']:.1f}",
            f"{result['em'][0]:.2f} → {result['em'][1]:.2f}",
        ]
        for result in results
    ]
    return _table(heads, rows)


def of_buffer(report: dict[str, Any]) -> str:
    """What the buffer holds, beside the ceilings of the same run."""
    ingest, take, control, long = (report[name] for name in ("ingest", "take", "control", "long"))
    rows = [
        [
            "durable tokens a second",
            f"{ingest['buffer_tokens_per_s']:,}",
            f"{ingest['nothing_tokens_per_s']:,} by an actor that keeps nothing; "
            f"{ingest['disk_tokens_per_s']:,} by the disk alone",
        ],
        [
            f"a step's {take['tokens']:,} tokens to the learner, ms",
            f"{take['p50_ms']} (99%: {take['p99_ms']})",
            "",
        ],
        [
            f"calls a second, {control['waiting_actors']} actors waiting",
            f"{control['buffer_messages_per_s']:,}",
            f"{control['nothing_messages_per_s']:,} by an actor that does nothing",
        ],
        [
            f"memory over {long['steps'][-1]:,} steps, MiB",
            f"{min(long['memory_mib'])} to {max(long['memory_mib'])}",
            "",
        ],
        ["log on disk meanwhile, MiB", f"{min(long['disk_mib'])} to {max(long['disk_mib'])}", "segments of 64"],
    ]
    return _table(["", "measured", "ceiling"], rows)


def of_indexes(rows: Sequence[dict[str, Any]]) -> str:
    heads = ["index", "bytes a passage", "lists looked through", "queries a second: alone", "64 at once"]
    heads += ["of the exact best 3", "of the best 10"]
    return _table(
        heads,
        [
            [
                f"`{row['index']}`",
                f"{row['bytes_a_passage']:.0f}",
                f"{row['probes']} of {row['lists']}" if row.get("lists") else "–",
                f"{row['qps_1']:,.0f}",
                f"{row['qps_64']:,.0f}",
                f"{row['recall_3']:.3f}",
                f"{row['recall_10']:.3f}",
            ]
            for row in rows
        ],
    )


def of_servers(corpora: Sequence[dict[str, Any]]) -> str:
    heads = ["passages", "clients", "queries a second", "one per call", "p99, ms", "one per call"]
    heads += ["CPU of a query, ms", "one per call", "of encoding and searching alone"]
    rows = []
    for corpus in corpora:
        loads = {(load["server"], load["clients"]): load for load in corpus["loads"]}
        for clients in sorted({clients for _, clients in loads}):
            ours, peers = loads["rexrag", clients], loads["one per call", clients]
            rows.append(
                [
                    f"{corpus['passages']:,}",
                    str(clients),
                    f"{ours['qps']:.1f}",
                    f"{peers['qps']:.1f}",
                    f"{ours['p99_ms']:,.0f}",
                    f"{peers['p99_ms']:,.0f}",
                    f"{1000 * ours['cpu_s']:.1f}",
                    f"{1000 * peers['cpu_s']:.1f}",
                    f"{corpus['ratios'][f'share_of_encode_and_search_{clients}']:.2f}",
                ]
            )
    return _table(heads, rows)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    sys.stdout.write("\n\n".join(tables() + retrieval_tables()) + "\n")
