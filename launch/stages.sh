#!/usr/bin/env bash
# Submit all stages to Slurm, each a job that waits for the previous one: launch/stages.sh SIZE [overrides]
#
#   launch/stages.sh 8b ar.init_from=checkpoints/Ministral-3-8B-Base-2512 \
#       data.tokenizer=checkpoints/Ministral-3-8B-Base-2512 data.train=tokens/train data.heldout=tokens/heldout \
#       sft.data.train=tokens/chats sft.data.heldout=null drafter.data=prompts.jsonl drafter.responses.source=greedy
#   launch/stages.sh quickstart            # at toy size, with the text and start checkpoint of `make quickstart`
#   launch/stages.sh --dry-run 8b ...      # print the sbatch commands
#
# The stages: AR, joint, SFT (experiments nld_<SIZE>_ar and so on), export of the instruct checkpoint, its draft adapter.
# Overrides are for the three training stages; those that begin with ar., joint., sft. or drafter. are for that stage only.
# Prints "<stage> <job id>" per job. A job that is requeued (time limit, preemption) keeps its id, and the next one keeps
# waiting; if one fails, the later ones are cancelled. Submitted again, finished stages take a minute each.
#
#   STAGE_OPTIONS    sbatch options of the training stages, such as "--nodes=16 --partition=h100"
#   EXPORT_OPTIONS   sbatch options of the export (default: one task without GPU)
#   DRAFTER_OPTIONS  sbatch options of the drafter (default: one node)
#   EXPORT           folder to export to (default: exports/nld_<SIZE>)
#   CONTAINER_IMAGE, CONTAINER_MOUNTS and the other variables of launch/slurm.sbatch apply to all jobs.
set -euo pipefail
REPOSITORY=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

: "${STAGE_OPTIONS:=}"
: "${EXPORT_OPTIONS:=--nodes=1 --ntasks-per-node=1 --gpus-per-node=0 --cpus-per-task=8 --mem=96G --time=4:00:00}"
: "${DRAFTER_OPTIONS:=--nodes=1}"
: "${PYTHON:=$([ -x "$REPOSITORY/.venv/bin/python" ] && echo "$REPOSITORY/.venv/bin/python" || echo python3)}"
export PYTHONPATH="$REPOSITORY${PYTHONPATH:+:$PYTHONPATH}"

fail() { echo "error: $*" >&2; exit 2; }
usage() { sed -n '2,/^set /{/^#/!d; s/^# \{0,1\}//; p}' "${BASH_SOURCE[0]}"; }

dry_run=false
while [[ ${1:-} = -* ]]; do
  case $1 in
    --dry-run) dry_run=true ;;
    -h | --help) usage; exit 0 ;;
    *) fail "unknown option $1 (--help shows all)" ;;
  esac
  shift
done
[ $# -gt 0 ] || fail "give a size: launch/stages.sh 3b|8b|14b|quickstart [overrides] (--help shows more)"
size=$1 prefix=nld_$1
[ "$size" != quickstart ] || prefix=quickstart
shift
: "${EXPORT:=exports/$prefix}"
drafter_base=run.name=${prefix}_drafter
[ "$size" != quickstart ] || drafter_base=experiment=quickstart

select_overrides() { # print the overrides of stage $1: its own and, unless it is the drafter, those without a prefix
  local stage=$1 word
  shift
  for word in "$@"; do
    case $word in
      "$stage".*) printf '%s\0' "${word#"$stage".}" ;;
      ar.* | joint.* | sft.* | drafter.*) ;;
      *) [ "$stage" = drafter ] || printf '%s\0' "$word" ;;
    esac
  done
}

mapfile -d '' -t ar < <(printf '%s\0' "experiment=${prefix}_ar" && select_overrides ar "$@")
mapfile -d '' -t joint < <(printf '%s\0' "experiment=${prefix}_joint" && select_overrides joint "$@")
mapfile -d '' -t sft < <(printf '%s\0' "experiment=${prefix}_sft" && select_overrides sft "$@")
mapfile -d '' -t drafter < <(printf '%s\0' "$drafter_base" "checkpoint=$EXPORT" &&
  select_overrides drafter "$@")

run_dir() { # stage, module, overrides: report mistakes now, not when the stage's turn comes
  "$PYTHON" -m launch.run_dir "${@:2}" || fail "nothing was submitted; the message above is about stage $1"
}
run_dir ar pretrain.train "${ar[@]}" >/dev/null
run_dir joint pretrain.train "${joint[@]}" >/dev/null
sft_dir=$(run_dir sft pretrain.train "${sft[@]}") || exit 2
run_dir drafter lora.train "${drafter[@]}" >/dev/null

previous=
submit() { # stage, variables for the job, sbatch's options, arguments of the job
  local stage=$1 variables=$2 options=$3 job command
  shift 3
  command=(sbatch --parsable --job-name="${prefix}_$stage" --export="ALL,REPOSITORY=$REPOSITORY,$variables")
  [ -z "$previous" ] || command+=(--dependency="afterok:$previous" --kill-on-invalid-dep=yes)
  # shellcheck disable=SC2206 # several options in one variable
  command+=($options "$REPOSITORY/launch/slurm.sbatch" "$@")
  if $dry_run; then
    printf '%q ' "${command[@]}"
    echo
    previous="JOB_OF_$stage"
    return
  fi
  job=$("${command[@]}") || fail "sbatch refused the job of stage $stage"
  previous=${job%%;*} # ";cluster" follows on federated clusters
  echo "$stage $previous"
}

submit ar MODULE=pretrain.train "$STAGE_OPTIONS" "${ar[@]}"
submit joint MODULE=pretrain.train "$STAGE_OPTIONS" "${joint[@]}"
submit sft MODULE=pretrain.train "$STAGE_OPTIONS" "${sft[@]}"
if [ -e "$EXPORT/config.json" ]; then
  echo "export: $EXPORT exists and is left unchanged" >&2
else
  submit export "MODULE=model.convert,LOG_DIR=$sft_dir/logs_of_export" "$EXPORT_OPTIONS" --from "$sft_dir" --to "$EXPORT"
fi
submit drafter MODULE=lora.train "$DRAFTER_OPTIONS" "${drafter[@]}"
