"""Recognize placeholders: values that are common in examples, or that another program replaces."""

import re

__all__ = ["is_placeholder"]

# Common words of examples: with or without a hyphen or an underscore, in any case.
_WORDS = {
    *("change", "change-me", "changeit", "default", "dummy", "example", "fixme", "foo", "insecure", "none", "null"),
    *(
        "pass",
        "password",
        "postgres",
        "pw",
        "replace-me",
        "root",
        "secret",
        "test",
        "testing",
        "todo",
        "token",
        "unset",
    ),
    *("user", "changeme", "replaceme"),
}
# ${VARIABLE}, $(command), {{ template }}, {"valueFrom": ...}, <put it here>, !Ref, arn:aws:..., var.token, ***, ...
_FILLED_IN = re.compile(r"[$*<>!&|{[]|\.{3}|%\(|xxx|(?:arn:|data|local|module|var)\b", re.IGNORECASE)
# Texts that ask to be replaced: your-stripe-key, replace_this_key, AKIA-EXAMPLE.
_SPOKEN = re.compile(r"\b(?:change|dummy|example|insert|placeholder|replace|sample|your)\b")
_AFFIX = re.compile(r"^(?:my|your|the|some|a)[-_]|[-_]?(?:here|\d{1,3})$", re.IGNORECASE)


def is_placeholder(value: str) -> bool:
    """Return whether a value is a common placeholder, or is replaced by another program."""
    word = value.strip().strip("\"'").lower().replace("_", "-")
    spoken = _FILLED_IN.match(word) or _SPOKEN.search(word)
    return not word or spoken is not None or word in _WORDS or _AFFIX.sub("", word) in _WORDS
