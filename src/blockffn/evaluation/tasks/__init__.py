"""Task files for EleutherAI's lm-evaluation-harness, and the function that reads their data."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent
"""What `lm_eval --include_path` takes."""
