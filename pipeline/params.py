"""Base of all parameter models: frozen, validated, unknown keys refused."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Params(BaseModel):
    """Parameters of one stage. Immutable; an unknown key or an impossible value is an error at load."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)
