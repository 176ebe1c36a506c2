"""PPO: advantages against their definition, gradients against the full batch, clipping, guards, and that it learns."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import ppo
from support.numerics import NumericsError

VOCABULARY, WIDTH, PATCHES = 11, 6, 3


class TinyActorCritic(nn.Module):
    """The contract of ppo_update in thirty lines: 7 tokens, each conditioned on those before it."""

    def __init__(self, seed=0, shared=False):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.words = nn.Embedding(20, WIDTH)
            self.tokens = nn.Embedding(VOCABULARY + 1, WIDTH)  # the last one starts the sequence
            self.policy = nn.GRU(WIDTH, WIDTH, batch_first=True)
            self.logits = nn.Linear(WIDTH, VOCABULARY)
            self.critic_words = self.words if shared else nn.Embedding(20, WIDTH)
            self.critic = nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, 1))

    def features(self, words, input_ids, attention_mask, patch_embeddings):
        mask = attention_mask[..., None].float()
        prompt = (words(input_ids) * mask).sum(1) / mask.sum(1)
        return prompt + patch_embeddings.mean(1)  # (B, WIDTH)

    def evaluate_actions(self, input_ids, attention_mask, action_tokens, patch_embeddings, temperature):
        start = torch.full_like(action_tokens[:, :1], VOCABULARY)
        inputs = self.tokens(torch.cat([start, action_tokens[:, :-1]], 1))
        hidden = self.features(self.words, input_ids, attention_mask, patch_embeddings)
        log_p = (self.logits(self.policy(inputs, hidden[None])[0]) / temperature).log_softmax(-1)  # (B, 7, V)
        entropy = -(log_p.exp() * log_p).sum(-1)
        return log_p.gather(-1, action_tokens[..., None]).squeeze(-1), entropy

    def value(self, input_ids, attention_mask, patch_embeddings):
        return self.critic(
            self.features(self.critic_words, input_ids, attention_mask, patch_embeddings)
        ).squeeze(-1)

    def policy_parameters(self):
        return [p for m in (self.words, self.tokens, self.policy, self.logits) for p in m.parameters()]

    def critic_parameters(self):
        own = [] if self.critic_words is self.words else list(self.critic_words.parameters())
        return own + list(self.critic.parameters())


def store(buffer, t, images, ids, mask, tokens, log_probs, values):
    """o_t and a_t, as train.py stores them."""
    N = buffer.num_envs
    buffer.store_observation(
        t, np.zeros((N, 1, 1, 3), np.uint8), ["text"] * N, ids, mask, **{buffer.image_kind: images}
    )
    buffer.store_decision(t, tokens, log_probs, values)


def make_rollout(model, T=4, N=3, seed=0, rewards=None, temperature=1.5):
    """A rollout: prompts of differing lengths, random tokens, and log-probs and values as `model` gives them."""
    g = torch.Generator().manual_seed(seed)
    buffer = ppo.RolloutBuffer(T, N, (PATCHES, WIDTH), "patch_embeddings", frame_shape=(1, 1, 3))
    for t in range(T):
        lengths = torch.randint(1, 6, (N,), generator=g)
        mask = (torch.arange(int(lengths.max()))[None] < lengths[:, None]).long()
        ids = torch.randint(1, 20, mask.shape, generator=g) * mask
        images = torch.randn(N, PATCHES, WIDTH, generator=g)
        tokens = torch.randint(0, VOCABULARY, (N, 7), generator=g)
        with torch.no_grad():
            log_probs, _ = model.evaluate_actions(ids, mask, tokens, images, temperature)
            values = model.value(ids, mask, images)
        store(buffer, t, images, ids, mask, tokens, log_probs, values)
        done = torch.rand(N, generator=g) < 0.3
        reward = torch.rand(N, generator=g) if rewards is None else rewards(tokens)
        buffer.store_outcome(
            t, reward, done, ~done & (torch.rand(N, generator=g) < 0.3), torch.rand(N, generator=g)
        )
    buffer.compute_advantages(torch.rand(N, generator=g), 0.99, 0.95)
    return buffer


def optimizers(model, kind=torch.optim.SGD, lr=0.1, critic_lr=0.1):
    return kind(model.policy_parameters(), lr=lr), kind(model.critic_parameters(), lr=critic_lr)


def update(model, buffer, train_policy=True, opts=None, seed=0, **settings):
    cfg = ppo.PPOConfig(**settings)
    opts = optimizers(model) if opts is None else opts
    return ppo.ppo_update(model, buffer, *opts, cfg, train_policy, torch.Generator().manual_seed(seed))


# GAE ------------------------------------------------------------------------------------------------------------------


def reference_gae(rewards, values, next_values, terminated, truncated, gamma, lam):
    """The definition of GAE, not its recursion: the lambda-weighted average of n-step advantages, per episode.

    A^(n)_t = r_t + … + gamma^(n-1) r_(t+n-1) + gamma^n V - V(o_t), with weight (1 - lam) lam^(n-1), and all the weight
    that is left over for the longest one that stays inside the episode and the rollout.
    """
    T = len(rewards)
    result = []
    for t in range(T):
        last = next((k for k in range(t, T) if terminated[k] or truncated[k]), T - 1)
        total, longest = 0.0, last - t + 1
        for n in range(1, longest + 1):
            end = t + n - 1
            bootstrap = 0.0 if terminated[end] else next_values[end]
            n_step = sum(gamma**k * rewards[t + k] for k in range(n)) + gamma**n * bootstrap - values[t]
            total += (lam ** (n - 1) if n == longest else (1 - lam) * lam ** (n - 1)) * n_step
        result.append(total)
    return result


@st.composite
def rollouts(draw):
    T, N = draw(st.integers(1, 9)), draw(st.integers(1, 3))
    number = st.floats(-5, 5, width=32)
    grid = lambda cell: [draw(st.lists(cell, min_size=T, max_size=T)) for _ in range(N)]  # noqa: E731
    rewards, values, after = grid(number), grid(number), grid(number)
    terminated, truncated = grid(st.booleans()), grid(st.booleans())
    # Inside an episode the next value is the next row's: then both definitions must agree exactly.
    for n in range(N):
        for t in range(T - 1):
            if not (terminated[n][t] or truncated[n][t]):
                after[n][t] = values[n][t + 1]
    return rewards, values, after, terminated, truncated, draw(st.floats(0, 1)), draw(st.floats(0, 1))


@settings(max_examples=300, deadline=None)
@given(rollouts())
def test_gae_equals_its_definition_for_any_pattern_of_endings(rollout):
    *columns, gamma, lam = rollout
    tensors = [torch.tensor(c).T for c in columns]
    tensors = [t if t.dtype == torch.bool else t.float() for t in tensors]
    advantages, returns = ppo.compute_gae(*tensors, gamma, lam)
    expected = torch.tensor(
        [reference_gae(*(c[n] for c in columns), gamma, lam) for n in range(len(columns[0]))]
    ).T
    assert advantages.shape == tensors[0].shape and advantages.dtype == torch.float32
    torch.testing.assert_close(advantages, expected.float(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(returns, advantages + tensors[1])


def one_env(*rows):
    return [torch.tensor(row)[:, None] for row in rows]


def test_truncation_bootstraps_and_termination_does_not():
    common = ([1.0, 1.0], [0.5, 0.5], [7.0, 3.0])
    a, _ = ppo.compute_gae(*one_env(*common, [True, False], [False, False]), 0.9, 0.8)
    b, _ = ppo.compute_gae(*one_env(*common, [False, False], [True, False]), 0.9, 0.8)
    both, _ = ppo.compute_gae(*one_env(*common, [True, False], [True, False]), 0.9, 0.8)
    assert a[0, 0] == pytest.approx(1 - 0.5)
    assert b[0, 0] == pytest.approx(1 + 0.9 * 7 - 0.5)
    assert both[0, 0] == a[0, 0]
    # The rollout ends, the episode does not: bootstrap.
    assert a[1, 0] == b[1, 0] == pytest.approx(1 + 0.9 * 3 - 0.5)


def test_nothing_leaks_between_episodes_or_out_of_a_terminal_state():
    nan = float("nan")
    rows = one_env(
        [0.0, 0.0, 5.0], [0.1, 0.2, 0.3], [0.2, nan, 0.4], [False, True, False], [False, False, False]
    )
    before, _ = ppo.compute_gae(*rows, 0.99, 0.95)
    rows[0][2] = -100.0  # a reward of the next episode
    after, _ = ppo.compute_gae(*rows, 0.99, 0.95)
    assert torch.isfinite(before).all()
    assert torch.equal(before[:2], after[:2]) and not torch.equal(before[2], after[2])


def test_gae_says_which_argument_has_the_wrong_shape():
    x = torch.zeros(3, 2)
    with pytest.raises(ValueError, match=r"truncated is \(2, 2\)"):
        ppo.compute_gae(x, x, x, x.bool(), x[:2].bool(), 0.9, 0.9)
    with pytest.raises(ValueError, match=r"\(T, N\)"):
        ppo.compute_gae(x[0], x[0], x[0], x[0].bool(), x[0].bool(), 0.9, 0.9)


# Storage --------------------------------------------------------------------------------------------------------------


def test_next_values_follow_the_episode_and_not_the_row():
    buffer = ppo.RolloutBuffer(3, 2, (1, 1), frame_shape=(1, 1, 3))
    zeros = torch.zeros(2, 1, 1)
    ids = torch.ones(2, 1, dtype=torch.long)
    for t in range(3):
        values = torch.tensor([1.0, 10.0]) * (t + 1)
        store(
            buffer, t, zeros, ids, ids, torch.zeros(2, 7, dtype=torch.long), torch.full((2, 7), -0.5), values
        )
        # Environment 0 is cut by the time limit at t = 0, environment 1 succeeds at t = 1; NaN where nobody may look.
        final = torch.tensor([-4.0 if t == 0 else math.nan, math.nan])
        buffer.store_outcome(t, [0.0, 0.0], [False, t == 1], [t == 0, False], final)
    buffer.compute_advantages(torch.tensor([8.0, 9.0]), 0.9, 0.6)
    assert buffer.next_values.tolist() == [[-4.0, 20.0], [3.0, 0.0], [8.0, 9.0]]
    assert buffer.log_probs.tolist() == [[-3.5, -3.5]] * 3  # Eq. 1
    assert buffer.returns[1, 1] == 0.0  # terminated without reward: nothing follows
    tables = buffer.rewards, buffer.values, buffer.next_values, buffer.terminated, buffer.truncated
    for n in range(2):
        expected = reference_gae(*(table[:, n].tolist() for table in tables), 0.9, 0.6)
        assert buffer.advantages[:, n].tolist() == pytest.approx(expected, rel=1e-5)


def test_prompts_of_other_lengths_and_batches_leave_the_result_alone():
    model = TinyActorCritic()
    buffer = make_rollout(model, T=5, N=4)
    for indices in (torch.arange(20), torch.tensor([7]), torch.tensor([3, 19, 3])):
        observation, tokens, old, values, _ = buffer.batch(indices, "cpu")
        assert observation["input_ids"].shape[1] == observation["attention_mask"].sum(1).max()
        log_probs, _ = model.evaluate_actions(action_tokens=tokens, temperature=1.5, **observation)
        torch.testing.assert_close(log_probs.sum(1), old, rtol=0, atol=1e-5)
        torch.testing.assert_close(model.value(**observation), values, rtol=0, atol=1e-6)


def test_a_reused_buffer_keeps_nothing_of_longer_prompts():
    buffer = ppo.RolloutBuffer(1, 1, (1, 1), frame_shape=(1, 1, 3))
    row = (torch.zeros(1, 7, dtype=torch.long), torch.zeros(1, 7), torch.zeros(1))
    for length in (6, 2):
        ids = torch.full((1, length), 5)
        store(buffer, 0, torch.zeros(1, 1, 1), ids, torch.ones_like(ids), *row)
    assert buffer.batch(torch.tensor([0]), "cpu")[0]["input_ids"].tolist() == [[5, 5]]
    assert buffer.input_ids[0].tolist() == [[5, 5, 0, 0, 0, 0]]


# Losses ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("advantage, ratio, loss, has_gradient", [
    (1.0, 1.5, -1.2, False),  # good action, already favoured enough: clipped
    (1.0, 0.5, -0.5, True),  # good action that became less likely: pulled back
    (-1.0, 0.5, 0.8, False),  # bad action, already avoided enough: clipped
    (-1.0, 1.5, 1.5, True),  # bad action that became more likely: pushed down
    (2.0, 1.1, -2.2, True),  # inside the trust region
])  # fmt: skip
def test_clip_acts_only_outside_and_only_on_the_favoured_side(advantage, ratio, loss, has_gradient):
    log_prob = torch.tensor([math.log(ratio) - 3.0], requires_grad=True)
    value, measured = ppo.policy_loss(log_prob, torch.tensor([-3.0]), torch.tensor([advantage]), 0.2)
    value.sum().backward()
    assert value.item() == pytest.approx(loss, rel=1e-5) and measured.item() == pytest.approx(ratio, rel=1e-5)
    assert (log_prob.grad.abs().item() > 0) == has_gradient


def test_the_ratio_is_of_actions_and_not_of_tokens():
    # Two tokens that move in opposite directions cancel: the action is as likely as before, and nothing is clipped.
    new = torch.tensor([[0.7, -0.7, 0.0, 0.0, 0.0, 0.0, 0.0]]) - 1
    _, ratio = ppo.policy_loss(ppo.action_log_prob(new), torch.tensor([-7.0]), torch.ones(1), 0.2)
    assert ratio.item() == pytest.approx(1.0)


def test_value_clipping_by_hand():
    values, old = torch.tensor([1.0, 1.0, 0.05, -1.0], requires_grad=True), torch.zeros(4)
    returns = torch.tensor([2.0, 0.1, 2.0, 2.0])
    loss = ppo.value_loss(values, old, returns, 0.2)
    # row 0: max((1-2)^2, (0.2-2)^2); row 1: max(0.9^2, 0.1^2); row 2 not clipped; row 3: max(9, (-0.2-2)^2)
    torch.testing.assert_close(loss, 0.5 * torch.tensor([3.24, 0.81, 1.95**2, 9.0]))
    loss.sum().backward()
    assert values.grad[0] == 0 and values.grad[1] != 0 and values.grad[2] != 0 and values.grad[3] != 0
    torch.testing.assert_close(ppo.value_loss(values, old, returns, 0.0), 0.5 * (values - returns).square())


def test_advantages_are_normalised():
    x = torch.randn(6, 4) * 3 + 1
    whole, deviation = ppo.normalize_advantages(x)
    assert whole.mean().abs() < 1e-6 and (whole.std(unbiased=False) - 1).abs() < 1e-5
    assert deviation == pytest.approx(float(x.std(unbiased=False)), rel=1e-6)
    assert torch.equal(ppo.normalize_advantages(torch.full((3, 2), 0.7))[0], torch.zeros(3, 2))


def test_noise_moves_no_policy_and_one_success_does():
    """Without any success what is left is the critic's noise; a single success is far more than the floor."""
    rewards, nothing = torch.zeros(32, 16), torch.zeros(32, 16)
    terminated = torch.zeros(32, 16, dtype=torch.bool)
    rewards[30, 3], terminated[30, 3] = 1, True
    one, _ = ppo.compute_gae(rewards, nothing, nothing, terminated, ~terminated & False, 0.99, 0.95)
    assert ppo.normalize_advantages(one)[1] > 0.1 > 10 * 0.9 * ppo.PPOConfig().advantage_floor
    for scale, moves in ((1e-3, False), (1.0, True)):
        model = TinyActorCritic()
        buffer = make_rollout(model)
        buffer.advantages = scale * torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
        policy, critic = (
            [p.clone() for p in x()] for x in (model.policy_parameters, model.critic_parameters)
        )
        metrics = update(model, buffer)
        assert any(not torch.equal(a, b) for a, b in zip(policy, model.policy_parameters())) == moves
        assert any(not torch.equal(a, b) for a, b in zip(critic, model.critic_parameters()))
        assert ("losses/policy_loss" in metrics) == moves and metrics["losses/advantage_std"] > 0


def test_explained_variance():
    returns = torch.tensor([0.0, 1.0, 2.0])
    assert ppo.explained_variance(returns, returns) == 1.0
    assert ppo.explained_variance(torch.ones(3), returns) == pytest.approx(0.0)
    assert ppo.explained_variance(returns, torch.ones(3)) == 0.0


# The update -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [False, True])
def test_any_micro_batch_size_takes_the_same_step(shared):
    def weights_after(micro):
        model = TinyActorCritic(shared=shared).double()
        # Another behaviour policy: ratios differ from 1.
        buffer = make_rollout(TinyActorCritic(seed=1), T=4, N=3)
        settings = dict(minibatch_size=12, micro_batch_size=micro, max_grad_norm=1e9, entropy_coef=0.01)
        buffer.images = buffer.images.double()
        update(model, buffer, opts=optimizers(model, lr=1.0, critic_lr=1.0), **settings)
        return model.state_dict()

    start, full = TinyActorCritic(shared=shared).double().state_dict(), weights_after(12)
    assert any((full[name] - start[name]).abs().max() > 1e-3 for name in full)
    for micro in (1, 2, 5):  # 5 leaves a rest: 5 + 5 + 2
        part = weights_after(micro)
        # Learning rate 1, plain SGD: the difference of weights is the difference of gradients.
        for name in full:
            torch.testing.assert_close(part[name], full[name], rtol=0, atol=1e-6)


def test_the_step_is_that_of_the_loss_written_down():
    model = TinyActorCritic()
    buffer = make_rollout(TinyActorCritic(seed=1))
    reference = copy.deepcopy(model)
    coefficients = dict(entropy_coef=0.3, value_coef=0.5, temperature=1.5)
    metrics = update(model, buffer, minibatch_size=12, micro_batch_size=4, max_grad_norm=1e9, **coefficients)
    observation, tokens, old, old_values, returns = buffer.batch(torch.arange(12), "cpu")
    a = buffer.advantages.flatten()
    a = (a - a.mean()) / a.std(unbiased=False)
    log_probs, entropy = reference.evaluate_actions(action_tokens=tokens, temperature=1.5, **observation)
    ratio = (log_probs.sum(1) - old).exp()
    (-torch.min(ratio * a, ratio.clamp(0.8, 1.2) * a).mean() - 0.3 * entropy.sum(1).mean()).backward()
    v = reference.value(**observation)
    v_clipped = torch.clamp(v, old_values - 0.2, old_values + 0.2)
    (0.5 * 0.5 * torch.max((v - returns) ** 2, (v_clipped - returns) ** 2).mean()).backward()
    for p, q in zip(reference.parameters(), model.parameters()):
        torch.testing.assert_close(p.detach() - 0.1 * p.grad, q.detach(), rtol=0, atol=1e-5)
    log_ratio = log_probs.sum(1) - old
    want = {
        "policy_loss": -torch.min(ratio * a, ratio.clamp(0.8, 1.2) * a).mean(),
        "entropy": entropy.sum(1).mean(),
        "value_loss": 0.5 * torch.max((v - returns) ** 2, (v_clipped - returns) ** 2).mean(),
        "approx_kl": (ratio - 1 - log_ratio).mean(),
        "clipfrac": ((ratio - 1).abs() > 0.2).float().mean(),
        "first_ratio_error": (ratio - 1).abs().max(),
        "advantage_std": buffer.advantages.std(unbiased=False),
    }
    for name, value in want.items():
        assert metrics[f"losses/{name}"] == pytest.approx(value.item(), rel=1e-4), name
    kl = want["approx_kl"].item()
    for target, steps in ((0.99 * kl, 0), (1.01 * kl, 1)):
        m = update(TinyActorCritic(), buffer, minibatch_size=12, micro_batch_size=5, target_kl=target)
        assert m["losses/policy_steps"] == steps and m["losses/kl_stop"] == 1 - steps


def test_one_optimizer_step_per_minibatch_of_equal_parts():
    model = TinyActorCritic()
    steps, sizes, value = [], [], model.value
    model.value = lambda **observation: sizes.append(len(observation["input_ids"])) or value(**observation)
    opts = optimizers(model)
    opts[0].register_step_post_hook(lambda *_: steps.append("policy"))
    opts[1].register_step_post_hook(lambda *_: steps.append("critic"))
    buffer = make_rollout(TinyActorCritic())
    metrics = update(model, buffer, opts=opts, epochs=2, minibatch_size=7, micro_batch_size=4)
    # 12 samples in mini-batches of 7: two of 6.
    assert steps.count("policy") == steps.count("critic") == 2 * 2
    assert metrics["losses/policy_steps"] == 4 and sizes == [4, 2] * 4


@pytest.mark.parametrize("T, N, size", [(32, 16, 128), (7, 3, 5), (4, 6, 1), (1, 5, 2), (6, 1, 4)])
def test_minibatches_hold_every_decision_once_and_every_environment_alike(T, N, size):
    parts = ppo.minibatches(T, N, size, torch.Generator().manual_seed(1))
    assert sorted(torch.cat(parts).tolist()) == list(range(T * N))
    for part in parts:
        assert len(torch.bincount(part % N, minlength=N).unique()) == 1
    assert len(parts) == min(T, -(-T * N // size))
    if T > 4:  # shuffled in time, and each environment in its own way
        assert not torch.equal(torch.cat(parts), torch.arange(T * N))
        order = torch.cat(parts).view(T, N) // N
        assert N == 1 or not torch.equal(order[:, 0], order[:, 1])


def test_first_ratio_is_one_and_a_mismatch_shows():
    model = TinyActorCritic()
    metrics = update(model, make_rollout(model), epochs=3, minibatch_size=6, micro_batch_size=2)
    assert metrics["losses/first_ratio_error"] < 1e-5
    mismatch = update(
        model, make_rollout(TinyActorCritic(), temperature=1.0), minibatch_size=12, micro_batch_size=5
    )
    assert mismatch["losses/first_ratio_error"] > 1e-3


def test_old_log_probs_stay_those_of_the_rollout():
    model = TinyActorCritic()
    buffer = make_rollout(model)
    before = buffer.log_probs.clone()
    metrics = update(
        model, buffer, opts=optimizers(model, lr=5.0), epochs=4, minibatch_size=6, micro_batch_size=3
    )
    assert torch.equal(buffer.log_probs, before)
    assert metrics["losses/approx_kl"] > 0 and metrics["losses/clipfrac"] > 0  # the clip is alive


def test_warm_up_trains_only_the_critic():
    for shared in (False, True):
        model = TinyActorCritic(shared=shared)
        policy = [p.clone() for p in model.policy_parameters()]
        critic = [p.clone() for p in model.critic_parameters()]
        metrics = update(model, make_rollout(model), train_policy=False)
        assert all(torch.equal(p, q) for p, q in zip(policy, model.policy_parameters()))
        assert not any(torch.equal(p, q) for p, q in zip(critic[-2:], list(model.critic_parameters())[-2:]))
        assert "losses/value_loss" in metrics and "losses/policy_loss" not in metrics


def test_target_kl_stops_the_policy_and_not_the_critic():
    steps = {}
    for target in (None, 1e-6):
        model = TinyActorCritic()
        opts = optimizers(model, lr=3.0)
        count = []
        opts[1].register_step_post_hook(lambda *_: count.append(1))  # noqa: B023
        sizes = dict(epochs=3, minibatch_size=4, micro_batch_size=4)
        metrics = update(model, make_rollout(model), opts=opts, target_kl=target, **sizes)
        steps[target] = metrics["losses/policy_steps"]
        assert len(count) == 9 and metrics["losses/kl_stop"] == (target is not None)
    assert steps == {None: 9, 1e-6: 1}


def test_the_same_generator_gives_the_same_weights():
    def run(seed):
        model = TinyActorCritic()
        update(model, make_rollout(model), seed=seed, minibatch_size=4, micro_batch_size=4, epochs=2)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    assert torch.equal(run(3), run(3)) and not torch.equal(run(3), run(4))


def test_gradient_norm_is_clipped():
    """The policy's and the critic's, each by itself."""
    model = TinyActorCritic()
    parts = model.policy_parameters(), model.critic_parameters()
    before = [[p.detach().clone() for p in part] for part in parts]
    opts = optimizers(model, lr=1.0, critic_lr=1.0)
    metrics = update(model, make_rollout(model), opts=opts, max_grad_norm=1e-3)
    for part, old, name in zip(parts, before, ("grad_norm", "critic_grad_norm"), strict=True):
        moved = torch.cat([(p - q).flatten() for p, q in zip(part, old, strict=True)]).norm()
        assert metrics[f"losses/{name}"] > 1e-3 and moved.item() == pytest.approx(1e-3, rel=1e-2)


# Numerics -------------------------------------------------------------------------------------------------------------


def break_log_prob(model, buffer):
    buffer.images[1, 1] = math.inf


def break_advantage(model, buffer):
    buffer.advantages[1, 1] = math.nan


def break_return(model, buffer):
    buffer.returns[2, 0] = math.inf


def break_critic(model, buffer):
    model.value = lambda **observation: torch.full(
        (len(observation["input_ids"]),), math.nan, requires_grad=True
    )


def break_policy_gradient(model, buffer):
    # A finite loss whose gradient is not: the derivative of sqrt at 0.
    inner = model.evaluate_actions
    model.evaluate_actions = lambda **kw: (
        inner(**kw)[0] + (model.logits.bias.sum() * 0).sqrt(),
        inner(**kw)[1],
    )


def break_critic_gradient(model, buffer):
    inner = model.value
    model.value = lambda **kw: inner(**kw) + (model.critic[0].bias.sum() * 0).sqrt()


@pytest.mark.parametrize("damage, quantity", [
    (break_log_prob, "log-prob"),
    (break_advantage, "advantage"),
    (break_return, "return"),
    (break_critic, "value"),
    (break_policy_gradient, "policy gradient"),
    (break_critic_gradient, "critic gradient"),
])  # fmt: skip
def test_nan_is_named_and_never_reaches_the_weights(damage, quantity):
    model = TinyActorCritic()
    buffer = make_rollout(model)
    opts = optimizers(model, kind=torch.optim.AdamW)
    damage(model, buffer)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(NumericsError, match=rf"^{quantity} is not finite") as caught:
        update(model, buffer, opts=opts, minibatch_size=12, micro_batch_size=4)
    assert caught.value.quantity == quantity and caught.value.indices is not None
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not opts[0].state and not opts[1].state


@pytest.mark.parametrize(
    "name, quantity", [("rewards", "reward"), ("log_probs", "log-prob"), ("values", "value")]
)
def test_nan_from_the_rollout_is_named_with_its_place(name, quantity):
    buffer = make_rollout(TinyActorCritic())
    getattr(buffer, name)[1, 2] = math.nan
    with pytest.raises(NumericsError) as caught:
        buffer.compute_advantages(torch.zeros(3), 0.99, 0.95)
    assert caught.value.quantity == quantity and caught.value.indices.tolist() == [5]


# Learning -------------------------------------------------------------------------------------------------------------


def test_it_learns_which_token_each_instruction_wants():
    """A contextual bandit: one-step episodes, reward when the first token equals the instruction's word."""
    model = TinyActorCritic()
    opts = optimizers(model, kind=torch.optim.Adam, lr=0.02, critic_lr=0.02)
    g = torch.Generator().manual_seed(0)
    T, N, words = 8, 32, 3
    ids, mask = torch.arange(N)[:, None] % words, torch.ones(N, 1, dtype=torch.long)
    images = torch.zeros(N, PATCHES, WIDTH)

    def sample():
        tokens = torch.zeros(N, 7, dtype=torch.long)
        for i in range(7):  # the log-prob of token i depends only on those before it: try each candidate
            every = tokens.repeat(VOCABULARY, 1)
            every[:, i] = torch.arange(VOCABULARY).repeat_interleave(N)
            repeat = [x.repeat(VOCABULARY, *[1] * (x.dim() - 1)) for x in (ids, mask)]
            log_p = model.evaluate_actions(*repeat, every, images.repeat(VOCABULARY, 1, 1), 1.5)[0][:, i]
            tokens[:, i] = torch.multinomial(log_p.view(VOCABULARY, N).T.exp(), 1, generator=g).squeeze(1)
        return tokens

    rates = []
    for iteration in range(20):
        buffer = ppo.RolloutBuffer(T, N, (PATCHES, WIDTH), "patch_embeddings", frame_shape=(1, 1, 3))
        with torch.no_grad():
            for t in range(T):
                tokens = sample()
                log_probs, _ = model.evaluate_actions(ids, mask, tokens, images, 1.5)
                store(buffer, t, images, ids, mask, tokens, log_probs, model.value(ids, mask, images))
                done = torch.ones(N, dtype=torch.bool)
                buffer.store_outcome(t, (tokens[:, 0] == ids[:, 0]).float(), done, ~done, torch.zeros(N))
        buffer.compute_advantages(torch.zeros(N), 0.99, 0.95)
        rates.append(buffer.rewards.mean().item())
        metrics = ppo.ppo_update(
            model, buffer, *opts, ppo.PPOConfig(epochs=4, minibatch_size=64, micro_batch_size=64), iteration > 1,
            torch.Generator().manual_seed(iteration),
        )  # fmt: skip
        assert all(math.isfinite(value) for value in metrics.values())
    assert rates[0] < 0.3 and rates[-1] > 0.8, rates
