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
