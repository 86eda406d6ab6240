"""Reports made from a run's files alone: one self-contained HTML page, PNG figures, tables for terminal and Markdown.

Nothing here imports torch or another part of the package, so that a report can be made on any machine a run folder was
copied to. The files and their fields are documented in `blockffn.reporting.run`.
"""

from blockffn.reporting.report import write_report
from blockffn.reporting.run import Evaluation, Layer, Run, Sample, SampleToken, load_run
from blockffn.reporting.tables import format_value, markdown_table, summary_table

__all__ = [
    "Evaluation",
    "Layer",
    "Run",
    "Sample",
    "SampleToken",
    "format_value",
    "load_run",
    "markdown_table",
    "summary_table",
    "write_report",
]
