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
    torchrun --nproc-per-node 8 train.py --num-envs 80      # the same on 8 GPUs (distributed.py, README: Many GPUs)

A "decision" is one action of the policy: `action_repeat` control steps of the simulator (4 for openvla-tiny, 1 for 7B).
"""

import contextlib
import functools
import itertools
import json
import math
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Optional

import numpy as np

from support import distributed
from support import report, runs
from support.cli import parse_args, parse_settings
from support.errors import main_guard, UserError
from support.files import atomic_write, fingerprint, read_json
from support.machine import seed_everything

# What differs between the two sizes. 7B: paper and release (shared hyper-parameters); tiny: found on 2 CPU cores.
DEFAULTS = {
    "tiny": dict(
        total_steps=40_960,
        num_envs=16,
        num_steps=32,
        max_episode_steps=160,
        lr=1e-3,
        critic_lr=1e-3,
        lr_schedule="linear",
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
        lr_schedule="constant",
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
    reward_model: Optional[str] = _flag(
        "auto",
        "RPRM checkpoint directory (tiny, or a tuned VLM), or a stock VLM of transformers (directory or hub id), asked "
        "zero-shot; auto: the RPRM beside openvla-tiny's policy",
    )
    from_scratch: bool = _flag(False, "make openvla-tiny's policy and RPRM first (demos.py, sft.py, reward_model.py)")
    resume: Optional[str] = _flag(None, "run directory to continue; its own settings are used", default="none")
    out: Optional[str] = _flag(None, "run directory", default="runs/SUITE-seedSEED")
    seed: int = _flag(0, "seed of everything", min=0, max=2**32 - 1)
    # How much
    total_steps: Optional[int] = _sized("total_steps", "decisions in total, over all environments", min=1)
    num_envs: Optional[int] = _sized("num_envs", "environments N, over all ranks", min=1, max=10_000)
    num_steps: Optional[int] = _sized("num_steps", "decisions per environment and rollout M", min=1, max=100_000)
    groups: int = _flag(
        1,
        "without effect: environments no longer take turns in groups",
        min=1,
    )
    max_episode_steps: Optional[int] = _sized("max_episode_steps", "control steps that cut a training episode", min=1)
    num_workers: Optional[int] = _flag(None, "simulator processes of a rank", default="one per core", min=1)
    worker_timeout: float = _flag(
        60.0, "seconds for one command until a busy simulator process is replaced; one that stands still: 5", min=1
    )
    egl_devices: Optional[list[int]] = _flag(
        None, "EGL devices that render, shared out among a machine's ranks", default="the GPU that a rank computes on", min=0
    )
    shard: bool = _flag(
        False, "spread the frozen backbone over the ranks (FSDP2), for a GPU that cannot hold it; with one rank nothing changes"
    )
    render: Optional[str] = _flag(
        None, "simplified or exact meshes", default="exact where a GPU renders, else light", choices=("light", "exact")
    )
    init_states: str = _flag(
        "random", "training episodes: random placements, or the test states", choices=("random", "protocol")
    )
    # PPO
    lr: Optional[float] = _sized("lr", "learning rate of the policy adapter", min=0)
    critic_lr: Optional[float] = _sized("critic_lr", "learning rate of the critic", min=0)
    lr_schedule: Optional[str] = _sized(
        "lr_schedule", "both learning rates: constant, or linear from these values to 0 over the run", choices=("constant", "linear")
    )
    temperature: Optional[float] = _sized("temperature", "of sampling in rollouts; log-probs are taken at it", min=0.01)
    whole_vocabulary: bool = _flag(
        False,
        "sample among all tokens; the default keeps to the 256 action tokens, because at temperature 1.5 the tail of a "
        "32,000-word vocabulary is noise",
    )
    critic_warmup: int = _flag(5, "first iterations that train the critic only", min=0)
    epochs: Optional[int] = _sized("epochs", "passes over each rollout", min=1)
    minibatch_size: Optional[int] = _sized("minibatch_size", "decisions per optimiser step", min=1)
    micro_batch_size: Optional[int] = _sized("micro_batch_size", "decisions per backward pass and rank (memory only)", min=1)
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
    lora_rank: int = _flag(32, "rank of the adapters", min=1, max=4096)
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
    prm_weight: float = _flag(0.1, "weight of the RPRM score in the reward", min=0)
    prm_mode: Optional[str] = _flag(
        None,
        "sum: weight x score per decision (the paper; README shows how it was exploited); potential: difference of scores, "
        "which leaves the best policy the best; none",
        default="potential where there is an RPRM for the policy",
        choices=("sum", "potential", "none"),
    )
    # Measuring
    eval_every: int = _flag(20, "iterations between evaluations; 0 = only at the end", min=0)
    eval_temperature: Optional[float] = _sized("eval_temperature", "of sampling in evaluations; 0 = greedy", min=0)
    eval_episodes: int = _flag(100, "episodes per evaluation during training, spread over the tasks", min=1)
    final_episodes: int = _flag(500, "episodes of the final comparison of start and trained policy", min=0)
    video_every: int = _flag(20, "iterations between rollout videos; 0 = none", min=0)
    keep: int = _flag(2, "checkpoints kept besides the best", min=1)


TINY = Path(__file__).resolve().parent / "checkpoints"  # checkpoints/<suite>/{policy,rprm}
# Bytes: weights 15.0 GB, their merged copy for rollouts 14.5, adapters with optimiser 3.5, activations of a micro-batch
# of 8: 30 or, with --gradient-checkpointing, 2 (README has the sums).
GPU_MEMORY_7B = {False: 66e9, True: 44e9}
RPRM_CHUNK = 256  # decisions scored at a time


# --------------------------------------------------------------------------------------------------------------------
# Set-up
# --------------------------------------------------------------------------------------------------------------------


def downloaded(repo_id, cache=None):
    """Are all shards of this repository in the hub's cache (default: its usual place)? An interrupted download is not."""
    from huggingface_hub import try_to_load_from_cache

    def path(name):  # None or a mark where it is not there
        found = try_to_load_from_cache(repo_id, name, cache_dir=cache)
        return found if isinstance(found, str) else None

    index = path("model.safetensors.index.json")
    shards = read_json(index).get("weight_map") if index else None
    return isinstance(shards, dict) and len(shards) > 0 and all(path(name) for name in shards.values())


def choose_model(args):
    """Resolve `--model` to (path or hub id, size, reason)."""
    import torch

    tiny = TINY / args.suite / "policy"
    official = f"openvla/openvla-7b-finetuned-{args.suite.replace('_', '-')}"
    if args.model == "openvla-tiny":
        return str(tiny), "tiny", "asked for"
    if args.model != "auto":
        config = Path(args.model) / "config.json"
        small = config.is_file() and "vision_configs" in read_json(config)
        return args.model, "tiny" if small else "7B", "asked for"
    if not torch.cuda.is_available():
        return str(tiny), "tiny", "no GPU"
    memory = torch.cuda.get_device_properties(0).total_memory
    needed = GPU_MEMORY_7B[args.gradient_checkpointing]
    if memory < needed:
        hint = "" if args.gradient_checkpointing else f" ({GPU_MEMORY_7B[True] / 1e9:.0f} with --gradient-checkpointing)"
        return str(tiny), "tiny", f"the GPU has {memory / 1e9:.0f} GB, OpenVLA-7B needs {needed / 1e9:.0f}{hint}"
    if downloaded(official):
        return official, "7B", "GPU and weights are there"
    return str(tiny), "tiny", f"a GPU, but no weights: `hf download {official}` fetches them"


def make_from_scratch(args, root):
    """The commands that make openvla-tiny's checkpoints, run one after the other; returns (policy, reward model)."""
    tasks = [] if args.task_ids is None else ["--task-ids", ",".join(map(str, args.task_ids))]
    data, rollouts, policy, rprm = root / "data", root / "rollouts", root / "policy", root / "rprm"

    def script(*command, seed=args.seed):
        command = [*map(str, command), "--suite", args.suite, "--seed", str(seed)]
        print("\n$ python " + " ".join(command), flush=True)
        path = Path(__file__).resolve().parent / command[0]
        if code := subprocess.run([sys.executable, str(path), *command[1:]]).returncode:
            raise UserError(f"`python {' '.join(command)}` failed with exit code {code}")

    script("demos.py", *tasks, "--out", data)
    script("sft.py", "--data", data, "--out", policy)
    script("reward_model.py", "record", *tasks, "--policy", policy, "--out", rollouts, seed=args.seed + 1)
    both = (("--successes", rollouts / "success"), ("--failures", rollouts / "failure"))
    more = [x for flag, directory in both if directory.is_dir() for x in (flag, directory)]  # there may be none of a kind
    script("reward_model.py", "train", "--demos", data / args.suite, *more, "--policy", policy, "--out", rprm)
    return str(policy), str(rprm)


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
    args.prm_mode = args.prm_mode or ("potential" if args.reward_model else "none")  # the banner says which
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


def in_one_order(parts):
    """Curriculum outcomes of all ranks, each a list of (decision, environment, outcome), in the order that one process
    without groups would count them: by decision, then by environment in the numbering of all ranks."""
    return [outcome for *_, outcome in sorted((x for part in parts for x in part), key=lambda x: x[:2])]


def score_frames(vlm, watched, last, final_frames, mode, levels=None):
    """`score_rollout` for a VLM, which sees pictures and words: (scores, next_scores), each (T, N).

    watched: of each of the T decisions (frames (N, H, W, 3) uint8, N instructions); last: the same after the last step.
    final_frames: {(t, n): frame} where the time limit cut an episode. levels (T, N, 7): the actions, which a tuned VLM is
    shown in mode `sum`.
    """
    import torch

    seen = [*watched, last] if mode == "potential" else watched
    frames = np.concatenate([frames for frames, _ in seen])
    instructions = [text for _, texts in seen for text in texts]
    levels = levels.flatten(0, 1) if mode == "sum" and levels is not None else None
    scores = torch.from_numpy(vlm.score_frames(frames, instructions, levels)).float().view(len(seen), -1)
    scores, following = scores[: len(watched)], scores[1:].clone()
    if mode == "sum":
        return scores, torch.zeros_like(scores)
    for (t, n), frame in final_frames.items():
        following[t, n] = vlm.score_frames(frame[None], [watched[t][1][n]]).item()
    return scores, following


# --------------------------------------------------------------------------------------------------------------------
# Algorithm 1
# --------------------------------------------------------------------------------------------------------------------


@main_guard
@distributed.ends_together
def main():
    args = parse_args(
        Args, "VLA-RL: PPO on the action tokens of OpenVLA in LIBERO, with a process reward model and a curriculum."
    )
    world = distributed.join()
    say = functools.partial(print, flush=True) if world.first else lambda *_, **__: None
    out = Path(args.out or f"runs/{args.suite}-seed{args.seed}")
    # By torchrun, after a rank had died. (On the nodes that lost no rank, it does not count that as a restart.)
    restarted = world.any(distributed.restarted_after(out / "config.json"))
    if restarted and args.resume is None and any(p.name.isdigit() for p in (out / "checkpoints").glob("*")):
        args.resume = str(out)
    resumed = args.resume is not None
    if resumed:
        out = Path(args.resume)
        args = parse_settings(Args, read_json(out / "config.json"), out / "config.json")
    else:
        out = Path(args.out or f"runs/{args.suite}-seed{args.seed}")
        args.out = str(out)
    stop = runs.Stop(out, say)

    import torch

    from simulator.render import check_egl, default_render
    from simulator.suites import check_task_ids
    from envs import Curriculum, LiberoVecEnv, merge_states, split_state
    from eval import evaluate
    from policy import ActorCritic, OpenVLA, explain_out_of_memory
    from ppo import NumericsError, PPOConfig, RolloutBuffer, check_finite, ppo_update
    from reward_model import read_reward_model, shaping_reward
    from models.vlm import VLM

    if not resumed:
        if (out / "config.json").exists() and not restarted:
            raise UserError(
                f"{args.out} already holds a run: continue it with --resume {args.out}, or choose another --out"
            )
        if args.from_scratch:
            if world.size > 1:
                raise UserError("--from-scratch runs on one process: make the checkpoints with `python` first")
            args.model, args.reward_model = make_from_scratch(args, out / "start")
            args.from_scratch = False
        args, size, reason = resolve(args)
        args.task_ids = check_task_ids(args.suite, args.task_ids)
        for what, path in (
            ("policy", args.model),
            ("reward model", args.reward_model if args.prm_mode != "none" else None),
        ):
            if path and path.startswith(str(TINY)) and not Path(path).is_dir():
                if not args.suite.startswith(("libero_object", "libero_spatial")):  # demos.py has no expert for it
                    raise UserError(
                        f"no {what} at {path}: none is shipped for {args.suite}, and no scripted expert can make one. Give a "
                        "checkpoint with --model, such as OpenVLA-7B's; or `python sft.py --data` official demonstrations"
                    )
                raise UserError(
                    f"no {what} at {path}. `python train.py --suite {args.suite} --from-scratch` makes it; so do `python demos.py "
                    f"--suite {args.suite}`, `python sft.py --suite {args.suite} --out {TINY / args.suite / 'policy'}` and `python "
                    f"reward_model.py train --suite {args.suite} --demos data/{args.suite} --policy {TINY / args.suite / 'policy'} "
                    f"--out {TINY / args.suite / 'rprm'}`"
                )
    else:
        args, size, _ = resolve(args)
        args.task_ids, reason = check_task_ids(args.suite, args.task_ids), "resumed"
    check_egl()
    device, shard = world.device, args.shard and world.size > 1
    dtype = torch.bfloat16 if device != "cpu" and size == "7B" else torch.float32
    args.render = render = args.render or default_render()  # in config.json: a resumed run keeps its pictures
    slots = world.share(args.num_envs)  # the environments of this rank, in the numbering of all
    num_envs = len(slots)
    seed_everything(args.seed)
    generator = torch.Generator().manual_seed(args.seed)  # mini-batch order
    # Action sampling: one generator per environment, so that no environment's luck depends on the others.
    samplers = [torch.Generator().manual_seed(args.seed * 1_000_003 + i) for i in slots]

    # ---- models ------------------------------------------------------------------------------------------------------
    policy_base = OpenVLA.from_pretrained(args.model, dtype=dtype, device="cpu" if shard else device)
    policy_base.decode_actions(
        np.zeros((1, 7), int), args.suite
    )  # no action statistics of this suite: fail here, not after minutes
    policy_base.gradient_checkpointing = args.gradient_checkpointing
    with explain_out_of_memory("the adapters do not fit; lower --lora-rank, or use --model openvla-tiny"):
        actor_critic = ActorCritic(
            policy_base, args.lora_rank, args.lora_alpha, args.lora_targets, args.critic, args.whole_vocabulary
        )
    reward_model, stock, shared = None, False, False
    if args.prm_mode != "none" and args.prm_weight > 0:
        reward_model = read_reward_model(args.reward_model, dtype=dtype, device=device)
        stock = isinstance(reward_model, VLM)  # judges frames, not what the policy's towers made of them
    if reward_model is not None and not stock:
        judge, acts = ((m.image_size, m.num_patches, m.text["vocab_size"]) for m in (reward_model.model, policy_base))
        if judge != acts:
            raise UserError(f"{args.reward_model} was trained from another model than {args.model}: their images or vocabularies differ")
        shared = actor_critic.vision_frozen and reward_model.shares_vision(policy_base)  # one vision pass serves both
        if actor_critic.vision_frozen and not shared:
            raise UserError(
                f"{args.reward_model} has other vision weights than {args.model}: train it from that policy with "
                "`reward_model.py train --policy …`, or use --lora-targets all"
            )
    if shard:  # now that its vision weights were compared
        actor_critic.shard(world)
    world.copy_from_first_([*actor_critic.policy_parameters(), *actor_critic.critic_parameters()])
    policy_optimizer = torch.optim.AdamW(actor_critic.policy_parameters(), lr=args.lr, eps=1e-5, weight_decay=0.0)
    critic_optimizer = torch.optim.AdamW(
        actor_critic.critic_parameters(), lr=args.critic_lr, eps=1e-5, weight_decay=0.0
    )

    # ---- environments ------------------------------------------------------------------------------------------------
    world.barrier()  # every rank has seen whether there is a run already
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise UserError(f"cannot write to {out}: {exc.strerror}; choose another --out") from exc
    batch = args.num_envs * args.num_steps
    iterations = max(1, math.ceil(args.total_steps / batch))
    trainable = sum(p.numel() for p in actor_critic.policy_parameters()) / 1e6
    ranks = "" if world.size == 1 else f" on {world.size} ranks" + ", the backbone sharded" * shard
    say(
        f"VLA-RL  {args.suite}, tasks {','.join(map(str, args.task_ids))}\n"
        f"  policy     {args.model} ({size}: {reason}), {trainable:.2f} M adapter parameters on {args.lora_targets} layers, {device}{ranks}\n"
        f"  reward     sparse{'' if reward_model is None else f' + {args.prm_weight} x RPRM ({args.prm_mode})'}   curriculum {args.curriculum}, tau {args.curriculum_tau}\n"
        f"  rollout    {args.num_envs} environments x {args.num_steps} decisions of {policy_base.action_repeat} control steps, "
        f"temperature {args.temperature}, episodes cut at {args.max_episode_steps} control steps, {render} rendering\n"
        f"  PPO        {iterations} iterations, lr {args.lr:g} / critic {args.critic_lr:g} ({args.lr_schedule}), {args.epochs} epochs of mini-batches of "
        f"{args.minibatch_size}, warm-up {args.critic_warmup}\n  output     {out}"
    )
    curriculum = Curriculum(args.task_ids, args.curriculum, args.curriculum_tau, deferred=True)
    envs = LiberoVecEnv(
        args.suite,
        num_envs,
        args.task_ids,
        action_repeat=policy_base.action_repeat,
        max_steps=args.max_episode_steps,
        render=render,
        seed=args.seed,
        init_states=args.init_states,
        curriculum=curriculum,
        timeout=args.worker_timeout,
        first_env=slots.start,
        progress=world.first,
        **world.simulators(args.num_workers, args.egl_devices),
    )

    def measure(model, episodes, video_dir=None):
        per_task = max(1, min(50, episodes // len(args.task_ids)))
        return evaluate(
            model,
            args.suite,
            args.task_ids,
            per_task,
            envs=envs,
            on_step=stop.check,
            temperature=args.eval_temperature,
            whole_vocabulary=args.whole_vocabulary,
            seed=args.seed,
            video=int(video_dir is not None),
            video_dir=video_dir,
            progress=world.first and sys.stderr.isatty(),
            world=world,
            in_step=shard,
        )

    # ---- state of the run --------------------------------------------------------------------------------------------
    image_kind = "patch_embeddings" if actor_critic.vision_frozen else "pixel_values"
    S, d = policy_base.image_size, policy_base.text["hidden_size"]
    shape = (policy_base.num_patches, d) if actor_critic.vision_frozen else (6, S, S)
    buffer = RolloutBuffer(args.num_steps, num_envs, shape, image_kind, image_dtype=dtype)
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
    # What checkpoints leave out, because it is frozen.
    weights = [fingerprint(args.model), None if reward_model is None else fingerprint(args.reward_model)]
    first, best, best_rate, lines = 1, -1, -1.0, []  # no checkpoint is the best before one was evaluated
    if resumed:
        state = runs.load_checkpoint(out, actor_critic)
        try:
            for path, now, then in zip((args.model, args.reward_model), weights, state["weights"], strict=True):
                if now != then:
                    raise UserError(f"{path} is not what {out} began with: put that back")
            policy_optimizer.load_state_dict(state["policy_optimizer"])
            critic_optimizer.load_state_dict(state["critic_optimizer"])
            generator.set_state(state["generator"])
            for sampler, saved_sampler in zip(samplers, state["samplers"][slots.start : slots.stop], strict=True):
                # (Saved for all environments: the number of ranks may be another one now.)
                sampler.set_state(saved_sampler.clone())  # given a row of a larger tensor, torch 2.13 crashes
            obs = envs.set_state(split_state(runs.to_numpy(state["envs"]), slots))
            first, best, best_rate = state["iteration"] + 1, state["best"], state["best_rate"]
        except (KeyError, TypeError, ValueError, RuntimeError) as exc:
            raise UserError(f"the checkpoint in {out} does not fit its config.json or this code ({exc!r})") from exc
        lines = runs.Metrics.read(out, state["iteration"])
        if len(found := set(world.gather(state["iteration"]))) > 1:
            raise UserError(f"ranks read different checkpoints of {out} ({sorted(found)}): all need to see the same files")
        say(f"resumed at iteration {first} of {iterations}" if first <= iterations else f"resumed: all {iterations} iterations are done")
    else:
        obs, _ = envs.reset(seed=args.seed)
    metrics_log, config = runs.Metrics(out, lines) if world.first else None, json.dumps(asdict(args), indent=1)

    def observe(frames, instructions):
        """Frames (B, 256, 256, 3) uint8, B instructions -> what the models read: images (B, P, d) or (B, 6, S, S), and
        input_ids, attention_mask (B, L)."""
        pixels = policy_base.preprocess(frames).to(dtype)
        images = actor_critic.embed_images(pixels) if actor_critic.vision_frozen else pixels
        return images, *policy_base.tokenize(instructions)

    def save(iteration):
        mine = [sampler.get_state() for sampler in samplers], envs.get_state()
        parts = world.gather(mine, everywhere=False)
        if not world.first:
            return
        runs.save_checkpoint(
            out,
            iteration,
            actor_critic,
            {
                "iteration": iteration,
                "weights": weights,
                "best": best,
                "best_rate": best_rate,
                "policy_optimizer": policy_optimizer.state_dict(),
                "critic_optimizer": critic_optimizer.state_dict(),
                "generator": generator.get_state(),
                "samplers": torch.stack([sampler for part in parts for sampler in part[0]]),
                "envs": runs.to_tensors(merge_states([part[1] for part in parts])),
            },
            args.keep,
            best,
        )

    if not resumed:
        save(0)
        if world.first:
            atomic_write(out / "config.json", config)  # last: a directory that has it can be resumed
    pace, evaluation_time = [], 0.0
    stop.begin()

    # ---- Algorithm 1 -------------------------------------------------------------------------------------------------
    try:
        for iteration in range(first, iterations + 1):
            began = time.time()
            times = dict(inference=0.0, physics=0.0, render=0.0, wait=0.0)
            wins, episodes, lengths, cut = 0, 0, [], 0
            final_images, final_frames, watched, film, ended_at = {}, {}, [], [], []
            filming = world.first and args.video_every and (iteration % args.video_every == 0 or iteration == 1)
            actor_critic.merge_for_rollout()

            # Rollout: M decisions in each of N environments.
            obs = envs.observation()
            for t in range(args.num_steps):
                clock = time.time()
                images, input_ids, mask = observe(obs["agentview"], obs["instruction"])
                tokens, log_probs, values = actor_critic.act(
                    input_ids, mask, **{image_kind: images}, temperature=args.temperature, generator=samplers
                )
                decision = (images, input_ids, mask, tokens, log_probs, values)
                buffer.store_decision(t, *(x.cpu() for x in decision))
                actions = policy_base.decode_actions(tokens.cpu().numpy(), args.suite)  # (N, 7)
                times["inference"] += time.time() - clock
                if filming:
                    film.append(obs["agentview"][0].copy())
                if stock:  # it judges frames
                    watched.append((obs["agentview"].copy(), obs["instruction"]))
                instructions = obs["instruction"]
                obs, rewards, terminated, truncated, info = envs.step(actions)
                for key in ("physics", "render", "wait"):
                    times[key] += envs.timing[key]

                # A cut episode did not end: its value goes on from the observation that really was its last. (For an
                # episode lost with its worker that is the last one known, the one this decision was made on.)
                final_values = torch.zeros(num_envs)
                rows = np.flatnonzero(truncated)
                for i in rows:
                    final_frames[t, i] = info["final_obs"][i]["agentview"].copy()
                if shard and world.any(len(rows)) and not len(rows):
                    rows = np.array([0])  # a forward pass of a sharded model needs all ranks; `store_outcome` ignores this one
                if len(rows):
                    frames = np.stack([final_frames.get((t, i), obs["agentview"][i]) for i in rows])
                    images, input_ids, mask = observe(frames, [instructions[i] for i in rows])
                    with torch.no_grad():
                        final_values[rows] = actor_critic.value(input_ids, mask, **{image_kind: images}).float().cpu()
                    for i, image in zip(rows, images.cpu(), strict=True):
                        if truncated[i]:
                            final_images[t, i] = image
                buffer.store_outcome(
                    t,
                    torch.from_numpy(rewards),
                    torch.from_numpy(terminated),
                    torch.from_numpy(truncated),
                    final_values,
                )
                ended = terminated | truncated
                wins += int(terminated.sum())
                episodes += int(ended.sum())
                cut += int(info["worker_restarted"].sum())
                lengths += info["episode_length"][ended].tolist()
                ended_at += [(t, slots[i]) for i in np.flatnonzero(ended & ~info["lost"])]
                if t == 0:  # decisions that the filmed episode had before this rollout
                    played = max(0, math.ceil(info["episode_length"][0] / policy_base.action_repeat) - 1)
                stop.check()
            last_observation = observe(obs["agentview"], obs["instruction"])
            with torch.no_grad():
                last_values = (
                    actor_critic.value(*last_observation[1:], **{image_kind: last_observation[0]}).float().cpu()
                )
            clock = time.time()
            outcomes = [(*when, outcome) for when, outcome in zip(ended_at, curriculum.pending, strict=True)]
            outcomes = in_one_order(world.gather(outcomes))
            if world.size > 1:
                times["slowest_rank"] = time.time() - clock  # waiting for it
            curriculum.commit(outcomes)
            rollout_time = time.time() - began

            # Reward = sparse + RPRM (section 3.4), then advantages.
            clock = time.time()
            scores = torch.zeros_like(buffer.rewards)
            sparse_rewards = buffer.rewards.clone()
            if reward_model is not None:
                if stock:
                    last = obs["agentview"], obs["instruction"]
                    levels = policy_base.action_tokenizer.levels(buffer.action_tokens)
                    scores, following = score_frames(reward_model, watched, last, final_frames, args.prm_mode, levels)
                else:
                    scores, following = score_rollout(
                        reward_model, buffer, args.prm_mode, last_observation, final_images, shared
                    )
                buffer.prm_scores = scores  # first, so that a debug bundle has them
                check_finite("RPRM score", scores)
                buffer.rewards += shaping_reward(
                    scores, following, args.prm_mode, args.prm_weight, args.gamma, buffer.terminated
                )
            buffer.finish(last_values, args.gamma, args.lam)
            times["rprm"] = time.time() - clock

            # Update: the critic alone during warm-up, then policy and critic. Learning rates follow from settings and
            # iteration alone, so that a resumed run takes what config.json says now.
            clock = time.time()
            left = 1 - (iteration - 1) / iterations if args.lr_schedule == "linear" else 1.0
            for optimizer, lr in ((policy_optimizer, args.lr), (critic_optimizer, args.critic_lr)):
                for group in optimizer.param_groups:
                    group["lr"] = lr * left
            with explain_out_of_memory("lower --micro-batch-size, or turn on --gradient-checkpointing"):
                update = ppo_update(
                    actor_critic, buffer, policy_optimizer, critic_optimizer, cfg, iteration > args.critic_warmup, generator, world
                )
            times["update"] = time.time() - clock
            if (mismatch := update.get("losses/first_ratio_error", 0.0)) > (1e-3 if dtype == torch.float32 else 0.5):
                say(f"warning: rollout and update disagree: a first ratio is off by {mismatch:.1e}", file=sys.stderr)

            # Counts and (T, N) tables of all ranks. (Seconds stay those of this rank.)
            mine = wins, episodes, cut, lengths, sparse_rewards, scores, buffer.rewards, buffer.values
            parts = list(zip(*world.gather(mine), strict=True))
            wins, episodes, cut, lengths = sum(parts[0]), sum(parts[1]), sum(parts[2]), sum(parts[3], [])
            all_sparse, all_scores, all_rewards, all_values = (torch.cat(tables, dim=1) for tables in parts[4:])
            m = {
                "iteration": iteration,
                "charts/decisions": iteration * batch,
                "charts/episodes": episodes,
                "charts/successes": wins,
                "charts/success_rate": wins / episodes if episodes else 0.0,
                "charts/episodic_length": float(np.mean(lengths)) if lengths else 0.0,
                "charts/sparse_return": all_sparse.sum().item() / args.num_envs,
                "charts/prm_score": all_scores.mean().item(),
                "charts/reward": all_rewards.mean().item(),
                "charts/value": all_values.mean().item(),
                "charts/worker_restarts": cut,
                "charts/learning_rate": args.lr * left,
                **update,
                **{
                    f"curriculum/task_{t}": p
                    for t, p in zip(args.task_ids, curriculum.probabilities().tolist(), strict=True)
                },
                "time/rollout": rollout_time,
                **{f"time/{k}": v for k, v in times.items()},
                "charts/SPS": batch / (time.time() - began),
            }
            if world.first:
                runs.restore_directory(out, config, metrics_log)
            if filming and film:
                ended = buffer.terminated[:, 0].int() - buffer.truncated[:, 0].int()
                report.write_video(
                    out / "videos" / f"rollout_{iteration:05d}.mp4",
                    film,
                    buffer.rewards[:, 0].tolist(),
                    buffer.values[:, 0].tolist(),
                    scores[:, 0].tolist(),
                    ended.tolist(),
                    fps=20 / policy_base.action_repeat,
                    first=played,
                )
            pace.append(time.time() - began)
            if args.eval_every and (iteration == 1 or iteration % args.eval_every == 0 and iteration < iterations):
                # The start policy's turn is after the first iteration, so that the first update comes soon.
                with actor_critic.start_policy() if iteration == 1 else contextlib.nullcontext(actor_critic.evaluation_policy()) as model:
                    result = measure(model, args.eval_episodes)
                k, n = sum(e["success"] for e in result.episodes), len(result.episodes)
                m.update({"eval/success_rate": k / n, "eval/successes": k, "eval/episodes": n})
                if iteration == 1:
                    m["eval/at"] = 0
                if k / n > best_rate:
                    best, best_rate = 0 if iteration == 1 else iteration, k / n
                evaluation_time = time.time() - began - pace[-1]
            if world.first:
                metrics_log.write(m)
            save(iteration)
            if world.first and ("eval/episodes" in m or iteration % 10 == 0):
                report.plot_curve(metrics_log.lines, out / "success.png", f"{args.suite}, seed {args.seed}")
            evaluations = sum(i % args.eval_every == 0 for i in range(iteration + 1, iterations)) if args.eval_every else 0
            seconds = float(np.mean(pace[-20:])) * (iterations - iteration) + evaluation_time * evaluations
            say(runs.terminal_line(m, iterations, seconds))
            stop.check()

        # ---- before and after ------------------------------------------------------------------------------------------
        actor_critic.save_policy(out / "policy")
        rows = {}
        if args.final_episodes:
            say(f"evaluating the start policy and the trained one, {args.final_episodes} test episodes each")
            with actor_critic.start_policy() as start:
                rows["start"] = measure(start, args.final_episodes, out / "videos/start").to_dict()
            rows["trained"] = measure(actor_critic.evaluation_policy(), args.final_episodes, out / "videos/trained").to_dict()
        if rows and world.first:
            report.before_after_gif(out / "before_after.gif", out / "videos/start", out / "videos/trained")
            atomic_write(out / "results.json", json.dumps(rows, indent=1))
            print(report.before_after_table(rows), flush=True)
            total = rows["trained"]["total"]
            if metrics_log.lines:  # else somebody emptied the file, and all iterations were done
                metrics_log.lines[-1] = {
                    **metrics_log.lines[-1],
                    "eval/at": iterations * batch,
                    "eval/successes": total["successes"],
                    "eval/episodes": total["episodes"],
                }
        if world.first:
            report.plot_curve(metrics_log.lines, out / "success.png", f"{args.suite}, seed {args.seed}")
        say(f"policy: {out / 'policy'}   curve: {out / 'success.png'}   videos: {out / 'videos'}")
    except NumericsError as exc:
        optimizers = {"policy": policy_optimizer, "critic": critic_optimizer}
        generators = {f"slot_{i}": sampler.get_state() for i, sampler in enumerate(samplers)}
        generators["minibatches"] = generator.get_state()
        name = f"{iteration:06d}" + (f"-rank{world.rank}" if world.size > 1 else "")
        bundle = runs.save_debug_bundle(out / "debug" / f"{name}.pt", exc, iteration, buffer, actor_critic, optimizers, generators)
        raise UserError(
            f"iteration {iteration}: {exc}. {bundle}; the checkpoint before it is intact: try a lower lr in "
            f"{out}/config.json, then python train.py --resume {out}"
        ) from exc
    except RuntimeError:
        with explain_out_of_memory("lower --num-envs or --micro-batch-size, or turn on --gradient-checkpointing"):
            raise
    except BrokenPipeError:  # `python train.py | head`
        raise
    except OSError as exc:
        raise UserError(
            f"{exc.strerror or exc}: {exc.filename or out}; the newest checkpoint is intact. Once that is mended: "
            f"python train.py --resume {out}"
        ) from exc
    except KeyboardInterrupt:
        world.check_others()
        say(stop.hint, file=sys.stderr)
        sys.exit(130)
    finally:
        if world.first:
            metrics_log.close()
        envs.close()


if __name__ == "__main__":
    main()
