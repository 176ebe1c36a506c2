"""VLA-RL: reinforcement learning of a vision-language-action policy on LIBERO (arXiv 2505.18719, Algorithm 1).

Read `main` from top to bottom; it is the algorithm:

    environments (envs.py)      N episodes at a time; a curriculum decides which task comes next (Eq. 4)
    policy and critic (policy.py)   one frozen OpenVLA, two LoRA adapters, a value head
    reward model (reward_model.py)  a frozen VLM that scores each decision; reward = sparse + weight x score
    repeat:
        rollout     M decisions in N environments; keep o, tokens, log-prob, value, reward
        advantages  GAE with the bootstrap value (ppo.py)
        update      critic only during warm-up, then PPO on action tokens (Eq. 1, Eq. 2)

    python train.py --suite libero_object                   # openvla-tiny, CPU, no download
    python train.py --resume runs/libero_object-seed0       # go on exactly where a run stopped

A "decision" is one action of the policy: `action_repeat` control steps of the simulator (4 for openvla-tiny, 1 for 7B).
"""

import json
import math
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Optional

import numpy as np

import runs
from common import UserError, atomic_write, main_guard, parse_args, seed_everything

# What differs between the two sizes. 7B: paper and release (shared hyper-parameters); tiny: found on 2 CPU cores.
DEFAULTS = {
    "tiny": dict(
        total_steps=102_400,
        num_envs=16,
        num_steps=32,
        max_episode_steps=160,
        lr=1e-3,
        critic_lr=1e-3,
        temperature=1.0,
        epochs=3,
        minibatch_size=128,
        micro_batch_size=128,
        lora_targets="language",
        eval_temperature=1.0,
    ),
    "7B": dict(
        total_steps=1_280_000,
        num_envs=10,
        num_steps=128,
        max_episode_steps=150,
        lr=2e-5,
        critic_lr=5e-5,
        temperature=1.5,
        epochs=1,
        minibatch_size=128,
        micro_batch_size=8,
        lora_targets="all",
        eval_temperature=0.0,
    ),
}


def _flag(value, text, /, **metadata):
    return field(default=value, metadata={"help": text, **metadata})


def _sized(name, text, /, **metadata):
    """A flag whose default depends on the model's size."""
    shown = [f"{size} {d[name]:,}" if isinstance(d[name], int) else f"{size} {d[name]}" for size, d in DEFAULTS.items()]
    return _flag(None, text, default="; ".join(shown), **metadata)


@dataclass
class Args:
    # What to train
    suite: str = _flag("libero_object", "LIBERO suite")
    task_ids: Optional[list[int]] = _flag(None, "tasks, as in 0,1,2", default="all of the suite", min=0)
    model: str = _flag(
        "auto",
        "policy to start from: auto, openvla-tiny, a checkpoint directory or a hub id. auto takes the suite's official "
        "OpenVLA-7B where a GPU with enough memory and the weights are there, else openvla-tiny",
    )
    reward_model: str = _flag(
        "auto",
        "RPRM checkpoint directory, or a stock VLM of transformers (directory or hub id), asked zero-shot; auto: the RPRM "
        "beside openvla-tiny's policy",
    )
    from_scratch: bool = _flag(False, "make openvla-tiny's policy and RPRM first (demos.py, sft.py, reward_model.py)")
    resume: Optional[str] = _flag(None, "run directory to continue; its own settings are used", default="none")
    out: Optional[str] = _flag(None, "run directory", default="runs/SUITE-seedSEED")
    seed: int = _flag(0, "seed of everything", min=0)
    # How much
    total_steps: Optional[int] = _sized("total_steps", "decisions in total, over all environments", min=1)
    num_envs: Optional[int] = _sized("num_envs", "environments N", min=1)
    num_steps: Optional[int] = _sized("num_steps", "decisions per environment and rollout M", min=1)
    max_episode_steps: Optional[int] = _sized("max_episode_steps", "control steps that cut a training episode", min=1)
    num_workers: Optional[int] = _flag(None, "simulator processes", default="one per core", min=1)
    render: Optional[str] = _flag(
        None, "simplified or exact meshes", default="light without a GPU, else exact", choices=("light", "exact")
    )
    init_states: str = _flag(
        "random", "training episodes: random placements, or the test states", choices=("random", "protocol")
    )
    # PPO
    lr: Optional[float] = _sized("lr", "learning rate of the policy adapter", min=0)
    critic_lr: Optional[float] = _sized("critic_lr", "learning rate of the critic", min=0)
    temperature: Optional[float] = _sized("temperature", "of sampling in rollouts; log-probs are taken at it", min=0.01)
    whole_vocabulary: bool = _flag(
        False,
        "sample among all tokens; the default keeps to the 256 action tokens, because at temperature 1.5 the tail of a "
        "32,000-word vocabulary is noise",
    )
    critic_warmup: int = _flag(5, "first iterations that train the critic only", min=0)
    epochs: Optional[int] = _sized("epochs", "passes over each rollout", min=1)
    minibatch_size: Optional[int] = _sized("minibatch_size", "decisions per optimiser step", min=1)
    micro_batch_size: Optional[int] = _sized("micro_batch_size", "decisions per backward pass (memory only)", min=1)
    clip: float = _flag(0.2, "PPO clip of the action-level ratio (Eq. 2)", min=0)
    value_clip: float = _flag(0.2, "clip of the value's change per update; 0 turns it off", min=0)
    gamma: float = _flag(0.99, "discount per decision", min=0, max=1)
    lam: float = _flag(0.95, "GAE's lambda", min=0, max=1)
    entropy_coef: float = _flag(0.0, "entropy bonus", min=0)
    max_grad_norm: float = _flag(1.0, "gradient norm limit", min=0)
    target_kl: Optional[float] = _flag(
        None, "stop a policy update beyond this KL of a mini-batch", default="off", min=0
    )
    # Model
    lora_rank: int = _flag(32, "rank of the adapters", min=1)
    lora_alpha: int = _flag(16, "their scale is alpha / rank", min=1)
    lora_targets: Optional[str] = _sized(
        "lora_targets",
        "linear layers with adapters; language freezes vision, whose features are then cached",
        choices=("all", "language"),
    )
    critic: str = _flag(
        "adapter",
        "critic: an own adapter on the same backbone, the policy's adapter, or a second backbone",
        choices=("adapter", "shared", "separate"),
    )
    gradient_checkpointing: bool = _flag(
        False, "recompute activations in the backward pass: less memory, a third slower"
    )
    # Curriculum and reward
    curriculum: str = _flag(
        "eq4",
        "task sampling: Eq. 4 as printed, most often near 50 % success, or uniform",
        choices=("eq4", "frontier", "uniform"),
    )
    curriculum_tau: float = _flag(0.5, "temperature of the curriculum", min=1e-6)
    prm_weight: float = _flag(0.02, "weight of the RPRM score in the reward", min=0)
    prm_mode: Optional[str] = _flag(
        None,
        "sum: weight x score per decision (the paper); potential: difference of scores; none",
        default="sum where there is an RPRM for the policy",
        choices=("sum", "potential", "none"),
    )
    # Measuring
    eval_every: int = _flag(40, "iterations between evaluations; 0 = only at the end", min=0)
    eval_temperature: Optional[float] = _sized("eval_temperature", "of sampling in evaluations; 0 = greedy", min=0)
    eval_episodes: int = _flag(100, "episodes per evaluation during training, spread over the tasks", min=1)
    final_episodes: int = _flag(500, "episodes of the final comparison of start and trained policy", min=0)
    video_every: int = _flag(40, "iterations between rollout videos; 0 = none", min=0)
    keep: int = _flag(2, "checkpoints kept besides the best", min=1)


TINY = Path(__file__).resolve().parent / "checkpoints"  # checkpoints/<suite>/{policy,rprm}
# Bytes: weights 15.0 GB, their merged copy for rollouts 14.5, adapters with optimiser 3.5, activations of a micro-batch
# of 8: 30 or, with --gradient-checkpointing, 2 (README has the sums).
GPU_MEMORY_7B = {False: 66e9, True: 44e9}
RPRM_CHUNK = 256  # decisions scored at a time


# --------------------------------------------------------------------------------------------------------------------
# Set-up
# --------------------------------------------------------------------------------------------------------------------


def choose_model(args):
    """Resolve `--model` to (path or hub id, size, reason)."""
    import torch

    tiny = TINY / args.suite / "policy"
    official = f"openvla/openvla-7b-finetuned-{args.suite.replace('_', '-')}"
    if args.model == "openvla-tiny":
        return str(tiny), "tiny", "asked for"
    if args.model != "auto":
        config = Path(args.model) / "config.json"
        small = config.is_file() and "vision_configs" in json.loads(config.read_text())
        return args.model, "tiny" if small else "7B", "asked for"
    if not torch.cuda.is_available():
        return str(tiny), "tiny", "no GPU"
    memory = torch.cuda.get_device_properties(0).total_memory
    needed = GPU_MEMORY_7B[args.gradient_checkpointing]
    if memory < needed:
        hint = "" if args.gradient_checkpointing else f" ({GPU_MEMORY_7B[True] / 1e9:.0f} with --gradient-checkpointing)"
        return str(tiny), "tiny", f"the GPU has {memory / 1e9:.0f} GB, OpenVLA-7B needs {needed / 1e9:.0f}{hint}"
    from huggingface_hub import try_to_load_from_cache

    if isinstance(try_to_load_from_cache(official, "config.json"), str):
        return official, "7B", "GPU and weights are there"
    return str(tiny), "tiny", f"a GPU, but no weights: `hf download {official}` fetches them"


def make_from_scratch(args, root):
    """The three commands that make openvla-tiny's checkpoints, run one after the other."""
    tasks = [] if args.task_ids is None else ["--task-ids", ",".join(map(str, args.task_ids))]
    here = Path(__file__).resolve().parent
    for command in (
        ["demos.py", "--suite", args.suite, *tasks, "--out", str(root / "data"), "--seed", str(args.seed)],
        [
            "sft.py",
            "--suite",
            args.suite,
            "--data",
            str(root / "data"),
            "--out",
            str(root / "policy"),
            "--seed",
            str(args.seed),
        ],
        [
            "reward_model.py",
            "train",
            "--suite",
            args.suite,
            "--demos",
            str(root / "data" / args.suite),
            "--policy",
            str(root / "policy"),
            "--out",
            str(root / "rprm"),
            "--seed",
            str(args.seed),
        ],
    ):
        print("\n$ python " + " ".join(command), flush=True)
        if code := subprocess.run([sys.executable, str(here / command[0]), *command[1:]]).returncode:
            raise UserError(f"`python {' '.join(command)}` failed with exit code {code}")
    return str(root / "policy"), str(root / "rprm")


def resolve(args):
    """Fill the settings that depend on the model's size; returns (args, size, reason)."""
    args.model, size, reason = choose_model(args)
    for name, value in DEFAULTS[size].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.reward_model == "auto":
        args.reward_model = str(Path(args.model).parent / "rprm") if size == "tiny" else None
    if args.reward_model is None and args.prm_mode not in (None, "none"):
        raise UserError(
            "no RPRM for this policy: train one with `python reward_model.py train`, give it with --reward-model, "
            "or turn it off with --prm-mode none"
        )
    args.prm_mode = args.prm_mode or ("sum" if args.reward_model else "none")  # the banner says which
    return args, size, reason


# --------------------------------------------------------------------------------------------------------------------
# Reward model in the loop
# --------------------------------------------------------------------------------------------------------------------


def score_rollout(reward_model, buffer, mode, last_observation, final_images, shared):
    """RPRM scores of a whole rollout in a few large batches, off the critical path of the environment step.

    Returns (scores, next_scores), each (T, N). `sum` scores the action taken in o_t; `potential` needs the score of the state
    alone, of o_t and of the observation that followed (the final one where the time limit cut the episode).
    final_images: {(t, n): image} of those. last_observation: (images, input_ids, attention_mask) after the last step.
    """
    import torch

    T, N = buffer.rewards.shape
    kind = "patch_embeddings" if shared else "pixel_values"
    scores, following = torch.zeros(T * N), torch.zeros(T, N)
    for rows in torch.arange(T * N).split(RPRM_CHUNK):
        observation, tokens, *_ = buffer.batch(rows, reward_model.model.device)
        images = {kind: observation[buffer.image_kind]}
        tokens = tokens if mode == "sum" else None
        scores[rows] = reward_model.score(
            observation["input_ids"], observation["attention_mask"], tokens, **images
        ).cpu()
    scores = scores.view(T, N)
    if mode == "potential":
        images, ids, mask = last_observation
        following[:-1] = scores[1:]
        following[-1] = reward_model.score(ids, mask, None, **{kind: images}).cpu()
        for (t, n), image in final_images.items():
            length = int(buffer.attention_mask[t, n].sum())
            ids, mask = buffer.input_ids[t, n : n + 1, :length], buffer.attention_mask[t, n : n + 1, :length]
            device = reward_model.model.device
            following[t, n] = reward_model.score(
                ids.to(device), mask.to(device), None, **{kind: image[None].to(device)}
            ).item()
    return scores, following


def score_frames(vlm, watched, last, final_frames, mode):
    """`score_rollout` for a stock VLM, which sees pictures and no action: (scores, next_scores), each (T, N).

    watched: of each of the T decisions (frames (N, H, W, 3) uint8, N instructions); last: the same after the last step.
    final_frames: {(t, n): frame} where the time limit cut an episode.
    """
    import torch

    seen = [*watched, last] if mode == "potential" else watched
    frames = np.concatenate([frames for frames, _ in seen])
    instructions = [text for _, texts in seen for text in texts]
    scores = torch.from_numpy(vlm.score_rows(frames, instructions)).float().view(len(seen), -1)
    scores, following = scores[: len(watched)], scores[1:].clone()
    if mode == "sum":
        return scores, torch.zeros_like(scores)
    for (t, n), frame in final_frames.items():
        following[t, n] = vlm.score_rows(frame[None], [watched[t][1][n]]).item()
    return scores, following


# --------------------------------------------------------------------------------------------------------------------
# Algorithm 1
# --------------------------------------------------------------------------------------------------------------------


@main_guard
def main():
    args = parse_args(
        Args, "VLA-RL: PPO on the action tokens of OpenVLA in LIBERO, with a process reward model and a curriculum."
    )
    resumed = args.resume is not None
    if resumed:
        out = Path(args.resume)
        try:
            saved = json.loads((out / "config.json").read_text())
            args = Args(**{f.name: saved[f.name] for f in fields(Args)})
        except (OSError, ValueError, KeyError) as exc:
            raise UserError(f"cannot resume {out}: no readable config.json there ({type(exc).__name__})") from exc

    import torch

    import sim
    from envs import Curriculum, LiberoVecEnv
    from eval import evaluate
    from policy import ActorCritic, OpenVLA, explain_out_of_memory
    from ppo import PPOConfig, RolloutBuffer, ppo_update
    from reward_model import StockVLM, load_reward_model, shaping_reward

    if not resumed:
        args.out = args.out or f"runs/{args.suite}-seed{args.seed}"
        if (Path(args.out) / "config.json").exists():
            raise UserError(
                f"{args.out} already holds a run: continue it with --resume {args.out}, or choose another --out"
            )
        if args.from_scratch:
            args.model, args.reward_model = make_from_scratch(args, Path(args.out) / "start")
            args.from_scratch = False
        args, size, reason = resolve(args)
        args.task_ids = sim.check_task_ids(args.suite, args.task_ids)
        out = Path(args.out)
        for what, path in (
            ("policy", args.model),
            ("reward model", args.reward_model if args.prm_mode != "none" else None),
        ):
            if path and path.startswith(str(TINY)) and not Path(path).is_dir():
                raise UserError(
                    f"no {what} at {path}. `python train.py --suite {args.suite} --from-scratch` makes it; so do `python demos.py "
                    f"--suite {args.suite}`, `python sft.py --suite {args.suite} --out {TINY / args.suite / 'policy'}` and `python "
                    f"reward_model.py train --suite {args.suite} --demos data/{args.suite} --out {TINY / args.suite / 'rprm'}`"
                )
    else:
        size, reason = choose_model(args)[1], "resumed"
    sim.check_egl()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" and size == "7B" else torch.float32
    render = args.render or ("exact" if device == "cuda" else "light")
    seed_everything(args.seed)
    generator = torch.Generator().manual_seed(args.seed)  # mini-batch order
    # Action sampling: one generator per environment, so that no environment's luck depends on the others.
    samplers = [torch.Generator().manual_seed(args.seed * 1_000_003 + i) for i in range(args.num_envs)]

    # ---- models ------------------------------------------------------------------------------------------------------
    policy_base = OpenVLA.from_pretrained(args.model, dtype=dtype, device=device)
    policy_base.decode_actions(
        np.zeros((1, 7), int), args.suite
    )  # no action statistics of this suite: fail here, not after minutes
    policy_base.gradient_checkpointing = args.gradient_checkpointing
    actor_critic = ActorCritic(
        policy_base, args.lora_rank, args.lora_alpha, args.lora_targets, args.critic, args.whole_vocabulary
    )
    policy_optimizer = torch.optim.AdamW(actor_critic.policy_parameters(), lr=args.lr, eps=1e-5, weight_decay=0.0)
    critic_optimizer = torch.optim.AdamW(
        actor_critic.critic_parameters(), lr=args.critic_lr, eps=1e-5, weight_decay=0.0
    )
    reward_model, stock, shared = None, False, False
    if args.prm_mode != "none" and args.prm_weight > 0:
        reward_model = load_reward_model(args.reward_model, dtype=dtype, device=device)
        stock = isinstance(reward_model, StockVLM)  # judges frames, not what the policy's towers made of them
    if reward_model is not None and not stock:
        shared = actor_critic.vision_frozen and reward_model.shares_vision(policy_base)  # one vision pass serves both
        if actor_critic.vision_frozen and not shared:
            raise UserError(
                f"{args.reward_model} has other vision weights than {args.model}: train it from that policy with "
                "`reward_model.py train --policy …`, or use --lora-targets all"
            )

    # ---- environments ------------------------------------------------------------------------------------------------
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise UserError(f"cannot write to {out}: {exc.strerror}; choose another --out") from exc
    batch = args.num_envs * args.num_steps
    iterations = max(1, math.ceil(args.total_steps / batch))
    trainable = sum(p.numel() for p in actor_critic.policy_parameters()) / 1e6
    print(
        f"VLA-RL  {args.suite}, tasks {','.join(map(str, args.task_ids))}\n"
        f"  policy     {args.model} ({size}: {reason}), {trainable:.2f} M adapter parameters on {args.lora_targets} layers, {device}\n"
        f"  reward     sparse + {args.prm_weight} x RPRM ({args.prm_mode})   curriculum {args.curriculum}, tau {args.curriculum_tau}\n"
        f"  rollout    {args.num_envs} environments x {args.num_steps} decisions of {policy_base.action_repeat} control steps, "
        f"temperature {args.temperature}, episodes cut at {args.max_episode_steps} control steps, {render} rendering\n"
        f"  PPO        {iterations} iterations, lr {args.lr:g} / critic {args.critic_lr:g}, {args.epochs} epochs of mini-batches of "
        f"{args.minibatch_size}, warm-up {args.critic_warmup}\n  output     {out}",
        flush=True,
    )
    curriculum = Curriculum(args.task_ids, args.curriculum, args.curriculum_tau, deferred=True)
    envs = LiberoVecEnv(
        args.suite,
        args.num_envs,
        args.task_ids,
        action_repeat=policy_base.action_repeat,
        max_steps=args.max_episode_steps,
        render=render,
        num_workers=args.num_workers,
        seed=args.seed,
        init_states=args.init_states,
        curriculum=curriculum,
    )
    stop = runs.Stop()

    def merged_policy():
        """The policy as one plain model: the copy that rollouts use where they use one, because 7B twice is enough."""
        return actor_critic.merge_policy() if args.critic == "shared" else actor_critic.merge_for_rollout()

    def measure(model, episodes):
        per_task = max(1, min(50, episodes // len(args.task_ids)))
        return evaluate(
            model,
            args.suite,
            args.task_ids,
            per_task,
            envs=envs,
            on_episode=stop.check,
            temperature=args.eval_temperature,
            whole_vocabulary=args.whole_vocabulary,
            seed=args.seed,
            progress=sys.stderr.isatty(),
        )

    # ---- state of the run --------------------------------------------------------------------------------------------
    image_kind = "patch_embeddings" if actor_critic.vision_frozen else "pixel_values"
    S, d = policy_base.image_size, policy_base.text["hidden_size"]
    shape = (policy_base.num_patches, d) if actor_critic.vision_frozen else (6, S, S)
    buffer = RolloutBuffer(args.num_steps, args.num_envs, shape, image_kind, image_dtype=dtype)
    cfg = PPOConfig(
        temperature=args.temperature,
        epochs=args.epochs,
        minibatch_size=args.minibatch_size,
        micro_batch_size=args.micro_batch_size,
        clip=args.clip,
        value_clip=args.value_clip,
        entropy_coef=args.entropy_coef,
        max_grad_norm=args.max_grad_norm,
        target_kl=args.target_kl,
    )
    first, best, best_rate, lines = 1, -1, -1.0, []  # no checkpoint is the best before one was evaluated
    if resumed:
        state = runs.load_checkpoint(out, actor_critic)
        policy_optimizer.load_state_dict(state["policy_optimizer"])
        critic_optimizer.load_state_dict(state["critic_optimizer"])
        generator.set_state(state["generator"])
        for sampler, saved_sampler in zip(samplers, state["samplers"], strict=True):
            sampler.set_state(saved_sampler)
        obs = envs.set_state(runs.to_numpy(state["envs"]))
        first, best, best_rate = state["iteration"] + 1, state["best"], state["best_rate"]
        for line in (out / "metrics.jsonl").read_text().splitlines():
            try:
                m = json.loads(line)
            except ValueError:
                break  # half a line: the crash came while it was written
            if m["iteration"] <= state["iteration"]:
                lines.append(m)
        print(f"resumed at iteration {first} of {iterations}")
    else:
        atomic_write(out / "config.json", json.dumps(asdict(args), indent=1))
        obs, _ = envs.reset(seed=args.seed)
    metrics_log = runs.Metrics(out, lines)

    def observe(obs, rows=slice(None), frames=None):
        """Frames and instructions -> what the models read: images (B, P, d) or (B, 6, S, S), input_ids, attention_mask (B, L)."""
        frames = obs["agentview"][rows] if frames is None else frames
        pixels = policy_base.preprocess(frames).to(dtype)
        images = actor_critic.embed_images(pixels) if actor_critic.vision_frozen else pixels
        return images, *policy_base.tokenize([obs["instruction"][i] for i in np.arange(args.num_envs)[rows]])

    def save(iteration):
        runs.save_checkpoint(
            out,
            iteration,
            actor_critic,
            {
                "iteration": iteration,
                "best": best,
                "best_rate": best_rate,
                "policy_optimizer": policy_optimizer.state_dict(),
                "critic_optimizer": critic_optimizer.state_dict(),
                "generator": generator.get_state(),
                "samplers": torch.stack([sampler.get_state() for sampler in samplers]),
                "envs": runs.to_tensors(envs.get_state()),
            },
            args.keep,
            best,
        )

    if not resumed:
        save(0)
    pace = []

    # ---- Algorithm 1 -------------------------------------------------------------------------------------------------
    try:
        if args.eval_every and first == 1:  # measured before anything is learnt
            result = measure(merged_policy(), args.eval_episodes)
            print(
                f"start policy: {100 * result.success_rate:.1f} % of {len(result.episodes)} test episodes", flush=True
            )
            best, best_rate = 0, result.success_rate
            start_measured = {
                "eval/at": 0,
                "eval/successes": sum(e["success"] for e in result.episodes),
                "eval/episodes": len(result.episodes),
                "eval/success_rate": result.success_rate,
            }
        for iteration in range(first, iterations + 1):
            began = time.time()
            times = dict(inference=0.0, physics=0.0, render=0.0, wait=0.0)
            wins, episodes, lengths, cut = 0, 0, [], 0
            final_images, final_frames, watched, film = {}, {}, [], []
            filming = args.video_every and (iteration % args.video_every == 0 or iteration == 1)
            if actor_critic.critic != "shared":
                actor_critic.merge_for_rollout()

            # Rollout: M decisions in each of N environments.
            for t in range(args.num_steps):
                clock = time.time()
                images, input_ids, mask = observe(obs)
                tokens, log_probs, values = actor_critic.act(
                    input_ids, mask, **{image_kind: images}, temperature=args.temperature, generator=samplers
                )
                buffer.store_decision(
                    t, images.cpu(), input_ids.cpu(), mask.cpu(), tokens.cpu(), log_probs.cpu(), values.cpu()
                )
                actions = policy_base.decode_actions(tokens.cpu().numpy(), args.suite)  # (N, 7)
                times["inference"] += time.time() - clock
                if filming:
                    film.append(obs["agentview"][0].copy())
                previous = obs["instruction"]
                if stock:
                    watched.append((obs["agentview"].copy(), previous))
                obs, rewards, terminated, truncated, info = envs.step(actions)
                for key in ("physics", "render", "wait"):
                    times[key] += info["timing"][key]

                # A cut episode did not end: its value goes on from the observation that really was its last. (For an
                # episode lost with its worker that is the last one known, the one this decision was made on.)
                final_values = torch.zeros(args.num_envs)
                rows = np.flatnonzero(truncated)
                if len(rows):
                    final = {"instruction": previous}
                    images, input_ids, mask = observe(final, rows, info["final_obs"]["agentview"][rows])
                    with torch.no_grad():
                        final_values[rows] = actor_critic.value(input_ids, mask, **{image_kind: images}).float().cpu()
                    final_images.update({(t, int(n)): image for n, image in zip(rows, images.cpu(), strict=True)})
                    final_frames.update({(t, int(n)): info["final_obs"]["agentview"][n].copy() for n in rows})
                buffer.store_outcome(
                    t,
                    torch.from_numpy(rewards),
                    torch.from_numpy(terminated),
                    torch.from_numpy(truncated),
                    final_values,
                )
                ended = terminated | truncated
                wins, episodes, cut = (
                    wins + int(terminated.sum()),
                    episodes + int(ended.sum()),
                    cut + int(info["worker_restarted"].sum()),
                )
                lengths += info["episode_length"][ended].tolist()
                stop.check()
            last_observation = observe(obs)
            with torch.no_grad():
                last_values = (
                    actor_critic.value(*last_observation[1:], **{image_kind: last_observation[0]}).float().cpu()
                )
            curriculum.commit()
            rollout_time = time.time() - began

            # Reward = sparse + RPRM (section 3.4), then advantages.
            clock = time.time()
            scores = torch.zeros_like(buffer.rewards)
            sparse_return = buffer.rewards.sum().item()
            if reward_model is not None:
                if stock:
                    last = obs["agentview"], obs["instruction"]
                    scores, following = score_frames(reward_model, watched, last, final_frames, args.prm_mode)
                else:
                    scores, following = score_rollout(
                        reward_model, buffer, args.prm_mode, last_observation, final_images, shared
                    )
                buffer.prm_scores = scores
                buffer.rewards += shaping_reward(
                    scores, following, args.prm_mode, args.prm_weight, args.gamma, buffer.terminated
                )
            buffer.finish(last_values, args.gamma, args.lam)
            times["rprm"] = time.time() - clock

            # Update: the critic alone during warm-up, then policy and critic.
            clock = time.time()
            with explain_out_of_memory("lower --micro-batch-size, or turn on --gradient-checkpointing"):
                update = ppo_update(
                    actor_critic, buffer, policy_optimizer, critic_optimizer, cfg, iteration > args.critic_warmup, generator
                )
            times["update"] = time.time() - clock

            m = {
                "iteration": iteration,
                "charts/decisions": iteration * batch,
                "charts/episodes": episodes,
                "charts/successes": wins,
                "charts/success_rate": wins / episodes if episodes else 0.0,
                "charts/episodic_length": float(np.mean(lengths)) if lengths else 0.0,
                "charts/sparse_return": sparse_return / args.num_envs,
                "charts/prm_score": scores.mean().item(),
                "charts/reward": buffer.rewards.mean().item(),
                "charts/value": buffer.values.mean().item(),
                "charts/worker_restarts": cut,
                **update,
                **{
                    f"curriculum/task_{t}": p
                    for t, p in zip(args.task_ids, curriculum.probabilities().tolist(), strict=True)
                },
                "time/rollout": rollout_time,
                **{f"time/{k}": v for k, v in times.items()},
                "charts/SPS": batch / (time.time() - began),
            }
            if filming and film:
                ended = buffer.terminated[:, 0].int() - buffer.truncated[:, 0].int()
                runs.write_video(
                    out / "videos" / f"rollout_{iteration:05d}.mp4",
                    film,
                    buffer.rewards[:, 0].tolist(),
                    buffer.values[:, 0].tolist(),
                    scores[:, 0].tolist(),
                    ended.tolist(),
                    fps=20 / policy_base.action_repeat,
                )
            if iteration == 1 and args.eval_every:
                m.update(start_measured)
            elif args.eval_every and iteration % args.eval_every == 0 and iteration < iterations:
                result = measure(merged_policy(), args.eval_episodes)
                k, n = sum(e["success"] for e in result.episodes), len(result.episodes)
                m.update({"eval/success_rate": k / n, "eval/successes": k, "eval/episodes": n})
                if k / n > best_rate:
                    best, best_rate = iteration, k / n
            pace.append(time.time() - began)
            metrics_log.write(m)
            save(iteration)
            if "eval/episodes" in m or iteration % 10 == 0:
                runs.plot_curve(metrics_log.lines, out / "success.png", f"{args.suite}, seed {args.seed}")
            print(runs.terminal_line(m, iterations, float(np.mean(pace[-20:])) * (iterations - iteration)), flush=True)
            stop.check()

        # ---- before and after ------------------------------------------------------------------------------------------
        trained = merged_policy()
        trained.save_pretrained(out / "policy")
        if args.final_episodes:
            rows = {}
            for name, model in (("start", actor_critic.start_policy()), ("trained", trained)):
                rows[name] = measure(model, args.final_episodes).to_dict()
            atomic_write(out / "results.json", json.dumps(rows, indent=1))
            print(runs.before_after_table(rows), flush=True)
            total = rows["trained"]["total"]
            metrics_log.lines[-1] = {
                **metrics_log.lines[-1],
                "eval/at": iterations * batch,
                "eval/successes": total["successes"],
                "eval/episodes": total["episodes"],
            }
        runs.plot_curve(metrics_log.lines, out / "success.png", f"{args.suite}, seed {args.seed}")
        print(f"policy: {out / 'policy'}   curve: {out / 'success.png'}   videos: {out / 'videos'}")
    except KeyboardInterrupt:
        print(
            f"stopped; every finished iteration is saved. Go on with: python train.py --resume {out}", file=sys.stderr
        )
        sys.exit(130)
    finally:
        metrics_log.close()
        envs.close()


if __name__ == "__main__":
    main()
