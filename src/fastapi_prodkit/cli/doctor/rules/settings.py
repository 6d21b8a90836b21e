"""Rules about the settings: values that production refuses, and values that it accepts but should not."""

from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote, urlsplit

from pydantic import BaseModel, SecretStr

from fastapi_prodkit._config import production_rules, variables
from fastapi_prodkit._config.production_rules import is_on_this_machine
from fastapi_prodkit.cli.doctor.facts import Facts
from fastapi_prodkit.cli.doctor.finding import Problem, rule
from fastapi_prodkit.cli.doctor.placeholders import is_guessable, is_placeholder
from fastapi_prodkit.sections.process import SHORTEST_TOKEN

__all__ = ["RULES"]

_SHORTEST = 8  # characters of a secret that another system issues, which chooses its length


@rule("settings-invalid", "error", "A setting cannot be used")
def invalid(facts: Facts) -> Iterator[Problem]:
    """Report invalid values, with which the service does not start."""
    for name, text in facts.unusable.items():
        yield _split(name, text, f"Set {name} to a value of that form.")


@rule("settings-unsafe", "error", "A setting is unsafe in production")
def unsafe(facts: Facts) -> Iterator[Problem]:
    """Report values with which staging and prod refuse to start, also for settings of other environments."""
    refused = dict(facts.refused)
    if facts.settings is not None:
        fields = type(facts.settings).model_fields
        prefix = type(facts.settings).model_config.get("env_prefix", "")
        values = {name: getattr(facts.settings, name) for name in fields}
        for section, value in values.items():
            found = production_rules.refusals(section, value, values)
            refused |= {variables.variable(prefix, key): text for key, text in found}
    for name, text in refused.items():
        yield _split(name, text, f"Change {name}.")


@rule("settings-near-miss", "warning", "A variable is probably misspelt")
def near_miss(facts: Facts) -> Iterator[Problem]:
    """Report variables that look like a misspelt setting and have no effect."""
    for text in facts.warned:
        what, asked, meant = text.partition("; did you mean ")
        if asked:
            yield Problem(f"{what}, so it changes nothing.", f"Write {meant.rstrip('?')}.")


@rule("settings-environment", "warning", "The app chooses its environment itself")
def environment(facts: Facts) -> Iterator[Problem]:
    """Report an app whose code sets its environment."""
    own = getattr(facts.settings, "environment", facts.environment)
    if own != facts.environment:
        yield Problem(
            f"It runs as {own} although ENVIRONMENT is {facts.environment}, with the relaxed settings of {own}.",
            "Leave environment= out of the code, and set ENVIRONMENT where the service runs.",
        )


@rule("settings-weak-secret", "error", "A secret can be guessed")
def weak_secret(facts: Facts) -> Iterator[Problem]:
    """Report tokens and passwords that are short, or are common placeholders."""
    for name, value in _secrets(facts.settings):
        if name not in facts.refused:
            yield from _weaknesses(name, value)


@rule("settings-limit-off", "warning", "A limit is switched off")
def limit_off(facts: Facts) -> Iterator[Problem]:
    """Report request limits that are `none`."""
    if facts.settings is None:
        return
    limits = facts.settings.limits
    for name, what in (
        ("max_body_size", "A single body can fill the memory"),
        ("request_timeout", "A request that hangs is never ended, and keeps its database connection"),
        ("body_timeout", "A client that stops sending is never disconnected"),
    ):
        if limits is None or getattr(limits, name) is None:
            yield Problem(
                f"{what}: LIMITS_{name.upper()} is off.", f"Set LIMITS_{name.upper()}; routes may have their own."
            )


def _weaknesses(name: str, value: str) -> Iterator[Problem]:
    shortest = SHORTEST_TOKEN if name.endswith("_TOKEN") else _SHORTEST
    if "://" in value:
        password = _password(value)
        if password and is_placeholder(password) and not is_on_this_machine(value):
            yield Problem(f"The password in {name} is a common placeholder.", "Change it where it is kept.")
    elif name.endswith("AUTH_SECRET") and is_guessable(value):
        yield Problem(
            f"{name} has a pattern, or a word of examples. Whoever has one token can try secrets, unnoticed.",
            "Generate one: openssl rand -hex 32.",
        )
    elif is_placeholder(value) or len(value) < shortest:
        yield Problem(
            f"{name} is a common placeholder, or has fewer than {shortest} characters.",
            "Generate one: openssl rand -hex 16.",
        )


def _split(name: str, text: str, otherwise: str) -> Problem:
    """Split a problem text into reason and remedy, which follows the last colon if there is one."""
    reason, colon, remedy = text.partition(": ")
    if not colon:
        return Problem(f"{name} {text}.", otherwise)
    return Problem(f"{name} {reason}.", f"{remedy[0].upper()}{remedy[1:]}.")


def _secrets(settings: Any) -> Iterator[tuple[str, str]]:
    """Yield every secret that is set, with its variable, including secrets of the app's own settings."""
    if settings is None:
        return
    prefix = type(settings).model_config.get("env_prefix", "")
    for name, declared in type(settings).model_fields.items():
        value = getattr(settings, name)
        found = {variables.own_names(name, declared, prefix)[0]: value}
        if isinstance(value, BaseModel):
            found = {variables.variable(prefix, name, key): inner for key, inner in value}
        for variable, each in found.items():
            if isinstance(each, SecretStr) and each.get_secret_value():
                yield variable, each.get_secret_value()


def _password(url: str) -> str | None:
    try:
        password = urlsplit(url).password
    except ValueError:
        return None
    return None if password is None else unquote(password)


RULES = (invalid, unsafe, near_miss, environment, weak_secret, limit_off)
