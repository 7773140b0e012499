"""What the settings of all trainers share: the check of their types and ranges, and how they are made from a file.

Like the modules that hold them (*_config.py) this imports no torch: --help, and a value that is refused, wait for none.
"""

from __future__ import annotations

import difflib
import os
import types
import typing

from ..errors import ConfigError

LR_SCHEDULES = ("linear", "cosine", "constant")  # see optimizers.make_scheduler
DROP = ("empty", "truncated", "scaffold_leak")  # of constitutional.py: flags of replies that no model should learn from


def check_config(config, *, positive=(), non_negative=(), unit=(), choices=None) -> None:
    """Raises ConfigError unless every field has its annotated type and lies in its range.

    positive: > 0. non_negative: >= 0. unit: in [0, 1]. choices: {field: allowed values}. None passes. A path is
    converted to text, and an int in a float field to float.
    """
    name = type(config).__name__
    for field, kind in typing.get_type_hints(type(config)).items():
        value = getattr(config, field)
        union = typing.get_origin(kind) in (types.UnionType, typing.Union)
        kinds = tuple(typing.get_origin(k) or k for k in (typing.get_args(kind) if union else (kind,)))
        if str in kinds and isinstance(value, os.PathLike):
            setattr(config, field, os.fspath(value))
        elif float in kinds and isinstance(value, int) and not isinstance(value, bool):
            setattr(config, field, float(value))
        elif not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            names = " or ".join("None" if k is types.NoneType else k.__name__ for k in kinds)
            raise ConfigError(f"{name}.{field} = {value!r} must be {names}")
    for fields, ok, what in (
        (positive, lambda v: v > 0, "greater than 0"),
        (non_negative, lambda v: v >= 0, "0 or more"),
        (unit, lambda v: 0 <= v <= 1, "between 0 and 1"),
    ):
        for field in fields:
            value = getattr(config, field)
            if value is not None and not ok(value):
                raise ConfigError(f"{name}.{field} = {value!r} must be {what}")
    for field, allowed in (choices or {}).items():
        if getattr(config, field) not in allowed:
            raise ConfigError(
                f"{name}.{field} = {getattr(config, field)!r} must be one of {', '.join(map(repr, allowed))}"
            )


def check_lora(config) -> None:
    if config.lora_target_modules is not None and not config.lora_r:
        name = type(config).__name__
        raise ConfigError(f"{name}: lora_target_modules says where adapters go, and lora_r = 0 makes none: set lora_r")


def config_from_dict(cls, values: dict):
    """cls(**values), where an unknown key is a ConfigError that proposes the nearest field.

    Numbers written as text are converted: YAML 1.1 reads 1e-5 as a string.
    """
    hints = typing.get_type_hints(cls)
    converted = {}
    for key, value in values.items():
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, 1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; it has {', '.join(sorted(hints))}"
            raise ConfigError(f"{cls.__name__} has no field {key!r}{hint}")
        kinds = typing.get_args(hints[key]) or (hints[key],)
        if isinstance(value, str) and float in kinds and str not in kinds:
            try:
                value = float(value)
            except ValueError:
                raise ConfigError(f"{cls.__name__}.{key} = {value!r} must be a number") from None
        converted[key] = value
    try:
        return cls(**converted)
    except TypeError as error:  # a required field is missing
        raise ConfigError(f"{cls.__name__}: {str(error).replace('__init__() ', '')}") from None
