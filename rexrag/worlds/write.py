"""Writes a world as files: corpus, questions in three parts, demonstrations, and what they were made with."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Final, Literal

from rexrag.data.demonstrations import Demonstration, load_demonstrations, write_demonstrations
from rexrag.errors import ConfigError
from rexrag.files import lines_of, write_atomic
from rexrag.retrieval.bm25 import BM25Retriever, build_bm25
from rexrag.types import Passage
from rexrag.worlds import geo, synthetic
from rexrag.worlds.chains import Chain, FactBase, pick_chains
from rexrag.worlds.dead_end_demonstrations import MULTI_HOP_SHARES, DemonstrationWriter, plan_demonstrations
from rexrag.worlds.dials import Dial, resolve_dials
from rexrag.worlds.world import World, WorldFiles

WorldKind = Literal["geo", "synthetic"]
Json = Mapping[str, object]


@dataclass(frozen=True, kw_only=True)
class _Kind:
    dials: Mapping[str, Dial]
    build: Callable[..., World]


_KINDS: Final[dict[WorldKind, _Kind]] = {
    "geo": _Kind(dials=geo.DIALS, build=geo.build_geo),
    "synthetic": _Kind(dials=synthetic.DIALS, build=synthetic.build_synthetic),
}


def write_world(kind: WorldKind, out: Path, *, seed: int, size: Mapping[str, float] | None = None) -> WorldFiles:
    """Write a world to the folder `out`; the same kind, seed and size give the same files.

    Args:
        size: values of dials that differ from the defaults.

    Raises:
        ConfigError: an unknown kind or dial, a value out of bounds, or an `out` that holds something.
    """
    if kind not in _KINDS:
        raise ConfigError(f"there is no world {kind!r}; choose one of {', '.join(_KINDS)}")
    dials = resolve_dials(_KINDS[kind].dials, size or {}, kind=kind)
    _make_empty(out)
    world = _KINDS[kind].build(dials, seed=seed)
    rng = Random(f"files of {kind} {seed}")
    _write_rows(out / "corpus.jsonl", world.facts.passages(rng))
    for part in ("train", "dev", "test"):
        _write_rows(out / f"{part}.jsonl", _question_rows(world, part))
    demonstrations = asyncio.run(_demonstrations(world, out / "corpus.jsonl", dials=dials, rng=rng))
    write_demonstrations(out / "demonstrations.jsonl", demonstrations)
    counts = {part: len(getattr(world, part)) for part in ("train", "dev", "test")}
    counts |= {"corpus": len(world.facts.objects), "demonstrations": len(demonstrations)}
    info = {"kind": kind, "seed": seed, "dials": dials, "counts": counts, "attribution": list(world.attribution)}
    write_atomic(out / "world.json", json.dumps(info, indent=1) + "\n")
    return WorldFiles(
        folder=out,
        corpus=out / "corpus.jsonl",
        train=out / "train.jsonl",
        dev=out / "dev.jsonl",
        test=out / "test.jsonl",
        demonstrations=out / "demonstrations.jsonl",
        info=out / "world.json",
        dials=dials,
        counts=counts,
    )


def _make_empty(out: Path) -> None:
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ConfigError(f"--out {out} is not an empty folder; name another")
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {out}: cannot be made ({error}); name a folder that can be written") from error


def world_texts(folder: Path) -> Iterator[str]:
    """All texts of a world that was written to `folder`: what a word-level tokenizer for it has to know."""
    for path in (folder / f"{part}.jsonl" for part in ("corpus", "train", "dev", "test")):
        for line in lines_of(path.read_text(encoding="utf-8")):
            row = json.loads(line)
            yield row["contents"] if "contents" in row else row["question"]
    for demonstration in load_demonstrations(folder / "demonstrations.jsonl"):
        yield from (segment.text for segment in demonstration.segments)


def _write_rows(path: Path, rows: Iterable[Json]) -> None:
    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _question_rows(world: World, part: str) -> Iterator[Json]:
    chains: Sequence[Chain] = getattr(world, part)
    for number, chain in enumerate(chains):
        yield {
            "id": f"{part}-{number}",
            "question": world.facts.question(chain),
            "golden_answers": [chain.answer],
            "data_source": world.name,
            "hops": chain.hops,
            "gold_passage_ids": _gold_passages(world.facts, chain),
        }


def _gold_passages(facts: FactBase, chain: Chain) -> list[str]:
    steps = zip(chain.path[:-1], chain.relations, strict=True)
    return [facts.passage_id(subject, relation) for subject, relation in steps]


async def _demonstrations(
    world: World, corpus: Path, *, dials: Mapping[str, float], rng: Random
) -> list[Demonstration]:
    """Demonstrations over an index of the world's own corpus: the searches in them show what a rollout would see."""
    count = int(dials["demonstrations"])
    plan = plan_demonstrations(
        one_hop=pick_chains(world.shown, count=count, shares={1: 1.0}, rng=rng),
        multi_hop=pick_chains(world.shown, count=count, shares=MULTI_HOP_SHARES, rng=rng),
        count=count,
        rng=rng,
    )
    with tempfile.TemporaryDirectory() as folder:
        build_bm25(corpus, out=Path(folder) / "index")
        retriever = BM25Retriever(Path(folder) / "index")

        async def search(query: str) -> Sequence[Passage]:
            return await retriever.search(query, top_k=int(dials["top_k"]))

        writer = DemonstrationWriter(facts=world.facts, search=search, decision_weight=float(dials["decision_weight"]))
        try:
            return [await writer.write(chain, kind, rng=rng) for chain, kind in plan]
        finally:
            await retriever.close()
