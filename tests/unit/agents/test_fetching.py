"""What agents may read of the web: listed hosts, at addresses that are public or listed, and nothing else."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
from perdure_service.agents import fetching
from perdure_service.agents.fetching import AllowList, FetchFailed, FetchRefused, fetch
from perdure_service.errors import ConfigurationError
from perdure_service.settings import load_settings

from tests.helpers.waiting import free_port
from tests.helpers.web import Web, serving


@pytest.fixture(scope="module")
def web() -> Iterator[Web]:
    with serving() as web:
        yield web


@pytest.fixture
def allowed(web: Web) -> AllowList:
    return AllowList.of([f"127.0.0.1:{web.port}", f"localhost:{web.port}"])


async def test_a_listed_host_is_read(web: Web, allowed: AllowList) -> None:
    url = web.page("/plain", "hello é", kind="text/plain; charset=latin-1")
    web.pages["/plain"] = (200, {"content-type": "text/plain; charset=latin-1"}, "hello é".encode("latin-1"))
    assert await fetch(url, allowed) == (url, "hello é")


async def test_the_listed_name_is_asked_at_the_address_that_was_checked(web: Web, allowed: AllowList) -> None:
    web.page("/named", "by name")
    _, text = await fetch(f"http://localhost:{web.port}/named", allowed)
    assert text == "by name"
    assert web.hosts[-1] == f"localhost:{web.port}"


async def test_a_name_does_not_make_a_private_address_readable(web: Web) -> None:
    url = f"http://localhost:{web.port}/private"
    with pytest.raises(FetchRefused, match="not a public address"):
        await fetch(url, AllowList.of([f"localhost:{web.port}"]))
    assert not web.reads["/private"]


@pytest.mark.parametrize(
    "url",
    [
        "http://example.org/", "https://127.0.0.1:{port}.example.org/", "http://127.0.0.1:{other}/",
        "http://127.0.0.2:{port}/", "http://2130706433:{port}/", "http://[::1]:{port}/",
    ],
)  # fmt: skip
async def test_another_host_or_port_is_not_read(web: Web, allowed: AllowList, url: str) -> None:
    with pytest.raises(FetchRefused, match=r"not on the list|not a URL"):
        await fetch(url.format(port=web.port, other=free_port()), allowed)


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "ftp://127.0.0.1/", "http://u:p@127.0.0.1:{port}/", "/x", "", "http://"]
)
async def test_only_plain_web_addresses_are_read(web: Web, allowed: AllowList, url: str) -> None:
    with pytest.raises(FetchRefused, match=r"only http|not a URL"):
        await fetch(url.format(port=web.port), allowed)


async def test_nothing_is_read_when_nothing_is_listed(web: Web) -> None:
    with pytest.raises(FetchRefused, match="not on the list"):
        await fetch(web.page("/x", "x"), AllowList.of(()))


async def test_redirects_are_followed_within_the_list_and_not_beyond(web: Web, allowed: AllowList) -> None:
    web.page("/end", "there")
    web.page("/two", "", 302, location="/end")
    url = web.page("/one", "", 301, location=f"http://localhost:{web.port}/two")
    assert await fetch(url, allowed) == (f"http://localhost:{web.port}/end", "there")
    for target in ("http://example.org/", f"http://127.0.0.2:{web.port}/end", "file:///etc/passwd"):
        with pytest.raises(FetchRefused, match=r"not on the list|only http"):
            await fetch(web.page("/away", "", 302, location=target), allowed)


async def test_redirects_end(web: Web, allowed: AllowList) -> None:
    with pytest.raises(FetchRefused, match="redirects more than 3 times"):
        await fetch(web.page("/round", "", 302, location="/round"), allowed)
    assert web.reads["/round"] == fetching.MAX_REDIRECTS + 1


async def test_long_pages_and_pages_without_text_are_refused(
    web: Web, allowed: AllowList, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "MAX_BYTES", 10)
    assert (await fetch(web.page("/short", "x" * 10), allowed))[1] == "x" * 10
    with pytest.raises(FetchRefused, match="longer than 10 bytes"):
        await fetch(web.page("/long", "x" * 11), allowed)
    with pytest.raises(FetchRefused, match="image/png, and not text"):
        await fetch(web.page("/image", "x", kind="image/png"), allowed)
    zipped = web.page("/zipped", "x", **{"content-encoding": "gzip"})
    with pytest.raises(FetchRefused, match="compressed"):
        await fetch(zipped, allowed)


@pytest.mark.parametrize(
    ("status", "error"), [(404, FetchRefused), (403, FetchRefused), (429, FetchFailed), (503, FetchFailed)]
)
async def test_what_may_help_to_try_again_is_told_apart(
    web: Web, allowed: AllowList, status: int, error: type[Exception]
) -> None:
    with pytest.raises(error, match=str(status)):
        await fetch(web.page("/status", "", status), allowed)


async def test_a_page_that_takes_too_long_may_be_tried_again(
    web: Web, allowed: AllowList, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "TIMEOUT_S", 0.05)
    web.held.add("/slow")
    with pytest.raises(FetchFailed, match="cannot be read"):
        await fetch(web.page("/slow", "x"), allowed)
    web.released.set()


async def test_a_host_that_is_not_there_may_be_tried_again() -> None:
    port = free_port()
    with pytest.raises(FetchFailed, match="cannot be read"):
        await fetch(f"http://127.0.0.1:{port}/", AllowList.of([f"127.0.0.1:{port}"]))


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.216.34", True), ("2606:2800:220:1:248:1893:25c8:1946", True), ("10.0.0.5", False),
        ("127.0.0.1", False), ("169.254.169.254", False), ("::1", False), ("fe80::1", False), ("fd00::1", False),
        ("::ffff:10.0.0.5", False), ("0.0.0.0", False), ("224.0.0.1", False), ("100.64.0.1", False),
        ("::7f00:1", False), ("fec0::1", False), ("5f00::1", False), ("ff0e::1", False),
    ],
)  # fmt: skip
def test_addresses_that_are_not_public_must_be_listed(address: str, public: bool) -> None:
    if public:
        AllowList.of(["example.org"]).check_address(address, "example.org", 443, "https")
        return
    with pytest.raises(FetchRefused, match="not a public address"):
        AllowList.of(["example.org"]).check_address(address, "example.org", 443, "https")
    plain = address.removeprefix("::ffff:")
    listed = f"[{plain}]" if ":" in plain else plain
    AllowList.of(["example.org", listed]).check_address(address, "example.org", 443, "https")


@pytest.mark.parametrize("form", ["::ffff:{}", "64:ff9b::{}", "2002:{:x}:{:x}::"])
@pytest.mark.parametrize(("carried", "public"), [("93.184.216.34", True), ("169.254.169.254", False)])
def test_an_address_that_carries_another_one_is_what_it_carries(form: str, carried: str, public: bool) -> None:
    number = int(ipaddress.IPv4Address(carried))
    address = form.format(number >> 16, number & 0xFFFF) if "x" in form else form.format(carried)
    with nullcontext() if public else pytest.raises(FetchRefused, match=f"at {carried}, which is not"):
        AllowList.of(["example.org"]).check_address(address, "example.org", 443, "https")


@pytest.mark.parametrize("charset", ["idna", "punycode", "undefined", "unicode_escape", "hex", "nosuch"])
async def test_a_charset_that_is_none_is_taken_for_utf_8(web: Web, allowed: AllowList, charset: str) -> None:
    url = web.page("/odd", "hello \\x61 é-", kind=f"text/plain; charset={charset}")
    assert (await fetch(url, allowed))[1] == "hello \\x61 é-"


async def test_half_a_character_is_not_read(web: Web, allowed: AllowList) -> None:
    with pytest.raises(FetchRefused, match="not a URL"):
        await fetch(f"{web.url}/\ud800", allowed)


@pytest.mark.parametrize(
    ("port", "scheme", "entry", "allows"),
    [
        (80, "http", "a.example", True), (443, "https", "A.Example", True), (80, "https", "a.example", False),
        (8080, "http", "a.example", False), (8080, "http", "a.example:8080", True),
        (80, "http", "a.example:8080", False),
    ],
)  # fmt: skip
def test_an_entry_without_a_port_means_the_usual_ones(port: int, scheme: str, entry: str, allows: bool) -> None:
    assert AllowList.of([entry]).allows("a.example", port, scheme) is allows


def test_the_setting_takes_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERDURE_FETCH_ALLOW", "Docs.example.org, 127.0.0.1:8080,[::1]:80")
    assert load_settings().fetch_allow == ("docs.example.org", "127.0.0.1:8080", "[::1]:80")


@pytest.mark.parametrize(
    "entry", ["https://a.example", "a.example/x", "a b", "u@a.example", ":80", "a:99999", "a:0", "é.example"]
)
def test_the_setting_refuses_what_is_no_host(monkeypatch: pytest.MonkeyPatch, entry: str) -> None:
    monkeypatch.setenv("PERDURE_FETCH_ALLOW", entry)
    with pytest.raises(ConfigurationError, match="must be a host, or host:port"):
        load_settings()
