"""A VLM of transformers as reward model: stock and tuned, alone and in the loop."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rprm_toys import STATS, make_qwen, run, small_openvla, write_demos

import reward_model as rm
from models.vlm import VLM
from policy import ActorCritic, build_tiny
from support.errors import UserError

WHERE = Path(rm.__file__).parent


@pytest.fixture(params=["Qwen2-VL", "Qwen2.5-VL"])
def qwen(request, tmp_path):
    return make_qwen(tmp_path, request.param)


def test_stock_vlm_scores_frames(qwen):
    vlm = VLM.from_pretrained(qwen)
    frames = np.random.default_rng(0).integers(0, 255, (5, 128, 128, 3), dtype=np.uint8)
    together = vlm.score_frames(frames, ["pick up the red block"] * 5)
    assert together.shape == (5,) and ((0 <= together) & (together <= 1)).all() and together.std() > 1e-4
    alone = [vlm.score_frames(frames[i : i + 1], ["pick up the red block"])[0] for i in range(5)]
    np.testing.assert_allclose(together, alone, atol=1e-5)
    other = vlm.score_frames(frames, ["pick up the green block"] * 5)
    assert np.abs(other - together).max() > 1e-4  # it reads the instruction


def test_stock_vlm_that_is_none(tmp_path):
    with pytest.raises(UserError, match="no vision-language model at"):
        VLM.from_pretrained(tmp_path)


def rollout_of(frames, texts, action_tokens=None, final={}):
    """What a reward model of frames reads of a `ppo.RolloutBuffer`: frames (T + 1, N, H, W, 3), texts of the N environments."""
    T, N = len(frames) - 1, len(texts)
    final = {where: (frame, None) for where, frame in final.items()}
    return SimpleNamespace(
        frames=frames,
        instructions=[texts] * (T + 1),
        rewards=torch.zeros(T, N),
        final_observations=final,
        action_tokens=torch.zeros(T, N, 7, dtype=torch.long) if action_tokens is None else action_tokens,
    )


@pytest.fixture(scope="module")
def policy():
    return ActorCritic(small_openvla(), lora_rank=2, targets="language")


def test_stock_vlm_scores_a_rollout(qwen, policy):
    """Instructions mixed, both modes, a truncated episode's own last frame."""
    vlm = VLM.from_pretrained(qwen)
    rng = np.random.default_rng(0)
    texts = ["pick up the red block", "pick up the green block"]
    frames = rng.integers(0, 255, (4, 2, 128, 128, 3), dtype=np.uint8)
    final = rng.integers(0, 255, (128, 128, 3), dtype=np.uint8)
    want = torch.tensor(
        [[vlm.score_frames(seen[n : n + 1], [texts[n]])[0] for n in range(2)] for seen in frames]
    )
    scores, following = rm.load_reward_model(qwen, policy, "sum").score_rollout(
        rollout_of(frames, texts), "sum"
    )
    torch.testing.assert_close(scores, want[:3].float(), rtol=0, atol=1e-5)
    assert scores.std() > 1e-3 and not following.any() and following.shape == (3, 2)
    in_the_loop = rm.load_reward_model(qwen, policy, "potential")
    scores, following = in_the_loop.score_rollout(
        rollout_of(frames, texts, final={(1, 0): final}), "potential"
    )
    torch.testing.assert_close(scores, want[:3].float(), rtol=0, atol=1e-5)
    want[2, 0] = vlm.score_frames(final[None], texts[:1])[0]  # follows step 1 of environment 0
    torch.testing.assert_close(following, want[1:].float(), rtol=0, atol=1e-5)


def test_bins_are_the_policys(policy):
    """An action written for a VLM is the policy's own bin, whichever way it comes: as a token, or as numbers."""
    vlm = VLM.__new__(VLM)
    keys = ("q01", "q99", "mask")
    vlm.info = {"action": {key: STATS["toy"]["action"][key] for key in keys}}
    actions = np.random.default_rng(0).uniform(-1.1, 1.1, (500, 7))
    actions[:, 6] = actions[:, 6] > 0
    tokens = torch.from_numpy(policy.model.encode_actions(actions, "toy"))
    bins = vlm.encode_actions(actions)
    assert (
        torch.equal(bins, policy.model.action_tokenizer.ascending_bins(tokens))
        and bins.min() == 0
        and bins.max() == 255
    )
    # A word that is no action, which --whole-vocabulary may sample, is the nearest end, as `decode` has it.
    words = torch.tensor([0, policy.model.action_tokenizer.first - 1, policy.model.text["vocab_size"] - 1])
    assert policy.model.action_tokenizer.ascending_bins(words).tolist() == [255, 255, 0]
    np.testing.assert_array_equal(vlm.decode_actions(bins), policy.model.decode_actions(tokens, "toy"))


STATISTICS = tuple(np.array(STATS["toy"]["action"][key]) for key in ("q01", "q99", "mask"))


def vlm_examples(vlm, n=200):
    """Positive where the image is bright AND the hand goes up; instructions of two lengths."""
    rng = np.random.default_rng(0)
    bright, up = rng.random(n) < 0.7, rng.random(n) < 0.7
    frames = (rng.integers(0, 60, (n, 64, 64, 3)) + 180 * bright[:, None, None, None]).astype(np.uint8)
    actions = np.zeros((n, 7))
    actions[:, 2] = np.where(up, 0.8, -0.8)
    texts = [f"pick up the {'red' if i % 2 else 'green , green'} block" for i in range(n)]
    images, actions = vlm.encode_images(frames), vlm.encode_actions(actions)
    return rm.Examples(texts, images, actions, torch.from_numpy(bright & up).float(), torch.arange(n) // 6)


def test_a_vlm_learns_the_labels_by_its_adapter(qwen, policy, tmp_path):
    vlm = VLM.from_pretrained(qwen).add_adapter(qwen, STATISTICS, rank=8)
    before = {name: p.clone() for name, p in vlm.model.named_parameters()}
    examples = vlm_examples(vlm)
    held_out = rm.split(examples, 0.25, seed=0)
    best, history = rm.fit(
        vlm,
        examples.select(~held_out),
        examples.select(held_out),
        epochs=12,
        batch_size=32,
        micro_batch_size=8,
        lr=1e-2,
        patience=12,
        action_dropout=0.2,
        whole_vocabulary=False,
        seed=0,
    )
    assert best["auroc"] > 0.9 and best["nll"] < 0.8 * history[0]["nll"]
    changed = [name for name, p in vlm.model.named_parameters() if not torch.equal(p, before[name])]
    assert (
        changed and all("lora_" in name for name in changed) and not any("visual" in name for name in changed)
    )

    # Rows of other lengths beside it change no row, and what was saved scores like what was trained.
    rows, shown = examples.select(torch.arange(6)), torch.tensor([False, True] * 3)
    with torch.no_grad():
        together = vlm.answer_logits(rows, shown)
        for i in range(6):
            torch.testing.assert_close(
                vlm.answer_logits(rows.select([i]), shown[i : i + 1])[0], together[i], rtol=0, atol=2e-4
            )
    vlm.save(tmp_path / "rprm", {"suite": "toy"})
    assert (tmp_path / "rprm" / "adapter_model.safetensors").stat().st_size < 300_000
    again = rm.read_reward_model(str(tmp_path / "rprm"))
    assert isinstance(again, VLM) and again.info["suite"] == "toy" and again.info["vlm"] == str(qwen)
    np.testing.assert_allclose(rm.predict(again, rows), rm.predict(vlm, rows), atol=1e-4)
    assert not any(p.requires_grad for p in again.model.parameters())

    # In the loop: `sum` shows it the actions, `potential` does not.
    texts = rows.instructions[:2]
    tokens = policy.model.action_tokenizer.vocab_end - 1 - rows.actions[:2]
    rollout = rollout_of(rows.images[:2].numpy()[None].repeat(4, 0), texts, tokens.repeat(3, 1, 1))
    shown, _ = rm.load_reward_model(str(tmp_path / "rprm"), policy, "sum").score_rollout(rollout, "sum")
    np.testing.assert_allclose(shown[0], rm.predict(again, rows.select([0, 1])), atol=1e-4)
    other = ActorCritic(small_openvla(), lora_rank=2, targets="language")
    other.model.norm_stats = {"toy": {"action": {**STATS["toy"]["action"], "q01": [-2.0] * 7}}}
    with pytest.raises(UserError, match="other action statistics than the policy"):
        rm.load_reward_model(str(tmp_path / "rprm"), other, "sum")
    alone, _ = rm.load_reward_model(str(tmp_path / "rprm"), policy, "potential").score_rollout(
        rollout, "potential"
    )
    np.testing.assert_allclose(alone[0], rm.predict(again, rows.select([0, 1]), state_only=True), atol=1e-4)
    assert not torch.allclose(shown, alone, atol=1e-3)


@pytest.mark.parametrize("qwen", ["Qwen2.5-VL"], indirect=True)
def test_a_vlm_is_tuned_from_the_command_line(qwen, tmp_path, capsys):
    small_openvla().save_pretrained(tmp_path / "sft")
    write_demos(tmp_path / "toy_demo.hdf5", 4)
    demos, out = ["--demos", str(tmp_path / "toy_demo.hdf5"), "--suite", "toy"], tmp_path / "rprm"
    run(
        [
            "train",
            *demos,
            "--vlm",
            str(qwen),
            "--policy",
            str(tmp_path / "sft"),
            "--out",
            str(out),
            "--epochs",
            "1",
            "--lr",
            "1e-3",
            "--batch-size",
            "16",
        ]
    )
    assert "AUROC" in capsys.readouterr().out
    run(["score", *demos, "--rprm", str(out), "--json", str(tmp_path / "s.json"), "--limit", "1"])
    (record,) = json.loads((tmp_path / "s.json").read_text())
    assert len(record["scores"]) == len(record["labels"]) and all(0 <= s <= 1 for s in record["scores"])
    with pytest.raises(UserError, match="is a tuned VLM"):
        rm.RPRM.from_pretrained(out)
    (out / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match="no vision-language model at"):
        rm.read_reward_model(str(out))


@pytest.mark.libero
@pytest.mark.slow
@pytest.mark.parametrize("qwen", ["Qwen2.5-VL"], indirect=True)
def test_stock_vlm_in_the_loop(qwen, tmp_path):
    """`train.py --reward-model VLM`, with the paper's sum, whose payment is easy to add up."""
    model = build_tiny(0, image_size=32, width=32, layers=2, heads=2, mlp=64)
    model.norm_stats["libero_object"] = {
        "action": {"q01": [-1.0] * 7, "q99": [1.0] * 7, "mask": [True] * 6 + [False]}
    }
    model.save_pretrained(tmp_path / "policy")
    flags = f"""--task-ids 0 --model {tmp_path / "policy"} --reward-model {qwen} --out {tmp_path / "run"} --num-envs 2
        --num-workers 1 --num-steps 3 --total-steps 6 --max-episode-steps 8 --eval-every 0 --start-episodes 0 --final-episodes 0
        --video-every 0 --prm-mode sum --prm-weight 0.02"""
    done = subprocess.run(
        [sys.executable, "train.py", *flags.split()],
        cwd=WHERE,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (metrics,) = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert 0 < metrics["charts/prm_score"] < 1
    paid = metrics["charts/reward"] * 6 - metrics["charts/sparse_return"] * 2
    assert paid == pytest.approx(0.02 * metrics["charts/prm_score"] * 6, rel=1e-3)
