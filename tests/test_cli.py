"""The command line: what it refuses and how, where values come from, and the four stages on a few rows."""

import inspect
import io
import json
import os
import re
import shutil
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from helpers import tiny_tokenizer

from rlhf_fast.cai_jobs import load_writer
from rlhf_fast.cai_keys import CAI, WriterJob
from rlhf_fast.cli import CAI_WORDS, COMMANDS, HELP, WITH_KEYS, main, read_keys
from rlhf_fast.commands import REQUIRED, Parser, checked_options, keys_of
from rlhf_fast.data.files import UniqueKeys
from rlhf_fast.data.sources import read_rows, rows_for
from rlhf_fast.decoder import Decoder
from rlhf_fast.errors import ConfigError, NonFiniteError
from rlhf_fast.generation import generate_text
from rlhf_fast.jobs import _write_job, resolve_reward, score
from rlhf_fast.keys import READ_COMMANDS, STAGES, TRL_PPO_NAMES, SFTJob
from rlhf_fast.models import load_policy, load_reward_model, load_tokenizer, save_model
from rlhf_fast.rewards import RewardModelReward
from rlhf_fast.rollout_server import RolloutServer
from rlhf_fast.terminal import visible
from rlhf_fast.trainers.sft import SFTConfig, SFTTrainer

ROOT = Path(__file__).parents[1]


def run_python(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_help_fits_a_screen_and_loads_no_torch():
    out = run_python(
        "import sys; from rlhf_fast.cli import main; assert main(['--help']) == 0\n"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert out.rstrip().endswith("[]")
    assert len(HELP.splitlines()) <= 24 and max(map(len, HELP.splitlines())) < 80
    assert all(f"\n  {command} " in HELP for command in COMMANDS)


def test_the_help_of_cai_fits_a_screen_and_names_every_word(capsys):
    assert main(["cai", "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 24 and max(map(len, lines)) < 80
    assert all(any(line.startswith(f"  {word} ") for line in lines) for word in CAI_WORDS)


def test_the_package_runs_as_a_module():
    asked = [sys.executable, "-m", "rlhf_fast"]
    done = subprocess.run([*asked, "--help"], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert (done.returncode, done.stdout) == (0, HELP + "\n")
    assert subprocess.run([*asked, "rewards"], capture_output=True, cwd=ROOT, timeout=120).returncode == 2


def test_without_an_output_a_command_is_done_all_the_same():
    """`rlhf-fast cai validate FILE >&-`"""
    asked = 'exec "$0" -m rlhf_fast cai validate examples/constitution.yaml >&-'
    done = subprocess.run(["sh", "-c", asked, sys.executable], stderr=subprocess.PIPE, text=True, cwd=ROOT, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_reader_that_has_gone_is_one_line(tmp_path):
    """`rlhf-fast cai validate FILE | head -1`"""
    read_end, write_end = os.pipe()
    os.close(read_end)
    asked = [sys.executable, "-m", "rlhf_fast", "cai", "validate", "examples/constitution.yaml"]
    done = subprocess.run(asked, stdout=write_end, stderr=subprocess.PIPE, text=True, cwd=ROOT, timeout=120)
    os.close(write_end)
    assert (done.returncode, done.stderr) == (1, "rlhf-fast: nothing reads the output any more\n")


def test_every_key_has_a_comment_and_every_comment_behind_a_key_is_in_the_help():
    for spec in WITH_KEYS.values():
        for cls in spec.configs:
            written = re.findall(r"^    (?:\w+: |\)).*  # (.*)$", inspect.getsource(cls), re.MULTILINE)
            assert written and set(written) == {key.comment for key in keys_of(cls).values()}
        assert not [name for name, key in spec.keys().items() if not key.comment], spec.name


def test_defaults_are_shown_as_a_yaml_file_has_them():
    shown = {name: key.shown for name, key in STAGES["ppo"].keys().items()}
    assert (shown["bf16"], shown["kl_target"], shown["learning_rate"]) == ("false", "null", "3e-06")
    for spec in WITH_KEYS.values():
        for key in spec.keys().values():
            assert not re.search(r"\b(None|True|False)\b", key.shown + key.comment), key
            assert key.shown == REQUIRED or key.parse(key.shown) is not Ellipsis


def help_of(spec, in_full):
    parser = Parser(usage="rlhf-fast ...", description=spec.summary)
    parser.add_keys(spec, in_full)
    return parser.format_help()


@pytest.mark.parametrize(("columns", "lines"), [(80, 44), (120, 36)])
def test_the_help_of_every_command_fits_a_screen_and_names_every_key(columns, lines, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    for spec in WITH_KEYS.values():
        short, full, keys = help_of(spec, False), help_of(spec, True), spec.keys()
        assert len(short.splitlines()) + 2 <= lines and max(map(len, short.splitlines())) < columns, spec.name
        for name, key in keys.items():
            known = not spec.usual or name in spec.usual or key.shown == REQUIRED
            assert f"{'--' if known else ''}{name} {key.shown}" in " ".join(short.split())
            assert f"--{name}{key.shown}{key.comment}".replace(" ", "") in "".join(full.split())
        assert ("--help-all" in short) == bool(spec.usual) and "other keys" not in full
        assert {*spec.usual} <= {name for name, key in keys.items() if key.shown != REQUIRED}


def test_the_other_keys_stand_in_the_groups_of_the_config():
    assert "\n  adapters: lora_r 0, lora_alpha 32.0, lora_target_modules null\n" in help_of(STAGES["ppo"], False)


@pytest.mark.parametrize("columns", range(80, 120, 4))
def test_a_default_is_not_broken_over_two_lines(columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    assert "drop ['empty', 'truncated', 'scaffold_leak']" in help_of(CAI["revise"], False)


@pytest.mark.parametrize("flags", [["--help"], ["--help-all"], ["--kl_coef", "1", "--help-all"]])
def test_help_all_explains_what_help_names(flags, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["ppo", *flags])
    out = capsys.readouterr().out
    assert not ended.value.code and out.startswith("usage: rlhf-fast ppo [--config FILE] [--resume] [--KEY VALUE ...]")
    assert ("bounds the loss of a token with A < 0" in out) == ("--help-all" in flags) and "--learning_rate" in out


def check_no_torch(commands, code):
    """Each of the commands (argv) ends with this code, without having loaded torch or transformers."""
    out = run_python(f"""
import sys
from rlhf_fast.cli import main
for argv in {commands!r}:
    try:
        code = main(argv)
    except SystemExit as ended:
        code = ended.code or 0
    loaded = sorted({{'torch', 'transformers'}} & set(sys.modules))
    print("ended:", code, loaded, argv)
""")
    ended = [line for line in out.splitlines() if line.startswith("ended:")]
    assert ended == [f"ended: {code} [] {argv}" for argv in commands]


def test_no_help_loads_torch():
    commands = [[name] for name in COMMANDS] + [["cai", word] for word in CAI_WORDS]
    check_no_torch([[*command, "--help"] for command in commands], code=0)


def test_no_refusal_of_a_key_or_a_value_loads_torch(tmp_path):
    wrong = write_yaml(tmp_path / "wrong.yaml", "lerning_rate: 1")
    named = [*STAGES, *READ_COMMANDS, *(f"cai {word}" for word in CAI_WORDS if word != "validate")]
    commands = [[*name.split(), *flags] for name in named for flags in (["--sed", "1"], ["--config", wrong], [])]
    values = [
        "sft --train_data x", 'sft --train_data x --scratch {"layers":-1}', 'sft --train_data x --scratch {"layer":2}',
        "sft --train_data x --model y --learning_rate=-1",
        "reward --train_data x --model y --freeze_trunk true --lora_r 4", "score --model x --batch_size many",
        "ppo --train_data x --model y --reward z --batch_size 7", "generate --model x --top_p high",
        "ppo --train_data x --model y --reward z --output_dir /dev/null/x",
        "cai label --constitution x --data y --batch_size 0", "cai --constitution x --model y --train_data z --seed a",
    ]  # fmt: skip
    check_no_torch(commands + [line.split() for line in values], code=2)


def test_importing_the_package_loads_no_torch_until_a_name_is_used():
    out = run_python(
        "import sys, rlhf_fast as rf; rf.SFTConfig, rf.RewardConfig, rf.PPOConfig\n"
        "before = 'torch' in sys.modules; rf.gae\n"
        "print(before, 'torch' in sys.modules, 'transformers' in sys.modules, 'triton' in sys.modules)"
    )
    assert out.split() == ["False", "True", "False", "False"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "no command (rlhf-fast --help names them)"),
        (["rewards"], "unknown command 'rewards'; did you mean 'reward'? (rlhf-fast --help names them)"),
        (["cai", "trian"], "cai: unknown word 'trian'; did you mean 'train'? (rlhf-fast cai --help names them)"),
        (["cai", "revise", "--jugde", "x"], "cai revise: unknown argument '--jugde'; did you mean '--judge'?"),
        (["sft", "--learning_rat", "1"], "unknown argument '--learning_rat'; did you mean '--learning_rate'?"),
        (["sft", "--train_data"], "expected one argument"),
        (["sft", "--packing", "--bf16", "true"], "argument --packing: expected one argument: --packing true"),
        (["sft", "--dtypes", "x"], "unknown argument '--dtypes'; rlhf-fast sft --help-all explains all of them"),
        (["sft", "--model", "x"], "sft needs train_data: as flags"),
        (["sft", "--train_data", "x.jsonl"], "give either model, or scratch"),
        (["sft", "--train_data", "x", "--scratch", "{layer: 2}"], "Scratch has no 'layer'; did you mean 'layers'?"),
        (["sft", "--train_data", "x", "--scratch", "{hidden: 30}"], "hidden = 30 must be a multiple of 8"),
        (["sft", "--train_data", "x", "--scratch", "{hidden: 20}"], "hidden = 20 must be a multiple of 8"),
        (["sft", "--train_data", "x", "--scratch", "{hidden: abc}"], "scratch: hidden = 'abc' must be int"),
        (["sft", "--train_data", "x", "--scratch", "{layers: -1}"], "Scratch.layers = -1 must be greater than 0"),
        (["sft", "--train_data", "x", "--scratch", "{initializer_range: a}"], "initializer_range = 'a' must be a numb"),
        (["sft", "--train_data", "", "--scratch", "{layers: 2}"], "the name of a dataset is empty"),
        (["sft", "--train_data", "x.jsonl", "--model", ""], "the name of a model is empty"),
        (["sft", "--train_data", "no.jsonl", "--scratch", "{layers: 2}"], "no.jsonl: No such file"),
        (["sft", "--train_data", "no.jsonl.gz", "--scratch", "{layers: 2}"], "no.jsonl.gz: No such file"),
        (["sft", "--train_data", "x", "--model", "y", "--max_steps", "many"], "sft: max_steps = 'many' must be int"),
        (["ppo", "--train_data", "x", "--model", "y", "--reward", "z", "--batch_size", "7"], "t: ppo: batch_size = 7"),
        (["sft", "--train_data", "x", "--model", "y", "--seed", "-1"], "sft: seed = -1 must be 0 or more and below"),
        (["generate", "--model", "x", "--seed", f"{2**64}"], "generate: seed = 18446744073709551616 must be 0 or more"),
        (["quickstart", "--seed", "-1"], "rlhf-fast: quickstart: seed = -1 must be 0 or more and below 2**64"),
        (["sft", "--train_data", "x", "--scratch", "{"], "'{' is not a YAML value"),
        (["sft", "--train_data", "x", "--seed", "2026-13-45"], "'2026-13-45' is not a YAML value"),
        (["sft", "--config", "no.yaml"], "--config no.yaml: No such file"),
        (["report", "nowhere"], "holds neither train_log.jsonl nor summary.json: give the output_dir of a run"),
        (["generate", "--prompt", "hi"], "generate needs model: as flags, or as keys of a --config file"),
        (["generate", "--promt", "hi"], "unknown argument '--promt'; did you mean '--prompt'?"),
        (["generate", "--model", "x", "--top_p", "high"], "rlhf-fast: generate: top_p = 'high' must be a number"),
        (["generate", "--model", "x", "--top_p", "2"], "generate: top_p = 2.0 must be between 0 and 1"),
        (["generate", "--model", "x", "--temperature", "-1"], "generate: temperature = -1.0 must be 0 or more"),
        (["generate", "--model", "x", "--max_new_tokens", "0"], "generate: max_new_tokens = 0 must be greater than 0"),
        (["score", "--model", "x", "--batch_size", "2.5"], "rlhf-fast: score: batch_size = 2.5 must be int"),
        (["score", "--model", "x", "--batch_size", "0"], "score: batch_size = 0 must be greater than 0"),
        (["bench", "--device", "tpu"], "bench: argument --device: invalid choice: 'tpu'"),
        (["bench", "--second", "3"], "bench: unknown argument '--second'; did you mean '--seconds'?"),
        (["bench", "gae", "tokenlogprobs"], "bench: unknown op 'tokenlogprobs'; did you mean 'token_logprobs'? (there"),
    ],
)  # fmt: skip
def test_what_the_user_gets_wrong_is_one_line_and_exit_code_2(argv, message, capsys):
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("rlhf-fast: ") and error.count("\n") == 1


def write_yaml(path, text):
    path.write_text(text, errors="surrogateescape")
    return str(path)


KEYS = {"sft": ["seed", "model", "max_steps"], "ppo": ["seed", "model", "kl_coef"]}


def test_a_section_stands_over_shared_keys_and_a_stage_gets_only_its_own(tmp_path):
    path = write_yaml(tmp_path / "c.yaml", "seed: 3\nkl_coef: 0.1\nsft: {seed: 4, max_steps: 9}\nppo:\n")
    assert read_keys(path, KEYS, "sft") == {"seed": 4, "max_steps": 9}
    assert read_keys(path, KEYS, "ppo") == {"seed": 3, "kl_coef": 0.1}


def test_sections_may_share_keys_by_an_anchor_and_override_them(tmp_path):
    text = "sft: &a {seed: 4, model: m}\nppo: &b {<<: *a, seed: 5}\n"
    path = write_yaml(tmp_path / "c.yaml", text)
    assert read_keys(path, KEYS, "sft") == {"seed": 4, "model": "m"}
    assert read_keys(path, KEYS, "ppo") == {"seed": 5, "model": "m"}
    path = write_yaml(tmp_path / "c.yaml", text.replace("seed: 5", "seed: 5, seed: 6"))
    with pytest.raises(ConfigError, match="line 2: field 'seed' occurs twice"):
        read_keys(path, KEYS, "sft")
    chain = "a: {sft: &a {seed: 4, model: m}, ppo: &b {<<: *a, seed: 5}}\nppo: {<<: *b, seed: 6}"
    assert yaml.load(chain, UniqueKeys)["ppo"] == {"seed": 6, "model": "m"}


def test_options_take_numbers_as_yaml_writes_them():
    """YAML 1.1 reads 1e3 as text, here and in the keys themselves."""
    options = yaml.safe_load("{timeout: 1e3, concurrency: 8}")
    assert checked_options(RolloutServer, options, "rollout_options") == {"timeout": 1000.0, "concurrency": 8}
    with pytest.raises(ConfigError, match="rollout_options: timeout = 'soon' must be a number"):
        checked_options(RolloutServer, {"timeout": "soon"}, "rollout_options")


def test_a_number_with_an_exponent_is_one_wherever_it_stands(tmp_path):
    file = write_yaml(tmp_path / "c.yaml", """\
cai:
  source_weights: {ai: 1e-9}
  ppo: {monitors: {kl: 1.5E2}, reward_clip_range: [-.1e+1, +1.e1]}
  model: '1e3'
""")  # fmt: skip
    read = read_keys(file, {"cai": list(CAI["cai"].keys())}, "cai")
    assert read == {"source_weights": {"ai": 1e-9}, "model": "1e3",
                    "ppo": {"monitors": {"kl": 150.0}, "reward_clip_range": [-1.0, 10.0]}}  # fmt: skip
    assert CAI["derive"].keys()["weights"].parse("{kind: 1e-9}") == {"kind": 1e-9}
    assert STAGES["ppo"].keys()["model"].parse("1e3") == "1e3"  # the name of a directory
    assert yaml.load("[e9, 1e, 1.2.3e4, 0x1e3, 1e3 m]", UniqueKeys)[:3] == ["e9", "1e", "1.2.3e4"]


def test_a_word_that_is_a_section_and_a_key_is_told_apart_by_its_value(tmp_path):
    """A mapping is the section of the stage `reward`; a path or a list is ppo's key `reward`."""
    keys = {"reward": ["seed"], "ppo": ["seed", "reward"]}
    for value in ("rewards.py:short", [["runs/reward", 1.0]]):
        path = write_yaml(tmp_path / "c.yaml", json.dumps({"seed": 3, "reward": value}))
        assert read_keys(path, keys, "ppo") == {"seed": 3, "reward": value}
    path = write_yaml(tmp_path / "c.yaml", json.dumps({"seed": 3, "reward": {"seed": 4}}))
    assert read_keys(path, keys, "reward") == {"seed": 4} and read_keys(path, keys, "ppo") == {"seed": 3}


def test_a_shared_key_that_the_command_does_not_have_needs_a_section_that_can_use_it(tmp_path):
    keys = KEYS | {"generate": ["seed", "model"]}
    path = write_yaml(tmp_path / "c.yaml", "seed: 3\nmax_steps: 9\nppo: {kl_coef: 0.1}\n")
    with pytest.raises(ConfigError) as error:
        read_keys(path, keys, "ppo")
    hint = "TRL's max_steps is here total_episodes (responses in all): see \"Coming from TRL's PPO\" in docs/ppo.md"
    told = (
        f"{path}: unknown key of ppo: 'max_steps'; {hint}. If it is meant for sft, write it in a section of that name"
    )
    assert str(error.value) == told
    assert read_keys(path, keys, "sft") == {"seed": 3, "max_steps": 9}
    assert read_keys(path, keys, "generate") == {"seed": 3}
    with pytest.raises(ConfigError, match=r"unknown key of sft: 'kl_coef'. If it is meant for ppo"):
        read_keys(write_yaml(tmp_path / "c.yaml", "kl_coef: 0.1\n"), keys, "sft")
    with pytest.raises(ConfigError, match=r"unknown key of generate: 'max_step'; did you mean 'max_steps'\?$"):
        read_keys(write_yaml(tmp_path / "c.yaml", "max_step: 9\n"), keys, "generate")
    for section in ("sft: {seed: 1}", "sft: {}", "sft:"):
        path = write_yaml(tmp_path / "c.yaml", f"seed: 3\nmax_steps: 9\nppo: {{kl_coef: 0.1}}\n{section}\n")
        assert read_keys(path, keys, "ppo") == {"seed": 3, "kl_coef": 0.1}


def test_a_ppo_config_of_trl_is_refused_and_told_the_names(tmp_path, capsys):
    """Otherwise the run would ignore the batch size and the length that the config asks for."""
    own = f"model: m\ntrain_data: d\nreward: r\noutput_dir: {tmp_path / 'run'}\n"
    of_trl = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "num_train_epochs": 3, "max_steps": 7}
    for name, value in of_trl.items():
        for text in (f"{own}{name}: {value}\n", f"{own}ppo: {{{name}: {value}}}\n"):
            assert main(["ppo", "--config", write_yaml(tmp_path / "c.yaml", text)]) == 2
            assert f"{name!r}; TRL's {name} is here {TRL_PPO_NAMES[name]}: see" in capsys.readouterr().err
        assert main(["ppo", f"--{name}", str(value)]) == 2
        told = f"unknown argument '--{name}'; TRL's {name} is here {TRL_PPO_NAMES[name]}: see"
        assert told in capsys.readouterr().err


@pytest.mark.parametrize("command", ["sft", "reward", "ppo"])
def test_a_setting_of_trl_is_told_its_name_here_and_the_table_that_has_it(command):
    """Without a hint the nearest name was proposed: critic_warmup_steps for TRL's warmup_steps, seed for deepspeed. And
    names of GRPO pointed to the table of PPO, which does not have them."""
    spec, keys = STAGES[command], STAGES[command].keys()
    assert spec.hints["warmup_steps"].startswith("TRL's warmup_steps is here warmup_ratio")
    for name, hint in spec.hints.items():
        here, title, page = re.fullmatch(rf"TRL's {name} is here (.*): see \"(.*)\" in (docs/.*\.md)", hint).groups()
        assert name not in keys and (re.split("[ ,]", here)[0] in keys or here.startswith("left out"))
        _, section = (ROOT / page).read_text(encoding="utf-8").split(f"## {title}\n")
        assert f"`{name}`" in section.split("\n## ")[0] or f"`{name}:" in section.split("\n## ")[0], name


def test_a_name_that_is_near_nothing_points_to_the_help(tmp_path, capsys):
    for argv, told in (
        (["ppo", "--xyzzy", "1"], "ppo: unknown argument '--xyzzy'; rlhf-fast ppo --help-all explains all of them"),
        (["cai", "--xyzzy", "1"], "cai train: unknown argument '--xyzzy'; rlhf-fast cai train --help-all explains all"),
        (["info", "--xyzzy", "1"], "info: unknown argument '--xyzzy'; rlhf-fast info --help explains all of them"),
    ):
        assert main(argv) == 2 and told in capsys.readouterr().err
    for command, section in (("sft", "sft"), ("cai revise", "revise"), ("cai", "cai"), ("generate", "generate")):
        typed = "cai train" if command == "cai" else command
        for text in (f"{section}: {{xyzzy: 1}}", "xyzzy: 1"):
            assert main([*command.split(), "--config", write_yaml(tmp_path / "c.yaml", text)]) == 2
            error = capsys.readouterr().err
            assert "'xyzzy'" in error and f"; rlhf-fast {typed} --help-all explains every key\n" in error


def test_only_what_resumes_from_checkpoints_takes_resume(capsys):
    for name, spec in WITH_KEYS.items():
        argv = [*(["cai"] if name in CAI and name != "cai" else []), name, "--help"]
        with pytest.raises(SystemExit):
            main(argv if name != "cai" else ["cai", "train", "--help"])
        assert ("--resume" in capsys.readouterr().out) == (name in ("sft", "reward", "ppo", "cai")) == spec.resumes


def test_a_section_of_another_command_is_not_taken_for_a_key_of_cai_in_silence(tmp_path, capsys):
    keys = {"sft": ["model", "max_steps"], "ppo": ["kl_coef"], "cai": ["model", "sft", "ppo"]}

    def told(text):
        path = write_yaml(tmp_path / "c.yaml", text)
        values = read_keys(path, keys, "cai")
        return values, capsys.readouterr().err.removeprefix(f"{path}: ")

    top = "model: m\nsft: {max_steps: 9}\nppo: {kl_coef: 0.3}\n"
    for text, names in ((top, "sft, ppo"), (top + "cai: {model: n}\n", "sft, ppo"), (top + "cai: {sft: {}}\n", "ppo")):
        values, line = told(text)
        assert "ppo" not in values and line.startswith(f"{names} at the top are sections of other commands")
        assert line.endswith("write them inside cai:\n") and line.count("\n") == 1
    own = "cai: {sft: {max_steps: 1}, ppo: {kl_coef: 0.1}}\n"
    assert told(top + own) == ({"model": "m", "sft": {"max_steps": 1}, "ppo": {"kl_coef": 0.1}}, "")
    read_keys(write_yaml(tmp_path / "c.yaml", top), keys, "sft")
    assert "inside cai" not in capsys.readouterr().err


def test_the_file_for_all_stages_has_what_cai_needs_inside_cai(capsys):
    stages = STAGES | CAI
    read_keys(str(ROOT / "examples" / "hh_rlhf.yaml"), {name: list(s.keys()) for name, s in stages.items()}, "cai")
    assert "inside cai" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sed: 3", "unknown key of sft: 'sed'; did you mean 'seed'?"),
        ("resume: true", "unknown key 'resume': it is only a flag, --resume"),
        ("sft: {max_step: 9}", "section sft: unknown key 'max_step'; did you mean 'max_steps'?"),
        ("ppo: {max_steps: 9}", "section ppo: unknown key 'max_steps'"),
        ("pp: {seed: 1}", "unknown key of sft: 'pp'; did you mean 'ppo'?"),
        ("1: 2", "unknown key of sft: 1"),
        ("on: 3", "unknown key of sft: True"),
        ("sft: {2024-01-02: 3}", "section sft: unknown key datetime.date(2024, 1, 2)"),
        ("sft: 3", "section sft: must be a mapping"),
        ("- 3", "must be a mapping of keys to values, got list"),
        ("a: [", "is not YAML"),
        ("ppo: {seed: 1}\nseed: 2\nppo: {seed: 3}", "is not YAML: line 1: field 'ppo' occurs twice"),
        ("seed: \udc89", "is not YAML: 'utf-8' codec can't decode byte 0x89"),
    ],
)
def test_a_key_that_nothing_has_is_refused_with_the_nearest(text, message, tmp_path, capsys):
    with pytest.raises(ConfigError) as error:
        read_keys(write_yaml(tmp_path / "c.yaml", text), KEYS, "sft")
    assert message in str(error.value)


def test_info_prints_versions_and_backends(capsys):
    assert main(["info", "--json"]) == 0
    assert "token_logprobs" in json.loads(capsys.readouterr().out)["backends"]


# -- the stages, on a dozen transcripts --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """Transcripts in hh-rlhf's form (one of them malformed), a Python reward, a constitution, and one YAML for all."""
    root = tmp_path_factory.mktemp("cli")
    pairs = [
        {
            "chosen": f"\n\nHuman: Name {n} and {n + 1}.\n\nAssistant: They are {n} and {n + 1}.",
            "rejected": f"\n\nHuman: Name {n} and {n + 1}.\n\nAssistant: no no no no no no no no no {n}",
        }
        for n in range(24)
    ]
    pairs.insert(3, {"chosen": "no transcript", "rejected": "\n\nHuman: a\n\nAssistant: b"})
    data = root / "pairs.jsonl"
    data.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    (root / "rewards.py").write_text(
        "def short(prompts, responses, **columns):\n    return [-len(r) / 10 for r in responses]\n"
    )
    (root / "constitution.yaml").write_text(
        "format: rlhf_fast/constitution@1\nname: test\nprinciples:\n"
        "  - {id: has-n, check: {rule: must_contain, args: {any_of: [n]}}, revise: Say n.}\n"
    )
    (root / "all.yaml").write_text(f"""
train_data: {data}
eval_data: {data}
max_length: 128
sft: {{scratch: {{vocab_size: 300, hidden: 16, layers: 1}}, output_dir: {root}/sft, learning_rate: 1e-2, save_steps: 1}}
reward: {{model: {root}/sft, output_dir: {root}/reward, learning_rate: 1e-2}}
ppo:
  model: {root}/sft
  reward: [[{root}/reward, 1.0], ["{root}/rewards.py:short", 0.5]]
  eval_rewards: {{short: "{root}/rewards.py:short"}}
  output_dir: {root}/ppo
  batch_size: 8
  minibatch_size: 4
  response_length: 8
  total_episodes: 16
cai:
  model: {root}/sft
  constitution: {root}/constitution.yaml
  output_dir: {root}/cai
  num_prompts: 12
  max_new_tokens: 12
  drop: []
  human_data: {data}
  source_weights: {{human: 0.5}}
  sft: {{max_steps: 2}}
  reward: {{max_steps: 2}}
  ppo:
    batch_size: 8
    minibatch_size: 4
    response_length: 8
    total_episodes: 8
    eval_rewards: {{short: "{root}/rewards.py:short"}}
    stop_on: [overoptimization]
    eval_steps: 1
""")
    return root


def stage(root, name, *flags):
    return main([name, "--config", str(root / "all.yaml"), *flags])


def log_of(run):
    return [json.loads(line) for line in (run / "train_log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def sft(workspace):
    """The workspace, with a model in sft/."""
    assert stage(workspace, "sft", "--max_steps", "2") == 0
    return workspace


@pytest.fixture(scope="module")
def reward(sft):
    """The same, with a reward model in reward/."""
    assert stage(sft, "reward") == 0
    return sft


def test_sft_from_scratch_names_what_it_left_out_and_resumes(workspace, tmp_path, capsys):
    run = tmp_path / "run"
    assert stage(workspace, "sft", "--output_dir", str(run), "--max_steps", "2") == 0
    out = capsys.readouterr().out
    assert "24 of 25 pairs used" in out and "1 malformed, on line 4" in out and "eval_loss" in out
    left_out = [json.loads(line) for line in (run / "left_out.jsonl").read_text().splitlines()]
    assert {row["line"] for row in left_out} == {4}
    assert (run / "report.html").is_file()
    other = tmp_path / "other.jsonl"
    other.write_text('{"prompt": "a", "completion": "b"}\n')
    assert stage(workspace, "sft", "--output_dir", str(run), "--train_data", str(other)) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert [json.loads(line) for line in (run / "left_out.jsonl").read_text().splitlines()] == left_out
    with pytest.warns(UserWarning, match="max_steps"):
        assert stage(workspace, "sft", "--output_dir", str(run), "--max_steps", "3", "--resume") == 0
    assert [row["step"] for row in log_of(run)] == [1, 2, 3]


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("ours", [False, True])  # copied from a run, with its settings and without its log
def test_a_model_is_not_written_over_by_the_run_that_reads_it(reward, tmp_path, capsys, ours):
    left = ["checkpoint-*", "*.jsonl", "tensorboard", *([] if ours else ["run_config.json"])]
    for name in ("sft", "reward"):
        shutil.copytree(reward / name, tmp_path / name, ignore=shutil.ignore_patterns(*left))
    own, judge = tmp_path / "sft", tmp_path / "reward"
    data, prompts = str(reward / "pairs.jsonl"), write_rows(tmp_path, [{"prompt": "hi"}])
    of_ppo = ["ppo", "--model", str(reward / "sft"), "--train_data", prompts]
    for argv, kept in (
        (["sft", "--model", str(own), "--train_data", data], own),
        (["reward", "--model", str(own), "--train_data", data], own),
        ([*of_ppo, "--reward", f"[[{judge}, 1.0]]"], judge),
        ([*of_ppo, "--reward", str(reward / "reward"), "--value_model", str(judge)], judge),
        ([*of_ppo, "--reward", "r.py:f", "--eval_rewards", f"{{a: {judge}}}"], judge),
        ([*of_ppo, "--reward", "r.py:f", "--ref_model", str(own)], own),
    ):
        before = files_of(kept)
        assert main([*argv, "--output_dir", f"{kept}/../{kept.name}"]) == 2
        assert "is a model that the run reads" in capsys.readouterr().err
        assert files_of(kept) == before
    for model in (str(own), load_policy(own)):
        with pytest.raises(ConfigError, match="a model that the run reads"):
            SFTTrainer(SFTConfig(output_dir=str(own), max_length=99), model, train_dataset=[{"text": "a"}]).train()


@pytest.mark.parametrize("name", ["config.json", "adapter_config.json", "model-00001-of-00002.safetensors"])
def test_a_directory_that_holds_a_model_is_left_alone(workspace, tmp_path, capsys, name):
    (tmp_path / name).write_text("{}")
    assert stage(workspace, "sft", "--output_dir", str(tmp_path)) == 2
    assert f"holds a {name}, which" in capsys.readouterr().err and [x.name for x in tmp_path.iterdir()] == [name]
    (tmp_path / "run_config.json").write_text("{}")  # a run of ours, killed as it saved its model: it begins again
    assert stage(workspace, "sft", "--output_dir", str(tmp_path), "--max_steps", "1") == 0
    for left in (*tmp_path.glob("*.jsonl"), *tmp_path.glob("checkpoint-*/*")):
        left.unlink()
    assert stage(workspace, "sft", "--output_dir", str(tmp_path), "--max_steps", "1") == 2  # it has ended


def test_a_directory_that_cannot_be_made_is_named(sft, tmp_path, capsys):
    (tmp_path / "file").touch()
    prompts = ["--train_data", write_rows(tmp_path, [{"prompt": "hi"}]), "--model", str(sft / "sft")]
    for argv in (
        ["sft", "--config", str(sft / "all.yaml")],
        ["quickstart", "--smoke"],
        ["cai", "pairs", "--constitution", str(sft / "constitution.yaml"), *prompts],
    ):
        for path in (tmp_path / "file", tmp_path / "file" / "run"):
            assert main([*argv, "--output_dir", str(path)]) == 2
            error = f"output_dir {str(path)!r} cannot be written (Not a directory): choose another output_dir\n"
            assert capsys.readouterr().err.endswith(f"rlhf-fast: {error}")
    swept = str(tmp_path / ("lr_1e-5_" * 40))
    assert main(["sft", "--config", str(sft / "all.yaml"), "--output_dir", swept]) == 2
    assert "cannot be written (File name too long): choose another" in capsys.readouterr().err


@pytest.mark.parametrize("folder", ["/proc", "/proc/nothing"])  # even root writes no file there
def test_a_directory_that_takes_no_file_is_refused_before_anything_is_read(folder, capsys):
    nowhere = ["--model", "no/model", "--train_data", "no.jsonl", "--output_dir", folder]
    for argv in (["sft"], ["reward"], ["ppo", "--reward", "no.py:f"], ["cai", "pairs", "--constitution", "no.yaml"]):
        assert main([*argv, *nowhere]) == 2
        error = f"rlhf-fast: output_dir {folder!r} cannot be written (No such file or directory): choose another"
        assert capsys.readouterr().err.splitlines()[-1].startswith(error)


def test_a_refused_run_leaves_no_directory(tmp_path, capsys):
    argv = ["sft", "--model", "no/model", "--train_data", "no.jsonl", "--output_dir", str(tmp_path / "runs" / "sft")]
    assert main(argv) == 2 and "no/model" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_reward_reports_accuracy_with_interval_against_floors(sft, tmp_path, capsys):
    assert stage(sft, "reward", "--output_dir", str(tmp_path)) == 0
    out = capsys.readouterr().out
    assert "held-out accuracy" in out and "95 % interval" in out
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["floor: shorter response wins"] == 1.0 and summary["floor: bag of words"] == 1.0
    assert summary["held-out pairs"] == 24
    assert "without a model: bag of words" in (tmp_path / "report.html").read_text()


def test_ppo_takes_a_model_and_a_function_and_reads_another_reward(reward):
    assert stage(reward, "ppo") == 0
    log = log_of(reward / "ppo")
    assert [row["step"] for row in log] == [1, 2]
    assert log[0]["policy/first_minibatch_max_abs_log_ratio"] == 0
    assert "eval_short" in log[-1]


def test_cai_runs_all_its_parts_and_resumes_at_the_end(sft):
    assert stage(sft, "cai") == 0
    cai = sft / "cai"
    summary = json.loads((cai / "summary.json").read_text())
    assert [row["name"] for row in summary["stages"]] == ["start", "sft", "reward", "ppo"]
    assert all(0 <= row["pass_rate"] <= 1 for row in summary["stages"] if row["name"] != "reward")
    assert [r["stage"] for r in summary["samples"][0]["responses"]] == ["start", "sft", "ppo"]
    assert (cai / "report.html").is_file()
    judged = json.loads((cai / "reward" / "preferences.json").read_text())
    assert set(judged["by_source"]) == {"ai", "human"} and judged["by_source"]["human"]["pairs"] == 2  # a tenth of 24
    assert "eval_short" in log_of(cai / "ppo")[-1]
    before = (cai / "ppo" / "train_log.jsonl").read_bytes()
    assert stage(sft, "cai", "--resume") == 0
    assert (cai / "ppo" / "train_log.jsonl").read_bytes() == before
    # As if killed in PPO, before a checkpoint and with the log of a step.
    for left in (cai / "ppo" / "README.md", cai / "ppo" / "config.json", *(cai / "ppo").glob("*.safetensors")):
        left.unlink()
    assert stage(sft, "cai", "--resume") == 0
    row, once = log_of(cai / "ppo")[-1], json.loads(before.splitlines()[-1])
    assert row["step"] == 1 and row["objective/scores"] == once["objective/scores"]


@pytest.mark.parametrize(
    "critic", ["share_trunk: true", "advantage_estimator: rloo, num_generations: 2, lora_r: 2, kl_coef: 0"]
)
def test_cai_takes_a_policy_without_a_critic_of_its_own_and_adapters(sft, tmp_path, critic):
    sizes = "batch_size: 8, minibatch_size: 4, response_length: 8, total_episodes: 8"
    flags = ("--output_dir", str(tmp_path), "--ppo", f"{{{sizes}, {critic}}}")
    assert stage(sft, "cai", *flags) == 0
    assert ("critic/vf_explained_var" in log_of(tmp_path / "ppo")[-1]) == ("share" in critic)
    assert stage(sft, "cai", *flags, "--resume") == 0  # adapters have no config.json to know the end by


@pytest.mark.parametrize(("flags", "message"), [
    (("--human_data", "nowhere.jsonl"), "nowhere.jsonl"),
    (("--source_weights", "{people: 2}"), "weights name ['people']; the sources are ai, human"),
    (("--reward", "{max_length: 8}"), "human_data: 24 longer than max_length=8"),
    (("--ppo", "{max_prompt_length: 4}"), "train_data: 24 longer than max_prompt_length=4"),
    (("--sft", "{lora_r: 2}", "--ppo", "{lora_r: 2}"), "set lora_r for one of the two"),
    (("--eval_share", "1.0"), "eval_share = 1.0 must be 0 or more and below 1"),
    (("--sft", "{load_best_model_at_end: true, eval_steps: 1}"), "has no held-out demonstrations"),
    (("--reward", "{load_best_model_at_end: true}"), "reward's load_best_model_at_end needs eval_steps"),
    (("--ppo", "{stop_on: [overoptimization], eval_steps: 1}"), "stop_on overoptimization looks at eval_rewards"),
    (("--ppo", "{eval_rewards: [short]}"), "ppo's eval_rewards must map names to rewards, got ['short']"),
    (("--ppo", "{eval_rewards: {kl: rewards.py:short}}"), "there is no file 'rewards.py'"),
    (("--ppo", "{eval_rewards: {kl: SFT}}"), "eval_rewards may not be called 'kl'"),
    (("--ppo", "{eval_rewards: {other: SFT}}"), "has no scalar head"),
    (("--sft", "{max_length: 24}"), "tokens, and sft's max_length is 24: raise it, or set sft's on_overlong"),
    (("--max_new_tokens", "200"), "positions: lower max_new_tokens, or sft's max_length"),
    (("--ppo", "{response_length: 200}"), "positions: lower ppo's response_length"),
    (("--ppo", "{bf16: true}"), "bf16: "),
    (("--bf16", "true"), "bf16: "),
    (("--drop", "[truncatd]"), "drop = ['truncatd'] must be a list of flags: truncated"),
    (("--num_prompts", "-1"), "cai: num_prompts = -1 must be greater than 0"),
    (("--max_revisions", "0"), "cai: max_revisions = 0 must be greater than 0"),
    (("--source_weights", "{human: heavy}"), "weights must be 0 or more, got {'human': 'heavy'}"),
    (("--principles_per_pair", "50"), "principles of constitution"),
    (("--constitution", "safe-en"), "have no `check: {rule: ...}`; use LocalJudge for them"),
])  # fmt: skip
def test_what_the_last_parts_of_cai_would_refuse_is_refused_before_the_first(
    sft, tmp_path, capsys, monkeypatch, flags, message
):  # fmt: skip
    monkeypatch.setattr("rlhf_fast.trainers.common.bf16_supported", lambda device: False)
    flags = [flag.replace("SFT", str(sft / "sft")) for flag in flags]
    assert stage(sft, "cai", "--output_dir", str(tmp_path / "run"), *flags) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "run" / "revise").exists()


def test_a_constitution_that_cannot_be_used_is_refused(sft, tmp_path, capsys):
    bad = write_yaml(tmp_path / "bad.yaml", "format: rlhf_fast/constitution@1\nprinciples: [{id: a, chek: 1}]\n")
    assert stage(sft, "cai", "--constitution", bad, "--output_dir", str(tmp_path / "run")) == 2
    assert "did you mean 'check'?" in capsys.readouterr().err


@pytest.mark.parametrize("spec", [None, 5, {"a": 1}, [[5, 1.0]]])
def test_a_reward_that_is_no_path_is_refused(spec):
    with pytest.raises(ConfigError, match=r"a reward is a reward model's directory, file\.py:function, or a list"):
        resolve_reward(spec)


@pytest.mark.parametrize("spec", ["rewards:short", "package.rewards:short", "C:rewards"])
def test_a_function_of_a_module_is_no_model_to_load(spec):
    with pytest.raises(ConfigError, match=r"there is no such directory; a function is given as file\.py:function"):
        resolve_reward(spec)


def test_a_file_of_rewards_imports_what_lies_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "beside_the_rewards.py").write_text("LENGTH = 0.5\n")
    (tmp_path / "rewards.py").write_text(
        "from beside_the_rewards import LENGTH\n"
        "def f(prompts, responses): return [LENGTH * len(r) for r in responses]\n"
    )
    assert resolve_reward(f"{tmp_path}/rewards.py:f")([], ["abc"]) == [1.5]


@pytest.mark.parametrize(
    ("encoding", "told"), [("utf-8", r"rewards\.py, line 1: "), ("utf-16-le", r"rewards\.py.*: .*null bytes .*UTF-8")]
)
def test_a_file_of_rewards_that_is_no_python_is_refused_in_a_line(tmp_path, encoding, told):
    file = tmp_path / "rewards.py"
    file.write_text("def f(prompts, responses:\n    return 1\n", encoding=encoding)
    with pytest.raises(ConfigError, match=told):
        resolve_reward(f"{file}:f")


def test_a_file_of_rewards_is_a_module_that_is_executed_once(tmp_path):
    file = tmp_path / "rewards.py"
    file.write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass, field\n"
        "@dataclass\n"
        "class Judge:\n"
        "    calls: list = field(default_factory=list)\n"
        "judge = Judge()\n"
        "def ask(prompts, responses, **columns):\n"
        "    judge.calls.append(responses)\n"
        "    return [1.0] * len(responses)\n"
        "def asked(prompts, responses, **columns):\n"
        "    return [float(len(judge.calls))] * len(responses)\n"
    )
    again = f"{tmp_path}/../{tmp_path.name}/rewards.py:asked"
    (ask, _), (asked, _) = resolve_reward([[f"{file}:ask", 1.0], [again, 1.0]])
    ask([], ["a"])
    assert asked([], ["a"]) == [1.0]
    file.write_text("def asked(prompts, responses, **columns):\n    return [9.0]\n")
    os.utime(file, ns=(0, 1))  # of a coarse clock
    assert resolve_reward(f"{file}:asked")([], ["a"]) == [9.0]
    file.write_text("import sys\nassert __name__ in sys.modules\nraise RuntimeError(__name__)\n")
    os.utime(file, ns=(0, 2))
    with pytest.raises(RuntimeError) as raised:
        resolve_reward(f"{file}:asked")
    assert str(raised.value) not in sys.modules


@pytest.mark.parametrize("path", ["runs/of/nothing", "/nowhere/reward", "./nowhere", "~/reward"])
def test_a_path_to_no_model_is_named_and_the_hub_not_asked(sft, tmp_path, path, capsys, monkeypatch):
    monkeypatch.setattr("rlhf_fast.models.loading.find_adapter_config_file", None)
    data, model = write_rows(tmp_path, [{"prompt": "hi", "response": "ho"}]), str(sft / "sft")
    ppo = ["ppo", "--train_data", data, "--output_dir", str(tmp_path / "run"), "--model", model]
    assert main(["score", "--input", data, "--model", path]) == 2
    assert main(["generate", "--prompt", "hi", "--model", path]) == 2
    assert main([*ppo, "--reward", "rewards.py", "--value_model", path]) == 2
    told = capsys.readouterr().err.splitlines()
    assert told[0] == f"rlhf-fast: no model can be loaded from {path!r}: there is no such directory"
    assert told[1] == f"rlhf-fast: no tokenizer can be loaded from {path!r}: there is no such directory"
    assert told[2] == "rlhf-fast: reward 'rewards.py' is a file of functions: give file.py:function"


def test_a_reward_and_a_value_model_that_are_not_there_are_named(sft, tmp_path, capsys):
    (tmp_path / "r.py").write_text("def f(prompts, responses, **columns):\n    return [0.0] * len(prompts)\n")
    data, there_is_none = write_rows(tmp_path, [{"prompt": "hi"}] * 8), str(tmp_path / "runs" / "reward")
    sizes = ["--batch_size", "8", "--minibatch_size", "8", "--total_episodes", "8", "--response_length", "4"]
    ppo = ["ppo", "--train_data", data, "--output_dir", str(tmp_path / "run"), "--model", str(sft / "sft"), *sizes]
    assert main([*ppo, "--reward", there_is_none]) == 2
    for option in ("--value_model", "--ref_model"):
        assert main([*ppo, "--reward", f"{tmp_path}/r.py:f", option, there_is_none]) == 2
    assert capsys.readouterr().err.count(f"from {there_is_none!r}: there is no such directory\n") == 3


def test_the_reference_of_a_policy_may_be_another_model_of_its_tokens(reward, tmp_path, capsys):
    (tmp_path / "r.py").write_text("def f(prompts, responses, **columns):\n    return [0.0] * len(prompts)\n")
    data, other, critic = write_rows(tmp_path, [{"prompt": "hi"}] * 8), tmp_path / "other", tmp_path / "critic"
    model, tokenizer = load_policy(reward / "sft"), load_tokenizer(reward / "sft")
    torch.nn.init.normal_(model.get_output_embeddings().weight, std=0.5, generator=torch.Generator().manual_seed(0))
    save_model(model, tokenizer, other)
    sizes = ["--batch_size", "8", "--minibatch_size", "8", "--total_episodes", "8", "--response_length", "4"]
    ppo = ["ppo", "--train_data", data, "--model", str(reward / "sft"), *sizes, "--reward", f"{tmp_path}/r.py:f"]
    assert main([*ppo, "--output_dir", str(tmp_path / "run"), "--ref_model", str(other), "--kl_coef", "0"]) == 0
    assert abs(log_of(tmp_path / "run")[0]["objective/kl"]) > 0.1
    capsys.readouterr()
    shutil.copytree(reward / "reward", critic)
    for option, path in (("ref_model", other), ("value_model", critic)):
        tiny_tokenizer().save_pretrained(path)
        assert main([*ppo, "--output_dir", str(tmp_path / "no"), f"--{option}", str(path)]) == 2
        assert re.search(f"PPOTrainer: {option} .*another tokenizer than the policy's", capsys.readouterr().err)


def test_generate_answers_each_prompt(sft, capsys):
    capsys.readouterr()  # what making the model printed
    argv = ["generate", "--model", str(sft / "sft"), "--max_new_tokens", "4", "--temperature", "0"]
    assert main([*argv, "--prompt", "Name 1 and 2.", "--prompt", "Name 3 and 4."]) == 0
    assert capsys.readouterr().out.count("> Name") == 2


def test_bf16_of_what_writes_is_heard_and_refused_without_the_hardware(sft, capsys, monkeypatch):
    seen = []
    monkeypatch.setattr("rlhf_fast.generation.Decoder", lambda *args: seen.append(args[-1]) or Decoder(*args))
    model = str(sft / "sft")
    argv = ["generate", "--model", model, "--max_new_tokens", "4", "--prompt", "Name 1 and 2."]
    for supported, code in ((True, 0), (False, 2)):
        monkeypatch.setattr("rlhf_fast.trainers.common.bf16_supported", lambda device, supported=supported: supported)
        assert main([*argv, "--bf16", "true"]) == code
    assert "bf16: cpu has no bfloat16 instructions" in capsys.readouterr().err
    assert main(argv) == 0 and seen == [True, False]
    with pytest.raises(ConfigError, match="bf16: "):
        load_writer(WriterJob(model, bf16=True))
    monkeypatch.setattr("rlhf_fast.trainers.common.bf16_supported", lambda device: True)
    writer = load_writer(WriterJob(model, max_new_tokens=4, bf16=True))
    writer(["Name 1 and 2."], [0])
    assert seen == [True, False, True]
    assert [x.describe()["bf16"] for x in (writer, load_writer(WriterJob(model)))] == [True, False]


HOSTILE = "a\x1b[2J\r\x07\x9b\u202eb\u2066\tc\n"
SHOWN = "a\\u001b[2J\\u000d\\u0007\\u009b\\u202eb\\u2066\tc\n"


def test_what_a_terminal_would_obey_is_made_visible():
    assert visible(HOSTILE) == SHOWN and visible("ü 日本 👩\u200d🚀 \ud800") == "ü 日本 👩\u200d🚀 \\ud800"


@pytest.mark.parametrize("terminal", [True, False])
def test_an_answer_is_visible_on_a_terminal_and_as_it_is_in_a_pipe(terminal, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("rlhf_fast.jobs.answer", lambda model, prompts, *_, **__: [HOSTILE for _ in prompts])
    monkeypatch.setattr("rlhf_fast.jobs.score", lambda model, records, batch_size: [{"response": HOSTILE}])
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
    assert main(["generate", "--model", "m", "--prompt", "hi"]) == 0
    assert capsys.readouterr().out == (SHOWN if terminal else HOSTILE) + "\n"
    (tmp_path / "rows.jsonl").write_text("{}")
    assert main(["score", "--model", "m", "--input", str(tmp_path / "rows.jsonl")]) == 0
    out = capsys.readouterr().out
    assert json.loads(out) == {"response": HOSTILE} and ("\u202e" in out) is not terminal
    assert (
        main(["score", "--model", "m", "--input", str(tmp_path / "rows.jsonl"), "--output", str(tmp_path / "o")]) == 0
    )
    assert "\u202e" in (tmp_path / "o").read_text()


def test_an_error_that_quotes_data_or_a_server_is_visible(tmp_path, capsys):
    content = yaml.safe_load((Path(__file__).parents[1] / "examples/constitution.yaml").read_text())
    (tmp_path / "constitution.json").write_text(json.dumps(content | {"name": HOSTILE}))
    assert main(["cai", "validate", str(tmp_path / "constitution.json")]) == 0
    assert main(["report", str(tmp_path / HOSTILE)]) == 2
    told = "".join(capsys.readouterr())
    assert told.count("a\\u001b[2J\\u000d") == 2 and "\x1b" not in told


def test_generate_answers_records_and_score_reads_its_answers(reward, tmp_path, capsys):
    """As in PPO, text does not go through the chat template, and messages do."""
    chat = [{"role": "user", "content": "Name 3 and 4."}]
    rows = [{"prompt": "Name 1 and 2.", "n": 1}, {"prompt": chat, "n": 3, "messages": [*chat, chat[0]]}]
    file, answers = write_rows(tmp_path, rows), str(tmp_path / "answers.jsonl")
    argv = ["generate", "--model", str(reward / "sft"), "--max_new_tokens", "4", "--temperature", "0"]
    assert main([*argv, "--input", file, "--output", answers]) == 0
    asked = [row["prompt"] for row in rows]
    policy, tokenizer = load_policy(str(reward / "sft")), load_tokenizer(str(reward / "sft"))
    wanted = generate_text(policy, tokenizer, asked, max_new_tokens=4, do_sample=False)
    written = [json.loads(line) for line in Path(answers).read_text(encoding="utf-8").splitlines()]
    assert written == [{"prompt": p, "n": r["n"], "response": w} for p, r, w in zip(asked, rows, wanted, strict=True)]
    capsys.readouterr()
    assert main(["score", "--model", str(reward / "reward"), "--input", answers]) == 0
    assert capsys.readouterr().out.count('"score": ') == 2
    for flags, message in ((["--output", answers], "needs --input"), (["--input", file, "--prompt", "hi"], "neither")):
        assert main([*argv, *flags]) == 2 and message in capsys.readouterr().err


def test_generate_and_score_take_their_keys_from_a_file(reward, tmp_path, capsys):
    """Their section overrides the shared keys, and flags override both. The other commands accept the same file."""
    file = write_rows(tmp_path, [{"prompt": "Name 1 and 2.", "response": "They are."}])
    config = write_yaml(
        tmp_path / "c.yaml",
        f"""
model: {reward}/sft
seed: 3
generate: {{input: {file}, max_new_tokens: 4, temperature: 1}}
score: {{model: {reward}/reward, input: {file}}}
""",
    )
    answers = []
    for flags in ([], ["--seed", "3"], ["--seed", "4"], ["--temperature", "0"]):
        capsys.readouterr()
        assert main(["generate", "--config", config, *flags]) == 0
        answers.append(capsys.readouterr().out)
    argv = ["--model", f"{reward}/sft", "--input", file, "--max_new_tokens", "4", "--temperature", "1", "--seed", "3"]
    assert main(["generate", *argv]) == 0
    assert answers[0] == answers[1] == capsys.readouterr().out and len({*answers}) == 3
    assert main(["score", "--config", config]) == 0
    told = capsys.readouterr()
    assert told.out.count('"score": ') == 1 and "seed" not in told.err  # they take what they have of a file that trains
    write_yaml(tmp_path / "c.yaml", "generate: {top_k: 3}\n")
    for command in ("generate", "sft"):
        assert main([command, "--config", config]) == 2
        assert "section generate: unknown key 'top_k'; did you mean 'top_p'?" in capsys.readouterr().err


def test_a_prompt_and_a_response_beyond_the_positions_are_refused_before_weights_are_read(
    sft, tmp_path, monkeypatch, capsys
):
    for module in ("jobs", "trainers.ppo"):
        monkeypatch.setattr(f"rlhf_fast.{module}.load_policy", lambda *_: pytest.fail("weights are read"))
    model = ["--model", str(sft / "sft")]
    assert main(["generate", *model, "--prompt", "hi", "--prompt", "hi " * 200]) == 2
    assert "the model has 128 positions: shorten the prompt" in capsys.readouterr().err
    (tmp_path / "r.py").write_text("def f(prompts, responses, **columns):\n    return [0.0] * len(prompts)\n")
    ppo = ["ppo", "--train_data", write_rows(tmp_path, [{"prompt": "hi"}] * 8), "--reward", f"{tmp_path}/r.py:f"]
    assert main([*ppo, *model, "--output_dir", str(tmp_path / "run"), "--response_length", "200"]) == 2
    assert "the model has 128 positions: lower max_prompt_length or response_length" in capsys.readouterr().err


def test_an_answer_ends_where_the_model_has_no_more_positions(sft, capsys):
    assert main(["generate", "--model", str(sft / "sft"), "--prompt", "hi", "--max_new_tokens", "400"]) == 0
    assert "answers have at most 124 tokens" in capsys.readouterr().err  # of 128, behind a prompt of 5


def test_a_reward_model_is_no_policy(reward, tmp_path, capsys):
    for argv in (["generate", "--prompt", "hi"], ["sft", "--train_data", write_rows(tmp_path, [{"text": "a"}])]):
        assert main([*argv, "--model", str(reward / "reward")]) == 2
        assert "is a reward model, which has no lm_head" in capsys.readouterr().err


def test_a_model_directory_that_is_not_whole_is_named(sft, tmp_path, capsys):
    argv = [
        "sft",
        "--train_data",
        write_rows(tmp_path, [{"text": "a"}]),
        "--output_dir",
        str(tmp_path / "run"),
        "--model",
    ]
    shutil.copytree(sft / "sft", tmp_path / "a", ignore=shutil.ignore_patterns("checkpoint-*", "*token*"))
    assert main([*argv, str(tmp_path / "a")]) == 2
    told = capsys.readouterr().err
    assert "no tokenizer can be loaded from" in told and "which holds none: copy the model's there" in told
    shutil.copytree(sft / "sft", tmp_path / "b", ignore=shutil.ignore_patterns("checkpoint-*"))
    (tmp_path / "b" / "model.safetensors").write_bytes(b"torn")
    assert main([*argv, str(tmp_path / "b")]) == 2
    assert "no model can be loaded from" in capsys.readouterr().err
    shutil.copytree(sft / "sft", tmp_path / "c", ignore=shutil.ignore_patterns("checkpoint-*"))
    config = json.loads((tmp_path / "c" / "config.json").read_text())
    layers = config["num_hidden_layers"]
    for changed, named in (
        (
            {"num_hidden_layers": layers + 1},
            f"lack 9 weights, among them model.layers.{layers}.input_layernorm.weight, which",
        ),
        ({"vocab_size": config["vocab_size"] + 8}, "its weights have other shapes than its config.json says"),
    ):
        (tmp_path / "c" / "config.json").write_text(json.dumps(config | changed))
        assert main([*argv, str(tmp_path / "c")]) == 2
        assert named in capsys.readouterr().err
    assert main([*argv, str(tmp_path / "c" / "model.safetensors")]) == 2
    assert "there is no such directory" in capsys.readouterr().err
    (tmp_path / "b" / "adapter_config.json").write_text("torn")
    assert main([*argv, str(tmp_path / "b")]) == 2
    assert "no adapters can be loaded from" in capsys.readouterr().err


def test_score_opens_its_output_before_it_scores_and_keeps_what_stood_in_it(reward, tmp_path, capsys):
    data = Path(write_rows(tmp_path, [{"prompt": "hi", "response": "ho"}]))
    before, nothing = data.read_text(), str(tmp_path / "nothing")
    for output in (tmp_path / "new.jsonl", data):
        assert main(["score", "--model", nothing, "--input", str(data), "--output", str(output)]) == 2
    assert not (tmp_path / "new.jsonl").exists() and data.read_text() == before
    argv = ["score", "--model", str(reward / "reward"), "--input", str(data), "--output"]
    assert main([*argv, "/dev/null"]) == 0
    assert main([*argv, "/proc/nothing"]) == 2
    assert main([*argv, str(data)]) == 0  # in place
    assert [sorted(json.loads(line)) for line in data.read_text().splitlines()] == [["prompt", "response", "score"]]


def write_rows(folder, rows):
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "rows.jsonl")


def test_rows_that_are_no_records_are_refused_and_chosen_conversations_are_demonstrations(tmp_path):
    for rows in ([1], [["a"]]):
        for stage in ("sft", "reward", "ppo"):
            with pytest.raises(ConfigError, match="record 0 must be a dict"):
                rows_for(stage, write_rows(tmp_path, rows))
    user, good, bad = (
        {"role": r, "content": c} for r, c in (("user", "hi"), ("assistant", "yes"), ("assistant", "no"))
    )
    path = write_rows(tmp_path, [{"chosen": [user, good], "rejected": [user, bad]}])
    assert rows_for("sft", path)[0] == [{"messages": [user, good]}]
    text = {"chosen": "hi yes", "rejected": "hi no"}
    assert rows_for("sft", write_rows(tmp_path, [text]))[0] == [text]  # refused by its columns
    assert rows_for("ppo", write_rows(tmp_path, [text]))[0] == [text]  # the same
    pair = {"prompt": "hi", "chosen": "yes", "rejected": "no"}
    of_several_formats = dict.fromkeys(("messages", "completion")) | pair  # as a table has them, with None for no value
    assert rows_for("sft", write_rows(tmp_path, [of_several_formats]))[0] == [{"prompt": "hi", "completion": "yes"}]


def test_an_interrupted_run_exits_130_and_resumes_to_the_same_end(workspace, tmp_path):
    """SIGINT through the whole command, as a terminal sends it."""
    argv = ["sft", "--config", str(workspace / "all.yaml"), "--max_steps", "6", "--output_dir"]
    code = (
        "import os, signal, sys; from rlhf_fast.cli import main; from rlhf_fast.trainers.sft import SFTTrainer\n"
        "step = SFTTrainer._train_step\n"
        "def interrupted(self, examples):\n"
        "    if self.step == 2: os.kill(os.getpid(), signal.SIGINT)\n"
        "    return step(self, examples)\n"
        "SFTTrainer._train_step = interrupted\n"
        f"sys.exit(main({[*argv, str(tmp_path / 'cut')]!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 130, done.stderr
    assert len(log_of(tmp_path / "cut")) == 3
    assert main([*argv, str(tmp_path / "cut"), "--resume"]) == 0
    assert main([*argv, str(tmp_path / "whole")]) == 0
    losses = [[row["loss"] for row in log_of(tmp_path / name)] for name in ("cut", "whole")]
    assert losses[0] == losses[1]


def test_a_run_names_its_models_data_and_rewards_and_resumes_on_others_with_a_warning(reward, tmp_path):
    flags = ("--output_dir", str(tmp_path), "--save_steps", "1")
    assert stage(reward, "ppo", *flags) == 0
    job = json.loads((tmp_path / "job.json").read_text())
    assert job["model"] == str(reward / "sft") and job["reward"][0] == [str(reward / "reward"), 1.0]
    assert "Models, data and rewards" in (tmp_path / "report.html").read_text(encoding="utf-8")
    flags = (*flags, "--resume", "--total_episodes", "24")
    with pytest.warns(UserWarning, match=r"resuming with another reward \(it was .*, another eval_rewards"):
        assert stage(reward, "ppo", *flags, "--reward", f"{reward}/rewards.py:short", "--eval_rewards", "{}") == 0
    assert json.loads((tmp_path / "job.json").read_text())["reward"] == f"{reward}/rewards.py:short"
    assert f"<td>{reward}/rewards.py:short</td>" in (tmp_path / "report.html").read_text(encoding="utf-8")
    with pytest.warns(
        UserWarning, match="differs in batch_size; a checkpoint's place in the data is a number of steps"
    ):
        assert stage(reward, "ppo", *flags, "--reward", f"{reward}/rewards.py:short", "--eval_rewards", "{}",
                     "--batch_size", "4") == 0  # fmt: skip


def test_a_kill_while_job_json_is_written_leaves_the_one_before(tmp_path, monkeypatch):
    _write_job(SFTJob("before.jsonl", model="m"), tmp_path / "job.json")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        _write_job(SFTJob("after.jsonl", model="m"), tmp_path / "job.json")
    assert json.loads((tmp_path / "job.json").read_text())["train_data"] == "before.jsonl"


@pytest.mark.parametrize("torn", ["", "{", "[]"])
def test_a_torn_job_json_ends_no_run(torn, reward, tmp_path):
    flags = ("--output_dir", str(tmp_path), "--save_steps", "1")
    assert stage(reward, "ppo", *flags) == 0
    (tmp_path / "job.json").write_text(torn)
    assert stage(reward, "ppo", *flags, "--resume", "--total_episodes", "24") == 0
    assert json.loads((tmp_path / "job.json").read_text())["model"] == str(reward / "sft")


def test_the_same_job_resumes_without_a_warning(reward, tmp_path, recwarn):
    flags = ("--output_dir", str(tmp_path), "--save_steps", "1")
    assert stage(reward, "ppo", *flags) == 0
    assert stage(reward, "ppo", *flags, "--resume", "--total_episodes", "24") == 0
    assert not [w for w in recwarn if "resuming with another" in str(w.message)]


def test_a_run_that_a_monitor_ended_exits_3_and_says_how_to_go_on(reward, tmp_path, capsys):
    """No answer of a policy that has learned nothing is within 1e-9 nats of the reference for long."""
    flags = ("--output_dir", str(tmp_path), "--total_episodes", "48", "--monitors", "{kl: 1.0e-9}")
    assert stage(reward, "ppo", *flags, "--stop_on", "[kl]") == 3
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("rlhf-fast: stopped by monitor kl: objective/kl is ") and "above 1e-09" in last
    assert last.endswith(f"{tmp_path}/report.html shows it, --resume continues the run all the same")
    ended = len(log_of(tmp_path))
    assert stage(reward, "ppo", *flags, "--stop_on", "[kl]", "--resume") == 0
    assert len(log_of(tmp_path)) > ended


def test_a_run_that_no_longer_learns_exits_3_with_one_line_and_a_report(sft, tmp_path, capsys, monkeypatch):
    limits = ["--max_skipped_steps", "2", "--warmup_ratio", "0", "--num_samples", "0", "--max_steps", "9"]
    with pytest.warns(RuntimeWarning, match="is not finite: this update is skipped"):
        assert stage(sft, "sft", "--output_dir", str(tmp_path / "a"), "--learning_rate", "1e30", *limits) == 3
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("rlhf-fast: stopped: ") and "was not finite in 2 updates in a row" in last
    assert f"{tmp_path}/a/report.html shows the run so far; --resume continues from the newest checkpoint" in last
    assert log_of(tmp_path / "a") and "Loss" in (tmp_path / "a" / "report.html").read_text(encoding="utf-8")

    def at_once(*_):
        raise NonFiniteError("the loss was not finite")

    monkeypatch.setattr("rlhf_fast.trainers.common.NonFiniteGuard.check", at_once)
    assert stage(sft, "sft", "--output_dir", str(tmp_path / "b"), *limits) == 3  # with nothing in the log
    assert not log_of(tmp_path / "b") and (tmp_path / "b" / "report.html").is_file()


def test_a_run_none_of_whose_updates_happened_exits_3(sft, tmp_path, capsys):
    """Also if it is shorter than max_skipped_steps: it would have saved the model that it began with."""
    rewards = tmp_path / "rewards.py"
    rewards.write_text("def constant(prompts, responses, **columns):\n    return [float('nan')] * len(responses)\n")
    flags = ("--output_dir", str(tmp_path / "run"), "--reward", f"{rewards}:constant", "--total_episodes", "16")
    with pytest.warns(RuntimeWarning, match="the reward is not finite"):
        assert stage(sft, "ppo", *flags) == 3
    last = capsys.readouterr().err.splitlines()[-1]
    assert "the reward was not finite in 2 updates in a row, all of the run, so the run ends" in last
    assert (tmp_path / "run" / "non_finite_batch.pt").is_file() and not (tmp_path / "run" / "config.json").exists()
    rewards.write_text("def constant(prompts, responses, **columns):\n    return [1.00] * len(responses)\n")
    os.utime(rewards, (1, 1))
    assert stage(sft, "ppo", *flags, "--resume") == 0  # from the step before the last


def raising(error):
    def fail(*given, **options):
        raise error

    return fail


FULL, TORN = OSError(28, "No space left on device"), RuntimeError("[enforce fail at inline_container.cc:672] . pos 1")


@pytest.mark.parametrize(
    ("name", "error"),
    [("jobs.write_atomic", FULL), ("trainers.run.write_report", FULL), ("trainers.checkpoints.torch.save", TORN)],
)
def test_a_full_disk_is_one_line_and_leaves_what_was_saved(sft, tmp_path, name, error, capsys, monkeypatch):
    flags = ("--output_dir", str(tmp_path / "run"), "--max_steps", "3", "--save_steps", "1", "--num_samples", "0")
    with monkeypatch.context() as patch:
        patch.setattr(f"rlhf_fast.{name}", raising(error))
        assert stage(sft, "sft", *flags) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"rlhf-fast: a disk is full, probably that of '{tmp_path}/run' (") and str(error) in last
    assert last.endswith("): free some space, then give the command again; if it says that output_dir holds a run, "
                         "with --resume")  # fmt: skip
    assert stage(sft, "sft", *flags, *(["--resume"] if name.startswith("trainers") else [])) == 0
    assert (tmp_path / "run" / "config.json").is_file()


@pytest.mark.parametrize("name", ["samples.jsonl", "job.json", "run_config.json", "report.html", "README.md"])
def test_a_directory_in_the_place_of_a_file_is_named(sft, tmp_path, name, capsys):
    (tmp_path / name).mkdir()
    flags = ("--output_dir", str(tmp_path), "--max_steps", "1")
    assert stage(sft, "sft", *flags) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"rlhf-fast: {tmp_path}/{name} cannot be read or written (Is a directory): move it away, ")
    (tmp_path / name).rmdir()
    assert stage(sft, "sft", *flags, *(["--resume"] if name in ("report.html", "README.md") else [])) == 0


def test_a_file_that_a_reward_does_not_find_is_its_own_error(sft, tmp_path):
    code = "def lost(prompts, responses, **columns):\n    return open('no/such/file')\n"
    (tmp_path / "rewards.py").write_text(code)
    with pytest.raises(FileNotFoundError, match="no/such/file"):
        stage(sft, "ppo", "--output_dir", str(tmp_path / "run"), "--reward", f"{tmp_path}/rewards.py:lost")


def test_a_full_disk_costs_no_output_that_was_there(reward, tmp_path, capsys, monkeypatch):
    """Also if it is the input: generate and score may replace their own input."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text(before := '{"prompt": "hi", "response": "hello"}\n')
    with monkeypatch.context() as patch:

        def full(path, text, **options):
            path.write_bytes(b"")  # as opening it does
            raise FULL

        patch.setattr(Path, "write_text", full)
        assert main(["score", "--model", str(reward / "reward"), "--input", str(rows), "--output", str(rows)]) == 1
    assert rows.read_text() == before
    assert capsys.readouterr().err.splitlines()[-1].endswith("): free some space, then give the command again")


def test_half_a_character_in_another_column_is_written_as_it_was_read(reward, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "hi", "response": "hello", "id": "\\ud800"}\n')
    assert main(["score", "--model", str(reward / "reward"), "--input", str(rows), "--output", str(rows)]) == 0
    assert '"id": "\\ud800"' in rows.read_text() and json.loads(rows.read_text())["id"] == "\ud800"


def test_a_prompt_that_is_not_utf8_is_refused(sft, capsys, monkeypatch):
    asked = ["generate", "--model", str(sft / "sft"), "--max_new_tokens", "2"]
    for flags in (["--prompt", "\udcff"], ["--prompt", "hi", "--system", "\udcff"]):  # as Python reads byte 0xff
        assert main([*asked, *flags]) == 2
        assert "half a character" in capsys.readouterr().err
    for command in (asked, ["score", "--model", str(sft / "sft")]):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\n"), encoding="utf-8"))
        assert main(command) == 2
        assert "standard input is not UTF-8 (invalid start byte)" in capsys.readouterr().err


def test_what_is_no_list_of_records_is_refused_by_score(tmp_path, capsys, monkeypatch):
    (tmp_path / "five.json").write_text("5")
    assert main(["score", "--model", "none", "--input", str(tmp_path / "five.json")]) == 2
    assert "input must be a list of dicts" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["x" * 300, "x" * 300 + ".csv"])
def test_a_name_that_is_too_long_for_a_file_is_refused(sft, tmp_path, name, capsys):
    assert stage(sft, "sft", "--train_data", name, "--output_dir", str(tmp_path / "run")) == 2
    assert main(["report", name]) == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("wrong", ["", "~/runs", "a\0b"])
def test_the_quickstart_refuses_a_directory_that_it_cannot_mean(wrong, capsys, monkeypatch):
    monkeypatch.setattr("rlhf_fast.quickstart.pipeline.run_quickstart", raising(AssertionError("it began")))
    assert main(["quickstart", "--output_dir", wrong]) == 2
    assert capsys.readouterr().err.startswith("rlhf-fast: output_dir ")


@pytest.mark.parametrize("code", ["raise SystemExit", "def f(prompts, responses, **columns):\n    raise SystemExit(0)"])
def test_a_file_of_functions_that_ends_the_process_is_no_success(sft, tmp_path, code, capsys):
    (tmp_path / "ends.py").write_text(code)
    flags = ("--output_dir", str(tmp_path / "run"), "--reward", f"{tmp_path}/ends.py:f")
    assert stage(sft, "ppo", *flags) == 2
    assert "a file of functions ended the process (sys.exit, code" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("train_log.jsonl", '{"loss": 1}\n{"step": "x", "loss": 2}\n'), ("alarms.jsonl", '{"step": 1}\n'),
        ("run_config.json", '{"monitors": 5}'), ("samples.jsonl", '{"prompt": 5, "response": 5}\n'),
    ],
)  # fmt: skip
def test_a_report_of_files_that_somebody_changed_is_refused(tmp_path, name, text, capsys):
    (tmp_path / "train_log.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    (tmp_path / "run_config.json").write_text('{"monitors": {}}')
    assert main(["report", str(tmp_path)]) == 0
    (tmp_path / name).write_text(text)
    assert main(["report", str(tmp_path)]) == 2
    assert f"a file in {tmp_path} is JSON, but not as the run wrote it" in capsys.readouterr().err


def test_score_reads_records_and_writes_their_scores(sft, tmp_path, capsys, monkeypatch):
    assert stage(sft, "reward", "--output_dir", str(tmp_path / "rm")) == 0
    capsys.readouterr()
    records = [
        {"prompt": "hi", "response": "hello", "id": 7},
        {"prompt": "hi", "chosen": "hello", "rejected": "no"},
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]},
        {"prompt": "hi", "response": "hello", "chosen": True},  # a column of the user's, and still one response
        {"prompt": "hi", "response": "hello", "chosen": None, "rejected": None},  # from a table that has pairs too
        {"prompt": "hi", "responses": ["hello", "no", "well"]},
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    argv = ["score", "--model", str(tmp_path / "rm")]
    assert main([*argv, "--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl")]) == 0
    assert main([*argv, "--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "no" / "out.jsonl")]) == 2
    assert main([*argv, "--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path)]) == 2
    told = capsys.readouterr().err.splitlines()
    assert [line.rpartition(": ")[2] for line in told] == ["No such file or directory", "Is a directory"]
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert rows[0]["id"] == 7 and rows[1]["scores"][0] == pytest.approx(rows[0]["score"], abs=1e-5)
    reward = RewardModelReward.load(tmp_path / "rm")
    assert rows[2]["score"] == pytest.approx(reward([records[2]["messages"][:1]], ["hello"]).item(), abs=1e-5)
    assert rows[3]["score"] == pytest.approx(rows[0]["score"], abs=1e-5) and "scores" not in rows[3]
    assert rows[4]["score"] == pytest.approx(rows[0]["score"], abs=1e-5) and len(rows[5]["scores"]) == 3
    datasets.Dataset.from_list([records[0] | {"at": datetime(2026, 1, 2)}]).to_parquet(tmp_path / "dated.parquet")
    assert main([*argv, "--input", str(tmp_path / "dated.parquet")]) == 0
    assert json.loads(capsys.readouterr().out)["at"] == "2026-01-02 00:00:00"
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps(records[0]) + "\n"))
    assert main(argv) == 0
    assert json.loads(capsys.readouterr().out)["score"] == pytest.approx(rows[0]["score"], abs=1e-5)
    # Anthropic's pairs, whole conversations as text: from a file and from standard input alike, identical ones too.
    hh = [("hello", "no"), ("same", "same"), ("", "x")]
    hh = [
        {k: f"\n\nHuman: hi\n\nAssistant: {x}" for k, x in zip(("chosen", "rejected"), pair, strict=True)}
        for pair in hh
    ]
    (tmp_path / "hh.jsonl").write_text(text := "".join(json.dumps(x) + "\n" for x in hh))
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    assert main([*argv, "--input", str(tmp_path / "hh.jsonl")]) == 0
    from_file = capsys.readouterr()
    assert main(argv) == 0
    assert capsys.readouterr() == from_file
    scored = [json.loads(line) for line in from_file.out.splitlines()]
    assert [{k: row[k] for k in ("chosen", "rejected")} for row in scored] == hh[:2]
    said = reward([[{"role": "user", "content": "hi"}]] * 2, ["hello", "no"]).tolist()
    assert scored[0]["scores"] == pytest.approx(said, abs=1e-5)
    assert scored[1]["scores"][0] == pytest.approx(scored[1]["scores"][1], abs=1e-5)
    assert from_file.err.endswith("input record 2 is left out: chosen: turn 2 (Assistant) is empty\n")
    assert len(read_rows(str(tmp_path / "hh.jsonl"))) == 1
    assert "1 of 3 pairs used\n  1 malformed, on line 3; " in capsys.readouterr().out
    datasets.Dataset.from_list(hh).to_parquet(tmp_path / "hh.parquet")
    pairs, left_out = rows_for("reward", str(tmp_path / "hh.parquet"))  # transcripts in a table, as the hub has them
    assert pairs == rows_for("reward", str(tmp_path / "hh.jsonl"))[0] and [item.line for item in left_out] == [2, 3]
    dated = [{**row, "at": datetime(2026, 1, 2)} for row in hh]  # which JSON does not have
    datasets.Dataset.from_list(dated).to_parquet(tmp_path / "dated.parquet")
    assert rows_for("reward", str(tmp_path / "dated.parquet"))[0] == [{**pairs[0], "at": dated[0]["at"]}]
    for text in ("", "\n"):
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        assert main(argv) == 2 and "input is empty" in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin", io.StringIO('{"prompt": "hi"}\n'))
    assert main(argv) == 2 and "input record 0 has the columns prompt" in capsys.readouterr().err


def test_score_names_the_record_that_a_template_refuses_or_reads_in_part(tokenizer, model, monkeypatch):
    writes = "raise_exception('empty') if not m['content'] else m['content'].split('</think>')[-1]"
    tokenizer.chat_template = tokenizer.chat_template.replace("m['content']", f"({writes})")
    reward = RewardModelReward(load_reward_model(model, tokenizer), tokenizer)
    monkeypatch.setattr(RewardModelReward, "load", lambda path, **options: reward)
    user = {"role": "user", "content": "hi"}
    records = [{"prompt": [user], "response": text} for text in ("hello", "<think>so</think>hello", "")]
    with pytest.warns(UserWarning, match="input: in 1 of 2 records the chat template leaves out 'content'.* record 1"):
        first, second = score("rm", records[:2], 8)
    assert first["score"] == pytest.approx(second["score"], abs=1e-5)
    with pytest.raises(ConfigError, match=r"input record 2: the chat template refuses a conversation \(empty\)"):
        score("rm", records, 8)
    with pytest.raises(ConfigError, match=r"input record 1: what is to be scored ends with a user turn \('hi'\)"):
        score("rm", [records[0], {"messages": [user]}], 8)
