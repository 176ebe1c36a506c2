"""Shared by all tests."""

import signal

import support  # noqa: F401  before torch and MuJoCo are: it sets the environment variables that they read once

# A shell starts background jobs with Ctrl-C ignored, and every child inherits that: tests that send SIGINT to a process of
# theirs would wait forever under `make test &`. With a handler of our own, children start with the default again.
signal.signal(signal.SIGINT, signal.default_int_handler)
