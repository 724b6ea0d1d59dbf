"""The shell script that works for us inside the container, and what its answers mean.

Imports nothing of ours. It needs ``sh``, ``tar``, ``find``, ``sha256sum``, ``head``, ``tail``, ``wc``,
``tr`` and ``base64`` or ``od`` (GNU or busybox). yagna runs the commands of an activity one after
another, so a program that runs in the foreground would keep us from its files: ``begin`` and ``task``
put it in the background, and its output into files. ``watch`` waits a little and answers what is new
since what the requestor has: pieces of the output, and an archive of results. An answer may get lost
on its way, so each command can be sent again and then does or says the same. Of the output folder only
files and folders are archived; what else is in it is told of on stderr. The program's words are
arguments here and never looked at by a shell.
"""

from __future__ import annotations

import base64
import posixpath
from dataclasses import dataclass

BASE = "/golem/work"
"""Where everything is in the container: a volume of the image, as yagna can only transfer to those."""

HELPER = f"{BASE}/cpodfs.sh"
INCOMING = f"{BASE}/cpodfs.in"
OUTGOING = f"{BASE}/cpodfs.out"
SLICED = f"{BASE}/cpodfs.log"
ALWAYS, IF_WELL = "always", "well"
"""When `watch` archives results: each time, or only after the program's success."""
PIECES_BYTES = 192 << 10
"""Of output in one answer."""
ARCHIVE_BYTES = 48 << 10
"""Of the archive in an answer; a larger one is to be fetched."""
_NUMBER_CHARS = 20

SCRIPT = r"""#!/bin/sh
# cpodfs.sh COMMAND ...: see cpodfs/runs/provider_script.py
base=${0%/*}
cd "$base" || exit 90
base=$(pwd)
state=$base/cpodfs.state
nap() { sleep 0.1 2>/dev/null || sleep 1; }
now() {  # tenths of a second, in $tenths; not every date knows more than seconds
    if read -r tenths idle < /proc/uptime; then
        idle=${tenths#*.}
        tenths=$(( ${tenths%.*} * 10 + ${idle%?} ))
    else
        tenths=$(( $(date +%s) * 10 ))
    fi 2>/dev/null
}
hash() { set -- $(sha256sum < "$1"); echo "$1"; }
gone() { ! kill -0 "$1" 2>/dev/null || grep -q ") Z " "/proc/$1/stat" 2>/dev/null; }

check() {
    [ "$(hash cpodfs.in)" = "$1" ] || { echo "what was sent did not arrive whole" >&2; exit 91; }
}

setup() {  # HASH OUTPUT: unpack what was sent, forget what was there before
    [ ! -e "$state/set.$1" ] || return 0
    check "$1"
    rm -rf pod "$state"
    mkdir -p "$state" "pod/$2" || exit 92
    tar -xf cpodfs.in -C pod || exit 93
    : > "$state/never"; touch -t 197001010000 "$state/never"
    : > "$state/set.$1"
}

become() {  # WORDS: the program, or say as users expect why not
    case $1 in
        */*) [ -f "$1" ] && [ ! -x "$1" ] || [ -d "$1" ] && {
            echo "cpodfs: $1: not an executable file" >&2; exit 126; };;
    esac
    command -v "$1" >/dev/null 2>&1 || {
        echo "cpodfs: $1: not found on the provider" >&2; exit 127; }
    # exec knows no builtins and no functions: "exit" or "eval" is a program here, or missing.
    exec "$@"
}

begin() {  # KEY WORDS: run the program in the background, once for each key
    [ ! -e "$state/begun.$1" ] || return 0
    rm -f "$state/out" "$state/err" "$state/exit" "$state/told" "$state"/since.*
    : > "$state/out"; : > "$state/err"; cp -p "$state/never" "$state/since.0"
    : > "$state/begun.$1"
    shift; cd pod || exit 94
    ( ( become "$@" ) </dev/null >>"$state/out" 2>>"$state/err"
      echo $? > "$state/exit.new"; mv "$state/exit.new" "$state/exit" ) </dev/null >/dev/null 2>&1 &
    echo $! > "$state/pid"
}

task() {  # KEY HASH PATH OUTPUT WORDS: put the file there, begin with an empty output folder
    [ ! -e "$state/begun.$1" ] || return 0
    check "$2"
    rm -rf "pod/$4"; mkdir -p "pod/$4" || exit 92
    case $3 in */*) [ -d "pod/${3%/*}" ] || mkdir -p "pod/${3%/*}" || exit 92;; esac
    mv -f cpodfs.in "pod/$3" || exit 93
    key=$1; shift 4
    begin "$key" "$@"
}

mourn() {  # whoever was to write down the program's end may have been killed with it
    [ -e "$state/pid" ] && [ ! -e "$state/exit" ] || return 0
    read -r pid < "$state/pid"
    if gone "$pid" && [ ! -e "$state/exit" ]; then
        echo "cpodfs: the program was killed" >> "$state/err"
        echo 137 > "$state/exit"
    fi
}

encode() {
    if command -v base64 >/dev/null 2>&1; then
        printf b; base64 | tr -d '\n'
    else
        printf x; od -An -v -tx1 | tr -d ' \n'
    fi
}

size() { echo $(( $(wc -c < "$state/$1") )); }
from() { tail -c "+$(($2 + 1))" "$state/$1" | head -c "$3"; }  # NAME AT LENGTH

piece() {  # NAME AT: say what NAME has from there on, as much as there is room for; the rest is $left
    left=$(( $(size "$1") - $2 ))
    take=$left
    [ "$take" -le "$room" ] || take=$room
    [ "$take" -gt 0 ] || return 0
    room=$((room - take)); left=$((left - take))
    echo "$1 $2 $take $(from "$1" "$2" "$take" | encode)"
}

slice() {  # OUT_AT OUT_LENGTH ERR_AT ERR_LENGTH: put these pieces where they can be fetched
    { from out "$1" "$2"; from err "$3" "$4"; } > cpodfs.log
}

watch() {  # TENTHS OUT_AT ERR_AT PACKED OUTPUT WHEN: wait so long or until the end, say what is new
    now
    end=$((tenths + $1))
    while mourn; [ ! -e "$state/exit" ]; do
        now
        [ "$tenths" -lt "$end" ] && [ $(( $(size out) - $2 )) -lt @PIECES@ ] || break
        nap
    done
    done=-; [ -e "$state/exit" ] && done=$(cat "$state/exit")
    room=@PIECES@
    piece out "$2"; outs=$left
    piece err "$3"; errs=$left
    case $6$done in
        well-|well[1-9]*) : > "$state/list";;
        *) pack "$4" "$5";;
    esac
    if [ -s "$state/list" ]; then
        bytes=$(( $(wc -c < cpodfs.out) ))
        inside=; [ "$bytes" -gt @ARCHIVE@ ] || inside=$(encode < cpodfs.out)
        echo "cpodfs $done $outs $errs $bytes $(hash cpodfs.out) $inside"
    else
        echo "cpodfs $done $outs $errs 0 -"
    fi
}

archive() {  # OUTPUT TEST ...: files and folders in it that pass; 0 or 1: all that was there is in
    out=$1; shift
    cd pod || exit 94
    rm -f "$base/cpodfs.out" "$state/failed"
    if tar --version 2>/dev/null | grep -q GNU; then
        find "./$out" \( -type f -o -type d \) "$@" -print0 > "$state/list" 2> "$state/tar"
        # A program that goes on may have renamed what was there a moment ago: that comes the next time.
        lenient=; [ "$done" = - ] && lenient=--ignore-failed-read
        tar --null --no-recursion $lenient -cf "$base/cpodfs.out" -T "$state/list" 2>> "$state/tar"
    else
        # Not every busybox has a tar that takes a list of names.
        rm -rf "$state/stage"; mkdir -p "$state/stage/$out"; : > "$state/list"
        find "./$out" \( -type f -o -type d \) "$@" -exec sh "$base/${0##*/}" stage {} + \
            2> "$state/tar"
        tar -cf "$base/cpodfs.out" -C "$state/stage" "./$out" 2>> "$state/tar" ||
            : > "$state/failed"
        rm -rf "$state/stage"
        [ ! -e "$state/failed" ] || return 2
    fi
}

stage() {  # NAME ...: copy these where tar takes all
    cd pod || exit 94
    echo some >> "$state/list"
    for name; do
        if [ -d "$name" ]; then
            mkdir -p "$state/stage/$name"
        else
            mkdir -p "$state/stage/${name%/*}"
            cp "$name" "$state/stage/$name" || [ ! -e "$name" ] || : > "$state/failed"
        fi
    done
}

tell() {  # OUTPUT: what went wrong, what was left out; a link may lead anywhere, a pod has no devices
    head -n 20 "$state/tar"
    cd pod || exit 94
    find "./$1" ! -type f ! -type d > "$state/left" 2>/dev/null
    head -n 20 "$state/left" | while IFS= read -r name; do
        printf 'cpodfs: %s: not a file or a folder, so it is not brought\n' "${name#./}"
    done
    more=$(( $(wc -l < "$state/left") - 20 ))
    [ "$more" -le 0 ] || echo "cpodfs: $1: $more more are not brought either"
}

pack() {  # PACKED OUTPUT: archive what is new in it since so many archives
    : > "$state/since.$(($1 + 1))"
    # File times are coarse: only what is written from now on is surely newer than that.
    [ "$done" = - ] && nap
    # The time of change tells more: -newer does not see a file that came with an old date.
    by=-cnewer since=$state/since.$1
    find "$state/never" -cnewer "$state/never" >/dev/null 2>&1 || by=-newer
    [ "$by" = -newer ] && [ "$done" != - ] && since=$state/never
    ( archive "$2" $by "$since" ) || [ $? -le 1 ] || exit 96
    # What was changed or removed meanwhile comes the next time, if there is one.
    if [ "$done" != - ]; then
        [ -e "$state/told" ] || ( tell "$2" ) > "$state/told"
        cat "$state/told" >&2
    fi
}

command=$1; shift
case $command in
    setup|begin|task|watch|slice|stage) "$command" "$@";;
    *) exit 95;;
esac
""".replace("@PIECES@", str(PIECES_BYTES)).replace("@ARCHIVE@", str(ARCHIVE_BYTES))


@dataclass(frozen=True)
class Answer:
    """What ``watch`` says. ``exit_code`` None: the program still runs.

    ``out`` and ``err``: what the program has printed from where the requestor asked for on;
    ``out_left``, ``err_left``: how many bytes more there are. ``size`` (bytes) and ``sha256`` are the
    archive's of new results, 0 and empty when there are none; ``archive`` is the archive, if it is small.
    """

    out: bytes
    err: bytes
    exit_code: int | None
    out_left: int
    err_left: int
    size: int
    sha256: str
    archive: bytes | None

    @property
    def over(self) -> bool:
        """Whether the program has ended, and all that it has printed is here."""
        return self.exit_code is not None and not self.out_left and not self.err_left


def parse_answer(text: str, out_at: int, err_at: int) -> Answer:
    """``out_at``, ``err_at``: what was asked for. Raises ValueError for what is not an answer to that."""
    *pieces, last = text.splitlines() or [""]
    found = {"out": b"", "err": b""}
    for line in pieces:
        name, at, length, data = [*line.split(" "), "", "", ""][:4]
        if name not in found or _number(at) != (out_at if name == "out" else err_at):
            raise ValueError(f"not an answer: {line[:80]!a}")
        found[name] = _decoded(data, _number(length), PIECES_BYTES)
    words = last.split()
    if len(words) not in (6, 7) or words[0] != "cpodfs" or len(words[5]) not in (1, 64):
        raise ValueError(f"not an answer: {last[:80]!a}")
    code = None if words[1] == "-" else _number(words[1])
    out_left, err_left, size = map(_number, words[2:5])
    if (code or 0) > 255 or (size == 0) != (words[5] == "-"):
        raise ValueError(f"not an answer: {last[:80]!a}")
    archive = _decoded(words[6], size, ARCHIVE_BYTES) if len(words) == 7 else None
    digest = words[5] if size else ""
    return Answer(found["out"], found["err"], code, out_left, err_left, size, digest, archive)


def _number(text: str) -> int:
    if len(text) > _NUMBER_CHARS or not text.isascii() or not text.isdecimal():
        raise ValueError(f"not a number: {text[:80]!a}")
    return int(text)


def _decoded(text: str, size: int, limit: int) -> bytes:
    data = bytes.fromhex(text[1:]) if text[:1] == "x" else base64.b64decode(text[1:], validate=True)
    if len(data) != size or size > limit:
        raise ValueError(f"{len(data)} bytes instead of {size}")
    return data


def words_for(argv: tuple[str, ...], path: str, script: str) -> list[str]:
    """The program's words for one file of ``foreach``.

    The file replaces each ``{}``, which the recipe has only where a name is data (`commands`). If there is none, it replaces the last word, unless that is the
    program itself or lies in the folder ``script``: then the file is added after it.
    """
    if any("{}" in word for word in argv):
        return [word.replace("{}", path) for word in argv]
    last = posixpath.normpath(argv[-1])
    # In its place the interpreter would take the file, which is data, for the program.
    code = len(argv) == 1 or last == script or last.startswith(f"{script}/")
    return [*argv, path] if code else [*argv[:-1], path]
