"""Renders overlays as ``kubectl apply -k`` would, offline."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import yaml

from raymoe.serve.key_source import add_key

ROOT = Path(__file__).parents[2]
K8S = ROOT / "k8s"
OVERLAYS = sorted(path.name for path in (K8S / "overlays").iterdir())
TIMEOUT_S = 60

Document = dict[str, Any]


def kubectl() -> str | None:
    """The program that renders; kustomize is a part of it."""
    return shutil.which("kubectl")


def copied(to: Path) -> Path:
    """k8s/ in ``to``, with the files that whoever deploys it makes: API keys and a password."""
    copy = to / "k8s"
    shutil.copytree(K8S, copy, ignore=shutil.ignore_patterns("keys.yaml", "redis.env"))
    add_key(copy / "base" / "keys.yaml", "me")
    (copy / "overlays" / "ft" / "redis.env").write_text("password=0123456789abcdef\n")
    return copy


def rendered(overlay: Path) -> list[Document]:
    """All documents of an overlay. Raises AssertionError with kubectl's words where it can't be rendered."""
    program = kubectl()
    assert program is not None, "kubectl is not here"
    done = subprocess.run([program, "kustomize", str(overlay)], capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, f"{overlay.name} does not render: {done.stderr}"
    return [document for document in yaml.safe_load_all(done.stdout) if document]
