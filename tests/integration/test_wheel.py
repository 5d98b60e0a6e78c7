"""The wheel, outside of the checkout: what is in it, and that it serves from a clean environment.

The environment is new but for what raymoe depends on, which it finds where these tests have it.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import yaml

from tests.waiting import WAIT_S, until

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
SOURCES = ("LICENSE", "README.md", "pyproject.toml", "deployments", "predictor", "raymoe")
SERVE = "from ray.serve.scripts import cli; cli()"  # what the command of this name calls


@dataclass(frozen=True, kw_only=True)
class Installed:
    """An environment with the wheel, and an empty directory to work in."""

    wheel: Path
    python: Path
    directory: Path

    def environment(self) -> dict[str, str]:
        """As in a shell without the checkout; Ray is one of its own."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PYTEST"))}
        return {**kept, "RAY_ADDRESS": "local", "XDG_CACHE_HOME": str(self.directory / "cache")}

    def run(self, *command: str) -> str:
        done = subprocess.run(
            [str(self.python), *command],
            cwd=self.directory,
            env=self.environment(),
            capture_output=True,
            text=True,
            timeout=WAIT_S,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    place = tmp_path_factory.mktemp("wheel")
    source, directory = place / "source", place / "empty"
    source.mkdir()
    directory.mkdir()
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(place), str(source)]
    subprocess.run(build, check=True, timeout=WAIT_S)
    shutil.rmtree(source)
    (wheel,) = place.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(place / "venv")], check=True, timeout=WAIT_S)
    python = place / "venv" / "bin" / "python"
    subprocess.run([*pip, "--python", str(python), "install", "--no-deps", str(wheel)], check=True, timeout=WAIT_S)
    packages = next((place / "venv" / "lib").glob("python*/site-packages"))
    # a path, not a site directory: what is there is found, but no editable install of the checkout comes along
    (packages / "dependencies.pth").write_text(str(Path(pytest.__file__).parents[1]) + "\n")
    return Installed(wheel=wheel, python=python, directory=directory)


def test_all_that_runs_is_in_it_and_nothing_else(installed: Installed) -> None:
    names = zipfile.ZipFile(installed.wheel).namelist()
    needed = {
        "raymoe/assets/tiny-moe/model.safetensors",
        "raymoe/assets/tiny-moe/tokenizer.json",
        "raymoe/kernels/native.cpp",
        "raymoe/kernels/turns.cpp",
        "raymoe/serve/page/index.html",
        "deployments/app.py",
        "deployments/local.yaml",
        "deployments/serve-local.yaml",
        "deployments/grafana-dashboard.json",
    }
    assert needed <= set(names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"raymoe", "predictor", "deployments"}
    sources = {path.relative_to(ROOT) for name in SOURCES[3:] for path in (ROOT / name).rglob("*") if path.is_file()}
    expected = {str(path) for path in sources if path.suffix not in (".pyc", ".so")}
    assert expected - set(names) == set()


def test_the_command_and_the_builder_are_the_installed_ones(installed: Installed) -> None:
    files = installed.run("-c", "import raymoe, deployments, predictor; print(raymoe.__file__, deployments.__file__)")
    assert all(Path(file).is_relative_to(installed.python.parents[1]) for file in files.split())
    assert "Serve a Mixture-of-Experts" in installed.run(str(installed.python.with_name("raymoe")), "--help")


@pytest.fixture
def config(installed: Installed) -> Path:
    """What `serve build` makes, on a free port."""
    path = installed.directory / "built.yaml"
    installed.run("-c", SERVE, "build", "deployments.app:app", "-o", str(path))
    built = yaml.safe_load(path.read_text())
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        built["http_options"] = {"host": "127.0.0.1", "port": probe.getsockname()[1]}
    path.write_text(yaml.safe_dump(built))
    return path


@pytest.fixture
def server(installed: Installed, config: Path) -> Iterator[subprocess.Popen[bytes]]:
    """`serve run`, ended as by Ctrl-C."""
    with (installed.directory / "log").open("wb") as log:
        process = subprocess.Popen(
            [str(installed.python), "-c", SERVE, "run", str(config)],
            cwd=installed.directory,
            env=installed.environment(),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(timeout=10)


def test_serve_run_answers(installed: Installed, config: Path, server: subprocess.Popen[bytes]) -> None:
    built = yaml.safe_load(config.read_text())
    (application,) = built["applications"]
    assert application["import_path"] == "deployments.app:app"
    assert {one["name"] for one in application["deployments"]} == {"engine", "ingress"}
    url = "http://{host}:{port}".format(**built["http_options"])

    def answers() -> bool:
        assert server.poll() is None, (installed.directory / "log").read_text()[-4000:]
        try:
            return httpx.get(f"{url}/health", timeout=5).status_code == 200
        except httpx.HTTPError:
            return False

    until(answers, "the first answer")
    body = {"prompt": "In the beginning God created", "max_tokens": 8, "temperature": 0}
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=WAIT_S).json()
    assert answer["usage"]["completion_tokens"] == 8 and answer["choices"][0]["text"]
