"""README and docs/ are checked against the code: links, flags, defaults, targets, pins. No simulator, no model.

    python tests/test_docs.py       # renew the line numbers of links into the code after an edit of it

Measured numbers are filled in by hand from JSON files and not checked, but for the tables that a command makes: those of
`support.compare`, of what the test states are, and what `bench rprm` gave; and what the commands of `support.compare` print
that a page shows.
"""

import ast
import functools
import json
import os
import re
import shlex
import subprocess
import sys
import urllib.parse
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS = ("demos.py", "sft.py", "-m scripts.rprm", "train.py", "eval.py")
MODULES = (
    "bench",
    "support.report",
    "support.compare",
    "models.merge",
)  # python -m, which may import what is slow before --help
SUBCOMMANDS = {
    "-m scripts.rprm": ("label", "train", "score", "record"),
    "-m support.report": ("page",),
    "-m support.compare": ("methods", "along", "tests", "pair", "suites"),
    "-m bench": tuple(
        p.stem for p in (ROOT / "bench").glob("*.py") if re.search(r"^def measure\(", p.read_text(), re.M)
    ),
}
# Links such as [`ppo.py:compute_gae`](../ppo.py#L240), with an optional: at `words of the line meant`.
LINK = re.compile(r"\[`([\w/]+\.py):([\w.]+)`\]\(((?:\.\./)?[\w/]+\.py)#L(\d+)\)(?: at `([^`]+)`)?")


def readme():
    return README.read_text(encoding="utf-8")


def everything():
    return "\n".join(page.read_text(encoding="utf-8") for page in PAGES)


# --------------------------------------------------------------------------------------------------------------------
# Links
# --------------------------------------------------------------------------------------------------------------------


@functools.cache
def definitions(file):
    """{qualified name: (first line, last line)} of the functions, classes and methods of a file."""
    found = {}

    def visit(node, prefix):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                found[prefix + child.name] = (child.lineno, child.end_lineno)
                visit(child, f"{prefix}{child.name}.")

    visit(ast.parse((ROOT / file).read_text(encoding="utf-8")), "")
    return found


def target_line(file, name, words):
    """Line that a link means: of the definition, or of the first line in it that contains `words`."""
    assert (ROOT / file).is_file(), f"{file} does not exist"
    assert name in definitions(file), f"{file}:{name} does not exist"
    first, last = definitions(file)[name]
    if words is None:
        return first
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    hits = [n for n in range(first, last + 1) if words in lines[n - 1]]
    assert hits, f"a link points to `{words}` in {file}:{name}, where no line says so"
    return hits[0]


def renew_links(text):
    def renewed(match):
        file, name, path, _, words = match.groups()
        tail = "" if words is None else f" at `{words}`"
        return f"[`{file}:{name}`]({path}#L{target_line(file, name, words)}){tail}"

    return LINK.sub(renewed, text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_name_what_exists_and_land_in_it(page):
    links = LINK.findall(page.read_text(encoding="utf-8"))
    if page == README:
        assert len(links) >= 20
    for file, name, path, line, words in links:
        meant = target_line(file, name, words or None)
        first, last = definitions(file)[name]
        # Some drift is harmless: the link must land inside the definition, and near the line that it quotes.
        near = abs(int(line) - meant) <= 15 if words else first <= int(line) <= last
        assert (page.parent / path).resolve() == ROOT / file and near, (
            f"{page.name}: the link to {file}:{name} says line {line}, it is {meant}; run: python tests/test_docs.py"
        )


def test_renewing_the_links_is_stable_and_touches_nothing_else():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        renewed = renew_links(text)
        assert renew_links(renewed) == renewed
        assert re.sub(r"#L\d+", "", renewed) == re.sub(r"#L\d+", "", text)


def slugs(text):
    """Anchors that a page offers, made as GitHub makes them from its headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_and_to_pictures(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in [*re.findall(r"\]\(([^)\s]+)\)", text), *re.findall(r'src="([^"]+)"', text)]:
        if target.startswith(("https:", "http:")):
            continue
        path, _, anchor = urllib.parse.unquote(target).partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name} links to {target}"
        if anchor and file.suffix == ".md":
            assert anchor in slugs(file.read_text(encoding="utf-8")), (
                f"{page.name} links to {target}: no such heading"
            )


def test_every_page_can_be_reached_from_readme():
    seen, todo = set(), [README]
    while todo:
        page = todo.pop()
        if page not in seen:
            seen.add(page)
            todo += [
                (page.parent / name).resolve() for name in re.findall(r"\]\(([\w./-]+\.md)", page.read_text())
            ]
    assert set(PAGES) <= seen, f"no link leads to {sorted(p.name for p in set(PAGES) - seen)}"


def test_readme_is_short():
    lines = readme().splitlines()
    assert len(lines) <= 220
    for number, line in enumerate(lines, 1):
        assert len(line) <= 120, f"README line {number} has {len(line)} characters"


def test_every_equation_and_section_of_the_paper_is_in_the_map():
    section = readme().split("## From the paper to the code")[1].split("\n## ")[0]
    for what in ("Eq. 1", "Eq. 2", "Eq. 3", "Eq. 4", "Algorithm 1", "3.3", "3.4", "3.5", "GAE"):
        assert any(what in row and LINK.search(row) for row in section.splitlines()), (
            f"{what} has no line in the map"
        )


def test_file_table_is_complete():
    listed = re.findall(r"^\| `(\w+(?:\.py|/))` \|", readme(), re.MULTILINE)
    files = {path.name for path in ROOT.glob("*.py")}
    tracked = subprocess.run(
        ["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True
    ).stdout.split()
    rooms = {f"{name.split('/')[0]}/" for name in tracked if "/" in name} - {"tests/"}
    assert files | rooms <= set(listed)
    assert len(listed) == len(set(listed)) and all((ROOT / name).exists() for name in listed)


def test_files_named_in_the_text_exist():
    made_by_a_run = {
        "config.json",
        "metrics.jsonl",
        "success.png",
        "results.json",
        "rprm.json",
        "report.html",
    }
    for name in re.findall(r"`([\w./-]+\.(?:py|txt|json|jsonl|png|sh|md|cff|html))`", everything()):
        assert name in made_by_a_run or (ROOT / name).exists(), f"{name} is named, and does not exist"


# --------------------------------------------------------------------------------------------------------------------
# Command lines
# --------------------------------------------------------------------------------------------------------------------

# One process for all: what several of them import is then loaded once.
DRIVER = """
import contextlib, io, json, runpy, sys
answers = {}
for script, *command in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    sys.argv = [script.removeprefix("-m "), *command, "--help"]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            if script.startswith("-m "):
                sys.modules.pop(script[3:], None)  # one before may have imported it, of which runpy warns
                runpy.run_module(script[3:], run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(script, run_name="__main__")
            code = 0
        except SystemExit as exc:
            code = exc.code or 0
    heavy = [m for m in ("torch", "mujoco", "robosuite", "libero", "transformers", "peft", "matplotlib") if m in sys.modules]
    answers[" ".join([script, *command])] = [code, out.getvalue(), err.getvalue(), heavy]
print(json.dumps(answers))
"""


def ask_for_help(commands):
    environment = {**os.environ, "COLUMNS": "200", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps(commands)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout)
    for command, (code, out, err, _) in answers.items():
        assert code == 0 and out and not err, f"{command} --help: exit {code}, {err}"
    return answers


@pytest.fixture(scope="module")
def helps():
    """{"train.py": help text, "-m scripts.rprm label": help text, …}; asserts that each `--help` works."""

    def with_subcommands(scripts):
        return [[s] for s in scripts] + [[s, command] for s in scripts for command in SUBCOMMANDS.get(s, ())]

    scripts = ask_for_help(with_subcommands(SCRIPTS))
    for command, (*_, heavy) in scripts.items():
        assert not heavy, f"{command} --help imports {heavy}: a newcomer waits for nothing"
    modules = ask_for_help(with_subcommands([f"-m {name}" for name in MODULES]))
    return {command: out for command, (_, out, _, _) in {**scripts, **modules}.items()}


def flags_of(text):
    """{flag: its explanation} from argparse's help; `--no-x` twins share their entry."""
    found, current = {}, []
    for line in text.splitlines():
        if match := re.match(r"  (-\S.*?)(?:  +(.*))?$", line):
            current = re.findall(r"--[a-z][\w-]*", match[1])
            found.update(dict.fromkeys(current, match[2] or ""))
        elif line.startswith("      ") and current:
            found.update({flag: f"{found[flag]} {line.strip()}".strip() for flag in current})
        else:
            current = []
    return found


def test_help_explains_every_flag(helps):
    for command, text in helps.items():
        assert "usage:" in text
        if command in SUBCOMMANDS:  # the list of commands
            assert all(name in text for name in SUBCOMMANDS[command])
            continue
        flags = flags_of(text)
        assert len(flags) > (1 if command.startswith("-m") else 5), command
        for flag, explanation in flags.items():
            words = re.sub(r"\((default|required)[^()]*\)\s*$", "", explanation).strip()
            assert len(words) >= 4, f"{command} {flag} has no explanation"
        assert "%%" not in text, f"{command} --help shows a doubled percent sign"


def command_lines():
    """Lines of bash blocks, as lists of words, without comments; `a && b` gives two."""
    for block in re.findall(r"```bash\n(.*?)```", everything(), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            for part in line.split("&&"):
                if words := shlex.split(part, comments=True):
                    yield words


def inline_commands():
    """Commands inside backticks: `make …`, `python x.py …`, `x.py …`."""
    for text in re.findall(r"`((?:make|python|\w+\.py)\s[^`]+)`", everything()):
        if "…" not in text:
            yield shlex.split(text)


def script_and_flags(words):
    """("-m scripts.rprm label", ["--plot", …]) of a command line, or None where it runs no script of ours."""
    if words[0] == "make":
        arguments = next((word.removeprefix("ARGS=") for word in words if word.startswith("ARGS=")), "")
        words = [f"{words[1]}.py", *shlex.split(arguments)]
    elif "torchrun" in words[:2]:
        words = words[next(i for i, word in enumerate(words) if word in SCRIPTS) :]
    elif words[0].endswith("python"):
        words = words[1:] if words[1] != "-m" else [f"-m {words[2]}", *words[3:]]
    if words[0] not in SCRIPTS and words[0].removeprefix("-m ") not in MODULES:
        return None
    command = words[0]
    if command in SUBCOMMANDS and len(words) > 1 and words[1] != "NAME":
        assert words[1] in SUBCOMMANDS[command], f"{command} has no command {words[1]}"
        command = f"{command} {words[1]}"
    return command, [word.split("=")[0] for word in words if word.startswith("--")]


def test_flags_in_command_lines_are_accepted(helps):
    seen = set()
    for words in [*command_lines(), *inline_commands()]:
        if found := script_and_flags(words):
            command, flags = found
            seen.add(command)
            for flag in flags:
                assert flag in flags_of(helps[command]), f"{command} does not know {flag}"
    wanted = {f"{s} {c}" for s, commands in SUBCOMMANDS.items() for c in commands} | set(SCRIPTS).difference(
        SUBCOMMANDS
    )
    assert wanted <= seen, f"no page shows a command line for {sorted(wanted - seen)}"


def test_flags_in_the_text_exist_somewhere(helps):
    from torch.distributed.run import get_args_parser

    known = {flag for text in helps.values() for flag in flags_of(text)}
    known |= {flag for action in get_args_parser()._actions for flag in action.option_strings}  # torchrun's
    for code in re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", everything(), flags=re.DOTALL)):
        for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", code):
            assert flag in known, f"{flag} is named, which no script has"


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {words[1] for words in [*command_lines(), *inline_commands()] if words[0] == "make"}
    assert {"train", "test"} <= named
    assert named <= targets, f"make targets that do not exist: {sorted(named - targets)}"


# --------------------------------------------------------------------------------------------------------------------
# Numbers that are settings
# --------------------------------------------------------------------------------------------------------------------


def as_value(text):
    text = str(text).strip().replace(",", "")
    try:
        return float(text)
    except ValueError:
        return text


def table_rows(first_column):
    for line in everything().splitlines():
        if line.startswith("|") and re.search(first_column, line.split("|")[1]):
            yield [cell.strip() for cell in line.strip("|").split("|")]


def test_hyper_parameter_table_shows_the_defaults():
    import dataclasses

    import train

    args = {field.name: field.default for field in dataclasses.fields(train.Args)}
    shown = set()
    for flags, _, _, big, tiny in (row for row in table_rows(r"^ `--[a-z-]+`") if len(row) == 5):
        for flag in re.findall(r"`--([a-z-]+)`", flags):
            name = flag.replace("-", "_")
            shown.add(name)
            for cell, size in ((big, "7B"), (tiny, "tiny")):
                default = train.DEFAULTS[size].get(name, args[name])
                assert as_value(cell) == as_value(default), f"--{flag} for {size} is {default}, not {cell}"
    long = [row for row in table_rows(r"^ `--[a-z-]+`") if len(row) == 3]
    for flag, big, tiny in long:
        for cell, size in ((big, "7B"), (tiny, "tiny")):
            defaults = train.DEFAULTS[size] | train.LONG_DEFAULTS[size]
            assert as_value(cell) == as_value(defaults[flag.strip("`-").replace("-", "_")]), (flag, size)
    shown_long = {flag.strip("`-").replace("-", "_") for flag, *_ in long}
    assert set().union(*map(set, train.LONG_DEFAULTS.values())) <= shown_long
    sized = set().union(*map(set, train.DEFAULTS.values()))
    assert sized - {"micro_batch_size"} <= shown, "the table lacks a setting that differs by model size"


def test_sizes_of_openvla_tiny():
    import torch

    import policy
    from models.tiny import tiny_config, tiny_tokenizer

    words = [f"word{i}" for i in range(100)]  # about as many as LIBERO's instructions have
    config = tiny_config(tiny_tokenizer(words, policy.PROMPT))
    first, second = config["vision_configs"]
    text = config["text_config"]
    ((_, parameters, *_),) = table_rows(r"parameters \(computed\)")
    ((_, image, *_),) = table_rows("image, patch, patches")
    ((_, towers, *_),) = table_rows("towers, width x blocks")
    ((_, llama, *_),) = table_rows("Llama, width x layers")
    ((_, repeat, *_),) = table_rows("`action_repeat`")
    ((_, temperature, *_),) = table_rows("`sampling_temperature`")
    with torch.device("meta"):
        count = sum(p.numel() for p in policy.OpenVLA(config).parameters()) / 1e6
    assert abs(float(parameters.removesuffix(" M")) - count) < 0.1, (
        f"{parameters} parameters in the text, {count:.2f} M"
    )
    side, patch = first["image_size"], first["patch_size"]
    assert image == f"{side} px, {patch}, {(side // patch) ** 2}"
    assert towers == " and ".join(f"{t['hidden_size']} x {t['num_hidden_layers']}" for t in (first, second))
    assert llama == f"{text['hidden_size']} x {text['num_hidden_layers']}"
    assert repeat == str(config["action_repeat"])
    assert temperature == str(config["sampling_temperature"])
    (rounded,) = re.findall(r"`openvla-tiny` \(([\d.]+) M parameters", readme())
    assert rounded == parameters.removesuffix(" M")


@pytest.mark.parametrize("page", [README, ROOT / "docs" / "results.md"], ids=lambda page: page.name)
def test_table_1_is_what_the_result_files_give(page):
    from support import compare

    table = compare.suites(ROOT / "results")
    assert table in page.read_text(encoding="utf-8"), f"paste this into {page.name}:\n{table}"


@pytest.mark.parametrize(
    ("suite", "methods"),
    [("libero_10", "rl no-rprm"), ("libero_object", "rl no-rprm no-curriculum no-warmup lr-x10")],
)
def test_tables_of_methods_are_what_the_result_files_give(tmp_path, suite, methods):
    from support import compare

    runs = [
        str(run)
        for method in methods.split()
        for run in sorted((ROOT / "results" / suite).glob(f"{method}-seed[0-9]"))
    ]
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    for table in compare.methods(runs, tmp_path / "curves.png", "results-500.json"):
        assert table in page, f"paste this:\n{table}"


def comparisons(page):
    """Words after `python -m support.compare` of each command on the page that needs nothing but results/, as the shell
    expands them, without --out."""
    for block in re.findall(r"```bash\n(.*?)```", page, re.DOTALL):
        for line in block.replace("\\\n", "").splitlines():
            command, _, words = line.partition("python -m support.compare ")
            needs_more = re.search(r"SUITE|BEFORE|--film|--(before|after|runs) runs/", words)
            if command == "" and not needs_more:
                words = re.sub(r"--out \S+", "", words)
                line = ["bash", "-c", rf"printf '%s\0' {words}"]
                yield subprocess.check_output(line, cwd=ROOT, text=True).split("\0")[:-1]


def test_comparisons_print_what_their_page_says(monkeypatch, capsys):
    """Of a pair the interval (or, the other way round, its mirror image); of a table all rows, or, where the page quotes some
    numbers in its text, none: a row that differs, say because the policies came in another order, is an error."""
    from support import compare

    monkeypatch.chdir(ROOT)
    pairs, tables = 0, 0
    for path in PAGES:
        page = path.read_text(encoding="utf-8")
        text = " ".join(page.split())
        for words in comparisons(page):
            monkeypatch.setattr(sys, "argv", ["compare", *words])
            compare.main()
            printed = capsys.readouterr().out
            if words[0] == "pair":
                low, high = map(float, re.search(r"95 % from (\S+) to (\S+):", printed).groups())
                either = (f"{low:.1f} to {high:.1f}", f"{-high:.1f} to {-low:.1f}")
                assert any(interval in text for interval in either), f"{path.name} lacks {either[0]}: {words}"
                pairs += 1
                continue
            for table in printed.strip().split("\n\n"):
                rows = table.splitlines()[2:]
                missing = [row for row in rows if row not in page]
                assert not missing or missing == rows, f"{path.name}, {words}: {missing}"
                tables += not missing
    assert pairs >= 10 and tables >= 5


def test_table_of_training_on_the_test_states_is_what_the_result_files_give(tmp_path):
    from support import compare

    made = ROOT / "results" / "states" / "libero_object"
    runs = [path for name in ("rl-seed*", "rl-protocol-seed*", "start") for path in sorted(made.glob(name))]
    table = compare.tests(runs, ["results-500.json", "placements.json"], tmp_path / "states.png")
    assert table in (ROOT / "docs" / "results.md").read_text(encoding="utf-8"), f"paste this:\n{table}"


def test_table_of_more_decisions_is_what_the_result_files_give(tmp_path):
    from support import compare

    runs = [str(path) for path in sorted((ROOT / "results" / "libero_object").glob("long-seed*"))]
    table = compare.along(runs, ["sampled.json", "greedy.json"], tmp_path / "along.png")
    assert table in (ROOT / "docs" / "results.md").read_text(encoding="utf-8"), f"paste this:\n{table}"


@pytest.mark.parametrize(
    ("results", "rows"), [("results/states", "SFT VLA-RL gain seeds episodes"), ("results", "VLA-RL gain")]
)
def test_tables_of_libero_pro_are_what_the_result_files_give(results, rows):
    from support import compare

    changes = ["", "_lan", "_swap", "_object", "_task", "_task_told", "_told"]
    names = ["libero_object" + change for change in changes]
    head, line, *body = compare.suites(ROOT / results, evaluation="results.json", names=names).splitlines()
    table = [head.replace("libero_object_", "_"), line]  # shortened, so that the page shows all columns
    table += [row for row in body if row.split()[1] in rows.split()]
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert "\n".join(table) + "\n\n" in page, "paste this:\n" + "\n".join(table)


def test_table_of_what_the_test_states_are_is_what_bench_placements_gave():
    page, rows = (ROOT / "docs" / "results.md").read_text(encoding="utf-8"), {}
    for suite in ("libero_spatial", "libero_object", "libero_goal", "libero_10"):
        tasks = json.loads((ROOT / "results" / suite / "placements.json").read_text())["tasks"]
        for key in ("spread_states", "spread_placements", "nearest_state", "nearest_placement"):
            found = [100 * task["objects"][key] for task in tasks]
            rows.setdefault(key, []).append(f"{min(found):.2f} to {max(found):.2f}")
        found = [100 * task["fixtures"]["spread_placements"] for task in tasks if task["fixtures"]]
        rows.setdefault("fixtures", []).append(f"{min(found):.2f} to {max(found):.2f}" if found else "")
        assert all(task["fixtures"]["spread_states"] == 0 for task in tasks if task["fixtures"])
    for cells in rows.values():
        line = f"| {' | '.join(cells)} |".replace("|  |", "| |")
        assert line in page, f"no such row: {line}"


@pytest.mark.parametrize("suite", ["libero_object", "libero_spatial", "libero_goal", "libero_10"])
def test_reward_models_tables_are_what_bench_rprm_gave(suite):
    page = (ROOT / "docs" / "rprm.md").read_text(encoding="utf-8")
    measured = json.loads((ROOT / "results" / suite / "rprm.json").read_text())
    first = f"| `{suite}`, {measured['drops']} drops"
    for name in ("score", "score of the state alone", "clock"):
        row = measured["follows_the_task"][name]
        cells = [f"{row[key]:.3f}" for key in ("episode_auroc", "difference", "voc")]
        cells[-1] += f"; {row['voc_reversed']:.3f}"
        cells += [f"{row[key]:.3f}" for key in ("error", "drop_auroc")]
        line = " | ".join([first, name, *cells]) + " |"
        assert line in page, f"docs/rprm.md lacks:\n{line}"
        first = "|"

    def cells_of(start):
        (line,) = (line for line in page.splitlines() if f"| {start}" in line)
        return [cell.strip() for cell in line.split("|")]

    column, score = cells_of("measured on").index(f"`{suite}`"), measured["follows_the_task"]["score"]
    low, high = score["episode_auroc_95"]
    separation = f"{score['episode_auroc']:.3f} ({low:.2f} to {high:.2f})"
    assert cells_of("**AUROC of the episode's mean score")[column] == separation
    same_task = cells_of("AUROC of the mean score against failures of the same task")[column]
    assert same_task == f"{score['same_task_auroc']:.3f}"


def test_table_of_policies_that_the_reward_model_ordered_is_what_bench_rprm_gave():
    from scipy.stats import kendalltau

    page, folder = (ROOT / "docs" / "rprm.md").read_text(encoding="utf-8"), ROOT / "results" / "libero_object"
    made = json.loads((folder / "rprm-checkpoints.json").read_text())
    tests = [folder / "long-seed0" / f"{at:06d}" / "sampled.json" for at in range(0, 101, 20)]
    tested = [json.loads(path.read_text())["total"]["success_rate"] for path in tests]
    start, *others = made["policies"]
    assert start == "checkpoints/libero_object/policy"
    assert others == [f"runs/long-seed0/policy-{path.parent.name}" for path in tests[1:]]
    rows = [
        ["success, % of these 50", *(f"{100 * rate:.0f}" for rate in made["policies"].values()), ""],
        ["success, % of 200 test episodes", *(f"{100 * rate:.1f}" for rate in tested), ""],
    ]
    for label, row in (
        ("mean score", "score"),
        ("mean score of the state alone", "score of the state alone"),
        ("clock", "clock"),
    ):
        means = [of_policy[row] for of_policy in made["mean_values"].values()]
        own, of_tests = kendalltau(means, list(made["policies"].values()))[0], kendalltau(means, tested)[0]
        assert own == pytest.approx(made["kendall_tau"][row], abs=1e-9)
        rows.append([label, *(f"{value:.3f}" for value in means), f"{own:.2f}; {of_tests:.2f}"])
    for cells in rows:
        line = f"| {' | '.join(cells)} |".replace("|  |", "| |")
        assert line in page, f"docs/rprm.md lacks:\n{line}"
    row = made["follows_the_task"]["score"]
    low, high = row["episode_auroc_95"]
    text = " ".join(page.split())
    assert f"In these {made['episodes']} episodes, {made['successes']} of them successes," in text
    separation = f"episode AUROC {row['episode_auroc']:.3f}, {low:.2f} to {high:.2f}"
    assert f"({separation}; {row['same_task_auroc']:.3f} against failures of the same task)" in text


def test_requirements_pin_mujoco():
    requirements = (ROOT / "requirements.txt").read_text()
    assert re.search(r"^mujoco==3\.3\.2\b", requirements, re.MULTILINE)
    assert "3.3.2" in readme()
    for line in requirements.splitlines():
        requirement = line.split("#")[0].strip()
        assert not requirement or "==" in requirement, f"requirements.txt does not pin {requirement}"


def test_debian_packages_are_those_of_the_code():
    from support import machine

    assert machine.DEBIAN_PACKAGES in readme()


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(renew_links(page.read_text(encoding="utf-8")), encoding="utf-8")
