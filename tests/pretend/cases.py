"""What is tried on the pretend card. Each case is a function of no arguments that raises when something is wrong.

Run as a script in a process of its own, it does them all and prints a line of JSON for each. In between, the card is
as it was: what is queued is done as late as the rules allow, and memory has no end.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gc
import json
import sys
import tempfile
import threading
import time
import traceback
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import device as card
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import tightfit
from tightfit import accelerator
from tightfit.core import Action, Backing, Lever, Plan, Trace
from tightfit.device.allocator import peaks
from tightfit.engine import Applied, offload
from tightfit.engine.frame import Frame
from tightfit.engine.offload import Pool
from tightfit.levers import as_recorded
from tightfit.levers.gradients_in_host.host import HostGradients
from tightfit.levers.optimizer_step import Waiting
from tightfit.levers.state_in_host.host import HostState, loaded_on_host, settled
from tightfit.levers.stream_weights import DEFINITION as STREAM
from tightfit.levers.stream_weights import fetching, host
from tightfit.plan import every_block, lowest, simulate
from tightfit.plan.account import account
from tightfit.plan.simulate import allocations
from tightfit.step.optimizers import Cut, stepping_in_chunks
from tightfit.step.snapshot import undisturbed

CASES: dict[str, Callable[[], None]] = {}
ORDERS = (("late", 0), ("early", 0), ("rush", 0), ("any", 1))


def case(function: Callable[[], None]) -> Callable[[], None]:
    CASES[function.__name__] = function
    return function


def control() -> Any:
    return torch.ops.pretend


# ------------------------------------------------------------------------------------------------ what is trained


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    # a plan switches the generation cache off; with it keys lie in another order, and products may round otherwise
    config = GPT2Config(
        n_layer=3, n_embd=32, n_head=4, vocab_size=64, n_positions=64, bos_token_id=0, eos_token_id=0, use_cache=False
    )
    return GPT2LMHeadModel(config).train().to("pretend")  # dropout is on


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, vocab_size=64, use_cache=False
    )
    return LlamaForCausalLM(config).train().to("pretend")


def tokens(where: str = "pretend") -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 64, (2, 32), generator=torch.Generator().manual_seed(0)).to(where)
    return {"input_ids": ids, "labels": ids}


def gradients(model: nn.Module, batch: Any, backward: Any = torch.Tensor.backward) -> list[torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(1)
    backward(model(**batch).loss)
    found = [p.grad.cpu() for p in model.parameters() if p.grad is not None]
    assert found and not any(g.isnan().any() for g in found)
    return found


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def everything_away(trace: Trace) -> Plan:
    """All that backward needs waits off the card."""
    plan = every_block(trace)
    choices = []
    for choice in plan.choices:
        frame = next(f for f in trace.frames if f.unit == choice.unit)
        program = trace.programs[frame.id]
        away = set(program.needed) - set(program.held)
        sizes = [trace.values[v].size_bytes for v in frame.inputs]
        actions = tuple(Action.OFFLOAD if v in away else a for v, a in enumerate(choice.actions))
        inputs = tuple(Action.OFFLOAD if size == max(sizes) else Action.KEEP for size in sizes)
        choices.append(_replaced(choice, actions=actions, inputs=inputs))
    plan = _replaced(plan, choices=tuple(choices))
    line = simulate(trace, plan)
    return _replaced(
        plan, peak_bytes=line.peak_bytes, budget_bytes=line.peak_bytes, recompute_flops=line.recompute_flops
    )


def _replaced(of: Any, **said: Any) -> Any:
    return dataclasses.replace(of, **said)


@contextlib.contextmanager
def replaced(owner: Any, name: str, stand_in: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, stand_in)
    try:
        yield
    finally:
        setattr(owner, name, before)


# ------------------------------------------------------------------------------------------------ the card itself


@case
def the_card_is_hard_on_who_does_not_wait() -> None:
    here = torch.device("pretend:0")
    side = accelerator.new_stream(here)
    with accelerator.on_stream(side):
        early = torch.ones(4, device=here)
    assert early.isnan().all()  # nobody waited for it
    accelerator.running_stream(here).wait_stream(side)
    assert not early.isnan().any()

    host = accelerator.pinned(512)
    content = torch.arange(512, device=here).to(torch.uint8)
    side.wait_stream(accelerator.running_stream(here))
    with accelerator.on_stream(side):
        host.copy_(content, non_blocking=True)
    address = content.data_ptr()
    del content
    other = torch.zeros(512, dtype=torch.uint8, device=here)
    assert other.data_ptr() == address  # its memory is somebody else's already
    accelerator.running_stream(here).wait_stream(side)
    accelerator.synchronize(here)
    assert host.sum() == 0  # and the copy took what that one wrote


@case
def an_ops_seconds_are_those_of_its_kernel() -> None:
    """What an op has queued is waited for before its time is read. A launch alone takes next to nothing."""
    wait = 5e-3

    def waiting(device: torch.device) -> None:
        time.sleep(wait)

    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 1)).to("pretend")
    with replaced(accelerator, "synchronize", waiting):
        trace = tightfit.trace(model, torch.ones(8, 16, device="pretend"), loss=lambda m, x: m(x).sum())
    seconds = [op.seconds for op in trace.ops]
    assert min(seconds) > 0.9 * wait, seconds


@case
def backward_runs_in_a_thread_of_the_card() -> None:
    threads: list[int] = []
    saved = Frame.saved

    def seen(self: Frame, slot: Any, kept: bool) -> torch.Tensor:
        threads.append(threading.get_ident())
        return saved(self, slot, kept)

    model, batch = gpt2(), tokens()
    with replaced(Frame, "saved", seen), tightfit.apply(model, every_block(tightfit.trace(model, batch))):
        gradients(model, batch)
    assert threads and threading.get_ident() not in threads


# ------------------------------------------------------------------------------------------------ plans


def _holds(make: Callable[[], nn.Module], plan_of: Callable[[Trace], Plan]) -> None:
    model, batch = make(), tokens()
    expected = gradients(model, batch)
    assert same(expected, gradients(model, batch))
    trace = tightfit.trace(model, batch)
    plan = plan_of(trace)
    for order, seed in ORDERS:
        control().order(order, seed)
        with tightfit.apply(model, plan) as applied:
            assert same(expected, gradients(model, batch)), order
            assert same(expected, gradients(model, batch)), order
            stats = applied.stats()
            assert stats.fallbacks == 0 and stats.held == 0, stats
            assert stats.rerun_ops > 0 or applied.pool.copied_bytes > 0
            assert applied.pool.stored_bytes == 0
    control().order("late", 0)
    _measured_as_predicted(model, batch, plan, trace)


@case
def every_block_of_gpt2() -> None:
    _holds(gpt2, every_block)


@case
def a_budget_for_gpt2() -> None:
    _holds(gpt2, lambda trace: tightfit.plan(trace, "60%"))


@case
def a_budget_for_llama() -> None:
    _holds(llama, lambda trace: tightfit.plan(trace, "70%", exact=True))


@case
def gpt2_with_everything_away() -> None:
    _holds(gpt2, everything_away)


@case
def llama_with_everything_away() -> None:
    _holds(llama, everything_away)


@case
def a_budget_with_offload() -> None:
    _holds(llama, lambda trace: tightfit.plan(trace, "65%", levers=[Lever.OFFLOAD, Lever.RECOMPUTE]))


@case
def a_graph_that_is_kept() -> None:
    def twice(loss: torch.Tensor) -> None:
        loss.backward(retain_graph=True)
        loss.backward()

    model, batch = gpt2(), tokens()
    expected = gradients(model, batch, twice)
    trace = tightfit.trace(model, batch)
    for plan in (every_block(trace), everything_away(trace)):
        with tightfit.apply(model, plan):
            assert same(expected, gradients(model, batch, twice))


@case
def both_cards_and_two_threads() -> None:
    """Two steps at once, each in a thread of its own; and both in the backward threads of their cards."""
    _two_at_once("pretend:0", "pretend:0")
    _two_at_once("pretend:0", "pretend:1")


def _two_at_once(*places: str) -> None:
    # without dropout: the generator of a card is shared by the threads that use it
    models = [gpt2().to(place).eval() for place in places]
    plain = [gradients(model, tokens(place)) for model, place in zip(models, places, strict=True)]
    assert same(plain[0], plain[1])
    found: list[Any] = [None, None]

    def train(index: int) -> None:
        try:
            torch.accelerator.set_device_index(torch.device(places[index]).index)
            found[index] = [gradients(models[index], tokens(places[index])) for _ in range(3)]
        except BaseException as error:
            found[index] = error

    first, second = (tightfit.trace(model, tokens(place)) for model, place in zip(models, places, strict=True))
    with tightfit.apply(models[0], every_block(first)), tightfit.apply(models[1], everything_away(second)):
        threads = [threading.Thread(target=train, args=(index,)) for index in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for index in range(2):
        assert isinstance(found[index], list), found[index]
        assert all(same(plain[index], each) for each in found[index])


# ------------------------------------------------------------------------------------------------ regions


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.dropout(self.up(x), 0.3)
        return self.down(x.sigmoid()).tanh() * torch.rand_like(x[..., :16])


def _block_gradients(run: Callable[[nn.Module, torch.Tensor], torch.Tensor]) -> tuple[list[torch.Tensor], torch.Tensor]:
    torch.manual_seed(0)
    block = Block().to("pretend")
    x = torch.randn(4, 16, device="pretend", requires_grad=True)
    torch.manual_seed(1)
    loss = run(block, x).square().sum()
    torch.nn.functional.dropout(torch.ones(8, device="pretend"))  # others draw between forward and backward
    loss.backward()
    state = accelerator.default_generator(x.device).get_state()
    return [t.grad.cpu() for t in (x, *block.parameters())], state


@case
def regions_draw_the_same_numbers_again() -> None:
    expected, state = _block_gradients(lambda block, x: block(x))
    for keep in (None, ["addmm"], ["sigmoid"]):
        for _ in range(2):  # the first call of a region with `keep` learns
            found, after = _block_gradients(lambda block, x, keep=keep: tightfit.checkpoint(block, x, keep=keep))
            assert same(expected, found), keep
            assert torch.equal(state, after), keep  # and the generator goes on as if nothing had run again


@case
def regions_under_autocast() -> None:
    def under(run: Callable[[nn.Module, torch.Tensor], torch.Tensor]) -> Callable[[nn.Module, torch.Tensor], Any]:
        def called(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
            with torch.autocast("pretend", dtype=torch.bfloat16):
                return run(block, x).float()

        return called

    expected, _ = _block_gradients(under(lambda block, x: block(x)))
    plain, _ = _block_gradients(lambda block, x: block(x))
    assert not same(expected, plain)  # autocast does something here
    for keep in (None, ["addmm"]):
        for _ in range(2):
            found, _ = _block_gradients(under(lambda block, x, keep=keep: tightfit.checkpoint(block, x, keep=keep)))
            assert same(expected, found), keep


@case
def plans_under_autocast() -> None:
    model, batch = gpt2(), tokens()

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        with torch.autocast("pretend", dtype=torch.bfloat16):
            return model(**batch).loss

    def step() -> list[torch.Tensor]:
        model.zero_grad()
        torch.manual_seed(1)
        loss(model, batch).backward()
        return [p.grad.cpu() for p in model.parameters() if p.grad is not None]

    expected = step()
    assert not same(expected, gradients(model, batch))
    trace = tightfit.trace(model, batch, loss)
    for plan in (every_block(trace), tightfit.plan(trace, "60%"), everything_away(trace)):
        with tightfit.apply(model, plan) as applied:
            assert same(expected, step())
            assert applied.stats().fallbacks == 0


@case
def generators_go_on_as_in_a_plain_step() -> None:
    model, batch = gpt2(), tokens()
    gradients(model, batch)
    state = accelerator.default_generator(torch.device("pretend:0")).get_state()
    host = torch.get_rng_state()
    with tightfit.apply(model, every_block(tightfit.trace(model, batch))):
        gradients(model, batch)
    assert torch.equal(state, accelerator.default_generator(torch.device("pretend:0")).get_state())
    assert torch.equal(host, torch.get_rng_state())


# ------------------------------------------------------------------------------------------------ offload


@case
def a_file_for_what_is_sent_away() -> None:
    model, batch = gpt2(), tokens()
    expected = gradients(model, batch)
    plan = everything_away(tightfit.trace(model, batch))
    with tempfile.TemporaryDirectory() as folder:
        pool = Pool(spill=Path(folder))
        with Applied(model, plan, pool=pool):
            assert same(expected, gradients(model, batch))
        assert pool.copied_bytes > 0


@case
def memory_stays_the_same_from_step_to_step() -> None:
    """The streams are made once, pinned memory is asked for once, and reserved memory does not grow."""
    model, batch = gpt2(), tokens()
    plan = everything_away(tightfit.trace(model, batch))
    gradients(model, batch)
    seen = []
    for _ in range(3):
        with tightfit.apply(model, plan) as applied:
            for _ in range(3):
                gradients(model, batch)
                seen.append(control().counts())
        del applied
        gc.collect()
    streams, pinned_requests, pinned_bytes, _, reserved = zip(*seen, strict=True)
    assert len(set(streams)) == 1, streams
    assert pinned_requests[0] == pinned_requests[2] and pinned_requests[-1] - pinned_requests[0] == 2, pinned_requests
    assert set(pinned_bytes) == {64 * 2**20}, pinned_bytes
    assert len(set(reserved[1:])) == 1, reserved


@case
def what_the_pool_takes_is_what_is_pinned() -> None:
    model, batch = gpt2(), tokens()
    expected = gradients(model, batch)
    plan = everything_away(tightfit.trace(model, batch))
    before = control().counts()[2]
    with tightfit.apply(model, plan, host_bytes="100KiB") as applied:
        assert same(expected, gradients(model, batch))
        assert 0 < applied.pool.taken_bytes <= 100 * 2**10
        assert control().counts()[2] - before == applied.pool.taken_bytes
        assert applied.stats().held > 0


@case
def the_account_is_what_the_card_says() -> None:
    """What waits is pinned, or in the file that was asked for; and a step takes of the card what the account says."""
    model, batch = llama(), tokens()
    trace = tightfit.trace(model, batch)
    plan = tightfit.plan(trace, "90%", levers=[Lever.OFFLOAD, Lever.RECOMPUTE])
    told = account(trace, plan)
    assert told.pageable_bytes == told.file_bytes == 0 < told.pinned_bytes == plan.offloaded_bytes
    # two segments of CUDA's at least, one of small blocks and one of larger ones; the pretend card has no segments
    assert told.reserved_bytes % (2 * 2**20) == 0 and told.reserved_bytes > told.allocated_bytes
    before = control().counts()[2]
    with tightfit.apply(model, plan) as applied:
        gradients(model, batch)
        taken = applied.pool.taken
        assert taken[Backing.PINNED] == control().counts()[2] - before >= told.pinned_bytes
        assert taken[Backing.PAGEABLE] == taken[Backing.FILE] == 0
    here = torch.device("pretend:0")
    reserved = accelerator.reserved_peak_bytes(here)
    assert reserved is not None and reserved >= (accelerator.allocated_bytes(here) or 0) > 0
    told = account(trace, plan, spilled=True)
    assert told.pinned_bytes == told.pageable_bytes == 0 < told.file_bytes == plan.offloaded_bytes
    with tempfile.TemporaryDirectory() as folder, tightfit.apply(model, plan, spill=folder) as applied:
        gradients(model, batch)
        taken = applied.pool.taken
        assert taken[Backing.FILE] >= told.file_bytes and taken[Backing.PINNED] == taken[Backing.PAGEABLE] == 0


@case
def a_system_that_pins_no_more() -> None:
    """What finds no pinned memory stays on the card, and the failure is not reported by somebody else's op."""
    model, batch = gpt2(), tokens()
    expected = gradients(model, batch)
    plan = everything_away(tightfit.trace(model, batch))
    taken = control().counts()[2]
    for more in (0, 64 * 2**10):
        control().limits(-1, taken + more)
        with tightfit.apply(model, plan) as applied:
            assert same(expected, gradients(model, batch))
            assert applied.stats().held > 0
            assert applied.pool.taken_bytes == more
    control().limits(-1, -1)


@case
def a_wait_that_is_left_out_is_seen() -> None:
    """Each wait of the copies is needed: without it another value comes back, in one of the orders allowed."""
    here = torch.device("pretend:0")

    def is_right(lands: bool = True) -> bool:
        pool = Pool()
        for order, _ in ORDERS:
            control().order(order, 1)
            start = torch.randn(300, device=here)
            value = start * 2
            parcel = pool.store(value)
            assert parcel is not None
            address = value.data_ptr()
            del value
            assert torch.empty(300, device=here).data_ptr() != address  # it is on its way out
            if lands:
                parcel.land()
                others = torch.zeros(300, device=here)
                assert others.data_ptr() == address
            back = parcel.fetch().view(torch.float32)
            parcel.give_back()
            if not torch.equal(back.cpu(), start.cpu() * 2):
                return False
        return True

    def deaf(direction: str, to: str) -> Any:
        lanes = offload._lanes_of(here)
        return replaced(lanes, direction, _Deaf(getattr(lanes, direction), to))

    def fetched(self: Any) -> torch.Tensor:
        self.prefetch()
        coming, self._coming = self._coming, None
        return coming.fresh

    assert is_right() and is_right(lands=False)
    with deaf("outward", "wait_stream"):  # it copies what is not computed yet
        assert not is_right(), "out, after the compute"
    with deaf("inward", "wait_event"):  # it copies back what has not been copied out yet
        assert is_right(), "the compute has waited for it already"
        assert not is_right(lands=False), "back, after out"
    with deaf("inward", "wait_stream"):  # it writes where the compute is not done yet
        assert not is_right(), "back, after the compute"
    with replaced(offload.Parcel, "fetch", fetched):
        assert not is_right(), "the compute, after back"
    with replaced(offload.Parcel, "land", lambda self: setattr(self, "_leaving", None)):
        assert not is_right(), "others in its memory, after out"
    assert is_right()


@case
def a_buffer_that_is_still_read_is_not_written() -> None:
    """Another stream, as of another thread, gets a buffer whose content is on its way to the first one."""
    here = torch.device("pretend:0")
    other = accelerator.new_stream(here)

    def forced(stream: Any) -> None:
        """All of `stream` is done, and of other streams no more than it waits for."""
        event = stream.record_event()
        event.synchronize()

    def taken_by_a_parcel(pool: Pool) -> None:
        parcel = pool.store(torch.zeros(300, device=here))
        assert parcel is not None
        forced(offload._lanes_of(here).outward)
        parcel.land()

    def taken_as_room(pool: Pool) -> None:
        room = pool.room(4 * 300, here)
        assert room is not None
        room[: 4 * 300].copy_(torch.zeros(300, device=here).view(torch.uint8))

    def is_right(taken: Callable[[Pool], None], *, of_room: bool = False) -> bool:
        for order, _ in ORDERS:
            pool = Pool()
            control().order(order, 1)
            start = torch.randn(300, device=here)
            if of_room:
                room = pool.room(4 * 300, here)
                assert room is not None
                room[: 4 * 300].copy_(start.view(torch.uint8))
                back = torch.empty(4 * 300, dtype=torch.uint8, device=here).copy_(room[: 4 * 300], non_blocking=True)
                pool.room_is_free(room, here)
            else:
                parcel = pool.store(start * 1)
                assert parcel is not None
                forced(offload._lanes_of(here).outward)  # else it would be written once more, behind the other one
                parcel.land()
                back = parcel.fetch()
                parcel.give_back()
            taken_bytes = pool.taken_bytes
            with accelerator.on_stream(other):
                taken(pool)
            assert pool.taken_bytes == taken_bytes  # it is the same buffer
            if not torch.equal(back.view(torch.float32).cpu(), start.cpu()):
                return False
        return True

    ways = [(taken, of_room) for taken in (taken_by_a_parcel, taken_as_room) for of_room in (False, True)]
    for taken, of_room in ways:
        assert is_right(taken, of_room=of_room), (taken.__name__, of_room)
    lanes = offload._lanes_of(here)
    with replaced(lanes, "outward", _Deaf(lanes.outward, "wait_event")):
        assert not is_right(taken_by_a_parcel), "out, after the last copy back"
    with replaced(Pool, "give_back", lambda self, parcel, last_read: _given(self, parcel)):
        assert not is_right(taken_by_a_parcel), "a parcel, and nobody says until when it is read"
        assert not is_right(taken_as_room), "room, and nobody says until when it is read"


def _given(pool: Pool, parcel: Any) -> None:
    pool.stored_bytes -= parcel.buffer.numel()
    pool._free[parcel.device, parcel.buffer.numel()].append((parcel.buffer, None))


class _Deaf:
    """A stream that does not wait when it is told to by one of its methods."""

    def __init__(self, stream: Any, to: str) -> None:
        self._stream, self._to = stream, to

    def __getattr__(self, name: str) -> Any:
        return (lambda *_: None) if name == self._to else getattr(self._stream, name)

    def __enter__(self) -> Any:
        return self._stream.__enter__()

    def __exit__(self, *error: Any) -> Any:
        return self._stream.__exit__(*error)


@case
def no_memory_is_an_error_that_passes() -> None:
    model, batch = llama(), tokens()
    expected = gradients(model, batch)
    with tightfit.apply(model, everything_away(tightfit.trace(model, batch))):
        torch.accelerator.empty_cache()
        control().limits(control().counts()[4] + 2**12, -1)
        try:
            gradients(model, batch)
        except torch.OutOfMemoryError:
            pass
        else:
            raise AssertionError("there was no room, and it fitted")
        control().limits(-1, -1)
        model.zero_grad()
        gc.collect()
        assert same(expected, gradients(model, batch))


@case
def fit_takes_the_card_as_it_is() -> None:
    model, batch = llama(), tokens()
    expected = gradients(model, batch)
    trace = tightfit.trace(model, batch)
    budget_bytes = tightfit.plan(trace, "70%", exact=True).budget_bytes
    with tightfit.fit(model, batch, budget_bytes, exact=True):
        assert same(expected, gradients(model, batch))


# ------------------------------------------------------------------------------------------------ optimizer state


def _steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> list[torch.Tensor]:
    for _ in range(count):
        gradients(model, tokens())
        optimizer.step()
        optimizer.zero_grad()
    state = [v for each in optimizer.state.values() for v in each.values() if isinstance(v, torch.Tensor)]
    return [*(p.detach().cpu().clone() for p in model.parameters()), *(v.cpu().clone() for v in state)]


def _adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), 1e-2, foreach=False)


def _allocated() -> int:
    gc.collect()
    return accelerator.allocated_bytes(torch.device("pretend:0")) or 0


def _state_bytes(optimizer: torch.optim.Optimizer, kind: str) -> int:
    state = [v for each in optimizer.state.values() for v in each.values() if isinstance(v, torch.Tensor)]
    return sum(v.nbytes for v in state if v.device.type == kind and v.numel() > 1)


@case
def state_waits_in_host_memory() -> None:
    """The same bits, loaded in the middle too; what is loaded is never on the card."""
    plain = llama()
    expected = _steps(plain, _adamw(plain), 4)
    for order, seed in ORDERS:
        control().order(order, seed)
        model, pool = llama(), Pool()
        optimizer = _adamw(model)
        with HostState(optimizer, Waiting(1), pool), stepping_in_chunks(optimizer, Cut(1 << 14, False)):
            _steps(model, optimizer, 2)
            assert _state_bytes(optimizer, "pretend") == 0 < _state_bytes(optimizer, "cpu")
            saved = copy.deepcopy(optimizer.state_dict())
            before = _allocated()
            torch.accelerator.reset_peak_memory_stats()
            optimizer.load_state_dict(saved)
            assert torch.accelerator.max_memory_allocated() - before < _state_bytes(optimizer, "cpu") / 8
            assert same(expected, _steps(model, optimizer, 2)), order
        assert _state_bytes(optimizer, "cpu") == 0
        assert pool.stored_bytes == 0
        assert same(expected[: len(list(model.parameters()))], [p.detach().cpu() for p in model.parameters()])


def _stack(where: str = "pretend") -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(48, 48) for _ in range(6))).to(where)


def _rprop(model: nn.Module) -> torch.optim.Optimizer:
    """The last that its step does is to write state. The card computes what is written before when that is read."""
    return torch.optim.Rprop(model.parameters(), 1e-2, foreach=False)


def _stepped(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> list[torch.Tensor]:
    """The numbers that the host reads as soon as each step returns, and what is trained."""
    found = []
    for _ in range(count):
        model(torch.ones(4, 48, device="pretend")).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        state = optimizer.state_dict()["state"]
        found += [v.cpu().clone() for each in state.values() for v in each.values()]
    return [*found, *(p.detach().cpu().clone() for p in model.parameters())]


@case
def state_comes_and_leaves_beside_the_steps_of_others() -> None:
    """The same bits, in each order that is allowed; and each wait of the copies is needed for them."""
    here, plain = torch.device("pretend:0"), _stack()
    expected = _stepped(plain, _rprop(plain), 3)

    def is_right() -> bool:
        for order, seed in ORDERS:
            control().order(order, seed)
            model, pool = _stack(), Pool()
            optimizer = _rprop(model)
            with HostState(optimizer, Waiting(1), pool, ahead=True), stepping_in_chunks(optimizer, Cut(1, False)):
                found = _stepped(model, optimizer, 3)
            accelerator.synchronize(here)
            assert pool.stored_bytes == 0
            if not same(expected, found):
                return False
        return True

    def deaf(direction: str) -> Any:
        lanes = offload._lanes_of(here)
        return replaced(lanes, direction, _Deaf(getattr(lanes, direction), "wait_stream"))

    assert is_right()
    with replaced(offload.Coming, "taken", lambda self: self.fresh):
        assert not is_right(), "the step, after its state came"
    with deaf("outward"):
        assert not is_right(), "out, after the step"
    with deaf("inward"):
        assert not is_right(), "back, after whoever had the memory before"
    with replaced(offload.Leaving, "land", lambda self: None):
        assert not is_right(), "others in its memory, after out"
    with replaced(Pool, "finish_out", lambda self, device: None):
        assert not is_right(), "the host, after out"
    assert is_right()


@case
def a_step_that_fails_leaves_no_copy_under_way() -> None:
    """The host's numbers are right when the error comes out, and the next step goes on from them."""

    class Failing(torch.optim.AdamW):
        fails_at = 0

        def step(self, closure: Any = None) -> Any:
            self.fails_at -= 1
            if not self.fails_at:
                raise RuntimeError("no more")
            return super().step(closure)

    def run(waits: bool) -> list[torch.Tensor]:
        model = _stack()
        optimizer = Failing(model.parameters(), 1e-2, foreach=False)
        with contextlib.ExitStack() as stack:
            if waits:
                stack.enter_context(HostState(optimizer, Waiting(1), Pool(), ahead=True))
            stack.enter_context(stepping_in_chunks(optimizer, Cut(1, False)))
            _stepped(model, optimizer, 2)
            model(torch.ones(4, 48, device="pretend")).square().mean().backward()
            optimizer.fails_at = 4
            try:
                optimizer.step()
            except RuntimeError:
                pass
            else:
                raise AssertionError("it did not fail")
            state = optimizer.state_dict()["state"]
            found = [v.cpu().clone() for each in state.values() for v in each.values()]
            optimizer.zero_grad()
            return found + _stepped(model, optimizer, 2)

    expected = run(waits=False)
    for order, seed in ORDERS:
        control().order(order, seed)
        assert same(expected, run(waits=True)), order


def _measured_as_predicted(model: nn.Module, batch: Any, plan: Plan, trace: Trace, **step: Any) -> Any:
    proof = tightfit.verify(model, batch, plan, **step)
    assert proof["gradients"].passed, str(proof)
    # the card rounds sizes up to 512 bytes and the trace does not, which is all that may be between them
    measured_bytes = int(proof["prediction"].measured.split("(")[1].split(" ")[0])
    rounded_bytes, _ = peaks(*allocations(trace, plan), steps=1)
    assert simulate(trace, plan).peak_bytes <= measured_bytes <= rounded_bytes, (proof["prediction"], rounded_bytes)
    return proof


@case
def the_peak_has_the_state_that_comes_and_leaves() -> None:
    def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return model(batch).square().mean()

    model, batch = _stack(), torch.ones(4, 48, device="pretend")
    optimizer = _adamw(model)
    trace = tightfit.trace(model, batch, loss, optimizer=optimizer)
    least = lowest(trace, levers="recompute,state_in_host")
    assert not least.ahead
    found = [tightfit.plan(trace, least.peak_bytes + more, levers="recompute,state_in_host") for more in (0, 50_000)]
    assert [plan.ahead for plan in found] == [(), ("state_in_host",)]
    assert found[1].step_seconds < found[0].step_seconds and found[1].peak_bytes > found[0].peak_bytes
    for plan in found:
        proof = _measured_as_predicted(model, batch, plan, trace, loss=loss, optimizer=optimizer)
        assert proof["optimizer"].passed, str(proof)


@case
def state_that_waits_goes_on_waiting_when_a_layer_is_unfrozen() -> None:
    """Five of eight equal parameters wait, the first five that are trained. One before them is trained later."""

    def trained(where: str, waits: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(16, 16, bias=False) for _ in range(8))).to(where)
        model[0].weight.requires_grad_(False)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        with contextlib.ExitStack() as stack:
            if waits:
                stack.enter_context(HostState(optimizer, Waiting(2048, 5, 1), Pool()))
                stack.enter_context(stepping_in_chunks(optimizer, Cut(1024, False)))
            for step in range(5):
                if step == 2:
                    model[0].weight.requires_grad_(True)
                model(torch.ones(4, 16, device=where)).sum().backward()
                optimizer.step()
                optimizer.zero_grad()
        return [parameter.detach().cpu() for parameter in model.parameters()]

    assert same(trained("pretend", False), trained("pretend", True))


@case
def state_that_is_loaded_before_a_plan_is_not_on_the_card() -> None:
    plain = llama()
    first = _adamw(plain)
    _steps(plain, first, 2)
    saved, weights = copy.deepcopy(first.state_dict()), copy.deepcopy(plain.state_dict())
    saved["state"] = {n: {k: v.cpu() for k, v in state.items()} for n, state in saved["state"].items()}
    expected = _steps(plain, first, 2)
    model = llama()
    model.load_state_dict(weights)
    optimizer = _adamw(model)
    before = _allocated()
    with loaded_on_host(optimizer):
        optimizer.load_state_dict(saved)
    assert _allocated() == before
    for _ in range(2):  # the first is the proof's
        with HostState(optimizer, Waiting(1000), Pool()), stepping_in_chunks(optimizer, Cut(1 << 14, False)):
            small = _state_bytes(optimizer, "pretend")
            assert 0 < small < _state_bytes(optimizer, "cpu")
        assert _state_bytes(optimizer, "pretend") == small  # the rest stays where it came from
    with HostState(optimizer, Waiting(1000), Pool()), stepping_in_chunks(optimizer, Cut(1 << 14, False)):
        assert same(expected, _steps(model, optimizer, 2))
    settled(optimizer)
    assert _state_bytes(optimizer, "cpu") == 0
    assert same(_steps(plain, first, 1), _steps(model, optimizer, 1))


@case
def state_without_room_on_the_card_stays_in_host_memory() -> None:
    model = llama()
    optimizer = _adamw(model)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with HostState(optimizer, Waiting(1), Pool()), stepping_in_chunks(optimizer, Cut(1 << 14, False)):
            expected = _steps(model, optimizer, 2)
            gc.collect()
            torch.accelerator.empty_cache()
            control().limits(control().counts()[4], -1)
    control().limits(-1, -1)
    assert len(said) == 1 and "stays in host memory" in str(said[0].message), [str(each.message) for each in said]
    assert _state_bytes(optimizer, "cpu") > 0
    state = [v for each in optimizer.state_dict()["state"].values() for v in each.values()]
    assert same(expected[-len(state) :], [v.cpu() for v in state])
    settled(optimizer)  # there is room again
    assert _state_bytes(optimizer, "cpu") == 0


# ------------------------------------------------------------------------------------------------ gradients


def _accumulated(model: nn.Module, optimizer: torch.optim.Optimizer, count: int, kept: list[int]) -> list[torch.Tensor]:
    """Steps of two micro-batches each, clipped. `kept`: what gradients take of the card before each step."""
    norms = []
    for _ in range(count):
        torch.manual_seed(1)
        for _ in range(2):
            model(**tokens()).loss.backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.1).cpu())
        kept.append(sum(p.grad.nbytes for p in model.parameters() if p.grad.device.type == "pretend"))
        optimizer.step()
        optimizer.zero_grad()
    state = [v for each in optimizer.state.values() for v in each.values() if isinstance(v, torch.Tensor)]
    return [*norms, *(p.detach().cpu().clone() for p in model.parameters()), *(v.cpu().clone() for v in state)]


@case
def gradients_wait_in_host_memory() -> None:
    """The same bits, accumulated and clipped; nothing of them is on the card but what is added to or stepped with."""
    plain = gpt2()
    kept: list[int] = []
    expected = _accumulated(plain, _adamw(plain), 3, kept)
    assert min(kept) > 0
    for order, seed in ORDERS:
        control().order(order, seed)
        model, pool = gpt2(), Pool()
        optimizer = _adamw(model)
        kept.clear()
        with HostGradients(model, optimizer, 1, pool), stepping_in_chunks(optimizer, Cut(1 << 14, False)):
            assert same(expected, _accumulated(model, optimizer, 3, kept)), order
            assert max(kept) == 0
            torch.manual_seed(1)
            model(**tokens()).loss.backward()
            waiting = [p.grad.clone() for p in model.parameters()]
        assert all(p.grad.device.type == "pretend" for p in model.parameters())
        assert same(waiting, [p.grad.cpu() for p in model.parameters()])
        assert pool.stored_bytes == 0


@case
def a_gradient_may_be_written_as_soon_as_it_is_at_home() -> None:
    """As by `zero_grad(set_to_none=False)` right after a step that the card is far from having done."""
    for order, seed in ORDERS:
        control().order(order, seed)
        model, pool = _stack(), Pool()
        optimizer = _adamw(model)
        with HostGradients(model, optimizer, 1, pool):
            model(torch.ones(4, 48, device="pretend")).square().mean().backward()
        plain = [p.grad.cpu() for p in model.parameters()]
        with HostGradients(model, optimizer, 1, pool) as waiting:
            with waiting.on_device(model.parameters()):
                there = [p.grad.detach() for p in model.parameters()]
            optimizer.zero_grad(set_to_none=False)
            assert same(plain, [gradient.cpu() for gradient in there]), order


@case
def gradients_in_host_memory_are_put_back_by_whoever_sets_them_aside() -> None:
    """Steps of somebody else in between, with gradients of zero, find room of their own; the real ones come back."""
    model, pool = gpt2(), Pool()
    optimizer = _adamw(model)
    with HostGradients(model, optimizer, 1, pool), stepping_in_chunks(optimizer, Cut(1 << 14, False)):
        model(**tokens()).loss.backward()
        before = [p.grad.clone() for p in model.parameters()]
        with undisturbed(model, tokens()) as restart:
            for _ in range(2):
                restart()
                assert all(p.grad.device.type == "cpu" and not p.grad.any() for p in model.parameters())
                model(**tokens()).loss.backward()
        assert all(p.grad.device.type == "cpu" for p in model.parameters())
        assert same(before, [p.grad for p in model.parameters()])


# ------------------------------------------------------------------------------------------------ streamed weights


def _half_frozen(where: str) -> nn.Module:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)) for _ in range(6)]
    made = nn.Sequential(nn.Linear(64, 64), *blocks, nn.Linear(64, 8)).to(where)
    made.register_buffer("shift", torch.ones(8, device=where))
    for block in made[1:-1]:
        block.requires_grad_(False)
    return made


def _numbers(rows: int = 32, where: str = "pretend") -> torch.Tensor:
    return torch.randn(rows, 64, generator=torch.Generator().manual_seed(0)).to(where)


def _shifted(model: nn.Module, batch: Any) -> torch.Tensor:
    return (model(batch) + model.shift).square().mean()


def _trained(model: nn.Module, batch: torch.Tensor) -> list[torch.Tensor]:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    found = []
    for _ in range(3):
        loss = _shifted(model, batch)
        loss.backward()
        found += [loss.detach().cpu(), *(p.grad.cpu() for p in model.parameters() if p.grad is not None)]
        del loss  # it would be there in the next forward, where the peak may be
        optimizer.step()
        optimizer.zero_grad()
    return [*found, *(p.detach().cpu().clone() for p in model.parameters())]


def _kinds(model: nn.Module) -> set[str]:
    return {p.device.type for p in model.parameters()}


@case
def frozen_weights_wait_in_host_memory() -> None:
    """Of a model that is on the card: the same bits, and all of it on the card again afterwards."""
    expected = _trained(_half_frozen("pretend"), _numbers())
    for order, seed in ORDERS:
        control().order(order, seed)
        model = _half_frozen("pretend")
        with tightfit.fit(model, _numbers(), "80%", loss=_shifted, beside="stream_weights") as applied:
            assert applied.plan.settings["stream_weights"] and _kinds(model) == {"cpu", "pretend"}
            assert same(expected, _trained(model, _numbers())), order
        assert _kinds(model) == {"pretend"}


def _all_streamed(trace: Trace, *ahead: str) -> Plan:
    """Nothing recomputed, everything streamed that can be."""
    step = list(STREAM.variants(as_recorded(trace)))[-1]
    plan = tightfit.plan(trace, "100%", levers="recompute")
    plan = _replaced(plan, settings=step.decided["settings"], ahead=ahead)
    peak_bytes = simulate(trace, plan).peak_bytes
    return _replaced(plan, peak_bytes=peak_bytes, budget_bytes=peak_bytes)


def _merged(model: nn.Module, batch: torch.Tensor) -> list[torch.Tensor]:
    """Gradients of steps after each of which the frozen weights are written: by the host, where they wait there."""
    found = []
    for _ in range(4):
        _shifted(model, batch).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if not parameter.requires_grad:
                    parameter.mul_(0.5)
        found += [p.grad.cpu() for p in model.parameters() if p.grad is not None]
        model.zero_grad()
    return found


@case
def frozen_weights_come_while_those_before_are_read() -> None:
    """The same bits, in each order that is allowed; and each wait of the copies is needed for them."""
    here, batch = torch.device("pretend:0"), _numbers()
    twin = _half_frozen("pretend")
    plan = _all_streamed(tightfit.trace(twin, batch, _shifted), "stream_weights")
    expected, of_merged = _trained(_half_frozen("pretend"), batch), _merged(_half_frozen("pretend"), batch)

    def is_right(steps: Callable[[nn.Module, torch.Tensor], list[torch.Tensor]] = _trained) -> bool:
        for order, seed in ORDERS:
            control().order(order, seed)
            model = _half_frozen("pretend")
            with replaced(host, "_COMPARED", 0), tightfit.apply(model, plan) as applied:
                found = steps(model, batch)
                counts = applied.stats().levers["stream_weights"]
                assert counts.ahead > counts.copies / 2 and not counts.dropped
            if not same(expected if steps is _trained else of_merged, found):
                return False
        return True

    def is_the_hosts_at_once() -> bool:
        """May the host write over a weight as soon as somebody has its copy?"""
        for order, seed in ORDERS:
            control().order(order, seed)
            start, pool = torch.randn(300, device=here), Pool()
            tensor = start.clone()
            of = types.SimpleNamespace(
                frozen=types.SimpleNamespace(path=""), pool=pool, stats=host.Streamed(), fetching=None
            )
            weight: Any = host._Weight(of, tensor, pool.room_for(tensor), here)  # type: ignore[arg-type]
            weight.to_compare = 0
            copied = weight.fresh(weight.begin())
            weight.room.zero_()
            if not torch.equal(copied.cpu(), start.cpu()):
                return False
        return True

    assert is_right() and is_right(_merged) and is_the_hosts_at_once()
    with replaced(offload.Coming, "finish", lambda self: None):
        assert not is_the_hosts_at_once(), "the host, after back"
        assert is_right(), "the compute has waited for it"
        with replaced(offload.Coming, "taken", lambda self: self.fresh):
            assert not is_right(), "the compute, after back"
    lanes = offload._lanes_of(here)
    with replaced(lanes, "inward", _Deaf(lanes.inward, "wait_stream")):
        assert not is_right(), "back, after whoever had the memory before"
    assert is_right()


@case
def weights_that_come_for_nothing_are_dropped() -> None:
    """A step that goes another way than the ones before, a weight that is written while its copy is on its way, and a
    step that fails: the same bits, and nothing stays on the card."""

    class Turning(nn.Module):
        def __init__(self, where: str) -> None:
            super().__init__()
            self.inner = _half_frozen(where)
            self.skips = self.writes = self.fails = False

        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            hidden = self.inner[0](rows)
            for place in range(1, 7):
                if self.skips and place == 3:
                    continue
                hidden = self.inner[place](hidden)
                if self.writes and place < 6:
                    with torch.no_grad():
                        self.inner[place + 1][0].weight.mul_(0.5)
                if self.fails and place == 4:
                    raise ArithmeticError
            return self.inner[-1](hidden).square().mean()

    def steps(model: nn.Module) -> list[torch.Tensor]:
        found = []
        for does in ("", "", "skips", "", "writes", "", "fails", ""):
            for name in ("skips", "writes", "fails"):
                setattr(model, name, name == does)
            try:
                model(batch).backward()
            except ArithmeticError:
                assert model.fails
            found += [p.grad.cpu().clone() for p in model.parameters() if p.grad is not None]
            model.zero_grad()
        return found

    batch = _numbers()
    expected = steps(Turning("pretend"))
    plan = _all_streamed(tightfit.trace(Turning("pretend"), batch, lambda m, x: m(x)), "stream_weights")
    for order, seed in ORDERS:
        control().order(order, seed)
        model = Turning("pretend")
        with tightfit.apply(model, plan) as applied:
            before = _allocated()
            assert same(expected, steps(model)), order
            assert applied.stats().levers["stream_weights"].dropped >= 3  # one for each that goes another way
            assert _allocated() == before
    model = Turning("pretend")
    stale = replaced(fetching, "_is_current", lambda weight, begun: True)
    with stale, replaced(host, "_COMPARED", 0), tightfit.apply(model, plan):
        assert not same(expected, steps(model)), "a copy of before the weight was written"


@case
def the_peak_has_the_weights_that_come() -> None:
    model, batch = _half_frozen("pretend"), _numbers()
    trace = tightfit.trace(model, batch, _shifted)
    least, most = (_all_streamed(trace, *ahead).peak_bytes for ahead in ((), ("stream_weights",)))
    assert most > least
    for levers in ("stream_weights", "recompute,stream_weights"):
        found = [tightfit.plan(trace, size, levers=levers) for size in (least, most)]
        assert [plan.ahead for plan in found] == [(), ("stream_weights",)], [plan.ahead for plan in found]
        assert found[1].step_seconds < found[0].step_seconds
        for plan in found:
            with replaced(host, "_COMPARED", 0):  # the checksums of the first copies take of the card too
                _measured_as_predicted(model, batch, plan, trace, loss=_shifted)


@case
def a_model_that_never_was_on_the_card() -> None:
    """It is planned on fake tensors, and what the plan streams never is on the card all at once."""
    expected = _trained(_half_frozen("pretend"), _numbers())
    whole_bytes = sum(p.nbytes for p in _half_frozen("cpu").parameters())
    for order, seed in ORDERS:
        control().order(order, seed)
        model, batch = _half_frozen("cpu"), _numbers(where="cpu")
        parameters = list(model.parameters())
        before = _allocated()
        torch.accelerator.reset_peak_memory_stats()
        applied = tightfit.fit(
            model, batch, 450_000, loss=_shifted, beside="stream_weights", device="pretend", longer="allow"
        )
        assert all(one is other for one, other in zip(parameters, model.parameters(), strict=True))
        assert _kinds(model) == {"cpu", "pretend"} and model.shift.device.type == "pretend"
        assert torch.accelerator.max_memory_allocated() - before < whole_bytes / 2
        batch = batch.to("pretend")
        assert same(expected, _trained(model, batch)), order
        taken = torch.accelerator.max_memory_allocated() - before
        assert taken <= applied.plan.peak_bytes * 1.01  # the first copies are compared, by checksums on the card
        torch.accelerator.reset_peak_memory_stats()
        _trained(model, batch)
        taken = torch.accelerator.max_memory_allocated() - before
        assert taken <= applied.plan.peak_bytes <= 450_000, (taken, applied.plan.peak_bytes)
        assert taken > 0.9 * applied.plan.peak_bytes, (taken, applied.plan.peak_bytes)
        applied.remove()
        assert _kinds(model) == {"cpu", "pretend"}  # the card need not have room for what waited
        # the same model again, under another budget: more of it may be on the card
        again = tightfit.fit(
            model, batch, 700_000, loss=_shifted, beside="stream_weights", device="pretend", longer="replan"
        )
        streamed = sum(p.device.type == "cpu" for p in model.parameters())
        assert streamed < sum(p.nbytes > 0 for p in parameters)
        assert not any(g.isnan().any() for g in _trained(model, batch))
        again.remove()
        del model, applied, again, parameters


@case
def a_longer_batch_of_a_model_that_never_was_on_the_card() -> None:
    plain = _half_frozen("pretend")
    expected = [_shifted(plain, _numbers(rows)).detach().cpu() for rows in (16, 64, 16)]

    class Scored(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            return _shifted(self.inner, rows)

    model = Scored(_half_frozen("cpu"))
    with tightfit.fit(model, {"rows": _numbers(16)}, 600_000, beside="stream_weights", device="pretend") as applied:
        found = []
        for rows in (16, 64, 16):
            loss = model(rows=_numbers(rows))
            loss.backward()
            found.append(loss.detach().cpu())
            model.zero_grad()
        assert same(expected, found)
        assert applied.plan.settings["stream_weights"]


@case
def llama_in_host_memory_by_a_plan_that_is_given() -> None:
    from tightfit.integrations.peft import add_lora

    def made(where: str) -> nn.Module:
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, vocab_size=64,
            use_cache=False,
        )  # fmt: skip
        return add_lora(LlamaForCausalLM(config), rank=4).train().to(where)

    twin, batch = made("pretend"), tokens()
    expected = gradients(twin, batch)
    trace = tightfit.trace(twin, batch)
    plan = tightfit.plan(trace, "60%", levers="recompute,stream_weights")
    del twin
    model = made("cpu")
    with tightfit.apply(model, plan, device="pretend"):
        for _ in range(6):  # copies are compared in the first few
            assert same(expected, gradients(model, batch))


@case
def a_model_that_is_sent_to_the_card_under_the_plan() -> None:
    """As a Trainer does: what waits in host memory goes on waiting, whether or not it was on the card before."""
    expected = _trained(_half_frozen("pretend"), _numbers())
    for where, device in (("pretend", None), ("cpu", "pretend")):
        model = _half_frozen(where)
        with tightfit.fit(
            model, _numbers(), 450_000, loss=_shifted, beside="stream_weights", device=device, longer="allow"
        ):
            waiting = {n for n, p in model.named_parameters() if p.device.type == "cpu"}
            before = _allocated()
            torch.accelerator.reset_peak_memory_stats()
            model.to("pretend")
            assert torch.accelerator.max_memory_allocated() == before
            assert waiting == {n for n, p in model.named_parameters() if p.device.type == "cpu"} != set()
            assert same(expected, _trained(model, _numbers()))
        assert "_apply" not in vars(model[1][0])


@case
def weights_wait_in_the_file_that_they_were_loaded_from() -> None:
    """Where copies would take too much of the memory that is free; else they are copied, and the file is let go of."""
    from safetensors.torch import load_file, save_file

    from tightfit.step.mapped import Mapped

    expected = _trained(_half_frozen("pretend"), _numbers())
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.safetensors"
        save_file(_half_frozen("cpu").state_dict(), file)
        contents = file.read_bytes()
        for most, in_file in ((0.0, True), (0.5, False)):
            model = _half_frozen("cpu")
            model.load_state_dict(load_file(file), assign=True)
            for module in model[1:-1]:
                module.requires_grad_(False)
            assert all(p in Mapped.now() for p in model.parameters())
            with replaced(host, "_MOST", most):
                applied = tightfit.fit(
                    model, _numbers(), 450_000, loss=_shifted, beside="stream_weights", device="pretend", longer="allow"
                )
            waiting = [p for p in model.parameters() if p.device.type == "cpu"]
            counts = applied.stats().levers["stream_weights"]
            assert waiting and all((p in Mapped.now()) is in_file for p in waiting)
            assert counts.mapped_bytes == (sum(p.nbytes for p in waiting) if in_file else 0)
            assert same(expected, _trained(model, _numbers()))
            applied.remove()
            assert all((p in Mapped.now()) is in_file for p in waiting)
            del model, applied, waiting
        assert file.read_bytes() == contents


@case
def micro_batches_of_a_model_that_never_was_on_the_card() -> None:
    """They are chosen and planned before the model is there, and compared when it is, under the plan."""
    plain, rows = _half_frozen("pretend"), _numbers(48)
    for part in rows.split(16):
        (_shifted(plain, part) / 3).backward()
    expected = [p.grad.cpu() for p in plain.parameters() if p.grad is not None]
    whole_bytes = sum(p.nbytes for p in plain.parameters())
    for order, seed in ORDERS:
        control().order(order, seed)
        model = _half_frozen("cpu")
        before = _allocated()
        torch.accelerator.reset_peak_memory_stats()
        with tightfit.fit(
            model, _numbers(48, "cpu"), 450_000, loss=_shifted, beside="stream_weights", device="pretend",
            micro_batch=16, longer="allow",
        ) as applied:  # fmt: skip
            chosen = applied.micro_batches
            assert chosen is not None and (chosen.size, chosen.accumulation) == (16, 3) and chosen.check is not None
            assert chosen.check.passed and "float64" not in chosen.check.expected
            assert _kinds(model) == {"cpu", "pretend"}
            assert torch.accelerator.max_memory_allocated() - before < whole_bytes / 2
            applied.backward(rows)
            assert same(expected, [p.grad.cpu() for p in model.parameters() if p.grad is not None]), order
        del model, applied


@case
def a_loss_that_cannot_be_cut_leaves_the_model_where_it_was() -> None:
    model, batch = _half_frozen("cpu"), _numbers(48, "cpu")
    before = [(t.device.type, t.detach().clone()) for t in [*model.parameters(), model.shift]]

    def spread(model: nn.Module, rows: torch.Tensor) -> torch.Tensor:
        return model(rows).std()  # of all rows together

    try:
        tightfit.fit(model, batch, 450_000, loss=spread, beside="stream_weights", device="pretend", micro_batch=16)
    except tightfit.Unsupported as error:
        assert "cannot be cut" in str(error)
    else:
        raise AssertionError("nothing was raised")
    now = [*model.parameters(), model.shift]
    assert all(t.device.type == kind and torch.equal(t, value) for t, (kind, value) in zip(now, before, strict=True))
    assert not model._forward_pre_hooks


@case
def what_the_model_holds_goes_with_it() -> None:
    """Gradients of frozen weights, an optimizer's state, tensors in lists; and all is as it was where it fails."""
    model = _half_frozen("cpu")
    model[1][0].weight.grad = torch.ones_like(model[1][0].weight)
    model.lists = [torch.ones(3), {"one": torch.ones(2)}]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.0)
    _shifted(model, _numbers(where="cpu")).backward()
    optimizer.step()
    optimizer.zero_grad()
    before = [(t.device.type, t.data_ptr()) for t in [*model.parameters(), model.shift, *model.lists[:1]]]
    gc.collect()
    torch.accelerator.empty_cache()
    control().limits(control().counts()[4] + 4096, -1)
    try:
        tightfit.fit(model, _numbers(where="cpu"), "80%", loss=_shifted, beside="stream_weights", device="pretend")
    except torch.OutOfMemoryError:
        pass
    else:
        raise AssertionError("there was room")
    control().limits(-1, -1)
    assert before == [(t.device.type, t.data_ptr()) for t in [*model.parameters(), model.shift, *model.lists[:1]]]
    with tightfit.fit(
        model, _numbers(where="cpu"), "80%", loss=_shifted, optimizer=optimizer, beside="stream_weights",
        device="pretend", longer="allow",
    ):  # fmt: skip
        assert [t.device.type for t in (model.lists[0], model.lists[1]["one"])] == ["pretend"] * 2
        moments = [v for each in optimizer.state.values() for v in each.values() if v.dim()]
        assert moments and {v.device.type for v in moments} == {"pretend"}
        assert {each["step"].device.type for each in optimizer.state.values()} == {"cpu"}  # as torch keeps it
        _shifted(model, _numbers()).backward()
        optimizer.step()


@case
def what_cannot_be_put_on_the_card_is_refused() -> None:
    def said(make: Callable[[], Any]) -> str:
        try:
            make()
        except (tightfit.InvalidInput, tightfit.Unsupported) as error:
            return str(error)
        raise AssertionError("nothing was raised")

    batch = _numbers(where="cpu")
    both = _half_frozen("cpu")
    both[0].to("pretend:1")
    assert "lies on pretend:1" in said(lambda: tightfit.fit(both, batch, "80%", loss=_shifted, device="pretend:0"))
    on_card = _half_frozen("pretend")
    assert "lies on pretend:0" in said(lambda: tightfit.fit(on_card, batch, "80%", loss=_shifted, device="cpu"))
    compiled = torch.compile(_half_frozen("cpu"))
    assert "compiled" in said(lambda: tightfit.fit(compiled, batch, "80%", loss=_shifted, device="pretend"))
    later = _half_frozen("cpu")
    later[1][0].weight.bnb_quantized = False
    assert "device_map={'': 'cpu'}" in said(lambda: tightfit.fit(later, batch, "80%", loss=_shifted, device="pretend"))


def main(names: list[str]) -> None:
    card.load()
    for name in names or CASES:
        began = time.perf_counter()
        error = ""
        try:
            CASES[name]()
        except BaseException:
            error = traceback.format_exc()
        control().order("late", 0)
        control().limits(-1, -1)
        gc.collect()
        print(json.dumps({"case": name, "error": error, "seconds": time.perf_counter() - began}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
