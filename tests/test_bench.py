"""bench.py's model part: what it compares computes the same, and its GPU command runs on a CPU with a small model."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import bench
from common import UserError
from policy import ActorCritic, OpenVLA

torch.set_num_threads(1)
CHECKPOINT = Path(__file__).parent / "fixtures" / "openvla_tiny"  # in the official layout


@pytest.fixture(scope="module")
def official():
    return bench._load(CHECKPOINT, "cpu", torch.float32)


def test_decode_compares_equal_tokens(official):
    """transformers' Llama and `generate` on our tensors, alone and padded on the left, choose our tokens."""
    result = bench.decode_model(official, 3, 1, "cpu")
    assert result["same_tokens"] == {bench.ONE: 1.0, bench.BATCHED: 1.0}
    assert len(result["rates"]) == 5 and all(0 < r["slowest"] <= r["fastest"] for r in result["rates"].values())


def test_update_compares_equal_log_probs():
    """The plain actor-critic that `update` compares with: the same distribution, the same trained layers."""
    torch.manual_seed(0)
    ours = ActorCritic(bench._load(CHECKPOINT, "cpu", torch.float32), 4, 4, targets="language", whole_vocabulary=True)
    model = ours.start_policy()
    plain = bench._PlainActorCritic(model, 4, 4)
    ids, mask, pixels = bench._observations(model, 3)
    tokens, log_probs, _ = ours.act(ids, mask, pixel_values=pixels, temperature=1.5)
    theirs, entropy = plain.evaluate_actions(ids, mask, tokens, pixel_values=pixels, temperature=1.5)
    torch.testing.assert_close(theirs, log_probs, rtol=0, atol=1e-4)
    want = ours.evaluate_actions(ids, mask, tokens, pixel_values=pixels, temperature=1.5).entropy
    torch.testing.assert_close(entropy, want, rtol=0, atol=1e-4)
    mine, other = (sorted(p.shape for p in a.policy_parameters()) for a in (ours, plain))
    assert mine == other
    buffer = bench._rollout_buffer(ours, model, 4, "patch_embeddings")
    for actor_critic, kind in ((plain, "pixel_values"), (ours, "patch_embeddings"), (ours, "pixel_values")):
        buffer = bench._rollout_buffer(ours, model, 4, kind)
        before = [p.clone() for p in actor_critic.policy_parameters()]
        metrics = bench._updater(actor_critic, buffer, 2)()
        assert metrics["losses/policy_steps"] == 1 and metrics["losses/first_ratio_error"] < 1.0
        assert any(not torch.equal(a, b) for a, b in zip(before, actor_critic.policy_parameters(), strict=True))


def test_random_checkpoint_has_the_official_tensors(official, tmp_path):
    """Names and shapes of the reference checkpoint, the unused tensors included."""
    bench.random_checkpoint(tmp_path / "m", official.config, torch.float32, "cpu")
    shapes = []
    for folder in (CHECKPOINT, tmp_path / "m"):
        with safe_open(folder / "model.safetensors", "pt") as file:
            shapes.append({name: file.get_slice(name).get_shape() for name in file.keys()})
    assert shapes[0] == shapes[1]


def test_random_config_is_7b():
    with torch.device("meta"):
        sizes = [sum(p.numel() for p in OpenVLA(bench.random_config(size)).parameters()) for size in ("7B", "small")]
    assert 7.49e9 < sizes[0] < 7.51e9 and sizes[1] < 15e6


@pytest.mark.slow
def test_gpu_command_on_a_cpu(tmp_path):
    args = bench.GpuArgs(size="small", device="cpu", num_envs=2, samples=2, micro_batch_size=1, rounds=1,
                         directory=tmp_path / "weights", out=tmp_path / "out.json")
    report = bench.gpu(args)
    assert json.loads(args.out.read_text()) == report and not args.directory.exists()
    assert len(report["stages"]) == 10
    updates = [stage["samples_per_s"] for name, stage in report["stages"].items() if name.startswith("update")]
    assert len(updates) == 4 and min(updates) > 0
    with pytest.raises(UserError, match="--size small"):
        bench.gpu(bench.GpuArgs(device="cpu"))
    args.directory.mkdir()
    with pytest.raises(UserError, match="exists already"):
        bench.gpu(args)
    assert args.directory.exists()  # what was there before is not removed
