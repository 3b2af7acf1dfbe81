# AUTH: accounts, secrets, who may speak.
# shellcheck disable=SC2030,SC2031,SC2154 # lib.bash has variables, bats subshells
load lib
load tls

# mode: turnarounds by --tls and by --starttls, of one message in each manner.
turnarounds='bsmtp 2 2
early 3 5
pipelining 4 6
lockstep 7 9'

plain_auth() { printf '\0%s\0%s' "$1" "$2" | base64; }
# with_users HOW OPTION...
with_users() {
	[ -e users ] || "$BSMTP" passwd alice <<<sesame >users
	secured "$1" --users users "${@:2}"
}
# as NAME OPTION...
as() {
	echo sesame >password
	deliver --user "$1" --password-file password "${@:2}"
}

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
	assert_equal "$(grep -c '<~  AUTH' listener.err)" 10
	run -1 grep -iE "$secret|sesame|c2VzYW1l|YWxpY2U=" listener.err
	rm listener.err
}

@test "AUTH: its dialogues, and what is no response" {
	with_users tls --allow 127.0.0.1/32
	good=$(plain_auth alice sesame)
	while read -r want said; do
		printf 'EHLO x\n%b\nNOOP\nQUIT\n' "$said" | dialogue >replies
		assert_equal "$said $(codes <replies)" "$said 220 250 ${want//,/ } 250 221"
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
	echo sesame >password
	run -64 send --to b@example.net --user alice --password-file password
	assert_output --partial 'a password goes over TLS or a local socket only'
	# s_client takes the first octet of the reply to STARTTLS for all of it
	if [ "${BSMTP_BUILD:-}" != torture ]; then
		printf 'EHLO x\nQUIT\n' | dialogue -starttls smtp >said
		grep -q '^250.AUTH PLAIN LOGIN' said
	fi
	as alice --starttls --mode pipelining --trace 2>said
	grep -q '<~  250.AUTH PLAIN LOGIN' said
	assert_equal "$(stored)" 1
	rm in/new/*
	stop_listener
	# a local socket
	rm -f addr
	"$BSMTP" listen --address-file addr --users users --maildir in "unix:$PWD/s" 3>&- &
	pids+=($!)
	await test -s addr
	for mode in bsmtp pipelining; do
		make_message | "$BSMTP" send --server "unix:$PWD/s" --to b@example.net --mode $mode --user alice \
			--password-file password
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
	printf 'x y\n' >carols
	deliver --tls --user carol --password-file carols --grace 20s
	as dave --tls --grace 20s
	assert_equal "$(stored)" 2
	run -64 "$BSMTP" passwd a:b <carols
	run -64 "$BSMTP" passwd
	run -0 "$BSMTP" passwd --help
	assert_output 'usage: bsmtp passwd name'
	run -64 "$BSMTP" passwd --carol <carols
	# what would be cut off is refused
	run -66 "$BSMTP" passwd a < <(printf '%0300d\n' 0)
	run -66 "$BSMTP" passwd a </dev/null
	# shellcheck disable=SC2016 # they are dollars
	for line in carol carol: ':{SCRYPT}1$x$y' 'carol:{MD5}x' 'carol:{SCRYPT}16384$AAAA$AAAA' \
		"carol:{SCRYPT}1048576\$$(cut -d '$' -f 2- other)"; do
		echo "$line" >broken
		run -66 "$BSMTP" listen --tls --users broken --discard 127.0.0.1:0
		assert_output --partial 'broken: line 1: not name:{scheme}hash'
	done
}

