"""`python -m blockffn.evaluation.lm_eval …`: the stock `lm_eval` command line, which then knows our models and tasks.

Importing this package registers the model with Hugging Face's auto classes, which the harness itself never does. All
arguments are the harness's own; our task folder is added unless `--include_path` names another.
"""

from __future__ import annotations

import sys

from blockffn.errors import UserFacingError
from blockffn.evaluation.tasks import FOLDER


def arguments(given: list[str]) -> list[str]:
    """The harness's arguments: `given`, with our task folder where tasks are read and none is named."""
    named = any(one.split("=", 1)[0] in ("--include_path", "--help", "-h") for one in given)
    return given if named or not given else [*given, "--include_path", str(FOLDER)]


def main() -> None:
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError as error:
        raise UserFacingError(
            f"lm-evaluation-harness cannot be imported ({error}): pip install 'blockffn[eval]'"
        ) from None
    sys.argv[1:] = arguments(sys.argv[1:])
    cli_evaluate()


if __name__ == "__main__":
    try:
        main()
    except UserFacingError as error:
        sys.exit(f"error: {error}")
