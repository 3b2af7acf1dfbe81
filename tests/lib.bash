# lib.bash - what the suite shares: a listener at a free port, scripted peers,
# mail to send.  Each test runs in a folder of its own.
bats_require_minimum_version 1.5.0
export BATS_LIB_PATH=${BATS_LIB_PATH:-/usr/lib/bats}
bats_load_library bats-support
bats_load_library bats-assert

top=$(cd "$BATS_TEST_DIRNAME/.." && pwd)
BSMTP=${BSMTP:-$top/bsmtp}
SCALE=${BSMTP_SCALE:-100}

setup() {
	cd "$BATS_TEST_TMPDIR" || exit 1
	pids=()
	listener_pid=
}

teardown() {
	for pid in "${pids[@]}"; do
		kill "$pid" 2>/dev/null || :
		wait "$pid" 2>/dev/null || :
	done
	if [ -z "${may_complain:-}" ] && [ -s listener.err ]; then
		echo 'the listener complained:'
		cat listener.err
		return 1
	fi
}

# await CMD...: polls until it succeeds, for 30 seconds at most.
await() {
	local end=$((SECONDS + 30))
	until "$@"; do
		[ $SECONDS -lt $end ] || { echo "never: $*"; cat listener.err 2>/dev/null; return 1; }
		read -rt 0.02 <> <(:) || :
	done
}

start_listener() {
	rm -f addr
	"$BSMTP" listen --address-file addr "$@" 127.0.0.1:0 >listener.out 2>listener.err 3>&- &
	listener_pid=$!
	pids+=($!)
	await test -s addr
	address=$(cat addr)
}

stop_listener() {
	kill "$listener_pid"
	wait "$listener_pid"
}

# start_peer SCENARIO: a scripted server (tools/peer.py), its address in $address.
start_peer() {
	rm -f port
	/usr/bin/python3 "$top/tests/tools/peer.py" "$@" >port 3>&- &
	pids+=($!)
	await test -s port
	address=127.0.0.1:$(cat port)
}

make_message() {
	printf '%s\n' 'From: Alice <alice@example.org>' 'To: Bob <bob@example.net>' \
		'Subject: hello' '' 'first line' '.a line with a dot' '' 'last line'
}

# make_mbox N: messages of 4 KiB.
make_mbox() {
	awk -v n="$1" 'BEGIN {
		for (i = 1; i <= n; i++) {
			print "From alice@example.org Mon Nov 23 12:00:00 2026"
			print "From: alice@example.org\nTo: bob@example.net\nSubject: message " i
			print "Message-ID: <" i "@example.org>\n"
			for (k = 0; k < 54; k++)
				print "The quick brown fox jumps over the lazy dog, line " k " of message " i "."
			print ".dot\n>From me\n"
		}
	}'
}

send() { "$BSMTP" send --server "$address" "$@"; }
summary() { jq -r "select(.event == \"summary\") | .$1" <sent.json; }
stored() { find "${1:-in}/new" -type f | wc -l; }
# The message as it was sent: the trace header that the store put before it goes.
content() { sed '1,/^	.* [0-9:]* +0000$/d' "$1"; }
