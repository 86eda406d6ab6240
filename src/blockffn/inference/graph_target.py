"""`GraphTarget`: decode steps of up to 64 tokens as CUDA graphs of a `DecodePlan`.

A step is one copy of its inputs to the GPU and one launch of a graph; nothing waits until somebody reads the result.
Where each token is the best one behind the last (`expect_choices`), steps run ahead: the GPU chooses the token and has
the next step at hand while the host deals with this one. Prompts and larger trees run through the model's own modules,
over the same cache.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from blockffn.inference.decode_plan import DecodePlan, StepOutputs, refuses_plan
from blockffn.inference.ids import Ids, on_host
from blockffn.inference.model_target import ModelTarget, Pending, ancestors_of, check_room
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
        run_ahead: whether `expect_choices` is heeded; default: on a GPU, where it saves the wait for the host. A step
            of a token that is not the expected one then begins after the one that was launched in vain.

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
        run_ahead: bool | None = None,
    ) -> None:
        super().__init__(model, capacity=capacity, chunk_size=chunk_size)
        self.plan = DecodePlan(model, self.cache, backend=backend)
        self.run_ahead = self.forward.device.type == "cuda" if run_ahead is None else run_ahead
        self._expects_choices = False
        self._ahead: _StepsAhead | None = None
        self._steps: dict[int, _CapturedStep | _EagerStep] = {}
        self._threshold = model.config.routing_threshold

    def reset(self) -> None:
        super().reset()
        self._expects_choices = False

    def expect_choices(self) -> None:
        """As `target.expect_choices` says. Steps of one token then have `choices`, and wait for the GPU."""
        self._expects_choices = self.run_ahead

    def prefill(self, tokens: Ids) -> Step:
        self._discard_ahead()
        return super().prefill(tokens)

    @torch.no_grad()
    def extend(self, tokens: Ids, parents: Ids | None = None) -> Step:
        """As `ModelTarget.extend`; does not wait for the GPU, unless choices are expected."""
        if len(tokens) > MAX_TOKENS:
            self._discard_ahead()
            return super().extend(tokens, parents)
        check_room(len(tokens), self._pending, length=self._length, capacity=self._capacity)
        tokens = on_host(tokens)
        pending = Pending(len(tokens), None if parents is None else on_host(parents))
        pending.check_parents()
        self._heed_threshold()
        if self._expects_choices and len(tokens) == 1 and isinstance(tokens, list):
            if self._ahead is None:
                self._ahead = _StepsAhead(self.plan, self.forward.device)
            result = self._ahead.extend(self._length, tokens[0], has_room=self._length + 2 <= self._capacity)
            self._pending = Pending(1)
            return result
        self._discard_ahead()
        step = self._step(len(tokens))
        self._fill(step.inputs, tokens, pending.parents)
        outputs = step.run()
        self._pending = pending
        return _copy(outputs, len(tokens))

    def _fill(self, inputs: StepInputs, tokens: list[int] | Tensor, parents: list[int] | Tensor | None) -> None:
        """Set a step's inputs; from the device where one of these lies there."""
        if isinstance(tokens, list) and not isinstance(parents, Tensor):
            inputs.fill(self._length, tokens, parents)
            return
        device = self.forward.device
        above = torch.arange(-1, len(tokens) - 1) if parents is None else torch.as_tensor(parents)
        inputs.fill_on_device(self._length, torch.as_tensor(tokens, device=device), ancestors_of(above).to(device))

    def _step(self, count: int) -> _CapturedStep | _EagerStep:
        size = 1 << (count - 1).bit_length()
        if size not in self._steps:
            self._steps[size] = _make_step(self.plan.step, StepInputs(size, self.forward.device))
        return self._steps[size]

    def _heed_threshold(self) -> None:
        """Drop all graphs if the threshold that they were captured with has changed."""
        if self._threshold != self.forward.model.config.routing_threshold:
            self._threshold = self.forward.model.config.routing_threshold
            self._steps.clear()
            self._ahead = None

    def _discard_ahead(self) -> None:
        if self._ahead is not None:
            self._ahead.discard()


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


def _copy(outputs: StepOutputs, count: int) -> Step:
    """The first `count` tokens of a step, free to be kept. Counts are apart: who keeps them keeps no logits."""
    logits, hidden = outputs.logits[:count].clone(), outputs.hidden[:count].clone()
    if outputs.counts is None:
        return Step(logits, hidden)
    counts = outputs.counts.clone()
    return Step(logits, hidden, counts[:, 0], counts[:, 1 : 1 + count])


class _StepsAhead:
    """Steps of one token, of which the next is launched before it is asked for.

    On the device, a step chooses the best token and leaves the inputs of the next one, which is launched before the
    host knows that token. A step in vain leaves nothing but a row of the cache that is not committed.
    """

    def __init__(self, plan: DecodePlan, device: torch.device) -> None:
        self._chosen = torch.zeros(2, dtype=torch.int64, device=device)
        self._step = _make_step(_with_choice(plan, self._chosen), StepInputs(1, device))
        self._reader = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._outputs: StepOutputs | None = None
        self._done: torch.cuda.Event | None = None
        self._begun: tuple[int, int] | None = None

    def discard(self) -> None:
        """Forget what was launched ahead."""
        self._begun = None

    def extend(self, length: int, token: int, *, has_room: bool) -> Step:
        """The step of a token behind `length` committed ones, with `choices`; waits for it, not for the next.

        Args:
            has_room: whether the cache takes another token, which is then begun.
        """
        if self._begun != (length, token):
            self._step.inputs.fill(length, [token])
            self._launch()
        assert self._outputs is not None
        step, done = _copy(self._outputs, 1), self._done
        self.discard()
        if has_room:
            self._launch()
        choice = self._read_choice(length, done)
        if has_room:
            self._begun = (length + 1, choice)
        step.choices = [choice]
        return step

    def _launch(self) -> None:
        self._outputs = self._step.run()
        self._done = None if self._reader is None else torch.cuda.current_stream().record_event()

    def _read_choice(self, length: int, done: torch.cuda.Event | None) -> int:
        """What the step behind `length` tokens chose; on a GPU past the steps that are queued behind it."""
        with torch.cuda.stream(self._reader):
            if self._reader is not None and done is not None:
                self._reader.wait_event(done)
            return int(self._chosen[length % 2])


def _with_choice(plan: DecodePlan, chosen: Tensor) -> Callable[[StepInputs], StepOutputs]:
    """A step of one token that leaves the best one in `chosen` and in its inputs."""

    def step(inputs: StepInputs) -> StepOutputs:
        outputs = plan.step(inputs)
        plan.ops.advance(outputs.logits, inputs, chosen)
        return outputs

    return step


def _make_step(function: Callable[[StepInputs], StepOutputs], inputs: StepInputs) -> _CapturedStep | _EagerStep:
    return (_CapturedStep if inputs.data.is_cuda else _EagerStep)(function, inputs)


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
        """Run once to compile kernels and to let libraries allocate, then capture. The step may be repeated: what it
        writes to the cache depends on its inputs alone, which are restored."""
        inputs = self.inputs.data.clone()
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            self.function(self.inputs)
        current.wait_stream(side)
        self.inputs.data.copy_(inputs)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._outputs = self.function(self.inputs)
        self._graph = graph
