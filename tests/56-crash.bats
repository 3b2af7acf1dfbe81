#!/usr/bin/env bats
# What is left by a kill, a failing call or another program, and what is made of it: the
# journal, the locks, the modes of files.
# shellcheck disable=SC2016,SC2030,SC2031,SC2154 # commands expand; lib.bash has variables
load lib

tools=$BATS_TEST_DIRNAME/tools
holds() { /usr/bin/python3 "$tools/store_check.py" "$@"; }
ids() { sed -n 's/^Message-ID: //p' "$1"; }

# make_batch N [LINES]: in `batch` N messages with ids, in want.json what they are.
make_batch() {
	holds numbered "$1" want "${2:-20}" >count
	"$BSMTP" send --transid --to b@example.net -o batch want
}

# journal_of KIND: the journal of the store that this suite calls "in".
journal_of() {
	case $1 in
	maildir | eml) echo in/bsmtp.journal ;;
	*) echo in.journal ;;
	esac
}

# reopen KIND: the states of the last group as a kill or a power failure may leave them.
reopen() {
	local journal line
	journal=$(journal_of "$1")
	line=$(grep -n '^[?+-]*$' "$journal" | tail -n 1 | cut -d : -f 1)
	sed -i "${line}s/[+-]/?/g" "$journal"
	chmod 600 "$journal"
}

# all_once N: each of the N messages is there once.
all_once() {
	run -0 holds whole want.json "$store:in" <(ids want)
	assert_output "$1"
}

# --- What is known after a kill

@test "a group whose states were lost is settled by what is there" {
	make_batch 5
	for store in maildir eml mbox batch; do
		start_listener "--$store" in
		send batch
		stop_listener
		reopen $store
		start_listener "--$store" in
		assert_equal "$(grep -c '?' "$(journal_of $store)")" 0
		send batch
		stop_listener
		all_once 5
		rm -rf in in.*
	done
}

@test "what a reader took is not stored again after a restart" {
	make_batch 4
	for store in mbox batch; do
		for how in 'mv in taken' ': >in' 'truncate -s -1 in' 'rm in'; do
			# nothing is appended to a batch that is torn
			[ "$store$how" != 'batchtruncate -s -1 in' ] || continue
			start_listener "--$store" in
			send batch
			stop_listener
			eval "$how"
			before=$(stat -c %s in 2>/dev/null || echo 0)
			start_listener "--$store" in
			send --json batch >sent.json
			assert_equal "$(jq -r 'select(.event == "message").reply.text' sent.json | sort -u)" \
				'duplicate, already stored'
			stop_listener
			assert_equal "$(stat -c %s in)" "$before"
			rm -rf in in.* taken
		done
	done
}

# expunge N: a mail reader takes the last N messages out of the mbox, under its lock.
expunge() {
	/usr/bin/python3 - "$1" <<-'END'
	import fcntl, re, sys
	with open("in", "r+b") as f:
	    fcntl.lockf(f, fcntl.LOCK_EX)
	    starts = [m.start() for m in re.finditer(rb"^From ", f.read(), re.M)]
	    f.truncate(starts[-int(sys.argv[1])])
	END
}

@test "an mbox that a reader has shortened loses nothing, whatever the journal says" {
	for lost in no yes; do
		for n in 1 3; do
			make_batch 8
			start_listener --mbox in
			send batch
			stop_listener
			[ $lost = no ] || reopen mbox
			expunge $n
			cp in before
			start_listener --mbox in
			cmp before in
			assert_equal "$(cat listener.err)" ''
			make_message | send --to b@example.net
			cmp -n "$(stat -c %s before)" before in
			stop_listener
			rm -rf in in.*
		done
	done
}

@test "a reader that marks messages in a group whose states were lost loses nothing" {
	make_batch 4
	start_listener --mbox in
	send batch
	stop_listener
	reopen mbox
	sed -i 's/^Message-ID/Status: RO\n&/' in
	cp in before
	start_listener --mbox in
	cmp before in
	make_message | send --to b@example.net
	cmp -n "$(stat -c %s before)" before in
}

# --- Torn, and another program was there

# last_begins: where the last message begins that the journal has.
last_begins() { awk '$1 == "group" { at = $4 } $1 == "part" { begin = at; at = $2 } END { print begin }' in.journal; }

# torn KIND OCTETS: the last message of the batch is in the file for so many octets, and not
# known to be whole; $begin is where it begins.
torn() {
	start_listener "--$1" in
	send batch
	stop_listener
	reopen "$1"
	begin=$(last_begins)
	length=$(($(stat -c %s in) - begin))
	truncate -s $((begin + $2)) in
	last=$(tail -c 1 in)            # nothing, where that is a line's end
}
foreign() {
	/usr/bin/python3 - "$@" <<-'END'
	import fcntl, sys
	with open("in", "ab") as f:
	    fcntl.lockf(f, fcntl.LOCK_EX)
	    f.write(sys.argv[1].encode().decode("unicode_escape").encode() + b"From mda@x.example Mon Nov 23 12:00:00 2026\n"
	        b"Subject: foreign\n\n" + b"text of another\n" * int(sys.argv[2]) + b"\n")
	END
}
foreign_is_there() {
	/usr/bin/python3 - "$1" <<-'END'
	import mailbox, sys
	box = [m for m in mailbox.mbox("in", create=False) if m["Subject"] == "foreign"]
	assert [m.get_payload() for m in box] == ["text of another\n" * int(sys.argv[1])], box
	END
}

@test "torn, and a mail program has appended: its mail stays, ours is stored whole, once" {
	store=mbox
	may_complain=1
	make_batch 3 100
	# 71: after the ">" of Return-Path
	all='1 10 63 64 71 72 100 200 400 3000'
	[ $SCALE -gt 25 ] || all='1 64 72 400'
	for octets in $all; do
		for lead in '' '\n' '\n\n'; do
			for lines in 1 400; do
				rm -rf in in.*
				torn mbox $octets
				foreign "$lead" $lines
				# A long one, glued: what is torn may be a whole message that a reader has marked.
				if [ -z "$lead" ] && [ -n "$last" ] && [ "$(stat -c %s in)" -ge $((begin + length)) ]; then
					cp in before
					start_listener --mbox in
					cmp before in
					send --json batch >sent.json
					stop_listener
					assert_equal "$(jq -r 'select(.event == "message").reply.text' sent.json |
						grep -c 'stored$')" 3
					cmp -n "$(stat -c %s before)" before in
					continue
				fi
				start_listener --mbox in
				assert_equal "$(cat listener.err)" \
					"bsmtp: in: blanked out $((octets + ${#lead} / 2)) octets of a message that was never whole"
				foreign_is_there $lines
				send --json batch >sent.json
				assert_equal "$(jq -r 'select(.event == "message").reply.text' sent.json | sort | uniq -c |
					xargs)" '2 duplicate, already stored 1 stored'
				stop_listener
				foreign_is_there $lines
				/usr/bin/python3 - <<-'END'
				import mailbox
				ids = sorted(m["Message-ID"] for m in mailbox.mbox("in", create=False) if m["Message-ID"])
				assert ids == ["<%d@example.org>" % n for n in range(3)], ids
				END
			done
		done
	done
}

@test "torn at any octet: it is cut off, and its id is not known" {
	may_complain=1
	make_batch 2 30
	for store in mbox batch; do
		all='1 2 30 63 64 65 130 210 211 212 213 300 1000'
		[ $SCALE -gt 25 ] || all='1 64 211 1000'
		for octets in $all; do
			rm -rf in in.*
			torn $store $octets
			start_listener "--$store" in
			assert_equal "$(stat -c %s in)" "$begin"
			assert_equal "$(cat listener.err)" \
				"bsmtp: in: cut off $octets octets of a message that was never whole"
			send batch
			stop_listener
			all_once 2
		done
	done
}

@test "a block that a power failure took is found, and the message is stored anew" {
	may_complain=1
	make_batch 3 300
	for store in mbox batch; do
		for at in 0 512 4096; do
			rm -rf in in.*
			start_listener "--$store" in
			send batch
			stop_listener
			reopen $store
			# the last message, of which a block is NULs
			block=$((($(last_begins) + at + 511) / 512))
			dd if=/dev/zero of=in bs=512 seek=$block count=$((at == 0 ? 2 : 1)) conv=notrunc status=none
			start_listener "--$store" in
			send --json batch >sent.json
			assert_equal "$(jq -r 'select(.event == "message").reply.text' sent.json | sort | uniq -c |
				xargs)" '2 duplicate, already stored 1 stored'
			stop_listener
			run -1 grep -qP '\0' in
			all_once 3
		done
	done
}

# --- The journal itself

@test "a torn journal is read up to the tear, and goes on" {
	may_complain=1
	make_batch 6
	for store in maildir mbox; do
		start_listener "--$store" in
		send batch
		stop_listener
		journal=$(journal_of $store)
		cp "$journal" whole
		for cut in 1 5 20 40 200; do
			cp whole "$journal"
			truncate -s -$cut "$journal"
			start_listener "--$store" in
			grep -q 'octets that are no whole record' listener.err
			assert_equal "$(head -n 1 "$journal")" 'bsmtp journal 1'
			stop_listener
		done
		for cut in 0 1 15; do
			head -c $cut whole >"$journal"
			start_listener "--$store" in
			stop_listener
		done
		rm -rf in in.*
	done
}

@test "a journal that is not ours alone, or none, is refused, and nothing is written there" {
	may_complain=1
	make_batch 1
	for store in mbox maildir; do
		journal=$(journal_of $store)
		for what in link hardlink wide text folder fifo; do
			rm -rf in in.* victim
			mkdir victim.d 2>/dev/null || :
			printf 'precious\n' >victim
			chmod 600 victim
			[ $store = mbox ] || mkdir -p in
			case $what in
			link) ln -s "$PWD/victim" "$journal" ;;
			hardlink) ln victim "$journal" ;;
			wide) printf 'bsmtp journal 1\n' >"$journal"; chmod 666 "$journal" ;;
			text) cp victim "$journal" ;;
			folder) mkdir "$journal" ;;
			fifo) mkfifo -m 600 "$journal" ;;
			esac
			run -73 timeout 20 "$BSMTP" listen "--$store" in 127.0.0.1:0
			assert_output --partial "$journal"
			assert_equal "$(cat victim)" precious
		done
	done
	needs_root
	rm -rf in in.*
	install -m 600 -o nobody /dev/null in.journal
	run -73 "$BSMTP" listen --mbox in 127.0.0.1:0
	assert_output --partial 'it must be yours'
}

@test "what is made is its owner's alone" {
	umask 022
	make_message >m
	for store in maildir eml mbox batch; do
		start_listener "--$store" in
		"$BSMTP" send --transid --to b@example.net -o batch m
		send batch
		stop_listener
		run find in* -perm /077
		assert_output ''
		rm -rf in in.*
	done
	assert_equal "$(stat -c %a batch)" 600
	# what was there keeps its mode
	mkdir -m 755 in
	start_listener --maildir in
	send --to b@example.net m
	assert_equal "$(stat -c %a in)" 755
}

@test "what killed listeners have left in tmp is removed, and nothing else" {
	make_message >m
	for store in maildir eml; do
		start_listener "--$store" in
		# two messages that never end
		for _ in 1 2; do
			printf '%s\r\n' 'BSMTP c' 'MAIL FROM:<a@x.example>' 'RCPT TO:<b@x.example>' 'BDAT 99' 'Subject: x' |
				timeout 20 "$BSMTP" send --server "$address" --format raw --timeout 10s >said 3>&- &
			pids+=($!)
		done
		tmp=$([ $store = maildir ] && echo in/tmp || echo in)
		left() { find $tmp -type f \( -path 'in/tmp/*' -o -name '.tmp-*' \) | wc -l; }
		two() { [ "$(left)" -eq 2 ]; }
		await two
		kill -9 "$listener_pid"
		wait "$listener_pid" || :
		other=$tmp/$([ $store = maildir ] || echo .tmp-)1764000000.M000001P1Q1.elsewhere
		: >"$other"
		start_listener "--$store" in
		assert_equal "$(left)" 1
		[ -e "$other" ]
		touch -d '2 days ago' "$other"
		stop_listener
		start_listener "--$store" in
		assert_equal "$(left)" 0
		send --to b@example.net m
		stop_listener
		rm -rf in
	done
}

@test "an envelope whose message was never named is removed, by its listener's end alone" {
	cat >hook.c <<-'END'
	#define _GNU_SOURCE
	#include <dlfcn.h>
	#include <signal.h>
	#include <string.h>
	#include <unistd.h>
	/* Killed when the message is to get its name. */
	int renameat(int a, const char *from, int b, const char *to)
	{
		int (*real)(int, const char *, int, const char *) = dlsym(RTLD_NEXT, "renameat");
		if (strstr(to, ".eml") != NULL)
			kill(getpid(), SIGKILL);
		return real(a, from, b, to);
	}
	END
	cc -shared -fPIC -o hook.so hook.c
	make_message >m
	program=$BSMTP
	hooked() { LD_PRELOAD=$PWD/hook.so ASAN_OPTIONS=verify_asan_link_order=0 exec "$program" "$@"; }
	may_complain=1
	BSMTP=hooked start_listener --eml in
	run -75 send --to b@example.net m
	wait "$listener_pid" || :
	[ -e in/000001.json ]
	start_listener --eml in
	assert_equal "$(find in -type f)" ''
	send --to b@example.net m
	assert_equal "$(find in -type f | sort | xargs)" 'in/000001.eml in/000001.json' ||
		assert_equal "$(find in -type f | sort | xargs)" 'in/000002.eml in/000002.json'
}

@test "a Maildir that is removed and made anew is used again" {
	make_message >m
	for store in maildir eml; do
		start_listener "--$store" in
		send --to b@example.net m
		rm -rf in
		mkdir in
		send --to b@example.net m
		assert_equal "$(find in -type f \( -path '*/new/*' -o -name '*.eml' \) | wc -l)" 1
		stop_listener
		rm -rf in
	done
}

@test "a temporary file that somebody else removed is none that was named" {
	make_batch 1
	for how in maildir:linkat,renameat eml:linkat,renameat; do
		store=${how%%:*}
		may_complain=1
		# killed at each of its names in turn, until one comes through
		for n in 1 2 3 4; do
			rm -f addr
			strace -f -o /dev/null -e trace="${how#*:}" -e inject="${how#*:}:signal=KILL:when=$n" \
				"$BSMTP" listen "--$store" in --address-file addr 127.0.0.1:0 >/dev/null 2>&1 3>&- &
			tracer=$!
			await test -s addr
			address=$(cat addr)
			if send batch; then
				pkill -P $tracer || :
				wait $tracer || :
				break
			fi
			wait $tracer || :
			if [ $store = maildir ]; then rm -f in/tmp/*; else rm -f in/.tmp-*; fi
			start_listener "--$store" in
			send batch
			stop_listener
			assert_equal "$(find in -type f \( -path '*/new/*' -o -name '*.eml' \) | wc -l)" 1
			rm -rf in
		done
		[ "$n" -gt 1 ]
		rm -rf in
	done
}

# reads HOW: the listener is killed when a message has its name, and a reader comes.
reads() {
	make_batch 1
	may_complain=1
	rm -f addr
	# killed behind the name, before the journal knows
	strace -f -o /dev/null -e trace=renameat -e inject=renameat:delay_exit=2000000 \
		"$BSMTP" listen --maildir in --address-file addr 127.0.0.1:0 >/dev/null 2>&1 3>&- &
	tracer=$!
	await test -s addr
	address=$(cat addr)
	send batch 3>&- &
	client=$!
	named() { [ -n "$(find in/new -type f)" ]; }
	await named
	pkill -9 -P $tracer
	wait $tracer || :
	wait $client || :
	if [ $1 = moves ]; then
		for file in in/new/*; do mv "$file" "in/cur/${file##*/}:2,S"; done
	else
		rm in/new/*
	fi
	start_listener --maildir in
	run -0 "$BSMTP" send --server "$address" -v batch
	assert_output --partial duplicate
	stop_listener
	assert_equal "$(find in/new in/tmp -type f | wc -l)" 0
	rm -rf in
}
@test "a reader that moves a message while its group is open has it once" { reads moves; }
@test "a reader that takes a message while its group is open has it once" { reads takes; }

@test "a folder that is moved away, or made anew, is found: nothing goes to the old one" {
	make_message >m
	for how in 'rm -rf in/new; mkdir in/new' 'mv in/new old; mkdir in/new' 'rm -rf in/tmp; mkdir in/tmp' \
		'mv in old; mkdir -p in/new in/cur in/tmp' 'mv in old'; do
		start_listener --maildir in
		may_complain=1
		send --to b@example.net m
		eval "$how"
		rm -f in/new/*
		send --transid --to b@example.net m || send --transid --to b@example.net m
		assert_equal "$(find in/new -type f | wc -l)" 1
		stop_listener
		rm -rf in old
	done
}

@test "of two hosts whose names begin alike each leaves the other's files alone" {
	mkdir -p in/new in/cur in/tmp
	: >"in/tmp/1764000000.M000001P999999Q1.$(hostname | tr -c 'A-Za-z0-9.\n_-' _)2"
	touch in/tmp/*
	start_listener --maildir in
	stop_listener
	assert_equal "$(find in/tmp -type f | wc -l)" 1
}

@test "a damaged record takes no other with it, nor into a journal written anew" {
	for store in mbox maildir; do
		for n in 1 2 3; do
			make_batch 1
			mv batch b$n
		done
		start_listener "--$store" in
		for n in 1 2 3; do send b$n; done       # a record each
		stop_listener
		journal=$(journal_of $store)
		cp $journal whole
		for at in 30 60 200; do
			/usr/bin/python3 - whole $journal $at <<-'END'
			import sys
			octets = bytearray(open(sys.argv[1], "rb").read())
			octets[int(sys.argv[3])] ^= 1
			open(sys.argv[2], "wb").write(octets)
			END
			may_complain=1
			start_listener "--$store" in
			send --json b1 b2 b3 >sent.json
			assert_equal "$(grep -c 'already stored' sent.json)" 2
			stop_listener
			rm -f in.new
		done
		rm -rf in in.journal
		rm -f b? whole
	done
}

@test "NULs for many blocks of a journal take no other record with them" {
	may_complain=1
	for n in 1 2 3; do
		holds numbered 60 want >count
		"$BSMTP" send --transid --to "$(seq -s , -f 'r%.0f@x.example' 20)" -o b$n want
	done
	start_listener --mbox in
	for n in 1 2 3; do send b$n; done
	stop_listener
	size=$(stat -c %s in.journal)
	assert [ "$size" -gt 200000 ]
	dd if=/dev/zero of=in.journal bs=1 seek=$((size * 45 / 100)) count=40000 conv=notrunc status=none
	start_listener --mbox in
	grep -q 'passed over' listener.err
	for n in 1 3; do
		send --json b$n >sent.json
		assert_equal "$(grep -c 'already stored' sent.json)" 60
	done
	stop_listener
}

# --- What stands beside a file, and when the disk has what

# in_order TRACE PATTERN...: each is found in a line behind that of the one before.
in_order() {
	local at=1 trace=$1
	shift
	for pattern; do
		line=$(tail -n +$at "$trace" | grep -nE -m 1 -- "$pattern" | cut -d : -f 1) || :
		[ -n "$line" ] || { echo "not behind line $at: $pattern"; cat "$trace"; return 1; }
		at=$((at + line))
	done
}

@test "what tells that a message was named goes when the disk has the journal's word for it" {
	make_batch 2
	for store in maildir eml; do
		start_listener "--$store" in
		strace -qq -f -y -p "$listener_pid" -o trace -e trace=pwrite64,fdatasync,unlinkat 3>&- &
		tracer=$!
		pids+=($tracer)
		await grep -q "^TracerPid:.*[1-9]" "/proc/$listener_pid/status"
		send batch
		gone() { [ "$(find in -name '*.kept' -o -name '.tmp-*' | wc -l)" -eq 0 ]; }
		await gone              # with nothing else to do, too
		kill $tracer
		wait $tracer || :
		in_order trace 'pwrite64\(.*journal>, "\+\+?"' 'fdatasync\(.*journal>' \
			'unlinkat\(.*(kept|json)"'
		stop_listener
		rm -rf in
	done
	start_listener --mbox in
	strace -qq -f -y -p "$listener_pid" -o trace -e trace=pwrite64,fdatasync 3>&- &
	tracer=$!
	pids+=($tracer)
	await grep -q "^TracerPid:.*[1-9]" "/proc/$listener_pid/status"
	send batch
	await in_order trace 'pwrite64\(.*journal>, "\+\+?"' 'fdatasync\(.*journal>' >/dev/null
	kill $tracer
	wait $tracer || :
	stop_listener
}

@test "where a sync of all is not known to reach the disk each file is synced" {
	cat >hook.c <<-'END'
	#define _GNU_SOURCE
	#include <dlfcn.h>
	#include <sys/vfs.h>
	int fstatfs64(int fd, struct statfs64 *s)
	{
		int (*real)(int, struct statfs64 *) = dlsym(RTLD_NEXT, "fstatfs64");
		int done = real(fd, s);
		s->f_type = 0x65735546;         /* FUSE */
		return done;
	}
	END
	cc -shared -fPIC -o hook.so hook.c
	make_message >m
	for store in maildir eml; do
		rm -f addr
		strace -qq -f -y -o trace -e trace=fsync,syncfs,fstatfs -E LD_PRELOAD="$PWD/hook.so" \
			-E ASAN_OPTIONS=verify_asan_link_order=0:detect_leaks=0 \
			"$BSMTP" listen --$store in --once --address-file addr 127.0.0.1:0 3>&- &
		tracer=$!
		pids+=($tracer)
		await test -s addr
		address=$(cat addr)
		send --to b@example.net m m m m m m m m m m m m
		wait $tracer
		assert_equal "$(grep -c 'syncfs(' trace)" 0
		assert [ "$(grep -cE 'fsync\(.*(in/tmp/|in/\.tmp-)[0-9]+\.M[^/]*[^n]>' trace)" -ge 12 ]
		rm -rf in
	done
}

# --- Another mail program, and its locks

@test "an mbox is locked by FILE.lock too: it is waited for, and let go" {
	make_message >m
	start_listener --mbox in
	echo $$ >in.lock
	send --to b@example.net m 3>&- &
	client=$!
	pids+=($client)
	waits() { grep -q "Subject" in; }
	for _ in 1 2 3 4 5 6 7 8 9 10; do
		run -1 waits
		read -rt 0.02 <> <(:) || :
	done
	kill -0 $client
	rm in.lock
	wait $client
	waits
	[ ! -e in.lock ]
}

@test "a lock file of a process that is gone is in nobody's way, an old one neither" {
	make_message >m
	start_listener --mbox in
	sh -c 'echo $$' >in.lock
	send --to b@example.net m
	[ ! -e in.lock ]
	: >in.lock
	touch -d '6 minutes ago' in.lock
	send --to b@example.net m
	[ ! -e in.lock ]
	assert_equal "$(grep -c '^From ' in)" 2
}

@test "mail that dotlockfile or a reader locks is never torn" {
	holds numbered $((SCALE * 2)) want >count
	start_listener --mbox in
	send --to b@example.net want 3>&- &
	client=$!
	pids+=($client)
	await test -s in
	n=0
	while kill -0 $client 2>/dev/null && [ $n -lt 50 ]; do
		until ln -s "$$" in.lock 2>/dev/null; do read -rt 0.005 <> <(:) || :; done
		/usr/bin/python3 - <<-'END'
		data = open("in", "rb").read()
		assert data == b"" or data.endswith(b"\n\n"), data[-60:]
		END
		rm in.lock
		n=$((n + 1))
	done
	wait $client
	run -0 holds whole want.json mbox:in <(ids want)
	assert_output $((SCALE * 2))
}

# --- Calls that fail

@test "a file server that has done it and says it has not: stored once, and its envelope kept" {
	cat >hook.c <<-'END'
	#define _GNU_SOURCE
	#include <dlfcn.h>
	#include <errno.h>
	#include <stdio.h>
	#include <string.h>
	/* The reply is lost, and the request that is sent again fails. */
	int linkat(int a, const char *from, int b, const char *to, int flags)
	{
		int (*real)(int, const char *, int, const char *, int) = dlsym(RTLD_NEXT, "linkat");
		int done = real(a, from, b, to, flags);
		errno = EEXIST;
		return done == 0 ? -1 : done;
	}
	int renameat(int a, const char *from, int b, const char *to)
	{
		int (*real)(int, const char *, int, const char *) = dlsym(RTLD_NEXT, "renameat");
		int done = real(a, from, b, to);
		errno = ENOENT;
		return done == 0 ? -1 : done;
	}
	END
	cc -shared -fPIC -o hook.so hook.c
	make_batch 5
	program=$BSMTP
	hooked() { LD_PRELOAD=$PWD/hook.so ASAN_OPTIONS=verify_asan_link_order=0 exec "$program" "$@"; }
	for store in maildir eml; do
		BSMTP=hooked start_listener "--$store" in
		send batch
		send batch
		stop_listener
		all_once 5
		rm -rf in
	done
}

@test "a full disk: what was put off is stored at the retry, what was stored is known" {
	needs_root
	mkdir small
	may_complain=1
	stores='mbox batch maildir eml'
	[ $SCALE -gt 10 ] || stores='mbox eml'
	for store in $stores; do
		mount -t tmpfs -o size=400k none small
		make_batch 60 200
		ln -sfn small/in in
		start_listener "--$store" small/in
		run -75 send --json batch
		assert_output --partial '"code":452'
		kill -9 "$listener_pid"
		wait "$listener_pid" || :
		mount -o remount,size=64m small
		rm -f in
		ln -sfn small/in in
		start_listener "--$store" small/in
		send batch
		stop_listener
		run -0 holds whole want.json "$store:small/in" <(ids want)
		assert_output 60
		umount small
	done
}
needs_root() { [ "$(id -u)" -eq 0 ] || skip 'it takes root'; }

eval "$(declare -f teardown | sed '1s/teardown/lib_teardown/')"
teardown() {
	local status=0
	lib_teardown || status=1
	! mountpoint -q small 2>/dev/null || umount small
	return $status
}
