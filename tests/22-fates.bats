# Replies and fates: what becomes of a message where a server is silent, refuses late,
# loses count, or goes away.
# shellcheck disable=SC2030,SC2031,SC2154 # lib.bash has variables, bats subshells
load lib
load tls

# The fates in order, and what decided; of the recipients: fate and code.
fates() { jq -r 'select(.event == "message") | .fate' sent.json | xargs; }
decided() { jq -r 'select(.event == "message") | .reply.code' sent.json | xargs; }
recipients() { jq -r 'select(.event == "message") | .to[] | "\(.fate) \(.code)"' sent.json | paste -sd,; }

# sends STATUS OPTION...: the file m, reported in sent.json, diagnostics in $stderr.
sends() {
	run "-$1" --separate-stderr send --json "${@:2}" m
	echo "$output" >sent.json
}
# silent REPLY...: a server that says nothing to the opening, and these to the stream.
silent() {
	local replies
	printf -v replies '%s\\r\\n' "$@"
	start_peer 'send:220 x\r\n' recv:QUIT "send:$replies" eof
}
native='250-x\r\n250-BSMTP\r\n250-PIPELINING\r\n250 CHUNKING\r\n'

# --- The doubtful opening

@test "silent about the opening: MAIL's own code says so, on two lines too" {
	make_mbox 2 >m
	for mail in '250 2.1.0 ok' '250-2.1.0 ok\r\n250 2.1.0 and welcome'; do
		silent "$mail" '250 2.1.5 ok' '554 5.7.1 no' '250 2.0.0 reset' '250 2.1.0 ok' '250 2.1.5 ok' \
			'250 2.0.0 stored' '221 2.0.0 bye'
		sends 69 --to b@example.net --grace 50ms
		assert_equal "$(fates)" 'delivered rejected'    # the first one waits for QUIT's 221
		assert_equal "$(decided)" '250 554'
	done
}

@test "silent about the opening: 550 to MAIL on two lines answers nothing for certain" {
	make_mbox 2 >m
	silent '550-5.7.1 no' '550 5.7.1 not you' '503 5.5.1 no' '503 5.5.1 no' '250 2.0.0 reset' \
		'250 2.1.0 ok' '250 2.1.5 ok' '250 2.0.0 stored' '221 2.0.0 bye'
	run --separate-stderr send --to b@example.net --grace 50ms --json m
	echo "$output" >sent.json
	assert_equal "$status $(fates)" '75 unknown unknown'
}

@test "silent about the opening, and AUTH: nothing is delivered that was refused" {
	certs=$BATS_FILE_TMPDIR
	make_mbox 2 >m
	echo sesame >password
	for framing in bdat data; do
		start_listener --tls --cert "$certs/good.pem" --bsmtp silent --maildir in \
			--reply 'BODY#1=554 5.7.1 content refused'
		run --separate-stderr send --ca "$certs/ca.pem" --tls --user u --password-file password \
			--framing $framing --to b@example.net,c@example.net --json m
		echo "$output" >sent.json
		assert [ "$status" = 69 -o "$status" = 75 ]
		[[ $(fates) =~ ^(unknown|unsent)\  ]]
		assert_equal "$(summary rejected)" 0
		stop_listener
	done
}

@test "silent about the opening: all is refused, and 221 is no reply to the body" {
	make_message >m
	while read -r code status fate; do
		silent "$code no" "$code no" "$code no" '221 bye'
		sends "$status" --grace 0 --to b@example.net
		assert_equal "$code $(fates)" "$code $fate"
		silent "$code no" "$code no" '250 taken' '221 bye'
		sends 75 --grace 0 --to b@example.net
		assert_equal "$(fates)" unknown
	done <<-'END'
		554 69 rejected
		451 75 deferred
	END
}

@test "silent about the opening, refused and put off: it is not refused for good" {
	make_message >m
	while read -r a b c fate; do
		silent "$a x" "$b x" "$c x" '221 bye'
		sends 75 --grace 0 --to b@example.net
		assert_equal "$a $b $c $(fates)" "$a $b $c $fate"
	done <<-'END'
		550 550 450 unknown
		550 450 550 deferred
		450 550 550 unknown
		450 450 550 deferred
	END
}

@test "AUTH behind a silent opening, taken and refused" {
	certs=$BATS_FILE_TMPDIR
	make_message >m
	echo sesame >password
	# reply status fate
	while read -r code status fate; do
		start_peer "tls:$certs/good.pem" 'send:220 x\r\n' recv:QUIT \
			"send:$code x\\r\\n250 ok\\r\\n250 ok\\r\\n554 no\\r\\n221 bye\\r\\n" eof
		[ "$fate" = rejected ] || start_peer "tls:$certs/good.pem" 'send:220 x\r\n' recv:QUIT \
			"send:$code x\\r\\n530 no\\r\\n503 no\\r\\n503 no\\r\\n221 bye\\r\\n" eof
		sends "$status" --ca "$certs/ca.pem" --tls --grace 50ms --user u --password-file password --to b@example.net
		assert_equal "$code $(fates)" "$code $fate"
	done <<-'END'
		235 69 rejected
		535 77 unsent
		530 77 unsent
	END
}

@test "a 354 shows that the server was silent: the message gets through, each recipient has its own reply" {
	make_message >m
	for row in '250 550 delivered/250,rejected/550' '550 250 rejected/550,delivered/250' \
		'250 250 delivered/250,delivered/250'; do
		read -r first second want <<<"$row"
		start_peer 'send:220 x\r\n' recv:DATA "send:250 ok\\r\\n$first a\\r\\n$second b\\r\\n354 go\\r\\n" \
			recv:QUIT 'send:250 ok\r\n221 bye\r\n' eof
		run --separate-stderr send --to a@example.net,b@example.net --grace 50ms --framing data --json m
		echo "$output" >sent.json
		assert_equal "$row: $(fates) $(recipients | tr ' ' /)" "$row: delivered $want"
		await test -s received
		grep -q 'last line' received
		rm received
	done
}

@test "a 354 behind a silent opening where nobody is taken: put off if one is" {
	make_message >m
	for row in '450 550' '550 450'; do
		read -r first second <<<"$row"
		start_peer 'send:220 x\r\n' recv:DATA "send:250 ok\\r\\n$first a\\r\\n$second b\\r\\n354 go\\r\\n" \
			recv:QUIT 'send:554 no\r\n221 bye\r\n' eof
		sends 75 --to a@example.net,b@example.net --grace 50ms --framing data
		assert_equal "$(fates) $(decided)" 'deferred 450'
		await test -s received
		run -1 grep 'last line' received
		rm received
	done
}

@test "a late refusal of one line stops the stream" {
	make_mbox $((SCALE > 10 ? 5000 : 100)) >m       # more than buffers hold
	for code in 451 554; do
		start_peer recv:MAIL "send:220 x\\r\\n$code no\\r\\n" eof
		run ! --separate-stderr send --to b@example.net --grace 0 --json m
		echo "$output" >sent.json
		assert_equal "$(summary delivered) $(summary rejected)" '0 0'
		await test -s received
		run -1 grep QUIT received
		rm received
	done
}

@test "1yz or 3yz is no greeting and no reply to the opening: 76, in each manner" {
	make_message >m
	for mode in bsmtp early pipelining lockstep; do
		start_peer 'send:150 wait\r\n220 x\r\n' recv \
			'send:250 ok\r\n250 ok\r\n250 ok\r\n554 no\r\n221 bye\r\n' eof
		run -76 send --to b@example.net --grace 0 --mode $mode m
		start_peer 'send:220 x\r\n' recv 'send:350 go on\r\n250 ok\r\n' eof
		run -76 send --to b@example.net --mode $mode m
	done
	# and where it comes late
	start_peer recv:QUIT 'send:150 wait\r\n220 x\r\n250 x\r\n250 ok\r\n250 ok\r\n554 no\r\n221 bye\r\n' eof
	sends 76 --to b@example.net --grace 0
	assert_equal "$(fates)" unknown
}

# --- What decides

@test "no recipient taken: put off if one was, by its reply, in either order" {
	make_message >m
	start_listener --maildir in --reply 'RCPT later@*=450 4.2.1 later' --reply 'RCPT no@*=550 5.1.1 no'
	for to in later@x.example,no@x.example no@x.example,later@x.example; do
		for mode in bsmtp early pipelining lockstep; do
			sends 75 --to $to --mode $mode
			assert_equal "$(fates) $(decided)" 'deferred 450'
			[[ $stderr == *'deferred: 450 4.2.1 later'* ]]
		done
	done
	sends 69 --to no@x.example,no@x.example
	assert_equal "$(fates) $(decided)" 'rejected 550'
	assert_equal "$(stored)" 0
}

@test "MAIL refused, and the body taken: nobody knows" {
	make_message >m
	start_peer recv "send:220 x\\r\\n$native" recv:QUIT 'send:550 no\r\n503 no\r\n250 stored\r\n221 bye\r\n' eof
	sends 75 --to b@example.net
	assert_equal "$(fates)" unknown
}

@test "MAIL refused, and an end mark alone behind 354: as MAIL, whatever that is answered" {
	make_message >m
	while read -r code status fate; do
		for end in '250 fine' '554 no' '451 later'; do
			start_peer 'send:220 x\r\n' recv:EHLO 'send:250-x\r\n250 PIPELINING\r\n' recv:DATA \
				"send:$code no\\r\\n503 no\\r\\n354 go\\r\\n" recv:QUIT "send:$end\\r\\n221 bye\\r\\n" eof
			sends "$status" --to b@example.net --mode pipelining
			assert_equal "$end $(fates)" "$end $fate"
		done
	done <<-'END'
		550 69 rejected
		450 75 deferred
	END
}

@test "AUTH put off or refused in the stream: what goes with it is unsent, and not refused" {
	certs=$BATS_FILE_TMPDIR
	make_mbox 3 >m
	"$BSMTP" passwd alice <<<sesame >users
	echo sesame >password
	echo wrong >wrong
	start_listener --tls --cert "$certs/good.pem" --users users --allow 127.0.0.1/32 --maildir in \
		--reply 'AUTH#1=454 4.7.0 later'
	sends 75 --ca "$certs/ca.pem" --tls --user alice --password-file password --to b@example.net
	assert_equal "$(fates)" 'unsent unsent unsent'
	[[ $stderr == *'454 4.7.0 later'* ]]
	sends 77 --ca "$certs/ca.pem" --tls --user alice --password-file wrong --to b@example.net
	assert_equal "$(fates)" 'unsent unsent unsent'
	assert_equal "$(stored)" 0
	rm listener.err
}

@test "refused late, and MAIL with it: unsent, as in the grace" {
	make_message >m
	for mode in bsmtp early; do
		start_peer recv:MAIL 'send:220 x\r\n500 what\r\n503 EHLO first\r\n503 no\r\n503 no\r\n' eof
		sends 69 --to b@example.net --grace 0 --mode $mode
		assert_equal "$mode $(fates)" "$mode unsent"
	done
}

# --- Chunks refused, bodies run

@test "once a chunk is refused no more of the message is sent, in each manner" {
	for mode in bsmtp early pipelining lockstep; do
		start_listener --maildir in --reply 'BDAT#1=452 4.3.1 full' --trace
		# More comes only when the refusal is there.
		{
			printf 'Subject: x\n\n'
			yes 'a line of the message' | head -n 14000
			await grep -qF '452 4.3.1' sent.err
			await grep -q '"fate":"deferred"' sent.json     # told while the input waits
			yes 'a line of the message' | head -n 40000
		} | {
			rm -f sent.json
			send --to b@example.net --framing bdat --mode $mode --json -v 2>sent.err >sent.json ||
				echo $? >status
		}
		assert_equal "$mode $(cat status) $(summary deferred)" "$mode 75 1"
		run -1 grep LAST listener.err
		run -0 grep -c '<-  RSET' listener.err
		assert_equal "$(stored)" 0
		stop_listener
	done
	rm listener.err
}

@test "DATA refused, its body on the way: it was run as commands, and the session is over" {
	make_mbox 2 >m
	start_peer recv 'send:220 x\r\n250-x\r\n250 BSMTP\r\n' recv:QUIT \
		'send:250 ok\r\n250 ok\r\n554 no\r\n500 what\r\n250 ok\r\n250 ok\r\n250 ok\r\n250 ok\r\n221 bye\r\n' eof
	sends 76 --to b@example.net --framing data
	assert_equal "$(fates)" 'unknown unknown'
	[[ $stderr == *'took a body for commands'* ]]
}

@test "a chunk answered 500, though CHUNKING was offered: the session is over" {
	make_mbox 2 >m
	for code in 500 502; do
		start_peer recv "send:220 x\\r\\n$native" recv:QUIT \
			"send:250 ok\\r\\n250 ok\\r\\n$code what\\r\\n250 ok\\r\\n250 ok\\r\\n250 ok\\r\\n221 bye\\r\\n" eof
		sends 76 --to b@example.net
		assert_equal "$(fates)" 'unknown unknown'
	done
}

# --- One reply too many or too few

@test "one reply too many: QUIT tells, and what that may have shifted is unknown" {
	make_mbox 3 >m
	start_peer recv "send:220 x\\r\\n$native" recv:QUIT 'send:250 a\r\n250 a\r\n250 a\r\n250 too many\r\n' \
		'send:250 b\r\n250 b\r\n250 b\r\n250 c\r\n250 c\r\n554 c\r\n221 bye\r\n' eof
	sends 76 --to b@example.net
	assert_equal "$(fates)" 'delivered delivered unknown'
	[[ $stderr == *'the replies do not match the commands'*'554 c'* ]]
}

@test "one reply too few: 221 comes too early, and what that may have shifted is unknown" {
	make_mbox 3 >m
	start_peer recv "send:220 x\\r\\n$native" recv:QUIT 'send:550 a\r\n503 a\r\n503 a\r\n250 b\r\n250 b\r\n' \
		'send:250 c\r\n250 c\r\n250 c\r\n221 bye\r\n' eof
	sends 76 --to b@example.net
	# of the first, sent behind the opening's 250, and of the last nothing is certain
	assert_equal "$(fates | tr ' ' '\n' | sort | xargs)" 'unknown unknown unknown'
	[[ $stderr == *'the replies do not match the commands'* ]]
}

@test "a reply behind the 221, or another in its place: unknown what the next reply did not confirm" {
	make_mbox 3 >m
	for end in '221 bye\r\n250 more\r\n' '221 bye\r\nxx' '250 bye\r\n' '354 bye\r\n'; do
		start_peer recv "send:220 x\\r\\n$native" recv:QUIT \
			'send:250 a\r\n250 a\r\n554 a\r\n250 b\r\n250 b\r\n250 b\r\n250 c\r\n250 c\r\n' \
			"send:250 c\\r\\n$end" eof
		sends 76 --to b@example.net
		# the second has a refusal before it, the third has not
		case $end in 221*) want='delivered unknown unknown' ;; *) want='unknown unknown unknown' ;; esac
		assert_equal "$(fates)" "$want"
	done
}

@test "421, or nothing, in place of QUIT's reply changes nothing" {
	make_message >m
	for end in '421 stopping\r\n' ''; do
		start_peer recv "send:220 x\\r\\n$native" recv:QUIT "send:250 a\\r\\n250 a\\r\\n554 a\\r\\n$end" close
		sends 69 --to b@example.net
		assert_equal "$(fates) $(decided)" 'rejected 554'
	done
}

@test "a recipient's refusal, too, is unknown where the counting was out" {
	make_message >m
	start_peer recv "send:220 x\\r\\n$native" recv:QUIT 'send:250 a\r\n550 a\r\n250 b\r\n250 stored\r\n250 bye\r\n' eof
	sends 76 --to a@example.net,b@example.net
	assert_equal "$(fates) $(recipients)" 'unknown unknown 0,unknown 0'
	assert_equal "$(grep -c 550 <<<"$stderr")" 0
}

@test "what is confirmed is told at once, the rest where the input waits and nothing is due" {
	make_mbox 4 >m
	start_listener --discard --reply 'BODY#2=554 5.6.0 no'
	line=$(grep -n '^From ' m | sed -n '3s/:.*//p')
	has_fates() { jq -r 'select(.event == "message") | .fate' sent.json 2>/dev/null | xargs | grep -qx "$1"; }
	{
		head -n "$line" m
		await has_fates 'delivered rejected' >&2
		tail -n +$((line + 1)) m
	} | {
		send --to bob@example.net --json >sent.json || [ $? = 69 ]
	}
	assert_equal "$(summary delivered) $(summary rejected)" '3 1'
}

@test "no more is held than memory is for: what comes first is told as it was counted" {
	n=4000                          # more than memory is for
	[ "${BSMTP_BUILD:-}" != torture ] || n=2500
	awk -v n=$n 'BEGIN { for (i = 1; i <= n; i++)
		print "From a@example.org Mon Nov 23 12:00:00 2026\nSubject: " i "\n\nx\n" }' >m
	/usr/bin/python3 - $n >port 3>&- <<'PY' &
import re, socket, sys
n = int(sys.argv[1])
listener = socket.socket()
listener.bind(("127.0.0.1", 0))
listener.listen(1)
print(listener.getsockname()[1], flush=True)
peer, _ = listener.accept()
f = peer.makefile("rwb")
f.write(b"220 x\r\n")
for line in iter(f.readline, b""):
    if line.startswith(b"BSMTP"):
        f.write(b"250-x\r\n250-BSMTP\r\n250 CHUNKING\r\n")
        f.flush()
    elif line.startswith(b"BDAT"):
        f.read(int(line.split()[1]))
        f.write(b"554 5.7.1 " + b"no " * 60 + b"\r\n")
        f.flush()
    elif line.startswith(b"QUIT"):
        f.write(b"250 what?\r\n221 bye\r\n")
        f.flush()
        break
    else:
        f.write(b"250 ok\r\n")
PY
	pids+=($!)
	await test -s port
	address=127.0.0.1:$(cat port)
	sends 76 --to b@example.net
	assert_equal "$(($(summary rejected) + $(summary unknown)))" $n
	assert [ "$(summary rejected)" -gt 100 ]
	assert [ "$(summary unknown)" -gt 300 ]
	# the oldest were told
	assert_equal "$(fates | tr ' ' '\n' | uniq | xargs)" 'rejected unknown'
}

# --- Ends

@test "a connection that ends without a word is 75, in each manner and at each point" {
	make_message >m
	for end in close reset; do
		for mode in bsmtp early pipelining lockstep; do
			for said in '' 'send:220 x\r\n'; do
				if [ -n "$said" ]; then start_peer "$said" recv $end; else start_peer $end; fi
				sends 75 --to b@example.net --mode $mode
				assert_equal "$(summary delivered) $(summary rejected)" '0 0'
			done
		done
	done
}

@test "a connection that ends without a word is 75 with TLS too, and 77 stays what was refused" {
	certs=$BATS_FILE_TMPDIR
	make_message >m
	for mode in bsmtp pipelining; do
		for end in close reset; do
			for at in '' recv "tls:$certs/good.pem"; do
				start_peer ${at:+"$at"} $end
				sends 75 --ca "$certs/ca.pem" --tls --to b@example.net --mode $mode
				assert_equal "$(summary unsent)" 1
			done
		done
	done
	for end in close reset; do
		start_peer 'send:220 x\r\n' recv:STARTTLS 'send:220 2.0.0 go\r\n' $end
		sends 75 --ca "$certs/ca.pem" --starttls --to b@example.net
	done
	start_peer "tls:$certs/good.pem" eof
	sends 77 --tls --to b@example.net
}

@test "a listener that is killed, or stops, before the opening is answered: 75" {
	make_message >m
	for signal in KILL TERM; do
		start_listener --discard --reply 'BSMTP=delay 20s' --json
		send --to b@example.net --json --grace 20s m >sent.json 2>sent.err 3>&- &
		client=$!
		connected() { [ -n "$(ss -Htn state established "sport = :${address##*:}")" ]; }
		await connected
		kill -$signal "$listener_pid"
		status=0
		wait $client || status=$?
		assert_equal "$signal $status $(summary unsent)" "$signal 75 1"
		wait "$listener_pid" || :
	done
}

@test "a close of the opening is still fallen back from" {
	make_message >m
	start_listener --eml in --bsmtp close
	sends 0 --to b@example.net --fallback pipelining
	assert_equal "$(fates)" delivered
	sends 75 --to b@example.net
	[[ $stderr == *'closed the connection'*'does it speak BSMTP?'* ]]
}

# --- What was not offered

mail_line() { grep -a '^MAIL' received | head -n "${1:-1}" | tail -n 1; }
transids() { jq -c 'select(.event == "message") | .transid != null' sent.json | xargs; }

@test "a TRANSID goes only to whom it is known to be known" {
	make_message >m
	# how the opening was answered, and whether in time
	for said in "send:250 x\\r\\n" "send:250-x\\r\\n250 CHUNKING\\r\\n"; do
		for options in '' '--grace 0' '--mode early' '--mode pipelining'; do
			start_peer 'send:220 x\r\n' recv "$said" eof
			# shellcheck disable=SC2086 # words
			run ! --separate-stderr send --to b@example.net --transid --timeout 300ms --json $options m
			echo "$output" >sent.json
			await test -s received
			assert_equal "$options $(grep -c TRANSID received) $(transids)" "$options 0 false"
			rm received
		done
	done
	# silence
	for options in '' '--grace 0' '--grace 20ms'; do
		silent '250 2.1.0 a' '250 2.1.5 a' '250 2.0.0 a' '221 2.0.0 bye'
		# shellcheck disable=SC2086 # words
		sends 0 --to b@example.net --transid $options
		await test -s received
		assert_equal "$options $(grep -c TRANSID received) $(transids)" "$options 0 false"
		rm received
	done
}

@test "a TRANSID waits for the reply to the opening, also that of a batch, and in mode early" {
	make_mbox 2 | "$BSMTP" send --transid --to b@example.net -o batch
	sed 's/ TRANSID=[^ ]*\r/\r/;t' batch >plain
	for options in '--mode bsmtp' '--grace 0' '--grace 1ms' '--mode early' '--mode pipelining'; do
		start_listener --discard --latency 40ms --json
		# shellcheck disable=SC2086 # words
		send --json $options batch >sent.json
		stop_listener
		assert_equal "$options $(transids)" "$options true true"
		assert_equal "$(jq -r 'select(.event == "message") | .transid' listener.out | xargs)" \
			"$(grep -ao '<[12]\.[^>]*>' batch | xargs)"
	done
	# what has none does not wait
	start_listener --discard --latency 40ms
	send --json --grace 0 plain >sent.json
	[ "${BSMTP_BUILD:-}" = torture ] || assert_equal "$(summary turnarounds) $(transids)" '1 false false'
}

@test "a TRANSID behind messages that have none waits in mid-stream" {
	make_mbox 2 | "$BSMTP" send --transid --to b@example.net -o batch
	{ sed 's/ TRANSID=[^ ]*\r/\r/;t' batch; cat batch; } >m
	start_listener --discard --latency 40ms
	sends 0 --grace 0
	assert_equal "$(transids)" 'false false true true'
	[ "${BSMTP_BUILD:-}" = torture ] || assert_equal "$(summary turnarounds)" 2
}

@test "a remembered peer that is silent now gets no TRANSID" {
	make_message >m
	silent '250 2.1.0 a' '250 2.1.5 a' '250 2.0.0 a' '221 2.0.0 bye'
	echo "$address" >peers
	sends 0 --to b@example.net --mode auto --peers peers --transid
	assert_equal "$(jq -r 'select(.event == "opening") | .mode' sent.json) $(transids)" 'bsmtp false'
	await test -s received
	run -1 grep TRANSID received
}

@test "an address that is not ASCII is for who offers SMTPUTF8; the client itself refuses it" {
	make_message >m
	start_listener --eml in --keywords PIPELINING,CHUNKING,8BITMIME,BSMTP --trace
	for mode in bsmtp early pipelining lockstep; do
		for way in '--to grün@x.example' '--to a@x.example,grün@x.example' '--from grün@x.example --to a@x.example'; do
			# shellcheck disable=SC2086 # words
			sends 69 --mode $mode $way
			assert_equal "$mode $way $(fates) $(decided) $(recipients | cut -d , -f 1)" "$mode $way rejected null rejected 0"
			[[ $stderr == *'rejected: an address is not ASCII, and the server does not offer SMTPUTF8'* ]]
		done
	done
	run -1 grep -E '(MAIL|RCPT|BDAT|DATA)' listener.err
	# in the header alone it goes, as do others behind it
	{ echo 'From a@x.example Mon Nov 23 12:00:00 2026'; echo 'Subject: grün'; echo; echo x; } >m
	sends 0 --to a@x.example
	printf 'EHLO x\r\nMAIL FROM:<gr\303\274n@x>\r\nRCPT TO:<a@x>\r\nDATA\r\n\r\n.\r\nMAIL FROM:<a@x>\r\nRCPT TO:<a@x>\r\nDATA\r\n\r\n.\r\n' >m
	sends 69
	assert_equal "$(fates)" 'rejected delivered'
	stop_listener
	start_listener --eml in
	make_message >m
	for mode in bsmtp early pipelining lockstep; do
		sends 0 --mode $mode --to grün@x.example --helo c.example
	done
	# by prearrangement, before there is a reply
	silent '250 2.1.0 a' '250 2.1.5 a' '250 2.0.0 a' '221 2.0.0 bye'
	sends 0 --to grün@x.example --grace 0
	await test -s received
	grep -q SMTPUTF8 received
	rm listener.err
}

# --- Silence

@test "silence: five minutes, and ten for the verdict on a body; --timeout holds for all" {
	make_message >m
	# waits STEP... -- OPTION...: for a server that does so much and no more, so many seconds
	waits() {
		local steps=()
		while [ "$1" != -- ]; do
			steps+=("$1")
			shift
		done
		start_peer "${steps[@]}" silent
		rm -f calls
		ASAN_OPTIONS=detect_leaks=0 strace -qqo calls -e trace=poll "$BSMTP" send \
			--server "$address" --to b@example.net "${@:2}" m 2>/dev/null 3>&- &
		pids+=($!)
		await settled
	}
	# it waits now, and for so many seconds, but for what has passed of the last
	settled() {
		local last
		last=$(tail -n 1 calls 2>/dev/null | grep -oE '[0-9]+$') && [ $(((last + 999) / 1000)) = "$want" ]
	}
	stream=(recv "send:220 x\\r\\n$native" recv:QUIT)
	want=600 waits "${stream[@]}" 'send:250 a\r\n250 a\r\n' --
	want=300 waits "${stream[@]}" 'send:250 a\r\n' --
	want=300 waits 'send:220 x\r\n' recv -- --mode pipelining
	want=70 waits "${stream[@]}" 'send:250 a\r\n250 a\r\n' -- --timeout 70s
}

# --- Peers, remembered

@test "a peer that was learnt under TLS is not one in the clear" {
	certs=$BATS_FILE_TMPDIR
	make_message >m
	start_listener --starttls --cert "$certs/good.pem" --discard
	mode() { jq -r 'select(.event == "opening") | .mode' sent.json; }
	auto() { sends 0 --to b@example.net --ca "$certs/ca.pem" --mode auto --peers peers "$@"; }
	auto --starttls
	assert_equal "$(cat peers)" "$address tls"
	sends 0 --to b@example.net --mode auto --peers peers
	assert_equal "$(mode)" pipelining
	assert_equal "$(sort peers)" "$(printf '%s\n' "$address" "$address tls")"
	auto --starttls
	assert_equal "$(mode)" bsmtp
	sends 0 --to b@example.net --mode auto --peers peers
	assert_equal "$(mode)" bsmtp
	stop_listener
	# forgotten is the one alone
	start_listener --starttls --cert "$certs/good.pem" --discard --bsmtp refuse
	printf '%s\n' "$address" "$address tls" >peers
	run ! send --to b@example.net --mode auto --peers peers m
	assert_equal "$(cat peers)" "$address tls"
}
