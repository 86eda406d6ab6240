"""Speculative decoding: a drafter proposes a tree of tokens, the target verifies it in one call.

`tree` holds the tree and its growth, `drafters` what proposes, `verify` what accepts, `decode` the loop, `cost` and
`shaping` the choice of a tree by what verifying it costs. Nothing here knows a model; `inference.target` is the seam.
"""
