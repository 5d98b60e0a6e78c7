"""The server's own description, held against the routes over an engine that is a script."""

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode

from raymoe.serve.api import Api, create_app
from raymoe.serve.openapi import ANSWERS
from tests.unit.test_serve_api import Script


class Engine(Script):
    """A script that answers everything."""

    async def card(self) -> dict[str, Any]:
        return {"name": "tiny", "context": 10, "tool_format": "hermes"}

    async def tokenize(self, prompt: Any) -> list[int]:
        return [1, 2]

    async def detokenize(self, token_ids: list[int]) -> str:
        return "ab"

    async def settings(self) -> dict[str, Any]:
        return {"alpha": 0.1}

    async def change_settings(self, changes: dict[str, Any]) -> dict[str, Any]:
        return {"alpha": 0.1, **changes}


APP = create_app(Api(Engine(), "tiny"))
JUDGED_BY_THE_ENGINE = ("/v1/chat/completions", "/v1/completions")  # ranges of numbers
ASKED = [(GenerationMode.POSITIVE, method, path) for method, path in ANSWERS] + [
    (GenerationMode.NEGATIVE, method, path)
    for method, path in ANSWERS
    if method == "post" and path not in JUDGED_BY_THE_ENGINE
]


@pytest.mark.parametrize(("mode", "method", "path"), ASKED)
def test_routes_do_what_they_say(mode: GenerationMode, method: str, path: str) -> None:
    description: Any = schemathesis.openapi.from_asgi("/openapi.json", APP)

    @given(case=description[path][method.upper()].as_strategy(generation_mode=mode))
    @settings(max_examples=60, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
    def check(case: schemathesis.Case) -> None:
        case.call_and_validate(excluded_checks=[schemathesis.checks.positive_data_acceptance])

    check()


@pytest.mark.parametrize("path", JUDGED_BY_THE_ENGINE)
def test_streams_are_what_is_said_of_them(path: str) -> None:
    description: Any = schemathesis.openapi.from_asgi("/openapi.json", APP)
    body = {"prompt": "x"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "x"}]}
    case = description[path]["POST"].Case(body={**body, "stream": True}, media_type="application/json")
    answer = case.call_and_validate(excluded_checks=[schemathesis.checks.positive_data_acceptance])
    assert answer.headers["content-type"][0].startswith("text/event-stream")


def test_every_route_is_described_and_none_by_fastapis_own_errors() -> None:
    document = APP.openapi()
    described = {(method, path) for path, operations in document["paths"].items() for method in operations}
    assert described == set(ANSWERS)
    for path, operations in document["paths"].items():
        for operation in operations.values():
            assert "422" not in operation["responses"]
            assert {"200", "400", "401", "403", "429", "503"} <= set(operation["responses"]), path
    assert "HTTPValidationError" not in document["components"]["schemas"]
