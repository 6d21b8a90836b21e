"""Patterns of secrets that are recognized by their own form or by the text around them.

Group 1 is the text in front of the masked part. All patterns run in linear time: repetitions are possessive, bounded,
or end at a character that they exclude.
"""

import re
from typing import Final

__all__ = [
    "BEARER",
    "DSN",
    "HEADER",
    "INPUT",
    "PRIVATE_KEY",
    "QUERY",
    "QUOTED_DATA",
    "REPEATED",
    "TOKEN",
    "TOKEN_IN_URL",
    "TOKEN_MARK",
    "WEBHOOK",
]

# scheme://user:password@host. A password may contain `/` and `@`, and may look like a port and a path. In a http or ws
# URL, digits count as a port if the text before them looks like a host.
DSN: Final = re.compile(
    r"(?!(?:(?<=http)|(?<=https)|(?<=ws)|(?<=wss))://(?:localhost|[^\s:/@]*\.[^\s:/@]*):\d{1,5}/)(://(?!\[)[^\s:/@]*+(?:@[^\s:/@]++(?=:(?!\d{1,5}(?:[/\s]|\Z))))?:)"
    r"(?:(?!\d{1,5}/)[^\s/@]*+(?:/(?!/)[^\s/@]*+)*+@|\d{1,5}/[^\s/@\"']*+(?:/(?!/)[^\s/@\"']*+)*+@)"
    r"(?:[^\s/@]*+(?:/(?!/)[^\s/@]*+)*+@)*+"
)
# https://token@host, also with an empty password or GitHub's. With other schemes, a user alone is not a secret.
TOKEN_IN_URL: Final = re.compile(
    r"((?:http|ws|redis|valkey|nats)s?://)[^\s:/@?#]++(?::(?:x-oauth-basic)?)?@", re.IGNORECASE
)
# Parameters that sign a URL or are exchanged for a token. Only in a query: elsewhere these names are harmless.
QUERY: Final = re.compile(
    r"((?:[?&]|&amp;|\\u0026)(?:code|sig|key|(?:[\w.-]{0,40}[-_])?signature|[\w.-]{0,40}assertion|samlresponse)=)"
    r"[^\s&\"'<>#\\]++",
    re.IGNORECASE,
)
# URLs whose path is the only secret that their vendor asks for.
WEBHOOK: Final = re.compile(
    r"(//hooks\.slack\.com/(?:services|workflows|triggers)/|//discord(?:app)?\.com/api/webhooks/"
    r"|//api\.telegram\.org/(?:file/)?bot)[^\s\"'<>?#\\]++"
)
PRIVATE_KEY: Final = re.compile(
    r"(-{4,5} ?BEGIN [A-Z0-9 ]{0,30}PRIVATE KEY[A-Z ]{0,10}-{4,5}).*?(?=-{4,5} ?END [A-Z0-9 ]{0,30}PRIVATE KEY|\Z)",
    re.DOTALL,
)
BEARER: Final = re.compile(r"\b([Bb]earer|BEARER) +(?:[^\s\"',;]++|[,;]++(?=[^\s\"',;]))++")
# Masks the whole header line, because a cookie has several parts.
HEADER: Final = re.compile(r"((?:cookie|authorization): ?)(?:[^\r\n\"'=]|=(?:\\*+\"[^\"\r\n]*+\"?)?)++", re.IGNORECASE)
# Data that database drivers and pydantic quote, up to the next part of their message or to the end.
QUOTED_DATA: Final = re.compile(
    r"(\[parameters: |\bDETAIL: +|\binput_value=).*?(?=\n\n|\n[\[(]|\n[A-Z]{4,}:|\nTraceback|, input_type=|\Z)",
    re.DOTALL,
)
INPUT: Final = re.compile(r"(\binput_value=)(?:'(?:[^'\\\n]|\\.)*+'|\"(?:[^\"\\\n]|\\.)*+\")")

# JSON web tokens, and tokens that begin as their vendor says: AWS, Google, Stripe, GitHub, GitLab, Slack, SendGrid,
# OpenAI and Anthropic, npm, Hugging Face.
TOKEN: Final = re.compile(
    r"()(?<![A-Za-z0-9])(?:eyJ[\w-]{8,}+(?:\.[\w-]*+){2,4}|A[KS]IA[A-Z0-9]{16}\b|AIza[\w-]{35}"
    r"|[rs]k_(?:live|test)_\w{16,}+|whsec_\w{16,}+|gh[opsu]_\w{30,}+|github_pat_\w{30,}+|glpat-[\w-]{16,}+"
    r"|xox[abeprs]-[\w-]{10,}+|SG\.[\w-]{16,}+\.[\w-]{16,}+|sk-[\w-]{20,}+|npm_\w{30,}+|hf_\w{30,}+)"
)
# The beginnings of all that `TOKEN` matches, to search a line before it is decoded.
TOKEN_MARK: Final = re.compile(
    rb"eyJ|A(?:KIA|SIA|Iza)|k_(?:live|test)_|whsec_|gh[opsu]_|github_pat_|glpat-|xox|SG\.|sk-|npm_|hf_"
)

REPEATED: Final = (
    BEARER,
    QUERY,
    WEBHOOK,
    TOKEN_IN_URL,
    DSN,
    INPUT,
    TOKEN,
)  # what they match is a secret in other texts
