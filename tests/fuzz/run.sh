#!/bin/sh
# run.sh SECONDS - each fuzz target for so long, on a copy of the corpus.
set -u

cd "$(dirname "$0")/../.." || exit 1
seconds=${1:-60}
mkdir -p build/corpus
status=0
for source in tests/fuzz/*.c; do
	name=$(basename "$source" .c)
	clang -std=c11 -g -O1 -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all \
		-DBSMTP_NO_MAIN -I. -o "build/fuzz-$name" bsmtp.c "$source" || exit 1
	cp -R "tests/fuzz/corpus/$name" build/corpus/
	if "build/fuzz-$name" -max_total_time="$seconds" -artifact_prefix=build/ "build/corpus/$name" \
		>"build/fuzz-$name.log" 2>&1; then
		echo "fuzz $name: $seconds s, no finding"
	else
		echo "fuzz $name: a finding"
		tail -n 30 "build/fuzz-$name.log"
		status=1
	fi
done
exit $status
