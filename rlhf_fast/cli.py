"""The command rlhf-fast: one word for each stage, settings from a YAML file, flags of the same names over them.

    shared keys of the file  <  its section for the stage (sft:, reward:, ppo:, cai:)  <  flags

Exit codes: 0 done; 1 failed, with a traceback, because it is a bug of ours or a fault of the machine; 2 refused, with
one line that says what to change; 3 stopped by a monitor that stop_on names; 130 interrupted. After 3 and 130 the run
can be resumed. They are two codes so that a script can resume interrupted runs and leave the others to a person.
"""

import argparse
import difflib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TextIO

import yaml

from ._version import __version__
from .data.chat import ConfigError
from .monitors import RunStopped

HELP = """\
usage: rlhf-fast COMMAND [--config FILE.yaml] [--KEY VALUE ...]

Train
  sft         supervised fine-tuning on demonstrations
  reward      a reward model from preferences
  ppo         PPO against a reward model or a Python function
  cai WORD    Constitutional AI: validate, revise, pairs, audit, label, derive, or train for all of it
              --resume goes on from the newest checkpoint, --help lists the keys

Look
  generate    answer prompts with a model
  score       JSONL of prompts and responses in, with the scores of a reward model out
  report      write report.html for a run directory
  quickstart  all stages on a small task made on the spot, in minutes on a CPU
  bench       measure the ops on this machine beside PyTorch and others
  info        versions, build, and the kernel each op runs

A YAML file has the keys that are flags here, either shared by all stages or in a section named as the stage is.
torchrun -m rlhf_fast sft ... (or reward, ppo) trains one model in several processes, each on a GPU of its own.
Exit codes: 0 done, 1 failed, 2 refused (the message says what to change), 3 stopped by a monitor (stop_on),
130 interrupted; after these two --resume continues."""

TRAINERS = ("sft", "reward", "ppo")
COMMANDS = (*TRAINERS, "cai", "generate", "score", "report", "quickstart", "bench", "info")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line and returns its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] in (["-h"], ["--help"]):
        print(HELP)
        return 0
    if argv[:1] == ["--version"]:
        print(f"rlhf-fast {__version__}")
        return 0
    try:
        command = argv[0] if argv else ""
        if command not in COMMANDS:
            raise ConfigError(
                f"{_unknown('command', command, COMMANDS) if argv else 'no command'}; see rlhf-fast --help"
            )
        if command not in TRAINERS and (processes := int(os.environ.get("WORLD_SIZE") or 1)) > 1:
            raise ConfigError(
                f"{command} runs in one process, and this is one of {processes}: start it without torchrun"
            )
        return _run(command, argv[1:])
    except ConfigError as error:
        print(f"rlhf-fast: {error}", file=sys.stderr)
        return 2
    except RunStopped as stop:
        print(f"rlhf-fast: stopped by {stop}", file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        print("rlhf-fast: interrupted", file=sys.stderr)
        return 130


def _run(command: str, argv: list[str]) -> int:
    # Imports stand where they are needed: torch and transformers take seconds, and --help should not.
    if command in TRAINERS:
        from .jobs import quiet

        quiet()
        return _train(command, argv)
    if command == "cai":
        return _cai(argv)
    if command == "generate":
        return _generate(argv)
    if command == "score":
        return _score(argv)
    if command == "report":
        return _report(argv)
    if command == "quickstart":
        return _quickstart(argv)
    if command == "bench":
        from .bench import main as bench

        return bench(argv)
    return _info(argv)


# -- training commands -------------------------------------------------------------------------------------------------


CAI_WORDS = ("validate", "revise", "pairs", "audit", "label", "derive", "train")


def _cai(argv: list[str]) -> int:
    if argv[:1] in (["-h"], ["--help"]):
        from .cai_jobs import __doc__ as about

        print(about)
        return 0
    word, rest = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else ("train", argv)
    if word not in CAI_WORDS:
        raise ConfigError(f"cai: {_unknown('word', word, CAI_WORDS)}; see rlhf-fast cai --help")
    if word == "validate":
        parser = _Parser(prog="rlhf-fast cai validate", description="Reads a constitution and says what is in it.")
        parser.add_argument("files", nargs="+", metavar="FILE", help="several files make one constitution")
        parser.add_argument("--allow_code", action="store_true", help="rules by import path, which runs code")
        options = parser.parse_args(rest)
        from .cai_jobs import validate

        print(validate(options.files, options.allow_code))
        return 0
    from .jobs import quiet

    quiet()
    return _train("cai" if word == "train" else word, rest, f"cai {word}")


def _train(stage: str, argv: list[str], shown: str | None = None) -> int:
    from .cai_jobs import CAI
    from .jobs import STAGES

    stages, shown = STAGES | CAI, shown or stage
    spec = stages[stage]
    usage = f"rlhf-fast {shown} [--config FILE] [--resume] [--KEY VALUE ...]"
    parser = _Parser(prog=f"rlhf-fast {shown}", usage=usage, description=spec.summary)
    parser.add_argument("--config", metavar="FILE", help="YAML file with any of the keys below")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in output_dir")
    keys = spec.keys()
    for name, key in keys.items():
        parser.add_argument(
            f"--{name}", metavar=key.shown, default=argparse.SUPPRESS, help=key.comment.replace("%", "%%")
        )
    flags = vars(parser.parse_args(argv))
    file, resume = flags.pop("config"), flags.pop("resume")
    values = {name: keys[name].parse(text) for name, text in flags.items()}
    if file:
        values = read_sections(file, {name: list(s.keys()) for name, s in stages.items()}, stage)[stage] | values
    spec.run(values, resume)
    return 0


def read_sections(path: str, keys: dict[str, list[str]], stage: str | None = None) -> dict[str, dict]:
    """{stage: its values} in a YAML file: the shared keys that the stage has, and over them those of its section.

    keys: {stage: names of its keys}. stage: the one that is going to run. Standard error names what it will not read:
    shared keys that it does not have, and for cai the sections sft, reward and ppo at the top of the file, where they
    belong to other commands (cai has keys of these names). ConfigError for a file that cannot be read or is no mapping,
    and for a key that no stage has.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"--config {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"--config {path} must be a mapping of keys to values, got {type(content).__name__}")
    everywhere = {key for names in keys.values() for key in names}
    # "reward" may be the section of a stage, a mapping, or the key of ppo, a path or a list.
    as_keys = {name for name in keys if name in everywhere and isinstance(content.get(name), str | list)}
    sections = {name: {} if name in as_keys else content.pop(name, None) or {} for name in keys}
    for key in content:
        if key not in everywhere:
            raise ConfigError(f"{path}: {_unknown('key', key, [*everywhere, *keys])}")
    if stage and (others := [key for key in content if key not in keys[stage]]):
        print(f"{path}: {stage} has no {', '.join(others)}: left to the stages that do", file=sys.stderr)
    for name, section in sections.items():
        if not isinstance(section, dict):
            raise ConfigError(f"{path}: section {name}: must be a mapping of keys to values")
        for key in section:
            if key not in keys[name]:
                raise ConfigError(f"{path}: section {name}: {_unknown('key', key, keys[name])}")
    if stage == "cai":  # its keys sft, reward and ppo are mappings too, and easily written at the top by mistake
        others = [name for name in keys["cai"] if sections.get(name) and name not in sections["cai"]]
        if others:
            print(
                f"{path}: {', '.join(others)} at the top are sections of other commands, and set nothing here; cai has "
                "keys of these names too: write them inside cai:",
                file=sys.stderr,
            )
    return {
        name: {key: value for key, value in content.items() if key in keys[name]} | section
        for name, section in sections.items()
    }


# -- the other commands ------------------------------------------------------------------------------------------------


def _generate(argv: list[str]) -> int:
    parser = _Parser(prog="rlhf-fast generate", description="Answers prompts with a model, on standard output.")
    parser.add_argument("--model", required=True, help="run directory, or any transformers causal language model")
    parser.add_argument("--prompt", action="append", help="may be repeated; without it, one prompt a line of stdin")
    parser.add_argument("--system", help="system message, for a tokenizer with a chat template")
    parser.add_argument("--input", help="records with a prompt, as PPO reads them; each gets a response")
    parser.add_argument("--output", default="-", help="of --input, for rlhf-fast score; - writes to standard output")
    parser.add_argument("--max_new_tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.7, help="0 takes the most likely token (default 0.7)")
    parser.add_argument("--top_p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    given, source, output = vars(options), options.input, options.output
    del given["input"], given["output"]
    if source is None and output != "-":
        parser.error("--output needs --input")
    if source is not None and (options.prompt or options.system):
        parser.error("--input has the prompts: give neither --prompt nor --system")
    from .jobs import answer, answer_records, quiet

    quiet()
    if source is not None:
        del given["prompt"], given["system"]
        with _output(output, "generate") as file:
            _write_rows(answer_records(path=source, **given), file, output)
        return 0
    prompts = options.prompt or [line.rstrip("\n") for line in sys.stdin if line.strip()]
    for prompt, text in zip(prompts, answer(**given | {"prompt": prompts}), strict=True):
        print(f"> {prompt}\n{text}\n" if len(prompts) > 1 else text)
    return 0


def _score(argv: list[str]) -> int:
    about = "The records of a JSONL file, each with the score of a reward model, on standard output or in a file."
    parser = _Parser(prog="rlhf-fast score", description=about)
    parser.add_argument("--model", required=True, help="run directory of rlhf-fast reward, or any reward model")
    parser.add_argument("--input", default="-", help="records with a prompt and a response, or pairs; - reads stdin")
    parser.add_argument("--output", default="-", help="- writes to standard output")
    parser.add_argument("--batch_size", type=int, default=64)
    options = parser.parse_args(argv)
    from .data.files import parse_jsonl, read_dataset
    from .jobs import quiet, score

    quiet()
    from_stdin = options.input == "-"
    with _output(options.output, "score") as file:
        records = parse_jsonl(sys.stdin.read(), "input") if from_stdin else list(read_dataset(options.input))
        _write_rows(score(options.model, records, options.batch_size), file, options.output)
    return 0


def _write_rows(rows: list[dict], file: TextIO, path: str) -> None:
    """Over what the file holds, which may be what they were made of."""
    text = "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)  # str: dates
    if path != "-" and Path(path).is_file():  # a pipe or /dev/null has no length
        file.truncate(0)
    file.write(text)


@contextmanager
def _output(path: str, command: str) -> Iterator[TextIO]:
    """The file, opened for appending. It is opened before there is anything to write, so that a path that cannot be
    written is refused at once. _write_rows cuts off what the file held (it may be the input). If the caller fails, a
    file that was not there before is removed. "-" is standard output."""
    if path == "-":
        yield sys.stdout
        return
    new = not os.path.lexists(path)
    try:
        file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (an OSError inside the with is none of --output)
    except OSError as error:
        raise ConfigError(f"{command}: --output {path}: {error.strerror}") from None
    try:
        with file:
            yield file
    except BaseException:
        if new:
            os.unlink(path)
        raise


def _report(argv: list[str]) -> int:
    parser = _Parser(prog="rlhf-fast report", description="Writes report.html for a run, or for a quickstart's root.")
    parser.add_argument("directory", metavar="DIR", help="with train_log.jsonl, or with a summary.json of all stages")
    directory = Path(parser.parse_args(argv).directory)
    from .report import write_quickstart_report, write_report

    if (directory / "train_log.jsonl").is_file():
        print(write_report(directory))
    elif (directory / "summary.json").is_file():
        print(write_quickstart_report(directory))
    else:
        raise ConfigError(f"report: {directory} holds neither train_log.jsonl nor summary.json")
    return 0


def _quickstart(argv: list[str]) -> int:
    about = "All four stages on a task made on the spot; a second call goes on where the first ended."
    parser = _Parser(prog="rlhf-fast quickstart", description=about)
    parser.add_argument("--output_dir", default="runs/quickstart")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="everything in under a minute, no promises on quality")
    options = parser.parse_args(argv)
    from .jobs import quiet
    from .quickstart import run_quickstart

    quiet()
    run_quickstart(**vars(options))
    print(f"{options.output_dir}/report.html")
    return 0


def _info(argv: list[str]) -> int:
    parser = _Parser(
        prog="rlhf-fast info", description="Versions, build, and the kernel each op runs, with the reason."
    )
    parser.add_argument("--json", action="store_true", help="for programs")
    options = parser.parse_args(argv)
    from .info import main as info

    info(options.json)
    return 0


class _Parser(argparse.ArgumentParser):
    """argparse that refuses as the rest of the package does: one line, with the nearest name."""

    def __init__(self, **options):
        formatter = partial(argparse.HelpFormatter, max_help_position=40, width=118)
        super().__init__(**options, allow_abbrev=False, formatter_class=formatter)

    def parse_args(self, args=None, namespace=None):
        options, rest = self.parse_known_args(args, namespace)
        if rest:
            flags = [name for action in self._actions for name in action.option_strings]
            raise ConfigError(f"{self.prog.split()[-1]}: {_unknown('argument', rest[0].split('=')[0], flags)}")
        return options

    def error(self, message):
        raise ConfigError(f"{self.prog.split()[-1]}: {message}")


def _unknown(kind: str, name: object, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(str(name), known, 1)  # str: YAML keys may be numbers, and "on" is read as True
    return f"unknown {kind} {name!r}" + (f"; did you mean {near[0]!r}?" if near else "")


if __name__ == "__main__":
    sys.exit(main())
