"""From a run folder to `report.html` and `figures/*.png`, read from top to bottom in the order of the page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from blockffn.reporting import figures, page
from blockffn.reporting.run import Evaluation, Run, load_run
from blockffn.reporting.svg import inline_svg, save_png
from blockffn.reporting.tables import difference, format_value

HEADLINE = ("heldout_loss", "perplexity", "tls", "cls8", "reuse_ratio", "tokens_per_second")


def write_report(run: Path, *, twin: Path | None = None, out: Path | None = None, title: str | None = None) -> Path:
    """Write the report of a run and return the path of `report.html`.

    The same files give the same report, to the byte.

    Args:
        run: a run folder; see `blockffn.reporting.run` for its files. What is missing is said in the report.
        twin: a second run folder to compare with, usually the dense control trained on the same tokens.
        out: folder for `report.html` and `figures/`; the run folder itself by default.
        title: heading of the page; the run folder's name by default.
    Raises:
        ValueError: `run` or `twin` is not a run folder, or a file in it is garbled (names file, line and field).
    """
    loaded, other = load_run(run), None if twin is None else load_run(twin)
    folder = Path(run if out is None else out)
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    drawer = _Drawer(folder / "figures")
    notes = [*loaded.notes, *(f"{other.name}: {text}" for text in other.notes)] if other else loaded.notes
    body = [
        *map(page.note, notes),
        _cards(loaded, other),
        _training(loaded, other, drawer),
        "" if loaded.dense else page.template("terms.html"),
        _sample(loaded, drawer),
        *_sparsity(loaded, drawer),
        _loss_terms(loaded, drawer),
        _sources(loaded.evaluation),
        _config(loaded),
        page.footer("Losses are in nats per token. Sparsity is measured on held-out text unless drawn against steps."),
    ]
    text = page.page(title=title or loaded.name, lead=_lead(loaded, other), body=[part for part in body if part])
    path = folder / "report.html"
    path.write_text(text, encoding="utf-8")
    return path


class _Drawer:
    """Saves a figure as PNG and hands back the HTML that shows it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, name: str, figure: Figure, description: str) -> str:
        save_png(figure, self.folder / f"{name}.png")
        return page.figure(inline_svg(figure, name, description))


def _lead(run: Run, twin: Run | None) -> str:
    values, other = run.headline, _other_headline(run, twin)
    parts = []
    if values.get("tls") is not None:
        parts.append(f"Each token leaves {format_value('tls', values['tls'])} of the experts idle")
        if values.get("cls8") is not None:
            parts[0] += f", eight tokens in a row still leave {format_value('cls8', values['cls8'])}"
    if values.get("heldout_loss") is not None:
        sentence = f"the loss on held-out text is {format_value('heldout_loss', values['heldout_loss'])}"
        if other.get("heldout_loss") is not None:
            change = difference("heldout_loss", values["heldout_loss"], other["heldout_loss"])
            sentence += f", {change} against the {_other_name(twin)}"
        parts.append(sentence)
    if not parts:
        return ""
    text = "; ".join(parts) + "."
    text = escape(text[0].upper() + text[1:]).replace(" %", "&nbsp;%")
    return f'<p class="lead">{text}</p>'


def _cards(run: Run, twin: Run | None) -> str:
    values = run.headline
    names = [name for name in HEADLINE if not (run.dense and name in ("tls", "cls8", "reuse_ratio"))]
    if all(values.get(name) is None for name in names if name != "tokens_per_second"):
        return page.missing("evaluation.json", "headline numbers")
    return page.cards(values, _other_headline(run, twin), names, _other_name(twin))


def _other_headline(run: Run, twin: Run | None) -> dict[str, Any]:
    """The numbers of the run beside this one: of `twin`, or the summary's `dense_*`."""
    if twin is not None:
        return twin.headline
    return {key.removeprefix("dense_"): value for key, value in run.headline.items() if key.startswith("dense_")}


def _other_name(twin: Run | None) -> str:
    return "dense twin" if twin is None or twin.dense else twin.name


def _training(run: Run, twin: Run | None, draw: _Drawer) -> str:
    heading = "Loss against steps" if run.dense else "Sparsity rises while the loss falls"
    if not run.metrics:
        return page.section("Loss and sparsity against steps", page.missing("metrics.jsonl", "curves"))
    sparsity = {name.upper(): _column(run.metrics, name) for name in ("tls", "cls8")}
    sparsity = {name: values for name, values in sparsity.items() if any(map(math.isfinite, values))}
    if not (sparsity and _rises(run.metrics)):
        heading = "Loss and sparsity against steps" if sparsity else "Loss against steps"
    twin_rows = twin.metrics if twin is not None else None
    figure = figures.training(
        _column(run.metrics, "step"),
        _column(run.metrics, "language_model_loss"),
        sparsity=sparsity,
        heldout_loss=run.headline.get("heldout_loss"),
        twin=(_column(twin_rows, "step"), _column(twin_rows, "language_model_loss")) if twin_rows else None,
        twin_name=_other_name(twin),
        twin_heldout_loss=_other_headline(run, twin).get("heldout_loss"),
    )
    averaged = figures.chart.averages(run.metrics) or (twin_rows is not None and figures.chart.averages(twin_rows))
    text = "Thin lines are the values of single logged steps, thick lines their running mean." if averaged else ""
    return page.section(heading, draw("training", figure, heading), text=text)


def _rises(rows: Sequence[dict[str, Any]]) -> bool:
    """Whether the heading may say so: from the first to the last quarter, TLS is up and the loss is down."""
    quarter = max(1, len(rows) // 4)

    def change(name: str) -> float:
        values = [value for value in _column(rows, name) if math.isfinite(value)]
        if len(values) < 2:
            return 0.0
        return sum(values[-quarter:]) / len(values[-quarter:]) - sum(values[:quarter]) / len(values[:quarter])

    return change("tls") > 0 > change("language_model_loss")


def _sample(run: Run, draw: _Drawer) -> str:
    heading = "What it writes" if run.dense else "What it writes, and what each token costs"
    if run.sample is None or not run.sample.tokens:
        return page.section(heading, page.missing("sample.json", "generated text"))
    save_png(figures.sample(run.sample.tokens), draw.folder / "sample.png")
    text = "The stronger the background, the more experts the token used. Hover to see how many."
    if run.dense:
        text = "The model is dense: each token uses all of it."
    if run.sample.tokens_per_second is not None:
        text += f" Written at {format_value('tokens_per_second', run.sample.tokens_per_second)} tokens per second."
    return page.section(heading, page.sample_text(run.sample), text=text)


def _sparsity(run: Run, draw: _Drawer) -> list[str]:
    """Windows, layers and experts: the three sections that read the evaluation."""
    found = run.evaluation
    if found is None:
        return [page.section("Sparsity on held-out text", page.missing("evaluation.json", "evaluation"))]
    if found.tls is None:
        text = "The feed-forward network of this run is dense: there is no sparsity to measure."
        return [page.section("Sparsity on held-out text", text=text)]
    sections = []
    if found.cls:
        figure = figures.windows(found.cls, found.tls)
        text = (
            "When tokens are computed together, only an expert that none of them needs can be skipped. If each token "
            "chose its experts without regard to its neighbours, soon none could. The shaded area is what tokens gain "
            "by choosing the same experts."
        )
        drawing = draw("windows", figure, "Share of experts idle for windows of 1 to 64 tokens")
        sections.append(page.section("How much of the sparsity neighbours share", drawing, text=text))
    if found.layers:
        drawing = draw("layers", figures.layers(found.layers), "TLS, CLS8 and reuse ratio of each layer")
        rows: list[dict[str, Any]] = [
            {"layer": i + 1, "tls": row.tls, "cls8": row.cls.get(8), "reuse_ratio": row.reuse_ratio,
             "experts": len(row.expert_use) or None, "dead_experts": row.dead_experts}
            for i, row in enumerate(found.layers)
        ]  # fmt: skip
        numbers = page.table(rows) if len(rows) <= 12 else page.folded("The numbers", page.table(rows))
        sections.append(page.section("Layer by layer", drawing, numbers))
    use = [row.expert_use for row in found.layers]
    if use and all(use):
        drawing = draw("expert_use", figures.expert_use(use), "Share of tokens that use each expert of each layer")
        text = (
            "Each row is a layer, each cell one of its experts, sorted by the share of tokens that use it. An expert "
            "that every token uses, or none (a dead one), cannot specialise."
        )
        sections.append(page.section("Which experts work", drawing, text=text))
    return sections


def _loss_terms(run: Run, draw: _Drawer) -> str:
    rows = run.metrics or []
    names = list(dict.fromkeys(name for row in rows for name in row.get("terms") or {}))
    if not names:
        return ""
    terms = {name: _inner(rows, "terms", name) for name in names}
    coefficients = {name: _inner(rows, "coefficients", name) for name in names}
    coefficients = {name: values for name, values in coefficients.items() if any(map(math.isfinite, values))}
    figure = figures.loss_terms(_column(rows, "step"), terms, coefficients)
    text = "What training adds to the language-model loss: each term on the left times its coefficient on the right."
    return page.section("Loss terms", draw("loss_terms", figure, "Loss terms and their coefficients"), text=text)


def _sources(found: Evaluation | None) -> str:
    if found is None or not found.sources:
        return ""
    rows = [
        {"source": name, "tokens": values["tokens"], "loss": values["loss"], "perplexity": values["perplexity"],
         "bits_per_byte": values["bits_per_byte"], "tls": values["tls"], "cls8": values["cls"].get(8),
         "reuse_ratio": values["reuse_ratio"]}
        for name, values in found.sources.items()
    ]  # fmt: skip
    return page.section("Source by source", page.table(rows))


def _config(run: Run) -> str:
    if run.config is None:
        return page.section("Configuration", page.missing("config.yaml", "configuration"))
    return page.section("Configuration", page.folded("As resolved for this run", f"<pre>{escape(run.config)}</pre>"))


def _column(rows: Sequence[dict[str, Any]], name: str) -> list[float]:
    """The values of a field, NaN where it is absent or null."""
    return [math.nan if row.get(name) is None else float(row[name]) for row in rows]


def _inner(rows: Sequence[dict[str, Any]], group: str, name: str) -> list[float]:
    return _column([row.get(group) or {} for row in rows], name)
