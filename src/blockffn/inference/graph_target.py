"""`GraphTarget`: decode steps of up to 64 tokens as CUDA graphs of a `DecodePlan`.

A step is one copy of its inputs to the GPU and one launch of a graph; nothing waits until somebody reads the result.
Prompts and larger trees run through the model's own modules, over the same cache.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from blockffn.inference.decode_plan import DecodePlan, StepOutputs, refuses_plan
from blockffn.inference.model_target import ModelTarget, Pending, ancestors_of, check_parents, check_room
from blockffn.inference.target import Step
from blockffn.models.causal_lm import BlockFFNForCausalLM
from blockffn.ops.decode import MAX_TOKENS
from blockffn.ops.decode.inputs import StepInputs
from blockffn.ops.gpu import refuses_device


class GraphTarget(ModelTarget):
    """A `Target` for a GPU. There is one graph for 1, 2, 4, 8, 16, 32 and 64 tokens each, captured when first needed.

    Fewer tokens are padded; padding activates no experts. Results are copies, free to be kept. The model's weights are
    shared: change them in place only, and make a new target after changing which modules it has.

    On a CPU the same steps run without graphs, in the operations' definitions: for tests, not for speed.

    Args:
        model: with plain weights; it is put into evaluation mode.
        capacity, chunk_size: as for `ModelTarget`.
        backend: of `blockffn.ops.decode`.

    Raises:
        ValueError: as `ModelTarget`, or the model has packed or adapted weights or rotary frequencies that change with
            the length of the text.
    """

    def __init__(
        self,
        model: BlockFFNForCausalLM,
        *,
        capacity: int | None = None,
        chunk_size: int = 512,
        backend: str = "auto",
    ) -> None:
        super().__init__(model, capacity=capacity, chunk_size=chunk_size)
        self.plan = DecodePlan(model, self.cache, backend=backend)
        self._steps: dict[int, _CapturedStep | _EagerStep] = {}
        self._threshold = model.config.routing_threshold

    @torch.no_grad()
    def extend(self, tokens: Tensor, parents: Tensor | None = None) -> Step:
        """As `ModelTarget.extend`; does not wait for the GPU."""
        if len(tokens) > MAX_TOKENS:
            return super().extend(tokens, parents)
        check_room(tokens, self._pending, length=self._length, capacity=self._capacity)
        check_parents(tokens, parents)
        count, step = len(tokens), self._step(len(tokens))
        device = self.forward.device if tokens.is_cuda or (parents is not None and parents.is_cuda) else None
        if device is None:
            step.inputs.fill(self._length, tokens.tolist(), None if parents is None else parents.tolist())
        else:
            ancestors = ancestors_of(torch.arange(-1, count - 1) if parents is None else parents).to(device)
            step.inputs.fill_on_device(self._length, tokens.to(device), ancestors)
        outputs = step.run()
        self._pending = Pending(count, parents)
        logits, hidden = outputs.logits[:count].clone(), outputs.hidden[:count].clone()
        if outputs.counts is None:
            return Step(logits, hidden)
        counts = outputs.counts.clone()
        return Step(logits, hidden, counts[:, 0], counts[:, 1 : 1 + count])

    def _step(self, count: int) -> _CapturedStep | _EagerStep:
        if self._threshold != self.forward.model.config.routing_threshold:
            self._threshold = self.forward.model.config.routing_threshold
            self._steps.clear()  # a graph holds the threshold that it was captured with
        size = 1 << (count - 1).bit_length()
        if size not in self._steps:
            kind = _CapturedStep if self.forward.device.type == "cuda" else _EagerStep
            self._steps[size] = kind(self.plan.step, StepInputs(size, self.forward.device))
        return self._steps[size]


def refuses_graphs(model: BlockFFNForCausalLM) -> str | None:
    """Why CUDA graphs cannot decode this model where it lies, or `None`."""
    device = model.model.norm.weight.device
    if device.type != "cuda":
        return f"it needs the model on a CUDA device, got {device}"
    return refuses_device(device) or refuses_plan(model)


def graph_target(model: BlockFFNForCausalLM, capacity: int | None = None) -> GraphTarget:
    """The target of a model on a GPU.

    Raises:
        ValueError: the model is not on a GPU or cannot be run by a plan, or the capacity is beyond its context.
    """
    reason = refuses_graphs(model)
    if reason is not None:
        raise ValueError(f"backend 'graph' cannot decode this model: {reason}; use backend='model'")
    return GraphTarget(model, capacity=capacity)


class _EagerStep:
    """A step that is launched operation by operation."""

    def __init__(self, function: Callable[[StepInputs], StepOutputs], inputs: StepInputs) -> None:
        self.function, self.inputs = function, inputs

    def run(self) -> StepOutputs:
        return self.function(self.inputs)


class _CapturedStep:
    """A step captured in a CUDA graph at its first run, with the inputs of that run."""

    def __init__(self, function: Callable[[StepInputs], StepOutputs], inputs: StepInputs) -> None:
        self.function, self.inputs = function, inputs
        self._graph: torch.cuda.CUDAGraph | None = None
        self._outputs: StepOutputs | None = None

    def run(self) -> StepOutputs:
        if self._graph is None:
            self._capture()
        assert self._graph is not None
        assert self._outputs is not None
        self._graph.replay()
        return self._outputs

    def _capture(self) -> None:
        """Run once to compile kernels and to let libraries allocate, then capture. The step is idempotent: what it
        writes to the cache depends on its inputs alone."""
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            self.function(self.inputs)
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._outputs = self.function(self.inputs)
        self._graph = graph
