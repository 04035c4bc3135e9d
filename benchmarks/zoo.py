"""Every architecture of transformers that can be built small: gradients, peak, removal.

    python benchmarks/zoo.py                 # all of them; writes benchmarks/results/zoo.json
    python benchmarks/zoo.py llama gpt2      # some, printed only

For each architecture: tiny random weights from its own config (3 layers, hidden 64), one step without
checkpointing, then `tightfit.fit` at 75 % and 50 % of the unplanned activation peak, or at the least feasible when
that is higher. Every gradient is compared bit by bit, the allocator's count of the peak with the budget, and the
plain step once more after `remove()`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import json
import multiprocessing
import os
import resource
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import drawn

os.environ.setdefault("KINETO_LOG_LEVEL", "6")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import tightfit
from tightfit.step.snapshot import undisturbed
from tightfit.verify.gradients import Outcome, differences
from tightfit.verify.peak import PeakMeter, static_bytes

RESULTS = Path(__file__).parent / "results" / "zoo.json"
SHARES = (0.75, 0.5)  # of the unplanned activation peak
BATCH, SEQ = 2, 32
PEAK_TOLERANCE = 0.005
AT_MOST_PARAMETERS = 60_000_000
SECONDS, MEMORY_BYTES = 150, 9 * 2**30  # for one architecture

#: Sizes by the names that configs give them.
SMALL: dict[str, Any] = {
    "vocab_size": 256, "hidden_size": 64, "n_embd": 64, "d_model": 64, "dim": 64, "embedding_size": 64, "emb_dim": 64,
    "num_hidden_layers": 3, "n_layer": 3, "n_layers": 3, "num_layers": 3, "encoder_layers": 3, "decoder_layers": 3,
    "num_encoder_layers": 3, "num_decoder_layers": 3,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "num_key_value_heads": 2, "num_kv_heads": 2, "head_dim": 16,
    "intermediate_size": 128, "ffn_dim": 128, "n_inner": 128, "d_ff": 128, "d_kv": 16, "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128, "hidden_dim": 128, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
    "max_position_embeddings": 128, "n_positions": 128, "max_seq_len": 128,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_num_experts": 4,
    "sliding_window": 16, "attention_window_size": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
    "n_group": 1, "topk_group": 1, "state_size": 8, "mamba_d_state": 8, "lru_width": 64,
    "use_cache": False,
}  # fmt: skip

#: What an architecture needs besides, because its own sizes hang together.
SPECIAL: dict[str, dict[str, Any]] = {
    "gpt_neo": {"attention_types": [[["global", "local"], 1], [["global"], 1]]},
    "mamba2": {"head_dim": 32, "n_groups": 1},
    "codegen": {"rotary_dim": 8},
    "gptj": {"rotary_dim": 8},
    "ernie4_5_moe": {"moe_k": 2},
    "deepseek_v32": {"num_key_value_heads": 4},
    "glm_moe_dsa": {"num_key_value_heads": 4},
    "axk2": {"num_key_value_heads": 4},
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2},
    "nemotron": {"num_key_value_heads": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "longcat_flash": {
        "ffn_hidden_size": 128,
        "expert_ffn_hidden_size": 32,
        "num_layers": 2,
        "zero_expert_num": 2,
        "moe_topk": 2,
        "head_dim": 8,
    },
    "xmod": {"default_language": "en_XX"},
}

AUTO = {
    "causal": (AutoModelForCausalLM, modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    "seq2seq": (AutoModelForSeq2SeqLM, modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
    "masked": (AutoModelForMaskedLM, modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcomes:
    """What one architecture did. `status`: ok, wrong, over, unsupported, cannot be built, cannot be trained."""

    name: str
    status: str
    reason: str = ""
    units: int = 0
    shares: tuple[float, ...] = ()  # of the unplanned activation peak that were planned for
    recompute_share: tuple[float, ...] = ()  # recomputed FLOPs of the forward's
    fallbacks: int = 0
    prediction_off: float = 0.0  # worst
    seconds: float = 0.0


def names() -> list[str]:
    """`kind:model_type` of everything that transformers lists, causal language models first."""
    found = [f"{kind}:{name}" for kind, (_, table) in AUTO.items() for name in table]
    seen: set[str] = set()
    return [n for n in found if not (n.split(":")[1] in seen or seen.add(n.split(":")[1]))]


def build(name: str, seed: int = 0) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A tiny model in training mode, and a batch for it. Raises whatever transformers raises."""
    kind, _, model_type = name.rpartition(":")
    kind = kind or next(k for k, (_, table) in AUTO.items() if model_type in table)
    auto, _ = AUTO[kind]
    config = small_config(model_type)
    if getattr(config, "is_encoder_decoder", False) and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = 0
    with torch.device("meta"):
        parameters = sum(p.numel() for p in auto.from_config(config, trust_remote_code=False).parameters())
    if parameters > AT_MOST_PARAMETERS:
        raise ValueError(f"the config does not shrink: {parameters:,} parameters")
    torch.manual_seed(seed)
    model = auto.from_config(config, trust_remote_code=False).float().train()
    vocabulary = min(int(getattr(config.get_text_config(), "vocab_size", 256)), 256)
    ids = torch.randint(3, vocabulary, (BATCH, SEQ))
    return model, {"input_ids": ids, "labels": ids.clone()}


def small_config(model_type: str) -> Any:
    return _shrunk(CONFIG_MAPPING[model_type], SPECIAL.get(model_type, {}))


def _shrunk(cls: Any, special: dict[str, Any]) -> Any:
    """A config of class `cls` with every size that it has made small, its inner configs too."""
    default = cls()
    wanted = {k: v for k, v in SMALL.items() if hasattr(default, k)}
    for key in getattr(cls, "sub_configs", {}):
        inner = getattr(default, key, None)
        if isinstance(inner, transformers.PreTrainedConfig):
            wanted[key] = _shrunk(type(inner), {})
    if "num_key_value_heads" in wanted and getattr(default, "num_key_value_heads", None) is None:
        del wanted["num_key_value_heads"]
    if "sliding_window" in wanted and getattr(default, "sliding_window", None) is None:
        del wanted["sliding_window"]
    layers = wanted.get("num_hidden_layers", 3)
    for key in ("layer_types", "mlp_layer_types"):
        kinds = getattr(default, key, None)
        if isinstance(kinds, (list, tuple)) and len(kinds) > layers:
            # as many kinds of layers as fit, so that a hybrid stays one
            distinct = list(dict.fromkeys(kinds))
            wanted[key] = (distinct * layers)[:layers]
    wanted |= special
    accepted = inspect.signature(cls.__init__).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in accepted.values())
    return cls(**{k: v for k, v in wanted.items() if open_ended or k in accepted})


def check(name: str) -> Outcomes:
    """Run one architecture through everything."""
    started = time.perf_counter()

    def answer(status: str, reason: str = "", **found: Any) -> Outcomes:
        return Outcomes(
            name=name, status=status, reason=" ".join(reason.split())[:300],
            seconds=round(time.perf_counter() - started, 1), **found,
        )  # fmt: skip

    try:
        model, batch = build(name)
    except Exception as error:
        return answer("cannot be built", f"{type(error).__name__}: {error}")
    try:
        model(**batch).loss.backward()
    except Exception as error:
        return answer("cannot be trained", f"{type(error).__name__}: {error}")
    model.zero_grad()
    reference = observe(model, batch)
    if differences(reference, observe(model, batch)):
        return answer("cannot be trained", "the plain step is not the same twice")
    try:
        trace = tightfit.trace(model, batch, tiles=False)
        unplanned = tightfit.simulate(trace).peak_bytes
        before = static_bytes(model, None, batch)
        shares, recompute, fallbacks, off = [], [], 0, 0.0
        for share in SHARES:
            budget = before + int(share * (unplanned - before))
            try:
                plan = tightfit.plan(trace, budget)
            except tightfit.BudgetInfeasible as error:
                plan = tightfit.plan(trace, error.least_bytes)
            with tightfit.apply(model, plan) as applied:
                wrong = differences(reference, observe(model, batch))
                if wrong:
                    return answer("wrong", f"at {share:.0%}: {next(iter(wrong.items()))}", units=len(trace.units))
                fallbacks += applied.stats().fallbacks
                peak = peak_bytes(model, batch, before)
            off = max(off, abs(peak / plan.peak_bytes - 1))
            shares.append(round((plan.budget_bytes - before) / (unplanned - before), 3))
            recompute.append(round(plan.recompute_flops / max(1, plan.forward_flops), 3))
            if peak > plan.budget_bytes * (1 + PEAK_TOLERANCE):
                return answer("over", f"{peak} B for a budget of {plan.budget_bytes} B", units=len(trace.units))
        if wrong := differences(reference, observe(model, batch)):
            return answer("wrong", f"after remove: {next(iter(wrong.items()))}")
    except tightfit.Unsupported as error:
        return answer("unsupported", str(error))
    pinned = sorted({u.pinned for u in trace.units if u.pinned})
    return answer(
        "ok", "; ".join(pinned), units=len(trace.units), shares=tuple(shares), recompute_share=tuple(recompute),
        fallbacks=fallbacks, prediction_off=round(off, 5),
    )  # fmt: skip


def observe(model: nn.Module, batch: Any) -> Outcome:
    """Gradients and buffers of one step from the same random state."""
    with undisturbed(model):
        torch.manual_seed(1)
        model(**batch).loss.backward()
        return Outcome(model)


def peak_bytes(model: nn.Module, batch: Any, before: int) -> int:
    with undisturbed(model), PeakMeter("cpu") as meter:
        model(**batch).loss.backward()
    return before + meter.rise_bytes


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    transformers.logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def check_apart(name: str) -> Outcomes:
    """`check` in a process of its own, so that one architecture cannot take the others down."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
        try:
            theirs.send(check(name))
        except Exception as error:
            theirs.send(Outcomes(name=name, status="error", reason=f"{type(error).__name__}: {error}"[:300]))

    process = context.Process(target=work)
    process.start()
    theirs.close()
    try:
        if ours.poll(SECONDS):
            found: Outcomes = ours.recv()
            return found
        return Outcomes(name=name, status="error", reason=f"not done after {SECONDS} s")
    except EOFError:
        return Outcomes(name=name, status="error", reason="its process ended without an answer")
    finally:
        process.kill()
        process.join()


def main(asked: list[str]) -> int:
    found = []
    with quiet():
        for name in asked or names():
            outcome = check_apart(name)
            found.append(outcome)
            print(json.dumps(dataclasses.asdict(outcome)), flush=True)
    counts: dict[str, int] = {}
    for outcome in found:
        counts[outcome.status] = counts.get(outcome.status, 0) + 1
    print(counts, file=sys.stderr)
    if not asked:
        from tightfit.step.environment import environment

        record = {"environment": environment(), "counts": counts, "rows": [dataclasses.asdict(o) for o in found]}
        drawn.write(RESULTS, record)
    return 1 if set(counts) & {"wrong", "over", "error"} else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
