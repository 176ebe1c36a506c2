"""bench/: what it compares computes the same, every command measures what its table names, and all run here in small."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

import train
from bench import (
    busy,
    decode,
    envs,
    gpu,
    iteration,
    leak,
    model,
    pictures,
    placements,
    prefix,
    scaling,
    sentence,
    soak,
    update,
)
from bench.__main__ import COMMANDS
from bench.common import machine, table
from eval import evaluate
from policy import ActorCritic, OpenVLA
from support.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINT = ROOT / "tests" / "fixtures" / "openvla_tiny"  # in the official layout


@pytest.fixture(scope="module")
def official():
    return model.load(CHECKPOINT, "cpu", torch.float32)


def test_commands_are_modules_and_the_list_answers_at_once():
    def run(*argv):
        return subprocess.run(
            [sys.executable, "-X", "importtime", "-m", "bench", *argv],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )

    listed = run("--help")
    assert listed.returncode == 0 and all(f"  {name} " in listed.stdout for name in COMMANDS)
    assert "torch" not in listed.stderr and "mujoco" not in listed.stderr
    unknown = run("env")
    assert unknown.returncode == 2 and "error: no benchmark 'env': choose one of envs" in unknown.stderr
    assert {path.stem for path in (ROOT / "bench").glob("*.py")} >= COMMANDS.keys()


def test_table_aligns_and_shows_what_is_missing(capsys):
    table(["", "steps/s:.1f", "ratio:.2f"], [("stock", 12.345, 1.0), ("ours, light", 123.4, None)])
    assert capsys.readouterr().out == (
        "\n             steps/s  ratio\nstock           12.3   1.00\nours, light    123.4      -\n"
    )


def test_decode_compares_equal_tokens(official):
    """transformers' Llama and `generate` on our tensors, alone and padded on the left, choose our tokens."""
    result = decode.compare(official, 3, 1, "cpu")
    assert result["same_tokens"] == {decode.ONE: 1.0, decode.BATCHED: 1.0}
    assert len(result["rates"]) == 5 and all(
        0 < r["slowest"] <= r["fastest"] for r in result["rates"].values()
    )


def test_update_compares_equal_log_probs():
    """The plain actor-critic that `update` compares with: the same distribution, the same trained layers."""
    torch.manual_seed(0)
    ours = ActorCritic(
        model.load(CHECKPOINT, "cpu", torch.float32), 4, 4, targets="language", whole_vocabulary=True
    )
    start = ours.base_policy()
    plain = update.PlainActorCritic(start, 4, 4)
    ids, mask, pixels = model.observations(start, 3)
    tokens, log_probs, _ = ours.act(ids, mask, pixel_values=pixels, temperature=1.5)
    theirs, entropy = plain.evaluate_actions(ids, mask, tokens, pixel_values=pixels, temperature=1.5)
    torch.testing.assert_close(theirs, log_probs, rtol=0, atol=1e-4)
    want = ours.evaluate_actions(ids, mask, tokens, pixel_values=pixels, temperature=1.5).entropy
    torch.testing.assert_close(entropy, want, rtol=0, atol=1e-4)
    mine, other = (sorted(p.shape for p in a.policy_parameters()) for a in (ours, plain))
    assert mine == other
    buffer = update.rollout_buffer(ours, start, 4, "patch_embeddings")
    for actor_critic, kind in ((plain, "pixel_values"), (ours, "patch_embeddings"), (ours, "pixel_values")):
        buffer = update.rollout_buffer(ours, start, 4, kind)
        before = [p.clone() for p in actor_critic.policy_parameters()]
        metrics = update.updater(actor_critic, buffer, 2)()
        assert metrics["losses/policy_steps"] == 1 and metrics["losses/first_ratio_error"] < 1.0
        assert any(
            not torch.equal(a, b) for a, b in zip(before, actor_critic.policy_parameters(), strict=True)
        )


def test_random_checkpoint_has_the_official_tensors(official, tmp_path):
    """Names and shapes of the reference checkpoint, the unused tensors included."""
    gpu.random_checkpoint(tmp_path / "m", official.config, torch.float32, "cpu")
    shapes = []
    for folder in (CHECKPOINT, tmp_path / "m"):
        with safe_open(folder / "model.safetensors", "pt") as file:
            shapes.append({name: file.get_slice(name).get_shape() for name in file.keys()})
    assert shapes[0] == shapes[1]


def test_random_config_is_7b():
    with torch.device("meta"):
        sizes = [
            sum(p.numel() for p in OpenVLA(gpu.random_config(size)).parameters()) for size in ("7B", "small")
        ]
    assert 7.49e9 < sizes[0] < 7.51e9 and sizes[1] < 15e6


def test_only_weights_are_a_checkpoint_that_acts(tmp_path, capsys):
    """Random weights for a run of train.py: official layout, bfloat16, statistics and a tokenizer that knows LIBERO's words."""
    args = gpu.Args(size="small", device="cpu", only_weights=True, directory=tmp_path / "weights")
    gpu.show(gpu.measure(args))
    assert str(args.directory) in capsys.readouterr().out
    model_ = OpenVLA.from_pretrained(args.directory, dtype=torch.bfloat16)
    ids, mask = model_.tokenize(["pick up the alphabet soup and place it in the basket"])
    assert 0 not in ids  # no unknown word
    tokens = model_.generate_actions(ids, torch.zeros(1, 6, 224, 224), mask).tokens
    assert model_.decode_actions(tokens, "libero_object").shape == (1, 7)


@pytest.mark.slow
def test_gpu_command_on_a_cpu(tmp_path):
    args = gpu.Args(
        size="small",
        device="cpu",
        num_envs=2,
        samples=2,
        micro_batch_size=1,
        rounds=1,
        directory=tmp_path / "weights",
        out=tmp_path / "out.json",
    )
    report = gpu.measure(args)
    assert json.loads(args.out.read_text()) == report and not args.directory.exists()
    assert len(report["stages"]) == 10
    updates = [
        stage["samples_per_s"] for name, stage in report["stages"].items() if name.startswith("update")
    ]
    assert len(updates) == 4 and min(updates) > 0
    with pytest.raises(UserError, match="--size small"):
        gpu.measure(gpu.Args(device="cpu"))
    args.directory.mkdir()
    with pytest.raises(UserError, match="exists already"):
        gpu.measure(args)
    assert args.directory.exists()  # what was there before is not removed


def test_simulated_scaling_is_the_arithmetic_of_its_parts(capsys):
    parts = dict(
        simulator_ms=12.0, inference_ms=27.0, inference_ms_per_env=21.0, update_ms=64.0, gradient_mb=882.0
    )
    args = scaling.Args(measure=False, envs=10, steps=128, cores_per_gpu=16, bandwidth=25.0, **parts)
    result = scaling.measure(args)
    by_gpus = {r["gpus"]: r for r in result["simulated"]}
    # 10 environments on 16 cores: one round of the simulator
    decision = 0.012 + 0.027 + 10 * 0.021 + 10 * 0.064
    assert by_gpus[1]["decisions_per_s"] == pytest.approx(10 / decision)
    assert by_gpus[1]["all-reduce"] == by_gpus[1]["slowest"] == 0
    # 64 GPUs: 81,920 decisions would be 640 mini-batches of 128, but a rollout of 128 steps has at most 128.
    assert by_gpus[64]["all-reduce"] == pytest.approx(128 * (2 * 63 / 64 * 0.882 / 25 + 126 * 10e-6))
    efficiency = [r["decisions_per_s"] / r["gpus"] for r in result["simulated"]]
    assert efficiency == sorted(efficiency, reverse=True) and efficiency[-1] > 0.5 * efficiency[0]
    # The fewest environments that balance: with one fewer, fixed costs are above 10 %.
    for r in result["simulated"]:
        for count, fits in ((r["balanced_envs"], True), (r["balanced_envs"] - 1, False)):
            s = count and scaling.simulate_iteration(r["gpus"], count, parts, args, 16)
            if s:
                fixed = 128 * 0.027 + s["all-reduce"]
                assert (fixed <= 0.1 * 128 * count * r["gpus"] / s["decisions_per_s"]) == fits
    scaling.show(result)
    assert "simulated" in capsys.readouterr().out and result["measured"] == []
    with pytest.raises(UserError, match="--update-ms"):
        scaling.measure(scaling.Args(measure=False, **{**parts, "update_ms": None}))


@pytest.mark.libero
@pytest.mark.slow
def test_soak_counts_every_decision_once(tmp_path):
    """Training for a while, as workers are killed and stopped."""
    args = soak.Args(
        minutes=0.3,
        kill_every=2.0,
        task_ids=[0],
        num_envs=2,
        num_workers=2,
        num_steps=4,
        out=tmp_path / "soak.json",
    )
    r = soak.measure(args)
    assert r["decisions"] == r["stored"] > 0 and r["updates"] > 0 and r["lost"] == 0
    assert (
        sum(r["faults"].values()) > 0
        and r["orphans"] == 0
        and r["exit_code"] == 130
        and r["exit_seconds"] < 20
    )
    soak.show(r)


@pytest.mark.libero
@pytest.mark.slow
def test_pictures_compares_first_frames(capsys):
    r = pictures.measure(pictures.Args(suites="libero_10", task_ids=[1], repeats=1))
    ((row,),) = r.values()
    assert (row["suite"], row["task_id"]) == ("libero_10", 1) and 30 <= row[
        "psnr"
    ] < 60  # the wicker basket, at its largest
    assert 0 < row["ms"]["light"] < row["ms"]["exact"]
    pictures.show(r)
    assert "libero_10" in capsys.readouterr().out


def test_placements_of_one_kind_are_as_near_as_each_other_and_others_are_not():
    rng = np.random.default_rng(0)
    draw = lambda n: rng.uniform(-0.02, 0.02, (n, 3, 2)) + [[0.0, 0.0], [0.1, 0.0], [0.0, 0.2]]  # noqa: E731
    states, others = draw(200), draw(200)
    same = placements.compare_places(states, others)
    # of a square: mean distance of a point from its middle is 0.77 of half its side, the median a little more
    assert 0.0145 < same["spread_states"] < 0.017 and 0.0145 < same["spread_placements"] < 0.017
    assert same["nearest_state"] == pytest.approx(same["nearest_placement"], rel=0.1)
    assert same["shift"] < 0.006 and same["flung_states"] == same["flung_placements"] == 0
    others[:, 1, 0] += 0.03
    others[7, 2, 1] += 0.5  # one flies away, and moves no median
    moved = placements.compare_places(states, others)
    assert moved["shift"] == pytest.approx(0.03, abs=0.006) and moved["flung_placements"] == 1
    assert moved["nearest_state"] > 1.3 * moved["nearest_placement"]
    assert placements.compare_places(states[:, :0], others[:, :0]) is None  # a suite without fixtures
    assert moved["spread_placements"] == pytest.approx(same["spread_placements"], rel=0.01)


@pytest.mark.libero
def test_placements_finds_things_where_libero_stored_them(capsys):
    """Test states against the joint positions in LIBERO's own file, before the simulator let things settle."""
    from simulator.task import TaskSim

    args = placements.Args(suite="libero_spatial", task_ids=[1], placements=3)
    r = placements.measure(args)
    (task,) = r["tasks"]
    assert placements.measure(args) == r  # the same seed, the same placements
    sim = TaskSim("libero_spatial", 1, "none")
    address = {
        name: sim.model.joint(f"{name}_joint0").qposadr[0] for name in ("akita_black_bowl_1", "plate_1")
    }
    for name, qpos in address.items():
        stored = np.asarray(sim.init_states)[:3, 1 + qpos : 3 + qpos]  # a state is time, then qpos
        assert task["places"][name]["middle"] == pytest.approx(np.median(stored, axis=0), abs=0.0005)
        assert task["places"][name]["range"] == pytest.approx(np.ptp(stored, axis=0), abs=0.0005)
    sim.close()
    assert task["places"]["wooden_cabinet_1"]["range"] == [0.0, 0.0]  # fixtures: one place in all test states
    assert task["fixtures"]["spread_states"] == 0.0 < task["fixtures"]["spread_placements"] < 0.03
    assert task["goal"] == [["on", "akita_black_bowl_1", "plate_1"]]
    task["task_id"], task["fixtures"] = 7, None
    placements.show(r)
    out = capsys.readouterr().out.splitlines()
    assert (
        "libero_spatial, centimetres" in out[1]
        and out[-1].startswith("7 ")
        and out[-1].split()[-2:] == ["-", "-"]
    )


@pytest.mark.libero
@pytest.mark.slow
def test_leak_watches_every_worker(capsys):
    r = leak.measure(leak.Args(episodes=110, task_ids=[0], num_envs=2, num_workers=2, max_steps=4))
    episodes = [ended for ended, *_ in r["samples"]]
    assert episodes == [50, 100, 110] and r["settled_at"] == 100
    assert all(len(workers) == 2 and min(workers) > 100 for _, workers, _ in r["samples"])
    assert len(r["growth_workers"]) == 2 and max(map(abs, r["growth_workers"])) < 0.05
    leak.show(r)
    assert "from episode 100 to 110" in capsys.readouterr().out


@pytest.mark.libero
@pytest.mark.slow
def test_envs_measures_stock_and_ours_in_one_run(capsys):
    r = envs.measure(envs.Args(rounds=1, seconds=0.5, workers=[1], envs_per_worker=2))
    assert r["variants"].keys() == envs.VARIANTS.keys()
    for v in r["variants"].values():
        (turn,) = v["turns"]
        assert (
            turn["steps"] > 0
            and turn["wall"] >= 0.5
            and 0 < v["steps_per_cpu_s"]
            and 0 < v["resets_per_cpu_s"]
        )
    assert min(r["split"].values()) > 0 and r["split"].keys() == {
        "physics",
        "controller",
        "success",
        "render",
    }
    (w,) = r["workers"]
    assert w["environments"] == 2 and 0 <= w["transport_share"] <= w["overhead_share"] + 1e-6 < 1
    assert w["physics_ms"] > 0 and w["render_ms"] > 0 and w["memory_per_worker"] > 100
    envs.show({**r, "machine": machine()})
    assert "resets/s" in capsys.readouterr().out


@pytest.mark.libero
@pytest.mark.slow
def test_busy_measures_both_settings_beside_a_competitor(capsys):
    r = busy.measure(busy.Args(num_envs=2, decisions=2, starts=1, iterations=0))
    assert [row["setting"] for row in r["starts"]] == list(busy.SPINCOUNTS)
    assert all(
        len(row[kind]) == 2 and min(row[kind]) > 0 for row in r["starts"] for kind in ("alone", "beside")
    )
    busy.show({**r, "machine": machine()})
    assert "GOMP_SPINCOUNT" in capsys.readouterr().out


def test_an_iteration_is_measured_at_the_default_sizes():
    args, tiny = iteration.Args(), train.DEFAULTS["tiny"]
    for name in ("num_envs", "num_steps", "epochs", "minibatch_size"):
        assert getattr(args, name) == tiny[name], name


@pytest.mark.libero
@pytest.mark.slow
def test_iteration_accounts_for_all_of_its_time(capsys):
    sizes = dict(task_ids=[0], iterations=1, num_envs=2, num_steps=4, epochs=1, minibatch_size=8, rounds=1)
    r = iteration.measure(iteration.Args(**sizes))
    it, parts = r["iteration"], r["update"]["parts"]
    assert 0 < it["inference"] < it["rollout"] < it["whole"] and 0 < it["update"] < it["whole"]
    assert min(parts.values()) > 0 and sum(parts.values()) == pytest.approx(r["update"]["whole"])
    assert (
        parts["rest"] < 0.5 * r["update"]["whole"]
        and 0 < sum(share for *_, share in r["update"]["operators"]) <= 1
    )
    iteration.show(r)
    assert "policy, forward" in capsys.readouterr().out


@pytest.mark.libero
def test_prefix_tells_what_the_third_token_follows():
    """Nothing changes behind the expert's own tokens; the shipped policy of libero_spatial hardly minds a bin."""
    args = prefix.Args(
        checkpoint="checkpoints/libero_spatial/policy",
        suite="libero_spatial",
        task_ids=[0],
        states=1,
        offsets=[0, 1, 128],
    )
    r = prefix.measure(args)
    same, near, far = r["rows"]
    assert r["lifts"] > 0 and same["change"] == same["changed"] == 0.0
    assert near["change"] < 0.15 and near["change"] < far["change"] <= 1.0
    assert 0.5 < same["up"] <= 1.0  # it lifts where the expert does
    prefix.show(r)


def test_each_task_is_told_the_stock_sentence_of_another():
    """Task by task; of the next task where nothing is said."""
    from simulator.suites import instructions

    stock, told = instructions("libero_object"), [1, 0, 5, 4, 7, 3, 9, 6, 2, 8]
    assert sentence.sentences_told("libero_object") == stock[1:] + stock[:1]
    # LIBERO-PRO's task 0 is to fetch the cream cheese, in other words; the list tells just that, task by task.
    renamed = sentence.sentences_told("libero_object_task", told)
    assert renamed == sentence.sentences_told("libero_object", told)
    assert renamed[0] == "pick up the cream cheese and place it in the basket"
    assert renamed == [own.replace("pick the", "pick up the") for own in instructions("libero_object_task")]
    for wrong, message in (
        ([0, 1], "2 numbers, but libero_object has 10"),
        ([10] * 10, "task id 10 is not in"),
    ):
        with pytest.raises(UserError, match=message):
            sentence.sentences_told("libero_object", wrong)


@pytest.mark.libero
def test_told_its_own_sentence_a_policy_plays_as_ever(capsys):
    sizes = dict(task_ids=[9], episodes_per_task=1, num_envs=1, seed=3)
    told = sentence.measure(sentence.Args(told=list(range(10)), **sizes))
    policy = OpenVLA.from_pretrained("checkpoints/libero_object/policy").eval()
    plain = evaluate(policy, "libero_object", [9], 1, 1, seed=3)
    assert told["episodes"] == plain.episodes and told["settings"]["temperature"] == 0.6
    sentence.show(told)
    assert capsys.readouterr().out.count("orange juice") == 2
