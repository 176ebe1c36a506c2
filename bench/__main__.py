"""`python -m bench NAME`: the measurements that README and docs quote. A table on the terminal, the numbers as JSON."""

import importlib
import json
import sys
import time

from bench.common import machine
from support.cli import parse_args
from support.errors import main_guard
from support.files import atomic_write

# bench/NAME.py, which is imported only when its command runs.
COMMANDS = {
    "envs": "LIBERO environments: stock against ours, and what workers add",
    "pictures": "light pictures against exact ones: PSNR and time, every task of four suites",
    "leak": "memory of the simulator processes over 1,000 episodes",
    "soak": "training while its simulator processes are killed and stopped at random",
    "scaling": "train.py on 1, 2, 4 ... ranks, and a simulation up to 64 GPUs",
    "busy": "a decision alone and beside a competing program, and two trainings side by side",
    "iteration": "where an iteration of train.py goes, part by part, and one update taken apart",
    "decode": "actions per second: batched decoding against transformers' generate",
    "update": "samples per second of a PPO update, against transformers and peft",
    "placements": "LIBERO's test states beside random placements: where things stand",
    "rprm": "a reward model in the simulator: progress, success against failure, loitering",
    "sentence": "success where each task is told the sentence of another",
    "prefix": "whether a policy reads from an action's first tokens what the picture should tell",
    "gpu": "random OpenVLA-7B: memory and times of load, rollout and update",
}


@main_guard
def main():
    name, *flags = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print("usage: python -m bench NAME [--flag value ...]     (NAME --help lists the flags)\n")
        print("\n".join(f"  {command:11s}{text}" for command, text in COMMANDS.items()))
        return
    if name not in COMMANDS:
        print(f"error: no benchmark {name!r}: choose one of {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)
    module = importlib.import_module(f"bench.{name}")
    sys.argv[0] = f"python -m bench {name}"  # what its messages call it
    args = parse_args(module.Args, COMMANDS[name], flags)
    began = time.time()
    results = {"machine": machine(), **module.measure(args)}
    results["took_s"] = time.time() - began
    atomic_write(args.out, json.dumps(results, indent=2) + "\n")  # first: `| head` may end what follows
    module.show(results)
    print(f"\n{results['took_s']:.0f} s; numbers in {args.out}")


if __name__ == "__main__":
    main()
