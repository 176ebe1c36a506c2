#!/usr/bin/env bash
# Experiments with their seeds; docs/results.md says which of them were run.
#
#   scripts/evidence.sh [EXPERIMENT ...]        default: suites table2 states budget pro, in this order
#
#   suites    Table 1: start policy and default training on the four suites (3 seeds each, 500 test episodes each)
#   table2    Table 2: all parts, and without one of them each (7 methods x 3 seeds)
#   states    training on the 50 states of the test against training on random placements, tested on both (3 more runs)
#   budget    204,800 decisions, two and a half times the default, and checkpoints of it sampled and greedily (2 seeds)
#   pro       start policy and default training on LIBERO-PRO's variants of the suite, and told another sentence
#
# SUITES (of suites; default: all four), SUITE=libero_object (of the other experiments), SEEDS (default: 0 1 2; of budget 0 1),
# METHODS (of table2; default: all seven; the first is what the others are compared with), EPISODES, RESULTS and, for a quick try,
# TASKS and FLAGS (give RESULTS too then) are environment variables. What is small of each run goes to RESULTS/SUITE/METHOD-seedS
# (default: results), the rest stays in WORK (runs/evidence/RESULTS). A run takes an hour on 2 cores, of budget two and a half.
# What is there is skipped, what was interrupted goes on.
set -euo pipefail
cd "$(dirname "$0")/.."
PY=${PY:-.venv/bin/python}
SUITES=${SUITES:-libero_spatial libero_object libero_goal libero_10}
SUITE=${SUITE:-libero_object}
SEEDS=${SEEDS:-}
RESULTS=${RESULTS:-results}
WORK=${WORK:-runs/evidence/$RESULTS} # of its own for each RESULTS, whose policies are others
EPISODES=${EPISODES:-} # test episodes per task at the end, instead of 50 or 20
TASKS=${TASKS:-}       # tasks to train on and to evaluate, as in 0,1,2, instead of all ten
FLAGS=${FLAGS:-}       # more flags of every training

IFS=, read -ra tasks <<<"${TASKS:-0,1,2,3,4,5,6,7,8,9}"
only=(${TASKS:+--task-ids "$TASKS"})
# What an evaluation is called: results.json, and with EPISODES, as in results-500.json, how many it has.
named() { echo "results${EPISODES:+-$((${#tasks[@]} * EPISODES))}"; }

# evaluate SUITE POLICY DIRECTORY FLAGS
evaluate() {
  local suite=$1 policy=$2 out=$3
  shift 3
  [ -e "$out/results.json" ] || $PY eval.py --suite "$suite" --checkpoint "$policy" --out "$out" \
    --episodes-per-task "${EPISODES:-20}" --num-envs 16 "${only[@]}" "$@"
}

# keep FILE: a table from stdin, shown, and in FILE where there is one: an error leaves the earlier file as it was.
keep() {
  local table
  table=$(cat)
  [ -z "$table" ] || echo "$table" | tee "$1"
}

# lost DIRECTORY RUN: neither WORK nor RESULTS has the weights that are to be evaluated.
lost() {
  echo "error: $1 has no adapter, so its policy is gone: train it anew with another RESULTS, or move $2 away" >&2
  exit 1
}

# policy METHOD SEED FLAGS: one training, to WORK. What is small of it goes to RESULTS, with the policy's LoRA adapter,
# from which the policy is made again where WORK is gone.
policy() {
  local run=$WORK/$SUITE/$1-seed$2 small=$RESULTS/$SUITE/$1-seed$2 seed=$2
  shift 2
  if [ -e "$run/policy/config.json" ]; then
    echo "have $run/policy"
  elif [ -e "$small/config.json" ]; then
    [ -e "$small/adapter" ] || lost "$small" "$small"
    $PY -m models.merge --adapter "$small/adapter" --base "checkpoints/$SUITE/policy" --out "$run/policy"
  elif [ -e "$run/config.json" ]; then
    $PY train.py --resume "$run"
  else
    # shellcheck disable=SC2086  # FLAGS holds several
    $PY train.py --suite "$SUITE" --seed "$seed" --start-episodes 0 --eval-every 0 --final-episodes 0 --video-every 0 \
      --out "$run" "${only[@]}" "$@" $FLAGS
  fi
  if [ ! -e "$small/config.json" ]; then
    local checkpoints=("$run"/checkpoints/[0-9]*)
    mkdir -p "$small/adapter"
    cp "${checkpoints[-1]}/adapters/policy/"* "$small/adapter"
    cp "$run/metrics.jsonl" "$small"
    cp "$run/config.json" "$small" # last: where it is, the others are
  fi
}

# learn METHOD SEED FLAGS: the same, and its policy on the test states.
learn() {
  local run=$WORK/$SUITE/$1-seed$2 small=$RESULTS/$SUITE/$1-seed$2 result
  result=$(named)
  runs+=("$small")
  if [ ! -e "$small/$result.json" ]; then
    policy "$@"
    evaluate "$SUITE" "$run/policy" "$run/$result" --seed "$2"
    cp "$run/$result/results.json" "$small/$result.json"
  fi
}

# start NAME FLAGS: the start policy's evaluation of that name.
start() {
  local small=$RESULTS/$SUITE/start
  if [ ! -e "$small/$1.json" ]; then
    evaluate "$SUITE" "checkpoints/$SUITE/policy" "$WORK/$SUITE/start/$1" "${@:2}"
    mkdir -p "$small"
    cp "$WORK/$SUITE/start/$1/results.json" "$small/$1.json"
  fi
}

# compare NAME: figure and table of all `runs`.
compare() {
  $PY -m support.compare methods --runs "$(IFS=, && echo "${runs[*]}")" --results "$(named).json" \
    --out "$RESULTS/$SUITE/$1.png" | keep "$RESULTS/$SUITE/$1.md"
}

suites() {
  local EPISODES=${EPISODES:-50} SUITE result
  result=$(named).json
  for SUITE in $SUITES; do
    start "$(named)"
    for seed in ${SEEDS:-0 1 2}; do learn rl "$seed"; done
  done
  $PY -m support.compare suites --results "$RESULTS" --evaluation "$result" --out "$RESULTS/suites.png" |
    keep "$RESULTS/suites.md"
}

table2() {
  local method methods all='rl no-rprm no-curriculum eq4 cooler no-warmup lr-x10'
  local -A flags=(
    [rl]=''
    [no-rprm]='--prm-mode none'
    [no-curriculum]='--curriculum uniform'
    [eq4]='--curriculum eq4' # as printed
    [cooler]='--temperature 0.4' # two thirds, as 1.0 is of 1.5
    [no-warmup]='--critic-warmup 0'
    [lr-x10]='--lr 0.005'
  )
  methods=${METHODS:-$all}
  for method in $methods; do
    [ -v "flags[$method]" ] || { echo "error: no method $method: choose among $all" >&2; exit 2; }
  done
  for seed in ${SEEDS:-0 1 2}; do
    # shellcheck disable=SC2086  # several flags
    for method in $methods; do learn "$method" "$seed" ${flags[$method]}; done
  done
  compare table2
}

# A policy on LIBERO's states, as any, and on 500 random placements that nobody trained on.
on_both() {
  local run=$WORK/$SUITE/$1-seed$2 small=$RESULTS/$SUITE/$1-seed$2
  learn "$@"
  if [ ! -e "$small/placements.json" ]; then
    policy "$@"
    evaluate "$SUITE" "$run/policy" "$run/placements" --seed "$2" --fresh
    cp "$run/placements/results.json" "$small/placements.json"
  fi
}

states() {
  local EPISODES=${EPISODES:-50}
  for seed in ${SEEDS:-0 1 2}; do
    on_both rl "$seed"
    on_both rl-protocol "$seed" --init-states protocol
  done
  start "$(named)"
  start placements --fresh
  runs+=("$RESULTS/$SUITE/start")
  $PY -m support.compare tests --runs "$(IFS=, && echo "${runs[*]}")" --results "$(named).json,placements.json" \
    --out "$RESULTS/$SUITE/states.png" | keep "$RESULTS/$SUITE/states.md"
}

# Two and a half times the default, and along the way the checkpoints of every fifth of it, sampled and greedily, on the first 20
# test states of each task.
budget() {
  local EPISODES=${EPISODES:-50} seed run small iterations fifth at made mode policy greedy long=()
  for seed in ${SEEDS:-0 1}; do
    learn rl "$seed"
    learn long "$seed" --total-steps 204800 --keep 100
    run=$WORK/$SUITE/long-seed$seed small=$RESULTS/$SUITE/long-seed$seed
    long+=("$small")
    iterations=$(wc -l <"$small/metrics.jsonl")
    for fifth in 0 1 2 3 4 5; do
      at=$(printf '%06d' $((fifth * iterations / 5)))
      policy=checkpoints/$SUITE/policy
      if [ "$at" != 000000 ]; then
        policy=$run/policy-$at
        if [ ! -e "$small/$at/adapter" ] && [ -e "$run/checkpoints/$at" ]; then
          mkdir -p "$small/$at"
          cp -r "$run/checkpoints/$at/adapters/policy" "$small/$at/adapter"
        fi
      fi
      for mode in sampled greedy; do
        made=$small/$at/$mode.json greedy=()
        [ "$mode" = sampled ] || greedy=(--temperature 0)
        [ ! -e "$made" ] || continue
        if [ ! -e "$policy" ]; then
          [ -e "$small/$at/adapter" ] || lost "$small/$at" "$small"
          $PY -m models.merge --adapter "$small/$at/adapter" --base "checkpoints/$SUITE/policy" --out "$policy"
        fi
        EPISODES=$((EPISODES < 20 ? EPISODES : 20)) evaluate "$SUITE" "$policy" "$run/$at-$mode" --seed "$seed" "${greedy[@]}"
        mkdir -p "$small/$at"
        cp "$run/$at-$mode/results.json" "$made"
      done
    done
  done
  compare budget
  $PY -m support.compare along --runs "$(IFS=, && echo "${long[*]}")" --results sampled.json,greedy.json \
    --out "$RESULTS/$SUITE/along.png" | keep "$RESULTS/$SUITE/along.md"
}

# LIBERO-PRO's variants of SUITE, and SUITE and its _task told other sentences: TOLD lists for every task the stock task whose
# sentence fits the goal of _task. So _task_told has the right sentence, in stock words, and _told the wrong one.
pro() {
  local columns='' change name checkpoint made result
  result=$(named)
  case $SUITE in
    libero_object) : "${TOLD:=1,0,5,4,7,3,9,6,2,8}" ;;
    libero_spatial) : "${TOLD:=1,6,8,9,9,3,7,9,1,7}" ;; # where the second bowl stands, which is the goal of _task
  esac
  : "${TOLD:?is to list, for every task of $SUITE, the stock task whose sentence fits the goal of ${SUITE}_task}"
  for name in start $(printf 'rl-seed%s ' ${SEEDS:-0 1 2}); do
    seed=${name#rl-seed} checkpoint=$WORK/$SUITE/$name/policy
    [ "$name" != start ] || { seed=0 checkpoint=checkpoints/$SUITE/policy; }
    for change in "" _lan _swap _object _task _task_told _told; do
      made=$RESULTS/$SUITE$change/$name/$result.json
      [ ! -e "$made" ] || continue
      [ "$name" = start ] || policy rl "$seed"
      mkdir -p "${made%/*}"
      if [[ $change = *_told ]]; then
        $PY -m bench sentence --suite "$SUITE${change%_told}" --checkpoint "$checkpoint" --told "$TOLD" \
          --episodes-per-task "${EPISODES:-20}" --seed "$seed" --out "$made" "${only[@]}"
      else
        evaluate "$SUITE$change" "$checkpoint" "$WORK/$SUITE$change/$name-$result" --seed "$seed"
        cp "$WORK/$SUITE$change/$name-$result/results.json" "$made"
      fi
    done
  done
  for change in "" _lan _swap _object _task _task_told _told; do columns+=,$SUITE$change; done
  $PY -m support.compare suites --results "$RESULTS" --evaluation "$result.json" --suites "${columns:1}" |
    keep "$RESULTS/$SUITE/pro.md"
}

all='suites table2 states budget pro'
for experiment in "${@:-$all}"; do
  for name in $experiment; do
    [[ " $all " = *" $name "* ]] || { echo "error: no experiment $name: choose among $all" >&2; exit 2; }
    runs=()
    "$name"
  done
done
