#!/usr/bin/env bats
# Commands of --exec: what is a verdict, what they are given, how they run side by side.
# shellcheck disable=SC2016,SC2030,SC2031,SC2154 # commands expand; lib.bash has variables
load lib

# hooked CODE: a library that is loaded before libc's.
hook() {
	{ printf '#define _GNU_SOURCE\n'; cat; } >hook.c
	cc -shared -fPIC -o hook.so hook.c
	program=$BSMTP
	hooked() { LD_PRELOAD=$PWD/hook.so ASAN_OPTIONS=verify_asan_link_order=0 exec "$program" "$@"; }
}

@test "children whose status the caller ignores: the command's verdict counts all the same" {
	make_message >m
	program=$BSMTP
	deaf() { exec env --ignore-signal=CHLD "$program" "$@"; }
	may_complain=1
	for ignores in env sh python perl; do
		case $ignores in
		env) deaf() { exec env --ignore-signal=CHLD "$program" "$@"; } ;;
		sh) deaf() { trap '' CHLD; exec "$program" "$@"; } ;;
		python) deaf() { exec /usr/bin/python3 -c 'import os, signal, sys
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
os.execv(sys.argv[1], sys.argv[1:])' "$program" "$@"; } ;;
		perl) deaf() { exec perl -e '$SIG{CHLD} = "IGNORE"; exec { $ARGV[0] } @ARGV' "$program" "$@"; } ;;
		esac
		BSMTP=deaf start_listener --exec '. ./verdict'
		for verdict in 'exec /no/such/program:75' 'exit 67:69' 'exit 75:75' 'exit 0:0'; do
			echo "${verdict%:*}" >verdict
			run "-${verdict##*:}" send --to b@example.net m
		done
		stop_listener
	done
	# and the child of --connect-command
	run ! deaf send --to b@example.net --connect-command 'exit 3' m
	assert_output --partial 'exit status 3'
}

@test "signals that the caller blocks end the listener all the same" {
	/usr/bin/python3 - "$BSMTP" <<-'END'
	import os, signal, subprocess, sys, time
	signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
	p = subprocess.Popen([sys.argv[1], "listen", "--discard", "--address-file", "addr", "127.0.0.1:0"])
	end = time.time() + 30
	while not os.path.exists("addr") and time.time() < end:
	    time.sleep(0.02)
	p.send_signal(signal.SIGTERM)
	assert p.wait(timeout=30) == 0
	END
}

@test "descriptors 0 to 2 that the caller has closed: nothing is written where it does not belong" {
	make_message >m
	mkdir out
	start_listener --eml out --reply 'RCPT no@*=550 5.1.1 nobody'
	for closed in '2>&-' '<&- 2>&-' '>&- 2>&-' '<&- >&- 2>&-'; do
		rm -f out/*
		eval "\"\$BSMTP\" send -v --server \$address --to no@example.net,b@example.net m $closed" || :
		sed 's/$/\r/' m | cmp - out/*.eml
	done
	eval '"$BSMTP" send --json --server $address --to b@example.net m <&- >&- 2>&-' || :
	stop_listener
	for closed in '2>&-' '<&- 2>&-' '>&- 2>&-' '<&- >&- 2>&-'; do
		rm -f addr
		eval "\"\$BSMTP\" listen -v --json --address-file addr --discard 127.0.0.1:0 $closed 3>&- &"
		pid=$!
		pids+=($pid)
		await test -s addr
		for _ in 1 2 3; do
			"$BSMTP" send --server "$(cat addr)" --to b@example.net m
		done
		kill -0 $pid
		kill $pid
		wait $pid
	done
}

@test "a call that fails on the way to the command: 451, and never another input" {
	hook <<-'END'
	#include <errno.h>
	#include <spawn.h>
	#include <stdlib.h>
	#include <string.h>
	static int fails(const char *name) { const char *f = getenv("FAILS"); return f != NULL && strcmp(f, name) == 0; }
	#include <dlfcn.h>
	int posix_spawn_file_actions_adddup2(posix_spawn_file_actions_t *a, int b, int c)
	{
		int (*real)(posix_spawn_file_actions_t *, int, int) = dlsym(RTLD_NEXT, "posix_spawn_file_actions_adddup2");
		return fails("dup2") ? ENOMEM : real(a, b, c);
	}
	int posix_spawn_file_actions_init(posix_spawn_file_actions_t *a)
	{
		int (*real)(posix_spawn_file_actions_t *) = dlsym(RTLD_NEXT, "posix_spawn_file_actions_init");
		return fails("init") ? ENOMEM : real(a);
	}
	int posix_spawnattr_init(posix_spawnattr_t *a)
	{
		int (*real)(posix_spawnattr_t *) = dlsym(RTLD_NEXT, "posix_spawnattr_init");
		return fails("attr") ? ENOMEM : real(a);
	}
	int posix_spawnattr_setflags(posix_spawnattr_t *a, short f)
	{
		int (*real)(posix_spawnattr_t *, short) = dlsym(RTLD_NEXT, "posix_spawnattr_setflags");
		return fails("flags") ? ENOMEM : real(a, f);
	}
	int posix_spawn(pid_t *p, const char *f, const posix_spawn_file_actions_t *a, const posix_spawnattr_t *t,
	    char *const *v, char *const *e)
	{
		int (*real)(pid_t *, const char *, const posix_spawn_file_actions_t *, const posix_spawnattr_t *,
		    char *const *, char *const *) = dlsym(RTLD_NEXT, "posix_spawn");
		return fails("spawn") ? EAGAIN : real(p, f, a, t, v, e);
	}
	END
	make_message >m
	may_complain=1
	for call in dup2 init attr flags spawn; do
		export FAILS=$call
		BSMTP=hooked start_listener --exec 'cat >>got'
		unset FAILS
		run -75 send --to b@example.net m
		assert_output --partial '451 4.3.0'
		stop_listener
	done
	[ ! -e got ]
}

@test "a shell that cannot fork does not lose the message" {
	make_message >m
	may_complain=1
	start_listener --exec 'exit 2'
	run -75 send --to b@example.net m
	assert_output --partial '451 4.3.0'
}

@test "one slow command keeps nobody waiting, and each is answered when it ends" {
	make_message >m
	start_listener --exec 'case $1 in slow*) until [ -e go ]; do read -r _ <pipe; done ;; esac; cat >>got'
	mkfifo pipe
	exec 9<>pipe
	for n in 1 2 3; do
		send --to "slow$n@example.net" m 9>&- 3>&- &
		pids+=($!)
	done
	for _ in 1 2 3; do
		timeout 20 "$BSMTP" send --server "$address" --to fast@example.net m 9>&-
	done
	for pid in "${pids[@]:1}"; do
		kill -0 "$pid"
	done
	touch go
	printf 'x\nx\nx\n' >&9
	wait "${pids[@]:1}"
}

@test "one session's commands never take all places" {
	make_message >m
	awk 'BEGIN { for (i = 0; i < 20; i++) print "From a Mon Nov 23 12:00:00 2026\nSubject: x\n\nx\n" }' >box
	mkfifo pipe
	exec 9<>pipe
	start_listener --exec 'case $1 in slow*) mkdir "run.$BSMTP_ID"; until [ -e go ]; do read -r _ <pipe; done ;; esac'
	send --from a@example.org --to slow@example.net box 9>&- 3>&- &
	slow=$!
	pids+=($slow)
	# The torture build has not room for more messages of a session.
	most=6
	[ "${BSMTP_BUILD:-}" != torture ] || most=2
	six() { [ "$(find . -name 'run.*' | wc -l)" -eq $most ]; }
	await six
	timeout 20 "$BSMTP" send --server "$address" --to fast@example.net m 9>&-
	six
	touch go
	yes | head -n 40 >&9
	wait $slow
}

@test "the second signal ends the listener at once, with its commands" {
	make_message >m
	start_listener --exec 'echo $$ >pid; exec sleep 600'
	send --to b@example.net m 2>said 3>&- &
	client=$!
	pids+=($client)
	await test -s pid
	kill "$listener_pid"
	begun=$SECONDS
	stopping() { ! bash -c "exec 8<>/dev/tcp/${address%:*}/${address##*:}" 2>/dev/null; }
	await stopping
	kill "$listener_pid"
	wait "$listener_pid"
	assert [ $((SECONDS - begun)) -lt 15 ]
	run ! kill -0 "$(cat pid)"
	said=0
	wait $client || said=$?
	assert_equal $said 75
}

@test "the first signal lets commands end, and their verdicts are told" {
	make_message >m
	mkfifo pipe
	exec 9<>pipe
	start_listener --exec 'cat >got; echo >started; read -r _ <pipe'
	send --to b@example.net m 9>&- 3>&- &
	client=$!
	pids+=($client)
	await test -s started
	kill "$listener_pid"
	echo >&9
	wait $client
	wait "$listener_pid"
}

@test "the environment of a command is clean" {
	make_message >m
	export BSMTP_TIMEOUT=60s BSMTP_HOSTNAME=h.example SSLKEYLOGFILE=$PWD/keys NOTIFY_SOCKET=@nobody \
		BASH_ENV=/nonexistent ENV=/nonexistent MINE=kept
	start_listener --exec 'env >env'
	send --to b@example.net m
	assert_equal "$(grep -c -e '^BSMTP_TIMEOUT' -e '^BSMTP_HOSTNAME' -e '^SSLKEYLOGFILE' -e '^NOTIFY_SOCKET' \
		-e '^BASH_ENV' -e '^ENV=' -e '^LD_' env)" 0
	assert_equal "$(grep '^BSMTP_' env | cut -d = -f 1 | sort | xargs)" \
		'BSMTP_ID BSMTP_PEER BSMTP_RECIPIENTS BSMTP_SENDER'
	grep -qx MINE=kept env
	grep -q '^PATH=' env
}

@test "a recipient that begins with - is refused there, and nowhere else" {
	make_message >m
	start_listener --exec 'printf "%s\n" "$@" >arguments'
	run -69 send --to -f@example.net,-/etc/passwd@example.net,b-c@example.net m
	assert_output --partial '553 5.1.3'
	assert_equal "$(cat arguments)" b-c@example.net
	stop_listener
	start_listener --maildir in
	send --to -f@example.net m
	assert_equal "$(stored)" 1
}

@test "mail that goes in a circle ends" {
	start_listener --exec 'cat >>got'
	received() { for _ in $(seq "$1"); do printf '%s: from x\n\tby y\n' "$2"; done; printf 'Subject: x\n\nReceived: no\n'; }
	received 100 Received | send --from a@example.org --to b@example.net
	received 101 'received' >m
	for how in '--framing bdat' '--framing data'; do
		# shellcheck disable=SC2086 # words
		run -69 send --from a@example.org --to b@example.net $how m
		assert_output --partial '554 5.4.6'
	done
	received 300 'X-Received' | send --from a@example.org --to b@example.net
	{ echo 'Subject: x'; echo; yes 'Received: x' | head -n 300; } | send --from a@example.org --to b@example.net
}

@test "commands leave no place for ids: BSMTP is not listed, and TRANSID not taken" {
	start_listener --exec 'cat >>got'
	printf '%s\r\n' 'BSMTP c' 'MAIL FROM:<a@x.example> TRANSID=<1.k@h>' 'EHLO c' QUIT |
		send --format raw >said
	run -1 grep -E '250[- ]BSMTP' said
	run -0 grep -c 555 said
	printf 'Subject: x\n\n' | "$BSMTP" send --transid --from a@example.org --to b@example.net -o batch
	send batch
	[ -s got ]
}

@test "--transids keeps them for commands, also over a restart and a kill" {
	make_message | "$BSMTP" send --transid --to r1@example.net,r2@example.net -o batch
	for end in 'kill' 'kill -9'; do
		rm -f got ids
		start_listener --exec 'cat >>got; printf "%s\n" "$@" >>who' --transids ids
		send batch
		send --json batch >sent.json
		assert_equal "$(jq -r 'select(.event == "message").reply.text' sent.json)" 'duplicate, already stored'
		$end "$listener_pid"
		wait "$listener_pid" || :
		start_listener --exec 'cat >>got; printf "%s\n" "$@" >>who' --transids ids
		send batch
		sed 's/<r2@/<r3@/' batch >other
		send other
		stop_listener
		assert_equal "$(xargs <who)" 'r1@example.net r2@example.net r3@example.net'
		assert_equal "$(stat -c %a ids)" 600
		rm who
	done
	# what failed is not known
	may_complain=1
	make_message | "$BSMTP" send --transid --to b@example.net -o batch
	start_listener --exec '[ -e good ] || exit 75; echo x >>runs' --transids ids
	run -75 send batch
	touch good
	send batch
	send batch
	assert_equal "$(wc -l <runs)" 1
	stop_listener
	for store in '--maildir in' '--discard'; do
		# shellcheck disable=SC2086 # words
		run -64 "$BSMTP" listen $store --transids ids
	done
}

@test "--stdio: the command has three descriptors, and none is the session's" {
	make_message >m
	program=$BSMTP
	cat >door <<-'END'
	exec /usr/bin/python3 -c 'import os, sys
os.closerange(3, 1024)
os.execv(sys.argv[1], sys.argv[1:])' "$REAL" listen --stdio --exec 'ls -l /proc/self/fd |
		sed -n "s/.* \([0-9]*\) -> .*/\1/p" | sort | xargs >fds' 2>err
	END
	REAL=$BSMTP "$BSMTP" send --to b@example.net --connect-command '. ./door' m
	assert_equal "$(cat fds)" '0 1 2 3'     # the last is the folder that ls reads
}

@test "one listener has a file of ids: a second one says so, and a command runs once" {
	make_message >m
	"$BSMTP" send --transid --to b@example.net -o batch m
	start_listener --exec 'cat >/dev/null; echo run >>got' --transids ids
	run -73 "$BSMTP" listen --exec 'cat >/dev/null; echo run >>got' --transids ids 127.0.0.1:0
	assert_output --partial 'ids: another process has it'
	send batch
	send batch
	assert_equal "$(wc -l <got)" 1
}

@test "a note that met a full disk is made later, and its id is known" {
	may_complain=1
	make_message >m
	for n in 1 2; do "$BSMTP" send --transid --to b@example.net -o batch$n m; done
	start_listener --exec 'cat >/dev/null; echo run >>got' --transids ids
	strace -qq -f -p "$listener_pid" -o trace -e trace=pwrite64 -e inject=pwrite64:error=ENOSPC:when=1 3>&- &
	tracer=$!
	pids+=($tracer)
	await grep -q "^TracerPid:.*[1-9]" "/proc/$listener_pid/status"
	send batch1
	await grep -q ENOSPC trace
	run -73 "$BSMTP" listen --exec true --transids ids 127.0.0.1:0
	send batch2
	await eval '[ "$(grep -c ^known ids)" -eq 2 ]'
	kill $tracer
	wait $tracer || :
	stop_listener
	start_listener --exec 'cat >/dev/null; echo run >>got' --transids ids
	send batch1
	send batch2
	assert_equal "$(wc -l <got)" 2
}

@test "a command that ended while we were stopped has its own verdict" {
	make_message >m
	"$BSMTP" send --transid --to b@example.net -o batch m
	start_listener --exec 'cat >/dev/null; sleep 1; echo run >>got' --transids ids --timeout 4s
	send batch 3>&- &
	client=$!
	pids+=($client)
	await pgrep -P "$listener_pid" >/dev/null
	kill -STOP "$listener_pid"
	await test -s got
	sleep 4         # the time that it may take is over
	kill -CONT "$listener_pid"
	wait $client
	assert_equal "$(wc -l <got)" 1
}

@test "a file that may not grow larger gives 452 in every store, and the listener lives on" {
	make_message >m
	{ make_message; head -c 300000 /dev/zero | tr '\0' 'x'; } >big
	for store in maildir eml mbox batch; do
		may_complain=1
		( ulimit -f 100; exec "$BSMTP" listen "--$store" in --address-file addr 127.0.0.1:0 ) >out 2>err 3>&- &
		listener_pid=$!
		pids+=($!)
		await test -s addr
		address=$(cat addr)
		run -75 send --to b@example.net big
		assert_output --partial 452
		send --to b@example.net m
		stop_listener
		rm -rf in in.* addr
	done
}

@test "more recipients than a command can get are put off, and come in time" {
	/usr/bin/python3 - >batch <<-'END'
	print("EHLO x\r\nMAIL FROM:<s@x.example> TRANSID=<1.k@h>\r")
	for i in range(900):
	    print("RCPT TO:<%s%04d@%s.%s.example>\r" % ("x" * 60, i, "a" * 60, "b" * 60))
	print("DATA\r\nSubject: x\r\n\r\nhi\r\n.\r")
	END
	start_listener --exec 'cat >/dev/null; printf "%s\n" "$BSMTP_RECIPIENTS" >>got' --transids ids
	n=0
	until send batch; do
		n=$((n + 1))
		[ $n -lt 5 ]
	done
	assert_equal "$(sort -u got | wc -l) $(wc -l <got)" '900 900'
}
