"""What answers look like, for the OpenAPI document: a test holds real answers against it."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Answer(BaseModel):
    """Base of what is answered. Fields that are not listed may be there as well."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())


class ErrorDetail(Answer):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(Answer):
    """Every failure."""

    error: ErrorDetail


class RoutingAnswer(Answer):
    """What expert calls cost."""

    substituted: int
    substituted_gate_mass: float
    hit_rate: float
    hits: int
    misses: int
    hosted: int
    loads: int
    bytes_loaded: int
    recall: float | None
    drafted: int
    accepted: int
    degraded: bool = Field(
        description="Whether an expert that could not be reached was replaced (scheduling.on_lost_expert)."
    )


class PromptTokensDetails(Answer):
    """Of the prompt's tokens."""

    cached_tokens: int = Field(description="Tokens of the prompt that needed no reading.")


class UsageAnswer(Answer):
    """Tokens of prompts and answers."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    routing: RoutingAnswer | None = None


FinishReason = Literal["stop", "length", "tool_calls", "cancelled"]


class FunctionAnswer(Answer):
    """A function and its arguments, as JSON in a text."""

    name: str
    arguments: str


class ToolCallAnswer(Answer):
    """A call of a tool."""

    id: str
    type: Literal["function"]
    function: FunctionAnswer


class MessageAnswer(Answer):
    """The model's turn."""

    role: Literal["assistant"]
    content: str | None
    refusal: None = None
    tool_calls: list[ToolCallAnswer] | None = None


class TopLogprob(Answer):
    """A token that might have been."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprobAnswer(TopLogprob):
    """A token of the answer."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(Answer):
    """Log probabilities of a chat answer."""

    content: list[TokenLogprobAnswer] | None


class ChatChoice(Answer):
    """One answer of a chat."""

    index: int
    message: MessageAnswer
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatAnswer(Answer):
    """POST /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: UsageAnswer


class CompletionLogprobs(Answer):
    """Log probabilities of a text completion: a list per quantity."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(Answer):
    """One text."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason


class CompletionAnswer(Answer):
    """POST /v1/completions."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: UsageAnswer


class ModelAnswer(Answer):
    """A model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelsAnswer(Answer):
    """GET /v1/models."""

    object: Literal["list"]
    data: list[ModelAnswer]


class TokenizeAnswer(Answer):
    """POST /tokenize."""

    count: int
    max_model_len: int | None
    tokens: list[int]


class DetokenizeAnswer(Answer):
    """POST /detokenize."""

    prompt: str


class StatsAnswer(Answer):
    """GET /v1/stats."""

    app: str
    devices: dict[str, dict[str, Any]]
    engine: dict[str, Any] | None
    policy: str


class SettingsAnswer(Answer):
    """GET and POST /v1/admin/settings."""

    scheduling: dict[str, Any] = Field(description="All settings in force.")
    fixed: list[str] = Field(description="Those that can't be changed while the model runs.")


class HealthAnswer(Answer):
    """GET /health."""

    status: Literal["ok", "unavailable"]
    model: str
