"""JSON schemas as grammars in llguidance's Lark form. Texts only: needs neither torch nor a model."""

import json
from collections.abc import Mapping
from typing import Any

WHITESPACE = r"(\n {0,32}| )?"  # between JSON's parts: indented or not, but no endless run of blanks


def json_grammar(schema: Mapping[str, Any] | bool) -> str:
    """The grammar of one JSON value by a schema."""
    return f"start: {json_rule(schema)}"


def json_rule(schema: Mapping[str, Any] | bool) -> str:
    """The right side of a rule that matches one JSON value by a schema."""
    whole = {} if schema is True else {"not": {}} if schema is False else dict(schema)
    return "%json " + json.dumps({"x-guidance": {"whitespace_pattern": WHITESPACE}, **whole})
