"""Sentences of files against those of a suite."""

from simulator.sentences import sentence_in


def test_a_file_and_its_suite_agree_on_the_sentence(capsys):
    ours = "pick up the alphabet soup and place it in the basket"
    official = "Pick the alphabet soup and place it in the basket"  # the BDDL's, in LIBERO's own files
    assert sentence_in("libero_object", ours) == sentence_in("libero_object", official) == ours
    assert capsys.readouterr().err == ""


def test_a_sentence_of_no_task_is_named_once(capsys):
    for _ in range(2):
        assert sentence_in("libero_object", "sing a song") == "sing a song"
    error = capsys.readouterr().err
    assert (
        "'sing a song' in the data is the sentence of no task of libero_object" in error
        and error.count("\n") == 1
    )


def test_data_that_is_not_liberos_keeps_its_sentences(capsys):
    assert sentence_in("toy", "pick up the red block") == "pick up the red block"
    assert capsys.readouterr().err == ""
