"""The shell script that works for us inside the container, and what its lines mean.

Imports nothing of ours. It needs ``sh``, ``tar``, ``find``, ``sha256sum``, ``head``, ``tail``, ``wc``
(GNU or busybox). yagna runs the commands of an activity one after another, so a program that runs in
the foreground would keep us from its files: ``start`` puts it in the background, ``watch`` streams
what it has printed since the last time, ``pack`` archives what it has written since. For one task of
many ``task`` runs it to its end and ``whole`` archives all its output. Of the output folder only
files and folders are archived; what else is in it is told of on stderr. The program's words are
arguments here and never looked at by a shell.
"""

from __future__ import annotations

import posixpath
from dataclasses import dataclass

BASE = "/golem/work"
"""Where everything is in the container: a volume of the image, as yagna can only transfer to those."""

HELPER = f"{BASE}/cpodfs.sh"
INCOMING = f"{BASE}/cpodfs.in"
OUTGOING = f"{BASE}/cpodfs.out"
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
    check "$1"
    rm -rf pod "$state"
    mkdir -p "$state" "pod/$2" || exit 92
    tar -xf cpodfs.in -C pod || exit 93
    rm -f cpodfs.in
    : > "$state/out"; : > "$state/err"; echo 0 > "$state/out.at"; echo 0 > "$state/err.at"
    : > "$state/never"; touch -t 197001010000 "$state/never"
    cp -p "$state/never" "$state/since"
    echo ok
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

start() {  # WORDS: run the program in the background
    cd pod || exit 94
    ( ( become "$@" ) </dev/null >>"$state/out" 2>>"$state/err"
      echo $? > "$state/exit.new"; mv "$state/exit.new" "$state/exit" ) </dev/null >/dev/null 2>&1 &
    echo $! > "$state/pid"
}

mourn() {  # whoever was to write down the program's end may have been killed with it
    [ -e "$state/pid" ] && [ ! -e "$state/exit" ] || return 0
    read -r pid < "$state/pid"
    if gone "$pid" && [ ! -e "$state/exit" ]; then
        echo "cpodfs: the program was killed" >> "$state/err"
        echo 137 > "$state/exit"
    fi
}

emit() {  # NAME ALL: print what NAME has got since the last time, whole lines only unless ALL
    read -r at < "$state/$1.at"
    new=$(( $(wc -c < "$state/$1") - at ))
    [ "$new" -gt 0 ] || return 1
    part=$2
    # More than we take at once: the last line is cut only if there is no other.
    [ "$new" -le 262144 ] || { new=262144; part=; full=1; }
    if [ -z "$part" ]; then
        rest=$(tail -c "+$((at + 1))" "$state/$1" | head -c "$new" | tail -n 1 | wc -c)
        last=$(tail -c "+$((at + new))" "$state/$1" | head -c 1 | wc -l)
        if [ "$last" -eq 0 ]; then
            [ "$rest" -lt "$new" ] && new=$((new - rest)) || [ "$new" -eq 262144 ] || return 1
        fi
    fi
    tail -c "+$((at + 1))" "$state/$1" | head -c "$new"
    echo $((at + new)) > "$state/$1.at"
    return 0
}

watch() {  # TENTHS: stream what the program prints, for so long or until it has ended
    now
    end=$((tenths + $1))
    said=; complained=
    while :; do
        mourn
        all=; [ -e "$state/exit" ] && all=1
        more=; full=
        emit out "$all" && more=1 && said=1
        emit err "$all" >&2 && more=1 && complained=1
        [ -n "$all" ] && [ -z "$more" ] && return 0
        now
        [ "$tenths" -lt "$end" ] || break
        [ -n "$all$full" ] || nap
    done
    # A line that has stood unfinished for all this time is shown as it is.
    [ -n "$said" ] || emit out 1
    [ -n "$complained" ] || emit err 1 >&2
    return 0
}

task() {  # HASH PATH OUTPUT WORDS: put the file there, run the program, with an empty output folder
    check "$1"
    rm -f "$state/exit"
    rm -rf "pod/$3"; mkdir -p "pod/$3" || exit 92
    case $2 in */*) [ -d "pod/${2%/*}" ] || mkdir -p "pod/${2%/*}" || exit 92;; esac
    mv -f cpodfs.in "pod/$2" || exit 93
    shift 3; cd pod || exit 94
    ( become "$@" ) </dev/null
    echo $? > "$state/exit"
}

archive() {  # OUTPUT TEST ...: files and folders in it that pass; 0 or 1: all that was there is in
    out=$1; shift
    cd pod || exit 94
    rm -f "$base/cpodfs.out" "$state/failed"
    if tar --version 2>/dev/null | grep -q GNU; then
        find "./$out" \( -type f -o -type d \) "$@" -print0 > "$state/list" 2> "$state/tar"
        tar --null --no-recursion -cf "$base/cpodfs.out" -T "$state/list" 2>> "$state/tar"
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

report() {  # DONE UNSAID SOME
    echo "cpodfs $* $(( $(wc -c < cpodfs.out) )) $(hash cpodfs.out)"
}

whole() {  # OUTPUT: archive all of it, say what is to be known
    [ -s "$state/exit" ] || exit 97
    ( archive "$1" )
    failed=$?
    ( tell "$1" ) >&2
    [ "$failed" -le 1 ] || exit 96
    read -r done < "$state/exit"
    report "$done" 0 1
}

pack() {  # OUTPUT: archive what is new in it, say what is to be known
    done=-
    mourn
    [ -e "$state/exit" ] && done=$(cat "$state/exit")
    : > "$state/next"
    # File times are coarse: only what is written from now on is surely newer than that.
    [ "$done" = - ] && nap
    # The time of change tells more: -newer does not see a file that came with an old date.
    by=-cnewer
    find "$state/never" -cnewer "$state/never" >/dev/null 2>&1 || by=-newer
    [ "$by" = -newer ] && [ "$done" != - ] && cp -p "$state/never" "$state/since"
    ( archive "$1" $by "$state/since" )
    # What was changed or removed meanwhile comes the next time, if there is one.
    if [ "$done" != - ] && [ ! -e "$state/told" ]; then
        : > "$state/told"
        ( tell "$1" ) >&2
    fi
    mv "$state/next" "$state/since"
    count=0; [ -s "$state/list" ] && count=1
    unsaid=0
    for name in out err; do
        [ -e "$state/$name.at" ] || continue
        read -r at < "$state/$name.at"
        unsaid=$((unsaid + $(wc -c < "$state/$name") - at))
    done
    report "$done" "$unsaid" "$count"
}

command=$1; shift
case $command in
    setup|start|watch|pack|task|whole|stage) "$command" "$@";;
    *) exit 95;;
esac
"""


@dataclass(frozen=True)
class Report:
    """The line that ``pack`` and ``whole`` print. ``exit_code`` None: the program still runs.

    ``unsaid``: bytes that the program has printed and ``watch`` has not streamed yet. ``some``: the
    archive is not empty. ``size`` in bytes and ``sha256`` are the archive's.
    """

    exit_code: int | None
    unsaid: int
    some: bool
    size: int
    sha256: str


def parse_report(text: str) -> Report:
    """Raises ValueError for what is not a report."""
    words = text.split()
    if len(words) != 6 or words[0] != "cpodfs" or len(words[5]) != 64:
        raise ValueError(f"not a report: {text[:80]!a}")
    if any(len(word) > _NUMBER_CHARS for word in words[1:5]):
        raise ValueError("not a report: a number too large")
    code = None if words[1] == "-" else int(words[1])
    unsaid, size = int(words[2]), int(words[4])
    if min(code or 0, unsaid, size) < 0 or (code or 0) > 255:
        raise ValueError(f"not a report: {text[:80]!a}")
    return Report(code, unsaid, words[3] != "0", size, words[5])


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
