# TLS, in both of the proposal's variations and by RFC 3207; who may speak.
# shellcheck disable=SC2030,SC2031,SC2154 # lib.bash has variables, bats subshells
load lib

setup_file() {
	"$BATS_TEST_DIRNAME/tools/certs" "$BATS_FILE_TMPDIR"
	bsmtp=${BSMTP:-$BATS_TEST_DIRNAME/../bsmtp}
	echo sesame >"$BATS_FILE_TMPDIR/password"
	"$bsmtp" passwd alice <"$BATS_FILE_TMPDIR/password" >"$BATS_FILE_TMPDIR/users"
}

# secured HOW OPTION...: a listener, with TLS and a Maildir.
secured() {
	certs=$BATS_FILE_TMPDIR
	rm -rf in
	start_listener "--$1" --cert "$certs/good.pem" --maildir in "${@:2}"
}
# deliver OPTION...: a message, with a certificate to be verified.
deliver() { make_message | send --ca "$BATS_FILE_TMPDIR/ca.pem" --to b@example.net --json "$@"; }

# start_relay STEP...: stands before $address, and takes that place.
start_relay() {
	rm -f port
	/usr/bin/python3 "$top/tests/tools/relay.py" "$address" "$@" >port 3>&- &
	pids+=($!)
	await test -s port
	address=127.0.0.1:$(cat port)
}

# dialogue OPTION... : s_client to the listener, with what comes on standard input.
dialogue() {
	openssl s_client -quiet -crlf -connect "$address" -verify_return_error \
		-CAfile "$BATS_FILE_TMPDIR/ca.pem" "$@" 2>/dev/null
}
# the codes of replies, without those that are continued
codes() { grep -oE '^[0-9]{3} ' | xargs; }
pin_of() { openssl x509 -in "$1" -outform DER | sha256sum | cut -d ' ' -f 1; }
plain_auth() { printf '\0%s\0%s' "$1" "$2" | base64; }
has() { grep -q -- "$1" "$2"; }
# unsent STATUS TEXT OPTION...: nothing of the message leaves, and the reason is told.
unsent() {
	local status=$1 text=$2
	shift 2
	: >listener.err
	run "-$status" --separate-stderr deliver "$@"
	echo "$output" >sent.json
	[[ $stderr =~ $text ]] || { echo "said: $stderr"; return 1; }
	assert_equal "$(summary unsent)" 1
	assert_equal "$(stored)" 0
	# the listener runs with --trace
	run -1 grep -E '(MAIL|BDAT|DATA)' listener.err
}

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
		assert_equal "$(summary delivered) $(summary turnarounds)" "$((200 * SCALE / 100)) 2"
		assert_equal "$(stored)" $((200 * SCALE / 100))
		stop_listener
	done
}

@test "large messages pass in each manner, in both directions at once" {
	{ echo 'Subject: large'; echo; head -c $((20000 * SCALE)) /dev/zero | tr '\0' x | fold -w 76; } >m
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
		assert_equal "$(summary grace_seconds)" 0.000
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
	{ echo 'Subject: secret'; echo; head -c 100000 /dev/zero | tr '\0' x | fold -w 76; } >m
	for how in tls starttls; do
		for mode in bsmtp pipelining; do
			rm -rf in
			start_listener --$how --cert "$certs/good.pem" --maildir in
			start_relay
			send --ca "$certs/ca.pem" --$how --mode $mode --to b@example.net m
			assert_equal "$(stored)" 1
			assert [ "$(stat -c %s relay.client)" -gt 100000 ]
			run -1 grep -aE 'secret|xxxxx|MAIL|b@example' relay.client relay.server
			run -77 send --tls-name other.example --ca "$certs/ca.pem" --$how --mode $mode --to b@example.net m
			assert [ "$(wc -c <relay.client)" -gt 100000 ]
			# What is between the certificate and the end is one alert.
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
		run ! --separate-stderr deliver --mode $mode
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
	read -ra pin <<<"$output"
	make_message | send --to b@example.net --tls "${pin[@]}"
	assert_equal "$(stored)" 1
	# another for each run
	stop_listener
	start_listener --tls --maildir in
	run -77 send --to b@example.net --tls "${pin[@]}" <<<x
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

# --- AUTH

# with_users HOW OPTION...
with_users() { secured "$1" --users "$BATS_FILE_TMPDIR/users" "${@:2}"; }
# as NAME OPTION...: its password is in the file password.
as() { deliver --user "$1" --password-file "$BATS_FILE_TMPDIR/password" "${@:2}"; }

@test "AUTH PLAIN, in each manner and in the stream of BSMTP no turnaround more" {
	for how in tls starttls; do
		with_users $how --allow 127.0.0.1/32
		as alice --$how >sent.json
		assert_equal "$(summary turnarounds)" 2
		while read -r mode by_tls by_starttls; do
			[ $how = tls ] && count=$by_tls || count=$by_starttls
			[ "$mode" = bsmtp ] || as alice --$how --mode "$mode" >sent.json
			# else one command more, that is waited for
			[ "$mode" = bsmtp ] || assert_equal "$mode $(summary turnarounds)" "$mode $((count + 1))"
		done < <(grep -v early <<<"$turnarounds")
		as alice --$how --mode early
		assert_equal "$(stored)" 4
		stop_listener
	done
}

@test "whom AUTH must prove: BSMTP is opened under TLS, and the grace tells of it" {
	with_users tls
	as alice --tls --grace 20s >sent.json
	assert_equal "$(jq -r 'select(.event == "opening").agreed' sent.json)" reply
	assert_equal "$(summary turnarounds) $(stored)" '3 1'
}

@test "where there are accounts, mail without one is refused" {
	with_users starttls --allow 127.0.0.1/32
	for mode in bsmtp early pipelining lockstep; do
		run -77 --separate-stderr deliver --starttls --mode $mode
		echo "$output" >sent.json
		assert_equal "$(jq -r 'select(.event == "message").reply.code' sent.json)" 530
	done
	assert_equal "$(stored)" 0
}

@test "a wrong password, a name that is unknown: exit 77, and nothing is stored" {
	certs=$BATS_FILE_TMPDIR
	echo wrong >wrong
	for how in tls starttls; do
		with_users $how --allow 127.0.0.1/32
		for mode in bsmtp pipelining; do
			run -77 --separate-stderr deliver --$how --mode $mode --user alice --password-file wrong
			[[ $stderr == *535* ]] || { echo "$stderr"; return 1; }
		done
		run -77 --separate-stderr as mallory --$how
		assert_equal "$(stored)" 0
		grep -q 'bsmtp: 127.0.0.1:[0-9]*: not accepted: the user mallory' listener.err
		stop_listener
	done
	rm listener.err
}

@test "a refusal is kept back, and another session is served meanwhile" {
	with_users tls --allow 127.0.0.1/32
	printf 'EHLO x\nAUTH PLAIN %s\nQUIT\n' "$(plain_auth alice wrong)" | dialogue >said 3>&- &
	client=$!
	await has 'not accepted' listener.err
	as alice --tls --mode pipelining
	assert_equal "$(stored)" 1
	run -1 grep 535 said
	await grep -q '^535' said
	wait $client
	rm listener.err
}

@test "LOGIN, where a server has nothing else; the secrets are in no trace" {
	certs=$BATS_FILE_TMPDIR
	start_peer "tls:$certs/good.pem" 'send:220 x\r\n' 'recv:EHLO' 'send:250-x\r\n250 AUTH LOGIN\r\n' \
		'recv:AUTH LOGIN\r\n' 'send:334 VXNlcm5hbWU6\r\n' "recv:$(printf alice | base64)\\r\\n" \
		'send:334 UGFzc3dvcmQ6\r\n' "recv:$(printf sesame | base64)\\r\\n" 'send:235 ok\r\n' \
		'recv:MAIL' 'send:250 ok\r\n' 'recv:RCPT' 'send:250 ok\r\n' 'recv:DATA' 'send:354 go\r\n' \
		'recv:\r\n.\r\n' 'send:250 ok\r\n' 'recv:QUIT' 'send:221 ok\r\n' eof
	run -0 as alice --tls --mode pipelining --trace
	refute_output --partial "$(printf sesame | base64)"
	refute_output --partial "$(printf alice | base64)"
	refute_output --partial sesame
	assert_output --partial '~> AUTH LOGIN'
	await test -s received
	grep -q "^$(printf sesame | base64)" received
}

@test "a server that has no AUTH, or none that is known: exit 77, nothing is sent" {
	certs=$BATS_FILE_TMPDIR
	for offer in '250 x' '250-x\r\n250 AUTH GSSAPI'; do
		start_peer "tls:$certs/good.pem" 'send:220 x\r\n' 'recv:EHLO' "send:$offer\\r\\n" eof
		run -77 as alice --tls --mode pipelining
		await test -s received
		run -1 grep -E 'MAIL|AUTH' received
		rm received
	done
}

@test "secrets are masked in the traces of both sides" {
	secret=$(plain_auth alice sesame)
	with_users tls --allow 127.0.0.1/32 --trace
	for mode in bsmtp pipelining; do
		run -0 as alice --tls --mode $mode --trace
		assert_output --partial '~> AUTH PLAIN ****'
		refute_output --partial "$secret"
		refute_output --partial sesame
	done
	for said in "AUTH PLAIN $secret" "auth plain $secret" "AUTH  PLAIN  $secret" "AUTH XOAUTH2 $secret" \
		"AUTH $secret" "AUTH PLAIN
$secret" "AUTH LOGIN YWxpY2U=
c2VzYW1l" 'AUTH LOGIN
YWxpY2U=
c2VzYW1l'; do
		printf 'EHLO x\n%s\nQUIT\n' "$said" | dialogue >said
		has '^221 ' said
	done
	await grep -qE 'end: quit' listener.err
	assert_equal "$(grep -c 'AUTH' listener.err)" 18
	# the longest mechanism has twenty letters, and no name of one is a secret
	run -1 grep -iE "$secret|sesame|c2VzYW1l|YWxpY2U=" listener.err
	rm listener.err
}

@test "AUTH: its dialogues, and what is no response" {
	with_users tls --allow 127.0.0.1/32
	good=$(plain_auth alice sesame)
	while read -r want said; do
		printf "EHLO x\\n$said\\nNOOP\\nQUIT\\n" | dialogue | codes >codes
		assert_equal "$said $(cat codes)" "$said 220 250 ${want//,/ } 250 221"
	done <<-END
		235 AUTH PLAIN $good
		235 auth plain $good
		334,235 AUTH PLAIN\n$good
		334,334,235 AUTH LOGIN\nYWxpY2U=\nc2VzYW1l
		334,235 AUTH LOGIN YWxpY2U=\nc2VzYW1l
		235,503 AUTH PLAIN $good\nAUTH PLAIN $good
		235,250 AUTH PLAIN $good\nMAIL FROM:<a@example.org>
		530 MAIL FROM:<a@example.org>
		501 AUTH PLAIN =
		501 AUTH PLAIN AAA
		501 AUTH PLAIN YWxpY2U=
		334,501 AUTH PLAIN\n*
		334,501 AUTH LOGIN\n*
		334,334,501 AUTH LOGIN\nYWxpY2U=\n*
		504 AUTH CRAM-MD5
	END
}

@test "AUTH is offered under TLS and on local sockets, and nowhere else" {
	with_users starttls --allow 127.0.0.1/32
	printf 'EHLO x\r\nAUTH PLAIN %s\r\nQUIT\r\n' "$(plain_auth alice sesame)" >dialogue
	exec {there}<>"/dev/tcp/127.0.0.1/${address##*:}"
	cat dialogue >&$there
	cat <&$there >said
	exec {there}>&-
	run -1 grep AUTH said
	assert_equal "$(codes <said)" '220 250 530 221'
	run -64 as alice
	assert_output --partial 'a password goes over TLS or a local socket only'
	printf 'EHLO x\nQUIT\n' | dialogue -starttls smtp >said
	grep -q '^250.AUTH PLAIN LOGIN' said
	stop_listener
	# a local socket
	rm -f addr
	"$BSMTP" listen --address-file addr --users "$BATS_FILE_TMPDIR/users" --maildir in "unix:$PWD/s" 3>&- &
	pids+=($!)
	await test -s addr
	for mode in bsmtp pipelining; do
		make_message | "$BSMTP" send --server "unix:$PWD/s" --to b@example.net --mode $mode --user alice \
			--password-file "$BATS_FILE_TMPDIR/password"
	done
	assert_equal "$(stored)" 2
}

@test "passwd makes lines that listen takes: a salt for each, and no word of the password" {
	printf 'x y\n' | "$BSMTP" passwd carol >users
	printf 'x y\n' | "$BSMTP" passwd carol >other
	run -1 cmp -s users other
	run -1 grep 'x y' users
	grep -qE '^carol:\{SCRYPT\}16384\$[A-Za-z0-9+/]{22}==\$[A-Za-z0-9+/]{43}=$' users
	# and one that openssl made; a comment and an empty line are none
	{
		echo '# accounts'
		echo
		/usr/bin/python3 - <<'PY'
import base64, hashlib
salt = bytes(range(16))
made = hashlib.pbkdf2_hmac("sha256", b"sesame", salt, 1000)
print("dave:{PBKDF2-SHA256}1000$%s$%s" % tuple(base64.b64encode(x).decode() for x in (salt, made)))
PY
	} >>users
	secured tls --users users
	printf 'x y\n' >password
	deliver --tls --user carol --password-file password --grace 20s
	as dave --tls --grace 20s
	assert_equal "$(stored)" 2
	run -64 "$BSMTP" passwd a:b <password
	run -64 "$BSMTP" passwd
	run -66 "$BSMTP" passwd a </dev/null
	for line in carol carol: ':{SCRYPT}1$x$y' 'carol:{MD5}x' 'carol:{SCRYPT}16384$AAAA$AAAA' \
		"carol:{SCRYPT}1048576\$$(cut -d '$' -f 2- other)"; do
		echo "$line" >broken
		run -66 "$BSMTP" listen --tls --users broken --discard 127.0.0.1:0
		assert_output --partial 'broken: line 1: not name:{scheme}hash'
	done
}

# --- Ends, stalls, attacks on the way

@test "truncation in mid-message stores nothing, and is no clean end" {
	{ echo 'Subject: long'; echo; head -c 200000 /dev/zero | tr '\0' x | fold -w 76; } >m
	for how in tls starttls; do
		for framing in bdat data; do
			secured $how --json --trace
			start_relay cut:100000
			run -75 send --ca "$certs/ca.pem" --$how --framing $framing --to b@example.net --json m
			await has session listener.out
			assert_equal "$(stored)" 0
			assert_equal "$(jq -r 'select(.event == "session").messages' listener.out)" 0
			run -1 grep -E 'end: quit' listener.err
			grep -q '=== TLS: ' listener.err
			stop_listener
		done
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
	run -77 deliver --tls --timeout 1s
	assert_output --partial 'TLS: silent for 1 s, giving up'
	start_peer 'send:220 x\r\n220 2.0.0 go\r\n' recv eof
	run -77 deliver --starttls --timeout 1s
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
	{
		printf 'EHLO x\n'
		await grep -q '^250 ' said
		printf 'R\n'
		await grep -qE '^NOOP-after|no renegotiation' said
	} | run openssl s_client -tls1_2 -connect "$address" -crlf >said 2>&1
	{ printf 'EHLO x\n'; await grep -q '^250 ' said; echo R; await grep -q 'RENEGOTIATING' said; echo NOOP
		await grep -q 'no renegotiation' said; } | openssl s_client -tls1_2 -crlf -connect "$address" >said 2>&1 || :
	grep -q 'no renegotiation' said
	deliver --tls
	assert_equal "$(stored)" 1
}
