"""What clients may send: OpenAI's chat and text completion requests, with this server's extensions.

Unknown fields are refused, as OpenAI does. Known ones that mean nothing here are taken and ignored; known ones that
would change the answer but aren't supported are refused, so that nobody takes an answer for what it isn't. Numbers
have their ranges checked by the engine, which knows the model; types, shapes and sizes are checked here.
"""

from typing import Annotated, Any, Self, cast

from pydantic import BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator

from raymoe.config import Quality
from raymoe.engine.request import SamplingParams
from raymoe.serve.fields import (
    BIAS_JSON,
    CONTENT_JSON,
    PROMPT_JSON,
    QUALITY_JSON,
    Only,
    Schema,
    Text,
    as_biases,
    as_list,
    as_prompt,
    as_quality,
    as_text,
    one_or_several,
    refuse,
)
from raymoe.serve.tool_schema import NamedTool, ResponseFormat, Tool, ToolCall, ToolChoice, schema_of

COMPLETION_MAX_TOKENS = 16  # OpenAI's default of /v1/completions
MAX_LOGPROBS = 20  # OpenAI's limit of top_logprobs, which the engine shares
MAX_STOPS = 4  # OpenAI's; each stop string costs a search per token
MAX_STOP_CHARS = 1024
MAX_STOP_TOKENS = 64
MAX_N = 8
MAX_MESSAGES = 4096
MAX_TOOLS = 128  # OpenAI's

Stop = Annotated[Text, Field(max_length=MAX_STOP_CHARS)]
Stops = Annotated[
    list[Stop],
    BeforeValidator(as_list),
    Field(max_length=MAX_STOPS),
    WithJsonSchema(one_or_several({"type": "string", "maxLength": MAX_STOP_CHARS}, MAX_STOPS)),
]
StopTokens = Annotated[
    list[int],
    BeforeValidator(as_list),
    Field(max_length=MAX_STOP_TOKENS),
    WithJsonSchema(one_or_several({"type": "integer"}, MAX_STOP_TOKENS)),
]
Biases = Annotated[dict[int, float], BeforeValidator(as_biases), WithJsonSchema(BIAS_JSON)]
Ignored = Annotated[Any, Field(description="Taken and ignored.")]


class Message(Schema):
    """One turn of a conversation."""

    role: Text
    content: Annotated[Text, BeforeValidator(as_text), WithJsonSchema(CONTENT_JSON)]
    name: Text | None = None
    tool_calls: list[ToolCall] | None = Field(None, max_length=MAX_TOOLS)
    tool_call_id: Text | None = None

    @model_validator(mode="before")
    @classmethod
    def _calls_need_no_content(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("tool_calls") and data.get("content") is None:
            return {**data, "content": ""}
        return data

    def for_template(self) -> dict[str, Any]:
        """As chat templates take it; "developer" is what OpenAI calls the system's voice now."""
        plain = self.model_dump(exclude_none=True, exclude_unset=True)
        return {**plain, "role": "system" if self.role == "developer" else self.role}


class StreamOptions(Schema):
    """What a stream tells beside text."""

    include_usage: bool | None = None
    include_obfuscation: Ignored = None


class GenerationRequest(Schema):
    """What chat and text completion share.

    ``top_k``, ``min_p``, ``repetition_penalty``, ``stop_token_ids``, ``ignore_eos``, ``grammar`` and ``priority`` are
    extensions that other servers have too; ``quality`` is this one's own. Over HTTP nobody can push ahead of others:
    priorities below 0 are for Python.
    """

    model_config = ConfigDict(extra="forbid")

    model: Text | None = Field(None, description="The served model's name; may be omitted, as there is one only.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1, le=MAX_N, description="Answers to make of each prompt.")
    max_tokens: int | None = Field(None, json_schema_extra={"minimum": 1})
    temperature: float | None = Field(None, json_schema_extra={"minimum": 0, "maximum": 2})
    top_p: float | None = Field(None, json_schema_extra={"minimum": 0, "maximum": 1})
    top_k: int | None = Field(None, json_schema_extra={"minimum": -1})
    min_p: float | None = Field(None, json_schema_extra={"minimum": 0, "maximum": 1})
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stop: Stops = Field(default_factory=list)
    stop_token_ids: StopTokens = Field(default_factory=list)
    ignore_eos: bool | None = None
    presence_penalty: float | None = Field(None, json_schema_extra={"minimum": -2, "maximum": 2})
    frequency_penalty: float | None = Field(None, json_schema_extra={"minimum": -2, "maximum": 2})
    repetition_penalty: float | None = Field(None, json_schema_extra={"minimum": 0.01, "maximum": 10})
    logit_bias: Biases = Field(default_factory=dict)
    grammar: Text | None = Field(None, description="The answer follows this grammar, in llguidance's Lark form.")
    quality: Annotated[str | float | None, BeforeValidator(as_quality), WithJsonSchema(QUALITY_JSON)] = Field(
        None,
        description='How freely experts may be replaced: "exact", "balanced", "fast", or an alpha from 0 to the '
        "server's scheduling.alpha_max; omitted: as the server is configured.",
    )
    priority: int | None = Field(None, ge=0, le=1000, description="More is later: a step of one is 10 s of waiting.")
    user: Ignored = None
    metadata: Ignored = None
    store: Ignored = None
    service_tier: Ignored = None
    safety_identifier: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_retention: Ignored = None

    @model_validator(mode="after")
    def _stream_options_need_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise refuse("stream_options", '"stream_options" needs "stream": true')
        return self

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk of usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def answers_per_prompt(self) -> int:
        """How many."""
        return self.n or 1

    def _sampling(self, max_tokens: int | None, logprobs: int | None, schema: Any = None) -> SamplingParams:
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            seed=self.seed,
            stop=tuple(self.stop),
            stop_token_ids=tuple(self.stop_token_ids),
            ignore_eos=bool(self.ignore_eos),
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logprobs=logprobs,
            logit_bias=self.logit_bias,
            grammar=self.grammar,
            json_schema=schema,
            quality=cast("Quality | None", self.quality),
            priority=self.priority or 0,
        )


class ChatRequest(GenerationRequest):
    """The body of POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = Field(None, json_schema_extra={"minimum": 1})
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = Field(None, max_length=MAX_TOOLS)
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Ignored = None
    verbosity: Ignored = None
    functions: Annotated[Any, Only([], hint='use "tools"')] = None
    function_call: Annotated[Any, Only("auto", "none", hint='use "tool_choice"')] = None
    modalities: Annotated[Any, Only(["text"], hint="this model writes text only")] = None
    audio: Annotated[Any, Only(hint="this model writes text only")] = None
    prediction: Annotated[Any, Only()] = None
    web_search_options: Annotated[Any, Only()] = None

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise refuse("top_logprobs", '"top_logprobs" needs "logprobs": true')
        if self.tool_choice not in (None, "none") and not self.tools:
            raise refuse("tool_choice", '"tool_choice" needs "tools"')
        forms = [self.grammar is not None, schema_of(self.response_format) is not None, self.must_call]
        if sum(forms) > 1:
            raise refuse(
                "response_format", '"response_format", "grammar" and a "tool_choice" that must call exclude each other'
            )
        if isinstance(self.tool_choice, NamedTool) and not self.callable_tools:
            raise refuse("tool_choice", f'"tool_choice" names {self.tool_choice.function.name!r}, which no tool has')
        return self

    @property
    def must_call(self) -> bool:
        """Whether the answer must be a call of a tool."""
        return self.tool_choice == "required" or isinstance(self.tool_choice, NamedTool)

    @property
    def offered_tools(self) -> list[dict[str, Any]]:
        """The tools that the model is told of, as chat templates take them."""
        if self.tool_choice == "none":
            return []
        return [tool.model_dump(exclude_none=True) for tool in self.tools or ()]

    @property
    def callable_tools(self) -> list[dict[str, Any]]:
        """Those of them that the answer may call."""
        if not isinstance(self.tool_choice, NamedTool):
            return self.offered_tools
        return [tool for tool in self.offered_tools if tool["function"]["name"] == self.tool_choice.function.name]

    @property
    def conversation(self) -> list[dict[str, Any]]:
        """The messages, as chat templates take them."""
        return [message.for_template() for message in self.messages]

    @property
    def sampling(self) -> SamplingParams:
        """What the engine shall do. Without a limit the answer may fill the context."""
        limit = self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        return self._sampling(limit, logprobs, schema_of(self.response_format))


class CompletionRequest(GenerationRequest):
    """The body of POST /v1/completions."""

    prompt: Annotated[
        str | list[int] | list[str] | list[list[int]], BeforeValidator(as_prompt), WithJsonSchema(PROMPT_JSON)
    ]
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    echo: bool | None = Field(None, description="Begin each answer's text with its prompt. Not with logprobs.")
    best_of: Annotated[Any, Only(1, hint='ask for "n" answers and choose')] = None
    suffix: Annotated[Any, Only("", hint="the model continues text, it does not fill gaps")] = None

    @model_validator(mode="after")
    def _echo_has_no_logprobs(self) -> Self:
        if self.echo and self.logprobs is not None:
            raise refuse("echo", '"echo" and "logprobs" together are not supported: prompts have no log probabilities')
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """One or more."""
        if isinstance(self.prompt, list) and self.prompt and not isinstance(self.prompt[0], int):
            return self.prompt  # type: ignore[return-value]
        return [self.prompt]  # type: ignore[list-item]

    @property
    def sampling(self) -> SamplingParams:
        """What the engine shall do."""
        limit = COMPLETION_MAX_TOKENS if self.max_tokens is None else self.max_tokens
        return self._sampling(limit, self.logprobs)
