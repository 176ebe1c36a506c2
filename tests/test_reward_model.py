"""RPRM: scores and shaping, training on the real tiny model, scores of a rollout, files and commands."""

import functools
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from rprm_toys import copy_of, run, small_openvla, write_demos

import reward_model as rm
from models.answer import score_of
from policy import ActorCritic, OpenVLA, build_tiny
from scripts import rprm
from support import metrics
from support.errors import UserError

# ---- scores --------------------------------------------------------------------------------------------------------


def test_score_is_the_posterior_at_the_true_rate_of_positives():
    """Two Gaussians, learnt from balanced draws: their log-odds, scored at a prior of 0.1, are calibrated where 0.1 are positive."""
    rng = np.random.default_rng(0)
    labels = rng.random(200_000) < 0.1
    x = rng.normal(np.where(labels, 1.0, -1.0), 1.0)
    # log N(x; 1, 1) - log N(x; -1, 1) = 2x: what balanced draws teach
    logits = torch.from_numpy(np.stack([x, -x], axis=1))
    score = score_of(logits, 0.1).numpy()
    assert metrics.calibration(score, labels)["ece"] < 0.005 and score.mean() == pytest.approx(0.1, abs=0.005)
    bare = score_of(logits, 0.5).numpy()
    np.testing.assert_allclose(bare, torch.softmax(logits, dim=1)[:, 0].numpy())
    assert metrics.calibration(bare, labels)["ece"] > 0.05 and metrics.auroc(bare, labels) == pytest.approx(
        metrics.auroc(score, labels)
    )


@pytest.mark.parametrize("prior", [0, 1.0, "often", None])
def test_a_prior_that_is_none_is_named(tiny, prior):
    with pytest.raises(UserError, match="prior"):
        rm.RPRM(tiny, {"prior": prior})


# ---- shaping ---------------------------------------------------------------------------------------------------------


def test_potential_telescopes():
    """Discounted, the shaping of a terminated episode sums to -weight * phi(s_0); a truncated one keeps its last phi."""
    rng, gamma, weight = np.random.default_rng(0), 0.9, 0.5
    phi = rng.random(8)
    for terminated_at_end in (True, False):
        terminated = np.zeros(7, bool)
        terminated[-1] = terminated_at_end
        rewards = rm.shaping_reward(phi[:-1], phi[1:], "potential", weight, gamma, terminated)
        expected = weight * ((not terminated_at_end) * gamma**7 * phi[-1] - phi[0])
        assert (gamma ** np.arange(7) * rewards).sum() == pytest.approx(expected)


def test_shaping_modes():
    scores, following = torch.tensor([[0.2, 0.9]]), torch.tensor([[0.5, 0.7]])
    done = torch.tensor([[False, True]])
    assert rm.shaping_reward(scores, following, "none", 0.3, 0.99, done).tolist() == [[0, 0]]
    torch.testing.assert_close(rm.shaping_reward(scores, following, "sum", 0.3, 0.99, done), 0.3 * scores)
    out = rm.shaping_reward(scores, following, "potential", 1.0, 0.9, done)
    torch.testing.assert_close(out, torch.tensor([[0.9 * 0.5 - 0.2, -0.9]]))
    assert out.dtype == torch.float32
    with pytest.raises(ValueError, match="none, sum, potential"):
        rm.shaping_reward(scores, following, "product", 1.0, 0.9, done)


# ---- model -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny():
    return small_openvla()


@pytest.fixture(scope="module")
def examples(tiny):
    """A separable set: positive where the image is bright AND the hand goes up, so both image and action matter."""
    rng = np.random.default_rng(0)
    n = 240
    bright, up = rng.random(n) < 0.7, rng.random(n) < 0.7
    frames = rng.integers(0, 60, (n, 64, 64, 3)) + 180 * bright[:, None, None, None]
    actions = rng.uniform(-0.2, 0.2, (n, 7))
    actions[:, 2] = np.where(up, 0.8, -0.8)
    return rm.Examples(
        [f"pick up the {'red' if i % 2 else 'green'} block" for i in range(n)],
        rm.embed_frames(tiny, frames.astype(np.uint8)).half(),
        torch.from_numpy(tiny.encode_actions(actions, "toy")),
        torch.from_numpy(bright & up).float(),
        torch.arange(n) // 10,
    )


@pytest.mark.parametrize("whole_vocabulary", [False, True])
def test_training_raises_auroc(tiny, examples, whole_vocabulary):
    model = copy_of(tiny)
    held_out = rm.split(examples, 0.25, seed=0)
    best, history = rm.fit(
        rm.RPRM(model, {}),
        examples.select(~held_out),
        examples.select(held_out),
        epochs=14,
        batch_size=32,
        lr=5e-3,
        patience=14,
        action_dropout=0.2,
        whole_vocabulary=whole_vocabulary,
        seed=0,
    )
    assert best["auroc"] > 0.9 and best["auroc"] > history[0]["auroc"] + 0.1
    assert best["nll"] == min(entry["nll"] for entry in history)  # early stop keeps the best weights ...
    prior = float(examples.labels[~held_out].mean())
    again = rm.measure(rm.RPRM(model, {"prior": prior}), examples.select(held_out))
    assert again["nll"] == pytest.approx(best["nll"], abs=1e-5)  # ... in the model
    assert best["auroc_state_only"] > 0.6  # bright images are likelier to be positive, whatever the action
    assert rm.RPRM(model, {}).shares_vision(tiny)  # the vision side is untouched
    changed = [k for k, v in model.state_dict().items() if not torch.equal(v, tiny.state_dict()[k])]
    assert changed and all(k.startswith("language_model.") for k in changed)


def test_split_keeps_trajectories_whole(examples):
    held_out = rm.split(examples, 0.25, seed=0)
    inside, outside = (
        set(examples.trajectory[held_out].tolist()),
        set(examples.trajectory[~held_out].tolist()),
    )
    assert not inside & outside and len(inside) == 6
    with pytest.raises(UserError, match="too few"):
        rm.split(examples.select(examples.trajectory == 0), 0.25, seed=0)


def test_score_of_a_batch_equals_single_scores(tiny, examples):
    reward_model = rm.RPRM(copy_of(tiny), {})
    # spread the scores: random answer rows give 0.5 +- nothing
    reward_model.model.language_model.lm_head.weight[reward_model.token_ids].mul_(50)
    texts = ["pick up the red block", "place it in the basket and pick up the green block"] * 3
    ids, mask = tiny.tokenize(texts)
    rows = examples.select(torch.arange(6))
    embeddings, tokens = rows.images.float(), rows.actions
    for action_tokens in (tokens, None):
        together = reward_model.score(ids, mask, action_tokens, patch_embeddings=embeddings)
        assert together.shape == (6,) and ((0 <= together) & (together <= 1)).all() and together.std() > 1e-3
        assert not together.requires_grad
        for i in range(6):
            one_ids, one_mask = tiny.tokenize([texts[i]])
            one = None if action_tokens is None else tokens[i : i + 1]
            alone = reward_model.score(one_ids, one_mask, one, patch_embeddings=embeddings[i : i + 1])
            torch.testing.assert_close(together[i : i + 1], alone, atol=1e-5, rtol=0)


def test_score_from_pixels_equals_score_from_embeddings(tiny, examples):
    reward_model = rm.RPRM(copy_of(tiny), {})
    frames = np.random.default_rng(1).integers(0, 255, (2, 64, 64, 3), dtype=np.uint8)
    pixels = tiny.preprocess(frames)
    ids, mask = tiny.tokenize(["pick up the red block"] * 2)
    tokens = examples.actions[:2]
    a = reward_model.score(ids, mask, tokens, pixel_values=pixels)
    b = reward_model.score(ids, mask, tokens, patch_embeddings=tiny.embed_images(pixels))
    torch.testing.assert_close(a, b)


# ---- in the RL loop --------------------------------------------------------------------------------------------------


def rollout_of(model, image_kind, T=5, N=3):
    """What a reward model reads of a `ppo.RolloutBuffer`: frames, prompts of two lengths, tokens, one truncated episode."""
    rng = np.random.default_rng(0)
    texts = [
        "pick up the red block",
        "place it in the basket and pick up the green block",
        "pick up the red block",
    ]
    frames = rng.integers(0, 255, (T + 1, N, 64, 64, 3), dtype=np.uint8)
    final = rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)

    def images_of(frames):
        pixels = model.preprocess(frames)
        return pixels if image_kind == "pixel_values" else model.embed_images(pixels).detach()

    ids, mask = model.tokenize(texts)
    images = torch.stack([images_of(step) for step in frames])
    tokens = torch.from_numpy(model.encode_actions(rng.uniform(-1, 1, (T * N, 7)), "toy")).view(T, N, 7)
    return SimpleNamespace(
        frames=frames, instructions=[texts] * (T + 1), images=images, image_kind=image_kind, action_tokens=tokens,
        input_ids=ids.expand(T + 1, N, -1), attention_mask=mask.expand(T + 1, N, -1), rewards=torch.zeros(T, N),
        final_observations={(2, 1): (final, images_of(final[None])[0])},
    )  # fmt: skip


def save_reward_model(model, path):
    with torch.no_grad():  # spread the scores: random answer rows give 0.5 +- nothing
        model.language_model.lm_head.weight[rm.RPRM(model, {}).token_ids] *= 5
    rm.RPRM(model, {}).save(path, {})


def test_the_loops_score_is_the_trained_one_at_the_prior(tiny, examples):
    """With an action, and of the state alone: the prompt that training showed, its odds times prior / (1 - prior)."""
    reward_model = rm.RPRM(copy_of(tiny), {"prior": 0.1})
    reward_model.model.language_model.lm_head.weight[reward_model.token_ids] *= 5
    rows = examples.select(torch.arange(6))
    ids, mask = tiny.tokenize(rows.instructions)
    for actions, hidden in ((rows.actions, False), (None, True)):
        with torch.no_grad():
            p = reward_model.answer_logits(rows, torch.full((6,), hidden)).double().softmax(1)
        odds = p[:, 0] / p[:, 1] * 0.1 / 0.9
        score = reward_model.score(ids, mask, actions, patch_embeddings=rows.images.float())
        assert score.std() > 1e-3
        torch.testing.assert_close(score.double(), odds / (1 + odds), rtol=0, atol=1e-5)
        np.testing.assert_allclose(rm.predict(reward_model, rows, hidden), score, atol=1e-5)


def test_positives_are_drawn_as_often_as_negatives():
    """One row in ten is positive; a model that says "0" with 0.9 pays for half of its draws."""
    parameter, logits, n = torch.nn.Parameter(torch.zeros(())), torch.tensor([[0.1, 0.9]]).log(), 400
    constant = SimpleNamespace(parameters=[parameter], prior=0.5, ROWS=256)
    constant.answer_logits = lambda batch, *_: logits.expand(len(batch), 2) + 0 * parameter
    constant.token_ids = [0, 1]
    labels = (torch.arange(n) % 10 == 0).float()
    rows = rm.Examples(["x"] * n, torch.zeros(n, 1), torch.zeros(n, 7).long(), labels, torch.arange(n))
    settings = dict(epochs=5, batch_size=100, lr=0.0, patience=5, action_dropout=0.0, whole_vocabulary=False)
    _, history = rm.fit(constant, rows, rows, **settings, seed=0)
    paid = np.mean([entry["train_loss"] for entry in history[1:]])
    assert paid == pytest.approx(-0.5 * np.log(0.1 * 0.9), abs=0.1) and constant.prior == pytest.approx(0.1)


@pytest.mark.parametrize("vision", ["the policy's", "trained by PPO", "another"])
def test_scores_of_a_rollout(tiny, tmp_path, vision):
    """Whichever form of the picture is read, the scores are those of each observation by itself."""
    other = copy_of(tiny)
    if vision == "another":
        other.projector.fc3.weight.data *= 1.5
    save_reward_model(other, tmp_path / "rprm")
    targets = "all" if vision == "trained by PPO" else "language"
    policy = ActorCritic(copy_of(tiny), lora_rank=2, targets=targets)
    rollout = rollout_of(tiny, "pixel_values" if targets == "all" else "patch_embeddings")
    alone = rm.RPRM.from_pretrained(tmp_path / "rprm")
    T, N = rollout.rewards.shape

    def score(frame, n, tokens=None):
        text = rollout.instructions[0][n : n + 1]
        return alone.score_frames(frame[None], text, None if tokens is None else tokens[None])[0]

    source = {"the policy's": "patch_embeddings", "trained by PPO": "pixel_values", "another": "frames"}[
        vision
    ]
    in_the_loop = rm.load_reward_model(tmp_path / "rprm", policy, "sum")
    assert in_the_loop.source == source
    scores, following = in_the_loop.score_rollout(rollout, "sum")
    assert scores.dtype == following.dtype == torch.float32 and scores.std() > 1e-3
    want = [[score(rollout.frames[t, n], n, rollout.action_tokens[t, n]) for n in range(N)] for t in range(T)]
    np.testing.assert_allclose(scores, want, atol=1e-5)
    assert following.shape == (T, N) and not following.any()

    scores, following = in_the_loop.score_rollout(rollout, "potential")
    want = np.array([[score(rollout.frames[t, n], n) for n in range(N)] for t in range(T + 1)])
    assert want.std() > 0.02
    np.testing.assert_allclose(scores, want[:-1], atol=1e-5)
    want[3, 1] = score(rollout.final_observations[2, 1][0], 1)  # follows step 2 of environment 1
    np.testing.assert_allclose(following, want[1:], atol=1e-5)

    in_the_loop.CHUNK = 4  # memory only
    again, _ = in_the_loop.score_rollout(rollout, "potential")
    torch.testing.assert_close(again, scores, rtol=0, atol=1e-5)


def test_no_reward_model_gives_zeros(tiny):
    rollout = rollout_of(tiny, "patch_embeddings")
    for table in rm.load_reward_model(None, None, "none").score_rollout(rollout, "none"):
        assert table.shape == rollout.rewards.shape and not table.any()


def test_a_reward_model_of_another_vocabulary_is_refused(tiny, tmp_path):
    save_reward_model(copy_of(tiny), tmp_path / "rprm")
    words = [f"w{i}" for i in range(80)]
    other = build_tiny(
        0, words, image_size=56, patch_size=14, vision_width=32, vision_blocks=2, vision_heads=2
    )
    with pytest.raises(UserError, match="trained from another model than the policy"):
        rm.load_reward_model(tmp_path / "rprm", ActorCritic(other, lora_rank=2), "sum")


def test_a_reward_model_that_reads_actions_otherwise_is_refused_where_it_is_shown_them(tiny, tmp_path):
    """`sum` hands it the policy's action tokens, whose motions follow from the statistics in its own checkpoint."""
    save_reward_model(copy_of(tiny), tmp_path / "rprm")
    policy = copy_of(tiny)
    wider = {**policy.norm_stats["toy"]["action"], "q99": [1.5] + [1.0] * 6}
    policy.norm_stats = {"toy": {"action": wider}, "other": policy.norm_stats["toy"]}
    policy = ActorCritic(policy, lora_rank=2, targets="language")
    with pytest.raises(UserError, match="other action statistics than the policy.*--prm-mode potential"):
        rm.load_reward_model(tmp_path / "rprm", policy, "sum", "toy")
    with pytest.raises(UserError, match="no action statistics 'other'"):
        rm.load_reward_model(tmp_path / "rprm", policy, "sum", "other")
    assert rm.load_reward_model(tmp_path / "rprm", policy, "potential", "toy").source == "patch_embeddings"


# ---- an adapter, for 7B ----------------------------------------------------------------------------------------------


def test_learning_rate_decays_without_a_progress_bar_too(tiny, examples, monkeypatch):
    settings = dict(
        epochs=2, batch_size=60, lr=5e-3, patience=2, action_dropout=0.2, whole_vocabulary=False, seed=0
    )
    _, shown = rm.fit(rm.RPRM(copy_of(tiny), {}), examples, examples, **settings)
    monkeypatch.setattr(rm, "progress_bar", functools.partial(rm.progress_bar, disable=True))
    _, hidden = rm.fit(rm.RPRM(copy_of(tiny), {}), examples, examples, **settings)
    assert hidden == shown


def test_an_adapter_learns_the_labels(tiny, examples, tmp_path):
    """`--lora-rank`: the backbone stays, the file is small, and what was saved scores like what was trained."""
    copy_of(tiny).save_pretrained(tmp_path / "policy")
    model = OpenVLA.from_pretrained(tmp_path / "policy")
    reward_model = rm.RPRM(model, {})
    torch.manual_seed(0)
    reward_model.add_adapter(tmp_path / "policy", rank=16)
    assert reward_model.model.gradient_checkpointing
    before = {name: p.clone() for name, p in model.named_parameters()}
    held_out = rm.split(examples, 0.25, seed=0)
    best, history = rm.fit(
        reward_model, examples.select(~held_out), examples.select(held_out), epochs=12, batch_size=32, micro_batch_size=16,
        lr=5e-3, patience=12, action_dropout=0.2, whole_vocabulary=False, seed=0,
    )  # fmt: skip
    assert best["auroc"] > 0.8 and best["nll"] < 0.75 * history[0]["nll"]
    changed = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert changed and all("lora_" in name and name.startswith("language_model.") for name in changed)

    reward_model.save(tmp_path / "rprm", {"suite": "toy"})
    whole = (tmp_path / "policy" / "model.safetensors").stat().st_size
    assert (tmp_path / "rprm" / "adapter" / "adapter_model.safetensors").stat().st_size < 0.3 * whole
    again = rm.read_reward_model(tmp_path / "rprm")
    rows = examples.select(torch.arange(8))
    for state_only in (False, True):
        np.testing.assert_allclose(
            rm.predict(again, rows, state_only), rm.predict(reward_model, rows, state_only), atol=1e-5
        )
    assert again.shares_vision(tiny) and again.prior == reward_model.prior

    tensors = tmp_path / "rprm" / "adapter" / "adapter_model.safetensors"
    content = tensors.read_bytes()
    tensors.write_bytes(content[:500])
    with pytest.raises(UserError, match="adapter_model.safetensors cannot be read"):
        rm.read_reward_model(tmp_path / "rprm")
    tensors.write_bytes(content)
    other = copy_of(tiny)
    other.language_model.lm_head.weight.data += 1
    other.save_pretrained(tmp_path / "policy")
    with pytest.raises(UserError, match="was trained on other weights than these"):
        rm.read_reward_model(tmp_path / "rprm")
    (tmp_path / "policy" / "config.json").unlink()
    with pytest.raises(UserError, match="policy"):
        rm.read_reward_model(tmp_path / "rprm")


def test_frames_are_kept_where_embeddings_are_larger(tiny):
    """As at 7B, whose embedding of a picture takes 2 MB: embedded anew in every batch, to the same answer."""
    frames = np.random.default_rng(0).integers(0, 255, (3, 64, 64, 3), dtype=np.uint8)
    small, large = rm.RPRM(copy_of(tiny), {}), rm.RPRM(copy_of(tiny), {})
    large.keeps_frames = True
    assert not small.keeps_frames
    texts, tokens, labels = ["pick up the red block"] * 3, torch.full((3, 7), 70), torch.zeros(3)
    answers = []
    for model in (small, large):
        batch = rm.Examples(texts, model.encode_images(frames), tokens, labels, labels.long())
        answers.append(model.answer_logits(batch, torch.zeros(3, dtype=torch.bool)))
    assert batch.images.dtype == torch.uint8
    torch.testing.assert_close(*answers, rtol=0, atol=2e-3)  # float16 of what is kept


# ---- files and command line ------------------------------------------------------------------------------------------


def test_reader_turns_images_upright(tmp_path):
    write_demos(tmp_path / "toy_demo.hdf5", 12, hz=20)
    trajectories = list(rprm.read_trajectories(tmp_path))
    assert len(trajectories) == 12 and trajectories[0]["action_repeat"] == 1
    assert [t["name"].split("_")[-1] for t in trajectories] == [str(i) for i in range(12)]  # 2 before 10
    assert trajectories[0]["frames"][30, :32].mean() > 40 > trajectories[0]["frames"][30, 32:].mean() == 0
    assert trajectories[0]["instruction"] == "pick up the red block"


def test_label_command_plots(tmp_path, capsys):
    write_demos(tmp_path / "toy_demo.hdf5", 3, broken=[1])
    run(["label", "--demos", str(tmp_path), "--plot", str(tmp_path / "plots")])
    assert "2 of 3 trajectories used" in capsys.readouterr().out
    files = sorted((tmp_path / "plots").iterdir())
    assert len(files) == 3  # the broken one too: it is what a person wants to look at
    for file in files:
        with Image.open(file) as image:
            image.load()
            assert (
                image.format == "PNG" and image.width > 800 and np.ptp(np.asarray(image.convert("L"))) > 100
            )


def test_train_and_score_commands(tiny, tmp_path, capsys):
    """Labels -> training -> saved model -> scores, through the command line and the files."""
    copy_of(tiny).save_pretrained(tmp_path / "sft")
    write_demos(tmp_path / "toy_demo.hdf5", 8, broken=[2])
    demos, out = ["--demos", str(tmp_path / "toy_demo.hdf5")], tmp_path / "rprm"
    run(
        [
            "train",
            *demos,
            "--suite",
            "toy",
            "--policy",
            str(tmp_path / "sft"),
            "--out",
            str(out),
            "--epochs",
            "4",
            "--lr",
            "2e-3",
            "--batch-size",
            "16",
            "--failures",
            demos[1],
            "--successes",
            demos[1],
            "--limit",
            "4",
        ]
    )
    printed = capsys.readouterr().out
    # --limit is of the demonstrations: 4 + 8 + 8, 3 of them broken
    assert "17 of 20 trajectories used" in printed and "AUROC" in printed
    info = json.loads((out / "rprm.json").read_text())
    assert (
        info["label_rule"]["window"] == 0.6 and 0 <= info["held_out"]["auroc"] <= 1 and info["train_rows"] > 0
    )
    reward_model = rm.RPRM.from_pretrained(out)
    assert reward_model.info == info and reward_model.shares_vision(tiny)
    assert reward_model.prior == info["prior"] and 0 < info["prior"] < 0.5
    assert not any(p.requires_grad for p in reward_model.model.parameters())

    run(
        [
            "score",
            *demos,
            "--suite",
            "toy",
            "--rprm",
            str(out),
            "--json",
            str(tmp_path / "s.json"),
            "--limit",
            "1",
            "--plot",
            str(tmp_path / "plots"),
        ]
    )
    (record,) = json.loads((tmp_path / "s.json").read_text())
    assert len(record["scores"]) == len(record["labels"]) and all(0 <= s <= 1 for s in record["scores"])
    assert len(list((tmp_path / "plots").iterdir())) == 1


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["label", "--demos", "nowhere"], "no demonstrations at nowhere"),
        (["label", "--demos", "cut.hdf5"], "cut.hdf5"),
        (["score", "--demos", "toy.hdf5"], "one of --rprm and --vlm"),
        (["score", "--demos", "toy.hdf5", "--rprm", "nowhere"], "no checkpoint at nowhere"),
        (["train", "--demos", "toy.hdf5", "--policy", "./nowhere"], "nowhere"),
        (["label", "--demos", "toy.hdf5", "--window", "-1"], "--window"),
        (["record", "--suite", "libero_moon"], "libero_moon"),
    ],
)
def test_bad_input_is_one_line(arguments, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_demos(tmp_path / "toy.hdf5", 1)
    (tmp_path / "cut.hdf5").write_bytes((tmp_path / "toy.hdf5").read_bytes()[:3000])
    with pytest.raises(SystemExit) as stop:
        run(arguments)
    error = capsys.readouterr().err.strip()
    assert stop.value.code != 0 and expected in error and error.startswith("error:") and "\n" not in error


def test_reward_model_is_told_from_a_stock_vlm(tmp_path):
    with pytest.raises(UserError, match="no checkpoint at .*nothing"):
        rm.read_reward_model(str(tmp_path / "nothing"))
    build_tiny(0, words=["red"]).save_pretrained(tmp_path / "policy")
    with pytest.raises(UserError, match="holds no rprm.json"):  # a policy is no reward model
        rm.read_reward_model(str(tmp_path / "policy"))


def test_the_commands_former_name_points_to_the_present_one():
    done = subprocess.run(
        [sys.executable, rm.__file__, "train"], capture_output=True, text=True, cwd=Path(rm.__file__).parent
    )
    assert (
        done.returncode == 1 and done.stderr.startswith("error:") and "python -m scripts.rprm" in done.stderr
    )
