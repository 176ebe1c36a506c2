"""Shared by all tests."""

import os
import signal

# One thread each, in this process and in every child: `make test` runs two tests at a time, on 2 cores. Before torch is imported.
os.environ["OMP_NUM_THREADS"] = "1"

import support  # noqa: F401  before torch and MuJoCo are: it sets the environment variables that they read once

# A shell starts background jobs with Ctrl-C ignored, and every child inherits that: tests that send SIGINT to a process of
# theirs would wait forever under `make test &`. With a handler of our own, children start with the default again.
signal.signal(signal.SIGINT, signal.default_int_handler)
