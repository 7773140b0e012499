"""Monitors on made-up logs: silent on a good run, and each raises its alarm once, with the numbers."""

import json
import re
import tracemalloc
from dataclasses import asdict

import pytest

from rlhf_fast.monitors import BANDS, LIMITS, Monitors, report_section
from rlhf_fast.report import write_report

START = {
    "objective/kl": 0.5, "policy/entropy_avg": 3.0, "response_length/mean": 20.0, "response/repetition": 0.05,
    "objective/score_length_correlation": 0.1,
}  # fmt: skip


def a_log(steps=20, **changed):
    """A quiet run; changed: {metric: value} in its second half."""
    return [{"step": i, **START, **(changed if i > steps // 2 else {})} for i in range(1, steps + 1)]


def alarms_of(log, limits=None):
    monitors = Monitors(limits or {})
    return [alarm for row in log for alarm in monitors(row)]


def test_a_good_run_is_quiet():
    assert alarms_of(a_log()) == []
    assert alarms_of(a_log(**{"objective/kl": 12.0, "policy/entropy_avg": 1.0, "response_length/mean": 30.0})) == []
    assert alarms_of(a_log(**{"objective/kl": 20.0, "response_length/mean": 10.0})) == []  # at the bounds


@pytest.mark.parametrize(
    ("name", "value", "bound"),
    [
        ("kl", 50.0, 20.0), ("entropy", 0.1, 0.3), ("length", 100.0, 40.0), ("length", 2.0, 10.0),
        ("repetition", 0.6, 0.25), ("score_length", 0.9, 0.6), ("score_length", -0.9, -0.6),
    ],
)  # fmt: skip
def test_each_monitor_raises_its_alarm_once_with_evidence(name, value, bound):
    metric = BANDS[name].metric
    log = a_log(**{metric: value})
    (alarm,) = alarms_of(log)
    assert alarm.monitor == name and 11 <= alarm.step <= 15  # within one window
    assert alarm.evidence["bound"] == pytest.approx(bound) and alarm.evidence["start"] == pytest.approx(START[metric])
    assert metric in alarm.message and f"over steps {alarm.step - 4} to {alarm.step}" in alarm.message
    assert alarm.message.endswith(f"; it started at {START[metric]:g}")
    assert alarms_of(log, limits={name: None}) == []  # switched off
    recovered = [
        *log,
        *({**row, "step": row["step"] + 20} for row in a_log()),
        *({**row, "step": row["step"] + 40} for row in log),
    ]
    assert [a.monitor for a in alarms_of(recovered)] == [name, name]  # raised again when it comes back


def test_a_long_run_is_watched_with_the_memory_of_a_short_one():
    def bytes_held(steps):
        monitors = Monitors({})
        tracemalloc.start()
        for step in range(steps):
            evaluation = {"eval_scores": step / 7, "eval_pass_rate": step % 97, "eval_pass_rate_stderr": step / 9}
            monitors({"step": step, **{metric: value + step / 1e9 for metric, value in START.items()}, **evaluation})
        held, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return held

    assert bytes_held(5_000) < 2 * bytes_held(100)


def test_an_evaluation_is_compared_with_the_best_and_not_with_all_before_it():
    """Evaluations of a run that had 40,000 took minutes, because each looked through all of them."""

    class Counted(float):
        compared = 0

        def __lt__(self, other):
            Counted.compared += 1
            return float(self) < other

        def __gt__(self, other):
            Counted.compared += 1
            return float(self) > other

    assert not alarms_of(evaluations([Counted(0.5 + i % 2 / 1000) for i in range(300)], [1.0] * 300))
    assert 300 <= Counted.compared < 600


def test_an_alarm_of_a_line_that_was_lost_is_raised_again():
    monitors, log = Monitors({}), [{"step": i, "objective/kl": 90.0} for i in (1, 2)]
    assert [len(monitors(row)) for row in log] == [0, 1]
    monitors.replay(log[:1])
    assert len(monitors(log[1])) == 1


def test_limits_are_those_asked_for():
    (alarm,) = alarms_of(a_log(**{"objective/kl": 3.0}), limits={"kl": 2.0})
    assert alarm.evidence["now"] > 2.0


def test_a_start_is_the_mean_of_the_first_five_lines_and_the_sixth_is_compared_with_it():
    lengths = [10.0, 20.0, 30.0, 20.0, 20.0, 150.0, 150.0]
    (alarm,) = alarms_of([{"step": i, "response_length/mean": x} for i, x in enumerate(lengths, 1)])
    assert alarm.step == 6 and alarm.evidence == {"now": 48.0, "bound": 40.0, "start": 20.0}
    assert [a.step for a in alarms_of(a_log(), limits={"entropy": 1.5})] == [6]  # a limit that every line is below


def test_what_needs_no_beginning_is_seen_in_a_short_run():
    """A run of five steps; a single line raises no alarm yet."""
    log = [{"step": i, "objective/kl": kl} for i, kl in enumerate([0.0, 90.0, 114.0, 114.0, 114.0], 1)]
    (alarm,) = alarms_of(log)
    assert (alarm.monitor, alarm.step) == ("kl", 2)
    assert alarm.message == "objective/kl is 45 over steps 1 to 2, above 20"
    assert alarms_of(log[1:2]) == [] and [a.step for a in alarms_of(log[1:])] == [3]
    # Two responses lie on a line, so a batch of two has correlations of +-1 whatever the reward.
    signs = [{"step": i, "objective/score_length_correlation": x} for i, x in enumerate([1.0, 1.0, 1.0, 1.0, -1.0], 1)]
    assert alarms_of(signs[:4]) == alarms_of([*signs[1:], signs[4]]) == []
    assert [a.step for a in alarms_of([{**row, "objective/score_length_correlation": 0.9} for row in signs])] == [5]


def evaluations(true, proxy, error=0.01):
    return [
        {"step": i, "eval_scores": p, "eval_scores_stderr": 0.02, "eval_pass_rate": t, "eval_pass_rate_stderr": error,
         "eval_kl": 1.0}
        for i, (t, p) in enumerate(zip(true, proxy, strict=True))
    ]  # fmt: skip


def test_reward_up_while_the_held_out_reward_falls():
    rising = [1.0, 1.5, 2.0, 2.5, 3.0]
    (alarm,) = alarms_of(evaluations([0.5, 0.6, 0.73, 0.70, 0.60], rising))
    assert alarm.monitor == "overoptimization" and alarm.step == 4
    assert alarm.evidence["best_step"] == 2 and alarm.evidence["standard_errors"] == pytest.approx(0.13 / 0.01 / 2**0.5)
    assert "step 2 is the better policy" in alarm.message and "from 2 to 3" in alarm.message
    assert not alarms_of(evaluations([0.5, 0.6, 0.73, 0.71, 0.70], rising))  # within three standard errors
    assert not alarms_of(evaluations([0.5, 0.6, 0.73, 0.72, 0.688], rising))  # 2.97 of them
    assert alarms_of(evaluations([0.5, 0.6, 0.73, 0.72, 0.687], rising))  # 3.04 of them
    same = [1.0, 1.5, 2.0, 2.0, 2.0]
    assert not alarms_of(evaluations([0.5, 0.6, 0.73, 0.70, 0.60], same))  # the optimised reward gained nothing
    assert not alarms_of(evaluations([0.5, 0.6, 0.73, 0.70, 0.60], rising, error=0.05))  # noise
    assert not alarms_of(evaluations([0.5, 0.6, 0.73, 0.70, 0.60], rising, error=None))  # one held-out prompt
    assert not alarms_of(evaluations([0.5, 0.6, 0.73, 0.70, 0.60], rising[::-1]))  # both fall: no hacking
    assert not alarms_of(evaluations([0.5, 0.6, 0.7, 0.8, 0.9], rising))
    assert not alarms_of(evaluations([0.5, 0.6, 0.9, 0.7, 0.6], [1.0, 1.5, None, None, 3.0]))  # NaN, as the log has it
    assert not alarms_of(evaluations([None, 0.6, None], rising[:3]))
    fallen = evaluations([0.5, 0.6, 0.73, 0.70, 0.60], rising)
    assert not alarms_of([*fallen[:4], fallen[4] | {"eval_pass_rate_stderr": None}])


def test_a_held_out_reward_that_collapses_on_every_prompt_is_an_alarm():
    """No spread at either step, and so no standard error to divide by."""
    (alarm,) = alarms_of(evaluations([1.0, 0.0], [0.1, 0.9], error=0.0))
    assert "fell from 1 at step 0 to 0, on every prompt alike" in alarm.message
    assert alarm.evidence == {"best_step": 0, "best": 1.0, "now": 0.0}
    assert not alarms_of(evaluations([1.0, 1.0], [0.1, 0.9], error=0.0))


def test_the_page_shows_every_alarm_and_every_monitor(tmp_path):
    log = a_log(**{"response_length/mean": 90.0})
    log_of_both = log + evaluations([0.5, 0.7, 0.3], [1.0, 2.0, 3.0])
    page = report_section(log_of_both, {}, [asdict(alarm) for alarm in alarms_of(log_of_both)])
    assert page.count("<figure>") == len(LIMITS) + 1 and "upper bound" in page  # overoptimization has two
    assert "response_length/mean is" in page and "eval_pass_rate fell" in page
    assert "No alarm from kl, entropy" in report_section(a_log(), {}, [])
    evaluated = [{"step": 0, "eval_scores": 0.5}]  # before the first step
    assert report_section(evaluated, {}, []) == "" == report_section(a_log(), dict.fromkeys(LIMITS), [])
    (tmp_path / "train_log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    assert "Monitors" not in write_report(tmp_path).read_text()  # a run without monitors
    (tmp_path / "run_config.json").write_text(json.dumps({"monitors": {"length": None}}))
    text = write_report(tmp_path).read_text()
    assert "<h2>Monitors</h2>" in text and "No alarm" in text


def test_a_metric_that_crosses_its_bound_all_the_time_does_not_fill_the_page():
    alarm = {"monitor": "kl", "message": "above"}
    often = [alarm | {"step": i} for i in range(1, 4001)]
    often[2000]["ended_run_of"], often[3000]["monitor"] = 60_000, "length"
    page = report_section(a_log(), {}, often)
    assert [int(step) for step in re.findall(r"</b>, step (\d+)", page)] == [1, 2, 3, 4, 5, 2001, 3001, 4000]
    assert "alarms.jsonl has 3992 more" in page


def test_the_report_shows_the_alarms_that_were_raised_whatever_the_limits_are_now(tmp_path):
    log = [{"step": i, "objective/kl": 25.0} for i in range(1, 5)]
    (tmp_path / "train_log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log))
    (tmp_path / "run_config.json").write_text(json.dumps({"monitors": {"kl": 30.0}}))
    (alarm,) = map(asdict, alarms_of(log))
    (tmp_path / "alarms.jsonl").write_text(json.dumps(alarm | {"step": 4, "ended_run_of": 9}) + "\n")
    text = write_report(tmp_path).read_text()
    assert "<b>kl</b>, step 4: objective/kl is 25 over steps 1 to 2, above 20." in text
    assert "This ended the run after step 4 of 9 planned steps.</b>" in text
    with (tmp_path / "train_log.jsonl").open("a") as file:
        file.write('{"step": 5, "objective/kl": 25.0}\n')
    assert "of 9 planned steps; it was resumed.</b>" in write_report(tmp_path).read_text()
