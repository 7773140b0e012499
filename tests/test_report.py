"""The report: self-contained, safe with any text that a model writes, and complete even if logs are not."""

import itertools
import json
import re
from xml.etree import ElementTree

import pytest

from rlhf_fast.charts import MAX_POINTS, WIDTH, Series, line_chart, nice_ticks, short
from rlhf_fast.cli import main
from rlhf_fast.report import write_quickstart_report, write_report


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def points(svg_figure):
    """The polylines of a figure as lists of (x, y) pixels."""
    found = re.findall(r'<polyline points="([^"]+)"', svg_figure)
    return [[tuple(map(float, point.split(","))) for point in line.split()] for line in found]


def test_line_chart_places_points_in_proportion():
    (line,) = points(line_chart("t", [Series("a", [(0, 0.0), (5, 0.5), (10, 1.0)])], percent=True))
    (x0, y0), (x1, y1), (x2, y2) = line
    assert x1 == pytest.approx((x0 + x2) / 2, abs=0.11) and y1 == pytest.approx((y0 + y2) / 2, abs=0.11)
    assert x0 < x2 and y0 > y2  # up is smaller in SVG


def test_what_is_no_share_gets_a_plain_axis():
    """A user's own held-out reward may be called pass_rate and count points."""
    chart = line_chart("t", [Series("a", [(0, -3.0), (5, 7.0)]), Series("b", [(0, 0.5)])], percent=True)
    (first, last), _ = points(chart)
    assert "%" not in re.findall(r">([^<]*)</text>", chart)[0] and 10 <= last[1] < first[1] <= 174  # within the plot


def test_points_that_are_not_finite_are_left_out_and_an_empty_chart_is_none():
    nan, inf = float("nan"), float("inf")
    (line,) = points(line_chart("t", [Series("a", [(0, 1.0), (1, nan), (2, inf), (3, 2.0)])]))
    assert len(line) == 2
    assert line_chart("t", [Series("a", [(0, nan)]), Series("b", [])]) == ""


def test_a_long_line_is_averaged_not_cut():
    (line,) = points(line_chart("t", [Series("a", [(i, float(i)) for i in range(10_001)])]))
    assert 100 < len(line) <= MAX_POINTS
    assert line[-1][1] < 15  # its end is still at the top


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.62, 0.64), (-3e-7, 4e-7), (5, 5), (0, 0), (9000, 51234)])
def test_ticks_enclose_the_data_in_round_steps(low, high):
    ticks = nice_ticks(low, high, 4)
    assert ticks[0] <= low and ticks[-1] >= high and 2 <= len(ticks) <= 8
    steps = {f"{b - a:.3e}" for a, b in itertools.pairwise(ticks)}
    assert len(steps) == 1 and steps.pop()[0] in "125"
    assert len({short(tick) for tick in ticks}) == len(ticks)


def test_no_label_is_cut_at_the_edge():
    """On the left the minus sign was lost. 7 px is the width of a digit in DejaVu Sans, a wide font."""
    for points in ([(0, -0.0005), (4000, -0.0002)], [(0, -120_500.0), (40_000, -118e3)], [(0, 1e5), (8000, 100_000.3)]):
        chart = line_chart("t", [Series("run", points)])
        texts = re.findall(r'<text x="([^"]+)" [^>]*text-anchor="(\w+)">([^<]*)<', chart)
        width = {text: sum(3.5 if c in ".-" else 7 for c in text) for _, _, text in texts}
        assert all(float(x) >= width[text] for x, anchor, text in texts if anchor == "end")
        assert all(float(x) + width[text] / 2 <= WIDTH for x, anchor, text in texts if anchor == "middle")
        assert texts[-1][2] == short(points[-1][0])


def test_a_short_run_has_no_half_steps():
    def below(points, **more):
        return re.findall(r'text-anchor="middle">([^<]*)<', line_chart("t", [Series("run", points)], **more))

    assert below([(1, 0.5), (2, 0.7)]) == ["1", "2"] and below([(0, 0.5), (2, 0.7)]) == ["0", "1", "2"]
    assert below([(0.5, 0.5), (1.0, 0.7)]) == ["0.5", "0.6", "0.7", "0.8", "0.9", "1"]  # a probability


def test_the_axis_of_a_long_run_has_its_first_and_its_last_step():
    chart = line_chart("t", [Series("run", [(i, 0.5) for i in range(40_001)])])
    assert re.findall(r'text-anchor="middle">([^<]*)<', chart) == ["0", "10k", "20k", "30k", "40k"]


def test_what_stays_at_0_lies_at_the_bottom_and_what_stays_elsewhere_in_the_middle():
    assert nice_ticks(0, 0, 4)[0] == 0
    for constant in (5.0, -3.0, -1e-9):
        ticks = nice_ticks(constant, constant, 4)
        assert ticks[0] < constant < ticks[-1]


def test_no_two_ticks_of_a_narrow_range_read_the_same():
    for points in ([(0, 5.6899), (50, 5.6911)], [(0, 100_000.0), (50, 100_000.3)], [(0, 5.69001), (50, 5.69002)]):
        labels = re.findall(r'text-anchor="end">([^<]*)<', line_chart("entropy", [Series("run", points)]))
        assert len(labels) == len(set(labels)) > 2 and max(map(len, labels)) <= 8


def test_run_report_escapes_model_text_and_loads_nothing(tmp_path):
    write_jsonl(
        tmp_path / "train_log.jsonl", [{"step": i, "loss": 9.0 - i, "note": "text", "lr": 0.1} for i in range(5)]
    )
    evil = "<script>alert(1)</script> & \"quotes\" 'too'"
    conversation = [{"role": "user", "content": "日本の首都は？<b>"}]
    rows = [
        {"step": step, "prompt": prompt, "response": response, "score": 0.5}
        for step, response in ((0, "first try"), (1, "in between"), (2, evil))
        for prompt in ("plain <i>", conversation)
    ]
    write_jsonl(tmp_path / "samples.jsonl", rows)
    (tmp_path / "run_config.json").write_text(json.dumps({"learning_rate": 1e-5, "output_dir": "<x>"}))
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "<script" not in page and "&lt;script&gt;alert(1)" in page
    assert "日本の首都は？&lt;b&gt;" in page and "plain &lt;i&gt;" in page and "&lt;x&gt;" in page
    assert "first try" in page and "in between" not in page  # the first and the last evaluation
    assert not re.search(r"""(src|href|url)\s*[=(]|https?://|@import""", page)
    for svg in re.findall(r"<svg.*?</svg>", page):
        ElementTree.fromstring(svg)
    assert "<b>Loss</b>" in page and "<b>lr</b>" in page


def test_numbers_of_a_run_from_elsewhere_that_are_markup_are_escaped_or_refused(tmp_path):
    evil = "<img src=x onerror=alert(1)>"
    (tmp_path / "summary.json").write_text(json.dumps({"seed": evil, "stages": [{"name": "sft"}]}))
    page = write_quickstart_report(tmp_path).read_text(encoding="utf-8")
    assert "<img" not in page and "Seed &lt;img" in page
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)[1]
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'; ") and "script-src" not in policy
    write_jsonl(tmp_path / "train_log.jsonl", [{"step": 2}])
    (tmp_path / "run_config.json").write_text(json.dumps({"monitors": {}}))
    for alarm in ({"step": evil}, {"step": 1, "ended_run_of": evil}):
        write_jsonl(tmp_path / "alarms.jsonl", [{"monitor": "kl", "message": "high", **alarm}])
        with pytest.raises(ValueError, match="format code 'd'"):
            write_report(tmp_path)


def test_a_report_does_not_write_through_links(tmp_path):
    run, mine = tmp_path / "run", tmp_path / "mine"
    run.mkdir()
    mine.write_text("mine")
    write_jsonl(run / "train_log.jsonl", [{"step": 1, "loss": 2.0}])
    for name in ("report.html", "report.html.tmp"):
        (run / name).symlink_to(mine)
    assert "<b>Loss</b>" in write_report(run).read_text() and mine.read_text() == "mine"


def test_held_out_rows_with_the_same_prompt_have_a_card_each(tmp_path):
    """They differ in a column that a reward reads; each shows its first answer next to its last."""
    write_jsonl(tmp_path / "train_log.jsonl", [{"step": 0}])
    rows = [{"step": s, "prompt": "same", "response": f"answer {x} of step {s}"} for s in range(3) for x in "AB"]
    write_jsonl(tmp_path / "samples.jsonl", rows)
    cards = re.findall(r"<article>.*?</article>", write_report(tmp_path).read_text(encoding="utf-8"))
    shown = [re.findall(r"answer \w of step \d", card) for card in cards]
    assert shown == [[f"answer {x} of step {s}" for s in (0, 2)] for x in "AB"]


def test_a_line_that_is_torn_is_left_out(tmp_path):
    """The log of a run that was killed during a write, or that is still running."""
    write_jsonl(tmp_path / "train_log.jsonl", [{"step": i, "loss": 9.0 - i} for i in range(1, 3)])
    write_jsonl(tmp_path / "samples.jsonl", [{"step": 1, "prompt": "p", "response": "whole"}])
    for name, torn in (("train_log", b'{"step": 3, "lo'), ("samples", '{"step": 3, "prompt": "日'.encode()[:-1])):
        with (tmp_path / f"{name}.jsonl").open("ab") as file:
            file.write(torn)
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "2 log lines, to step 2." in page and "whole" in page


@pytest.mark.parametrize("name", ["train_log", "samples", "alarms"])
@pytest.mark.parametrize("line", ["not JSON", "[1]", "\x00" * 8, '{"step": 3, "lo'])
def test_a_line_that_is_damaged_is_named(name, line, tmp_path, capsys):
    write_jsonl(tmp_path / "train_log.jsonl", [{"step": 1, "loss": 9.0}])
    (tmp_path / f"{name}.jsonl").write_text(f'{{"step": 1}}\n{line}\n{{"step": 4}}\n')
    assert main(["report", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and f"{tmp_path}/{name}.jsonl: line 2 is not a JSON object" in told


def test_a_log_without_lines_or_steps_has_a_report(tmp_path):
    (tmp_path / "train_log.jsonl").touch()
    assert "0 log lines" in write_report(tmp_path).read_text(encoding="utf-8")
    write_jsonl(tmp_path / "train_log.jsonl", [{"loss": 1.0}])
    assert "1 log lines" in write_report(tmp_path).read_text(encoding="utf-8")


def test_a_report_that_cannot_be_made_is_one_line(tmp_path, capsys):
    for text in ('{"stages": [', "[]"):
        (tmp_path / "summary.json").write_text(text)
        assert main(["report", str(tmp_path)]) == 2
        assert "summary.json is not as it was written" in capsys.readouterr().err
    (tmp_path / "train_log.jsonl").touch()
    (tmp_path / "report.html").mkdir()
    assert main(["report", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"rlhf-fast: report: {tmp_path}/report.html: Is a directory\n"


def test_run_report_without_a_log_says_which_file():
    with pytest.raises(FileNotFoundError, match=r"train_log\.jsonl"):
        write_report("/nonexistent")


def test_quickstart_report_shows_both_curves_principles_and_samples(tmp_path):
    stages = [
        {
            "name": "sft",
            "pass_rate": 0.25,
            "pass_rate_per_principle": {"polite": 0.5},
            "seconds": 30.0,
            "rm_accuracy": None,
        },
        {"name": "label", "counts": {"train": {"inputs": 9, "ok": 7, "tie": 2}, "held_out": {"inputs": 3, "tie": 0}}},
        {"name": "reward", "run": "rm", "rm_accuracy": 0.93, "seconds": 12},
        {
            "name": "ppo",
            "pass_rate": 0.75,
            "pass_rate_per_principle": {"polite": 0.875},
            "kl": 3.25,
            "proxy_reward": 1.5,
        },
    ]
    replies = [
        {"stage": "sft", "text": "<br>", "violates": ["polite"]},
        {"stage": "ppo", "text": "はい。", "violates": []},
    ]
    samples = [{"prompt": "こんにちは", "responses": replies}]
    (tmp_path / "summary.json").write_text(json.dumps({"seed": 7, "stages": stages, "samples": samples}))
    write_jsonl(tmp_path / "rm" / "train_log.jsonl", [{"step": i, "accuracy": i / 10} for i in range(10)])
    log = [{"step": i, "objective/scores": i / 4, "objective/kl": float(i), "eval_pass_rate": 0.5} for i in range(4)]
    log[3]["eval_polite"] = 0.6
    write_jsonl(tmp_path / "ppo" / "train_log.jsonl", log)
    page = write_quickstart_report(tmp_path).read_text(encoding="utf-8")
    assert "Seed 7" in page and "keep every rule: 25% after sft, 75% after ppo." in page
    for title in ("ppo: proxy reward", "ppo: pass rate", "ppo: KL to the reference"):
        assert f"<b>{title}</b>" in page
    assert page.count(">88%<") == 1 and "93.0%" in page and "3.25" in page
    assert "&lt;br&gt;" in page and "はい。" in page and "✓" in page and "✗" in page
    assert "Curves of reward" in page and "Curves of sft" not in page
    assert "<th>label (train)</th><td>9 inputs, 7 ok, 2 tie</td>" in page
    assert "<th>label (held_out)</th><td>3 inputs</td>" in page


def test_quickstart_report_refuses_a_summary_without_stages(tmp_path):
    (tmp_path / "summary.json").write_text('{"seed": 0, "stages": []}')
    with pytest.raises(ValueError, match="lists no stages"):
        write_quickstart_report(tmp_path)
