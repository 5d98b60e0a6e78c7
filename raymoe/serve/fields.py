"""Kinds of fields that requests are made of, and what is said of wrong ones."""

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from raymoe.config import QUALITIES

MAX_LOGIT_BIAS = 1024  # tokens; as many as the engine takes
MAX_DEPTH = 64  # of a JSON schema: objects and lists within each other


class Schema(BaseModel):
    """Base of what comes over HTTP: strict types, null as good as absent; unknown fields of inner parts are ignored."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")


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


def check_depth(value: Any) -> Any:
    """Refuse JSON that is nested so deeply that it can't be handed on, and that no grammar can follow anyway."""
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError(f"is nested more than {MAX_DEPTH} levels deep")
        inner = (item for part in level for item in (part.values() if isinstance(part, dict) else part))
        level = [item for item in inner if isinstance(item, (dict, list))]
    return value


JsonObject = Annotated[dict[str, Any], AfterValidator(check_depth)]


class Only:
    """Marks a parameter of OpenAI's that is taken with values under which it asks for nothing, and else refused."""

    def __init__(self, *harmless: Any, hint: str = "leave it out") -> None:
        self._harmless = (None, *harmless)
        self._hint = hint

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.with_info_plain_validator_function(self._check)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"enum": list(self._harmless)}

    def _check(self, value: Any, info: core_schema.ValidationInfo) -> Any:
        if not any(type(value) is type(harmless) and value == harmless for harmless in self._harmless):
            name = str(info.field_name)
            raise refuse(name, f'"{name}" is not supported here beyond its default; {self._hint}')
        return value


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


CONTENT_JSON = {
    "anyOf": [
        {"type": "string"},
        {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
                "required": ["type", "text"],
            },
        },
    ]
}


def as_prompt(prompt: Any) -> Any:
    """Accept a text, a list of token ids, or a list of either; name what is wrong with anything else."""
    if isinstance(prompt, str):
        return check_text(prompt)
    if not isinstance(prompt, list):
        raise ValueError("a prompt is a text or a list of token ids, or a list of such")
    if all(isinstance(item, str) for item in prompt) and prompt:
        return [check_text(item) for item in prompt]
    if all(isinstance(item, list) for item in prompt) and prompt:
        return [_token_ids(item) for item in prompt]
    if any(isinstance(item, (str, list)) for item in prompt):
        raise ValueError("prompts are all texts, or all lists of token ids")
    return _token_ids(prompt)


def _token_ids(items: list[Any]) -> list[int]:
    if not all(isinstance(item, int) and not isinstance(item, bool) for item in items):
        raise ValueError("token ids must be whole numbers")
    return items


PROMPT_JSON = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "integer"}},
        {"type": "array", "items": {"type": "string"}},
        {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}},
    ]
}


def as_quality(value: Any) -> Any:
    """Accept a name or a number; which ones are allowed, the engine knows."""
    if value is None or (isinstance(value, (str, int, float)) and not isinstance(value, bool)):
        return value
    names = ", ".join(f'"{name}"' for name in QUALITIES)
    raise refuse("quality", f"quality is {names}, or an alpha from 0 to the server's scheduling.alpha_max")


QUALITY_JSON = {"anyOf": [{"enum": [*QUALITIES, None]}, {"type": "number", "minimum": 0, "maximum": 1}]}


def as_list(value: Any) -> Any:
    """One value or none as a list."""
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def one_or_several(item: dict[str, Any], most: int) -> dict[str, Any]:
    """The JSON schema of what ``as_list`` reads."""
    return {"anyOf": [item, {"type": "array", "items": item, "maxItems": most}, {"type": "null"}]}


def as_biases(value: Any) -> Any:
    """JSON's keys are texts: read them as token ids."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        return value
    if len(value) > MAX_LOGIT_BIAS:
        raise ValueError(f"names {len(value)} tokens, allowed are {MAX_LOGIT_BIAS}")
    bad = next((key for key in value if not (isinstance(key, str) and key.isascii() and key.isdigit())), None)
    if bad is not None:
        raise ValueError(f'{bad!r} is no token id; its keys are token ids, such as {{"50": -100}}')
    return {int(key[:20]): bias for key, bias in value.items()}


BIAS_JSON = {
    "anyOf": [
        {
            "type": "object",
            "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
            "propertyNames": {"pattern": "^[0-9]+$"},
            "maxProperties": MAX_LOGIT_BIAS,
        },
        {"type": "null"},
    ]
}
