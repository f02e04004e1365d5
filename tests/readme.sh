#!/usr/bin/env bash
# Slow: runs every command of README.md in a fresh clone of this repository, one after the other, and times each.
#
#     bash tests/readme.sh                    # an hour on two cores
#     bash tests/readme.sh --max_steps=40     # minutes: every training gets what is given here
#
# Left out: downloads of published data, and what needs eight GPUs.
set -euo pipefail
repository=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
git clone --quiet "$repository" "$work/clone"
cd "$work/clone"
mkdir novels && cp README.md novels/one.txt && cp lab/README.md notes.txt # the texts that README speaks of

grep -E '^    (python3?|pip|torchrun) ' README.md | grep -vE 'shakespeare|tinystories|openwebtext|owt.toml' |
    sed -E "/--resume/!s|(train.py [^#]*)|\1 $* |" > commands
echo "$(wc -l < commands) commands"
while read -r command; do
    printf 'echo %q; SECONDS=0; { %s\n} || exit 1; echo "took $SECONDS s"\n' "$command" "$command"
done < commands > commands.sh
PYTHONUNBUFFERED=1 bash commands.sh
