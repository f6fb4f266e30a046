#!/usr/bin/env bash
# The first run on a GPU, without network or venv: build for it, check, time, and write a page of results.
#
#   [PY=python3] [OUT=runs/gpu] [PEERS=folder] tools/first_gpu_run.sh [--dry] [--seconds 470] [--only STEPS]
#
# docs/gpu.md says more. What this Python lacks may lie in PEERS, as `pip install --target` leaves it.
set -u
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PY=${PY:-python3}

# What went wrong before there is a Python that could say so is the page, too.
stop() {
  echo "$1" >&2
  local out=${OUT:-${root}/runs/gpu}
  mkdir -p "${out}" && printf '# First run on a GPU\n\nNothing was run: %s\n' "$1" >"${out}/summary.md"
  exit 2
}

command -v "${PY}" >/dev/null || stop "${PY} is not found: PY names a Python"
"${PY}" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
  stop "${PY} does not run, or is older than Python 3.10: PY names another"
if [[ -n ${PEERS:-} ]]; then
  [[ -d ${PEERS} ]] || stop "PEERS: ${PEERS} is no folder"
  PEERS=$(cd "${PEERS}" && pwd)
fi

export PYTHONPATH="${root}:${root}/tools:${root}/benchmarks${PEERS:+:${PEERS}}${PYTHONPATH:+:${PYTHONPATH}}"
exec "${PY}" -m lab.cuda.first_run "$@"
