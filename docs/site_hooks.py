"""Lets pages link to files beside docs/, as they do when they are read in the repository: those files join the site."""

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
FOLDER = "deployments"
KINDS = (".yaml", ".json")


def on_files(files: Files, config: Any) -> Files:
    """Add the configurations and the dashboard, as they are."""
    for path in sorted((ROOT / FOLDER).iterdir()):
        if path.suffix in KINDS:
            files.append(File.generated(config, f"{FOLDER}/{path.name}", content=path.read_bytes()))
    security = (ROOT / "SECURITY.md").read_text().replace("](docs/", "](")
    files.append(File.generated(config, "security.md", content=security))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links one folder up lead to the copies here."""
    return markdown.replace("](../deployments/", "](deployments/").replace("](../SECURITY.md", "](security.md")
