"""The sentence of a task, its initial states, and what a foreign or incomplete LIBERO is told."""

import pytest
from libero.libero import benchmark

from simulator import suites
from support.errors import UserError

pytestmark = pytest.mark.libero

LANGUAGE_SUITES = {
    f"libero_{base}_{kind}" for base in ("spatial", "object", "goal", "10") for kind in ("lan", "task")
}


def known_suites():
    """Every suite of the package that one of the five stock suites is the base of."""
    bases = tuple(f"{name}_" for name in suites.SUITES)
    return [name for name in benchmark.get_benchmark_dict() if f"{name}_".startswith(bases)]


def test_the_sentence_is_the_file_names_except_in_the_suites_about_language():
    own = set()
    for suite in known_suites():
        tasks = suites.get_suite(suite).tasks
        sentences = suites.instructions(suite)
        assert len(sentences) == len(tasks)
        if sentences != [suites.file_name_sentence(task.name) for task in tasks]:
            own.add(suite)
    assert own == LANGUAGE_SUITES


def test_sentences_of_stock_suites_are_liberos():
    for suite in suites.SUITES:
        assert suites.instructions(suite) == [task.language for task in suites.get_suite(suite).tasks]
    assert suites.instructions("libero_object")[0] == "pick up the alphabet soup and place it in the basket"
    # no "KITCHEN SCENE3"
    assert "turn on the stove and put the moka pot on it" in suites.instructions("libero_10")


@pytest.mark.parametrize(
    "suite, task_id, sentence",
    [
        ("libero_object_lan", 0, "grab alphabet soup and put it into basket"),
        ("libero_object_task", 0, "pick the cream cheese and place it in the basket"),
        ("libero_object_swap", 0, "pick up the alphabet soup and place it in the basket"),
        ("libero_object_object", 0, "pick up the alphabet soup and place it in the basket"),
    ],
)
def test_sentences_of_perturbed_suites(suite, task_id, sentence):
    assert suites.instructions(suite)[task_id] == sentence


@pytest.mark.parametrize(
    "name, sentence",
    [
        ("KITCHEN_SCENE10_put_the_bowl_in_it", "put the bowl in it"),
        ("LIVING_ROOM_SCENE2_pick_up_the_milk_demo.hdf5", "pick up the milk"),
        ("data/pick_up_the_milk.bddl", "pick up the milk"),
        ("turn_on_the_stove", "turn on the stove"),
    ],
)
def test_sentence_of_a_file_name(name, sentence):
    assert suites.file_name_sentence(name) == sentence


def test_files_and_sentences_find_their_task():
    name = suites.get_suite("libero_object").get_task(3).name
    assert suites.task_of_file("libero_object", f"/some/where/{name}_demo.hdf5") == 3
    assert suites.task_of_file("libero_goal", f"{name}_demo.hdf5") is None
    for suite in ("libero_object", "libero_spatial", "libero_goal", "libero_10"):
        for task_id, sentence in enumerate(suites.instructions(suite)):
            assert suites.task_of_sentence(suite, sentence) == task_id
    # Official files hold the BDDL's sentence. Quotes, capitals and line ends are how some tools write it.
    assert (
        suites.task_of_sentence("libero_object", '"Pick the alphabet soup\n and place it in the basket"') == 0
    )
    assert suites.task_of_sentence("libero_object", "open the drawer") is None


def test_number_of_initial_states_is_the_packages():
    counts = {
        suite: {suites.num_init_states(suite, i) for i in range(suites.num_tasks(suite))}
        for suite in known_suites()
    }
    assert all(counts[suite] == {50} for suite in suites.SUITES)
    # and libero_10_with_milk, some of whose tasks have none
    assert sum(count == {10} for count in counts.values()) == 16 - 1
    assert counts["libero_10_with_milk"] == {0, 10}
    assert counts["libero_object_with_trigger"] == {0}


def test_a_suite_whose_tasks_the_package_does_not_have_is_refused_at_once():
    """LIBERO's register names it, but the package lacks the files: every command's first check says so."""
    assert "libero_goal_env" in known_suites() and suites.num_tasks("libero_goal_env") == 10
    with pytest.raises(UserError, match="libero_goal_env task 3 has no BDDL file: .*does not exist"):
        suites.check_task_ids("libero_goal_env", [3])


@pytest.mark.parametrize(
    "config, words",
    [
        ("assets: /nonexistent/assets", "assets are not at /nonexistent/assets"),
        ("bddl_files: /nonexistent/bddl", "bddl_files are not at /nonexistent/bddl"),
        ("init_states: {here}", "no initial states of libero_object task 0"),
        ("bddl_files: {here}", "libero_object task 0 has no BDDL file"),
        ("- a list", "cannot read LIBERO's paths"),
        ("assets: [", "cannot read LIBERO's paths"),
    ],
)
def test_paths_of_another_libero_are_named_at_once(tmp_path, monkeypatch, config, words):
    (tmp_path / "config.yaml").write_text(config.format(here=tmp_path))
    monkeypatch.setenv("LIBERO_CONFIG_PATH", str(tmp_path))
    with pytest.raises(UserError, match=words) as caught:
        suites.num_init_states("libero_object", 0)
        suites.bddl_path("libero_object", 0)
    assert str(tmp_path / "config.yaml") in str(caught.value)
