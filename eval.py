"""Success rates under the LIBERO protocol: every task from its fixed initial states, no exploration.

    python eval.py --suite libero_object --checkpoint checkpoints/libero_object/policy --episodes-per-task 50

An episode is a task and an initial state. All of them stand in one queue; whichever environment ends its episode takes
the next, so that none waits for the slowest. Nothing about an episode depends on where or when it ran: the simulator
starts from a stored state, and a temperature above 0 samples from a generator seeded by (seed, task, initial state).
(What is left is rounding: a matrix product may round differently in a larger batch, in the last bit.)

Every finished episode is appended to `episodes.jsonl` and synced, so the same command continues an evaluation that was
interrupted. The file's first line holds the settings; episodes of different settings never mix.

Results in the output directory: `episodes.jsonl`, `results.json`, `results.md`, and videos if asked for.
"""

import contextlib
import dataclasses
import functools
import json
import os
import sys
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from envs import NUM_INIT_STATES, LiberoVecEnv
from support import distributed
from support.cli import parse_args
from support.errors import UserError, main_guard
from support.files import atomic_write, fingerprint, safe_name, write_film
from support.quiet import progress_bar
from support.statistics import wilson_interval

MAX_LOST = 3  # so often an episode may take its simulator down with it and is played again

# torch, policy and sim are imported where they are used: they take seconds, and `--help` should not.


def _flag(value, help_text, /, **metadata):
    return field(default=value, metadata={"help": help_text, **metadata})


@dataclass
class Args:
    checkpoint: str = field(metadata={"help": "directory of the policy (or a hub id such as openvla/openvla-7b)"})
    suite: str = _flag("libero_object", "LIBERO suite")
    task_ids: list[int] | None = _flag(None, "tasks, as in 0,1,2", default="all of the suite", min=0)
    episodes_per_task: int = _flag(50, "initial states 0 to N-1 of each task", min=1, max=NUM_INIT_STATES)
    num_envs: int = _flag(8, "episodes that run at the same time", min=1)
    temperature: float = _flag(0.0, "of sampling; 0 picks the likeliest action token", min=0)
    whole_vocabulary: bool = _flag(False, "choose among all tokens, as officially, not only the 256 action tokens")
    seed: int = _flag(0, "of sampling at a temperature above 0", min=0, max=2**32 - 1)
    render: str | None = _flag(None, "simplified meshes (fast) or LIBERO's own",
                               default="exact where a GPU renders, else light", choices=("light", "exact"))
    device: str | None = _flag(None, "where the policy runs", default="cuda if there is one", choices=("cpu", "cuda"))
    dtype: str | None = _flag(None, "of the weights", default="bfloat16 on cuda, else float32",
                              choices=("float32", "bfloat16"))
    out: str | None = _flag(None, "output directory", default="runs/eval-CHECKPOINT-SUITE")
    video: int = _flag(0, "episodes of each task to record as mp4", min=0)
    json: bool = _flag(False, "print the result as JSON instead of a table")


@dataclass
class EvalResult:
    """Episodes {"task_id", "init_state", "success", "steps"} and what follows from them."""

    suite: str
    instructions: list
    episodes: list

    @property
    def success_rate(self):
        return float(np.mean([e["success"] for e in self.episodes])) if self.episodes else 0.0

    def row(self, task_id=None):
        """Counts, rate, Wilson 95 % interval and mean steps to success: of one task, or of all episodes (None)."""
        episodes = [e for e in self.episodes if task_id is None or e["task_id"] == task_id]
        steps, n = [e["steps"] for e in episodes if e["success"]], len(episodes)
        low, high = wilson_interval(len(steps), n)
        return dict(
            task_id=task_id, instruction="all tasks" if task_id is None else self.instructions[task_id],
            successes=len(steps), episodes=n, success_rate=len(steps) / n if n else 0.0, low=low, high=high,
            mean_steps=float(np.mean(steps)) if steps else None,
        )

    def counts(self):
        """(successes, episodes)"""
        return sum(e["success"] for e in self.episodes), len(self.episodes)

    def rows(self):
        return [self.row(t) for t in sorted({e["task_id"] for e in self.episodes})] + [self.row()]

    def to_dict(self):
        *tasks, total = self.rows()
        episodes = sorted(self.episodes, key=lambda e: (e["task_id"], e["init_state"]))
        return {"suite": self.suite, "total": total, "tasks": tasks, "episodes": episodes}

    def to_markdown(self):
        """Table with a row per task; "steps" are control steps to success, averaged over the successes."""
        lines = ["| task | | success | 95 % interval | episodes | steps |", "|---|---|---:|---:|---:|---:|"]
        for r in self.rows():
            name = "" if r["task_id"] is None else r["task_id"]
            steps = "" if r["mean_steps"] is None else f"{r['mean_steps']:.0f}"
            interval = f"{100 * r['low']:.1f} to {100 * r['high']:.1f} %"
            rate = f"{100 * r['success_rate']:.1f} %"
            lines.append(f"| {name} | {r['instruction']} | {rate} | {interval} | {r['episodes']} | {steps} |")
        return "\n".join(lines)


# --------------------------------------------------------------------------------------------------------------------
# The evaluation
# --------------------------------------------------------------------------------------------------------------------


def evaluate(model, suite, task_ids=None, episodes_per_task=NUM_INIT_STATES, num_envs=8, *, temperature=0.0,
             whole_vocabulary=False, seed=0, render="light", envs=None, finished=(), on_episode=None, on_step=None,
             video=0, video_dir=None, progress=True, ranks=None):
    """Run protocol states 0 to episodes_per_task - 1 of every task. Returns EvalResult.

    model: policy.OpenVLA. envs: environments to borrow (train.py's): whatever they are doing is saved first and goes on
    afterwards as if nothing had happened; `num_envs` and `render` are theirs then. finished: episodes of an earlier
    call to keep. on_episode(episode): called as each one ends; on_step(): after each decision. video: record the first
    so many initial states.
    ranks: distributed.Ranks when several ranks share the work: each plays every size-th missing episode, has `num_envs /
    size` environments of its own, and returns the episodes of all. in_step: the model is sharded, so that each of its
    forward passes needs all ranks: those that are done keep computing until the last one is.
    """
    from simulator.devices import share_of_machine
    from simulator.suites import check_task_ids, instructions, max_steps
    from support.errors import explain_out_of_memory

    task_ids = [int(t) for t in check_task_ids(suite, task_ids)]
    if not 1 <= episodes_per_task <= NUM_INIT_STATES:
        raise UserError(f"episodes per task must be 1 to {NUM_INIT_STATES}, not {episodes_per_task}")
    wanted = {(t, i) for t in task_ids for i in range(episodes_per_task)}
    kept = [e for e in finished if (e["task_id"], e["init_state"]) in wanted]
    result = EvalResult(suite, instructions(suite), list(kept))
    rank, size = (ranks.rank, ranks.size) if ranks else (0, 1)
    in_step = model.needs_all_ranks
    queue = deque(share_of_episodes(wanted - {(e["task_id"], e["init_state"]) for e in kept}, rank, size))
    if not queue and not in_step:
        return _merged(result, kept, ranks)
    if envs is None:
        tasks, n = sorted({t for t, _ in queue}), min(max(1, num_envs // size), len(queue))
        envs = LiberoVecEnv(suite, n, tasks, action_repeat=model.action_repeat, render=render, progress=progress,
                            **(share_of_machine(ranks) if ranks else {}))
        ready = contextlib.closing(envs)
    elif (envs.suite, envs.action_repeat) == (suite, model.action_repeat):
        ready = _borrowed(envs, max_steps(suite))
    else:
        raise UserError(f"the environments play {envs.suite} with action repeat {envs.action_repeat}, "
                        f"the evaluation wants {suite} with {model.action_repeat}")
    decide = functools.partial(_decide, model, temperature, whole_vocabulary)
    together = ranks.any if in_step else bool
    with ready, explain_out_of_memory("lower --num-envs"):
        _play(envs, queue, result, decide, seed, on_episode, on_step, video, video_dir, progress, together)
    return _merged(result, kept, ranks)


def share_of_episodes(missing, rank, ranks):
    """What this rank plays of the `missing` (task, initial state) pairs. One by one in turn: tasks differ in length."""
    return sorted(missing)[rank::ranks]


def _merged(result, kept, ranks):
    """Episodes of all ranks; `kept` is known to each of them and counts once."""
    if ranks:
        played = ranks.gather(result.episodes[len(kept) :])
        result.episodes = kept + [episode for part in played for episode in part]
    return result


@contextlib.contextmanager
def _borrowed(envs, max_steps):
    state, limit = envs.get_state(), envs.max_steps
    envs.max_steps = max_steps
    try:
        yield
    finally:
        envs.max_steps = limit
        if not envs.closed:
            envs.set_state(state)


def _decide(model, temperature, whole_vocabulary, frames, instructions, generators, suite):
    """frames (B, 256, 256, 3) uint8, B instructions, B generators -> actions (B, 7) float64."""
    input_ids, attention_mask = model.tokenize(instructions)  # (B, L)
    tokens = model.generate_actions(
        input_ids, model.preprocess(frames), attention_mask, temperature=temperature, whole_vocabulary=whole_vocabulary,
        generator=generators if temperature > 0 else None,
    ).tokens  # (B, 7)
    return model.decode_actions(tokens, suite)


def _play(envs, queue, result, decide, seed, on_episode, on_step, video, video_dir, progress, together):
    """Play every (task, initial state) of `queue` and append what happened to `result.episodes`.

    together(busy): is anybody still busy? `bool`, or where ranks must compute in step, `World.any`.
    """
    n, known = envs.num_envs, len(result.episodes)
    bar = progress_bar(total=known + len(queue), initial=known, desc=f"evaluating {result.suite}", unit="episode",
               disable=not progress, leave=False)
    playing = [queue.popleft() if queue else (None, None) for _ in range(n)]  # per slot: (task, initial state)
    tasks, inits = zip(*playing, strict=True)
    obs, _ = envs.reset(options={"task_ids": tasks, "init_states": inits})
    sampler = [_generator(seed, episode) for episode in playing]
    movie = [[] for _ in range(n)]
    lost = Counter()  # (task, initial state) -> simulators that died or hung while playing it
    actions = np.zeros((n, 7))
    with bar:
        while together(bool(envs.active.any() or queue)):
            rows = np.flatnonzero(envs.active)  # (B,)
            for i in rows:
                if playing[i][1] < video:
                    movie[i].append(obs["agentview"][i].copy())
            if len(rows):
                instructions, generators = [obs["instruction"][i] for i in rows], [sampler[i] for i in rows]
                actions[rows] = decide(obs["agentview"][rows], instructions, generators, result.suite)
            elif together is not bool:  # done here: compute something, for the others' sake
                decide(obs["agentview"][:1], obs["instruction"][:1], [_generator(seed, (0, 0))], result.suite)
            # Whoever ends in this step needs its next episode now. Offer the head of the queue to parked slots first
            # (they begin at once), then to the running ones; offers that nobody took up stay in the queue.
            order = np.argsort(envs.active, kind="stable").tolist()
            offers = dict(zip(order, list(queue)[:n]))
            for i in range(n):
                envs.assign(i, *offers.get(i, (None, None)))
            obs, _, _, _, info = envs.step(actions)
            for i in np.flatnonzero(info["_final_obs"]).tolist():
                task, init = playing[i]
                if info["worker_restarted"][i]:
                    lost[task, init] += 1
                    if lost[task, init] > MAX_LOST:
                        raise UserError(f"task {task}, state {init} lost its simulator {lost[task, init]} times; giving up. "
                                        "--task-ids leaves a task out")
                    queue.appendleft((task, init))  # nobody's fault: once more
                else:
                    success, steps = bool(info["success"][i]), int(info["episode_length"][i])
                    episode = {"task_id": task, "init_state": init, "success": success, "steps": steps}
                    result.episodes.append(episode)
                    bar.update(1)
                    bar.set_postfix_str(f"success {100 * result.success_rate:.1f} %")
                    if init < video:
                        frames = [*movie[i], info["final_obs"][i]["agentview"].copy()]
                        _write_video(video_dir, frames, episode, envs.action_repeat)
                    if on_episode:
                        on_episode(episode)
                movie[i] = []
            for i in np.flatnonzero(info["started"]).tolist():
                queue.remove(offers[i])
                playing[i], sampler[i] = offers[i], _generator(seed, offers[i])
            if on_step:
                on_step()


def _generator(seed, episode):
    """Sampling of one episode: the same numbers in whatever slot and beside whatever others it runs."""
    import torch

    if episode[0] is None:
        return None
    return torch.Generator().manual_seed(int(np.random.SeedSequence([seed, *episode]).generate_state(1)[0]))


def _write_video(directory, frames, episode, action_repeat):
    """mp4 in real time, with the control step and the outcome drawn on."""
    from PIL import Image, ImageDraw

    outcome = "success" if episode["success"] else "failure"
    drawn = []
    for k, frame in enumerate(frames):
        image = Image.fromarray(frame)
        text = f"task {episode['task_id']}  state {episode['init_state']}  step "
        text += f"{k * action_repeat}" if k < len(frames) - 1 else f"{episode['steps']}  {outcome}"
        draw = ImageDraw.Draw(image)
        draw.rectangle((0, 0, image.width, 14), fill=(0, 0, 0))
        draw.text((4, 2), text, fill=(255, 255, 255))
        drawn.append(np.asarray(image))
    drawn += [drawn[-1]] * 3  # players tend to swallow the last frames
    path = Path(directory) / f"task{episode['task_id']:02d}_state{episode['init_state']:02d}_{outcome}.mp4"
    write_film(path, drawn, 20 / action_repeat)


# --------------------------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------------------------


class EpisodeLog:
    """`episodes.jsonl`: one line of settings, then one line per finished episode, each synced to the disk."""

    def __init__(self, path, settings):
        self.path, self.settings, self.episodes = path, settings, []
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(path, "a+b")
        except OSError as exc:
            raise UserError(f"cannot write {path}: {exc.strerror}; choose another --out") from exc
        self.file.seek(0)
        text = self.file.read()
        whole = text[: text.rfind(b"\n") + 1]  # a kill during a write leaves half a line at the end: drop it
        self.file.truncate(len(whole))
        try:
            header, *self.episodes = [json.loads(line) for line in whole.splitlines()] or [None]
            found = None if header is None else dict(header["settings"])
            for episode in self.episodes:
                if not isinstance(episode, dict) or not {"task_id", "init_state", "success", "steps"} <= episode.keys():
                    raise ValueError(episode)
        except (ValueError, TypeError, KeyError, RecursionError):
            raise UserError(f"{path} is not a log of episodes; move it away or choose another --out") from None
        if header is None:
            self.append({"settings": settings})
        elif found != settings:
            key = next(k for k in [*settings, *found] if settings.get(k, ...) != found.get(k, ...))  # absent is not None
            raise UserError(
                f"{path} has episodes with {key} = {found.get(key)}, this command has {settings.get(key)}; "
                f"choose another --out or delete the file"
            )

    def absorb(self):
        """Take over what other ranks logged, each in a file of its own beside this one (also in an earlier attempt)."""
        for path in sorted(self.path.parent.glob("episodes-rank*.jsonl")):
            for episode in EpisodeLog(path, self.settings).episodes:
                if episode not in self.episodes:
                    self.episodes.append(episode)
                    self.append(episode)
            path.unlink()

    def append(self, line):
        self.file.write(json.dumps(line).encode() + b"\n")
        self.file.flush()
        os.fsync(self.file.fileno())


@main_guard
@distributed.ends_together
def main():
    args = parse_args(Args, "Success rates of a policy under the LIBERO protocol.")
    ranks = distributed.join()
    import torch

    from policy import OpenVLA
    from simulator.render import default_render
    from simulator.suites import check_task_ids, max_steps

    check_task_ids(args.suite, args.task_ids)  # before the slow things
    args.render = args.render or default_render()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here; use --device cpu")
    device = "cpu" if args.device == "cpu" else ranks.device
    dtype = args.dtype or ("float32" if device == "cpu" else "bfloat16")
    model = OpenVLA.from_pretrained(args.checkpoint, dtype=getattr(torch, dtype), device=device).eval()
    model.decode_actions(np.full((1, 7), model.action_tokenizer.first), args.suite)  # has statistics for this suite?

    out = Path(args.out or f"runs/eval-{safe_name(args.checkpoint)}-{args.suite}")
    settings = dict(
        suite=args.suite, checkpoint=fingerprint(args.checkpoint), temperature=args.temperature,
        whole_vocabulary=args.whole_vocabulary, seed=args.seed if args.temperature > 0 else None, render=args.render,
        dtype=dtype, action_repeat=model.action_repeat, max_steps=max_steps(args.suite),
    )
    log, finished = None, None
    if ranks.is_main_process:
        log = EpisodeLog(out / "episodes.jsonl", settings)
        log.absorb()
        finished = log.episodes
    finished = ranks.gather(finished)[0]
    log = log or EpisodeLog(out / f"episodes-rank{ranks.rank}.jsonl", settings)
    if ranks.is_main_process and not args.json:
        print(f"{args.checkpoint} on {args.suite}, {device} {dtype}, render {args.render}; results in {out}")
    began = time.time()
    try:
        result = evaluate(
            model, args.suite, args.task_ids, args.episodes_per_task, args.num_envs, temperature=args.temperature,
            whole_vocabulary=args.whole_vocabulary, seed=args.seed, render=args.render, finished=finished,
            on_episode=log.append, video=args.video, video_dir=out / "videos", progress=ranks.is_main_process, ranks=ranks,
        )
    except KeyboardInterrupt:
        ranks.check_others()
        print(f"finished episodes are in {log.path}; the same command goes on from there", file=sys.stderr)
        raise
    if not ranks.is_main_process:
        return
    log.absorb()
    summary = {"checkpoint": args.checkpoint, "settings": settings, "arguments": dataclasses.asdict(args)}
    summary |= {"seconds": round(time.time() - began, 1), **result.to_dict()}
    atomic_write(out / "results.json", json.dumps(summary, indent=1) + "\n")
    atomic_write(out / "results.md", result.to_markdown() + "\n")
    print(json.dumps(summary) if args.json else result.to_markdown())


if __name__ == "__main__":
    main()
