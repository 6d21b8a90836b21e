"""The keywords of middleware: the fields of its section; misspelt ones are errors."""

import inspect
import re

import pytest
from pydantic import BaseModel, SecretStr
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from fastapi_prodkit import sections
from fastapi_prodkit._config.keywords import with_keywords
from fastapi_prodkit._pipeline.layers import Layer
from fastapi_prodkit.allowed_hosts import AllowedHostsKeywords, AllowedHostsMiddleware
from fastapi_prodkit.body_limit import BodyLimitKeywords, BodyLimitMiddleware
from fastapi_prodkit.concurrency_limit import ConcurrencyLimitKeywords, ConcurrencyLimitMiddleware
from fastapi_prodkit.cors import CORSKeywords, CORSMiddleware
from fastapi_prodkit.deadline import DeadlineKeywords, DeadlineMiddleware
from fastapi_prodkit.disconnect import DisconnectKeywords, DisconnectMiddleware
from fastapi_prodkit.errors import ErrorBoundaryKeywords, ErrorBoundaryMiddleware
from fastapi_prodkit.exceptions import ConfigurationError
from fastapi_prodkit.head_limit import HeadLimitKeywords, HeadLimitMiddleware
from fastapi_prodkit.proxy_headers import ProxyHeadersKeywords, ProxyHeadersMiddleware
from fastapi_prodkit.rate_limit import RateLimitMiddleware
from fastapi_prodkit.rate_limit.middleware import RateLimitKeywords
from fastapi_prodkit.request_id import RequestIDKeywords, RequestIDMiddleware
from fastapi_prodkit.security_headers import SecurityHeadersKeywords, SecurityHeadersMiddleware

APP = "https://app.example.com"
SECRET = "hunter2-correct-horse"
KEYWORDS = {
    AllowedHostsMiddleware: (sections.HostsSettings, AllowedHostsKeywords),
    BodyLimitMiddleware: (sections.LimitsSettings, BodyLimitKeywords),
    ConcurrencyLimitMiddleware: (sections.LimitsSettings, ConcurrencyLimitKeywords),
    CORSMiddleware: (sections.CorsSettings, CORSKeywords),
    DeadlineMiddleware: (sections.LimitsSettings, DeadlineKeywords),
    DisconnectMiddleware: (sections.LimitsSettings, DisconnectKeywords),
    ErrorBoundaryMiddleware: (sections.ErrorsSettings, ErrorBoundaryKeywords),
    HeadLimitMiddleware: (sections.LimitsSettings, HeadLimitKeywords),
    ProxyHeadersMiddleware: (sections.ProxySettings, ProxyHeadersKeywords),
    RateLimitMiddleware: (sections.RateLimitSettings, RateLimitKeywords),
    RequestIDMiddleware: (sections.RequestIdSettings, RequestIDKeywords),
    SecurityHeadersMiddleware: (sections.HeadersSettings, SecurityHeadersKeywords),
}
# Names of other libraries, and fields that belong to another piece.
FOREIGN = {"allowed_hosts", "trusted_hosts", "allow_origins", "allow_origin_regex"}
OTHERS = {"storage_url", "on_storage_error", "storage_timeout"}
OF_SERVER = "max_head_size"


class PassingMiddleware(Layer):
    def __init__(self, app):
        self.app = app


async def respond(request):
    return PlainTextResponse(f"{request.client.host} {len(await request.body())}")


def client(middleware, *args, **keywords):
    routes = [Route("/", respond, methods=["GET", "POST"])]
    return TestClient(
        Starlette(routes=routes, middleware=[Middleware(middleware, *args, **keywords)]), client=("10.0.0.7", 1)
    )


def answers(app):
    """Return the responses to requests for which the middleware of this package differ."""
    app.headers |= {"X-Forwarded-For": "192.0.2.1", "Origin": APP, "X-Id": "a-chosen-id"}
    found = [
        app.get("/"),
        app.options("/", headers={"Access-Control-Request-Method": "PUT"}),
        app.post("/", content=b"123456"),
    ]
    return [(each.status_code, dict(each.headers), each.text) for each in found]


@pytest.mark.parametrize(
    ("middleware", "keywords"),
    [
        (AllowedHostsMiddleware, {"allowed": ["api.example.com"]}),
        (BodyLimitMiddleware, {"max_body_size": 3}),
        (CORSMiddleware, {"origins": [APP], "allow_credentials": True, "max_age": 60}),
        (ProxyHeadersMiddleware, {"trusted": ["10.0.0.0/8"]}),
        (RateLimitMiddleware, {"default": "2/hour"}),
        (RequestIDMiddleware, {"header": "X-Id", "trust_inbound": True}),
        (SecurityHeadersMiddleware, {"csp": "default-src 'self'", "frame_options": ""}),
    ],
)
def test_keywords_equal_a_section_with_these_fields(middleware, keywords):
    """A middleware built with keywords answers like one built with a section of equal fields."""
    section, _ = KEYWORDS[middleware]

    found = answers(client(middleware, **keywords))

    assert found == answers(client(middleware, section(**keywords)))
    assert found != answers(client(PassingMiddleware))


def test_keyword_wins_over_the_section():
    """The other fields of the section stay."""
    settings = sections.CorsSettings(origins=(APP,), max_age=60, allow_methods=("GET",))

    app = client(CORSMiddleware, settings, max_age=5)
    answer = app.options("/", headers={"Origin": APP, "Access-Control-Request-Method": "GET"})

    assert answer.headers["access-control-allow-origin"] == APP
    assert answer.headers["access-control-allow-methods"] == "GET"
    assert answer.headers["access-control-max-age"] == "5"
    assert settings.max_age == 60


@pytest.mark.parametrize("middleware", KEYWORDS)
def test_misspelt_keyword_is_refused_with_a_suggestion(middleware):
    """A misspelt keyword raises an error that names the middleware, the keyword and the one that was meant."""
    _, keywords = KEYWORDS[middleware]
    right = max(keywords.__optional_keys__, key=len)

    with pytest.raises(ConfigurationError) as caught:
        middleware(respond, **{f"{right}x": SECRET})

    assert str(caught.value) == f"{middleware.__name__}({right}x=...): does not exist; did you mean {right}?"


def test_misspelt_parameter_is_refused_with_a_suggestion():
    """Such as `exempt`, which is not a field."""
    with pytest.raises(ConfigurationError, match=r"\(exemt=...\): does not exist; did you mean exempt\?"):
        RateLimitMiddleware(respond, exemt={"/health"})


@pytest.mark.parametrize(
    ("middleware", "keyword"),
    [
        (DeadlineMiddleware, "max_body_size"),
        (BodyLimitMiddleware, "request_timeout"),
        (RateLimitMiddleware, "storage_url"),
    ],
)
def test_field_of_another_middleware_is_refused(middleware, keyword):
    """A section may serve several pieces."""
    with pytest.raises(ConfigurationError, match="does not exist"):
        middleware(respond, **{keyword: None})


def test_error_lists_all_problems_without_values():
    """One error lists every invalid keyword with its reason and does not contain the values."""

    class Section(BaseModel):
        amount: int = 1
        token: SecretStr = SecretStr("x")
        names: tuple[int, ...] = ()

    with pytest.raises(ConfigurationError) as caught:
        with_keywords(
            RequestIDMiddleware(respond),
            Section(),
            {"number": SECRET, "names": [SECRET]},
            {"number", "names"},
            {"number": "amount"},
        )

    lines = str(caught.value).splitlines()
    assert [line.partition(": ")[0] for line in lines] == [
        "RequestIDMiddleware(number=...)",
        "RequestIDMiddleware(names=...)",
    ]
    assert SECRET not in str(caught.value)
    assert caught.value.__context__ is None


def test_error_names_the_given_keyword():
    """Even if the field has another name."""
    with pytest.raises(ConfigurationError) as caught:
        CORSMiddleware(respond, allow_origins=[f"{APP}/path"])

    assert str(caught.value).startswith("CORSMiddleware(allow_origins=...): an origin is scheme://host")


def test_two_names_of_one_field_are_refused():
    """Passing a field under both its own name and Starlette's name raises a ConfigurationError."""
    with pytest.raises(ConfigurationError, match="means the same as"):
        CORSMiddleware(respond, origins=[APP], allow_origins=[APP])


@pytest.mark.parametrize("middleware", KEYWORDS)
def test_keywords_have_the_types_of_the_section(middleware):
    """The typed keywords of each middleware are the fields of its section, plus names of other libraries."""
    section, keywords = KEYWORDS[middleware]
    own = keywords.__optional_keys__ - FOREIGN

    assert own <= set(section.model_fields)
    if section is not sections.LimitsSettings:  # the section of several
        assert own == section.model_fields.keys() - OTHERS


def test_each_limits_field_belongs_to_one_middleware_or_the_server():
    """Each field of `LimitsSettings` is a keyword of exactly one middleware, or belongs to the server."""
    keywords = [kind.__optional_keys__ for section, kind in KEYWORDS.values() if section is sections.LimitsSettings]

    named = [OF_SERVER, *(name for each in keywords for name in each)]

    assert sorted(named) == sorted(sections.LimitsSettings.model_fields)


@pytest.mark.parametrize("middleware", KEYWORDS)
def test_docstring_states_every_keyword_and_its_default(middleware):
    """The docstring of each middleware lists all its keywords with their actual defaults."""
    section, keywords = KEYWORDS[middleware]
    listed = inspect.getdoc(middleware).partition("Keyword Args:\n")[2].partition("\n\n")[0]
    entries = dict(re.findall(r"^    (\w+): (.*(?:\n     .*)*)", listed, re.MULTILINE))

    assert entries.keys() == keywords.__optional_keys__
    for name in entries.keys() - FOREIGN:
        text = " ".join(entries[name].split())
        assert text.endswith((f"Default: {_written(section.model_fields[name].default)}.", "Required."))


def _written(default):
    if default in (None, ()):
        return "none"
    return ", ".join(default) if isinstance(default, tuple) else str(default)


# Names of other libraries


def test_cors_accepts_keywords_of_starlette():
    """Arguments written for Starlette's CORSMiddleware have an identical effect in ours."""
    app = client(
        CORSMiddleware,
        allow_origins=[APP],
        allow_origin_regex=r"https://[a-z]+\.preview\.example\.com",
        allow_methods=["GET", "PUT"],
        allow_headers=["X-Token"],
        allow_credentials=True,
        allow_private_network=False,
        expose_headers=["X-Total"],
        max_age=60,
    )

    for origin in (APP, "https://shop.preview.example.com"):
        preflight = app.options("/", headers={"Origin": origin, "Access-Control-Request-Method": "PUT"})
        read = app.get("/", headers={"Origin": origin})

        assert {name: value for name, value in preflight.headers.items() if name.startswith("access-control-")} == {
            "access-control-allow-origin": origin,
            "access-control-allow-methods": "GET, PUT",
            "access-control-allow-headers": "X-Token",
            "access-control-allow-credentials": "true",
            "access-control-max-age": "60",
        }
        assert read.headers["access-control-expose-headers"] == "X-Total"


def test_allowed_hosts_accepts_the_keyword_of_starlette():
    """The keyword `allowed_hosts` of Starlette's TrustedHostMiddleware sets our list of hosts."""
    app = client(AllowedHostsMiddleware, allowed_hosts=["api.example.com", "*.example.org"], www_redirect=False)

    statuses = [app.get("/", headers={"Host": host}).status_code for host in ("api.example.com", "a.example.org", "x")]

    assert statuses == [200, 200, 400]


@pytest.mark.parametrize("trusted", ["10.0.0.0/8,192.0.2.9", ["10.0.0.0/8", "192.0.2.9"]])
def test_proxy_headers_accepts_the_keyword_of_uvicorn(trusted):
    """As a list or separated by commas."""
    app = client(ProxyHeadersMiddleware, trusted_hosts=trusted)

    answer = app.get("/", headers={"X-Forwarded-For": "198.51.100.1, 203.0.113.5, 192.0.2.9"})

    assert answer.text == "203.0.113.5 0"


@pytest.mark.parametrize(
    ("middleware", "keywords", "reason"),
    [
        (CORSMiddleware, {"allow_private_network": True}, "private networks"),
        (CORSMiddleware, {"allow_origins": ["*"], "allow_credentials": True}, "browsers refuse"),
        (CORSMiddleware, {"max_age": 86_400}, "less than or equal to 7200"),
        (AllowedHostsMiddleware, {"allowed_hosts": ["www.example.com"], "www_redirect": True}, "redirect"),
        (ProxyHeadersMiddleware, {"trusted_hosts": "*"}, "left-most"),
        (ProxyHeadersMiddleware, {"trusted_hosts": ["*"]}, "left-most"),
        (ProxyHeadersMiddleware, {"trusted_hosts": ["proxy.internal"]}, "neither an address nor a network"),
        (ProxyHeadersMiddleware, {"trusted_hosts": None}, "Input should be a valid tuple"),
        (ProxyHeadersMiddleware, {"settings": "10.0.0.0/8"}, "str is not a section of settings; use keywords"),
        (DeadlineMiddleware, {"settings": sections.HostsSettings()}, "HostsSettings has no request_timeout; give the"),
        (CORSMiddleware, {"settings": [APP]}, "list is not a section of settings; use keywords"),
    ],
)
def test_keyword_with_another_meaning_is_refused(middleware, keywords, reason):
    """The error has the reason."""
    with pytest.raises(ConfigurationError, match=reason):
        middleware(respond, **keywords)
