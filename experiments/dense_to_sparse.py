"""A dense model becomes a sparse one, recovered from its own predictions; both are measured.

    python experiments/dense_to_sparse.py --model SmolLM2-135M-Instruct.Q4_1.gguf \\
        --text books-train-*.jsonl.xz --valid books-valid.jsonl.xz --eval-data EVAL --stop-after 540

Stages: open the dense model, prepare the text with its tokenizer, let it write text of its own, convert, train with it
as the teacher, evaluate, score on BLiMP and LAMBADA, decode. Exit status 3 means that time is up: the same command goes
on. A .gguf file needs the package gguf.
"""

from __future__ import annotations

import sys

from blockffn.experiments.dense_to_sparse import main

if __name__ == "__main__":
    sys.exit(main(__doc__ or ""))
