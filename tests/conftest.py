"""Fixtures that several test files share."""

import os

# before Ray is imported anywhere: no token files in the home directory, no usage reports, quiet logs
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_DEDUP_LOGS", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not os.path.exists("/dev/nvidiactl"):  # the GPU's kernels run in Triton's interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # one test per core: threads of one would take another's
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest

if TYPE_CHECKING:
    from tests.toy_models import Toys

# the same examples in every run; a hunt for new ones sets HYPOTHESIS_EXAMPLES
hypothesis.settings.register_profile(
    "raymoe",
    derandomize="HYPOTHESIS_EXAMPLES" not in os.environ,
    deadline=None,
    max_examples=int(os.environ.get("HYPOTHESIS_EXAMPLES", "100")),
)
hypothesis.settings.load_profile("raymoe")


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> "Toys":
    """Saves each toy once. The directories must not be written to."""
    from tests.toy_models import save_toy

    saved: dict[str, Path] = {}

    def toy(model_type: str) -> Path:
        if model_type not in saved:
            saved[model_type] = save_toy(model_type, tmp_path_factory.mktemp(model_type))
        return saved[model_type]

    return toy


@pytest.fixture(scope="module")
def ray_session() -> Iterator[None]:
    """A local Ray cluster for one test module."""
    import ray

    ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()
