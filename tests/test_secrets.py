"""Mounted files, AWS Secrets Manager and AWS Systems Manager as sources of settings."""

import json
import os
import sys

import pytest

from fastapi_prodkit._config import variables
from fastapi_prodkit.exceptions import ConfigurationError, MissingExtraError, SettingsError
from fastapi_prodkit.secrets import mounted_files, parameter_store, secrets_manager
from fastapi_prodkit.settings import Settings

SECRET = "hunter2-correct-horse"
URL = f"postgresql://orders:{SECRET}@db.internal/orders"


@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path):
    """Start each test in an empty directory, without any of our variables."""
    monkeypatch.chdir(tmp_path)
    for name in list(os.environ):
        if name.upper() in variables.variables(Settings):
            monkeypatch.delenv(name)


@pytest.fixture
def aws(monkeypatch):
    """Mock AWS with moto; return a function that opens a client."""
    boto3 = pytest.importorskip("boto3", reason="the extra aws is not installed")
    moto = pytest.importorskip("moto", reason="moto is not installed")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-central-1")
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    with moto.mock_aws():
        yield boto3.client


@pytest.fixture
def without_boto3(monkeypatch):
    """Make the import of boto3 fail."""
    monkeypatch.setitem(sys.modules, "boto3", None)


def store(aws, value, name="prod/orders"):
    aws("secretsmanager").create_secret(Name=name, SecretString=value if isinstance(value, str) else json.dumps(value))


def put(aws, **parameters):
    for name, value in parameters.items():
        aws("ssm").put_parameter(Name=f"/orders/prod/{name}", Value=value, Type="SecureString")


class TestMountedFiles:
    def test_mounted_file_is_a_variable(self, tmp_path):
        """Named by the file, without the newline at its end."""
        (tmp_path / "DATABASE_URL").write_text(f"{URL}\n")
        (tmp_path / "metrics_token").write_text(SECRET)

        variables = mounted_files(str(tmp_path))

        assert variables == {"DATABASE_URL": URL, "metrics_token": SECRET}

    def test_hidden_entries_of_kubernetes_are_skipped(self, tmp_path):
        """Hidden files, directories and `..data` links of a Kubernetes volume are not read as variables."""
        (tmp_path / "..2026_11_01").mkdir()
        (tmp_path / "..2026_11_01" / "METRICS_TOKEN").write_text(SECRET)
        (tmp_path / "..data").symlink_to("..2026_11_01")
        (tmp_path / "METRICS_TOKEN").symlink_to("..data/METRICS_TOKEN")
        (tmp_path / "directory").mkdir()
        (tmp_path / ".hidden").write_text("x")

        variables = mounted_files(str(tmp_path))

        assert variables == {"METRICS_TOKEN": SECRET}

    def test_binary_file_is_skipped(self, tmp_path):
        """Such as a key store."""
        (tmp_path / "store.p12").write_bytes(b"\xff\xfe\x00")
        (tmp_path / "SERVICE_NAME").write_text("orders")

        settings = Settings(secrets={"dir": str(tmp_path)})

        assert settings.service.name == "orders"

    def test_settings_read_secrets_dir(self, monkeypatch, tmp_path):
        """Names in any case; below the environment and above the profile."""
        (tmp_path / "database_url").write_text(URL)
        (tmp_path / "Health_Details").write_text("false")
        (tmp_path / "LOG_LEVEL").write_text("ERROR")
        monkeypatch.setenv("SECRETS_DIR", str(tmp_path))
        monkeypatch.setenv("LOG_LEVEL", "DEBUG")

        settings = Settings()

        assert settings.database.url.get_secret_value() == URL
        assert settings.health.details is False
        assert settings.log.level == "DEBUG"

    def test_unreadable_directory_is_an_error(self, tmp_path):
        """It names variable, directory and remedy."""
        with pytest.raises(SettingsError) as caught:
            Settings(secrets={"dir": str(tmp_path / "nowhere")})

        assert caught.value.problems == {
            "SECRETS_DIR": f"{tmp_path / 'nowhere'} cannot be read (No such file or directory): "
            "mount a directory with one file for each variable (Directory of mounted secret files, one per variable)"
        }

    def test_secrets_variables_in_a_secret_are_an_error(self, tmp_path):
        """A SECRETS_* variable in a mounted file is an error, because the sources are already chosen by then."""
        (tmp_path / "SECRETS_AWS_SECRET_ID").write_text("prod/orders")

        with pytest.raises(SettingsError) as caught:
            Settings(secrets={"dir": str(tmp_path)})

        assert list(caught.value.problems) == ["SECRETS_AWS_SECRET_ID"]
        assert "the mounted files cannot set it" in str(caught.value)


class TestSecretsManager:
    def test_settings_read_keys_of_the_aws_secret(self, aws, monkeypatch):
        """The keys of the JSON object in SECRETS_AWS_SECRET_ID are read as variables, in any case of letters."""
        store(aws, {"DATABASE_URL": URL, "database_pool_size": 7, "CORS_ORIGINS": ["https://a.example"], "DEBUG": True})
        monkeypatch.setenv("SECRETS_AWS_SECRET_ID", "prod/orders")

        settings = Settings()

        assert settings.database.url.get_secret_value() == URL
        assert settings.database.pool_size == 7
        assert settings.cors.origins == ("https://a.example",)
        assert settings.debug is True

    def test_json_values_become_text_and_null_is_absent(self, aws):
        """JSON numbers and objects become text as in the environment, and a null value sets no variable."""
        store(aws, {"A": "text", "B": 1.5, "C": None, "D": {"e": False}})

        variables = secrets_manager("prod/orders")

        assert variables == {"A": "text", "B": "1.5", "D": '{"e": false}'}

    def test_missing_secret_is_an_error(self, aws):
        """With the reason and the permission, beside other errors."""
        with pytest.raises(SettingsError) as caught:
            Settings(secrets={"aws_secret_id": "nope"}, log={"level": "loud"})

        assert set(caught.value.problems) == {"SECRETS_AWS_SECRET_ID", "LOG_LEVEL"}
        assert caught.value.problems["SECRETS_AWS_SECRET_ID"].startswith(
            "AWS refuses or cannot be reached (ResourceNotFoundException): check the name, the region, and that the "
            "role may secretsmanager:GetSecretValue"
        )
        assert caught.value.__context__ is None

    @pytest.mark.parametrize("value", [SECRET, f'["{SECRET}"]', f'{{"{SECRET}"'])
    def test_secret_that_is_no_json_object_is_an_error(self, aws, value):
        """Its value is not shown."""
        store(aws, value)

        with pytest.raises(SettingsError) as caught:
            Settings(secrets={"aws_secret_id": "prod/orders"})

        assert "is not a JSON object" in caught.value.problems["SECRETS_AWS_SECRET_ID"]
        assert SECRET not in str(caught.value)

    def test_binary_secret_is_an_error(self, aws):
        """A binary AWS secret raises ConfigurationError, because it is not a JSON object."""
        aws("secretsmanager").create_secret(Name="binary", SecretBinary=b"\x00")

        with pytest.raises(ConfigurationError, match="not a JSON object"):
            secrets_manager("binary")

    def test_missing_region_or_credentials_are_an_error(self, aws, monkeypatch):
        """In one line."""
        monkeypatch.delenv("AWS_DEFAULT_REGION")
        monkeypatch.setenv("AWS_CONFIG_FILE", "/nowhere")

        with pytest.raises(ConfigurationError, match=r"NoRegionError.*check the name, the region"):
            secrets_manager("prod/orders")


class TestParameterStore:
    def test_settings_read_parameters_below_the_prefix(self, aws, monkeypatch):
        """Decrypted."""
        put(aws, DATABASE_URL=URL, **{"nested/LOG_LEVEL": "DEBUG"})
        monkeypatch.setenv("SECRETS_AWS_SSM_PREFIX", "/orders/prod/")

        settings = Settings()

        assert settings.database.url.get_secret_value() == URL
        assert settings.log.level == "INFO"

    def test_all_pages_of_parameters_are_read(self, aws):
        """AWS returns ten at a time."""
        put(aws, **{f"P{number}": str(number) for number in range(25)})

        variables = parameter_store("/orders/prod")

        assert variables == {f"P{number}": str(number) for number in range(25)}

    def test_string_list_is_a_list(self, aws):
        """A StringList parameter of AWS is read as a comma-separated list setting."""
        aws("ssm").put_parameter(Name="/orders/prod/HOSTS_ALLOWED", Value="a.example,b.example", Type="StringList")

        settings = Settings(secrets={"aws_ssm_prefix": "/orders/prod"})

        assert settings.hosts.allowed == ("a.example", "b.example")

    def test_prefix_may_be_the_root(self, aws):
        """For parameters without a path."""
        aws("ssm").put_parameter(Name="/LOG_LEVEL", Value="ERROR", Type="String")

        assert parameter_store("/") == {"LOG_LEVEL": "ERROR"}

    @pytest.mark.parametrize(("prefix", "reason"), [("/nope", "there are no parameters"), ("nope", "match pattern")])
    def test_prefix_without_parameters_is_an_error(self, aws, prefix, reason):
        """An SSM prefix that is invalid or matches no parameter is reported under SECRETS_AWS_SSM_PREFIX."""
        with pytest.raises(SettingsError) as caught:
            Settings(secrets={"aws_ssm_prefix": prefix})

        assert list(caught.value.problems) == ["SECRETS_AWS_SSM_PREFIX"]
        assert reason in caught.value.problems["SECRETS_AWS_SSM_PREFIX"]


class TestTogether:
    def test_files_win_over_secret_and_secret_over_parameters(self, aws, tmp_path):
        """All win over the profile."""
        (tmp_path / "SERVICE_NAME").write_text("file")
        store(aws, {"SERVICE_NAME": "secret", "SERVICE_VERSION": "secret"})
        put(aws, SERVICE_NAME="parameter", SERVICE_VERSION="parameter", LOG_LEVEL="ERROR", HEALTH_DETAILS="false")
        places = {"dir": str(tmp_path), "aws_secret_id": "prod/orders", "aws_ssm_prefix": "/orders/prod"}

        settings = Settings(secrets=places)

        assert (settings.service.name, settings.service.version) == ("file", "secret")
        assert (settings.log.level, settings.health.details) == ("ERROR", False)

    def test_all_unreadable_sources_are_reported_together(self, aws):
        """One SettingsError reports all three secret sources when none of them can be read."""
        places = {"dir": "nowhere", "aws_secret_id": "nope", "aws_ssm_prefix": "/nope"}

        with pytest.raises(SettingsError) as caught:
            Settings(secrets=places)

        assert list(caught.value.problems) == ["SECRETS_DIR", "SECRETS_AWS_SECRET_ID", "SECRETS_AWS_SSM_PREFIX"]

    def test_aws_is_contacted_only_if_configured(self, without_boto3):
        """boto3 is not imported otherwise."""
        settings = Settings()

        assert settings.secrets.aws_secret_id is None

    @pytest.mark.parametrize("place", ["aws_secret_id", "aws_ssm_prefix"])
    def test_missing_boto3_names_the_extra(self, without_boto3, place):
        """The error for a missing boto3 contains the pip command that installs the `aws` extra."""
        with pytest.raises(MissingExtraError, match=r"pip install 'fastapi-prodkit\[aws\]'"):
            Settings(secrets={place: "/x"})
