from __future__ import annotations

import json
from itertools import pairwise

from blockffn.experiments.records import thinned_log


def log(count: int) -> list[str]:
    return [json.dumps({"step": step, "loss": 1 / (3 + step), "tls": 80.123456789}) for step in range(count)]


def test_a_short_log_keeps_every_line() -> None:
    assert [json.loads(line)["step"] for line in thinned_log(log(5))] == [0, 1, 2, 3, 4]


def test_a_long_log_is_thinned_evenly_between_its_first_and_last_line() -> None:
    lines = thinned_log(log(1000), most_bytes=2000)
    assert sum(map(len, lines)) <= 2000
    steps = [json.loads(line)["step"] for line in lines]
    assert (steps[0], steps[-1]) == (0, 999)
    gaps = [b - a for a, b in pairwise(steps)]
    assert max(gaps) - min(gaps) <= 1


def test_numbers_are_rounded_to_six_digits() -> None:
    assert json.loads(thinned_log(log(1))[0]) == {"step": 0, "loss": 0.333333, "tls": 80.1235}
