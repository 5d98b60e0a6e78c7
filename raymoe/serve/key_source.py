"""Where API keys come from: a file, which may change while the server runs, and an environment variable."""

import logging
import threading
from collections.abc import Mapping
from pathlib import Path

import yaml

from raymoe.config import ClusterConfig
from raymoe.errors import ConfigError
from raymoe.serve.keys import Key, KeyConfig, check_name, digest_of, new_key, parse_keys
from raymoe.strict import read_mapping
from raymoe.whole_file import write_whole

log = logging.getLogger("ray.serve")  # which Serve writes to the log of the replica

ENVIRONMENT = "RAYMOE_API_KEYS"
HEAD = "# API keys of raymoe, as hashes: what `raymoe keys new` printed can't be found out from here.\n"


class KeySource:
    """The keys in force.

    The file is read again when it has changed, so a new key works at once, and so does taking one out. One that can't
    be read any more leaves the keys as they were. Keys that are configured and none of which is left still mean that
    nobody may ask: only without any configuration everybody may.

    Args:
        file: of keys; raises ConfigError from the constructor where it is missing or wrong.
        fixed: further keys.
    """

    def __init__(self, file: Path | None = None, fixed: tuple[Key, ...] = ()) -> None:
        self._file = file
        self._fixed = fixed
        self._lock = threading.Lock()
        self._seen: tuple[int, int] | None = None
        self._read: tuple[Key, ...] = ()
        if file is not None:
            self._seen, self._read = _stamp(file), read_keys(file)

    @property
    def required(self) -> bool:
        """Whether requests need a key."""
        return self._file is not None or bool(self._fixed)

    def keys(self) -> tuple[Key, ...]:
        """All keys."""
        if self._file is None:
            return self._fixed
        with self._lock:
            stamp = _stamp(self._file)
            if stamp != self._seen:
                self._seen = stamp
                try:
                    self._read = read_keys(self._file)
                    log.info("%s was read again: %d keys", self._file, len(self._read))
                except ConfigError as error:
                    log.error("the keys stay as they were: %s", error)
            return self._fixed + self._read


def needs_keys(config: ClusterConfig, environment: Mapping[str, str]) -> bool:
    """Whether a server of this configuration, started here, will ask for keys."""
    return config.serving.keys_file is not None or bool(environment.get(ENVIRONMENT))


def read_keys(file: Path) -> tuple[Key, ...]:
    """The keys of a file. Raises ConfigError that names it."""
    return parse_keys(read_mapping(file, "file of keys", "names of keys"), str(file))


def environment_keys(environment: Mapping[str, str]) -> tuple[Key, ...]:
    """The keys of the environment variable, which has the form of a file of keys. Raises ConfigError."""
    text = environment.get(ENVIRONMENT)
    if not text:
        return ()
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError:
        data = None
    if not isinstance(data, dict):
        raise ConfigError(
            f"{ENVIRONMENT} must hold YAML such as `raymoe keys new NAME --file FILE` writes: {{alice: {{sha256: …}}}}"
        )
    return parse_keys(data, ENVIRONMENT)


def add_key(
    file: Path, name: str, *, requests_per_minute: int | None = None, concurrent: int | None = None, admin: bool = False
) -> str:
    """Make a key, add its hash to a file (created for its owner only), and return it.

    Raises ConfigError for a name that is none or is taken, and where the file is wrong or can't be written.
    """
    check_name(name, "raymoe keys new")
    if file.exists() and file.stat().st_size and any(key.name == name for key in read_keys(file)):
        raise ConfigError(f'{file} has a key "{name}" already; choose another name, or delete its lines first')
    key = new_key()
    config = KeyConfig(
        sha256=digest_of(key).hex(), requests_per_minute=requests_per_minute, concurrent=concurrent, admin=admin
    )
    entry = yaml.safe_dump({name: config.model_dump(exclude_defaults=True)}, sort_keys=False)
    before = file.read_text() if file.exists() else ""
    write_whole(file, (before or HEAD) + entry, 0o600)
    return key


def _stamp(file: Path) -> tuple[int, int] | None:
    """Changes when the file does; None where it is gone."""
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size
