"""The keywords of a middleware, which are fields of its section: `CORSMiddleware(app, max_age=60)`."""

from collections.abc import Collection
from difflib import get_close_matches


def unknown(name: str, known: Collection[str]) -> str:
    """Say that there is no such name, and which one was probably meant."""
    near = get_close_matches(name, known, n=1)
    return f"does not exist; did you mean {near[0]}?" if near else "does not exist"
