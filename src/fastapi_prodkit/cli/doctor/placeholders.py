"""Recognize placeholders, which are common in examples or replaced by another program, and other secrets to guess."""

import re
from itertools import pairwise

__all__ = ["is_guessable", "is_placeholder"]

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

# Words that no random text has, and that examples of long secrets do: a-string-secret-at-least-256-bits-long.
_IN_EXAMPLES = re.compile(r"change.?me|example|insecure|passw|secret", re.IGNORECASE)
_FEWEST = 8  # different characters; 32 random hexadecimal digits have fewer once in 28 million


def is_placeholder(value: str) -> bool:
    """Return whether a value is a common placeholder, or is replaced by another program."""
    word = value.strip().strip("\"'").lower().replace("_", "-")
    spoken = _FILLED_IN.match(word) or _SPOKEN.search(word)
    return not word or spoken is not None or word in _WORDS or _AFFIX.sub("", word) in _WORDS


def is_guessable(secret: str) -> bool:
    """Return whether a long secret has a word of examples, repeats itself, or counts, as in 0123456789abcdef."""
    repeats = any(secret[length:] == secret[:-length] for length in range(1, len(secret) // 2 + 1))
    steps = sum(ord(after) - ord(before) == 1 for before, after in pairwise(secret))
    return repeats or 2 * steps > len(secret) or len(set(secret)) < _FEWEST or _IN_EXAMPLES.search(secret) is not None
