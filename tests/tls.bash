# tls.bash - what the tests of TLS share: certificates, a listener that has one,
# who is in between.
# shellcheck shell=bash disable=SC2154 # lib.bash and the tests share variables

setup_file() {
	"$BATS_TEST_DIRNAME/tools/certs" "$BATS_FILE_TMPDIR"
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
