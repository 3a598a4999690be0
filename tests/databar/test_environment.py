"""The environment: where the key and the base URL come from, and which proxy and certificates are used or refused."""

from __future__ import annotations

import asyncio
import base64
import os
import shutil
import subprocess
import traceback
from collections.abc import Mapping
from pathlib import Path

import pytest
from pydantic import SecretStr

from enrich.databar.client import Client
from enrich.databar.clock import SystemClock
from enrich.databar.environment import (
    DEFAULT_BASE_URL,
    ApiAccess,
    Proxy,
    find_access,
    find_base_url,
    find_key,
    find_proxy,
    load_certificates,
)
from enrich.errors import (
    ApiCallFailed,
    ApiKeyRejected,
    ApiUnreachable,
    CertificateUntrusted,
    JobError,
    RequestNotAccepted,
)
from enrich.job.target import Target, TargetKind
from enrich.run.preflight import retry_until
from tests.databar.test_client import BODY, CREATED, KEY
from tests.support.cases import first_quick, in_turn
from tests.support.connect_proxy import Certificate, make_certificate, serve_connect_proxy
from tests.support.raw_server import http_reply, serve_replies, unused_port
from tests.support.workspace import SandboxApi, Workspace, make_leads


def write_login(home: Path, text: str) -> None:
    """Write the file that `databar login` writes."""
    folder = home / ".databar"
    folder.mkdir()
    (folder / "config").write_text(text, encoding="utf-8")


def test_key_lookup_order(tmp_path: Path) -> None:
    """The key variable comes first, then the file that a variable names, then the file of `databar login`."""
    file = tmp_path / "key"
    file.write_text("from-file\n", encoding="utf-8")
    write_login(tmp_path, "user = ada\napi_key = from-login\n")
    environ = {"DATABAR_API_KEY": " from-variable ", "DATABAR_API_KEY_FILE": str(file)}

    assert find_key(environ, tmp_path).get_secret_value() == "from-variable"
    assert find_key(environ | {"DATABAR_API_KEY": ""}, tmp_path).get_secret_value() == "from-file"
    assert find_key({"DATABAR_API_KEY": " ", "DATABAR_API_KEY_FILE": ""}, tmp_path).get_secret_value() == "from-login"


@in_turn("text", ["", "\n", "api_key=\n", "api_key\n", "other=KEY\n", "# api_key=KEY\n"])
def test_login_file_without_key(tmp_path: Path, text: str) -> None:
    """The message lists the places that were searched and how to try the sandbox."""
    write_login(tmp_path, text)
    with pytest.raises(ApiKeyRejected, match="no API key") as caught:
        find_key({}, tmp_path)
    assert "--sandbox" in (caught.value.hint or "")


@in_turn("text", [KEY, f"{KEY}\r\n", f"\ufeff{KEY}\n", f"\n  {KEY}\t\n"])
def test_key_file_whitespace_and_bom(tmp_path: Path, text: str) -> None:
    """Whitespace and a byte order mark that editors add are not part of the key."""
    file = tmp_path / "key"
    file.write_text(text, encoding="utf-8", newline="")
    assert find_key({"DATABAR_API_KEY_FILE": str(file)}, tmp_path).get_secret_value() == KEY


def test_unreadable_key_file(tmp_path: Path) -> None:
    """A named key file that can't be read is an error; no other place is tried."""
    write_login(tmp_path, f"api_key={KEY}")
    empty, binary = tmp_path / "empty", tmp_path / "binary"
    empty.touch()
    binary.write_bytes(b"\xff\xfe\x00")
    for path, reason in [
        (tmp_path / "none", "No such file"),
        (tmp_path, "Is a directory"),
        (empty, "is empty"),
        (binary, "it is not text"),
    ]:
        with pytest.raises(ApiKeyRejected, match=reason) as caught:
            find_key({"DATABAR_API_KEY_FILE": str(path)}, tmp_path)
        assert str(path) in caught.value.message


@in_turn("key", [f"{KEY}\nx", f"{KEY} x", f"{KEY}é", f"{KEY}\x00", f"{KEY}\x7f", f"{KEY}\u200b"])
def test_invalid_key_characters(tmp_path: Path, key: str) -> None:
    """A key with a line break or a space inside is refused before anything is sent, without being shown."""
    file = tmp_path / "key"
    file.write_text(key, encoding="utf-8")
    for environ in ({"DATABAR_API_KEY": key}, {"DATABAR_API_KEY_FILE": str(file)}):
        with pytest.raises(ApiKeyRejected, match="invalid characters") as caught:
            find_key(environ, tmp_path)
        assert KEY not in "".join(traceback.format_exception(caught.value)) + str(caught.value.hint)


def test_key_is_not_in_repr() -> None:
    """The key is not in the repr, so logs and tracebacks don't show it."""
    access = ApiAccess(DEFAULT_BASE_URL, SecretStr(KEY))
    assert KEY not in f"{access} {access!r} {access.key}"


@in_turn(
    ("base_url", "host"),
    [
        ("https://api.databar.ai/v1", "api.databar.ai"),
        ("https://api.databar.ai/v1/", "api.databar.ai"),
        ("HTTPS://API.databar.ai:8443/v1", "api.databar.ai"),
        ("http://127.0.0.1:8080/v1", "127.0.0.1"),
        ("http://127.9.9.9/v1", "127.9.9.9"),
        ("http://localhost:1/v1", "localhost"),
        ("http://[::1]:1/v1", "::1"),
        (" https://api.databar.ai/v1\n", "api.databar.ai"),
    ],
)
def test_base_url_https_or_loopback(tmp_path: Path, base_url: str, host: str) -> None:
    """The base URL must be HTTPS or loopback: the key never leaves the machine unencrypted."""
    access = find_access({"DATABAR_BASE_URL": base_url, "DATABAR_API_KEY": KEY}, tmp_path)
    assert access.host == host
    assert not access.base_url.endswith(("/", "\n"))


@in_turn("base_url", [None, "", " "])
def test_default_base_url(tmp_path: Path, base_url: str | None) -> None:
    """An empty variable counts as missing, and the default URL is used."""
    environ = {"DATABAR_API_KEY": KEY} | ({} if base_url is None else {"DATABAR_BASE_URL": base_url})
    assert find_access(environ, tmp_path).base_url == DEFAULT_BASE_URL


@in_turn(
    "base_url",
    [
        "http://api.databar.ai/v1",
        "http://localhost.evil.example/v1",
        "http://127.0.0.1.nip.io/v1",
        "http://2130706433/v1",
        "http://0.0.0.0/v1",
        "ftp://127.0.0.1/v1",
        "api.databar.ai/v1",
        "//api.databar.ai/v1",
        "https://",
        "https:///v1",
        "https://api.databar.ai:port/v1",
        "https://api.databar.ai:99999/v1",
        "https://[::1/v1",
        "https://ada:pw@api.databar.ai/v1",
        "https://api.data\nbar.ai/v1",
        "https://api.databar.ai/v1\x00",
    ],
)
def test_invalid_base_url(base_url: str) -> None:
    """An invalid base URL is refused before anything is sent; the hint shows what to write instead."""
    with pytest.raises(JobError, match="must be an https address, or http on loopback") as caught:
        find_base_url({"DATABAR_BASE_URL": base_url})
    assert DEFAULT_BASE_URL in (caught.value.hint or "")


# Proxy and certificates

HOST = "api.enrich.example"
API = f"https://{HOST}/v1"

LOOPBACK = [
    "http://127.0.0.1:8000/v1",
    "http://127.9.9.9/v1",
    "http://localhost:8000/v1",
    "http://LOCALHOST/v1",
    "https://localhost./v1",
    "http://[::1]:8000/v1",
    "http://[0:0:0:0:0:0:0:1]/v1",
    "https://[::ffff:127.0.0.1]/v1",
]
INVALID_PROXIES = ["socks5://127.0.0.1:9", "http://", "http://[", "http://proxy.example:http", "://", "nonsense://x"]


@in_turn("base_url", LOOPBACK)
@in_turn("value", [*INVALID_PROXIES, "http://proxy.example:3128"])
def test_loopback_ignores_proxy(base_url: str, value: str) -> None:
    """Loopback ignores every proxy variable, even a broken one, so the demo runs behind any proxy."""
    names = ["http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"]
    assert find_proxy(dict.fromkeys(names, value), base_url) is None


@in_turn(
    ("environ", "url"),
    [
        ({}, None),
        ({"https_proxy": "http://p.example:3128"}, "http://p.example:3128"),
        ({"HTTPS_PROXY": "http://p.example:3128/"}, "http://p.example:3128"),
        ({"HTTPS_PROXY": "HTTP://P.example:3128/path?x#y"}, "http://p.example:3128"),
        ({"https_proxy": "p.example:3128"}, "http://p.example:3128"),
        ({"https_proxy": " p.example:3128 "}, "http://p.example:3128"),
        ({"https_proxy": "p.example"}, "http://p.example:1080"),
        ({"https_proxy": "https://p.example"}, "https://p.example:443"),
        ({"https_proxy": "https://p.example:8443"}, "https://p.example:8443"),
        ({"https_proxy": "[2001:db8::7]:3128"}, "http://[2001:db8::7]:3128"),
        ({"https_proxy": "127.0.0.1:3128"}, "http://127.0.0.1:3128"),
        ({"https_proxy": "a.example:1", "HTTPS_PROXY": "b.example:1"}, "http://a.example:1"),
        ({"https_proxy": "", "HTTPS_PROXY": "b.example:1"}, "http://b.example:1"),
        ({"https_proxy": "", "HTTPS_PROXY": ""}, None),
        ({"https_proxy": " ", "all_proxy": "", "ALL_PROXY": ""}, None),
        ({"all_proxy": "a.example:1"}, "http://a.example:1"),
        ({"ALL_PROXY": "a.example:1"}, "http://a.example:1"),
        ({"all_proxy": "a.example:1", "ALL_PROXY": "b.example:1"}, "http://a.example:1"),
        ({"all_proxy": "a.example:1", "HTTPS_PROXY": "b.example:1"}, "http://b.example:1"),
        ({"https_proxy": "", "all_proxy": "a.example:1"}, "http://a.example:1"),
        ({"http_proxy": "a.example:1", "HTTP_PROXY": "a.example:1", "ftp_proxy": "a.example:1"}, None),
        ({"all_proxy": "socks5://a.example:1", "HTTPS_PROXY": "b.example:1"}, "http://b.example:1"),
        ({"http_proxy": "socks5://a.example:1", "HTTPS_PROXY": "b.example:1"}, "http://b.example:1"),
    ],
)
def test_proxy_variable_precedence(environ: Mapping[str, str], url: str | None) -> None:
    """Lower case comes first, then the scheme's variable before `all_proxy`; empty means none, no scheme means http."""
    proxy = find_proxy(environ, API)
    assert (proxy.url if proxy else None) == url


@in_turn(
    ("no_proxy", "direct", "proxied"),
    [
        ("*", [HOST, "10.1.2.3"], []),
        ("a.example, *", [HOST], []),
        (HOST, [HOST, f"{HOST}:8443", f"x.{HOST}", HOST.upper(), f"{HOST}."], ["enrich.example", f"x{HOST}"]),
        ("enrich.example", [HOST, "enrich.example"], ["notenrich.example", "enrich.example.org"]),
        (".enrich.example", [HOST, "enrich.example"], ["notenrich.example"]),
        ("*.enrich.example", [HOST], ["notenrich.example"]),
        ("ENRICH.example.", [HOST], ["other.example"]),
        ("example", [HOST], ["api.example.org"]),
        (f"{HOST}:443", [HOST, f"{HOST}:443"], [f"{HOST}:8443"]),
        ("enrich.example:8443", [f"{HOST}:8443"], [HOST]),
        ("a.example b.example,,\tenrich.example ,", [HOST], ["c.example"]),
        ("", [], [HOST]),
        (" , ,", [], [HOST]),
        (".", [], [HOST]),
        ("10.1.2.3", ["10.1.2.3", "10.1.2.3:8443"], ["10.1.2.30", "10.1.2.4"]),
        ("10.1.2.3:443", ["10.1.2.3"], ["10.1.2.3:8443"]),
        ("10.0.0.0/8", ["10.1.2.3", "10.255.0.1:8443", "[::ffff:10.1.2.3]"], ["11.0.0.1", HOST, "[2001:db8::7]"]),
        ("10.9.9.9/8", ["10.1.2.3"], ["11.0.0.1"]),
        ("10.0.0.0/255.0.0.0", ["10.1.2.3"], ["11.0.0.1"]),
        ("10.0.0.0/33 10.0.0.0/x /8 10.0.0/8", [], ["10.1.2.3"]),
        ("2001:db8::7", ["[2001:db8::7]", "[2001:db8:0::7]:8443"], ["[2001:db8::8]"]),
        ("[2001:db8::7]", ["[2001:db8::7]"], ["[2001:db8::8]"]),
        ("[2001:DB8::7]:8443", ["[2001:db8::7]:8443"], ["[2001:db8::7]"]),
        ("2001:db8::/32", ["[2001:db8::7]"], ["[2001:db9::7]", "10.1.2.3"]),
        ("[2001:db8::]/32", ["[2001:db8::7]"], ["[2001:db9::7]"]),
        ("1.2.3", [], ["10.1.2.3"]),
    ],
)
@in_turn("name", ["no_proxy", "NO_PROXY"])
def test_no_proxy_matching(no_proxy: str, direct: list[str], proxied: list[str], name: str) -> None:
    """`no_proxy` matches hosts, their domains, ports, addresses and networks, separated by commas or spaces."""
    environ = {"https_proxy": "http://p.example:3128", name: no_proxy}
    assert [host for host in direct if find_proxy(environ, f"https://{host}/v1")] == []
    assert [host for host in proxied if not find_proxy(environ, f"https://{host}/v1")] == []


def test_lower_case_no_proxy_first() -> None:
    """Lower-case `no_proxy` comes first, unless it is empty."""
    environ = {"https_proxy": "p.example:1", "NO_PROXY": "*"}
    assert find_proxy(environ, API) is None
    assert find_proxy(environ | {"no_proxy": "a.example"}, API) is not None
    assert find_proxy(environ | {"no_proxy": ""}, API) is None


@in_turn(
    ("userinfo", "pair"),
    [
        ("ada:s3cret", b"ada:s3cret"),
        ("ada:p%40ss%3A%2F%23word", b"ada:p@ss:/#word"),
        ("dom%5Cada:x", b"dom\\ada:x"),
        ("ada", b"ada:"),
        (":s3cret", b":s3cret"),
        ("ad%C3%A4:%E2%82%AC", "adä:€".encode()),
        ("a:b%0D%0Ax: y", b"a:b\r\nx: y"),
        ("a@b:c", b"a@b:c"),
    ],
)
def test_proxy_credentials_become_header(userinfo: str, pair: bytes) -> None:
    """Proxy credentials become a header; no URL and no repr contains them."""
    proxy = find_proxy({"https_proxy": f"http://{userinfo}@p.example:3128"}, API)
    assert proxy is not None
    assert proxy.url == "http://p.example:3128"
    assert proxy.authorization == SecretStr("Basic " + base64.b64encode(pair).decode())
    shown = repr(proxy) + str(proxy)
    assert base64.b64encode(pair).decode() not in shown
    assert "s3cret" not in shown


@in_turn("scheme", ["socks", "socks4", "socks4a", "socks5", "SOCKS5H", "ftp", "quic", "file", ""])
@in_turn("name", ["https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"])
def test_unsupported_proxy_kinds(scheme: str, name: str) -> None:
    """An unsupported proxy is refused: ignoring it would send the key by a way that its owner did not choose."""
    with pytest.raises(JobError, match=f"^{name}: ") as caught:
        find_proxy({name: f"{scheme}://ada:s3cret@p.example:1080"}, API)
    message = f"{caught.value} {caught.value.hint}"
    assert scheme.lower() in message
    assert "no_proxy" in message
    assert "s3cret" not in message
    assert find_proxy({name: f"{scheme}://p.example:1080", "no_proxy": HOST}, API) is None


@in_turn(
    "value",
    [
        "http://",
        "http://ada:s3cret@",
        "http://ada:s3#cret@p.example:3128",
        "http://ada:s3/cret@p.example:3128",
        "http://p.example:0",
        "http://p.example:99999",
        "http://p.example:s3cret",
        "http://s3 cret.example:1",
        "http://[::1",
        "http://[s3cret]:1",
        "ada:s3cret",
    ],
)
def test_invalid_proxy_url_is_not_shown(value: str) -> None:
    """An invalid proxy URL is not shown: it may hold a password that should have been percent-encoded."""
    with pytest.raises(JobError, match=r"^https_proxy: not a proxy address$") as caught:
        find_proxy({"https_proxy": value}, API)
    assert "s3" not in "".join(traceback.format_exception(caught.value))


# Over real connections


def post_and_poll(environ: Mapping[str, str], base_url: str = API, seconds: float = 5.0) -> str:
    """Post a run and poll it once, with this environment."""

    async def post_then_poll() -> str:
        access = ApiAccess(base_url, SecretStr(KEY))
        async with Client(
            access, SystemClock(), post_timeout_s=seconds, get_timeout_s=seconds, environ=environ
        ) as client:
            task_id = await client.submit(Target(TargetKind.WATERFALL, "email_getter"), BODY)
            await client.poll_task(task_id)
            return task_id

    return asyncio.run(post_then_poll())


def answer_post_or_get(line: str) -> object:
    """Answer a POST with a task, and a GET with its result."""
    return {"task_id": "t-1", "status": "created" if line.startswith("POST") else "processing"}


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    """Make a certificate of the API's host."""
    return make_certificate(tmp_path_factory.mktemp("api"), HOST)


@pytest.fixture
def proxy_certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    """Make a certificate of a proxy on loopback."""
    return make_certificate(tmp_path_factory.mktemp("proxy"), "127.0.0.1")


@pytest.mark.parametrize("value", ["http://127.0.0.1:{}", "127.0.0.1:{}", "http://ada:s3%2Fcret@127.0.0.1:{}/"])
def test_api_through_proxy(certificate: Certificate, value: str) -> None:
    """The proxy only opens a tunnel; it sees no request and no key."""
    with (
        serve_replies(lambda seen: http_reply(200, answer_post_or_get(seen.line)), tls=certificate.server()) as server,
        serve_connect_proxy(server.port) as proxy,
    ):
        environ = {"HTTPS_PROXY": value.format(proxy.port), "SSL_CERT_FILE": str(certificate.file)}
        assert post_and_poll(environ) == "t-1"
        assert [seen.line.split()[:2] for seen in server.requests] == [
            ["POST", "/v1/waterfalls/email_getter/run"],
            ["GET", "/v1/tasks/t-1"],
        ]
        assert [head.partition("\r\n")[0] for head in proxy.request_heads] == [f"CONNECT {HOST}:443 HTTP/1.1"] * 2
        basic = base64.b64encode(b"ada:s3/cret").decode()
        for head in proxy.request_heads:
            assert KEY not in head
            assert (f"proxy-authorization: basic {basic}".lower() in head.lower()) is ("@" in value)
        assert not any("authorization" in seen.head.lower() for seen in server.requests)


@pytest.mark.parametrize("scheme", ["https", "HTTPS"])
def test_proxy_over_tls(certificate: Certificate, proxy_certificate: Certificate, scheme: str) -> None:
    """A proxy over TLS carries the API's TLS inside."""
    bulk_task = certificate.file.parent / "both.pem"
    bulk_task.write_bytes(certificate.file.read_bytes() + proxy_certificate.file.read_bytes())
    with (
        serve_replies(lambda seen: http_reply(200, answer_post_or_get(seen.line)), tls=certificate.server()) as server,
        serve_connect_proxy(server.port, tls=proxy_certificate.server()) as proxy,
    ):
        environ = {"all_proxy": f"{scheme}://ada:x@127.0.0.1:{proxy.port}", "SSL_CERT_FILE": str(bulk_task)}
        assert post_and_poll(environ) == "t-1"
        assert len(proxy.request_heads) == len(server.requests) == 2
        assert "proxy-authorization" in proxy.request_heads[0].lower()


def failed_post(environ: Mapping[str, str], base_url: str = API) -> ApiCallFailed:
    """Return the error of a run whose POST must fail; no secret is in it or in its causes."""
    with pytest.raises(ApiCallFailed) as caught:
        post_and_poll(environ, base_url)
    error: BaseException | None = caught.value
    written = "".join(traceback.format_exception(caught.value)) + str(caught.value.hint)
    while error is not None:
        written += repr(error) + repr(error.args) + str(error)
        error = error.__cause__ or error.__context__
    for secret in ("s3cret", "s3%63ret", base64.b64encode(b"ada:s3cret").decode(), KEY):
        assert secret not in written
    return caught.value


@in_turn("status", [200, 301, 401, 403, 407, 502, 599])
def test_proxy_refuses_tunnel(status: int) -> None:
    """A refused tunnel's error names the variable and the status, without user and password."""
    refusal = b"HTTP/1.1 %d s3cret\r\nproxy-authenticate: s3cret\r\nconnection: close\r\n\r\ns3cret" % status
    with serve_connect_proxy(0, refusal=refusal) as proxy:
        error = failed_post({"https_proxy": f"http://ada:s3%63ret@127.0.0.1:{proxy.port}"})
        assert type(error) is RequestNotAccepted
        assert f"http://127.0.0.1:{proxy.port} of https_proxy" in error.message
        if status != 200:
            assert f"HTTP {status}" in error.message


@in_turn("refusal", [b"garbage s3cret\r\n\r\n", b"HTTP/1.1 200", b"\x00" * 99_999, b"HTTP/1.1 200 OK\r\n"])
def test_proxy_without_http(refusal: bytes) -> None:
    """The answer of a proxy that does not speak HTTP is not quoted."""
    with serve_connect_proxy(0, refusal=refusal) as proxy:
        assert type(failed_post({"https_proxy": f"ada:s3cret@127.0.0.1:{proxy.port}"})) is RequestNotAccepted


def test_unreachable_proxy() -> None:
    """The error for an unreachable proxy names the proxy and its variable, because the API may be fine."""
    port = unused_port()
    error = failed_post({"ALL_PROXY": f"ada:s3cret@127.0.0.1:{port}"})
    assert type(error) is RequestNotAccepted
    assert f"http://127.0.0.1:{port} of ALL_PROXY" in error.message


@in_turn("name", ["HTTP_PROXY", "http_proxy", "https_proxy", "ALL_PROXY"])
def test_run_on_loopback_without_proxy(name: str) -> None:
    """On loopback POSTs and polls use no proxy, whatever the environment contains."""
    with serve_replies(lambda seen: http_reply(200, answer_post_or_get(seen.line))) as server:
        assert post_and_poll({name: "http://127.0.0.1:1"}, server.base_url) == "t-1"


@pytest.mark.parametrize("by_proxy", ["proxy", "no proxy"])
def test_netrc_is_ignored(
    certificate: Certificate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_proxy: str
) -> None:
    """`.netrc` is ignored: its passwords belong to other programs."""
    netrc = tmp_path / ".netrc"
    netrc.write_text(
        "".join(f"machine {host} login ada password s3cret\n" for host in (HOST, "127.0.0.1", "localhost"))
        + "default login ada password s3cret\n"
    )
    netrc.chmod(0o600)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(netrc))
    tls = certificate.server() if by_proxy == "proxy" else None
    with (
        serve_replies(lambda seen: http_reply(200, answer_post_or_get(seen.line)), tls=tls) as server,
        serve_connect_proxy(server.port) as proxy,
    ):
        through = {"https_proxy": f"127.0.0.1:{proxy.port}", "SSL_CERT_FILE": str(certificate.file)}
        post_and_poll(os.environ | through, API if tls else server.base_url)
        assert len(server.requests) == 2
        for head in [seen.head for seen in server.requests] + proxy.request_heads:
            assert "authorization" not in head.lower()


# Certificates


def test_default_certificates() -> None:
    """The default is None, the certificates of the program; an empty variable means the same."""
    assert load_certificates({}) is None
    assert load_certificates({"SSL_CERT_FILE": "", "SSL_CERT_DIR": ""}) is None


@pytest.mark.parametrize(
    "kind", first_quick(2, ["missing", "empty", "text", "key", "folder", "unreadable", "pipe", "device", "broken"])
)
def test_invalid_certificate_file(certificate: Certificate, tmp_path: Path, kind: str) -> None:
    """An invalid certificate file is an error without a fallback; a pipe or a device is not read at all."""
    path = tmp_path / "named.pem"
    match kind:
        case "empty":
            path.touch()
        case "text":
            path.write_text("this is no certificate")
        case "key":
            path.write_bytes(certificate.key.read_bytes())
        case "broken":
            path.write_bytes(certificate.file.read_bytes().replace(b"A", b"B"))
        case "folder":
            path.mkdir()
        case "unreadable":
            path = Path("/proc/self/mem")
        case "pipe":
            os.mkfifo(path)
        case "device":
            path = Path("/dev/zero")
    with pytest.raises(JobError, match=f"^SSL_CERT_FILE: {path}: ") as caught:
        load_certificates({"SSL_CERT_FILE": str(path)})
    assert caught.value.hint


@pytest.mark.parametrize("kind", ["missing", "empty", "file", "unhashed"])
def test_invalid_certificate_folder(certificate: Certificate, tmp_path: Path, kind: str) -> None:
    """An invalid certificate folder is an error: OpenSSL would silently find nothing in it."""
    path = tmp_path / "certificates"
    if kind == "file":
        path.touch()
    elif kind != "missing":
        path.mkdir()
    if kind == "unhashed":
        shutil.copy(certificate.file, path)
    with pytest.raises(JobError, match=f"^SSL_CERT_DIR: {path}: "):
        load_certificates({"SSL_CERT_DIR": str(path)})
    with pytest.raises(JobError, match=r"^SSL_CERT_DIR: "):
        load_certificates({"SSL_CERT_DIR": str(path), "SSL_CERT_FILE": str(certificate.file)})


@pytest.mark.long
@pytest.mark.skipif(shutil.which("openssl") is None, reason="names the certificates with openssl")
@pytest.mark.parametrize("separated", ["{}", "/nowhere:{}"])
def test_certificate_folder(certificate: Certificate, tmp_path: Path, separated: str) -> None:
    """A certificate folder may be a list of several folders."""
    folder = tmp_path / "certificates"
    folder.mkdir()
    shutil.copy(certificate.file, folder)
    subprocess.run(["openssl", "rehash", str(folder)], check=True, capture_output=True)
    with (
        serve_replies(lambda seen: http_reply(200, answer_post_or_get(seen.line)), tls=certificate.server()) as server,
        serve_connect_proxy(server.port) as proxy,
    ):
        environ = {"https_proxy": f"127.0.0.1:{proxy.port}", "SSL_CERT_DIR": separated.format(folder)}
        assert post_and_poll(environ) == "t-1"


@pytest.mark.long
@pytest.mark.parametrize("kind", ["unknown", "expired", "another host"])
@pytest.mark.parametrize("bad_side", ["the API's", "the proxy's"])
def test_untrusted_certificate_fails(tmp_path: Path, kind: str, bad_side: str) -> None:
    """An untrusted certificate fails without a retry; the message names it and SSL_CERT_FILE, and nothing was sent."""
    (tmp_path / "good").mkdir()
    (tmp_path / "bad").mkdir()
    trusted_name, untrusted_name = ("127.0.0.1", HOST) if bad_side == "the API's" else (HOST, "127.0.0.1")
    name = "other.example" if kind == "another host" else untrusted_name
    bad = make_certificate(tmp_path / "bad", name, expired=kind == "expired")
    good = make_certificate(tmp_path / "good", trusted_name)
    trusted = tmp_path / "trusted.pem"
    trusted.write_bytes(good.file.read_bytes() + (b"" if kind == "unknown" else bad.file.read_bytes()))
    api, proxy_certificates = (bad, good) if bad_side == "the API's" else (good, bad)
    tries = 0

    async def user() -> None:
        nonlocal tries
        tries += 1
        async with Client(ApiAccess(API, SecretStr(KEY)), SystemClock(), environ=environ) as client:
            await client.get_user()

    with (
        serve_replies(CREATED, tls=api.server()) as server,
        serve_connect_proxy(server.port, tls=proxy_certificates.server()) as proxy,
    ):
        environ = {"https_proxy": f"https://127.0.0.1:{proxy.port}", "SSL_CERT_FILE": str(trusted)}
        assert type(failed_post(environ)) is CertificateUntrusted
        with pytest.raises(ApiUnreachable, match="certificate") as caught:
            asyncio.run(retry_until(user, 20.0))
        assert tries == 1
        assert "SSL_CERT_FILE" in (caught.value.hint or "")
        assert not server.requests


# The whole program


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """Make a job and two leads."""
    workspace = Workspace(tmp_path)
    workspace.write_job()
    workspace.write_leads(make_leads(2))
    return workspace


@pytest.mark.long
def test_loopback_with_broken_network_settings(workspace: Workspace, api: SandboxApi) -> None:
    """A run on loopback ignores a broken proxy variable and a missing certificate file."""
    broken = {"HTTP_PROXY": "socks5://x", "https_proxy": "http://[", "ALL_PROXY": "://", "SSL_CERT_FILE": "/nowhere"}
    assert workspace.run_in_process("run", "job.yaml", api=api, **broken).exit_code == 0


@pytest.mark.long
@pytest.mark.parametrize(
    ("variable", "value"),
    [("https_proxy", "socks5://127.0.0.1:9"), ("ALL_PROXY", "http://ada:s3#cret@x"), ("SSL_CERT_FILE", "/nowhere")],
)
@pytest.mark.parametrize("command", [("run", "job.yaml"), ("plan", "job.yaml"), ("waterfalls",)])
def test_invalid_network_settings_are_exit_2(
    workspace: Workspace, variable: str, value: str, command: tuple[str, ...]
) -> None:
    """Invalid network settings are exit 2 with the variable's name and no traceback, before anything is sent."""
    environ = {"DATABAR_BASE_URL": API, "DATABAR_API_KEY": KEY, variable: value}
    result = workspace.run_in_process(*command, api=None, **environ)
    assert result.exit_code == 2
    assert f"error: {variable}: " in result.stderr
    assert "hint: " in result.stderr
    assert "Traceback" not in result.stderr
    assert "cret" not in result.stderr + result.stdout


def test_proxy_password_is_hidden() -> None:
    """The proxy's password is hidden in every output."""
    proxy = Proxy("http://p.example:1", "https_proxy", SecretStr("Basic s3cret"))
    assert "s3cret" not in f"{proxy} {proxy!r}"
