"""One run on disk: its layout, its lock, its `run.json`, and where a resume begins.

create or open -> with run: ... run.set_steps(n) ... -> run.json says finished, failed or interrupted
"""

from __future__ import annotations

import json
import logging
import os
import platform
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, Self

from rexrag.errors import Interrupted, ModelError, RunFolderError
from rexrag.files import is_locked, is_temporary, lines_of, naming, read_jsonl, take_lock, write_atomic

LOG = logging.getLogger(__name__)

FORMAT: Final = 1
Status = Literal["running", "finished", "failed", "interrupted"]
_PACKAGES: Final = ("rexrag", "torch", "transformers", "tokenizers", "ray", "pyarrow", "tantivy", "numpy")


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What `run.json` says. `steps`: learner steps done; `starts` counts the starts of this run."""

    recipe: str
    seed: int
    status: Status
    started: str
    ended: str | None
    steps: int
    starts: int
    versions: Mapping[str, str]
    format: int = FORMAT


class RunFolder:
    """The folder of one run, locked for as long as this object is entered.

    The lock belongs to the process: it goes away with its holder, however that ends.

        run = RunFolder.create(Path("runs/mine"), recipe="mine", seed=0, config=resolved_toml(recipe))
        with run:
            run.set_steps(1)
    """

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self._lock_fd: int | None = None

    @classmethod
    def create(
        cls, root: Path, *, recipe: str, seed: int, config: str, begin: Callable[[Self], None] = lambda _: None
    ) -> Self:
        """Make a new run folder with its `config.toml`; `root` is absent, empty, or left by a start that died.
        `begin` writes what else a run begins with, before it is one.

        Raises:
            RunFolderError: the folder holds something already, another process makes it, or it cannot be made.
        """
        run = cls(root)
        try:
            root.mkdir(parents=True, exist_ok=True)
            run._refuse_other_content()
            run._lock()
        except OSError as error:
            raise RunFolderError(f"run folder {root}: cannot be made ({error}); name another --run-dir.") from None
        try:
            run._make(recipe=recipe, seed=seed, config=config, begin=begin)
        finally:
            run._unlock()
        return run

    def _make(self, *, recipe: str, seed: int, config: str, begin: Callable[[Self], None]) -> None:
        """All that a run folder begins with; `run.json`, which makes it one, comes last."""
        if self.is_run(self.root):
            raise RunFolderError(f"run {self.root}: was begun meanwhile; give the command again to go on with it.")
        self._refuse_other_content()
        for folder in (self.tensorboard, self.checkpoints, self.buffer):
            folder.mkdir(exist_ok=True)
        write_atomic(self.config, config)
        begin(self)
        record = RunRecord(
            recipe=recipe, seed=seed, status="interrupted", started=_now(), ended=None, steps=0, starts=0,
            versions=_versions(),
        )  # fmt: skip
        self._write_record(record)

    def _refuse_other_content(self) -> None:
        """Beside what a start makes before `run.json`, in a folder that is no run."""
        skeleton = {self.tensorboard, self.checkpoints, self.buffer}
        own = {self.root / "lock", self.config, self.identity}
        others = [
            path
            for path in self.root.iterdir()
            if not (path in own or is_temporary(path) or (path in skeleton and not any(path.iterdir())))
        ]
        if others and not self.is_run(self.root):
            raise RunFolderError(f"run folder {self.root}: is not empty and holds no run; name another --run-dir.")

    @staticmethod
    def is_run(root: Path) -> bool:
        """Whether the folder holds a run."""
        return (root / "run.json").is_file()

    @property
    def config(self) -> Path:
        return self.root / "config.toml"

    @property
    def identity(self) -> Path:
        return self.root / "identity.json"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def eval(self) -> Path:
        return self.root / "eval.jsonl"

    @property
    def samples(self) -> Path:
        return self.root / "samples.jsonl"

    @property
    def log(self) -> Path:
        return self.root / "log.jsonl"

    @property
    def accounting(self) -> Path:
        return self.root / "accounting.json"

    @property
    def tensorboard(self) -> Path:
        return self.root / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def buffer(self) -> Path:
        return self.root / "buffer"

    @property
    def prepared(self) -> Path:
        return self.root / "prepared"

    @property
    def guard(self) -> Path:
        """A line for each collapse, and what was done."""
        return self.root / "guard.jsonl"

    @property
    def cluster(self) -> Path:
        """Where the run goes on, for those who ask from another process; there as long as it does."""
        return self.root / "cluster.json"

    @property
    def wanted(self) -> Path:
        return self.root / "wanted.json"

    def committed_checkpoints(self) -> dict[int, Path]:
        """Step -> folder of each checkpoint whose `COMMIT` is there, oldest first."""
        found = {}
        for folder in self.checkpoints.glob("step-*"):
            number = folder.name.removeprefix("step-")
            if number.isdigit() and (folder / "COMMIT").is_file():
                found[int(number)] = folder
        return dict(sorted(found.items()))

    def best_checkpoint(self) -> Path:
        """The checkpoint with the highest EM on dev (the later one of equals), else the last.

        Evaluations of another number of questions than the newest one's, from before a resume, are passed over.

        Raises:
            RunFolderError: the run has no committed checkpoint.
        """
        committed = self.committed_checkpoints()
        if not committed:
            raise RunFolderError(f"run {self.root}: has no checkpoint yet; wait for one, or name a model folder.")
        scores = {line["step"]: line["em"] for line in comparable(read_jsonl(self.eval), split="dev")}
        scored = [(scores[step], step) for step in committed if step in scores]
        return committed[max(scored)[1] if scored else max(committed)]

    def record(self) -> RunRecord:
        """What `run.json` says.

        Raises:
            RunFolderError: it cannot be read, or another version of this package wrote it.
        """
        try:
            fields = json.loads((self.root / "run.json").read_text(encoding="utf-8"))
            written = fields["format"]
            if written == FORMAT:
                fields.setdefault("starts", fields.pop("incarnation", 0))  # as earlier versions called it
                return RunRecord(**fields)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunFolderError(f"run {self.root}: run.json cannot be read ({error}); start a new run.") from None
        raise RunFolderError(
            f"run {self.root}: folder format {written} is not this version's {FORMAT}; "
            "use the version of rexrag that wrote it, or start a new run."
        )

    def set_steps(self, steps: int) -> None:
        """Record the learner steps done."""
        self._update(steps=steps)

    def cut_after(self, step: int) -> None:
        """Move the lines of later steps out of metrics, evaluations and samples into `*.lost.jsonl`."""
        for path in (self.metrics, self.eval, self.samples):
            if not path.exists():
                continue
            kept: list[str] = []
            lost: list[str] = []
            for line in lines_of(path.read_text(encoding="utf-8", errors="replace")):
                (kept if _step_of(line) <= step else lost).append(f"{line}\n")
            if lost:
                with path.with_name(f"{path.stem}.lost.jsonl").open("a", encoding="utf-8") as lost_file:
                    lost_file.writelines(lost)
                write_atomic(path, "".join(kept))

    def evaluated(self, step: int) -> frozenset[str]:
        """Splits that have a line of this step in `eval.jsonl`."""
        return frozenset(str(line["split"]) for line in read_jsonl(self.eval) if line["step"] == step)

    def remove_unused(self) -> None:
        """Remove a run that has come to nothing: no step, no checkpoint, nothing prepared, measured or logged."""
        used = (self.prepared, self.checkpoints, self.buffer, self.tensorboard)
        if any(folder.is_dir() and any(folder.iterdir()) for folder in used) or self.metrics.exists():
            return
        shutil.rmtree(self.root, ignore_errors=True)  # why the run ended has more to say
        link = self.root.parent / "latest"
        if link.is_symlink() and not link.exists():
            link.unlink()

    def __enter__(self) -> Self:
        """Take the lock and count a start.

        Raises:
            RunFolderError: another process holds the lock.
        """
        self._lock()
        self.cluster.unlink(missing_ok=True)  # of a start that was killed: nobody is found there
        self._update(status="running", ended=None, starts=self.record().starts + 1, versions=_versions())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        status: Status = "finished"
        if kind is not None:
            status = "interrupted" if issubclass(kind, Interrupted | KeyboardInterrupt) else "failed"
        try:
            self._update(status=status, ended=_now())
        except (OSError, RunFolderError):
            if error is None:
                raise
            LOG.exception("run.json does not say how the run ended")  # which has more to say than this
        finally:
            self._unlock()

    def is_in_use(self) -> bool:
        """Whether a process has the run entered."""
        return is_locked(self.root / "lock")

    def _unlock(self) -> None:
        if self._lock_fd is not None:
            os.close(self._lock_fd)
            self._lock_fd = None

    def _lock(self) -> None:
        fd = os.open(self.root / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            take_lock(fd)
        except BlockingIOError:
            holder = os.read(fd, 32).decode(errors="replace").strip() or "unknown"
            os.close(fd)
            raise RunFolderError(
                f"run {self.root}: is in use by process {holder}; wait for it, stop it, or name another --run-dir."
            ) from None
        os.truncate(fd, 0)
        os.write(fd, f"{os.getpid()}\n".encode())
        self._lock_fd = fd

    def _update(self, **changes: object) -> None:
        assert self._lock_fd is not None, "run.json is written by the holder of the lock"
        fields: dict[str, object] = {**vars(self.record()), **changes}
        self._write_fields(fields)

    def _write_record(self, record: RunRecord) -> None:
        self._write_fields(dict(vars(record)))

    def _write_fields(self, fields: Mapping[str, object]) -> None:
        path, text = self.root / "run.json", json.dumps(fields, indent=2) + "\n"
        try:
            write_atomic(path, text)
        except OSError:
            if not path.exists():
                raise
            # A full disk has no room for a second file, but for other words in this one.
            with naming(path), path.open("r+b") as file:
                file.write(text.encode().ljust(path.stat().st_size))


def new_run_path(recipe: str, *, parent: Path = Path("runs")) -> Path:
    """A default run folder's name that is not taken: `runs/<recipe>-<UTC time>`."""
    stem = f"{recipe}-{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
    names = (stem, *(f"{stem}-{number}" for number in range(2, 1000)))
    return next(parent / name for name in names if not (parent / name).exists())


def claim(root: Path) -> bool:
    """Make the folder, unless another process was there first."""
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        root.mkdir()
    except FileExistsError:
        return False
    except OSError as error:
        raise RunFolderError(f"run folder {root}: cannot be made ({error}); name another --run-dir.") from None
    return True


def resolve_model_or_run(name: str) -> Path:
    """The model folder or file that a user's words mean: for a run its best checkpoint on dev, else its last.

    A name that is no path here, of the form `owner/name`, is left as it is: a hub id.

    Raises:
        ModelError: there is no such thing.
        RunFolderError: the run has no checkpoint.
    """
    path = Path(name).expanduser()
    if RunFolder.is_run(path):
        return RunFolder(path).best_checkpoint()
    if path.is_file() or (path / "config.json").is_file():
        return path
    if path.exists():
        raise ModelError(f"{name}: is neither a model folder (no config.json) nor a run folder (no run.json).")
    is_hub_id = len(path.parts) == 2 and not path.is_absolute() and not path.parent.exists()
    if is_hub_id and not name.startswith((".", "~")):
        return path
    raise ModelError(f"{name}: does not exist; name a model folder, a GGUF file, a hub id, or a run folder.")


def run_of(path: Path) -> RunFolder | None:
    """The run that a checkpoint or a run folder belongs to, None for any other model."""
    for root in (path, path.resolve().parent.parent):
        if RunFolder.is_run(root):
            return RunFolder(root)
    return None


def comparable(evaluations: Sequence[dict[str, Any]], *, split: str) -> list[dict[str, Any]]:
    """The evaluations of a split, of as many questions as the newest: `eval.max_questions` may change on a resume."""
    lines = [line for line in evaluations if line.get("split") == split]
    return [line for line in lines if line["n"] == lines[-1]["n"]]


def _step_of(line: str) -> float:
    """The step of a jsonl line; infinity for a torn one."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


def _now() -> str:
    return f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
