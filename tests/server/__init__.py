"""A real ublk server for the tests, on the project's own ring: it serves, dies on cue, and a second one can take over.

`python -m tests.server add --target ram --size 16 --die-at after-fetch`; tests start it through harness.ServerProcess.
"""
