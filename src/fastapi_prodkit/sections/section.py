"""What every section is."""

from typing import Annotated, Any, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationInfo, field_validator

__all__ = ["MaybeSeconds", "OrNone", "Section"]


def _none(value: Any) -> Any:
    """Read the word `none` as None."""
    return None if isinstance(value, str) and value.strip().lower() == "none" else value


OrNone = BeforeValidator(_none)
MaybeSeconds = Annotated[float | None, OrNone]


class Section(BaseModel):
    """The configuration object of one piece."""

    model_config = ConfigDict(
        frozen=True, extra="ignore", hide_input_in_errors=True, defer_build=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _split(cls, value: Any, info: ValidationInfo) -> Any:
        """Read "a, b" as ("a", "b") wherever a list is asked for."""
        if isinstance(value, str) and get_origin(cls.model_fields[str(info.field_name)].annotation) is tuple:
            return tuple(item for part in value.split(",") if (item := part.strip()))
        return value
