"""The images' recipes: clean by hadolint, of this release, and followed right."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.manifests.references import release, variants
from tests.manifests.rendering import K8S, ROOT

IMAGES = K8S / "images"
RECIPES = sorted(path.name for path in IMAGES.glob("*ockerfile"))
sys.path.insert(0, str(IMAGES))
from follow import Follower, Stage, instructions  # noqa: E402  a script, not a package's module


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_is_clean(recipe: str) -> None:
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not here")
    done = subprocess.run([hadolint, "--no-color", str(IMAGES / recipe)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")


def test_all_variants_have_a_recipe_of_this_release() -> None:
    assert variants() == {"cpu", "cuda", "jetson"}
    tags = [tag for recipe in RECIPES for tag in re.findall(r"-t raymoe:([\d.]+)-\w+", (IMAGES / recipe).read_text())]
    assert len(tags) == 3 and set(tags) == {release()}


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_last_stage_installs_no_build_tools_and_is_no_root(recipe: str) -> None:
    words = list(instructions((IMAGES / recipe).read_text()))
    last = words[max(index for index, (word, _) in enumerate(words) if word == "FROM") :]
    assert ("USER", "1000:1000") in last
    ran = " ".join(rest for word, rest in last if word == "RUN")
    assert "wget" in ran and not re.search(r"\b(g\+\+|gcc|make|build-essential|git|pip)\b", ran)
    assert not any(word in ("COPY", "ADD") and "--from=" not in rest for word, rest in last)


def test_pins_are_those_of_the_constraints() -> None:
    (torch,) = re.findall(r"torch==([\d.]+)", (IMAGES / "Dockerfile").read_text())
    assert f"torch=={torch}\n" in (ROOT / "constraints.txt").read_text()
    python = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert python == ">=3.11,<3.14" and "python:3.11." in (IMAGES / "Dockerfile").read_text()


# --- following ------------------------------------------------------------------------------------------


def test_instructions_are_joined_and_comments_left_out() -> None:
    text = '# a\nFROM x AS y\nRUN one \\\n    # inner\n    && two\n\nCMD ["z"]\n'
    assert list(instructions(text)) == [("FROM", "x AS y"), ("RUN", "one && two"), ("CMD", '["z"]')]


def test_variables_are_expanded_as_docker_does(tmp_path: Path) -> None:
    stage = Stage(name="s", root=tmp_path, variables={"PATH": "/bin"}, arguments={"A": "1"})
    assert stage.expand("/opt/bin:$PATH ${A}$B") == "/opt/bin:/bin 1"


def test_files_are_copied_where_docker_would_put_them(tmp_path: Path) -> None:
    follower = Follower(tmp_path / "base.tar", tmp_path, {}, [])
    follower._stage = stage = Stage(name="s", root=tmp_path / "s", directory="/source")
    follower._copy("pyproject.toml LICENSE ./")
    follower._copy("deployments deployments")
    assert (stage.root / "source" / "LICENSE").is_file()
    assert (stage.root / "source" / "deployments" / "app.py").is_file()
    assert not (stage.root / "source" / "deployments" / "__pycache__").exists()


def test_an_instruction_that_is_not_known_is_named(tmp_path: Path) -> None:
    recipe = tmp_path / "Dockerfile"
    recipe.write_text("ONBUILD RUN x\n")
    with pytest.raises(SystemExit, match="ONBUILD is not followed; known are ARG"):
        Follower(tmp_path / "base.tar", tmp_path, {}, []).follow(recipe)
