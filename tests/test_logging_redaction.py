"""Masking: texts with a secret, and texts that only look like it."""

import json
import logging
import time

import orjson
import pytest

from fastapi_prodkit.logging import EventHandler, configure_logging
from fastapi_prodkit.logging.redaction import Redactor, may_hold_secret

PEM = "-----BEGIN RSA PRIVATE KEY-----\nMIIEs3cret\n+s3cret/s3cret==\n-----END RSA PRIVATE KEY-----"

# Each text, and how it is written.
SECRETS = {
    # names, in singular and plural, with each separator
    "password:s3cret": "password:[redacted]",
    "user_password:s3cret, n:1": "user_password:[redacted], n:1",
    "password : s3cret": "password : [redacted]",
    "PASSWORD:  \ts3cret": "PASSWORD:  \t[redacted]",
    "password := s3cret": "password := [redacted]",
    "password => s3cret": "password => [redacted]",
    "passwords=s3cret": "passwords=[redacted]",
    "passwords: 123456": "passwords: [redacted]",
    "api_keys: s3cret": "api_keys: [redacted]",
    "refreshTokens=s3cret": "refreshTokens=[redacted]",
    "tokens=1s3cret": "tokens=[redacted]",
    "token=1234": "token=[redacted]",
    "{'session_ids': 's3cret'}": "{'session_ids': [redacted]}",
    '{"passwords":"s3cret","id":1}': '{"passwords":[redacted],"id":1}',
    # several under one name
    "{'passwords': ['s3cret', 's3cret']}": "{'passwords': [redacted]}",
    '{"tokens":["s3cret","s3cret"]}': '{"tokens":[redacted]}',
    "Settings(api_keys=('s3cret', 's3cret'), n=1)": "Settings(api_keys=[redacted], n=1)",
    "password: {'old': 's3cret'} n": "password: [redacted] n",
    "tokens: [ab, s3cret": "tokens: [redacted]",
    "secret_key=b's3cret'": "secret_key=[redacted]",
    "Cookie:a=s3cret; b=s3cret": "Cookie:[redacted]",
    "Authorization:Basic s3cret": "Authorization:[redacted]",
    # nested, in whatever quotes
    "tokens=[SecretStr('s3cret'), 's3cret'] n": "tokens=[redacted] n",
    "tokens=[('a', 's3cret'), ('b', 's3cret')], n=1": "tokens=[redacted], n=1",
    "passwords={'a': ['x', 's3cret'], 'b': 's3cret'} n": "passwords=[redacted] n",
    "User(name='a', passwords=frozenset({'x', 's3cret'}), id=1)": "User(name='a', passwords=[redacted], id=1)",
    "User(password=SecretStr('s3cret'), id=1)": "User(password=[redacted], id=1)",
    "User(tokens=deque(['x', 's3cret'], maxlen=3), id=1)": "User(tokens=[redacted], id=1)",
    "User(tokens=defaultdict(<class 'list'>, {'a': ['s3cret']}))": "User(tokens=[redacted])",
    "User(tokens=OrderedDict([('a', 's3cret'), ('b', 's3cret')]))": "User(tokens=[redacted])",
    "User(credentials=Key(id=1, value='s3cret'), id=1)": "User(credentials=[redacted], id=1)",
    "Config(session=Session(data={'x': ('s3cret',)}), n=2)": "Config(session=[redacted], n=2)",
    "passwords=['a]s3cret', \"it's s3cret\"] n": "passwords=[redacted] n",
    "passwords = [\n  's3cret',\n  's3cret',\n]\nn": "passwords = [redacted]\nn",
    '{\n "tokens": [\n  {"v": "]s3cret"},\n  "s3cret"\n ]\n}': '{\n "tokens": [redacted]\n}',
    "tokens=[[[s3cret, s3cret": "tokens=[redacted]",
    "passwords=[it's s3cret": "passwords=[redacted]",
    "token=<Token 's3cret' s3cret> n": "token=[redacted] n",
    "password=E'a\\'s3cret' password=N's3cret'": "password=[redacted] password=[redacted]",
    "token=read('s3cret')['s3cret'].s3cret n": "token=[redacted] n",
    "password=ab(1)s3cret n": "password=[redacted] n",
    "password='it''s s3cret' n": "password=[redacted] n",
    "password='a''s3cret'": "password=[redacted]",
    'password="a""s3cret" n': "password=[redacted] n",
    'password="""a s3cret""" n': "password=[redacted] n",
    "password='a\\'s3cret' n": "password=[redacted] n",
    "password='a\\\\' n='x'": "password=[redacted] n='x'",
    '{\\"password\\": \\"a\\\\\\"s3cret\\", \\"n\\": 1}': '{\\"password\\": [redacted], \\"n\\": 1}',
    '{\\\\\\"password\\\\\\": \\\\\\"s3cret\\\\\\"}': '{\\\\\\"password\\\\\\": [redacted]}',
    '"{\\"tokens\\": [\\"a\\", \\"s3cret\\"]}"': '"{\\"tokens\\": [redacted]}"',
    '{"password": "s3cret", "tokens": 5}': '{"password": [redacted], "tokens": 5}',
    "config['password'] = 's3cret'": "config['password'] = [redacted]",
    "ALTER ROLE x PASSWORD 's3cret' VALID": "ALTER ROLE x PASSWORD [redacted] VALID",
    "CREATE USER x IDENTIFIED BY 'it''s s3cret'": "CREATE USER x IDENTIFIED BY [redacted]",
    # headers
    "[(b'authorization', b'Basic s3cret'), (b'x', b'y')]": "[(b'authorization', [redacted]), (b'x', b'y')]",
    "[[b'cookie', b'a=1; sid=s3cret'], [b'x', b'y']]": "[[b'cookie', [redacted]], [b'x', b'y']]",
    "MutableHeaders(raw=[(b'set-cookie', b'sid=s3cret; Path=/')])": "MutableHeaders(raw=[(b'set-cookie', [redacted])])",
    "Headers({'x-api-key': 's3cret', 'host': 'x'})": "Headers({'x-api-key': [redacted], 'host': 'x'})",
    'Authorization: Digest username="u", response="s3cret"\nHost: x': "Authorization: [redacted]\nHost: x",
    'Authorization: Digest username=\\"u\\", response=\\"s3cret\\"': "Authorization: [redacted]",
    # YAML
    "  password:   s3cret\n  user: x": "  password:   [redacted]\n  user: x",
    "passwords:\n  - s3cret\n  - s3cret\nn: 1": "passwords:[redacted]\nn: 1",
    "password: |\n  s3cret\n  s3cret\nn: 1": "password: [redacted]\nn: 1",
    "password: >-\n    s3cret": "password: [redacted]",
    "'tokens:\\n  - a\\n  - s3cret\\nn: 1'": "'tokens:[redacted]\\nn: 1'",
    # queries
    "/x?a=1&passwords[]=s3cret&passwords[]=s3cret": "/x?a=1&passwords[]=[redacted]&passwords[]=[redacted]",
    "/x?passwords%5B0%5D=s3cret&n=1": "/x?passwords%5B0%5D=[redacted]&n=1",
    "/x?user[password]=s3cret&user%5Bpassword%5D=s3cret": "/x?user[password]=[redacted]&user%5Bpassword%5D=[redacted]",
    "/x#access_token=s3cret&state=1": "/x#access_token=[redacted]&state=1",
    "password1=s3cret&password2=s3cret": "password1=[redacted]&password2=[redacted]",
    # without a name
    "key AKIAS3CRETXX7EXAMPLE is old": "key [redacted] is old",
    "jwt_decode(eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJzM2NyZXQifQ.s3cret-x)": "jwt_decode([redacted])",
    "key AIza" + "s3cret-_x" * 3 + "s3cret-x is old": "key [redacted] is old",
    "pay with sk_live_" + "s3cret" * 4: "pay with [redacted]",
    "whsec_" + "s3cret" * 4 + " is old": "[redacted] is old",
    "clone with ghp_" + "s3cret" * 6: "clone with [redacted]",
    "clone with github_pat_" + "s3cret" * 6: "clone with [redacted]",
    "clone with glpat-" + "s3cret" * 4: "clone with [redacted]",
    "tell xoxb-1-" + "s3cret" * 2: "tell [redacted]",
    "mail by SG." + "s3cret" * 3 + "." + "s3cret" * 3: "mail by [redacted]",
    "Incorrect API key provided: sk-proj-" + "s3cret" * 4: "Incorrect API key provided: [redacted]",
    "npm_" + "s3cret" * 6 + " hf_" + "s3cret" * 6: "[redacted] [redacted]",
    # options of commands
    "mysqldump --password s3cret --host db": "mysqldump --password [redacted] --host db",
    "x --db-password 's3 s3cret' --api-key  s3cret": "x --db-password [redacted] --api-key  [redacted]",
    "['psql', '--password', 's3cret']": "['psql', '--password', [redacted]]",
    # XML
    "<a><Password>s3cret</Password><n>1</n></a>": "<a><Password>[redacted]</Password><n>1</n></a>",
    '<wsse:Password Type="PasswordText">s3cret</wsse:Password>': (
        '<wsse:Password Type="PasswordText">[redacted]</wsse:Password>'
    ),
    "<db-password>\n  <![CDATA[<s3cret>]]></db-password>": "<db-password>\n  [redacted]</db-password>",
    "<secret><![CDATA[a<s3cret]]></secret>": "<secret>[redacted]</secret>",
    "'<secret>\\n<![CDATA[s3cret]]></secret>'": "'<secret>[redacted]</secret>'",
    # URLs that are secrets
    "POST https://hooks.slack.com/services/T0/B0/s3cret 200": "POST https://hooks.slack.com/services/[redacted] 200",
    '{"url":"https://discord.com/api/webhooks/1/s3cret"}': '{"url":"https://discord.com/api/webhooks/[redacted]"}',
    "https://api.telegram.org/bot1:s3cret/sendMessage": "https://api.telegram.org/bot[redacted]",
    # encoded for a URL
    "/login?next=%2Fx%3Fpassword%3Ds3cret": "/login?next=%2Fx%3Fpassword%3D[redacted]",
    "%7B%22password%22%3A%22s3cret%22%7D": "%7B%22password%22%3A[redacted]",
    # all of a value
    "password=ab,s3cret;s3cret n=1": "password=[redacted] n=1",
    "password=,s3cret": "password=[redacted]",
    "password: ab;,s3cret, n: 1": "password: [redacted], n: 1",
    "Bearer ab,s3cret": "Bearer [redacted]",
    # private keys
    f"read {PEM} from x": ("read -----BEGIN RSA PRIVATE KEY-----[redacted]-----END RSA PRIVATE KEY----- from x"),
    repr(PEM): "'-----BEGIN RSA PRIVATE KEY-----[redacted]-----END RSA PRIVATE KEY-----'",
    PEM.replace("RSA ", "")[:60]: "-----BEGIN PRIVATE KEY-----[redacted]",
    "-----BEGIN PGP PRIVATE KEY BLOCK-----\ns3cret\n": "-----BEGIN PGP PRIVATE KEY BLOCK-----[redacted]",
    "---- BEGIN SSH2 ENCRYPTED PRIVATE KEY ----\ns3cret": "---- BEGIN SSH2 ENCRYPTED PRIVATE KEY ----[redacted]",
    # a user that is a token
    "git+https://s3cret@github.com/a/b.git": "git+https://[redacted]@github.com/a/b.git",
    "https://s3cret@o1.ingest.sentry.io/2": "https://[redacted]@o1.ingest.sentry.io/2",
    "https://s3cret:@api.stripe.com/v1": "https://[redacted]@api.stripe.com/v1",
    "https://s3cret:x-oauth-basic@github.com/a/b": "https://[redacted]@github.com/a/b",
    "HTTPS://s3cret@example.com": "HTTPS://[redacted]@example.com",
    "rediss://s3cret@cache:6379/0": "rediss://[redacted]@cache:6379/0",
    # what signs a URL
    "GET https://b.s3.amazonaws.com/k?X-Amz-Date=1&X-Amz-Signature=s3cret": (
        "GET https://b.s3.amazonaws.com/k?X-Amz-Date=1&X-Amz-Signature=[redacted]"
    ),
    "https://storage.googleapis.com/b/k?X-Goog-Signature=s3cret&a=1": (
        "https://storage.googleapis.com/b/k?X-Goog-Signature=[redacted]&a=1"
    ),
    "https://d1.cloudfront.net/k?Expires=1&Signature=s3cret&Key-Pair-Id=A": (
        "https://d1.cloudfront.net/k?Expires=1&Signature=[redacted]&Key-Pair-Id=A"
    ),
    "https://a.blob.core.windows.net/c?sv=1&sig=s3cret%3D": "https://a.blob.core.windows.net/c?sv=1&sig=[redacted]",
    "GET /callback?code=s3cret&state=1": "GET /callback?code=[redacted]&state=1",
    'href="/callback?state=1&amp;code=s3cret"': 'href="/callback?state=1&amp;code=[redacted]"',
    '"/callback?state=1\\u0026code=s3cret"': '"/callback?state=1\\u0026code=[redacted]"',
    "POST /token?client_assertion=s3cret": "POST /token?client_assertion=[redacted]",
    "https://maps.googleapis.com/x?key=s3cret": "https://maps.googleapis.com/x?key=[redacted]",
    # passwords in URLs
    "postgres://u:123/s3cret@db/x": "postgres://u:[redacted]@db/x",
    "smtp://u@example.com:s3cret@mail:587": "smtp://u@example.com:[redacted]@mail:587",
    "nats://s3cret@mq": "nats://[redacted]@mq",
    "http://u:s3cret@[::1]:80/": "http://u:[redacted]@[::1]:80/",
    "postgres://u:1/s@3cret@db:5432/x": "postgres://u:[redacted]@db:5432/x",
    "postgres://u:12345/@db/x": "postgres://u:[redacted]@db/x",
    "https://user:123/s3cret@proxy:3128": "https://user:[redacted]@proxy:3128",
    "amqp://mq:5672/a,amqp://u:s3cret@mq": "amqp://mq:5672/a,amqp://u:[redacted]@mq",
}
FALSE_ALARMS = [
    *("tokens: 512", "total_tokens=512, input_tokens:12", '{"completion_tokens": 7}', "active_sessions=3"),
    *("if token == expected:", "if not token:\n    return", "Token::parse", "tokenizer: x", "secret://vault/x"),
    *("except InvalidToken:", "passwordless login", "the password is wrong", "secretary=x"),
    *("status_code=200 code=5 error code: 7", "code=abc", "sort_key=name", "/items?encoding=utf-8&keys=1"),
    *("-----BEGIN CERTIFICATE-----\nMIIE\n-----END CERTIFICATE-----", "-----BEGIN PUBLIC KEY-----\nMIIE"),
    "Uvicorn running on http://127.0.0.1:8000 (Press CTRL+C)",
    "http://localhost:8000/users/me@example.com",
    "https://api.example.com:8443/users/me@example.com",
    "http://[::1]:8000/users/me@example.com",
    "https://example.com/@user https://example.com/?mail=me@example.com https://example.com#me@x",
    "ssh://git@github.com/a/b.git postgresql://app@db:5432/orders",
    '{"url":"redis://cache:6379/0","email":"me@example.com"}',
    *(
        "tokens: 1.5",
        "tokens=1_000, n",
        "max_tokens=None",
        '{"max_tokens":null}',
        "ssh://git@host.com:22/a@b ssh://a@b:22",
    ),
    *("tokens=5", "max_tokens: 200", '{"max_tokens": 200}', "author=x", "authors: ['x']", "secretary", "Author: me"),
    *(
        "the tokenizer's cost=1",
        "mytokenset=x",
        "password reset mail sent, it's done",
        "authority: x",
        "cookies accepted",
    ),
    *(
        "unexpected token 'else' in x",
        "session closed by 'admin'",
        "revision identified by 'x'",
        "GET /tokens?page=2",
        "passwordless: yes",
        "dsnx=1",
    ),
    *(
        "ASIA and AKIA",
        "AKIATOOSHORT",
        "eyJust a word",
        "eyJhbGciOi.x",
        "secretariat: x",
        "a keyboard: x",
        "sessional=1",
    ),
    "peer 2001:db8::1 at 09:41:07, 3:1, a:b, C:/x",
    *("risk-assessment-of-the-whole-house", "use sk-learn, or sk-short", "task_live_", "hf_hub npm_config"),
    *("give --token", "--token --host x", "a --token-file x", "-- password reset"),
    *("<p>password</p>", "<password/>x</a>", "<Session 1> is closed", "<tokenizer>x</tokenizer>", "%3D %22password%22"),
]
# Texts without a secret that are masked nevertheless.
MASKED_IN_DOUBT = {
    "File x, line 1\n    token = read()": "File x, line 1\n    token = [redacted]",
    "def login(password: str)": "def login(password: [redacted])",
    "sqlalchemy.orm.session:Session.execute": "sqlalchemy.orm.session:[redacted]",
    "Server=db;Password=s3cret;Database=x": "Server=db;Password=[redacted]",
    "http://web:8000/users/me@example.com": "http://web:[redacted]@example.com",
    "/objects?key=a/b.txt": "/objects?key=[redacted]",
    "--password is missing": "--password [redacted] missing",
}


@pytest.mark.parametrize(("text", "masked"), [*SECRETS.items(), *MASKED_IN_DOUBT.items()])
def test_secret_is_masked(text, masked):
    """Completely; masking again changes nothing."""
    redactor = Redactor()

    assert redactor.text(text) == masked
    assert redactor.text(masked) == masked
    assert "s3cret" not in masked.lower()


@pytest.mark.parametrize("text", FALSE_ALARMS)
def test_text_without_a_secret_stays(text):
    """Counts, ports, code and addresses."""
    assert Redactor().text(text) == text


@pytest.mark.parametrize("text", SECRETS)
def test_secret_is_masked_with_and_without_a_record(capsys, text):
    """Each secret of the corpus is masked in lines with and without a record, also once its key is cached."""
    configure_logging()
    [handler] = [each for each in logging.root.handlers if isinstance(each, EventHandler)]
    write = handler.writer("info", "shop", "request")

    for _ in range(2):  # the second time its keys are cached as harmless
        logging.getLogger("shop").warning("event", extra={"value": text})
        write({"value": text})

    written = [json.loads(line)["value"] for line in capsys.readouterr().out.splitlines()]
    assert written == [SECRETS[text]] * 4


@pytest.mark.parametrize(
    "value", ["a plain text, and more", "2001:db8::1", "at 09:41:07", "a/b.txt", "it is 5' long", "~"]
)
def test_line_without_marks_is_not_searched(value):
    """Such as a text with spaces, an IPv6 address, or a time."""
    line = orjson.dumps({"timestamp": "2026-11-23T09:41:07.315094Z", "level": "info", "value": value, "status": 200})

    assert not may_hold_secret(line)


@pytest.mark.parametrize(
    ("key", "value", "written"),
    [
        ("passwords", ["s3cret"], "[redacted]"),
        ("passwords", 123456, "[redacted]"),
        ("API-Keys", "s3cret", "[redacted]"),
        ("tokens", ["s3cret"], "[redacted]"),
        ("tokens", 512, 512),
        ("total_tokens", 512, 512),
        ("active_sessions", 1.5, 1.5),
        ("token", 512, "[redacted]"),
        ("pins", 1234, "[redacted]"),
    ],
)
def test_plural_is_a_secret_key(key, value, written):
    """A number of tokens or sessions is a count."""
    redactor = Redactor(["pin"])

    assert redactor.fields({key: value, "pair": [(key, value)]}, size=1_000) == {key: written, "pair": [[key, written]]}


def test_line_of_a_megabyte_is_masked_and_truncated(capsys):
    """A line of a megabyte is masked and truncated in less than five seconds of CPU time."""
    configure_logging()
    pieces = "".join([*SECRETS, *FALSE_ALARMS])
    started = time.process_time()

    logging.getLogger("shop").warning(pieces * (1_000_000 // len(pieces)))

    assert time.process_time() - started < 5
    line = capsys.readouterr().out
    assert len(line) < 262_144
    assert "s3cret" not in line.lower()


@pytest.mark.parametrize(
    "piece",
    [
        *(
            "a",
            " ",
            "=",
            "'",
            "\\",
            ",;",
            "\n[",
            "secret_",
            "Bearer ",
            "cookie: ",
            'cookie: ="',
            "DETAIL: ",
            "[parameters: ",
        ),
        *("://a:", "://a:b/", "://a:@", "://a:1/", "://a:1/b@", "://a@b:", "://a@b:1", "postgres://u:1/a@b@"),
        *("https://a", "https://a@", "http://a.b:1/", "?code=", "&signature", "&a-", "input_value=", "input_value='"),
        *("-----BEGIN ", "-----BEGIN PRIVATE KEY-----", "PRIVATE KEY", "eyJ", "eyJaaaaaaaa.", "AKIA", "PASSWORD '"),
        *("token: ", "tokens ", "tokens=1", "tokens=(", "token=<", "{'token': b'", "session:,;a", "[(\"'"),
        *("password=", "password:", "password=,", "passwords   ", "password%5B", "password\\", "password:\n- "),
        *("password: |\n a", 'password="', "password='\\", "password='a''", 'password=\\\\"', "password='\\\\"),
        *("password=[", "password=[]", "password=x[", "password=['", "password=a(", "password=a('", "password=[\n"),
        *("password=(]\n", "passwords=['\n", "token=read(\n"),
        *(
            "--",
            "--a-",
            "--token ",
            "<",
            "<a",
            "<password",
            "<password>",
            "<password ",
            "<token><![CDATA[",
            "</",
            "<token>a<",
        ),
        *(
            "sk-",
            "sk_live_",
            "gho_",
            "xoxb-",
            "SG.",
            "SG.aaaaaaaaaaaaaaaa.",
            "AIza",
            "//hooks.slack.com/services/",
            "%3D",
        ),
    ],
)
def test_masking_takes_linear_time(piece):
    """Even for text made to slow patterns down."""
    redactor = Redactor()

    def seconds(length: int) -> float:
        text = piece * (length // len(piece))
        started = time.process_time()
        redactor.fields({"event": text, "exception": text}, size=200_000)
        return time.process_time() - started

    small = max(min(seconds(2_000) for _ in range(3)), 0.001)

    assert min(seconds(16_000) for _ in range(3)) < 32 * small
