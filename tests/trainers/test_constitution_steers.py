"""Both phases on a task of a few words whose truth is known: does the constitution steer, or only the pipeline?

bench/cai_experiments.py asks the same of the quickstart's task, on three seeds. Here one tiny SFT model that obeys
requests to revise serves three constitutions: house, the same turned round, and house with one principle more.
"""

import random
from dataclasses import replace

import pytest

from rlhf_fast.generation import generate_text
from rlhf_fast.judges import Constitution, Principle, RuleCheck, RuleJudge
from rlhf_fast.models import load_policy, load_tokenizer
from rlhf_fast.quickstart.model import tiny_llama, train_tokenizer
from rlhf_fast.trainers.constitutional import TextGenerator, label, revise, sample_pairs
from rlhf_fast.trainers.ppo import PPOConfig, PPOTrainer
from rlhf_fast.trainers.reward import RewardConfig, RewardTrainer
from rlhf_fast.trainers.sft import SFTConfig, SFTTrainer

WORDS = ["red", "blue", "green", "white", "black", "pink"]
PROMPTS = [f"name colours {i} {j}" for i in range(20) for j in range(10)]
RULES = {
    "short": lambda words, end: len(words) <= 3,
    "no-red": lambda words, end: "red" not in words,
    "loud": lambda words, end: end == "!",
    "blue-first": lambda words, end: words[:1] == ["blue"],
}


def parts(reply):
    reply = reply.strip()
    return reply.rstrip(".!").split(), reply[-1:]


def rule(name, wanted=True):
    return lambda conversation, reply: RULES[name](*parts(reply)) == wanted


def principle(name, wanted=True):
    text = f"be {name}" if wanted else f"avoid {name}"
    return Principle(text.replace(" ", "-"), check=RuleCheck(text, {}, rule(name, wanted)), revise=text)


HOUSE = Constitution("house", tuple(principle(name) for name in ("short", "no-red", "loud")))
NEGATED = Constitution("negated", tuple(principle(name, wanted=False) for name in ("short", "no-red", "loud")))
PLUS_ONE = replace(HOUSE, principles=(*HOUSE.principles, principle("blue-first")))


def draw(rng, keep=None, wanted=True):
    """A random reply, or one of which `keep` holds (or does not)."""
    while True:
        words, end = rng.choices(WORDS, k=rng.randint(1, 6)), rng.choice(".!")
        if keep is None or RULES[keep](words, end) == wanted:
            return words, end


def written(words, end):
    return " ".join(words) + end


def revised(rng, words, end, name, wanted):
    """The reply with as little changed as the request needs."""
    words = list(words)
    if name == "loud":
        end = "!" if wanted else "."
    elif name == "short":
        words = words[:3] if wanted else (words * 4)[: max(4, len(words))]
    elif name == "no-red":
        others = [w if w != "red" else rng.choice(WORDS[1:]) for w in words]
        words = others if wanted else ["red", *words[1:]] if "red" not in words else words
    else:
        words = ["blue", *words[1:]]
    return words, end


def demonstrations(seed):
    rng = random.Random(seed)
    rows = [
        {"prompt": [user(rng.choice(PROMPTS))], "completion": [assistant(written(*draw(rng)))]} for _ in range(2500)
    ]
    for _ in range(3500):
        name, wanted = rng.choice(list(RULES)), rng.random() < 0.5
        if name == "blue-first" and not wanted:
            continue
        before = draw(rng)
        prompt = [user(rng.choice(PROMPTS)), assistant(written(*before)), user(f"{'be' if wanted else 'avoid'} {name}")]
        rows.append({"prompt": prompt, "completion": [assistant(written(*revised(rng, *before, name, wanted)))]})
    return rows


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


QUIET = {"logging_steps": 1000, "num_samples": 0}


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """The SFT model: random replies, and revisions that do what the request says."""
    root = tmp_path_factory.mktemp("steers")
    rows = demonstrations(0)
    tokenizer = train_tokenizer([m["content"] for row in rows for m in row["prompt"] + row["completion"]], 400, 64)
    model = tiny_llama(tokenizer, 0, hidden=64, layers=2)
    config = SFTConfig(output_dir=str(root / "sft"), learning_rate=4e-3, per_device_train_batch_size=32,
                       num_train_epochs=2, max_length=64, **QUIET)  # fmt: skip
    SFTTrainer(config, model, tokenizer=tokenizer, train_dataset=rows).train()
    return root


def measure(path):
    """How many of 400 sampled replies keep each rule, as shares."""
    prompts = [[user(p)] for p in PROMPTS] * 2
    replies = generate_text(load_policy(path), load_tokenizer(path), prompts, max_new_tokens=12, batch_size=400, seed=1)
    return {name: sum(keep(*parts(reply)) for reply in replies) / len(replies) for name, keep in RULES.items()}


def violations(kept):
    return sum(1 - kept[name] for name in ("short", "no-red", "loud"))


def both_phases(start, name, constitution):
    """What is kept after phase 1 and after phase 2."""
    root, judge, sft = start / name, RuleJudge(scale=2.0), str(start / "sft")
    options = {"max_length": 64, **QUIET}

    def generator(path):
        return TextGenerator(load_policy(path), load_tokenizer(path), 12, batch_size=400)

    stage = revise(PROMPTS, generator(sft), constitution, judge, output_dir=root / "revise", batch_size=200)
    config = SFTConfig(output_dir=str(root / "sft"), learning_rate=2e-3, per_device_train_batch_size=32,
                       num_train_epochs=2, **options)  # fmt: skip
    SFTTrainer(config, sft, train_dataset=stage.rows).train()
    phase1 = str(root / "sft")
    pairs = sample_pairs(PROMPTS * 3, generator(phase1), constitution, output_dir=root / "pairs", batch_size=600)
    labelled = label(pairs.rows, constitution, judge, output_dir=root / "label", batch_size=600)
    config = RewardConfig(output_dir=str(root / "rm"), learning_rate=2e-3, per_device_train_batch_size=32,
                          num_train_epochs=3, **options)  # fmt: skip
    RewardTrainer(config, phase1, train_dataset=labelled.rows).train()
    config = PPOConfig(output_dir=str(root / "ppo"), total_episodes=10 * 128, batch_size=128, minibatch_size=64,
                       response_length=12, learning_rate=1e-3, kl_coef=0.05, num_ppo_epochs=2, temperature=1.0,
                       share_trunk=True, missing_eos_penalty=1.0, **QUIET)  # fmt: skip
    PPOTrainer(config, phase1, reward=str(root / "rm"), train_dataset=[{"prompt": [user(p)]} for p in PROMPTS]).train()
    return measure(phase1), measure(str(root / "ppo"))


@pytest.fixture(scope="module")
def house(start):
    return both_phases(start, "house", HOUSE)


def test_violations_fall_in_each_phase(start, house):
    before, (one, two) = measure(str(start / "sft")), house
    assert violations(one) < violations(before) - 0.4  # of about 1.6 a reply; the standard error is 0.05
    assert violations(two) < violations(one) - 0.1


def test_the_negated_constitution_moves_the_other_way(start):
    before, (one, two) = measure(str(start / "sft")), both_phases(start, "negated", NEGATED)
    assert violations(one) > violations(before) + 0.4
    assert violations(two) > violations(one) + 0.1


def test_one_principle_more_changes_what_it_names_and_not_the_others(start, house):
    _, plain = house
    _, more = both_phases(start, "plus-one", PLUS_ONE)
    assert more["blue-first"] > plain["blue-first"] + 0.3
    for name in ("short", "no-red", "loud"):
        assert abs(more[name] - plain[name]) < 0.12, name


# --- labels ---


def comparisons(seed, count):
    """Pairs of random replies under HOUSE; better by the rules, never a tie."""
    rng = random.Random(seed)
    pairs = [
        {"prompt": [user(rng.choice(PROMPTS))], "a": written(*draw(rng)), "b": written(*draw(rng))}
        for _ in range(count)
    ]
    rows = []
    for pair in pairs:
        kept = {k: sum(RULES[name](*parts(pair[k])) for name in ("short", "no-red", "loud")) for k in "ab"}
        if kept["a"] != kept["b"]:
            better, worse = ("a", "b") if kept["a"] > kept["b"] else ("b", "a")
            rows.append(
                {"prompt": pair["prompt"], "chosen": [assistant(pair[better])], "rejected": [assistant(pair[worse])]}
            )
    return rows


def reward_model(start, name, rows, seed=0):
    config = RewardConfig(output_dir=str(start / name), seed=seed, learning_rate=2e-3, per_device_train_batch_size=32,
                          num_train_epochs=2, max_length=64, per_device_eval_batch_size=256, **QUIET)  # fmt: skip
    held_out = comparisons(99, 700)
    return (
        RewardTrainer(config, str(start / "sft"), train_dataset=rows, eval_dataset=held_out)
        .train()
        .metrics["eval_accuracy"]
    )


def turned(row, turn, prob=1.0):
    chosen, rejected = ("rejected", "chosen") if turn else ("chosen", "rejected")
    return {"prompt": row["prompt"], "chosen": row[chosen], "rejected": row[rejected], "chosen_prob": prob}


def test_shuffled_labels_teach_nothing(start):
    """Labels by coin, and the same labels turned round: what a reward model happens to prefer cancels in the mean."""
    rows, rng = comparisons(0, 1200), random.Random(0)
    coin = [rng.random() < 0.5 for _ in rows]
    shuffled = []
    for seed in range(4):
        data = [turned(row, c ^ bool(seed % 2)) for row, c in zip(rows, coin, strict=True)]
        shuffled.append(reward_model(start, f"rm-coin-{seed}", data, seed))
    assert reward_model(start, "rm-true", rows) > 0.9
    assert abs(sum(shuffled) / 4 - 0.5) < 0.15  # one model is 0.1 off either way


def test_soft_labels_beat_hard_ones_under_a_noisy_judge(start):
    """A judge that errs on a third of the pairs, and knows how often it does on each."""
    rows, rng = comparisons(1, 1000), random.Random(1)
    sure = [rng.choice([0.52, 0.6, 0.95]) for _ in rows]
    errs = [rng.random() > s for s in sure]
    assert 0.25 < sum(errs) / len(errs) < 0.4
    soft = [turned(row, e, s) for row, e, s in zip(rows, errs, sure, strict=True)]
    hard = [{**row, "chosen_prob": 1.0} for row in soft]
    accuracy = {
        name: sum(reward_model(start, f"rm-{name}-{seed}", data, seed) for seed in range(3)) / 3
        for name, data in (("soft", soft), ("hard", hard))
    }
    assert accuracy["soft"] > accuracy["hard"] + 0.01
