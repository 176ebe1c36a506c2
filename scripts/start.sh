#!/usr/bin/env bash
# What reinforcement learning on a suite starts from, from nothing: an imitation policy, and a reward model (RPRM).
#
#   scripts/start.sh [SUITE] [DIRECTORY] [WORK]         `make start SUITE=libero_spatial` is the same
#
# DIRECTORY/policy and DIRECTORY/rprm (default: checkpoints/SUITE, where train.py looks) are what it makes; demonstrations and
# recorded rollouts stay in WORK (default: runs/start/SUITE). Each step is skipped where its result is there, and a training
# that was interrupted goes on, so the same command continues where it stopped.
set -euo pipefail
cd "$(dirname "$0")/.."
SUITE=${1:-libero_object}
DIRECTORY=${2:-checkpoints/$SUITE}
WORK=${3:-runs/start/$SUITE}
PY=${PY:-.venv/bin/python}
policy=$DIRECTORY/policy rprm=$DIRECTORY/rprm

# Demonstrations per task; how they are disturbed (some tasks of libero_goal and libero_10 do not survive demos.py's default);
# and the policy that imitation starts from, which already knows how to look and to move.
case $SUITE in
libero_object) DEMOS=${DEMOS:-60} NOISE=${NOISE:-} INIT=${INIT-} ;;
libero_spatial) DEMOS=${DEMOS:-100} NOISE=${NOISE:-} INIT=${INIT-checkpoints/libero_object/policy} ;;
libero_goal) DEMOS=${DEMOS:-75} NOISE=${NOISE:---noise 0.15 --kick 0.03} INIT=${INIT-checkpoints/libero_spatial/policy} ;;
*) # ten scenes and more, and tasks in two parts: longer
  DEMOS=${DEMOS:-100} NOISE=${NOISE:---noise 0.15 --kick 0.03} INIT=${INIT-checkpoints/libero_goal/policy}
  SFT=${SFT:---steps 32000 --held-out 0.03}
  ;;
esac
SFT=${SFT:-}              # more flags of sft.py, such as "--steps 14000"
ROLLOUTS=${ROLLOUTS:-100} # episodes per task that the policy plays for the reward model to learn from
TASKS=${TASKS:-}          # tasks, as in 0,1,2, instead of all of the suite
only=(${TASKS:+--task-ids "$TASKS"})

has() { [ -e "$1" ] && echo "have $1"; }
has "$policy/config.json" && has "$rprm/rprm.json" && exit
mkdir -p "$WORK"

# 1. Demonstrations, by the scripted experts. Into another name first: a directory that is there is complete.
has "$WORK/data/$SUITE" || {
  # shellcheck disable=SC2086  # NOISE and SFT hold several flags
  $PY demos.py --suite "$SUITE" ${only[@]+"${only[@]}"} --num-demos "$DEMOS" $NOISE --out "$WORK/data.part"
  mkdir -p "$WORK/data"
  mv "$WORK/data.part/$SUITE" "$WORK/data/$SUITE"
}

# 2. Imitation. While training.pt is there, it is not done.
has "$policy/config.json" || {
  made=$WORK/imitation
  if [ -e "$made/training.pt" ]; then
    $PY sft.py --resume "$made"
  elif ! has "$made/config.json"; then
    # shellcheck disable=SC2086
    $PY sft.py --suite "$SUITE" --data "$WORK/data" ${INIT:+--init "$INIT"} $SFT --out "$made"
  fi
  mkdir -p "$DIRECTORY"
  rm -rf "$policy.part"
  cp -r "$made" "$policy.part"
  mv "$policy.part" "$policy"
}

# 3. The policy's own successes and failures, beside the demonstrations what the reward model learns from.
has "$rprm/rprm.json" || has "$WORK/rollouts" || {
  rm -rf "$WORK/rollouts.part"
  $PY -m scripts.rprm record --suite "$SUITE" --policy "$policy" --out "$WORK/rollouts.part" \
    ${only[@]+"${only[@]}"} --episodes-per-task "$ROLLOUTS" --seed 1
  mv "$WORK/rollouts.part" "$WORK/rollouts"
}

# 4. The reward model.
has "$rprm/rprm.json" || {
  own=() # there may be none of a kind
  [ -d "$WORK/rollouts/success" ] && own+=(--successes "$WORK/rollouts/success")
  [ -d "$WORK/rollouts/failure" ] && own+=(--failures "$WORK/rollouts/failure")
  $PY -m scripts.rprm train --suite "$SUITE" --demos "$WORK/data/$SUITE" ${own[@]+"${own[@]}"} --policy "$policy" --out "$rprm"
}
