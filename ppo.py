"""Trajectory-level PPO on action tokens: storage of a rollout, advantages, losses, one update.

The idea (Section 3.3 of the paper). A robot episode is a conversation: at every step the model reads an image and the
instruction and answers with 7 tokens, which are one action. To the environment only the whole answer exists, so PPO's
unit is the *action*, not the token:

    log pi(a_t | o_t, v_in) = sum_{i=1..7} log pi(token_i | token_<i, o_t, v_in)                          (Eq. 1)
    ratio_t = exp(log pi_new(a_t) - log pi_old(a_t))
    maximise  E[ min(ratio_t A_t, clip(ratio_t, 1 - eps, 1 + eps) A_t) ]                                  (Eq. 2)

Clipping per token instead would let an action move by up to (1 + eps)^7 before the clip acts, and would give credit
to tokens that the environment cannot tell apart.

Three things must hold, or the algorithm silently becomes another one:

- pi_old is the *behaviour* policy. Its log-probs are those of the sampled tokens, at the temperature of sampling,
  recorded during the rollout and never recomputed. (Recomputing them in the update makes the ratio 1 for ever, and
  the clip dead.) `losses/first_ratio_error` watches this: before the first optimiser step the update must reproduce
  the rollout's log-probs.
- A time limit is not a terminal state. GAE cuts the sum between episodes in both cases, but only termination sets the
  value of what follows to 0; truncation bootstraps from the value of the observation that the episode really ended
  in.
- One optimiser step per mini-batch. Micro-batches exist for memory only, and any micro-batch size gives the same
  gradient.

Nothing here knows OpenVLA. The update asks an actor-critic for four things (see `policy.ActorCritic`):
`evaluate_actions`, `value`, `policy_parameters`, `critic_parameters`; the tests use a module of thirty lines.

Left out: the KL penalty to the SFT policy, whose coefficient is 0 in the paper's runs. It would need a third set of
weights.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from support.errors import UserError

ACTION_TOKENS = 7  # xyz, roll-pitch-yaw, gripper: one token each


class NumericsError(UserError):
    """NaN or infinity where a number belongs. Raised before the optimiser step: the weights are the last good ones.

    quantity: what was not finite ("reward", "log-prob", "policy loss", …).
    indices: flat indices t * N + n of the transitions involved, or None when it is not tied to some.
    """

    def __init__(self, quantity, indices=None):
        super().__init__(
            f"{quantity} is not finite (NaN or infinity); the update was stopped before it reached the weights"
        )
        self.quantity = quantity
        self.indices = indices


def check_finite(quantity, tensor, indices=None):
    """Raise NumericsError naming `quantity` unless every element of `tensor` is finite."""
    finite = torch.isfinite(tensor)
    if not finite.all():
        if indices is None and tensor.dim() == 2:  # a (T, N) quantity of the whole rollout: say which transitions
            indices = (~finite).flatten().nonzero().squeeze(1)
        raise NumericsError(quantity, indices)


@dataclass
class PPOConfig:
    """Settings of one update; the defaults are the release script's for LIBERO-Spatial, where the paper gives none."""

    temperature: float = 1.5  # of sampling; log-probs are taken at the same one
    epochs: int = 1  # passes over the rollout
    minibatch_size: int = 128  # transitions per optimiser step
    micro_batch_size: int = 32  # transitions per forward and backward pass: memory only, no effect on the result
    clip: float = 0.2  # eps of Eq. 2
    value_clip: float = 0.2  # how far one update may move a value estimate before its gradient stops; 0 = no clipping
    value_coef: float = 1.0  # weight of the value loss; matters only where critic and policy share parameters
    entropy_coef: float = 0.0  # bonus for entropy, in nats per action
    max_grad_norm: float = 1.0  # of policy and of critic, each
    target_kl: float | None = None  # stop training the policy in this update once approx_kl exceeds this
    normalize_advantages: bool = True


# --------------------------------------------------------------------------------------------------------------------
# Rollout storage
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class RolloutBuffer:
    """One rollout of T decisions in N environments: Algorithm 1's store (o, a, r, done, tokens, log-prob, V).

    `store_decision` and `store_outcome` write step t; `finish` computes advantages; `ppo_update` reads. Tensors are
    allocated once and reused by the next rollout. Everything lives on `device` of the buffer (the CPU by default) and
    mini-batches move to the model's.

    Images are kept in the form that the model is fed: "patch_embeddings" (the projected features) where the vision
    side is frozen, which saves the towers' forward pass in every epoch, else "pixel_values".
    """

    num_steps: int  # T
    num_envs: int  # N
    image_shape: tuple  # of one observation: (P, d) for patch embeddings, (6, S, S) for pixel values
    image_kind: str = "pixel_values"  # the keyword under which the actor-critic takes them
    image_dtype: torch.dtype = torch.float32
    device: str | torch.device = "cpu"

    # Observation o_t, as the policy saw it.
    images: Tensor = field(init=False)  # (T, N, *image_shape)
    input_ids: Tensor = field(init=False)  # (T, N, L) int64, right-padded
    attention_mask: Tensor = field(init=False)  # (T, N, L) int64, 0 = padding
    # What the policy did.
    action_tokens: Tensor = field(init=False)  # (T, N, 7) int64
    token_log_probs: Tensor = field(init=False)  # (T, N, 7) of the sampled tokens under the behaviour policy
    log_probs: Tensor = field(init=False)  # (T, N) Eq. 1: their sum
    values: Tensor = field(init=False)  # (T, N) V(o_t) at the time of the rollout
    # What the environment answered.
    rewards: Tensor = field(init=False)  # (T, N) sparse reward + weight x RPRM score: the sum that PPO maximises
    prm_scores: Tensor = field(init=False)  # (T, N) the RPRM's share before weighting, for the logs
    terminated: Tensor = field(init=False)  # (T, N) bool: success
    truncated: Tensor = field(init=False)  # (T, N) bool: time limit, or a worker that died
    next_values: Tensor = field(init=False)  # (T, N) V of the observation that really followed step t
    # Filled by finish().
    advantages: Tensor = field(init=False)  # (T, N)
    returns: Tensor = field(init=False)  # (T, N)

    def __post_init__(self):
        if self.image_kind not in ("pixel_values", "patch_embeddings"):
            raise ValueError(f"image_kind is {self.image_kind!r}; pixel_values or patch_embeddings is expected")
        T, N = self.num_steps, self.num_envs

        def zeros(*shape, dtype=torch.float32):
            return torch.zeros(T, N, *shape, dtype=dtype, device=self.device)

        self.images = zeros(*self.image_shape, dtype=self.image_dtype)
        self.input_ids = zeros(0, dtype=torch.long)  # grows to the longest prompt seen
        self.attention_mask = zeros(0, dtype=torch.long)
        self.action_tokens = zeros(ACTION_TOKENS, dtype=torch.long)
        self.token_log_probs = zeros(ACTION_TOKENS)
        self.log_probs, self.values, self.next_values = zeros(), zeros(), zeros()
        self.rewards, self.prm_scores = zeros(), zeros()
        self.terminated, self.truncated = zeros(dtype=torch.bool), zeros(dtype=torch.bool)
        self.advantages, self.returns = zeros(), zeros()

    @property
    def size(self):
        """Number of transitions, T * N."""
        return self.num_steps * self.num_envs

    def store_decision(self, t, images, input_ids, attention_mask, action_tokens, token_log_probs, values, slots=slice(None)):
        """Write o_t and a_t of the n environments `slots` (a slice; all by default): images (n, *image_shape), input_ids and
        attention_mask (n, L) for any L, action_tokens and token_log_probs (n, 7), values (n,)."""
        width = input_ids.shape[1]
        if width > self.input_ids.shape[2]:  # a longer instruction than any so far; old rows get more padding
            extra = width - self.input_ids.shape[2]
            self.input_ids = F.pad(self.input_ids, (0, extra))
            self.attention_mask = F.pad(self.attention_mask, (0, extra))
        self.input_ids[t, slots], self.attention_mask[t, slots] = 0, 0  # the previous rollout's prompts may have been longer
        self.input_ids[t, slots, :width] = input_ids
        self.attention_mask[t, slots, :width] = attention_mask
        self.images[t, slots] = images
        self.action_tokens[t, slots] = action_tokens
        self.token_log_probs[t, slots] = token_log_probs
        self.log_probs[t, slots] = action_log_prob(token_log_probs)
        self.values[t, slots] = values

    def store_outcome(self, t, rewards, terminated, truncated, final_values, prm_scores=None, slots=slice(None)):
        """Write what followed a_t in the n environments `slots`, each (n,).

        final_values: V of the last observation of the episodes that were truncated at t; other entries are ignored.
        """
        truncated = torch.as_tensor(truncated)
        self.rewards[t, slots] = torch.as_tensor(rewards)
        self.terminated[t, slots] = torch.as_tensor(terminated)
        self.truncated[t, slots] = truncated
        final_values = torch.as_tensor(final_values).to(self.rewards)
        self.next_values[t, slots] = torch.where(truncated.to(self.device), final_values, 0.0)
        self.prm_scores[t, slots] = 0.0 if prm_scores is None else torch.as_tensor(prm_scores)

    def finish(self, last_values, gamma, lam):
        """Complete next_values and compute advantages and returns.

        last_values (N,): V of the observations after the last step, Algorithm 1's bootstrap value V_M. Where an
        episode ended at the last step this is the next episode's first observation, and it is not used.
        """
        following = torch.cat([self.values[1:], last_values.to(self.values)[None]])  # (T, N)
        # Where an episode went on, the observation after step t is the one that step t + 1 acted on. Where it ended,
        # values[t + 1] belongs to the next episode: keep what store_outcome wrote.
        ended = self.terminated | self.truncated
        self.next_values = torch.where(ended, self.next_values, following)
        for quantity, tensor in (("reward", self.rewards), ("log-prob", self.log_probs), ("value", self.values)):
            check_finite(quantity, tensor)
        check_finite("value of the last observation", self.next_values)
        self.advantages, self.returns = compute_gae(
            self.rewards, self.values, self.next_values, self.terminated, self.truncated, gamma, lam
        )

    def batch(self, indices, device):
        """Transitions with flat indices t * N + n, on `device`: (observation as keyword arguments of the actor-critic,
        action_tokens (B, 7), log_probs (B,), values (B,), returns (B,)).

        Prompts are cut to the longest of the batch, so that padding for one long instruction is not paid everywhere.
        """
        t, n = indices // self.num_envs, indices % self.num_envs
        mask = self.attention_mask[t, n]  # (B, L)
        longest = max(int(mask.sum(1).max()), 1)
        observation = {
            "input_ids": self.input_ids[t, n, :longest].to(device),
            "attention_mask": mask[:, :longest].to(device),
            self.image_kind: self.images[t, n].to(device),
        }
        rest = (x[t, n].to(device) for x in (self.action_tokens, self.log_probs, self.values, self.returns))
        return observation, *rest


# --------------------------------------------------------------------------------------------------------------------
# Algorithm: Eq. 1, GAE, Eq. 2
# --------------------------------------------------------------------------------------------------------------------


def action_log_prob(token_log_probs):
    """Eq. 1: log-probability of an action from those of its tokens, (…, 7) -> (…)."""
    return token_log_probs.sum(-1)


def compute_gae(rewards, values, next_values, terminated, truncated, gamma, lam):
    """Generalised advantage estimation over a rollout that holds pieces of many episodes.

    rewards, values, next_values: (T, N) float. values[t] = V(o_t); next_values[t] = V of the observation that really
    followed step t, that is the *final* one where an episode ended, never the next episode's first.
    terminated, truncated: (T, N) bool. Where both are set, termination wins.
    Returns (advantages, returns), both (T, N), returns = advantages + values.

        delta_t = r_t + gamma V(o_{t+1}) [not terminated] - V(o_t)
        A_t     = delta_t + gamma lam A_{t+1} [not terminated and not truncated]

    The two brackets differ, and that is the whole point: after a time limit the future still has a value (first
    bracket), but the next row of the buffer is another episode (second bracket).
    """
    shape = rewards.shape
    if len(shape) != 2:
        raise ValueError(f"rewards must be (T, N), not {tuple(shape)}")
    others = {"values": values, "next_values": next_values, "terminated": terminated, "truncated": truncated}
    for name, tensor in others.items():
        if tensor.shape != shape:
            raise ValueError(f"{name} is {tuple(tensor.shape)} but rewards is {tuple(shape)}")
    terminated, truncated = terminated.bool(), truncated.bool()
    # torch.where, not a product: what follows a termination may be garbage, and 0 * NaN is NaN.
    delta = rewards + gamma * torch.where(terminated, 0.0, next_values) - values
    goes_on = (~(terminated | truncated)).to(delta.dtype)
    advantages = torch.zeros_like(delta)
    following = torch.zeros(shape[1:]).to(delta)  # (N,) A_{t+1}; beyond the rollout next_values stands for it
    for t in reversed(range(len(delta))):
        following = delta[t] + gamma * lam * goes_on[t] * following
        advantages[t] = following
    return advantages, advantages + values


def normalize_advantages(advantages, reduce_sum=None):
    """Advantages with mean 0 and standard deviation 1 over the whole rollout.

    Over the rollout and not per mini-batch: with a sparse reward a mini-batch may hold no success at all, and scaling
    its noise to unit variance would make it as loud as the one that does.
    reduce_sum: sums a tensor over all ranks in place (torch.distributed.all_reduce), so that every rank uses the
    global mean and deviation; None on one process.
    """
    x = advantages.double()
    moments = torch.stack([torch.tensor(float(x.numel()), dtype=x.dtype, device=x.device), x.sum(), x.square().sum()])
    if reduce_sum is not None:
        reduce_sum(moments)
    count, total, squares = moments
    mean = total / count
    deviation = (squares / count - mean.square()).clamp_min(0).sqrt()
    # All advantages equal (no reward yet, a constant critic): there is nothing to learn; 1e-8 keeps it 0 instead of
    # NaN.
    return ((x - mean) / (deviation + 1e-8)).to(advantages.dtype)


def policy_loss(log_probs, old_log_probs, advantages, clip):
    """Eq. 2 as a loss, per action. All (B,); log-probs are action-level (Eq. 1), old ones the behaviour policy's.

    Returns (loss (B,), ratio (B,)). The minimum makes the bound pessimistic: the clip takes away the reward of moving
    further in the direction that the advantage favours, never the gradient that brings a bad move back.
    """
    ratio = (log_probs - old_log_probs).exp()
    objective = torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    return -objective, ratio


def value_loss(values, old_values, returns, value_clip):
    """Squared error of the critic, per state (B,), clipped like the policy: 1/2 max((V - R)^2, (V_clipped - R)^2).

    V_clipped is at most `value_clip` away from the estimate of the rollout. value_clip = 0 turns clipping off.
    """
    loss = (values - returns).square()
    if value_clip > 0:
        clipped = old_values + (values - old_values).clamp(-value_clip, value_clip)
        loss = torch.maximum(loss, (clipped - returns).square())
    return 0.5 * loss


def explained_variance(values, returns):
    """1 - Var(R - V) / Var(R): 1 = the critic knows the return, 0 = no better than a constant, or a constant return."""
    variance = returns.var(unbiased=False)
    if variance == 0:
        return 0.0
    return float(1 - (returns - values).var(unbiased=False) / variance)


# --------------------------------------------------------------------------------------------------------------------
# One update
# --------------------------------------------------------------------------------------------------------------------


def ppo_update(actor_critic, buffer, policy_optimizer, critic_optimizer, cfg, train_policy, generator, world=None):
    """One PPO update on a finished rollout (the last lines of Algorithm 1).

    actor_critic needs, for B transitions with the observation keywords of `RolloutBuffer.batch`:
        evaluate_actions(action_tokens=(B, 7), temperature=…, **observation) -> log_probs (B, 7), entropy (B, 7)
        value(**observation) -> (B,)
        policy_parameters(), critic_parameters() -> iterables of parameters
    train_policy: False during critic warm-up, when only the critic learns, on rollouts of the imitation policy: a
        policy that follows the advantages of an untrained critic forgets what it knew (80.0 instead of 90.2 % in
        Table 2).
    generator: CPU torch.Generator of the mini-batch order; on every rank in the same state.
    world: distributed.World when several ranks hold a part of the environments each (`buffer` is this rank's), or None.
        Every rank draws the order of all environments and works on its own; losses are divided by the size of the whole
        mini-batch and gradients are summed, so the update is the one that a single process would make.

    Policy and critic may share parameters. Those belong in `policy_parameters()`: both losses add to their gradient,
    and in a critic-only update they stay where they are.

    Returns a dict of metrics, means over all samples of the update. The policy's are absent when it was not trained.
    Raises NumericsError before an optimiser step that would bring NaN or infinity into the weights.
    """
    check_finite("advantage", buffer.advantages)
    check_finite("return", buffer.returns)
    rank, ranks = (world.rank, world.size) if world else (0, 1)
    advantages = buffer.advantages
    if cfg.normalize_advantages:
        advantages = normalize_advantages(advantages, world and world.sum_)
    advantages = advantages.flatten()
    policy_parameters = list(actor_critic.policy_parameters())
    critic_parameters = list(actor_critic.critic_parameters())
    device = critic_parameters[0].device
    meters = {}
    first_ratio_error = 0.0
    policy_steps = 0
    kl_stop = False

    for _ in range(cfg.epochs):
        for whole in minibatches(buffer.num_steps, buffer.num_envs * ranks, cfg.minibatch_size, generator):
            minibatch = own_part(whole, buffer.num_envs, rank, ranks)
            policy_optimizer.zero_grad(set_to_none=True)
            critic_optimizer.zero_grad(set_to_none=True)
            update_policy = train_policy and not kl_stop
            minibatch_kl = 0.0

            for micro in minibatch.split(cfg.micro_batch_size):
                observation, tokens, old_log_probs, old_values, returns = buffer.batch(micro, device)
                # Each loss is a mean over the mini-batch: sums over micro-batches, divided by the size of the whole.
                weight = 1 / len(whole)

                # The policy's backward pass comes before the critic's forward pass: an actor-critic may switch
                # adapters in place between the two, and only one graph has to fit in memory.
                if update_policy:
                    token_log_probs, token_entropy = actor_critic.evaluate_actions(
                        action_tokens=tokens, temperature=cfg.temperature, **observation
                    )
                    log_probs, entropy = action_log_prob(token_log_probs), token_entropy.sum(-1)  # (B,), Eq. 1
                    check_finite("log-prob", log_probs, micro)
                    loss, ratio = policy_loss(log_probs, old_log_probs, advantages[micro].to(device), cfg.clip)  # Eq. 2
                    total = (loss.sum() - cfg.entropy_coef * entropy.sum()) * weight
                    check_finite("policy loss", total, micro)
                    total.backward()
                    with torch.no_grad():
                        log_ratio = log_probs - old_log_probs
                        # E[(r - 1) - log r] estimates KL(old || new) without bias and is never negative (Schulman's
                        # k3).
                        kl = (ratio - 1 - log_ratio).sum()
                        minibatch_kl += float(kl) * weight
                        if policy_steps == 0:
                            first_ratio_error = max(first_ratio_error, float((ratio - 1).abs().max()))
                        _add(meters, "losses/policy_loss", loss.sum(), len(micro))
                        _add(meters, "losses/entropy", entropy.sum(), len(micro))
                        _add(meters, "losses/approx_kl", kl, len(micro))
                        _add(meters, "losses/clipfrac", ((ratio - 1).abs() > cfg.clip).sum(), len(micro))

                values = actor_critic.value(**observation)  # (B,)
                check_finite("value", values, micro)
                loss = value_loss(values, old_values, returns, cfg.value_clip)
                total = cfg.value_coef * loss.sum() * weight
                check_finite("value loss", total, micro)
                total.backward()
                _add(meters, "losses/value_loss", loss.detach().sum(), len(micro))

            if world:
                if cfg.target_kl is not None and update_policy:  # all ranks decide alike
                    minibatch_kl = float(world.sum_(torch.tensor(minibatch_kl, dtype=torch.float64)))
                world.sum_gradients_([*policy_parameters, *critic_parameters])
            # Trust region, second line of defence: the clip bounds what the loss rewards, not how far Adam walks.
            if update_policy and cfg.target_kl is not None and minibatch_kl > cfg.target_kl:
                kl_stop, update_policy = True, False  # the critic goes on: regression needs no trust region
            # Check both before stepping either, so that an error leaves policy and critic of the same moment.
            if update_policy:
                grad_norm = _clip_gradient(policy_parameters, cfg.max_grad_norm, "policy gradient", minibatch)
            critic_norm = _clip_gradient(critic_parameters, cfg.max_grad_norm, "critic gradient", minibatch)
            if update_policy:
                policy_optimizer.step()
                policy_steps += 1
                _add(meters, "losses/grad_norm", grad_norm, 1)
            critic_optimizer.step()
            _add(meters, "losses/critic_grad_norm", critic_norm, 1)

    # Free the gradients: the rollout that follows needs the memory and not them.
    policy_optimizer.zero_grad(set_to_none=True)
    critic_optimizer.zero_grad(set_to_none=True)
    values, returns = buffer.values, buffer.returns
    if world:
        parts = world.gather((meters, first_ratio_error, values, returns))
        meters = {name: tuple(map(sum, zip(*(part[0][name] for part in parts), strict=True))) for name in meters}
        first_ratio_error = max(part[1] for part in parts)
        values, returns = (torch.cat([part[k] for part in parts], dim=1) for k in (2, 3))
    metrics = {name: total / count for name, (total, count) in meters.items()}
    metrics["losses/explained_variance"] = explained_variance(values, returns)
    if train_policy:
        metrics["losses/first_ratio_error"] = first_ratio_error
        metrics["losses/policy_steps"] = policy_steps
        metrics["losses/kl_stop"] = float(kl_stop)
    return metrics


def minibatches(T, N, size, generator):
    """One epoch's mini-batches of a (T, N) rollout: flat indices t * N + n in tensors of about `size`.

    Each environment's decisions are shuffled on their own, and each mini-batch takes the same number of every
    environment's (at least one). It is as random as needed, and the same mini-batches result however the environments
    are spread over processes. Equal parts instead of full ones and a rest: a last mini-batch of three samples would move
    the weights as far as the others.
    """
    order = torch.stack([torch.randperm(T, generator=generator) for _ in range(N)], dim=1)  # (T, N): decision t of n
    count = min(T, -(-T * N // size))
    return [(t * N + torch.arange(N)).flatten() for t in order.tensor_split(count)]


def own_part(whole, num_envs, rank, ranks):
    """A mini-batch over all environments -> this rank's decisions in it, as flat indices into its own rollout.

    Every rank has num_envs environments, one after the other, and as mini-batches take the same number of decisions of
    every environment, all ranks get parts of the same size: the same number of micro-batches, in step with each other.
    """
    t, n = whole // (num_envs * ranks), whole % (num_envs * ranks) - rank * num_envs
    mine = (n >= 0) & (n < num_envs)
    return t[mine] * num_envs + n[mine]


def _add(meters, name, total, count):
    old_total, old_count = meters.get(name, (0.0, 0))
    meters[name] = (old_total + float(total), old_count + count)


def _clip_gradient(parameters, max_norm, quantity, indices):
    """Scale the gradient to at most `max_norm`; returns its norm before that."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    check_finite(quantity, norm, indices)
    return norm
