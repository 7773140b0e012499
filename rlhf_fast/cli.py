"""The command rlhf-fast: one word for each stage, settings from a YAML file, flags of the same names over them.

    shared keys of the file  <  its section for the command (sft:, reward:, ppo:, cai:, ...)  <  flags

Exit codes: 0 done; 1 failed, with a traceback, because it is a bug of ours or a fault of the machine; 2 refused, with
one line that says what to change; 3 stopped by a monitor that stop_on names; 130 interrupted. After 3 and 130 the run
can be resumed. They are two codes so that a script can resume interrupted runs and leave the others to a person.
"""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import yaml

from ._version import __version__
from .cai_keys import CAI
from .cai_keys import __doc__ as CAI_HELP
from .commands import Command, Parser, unknown
from .data.files import UniqueKeys
from .errors import ConfigError
from .keys import LOOK, STAGES
from .monitors import RunStopped

HELP = """\
usage: rlhf-fast COMMAND [--config FILE.yaml] [--KEY VALUE ...]

Train
  sft         supervised fine-tuning on demonstrations
  reward      a reward model from preferences
  ppo         PPO against a reward model or a Python function
  cai WORD    Constitutional AI: validate, revise, pairs, audit, label, derive,
              or train for all of it
              --help names the keys of each, --help-all explains them

Look
  generate    answer prompts with a model
  score       records with responses in, with a reward model's scores out
  report      write report.html for a run directory
  quickstart  all stages on a small task made on the spot, in minutes on a CPU
  bench       measure the ops on this machine beside PyTorch and others
  info        versions, build, and the kernel each op runs

A YAML file has the flags as keys, shared or in a section named as the command.
torchrun -m rlhf_fast sft ... (or reward, ppo) trains in several processes.
Exit codes: 0 done, 1 failed, 2 refused (the message says what to change),
3 stopped by a monitor (stop_on), 130 interrupted; after these two --resume
goes on from the newest checkpoint."""

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
                f"{unknown('command', command, COMMANDS) if argv else 'no command'} (rlhf-fast --help names them)"
            )
        if command not in TRAINERS and (processes := int(os.environ.get("WORLD_SIZE") or 1)) > 1:
            raise ConfigError(
                f"{command} runs in one process, and this is one of {processes}: start it without torchrun"
            )
        _run(command, argv[1:])
        return 0
    except ConfigError as error:
        print(f"rlhf-fast: {error}", file=sys.stderr)
        return 2
    except RunStopped as stop:
        print(f"rlhf-fast: stopped by {stop}", file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        print("rlhf-fast: interrupted", file=sys.stderr)
        return 130


def _run(command: str, argv: list[str]) -> None:
    """Each command imports what it needs: torch and transformers take seconds, and --help or a refusal should not."""
    others = {
        "cai": _cai, "generate": _generate, "score": _score, "report": _report, "quickstart": _quickstart,
        "bench": _bench, "info": _info,
    }  # fmt: skip
    if command in TRAINERS:
        _train(STAGES[command], command, argv)
    else:
        others[command](argv)


# -- training commands -------------------------------------------------------------------------------------------------


CAI_WORDS = ("validate", "revise", "pairs", "audit", "label", "derive", "train")


def _cai(argv: list[str]) -> None:
    if argv[:1] in (["-h"], ["--help"]):
        print(CAI_HELP)
        return
    word, rest = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else ("train", argv)
    if word not in CAI_WORDS:
        raise ConfigError(f"cai: {unknown('word', word, CAI_WORDS)} (rlhf-fast cai --help names them)")
    if word == "validate":
        parser = Parser(prog="rlhf-fast cai validate", description="Reads a constitution and says what is in it.")
        parser.add_argument("files", nargs="+", metavar="FILE", help="several files make one constitution")
        parser.add_argument(
            "--allow_code", type=str.lower, choices=("true", "false"), default="false",
            help="rules by import path, which runs code",
        )  # fmt: skip
        options = parser.parse_args(rest)
        from .cai_jobs import validate

        print(validate(options.files, options.allow_code == "true"))
    else:
        _train(CAI["cai" if word == "train" else word], f"cai {word}", rest)


def _train(spec: Command, shown: str, argv: list[str]) -> None:
    going_on = {"action": "store_true", "help": "go on from the newest checkpoint in output_dir"}
    values, flags = _read(spec, shown, argv, "[--resume]", resume=going_on)
    configs = spec.make(values)
    from .jobs import quiet

    quiet()
    spec.run(configs, flags["resume"])


# -- flags and YAML files ----------------------------------------------------------------------------------------------


WITH_KEYS = STAGES | CAI | LOOK  # and so each has a section in a YAML file


def _read(spec: Command, shown: str, argv: list[str], usage: str = "", **flags: dict) -> tuple[dict, dict]:
    """(values of the command's keys, those of flags): what argv says, over what its --config file does.

    flags: {name: options of add_argument} of what makes sense on a command line only, and usage what they look like.
    """
    usage = " ".join([f"rlhf-fast {shown} [--config FILE]", *filter(None, [usage]), "[--KEY VALUE ...]"])
    parser = Parser(prog=f"rlhf-fast {shown}", usage=usage, description=spec.summary)
    parser.add_argument("--config", metavar="FILE", help="YAML file with any of the keys below")
    for name, options in flags.items():
        parser.add_argument(f"--{name}", **options)
    parser.add_keys(spec, in_full="--help-all" in argv)
    given = vars(parser.parse_args(argv))
    file, own, keys = given.pop("config"), {name: given.pop(name) for name in flags}, spec.keys()
    values = {name: keys[name].parse(text) for name, text in given.items()}
    if file:
        every = {name: list(command.keys()) for name, command in WITH_KEYS.items()}
        # A file that trains is also given to generate and score, which are to use next to nothing of it.
        values = read_sections(file, every, None if spec.name in LOOK else spec.name)[spec.name] | values
    return values, own


def read_sections(path: str, keys: dict[str, list[str]], stage: str | None = None) -> dict[str, dict]:
    """{stage: its values} in a YAML file: the shared keys that the stage has, and over them those of its section.

    keys: {stage: names of its keys}. stage: the one that is going to train, if any. Standard error names what it will
    not read: shared keys that it does not have, and for cai the sections sft, reward and ppo at the top of the file,
    where they belong to other commands (cai has keys of these names). ConfigError for a file that cannot be read or is
    no mapping, and for a key that no stage has.
    """
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), UniqueKeys)
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8, a key that occurs twice
        raise ConfigError(f"--config {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"--config {path} must be a mapping of keys to values, got {type(content).__name__}")
    everywhere = {key for names in keys.values() for key in names}
    # "reward" may be the section of a stage, a mapping, or the key of ppo, a path or a list.
    as_keys = {name for name in keys if name in everywhere and isinstance(content.get(name), str | list)}
    sections = {name: {} if name in as_keys else content.pop(name, None) or {} for name in keys}
    for key in content:
        if key not in everywhere:
            raise ConfigError(f"{path}: {unknown('key', key, [*everywhere, *keys])}")
    if stage and (others := [key for key in content if key not in keys[stage]]):
        print(f"{path}: {stage} has no {', '.join(others)}: left to the stages that do", file=sys.stderr)
    for name, section in sections.items():
        if not isinstance(section, dict):
            raise ConfigError(f"{path}: section {name}: must be a mapping of keys to values")
        for key in section:
            if key not in keys[name]:
                raise ConfigError(f"{path}: section {name}: {unknown('key', key, keys[name])}")
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


def _generate(argv: list[str]) -> None:
    asked = {"action": "append", "metavar": "TEXT", "help": "may be repeated; without it, one prompt a line of stdin"}
    values, flags = _read(LOOK["generate"], "generate", argv, "[--prompt TEXT]", prompt=asked)
    (job,) = LOOK["generate"].make(values)
    if job.input is None and job.output != "-":
        raise ConfigError("generate: --output needs --input")
    if job.input is not None and (flags["prompt"] or job.system):
        raise ConfigError("generate: --input has the prompts: give neither --prompt nor --system")
    from .jobs import answer, answer_records, quiet

    quiet()
    sampling = {name: getattr(job, name) for name in ("max_new_tokens", "temperature", "top_p", "bf16", "seed")}
    if job.input is not None:
        with _output(job.output, "generate") as file:
            _write_rows(answer_records(job.model, job.input, **sampling), file, job.output)
        return
    prompts = flags["prompt"] or [line.rstrip("\n") for line in sys.stdin if line.strip()]
    for prompt, text in zip(prompts, answer(job.model, prompts, job.system, **sampling), strict=True):
        print(f"> {prompt}\n{text}\n" if len(prompts) > 1 else text)


def _score(argv: list[str]) -> None:
    (job,) = LOOK["score"].make(_read(LOOK["score"], "score", argv)[0])
    from .data.files import parse_jsonl, read_dataset
    from .jobs import quiet, score

    quiet()
    with _output(job.output, "score") as file:
        records = parse_jsonl(sys.stdin.read(), "input") if job.input == "-" else list(read_dataset(job.input))
        _write_rows(score(job.model, records, job.batch_size), file, job.output)


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


def _report(argv: list[str]) -> None:
    parser = Parser(prog="rlhf-fast report", description="Writes report.html for a run, or for a quickstart's root.")
    parser.add_argument("directory", metavar="DIR", help="with train_log.jsonl, or with a summary.json of all stages")
    directory = Path(parser.parse_args(argv).directory)
    from .report import write_quickstart_report, write_report

    if (directory / "train_log.jsonl").is_file():
        print(write_report(directory))
    elif (directory / "summary.json").is_file():
        print(write_quickstart_report(directory))
    else:
        raise ConfigError(f"report: {directory} holds neither train_log.jsonl nor summary.json")


def _quickstart(argv: list[str]) -> None:
    about = "All four stages on a task made on the spot; a second call goes on where the first ended."
    parser = Parser(prog="rlhf-fast quickstart", description=about)
    output_dir = "runs/quickstart"
    parser.add_argument("--output_dir", default=output_dir, metavar=output_dir, help="a directory for each stage")
    parser.add_argument("--seed", type=int, default=0, metavar="0", help="of the task, the models and the sampling")
    parser.add_argument("--smoke", action="store_true", help="everything in under a minute, no promises on quality")
    options = parser.parse_args(argv)
    from .jobs import quiet
    from .quickstart.pipeline import run_quickstart

    quiet()
    run_quickstart(**vars(options))
    print(f"{options.output_dir}/report.html")


def _bench(argv: list[str]) -> None:
    about = "Our ops beside PyTorch, torch.compile and the installed peers, on this machine, with the floor."
    parser = Parser(prog="rlhf-fast bench", description=about)
    parser.add_argument("ops", nargs="*", help="only these ops, e.g. token_logprobs ppo_loss (default: all)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--seconds", type=float, default=10.0, help="time for the rounds of each row (default 10)")
    parser.add_argument("--small", action="store_true", help="small shapes: a look, not a measurement")
    parser.add_argument(
        "--as-gpu", action="store_true", help="a GPU's rows and its way to measure, by the clock where there is none"
    )
    parser.add_argument("--json", type=Path, help="write the results here")
    options = parser.parse_args(argv)
    from .bench import main as bench

    bench(options, argv)


def _info(argv: list[str]) -> None:
    parser = Parser(prog="rlhf-fast info", description="Versions, build, and the kernel each op runs, with the reason.")
    parser.add_argument("--json", action="store_true", help="for programs")
    options = parser.parse_args(argv)
    from .info import main as info

    info(options.json)


if __name__ == "__main__":
    sys.exit(main())
