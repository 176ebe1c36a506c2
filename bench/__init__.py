"""The measurements that README and docs quote: `python -m bench NAME`, one module for each.

Every module has `Args` (its flags), `measure(args)` (the numbers, as a dict of plain values) and `show(results)` (a table).
Variants of a comparison take turns, round by round, so that whatever else the machine does hits all of them; what counts
is the ratio within one run.
"""
