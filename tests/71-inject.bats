# The injection pair (CVE-2011-0411 and its twin): whoever is in between slips plaintext
# in, behind the command or the reply that TLS follows.  It is never interpreted, the
# session is dead, and nothing is stored.  Without it real programs deliver.
# shellcheck disable=SC2030,SC2031,SC2154 # lib.bash has variables, bats subshells
load lib
load tls
load peers/peers

evil='MAIL FROM:<evil@example.org>\r\nRCPT TO:<b@example.net>\r\n'
commands="EHLO evil.example\\r\\n${evil}DATA\\r\\nSubject: evil\\r\\n\\r\\n.\\r\\nQUIT\\r\\n"
stream="BSMTP evil.example\\r\\n${evil}BDAT 6 LAST\\r\\nevil\\r\\nQUIT\\r\\n"
replies='250-evil.example\r\n250-BSMTP\r\n250-CHUNKING\r\n250-AUTH PLAIN\r\n250 STARTTLS\r\n250 ok\r\n250 ok\r\n250 ok\r\n'
behind='STARTTLS\r\n'

# The listener has seen no command but what was sent in the clear, and holds nothing.
untouched() {
	await has "end: " listener.err
	assert_equal "$(stored)" 0
	run -1 grep -E 'evil|MAIL FROM|DATA|BDAT' listener.err
	run -1 grep '~>' listener.err
}

# --- Our two ends

@test "commands behind our opening or STARTTLS are never run: the session is dead" {
	for mode in bsmtp early pipelining lockstep; do
		for slipped in "$stream" "$commands" 'NOOP\r\n' '\r\n' x '\x16'; do
			secured starttls --trace
			start_relay "client:$behind=$slipped"
			# all that the client sees is that the connection ends
			run -75 deliver --starttls --mode $mode --timeout 5s
			untouched
			stop_listener
		done
	done
	rm listener.err
}

@test "commands behind STARTTLS, on a line with latency too: the session is dead" {
	for mode in bsmtp pipelining; do
		secured starttls --trace --latency 50ms
		start_relay "client:$behind=$commands"
		run -75 deliver --starttls --mode $mode
		untouched
		stop_listener
	done
	rm listener.err
}

@test "a stream in one write behind an opening that is refused TLS is not looked at" {
	start_listener --maildir in --trace
	exec {there}<>"/dev/tcp/127.0.0.1/${address##*:}"
	# shellcheck disable=SC2059 # escapes
	printf "BSMTP x.example STARTTLS\\r\\n$stream" >&$there
	run -0 cat <&$there
	exec {there}>&-
	assert_equal "$(codes <<<"$output")" '220 555'
	assert_equal "$(stored)" 0
	run -1 grep -iE 'evil|MAIL' listener.err
	rm listener.err
}

@test "replies behind the 220 are never believed: exit 77, and nothing is sent" {
	for mode in bsmtp early pipelining lockstep; do
		for slipped in "$replies" '250 ok\r\n' '\r\n' x '\x15'; do
			secured starttls --trace
			start_relay "server:220 2.0.0 ready for TLS\\r\\n=$slipped"
			run -77 deliver --starttls --mode $mode --timeout 5s
			untouched
			run -1 grep -aE 'MAIL|BDAT|DATA|alice' relay.client
			stop_listener
		done
	done
	rm listener.err
}

@test "a 220 before its time makes the true one no TLS: exit 77, and nothing is sent" {
	for mode in bsmtp early pipelining lockstep; do
		for match in 'ESMTP bsmtp\r\n' '250 STARTTLS\r\n'; do
			[ $mode != bsmtp ] || [[ $match == ESMTP* ]] || continue
			secured starttls --trace
			start_relay "server:$match=220 2.0.0 ready for TLS\\r\\n"
			run -77 deliver --starttls --mode $mode --timeout 5s
			assert_equal "$(stored)" 0
			run -1 grep -aE 'MAIL|BDAT|DATA|alice' relay.client
			stop_listener
		done
	done
	rm listener.err
}

@test "STARTTLS is taken out of the offer: exit 77, and nothing is sent in the clear" {
	for mode in early pipelining lockstep; do
		start_peer 'send:220 x\r\n' recv:EHLO 'send:250-x\r\n250-CHUNKING\r\n250 PIPELINING\r\n' eof
		run -77 deliver --starttls --mode $mode
		await test -s received
		run -1 grep -E 'MAIL|BDAT|alice' received
		rm received
	done
	start_peer 'send:220 x\r\n' 'recv:STARTTLS' 'send:500 what\r\n' eof
	run ! deliver --starttls
	await test -s received
	run -1 grep -aE 'MAIL|BDAT|alice' received
}

# --- Real clients of the listener

# client NAME: sends the file m; its exit status is the program's.
client() {
	local host=127.0.0.1 port=${address##*:} certs=$BATS_FILE_TMPDIR
	case $1 in
	s_client)
		{ printf 'EHLO c.example\nMAIL FROM:<a@example.org>\nRCPT TO:<b@example.net>\nDATA\n'
			sed 's/^\./../' m
			printf '.\nQUIT\n'; } | dialogue -starttls smtp | grep -q '^221 '
		;;
	swaks)
		swaks --server $host --port "$port" --tls --tls-verify --tls-ca-path "$certs/ca.pem" \
			--timeout 5 --from a@example.org --to b@example.net --data @m
		;;
	msmtp)
		msmtp --host=localhost --port="$port" --auth=off --tls=on --tls-starttls=on \
			--tls-trust-file="$certs/ca.pem" --timeout=5 --from=a@example.org b@example.net <m
		;;
	curl)
		curl -sS --crlf --ssl-reqd --cacert "$certs/ca.pem" --max-time 5 --url "smtp://$address" \
			--mail-from a@example.org --mail-rcpt b@example.net -T m
		;;
	esac
}

@test "s_client, swaks, msmtp and curl deliver by STARTTLS; commands slipped in do not" {
	{ printf '%s\n' 'Date: Mon, 23 Nov 2026 12:00:00 +0000' 'Message-ID: <1@example.org>'
		make_message; } >m
	for name in s_client swaks msmtp curl; do
		# s_client takes the first octet of the reply to STARTTLS for all of it
		[ "$name ${BSMTP_BUILD:-}" != 's_client torture' ] || continue
		secured starttls --trace
		client $name
		assert_equal "$name $(stored)" "$name 1"
		grep -q 'Subject: hello' in/new/*
		grep -q '<~  MAIL' listener.err
		rm in/new/*
		: >listener.err
		start_relay "client:$behind=$commands"
		run ! client $name
		untouched
		stop_listener
	done
	rm listener.err
}

@test "Postfix relays to the listener by STARTTLS; commands slipped in do not" {
	make_message >m
	secured starttls --trace
	for step in '' "client:$behind=$commands"; do
		listener=$address
		: >listener.err
		[ -z "$step" ] || { start_relay "$step"; }
		relay=$address
		start_postfix as_it_comes 'mynetworks = 127.0.0.0/8' 'relay_domains = relay.example' \
			'relay_transport = smtp' 'fast_flush_domains =' \
			'smtpd_relay_restrictions = permit_mynetworks, reject' 'smtpd_recipient_restrictions =' \
			"relayhost = [127.0.0.1]:${relay##*:}" 'smtp_tls_security_level = secure' \
			"smtp_tls_CAfile = $BATS_FILE_TMPDIR/ca.pem" 'smtp_tls_secure_cert_match = localhost' \
			'smtp_tls_loglevel = 1'
		send --mode pipelining --timeout 60s --to b@relay.example m || { cat log/mail; return 1; }
		if [ -z "$step" ]; then
			await has 'status=sent' log/mail || { cat log/mail; return 1; }
			assert_equal "$(stored)" 1
			grep -q '<~  MAIL' listener.err
			rm in/new/*
		else
			await has 'status=deferred' log/mail
			untouched
		fi
		stop_peer
		address=$listener
	done
	rm listener.err
}

@test "Exim relays to the listener by STARTTLS; commands slipped in do not" {
	make_message >m
	secured starttls --trace
	for step in '' "client:$behind=$commands"; do
		: >listener.err
		[ -z "$step" ] || start_relay "$step"
		cp "$BATS_FILE_TMPDIR/ca.pem" .
		chmod 644 ca.pem
		exim_client 'hosts_require_tls = *' "tls_verify_certificates = $PWD/ca.pem" \
			'tls_verify_hosts = *' 'tls_verify_cert_hostnames ='
		exim_send -f a@example.org b@example.net <m
		if [ -z "$step" ]; then
			assert_equal "$(stored)" 1
			grep -q ' => .* X=TLS.* CV=yes' log/main
			rm in/new/*
		else
			grep -qE ' == .*(TLS|defer)' log/main
			untouched
		fi
	done
	rm listener.err
}

# --- Real servers

# server_holds N
server_holds() {
	await queue_empty
	assert_equal "$(delivered_files)" "$1"
}

# both REPLY: the server at $address, whose answer to STARTTLS is REPLY, is sent to, in
# peace and with somebody in between.
both() {
	make_message >m
	for mode in pipelining lockstep early; do
		rm -rf mail/*
		make_message | send --ca "$BATS_FILE_TMPDIR/ca.pem" --tls-name localhost --starttls --mode "$mode" \
			--from a@example.org --to b@example.net --json >sent.json
		assert_equal "$(jq -r 'select(.event == "opening").tls' sent.json)" TLSv1.3
		server_holds 1
		[ "$mode" != pipelining ] || [ -z "${no_early:-}" ] || break
	done
	true_address=$address
	rm -rf mail/*
	start_relay "server:$1\\r\\n=$replies"
	run -77 deliver --tls-name localhost --starttls --mode pipelining --from a@example.org --timeout 5s
	server_holds 0
	run -1 grep -aE 'MAIL|BDAT|DATA|alice' relay.client
	# What is slipped in there is theirs to drop: nothing of ours becomes another's.
	address=$true_address
	start_relay "client:STARTTLS\\r\\n=$commands"
	run -0 deliver --tls-name localhost --starttls --mode pipelining --from a@example.org
	server_holds 1
	run -1 grep -r evil mail
}

@test "Postfix is sent to by STARTTLS; replies slipped in are not believed" {
	start_postfix as_it_comes "smtpd_tls_chain_files = $BATS_FILE_TMPDIR/good.key, $BATS_FILE_TMPDIR/good.crt" \
		'smtpd_tls_security_level = may'
	both '220 2.0.0 Ready to start TLS'
}

@test "Exim is sent to by STARTTLS; replies slipped in are not believed" {
	unpacked exim4-daemon-light
	# shellcheck disable=SC2034 # for configure_exim
	exim_tls="tls_advertise_hosts = *
tls_certificate = $PWD/pem"
	cp "$BATS_FILE_TMPDIR/good.pem" pem
	chmod 644 pem
	start_exim </dev/null
	no_early=1 both '220 TLS go ahead'
}
