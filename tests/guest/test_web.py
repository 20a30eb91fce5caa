"""The daemon's TCP port behind TLS and a password, and both renewed while it runs."""

import base64
import signal
import ssl
import urllib.error
import urllib.request
from pathlib import Path

from duende_ublkd.client import DaemonClient, socket_path
from tests.daemon_process import DaemonProcess
from tests.server.harness import wait_until

PORT = 10120
WEB = """
tls_server_config:
  cert_file: server.crt
  key_file: server.key
basic_auth_users:
  prometheus: $2b$04$z9I299XbozTmQIWnDLVKju6vEJnbtd432ouUHK/KzALLrqY7snitu
"""  # the password is `right`
# For 127.0.0.1, made for these tests and known to everybody.
FIRST = """\
-----BEGIN CERTIFICATE-----
MIIBhTCCASqgAwIBAgIUMPVsCkOjQCG+ra0gamfbhXpks/0wCgYIKoZIzj0EAwIw
DjEMMAoGA1UEAwwDb25lMCAXDTI2MTEyMzAzNTQ0NloYDzIxMjYxMDMwMDM1NDQ2
WjAOMQwwCgYDVQQDDANvbmUwWTATBgcqhkjOPQIBBggqhkjOPQMBBwNCAAQcGxf1
uIXlwPUDnOy8+LKZcm2rA6wIleaU3H8loyD92YTbmOS01Qhrq7DMVqwOYoOX1R9e
LmzbZNry2/kYD3pSo2QwYjAdBgNVHQ4EFgQUmlJQ2OVcVru1pm8VKvf4ANcSHXQw
HwYDVR0jBBgwFoAUmlJQ2OVcVru1pm8VKvf4ANcSHXQwDwYDVR0TAQH/BAUwAwEB
/zAPBgNVHREECDAGhwR/AAABMAoGCCqGSM49BAMCA0kAMEYCIQCpagzSek7+2w65
FurLm1pL/z9s/OMK9mrb1jRRt/FmqAIhAM9DGOuE9F7M8M/D1yqOKoggPwrtiUYB
1k9aLvXwTKiP
-----END CERTIFICATE-----
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgYk6jKrnJiH7dqP76
dmpOYc3LgZDlc5pT/flS3FL8LPKhRANCAAQcGxf1uIXlwPUDnOy8+LKZcm2rA6wI
leaU3H8loyD92YTbmOS01Qhrq7DMVqwOYoOX1R9eLmzbZNry2/kYD3pS
-----END PRIVATE KEY-----
"""
SECOND = """\
-----BEGIN CERTIFICATE-----
MIIBgzCCASqgAwIBAgIUBwjUX/6IIYaYdABLfleIaoZVI7gwCgYIKoZIzj0EAwIw
DjEMMAoGA1UEAwwDdHdvMCAXDTI2MTEyMzAzNTQ0NloYDzIxMjYxMDMwMDM1NDQ2
WjAOMQwwCgYDVQQDDAN0d28wWTATBgcqhkjOPQIBBggqhkjOPQMBBwNCAARIWD3s
RGERu+l0zdqUf4uxDgE0Ced0VT+yYijsMoIxu1L6w+n323WwKgCkmWz5J4mlMKKR
IU2iKNuuBIKkUfyfo2QwYjAdBgNVHQ4EFgQUdVhbGBq+BId2SNKI6U0UKZvwNMEw
HwYDVR0jBBgwFoAUdVhbGBq+BId2SNKI6U0UKZvwNMEwDwYDVR0TAQH/BAUwAwEB
/zAPBgNVHREECDAGhwR/AAABMAoGCCqGSM49BAMCA0cAMEQCIC6MlgeYL0tz7UEC
eQSdfpOd+FPAqQQ7ZUx8EBvt6NZHAiB73O8WPubwLK07DH6L1MiCOhHF9eFVJsmh
KXRgw8ykyg==
-----END CERTIFICATE-----
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgsIk0g9K2xuuMQEyf
BuNA4KObS33V25/BQJH7kWyEE/uhRANCAARIWD3sRGERu+l0zdqUf4uxDgE0Ced0
VT+yYijsMoIxu1L6w+n323WwKgCkmWz5J4mlMKKRIU2iKNuuBIKkUfyf
-----END PRIVATE KEY-----
"""


def put(directory: Path, pem: str) -> str:
    """The certificate and its key, for the web file; returns the certificate."""
    certificate, _, key = pem.partition("-----BEGIN PRIVATE KEY-----")
    (directory / "server.crt").write_text(certificate)
    place = directory / "server.key"
    place.touch(mode=0o600)
    place.write_text(f"-----BEGIN PRIVATE KEY-----{key}")
    return certificate


def shown() -> str:
    return ssl.get_server_certificate(("127.0.0.1", PORT), timeout=30)


def status(certificate: str, password: str) -> int:
    """What the port answers, to a client that trusts this certificate alone."""
    context = ssl.create_default_context(cadata=certificate)
    request = urllib.request.Request(f"https://127.0.0.1:{PORT}/metrics")
    request.add_header("Authorization", f"Basic {base64.b64encode(f'prometheus:{password}'.encode()).decode()}")
    try:
        with urllib.request.urlopen(request, timeout=60, context=context) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_the_port_is_behind_tls_and_a_password_and_both_are_renewed_without_a_restart(tmp_path: Path) -> None:
    web = tmp_path / "web.yml"
    web.write_text(WEB)
    web.chmod(0o600)
    first = put(tmp_path, FIRST)
    config = f'[http]\nlisten = "127.0.0.1:{PORT}"\nweb_config_file = "{web}"\n[daemon]\n'
    with DaemonProcess(config, port=PORT) as daemon:
        assert [status(first, password) for password in ("right", "wrong")] == [200, 401]
        second = put(tmp_path, SECOND)
        daemon.process.send_signal(signal.SIGHUP)
        wait_until(lambda: shown().strip() == second.strip(), 60, "the new certificate is shown")
        assert status(second, "right") == 200
        web.write_text("tls_sever_config: {}\n")
        daemon.process.send_signal(signal.SIGHUP)
        daemon.wait_log(r"the old configuration stays: .*web\.yml.*tls_sever_config", 60)
        assert [status(second, password) for password in ("right", "wrong")] == [200, 401]
        assert DaemonClient(socket_path()).get("/api/v1/devices") == []
        assert daemon.stop() == 0
