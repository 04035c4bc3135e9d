"""One training step of any model: call it, find its loss, leave no mark on it.

Invariant: `undisturbed` gives back gradients, buffers, attributes and every random state exactly as they were, also
when the step inside raises. Refused: a batch that the model does not take, a loss that is not one number, a model
with nothing to train (`InvalidInput`).
"""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import os
import platform
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from typing import Any

# The profiler, which counts bytes on the CPU, otherwise writes lines of its own to stderr; read when torch is loaded.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")

import torch
from torch import nn
from torch.utils import _pytree as pytree  # the one tree walk that also knows transformers' ModelOutput
from torch.utils._python_dispatch import TorchDispatchMode

from tightfit.core import Category, InvalidInput, Unsupported
from tightfit.parallel import (
    bucket_bytes,
    forget_step,
    gradients_are_views,
    local_of,
    require_no_step_under_way,
    resizes_told,
)

LossFunction = Callable[[nn.Module, Any], torch.Tensor]
UnitsAsked = Sequence[str | nn.Module] | str | None


def call(model: nn.Module, batch: Any) -> Any:
    """The model's output for `batch`: a mapping (keyword arguments), a tuple or list (positional) or a tensor."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (tuple, list)):
        return model(*batch)
    return model(batch)


def run_forward(model: nn.Module, batch: Any, loss: LossFunction | None = None) -> Any:
    """The model's output, or what `loss` makes of it."""
    return call(model, batch) if loss is None else loss(model, batch)


def compute_loss(model: nn.Module, batch: Any, loss: LossFunction | None = None) -> torch.Tensor:
    """The scalar to call `backward` on. Raises `InvalidInput` if it is not a scalar that depends on a parameter."""
    try:
        output = run_forward(model, batch, loss)
    except (TypeError, ValueError, IndexError, KeyError, AttributeError) as error:
        first_line = (str(error).splitlines() or [""])[0]
        raise InvalidInput(
            f"the model refuses this batch ({type(error).__name__}: {first_line}); batch is {describe(batch)}"
        ) from error
    value = output
    if not isinstance(output, torch.Tensor) and loss is None:
        value = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if not isinstance(value, torch.Tensor) or value.numel() != 1:
        found = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else describe(output)
        raise InvalidInput(f"expected a scalar loss, found {found}; pass loss=callable(model, batch) -> scalar tensor")
    if not value.requires_grad:
        raise InvalidInput("the loss depends on no trainable parameter, so there is no backward pass to plan")
    return value.reshape(()) if value.dim() else value


def describe(thing: Any) -> str:
    """`thing`'s type and, for containers of tensors, what they hold; for messages."""
    if isinstance(thing, Mapping):
        return f"{type(thing).__name__} with " + (", ".join(str(key) for key in thing) or "nothing")
    if isinstance(thing, torch.Tensor):
        return f"a {str(thing.dtype).removeprefix('torch.')} tensor of shape {tuple(thing.shape)}"
    if isinstance(thing, (tuple, list)):
        return f"{type(thing).__name__} of {len(thing)}"
    return f"{type(thing).__name__}"


def check_trainable(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise InvalidInput(f"expected a torch.nn.Module, found {type(model).__name__}")
    if not any(p.requires_grad for p in model.parameters()):
        raise InvalidInput("no parameter of the model requires a gradient: there is nothing to train")


def tensors_in(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def unique_bytes(tensors: Iterable[torch.Tensor], granule_bytes: int = 1) -> int:
    """Bytes of the distinct storages behind `tensors`, each rounded up to a multiple of `granule_bytes`."""
    sizes: dict[int, int] = {}
    for tensor in tensors:
        if tensor.layout is torch.strided:
            storage = local_of(tensor).untyped_storage()
            sizes[storage._cdata] = -(-storage.nbytes() // granule_bytes) * granule_bytes
    return sum(sizes.values())


def static_bytes_by_category(
    model: nn.Module, batch: Any = None, optimizer: torch.optim.Optimizer | None = None, granule_bytes: int = 1
) -> dict[str, int]:
    """Bytes that live through a whole step, each storage counted once; gradients only where they exist already."""
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
    state = [] if optimizer is None else [list(s.values()) for s in optimizer.state.values()]
    seen: set[int] = set()

    def new_bytes(tensors: list[torch.Tensor]) -> int:
        strided = [local_of(t) for t in tensors if t.layout is torch.strided]
        fresh = [t for t in strided if t.untyped_storage()._cdata not in seen]
        seen.update(t.untyped_storage()._cdata for t in fresh)
        return unique_bytes(fresh, granule_bytes)

    quantised = [p for p in model.parameters() if getattr(p, "quant_state", None) is not None]
    return {
        Category.QUANTISED.value: new_bytes([t for p in quantised for t in parameter_tensors(p)]),
        Category.PARAMETERS.value: new_bytes([t for p in model.parameters() for t in parameter_tensors(p)]),
        Category.GRADIENTS.value: new_bytes([p.grad for p in model.parameters() if p.grad is not None]),
        Category.BUFFERS.value: new_bytes(list(model.buffers())),
        Category.INPUTS.value: new_bytes(tensors_in(batch)),
        Category.OPTIMIZER_STATE.value: new_bytes(tensors_in(state)),
        **_of_buckets(model),
    }


def _of_buckets(model: nn.Module) -> dict[str, int]:
    size_bytes = bucket_bytes(model)
    if gradients_are_views(model):
        grown = sum(p.grad.numel() * p.grad.element_size() for p in model.parameters() if p.grad is not None)
        size_bytes = max(0, size_bytes - grown)
    return {Category.COLLECTIVES.value: size_bytes} if size_bytes else {}


def parameter_tensors(parameter: nn.Parameter) -> list[torch.Tensor]:
    """The parameter and what belongs to it: a 4-bit weight carries its scales in `quant_state`."""
    if isinstance(parameter, nn.parameter.UninitializedParameter):
        raise InvalidInput("the model has a lazy module that has not seen a batch yet; call the model once first")
    found: list[torch.Tensor] = [parameter.data]
    state = getattr(parameter, "quant_state", None)
    while state is not None:
        for attribute in ("absmax", "code", "offset"):
            tensor = getattr(state, attribute, None)
            if isinstance(tensor, torch.Tensor):
                found.append(tensor)
        state = getattr(state, "state2", None)
    return found


def device_of(model: nn.Module) -> torch.device:
    """The device that a step's peak is counted on: that of the first accelerator parameter, else the CPU."""
    devices = [p.device for p in model.parameters()]
    return next((d for d in devices if d.type not in ("cpu", "meta")), devices[0] if devices else torch.device("cpu"))


@contextlib.contextmanager
def undisturbed(model: nn.Module, batch: Any = None) -> Iterator[Restart]:
    """Run steps inside; afterwards gradients (those of the batch's leaves too), buffers, plain attributes and random
    states are what they were, and so is whatever the ops of a step wrote that `Restart` was told of.

    Yields `restart`, which puts the model at the start of a step again, so that every pass inside sees the same
    step. A parameter that came with a gradient has a zero one inside, so that accumulation shows its true
    memory; one that came without starts without.
    """
    restart = Restart(model, batch)
    restart()
    try:
        yield restart
    finally:
        restart.give_back()


_PLAIN = (bool, int, float, complex, str, type(None), torch.Tensor)

_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks",
)  # fmt: skip

#: Ops that write their running statistics without saying so in their schema.
_HIDDEN_WRITES = "running_"


class Restart:
    """What a model was like at the start; called, it puts that back.

    What is small or hidden is copied beforehand: buffers, scalar attributes, random states. Weights are not: whoever
    runs the first passes says of each op `before` and `after` it (`watching` does), and what an op is about to write
    that was there before the passes is copied then, as copy on write does. The same tells of generators and of leaves
    that only the loss function knows.
    """

    def __init__(self, model: nn.Module, batch: Any = None) -> None:
        require_no_step_under_way(model)
        self._forget = functools.partial(forget_step, model)
        self._forget()
        leaves = [t for t in tensors_in(batch) if t.is_leaf and t.requires_grad]
        self._gradients: list[tuple[torch.Tensor, torch.Tensor | None]] = [
            (p, p.grad) for p in (*model.parameters(), *leaves)
        ]
        self._leaves = {id(p) for p, _ in self._gradients}
        self._buffers = [(b, b.detach().clone(), b._version) for b in model.buffers() if not b.is_meta]
        self._data = [(p, p.data) for p in model.parameters() if _storage_of(p) is not None]
        modules = list(model.modules())
        tables: list[Any] = [table for module in modules for table in (module._parameters, module._buffers)]
        # a first forward may install hooks and note that it did (transformers, for outputs it is asked for): they go
        # with the note, or every pass would install them once more
        tables += [table for module in modules for name in _HOOKS if (table := vars(module).get(name)) is not None]
        # those of a TorchScript module are no dicts and cannot be assigned to
        self._tables = [(table, dict(table)) for table in tables if isinstance(table, dict)]
        # the patches of a plan or a trace are put into `forward` and taken out by whoever put them there
        self._attributes = [(m, {k: v for k, v in vars(m).items() if k != "forward"}) for m in modules]
        self._states = random_states()
        self._generators: dict[int, tuple[torch.Generator, torch.Tensor]] = {}
        for _, attributes in self._attributes:
            self._note_generators(attributes.values())
        self._made: set[int] = set()
        self._written: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def __call__(self) -> None:
        self._forget()
        for parameter, gradient in self._gradients:
            parameter.grad = None
            if gradient is not None:
                parameter.grad = torch.zeros_like(gradient)
        self._put_back()

    def give_back(self) -> None:
        """As it was before the first pass, gradients included."""
        self._forget()
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        self._put_back()

    def _put_back(self) -> None:
        for module, before in self._attributes:
            now = vars(module)
            for name in [n for n, v in now.items() if n not in before and n != "forward" and isinstance(v, _PLAIN)]:
                del now[name]
            for name, value in before.items():
                if isinstance(value, _PLAIN) and now.get(name, _PLAIN) is not value:
                    now[name] = value
        for table, content in self._tables:
            if table.keys() != content.keys() or any(table[name] is not each for name, each in content.items()):
                table.clear()
                table.update(content)
        for parameter, data in self._data:
            if _storage_of(parameter) != _storage_of(data):
                parameter.data = data
        with torch.no_grad():
            for storage, bytes_before in self._written.values():
                storage.copy_(bytes_before)
            for buffer, saved, version in self._buffers:
                if buffer.layout is not torch.strided:  # torch does not compare sparse ones
                    if buffer._version != version:
                        buffer.copy_(saved)
                elif not torch.equal(buffer, saved):
                    buffer.copy_(saved)
        for generator, state in self._generators.values():
            generator.set_state(state)
        restore_random_states(self._states)

    # -- what the ops of a step tell

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Learn from the ops that run inside; not for a pass that is measured."""
        with resizes_told(lambda storage, _: self.filled(storage)), _Watching(self):
            yield

    def before(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> None:
        """`func` is about to run."""
        self._note_generators((*args, *kwargs.values()))
        for tensor in tensors_in((args, kwargs)):
            if not (tensor.requires_grad and tensor.is_leaf) or id(tensor) in self._leaves:
                continue
            if _storage_of(tensor) not in self._made:
                self._leaves.add(id(tensor))
                self._gradients.append((tensor, tensor.grad))
                if tensor.grad is not None:  # this pass would add to it
                    with torch.no_grad():
                        tensor.grad = torch.zeros_like(tensor.grad)
        schema = func._schema
        for position, argument in enumerate(schema.arguments):
            writes = argument.alias_info is not None and argument.alias_info.is_write
            if writes or argument.name.startswith(_HIDDEN_WRITES):
                target = kwargs.get(argument.name, args[position] if position < len(args) else None)
                for tensor in tensors_in(target):
                    self._keep(tensor)

    def after(self, args: Any, kwargs: Mapping[str, Any], out: Any) -> None:
        """The op has run and given `out`."""
        made = {_storage_of(tensor) for tensor in tensors_in(out)}
        if made:
            made -= {_storage_of(tensor) for tensor in tensors_in((args, kwargs))}
            self._made.update(address for address in made if address is not None)

    def filled(self, storage: torch.UntypedStorage) -> None:
        """What is in it was made in this pass, and goes before its end."""
        self._made.add(storage._cdata)

    def _keep(self, tensor: torch.Tensor) -> None:
        address = _storage_of(tensor)
        if address is None or address in self._made or address in self._written or tensor.is_meta:
            return
        if any(p.grad is not None and _storage_of(p.grad) == address for p, _ in self._gradients):
            return  # the zero gradients of a pass; the real ones are out of reach
        storage = local_of(tensor).untyped_storage()
        self._written[address] = storage, storage.clone()

    def _note_generators(self, items: Iterable[Any]) -> None:
        for item in items:
            if isinstance(item, torch.Generator) and id(item) not in self._generators:
                self._generators[id(item)] = item, item.get_state()


class _Watching(TorchDispatchMode):
    def __init__(self, restart: Restart) -> None:
        super().__init__()
        self.restart = restart

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.restart.before(func, args, kwargs or {})
        out = func(*args, **(kwargs or {}))
        self.restart.after(args, kwargs or {}, out)
        return out


def _storage_of(tensor: torch.Tensor) -> int | None:
    """The address of its storage; None for a tensor that has none of its own."""
    if tensor.layout is not torch.strided:
        return None
    try:
        return int(local_of(tensor).untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError, ValueError):
        return None


@contextlib.contextmanager
def no_key_value_cache(model: nn.Module) -> Iterator[None]:
    """Switch a transformers model's generation cache off: in training it is never read, and a unit that appends
    to it cannot be run twice. Every `config.use_cache` is put back afterwards."""
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    switched = [c for c in configs.values() if getattr(c, "use_cache", False) is True]
    for config in switched:
        config.use_cache = False
    try:
        yield
    finally:
        for config in switched:
            config.use_cache = True


def random_states() -> dict[str, Any]:
    """Every generator's state: torch's on each device, Python's, NumPy's."""
    states: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state_all()
    with contextlib.suppress(ImportError):
        import numpy

        states["numpy"] = numpy.random.get_state()
    return states


def restore_random_states(states: Mapping[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    random.setstate(states["python"])
    if "cuda" in states:
        torch.cuda.set_rng_state_all(states["cuda"])
    if "numpy" in states:
        import numpy

        numpy.random.set_state(states["numpy"])


# -------------------------------------------------------------------------------------------- compiled


def unwrapped(module: nn.Module) -> nn.Module:
    """The module itself: what `torch.compile(module)` returns is a wrapper around it."""
    while type(module).__name__ == "OptimizedModule":
        module = module._orig_mod  # type: ignore[assignment]
    return module


def modules_of(model: nn.Module) -> dict[str, nn.Module]:
    """As `named_modules`, without the wrappers of `torch.compile`: a plan has the same paths with and without them."""
    return {_plain_path(path): module for path, module in model.named_modules() if unwrapped(module) is module}


def compiled_entries(model: nn.Module) -> dict[str, nn.Module]:
    """Path to module of what runs compiled when it is called: `torch.compile(module)`, `module.compile()`."""
    return {
        _plain_path(path): module
        for path, module in model.named_modules()
        if unwrapped(module) is not module or vars(module).get("_compiled_call_impl") is not None
    }


def _plain_path(path: str) -> str:
    return ".".join(part for part in path.split(".") if part != "_orig_mod")


def refuse_compiled(what: str) -> None:
    """Raise `Unsupported`. The compiler leaves its own code for this, so that the error reaches the user as it is."""
    raise Unsupported(f"{what}; compiled code cannot do that: leave it out of what is compiled")


# as torch.compiler.disable does, which takes a second to load
refuse_compiled._torchdynamo_disable = True  # type: ignore[attr-defined]


def cpu_profile(*, memory: bool = True) -> torch.profiler.profile:
    """What the profiler tells of the CPU's ops, and with `memory` of each block that comes and goes."""
    return torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU],
        profile_memory=memory,
        acc_events=True,  # changes nothing for one cycle, but that torch 2.11 does not warn of others
    )


def own_checkpointing(model: nn.Module) -> list[Any]:
    """The modules of `model` whose own checkpointing is switched on, as transformers' models have it."""
    return [module for module in model.modules() if getattr(module, "gradient_checkpointing", False) is True]


@contextlib.contextmanager
def own_checkpointing_off(model: nn.Module) -> Iterator[None]:
    """The model's own checkpointing makes way inside, and is on again afterwards where it was."""
    modules = own_checkpointing(model)
    for module in modules:
        module.gradient_checkpointing = False
    try:
        yield
    finally:
        for module in modules:
            module.gradient_checkpointing = True


@contextlib.contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Run what is compiled in `model` op by op inside."""
    if not compiled_entries(model):
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


# ----------------------------------------------------------------------------------------------- units


def find_units(model: nn.Module, asked: UnitsAsked = None) -> dict[str, nn.Module]:
    """Path to module of each unit, in the order of `named_modules`.

    `asked=None` takes the outermost repeated blocks of `ModuleList`s and `Sequential`s; without any, the
    composite children of the first module that has several; without those, the model itself. Otherwise
    `asked` holds paths, shell patterns (`"layers.*"`) or modules.

    Raises `InvalidInput` when nothing matches or one unit lies inside another.
    """
    model = unwrapped(model)
    modules = modules_of(model)
    if asked is None:
        found = repeated_blocks(model) or _composite_children(model)
    else:
        wanted = [asked] if isinstance(asked, (str, nn.Module)) else list(asked)
        found = {}
        for item in wanted:
            if isinstance(item, nn.Module):
                item = unwrapped(item)
                matches = [path for path, module in modules.items() if module is item]
            else:
                matches = [path for path in modules if path == item] or fnmatch.filter(modules, item)
                # `layers.*` means the layers, not everything below them: a shell star does not cross a dot
                matches = [path for path in matches if path.count(".") == item.count(".")]
            if not matches:
                name = item if isinstance(item, str) else type(item).__name__
                raise InvalidInput(f"no module of the model matches the unit {name!r}")
            found.update({path: modules[path] for path in matches})
    paths = sorted(found)
    for outer in paths:
        for inner in paths:
            if inner != outer and (outer == "" or inner.startswith(outer + ".")):
                raise InvalidInput(f"unit {inner!r} lies inside unit {outer!r}: choose one of them")
    return {path: module for path, module in modules.items() if path in found}


def children_of(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """As `named_children`, without the wrappers of `torch.compile`."""
    return ((name, unwrapped(child)) for name, child in module.named_children())


def _is_block(module: nn.Module) -> bool:
    """A module worth planning as a whole: one with parts, or a custom one; not a bare `nn.Linear`."""
    return any(True for _ in module.children()) or not type(module).__module__.startswith("torch.nn.")


def repeated_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Path to module of the outermost blocks of `ModuleList`s and `Sequential`s; none where there is but one."""
    return _repeated_blocks(unwrapped(model), "")


def _repeated_blocks(module: nn.Module, path: str) -> dict[str, nn.Module]:
    found: dict[str, nn.Module] = {}
    for name, child in children_of(module):
        child_path = f"{path}.{name}" if path else name
        inside_list = isinstance(module, (nn.ModuleList, nn.Sequential))
        if inside_list and _is_block(child) and not isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            # a Sequential of blocks inside a list (a ResNet's stages) is opened, one of bare layers is a block
            inner = _repeated_blocks(child, child_path) if isinstance(child, nn.Sequential) else {}
            found.update(inner or {child_path: child})
        else:
            found.update(_repeated_blocks(child, child_path))
    return found if len(found) > 1 or path else {}


def _composite_children(model: nn.Module) -> dict[str, nn.Module]:
    path, module = "", model
    while True:
        parts = {name: child for name, child in children_of(module) if _is_block(child)}
        if len(parts) > 1:
            return {f"{path}.{name}" if path else name: child for name, child in parts.items()}
        if not parts:
            return {"": model}
        ((name, module),) = parts.items()
        path = f"{path}.{name}" if path else name


class _Replacement:
    """What stands in a module's `forward`. In a copy of the module, a pickled one too, it is the plain `forward`."""

    def __init__(self, module: nn.Module, original: Callable[..., Any], had_own: bool, run: Callable[..., Any]) -> None:
        functools.update_wrapper(self, original)
        self.__dict__.update(vars(run))
        self._module, self._original, self._had_own, self._run = module, original, had_own, run

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._run(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        if self._had_own:
            return functools.partial, (self._original,)
        return getattr, (self._module, "forward")  # asked of the copy while that has no attributes yet: its class's


class ForwardPatch:
    """A module whose `forward` is replaced; `undo` puts back exactly what was there."""

    def __init__(self, module: nn.Module, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        if isinstance(module, torch.jit.ScriptModule):
            raise Unsupported(f"{type(module).__name__} is a TorchScript module: its forward cannot be planned")
        self.module = module
        self.had_own = "forward" in module.__dict__
        self.original = module.forward
        self.replacement: Any = _Replacement(module, self.original, self.had_own, make(self.original))
        module.forward = self.replacement

    def redo(self) -> bool:
        """Replace it again, by the same object; False, and nothing done, where another `forward` is there by now."""
        if self.module.forward != self.original or ("forward" in self.module.__dict__) != self.had_own:
            return False
        self.module.forward = self.replacement
        return True

    def undo(self) -> None:
        if self.had_own:
            self.module.forward = self.original
        else:
            del self.module.__dict__["forward"]


# ----------------------------------------------------------------------------------------- environment

_PACKAGES = (
    "tightfit", "torch", "transformers", "peft", "trl", "accelerate", "bitsandbytes", "safetensors", "highspy", "numpy",
)  # fmt: skip


def versions() -> dict[str, str]:
    """Installed versions of the packages that a result can depend on."""
    found = {}
    for package in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def host_memory_bytes() -> int | None:
    """Physical memory of this machine; `None` where the system does not say."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None


def environment() -> dict[str, str]:
    """What a measurement depends on besides the model: versions, runtime, machine, threads."""
    record = {
        **versions(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cpu_count": str(os.cpu_count()),
        "torch_threads": str(torch.get_num_threads()),
        "deterministic_algorithms": str(torch.are_deterministic_algorithms_enabled()),
    }
    if (host := host_memory_bytes()) is not None:
        record["memory_bytes"] = str(host)
    if torch.cuda.is_available():
        record["cuda"] = str(torch.version.cuda)
        record["cuda_devices"] = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    return record
