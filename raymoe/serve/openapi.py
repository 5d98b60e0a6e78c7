"""The server's own description at /openapi.json: as true as a test can make sure of.

FastAPI writes the requests down from their models. Answers are rendered without models, for speed, and errors are
OpenAI's instead of FastAPI's own; both are added here.
"""

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from raymoe.serve.answers import (
    Answer,
    ChatAnswer,
    CompletionAnswer,
    DetokenizeAnswer,
    ErrorAnswer,
    HealthAnswer,
    ModelAnswer,
    ModelsAnswer,
    SettingsAnswer,
    StatsAnswer,
    TokenizeAnswer,
)

ANSWERS: dict[tuple[str, str], type[Answer]] = {
    ("post", "/v1/chat/completions"): ChatAnswer,
    ("post", "/v1/completions"): CompletionAnswer,
    ("get", "/v1/models"): ModelsAnswer,
    ("get", "/v1/models/{name}"): ModelAnswer,
    ("post", "/tokenize"): TokenizeAnswer,
    ("post", "/detokenize"): DetokenizeAnswer,
    ("get", "/v1/stats"): StatsAnswer,
    ("get", "/v1/admin/settings"): SettingsAnswer,
    ("post", "/v1/admin/settings"): SettingsAnswer,
    ("get", "/health"): HealthAnswer,
}
STREAMS = ("/v1/chat/completions", "/v1/completions")
EVENT = {
    "type": "object",
    "description": "One event of a stream.",
    "properties": {
        "data": {"type": "string", "description": "A chunk or an error as JSON; of the last event, [DONE]."}
    },
    "required": ["data"],
}
ERRORS = {
    "400": "The request is wrong; `param` names the field.",
    "401": "No API key, or an incorrect one.",
    "403": "This key, or this client, may not do that.",
    "404": "No such model or path.",
    "413": "The body is too large.",
    "429": "Too many requests, by this key or altogether; see Retry-After.",
    "500": "An unexpected failure; the server's log says more.",
    "503": "The engine is starting, restarting, draining or gone; see Retry-After.",
    "504": "The request took longer than serving.request_timeout_s.",
}
OPEN_PATHS = ("/health",)  # need no key ever
REFERENCE = "#/components/schemas/{model}"


def describe_api(app: FastAPI, *, needs_keys: bool) -> None:
    """Let ``app`` tell the truth of itself."""
    plain = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = completed(plain(), needs_keys=needs_keys)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def completed(document: dict[str, Any], *, needs_keys: bool) -> dict[str, Any]:
    """FastAPI's document with the answers and errors of each route, and keys."""
    components = document.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    models: list[type[BaseModel]] = [*ANSWERS.values(), ErrorAnswer]
    _, answers = models_json_schema([(model, "serialization") for model in models], ref_template=REFERENCE)
    schemas.update(answers["$defs"])
    components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            operation["responses"] = _responses(method, path, operation["responses"])
            operation["security"] = [{"key": []}] if needs_keys and path not in OPEN_PATHS else []
    return document


def _responses(method: str, path: str, known: dict[str, Any]) -> dict[str, Any]:
    """All answers of one operation; routes of others keep what they say of themselves."""
    responses = {status: answer for status, answer in known.items() if status != "422"}
    if (method, path) in ANSWERS:
        content = {"application/json": _schema(ANSWERS[method, path])}
        if path in STREAMS:
            content["text/event-stream"] = {"schema": EVENT}
        responses["200"] = {"description": "The answer.", "content": content}
    told = {"application/json": _schema(ErrorAnswer)}
    for status, description in ERRORS.items():
        responses.setdefault(status, {"description": description, "content": told})
    if path == "/health":
        content = {"application/json": _schema(HealthAnswer)}
        responses["503"] = {"description": "Generation does not work now.", "content": content}
    return responses


def _schema(model: type[Answer]) -> dict[str, Any]:
    return {"schema": {"$ref": REFERENCE.format(model=model.__name__)}}
