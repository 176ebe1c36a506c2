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

# Demonstrations per task; and for each number in STRAYED a round of so many more in which the policy so far acts half of the
# time (DAgger), after which it learns on. libero_object needs no round.
case $SUITE in
libero_object) DEMOS=${DEMOS:-60} STRAYED=${STRAYED-} ;;
*) DEMOS=${DEMOS:-100} STRAYED=${STRAYED-25 30} ;;
esac
SFT=${SFT:-}              # flags of every training of sft.py, such as "--steps 14000"
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

# 2. Imitation, and the rounds in which the policy shows where it strays to.
has "$policy/config.json" || {
  # shellcheck disable=SC2086  # SFT holds several flags
  imitate "$WORK/policy0" --data "$WORK/data" $SFT
  round=0
  for number in $STRAYED; do
    last=$WORK/policy$round round=$((round + 1))
    has "$WORK/strayed$round" || {
      $PY demos.py --suite "$SUITE" --num-demos "$number" --policy "$last" --seed "$round" --out "$WORK/strayed.part"
      mkdir -p "$WORK/all/$SUITE"
      ln -sf "$(realpath "$WORK/data/$SUITE")"/*.hdf5 "$WORK/all/$SUITE"
      for file in "$WORK/strayed.part/$SUITE"/*_demo.hdf5; do
        mv "$file" "$WORK/all/$SUITE/$(basename "$file" _demo.hdf5)_round${round}_demo.hdf5"
      done
      mv "$WORK/strayed.part" "$WORK/strayed$round"
    }
    # shellcheck disable=SC2086
    imitate "$WORK/policy$round" --data "$WORK/all" --init "$last" $SFT
  done
  mkdir -p "$DIRECTORY"
  cp -r "$WORK/policy$round" "$policy.part"
  mv "$policy.part" "$policy"
}

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
