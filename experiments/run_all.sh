#!/usr/bin/env bash
# Run every experiment (or those named as arguments) and keep its results beside its README; goes on where it was stopped.
#   experiments/run_all.sh [NAME ...]
# Settings: OUTPUT (default outputs), PYTHON (default python), ARGUMENTS (passed on to every run: "debug=limit logger=none").
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python} output=${OUTPUT:-outputs}
names=("$@")
if [ ${#names[@]} -eq 0 ]; then
  for yaml in configs/experiment/*.yaml; do
    if [ ! -d outputs/real ] && grep -q outputs/real "$yaml"; then
      echo "$yaml is left out: it needs real weights, python -m experiments.real.fetch" >&2
    else
      names+=("$(basename "$yaml" .yaml)")
    fi
  done
fi
for name in "${names[@]}"; do
  echo "== $name"
  questions=""
  if [ "$name" = ablation_groupsize ]; then questions="data.scenes=250"; fi # as the other experiments with claims
  # shellcheck disable=SC2086
  "$python" -m ivtp.run "experiment=$name" "output=$output" $questions ${ARGUMENTS:-} || { echo "$name failed" >&2; exit 1; }
done
"$python" experiments/collect.py "$output" "${names[@]}"
