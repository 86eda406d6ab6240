"""`python -m blockffn`, which torchrun needs: `torchrun --nproc-per-node 2 -m blockffn train …`."""

from blockffn.cli import main

main()
