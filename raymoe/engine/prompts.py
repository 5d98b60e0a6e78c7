"""Prompts as clients write them, as the token ids that a model reads."""

import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, TemplateError, meta

from raymoe.engine.request import Chat
from raymoe.errors import RequestError

Prompt = str | list[int] | list[dict[str, Any]] | Chat
"""Text, token ids, or chat messages ({"role", "content"}), alone or with tools."""

HERMES_TAG = "<tool_call>"
OTHER_FORMATS = ("<function=", "<arg_key>")  # of templates that put something else than JSON between the same tags


class Prompts:
    """Encodes prompts by a model's tokenizer and chat template.

    Args:
        tokenizer: None where the model has none: prompts are token ids then.
        path: of the checkpoint, for messages.

    Attributes:
        tool_format: how the model writes calls of tools: "hermes", or "unknown"; None where its template takes none.
    """

    def __init__(self, tokenizer: Any, path: Path) -> None:
        self._tokenizer = tokenizer
        self._path = path
        self.tool_format = self._tool_format()

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt. Raises RequestError for what is neither text, token ids nor chat messages."""
        if isinstance(prompt, list) and all(isinstance(item, int) for item in prompt):
            return prompt  # type: ignore[return-value]
        if self._tokenizer is None:
            raise RequestError(f"{self._path} has no tokenizer; send token ids", param="prompt")
        if isinstance(prompt, str):
            return self._tokenizer.encode(prompt)
        if isinstance(prompt, Chat):
            return self._encode_chat(prompt)
        if is_chat(prompt):
            return self._encode_chat(Chat(messages=prompt))  # type: ignore[arg-type]
        raise RequestError("a prompt is a text, a list of token ids, or a list of chat messages", param="prompt")

    def decode(self, token_ids: list[int]) -> str:
        """Text of token ids, special tokens and all. Raises RequestError where the model has no tokenizer."""
        if self._tokenizer is None:
            raise RequestError(f"{self._path} has no tokenizer, so tokens have no text", param="tokens")
        known = len(self._tokenizer)
        bad = next((token for token in token_ids if not 0 <= token < known), None)
        if bad is not None:
            raise RequestError(f"token id {bad} is outside of the tokenizer's (0 to {known - 1})", param="tokens")
        return str(self._tokenizer.decode(token_ids))

    def _tool_format(self) -> str | None:
        if self._tokenizer is None or self._tokenizer.chat_template is None:
            return None
        try:
            template = self._tokenizer.get_chat_template(tools=[{}])  # a model may have another one for tools
        except ValueError:
            return None
        if not takes_tools(template):
            return None
        is_hermes = HERMES_TAG in template and not any(other in template for other in OTHER_FORMATS)
        return "hermes" if is_hermes else "unknown"

    def _encode_chat(self, chat: Chat) -> list[int]:
        if self._tokenizer.chat_template is None:
            raise RequestError(f"{self._path} has no chat template; use text completion", param="messages")
        messages = [_for_template(message) for message in chat.messages]
        try:
            text = self._tokenizer.apply_chat_template(
                messages, tools=chat.tools or None, tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # templates raise what they like, for example on roles out of order
            raise RequestError(
                f"the model's chat template refuses these messages: {error}", param="messages"
            ) from error
        return self._tokenizer.encode(text, add_special_tokens=False)


def is_chat(prompt: Any) -> bool:
    """Whether a prompt is a conversation."""
    if isinstance(prompt, Chat):
        return True
    return isinstance(prompt, list) and bool(prompt) and all(isinstance(item, dict) for item in prompt)


def takes_tools(template: str) -> bool:
    """Whether a chat template tells the model of tools."""
    try:
        tree = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(template)
    except TemplateError:  # tags that only transformers knows
        return "tools" in template
    return "tools" in meta.find_undeclared_variables(tree)


def _for_template(message: dict[str, Any]) -> dict[str, Any]:
    """A message as templates take it: content is a text, arguments of calls are objects."""
    calls = message.get("tool_calls")
    content = message.get("content")
    if not isinstance(message.get("role"), str) or not (isinstance(content, str) or (content is None and calls)):
        raise RequestError('a chat message needs "role" and "content", both texts', param="messages")
    message = {**message, "content": content or ""}
    return {**message, "tool_calls": [_with_object(call) for call in calls]} if calls else message


def _with_object(call: dict[str, Any]) -> dict[str, Any]:
    """OpenAI writes arguments as JSON in a text, templates write them as JSON themselves."""
    try:
        function = call["function"]
        arguments = function["arguments"]
        read = json.loads(arguments) if isinstance(arguments, str) else arguments
    except (KeyError, TypeError, ValueError) as error:
        raise RequestError(
            f'a message\'s tool call needs "function" with "name" and "arguments" in JSON: {error}', param="messages"
        ) from error
    return {**call, "function": {**function, "arguments": read}}
