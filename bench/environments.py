"""The benchmarks that README quotes, one sub-command each. Every one prints a table and writes JSON.

    python -m bench envs                              # LIBERO environments: stock against ours, and what workers add
    python -m bench envs --suite libero_spatial --out runs/bench-envs-spatial.json
    python -m bench pictures                          # light against exact, every task of four suites
    python -m bench leak                              # memory of the workers over 1,000 episodes
    python -m bench rollout                           # train.py's rollout, environments all at once or in groups
    python -m bench soak --minutes 60                 # training while its workers are killed and stopped at random
    python -m bench scaling                           # train.py on 1, 2, 4 ... ranks, and a simulation up to 64
    python -m bench decode                            # actions/s of batched decoding, against transformers' `generate`
    python -m bench update                            # samples/s of a PPO update, against a plain one on transformers
    python -m bench gpu                               # random 7B weights: memory and times on one GPU, in minutes

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
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

import numpy as np
from tqdm import tqdm

from bench.model import DecodeArgs, GpuArgs, UpdateArgs, decode, gpu, machine, print_decode, print_gpu, print_update, update
from support.cli import parse_command
from support.errors import main_guard, UserError
from support.files import atomic_write

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
        from simulator.task import TaskSim

        self.task = TaskSim(suite, task_id, render=kind.split()[1])
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

        from simulator.controller import stock_solves, SUBSTEPS

        model, data = self.task.model, self.episode.data
        self.episode.reset(0)
        spent = dict.fromkeys(("physics", "controller", "success", "render"), 0.0)
        for action in np.random.default_rng(0).uniform(-1, 1, (steps, 7)):
            state, times = self.episode.get_state(), [time.perf_counter()]
            for _ in range(SUBSTEPS):
                mujoco.mj_step1(model, data)
                stock_solves(model, data, 2)
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
        from simulator.suites import num_tasks
        from simulator.task import TaskSim

        other = (self.task.task_id + 1) % num_tasks(self.task.suite)
        task = TaskSim(self.task.suite, other, render=self.task.render_mode)
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
        from support.quiet import silence_third_party

        silence_third_party()
        if kind.startswith("ours"):  # not for stock: this switches off MuJoCo's cache, which stock resets use
            import simulator.memory  # noqa: F401
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
    """Returns the numbers of `python -m bench envs` as a dict."""
    from simulator.suites import check_task_ids

    check_task_ids(args.suite, [args.task_id])
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
    """Returns the numbers of `python -m bench pictures` as a dict: light against exact, first frame of initial state 0."""
    os.environ["LP_NUM_THREADS"] = "0"  # Mesa draws in the calling thread
    from simulator.suites import check_task_ids
    from simulator.task import TaskSim

    wanted = [(suite, task) for suite in args.suites.split(",") for task in check_task_ids(suite, args.task_ids)]
    rows = []
    for suite, task_id in tqdm(wanted, desc="pictures", unit="task", leave=False):
        frames, times = {}, {}
        for kind in ("exact", "light"):
            task = TaskSim(suite, task_id, render=kind)
            episode = task.episode()
            episode.reset(0)
            frames[kind], spent = episode.render(), []
            for _ in range(args.repeats + 1):
                episode.step(np.array([0.0, 0.0, 0.5, 0.0, 0.0, 0.0, 1.0]))  # a light picture draws what moves: here the arm
                began = time.process_time()
                episode.render()
                spent.append(1e3 * (time.process_time() - began))
            times[kind] = float(np.mean(spent[1:]))
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
    print("milliseconds of CPU time of a picture while the arm moves, one core")


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
    """Returns the numbers of `python -m bench leak` as a dict: MB of each worker whenever 50 more episodes have ended."""
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
    """Returns the numbers of `python -m bench rollout` as a dict: decisions/s of train.py's rollout, storing left out."""
    import torch

    from simulator.render import default_render
    import train
    from envs import LiberoVecEnv
    from policy import ActorCritic, OpenVLA

    cuda = torch.cuda.is_available()
    path = str(train.TINY / args.suite / "policy") if args.model == "openvla-tiny" else args.model
    model = OpenVLA.from_pretrained(path, torch.bfloat16 if cuda else torch.float32, "cuda" if cuda else "cpu")
    actor_critic = ActorCritic(model, targets="language")
    actor_critic.merge_for_rollout()
    n, turns = args.num_envs, {g: [] for g in args.groups}
    envs = LiberoVecEnv(args.suite, n, args.task_ids, action_repeat=model.action_repeat, render=default_render(),
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
    """Returns the numbers of `python -m bench soak` as a dict."""
    import psutil

    rng, here = np.random.default_rng(args.seed), Path(__file__).resolve().parent.parent
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    report, errors = folder / "audit.json", folder / "stderr.txt"
    code = f"import sys; sys.path.insert(0, {str(here)!r}); from bench import environments; environments.audited_training({str(report)!r})"
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
        print("the full hour: python -m bench soak --minutes 60")


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
    run = subprocess.run([sys.executable, *torchrun, "train.py", *command], cwd=Path(__file__).resolve().parent.parent,
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

    from simulator.suites import instructions
    from policy import ActorCritic, OpenVLA

    cuda = torch.cuda.is_available()
    model = OpenVLA.from_pretrained(model_path, torch.bfloat16 if cuda else torch.float32, "cuda" if cuda else "cpu")
    actor_critic = ActorCritic(model, targets="language" if "vision_configs" in model.config else "all")
    actor_critic.merge_for_rollout()
    instruction, times = instructions(suite)[0], {}
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
    """Returns the numbers of `python -m bench scaling` as a dict."""
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
# What all sub-commands share
# --------------------------------------------------------------------------------------------------------------------


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
