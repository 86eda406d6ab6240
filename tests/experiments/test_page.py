"""The results page, from records with made-up numbers."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import ablation
import pytest
import quality

from blockffn.experiments.page import Page, make_page, stale, write_page
from tests.experiments.fake_records import write_failed_record, write_fake_record

ROOT = Path(__file__).parents[2]
README = "before\n<!-- results -->\nold\n<!-- end -->\nafter\n<!-- end -->\n"


def page_of(folder: Path) -> Page:
    return make_page(
        folder / "records", quality.experiments(), ablation.experiments(), out=folder / "docs" / "results.md",
        images=folder / "docs" / "images",
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records of three methods, two settings and a finer model; one run has failed, the rest are missing."""
    folder = tmp_path_factory.mktemp("results")
    for e in [*quality.experiments(), *ablation.experiments()]:
        wanted = e.method in ("dense", "topk") or e.name in ("mini-cs", "mini-none", "mini-experts-96")
        wanted |= e.method == "blockffn" and (e.suite == "quality" or e.name == "mini-standard")
        exists = (folder / "records" / e.suite / e.name).exists()
        if wanted and not exists:
            write_fake_record(folder / "records", e, steps=200)
        elif e.name == "mini-grin-seed1":
            write_failed_record(folder / "records", e, "the loss is nan at step 3")
    (folder / "README.md").write_text(README)
    write_page(
        page_of(folder), out=folder / "docs" / "results.md", images=folder / "docs" / "images",
        readme=folder / "README.md",
    )  # fmt: skip
    return folder


def row(text: str, first: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.startswith(f"| {first} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_method_is_a_row_of_means_with_spread(folder: Path) -> None:
    text = (folder / "docs" / "results.md").read_text()
    found = [json.loads((folder / "records" / "quality" / f"mini-topk-seed{s}" / "evaluation.json").read_text())
             ["perplexity"] for s in (1, 2)]  # fmt: skip
    heading, topk = row(text, "Method"), row(text, "TopK")
    assert topk[heading.index("Perplexity")] == f"{sum(found) / 2:.2f} ± {abs(found[0] - found[1]) / 2:.2f}"
    assert topk[heading.index("CLS8")] == "48.0 ± 0.0 %"
    assert topk[heading.index("Against dense")].startswith("+9.")
    assert row(text, "dense")[heading.index("TLS")] == "–"


def test_every_link_and_picture_exists(folder: Path) -> None:
    text = (folder / "docs" / "results.md").read_text()
    targets = re.findall(r"\]\(([^)]+)\)", text)
    assert len(targets) > 20
    assert [t for t in targets if not (folder / "docs" / t).is_file()] == []


def test_what_failed_and_what_is_missing_is_said(folder: Path) -> None:
    text = (folder / "docs" / "results.md").read_text()
    assert "Failed: mini-grin-seed1 (the loss is nan at step 3)." in text
    assert re.search(r"Missing: .*mini-remoe-seed1", text)
    assert row(text, "GRIN")[-1] == "seed 1: failed; seed 2: missing"


def test_the_ablation_has_the_ratio_of_the_sparsities(folder: Path) -> None:
    text = (folder / "docs" / "results.md").read_text()
    heading = row(text, "Setting")
    assert row(text, "CS")[heading.index("CLS8/TLS")] == f"{67.6 / 81.7:.3f}"


def test_claims_are_judged(folder: Path) -> None:
    text = (folder / "docs" / "results.md").read_text()
    assert row(text, "CLS8 of at least 70 %")[1:] == ["72.0 ± 0.0 %", "yes"]
    assert row(text, "Perplexity no worse than the best sparse baseline's (TopK)")[-1] == "yes"


def test_the_readme_quotes_the_headline_and_nothing_else_changes(folder: Path) -> None:
    text = (folder / "README.md").read_text()
    assert text.startswith("before\n<!-- results -->\nBlockFFN (`mini`")
    assert text.endswith("<!-- end -->\nafter\n<!-- end -->\n")
    assert "[All results, with settings and logs](docs/results.md)" in text
    quote = " ".join(text.split("-->\n")[1].split("[All")[0].split())
    assert quote == page_of(folder).headline


def test_a_page_that_agrees_is_not_stale_and_an_edited_one_is(folder: Path) -> None:
    places = {"out": folder / "docs" / "results.md", "images": folder / "docs" / "images"}
    assert stale(page_of(folder), **places, readme=folder / "README.md") == []
    text = places["out"].read_text()
    places["out"].write_text(text.replace("yes", "of course"))
    try:
        assert "results.md is not what the records say" in stale(page_of(folder), **places, readme=None)[0]
    finally:
        places["out"].write_text(text)


def test_records_that_no_list_names_are_linked(folder: Path) -> None:
    extra = quality.experiments("nano")[0]
    path = write_fake_record(folder / "records", extra, steps=60)
    text = page_of(folder).text
    assert f"[{extra.name}](../records/quality/{extra.name}/record.json)" in text
    for file in path.iterdir():
        file.unlink()
    path.rmdir()


def test_evidence_of_a_record_is_shown_with_its_plots_and_others_are_named(folder: Path) -> None:
    page = page_of(folder)
    assert "## Evidence of the routing\n\nNot recorded yet" in page.text
    fit = {"means": [10.0, 30.0], "deviations": [2.0, 3.0], "shares": [0.5, 0.5], "modes": 2, "bic_gain": 5.0,
           "bimodal": True}  # fmt: skip
    layer = {"tls": 81.0, "cls8": 70.0, "reuse_ratio": 88.25, "expert_use": [20.0] * 4, "dead_experts": 0,
             "load_variation": 0.5, "load_max_over_mean": 2.0, "input_norm": 3.0, "weight_norm": 1.0}  # fmt: skip
    findings = {
        "tokens": 4096, "loss": 4.0, "tls": 81.0, "cls8": 70.0, "reuse_ratio": 88.25, "cls": {"8": 70.0, "64": 33.0},
        "layers": [{"layer": n, "output_norm": 2.0**n, **layer} for n in (1, 2, 3)],
        "windows": [{"window": w, "cls": 81.0 - w, "same_tls": 20.0, "same_use": 25.0} for w in (1, 8, 64)],
        "classes": [{"class": name, "items": 5, "tokens": 9, "active_share": share} for name, share in
                    (("digit", 11.0), ("word", 22.0))],
        "vocabulary": {"items": 40, "min_occurrences": 10, "edges": [0.0, 20.0, 40.0], "counts": [20, 20], "fit": fit},
        "draft_trees": None,
    }  # fmt: skip
    path = folder / "records" / "quality" / "mini-blockffn-seed1" / "evidence.json"
    path.write_text(json.dumps(findings))
    try:
        page = page_of(folder)
    finally:
        path.unlink()
    heading, found = row(page.text, "Run"), row(page.text, "mini-blockffn-seed1")
    assert found[heading.index("Growth")] == "4.00"
    assert found[heading.index("Peaks")] == "2 (10.0 %, 30.0 %)"
    assert re.search(r"Recorded without evidence: .*mini-topk-seed1", page.text)
    assert "mini-dense-seed1" not in re.findall("Recorded without evidence: .*", page.text)[0]
    assert "### Reuse and sparsity by layer" in page.text
    for image in re.findall(r"\(images/(results-evidence-[^)]+)\)", page.text):
        assert image in page.plots
    assert "results-evidence-experts-by-vocabulary-item.png" in page.plots


def test_every_group_of_the_ablation_is_there_and_names_what_has_not_run(folder: Path) -> None:
    text = page_of(folder).text
    for group in ("Objectives", "Router norm and gated experts", "Granularity", "Load balancing and dead experts"):
        assert f"### {group}\n" in text
    assert "**Not run: norm with the published epsilon; router without norm; gated experts, width 43.**" in text
    assert row(text, "router without norm")[-1] == "missing"


def test_a_readme_without_markers_is_an_error(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("nothing")
    with pytest.raises(ValueError, match="results -->"):
        write_page(page_of(folder), out=tmp_path / "r.md", images=tmp_path, readme=tmp_path / "README.md")


def test_the_page_in_the_repository_is_what_the_records_say() -> None:
    command = [sys.executable, str(ROOT / "experiments" / "results.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
