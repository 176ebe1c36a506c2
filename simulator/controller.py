"""robosuite's OSC_POSE controller as one compiled function, equal to the last bit."""

import mujoco
import numba
import numpy as np
from robosuite.utils.control_utils import nullspace_torques, opspace_matrices, orientation_error

SUBSTEPS = 25  # 500 Hz physics at 20 Hz control
# OSC_POSE constants of robosuite's default configuration (controllers/config/osc_pose.json).
OUTPUT_MAX = np.array([0.05, 0.05, 0.05, 0.5, 0.5, 0.5])  # an action of 1.0 moves the goal 5 cm or 0.5 rad
KP = 150.0
KD = 2.0 * np.sqrt(KP)  # critically damped
GRIPPER_SPEED = 0.01  # per substep, in normalised finger position

# Equal to the last bit. Contact is chaotic: a difference of 1e-14 was seen to become one of 4e-8 within a control step
# (a finger that strikes a can), so "equal within 1e-9 after 100 steps" can only be had by being equal exactly:
# 1. The same floating-point operations in the same order. `osc_control` repeats robosuite's, and its memory layouts:
#    robosuite's index lists (`jacp[:, [0, ..., 6]]`) make column-major arrays, for which BLAS sums in another order.
# 2. The same history of the contact solver. It iterates from its last solution (`qacc_warmstart`) and stops within a
#    tolerance, so each solve leaves a trace. robosuite solves three times per substep: before the controller, again
#    when the controller measures, and in the step itself. `stock_solves` repeats the first two, without the collision
#    detection and kinematics of a whole `mj_forward`, whose results cannot differ.


@numba.njit(cache=True)
def osc_control(
    ctrl,
    gripper,
    gripper_step,
    finger_ctrl,
    finger_bias,
    finger_weight,
    jacp,
    jacr,
    mass,
    qpos,
    qvel,
    ee_pos,
    ee_mat,
    goal_pos,
    goal_ori,
    rest_qpos,
    bias,
    torque_limit,
):
    """Write one substep's `ctrl`: robosuite's `OperationalSpaceController` and `PandaGripper.format_action`.

    jacp, jacr (3, nv): Jacobians of the grip site; mass (nv, nv): the whole model's inertia, of which the arm is the
    first 7 degrees of freedom; bias (nv,): gravity and Coriolis; gripper (2,): finger targets, changed in place.
    The decoupled form: forces through the position block, torques through the rotation block, and a weak pull of the
    redundant degree of freedom to the rest pose through the null space.
    """
    j_pos, j_ori = np.asfortranarray(jacp[:, :7]), np.asfortranarray(jacr[:, :7])
    arm_mass, joint_pos, joint_vel = np.asfortranarray(mass[:7, :7]), qpos[:7].copy(), qvel[:7].copy()
    force = (goal_pos - ee_pos) * KP - np.dot(jacp, qvel) * KD
    torque = orientation_error(goal_ori, ee_mat) * KP - np.dot(jacr, qvel) * KD
    j_full = np.vstack((j_pos, j_ori))
    _, lambda_pos, lambda_ori, nullspace = opspace_matrices(arm_mass, j_full, j_pos, j_ori)
    wrench = np.concatenate((np.dot(lambda_pos, force), np.dot(lambda_ori, torque)))
    tau = np.dot(j_full.T, wrench) + bias[:7]
    tau += nullspace_torques(arm_mass, nullspace, rest_qpos, joint_pos, joint_vel)
    ctrl[:7] = np.minimum(np.maximum(tau, -torque_limit), torque_limit)
    gripper[:] = np.minimum(np.maximum(gripper + gripper_step, -1.0), 1.0)
    for j in range(2):
        ctrl[finger_ctrl[j]] = finger_bias[j] + finger_weight[j] * gripper[j]


def stock_solves(model, data, n):
    """Solve for the accelerations of the present state `n` times, as `mj_forward` would after `mj_step1`."""
    for _ in range(n):
        mujoco.mj_forwardSkip(model, data, mujoco.mjtStage.mjSTAGE_VEL, 1)
