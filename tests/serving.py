"""Real servers for tests: Ray and Serve in this process's own cluster, one application after the other."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import ray
from ray import serve
from ray.serve.handle import DeploymentHandle

from raymoe.config import EMBEDDED_MODEL, ClusterConfig
from raymoe.serve.app import build_application
from tests.waiting import WAIT_S

TOOL_TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool.function | tojson }}\n{% endfor %}"
    "{% for m in messages %}{% if m.tool_calls %}"
    "{% for call in m.tool_calls %}<tool_call>\n{{ call.function | tojson }}\n</tool_call>{% endfor %}"
    "{% else %}{{ m['content'] }}{% endif %}\n{% endfor %}"
)
"""A chat template in the manner of Hermes, for the embedded model, which was trained with none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """A running application, and how to reach it."""

    url: str
    handle: DeploymentHandle

    def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        return httpx.post(f"{self.url}{path}", json=body, timeout=WAIT_S, **options)

    def get(self, path: str, **options: Any) -> httpx.Response:
        return httpx.get(f"{self.url}{path}", timeout=WAIT_S, **options)

    def client(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, timeout=WAIT_S, max_retries=0)

    def async_client(self, key: str = "none") -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key=key, timeout=WAIT_S, max_retries=0)


@contextmanager
def serving() -> Iterator[str]:
    """Ray and Serve on a free port; the base URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        yield f"http://127.0.0.1:{port}"
        serve.shutdown()
    finally:
        ray.shutdown()


def run_application(url: str, config: dict[str, Any], name: str) -> Served:
    """The embedded model, or the one of ``config``, in float32 in the engine's own process, under the path ``name``."""
    whole = {
        "devices": [{"name": "edge-0", "transport": "local"}],
        **config,
        "model": {"dtype": "float32", "name": "tiny-moe", **config.get("model", {})},
    }
    application = build_application(ClusterConfig.model_validate(whole))
    return Served(url=f"{url}/{name}", handle=serve.run(application, name=name, route_prefix=f"/{name}"))


def with_template(directory: Path, template: str) -> Path:
    """The embedded model with another chat template, in ``directory``."""
    for file in EMBEDDED_MODEL.iterdir():
        if file.name != "chat_template.jinja":
            (directory / file.name).symlink_to(file)
    (directory / "chat_template.jinja").write_text(template)
    return directory
