"""The step that TRL's SFT trainer would run, around a model that may have no data.

Idea: whatever TRL is installed, its own `SFTTrainer` is made around the model, with its own collator, and its own
`compute_loss` is the loss that is traced. So its chunks, its masks, packing, NEFTune and its other losses are what they
are, and a new release of TRL needs nothing here. Every token is taken to count in the loss, which is the most that a
batch of that length can need.

For a CUDA target TRL's Triton kernels stand as ops without memory of their own: they work in place, in buffers that
Python allocates around them.

Invariant: the model is given back as it was, and nothing is written to disk. Refused (`Unsupported`, with TRL's own
words): what the trainer cannot be made with.
"""

from __future__ import annotations

import contextlib
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

__all__ = ["SETTINGS", "sft_step"]

#: The settings of a run that change what one step computes, and not where it runs or what it writes.
SETTINGS = frozenset(
    {
        "assistant_only_loss", "completion_only_loss", "loss_type", "label_smoothing_factor", "neftune_noise_alpha",
        "packing", "packing_strategy", "padding_free", "pad_to_multiple_of", "average_tokens_across_devices",
        "gradient_accumulation_steps", "chat_template_path",
    }
)  # fmt: skip
#: Of those, what is about data that is not here: every token counts.
_OF_THE_DATA = frozenset({"assistant_only_loss", "completion_only_loss", "chat_template_path"})
_TOKEN = 3


@contextlib.contextmanager
def sft_step(
    model: nn.Module, settings: Mapping[str, Any], *, batch: int, seq: int, cuda: bool
) -> Iterator[tuple[LossFunction, dict[str, Any]]]:
    """The loss and the batch of SFT's step on `batch` sequences of `seq` tokens. `settings` as in `SFTConfig`.

    Raises `Unsupported` where TRL is not installed or refuses the settings.
    """
    try:
        from trl import SFTConfig, SFTTrainer
    except ImportError as error:
        raise Unsupported(f"the step of TRL's trainer needs trl: pip install 'tightfit[trl]' ({error})") from None
    from datasets import Dataset

    from tightfit.integrations.trainer import _statistics_kept

    class Standing(SFTTrainer):  # type: ignore[misc]  # TRL is untyped
        """One that leaves the model where it is: on `meta` there is nothing to move."""

        def _move_model_to_device(self, model: Any, device: Any) -> Any:
            return model

    rows = [{"input_ids": [_TOKEN] * seq, "labels": [_TOKEN] * seq} for _ in range(batch)]
    chosen = {name: value for name, value in settings.items() if name in SETTINGS - _OF_THE_DATA}
    restored = contextlib.ExitStack()
    with tempfile.TemporaryDirectory(prefix="tightfit-") as folder, restored:
        for module in {id(m): m for m in (model, _causal_model(model))}.values():
            restored.callback(_attributes_put_back, module, dict(vars(module)))
        restored.callback(_config_put_back, model, getattr(getattr(model, "config", None), "use_cache", None))
        requires = [(p, p.requires_grad) for p in model.parameters()]
        restored.callback(lambda: [p.requires_grad_(needs) for p, needs in requires])
        try:
            with warnings.catch_warnings(), _quiet():
                warnings.simplefilter("ignore")
                args = SFTConfig(
                    output_dir=folder, report_to=[], use_cpu=True, bf16=False, fp16=False,
                    max_length=seq if chosen.get("packing") else None,  # TRL takes no other for padding_free
                    per_device_train_batch_size=batch, gradient_checkpointing=False, save_strategy="no",
                    dataset_kwargs={"skip_prepare_dataset": True}, **chosen,
                )  # fmt: skip
                trainer = Standing(
                    model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=_tokenizer()
                )
                collated = dict(trainer.data_collator(rows))
        except Exception as error:  # TRL and transformers raise what they like for settings that do not fit together
            first = " ".join(line.strip() for line in str(error).splitlines() if line.strip())[:200]
            raise Unsupported(f"TRL's SFTTrainer cannot be made here ({type(error).__name__}: {first})") from error
        tensors = {name: value for name, value in collated.items() if isinstance(value, torch.Tensor)}
        items = torch.tensor(sum(int((row != -100).sum()) for row in tensors["labels"]))
        if trainer.neftune_noise_alpha is not None:
            restored.enter_context(_neftune(model, float(trainer.neftune_noise_alpha)))
        if cuda:
            restored.enter_context(_kernels_as_ops())
        restored.enter_context(_statistics_kept(trainer))

        def loss(model: nn.Module, given: Any) -> torch.Tensor:
            with logging_step():
                found: torch.Tensor = trainer.compute_loss(model, dict(given), num_items_in_batch=items)
            return found

        yield loss, tensors


def _causal_model(model: Any) -> Any:
    """The language model itself, whose forward TRL replaces; PEFT stands around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _attributes_put_back(module: nn.Module, before: dict[str, Any]) -> None:
    """TRL replaces `forward`, and notes on the model that it trains it."""
    vars(module).clear()
    vars(module).update(before)


def _config_put_back(model: Any, use_cache: Any) -> None:
    if use_cache is not None:
        model.config.use_cache = use_cache


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
