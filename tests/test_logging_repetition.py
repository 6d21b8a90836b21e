"""A value masked in one field of a record is masked in all."""

import json
import logging

import pytest
from pydantic import BaseModel, SecretBytes, SecretStr, ValidationError, field_validator

from fastapi_prodkit.logging import configure_logging
from fastapi_prodkit.logging.redaction import Redactor
from fastapi_prodkit.logging.repetition import inputs, mask, strings
from fastapi_prodkit.sections import LogSettings

SECRET = "s3cret'key"


class Model(BaseModel):
    """A model whose validator repeats the input."""

    api: str

    model_config = {"hide_input_in_errors": True}

    @field_validator("api")
    @classmethod
    def _check(cls, value):
        raise ValueError(f"{value} is no key, {value!r}")


def invalid():
    with pytest.raises(ValidationError) as caught:
        Model(api=SECRET)
    return caught.value


def wrapped():
    try:
        try:
            raise invalid()
        except ValidationError as error:
            raise KeyError(SECRET) from error
    except KeyError as error:
        return ExceptionGroup("several", [OSError(), error])


@pytest.fixture(params=["json", "console"])
def written(request, capsys):
    """A function that returns the new output."""
    configure_logging(LogSettings(format=request.param))
    return lambda: capsys.readouterr().out


@pytest.mark.parametrize(
    "extra",
    [
        {"password": SECRET},
        {"password": SecretStr(SECRET)},
        {"secret_key": SecretBytes(SECRET.encode()), "api_key": SECRET},
        {"cookies": {"sid": [SECRET]}},
        {"request": {"headers": [[b"x-api-key", SECRET.encode()]]}},
        {"note": f"password={SECRET!r}"},
        {"error": invalid()},
    ],
)
def test_value_masked_in_one_field_is_masked_in_all(written, extra):
    """In event, exception, stack and fields; as it is, and as `repr` writes it."""

    def fail(_):
        raise KeyError(SECRET)

    try:
        fail(SECRET)
    except KeyError:
        logging.getLogger("shop").exception("refused: %s", SECRET, stack_info=True, extra={**extra, "also": [SECRET]})

    text = written()
    assert "refused: [redacted]" in text
    assert "s3cret" not in text


@pytest.mark.parametrize(
    "text",
    [
        "password=s3cret1 of the user",
        "password='s3cret' of the user",
        "Bearer s3cret1",
        "postgresql://u:s3cret1@db/x",
        "https://s3cret1@example.com/x",
        "/callback?code=s3cret1",
        "1 validation error\n  bad s3cret [type=value_error, input_value='s3cret', input_type=str]",
    ],
)
def test_value_masked_in_the_event_is_masked_in_all(written, text):
    """If it is quoted, or a word with a digit."""
    secret = "s3cret1" if "s3cret1" in text else "s3cret"

    try:
        raise RuntimeError(f"not {secret}")
    except RuntimeError:
        logging.getLogger("shop").exception(text, extra={"also": secret})

    assert "s3cret" not in written()


@pytest.mark.parametrize("error", [invalid(), wrapped()])
def test_input_of_a_validation_error_is_masked(written, error):
    """In its message and in the causes of an error."""
    log = logging.getLogger("shop")

    log.error("failed", exc_info=error)
    log.error(error)
    log.error("failed: %r", error)

    assert "s3cret" not in written()


def test_ordinary_words_are_not_masked(written):
    """Words after a name, source code, and standard fields."""
    try:
        raise RuntimeError("has expired, read_token1")
    except RuntimeError:
        logging.getLogger("expired").exception("token: expired", extra={"token": "short"})

    text = written()
    assert text.count("expired") >= 2
    assert "read_token1" in text


def test_short_values_and_counts_are_not_searched():
    """Passwords of a few characters and numeric counts are not masked in the text of other fields."""
    fields = {"event": "user root, 123 of 45 tokens", "password": "root", "pwd": 123, "tokens": 45, "secret": True}

    masked = Redactor().fields(fields, size=1_000)

    assert masked["event"] == "user root, 123 of 45 tokens"


def test_strings_of_a_recursive_value_are_bounded():
    """Collecting the strings of a value that contains itself ends, and yields each of its strings."""
    value = ["s3cret-1"]
    value.append({"key": value, "n": 1234567})

    found = list(strings(value))

    assert set(found) == {"s3cret-1", "1234567"}


def test_inputs_of_circular_causes_are_bounded():
    """Collecting the inputs of two exceptions that cause each other ends, and yields each input once."""
    one, other = ValueError(), invalid()
    one.__cause__, other.__cause__ = other, one

    assert list(inputs(one)) == [SECRET]


def test_mask_keeps_numbers_and_keys():
    """Masking replaces a secret in string values and leaves numbers, None and dictionary keys unchanged."""
    assert mask({"a": ["s3cret-1", 1, None], "s3cret-1": {"b": "x s3cret-1"}}, ["s3cret-1"], "-") == {
        "a": ["-", 1, None],
        "s3cret-1": {"b": "x -"},
    }


def test_masking_of_many_long_values_is_fast(capsys):
    """Masking a hundred secrets of 100,000 characters in a line finishes quickly and leaves none visible."""
    configure_logging()
    secrets = {f"password{number}": f"s3cret-{number:0100000}" for number in range(100)}

    logging.getLogger("shop").warning("x" * 100_000, extra={"all": {"tokens": secrets}})

    assert "s3cret-" not in json.dumps(capsys.readouterr().out)
