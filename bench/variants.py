"""The processes of `python -m bench envs`: each builds one environment and measures what it is asked to.

Imports stand in the functions here: a process loads what its own variant needs and nothing of the other's, because the stock
environment would get our MuJoCo settings with our simulator, and memory counts.
"""

import os
import time
from pathlib import Path

import numpy as np

from bench.common import memory
from support.errors import UserError

VARIANTS = {
    "stock default": "stock, default cameras (2 x 128 px)",
    "stock agentview": "stock, agentview alone (256 px)",
    "ours exact": "ours, exact (256 px)",
    "ours light": "ours, light (256 px)",
}


class Stock:
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


class Ours:
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

        from simulator.controller import SUBSTEPS, stock_solves

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
        from simulator.suites import num_tasks
        from simulator.task import TaskSim

        before = memory()
        other = (self.task.task_id + 1) % num_tasks(self.task.suite)
        task = TaskSim(self.task.suite, other, render=self.task.render_mode)
        first = task.episode()
        first.reset(0)
        first.render()
        after_task = memory()
        second = task.episode()
        second.reset(0)
        second.render()
        return {"another task": after_task - before, "another episode": memory() - after_task}

    def renderer(self):
        """What OpenGL calls itself, for example "llvmpipe (LLVM 15.0.6, 256 bits)"."""
        from OpenGL import GL

        return GL.glGetString(GL.GL_RENDERER).decode()


def turn(environment, seconds, seed):
    """One reset to initial state 0, then random actions for `seconds`: wall and CPU seconds of both, and the steps."""
    clocks = [(time.perf_counter(), time.process_time())]
    environment.reset(0)
    clocks.append((time.perf_counter(), time.process_time()))
    rng, steps = np.random.default_rng(seed), 0
    while time.perf_counter() - clocks[1][0] < seconds and steps < 900:  # stock episodes end at 1,000
        environment.step(rng.uniform(-1, 1, 7))
        steps += 1
    clocks.append((time.perf_counter(), time.process_time()))
    (reset_wall, reset_cpu), (wall, cpu) = np.diff(clocks, axis=0).tolist()
    return dict(reset_wall=reset_wall, reset_cpu=reset_cpu, steps=steps, wall=wall, cpu=cpu)


def serve(conn, kind, suite, task_id):
    """Main function of a process: builds the variant, then answers (what, *arguments) until None comes."""
    try:
        from support.quiet import silence_third_party

        silence_third_party()
        if kind.startswith("ours"):  # not for stock: this switches off MuJoCo's cache, which stock resets use
            import simulator.memory  # noqa: F401
        imports, began = memory(), time.perf_counter()
        environment = (Ours if kind.startswith("ours") else Stock)(kind, suite, task_id)
        build = time.perf_counter() - began
        turn(environment, 0.5, 0)  # warm: shaders, compiled functions, caches
        conn.send({"build": build, "imports": imports, "memory": memory() - imports})
        for what, *arguments in iter(conn.recv, None):
            conn.send(
                turn(environment, *arguments) if what == "turn" else getattr(environment, what)(*arguments)
            )
    except UserError as exc:
        conn.send(exc)
    os._exit(0)  # without freeing OpenGL contexts, which the operating system does faster
