"""The web configuration file: what exporters take is taken, and what is not supported is refused by its name."""

from __future__ import annotations

import contextlib
import subprocess
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from duende_ublkd.core.config import Config, InvalidConfigError, Problem
from duende_ublkd.core.errors import ConfigError
from duende_ublkd.core.values import WrongValueError
from duende_ublkd.core.webconfig import ClientAuth, TlsConfig, TlsVersion, WebConfig
from duende_ublkd.parts import read_config, read_web
from duende_ublkd.report import webfile
from tests.certificates import Authority

if TYPE_CHECKING:
    from pathlib import Path

HASH = "$2y$10$X0h1gDsPszWURQaxFh.zoubFi6DXncSjhoQNJgRrnGs7EsimhC7zG"  # of "test": the exporters' documentation has it

WHOLE = f"""\
# As on prometheus.io
tls_server_config:
  cert_file: server.crt
  key_file: /etc/duende-ublkd/server.key
  client_auth_type: RequireAndVerifyClientCert
  client_ca_file: "ca/clients.pem"
  client_allowed_sans: [prometheus.example.org, 192.0.2.7]
  min_version: TLS12
  max_version: TLS13
  prefer_server_cipher_suites: true
http_server_config:
  http2: false
  headers:
    X-Frame-Options: deny
    X-Content-Type-Options: nosniff
    X-XSS-Protection: 0
    Strict-Transport-Security: max-age=63072000; includeSubDomains
    Content-Security-Policy: default-src 'self'
basic_auth_users:
  alice: {HASH}
  123: {HASH}
"""
TLS = "tls_server_config: {cert_file: a, key_file: b}"


def read_nothing(name: str, is_secret: bool) -> bytes:  # noqa: FBT001
    """Files that hold their names."""
    return f"{name} {'secret' if is_secret else 'public'}".encode()


def loaded(text: str | bytes) -> WebConfig:
    return webfile.load(text if isinstance(text, bytes) else text.encode(), "web.yml", read_nothing)


def problems_of(text: str | bytes) -> tuple[Problem, ...]:
    with pytest.raises(InvalidConfigError) as caught:
        loaded(text)
    assert all(problem.hint for problem in caught.value.problems)
    assert all(str(problem).isprintable() and problem.hint.isprintable() for problem in caught.value.problems)
    return caught.value.problems


def is_taken_or_refused(text: str | bytes) -> None:
    with contextlib.suppress(InvalidConfigError):
        loaded(text)
        return
    problems_of(text)


def test_a_file_of_the_exporters_documentation_is_taken_as_a_whole() -> None:
    config = loaded(WHOLE)
    assert config.tls == TlsConfig(
        cert=b"server.crt public",
        key=b"/etc/duende-ublkd/server.key secret",
        client_auth=ClientAuth.REQUIRED,
        client_ca=b"ca/clients.pem public",
        allowed_sans=("prometheus.example.org", "192.0.2.7"),
    )
    assert config.users == {"alice": HASH, "123": HASH}
    assert config.headers["X-XSS-Protection"] == "0"
    assert list(config.headers) == [
        "X-Frame-Options",
        "X-Content-Type-Options",
        "X-XSS-Protection",
        "Strict-Transport-Security",
        "Content-Security-Policy",
    ]


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n", "{}", "basic_auth_users:\n", "http_server_config: {}\n"])
def test_a_file_without_anything_asks_for_nothing(text: str) -> None:
    assert loaded(text) == WebConfig()


def test_versions_of_tls_have_defaults() -> None:
    tls = loaded(TLS).tls
    assert tls
    assert (tls.min_version, tls.max_version, tls.client_auth) == (TlsVersion.TLS12, TlsVersion.TLS13, ClientAuth.NONE)


def test_neither_a_key_nor_a_hash_is_shown() -> None:
    assert "secret" not in repr(loaded(WHOLE))
    assert HASH not in repr(loaded(WHOLE))
    assert HASH not in repr(replace(Config(), web=loaded(WHOLE)))


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("tls_server_conf: {}", "1: tls_server_conf: unknown key", 'did you mean "tls_server_config"?'),
        ("rate_limit:\n  burst: 1", "1: rate_limit: is not supported", "remove it"),
        ("- x", "must be a mapping, not a sequence", "tls_server_config: ..."),
        ("x", 'must be a mapping, not "x"', "tls_server_config: ..."),
        ("\ntls_server_config: []", "2: tls_server_config: must be a mapping, not a sequence", "cert_file: ..."),
        ("tls_server_config: {cert_file: a}", "1: tls_server_config: has no key_file", "add key_file: ..."),
        ("tls_server_config: {key_file: a}", "1: tls_server_config: has no cert_file", "add cert_file: ..."),
        (
            "tls_server_config:\n  cert_file: [x]\n  key_file: b",
            "2: tls_server_config.cert_file: must be a text, not a sequence",
            "write a text",
        ),
        (
            "tls_server_config:\n  cert_file:\n  key_file: b",
            "2: tls_server_config.cert_file: must be a text, not nothing",
            "write a text",
        ),
        (f"{TLS[:-1]}, cert: x}}", "tls_server_config.cert: is not supported", "write cert_file"),
        (f"{TLS[:-1]}, key: x}}", "tls_server_config.key: is not supported", "write key_file"),
        (f"{TLS[:-1]}, client_ca: x}}", "tls_server_config.client_ca: is not supported", "write client_ca_file"),
        (f"{TLS[:-1]}, cipher_suites: [x]}}", "cipher_suites: is not supported: OpenSSL's own", "remove it"),
        (f"{TLS[:-1]}, curve_preferences: [x]}}", "curve_preferences: is not supported", "remove it"),
        (
            f"{TLS[:-1]}, client_auth_type: RequestClientCert, client_ca_file: c}}",
            '"RequestClientCert" takes any certificate, whoever signed it',
            "RequireAndVerifyClientCert",
        ),
        (
            f"{TLS[:-1]}, client_auth_type: RequireAnyClientCert, client_ca_file: c}}",
            '"RequireAnyClientCert" takes any certificate',
            "RequireAndVerifyClientCert",
        ),
        (
            f"{TLS[:-1]}, client_auth_type: requireandverifyclientcert, client_ca_file: c}}",
            "is not one of NoClientCert, ",
            'did you mean "RequireAndVerifyClientCert"?',
        ),
        (
            f"{TLS[:-1]}, client_auth_type: RequireAndVerifyClientCert}}",
            "client_auth_type: nobody is named who signs them",
            "add client_ca_file",
        ),
        (
            f"{TLS[:-1]}, client_ca_file: c}}",
            "client_ca_file: does nothing: no client is asked",
            "add client_auth_type: RequireAndVerifyClientCert",
        ),
        (f"{TLS[:-1]}, client_allowed_sans: [x]}}", "client_allowed_sans: does nothing", "add client_auth_type"),
        (
            f"{TLS[:-1]}, client_auth_type: VerifyClientCertIfGiven, client_ca_file: c, client_allowed_sans: x}}",
            'client_allowed_sans: must be a sequence of texts, not "x"',
            "a dash",
        ),
        (f"{TLS[:-1]}, min_version: TLS10}}", 'min_version: "TLS10" is broken since long', "write TLS12"),
        (f"{TLS[:-1]}, max_version: TLS11}}", 'max_version: "TLS11" is broken since long', "write TLS12"),
        (f"{TLS[:-1]}, min_version: tls13}}", "is not one of TLS12, TLS13", 'did you mean "TLS13"?'),
        (
            f"{TLS[:-1]}, min_version: TLS13, max_version: TLS12}}",
            "max_version: is older than min_version",
            "write TLS13",
        ),
        (f"{TLS[:-1]}, prefer_server_cipher_suites: false}}", "this server's order always counts", "write true"),
        ("http_server_config: {http2: true}", "http2: this server speaks HTTP/1.1 alone", "write false, or remove it"),
        (
            "http_server_config:\n  headers:\n    X-Frame: deny",
            "3: http_server_config.headers.X-Frame: is no header that can be set here",
            "possible here: Content-Security-Policy, ",
        ),
        (
            "http_server_config: {headers: {x-frame-options: deny}}",
            "is no header that can be set here",
            'did you mean "X-Frame-Options"?',
        ),
        (
            "http_server_config: {headers: {X-Frame-Options: allow}}",
            '"allow" is not one of deny, sameorigin',
            "write one of them",
        ),
        (
            'http_server_config: {headers: {Content-Security-Policy: "a\\r\\nSet-Cookie: x"}}',
            "Content-Security-Policy: is not one line of ASCII",
            "one line",
        ),
        ("http_server_config: {headers: []}", "headers: must be a mapping, not a sequence", "NAME: VALUE"),
        (
            "basic_auth_users:\n  alice: test",
            "2: basic_auth_users.alice: is not the bcrypt hash of a",
            "htpasswd -nBC 10",
        ),
        ("basic_auth_users:\n  alice:", "2: basic_auth_users.alice: is not the bcrypt hash", "htpasswd"),
        (f"basic_auth_users:\n  'a:b': {HASH}", "2: basic_auth_users.a:b: is no name of a user", "another name"),
        (f"basic_auth_users:\n  a: {HASH.replace('$10$', '$17$')}", "has 2^17 rounds", "htpasswd"),
        ("basic_auth_users: [alice]", "1: basic_auth_users: must be a mapping, not a sequence", "NAME: VALUE"),
    ],
)
def test_what_is_wrong_or_not_supported_is_refused_by_its_name(text: str, message: str, hint: str) -> None:
    (problem,) = problems_of(text)
    assert message in str(problem)
    assert hint in problem.hint


def test_every_mistake_is_told_at_once_with_its_line() -> None:
    text = (
        "basic_auth_users:\n  a: x\n  b: y\nhttp_server_config:\n  htp2: true\ntls_server_config:\n  min_version: x\n"
    )
    assert [problem.line for problem in problems_of(text)] == [2, 3, 5, 6, 6, 7]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: b: c", "1: is no YAML: mapping values are not allowed here"),
        ("a: [", "is no YAML: while parsing a flow"),
        (b"\xff\xfe\x00", "is no YAML: "),
        (b"a: \x00", "is no YAML: "),
        ("a: 1\n---\nb: 2", "but found another document"),
        ("x: &a [1]\ny: *a", "1: an alias (*) is not supported"),
        (f"basic_auth_users:\n  a: {HASH}\n  a: {HASH}", "3: has the key a twice"),
        ("? [a]\n: b", "1: has a key that is no text"),
        ("x: !!python/object/apply:os.system ['true']", "the tag tag:yaml.org,2002:python/object/apply:os.system is"),
        ("x: !mine y", "1: the tag !mine is not supported"),
        ("[" * 20_000, "is nested too deeply"),
        ("{a: " * 20 + "1" + "}" * 20, "is nested too deeply"),
    ],
)
def test_what_is_no_plain_yaml_is_refused(text: str | bytes, message: str) -> None:
    (problem,) = problems_of(text)
    assert message in str(problem)


def test_a_bomb_of_aliases_is_refused_before_it_goes_off() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30)]
    began = time.monotonic()
    problems_of("\n".join(lines))
    assert time.monotonic() - began < 2


def test_a_file_that_is_too_large_is_not_looked_at() -> None:
    (problem,) = problems_of(b"#" * (1 << 17))
    assert "larger than 64 KiB" in str(problem)


@pytest.mark.parametrize(
    "piece", ["[", "{", "- ", "a: ", "'", '"', "&a ", "*a ", "!!str ", "? ", "|\n", "#", "%YAML 1.1\n---\n"]
)
def test_a_file_full_of_one_sign_is_read_in_no_time(piece: str) -> None:
    began = time.monotonic()
    is_taken_or_refused(piece * (60_000 // len(piece)) + "x")
    assert time.monotonic() - began < 10


@given(st.text(alphabet="[]{}:-?*&!|>'\"%@`# \n\tab1.,", max_size=80) | st.binary(max_size=40))
@settings(max_examples=300)
def test_any_text_is_taken_or_refused(text: str | bytes) -> None:
    is_taken_or_refused(text)


@given(st.integers(0, len(WHOLE)), st.integers(0, 12), st.sampled_from(["", ":", "\n", "- ", "x", "[", "*a", "!", "'"]))
@settings(max_examples=300)
def test_any_change_to_a_real_file_is_taken_or_refused(at: int, drop: int, piece: str) -> None:
    is_taken_or_refused(WHOLE[:at] + piece + WHOLE[at + drop :])


# --- the files that it names


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


def a_place(directory: Path, authority: Authority, text: str) -> Path:
    """A directory with a web configuration file, and a server's certificate and key."""
    authority.issue(directory / "server", "127.0.0.1")
    web = directory / "web.yml"
    web.write_text(text)
    web.chmod(0o640)
    return web


SERVED = "tls_server_config:\n  cert_file: server.crt\n  key_file: server.key\n"


def test_paths_are_relative_to_the_files_directory(tmp_path: Path, authority: Authority) -> None:
    web = a_place(tmp_path, authority, SERVED)
    tls = read_web(str(web)).tls
    assert tls
    assert tls.cert == (tmp_path / "server.crt").read_bytes()
    assert tls.key == (tmp_path / "server.key").read_bytes()
    web.write_text(SERVED.replace("server.key", str(tmp_path / "server.key")))
    assert read_web(str(web)).tls == tls


def refused(web: Path) -> tuple[str, str]:
    with pytest.raises(ConfigError) as caught:
        read_web(str(web))
    assert str(caught.value).startswith(f"{web}")
    return str(caught.value), caught.value.hint


def test_a_key_that_everybody_can_read_is_none(tmp_path: Path, authority: Authority) -> None:
    web = a_place(tmp_path, authority, SERVED)
    (tmp_path / "server.key").chmod(0o644)
    what, hint = refused(web)
    assert f"web.yml:3: tls_server_config.key_file: {tmp_path}/server.key can be read by everybody (mode 0644)" in what
    assert hint == f"chmod o-r {tmp_path}/server.key"
    (tmp_path / "server.key").chmod(0o640)
    assert read_web(str(web)).tls


def test_what_others_can_change_is_believed_in_no_file(tmp_path: Path, authority: Authority) -> None:
    web = a_place(tmp_path, authority, SERVED)
    for name in ("server.crt", "server.key", "web.yml"):
        before = (tmp_path / name).stat().st_mode
        (tmp_path / name).chmod(0o662)
        what, hint = refused(web)
        assert f"{tmp_path}/{name} can be written by others" in what
        assert hint == f"chmod go-w {tmp_path}/{name}"
        (tmp_path / name).chmod(before)


def test_hashes_of_passwords_are_a_secret(tmp_path: Path, authority: Authority) -> None:
    web = a_place(tmp_path, authority, f"basic_auth_users:\n  alice: {HASH}\n")
    web.chmod(0o644)
    assert "can be read by everybody (mode 0644)" in refused(web)[0]
    web.chmod(0o640)
    assert read_web(str(web)).users
    web.write_text(SERVED)
    web.chmod(0o644)
    assert read_web(str(web)).tls, "a file without users is none"


def test_a_file_that_is_not_there_or_no_file_is_told_with_its_line(tmp_path: Path, authority: Authority) -> None:
    web = a_place(tmp_path, authority, SERVED)
    (tmp_path / "server.crt").unlink()
    assert "web.yml:2: tls_server_config.cert_file: " in refused(web)[0]
    assert "No such file" in refused(web)[0]
    subprocess.run(["mkfifo", str(tmp_path / "server.crt")], check=True)
    assert "it is no regular file" in refused(web)[0]
    (tmp_path / "server.crt").unlink()
    (tmp_path / "server.crt").write_bytes(b"#" * (1 << 20))
    assert "is larger than 64 KiB" in refused(web)[0]
    assert "no such file" in refused(tmp_path / "other.yml")[0]


def test_a_certificate_without_its_key_is_refused(tmp_path: Path, authority: Authority) -> None:
    web = a_place(tmp_path, authority, SERVED)
    authority.issue(tmp_path / "other", "127.0.0.1")
    (tmp_path / "server.key").write_bytes((tmp_path / "other.key").read_bytes())
    assert "tls_server_config.key_file: server.crt and server.key are no certificate with its key" in refused(web)[0]
    (tmp_path / "server.key").write_text("nonsense")
    assert "are no certificate with its key" in refused(web)[0]


def test_an_encrypted_key_is_refused_and_nobody_is_asked_for_its_password(tmp_path: Path, authority: Authority) -> None:
    web = a_place(tmp_path, authority, SERVED)
    key, locked = tmp_path / "server.key", tmp_path / "locked"
    openssl = ["openssl", "pkey", "-in", str(key), "-aes256", "-passout", "pass:secret", "-out", str(locked)]
    subprocess.run(openssl, check=True, capture_output=True)
    key.write_bytes(locked.read_bytes())
    assert "the key is encrypted" in refused(web)[0]


def test_an_authority_that_is_none_is_refused(tmp_path: Path, authority: Authority) -> None:
    text = f"{SERVED}  client_auth_type: RequireAndVerifyClientCert\n  client_ca_file: ca.pem\n"
    web = a_place(tmp_path, authority, text)
    for content in ("", "nonsense", "-----BEGIN CERTIFICATE-----\nxx\n-----END CERTIFICATE-----\n"):
        (tmp_path / "ca.pem").write_text(content)
        assert "ca.pem holds no certificate" in refused(web)[0]
    (tmp_path / "ca.pem").write_bytes(authority.certificate.read_bytes())
    tls = read_web(str(web)).tls
    assert tls
    assert tls.client_auth is ClientAuth.REQUIRED


def test_only_who_serves_with_it_reads_it(tmp_path: Path, authority: Authority) -> None:
    web = a_place(tmp_path, authority, SERVED)
    config = tmp_path / "config.toml"
    config.write_text(f'[http]\nweb_config_file = "{web}"\n')
    assert read_config(str(config)).web is None
    assert read_config(str(config), with_web=True).web == read_web(str(web))
    web.write_text("nonsense")
    assert read_config(str(config)).web is None, "a command that serves nobody does its work"
    with pytest.raises(ConfigError, match="must be a mapping"):
        read_config(str(config), with_web=True)


def test_a_reader_that_refuses_a_file_is_heard() -> None:
    def read(name: str, is_secret: bool) -> bytes:  # noqa: FBT001
        raise WrongValueError(f"{name}: {is_secret}", hint="do this")

    with pytest.raises(InvalidConfigError) as caught:
        webfile.load(TLS.encode(), "web.yml", read)
    assert [problem.what for problem in caught.value.problems] == ["a: False", "b: True"]
