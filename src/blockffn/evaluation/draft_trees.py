"""How many experts the nodes of a draft tree use together, without a draft model: the model drafts for itself.

Speculative decoding verifies a tree of candidate continuations in one pass, so what counts there is the union of the
experts of its nodes. A tree here holds the most probable nodes below a prefix, as EAGLE-2 selects them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from blockffn.metrics.sparsity import chunk_level_sparsity, token_level_sparsity
from blockffn.models.causal_lm import BlockFFNForCausalLM

NODES, DEPTH, BRANCHES = 32, 6, 8


@torch.no_grad()
def draft_tree_union(
    model: BlockFFNForCausalLM,
    prefixes: Sequence[Tensor],
    *,
    nodes: int = NODES,
    depth: int = DEPTH,
    branches: int = BRANCHES,
) -> dict[str, Any]:
    """Share of experts (percent) that the nodes of a tree use together, mean over layers and trees.

    Args:
        prefixes: token ids `[T]` of texts to draft behind.
        nodes: of a tree. depth: levels at most. branches: children of a node, and nodes of a level that get children.

    Beside it stand the share that one node uses, and what as many nodes would use if each chose at random.

    Raises:
        ValueError: there is no prefix.
    """
    if not prefixes:
        raise ValueError("no text is long enough to draft behind")
    trees = [tree_weights(model, prefix, draft_tree(model, prefix, nodes, depth, branches)) for prefix in prefixes]
    unions = [100 - chunk_level_sparsity(layer[None], window=len(layer)).item() for tree in trees for layer in tree]
    sparsities = [token_level_sparsity(layer[None]).item() for tree in trees for layer in tree]
    tls = sum(sparsities) / len(sparsities)
    return {
        "nodes": nodes,
        "depth": depth,
        "trees": len(trees),
        "rows": [
            {"what": "one node", "union": 100 - tls},
            {"what": "all nodes of a tree", "union": sum(unions) / len(unions)},
            {"what": "as many nodes that route at random", "union": 100 * (1 - (tls / 100) ** nodes)},
        ],
    }


def draft_tree(
    model: BlockFFNForCausalLM, prefix: Tensor, nodes: int, depth: int, branches: int
) -> list[tuple[int, ...]]:
    """The `nodes` most probable continuations of a prefix, each as its tokens; a node's parents are among them."""
    found: dict[tuple[int, ...], float] = {}
    level: list[tuple[int, ...]] = [()]
    for _ in range(depth):
        rows = torch.stack([torch.cat([prefix, prefix.new_tensor(path)]) for path in level])
        logits = model(rows, use_cache=False, logits_to_keep=1).logits[:, -1].float()
        best = logits.log_softmax(dim=-1).topk(min(branches, logits.shape[-1]))
        children = {
            (*path, token): found.get(path, 0.0) + value
            for path, values, tokens in zip(level, best.values.tolist(), best.indices.tolist())
            for value, token in zip(values, tokens)
        }
        found |= children
        level = sorted(children, key=lambda path: -children[path])[:branches]
    return sorted(found, key=lambda path: (-found[path], len(path)))[:nodes]


def tree_weights(model: BlockFFNForCausalLM, prefix: Tensor, tree: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """Routing weights `[nodes, E]` of each layer, every node behind its own ancestors."""
    longest = max(map(len, tree))
    rows = torch.stack([torch.cat([prefix, prefix.new_tensor((*path, *[0] * (longest - len(path))))]) for path in tree])
    routings = model.model(rows, use_cache=False, output_routing=True).routings
    last = torch.tensor([len(prefix) + len(path) - 1 for path in tree], device=prefix.device)
    each = torch.arange(len(tree), device=prefix.device)
    return [routing.weights[each, last] for routing in routings]


def prefixes_of(document_ids: Tensor, input_ids: Tensor, *, length: int) -> list[Tensor]:
    """The first `length` tokens of each row `[B, T]` whose first document is that long."""
    whole = (document_ids[:, :length] == 0).all(dim=1) & (document_ids.shape[1] >= length)
    return [row[:length] for row in input_ids[whole]]
