"""Suites of runs and the page of their results: `experiments/*.py` hold the lists, this package does the work.

`suite` describes a run, `stages` says what is left of it, `schedule` runs that on the devices, `records` keeps what
came out, and `page` writes `docs/results.md` from the records alone. `page` and what it calls import no torch.
"""
