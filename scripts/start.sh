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
STRAYED=${STRAYED:-0}    # more of them per task in which the imitation policy acts half of the time (DAgger); it learns on from both
SFT2=${SFT2:-}           # flags of that second training
ROLLOUTS=${ROLLOUTS:-100} # episodes per task that the policy plays for the reward model to learn from

has() { [ -e "$1" ] && echo "have $1"; }
mkdir -p "$WORK"

# 1. Demonstrations, by the scripted experts. Into another name first: a directory that is there is complete.
has "$WORK/data/$SUITE" || {
  $PY demos.py --suite "$SUITE" --num-demos "$DEMOS" --out "$WORK/data.part"
  mkdir -p "$WORK/data"
  mv "$WORK/data.part/$SUITE" "$WORK/data/$SUITE"
}

# imitate OUT FLAGS: one training of sft.py. While training.pt is there, it is not done.
imitate() {
  if [ -e "$1/training.pt" ]; then
    $PY sft.py --resume "$1"
  else
    has "$1/config.json" || $PY sft.py --suite "$SUITE" --out "$@"
  fi
}

# 2. Imitation. With STRAYED a first policy shows where it strays to, and a second one learns on from both kinds.
# shellcheck disable=SC2086  # SFT and SFT2 hold several flags
if [ "$STRAYED" = 0 ]; then
  imitate "$policy" --data "$WORK/data" $SFT
else
  imitate "$WORK/first" --data "$WORK/data" $SFT
  has "$WORK/both/$SUITE" || {
    $PY demos.py --suite "$SUITE" --num-demos "$STRAYED" --policy "$WORK/first" --seed 1 --out "$WORK/both.part"
    ln -sf "$(realpath "$WORK/data/$SUITE")"/*.hdf5 "$WORK/both.part/$SUITE"
    mkdir -p "$WORK/both"
    mv "$WORK/both.part/$SUITE" "$WORK/both/$SUITE"
  }
  imitate "$policy" --data "$WORK/both" --init "$WORK/first" $SFT2
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
