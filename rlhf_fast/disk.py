"""Output directories, checked before the work begins, and small files that are whole even after a kill."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import ConfigError, DiskFullError


def make_directory(output_dir: str | Path) -> Path:
    """The directory, made if it is not there. ConfigError where that fails, or where nothing can be written in it."""
    check_writable(output_dir)
    with _refused(output_dir):
        Path(output_dir).mkdir(parents=True, exist_ok=True)
    return Path(output_dir)


def check_writable(output_dir: str | Path) -> None:
    """ConfigError where the directory cannot be made or nothing can be written in it. It leaves nothing behind."""
    if output_dir == "":  # a shell's unset variable; it would be the directory that one stands in
        raise ConfigError("output_dir is empty: name a directory")
    if str(output_dir).startswith("~"):  # rm -rf on the directory of this name would take one's home
        raise ConfigError(f"output_dir {str(output_dir)!r}: only a shell knows what ~ stands for; write it in full")
    path = Path(output_dir).absolute()
    there = next(p for p in (path, *path.parents) if os.path.lexists(p))
    with _refused(output_dir), suppress(FileNotFoundError, NotADirectoryError):
        os.lstat(path)  # what lexists takes for missing may be a name that is too long
    with _refused(output_dir), tempfile.TemporaryFile(dir=there):  # os.access says yes to root on a read-only disk
        pass


@contextmanager
def _refused(output_dir: str | Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:  # ValueError: a NUL byte
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"output_dir {str(output_dir)!r} cannot be written ({reason}): choose another output_dir"
        ) from None


@contextmanager
def in_one_line(output_dir: str | Path, go_on: str) -> Iterator[None]:
    """Inside, an error of a full disk becomes a DiskFullError, and one about what lies at the place of a file of
    output_dir, such as a directory, a ConfigError. go_on: the end of both messages. Other errors, such as those of a
    reward function, stay as they are."""
    try:
        yield
    except Exception as error:
        if _is_full(error):
            raise DiskFullError(
                f"a disk is full, probably that of {str(output_dir)!r} ({error}): free some space, then {go_on}"
            ) from error
        if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
            path = error.filename2 or error.filename
            if isinstance(path, str | os.PathLike) and Path(path).absolute().is_relative_to(
                Path(output_dir).absolute()
            ):
                raise ConfigError(
                    f"{path} cannot be read or written ({error.strerror}): move it away, then {go_on}"
                ) from error
        raise


def _is_full(error: BaseException | None) -> bool:
    """Whether a full disk is the error or its cause. The libraries that write models and databases have no OSError for
    it: safetensors and tokenizers say "os error 28", torch names the file of its source that writes, sqlite says so."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if re.search(r"os error 28\b|inline_container|PytorchStreamWriter|database or disk is full", str(error)):
            return True
        error = error.__cause__
    return False


def json_line(record: dict | list) -> str:
    """A line of JSONL. A date, which a column or a key of a message may hold, becomes text."""
    return json.dumps(record, ensure_ascii=False, default=str) + "\n"


def write_atomic(path: Path, text: str | Iterable[str]) -> None:
    """Writes a text, or its parts one after the other. After a crash the path holds the old content or the new one,
    never a part."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)  # "w" would write through a link
    with open(temporary, "x", encoding="utf-8") as file:
        file.writelines([text] if isinstance(text, str) else text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def delete(path: Path) -> None:
    """Deletes a directory; of a link to one only the link."""
    path.unlink() if path.is_symlink() else shutil.rmtree(path)


def write_json(path: Path, value: dict, indent: int = 2) -> None:
    """write_atomic of JSON that people can read."""
    write_atomic(path, json.dumps(value, indent=indent, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict:
    """What write_json left there. ConfigError where something else has cut or changed it."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError("it holds no JSON object")
        return value
    except ValueError as error:
        raise ConfigError(f"{path} is not as it was written ({error}): restore it, or delete its directory") from None
