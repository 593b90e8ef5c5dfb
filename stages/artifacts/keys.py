"""Canonical JSON, the hashes built on it, and texts that carry their own hash."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

KEY_CHARS = 12
"""Of a key or a commit, as people are told it."""


def canonical_json(value: Any) -> str:
    """Return the one JSON text of `value`: sorted keys, no spaces, no NaN.

    Raises:
        ValueError: `value` holds NaN or an infinity, for which JSON has no form.
    """
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )


def sealed_text(body: Mapping[str, Any], hash_name: str) -> str:
    """Return the canonical JSON line of `body` with its own SHA-256 added as `hash_name`."""
    digest = sha256_text(canonical_json(body))
    return canonical_json({**body, hash_name: digest}) + "\n"


def open_sealed(data: bytes, hash_name: str) -> dict[str, Any]:
    """Return the body of a text that `sealed_text` made.

    Raises:
        ValueError: `data` is not, byte for byte, such a text.
    """
    try:
        body = json.loads(data)
        del body[hash_name]
        intact = sealed_text(body, hash_name).encode() == data
    except (ValueError, KeyError, TypeError, RecursionError):
        intact = False
    if not intact:
        raise ValueError("not the text that was written")
    return dict(body)


def sha256_text(text: str) -> str:
    """Return the SHA-256 of `text` in UTF-8, as 64 hex digits."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def sha256_bytes(data: bytes) -> str:
    """Return the SHA-256 of `data`, as 64 hex digits."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, read in chunks, as 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def stage_key(fields: Mapping[str, Any]) -> str:
    """Return the identity of a stage's output: the hash of everything that decides its content."""
    return sha256_text(canonical_json(fields))


def row_seed(run_seed: int, iteration: int, prompt_id: str, sample_index: int) -> int:
    """Return the sampling seed of one row, in [0, 2**63).

    It depends on nothing but its arguments, so the number of shards, workers or GPUs
    changes no row's seed.
    """
    text = f"{run_seed}/{iteration}/{prompt_id}/{sample_index}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
