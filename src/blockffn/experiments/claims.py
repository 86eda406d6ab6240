"""The headline of the results, and whether each thing that is claimed of the method held."""

from __future__ import annotations

from collections.abc import Sequence

from blockffn.experiments.results import Mean, Result, by_method, done, mean
from blockffn.experiments.tables import number, percent, table


def headline(results: Sequence[Result]) -> str:
    """What came out, in two sentences: for the top of the page and for the README."""
    groups = {method: done(runs) for method, runs in by_method(results).items()}
    size = results[0].experiment.size
    runs = groups.get("blockffn", [])
    ours = mean(runs, "perplexity")
    if ours is None:
        return (
            f"The comparison with the baselines at `{size}` size is not recorded yet; "
            "`python experiments/quality.py` makes it."
        )
    seeds = f"{ours.count} seeds" if ours.count > 1 else "one seed"
    text = (
        f"BlockFFN (`{size}`, {runs[0].record['tokens'] / 1e6:,.3g} M tokens, {seeds}) reaches a held-out perplexity "
        f"of {number(ours, 'perplexity')} while a token leaves {number(mean(runs, 'tls'), 'tls')} of the experts idle "
        f"and eight tokens in a row {number(mean(runs, 'cls8'), 'cls8')}."
    )
    others = []
    dense = mean(groups.get("dense", []), "perplexity")
    if dense is not None:
        others.append(f"the dense model reaches {number(dense, 'perplexity')} (BlockFFN: {_against(ours, dense)})")
    best = best_baseline(results)
    if best is not None:
        label, perplexity, cls8 = best
        others.append(
            f"the best other sparse one, {label}, {number(perplexity, 'perplexity')} "
            f"(BlockFFN: {_against(ours, perplexity)}), with {number(cls8, 'cls8')} idle for eight tokens"
        )
    if others:
        text += f" On the same tokens, {'; '.join(others)}."
    return text


def claims_table(results: Sequence[Result]) -> str:
    """The claims with what was measured; empty without a run of BlockFFN."""
    groups = {method: done(runs) for method, runs in by_method(results).items()}
    runs = groups.get("blockffn", [])
    ours, dense = mean(runs, "perplexity"), mean(groups.get("dense", []), "perplexity")
    if ours is None:
        return ""
    rows = []
    for name, text, least in (("tls", "TLS of at least 80 %", 80), ("cls8", "CLS8 of at least 70 %", 70)):
        value = mean(runs, name)
        if value is not None:
            rows.append([text, number(value, name), _verdict(value.mean >= least)])
    if dense is not None:
        share = ours.mean / dense.mean - 1
        rows.append(["Perplexity within 1 % of the dense model's, or better", percent(share), _verdict(share <= 0.01)])
    best = best_baseline(results)
    if best is not None:
        share = ours.mean / best[1].mean - 1
        rows.append([f"Perplexity no worse than the best sparse baseline's ({best[0]})", percent(share),
                     _verdict(share <= 0)])  # fmt: skip
    return table(["Claim", "Measured", "Held"], rows)


def best_baseline(results: Sequence[Result]) -> tuple[str, Mean, Mean | None] | None:
    """Label, perplexity and CLS8 of the sparse method of the lowest perplexity, BlockFFN aside."""
    found = []
    for method, runs in by_method(results).items():
        perplexity = mean(done(runs), "perplexity")
        if method not in ("blockffn", "dense") and perplexity is not None:
            found.append((runs[0].experiment.label, perplexity, mean(done(runs), "cls8")))
    return min(found, key=lambda one: one[1].mean, default=None)


def _against(ours: Mean, other: Mean) -> str:
    return percent(ours.mean / other.mean - 1)


def _verdict(held: bool) -> str:
    return "yes" if held else "**no**"
