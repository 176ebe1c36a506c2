"""One LIBERO task in one process: compiled once, stepped lean, drawn light.

Stock LIBERO spends most of a control step outside physics: robosuite evaluates the controller and every observable at
each of the 25 physics substeps, runs all of `mj_forward` three times where parts of it would do, and renders 300,000
triangles into 256 pixels; an episode's end rebuilds the whole model. Here the simulator's results are kept and the rest
is dropped:

* `TaskSim` has a task's model from the cache on disk, or compiles it once (`simulator.compiled`). The scene and the goal
  predicates stay LIBERO's own.
* `Episode` is one running episode: its own `MjData` on the shared model, so that many episodes of one task share the
  compiled model, the textures and the render context. Changing an environment's task is picking another `TaskSim`.
* `Episode.step` is robosuite's OSC_POSE controller, substep for substep (`mj_step1` - torques - `mj_step2`), in one
  compiled function. qpos and qvel are those of the stock environment, bit for bit, in every suite (`tests/test_sim.py`);
  `simulator.controller` says what that takes.
* Pictures are stock LIBERO's, or `light` ones, which are close to them at a tenth of the time (`simulator.render`).

Sources: robosuite 1.4.0 `controllers/osc.py`, `utils/control_utils.py`, `models/grippers/panda_gripper.py`; LIBERO
`envs/bddl_base_domain.py`; measured facts in docs/simulator.md.
"""

import mujoco
import numpy as np
from libero.libero.envs.env_wrapper import ControlEnv
from robosuite.utils.control_utils import set_goal_orientation

from simulator.compiled import CompiledTask
from simulator.controller import GRIPPER_SPEED, OUTPUT_MAX, SUBSTEPS, osc_control, stock_solves
from simulator.memory import free_build_memory
from simulator.render import Kept, Renderer, gl_context
from simulator.suites import bddl_path, check_task_ids, get_suite, init_states, instructions, paths_come_from
from support.errors import UserError

SETTLE_STEPS = 10  # no-op steps after placing the objects, so that they come to rest
NO_OP = np.array([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0])  # policy convention: gripper 1 = open
_FULL_STATE = mujoco.mjtState.mjSTATE_INTEGRATION
# Where MuJoCo found NaN or numbers beyond 1e10: it then starts the simulation again from the XML's pose, with only a warning.
_UNSTABLE = [
    int(getattr(mujoco.mjtWarning, f"mjWARN_BAD{what}")) for what in ("QPOS", "QVEL", "QACC", "CTRL")
]


class TaskSim:
    """One LIBERO task: model, goal predicates, render context. Takes 0.5 s and 50 MB; 3 s more the first time on a machine.

    Args:
        suite: a LIBERO suite name. task_id: index into it.
        render: "light" (simplified meshes), "exact" (stock LIBERO's picture), or "none" (no render context at all).
        resolution: image side in pixels.
    Raises: UserError for an unknown suite or task id, or where EGL is missing.
    """

    def __init__(self, suite, task_id, render="light", resolution=256):
        if render not in ("light", "exact", "none"):
            raise UserError(f"unknown render mode {render!r}: choose light, exact or none")
        check_task_ids(suite, [task_id])
        self.suite, self.task_id, self.render_mode, self.resolution = suite, task_id, render, resolution
        self.name, self.instruction = get_suite(suite).get_task(task_id).name, instructions(suite)[task_id]
        self.init_states = init_states(suite, task_id)
        self.num_init_states = len(self.init_states)
        bddl = bddl_path(suite, task_id)
        if render != "none":
            gl_context()
        light = render == "light"
        compiled = CompiledTask(bddl, light_size=resolution if light else None, whole=render == "exact")
        with compiled:
            try:
                with compiled.compiles_for_robosuite():
                    self.env = ControlEnv(str(bddl), has_offscreen_renderer=False, use_camera_obs=False)
            except FileNotFoundError as exc:  # several suites of the package lack assets
                what = f"{suite} task {task_id} cannot be built: {exc.filename} does not exist"
                raise UserError(what + paths_come_from()) from exc
            self._read_environment()
            self.renderer = None
            if render != "none":
                data = self.env.sim.data._data
                drawn = compiled.light(data) if light else compiled.whole
                self.renderer = Renderer(self.model, drawn, data, self.site, light, resolution)
                del drawn
        free_build_memory()

    def _read_environment(self):
        """Take from LIBERO's environment, once, what every control step needs."""
        self.env.env.hard_reset = False  # a reset moves objects; it need not compile the same model again
        # A stock reset loads the task a second time, and LIBERO then lists each articulated fixture (a drawer that
        # starts open) twice and draws its joint twice. Without the same draws, what is placed next lands elsewhere.
        self.env.env.object_property_initializers *= 2
        self._stock_reset(seed=0)
        self.model = self.env.sim.model._model
        robot = self.env.env.robots[0]
        self.site = mujoco.mj_name2id(self.model, mujoco.mjtObj.mjOBJ_SITE, robot.controller.eef_name)
        assert list(robot.controller.qvel_index) == list(range(7)) == list(robot._ref_joint_actuator_indexes)
        self.finger_qpos = np.array(robot._ref_gripper_joint_pos_indexes)
        self.finger_ctrl = np.array([self.env.sim.model.actuator_name2id(a) for a in robot.gripper.actuators])
        low, high = self.model.actuator_ctrlrange[self.finger_ctrl].T
        self.finger_bias, self.finger_weight = 0.5 * (high + low), 0.5 * (high - low)
        self.torque_limit = np.array(robot.torque_limits[1])
        # What every episode starts from: the controller as robosuite leaves it after a reset, and the fixtures as
        # `seed(0); reset()` places them. Fixtures are not part of a stored initial state: an evaluation that does not call
        # seed(0) first has them elsewhere.
        self.rest_qpos = np.array(robot.controller.initial_joint)
        c = robot.controller
        self.initial_goal = (np.array(c.goal_pos), np.array(c.goal_ori))
        # robosuite computes an episode's first torque (one substep of 2 ms) from the pose of the reset, not from the
        # initial state set after it. Results equal to the stock environment's need the same stale measurement, here as
        # `osc_control` takes it: jacp, jacr, mass, qpos, qvel (at rest), ee_pos, ee_mat.
        nv = self.model.nv
        shapes = ((3, nv), (3, nv), (nv, nv), (self.model.nq,), (nv,), (3,), (3, 3))
        arm = (c.J_pos, c.J_ori, c.mass_matrix, c.joint_pos, c.joint_vel, c.ee_pos, c.ee_ori_mat)
        self.reset_measurement = tuple(np.zeros(shape) for shape in shapes)
        for whole, part in zip(self.reset_measurement, arm, strict=True):
            whole[tuple(slice(size) for size in part.shape)] = part
        data = self.env.sim.data._data
        self.reset_warmstart = data.qacc_warmstart.copy()  # the solver's guess after that reset
        self.protocol_bodies = (self.model.body_pos.copy(), self.model.body_quat.copy())
        self.moved_bodies = np.array(
            [self.env.sim.model.body_name2id(f.root_body) for f in self.env.env.fixtures], dtype=int
        )
        self.objects = dict(self.env.env.obj_body_id)  # name -> body id, fixtures included
        self._jacp, self._jacr, self._mass = np.zeros((3, nv)), np.zeros((3, nv)), np.zeros((nv, nv))

    def _stock_reset(self, seed):
        """What the stock protocol's `seed(seed); reset()` does, without compiling the model a second time.

        A stock reset makes a new simulation, in which the fixtures stand where the XML has them, and runs `mj_forward` on
        it twice (robosuite's `_initialize_sim` and its render context). Both matter. LIBERO places a bowl on a stove by
        where the stove's sites are at that moment, so a stove that still stood where the last reset moved it would count
        twice, and the bowl fall to the floor. And the two passes leave the contact solver a warm start, without which an
        object that touches something settles 1e-7 m elsewhere.
        """
        sim = self.env.sim
        for fixture in self.env.env.fixtures:
            body, xml = sim.model.body_name2id(fixture.root_body), fixture.get_obj()
            sim.model.body_pos[body] = np.array(xml.get("pos", "0 0 0").split(), float)
            sim.model.body_quat[body] = np.array(xml.get("quat", "1 0 0 0").split(), float)
        soft = sim.reset
        sim.reset = lambda: (soft(), sim.forward(), sim.forward())
        saved = np.random.get_state()  # LIBERO draws placements from numpy's global generator
        try:
            self.env.seed(seed)
            self.env.reset()
        finally:
            np.random.set_state(saved)
            del sim.reset

    def episode(self):
        """A new `Episode` of this task. Call its `reset` first."""
        return Episode(self)

    def close(self):
        """Free the render context and LIBERO's environment. The process's OpenGL context stays."""
        if self.renderer is not None:
            self.renderer.close()
            self.renderer = None
        if self.env is not None:
            self.env.close()
            self.env = None


class Episode:
    """One running episode: own `MjData`, controller goal and gripper on a shared `TaskSim`.

    unstable: whether the simulation has exploded since the last reset. Such an episode is lost: what it shows afterwards has
    nothing to do with what was done before.
    """

    def __init__(self, sim):
        self.sim = sim
        self.data = mujoco.MjData(sim.model)
        self.goal_pos, self.goal_ori = (g.copy() for g in sim.initial_goal)
        self.gripper = np.zeros(2)  # normalised finger targets, ramped by GRIPPER_SPEED per substep
        self.first = True  # the next substep is the episode's first
        self.unstable = False
        self.kept = Kept()
        d = self.data  # as `osc_control` takes them; MuJoCo never moves these arrays
        site = (d.site_xpos[sim.site], d.site_xmat[sim.site].reshape(3, 3))
        self._measurement = (sim._jacp, sim._jacr, sim._mass, d.qpos, d.qvel, *site)
        self.body_pos, self.body_quat = (b[sim.moved_bodies] for b in sim.protocol_bodies)

    def _activate(self):
        """Make this episode the one that LIBERO's predicates and the shared model see."""
        sim = self.sim
        sim.env.sim.data._data = self.data
        if len(sim.moved_bodies):  # fixtures live in the model, not in the state
            sim.model.body_pos[sim.moved_bodies] = self.body_pos
            sim.model.body_quat[sim.moved_bodies] = self.body_quat

    def reset(self, init_state=None, rng=None):
        """Start again: LIBERO's initial state `init_state` (from 0 on), or a random placement, then 10 settling steps.

        A random placement is LIBERO's own: what `env.reset()` draws, from a seed that `rng` (numpy Generator) gives.
        """
        sim, m, d = self.sim, self.sim.model, self.data
        self.goal_pos, self.goal_ori = (g.copy() for g in sim.initial_goal)
        self.gripper[:] = 0.0
        self.first, self.unstable, self.kept = True, False, Kept()
        d.warning.number[:] = 0
        if init_state is None:
            if rng is None:
                raise ValueError("a random placement needs an rng")
            sim.env.sim.data._data = d
            sim._stock_reset(seed=int(rng.integers(2**31)))
            self.body_pos, self.body_quat = m.body_pos[sim.moved_bodies], m.body_quat[sim.moved_bodies]
        else:
            if not 0 <= init_state < sim.num_init_states:
                where = f"{sim.suite} task {sim.task_id}"
                raise UserError(
                    f"no initial state {init_state} in {where}: it has {sim.num_init_states}, from 0 on"
                )
            self.body_pos, self.body_quat = (b[sim.moved_bodies] for b in sim.protocol_bodies)
            self._activate()
            mujoco.mj_resetData(m, d)
            state = sim.init_states[init_state]
            d.time = state[0]
            d.qpos[:] = state[1 : 1 + m.nq]
            d.qvel[:] = state[1 + m.nq : 1 + m.nq + m.nv]
            d.qacc_warmstart[:] = sim.reset_warmstart
        mujoco.mj_forward(m, d)
        for _ in range(SETTLE_STEPS):
            self.step(NO_OP)

    def step(self, action):
        """One control step (0.05 s). action (7,) in policy convention, clipped to [-1, 1]; returns success (bool).

        An `unstable` episode has no success.
        """
        sim, m, d = self.sim, self.sim.model, self.data
        self._activate()
        delta = np.clip(action[:6], -1.0, 1.0) * OUTPUT_MAX
        # OpenVLA's gripper is 0 = close, 1 = open; LIBERO's is +1 = close, -1 = open (binarised, then sign flipped).
        closing = 1.0 if action[6] < 0.5 else -1.0
        gripper_step = np.array([-GRIPPER_SPEED, GRIPPER_SPEED]) * closing
        for k in range(SUBSTEPS):
            mujoco.mj_step1(m, d)
            stock_solves(m, d, 1 if self.first else 2)
            mujoco.mj_jacSite(m, d, sim._jacp, sim._jacr, sim.site)
            mujoco.mj_fullM(m, sim._mass, d.qM)
            measurement = sim.reset_measurement if self.first else self._measurement
            self.first = False
            if k == 0:  # a new goal, relative to where the gripper is now
                ee_pos, ee_mat = measurement[-2:]
                if np.any(np.abs(delta[3:]) > 0.0):  # a zero rotation keeps the old goal: robosuite's rule
                    self.goal_ori = set_goal_orientation(delta[3:], ee_mat)
                self.goal_pos = ee_pos + delta[:3]
            osc_control(
                d.ctrl,
                self.gripper,
                gripper_step,
                sim.finger_ctrl,
                sim.finger_bias,
                sim.finger_weight,
                *measurement,
                self.goal_pos,
                self.goal_ori,
                sim.rest_qpos,
                d.qfrc_bias,
                sim.torque_limit,
            )
            mujoco.mj_step2(m, d)
        self.unstable = self.unstable or bool(d.warning.number[_UNSTABLE].any())
        return not self.unstable and bool(sim.env.check_success())

    def render(self):
        """The agentview image, (resolution, resolution, 3) uint8, rotated by 180 degrees: upright, for OpenVLA."""
        sim = self.sim
        if sim.renderer is None:
            raise ValueError("this TaskSim was built with render='none'")
        self._activate()
        if sim.env.env.tracking_object_states_change:
            sim.env.env._post_process()  # e.g. a stove's flame, which is a site that switches on and off
        return sim.renderer.draw(self.data, self.kept)

    # -- state ---------------------------------------------------------------------------------------------------------

    def get_state(self):
        """Everything that the future depends on, one float64 vector: MuJoCo integration state, controller, fixtures."""
        state = np.empty(mujoco.mj_stateSize(self.sim.model, _FULL_STATE))
        mujoco.mj_getState(self.sim.model, self.data, state, _FULL_STATE)
        parts = (state, self.goal_pos, self.goal_ori, self.gripper, self.first, self.body_pos, self.body_quat)
        return np.concatenate([np.ravel(p) for p in parts])

    def set_state(self, state):
        """Inverse of `get_state`; derived quantities are recomputed. Raises ValueError for another model's state."""
        n, f = mujoco.mj_stateSize(self.sim.model, _FULL_STATE), len(self.sim.moved_bodies)
        sizes = np.cumsum([n, 3, 9, 2, 1, 3 * f, 4 * f])
        if len(state) != sizes[-1]:
            raise ValueError(f"state of {len(state)} numbers where this task has {sizes[-1]}")
        full, self.goal_pos, ori, self.gripper, first, pos, quat = (
            p.copy() for p in np.split(state, sizes[:-1])
        )
        self.first, self.unstable = bool(first[0]), False
        self.data.warning.number[:] = 0
        self.goal_ori, self.body_pos, self.body_quat = (
            ori.reshape(3, 3),
            pos.reshape(f, 3),
            quat.reshape(f, 4),
        )
        self._activate()
        mujoco.mj_setState(self.sim.model, self.data, full, _FULL_STATE)
        # mj_forward would overwrite the solver's warm start, which is part of the state: restore it afterwards.
        warm = self.data.qacc_warmstart.copy()
        mujoco.mj_forward(self.sim.model, self.data)
        self.data.qacc_warmstart[:] = warm

    def privileged(self):
        """What the simulator knows and the policy does not: for scripted experts, labels and progress measures.

        Returns a dict: eef_pos (3,) m; eef_mat (3, 3); eef_vel (3,) m/s; gripper_qpos (2,) m; joint_pos (7,) rad;
        objects: name -> (pos (3,), quat (4,) wxyz).
        """
        sim, m, d = self.sim, self.sim.model, self.data
        mujoco.mj_jacSite(m, d, sim._jacp, sim._jacr, sim.site)
        return dict(
            eef_pos=d.site_xpos[sim.site].copy(),
            eef_mat=d.site_xmat[sim.site].reshape(3, 3).copy(),
            eef_vel=sim._jacp @ d.qvel,
            gripper_qpos=d.qpos[sim.finger_qpos].copy(),
            joint_pos=d.qpos[:7].copy(),
            objects={name: (d.xpos[b].copy(), d.xquat[b].copy()) for name, b in sim.objects.items()},
        )
