"""Frozen steps on a CPU as a list of recorded operators: a small model's step is nearly all Python code otherwise.

The operators of one run are recorded below autograd, where shapes are constants and composite operators are still
whole, and TorchScript's interpreter runs the list. Every tensor that a step reads, the weights too, is an input of the
list, so that one list serves all runs of the same shapes and always sees the current weights.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, ClassVar, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mtptrain.backbone.decode import break_zero_ties_hook
from mtptrain.kernels.dispatch import Kernels, requested

BREAK_EVEN = 48  # about the calls in which a trace of tiny's verify pass saves its own cost, 0.15 s
PURE_HOOKS = {break_zero_ties_hook}  # they only compute, so a trace may hold them
VARYING = {torch.Tag.nondeterministic_seeded, torch.Tag.dynamic_output_shape}
CASTS = (torch.ops.aten.to.dtype, torch.ops.aten.contiguous.default)  # return a fitting argument itself

LOGGER = logging.getLogger("mtptrain.decoding")
TensorFunction = Callable[..., tuple[Tensor, ...]]


class Trace(NamedTuple):
    """A recorded step.

    Attributes:
        run: from the inputs and the tensors in `reads` to the outputs.
        reads: numbers of the state and weight tensors that it reads or writes.
    """

    run: TensorFunction
    reads: list[int]


class Known:
    """The record of one step at one set of shapes: calls that ran without a trace, then the trace.

    Attributes:
        calls: number of runs without a trace, in this process.
        trace: the trace, None before it is made.
        obstacle: the reason why there can be no trace, or None.
    """

    def __init__(self) -> None:
        self.calls = 0
        self.trace: Trace | None = None
        self.obstacle: str | None = None

    def is_due(self, calls: int) -> bool:
        """Return whether a trace pays if `calls` more runs are expected."""
        return self.trace is None and self.obstacle is None and self.calls + calls >= BREAK_EVEN


class _Shared:
    """State of this process: the steps of every module, the times that `repeated` expects, time of recording."""

    steps: ClassVar[WeakKeyDictionary[nn.Module, dict[Hashable, Known]]] = WeakKeyDictionary()
    times = 1
    seconds, processor_seconds = 0.0, 0.0


@contextmanager
def repeated(times: int) -> Iterator[None]:
    """Expect each run within to be made `times` times, as in a measurement, whose runs must be alike."""
    before, _Shared.times = _Shared.times, times
    try:
        yield
    finally:
        _Shared.times = before


def recording_seconds() -> float:
    """Return the seconds on the clock that this process has spent on recording traces."""
    return _Shared.seconds


def recording_processor_seconds() -> float:
    """Return the processor time of these seconds, which is less on a busy machine."""
    return _Shared.processor_seconds


@cache
def log_once(message: str) -> None:
    """Log a warning the first time that it occurs."""
    LOGGER.warning(message)


def tracing_obstacle(modules: Sequence[nn.Module]) -> str | None:
    """Return the reason why steps of these modules cannot be traced, or None if they can."""
    if requested() is Kernels.triton:
        return "Triton kernels are interpreted"
    if not all(weight.is_cpu for module in modules for weight in module.parameters()):
        return "the backbone is spread over devices"
    if any(weight.itemsize == 1 for module in modules for weight in module.parameters()):
        return "weights are decoded when they are used"
    parts = [part for module in modules for part in module.modules()]
    if any(part._forward_pre_hooks or {*part._forward_hooks.values()} - PURE_HOOKS for part in parts):
        return "a module has hooks"
    if any("forward" in vars(part) for part in parts):
        return "the forward method of a module was replaced"
    return None


class Traced:
    """A function of tensors that is traced once its calls are many enough, and simply runs before that.

    The first call with new shapes decides for the life of this object. Outside of inference mode the function simply
    runs: autograd would split the operators, and a trace has no gradient.

    Args:
        function: maps tensors to a tuple of tensors. It depends on the state, the modules' weights and `constants`
            only, and writes to nothing but the state.
        modules: modules whose weights it reads; the first one keeps the traces.
        state: tensors that the function reads or writes; they live as long as this object.
        constants: all other values that the function depends on.
        calls: calls to expect from this object, at least.
    """

    is_static, records_first = True, False

    def __init__(
        self,
        function: TensorFunction,
        modules: Sequence[nn.Module],
        state: Sequence[Tensor],
        constants: Hashable,
        calls: int,
    ) -> None:
        self.function, self.num_state, self.calls = function, len(state), calls
        weights = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
        self.tensors = [*state, *weights]
        self.steps = _Shared.steps.setdefault(modules[0], {})
        self.key = (constants, *(_kind(tensor) for tensor in self.tensors))
        self.chosen: dict[Hashable, TensorFunction] = {}

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Return the function's result."""
        if not torch.is_inference_mode_enabled():
            return self.function(*inputs)
        kinds = tuple(map(_kind, inputs))
        if kinds not in self.chosen:
            known = self.steps.setdefault((self.key, kinds), Known())
            if known.is_due(self.calls * _Shared.times):
                return self._record(known, inputs)
            self.chosen[kinds] = self._choice(known)
        return self.chosen[kinds](*inputs)

    def _choice(self, known: Known) -> TensorFunction:
        if known.trace is None:
            return lambda *inputs: self._count(known, inputs)
        run, reads = known.trace.run, [self.tensors[number] for number in known.trace.reads]
        return lambda *inputs: _interpret(run, (*inputs, *reads))

    def _count(self, known: Known, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        known.calls += 1
        return self.function(*inputs)

    def _record(self, known: Known, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Run the function, and make a trace of the run."""
        started, processor = time.perf_counter(), time.process_time()
        recorder = Recorder([*inputs, *self.tensors])
        before = [tensor.clone() for tensor in self.tensors[: self.num_state]]
        with recorder:
            outputs = self.function(*inputs)
        known.obstacle = recorder.obstacle
        if known.obstacle is None:
            try:
                known.trace = self._trace(recorder, inputs, outputs, before)
            except RuntimeError as error:
                known.obstacle = f"TorchScript cannot hold a step: {str(error).strip().splitlines()[-1]}"
        if known.obstacle is not None:
            log_once(f"running without traces, because {known.obstacle}")
        spent = time.perf_counter() - started
        _Shared.seconds += spent
        LOGGER.debug("recorded a step of %d tensors: %.2f s", len(recorder.read), spent)
        _Shared.processor_seconds += time.process_time() - processor
        return outputs

    def _trace(
        self, recorder: Recorder, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...], before: list[Tensor]
    ) -> Trace:
        reads = [number for number, tensor in enumerate(self.tensors) if id(tensor) in recorder.read]
        arguments = [*inputs, *(self.tensors[number] for number in reads)]
        # Tracing runs the operators once more, so they get the state as it was, and not the state itself.
        copies = [*inputs, *([*before, *self.tensors[self.num_state :]][number] for number in reads)]
        # torch.jit.trace keeps every function for the life of the process: a sweep would grow by 25 MB or more a job.
        graph, _ = torch._C._create_graph_by_tracing(
            recorder.replay(arguments, outputs), copies, lambda tensor: "", True, False
        )
        run = torch._C._create_function_from_graph("step", graph)
        _interpret(run, copies)  # the first call prepares the interpreter
        return Trace(run, reads)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _kind(tensor: Tensor) -> Hashable:
    return tensor.shape, tensor.dtype, tensor.device


def _interpret(run: TensorFunction, arguments: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Run a trace as it is: optimising it would take longer than most runs last, and gains little."""
    with torch.jit.optimized_execution(False):
        return run(*arguments)


class Operation(NamedTuple):
    """One call of an operator."""

    operator: Any
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    result: Any


class Recorder(TorchDispatchMode):
    """Records the operators that run while it is active.

    Attributes:
        operations: the calls, without casts that return their argument.
        read: ids of the given tensors that an operator read or wrote.
        obstacle: the reason why another run may need other operators or other constants, or None.
    """

    def __init__(self, given: Sequence[Tensor]) -> None:
        super().__init__()
        self.known = {id(tensor): tensor for tensor in given}  # holds every tensor, so that no id is used twice
        self.varying = {*map(_memory, given)}  # memory that may hold other values in another run
        self.operations: list[Operation] = []
        self.read: set[int] = set()
        self.obstacle: str | None = None

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operator and record it."""
        keywords = kwargs or {}
        result = operator(*args, **keywords)
        tensors = list(_tensors((*args, *keywords.values())))
        self.read |= {id(tensor) for tensor in tensors}
        self._check(operator, tensors, result)
        results = list(_tensors([result]))
        if results and not (operator in CASTS and result is args[0]):
            self.operations.append(Operation(operator, args, keywords, result))
            self.known |= {id(tensor): tensor for tensor in results}
        if not self.varying.isdisjoint(map(_memory, tensors)):
            self.varying |= {*map(_memory, results)}
        return result

    def _check(self, operator: Any, tensors: list[Tensor], result: Any) -> None:
        if (
            any(id(tensor) not in self.known for tensor in tensors)
            and operator is not torch.ops.aten.lift_fresh.default
        ):
            self.obstacle = f"{operator} reads a tensor that is not among the inputs"
        reads_value = isinstance(result, int | float | complex)
        if reads_value and not self.varying.isdisjoint(map(_memory, tensors)):
            self.obstacle = f"{operator} reads a value"
        by_numbers = operator is torch.ops.aten.index.Tensor and tensors[1].dtype is torch.int64
        if VARYING & {*operator.tags} and not by_numbers:
            self.obstacle = f"the result of {operator} depends on more than the shapes of its arguments"

    def replay(self, arguments: Sequence[Tensor], outputs: tuple[Tensor, ...]) -> TensorFunction:
        """Return a function that calls the operators on other tensors in place of `arguments`, without other code."""
        names = [id(tensor) for tensor in arguments]

        def run(*tensors: Tensor) -> tuple[Tensor, ...]:
            values = dict(zip(names, tensors, strict=True))

            def now(value: Any) -> Any:
                if isinstance(value, Tensor):
                    return values.get(id(value), value)
                return [now(part) for part in value] if isinstance(value, list | tuple) else value

            for operator, positional, keywords, before in self.operations:
                after = operator(*map(now, positional), **{name: now(value) for name, value in keywords.items()})
                values |= zip(map(id, _tensors([before])), _tensors([after]), strict=True)
            return tuple(map(now, outputs))

        return run


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """Yield the tensors among the arguments of an operator, lists of tensors included."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)
