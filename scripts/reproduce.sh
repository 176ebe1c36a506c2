#!/usr/bin/env bash
# Every result in README from nothing: demonstrations, imitation policy, reward model, three seeds of RL, evaluations.
# On 2 CPU cores about 20 minutes of demonstrations, 25 of SFT, 25 for RPRM and 45 per RL run. Results land in $OUT.
# Each step is skipped where its result is already there, so the script goes on where it stopped.
set -euo pipefail
cd "$(dirname "$0")/.."
SUITE=${SUITE:-libero_object}
OUT=${OUT:-runs/reproduce}
PY=${PY:-.venv/bin/python}
policy=$OUT/policy rprm=$OUT/rprm
mkdir -p "$OUT"

done_already() { [ -e "$1" ] && echo "have $1"; }

done_already "$OUT/expert.txt" || { $PY demos.py --suite "$SUITE" --check | tee "$OUT/expert.tmp"; mv "$OUT/expert.tmp" "$OUT/expert.txt"; }
done_already "$OUT/data/$SUITE" || { $PY demos.py --suite "$SUITE" --out "$OUT/data.tmp"; mv "$OUT/data.tmp" "$OUT/data"; }
done_already "$policy/config.json" || $PY sft.py --suite "$SUITE" --data "$OUT/data" --out "$policy"
done_already "$OUT/rollouts" || {
  $PY reward_model.py record --suite "$SUITE" --policy "$policy" --out "$OUT/rollouts.tmp" --seed 1
  mv "$OUT/rollouts.tmp" "$OUT/rollouts"
}
done_already "$rprm/rprm.json" ||
  $PY reward_model.py train --suite "$SUITE" --demos "$OUT/data/$SUITE" --successes "$OUT/rollouts/success" \
    --failures "$OUT/rollouts/failure" --policy "$policy" --out "$rprm"
done_already "$OUT/rprm-checks.json" ||
  $PY -m bench rprm --suite "$SUITE" --policy "$policy" --rprm "$rprm" --episodes-per-task 10 --seed 2 --out "$OUT/rprm-checks.json"
for temperature in 1.0 0.6 0.0; do # eval.py continues by itself where it stopped
  $PY eval.py --suite "$SUITE" --checkpoint "$policy" --temperature $temperature --out "$OUT/eval-start-$temperature"
done
for mode in potential none; do # with and without RPRM: Table 2, first row, at the tiny size
  for seed in 0 1 2; do
    run=$OUT/rl-$mode-seed$seed
    done_already "$run/results.json" && continue
    if [ -d "$run/checkpoints" ]; then $PY train.py --resume "$run"; else
      $PY train.py --suite "$SUITE" --model "$policy" --reward-model "$rprm" --prm-mode $mode --seed $seed --out "$run"
    fi
  done
done
$PY -m support.report --runs "$(printf '%s,' "$OUT"/rl-{potential,none}-seed{0,1,2} | sed 's/,$//')" --out "$OUT/success.png" | tee "$OUT/success.md"
