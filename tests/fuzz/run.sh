#!/bin/sh
# run.sh SECONDS [TARGET...] - each fuzz target for so long.  Starts from the corpus
# kept here; what is found beyond it goes to build/corpus.
set -u

cd "$(dirname "$0")/../.." || exit 1
seconds=${1:-60}
[ $# -gt 0 ] && shift
if [ $# -eq 0 ]; then
	for source in tests/fuzz/*.c; do
		set -- "$@" "$(basename "$source" .c)"
	done
fi
# the quarantine of freed memory must fit under the limit below
export ASAN_OPTIONS="quarantine_size_mb=16${ASAN_OPTIONS:+:$ASAN_OPTIONS}"
status=0
for name; do
	mkdir -p "build/corpus/$name"
	if ! clang -std=c11 -Wall -Wextra -g -O1 -fsanitize=fuzzer,address,undefined \
		-fno-sanitize-recover=all -DBSMTP_NO_MAIN -I. -o "build/fuzz-$name" bsmtp.c \
		"tests/fuzz/$name.c"; then
		echo "fuzz $name: does not compile"
		status=1
	elif "build/fuzz-$name" -max_total_time="$seconds" -timeout=10 -rss_limit_mb=512 \
		-artifact_prefix="build/$name-" "build/corpus/$name" "tests/fuzz/corpus/$name" \
		>"build/fuzz-$name.log" 2>&1; then
		echo "fuzz $name: $seconds s, no finding"
	else
		echo "fuzz $name: a finding, see build/fuzz-$name.log"
		tail -n 30 "build/fuzz-$name.log"
		status=1
	fi
done
exit $status
