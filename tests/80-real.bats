# Real mail, real peers, and the listener killed in mid-stream.
load lib

@test "every message of Python's own test data arrives identical" {
	data=/usr/lib/python3.11/test/test_email/data
	start_listener --eml out
	for f in "$data"/msg_*.txt; do
		send --to b@example.net --from a@example.org --format message "$f"
	done
	/usr/bin/python3 - "$data" <<'PY'
import glob, re, sys
sent = sorted(glob.glob(sys.argv[1] + "/msg_*.txt"))
got = sorted(glob.glob("out/*.eml"))
assert len(sent) == len(got) > 40, (len(sent), len(got))
for a, b in zip(sent, got):
    text = re.sub(rb"\r(?!\n)", b" ", open(a, "rb").read())
    text = text.replace(b"\r\n", b"\n")
    if text and not text.endswith(b"\n"):
        text += b"\n"
    assert text.replace(b"\n", b"\r\n") == open(b, "rb").read(), a
PY
}

@test "a git patch series is an mbox, and each patch arrives identical" {
	git init -q repo
	for i in 1 2 3 4 5 6 7 8 9 10; do
		printf 'From %s\n.dot\n' "$i" >>repo/f
		git -C repo add f
		git -C repo -c user.name=A -c user.email=a@example.org commit -qm "Change $i"
	done
	git -C repo format-patch --stdout --root >series.mbox
	start_listener --maildir in
	send --to b@example.net --json series.mbox >sent.json
	assert_equal "$(summary delivered)" 10
	/usr/bin/python3 - <<'PY'
import glob, mailbox, re
def strip(octets):
    head = re.match(rb"Return-Path: .*\n(?:Delivered-To: .*\n)*Received: .*\n(?:\t.*\n)*", octets)
    return octets[head.end():]
want = sorted(m.as_bytes() for m in mailbox.mbox("series.mbox"))
got = sorted(strip(open(f, "rb").read()) for f in glob.glob("in/new/*"))
assert len(want) == 10 and want == got
PY
}

@test "swaks, msmtp, curl and smtplib deliver to the listener" {
	start_listener --maildir in
	make_message >m
	host=${address%:*} port=${address##*:}
	swaks --server "$host" --port "$port" --from a@example.org --to b@example.net --data @m >/dev/null
	msmtp --host="$host" --port="$port" --auth=off --tls=off --from=a@example.org b@example.net <m
	curl -s --crlf --url "smtp://$address" --mail-from a@example.org --mail-rcpt b@example.net -T m
	/usr/bin/python3 - "$host" "$port" <<'PY'
import smtplib, sys
with smtplib.SMTP(sys.argv[1], int(sys.argv[2])) as s:
    s.sendmail("a@example.org", ["b@example.net"], open("m").read())
PY
	assert_equal "$(stored)" 4
	for f in in/new/*; do
		grep -qx '.a line with a dot' "$f"
		grep -qx 'last line' "$f"
	done
}

@test "send to aiosmtpd: the fallback to ordinary manners, and BSMTP where it was taught" {
	make_mbox 3 >m
	for taught in no yes; do
		rm -f port
		/usr/bin/python3 "$top/tests/tools/aiosmtpd_peer.py" "$taught" >port 3>&- &
		pids+=($!)
		await test -s port
		address=127.0.0.1:$(cat port)
		for mode in lockstep pipelining early; do
			run -0 send --to b@example.net --mode $mode m
		done
		if [ $taught = yes ]; then
			run -0 send --to b@example.net m
			run -69 send --to no@example.net m
		else
			run -69 send --to b@example.net m
		fi
	done
}

@test "kill -9 in mid-stream: what was reported delivered is there, whole" {
	make_mbox $((500 * SCALE / 100)) >m
	for i in $(seq "${BSMTP_KILLS:-8}"); do
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
