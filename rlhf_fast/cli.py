"""The command rlhf-fast: one word for each stage, with settings from a YAML file and from flags of the same names.

    shared keys of the file  <  its section for the command (sft:, reward:, ppo:, cai:, ...)  <  flags

Exit codes:

    0    done
    1    failed: with one line if a disk is full, else with a traceback (a bug in this package, a fault of the machine)
    2    refused, with one line that says what to change
    3    stopped, with one line that says why: by a monitor in stop_on, or because max_skipped_steps updates in a row,
         or all of the run, were not finite
    130  interrupted

After 3 and 130 the run can be resumed from its newest checkpoint. They are two codes so that a script can resume
interrupted runs, and leave the others to a person.
"""

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
from .disk import check_writable, in_one_line, json_line
from .errors import ConfigError, DiskFullError, NonFiniteError
from .keys import READ_COMMANDS, STAGES
from .monitors import RunStopped
from .terminal import visible

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
  score       add a reward model's scores to records with responses
  report      write report.html for a run directory
  quickstart  all stages on a small generated task, in minutes on a CPU
  bench       measure the ops on this machine against PyTorch and others
  info        versions, build, and the kernel each op runs

A YAML file has a key per flag, shared or in a section named as the command.
torchrun -m rlhf_fast sft ... (or reward, ppo) trains in several processes.
Exit codes: 0 done, 1 failed, 2 refused (the message says what to change),
3 stopped by a monitor (stop_on) or by max_skipped_steps, 130 interrupted;
after 3 and 130 --resume continues from the newest checkpoint."""


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
        if command not in STAGES and (processes := int(os.environ.get("WORLD_SIZE") or 1)) > 1:
            raise ConfigError(
                f"{command} runs in one process, and this is one of {processes}: start it without torchrun"
            )
        if command in STAGES:
            _train(STAGES[command], argv[1:])
        else:
            OTHERS[command](argv[1:])
        print(end="", flush=True)  # sys.stdout is None where a process was started without one
        return 0
    except BrokenPipeError:
        try:
            print(flush=True)
        except BrokenPipeError:  # as after `| head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python writes at its end
            print("rlhf-fast: nothing reads the output any more", file=sys.stderr)
            return 1
        raise  # another pipe
    except ConfigError as error:
        print(f"rlhf-fast: {visible(error)}", file=sys.stderr)
        return 2
    except DiskFullError as error:
        print(f"rlhf-fast: {visible(error)}", file=sys.stderr)
        return 1
    except RunStopped as stop:
        print(f"rlhf-fast: stopped by {visible(stop)}", file=sys.stderr)
        return 3
    except NonFiniteError as error:
        from .parallel import rank

        if rank() == 0:
            print(f"rlhf-fast: stopped: {visible(error)}", file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        print("rlhf-fast: interrupted", file=sys.stderr)
        return 130


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
        parser = Parser(prog="rlhf-fast cai validate", description="Reads a constitution and lists what is in it.")
        parser.add_argument("files", nargs="+", metavar="FILE", help="several files make one constitution")
        parser.add_argument(
            "--allow_code", type=str.lower, choices=("true", "false"), default="false",
            help="whether rules may be named by import path, which runs code",
        )  # fmt: skip
        options = parser.parse_args(rest)
        from .cai_jobs import validate

        print(visible(validate(options.files, options.allow_code == "true")))
    else:
        _train(CAI["cai" if word == "train" else word], rest)


def _train(spec: Command, argv: list[str]) -> None:
    resume = {"action": "store_true", "help": "continue from the newest checkpoint in output_dir"}
    values, flags = _read(spec, argv, "[--resume]", resume=resume) if spec.resumes else _read(spec, argv)
    configs = spec.make(values)
    from .jobs import quiet

    quiet()
    output_dir = next(config.output_dir for config in configs if hasattr(config, "output_dir"))
    resume = "; if it says that output_dir holds a run, with --resume" if spec.resumes else ""
    with in_one_line(output_dir, f"give the command again{resume}"):
        try:
            spec.run(configs, flags.get("resume", False))
        except SystemExit as end:  # with its code, 0 perhaps, it would pass for this command's end
            raise ConfigError(
                f"{spec.name}: a file of functions ended the process (sys.exit, code {end.code}): take that out, or "
                "put it below `if __name__ == '__main__':`"
            ) from end


# -- flags and YAML files ----------------------------------------------------------------------------------------------


WITH_KEYS = STAGES | CAI | READ_COMMANDS  # the commands that have keys, and so a section in a YAML file


def _typed(name: str) -> str:
    """The words of the command line that run the command with this name."""
    return f"cai {'train' if name == 'cai' else name}" if name in CAI else name


def _read(spec: Command, argv: list[str], usage: str = "", **flags: dict) -> tuple[dict, dict]:
    """-> (values of the command's keys, values of `flags`). What argv says overrides its --config file.

    flags: {name: options of add_argument} for what makes sense on a command line only; usage: how --help shows them.
    """
    prog = f"rlhf-fast {_typed(spec.name)}"
    usage = " ".join([f"{prog} [--config FILE]", *filter(None, [usage]), "[--KEY VALUE ...]"])
    parser = Parser(prog=prog, usage=usage, description=spec.summary)
    parser.add_argument("--config", metavar="FILE", help="YAML file with any of the keys below")
    for name, options in flags.items():
        parser.add_argument(f"--{name}", **options)
    parser.add_keys(spec, in_full="--help-all" in argv)
    given = vars(parser.parse_args(argv))
    file, own, keys = given.pop("config"), {name: given.pop(name) for name in flags}, spec.keys()
    values = {name: keys[name].parse(text) for name, text in given.items()}
    if file:
        every = {name: list(command.keys()) for name, command in WITH_KEYS.items()}
        values = read_keys(file, every, spec.name) | values
    return values, own


def read_keys(path: str, keys: dict[str, list[str]], command: str) -> dict:
    """The values of a command from a YAML file: the shared keys that the command has, overridden by its section.

    keys: {command: names of its keys}, of all commands.

    ConfigError for a file that cannot be read or is not a mapping, and for a key that nothing can use: in a section,
    one that its command does not have; at the top, one that neither the command nor one with a section in the file has.
    The commands that only read models ignore what is shared by those that train, as they need next to nothing of it.
    Standard error says that cai does not read the sections sft, reward and ppo at the top of the file, which belong to
    other commands: cai has keys of these names.
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
    # "reward" may be a command's section, which is a mapping, or a key of ppo, which is a path or a list.
    as_keys = {name for name in keys if name in everywhere and isinstance(content.get(name), str | list)}
    has_section = [name for name in keys if name in content and name not in as_keys]
    sections = {name: content.pop(name) or {} if name in has_section else {} for name in keys}
    if command in READ_COMMANDS:
        usable = everywhere
    else:
        usable = {key for name in (command, *has_section) for key in keys[name]}
    for key in content:
        if key not in usable:
            raise ConfigError(f"{path}: {_unknown_key(key, keys, command)}")
    for name, section in sections.items():
        if not isinstance(section, dict):
            raise ConfigError(f"{path}: section {name}: must be a mapping of keys to values")
        for key in section:
            if key not in keys[name]:
                raise ConfigError(f"{path}: section {name}: {_unknown_key(key, keys, name, in_section=True)}")
    if command == "cai":  # its keys sft, reward and ppo are mappings too, and easily written at the top by mistake
        others = [name for name in keys["cai"] if sections.get(name) and name not in sections["cai"]]
        if others:
            print(
                f"{path}: {', '.join(others)} at the top are sections of other commands and set nothing here. cai has "
                "keys of these names too: write them inside cai:",
                file=sys.stderr,
            )
    return {key: value for key, value in content.items() if key in keys[command]} | sections[command]


def _unknown_key(key: object, keys: dict[str, list[str]], command: str, in_section: bool = False) -> str:
    """The message about a key that the command does not have. in_section: the key is in the command's section;
    otherwise it is at the top of the file, and may be meant for another command."""
    if key == "resume":
        return "unknown key 'resume': it is only a flag, --resume"
    otherwise = f"rlhf-fast {_typed(command)} --help-all explains every key"
    hint = WITH_KEYS[command].hints.get(str(key))
    if in_section:
        return unknown("key", key, keys[command], otherwise, hint)
    others = ", ".join(name for name in keys if key in keys[name])
    if others:  # no nearest name, which would be the key itself where a command is called so
        told = f"unknown key of {command}: {key!r}" + (f"; {hint}" if hint else "")
        return f"{told}. If it is meant for {others}, write it in a section of that name"
    names = {name for names in keys.values() for name in names} if command in READ_COMMANDS else keys[command]
    return unknown(f"key of {command}:", key, [*names, *keys], otherwise, hint)


# -- the other commands ------------------------------------------------------------------------------------------------


def _generate(argv: list[str]) -> None:
    spec = READ_COMMANDS["generate"]
    prompt = {"action": "append", "metavar": "TEXT", "help": "may be repeated; without it, each line of stdin is one"}
    values, flags = _read(spec, argv, "[--prompt TEXT]", prompt=prompt)
    (job,) = spec.make(values)
    if job.input is None and job.output != "-":
        raise ConfigError("generate: --output needs --input")
    if job.input is not None and (flags["prompt"] or job.system):
        raise ConfigError("generate: --input has the prompts: give neither --prompt nor --system with it")
    from .data.checks import check_encodable
    from .jobs import answer, answer_records, quiet

    quiet()
    sampling = {name: getattr(job, name) for name in ("max_new_tokens", "temperature", "top_p", "bf16", "seed")}
    if job.input is not None:
        with _output(job.output, "generate") as file:
            _write_rows(answer_records(job.model, job.input, **sampling), file, job.output)
        return
    prompts = flags["prompt"] or [line.removesuffix("\n") for line in _stdin() if line.strip()]
    for text in (*prompts, job.system or ""):  # the bytes of an argument need not be UTF-8
        check_encodable(text, f"generate: {text[:40]!r}")
    for prompt, text in zip(prompts, answer(job.model, prompts, job.system, **sampling), strict=True):
        print(_shown(f"> {prompt}\n{text}\n" if len(prompts) > 1 else text))


def _score(argv: list[str]) -> None:
    spec = READ_COMMANDS["score"]
    (job,) = spec.make(_read(spec, argv)[0])
    from .data.files import parse_jsonl, read_dataset
    from .jobs import quiet, score

    quiet()
    with _output(job.output, "score") as file:
        records = parse_jsonl(_stdin(), "input") if job.input == "-" else read_dataset(job.input)
        _write_rows(score(job.model, records, job.batch_size), file, job.output)


def _stdin() -> Iterator[str]:
    """The lines of standard input, without a byte order mark."""
    try:
        for i, line in enumerate(sys.stdin):
            yield line if i else line.removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ConfigError(f"standard input is not UTF-8 ({error.reason}): convert it to UTF-8") from None


def _shown(text: str) -> str:
    """The text for standard output: as it is in a file or a pipe, visible on a terminal."""
    return visible(text) if sys.stdout.isatty() else text


def _write_rows(rows: list[dict], file: TextIO, path: str) -> None:
    """Replaces what the file holds, which may be the input that the rows were made from."""
    # Half a surrogate pair, which a column may hold, becomes the escape that JSON has for it.
    text = "".join(map(json_line, rows)).encode("utf-8", "backslashreplace").decode()
    if path == "-" or not Path(path).is_file():  # a pipe and /dev/null cannot be truncated
        file.write(_shown(text) if file is sys.stdout else text)
        return
    before = Path(path).read_bytes()
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError:  # a full disk, which has room for what it held
        Path(path).write_bytes(before)
        raise


@contextmanager
def _output(path: str, command: str) -> Iterator[TextIO]:
    """The file, opened for appending; "-" is standard output. It is opened before there is anything to write, so that a
    path that cannot be written is refused at once. What it held, which may be the input, stays until _write_rows
    replaces it. If the caller fails, a file that did not exist before is removed."""
    if path == "-":
        yield sys.stdout
        return
    new = not os.path.lexists(path)
    try:
        file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (an OSError inside the with has nothing to do with --output)
    except OSError as error:
        raise ConfigError(f"{command}: --output {path}: {error.strerror}") from None
    try:
        with in_one_line(path, "give the command again"), file:
            yield file
    except BaseException:
        if new:
            os.unlink(path)
        raise


def _report(argv: list[str]) -> None:
    parser = Parser(prog="rlhf-fast report", description="Writes report.html for a run, or for a whole quickstart.")
    parser.add_argument(
        "directory", metavar="DIR", help="the output_dir of a run (with train_log.jsonl) or quickstart (summary.json)"
    )
    directory = Path(parser.parse_args(argv).directory)
    from .report import write_quickstart_report, write_report

    if os.path.isfile(directory / "train_log.jsonl"):  # os.path, because pathlib raises for a name that is too long
        write = write_report
    elif os.path.isfile(directory / "summary.json"):
        write = write_quickstart_report
    else:
        raise ConfigError(
            f"report: {directory} holds neither train_log.jsonl nor summary.json: give the output_dir of a run"
        )
    try:
        page = write(directory)
    except OSError as error:
        raise ConfigError(f"report: {error.filename2 or error.filename or directory}: {error.strerror}") from None
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"report: a file in {directory} is JSON, but not as the run wrote it ({type(error).__name__}: {error}): "
            "restore it, or delete it"
        ) from error
    print(page)


def _quickstart(argv: list[str]) -> None:
    about = "All four stages on a small generated task. A second call continues where the first one ended."
    parser = Parser(prog="rlhf-fast quickstart", description=about)
    output_dir = "runs/quickstart"
    parser.add_argument("--output_dir", default=output_dir, metavar=output_dir, help="with a directory for each stage")
    parser.add_argument("--seed", type=int, default=0, metavar="0", help="of the task, the models and the sampling")
    parser.add_argument("--smoke", action="store_true", help="run everything in under a minute, whatever the quality")
    options = parser.parse_args(argv)
    check_writable(options.output_dir)
    from .jobs import quiet
    from .quickstart.pipeline import run_quickstart

    quiet()
    with in_one_line(options.output_dir, "give the command again"):
        run_quickstart(**vars(options))
    print(f"{options.output_dir}/report.html")


def _bench(argv: list[str]) -> None:
    about = "Our ops compared with PyTorch, torch.compile, the installed peers and the floor, on this machine."
    parser = Parser(prog="rlhf-fast bench", description=about)
    parser.add_argument("ops", nargs="*", help="only these ops, e.g. token_logprobs ppo_loss (default: all)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    parser.add_argument("--seconds", type=float, default=10.0, help="time for the rounds of each row (default 10)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="only rows of this dtype (default: both)")
    parser.add_argument("--small", action="store_true", help="small shapes: a trial, not a measurement")
    parser.add_argument(
        "--as-gpu", action="store_true", help="measure a GPU's rows in a GPU's way; without a GPU, with the CPU's clock"
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


# Each imports what it needs: torch and transformers take seconds, which --help and a refusal should not wait for.
OTHERS = {
    "cai": _cai, "generate": _generate, "score": _score, "report": _report, "quickstart": _quickstart,
    "bench": _bench, "info": _info,
}  # fmt: skip
COMMANDS = (*STAGES, *OTHERS)

if __name__ == "__main__":
    sys.exit(main())
