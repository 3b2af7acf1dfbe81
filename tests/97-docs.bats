#!/usr/bin/env bats
# The documents are true: their examples run, and they name what there is.
#
# Examples: the blocks fenced as sh in README.md, and those in the manuals, behind
# a comment "example: NAME"; all of one name run in one shell, in a folder of their
# own.  In front of the program stands a script that gives them free ports.  The
# paths below /usr in them are of that folder.
#
# shellcheck disable=SC2016,SC2020,SC2154 # what others expand; characters; bats sets it

bats_require_minimum_version 1.5.0

setup() {
	bats_load_library bats-support
	bats_load_library bats-assert
	TOP=$(cd "$BATS_TEST_DIRNAME/.." && pwd)
	BSMTP=${BSMTP:-$TOP/bsmtp}
	cd "$BATS_TEST_TMPDIR" || return 1
	unset XDG_STATE_HOME DEBIAN_FRONTEND
}

teardown() {
	[ ! -s pids ] || xargs kill <pids 2>/dev/null || :
}

# await CMD...: polls until it succeeds, for 30 seconds at most.
await() {
	local end=$((SECONDS + 30))
	until "$@"; do
		[ $SECONDS -lt $end ] || { echo "never: $*"; return 1; }
		read -rt 0.02 <> <(:) || :
	done
}

# same A B: as diff, which says what is not.
same() {
	diff "$1" "$2" || return 1
}

# --- Examples

# blocks NAME FILE: what stands behind the mark in a manual, as the reader sees it,
# or in README.md.
blocks() {
	awk -v name="$1" -v md="${2##*.}" '
		function marked() { return $0 ~ "example: " name "( |$)" }
		md != "md" && /^\.\\"/ { mark = mark || marked(); next }
		md != "md" && /^\.Bd/ { inside = mark; mark = 0; next }
		/^\.Ed/ { inside = 0 }
		md == "md" && /^<!-- / { mark = marked(); next }
		md == "md" && /^```sh$/ { inside = mark || name == "first" && !other; mark = 0; next }
		md == "md" && /^```/ { inside = 0 }
		md == "md" && /^## Doors/ { other = 1 }
		inside { gsub(/\\e/, "\\"); gsub(/\\&/, ""); print }' "$2"
}

# A listener of the program itself, which is killed in the end, its address in a file.
start() {
	local file=$1
	shift
	"$BSMTP" listen --address-file "$file" "$@" 127.0.0.1:0 2>>listener.err 3>&- &
	echo $! >>pids
	await test -s "$file"
}

# The folder that examples run in: mail, the program, a relay far away.
sandbox() {
	mkdir -p usr/local/bin usr/sbin home
	cat >usr/local/bin/bsmtp <<-'EOT'
	#!/bin/bash
	# The program, with free ports for those of the examples.
	address() {
		n=0
		until [ -s "$BOX/address.$1" ]; do
			n=$((n + 1))
			[ $n -lt 1500 ] || exit 99
			sleep 0.02
		done
		head -n 1 "$BOX/address.$1"
	}
	verb=$1
	case ${0##*/} in *sendmail) verb=sendmail ;; esac
	case " $verb $* " in
	*' --stdio '* | *' --address-file '* | *' --connect-command '* | *' --output '*) ;;
	' listen '*)
		args=("${@:2}")
		case "${args[-1]}" in *:2525) args[-1]=${args[-1]%:*}:0 ;; *) args+=(127.0.0.1:0) ;; esac
		set -- listen --address-file "$BOX/address.own" "${args[@]}"
		;;
	*' --server '*) ;;
	' send '* | ' sendmail '*)
		where=relay
		[ ! -e "$BOX/listens" ] || [ "$BSMTP_SERVER" = relay.example.net ] || where=own
		BSMTP_SERVER=$(address $where)
		export BSMTP_SERVER
		;;
	esac
	args=()
	for argument; do
		[ "$argument" != relay.example.net ] || argument=$(address relay)
		args+=("$argument")
	done
	[ "$verb" != listen ] || echo $$ >>"$BOX/pids"
	exec -a "$0" "$REAL" "${args[@]}"
	EOT
	chmod +x usr/local/bin/bsmtp
	export BOX=$PWD REAL=$BSMTP
	start address.relay --eml relay
	for i in 1 2; do
		printf 'From a@example.org Mon Nov 23 12:00:0%s 2026\n' $i
		printf 'From: a@example.org\nTo: b@example.net\nSubject: %s\n\nText.\n\n' $i
	done >archive.mbox
	printf 'From: a@example.org\nTo: b@example.net\nSubject: m\n\nText.\n' >message.eml
}

# run_examples NAME FILE: runs the blocks of that name; what they print is in out
# and err.
run_examples() {
	sandbox
	blocks "$1" "$2" | sed "s,/usr/,$PWD/usr/,g" >commands
	[ -s commands ]
	! grep 'bsmtp listen' commands | grep -qv -e --stdio -e --address-file || : >listens
	# a listener must not hold on to what bats waits for
	HOME=$PWD/home PATH="$PWD/usr/local/bin:$PATH" sh -eu commands >out 2>err 3>&- </dev/null
}

# at_relay: from, to and subject of what came there.
at_relay() {
	local f
	for f in relay/*.json; do
		jq -j '.from, " ", (.to | join(",")), " "' "$f"
		sed -n 's/^Subject: \(.*\)\r$/\1/p' "${f%.json}.eml"
	done
}

# A sendmail of another make, which notes what it is given.
other_sendmail() {
	printf '#!/bin/sh\necho "$*" >>"%s"\ncat >>"%s"\n' "$PWD/got.args" "$PWD/got.mail" \
		>usr/local/bin/sendmail
	chmod +x usr/local/bin/sendmail
}

# ssh to a host that has the same commands as this one.
other_ssh() {
	printf '#!/bin/sh\nshift\nexec sh -c "$*"\n' >usr/local/bin/ssh
	chmod +x usr/local/bin/ssh
}

@test "README.md: receive, send, and ask for the fates" {
	run_examples first "$TOP/README.md"
	assert_equal "$(cat err)" ''
	assert_equal "$(cat out)" "1 delivered
2 delivered"
	assert_equal "$(find inbox/new -type f | wc -l)" 4
}

@test "bsmtp(1): receive, send in each manner, learn, fall back, look on" {
	run_examples first "$TOP/man/bsmtp.1"
	# 2 from the mbox, 1 message, 2 as JSON, 2 in each of four manners, 2 and 2
	assert_equal "$(find inbox/new -type f | wc -l)" 17
	assert_equal "$(awk '/^[a-z]/ { print $1 }' out)" "lockstep
pipelining
early
bsmtp"
	grep -q '<- 214 ' out
	run grep -c ' -> BDAT' err
	assert_output 1
	assert_equal "$(cat home/.local/state/bsmtp/peers)" "$(cat address.own)"
}

@test "bsmtp(1): a script waits for the listener, which ends by itself" {
	run_examples script "$TOP/man/bsmtp.1"
	assert_equal "$(find received/new -type f | wc -l)" 2
	assert_equal "$(cat out err)" ''
}

@test "README.md and bsmtp(1): a batch now, sent later" {
	for f in README.md man/bsmtp.1; do
		rm -rf relay address.relay
		run_examples batch "$TOP/$f"
		assert_equal "$(at_relay)" 'a@example.org b@example.net m'
	done
}

@test "bsmtp(1): what was collected in a batch is sent on, envelopes and all" {
	run_examples collect "$TOP/man/bsmtp.1"
	assert_equal "$(at_relay)" 'a@example.org you@example.org 1
a@example.org you@example.org 2
a@example.org b@example.net m'
}

@test "README.md and bsmtp(1): over ssh" {
	for f in README.md man/bsmtp.1; do
		rm -rf inbox address.relay
		sandbox
		other_ssh
		rm -f address.relay
		run_examples ssh "$TOP/$f"
		assert_equal "$(find inbox/new -type f | wc -l)" 2
		assert_equal "$(cat out err)" ''
	done
}

@test "README.md and bsmtp(1): into another mail server" {
	for f in README.md man/bsmtp.1; do
		rm -rf got.* address.*
		sandbox
		other_sendmail
		rm -f address.relay
		run_examples exec "$TOP/$f"
		await test -s address.own
		"$BSMTP" send --server "$(cat address.own)" --to c@example.net,d@example.net message.eml
		assert_equal "$(cat got.args)" '-i -f a@example.org -- c@example.net d@example.net'
		assert_equal "$(tail -n 5 got.mail)" "$(cat message.eml)"
		assert_equal "$(head -n 1 got.mail | cut -d ' ' -f 1)" Received:
	done
}

@test "README.md and bsmtp(1): in place of sendmail" {
	for f in README.md man/bsmtp.1; do
		rm -rf relay address.relay usr
		run_examples sendmail "$TOP/$f"
		assert_equal "$(cat out err)" ''
		run -0 at_relay
		assert_output --partial ' you@example.org hello'
	done
	# as git calls it
	command=$(HOME=$PWD/home git config sendemail.sendmailCmd)
	BSMTP_SERVER=relay.example.net "$command" -i b@example.net <message.eml
	run -0 at_relay
	assert_line 'a@example.org b@example.net m'
}

@test "README.md: under TLS" {
	run_examples tls "$TOP/README.md"
	assert_equal "$(find inbox/new -type f | wc -l)" 2
}

@test "bsmtp(1): TLS for a trial" {
	run_examples trial "$TOP/man/bsmtp.1"
	assert_equal "$(cat out err)" ''
	assert_equal "$(find inbox/new -type f | wc -l)" 2
}

@test "bsmtp(1): TLS with certificates on both sides, and not without" {
	run_examples certificates "$TOP/man/bsmtp.1"
	assert_equal "$(find inbox/new -type f | wc -l)" 2
	run -77 "$BSMTP" send --server "$(cat address.own)" --starttls --ca mail.pem \
		--tls-name mail.example.net --to you@example.org archive.mbox
	assert_equal "$(find inbox/new -type f | wc -l)" 2
}

@test "bsmtp(1): TLS and a password, and not another" {
	run_examples password "$TOP/man/bsmtp.1"
	assert_equal "$(cat out err)" ''
	assert_equal "$(find inbox/new -type f | wc -l) $(stat -c %a password users | xargs)" '2 600 600'
	pin=$(grep -o 'sha256:.*' said)
	run -77 "$BSMTP" send --server "$(cat address.own)" --tls --pin "$pin" --user alice \
		--password-file archive.mbox --to you@example.org archive.mbox
	assert_equal "$(find inbox/new -type f | wc -l)" 2
}

@test "bsmtp(1): a batch that is sent until it has arrived, and once" {
	run_examples once "$TOP/man/bsmtp.1"
	assert_equal "$(cat out err)" ''
	"$BSMTP" send --server "$(cat address.relay)" evening.batch
	assert_equal "$(at_relay)" 'a@example.org b@example.net m'
}

@test "bsmtp(1): in the place where cron looks for it" {
	sandbox
	ln -s bsmtp usr/local/bin/sendmail
	blocks cron "$TOP/man/bsmtp.1" | sed "s,/usr/,$PWD/usr/,g" >usr/sbin/sendmail
	chmod +x usr/sbin/sendmail
	printf 'Subject: Cron\n\n.\nx\n' |
		env -i PATH="$PATH" BOX="$BOX" REAL="$REAL" LOGNAME=cron usr/sbin/sendmail -FCronDaemon \
			-i -B8BITMIME -oem b@example.net
	run -0 at_relay
	assert_output --regexp '^cron@[^ ]+ b@example.net Cron$'
	assert_equal "$(tail -n 2 relay/000001.eml | tr -d '\r' | xargs)" '. x'
}

@test "bsmtp(1): from a network, and from nowhere else" {
	sandbox
	blocks network "$TOP/man/bsmtp.1" >commands
	PATH="$PWD/usr/local/bin:$PATH" sh -eu commands >out 2>err 3>&- </dev/null &
	await test -s address.own
	address=$(cat address.own)
	assert_equal "${address%:*}" 0.0.0.0
	run -0 "$BSMTP" send --format raw --server "127.0.0.1:${address##*:}" /dev/null
	assert_output --partial '554 5.7.1'
}

@test "bsmtp(1): under systemd" {
	blocks socket "$TOP/man/bsmtp.1" >u.socket
	blocks service "$TOP/man/bsmtp.1" >u.service
	/usr/bin/python3 - "$BSMTP" <<-'EOT'
	# What systemd does with the two units, but for the user and the port.
	import configparser, os, signal, socket, subprocess, sys
	units = configparser.ConfigParser(interpolation=None)
	units.optionxform = str
	units.read(["u.socket", "u.service"])
	host, port = units["Socket"]["ListenStream"].split(":")
	service = units["Service"]
	os.makedirs("state/" + service["StateDirectory"])
	command = service["ExecStart"].replace("%S", "state").split()
	assert command[0] == "/usr/local/bin/bsmtp" and service["Type"] == "notify"
	manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
	manager.bind("manager")
	manager.settimeout(30)
	listening = socket.create_server((host, 0))
	port = listening.getsockname()[1]
	def before():
	    os.dup2(listening.fileno(), 3)
	    os.environ["LISTEN_PID"] = str(os.getpid())
	os.environ.update(LISTEN_FDS="1", NOTIFY_SOCKET=os.path.abspath("manager"))
	pid = os.fork()
	if pid == 0:
	    before()
	    os.execv(sys.argv[1], command)
	assert manager.recv(100) == b"READY=1"
	subprocess.run([sys.argv[1], "send", "--server", f"{host}:{port}", "--to", "b@example.net"],
	    input=b"Subject: x\n\nx\n", check=True)
	os.kill(pid, signal.SIGTERM)
	assert manager.recv(100) == b"STOPPING=1"
	assert os.waitpid(pid, 0)[1] == 0
	assert len(os.listdir("state/bsmtp/inbox/new")) == 1
	EOT
}

@test "bsmtp(1): completion of bash" {
	run_examples completion "$TOP/man/bsmtp.1"
	run -0 bash -c '. home/.local/share/bash-completion/completions/bsmtp
		COMP_WORDS=(bsmtp send --fra) COMP_CWORD=2
		_bsmtp
		echo "${COMPREPLY[@]}"'
	assert_output -- --framing
}

@test "bsmtp(3): the example compiles without a warning and delivers" {
	blocks compile "$TOP/man/bsmtp.3" >example.c
	run -0 cc -std=c11 -D_POSIX_C_SOURCE=200809L -Wall -Wextra -Wpedantic -Werror \
		-DBSMTP_NO_MAIN -I"$TOP" -o example example.c "$TOP/bsmtp.c"
	assert_output ''
	# both sides print when they like, the server with the CRs of the wire
	assert_equal "$(./example | tr -d '\r' | sort)" "$(printf '%s\n' '' delivered 'from alice@example.org' \
		'Hello, Bob.' 'Subject: hello' 'to bob@example.net' | sort)"
}

@test "bsmtp(7): each dialogue is what the listener says" {
	/usr/bin/python3 - "$BSMTP" "$TOP/man/bsmtp.7" <<-'EOT'
	import re, shlex, subprocess, sys
	program, page = sys.argv[1:]
	blocks = re.findall(r'^\.\\" example: dialogue(.*)\n\.Bd.*\n((?:.*\n)*?)\.Ed', open(page).read(), re.M)
	assert len(blocks) >= 6, len(blocks)
	opening = None
	for options, text in blocks:
	    stream, want, data = b"", [], False
	    for line in text.splitlines():
	        who, _, line = line.replace("\\&", "").partition(": ")
	        body = re.fullmatch(r"\((\d+) octets of body\)", line)
	        if who == "S":
	            want += opening if line == "(greeting and keywords, as above)" else [line]
	        elif body:
	            stream += b"Subject: x\r\n\r\n".ljust(int(body[1]) - 2, b"x") + b"\r\n"
	        else:
	            stream += line.encode() + b"\r\n"
	    opening = opening or want
	    said = subprocess.run([program, "listen", "--stdio", "--discard", "--hostname",
	        "server.example.net"] + shlex.split(options), input=stream, check=True,
	        stdout=subprocess.PIPE).stdout.decode().split("\r\n")[:-1]
	    assert said == want, (options, said, want)
	EOT
}

@test "bsmtp(7): the batch is what is written, and that of BITNET is read" {
	printf '%s\n' 'From: Alice <alice@example.org>' 'To: Bob <bob@example.net>' 'Subject: hello' '' \
		'.a line that begins with a dot' >m
	blocks written "$TOP/man/bsmtp.7" | sed 's/$/\r/' >want
	"$BSMTP" send --helo client.example.org -t --output - m | cmp - want
	blocks bitnet "$TOP/man/bsmtp.7" >old
	start address.own --eml in
	"$BSMTP" send --server "$(cat address.own)" old want
	assert_equal "$(jq -rj '.from, " ", .to[], "\n"' in/*.json)" \
		'ALICE@CUNYVM.CUNY.EDU BOB@EXAMPLE.NET
alice@example.org bob@example.net'
	sed 's/$/\r/' m | cmp - in/000002.eml
}

@test "README.md: the transcript" {
	grep -A 99 'example: transcript' "$TOP/README.md" | sed -n '/^    /p; /^## /q' | sed 's/^    //' >shown
	{
		printf 'From alice@example.org Mon Nov 23 12:00:00 2026\n'
		printf '%s\n' 'From: alice@example.org' 'To: bob@example.net' 'Subject: hello' '' 'Hello, Bob.' ''
		printf 'From alice@example.org Mon Nov 23 12:00:00 2026\n'
		printf '%s\n' 'From: alice@example.org' 'To: bob@example.net, nobody@example.net' \
			'Subject: hello again' '' 'Hello, both of you.' ''
	} >two.mbox
	start address.own --discard --hostname server.example.net \
		--reply 'RCPT nobody@*=550 5.1.1 no such user'
	arguments=$(sed -n '1s/^\$ bsmtp //p' shown)
	# shellcheck disable=SC2086 # words
	BSMTP_SERVER=$(cat address.own) run -69 --separate-stderr "$BSMTP" $arguments
	# Replies come when they come: each direction by itself, without times.
	for mark in '->' '<' 'bsmtp:'; do
		grep -- "^[ 0-9.]* *$mark" shown | sed 's/^ *[0-9.]* *//' >want
		grep -- "^[ 0-9.]* *$mark" <<<"$stderr" | sed 's/^ *[0-9.]* *//' >got
		[ -s want ]
		same want got
	done
	assert_equal "$(grep -c === shown)" 4
}

@test "README.md: two commands, and every link leads somewhere" {
	# What they call is here only noted.
	mkdir -p stub tests
	for name in apt-get make; do
		printf '#!/bin/sh\necho "$DEBIAN_FRONTEND|%s $*" >>calls\n' $name >stub/$name
	done
	printf '#!/bin/sh\nexec "$@"\n' >stub/sudo
	chmod +x stub/*
	cp "$TOP/tests/packages" tests
	grep '^    s=' "$TOP/README.md" >commands
	assert_equal "$(wc -l <commands)" 2
	PATH="$PWD/stub:$PATH" sh -eu commands
	assert_equal "$(cut -d ' ' -f 1-2 calls)" '|apt-get update
|apt-get install
|make 
|make demo
noninteractive|apt-get install
|make check'
	grep -q '^noninteractive.* postfix ' calls
	grep -q Postfix "$TOP/README.md"
	grep -oE '\]\([^)]*\)' "$TOP/README.md" | tr -d ']()' | while read -r link; do
		[ -e "$TOP/$link" ]
	done
}

# --- What there is is named

@test "the manuals are clean" {
	run -0 mandoc -Tlint -Wwarning "$TOP"/man/bsmtp.[137]
	assert_output ''
}

# section FILE TITLE: its source, to the next of its kind.
section() {
	awk -v title="$2" '
		/^\.Sh / { inside = $0 == ".Sh " title }
		/^\.Ss / && (sub_section || $0 == ".Ss " title) { inside = sub_section = $0 == ".Ss " title }
		inside' "$1"
}

# The options of a verb as --help has them, "name ARGUMENT" a line.
options_of() {
	"$BSMTP" "$1" --help | sed -n 's/^ [^-]*\(-., \)*--\([a-z0-9-]*\) *\([^ ]*\).*/\2 \3/p' | sort -u
}

@test "bsmtp(1) documents the options that --help shows, and no other, and their words" {
	for verb in send listen; do
		section "$TOP/man/bsmtp.1" "Options of $verb" >page
		options_of $verb >options
		[ "$(wc -l <options)" -gt 20 ]
		cut -d ' ' -f 1 options | sort -u >shown
		grep '^\.It ' page | sed -n 's/.*Fl -\([a-z0-9-]*\).*/\1/p' | sort -u >written
		same shown written
		"$BSMTP" $verb --help | grep -oE -- '--[a-z-]+ [a-z0-9-]+(\|[a-z0-9-]+)+' >worded
		while read -r option words; do
			for word in ${words//|/ }; do
				awk -v o="Fl -${option#--} " -v w="Cm $word" '
					/^\.It .*Fl/ { inside = index($0 " ", o) }
					inside && index($0 " ", w) { found = 1 }
					END { exit !found }' page || { echo "$verb $option $word"; return 1; }
			done
		done <worded
	done
}

@test "SYNOPSIS and usage agree" {
	# what the reader sees on one line each, without the manual's spacing
	mandoc -Tascii "$TOP/man/bsmtp.1" | col -b | awk '
		/^SYNOPSIS/ { inside = 1; next } /^[A-Z]/ { inside = 0 }
		inside && NF { $1 = $1; gsub(/ \| /, "|"); print }' >written
	"$BSMTP" --help | awk '/^ *(usage: )?bsmtp [a-z]+( [[a-z]|$)/ && !/--help/ {
		sub(/^usage:/, ""); $1 = $1; print }' >shown
	# whose usage nobody prints
	echo 'sendmail [options] [recipient ...]' >>shown
	[ "$(wc -l <shown)" -eq 6 ]
	same written shown
}

@test "bsmtp(1) documents the letters that sendmail takes, and no other" {
	section "$TOP/man/bsmtp.1" 'CALLED AS SENDMAIL' >page
	grep -E '^\.(It )?Fl' page | sed 's/Ar [a-z]*//g; s/Cm [A-Za-z]*//g' | tr -s ' ,' '\n\n' |
		grep -xE '[A-Za-z]' | sort -u >written
	sed -n 's/.*letters\[\] = "+\(.*\)";/\1/p' "$TOP/bsmtp.c" | tr -d : | fold -w 1 | sort -u >shown
	[ "$(wc -l <shown)" -gt 20 ]
	same written shown
	# what it says of the modes
	ln -s "$BSMTP" sendmail
	for refused in -q -q1h -bp -bi -bd -bt; do
		run -64 ./sendmail $refused b@example.net </dev/null
	done
	start address.relay --eml relay
	export BSMTP_SERVER
	BSMTP_SERVER=$(cat address.relay)
	printf 'From a Mon Nov 23 12:00:00 2026\nSubject: 1\n\nx\n.\ny\n' | ./sendmail -r '' -bm b@example.net
	printf 'Subject: 2\nTo: b@example.net\nBcc: c@example.net\n\nx\n' | ./sendmail -f a@example.org -t d@example.net
	printf 'EHLO c\r\nMAIL FROM:<a@example.org>\r\nRCPT TO:<b@example.net>\r\nDATA\r\nSubject: 3\r\n\r\n.\r\nQUIT\r\n' |
		./sendmail -bs >said
	"$BSMTP" send --output - --from a@example.org --to b@example.net <<<'Subject: 4' | ./sendmail -bS
	assert_equal "$(grep -c '^250 2.0.0 ' said)" 1
	assert_equal "$(at_relay)" ' b@example.net 1
a@example.org d@example.net,b@example.net,c@example.net 2
a@example.org b@example.net 3
a@example.org b@example.net 4'
	assert_equal "$(grep -cE 'y|Bcc' relay/000001.eml relay/000002.eml | xargs)" \
		'relay/000001.eml:0 relay/000002.eml:0'
}

@test "bsmtp(1) documents the environment that the program reads and gives" {
	grep -oE 'getenv\("[A-Z_]+"\)' "$TOP/bsmtp.c" | cut -d '"' -f 2 | sort -u >shown
	section "$TOP/man/bsmtp.1" ENVIRONMENT | grep '^\.It Ev' | grep -oE '[A-Z_]{2,}' | sort -u >written
	[ "$(wc -l <shown)" -gt 5 ]
	same shown written
	grep -oE 'variable\("[A-Z_]+"' "$TOP/bsmtp.c" | cut -d '"' -f 2 | sort -u >shown
	section "$TOP/man/bsmtp.1" STORES | sed -n 's/^\.Ev \([A-Z_]*\).*/\1/p' | sort -u >written
	[ "$(wc -l <shown)" -eq 4 ]
	same shown written
	# any long option, by its name
	for verb in send listen; do
		"$BSMTP" $verb --help | sed -n 's/^ [^-]*--\([a-z-]*\) [a-z0-9-]*|.*/\1/p' >worded
		[ -s worded ]
		while read -r name; do
			run -64 env "BSMTP_$(tr a-z- A-Z_ <<<"$name")=no-such-word" "$BSMTP" $verb
			assert_output --partial "environment: $name no-such-word"
		done <worded
	done
}

@test "what precedes the text in each store is what bsmtp(1) says" {
	start address.maildir --maildir maildir
	start address.eml --eml eml
	start address.mbox --mbox mbox
	start address.batch --batch batch
	start address.exec --exec 'cat >exec; env >env'
	printf 'From: a@example.org\n\n>From x\nText.\n' >m
	for store in maildir eml mbox batch exec; do
		"$BSMTP" send --server "$(cat address.$store)" --to b@example.net,c@example.net m
	done
	front() { sed '/^From: a/,$d' "$@" | sed -n 's/^\([A-Za-z-]*\).*/\1/p' | grep . | xargs; }
	assert_equal "$(front maildir/new/*)" 'Return-Path Delivered-To Delivered-To Received'
	assert_equal "$(front eml/*.eml)" ''
	assert_equal "$(front mbox)" 'From Return-Path Delivered-To Delivered-To Received'
	assert_equal "$(front batch)" 'EHLO MAIL RCPT RCPT DATA'
	assert_equal "$(front exec)" 'Received'
	sed -n '/^From: a/,$p' maildir/new/* | cmp - m
	sed 's/$/\r/' m | cmp - eml/000001.eml
	sed -n '/^From: a/,/^Text/p' mbox | sed 's/^>>From/>From/' | cmp - m
	sed -n '/^From: a/,$p' exec | cmp - m
	[ -e mbox.journal ] && [ -e batch.journal ]
	grep -qx 'BSMTP_SENDER=a@example.org' env
	assert_equal "$(grep -A 1 '^BSMTP_RECIPIENTS=' env | xargs)" 'BSMTP_RECIPIENTS=b@example.net c@example.net'
}

@test "every exit status of the program is documented" {
	section "$TOP/man/bsmtp.1" 'EXIT STATUS' | grep '^\.It' | grep -oE '[0-9]+' | sort -u >written
	# the numbers of sysexits.h, for the names that bsmtp.c uses
	grep -oE '\bEX_[A-Z]+\b' "$TOP/bsmtp.c" | sort -u >names
	{ echo '#include <sysexits.h>'; sed 's/.*/&=&/' names; } | sed 's/^\(EX_[A-Z]*\)=/"\1" /' |
		cc -E -P - | awk '/^"EX_/ { print $2 }' | sort -u >shown
	[ "$(wc -l <shown)" -ge 10 ]
	run comm -13 written shown
	assert_output ''
	run comm -23 written shown
	assert_output ''
}

@test "every JSON field that either side prints is documented, and the words in them" {
	printf 'From: a@example.org\nTo: b@example.net\n\nText.\n' >message.eml
	start address --json --once --deadline 60s --discard >listen.json
	run -0 --separate-stderr "$BSMTP" send --json -t --server "$(cat address)" message.eml
	echo "$output" >send.json
	await grep -q '"session"' listen.json
	section "$TOP/man/bsmtp.1" 'JSON LINES' >page
	sed -n 's/^\.Va \([a-z_]*\).*/\1/p' page | sort -u >written
	jq -r '.. | objects | keys[]' send.json listen.json | sort -u >shown
	[ "$(wc -l <shown)" -gt 25 ]
	same shown written
	for word in $(grep -oE 'report_opening\(s, [^)]*\)' "$TOP/bsmtp.c" | grep -oE '"[a-z]+"' | tr -d '"') \
		$(awk '/bsmtp_end_name\(enum/ { inside = 1 } inside && /words/ { print; exit }' "$TOP/bsmtp.c" |
			grep -oE '"[a-z]+"' | tr -d '"'); do
		# a session that is reported has ended
		[ "$word" = open ] || grep -q "^\.Ql $word\b" page || { echo "$word"; return 1; }
	done
}

@test "bsmtp(3) names every function of bsmtp.h, and what the engines ask and tell" {
	# not what a comment says
	cc -E -P "$TOP/bsmtp.h" | grep -v typedef | grep -oE '\bbsmtp_[a-z0-9_]+\(' | tr -d '(' | sort -u >declared
	[ "$(wc -l <declared)" -gt 50 ]
	grep -oE '^\.(It )?Fn bsmtp_[a-z0-9_]+' "$TOP/man/bsmtp.3" | sed 's/.* //' | sort -u >written
	# but for bsmtp_*_parse, which is no one function
	grep -vx 'bsmtp_' written | same declared -
	grep -oE '^	BSMTP_(WANT|CLIENT|SERVER)_[A-Z]+\b' "$TOP/bsmtp.h" | tr -d '\t' | grep -v _MIN | sort -u >declared
	grep -oE '^\.It Dv BSMTP_[A-Z_]+' "$TOP/man/bsmtp.3" | sed 's/.* //' | sort -u >written
	[ "$(wc -l <declared)" -gt 20 ]
	same declared written
}

@test "make install puts all under the name it is told, and uninstall takes it away" {
	mkdir tree
	cp -R "$TOP/Makefile" "$TOP/bsmtp.c" "$TOP/bsmtp.h" "$TOP/man" tree
	cp "$BSMTP" tree/bsmtp
	touch tree/bsmtp
	set -- -s -C tree DESTDIR="$PWD/root" PREFIX=/opt PROGRAM=x
	make "$@" install
	(cd root && find . -type f | sort) >there
	run -0 cat there
	assert_output './opt/bin/x
./opt/share/bash-completion/completions/x
./opt/share/fish/vendor_completions.d/x.fish
./opt/share/man/man1/x.1
./opt/share/man/man3/x.3
./opt/share/man/man7/x.7
./opt/share/zsh/site-functions/_x'
	assert_equal "$(root/opt/bin/x version)" "bsmtp $(sed -n 's/.*BSMTP_VERSION "\(.*\)"/\1/p' "$TOP/bsmtp.h")"
	cmp root/opt/share/man/man7/x.7 "$TOP/man/bsmtp.7"
	grep -q 'complete .* x$' root/opt/share/bash-completion/completions/x
	run -1 grep -l 'complete -c bsmtp' -r root
	make "$@" uninstall
	assert_equal "$(find root -type f)" ''
}

@test "CHANGES.md has this version, and says what is not in it" {
	grep -qx "## $(sed -n 's/.*BSMTP_VERSION "\(.*\)"/\1/p' "$TOP/bsmtp.h")" "$TOP/CHANGES.md"
	grep -qx 'Specified in bsmtp(7) and not in this version: the journal.' "$TOP/CHANGES.md"
	grep -A 1 '^implements both sides' "$TOP/man/bsmtp.7" | grep -q 'journal'
	run -1 grep journal <(options_of send)
}
