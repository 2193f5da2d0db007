"""Which tokens are believed, and how the keys that they are checked with come, change and go away."""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
from perdure_service.domain.callers import Role
from perdure_service.errors import ConfigurationError, KeysUnavailable, TokenExpired, TokenMissing, Unauthenticated
from perdure_service.rpc import jwks, token_file
from perdure_service.rpc.authentication import bearer_token, make_authentication
from perdure_service.rpc.jwks import Key, Keys, keys_of, read_keys
from perdure_service.rpc.jwt_tokens import JwtTokens
from perdure_service.rpc.token_file import TokenFile, load_tokens
from perdure_service.settings import AuthSettings
from structlog.testing import capture_logs

from tests.helpers.security import AUDIENCE, ISSUER, IdentityProvider, SigningKey, bad_tokens
from tests.helpers.waiting import eventually_async

KEY = SigningKey.make("one")
RSA_KEY = SigningKey.make("rsa", "RS256")
BAD = bad_tokens(KEY)


@pytest.fixture(autouse=True)
def _plain_logs() -> Iterator[None]:
    structlog.reset_defaults()
    yield
    structlog.reset_defaults()


class Published:
    """Keys without a network: what `read` returns, or raises, and how often it was asked."""

    def __init__(self, *keys: SigningKey) -> None:
        self.keys: tuple[SigningKey, ...] = keys
        self.error: Exception | None = None
        self.reads = 0

    def __call__(self, url: str) -> dict[str, Key]:
        self.reads += 1
        if self.error is not None:
            raise self.error
        return dict(keys_of({"keys": [key.jwk for key in self.keys]}))


def tokens_of(published: Published, **changes: Any) -> JwtTokens:
    values: dict[str, Any] = {
        "issuer": ISSUER,
        "audience": AUDIENCE,
        "algorithms": ("ES256", "RS256"),
        "leeway_s": 30.0,
    }
    return JwtTokens(Keys("https://issuer.test/keys", refresh_s=300, read=published), **values | changes)


async def caller_of(tokens: JwtTokens, authorization: str) -> Any:
    return await tokens.check(bearer_token((("authorization", authorization),) if authorization else ()))


# ---- tokens ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [KEY, RSA_KEY], ids=["ES256", "RS256"])
async def test_a_good_token_says_who_calls_and_what_they_may(key):
    tokens = tokens_of(Published(KEY, RSA_KEY))
    expires = int(time.time()) + 100
    token = key.token(
        sub="ann@example.test", exp=expires, aud=["x", AUDIENCE], perdure_namespaces=["a", "b"],
        perdure_roles=["operator", "approver", "of-another-system"],
    )  # fmt: skip
    caller = await caller_of(tokens, f"bearer {token}")
    assert (caller.name, caller.namespaces) == ("ann@example.test", {"a", "b"})
    assert caller.roles == {Role.OPERATOR, Role.APPROVER}
    assert caller.expires_at_s == expires + 30


async def test_a_token_may_be_good_for_longer_than_there_are_numbers():
    caller = await tokens_of(Published(KEY)).check(KEY.token(exp=10**400))
    assert caller.expires_at_s == 253_402_300_799 + 30


async def test_a_token_without_our_claims_is_good_for_nothing():
    caller = await caller_of(
        tokens_of(Published(KEY)), f"Bearer {KEY.token(without=('perdure_namespaces', 'perdure_roles'))}"
    )
    assert (caller.namespaces, caller.roles) == (frozenset(), frozenset())


@pytest.mark.parametrize("kind", sorted(BAD))
async def test_every_bad_token_is_refused_with_its_reason_and_a_constant_text(kind):
    authorization, reason = BAD[kind]
    with pytest.raises(Unauthenticated) as refused:
        await caller_of(tokens_of(Published(KEY)), authorization)
    assert refused.value.reason == reason
    assert refused.value.message in {
        "the call carries no bearer token; send one in the metadata `authorization`",
        "the token is not valid",
        "the token has expired; get a new one",
    }
    assert refused.value.metadata == {}


async def test_a_key_is_only_good_for_its_own_algorithm():
    declared = Published(KEY)
    entry = {**RSA_KEY.jwk, "alg": "PS256"}
    tokens = JwtTokens(
        Keys("https://issuer.test/keys", refresh_s=300, read=lambda _: keys_of({"keys": [entry]})),
        issuer=ISSUER, audience=AUDIENCE, algorithms=("RS256",), leeway_s=0,
    )  # fmt: skip
    with pytest.raises(Unauthenticated):
        await tokens.check(RSA_KEY.token())
    # An elliptic key under the name of an RSA one, and the other way round.
    mixed = SigningKey("one", RSA_KEY.private, "RS256")
    with pytest.raises(Unauthenticated):
        await tokens_of(declared).check(mixed.token())


async def test_clocks_may_differ_by_the_leeway_and_not_by_more():
    now = int(time.time())
    tokens = tokens_of(Published(KEY))
    for claims in ({"exp": now - 10}, {"nbf": now + 10}, {"iat": now + 10}):
        assert (await tokens.check(KEY.token(**claims))).name == "ann"
    with pytest.raises(TokenExpired):
        await tokens.check(KEY.token(exp=now - 60))


async def test_a_token_without_kid_means_the_only_key_there_is():
    token = KEY.token(headers={"kid": None})
    assert (await tokens_of(Published(KEY)).check(token)).name == "ann"
    with pytest.raises(Unauthenticated):
        await tokens_of(Published(KEY, RSA_KEY)).check(token)


def test_two_tokens_are_none():
    good = f"Bearer {KEY.token()}"
    with pytest.raises(Unauthenticated):
        bearer_token((("authorization", good), ("authorization", good)))
    with pytest.raises(TokenMissing):
        bearer_token((("authorization-bin", b"x"), ("x", good)))


# ---- keys ------------------------------------------------------------------------------------------------------------


async def test_a_new_key_is_found_without_a_restart_and_an_old_one_is_no_longer_good():
    published = Published(KEY)
    keys = Keys("https://x", refresh_s=300, read=published)
    await keys.start()
    assert await keys.find("one")
    published.keys = (SigningKey("two", KEY.private),)
    assert await keys.find("two")
    assert await keys.find("one") is None
    await keys.stop()


async def test_a_flood_of_made_up_keys_reads_once(monkeypatch):
    published = Published(KEY)
    keys = Keys("https://x", refresh_s=300, read=published)
    await keys.start()
    found = await asyncio.gather(*(keys.find(f"made up {number}") for number in range(500)))
    assert not any(found)
    assert published.reads == 2
    assert await keys.find("one")
    monkeypatch.setattr(jwks, "MIN_LOOKUP_INTERVAL_S", 0.0)  # the time is up
    await keys.find("made up")
    assert published.reads == 3
    await keys.stop()


async def test_old_keys_are_used_while_the_provider_is_away():
    published = Published(KEY)
    keys = Keys("https://x", refresh_s=0.01, read=published)
    await keys.start()
    for error in (OSError("connection refused"), ValueError("not JSON"), RuntimeError("whatever")):
        published.error = error
        seen = published.reads
        await eventually_async(lambda seen=seen: published.reads > seen + 1)
        assert await keys.find("one")
        assert await keys.find("two") is None
    published.error = None
    published.keys = (SigningKey("two", KEY.private),)
    await eventually_async(lambda: keys.find("two"))
    await keys.stop()


async def test_before_the_keys_were_ever_read_nobody_can_tell():
    published = Published(KEY)
    published.error = OSError("connection refused")
    keys = Keys("https://x", refresh_s=0.01, read=published)
    await keys.start()
    with pytest.raises(KeysUnavailable) as unavailable:
        await keys.find("one")
    assert unavailable.value.retry_delay_s
    published.error = None
    await eventually_async(lambda: _found(keys, "one"))
    await keys.stop()


async def _found(keys: Keys, key_id: str) -> bool:
    try:
        return await keys.find(key_id) is not None
    except KeysUnavailable:
        return False


async def test_a_slow_provider_does_not_stop_the_event_loop_nor_calls_with_known_keys(monkeypatch):
    begun, release = threading.Event(), threading.Event()
    published = Published(KEY)
    keys = Keys("https://x", refresh_s=300, read=published)
    await keys.start()

    def slow(url: str) -> dict[str, Key]:
        begun.set()
        release.wait(10)
        return published(url)

    monkeypatch.setattr(keys, "_read", slow)
    looking = asyncio.create_task(keys.find("two"))
    await eventually_async(begun.is_set)
    assert await keys.find("one")
    assert not looking.done()
    release.set()
    assert await looking is None
    await keys.stop()


def test_keys_that_must_not_be_used_are_left_out():
    from cryptography.hazmat.primitives.asymmetric import rsa

    weak = SigningKey("weak", rsa.generate_private_key(public_exponent=65537, key_size=1024), "RS256")
    secret = {"kty": "oct", "kid": "secret", "k": "c2VjcmV0LXNlY3JldC1zZWNyZXQtc2VjcmV0", "alg": "HS256"}
    private = {**KEY.jwk, "kid": "private", "d": "AAAA"}
    others = [{**KEY.jwk, "kid": "enc", "use": "enc"}, {"kty": "new", "kid": "new"}, "nonsense", None, weak.jwk]
    found = keys_of({"keys": [secret, private, *others, RSA_KEY.jwk]})
    assert set(found) == {"rsa"}
    for nothing in ({}, [], None, {"keys": 1}, {"keys": [secret]}, {"keys": []}):
        with pytest.raises(ValueError, match="no key"):
            keys_of(nothing)


def test_keys_are_read_from_where_they_were_said_to_be_and_from_nowhere_else():
    with IdentityProvider([KEY]) as provider, IdentityProvider([RSA_KEY]) as other:
        assert set(read_keys(provider.url)) == {"one"}
        provider.answer = (302, other.url.encode())
        with pytest.raises(OSError, match="302"):
            read_keys(provider.url)
        assert other.reads == 0
        provider.answer = (200, b" " * (jwks.MAX_BYTES + 1))
        with pytest.raises(ValueError, match="bytes"):
            read_keys(provider.url)
        provider.answer = (200, b"[" * 100_000)
        with pytest.raises((ValueError, RecursionError)):
            read_keys(provider.url)
        provider.answer = (500, b"")
        with pytest.raises(OSError, match="500"):
            read_keys(provider.url)


@pytest.mark.parametrize("variable", ["http_proxy", "HTTP_PROXY", "all_proxy"])
def test_the_keys_of_a_provider_on_this_machine_are_not_asked_of_a_proxy(
    monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    with IdentityProvider([KEY]) as provider, IdentityProvider([RSA_KEY]) as proxy:
        monkeypatch.setenv(variable, proxy.url)
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        assert set(read_keys(provider.url)) == {"one"}
        assert proxy.reads == 0


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"jwks_url": "http://issuer.test/keys", "issuer": "i", "audience": "a"}, "https"),
        ({"jwks_url": "http://127.0.0.1.issuer.test/keys", "issuer": "i", "audience": "a"}, "https"),
        ({"jwks_url": "ftp://issuer.test/keys", "issuer": "i", "audience": "a"}, "URL"),
        ({"jwks_url": "https://u:secret@issuer.test/keys", "issuer": "i", "audience": "a"}, "password"),
        ({"jwks_url": "https://issuer.test/keys", "issuer": "i"}, "audience"),
        ({"jwks_url": "https://issuer.test/keys", "audience": "a"}, "issuer"),
        ({"jwks_url": "https://i.test/", "issuer": "i", "audience": "a", "tokens_file": "x"}, "exclude"),
        ({"algorithms": "HS256"}, "ES256"),
        ({"algorithms": "none"}, "ES256"),
        ({"algorithms": ""}, "empty"),
    ],
)
def test_settings_that_would_be_unsafe_are_refused(given, why):
    with pytest.raises(ValueError, match=why):
        AuthSettings(**given)


# ---- a file of tokens ------------------------------------------------------------------------------------------------

SECRET = "dev-token-0123456789"


def write_tokens(path: Path, *entries: dict[str, Any]) -> Path:
    path.write_text(json.dumps({"tokens": list(entries)}))
    path.chmod(0o600)
    return path


def entry(**changes: Any) -> dict[str, Any]:
    return {"token": SECRET, "caller": "ann", "namespaces": ["default"], "roles": ["operator"]} | changes


async def test_a_file_of_tokens_says_who_calls(tmp_path):
    hashed = {"token": None, "sha256": hashlib.sha256(b"another-token-0123").hexdigest(), "caller": "bob"}
    path = write_tokens(tmp_path / "tokens.json", entry(), entry(**hashed, roles=[], namespaces=["*"]))
    tokens = TokenFile(path)
    ann, bob = await tokens.check(SECRET), await tokens.check("another-token-0123")
    assert (ann.name, ann.namespaces, ann.roles) == ("ann", {"default"}, {Role.OPERATOR})
    assert (bob.name, bob.namespaces, bob.roles) == ("bob", {"*"}, frozenset())
    assert ann.expires_at_s is None
    for wrong in ("", "x", SECRET + "x", SECRET[:-1], hashed["sha256"], "\ud800"):
        with pytest.raises(Unauthenticated, match="not valid"):
            await tokens.check(wrong)


def test_yaml_is_read_as_well(tmp_path):
    path = tmp_path / "tokens.yaml"
    path.write_text(f"tokens:\n  - token: {SECRET}\n    caller: ann\n    roles: [viewer]\n")
    assert [caller.name for caller in load_tokens(path).values()] == ["ann"]


@pytest.mark.parametrize(
    "content",
    [
        "", "[]", "tokens: []", "{", f"- {SECRET}", f"tokens: [{SECRET}]",
        json.dumps({"tokens": [entry(token=None)]}),
        json.dumps({"tokens": [entry(sha256="0" * 64)]}),
        json.dumps({"tokens": [entry(token=None, sha256="short")]}),
        json.dumps({"tokens": [entry(token="too-short")]}),
        json.dumps({"tokens": [entry(caller="")]}),
        json.dumps({"tokens": [entry(caller="a\nb")]}),
        json.dumps({"tokens": [entry(roles=["root"])]}),
        json.dumps({"tokens": [entry(role="viewer")]}),
        json.dumps({"tokens": [entry(), entry(caller="bob")]}),
        f"tokens: [{{token: {SECRET}, caller: [}}",
    ],
)  # fmt: skip
def test_a_broken_file_of_tokens_is_told_without_its_tokens(tmp_path, content):
    path = tmp_path / "tokens.yaml"
    path.write_text(content)
    with pytest.raises(ConfigurationError, match="PERDURE_AUTH__TOKENS_FILE") as refused:
        TokenFile(path)
    assert SECRET not in str(refused.value) + repr(refused.value.__cause__)
    assert "too-short" not in refused.value.message


async def test_a_changed_file_is_read_again_and_a_broken_one_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr(token_file, "LOOK_INTERVAL_S", 0.0)
    path = write_tokens(tmp_path / "tokens.json", entry())
    tokens = TokenFile(path)
    write_tokens(path, entry(token="new-token-0123456789", caller="bobby"))
    assert (await tokens.check("new-token-0123456789")).name == "bobby"
    with pytest.raises(Unauthenticated):
        await tokens.check(SECRET)
    with capture_logs() as logs:
        path.write_text("{")
        for _ in range(3):
            assert (await tokens.check("new-token-0123456789")).name == "bobby"
        path.unlink()
        assert (await tokens.check("new-token-0123456789")).name == "bobby"
    assert [line["event"] for line in logs] == ["auth.tokens_not_reloaded"] * 2
    assert "new-token" not in str(logs)


def test_a_file_that_everybody_can_read_is_warned_about(tmp_path):
    path = write_tokens(tmp_path / "tokens.json", entry())
    with capture_logs() as logs:
        TokenFile(path)
        path.chmod(0o644)
        TokenFile(path)
    assert [(line["event"], line["log_level"]) for line in logs] == [("auth.tokens_file_readable", "warning")]


async def test_without_authentication_everybody_is_one_caller_who_may_do_everything():
    authentication = make_authentication(AuthSettings(), "dev")
    await authentication.start()
    caller = await authentication.caller_of((("authorization", "Bearer nonsense"),))
    assert (caller.name, caller.may(Role.ADMIN), caller.sees("any")) == ("dev", True, True)
    await authentication.stop()
