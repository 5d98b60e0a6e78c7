"""GET and POST /v1/admin/settings: how experts are scheduled, changed while the model runs."""

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import ConfigDict, Field, WithJsonSchema

from raymoe.config import FIXED_SCHEDULING, SchedulingConfig
from raymoe.errors import ConfigError, RequestError
from raymoe.serve.backend import Backend
from raymoe.serve.errors import unwrap
from raymoe.serve.fields import JsonObject, Schema


def _settings_json() -> dict[str, Any]:
    """The JSON schema of the settings that may be changed."""
    fields = SchedulingConfig.model_json_schema()["properties"]
    changeable = {name: field for name, field in fields.items() if name not in FIXED_SCHEDULING}
    return {"type": "object", "properties": changeable, "additionalProperties": False}


class SettingsRequest(Schema):
    """The body of POST /v1/admin/settings."""

    model_config = ConfigDict(extra="forbid")

    scheduling: Annotated[JsonObject, WithJsonSchema(_settings_json())] = Field(
        description="Fields of scheduling to change, as in the cluster configuration; the others stay."
    )


class Admin:
    """Shows and changes settings."""

    def __init__(self, backend: Backend, on_change: Callable[[], None] = lambda: None) -> None:
        self._backend = backend
        self._on_change = on_change

    async def settings(self) -> dict[str, Any]:
        """GET /v1/admin/settings: those in force. A live alpha that follows a budget is in /v1/stats."""
        return {"scheduling": await self._backend.settings(), "fixed": list(FIXED_SCHEDULING)}

    async def change(self, request: SettingsRequest) -> dict[str, Any]:
        """POST /v1/admin/settings. Raises RequestError that names the field, and changes nothing then."""
        try:
            changed = await self._backend.change_settings(request.scheduling)
            self._on_change()
        except Exception as error:
            own = unwrap(error)
            if isinstance(own, ConfigError):
                raise RequestError(str(own), param="scheduling") from own
            raise
        return {"scheduling": changed, "fixed": list(FIXED_SCHEDULING)}
