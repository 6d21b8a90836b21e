"""Rules about the settings: what production refuses, and what it would take without a word."""

from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote, urlsplit

from pydantic import BaseModel, SecretStr

from fastapi_prodkit._config import production_rules, variables
from fastapi_prodkit._config.production_rules import stays_here
from fastapi_prodkit.cli.doctor.facts import Facts
from fastapi_prodkit.cli.doctor.finding import Fault, rule
from fastapi_prodkit.cli.doctor.placeholders import is_placeholder
from fastapi_prodkit.sections.process import SHORTEST_TOKEN

__all__ = ["RULES"]

_SHORTEST = 8  # characters, of another secret: whoever issues a password or a key chooses its length


@rule("settings-invalid", "error", "A setting cannot be used")
def invalid(facts: Facts) -> Iterator[Fault]:
    """Tell what no setting can be made of: the service would not start."""
    for name, text in facts.unusable.items():
        yield _split(name, text, f"Set {name} to a value of that form.")


@rule("settings-unsafe", "error", "A setting is unsafe in production")
def unsafe(facts: Facts) -> Iterator[Fault]:
    """Tell what staging and prod refuse to start with, whichever environment the settings are of."""
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
def near_miss(facts: Facts) -> Iterator[Fault]:
    """Tell which names are one slip away from a setting: they set nothing."""
    for text in facts.warned:
        what, asked, meant = text.partition("; did you mean ")
        if asked:
            yield Fault(f"{what}, so it changes nothing.", f"Write {meant.rstrip('?')}.")


@rule("settings-environment", "warning", "The app chooses its environment itself")
def environment(facts: Facts) -> Iterator[Fault]:
    """Tell of an app that is of one environment wherever it runs."""
    own = getattr(facts.settings, "environment", facts.environment)
    if own != facts.environment:
        yield Fault(
            f"It runs as {own} although ENVIRONMENT is {facts.environment}, with what {own} relaxes.",
            "Leave environment= out of the code, and set ENVIRONMENT where the service runs.",
        )


@rule("settings-weak-secret", "error", "A secret can be guessed")
def weak_secret(facts: Facts) -> Iterator[Fault]:
    """Tell of tokens and passwords that are short, or that stand in every example."""
    for name, value in _secrets(facts.settings):
        if name in facts.refused:
            continue
        if "://" in value:
            password = _password(value)
            if password and is_placeholder(password) and not stays_here(value):
                yield Fault(f"The password in {name} is a word of examples.", "Change the password where it is kept.")
            continue
        shortest = SHORTEST_TOKEN if name.endswith("_TOKEN") else _SHORTEST
        if is_placeholder(value) or len(value) < shortest:
            yield Fault(
                f"{name} is a word of examples, or has fewer than {shortest} characters.",
                "Make one: openssl rand -hex 16.",
            )


@rule("settings-limit-off", "warning", "A limit is switched off")
def limit_off(facts: Facts) -> Iterator[Fault]:
    """Tell which limits of a request are `none`."""
    if facts.settings is None:
        return
    limits = facts.settings.limits
    for name, what in (
        ("max_body_size", "A single body can fill the memory"),
        ("request_timeout", "A request that hangs holds its place, and its database connection, for ever"),
        ("body_timeout", "A client that stops sending holds its place for ever"),
    ):
        if limits is None or getattr(limits, name) is None:
            yield Fault(
                f"{what}: LIMITS_{name.upper()} is off.", f"Set LIMITS_{name.upper()}; routes may have their own."
            )


def _split(name: str, text: str, otherwise: str) -> Fault:
    """Part a problem into what is wrong and what to do, which stands behind the last colon where there is one."""
    reason, colon, remedy = text.partition(": ")
    if not colon:
        return Fault(f"{name} {text}.", otherwise)
    return Fault(f"{name} {reason}.", f"{remedy[0].upper()}{remedy[1:]}.")


def _secrets(settings: Any) -> Iterator[tuple[str, str]]:
    """Yield every secret that is set, the user's own too, by the name of its variable."""
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
