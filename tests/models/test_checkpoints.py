"""What a checkpoint is called, what is refused by name, which statistics serve a suite, adapters and their
base."""

import json
import math
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import policy
from models import merge
from models.checkpoints import find_statistics, resolve_checkpoint, tensor_table
from models.choose import choose_model
from models.memory import Needs, check_memory, choose_dtype
from policy import ActorCritic, OpenVLA
from support.errors import UserError

ROOT = Path(__file__).parents[2]
OFFICIAL = ROOT / "tests" / "fixtures" / "openvla_tiny"
WORDS = ["open", "the", "drawer"]
STATS = {"action": {"q01": [-1.0] * 7, "q99": [1.0] * 7, "mask": [True] * 6 + [False]}}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def tiny(seed=0):
    model = policy.build_tiny(seed, words=WORDS)
    model.norm_stats = {"libero_object": STATS}
    return model


def trained(model, seed=1, **variant):
    """An actor-critic whose adapters do something."""
    actor_critic = ActorCritic(model, 4, 8, **variant)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in actor_critic.policy_parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    return actor_critic


@pytest.fixture
def run(tmp_path):
    """A run directory as train.py leaves it, without its policy: (directory, actor-critic after the second
    checkpoint)."""
    tiny().save_pretrained(tmp_path / "start")
    out = tmp_path / "run"
    for seed, name in enumerate(("000001", "000002")):
        actor_critic = trained(OpenVLA.from_pretrained(tmp_path / "start"), seed)
        (out / "checkpoints" / name).mkdir(parents=True)
        actor_critic.save_adapters(out / "checkpoints" / name / "adapters")
    settings = {"model": str(tmp_path / "start"), "total_steps": 10, "eval_temperature": 0.3}
    (out / "config.json").write_text(json.dumps(settings))
    actor_critic.model.config["sampling_temperature"] = (
        0.3  # as train.py does, instead of the start policy's 0.6
    )
    return out, actor_critic


# ---- names -----------------------------------------------------------------------------------------------------------


def test_one_resolver_for_directories_runs_and_pairs(tmp_path, run, monkeypatch):
    out, actor_critic = run
    with pytest.raises(UserError, match=r"no policy/: it is saved at the end. `python -m models.merge --run"):
        resolve_checkpoint(out)
    actor_critic.save_policy(out / "policy")
    assert resolve_checkpoint(out) == out / "policy" == resolve_checkpoint(out / "policy")
    assert OpenVLA.from_pretrained(out).norm_stats == {"libero_object": STATS}
    shipped = ROOT / "checkpoints" / "libero_object"
    assert resolve_checkpoint(shipped) == shipped / "policy"
    assert resolve_checkpoint(shipped, "reward model") == shipped / "rprm"
    assert resolve_checkpoint(shipped / "rprm", "reward model") == shipped / "rprm"
    (tmp_path / "empty").mkdir()
    for kind in ("policy", "reward model"):
        with pytest.raises(UserError, match=f"empty is not a {kind}: it has no config.json"):
            resolve_checkpoint(tmp_path / "empty", kind)
        for name in ("/nowhere/at/all", "a/b/c", "../up", ".", "openvla"):
            if not Path(name).is_dir():
                with pytest.raises(UserError, match="no checkpoint at"):
                    resolve_checkpoint(name, kind)


def hub_cache(cache, repo_id, source, without=()):
    """The hub's cache in its own layout: a commit under refs/, its files under snapshots/."""
    folder = cache / f"models--{repo_id.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("c0ffee")
    shutil.copytree(source, folder / "snapshots" / "c0ffee", ignore=shutil.ignore_patterns(*without))
    return folder / "snapshots" / "c0ffee"


def test_hub_names_whatever_lies_in_the_current_directory(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "work" / "openvla").mkdir(parents=True)  # a clone of the official code is usually called that
    monkeypatch.chdir(tmp_path / "work")
    found = hub_cache(tmp_path / "cache", "openvla/whole", OFFICIAL)
    assert resolve_checkpoint("openvla/whole").samefile(found)
    hub_cache(tmp_path / "cache", "openvla/half", OFFICIAL, without=["*.safetensors"])
    for name in ("openvla/half", "openvla/none"):
        for kind in ("policy", "reward model"):
            with pytest.raises(
                UserError, match=f"no directory {name} here, no {kind} .*hub's cache, and the model hub"
            ):
                resolve_checkpoint(name, kind)


@pytest.mark.parametrize(
    "part",
    [
        "action_head--150000_checkpoint.pt",
        "proprio_projector--150000_checkpoint.pt",
        "vision_backbone--150000_checkpoint.pt",
        "noisy_action_projector--5_checkpoint.pt",
    ],
)
def test_oft_is_refused_by_name(tmp_path, part):
    shutil.copytree(OFFICIAL, tmp_path / "m")
    (tmp_path / "m" / part).write_bytes(b"")
    with pytest.raises(UserError, match=f"OpenVLA-OFT checkpoint \\({part}\\)"):
        OpenVLA.from_pretrained(tmp_path / "m")


def test_a_reward_model_is_no_policy():
    names = list((ROOT / "checkpoints").glob("*/rprm"))
    assert len(names) >= 4
    for name in names:
        with pytest.raises(UserError, match="rprm is a reward model"):
            OpenVLA.from_pretrained(name)


def test_unmerged_and_quantised_are_refused_by_name(tmp_path):
    shutil.copytree(OFFICIAL, tmp_path / "m")
    (tmp_path / "m" / "lora_adapter").mkdir()
    with pytest.raises(UserError, match="unmerged adapter"):
        OpenVLA.from_pretrained(tmp_path / "m")
    (tmp_path / "m" / "lora_adapter").rmdir()
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    quantised = {**config, "quantization_config": {"load_in_4bit": True}}
    (tmp_path / "m" / "config.json").write_text(json.dumps(quantised))
    with pytest.raises(UserError, match="quantised"):
        OpenVLA.from_pretrained(tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    name = "language_model.model.layers.0.mlp.up_proj.weight"
    save_file({**tensors, name: tensors[name].to(torch.int8)}, tmp_path / "m" / "model.safetensors")
    with pytest.raises(UserError, match=f"{name} is torch.int8: quantised"):
        OpenVLA.from_pretrained(tmp_path / "m")


# ---- action statistics -------------------------------------------------------------------------------------------------


def test_which_statistics_serve_a_suite(capsys):
    both = {"libero_object_no_noops": {}, "libero_10": {}, "bridge_orig": {}}
    want = {
        "libero_object": "libero_object_no_noops",
        # LIBERO-PRO's variants are played with their base's numbers.
        "libero_object_swap": "libero_object_no_noops",
        "libero_10": "libero_10",
        "libero_10_lan": "libero_10",
        "bridge_orig": "bridge_orig",
    }
    assert {suite: find_statistics(both, suite) for suite in want} == want
    assert find_statistics({"libero_10": {}, "libero_10_swap": {}}, "libero_10_swap") == "libero_10_swap"
    assert find_statistics(both, "libero_goal", given="bridge_orig") == "bridge_orig"
    assert capsys.readouterr().err == ""
    assert find_statistics({"bridge_orig": {}}, "libero_goal") == "bridge_orig"
    assert "using the only ones there are, bridge_orig" in capsys.readouterr().err
    for stats, suite, asked in (
        (both, "libero_goal", None),
        (both, "libero_object", "libero_goal"),
        ({}, "libero_10", None),
    ):
        with pytest.raises(UserError, match="no action statistics for .*--unnorm-key"):
            find_statistics(stats, suite, asked)
    assert tiny().unnorm_key_for("libero_object_task") == "libero_object"


# ---- adapters and their base -----------------------------------------------------------------------------------------


def test_adapters_know_their_base(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path / "base")
    trained(model).save_adapters(tmp_path / "adapters")
    for dtype in (torch.float32, torch.bfloat16):  # the same weights in any format
        ActorCritic(OpenVLA.from_pretrained(tmp_path / "base", dtype), 4, 8).load_adapters(
            tmp_path / "adapters"
        )
    other = ActorCritic(tiny(), 4, 8)
    other.load_adapters(tmp_path / "adapters")
    other.save_policy(tmp_path / "merged")
    onto_itself = ActorCritic(OpenVLA.from_pretrained(tmp_path / "merged"), 4, 8)
    before = [p.clone() for p in onto_itself.parameters()]
    with pytest.raises(UserError, match="was trained on other weights"):
        onto_itself.load_adapters(tmp_path / "adapters")
    assert all(torch.equal(a, b) for a, b in zip(before, onto_itself.parameters(), strict=True))
    # From before bases were written down.
    for path in (tmp_path / "adapters").glob("*/adapter_model.safetensors"):
        save_file(load_file(path), path)
    onto_itself.load_adapters(tmp_path / "adapters")


@pytest.mark.parametrize("max_shard_bytes", [5_000_000_000, 500_000])
def test_merging_files_equals_saving(tmp_path, run, max_shard_bytes, monkeypatch):
    out, actor_critic = run
    actor_critic.save_policy(tmp_path / "saved")
    adapter, settings = merge.find_adapter(out)
    merge.merge(
        adapter, settings["model"], tmp_path / "merged", max_shard_bytes, settings["eval_temperature"]
    )
    files = sorted(path.name for path in (tmp_path / "merged").glob("*.safetensors"))
    assert (len(files) > 4) == (max_shard_bytes == 500_000)
    tensors = {}
    for file in files:
        tensors |= load_file(tmp_path / "merged" / file)
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert tensors.keys() == saved.keys() and all(torch.equal(tensors[name], saved[name]) for name in saved)
    for name in ("config.json", "tokenizer.json"):
        assert (tmp_path / "merged" / name).read_bytes() == (tmp_path / "saved" / name).read_bytes()
    earlier, _ = merge.find_adapter(out / "checkpoints" / "000001")
    assert (adapter.parts[-3], earlier.parts[-3]) == ("000002", "000001")
    monkeypatch.chdir(out / "checkpoints" / "000001")
    assert merge.find_adapter(".") == (earlier, settings)


def test_merging_official_layout_leaves_unused_tensors(tmp_path):
    """The last blocks that nobody computes with, and the file's own number format, stay as they were."""
    actor_critic = trained(OpenVLA.from_pretrained(OFFICIAL))
    actor_critic.save_adapters(tmp_path / "adapters")
    merge.merge(tmp_path / "adapters" / "policy", str(OFFICIAL), tmp_path / "merged")
    before, after = (load_file(folder / "model.safetensors") for folder in (OFFICIAL, tmp_path / "merged"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"{layer}.weight" for layer in actor_critic.policy.layers}
    assert {t.dtype for t in after.values()} == {t.dtype for t in before.values()}
    OpenVLA.from_pretrained(tmp_path / "merged")


def test_merge_command_and_its_errors(tmp_path, run):
    out, _ = run

    def command(*flags):
        command = [sys.executable, "-m", "models.merge", *map(str, flags)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    done = command("--run", out, "--out", tmp_path / "merged")
    assert done.returncode == 0 and "merged into" in done.stdout, done.stderr
    assert OpenVLA.from_pretrained(tmp_path / "merged").sampling_temperature == 0.3
    adapter = out / "checkpoints" / "000002" / "adapters" / "policy"
    for flags, message in [
        ((), "either --run or --adapter"),
        (("--run", tmp_path), "neither a run directory"),
        (("--adapter", adapter), "--base is needed"),
        (("--run", out, "--base", tmp_path / "merged"), "trained on other weights"),
        (("--run", out, "--base", OFFICIAL), "does not fit"),
    ]:
        failed = command(*flags, "--out", tmp_path / "no")
        assert failed.returncode == 1 and message in failed.stderr and failed.stderr.count("\n") == 1, (
            failed.stderr
        )
        assert not (tmp_path / "no").exists()


SAVE_AND_WATCH = """
import sys, torch
from policy import ActorCritic, OpenVLA
def memory(field):
    (line,) = [line for line in open("/proc/self/status") if line.startswith(field)]
    return int(line.split()[1]) * 1024
model = OpenVLA.from_pretrained(sys.argv[1])
size = sum(p.nbytes for p in model.parameters())
actor_critic = ActorCritic(model, 4, critic="shared")
base = actor_critic.policy.base_tensors()
for name in list(base)[-8:]:
    actor_critic.policy.merged(name, base[name])  # libraries and allocator are warm now
open("/proc/self/clear_refs", "w").write("5")
before = memory("VmRSS")
actor_critic.model.write(sys.argv[2], base, actor_critic.policy.merged, int(sys.argv[3]))
print(memory("VmHWM") - before, size)
"""


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux' /proc"
)
def test_saving_holds_less_than_a_shard_beside_the_model(tmp_path):
    """Of 310 MB in shards of 100: the peak is a few of the largest matrix (9 MB: W, B A and their sum)."""
    shard = 100_000_000
    model = policy.build_tiny(words=WORDS, width=768, layers=8, heads=12, mlp=3072, vision_width=64)
    model.save_pretrained(tmp_path / "base")
    command = [sys.executable, "-c", SAVE_AND_WATCH, tmp_path / "base", tmp_path / "out", str(shard)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    peak, size = map(int, done.stdout.split())
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 4
    assert size > 200e6 and peak < shard, (peak, size)


# ---- number formats and memory -----------------------------------------------------------------------------------------


def test_headers_tell_sizes():
    table = tensor_table(OFFICIAL)
    tensors = load_file(OFFICIAL / "model.safetensors")
    assert {name: (e.dtype, e.shape, e.nbytes) for name, e in table.items()} == {
        name: (t.dtype, tuple(t.shape), t.nbytes) for name, t in tensors.items()
    }


def big(tmp_path):
    """A checkpoint whose header tells of 7 billion numbers, in a sparse file."""
    shutil.copytree(OFFICIAL, tmp_path / "m")
    entries, end = {}, 0
    for i in range(32):
        for name, shape in (
            *((f"self_attn.{x}_proj", (4096, 4096)) for x in "qkvo"),
            *((f"mlp.{x}_proj", (11008, 4096)) for x in ("gate", "up", "down")),
        ):
            begin, end = end, end + 2 * math.prod(shape)
            name = f"language_model.model.layers.{i}.{name}.weight"
            entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    header = json.dumps(entries).encode()
    with open(tmp_path / "m" / "model.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + end)
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    del config["vision_configs"]
    config["text_config"] = {"vocab_size": 32064, "pad_token_id": 32000}
    config["timm_model_ids"] = ["vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224"]
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    return tmp_path / "m"


def test_dtype_of_small_and_large_models(tmp_path, monkeypatch):
    large = big(tmp_path)
    for device in ("cpu", "cuda"):
        assert choose_dtype("auto", OFFICIAL, device) == torch.float32
        assert choose_dtype("bfloat16", OFFICIAL, device) == torch.bfloat16
        assert choose_dtype("float32", large, device) == torch.float32
    assert choose_dtype("auto", large, "cuda") == torch.bfloat16
    for well, want in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr("models.memory.cpu_computes_bfloat16_well", lambda well=well: well)
        assert choose_dtype("auto", large, "cpu") == want


def test_a_tiny_policy_is_tiny_whatever_names_it(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert choose_model("me/tiny", "libero_object", {}) == (
        "me/tiny",
        "7B",
        "asked for",
    )  # not there: the hub will tell
    folder = tmp_path / "cache" / "models--me--tiny"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("c0ffee")
    tiny().save_pretrained(folder / "snapshots" / "c0ffee")
    assert choose_model("me/tiny", "libero_object", {}) == ("me/tiny", "tiny", "asked for")
    shutil.copytree(folder / "snapshots" / "c0ffee", tmp_path / "mine")
    assert choose_model("~/mine", "libero_object", {}) == (str(tmp_path / "mine"), "tiny", "asked for")
    assert choose_model(str(tmp_path / "mine"), "libero_object", {})[1] == "tiny"


def test_auto_takes_7b_where_it_is_downloaded_and_fits(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    name, flags = (
        "openvla/openvla-7b-finetuned-libero-object",
        dict(num_envs=10, num_steps=128, critic="adapter"),
    )
    flags |= dict(lora_rank=32, micro_batch_size=8, gradient_checkpointing=False)
    assert choose_model("auto", "libero_object", flags)[1:] == ("tiny", "no GPU")
    gpu = types.SimpleNamespace(total_memory=80e9)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    path, size, reason = choose_model("auto", "libero_object", flags)
    assert size == "tiny" and f"`hf download {name}`" in reason and Path(path).is_dir()

    folder = tmp_path / "cache" / f"models--{name.replace('/', '--')}"  # the hub's layout
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("c0ffee")
    (folder / "snapshots").mkdir()
    snapshot = big(tmp_path).rename(folder / "snapshots" / "c0ffee")
    for memory, extra, what in (
        (80e9, {}, (name, "7B", "GPU and weights are there")),
        (40e9, {}, "the GPU has 40 GB, OpenVLA-7B needs [56]. \\(3. with --gradient-checkpointing\\)"),
        (40e9, dict(gradient_checkpointing=True), (name, "7B", "GPU and weights are there")),
        (24e9, dict(gradient_checkpointing=True), "the GPU has 24 GB, OpenVLA-7B needs 3.$"),
        (
            40e9,
            dict(gradient_checkpointing=True, dtype="float32"),
            "the GPU has 40 GB, OpenVLA-7B needs 6.$",
        ),
    ):
        gpu.total_memory = memory
        chosen = choose_model("auto", "libero_object", flags | extra)
        assert (
            chosen == what
            if isinstance(what, tuple)
            else chosen[1] == "tiny" and re.fullmatch(what, chosen[2])
        )
    # One shard of two is still on its way: not downloaded.
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    assert choose_model("auto", "libero_object", flags)[1] == "tiny"


def test_memory_is_estimated_before_loading(tmp_path):
    folder = big(tmp_path)
    training = dict(num_envs=10, num_steps=128, critic="adapter", lora_rank=32, micro_batch_size=8)
    needs = Needs(folder, torch.bfloat16, **training)
    parts = needs.parts("cuda")
    assert parts["weights"] == pytest.approx(12.95e9, rel=0.01)
    # this file has nothing but layers with adapters
    assert parts["the merged copy for rollouts"] == parts["weights"]
    assert parts["activations of a micro-batch"] == pytest.approx(8 * 4.0e9, rel=0.03)
    sharded = Needs(folder, torch.bfloat16, shards=4, **training).parts("cuda")
    assert sharded["weights"] == parts["weights"] / 4 and "the merged copy for rollouts" not in sharded
    check_memory(needs, "cuda", free=80e9)
    for free, flags in (
        (48e9, "--gradient-checkpointing makes it 3"),
        (24e9, "--gradient-checkpointing --micro-batch-size 1 --critic shared makes it"),
        (8e9, "at least .* with .*: use --model openvla-tiny, more memory, or --shard"),
    ):
        with pytest.raises(
            UserError, match=f"needs about .* GB .*, and the GPU has {free / 1e9:.0f} free.*{flags}"
        ) as error:
            check_memory(needs, "cuda", free)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="machine has 20 free; --dtype bfloat16 makes it"):
        check_memory(Needs(folder, torch.float32), "cpu", 20e9)
    check_memory(Needs(OFFICIAL, torch.float32), "cpu", 4e9)
