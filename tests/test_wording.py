"""Numbers and their nouns."""

from __future__ import annotations

from tqdm import tqdm

from blockffn.wording import BATCHES_COUNT, BYTES_BAR, BYTES_COUNT, counted, counting_bar


def test_one_is_singular_and_large_numbers_have_separators() -> None:
    assert [counted(number, "token") for number in (0, 1, 2, 12345)] == [
        "0 tokens",
        "1 token",
        "2 tokens",
        "12,345 tokens",
    ]


def test_bars_say_what_they_count_and_fit_80_columns() -> None:
    def line(form: str, done: int, total: int | None, name: str) -> str:
        scale = "B" in form.split("{desc}")[1].split(",")[0]
        return tqdm.format_meter(done, total, 10.0, ncols=80, prefix=name, unit="B" if scale else "it",
                                 unit_scale=scale, bar_format=form)  # fmt: skip

    assert line(BATCHES_COUNT, 1, None, "held-out text") == "held-out text: batch 1, 00:10"
    assert line(BYTES_COUNT, 5_700_000, None, "reading") == "reading 5.70MB, 570kB/s, 00:10"
    found = line(BYTES_BAR, 5_700_000, 123_400_000, "tokenising")
    assert found.startswith("tokenising   5% |")
    assert found.endswith("| 5.70MB of 123MB, 570kB/s, 03:26 left")
    layers = line(counting_bar("layers"), 1, 30, "making experts")
    assert layers.endswith("| 1 of 30 layers, 04:50 left")
    assert max(map(len, (found, layers))) <= 80
