"""Workflow commands, which GitHub Actions shows as annotations.

https://docs.github.com/en/actions/reference/workflows-and-actions/workflow-commands
"""

__all__ = ["annotation"]


def annotation(level: str, text: str, **properties: str) -> str:
    """Return one annotation.

    Args:
        level: `error`, `warning` or `notice`.
        text: What it says.
        properties: Such as `title`, `file` and `line`.
    """
    named = ",".join(f"{name}={_property(value)}" for name, value in properties.items())
    return f"::{level} {named}::{_data(text)}"


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
