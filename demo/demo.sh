#!/usr/bin/env bash
# The demo: `./dev demo`. Starts a platform of its own in a temporary folder, makes a git repository
# and serves it with git's own server, and has three VMs clone it and run a command at once. Then it
# removes everything and shows that nothing is left.
#
#   demo/demo.sh AETHER IMAGE_DIR [ARGS for `aether up`]
set -euo pipefail

AETHER="${1:?usage: demo.sh AETHER IMAGE_DIR}"
IMAGE_DIR="${2:?usage: demo.sh AETHER IMAGE_DIR}"
shift 2

VMS=(red green blue)
MEMORY_MB=256
READY_LIMIT_S=120
END_LIMIT_S=15

WORK="$(mktemp -d "${TMPDIR:-/tmp}/aether-demo-XXXXXX")"
DATA="$WORK/data"
TIMES="$WORK/times"
INSTANCE=""
UP_PID=""
GIT_PID=""
RESULT=1

say() { printf '==> %s\n' "$*"; }
fail() {
  printf 'demo: %s\n' "$*" >&2
  exit 1
}

# ---------------------------------------------------------------------------------------- the end

# What VMs, and the platform that runs them, take of a host. Only what is this demo's counts.
leftovers() {
  local name
  [[ -n "$INSTANCE" ]] || return 0
  pgrep -af -- "$DATA" | sed 's/^/process /' || true
  awk -v data="$DATA" 'index($2, data) == 1 { print "mount " $2 }' /proc/self/mounts
  for name in "$DATA"/vms/*; do
    [[ -e "$name" ]] && printf 'file %s\n' "$name"
  done
  # Links, namespaces and rule tables have the instance in their names.
  ip -o link show | awk -F': ' -v id="$INSTANCE" 'index($2, id) { print "link " $2 }'
  ip netns list | awk -v id="$INSTANCE" 'index($1, id) { print "namespace " $1 }'
  nft list tables | awk -v id="$INSTANCE" 'index($3, id) { print "table " $2 " " $3 }'
}

wait_for_end() {
  local pid="$1" limit=$((SECONDS + $2))
  while kill -0 "$pid" 2>/dev/null; do
    ((SECONDS < limit)) || return 1
    sleep 0.1
  done
}

stop_all() {
  local status=0
  if [[ -n "$GIT_PID" ]]; then
    kill "$GIT_PID" 2>/dev/null || true
    wait "$GIT_PID" 2>/dev/null || true
    GIT_PID=""
  fi
  if [[ -n "$UP_PID" ]]; then
    kill -TERM "$UP_PID" 2>/dev/null || true
    if ! wait_for_end "$UP_PID" "$END_LIMIT_S"; then
      printf 'demo: the platform did not end within %s s\n' "$END_LIMIT_S" >&2
      kill -KILL "$UP_PID" 2>/dev/null || true
      status=1
    fi
    wait "$UP_PID" || status=1
    UP_PID=""
  fi
  return "$status"
}

at_exit() {
  local pid
  trap '' INT TERM
  for pid in $(jobs -p); do
    [[ "$pid" == "$UP_PID" || "$pid" == "$GIT_PID" ]] || kill "$pid" 2>/dev/null || true
  done
  stop_all || RESULT=1
  if ((RESULT != 0)) && [[ -s "$WORK/up.log" ]]; then
    printf 'demo: the last lines of the platform'\''s log:\n' >&2
    tail -n 25 "$WORK/up.log" >&2
  fi
  rm -rf -- "$WORK"
  exit "$RESULT"
}
trap at_exit EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# -------------------------------------------------------------------------------------- the start

now_ms() { date +%s%3N; }

start_platform() {
  local limit=$((SECONDS + READY_LIMIT_S))
  : >"$WORK/up.out"
  "$AETHER" up --json --data-dir "$DATA" --listen 127.0.0.1:0 --image-dir "$IMAGE_DIR" --no-default-tools "$@" \
    >"$WORK/up.out" 2>"$WORK/up.log" </dev/null &
  UP_PID=$!
  until grep -q '"event":"ready"' "$WORK/up.out"; do
    kill -0 "$UP_PID" 2>/dev/null || fail "the platform ended before it was ready"
    ((SECONDS < limit)) || fail "the platform was not ready within $READY_LIMIT_S s"
    sleep 0.1
  done
  ready() { jq -r "select(.event == \"ready\") | $1" "$WORK/up.out"; }
  HOST_ADDRESS="$(ready '.host_address // empty')"
  say "the platform is ready at $(ready .url)"
  say "driver: $(ready '.drivers[0] | "\(.kind) \(.version): \(.isolation)"')"
  INSTANCE="$(ready '.network_instance // empty')"
  # Before that VMs boot, which is slower.
  until grep -q '"event":"template"' "$WORK/up.out"; do
    kill -0 "$UP_PID" 2>/dev/null || fail "the platform ended before its template was built"
    ((SECONDS < limit)) || fail "the default template was not built within $READY_LIMIT_S s"
    sleep 0.1
  done
  say "the default template is $(jq -r 'select(.event == "template") | .state' "$WORK/up.out")"
  [[ -n "$HOST_ADDRESS" && -n "$INSTANCE" ]] || fail "this driver has no network; the demo needs real VMs"
}

aether() { "$AETHER" --data-dir "$DATA" "$@"; }

# A repository with a commit for each VM, the same on every run.
make_repository() {
  local repository="$WORK/git/demo" vm number=0
  git init --quiet --initial-branch=main "$repository"
  for vm in "${VMS[@]}"; do
    number=$((number + 1))
    # shellcheck disable=SC2016 # the VM says what its kernel is
    printf '#!/bin/sh\necho "the %s VM says: commit %s of %s on $(uname -r)"\n' \
      "$vm" "$number" "${#VMS[@]}" >"$repository/say.sh"
    chmod 755 "$repository/say.sh"
    git -C "$repository" add say.sh
    GIT_AUTHOR_DATE="2026-01-0${number}T00:00:00Z" GIT_COMMITTER_DATE="2026-01-0${number}T00:00:00Z" \
      git -C "$repository" -c user.name=demo -c user.email=demo@localhost \
      commit --quiet --message "what $vm says"
    git -C "$repository" rev-parse HEAD >"$WORK/commit.$vm"
  done
  touch "$repository/.git/git-daemon-export-ok"
}

free_port() {
  local port
  for port in {9418..9517}; do
    if ! (exec 3<>"/dev/tcp/$HOST_ADDRESS/$port") 2>/dev/null; then
      printf '%s\n' "$port"
      return
    fi
  done
  return 1
}

start_git_server() {
  GIT_PORT="$(free_port)" || fail "no free port for the git server"
  git daemon --reuseaddr --listen="$HOST_ADDRESS" --port="$GIT_PORT" --base-path="$WORK/git" \
    >"$WORK/git.log" 2>&1 </dev/null &
  GIT_PID=$!
  local tries
  for tries in {1..100}; do
    git ls-remote "git://$HOST_ADDRESS:$GIT_PORT/demo" >/dev/null 2>&1 && break
    kill -0 "$GIT_PID" 2>/dev/null || fail "the git server ended: $(cat "$WORK/git.log")"
    ((tries < 100)) || fail "the git server does not answer"
    sleep 0.1
  done
  say "a git server serves the repository at git://$HOST_ADDRESS:$GIT_PORT/demo"
}

# --------------------------------------------------------------------------------------- the work

# Runs a command, its output as it comes with the VM's name before each line, and its time.
timed() {
  local vm="$1" step="$2" start
  shift 2
  start="$(now_ms)"
  "$@" 2>&1 | sed -u "s/^/[$vm] /"
  printf '%s %s %s\n' "$vm" "$step" "$(($(now_ms) - start))" >>"$TIMES"
}

run_vm() {
  local vm="$1" commit found
  commit="$(cat "$WORK/commit.$vm")"
  timed "$vm" create aether vm create --name "$vm" --memory "$MEMORY_MB" \
    --allow "$HOST_ADDRESS:$GIT_PORT"
  timed "$vm" clone aether exec -n "$vm" -- \
    git clone --quiet "git://$HOST_ADDRESS:$GIT_PORT/demo" /root/demo
  aether exec -n "$vm" -- git -C /root/demo -c advice.detachedHead=false checkout --quiet "$commit"
  found="$(aether exec -n "$vm" -- git -C /root/demo rev-parse HEAD)"
  if [[ "$found" != "$commit" ]]; then
    printf '[%s] the wrong commit is checked out: %s, not %s\n' "$vm" "$found" "$commit" >&2
    return 1
  fi
  printf '[%s] checked out %s\n' "$vm" "${commit:0:12}"
  timed "$vm" run aether exec -n --cwd /root/demo "$vm" -- ./say.sh
  timed "$vm" delete aether vm delete "$vm"
}

print_times() {
  printf '\n%-8s %10s %10s %10s %10s\n' VM create clone run delete
  local vm step
  for vm in "${VMS[@]}"; do
    printf '%-8s' "$vm"
    for step in create clone run delete; do
      awk -v vm="$vm" -v step="$step" '$1 == vm && $2 == step { printf " %8.2f s", $3 / 1000 }' "$TIMES"
    done
    printf '\n'
  done
  printf '\n'
}

main() {
  [[ $EUID -eq 0 ]] || fail "run it as root, or with sudo"
  start_platform "$@"
  make_repository
  start_git_server

  say "three VMs at once: ${VMS[*]}"
  local vm status=0 start
  local -a jobs=()
  start="$(now_ms)"
  for vm in "${VMS[@]}"; do
    run_vm "$vm" &
    jobs+=($!)
  done
  for vm in "${jobs[@]}"; do
    wait "$vm" || status=1
  done
  ((status == 0)) || fail "a VM did not do what it was to do"
  print_times
  say "all of it took $((($(now_ms) - start) / 1000)) s"

  stop_all || fail "the platform did not end well"
  local left
  left="$(leftovers)"
  [[ -z "$left" ]] || fail "left over:"$'\n'"$left"
  say "nothing is left: no process, mount, link, namespace, rule table or file"
  RESULT=0
}

main "$@"
