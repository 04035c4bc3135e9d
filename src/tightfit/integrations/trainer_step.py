"""The step that TRL's SFT or DPO trainer would run, around a model that may have no data.

Idea: whatever TRL is installed, its own trainer is made around the model, with its own collator, and its own
`compute_loss` is the loss that is traced. So its chunks, its masks, packing, NEFTune and its other losses are what they
are, and a new release of TRL needs nothing here. Every token is taken to count in the loss, which is the most that a
batch of that length can need.

DPO compares with a reference. With adapters it is the model with its adapters off, as for a run that gives TRL the
adapters' config. Without adapters it is a second model of the same kind, which is part of the step's model while the
step is recorded, so its weights count. With `precompute_ref_log_probs` there is none, and its answers are in the batch.

For a CUDA target TRL's Triton kernels stand as ops without memory of their own: they work in place, in buffers that
Python allocates around them.

Invariant: the model is given back as it was, and nothing is written to disk. Refused (`Unsupported`, with TRL's own
words): what the trainer cannot be made with. Trainers whose batches are not a function of a batch size and a length
(reward models, generated completions) are not here.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from tightfit.core import Unsupported
from tightfit.step.run import LossFunction
from tightfit.trace.fake import logging_step

__all__ = ["settings_of", "trainers_step"]

_OF_BOTH = frozenset({"label_smoothing_factor", "neftune_noise_alpha", "gradient_accumulation_steps",
                      "average_tokens_across_devices", "loss_type", "padding_free", "pad_to_multiple_of"})  # fmt: skip
#: The settings of a run that change what one step computes, and not where it runs or what it writes.
_SETTINGS = {
    "sft": _OF_BOTH | {"packing", "packing_strategy"},
    "dpo": _OF_BOTH | {
        "loss_weights", "label_smoothing", "ld_alpha", "f_divergence_type", "f_alpha_divergence_coef", "beta",
        "use_weighting", "discopop_tau", "disable_dropout", "precompute_ref_log_probs", "router_aux_loss_coef",
    },
}  # fmt: skip
_TOKEN = 3
#: Where the reference stands in the model while its step is recorded.
_REFERENCE = "reference_of_dpo"


def settings_of(trainer: str) -> frozenset[str]:
    """The names of the settings that change the step of TRL's `trainer`, sft or dpo."""
    return _SETTINGS[trainer]


@contextlib.contextmanager
def trainers_step(
    model: nn.Module, trainer: str, settings: Mapping[str, Any], *, batch: int, seq: int, cuda: bool
) -> Iterator[tuple[LossFunction, dict[str, Any]]]:
    """The loss and the batch of the step of TRL's `trainer` on `batch` sequences of `seq` tokens; for DPO, on that many
    pairs of sequences. `settings`: as in the trainer's config class.

    Raises `Unsupported` where TRL is not installed or refuses the settings.
    """
    try:
        import trl
    except ImportError as error:
        raise Unsupported(f"the step of TRL's trainer needs trl: pip install 'tightfit[trl]' ({error})") from None
    from tightfit.integrations.own_step import statistics_kept

    chosen = {name: _as_trl_has_it(value) for name, value in settings.items() if name in settings_of(trainer)}
    restored = contextlib.ExitStack()
    with tempfile.TemporaryDirectory(prefix="tightfit-") as folder, restored:
        _put_back_afterwards(model, restored)
        common = {
            "output_dir": folder, "report_to": [], "use_cpu": True, "bf16": False, "fp16": False,
            "per_device_train_batch_size": batch, "gradient_checkpointing": False, "save_strategy": "no",
        }  # fmt: skip
        try:
            with warnings.catch_warnings(), _quiet():
                warnings.simplefilter("ignore")
                made, rows = (_sft if trainer == "sft" else _dpo)(model, common, chosen, batch, seq)
                collated = dict(made.data_collator(rows))
        except Exception as error:  # TRL and transformers raise what they like for settings that do not fit together
            first = " ".join(line.strip() for line in str(error).splitlines() if line.strip())[:200]
            raise Unsupported(
                f"TRL's {trainer.upper()}Trainer cannot be made here ({type(error).__name__}: {first}); "
                f"trl is {trl.__version__}"
            ) from error
        tensors = {name: value for name, value in collated.items() if isinstance(value, torch.Tensor)}
        items = None
        if "labels" in tensors:
            items = torch.tensor(sum(int((row != -100).sum()) for row in tensors["labels"]))
        if made.neftune_noise_alpha is not None:
            restored.enter_context(_neftune(model, float(made.neftune_noise_alpha)))
        if cuda:
            restored.enter_context(_kernels_as_ops())
        restored.enter_context(statistics_kept(made))
        reference = getattr(made, "ref_model", None)
        if reference is not None:
            model.add_module(_REFERENCE, reference)
            restored.callback(model._modules.pop, _REFERENCE)

        def loss(model: nn.Module, given: Any) -> torch.Tensor:
            with logging_step():
                found: torch.Tensor = made.compute_loss(model, dict(given), num_items_in_batch=items)
            return found

        yield loss, tensors


def _as_trl_has_it(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _standing(kind: Any) -> Any:
    """`kind`, a trainer's class, that leaves the model where it is (on `meta` there is nothing to move) and its data as
    they are."""

    class Standing(kind):  # type: ignore[misc]  # TRL is untyped
        def _move_model_to_device(self, model: Any, device: Any) -> Any:
            return model

        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

    Standing.__name__ = kind.__name__
    return Standing


def _sft(
    model: nn.Module, common: dict[str, Any], chosen: dict[str, Any], batch: int, seq: int
) -> tuple[Any, list[dict[str, Any]]]:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = [{"input_ids": [_TOKEN] * seq, "labels": [_TOKEN] * seq} for _ in range(batch)]
    args = SFTConfig(
        max_length=seq if chosen.get("packing") else None,  # TRL takes no other for padding_free
        dataset_kwargs={"skip_prepare_dataset": True}, **common, **chosen,
    )  # fmt: skip
    made = _standing(SFTTrainer)(
        model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=_tokenizer()
    )
    return made, rows


def _dpo(
    model: Any, common: dict[str, Any], chosen: dict[str, Any], batch: int, seq: int
) -> tuple[Any, list[dict[str, Any]]]:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    adapted = hasattr(model, "peft_config")
    ready = bool(chosen.pop("precompute_ref_log_probs", False))  # what it precomputes with is not here
    row: dict[str, Any] = {"prompt_ids": [_TOKEN], "chosen_ids": [_TOKEN] * (seq - 1)}
    row["rejected_ids"] = row["chosen_ids"]
    if ready:
        row |= {"ref_chosen_logps": 0.0, "ref_rejected_logps": 0.0}
    rows = [row] * batch
    reference = None
    if not adapted:
        reference = copy.deepcopy(model).eval().requires_grad_(False)
        reference.to = lambda *_, **__: reference  # as the model, it stays where it is
    if adapted:  # TRL copies the adapters to compare with them, which a run that gives it their config does not
        model.add_adapter = _on_meta(model.add_adapter)
    made = _standing(DPOTrainer)(
        model=model, ref_model=reference, args=DPOConfig(max_length=seq, **common, **chosen),
        train_dataset=Dataset.from_list(rows), processing_class=_tokenizer(),
    )  # fmt: skip
    if reference is not None:
        vars(reference).pop("to")
    elif "ref" in model.peft_config:
        model.delete_adapter("ref")
    if ready:
        if not hasattr(made, "precompute_ref_logps"):
            raise AttributeError("precompute_ref_log_probs is not looked for where this release of tightfit knows it")
        made.precompute_ref_logps, made.ref_model = True, None
    return made, rows


def _on_meta(add_adapter: Any) -> Any:
    def added(*args: Any, **kwargs: Any) -> Any:
        with torch.device("meta"):
            return add_adapter(*args, **kwargs)

    return added


def _put_back_afterwards(model: Any, restored: contextlib.ExitStack) -> None:
    """Everything that TRL's trainers change about a model when they are made around it."""
    base = _causal_model(model)
    config = getattr(base, "config", None)
    configs = [config, getattr(base, "generation_config", None)]
    if config is not None and hasattr(config, "get_text_config"):
        configs.append(config.get_text_config())
    for holder in {id(each): each for each in (model, base, *configs) if each is not None}.values():
        restored.callback(_attributes_put_back, holder, dict(vars(holder)))
    dropouts = [(each, each.p) for each in model.modules() if isinstance(each, nn.Dropout)]
    parameters = [(each, each.data, each.requires_grad) for each in model.parameters()]
    for dropout, share in dropouts:
        restored.callback(setattr, dropout, "p", share)
    for parameter, data, needs in parameters:
        restored.callback(parameter.requires_grad_, needs)
        restored.callback(setattr, parameter, "data", data)  # TRL makes the adapters of 4-bit models bfloat16


def _causal_model(model: Any) -> Any:
    """The language model itself, whose forward TRL replaces; PEFT stands around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _attributes_put_back(holder: Any, before: dict[str, Any]) -> None:
    """TRL replaces `forward`, notes on the model that it trains it, and writes token ids into its configs."""
    vars(holder).clear()
    vars(holder).update(before)


def _tokenizer() -> Any:
    """The least that the trainer takes: it never meets a text."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<unk>": 0, "<pad>": 1, "<eos>": 2}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>", model_max_length=1 << 30
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """TRL's and transformers' advice is about a training, and this is none."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def _neftune(model: Any, alpha: float) -> Iterator[None]:
    """Noise on the embeddings, as the Trainer adds it: uniform, scaled by the root of length times width.

    Source: transformers/integrations/neftune.py (Jain et al., arXiv:2310.05914).
    """

    def noisy(module: nn.Module, _: Any, out: torch.Tensor) -> torch.Tensor:
        size = alpha / (out.size(1) * out.size(2)) ** 0.5
        return out + torch.zeros_like(out).uniform_(-size, size) if module.training else out

    handle = model.get_input_embeddings().register_forward_hook(noisy)
    try:
        yield
    finally:
        handle.remove()


class _Kernel:
    """A Triton kernel: launched on a grid, it reads and writes what it is given and allocates nothing."""

    def __getitem__(self, grid: Any) -> Any:
        return lambda *_, **__: None


@contextlib.contextmanager
def _kernels_as_ops() -> Iterator[None]:
    """TRL's path for CUDA, walked on fake tensors of the CPU."""
    try:
        from trl.kernels import chunked_logprob
        from trl.trainer import utils
    except ImportError:  # a release whose losses are made of torch's ops
        yield
        return
    changes: dict[Any, dict[str, Any]] = {
        chunked_logprob: {
            "_use_triton": lambda device: True, "_forward_kernel": _Kernel(), "_backward_kernel": _Kernel(),
            "_addmm_fp32": _add_product, "triton": getattr(chunked_logprob, "triton", None) or _Triton,
        },
        utils: {"_use_triton": lambda device: True},
    }  # fmt: skip
    before = {module: {name: vars(module).get(name) for name in names} for module, names in changes.items()}
    try:
        for module, names in changes.items():
            for name, value in names.items():
                setattr(module, name, value)
        yield
    finally:
        for module, names in before.items():
            for name, value in names.items():
                if value is None:
                    vars(module).pop(name, None)
                else:
                    setattr(module, name, value)


class _Triton:
    @staticmethod
    def cdiv(one: int, other: int) -> int:
        return -(-one // other)


def _add_product(total: torch.Tensor, one: torch.Tensor, other: torch.Tensor) -> None:
    """`total += one @ other` in float32 from half precision, which only CUDA does without copies of the two."""
    if one.dtype is total.dtype:
        total.addmm_(one, other)
    else:
        torch.ops.aten.addmm.dtype_out(total, one, other, total.dtype, out=total)
