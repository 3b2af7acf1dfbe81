# Real mail, real peers, and the listener killed in mid-stream.
# shellcheck disable=SC2030,SC2031,SC2154 # lib.bash has variables, bats subshells
load lib
load peers/peers

mail() { /usr/bin/python3 "$tools/mail.py" "$@"; }

# arrives WANT SEND-ARGUMENT...: what is sent is what the listener holds, both in a
# Maildir and as .eml.
arrives() {
	local store want=$1
	shift
	for store in maildir eml; do
		rm -rf in
		start_listener --$store in
		send --from a@example.org --to b@example.net --json "$@" >sent.json
		run -0 mail same "$want" in
		assert_equal "$(summary delivered)" "$output"
		stop_listener
	done
}

# --- Real mail

@test "every message of Python's own test data arrives identical" {
	mail data data
	arrives data --format message data/*.eml
}

@test "Python's own test data arrives identical as an mbox" {
	mail data data
	arrives data.mbox --format mbox data.mbox
}

@test "Python's own test data arrives identical as a Maildir" {
	mail data data
	arrives data.maildir data.maildir
}

@test "a git patch series is an mbox, and each patch arrives identical" {
	git init -q repo
	for i in 1 2 3 4 5 6 7 8 9 10; do
		printf 'From %s\n.dot\n' "$i" >>repo/f
		git -C repo add f
		git -C repo -c user.name=A -c user.email=a@example.org commit -qm "Change $i"
	done
	git -C repo format-patch --stdout --root >series.mbox
	arrives series.mbox series.mbox
	assert_equal "$(summary delivered)" 10
}

@test "the latest history of this program arrives identical as git's patches" {
	repo() { git -c safe.directory='*' -C "$top" "$@"; }
	[ "$(repo rev-parse --show-toplevel 2>/dev/null)" = "$top" ] || skip 'no git repository'
	latest=-$((SCALE * SCALE / 50))
	repo format-patch --stdout $latest --root HEAD >series.mbox
	arrives series.mbox series.mbox
	assert_equal "$(summary delivered)" "$(repo rev-list --count --no-merges $latest HEAD)"
}

@test "a thousand messages of all kinds arrive identical" {
	mail make $((1000 * SCALE / 100)) >made.mbox
	arrives made.mbox made.mbox
}

# --- Real clients of the listener

stored_eml() { find in -name '*.eml' | wc -l; }

# identical WANT FILE...: how many are as the one wanted.
identical() { md5sum "$@" | cut -d ' ' -f 1 | { read -r want && grep -cx "$want"; }; }

@test "swaks, msmtp, curl and smtplib deliver to the listener, to the octet" {
	{ printf '%s
' 'Date: Mon, 23 Nov 2026 12:00:00 +0000' 'Message-ID: <1@example.org>'
		make_message; } >m
	for client in swaks msmtp curl smtplib; do
		rm -rf in
		start_listener --eml in
		host=${address%:*} port=${address##*:}
		cp m want
		case $client in
		swaks)
			swaks --server "$host" --port "$port" --from a@example.org --to b@example.net \
				--data @m >/dev/null
			echo >>want     # it ends every message with an empty line
			;;
		msmtp)
			msmtp --host="$host" --port="$port" --auth=off --tls=off --from=a@example.org \
				b@example.net <m
			;;
		curl)
			curl -s --crlf --url "smtp://$address" --mail-from a@example.org \
				--mail-rcpt b@example.net -T m
			;;
		smtplib)
			/usr/bin/python3 - "$host" "$port" <<'PY'
import smtplib, sys
with smtplib.SMTP(sys.argv[1], int(sys.argv[2])) as s:
    s.sendmail("a@example.org", ["b@example.net"], open("m").read())
PY
			;;
		esac
		sed -i 's/$/\r/' want
		client_row $client 'one message' 1 "$(stored_eml)" "$(identical want in/*.eml)"
		cmp want in/000001.eml
		assert_equal "$(jq -c '[.from,.to]' in/000001.json)" '["a@example.org",["b@example.net"]]'
		assert_equal "$(stored_eml)" 1
		stop_listener
	done
}

@test "smtp-source delivers in several sessions at a time, with exact counts" {
	make_message >m
	{ cat m; echo; } | sed 's/$/\r/' >want           # it ends every message with an empty line
	for sessions in 50 5; do
		# With -d five sessions carry all, without it each message has its own.
		set -- -s 5 -m 50 -r 3 -F m -f a@example.org -t b@example.net
		[ $sessions = 50 ] || set -- -d "$@"
		rm -rf in
		start_listener --eml in --json
		smtp-source "$@" "$address"
		stop_listener
		client_row smtp-source "$sessions sessions" 50 "$(stored_eml)" "$(identical want in/*.eml)"
		assert_equal "$(identical want in/*.eml)" 50
		assert_equal "$(jq -c '[.from,.to]' in/*.json | sort | uniq -c | sed 's/^ *//')" \
			'50 ["a@example.org",["3b@example.net","2b@example.net","b@example.net"]]'
		assert_equal "$(jq -sc 'map(select(.event == "session")) | [length, (map(.messages) | add)]' \
			listener.out)" "[$sessions,50]"
	done
}

@test "smtp-source's own messages arrive as long as it made them" {
	start_listener --eml in
	length=$((SCALE * 200))
	smtp-source -s 5 -m 50 -l $length -f a@example.org -t b@example.net "$address"
	# An empty line is added, and no other is like these.
	assert_equal "$(awk 'FNR == 1 { body = 0 }
		body { octets += length($0) + 1; strange += ($0 !~ /^[0-9]?X*\r$/) }
		$0 == "\r" { body = 1 }
		END { print octets, strange }' in/*.eml)" "$((50 * (length + 2))) 0"
	assert_equal "$(grep -h '^Message-Id: ' in/*.eml | sort -u | wc -l)" 50
}

@test "Exim relays to the listener, talking early once it has learnt that it may" {
	mail make 6 >made.mbox
	mail split made.mbox made
	start_listener --maildir in
	start_pipeconnect
	exim_client
	for f in made/*.eml; do
		exim_send -f a@example.org b@example.net <"$f"
	done
	run -0 mail same made in
	assert_output 6
	# In Exim's log: L pipelined, L* early.
	early=$(grep -c ' => .* L\* ' log/main)
	client_row Exim "PIPECONNECT, $early early" 6 "$(stored)" "$output"
	assert_equal "$(grep -c ' => .* L ' log/main)" 1
	assert_equal "$early" 5
}

# --- Real servers

# tried STATUS OPTION...: made.mbox is sent to whom its headers name, and what is
# reported is what the peer then holds.
tried() {
	local due=$1 trace
	shift
	rm -rf mail/* sent.json.counts
	# A refusal is in time, however slow the machine.
	BSMTP_GRACE=30s run "-$due" --separate-stderr send --to-headers --json --trace "$@" made.mbox
	echo "$output" >sent.json
	trace=$stderr
	run check made.mbox
	stderr=$trace server_row "$due" "$@"
	assert_success
}

# judged STATUS VERDICTS OPTION...: and these are the verdicts.
judged() {
	local due=$1 verdicts=$2
	shift 2
	tried "$due" "$@"
	assert_output "$verdicts"
}

# refused STATUS OPTION...: and nothing was sent.
refused() {
	tried "$@"
	assert_equal "$(summary unsent)" "$(summary messages)"
	assert_equal "$(delivered_files)" 0
}

# falls_back STATUS VERDICTS MODE OPTION...: refused, and then judged in that mode.
falls_back() {
	judged "$1" "$2" "${@:4}" --fallback "$3"
	assert_equal "$(jq -r 'select(.event == "opening") | .mode' sent.json)" "$3"
}

# Messages that a peer takes, refuses and puts off, for recipients that it takes,
# refuses and puts off, all in one session.
mixed='24 delivered 5 rejected 1 deferred, 31 pairs'
make_mixed() { mail make 30 refused later forbidden "$@" >made.mbox; }

@test "smtp-sink holds what was sent, in the manners that it takes" {
	mail make 20 >made.mbox
	for without in nothing PIPELINING 8BITMIME; do
		case $without in
		nothing) start_smtp_sink ;;
		PIPELINING) start_smtp_sink -p ;;
		8BITMIME) start_smtp_sink -8 ;;
		esac
		[ $without = nothing ] || peer_title+=" without $without"
		for mode in early pipelining lockstep; do
			judged 0 '20 delivered, 27 pairs' --mode $mode
		done
		stop_peer
	done
}

@test "smtp-sink without EHLO is sent to with HELO, in lockstep only" {
	mail make 20 >made.mbox
	start_smtp_sink -e
	peer_title+=' without EHLO'
	refused 69
	refused 69 --mode pipelining
	judged 0 '20 delivered, 27 pairs' --mode lockstep
	falls_back 0 '20 delivered, 27 pairs' lockstep
}

@test "smtp-sink knows no BSMTP: refused in the grace, and nothing was sent" {
	mail make 20 >made.mbox
	start_smtp_sink
	refused 69
	falls_back 0 '20 delivered, 27 pairs' early
}

@test "smtp-sink greets after the grace and knows no BDAT: nothing is called delivered" {
	for n in 1 2 3; do
		printf '%s\n' 'From a@example.org Mon Nov 23 12:00:00 2026' "Message-ID: <$n@example.org>" ''
		[ $n != 1 ] || printf 'NOOP\n%.0s' {1..8}
		printf 'x\n\n'
	done >noops.mbox
	start_smtp_sink -W CONNECT:1
	run -76 --separate-stderr send --to b@example.net --json noops.mbox
	echo "$output" >sent.json
	assert_equal "$(summary delivered)" 0
	assert_equal "$(delivered_files)" 0
}

@test "aiosmtpd holds what was reported, in the manners that it takes" {
	make_mixed
	start_aiosmtpd no
	for mode in early pipelining lockstep; do
		judged 75 "$mixed" --mode $mode
	done
	refused 69
	falls_back 75 "$mixed" pipelining
}

@test "aiosmtpd taught BSMTP holds what was reported, in each manner" {
	make_mixed
	start_aiosmtpd yes
	for mode in bsmtp early pipelining lockstep; do
		judged 75 "$mixed" --mode $mode
	done
}

# It loses the end of the last line where what it reads at a time begins with that.
@test "nodemailer's smtp-server holds what was reported, in the manners that it takes" {
	make_mixed ended
	# Who talks before the greeting is put off.
	start_nodemailer no 20
	refused 75
	refused 75 --mode early
	stop_peer
	start_nodemailer no
	refused 69 --await-greeting
	falls_back 75 "$mixed" pipelining --await-greeting
	for mode in pipelining lockstep; do
		judged 75 "$mixed" --mode $mode
	done
}

@test "nodemailer's smtp-server taught BSMTP holds what was reported, behind its greeting" {
	make_mixed ended
	start_nodemailer yes 20
	refused 75
	stop_peer
	start_nodemailer yes
	judged 75 "$mixed" --await-greeting
}

@test "Postfix taught BSMTP delivers what was reported, in each manner and framing" {
	make_mixed
	start_postfix taught
	for mode in bsmtp early pipelining lockstep; do
		for framing in bdat data; do
			judged 75 "$mixed" --mode $mode --framing $framing
		done
	done
}

@test "Postfix taught BSMTP delivers a long stream, with exact verdicts to the last" {
	mail make $((5 * SCALE)) refused >made.mbox
	start_postfix taught
	run -69 --separate-stderr send --to-headers --json made.mbox
	echo "$output" >sent.json
	run -0 check made.mbox
	assert_equal "${output%%,*}" "$((5 * SCALE - SCALE / 2)) delivered $((SCALE / 2)) rejected"
}

@test "Postfix as it comes refuses BSMTP in the grace, and nothing was sent" {
	make_mixed
	start_postfix as_it_comes
	refused 69
	run -1 grep -q ' client=' log/mail
	falls_back 75 "$mixed" pipelining
}

@test "Postfix as it comes delivers what was reported, in the manners that it takes" {
	make_mixed
	start_postfix as_it_comes
	for mode in early pipelining lockstep; do
		judged 75 "$mixed" --mode $mode
	done
}

@test "Postfix with the defaults of 3.9 refuses early talk, and takes the rest" {
	make_mixed
	start_postfix as_it_comes 'smtpd_forbid_unauth_pipelining = yes' \
		'smtpd_forbid_bare_newline = normalize' 'max_use = 1'
	peer_title='Postfix, the defaults of 3.9'
	refused 69
	refused 69 --mode early
	falls_back 75 "$mixed" pipelining
	for mode in pipelining lockstep; do
		judged 75 "$mixed" --mode $mode
	done
}

@test "Postfix as it comes and no grace: a refusal too late, and each message its own verdict" {
	make_mixed
	start_postfix as_it_comes
	if [ "${BSMTP_BUILD:-}" != torture ]; then
		judged 75 "$mixed" --grace 0
		return
	fi
	# It hears of it before it has sent all: what the rest would get is not known.
	run ! --separate-stderr send --to-headers --json --grace 0 made.mbox
	echo "$output" >sent.json
	run -0 check made.mbox
}

@test "Postfix as it comes and no grace: the refusal stops the stream" {
	mail make $((SCALE > 10 ? 40 : 2)) large >made.mbox     # more than buffers hold
	start_postfix as_it_comes
	for framing in bdat data; do
		rm -rf mail/*
		run ! --separate-stderr send --to-headers --json --grace 0 --framing $framing made.mbox
		echo "$output" >sent.json
		run -0 check made.mbox
		assert [ "$(summary unsent)" -gt 0 ]
	done
}

@test "Postfix hangs up after twenty errors: what it did not judge is not called delivered" {
	mail make 60 burst >made.mbox
	start_postfix taught 'smtpd_error_sleep_time = 0'
	peer_title=             # what it judged before it hung up depends
	for mode in bsmtp early pipelining; do
		# It resets the connection, which may destroy replies that it had given.
		rm -rf mail/*
		run -75 --separate-stderr send --to-headers --json --mode $mode made.mbox
		echo "$output" >sent.json
		run -0 check made.mbox
		assert_equal "$(delivered_files)" 13
	done
	judged 75 '10 delivered 20 rejected 30 unsent, 13 pairs' --mode lockstep
}

@test "Postfix that forbids early talk refuses BSMTP, but not behind its greeting" {
	make_mixed
	# It looks once, when it begins: a process that must be started first sees it all.
	start_postfix taught 'smtpd_forbid_unauth_pipelining = yes' 'max_use = 1'
	peer_title+=', the defaults of 3.9'
	refused 69
	judged 75 "$mixed" --await-greeting
}

# A message that carries another: were the body behind a refused DATA read as commands,
# the end of the one would be the end of the other.
smuggler() {
	printf '%s\n' 'From a@example.org Mon Nov 23 12:00:00 2026' '' 'RSET' \
		'MAIL FROM:<evil@example.org>' 'RCPT TO:<b@example.net>' 'DATA' 'Subject: smuggled' '' \
		'text'
}

@test "Postfix refuses all recipients: no command in a body is run" {
	{ smuggler; echo; smuggler; } >two.mbox
	start_postfix taught
	for mode in bsmtp early pipelining lockstep; do
		for framing in bdat data; do
			run -69 --separate-stderr send --to no@example.net --mode $mode --framing $framing \
				--json two.mbox
			echo "$output" >sent.json
			assert_equal "$(summary rejected)" 2
			await queue_empty
			assert_equal "$(delivered_files)" 0
		done
	done
	# That the waiting for 354 is not in vain:
	run ! send --to no@example.net --framing data --blind two.mbox
	await queue_empty
	assert [ "$(delivered_files)" -gt 0 ]
}

@test "aiosmtpd refuses all recipients: no command in a body is run" {
	{ smuggler; echo; smuggler; } >two.mbox
	start_aiosmtpd yes
	for mode in bsmtp early pipelining lockstep; do
		run -69 --separate-stderr send --to no@example.net --mode $mode --json two.mbox
		echo "$output" >sent.json
		assert_equal "$(summary rejected)" 2
		assert_equal "$(delivered_files)" 0
	done
}

@test "Exim delivers what was reported, in lockstep and pipelining, and refuses the rest" {
	make_mixed
	start_exim <<<'pipelining_connect_advertise_hosts =
		acl_smtp_connect = hesitate'    # in which who talks early is noticed
	peer_title+=', as installed'
	judged 75 "$mixed" --mode pipelining
	judged 75 "$mixed" --mode pipelining --framing data
	judged 75 "$mixed" --mode lockstep
	refused 69
	falls_back 75 "$mixed" pipelining
	refused 69 --mode early
}

@test "Exim that offers PIPECONNECT delivers what was reported, in the early manner too" {
	make_mixed
	start_exim <<<'pipelining_connect_advertise_hosts = *'
	peer_title+=' with PIPECONNECT'
	judged 75 "$mixed" --mode early
	judged 75 "$mixed" --mode early --framing data
	judged 75 "$mixed" --mode pipelining
	judged 75 "$mixed" --mode lockstep
	refused 69
	falls_back 75 "$mixed" early
}

@test "OpenSMTPD delivers what was reported, in lockstep and pipelining" {
	mail make 30 refused >made.mbox
	start_opensmtpd
	verdicts='27 delivered 3 rejected, 36 pairs'
	for mode in pipelining lockstep; do
		judged 69 "$verdicts" --mode $mode
	done
	refused 69
	falls_back 69 "$verdicts" pipelining
}

# Of all that ran above: it wants the whole file.
@test "the tables in bsmtp(7) are what was seen" {
	needs_root
	"$top/tests/peers/table" "$rows" >seen
	"$top/tests/peers/table" -r "$top/man/bsmtp.7" >written
	if [ "${BSMTP_BUILD:-}" = torture ]; then
		# It is too slow for some: what it gave is there.
		run grep -vxFf written seen
		assert_output ''
		return
	fi
	diff written seen | head -n 20
	[ "${PIPESTATUS[0]}" = 0 ] || {
		mkdir -p "$top/build"
		cp "$rows" "$top/build/peers.rows"
		echo 'if that is as it should be: tests/peers/table -w build/peers.rows man/bsmtp.7'
		return 1
	}
}

# --- Crashes

@test "kill -9 in mid-stream: what was reported delivered is there, whole" {
	make_mbox $((500 * SCALE / 100)) >m
	for i in $(seq "${BSMTP_KILLS:-$((SCALE > 10 ? 8 : 4))}"); do
		rm -rf in
		start_listener --maildir in
		send --to b@example.net --json m >sent.json 2>/dev/null 3>&- &
		client=$!
		# At a moment that differs: when so many messages have been stored.
		want=$((RANDOM % (300 * SCALE / 100) + 1))
		until [ "$(stored)" -ge "$want" ] || ! kill -0 $client 2>/dev/null; do :; done
		kill -9 "$listener_pid"
		wait "$listener_pid" || :
		wait $client || :
		jq -r 'select(.event=="message" and .fate=="delivered")|.id' sent.json | sort >delivered
		/usr/bin/python3 - <<'PY'
import glob, re
def message(path):
    octets = open(path, "rb").read()
    body = octets.partition(b"\n\n")[2]
    assert body.count(b"\n") == 56 and body.endswith(b"\n.dot\nFrom me\n"), "torn: " + path
    return re.search(rb"^Message-ID: (.*)$", octets, re.M).group(1)
there = {message(f) for f in glob.glob("in/new/*")}
lost = set(open("delivered", "rb").read().split()) - there
assert not lost, lost
PY
	done
}
