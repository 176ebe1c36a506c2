#!/usr/bin/env bash
# Experiments that docs/results.md does not have yet, each with its seeds.
#
#   scripts/evidence.sh [EXPERIMENT ...]        default: table2 states budget pro, in this order
#
#   table2    the paper's Table 2: all parts, and without one of them each (6 methods x 3 seeds)
#   states    training on the 50 states of the test against training on random placements, tested on both (3 more runs)
#   budget    five times the decisions (2 seeds)
#   pro       start and trained policy on LIBERO-PRO's variants of the suite
#
# SUITE=libero_object (others keep theirs in results/SUITE) and SEEDS="0 1 2" are environment variables. What is small of
# each run goes to results/EXPERIMENT/RUN, the rest stays in runs/evidence. A run takes half an hour on 2 cores. What is
# there is skipped, what was interrupted goes on.
set -euo pipefail
cd "$(dirname "$0")/.."
PY=${PY:-.venv/bin/python}
SUITE=${SUITE:-libero_object}
SEEDS=${SEEDS:-0 1 2}
WORK=${WORK:-runs/evidence}
RESULTS=${RESULTS:-results}
[ "$SUITE" = libero_object ] || RESULTS=$RESULTS/$SUITE
EPISODES=${EPISODES:-20} # test episodes per task at the end
FLAGS=${FLAGS:-}         # more flags of every training

# evaluate SUITE POLICY DIRECTORY FLAGS
evaluate() {
  local suite=$1 policy=$2 out=$3
  shift 3
  [ -e "$out/results.json" ] || $PY eval.py --suite "$suite" --checkpoint "$policy" --out "$out" \
    --episodes-per-task "$EPISODES" --num-envs 16 "$@"
}

# learn EXPERIMENT METHOD SEED FLAGS: one training, its policy on the test states, and what is small of both in RESULTS.
learn() {
  local name=$1/$2-seed$3 run=$WORK/$SUITE/$1/$2-seed$3 seed=$3
  shift 3
  runs+=("$RESULTS/$name")
  if [ ! -e "$RESULTS/$name/results.json" ]; then
    if [ -e "$run/policy/config.json" ]; then
      echo "have $run/policy"
    elif [ -e "$run/config.json" ]; then
      $PY train.py --resume "$run"
    else
      # shellcheck disable=SC2086  # FLAGS holds several
      $PY train.py --suite "$SUITE" --seed "$seed" --start-episodes 0 --eval-every 40 --final-episodes 0 --video-every 0 \
        --out "$run" "$@" $FLAGS
    fi
    evaluate "$SUITE" "$run/policy" "$run/test" --seed "$seed"
    mkdir -p "$RESULTS/$name"
    cp "$run/config.json" "$run/metrics.jsonl" "$RESULTS/$name"
    cp "$run/test/results.json" "$RESULTS/$name"
  fi
}

# compare NAME FLAGS: figure and table of all `runs`.
compare() {
  local name=$1
  shift
  $PY -m support.report compare --runs "$(IFS=, && echo "${runs[*]}")" --out "$RESULTS/$name.png" "$@" | tee "$RESULTS/$name.md"
}

table2() {
  runs=()
  for seed in $SEEDS; do
    learn table2 full "$seed"
    learn table2 no-rprm "$seed" --prm-mode none
    learn table2 no-curriculum "$seed" --curriculum uniform
    learn table2 cooler "$seed" --temperature 0.4 # two thirds, as 1.0 is of 1.5
    learn table2 no-warmup "$seed" --critic-warmup 0
    learn table2 lr-x10 "$seed" --lr 0.01
  done
  compare table2
}

# Both policies on LIBERO's states and on 500 random placements that nobody trained on.
states() {
  runs=()
  for seed in $SEEDS; do
    learn table2 full "$seed"
    learn states protocol "$seed" --init-states protocol
    for run in table2/full states/protocol; do
      policy=$WORK/$SUITE/$run-seed$seed/policy
      EPISODES=50 evaluate "$SUITE" "$policy" "$RESULTS/$run-seed$seed/states" --seed "$seed"
      EPISODES=50 evaluate "$SUITE" "$policy" "$RESULTS/$run-seed$seed/placements" --seed "$seed" --fresh
    done
  done
  compare states --results states/results.json
  compare states-placements --results placements/results.json
}

budget() {
  runs=()
  for seed in 0 1; do
    learn budget five-times "$seed" --total-steps 204800
  done
  compare budget
}

pro() {
  learn table2 full 0
  for change in lan task object swap; do
    for policy in "checkpoints/$SUITE/policy" "$WORK/$SUITE/table2/full-seed0/policy"; do
      which=$([[ $policy = checkpoints/* ]] && echo start || echo trained)
      evaluate "${SUITE}_$change" "$policy" "$RESULTS/pro/$change-$which"
    done
  done
}

for experiment in "${@:-table2 states budget pro}"; do
  for name in $experiment; do
    declare -F "$name" >/dev/null || { echo "error: no experiment $name: choose among table2 states budget pro" >&2; exit 2; }
    runs=()
    "$name"
  done
done
