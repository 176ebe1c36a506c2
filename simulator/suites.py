"""LIBERO's suites: their tasks, sentences and step limits."""

from libero.libero import benchmark

from support.errors import UserError

# Policy steps per episode in LIBERO's evaluation protocol (control steps at 20 Hz, the 10 settling steps not counted).
MAX_STEPS = {
    "libero_spatial": 220,
    "libero_object": 280,
    "libero_goal": 300,
    "libero_10": 520,
    "libero_90": 400,
}
SUITES = tuple(MAX_STEPS)


def base_suite(suite):
    """The original suite behind a LIBERO-PRO perturbation (`libero_object_swap` -> `libero_object`)."""
    for name in SUITES:
        if suite == name or suite.startswith(name + "_"):
            return name
    raise UserError(
        f"unknown suite {suite!r}: choose one of {', '.join(SUITES)} (or a LIBERO-PRO variant of one)"
    )


def max_steps(suite):
    """Step limit of the suite's evaluation protocol, in control steps."""
    return MAX_STEPS[base_suite(suite)]


def get_suite(suite):
    """LIBERO's benchmark object for a suite name; UserError for an unknown one."""
    base_suite(suite)
    try:
        return benchmark.get_benchmark(suite)()
    except (KeyError, AttributeError):
        known = (
            sorted(benchmark.get_benchmark_dict())
            if hasattr(benchmark, "get_benchmark_dict")
            else list(SUITES)
        )
        raise UserError(f"unknown suite {suite!r}: choose one of {', '.join(known)}") from None


def num_tasks(suite):
    return get_suite(suite).n_tasks


def instructions(suite):
    """The language instruction of every task of a suite, in task order."""
    bench = get_suite(suite)
    return [bench.get_task(i).language for i in range(bench.n_tasks)]


def check_task_ids(suite, task_ids):
    """Return `task_ids` (all tasks when None) or raise UserError naming the valid range."""
    n = num_tasks(suite)
    task_ids = list(range(n)) if task_ids is None else list(task_ids)
    bad = [t for t in task_ids if not 0 <= t < n]
    if bad or not task_ids:
        raise UserError(
            f"task id {bad[0] if bad else '(none)'} is not in {suite}: valid ids are 0 to {n - 1}"
        )
    if len(set(task_ids)) < len(task_ids):
        raise UserError(f"task ids {','.join(map(str, task_ids))}: name each task once")
    return task_ids


def num_init_states(suite, task_id):
    """How many initial states of the evaluation protocol a task has: 50 in the standard suites, fewer or none in others."""
    try:
        return len(get_suite(suite).get_task_init_states(task_id))
    except FileNotFoundError:
        return 0
