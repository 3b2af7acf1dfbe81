#!/usr/bin/env bats
# Once and only once: TRANSID, and what may be repeated by others: early data, octets
# in a SYN.

load lib

make_certificate() {
	openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout key.pem \
		-out cert.pem -days 2 -subj /CN=localhost \
		-addext subjectAltName=DNS:localhost,IP:127.0.0.1 2>/dev/null
}

# A batch of N messages, each with its own TRANSID.
make_batch() { make_mbox "$1" | "$BSMTP" send --transid --to bob@example.net -o batch; }

# How many messages with each subject are stored by the listener of $store.
count_subjects() {
	case $store in
	maildir) cat in/new/* ;;
	eml) cat in/*.eml ;;
	mbox | batch) cat in ;;
	esac | tr -d '\r' | grep -a '^Subject: message ' | sort | uniq -c
}

@test "a message has an id, made of a key of the run and its number" {
	start_listener --json --maildir in
	make_mbox 2 | send --transid --json --to bob@example.net >sent.json
	run -0 jq -r 'select(.event == "message") | .transid' sent.json
	assert_line --index 0 --regexp '^<1\.[0-9a-f]{24}@[^>]+>$'
	assert_line --index 1 --regexp '^<2\.[0-9a-f]{24}@[^>]+>$'
	stop_listener
	run -0 diff <(jq -r 'select(.event == "message") | .transid' sent.json) \
		<(jq -r 'select(.event == "message") | .transid' listener.out)
}

@test "without --transid there is none" {
	start_listener --json --maildir in
	make_message | send --to bob@example.net --json >sent.json
	stop_listener
	assert_equal "$(jq -r 'select(.event == "message") | .transid' sent.json listener.out | sort -u)" null
	[ ! -e in/bsmtp.journal ]
}

@test "what comes again is delivered, and stored once" {
	make_batch 3
	for store in maildir eml mbox batch; do
		start_listener --json "--$store" in
		send batch
		send --json batch >sent.json
		assert_equal "$(summary delivered)" 3
		run -0 jq -r 'select(.event == "message") | .reply.text' sent.json
		assert_line --index 2 'duplicate, already stored'
		stop_listener
		assert_equal "$(jq -c 'select(.event == "message") | [.duplicate, .file == null]' listener.out |
			sort | uniq -c | tr -s ' ' | paste -sd,)" ' 3 [false,false], 3 [true,true]'
		assert_equal "$(count_subjects | grep -c ' 1 Subject')" 3
		# and by another run
		start_listener "--$store" in
		send batch
		stop_listener
		assert_equal "$(count_subjects | grep -c ' 1 Subject')" 3
		rm -rf in in.*
	done
}

# --- An id is of a message and each of its recipients

# One message to r1 ... rN, with an id.
make_letter() {
	make_message | "$BSMTP" send --transid --to "$(seq -f 'r%.0f@example.net' -s , 1 "$1")" -o batch
}
# who_has: each recipient of what is stored, sorted, a line for each time.
who_has() {
	case $store in
	maildir) cat in/new/* ;;
	eml) jq -r '"Delivered-To: " + .to[]' in/*.json ;;
	mbox) cat in ;;
	batch) sed -n 's/^RCPT TO:<\(.*\)>.*/Delivered-To: \1/p' in ;;
	esac | sed -n 's/^Delivered-To: //p' | tr -d '\r' | sort
}
# all_have N: r1 to rN have it, and once.
all_have() { seq -f 'r%.0f@example.net' 1 "$1" | sort | diff - <(who_has); }

@test "a recipient that was put off gets the message at the retry, and no other gets it again" {
	for store in maildir eml mbox batch; do
		for rule in 'RCPT#2=450 4.2.1 later' 'RCPT#1=452 4.5.3 too many' 'RCPT#3=421 4.3.2 stop'; do
			make_letter 3
			may_complain=1
			start_listener "--$store" in --reply "$rule"
			run -75 send batch
			send --json batch >sent.json
			assert_equal "$(summary delivered)" 1
			send batch
			stop_listener
			all_have 3
			rm -rf in in.*
		done
	done
}

@test "the loop of the manual: until it has arrived, each recipient once" {
	store=mbox
	make_letter 9
	start_listener --mbox in --reply 'RCPT#2=450 4.2.1 later' --reply 'RCPT#7=450 4.2.1 later' \
		--reply 'RCPT#11=451 4.3.0 later' --reply 'BODY#2=451 4.3.0 later'
	rounds=0
	until send batch 2>/dev/null; do
		rounds=$((rounds + 1))
		[ $rounds -lt 20 ]
	done
	all_have 9
}

@test "a message that is split for RCPTMAX reaches every recipient in one run" {
	make_letter 5
	for how in '--mode bsmtp' '--mode bsmtp --framing data' '--mode lockstep' '--mode pipelining' \
		'--mode pipelining --framing data' '--mode early'; do
		for store in maildir batch; do
			start_listener "--$store" in --max-recipients 2
			# shellcheck disable=SC2086 # words
			send $how batch
			# shellcheck disable=SC2086 # words
			send $how batch
			stop_listener
			all_have 5
			rm -rf in in.*
		done
	done
}

@test "a split leaves what is on its way to the server as it is" {
	local n
	for n in 1 2 3 4; do
		{ printf 'Subject: %s\n\n' $n; seq $n$n $((SCALE > 10 ? n * 10000 : n * 1000)); } >m.$n
	done
	start_listener --eml in --max-recipients 2
	send --to a@x.example,b@x.example,c@x.example,d@x.example,e@x.example m.1 m.2 m.3 m.4
	stop_listener
	for n in 1 2 3 4; do
		assert_equal "$(for file in in/*.eml; do tr -d '\r' <"$file" | cmp -s - m.$n && echo $n; done | wc -l)" 3
	done
	assert_equal "$(cat in/*.json | jq -r '.to[]' | sort | uniq -c | awk '{ print $1 }' | uniq)" 4
}

@test "a split whose temporary file meets a full disk sends nothing of the message" {
	local n failed=0
	{ printf 'Subject: x\n\n'; seq $((SCALE > 10 ? 40000 : 4000)); } >m
	start_listener --maildir in --max-recipients 2
	for n in 1 2 3 5; do
		rm -f in/new/*
		run strace -qq --seccomp-bpf -f -o /dev/null -e trace=write -e inject=write:error=ENOSPC:when=$n \
			"$BSMTP" send --server "$address" --to a@x.example,b@x.example,c@x.example m
		[ "$status" -eq 0 ] || failed=$((failed + 1))
		for file in in/new/*; do
			[ ! -e "$file" ] || sed '1,/^Subject/d' "$file" | cmp - <(sed 1d m)
		done
	done
	assert [ $failed -gt 0 ]
}

@test "the same transaction twice in one stream is stored once" {
	make_letter 2
	for store in maildir eml mbox batch; do
		start_listener "--$store" in
		send --json batch batch batch >sent.json
		assert_equal "$(summary delivered)" 3
		stop_listener
		all_have 2
		rm -rf in in.*
	done
}

@test "what is known is taken again, whatever would be said of it now" {
	printf 'Subject: x\n\n%0100d\n' 0 >m
	store=maildir
	"$BSMTP" send --transid --to r1@example.net,r2@example.net -o batch m
	start_listener --maildir in
	send batch
	stop_listener
	for now in '--max-size 10' '--max-recipients 1' '--reply RCPT=550_5.1.1_gone' '--reply BODY=554_5.6.0_no' \
		'--reply RCPT#2=450_4.2.1_later'; do
		start_listener --json --maildir in ${now%% *} "$(tr _ ' ' <<<"${now#* }")"
		send --json batch >sent.json
		assert_equal "$(jq -r 'select(.event == "message").reply.text' sent.json | sort -u)" \
			'duplicate, already stored'
		stop_listener
		assert_equal "$(jq -r 'select(.event == "message" and .duplicate and .octets > 100).to[]' listener.out |
			paste -sd,)" r1@example.net,r2@example.net
	done
	all_have 2
}

@test "for who is new a known message is judged, and stored" {
	make_letter 2
	store=maildir
	start_listener --maildir in --json
	send batch
	sed -i 's/<r2@/<r3@/' batch
	send batch
	stop_listener
	all_have 3
	assert_equal "$(jq -c 'select(.event == "message").to' listener.out)" '["r1@example.net","r2@example.net"]
["r3@example.net"]'
	start_listener --maildir in --max-size 10
	sed -i 's/<r3@/<r4@/' batch
	run -69 send batch
	assert_output --partial '552 5.3.4'
	all_have 3
}

@test "a domain is the same in any case, a local part is not" {
	make_letter 1
	store=maildir
	start_listener --maildir in
	send batch
	sed -i 's/<r1@example.net>/<r1@EXAMPLE.Net>/' batch
	send batch
	assert_equal "$(stored)" 1
	sed -i 's/<r1@/<R1@/' batch
	send batch
	assert_equal "$(stored)" 2
}

@test "the journal is written anew while the listener runs, and forgets what is too old" {
	long=$(printf '%060d' 0)
	seq -f "%.0f.$long@$long.$long.$long.example" -s , 1 20 >to
	awk -v n=$((SCALE * 2)) 'BEGIN { for (i = 0; i < n; i++) print "From a Mon Nov 23 12:00:00 2026\nSubject: x\n\n" }' >box
	start_listener --maildir in --remember 1s --max-recipients 20
	later() { [ "$(date +%s)" -gt $((now + 2)) ]; }
	for _ in 1 2 3 4 5; do
		"$BSMTP" send --from a@x.example --to "$(cat to)" --transid -o batch box
		send batch
		now=$(date +%s)
		await later
	done
	each=$((SCALE * 2 * 20 * 300))
	assert [ "$(stat -c %s in/bsmtp.journal)" -lt $((2 * each + 2 * (1 << 20))) ]
	assert [ "$(grep -c '^for\|^known' in/bsmtp.journal)" -ge $((SCALE * 2 * 20)) ]
	stop_listener
	start_listener --maildir in
	send batch
	assert_equal "$(stored)" $((SCALE * 10))
}

@test "with --discard what comes again in the same run is known" {
	make_batch 1
	start_listener --json --discard
	send batch
	send batch
	stop_listener
	assert_equal "$(jq -c 'select(.event == "message") | .duplicate' listener.out | paste -sd,)" false,true
}

@test "an id is forgotten after --remember" {
	make_batch 1
	start_listener --maildir in --remember 1s
	send batch
	since=$(sed -n 's/^group \([0-9]*\) .*/\1/p' in/bsmtp.journal)
	old_enough() { [ "$(date +%s)" -gt $((since + 1)) ]; }
	await old_enough
	send batch
	stop_listener
	assert_equal "$(stored)" 2
}

@test "the same id, under way in another session, is put off" {
	start_listener --maildir in
	/usr/bin/python3 - "${address##*:}" <<-'EOF'
	import socket, sys
	def talk(text):
	    s = socket.create_connection(('127.0.0.1', int(sys.argv[1])))
	    f = s.makefile('rwb')
	    f.write(text)
	    f.flush()
	    return f
	def last(f, n):
	    for _ in range(n):
	        line = f.readline()
	        while line[3:4] == b'-':
	            line = f.readline()
	    return line
	first = talk(b'BSMTP a\r\nMAIL FROM:<a@x> TRANSID=<1.k@a>\r\nRCPT TO:<b@y>\r\nBDAT 3\r\nx\r\n')
	assert last(first, 5).startswith(b'250')
	second = talk(b'BSMTP a\r\nMAIL FROM:<a@x> TRANSID=<1.k@a>\r\nRCPT TO:<b@y>\r\nBDAT 2 LAST\r\n\r\n')
	line = last(second, 5)
	assert line.startswith(b'451 4.3.0'), line
	first.write(b'BDAT 2 LAST\r\n\r\n')
	first.flush()
	assert last(first, 1).startswith(b'250'), line
	second.write(b'MAIL FROM:<a@x> TRANSID=<1.k@a>\r\nRCPT TO:<b@y>\r\nBDAT 2 LAST\r\n\r\n')
	second.flush()
	line = last(second, 3)
	assert line.startswith(b'250 2.0.0 duplicate'), line
	EOF
	assert_equal "$(stored)" 1
}

@test "a message given up in the middle leaves its id free" {
	start_listener --maildir in
	printf '%s\r\n' 'BSMTP a' 'MAIL FROM:<a@x> TRANSID=<7.k@a>' 'RCPT TO:<b@y>' 'BDAT 99' x |
		"$BSMTP" send --server "$address" --format raw --timeout 1 >/dev/null || :
	printf '%s\r\n' 'BSMTP a' 'MAIL FROM:<a@x> TRANSID=<7.k@a>' 'RCPT TO:<b@y>' 'BDAT 2 LAST' '' QUIT |
		"$BSMTP" send --server "$address" --format raw >said
	run -0 grep -c 'stored$' said
	assert_equal "$(stored)" 1
}

# The listener is killed in the stream, again and again, each time when so many more
# messages are reported delivered; then all is sent once more: each is there once.
killed_and_retried() {
	store=$1
	local n=$((SCALE * 10)) round cut=0
	make_batch "$n"
	for round in 1 2 3 4 5 6 7 8; do
		start_listener "--$store" in
		send --json --timeout 20 batch 2>sent.err |
			/usr/bin/python3 "$top/tests/tools/kill_after.py" "$listener_pid" $((n * round / 9)) &&
			cut=$((cut + 1))
		wait "$listener_pid" || :
	done
	assert_equal "$cut" 8
	start_listener "--$store" in
	send --json batch >sent.json
	stop_listener
	assert_equal "$(summary delivered)" "$n"
	assert_equal "$(count_subjects | grep -c ' 1 Subject')" "$n"
	assert_equal "$(count_subjects | wc -l)" "$n"
}

@test "killed again and again, a Maildir has each message once" { may_complain=1 killed_and_retried maildir; }
@test "killed again and again, an mbox has each message once" { may_complain=1 killed_and_retried mbox; }
@test "killed again and again, a batch has each message once" { may_complain=1 killed_and_retried batch; }
@test "killed again and again, --eml has each message once" { may_complain=1 killed_and_retried eml; }

# listen_too: a second listener at the store of the first, its address in $other.
listen_too() {
	rm -f other.addr
	"$BSMTP" listen --address-file other.addr "$@" 127.0.0.1:0 2>other.err 3>&- &
	pids+=($!)
	other_pid=$!
	await test -s other.addr
	other=$(cat other.addr)
}

@test "two listeners at one store share its ids, also when one ends and another begins" {
	make_batch 3
	for store in maildir eml mbox batch; do
		start_listener "--$store" in
		listen_too "--$store" in
		send batch
		"$BSMTP" send --server "$other" --json batch >sent.json
		assert_equal "$(jq -r 'select(.event == "message").reply.text' sent.json | sort -u)" 'duplicate, already stored'
		stop_listener
		start_listener "--$store" in
		# what the second stores is known to the third
		make_batch 3
		"$BSMTP" send --server "$other" batch
		send batch
		kill "$other_pid"
		wait "$other_pid"
		stop_listener
		assert_equal "$(count_subjects | grep -c ' 2 Subject')" 3
		assert_equal "$(cat other.err)" ''
		rm -rf in in.*
	done
}

@test "a listener that cannot have the journal at once reads it when it can" {
	make_batch 3
	start_listener --maildir in
	send batch
	stop_listener
	/usr/bin/python3 "$top/tests/tools/store_lock.py" in/bsmtp.journal held release '' 3>&- &
	pids+=($!)
	await test -e held
	"$BSMTP" listen --address-file addr2 --maildir in 127.0.0.1:0 2>second.err 3>&- &
	pids+=($!)
	touch release
	await test -s addr2
	"$BSMTP" send --server "$(cat addr2)" batch
	assert_equal "$(stored)" 3
}

@test "early data: the stream goes with the ClientHello, one turnaround in all" {
	make_certificate
	start_listener --tls --early-data --cert cert.pem --key key.pem --maildir in
	make_message >message
	send --tls --ca cert.pem --tickets ticket --early-data --to b@example.net -v message 2>first.err
	assert_equal "$(stat -c %a ticket)" 600
	send --tls --ca cert.pem --tickets ticket --early-data --to b@example.net --json -v message \
		>sent.json 2>second.err
	run -1 grep 'early data' first.err
	run -0 grep -c 'early data: accepted' second.err
	assert_equal "$(summary turnarounds)" 1
	assert_equal "$(stored)" 2
}

@test "early data that is more than fits goes on behind the handshake" {
	make_certificate
	start_listener --tls --early-data --cert cert.pem --key key.pem --maildir in
	make_message | send --tls --ca cert.pem --tickets ticket --early-data --to b@example.net
	make_mbox 20 | send --tls --ca cert.pem --tickets ticket --early-data --to b@example.net -v --json \
		>sent.json 2>sent.err
	run -0 grep -c 'early data: accepted' sent.err
	assert_equal "$(summary delivered)" 20
	assert_equal "$(stored)" 21
}

@test "early data of which a record must wait in mid-way: all the same" {
	make_certificate
	start_listener --tls --early-data --cert cert.pem --key key.pem --maildir in
	make_mbox 5 >m
	# As with Fast Open, when the SYN has taken what it can.
	for n in 1 2 3; do
		make_message | send --tls --ca cert.pem --tickets ticket --early-data --to b@example.net
		ASAN_OPTIONS=detect_leaks=0 strace -qqo calls -e trace=write -e inject=write:error=EAGAIN:when="$n" \
			"$BSMTP" send --server "$address" --tls --ca cert.pem --tickets ticket --early-data \
			--to b@example.net m
		run -0 grep -c INJECTED calls
		assert_equal "$(stored)" $((n * 6))
	done
}

@test "early data that is not taken is sent again: nothing lost, nothing doubled" {
	make_certificate
	start_listener --tls --early-data --cert cert.pem --key key.pem --maildir in
	make_message | send --tls --ca cert.pem --tickets ticket --early-data --to b@example.net
	stop_listener
	start_listener --tls --early-data --cert cert.pem --key key.pem --maildir in
	sed -i "1s/.*/$address/" ticket
	make_mbox 20 | send --tls --ca cert.pem --tickets ticket --early-data --to b@example.net -v --json \
		>sent.json 2>sent.err
	run -0 grep -c 'early data: not accepted' sent.err
	assert_equal "$(summary delivered)" 20
	assert_equal "$(stored)" 21
}

@test "a flight of early data, repeated 100 times by somebody else, stores its message once" {
	make_certificate
	start_listener --tls --early-data --cert cert.pem --key key.pem --maildir in
	make_message | send --tls --ca cert.pem --tickets ticket --early-data --to b@example.net
	/usr/bin/python3 "$top/tests/tools/flight.py" "$address" 100 >relay 3>&- &
	relay=$!
	await test -s relay
	sed -i "1s/.*/127.0.0.1:$(cat relay)/" ticket
	make_message | "$BSMTP" send --server "127.0.0.1:$(cat relay)" --tls --ca cert.pem --tickets ticket \
		--early-data --to b@example.net -v 2>sent.err
	run -0 grep -c 'early data: accepted' sent.err
	wait "$relay"
	[ "$(tail -n 1 relay)" -gt 500 ]
	assert_equal "$(stored)" 2
}

@test "without --early-data the listener takes none" {
	make_certificate
	start_listener --tls --cert cert.pem --key key.pem --maildir in
	make_message | send --tls --ca cert.pem --tickets ticket --early-data --to b@example.net
	make_message | send --tls --ca cert.pem --tickets ticket --early-data --to b@example.net -v 2>sent.err
	run -1 grep 'early data' sent.err
	run -0 grep -c resumed sent.err
	assert_equal "$(stored)" 2
}

@test "--early-data needs --tls and --tickets" {
	run -64 "$BSMTP" send --early-data --to b@example.net /dev/null
	assert_output --partial '--tls'
	run -64 "$BSMTP" send --tls --early-data --to b@example.net /dev/null
	assert_output --partial '--tickets'
	run -64 "$BSMTP" send --tls --early-data --tickets t --user u --password-file p --to b@example.net /dev/null
	assert_output --partial '--user'
	run -64 "$BSMTP" listen --early-data
	assert_output --partial '--tls'
}

@test "TCP Fast Open: the opening is in the SYN, and the message waits for its reply" {
	cat >inside <<-'EOF'
	set -e
	ip link set lo up
	sysctl -qw net.ipv4.tcp_fastopen=3
	"$BSMTP" listen --fastopen --address-file addr --maildir in 127.0.0.1:0 &
	listener=$!
	until [ -s addr ]; do read -rt 0.02 <> <(:) || :; done
	for n in 1 2; do
		printf 'Subject: x\n\n' | "$BSMTP" send --fastopen --grace 0 -s "$(cat addr)" -f a@x --to b@y --json >sent.json
	done
	kill $listener
	wait $listener
	awk '/^TcpExt:/ { if (!seen++) split($0, names); else for (i = 2; i <= NF; i++)
		if (names[i] ~ /^TCPFastOpen(Active|Passive)$/) print names[i], $i }' /proc/net/netstat
	EOF
	BSMTP=$BSMTP run -0 unshare -n bash inside
	assert_line 'TCPFastOpenActive 1'
	assert_line 'TCPFastOpenPassive 1'
	assert_equal "$(stored)" 2
	assert_equal "$(summary turnarounds)" 2
	assert_equal "$(jq -r 'select(.event == "message") | .transid != null' sent.json)" true
}

@test "TCP Fast Open with early data: the message is in the SYN" {
	make_certificate
	cat >inside <<-'EOF'
	set -e
	ip link set lo up
	sysctl -qw net.ipv4.tcp_fastopen=3
	"$BSMTP" listen --fastopen --tls --early-data --cert cert.pem --key key.pem --address-file addr \
		--maildir in 127.0.0.1:0 &
	listener=$!
	until [ -s addr ]; do read -rt 0.02 <> <(:) || :; done
	for n in 1 2; do
		printf 'Subject: x\n\n' | "$BSMTP" send --fastopen --tls --ca cert.pem --tickets ticket --early-data \
			-s "$(cat addr)" -f a@x --to b@y --json -v >sent.json 2>sent.err
	done
	kill $listener
	wait $listener
	awk '/^TcpExt:/ { if (!seen++) split($0, names); else for (i = 2; i <= NF; i++)
		if (names[i] ~ /^TCPFastOpen(Active|Passive)$/) print names[i], $i }' /proc/net/netstat
	EOF
	BSMTP=$BSMTP run -0 unshare -n bash inside
	assert_line 'TCPFastOpenActive 1'
	assert_line 'TCPFastOpenPassive 1'
	assert_equal "$(stored)" 2
	run -0 grep -c 'early data: accepted' sent.err
	assert_equal "$(summary turnarounds)" 1
	assert_equal "$(jq -r 'select(.event == "message") | .transid != null' sent.json)" true
}

@test "TCP Fast Open: a transaction in the SYN needs a TRANSID" {
	cat >inside <<-'EOF'
	set -e
	ip link set lo up
	sysctl -qw net.ipv4.tcp_fastopen=3
	"$BSMTP" listen --fastopen --address-file addr --maildir in 127.0.0.1:0 &
	listener=$!
	until [ -s addr ]; do read -rt 0.02 <> <(:) || :; done
	printf 'Subject: x\n\n' | "$BSMTP" send --fastopen --grace 0 -s "$(cat addr)" -f a@x --to b@y
	/usr/bin/python3 -c "
	import socket
	s = socket.socket()
	host, port = open('addr').read().strip().rsplit(':', 1)
	s.sendto(b'BSMTP a\r\nMAIL FROM:<a@x>\r\nRCPT TO:<b@y>\r\nBDAT 2 LAST\r\n\r\nQUIT\r\n',
	    socket.MSG_FASTOPEN, (host, int(port)))
	while octets := s.recv(4096):
	    print(octets.decode(), end='')"
	kill $listener
	wait $listener
	EOF
	BSMTP=$BSMTP run -0 unshare -n bash inside
	assert_output --partial '450 4.7.0'
	assert_equal "$(stored)" 1
}
