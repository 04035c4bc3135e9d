"""A tokenizer that needs no files: one token for each byte."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from tightfit.core import (
    InvalidInput,
    reason_of,
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that needs no files: token i is byte i; 256 begins, 257 ends, 258 pads."""
    alphabet = _byte_characters()
    tokenizer = Tokenizer(models.BPE(vocab={char: byte for byte, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in ("<bos>", "<eos>", "<pad>")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")


def _byte_characters() -> list[str]:
    """The character that stands for each byte in byte-level tokenizers since GPT-2: itself where it can be printed."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = itertools.count(0x100)
    return [chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)]


def tokenizer_for(model: str, trust_remote_code: bool) -> Any:
    """The tokenizer in the model's folder or hub entry; else, for shapes without one, the byte tokenizer."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json")):
            return byte_tokenizer()
    elif "/" not in model:
        return byte_tokenizer()
    try:
        return AutoTokenizer.from_pretrained(
            model, trust_remote_code=trust_remote_code, local_files_only=folder.is_dir()
        )
    except (OSError, ValueError) as error:
        raise InvalidInput(f"cannot load the tokenizer of {model!r}: {reason_of(error)}") from error
