"""A fault campaign: thousands of faults in a guest, and after each of them the daemon's promises are asked for.

`python -m tests.lab campaign` on the host, `python -m tests.campaign` in a guest. Every choice comes from the seed, the
kind of fault and the number of the round, so that one round can be repeated alone: `--only KIND --from ROUND --rounds 1`.
"""
