"""The scripts that chain our commands, run as a whole at the smallest size."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from policy import OpenVLA
from reward_model import RPRM
from simulator.suites import bddl_path

ROOT = Path(__file__).resolve().parents[1]


def start(made, work, **settings):
    settings = {"PY": sys.executable, "TASKS": "2,8,9", "DEMOS": "1", "ROLLOUTS": "1", "INIT": "", **settings}
    command = ["scripts/start.sh", "libero_object", str(made), str(work)]
    return subprocess.run(command, cwd=ROOT, env=os.environ | settings, capture_output=True, text=True)


def times(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.mark.libero
def test_start_makes_policy_and_reward_model_and_goes_on_where_it_stopped(tmp_path):
    made, work = tmp_path / "made", tmp_path / "work"
    broken = start(made, work, SFT="--steps 0")  # refused: after the demonstrations, before a policy
    assert broken.returncode != 0 and "--steps" in broken.stderr and not made.exists()
    recorded = times(work)
    assert len(list((work / "data" / "libero_object").glob("*_demo.hdf5"))) == 3

    done = start(made, work, SFT="--steps 2 --save-every 2 --batch-size 4 --held-out 0.2")
    assert done.returncode == 0, done.stderr
    assert f"have {work}/data/libero_object" in done.stdout
    assert recorded.items() <= times(work).items()  # what was there is used as it is
    policy, reward_model = OpenVLA.from_pretrained(made / "policy"), RPRM.from_pretrained(made / "rprm")
    assert policy.unnorm_key_for("libero_object") and reward_model.shares_vision(policy)
    info = json.loads((made / "rprm" / "rprm.json").read_text())
    # a policy of two steps does not succeed
    assert info["suite"] == "libero_object" and "failures" in info["data"]

    before = times(tmp_path)
    again = start(made, work)
    assert again.returncode == 0 and again.stdout.count("have ") == 2 and times(tmp_path) == before


@pytest.mark.libero
def test_record_writes_the_same_with_any_number_of_workers(tmp_path):
    files = {}
    for workers in ("1", "2"):
        out = tmp_path / workers
        command = [
            sys.executable,
            "-m",
            "scripts.rprm",
            "record",
            "--task-ids",
            "0,1",
            "--episodes-per-task",
            "1",
            "--out",
            str(out),
        ]
        done = subprocess.run([*command, "--num-workers", workers], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "successes and" in done.stdout and "Traceback" not in done.stderr
        for path in sorted(out.rglob("*_demo.hdf5")):
            with h5py.File(path) as f:
                group = f["data/demo_0"]
                files.setdefault(path.relative_to(out), []).append(
                    (group["actions"][:], group["obs/agentview_rgb"][-1])
                )
    assert len(files) == 2
    for first, second in files.values():
        np.testing.assert_array_equal(first[0], second[0])
        np.testing.assert_array_equal(first[1], second[1])


@pytest.mark.libero
def test_evidence_trains_evaluates_and_skips_what_is_there(tmp_path):
    small = "--num-envs 2 --num-steps 2 --minibatch-size 4 --total-steps 4 --critic-warmup 0 --prm-mode none"
    settings = {
        "PY": f"{sys.executable} tests/short.py",
        "SUITES": "libero_object",
        "SEEDS": "3",
        "EPISODES": "1",
        "TASKS": "2,9",
        "FLAGS": small,
    }
    settings |= {"WORK": str(tmp_path / "work"), "RESULTS": str(tmp_path / "results")}

    def evidence(*experiments):
        command = ["scripts/evidence.sh", *experiments]
        return subprocess.run(command, cwd=ROOT, env=os.environ | settings, capture_output=True, text=True)

    refused = evidence("learn")  # a function, but no experiment
    assert refused.returncode == 2 and "no experiment learn: choose among suites" in refused.stderr
    assert not any(tmp_path.iterdir())

    done = evidence("suites")
    assert done.returncode == 0, done.stderr
    made = tmp_path / "results" / "libero_object"
    start = json.loads((made / "start" / "results-2.json").read_text())
    trained = json.loads((made / "rl-seed3" / "results-2.json").read_text())
    for result in (start, trained):
        assert [e["task_id"] for e in result["episodes"]] == [2, 9]
    config = json.loads((made / "rl-seed3" / "config.json").read_text())
    assert config["seed"] == 3 and config["task_ids"] == [2, 9]
    assert trained["settings"]["seed"] == 3
    assert len((made / "rl-seed3" / "metrics.jsonl").read_text().splitlines()) == 1  # one iteration
    assert "| SFT | " in done.stdout and (tmp_path / "results" / "suites.md").read_text() in done.stdout
    assert (tmp_path / "results" / "suites.png").stat().st_size > 10_000

    before = times(tmp_path / "work") | times(made)
    again = evidence("suites")
    assert again.returncode == 0 and "| SFT | " in again.stdout
    assert times(tmp_path / "work") | times(made) == before

    # On another machine, with nothing but what was kept: the same policy, from its adapter, with the same episodes.
    policy = tmp_path / "work" / "libero_object" / "rl-seed3" / "policy" / "model.safetensors"
    weights = policy.read_bytes()
    shutil.rmtree(tmp_path / "work")
    (made / "rl-seed3" / "results-2.json").unlink()
    again = evidence("suites")
    assert again.returncode == 0, again.stderr
    assert "merged into checkpoints/libero_object/policy" in again.stdout
    assert policy.read_bytes() == weights
    merged = json.loads((made / "rl-seed3" / "results-2.json").read_text())
    assert merged["episodes"] == trained["episodes"] and merged["settings"] == trained["settings"]

    # Both ways to train, on the test states and on placements.
    done = evidence("states")
    assert done.returncode == 0, done.stderr
    for name, init_states in (("rl-seed3", "random"), ("rl-protocol-seed3", "protocol")):
        assert json.loads((made / name / "config.json").read_text())["init_states"] == init_states
        for file, fresh in (("results-2.json", False), ("placements.json", True)):
            result = json.loads((made / name / file).read_text())
            assert len(result["episodes"]) == 2 and result["settings"].get("fresh", False) == fresh
    start = json.loads((made / "start" / "placements.json").read_text())
    assert len(start["episodes"]) == 2 and start["settings"]["fresh"]
    rows = [line.split(" | ")[0] for line in (made / "states.md").read_text().splitlines()[2:]]
    assert rows == ["| rl", "| rl-protocol", "| start", "| rl-protocol - rl"]
    assert (made / "states.png").stat().st_size > 10_000

    # Some of Table 2's methods.
    settings |= {"METHODS": "rl full"}
    refused = evidence("table2")
    assert refused.returncode == 2 and "no method full: choose among rl no-rprm" in refused.stderr
    settings |= {"METHODS": "rl no-curriculum"}
    done = evidence("table2")
    assert done.returncode == 0, done.stderr
    config = json.loads((made / "no-curriculum-seed3" / "config.json").read_text())
    assert config["curriculum"] == "uniform"
    tables = (made / "table2.md").read_text().split("\n\n")
    assert len(tables) == 2  # of the test, of training
    for table in tables:
        assert [line.split(" | ")[0] for line in table.splitlines()[2:]] == ["| rl", "| no-curriculum"]

    # A larger budget: fifths of its one iteration are 0, the start policy, and 1, what it ended with.
    done = evidence("budget")
    assert done.returncode == 0, done.stderr
    assert json.loads((made / "long-seed3" / "config.json").read_text())["total_steps"] == 4  # FLAGS is last
    temperatures = {"sampled": 0.6, "greedy": 0}
    for at, same in (("000000", made / "start"), ("000001", made / "long-seed3")):
        for name, temperature in temperatures.items():
            result = json.loads((made / "long-seed3" / at / f"{name}.json").read_text())
            assert result["settings"]["temperature"] == temperature and len(result["episodes"]) == 2
            assert (
                result["settings"]["checkpoint"]
                == json.loads((same / "results-2.json").read_text())["settings"]["checkpoint"]
            )
    assert "| 0 | " in done.stdout and "| 4 | " in done.stdout
    assert (made / "long-seed3" / "000001" / "adapter" / "adapter_model.safetensors").exists()
    assert (made / "along.png").stat().st_size > 10_000 and (made / "budget.md").exists()

    # LIBERO-PRO: what is there is kept, here all but one of either policy's columns.
    columns = [
        f"libero_object{change}"
        for change in ("", "_lan", "_swap", "_object", "_task", "_task_told", "_told")
    ]
    files = {
        (c, n): tmp_path / "results" / c / n / "results-2.json"
        for c in columns
        for n in ("start", "rl-seed3")
    }
    lacking = [("libero_object_swap", "rl-seed3"), ("libero_object_told", "start")]
    for (column, name), file in files.items():
        if column != "libero_object" and (column, name) not in lacking:
            file.parent.mkdir(parents=True)
            suite = "libero_object" if column.endswith("_told") else column
            settings_of = {"suite": suite, "temperature": 0.6, "render": trained["settings"]["render"]}
            settings_of |= {} if column.endswith("_told") else {"whole_vocabulary": False}
            result = json.loads((made / name / "results-2.json").read_text())
            file.write_text(json.dumps(result | {"settings": settings_of}))
    before = times(tmp_path / "results")
    done = evidence("pro")
    assert done.returncode == 0, done.stderr
    assert times(tmp_path / "results").items() >= before.items()
    swap, told = (json.loads(files[cell].read_text()) for cell in lacking)
    assert (swap["settings"]["suite"], swap["settings"]["seed"]) == ("libero_object_swap", 3)
    assert told["told"][0].startswith("pick up the cream cheese") and told["total"]["episodes"] == 2
    assert f"| | {' | '.join(columns)} |" in done.stdout
    settings |= {"SUITE": "libero_goal"}
    refused = evidence("pro")
    assert refused.returncode != 0 and "TOLD: is to list, for every task of libero_goal" in refused.stderr

    # A comparison that fails leaves its earlier table.
    table, file = (tmp_path / "results" / "suites.md").read_text(), made / "start" / "results-2.json"
    good = file.read_text()
    file.write_text(good.replace('"temperature": 0.6', '"temperature": 1.0'))
    refused = evidence("suites")
    assert refused.returncode == 1 and "temperature is 1.0 and 0.6" in refused.stderr
    assert table and (tmp_path / "results" / "suites.md").read_text() == table
    file.write_text(good)

    # A result without its policy: another training is not taken for it.
    settings |= {"SUITE": "libero_object"}
    shutil.rmtree(tmp_path / "work")
    shutil.rmtree(made / "rl-seed3" / "adapter")
    (made / "rl-seed3" / "placements.json").unlink()
    refused = evidence("states")
    assert refused.returncode == 1 and "rl-seed3 has no adapter, so its policy is gone" in refused.stderr
    assert not (tmp_path / "work").exists()
    shutil.rmtree(made / "long-seed3" / "000001" / "adapter")
    done = evidence("budget")  # with all evaluations there, it needs no weights
    assert done.returncode == 0 and "| 4 | " in done.stdout, done.stderr
    shutil.rmtree(made / "long-seed3" / "000001")
    before = times(made)
    refused = evidence("budget")
    lost = made / "long-seed3" / "000001"
    assert refused.returncode == 1 and f"{lost} has no adapter, so its policy is gone" in refused.stderr
    assert f"or move {lost.parent} away" in refused.stderr
    assert times(made) == before and not lost.exists() and not (tmp_path / "work").exists()


@pytest.mark.parametrize("suite", ["libero_object", "libero_spatial"])
def test_sentences_told_fit_the_goals_of_libero_pro(suite):
    """TOLD of task t names the stock task whose target is, in the scene of _task, what the goal is about: the same thing, or, where
    the things are two equal bowls, the one at the same place."""
    from libero.libero.envs.bddl_utils import robosuite_parse_problem

    def target(name, task_id):
        problem = robosuite_parse_problem(str(bddl_path(name, task_id)))
        ((_, thing, _),) = problem["goal_state"]
        (place,) = (words[2] for words in problem["initial_state"] if words[1] == thing)
        return place if suite == "libero_spatial" else thing.rsplit("_", 1)[0]

    script = (ROOT / "scripts" / "evidence.sh").read_text()
    (told,) = re.findall(rf'{suite}\) : "\$\{{TOLD:=([\d,]+)\}}"', script)
    told = [int(task_id) for task_id in told.split(",")]
    assert [target(suite, task_id) for task_id in told] == [target(f"{suite}_task", t) for t in range(10)]
