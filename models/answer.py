"""A model's answer, "1" or "0", as a score: what all reward models share."""

import json
import math

from support.errors import UserError


def score_of(logits, prior):
    """p("1") / (p("1") + p("0")) of answer logits (B, 2), at the rate `prior` of positives -> (B,) in [0, 1].

    Training shows both labels equally often, so the bare softmax answers for a world in which every second row leads to a
    keyframe. By Bayes' rule the odds where a share `prior` does are prior / (1 - prior) times as large (Elkan, 2001). Rows
    keep their order; sums over episodes do not. The bare softmax gives 0.6 for hovering where some rows of successes are
    positive, two thirds of what a sure keyframe gets, and a failed episode hovers for long. 0.5 leaves the softmax as it
    is.
    """
    return (logits[:, 0] - logits[:, 1] + math.log(prior / (1 - prior))).sigmoid()


def prior_of(info):
    """Share of positives among the rows that a reward model learnt from, as its rprm.json (a dict) has it; else 0.5."""
    prior = info.get("prior", 0.5)
    if not (isinstance(prior, float) and 0 < prior < 1):
        raise UserError(
            f'the reward model\'s rprm.json has "prior": {json.dumps(prior)}, which is no number between 0 and 1'
        )
    return prior


def answer_token_ids(encode):
    """Ids of the success token "1" and the no-success token "0". encode(text) -> ids of a tokenizer, [None] if it has none."""
    pieces = [encode(text) for text in ("1", "0")]
    if any(len(piece) != 1 or None in piece for piece in pieces) or pieces[0] == pieces[1]:
        raise UserError(
            f'the tokenizer does not write "1" and "0", which a reward model answers with, as one token each: {pieces}'
        )
    return [piece[0] for piece in pieces]
