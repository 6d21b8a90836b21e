"""Settings: sources, profiles, sections, lists, errors, and production rules."""

import io
import os
import re
import sys
import traceback
from pathlib import Path
from typing import Annotated

import pytest
from pydantic import AliasChoices, BaseModel, Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import InitSettingsSource, NoDecode, SettingsConfigDict

from fastapi_prodkit import sections
from fastapi_prodkit._config import variables
from fastapi_prodkit.exceptions import ConfigurationError, SettingsError, SettingsWarning
from fastapi_prodkit.settings import PROFILES, Settings

PAGE = Path(__file__).parent.parent / "docs" / "pieces" / "settings.md"
SECRET = "hunter2-correct-horse"
WITHHELD = "cannot be used; the reason is not shown because it repeats the value"
SAFE = {"ENVIRONMENT": "prod", "HOSTS_ALLOWED": "api.example.com"}
VARIABLES = variables.variables(Settings)


@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path):
    """Start each test in an empty directory, without any of our variables."""
    monkeypatch.chdir(tmp_path)
    for name in list(os.environ):
        if name.upper() in {*VARIABLES, "WEB_CONCURRENCY"}:
            monkeypatch.delenv(name)


@pytest.fixture
def load(monkeypatch):
    """Load settings with these variables in the environment."""

    def load(variables=None, cls=Settings, **values):
        for name, value in (variables or {}).items():
            monkeypatch.setenv(name, value)
        return cls(**values)

    return load


@pytest.fixture
def refused(load):
    """Return the problems of loading with these variables."""

    def refused(variables=None, cls=Settings, **values):
        with pytest.raises(SettingsError) as caught:
            load(variables, cls, **values)
        return caught.value.problems

    return refused


class Terminal(io.StringIO):
    def isatty(self):
        return True


class StripeSettings(sections.Section):
    api_key: SecretStr = Field(description="Secret key of the account.")
    currencies: tuple[str, ...] = ()


class Warehouse(BaseModel):
    bays: int = 1


class OrdersSettings(Settings):
    stripe: StripeSettings | None = None
    warehouse: Warehouse = Warehouse()
    regions: list[str] = Field(default_factory=list)
    ports: set[int] = Field(default_factory=set)
    labels: dict[str, str] = Field(default_factory=dict)
    raw: Annotated[list[str], NoDecode] = Field(default_factory=list)
    log_dir: str = "logs"
    shop: str = Field("", validation_alias=AliasChoices("SHOP_NAME", "STORE_NAME"))

    @field_validator("raw", mode="before")
    @classmethod
    def _lines(cls, value):
        return value.split(";") if isinstance(value, str) else value


class TestNames:
    def test_variable_is_section_and_field(self, load):
        """DATABASE_POOL_SIZE in the environment sets `settings.database.pool_size` in code."""
        settings = load({"DATABASE_URL": "sqlite:///x.db", "DATABASE_POOL_SIZE": "7", "RATE_LIMIT_DEFAULT": "5/minute"})

        assert settings.database.pool_size == 7
        assert settings.rate_limit.default == "5/minute"

    def test_case_of_a_variable_does_not_matter(self, load):
        """A variable name is matched in any case of letters, so `log_Level` sets `settings.log.level`."""
        settings = load({"log_Level": "debug", "debug": "true"})

        assert settings.log.level == "DEBUG"
        assert settings.debug is True

    def test_prefix_of_a_subclass_is_required(self, load, refused):
        """In errors and refusals too."""

        class Prefixed(Settings):
            model_config = SettingsConfigDict(env_prefix="APP_")

        settings = load({"APP_LOG_LEVEL": "ERROR", "LOG_LEVEL": "DEBUG", "APP_METRICS_ENABLED": "false"}, Prefixed)

        assert settings.log.level == "ERROR"
        assert settings.metrics is None
        assert settings.hosts.allowed == ("*",)
        problems = refused({"APP_ENVIRONMENT": "prod", "APP_HEALTH_CACHE": "-1", "APP_LOG_ENABLED": "maybe"}, Prefixed)
        assert set(problems) == {"APP_HOSTS_ALLOWED", "APP_HEALTH_CACHE", "APP_LOG_ENABLED"}

    def test_no_section_is_a_prefix_of_another(self):
        """A variable belongs to one section."""
        names = [name for name, field in Settings.model_fields.items() if variables.section_of(field)]

        clashes = [(a, b) for a in names for b in names if a != b and b.startswith(f"{a}_")]

        assert not clashes

    def test_section_model_is_named_after_its_section(self):
        """The model of each section is named after its field, such as RateLimitSettings for `rate_limit`."""
        models = {name: variables.section_of(field) for name, field in Settings.model_fields.items()}

        misnamed = {
            name: model.__name__
            for name, model in models.items()
            if model and model.__name__ != name.title().replace("_", "") + "Settings"
        }

        assert not misnamed

    def test_settings_and_sections_are_frozen(self, load):
        """An assignment to a setting raises an error, so settings cannot change after an app is built from them."""
        settings = load()

        with pytest.raises(ValueError, match="frozen"):
            settings.debug = True
        with pytest.raises(ValueError, match="frozen"):
            settings.health.cache = 5

    def test_two_settings_are_separate(self, load):
        """Two Settings objects keep their own values, because no global instance exists."""
        one, two = load(debug=True), load(debug=False)

        assert (one.debug, two.debug) == (True, False)


class TestSections:
    @pytest.mark.parametrize(
        "section", [name for name, field in Settings.model_fields.items() if variables.has_switch(field)]
    )
    def test_section_switched_off_is_none(self, section, load):
        """<SECTION>_ENABLED=false sets a section to None, and <SECTION>_ENABLED=true overrides None in code."""
        settings = load({f"{section.upper()}_ENABLED": "false"})

        assert getattr(settings, section) is None
        assert getattr(load({f"{section.upper()}_ENABLED": "true"}, **{section: None}), section) is None

    def test_section_can_be_switched_on(self, load):
        """DOCS_ENABLED=true enables the docs section in prod, where the section is None by default."""
        off, on = load(SAFE), load({"DOCS_ENABLED": "true"})

        assert off.docs is None
        assert on.docs is not None

    def test_service_and_secrets_cannot_be_switched_off(self, load, refused):
        """SERVICE_ENABLED and SECRETS_ENABLED have no effect, because both sections always exist."""
        settings = load({"SERVICE_ENABLED": "false", "SECRETS_ENABLED": "false"})

        assert settings.service.name == "fastapi-service"
        assert set(refused(service=None)) == {"SERVICE"}

    def test_invalid_switch_is_an_error(self, refused):
        """A <SECTION>_ENABLED value that is not a boolean, including an empty one, is an error with its name."""
        problems = refused({"ACCESS_LOG_ENABLED": "perhaps", "LOG_ENABLED": ""})

        assert problems == {"ACCESS_LOG_ENABLED": "must be true or false", "LOG_ENABLED": "must be true or false"}

    def test_variables_of_a_section_switched_off_are_ignored(self, load):
        """With DATABASE_ENABLED=false, DATABASE_POOL_SIZE does not make DATABASE_URL required."""
        settings = load({"DATABASE_ENABLED": "false", "DATABASE_POOL_SIZE": "3"})

        assert settings.database is None

    def test_section_without_its_required_variable_is_none(self, load):
        """Whatever the profile has for it."""
        settings = load()

        assert settings.database is None

    @pytest.mark.parametrize("variable", ["DATABASE_POOL_SIZE", "DATABASE_ENABLED"])
    def test_variable_without_the_required_one_is_an_error(self, variable, refused):
        """DATABASE_POOL_SIZE or DATABASE_ENABLED without DATABASE_URL is an error that names DATABASE_URL."""
        problems = refused({variable: "1"})

        assert list(problems) == ["DATABASE_URL"]
        assert problems["DATABASE_URL"].startswith("is required: set it, or remove the other variables of the section")

    def test_limit_may_be_none(self, load):
        """The text `None` in LIMITS_MAX_BODY_SIZE switches the limit off."""
        settings = load({"LIMITS_MAX_BODY_SIZE": "None"})

        assert settings.limits.max_body_size is None

    def test_cors_without_origins_is_not_configured(self, load):
        """CORS is not configured without allowed origins, even if another CORS variable is set."""
        settings = load({"CORS_MAX_AGE": "5"})

        assert not settings.cors.configured

    def test_empty_secret_is_an_error(self, refused):
        """An empty METRICS_TOKEN or DATABASE_URL is an error, because an empty secret protects nothing."""
        problems = refused({"METRICS_TOKEN": "", "DATABASE_URL": ""})

        assert set(problems) == {"METRICS_TOKEN", "DATABASE_URL"}

    def test_short_secret_is_an_error_in_characters(self, refused):
        """The error for a short token states the minimum in characters, not in pydantic's term."""
        problems = refused({"LOG_LEVEL_TOKEN": "short"})

        assert problems["LOG_LEVEL_TOKEN"].startswith("must have at least 16 characters")

    def test_vercel_variables_are_both_required(self, refused, load):
        """CORS_VERCEL_PROJECT requires CORS_VERCEL_TEAM; an invalid project alone is reported only once."""
        settings = load(cors={"vercel_project": "shop", "vercel_team": "acme"})

        assert settings.cors.configured
        assert set(refused({"CORS_VERCEL_PROJECT": "shop"})) == {"CORS_VERCEL_TEAM"}
        assert set(refused({"CORS_VERCEL_PROJECT": "Not a slug"})) == {"CORS_VERCEL_PROJECT"}


class TestForeignVariables:
    def test_other_variables_of_the_environment_are_ignored(self, load, recwarn):
        """Such as those of Kubernetes."""
        settings = load(
            {
                "DATABASE_PORT": "tcp://10.0.0.1:5432",
                "DATABASE_PORT_5432_TCP_ADDR": "10.0.0.1",
                "DATABASE_SERVICE_HOST": "10.0.0.1",
                "DATABASE": "postgres",
                "SERVICE": "[1",
                "SERVICE_PORT": "tcp://10.0.0.1:80",
                "HEALTH_PORT": "tcp://10.0.0.1:81",
                "LOG": "{",
                "CORS": "a,b",
            }
        )

        assert settings.database is None
        assert settings.log.level == "INFO"
        assert not recwarn

    @pytest.mark.parametrize("in_file", [False, True])
    def test_section_in_one_variable_is_an_error(self, refused, in_file, tmp_path):
        """It would be ignored without notice, and leave all routes open; the error does not repeat it."""
        whole = f'{{"secret": "{SECRET}", "audience": ["a"]}}'
        given = {"AUTH": whole, "LOG": '{"other": 1}', "CORS": '["origins"]'}
        if in_file:
            (tmp_path / ".env").write_text("\n".join(f"{name}={value}" for name, value in given.items()))

        problems = refused({} if in_file else given)

        assert problems == {"AUTH": "is not read as JSON: set AUTH_SECRET, AUTH_AUDIENCE in its place"}

    def test_other_variables_of_env_files_are_ignored(self, load, tmp_path):
        """Unknown variables in a .env file, which other tools may share, are no error and configure no section."""
        (tmp_path / ".env").write_text("POSTGRES_PASSWORD=x\nDATABASE_PORT=5432\nDATABASE=\nKEY_WITHOUT_VALUE\n")

        settings = load()

        assert settings.database is None


class TestNearMisses:
    @pytest.mark.parametrize(
        ("name", "meant"),
        [
            ("RATE_LIMT_DEFAULT", "RATE_LIMIT_DEFAULT"),
            ("DATABASE_POOLSIZE", "DATABASE_POOL_SIZE"),
            ("LOG_LEVLE", "LOG_LEVEL"),
            ("METRICS_TOKN", "METRICS_TOKEN"),
            ("METRICS_TOKENN", "METRICS_TOKEN"),
            ("METRICS_TOK", "METRICS_TOKEN"),
            ("HOST_ALLOWED", "HOSTS_ALLOWED"),
            ("DATABASE_URI", "DATABASE_URL"),
            ("ENVIROMENT", "ENVIRONMENT"),
            ("DEUBG", "DEBUG"),
            ("HEALTH_ENABELD", "HEALTH_ENABLED"),
        ],
    )
    def test_misspelt_variable_warns_with_a_suggestion(self, name, meant, load):
        """Without its value."""
        with pytest.warns(SettingsWarning) as caught:
            load({name: SECRET})

        assert [str(warning.message) for warning in caught] == [
            f"{name} in the environment is not a setting; did you mean {meant}?"
        ]

    @pytest.mark.parametrize("environment", ["staging", "prod"])
    @pytest.mark.parametrize(("name", "meant"), [("AUTH_ISUER", "AUTH_ISSUER"), ("AUTH_SECRETT", "AUTH_SECRET")])
    def test_misspelt_variable_of_authentication_stops_production(self, name, meant, environment, load):
        """Without authentication all routes would be open."""
        with pytest.raises(SettingsError) as refusal:
            load({"ENVIRONMENT": environment, "HOSTS_ALLOWED": "api.example.com", name: SECRET})

        assert refusal.value.problems == {name: f"is not a setting; did you mean {meant}?"}

    @pytest.mark.parametrize(
        "name",
        [
            *("DATABASE_PORT", "DATABASE_HOST", "DATABASE_USER", "DATABASE_NAME", "DATABASE_PASSWORD", "DATABASE_DB"),
            *("SERVICE_HOST", "SERVICE_PORT", "LOG_DIR", "LOG_FILE", "LOGNAME", "METRICS_PORT", "HEALTH_PORT"),
            *("SERVICE_NAMESPACE", "DATABASE_SSLMODE", "DOCS_URL", "HOSTNAME", "PROXY_URL", "HTTP_PROXY", "NO_PROXY"),
            *("_", "BUG", "LOG_LEVEL_TOKEN_FILE", "LOG_LE"),
            *("RATE_LIMIT", "LIMITS", "CORS_HEADERS", "SECRETS_ID", "PYTHONDEVMODE", "ENV", "LANG"),
        ],
    )
    def test_other_variable_does_not_warn(self, name, load, recwarn):
        """A variable of another program that only shares a prefix with a setting causes no warning."""
        load({name: "x"})

        assert not recwarn

    def test_warning_points_to_the_caller(self, monkeypatch):
        """The warning about a misspelt variable is attributed to the file that calls `Settings()`."""
        monkeypatch.setenv("LOG_LEVLE", "x")

        with pytest.warns(SettingsWarning) as caught:
            Settings()

        assert caught[0].filename == __file__

    def test_similar_variable_beside_the_right_one_does_not_warn(self, load, recwarn):
        """A name similar to a setting causes no warning if the setting itself is set, such as DATABASE_URL."""
        load({"DATABASE_URL": "sqlite:///x.db", "DATABASE_URI": "sqlite:///x.db"})

        assert not recwarn

    def test_misspelt_variable_in_a_file_warns_with_its_source(self, load, tmp_path):
        """The warning about a misspelt variable names its .env file or the mounted files as the source."""
        (tmp_path / ".env").write_text("LOG_LEVLE=x\n")
        (tmp_path / ".env.dev").write_text("LOG_FORMT=x\n")
        (tmp_path / "mounted").mkdir()
        (tmp_path / "mounted" / "METRICS_TOKN").write_text(SECRET)

        with pytest.warns(SettingsWarning) as caught:
            load({"SECRETS_DIR": "mounted"})

        assert {str(warning.message).split(" is not")[0] for warning in caught} == {
            "LOG_LEVLE in .env",
            "LOG_FORMT in .env.dev",
            "METRICS_TOKN in the mounted files",
        }

    def test_field_of_a_subclass_does_not_warn(self, load, recwarn):
        """A variable that a subclass defines causes no warning, even if its name resembles a built-in setting."""

        class Near(Settings):
            log_levels: str = ""
            debu: bool = False
            host: dict[str, str] = Field(default_factory=dict)
            other: str = Field("", validation_alias="METRICS_TOKENS")

        settings = load({"LOG_LEVELS": "x", "DEBU": "1", "HOST_ALLOWED": "x", "METRICS_TOKENS": "y"}, Near)

        assert (settings.log_levels, settings.debu, settings.other) == ("x", True, "y")
        assert not recwarn


class TestLists:
    @pytest.mark.parametrize("value", ["a.example, b.example", " a.example ,b.example,", '["a.example", "b.example"]'])
    def test_list_is_separated_by_commas_or_json(self, value, load):
        """A comma-separated value and a JSON array give equal lists, in sections and in fields of a subclass."""
        settings = load(
            {"HOSTS_ALLOWED": value, "REGIONS": value, "STRIPE_CURRENCIES": value, "STRIPE_API_KEY": "k"},
            OrdersSettings,
        )

        assert settings.hosts.allowed == ("a.example", "b.example")
        assert settings.regions == ["a.example", "b.example"]
        assert settings.stripe.currencies == ("a.example", "b.example")

    def test_empty_value_is_an_empty_list(self, load):
        """An empty PROXY_TRUSTED is an empty list, so that no proxy is trusted."""
        settings = load({"PROXY_TRUSTED": "", "REGIONS": ""}, OrdersSettings)

        assert settings.proxy.trusted == ()
        assert settings.regions == []

    def test_list_may_begin_with_an_ipv6_address(self, load):
        """It is not JSON."""
        settings = load({"HOSTS_ALLOWED": "[::1],localhost"})

        assert settings.hosts.allowed == ("[::1]", "localhost")

    def test_items_are_converted(self, load):
        """A comma-separated value is converted to a set of integers, and a JSON object to a dictionary."""
        settings = load({"PORTS": "80, 443", "LABELS": '{"team": "orders"}'}, OrdersSettings)

        assert settings.ports == {80, 443}
        assert settings.labels == {"team": "orders"}

    def test_invalid_list_is_an_error_with_its_position(self, refused):
        """An invalid list or dictionary is reported by its variable, and an invalid item by its position."""
        problems = refused({"REGIONS": '["a"', "PORTS": "80,x", "LABELS": "a,b"}, OrdersSettings)

        assert problems["REGIONS"] == "must be a valid list"
        assert problems["PORTS"] == "item 2 must be a valid integer, unable to parse string as an integer"
        assert problems["LABELS"] == "must be a valid dictionary"

    def test_no_decode_is_respected(self, load):
        """A field with `NoDecode` gets the raw text of its variable for its own validator."""
        settings = load({"RAW": "a,b;c"}, OrdersSettings)

        assert settings.raw == ["a,b", "c"]


class TestSources:
    def test_first_source_with_a_value_wins(self, load, tmp_path):
        """Arguments, environment, .env.{environment}, .env, mounted files, profile, defaults."""
        mounted = tmp_path / "mounted"
        mounted.mkdir()
        names = ["service_name", "service_version", "log_level", "health_timeout", "health_cache", "health_details"]
        for source, count in {".env.dev": 3, ".env": 4}.items():
            (tmp_path / source).write_text("".join(f"{name.upper()}={source}\n" for name in names[:count]))
        (tmp_path / ".env.dev").write_text("SERVICE_NAME=x\nSERVICE_VERSION=x\nLOG_LEVEL=ERROR\n")
        (tmp_path / ".env").write_text("SERVICE_NAME=y\nSERVICE_VERSION=y\nLOG_LEVEL=DEBUG\nHEALTH_TIMEOUT=4\n")
        for name in names[:5]:
            (mounted / name).write_text("5\n")

        settings = load(
            {"SECRETS_DIR": str(mounted), "SERVICE_NAME": "z", "SERVICE_VERSION": "z"}, service={"name": "a"}
        )

        assert settings.service.name == "a"
        assert settings.service.version == "z"
        assert settings.log.level == "ERROR"
        assert settings.health.timeout == 4
        assert settings.health.cache == 5
        assert settings.health.details is True
        assert settings.rate_limit.strategy == "fixed-window"

    @pytest.mark.parametrize(
        ("environment", "default"),
        [("dev", "10000/minute"), ("test", None), ("staging", "100/minute"), ("prod", "100/minute")],
    )
    def test_default_rate_limit_is_off_in_test_only(self, environment, default, load):
        """Only the test environment has no default rate limit; an explicit value applies in all environments."""
        explicit = {"RATE_LIMIT_DEFAULT": "5/minute"}

        settings = load({**SAFE, "ENVIRONMENT": environment})

        assert settings.rate_limit.default == default
        assert load({**SAFE, "ENVIRONMENT": environment, **explicit}).rate_limit.default == "5/minute"
        assert load({**SAFE, "ENVIRONMENT": environment, "RATE_LIMIT_DEFAULT": "None"}).rate_limit.default is None

    def test_section_argument_replaces_the_section(self, load):
        """A dictionary is merged with the other sources."""
        variables = {"HEALTH_TIMEOUT": "3", "METRICS_PUBLIC": "false"}

        settings = load(variables, health=sections.HealthSettings(cache=9), metrics={"token": SECRET})

        assert (settings.health.timeout, settings.health.cache, settings.health.details) == (1, 9, False)
        assert settings.metrics.public is False
        assert settings.metrics.token.get_secret_value() == SECRET

    @pytest.mark.parametrize("how", ["argument", "environment", "file"])
    def test_environment_selects_file_and_profile(self, how, load, tmp_path):
        """From an argument, the process, or .env."""
        (tmp_path / ".env").write_text(f"HOSTS_ALLOWED=a.example\n{'ENVIRONMENT=staging' if how == 'file' else ''}\n")
        (tmp_path / ".env.staging").write_text("SERVICE_NAME=staged\n")
        variables = {"ENVIRONMENT": "staging"} if how == "environment" else {}

        settings = load(variables, **({"environment": "staging"} if how == "argument" else {}))

        assert settings.environment == "staging"
        assert settings.service.name == "staged"
        assert settings.docs is None

    def test_process_overrides_environment_of_the_env_file(self, load, tmp_path):
        """ENVIRONMENT in the process environment takes precedence over ENVIRONMENT in the .env file."""
        (tmp_path / ".env").write_text("ENVIRONMENT=dev\n")

        settings = load({"ENVIRONMENT": "test"})

        assert settings.environment == "test"

    @pytest.mark.parametrize("source", [".env.dev", "mounted/ENVIRONMENT"])
    def test_later_source_may_not_change_the_environment(self, source, refused, load, tmp_path):
        """The profile is selected before it is read."""
        (tmp_path / "mounted").mkdir()
        (tmp_path / source).write_text("ENVIRONMENT=prod" if source == ".env.dev" else "prod")

        problems = refused({"SECRETS_DIR": "mounted"})

        assert list(problems) == ["ENVIRONMENT"]
        assert "in the process's environment or in .env only" in problems["ENVIRONMENT"]
        (tmp_path / source).write_text("ENVIRONMENT=dev" if source == ".env.dev" else "dev")
        assert load().environment == "dev"

    def test_secrets_may_be_configured_in_env_files_and_in_code(self, load, tmp_path):
        """SECRETS_DIR can be set in .env files and in code, because the secrets are read after both."""
        (tmp_path / "one").mkdir()
        (tmp_path / "one" / "SERVICE_NAME").write_text("mounted")
        (tmp_path / ".env").write_text("SECRETS_DIR=nowhere\n")
        (tmp_path / ".env.dev").write_text("SECRETS_DIR=one\n")

        from_file = load()
        from_code = load(secrets={"dir": "one"})
        from_model = load(secrets=sections.SecretsSettings(dir="one"))

        assert {each.service.name for each in (from_file, from_code, from_model)} == {"mounted"}

    def test_env_files_can_be_chosen_or_left_out(self, load, tmp_path):
        """By `_env_file` of pydantic-settings."""
        (tmp_path / ".env").write_text("SERVICE_NAME=default\n")
        (tmp_path / "local.env").write_text("SERVICE_NAME=local\n")
        (tmp_path / "local.env.dev").write_text("SERVICE_VERSION=9\n")

        left_out = load(_env_file=None)
        chosen = load(_env_file=[".env", Path("local.env")])

        assert left_out.service.name == "fastapi-service"
        assert (chosen.service.name, chosen.service.version) == ("local", "9")

    def test_env_file_in_another_encoding_is_an_error(self, refused, tmp_path):
        """A .env file in UTF-16 is an error that asks for UTF-8 and does not show the content."""
        (tmp_path / ".env").write_bytes(SECRET.encode("utf-16"))

        problems = refused()

        assert problems == {".env": "is not encoded in UTF-8: save it in UTF-8"}

    def test_subclass_can_add_a_source(self, load):
        """A subclass can insert a source with `settings_customise_sources` of pydantic-settings."""

        class WithVault(Settings):
            @classmethod
            def settings_customise_sources(cls, settings_cls, **sources):
                ours = super().settings_customise_sources(settings_cls, **sources)
                return (*ours[:-1], InitSettingsSource(settings_cls, {"service": {"name": "from-vault"}}), ours[-1])

        settings = load(cls=WithVault)

        assert settings.service.name == "from-vault"

    def test_settings_are_read_at_construction(self, load):
        """Each construction of Settings reads the environment again; earlier objects keep their values."""
        first = load()

        second = load({"SERVICE_NAME": "later"})

        assert (first.service.name, second.service.name) == ("fastapi-service", "later")


class TestProfiles:
    @pytest.mark.parametrize("environment", ["dev", "test"])
    def test_dev_and_test_are_relaxed(self, environment, load):
        """Any host, public metrics and docs, details in /ready, and a database without TLS."""
        settings = load({"ENVIRONMENT": environment, "DATABASE_URL": "postgresql://db/x"})

        assert settings.hosts.allowed == ("*",)
        assert settings.health.details
        assert settings.metrics.public
        assert settings.docs is not None
        assert settings.database.ssl == "off"

    @pytest.mark.parametrize("environment", ["staging", "prod"])
    def test_staging_and_prod_have_the_defaults_of_the_sections(self, environment, load):
        """Staging and prod use the section defaults, such as no health details and verified database TLS."""
        settings = load({**SAFE, "ENVIRONMENT": environment, "DATABASE_URL": "postgresql://db/x"})

        assert not settings.health.details
        assert not settings.metrics.public
        assert settings.docs is None
        assert settings.database.ssl == "verify-full"
        assert settings.log == sections.LogSettings()

    @pytest.mark.parametrize(("environment", "expected"), [("dev", "console"), ("test", "json"), ("prod", "json")])
    def test_console_format_requires_dev_on_a_terminal(self, environment, expected, load, monkeypatch):
        """The console log format is used only in dev on a terminal; a pipe or another environment gets JSON."""
        variables = {**SAFE, "ENVIRONMENT": environment}
        piped = load(variables).log.format
        monkeypatch.setattr(sys, "stdout", Terminal())

        on_terminal = load(variables).log.format
        monkeypatch.setattr(sys, "stdout", None)

        assert (piped, on_terminal, load(variables).log.format) == ("json", expected, "json")

    def test_environment_is_dev_by_default(self, load):
        """Without ENVIRONMENT the environment is dev, which accepts DEBUG=true."""
        settings = load({"DEBUG": "true"})

        assert settings.environment == "dev"

    def test_every_environment_has_a_profile_of_known_variables(self):
        """The profile table covers all four environments and contains only variables that Settings reads."""
        names = {name for profile in PROFILES.values() for name in profile}

        assert list(PROFILES) == ["dev", "test", "staging", "prod"]
        assert names <= set(VARIABLES)

    def test_page_states_the_profiles(self):
        """With every default that ENVIRONMENT changes."""
        table = PAGE.read_text().partition("\n## Profiles\n")[2].partition("\n## ")[0]
        rows = re.findall(r"^\| `([A-Z_]+)` \| (?:`(.*?)`)?[^|]*\| (?:`(.*?)`)?[^|]*\|", table, re.MULTILINE)

        assert {name: value for name, value, _ in rows if value} == PROFILES["dev"]
        assert {name: value for name, _, value in rows if value} == PROFILES["test"]


class TestErrors:
    def test_all_errors_are_reported_by_variable(self, refused, tmp_path):
        """From all sources."""
        (tmp_path / ".env").write_text("HEALTH_CACHE=soon\n")
        variables = {"ENVIRONMENT": "prod", "DEBUG": "true", "LOG_LEVEL": "loud", "DATABASE_POOL_SIZE": "many"}

        problems = refused({**variables, "SECRETS_DIR": "nowhere"}, health={"timeout": -1}, rate_limits=None)

        assert set(problems) == {
            "DEBUG",
            "LOG_LEVEL",
            "DATABASE_URL",
            "DATABASE_POOL_SIZE",
            "HEALTH_CACHE",
            "HEALTH_TIMEOUT",
            "HOSTS_ALLOWED",
            "SECRETS_DIR",
            "RATE_LIMITS",
        }

    def test_message_lists_names_reasons_and_descriptions(self, load):
        """The error message lists each variable with its reason and its description, one per line."""
        with pytest.raises(ConfigurationError) as caught:
            load({"DATABASE_POOL_SIZE": "0", "DATABASE_URL": "sqlite:///x", "LOG_LEVEL": "loud"})

        assert str(caught.value) == (
            "2 settings cannot be used:\n"
            "  LOG_LEVEL: must be 'DEBUG', 'INFO', 'WARNING', 'ERROR' or 'CRITICAL' (Lowest level written)\n"
            "  DATABASE_POOL_SIZE: must be greater than or equal to 1 (Connections kept open by each worker)"
        )

    @pytest.mark.parametrize(
        "variables",
        [
            {"DATABASE_POOL_SIZE": SECRET},
            {"DATABASE_URL": SECRET, "DATABASE_SSL": "never"},
            {"DATABASE_URL": f"postgresql://u:{SECRET}@db/x", "DATABASE_POOL_SIZE": "x"},
            {"METRICS_TOKEN": SECRET, "METRICS_PUBLIC": "x"},
            {"ENVIRONMENT": SECRET},
            {"ENVIRONMENT": "prod", "DATABASE_URL": f"postgresql://u:{SECRET}@db/x", "DATABASE_SSL": "off"},
            {"DEBUG": SECRET},
            {"CORS_ORIGIN_REGEX": f"({SECRET}"},
            {"CORS_ORIGINS": SECRET},
            {"HEADERS_CSP": f"{SECRET}\n"},
            {"LOG_ENABLED": SECRET},
            {"SECRETS_AWS_SSM_PREFIX": SECRET},
        ],
    )
    def test_error_never_shows_a_value(self, variables, load):
        """Nor does its traceback."""
        with pytest.raises(SettingsError) as caught:
            load(variables)

        error = caught.value
        shown = [str(error), repr(error), repr(error.args), repr(vars(error)), *traceback.format_exception(error)]
        assert SECRET not in "".join(shown)
        assert error.__cause__ is None
        assert error.__context__ is None

    def test_message_with_the_value_is_withheld(self, refused):
        """Other messages are kept."""

        class Careless(Settings):
            license: SecretStr = SecretStr("")
            parts: dict[str, list[str]] = Field(default_factory=dict)
            number: str = ""
            kind: str = ""

            @field_validator("license")
            @classmethod
            def _number(cls, value):
                int(value.get_secret_value())

            @field_validator("parts", "number")
            @classmethod
            def _check(cls, value):
                raise ValueError(f"{value} is bad")

            @field_validator("kind")
            @classmethod
            def _kind(cls, value):
                raise AssertionError("must be a kind")

        problems = refused(
            {"LICENSE": SECRET, "PARTS": f'{{"a": ["{SECRET}", 1]}}', "NUMBER": SECRET, "KIND": SECRET},
            Careless,
            parts={"b": {SECRET}},
        )

        in_code = refused({"PARTS": "{}", "NUMBER": "1", "KIND": ""}, Careless, license=SecretStr(SECRET))

        assert SECRET not in f"{problems} {in_code}"
        assert problems["LICENSE"] == WITHHELD
        assert problems["NUMBER"] == problems["LICENSE"]
        assert problems["KIND"] == "must be a kind"

    @pytest.mark.parametrize(
        ("url", "message"),
        [
            (f"{SECRET}@myredis:6379/0", "cannot be used; the reason is not shown because it repeats the value"),
            (
                f"redis://user:{SECRET}@myredis:6379/0",
                "cannot be used; the reason is not shown because it repeats the value",
            ),
            ("redis://a:b@c", "unknown scheme redis, host ['b@c']"),
        ],
    )
    def test_message_with_a_part_of_a_secret_is_withheld(self, refused, url, message):
        """A validator's reason that repeats a part of a secret is withheld, except for a URL's scheme."""

        class Careless(Settings):
            queue: SecretStr

            @field_validator("queue")
            @classmethod
            def _scheme(cls, value):
                scheme, *rest = value.get_secret_value().split(":")
                raise ValueError(f"unknown scheme {scheme}, host {rest[1:]}")

        assert refused({"QUEUE": url}, Careless)["QUEUE"] == message

    def test_settings_never_show_a_secret(self, load):
        """In repr, str and both dumps."""
        settings = load({"DATABASE_URL": f"postgresql://u:{SECRET}@db/x", "METRICS_TOKEN": SECRET})

        shown = f"{settings!r} {settings} {settings.model_dump()} {settings.model_dump_json()}"

        assert SECRET not in shown
        assert settings.metrics.token.get_secret_value() == SECRET

    def test_argument_of_the_wrong_type_is_an_error(self, refused):
        """A constructor argument of the wrong type is reported as a SettingsError under its variable name."""
        problems = refused(cors="x", secrets=5, environment=["prod"], debug=None)

        assert set(problems) == {"CORS", "SECRETS", "ENVIRONMENT", "DEBUG"}

    def test_unknown_argument_is_an_error_with_a_suggestion(self, refused):
        """A misspelt argument or section key in code is an error with a suggestion, not silently ignored."""
        problems = refused(
            rate_limt=None,
            rate_limit={"defualt": "5/minute", "default": "6/minute"},
            service={"enabled": "false"},
        )

        assert problems == {
            "RATE_LIMT": "does not exist; did you mean rate_limit?",
            "RATE_LIMIT_DEFUALT": "does not exist; did you mean default?",
            "SERVICE_ENABLED": "does not exist",
        }

    def test_unknown_name_in_a_user_model_is_not_shown(self, refused):
        """It may be a secret."""

        class Closed(BaseModel, extra="forbid"):
            bays: int = 1

        class Stores(Settings):
            warehouse: Closed = Closed()

        problems = refused({"WAREHOUSE": f'{{"{SECRET}": 1}}'}, Stores)

        assert problems == {"WAREHOUSE": "does not exist"}

    def test_keys_of_a_dictionary_are_not_shown(self, refused):
        """An error inside a dictionary setting does not show the key, which may be a secret."""
        problems = refused({"LABELS": f'{{"{SECRET}": 1}}'}, OrdersSettings)

        assert problems == {"LABELS": "must be a valid string"}


class TestSubclass:
    def test_subclass_adds_fields_and_sections(self, load):
        """Fields and sections of a subclass are read from the environment by the rules of built-in sections."""
        variables = {"STRIPE_API_KEY": SECRET, "WAREHOUSE_BAYS": "4", "STORE_NAME": "north", "LOG_DIR": "/var/log"}

        settings = load(variables, OrdersSettings)

        assert settings.stripe.api_key.get_secret_value() == SECRET
        assert settings.warehouse.bays == 4
        assert settings.shop == "north"
        assert settings.log_dir == "/var/log"
        assert load({"STRIPE_ENABLED": "false"}, OrdersSettings).stripe is None

    def test_user_model_may_be_json(self, load):
        """A nested model of a subclass can be set with one JSON variable, as pydantic-settings allows."""
        settings = load({"WAREHOUSE": '{"bays": 6}'}, OrdersSettings)

        assert settings.warehouse.bays == 6

    def test_errors_in_fields_of_a_subclass_name_their_variables(self, refused):
        """Fields, sections, aliases, and model validators."""

        class Strict(OrdersSettings):
            stripe: StripeSettings
            token: SecretStr
            plain: Warehouse
            shop: int = Field(0, validation_alias="SHOP_NAME")
            width: int | bool = 0

        problems = refused({"SHOP_NAME": "x", "WAREHOUSE_BAYS": "x", "WIDTH": "x"}, Strict)

        assert set(problems) == {"STRIPE_API_KEY", "TOKEN", "PLAIN", "SHOP_NAME", "WAREHOUSE_BAYS", "WIDTH"}
        assert problems["TOKEN"] == "is required: set it"
        assert "; or must be a valid boolean" in problems["WIDTH"]

    def test_model_validator_may_name_variables(self, refused):
        """By raising SettingsError."""

        class Checked(Settings):
            @model_validator(mode="after")
            def _check(self):
                if self.debug:
                    raise SettingsError({"LOG_LEVEL": "goes with DEBUG: set it to DEBUG"})
                raise ValueError("nothing is right")

        assert refused({"DEBUG": "1"}, Checked) == {"LOG_LEVEL": "goes with DEBUG: set it to DEBUG"}
        assert refused({"DEBUG": "0"}, Checked) == {"Checked": "nothing is right"}

    def test_section_may_have_a_field_called_enabled(self, load):
        """A section's own `enabled` field is set by its variable and does not switch the section off."""

        class Feature(sections.Section):
            enabled: bool = True

        class WithFeature(Settings):
            feature: Feature | None = None
            flags: dict[str, str] = Field(default_factory=dict)

        settings = load({"FEATURE_ENABLED": "false", "FLAGS": '{"enabled": "no"}'}, WithFeature)

        assert settings.feature.enabled is False
        assert settings.flags == {"enabled": "no"}


class TestRefusals:
    def test_safe_configuration_is_accepted(self, load):
        """The prod environment accepts a configuration with allowed host names and explicit CORS origins."""
        settings = load({**SAFE, "CORS_ALLOW_CREDENTIALS": "true", "CORS_ORIGINS": "https://app.example.com"})

        assert settings.environment == "prod"

    def test_docs_that_no_browser_can_open_are_refused(self, load, refused):
        """A client id alone must not switch the docs on."""
        problems = refused({**SAFE, "DOCS_CLIENT_ID": "spa"})

        assert list(problems) == ["DOCS_CLIENT_ID"]
        assert load({**SAFE, "DOCS_CLIENT_ID": "spa", "DOCS_TOKEN": "x" * 16}).docs.client_id == "spa"
        assert load({"ENVIRONMENT": "test", "DOCS_CLIENT_ID": "spa"}).docs.client_id == "spa"
        assert load({**SAFE, "DOCS_CLIENT_ID": "spa", "DOCS_ENABLED": "false"}).docs is None

    @pytest.mark.parametrize("environment", ["staging", "prod"])
    @pytest.mark.parametrize("name", ["METRICS_TOKEN", "HEALTH_TOKEN", "DOCS_TOKEN"])
    def test_short_token_is_refused(self, environment, name, load, refused):
        """dev and test accept it."""
        problems = refused({**SAFE, "ENVIRONMENT": environment, name: "x" * 15})

        assert problems == {name: "has fewer than 16 characters and can be guessed: make one with openssl rand -hex 16"}
        load({**SAFE, "ENVIRONMENT": environment, name: "x" * 16})
        load({"ENVIRONMENT": "test", name: "x"})

    @pytest.mark.parametrize("environment", ["staging", "prod"])
    def test_all_unsafe_settings_are_reported_together(self, environment, refused):
        """Staging and prod report all unsafe settings in one error, each with its remedy."""
        problems = refused(
            {
                "ENVIRONMENT": environment,
                "DEBUG": "true",
                "CORS_ORIGINS": "*",
                "CORS_ALLOW_CREDENTIALS": "true",
                "CORS_ORIGIN_REGEX": ".*",
                "PROXY_TRUSTED": "*",
                "WEB_CONCURRENCY": "2",
                "DATABASE_URL": "postgresql://db.internal/x",
                "DATABASE_SSL": "off",
            }
        )

        assert problems == {
            "DEBUG": "shows tracebacks and variables to every client: set it to false",
            "PROXY_TRUSTED": "lets every client choose its own address: list the load balancer's addresses or networks",
            "HOSTS_ALLOWED": "is required: list the host names of the service, such as api.example.com",
            "CORS_ORIGINS": "* together with credentials would let every web site act as its visitors, and browsers "
            "refuse it: list what is allowed, or set CORS_ALLOW_CREDENTIALS=false",
            "CORS_ORIGIN_REGEX": "also matches https://probe.invalid, whose domain anyone could register: escape every "
            "dot, put no .* next to a name, or list CORS_ORIGINS",
            "RATE_LIMIT_ENABLED": "each of the WEB_CONCURRENCY workers would count separately, so that clients get a "
            "multiple of the limit: set RATE_LIMIT_STORAGE_URL=redis://..., which all of them share, run one worker "
            "per container (WEB_CONCURRENCY=1), or set RATE_LIMIT_ENABLED=false",
            "DATABASE_SSL": "sends passwords and data in plain text to another host: use verify-full",
        }

    @pytest.mark.parametrize("environment", ["dev", "test"])
    def test_dev_and_test_refuse_nothing(self, environment, load):
        """The dev and test environments accept settings that prod refuses, such as DEBUG=true."""
        settings = load(
            {
                "ENVIRONMENT": environment,
                "DEBUG": "true",
                "CORS_ORIGIN_REGEX": ".*",
                "PROXY_TRUSTED": "*",
                "WEB_CONCURRENCY": "2",
                "DATABASE_URL": "postgresql://db.internal/x",
            }
        )

        assert settings.debug

    @pytest.mark.parametrize("trusted", ["10.0.0.0/8, *", "0.0.0.0/0", "::/0"])
    def test_trust_in_any_proxy_is_refused(self, trusted, refused):
        """In any spelling."""
        assert set(refused({**SAFE, "PROXY_TRUSTED": trusted})) == {"PROXY_TRUSTED"}

    def test_any_host_is_refused(self, refused, load):
        """Unlike HOSTS_ENABLED=false."""
        problems = refused({**SAFE, "HOSTS_ALLOWED": "api.example.com, *"})

        assert problems["HOSTS_ALLOWED"].startswith("* allows every host name")
        assert "HOSTS_ENABLED=false" in problems["HOSTS_ALLOWED"]
        assert load({**SAFE, "HOSTS_ALLOWED": "*", "HOSTS_ENABLED": "false"}).hosts is None

    @pytest.mark.parametrize(
        ("pattern", "stranger"),
        [
            (r".*", "https://probe.invalid"),
            (r"http://.*", "http://probe.invalid"),
            (r"https://.*\.vercel\.app", "https://probe.vercel.app"),
            (r"https://api\.example\.com.*", "https://api.example.com.probe.invalid"),
            (r"https://app\.example\.com.*", "https://app.example.com.probe.invalid"),
            (r"https://.*app\.example\.com", "https://probeapp.example.com"),
            (r"https://.*example\.com", "https://probeexample.com"),
            (r"https://[a-z.]+\.com", "https://probeexample.com"),
        ],
    )
    def test_pattern_that_matches_foreign_origins_is_refused(self, pattern, stranger, refused):
        """Such as lookalikes of the allowed hosts and origins."""
        variables = {**SAFE, "CORS_ORIGINS": "https://app.example.com:8443", "CORS_ORIGIN_REGEX": pattern}

        problems = refused(variables)

        assert list(problems) == ["CORS_ORIGIN_REGEX"]
        assert f"also matches {stranger}," in problems["CORS_ORIGIN_REGEX"]

    @pytest.mark.parametrize(
        "pattern",
        [r"https://[a-z0-9-]+\.example\.com", r"https://.*\.example\.com", r"https://(app|www)\.example\.com"],
    )
    def test_pattern_for_subdomains_is_accepted(self, pattern, load):
        """Prod accepts a CORS_ORIGIN_REGEX that matches only subdomains of the service's own domain."""
        variables = {**SAFE, "HOSTS_ALLOWED": "*.example.com", "CORS_ORIGINS": "https://app.example.com"}

        settings = load({**variables, "CORS_ORIGIN_REGEX": pattern})

        assert settings.cors.origin_regex == pattern

    def test_pattern_is_checked_without_allowed_hosts(self, refused):
        """Prod refuses CORS_ORIGIN_REGEX=.+ even with HOSTS_ENABLED=false, because fixed test origins match."""
        assert set(refused({**SAFE, "HOSTS_ENABLED": "false", "CORS_ORIGIN_REGEX": ".+"})) == {"CORS_ORIGIN_REGEX"}

    @pytest.mark.parametrize(("workers", "section"), [("1", None), ("auto", None), ("4", "false")])
    def test_one_worker_or_no_limit_is_accepted(self, workers, section, load):
        """Prod accepts a rate limit in memory with one worker, and several workers without rate limits."""
        switch = {"RATE_LIMIT_ENABLED": section} if section else {}

        settings = load({**SAFE, "WEB_CONCURRENCY": workers, **switch})

        assert (settings.rate_limit is None) == (section is not None)

    def test_several_workers_with_a_shared_store_are_accepted(self, load):
        """Prod accepts several workers with a shared store, because all workers count in that store."""
        settings = load({**SAFE, "WEB_CONCURRENCY": "4", "RATE_LIMIT_STORAGE_URL": "redis://:hunter2@host:6379/0"})

        assert settings.rate_limit.shared
        assert "hunter2" not in repr(settings)

    def test_replica_without_tls_is_refused(self, refused):
        """Prod refuses DATABASE_SSL=off with a remote DATABASE_READ_URL, even if DATABASE_URL is local."""
        replica = "postgresql://db.internal/x"
        urls = {"DATABASE_URL": "sqlite:///x.db", "DATABASE_READ_URL": replica, "DATABASE_SSL": "off"}

        assert set(refused({**SAFE, **urls})) == {"DATABASE_SSL"}

    @pytest.mark.parametrize(
        "url",
        [
            "sqlite:///x.db",
            "postgresql://u:p@localhost:5432/x",
            "postgresql://127.0.0.1/x",
            "postgresql://u:a@[::1]:5432/x",
            "postgresql:///x?host=/var/run/postgresql",
            "postgresql://ignored/x?host=localhost:1,127.0.0.1:2",
            "postgresql://u:p@localhost:1,[::1]:2/x",
            "postgresql://u:p@db.internal/x?sslmode=require",
            "postgresql://u:p@db.internal/x?ssl=verify-full",
        ],
    )
    def test_local_or_encrypted_database_is_accepted(self, url, load):
        """Prod accepts DATABASE_SSL=off if the database is local or the URL itself requires TLS."""
        settings = load({**SAFE, "DATABASE_URL": url, "DATABASE_SSL": "off"})

        assert settings.database.ssl == "off"

    @pytest.mark.parametrize(
        "url",
        [
            "postgresql://u:p@db.internal/x",
            "postgresql://localhost:p/@db.internal/x",
            "postgresql://localhost@db.internal/x?sslmode=prefer",
            "postgresql://u:p?#@10.0.0.7:5432/x",
            "postgresql://localhost/x?host=localhost,db.internal",
            "postgresql://u:p@localhost:1,db.internal:2/x",
            "postgresql://[2001:db8::1]/x",
        ],
    )
    def test_remote_database_without_tls_is_refused(self, url, refused):
        """With any characters in the password."""
        assert set(refused({**SAFE, "DATABASE_URL": url, "DATABASE_SSL": "off"})) == {"DATABASE_SSL"}


class TestPage:
    def test_page_lists_every_variable(self):
        """The documentation page lists exactly the variables of the settings models."""
        listed = re.findall(r"^\| `([A-Z_]+)` \|", PAGE.read_text(), re.MULTILINE)

        assert sorted(set(listed)) == sorted(VARIABLES)

    def test_page_states_the_defaults(self):
        """The documentation page states the current default of every optional variable."""
        rows = dict(re.findall(r"^\| `([A-Z_]+)` \| (.*?) \|", PAGE.read_text(), re.MULTILINE))

        wrong = {
            name: rows[name]
            for name, field in VARIABLES.items()
            if field is not None and not field.is_required() and rows[name] != shown(field.get_default())
        }

        assert not wrong


def shown(default):
    """Return a default in the form of the page."""
    if default is None or default in ("", ()):
        return "none"
    if isinstance(default, SecretStr):
        return f"`{default.get_secret_value()}`"
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    if isinstance(default, tuple):
        return f"`{','.join(default)}`"
    return f"`{default:g}`" if isinstance(default, float) else f"`{default}`"


def test_comma_list_is_accepted_in_code():
    """By settings and by a section alone."""
    settings = Settings(cors={"origins": "https://a.example, https://b.example"})

    assert settings.cors.origins == ("https://a.example", "https://b.example")
    assert sections.HostsSettings(allowed="api.example.com,").allowed == ("api.example.com",)


def test_section_refuses_unknown_names():
    """A section constructed in code reports every unknown name, with a suggestion and without the value."""
    with pytest.raises(ValidationError) as caught:
        sections.RateLimitSettings(defualt="5/minute", nonsense=SECRET)

    assert [(error["loc"], error["msg"]) for error in caught.value.errors()] == [
        (("defualt",), "does not exist; did you mean default?"),
        (("nonsense",), "does not exist"),
    ]
    assert SECRET not in str(caught.value)


def test_sections_are_imported_on_first_access():
    """An unknown name is an AttributeError."""
    from fastapi_prodkit import sections

    assert all(issubclass(getattr(sections, name), sections.Section) for name in sections.__all__)
    with pytest.raises(AttributeError, match="NoSettings"):
        _ = sections.NoSettings
