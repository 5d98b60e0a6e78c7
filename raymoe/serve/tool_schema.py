"""What clients may send of tools and forms of answers, as OpenAI's API has them."""

from typing import Annotated, Any, Literal

from pydantic import Field

from raymoe.serve.fields import JsonObject, Schema, Text

FUNCTION_NAME = r"^[A-Za-z0-9_-]{1,64}$"


class FunctionSpec(Schema):
    """A function that the model may call."""

    name: Annotated[str, Field(pattern=FUNCTION_NAME)]
    description: Text | None = None
    parameters: JsonObject | None = Field(None, description="JSON schema of its arguments.")
    strict: bool | None = Field(None, description="Without effect: calls that must be made always follow the schema.")


class Tool(Schema):
    """A tool. There are functions only."""

    type: Literal["function"]
    function: FunctionSpec


class FunctionName(Schema):
    """A function, by name."""

    name: Text


class NamedTool(Schema):
    """The tool that must be called."""

    type: Literal["function"]
    function: FunctionName


ToolChoice = Literal["none", "auto", "required"] | NamedTool


class CalledFunction(Schema):
    """A function that the model has called in an earlier turn; arguments are JSON in a text."""

    name: Text
    arguments: Text


class ToolCall(Schema):
    """A call that the model has made in an earlier turn."""

    id: Text
    type: Literal["function"] = "function"
    function: CalledFunction


class NamedSchema(Schema):
    """A JSON schema with a name."""

    name: Annotated[str, Field(pattern=FUNCTION_NAME)]
    description: Text | None = None
    schema_: JsonObject | None = Field(None, alias="schema")
    strict: bool | None = Field(None, description="Without effect: answers always follow the schema.")


class TextFormat(Schema):
    """Plain text."""

    type: Literal["text"]


class JsonObjectFormat(Schema):
    """Any JSON object."""

    type: Literal["json_object"]


class JsonSchemaFormat(Schema):
    """JSON by a schema."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


def schema_of(form: TextFormat | JsonObjectFormat | JsonSchemaFormat | None) -> dict[str, Any] | None:
    """The JSON schema that answers of this form follow; None for plain text."""
    if isinstance(form, JsonSchemaFormat):
        return form.json_schema.schema_ or {}
    return {"type": "object"} if isinstance(form, JsonObjectFormat) else None
