"""A command and its keys: flags on a command line, names in a YAML file, fields of the dataclasses that it is run with.

What a key means is the comment beside its field; a comment `# --- ...` begins a group of them. This imports no torch.
"""

import argparse
import dataclasses
import difflib
import inspect
import re
import shutil
import textwrap
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import yaml

from .disk import check_writable
from .errors import ConfigError
from .trainers.configs import check_config, config_from_dict

REQUIRED = "REQUIRED"  # in place of a default


@dataclass(frozen=True)
class Key:
    """One key of a command: its default as text, its comment and group in the source, the type of its values."""

    shown: str
    comment: str
    group: str
    hint: Any

    def parse(self, text: str) -> Any:
        """The value that `text` would have in a YAML file. Where the key takes text it stays text, so that 1e3 can be a
        name."""
        kinds = typing.get_args(self.hint) or (self.hint,)
        if str in kinds and list not in kinds:
            return None if text == "null" and type(None) in kinds else text
        try:
            return yaml.safe_load(text)
        except yaml.YAMLError:
            raise ConfigError(f"{text!r} is not a YAML value") from None


@dataclass(frozen=True)
class Command:
    """A command with keys: what --help says, the dataclasses that hold its keys, and the function that takes them.

    function: "module.name", because the module imports torch and transformers, which take seconds; what is refused
    before is refused at once.
    usual: keys that most people set, where all of them do not fit a screen. --help shows what these and the required
    ones mean, and of the others names and defaults.
    """

    name: str
    summary: str
    configs: tuple[type, ...]
    function: str | None = None
    usual: tuple[str, ...] = ()

    def keys(self) -> dict[str, Key]:
        return {name: key for cls in self.configs for name, key in keys_of(cls).items()}

    def make(self, values: dict) -> list:
        """The dataclasses with these values. Raises ConfigError for values that are missing or refused, and for an
        output_dir that cannot be written."""
        required = [name for name, key in self.keys().items() if key.shown == REQUIRED and name not in values]
        if required:
            raise ConfigError(f"{self.name} needs {', '.join(required)}: as flags, or as keys of a --config file")
        configs = []
        for cls in self.configs:
            names = {f.name for f in dataclasses.fields(cls)}
            try:
                configs.append(config_from_dict(cls, {k: v for k, v in values.items() if k in names}))
            except ConfigError as error:  # names a field as Python does, where a user has given a key
                raise ConfigError(re.sub(rf"^{cls.__name__}(\.|: )", f"{self.name}: ", str(error))) from None
        for config in configs:
            if hasattr(config, "output_dir"):
                check_writable(config.output_dir)  # before models are loaded and data read
        return configs

    def run(self, configs: list, resume: bool) -> None:
        """Raises ConfigError for what is refused, KeyboardInterrupt for a run that a signal ended, and RunStopped for
        one that a monitor did."""
        from . import parallel

        parallel.start()
        module, name = self.function.split(".")
        getattr(import_module(f".{module}", __package__), name)(*configs, resume)


class Checked:
    """A dataclass whose fields are only checked for their types."""

    def __post_init__(self):
        check_config(self)


def keys_of(cls: type) -> dict[str, Key]:
    """{field of the dataclass: its Key}, read from its source."""
    hints, comments, groups, group = typing.get_type_hints(cls), {}, {}, ""
    line = re.compile(r"^    (?:# --- (.+)|(\w+): [^#\n]*(?:# (.+))?)$", re.MULTILINE)
    for heading, name, comment in line.findall(inspect.getsource(cls)):
        group = heading or group
        comments[name], groups[name] = comment, group
    keys = {}
    for f in dataclasses.fields(cls):
        if f.default is not dataclasses.MISSING:
            shown = "null" if f.default is None else str(f.default)
        else:
            shown = REQUIRED if f.default_factory is dataclasses.MISSING else str(f.default_factory())
        keys[f.name] = Key(shown, comments[f.name], groups[f.name], hints[f.name])
    return keys


def known(cls: type, options: dict, key: str) -> dict:
    """The options, if `cls` takes them all, and values of their types."""
    hints = typing.get_type_hints(cls if dataclasses.is_dataclass(cls) else cls.__init__)
    takes = [p.name for p in inspect.signature(cls).parameters.values() if p.default is not p.empty]
    for name, value in options.items():
        if name not in takes:
            near = difflib.get_close_matches(str(name), takes, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(takes)}"
            raise ConfigError(f"{key}: {cls.__name__} has no {name!r}; {hint}")
        kinds = typing.get_args(hints[name]) or (hints[name],)
        fits = isinstance(value, (*kinds, int) if float in kinds else kinds)
        if not fits or (isinstance(value, bool) and bool not in kinds):
            wanted = " or ".join("null" if k is type(None) else k.__name__ for k in kinds)
            raise ConfigError(f"{key}: {name} = {value!r} must be {wanted}")
    return options


# -- flags -------------------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """argparse that refuses as the rest of the package does: one line, with the nearest name."""

    def __init__(self, **options):
        self.width = min(118, shutil.get_terminal_size((120, 24)).columns - 2)
        self.below = ""  # --help ends with it
        formatter = partial(argparse.HelpFormatter, max_help_position=self.width // 3, width=self.width)
        super().__init__(**options, allow_abbrev=False, formatter_class=formatter)

    def add_keys(self, command: Command, in_full: bool) -> None:
        """A flag for each key of the command. in_full: --help explains all of them, as --help-all is to do."""
        some = command.usual and not in_full
        self.add_argument("--help-all", action="help", help="what every key means" if some else argparse.SUPPRESS)
        others: dict[str, list[str]] = {}
        for name, key in command.keys().items():
            about = key.comment.replace("%", "%%")
            if some and key.shown != REQUIRED and name not in command.usual:
                about = argparse.SUPPRESS
                # What stands together is one word to textwrap.
                others.setdefault(key.group.split(";")[0], []).append(f"{name} {key.shown}".replace(" ", "\xa0"))
            self.add_argument(f"--{name}", metavar=key.shown, default=argparse.SUPPRESS, help=about)
        if others:
            self.below = "\nother keys, with their defaults:\n"
        for group, names in others.items():
            text, indent = (f"{group}: " if group else "") + ", ".join(names), "    " if group else "  "
            text = textwrap.fill(
                text, self.width, initial_indent="  ", subsequent_indent=indent, break_on_hyphens=False
            )
            self.below += text.replace("\xa0", " ") + "\n"

    def format_help(self):
        return super().format_help() + self.below

    def parse_args(self, args=None, namespace=None):
        options, rest = self.parse_known_args(args, namespace)
        if rest:
            flags = [name for action in self._actions for name in action.option_strings]
            self.error(unknown("argument", rest[0].split("=")[0], flags))
        return options

    def error(self, message):
        raise ConfigError(f"{self.prog.removeprefix('rlhf-fast ')}: {message}")


def unknown(kind: str, name: object, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(str(name), names, 1)  # str: YAML keys may be numbers, and "on" is read as True
    return f"unknown {kind} {name!r}" + (f"; did you mean {near[0]!r}?" if near else "")
