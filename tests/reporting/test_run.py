from __future__ import annotations

import json
from pathlib import Path

import pytest

from blockffn.reporting import load_run
from tests.reporting.fake_runs import metrics_row


def log_of(folder: Path, *lines: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    return folder


def row(step: int, loss: float = 3.0) -> str:
    return json.dumps(metrics_row(step) | {"language_model_loss": loss})


def test_a_whole_folder_is_read(run: Path) -> None:
    loaded = load_run(run)
    assert loaded.name == "run"
    assert [one["step"] for one in loaded.metrics or []] == list(range(10, 61, 10))
    assert loaded.evaluation is not None
    assert sorted(loaded.evaluation.cls) == [1, 2, 4, 8, 16, 32, 64]
    assert [len(layer.expert_use) for layer in loaded.evaluation.layers] == [8] * 2
    assert loaded.sample is not None
    assert "".join(t.text for t in loaded.sample.tokens if not t.generated) == "def read_lines(path):\n"
    assert loaded.notes == ()
    assert not loaded.dense


def test_a_dense_run_is_recognised(dense_run: Path) -> None:
    assert load_run(dense_run).dense


def test_a_run_that_only_has_a_configuration_is_not_called_dense(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("preset: nano\n")
    assert not load_run(tmp_path).dense


def test_the_evaluation_fills_what_the_summary_lacks(run: Path) -> None:
    (run / "summary.json").write_text(json.dumps({"heldout_loss": 9.0, "perplexity": None}))
    headline = load_run(run).headline
    assert headline["heldout_loss"] == 9.0
    assert headline["perplexity"] == pytest.approx(10.247, abs=1e-3)
    assert headline["cls8"] == load_run(run).evaluation.cls[8]  # type: ignore[union-attr]


def test_a_cut_off_last_line_is_skipped_with_a_note(tmp_path: Path) -> None:
    loaded = load_run(log_of(tmp_path, row(10), row(20), row(30)[:40]))
    assert [one["step"] for one in loaded.metrics or []] == [10, 20]
    assert len(loaded.notes) == 1
    assert "line 3" in loaded.notes[0]


def test_a_last_line_without_newline_but_whole_is_kept(tmp_path: Path) -> None:
    loaded = load_run(log_of(tmp_path, row(10), row(20)))
    assert [one["step"] for one in loaded.metrics or []] == [10, 20]
    assert loaded.notes == ()


@pytest.mark.parametrize(
    ("garbled", "message"),
    [
        ("not json", "not JSON"),
        ("[1, 2]", "expected a JSON object"),
        ('{"step": 20}', "'language_model_loss' is missing"),
        ('{"language_model_loss": 2.0}', "'step' is missing"),
        ('{"step": 20, "language_model_loss": "low"}', "language_model_loss must be a number or null, got 'low'"),
        ('{"step": 20, "language_model_loss": 2, "terms": {"a": "x"}}', "terms: a must be a number"),
    ],
)
def test_a_garbled_line_is_an_error_with_file_and_line(tmp_path: Path, garbled: str, message: str) -> None:
    log_of(tmp_path, row(10), garbled, row(30), "")
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: ") as caught:
        load_run(tmp_path)
    assert message in str(caught.value)


def test_a_garbled_last_line_that_was_not_cut_off_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: not JSON"):
        load_run(log_of(tmp_path, row(10), "garbage", ""))


def test_a_resumed_run_keeps_the_later_values_of_repeated_steps(tmp_path: Path) -> None:
    loaded = load_run(log_of(tmp_path, row(10, 4.0), row(20, 3.0), row(30, 2.9), row(20, 2.5), row(30, 2.4), ""))
    assert [(one["step"], one["language_model_loss"]) for one in loaded.metrics or []] == [
        (10, 4.0),
        (20, 2.5),
        (30, 2.4),
    ]
    assert "step 20" in loaded.notes[0]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("evaluation.json", '{"tls": 70', "evaluation.json: not JSON"),
        ("evaluation.json", "[]", "evaluation.json: expected a JSON object"),
        ("evaluation.json", '{"tls": "high"}', "tls must be a number or null, got 'high'"),
        ("evaluation.json", '{"cls": {"eight": 50}}', "keys of cls must be window lengths"),
        ("evaluation.json", '{"layers": [{"tls": 1}, 5]}', r"layers\[1\]: expected an object"),
        ("evaluation.json", '{"layers": [{"expert_use": ["a"]}]}', "expert_use must be a list of percentages"),
        ("evaluation.json", '{"sources": {"wiki": 3}}', "wiki must be an object"),
        ("sample.json", '{"tokens": [{"generated": true}]}', r"tokens\[0\] must be an object with a text"),
        ("summary.json", "nothing", "summary.json: not JSON"),
    ],
)
def test_a_garbled_file_is_an_error_that_names_it(run: Path, file: str, content: str, message: str) -> None:
    (run / file).write_text(content)
    with pytest.raises(ValueError, match=message):
        load_run(run)


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no run folder at .*absent"):
        load_run(tmp_path / "absent")


def test_a_folder_without_any_of_the_files_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a run folder"):
        load_run(tmp_path)


def test_a_log_that_ends_before_the_planned_steps_is_remarked(tmp_path: Path) -> None:
    folder = log_of(tmp_path / "run", row(10), row(73))
    (folder / "config.yaml").write_text("size: nano\nsteps: 900\n")
    assert load_run(folder).notes == ("Training is logged up to step 73 of 900 that were planned.",)
    (folder / "config.yaml").write_text("size: nano\nsteps: 73\n")
    assert load_run(folder).notes == ()
