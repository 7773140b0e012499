"""Functions that all config classes share: they check types and ranges, and convert the values of a YAML file.

This module and the *_config.py modules do not import torch, so that --help and error messages come at once.
"""

from __future__ import annotations

import math
import os
import types
import typing

from ..errors import ConfigError, did_you_mean

LR_SCHEDULES = ("linear", "cosine", "constant")  # see optimizers.make_scheduler
DROP = ("empty", "truncated", "scaffold_leak")  # flags (judges/hygiene.py) of replies that no model should learn from


def kinds_of(hint) -> tuple[type, ...]:
    """The classes that an annotation allows: `list[str] | None` -> (list, NoneType)."""
    union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    return tuple(typing.get_origin(kind) or kind for kind in (typing.get_args(hint) if union else (hint,)))


def as_annotated(name: str, value, hint):
    """The value of an option with this annotation. A path becomes text, and an int becomes a float if the annotation
    has float. ConfigError for a value of any other type, and for inf and NaN."""
    kinds = kinds_of(hint)
    if str in kinds and isinstance(value, os.PathLike):
        return os.fspath(value)
    is_bool = isinstance(value, bool)
    if float in kinds and isinstance(value, int) and not is_bool:
        return float(value)
    if not isinstance(value, kinds) or (is_bool and bool not in kinds):
        wanted = " or ".join("null" if kind is types.NoneType else kind.__name__ for kind in kinds)
        raise ConfigError(f"{name} = {value!r} must be {wanted}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{name} = {value!r} must be a finite number")
    return value


def from_yaml(name: str, value, hint):
    """The value, or the float that its text stands for if the annotation has float and no text: YAML 1.1 reads 1e-5 as
    a string."""
    kinds = kinds_of(hint)
    if not isinstance(value, str) or float not in kinds or str in kinds:
        return value
    try:
        return float(value)
    except ValueError:
        raise ConfigError(f"{name} = {value!r} must be a number") from None


def check_config(config, *, positive=(), non_negative=(), unit=(), choices=None) -> None:
    """Raises ConfigError unless every field has its annotated type and lies in its range.

    positive: > 0. non_negative: >= 0. unit: in [0, 1]. choices: {field: allowed values}. None always passes. Paths are
    converted to text, and ints to floats in fields that hold a float. A field `seed` must be one that torch and numpy
    take.
    """
    name = type(config).__name__
    for field, hint in typing.get_type_hints(type(config)).items():
        setattr(config, field, as_annotated(f"{name}.{field}", getattr(config, field), hint))
    for fields, ok, what in (
        (positive, lambda v: v > 0, "greater than 0"),
        (non_negative, lambda v: v >= 0, "0 or more"),
        (unit, lambda v: 0 <= v <= 1, "between 0 and 1"),
    ):
        for field in fields:
            value = getattr(config, field)
            if value is not None and not ok(value):
                raise ConfigError(f"{name}.{field} = {value!r} must be {what}")
    if hasattr(config, "seed"):
        check_seed(f"{name}.seed", config.seed)
    for field, allowed in (choices or {}).items():
        if getattr(config, field) not in allowed:
            raise ConfigError(
                f"{name}.{field} = {getattr(config, field)!r} must be one of {', '.join(map(repr, allowed))}"
            )


def check_seed(name: str, seed: int) -> None:
    if not 0 <= seed < 2**64:
        raise ConfigError(f"{name} = {seed} must be 0 or more and below 2**64")


def check_lora(config) -> None:
    if config.lora_target_modules is not None and not config.lora_r:
        name = type(config).__name__
        raise ConfigError(f"{name}: lora_target_modules says where adapters go, but lora_r = 0 makes none: set lora_r")


def config_from_dict(cls, values: dict):
    """cls(**values). An unknown key is a ConfigError that proposes the nearest field."""
    hints = typing.get_type_hints(cls)
    converted = {}
    for key, value in values.items():
        if key not in hints:
            hint = did_you_mean(key, hints, f"it has {', '.join(sorted(hints))}")
            raise ConfigError(f"{cls.__name__} has no field {key!r}{hint}")
        converted[key] = from_yaml(f"{cls.__name__}.{key}", value, hints[key])
    try:
        return cls(**converted)
    except TypeError as error:  # a required field is missing
        raise ConfigError(f"{cls.__name__}: {str(error).replace('__init__() ', '')}") from None
