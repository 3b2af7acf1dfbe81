#!/usr/bin/env bats
# The documents are true: their examples run, and they name what there is.
#
# Examples: the blocks fenced as sh in README.md, and those in the manuals behind a
# comment 'example: run'.  They use the default port; here a `bsmtp` in front of
# the real one gives the listener a free port and tells the sender of it.

bats_require_minimum_version 1.5.0

setup() {
	bats_load_library bats-support
	bats_load_library bats-assert
	TOP=$(cd "$BATS_TEST_DIRNAME/.." && pwd)
	BSMTP=${BSMTP:-$TOP/bsmtp}
	cd "$BATS_TEST_TMPDIR" || return 1
}

teardown() {
	[ ! -s pid ] || kill "$(cat pid)" 2>/dev/null || :
}

# The parts of a manual behind a mark, as the reader sees them: $1 mark, $2 file.
blocks() {
	awk -v mark="example: $1" '
		index($0, mark) && /^\.\\"/ { marked = 1; next }
		marked && /^\.Bd/ { inside = 1; marked = 0; next }
		/^\.Ed/ { inside = 0 }
		inside { gsub(/\\e/, "\\"); print }' "$2"
}

fenced() {
	awk '/^```sh$/ { inside = 1; next } /^```/ { inside = 0 } inside' "$1"
}

# Runs the commands in the file $1, all in one shell, in a folder with mail in it.
run_examples() {
	mkdir -p bin
	cat >bin/bsmtp <<-EOF
	#!/bin/sh
	verb=\$1
	shift
	if [ "\$verb" = listen ]; then
		echo \$\$ >'$PWD/pid'
		exec '$BSMTP' listen --address-file '$PWD/address' "\$@" 127.0.0.1:0
	fi
	n=0
	until [ -s '$PWD/address' ]; do
		n=\$((n + 1))
		[ \$n -lt 500 ] || exit 99
		sleep 0.02
	done
	BSMTP_SERVER=\$(cat '$PWD/address') exec '$BSMTP' "\$verb" "\$@"
	EOF
	chmod +x bin/bsmtp
	for i in 1 2; do
		printf 'From a@example.org Mon Nov 23 12:00:0%s 2026\n' $i
		printf 'From: a@example.org\nTo: b@example.net\nSubject: %s\n\nText.\n\n' $i
	done >archive.mbox
	printf 'From: a@example.org\nTo: b@example.net\nSubject: m\n\nText.\n' >message.eml
	# the listener must not hold on to what bats waits for
	PATH="$PWD/bin:$PATH" sh -eu "$1" >out 2>err 3>&- </dev/null
}

# The options of a verb, as --help has them: "--name" a line.
options_of() {
	"$BSMTP" "$1" --help | sed -n 's/^ .*\(--[a-z0-9-]*\).*/\1/p' | sed 's/^--//' | sort -u
}

# The options that bsmtp.1 documents in the section of a verb.
documented() {
	awk -v begin="Options of $1" '
		/^\.S[sh] / { inside = index($0, begin) > 0 }
		inside && /^\.It / { print }' "$TOP/man/bsmtp.1" |
		sed -n 's/.*Fl -\([a-z0-9-]*\).*/\1/p' | sort -u
}

@test "the examples of README.md run" {
	fenced "$TOP/README.md" >commands
	[ "$(grep -c bsmtp commands)" -ge 3 ]
	run run_examples "$PWD/commands"
	assert_success
	assert_equal "$(cat err)" ''
	assert_equal "$(cat out)" "1 delivered
2 delivered"
	assert_equal "$(find inbox/new -type f | wc -l)" 4
}

@test "the examples of bsmtp(1) run" {
	blocks run "$TOP/man/bsmtp.1" >commands
	[ "$(grep -c bsmtp commands)" -ge 5 ]
	run run_examples "$PWD/commands"
	assert_success
	# 2 from the mbox, 1 message, 2 as JSON, and 2 in each of four manners
	assert_equal "$(find inbox/new -type f | wc -l)" 13
	assert_equal "$(awk '{ print $1 }' out)" "lockstep
pipelining
early
bsmtp"
	run grep -c ' -> BDAT' err
	assert_output 1
}

@test "the example of bsmtp(3) compiles without a warning and delivers" {
	blocks compile "$TOP/man/bsmtp.3" >example.c
	run cc -std=c11 -D_POSIX_C_SOURCE=200809L -Wall -Wextra -Wpedantic -Werror \
		-DBSMTP_NO_MAIN -I"$TOP" -o example example.c "$TOP/bsmtp.c"
	assert_success
	assert_output ''
	# both sides print when they like, the server with the CRs of the wire
	assert_equal "$(./example | tr -d '\r' | sort)" "$(printf '%s\n' '' delivered 'from alice@example.org' \
		'Hello, Bob.' 'Subject: hello' 'to bob@example.net' | sort)"
}

@test "the manuals are clean" {
	run mandoc -Tlint -Wwarning "$TOP"/man/bsmtp.[137]
	assert_success
	assert_output ''
}

@test "bsmtp(1) documents the options that --help shows, and no other" {
	for verb in send listen; do
		options_of $verb >shown
		documented $verb >written
		[ "$(wc -l <shown)" -gt 15 ]
		run diff shown written
		assert_success
	done
}

@test "SYNOPSIS and usage agree" {
	# what the reader sees on one line each, without the manual's spacing
	mandoc -Tascii "$TOP/man/bsmtp.1" | col -b | awk '
		/^SYNOPSIS/ { inside = 1; next } /^[A-Z]/ { inside = 0 }
		inside && NF { $1 = $1; print }' >written
	"$BSMTP" --help | awk '/bsmtp (send|listen|version)( \[|$)/ {
		sub(/^usage:/, ""); $1 = $1; print }' >shown
	[ "$(wc -l <shown)" -eq 3 ]
	run diff written shown
	assert_success
}

@test "every exit status of the program is documented" {
	sed -n '/^\.Sh EXIT STATUS/,/^\.Sh JSON/p' "$TOP/man/bsmtp.1" |
		grep '^\.It' | grep -oE '[0-9]+' | sort -u >written
	# the numbers of sysexits.h, for the names that bsmtp.c uses
	grep -oE '\bEX_[A-Z]+\b' "$TOP/bsmtp.c" | sort -u >names
	{ echo '#include <sysexits.h>'; sed 's/.*/&=&/' names; } | sed 's/^\(EX_[A-Z]*\)=/"\1" /' |
		cc -E -P - | awk '/^"EX_/ { print $2 }' | sort -u >shown
	[ "$(wc -l <shown)" -ge 10 ]
	run comm -13 written shown
	# 77 is for TLS and authentication, which do not exist yet
	assert_output 77
	run comm -23 written shown
	assert_output ''
}

@test "every JSON field that either side prints is documented" {
	printf 'From: a@example.org\nTo: b@example.net\n\nText.\n' >message.eml
	"$BSMTP" listen --json --once --deadline 60s --discard --address-file address \
		127.0.0.1:0 >listen.json 3>&- &
	echo $! >pid
	for _ in $(seq 500); do [ ! -s address ] || break; sleep 0.02; done
	run --separate-stderr "$BSMTP" send --json -t --server "$(cat address)" message.eml
	assert_success
	echo "$output" >send.json
	wait "$(cat pid)"
	sed -n '/^\.Sh JSON/,/^\.Sh TRACE/p' "$TOP/man/bsmtp.1" |
		sed -n 's/^\.Va \([a-z_]*\).*/\1/p' | sort -u >written
	jq -r '.. | objects | keys[]' send.json listen.json | sort -u >shown
	[ "$(wc -l <shown)" -gt 25 ]
	run diff shown written
	assert_success
}
