#!/usr/bin/env bash
# Everything about a suite from nothing: demonstrations, imitation policy, reward model, seeds of RL with and without RPRM,
# evaluations, the curve and its table.
#
#   scripts/reproduce.sh [SUITE] [OUT]                  default: libero_object, runs/reproduce/SUITE
#
# On 2 CPU cores and libero_object about 20 minutes of demonstrations, 25 of imitation, 25 for RPRM and 60 per RL run. Each step is
# skipped where its result is there, and what was interrupted goes on, so the same command continues where it stopped.
set -euo pipefail
cd "$(dirname "$0")/.."
SUITE=${1:-libero_object}
OUT=${2:-runs/reproduce/$SUITE}
SEEDS=${SEEDS:-0 1 2}
MODES=${MODES:-potential none} # of the reward: with and without RPRM, Table 2's first row at the tiny size
export PY=${PY:-.venv/bin/python}
policy=$OUT/policy rprm=$OUT/rprm

has() { [ -e "$1" ] && echo "have $1"; }
mkdir -p "$OUT"

# The scripted experts on the test states, then policy and reward model.
has "$OUT/expert.txt" || { $PY demos.py --suite "$SUITE" --check | tee "$OUT/expert.tmp"; mv "$OUT/expert.tmp" "$OUT/expert.txt"; }
TASKS='' scripts/start.sh "$SUITE" "$OUT" "$OUT"
has "$OUT/rprm-checks.json" ||
  $PY -m bench rprm --suite "$SUITE" --policy "$policy" --rprm "$rprm" \
    --episodes-per-task 20 --seed 2 --out "$OUT/rprm-checks.json"

# The start policy, as it samples and as it acts greedily. eval.py goes on by itself where it stopped.
$PY eval.py --suite "$SUITE" --checkpoint "$policy" --out "$OUT/eval-start"
$PY eval.py --suite "$SUITE" --checkpoint "$policy" --temperature 0 --out "$OUT/eval-start-greedy"

# Reinforcement learning: each run evaluates start and trained policy on 500 test episodes.
runs=()
for mode in $MODES; do
  for seed in $SEEDS; do
    run=$OUT/rl-$mode-seed$seed
    runs+=("$run")
    has "$run/results.json" && continue
    if [ -e "$run/config.json" ]; then
      $PY train.py --resume "$run"
    else
      $PY train.py --suite "$SUITE" --model "$policy" --reward-model "$rprm" --prm-mode "$mode" --seed "$seed" \
        --final-episodes 500 --out "$run"
    fi
  done
done
$PY -m support.compare methods --runs "$(IFS=, && echo "${runs[*]}")" --out "$OUT/success.png" | tee "$OUT/success.md"
