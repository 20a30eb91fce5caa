"""These tests make and break block devices: they run in a guest, and on no host, whatever driver it has."""

import os

collect_ignore_glob = [] if os.environ.get("DUENDE_IN_GUEST") == "1" else ["*"]
