"""POST /tokenize and /detokenize: what a prompt is in tokens, and back."""

from collections.abc import Callable
from typing import Annotated, Any, Self

from pydantic import ConfigDict, Field, model_validator

from raymoe.engine.request import Chat
from raymoe.serve.backend import Backend
from raymoe.serve.fields import Schema, Text, refuse
from raymoe.serve.schema import MAX_MESSAGES, MAX_TOOLS, Message
from raymoe.serve.tool_schema import Tool

MAX_TOKENS = 4_000_000  # of one request; a body holds no more


class TokenizeRequest(Schema):
    """The body of POST /tokenize: a text, or a conversation as the chat template writes it."""

    model_config = ConfigDict(extra="forbid")

    model: Text | None = None
    prompt: Text | None = None
    messages: list[Message] | None = Field(None, min_length=1, max_length=MAX_MESSAGES)
    tools: list[Tool] | None = Field(None, max_length=MAX_TOOLS)

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise refuse("prompt", 'give either "prompt", a text, or "messages"')
        return self


class DetokenizeRequest(Schema):
    """The body of POST /detokenize."""

    model_config = ConfigDict(extra="forbid")

    model: Text | None = None
    tokens: Annotated[list[int], Field(max_length=MAX_TOKENS)]


class Tokens:
    """Encodes and decodes as the engine does."""

    def __init__(self, backend: Backend, check_model: Callable[[str | None], None]) -> None:
        self._backend = backend
        self._check_model = check_model

    async def tokenize(self, request: TokenizeRequest) -> dict[str, Any]:
        """POST /tokenize."""
        self._check_model(request.model)
        if request.messages is not None:
            messages = [message.for_template() for message in request.messages]
            tools = [tool.model_dump(exclude_none=True) for tool in request.tools or ()]
            tokens = await self._backend.tokenize(Chat(messages=messages, tools=tools))
        else:
            assert request.prompt is not None
            tokens = await self._backend.tokenize(request.prompt)
        context = (await self._backend.card()).get("context")
        return {"count": len(tokens), "max_model_len": context, "tokens": tokens}

    async def detokenize(self, request: DetokenizeRequest) -> dict[str, Any]:
        """POST /detokenize."""
        self._check_model(request.model)
        return {"prompt": await self._backend.detokenize(request.tokens)}
