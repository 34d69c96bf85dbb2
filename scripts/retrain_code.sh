#!/usr/bin/env bash
# From a StarCoder2 to a power-retention model of code, in one command: shards, conversion, retraining, evaluation.
#
#   scripts/retrain_code.sh TEXT OUT [options of `power-retention retrain`]
#
#   scripts/retrain_code.sh python.jsonl powercoder                                   # bigcode/starcoder2-3b, all GPUs here
#   MODEL=bigcode/starcoder2-7b GPUS=8 scripts/retrain_code.sh code/ out --steps 30000 --batch 64 --recompute
#
# TEXT is what `power-retention data` takes: files, a folder, a dataset.  Stopped at any moment, the same command goes on.
# MODEL, GPUS (0: none), FILL_IN (share of the documents with their middle last), TEXT_FIELD, QUESTIONS (a file for
# `evaluate --generated`) and HUMANEVAL=1 (runs what models write: in a container) are taken from the environment.
set -euo pipefail

if (($# < 2)); then
  sed -n '2,12s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
text=$1 out=$2
shift 2
model=${MODEL:-bigcode/starcoder2-3b}
gpus=${GPUS:-$(nvidia-smi --list-gpus 2>/dev/null | wc -l)}
field=${TEXT_FIELD:-text}

power-retention data build "$text" --tokenizer "$model" --text-field "$field" --fill-in "${FILL_IN:-0.5}" --out "$out/shards"

if [[ ! -f $out/converted/config.json ]]; then
  own=()
  [[ -e $text ]] && own=(--text "$text" --text-field "$field")
  power-retention convert "$model" "$out/converted" "${own[@]}"
fi

if [[ ! -f $out/retrained/config.json ]]; then
  launch=(power-retention)
  ((gpus > 1)) && launch=(torchrun --nproc-per-node "$gpus" -m power_retention.cli)
  "${launch[@]}" retrain "$out/converted" "$out/retrained" --data "$out/shards" --resume "$@"
fi

asked=()
[[ -e $text ]] && asked+=(--text "$text" --text-field "$field" --contexts "" --prompt "def is_prime(n):")
[[ -n ${QUESTIONS:-} ]] && asked+=(--generated "$QUESTIONS")
[[ -n ${HUMANEVAL:-} ]] && asked+=(--tasks humaneval,mbpp --run-code)
((${#asked[@]})) && power-retention evaluate "$out/retrained" "${asked[@]}"
