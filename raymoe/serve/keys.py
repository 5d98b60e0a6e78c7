"""API keys: who may ask, and how much. Keys are kept as SHA-256 hashes only.

A plain fast hash is enough: keys are 256 random bits, which nobody finds by guessing, fast or slow. So keys are made
here (``raymoe keys new``), never chosen by people.
"""

import hashlib
import hmac
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from raymoe.errors import ConfigError
from raymoe.strict import StrictModel, validated

PREFIX = "raymoe-"
KEY_BYTES = 32
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")


class KeyConfig(StrictModel):
    """One key in a file of keys, under its name."""

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="Hash of the key, in hexadecimal digits.")
    requests_per_minute: int | None = Field(None, ge=1, description="Omitted: as many as the server takes.")
    concurrent: int | None = Field(None, ge=1, description="Requests under way at a time; omitted: no limit.")
    admin: bool = Field(False, description="May change settings as well.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """One key, without the key itself."""

    name: str
    digest: bytes
    requests_per_minute: int | None = None
    concurrent: int | None = None
    admin: bool = False


def new_key() -> str:
    """A key that nobody can guess."""
    return PREFIX + secrets.token_urlsafe(KEY_BYTES)


def digest_of(key: str) -> bytes:
    """What is kept of a key."""
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()


def find(keys: tuple[Key, ...], presented: str) -> Key | None:
    """The key that was presented, if it is one. Takes as long for a wrong one as for a right one."""
    digest = digest_of(presented)
    found = None
    for key in keys:
        if hmac.compare_digest(key.digest, digest):
            found = key
    return found


def parse_keys(data: Mapping[str, Any], where: str) -> tuple[Key, ...]:
    """Keys by name. Raises ConfigError that begins with ``where``; it never shows a hash."""
    keys = []
    for name, fields in data.items():
        check_name(name, where)
        config = validated(KeyConfig, fields, f"{where}: {name}")
        keys.append(Key(name=name, digest=bytes.fromhex(config.sha256), **config.model_dump(exclude={"sha256"})))
    return tuple(keys)


def check_name(name: Any, where: str) -> None:
    """Raises ConfigError for what is no name of a key."""
    if not isinstance(name, str) or NAME.fullmatch(name) is None:
        raise ConfigError(f"{where}: {name!r} is no name of a key: letters, digits, '_', '.' and '-', 63 at most")
