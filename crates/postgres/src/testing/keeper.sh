# The parent of a server for tests: starts it, and ends it with all that it wrote when the process
# that runs the tests is gone or says so. $1 that process, $2 a folder, $3 where the programs are;
# what is left are options of initdb. Says `ready` when the server answers. SIGUSR1: start it again.
set -u
runner=$1 folder=$2 programs=$3
shift 3
data=$folder/data
watch=

start() {
  "$programs/pg_ctl" -s -w -t 60 -D "$data" -l "$folder/log" start && echo ready
}

finish() {
  [ -n "$watch" ] && kill "$watch" 2>/dev/null
  "$programs/pg_ctl" -s -m immediate -D "$data" stop 2>/dev/null
  rm -rf "$folder"
  exit 0
}

trap finish TERM
trap 'start || echo failed' USR1

"$programs/initdb" --pgdata="$data" "$@" >"$folder/log" 2>&1 || exit 1
cat "$folder/settings" >>"$data/postgresql.conf"
[ -e "$folder/pg_hba.conf" ] && cp "$folder/pg_hba.conf" "$data/pg_hba.conf"
start || exit 1

# There is no other way for a shell to await a process that is not its child. It writes nowhere:
# tail ends when nobody reads what it writes.
tail --pid="$runner" -s 0.2 -f /dev/null >/dev/null &
watch=$!
while kill -0 "$watch" 2>/dev/null; do wait "$watch"; done
watch=
finish
