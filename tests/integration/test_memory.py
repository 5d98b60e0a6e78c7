"""An engine whose experts live in worker processes holds none of them."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.decode import ENGINE_MEMORY
from raymoe.checkpoint.opening import open_checkpoint
from raymoe.checkpoint.synth import write_synthetic

pytestmark = pytest.mark.integration


def test_the_engines_memory_grows_by_its_trunk_not_by_the_experts(tmp_path: Path) -> None:
    path = tmp_path / "synth"
    write_synthetic(path, like="qwen3_moe", size_bytes=400_000_000, seed=0)
    checkpoint = open_checkpoint(path)
    command = [sys.executable, "-c", ENGINE_MEMORY, str(path)]
    grown = int(subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stdout.split()[-1])
    assert checkpoint.routed_bytes > 300_000_000
    assert grown < checkpoint.trunk_bytes + 0.3 * checkpoint.routed_bytes
