"""Trajectory-level PPO on action tokens: storage of a rollout, advantages, losses, one update.

The idea (section 3.3 of the paper). A robot episode is a conversation: at every step the model reads an image and the
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

Left out: the KL penalty to the SFT policy, whose coefficient is 0 in the release. Its weights are there (the backbone
without adapters); it would cost one more forward pass.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from support.distributed import ALONE
from support.numerics import check_finite

ACTION_TOKENS = 7  # xyz, roll-pitch-yaw, gripper: one token each


@dataclass
class PPOConfig:
    """Settings of one update. temperature is the paper's; epochs, clips and the norm are the release script's for
    LIBERO-Spatial; sizes of batches and advantage_floor are ours."""

    temperature: float = 1.5  # of sampling; log-probs are taken at the same one
    epochs: int = 1  # passes over the rollout
    minibatch_size: int = 128  # transitions per optimiser step
    micro_batch_size: int = 32  # transitions per forward and backward pass: memory only
    clip: float = 0.2  # eps of Eq. 2
    value_clip: float = 0.2  # how far one update may move a value before its gradient stops; 0 = no limit
    value_coef: float = 1.0  # weight of the value loss, for a critic that shares parameters with the policy
    entropy_coef: float = 0.0  # bonus for entropy, in nats per action
    max_grad_norm: float = 1.0  # of policy and of critic, each
    target_kl: float | None = None  # no more policy steps in this update once a mini-batch's KL exceeds this
    normalize_advantages: bool = True
    advantage_floor: float = 0.01  # in units of reward: no policy step where advantages deviate less


# --------------------------------------------------------------------------------------------------------------------
# Rollout storage
# --------------------------------------------------------------------------------------------------------------------


class RolloutBuffer:
    """One rollout of T decisions in N environments: Algorithm 1's store (o, a, r, done, tokens, log-prob, V).

    For each t, `store_observation` (o_t), `store_decision` (a_t) and `store_outcome` (what followed) are called in this
    order; then `store_observation(T, …)` once more, `compute_advantages`, and `ppo_update` reads. Allocated once, on the CPU,
    and overwritten by the next rollout; mini-batches move to the model's device.

    image_shape: of one observation as the model is fed it, under the keyword `image_kind`: "patch_embeddings" (P, d) where
        the vision side is frozen, which saves the towers' forward pass in every epoch, else "pixel_values" (6, S, S).
    frame_shape: of the camera's picture, kept for whoever looks at the rollout afterwards: a reward model, a film.
    """

    def __init__(self, num_steps, num_envs, image_shape, image_kind="pixel_values", image_dtype=torch.float32,
                 frame_shape=(256, 256, 3)):  # fmt: skip
        if image_kind not in ("pixel_values", "patch_embeddings"):
            raise ValueError(f"image_kind is {image_kind!r}; pixel_values or patch_embeddings is expected")
        T, N = self.num_steps, self.num_envs = num_steps, num_envs
        self.image_kind = image_kind
        # Observations o_0 ... o_T. Row T, the one after the last decision, is where values and rewards look ahead to.
        self.frames = np.zeros((T + 1, N, *frame_shape), np.uint8)
        self.instructions = [[""] * N for _ in range(T + 1)]
        self.images = torch.zeros(T + 1, N, *image_shape, dtype=image_dtype)
        self.input_ids = torch.zeros(T + 1, N, 0, dtype=torch.long)  # (T + 1, N, L), L as the longest prompt
        self.attention_mask = torch.zeros(T + 1, N, 0, dtype=torch.long)  # 1 = prompt, 0 = padding behind it
        # What the policy did.
        self.action_tokens = torch.zeros(T, N, ACTION_TOKENS, dtype=torch.long)
        self.token_log_probs = torch.zeros(T, N, ACTION_TOKENS)  # under the behaviour policy
        self.log_probs = torch.zeros(T, N)  # Eq. 1: their sum
        self.values = torch.zeros(T, N)  # V(o_t) at the time of the rollout
        # What the environment answered.
        self.sparse_rewards = torch.zeros(T, N)  # 1 on success, else 0
        self.rewards = torch.zeros(T, N)  # what PPO maximises: sparse + weight x RPRM
        self.prm_scores = torch.zeros(T, N)  # the RPRM's, for the logs
        self.terminated = torch.zeros(T, N, dtype=torch.bool)  # success
        self.truncated = torch.zeros(T, N, dtype=torch.bool)  # time limit, or an episode that was lost
        self.lost = torch.zeros(T, N, dtype=torch.bool)  # of the truncated: worker died, simulation diverged
        self.task_ids = torch.zeros(T, N, dtype=torch.long)  # of the episode that decision t belonged to
        self.episode_lengths = torch.zeros(T, N, dtype=torch.long)  # its control steps so far
        # {(t, n): (frame, image)}: the last observation of an episode that was truncated at t; o_{t+1} is the next one's first.
        self.final_observations = {}
        # Filled by compute_advantages().
        self.next_values = torch.zeros(T, N)  # V of the observation that really followed step t
        self.advantages = torch.zeros(T, N)
        self.returns = torch.zeros(T, N)

    @property
    def size(self):
        """Number of transitions, T * N."""
        return self.num_steps * self.num_envs

    def store_observation(self, t, frames, instructions, input_ids, attention_mask, **images):
        """Write o_t: frames (N, H, W, 3) uint8, N instructions; and as the model reads them: input_ids and attention_mask
        (N, L) for any L, and the images (N, *image_shape) under the keyword `image_kind`."""
        if t == 0:
            self.final_observations = {}
        width = input_ids.shape[1]
        extra = width - self.input_ids.shape[2]
        if extra > 0:  # a longer instruction than any so far; old rows get more padding
            self.input_ids = F.pad(self.input_ids, (0, extra))
            self.attention_mask = F.pad(self.attention_mask, (0, extra))
        # the previous rollout's prompts may have been longer
        self.input_ids[t], self.attention_mask[t] = 0, 0
        self.input_ids[t, :, :width], self.attention_mask[t, :, :width] = input_ids, attention_mask
        self.frames[t], self.instructions[t] = frames, list(instructions)
        self.images[t] = images[self.image_kind]

    def store_decision(self, t, action_tokens, token_log_probs, values):
        """Write a_t: action_tokens and token_log_probs (N, 7), and V(o_t) (N,)."""
        self.action_tokens[t], self.token_log_probs[t] = action_tokens, token_log_probs
        self.log_probs[t] = action_log_prob(self.token_log_probs[t])
        bad = (~torch.isfinite(self.log_probs[t])).nonzero()[:, 0]  # such as those of weights that hold NaN
        check_finite("log-prob", self.log_probs[t], t * self.num_envs + bad)
        self.values[t] = values

    def store_final_observations(self, t, environments, frames, images):
        """Keep the last observations of the episodes that were truncated at t, those of these environments (n,): frames
        (n, H, W, 3) uint8, images (n, *image_shape)."""
        for n, frame, image in zip(environments.tolist(), frames, images.cpu()):
            self.final_observations[t, n] = frame, image

    def store_outcome(
        self, t, rewards, terminated, truncated, final_values, task_ids=0, episode_lengths=0, lost=False
    ):
        """Write what followed a_t, each (N,).

        final_values: V of the last observation of the episodes that were truncated at t; other entries are ignored.
        """
        for table, new in (
            (self.sparse_rewards, rewards), (self.rewards, rewards), (self.terminated, terminated), (self.truncated, truncated),
            (self.task_ids, task_ids), (self.episode_lengths, episode_lengths), (self.lost, lost),
        ):  # fmt: skip
            table[t] = torch.as_tensor(new)
        self.next_values[t] = torch.where(
            self.truncated[t], torch.as_tensor(final_values).to(self.rewards), 0.0
        )

    def compute_advantages(self, last_values, gamma, gae_lambda):
        """Complete next_values and compute advantages and returns.

        last_values (N,): V(o_T), Algorithm 1's bootstrap value V_M. Where an episode ended at the last step, o_T is the next
        episode's first observation, and its value is not used.
        """
        following = torch.cat([self.values[1:], last_values.to(self.values)[None]])  # (T, N)
        # Where an episode went on, the observation after step t is the one that step t + 1 acted on. Where it ended,
        # values[t + 1] belongs to the next episode: keep what store_outcome wrote.
        ended = self.terminated | self.truncated
        self.next_values = torch.where(ended, self.next_values, following)
        check_finite("reward", self.rewards)
        check_finite("log-prob", self.log_probs)
        check_finite("value", self.values)
        check_finite("value of the last observation", self.next_values)
        self.advantages, self.returns = compute_gae(
            self.rewards, self.values, self.next_values, self.terminated, self.truncated, gamma, gae_lambda
        )

    def finished_episodes(self, first_env=0):
        """[(t, environment, task id, success)] of the episodes that ended, but for those that were lost."""
        ended = ((self.terminated | self.truncated) & ~self.lost).nonzero().tolist()
        return [(t, first_env + n, int(self.task_ids[t, n]), bool(self.terminated[t, n])) for t, n in ended]

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


def compute_gae(rewards, values, next_values, terminated, truncated, gamma, gae_lambda):
    """Generalised advantage estimation over a rollout that holds pieces of many episodes.

    rewards, values, next_values: (T, N) float. values[t] = V(o_t); next_values[t] = V of the observation that really
    followed step t, that is the *final* one where an episode ended, never the next episode's first.
    terminated, truncated: (T, N) bool. Where both are set, termination wins.
    Returns (advantages, returns), both (T, N), returns = advantages + values.

        delta_t = r_t + gamma V(o_{t+1}) [not terminated] - V(o_t)
        A_t     = delta_t + gamma lambda A_{t+1} [not terminated and not truncated]

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
    # A_{t+1} (N,); beyond the rollout next_values stands for it
    next_advantage = torch.zeros(shape[1:]).to(delta)
    for t in reversed(range(len(delta))):
        next_advantage = delta[t] + gamma * gae_lambda * goes_on[t] * next_advantage
        advantages[t] = next_advantage
    return advantages, advantages + values


def normalize_advantages(advantages, ranks=ALONE):
    """(advantages with mean 0 and standard deviation 1 over the whole rollout, that of all ranks; their deviation before).

    Over the rollout and not per mini-batch: with a sparse reward a mini-batch may hold no success at all, and scaling
    its noise to unit variance would make it as loud as the one that does.
    """
    x = advantages.double()
    count = torch.tensor(float(x.numel()), dtype=x.dtype)
    count, total, squares = ranks.sum_(torch.stack([count, x.sum(), x.square().sum()]))
    mean = total / count
    deviation = (squares / count - mean.square()).clamp_min(0).sqrt()
    # 1e-8: where all advantages are equal (no reward, a constant critic), 0 and not NaN.
    return ((x - mean) / (deviation + 1e-8)).to(advantages.dtype), float(deviation)


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


def minibatches(T, N, size, generator):
    """One epoch's mini-batches of a (T, N) rollout: flat indices t * N + n in tensors of about `size`.

    Each environment's decisions are shuffled on their own, and each mini-batch takes the same number of every
    environment's (at least one). It is as random as needed, and the same mini-batches result however the environments
    are spread over processes. Equal parts instead of full ones and a rest: a last mini-batch of three samples would move
    the weights as far as the others.
    """
    order = [torch.randperm(T, generator=generator) for _ in range(N)]
    order = torch.stack(order, dim=1)  # (T, N): decisions of environment n
    count = min(T, math.ceil(T * N / size))
    return [(t * N + torch.arange(N)).flatten() for t in order.tensor_split(count)]


def ppo_update(
    actor_critic, buffer, policy_optimizer, critic_optimizer, cfg, train_policy, generator, ranks=ALONE
):
    """One PPO update on a finished rollout (the last lines of Algorithm 1).

    actor_critic needs, for B transitions with the observation keywords of `RolloutBuffer.batch`:
        evaluate_actions(action_tokens=(B, 7), temperature=…, **observation) -> log_probs (B, 7), entropy (B, 7)
        value(**observation) -> (B,)
        policy_parameters(), critic_parameters() -> iterables of parameters (the latter may be empty: no critic)
    train_policy: False during critic warm-up, when only the critic learns, on rollouts of the imitation policy: a
        policy that follows the advantages of an untrained critic forgets what it knew (the paper's Table 2: 80.0
        instead of 90.2 %; of openvla-tiny no harm was seen, docs/results.md). The policy also stays where the
        rollout's advantages deviate by less than `cfg.advantage_floor`.
    generator: CPU torch.Generator of the mini-batch order; on every rank in the same state.
    ranks: support.distributed.Ranks. Several ranks hold a part of the environments each (`buffer` is this rank's). Every
        rank draws the same mini-batches, of all ranks' rows, and computes the rows that it holds. It divides their losses
        by the size of the whole mini-batch, and gradients are summed: the update is that of a single process.

    Policy and critic may share parameters. Those belong in `policy_parameters()`: both losses add to their gradient,
    and in a critic-only update they stay where they are.

    Returns a dict of metrics, means over all samples of the update. The policy's are absent when it was not trained.
    Raises NumericsError before an optimiser step that would bring NaN or infinity into the weights.
    """
    check_finite("advantage", buffer.advantages)
    check_finite("return", buffer.returns)
    advantages, deviation = normalize_advantages(buffer.advantages, ranks)
    if not cfg.normalize_advantages:
        advantages = buffer.advantages
    # With the sparse reward alone, and without any success, advantages are the critic's noise (deviation 0.001 to 0.009
    # measured; with successes 0.055 and more). Normalised, noise moves the policy like a reward, and Adam would scale a
    # small loss up again: so no step.
    train_policy = train_policy and deviation >= cfg.advantage_floor
    advantages = advantages.flatten()
    policy_parameters = list(actor_critic.policy_parameters())
    critic_parameters = list(actor_critic.critic_parameters())
    device = policy_parameters[0].device
    meters = {}  # name -> (sum, count)
    first_ratio_error, policy_steps, kl_stop = 0.0, 0, False

    for _ in range(cfg.epochs):
        for whole in minibatches(
            buffer.num_steps, buffer.num_envs * ranks.size, cfg.minibatch_size, generator
        ):
            minibatch = ranks.own_part(whole, buffer.num_envs)
            policy_optimizer.zero_grad(set_to_none=True)
            critic_optimizer.zero_grad(set_to_none=True)
            update_policy = train_policy and not kl_stop
            minibatch_kl = 0.0

            for micro in minibatch.split(cfg.micro_batch_size):
                observation, tokens, old_log_probs, old_values, returns = buffer.batch(micro, device)
                # Of one sample in the mean over the mini-batch, whatever its micro-batch and its rank.
                weight = 1 / len(whole)

                # Policy. Its backward pass comes before the critic's forward pass: an actor-critic may switch adapters
                # in place between the two, and only one graph has to fit in memory.
                if update_policy:
                    token_log_probs, token_entropy = actor_critic.evaluate_actions(
                        action_tokens=tokens, temperature=cfg.temperature, **observation
                    )
                    log_probs = action_log_prob(token_log_probs)  # (B,), Eq. 1
                    entropy = token_entropy.sum(-1)  # (B,)
                    check_finite("log-prob", log_probs, micro)
                    micro_advantages = advantages[micro].to(device)
                    loss, ratio = policy_loss(log_probs, old_log_probs, micro_advantages, cfg.clip)  # Eq. 2
                    total = (loss.sum() - cfg.entropy_coef * entropy.sum()) * weight
                    check_finite("policy loss", total, micro)
                    total.backward()
                    with torch.no_grad():
                        # E[(r - 1) - log r] estimates KL(old || new) without bias and is never negative
                        # (Schulman's k3).
                        kl = (ratio - 1 - (log_probs - old_log_probs)).sum()
                        minibatch_kl += float(kl) * weight
                        if policy_steps == 0:
                            first_ratio_error = max(first_ratio_error, float((ratio - 1).abs().max()))
                        _add(meters, "losses/policy_loss", loss.sum(), len(micro))
                        _add(meters, "losses/entropy", entropy.sum(), len(micro))
                        _add(meters, "losses/approx_kl", kl, len(micro))
                        _add(meters, "losses/clipfrac", ((ratio - 1).abs() > cfg.clip).sum(), len(micro))

                if critic_parameters:
                    values = actor_critic.value(**observation)  # (B,)
                    check_finite("value", values, micro)
                    loss = value_loss(values, old_values, returns, cfg.value_clip)
                    total = cfg.value_coef * loss.sum() * weight
                    check_finite("value loss", total, micro)
                    total.backward()
                    _add(meters, "losses/value_loss", loss.detach().sum(), len(micro))

            if cfg.target_kl is not None and update_policy:  # all ranks decide alike
                minibatch_kl = float(ranks.sum_(torch.tensor(minibatch_kl, dtype=torch.float64)))
            ranks.sum_gradients_([*policy_parameters, *critic_parameters])
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
    parts = ranks.gather((meters, first_ratio_error, buffer.values, buffer.returns))
    meters = {name: tuple(map(sum, zip(*(part[0][name] for part in parts), strict=True))) for name in meters}
    values, returns = (torch.cat([part[k] for part in parts], dim=1) for k in (2, 3))
    metrics = {name: total / count for name, (total, count) in meters.items()}
    metrics["losses/explained_variance"] = explained_variance(values, returns)
    metrics["losses/advantage_std"] = deviation
    if train_policy:
        metrics["losses/first_ratio_error"] = max(part[1] for part in parts)
        metrics["losses/policy_steps"] = policy_steps
        metrics["losses/kl_stop"] = float(kl_stop)
    return metrics


def _add(meters, name, total, count):
    old_total, old_count = meters.get(name, (0.0, 0))
    meters[name] = (old_total + float(total), old_count + count)


def _clip_gradient(parameters, max_norm, quantity, indices):
    """Scale the gradient to at most `max_norm`; returns its norm before that."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    check_finite(quantity, norm, indices)
    return norm
