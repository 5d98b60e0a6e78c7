"""Calls of tools in a model's answer, as Hermes and its many followers write them.

``<tool_call>`` and ``</tool_call>``, with ``{"name": …, "arguments": {…}}`` between them, alone or after some text.
"""

import json
import uuid
from typing import Any

from raymoe.engine.lark import json_rule
from raymoe.engine.text import overlap

OPEN = "<tool_call>"
CLOSE = "</tool_call>"
MOST_CALLS = 8  # of one answer that must call; without a limit a small model may never end


def call_grammar(tools: list[dict[str, Any]], *, parallel: bool) -> str:
    """The grammar of an answer that calls some of ``tools`` and says nothing else."""
    more = f' ("\\n" call){{0,{MOST_CALLS - 1}}}' if parallel else ""
    choices = " | ".join(f"tool_{number}" for number in range(len(tools)))
    lines = [f"start: call{more}", f'call: "{OPEN}\\n" ({choices}) "\\n{CLOSE}"']
    for number, tool in enumerate(tools):
        function = tool["function"]
        head = json.dumps(f'{{"name": {json.dumps(function["name"])}, "arguments": ')
        lines.append(f'tool_{number}: {head} args_{number} "}}"')
        lines.append(f"args_{number}: {json_rule({'type': 'object', **(function.get('parameters') or {})})}")
    return "\n".join(lines)


class ToolReader:
    """Tells text from calls in one answer, as it comes.

    A call is told once it is whole. What looks like one and isn't, is text.
    """

    def __init__(self) -> None:
        self._held = ""
        self._inside = False
        self.calls = 0

    def read(self, text: str, *, last: bool) -> tuple[str, list[dict[str, Any]]]:
        """The text that is final now, and calls in OpenAI's form; ``last``: nothing more comes."""
        self._held += text
        texts: list[str] = []
        calls: list[dict[str, Any]] = []
        while (tag := CLOSE if self._inside else OPEN) in self._held:
            before, self._held = self._held.split(tag, 1)
            if not self._inside:
                texts.append(before)
            elif (call := self._call(before)) is not None:
                calls.append(call)
            else:
                texts.append(OPEN + before + CLOSE)
            self._inside = not self._inside
        if last:
            self._end(texts, calls)
        elif not self._inside:
            keep = overlap(self._held, OPEN)
            texts.append(self._held[: len(self._held) - keep])
            self._held = self._held[len(self._held) - keep :]
        plain = "".join(texts)
        return "" if self.calls and not plain.strip() else plain, calls  # line breaks between calls are no text

    def _end(self, texts: list[str], calls: list[dict[str, Any]]) -> None:
        """Many models leave the last tag out, for their answer ends there."""
        call = self._call(self._held) if self._inside else None
        if call is not None:
            calls.append(call)
        else:
            texts.append(OPEN * self._inside + self._held)
        self._held, self._inside = "", False

    def _call(self, text: str) -> dict[str, Any] | None:
        try:
            read = json.loads(text)
        except ValueError:
            return None
        if not isinstance(read, dict) or not isinstance(read.get("name"), str):
            return None
        self.calls += 1
        arguments = json.dumps(read.get("arguments") or {}, ensure_ascii=False)
        function = {"name": read["name"], "arguments": arguments}
        return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}
