"""The traps, each with the probe that tells whether the installed versions have it, and what it looks at.

A probe does the thing on a tiny model and looks at the outcome: a gradient, a peak by the allocator's count, an
autograd node; it knows no version numbers. A run, a live model or a step's peak is only inspected.

Invariant: a probe leaves the random state and what is printed as they were. That it cannot run is never taken for a
clean bill: it is `CANNOT_TELL`, with the reason.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import importlib.util
import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tightfit.core import Category, format_bytes
from tightfit.doctor.peak import NOTHING, Why
from tightfit.doctor.run import Run, is_true
from tightfit.forecast import Setup
from tightfit.measure import every_block_checkpointed
from tightfit.step import find_units
from tightfit.verify import PeakMeter

__all__ = ["TRAPS", "Seen", "Trap", "Verdict", "cannot_tell", "probed"]


class Verdict(enum.Enum):
    BITES = "bites"
    NOT_HERE = "not here"
    CANNOT_TELL = "cannot tell"


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What was found, in one sentence, and its figures (bytes, relative errors, counts)."""

    verdict: Verdict
    why: str
    figures: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trap:
    name: str
    sentence: str
    mend: str
    packages: tuple[str, ...]
    probe: Callable[[], Seen]
    of_run: Callable[[Run], Seen | None] = lambda _: None
    of_model: Callable[[nn.Module], Seen | None] = lambda _: None
    of_setup: Callable[[Setup], Seen | None] = lambda _: None  # of a step whose run is not known
    of_peak: Callable[[Why], Seen | None] = lambda _: None
    asks: str = "the run's YAML"  # what would have to be given to tell
    deep: Callable[[], Seen] | None = None  # a slower probe, in place of `probe`


def _bites(why: str, **figures: Any) -> Seen:
    return Seen(verdict=Verdict.BITES, why=why, figures=figures)


def _not_here(why: str, **figures: Any) -> Seen:
    return Seen(verdict=Verdict.NOT_HERE, why=why, figures=figures)


def cannot_tell(why: str, **figures: Any) -> Seen:
    return Seen(verdict=Verdict.CANNOT_TELL, why=why, figures=figures)


# ----------------------------------------------------------------------------------------- tiny models


def _tiny(kind: str = "llama", *, layers: int = 2, **changed: Any) -> Any:
    """A model of a few thousand parameters in training mode, always the same one."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shapes: dict[str, dict[str, Any]] = {
        "gpt2": {
            "vocab_size": 64, "n_positions": 64, "n_embd": 32, "n_layer": layers, "n_head": 2,
            "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
        },
        "llama": {
            "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": layers,
            "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64,
        },
    }  # fmt: skip
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**shapes[kind], **changed})
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").train()


def _batch(batch: int = 1, seq: int = 32) -> dict[str, torch.Tensor]:
    ids = (torch.arange(batch * seq) * 7 % 61).view(batch, seq)
    return {"input_ids": ids, "labels": ids}


def _gradients(model: nn.Module, **said: Any) -> list[torch.Tensor | None]:
    """Of the trainable parameters in order, after one step from the same random state."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(1)
    model(**_batch(), use_cache=False, **said).loss.backward()
    return [p.grad for p in model.parameters() if p.requires_grad]


def _error(found: Iterable[torch.Tensor | None], expected: Iterable[torch.Tensor | None]) -> float:
    """Norm of the difference over the norm of what was expected; a missing gradient counts as zero."""
    pairs = [(f, e) for f, e in zip(found, expected, strict=True) if e is not None]
    off = sum(float((e if f is None else f - e).double().square().sum()) for f, e in pairs)
    return float((off / sum(float(e.double().square().sum()) for _, e in pairs)) ** 0.5)


def _peak(model: nn.Module, batch: Mapping[str, torch.Tensor], **said: Any) -> int:
    """What forward and backward add at most, by the allocator's count."""
    model.zero_grad(set_to_none=True)
    with PeakMeter("cpu") as meter:
        model(**batch, **said).loss.backward()
    return meter.rise_bytes


@contextlib.contextmanager
def _alone() -> Iterator[list[str]]:
    """A probe's surroundings: the random state is put back, nothing is printed, warnings are collected."""
    said: list[str] = []
    disabled = logging.root.manager.disable
    out = io.StringIO()
    with (
        torch.random.fork_rng(devices=()),
        warnings.catch_warnings(record=True) as caught,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(out),
    ):
        warnings.simplefilter("always")
        logging.disable(logging.CRITICAL)
        try:
            yield said
        finally:
            logging.disable(disabled)
            said += [str(each.message) for each in caught]


# ---------------------------------------------------------------------------------------------- traps
# Each trap: its probe, then what it sees in a run, a model, or the peak of a step.


def _is_reentrant(function: Any) -> bool | None:
    """Does this checkpoint function, bound as transformers does, go the reentrant way? `None`: it is another one."""
    if not isinstance(function, functools.partial):
        return None
    found = function.keywords.get("use_reentrant")
    return True if found is None else bool(found)


def _switched_on(model: nn.Module) -> list[tuple[str, Any]]:
    """(path, checkpoint function) of the modules that transformers' switch has on; not those that only hold others."""

    def has_flag(module: nn.Module) -> bool:
        return isinstance(getattr(module, "gradient_checkpointing", None), bool)

    return [
        (path, getattr(module, "_gradient_checkpointing_func", None))
        for path, module in model.named_modules()
        if has_flag(module)
        and module.gradient_checkpointing is True
        and not any(has_flag(inner) for inner in module.modules() if inner is not module)
    ]


def _wrapped(model: nn.Module) -> list[tuple[str, Any]]:
    """(path, wrapper) of torch's checkpoint wrappers, which FSDP's helpers put on."""
    return [(path, module) for path, module in model.named_modules() if type(module).__name__ == "CheckpointWrapper"]


def _node_with(arguments: Any) -> str:
    model = _tiny()
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(arguments)
    seen: list[str] = []
    hook = model.model.layers[0].register_forward_hook(
        lambda module, given, out: seen.append(type((out[0] if isinstance(out, tuple) else out).grad_fn).__name__)
    )
    model(**_batch(), use_cache=False)
    hook.remove()
    return seen[0]


def _probe_reentrant() -> Seen:
    nodes = {name: _node_with(given) for name, given in (("None", None), ("{}", {}))}
    reentrant = {name: node.startswith("CheckpointFunction") for name, node in nodes.items()}
    peft = None
    if importlib.util.find_spec("peft") is not None:
        from peft import prepare_model_for_kbit_training

        model = _tiny()
        model.is_loaded_in_4bit = True  # what it asks before it switches checkpointing on
        functions = [function for _, function in _switched_on(prepare_model_for_kbit_training(model))]
        peft = any(_is_reentrant(function) for function in functions)
    figures = {"nodes": nodes, "peft_prepare_for_kbit_is_reentrant": peft}
    told = "; peft's prepare_model_for_kbit_training leaves it reentrant too" if peft else ""
    if not any(reentrant.values()):
        return (_bites if peft else _not_here)(f"{{}} and nothing both give the non-reentrant way{told}", **figures)
    way = " and ".join(name for name, found in reentrant.items() if found)
    return _bites(
        f"activation_checkpointing_enable({way}) makes a {nodes['{}']} node, where None makes a {nodes['None']}{told}",
        **figures,
    )


def _reentrant_run(run: Run) -> Seen | None:
    if run.trainer == "accelerate":
        return None
    if not run.checkpointing:
        return _not_here("the run has activation checkpointing off")
    said = dict(run.checkpoint_kwargs)
    if said.get("use_reentrant"):
        return _bites("the run asks for use_reentrant: true")
    rest = [key for key in said if key not in ("every_n_layers", "offload", "selective")]
    if "use_reentrant" in said or not rest:
        return _not_here("the Trainer turns an empty or missing dict of arguments into use_reentrant=False")
    return _bites(
        f"its checkpointing arguments ({', '.join(rest)}) leave out use_reentrant, so torch's own default holds"
    )


def _reentrant_model(model: nn.Module) -> Seen | None:
    paths = [path for path, function in _switched_on(model) if _is_reentrant(function)]
    paths += [
        path for path, wrapper in _wrapped(model)
        if "REENTRANT" in str(getattr(wrapper, "checkpoint_impl", "")) and "NO_" not in str(wrapper.checkpoint_impl)
    ]  # fmt: skip
    if paths:
        return _bites(
            f"{len(paths)} modules are checkpointed the reentrant way, the first is {paths[0] or 'the model'}"
        )
    return _not_here("no module is checkpointed the reentrant way")


def _lora(model: Any) -> Any:
    from tightfit.integrations.peft import add_lora

    return add_lora(model, rank=2)


def _checkpoint_by_hand(model: Any, reentrant: bool) -> None:
    for layer in model.model.layers:
        forward = layer.forward

        def run(*args: Any, _forward: Any = forward, **kwargs: Any) -> Any:
            return checkpoint(functools.partial(_forward, **kwargs), *args, use_reentrant=reentrant)

        layer.forward = run


def _missing(make: Callable[[], Any]) -> tuple[int, int]:
    """(trainable parameters without a gradient, all of them); a loss that needs no gradient leaves all without."""
    model = make()
    trainable = [p for p in model.parameters() if p.requires_grad]
    try:
        return sum(gradient is None for gradient in _gradients(model)), len(trainable)
    except RuntimeError as error:
        if "does not require grad" not in str(error):
            raise
        return len(trainable), len(trainable)


def _probe_missing_input_gradients() -> Seen:
    def by_switch() -> Any:
        model = _lora(_tiny())
        base = model.get_base_model()
        enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
        enable({"use_reentrant": True})
        return model

    def by_hand(reentrant: bool) -> Any:
        model = _tiny()
        adapted = _lora(model)
        _checkpoint_by_hand(model, reentrant)
        return adapted

    (switch, count), (hand, _), (other, _) = (
        _missing(make) for make in (by_switch, lambda: by_hand(True), lambda: by_hand(False))
    )
    figures = {
        "parameters": count,
        "missing_by_switch": switch,
        "missing_by_hand": hand,
        "missing_non_reentrant": other,
    }
    told = (
        f"a LoRA model checkpointed the reentrant way by hand: {hand} of {count} trainable parameters get no gradient"
    )
    switched = (
        f"transformers' own switch makes the inputs require gradients itself ({switch} missing)"
        if not switch
        else f"so do {switch} with transformers' own switch"
    )
    if hand or switch or other:
        return _bites(f"{told}; {switched}; the non-reentrant way: {other} missing", **figures)
    return _not_here(f"every gradient is there; {switched}", **figures)


def _missing_input_gradients_run(run: Run) -> Seen | None:
    if run.trainer == "accelerate":
        return None
    return _not_here("transformers' switch, which the Trainer uses, makes the inputs require gradients")


def _missing_input_gradients_setup(setup: Setup) -> Seen | None:
    if setup.method == "full":
        return _not_here("the embeddings are trained, so their output requires gradients")
    return cannot_tell("the embeddings are frozen: it bites a loop that checkpoints the reentrant way by hand")


def _missing_input_gradients_model(model: nn.Module) -> Seen | None:
    reentrant = _reentrant_model(model)
    if reentrant is None or reentrant.verdict is not Verdict.BITES:
        return _not_here("no module is checkpointed the reentrant way")
    find = getattr(model, "get_input_embeddings", None)
    embeddings = find() if callable(find) else None
    if embeddings is None:
        return cannot_tell("the model has no input embeddings that could be asked")
    if any(p.requires_grad for p in embeddings.parameters()) or embeddings._forward_hooks:
        return _not_here("the input embeddings are trainable, or a hook makes their output require gradients")
    return _bites("checkpointing is reentrant, and the frozen embeddings' output requires no gradient")


def _probe_stale_hook() -> Seen:
    model = _tiny(layers=4)
    for layer in model.model.layers[:3]:
        layer.requires_grad_(False)
    model.get_input_embeddings().requires_grad_(False)
    _peak(model, _batch(), use_cache=False)
    before = _peak(model, _batch(), use_cache=False)
    (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()
    (getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable)()
    after = _peak(model, _batch(), use_cache=False)
    model.disable_input_require_grads()
    mended = _peak(model, _batch(), use_cache=False)
    figures = {"peak_bytes_before": before, "peak_bytes_after": after, "peak_bytes_mended": mended}
    told = (
        f"checkpointing switched on and off again: the peak of a step with 3 of 4 layers frozen went from "
        f"{format_bytes(before)} to {format_bytes(after)}"
    )
    if after > before * 1.01:
        return _bites(f"{told}; with the hook removed it is {format_bytes(mended)}", **figures)
    return _not_here(told, **figures)


def _stale_hook_run(run: Run) -> Seen | None:
    if run.trainer == "accelerate":
        return None
    if not run.checkpointing:
        return _not_here("the run has activation checkpointing off")
    return _not_here("the first block has adapters or is trained, so there is no frozen prefix to keep")


def _stale_hook_setup(setup: Setup) -> Seen | None:
    return _not_here("the first block has adapters or is trained, so there is no frozen prefix to keep")


def _stale_hook_model(model: nn.Module) -> Seen | None:
    find = getattr(model, "get_input_embeddings", None)
    embeddings = find() if callable(find) else None
    if embeddings is None or any(p.requires_grad for p in embeddings.parameters()):
        return _not_here("the input embeddings are trained, or there are none")
    hooks = [getattr(hook, "__name__", "") for hook in embeddings._forward_hooks.values()]
    if "make_inputs_require_grads" not in hooks:
        return _not_here("no hook makes the frozen embeddings' output require gradients")
    reentrant = _reentrant_model(model)
    if reentrant is not None and reentrant.verdict is Verdict.BITES:
        return _not_here("the hook is needed: checkpointing is reentrant")
    units = find_units(model)
    frozen = 0
    for unit in units.values():
        if any(p.requires_grad for p in unit.parameters()):
            break
        frozen += 1
    if frozen:
        return _bites(f"{frozen} of {len(units)} units come before the first trainable one, and are kept for its hook")
    return _not_here("the first unit is trained, so there is no frozen prefix to keep")


def _probe_use_cache() -> Seen:
    batch = _batch(2, 64)
    peaks = {}
    for kind in ("gpt2", "llama"):
        model = _tiny(kind, layers=4)
        _peak(model, batch, use_cache=True)
        for name, context in (
            ("plain", contextlib.nullcontext),
            ("checkpointed", functools.partial(every_block_checkpointed, model)),
        ):
            with context():
                for cache in (True, False):
                    peaks[f"{kind}_{name}_{'cache' if cache else 'no_cache'}_bytes"] = _peak(
                        model, batch, use_cache=cache
                    )
        (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()
        peaks[f"{kind}_switch_cache_bytes"] = _peak(model, batch, use_cache=True)
    pairs = {
        f"{kind}, {said}": (peaks[f"{kind}_{name}_cache_bytes"], peaks[f"{kind}_{name}_no_cache_bytes"])
        for kind in ("gpt2", "llama")
        for name, said in (("checkpointed", "torch.utils.checkpoint around every block"), ("plain", "no checkpointing"))
    }
    worst = max(pairs, key=lambda name: pairs[name][0] / pairs[name][1])
    with_cache, without = pairs[worst]
    told = f"{worst}: {format_bytes(with_cache)} with the cache, {format_bytes(without)} without"
    switch = all(
        peaks[f"{k}_switch_cache_bytes"] <= peaks[f"{k}_checkpointed_no_cache_bytes"] * 1.01 for k in ("gpt2", "llama")
    )
    told += "; transformers' own switch drops the cache itself" if switch else "; so does transformers' own switch"
    return (_bites if with_cache > without * 1.01 else _not_here)(told, **peaks)


def _use_cache_run(run: Run) -> Seen | None:
    if run.trainer == "accelerate":
        return None
    if is_true(run.get("use_cache")) and not run.checkpointing:
        return _bites("the run says use_cache: true and does not checkpoint")
    return _not_here("the Trainer sets config.use_cache from its own argument, which is off here, or drops the cache")


def _use_cache_setup(setup: Setup) -> Seen | None:
    if not getattr(_config(setup.model), "use_cache", False):
        return _not_here("config.use_cache is off")
    return cannot_tell("config.use_cache is on: the Trainer switches it off, a loop of your own has to")


def _config(name: str) -> Any:
    from tightfit.integrations.transformers import config_named

    config = config_named(name)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _use_cache_model(model: nn.Module) -> Seen | None:
    config = getattr(model, "config", None)
    if not getattr(config, "use_cache", False):
        return _not_here("config.use_cache is off")
    on = _switched_on(model)
    if on and len(on) >= len(find_units(model)):
        return _not_here("config.use_cache is on, but transformers' checkpointing drops the cache in every layer")
    return _bites("config.use_cache is on: a call of the model in training keeps every layer's keys and values")


def _probe_fsdp2_random_state() -> Seen:
    from accelerate.utils.fsdp_utils import fsdp2_apply_ac

    def model(dropout: float) -> Any:
        return _tiny("gpt2", resid_pdrop=dropout)

    def wrapped(dropout: float) -> Any:
        made = model(dropout)
        plugin = SimpleNamespace(
            auto_wrap_policy=None, activation_checkpointing_offload=False, transformer_cls_names_to_wrap=["GPT2Block"]
        )
        from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

        plugin.auto_wrap_policy = functools.partial(
            transformer_auto_wrap_policy, transformer_layer_cls={type(made.transformer.h[0])}
        )
        accelerator: Any = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin))
        return fsdp2_apply_ac(accelerator, made)

    made = wrapped(0.1)
    if not _wrapped(made):
        return cannot_tell("accelerate's fsdp2_apply_ac wrapped no block of the probe's model")
    error = _error(_gradients(made), _gradients(model(0.1)))
    quiet = _error(_gradients(wrapped(0.0)), _gradients(model(0.0)))
    mended = _error(_gradients(_preserving(wrapped(0.1))), _gradients(model(0.1)))
    figures = {"relative_error": error, "relative_error_without_dropout": quiet, "relative_error_mended": mended}
    told = (
        f"GPT-2 blocks with dropout 0.1 under accelerate's fsdp2_apply_ac: gradients off by {error:.2g} of their norm, "
        f"without an error; {quiet:.2g} without dropout, {mended:.2g} with the state preserved"
    )
    return (_bites if error > 1e-3 else _not_here)(told, **figures)


def _preserving(model: Any) -> Any:
    """The mend of the trap: every checkpoint wrapper keeps the random state."""
    for _, wrapper in _wrapped(model):
        wrapper.checkpoint_fn.keywords["preserve_rng_state"] = True
    return model


def _draws_random_numbers(run: Run) -> Seen | str:
    """Which dropout the run's blocks have, or why that is not known."""
    if is_true(run.get("use_peft")) and float(run.get("lora_dropout") or 0) > 0:
        return f"lora_dropout {run.get('lora_dropout')}"
    name = run.values.get("model_name_or_path")
    if name is None:
        return cannot_tell("the random state is not preserved, but the run names no model, so its dropout is unknown")
    found = _dropouts(_config(str(name)))
    return found or _not_here("the blocks draw no random numbers: every dropout of the config is 0")


def _dropouts(config: Any) -> str:
    said = vars(config)
    found = [
        f"{key} {value}" for key, value in said.items()
        if ("dropout" in key or key.endswith("_pdrop")) and isinstance(value, float) and value > 0
        and not key.startswith(("embd", "embed", "classifier", "summary"))
    ]  # fmt: skip
    return ", ".join(found)


def _random_state_run(run: Run) -> Seen | None:
    fsdp = run.fsdp
    unpreserved = run.checkpointing and run.checkpoint_kwargs.get("preserve_rng_state") is False
    version = str(fsdp.get("version", fsdp.get("fsdp_version", 1)))
    helper = is_true(fsdp.get("activation_checkpointing")) and version == "2"
    if not unpreserved and not helper:
        how = "FSDP's own activation checkpointing is off or its version is 1" if fsdp else "the run uses no FSDP"
        return _not_here(f"{how}, and preserve_rng_state is not switched off")
    drawn = _draws_random_numbers(run)
    if isinstance(drawn, Seen):
        return drawn
    return _bites(f"{'FSDP2 checkpoints' if helper else 'preserve_rng_state: false'}, and the blocks draw ({drawn})")


def _random_state_setup(setup: Setup) -> Seen | None:
    drawn = _dropouts(_config(setup.model))
    if drawn:
        return cannot_tell(f"the blocks draw random numbers ({drawn}): it bites under FSDP2's own checkpointing")
    return _not_here("the blocks draw no random numbers: every dropout of the config is 0 (adapters may have one)")


def _random_state_model(model: nn.Module) -> Seen | None:
    functions = [(path, wrapper.checkpoint_fn) for path, wrapper in _wrapped(model)] + _switched_on(model)
    paths = [
        path for path, function in functions
        if isinstance(function, functools.partial) and function.keywords.get("preserve_rng_state") is False
    ]  # fmt: skip
    if not paths:
        return _not_here("no module is checkpointed without its random state")
    drops = [
        name for path in paths for name, module in model.get_submodule(path).named_modules()
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0
    ]  # fmt: skip
    config = getattr(model, "config", None)
    if drops or (config is not None and _dropouts(config)):
        return _bites(f"{len(paths)} modules with dropout are checkpointed with preserve_rng_state=False")
    return _not_here("modules are checkpointed with preserve_rng_state=False, but none of them has a dropout")


def _compiled_errors(backend: str) -> dict[str, float]:
    """Relative gradient error of a compiled block with dropout, by budget, against the eager one."""
    import torch._functorch.config as functorch_config
    import torch._inductor.config as inductor_config

    generator = torch.Generator().manual_seed(0)
    weights = [(torch.randn(64, 64, generator=generator) / 8).requires_grad_() for _ in range(4)]
    x = torch.randn(32, 64, generator=generator).requires_grad_()

    def block(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        for weight in weights:
            x = nn.functional.dropout(nn.functional.gelu(x @ weight), 0.5)
        return x

    def gradients(function: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
        torch.manual_seed(3)
        return list(torch.autograd.grad(function(x, *weights).square().sum(), [x, *weights]))

    expected = gradients(block)
    errors = {}
    for budget in (1.0, 0.5):
        torch._dynamo.reset()
        # eager's random numbers, so that the gradients can be compared
        with functorch_config.patch(activation_memory_budget=budget), inductor_config.patch(fallback_random=True):
            errors[str(budget)] = _error(gradients(torch.compile(block, backend=backend)), expected)
    torch._dynamo.reset()
    return errors


def _probe_compiler(backend: str) -> Seen:
    errors = _compiled_errors(backend)
    told = (
        f"torch.compile ({backend}) of four layers with dropout: gradients off by {errors['0.5']:.2g} of their norm at "
        f"activation_memory_budget 0.5, by {errors['1.0']:.2g} at 1.0"
    )
    figures = {"backend": backend, "relative_error_by_budget": errors}
    if errors["1.0"] > 1e-3:
        return cannot_tell(f"{told}: already wrong without a budget, so the comparison says nothing", **figures)
    return (_bites if errors["0.5"] > 1e-3 else _not_here)(told, **figures)


def _compiler_budget() -> float:
    import torch._functorch.config as functorch_config

    return float(functorch_config.activation_memory_budget)


def _compiler_run(run: Run) -> Seen | None:
    if run.trainer == "accelerate":
        return None
    if not is_true(run.get("torch_compile")):
        return _not_here("the run does not compile (torch_compile)")
    return cannot_tell("the run compiles, but the budget is set in code (torch._functorch.config), not in the YAML")


def _compiler_setup(setup: Setup) -> Seen | None:
    drawn = _dropouts(_config(setup.model))
    if drawn:
        return cannot_tell(f"the blocks draw random numbers ({drawn}): it bites when they are compiled with a budget")
    return _not_here("the blocks draw no random numbers: every dropout of the config is 0 (adapters may have one)")


def _compiler_model(model: nn.Module) -> Seen | None:
    compiled = any(
        type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )
    if not compiled:
        return _not_here("no module is compiled")
    budget = _compiler_budget()
    if budget >= 1:
        return _not_here("the model is compiled, but activation_memory_budget is 1")
    drops = any(isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0 for m in model.modules())
    if drops:
        return _bites(f"the model is compiled with dropout, and activation_memory_budget is {budget}")
    return _not_here(f"activation_memory_budget is {budget}, but the model has no dropout")


def _probe_4bit() -> Seen:
    from bitsandbytes.nn.modules import has_avx512bf16

    from tightfit.integrations.bitsandbytes import quantise

    if not has_avx512bf16():
        return _not_here("bitsandbytes repacks 4-bit weights on CPUs with AVX512-BF16 only, and this one has none")

    def model() -> Any:
        adapted = _lora(quantise(_tiny(hidden_size=64), torch.float32))
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:  # zero at the start, which would hide the base layers' part
                nn.init.normal_(parameter, std=0.1)
        return adapted

    def after_evaluation(adapted: Any) -> list[torch.Tensor | None]:
        adapted.eval()
        with torch.no_grad():
            adapted(_batch()["input_ids"])
        adapted.train()
        return _gradients(adapted)

    expected = _gradients(model())
    repeated = _error(_gradients(model()), expected)
    error = _error(after_evaluation(model()), expected)
    mended = _error(after_evaluation(_unpacked(model())), expected)
    figures = {"relative_error": error, "relative_error_repeated": repeated, "relative_error_mended": mended}
    told = (
        f"QLoRA on the CPU: after one eval() forward the gradients are off by {error:.2g} of their norm, without an "
        f"error (a repeated step: {repeated:.2g}; with the repacking off: {mended:.2g})"
    )
    return (_bites if error > 1e-3 else _not_here)(told, **figures)


def _unpacked(model: Any) -> Any:
    """The mend of the trap: layers that are told that the CPU cannot repack do not."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def _4bit_run(run: Run) -> Seen | None:
    if run.trainer == "accelerate":
        return None
    if not is_true(run.get("load_in_4bit")):
        return _not_here("the run loads no 4-bit weights")
    if not run.on_cpu:
        return _not_here("the run is on a GPU, where 4-bit weights are not repacked")
    strategy = run.get("eval_strategy")
    if str(getattr(strategy, "value", strategy)) in ("no", "False", "None") and not is_true(run.get("eval_on_start")):
        return _not_here("the run does not evaluate in the middle of training (eval_strategy: no)")
    return _bites("the run trains 4-bit weights on the CPU and evaluates in between")


def _4bit_setup(setup: Setup) -> Seen | None:
    if setup.method != "qlora":
        return _not_here("no weights are in 4 bits")
    return cannot_tell("weights are in 4 bits: it bites on a CPU with AVX512-BF16 that evaluates in between")


def _4bit_model(model: nn.Module) -> Seen | None:
    layers = [m for m in model.modules() if type(m).__name__ in ("Linear4bit", "LinearNF4", "LinearFP4")]
    if not layers:
        return _not_here("the model has no 4-bit layers")
    packed = sum(bool(getattr(getattr(m.weight, "quant_state", None), "packing_format_for_cpu", False)) for m in layers)
    if packed:
        return _bites(f"{packed} of {len(layers)} 4-bit layers are repacked for inference: no gradient passes them")
    ready = sum(bool(getattr(m, "support_avx512bf16_for_cpu", False)) and m.weight.device.type == "cpu" for m in layers)
    if ready:
        return cannot_tell(f"{ready} of {len(layers)} 4-bit layers will be repacked by the first eval() forward")
    return _not_here("the 4-bit layers are on a GPU, or their repacking is off")


def _probe_trl() -> Seen:
    from trl import SFTConfig
    from trl.models.utils import disable_gradient_checkpointing

    with tempfile.TemporaryDirectory() as folder:
        # what the trainer really gets, not what the class says
        arguments = SFTConfig(output_dir=folder, use_cpu=True, bf16=False, report_to="none")
    by_default = bool(getattr(arguments, "activation_checkpointing", None) or arguments.gradient_checkpointing)
    model = _tiny(layers=4)
    asked = [True, False, True, False]
    for layer, on in zip(model.model.layers, asked, strict=True):
        layer.gradient_checkpointing = on
        layer._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)
    with disable_gradient_checkpointing(model):
        pass
    left = [bool(layer.gradient_checkpointing) for layer in model.model.layers]
    breaks = ""
    with disable_gradient_checkpointing(model, {"every_n_layers": 2}):
        pass
    try:
        model(**_batch(), use_cache=False)
    except (TypeError, ValueError) as error:
        breaks = str(error).splitlines()[0]
    figures = {
        "on_by_default": by_default,
        "layers_asked": asked,
        "layers_after": left,
        "every_n_layers": breaks or "ok",
    }
    told = []
    if by_default:
        told.append("SFTConfig() turns checkpointing on")
    if left != asked:
        told.append(
            f"after the reference forward of its preference trainers {sum(left)} of {len(left)} layers are "
            f"checkpointed, where {sum(asked)} were asked for"
        )
    if breaks:
        told.append(f"every_n_layers ends the next step there ({breaks})")
    if told:
        return _bites("; ".join(told), **figures)
    return _not_here("TRL leaves checkpointing as it was asked for", **figures)


def _trl_run(run: Run) -> Seen | None:
    if run.trainer == "transformers":
        return _not_here("the run is not TRL's")
    if run.trainer == "accelerate":
        return None
    restores = run.trainer == "dpo" and run.checkpointing and not is_true(run.get("precompute_ref_log_probs"))
    if restores and "every_n_layers" in run.checkpoint_kwargs:
        return _bites("every_n_layers does not survive the reference's forward, which every step has")
    if run.asked_for_checkpointing is None and run.checkpointing:
        said = f"the run says nothing about checkpointing, so TRL's default for {run.trainer} checkpoints every block"
        return _bites(said)
    return _not_here(f"the run says itself that checkpointing is {'on' if run.checkpointing else 'off'}")


def _saved_bytes(model: nn.Module) -> int:
    """What autograd keeps of one forward, parameters left out."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(**_batch(), use_cache=False)
    del out
    return sum(kept.values())


def _probe_off_in_eval() -> Seen:
    model = _tiny("gpt2", layers=4)
    plain = _saved_bytes(model)
    (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()
    training = _saved_bytes(model.train())
    evaluating = _saved_bytes(model.eval())
    active = getattr(model, "is_activation_checkpointing", None) or getattr(model, "is_gradient_checkpointing", None)
    figures = {"saved_bytes_off": plain, "saved_bytes_train": training, "saved_bytes_eval": evaluating}
    told = (
        f"checkpointing on: autograd keeps {format_bytes(training)} in train() and {format_bytes(evaluating)} in "
        f"eval() ({format_bytes(plain)} without checkpointing); is_activation_checkpointing says {bool(active)} in both"
    )
    return (_bites if evaluating > (training + plain) / 2 else _not_here)(told, **figures)


def _off_in_eval_run(run: Run) -> Seen | None:
    if run.trainer == "accelerate":
        return None
    return _not_here("the Trainer calls model.train() before every step")


def _off_in_eval_model(model: nn.Module) -> Seen | None:
    on = [path for path, _ in _switched_on(model)]
    off = [path for path in on if not model.get_submodule(path).training]
    if off:
        return _bites(f"{len(off)} of {len(on)} modules with checkpointing on are in eval mode, where it does nothing")
    return _not_here(f"{len(on)} modules have checkpointing on, all in train mode" if on else "checkpointing is off")


def _probe_logits() -> Seen:
    batch = _batch(2, 64)
    peaks = {}
    for vocabulary in (64, 8192):
        model = _tiny(layers=4, vocab_size=vocabulary)
        for parameter in (model.get_input_embeddings().weight, model.lm_head.weight):
            parameter.requires_grad_(False)  # their gradients have the vocabulary's size too
        _peak(model, batch, use_cache=False)
        peaks[f"{vocabulary}_plain_bytes"] = _peak(model, batch, use_cache=False)
        with every_block_checkpointed(model):
            peaks[f"{vocabulary}_checkpointed_bytes"] = _peak(model, batch, use_cache=False)
    saved = {v: 1 - peaks[f"{v}_checkpointed_bytes"] / peaks[f"{v}_plain_bytes"] for v in (64, 8192)}
    told = (
        f"every block of a 4-layer Llama checkpointed: the step's peak falls by {saved[64]:.0%} with a vocabulary of "
        f"64 and by {saved[8192]:.0%} with one of 8,192"
    )
    return (_bites if saved[8192] < saved[64] / 2 else _not_here)(told, **peaks)


def _logits_run(run: Run) -> Seen | None:
    if is_true(run.get("use_liger_kernel")):
        return _not_here("Liger's fused loss never makes the logits whole (use_liger_kernel)")
    return None


#: What checkpointing can be hoped to lower, or what stands in its way.
_MOVING = (Category.SAVED, Category.LOSS, Category.TEMPORARIES)


def _logits_peak(why: Why) -> Seen | None:
    line = why.checkpointed
    moving = {category.value: line.by_category[category.value] for category in _MOVING}
    loss = moving[Category.LOSS.value]
    figures = {"loss_bytes": loss, "peak_bytes": line.peak_bytes}
    told = f"with every block checkpointed the peak is {format_bytes(line.peak_bytes)}, at: {line.owner}"
    if not why.whole_logits:
        chunks = (
            f"the trainer's loss works in chunks and never makes the logits whole; {format_bytes(loss)} are its own"
        )
        return _not_here(f"{told}; {chunks}", **figures)
    if loss == max(moving.values()) and loss > NOTHING * line.peak_bytes and line.phase != "optimizer":
        return _bites(f"{told}; loss and logits hold {format_bytes(loss)} of it", **figures)
    return _not_here(f"{told}; loss and logits hold {format_bytes(loss)} of it", **figures)


def _optimizer_rise(**said: Any) -> tuple[int, int]:
    """(what one AdamW step adds at most, the parameters' bytes)."""
    parameters = [torch.zeros(128, 128, requires_grad=True) for _ in range(16)]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer = torch.optim.AdamW(parameters, **said)
    optimizer.step()
    with PeakMeter("cpu") as meter:
        optimizer.step()
    return meter.rise_bytes, sum(p.numel() * p.element_size() for p in parameters)


def _probe_foreach() -> Seen:
    (foreach, size), (loop, _), (fused, _) = (
        _optimizer_rise(**said) for said in ({"foreach": True}, {"foreach": False}, {"fused": True})
    )
    figures = {"parameter_bytes": size, "foreach_bytes": foreach, "loop_bytes": loop, "fused_bytes": fused}
    told = (
        f"one AdamW step over {format_bytes(size)} of parameters adds {format_bytes(foreach)} with foreach, "
        f"{format_bytes(loop)} in a loop, {format_bytes(fused)} fused"
    )
    return (_bites if foreach > 2 * max(loop, fused) else _not_here)(
        f"{told} (a plain torch.optim on a GPU is foreach)", **figures
    )


def _foreach_peak(why: Why) -> Seen | None:
    if why.setup is None:  # the caller's own optimizer
        owner = why.checkpointed.owner
        if why.checkpointed.phase == "optimizer" and "_foreach" in owner:
            return _bites(f"the peak, {format_bytes(why.checkpointed.peak_bytes)}, is in the {owner}")
        return _not_here(f"the peak is at: {owner}")
    if why.optimizer != "adamw":
        return _not_here(f"the optimizer ({why.optimizer or 'as given'}) makes no such temporaries")
    fused = next((fix for fix in why.tried if fix.name == "fused-optimizer"), None)
    if fused is None:
        return _not_here("a plain torch.optim on the CPU is no foreach")
    figures = {"peak_bytes": fused.before_bytes, "fused_peak_bytes": fused.peak_bytes}
    told = f"peak {format_bytes(fused.before_bytes)} with foreach, {format_bytes(fused.peak_bytes)} fused"
    return (_bites if fused.helps else _not_here)(told, **figures)


TRAPS: tuple[Trap, ...] = (
    Trap(
        name="reentrant-by-default",
        sentence="An empty dict of checkpointing arguments is not the same as none: it selects torch's reentrant way.",
        mend='pass {"use_reentrant": False}, also to peft\'s prepare_model_for_kbit_training',
        packages=("torch", "transformers", "peft"),
        probe=_probe_reentrant,
        of_run=_reentrant_run,
        of_model=_reentrant_model,
    ),
    Trap(
        name="missing-input-gradients",
        sentence="Reentrant checkpointing gives no gradients in a region none of whose inputs needs one, as in LoRA.",
        mend="use_reentrant=False, or model.enable_input_require_grads() before training",
        packages=("torch", "transformers", "peft"),
        probe=_probe_missing_input_gradients,
        of_run=_missing_input_gradients_run,
        of_setup=_missing_input_gradients_setup,
        of_model=_missing_input_gradients_model,
    ),
    Trap(
        name="input-gradient-hook-left",
        sentence="The hook that makes the inputs require gradients stays on, and a frozen prefix is kept for nobody.",
        mend="model.disable_input_require_grads() after switching checkpointing off, or with use_reentrant=False",
        packages=("torch", "transformers"),
        probe=_probe_stale_hook,
        of_run=_stale_hook_run,
        of_setup=_stale_hook_setup,
        of_model=_stale_hook_model,
    ),
    Trap(
        name="use-cache",
        sentence="A generation cache in training keeps every layer's keys and values, whatever checkpointing drops.",
        mend="model.config.use_cache = False for training",
        packages=("torch", "transformers"),
        probe=_probe_use_cache,
        of_run=_use_cache_run,
        of_setup=_use_cache_setup,
        of_model=_use_cache_model,
    ),
    Trap(
        name="random-state-not-preserved",
        sentence="An FSDP2 helper checkpoints without the random state, so dropout draws another mask when it reruns.",
        mend="fsdp_activation_checkpointing: false, and checkpoint with preserve_rng_state=True before sharding",
        packages=("torch", "accelerate"),
        probe=_probe_fsdp2_random_state,
        of_run=_random_state_run,
        of_setup=_random_state_setup,
        of_model=_random_state_model,
    ),
    Trap(
        name="compiler-budget-with-dropout",
        sentence="torch.compile with an activation_memory_budget below 1 reruns dropout with another mask.",
        mend="leave torch._functorch.config.activation_memory_budget at 1, or set every dropout to 0",
        packages=("torch",),
        probe=functools.partial(_probe_compiler, "aot_eager_decomp_partition"),
        deep=functools.partial(_probe_compiler, "inductor"),
        of_run=_compiler_run,
        of_setup=_compiler_setup,
        of_model=_compiler_model,
    ),
    Trap(
        name="4bit-cpu-after-eval",
        sentence="The first eval() forward repacks 4-bit weights for CPU inference, and no gradient passes them after.",
        mend="for m in model.modules(): m.support_avx512bf16_for_cpu = False, before the first evaluation",
        packages=("torch", "bitsandbytes", "peft"),
        probe=_probe_4bit,
        of_run=_4bit_run,
        of_setup=_4bit_setup,
        of_model=_4bit_model,
    ),
    Trap(
        name="trl-overrides-the-plan",
        sentence="TRL checkpoints every block unless told not to, and again every block after a reference's forward.",
        mend="gradient_checkpointing: false in the run; tightfit decides what to recompute",
        packages=("torch", "transformers", "trl"),
        probe=_probe_trl,
        of_run=_trl_run,
    ),
    Trap(
        name="off-in-eval",
        sentence="transformers' checkpointing does nothing in modules in eval mode, without a word.",
        mend="model.train() before the step; to switch dropout off set its p to 0 instead of calling eval()",
        packages=("torch", "transformers"),
        probe=_probe_off_in_eval,
        of_run=_off_in_eval_run,
        of_model=_off_in_eval_model,
        asks="the run's YAML, or the live model to tightfit.doctor.examine",
    ),
    Trap(
        name="logits-own-the-peak",
        sentence="Logits and loss can be larger than all activations, and checkpointing blocks does not touch them.",
        mend="the loss in place (tightfit.plan takes it by itself), a fused loss, or a smaller batch",
        packages=("torch", "transformers"),
        probe=_probe_logits,
        of_run=_logits_run,
        of_peak=_logits_peak,
        asks="a model",
    ),
    Trap(
        name="foreach-temporaries",
        sentence="A foreach optimizer makes temporaries as large as the parameters, often the peak of the whole step.",
        mend="torch.optim.AdamW(..., fused=True); in the Trainer optim: adamw_torch_fused",
        packages=("torch",),
        probe=_probe_foreach,
        of_peak=_foreach_peak,
        asks="a model",
    ),
)  # fmt: skip


def probed(trap: Trap, *, deep: bool = False) -> Seen:
    """What the trap's probe saw in the installed versions; that it could not run is `CANNOT_TELL`."""
    lacking = [package for package in trap.packages if importlib.util.find_spec(package) is None]
    if lacking:
        return cannot_tell(f"needs the package {lacking[0]}, which is not installed")
    probe = trap.deep if deep and trap.deep is not None else trap.probe
    try:
        with _alone():
            return probe()
    except Exception as error:  # whatever other versions of these packages raise
        first_line = (str(error).splitlines() or [""])[0]
        return cannot_tell(f"the probe could not run here ({type(error).__name__}: {first_line})")
