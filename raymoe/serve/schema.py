"""What clients may send: OpenAI's chat and text completion requests, with this server's extensions.

Unknown fields are ignored, as clients send many that mean nothing here. Known ones that would change the answer
but aren't supported are refused, so that nobody takes an answer for what it isn't. Numbers have their ranges
checked by the engine, which knows the model; only types and shapes are checked here.
"""

from typing import Annotated, Any, Self, cast

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from raymoe.config import QUALITIES, Quality
from raymoe.engine.request import SamplingParams

COMPLETION_MAX_TOKENS = 16  # OpenAI's default of /v1/completions
MAX_LOGPROBS = 20  # OpenAI's limit of top_logprobs, which the engine shares
MAX_STOPS = 32  # each stop string costs a search per token

UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "n": (None, 1),
    "best_of": (None, 1),
    "echo": (None, False),
    "suffix": (None, ""),
    "logit_bias": (None, {}),
    "tools": (None, []),
    "functions": (None, []),
    "response_format": (None, {"type": "text"}),
    "audio": (None,),
    "prediction": (None,),
}
"""OpenAI's parameters that change the answer, with the values under which they ask for nothing."""


def refuse(param: str, message: str) -> PydanticCustomError:
    """A validation error that names the offending field itself."""
    return PydanticCustomError("refused", "{message}", {"message": message, "param": param})


def check_text(text: str) -> str:
    """Refuse half a surrogate pair: JSON can write it, but no tokenizer and no answer can."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("this text is not valid Unicode: it holds half a surrogate pair") from None
    return text


Text = Annotated[str, AfterValidator(check_text)]


def as_text(content: Any) -> Any:
    """Join a message's text parts; a plain text stays as it is."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ValueError('a content part must be {"type": "text", "text": "..."}; this model reads text only')
        texts.append(part["text"])
    return "".join(texts)


def as_prompt(prompt: Any) -> Any:
    """Accept a text or a list of token ids; name what is wrong with anything else."""
    if isinstance(prompt, str):
        return check_text(prompt)
    if not isinstance(prompt, list):
        raise ValueError("a prompt is a text or a list of token ids")
    if any(isinstance(item, (str, list)) for item in prompt):
        raise ValueError("one prompt per request: a text or a list of token ids, not a batch of them")
    if not all(isinstance(item, int) and not isinstance(item, bool) for item in prompt):
        raise ValueError("token ids must be whole numbers")
    return prompt


def as_quality(value: Any) -> Any:
    """Accept a name or a number; which ones are allowed, the engine knows."""
    if value is None or (isinstance(value, (str, int, float)) and not isinstance(value, bool)):
        return value
    names = ", ".join(f'"{name}"' for name in QUALITIES)
    raise refuse("quality", f"quality is {names}, or an alpha from 0 to the server's scheduling.alpha_max")


def as_list(value: Any) -> Any:
    """One value or none as a list."""
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


class Schema(BaseModel):
    """Base of what comes over HTTP: strict types, unknown fields ignored, null as good as absent."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")


class Message(Schema):
    """One turn of a conversation."""

    role: Text
    content: Annotated[Text, BeforeValidator(as_text)]


class StreamOptions(Schema):
    """What a stream tells beside text."""

    include_usage: bool | None = None


class GenerationRequest(Schema):
    """What chat and text completion share.

    ``top_k``, ``min_p``, ``repetition_penalty``, ``stop_token_ids`` and ``ignore_eos`` are extensions that other
    servers have too; ``quality`` is this one's own.
    """

    model: Text | None = Field(None, description="The served model's name; may be omitted, as there is one only.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: Annotated[list[Text], BeforeValidator(as_list), Field(max_length=MAX_STOPS)] = []
    stop_token_ids: Annotated[list[int], BeforeValidator(as_list)] = []
    ignore_eos: bool | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    quality: Annotated[str | float | None, BeforeValidator(as_quality)] = Field(
        None,
        description='How freely experts may be replaced: "exact", "balanced", "fast", or an alpha from 0 to the '
        "server's scheduling.alpha_max; omitted: as the server is configured.",
    )

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, data: Any) -> Any:
        for name, harmless in UNSUPPORTED.items() if isinstance(data, dict) else ():
            if name in data and not any(data[name] == value for value in harmless):
                hint = "ask n times" if name == "n" else "leave it out"
                raise refuse(name, f'"{name}" is not supported here beyond its default; {hint}')
        return data

    @model_validator(mode="after")
    def _stream_options_need_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise refuse("stream_options", '"stream_options" needs "stream": true')
        return self

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk of usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def _sampling(self, max_tokens: int | None, logprobs: int | None) -> SamplingParams:
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
            quality=cast("Quality | None", self.quality),
        )


class ChatRequest(GenerationRequest):
    """The body of POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)

    @model_validator(mode="after")
    def _alternatives_need_logprobs(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise refuse("top_logprobs", '"top_logprobs" needs "logprobs": true')
        return self

    @property
    def conversation(self) -> list[dict[str, Any]]:
        """The messages, as chat templates take them."""
        return [{"role": message.role, "content": message.content} for message in self.messages]

    @property
    def sampling(self) -> SamplingParams:
        """What the engine shall do. Without a limit the answer may fill the context."""
        limit = self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens
        return self._sampling(limit, (self.top_logprobs or 0) if self.logprobs else None)


class CompletionRequest(GenerationRequest):
    """The body of POST /v1/completions."""

    prompt: Annotated[str | list[int], BeforeValidator(as_prompt)]
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)

    @property
    def sampling(self) -> SamplingParams:
        """What the engine shall do."""
        limit = COMPLETION_MAX_TOKENS if self.max_tokens is None else self.max_tokens
        return self._sampling(limit, self.logprobs)
