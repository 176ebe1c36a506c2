"""The expert: it reads a task's goal, puts its predicates in order, and lets one skill at a time act.

Three properties make its demonstrations learnable by a small policy that sees one frame and has no memory:

1. Reactive. The command is a function of the current state alone: no timers, no hidden phase. A frame decides the action.
2. Phases look different. The gripper comes down a funnel (its height target falls with the horizontal distance) and leaves on
   a slant towards the goal, so that no picture belongs both to "closing in" and to "carrying away".
3. Recoveries. Noise disturbs what is *executed*; the stored label stays the clean command for the state that was reached
   (DART, arXiv 1703.09327).
"""

import libero.libero.envs.bddl_utils as bddl_utils
import numpy as np

from experts.knowledge import no_skill
from experts.scene import Scene
from experts.skills import Door, Drawer, Knob, PickAndPlace, Push
from simulator.suites import bddl_path

OPENED = 0.125  # metres that a drawer is pulled for something to go in: a bowl is 11 cm wide
PUSHED = ("black_bowl", "white_bowl")  # ends of the names of what can be pushed aside from inside
RANK = {"open": 0, "turnoff": 1, "turnon": 1, "in": 2, "on": 2, "close": 3}


def drawer_of(scene, place):
    thing = scene.sim.env.env.object_sites_dict.get(place)
    return thing is not None and bool(getattr(thing, "joints", None))


class Expert:
    def __init__(self, episode):
        self.scene = scene = Scene(episode)
        goal = [tuple(g) for g in scene.sim.env.env.parsed_problem["goal_state"]]
        placed = {g[1]: g for g in goal if g[0] in ("in", "on")}

        def rank(g):
            under = g[0] in ("in", "on") and g[2] in placed  # what carries another thing is put down first
            first = g[0] == "close" and not any(p[2] == g[1] or g[1] in p[2] for p in placed.values())
            return -1 if first else RANK[g[0]] + 0.5 * under

        self.goal = sorted(goal, key=rank)
        self.skills = []  # (predicate, skill, role)
        for g in self.goal:
            if g[0] in ("in", "on"):
                if scene.kinds[g[1]].endswith("plate") and g[2].endswith("_region"):
                    self.skills.append((g, Push(scene, g[1], g[2]), "goal"))
                    continue
                # Things that share a place stand side by side, in the order in which they stand now.
                sharing = sorted(
                    (p for p in placed.values() if p[2] == g[2]), key=lambda p: scene.objects[p[1]][0]
                )
                shift = 0.09 * (sharing.index(g) - 0.5 * (len(sharing) - 1))
                if drawer_of(scene, g[2]):
                    self.skills += self.into_drawer(g)
                else:
                    self.skills.append((g, PickAndPlace(scene, g[1], g[2], shift), "goal"))
            elif g[0] in ("open", "close"):
                opening = g[0] == "open"
                skill = Drawer(scene, g[1], opening) if drawer_of(scene, g[1]) else Door(scene, g[1])
                self.skills.append((g, skill, "goal"))
            else:
                self.skills.append((g, Knob(scene, g[1], g[0] == "turnon"), "goal"))
        if any(not isinstance(s[1], PickAndPlace) or s[1].turning for s in self.skills):
            for s in self.skills:  # where one skill turns the hand, the others turn it back
                s[1].turning = True

    def into_drawer(self, g):
        """Open it first; and before that, push the thing away from where the hand would have no room under the open drawer."""
        scene, name = self.scene, g[1]
        drawer = Drawer(scene, g[2], True)
        # It does not stop where the hand lets go, but at its end.
        ahead = (drawer.position() - scene.sim.model.jnt_range[drawer.joint, 0]) * drawer.outward
        scene.look()
        scene.low[drawer.mine] += ahead  # plan for the drawer as it will be
        scene.high[drawer.mine] += ahead
        for aside in 0.01 * np.arange(0, 10):
            pick = PickAndPlace(scene, name, g[2], 0.0, ahead, aside * drawer.outward)
            if pick.crowded < 0.005 or not scene.kinds[name].endswith(PUSHED):
                break
        scene.look()
        skills = [(g, drawer, "prerequisite"), (g, pick, "goal")]
        if aside > 0.0:
            aside += 0.025  # a disturbed hand that touches the drawer pushes it shut
            target = scene.objects[name] + (aside + 0.02) * drawer.outward
            self.aside = aside
            skills.insert(0, (g, Push(scene, name, target), "aside"))
        self.drawer = drawer
        return skills

    def finished(self, g, skill, role):
        if role == "aside":
            return self.drawer.position() < -0.05 or skill.progress() > self.aside
        if role == "prerequisite":
            q = skill.position()
            return self.scene.holds(g) or q < (-OPENED if skill.around() and self.scene.gap < 0.05 else -0.11)
        return self.scene.holds(g) and not (isinstance(skill, PickAndPlace) and skill.on_its_way())

    def action(self):
        """The clean command (7,) in policy convention (gripper 1 = open, 0 = close) for the episode's current state."""
        scene = self.scene
        scene.look()
        done = [self.finished(*s) for s in self.skills]
        now = next((s for s, d in zip(self.skills, done) if not d), None)
        for (g, skill, role), d in zip(self.skills, done):
            past = (
                role == "prerequisite"
                and scene.holds(g)
                or role == "aside"
                and self.drawer.position() < -0.05
            )
            if d and not past and skill.around():
                return skill.leave()
        if now is None:
            return np.array([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0])
        return now[1].action()


def goal_of(suite, task_id):
    """A task's goal as its BDDL file has it: a list of (predicate, *names)."""
    problem = bddl_utils.robosuite_parse_problem(str(bddl_path(suite, task_id)))
    return [tuple(predicate) for predicate in problem["goal_state"]]


def covered_tasks(suite, task_ids):
    """Of `task_ids`, those that the skills cover, and {reason: ids} of the others."""
    missing = {}
    for task_id in task_ids:
        if reasons := [reason for predicate in goal_of(suite, task_id) if (reason := no_skill(predicate))]:
            missing.setdefault(reasons[0], []).append(task_id)
    return [t for t in task_ids if not any(t in ids for ids in missing.values())], missing


def disturb(command, rng, noise, kick):
    """What is executed instead of the clean command: Gaussian noise, now and then a push, rarely a gripper slip."""
    executed = command.copy()
    executed[:3] += rng.normal(0.0, noise, 3)
    if rng.random() < kick:
        executed[:3] = rng.uniform(-1.0, 1.0, 3)
    if rng.random() < 0.25 * kick:
        executed[6] = 1.0 - executed[6]
    return np.clip(executed, -1.0, 1.0)
