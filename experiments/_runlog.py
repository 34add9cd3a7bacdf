"""The run log: one strict JSON record per line, appended whole or not at all."""

import contextlib
import functools
import json
import os
import platform
import shlex
import subprocess
import sys
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock

from experiments._inputs import InputError
from experiments._result import ExperimentResult, to_json

SCHEMA = 1
FIELDS: dict[str, tuple[type, ...]] = {
    "schema": (int,),
    "run_id": (str,),
    "experiment": (str,),
    "seed": (int, type(None)),
    "details": (str,),
    "passed": (bool, type(None)),
    "meta": (dict,),
    "params": (dict,),
    "started": (str,),
    "duration_s": (int, float),
    "command": (str,),
    "git": (dict, type(None)),
    "versions": (dict,),
    "device": (str,),
}
_OPENING = b'{"schema": '  # how every record begins: "schema" is its first field
_LIBRARIES = ("numpy", "torch", "triton", "numba", "jax", "equinox", "diffrax")


def make_record(
    result: ExperimentResult,
    *,
    params: dict[str, Any],
    started: datetime,
    duration_s: float,
    run_id: str | None = None,
) -> dict[str, Any]:
    """The log record of ``result``; ``params`` are the resolved arguments of ``run``.

    ``run_id`` names the run by its content where a grid must find it again; without
    one it is random. ``metadata["device"]`` overrides the processor's name.
    """
    device = result.metadata.get("device") or _processor()
    return {
        "schema": SCHEMA,
        "run_id": run_id or uuid.uuid4().hex[:16],
        "experiment": result.name,
        "seed": params.get("seed"),
        "details": result.details,
        "passed": result.passed,
        "meta": result.metadata,
        "params": to_json(params),
        "started": started.astimezone(UTC).isoformat(timespec="milliseconds"),
        "duration_s": round(duration_s, 6),
        "command": command_typed(),
        "git": _git_state(),
        "versions": _versions(),
        "device": device if isinstance(device, str) else json.dumps(device),
    }


def record_problems(record: Any) -> list[str]:
    """What is wrong with the shape of a record; empty if nothing is."""
    if not isinstance(record, dict):
        return [f"expected a JSON object, got {type(record).__name__}"]
    problems = [f"field {name!r} is missing" for name in FIELDS if name not in record]
    problems += [f"unknown field {name!r}" for name in record if name not in FIELDS]
    for name, kinds in FIELDS.items():
        if name in record and not _is_one_of(record[name], kinds):
            names = " or ".join(kind.__name__ for kind in kinds)
            problems.append(f"field {name!r} is {record[name]!r}, expected {names}")
    if record.get("schema", SCHEMA) != SCHEMA:
        problems.append(f"schema {record['schema']!r}, expected {SCHEMA}")
    return problems


def _is_one_of(value: Any, kinds: tuple[type, ...]) -> bool:
    if isinstance(value, bool):
        return bool in kinds
    return isinstance(value, kinds)


def parse_line(line: str) -> dict[str, Any]:
    """One record from one line; ``ValueError`` says what is wrong with it."""
    try:
        record = json.loads(line, parse_constant=refuse_constant)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at column {error.colno})") from None
    problems = record_problems(record)
    if problems:
        raise ValueError("; ".join(problems))
    return record


def refuse_constant(token: str) -> None:
    raise ValueError(f"bare {token} is not JSON")


class RunLog:
    """A JSONL file of run records, safe for any number of writers at once.

    An append holds a lock on ``<path>.lock`` and is a single write; a write cut short
    (full disk) is taken back. Bytes after the last newline, which only a killed writer
    can leave, are moved to ``<path>.torn`` before the next append. Process death is
    covered; loss of power is not (records are not flushed to the disk one by one).
    The lock is :meth:`locked`, for work that must not overlap an append.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock = FileLock(f"{self.path}.lock", poll_interval=0.002)

    def prepare(self) -> str | None:
        """Make the folder, check that this is a log and can be written, mend its tail.

        Returns a line to show if a torn tail was set aside. Raises InputError.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self._lock, open(self.path, "ab+") as file:
                self._refuse_foreign_file(file)
                return self._mend_tail(file)
        except OSError as error:
            raise unwritable(self.path, error) from None

    def append(self, record: dict[str, Any]) -> None:
        """Append one record as one line. Raises InputError if it cannot be stored."""
        line = json.dumps(record, allow_nan=False, ensure_ascii=False) + "\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self._lock, open(self.path, "ab+", buffering=0) as file:
                self._mend_tail(file)
                self._write_whole(file, line.encode())
        except OSError as error:
            raise unwritable(self.path, error) from None

    def records(self) -> Iterator[dict[str, Any]]:
        """Every record in order; an absent log is empty.

        A last line without a newline is left out: it is being written, or torn.
        Raises InputError naming file and line at the first line that is no record.
        """
        for number, line in self.lines():
            if not line.endswith("\n"):
                return
            try:
                yield parse_line(line)
            except ValueError as error:
                raise InputError(
                    f"{self.path}:{number}: {error}; expected a run record; mend or "
                    "remove that line, or name another log"
                ) from None

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold every writer back, in this and in other processes."""
        with self._lock:
            yield

    def lines(self) -> Iterator[tuple[int, str]]:
        """(line number, text) of every line, blank ones left out."""
        if not self.path.exists():
            return
        try:
            with open(self.path, encoding="utf-8", errors="replace") as file:
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        yield number, line
        except OSError as error:
            raise InputError(
                f"{self.path}: cannot be read ({error.strerror})"
            ) from None

    def _refuse_foreign_file(self, file: Any) -> None:
        file.seek(0)
        first = file.readline()
        try:
            if first.endswith(b"\n"):
                parse_line(first.decode("utf-8", errors="replace"))
            elif first[: len(_OPENING)] != _OPENING[: len(first)]:
                raise ValueError("neither a record nor the start of one")
        except ValueError as error:
            raise InputError(
                f"{self.path}:1: {error}; expected a run log; name another file"
            ) from None

    def _mend_tail(self, file: Any) -> str | None:
        size = file.seek(0, os.SEEK_END)
        if size == 0:
            return None
        file.seek(size - 1)
        if file.read(1) == b"\n":
            return None
        file.seek(0)
        kept, newline, tail = file.read().rpartition(b"\n")
        if _is_record(tail):  # only its newline is missing, as some editors leave it
            self._write_whole(file, b"\n")
            return None
        with open(f"{self.path}.torn", "ab") as torn:
            torn.write(tail + b"\n")
        file.truncate(len(kept) + len(newline))
        return (
            f"{self.path}: its last line was torn (a writer was killed); moved to "
            f"{self.path}.torn"
        )

    def _write_whole(self, file: Any, data: bytes) -> None:
        start = file.seek(0, os.SEEK_END)
        try:
            written = file.write(data)
            while written < len(data):
                written += file.write(data[written:])
        except BaseException:  # a full disk or an interrupt: take the part back
            file.truncate(start)
            raise


def _is_record(line: bytes) -> bool:
    try:
        parse_line(line.decode("utf-8"))
    except ValueError:
        return False
    return True


def unwritable(path: str | Path, error: OSError) -> InputError:
    """The one line for an output that cannot be written."""
    return InputError(
        f"{path}: cannot be written ({error.strerror or error}); expected a writable "
        "file with room on its disk; name another path or mend the folder"
    )


def command_typed() -> str:
    """The command as a user would type it again, free of machine paths."""
    main = sys.modules.get("__main__")
    spec = getattr(main, "__spec__", None)
    program = f"-m {spec.name.removesuffix('.__main__')}" if spec else None
    if program is None:
        program = Path(sys.argv[0]).name if sys.argv[0] else "-c"
    return f"python {program} {shlex.join(sys.argv[1:])}".strip()


@functools.cache
def _git_state() -> dict[str, Any] | None:
    here = Path(__file__).parent
    try:
        commit = _git(here, "rev-parse", "HEAD")
        return {"commit": commit, "dirty": bool(_git(here, "status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *words: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *words],
        check=True,
        capture_output=True,
        text=True,
        timeout=10,
    )
    return done.stdout.strip()


def _versions() -> dict[str, str]:
    loaded = {name: sys.modules[name] for name in _LIBRARIES if name in sys.modules}
    versions = {k: str(getattr(v, "__version__", "unknown")) for k, v in loaded.items()}
    return {"python": platform.python_version(), **versions}


@functools.cache
def _processor() -> str:
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    except OSError:
        pass  # not Linux: the platform module's name stands
    return f"cpu: {name}, {os.cpu_count()} cores"
