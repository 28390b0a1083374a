"""The `rexrag index` commands: what a user types becomes settings of an index, and its progress and figures words."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from rexrag.errors import ConfigError, counted
from rexrag.retrieval.packages import require_faiss

if TYPE_CHECKING:
    from rexrag.retrieval.dense_build import DenseSettings
    from rexrag.retrieval.encoder_settings import EncoderOverrides
    from rexrag.retrieval.manifest import Manifest

index_app = typer.Typer(no_args_is_help=True, help="Build and verify retrieval indexes.")

LEAST_RECALL = 0.95
"""Of the three best passages; a smaller share is warned of."""
STDOUT = Console(highlight=False, emoji=False, soft_wrap=True, markup=False)


class IndexKind(StrEnum):
    """Indexes that can be built."""

    BM25 = "bm25"
    FLAT = "flat"
    IVF = "ivf"


class IndexAnalyser(StrEnum):
    """How BM25 tells words apart."""

    ENGLISH = "english-1"
    CJK_AND_ENGLISH = "cjk-english-1"


class IndexPrecision(StrEnum):
    """Numbers that the vectors of an index are kept as."""

    FP32 = "fp32"
    FP16 = "fp16"
    INT8 = "int8"


class IndexTarget(StrEnum):
    """What a FAISS file may be converted to."""

    FLAT_FP32 = "flat-fp32"
    FLAT_FP16 = "flat-fp16"
    FLAT_INT8 = "flat-int8"
    IVF = "ivf"


class IndexPooling(StrEnum):
    """Which vectors of an encoder's last layer stand for a text."""

    MEAN = "mean"
    CLS = "cls"
    LAST = "last"


CorpusOption = Annotated[Path, typer.Option("--corpus", metavar="F", help="Corpus (jsonl or parquet).")]
OutOption = Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for the index.")]
MemoryOption = Annotated[
    float | None, typer.Option("--memory", metavar="GB", help="Memory beside that of the encoder; 4 by default.")
]
QuestionsOption = Annotated[
    list[Path] | None,
    typer.Option("--questions", metavar="F", help="Questions to measure recall with; may be repeated."),
]
GpuOption = Annotated[bool, typer.Option("--gpu", help="Encode, and train lists, on a GPU.")]
PoolingOption = Annotated[IndexPooling | None, typer.Option(help="Pooling of the encoder, in place of what is found.")]
NormalizeOption = Annotated[
    bool | None, typer.Option("--normalize/--no-normalize", help="Bring vectors to length 1, or leave them.")
]
QueryPrefixOption = Annotated[str | None, typer.Option(metavar="TEXT", help="Put before each query.")]
PassagePrefixOption = Annotated[str | None, typer.Option(metavar="TEXT", help="Put before each passage.")]
MaxTokensOption = Annotated[int | None, typer.Option(metavar="N", help="Tokens at which a text is cut.")]


@index_app.command("build")
def build_index(
    corpus: CorpusOption,
    out: OutOption,
    kind: Annotated[IndexKind, typer.Option(help="Kind of index.")] = IndexKind.BM25,
    encoder: Annotated[
        str | None, typer.Option(metavar="PATH", help="Encoder of flat and ivf: folder or hub id.")
    ] = None,
    precision: Annotated[
        IndexPrecision | None, typer.Option(help="Of the vectors: fp16 for flat, int8 for ivf by default.")
    ] = None,
    questions: QuestionsOption = None,
    memory: MemoryOption = None,
    gpu: GpuOption = False,
    pooling: PoolingOption = None,
    normalize: NormalizeOption = None,
    query_prefix: QueryPrefixOption = None,
    passage_prefix: PassagePrefixOption = None,
    max_tokens: MaxTokensOption = None,
    analyser: Annotated[
        IndexAnalyser | None, typer.Option(help="Words of bm25; without it chosen by the corpus's scripts.")
    ] = None,
) -> None:
    """Build an index over a corpus."""
    started = time.monotonic()
    own: dict[str, object] = {"--pooling": pooling, "--normalize": normalize, "--query-prefix": query_prefix}
    own |= {"--passage-prefix": passage_prefix, "--max-tokens": max_tokens}
    if kind is IndexKind.BM25:
        from rexrag.retrieval.bm25 import build_bm25

        own |= {"--encoder": encoder, "--precision": precision, "--questions": questions}
        said = {**own, "--memory": memory, "--gpu": gpu or None}
        if unused := [name for name, value in said.items() if value is not None]:
            raise ConfigError(f"{', '.join(unused)}: of dense indexes only; add --kind flat or --kind ivf")
        named = None if analyser is None else analyser.value
        _tell(out, build_bm25(corpus, out, analyser=named), started=started)
        return
    if analyser is not None:
        raise ConfigError("--analyser: of bm25 only; leave it out, or take --kind bm25")
    if encoder is None:
        raise ConfigError(f"--kind {kind.value} needs --encoder, the folder of a sentence encoder")
    _prepare_process()
    from rexrag.reporting.terminal import Progress
    from rexrag.retrieval.dense_build import build_dense

    default = IndexPrecision.FP16 if kind is IndexKind.FLAT else IndexPrecision.INT8
    settings = _settings(kind, precision=precision or default, questions=questions, memory=memory, gpu=gpu)
    with Progress() as progress:
        overrides = _overrides(own)
        manifest = build_dense(corpus, out, encoder=encoder, settings=settings, overrides=overrides, progress=progress)
    _tell(out, manifest, started=started)


def _prepare_process() -> None:
    """Before FAISS and torch are loaded: their threads wait without a core, which other processes may need."""
    require_faiss()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _settings(
    kind: IndexKind | IndexTarget,
    *,
    precision: IndexPrecision | None = None,
    questions: list[Path] | None,
    memory: float | None,
    gpu: bool,
) -> DenseSettings:
    """What flags say of an index."""
    from rexrag.retrieval.dense_build import DEFAULT_MEMORY_GB, DenseSettings

    name, _, of_name = kind.value.partition("-")
    chosen = precision or IndexPrecision(of_name or IndexPrecision.INT8)
    return DenseSettings(
        kind="flat" if name == "flat" else "ivf",
        precision=chosen.value,
        questions=_texts(questions),
        memory_gb=DEFAULT_MEMORY_GB if memory is None else memory,
        use_gpu=gpu,
    )


def _texts(questions: list[Path] | None) -> tuple[str, ...]:
    from rexrag.data.questions import load_questions

    if not questions:
        return ()
    return tuple(row.question for row in load_questions(list(questions), skip_by="correct them").questions)


def _overrides(own: Mapping[str, object]) -> EncoderOverrides:
    """What flags say of an encoder."""
    from rexrag.retrieval.encoder_settings import EncoderOverrides

    return EncoderOverrides(**{name.removeprefix("--").replace("-", "_"): value for name, value in own.items()})  # type: ignore[arg-type]  # as their options have them


def _tell(out: Path, manifest: Manifest, *, started: float) -> None:
    """The index in a line, and for a dense one its encoder and its recall."""
    dense = manifest.dense
    how = manifest.analyser if dense is None else dense.precision or "as it was made"
    left_out = f", rows without text left out: {manifest.empty_rows}" if manifest.empty_rows else ""
    seconds = time.monotonic() - started
    STDOUT.print(f"{out}: {manifest.kind}, {counted(manifest.passages, 'passage')}, {how}{left_out}, {seconds:.1f} s")
    if dense is None:
        return
    settings = dense.encoder.settings
    prefixes = f"{settings.query_prefix!r} before each query, {settings.passage_prefix!r} before each passage"
    length = "length 1" if settings.normalize else "their own length"
    tokens = counted(settings.max_tokens, "token")
    STDOUT.print(f"encoder: {settings.pooling} of at most {tokens}, {length}, {prefixes}")
    if dense.lists is not None and dense.probes is not None:
        compared = f", and compares {counted(dense.candidates, 'candidate')}" if dense.candidates else ""
        STDOUT.print(f"{counted(dense.lists, 'list')}, of which a search looks through {dense.probes}{compared}")
    if dense.recall is None:
        STDOUT.print("recall: not measured, since the file does not give its vectors back")
        return
    STDOUT.print(
        f"recall against brute force, {counted(dense.recall.queries, 'query', 'queries')}: "
        f"{dense.recall.at_3:.3f} of the best 3, {dense.recall.at_10:.3f} of the best 10"
    )
    if (advice := recall_advice(manifest)) is not None:
        Console(stderr=True, highlight=False, emoji=False, soft_wrap=True).print(f"warning: {advice}", markup=False)


def recall_advice(manifest: Manifest) -> str | None:
    """What to change where a search misses more than a twentieth of the three best passages."""
    dense = manifest.dense
    if dense is None or dense.recall is None or dense.recall.at_3 >= LEAST_RECALL:
        return None
    if manifest.kind == "adopted":
        remedy = "convert it with --to flat-fp16, or search more of it where it was made (nprobe, efSearch)"
    elif manifest.kind == "ivf":
        remedy = "give more --memory, so that its lists are trained with more vectors, or take flat"
    else:
        remedy = f"keep the vectors as --precision {'fp16' if dense.precision == 'int8' else 'fp32'}"
    return f"recall of the best 3 is {dense.recall.at_3:.3f}, below {LEAST_RECALL}; {remedy}"


@index_app.command("adopt")
def adopt_index(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="FAISS index made elsewhere.")],
    corpus: CorpusOption,
    out: OutOption,
    encoder: Annotated[str, typer.Option(metavar="PATH", help="Encoder that it was made with: folder or hub id.")],
    to: Annotated[
        IndexTarget | None, typer.Option(help="Convert it. Without: use the file where it is, without a copy.")
    ] = None,
    questions: QuestionsOption = None,
    memory: MemoryOption = None,
    gpu: GpuOption = False,
    pooling: PoolingOption = None,
    normalize: NormalizeOption = None,
    query_prefix: QueryPrefixOption = None,
    passage_prefix: PassagePrefixOption = None,
    max_tokens: MaxTokensOption = None,
) -> None:
    """Make an index of a FAISS file, once it is known to be of this corpus and this encoder."""
    _prepare_process()
    from rexrag.reporting.terminal import Progress
    from rexrag.retrieval.adopt import adopt

    started = time.monotonic()
    own: dict[str, object] = {"--pooling": pooling, "--normalize": normalize, "--query-prefix": query_prefix}
    own |= {"--passage-prefix": passage_prefix, "--max-tokens": max_tokens}
    settings = _settings(to or IndexTarget.FLAT_FP16, questions=questions, memory=memory, gpu=gpu)
    with Progress() as progress:
        manifest = adopt(
            file,
            out,
            corpus=corpus,
            encoder=encoder,
            convert=to is not None,
            settings=settings,
            overrides=_overrides(own),
            progress=progress,
        )
    _tell(out, manifest, started=started)


@index_app.command("check")
def check_index(folder: Annotated[Path, typer.Argument(metavar="DIR", help="Index folder.")]) -> None:
    """Verify the hashes of an index and of its corpus."""
    from rexrag.retrieval.manifest import check_index as verify

    manifest = verify(folder)
    STDOUT.print(f"{folder}: {manifest.kind}, {counted(manifest.passages, 'passage')}, as it was built")
