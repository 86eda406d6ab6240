from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest

from blockffn.reporting import Sample, SampleToken, write_report
from blockffn.reporting.page import sample_text
from tests.reporting.conftest import TEXT
from tests.reporting.fake_runs import PROMPT, metrics_row

EVIL = "<script>alert('x')</script>"
VOID = {"meta", "br", "link", "img", "input", "hr"}


class Page(HTMLParser):
    """Collects what the tests ask about; fails on tags that are not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tokens: list[tuple[str, str, str]] = []  # class, tip, text
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        found = dict(attrs)
        self.tags.append((tag, found))
        if tag == "span" and "div.sample" in self.path:
            self.tokens.append((found.get("class") or "", found.get("data-tip") or "", ""))
        if tag == "div":
            self.open[-1] = f"div.{found.get('class') or ''}"

    @property
    def path(self) -> str:
        return " ".join(self.open)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().split(".")[0] == tag

    def handle_data(self, data: str) -> None:
        if "div.sample span" in self.path:
            kind, tip, text = self.tokens[-1]
            self.tokens[-1] = (kind, tip, text + data)
        if self.open and self.open[-1] not in ("style", "script"):
            self.text += " " + data

    @property
    def words(self) -> str:
        return " ".join(self.text.split())


def report(run: Path, **options: object) -> Page:
    return Page(write_report(run, **options).read_text(encoding="utf-8"))  # type: ignore[arg-type]


def test_importing_the_package_imports_no_torch_and_no_other_part() -> None:
    code = (
        "import sys, blockffn.reporting\n"
        "own = ('blockffn', 'blockffn._registration')\n"
        "print([m for m in sys.modules if m.split('.')[0] in ('torch', 'transformers') or\n"
        "       m.startswith('blockffn') and m not in own and not m.startswith('blockffn.reporting')])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_the_report_and_its_figures_are_written(finished: Path) -> None:
    names = {"training", "loss_terms", "windows", "expert_use", "layers", "sample"}
    assert {file.stem for file in (finished / "figures").iterdir()} == names
    for name in names:
        assert (finished / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    page = Page((finished / "report.html").read_text(encoding="utf-8"))
    assert sum(tag == "svg" for tag, _ in page.tags) == len(names) - 1  # the sample is text
    assert "dense twin 2.284 · +1.9 %" in page.words
    evaluation = json.loads((finished / "evaluation.json").read_text())
    assert f"CLS8 {evaluation['cls']['8']:.1f} %" in page.words


def test_the_page_loads_nothing_from_elsewhere(finished: Path) -> None:
    text = (finished / "report.html").read_text(encoding="utf-8")
    loads = [
        found for _, attrs in Page(text).tags for key, found in attrs.items() if key in ("src", "href", "xlink:href")
    ]
    assert [found for found in loads if not str(found).startswith("#")] == []
    assert set(re.findall(r"https?://[^\"' ]+", text)) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert "@import" not in text
    assert re.findall(r"url\((?!#)", text) == []


def test_ids_are_unique_and_references_find_them(finished: Path) -> None:
    text = (finished / "report.html").read_text(encoding="utf-8")
    tags = Page(text).tags
    ids = Counter(attrs["id"] for _, attrs in tags if "id" in attrs)
    assert [name for name, count in ids.items() if count > 1] == []
    used = set(re.findall(r"url\(#([^)]+)\)", text)) | {str(a["xlink:href"])[1:] for _, a in tags if "xlink:href" in a}
    assert used
    assert used <= set(ids)


def test_figures_follow_light_and_dark(finished: Path) -> None:
    text = (finished / "report.html").read_text(encoding="utf-8")
    drawings = "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))
    assert "var(--blue)" in drawings
    assert re.findall(r"(?:fill|stroke): #[0-9a-f]{6}", drawings) == []
    assert set(re.findall(r"font-family: ([^;\"]*)", drawings)) == {"var(--sans)"}
    assert set(re.findall(r"var\(--([a-z0-9-]+)", text)) <= set(re.findall(r"--([a-z0-9-]+):", text))


def test_the_same_files_give_the_same_page(run: Path, tmp_path: Path) -> None:
    first, second = (write_report(run, out=tmp_path / name) for name in ("one", "two"))
    assert first.parent == tmp_path / "one"
    assert first.read_bytes() == second.read_bytes()


def test_the_sample_keeps_every_character_and_says_what_each_token_used(finished: Path) -> None:
    data = json.loads((finished / "sample.json").read_text())
    page = Page((finished / "report.html").read_text(encoding="utf-8"))
    assert "".join(text for _, _, text in page.tokens) == PROMPT + TEXT
    assert len(page.tokens) == len(data["tokens"])
    for (kind, tip, _), token in zip(page.tokens, data["tokens"]):
        assert ("prompt" in kind) != token["generated"]
        assert tip.startswith(f"{token['active_experts']:.1f} of 8 experts")


def test_tokens_that_use_more_experts_get_a_stronger_ground() -> None:
    tokens = [SampleToken("a", True, None, share) for share in (10.0, 14.9, 55.0)]
    page = Page(sample_text(Sample(tokens, None, None)))
    assert [kind.split()[0] for kind, _, _ in page.tokens] == ["h0", "h0", "h8"]


def test_text_from_files_is_never_markup(run: Path) -> None:
    sample = {"tokens": [{"text": EVIL, "generated": True, "active_experts": 1.0, "active_share": 3.0}]}
    (run / "sample.json").write_text(json.dumps(sample))
    (run / "config.yaml").write_text(f"name: {EVIL}\n")
    (run / "summary.json").write_text(json.dumps({"heldout_loss": 2.0, "tokens_per_second": EVIL}))
    evaluation = json.loads((run / "evaluation.json").read_text())
    evaluation["sources"][EVIL] = {"tokens": 1, "loss": 2.0}
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    rows = [metrics_row(step) | {"terms": {EVIL: 1.0}, "coefficients": {EVIL: 1.0}} for step in (1, 2)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = write_report(run, title=EVIL).read_text()
    page = Page(text)
    assert EVIL not in text
    assert sum(tag == "script" for tag, _ in page.tags) == 1
    assert page.tokens[0][2] == EVIL
    assert page.words.count("<script>") >= 6  # title, heading, card, sample, source, configuration: shown as text


@pytest.mark.parametrize(
    ("file", "command"),
    [
        ("config.yaml", "blockffn train"),
        ("metrics.jsonl", "blockffn train"),
        ("evaluation.json", "blockffn evaluate RUN"),
        ("sample.json", "blockffn generate RUN --json RUN/sample.json"),
    ],
)
def test_a_missing_file_is_named_with_the_command_that_writes_it(run: Path, file: str, command: str) -> None:
    (run / file).unlink()
    words = report(run).words
    assert f"{file} is missing from the run folder. {command} writes it." in words
    assert words.count("is missing from the run folder") == 1


def test_a_folder_with_only_a_configuration_still_gives_a_page(run: Path) -> None:
    for name in ("metrics.jsonl", "evaluation.json", "sample.json", "summary.json"):
        (run / name).unlink()
    words = report(run).words
    assert words.count("is missing from the run folder") == 4
    assert "hidden_size: 192" in words


def test_the_page_of_a_dense_run_shows_no_sparsity(dense_run: Path) -> None:
    words = report(dense_run).words
    assert "there is no sparsity to measure" in words
    assert "CLS8" not in words
    assert "Loss against steps" in words


def test_the_heading_claims_rising_sparsity_only_where_it_rises(finished: Path, run: Path) -> None:
    claim = "Sparsity rises while the loss falls"
    assert claim in Page((finished / "report.html").read_text(encoding="utf-8")).words
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        row["tls"] = 100 - row["tls"]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert claim not in report(run).words


def test_the_twins_number_in_the_summary_serves_where_no_twin_folder_is_given(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text()) | {"dense_heldout_loss": 2.0}
    (run / "summary.json").write_text(json.dumps(summary))
    (run / "evaluation.json").unlink()
    assert "dense twin 2.000 · +16.3 %" in report(run).words


def test_a_sparse_run_can_be_compared_with_another_by_name(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "ablation"
    other.mkdir()
    (other / "summary.json").write_text(json.dumps({"heldout_loss": 2.0, "tls": 70.0}))
    (run / "metrics.jsonl").unlink()
    words = report(run, twin=other).words
    assert re.search(r"ablation 70\.0 % · [+−]\d+\.\d points", words)
    assert "against the ablation" in words


def test_what_happened_to_the_log_is_said_on_the_page(run: Path, dense_run: Path) -> None:
    for folder in (run, dense_run):
        with (folder / "metrics.jsonl").open("a") as file:
            file.write('{"step": 41')
    words = report(run, twin=dense_run).words
    assert words.count("is cut off and was skipped") == 2
    assert "dense: The last line" in words


def test_a_diverged_run_still_gives_a_page(run: Path) -> None:
    rows = [metrics_row(step) | {"language_model_loss": float("nan"), "tls": float("nan")} for step in (10, 20, 30)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "summary.json").write_text(json.dumps({"heldout_loss": float("nan"), "perplexity": float("inf")}))
    words = report(run).words
    assert "Perplexity ∞" in words
    assert "Held-out loss –" in words


def test_a_card_is_shown_for_what_is_known_and_speed_comes_from_the_log(run: Path) -> None:
    (run / "summary.json").unlink()
    page = report(run)
    assert "Training tokens/s 21,000" in page.words
    assert "–" not in page.words.split("Sparsity rises")[0]
    rows = (run / "metrics.jsonl").read_text().replace('"tokens_per_second": 21000.0, ', "")
    (run / "metrics.jsonl").write_text(rows)
    assert "tokens/s" not in report(run).words
