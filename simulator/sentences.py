"""What a recorded sentence means: files hold a task's BDDL sentence or its file name's, policies are told the suite's own."""

import functools
import sys

from simulator.suites import base_suite, file_name_sentence, instructions, task_of_file, task_of_sentence
from support.errors import UserError


def sentence_of(suite, file, said):
    """The sentence that a policy is told for a file of demonstrations which calls its task `said` (None: nothing): that of the
    task of `suite` which the file belongs to, by its name or by what it says.

    Data that is not LIBERO's (no such suite) keeps its own sentences.
    """
    said = said or file_name_sentence(file)
    try:
        base_suite(suite)
    except UserError:
        return said
    task = task_of_file(suite, file)
    return _sentence_in(suite, said) if task is None else instructions(suite)[task]


@functools.cache
def _sentence_in(suite, said):
    """One that no task of the suite has stays as it is, and is named on stderr, once: as a rule, it is data of another suite."""
    task = task_of_sentence(suite, said)
    if task is None:
        print(f"warning: {said!r} in the data is the sentence of no task of {suite}", file=sys.stderr)
        return said
    return instructions(suite)[task]
