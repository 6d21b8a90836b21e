"""What a client is told about a refusal."""

import pytest

from fastapi_prodkit.auth.challenges import Answer, Challenges, answer_to

ALGS = 'algs="ES256 ES384 ES512 EdDSA PS256 RS256"'
ANSWER = Answer(401, "invalid_token", "Wrong.")
WRONG = 'error="invalid_token", error_description="Wrong."'


@pytest.mark.parametrize(
    ("schemes", "offered"),
    [
        (["bearer"], "Bearer"),
        (["apikey"], "ApiKey"),
        (["bearer", "apikey"], "Bearer, ApiKey"),
        (["bearer", "dpop", "apikey"], f"Bearer, DPoP {ALGS}, ApiKey"),
        (["dpop"], f"DPoP {ALGS}"),
    ],
)
def test_schemes_are_offered(schemes, offered):
    """RFC 9110 section 11.6.1: one challenge for each."""
    assert Challenges(schemes).offered == offered


@pytest.mark.parametrize(
    ("schemes", "scheme", "value"),
    [
        (["bearer"], "bearer", f"Bearer {WRONG}"),
        (["bearer", "dpop"], "bearer", f"Bearer {WRONG}, DPoP {ALGS}"),
        (["bearer", "dpop"], "dpop", f"DPoP {WRONG}, {ALGS}"),
        (["dpop"], "bearer", f"DPoP {WRONG}, {ALGS}"),
        (["bearer", "apikey"], "apikey", "ApiKey"),
    ],
)
def test_refusal_is_in_the_challenge_of_its_scheme(schemes, scheme, value):
    """A bearer token that has to have a proof is asked for one; the scheme of API keys has no parameters."""
    assert Challenges(schemes).refusing(scheme, ANSWER) == value


def test_client_is_told_little():
    """What is wrong with a token or a proof is for the operator, except what an honest client needs to know."""
    told = {answer_to(code).detail for code in ("signature", "issuer", "proof_key", "sender_constrained", "claims")}

    assert told == {"The token or key is not valid."}
    assert answer_to("proof_nonce").error == "use_dpop_nonce"
