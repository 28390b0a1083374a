"""Building a dense index: passages are encoded into a file that survives a kill, which then becomes a FAISS index."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, Protocol

import faiss
import numpy as np

from rexrag.data.corpus import Corpus
from rexrag.data.formats import format_of
from rexrag.errors import ConfigError, DataError
from rexrag.retrieval.dense import LISTS_NAME, VECTORS_NAME, open_vectors
from rexrag.retrieval.encoder import Device, Encoder, Vectors
from rexrag.retrieval.encoder_settings import EncoderOverrides
from rexrag.retrieval.faiss_files import Precision, empty_flat, write_flat
from rexrag.retrieval.ivf import choose_effort, write_ivf
from rexrag.retrieval.manifest import (
    CorpusEntry,
    DenseEntry,
    EncoderEntry,
    ForeignFile,
    Manifest,
    describe_corpus,
    describe_files,
    new_index_folder,
    write_manifest,
)
from rexrag.retrieval.recall import ExactResults, encode_sample
from rexrag.retrieval.search import Searcher
from rexrag.retrieval.stored_passages import OFFSETS_NAME, PASSAGES_NAME, store_passages, write_offsets
from rexrag.retrieval.vectors import VectorOrigin, VectorSource, VectorStore, encode_corpus

DenseKind = Literal["flat", "ivf"]
MIN_MEMORY_GB: Final = 0.25
DEFAULT_MEMORY_GB: Final = 4.0


class Progress(Protocol):
    """Who is told how far a build is."""

    def stage(self, name: str, *, total: float | None = None) -> None:
        """A stage begins."""

    def advance_to(self, done: float) -> None:
        """How much of the stage's total is behind."""


class _Silent:
    def stage(self, name: str, *, total: float | None = None) -> None:
        pass

    def advance_to(self, done: float) -> None:
        pass


SILENT: Final[Progress] = _Silent()


@dataclass(frozen=True, kw_only=True)
class DenseSettings:
    """What index is built.

    Attributes:
        precision: of its vectors.
        questions: that recall is measured with; without any, words of the passages are asked for.
        memory_gb: bound of what it takes beside the encoder and the libraries.
        use_gpu: encode, and train lists, on a GPU.
    """

    kind: DenseKind = "flat"
    precision: Precision = "fp16"
    questions: tuple[str, ...] = ()
    memory_gb: float = DEFAULT_MEMORY_GB
    use_gpu: bool = False

    def __post_init__(self) -> None:
        if not self.memory_gb >= MIN_MEMORY_GB:
            raise ConfigError(f"--memory {self.memory_gb:g}: must be at least {MIN_MEMORY_GB} GB")
        if self.kind == "ivf" and self.precision != "int8":
            raise ConfigError(f"--precision {self.precision}: an ivf index has int8; take --kind flat for it")
        if self.use_gpu and not faiss.get_num_gpus():
            raise ConfigError("--gpu: FAISS sees no GPU; leave it out, or install 'rexrag[gpu]' where there is one")

    @property
    def device(self) -> Device:
        return "cuda" if self.use_gpu else "cpu"

    def block_rows(self, dimension: int) -> int:
        """Vectors that are worked on at a time: a sixteenth of the memory, as float32."""
        return max(256, self.memory_bytes // 16 // (4 * dimension))

    @property
    def memory_bytes(self) -> int:
        return int(self.memory_gb * 2**30)


def build_dense(
    corpus: str | Path,
    out: str | Path,
    *,
    encoder: str | Path,
    settings: DenseSettings | None = None,
    overrides: EncoderOverrides | None = None,
    progress: Progress = SILENT,
) -> Manifest:
    """Encode a corpus and index it; an index at `out` is replaced once the new one is complete.

    Vectors are kept beside `out` until then: the same call after a kill goes on where it was.

    Raises:
        DataError: no such file, a bad row, an id that occurs twice, or a corpus that changed meanwhile.
        ModelError: no usable encoder.
        RetrievalIndexError: `out` exists and is no index, or another build is at work there.
    """
    source, target, settings = Path(corpus), Path(out), settings or DenseSettings()
    if not source.exists():
        raise DataError(f"{source}: no such file; give a corpus, jsonl or parquet")
    with new_index_folder(target, made_from=[source]) as folder:
        loaded = Encoder.load(encoder, overrides=overrides, device=settings.device)
        passages, described, num_empty = take_passages(source, folder, out=target, progress=progress)
        with passages:
            origin = _origin(described, loaded, settings.precision)
            with closing(VectorStore(_store_folder(target), origin)) as store:
                progress.stage("encoding", total=len(passages))
                encode_corpus(passages, loaded, store, progress=progress.advance_to)
                dense = write_index(
                    folder, store, corpus=passages, encoder=loaded, settings=settings, progress=progress
                )
            manifest = Manifest(
                kind=settings.kind,
                dense=dense,
                passages=len(passages),
                empty_rows=num_empty,
                corpus=described,
                files=describe_files(folder),
            )
        if source.stat().st_size != described.bytes:
            raise DataError(f"{source}: changed while it was indexed; build again once it is complete")
        write_manifest(folder, manifest)
    shutil.rmtree(_store_folder(target), ignore_errors=True)
    return manifest


def take_passages(source: Path, folder: Path, *, out: Path, progress: Progress) -> tuple[Corpus, CorpusEntry, int]:
    """The passages of a corpus by row, for an index in `folder`; how it is described; its rows without text."""
    progress.stage("reading the corpus", total=source.stat().st_size)
    stored = format_of(source) != "jsonl"
    described = describe_corpus(source, out=out, stored=stored)
    jsonl, num_empty = store_passages(source, folder / PASSAGES_NAME) if stored else (source, 0)
    _, num_empty_lines = write_offsets(jsonl, folder / OFFSETS_NAME, progress=progress.advance_to)
    return Corpus.open(jsonl, offsets=folder / OFFSETS_NAME), described, num_empty + num_empty_lines


def write_index(
    folder: Path, source: VectorSource, *, corpus: Corpus, encoder: Encoder, settings: DenseSettings, progress: Progress
) -> DenseEntry:
    """Write `vectors.faiss`, with lists also `lists.faiss`, and measure recall."""
    rows = settings.block_rows(source.dimension)
    progress.stage("writing vectors", total=source.count)
    limits = _limits(source, rows) if settings.precision == "int8" else None
    empty = empty_flat(source.dimension, settings.precision, limits=limits)
    write_flat(folder / VECTORS_NAME, empty, told(source.blocks(rows), progress.advance_to), count=source.count)
    if settings.kind == "ivf":
        progress.stage("filling lists", total=source.count)
        write_ivf(
            folder / LISTS_NAME,
            source,
            memory_bytes=settings.memory_bytes,
            use_gpu=settings.use_gpu,
            progress=progress.advance_to,
        )
    progress.stage("measuring recall")
    exact = ExactResults(source, encode_sample(corpus, encoder, questions=settings.questions), block_rows=rows)
    searcher = Searcher(open_vectors(folder))
    return describe_dense(searcher, exact, encoder=encoder, precision=settings.precision)


def describe_dense(
    searcher: Searcher,
    exact: ExactResults | None,
    *,
    encoder: Encoder,
    precision: Precision | None,
    file: ForeignFile | None = None,
) -> DenseEntry:
    """An index with its measured recall; of one with lists it is chosen first how many are looked through."""
    effort, part = None, slice(None)
    if searcher.num_lists is not None and exact is not None:
        effort = choose_effort(searcher, exact)
        part = exact.second_half  # the first half chose
    return DenseEntry(
        encoder=describe_encoder(encoder),
        metric="l2" if searcher.is_l2 else "inner_product",
        precision=precision,
        lists=searcher.num_lists,
        probes=effort and effort.probes,
        candidates=effort and effort.candidates,
        recall=exact and exact.measure(searcher, part=part),
        file=file,
    )


def told(blocks: Iterator[Vectors], progress: Callable[[int], None]) -> Iterator[Vectors]:
    """The blocks themselves; tells how many vectors went by."""
    done = 0
    for block in blocks:
        yield block
        done += len(block)
        progress(done)


def _limits(source: VectorSource, rows: int) -> Vectors:
    """The least and the largest value of each dimension, float32[2, D]."""
    low = np.full(source.dimension, np.inf, dtype=np.float32)
    high = -low
    for block in source.blocks(rows):
        low, high = np.minimum(low, block.min(0)), np.maximum(high, block.max(0))
    return np.stack([low, high])


def describe_encoder(encoder: Encoder) -> EncoderEntry:
    return EncoderEntry(
        path=str(encoder.folder.resolve()),
        sha256=encoder.sha256,
        dimension=encoder.dimension,
        settings=encoder.settings,
    )


def _origin(corpus: CorpusEntry, encoder: Encoder, precision: Precision) -> VectorOrigin:
    return VectorOrigin(
        corpus_sha256=corpus.sha256,
        encoder_sha256=encoder.sha256,
        settings=encoder.settings,
        dimension=encoder.dimension,
        dtype="float32" if precision == "fp32" else "float16",
    )


def _store_folder(target: Path) -> Path:
    resolved = target.resolve()
    return resolved.parent / f".{resolved.name}.vectors"
