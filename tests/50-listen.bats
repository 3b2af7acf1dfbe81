# The listener: stores, limits, who may speak, how it ends, faults on request.
load lib

# talk LINE...: an SMTP dialogue in one write; the replies.
talk() {
	/usr/bin/python3 - "$address" "$@" <<'PY'
import socket, sys
host, port = sys.argv[1].rsplit(":", 1)
s = socket.create_connection((host, int(port)))
s.settimeout(30)
s.sendall(b"".join(line.encode("latin-1").decode("unicode_escape").encode("latin-1") for line in sys.argv[2:]))
s.shutdown(socket.SHUT_WR)
out = b""
while True:
    data = s.recv(65536)
    if not data:
        break
    out += data
sys.stdout.write(out.decode("latin-1").replace("\r", ""))
PY
}

@test "a dialogue in one write is answered in order" {
	start_listener --maildir in
	run -0 talk 'BSMTP c.example\r\n' 'MAIL FROM:<>\r\n' 'RCPT TO:<"a b"@[127.0.0.1]>\r\n' \
		'BDAT 3\r\nx\r\n' 'BDAT 3 LAST\r\ny\r\n' 'QUIT\r\n'
	assert_equal "$(grep -oE '^[0-9]{3} ' <<<"$output" | xargs)" '220 250 250 250 250 250 221'
	assert_equal "$(content in/new/* | xargs)" 'x y'
}

@test "a body is never run as commands, whatever was refused before it" {
	start_listener --maildir in --reply 'RCPT *=550 5.1.1 no'
	evil='MAIL FROM:<evil@x.example>\r\nRCPT TO:<ok@x.example>\r\nDATA\r\nhidden\r\n'
	run -0 talk 'BSMTP c.example\r\n' 'MAIL FROM:<a@x.example>\r\n' 'RCPT TO:<b@x.example>\r\n' \
		'DATA\r\n' "$evil" '.\r\n' 'MAIL FROM:<a@x.example>\r\n' 'RCPT TO:<b@x.example>\r\n' \
		"BDAT 66 LAST\r\n$(printf '%s' "$evil")" 'QUIT\r\n'
	assert_equal "$(grep -oE '^[0-9]{3} ' <<<"$output" | xargs)" \
		'220 250 250 550 354 554 250 550 554 221'
	assert_equal "$(stored)" 0
	run -0 talk 'BSMTP c.example\r\n' 'DATA\r\n' "$evil" '.\r\n' 'QUIT\r\n'
	assert_equal "$(grep -oE '^[0-9]{3} ' <<<"$output" | xargs)" '220 250 354 503 221'
	assert_equal "$(stored)" 0
}

@test "only CRLF.CRLF ends a body, and bare newlines are refused, or mended" {
	start_listener --eml out
	run -0 talk 'EHLO c.example\r\n' 'MAIL FROM:<a@x.example>\r\n' 'RCPT TO:<b@x.example>\r\n' \
		'DATA\r\nx\n.\n\n.\r\ny\r\n.\r\n' 'QUIT\r\n'
	assert_output --partial '554 5.6.0 bare CR or LF at offset 1'
	assert_equal "$(ls out | wc -l)" 0
	stop_listener
	start_listener --eml out --bare-newlines normalize
	talk 'EHLO c.example\r\n' 'MAIL FROM:<a@x.example>\r\n' 'RCPT TO:<b@x.example>\r\n' \
		'BDAT 7 LAST\r\nx\ny\rz\r\n' 'QUIT\r\n'
	printf 'x\r\ny\r\nz\r\n' | cmp - out/000001.eml
}

@test "limits have their replies" {
	start_listener --maildir in --max-size 10 --max-recipients 1 --keywords SIZE,CHUNKING
	run -0 talk 'EHLO c.example\r\n' 'MAIL FROM:<a@x.example> SIZE=11\r\n' 'RSET\r\n' \
		'MAIL FROM:<a@x.example>\r\n' 'RCPT TO:<b@x.example>\r\n' 'RCPT TO:<c@x.example>\r\n' \
		'BDAT 12 LAST\r\n0123456789\r\n' 'FOO\r\n' 'QUIT\r\n'
	assert_equal "$(grep -oE '^[0-9]{3} ' <<<"$output" | xargs)" '220 250 552 250 250 250 452 552 500 221'
	run -1 grep PIPELINING <<<"$output"
}

@test "HTTP is shown the door, a line too long refused, LF alone too" {
	start_listener --discard
	run -0 talk 'POST / HTTP/1.1\r\n' 'EHLO c.example\r\n'
	assert_equal "$(grep -oE '^[0-9]{3} ' <<<"$output" | xargs)" '220 554'
	run -0 talk "EHLO $(printf '%3000s' x)\r\n" 'NOOP\n' 'QUIT\r\n'
	assert_equal "$(grep -oE '^[0-9]{3} ' <<<"$output" | xargs)" '220 500 500 221'
}

@test "who may speak: --allow, and a wide address needs it" {
	run -64 "$BSMTP" listen --discard 0.0.0.0:0
	assert_output --partial --allow
	start_listener --discard --allow 192.0.2.0/24
	run -0 talk 'BSMTP c.example\r\n'
	assert_output --partial '554 5.7.1'
	stop_listener
	start_listener --discard --smtp deny
	run -0 talk 'EHLO c.example\r\n' 'QUIT\r\n'
	assert_output --partial '550 5.7.1'
}

@test "what the opening gets: refuse, close, unknown, silent" {
	make_message >m
	start_listener --discard --bsmtp refuse
	run -69 send --to b@example.net m
	stop_listener
	start_listener --discard --bsmtp close
	run -75 send --to b@example.net m
	stop_listener
	start_listener --discard --bsmtp unknown
	run -69 send --to b@example.net m
	stop_listener
	start_listener --discard --bsmtp silent
	run -0 send --to b@example.net --grace 50ms m
}

@test "faults: a dropped reply leaves the message stored and the client in doubt" {
	start_listener --maildir in --reply 'BODY#2=drop'
	make_mbox 3 >m
	run -75 --separate-stderr send --to b@example.net --json m
	echo "$output" >sent.json
	assert_equal "$(summary delivered) $(summary unknown)" '1 2'
	assert [ "$(stored)" -ge 2 ]
}

@test "faults: delay, cut-after, and a rule that is none" {
	make_message >m
	start_listener --discard --reply 'MAIL=delay 200ms'
	send --to b@example.net --json m >sent.json
	assert [ "$(jq -r 'select(.event=="summary")|.seconds >= 0.2' sent.json)" = true ]
	stop_listener
	start_listener --discard --cut-after 100
	run -75 send --to b@example.net --grace 0 m
	run -64 "$BSMTP" listen --reply 'FOO=550 x' 127.0.0.1:0
	assert_output --partial verb
}

@test "--count and --once end it with 0, --deadline with 75" {
	make_message >m
	start_listener --discard --count 2
	send --to b@example.net m
	send --to b@example.net m
	wait "$listener_pid"
	start_listener --discard --once
	send --to b@example.net m
	wait "$listener_pid"
	run -75 "$BSMTP" listen --discard --count 1 --deadline 100ms 127.0.0.1:0
}

@test "SIGTERM: what is whole is settled, the rest gets 421, the status is 0" {
	start_listener --maildir in
	exec 9<>"/dev/tcp/${address%:*}/${address##*:}"
	read -r line <&9
	assert_equal "${line:0:3}" 220
	kill "$listener_pid"
	read -r line <&9
	assert_equal "${line:0:3}" 421
	exec 9>&-
	wait "$listener_pid"
}

@test "a store that cannot be written gives 45z, and the listener lives on" {
	start_listener --maildir in
	may_complain=1
	make_message >m
	rm -rf in/tmp
	: >in/tmp
	run -75 send --to b@example.net m
	assert_output --partial '451 4.3.0'
	mount -t tmpfs -o size=16k none in 2>/dev/null || return 0
	umount in
	kill -0 "$listener_pid"
}

@test "a full disk gives 452, and nothing half-written stays" {
	mkdir small
	mount -t tmpfs -o size=64k none small || { echo 'needs root'; return 1; }
	start_listener --maildir small/in
	may_complain=1
	{ make_message; head -c 200000 /dev/zero | tr '\0' 'x'; } >m
	run -75 send --to b@example.net m
	local left
	left=$(find small/in -type f ! -name bsmtp.journal | wc -l)
	stop_listener
	umount small
	assert_output --partial '452 4.3.1'
	assert_equal "$left" 0
}

@test "the trace header and the file name hold nothing that a peer chose unchecked" {
	start_listener --maildir in
	talk 'EHLO c.example\r\n' 'MAIL FROM:<a@x.example>\r\n' 'RCPT TO:<"../../x"@y.example>\r\n' \
		'BDAT 3 LAST\r\nx\r\n' 'QUIT\r\n'
	assert_equal "$(find . -name '*x*y*' | wc -l)" 0
	run -0 head -n 3 in/new/*
	assert_line --index 0 'Return-Path: <a@x.example>'
	assert_line --index 1 'Delivered-To: "../../x"@y.example'
}

@test "UNIX sockets, both sides; the file goes at the end" {
	make_message >m
	"$BSMTP" listen --maildir in --address-file addr "unix:$PWD/s" 2>listener.err 3>&- &
	pids+=($!)
	await test -s addr
	"$BSMTP" send --server "unix:$PWD/s" --to b@example.net m
	assert_equal "$(stored)" 1
	kill "${pids[0]}"
	wait "${pids[0]}"
	assert [ ! -e s ]
}

@test "a peer that never reads is held back, not stored in memory" {
	start_listener --discard --timeout 2s
	/usr/bin/python3 - "$address" <<'PY'
import socket, sys
host, port = sys.argv[1].rsplit(":", 1)
s = socket.create_connection((host, int(port)))
s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
s.settimeout(1)
sent = 0
try:
    while sent < 1 << 30:
        sent += s.send(b"NOOP\r\n" * 1000)
except OSError:
    pass
assert sent < 1 << 28, sent
PY
	kill -0 "$listener_pid"
}

@test "300 idle sessions cost little" {
	start_listener --discard
	/usr/bin/python3 - "$address" <<'PY'
import socket, sys
host, port = sys.argv[1].rsplit(":", 1)
all = [socket.create_connection((host, int(port))) for _ in range(300)]
files = [s.makefile("rb") for s in all]
for s, f in zip(all, files):
    assert f.readline().startswith(b"220 ")
    s.sendall(b"BSMTP c.example\r\n")
for f in files:
    assert f.readline().startswith(b"250-")
PY
	if [ -z "${BSMTP_BUILD:-}" ] || [ "${BSMTP_BUILD}" = bsmtp ]; then
		assert [ "$(awk '/^VmHWM/ { print $2 }' "/proc/$listener_pid/status")" -lt 20000 ]
	fi
}

@test "the window is large where the system grants it, and the system's own elsewhere" {
	start_listener --discard
	run ss -tlnmH "sport = :${address##*:}"
	[[ $output =~ ,rb([0-9]+) ]]
	window=${BASH_REMATCH[1]}
	read -r granted </proc/sys/net/core/rmem_max
	read -r _ default _ </proc/sys/net/ipv4/tcp_rmem
	if [ "$granted" -ge $((2 << 20)) ]; then
		[ "$window" -ge $((4 << 20)) ]
	else
		assert_equal "$window" "$default"
	fi
}

@test "the size of a MAIL that was refused is not the next one's, in any mode that says it" {
	cat >batch <<-'END'
	EHLO c
	MAIL FROM:<a@x.example> SIZE=5000
	RCPT TO:<b@x.example>
	DATA
	large
	.
	MAIL FROM:<a@x.example>
	RCPT TO:<b@x.example>
	DATA
	small
	.
	END
	start_listener --eml in --max-size 400
	for mode in bsmtp pipelining lockstep; do
		run -69 "$BSMTP" send --server "$address" --mode $mode batch
		assert_output --partial 'message 1'
		refute_output --partial 'message 2'
	done
	assert_equal "$(cat in/*.eml | grep -c small)" 3
}
