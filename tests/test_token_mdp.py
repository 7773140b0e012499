"""The theory of the policy gradient, held to on a token MDP small enough to enumerate: 4 tokens, at most 3 of them.

State: the tokens so far. Action: the next token. Token 3 is eos and ends the answer, as the third token does: 13 states
in which one is chosen, 40 answers. The policy is a table of logits, so every expectation is a finite sum, and the exact
values, gradients and optimal policies are at hand for our functions to be compared with.
"""

import itertools

import pytest
import torch
from helpers import word_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf_fast import gae, kl_penalty, ppo_loss
from rlhf_fast.advantages import kl_shaped_rewards, sequence_advantages
from rlhf_fast.trainers.ppo import PPOConfig, PPOTrainer

V, T, EOS = 4, 3, 3
PREFIXES = [(), *((a,) for a in range(3)), *itertools.product(range(3), repeat=2)]  # the states
ANSWERS = [*((*p, EOS) for p in PREFIXES), *itertools.product(range(3), repeat=3)]
IDS = torch.tensor([[*answer, 0, 0][:T] for answer in ANSWERS])  # (40, T)
MASK = torch.tensor([[t < len(answer) for t in range(T)] for answer in ANSWERS])
STATE = torch.tensor([[PREFIXES.index(answer[:t]) if t < len(answer) else 0 for t in range(T)] for answer in ANSWERS])


def randn(*shape, seed):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


SCORES = randn(len(ANSWERS), seed=0) * 2 + 5  # far from 0, so that a baseline has something to take away
LOGITS, REF_LOGITS = randn(len(PREFIXES), V, seed=1) * 0.5, randn(len(PREFIXES), V, seed=2) * 0.5


def logprobs_of(logits):
    """(13, 4) -> (40, T) log pi(a_t | s_t), 0 after the end."""
    return logits.log_softmax(-1)[STATE, IDS] * MASK


def probabilities(logits):
    return logprobs_of(logits).sum(1).exp()


def rewards_of(logits, kl_coef=0.3):
    """Ours: (40, T), the score on the last token less the KL on each."""
    with torch.no_grad():
        kl = kl_penalty(logprobs_of(logits), logprobs_of(REF_LOGITS))
        return kl_shaped_rewards(SCORES, MASK, kl, kl_coef=kl_coef)


def given_state(x, p):
    """(40, T) of what happens at t, and the probability of each answer -> (13,) expectation in each state."""
    weight = (p[:, None] * MASK).flatten()
    states = STATE.flatten()
    total = torch.zeros(len(PREFIXES), dtype=x.dtype).index_add(0, states, weight * x.flatten())
    return total / torch.zeros(len(PREFIXES), dtype=x.dtype).index_add(0, states, weight)


def bellman(values, logits, gamma, kl_coef=0.3):
    """(T V)(s) = sum_a pi(a | s) (r(s, a) + gamma V(s a)), from the definition and by none of our functions."""
    out = torch.zeros(len(PREFIXES), dtype=torch.float64)
    for s, prefix in enumerate(PREFIXES):
        logp, ref = logits[s].log_softmax(-1), REF_LOGITS[s].log_softmax(-1)
        for a in range(V):
            after = (*prefix, a)
            reward = -kl_coef * (logp[a] - ref[a])
            more = SCORES[ANSWERS.index(after)] if after in ANSWERS else gamma * values[PREFIXES.index(after)]
            out[s] += logp[a].exp() * (reward + more)
    return out


def exact_values(logits, gamma=1.0, kl_coef=0.3):
    values = torch.zeros(len(PREFIXES), dtype=torch.float64)
    for _ in range(T):
        values = bellman(values, logits, gamma, kl_coef)
    return values


# --- the KL in the rewards ---


def own_kl_gradient(estimator, logits):
    """(13, 4) what -kl_coef KL_t in the rewards does to the logits through its own token, in expectation."""
    logits = logits.clone().requires_grad_()
    logp, ref = logprobs_of(logits), logprobs_of(REF_LOGITS)
    scores = torch.zeros(len(ANSWERS), dtype=torch.float64)
    rewards = kl_shaped_rewards(scores, MASK, kl_penalty(logp.detach(), ref, estimator=estimator), kl_coef=1.0)
    advantages, _ = gae(rewards, torch.zeros_like(rewards), MASK, gamma=0.0, lam=0.0)
    weight = logp.detach().sum(1).exp()
    return torch.autograd.grad((weight[:, None] * advantages * logp).sum(), logits)[0]


def test_in_the_rewards_only_k1_has_the_gradient_of_the_kl():
    """Of k3 there is left grad KL(pi, ref) - grad KL(ref, pi), which near the reference is nothing (docs/ppo.md)."""
    visits = torch.zeros(len(PREFIXES), dtype=torch.float64)
    near = REF_LOGITS + 0.01 * LOGITS
    for logits in (LOGITS, near):
        variable = logits.clone().requires_grad_()
        logp, ref = variable.log_softmax(-1), REF_LOGITS.log_softmax(-1)
        visits = visits.zero_().index_add(0, STATE.flatten(), (probabilities(logits)[:, None] * MASK).flatten())
        forward = (visits * (logp.exp() * (logp - ref)).sum(1)).sum()
        backward = (visits * (ref.exp() * (ref - logp)).sum(1)).sum()
        of_kl = torch.autograd.grad(forward, variable, retain_graph=True)[0]
        of_reverse = torch.autograd.grad(backward, variable)[0]
        torch.testing.assert_close(own_kl_gradient("k1", logits), -of_kl)
        torch.testing.assert_close(own_kl_gradient("k3", logits), of_reverse - of_kl)
    assert own_kl_gradient("k3", near).norm() < 0.02 * own_kl_gradient("k1", near).norm()
    assert own_kl_gradient("k2", near).norm() < 0.02 * own_kl_gradient("k1", near).norm()


# --- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize("lam", [0.0, 0.6, 1.0])
def test_bellman_expectation(lam, gamma):
    """Under the true values, the mean return is the value, and the mean advantage of an action Q - V, at any lam."""
    values, p = exact_values(LOGITS, gamma), probabilities(LOGITS)
    torch.testing.assert_close(bellman(values, LOGITS, gamma), values)
    advantages, returns = gae(rewards_of(LOGITS), values[STATE], MASK, gamma=gamma, lam=lam)
    torch.testing.assert_close(given_state(returns, p), values)
    torch.testing.assert_close(given_state(advantages, p), torch.zeros(13).double(), atol=1e-9, rtol=0)
    one_step, _ = gae(
        rewards_of(LOGITS), values[STATE], MASK, gamma=gamma, lam=0.0
    )  # r + gamma V' - V = Q - V, exactly
    for s, a in itertools.product(range(13), range(V)):
        here = (s == STATE) & (a == IDS) & MASK
        q_minus_v = one_step[here]
        assert q_minus_v.std(correction=0) < 1e-9
        mean = (p[:, None] * advantages)[here].sum() / (p[:, None] * here).sum()
        torch.testing.assert_close(mean, q_minus_v[0])


def test_lam_weighs_bellman_backups():
    """Under wrong values W the mean return is (1 - lam) sum_n lam^(n-1) T^n W: one backup at 0, the truth at 1."""
    gamma, wrong = 0.9, randn(13, seed=3) * 3
    truth, p = exact_values(LOGITS, gamma), probabilities(LOGITS)
    once = bellman(wrong, LOGITS, gamma)
    twice = bellman(once, LOGITS, gamma)
    for lam in (0.0, 0.35, 0.8, 1.0):
        _, returns = gae(rewards_of(LOGITS), wrong[STATE], MASK, gamma=gamma, lam=lam)
        expected = (1 - lam) * (once + lam * twice) + lam**2 * truth  # T^3 and on is the truth: answers end
        torch.testing.assert_close(given_state(returns, p), expected)
    values = wrong
    for sweep in range(T):
        assert not torch.allclose(values, truth), f"already there after {sweep} sweeps"
        values = given_state(gae(rewards_of(LOGITS), values[STATE], MASK, gamma=gamma, lam=0.0)[1], p)
    torch.testing.assert_close(values, truth)


def test_bellman_optimality_by_policy_iteration():
    """Greedy on our advantages, again and again: ends where no action has a positive advantage, which is the best."""
    best = torch.stack([SCORES[[x[: len(s)] == s for x in ANSWERS]].max() for s in PREFIXES])  # by brute force
    policy = torch.zeros(13, dtype=torch.long)
    start = policy
    for _ in range(T + 1):
        values = exact_values(torch.nn.functional.one_hot(policy, V).double().mul(1e4), kl_coef=0.0)
        advantages, _ = gae(rewards_of(LOGITS, kl_coef=0.0), values[STATE], MASK, gamma=1.0, lam=0.0)
        q = torch.full((13, V), -torch.inf, dtype=torch.float64).index_put((STATE[MASK], IDS[MASK]), advantages[MASK])
        torch.testing.assert_close(q.gather(1, policy[:, None]), torch.zeros(13, 1).double(), atol=1e-9, rtol=0)
        if bool((q <= 1e-9).all()):
            break
        policy = q.argmax(1)
    assert not torch.equal(policy, start)
    torch.testing.assert_close(values, best)  # V* = max_a Q*
    assert bool((exact_values(LOGITS, kl_coef=0.0) <= best + 1e-9).all())


# --- gradients -------------------------------------------------------------------------------------------------------

BATCH, GROUP, DRAWS = 16, 4, 400


def exact_gradient(logits, kl_coef=0.3):
    """grad of J = E[score] - kl_coef KL(pi || pi_ref)."""
    logits = logits.clone().requires_grad_()
    log_p = logprobs_of(logits).sum(1)
    objective = (log_p.exp() * (SCORES - kl_coef * (log_p - logprobs_of(REF_LOGITS).sum(1)))).sum()
    return torch.autograd.grad(objective, logits)[0]


def no_baseline(rewards, mask, states):
    return rewards.sum(1, keepdim=True) * mask


def of(name):
    return lambda rewards, mask, states: sequence_advantages(rewards, mask, name, GROUP)


def gae_of(values, lam):
    return lambda rewards, mask, states: gae(rewards, values[states], mask, gamma=1.0, lam=lam)[0]


TRUE_VALUES, WRONG_VALUES = exact_values(LOGITS), exact_values(LOGITS) + randn(13, seed=4)
ESTIMATORS = {  # name: (advantages, what its mean is in units of the gradient)
    "no baseline": (no_baseline, 1.0),
    "reinforce": (of("reinforce"), 1 - 1 / BATCH),  # a mean that holds the answer itself takes its share
    "group": (of("group"), 1 - 1 / GROUP),
    "rloo": (of("rloo"), 1.0),
    "gae, true values": (gae_of(TRUE_VALUES, 0.5), 1.0),
    "gae, wrong values, lam 1": (gae_of(WRONG_VALUES, 1.0), 1.0),
    "gae, wrong values, lam 0": (gae_of(WRONG_VALUES, 0.0), None),
}


@pytest.fixture(scope="module")
def sampled_gradients():
    """{estimator: (DRAWS, 52)}: its gradient on each of the same batches, through our loss at a ratio of 1."""
    generator = torch.Generator().manual_seed(5)
    batches = probabilities(LOGITS).multinomial(DRAWS * BATCH, replacement=True, generator=generator).view(DRAWS, BATCH)
    gradients, all_rewards = {name: [] for name in ESTIMATORS}, rewards_of(LOGITS)
    for rows in batches:
        logits = LOGITS.clone().requires_grad_()
        logprobs, mask = logprobs_of(logits)[rows], MASK[rows]
        for name, (advantages, _) in ESTIMATORS.items():
            weights = advantages(all_rewards[rows], mask, STATE[rows])
            loss, _ = ppo_loss(logprobs, logprobs.detach(), weights, mask, loss_agg_mode="seq-mean-token-sum")
            (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
            gradients[name].append(-gradient.flatten())
    return {name: torch.stack(rows) for name, rows in gradients.items()}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimators_are_unbiased(sampled_gradients, name):
    """52 components, each within 4.5 standard errors: right code fails once in 3000 seeds (and the seed is fixed)."""
    sample, share = sampled_gradients[name], ESTIMATORS[name][1]
    expected = exact_gradient(LOGITS).flatten() * (1.0 if share is None else share)
    z = (sample.mean(0) - expected) / (sample.std(0) / DRAWS**0.5).clamp(min=1e-12)
    if share is None:  # one Bellman backup from wrong values is not the truth, and the test can tell
        assert z.abs().max() > 10
    else:
        assert z.abs().max() < 4.5


@pytest.mark.parametrize("name", ["reinforce", "rloo", "group", "gae, true values"])
def test_every_baseline_lowers_the_variance(sampled_gradients, name):
    """Summed over the components; without a baseline a mean score of 5 multiplies noise. Its own spread is some 5 %."""
    variance = {key: sample.var(0).sum() for key, sample in sampled_gradients.items()}
    assert variance[name] < 0.5 * variance["no baseline"]


def test_what_a_kl_in_the_loss_pulls_toward():
    """Exact, over all answers. In the loss k1 pulls nowhere; k2 lowers KL(pi || ref) of each state that is visited, k3
    KL(ref || pi). None of them sees that a token leads to states of more KL: that takes KL in the rewards."""
    p, gradients = probabilities(LOGITS), {}
    visits = torch.zeros(13, dtype=torch.float64).index_add(0, STATE[MASK], (p[:, None] * MASK)[MASK])
    for estimator in ("k1", "k2", "k3"):
        logits, total = LOGITS.clone().requires_grad_(), 0.0
        for row in range(len(ANSWERS)):  # each answer by itself, weighted with its probability
            one = slice(row, row + 1)
            logprobs = logprobs_of(logits)[one]
            loss, _ = ppo_loss(
                logprobs, logprobs.detach(), torch.zeros(1, T).double(), MASK[one],
                ref_logprobs=logprobs_of(REF_LOGITS)[one], kl_coef=1.0, kl_estimator=estimator,
                loss_agg_mode="seq-mean-token-sum",
            )  # fmt: skip
            total = total + p[row] * loss
        (gradients[estimator],) = torch.autograd.grad(total, logits)
    logits = LOGITS.clone().requires_grad_()
    pi, ref = logits.log_softmax(-1), REF_LOGITS.log_softmax(-1)
    (forward,) = torch.autograd.grad((visits * (pi.exp() * (pi - ref)).sum(-1)).sum(), logits, retain_graph=True)
    (backward,) = torch.autograd.grad((visits * (ref.exp() * (ref - pi)).sum(-1)).sum(), logits)
    torch.testing.assert_close(gradients["k1"], torch.zeros_like(LOGITS), atol=1e-9, rtol=0)
    torch.testing.assert_close(gradients["k2"], forward)
    torch.testing.assert_close(gradients["k3"], backward)


# --- why the clip is there -------------------------------------------------------------------------------------------


def closed_form(beta):
    """(40,) pi_ref exp(score / beta) / Z, which E[score] - beta KL(pi || pi_ref) is greatest for."""
    return (logprobs_of(REF_LOGITS).sum(1) + SCORES / beta).softmax(0)


def logits_of(p):
    """(40,) probabilities of answers -> the table of logits that has them."""
    weight = (p[:, None] * MASK)[MASK]
    return torch.zeros(13, V, dtype=torch.float64).index_put((STATE[MASK], IDS[MASK]), weight, accumulate=True).log()


def optimized(cliprange, start, policies=100, steps=60):
    """As many policies, each optimised for long on its own batch of 16 noisy scores, all from `start`.

    -> (policies,) each: gain in J, KL(old || new), largest ratio.
    """
    generator = torch.Generator().manual_seed(6)
    rows = probabilities(start).multinomial(policies * 16, replacement=True, generator=generator)
    noisy = SCORES[rows] + 4 * torch.randn(len(rows), dtype=torch.float64, generator=generator)
    noisy = noisy.view(policies, 16)
    advantages = ((noisy - noisy.mean(1, keepdim=True)) / noisy.std(1, keepdim=True)).view(-1, 1) * MASK[rows]
    logits = start.repeat(policies, 1, 1).requires_grad_()
    owner = torch.arange(policies).repeat_interleave(16)[:, None]
    optimizer = torch.optim.Adam([logits], lr=0.1)  # by element, so the policies do not feel each other
    old = logprobs_of(start)[rows]
    for _ in range(steps):
        logprobs = logits.log_softmax(-1)[owner, STATE[rows], IDS[rows]] * MASK[rows]
        loss, _ = ppo_loss(logprobs, old, advantages, MASK[rows], cliprange=cliprange)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    p = probabilities(start)
    new = torch.stack([probabilities(one) for one in logits.detach()])
    ratio = (logprobs.detach() - old).exp().view(policies, -1).amax(1)
    return (new - p) @ SCORES, (p * (p / new).log()).sum(1), ratio


def test_without_the_clip_one_batch_is_believed_too_much():
    """A good policy, and sixty steps on 16 noisy scores, two hundred times. The clip takes the gradient away where a
    ratio leaves 0.8 to 1.2: the policy stays near the one that was sampled, gains a little each time and never loses
    much. Without it the policy runs to the luckiest answers. In a few small steps the two are alike. (From a policy
    that has learned nothing the unclipped steps gain more on average, at fifteen times the KL: the clip protects what
    is there, it does not always gain more.)"""
    start = logits_of(closed_form(beta=1.0))
    torch.testing.assert_close(probabilities(start), closed_form(beta=1.0))
    (gain, kl, ratio), (free_gain, free_kl, free_ratio) = (optimized(clip, start, 200) for clip in (0.2, 1e9))
    assert kl.mean() < 0.5 and free_kl.mean() > 10 * kl.mean()
    assert ratio.mean() < 3 and free_ratio.mean() > 10
    difference = gain - free_gain
    assert gain.mean() > 4 * gain.std() / 200**0.5 and difference.mean() > 3 * difference.std() / 200**0.5
    # The worst twentieth of them; J is 7.4 at the start, and 4.7 for an answer at random.
    assert gain.quantile(0.05) > -1 and free_gain.quantile(0.05) < -2
    (_, kl, _), (_, free_kl, _) = (optimized(clip, start, 200, steps=3) for clip in (0.2, 1e9))
    assert kl.mean() < free_kl.mean() < 2 * kl.mean()


# --- where the whole of it ends --------------------------------------------------------------------------------------

WORDS = ["a", "b", "c"]


def reward_by_table(prompts, responses, **columns):
    """The score of an answer by its words; one that is cut has three, and so has none with eos."""
    table = {" ".join(WORDS[a] for a in answer if a != EOS): float(SCORES[i]) for i, answer in enumerate(ANSWERS)}
    return [table[response.strip()] for response in responses]  # behind "a" a space begins them


@torch.no_grad()
def answer_logprobs(model):
    """(40,) log-probability of each answer to the prompt "a", from transformers' own logits."""
    ids = torch.cat([torch.zeros(len(ANSWERS), 1, dtype=torch.long), IDS], 1)
    logp = model(input_ids=ids).logits[:, :-1].double().log_softmax(-1)
    return (logp.gather(-1, IDS[..., None])[..., 0] * MASK).sum(1)


@pytest.mark.parametrize(
    "options",
    [
        {"advantage_estimator": "gae", "share_trunk": True, "cliprange_value": None, "learning_rate": 5e-3},
        {"advantage_estimator": "rloo", "num_generations": 256, "num_ppo_epochs": 4, "learning_rate": 3e-3},
    ],
    ids=lambda options: options["advantage_estimator"],
)
def test_ppo_under_a_kl_ends_at_the_closed_form(tmp_path, options):
    """pi_ref exp(score / beta) / Z is where E[score] - beta KL is greatest: from 0.50 nats away to within 0.04."""
    tokenizer, beta = word_tokenizer(WORDS), 2.0
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=V, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=8, initializer_range=0.3, eos_token_id=EOS, pad_token_id=EOS, bos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    start = answer_logprobs(model)
    defaults = {
        "output_dir": str(tmp_path), "kl_coef": beta, "temperature": 1.0, "response_length": T, "batch_size": 256,
        "minibatch_size": 256, "generation_batch_size": 256, "num_ppo_epochs": 2, "total_episodes": 256 * 50,
    }  # fmt: skip
    trainer = PPOTrainer(
        PPOConfig(**(defaults | options)), model, tokenizer=tokenizer, reward=reward_by_table,
        train_dataset=[{"prompt": "a"}],
    )  # fmt: skip

    def distance(logp, beta):
        """KL from the policy to the closed form for this beta."""
        return float((logp.exp() * (logp - (start + SCORES / beta).log_softmax(0))).sum())

    assert distance(start, beta) == pytest.approx(0.50, abs=0.01)
    for _ in trainer:
        pass
    end = answer_logprobs(trainer.policy)
    assert distance(end, beta) < 0.04
    assert min(distance(end, beta / 2), distance(end, 2 * beta)) > 0.06  # and not to that of another coefficient
