#!/usr/bin/env bash
# Start one rank: `launch/rank.sh MODULE [arguments]`. srun runs it per task, launch/torchrun.py per process.
#
#   LOG_DIR=folder      output of every rank but rank 0 goes to LOG_DIR/rank_<r>.log; the launcher copies rank 0's output
#                       to LOG_DIR/rank_0.log
#   PYTHON=interpreter  default: the repository's .venv, else python3
#
# The module replaces this shell, so that signals reach it and exit statuses are its own. A signal that arrives before the
# module handles it ends the rank; launchers read that as "start again" too.
set -euo pipefail
REPOSITORY=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

fail() { # a user error, after which the launchers never start again
  echo "error: $*" >&2
  exit 2
}

read_slurm() { # translate Slurm's variables for rank, world size and endpoint to those of torch.distributed
  local name missing=()
  for name in SLURM_JOB_ID SLURM_PROCID SLURM_LOCALID SLURM_NTASKS; do
    [ -n "${!name:-}" ] || missing+=("$name")
  done
  [ ${#missing[@]} -eq 0 ] || fail "${missing[*]} not set: this rank was started neither by srun nor by" \
    "launch/torchrun.py. Use sbatch launch/slurm.sbatch, or launch/local.sh without Slurm"
  export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
  if [ -z "${MASTER_ADDR:-}" ]; then # rank 0 is on the first node; slurm.sbatch exports its name, a bare srun does not
    command -v scontrol >/dev/null || fail "MASTER_ADDR not set, and scontrol, which knows it, is not installed: give the host of rank 0"
    read -r MASTER_ADDR < <(scontrol show hostnames "${SLURM_STEP_NODELIST:-${SLURM_JOB_NODELIST:-}}") ||
      fail "MASTER_ADDR not set, and Slurm lists no nodes: give the host of rank 0"
  fi
  # The same on all ranks, different for jobs that share a node, and below the ports that systems hand out themselves.
  export MASTER_ADDR MASTER_PORT=${MASTER_PORT:-$((15000 + SLURM_JOB_ID % 15000))}
}

[ $# -gt 0 ] || fail "usage: launch/rank.sh MODULE [arguments]"
[ -n "${TORCHELASTIC_RUN_ID:-}" ] || read_slurm
export PYTHONPATH="$REPOSITORY${PYTHONPATH:+:$PYTHONPATH}"
PYTHON=${PYTHON:-$([ -x "$REPOSITORY/.venv/bin/python" ] && echo "$REPOSITORY/.venv/bin/python" || echo python3)}
command -v "$PYTHON" >/dev/null || fail "no interpreter $PYTHON: run make setup, or give PYTHON=..."

if [ -n "${LOG_DIR:-}" ] && [ "$RANK" != 0 ]; then
  mkdir -p "$LOG_DIR"
  exec >>"$LOG_DIR/rank_$RANK.log" 2>&1
  echo "== $(date '+%F %T') rank $RANK of $WORLD_SIZE on $(hostname)${SLURM_JOB_ID:+, job $SLURM_JOB_ID}: $*"
fi

# Ranks of torchrun are sessions of their own: without this they would go on training when their launcher is killed.
guard=()
[ -z "${TORCHELASTIC_RUN_ID:-}" ] || ! setpriv --pdeathsig KILL true 2>/dev/null || guard=(setpriv --pdeathsig KILL)
exec ${guard[@]+"${guard[@]}"} "$PYTHON" -u -m "$@"
