"""The policy against the official code's outputs (tests/fixtures), against itself in batches, on broken files."""

import copy
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import policy
from models.sampling import sample
from models.tiny import libero_words
from policy import ActionTokenizer, ActorCritic, OpenVLA
from support.errors import UserError, explain_out_of_memory

FIXTURES = Path(__file__).parent / "fixtures"
CHECKPOINT = FIXTURES / "openvla_tiny"
INSTRUCTIONS = [
    "pick up the milk and place it in the basket",
    "open the top drawer",
    "turn on the stove and put the pot on it",
]
WORDS = sorted(set(" ".join(INSTRUCTIONS).split()))


@pytest.fixture(scope="module")
def official():
    return OpenVLA.from_pretrained(CHECKPOINT)


@pytest.fixture(scope="module")
def expected():
    return np.load(CHECKPOINT / "expected.npz")


@pytest.fixture(scope="module")
def prompts(expected):
    """The three reference prompts alone, and the same three as one right-padded batch."""
    alone = [
        (torch.tensor(expected[f"input_ids_{i}"]), torch.tensor(expected[f"pixel_values_{i}"]).float())
        for i in range(3)
    ]
    longest = max(ids.shape[1] for ids, _ in alone)
    ids = torch.cat([F.pad(ids, (0, longest - ids.shape[1]), value=32000) for ids, _ in alone])
    return alone, (ids, torch.cat([pixels for _, pixels in alone]), (ids != 32000).long())


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)  # peft draws its adapters from the global generator


def same(a, b):
    """Equal up to rounding: matrix products may round differently with the alignment of their memory."""
    return torch.allclose(a, b, rtol=0, atol=1e-5)


def tiny(seed=0, **sizes):
    return policy.build_tiny(seed, words=WORDS, **sizes)


def spread(model, scale=10.0):
    """Random weights give near-uniform distributions; a larger head makes tokens that differ for a reason."""
    with torch.no_grad():
        model.language_model.lm_head.weight.mul_(scale)
    return model


@pytest.fixture(scope="module")
def small():
    return spread(tiny())


@pytest.fixture(scope="module")
def batch(small):
    ids, mask = small.tokenize(INSTRUCTIONS)
    return ids, mask, torch.randn(3, 6, 112, 112, generator=torch.Generator().manual_seed(0))


# ---- against the official code ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("i", range(3))
def test_official_outputs(official, expected, prompts, i):
    ids, pixels = prompts[0][i]
    with torch.no_grad():
        # stored as float16: compare at its precision
        reference = expected[f"projector_{i}"].astype(np.float32)
        np.testing.assert_allclose(official.embed_images(pixels)[0].numpy(), reference, rtol=1e-3, atol=1e-3)
        logits = official(input_ids=ids, pixel_values=pixels).logits
        assert logits.shape == (1, 256 + ids.shape[1], 32064)
        np.testing.assert_allclose(logits[0, -1].numpy(), expected[f"last_logits_{i}"], rtol=0, atol=1e-4)
        state = official.prompt_state(ids, pixel_values=pixels)
        np.testing.assert_allclose(state[0].numpy(), expected[f"last_hidden_{i}"], rtol=0, atol=1e-4)
    actions = official.generate_actions(ids, pixels, temperature=0.0, whole_vocabulary=True)
    assert actions.tokens[0].tolist() == expected[f"action_tokens_{i}"].tolist()
    np.testing.assert_allclose(
        actions.log_probs[0].numpy(), expected[f"action_logprobs_{i}"], rtol=0, atol=1e-4
    )
    decoded = official.decode_actions(actions.tokens, "libero_object")  # finds libero_object_no_noops
    np.testing.assert_allclose(decoded[0], expected[f"action_{i}"], rtol=0, atol=1e-6)


def test_official_sizes():
    config = json.loads((CHECKPOINT / "config.json").read_text())
    del config["vision_configs"]
    config["text_config"] = {"vocab_size": 32064, "pad_token_id": 32000}  # all that the official file says
    with torch.device("meta"):
        model = OpenVLA(config)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert model.num_patches == 256 and model.image_size == 224 and model.action_repeat == 1
    assert model.sampling_temperature == 0  # official policies are evaluated greedily
    assert shapes["projector.fc1.weight"] == (4 * 2176, 2176)
    assert shapes["vision_backbone.fused_featurizer.blocks.25.mlp.fc1.weight"] == (4304, 1152)
    assert "vision_backbone.featurizer.blocks.23.norm1.weight" not in shapes  # the last block is not built
    assert 7.4e9 < sum(math.prod(shape) for shape in shapes.values()) < 7.6e9


# ---- action tokens -------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(-1.5, 1.5), min_size=1, max_size=20))
@settings(max_examples=50, deadline=None)
def test_action_tokens_round_trip(values):
    tokenizer = ActionTokenizer(32000)
    tokens = tokenizer.encode(np.array(values))
    assert tokens.min() >= 31744 and tokens.max() <= 31999
    assert np.abs(tokenizer.decode(tokens) - np.clip(values, -1, 1)).max() <= 1 / 255 + 1e-12
    assert (tokenizer.bin_to_token(tokenizer.token_to_bin(tokens)) == tokens).all()
    assert ((0 <= tokenizer.token_to_bin(tokens)) & (tokenizer.token_to_bin(tokens) < 256)).all()


def test_action_tokens_ends():
    tokenizer = ActionTokenizer(32000)
    assert tokenizer.encode(np.array([-1.0, 1.0])).tolist() == [31999, 31744]
    assert (
        tokenizer.decode(np.array([31744]))[0]
        == tokenizer.decode(np.array([31745]))[0]
        == tokenizer.centres[-1]
    )
    no_action_tokens = torch.tensor([5, 32063])
    assert tokenizer.decode(no_action_tokens).tolist() == [tokenizer.centres[-1], tokenizer.centres[0]]


def test_actions_encode_and_decode(official):
    rng = np.random.default_rng(0)
    low, high, mask = official.action_statistics("libero_object")
    actions = np.where(mask, rng.uniform(low, high, (50, 7)), rng.integers(0, 2, (50, 7)))
    decoded = official.decode_actions(official.encode_actions(actions, "libero_object"), "libero_object")
    assert (np.abs(decoded - actions) <= np.where(mask, (high - low) / 2, 1) / 255 + 1e-9).all()
    with pytest.raises(UserError, match="no_such_key.*libero_object_no_noops"):
        official.decode_actions(torch.zeros(1, 7).long(), "no_such_key")


# ---- batches, cache, log-probs -------------------------------------------------------------------------------------


# Float32 sums of another order. Logits here reach 14 and log-probs of 32,064 tokens 12: against float64 either way is off by
# 3e-5 (and in float64 both ways agree to 1e-14), so 2e-6 of the value come on top of what small numbers are held to.
ROUNDING = dict(rtol=2e-6, atol=1e-5)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_batch_equals_single(official, prompts, whole, temperature):
    """Three prompt lengths in one batch, under per-row generators: the tokens and log-probs of each row alone."""
    alone, (ids, pixels, mask) = prompts

    def sample(rows, *inputs):
        generators = [torch.Generator().manual_seed(100 + i) for i in rows]
        return official.generate_actions(
            *inputs, temperature=temperature, whole_vocabulary=whole, generator=generators
        )

    def evaluate(tokens, ids, pixels, mask=None):
        with torch.no_grad():
            return official.action_log_probs(
                ids, mask, tokens, pixel_values=pixels, temperature=1.5, whole_vocabulary=whole
            )

    together = sample(range(3), ids, pixels, mask)
    evaluated = evaluate(together.tokens, ids, pixels, mask)
    for i, row in enumerate(alone):
        single = sample([i], *row)
        assert torch.equal(single.tokens[0], together.tokens[i])
        torch.testing.assert_close(single.log_probs[0], together.log_probs[i], **ROUNDING)
        # Log-probs, and entropy.
        for alone_, batched in zip(evaluate(single.tokens, *row), evaluated, strict=True):
            torch.testing.assert_close(alone_[0], batched[i], **ROUNDING)


def test_batch_equals_single_but_for_rounding(prompts):
    """The same in float64, where rounding is out of the way: what is left would be a mistake in masks or positions."""
    alone, (ids, pixels, mask) = prompts
    model = OpenVLA.from_pretrained(CHECKPOINT, dtype=torch.float64)
    tokens = torch.arange(31744, 31744 + 21).view(3, 7)
    exact = dict(rtol=0, atol=1e-11)
    with torch.no_grad():
        states = model.prompt_state(ids, mask, pixel_values=pixels)
        forced = model._teacher_forced(ids, mask, tokens, dict(pixel_values=pixels))
        for i, (one, its_pixels) in enumerate(alone):
            images = dict(pixel_values=its_pixels)
            torch.testing.assert_close(model.prompt_state(one, **images)[0], states[i], **exact)
            torch.testing.assert_close(
                model._teacher_forced(one, None, tokens[i : i + 1], images)[0], forced[i], **exact
            )


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
def test_sampled_log_probs_are_the_evaluated_ones(small, batch, whole, temperature):
    """With the cache (sampling) and without (teacher forcing): the PPO ratio starts at 1."""
    ids, mask, pixels = batch
    generator = torch.Generator().manual_seed(1)
    actions = small.generate_actions(
        ids, pixels, mask, temperature=temperature, whole_vocabulary=whole, generator=generator
    )
    with torch.no_grad():
        evaluation = small.action_log_probs(
            ids, mask, actions.tokens, pixel_values=pixels, temperature=temperature, whole_vocabulary=whole
        )
    assert actions.log_probs.std() > 0.1  # not a comparison of constants
    torch.testing.assert_close(actions.log_probs, evaluation.log_probs, rtol=0, atol=1e-5)
    if not whole:
        assert (actions.tokens >= small.action_tokenizer.first).all()
        assert (actions.tokens < small.action_tokenizer.vocab_end).all()


def test_cache_equals_full_forward(small, batch):
    """Greedy decoding against the longest way round: the whole sequence again for every token, one row at a time."""
    ids, mask, pixels = batch
    actions = small.generate_actions(ids, pixels, mask, whole_vocabulary=True)
    for i in range(3):
        sequence = ids[i : i + 1, : mask[i].sum()]
        for k in range(7):
            with torch.no_grad():
                log_p = small(sequence, pixels[i : i + 1]).logits[0, -1].log_softmax(-1)
            assert log_p.argmax() == actions.tokens[i, k]
            assert abs(log_p.max() - actions.log_probs[i, k]) < 1e-5
            sequence = torch.cat((sequence, log_p.argmax()[None, None]), dim=1)


def test_log_probs_and_entropy_are_those_of_the_logits(small, batch):
    ids, mask, pixels = batch
    tokens = small.generate_actions(ids, pixels, mask).tokens
    with torch.no_grad():
        logits = small.action_logits(ids, mask, tokens, pixel_values=pixels)
        evaluation = small.action_log_probs(ids, mask, tokens, pixel_values=pixels, temperature=1.5)
    assert logits.shape == (3, 7, 256) and logits.dtype == torch.float32
    distribution = torch.distributions.Categorical(logits=logits / 1.5)
    torch.testing.assert_close(
        evaluation.log_probs, distribution.log_prob(small.action_tokenizer.token_to_bin(tokens))
    )
    torch.testing.assert_close(evaluation.entropy, distribution.entropy())
    assert torch.equal(small.action_tokenizer.bin_to_token(logits.argmax(-1))[:, 0], tokens[:, 0])


def test_patch_embeddings_replace_pixels(small, batch):
    ids, mask, pixels = batch
    with torch.no_grad():
        embeddings = small.embed_images(pixels)
        assert embeddings.shape == (3, small.num_patches, 128)
        assert same(
            small(ids, pixels, mask).logits, small(ids, None, mask, patch_embeddings=embeddings).logits
        )
    from_pixels = small.generate_actions(ids, pixels, mask)
    from_embeddings = small.generate_actions(ids, None, mask, patch_embeddings=embeddings)
    assert same(from_pixels.log_probs, from_embeddings.log_probs)


def test_text_after_actions(small, batch):
    ids, mask, pixels = batch
    tokens = small.generate_actions(ids, pixels, mask).tokens
    with torch.no_grad():
        logits = small.text_after_actions_logits(ids, mask, tokens, pixel_values=pixels, token_ids=[4, 5])
        assert logits.shape == (3, 2)
        for i in range(3):
            sequence = torch.cat((ids[i : i + 1, : mask[i].sum()], tokens[i : i + 1]), dim=1)
            want = small(sequence, pixels[i : i + 1]).logits[0, -1, [4, 5]]
            torch.testing.assert_close(logits[i], want, rtol=0, atol=1e-5)


def test_sampling_follows_the_distribution():
    log_p = torch.tensor([[0.5, 0.0, 0.3, 0.2]]).log().expand(20000, 4)
    u = torch.rand(20000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    share = torch.bincount(sample(log_p, u), minlength=4) / 20000
    torch.testing.assert_close(share, torch.tensor([0.5, 0.0, 0.3, 0.2]), rtol=0, atol=0.015)
    assert sample(log_p[:1], torch.tensor([1 - 1e-16], dtype=torch.float64)).item() == 3
    assert sample(log_p[:1], torch.zeros(1, dtype=torch.float64)).item() == 0


def test_log_probs_that_are_not_finite_stop_with_a_line(small, batch):
    """A temperature next to 0 divides to infinity; NaN weights make NaN. Neither may act as the last token does."""
    ids, mask, pixels = batch
    broken = copy.deepcopy(small)
    with torch.no_grad():
        broken.language_model.model.norm.weight.fill_(float("nan"))
    for model, temperature in ((small, 1e-40), (broken, 0.0), (broken, 1.0)):
        tokens = model.generate_actions(ids, pixels, mask, temperature=temperature).tokens
        with pytest.raises(
            UserError, match="log-probabilities are not finite: its weights hold NaN .* temperature"
        ):
            model.decode_actions(tokens)


def test_left_padding_is_refused(small, batch):
    ids, mask, pixels = batch
    with pytest.raises(ValueError, match="right-padded"):
        small(ids, pixels, mask.flip(1))


def test_bfloat16_keeps_float32_probabilities(batch):
    model = tiny().to(torch.bfloat16)
    ids, mask, pixels = batch
    actions = model.generate_actions(
        ids, pixels, mask, temperature=1.0, generator=torch.Generator().manual_seed(0)
    )
    assert actions.log_probs.dtype == torch.float32
    assert model.action_logits(ids, mask, actions.tokens, pixel_values=pixels).dtype == torch.float32


def test_gradient_checkpointing_changes_nothing(batch):
    ids, mask, pixels = batch
    gradients = []
    for flag in (False, True):
        model = tiny()
        model.gradient_checkpointing = flag
        tokens = torch.full((3, 7), model.action_tokenizer.first + 3)
        model.action_log_probs(ids, mask, tokens, pixel_values=pixels).log_probs.sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


# ---- checkpoints ---------------------------------------------------------------------------------------------------


def test_load_save_load_is_exact(official, tmp_path):
    reference = load_file(CHECKPOINT / "model.safetensors")
    half = OpenVLA.from_pretrained(CHECKPOINT, dtype=torch.float16)
    half.save_pretrained(tmp_path / "half")
    saved = load_file(tmp_path / "half" / "model.safetensors")
    assert saved.keys() == reference.keys() and len(saved) == 153  # the unused tensors too
    assert all(
        torch.equal(saved[name], reference[name]) and saved[name].dtype == torch.float16 for name in reference
    )
    official.save_pretrained(tmp_path / "full")
    again = OpenVLA.from_pretrained(tmp_path / "full")
    for (name, a), (_, b) in zip(official.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    configs = [json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "full", CHECKPOINT)]
    assert configs[0] == configs[1]
    assert not (tmp_path / "full" / ".part").exists()


def test_shards(official, tmp_path):
    official.save_pretrained(tmp_path / "m")
    official.save_pretrained(tmp_path / "m", max_shard_bytes=2_000_000)  # over the single file, which must go
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "m").glob("*.safetensors"))
    assert len(files) > 2 and sorted(set(index["weight_map"].values())) == files
    again = OpenVLA.from_pretrained(tmp_path / "m")
    assert all(torch.equal(a, b) for a, b in zip(official.parameters(), again.parameters(), strict=True))
    (tmp_path / "m" / files[1]).unlink()
    with pytest.raises(UserError, match=files[1]):
        OpenVLA.from_pretrained(tmp_path / "m")


def test_shards_load_save_load_is_exact(tmp_path):
    """The official layout over several shards, at the file's dtype: every tensor back, the unused ones included."""
    half = OpenVLA.from_pretrained(CHECKPOINT, dtype=torch.float16)
    half.save_pretrained(tmp_path / "a", max_shard_bytes=1_000_000)
    again = OpenVLA.from_pretrained(tmp_path / "a", dtype=torch.float16)
    again.save_pretrained(tmp_path / "b", max_shard_bytes=200_000)
    tensors = [{}, {}]
    for folder, found in zip(("a", "b"), tensors, strict=True):
        for file in (tmp_path / folder).glob("*.safetensors"):
            found |= load_file(file)
    reference = load_file(CHECKPOINT / "model.safetensors")
    assert (
        len(list((tmp_path / "b").glob("*.safetensors")))
        > len(list((tmp_path / "a").glob("*.safetensors")))
        > 2
    )
    for found in tensors:
        assert found.keys() == reference.keys() and all(
            torch.equal(found[k], reference[k]) for k in reference
        )
    (tmp_path / "b" / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(UserError, match="weight_map"):
        OpenVLA.from_pretrained(tmp_path / "b")


LOAD_AND_WATCH = """
import sys, torch
from policy import OpenVLA
def memory(field):
    (line,) = [line for line in open("/proc/self/status") if line.startswith(field)]
    return int(line.split()[1]) * 1024
OpenVLA.from_pretrained(sys.argv[1])  # imports and allocator are warm now
open("/proc/self/clear_refs", "w").write("5")  # the peak starts again from here
before = memory("VmRSS")
model = OpenVLA.from_pretrained(sys.argv[2], dtype=torch.float16)
print(memory("VmHWM") - before, sum(t.nbytes for t in (*model.parameters(), *model.unused.values())))
"""


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux' /proc"
)
def test_loading_holds_one_shard_beside_the_model(tmp_path):
    """The peak counts the pages of the shard that is open; reading all shards first would need the model twice."""
    shard = 20_000_000
    half = OpenVLA.from_pretrained(CHECKPOINT, dtype=torch.float16)
    half.unused |= {f"unused.{i}": torch.ones(9_000_000, dtype=torch.float16) for i in range(10)}  # 180 MB
    half.save_pretrained(tmp_path, max_shard_bytes=shard)
    assert len(list(tmp_path.glob("*.safetensors"))) >= 10
    run = subprocess.run(
        [sys.executable, "-c", LOAD_AND_WATCH, CHECKPOINT, tmp_path],
        cwd=Path(policy.__file__).parent,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    peak, size = map(int, run.stdout.split())
    assert size > 180e6 and size < peak + 10e6 and peak < size + 2 * shard


def test_dataset_statistics_override(tmp_path):
    shutil.copytree(CHECKPOINT, tmp_path / "m")
    stats = {"mine": {"action": {"q01": [0.0] * 7, "q99": [2.0] * 7}}}
    (tmp_path / "m" / "dataset_statistics.json").write_text(json.dumps(stats))
    model = OpenVLA.from_pretrained(tmp_path / "m")
    assert model.norm_stats == stats
    tokens = torch.full((1, 7), 31999)  # the lowest centre
    np.testing.assert_allclose(model.decode_actions(tokens, "mine"), model.action_tokenizer.centres[0] + 1)
    model.save_pretrained(tmp_path / "m")
    assert OpenVLA.from_pretrained(tmp_path / "m").norm_stats == stats


def test_tiny_round_trip(small, tmp_path):
    small.side_files["tokenizer_config.json"] = b"{}"
    small.save_pretrained(tmp_path / "m")
    again = OpenVLA.from_pretrained(str(tmp_path / "m"))
    assert again.action_repeat == 4 and again.side_files == small.side_files
    assert again.sampling_temperature == 0.6
    assert all(torch.equal(a, b) for a, b in zip(small.parameters(), again.parameters(), strict=True))
    assert torch.equal(again.tokenize(INSTRUCTIONS)[0], small.tokenize(INSTRUCTIONS)[0])
    ids, mask = again.tokenize(["Open the top drawer"])
    words = again.tokenizer.decode(ids[0].tolist(), skip_special_tokens=False).split()
    assert words == "<s> in : what action should the robot take to open the top drawer ? out : <act>".split()
    ends = again.action_tokenizer.first, again.action_tokenizer.vocab_end - 1
    assert [again.tokenizer.id_to_token(token) for token in ends] == ["<action_0>", "<action_255>"]
    assert again.tokenizer.token_to_id("<pad>") == again.action_tokenizer.vocab_end
    assert None not in {again.tokenizer.token_to_id(answer) for answer in ("1", "0")}


def test_tokenizer_knows_all_of_libero():
    pytest.importorskip("libero")
    model = policy.build_tiny()
    words = libero_words()
    assert len(words) > 70 and {"alphabet", "ramekin", "stove", "caddy"} <= set(words)
    ids, mask = model.tokenize([" ".join(words), "fly to the moon"])
    assert (ids[0] == 0).sum() == 0 and (ids[1] == 0).sum() > 0  # <unk> for foreign words only
    assert mask[0].all() and mask[1].sum() < len(mask[1])


def test_padding_that_a_tokenizer_file_asks_for_is_not_ours():
    """Fast tokenizers save it with the rest; the suffix token must follow the prompt, not the padding."""
    model, texts = (
        policy.build_tiny(0, words=WORDS),
        ["open the drawer", "close it and then open the drawer again"],
    )
    want = model.tokenize(texts)
    stored = json.loads(model.side_files["tokenizer.json"])
    stored["padding"] = {
        "strategy": "BatchLongest",
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<pad>",
    }
    stored["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    other = policy.build_tiny(0, words=WORDS)
    other.side_files["tokenizer.json"] = json.dumps(stored).encode()
    for mine, theirs in zip(want, other.tokenize(texts), strict=True):
        assert torch.equal(mine, theirs)


def test_tiny_without_a_temperature_acts_at_a_given_one_alone(small, tmp_path):
    """Checkpoints from before it stood in them: greedily they get stuck, which looks like a bad policy."""
    small.save_pretrained(tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    del config["sampling_temperature"]
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    old = OpenVLA.from_pretrained(str(tmp_path / "m"))
    assert old.temperature_or_own(0.6) == 0.6 and old.temperature_or_own(0.0) == 0
    with pytest.raises(UserError, match="at which temperature it acts: give --temperature"):
        old.temperature_or_own(None)


def set_temperature(folder, value):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "sampling_temperature": value}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "config.json").unlink(), "no config.json"),
        (lambda d: (d / "config.json").write_text("{"), "JSON"),
        (lambda d: set_temperature(d, -0.5), "sampling_temperature is .* not a number from 0"),
        (lambda d: set_temperature(d, "hot"), "sampling_temperature is .* not a number from 0"),
        (lambda d: set_temperature(d, math.inf), "sampling_temperature is .* not a number from 0"),
        (lambda d: set_temperature(d, True), "sampling_temperature is .* not a number from 0"),
        (lambda d: (d / "config.json").write_text("{}"), "not an OpenVLA configuration|vision tower"),
        (lambda d: (d / "config.json").write_text('{"timm_model_ids": ["vit_x", "vit_y"]}'), "vit_x"),
        (lambda d: (d / "model.safetensors").unlink(), "model.safetensors is missing"),
        (
            lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:100_000]),
            "truncated",
        ),
        (lambda d: (d / "model.safetensors").write_bytes(b""), "truncated"),
        (
            lambda d: retensor(d, "projector.fc1.weight", torch.zeros(3, 3)),
            r"projector.fc1.weight has shape \(3, 3\)",
        ),
        (lambda d: retensor(d, "language_model.lm_head.weight", None), "language_model.lm_head.weight"),
    ],
)
def test_damaged_checkpoints(tmp_path, damage, message):
    shutil.copytree(CHECKPOINT, tmp_path / "m")
    damage(tmp_path / "m")
    with pytest.raises(UserError, match=message) as error:
        OpenVLA.from_pretrained(tmp_path / "m")
    assert str(tmp_path) in str(error.value) or "config.json" in str(error.value)


def retensor(directory, name, tensor):
    tensors = load_file(directory / "model.safetensors")
    del tensors[name]
    save_file(tensors | ({} if tensor is None else {name: tensor}), directory / "model.safetensors")


def test_other_bad_input(small, batch, official, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no checkpoint at"):
        OpenVLA.from_pretrained(tmp_path / "nothing")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="no directory no-such-owner/model here"):
        OpenVLA.from_pretrained("no-such-owner/model")
    ids, mask, pixels = batch
    with pytest.raises(UserError, match="prompt too long.*256 positions"):
        small(torch.ones(3, 250, dtype=torch.long), pixels)
    with pytest.raises(UserError, match="tokenizer.json"):
        official.tokenize(["open the drawer"])
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to"):
        small.save_pretrained(tmp_path / "file" / "model")


def test_out_of_memory_names_the_flag(batch):
    """A batch of 2^44 rows (views, which cost nothing) makes the first real allocation fail."""
    ids, mask, pixels = (x[:1].expand(2**44, *x.shape[1:]) for x in batch)
    actor_critic = ActorCritic(tiny(), lora_rank=2)
    with pytest.raises(UserError, match="out of memory: .*--num-envs") as error:
        actor_critic.act(ids, mask, pixel_values=pixels)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="out of memory: .*--micro-batch-size"):
        actor_critic.evaluate_actions(
            ids, mask, torch.zeros(1, 7).long().expand(2**44, 7), pixel_values=pixels
        )
    with pytest.raises(UserError, match="out of memory: .*--model openvla-tiny"):
        big = {
            "hidden_size": 2**16,
            "num_attention_heads": 2**10,
            "num_hidden_layers": 1000,
            "intermediate_size": 2**18,
        }
        OpenVLA.from_config(
            {
                **tiny().config,
                "text_config": {**tiny().config["text_config"], **big, "num_key_value_heads": 2**10},
            }
        )
    with (
        pytest.raises(UserError, match="the GPU is out of memory: use --x"),
        explain_out_of_memory("use --x"),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. A page of text.")  # what torch raises on a GPU
    with (
        pytest.raises(UserError, match="the GPU is out of memory: use --x"),
        explain_out_of_memory("use --x"),
    ):
        raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
    with pytest.raises(RuntimeError, match="size"), explain_out_of_memory("use --x"):
        torch.zeros(2) @ torch.zeros(3)  # other errors stay what they are


# ---- actor-critic --------------------------------------------------------------------------------------------------


def images_for(actor_critic, pixels):
    if actor_critic.vision_frozen:
        return {"patch_embeddings": actor_critic.embed_images(pixels)}
    return {"pixel_values": pixels}


def disturb(parameters, seed=0):
    """Fresh adapters are the identity (B = 0); random values make them matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in parameters:
            p.add_(torch.randn(p.shape, generator=generator) * 0.1)


@pytest.mark.parametrize("targets", ["all", "language"])
@pytest.mark.parametrize("critic", policy.CRITICS)
def test_actor_critic(batch, tmp_path, targets, critic):
    ids, mask, pixels = batch
    reference = spread(tiny()).generate_actions(ids, pixels, mask)
    actor_critic = ActorCritic(spread(tiny()), lora_rank=4, targets=targets, critic=critic)
    images = images_for(actor_critic, pixels)
    tokens, log_probs, values = actor_critic.act(ids, mask, **images, temperature=0.0)
    assert torch.equal(tokens, reference.tokens)  # a fresh adapter adds nothing
    assert same(log_probs, reference.log_probs)
    assert values.shape == (3,) and values.dtype == torch.float32

    disturb(actor_critic.policy_parameters())
    changed = actor_critic.act(
        ids, mask, **images, temperature=1.5, generator=torch.Generator().manual_seed(0)
    )
    evaluated, entropy = actor_critic.evaluate_actions(ids, mask, changed[0], **images, temperature=1.5)
    torch.testing.assert_close(changed[1], evaluated, rtol=0, atol=1e-5)
    assert entropy.shape == (3, 7)
    assert same(changed[2], values) == (critic != "shared")  # the critic's adapter is its own, unless shared
    assert (critic == "none") == (not actor_critic.critic_parameters())

    # Each loss reaches its own parameters, in one accumulation, in PPO's order. (B = 0 would stop A's gradient.)
    disturb(actor_critic.critic_parameters(), seed=1)
    before = {name: p.clone() for name, p in actor_critic.named_parameters() if not p.requires_grad}
    evaluated.sum().backward()
    if critic == "none":
        assert not values.any() and not actor_critic.value(ids, mask, **images).requires_grad
    else:
        actor_critic.value(ids, mask, **images).sum().backward()
    trained = actor_critic.policy_parameters() + actor_critic.critic_parameters()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)
    assert {id(p) for p in trained} == {id(p) for p in actor_critic.parameters() if p.requires_grad}
    torch.optim.SGD(trained, lr=0.1).step()
    assert all(torch.equal(p, before[name]) for name, p in actor_critic.named_parameters() if name in before)

    # Before any training: the frozen backbone as a plain model, on the same memory.
    with actor_critic.start_policy() as start:
        at_start = start.generate_actions(ids, pixels, mask)
    assert torch.equal(at_start.tokens, reference.tokens) and torch.equal(
        at_start.log_probs, reference.log_probs
    )
    assert all(p.requires_grad for p in trained)
    start = actor_critic.base_policy()
    assert torch.equal(start.generate_actions(ids, pixels, mask).tokens, reference.tokens)
    frozen = {p.data_ptr() for p in actor_critic.parameters()}
    assert all(p.data_ptr() in frozen and not p.requires_grad for p in start.parameters())

    # Merged: a plain model of the same behaviour, saveable; out of date as soon as an update begins.
    with torch.no_grad():
        want = actor_critic.evaluate_actions(ids, mask, tokens, **images).log_probs
        merged = actor_critic.evaluation_policy()  # with a shared critic there is no copy
        plain = merged.action_log_probs(ids, mask, tokens, pixel_values=pixels).log_probs
        torch.testing.assert_close(plain, want, rtol=0, atol=1e-4)
    actor_critic.save_policy(tmp_path / "merged")
    loaded = OpenVLA.from_pretrained(tmp_path / "merged")
    outputs = [model.generate_actions(ids, pixels, mask).log_probs for model in (loaded, merged)]
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-4 if critic == "shared" else 1e-5)
    assert actor_critic.evaluation_policy() is merged  # one copy, refreshed
    assert (merged is actor_critic.model) == (critic == "shared")
    actor_critic.merge_for_rollout()
    fast = actor_critic.act(ids, mask, **images, temperature=0.0)
    disturb(actor_critic.policy_parameters(), seed=2)
    # Without a copy, the policy is always the current one.
    assert same(actor_critic.act(ids, mask, **images, temperature=0.0)[1], fast[1]) == (critic != "shared")
    actor_critic.evaluate_actions(ids, mask, tokens, **images)
    assert not same(actor_critic.act(ids, mask, **images, temperature=0.0)[1], fast[1])

    # Files: adapters of one instance in another; and peft's own reader on a plain model.
    actor_critic.save_adapters(tmp_path / "adapters")
    other = ActorCritic(spread(tiny()), lora_rank=4, targets=targets, critic=critic)
    other.load_adapters(tmp_path / "adapters")
    with torch.no_grad():
        want = actor_critic.evaluate_actions(ids, mask, tokens, **images).log_probs
        assert same(other.evaluate_actions(ids, mask, tokens, **images).log_probs, want)
        assert same(other.value(ids, mask, **images), actor_critic.value(ids, mask, **images))
        wrapped = peft.PeftModel.from_pretrained(
            spread(tiny()), tmp_path / "adapters" / "policy"
        ).base_model.model
        theirs = wrapped.action_log_probs(ids, mask, tokens, pixel_values=pixels).log_probs
        torch.testing.assert_close(theirs, want, rtol=0, atol=1e-4)


def test_merge_in_place_follows_the_adapter(batch):
    ids, mask, pixels = batch
    actor_critic = ActorCritic(tiny(), lora_rank=4, targets="all")
    merged = actor_critic.evaluation_policy()
    pointer = merged.projector.fc1.weight.data_ptr()
    before = [p.clone() for p in merged.parameters()]
    disturb(actor_critic.policy_parameters())
    assert actor_critic.evaluation_policy() is merged and merged.projector.fc1.weight.data_ptr() == pointer
    assert any(not torch.equal(a, b) for a, b in zip(before, merged.parameters(), strict=True))
    base = actor_critic.policy.base_tensors()
    for name, p in merged.named_parameters():
        assert torch.equal(p, actor_critic.policy.merged(name, base[name])), name
    assert sum("lora" in name for name, _ in merged.named_parameters()) == 0


def test_lora_layers():
    """All linear layers of towers, projector, Llama; no patch convolution, no head; with "language" no vision side."""
    wrapped = {}
    for targets in ("all", "language"):
        modules = ActorCritic(tiny(), 2, targets=targets).model.named_modules()
        wrapped[targets] = {name for name, module in modules if hasattr(module, "lora_A")}
    plain = {name for name, module in tiny().named_modules() if isinstance(module, nn.Linear)}
    assert wrapped["all"] == plain - {"language_model.lm_head"}
    assert wrapped["language"] == {name for name in wrapped["all"] if name.startswith("language_model")}


def test_adapters_are_float32_on_bfloat16(batch):
    actor_critic = ActorCritic(tiny().to(torch.bfloat16), lora_rank=2)
    assert {p.dtype for p in actor_critic.policy_parameters() + actor_critic.critic_parameters()} == {
        torch.float32
    }
    ids, mask, pixels = batch
    assert actor_critic.act(ids, mask, pixel_values=pixels)[2].dtype == torch.float32


def test_actor_critic_bad_input(batch, tmp_path):
    ids, mask, pixels = batch
    for wrong in (dict(targets="vision"), dict(critic="mine"), dict(lora_rank=0)):
        with pytest.raises(UserError, match="rank 1 or more"):
            ActorCritic(tiny(), **wrong)
    actor_critic = ActorCritic(tiny(), lora_rank=2, targets="all")
    with pytest.raises(ValueError, match="pixel_values"):
        actor_critic.value(ids, mask, patch_embeddings=torch.zeros(3, 49, 128))
    with pytest.raises(ValueError, match="constant"):
        actor_critic.embed_images(pixels)
    with pytest.raises(ValueError, match="save_policy"):
        actor_critic.model.save_pretrained(tmp_path / "m")
    with pytest.raises(UserError, match="cannot be read"):
        actor_critic.load_adapters(tmp_path)
    actor_critic.save_adapters(tmp_path / "a")
    with pytest.raises(UserError, match="LoRA rank"):
        ActorCritic(tiny(), lora_rank=3).load_adapters(tmp_path / "a")
    (tmp_path / "a" / "critic" / "adapter_model.safetensors").write_bytes(b"damaged")
    before = [p.clone() for p in actor_critic.parameters()]
    with pytest.raises(UserError, match="critic"):
        actor_critic.load_adapters(tmp_path / "a")
    # nothing half-loaded
    assert all(torch.equal(a, b) for a, b in zip(before, actor_critic.parameters(), strict=True))
