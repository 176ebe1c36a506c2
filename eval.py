"""Success rates under the LIBERO protocol: every task from its stored initial states, at the temperature that the checkpoint
is meant to act at (OpenVLA-7B: 0, greedy; openvla-tiny: 0.6).

    python eval.py --suite libero_object --checkpoint checkpoints/libero_object/policy

An episode is a task and one of its initial states; the standard suites have 10 tasks with 50 states each. The simulator takes
the state and lets the objects settle for ten steps; then the policy has 220 / 280 / 300 / 520 control steps (spatial / object /
goal / 10). Success is LIBERO's own predicate, after any of them.

All episodes stand in one queue; whichever environment ends its episode takes the next, so that none waits for the slowest.
Nothing about an episode depends on where or when it ran: at a temperature above 0, actions are sampled by a generator seeded with
(seed, task, initial state). What is left is rounding: a matrix product may round differently in a larger batch, in the last bit.

Results in the output directory: `results.json`, `results.md`, videos if asked for, and `episodes.jsonl`, to which every episode
is written as it ends: the same command reads it and continues an evaluation that was interrupted.
"""

from dataclasses import MISSING, asdict, dataclass

from support.cli import flag, parse_args

NUM_INIT_STATES = 50  # of a task in the standard suites


# fmt: off
@dataclass
class Args:
    checkpoint: str = flag(MISSING, "directory of a policy, or of a run for its policy; or a hub id such as openvla/openvla-7b")
    suite: str = flag("libero_object", "LIBERO suite. A task's sentence is that of its file's name, as in published numbers; where a "
                      "LIBERO-PRO suite changes the sentence, that of its BDDL file")
    task_ids: list[int] | None = flag(None, "tasks, as in 0,1,2", default="all of the suite", min=0)
    episodes_per_task: int = flag(NUM_INIT_STATES, "initial states 0 to N-1 of each task, as far as it has them", min=1,
                                  max=NUM_INIT_STATES)
    fresh: bool = flag(False, "play as many random placements, the same for every policy, in place of the suite's initial states")
    unnorm_key: str | None = flag(None, "which action statistics of the checkpoint to use",
                                  default="those of the suite, else of the suite that it is a variant of")
    num_envs: int = flag(8, "episodes that run at the same time", min=1)
    temperature: float | None = flag(None, "of sampling; 0 picks the likeliest action token", min=0,
                                     default="as the checkpoint says, 0.6 for openvla-tiny; 0 where it says nothing, as OpenVLA-7B")
    whole_vocabulary: bool = flag(False, "choose among all tokens, as officially, not only the 256 action tokens")
    seed: int = flag(0, "of sampling at a temperature above 0", min=0, max=2**32 - 1)
    render: str | None = flag(None, "simplified meshes (fast) or LIBERO's own", choices=("light", "exact"),
                              default="exact where a GPU renders, else light")
    device: str | None = flag(None, "where the policy runs", choices=("cpu", "cuda"), default="cuda if there is one")
    dtype: str = flag("auto", "of the weights; auto: float32 for openvla-tiny, bfloat16 for 7B (on a CPU: if it computes "
                      "that well)", choices=("auto", "bfloat16", "float32"))
    out: str | None = flag(None, "output directory", default="runs/eval-CHECKPOINT-SUITE")
    video: int = flag(0, "episodes of each task to record as mp4", min=0)
    json: bool = flag(False, "print the result as JSON instead of a table")
# fmt: on


if __name__ == "__main__":  # before the imports that take seconds: --help and a mistyped flag answer at once
    args = parse_args(Args, "Success rates of a policy under the LIBERO protocol.")

import contextlib
import functools
import json
import sys
import time
from collections import Counter, deque
from pathlib import Path

import numpy as np
import torch

from envs import LiberoVecEnv
from models.checkpoints import resolve_checkpoint
from models.memory import Needs, check_memory, choose_dtype
from policy import OpenVLA
from simulator.devices import share_of_machine
from simulator.render import default_render
from simulator.shared import FRESH
from simulator.suites import check_task_ids, instructions, max_steps, num_init_states
from support import distributed
from support.episodes import EpisodeLog, EvalResult, film_path, write_episode_film
from support.errors import UserError, explain_out_of_memory, main_guard
from support.files import atomic_write, fingerprint, safe_name
from support.quiet import progress_bar

MAX_LOST = 3  # so often an episode is played again after its simulator died with it


def protocol_episodes(suite, task_ids=None, episodes_per_task=NUM_INIT_STATES, fresh=False):
    """[(task, initial state)]: the first `episodes_per_task` of every task, as far as it has them. UserError if there are none.
    fresh: as many random placements of every task, numbered from FRESH on."""
    if not 1 <= episodes_per_task <= NUM_INIT_STATES:
        raise UserError(f"episodes per task must be 1 to {NUM_INIT_STATES}, not {episodes_per_task}")
    tasks = [int(t) for t in check_task_ids(suite, task_ids)]
    if fresh:
        return [(t, FRESH + i) for t in tasks for i in range(episodes_per_task)]
    episodes = [(t, i) for t in tasks for i in range(min(episodes_per_task, num_init_states(suite, t)))]
    if not episodes:
        raise UserError(f"{suite} has no initial states of task {', '.join(map(str, tasks))}")
    return episodes


def evaluate(model, suite, task_ids=None, episodes_per_task=NUM_INIT_STATES, num_envs=8, *, temperature=None, whole_vocabulary=False,
             seed=0, render="light", envs=None, finished=(), on_episode=None, on_step=None, video=0, video_dir=None,
             progress=True, ranks=None, unnorm_key=None, fresh=False, sentences=None):  # fmt: skip
    """Play the `protocol_episodes`. Returns EvalResult.

    model: policy.OpenVLA. task_ids: default all. episodes_per_task: 1 to 50. seed: of sampling at a temperature above 0.
    envs: environments to borrow (train.py's): whatever they are doing is saved first and goes on afterwards as if nothing had
    happened; `num_envs` and `render` are theirs then. finished: episodes of an earlier call to keep. on_episode(episode):
    called as each one ends; on_step(): after each decision. video: record the first so many initial states, into video_dir.
    ranks: each plays its share, in num_envs / size environments of its own, and returns everybody's episodes.
    unnorm_key: of the action statistics (default: by the suite). fresh: random placements in place of the initial states.
    temperature: of sampling (default: the checkpoint's own). sentences: what the policy is told, one for each task of the suite
    (default: the tasks' own).
    """
    ranks = ranks or distributed.ALONE
    temperature = model.temperature_or_own(temperature)
    wanted = set(protocol_episodes(suite, task_ids, episodes_per_task, fresh))
    # Each once, also where two processes wrote one log.
    kept = list({key: e for e in finished if (key := (e["task_id"], e["init_state"])) in wanted}.values())
    missing = wanted - {(e["task_id"], e["init_state"]) for e in kept}
    queue = deque(share_of_episodes(missing, ranks.rank, ranks.size))
    result = EvalResult(suite, instructions(suite), list(kept))
    if queue or model.needs_all_ranks:
        if envs is None:
            tasks, n = sorted({t for t, _ in queue}), min(max(1, num_envs // ranks.size), len(queue))
            options = dict(action_repeat=model.action_repeat, render=render, progress=progress)
            ready = contextlib.closing(LiberoVecEnv(suite, n, tasks, **options, **share_of_machine(ranks)))
        else:
            ready = _borrowed(envs, suite, model.action_repeat)
        bar = progress_bar(total=len(kept) + len(queue), initial=len(kept), desc=f"evaluating {suite}", unit="episode",
                           disable=not progress, leave=False)  # fmt: skip
        unnorm_key = model.unnorm_key_for(suite, unnorm_key)
        choose = functools.partial(act, model, unnorm_key, temperature, whole_vocabulary)
        # A forward pass of a sharded model needs all ranks: those that have played their share go on until all have.
        any_busy = ranks.any if model.needs_all_ranks else bool
        with ready as envs, bar, explain_out_of_memory("lower --num-envs"):
            for episode, frames in _play(
                envs, queue, choose, seed, video, on_step, any_busy, sentences or result.instructions
            ):
                result.episodes.append(episode)
                bar.update(1)
                bar.set_postfix_str(f"success {100 * result.success_rate:.1f} %")
                if frames:
                    write_episode_film(video_dir, frames, episode, envs.action_repeat)
                if on_episode:
                    on_episode(episode)
    played = ranks.gather(result.episodes[len(kept) :])
    result.episodes = kept + [episode for part in played for episode in part]
    return result


def share_of_episodes(missing, rank, ranks):
    """What this rank plays of the `missing` (task, initial state) pairs. One by one in turn: tasks differ in length."""
    return sorted(missing)[rank::ranks]


@contextlib.contextmanager
def _borrowed(envs, suite, action_repeat):
    """Somebody else's environments, under the protocol's step limit; what they were doing goes on afterwards."""
    if (envs.suite, envs.action_repeat) != (suite, action_repeat):
        raise UserError(
            f"the environments play {envs.suite} with action repeat {envs.action_repeat}, "
            f"the evaluation wants {suite} with {action_repeat}"
        )
    state, limit = envs.get_state(), envs.max_steps
    envs.max_steps = max_steps(suite)
    try:
        yield envs
    finally:
        envs.max_steps = limit
        if not envs.closed:
            envs.set_state(state)


def act(model, unnorm_key, temperature, whole_vocabulary, frames, sentences, generators):
    """frames (B, 256, 256, 3) uint8, B sentences, B generators -> actions (B, 7) float64."""
    input_ids, attention_mask = model.tokenize(sentences)  # (B, L)
    out = model.generate_actions(
        input_ids, model.preprocess(frames), attention_mask, temperature=temperature, whole_vocabulary=whole_vocabulary,
        generator=generators,
    )  # fmt: skip
    return model.decode_actions(out.tokens, unnorm_key)


def _play(envs, queue, choose, seed, video, on_step, any_busy, told):
    """Play every (task, initial state) of `queue`; yield (episode, its frames if it is to be filmed) as each one ends."""
    n, nothing = envs.num_envs, (None, None)
    playing = [queue.popleft() if queue else nothing for _ in range(n)]  # of each environment
    tasks, init_states = zip(*playing, strict=True)
    obs, _ = envs.reset(options={"task_ids": tasks, "init_states": init_states})
    samplers = [_sampler(seed, *episode) for episode in playing]
    films = [[] for _ in range(n)]
    lost = Counter()  # (task, initial state) -> simulators that died or hung while playing it
    actions = np.zeros((n, 7))
    while any_busy(bool(envs.active.any() or queue)):
        active = np.flatnonzero(envs.active)
        for i in active:
            if playing[i][1] % FRESH < video:
                films[i].append(obs["agentview"][i].copy())
        # (B,). Where nothing is to be decided, a sharded model may still need this rank's part of a forward pass.
        rows = active if len(active) else np.array([0])
        sentences, generators = [told[obs["task_id"][i]] for i in rows], [samplers[i] for i in rows]
        actions[rows] = choose(obs["agentview"][rows], sentences, generators)

        # Whoever ends in this step needs its next episode now. Offer the head of the queue to idle environments first (they
        # begin at once), then to the others; offers that nobody takes up stay in the queue.
        offers = dict(zip(np.argsort(envs.active, kind="stable").tolist(), list(queue)[:n]))
        for i in range(n):
            envs.assign(i, *offers.get(i, nothing))
        obs, _, _, _, info = envs.step(actions)
        for i in np.flatnonzero(info["_final_obs"]).tolist():
            (task, init_state), film = playing[i], films[i]
            films[i] = []
            if info["worker_restarted"][i]:  # nobody's fault: once more
                lost[task, init_state] += 1
                if lost[task, init_state] > MAX_LOST:
                    raise UserError(
                        f"task {task}, state {init_state} lost its simulator {lost[task, init_state]} times; giving up. "
                        "--task-ids leaves a task out"
                    )
                queue.appendleft((task, init_state))
                continue
            success, steps = bool(info["success"][i]), int(info["episode_length"][i])
            episode = {"task_id": task, "init_state": init_state, "success": success, "steps": steps}
            if info["unstable"][i]:  # a failure: played again, the simulation would diverge again
                episode["unstable"] = True
            yield episode, [*film, info["final_obs"][i]["agentview"].copy()] if film else None
        for i in np.flatnonzero(info["started"]).tolist():
            queue.remove(offers[i])
            playing[i], samplers[i] = offers[i], _sampler(seed, *offers[i])
        if on_step:
            on_step()


def _sampler(seed, task, init_state):
    """The same random numbers for an episode in whatever environment and beside whatever others it runs."""
    entropy = [seed, task or 0, init_state or 0]  # None: an idle environment, whose actions nobody uses
    return torch.Generator().manual_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))


@main_guard
@distributed.ends_together
def main(args):
    ranks = distributed.join()
    protocol_episodes(args.suite, args.task_ids, args.episodes_per_task, args.fresh)  # before the slow things
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here; use --device cpu")
    args.render = args.render or default_render()
    device = "cpu" if args.device == "cpu" else ranks.device
    folder = resolve_checkpoint(args.checkpoint)
    dtype = choose_dtype(args.dtype, folder, device)
    check_memory(Needs(folder, dtype, num_envs=max(1, args.num_envs // ranks.size)), device)
    model = OpenVLA.from_pretrained(folder, dtype=dtype, device=device).eval()
    unnorm_key = model.unnorm_key_for(args.suite, args.unnorm_key)
    args.temperature = model.temperature_or_own(args.temperature)

    out = Path(args.out or f"runs/eval-{safe_name(args.checkpoint)}-{args.suite}")
    # What an episode depends on: those of other settings are not comparable.
    settings = {name: getattr(args, name) for name in ("suite", "temperature", "whole_vocabulary", "render")}
    settings |= {
        "checkpoint": fingerprint(folder),
        "dtype": str(dtype).removeprefix("torch."),
        "action_repeat": model.action_repeat,
    }
    settings |= {"seed": args.seed if args.temperature > 0 else None, "max_steps": max_steps(args.suite)}
    settings |= {"unnorm_key": args.unnorm_key} if args.unnorm_key else {}
    settings |= {"fresh": True} if args.fresh else {}
    log = EpisodeLog.of_rank(out, settings, ranks)
    if ranks.is_main_process:
        how = f"actions of {unnorm_key}, temperature {args.temperature:g}, {device} {settings['dtype']}"
        print_plan(args, how, out)
        to_film = [e for e in log.episodes if e["init_state"] % FRESH < args.video]
        if unfilmed := sum(not film_path(out / "videos", e).exists() for e in to_film):
            print(
                f"{unfilmed} of the episodes to record were played before, without a film, and are not played again; "
                "with another --out they are",
                file=sys.stderr,
            )
    began = time.time()
    try:
        result = evaluate(
            model, args.suite, args.task_ids, args.episodes_per_task, args.num_envs, temperature=args.temperature,
            whole_vocabulary=args.whole_vocabulary, seed=args.seed, render=args.render, finished=log.episodes,
            on_episode=log.append, video=args.video, video_dir=out / "videos", progress=ranks.is_main_process, ranks=ranks,
            unnorm_key=unnorm_key, fresh=args.fresh,
        )  # fmt: skip
    except KeyboardInterrupt:
        ranks.check_others()
        print(f"finished episodes are in {log.path}; the same command goes on from there", file=sys.stderr)
        raise
    if not ranks.is_main_process:
        return
    log.absorb()
    summary = {"checkpoint": args.checkpoint, "settings": settings, "arguments": asdict(args)}
    summary |= {"seconds": round(time.time() - began, 1), **result.to_dict()}
    atomic_write(out / "results.json", json.dumps(summary, indent=1) + "\n")
    atomic_write(out / "results.md", result.to_markdown() + "\n")
    print(json.dumps(summary) if args.json else result.to_markdown())


def print_plan(args, how, out):
    """What is about to be played: the policy's sentences, and where a task has fewer states than were asked for."""
    print_ = functools.partial(print, file=sys.stderr if args.json else sys.stdout, flush=True)
    print_(f"{args.checkpoint} on {args.suite}, {how}, render {args.render}; results in {out}")
    sentences = instructions(args.suite)
    for task in check_task_ids(args.suite, args.task_ids):
        n = num_init_states(args.suite, task)
        fewer = (
            f" (it has {n} initial states, not {args.episodes_per_task})"
            if n < args.episodes_per_task and not args.fresh
            else ""
        )
        print_(f"  task {task}: {sentences[task]}{fewer}")


if __name__ == "__main__":
    main(args)
