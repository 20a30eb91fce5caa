import os, signal, subprocess, sys, time, json, urllib.request
from tests.server.harness import *


def cli(*a):
    t = time.monotonic()
    r = subprocess.run([sys.executable, "-m", "duende_ublkd", *a], capture_output=True, text=True)
    print("$", *a, "->", r.returncode, f"{time.monotonic() - t:.1f}s")
    print(r.stdout, r.stderr, flush=True)


cli("list")
with ServerProcess.start(target="ram", size=8, queues=1, depth=8) as s:
    s.wait_for("after-start", timeout=30)
    cli("list")
    cli("explain", "0")
    cli("clean")
    s.kill()
    t0 = time.monotonic()
    cli("list")
    cli("list", "--json")
    cli("clean", "--dry-run")
    cli("clean", "--now", "0")
    cli("list")
d = subprocess.Popen([sys.executable, "-m", "duende_ublkd", "run"])
with ServerProcess.start(target="ram", size=8, queues=1, depth=8) as s:
    s.wait_for("after-start", timeout=30)
    time.sleep(2)
    s.kill()
    t0 = time.monotonic()
    wait_until(lambda: device_info(0) is None, 10)
    print("free after", time.monotonic() - t0)
print(urllib.request.urlopen("http://127.0.0.1:10116/metrics").read().decode())
print(open(f"/proc/{d.pid}/status").read().split("VmRSS")[1][:30])
cli("run")
d.send_signal(signal.SIGTERM)
print("daemon exit", d.wait())
