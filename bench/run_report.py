"""Makes the tables of whole runs: quickstart, judges, Constitutional AI, trainers beside TRL's, several processes and
hh-rlhf; bench/report.py puts them into the pages."""

from __future__ import annotations

import statistics
from collections import Counter

from op_report import OURS, source, times
from ppo_report import MODELS, ratios, short_commit


def quickstart(results: list[dict]) -> str:
    """The quickstart's runs, one a line: the true score by stage, and what the run took."""
    stages = {"SFT": "sft", "PPO": "ppo", "CAI phase 1": "cai-sft", "CAI phase 2": "cai-ppo"}
    judges = {"RM accuracy": "rm", "CAI RM accuracy": "cai-rm"}
    lines = [f"| seed | {' | '.join([*stages, *judges])} | KL | minutes | CPU | memory |", "|" + " --- |" * 11]
    for result in results:
        by_name = {stage["name"]: stage for stage in result["stages"]}
        threads = result["provenance"]["threads"]
        run = f"{result['seed']}" + (f", `{result['command']}`: {threads} threads" if threads > 1 else "")
        cells = [run, *(f"{by_name[stage]['pass_rate']:.1%}" for stage in stages.values())]
        cells += [f"{by_name[stage]['rm_accuracy']:.1%}" for stage in judges.values()]
        cells += ["{:.2f}, {:.2f}".format(*(by_name[stage]["kl"] for stage in ("ppo", "cai-ppo")))]
        seconds, cpu = (sum(stage[name] for stage in result["stages"]) for name in ("seconds", "cpu_seconds"))
        cells += [f"{seconds / 60:.1f}", f"{cpu:.0f} s", f"{result['peak_memory_gib']:.2f} GiB"]
        lines.append("| " + " | ".join(cells) + " |")
    about = results[0]
    lines.append(
        f"\n{about['machine']}, torch {about['provenance']['torch']}, "
        f"commit {short_commit(about['provenance']['commit'])}: `{about['command']}`\n"
    )
    return "\n".join(lines)


def judge_scoring(result: dict) -> str:
    """What all principles in both orders cost a local judge, one way a line."""
    layouts = result["layouts"]
    heads = [f"{layout}: tokens | CPU s | over shared" for layout in layouts]
    lines = [f"| a pair, both orders, {result['principles']} principles | {' | '.join(heads)} |"]
    lines.append("|" + " --- |" * (1 + 3 * len(layouts)))
    for name in next(iter(layouts.values())):
        cells = [name]
        for them in layouts.values():
            row = them[name]
            cells += [
                f"{row['tokens_per_pair']:,.0f}",
                f"{row['cpu_seconds_per_pair']:.2f}",
                times(row["times_shared"]),
            ]
        lines.append(f"| {' | '.join(cells)} |")
    differences = ", ".join(f"{them['shared']['largest_difference_to_naive']:.1e}" for them in layouts.values())
    price = ", ".join(
        f"{them['shared']['cpu_seconds_per_pair'] / them['one judgement']['cpu_seconds_per_pair']:.1f} in {layout}"
        for layout, them in layouts.items()
    )
    return "\n".join([
        *lines,
        f"\nEvery principle in both orders, shared, costs so many times one naive judgement: {price}. Time falls less "
        "than tokens, for every question still attends to all that it shares.",
        f"\nLargest difference of a log-probability between shared and naive: {differences}. {result['model']}, "
        f"{result['few_shots']} few-shots, batches of {result['pairs']} pairs of Anthropic's evaluation set; "
        f"{result['machine']['cpu']}, one thread, commit {result['commit']}: `{result['command']}`\n",
    ])  # fmt: skip


def constitutional(result: dict) -> str:
    """bench/cai_experiments.py: violations per reply in each phase, what one principle more changes, reward models.

    A seed that was stopped has some of the arms and reward models; a cell is over those that have it.
    """

    def mean(values, digits: int = 2) -> str:
        values = list(values)
        each = ", ".join(f"{v:.{digits}f}" for v in values)
        return f"{sum(values) / len(values):.{digits}f} ({each})" if values else ""

    runs, principles = result["runs"], list(result["runs"][0]["sft"]["kept"])
    lines = ["| violations per reply | SFT | phase 1 | phase 2 |", "| --- | --- | --- | --- |"]
    for arm in ("house", "negated", "plus-one"):
        having = [run for run in runs if arm in run["arms"]]
        cells = [mean(run["sft"]["violations"] for run in having)]
        cells += [mean(run["arms"][arm][phase]["violations"] for run in having) for phase in ("phase 1", "phase 2")]
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    lines += ["", f"| kept after phase 2 | {' | '.join(principles)} | thanks |", "|" + " --- |" * (len(principles) + 2)]
    for arm in ("house", "plus-one"):
        last = [run["arms"][arm]["phase 2"] for run in runs if arm in run["arms"]]
        cells = [mean(stage["kept"][name] for stage in last) for name in principles] + [mean(s["thanks"] for s in last)]
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    lines += ["", "| reward model trained on | held-out accuracy |", "| --- | --- |"]
    for name in ("as-judged", "shuffled", "shuffled-turned", "noisy-soft", "noisy-hard"):
        known = [run["reward_models"][name]["accuracy"] for run in runs if name in run["reward_models"]]
        lines.append(f"| {name} | {mean(known, 3)} |")
    draws = [run["reward_models"] for run in runs if "noisy-soft" in run["reward_models"]]
    gains = [
        soft - hard
        for models in draws
        for soft, hard in zip(*(models[f"noisy-{how}"]["accuracies"] for how in ("soft", "hard")), strict=True)
    ]
    if len(gains) > 1:
        error = statistics.stdev(gains) / len(gains) ** 0.5
        lines.append(f"| noisy-soft less noisy-hard | {statistics.fmean(gains):+.4f}, standard error {error:.4f} |")
    lines += ["", "| margin, stated before | held |", "| --- | --- |"]
    told = {True: "yes", False: "NO", None: ""}
    lines += [f"| {name}: {text} | {told[result['held'][name]]} |" for name, text in result["margins"].items()]
    seeds = ", ".join(str(run["seed"]) for run in runs)
    lines.append(
        f"\nMeans of seeds {seeds} (each in brackets; an empty cell is not measured). {result['cpu']}, "
        f"{result['threads']} thread, shared with other work, commit {short_commit(result['commit'])}: "
        f"`{result['command']}`\n"
    )
    return "\n".join(lines)


def trainers(result: dict) -> str:
    """One result of bench_trainers.py: a line for each implementation, medians over its rounds."""
    accuracy = [" held-out accuracy |", " --- |"] if result["stage"] == "reward" else ["", ""]
    lines = [
        f"| {result['stage']} | real tokens a CPU-second | ours is faster by | peak memory | ours over its | "
        f"of which training | ours over its | held-out loss | over ours, each round |{accuracy[0]}",
        "|" + " --- |" * 9 + accuracy[1],
    ]
    rounds = next(row["rounds"] for row in result["rows"] if row["who"] == OURS)
    for row in result["rows"]:
        ours = row["who"] == OURS
        cells = [
            row["who"],
            f"{row['real_tokens_per_cpu_second']:.0f}",
            "" if ours else f"{row['ours_is_faster_by']:.1f}x",
        ]
        for key in ("peak_bytes", "training_bytes"):
            cells += [f"{row[key] / 1e6:.0f} MB", "" if ours else f"{row[f'our_{key}_over_its']:.2f}"]
        cells += [f"{row['held_out_loss']:.3f}"]
        over = (b["held_out_loss"] - a["held_out_loss"] for a, b in zip(rounds, row["rounds"], strict=True))
        cells += ["" if ours else ", ".join(f"{difference:+.4f}" for difference in over)]
        cells += [f"{row['held_out_accuracy']:.3f}"] if accuracy[0] else []
        lines.append("| " + " | ".join(cells) + " |")
    about, settings = result["model_and_data"], result["settings"]
    precision = "products in bfloat16" if settings.get("bf16") else "float32"
    of = "sequences" if result["stage"] == "sft" else "pairs"
    shape = settings.get("shape", "llama")
    kind = "Llama" if shape == "llama" else f"A model of {MODELS[shape]}'s shape"
    length = about["tokens_a_sequence"]
    learned = f", {about['learned_share']:.0%} of them learned" if "learned_share" in about else ""
    return "\n".join(lines) + (
        f"\n\n{kind} of {about['weights'] / 1e6:.1f}M weights ({settings['hidden']} x {settings['layers']}, vocabulary "
        f"{settings['vocab']}), {precision}, {settings['steps']} steps of {settings['batch']} {of} of hh-rlhf; "
        f"tokens a sequence: mean {length['mean']:.0f}, median {length['median']:.0f}, most {length['max']}{learned}; "
        f"{len(rounds)} round{'s' if len(rounds) > 1 else ''}.\n"
        f"{source(result)}"
    )


def stages(trained: list[dict], ppo: dict | None) -> str:
    """The README's table of whole trainers beside TRL's, from bench_trainers.py's and bench_ppo.py's results."""
    columns = ["stage", "TRL's defaults", "TRL's fastest setting here", "our peak memory over TRL's"]
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    for result in trained:
        default, *others = result["rows"][1:]
        best = min(others, key=lambda row: row["ours_is_faster_by"])
        memory = ", ".join(f"{row['our_peak_bytes_over_its']:.2f}" for row in result["rows"][1:])
        name = {"sft": "SFT", "reward": "reward model"}[result["stage"]]
        settings, width = result["settings"], trained[0]["settings"]["hidden"]
        name += ", `bf16`" if settings.get("bf16") else ""
        if (shape := settings.get("shape", "llama")) != "llama":
            name += f", {MODELS[shape]}'s shape"
        elif settings["hidden"] != width:
            name += f", width {settings['hidden']} instead of {width}"
        lines.append(f"| {name} | {default['ours_is_faster_by']:.1f}x | {best['ours_is_faster_by']:.1f}x | {memory} |")

    def of_ppo(row: dict) -> str:
        over, peak = row["over_trl"], row["peak_rss"]
        cells = [", ".join(f"{over[system]:.1f}x" for system in ("shared", "separate"))]
        cells.append(", ".join(f"{peak[system] / peak['trl']:.2f}" for system in ("shared", "separate")))
        return f" | {' | '.join(cells)} |"

    def of_grpo(row: dict) -> str:
        peak, theirs = row["peak_rss"], ("trl-grpo", "trl-grpo-logits")
        cells = [f"{statistics.median(ratios(row, 'group', name)):.1f}x" for name in theirs]
        cells.append(", ".join(f"{peak['group'] / peak[name]:.2f}" for name in theirs))
        return f"{' | '.join(cells)} |"

    parts = ppo["parts"] if ppo else {}
    if "speed" in parts:
        base, measured = parts["speed"], [parts["speed"], *parts.get("speeds", {"rows": []})["rows"]]
        for row in measured:
            run, width = row["run"], base["run"]["hidden"]
            name = "PPO, shared trunk and separate critic" if row is base else "the same"
            name += ", `bf16`" if run["bf16"] else ""
            name += f", width {run['hidden']} instead of {width}" if run["hidden"] != width else ""
            lines.append(f"| {name} |{of_ppo(row)}")
    for row in parts.get("grpo", {"rows": []})["rows"]:
        lines.append("| GRPO, prompts of {} to {} tokens | ".format(*row["run"]["prompt_length"]) + of_grpo(row))
    if large := parts.get("large"):
        shape = f", {MODELS[large['grpo']['run']['shape']]}'s shape"
        lines.append(f"| PPO, shared trunk and separate critic{shape} |{of_ppo(large['ppo'])}")
        lines.append(f"| GRPO{shape} | {of_grpo(large['grpo'])}")
    return "\n".join(lines) + "\n"


def parallel(result: dict) -> str:
    """What a second process buys (bench/bench_parallel.py)."""
    rows = {row["stage"]: row for row in result["rows"]}
    lines = ["| | a step of SFT | a step of PPO | memory, bytes per parameter |", "| --- | --- | --- | --- |"]
    for way, memory in rows["memory"]["bytes_a_parameter"].items():
        faster = (times(rows[stage]["over_1_process_1_thread"][way]) for stage in ("sft", "ppo"))
        lines.append(f"| {way} | {' | '.join(faster)} | {memory:.1f} |")
    return "\n".join(lines) + f"\n\n{source(result).lstrip()}"


def hh_reward(result: dict) -> str:
    """bench/hh_reward.py: each fold by the settings chosen on the others, with the floors; and each candidate."""
    found, model = result["summary"], result["model"]
    columns = ["pairs", "accuracy", "95 % interval", "loss", "ECE", "reward with length", *found["all"]["floors"]]
    lines = ["| " + " | ".join(["held out", "settings", *columns]) + " |", "|" + " --- |" * (2 + len(columns))]

    def settings(row: dict) -> str:
        read = {0: "reply alone", None: "whole prompt"}.get(row["turns"], f"last {row['turns']} turns and reply")
        layers = f"{row['layers']} layer{'s' * (row['layers'] > 1)}"
        return f"{read}, {layers}, batch {row['batch_size']}, rate {row['learning_rate']:g}"

    def line(name: str, how: str, row: dict) -> str:
        cells = [name, how, str(row["pairs"]), f"{row['accuracy']:.3f}", f"{row['low']:.3f} to {row['high']:.3f}"]
        cells += [f"{row['loss']:.3f}", f"{row['ece']:.3f}", f"{row['reward_with_length']:+.2f}"]
        return "| " + " | ".join([*cells, *(f"{value:.3f}" for value in row["floors"].values())]) + " |"

    lines.append(line("**all pairs**", "each fold's as chosen on the others", found["all"]))
    how = f"best on the rest: {settings(found['confirmed'])}"
    lines.append(line("those the settings were not searched on", how, found["confirmed"]))
    chosen = Counter(map(settings, found["folds"])).most_common()
    chosen = "; ".join(f"{how}: {count} of {len(found['folds'])} folds" for how, count in chosen)
    each = [row["accuracy"] for row in found["folds"]]
    lines += ["", "| settings | accuracy over all folds | of each seed | loss |", "|" + " --- |" * 4]
    for row in found["each candidate"]:
        seeds = ", ".join(f"{value:.3f}" for value in row["of each seed"])
        lines.append(f"| {settings(row)} | {row['accuracy']:.3f} | {seeds} | {row['loss']:.3f} |")
    weights = [row["weights"] for row in result["rows"]]
    cut = max(sum(row["cut"]) for row in result["rows"])
    return "\n".join(lines) + (
        f"\n\nChosen: {chosen}. A fold's accuracy: {min(each):.3f} to {max(each):.3f}. An accuracy is the mean over "
        f"{len(found['all']['of each seed'])} seeds of that of one model; its "
        "interval is that of so many pairs. "
        f"Llamas of {min(weights):,} to {max(weights):,} weights from random initialisation, width {model['hidden']}, "
        f"BPE {model['vocab_size']}, {model['epochs']} epochs. Every one of the {result['pairs']} well-formed pairs is "
        f"held out once; {len(result['left_out'])} lines of the files are malformed; {cut} pairs are over "
        f"{model['max_length']} tokens with their prompt and lose its beginning where it is read. Standard error of "
        f"the accuracy: {found['all']['standard_error']:.3f}; CPU time of all runs: "
        f"{sum(row['cpu_seconds'] for row in result['rows']) / 60:.0f} min.\n{source(result)}"
    )


def hh_data(result: dict) -> str:
    """The pairs of hh-rlhf that the reward model learns from and is measured on, and those left out, by kind."""
    kinds = {"malformed": "malformed", "identical": "identical", "diverging": "diverging before the last turn"}
    kinds["over-long"] = "over 512 tokens"
    lines = ["| " + " | ".join(["file", "pairs", "used", *kinds.values()]) + " |", "|" + " --- |" * (3 + len(kinds))]
    for name, row in result["data"].items():
        left_out = [row["left_out"].get(kind, 0) for kind in kinds]
        cells = [name, *map(str, [row["used"] + sum(row["left_out"].values()), row["used"], *left_out])]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def hh_stages(result: dict) -> str:
    """bench/hh_stages.py: the four stages of examples/hh_rlhf.yaml on human data, a line a figure."""

    def each(rows: list[dict], name: str, form: str) -> str:
        return ", ".join(format(row[name], form) for row in rows)

    def steps(rows: list[dict]) -> str:
        return ", ".join(str(row["step"]) for row in rows)

    sft, reward, ppo, cai = (result[stage] for stage in ("sft", "reward", "ppo", "cai"))
    before, after = sft["evaluations"][0], sft["evaluations"][-1]
    lengths, looks = reward["by_length_difference"], ppo["evaluations"]
    shortest, longest = lengths[0], lengths[-1]
    checked = [stage for stage in cai["stages"] if "pass_rate" in stage]
    refused = {name: n for name, n in cai["revise"].items() if name in ("hard_violation", "flagged", "failed") and n}
    label = {name: n for name, n in cai["label"].items() if n and name != "inputs"}
    count = ", ".join(f"{n} {name.replace('_', ' ')}" for name, n in refused.items())
    rows = [
        ("sft", f"held-out loss after {steps(sft['evaluations'])} steps, nats per reply token",
         each(sft["evaluations"], "eval_loss", ".2f")),
        ("sft", "held-out token accuracy before, after",
         each([before, after], "eval_mean_token_accuracy", ".1%")),
        ("reward", f"held-out accuracy, {reward['steps']} steps", f"{reward['accuracy']:.3f}"),
        ("reward", f"its 95 % interval, {reward['pairs']} pairs", f"{reward['low']:.3f} to {reward['high']:.3f}"),
        *(("reward", f"floor on the same pairs: {name}", f"{v:.3f}") for name, v in reward["floors"].items()),
        ("reward", f"held-out loss after {steps(reward['evaluations'])} steps",
         each(reward["evaluations"], "eval_loss", ".3f")),
        ("reward", "training loss, the last tenth of the steps", f"{reward['loss_at_the_end']:.2f}"),
        ("reward", "expected calibration error before, at the end",
         each([reward["evaluations"][0], reward["evaluations"][-1]], "eval_ece", ".3f")),
        ("reward", "correlation of the reward with the length of the reply",
         f"{reward['length_correlation']['reward_with_length']:+.2f}"),
        ("reward", f"accuracy where the better reply is at least {-shortest['to']} tokens shorter, and "
         f"at least {longest['from']} longer", f"{shortest['accuracy']:.2f}, {longest['accuracy']:.2f}"),
        ("ppo", f"held-out score after {steps(looks)} iterations", each(looks, "eval_scores", ".2f")),
        ("ppo", "KL to the reference, nats a reply", each(looks, "eval_kl", ".2f")),
        ("ppo", "never trained on: replies that end in a finished sentence", each(looks, "eval_finished", ".1%")),
        ("ppo", "never trained on: of all sequences of three words, how many are different",
         each(looks, "eval_no_repetition", ".1%")),
        ("ppo", "tokens a reply, on average", each(looks, "eval_response_length/mean", ".0f")),
        ("cai", f"phase 1, {cai['revise']['inputs']} prompts: clean, revised, unchanged; left out",
         ", ".join(str(cai["revise"][name]) for name in ("clean", "revised", "unchanged")) + f"; {count or 0}"),
        ("cai", f"phase 2, {cai['label']['inputs']} pairs, by what the judge says",
         ", ".join(f"{n} {'told apart' if name == 'ok' else name}" for name, n in label.items())),
        ("cai", f"its reward model's accuracy on {cai['reward']['pairs']} held-out pairs, and its 95 % interval",
         f"{cai['reward']['accuracy']:.2f}, {cai['reward']['low']:.2f} to {cai['reward']['high']:.2f}"),
        ("cai", "held-out answers that keep every principle: before, after phase 1, after phase 2",
         each(checked, "pass_rate", ".1%")),
        ("cai", "KL to the reference after phase 2, nats a reply",
         f"{cai['ppo']['evaluations'][-1]['eval_kl']:.2f}"),
    ]  # fmt: skip
    lines = ["| stage | what | value |", "| --- | --- | --- |"]
    for stage in ("sft", "reward", "ppo", "cai"):
        seconds = f"{result[stage]['cpu_seconds']:.0f} s"
        lines += [f"| {' | '.join(row)} |" for row in [*rows, (stage, "CPU time", seconds)] if row[0] == stage]
    return "\n".join(lines) + f"\n\nSeed 0. {source(result).lstrip()}"
