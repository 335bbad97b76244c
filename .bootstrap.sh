# Sourced by run_clm.sh and tests/run.sh, which set `repo` (absolute) and run under `set -euo pipefail`. bash 3.2 is enough.
#
#   bootstrap [EXTRA ...]    sets env_python to a Python with all of pyproject.toml and its EXTRAs installed; exits 2 or 4 on failure
#   run_child COMMAND ...    runs COMMAND, forwarding INT, TERM, HUP and USR1 to it exactly once; sets child_code
#   count_nvidia_gpus        prints how many GPUs nvidia-smi lists and CUDA_VISIBLE_DEVICES does not hide
#
# All messages go to stderr. State is kept inside the environment: .recipe-stamp (what is installed), .recipe-making and
# .recipe-installing (started, not finished), .recipe-made (this script made it), .recipe-lock, .recipe-install.log.

say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }

fail() {
  local code=$1
  shift
  say "$*"
  exit "$code"
}

# --- children and signals -------------------------------------------------------------------------------------------------------

child='' child_code=0 pending_signal='' last_signal='' signalled='' signal_whole_group=''

deliver_signal() {
  [ -n "$child" ] && [ -n "$pending_signal" ] || return 0
  local signal=$pending_signal
  pending_signal=''
  kill -s "$signal" -- "${signal_whole_group:+-}$child" 2>/dev/null || true
}

on_signal() {
  pending_signal=$1 last_signal=$1 signalled=1
  deliver_signal
}

run_child() {
  pending_signal='' last_signal=''
  trap 'on_signal INT' INT
  trap 'on_signal TERM' TERM
  trap 'on_signal HUP' HUP   # the terminal was closed
  trap 'on_signal USR1' USR1 # Slurm's warning
  # `set -m` gives the child its own process group, so the terminal's Ctrl-C reaches it only through on_signal, not twice.
  # Without it, bash also starts background children with SIGINT ignored.
  set -m
  "$@" </dev/null &
  child=$!
  set +m
  deliver_signal
  signalled=1
  while [ -n "$signalled" ]; do # a signal interrupts `wait` before it has the child's code
    signalled='' child_code=0
    wait "$child" 2>/dev/null || child_code=$?
  done
  child=''
  trap - INT TERM HUP USR1
}

# --- which environment, which Python --------------------------------------------------------------------------------------------

choose_environment() {
  env_is_active='' env_dir=$repo/.venv
  if [ -n "${RECIPE_VENV:-}" ]; then
    case $RECIPE_VENV in /*) env_dir=$RECIPE_VENV ;; *) env_dir=$PWD/$RECIPE_VENV ;; esac
  elif [ -n "${VIRTUAL_ENV:-}" ] && [ ! "$VIRTUAL_ENV" -ef "$repo/.venv" ]; then
    if [ -x "$VIRTUAL_ENV/bin/python" ]; then
      env_is_active=1 env_dir=$VIRTUAL_ENV
    else
      say "VIRTUAL_ENV=$VIRTUAL_ENV has no bin/python: using $env_dir instead"
    fi
  elif [ -n "${CONDA_PREFIX:-}" ] && [ "${CONDA_DEFAULT_ENV:-base}" != base ] && [ -x "$CONDA_PREFIX/bin/python" ]; then
    env_is_active=1 env_dir=$CONDA_PREFIX
  fi
  env_python=$env_dir/bin/python
  log=$env_dir/.recipe-install.log
}

# Runs in any Python since 2.7, so that the error can name its version.
python_probe='
import sys
def has(name):
    try:
        __import__(name)
    except ImportError:
        return False
    return True
age = "new" if sys.version_info >= (3, 11) else "old"
maker = "venv" if has("venv") and has("ensurepip") else "virtualenv" if has("virtualenv") else "none"
print("%d.%d %s %s" % (sys.version_info[0], sys.version_info[1], age, maker))
'

# Sets base_python, base_version and base_maker (venv or virtualenv) to the first Python that can make the environment.
find_python() {
  local candidate answer age found='' without_venv=''
  if [ -n "${RECIPE_PYTHON:-}" ]; then set -- "$RECIPE_PYTHON"; else set -- python3.13 python3.12 python3.11 python3 python; fi
  for candidate; do
    answer=$("$candidate" -c "$python_probe" 2>/dev/null </dev/null) || continue
    read -r base_version age base_maker <<<"$answer"
    found="$found${found:+, }$candidate is $base_version"
    [ "$age" = new ] || continue
    base_python=$candidate
    [ "$base_maker" = none ] || return 0
    without_venv=${without_venv:-$base_version}
  done
  [ -z "$without_venv" ] || fail 2 "Python $without_venv cannot make virtual environments: install its venv module" \
    "(Debian and Ubuntu: apt install python$without_venv-venv), or activate any virtual environment first"
  fail 2 "Python 3.11 or newer is needed (${found:-none found}): install one, or set RECIPE_PYTHON=/path/to/python3"
}

require_new_python() {
  local version
  version=$("$env_python" -c 'import sys; print("%d.%d" % sys.version_info[:2]); sys.exit(sys.version_info < (3, 11))' 2>/dev/null) ||
    fail 2 "the environment $env_dir has Python ${version:-that does not start}, and 3.11 or newer is needed:" \
      "deactivate it (then one is made in $repo/.venv), or activate another one"
}

# --- the stamp: no output and no delay once all is installed ------------------------------------------------------------------------

# Includes the path of the repo: in a copied checkout, the copied environment would still import the original.
fingerprint() { printf '%s %s\n' "$(cat "$repo/pyproject.toml" "$repo/constraints.txt" | cksum)" "$repo"; }

is_installed() {
  local stamped extras extra
  [ -x "$env_python" ] && [ -f "$env_dir/.recipe-stamp" ] || return 1
  { read -r stamped && read -r extras; } <"$env_dir/.recipe-stamp" || return 1
  [ "$stamped" = "$(fingerprint)" ] || return 1
  for extra; do
    case " $extras " in *" $extra "*) ;; *) return 1 ;; esac
  done
}

write_stamp() {
  printf '%s\n: %s\n' "$(fingerprint)" "$*" >"$env_dir/.recipe-stamp.new" && mv "$env_dir/.recipe-stamp.new" "$env_dir/.recipe-stamp"
}

# --- one start at a time --------------------------------------------------------------------------------------------------------

lock_environment() {
  { mkdir -p "$env_dir" && [ -w "$env_dir" ]; } 2>/dev/null ||
    fail 2 "cannot write to $env_dir: activate a virtual environment, or set RECIPE_VENV to a writable path"
  if command -v flock >/dev/null 2>&1; then
    # Children inherit the lock: if this script is killed, the next start waits for a pip that is still running.
    exec 9>"$env_dir/.recipe-lock"
    flock -n 9 || say "another start is installing in $env_dir: waiting for it"
    until flock -n 9; do sleep 1; done
  else
    take_link_lock
  fi
}

# Without flock: a symbolic link to our process id, which is created atomically with its content.
take_link_lock() {
  local link=$env_dir/.recipe-lock.pid holder reported='' broken=''
  until ln -s "$$" "$link" 2>/dev/null && { [ -z "$broken" ] || sleep 1; } && [ "$(readlink "$link")" = "$$" ]; do
    holder=$(readlink "$link" || true)
    if [ -n "$holder" ] && ! kill -0 "$holder" 2>/dev/null; then
      # Two waiting starts may both remove a stale lock, the second one removing the first one's new lock. So the lock is
      # checked again a second later.
      broken=1
      rm -f "$link"
    else
      [ -n "$reported" ] || say "another start is installing in $env_dir: waiting for it"
      reported=1
      sleep 1
    fi
  done
  trap 'rm -f "$env_dir/.recipe-lock.pid"' EXIT
}

unlock_environment() {
  exec 9>&-
  rm -f "$env_dir/.recipe-lock.pid"
  trap - EXIT
}

# --- making and filling it ------------------------------------------------------------------------------------------------------

last_log_line() {
  local line
  line=$(grep -E '^ *(ERROR|error)' "$log" | tail -n 1) || line=$(grep -v '^ *$' "$log" | tail -n 1) || line='nothing in the log'
  if grep -qE 'NewConnectionError|NameResolutionError|ConnectTimeout|ProxyError|Network is unreachable' "$log"; then
    line="$line (the package index cannot be reached: no network?)"
  fi
  printf '%s' "$line"
}

# Signals the whole process group: pip and venv start child processes, which must not outlive them.
run_logged() {
  signal_whole_group=1
  run_child "$@" >>"$log" 2>&1
  signal_whole_group=''
  case $last_signal in
    INT) fail 130 "interrupted; the next start continues the installation" ;;
    TERM) fail 143 "interrupted; the next start continues the installation" ;;
    HUP) fail 129 "interrupted; the next start continues the installation" ;;
    USR1) fail 138 "interrupted; the next start continues the installation" ;;
  esac
  return "$child_code"
}

count_nvidia_gpus() {
  case ${CUDA_VISIBLE_DEVICES-all} in '' | -*) echo 0 && return ;; esac
  { nvidia-smi -L 2>/dev/null </dev/null || true; } | grep -c '^GPU ' || true
}

has_pip() { "$env_python" -m pip --version >/dev/null 2>&1 || "$env_python" -m ensurepip >/dev/null 2>&1; }

make_environment() {
  find_python
  : >"$env_dir/.recipe-making"
  rm -f "$env_dir/.recipe-stamp"
  find "$env_dir/" -mindepth 1 -maxdepth 1 ! -name '.recipe-*' -exec rm -rf {} +
  say "first use: making a Python $base_version environment in $env_dir (about 1-3 minutes; log: $log)"
  run_logged "$base_python" -m "$base_maker" "$env_dir" ||
    fail 4 "$base_python -m $base_maker failed: $(last_log_line) | log: $log | the next start tries again"
  : >"$env_dir/.recipe-made"
  rm -f "$env_dir/.recipe-making"
}

prepare_own_environment() {
  if [ -e "$env_dir/.recipe-making" ] || [ -z "$(find "$env_dir/" -mindepth 1 -maxdepth 1 ! -name '.recipe-*' -print)" ]; then
    make_environment
  elif [ -x "$env_python" ] && has_pip; then
    require_new_python
    say "installing what is missing in $env_dir (up to 3 minutes; log: $log)"
  elif [ -e "$env_dir/.recipe-made" ]; then
    say "the environment in $env_dir no longer works: making it again"
    make_environment
  else
    fail 2 "$env_dir exists, was not made by this script, and is not a working environment: move it away, or set RECIPE_VENV to another path"
  fi
}

prepare_active_environment() {
  has_pip || fail 2 "the active environment $env_dir has no pip: install pip in it, or deactivate it (then one is made in $repo/.venv)"
  say "the active environment $env_dir lacks $missing"
  say "installing it there; packages that pyproject.toml allows are kept (about 1-3 minutes; log: $log)"
}

# Prints the required packages (of pyproject.toml and the extras) that the environment lacks. With CONSTRAINTS, writes to it
# the lines of constraints.txt except those of packages that are already good enough: an active environment keeps its torch.
missing_packages() { # CONSTRAINTS [EXTRA ...]
  "$env_python" - "$repo" "$@" <<'PYTHON'
import re
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, version

repo, constraints, *extras = sys.argv[1:]
try:
    from packaging.requirements import Requirement
except ImportError:
    try:
        from pip._vendor.packaging.requirements import Requirement
    except ImportError:
        sys.exit(print("pip"))

def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()

def installed(name):
    try:
        return version(name)
    except PackageNotFoundError:
        return None

with open(f"{repo}/pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
lines = project["dependencies"] + [line for extra in extras for line in project["optional-dependencies"][extra]]
wanted = [Requirement(line) for line in lines]
wanted = [requirement for requirement in wanted if requirement.marker is None or requirement.marker.evaluate()]
missing = [r.name for r in wanted if installed(r.name) is None or not r.specifier.contains(installed(r.name), prereleases=True)]
print(*missing)
if constraints:
    with open(f"{repo}/constraints.txt") as file, open(constraints, "w") as kept:
        for line in file:
            name = normal(line.partition("==")[0].strip())
            if "==" in line and (name in map(normal, missing) or installed(name) is None):
                kept.write(line)
PYTHON
}

# pip writes INSTALLER after a package's last file. Metadata without it, newer than the start of our installation, belongs to
# a package whose installation was interrupted, and which pip would take as complete.
discard_half_installed() {
  local info
  [ -e "$env_dir/.recipe-installing" ] || return 0
  for info in "$env_dir"/lib/python3.*/site-packages/*.dist-info; do
    [ -f "$info/INSTALLER" ] || [ "$info" -ot "$env_dir/.recipe-installing" ] || rm -rf "$info"
  done
  rm -rf "$env_dir"/lib/python3.*/site-packages/'~'*
}

pip_install() {
  run_logged "$env_python" -m pip install --disable-pip-version-check --no-input "$@" ||
    fail 4 "pip failed: $(last_log_line) | log: $log | the next start continues"
}

has_torch() { ls "$env_dir"/lib/python3.*/site-packages/torch/version.py >/dev/null 2>&1; }

install_torch() {
  if [ -n "${TORCH_INDEX_URL:-}" ]; then
    # Its dependencies are installed with the rest: such an index rarely has the versions in constraints.txt.
    pip_install --no-deps --index-url "$TORCH_INDEX_URL" "$(grep '^torch==' "$repo/constraints.txt")"
  elif [ "$(uname -s)" = Linux ] && [ "$(count_nvidia_gpus)" = 0 ] && ! has_torch; then
    say "no NVIDIA GPU found: pip's default torch may be several GB; for the small CPU build, stop this and set TORCH_INDEX_URL (README)"
  fi
}

install_packages() { # CONSTRAINTS [EXTRA ...]
  local constraints=$1 extras
  shift
  extras=$(IFS=, && printf '%s' "$*")
  discard_half_installed
  : >"$env_dir/.recipe-installing"
  case " ${missing:-torch} " in *" torch "*) install_torch ;; esac
  pip_install -c "$constraints" -e "$repo${extras:+[$extras]}"
  rm -f "$env_dir/.recipe-installing"
}

install_environment() { # [EXTRA ...]
  local missing='' constraints=$repo/constraints.txt
  if [ -n "$env_is_active" ]; then
    require_new_python
    missing=$(missing_packages '' "$@") || fail 2 "cannot read what $env_dir has installed: deactivate it, or activate another environment"
    if [ -z "$missing" ] && [ ! -e "$env_dir/.recipe-installing" ]; then
      write_stamp "$@" 2>/dev/null || true # a read-only environment is fine: it is checked again next time
      return 0
    fi
  fi
  lock_environment
  if ! is_installed "$@"; then # another start may have installed it in the meantime
    : >"$log"
    if [ -n "$env_is_active" ]; then
      prepare_active_environment
      constraints=$env_dir/.recipe-constraints
      missing=$(missing_packages "$constraints" "$@")
    else
      prepare_own_environment
    fi
    install_packages "$constraints" "$@"
    write_stamp "$@"
    say "ready after $SECONDS s"
  fi
  unlock_environment
}

bootstrap() { # [EXTRA ...]
  choose_environment
  is_installed "$@" || install_environment "$@"
  # An active environment may contain another checkout's `recipe`, or none.
  export PYTHONPATH="$repo${PYTHONPATH:+:$PYTHONPATH}"
}
