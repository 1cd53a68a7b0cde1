"""Files that are made once and kept: compiled kernels, converted checkpoints, hashes.

An entry is a file or a folder, with a *seal* beside it: the size and SHA-256 of each of its files.
It is written next to its place, flushed to the disk and renamed; the seal follows. An entry that
does not fit its seal (cut short, changed, emptied, without a seal) is never used: a warning says
so, and it is made anew. Nothing here imports torch: the API process uses it too.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

log = logging.getLogger(__name__)

SEAL = ".seal"
VERSION = 1
"""Of the seal's form: an entry under another is made anew."""
PART = 64 << 20
"""Bytes that are hashed at once. A longer file's hash is that of its parts' hashes, so that the
parts can be hashed side by side."""
THREADS = 8


def user_cache() -> Path:
    """``vllm-di`` in the user's cache folder, by the XDG base directory rules. Raises OSError where
    the user has no home."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    if Path(base).is_absolute():
        return Path(base) / "vllm-di"
    try:
        return Path.home() / ".cache" / "vllm-di"
    except RuntimeError:
        raise FileNotFoundError(
            "no home folder is known for this user: set XDG_CACHE_HOME to a folder that can be "
            "written"
        ) from None


def is_whole(entry: Path) -> bool:
    """Whether the entry is there and fits its seal. A warning says why one that is there does
    not."""
    if not os.path.lexists(entry):
        return False
    trouble = _trouble(entry)
    if trouble:
        log.warning("%s: %s: it is not used and will be made anew", entry, trouble)
    return not trouble


def obtain(entry: Path, make: Callable[[Path], object]) -> Path:
    """``entry``, whole: as it was found, or made now.

    ``make`` writes a file or a folder at the path that it is given, beside ``entry``; what it
    raises is passed on, and leaves nothing behind. Processes that want the same entry wait for the
    first. Raises OSError where the entry is not there and cannot be written (read-only, full).
    """
    if is_whole(entry):
        return entry
    entry.parent.mkdir(parents=True, exist_ok=True)
    with _locked(entry) as scratch:
        if not os.path.lexists(entry) or _trouble(entry):  # another process may have been first
            made = scratch / entry.name
            make(made)
            _seal(made, entry, scratch)
    return entry


@contextmanager
def foreign_folder(folder: Path) -> Iterator[Path | None]:
    """A folder that a library fills and reads by itself while the block runs.

    Before the block, files that do not fit their seals are removed, with a warning; after it, what
    has none is sealed. One process at a time is in the block. Gives None, and a warning, where the
    folder cannot be written.
    """
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            scratch = stack.enter_context(_locked(folder / "all"))
            for path in _entries(folder):
                if not is_whole(path):
                    _aside(path, scratch)
                    _aside(_seal_of(path), scratch)
        except OSError as error:
            log.warning("the cache %s cannot be written (%s): nothing is kept in it", folder, error)
            yield None
            return
        yield folder
        try:
            for path in _entries(folder):
                if not os.path.lexists(_seal_of(path)):
                    _seal(path, path, scratch)
        except OSError as error:
            log.warning("the cache %s cannot be written (%s)", folder, error)


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ------------------------------------------------------------------------------------------------
# seals


def _seal_of(entry: Path) -> Path:
    return entry.with_name(entry.name + SEAL)


def _trouble(entry: Path) -> str:
    """What keeps the entry from being used; empty where nothing does."""
    try:
        seal = json.loads(_seal_of(entry).read_bytes())
        version, is_folder, files = seal["version"], seal["folder"], seal["files"]
        if version != VERSION:
            return f"sealed in form {version}, expected {VERSION}"
        if is_folder != entry.is_dir():
            return f"expected a {'folder' if is_folder else 'file'}, found another kind"
        for name, [size, digest] in files.items():
            path = entry / name if is_folder else entry
            if (found := path.stat().st_size) != size:
                return f"damaged: {name} has {found} bytes of {size}"
            if _digest(path) != digest:
                return f"damaged: the bytes of {name} are not those that were written"
    except FileNotFoundError as error:
        lost = Path(error.filename).name
        return "it has no seal" if lost.endswith(SEAL) else f"damaged: {lost} is missing"
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    except (ValueError, TypeError, KeyError, AttributeError):
        return "its seal is damaged"
    return ""


def _digest(path: Path) -> str:
    """SHA-256 over the file, or over the hashes of its parts where it has several."""

    def part(start: int) -> bytes:
        digest, left = hashlib.sha256(), PART
        with path.open("rb", buffering=0) as file:
            file.seek(start)
            while left and (block := file.read(min(left, 1 << 20))):
                digest.update(block)
                left -= len(block)
        return digest.digest()

    size = path.stat().st_size
    if size <= PART:
        return part(0).hex()
    with ThreadPoolExecutor(min(THREADS, len(os.sched_getaffinity(0)))) as pool:
        return hashlib.sha256(b"".join(pool.map(part, range(0, size, PART)))).hexdigest()


def _seal(made: Path, entry: Path, scratch: Path) -> None:
    """Flush what lies at ``made`` and write the seal that ``entry`` will have, last of all."""
    is_folder = made.is_dir()
    files = sorted(p for p in made.rglob("*") if p.is_file()) if is_folder else [made]
    facts = {}
    for path in files:
        _flush(path)
        name = str(path.relative_to(made)) if is_folder else entry.name
        facts[name] = [path.stat().st_size, _digest(path)]
    for folder in [made, *(p for p in made.rglob("*") if p.is_dir())] if is_folder else []:
        _flush(folder)
    written = scratch / "written"
    written.write_text(json.dumps({"version": VERSION, "folder": is_folder, "files": facts}))
    _flush(written)
    if made != entry:
        _aside(entry, scratch)
        made.rename(entry)
    if _seal_of(entry).is_dir():
        _aside(_seal_of(entry), scratch)
    os.replace(written, _seal_of(entry))
    _flush(entry.parent)


def _aside(path: Path, scratch: Path) -> None:
    """Into the scratch folder, and gone with it: a file, or a folder with all that it holds."""
    if os.path.lexists(path):
        path.rename(Path(tempfile.mkdtemp(dir=scratch)) / path.name)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _entries(folder: Path) -> list[Path]:
    """What a foreign library keeps in ``folder``."""
    return sorted(p for p in folder.iterdir() if not p.name.startswith(".") and p.suffix != SEAL)


@contextmanager
def _locked(entry: Path) -> Iterator[Path]:
    """One process at a time, with a folder beside the entry for what is not complete yet. The lock
    lasts while its file is open; folders that a killed process left behind are removed."""
    path, prefix = entry.with_name(f".{entry.name}.lock"), f".making-{entry.name}-"
    if path.is_dir():
        shutil.rmtree(path)
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for left in entry.parent.glob(f"{prefix}*"):
            shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=entry.parent, prefix=prefix) as scratch:
            yield Path(scratch)
