"""Measured configs on disk: one readable JSON per target, in the user's cache folder and (shipped)
in tridil/configs.

    {"format": 1, "target": "cuda:90", "entries": {"<problem> | fprop": {"NVIDIA H100 80GB HBM3":
    {"config": {...}, "ms": 0.1, ...}}}}

A record is fresh when its launches, their kernels' sources ("code") and Triton's version are those
it was measured with; a stale one is a hint. Files are replaced atomically and merged under a lock,
so that processes that tune at once lose nothing.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
import tempfile
from collections.abc import Iterable
from contextlib import nullcontext, suppress
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .branches import Branches
from .families import Launch
from .problem import Problem

FORMAT = 1
Entries = dict[str, dict[str, dict[str, Any]]]  # key -> name of the GPU -> record
log: logging.Logger = logging.getLogger("tridil")
_memory: dict[str, Entries] = {}  # target -> entries of this process that no file took
_read_files: dict[Path, tuple[int, int, Entries]] = {}  # path -> (mtime, size, entries)


def folder() -> Path:
    """Folder of the user's cache: TRIDIL_CACHE, else "tridil" in the system's place for caches."""
    if os.environ.get("TRIDIL_CACHE"):
        return Path(os.environ["TRIDIL_CACHE"])
    if sys.platform == "win32" and os.environ.get("LOCALAPPDATA"):
        return Path(os.environ["LOCALAPPDATA"], "tridil")
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "tridil")


def path(target: str) -> Path:
    """The user's file for a target such as "cuda:90"."""
    return folder() / (target.replace(":", "-") + ".json")


def key(problem: Problem | Branches, pass_: str, precision: str = "ieee") -> str:
    """Identity of a measurement: the problem or branches, dilation included, and the pass; of float32
    also the precision of its products."""
    dtype = (problem.first if isinstance(problem, Branches) else problem).dtype
    return f"{problem.key()} | {pass_}" + (f" {precision}" if dtype == "float32" else "")


def code(launches: Iterable[Launch]) -> str:
    """Hash of what a measurement of these launches depends on: they and the sources of their
    kernels."""
    launches, ours = list(launches), f"{__package__}.kernels."
    modules = sorted({launch.kernel.partition(":")[0] for launch in launches} | {f"{ours}common"})
    # the same under whatever name the package was loaded
    text = repr(launches).replace(ours, "tridil.kernels.")
    return hashlib.sha256("".join([text, *map(_source, modules)]).encode()).hexdigest()[:12]


@lru_cache
def _source(module: str) -> str:
    return Path(find_spec(module).origin).read_text(encoding="utf-8")  # type: ignore[union-attr,arg-type]


@lru_cache(maxsize=1)
def triton() -> str:
    """The version of Triton."""
    try:
        return version("triton")
    except PackageNotFoundError:  # wheels of other names
        return "unknown"


def is_fresh(record: dict[str, Any]) -> bool:
    """Whether a record was measured with this Triton."""
    return record.get("triton") == triton()


def read(file: Path, locked: bool = False) -> Entries:
    """Entries of one file; {} where there is none. A file that cannot be read as one is set aside
    with a warning, never overwritten.

    locked: whether the caller holds the file's lock.
    """
    try:
        status = file.stat()
        known = _read_files.get(file)
        if known and known[:2] == (status.st_mtime_ns, status.st_size):
            return known[2]
        _, entries = load(file)
    except FileNotFoundError:
        return {}
    except OSError as e:
        log.warning("tridil: cannot read %s (%s): going on without it", file, e)
        return {}
    except ValueError as e:
        _set_aside(file, e, locked)
        return {}
    _read_files[file] = status.st_mtime_ns, status.st_size, entries
    return entries


def _set_aside(file: Path, reason: ValueError, locked: bool) -> None:
    with suppress(OSError, TimeoutError), nullcontext() if locked else _lock(file):
        try:
            load(file)  # another process may have mended it
        except ValueError:
            aside = next(
                p
                for i in range(10**6)
                if not (p := file.with_name(f"{file.name}.corrupt-{i}")).exists()
            )
            os.replace(file, aside)
            log.warning("tridil: %s: set aside as %s", reason, aside.name)
            return
    log.warning("tridil: %s: going on without it", reason)


def _lock(file: Path):
    from filelock import FileLock  # comes with torch

    return FileLock(f"{file}.lock", timeout=60)


def load(file: Path) -> tuple[str, Entries]:
    """(target, entries) of a table. Raises ValueError when it is none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        entries = content["entries"]
        for record in (record for records in entries.values() for record in records.values()):
            if not (
                isinstance(record["config"], dict)
                and isinstance(record["ms"], (int, float))
                and isinstance(record["date"], str)
            ):
                raise TypeError(f"record {record}")
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']}, expected {FORMAT}")
        return content["target"], entries
    except (KeyError, TypeError, AttributeError, ValueError) as e:
        raise ValueError(
            f"{file} is not a table of measured configs ({type(e).__name__}: {e})"
        ) from None


def merge(*tables: Entries) -> Entries:
    """One table of entries: of the records of one key and device a fresh one wins, then the latest."""
    out: Entries = {}
    for table in tables:
        for name, records in table.items():
            for device, record in records.items():
                known = out.setdefault(name, {}).get(device)
                if known is None or (is_fresh(record), record["date"]) >= (
                    is_fresh(known),
                    known["date"],
                ):
                    out[name][device] = record
    return out


def user(target: str) -> Entries:
    """Entries of the user's cache, with those of this process that could not be written."""
    stored = read(path(target))
    return merge(stored, _memory[target]) if target in _memory else stored


@lru_cache(maxsize=64)
def shipped(target: str) -> Entries:
    """Entries that come with the package."""
    return read(
        Path(str(files(__package__).joinpath("configs", target.replace(":", "-") + ".json")))
    )


def add(target: str, entries: Entries) -> bool:
    """Merges entries into the user's file; False (with one warning) where it cannot be written:
    then this process keeps them."""
    file = path(target)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with _lock(file):
            write(file, target, merge(read(file, locked=True), entries))
        return True
    except (OSError, TimeoutError) as e:  # filelock.Timeout is a TimeoutError
        if target not in _memory:
            log.warning(
                "tridil: cannot write %s (%s): measured configs last as long as this process; set TRIDIL_CACHE to a folder that can be "
                "written",
                file,
                e,
            )
        _memory[target] = merge(_memory.get(target, {}), entries)
        return False


def write(file: Path, target: str, entries: Entries) -> None:
    """Replaces `file` atomically."""
    content = {"format": FORMAT, "target": target, "entries": dict(sorted(entries.items()))}
    handle, temporary = tempfile.mkstemp(prefix=file.name, suffix=".part", dir=file.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as f:
            f.write(_dumps(content))
        os.chmod(temporary, 0o644)
        os.replace(temporary, file)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise


def _dumps(content: dict) -> str:
    """JSON with a key or a record a line: what people read and compare."""
    lines = [
        f"  {json.dumps(name)}: {{\n"
        + ",\n".join(f"    {json.dumps(d)}: {json.dumps(r)}" for d, r in sorted(records.items()))
        + "}"
        for name, records in content["entries"].items()
    ]
    head = ", ".join(
        f"{json.dumps(name)}: {json.dumps(content[name])}" for name in ("format", "target")
    )
    return "{" + head + ', "entries": {\n' + ",\n".join(lines) + "\n}}\n"
