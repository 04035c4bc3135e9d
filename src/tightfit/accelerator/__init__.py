"""The one place that asks torch about the device under a step: memory, queue, streams, random numbers, autocast.

A device is the host or a card. Every card takes the same path: first torch's module of its kind (`torch.cuda`, which is
also AMD's; `torch.xpu`, `torch.mps`, or the module that a backend registered), then `torch.accelerator` for what that
module does not have. Two or three kinds need more than a lookup, and that stands here too.

Invariants:
- No other module names a kind of device in order to choose what it does (`tests/test_one_room.py`).
- Asking starts no card that nobody uses yet.
- Nothing is guessed. What torch does not tell of a card is None, or `Unsupported` in one line that says what.

Refused: a device that this machine does not have, or that torch cannot train on (`InvalidInput`).
"""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import re
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from tightfit.accelerator import control_groups
from tightfit.core import HOST_KIND, InvalidInput, Unsupported

__all__ = [
    "ATTENTION_SWITCHES",
    "HOST",
    "allocated_bytes",
    "allocator_settings",
    "any_card",
    "autocast_states",
    "capability_of",
    "catalog_kind",
    "counts_peak",
    "current",
    "default_generator",
    "device_named",
    "drawn_states",
    "empty_cache",
    "free_bytes",
    "has_streams",
    "has_wide_products",
    "host_memory_bytes",
    "is_card",
    "is_host",
    "limit_bytes",
    "memory_bytes",
    "model_of",
    "name_of",
    "new_stream",
    "numbered",
    "on_stream",
    "peak_begun",
    "peak_risen_bytes",
    "peak_unknown",
    "pinned",
    "pinned_if_possible",
    "put_back_states",
    "reserved_bytes",
    "reserved_peak_bytes",
    "running_stream",
    "runtime",
    "saved_state_bytes",
    "synchronize",
]  # fmt: skip

HOST = torch.device(HOST_KIND)

#: Kinds of device in torch's list that hold no numbers to train on.
_NO_ROOM = frozenset({"meta"})

#: What decides, for the whole process, which attention kernel runs. torch files them under CUDA; every device obeys.
ATTENTION_SWITCHES: tuple[tuple[Callable[[], bool], Callable[[bool], None]], ...] = (
    (torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.enable_flash_sdp),
    (torch.backends.cuda.mem_efficient_sdp_enabled, torch.backends.cuda.enable_mem_efficient_sdp),
    (torch.backends.cuda.math_sdp_enabled, torch.backends.cuda.enable_math_sdp),
    (torch.backends.cuda.cudnn_sdp_enabled, torch.backends.cuda.enable_cudnn_sdp),
)


# -------------------------------------------------------------------------------------------- which device


def is_host(device: torch.device) -> bool:
    return device.type == HOST_KIND


def is_card(device: torch.device) -> bool:
    """Has it memory of its own to count? `meta` has none."""
    return device.type != HOST_KIND and device.type not in _NO_ROOM


def current() -> torch.device:
    """The card that new work of this thread goes to; the host where torch finds no card."""
    kind = _kind_present()
    if kind is None:
        return HOST
    here = _function(kind, "current_device") or _function(kind, "current_device_index")
    return torch.device(kind, here() if here is not None else 0)


def any_card() -> bool:
    """Does torch find a card on this machine?"""
    return _kind_present() is not None


def numbered(index: int) -> torch.device:
    """The card that libraries call by a bare number; an NVIDIA one where this machine has none of any kind."""
    return torch.device(_kind_present() or "cuda", index)


def device_named(name: str) -> torch.device:
    """The device called `name`. Raises `InvalidInput` when it is no device or this machine does not have it."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InvalidInput(f"unknown device {name!r}: use {_usable()}") from None
    if is_host(device):
        return device
    if not is_card(device) or not _has_module(device.type):
        raise InvalidInput(f"device {name!r} is not supported: use {_usable()}")
    if not _is_available(device.type):
        what = "GPU" if device.type == "cuda" else f"{device.type} device"
        raise InvalidInput(f"device {name!r} was asked for, but torch {torch.__version__} finds no {what}: use cpu")
    count = _count(device.type)
    if device.index is not None and device.index >= count:
        raise InvalidInput(f"device {name!r} was asked for, but there are {count} GPUs")
    return device


def _usable() -> str:
    """For a message: the host and the card that is here, or those that most people have."""
    return f"{HOST_KIND} or {_kind_present() or 'cuda'}"


def _kind_present() -> str | None:
    """The kind of the cards that torch finds here. torch has one kind of accelerator in a process."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return None if found is None else found.type


@functools.cache
def _module(kind: str) -> Any:
    return torch.get_device_module(kind)


def _has_module(kind: str) -> bool:
    try:
        return _module(kind) is not None
    except RuntimeError:  # torch knows the name, but has nothing behind it
        return False


def _is_available(kind: str) -> bool:
    asked = getattr(_module(kind), "is_available", None)
    return bool(asked()) if asked is not None else kind == _kind_present()


def _count(kind: str) -> int:
    counted = _function(kind, "device_count")
    return int(counted()) if counted is not None else 1


def _function(kind: str, name: str) -> Any:
    """What the module of `kind` calls `name`, else what `torch.accelerator` does; None: neither has it."""
    return getattr(_module(kind), name, None) or getattr(torch.accelerator, name, None)


# -------------------------------------------------------------------------------------------- what it is


def name_of(device: torch.device) -> str:
    """The maker's name of a card; for the host, and where torch has no name, the name in torch."""
    if not is_card(device):
        return str(device)
    asked = getattr(_module(device.type), "get_device_name", None)
    return str(device) if asked is None else str(asked(device))


def model_of(device: torch.device) -> str:
    """The name that tells its rates from those of another: the card's model, or the processor and torch's threads."""
    if is_card(device):
        return _printable(name_of(device))
    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
        processor = found[1].strip() if found else processor
    threads = torch.get_num_threads()
    return f"{_printable(processor)}, {threads} thread{'s' if threads > 1 else ''}"


def _printable(name: str) -> str:
    """A name that goes into a file and onto a terminal."""
    return "".join(letter if letter.isprintable() else " " for letter in name).strip() or "a device without a name"


def memory_bytes(device: torch.device) -> int | None:
    """All the memory that it has, as torch tells; for Apple's, what Metal lets one process use. None: not told."""
    if not is_card(device):
        return host_memory_bytes()
    module = _module(device.type)
    if (most := getattr(module, "recommended_max_memory", None)) is not None:
        return int(most())
    with contextlib.suppress(AttributeError, RuntimeError, AssertionError):
        return int(module.get_device_properties(device).total_memory)
    with contextlib.suppress(AttributeError, RuntimeError, TypeError):
        return int(_function(device.type, "get_memory_info")(device)[1])
    return None


def limit_bytes(device: torch.device) -> int | None:
    """What this process may take of its memory: all of it, unless a part was set (`set_per_process_memory_fraction`) or
    the process is in a control group with a limit. A slice of a card (MIG) is a device of its own to torch, and has
    the slice's memory. None: not told."""
    whole_bytes = memory_bytes(device)
    if is_card(device):
        part = allocator_settings(device).get("per_process_memory_fraction")
        return whole_bytes if part is None or whole_bytes is None else int(min(1.0, float(part)) * whole_bytes)
    allowed_bytes = control_groups.least_limit_bytes()
    return min((each for each in (whole_bytes, allowed_bytes) if each is not None), default=None)


def free_bytes(device: torch.device) -> int | None:
    """What no process has taken of a card, by its driver; of the host, what this process may still take. None: not
    told."""
    if not is_card(device):
        return _host_free_bytes()
    for name in ("mem_get_info", "get_memory_info"):
        with contextlib.suppress(AttributeError, RuntimeError, TypeError):
            return int(_function(device.type, name)(device)[0])
    return None


def _host_free_bytes() -> int | None:
    """The memory of this machine, or of its control group where that has less, without what this process holds: the
    interpreter, torch and what they loaded."""
    whole_bytes = limit_bytes(HOST)
    with contextlib.suppress(OSError, ValueError, IndexError, AttributeError):
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return None if whole_bytes is None else max(0, whole_bytes - pages * os.sysconf("SC_PAGE_SIZE"))
    return whole_bytes


def host_memory_bytes() -> int | None:
    """Physical memory of this machine; `None` where the system does not say."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None


def capability_of(device: torch.device) -> float | None:
    """NVIDIA's compute capability, as 8.9. None for every other device."""
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return major + minor / 10


def catalog_kind(device: torch.device) -> str:
    """What the catalog calls this kind of device: AMD's cards are CUDA's to torch."""
    return "rocm" if device.type == "cuda" and torch.version.hip is not None else device.type


def has_wide_products(device: torch.device) -> bool:
    """Can it multiply matrices of few bits into float32 (`torch.mm(..., out_dtype=)`)? Only CUDA's kernel does."""
    return device.type == "cuda"


def runtime() -> dict[str, str]:
    """Of the cards here: the runtime's version and their names, for an environment record; empty without a card."""
    kind = _kind_present()
    if kind is None:
        return {}
    version = torch.version.hip or getattr(torch.version, kind, None)
    names = ", ".join(name_of(torch.device(kind, index)) for index in range(_count(kind)))
    return {**({kind: str(version)} if version else {}), f"{kind}_devices": names}


# -------------------------------------------------------------------------------------------- queue


def synchronize(device: torch.device) -> None:
    """Wait until all that was given to it is done. The host does everything at once."""
    if not is_card(device):
        return
    if device.type == "mps":  # takes no device: there is one
        torch.mps.synchronize()
    else:
        _function(device.type, "synchronize")(device)


@functools.cache
def has_streams(device: torch.device) -> bool:
    """Can copies run on a queue of their own, beside the compute?"""
    if not is_card(device) or not _has_module(device.type):
        return False
    if hasattr(_module(device.type), "Stream"):
        return True
    try:  # a stream that is the one that runs already is no second one
        return bool(torch.Stream(device) != running_stream(device))
    except (RuntimeError, TypeError):
        return False


def new_stream(device: torch.device) -> Any:
    return (getattr(_module(device.type), "Stream", None) or torch.Stream)(device)


def running_stream(device: torch.device) -> Any:
    """The stream that ops of this thread go to."""
    return _function(device.type, "current_stream")(device)


def on_stream(stream: Any) -> AbstractContextManager[Any]:
    """Ops inside go to `stream`."""
    entered = getattr(_module(stream.device.type), "stream", None)
    context: AbstractContextManager[Any] = stream if entered is None else entered(stream)
    return context


def pinned(size_bytes: int) -> torch.Tensor:
    """Host memory that the card copies from and to by itself."""
    return torch.empty(size_bytes, dtype=torch.uint8, pin_memory=True)


def pinned_if_possible(size_bytes: int) -> torch.Tensor | None:
    """The same; None: the system pins no more."""
    try:
        return pinned(size_bytes)
    except RuntimeError:
        # a runtime may report the failure once more, at the next thing that is asked of the card
        with contextlib.suppress(RuntimeError):
            torch.ones(1, device=current())
        return None


# -------------------------------------------------------------------------------------------- memory


def counts_peak(device: torch.device) -> bool:
    """Does its allocator keep the most bytes that were ever live? Metal's does not, the host has none that counts.

    Tried out, on a block of a known size: where no allocator is asked, torch answers zero and raises nothing. A peak
    is forgotten for that, so this is asked where one is measured next. A device that counts is not tried again; one
    that does not may have been disturbed. Raises torch's error where the card has no room for the block.
    """
    if not is_card(device):
        return False
    if device not in _counting and _counts_peak_now(device):
        _counting.add(device)
    return device in _counting


#: Devices that were seen to count the peak.
_counting: set[torch.device] = set()

_TRIED_BYTES = 2**20


def _counts_peak_now(device: torch.device) -> bool:
    try:
        before_bytes = peak_begun(device)
        _take(device, _TRIED_BYTES)
        return peak_risen_bytes(device, before_bytes) >= _TRIED_BYTES
    except torch.OutOfMemoryError:
        raise
    except (AssertionError, AttributeError, RuntimeError, TypeError, ValueError):  # no such device, or no such count
        return False


def _take(device: torch.device, size_bytes: int) -> Any:
    """A block, which is free again when nobody holds it."""
    return torch.empty(size_bytes, dtype=torch.uint8, device=device)


def peak_unknown(device: torch.device) -> str:
    """One line that says why the peak of a step on `device` cannot be measured; empty where it can."""
    if not is_card(device) or counts_peak(device):
        return ""
    return f"torch {torch.__version__} counts no peak of memory on {device.type}, so it is not measured there"


def peak_begun(device: torch.device) -> int:
    """Wait for the queue, let the allocator forget its peak, and return the bytes that are live."""
    kind = device.type
    synchronize(device)
    _function(kind, "reset_peak_memory_stats")(device)
    return int(_function(kind, "memory_allocated")(device))


def peak_risen_bytes(device: torch.device, before_bytes: int) -> int:
    """By how much the live bytes have risen at most since `peak_begun` returned `before_bytes`."""
    synchronize(device)
    return int(_function(device.type, "max_memory_allocated")(device)) - before_bytes


def allocated_bytes(device: torch.device) -> int | None:
    """Bytes of live blocks, by its allocator. None: there is none that counts."""
    return _counted(device, "memory_allocated")


def reserved_bytes(device: torch.device) -> int | None:
    """Bytes that its allocator has from the driver. None: there is none that counts."""
    return _counted(device, "memory_reserved")


def reserved_peak_bytes(device: torch.device) -> int | None:
    """The most of them since `peak_begun`. None: there is none that counts."""
    return _counted(device, "max_memory_reserved")


def _counted(device: torch.device, name: str) -> int | None:
    """What its allocator answers; the peak that it keeps stays."""
    if not is_card(device):
        return None
    synchronize(device)
    with contextlib.suppress(AssertionError, AttributeError, RuntimeError, TypeError, ValueError):
        asked = _function(device.type, name)
        counted = int(asked(device))
        if counted:
            return counted
        held = _take(device, _TRIED_BYTES)  # nothing is live, or nothing counts
        counts = int(asked(device)) > 0
        del held
        return 0 if counts else None
    return None


def allocator_settings(device: torch.device) -> dict[str, str]:
    """What its caching allocator was told, as far as torch tells: the variables, the kind, a cap on the process."""
    if not is_card(device):
        return {}
    kind, module = device.type, _module(device.type)
    names = ("PYTORCH_ALLOC_CONF", f"PYTORCH_{kind.upper()}_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
    said = {name: os.environ[name] for name in names if os.environ.get(name)}
    for name, asked in (("get_allocator_backend", ()), ("get_per_process_memory_fraction", (device,))):
        with contextlib.suppress(AttributeError, RuntimeError, TypeError, AssertionError):
            said[name.removeprefix("get_")] = str(getattr(module, name)(*asked))
    with contextlib.suppress(AttributeError, RuntimeError, TypeError, AssertionError, KeyError):
        # what is in force, where a program changed it after it began
        in_force = module.memory._snapshot(device)["allocator_settings"]
        said["expandable_segments"] = str(in_force["expandable_segments"])
    return said


def empty_cache() -> None:
    """Give unused memory back to the driver, on the card that is in use, if one is."""
    kind = _kind_in_use()
    if kind is not None and (emptied := _function(kind, "empty_cache")) is not None:
        emptied()


def _kind_in_use() -> str | None:
    """The kind of the cards, if this process uses them already."""
    kind = _kind_present()
    if kind is None:
        return None
    started = getattr(_module(kind), "is_initialized", None)
    return kind if started is None or started() else None


# -------------------------------------------------------------------------------------------- random numbers


def default_generator(device: torch.device) -> torch.Generator:
    """The generator that ops on `device` draw from where they are given none; the same object each time.

    Raises `Unsupported` where torch does not hand it out.
    """
    if not is_card(device):
        return torch.default_generator
    index: int | None = device.index
    if index is None:
        here = current()
        index = here.index if here.type == device.type else 0
    return _generator(device.type, index)


@functools.cache
def _generator(kind: str, index: int) -> torch.Generator:
    module: Any = _module(kind) if _has_module(kind) else None
    generators: Any = getattr(module, "default_generators", ())
    found: torch.Generator
    if len(generators) > index:
        found = generators[index]
        return found
    metals = getattr(module, "_get_default_mps_generator", None)
    others = getattr(torch._C, "_accelerator_getDefaultGenerator", None)  # since torch 2.14
    for asked in (metals, None if others is None else functools.partial(others, index)):
        if asked is not None:
            with contextlib.suppress(RuntimeError):
                found = asked()
                return found
    raise Unsupported(f"random numbers on {kind} cannot be drawn again: its generator is not known")


def drawn_states() -> Any:
    """The states of the generators of all cards, for `put_back_states`; None where no card is in use."""
    kind = _kind_in_use()
    if kind is None:
        return None
    module = _module(kind)
    if hasattr(module, "get_rng_state_all"):
        return kind, module.get_rng_state_all()
    devices = [torch.device(kind, index) for index in range(_count(kind))]
    return kind, [default_generator(device).get_state() for device in devices]


def put_back_states(states: Any) -> None:
    """Make the cards' generators go on from `states`, which `drawn_states` returned."""
    if states is None:
        return
    kind, saved = states
    module = _module(kind)
    if hasattr(module, "set_rng_state_all"):
        module.set_rng_state_all(saved)
        return
    for index, state in enumerate(saved):
        default_generator(torch.device(kind, index)).set_state(state)


def saved_state_bytes(device: torch.device) -> int:
    """Bytes of the device that one saved generator state takes: a card's state is kept on the host, but for its
    counters."""
    return torch.get_rng_state().numel() if is_host(device) else 16


# -------------------------------------------------------------------------------------------- autocast


def autocast_states(devices: Iterable[torch.device]) -> tuple[tuple[str, bool, torch.dtype], ...]:
    """(kind, is it on, dtype) of autocast in this thread, for the host and the kinds of `devices`."""
    kinds = dict.fromkeys([HOST_KIND, *(d.type for d in devices if d.type not in _NO_ROOM)])
    return tuple(
        (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds if _autocasts(kind)
    )


@functools.cache
def _autocasts(kind: str) -> bool:
    return bool(torch.amp.is_autocast_available(kind))
