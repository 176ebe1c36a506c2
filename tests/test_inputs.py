"""Bad input, generated: command lines, HDF5 files, checkpoints and settings are used or refused in one line.

And what a hostile file could try: code in weights, and names that leave the output directory.
"""

import ast
import copy
import dataclasses
import importlib
import json
import random
import shutil
import signal
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import demos
import eval as evaluation
import sft
import train
from bench.__main__ import COMMANDS as BENCHES
from policy import ActorCritic, OpenVLA, build_tiny
from reward_model import RPRM
from scripts import rprm
from support import checkpoints, cli, demonstrations, files, runs
from support.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
SMALL = dict(
    vision_width=16,
    vision_blocks=2,
    vision_heads=2,
    width=16,
    layers=1,
    heads=2,
    mlp=16,
    image_size=32,
    patch_size=16,
)
often = settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
sometimes = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))

# --------------------------------------------------------------------------------------------------------------------
# Command lines
# --------------------------------------------------------------------------------------------------------------------

COMMANDS = {
    "label": (rprm.LabelArgs, ""),
    "train": (rprm.TrainArgs, ""),
    "score": (rprm.ScoreArgs, ""),
    "record": (rprm.RecordArgs, ""),
}
BENCH_ARGS = {name: importlib.import_module(f"bench.{name}").Args for name in BENCHES}
PARSERS = {
    "train.py": (train.Args, lambda argv: cli.parse_args(train.Args, "", argv)),
    "eval.py": (evaluation.Args, lambda argv: cli.parse_args(evaluation.Args, "", argv)),
    "sft.py": (sft.Args, lambda argv: cli.parse_args(sft.Args, "", argv)),
    "demos.py": (demos.Args, lambda argv: cli.parse_args(demos.Args, "", argv)),
    **{
        f"scripts.rprm {name}": (
            COMMANDS[name][0],
            lambda argv, name=name: cli.parse_command(COMMANDS, "", [name, *argv])[1],
        )
        for name in COMMANDS
    },
    **{
        f"bench {name}": (args, lambda argv, args=args: cli.parse_args(args, "", argv))
        for name, args in BENCH_ARGS.items()
    },
}
# What a shell can pass: any text without the zero byte, bytes that are no text included.
TEXT = st.text(st.characters(blacklist_characters="\0"), max_size=12)
VALUE = st.one_of(
    TEXT,
    st.integers().map(str),
    st.floats().map(str),
    st.sampled_from("0 -1 1e999 nan inf 0x10 1_000 0,1 , 0,,1 none".split()),
)


@pytest.mark.parametrize("script", PARSERS)
@often
@given(data=st.data())
def test_any_command_line_is_parsed_or_refused_in_one_line(script, data, capsys):
    args_class, parse = PARSERS[script]
    names = [f"--{name.replace('_', '-')}" for name in args_class.__dataclass_fields__]
    word = st.one_of(st.sampled_from(names), st.tuples(st.sampled_from(names), VALUE).map("=".join), VALUE)
    argv = data.draw(st.lists(word, max_size=8))
    try:
        args = parse(argv)
    except SystemExit as stop:
        out, err = capsys.readouterr()
        refused = stop.code == 2 and err.startswith("error: ") and err.count("\n") == 1
        assert refused or stop.code == 0 and "--help" in out
    except UserError as error:
        assert str(error)
    else:
        assert 0 <= getattr(args, "seed", 0) < 2**32  # what every generator takes


@pytest.mark.parametrize(
    "main, argv",
    [
        (lambda: evaluation.main(cli.parse_args(evaluation.Args, "")), ["--checkpoint", "TEXT"]),
        (lambda: sft.main(cli.parse_args(sft.Args, "")), ["--init", "TEXT"]),
        (lambda: sft.main(cli.parse_args(sft.Args, "")), ["--data", "TEXT"]),
        (lambda: demos.main(cli.parse_args(demos.Args, "")), ["--suite", "TEXT"]),
        (lambda: train.main(cli.parse_args(train.Args, "")), ["--suite", "TEXT"]),
        (lambda: train.main(cli.parse_args(train.Args, "")), ["--resume", "TEXT"]),
    ],
)
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    text=st.one_of(
        TEXT.map(lambda x: "no/such/" + x), st.sampled_from(["", ".", "/dev/null", "/", "\udcff", "x" * 300])
    )
)
def test_any_name_of_nothing_is_one_line(main, argv, text, capsys, monkeypatch, tmp_path_factory):
    monkeypatch.chdir(tmp_path_factory.mktemp("here"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(
        "sys.argv", ["script", *(f"{argv[0]}={text}" if x == "TEXT" else x for x in argv[1:])]
    )
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.raises(SystemExit) as stop:
        main()
    for number, handler in handlers.items():  # train.py's own would stay
        signal.signal(number, handler)
    err = capsys.readouterr().err
    assert stop.value.code in (1, 2) and "error: " in err and "Traceback" not in err
    assert not [p for p in Path.cwd().rglob("*") if p.is_file()]  # nothing half-written


# --------------------------------------------------------------------------------------------------------------------
# JSON: settings of a run, configuration of a model
# --------------------------------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        TEXT,
        st.sampled_from(["../x", "0", 2**63, -1, 1e300]),
    ),
    lambda x: st.one_of(st.lists(x, max_size=3), st.dictionaries(TEXT, x, max_size=3)),
    max_leaves=5,
)


def places(tree, path=()):
    """Every place in a JSON value."""
    yield path
    items = tree.items() if isinstance(tree, dict) else enumerate(tree[:2]) if isinstance(tree, list) else ()
    for key, value in items:
        yield from places(value, (*path, key))


def damaged(draw, tree):
    """A JSON value with something else, or nothing, in one place."""
    tree, path = copy.deepcopy(tree), draw(st.sampled_from(list(places(tree))))
    if not path:
        return draw(JSON)
    parent = tree
    for key in path[:-1]:
        parent = parent[key]
    if draw(st.booleans()) and isinstance(parent, dict):
        del parent[path[-1]]
    else:
        parent[path[-1]] = draw(JSON)
    return tree


@often
@given(data=st.data())
def test_any_settings_of_a_run_are_checked_like_flags(data):
    good = json.loads(json.dumps(dataclasses.asdict(train.Args(task_ids=[0, 1], lr=1e-5, out="runs/x"))))
    assert cli.parse_settings(train.Args, good, "config.json") == train.Args(
        task_ids=[0, 1], lr=1e-5, out="runs/x"
    )
    saved = damaged(data.draw, good)
    try:
        args = cli.parse_settings(train.Args, saved, "config.json")
    except UserError as error:
        assert str(error).startswith("config.json") and "\n" not in str(error)
    else:  # then a command line could have said the same
        for name, spec in train.Args.__dataclass_fields__.items():
            value, low = getattr(args, name), spec.metadata.get("min")
            values = value if isinstance(value, list) else [value]
            assert low is None or value is None or min(values) >= low


def test_settings_of_earlier_versions_are_renamed_or_left_out_with_a_word(capsys):
    saved = {"suite": "libero_goal", "lam": 0.8, "groups": 2, "compile_decoding": False}
    args = cli.parse_settings(train.Args, saved, "config.json", runs.RENAMED)
    assert args == train.Args(suite="libero_goal", gae_lambda=0.8)
    said = capsys.readouterr().err
    assert "'groups'" in said and "'compile_decoding'" in said and said.count("warning: config.json") == 2


@often
@given(
    text=st.one_of(TEXT, st.sampled_from(["[" * 100_000, "{", "[]", "3", "null", '{"x": 1e400}'])),
    raw=st.binary(),
)
def test_any_file_in_place_of_json_is_one_line(text, raw, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "config.json"
    for content in (text.encode(errors="surrogatepass"), raw):
        path.write_bytes(content)
        try:
            assert isinstance(files.read_json(path), dict)
        except UserError as error:
            assert str(path) in str(error)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "rprm"
    model = build_tiny(0, words=["pick", "up", "the", "soup"], **SMALL)
    model.norm_stats["libero_object"] = {
        "action": {"q01": [-1.0] * 7, "q99": [1.0] * 7, "mask": [True] * 6 + [False]}
    }
    model.save_pretrained(folder)
    (folder / "rprm.json").write_text("{}")
    return folder


def use_checkpoint(folder):
    """Load as policy and as reward model, and let both answer once."""
    reward_model = RPRM.from_pretrained(folder)
    model = reward_model.model
    ids, mask = model.tokenize(["pick up the soup"])
    pixels = model.preprocess(np.zeros((1, 256, 256, 3), np.uint8))
    tokens = model.generate_actions(ids, pixels, mask).tokens
    model.decode_actions(tokens, "libero_object")
    reward_model.score(ids, mask, tokens, pixel_values=pixels)


@sometimes
@given(data=st.data())
def test_any_damage_to_a_model_configuration_is_one_line(checkpoint, data):
    path = checkpoint / "config.json"
    good = path.read_text()
    try:
        path.write_text(json.dumps(damaged(data.draw, json.loads(good))))
        use_checkpoint(checkpoint)
    except UserError as error:
        assert str(error)
    finally:
        path.write_text(good)
    use_checkpoint(checkpoint)


# --------------------------------------------------------------------------------------------------------------------
# Damaged bytes
# --------------------------------------------------------------------------------------------------------------------


def damage_bytes(content, rng):
    """Cut, flip, overwrite or insert."""
    content, kind = bytearray(content), rng.randrange(4)
    # Headers first.
    at = rng.randrange(len(content)) if rng.random() < 0.5 else rng.randrange(min(2000, len(content)))
    if kind == 0:
        del content[at:]
    elif kind == 1:
        content[at] ^= 1 << rng.randrange(8)
    elif kind == 2:
        content[at : at + 8] = rng.randbytes(8)
    else:
        content[at:at] = rng.randbytes(rng.randrange(1, 20))
    return bytes(content)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "rprm.json", "config.json"])
def test_any_damaged_byte_of_a_model_is_one_line(checkpoint, tmp_path, name):
    folder, rng, refused = tmp_path / "m", random.Random(0), 0
    shutil.copytree(checkpoint, folder)
    good = (folder / name).read_bytes()
    for _ in range(100):
        (folder / name).write_bytes(damage_bytes(good, rng))
        try:
            use_checkpoint(folder)
        except UserError:
            refused += 1
    assert refused > 20


def test_shards_cannot_point_out_of_the_checkpoint(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "m", ignore=shutil.ignore_patterns("rprm.json"))
    index = tmp_path / "m" / "model.safetensors.index.json"
    for names in (
        {"a": "../m/model.safetensors"},
        {"a": f"{checkpoint}/model.safetensors"},
        {"a": 3},
        {},
        [],
        None,
    ):
        index.write_text(json.dumps({"weight_map": names}))
        with pytest.raises(UserError, match="weight_map"):
            OpenVLA.from_pretrained(tmp_path / "m")


def test_any_damaged_byte_of_a_run_is_noticed_and_the_checkpoint_before_is_taken(tmp_path, capsys):
    """Also a flipped bit inside a tensor, which every reader would take for a number."""
    model = ActorCritic(build_tiny(0, words=["soup"], **SMALL), lora_rank=2)
    optimizer = torch.optim.AdamW(model.policy_parameters())
    for iteration in (1, 2):
        state = {"iteration": iteration, "optimizer": optimizer.state_dict(), "random": torch.get_rng_state()}
        checkpoints.save_checkpoint(tmp_path, iteration, model, state, keep=2, best=-1)
    newest, rng = tmp_path / "checkpoints" / "000002", random.Random(0)
    files = [p for p in newest.rglob("*") if p.is_file()]
    assert checkpoints.load_checkpoint(tmp_path, model)["iteration"] == 2 and len(files) >= 5
    capsys.readouterr()
    for path in files:
        good = path.read_bytes()
        for _ in range(20):
            bad = damage_bytes(good, rng)
            if bad == good:
                continue
            path.write_bytes(bad)
            assert checkpoints.load_checkpoint(tmp_path, model)["iteration"] == 1
            err = capsys.readouterr().err
            assert err.count("\n") == 1 and "000002 is damaged" in err
        path.unlink()
        assert checkpoints.load_checkpoint(tmp_path, model)["iteration"] == 1
        assert "000002 is damaged" in capsys.readouterr().err
        path.write_bytes(good)
    shutil.rmtree(tmp_path / "checkpoints" / "000001")
    files[0].unlink()
    with pytest.raises(UserError, match="no readable checkpoint"):
        checkpoints.load_checkpoint(tmp_path, model)


@pytest.mark.parametrize(
    "text", ["", "{", "[]\n", '{"iteration": 1}\n', '{"iteration": 2}\n', "\xff", "[" * 100_000]
)
def test_damaged_metrics_cost_lines_and_not_the_run(tmp_path, text, capsys):
    good = [
        {"iteration": i, "charts/decisions": 6 * i, "charts/successes": 0, "charts/episodes": 0}
        for i in (1, 2, 3)
    ]
    lines = "".join(json.dumps(x) + "\n" for x in good[:2])
    (tmp_path / "metrics.jsonl").write_bytes((lines + text).encode("latin1"))
    assert runs.Metrics.read(tmp_path, 2) == good[:2]
    capsys.readouterr()
    assert runs.Metrics.read(tmp_path, 3) == good[:2] and "of 3 iterations" in capsys.readouterr().err
    (tmp_path / "metrics.jsonl").write_bytes(
        (lines + text.strip() + "\n" + json.dumps(good[2]) + "\n").encode("latin1")
    )
    assert runs.Metrics.read(tmp_path, 3) == good  # what comes after the damage is kept


def test_a_run_that_fell_back_to_an_old_checkpoint_keeps_its_new_ones(tmp_path, capsys):
    model = ActorCritic(build_tiny(0, words=["soup"], **SMALL), lora_rank=2)

    def save(iteration):
        checkpoints.save_checkpoint(tmp_path, iteration, model, {"iteration": iteration}, keep=2, best=20)
        return sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir())

    for iteration in (20, 38, 39):
        saved = save(iteration)
    assert saved == [20, 38, 39]
    for iteration in (38, 39):
        (tmp_path / "checkpoints" / f"{iteration:06d}" / "state.pt").write_bytes(b"damaged")
    assert checkpoints.load_checkpoint(tmp_path, model)["iteration"] == 20
    assert save(21) == [20, 21] and save(22) == [20, 21, 22] and save(23) == [20, 22, 23]
    assert checkpoints.load_checkpoint(tmp_path, model)["iteration"] == 23


def test_any_log_of_episodes_is_one_line(tmp_path):
    settings_, rng = {"suite": "x", "seed": None}, random.Random(0)
    log = evaluation.EpisodeLog(tmp_path / "good.jsonl", settings_)
    log.append({"task_id": 0, "init_state": 0, "success": True, "steps": 9})
    good, refused = (tmp_path / "good.jsonl").read_bytes(), 0
    odd = [b"[]\n", b'{"settings": [1]}\n', good + b"{}\n", good + b"3\n"]
    for content in [damage_bytes(good, rng) for _ in range(300)] + odd:
        (tmp_path / "log.jsonl").write_bytes(content)
        try:
            evaluation.EpisodeLog(tmp_path / "log.jsonl", settings_)
        except UserError:
            refused += 1
    assert refused > 100


# --------------------------------------------------------------------------------------------------------------------
# Demonstrations
# --------------------------------------------------------------------------------------------------------------------


def demonstration(steps=5):
    rng = np.random.default_rng(0)
    return {
        "actions": rng.uniform(-1, 1, (steps, 7)),
        "states": np.zeros((steps, 4)),
        "ee_pos": rng.random((steps, 3)),
        "gripper_states": rng.uniform(0, 0.04, (steps, 2)),
        "agentview_rgb": np.zeros((steps, 16, 16, 3), np.uint8),
    }


def use_demonstrations(path):
    """As all three readers do."""
    list(demonstrations.read_demos(path))
    sft.Dataset({"toy": path}, 32, 4)
    for trajectory in rprm.read_trajectories(path):
        rprm.label(trajectory, rprm.LabelRule())


@sometimes
@given(seed=st.integers(0, 2**32))
def test_any_damaged_byte_of_demonstrations_is_one_line(seed, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp()
    good, path = folder / "good_demo.hdf5", folder / "bad_demo.hdf5"
    if not good.exists():
        demonstrations.write_demos(good, [demonstration()] * 2, 4, "pick up the soup")
    path.write_bytes(damage_bytes(good.read_bytes(), random.Random(seed)))
    try:
        use_demonstrations(path)
    except UserError as error:
        assert "bad_demo.hdf5" in str(error)


ARRAYS = st.one_of(
    st.tuples(
        st.lists(st.integers(0, 6), max_size=4), st.sampled_from(["f8", "f4", "i8", "u1", "?", "S3", "c16"])
    ).map(lambda x: np.zeros(x[0], x[1])),
    st.sampled_from([np.full((5, 7), np.nan), np.full((5, 3), np.inf), np.zeros((1, 7)), np.zeros((0, 7))]),
    st.just("text"),
    st.none(),
)


@sometimes
@given(
    name=st.sampled_from(
        ["actions", "states", "obs", "obs/ee_pos", "obs/gripper_states", "obs/agentview_rgb"]
    ),
    value=ARRAYS,
)
def test_any_other_dataset_in_demonstrations_is_one_line(name, value, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "other_demo.hdf5"
    demonstrations.write_demos(path, [demonstration()], 4, "pick up the soup")
    with h5py.File(path, "a") as file:
        demo = file["data/demo_0"]
        del demo[name]
        if value is not None:
            demo[name] = value
    try:
        use_demonstrations(path)
    except UserError as error:
        assert "other_demo.hdf5" in str(error)


@sometimes
@given(
    name=st.sampled_from(["problem_info", "action_repeat"]),
    value=st.one_of(
        TEXT.filter(str.isascii),
        st.integers(-(2**63), 2**63 - 1),
        st.floats(),
        JSON.map(json.dumps),
        st.just(np.zeros(3)),
    ),
)
def test_any_attribute_of_demonstrations_is_one_line(name, value, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "attribute_demo.hdf5"
    demonstrations.write_demos(path, [demonstration()], 4, "pick up the soup")
    with h5py.File(path, "a") as file:
        file["data"].attrs[name] = value
    try:
        use_demonstrations(path)
    except UserError as error:
        assert "attribute_demo.hdf5" in str(error)


# --------------------------------------------------------------------------------------------------------------------
# Hostile input
# --------------------------------------------------------------------------------------------------------------------

HOSTILE = [
    "../../etc/passwd",
    "/etc/passwd",
    "..",
    "a/../../b",
    "~/x",
    "\0",
    "con\n",
    "x" * 500,
    "$(rm -rf .)",
    "",
    "‮",
]


def test_nothing_that_was_downloaded_is_executed():
    """Every reader of foreign files, in every script: no pickle, no code from a model repository, no shell."""
    forbidden = {"eval", "exec", "pickle.load", "pickle.loads", "joblib.load", "yaml.load", "os.system"}
    seen = 0
    rooms = ("simulator", "experts", "models", "support", "bench", "scripts")
    for path in [*ROOT.glob("*.py"), *(path for room in rooms for path in (ROOT / room).glob("*.py"))]:
        for call in (n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)):
            name = ast.unparse(call.func)
            given_ = {k.arg: ast.unparse(k.value) for k in call.keywords}
            where = f"{path.name}:{call.lineno} {name}"
            assert name not in forbidden and given_.get("shell") in (None, "False"), where
            if name == "torch.load":
                seen += 1
                assert given_.get("weights_only") == "True", where
            if name in ("np.load", "numpy.load"):
                seen += 1
                assert given_.get("allow_pickle") == "False", where
            if name.startswith("Auto") and name.endswith(".from_pretrained"):
                seen += 1
                assert "own" in [ast.unparse(k.value) for k in call.keywords if k.arg is None], where
    assert seen >= 6
    assert "own = dict(trust_remote_code=False)" in (ROOT / "models/vlm.py").read_text()


def test_a_pickle_in_place_of_a_checkpoint_is_not_executed(tmp_path, capsys):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    model = ActorCritic(build_tiny(0, words=["soup"], **SMALL), lora_rank=2)
    checkpoints.save_checkpoint(tmp_path, 1, model, {"iteration": 1}, keep=2, best=-1)
    newest = tmp_path / "checkpoints" / "000001"
    torch.save(Bomb(), newest / "state.pt")
    # Whoever made it knows checksums too.
    (newest / "sha256.json").write_text(json.dumps(checkpoints.checksums(newest)))
    with pytest.raises(UserError, match="no readable checkpoint"):
        checkpoints.load_checkpoint(tmp_path, model)
    assert "000001 is damaged" in capsys.readouterr().err and not (tmp_path / "executed").exists()


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_task_texts_stay_inside_the_output_directory(tmp_path, text):
    inside = tmp_path / "out"
    path = demonstrations.demo_path(inside, "libero_object", text)
    demonstrations.write_demos(path, [demonstration()], 4, text)
    (file,) = demonstrations.demo_files(inside / "libero_object")
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [file] == [path]
    plots = rprm.LabelArgs(demos=inside / "libero_object", plot=tmp_path / "plots")
    with h5py.File(path, "a") as handle:
        handle["data"].move("demo_0", "demo_0_" + text.replace("\0", "").replace("/", "_")[:50])
    rprm.run_label(plots)
    written = {p.parent for p in tmp_path.rglob("*") if p.is_file()}
    assert written == {inside / "libero_object", tmp_path / "plots"}


def test_weights_with_nan_load_and_are_refused_where_they_decide(checkpoint, tmp_path):
    """Not a matter of the file format. In updates, training names the quantity (tests/test_faults.py)."""
    shutil.copytree(checkpoint, tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    tensors = {k: torch.full_like(v, float("nan")) for k, v in tensors.items()}
    save_file(tensors, tmp_path / "m" / "model.safetensors")
    with pytest.raises(UserError, match="log-probabilities are not finite"):
        use_checkpoint(tmp_path / "m")
