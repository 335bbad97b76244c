#!/usr/bin/env bash
# Lint, then the tests without network: `bash tests/run.sh [pytest options or paths from the checkout]`. Makes the environment on first use.
set -euo pipefail

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
. "$repo/.bootstrap.sh"
bootstrap test
cd "$repo"

export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1
export HF_ENDPOINT=http://127.0.0.1:9 # nobody listens there: code that forgets to be offline fails at once
export TOKENIZERS_PARALLELISM=false
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # tiny models are slower on more threads, and many tests start processes

"$env_python" -m ruff check .
"$env_python" -m ruff format --check . || fail 1 "some files are not formatted: run \`ruff format\`"
# All of them: one process a core and one more, since many tests wait for processes of their own. A few: without the
# seconds that it takes to start those.
[ $# -gt 0 ] || set -- -n "$("$env_python" -c 'import os; print(1 + (os.cpu_count() or 1))')" --dist worksteal
exec "$env_python" -m pytest "$@"
