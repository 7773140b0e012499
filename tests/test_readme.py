"""What the README tells people to type works: its Python runs, its commands, targets and files exist."""

import importlib
import re
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from rlhf_fast.cli import main
from rlhf_fast.commands import Parser
from rlhf_fast.quickstart.model import tiny_llama, train_tokenizer

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language, text=README):
    fenced = text.split("```")[1::2]
    return [block.partition("\n")[2] for block in fenced if block.partition("\n")[0] == language]


def test_python_snippets_run_one_after_another(tmp_path, monkeypatch, capsys):
    """In a directory with a model called my-model, as a reader would have; a small one, so that it takes seconds."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    tokenizer = train_tokenizer(["What is 2 + 2? And 3 + 3? 4. 6. Who knows."] * 4, vocab_size=300)
    tiny_llama(tokenizer, seed=0, hidden=16, layers=1).save_pretrained("my-model")
    tokenizer.save_pretrained("my-model")
    snippets, names = blocks("python"), {}
    assert len(snippets) >= 7
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), names)
    assert (tmp_path / "runs/sft/config.json").is_file() and (tmp_path / "runs/reward/config.json").is_file()
    assert names["metrics"]["objective/kl"] is not None
    assert names["revised"].counts["inputs"] == len(names["prompts"]) == names["comparisons"].counts["inputs"]
    for page in ("docs/ppo.md", "docs/sft_reward.md"):  # on the models that are there now
        snippets = blocks("python", (ROOT / page).read_text(encoding="utf-8"))
        assert len(snippets) == 1
        exec(compile(snippets[0], page, "exec"), {})


def test_the_line_it_says_the_op_equals_is_what_the_op_equals():
    import torch

    import rlhf_fast as rf

    (line,) = re.findall(r"^#   (torch\.log_softmax.*)$", README, re.MULTILINE)
    logits, labels = torch.randn(2, 3, 11), torch.randint(11, (2, 3))
    torch.testing.assert_close(
        rf.token_logprobs(logits, labels), eval(line, {"torch": torch, "logits": logits, "labels": labels})
    )


def test_the_model_of_ops_md_takes_the_steps_that_the_trainer_takes_without_it(tmp_path):
    import torch
    import transformers

    (snippet,) = (s for s in blocks("python", (ROOT / "docs/ops.md").read_text(encoding="utf-8")) if "class" in s)
    exec(compile(snippet, "docs/ops.md", "exec"), names := {})
    tokens = torch.randint(50, (12, 9), generator=torch.Generator().manual_seed(0))
    labels = tokens.masked_fill(torch.arange(9) < torch.arange(12)[:, None] % 5, -100)  # not as many in each row
    data = [
        {"input_ids": t, "labels": y, "attention_mask": torch.ones_like(t)} for t, y in zip(tokens, labels, strict=True)
    ]
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(num_attention_heads=2, **sizes)
    losses, weights = [], []
    for model_class in (transformers.LlamaForCausalLM, names["LlamaForCausalLM"]):
        torch.manual_seed(0)
        arguments = transformers.TrainingArguments(
            str(tmp_path / str(len(losses))), max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2,
            learning_rate=1e-2, logging_steps=1, report_to=[], use_cpu=True, gradient_checkpointing=True,
        )  # fmt: skip
        trainer = transformers.Trainer(model_class(config), arguments, train_dataset=data)
        trainer.train()
        trainer.save_model()
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
        weights.append(transformers.AutoModelForCausalLM.from_pretrained(arguments.output_dir).lm_head.weight)
    assert len(losses[0]) == 3 and losses[1] == pytest.approx(losses[0], abs=1e-4)
    torch.testing.assert_close(*weights, rtol=0, atol=2e-4)


@pytest.mark.parametrize("module", ["trl", "verl", "openrlhf"])
def test_ops_md_names_what_compat_has(module):
    (row,) = re.findall(rf"^\| `compat\.{module}` .*\| (.*) \|$", (ROOT / "docs/ops.md").read_text(), re.MULTILINE)
    has = vars(importlib.import_module(f"rlhf_fast.compat.{module}")).items()
    ours = [f"rlhf_fast.compat.{module}", f"rlhf_fast.compat._{module}"]
    public = {name for name, x in has if getattr(x, "__module__", "").startswith(tuple(ours)) and name[0] != "_"}
    assert set(re.findall(r"`(\w+)`", row)) == public


@pytest.mark.parametrize("module", ["", ".judges", ".models"])
def test_a_page_names_every_public_name(module):
    pages = (ROOT / page for page in PAGES if page.startswith("docs") or page == "README.md")
    code = re.findall(r"`[^`]+`|```.*?```", "\n".join(page.read_text(encoding="utf-8") for page in pages), re.DOTALL)
    words = set(re.findall(r"\w+", " ".join(code)))
    assert not {*importlib.import_module(f"rlhf_fast{module}").__all__} - words - {"__version__"}


def test_targets_exist():
    typed = "\n".join(blocks(""))
    targets = re.findall(r"^make ([a-z]+)", typed, re.MULTILINE)
    makefile = (ROOT / "Makefile").read_text()
    assert targets and all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


PAGES = sorted(path.relative_to(ROOT).as_posix() for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")))


def anchors(page):
    """The headings of a page, as GitHub links to them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_a_heading_is_linked_to_as_on_github(tmp_path):
    (tmp_path / "page.md").write_text("# A_b, c's\n```\n# a comment\n```\n## Weights: fsdp\n#no\n")
    assert anchors(tmp_path / "page.md") == {"a_b-cs", "weights-fsdp"}


@pytest.mark.parametrize("document", PAGES)
def test_files_it_names_exist(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    paths = re.findall(r"`((?:rlhf_fast|csrc|tests|docs|bench|examples)/[\w./-]+)`", text)
    assert not [path for path in paths if not (ROOT / path).exists()]
    for path, _, anchor in (link.partition("#") for link in re.findall(r"\]\((?!http)([^)]+)\)", text)):
        page = (ROOT / document).parent / path if path else ROOT / document  # from where the document lies
        assert page.exists() and (not anchor or anchor in anchors(page)), f"{path}#{anchor}"


def test_the_sdist_holds_the_tree_whose_files_it_names(tmp_path):
    pytest.importorskip("setuptools")
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    if not tracked:
        pytest.skip("not a git checkout")
    write = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path)]
    subprocess.run(write, cwd=ROOT, check=True, capture_output=True, timeout=120)
    packed = (tmp_path / "rlhf_fast.egg-info" / "SOURCES.txt").read_text().split()
    assert sorted(set(tracked) - set(packed)) == [".ci/run", ".gitignore"]


def commands_in(text):
    """What the text says to type, as argv: lines of code, code in a sentence, and comments of an example."""
    text = re.sub(r"\\\n[#\s]*", "", text)  # a line that goes on in the next
    lines = re.findall(r"(?:rlhf-fast|-m rlhf_fast) +([^`\n]+)", text)
    return [shlex.split(line.removesuffix("..."), comments=True) for line in lines if " | " not in line]


class Parsed(Exception):
    pass


DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*.*"))
    if path.name != "CHANGELOG.md" and commands_in(path.read_text(encoding="utf-8"))
)


def test_documents_with_commands_are_found():
    assert {"README.md", "CONTRIBUTING.md", "docs/constitutional.md", "examples/hh_rlhf.yaml"} <= {*DOCUMENTS}
    text = "    rlhf-fast sft --a b \\\n      --c d  # e\nor `rlhf-fast info`, not `rlhf-fast cai a | b`"
    assert commands_in(text) == [["sft", "--a", "b", "--c", "d"], ["info"]]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_that_it_shows_has_these_words_and_flags(document, monkeypatch, capsys):
    parse = Parser.parse_args

    def only_parse(self, *given):
        parse(self, *given)
        raise Parsed

    monkeypatch.setattr(Parser, "parse_args", only_parse)
    for argv in commands_in((ROOT / document).read_text(encoding="utf-8")):
        try:
            code = main(argv)
        except (Parsed, SystemExit):  # the latter of --help
            code = 0
        assert code == 0, f"{argv}: {capsys.readouterr().err}"
        for config in (value for flag, value in pairwise(argv) if flag == "--config" and (ROOT / value).exists()):
            assert argv[0] in yaml.safe_load((ROOT / config).read_text())
