"""The step on fake tensors: they have the shapes, strides and dtypes of the real step, and none of its bytes.

Idea: the model's parameters are swapped for fake CPU tensors, so that a step of any size runs in seconds. Three things
would be wrong with fake tensors alone, and are put right here:

* *Known values.* Token ids, positions and masks steer control flow (transformers asks whether sequences are packed).
  Small integer and boolean tensors are therefore computed for real beside the fake ones, so that such questions get
  true answers.
* *The target's kernels.* For a CUDA target, the attention kernel that CUDA would choose is called by name, dropout
  keeps a boolean mask, layer norm keeps float32 statistics, and every allocation is rounded as the caching allocator
  does.
* *Scratch*, which a kernel holds only while it runs. On the CPU, each distinct kernel is run once on real tensors of
  the same shapes, under the allocator's count. For CUDA, the sizes are computed from the kernels' sources.

Invariant: the model gets its own tensors back, and no random state moves. Refused: control flow that depends on a value
that is not known, and ops without a fake kernel (`Unsupported`, with the op's name).
"""

from __future__ import annotations

import contextlib
import copy
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.weak import WeakIdKeyDictionary

from tightfit import accelerator
from tightfit.core import Device, Unsupported
from tightfit.device.allocator import MIN_BLOCK_BYTES
from tightfit.step.parallel import as_new, forget_step, local_of
from tightfit.step.run import parameter_tensors, tensors_in
from tightfit.trace.as_cuda import CUDA_SCRATCH, attention_like_cuda, dropout_like_cuda
from tightfit.trace.remembered import Remembered, extent

_aten = torch.ops.aten


#: Larger tensors are not computed for real: control flow asks about positions and masks of tokens (two dimensions),
#: not about weights or scores.
_KNOWN_TOKENS, _KNOWN_ELEMENTS = 1 << 24, 1 << 20


def _steers(tensor: torch.Tensor) -> bool:
    """Is this a tensor of the kind that control flow asks about?"""
    if tensor.is_floating_point() or tensor.is_complex():
        return False
    return tensor.numel() <= (_KNOWN_TOKENS if tensor.dim() <= 2 else _KNOWN_ELEMENTS)


#: To measure scratch, no kernel is run on operands of more bytes, or for more FLOPs, than this.
_PROBE_BYTES, _PROBE_FLOPS = 1 << 28, 4_000_000_000


#: Matrix products in these dtypes go to a BLAS whose buffers are not the allocator's.
_BLAS = frozenset({_aten.mm.default, _aten.addmm.default, _aten.bmm.default, _aten.baddbmm.default})


_BLAS_DTYPES = frozenset({torch.float32, torch.float64})


def _is_mask(index: Any) -> bool:
    return isinstance(index, torch.Tensor) and index.dtype is torch.bool


_logs: ContextVar[bool] = ContextVar("logs", default=False)


@contextlib.contextmanager
def logging_step() -> Iterator[None]:
    """While open, the value of a real number may be asked for: it goes into a log and steers nothing, so any number
    will do."""
    token = _logs.set(True)
    try:
        yield
    finally:
        _logs.reset(token)


#: Threads that multiply matrices on a card in a step: the one that calls the model, and autograd's of the device.
_PRODUCT_THREADS = 2

#: Make the same everywhere.
_CONSTANTS = frozenset({_aten.ones.default, _aten.full.default})


class FakeStep:
    """What one step on fake tensors knows beyond the fake tensors. `target`: the device whose kernels are meant; by
    default the CPU.

    One thing because known values, scratch and refusals are found in one look at each op.
    """

    def __init__(self, target: Device | None = None, *, guess: float | None = None) -> None:
        self.target = target
        self.cuda = target is not None and not target.is_host  # CUDA's kernels stand for those of every card
        self.granule_bytes = MIN_BLOCK_BYTES if self.cuda else 1
        self.guess = guess  # an optimizer reads its step count; only its control flow could depend on it
        self._known: Any = WeakIdKeyDictionary()
        self._constants: dict[int, weakref.ref[torch.Tensor]] = {}  # real ones, by storage; gone when written to
        self._draws: Any = WeakIdKeyDictionary()  # single numbers from 0 up to 1
        self._remembered = Remembered()
        self._probes: dict[Any, tuple[Any, Any, list[int]]] = {}
        self._probed: dict[Any, int] = {}
        self._unprobed: set[str] = set()
        self._accumulating: list[nn.Parameter] = []
        self._model: nn.Module | None = None
        self._scratch: dict[int, int] = {}

    @property
    def flash(self) -> bool:
        """Has the target flash attention? On NVIDIA it exists since compute capability 8."""
        capability = None if self.target is None else self.target.compute_capability
        return capability is None or capability >= 8.0

    @property
    def workspace_bytes(self) -> int:
        """What was measured on the target, else cuBLAS's default workspaces, `:4096:2:16:8` each. They live in the
        caching allocator from the first matrix product of a thread on.

        There are two: torch keeps one for each handle and stream, handles belong to threads, and autograd's device
        thread runs backward and every replay. Source: aten/src/ATen/cuda/CublasHandlePool.cpp,
        `getCurrentCUDABlasHandle` and `parseChosenWorkspaceSize`; 32 MiB since compute capability 9. (torch 2.11 takes
        the smaller one on 10 and up, so there it is less than what is counted.)
        """
        if self.target is not None and self.target.workspace_bytes is not None:
            return self.target.workspace_bytes
        if self.target is None or self.target.kind != "cuda":
            return 0
        capability = self.target.compute_capability
        return _PRODUCT_THREADS * (32 * 2**20 if capability is not None and capability >= 9.0 else 8_519_680)

    @property
    def notes(self) -> tuple[str, ...]:
        if not self._unprobed:
            return ()
        return (
            f"kernels too large to be tried out, their scratch is not counted: {', '.join(sorted(self._unprobed))}",
        )

    def restart(self) -> None:
        """Set the gradients as at the start of a step: zeros where the model came with a gradient, else none."""
        assert self._model is not None
        forget_step(self._model)
        for parameter in self._model.parameters():
            parameter.grad = None
        for parameter in self._accumulating:
            parameter.grad = torch.zeros_like(parameter)

    # -- running

    def know(self, fake: torch.Tensor, real: torch.Tensor) -> None:
        """Note that `fake` has the values of `real`, if it is of the kind that steers control flow."""
        if not real.is_meta and _steers(real):
            with _disable_current_modes():
                self._known[fake] = real.detach().to(accelerator.HOST, copy=True)

    def run(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The result of one op: the true one where it is known, else the fake one."""
        if func is _aten._local_scalar_dense.default:
            return self._scalar(args[0])
        if func.namespace == "c10d":
            return _pretended(func, args, kwargs)
        if func is _aten._grouped_mm.default:
            out: Any = _grouped_mm(*args, **kwargs)
        elif func is _aten.addmm.dtype_out:  # torch 2.11 decomposes it, and takes the dtype for a factor
            out = kwargs["out"]
        elif func is _aten._unsafe_view.default:  # the fake mode remembers views, and not these
            out = self._remembered.result(_aten.view.default, args, {})
        elif func is _aten.nonzero.default and args[0] in self._known:
            with _disable_current_modes():
                found = self._known[args[0]].nonzero()
            out = args[0].new_empty(found.shape, dtype=torch.int64)
        elif func is _aten.index.Tensor and any(index in self._known for index in args[1] if _is_mask(index)):
            out = func(args[0], self._places(args[1]))
        else:
            out = self._remembered.result(func, args, kwargs)
        if func is _aten.lift_fresh.default and not isinstance(args[0], FakeTensor):  # `torch.tensor(3)` in the model
            self.know(out, args[0])
        if self.cuda and func is _aten.native_layer_norm.default and args[0].dtype in (torch.bfloat16, torch.float16):
            out = (out[0], *(torch.empty_like(t, dtype=torch.float32) for t in out[1:]))
        self.learn(func, args, kwargs, out)
        return out

    def _places(self, indices: Any) -> list[Any]:
        """`indices`, with each mask replaced by the places that it lets through. Their number is then known."""
        found: list[Any] = []
        for index in indices:
            if _is_mask(index) and index in self._known:
                with _disable_current_modes():
                    count = int(self._known[index].sum())
                found += [index.new_empty(count, dtype=torch.int64) for _ in range(index.dim())]
            else:
                found.append(index)
        return found

    def _scalar(self, tensor: torch.Tensor) -> Any:
        value = self._known.get(tensor)
        if value is not None:
            with _disable_current_modes():
                return value.item()
        if self.guess is not None:
            return self.guess
        if _logs.get() and tensor.is_floating_point():
            return 1.0
        raise Unsupported(
            f"the model asks for the value of a {str(tensor.dtype).removeprefix('torch.')} tensor "
            "(aten._local_scalar_dense), which a step on fake tensors does not have"
        )

    def learn(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> None:
        """Compute `out` for real too, if all that it depends on is known."""
        results = [out] if isinstance(out, torch.Tensor) else tensors_in(out)
        if func._schema.is_mutable and self._constants:  # what is written to is no constant any more
            for tensor in tensors_in((args, dict(kwargs))):
                constant = self._constants.pop(tensor.untyped_storage()._cdata, lambda: None)()
                if constant is not None:
                    self._known.pop(constant, None)
        if func in _CONSTANTS and out.is_floating_point() and out.dim() <= 2 and out.numel() <= _KNOWN_TOKENS:
            with _disable_current_modes():  # a mask of ones, before it is made a boolean one
                self._known[out] = func(*args, **{**kwargs, "device": accelerator.HOST})
            self._constants[out.untyped_storage()._cdata] = weakref.ref(out)
            return
        if func is _aten.rand.default and not out.dim():
            self._draws[out] = None
        if func is _aten.lt.Scalar and args[0] in self._draws and args[1] <= 0:  # a layer drop of nothing
            with _disable_current_modes():
                self._known[out] = torch.tensor(False)
            return
        if not results or not all(map(_steers, results)) or torch.Tag.nondeterministic_seeded in func.tags:
            return
        leaves, spec = pytree.tree_flatten((args, dict(kwargs)))
        if any(isinstance(leaf, torch.Tensor) and leaf not in self._known for leaf in leaves):
            return
        if not any(isinstance(leaf, torch.Tensor) for leaf in leaves) and "empty" in func.__name__:
            return
        with _disable_current_modes():
            try:
                real_args, real_kwargs = pytree.tree_unflatten(
                    [self._known[leaf] if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves], spec
                )
                real = func(*real_args, **real_kwargs)
            except (RuntimeError, NotImplementedError, TypeError):
                return
        found = [real] if isinstance(real, torch.Tensor) else tensors_in(real)
        for fake, value in zip(results, found, strict=False):
            self._known[fake] = value

    # -- scratch

    def note(self, call: int, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], flops: int) -> None:
        """Note op number `call` of the pass. Its scratch is asked for later."""
        if self.cuda:
            scratch = CUDA_SCRATCH.get(func)
            if scratch is not None:
                self._scratch[call] = scratch(*args, **kwargs)
            return
        tensors = tensors_in((args, dict(kwargs)))
        if func.is_view or not tensors or func in (_aten._local_scalar_dense.default, _aten.nonzero.default):
            return
        if func in _BLAS and tensors[0].dtype in _BLAS_DTYPES:
            return
        leaves, spec = pytree.tree_flatten((args, dict(kwargs)))
        key = (func, spec, *(_outline(leaf) for leaf in leaves))
        try:
            known = self._probes.get(key)
        except TypeError:  # an argument that cannot be hashed
            return
        if known is None:
            moved = sum(t.numel() * t.element_size() for t in tensors)
            if moved > _PROBE_BYTES or flops > _PROBE_FLOPS:
                self._unprobed.add(str(func))
                return
            known = self._probes[key] = (func, (spec, key[2:]), [])
        known[2].append(call)

    def forget_calls(self) -> None:
        """Another pass begins, which numbers its ops from the start."""
        self._scratch = {}
        for _, _, calls in self._probes.values():
            calls.clear()

    def scratch_bytes(self) -> dict[int, int]:
        """The most bytes that each noted op held beyond its outputs, by its number; 0 for ops that were left out."""
        fresh = [key for key in self._probes if key not in self._probed]
        if fresh:
            self._probed.update(zip(fresh, self._probe([self._probes[key] for key in fresh]), strict=True))
        for key, (_, _, calls) in self._probes.items():
            self._scratch.update(dict.fromkeys(calls, self._probed[key]))
        return self._scratch

    def _probe(self, probes: list[tuple[Any, Any, list[int]]]) -> list[int]:
        from tightfit.trace.profiler import MARK, risen_bytes

        made: list[int] = []
        profiler = torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
        )
        with _disable_current_modes(), torch.no_grad(), torch.random.fork_rng(devices=()), profiler:
            for func, (spec, outlines), _ in probes:
                leaves = [_real(outline) if isinstance(outline, _Outline) else outline for outline in outlines]
                args, kwargs = pytree.tree_unflatten(leaves, spec)
                given = {t.untyped_storage()._cdata for t in tensors_in((args, kwargs))}
                with torch.profiler.record_function(MARK):
                    try:
                        out = func(*args, **kwargs)
                    except Exception:  # zeros are no input for every kernel; then its scratch stays unknown
                        out = None
                storages = {t.untyped_storage()._cdata: t.untyped_storage() for t in tensors_in(out)}
                made.append(sum(s.nbytes() for key, s in storages.items() if key not in given))
                del out, storages, leaves, args, kwargs
        return [max(0, rise - size) for rise, size in zip(risen_bytes(profiler, len(made)), made, strict=True)]


def _pretended(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """A collective that sends nothing: it gives the tensors that it would write, and work that counts as done."""
    from torch._C._distributed_c10d import FakeWork

    work = FakeWork().boxed()
    returns = func._schema.returns
    if len(returns) == 1:
        return work
    return (*args[: len(returns) - 1], work)


class _Outline(tuple[Any, ...]):
    """(shape, strides, dtype) of a tensor argument."""

    __slots__ = ()


def _outline(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        return _Outline((tuple(leaf.shape), tuple(leaf.stride()), leaf.dtype))
    return leaf


def _real(outline: _Outline) -> torch.Tensor:
    shape, strides, dtype = outline
    return torch.zeros(extent(shape, strides), dtype=dtype).as_strided(shape, strides)


def _grouped_mm(
    a: torch.Tensor, b: torch.Tensor, offs: torch.Tensor | None = None, bias: Any = None, out_dtype: Any = None
) -> torch.Tensor:
    """A fake kernel of its own, because torch's takes bfloat16 only. Sizes are as in `at::_grouped_mm`: a 2-d operand
    is the ragged one."""
    if a.dim() == 2 and b.dim() == 2:
        assert offs is not None
        shape = (offs.size(0), a.size(0), b.size(1))
    elif a.dim() == 2:
        shape = (a.size(0), b.size(-1))  # type: ignore[assignment]  # tuples of two lengths
    elif b.dim() == 2:
        shape = (a.size(1), b.size(1))  # type: ignore[assignment]
    else:
        shape = (a.size(0), a.size(1), b.size(-1))
    return torch.empty(shape, dtype=out_dtype or a.dtype, device=a.device)


@contextlib.contextmanager
def faked(model: nn.Module, batch: Any, step: FakeStep) -> Iterator[Any]:
    """The model with fake parameters and buffers in place of its own; yields the fake batch, inside the fake mode."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    undo: list[tuple[Any, str, Any]] = []
    twins: dict[int, torch.Tensor] = {}
    step._model = model
    held = [*model.parameters(), *model.buffers(), *tensors_in(batch)]
    are_together = len({t.device for t in held if not t.is_meta}) == 1

    def fake_of(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in twins and local_of(tensor) is not tensor:
            twins[id(tensor)] = _sharded_like(tensor, fake_of(local_of(tensor)))
        if id(tensor) not in twins:
            with mode:
                # a model that is to be put on a device, and the batch on it
                device = tensor.device if are_together and not tensor.is_meta else accelerator.HOST
                twin = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
            if isinstance(tensor, nn.Parameter):
                twin = parameter = _parameter_like(tensor, twin, fake_of)
                if tensor.grad is not None:
                    step._accumulating.append(parameter)
            twins[id(tensor)] = twin
            step.know(twin, tensor)
        return twins[id(tensor)]

    try:
        for module in model.modules():
            tables: tuple[Any, ...] = (module._parameters, module._buffers)
            for table in tables:
                for name, tensor in table.items():
                    if tensor is not None:
                        undo.append((table, name, tensor))
                        table[name] = fake_of(tensor)
            for name, plain in list(vars(module).items()):  # tensors that are neither: ALiBi slopes, rotary tables
                if isinstance(plain, torch.Tensor):
                    undo.append((vars(module), name, plain))
                    vars(module)[name] = fake_of(plain)
        fake_batch = pytree.tree_map(lambda t: fake_of(t) if isinstance(t, torch.Tensor) else t, batch)
        with as_new(model), _untraced_transformers(), _kernels_of(step), mode:
            yield fake_batch
    finally:
        for table, name, tensor in undo:
            table[name] = tensor


def _sharded_like(original: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
    """A sharded tensor like the given one, whose local part is the fake `local`."""
    make: Any = type(original)
    made: torch.Tensor = make(local, original._spec, requires_grad=original.requires_grad)  # type: ignore[attr-defined]
    is_parameter = isinstance(original, nn.Parameter)
    return nn.Parameter(made, requires_grad=original.requires_grad) if is_parameter else made


def _parameter_like(
    original: nn.Parameter, twin: torch.Tensor, fake_of: Callable[[torch.Tensor], torch.Tensor]
) -> nn.Parameter:
    """A fake parameter. For a 4-bit weight it has a fake `quant_state`."""
    made: Any = nn.Parameter(twin, requires_grad=original.requires_grad)
    state = getattr(original, "quant_state", None)
    if state is None or len(parameter_tensors(original)) == 1:
        return made  # type: ignore[no-any-return]

    def fake_state(state: Any) -> Any:
        made = copy.copy(state)
        for name, value in vars(state).items():
            if isinstance(value, torch.Tensor):
                setattr(made, name, fake_of(value))
        if getattr(made, "state2", None) is not None:
            made.state2 = fake_state(made.state2)
        return made

    # a tensor cannot be of two subclasses, but the layer only asks for these attributes
    vars(made).update({name: value for name, value in vars(original).items() if name != "quant_state"})
    made.quant_state = fake_state(state)
    return made  # type: ignore[no-any-return]


@contextlib.contextmanager
def _untraced_transformers() -> Iterator[None]:
    """While open, transformers builds the masks that it builds in a real step. It would otherwise build full attention
    masks, since it sees fake tensors and cannot read their values; here it can."""
    library: Any = sys.modules.get("transformers.utils.import_utils")
    if library is None or not hasattr(library, "is_fake_tensor"):
        yield
        return
    original = library.is_fake_tensor
    library.is_fake_tensor = lambda _: False
    try:
        yield
    finally:
        library.is_fake_tensor = original


@contextlib.contextmanager
def _kernels_of(step: FakeStep) -> Iterator[None]:
    """While open, the functions that must do something else on fake tensors, or for the target, are replaced. They are
    patched because a function mode does not work here: it is popped inside `Tensor.backward`, where recompute runs."""
    patches: list[tuple[Any, str, Any]] = []
    if step.cuda:
        patches += [
            (nn.functional, "scaled_dot_product_attention", attention_like_cuda(step.flash)),
            (nn.functional, "dropout", dropout_like_cuda),
        ]
    with _disable_current_modes():
        state_bytes = 0 if step.cuda else torch.get_rng_state().numel()
    for owner in (torch, torch.random):
        patches += [
            # a saved state is host memory, which only counts when the host is the device
            (owner, "get_rng_state", lambda: torch.empty(state_bytes, dtype=torch.uint8)),
            (owner, "set_rng_state", lambda _: None),
        ]
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in patches]
    for owner, name, replacement in patches:
        setattr(owner, name, replacement)
    try:
        yield
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)


@contextlib.contextmanager
def refusals_named(what: str) -> Iterator[None]:
    """Turn the refusals of fake tensors into `Unsupported` with the op's name."""
    try:
        yield
    except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException) as error:
        op = getattr(error, "func", error)
        raise Unsupported(
            f"{what} cannot run on fake tensors: {op} depends on values, or has no fake kernel"
        ) from error
