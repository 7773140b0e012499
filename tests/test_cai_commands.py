"""rlhf-fast cai: every word of it, on a tiny model and on a server on loopback."""

import gzip
import json
import random
import shutil
from collections import Counter
from types import SimpleNamespace

import pytest
import yaml
from fake_server import serving
from helpers import tiny_model, tiny_tokenizer
from planted import PlantedJudge

from rlhf_fast import cai_jobs
from rlhf_fast.cai_jobs import rate_held_out
from rlhf_fast.cai_keys import TrainJob
from rlhf_fast.cli import main
from rlhf_fast.commands import checked_options
from rlhf_fast.data.chat import encode_prompt
from rlhf_fast.errors import ConfigError
from rlhf_fast.judges import Constitution, HTTPJudge, LocalJudge, ModelCheck, Principle, Server, Vote, audit
from rlhf_fast.judges.protocol import Check
from rlhf_fast.judges.trust import refitted, trusted
from rlhf_fast.models import load_tokenizer
from rlhf_fast.trainers import run_dir
from rlhf_fast.trainers.constitutional import label
from rlhf_fast.trainers.pipeline import StageTable
from rlhf_fast.trainers.sft import SFTConfig

HOUSE = """\
format: rlhf_fast/constitution@1
name: house
layout: {compare: principle_last, critique: chat}
principles:
  - {id: short, check: {rule: max_chars, args: {n: 12}}, revise: Say less., compare: Choose the shorter reply.}
  - {id: kind, compare: Choose the kinder reply., weight: 2}
"""


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    root = tmp_path_factory.mktemp("cai")
    tokenizer = tiny_tokenizer()
    model = tiny_model(tokenizer, max_position_embeddings=1024)
    model.save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    (root / "house.yaml").write_text(HOUSE)
    kinds = ["benign", "red-team"] * 5
    write(root / "prompts.jsonl", [{"prompt": f"say {n}", "kind": kind} for n, kind in enumerate(kinds)])
    write(root / "people.jsonl", [
        {"prompt": f"say {n // 2}", "chosen": f"{n}{'!' * (n % 3)}", "rejected": f"-{n} {'?' * (n % 2)}"}
        for n in range(20)
    ])  # fmt: skip
    return root


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def cai(word, **keys):
    argv = [part for name, value in keys.items() for part in (f"--{name}", str(value))]
    return main(["cai", word, *argv])


def test_validate_says_what_is_in_a_file_or_wrong_with_it(house, tmp_path, capsys):
    assert main(["cai", "validate", str(house / "house.yaml")]) == 0
    out = capsys.readouterr().out
    assert "house: 2 principles" in out and "kind: compare; weight 2" in out and "sha256" in out
    (tmp_path / "bad.yaml").write_text(HOUSE.replace("weight: 2", "weight: heavy"))
    assert main(["cai", "validate", str(tmp_path / "bad.yaml")]) == 2
    assert "bad.yaml: principle 'kind': field 'weight'" in capsys.readouterr().err
    (tmp_path / "bad.yaml").write_text(HOUSE.replace("  - {", "\t- {"))
    assert main(["cai", "validate", str(tmp_path / "bad.yaml")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    (tmp_path / "bom.json").write_bytes(b'\xef\xbb\xbf["Be kind."]')
    assert main(["cai", "validate", str(tmp_path / "bom.json")]) == 0
    assert main(["cai", "lable"]) == 2 and "did you mean 'label'?" in capsys.readouterr().err
    (tmp_path / "code.yaml").write_text(HOUSE.replace("rule: max_chars, args: {n: 12}", "rule: operator:eq"))
    for allowed, code in (("false", 2), ("true", 0), ("True", 0)):  # a refusal says allow_code=True
        assert main(["cai", "validate", str(tmp_path / "code.yaml"), "--allow_code", allowed]) == code


def test_revise_and_pairs_write_what_the_next_stage_reads(house, tmp_path, capsys):
    common = {"constitution": house / "house.yaml", "model": house / "model", "train_data": house / "prompts.jsonl",
              "num_prompts": 6, "max_new_tokens": 8}  # fmt: skip
    assert cai("revise", **common, output_dir=tmp_path / "revise") == 2
    out, err = capsys.readouterr()
    assert err.endswith(f"revise: none of 6 inputs came to anything; {tmp_path}/revise/rejected.jsonl says why\n")
    cut = sum("truncated" in row["reason"] for row in read(tmp_path / "revise" / "rejected.jsonl"))
    assert "revise: 6 inputs" in out and cut == 6  # a random model does not end by itself
    assert f"all replies to {cut} of 6 prompts were cut off at max_new_tokens = 8" in out
    assert "replies that decline, originals -> demonstrations: benign 0 of 3 -> 0 of " in out and "red-team" in out
    assert {len(row["prompt"]) for row in read(tmp_path / "revise" / "sft.jsonl")} <= {1}
    assert cai("revise", **common, schedule="best", output_dir=tmp_path / "x") == 2
    assert "needs check-all or paper" in capsys.readouterr().err
    assert cai("revise", **{**common, "model": "unread"}, drop="[empt]", output_dir=tmp_path / "x") == 2
    assert "drop = ['empt'] must be a list of flags" in capsys.readouterr().err
    assert cai("revise", **{**common, "constitution": "safe-en", "model": "unread"}, output_dir=tmp_path / "x") == 2
    assert "have no `check: {rule: ...}`" in capsys.readouterr().err
    assert cai("revise", **common | {"num_prompts": -1}, output_dir=tmp_path / "x") == 2
    assert "rlhf-fast: revise: num_prompts = -1 must be greater than 0" in capsys.readouterr().err
    assert cai("pairs", **common, output_dir=tmp_path / "pairs") == 0
    unread = {**common, "model": "unread", "output_dir": tmp_path / "x"}
    assert cai("pairs", **unread, temperature=0) == 2 and "writes the same answer twice" in capsys.readouterr().err
    assert cai("train", **unread, temperature=0) == 2 and "temperature = 0" in capsys.readouterr().err
    shutil.copytree(house / "model", tmp_path / "model")
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "model")
    assert cai("pairs", **{**common, "model": tmp_path / "model", "output_dir": tmp_path / "x"}) == 2
    assert "has no eos token, so a response could never end" in capsys.readouterr().err
    pairs = tmp_path / "pairs" / "pairs.jsonl"
    assert cai("label", constitution=house / "house.yaml", data=pairs, output_dir=tmp_path / "label") == 0
    assert "label: 6 inputs" in capsys.readouterr().out


@pytest.fixture(scope="module")
def audited(house):
    """The card of the tiny judge, which knows nothing, in card/."""
    judge = {"constitution": house / "house.yaml", "judge": house / "model", "judge_options": "{min_label_mass: 0}"}
    assert cai("audit", **judge, data=house / "people.jsonl", output_dir=house / "card", probe_pairs=2) == 0
    write(house / "pairs.jsonl", [{"id": n, "prompt": f"say {n}", "a": f"{n}", "b": f"{n} {n}"} for n in range(8)])
    return {**judge, "data": house / "pairs.jsonl"}


def test_a_judge_at_the_floor_does_not_label_unless_told_to(house, audited, tmp_path, capsys):
    out = tmp_path / "label"
    assert cai("label", **audited, output_dir=out) == 2
    assert "nothing is known about this judge" in capsys.readouterr().err
    assert cai("label", **audited, card=house / "card", output_dir=out) == 2
    assert "the judge is at the floor" in capsys.readouterr().err and not out.exists()
    assert cai("label", **{**audited, "judge_options": "{}"}, card=house / "card", output_dir=out) == 2
    assert "was made with another judge" in capsys.readouterr().err
    assert cai("label", **audited, card=house / "card", principles_per_pair=1, output_dir=out) == 2
    assert "was made with another principles_per_pair: None there, 1 now" in capsys.readouterr().err
    assert cai("label", **audited, card=house / "card", allow_weak_judge="true", output_dir=out) == 0
    card, run = (json.loads((p).read_text()) for p in (house / "card" / "audit.json", out / "run.json"))
    assert run["settings"]["calibration"] == card["calibration"] and run["counts"]["inputs"] == 8
    assert (out / "constitution.html").is_file() and len(read(out / "judgements.jsonl")) == 8


@pytest.mark.parametrize("chosen", [[], [{"role": "assistant", "content": c} for c in ("one", "two")]])
def test_a_compared_reply_is_one_text(house, tmp_path, capsys, chosen):
    write(tmp_path / "rows.jsonl", [{"prompt": "q", "chosen": "x", "rejected": "y"},
                                    {"prompt": "q", "chosen": chosen, "rejected": "y"}])  # fmt: skip
    common = {"constitution": house / "house.yaml", "data": tmp_path / "rows.jsonl"}
    assert cai("audit", **common, output_dir=tmp_path / "card") == 2
    assert "rows.jsonl: row 1: 'chosen' must be text or a single message" in capsys.readouterr().err


def test_pairs_of_the_released_form_are_read_as_other_files_are(house, tmp_path, capsys):
    turns = "\n\nHuman: {}\n\nAssistant: {}"
    rows = [{"text_correct": turns.format(n, "x"), "text_incorrect": turns.format(n, "yy")} for n in range(3)]
    common = {"constitution": house / "house.yaml", "output_dir": tmp_path / "card", "probe_pairs": 0}
    with gzip.open(tmp_path / "rows.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    assert cai("audit", **common, data=tmp_path / "rows.jsonl.gz") == 0
    assert "audit: 3 pairs" in capsys.readouterr().out
    for content, message in (
        (json.dumps(rows[0])[:-9], "rows.jsonl, line 1: not JSON"),
        (b"\xff" + json.dumps(rows[0]).encode(), "rows.jsonl is not UTF-8"),
        (json.dumps({"text_correct": "x", "y": 1}), "rows.jsonl record 0 has the columns text_correct, y; it needs"),
        (json.dumps({**rows[0], "text_incorrect": "x"}), "rows.jsonl record 0: a transcript begins"),
        (json.dumps(dict.fromkeys(rows[0], "\n\nHuman:")), "rows.jsonl record 0: a dialogue has no reply"),
    ):
        (tmp_path / "rows.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
        assert cai("audit", **common, data=tmp_path / "rows.jsonl") == 2
        assert message in capsys.readouterr().err


def test_a_file_of_which_every_pair_is_left_out_is_refused(house, tmp_path, capsys):
    write(tmp_path / "rows.jsonl", [dict.fromkeys(("chosen", "rejected"), "\n\nHuman: x\n\nAssistant: y")])
    common = {"constitution": house / "house.yaml", "output_dir": tmp_path / "card"}
    assert cai("audit", **common, data=tmp_path / "rows.jsonl") == 2
    told = capsys.readouterr()
    assert "0 of 1 pairs used" in told.out and "no rows" in told.err


def test_a_judge_that_answers_nothing_says_so_on_its_card(house, tmp_path, capsys):
    """0.5 by half points is no judge that prefers the better reply in half of the cases."""
    card = tmp_path / "card"
    common = {"constitution": house / "house.yaml", "judge": house / "model", "judge_options": "{min_label_mass: 1}"}
    assert cai("audit", **common, data=house / "people.jsonl", output_dir=card, probe_pairs=0) == 2
    told = capsys.readouterr()
    assert "pairs without an answer count one half: 20 unparsed" in told.out
    assert told.err.endswith("audit: the judge answered about no pair, so its card says nothing of its judgement\n")
    assert "Each of the 20 on which it gave no answer counts one half" in (card / "audit.html").read_text()


def test_derive_gives_other_labels_without_the_judge(house, audited, tmp_path, capsys):
    label, derived = tmp_path / "label", tmp_path / "derived"
    assert cai("label", **audited, allow_weak_judge="true", tie_margin=0, output_dir=label) == 0
    before = {p.name: p.read_bytes() for p in label.iterdir()}
    options = {"judgements": label, "tie_margin": 0, "output_dir": derived}
    assert cai("derive", **options, weights="{kind: 0}", clamp="[0.4, 0.6]") == 0
    rows = {row["cai"]["pair_id"]: row for row in read(derived / "comparisons.jsonl")}
    for record in read(label / "judgements.jsonl"):
        (short,) = [v for v in record["votes"] if v["principle"] == "short"]
        assert rows[record["id"]]["cai"]["logit"] == pytest.approx((short["logit_ab"] + short["logit_ba"]) / 2)
        assert 0.5 < rows[record["id"]]["chosen_prob"] <= 0.6
    assert {p.name: p.read_bytes() for p in label.iterdir()} == before
    assert cai("derive", **options, weights="{kind: 1}") == 2
    assert "another run" in capsys.readouterr().err
    assert cai("derive", **{**options, "output_dir": tmp_path / "c"}, card=house / "card") == 0
    assert cai("derive", **options, weights="{kin: 1}") == 2 and "no votes under ['kin']" in capsys.readouterr().err


class Overconfident(PlantedJudge):
    """Three times as sure as it is right to be; two principles with errors of their own."""

    def __init__(self, name):
        self.name = name

    def describe(self):
        return {"backend": "planted", "name": self.name, "cot_tokens": 8}

    def vote(self, pair, principle):
        noise = random.Random(f"{principle.id}{sorted((pair.a, pair.b))}").gauss(0, 2) * (1 if pair.a < pair.b else -1)
        logit = 3 * (float(pair.a) - float(pair.b) + noise)
        return Vote(principle.id, logit + 5, logit - 5)


def test_derive_keeps_what_the_labels_were_made_with(tmp_path, capsys):
    """Calibration, clamp, combine and tie_margin change only where they are named; a card of another judge is none."""
    house = Constitution("house", (Principle("p", compare="Choose."), Principle("q", compare="Choose.")))
    one, card, labels = Overconfident("one"), tmp_path / "card", tmp_path / "label"
    draw = random.Random(0)
    rows = [{"prompt": f"{n}", "better": f"{1 + draw.random()}", "worse": f"{draw.random()}"} for n in range(200)]
    audit(rows, house, one, output_dir=card, probe_pairs=0)
    audit(rows, house, Overconfident("two"), output_dir=tmp_path / "two", probe_pairs=0)
    calibration = trusted(one, house, card, allow_weak_judge=True)
    assert 0.1 < calibration.slope < 0.7
    pairs = [{"id": f"{n}", "prompt": "q", "a": row["better"], "b": row["worse"]} for n, row in enumerate(rows[:40])]
    options = {"combine": "prob", "clamp": (0.2, 0.8), "calibration": calibration, "tie_margin": 0.0}
    made = label(pairs, house, one, output_dir=labels, **options)
    assert max(row["chosen_prob"] for row in made.rows) == 0.8

    def settings(name, **keys):
        assert cai("derive", judgements=labels, output_dir=tmp_path / name, **keys) == 0
        return json.loads((tmp_path / name / "run.json").read_text())["settings"]

    before = json.loads((labels / "run.json").read_text())["settings"]
    assert settings("same") == before and "fitted" not in capsys.readouterr().out
    assert (tmp_path / "same" / "comparisons.jsonl").read_bytes() == (labels / "comparisons.jsonl").read_bytes()
    assert settings("free", clamp="[0, 1]", tie_margin=0.05) == before | {"clamp": [0, 1], "tie_margin": 0.05}
    assert settings("p", weights="{q: 0}")["calibration"] == before["calibration"]
    assert f"the slope {calibration.slope:.3g} was fitted under other weights" in capsys.readouterr().out
    again = refitted(card, before, {"p": 1.0, "q": 0.0}, "prob")
    under_prob = trusted(one, house, card, combine="prob", allow_weak_judge=True)
    assert under_prob == refitted(card, before, {"p": 1.0, "q": 1.0}, "prob") != calibration
    assert settings("p again", weights="{q: 0}", card=card)["calibration"] == vars(again) != before["calibration"]
    assert "fitted" not in capsys.readouterr().out
    for wrong, words in (
        ({"card": tmp_path / "two"}, "was made with another judge"),
        ({"card": tmp_path}, f"there is no {tmp_path / 'audit.json'}"),
        ({"weights": "{p: -1}"}, "'p': field 'weight': got -1, needs a number, 0 or more"),
        ({"weights": "{p: two}"}, "'p': field 'weight': got 'two'"),
        ({"clamp": "[0.6]"}, "clamp = [0.6] must be (1 - p, p)"),
        ({"clamp": "[a, b]"}, "clamp = ['a', 'b'] must be (1 - p, p)"),
    ):
        assert cai("derive", judgements=labels, output_dir=tmp_path / "x", **wrong) == 2
        assert words in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_a_number_in_options_may_have_an_exponent():
    """YAML 1.1 reads 1e-9, which has no point, as text."""
    given = {"min_label_mass": yaml.safe_load("1e-9"), "cot_tokens": 1}
    assert checked_options(LocalJudge, given, "judge_options") == {"min_label_mass": 1e-9, "cot_tokens": 1}
    with pytest.raises(ConfigError, match="judge_options: min_label_mass = 'small' must be a number"):
        checked_options(LocalJudge, {"min_label_mass": "small"}, "judge_options")


def test_a_server_writes_and_judges(house, tmp_path, capsys):
    pytest.importorskip("openai")
    with serving() as fake:
        fake.logit = lambda text: 1.0
        common = {"constitution": house / "house.yaml", "output_dir": tmp_path / "pairs"}
        here = {"model": fake.url, "train_data": house / "prompts.jsonl", "num_prompts": 3}
        assert cai("pairs", **common, **here) == 2
        assert "server_model" in capsys.readouterr().err
        assert cai("pairs", **common, **here, server_model="m", server="{concurency: 2}") == 2
        assert "Server has no 'concurency'; did you mean 'concurrency'?" in capsys.readouterr().err
        for options, wrong in (
            ("{concurrency: many}", "server: concurrency = 'many' must be int"),
            ("{api_key_env: null}", "server: api_key_env = None must be str"),
            ("{requests_per_minute: -1}", "requests_per_minute = -1 must be above 0"),
        ):
            assert cai("pairs", **common, **here, server_model="m", server=options) == 2
            assert wrong in capsys.readouterr().err
        with pytest.warns(UserWarning, match="bf16 is for a local model"):
            assert cai("pairs", **common, **here, server_model="m", bf16="true") == 0
        judge = {"judge": fake.url, "judge_model": "m", "allow_weak_judge": "true", "data": house / "pairs.jsonl"}
        write(house / "pairs.jsonl", [{"prompt": f"say {n}", "a": f"{n}", "b": f"{n} {n}"} for n in range(4)])
        stopped = {**common, **judge, "output_dir": tmp_path / "label"}
        assert cai("label", **stopped, judge_server="{max_requests: 5}") == 2
        assert "the budget is spent: max_requests = 5" in capsys.readouterr().err
        assert cai("label", **stopped) == 0
        out = capsys.readouterr().out
        assert f"judge: {fake.url} is asked in mode chat (echo: no log-probabilities" in out and "; chat: yes)" in out
        assert "4 tie" in out  # whatever stands first is better: both orders together say nothing


def test_a_reply_that_was_never_written_is_in_no_label(house, tmp_path, capsys):
    """The server refuses the second answer to "say 1"."""
    pytest.importorskip("openai")
    asked = Counter()

    def script(text, before):
        asked[text] += 1
        return "filter" if text == "say 1" and asked[text] == 2 else None

    rules = {"constitution": house / "house.yaml", "output_dir": tmp_path / "label"}
    with serving(script) as fake:
        assert cai("pairs", constitution=house / "house.yaml", output_dir=tmp_path / "pairs", model=fake.url,
                   server_model="m", train_data=house / "prompts.jsonl", num_prompts=3) == 0  # fmt: skip
    said = capsys.readouterr().out
    assert "pairs: 3 inputs, 2 ok, 1 failed" in said and "pairs/rejected.jsonl says why" in said
    assert "; the first: b: refused: HTTP 400" in said
    pairs, (lost,) = read(tmp_path / "pairs" / "pairs.jsonl"), read(tmp_path / "pairs" / "rejected.jsonl")
    assert lost["prompt"] == [{"role": "user", "content": "say 1"}] and "b: refused: HTTP 400" in lost["reason"]
    write(tmp_path / "mixed.jsonl", [*pairs, lost])
    assert cai("label", **rules, data=tmp_path / "mixed.jsonl") == 2
    assert f"pair {lost['id']}: its status is 'failed'" in capsys.readouterr().err
    assert cai("label", **rules, data=tmp_path / "pairs" / "pairs.jsonl") == 0
    assert "label: 2 inputs, 2 tie" in capsys.readouterr().out


@pytest.mark.parametrize("fault", ["bad", "filter"])
def test_a_stage_in_which_every_item_failed_is_refused(house, tmp_path, capsys, fault):
    """Fewer items than the failures in a row that end a run."""
    pytest.importorskip("openai")
    write(tmp_path / "pairs.jsonl", [{"prompt": f"say {n}", "a": f"{n}", "b": f"{n} {n}"} for n in range(1)])
    constitution = {"constitution": house / "house.yaml"}
    with serving(lambda text, before: fault) as fake:
        writer = {"model": fake.url, "server_model": "m", "train_data": house / "prompts.jsonl", "num_prompts": 1}
        judge = {"judge": fake.url, "judge_model": "m", "allow_weak_judge": "true", "data": tmp_path / "pairs.jsonl"}
        for word, keys in (("revise", writer), ("pairs", writer), ("label", judge)):
            assert cai(word, **constitution, **keys, output_dir=tmp_path / word) == 2
            told = capsys.readouterr()
            assert f"{word}: 1 inputs" in told.out and "HTTP 400" in told.out
            assert f"{word}: none of 1 inputs came to anything; {tmp_path}/{word}/rejected.jsonl" in told.err
    with serving() as fake:  # and the same command goes on when the server does
        assert cai("pairs", **constitution, **writer | {"model": fake.url}, output_dir=tmp_path / "other") == 0


POLITE = Principle("polite", check=ModelCheck("Is it rude?"), revise="Be polite.")
ASKING = Constitution("asking", (POLITE,), "ja", "chat")  # Japanese checks are answered (A) or (B)


def stage_table(house, root, judge):
    """Of four held-out prompts, with one stage in it."""
    job = TrainJob(str(house / "model"), "unread", max_new_tokens=4)
    held_out = [{"prompt": f"say {n}"} for n in range(4)]
    run = SimpleNamespace(constitution=ASKING, judge=judge, tokenizer=load_tokenizer(job.model), held_out=held_out)
    table = StageTable(root, {"stages": [], "samples": [{**row, "responses": []} for row in held_out]})
    table.add("start", **rate_held_out(table, "start", job.model, job, run))
    return json.loads((root / "summary.json").read_text())


def test_a_check_without_an_answer_is_in_no_pass_rate(house, tmp_path, capsys):
    class Scripted:
        def __init__(self, *statuses):
            self.checks = [[Check("polite", None, kept, status, "no answer")] for status, kept in statuses]

        def check(self, replies, ledger):
            return self.checks

    some = ("ok", True), ("failed", None), ("ok", False), ("not_applicable", None)
    summary = stage_table(house, tmp_path / "some", Scripted(*some))
    (stage,) = summary["stages"]
    assert stage["pass_rate"] == 2 / 3 and stage["pass_rate_per_principle"] == {"polite": 1 / 2}
    assert [s["responses"][0]["violates"] for s in summary["samples"]] == [[], None, ["polite"], []]
    assert (
        "start: 1 of 4 replies are in no pass rate, because a check had no answer (no answer)"
        in capsys.readouterr().out
    )
    summary = stage_table(house, tmp_path / "none", Scripted(*[("unparsed", None)] * 4))
    assert summary["stages"][0]["pass_rate"] is None and "4 of 4 replies" in capsys.readouterr().out


def test_checks_of_held_out_answers_are_paid_for_once_and_within_the_budget(house, tmp_path):
    pytest.importorskip("openai")
    with serving() as fake:
        fake.logit = lambda text: -3.0
        with pytest.raises(ValueError, match="max_requests = 3, 3 used"):  # the probe, and two checks
            stage_table(house, tmp_path, HTTPJudge(Server(fake.url, "m", max_requests=3), ASKING))
        judge = HTTPJudge(Server(fake.url, "m"), ASKING)
        for _ in range(2):
            assert stage_table(house, tmp_path, judge)["stages"][0]["pass_rate"] == 1.0
        assert sum(fake.asked.values()) == 2 + 4


def test_the_seconds_of_a_stage_are_those_of_all_calls(tmp_path, monkeypatch):
    """A resumed run passes the stages that have ended in no time: its report said that they had taken none."""
    now = iter([0.0, 30.0, 30.0, 90.0, 90.0, 100.0, 102.0, 102.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(now))
    fresh = lambda: {"stages": [], "samples": []}  # noqa: E731
    table = StageTable(tmp_path, fresh())
    table.add("start")
    table.add("sft")
    StageTable(tmp_path, fresh()).add("start")  # and is killed before sft
    monkeypatch.undo()
    again = StageTable(tmp_path, fresh())
    again.add("start")
    again.add("sft")
    stages = json.loads((tmp_path / "summary.json").read_text())["stages"]
    seconds = {stage["name"]: stage["seconds"] for stage in stages}
    assert seconds["start"] == pytest.approx(32, abs=0.6) and seconds["sft"] == pytest.approx(60, abs=0.6)
    assert "92 s in total" in (tmp_path / "report.html").read_text()


# -- from end to end ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def all_of_it(house):
    """The keys of a run of `cai train` on prompts and comparisons of text that takes seconds."""
    return {
        "model": house / "model", "constitution": house / "house.yaml", "train_data": house / "prompts.jsonl",
        "num_prompts": 5, "eval_data": house / "prompts.jsonl", "max_new_tokens": 8, "drop": "[]",
        "human_data": house / "people.jsonl", "sft": "{max_steps: 1}", "reward": "{max_steps: 1}",
        "ppo": "{batch_size: 4, minibatch_size: 4, response_length: 8, total_episodes: 4}",
    }  # fmt: skip


@pytest.fixture(scope="module")
def trained(house, all_of_it):
    """The finished run in train/, and what its parts read: name -> texts."""
    seen = {}

    def watched(name, texts):
        old = getattr(cai_jobs, name)

        def new(*args, **options):
            made = old(*args, **options)
            seen[name] = texts(made, *args)
            return made

        patch.setattr(cai_jobs, name, new)

    with pytest.MonkeyPatch.context() as patch:
        watched("SFTTrainer", lambda t, *_: [t.tokenizer.decode(e.input_ids) for e in t.examples])
        watched("RewardTrainer", lambda t, *_: [t.tokenizer.decode(i.responses[0]) for i in t.items + t.eval_items])
        watched("PPOTrainer", lambda t, *_: [
            t.tokenizer.decode(x) for p in t.prompts for x in (p.tokens, t.reward.encode(p.prompt, "yes"))
        ])  # fmt: skip
        watched("generate_text", lambda made, _, tokenizer, prompts: [
            tokenizer.decode(encode_prompt(tokenizer, p)) for p in prompts
        ])  # fmt: skip
        assert cai("train", **all_of_it, output_dir=house / "train") == 0
    return house / "train", seen


def test_every_part_reads_prompts_of_text_as_chats(trained):
    _, seen = trained
    assert set(seen) == {"SFTTrainer", "RewardTrainer", "PPOTrainer", "generate_text"}
    for name, texts in seen.items():
        assert texts and all(t.startswith("<|user|>say ") and "<|assistant|>" in t for t in texts), name


def test_the_report_says_what_models_learned_from(trained):
    root, _ = trained
    stages = {stage["name"]: stage for stage in json.loads((root / "summary.json").read_text())["stages"]}
    for name, made in (("sft", "revise"), ("reward", "label")):
        counts = json.loads((root / made / "run.json").read_text())["counts"]
        assert stages[name]["counts"] == counts and counts["inputs"] == 5
        text = ", ".join(f"{n} {status}" for status, n in counts.items() if n)
        assert f"<th>{name}</th><td>{text}</td>" in (root / "report.html").read_text()


def test_files_that_were_cut_are_named(house, audited, all_of_it, trained, tmp_path, capsys):
    def refused(path):
        error = capsys.readouterr().err
        assert f"{path} is not as it was written" in error and error.count("\n") == 1

    card, run, labels = (tmp_path / name for name in ("card", "train", "labels"))
    assert cai("label", **audited, allow_weak_judge="true", output_dir=labels) == 0
    shutil.copytree(house / "card", card)
    shutil.copytree(trained[0], run)
    for path in (card / "audit.json", run / "run.json", labels / "run.json"):
        path.write_text(path.read_text()[:-20])
    capsys.readouterr()
    assert cai("label", **audited, card=card, output_dir=tmp_path / "x") == 2
    refused(card / "audit.json")
    assert cai("label", **audited, allow_weak_judge="true", output_dir=labels) == 2
    refused(labels / "run.json")
    assert cai("derive", judgements=labels, output_dir=tmp_path / "x") == 2
    refused(labels / "run.json")
    assert resumed(all_of_it, run) == 2
    refused(run / "run.json")


def test_a_run_is_not_written_over(all_of_it, trained, tmp_path, capsys):
    run, _ = trained
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    assert cai("train", **all_of_it, output_dir=run, seed=1) == 2
    assert "already holds a run: continue it with --resume" in capsys.readouterr().err
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before
    (tmp_path / "pairs").mkdir()
    (tmp_path / "pairs" / "run.json").write_text("{}")  # of `cai pairs`
    assert cai("train", **all_of_it, output_dir=tmp_path) == 2
    assert "already holds a run" in capsys.readouterr().err and not (tmp_path / "summary.json").exists()


def resumed(all_of_it, run, **other):
    keys = {**all_of_it, "output_dir": run, **other}
    return main(["cai", "train", "--resume", *(part for k, v in keys.items() for part in (f"--{k}", str(v)))])


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"seed": 1}, "revise was made with other settings than are given now: seed (0 there, 1 now)"),
        ({"num_prompts": 4}, "prompts (train_data, num_prompts, max_prompt_length)"),
        ({"principles_per_pair": 1}, "label was made with other settings"),
        ({"human_data": "fewer.jsonl"}, "reward was made with other settings than are given now: human_data. Resume"),
        ({"eval_share": 0.2}, "reward was made with other settings than are given now: eval_share (0.1 there, 0.2"),
        ({"eval_data": "fewer.jsonl"}, "ppo was made with other settings than are given now: eval_data. Resume"),
    ],
)
def test_a_resumed_run_is_refused_before_it_writes(house, all_of_it, trained, monkeypatch, capsys, other, named):
    monkeypatch.chdir(house)
    write(house / "fewer.jsonl", read(house / "people.jsonl")[:8])
    run, _ = trained
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    assert resumed(all_of_it, run, **other) == 2
    error = capsys.readouterr().err
    assert named in error and f"Resume with those of {run}/run.json, or delete {run}/" in error
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


def test_a_path_is_the_same_with_a_slash_at_its_end(all_of_it, trained, capsys):
    run, _ = trained
    assert resumed(all_of_it, f"{run}/", model=f"{all_of_it['model']}/") == 0, capsys.readouterr().err


def test_a_run_that_was_moved_is_resumed(all_of_it, trained, tmp_path, capsys):
    run = shutil.copytree(trained[0], tmp_path / "moved")
    shutil.rmtree(run / "ppo")
    assert resumed(all_of_it, run) == 0, capsys.readouterr().err
    assert (run / "ppo" / "model.safetensors").exists()
    for part in ("pairs", "label"):
        assert (run / part / "run.json").read_bytes() == (trained[0] / part / "run.json").read_bytes()


def test_a_part_that_has_ended_says_that_other_settings_change_nothing(house, all_of_it, trained):
    run, _ = trained
    before = (run / "reward" / "run_config.json").read_bytes()
    moved = (house / "people.jsonl").rename(house / "moved.jsonl")  # the same rows, wherever they lie
    with pytest.warns(UserWarning) as warned:
        assert resumed(all_of_it, run, reward="{max_steps: 1, learning_rate: 0.5}", human_data=moved) == 0
    moved.rename(house / "people.jsonl")
    (told,) = [str(w.message) for w in warned if "has ended" in str(w.message)]
    assert f"{run}/reward has ended" in told and "other learning_rate than" in told
    assert (run / "reward" / "run_config.json").read_bytes() == before


def test_a_part_that_was_deleted_is_made_from_what_is_given_now(all_of_it, trained, capsys):
    run, _ = trained
    shutil.rmtree(run / "reward")
    assert resumed(all_of_it, run, eval_share=0.5) == 2
    assert f"reward is gone, and a new one would not be the one from which {run}/ppo came" in capsys.readouterr().err
    shutil.rmtree(run / "ppo")
    assert resumed(all_of_it, run, eval_share=0.5) == 0
    assert json.loads((run / "reward" / "preferences.json").read_text())["pairs"] >= 10  # of people alone


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HOUSE.replace("check: {rule: max_chars, args: {n: 12}}, ", ""), "judge can compare under 0 principles"),
        (HOUSE.replace("revise: Say less., ", ""), "has no principle with 'revise'"),
    ],
)
def test_a_constitution_that_a_later_part_has_no_use_for_is_refused(all_of_it, tmp_path, capsys, text, message):
    (tmp_path / "c.yaml").write_text(text)
    assert cai("train", **{**all_of_it, "constitution": tmp_path / "c.yaml"}, output_dir=tmp_path / "run") == 2
    assert message in capsys.readouterr().err and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a cut emoji \ud83d"}, " has half a character ('\\ud83d', of a surrogate pair) after"),
        ({"prompt": "say", "kind": ["benign"]}, ": kind = ['benign'] must be a text"),
    ],
)
def test_rows_that_no_stage_can_write_down_are_refused(house, all_of_it, tmp_path, capsys, row, message):
    write(tmp_path / "rows.jsonl", [{"prompt": "say 1", "kind": None}, row])
    keys = {"constitution": house / "house.yaml", "model": house / "model", "train_data": tmp_path / "rows.jsonl"}
    for word, given in (("revise", keys), ("train", all_of_it | keys)):
        assert cai(word, **given, output_dir=tmp_path / "run") == 2
        assert f"row 1{message}" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_one_prompt_is_not_enough_for_two_phases(all_of_it, tmp_path, capsys):
    write(tmp_path / "one.jsonl", [{"prompt": "say 1"}])
    assert cai("train", **{**all_of_it, "train_data": tmp_path / "one.jsonl"}, output_dir=tmp_path / "run") == 2
    assert "one.jsonl has one prompt" in capsys.readouterr().err and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chosen": "say 1 1", "rejected": "say 1 2"}, "has no prompt and its replies are text"),
        ({"prompt": "say 1", "responses": ["1", "2", "3"]}, "ranks 3 responses"),
    ],
)
def test_comparisons_that_do_not_mix_with_the_judges_are_refused(house, all_of_it, tmp_path, capsys, row, message):
    write(tmp_path / "people.jsonl", [row] * 4)
    keys = {**all_of_it, "human_data": tmp_path / "people.jsonl", "output_dir": tmp_path / "run"}
    assert cai("train", **keys) == 2
    assert f"human_data record 0 {message}" in capsys.readouterr().err and not (tmp_path / "run" / "revise").exists()


def test_a_tokenizer_without_a_chat_template_is_refused_before_phase_1(house, all_of_it, tmp_path, capsys):
    """Also where the constitution asks in transcripts: SFT and the reward model read chats."""
    tokenizer = tiny_tokenizer(chat_template=None)
    tiny_model(tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "c.yaml").write_text(HOUSE.replace("critique: chat", "critique: anthropic"))
    keys = {**all_of_it, "model": tmp_path / "model", "constitution": tmp_path / "c.yaml"}
    del keys["human_data"]
    assert cai("train", **keys, output_dir=tmp_path / "run") == 2
    assert "has no chat template" in capsys.readouterr().err and not (tmp_path / "run" / "revise").exists()


def test_a_part_that_ended_and_has_lost_its_log_has_no_metrics(tmp_path):
    (tmp_path / "README.md").write_text(run_dir._CARD)
    for empty in (False, True):
        if empty:
            (tmp_path / "train_log.jsonl").write_text("")
        assert cai_jobs._train_part(tmp_path, SFTConfig(output_dir=str(tmp_path)), None, resume=True) == {}
