"""POST /v1/chat/completions and /v1/completions: from a request to its answers."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING

from fastapi.responses import JSONResponse, Response

from raymoe.engine.request import Chat, SamplingParams
from raymoe.errors import RequestError
from raymoe.serve.backend import Backend
from raymoe.serve.batch import Batch, merge
from raymoe.serve.choices import Answers, params_of
from raymoe.serve.errors import ModelNotFoundError, describe, unwrap
from raymoe.serve.render import ChatRenderer, CompletionRenderer, Renderer
from raymoe.serve.schema import ChatRequest, CompletionRequest, GenerationRequest
from raymoe.serve.streaming import EventStream, events
from raymoe.serve.tools import call_grammar

if TYPE_CHECKING:
    from raymoe.engine.prompts import Prompt


class Answering:
    """Answers requests for text.

    Args:
        model: the served model's name.
        most_choices: answers of one request, over all of its prompts, that the engine could hold at a time.
    """

    def __init__(self, backend: Backend, model: str, most_choices: int) -> None:
        self._backend = backend
        self._model = model
        self._most_choices = most_choices

    async def chat(self, request: ChatRequest) -> Response:
        """POST /v1/chat/completions."""
        try:
            self.check_model(request.model)
            params = request.sampling
            if request.offered_tools:
                params = await self._with_tools(request, params)
            prompt = Chat(messages=request.conversation, tools=request.offered_tools)
            renderer = ChatRenderer(
                self._model,
                include_usage=request.include_usage,
                logprobs=bool(request.logprobs),
                per_prompt=request.answers_per_prompt,
                tools=bool(request.offered_tools),
            )
            return await self._answer(request, [prompt], params, renderer)
        except Exception as error:  # the edge of the process
            return describe(_by_its_field(error, request)).response()

    async def complete(self, request: CompletionRequest) -> Response:
        """POST /v1/completions."""
        try:
            self.check_model(request.model)
            renderer = CompletionRenderer(
                self._model,
                include_usage=request.include_usage,
                logprobs=request.logprobs is not None,
                per_prompt=request.answers_per_prompt,
                echoes=await self._echoes(request) if request.echo else None,
            )
            return await self._answer(request, list(request.prompts), request.sampling, renderer)
        except Exception as error:  # the edge of the process
            return describe(error).response()

    def check_model(self, name: str | None) -> None:
        """Raises ModelNotFoundError for another model than the served one."""
        if name is not None and name != self._model:
            raise ModelNotFoundError(f'the model "{name}" does not exist; "{self._model}" is served here')

    async def _answer(
        self, request: GenerationRequest, prompts: "list[Prompt]", params: SamplingParams, renderer: Renderer
    ) -> Response:
        """Wait for the first batches, so that what goes wrong until then has its own HTTP status."""
        number = len(prompts) * request.answers_per_prompt
        if number > self._most_choices:
            raise RequestError(
                f"{len(prompts)} prompts x n {request.answers_per_prompt} are {number} answers; this server makes at "
                f"most {self._most_choices} of one request: ask in parts",
                param="prompt" if len(prompts) > 1 else "n",
            )
        streams: list[AsyncGenerator[Batch]] = [
            self._backend.stream(prompt, params_of(params, choice))
            for prompt in prompts
            for choice in range(request.answers_per_prompt)
        ]
        answers = await Answers.begin(streams)
        if request.stream:
            return EventStream(events(answers, renderer, include_usage=request.include_usage), answers)
        async with aclosing(answers):
            return JSONResponse(renderer.whole(merge([batch async for batch in answers])))

    async def _with_tools(self, request: ChatRequest, params: SamplingParams) -> SamplingParams:
        """Let answers that must call a tool do nothing else. Raises RequestError where the model knows no tools."""
        known = (await self._backend.card()).get("tool_format")
        if known is None:
            raise RequestError(
                "this model's chat template takes no tools; leave them out, or serve a model that was trained for them",
                param="tools",
            )
        if not request.must_call:
            return params
        if known != "hermes":
            raise RequestError(
                'how this model writes calls is not known here, so none can be made sure of; use "tool_choice": "auto" '
                "and read its text",
                param="tool_choice",
            )
        parallel = request.parallel_tool_calls is not False and request.tool_choice == "required"
        return replace(params, grammar=call_grammar(request.callable_tools, parallel=parallel))

    async def _echoes(self, request: CompletionRequest) -> list[str]:
        """The prompts as texts."""
        return [
            prompt if isinstance(prompt, str) else await self._backend.detokenize(prompt) for prompt in request.prompts
        ]


def _by_its_field(error: Exception, request: ChatRequest) -> BaseException:
    """A grammar's error names the field that the grammar came from."""
    own = unwrap(error)
    if not isinstance(own, RequestError) or own.param != "grammar" or request.grammar is not None:
        return own
    return RequestError(str(own), param="tools" if request.must_call else "response_format")
