"""VLA-RL: reinforcement learning of a vision-language-action policy on LIBERO (arXiv 2505.18719, Algorithm 1).

Read `main` from top to bottom; it is the algorithm:

    models          one frozen OpenVLA, two LoRA adapters, a value head (policy.py); a frozen reward model (reward_model.py)
    environments    N episodes at a time; a curriculum decides which task comes next, Eq. 4 (envs.py)
    repeat:
        rollout     M decisions in N environments; keep o, tokens, log-prob, value, reward (ppo.py: RolloutBuffer)
        reward      sparse + weight x what the reward model makes of each decision (3.4)
        advantages  GAE with the bootstrap value V_M (ppo.py)
        update      critic only during warm-up, then PPO on action tokens, Eq. 1 and Eq. 2 (ppo.py)

    python train.py --suite libero_object                   # openvla-tiny, CPU, no download
    python train.py --resume runs/libero_object-seed0       # go on exactly where a run stopped
    torchrun --nproc-per-node 8 train.py --num-envs 80      # the same on 8 GPUs (docs/distributed.md)

A "decision" is one action of the policy: `action_repeat` control steps of the simulator (4 for openvla-tiny, 1 for 7B).
"""

from dataclasses import dataclass
from typing import Optional

from support.cli import flag, parse_args

# What differs between the two sizes. 7B: the paper's where it says, else the release's, but for total_steps, the sizes of
# batches and eval_*, which are ours (docs/hyperparameters.md); tiny: found on 2 cores.
# With num_steps 32, lr 1e-3 and Eq. 4, libero_goal gained little and libero_10 got worse (docs/results.md).
DEFAULTS = {
    "tiny": dict(
        total_steps=81_920, num_envs=16, num_steps=128, max_episode_steps=160, lr=5e-4, critic_lr=1e-3, lr_schedule="linear",
        temperature=0.6, epochs=3, minibatch_size=256, micro_batch_size=128, lora_targets="language", eval_temperature=0.6,
        curriculum="frontier", eval_every=10,
    ),
    "7B": dict(
        total_steps=1_280_000, num_envs=10, num_steps=128, max_episode_steps=150, lr=2e-5, critic_lr=5e-5, lr_schedule="constant",
        temperature=1.5, epochs=1, minibatch_size=128, micro_batch_size=8, lora_targets="all", eval_temperature=0.0,
        curriculum="eq4", eval_every=20,
    ),
}  # fmt: skip
# Nine tasks of libero_10 and eleven of libero_90 are two in a row: longer episodes.
LONG_SUITES = ("libero_10", "libero_90")
LONG_DEFAULTS = {"tiny": dict(max_episode_steps=320), "7B": dict(max_episode_steps=300)}


def by_size(name, help, **metadata):
    """A flag whose default depends on the model's size."""
    shown = []
    for size, defaults in DEFAULTS.items():
        text = f"{size} {_shown(defaults[name])}"
        if name in LONG_DEFAULTS[size]:
            text += f" ({_shown(LONG_DEFAULTS[size][name])} on {', '.join(LONG_SUITES)})"
        shown.append(text)
    return flag(None, help, default="; ".join(shown), **metadata)


def _shown(value):
    return f"{value:,}" if isinstance(value, int) else str(value)


@dataclass
class Args:
    # What to train
    suite: str = flag("libero_object", "LIBERO suite")
    task_ids: Optional[list[int]] = flag(None, "tasks, as in 0,1,2", default="all of the suite", min=0)
    model: str = flag(
        "auto",
        "policy to start from: auto, openvla-tiny, a checkpoint directory or a hub id. auto takes the suite's official "
        "OpenVLA-7B where a GPU with enough memory and the weights are there, else openvla-tiny",
    )
    reward_model: Optional[str] = flag(
        "auto",
        "RPRM checkpoint directory (tiny, or a tuned VLM), or a stock VLM of transformers (directory or hub id), asked "
        "zero-shot; auto: the RPRM beside openvla-tiny's policy, if there is one",
    )
    unnorm_key: Optional[str] = flag(
        None, "which action statistics of the checkpoint to use", default="by the suite"
    )
    dtype: str = flag(
        "auto",
        "of the frozen weights. auto: float32 for a small model; else bfloat16, on a CPU only where it is fast",
        choices=("auto", "bfloat16", "float32"),
    )
    resume: Optional[str] = flag(None, "run directory to continue; its own settings are used", default="none")
    out: Optional[str] = flag(None, "run directory", default="runs/SUITE-seedSEED")
    seed: int = flag(0, "seed of everything", min=0, max=2**32 - 1)
    # How much
    total_steps: Optional[int] = by_size("total_steps", "decisions in total, over all environments", min=1)
    num_envs: Optional[int] = by_size("num_envs", "environments N, over all ranks", min=1, max=10_000)
    num_steps: Optional[int] = by_size(
        "num_steps", "decisions per environment and rollout M", min=1, max=100_000
    )
    max_episode_steps: Optional[int] = by_size(
        "max_episode_steps",
        "control steps at which a training episode is truncated",
        min=1,
    )
    num_workers: Optional[int] = flag(None, "simulator processes of a rank", default="one per core", min=1)
    worker_timeout: float = flag(
        60.0,
        "seconds for one command until a busy simulator process is replaced; one that stands still: 5",
        min=1,
    )
    egl_devices: Optional[list[int]] = flag(
        None,
        "EGL devices that render, shared out among a machine's ranks",
        default="the GPU that a rank computes on",
        min=0,
    )
    shard: bool = flag(
        False,
        "spread the frozen backbone over the ranks (FSDP2), for a GPU that cannot hold it; with one rank nothing changes",
    )
    render: Optional[str] = flag(
        None,
        "simplified or exact meshes",
        default="exact where a GPU renders, else light",
        choices=("light", "exact"),
    )
    init_states: str = flag(
        "random", "training episodes: random placements, or the test states", choices=("random", "protocol")
    )
    # PPO
    lr: Optional[float] = by_size("lr", "learning rate of the policy adapter", min=0)
    critic_lr: Optional[float] = by_size("critic_lr", "learning rate of the critic", min=0)
    lr_schedule: Optional[str] = by_size(
        "lr_schedule",
        "both learning rates: constant, or linear from these values to 0 over the run",
        choices=("constant", "linear"),
    )
    temperature: Optional[float] = by_size(
        "temperature", "of sampling in rollouts; log-probs are taken at it", min=0.01
    )
    whole_vocabulary: bool = flag(
        False,
        "sample among all tokens; the default keeps to the 256 action tokens, because at temperature 1.5 the tail of a "
        "32,000-word vocabulary is noise",
    )
    critic_warmup: int = flag(5, "first iterations that train the critic only", min=0)
    epochs: Optional[int] = by_size("epochs", "passes over each rollout", min=1)
    minibatch_size: Optional[int] = by_size("minibatch_size", "decisions per optimiser step", min=1)
    micro_batch_size: Optional[int] = by_size(
        "micro_batch_size", "decisions per backward pass and rank (memory only)", min=1
    )
    clip: float = flag(0.2, "PPO clip of the action-level ratio (Eq. 2)", min=0)
    value_clip: float = flag(0.2, "clip of the value's change per update; 0 turns it off", min=0)
    gamma: float = flag(0.99, "discount per decision", min=0, max=1)
    gae_lambda: float = flag(0.95, "GAE's lambda", min=0, max=1)
    advantage_floor: float = flag(
        0.01,
        "no policy step where a rollout's advantages deviate less than this (in units of reward): with the sparse reward "
        "alone and without any success they are the critic's noise",
        min=0,
    )
    entropy_coef: float = flag(0.0, "entropy bonus", min=0)
    max_grad_norm: float = flag(1.0, "limit of the gradient's norm, of policy and of critic each", min=1e-6)
    target_kl: Optional[float] = flag(
        None, "stop a policy update beyond this KL of a mini-batch", default="off", min=1e-6
    )
    # Model
    lora_rank: int = flag(32, "rank of the adapters", min=1, max=4096)
    lora_alpha: int = flag(16, "their scale is alpha / rank", min=1)
    lora_targets: Optional[str] = by_size(
        "lora_targets",
        "linear layers with adapters; language freezes vision, whose features are then cached",
        choices=("all", "language"),
    )
    critic: str = flag(
        "adapter",
        "adapter: an own one on the same backbone; shared: the policy's; separate: on a second backbone (the paper's); "
        "none: its value is 0",
        choices=("adapter", "shared", "separate", "none"),
    )
    gradient_checkpointing: bool = flag(
        False, "recompute activations in the backward pass: less memory, a third slower"
    )
    # Curriculum and reward
    curriculum: Optional[str] = by_size(
        "curriculum",
        "task sampling. eq4: as printed, the less a task succeeds, the more often; frontier: most often near 50 % success",
        choices=("eq4", "frontier", "uniform"),
    )
    curriculum_tau: float = flag(0.5, "temperature of the curriculum", min=1e-6)
    prm_weight: float = flag(0.1, "weight of the RPRM score in the reward", min=0)
    prm_mode: Optional[str] = flag(
        None,
        "sum: weight x score per decision (the paper's at --prm-weight 1; docs/rprm.md shows how it was exploited); "
        "potential: difference of scores, which leaves the best policy the best; none",
        default="potential where there is an RPRM for the policy",
        choices=("sum", "potential", "none"),
    )
    # Measuring
    eval_every: Optional[int] = by_size(
        "eval_every", "iterations between evaluations; 0 = only at start and end", min=0
    )
    eval_temperature: Optional[float] = by_size(
        "eval_temperature", "of sampling in evaluations; 0 = greedy", min=0
    )
    start_episodes: int = flag(
        40,
        "episodes of the evaluation before training, spread over the tasks (1 to 50 of each); 0 = none (fewer: the first "
        "update comes sooner)",
        min=0,
    )
    eval_episodes: int = flag(100, "episodes per evaluation during training, spread likewise", min=1)
    final_episodes: int = flag(
        200, "episodes of the final comparison of start and trained policy, spread likewise", min=0
    )
    video_every: int = flag(20, "iterations between rollout videos; 0 = none", min=0)
    track: bool = flag(False, "also log to Weights & Biases (pip install wandb)")
    keep: int = flag(2, "checkpoints kept besides the best", min=1)


if __name__ == "__main__":
    # Before the imports below, which take seconds: --help and a mistyped flag answer at once.
    about = (
        "VLA-RL: PPO on the action tokens of OpenVLA in LIBERO, with a process reward model and a curriculum."
    )
    args = parse_args(Args, about)

import dataclasses
import math
from pathlib import Path

import numpy as np
import torch

from envs import Curriculum, LiberoVecEnv
from eval import NUM_INIT_STATES, evaluate
from models.checkpoints import resolve_checkpoint
from models.choose import choose_model
from models.memory import Needs, check_memory, choose_dtype
from policy import ActorCritic, OpenVLA
from ppo import PPOConfig, RolloutBuffer, ppo_update
from reward_model import load_reward_model, shaping_reward
from simulator.devices import share_of_machine
from simulator.render import check_egl, default_render
from simulator.suites import check_task_ids
from support.distributed import ALONE, ends_together, join
from support.errors import UserError, main_guard
from support.machine import seed_everything
from support.numerics import check_finite
from support.runs import Run


@main_guard
@ends_together
def main(args):
    ranks = join()  # this process among those of torchrun; alone, each of its methods is the identity
    run = Run(args, ranks)  # directory, checkpoints, metrics, films, signals
    args, size, reason = fill_defaults(run.args, ranks)  # with --resume, the settings of that run
    own = ranks.share(args.num_envs)  # the environments of this rank, in the numbering of all
    seed_everything(args.seed)

    # Models: one frozen OpenVLA with two LoRA adapters, the policy's and the critic's, and a value head (3.5).
    # Beside it a frozen reward model (3.4).
    policy = load_policy(args, ranks)
    unnorm_key = policy.unnorm_key_for(args.suite, args.unnorm_key)  # which action statistics
    actor_critic = ActorCritic(
        policy, args.lora_rank, args.lora_alpha, args.lora_targets, args.critic, args.whole_vocabulary
    )
    reward_model = load_reward_model(
        args.reward_model, actor_critic, args.prm_mode, unnorm_key, policy.dtype, ranks.device
    )
    if args.shard:
        actor_critic.shard(ranks)
    ranks.broadcast_([*actor_critic.policy_parameters(), *actor_critic.critic_parameters()])
    optimizers = adamw(actor_critic.policy_parameters()), adamw(actor_critic.critic_parameters())

    # Environments: N episodes at a time, of tasks that the curriculum chooses (Eq. 4).
    iterations = max(1, math.ceil(args.total_steps / (args.num_envs * args.num_steps)))
    run.make_directory()
    ranks.print0(banner(args, actor_critic, f"{size}: {reason}", ranks, iterations))
    curriculum = Curriculum(args.task_ids, args.curriculum, args.curriculum_tau)
    envs = LiberoVecEnv(
        args.suite, len(own), args.task_ids, action_repeat=policy.action_repeat, max_steps=args.max_episode_steps,
        render=args.render, seed=args.seed, init_states=args.init_states, curriculum=curriculum,
        timeout=args.worker_timeout, first_env=own.start, progress=ranks.is_main_process,
        **share_of_machine(ranks, args.num_workers, args.egl_devices),
    )  # fmt: skip

    # Storage of a rollout. Where the vision side is frozen, images are kept as its output, patch embeddings.
    image_kind = "patch_embeddings" if actor_critic.vision_frozen else "pixel_values"
    S, patches, width = policy.image_size, policy.num_patches, policy.text["hidden_size"]
    image_shape = (patches, width) if actor_critic.vision_frozen else (6, S, S)
    rollout = RolloutBuffer(args.num_steps, len(own), image_shape, image_kind, policy.dtype)
    # Generators: of the mini-batch order, and one per environment, so that no one's luck depends on the others.
    order = torch.Generator().manual_seed(args.seed)
    samplers = [torch.Generator().manual_seed(args.seed * 1_000_003 + i) for i in own]
    # Flags of the same name; value_coef and normalize_advantages have none and keep their defaults.
    settings = {f.name: getattr(args, f.name) for f in dataclasses.fields(PPOConfig) if hasattr(args, f.name)}
    ppo_config = PPOConfig(**settings)

    def observe(frames, instructions):
        """B frames and instructions -> what the models read: input_ids and attention_mask (B, L), and the images."""
        pixels = policy.preprocess(frames).to(policy.dtype)  # (B, 6, S, S)
        input_ids, attention_mask = policy.tokenize(instructions)
        seen = actor_critic.embed_images(pixels) if actor_critic.vision_frozen else pixels
        return {"input_ids": input_ids, "attention_mask": attention_mask, image_kind: seen}

    @torch.no_grad()
    def value_of(observation):
        """V (B,), outside of an update."""
        return actor_critic.value(**observation).float().cpu()

    def success(model, episodes, videos=None):
        """Success under the LIBERO protocol. Borrows the environments, which then go on where they were."""
        per_task = max(1, min(NUM_INIT_STATES, episodes // len(args.task_ids)))
        return evaluate(
            model, args.suite, args.task_ids, per_task, envs=envs, on_step=run.check, temperature=args.eval_temperature,
            whole_vocabulary=args.whole_vocabulary, seed=args.seed, video=int(videos is not None), video_dir=videos,
            progress=ranks.is_main_process, ranks=ranks, unnorm_key=unnorm_key,
        )  # fmt: skip

    with run:
        # Where an earlier run stopped, or the first episodes. Iteration 0: how good the start policy is.
        run.start(iterations, actor_critic, optimizers, order, samplers, envs, rollout)
        if run.start_evaluation_due():
            with actor_critic.start_policy() as start:
                run.log_start(success(start, args.start_episodes))

        for iteration in run.iterations():
            # Rollout: M decisions in each of N environments by the behaviour policy, its adapter merged (3.5).
            actor_critic.merge_for_rollout()
            obs = envs.observation()
            for t in range(args.num_steps):
                # o_t is a picture and an instruction. The policy answers with 7 tokens, the action; the critic with V.
                o = observe(obs["agentview"], obs["instruction"])
                rollout.store_observation(t, obs["agentview"], obs["instruction"], **o)
                tokens, log_probs, values = actor_critic.act(
                    **o, temperature=args.temperature, generator=samplers
                )
                rollout.store_decision(t, tokens, log_probs, values)
                actions = policy.decode_actions(tokens.cpu().numpy(), unnorm_key)  # (N, 7)
                run.lap("inference")

                # The environments carry it out. Where an episode ended, obs is the first of the next one.
                obs, reward, terminated, truncated, info = envs.step(actions)
                run.lap("environments", **envs.timing)

                # A time limit is not a terminal state: what would have followed is worth V(last observation).
                final_values = torch.zeros(len(own))
                ended = np.flatnonzero(truncated)
                rows = ranks.rows_in_step(ended, actor_critic.needs_all_ranks)
                if len(rows):
                    frames = last_frames(obs, info, rows)
                    o = observe(frames, [rollout.instructions[t][n] for n in rows])
                    final_values[rows] = value_of(o)
                    rollout.store_final_observations(t, ended, frames, o[image_kind])
                episode = info["task_id"], info["episode_length"], info["lost"]
                rollout.store_outcome(t, reward, terminated, truncated, final_values, *episode)
                run.check()  # Ctrl-C
            o = observe(obs["agentview"], obs["instruction"])
            rollout.store_observation(args.num_steps, obs["agentview"], obs["instruction"], **o)
            last_values = value_of(o)  # V_M, the bootstrap value
            run.lap("inference")

            # Curriculum: it counts the episodes of all ranks, in one order whoever played them.
            episodes = sorted(e for part in ranks.gather(rollout.finished_episodes(own.start)) for e in part)
            curriculum.update([(task_id, won) for _, _, task_id, won in episodes])
            run.lap("slowest_rank")

            # Reward = sparse + RPRM (3.4).
            scores, next_scores = reward_model.score_rollout(rollout, args.prm_mode)  # each (T, N)
            rollout.prm_scores = scores
            check_finite("RPRM score", scores)
            rollout.rewards = rollout.sparse_rewards + shaping_reward(
                scores, next_scores, args.prm_mode, args.prm_weight, args.gamma, rollout.terminated
            )
            run.lap("rprm")

            # Advantages by GAE. Then the update: the critic alone during warm-up (3.5), after it also Eq. 2.
            # (Learning rates follow from the iteration alone, so that a resumed run takes what config.json has now.)
            rollout.compute_advantages(last_values, args.gamma, args.gae_lambda)
            left = 1 - (iteration - 1) / iterations if args.lr_schedule == "linear" else 1.0
            for optimizer, lr in zip(optimizers, (args.lr, args.critic_lr), strict=True):
                optimizer.param_groups[0]["lr"] = lr * left
            train_policy = iteration > args.critic_warmup
            losses = ppo_update(actor_critic, rollout, *optimizers, ppo_config, train_policy, order, ranks)
            run.lap("update")

            # Evaluate when due, log, save.
            evaluation = None
            if run.evaluation_due():
                evaluation = success(actor_critic.evaluation_policy(), args.eval_episodes)
            run.log(losses, curriculum, args.lr * left, evaluation)
            run.save()
            run.check()

        # Before and after, on the same test episodes.
        actor_critic.save_policy(run.out / "policy")
        before = after = None
        if args.final_episodes:
            ranks.print0("evaluating start and trained policy on the same test episodes")
            with actor_critic.start_policy() as start:
                before = success(start, args.final_episodes, run.out / "videos/start")
            after = success(actor_critic.evaluation_policy(), args.final_episodes, run.out / "videos/trained")
        run.finish(before, after)
    envs.close()


def load_policy(args, ranks):
    """The frozen OpenVLA, once it is clear that what the run needs will fit into memory."""
    folder = resolve_checkpoint(args.model)
    dtype = choose_dtype(args.dtype, folder, ranks.device)
    here = dict(num_envs=args.num_envs // ranks.size, shards=ranks.size if args.shard else 1)
    check_memory(Needs.of_flags(folder, dtype, vars(args), **here), ranks.device)
    policy = OpenVLA.from_pretrained(folder, dtype=dtype, device="cpu" if args.shard else ranks.device)
    policy.gradient_checkpointing = args.gradient_checkpointing
    # Saved with the trained policy, so that eval.py samples it as this run did.
    if policy.config.get("sampling_temperature", 0.0) != args.eval_temperature:
        policy.config["sampling_temperature"] = args.eval_temperature
    return policy


def adamw(parameters):
    """The release's AdamW; main sets the learning rate at every iteration. Of no parameters (--critic none) too."""
    return torch.optim.AdamW([{"params": list(parameters)}], eps=1e-5, weight_decay=0.0)


def last_frames(obs, info, environments):
    """(n, H, W, 3): the last picture of the episode that was truncated in each of these n environments. (None: the row that
    `rows_in_step` adds so that all ranks compute together; nobody uses what comes of it.)"""
    final = info["final_obs"]
    return np.stack(
        [obs["agentview"][n] if final[n] is None else final[n]["agentview"] for n in environments]
    )


def fill_defaults(args, ranks=ALONE):
    """Fill the settings that depend on the model's size and on what there is; returns (args, size, reason)."""
    args.task_ids = check_task_ids(args.suite, args.task_ids)
    given = {name: value for name, value in vars(args).items() if value is not None}
    flags = DEFAULTS["7B"] | given
    flags |= dict(num_envs=max(1, flags["num_envs"] // ranks.size), shards=ranks.size if args.shard else 1)
    args.model, size, reason = choose_model(args.model, args.suite, flags)
    defaults = DEFAULTS[size] | (LONG_DEFAULTS[size] if args.suite.startswith(LONG_SUITES) else {})
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.reward_model == "auto":
        beside = Path(args.model).parent / "rprm"
        args.reward_model = str(beside) if size == "tiny" and beside.is_dir() else None
    if args.reward_model and Path(args.reward_model).expanduser().is_dir():
        args.reward_model = str(resolve_checkpoint(args.reward_model, "reward model"))
    if args.reward_model is None and args.prm_mode not in (None, "none"):
        raise UserError(
            "no RPRM for this policy: train one with `python -m scripts.rprm train`, give it with --reward-model, "
            "or turn it off with --prm-mode none"
        )
    if args.prm_weight == 0:
        args.prm_mode = "none"
    args.prm_mode = args.prm_mode or ("potential" if args.reward_model else "none")
    if args.critic == "none":
        args.critic_warmup = 0
    check_egl()
    args.render = args.render or default_render()  # in config.json: a resumed run keeps its pictures
    return args, size, reason


def banner(args, actor_critic, which, ranks, iterations):
    """The run in a few lines."""
    adapters = sum(p.numel() for p in actor_critic.policy_parameters()) / 1e6
    several = "" if ranks.size == 1 else f" on {ranks.size} ranks" + ", the backbone sharded" * args.shard
    rprm = ", no RPRM" if args.prm_mode == "none" else f" + {args.prm_weight} x RPRM ({args.prm_mode})"
    repeat = actor_critic.model.action_repeat
    warmup = f"warm-up {args.critic_warmup}" + " (ALL of them: the policy stays as it is)" * (
        args.critic_warmup >= iterations
    )
    lines = (
        f"VLA-RL  {args.suite}, tasks {','.join(map(str, args.task_ids))}",
        f"  policy     {args.model} ({which}), {ranks.device}{several}",
        f"  adapters   {adapters:.2f} M parameters on {args.lora_targets} layers; critic: {args.critic}",
        f"  reward     sparse{rprm}; curriculum {args.curriculum}, tau {args.curriculum_tau}",
        f"  rollout    {args.num_envs} environments x {args.num_steps} decisions of {repeat} control steps, "
        f"temperature {args.temperature}",
        f"  episodes   truncated at {args.max_episode_steps} control steps, {args.render} rendering",
        f"  PPO        {iterations} iterations, lr {args.lr:g} / critic {args.critic_lr:g} ({args.lr_schedule}), "
        f"{args.epochs} epochs of mini-batches of {args.minibatch_size}, {warmup}",
        f"  output     {args.out}",
    )
    return "\n".join(lines)


if __name__ == "__main__":
    main(args)
