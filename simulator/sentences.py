"""What a recorded sentence means: files hold a task's BDDL sentence or its file name's, policies are told the suite's own."""

import functools
import sys

from simulator.suites import base_suite, instructions, task_of_sentence
from support.errors import UserError


@functools.cache
def sentence_in(suite, found):
    """The sentence in `suite` of the task that a file's sentence `found` means: the one that evaluation uses.

    One that no task of the suite has stays as it is, and is named on stderr, once: as a rule, it is data of another suite.
    Data that is not LIBERO's (no such suite) keeps its sentences.
    """
    try:
        base_suite(suite)
    except UserError:
        return found
    task = task_of_sentence(suite, found)
    if task is None:
        print(f"warning: {found!r} in the data is the sentence of no task of {suite}", file=sys.stderr)
        return found
    return instructions(suite)[task]
