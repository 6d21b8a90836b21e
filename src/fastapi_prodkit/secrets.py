"""Sources of settings beside the environment and .env files: mounted files, and AWS.

    variables = secrets_manager("prod/orders")      # {"DATABASE_URL": "postgresql://...", ...}

Each function reads one source and returns its variables, by the names that they have in the environment. Only
`secrets_manager` and `parameter_store` contact AWS. An error names the source and never shows a value.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, EnvSettingsSource, NoDecode

from fastapi_prodkit import _extras
from fastapi_prodkit._config import variables
from fastapi_prodkit._config.variables import Unusable
from fastapi_prodkit.exceptions import ConfigurationError
from fastapi_prodkit.sections import SecretsSettings

__all__ = ["VariablesSource", "mounted_files", "parameter_store", "read_stores", "secrets_manager"]


def mounted_files(directory: str) -> dict[str, str]:
    """Return the content of each file in the directory by the file's name, without surrounding white space.

    This is what Docker and Kubernetes mount. Hidden entries (names that start with a dot, such as Kubernetes' own
    `..data`) and directories are skipped.

    Raises:
        ConfigurationError: The directory or one of its files cannot be read.
    """
    try:
        return {
            path.name: path.read_text(encoding="utf-8", errors="replace").strip()
            for path in sorted(Path(directory).iterdir())
            if path.is_file() and not path.name.startswith(".")
        }
    except OSError as error:
        raise ConfigurationError(
            f"{error.filename} cannot be read ({error.strerror}): mount a directory with one file for each variable"
        ) from None


def secrets_manager(secret_id: str) -> dict[str, str]:
    """Return the keys of one AWS Secrets Manager secret, whose value is a JSON object.

    Needs the permission `secretsmanager:GetSecretValue`. Region and credentials are boto3's own, as in
    https://boto3.amazonaws.com/v1/documentation/api/latest/guide/configuration.html.

    Raises:
        ConfigurationError: The secret cannot be read, or is not a JSON object.
        MissingExtraError: boto3 is not installed.
    """
    with _aws("secretsmanager", "secretsmanager:GetSecretValue") as client:
        text = client.get_secret_value(SecretId=secret_id).get("SecretString", "")
    try:
        keys = json.loads(text)
    except ValueError:
        keys = None
    if not isinstance(keys, dict):
        raise ConfigurationError('the secret is not a JSON object: store key/value pairs, {"DATABASE_URL": "..."}')
    return {
        key: value if isinstance(value, str) else json.dumps(value) for key, value in keys.items() if value is not None
    }


def parameter_store(prefix: str) -> dict[str, str]:
    """Return the parameters directly under the path `prefix` in AWS Systems Manager, decrypted.

    Needs the permission `ssm:GetParametersByPath`, and `kms:Decrypt` if they are encrypted with a key of your own.

    Raises:
        ConfigurationError: The parameters cannot be read, or there are none.
        MissingExtraError: boto3 is not installed.
    """
    path = prefix.rstrip("/") or "/"
    with _aws("ssm", "ssm:GetParametersByPath") as client:
        pages = client.get_paginator("get_parameters_by_path").paginate(Path=path, WithDecryption=True)
        parameters = {each["Name"].rpartition("/")[2]: each["Value"] for page in pages for each in page["Parameters"]}
    if not parameters:
        raise ConfigurationError("there are no parameters directly under this path in this account and region")
    return parameters


class VariablesSource(EnvSettingsSource):
    """Read the fields from variables of any origin that have the form of environment variables.

    Unknown names are ignored, even the name of a section. A list is separated by commas, or JSON.
    """

    def __init__(
        self,
        settings_cls: type[BaseSettings],
        variables: Mapping[str, str | None],
        origin: str,
        *,
        env_prefix: str | None = None,
    ) -> None:
        super().__init__(settings_cls, case_sensitive=False, env_prefix=env_prefix)
        self.env_vars = {name.lower(): value for name, value in variables.items() if value is not None}
        self.origin = origin

    def __call__(self) -> dict[str, Any]:
        """Return the values that are found; a source without variables is not searched."""
        return super().__call__() if self.env_vars else {}

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        """Ignore a variable that is named exactly like a section."""
        if variables.section_of(field) is not None:
            return None, field_name, False
        return super().get_field_value(field, field_name)

    def explode_env_vars(self, field_name: str, field: FieldInfo, env_vars: Mapping[str, str | None]) -> dict[str, Any]:
        """Return the fields of a section, and its switch, without other variables that share its prefix."""
        section = variables.section_of(field)
        if section is None:
            return super().explode_env_vars(field_name, field, env_vars)
        found: dict[str, Any] = {}
        if variables.has_switch(field) and (switch := env_vars.get(self._name(field_name, "enabled"))) is not None:
            found["enabled"] = switch
        for key, inner in section.model_fields.items():
            value = env_vars.get(self._name(field_name, key))
            if value is not None:
                found[key] = self.prepare_field_value(key, inner, value, value_is_complex=False)
        return found

    def decode_complex_value(self, field_name: str, field: FieldInfo, value: str) -> Any:  # noqa: ARG002 - the base's
        """Decode a value that looks like JSON, or split it at commas; validation checks the result."""
        if NoDecode in field.metadata:
            return value
        if value.strip().startswith(("[", "{")):
            try:
                return json.loads(value)
            except ValueError:
                if '"' in value:  # invalid JSON; without quotes it is a list that begins with an IPv6 address
                    return value
        return [item for item in (part.strip() for part in value.split(",")) if item]

    def _name(self, field_name: str, key: str) -> str:
        return variables.variable(self.env_prefix, field_name, key).lower()


_STORES: Final[Mapping[str, tuple[str, Callable[[str], dict[str, str]]]]] = {  # in order of precedence
    "dir": ("the mounted files", mounted_files),
    "aws_secret_id": ("AWS Secrets Manager", secrets_manager),
    "aws_ssm_prefix": ("AWS Systems Manager", parameter_store),
}


def read_stores(
    settings_cls: type[BaseSettings], states: Sequence[Mapping[str, Any]]
) -> tuple[list[VariablesSource], dict[str, Any]]:
    """Read the sources that SECRETS_* names in `states`, the values of other sources in order of precedence.

    Returns:
        The sources, and values that fail validation for those that cannot be used, so that it reports why.
    """
    given: dict[str, Any] = {}
    try:
        for state in reversed(states):
            given |= dict(state.get("secrets", {}))
        configured = SecretsSettings.model_validate(given)
    except (TypeError, ValueError):
        return [], {}  # validation finds this error again, and reports it with others
    stores: list[VariablesSource] = []
    problems: dict[str, Unusable] = {}
    for key, (origin, read) in _STORES.items():
        location = getattr(configured, key)
        try:
            variables = read(location) if location else {}
        except ConfigurationError as error:
            problems[key] = Unusable(str(error))
            continue
        store = VariablesSource(settings_cls, variables, origin)
        misplaced = Unusable(f"{origin} cannot set it: set it in the environment or in .env")
        problems |= dict.fromkeys(store().get("secrets", {}), misplaced)
        stores.append(store)
    return stores, {"secrets": problems} if problems else {}


@contextmanager
def _aws(service: str, permission: str) -> Iterator[Any]:
    """Open a client; raise a ConfigurationError of one line for its errors."""
    boto3 = _extras.require("boto3", extra="aws")
    config = _extras.require("botocore.config", extra="aws").Config(
        connect_timeout=3, read_timeout=5, retries={"mode": "standard", "total_max_attempts": 3}
    )
    errors = _extras.require("botocore.exceptions", extra="aws")
    try:
        yield boto3.client(service, config=config)
    except errors.ClientError as error:
        reason = error.response["Error"]["Code"]
    except errors.BotoCoreError as error:
        reason = type(error).__name__
    else:
        return
    raise ConfigurationError(
        f"AWS refuses or cannot be reached ({reason}): check the name, the region, and that the role may {permission}"
    )
