"""Strict values and models: what configuration files and commands are read into, and what is said of mistakes.

Imports neither torch nor Ray, and knows none of the models.
"""

import re
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from raymoe.errors import ConfigError

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_size_bytes(value: Any) -> Any:
    """Turn ``"4MiB"``, ``"200MB"`` or a number into bytes; leave other types to pydantic's own message."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", value)
    if match is None or match[2].upper() not in _UNITS:
        raise ValueError(f'"{value}" is not a size; write bytes as a number or as "4MiB", "200MB", "1.5GiB"')
    return round(float(match[1]) * _UNITS[match[2].upper()])


Bytes = Annotated[int, BeforeValidator(parse_size_bytes), Field(gt=0)]
BytesOrNone = Annotated[int, BeforeValidator(parse_size_bytes), Field(ge=0)]


def within(low: float, high: float) -> AfterValidator:
    """Refuse numbers outside of ``low`` to ``high``; the message names the number and both bounds."""

    def check(value: float) -> float:
        if not low <= value <= high:
            raise ValueError(f"is {value:g}; allowed is {low:g} to {high:g}")
        return value

    return AfterValidator(check)


class StrictModel(BaseModel):
    """Base of all configuration: immutable, and a misspelt field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


Strict = TypeVar("Strict", bound=StrictModel)


def read_mapping(file: Path, what: str, expected: str) -> dict[str, Any]:
    """The mapping that a YAML file holds.

    Args:
        what: the file is, as messages call it.
        expected: what the mapping should have, told to whoever wrote something else.

    Raises ConfigError that names the file.
    """
    try:
        text = file.read_text()
    except OSError as error:
        raise ConfigError(f"can't read the {what} {file}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is not a text file: {error}") from error
    try:
        data = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: of a date that does not exist
        raise ConfigError(f"{file} is not valid YAML: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{file} must hold a mapping with {expected}; found {type(data).__name__}")
    return data


def validated(model: type[Strict], data: Any, where: str) -> Strict:
    """``data`` as ``model``. Raises ConfigError that begins with ``where`` and tells of every wrong field."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise ConfigError(f"{where}: {describe(error)}") from error


def parse_options(model: type[Strict], options: dict[str, Any]) -> Strict:
    """A section of the configuration from a command's options. Raises ConfigError that names the option."""
    try:
        return model.model_validate(options)
    except ValidationError as error:
        first = error.errors()[0]
        message = first["msg"].removeprefix("Value error, ")
        if not first["loc"]:  # options that do not go together: the message names them
            raise ConfigError(message) from error
        option = "--" + str(first["loc"][0]).replace("_", "-")
        raise ConfigError(f"{option}: {message}, not {first['input']!r}") from error


def describe(error: ValidationError) -> str:
    """One line per wrong field: its path, what is wrong, what was given."""
    lines = []
    errors = error.errors()
    for item in errors:
        within = any(other is not item and other["loc"][: len(item["loc"])] == item["loc"] for other in errors)
        if item["type"] == "too_short" and within:  # a list is only short because its items are wrong
            continue
        place = ".".join(str(part) for part in item["loc"]) or "(whole)"
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            message = "no such field; check the spelling against docs/configuration.md"
        lines.append(f"{place}: {message}")
    return "; ".join(lines)
