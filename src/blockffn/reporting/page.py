"""The parts of the HTML page: plain values in, strings of HTML out. Every text that comes from a file is escaped."""

from __future__ import annotations

import functools
import string
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from typing import Any

from blockffn.reporting.figures import share_range
from blockffn.reporting.palette import DARK, LIGHT, STEPS, css_variables, even_bounds, step_of
from blockffn.reporting.run import Sample, SampleToken
from blockffn.reporting.tables import difference, format_value, label

# The command that writes each file that a section of the page needs.
MADE_BY = {
    "config.yaml": "blockffn train",
    "metrics.jsonl": "blockffn train",
    "evaluation.json": "blockffn evaluate RUN",
    "sample.json": "blockffn generate RUN --json RUN/sample.json",
}


@functools.cache
def template(name: str) -> str:
    """The text of a file in `templates/`."""
    return (resources.files("blockffn.reporting") / "templates" / name).read_text(encoding="utf-8")


def page(*, title: str, lead: str, body: Sequence[str]) -> str:
    """The whole document. `lead` and `body` are HTML, `title` is text."""
    heat = "\n".join(f".h{i} {{ --heat: var(--heat-{i}); }}" for i in range(STEPS))
    return string.Template(template("report.html")).substitute(
        title=escape(title),
        light=css_variables(LIGHT),
        dark=css_variables(DARK),
        style=f"{heat}\n{template('report.css')}",
        script=template("report.js"),
        lead=lead,
        body="\n".join(body),
    )


def section(heading: str, *parts: str, text: str = "") -> str:
    """A titled block; `text` is a plain sentence or two under the heading."""
    intro = f"<p>{escape(text)}</p>" if text else ""
    return "\n".join(["<section>", f"<h2>{escape(heading)}</h2>", intro, *parts, "</section>"])


def figure(svg: str) -> str:
    """A figure that scrolls sideways where the screen is narrow."""
    return f'<figure class="wide">{svg}</figure>'


def missing(file: str, what: str) -> str:
    """Says that `file` is not in the run folder, what it would show, and which command writes it."""
    return (
        f'<p class="missing">No {escape(what)} here: <code>{escape(file)}</code> is missing from the run folder. '
        f"<code>{escape(MADE_BY[file])}</code> writes it.</p>"
    )


def note(text: str) -> str:
    """A remark that the reader should not miss."""
    return f'<p class="note">{escape(text)}</p>'


def footer(text: str) -> str:
    """A remark at the end of the page."""
    return f"<footer>{escape(text)}</footer>"


def cards(values: Mapping[str, Any], other: Mapping[str, Any], names: Sequence[str], other_name: str) -> str:
    """A card for each quantity that is known, with the value of `other` and the difference where `other` has it."""
    found = []
    for name in names:
        if values.get(name) is None and other.get(name) is None:
            continue
        beside = ""
        if other.get(name) is not None and values.get(name) is not None:
            change = difference(name, values[name], other[name])
            beside = f"{other_name} {format_value(name, other[name])} · {change}".replace(" %", "\u00a0%")
        found.append(
            f'<div class="card"><div class="name">{escape(label(name))}</div>'
            f'<div class="value">{escape(format_value(name, values.get(name)))}</div>'
            + (f'<div class="beside">{escape(beside)}</div>' if other else "")
            + "</div>"
        )
    return f'<div class="cards">{"".join(found)}</div>'


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a table; columns are the keys of the first row that hold a value in some row, formatted by name."""
    names = [name for name in rows[0] if any(row.get(name) is not None for row in rows)]
    head = "".join(f"<th>{escape(label(name))}</th>" for name in names)
    lines = ["".join(f"<td>{escape(format_value(name, row.get(name)))}</td>" for name in names) for row in rows]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def folded(heading: str, part: str) -> str:
    """HTML that opens on a click."""
    return f"<details><summary>{escape(heading)}</summary>{part}</details>"


def sample_text(sample: Sample) -> str:
    """The prompt and what followed, each token on a ground that shows its share of experts; whitespace is kept."""
    low, high = share_range(sample.tokens)
    bounds = even_bounds(low, high)
    spans = "".join(_token(token, sample.num_experts, bounds) for token in sample.tokens)
    text = f'<div class="sample">{spans}</div>'
    if all(token.active_share is None for token in sample.tokens):
        return text
    ends = [_amount(low, sample.num_experts), _amount(high, sample.num_experts)]
    ends[1] += "" if sample.num_experts is None else f" of {sample.num_experts} experts"
    swatches = "".join(f'<span class="h{i}"></span>' for i in range(STEPS))
    return (
        f'{text}<div class="scale"><span>{ends[0]}</span><span class="steps">{swatches}</span><span>{ends[1]}</span>'
        '<span class="apart">the prompt</span></div>'
    )


def _token(token: SampleToken, num_experts: int | None, bounds: Sequence[float]) -> str:
    classes = [] if token.generated else ["prompt"]
    tip = ""
    if token.active_share is not None:
        classes += [f"h{step_of(token.active_share, bounds)}", "tip"]
        count = "" if token.active_experts is None else f"{token.active_experts:.1f}"
        of = f" of {num_experts}" if num_experts is not None else ""
        tip = f"{count}{of} experts, mean over layers\n" if count else ""
        tip += f"{format_value('active_share', token.active_share)} of the experts"
        tip = f' data-tip="{escape(tip)}"'
    text = escape(token.text).replace("\n", "<i></i>\n")
    return f'<span class="{" ".join(classes)}"{tip}>{text}</span>'


def _amount(share: float, num_experts: int | None) -> str:
    return format_value("active_share", share) if num_experts is None else f"{share / 100 * num_experts:.1f}"
