"""What an index folder holds: `index.json`, its hashes, and the rules for making and opening such a folder.

An index is made in a folder beside the final one and renamed: a folder with an `index.json` is complete.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import shutil
import socket
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from rexrag.errors import RetrievalIndexError, counted
from rexrag.files import sha256_file, sync_folder, write_atomic
from rexrag.retrieval.encoder_settings import EncoderSettings

MANIFEST_NAME: Final = "index.json"
_LOCK: Final = "build.lock"
FORMAT: Final = "rexrag-index"
FORMAT_VERSION: Final = 1


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FileEntry(_Table):
    """Size and hash of one file."""

    bytes: int
    sha256: str


class CorpusEntry(_Table):
    """The corpus that was indexed.

    Attributes:
        path: absolute; `relative_path` from the index folder finds it when both were moved together.
        stored: the passages are kept inside the index folder, so that the corpus need not be there any more.
    """

    path: str
    relative_path: str
    bytes: int
    sha256: str
    stored: bool


class EncoderEntry(_Table):
    """The encoder whose vectors are in a dense index.

    Attributes:
        path: absolute; where the encoder was.
        sha256: of its weights and tokenizer: another encoder is refused.
        settings: queries are encoded by these, whatever its folder says by then.
    """

    path: str
    sha256: str
    dimension: int
    settings: EncoderSettings


class RecallEntry(_Table):
    """Share of the best passages that a search finds, as it was measured against brute force.

    Attributes:
        queries: size of the sample.
        at_3: of the three best ones; `at_10` of ten.
    """

    queries: int
    at_3: float
    at_10: float


class ForeignFile(_Table):
    """A FAISS file that stays where its owner has it."""

    path: str
    relative_path: str
    bytes: int
    sha256: str


class DenseEntry(_Table):
    """What a dense index is.

    Attributes:
        metric: inner product, or L2 distance (of an index made elsewhere).
        precision: of the stored vectors; None where the file was made elsewhere.
        probes: lists that a search of an `ivf` index looks through.
        candidates: vectors that it compares after the coarse codes of its lists.
        recall: None where the file does not give its vectors back.
        file: set where the index is one made elsewhere that was not copied.
    """

    encoder: EncoderEntry
    metric: Literal["inner_product", "l2"] = "inner_product"
    precision: Literal["fp32", "fp16", "int8"] | None
    lists: int | None = None
    probes: int | None = None
    candidates: int | None = None
    recall: RecallEntry | None
    file: ForeignFile | None = None


class Manifest(_Table):
    """The content of `index.json`. `files` are named relative to the index folder.

    `empty_rows` of the corpus have no text: they are no passages. `analyser` is that of `bm25`, `dense` of all others;
    `adopted` is a FAISS file made elsewhere, of whatever kind.
    """

    format: Literal["rexrag-index"] = FORMAT
    version: int = FORMAT_VERSION
    kind: Literal["bm25", "flat", "ivf", "adopted"]
    analyser: str | None = None
    dense: DenseEntry | None = None
    passages: int
    empty_rows: int = 0
    corpus: CorpusEntry
    files: dict[str, FileEntry]


def read_manifest(folder: Path) -> Manifest:
    """The manifest of an index folder.

    Raises:
        RetrievalIndexError: no index there, or one that this build cannot read.
    """
    path = folder / MANIFEST_NAME
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
    except OSError as error:
        message = f"{folder}: no index there ({error.strerror}: {MANIFEST_NAME}); make one with `rexrag index build`"
        raise RetrievalIndexError(message) from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "the file"
        message = f"{path}: not the manifest of an index this build reads ({place}: {first['msg']}); build it again"
        raise RetrievalIndexError(message) from error
    if (manifest.kind == "bm25") != (manifest.analyser is not None) or (manifest.kind == "bm25") == bool(
        manifest.dense
    ):
        message = f"{path}: kind {manifest.kind} does not fit the other entries; build the index again"
        raise RetrievalIndexError(message)
    if manifest.version != FORMAT_VERSION:
        message = (
            f"{path}: version {manifest.version}, this build reads version {FORMAT_VERSION}; build the index again"
        )
        raise RetrievalIndexError(message)
    return manifest


def check_sizes(folder: Path, manifest: Manifest) -> None:
    """The cheap check at every opening: all files are there and as long as they were.

    Raises:
        RetrievalIndexError: names what is missing or of another size.
    """
    wrong = [problem for name, entry in manifest.files.items() if (problem := _wrong_size(folder / name, entry))]
    if wrong:
        raise RetrievalIndexError(f"{folder}: damaged index: {'; '.join(wrong)}; build it again")


def check_index(folder: str | Path) -> Manifest:
    """Verify the hashes of an index and of its corpus; reads all of their bytes.

    A corpus whose passages are kept in the index may be gone, but not changed.

    Raises:
        RetrievalIndexError: no index there, or what differs, file by file.
    """
    root = Path(folder)
    manifest = read_manifest(root)
    wrong = [p for name, entry in manifest.files.items() if (p := _wrong_content(root / name, entry))]
    corpus = FileEntry(bytes=manifest.corpus.bytes, sha256=manifest.corpus.sha256)
    path = locate_corpus(root, manifest)
    if (path.exists() or not manifest.corpus.stored) and (problem := _wrong_content(path, corpus)):
        wrong.append(f"corpus {problem}")
    if manifest.dense is not None and (file := manifest.dense.file) is not None:
        place = _moved(root, path=file.path, relative_path=file.relative_path)
        if problem := _wrong_content(place, FileEntry(bytes=file.bytes, sha256=file.sha256)):
            wrong.append(f"vectors {problem}")
    if wrong:
        raise RetrievalIndexError(f"{root}: differs from what was built: {'; '.join(wrong)}; build it again")
    return manifest


def locate_corpus(folder: Path, manifest: Manifest) -> Path:
    """Where the corpus is: where it was, else where it would be had it moved together with the index."""
    return _moved(folder, path=manifest.corpus.path, relative_path=manifest.corpus.relative_path)


def _moved(folder: Path, *, path: str, relative_path: str) -> Path:
    old = Path(path)
    new = Path(os.path.normpath(folder.resolve() / relative_path))
    return new if new.exists() and not old.exists() else old


def locate_file(folder: Path, entry: ForeignFile) -> Path:
    """A file that is not in the index folder, if it still has its size; it may have moved together with the index.

    Raises:
        RetrievalIndexError: it is missing or of another size.
    """
    path = _moved(folder, path=entry.path, relative_path=entry.relative_path)
    if problem := _wrong_size(path, FileEntry(bytes=entry.bytes, sha256=entry.sha256)):
        raise RetrievalIndexError(f"{folder}: not the file that was adopted: {problem}; adopt it again")
    return path


def open_corpus_path(folder: Path, manifest: Manifest) -> Path:
    """The corpus file, if it still has the size that was indexed (`check_index` compares the hash).

    Raises:
        RetrievalIndexError: it is missing or of another size.
    """
    path = locate_corpus(folder, manifest)
    entry = FileEntry(bytes=manifest.corpus.bytes, sha256=manifest.corpus.sha256)
    if problem := _wrong_size(path, entry):
        raise RetrievalIndexError(f"{folder}: the corpus is not the one that was indexed: {problem}; index it again")
    return path


def describe_corpus(corpus: Path, *, out: Path, stored: bool) -> CorpusEntry:
    """Size, hash and place of a corpus file, for an index that will be at `out`."""
    path = corpus.resolve()
    return CorpusEntry(
        path=str(path),
        relative_path=os.path.relpath(path, out.resolve()),
        bytes=path.stat().st_size,
        sha256=sha256_file(path),
        stored=stored,
    )


def describe_foreign(file: Path, *, out: Path) -> ForeignFile:
    """Size, hash and place of a file that stays where it is, for an index that will be at `out`."""
    path = file.resolve()
    return ForeignFile(
        path=str(path),
        relative_path=os.path.relpath(path, out.resolve()),
        bytes=path.stat().st_size,
        sha256=sha256_file(path),
    )


def describe_files(folder: Path) -> dict[str, FileEntry]:
    """Size and hash of every file below a folder; lock files are no part of an index."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")
    return {
        path.relative_to(folder).as_posix(): FileEntry(bytes=path.stat().st_size, sha256=sha256_file(path))
        for path in files
    }


def write_manifest(folder: Path, manifest: Manifest) -> None:
    write_atomic(folder / MANIFEST_NAME, manifest.model_dump_json(indent=2) + "\n")


@contextlib.contextmanager
def new_index_folder(out: Path, *, made_from: Sequence[Path]) -> Iterator[Path]:
    """A folder to build in; it takes the place of `out` when the block ends well, and is removed when it does not.

    Raises:
        RetrievalIndexError: `out` exists and is neither an index nor an empty folder, what the index is made from lies
            in it, or it cannot be written.
    """
    target = out.resolve()
    for source in made_from:
        if target.is_dir() and source.resolve().is_relative_to(target):
            raise RetrievalIndexError(
                f"--out {out}: {source}, of which the index is made, lies in it and would be removed with the old "
                "index; move it, or choose another --out"
            )
    building = target.parent / f"{_building(target)}{socket.gethostname()}-{os.getpid()}-{time.time_ns()}"
    try:
        _refuse_other_content(out)
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(target)
        building.mkdir()
        with _held(building):
            yield building
            (building / _LOCK).unlink(missing_ok=True)
            _replace_folder(building, target)
    except OSError as error:
        raise RetrievalIndexError(
            f"--out {out}: the index cannot be written there ({error}); free space, or name a folder that can be made"
        ) from error
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _remove_abandoned(target: Path) -> None:
    """Remove what builds that were killed left beside an index: nobody holds it any more."""
    for folder in target.parent.glob(f"{glob.escape(_building(target))}*"):
        with contextlib.suppress(OSError), _held(folder) as is_held:
            if is_held:
                shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[bool]:
    """Hold a folder while this process builds in it; false: another one does, or the file system cannot say."""
    descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)  # NFS locks only what may be written
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_held = True
    except OSError:
        is_held = False
    try:
        yield is_held
    finally:
        os.close(descriptor)


def _building(target: Path) -> str:
    return f".{target.name}.building-"


def _refuse_other_content(out: Path) -> None:
    if not out.exists():
        return
    if out.is_dir() and not any(out.iterdir()):
        return
    try:
        head = (out / MANIFEST_NAME).read_bytes()
    except OSError:
        head = b""
    if FORMAT.encode() not in head:
        message = f"{out}: exists and is no index, so it is not overwritten; choose another --out, or empty it first"
        raise RetrievalIndexError(message)


def _replace_folder(new: Path, target: Path) -> None:
    old = target.parent / f".{target.name}.old-{os.getpid()}"
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.replace(target, old)
    os.replace(new, target)
    sync_folder(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _wrong_size(path: Path, entry: FileEntry) -> str | None:
    try:
        size = path.stat().st_size
    except OSError as error:
        return f"{path} ({error.strerror})"
    return None if size == entry.bytes else f"{path} has {counted(size, 'byte')}, not {entry.bytes}"


def _wrong_content(path: Path, entry: FileEntry) -> str | None:
    if problem := _wrong_size(path, entry):
        return problem
    digest = sha256_file(path)
    return None if digest == entry.sha256 else f"{path} has sha256 {digest[:12]}…, not {entry.sha256[:12]}…"
