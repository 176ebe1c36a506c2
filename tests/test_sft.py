"""sft.py: labels that decode to what was demonstrated, a loss checked by hand, and training that learns."""

import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import test_train
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from peft.utils import load_peft_weights
from safetensors.torch import load_file

import sft
from models.images import crop_and_normalize
from models.tiny import tiny_tokenizer
from policy import PROMPT, OpenVLA, build_tiny, policy_convention
from support import demonstrations
from support.cli import parse_args
from support.errors import UserError
from support.training import load_state, save_state

ROOT = Path(__file__).resolve().parents[1]
SMALL = {**test_train.SMALL, "patch_size": 8}


@given(st.integers(1, 6), st.integers(0, 20), st.integers(0, 2**31))
def test_grouped_actions_are_means_and_last_gripper(repeat, extra, seed):
    actions = np.random.default_rng(seed).uniform(-1, 1, (repeat + extra, 7))
    grouped = sft.group_actions(actions, repeat)
    assert grouped.shape == (extra + 1, 7)
    for start in range(extra + 1):
        rows = actions[start : start + repeat]
        np.testing.assert_allclose(grouped[start, :6], rows[:, :6].mean(0), atol=1e-12)
        assert grouped[start, 6] == rows[-1, 6]


def test_gripper_changes_convention():
    file = np.array([[0, 0, 0, 0, 0, 0, -1.0], [0, 0, 0, 0, 0, 0, 1.0]])
    assert policy_convention(file)[:, 6].tolist() == [1.0, 0.0]  # -1 = open -> 1; +1 = close -> 0
    assert file[0, 6] == -1.0  # the input stays as it was


def test_statistics_match_numpy_and_labels_decode_within_a_bin():
    rng = np.random.default_rng(0)
    actions = np.concatenate(
        [rng.normal(0, 0.4, (500, 3)), np.zeros((500, 3)), rng.integers(0, 2, (500, 1))], 1
    )
    stats = sft.dataset_statistics(actions, 7)
    np.testing.assert_allclose(stats["action"]["q99"], np.quantile(actions, 0.99, axis=0))
    np.testing.assert_allclose(stats["action"]["q01"], np.quantile(actions, 0.01, axis=0))
    assert stats["action"]["mask"] == [True] * 6 + [False] and stats["num_trajectories"] == 7
    model = build_tiny(0, ["a"], **SMALL)
    model.norm_stats["suite"] = stats
    decoded = model.decode_actions(model.encode_actions(actions, "suite"), "suite")
    low, high = np.array(stats["action"]["q01"]), np.array(stats["action"]["q99"])
    inside = np.clip(actions, low, high)
    assert np.abs(decoded - inside)[:, :6].max() <= (high - low).max() / 255 + 1e-12
    assert ((decoded[:, 6] > 0.5) == (actions[:, 6] > 0.5)).all()
    assert (decoded[:, 3:6] == 0).all()  # a dimension that never moves decodes to exactly that


def test_loss_against_a_loop():
    torch.manual_seed(0)
    logits, bins = torch.randn(3, 7, 256), torch.randint(0, 256, (3, 7))
    soft = torch.tensor([True] * 3 + [False] * 4)
    loss = sft.action_loss(logits, bins, 2.5, soft)
    for b in range(3):
        for k in range(7):
            log_p = logits[b, k].double().log_softmax(-1)
            if soft[k]:
                weight = torch.tensor(
                    [np.exp(-0.5 * ((j - bins[b, k].item()) / 2.5) ** 2) for j in range(256)]
                )
                expected = -(weight / weight.sum() * log_p).sum()
            else:
                expected = -log_p[bins[b, k]]
            assert abs(loss[b, k].item() - expected.item()) < 1e-4
    torch.testing.assert_close(
        sft.action_loss(logits, bins, 0.0, soft),
        torch.nn.functional.cross_entropy(logits.permute(0, 2, 1), bins, reduction="none"),
    )


def _demo(images, actions):
    """A demonstration of T pictures, stored as given, and actions, with zeros for all else that a file holds."""
    sizes = dict(states=5, robot_states=9, ee_pos=3, ee_ori=3, ee_states=6, gripper_states=2, joint_states=7)
    return {
        "actions": actions,
        "agentview_rgb": images,
        **{k: np.zeros((len(actions), n)) for k, n in sizes.items()},
    }


def test_prefixes_follow_the_targets():
    """Drawn as often as the targets say, at a range's end too; where targets are one-hot, the demonstrated bin."""
    soft = torch.tensor([True] * 3 + [False] * 4)
    bins = torch.tensor([[100, 255, 3, 50, 0, 255, 7]]).expand(20_000, -1)
    generator = torch.Generator().manual_seed(0)
    drawn = sft.draw_prefix(bins, 8.0, soft, generator)
    assert torch.equal(drawn[:, 3:], bins[:, 3:])
    for k in range(3):
        share = torch.bincount(drawn[:, k], minlength=256) / len(drawn)
        expected = np.exp(-0.5 * ((np.arange(256) - bins[0, k].item()) / 8.0) ** 2)
        expected = torch.from_numpy(expected / expected.sum())
        error = (expected * (1 - expected) / len(drawn)).sqrt()
        assert ((share - expected).abs() < 5 * error + 1e-4).all()
    assert torch.equal(sft.draw_prefix(bins, 0.0, soft, generator), bins)


def test_an_action_that_its_prefix_gives_away_is_learnt_from_the_picture(tmp_path):
    """Demonstrations whose x is exactly zero wherever z goes up: the sampled policy, whose x is not exact, still goes up."""
    rng = np.random.default_rng(0)
    up, down, elsewhere = range(3)

    def picture(kind):
        frame = rng.integers(0, 40, (32, 32, 3), dtype=np.uint8)
        where = {up: np.s_[:, 16:], down: np.s_[:, :16], elsewhere: np.s_[:]}[kind]
        frame[where] += 180 if kind == elsewhere else 60
        return frame

    def demo():
        kinds = rng.integers(0, 3, 12)
        x = {
            up: lambda: 0.0,
            down: lambda: rng.choice([-1, 1]) * rng.uniform(0.02, 0.1),
            elsewhere: lambda: rng.uniform(-1, 1),
        }
        actions = np.zeros((12, 7))
        actions[:, 0] = [x[kind]() for kind in kinds]
        actions[:, 2], actions[:, 6] = np.where(kinds == up, 0.8, -0.8), 1
        return _demo(np.stack([picture(kind)[::-1, ::-1] for kind in kinds]), actions)

    demonstrations.write_demos(
        tmp_path / "libero_object" / "task_0_demo.hdf5", [demo() for _ in range(30)], 4, "task 0"
    )
    build_tiny(0, ["task", "0"], **SMALL).save_pretrained(tmp_path / "init")
    args = sft.Args(init=str(tmp_path / "init"), steps=200, lr=3e-3, warmup=10, ema=0.9, jitter=0, held_out=0)
    model, weights, _ = sft.prepare_model(args, "cpu")
    training = sft.Training(
        args,
        model,
        weights,
        sft.Dataset({"libero_object": tmp_path / "libero_object"}, model.image_size, model.action_repeat),
    )
    for step in range(1, 201):
        training.train_step(step)
    kinds = np.arange(100) % 2
    with training.averaged_weights(), torch.no_grad():
        ids, mask = model.tokenize(["task 0"] * 100)
        frames = model.preprocess(np.stack([picture(kind) for kind in kinds]))
        tokens = model.generate_actions(
            ids, frames, mask, temperature=1.0, generator=torch.Generator().manual_seed(0)
        ).tokens
        z = model.decode_actions(tokens, "libero_object")[:, 2]
    assert (z[kinds == up] > 0).mean() > 0.7  # 0.2 behind the demonstrated prefix
    assert (z[kinds == down] > 0).mean() < 0.3


def _write_demos(directory, repeat=4, tasks=2):
    """Two tasks whose action follows from the image: a bright half says which way to go."""
    rng = np.random.default_rng(0)
    for task in range(tasks):
        out = []
        for _ in range(6):
            T = 8
            side = rng.integers(0, 2, T)
            images = rng.integers(0, 40, (T, 32, 32, 3), dtype=np.uint8)
            for t in range(T):
                images[t, :, 16 * side[t] : 16 * side[t] + 16] += 180
            actions = np.zeros((T, 7))
            actions[:, 0], actions[:, 6] = np.where(side == 1, 0.8, -0.8), np.where(side == 1, 1, -1)
            out.append(_demo(images, actions))
        demonstrations.write_demos(directory / f"task_{task}_demo.hdf5", out, repeat, f"task {task}")


FLAGS = "--batch-size 16 --held-out 0.2 --lr 3e-3 --warmup 10 --ema 0.9 --threads 1".split()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Demonstrations whose picture tells the action, and a small untrained model."""
    folder = tmp_path_factory.mktemp("inputs")
    _write_demos(folder / "data" / "libero_object")
    build_tiny(0, ["task", "0", "1"], **SMALL).save_pretrained(folder / "init")
    return ["--data", str(folder / "data"), "--init", str(folder / "init"), *FLAGS]


def _sft(*argv, code=0):
    run = subprocess.run(
        [sys.executable, "sft.py", *map(str, argv)], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == code and "Traceback" not in run.stderr, run.stderr
    return run


def _result(out):
    """(weights, log without the times, statistics) of a finished training."""
    log = json.loads((out / "sft_log.json").read_text())["log"]
    log = [{k: v for k, v in entry.items() if k != "seconds"} for entry in log]
    config = json.loads((out / "config.json").read_text())
    return (out / "model.safetensors").read_bytes(), log, config["norm_stats"]


@pytest.mark.slow
def test_training_learns_from_images_and_killed_and_resumed_equals_uninterrupted(inputs, tmp_path):
    """SIGKILL somewhere after a checkpoint, then Ctrl-C: the same weights and the same log, bit for bit."""
    flags, state = [*inputs, "--steps", 300, "--save-every", 60], tmp_path / "b" / "training.pt"
    _sft(*flags, "--out", tmp_path / "a")

    def interrupt(number, saves, *argv):
        """Send the signal once training.pt was written `saves` times."""
        last = state.stat().st_mtime_ns if state.exists() else 0
        run = subprocess.Popen(
            [sys.executable, "sft.py", *map(str, argv)], cwd=ROOT, stderr=subprocess.PIPE, text=True
        )
        while run.poll() is None and saves:
            now = state.stat().st_mtime_ns if state.exists() else last
            saves, last = saves - (now != last), now
            time.sleep(0.005)
        run.send_signal(number)
        return run.wait(60), run.stderr.read()

    assert interrupt(signal.SIGKILL, 2, *flags, "--out", tmp_path / "b")[0] == -signal.SIGKILL
    # not overwritten
    assert f"--resume {tmp_path / 'b'}" in _sft(*flags, "--out", tmp_path / "b", code=1).stderr
    code, err = interrupt(signal.SIGINT, 1, "--resume", tmp_path / "b")
    assert code == 130 and f"python sft.py --resume {tmp_path / 'b'}" in err
    assert "resumed after step" in _sft("--resume", tmp_path / "b").stdout
    assert _result(tmp_path / "a") == _result(tmp_path / "b")
    _, log, statistics = _result(tmp_path / "a")
    assert [entry["step"] for entry in log] == [60, 120, 180, 240, 300]
    assert log[-1]["held_out_gripper_accuracy"] > 0.9  # held-out images; guessing gives about 0.5
    assert statistics["libero_object"]["num_trajectories"] == 12
    assert (tmp_path / "a" / "sft.png").read_bytes()[:4] == b"\x89PNG"
    assert not list((tmp_path / "a").glob("training*"))  # done: nothing to resume
    assert "holds no unfinished training" in _sft("--resume", tmp_path / "b", code=1).stderr


def _training(inputs, **settings):
    args = sft.Args(**{"init": inputs[3], "held_out": 0.2, "batch_size": 4, **settings})
    model, weights, save = sft.prepare_model(args, "cpu")
    data = sft.Dataset(
        {"libero_object": Path(inputs[1]) / "libero_object"}, model.image_size, model.action_repeat
    )
    return sft.Training(args, model, weights, data), save


def test_what_is_saved_is_the_average_and_the_schedule_is_as_printed(inputs, tmp_path):
    training, save = _training(inputs, ema=0.3, lr=1e-2, warmup=2, steps=4)
    expected = {name: p.detach().clone() for name, p in training.weights.items()}
    for step in range(1, 5):
        training.train_step(step)
        lr = 1e-2 * min(1, step / 2) * (0.02 + 0.49 * (1 + math.cos(math.pi * step / 4)))
        assert [group["lr"] for group in training.optimizer.param_groups] == [pytest.approx(lr)] * 2
        decay = min(0.3, (1 + step) / (10 + step))
        for name, p in training.weights.items():
            expected[name] = decay * expected[name] + (1 - decay) * p.detach()
    now = {name: p.detach().clone() for name, p in training.weights.items()}
    with training.averaged_weights():
        save(tmp_path / "out")
    saved = load_file(tmp_path / "out" / "model.safetensors")
    for name in now:
        torch.testing.assert_close(saved[name], expected[name], rtol=0, atol=1e-6)
        assert torch.equal(training.weights[name], now[name])
    assert max((now[name] - expected[name]).abs().max() for name in now) > 1e-5


def test_held_out_demonstrations_are_not_trained_on(inputs):
    training, _ = _training(inputs)
    data, both = training.data, (training.train_rows, training.held_rows)
    assert sorted(torch.cat(both).tolist()) == list(range(len(data.actions)))
    inside, outside = (set(data.demo[rows].tolist()) for rows in both)
    assert not inside & outside and len(outside) == round(0.2 * data.num_demos)


def test_state_of_other_demonstrations_or_damaged_is_refused(inputs, tmp_path):
    (training, _), path = _training(inputs), tmp_path / "training.pt"
    training.train_step(1)
    save_state(training.state_dict(), path)
    load_state(training, path)
    with pytest.raises(UserError, match="not the demonstrations"):
        training.data.actions = training.data.actions[:-1]
        load_state(training, path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot resume from"):
        load_state(training, path)


def test_statistics_per_data_set(inputs, tmp_path):
    """Two data sets in one training: each has its own range, so that the same motion has another token in each."""
    for name, scale in (("one", 1.0), ("two", 0.5)):
        actions = scale * np.linspace(-1, 1, 21)[:, None] * np.ones(7)
        actions[:, 6] = np.where(np.arange(21) % 2, 1, -1)
        demo = {
            "actions": actions,
            "agentview_rgb": np.zeros((21, 32, 32, 3), np.uint8),
            "ee_pos": np.zeros((21, 3)),
        }
        demonstrations.write_demos(
            tmp_path / name / "push_demo.hdf5", [demo | {"gripper_states": np.zeros((21, 2))}], 4, "push"
        )
    model = OpenVLA.from_pretrained(inputs[3])
    data = sft.Dataset(
        {name: tmp_path / name for name in ("one", "two")}, model.image_size, model.action_repeat
    )
    tokens, soft = data.tokenize(model)
    assert model.norm_stats["one"]["action"]["q99"][0] == pytest.approx(
        2 * model.norm_stats["two"]["action"]["q99"][0]
    )
    assert torch.equal(tokens[:21], tokens[21:]) and data.instructions == ["push"]
    assert soft[:, :3].all() and not soft[:, 3:].any()


@pytest.mark.libero
@pytest.mark.slow
def test_success_in_the_simulator_is_in_log_and_curve(inputs, tmp_path):
    often = ["--save-every", 2, "--eval-every", 4, "--eval-episodes", 1]
    _sft(*inputs, "--out", tmp_path / "a", "--steps", 4, *often)
    first, last = _result(tmp_path / "a")[1]
    assert "success_rate" not in first and last["success_rate"] == 0  # hardly trained
    assert (tmp_path / "a" / "sft.png").exists()


@pytest.mark.parametrize("kind", ["no data", "other repeat"])
def test_bad_data_is_one_line(tmp_path, kind):
    if kind == "other repeat":
        _write_demos(tmp_path / "data" / "libero_object", repeat=3, tasks=1)
    run = subprocess.run(
        [sys.executable, "sft.py", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "o")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1 and "Traceback" not in run.stderr and not (tmp_path / "o").exists()
    assert ("demos.py" if kind == "no data" else "--action-repeat 4") in run.stderr


# --------------------------------------------------------------------------------------------------------------------
# Adapters, several ranks
# --------------------------------------------------------------------------------------------------------------------

OFFICIAL = ROOT / "tests" / "fixtures" / "openvla_tiny"  # a small OpenVLA in the official layout


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """Demonstrations of single control steps, as official files are, and the small official model with a tokenizer."""
    folder = tmp_path_factory.mktemp("official")
    _write_demos(folder / "data" / "libero_object", repeat=1)
    model = OpenVLA.from_pretrained(OFFICIAL)
    # ids below the official vocabulary's end: all that is asked
    tokenizer = tiny_tokenizer(["task", "0", "1"], PROMPT)
    model.side_files["tokenizer.json"] = tokenizer.to_str().encode()
    model.save_pretrained(folder / "init")
    return ["--data", str(folder / "data"), "--init", str(folder / "init")]


def test_adapters_in_bfloat16_resume_exactly_and_merge(official, tmp_path):
    """As at 7B: frozen bfloat16 weights, adapters in peft's format, micro-batches, recomputed activations."""
    recipe = dict(
        lora_rank=4,
        dtype="bfloat16",
        merge=True,
        gradient_checkpointing=True,
        label_sigma=0,
        jitter=1.0,
        ema=0,
    )
    sizes = dict(batch_size=6, micro_batch_size=4, lr=1e-2, warmup=1)
    training, save = _training(official, **recipe, **sizes)
    assert all(p.dtype == torch.float32 and "lora_" in name for name, p in training.weights.items())
    base = {k: p.clone() for k, p in training.model.named_parameters() if "lora_" not in k}
    assert {p.dtype for p in base.values()} == {torch.bfloat16}
    for step in (1, 2):
        training.train_step(step)
    save_state(training.state_dict(), tmp_path / "training.pt")
    for step in (3, 4):
        training.train_step(step)

    again, _ = _training(official, **recipe, **sizes)
    load_state(again, tmp_path / "training.pt")
    assert again.step == 2
    for step in (3, 4):
        again.train_step(step)
    assert all(torch.equal(p, again.weights[name]) for name, p in training.weights.items())
    assert all(torch.equal(p, base[k]) for k, p in training.model.named_parameters() if "lora_" not in k)

    save(tmp_path / "out")
    config = LoraConfig.from_pretrained(tmp_path / "out" / "adapters" / "policy")
    assert config.r == 4 and load_peft_weights(
        tmp_path / "out" / "adapters" / "policy", device="cpu"
    ).keys() == {f"base_model.model.{name}" for name in training.weights}
    merged = OpenVLA.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    # what official files hold stays with them
    assert merged.norm_stats.keys() >= {"libero_object"} and merged.unused
    rows = training.held_rows[:4]
    pixels, prompt = crop_and_normalize(training.data.images(rows)), training.data.instruction[rows]
    theirs = merged.action_logits(
        training.input_ids[prompt], training.mask[prompt], training.tokens[rows], pixel_values=pixels
    )
    ours = training.loss_and_logits(rows, training.tokens[rows], pixels)[1]
    plain = OpenVLA.from_pretrained(official[3], dtype=torch.bfloat16)
    start = plain.action_logits(
        training.input_ids[prompt], training.mask[prompt], training.tokens[rows], pixel_values=pixels
    )
    assert (theirs - ours).abs().mean() < 0.1 * (
        start - ours
    ).abs().mean()  # bfloat16 rounds; the adapter is in


def test_an_evaluation_on_no_suite_is_refused_at_once(capsys, monkeypatch, tmp_path):
    flags = [
        "--suite",
        "kitchen",
        "--eval-every",
        "5",
        "--data",
        str(tmp_path),
        "--out",
        str(tmp_path / "out"),
    ]
    monkeypatch.setattr("sys.argv", ["sft.py", *flags])
    with pytest.raises(SystemExit) as stop:
        sft.main(parse_args(sft.Args, ""))
    assert (
        stop.value.code == 1
        and "unknown suite" in capsys.readouterr().err
        and not (tmp_path / "out").exists()
    )


@pytest.mark.slow
def test_an_adapter_alone_says_how_to_make_it_a_policy(official, tmp_path):
    """Word for word: the command it prints makes what eval.py takes."""
    out = _sft(*official, "--lora-rank", 2, "--steps", 1, "--batch-size", 2, "--out", tmp_path / "out").stdout
    assert not (tmp_path / "out" / "config.json").exists() and "eval.py" not in out
    command = out.split("python ")[1].replace("DIRECTORY", str(tmp_path / "merged")).split()
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
    assert OpenVLA.from_pretrained(tmp_path / "merged").norm_stats.keys() >= {"libero_object"}


def test_bfloat16_without_adapters_is_refused():
    with pytest.raises(UserError, match="--lora-rank"):
        sft.prepare_model(sft.Args(dtype="bfloat16"), "cpu")


@pytest.mark.slow
def test_two_ranks_make_the_steps_of_one(inputs, tmp_path):
    flags = [*inputs, "--steps", 20, "--save-every", 10, "--batch-size", 7]
    _sft(*flags, "--out", tmp_path / "one")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "sft.py"]
    argv = [*torchrun, *map(str, flags), "--out", str(tmp_path / "two")]
    run = subprocess.run([sys.executable, *argv], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-4)
    (_, log, statistics), (_, other, others) = _result(tmp_path / "one"), _result(tmp_path / "two")
    assert statistics == others and [entry["step"] for entry in other] == [10, 20]
    assert other[-1]["train_loss"] == pytest.approx(log[-1]["train_loss"], rel=1e-4)
    assert other[-1]["held_out_loss"] == pytest.approx(log[-1]["held_out_loss"], abs=2e-4)
