"""train.main on a scripted environment, without the simulator: what reaches the update, the curriculum and the results."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rprm_toys import STATS, copy_of, small_openvla
from test_ppo import reference_gae
from test_reward_model import save_reward_model

import ppo
import train
from policy import ActorCritic, OpenVLA
from reward_model import RPRM
from support.episodes import EvalResult

SENTENCES = "pick up the red block", "place it in the basket and pick up the green block"
N, T, ITERATIONS, GAMMA, LAMBDA, WEIGHT = 2, 5, 3, 0.9, 0.6, 0.5
# (decision, environment): how its episode ends there. Number e of an environment's episodes is of task e % 2.
ENDS = {
    (1, 0): "cut",
    (3, 0): "won",
    (2, 1): "won",
    (4, 1): "cut",
    (6, 0): "won",
    (9, 1): "lost",
    (12, 0): "cut",
}


def frame(n, episode, step):
    return np.random.default_rng([n, episode, step]).integers(0, 256, (256, 256, 3), dtype=np.uint8)


class Script:
    """The contract at the top of envs.py; every picture and sentence tells whose and when it is."""

    def __init__(self, suite, num_envs, task_ids, *, action_repeat, max_steps, seed, curriculum, **_):
        self.num_envs, self.action_repeat, self.curriculum, self.timing = (
            num_envs,
            action_repeat,
            curriculum,
            {},
        )
        self.decision, self.at, self.seen = 0, np.zeros((num_envs, 2), int), []  # (episode, step) of each

    def reset(self, *, seed=None, options=None):
        self.seen.append(self.at.copy())
        return self.observation(), {}

    def observation(self):
        frames = np.stack([frame(n, *where) for n, where in enumerate(self.at)])
        return {"agentview": frames, "instruction": [SENTENCES[episode % 2] for episode, _ in self.at]}

    def step(self, actions):
        ends = np.array([ENDS.get((self.decision, n), "") for n in range(self.num_envs)])
        won, cut = ends == "won", (ends == "cut") | (ends == "lost")
        self.decision += 1
        self.at[:, 1] += 1
        last, final = self.observation(), np.full(self.num_envs, None, object)
        for n in np.flatnonzero(won | cut):
            final[n] = {name: x[n] for name, x in last.items()}
        info = {
            "task_id": self.at[:, 0] % 2,
            "episode_length": self.at[:, 1] * 4,
            "lost": ends == "lost",
            "final_obs": final,
        }
        for n in np.flatnonzero(won | cut):
            self.at[n] = self.at[n, 0] + 1, 0
        self.seen.append(self.at.copy())
        return self.observation(), won.astype(np.float32), won, cut, info

    def get_state(self):
        return {"decision": np.array(self.decision)}

    def close(self):
        pass


def test_the_loop_is_algorithm_1(tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = small_openvla()
    model.norm_stats = {"libero_object": STATS["toy"]}
    model.save_pretrained(tmp_path / "policy")
    save_reward_model(copy_of(model), tmp_path / "rprm")
    rprm, made, updates, evaluations = RPRM.from_pretrained(tmp_path / "rprm"), [], [], []

    def environments(*arguments, **settings):
        made.append(Script(*arguments, **settings))
        return made[0]

    def actor_critic_of(*arguments):
        actor_critic = ActorCritic(*arguments)
        with torch.no_grad():
            actor_critic.value_head[-1].weight.mul_(100)  # first values near 0 would not tell whose they are
        return actor_critic

    def state_of(policy):
        ids, mask = policy.tokenize(SENTENCES[:1])
        with torch.no_grad():
            return policy.prompt_state(ids, mask, pixel_values=torch.ones(1, 6, 56, 56))

    def evaluate(policy, suite, task_ids, per_task, **options):
        won = {1: 2, 2: 1}.get(len(evaluations), 0)  # start: none; iteration 1: both, 2: one; at the end none
        evaluations.append((state_of(policy), per_task, options["temperature"], options["seed"]))
        episodes = [{"task_id": t, "init_state": 0, "success": t < won, "steps": 8} for t in task_ids]
        return EvalResult(suite, SENTENCES, episodes)

    def update(actor_critic, rollout, policy_optimizer, critic_optimizer, cfg, train_policy, order, ranks):
        first = T * len(updates)
        at = made[0].seen[first : first + T + 1]  # (T + 1, N, 2)

        @torch.no_grad()
        def ask(n, where):
            """V, and the RPRM's score, of one observation by itself."""
            ids, mask = model.tokenize([SENTENCES[where[0] % 2]])
            images = model.embed_images(model.preprocess(frame(n, *where)[None]))
            value = actor_critic.value(ids, mask, patch_embeddings=images)
            return value.item(), rprm.score(ids, mask, patch_embeddings=images).item()

        table = np.array([[ask(n, at[t][n]) for n in range(N)] for t in range(T + 1)])  # (T + 1, N, 2)
        (values, phi), following = np.moveaxis(table[:-1], 2, 0), table[1:].copy()
        ends = np.array([[ENDS.get((first + t, n), "") for n in range(N)] for t in range(T)])
        won, cut = ends == "won", (ends == "cut") | (ends == "lost")
        for t, n in zip(*np.nonzero(cut)):  # the last observation of the episode that was cut
            following[t, n] = ask(n, at[t][n] + [0, 1])
        rewards = won + WEIGHT * (GAMMA * following[..., 1] * ~won - phi)
        columns = rewards, values, following[..., 0], won, cut
        advantages = np.array([reference_gae(*(x[:, n] for x in columns), GAMMA, LAMBDA) for n in range(N)]).T
        assert table.std(axis=(0, 1)).min() > 3e-3  # not a comparison of constants
        np.testing.assert_allclose(rollout.values, values, atol=1e-4)
        np.testing.assert_allclose(rollout.prm_scores, phi, atol=1e-4)
        np.testing.assert_allclose(rollout.rewards, rewards, atol=1e-4)
        np.testing.assert_allclose(rollout.advantages, advantages, atol=1e-4)
        np.testing.assert_allclose(rollout.returns, advantages + values, atol=1e-4)
        left = 1 - len(updates) / ITERATIONS
        for optimizer, lr in ((policy_optimizer, 0.02), (critic_optimizer, 0.01)):
            assert [group["lr"] for group in optimizer.param_groups] == [pytest.approx(lr * left)]
        updates.append((cfg, train_policy))
        metrics = ppo.ppo_update(
            actor_critic, rollout, policy_optimizer, critic_optimizer, cfg, train_policy, order, ranks
        )
        assert metrics.get("losses/first_ratio_error", 0) < 1e-4  # sampled at the temperature of the update
        return metrics

    nothing = SimpleNamespace(begin=lambda: None, check=lambda: None, begun=False)
    monkeypatch.setattr("support.runs.Stop", lambda *_: nothing)  # pytest's own signal handlers stay
    monkeypatch.setattr(train, "check_egl", lambda: None)
    monkeypatch.setattr(train, "default_render", lambda: "light")
    for name, stand_in in dict(
        LiberoVecEnv=environments, ActorCritic=actor_critic_of, evaluate=evaluate, ppo_update=update
    ).items():
        monkeypatch.setattr(train, name, stand_in)
    ppo_flags = dict(
        temperature=1.3, epochs=2, minibatch_size=4, micro_batch_size=3, clip=0.3, value_clip=0.4
    )
    ppo_flags |= dict(entropy_coef=0.01, max_grad_norm=2.0, target_kl=9.0, advantage_floor=0.0)
    train.main(train.Args(
        task_ids=[0, 1], model=str(tmp_path / "policy"), reward_model=str(tmp_path / "rprm"), out=str(tmp_path / "run"), seed=3,
        num_envs=N, num_steps=T, total_steps=N * T * ITERATIONS, critic_warmup=1, lr=0.02, critic_lr=0.01, lr_schedule="linear",
        gamma=GAMMA, gae_lambda=LAMBDA, prm_weight=WEIGHT, prm_mode="potential", eval_every=1, eval_temperature=0.7, keep=1,
        start_episodes=2, eval_episodes=2, final_episodes=2, video_every=0, curriculum="eq4", **ppo_flags,
    ))  # fmt: skip

    assert updates == [(ppo.PPOConfig(**ppo_flags), trained) for trained in (False, True, True)]
    # Start and trained policy, each where it belongs; the best of what was evaluated meanwhile is kept.
    states = [state for state, *_ in evaluations]
    assert [rest for _, *rest in evaluations] == [[1, 0.7, 3]] * 5
    start, trained = state_of(model), state_of(OpenVLA.from_pretrained(tmp_path / "run" / "policy"))
    assert (trained - start).abs().max() > 1e-2
    # After the warm-up it is the start policy still.
    for k, want in ((0, start), (1, start), (3, start), (4, trained)):
        torch.testing.assert_close(states[k], want, rtol=0, atol=1e-4)
    assert (states[2] - start).abs().max() > 1e-3 and (states[2] - trained).abs().max() > 1e-3
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == ["000001", "000003"]
    # Each environment samples by itself, and by the seed.
    draws = torch.load(tmp_path / "run/checkpoints/000001/state.pt", weights_only=True)["samplers"]
    for i, state in enumerate(draws):
        own = torch.Generator().manual_seed(3 * 1_000_003 + i)
        for _ in range(T):
            torch.rand(7, dtype=torch.float64, generator=own)
        assert torch.equal(own.get_state(), state)
    # The curriculum counts each episode once, after its rollout, and none that was lost.
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [[m[f"charts/{x}"] for x in ("episodes", "successes", "lost_episodes")] for m in lines[1:]] == [
        [4, 2, 0], [2, 1, 1], [1, 0, 0]
    ]  # fmt: skip
    played, at = [], np.zeros(N, int)
    for (t, n), how in sorted(ENDS.items()):
        played += [(t // T + 1, at[n] % 2, how)] if how != "lost" else []
        at[n] += 1
    for m in lines[1:]:
        rates = []
        for task in (0, 1):
            outcomes = [how == "won" for k, of, how in played if of == task and k <= m["iteration"]]
            rates.append((sum(outcomes) + 1) / (len(outcomes) + 2))
        weights = [math.exp((0.5 - rate) / 0.5) for rate in rates]
        assert m["curriculum/task_0"] == pytest.approx(weights[0] / sum(weights))
