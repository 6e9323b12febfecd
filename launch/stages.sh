#!/usr/bin/env bash
# The whole story under Slurm, each stage a job that waits for the one before: launch/stages.sh SIZE [overrides]
#
#   launch/stages.sh 8b ar.init_from=checkpoints/Ministral-3-8B-Base-2512 \
#       data.tokenizer=checkpoints/Ministral-3-8B-Base-2512 data.train=corpus/train data.heldout=corpus/heldout \
#       sft.data.train=tokens/chats sft.data.heldout=null drafter.data=prompts.jsonl drafter.answers.source=greedy
#   launch/stages.sh quickstart            # the toy, on what `make quickstart` has made: text and start checkpoint
#   launch/stages.sh --dry-run 8b ...      # print the sbatch commands
#
# AR, joint, SFT (experiments nld_<SIZE>_ar and so on), export of the instruct checkpoint, its draft adapter. Overrides
# are for the three training stages; those that begin with ar., joint., sft. or drafter. are for that stage alone.
# Prints "<stage> <job id>" per job. A job that is queued again (time limit, preemption) keeps its id, and the next one
# goes on waiting; where one fails, those behind it are cancelled. Started again, finished stages pass in a minute.
#
#   STAGE_OPTIONS    sbatch options of the training stages, such as "--nodes=16 --partition=h100"
#   EXPORT_OPTIONS   of the export: one task without GPU       DRAFTER_OPTIONS  of the drafter: one node
#   EXPORT           folder to export to (exports/nld_<SIZE>)
#   CONTAINER_IMAGE, CONTAINER_MOUNTS and the other variables of launch/slurm.sbatch hold for all jobs.
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
    *) fail "unknown option $1 (--help shows what there is)" ;;
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

select_overrides() { # words for stage $1: those for all training stages, unless it is the drafter, then its own
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

run_dir() { # stage, module, words: all mistakes in the overrides now, not when a stage's turn comes
  "$PYTHON" -m launch.run_dir "${@:2}" || fail "nothing was submitted; the message above is about stage $1"
}
run_dir ar pretrain.train "${ar[@]}" >/dev/null
run_dir joint pretrain.train "${joint[@]}" >/dev/null
sft_dir=$(run_dir sft pretrain.train "${sft[@]}") || exit 2
run_dir drafter lora.train "${drafter[@]}" >/dev/null

previous=
submit() { # stage, variables for the job, sbatch's options, words of the job
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
  job=$("${command[@]}") || fail "sbatch did not take the job of stage $stage"
  previous=${job%%;*} # ";cluster" follows on federated clusters
  echo "$stage $previous"
}

submit ar MODULE=pretrain.train "$STAGE_OPTIONS" "${ar[@]}"
submit joint MODULE=pretrain.train "$STAGE_OPTIONS" "${joint[@]}"
submit sft MODULE=pretrain.train "$STAGE_OPTIONS" "${sft[@]}"
if [ -e "$EXPORT/config.json" ]; then
  echo "export: $EXPORT is there already and stays as it is" >&2
else
  submit export "MODULE=model.convert,LOG_DIR=$sft_dir/logs_of_export" "$EXPORT_OPTIONS" --from "$sft_dir" --to "$EXPORT"
fi
submit drafter MODULE=lora.train "$DRAFTER_OPTIONS" "${drafter[@]}"
