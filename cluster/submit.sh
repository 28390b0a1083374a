#!/usr/bin/env bash
# Submits `rexrag train` to a Ray cluster as a job, follows its log, and exits 1 where the job fails.
#
#   cluster/submit.sh RECIPE.toml --run-dir /absolute/shared/path [more words of rexrag train]
#
#   RECIPE.toml                a file of this checkout (uploaded with it), or an absolute path on shared storage
#   RAY_ADDRESS                the cluster's job server, such as http://head:8265 (default: the one of this machine)
#   RAY_AUTH_TOKEN_PATH        file with the cluster's token (default: ~/.ray/auth_token), or RAY_AUTH_TOKEN itself
#   RAY_JOB_STOP_WAIT_TIME_S   seconds from a stop's SIGTERM to its SIGKILL (default 600)
#
# The job's id follows from the run folder: giving the command again while the job runs is refused, afterwards it
# goes on with the run.
set -euo pipefail

die() {
  printf 'error: %s\n' "$1" >&2
  exit 2
}

[[ $# -gt 0 && $1 != -* ]] || die "no recipe; usage: $0 RECIPE.toml --run-dir /absolute/shared/path [words of rexrag train]"

words=("$@")
run_dir=""
for ((i = 1; i < $#; i++)); do
  case ${words[i]} in
    --run-dir) run_dir=${words[i + 1]:-} ;;
    --run-dir=*) run_dir=${words[i]#--run-dir=} ;;
  esac
done
[[ $run_dir == /* ]] ||
  die "--run-dir = ${run_dir:-(not given)}: must be an absolute path on storage that all nodes share and that outlives the job; name one, such as --run-dir /shared/runs/first."

checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
recipe=$1
if [[ -f $recipe ]]; then
  recipe=$(realpath -- "$recipe")
  recipe=${recipe#"$checkout"/}
elif [[ $recipe != /* ]]; then
  die "RECIPE = $recipe: no such file here; name a file of $checkout, or an absolute path on shared storage."
fi

stop_wait_s=${RAY_JOB_STOP_WAIT_TIME_S:-600}
[[ $stop_wait_s =~ ^[0-9]+$ ]] || die "RAY_JOB_STOP_WAIT_TIME_S = $stop_wait_s: must be whole seconds, such as 600."

export RAY_AUTH_MODE=${RAY_AUTH_MODE:-token}
PATH=$PATH:$checkout/.venv/bin
command -v ray >/dev/null || die "ray is not on PATH: install rexrag (make quickstart), or activate its environment."

id=rexrag${run_dir%/}
id=${id//[^A-Za-z0-9_-]/-}
# An ended job makes room for the next one of its run; Ray keeps a running one, and refuses the submission below.
ray job delete "$id" >/dev/null 2>&1 || true
exec ray job submit \
  --submission-id "$id" \
  --working-dir "$checkout" \
  --runtime-env-json "{\"excludes\": [\"/runs/\", \"/.venv/\", \"/.git\"], \"env_vars\": {\"RAY_JOB_STOP_WAIT_TIME_S\": \"$stop_wait_s\"}}" \
  -- python -m rexrag train "$recipe" "${@:2}"
