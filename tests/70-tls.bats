# TLS, in both of the proposal's variations and by RFC 3207.
# shellcheck disable=SC2030,SC2031,SC2154 # lib.bash has variables, bats subshells
load lib
load tls

# --- Delivery

# mode: turnarounds by --tls and by --starttls, of one message in each manner.
turnarounds='bsmtp 2 2
early 3 5
pipelining 4 6
lockstep 7 9'

@test "TLS from the first octet, in each manner: to the octet, with so many turnarounds" {
	secured tls
	make_message >m
	while read -r mode count _; do
		rm -f in/new/*
		deliver --tls --mode "$mode" >sent.json
		assert_equal "$mode $(summary turnarounds)" "$mode $count"
		content in/new/* | cmp - m
		assert_equal "$(jq -r 'select(.event == "opening").tls' sent.json)" TLSv1.3
	done <<<"$turnarounds"
}

@test "TLS begun by the opening or by STARTTLS, in each manner, with so many turnarounds" {
	secured starttls --json
	make_message >m
	while read -r mode _ count; do
		rm -f in/new/*
		deliver --starttls --mode "$mode" >sent.json
		assert_equal "$mode $(summary turnarounds)" "$mode $count"
		content in/new/* | cmp - m
		assert_equal "$(jq -r 'select(.event == "opening").tls' sent.json)" TLSv1.3
	done <<<"$turnarounds"
	await has session listener.out
	assert_equal "$(jq -r 'select(.event == "message").tls' listener.out | sort | uniq -c | xargs)" \
		'4 TLSv1.3'
}

@test "many messages have no more turnarounds than one, on a long line too" {
	make_mbox $((200 * SCALE / 100)) >m
	for how in tls starttls; do
		secured $how --latency 30ms
		send --ca "$certs/ca.pem" --$how --to b@example.net --json m >sent.json
		assert_equal "$(summary delivered)" $((200 * SCALE / 100))
		# its buffers hold less than a message
		[ "${BSMTP_BUILD:-}" = torture ] || assert_equal "$(summary turnarounds)" 2
		assert_equal "$(stored)" $((200 * SCALE / 100))
		stop_listener
	done
}

@test "large messages pass in each manner, in both directions at once" {
	{ echo 'Subject: large'; echo; head -c $((SCALE > 10 ? 20000 * SCALE : 20000)) /dev/zero | tr '\0' x | fold -w 76; echo; } >m
	for how in tls starttls; do
		secured $how
		for mode in bsmtp early pipelining lockstep; do
			rm -f in/new/*
			send --ca "$certs/ca.pem" --$how --mode $mode --to b@example.net m m
			for f in in/new/*; do
				content "$f" | cmp - m
			done
			assert_equal "$(stored)" 2
		done
		stop_listener
	done
}

@test "TLS 1.2 does as well" {
	secured tls
	printf '[default_conf]\nssl_conf = s\n[s]\nsystem_default = d\n[d]\nMaxProtocol = TLSv1.2\n' >cnf
	sed -i '1i openssl_conf = default_conf' cnf
	OPENSSL_CONF=$PWD/cnf deliver --tls >sent.json
	assert_equal "$(jq -r 'select(.event == "opening").tls' sent.json)" TLSv1.2
	assert_equal "$(summary turnarounds) $(stored)" '3 1'
}

@test "records that are split anywhere are put together" {
	make_mbox $((SCALE > 10 ? 10 : 2)) >m
	for how in tls starttls; do
		for mode in bsmtp pipelining; do
			secured $how
			start_relay pieces
			send --ca "$certs/ca.pem" --$how --mode $mode --to b@example.net --json m >sent.json
			assert_equal "$(summary delivered)" $((SCALE > 10 ? 10 : 2))
			assert_equal "$(stored)" $((SCALE > 10 ? 10 : 2))
			stop_listener
		done
	done
}

@test "by standard input and output, TLS too" {
	make_message | "$BSMTP" send --to b@example.net --starttls --ca "$BATS_FILE_TMPDIR/ca.pem" \
		--connect-command "'$BSMTP' listen --stdio --starttls --cert '$BATS_FILE_TMPDIR/good.pem' --maildir in"
	make_message >m
	content in/new/* | cmp - m
}

# --- ALPN

@test "ALPN bsmtp is agreement: no grace, and the opening says so" {
	for how in tls starttls; do
		secured $how
		deliver --$how >sent.json
		assert_equal "$(jq -r 'select(.event == "opening").agreed' sent.json)" alpn
		assert_equal "$(summary grace_seconds)" 0
		deliver --$how --mode pipelining >sent.json
		assert_equal "$(jq -r 'select(.event == "opening").agreed' sent.json)" reply
		stop_listener
	done
}

@test "ALPN is agreed to only with whom may open with BSMTP" {
	secured tls --bsmtp refuse
	run -69 --separate-stderr deliver --tls --grace 20s
	[[ $stderr == *'554 '* ]]
	assert_equal "$(stored)" 0
}

@test "a client that offers only foreign ALPN is turned away" {
	secured tls
	run -1 openssl s_client -connect "$address" -alpn http/1.1,smtp </dev/null
	assert_output --partial 'alert no application protocol'
	run -0 openssl s_client -connect "$address" -alpn http/1.1,bsmtp </dev/null
	assert_output --partial 'ALPN protocol: bsmtp'
	run -0 openssl s_client -connect "$address" </dev/null
	assert_output --partial 'No ALPN negotiated'
}

# --- Verification

@test "a certificate that cannot be verified: exit 77, why, what to do, and nothing is sent" {
	certs=$BATS_FILE_TMPDIR
	while IFS='|' read -r name text; do
		for how in tls starttls; do
			start_listener --$how --cert "$certs/$name.pem" --maildir in --trace
			for mode in bsmtp pipelining; do
				unsent 77 "$text" --$how --mode $mode
			done
			stop_listener
		done
	done <<-'END'
		stranger|CN=stranger is not accepted: IP address mismatch .*--tls-name
		expired|CN=expired is not accepted: certificate has expired .*new one
		alone|CN=alone is not accepted: self-signed certificate .*--ca .*--pin
	END
	rm listener.err
}

@test "a certificate of an authority that is not trusted" {
	secured tls --trace
	unsent 77 'unable to get local issuer certificate .*--ca FILE' --tls --ca "$certs/other-ca.pem"
	rm listener.err
}

@test "--tls-name says whom the certificate must be for" {
	certs=$BATS_FILE_TMPDIR
	start_listener --tls --cert "$certs/stranger.pem" --maildir in --trace
	unsent 77 'ostname mismatch' --tls --tls-name localhost
	deliver --tls --tls-name stranger.example
	assert_equal "$(stored)" 1
	rm listener.err
}

@test "--pin stands for authority and name, and another certificate is refused" {
	certs=$BATS_FILE_TMPDIR
	pin=sha256:$(pin_of "$certs/alone.crt")
	for how in tls starttls; do
		rm -rf in
		start_listener --$how --cert "$certs/alone.pem" --maildir in --trace
		make_message | send --to b@example.net --$how --pin "$pin"
		assert_equal "$(stored)" 1
		rm -r in/new/*
		for mode in bsmtp pipelining; do
			unsent 77 'not the one of --pin' --$how --mode $mode --pin "sha256:$(pin_of "$certs/good.crt")"
		done
		stop_listener
	done
	rm listener.err
	run -64 send --tls --pin sha256:12 --to b@example.net
	assert_output --partial '64 hexadecimal digits'
}

@test "--insecure takes any certificate, and is loud" {
	certs=$BATS_FILE_TMPDIR
	start_listener --tls --cert "$certs/expired.pem" --maildir in
	run -0 deliver --tls --insecure
	assert_output --partial 'bsmtp: --insecure: whoever answers will be believed'
	assert_equal "$(stored)" 1
}

@test "who is in between sees nothing of the mail, nor does one whose certificate is wrong" {
	certs=$BATS_FILE_TMPDIR
	large=$((SCALE > 10 ? 100000 : 10000))
	{ echo 'Subject: secret'; echo; head -c "$large" /dev/zero | tr '\0' x | fold -w 76; } >m
	for how in tls starttls; do
		for mode in bsmtp pipelining; do
			rm -rf in
			start_listener --$how --cert "$certs/good.pem" --maildir in
			listener=$address
			start_relay
			send --ca "$certs/ca.pem" --$how --mode $mode --to b@example.net m
			assert_equal "$(stored)" 1
			assert [ "$(stat -c %s relay.client)" -gt "$large" ]
			run -1 grep -aE 'secret|xxxxx|MAIL|b@example' relay.client relay.server
			# What is between the certificate and the end is one alert.
			address=$listener
			start_relay
			run -77 send --tls-name other.example --ca "$certs/ca.pem" --$how --mode $mode --to b@example.net m
			assert [ "$(wc -c <relay.client)" -lt 1000 ]
			run -1 grep -aE 'secret|xxxxx|MAIL|b@example' relay.client
			stop_listener
		done
	done
}

@test "a client certificate is a prearrangement: none, and one of another authority, are refused" {
	for how in tls starttls; do
		secured $how --client-ca "$BATS_FILE_TMPDIR/ca.pem" --trace
		for mode in bsmtp pipelining; do
			unsent 77 'give --cert' --$how --mode $mode
			unsent 77 'does not accept our certificate: see --cert' --$how --mode $mode \
				--cert "$certs/intruder.pem"
			deliver --$how --mode $mode --cert "$certs/client.crt" --key "$certs/client.key"
			assert_equal "$(stored)" 1
			rm in/new/*
		done
		stop_listener
	done
	rm listener.err
}

@test "beside a client certificate, an address may be allowed: a wrong certificate is still refused" {
	secured tls --client-ca "$BATS_FILE_TMPDIR/ca.pem" --allow 127.0.0.1/32 --trace
	for mode in bsmtp pipelining; do
		unsent 77 'does not accept our certificate: see --cert' --tls --mode $mode \
			--cert "$certs/intruder.pem"
		deliver --tls --mode $mode
		deliver --tls --mode $mode --cert "$certs/client.pem"
		assert_equal "$(stored)" 2
		rm in/new/*
	done
	rm listener.err
}

@test "--require-tls: in the clear there is no mail, by no manner" {
	secured starttls --require-tls
	for mode in bsmtp early pipelining lockstep; do
		run ! --separate-stderr send --mode $mode --to b@example.net < <(make_message)
		[[ $stderr == *'530 '* ]] || { echo "$mode: $stderr"; return 1; }
		assert_equal "$(stored)" 0
		deliver --starttls --mode $mode
		assert_equal "$(stored)" 1
		rm in/new/*
	done
}

@test "TLS is wanted and not to be had: exit 77, nothing is sent" {
	start_listener --maildir in --trace
	for mode in early pipelining lockstep; do
		unsent 77 'TLS is wanted, and the server does not have it' --starttls --mode $mode
	done
	for mode in bsmtp pipelining; do
		run ! deliver --tls --mode $mode
		assert_equal "$(stored)" 0
		run -1 grep MAIL listener.err
	done
	rm listener.err
}

@test "the listener without a certificate makes one, and tells its pin" {
	start_listener --tls --maildir in
	run -0 grep -oE -- '--pin sha256:[0-9a-f]{64}$' listener.err
	read -ra known <<<"$output"
	make_message | send --to b@example.net --tls "${known[@]}"
	assert_equal "$(stored)" 1
	# another for each run
	stop_listener
	start_listener --tls --maildir in
	run -77 send --to b@example.net --tls "${known[@]}" < <(make_message)
	assert_equal "$(stored)" 1
	rm listener.err
}

@test "files that cannot be used are named, and nothing starts" {
	certs=$BATS_FILE_TMPDIR
	echo x >broken.pem
	for args in '--cert none.pem' '--cert broken.pem' "--cert $certs/good.crt" \
		"--cert $certs/good.crt --key $certs/alone.key" "--cert $certs/good.pem --client-ca broken.pem"; do
		# shellcheck disable=SC2086 # words
		run -66 "$BSMTP" listen --tls $args --discard 127.0.0.1:0
		assert_output --regexp '^bsmtp: [^ ]*(none.pem|broken.pem|good.crt|alone.key): '
	done
	for args in '--tls --starttls' '--cert x' '--insecure' '--tls --key x' '--user a' \
		'--tls --user a' '--tls --pin x'; do
		# shellcheck disable=SC2086 # words
		run -64 "$BSMTP" send $args --to b@example.net </dev/null
	done
	run -64 "$BSMTP" listen --require-tls
}

# --- Reload, keys, tickets

@test "SIGHUP: certificates are read again, and the session that is open goes on" {
	certs=$BATS_FILE_TMPDIR
	cp "$certs/good.pem" here.pem
	start_listener --tls --cert here.pem --maildir in --json --trace
	mkfifo way
	dialogue <way >said 3>&- &
	client=$!
	exec 4>way
	printf 'EHLO x\nMAIL FROM:<a@example.org>\nRCPT TO:<b@example.net>\n' >&4
	await has ' recipient ok' said
	cp "$certs/renewed.pem" here.pem
	kill -HUP "$listener_pid"
	served() { openssl s_client -connect "$address" </dev/null 2>/dev/null | grep -q 'subject=CN = renewed'; }
	await served
	printf 'DATA\nSubject: x\n\n.\nQUIT\n' >&4
	exec 4>&-
	wait $client
	run -0 codes <said
	assert_output '220 250 250 250 354 250 221'
	assert_equal "$(stored)" 1
	# what cannot be read leaves what there is
	echo broken >here.pem
	kill -HUP "$listener_pid"
	await has 'here.pem: no certificate' listener.err
	served
	rm listener.err
}

@test "SSLKEYLOGFILE is written by both sides, and they agree" {
	export SSLKEYLOGFILE
	certs=$BATS_FILE_TMPDIR
	SSLKEYLOGFILE=$PWD/server.keys secured tls
	SSLKEYLOGFILE=$PWD/client.keys deliver --tls
	grep -q '^CLIENT_TRAFFIC_SECRET_0 ' client.keys
	sort client.keys >a
	sort server.keys | cmp a -
}

@test "--tickets: kept for the owner alone, and the next session resumes" {
	umask 0
	for how in tls starttls; do
		secured $how --trace
		for mode in bsmtp pipelining; do
			rm -f tickets
			run -0 deliver --$how --mode $mode --tickets tickets --trace
			refute_output --partial resumed
			assert_equal "$(stat -c %a tickets)" 600
			run -0 deliver --$how --mode $mode --tickets tickets --trace
			assert_output --partial '=== TLSv1.3, resumed'
			await has '=== TLSv1.3, resumed' listener.err
			: >listener.err
		done
		assert_equal "$(stored)" 4
		assert_equal "$(ls tickets*)" tickets
		stop_listener
	done
	rm listener.err
}

@test "tickets that others may read, or that are broken, or another's, are not used" {
	secured tls
	resumes() { deliver --tls --tickets tickets --trace 2>&1 | grep -c resumed; }
	deliver --tls --tickets tickets
	cp tickets good
	run -0 resumes
	for mode in 640 604 660; do
		chmod $mode tickets
		run -0 deliver --tls --tickets tickets --trace
		assert_output --partial 'bsmtp: tickets: not used: it must be yours'
		refute_output --partial resumed
		assert_equal "$(stat -c %a tickets)" 600
	done
	sed '4s/[A-Za-z]/+/g' good >tickets
	run -1 resumes
	head -c 300 good >tickets
	run -1 resumes
	: >tickets
	run -1 resumes
	sed '1s/.*/127.0.0.1:1/' good >tickets
	run -1 resumes
	run -0 resumes
	# another's tickets, that this server cannot open
	stop_listener
	secured tls
	printf '%s\n' "$address" | cat - <(tail -n +2 good) >tickets
	run -1 resumes
	assert_equal "$(stored)" 1
}

@test "a ticket does not pass over the certificate: it must have been verified, for that name" {
	certs=$BATS_FILE_TMPDIR
	start_listener --tls --cert "$certs/alone.pem" --maildir in --trace
	make_message | send --tls --insecure --to b@example.net --tickets tickets
	assert_equal "$(stored)" 1
	rm in/new/*
	unsent 77 'self-signed' --tls --tickets tickets
	pin=sha256:$(pin_of "$certs/alone.crt")
	make_message | send --tls --pin "$pin" --to b@example.net --tickets tickets
	rm in/new/*
	unsent 77 'self-signed' --tls --tickets tickets
	unsent 77 'not the one of --pin' --tls --tickets tickets --pin "sha256:$(pin_of "$certs/good.crt")"
	stop_listener
	start_listener --tls --cert "$certs/stranger.pem" --maildir in --trace
	deliver --tls --tls-name stranger.example --tickets tickets
	rm in/new/*
	unsent 77 mismatch --tls --tickets tickets
	rm listener.err
}

# --- Ends, stalls, attacks on the way

@test "truncation in mid-message stores nothing, and is no clean end" {
	large=$((SCALE > 10 ? 200000 : 20000))
	cut=$((large / 2))
	# a record of one octet has 23
	[ "${BSMTP_BUILD:-}" != torture ] || cut=100000
	{ echo 'Subject: long'; echo; head -c $large /dev/zero | tr '\0' x | fold -w 76; } >m
	for how in tls starttls; do
		for framing in bdat data; do
			secured $how --json --trace
			start_relay "cut:$cut"
			run -75 send --ca "$certs/ca.pem" --$how --framing $framing --to b@example.net --json m
			await has session listener.out
			assert_equal "$(stored)" 0
			assert_equal "$(jq -r 'select(.event == "session").messages' listener.out)" 0
			run -1 grep -E 'end: quit' listener.err
			stop_listener
		done
	done
	rm listener.err
}

@test "an end without close_notify is told from one with it, and neither ends a body" {
	secured tls --trace
	for how in cut notified; do
		: >listener.err
		/usr/bin/python3 - "$address" $how "$certs/ca.pem" <<-'PY'
		import socket, ssl, sys
		host, port = sys.argv[1].split(":")
		raw = socket.create_connection((host, int(port)))
		tls = ssl.create_default_context(cafile=sys.argv[3]).wrap_socket(raw, server_hostname=host)
		tls.sendall(b"BSMTP x\r\nMAIL FROM:<a@x.example>\r\nRCPT TO:<b@x.example>\r\nBDAT 100 LAST\r\nabc\r\n")
		replies = b""
		while b"recipient ok\r\n" not in replies:
		    replies += tls.recv(4096)
		if sys.argv[2] == "notified":
		    tls.unwrap()
		tls.close()
		PY
		await has 'end: eof' listener.err
		[ $how = cut ] && want=1 || want=0
		assert_equal "$how $(grep -c '=== TLS: unexpected eof' listener.err)" "$how $want"
		assert_equal "$(stored)" 0
	done
	rm listener.err
}

@test "an end that comes in one piece with octets is seen at once, though the connection stays" {
	secured tls --trace
	for how in close_notify nonsense; do
		: >listener.err
		/usr/bin/python3 - "$address" $how "$certs/ca.pem" <<-'PY'
		import socket, ssl, sys
		host, port = sys.argv[1].split(":")
		raw = socket.create_connection((host, int(port)), 20)
		come, go = ssl.MemoryBIO(), ssl.MemoryBIO()
		tls = ssl.create_default_context(cafile=sys.argv[3]).wrap_bio(come, go, server_hostname=host)
		while True:
		    try:
		        tls.do_handshake()
		        break
		    except ssl.SSLWantReadError:
		        raw.sendall(go.read())
		        come.write(raw.recv(65536))
		tls.write(b"BSMTP x\r\nMAIL FROM:<a@x.example>\r\n")
		if sys.argv[2] == "close_notify":
		    try:
		        tls.unwrap()
		    except ssl.SSLWantReadError:
		        pass
		octets = go.read()
		if sys.argv[2] == "nonsense":
		    octets += b"\x17\x03\x03\0\x20" + b"x" * 32
		raw.sendall(octets)
		while raw.recv(65536):      # fails after 20 s without an end
		    pass
		PY
		await has 'end: eof' listener.err
		grep -q '<~  MAIL' listener.err
	done
	rm listener.err
}

@test "the connection ends behind the client's whole stream: nothing is called delivered" {
	certs=$BATS_FILE_TMPDIR
	start_peer "tls:$certs/good.pem" 'send:220 x\r\n' 'recv:QUIT' \
		'send:250-x\r\n250-BSMTP\r\n250 CHUNKING\r\n250 a\r\n250 b\r\n' close
	run -75 --separate-stderr deliver --tls --grace 0
	echo "$output" >sent.json
	assert_equal "$(summary unknown)" 1
}

@test "the client says close_notify at the end" {
	certs=$BATS_FILE_TMPDIR
	start_peer "tls:$certs/good.pem" 'send:220 x\r\n' 'recv:EHLO' 'send:250 x\r\n' 'recv:MAIL' \
		'send:250 x\r\n' 'recv:RCPT' 'send:250 x\r\n' 'recv:DATA' 'send:354 x\r\n' \
		'recv:\r\n.\r\n' 'send:250 x\r\n' 'recv:QUIT' 'send:221 x\r\n' notified
	deliver --tls --mode lockstep
	await test -e received
	assert_equal "$(cat notified)" yes
}

@test "who stalls in mid-handshake keeps nobody waiting, and is shown out" {
	for how in tls starttls; do
		secured $how --timeout 3s --json
		exec {there}<>"/dev/tcp/127.0.0.1/${address##*:}"
		[ $how = tls ] || printf 'BSMTP x.example STARTTLS\r\n' >&$there
		printf '\x16\x03\x01\x02\x00\x01\x00' >&$there
		deliver --$how
		assert_equal "$(stored)" 1
		cat <&$there >said                      # until it closes
		exec {there}>&-
		await has '"messages":0' listener.out
		stop_listener
	done
}

@test "a server that stalls in mid-handshake: the client gives up, and nothing is sent" {
	certs=$BATS_FILE_TMPDIR
	start_peer recv 'send:\x16' eof
	run -75 deliver --tls --timeout 1s
	assert_output --partial 'TLS: silent for 1 s, giving up'
	start_peer 'send:220 x\r\n220 2.0.0 go\r\n' recv eof
	run -75 deliver --starttls --timeout 1s
	assert_output --partial 'TLS: silent for 1 s, giving up'
}

@test "what is no TLS is not taken for it, by neither side" {
	secured tls
	exec {there}<>"/dev/tcp/127.0.0.1/${address##*:}"
	printf 'EHLO x\r\nMAIL FROM:<a@example.org>\r\n' >&$there
	run -0 cat <&$there
	exec {there}>&-
	refute_output --regexp '[25][0-9][0-9] '
	deliver --tls
	start_peer 'send:220 x ESMTP\r\n' eof
	run -77 deliver --tls
	assert_output --partial 'TLS: wrong version number'
}

@test "renegotiation is refused, and the listener goes on" {
	secured tls
	# shellcheck disable=SC2094 # what it says is waited for
	{
		printf 'EHLO x\n'
		await has '^250 ' said
		echo R
		await has 'no renegotiation' said
	} | openssl s_client -tls1_2 -crlf -connect "$address" >said 2>&1 || :
	grep -q 'no renegotiation' said
	deliver --tls
	assert_equal "$(stored)" 1
}
