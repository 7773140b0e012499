"""A command and its keys. A key is a flag on the command line, a name in a YAML file, and a field of a dataclass.

The comment on the line of a field is the key's help text, and a comment `# --- ...` starts a group of keys. This module
does not import torch.
"""

import argparse
import dataclasses
import inspect
import re
import shutil
import textwrap
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from typing import Any

import yaml

from .data.files import UniqueKeys
from .disk import check_writable
from .errors import ConfigError, did_you_mean
from .trainers.configs import as_annotated, check_config, config_from_dict, from_yaml, kinds_of

REQUIRED = "REQUIRED"  # in place of a default


@dataclass(frozen=True)
class Key:
    """One key of a command: its default as text, its comment and group in the source, and its annotation."""

    shown: str
    comment: str
    group: str
    hint: Any

    def parse(self, text: str) -> Any:
        """The value that the text has in a YAML file. For a key that takes text it stays text, so 1e3 can be a name."""
        kinds = kinds_of(self.hint)
        if str in kinds and list not in kinds:
            return None if text == "null" and type(None) in kinds else text
        try:
            return yaml.load(text, UniqueKeys)
        except (yaml.YAMLError, ValueError):  # ValueError: a day that no month has, a key that occurs twice
            raise ConfigError(f"{text!r} is not a YAML value") from None


@dataclass(frozen=True)
class Command:
    """A command with keys: its help, the dataclasses that hold its keys, and the function that takes these.

    function: "module.name". It is imported only when the command runs, because the module imports torch and
    transformers, which takes seconds; whatever is refused before that is refused at once.
    usual: keys that most people set, for commands whose keys do not all fit a screen. --help explains these and the
    required ones, and lists the others with their defaults.
    resumes: whether the function takes `resume`, and the command line --resume.
    hints: {key that it does not have: what to set instead}, said when that key is refused.
    """

    name: str
    summary: str
    configs: tuple[type, ...]
    function: str | None = None
    usual: tuple[str, ...] = ()
    resumes: bool = False
    hints: dict[str, str] = field(default_factory=dict)

    def keys(self) -> dict[str, Key]:
        return {name: key for cls in self.configs for name, key in keys_of(cls).items()}

    def make(self, values: dict) -> list:
        """The dataclasses with these values. ConfigError for values that are missing or refused, and for an output_dir
        that cannot be written."""
        required = [name for name, key in self.keys().items() if key.shown == REQUIRED and name not in values]
        if required:
            raise ConfigError(f"{self.name} needs {', '.join(required)}: as flags, or as keys of a --config file")
        configs = []
        for cls in self.configs:
            names = {f.name for f in dataclasses.fields(cls)}
            try:
                configs.append(config_from_dict(cls, {k: v for k, v in values.items() if k in names}))
            except ConfigError as error:  # it names the field as Python does, but the user has set a key
                raise ConfigError(re.sub(rf"^{cls.__name__}(\.|: )", f"{self.name}: ", str(error))) from None
        for config in configs:
            if hasattr(config, "output_dir"):
                check_writable(config.output_dir)  # before models are loaded and data is read
        return configs

    def run(self, configs: list, resume: bool) -> None:
        """Raises ConfigError for what is refused, KeyboardInterrupt for a run that a signal ended, RunStopped for one
        that a monitor ended, and NonFiniteError for one that no longer learned."""
        from . import parallel

        parallel.start()
        module, name = self.function.split(".")
        options = {"resume": resume} if self.resumes else {}
        getattr(import_module(f".{module}", __package__), name)(*configs, **options)


class Checked:
    """A dataclass whose fields are checked for their types only."""

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
            shown = _as_yaml(f.default)
        else:
            shown = REQUIRED if f.default_factory is dataclasses.MISSING else _as_yaml(f.default_factory())
        keys[f.name] = Key(shown, comments[f.name], groups[f.name], hints[f.name])
    return keys


def _as_yaml(value) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def checked_options(cls: type, options: dict, key: str) -> dict:
    """The options, checked: `cls` takes each of them, and each value has its type. key: where the user set them."""
    hints = typing.get_type_hints(cls if dataclasses.is_dataclass(cls) else cls.__init__)
    takes = [p.name for p in inspect.signature(cls).parameters.values() if p.default is not p.empty]
    checked = {}
    for name, value in options.items():
        if name not in takes:
            hint = did_you_mean(name, takes, f"it has {', '.join(takes)}")
            raise ConfigError(f"{key}: {cls.__name__} has no {name!r}{hint}")
        checked[name] = from_yaml(f"{key}: {name}", value, hints[name])
        as_annotated(f"{key}: {name}", checked[name], hints[name])
    return checked


# -- flags -------------------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """argparse whose errors are ConfigErrors: one line, with the nearest name."""

    def __init__(self, **options):
        self.width = min(118, shutil.get_terminal_size((120, 24)).columns - 2)
        self.below = ""  # --help ends with it
        self.hints: dict[str, str] = {}
        formatter = partial(argparse.HelpFormatter, max_help_position=self.width // 3, width=self.width)
        super().__init__(**options, allow_abbrev=False, formatter_class=formatter)

    def add_keys(self, command: Command, in_full: bool) -> None:
        """A flag for each key of the command. in_full: --help explains all of them, which --help-all asks for."""
        some = command.usual and not in_full
        self.hints = command.hints
        self.add_argument("--help-all", action="help", help="what every key means" if some else argparse.SUPPRESS)
        others: dict[str, list[str]] = {}
        for name, key in command.keys().items():
            about = key.comment.replace("%", "%%")
            if some and key.shown != REQUIRED and name not in command.usual:
                about = argparse.SUPPRESS
                # textwrap does not break at non-breaking spaces, so a name stays on one line with its default.
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
            name, explained = rest[0].split("=")[0], "--help-all" if "--help-all" in flags else "--help"
            otherwise = f"{self.prog} {explained} explains all of them"
            self.error(unknown("argument", name, flags, otherwise, self.hints.get(name.lstrip("-"))))
        return options

    def error(self, message):
        for action in self._actions:  # in other libraries' scripts --packing alone is true
            flag = "/".join(action.option_strings)
            if action.metavar in ("true", "false") and message == f"argument {flag}: expected one argument":
                message += f": {flag} true"
        raise ConfigError(f"{self.prog.removeprefix('rlhf-fast ')}: {message}")


def unknown(kind: str, name: object, names: Iterable[str], otherwise: str = "", hint: str | None = None) -> str:
    """The message about an unknown name, which ends with the hint, or with the nearest of the names, or if none is
    near, with `otherwise`."""
    return f"unknown {kind} {name!r}" + (f"; {hint}" if hint else did_you_mean(name, names, otherwise))
