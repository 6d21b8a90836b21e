"""`Section`, the base class of all sections."""

from collections.abc import Mapping
from typing import Annotated, Any, get_origin

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from fastapi_prodkit._config.keywords import unknown

__all__ = ["MaybeSeconds", "OrNone", "Section"]


def _none(value: Any) -> Any:
    """Read the word `none` as None."""
    return None if isinstance(value, str) and value.strip().lower() == "none" else value


OrNone = BeforeValidator(_none)
MaybeSeconds = Annotated[float | None, OrNone]


class Section(BaseModel):
    """The configuration object of one piece."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", hide_input_in_errors=True, defer_build=True, allow_inf_nan=False
    )

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown(cls, values: Any) -> Any:
        """Refuse unknown names, and say which ones were probably meant."""
        names = [str(name) for name in values if name not in cls.model_fields] if isinstance(values, Mapping) else []
        if names:
            raise ValidationError.from_exception_data(cls.__name__, [_unknown(name, cls) for name in names])
        return values

    @field_validator("*", mode="before")
    @classmethod
    def _split(cls, value: Any, info: ValidationInfo) -> Any:
        """Read "a, b" as ("a", "b") for a field that is a tuple."""
        if isinstance(value, str) and get_origin(cls.model_fields[str(info.field_name)].annotation) is tuple:
            return tuple(item for part in value.split(",") if (item := part.strip()))
        return value


def _unknown(name: str, section: type[Section]) -> InitErrorDetails:
    reason = PydanticCustomError("unknown_field", "{reason}", {"reason": unknown(name, section.model_fields)})
    return InitErrorDetails(type=reason, loc=(name,), input=None)
