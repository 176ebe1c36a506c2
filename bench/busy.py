"""A busy machine: a decision alone and beside a competing program, and two trainings side by side.

    python -m bench busy

torch's threads wait for each other by spinning. On a machine with more running threads than cores, the one that is waited
for may not be running, and a spinning thread burns the share of the processor that would let it run. GOMP_SPINCOUNT limits
how long threads spin before they sleep; libgomp reads it once, so each setting has processes of its own. How bad it gets
differs from start to start, so each setting is started several times.
"""

import contextlib
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from bench.common import ROOT, table, training_flags
from envs import LiberoVecEnv
from policy import ActorCritic, OpenVLA
from support.cli import flag
from support.errors import UserError

SPINCOUNTS = {"libgomp's default": "300000", "10,000 (set here)": "10000"}  # GOMP_SPINCOUNT


@dataclass
class Args:
    suite: str = flag("libero_object", "LIBERO suite")
    task_id: int = flag(0, "task of that suite", min=0)
    num_envs: int = flag(16, "environments", min=1, max=1000)
    decisions: int = flag(
        20, "decisions of all environments measured alone, and as many beside the competitor", min=2
    )
    starts: int = flag(3, "processes of each setting", min=1)
    iterations: int = flag(
        3, "iterations of each train.py that are measured, after one to warm up; 0 = none", min=0
    )
    out: Path = flag(Path("runs/bench-busy.json"), "where the numbers go")


def serve(conn, suite, task_id, num_envs):
    """Main function of a measuring process: seconds of each of n decisions, whenever an n comes."""
    model = OpenVLA.from_pretrained(ROOT / "checkpoints" / suite / "policy")
    actor_critic = ActorCritic(model, targets="language")
    actor_critic.merge_for_rollout()
    envs = LiberoVecEnv(suite, num_envs, [task_id], action_repeat=model.action_repeat, progress=False)
    generators = [torch.Generator().manual_seed(i) for i in range(num_envs)]
    obs, _ = envs.reset(seed=0)
    for count in iter(conn.recv, None):
        seconds = []
        for _ in range(count):
            began = time.perf_counter()
            input_ids, mask = model.tokenize(obs["instruction"])
            images = actor_critic.embed_images(model.preprocess(obs["agentview"]))
            tokens, *_ = actor_critic.act(input_ids, mask, patch_embeddings=images, generator=generators)
            seconds.append(time.perf_counter() - began)
            obs = envs.step(model.decode_actions(tokens, suite))[0]
        conn.send(seconds)
    envs.close()


@contextlib.contextmanager
def competitor():
    """Another torch program of the same priority, as many threads as torch likes."""
    code = "import torch\na = torch.randn(600, 600)\nprint(flush=True)\nwhile True: a @ a"
    environment = {k: v for k, v in os.environ.items() if k != "GOMP_SPINCOUNT"}
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment)
    try:
        process.stdout.readline()  # it runs
        yield
    finally:
        process.kill()
        process.wait()


def measure_start(args, spincount):
    """One process with this GOMP_SPINCOUNT: seconds of decisions {"alone": [...], "beside": [...]}."""
    os.environ["GOMP_SPINCOUNT"] = spincount  # of the child
    conn, theirs = multiprocessing.Pipe()
    arguments = theirs, args.suite, args.task_id, args.num_envs
    process = multiprocessing.get_context("spawn").Process(target=serve, args=arguments, daemon=False)
    process.start()
    theirs.close()

    def ask(count):
        conn.send(count)
        try:
            return conn.recv()
        except EOFError:
            raise UserError("the measuring process died; its last words are above") from None

    try:
        ask(5)  # warm
        alone = ask(args.decisions)
        with competitor():
            beside = ask(args.decisions)
        conn.send(None)
        process.join(30)
    finally:
        process.kill()
    return {"alone": alone, "beside": beside}


def start_training(args, out):
    flags = training_flags(
        suite=args.suite,
        task_ids=args.task_id,
        num_envs=args.num_envs,
        num_steps=32,
        total_steps=args.num_envs * 32 * (1 + args.iterations),
        critic_warmup=0,
        out=out,
    )
    return subprocess.Popen(
        [sys.executable, "train.py", *flags],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def training_rates(args, count):
    """Decisions per second of `count` trainings that run side by side, mean over the measured iterations."""
    with tempfile.TemporaryDirectory() as folder:
        runs = {Path(folder, str(k)): None for k in range(count)}
        rates = []
        try:
            for out in runs:
                runs[out] = start_training(args, out)
            for out, run in runs.items():
                _, errors = run.communicate()
                if run.returncode:
                    raise UserError(f"train.py failed: {errors.strip().splitlines()[-1]}")
                lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
                rates.append(float(np.mean([line["charts/SPS"] for line in lines if line["iteration"] > 1])))
        finally:  # when one fails, the others would go on
            for run in filter(None, runs.values()):
                run.kill()
                run.wait()
    return rates


def measure(args):
    rows, spincount = [], os.environ.get("GOMP_SPINCOUNT")
    bar = tqdm(total=args.starts * len(SPINCOUNTS), desc="starts", leave=False)
    for _ in range(args.starts):  # settings take turns
        for name, value in SPINCOUNTS.items():
            rows.append({"setting": name, **measure_start(args, value)})
            bar.update()
    bar.close()
    os.environ.pop("GOMP_SPINCOUNT")
    if spincount is not None:
        os.environ["GOMP_SPINCOUNT"] = spincount
    trainings = {}
    if args.iterations:
        for count in (1, 2):
            trainings[count] = training_rates(args, count)
    return dict(environments=args.num_envs, starts=rows, trainings=trainings)


def show(r):
    print(
        f"\na decision of {r['environments']} environments (pictures to actions), milliseconds, {r['machine']['cores']} cores"
    )
    rows = []
    for name in SPINCOUNTS:
        starts = [row for row in r["starts"] if row["setting"] == name]
        # (starts, n)
        alone, beside = (1e3 * np.array([row[kind] for row in starts]) for kind in ("alone", "beside"))
        medians = np.median(alone), np.median(beside)
        rows.append((name, *medians, medians[1] / medians[0], beside.mean(1).max(), beside.max()))
    columns = [
        "GOMP_SPINCOUNT",
        "alone:.0f",
        "beside another:.0f",
        "ratio:.1f",
        "mean of the worst start:.0f",
        "longest:.0f",
    ]
    table(columns, rows)
    if r["trainings"]:
        alone, pair = r["trainings"][1][0], r["trainings"][2]
        print(
            f"\ntrain.py: {alone:.1f} decisions/s alone; two side by side {pair[0]:.1f} and {pair[1]:.1f}, "
            f"together {sum(pair) / alone:.2f} x one alone (1 would be a fair share)"
        )
