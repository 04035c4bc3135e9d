"""A plug-in for Axolotl that fits its trainer's step into the byte budget that its YAML names.

    plugins:
      - tightfit.integrations.axolotl.TightfitPlugin
    tightfit:
      budget: 22GiB

The keys below `tightfit` are the arguments of `TightfitCallback`, which the plug-in gives to whichever trainer Axolotl
builds. Axolotl switches Triton kernels for LoRA on by itself; a replay of those cannot be proven, so the plug-in
switches them off where the YAML does not name them.

Invariant: what the plug-in changes is that default alone. Refused: an unknown key and a value that is none, when the
YAML is read; a plug-in without its key; kernels that the YAML asks for.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeVar

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel, ConfigDict, field_validator, model_validator

from tightfit.core import InvalidInput, TightfitError, Unsupported, levers_named, parse_bytes, parse_host_budget
from tightfit.fitting.planning import what_is_given
from tightfit.integrations.transformers import TightfitCallback

__all__ = ["TightfitArgs", "TightfitPlugin", "TightfitSettings"]

_T = TypeVar("_T")
_NAME = f"{__name__}.TightfitPlugin"

#: Axolotl's keys for kernels whose memory no op shows. The first four it switches on by itself.
_LORA_KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel")
_KERNELS = (
    *_LORA_KERNELS,
    "cut_cross_entropy",
    "liger_cross_entropy",
    "liger_fused_linear_cross_entropy",
    "liger_glu_activation",
    "liger_layer_norm",
    "liger_rms_norm",
    "liger_rope",
)


class TightfitSettings(BaseModel):
    """What the YAML says below `tightfit`: arguments of `TightfitCallback`."""

    model_config = ConfigDict(extra="forbid")

    budget: str | int | None = None
    plan: str | None = None  # the file of a plan of this step, with a budget of its own
    verify: bool = True
    levers: str | list[str] | None = None
    exact: bool = False
    beside: str | list[str] = []
    micro_batch: str | int | None = None
    host_budget: str | int | None = None

    @field_validator("budget")
    @classmethod
    def _is_a_size(cls, value: str | int | None) -> str | int | None:
        return _checked(value, lambda: None if value is None else parse_bytes(value, whole_bytes=1 << 40))

    @field_validator("host_budget")
    @classmethod
    def _is_a_host_budget(cls, value: str | int | None) -> str | int | None:
        return _checked(value, lambda: parse_host_budget(value))

    @field_validator("levers", "beside")
    @classmethod
    def _are_levers(cls, value: Any) -> Any:
        return _checked(value, lambda: levers_named(value))

    @model_validator(mode="after")
    def _has_a_budget_or_a_plan(self) -> TightfitSettings:
        return _checked(self, lambda: what_is_given(self.budget, self.plan, self.micro_batch))


def _checked(value: _T, parse: Callable[[], object]) -> _T:
    """`value`, if it can be parsed; pydantic tells of a `ValueError` in the name of the key."""
    try:
        parse()
    except TightfitError as error:
        raise ValueError(str(error)) from None
    return value


class TightfitArgs(BaseModel):
    """What the plug-in adds to Axolotl's configuration."""

    tightfit: TightfitSettings | None = None


class TightfitPlugin(BasePlugin):  # type: ignore[misc]
    """Gives Axolotl's trainer a `TightfitCallback`, which is `callback` afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.callback: TightfitCallback | None = None

    def get_input_args(self) -> str:
        return f"{__name__}.TightfitArgs"

    def register(self, cfg: dict[str, Any]) -> None:
        """Before Axolotl reads the YAML, whose kernels are then as the user left them."""
        if _NAME not in (cfg.get("plugins") or ()):  # Axolotl keeps the plug-ins of earlier configurations
            return
        if not cfg.get("tightfit"):
            raise InvalidInput(
                f"{_NAME} is among the plugins, but the YAML has no key tightfit: give tightfit.budget or tightfit.plan"
            )
        asked = next((key for key in _KERNELS if cfg.get(key)), None)
        if asked is not None:
            raise Unsupported(
                f"{asked}: true and the plug-in of tightfit: such kernels write memory that no op shows, so a replay "
                f"could not be proven; set {asked}: false, or leave the plug-in out"
            )
        if cfg.get("adapter") and all(cfg.get(key) is None for key in _LORA_KERNELS):
            for key in _LORA_KERNELS:
                cfg[key] = False
            print(
                "tightfit: Axolotl's LoRA kernels, which are on by default, are off: no op shows them", file=sys.stderr
            )

    def add_callbacks_pre_trainer(self, cfg: Any, model: Any) -> list[TightfitCallback]:
        if _NAME not in (cfg.plugins or ()):
            return []
        settings = TightfitSettings.model_validate(dict(cfg.tightfit))
        self.callback = TightfitCallback(**settings.model_dump())
        return [self.callback]
