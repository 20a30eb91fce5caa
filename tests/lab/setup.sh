#!/bin/sh
# Set up what `make` needs, and nothing that is there already: system packages, .venv, and for "lab" the guest's parts.
set -eu

want=$1
python=${PYTHON:-python3}
missing=

need() { # PACKAGES COMMAND... : the packages are missing when the command fails
    packages=$1
    shift
    "$@" >/dev/null 2>&1 </dev/null || missing="$missing $packages"
}

# A user's PATH has no sbin.
PATH=$PATH:/usr/sbin:/sbin

need "python3 python3-venv" "$python" -c 'import ensurepip, venv'
need python3-dev "$python" -c 'import os, sysconfig; os.stat(sysconfig.get_path("include") + "/Python.h")'
# gcc only recommends the C library's headers.
need "gcc libc6-dev" sh -c 'echo "#include <stdio.h>" | gcc -E -'
need libudev1 sh -c 'ldconfig -p | grep libudev.so.1'
if [ "$want" = lab ]; then
    need qemu-system-x86 command -v qemu-system-x86_64
    need busybox-static command -v busybox
    need e2fsprogs command -v mke2fs
    need dmsetup command -v dmsetup
    need util-linux command -v setpriv
    need openssl command -v openssl
    need curl command -v curl
    # A container has none; the guest starts the daemon's unit with it.
    need systemd command -v systemctl
fi

if [ -n "$missing" ]; then
    install="apt-get install -y --no-install-recommends$missing"
    if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
        echo "Missing system packages. On Debian and Ubuntu:" >&2
        echo "  sudo apt-get update && sudo $install" >&2
        exit 2
    fi
    echo "installing system packages:$missing"
    quiet=
    [ -t 1 ] || quiet=-qq
    apt-get update $quiet
    # shellcheck disable=SC2086
    DEBIAN_FRONTEND=noninteractive apt-get install $quiet -y --no-install-recommends $missing
fi

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "$python is older than 3.11; give a newer one: make PYTHON=python3.12 ..." >&2
    exit 2
}

stamp=.venv/installed-from
if ! cmp -s pyproject.toml "$stamp"; then
    echo "installing Python packages into .venv (one is compiled from source: about two minutes)"
    [ -x .venv/bin/python ] || "$python" -m venv --clear .venv
    # The pip of Debian 12 knows no --group.
    .venv/bin/python -m pip install --quiet --upgrade pip
    .venv/bin/python -m pip install --disable-pip-version-check --group dev --editable .
    cp pyproject.toml "$stamp"
fi

[ "$want" != lab ] || .venv/bin/python -m tests.lab fetch
