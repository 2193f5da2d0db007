"""Lists the variables of the settings."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import BaseModel


def variables_of(model: type[BaseModel], prefix: str = "PERDURE_") -> Iterator[str]:
    """Yields the variable of each setting."""
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from variables_of(kind, f"{prefix}{name.upper()}__")
        else:
            yield prefix + name.upper()
