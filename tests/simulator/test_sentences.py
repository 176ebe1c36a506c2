"""Sentences of files against those of a suite."""

from simulator.sentences import sentence_of


def test_a_file_and_its_suite_agree_on_the_sentence(capsys):
    ours = "pick up the alphabet soup and place it in the basket"
    official = "Pick the alphabet soup and place it in the basket"  # the BDDL's, in LIBERO's own files
    assert sentence_of("libero_object", "a_demo.hdf5", ours) == ours
    assert sentence_of("libero_object", "a_demo.hdf5", official) == ours
    assert capsys.readouterr().err == ""


def test_a_sentence_of_no_task_is_named_once(capsys):
    for _ in range(2):
        assert sentence_of("libero_object", "a_demo.hdf5", "sing a song") == "sing a song"
    error = capsys.readouterr().err
    assert (
        "'sing a song' in the data is the sentence of no task of libero_object" in error
        and error.count("\n") == 1
    )


def test_data_that_is_not_liberos_keeps_its_sentences(capsys):
    assert sentence_of("toy", "a_demo.hdf5", "pick up the red block") == "pick up the red block"
    assert capsys.readouterr().err == ""


def test_the_files_name_counts_before_what_it_says_and_where_it_says_nothing(capsys):
    """libero_90 has tasks of the same sentence in several scenes."""
    file = "KITCHEN_SCENE3_turn_on_the_stove_and_put_the_moka_pot_on_it_demo.hdf5"
    sentence = "turn on the stove and put the moka pot on it"
    assert sentence_of("libero_10", file, "sing a song") == sentence_of("libero_10", file, None) == sentence
    assert (
        sentence_of("toy", file, None) == sentence
        and sentence_of("toy", file, "sing a song") == "sing a song"
    )
    assert capsys.readouterr().err == ""
