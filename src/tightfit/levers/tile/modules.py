"""Token-wise modules of a unit, computed over chunks of the tokens.

Invariant: a module is only chunked where its ops are shown to work row by row. Refused: everything else.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from tightfit.core import TiledModule
from tightfit.levers.tile.head import LOW, Autocast, refusal, unhooked
from tightfit.step.modes import modes_off
from tightfit.step.patches import refuse_compiled
from tightfit.step.run import tensors_in


class _Chunked(torch.autograd.Function):
    """A token-wise module over chunks of rows: holds its input alone, and runs each chunk again in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        module: nn.Module,
        forward: Callable[..., torch.Tensor],
        tiles: int,
        hidden: torch.Tensor,
        *parameters: torch.Tensor,
    ) -> torch.Tensor:
        ctx.module, ctx.run, ctx.tiles = module, forward, tiles
        ctx.autocast = Autocast.now(hidden.device)
        ctx.save_for_backward(hidden, *parameters)  # these only to see whether they are changed meanwhile
        rows = hidden.reshape(-1, hidden.shape[-1])
        out: torch.Tensor | None = None
        for part in _parts(rows.shape[0], tiles):
            with ctx.autocast.again():
                made = forward(rows[part].unsqueeze(0)).squeeze(0)
            if out is None:  # no view: what follows may add to it in place
                out = torch.empty(*hidden.shape[:-1], made.shape[-1], dtype=made.dtype, device=made.device)
            out.view(-1, made.shape[-1])[part] = made
            del made
        assert out is not None
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the plan in force computes a module in tiles, so the step has no second derivative; "
                "remove the plan, or make it without the lever TILE, to use create_graph=True"
            )
        hidden, *parameters = ctx.saved_tensors
        rows, gradient = (t.reshape(-1, t.shape[-1]) for t in (hidden, gradients[0]))
        of_hidden = torch.empty_like(rows) if ctx.needs_input_grad[3] else None
        sums = [torch.zeros_like(p, dtype=torch.float32 if p.dtype in LOW else p.dtype) for p in parameters]
        for part in _parts(rows.shape[0], ctx.tiles):
            with torch.enable_grad(), unhooked():
                given = rows[part].detach().requires_grad_(of_hidden is not None)
                with ctx.autocast.again():
                    made = ctx.run(given.unsqueeze(0)).squeeze(0)
                wanted = [given] * (of_hidden is not None) + parameters
                with Autocast(hidden.device.type, False, torch.float32).again():
                    found = iter(torch.autograd.grad(made, wanted, gradient[part], allow_unused=True))
            del made, given
            if of_hidden is not None:
                of_rows = next(found)
                of_hidden[part] = 0 if of_rows is None else of_rows
            for total, each in zip(sums, found, strict=True):
                if each is not None:
                    total += each
        scaled = [total.to(p.dtype) for total, p in zip(sums, parameters, strict=True)]
        return None, None, None, None if of_hidden is None else of_hidden.reshape(hidden.shape), *scaled


def _parts(rows: int, tiles: int) -> Iterator[slice]:
    step = max(1, -(-rows // tiles))
    for at in range(0, rows, step):
        yield slice(at, min(at + step, rows))


def chunking(module: nn.Module, tiles: int, original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
        if torch.compiler.is_compiling():
            refuse_compiled(f"a {type(module).__name__} is compiled, and the plan in force computes it in tiles")
        hidden = args[0] if len(args) == 1 and not kwargs else None
        if (
            not torch.is_grad_enabled()
            or not isinstance(hidden, torch.Tensor)
            or hidden.dim() < 2
            or hidden.shape[:-1].numel() < 2 * tiles
            or refusal(module)
        ):
            return original(*args, **kwargs)
        trained = tuple(p for p in module.parameters() if p.requires_grad)
        if not (hidden.requires_grad or trained):
            return original(*args, **kwargs)
        out: torch.Tensor = _Chunked.apply(module, original, tiles, hidden, *trained)
        return out

    forward.__tightfit__ = True  # type: ignore[attr-defined]
    return forward


def is_token_wise(module: nn.Module, width: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Does a change of one token change its row of the module's output and no other, in any bit?"""
    if refusal(module):
        return False
    tokens = 13
    generator = torch.Generator().manual_seed(0)
    given = torch.randn(1, tokens, width, generator=generator).to(device, dtype)
    with modes_off(), torch.no_grad():
        before = module.forward(given)
        if not isinstance(before, torch.Tensor) or before.shape[:-1] != given.shape[:-1]:
            return False
        for token in (0, 5, tokens - 1):
            changed = given.clone()
            changed[0, token] = changed[0, token].flip(0) * 1.5 + 0.25
            after = module.forward(changed)
            same = (after == before).all(-1)[0]
            same[token] = not same[token]
            if not bool(same.all()):
                return False
        return True


class _NotByRows(Exception):
    """An op may mix what lies along the tokens."""


class _RowProof(TorchDispatchMode):
    """Follows the rows of one input through ops on fake tensors: every tensor that depends on it must have one
    dimension of tokens, and no op may mix what lies along it. Raises `_NotByRows` at the first that may: the ops that
    follow it (a router's experts) need not run, and some cannot on a number of tokens that is made up."""

    TOKENS = 7919  # a prime that is no width

    def __init__(self, given: torch.Tensor) -> None:
        super().__init__()
        self.depends: Any = WeakIdKeyDictionary()
        self.depends[given] = True

    def _dim(self, tensor: torch.Tensor) -> int | None:
        """The dimension of tokens, from the right; None: there is none, or more than one."""
        found = [i for i, size in enumerate(tensor.shape) if size == self.TOKENS]
        others = any(size % self.TOKENS == 0 and size != self.TOKENS for size in tensor.shape)
        return found[0] - tensor.dim() if len(found) == 1 and not others else None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        given = [t for t in tensors_in((args, kwargs)) if t in self.depends]
        if given and func is not torch.ops.prim.device.default:
            for tensor in tensors_in(out):
                self.depends[tensor] = True
            if not self._keeps_rows(func, args, kwargs, given, out):
                raise _NotByRows
        return out

    def _keeps_rows(self, func: Any, args: Any, kwargs: Any, given: list[torch.Tensor], out: Any) -> bool:
        made = tensors_in(out)
        if not made or any(self._dim(t) is None for t in (*given, *made)):
            return False
        name = func._overloadpacket.__name__
        at = self._dim(given[0])
        if name in ("view", "_unsafe_view", "reshape"):
            # rows stay rows when nothing but ones lies before them, on both sides
            return all(t.shape[: t.dim() + self._dim(t)].numel() == 1 for t in (given[0], made[0]))  # type: ignore[operator]
        if func.is_view:
            return name not in ("as_strided", "diagonal", "unfold")
        if torch.Tag.pointwise in func.tags or name in ("clone", "_to_copy", "copy_", "empty_like", "zeros_like"):
            return len({self._dim(t) for t in (*given, *made)}) == 1
        if name in ("mm", "addmm", "gemm_4bit", "linear"):
            left = args[1] if name == "addmm" else args[0]
            return len(given) == 1 and given[0] is left and at == -2
        if name in ("mean", "sum", "amax", "amin", "var", "softmax", "_softmax", "_log_softmax"):
            asked: Any = args[1] if len(args) > 1 else None
            dims = [asked] if isinstance(asked, int) else list(asked or [])
            size = given[0].dim()
            return bool(dims) and at not in [d if d < 0 else d - size for d in dims]
        if name in ("native_layer_norm", "_fused_rms_norm"):
            return given[0] is args[0] and len(given) == 1 and at is not None and at < -len(args[1])
        if name == "cat":
            dim = args[1] if len(args) > 1 else 0
            return (dim if dim < 0 else dim - given[0].dim()) != at and len({self._dim(t) for t in given}) == 1
        return False


def is_token_wise_by_shape(module: nn.Module, width: int, dtype: torch.dtype) -> bool:
    """The same by the ops alone, for a module on fake tensors, inside their mode."""
    if refusal(module):
        return False
    given = torch.empty(1, _RowProof.TOKENS, width, dtype=dtype)
    try:
        with torch.no_grad(), _RowProof(given):
            out = module.forward(given)
    except _NotByRows:
        return False
    return isinstance(out, torch.Tensor) and out.shape[:-1] == given.shape[:-1]


@contextlib.contextmanager
def modules_sought(model: nn.Module, units: Sequence[str], fake: bool) -> Iterator[list[TiledModule]]:
    """While a forward runs inside, find the outermost modules of the `units` that are token-wise; filled at the end."""
    inside = {
        id(module): (unit, path.removeprefix(unit + "."))
        for unit in units
        if unit
        for path, module in model.named_modules()
        if path.startswith(unit + ".")
    }
    seen: dict[str, tuple[nn.Module, int, torch.dtype, torch.device] | None] = {}

    def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if id(module) not in inside:
            return
        _, name = inside[id(module)]
        one = args[0] if len(args) == 1 and not kwargs else None
        fits = (
            isinstance(one, torch.Tensor)
            and one.dim() == 3
            and one.is_floating_point()
            and type(output) is type(one)
            and output.shape[:-1] == one.shape[:-1]
            and one.shape[:-1].numel() >= 2 * TILES
            and _is_composite(module)
        )
        if not fits:
            seen[name] = None
        elif name not in seen and one is not None:
            seen[name] = (module, one.shape[-1], one.dtype, one.device)

    found: list[TiledModule] = []
    handle = nn.modules.module.register_module_forward_hook(note, with_kwargs=True)
    try:
        yield found
    finally:
        handle.remove()
        # torch 2.13 forgets this table, and then warns that every `torch.compile`d module has global hooks
        nn.modules.module._global_forward_hooks_with_kwargs.pop(handle.id, None)
    names: list[str] = []
    for name, call in sorted(seen.items(), key=lambda item: item[0].count(".")):
        if call is None or any(name.startswith(outer + ".") for outer in names):
            continue
        try:
            proven = is_token_wise_by_shape(*call[:3]) if fake else is_token_wise(*call)
        except Exception:  # a module that does not take another number of tokens is not tiled, whatever it raises
            continue
        if proven:
            names.append(name)
    found += [TiledModule(name=name, tiles=TILES) for name in names]


#: Into how many chunks a token-wise module is cut.
TILES = 4


def _is_composite(module: nn.Module) -> bool:
    """Worth cutting: it makes something large on the way. A linear layer does not, with or without an adapter; a norm's
    casts are small beside its neighbours, and chunks of them would double the ops of a step."""
    return any(True for _ in module.children()) and not hasattr(module, "base_layer")
