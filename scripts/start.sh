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

DEMOS=${DEMOS:-60}       # demonstrations per task
SFT=${SFT:-}             # flags of sft.py, such as "--steps 14000"
ROLLOUTS=${ROLLOUTS:-100} # episodes per task that the policy plays for the reward model to learn from

has() { [ -e "$1" ] && echo "have $1"; }
mkdir -p "$WORK"

# 1. Demonstrations, by the scripted experts. Into another name first: a directory that is there is complete.
has "$WORK/data/$SUITE" || {
  $PY demos.py --suite "$SUITE" --num-demos "$DEMOS" --out "$WORK/data.part"
  mkdir -p "$WORK/data"
  mv "$WORK/data.part/$SUITE" "$WORK/data/$SUITE"
}

# 2. Imitation. While training.pt is there, the training is not done.
if [ -e "$policy/training.pt" ]; then
  $PY sft.py --resume "$policy"
else
  # shellcheck disable=SC2086  # SFT holds several flags
  has "$policy/config.json" || $PY sft.py --suite "$SUITE" --data "$WORK/data" --out "$policy" $SFT
fi

# 3. The policy's own successes and failures, beside the demonstrations what the reward model learns from.
has "$WORK/rollouts" || {
  $PY reward_model.py record --suite "$SUITE" --policy "$policy" --out "$WORK/rollouts.part" \
    --episodes-per-task "$ROLLOUTS" --seed 1
  mv "$WORK/rollouts.part" "$WORK/rollouts"
}

# 4. The reward model.
has "$rprm/rprm.json" || {
  own=() # there may be none of a kind
  [ -d "$WORK/rollouts/success" ] && own+=(--successes "$WORK/rollouts/success")
  [ -d "$WORK/rollouts/failure" ] && own+=(--failures "$WORK/rollouts/failure")
  $PY reward_model.py train --suite "$SUITE" --demos "$WORK/data/$SUITE" ${own[@]+"${own[@]}"} --policy "$policy" --out "$rprm"
}
