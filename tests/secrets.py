"""Every CURVE secret that the processes of a Ray cluster make, so that a test can look for it where it must not be."""

import logging
import os
from pathlib import Path
from typing import Any

import zmq

FILE = "RAYMOE_TEST_SECRETS"


def noting() -> None:
    """Called by Ray at the start of each process: note keys as they are made, and log all there is to log."""
    logging.basicConfig(level=logging.DEBUG)
    make, file = zmq.curve_keypair, Path(os.environ[FILE])

    def noted() -> tuple[bytes, bytes]:
        public, secret = make()
        with file.open("ab") as out:  # short appends are whole, whoever else writes
            out.write(secret + b" " + str(os.getpid()).encode() + b"\n")
        return public, secret

    zmq.curve_keypair = noted


def runtime_env(file: Path) -> dict[str, Any]:
    """Ray's option that makes every process of a job note its keys in ``file``."""
    variables = {FILE: str(file), "PYTHONPATH": str(Path(__file__).parents[1])}  # where they find this module
    return {"worker_process_setup_hook": noting, "env_vars": variables}


def noted_secrets(file: Path) -> dict[bytes, int]:
    """Secret (in Z85) and process, of all keys made so far."""
    lines = file.read_bytes().splitlines() if file.exists() else []
    pairs = (line.rpartition(b" ")[::2] for line in lines)
    return {secret: int(pid) for secret, pid in pairs}


def forms(secret: bytes) -> set[bytes]:
    """How a secret might show: in Z85 as it is used, or escaped by ``repr``; as its 32 bytes, or in hexadecimal."""
    raw = zmq.utils.z85.decode(secret)
    return {secret, repr(secret)[2:-1].encode(), raw, raw.hex().encode()}
