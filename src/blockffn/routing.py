"""`Routing`: the one value that crosses from the model to objectives, metrics and kernels.

Every router, whatever its method, returns one `Routing` per layer. Nothing else about routing is stored anywhere.

Letters used in names of dense tensors throughout the package:
`B` batch, `T` tokens, `D` hidden size, `E` experts, `F` expert width, `U` union of active experts, `L` chunk length,
`V` vocabulary, `H` heads. `scores_TE` has shape `[T, E]`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Routing:
    """How one layer routes its tokens. All fields have shape `[B, T, E]` (or `[T, E]` when packed) and one float dtype.

    Shared experts, which every token uses, are the first columns: weight 1, logit and share 0.

    Attributes:
        logits: router output before its activation (A0 of the paper). Activation locality reads this.
        shares: activation divided by its sum over experts; each token's shares sum to 1, or are all 0 when no expert is
            active. For softmax routers: the probabilities. Chunk sparsification, entropy and balance read this.
        weights: what multiplies the experts. Exactly zero for an inactive expert; *active* means `weights != 0`, so a
            negative weight is active. Kernels, sparsity and reuse read this.
    """

    logits: Tensor
    shares: Tensor
    weights: Tensor
