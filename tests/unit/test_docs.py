"""What documentation promises exists: every relative link resolves, every command and target it names is there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from raymoe import cli

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "SECURITY.md", *(ROOT / "docs").glob("*.md")])
CODE = re.compile(r"```.*?```|`[^`\n]+`", re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def names(pages: list[Path]) -> list[str]:
    return [str(page.relative_to(ROOT)) for page in pages]


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub and MkDocs make them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {text.strip().replace(" ", "-") for text in plain}


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_every_relative_link_resolves(page: Path) -> None:
    for target in LINK.findall(CODE.sub("", page.read_text())):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), f"{page.name} links to {target}"
        if anchor and found.suffix == ".md":
            assert anchor in anchors(found), f"{page.name} links to {target}"


def known_commands() -> set[str]:
    """As ``raymoe predictor eval``."""
    group = typer.main.get_command(cli.app)
    found = set()
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        found.add(name)
        found |= {f"{name} {inner}" for inner in getattr(command, "commands", {})}
    return found


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_every_command_and_target_exists(page: Path) -> None:
    code = "\n".join(CODE.findall(page.read_text()))
    commands, groups = known_commands(), {name.split()[0] for name in known_commands() if " " in name}
    for first, second in re.findall(r"(?:^|`)(?:[A-Z_]+=\S+ )?raymoe ([a-z]+)(?: ([a-z]+))?\b", code, re.MULTILINE):
        asked = f"{first} {second}" if first in groups else first
        assert asked in commands, f"{page.name} names `raymoe {asked}`"
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for target in re.findall(r"(?:^|[`\s])make ([a-z-]+)", code, re.MULTILINE):
        assert target in targets, f"{page.name} names `make {target}`"
    for module in re.findall(r"python -m benchmarks\.([a-z]\w*)", code):
        assert (ROOT / "benchmarks" / f"{module}.py").exists(), f"{page.name} names benchmarks.{module}"


def test_the_site_builds_strictly(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason='the site needs mkdocs-material: pip install "raymoe[dev]"')
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    page = (tmp_path / "site" / "index.html").read_text()
    assert not re.findall(r'(?:src|<link[^>]+href)="https?://[^"]+\.(?:css|js|woff2?)', page), "nothing from elsewhere"
    assert (tmp_path / "site" / "deployments" / "edge.yaml").exists()
