# The client: formats, manners, refusals, fates, exit statuses.
load lib

@test "an mbox arrives whole, in each manner and framing" {
	make_mbox 20 >a.mbox
	for mode in bsmtp early pipelining lockstep; do
		for framing in bdat data; do
			rm -rf in
			start_listener --maildir in
			run -0 --separate-stderr send --to bob@example.net --mode $mode --framing $framing --json a.mbox
			echo "$output" >sent.json
			assert_equal "$(summary delivered)" 20
			assert_equal "$(stored)" 20
			stop_listener
		done
	done
	for f in in/new/*; do
		content "$f" | grep -q '^From me$'
		content "$f" | grep -q '^\.dot$'
		assert_equal "$(content "$f" | wc -l)" 61
	done
}

@test "the turnarounds are what the table of manners says" {
	make_mbox 30 >a.mbox
	start_listener --discard --latency 5ms
	for row in 'bsmtp 2' 'pipelining 3' 'early 2'; do
		[ "${BSMTP_BUILD:-}" != torture ] || break      # its queues hold few replies
		# shellcheck disable=SC2086 # two words
		set -- $row
		send --to bob@example.net --mode "$1" --json a.mbox >sent.json
		assert_equal "$1 $(summary turnarounds)" "$row"
	done
	if [ "${BSMTP_BUILD:-}" != torture ]; then
		send --to bob@example.net --grace 0 --json a.mbox >sent.json
		assert_equal "$(summary turnarounds)" 1
	fi
	send --to bob@example.net --mode lockstep --json a.mbox >sent.json
	assert [ "$(summary turnarounds)" -ge 90 ]
}

@test "content passes to the octet: dots, 8-bit, NUL, no final newline, CRLF" {
	start_listener --eml out
	printf 'Subject: x\r\n\r\n.\r\n..\r\n\0\377 8-bit\r\n.x\r\nno end' >m.eml
	send --to bob@example.net m.eml
	printf '\r\n' | cat m.eml - | cmp - out/000001.eml
	tr -d '\r' <m.eml >lf.eml
	for framing in data bdat; do
		send --to bob@example.net --framing $framing lf.eml
	done
	cmp out/000001.eml out/000002.eml
	cmp out/000001.eml out/000003.eml
	assert_equal "$(jq -r '.to[0]' out/000001.json)" bob@example.net
}

@test "a stray CR becomes a space and is counted" {
	start_listener --eml out
	printf 'Subject: x\n\na\rb\n' | send --to bob@example.net --json >sent.json
	assert_equal "$(summary stray_cr)" 1
	printf 'Subject: x\r\n\r\na b\r\n' | cmp - out/000001.eml
}

@test "recipients come from the header with -t, and Bcc goes" {
	start_listener --eml out
	printf '%s\n' 'From: me@example.org' 'To: "Q, R" <q@example.net>, (c) r@example.net' \
		'Bcc: hidden@example.net,' ' folded@example.net' 'Subject: x' '' 'body' |
		send -t
	assert_equal "$(jq -c .to out/000001.json)" \
		'["q@example.net","r@example.net","hidden@example.net","folded@example.net"]'
	run -1 grep -i hidden out/000001.eml
	run -1 grep -i folded out/000001.eml
	assert_equal "$(grep -c . out/000001.eml)" 5
}

@test "the sender is the From_ line's, else Return-Path, Sender, From" {
	start_listener --eml out
	sender() { send --to b@example.net "$@"; jq -r .from "$(ls out/*.json | tail -n 1)"; }
	printf 'From a@x.example Mon Nov 23 12:00:00 2026\nFrom: f@x.example\n\nx\n' >m
	assert_equal "$(sender m)" a@x.example
	printf 'From 0123abcd Mon Sep 17 00:00:00 2001\nFrom: f@x.example\n\nx\n' >m
	assert_equal "$(sender m)" f@x.example
	printf 'From: f@x.example\nSender: s@x.example\nReturn-Path: <r@x.example>\n\nx\n' >m
	assert_equal "$(sender m)" r@x.example
	printf 'From: f@x.example\nSender: s@x.example\n\nx\n' >m
	assert_equal "$(sender m)" s@x.example
	assert_equal "$(sender --from '<>' m)" ''
}

@test "a From_ line counts only behind a blank line, and only with the form" {
	start_listener --maildir in
	printf '%s\n' 'From a@x.example Mon Nov 23 12:00:00 2026' 'Subject: 1' '' 'text' \
		'From a@x.example Mon Nov 23 12:00:00 2026' '' 'From me to you' \
		'>From quoted' '>>From twice' '' 'From b@x.example Mon Nov 23 12:00:00 2026' \
		'Subject: 2' '' 'x' '' >m
	send --to b@example.net --json m >sent.json
	assert_equal "$(summary messages)" 2
	grep -qx 'From quoted' in/new/*
	grep -qx '>From twice' in/new/*
}

@test "a Maildir is a source" {
	mkdir -p box/cur box/new box/tmp
	make_message >box/cur/1:2,S
	make_message >box/new/2
	start_listener --maildir in
	send --to b@example.net --json box >sent.json
	assert_equal "$(summary delivered)" 2
}

@test "nothing to send is 0 with a note" {
	run -0 "$BSMTP" send --to b@example.net /dev/null
	assert_output 'bsmtp: nothing to send'
}

@test "usage errors are 64, what cannot be read 66, no mail 65, no host 68" {
	run -64 "$BSMTP" send
	run -64 "$BSMTP" send --to 'not an address'
	run -64 "$BSMTP" send --bogus
	run -64 "$BSMTP"
	run -66 "$BSMTP" send --to b@example.net /nonexistent
	echo hello >text
	run -65 "$BSMTP" send --to b@example.net text
	make_message >m
	run -68 "$BSMTP" send --server nohost.invalid --to b@example.net m
	assert_output --partial nohost.invalid
}

@test "a refused opening is 69, and nothing was sent" {
	make_message >m
	start_peer recv 'send:220 x\r\n500 5.5.1 what\r\n' eof
	run -69 send --to b@example.net m
	assert_output --partial '500 5.5.1 what'
	await test -e received
	run -1 grep MAIL received
}

@test "a close or a reset in the grace is 75, as a 4yz; garbage is 76" {
	make_message >m
	for end in close reset; do
		start_peer recv $end
		run -75 send --to b@example.net m
		assert_output --partial 'closed the connection'
		assert_output --partial 'does it speak BSMTP?'
	done
	start_peer 'send:421 4.3.2 later\r\n' eof
	run -75 send --to b@example.net m
	start_peer 'send:SSH-2.0-foo\r\n' eof
	run -76 send --to b@example.net m
}

@test "nobody listening is 75" {
	make_message >m
	start_listener --discard
	stop_listener
	run -75 send --to b@example.net m
	assert_output --partial refused
}

@test "silence to the end is 75, and the fate unknown" {
	make_message >m
	start_peer silent
	run -75 --separate-stderr send --to b@example.net --grace 50ms --timeout 1s --json m
	echo "$output" >sent.json
	assert_equal "$(summary unknown)" 1
}

@test "a late refusal: each message is judged by its own reply" {
	make_message >m
	start_peer recv 'send:220 x\r\n' recv:QUIT \
		'send:500 what\r\n250 a\r\n250 a\r\n250 a\r\n221 bye\r\n' eof
	run -69 --separate-stderr send --to b@example.net --grace 50ms --json m
	echo "$output" >sent.json
	assert_equal "$(summary delivered)" 1
}

@test "421 in mid-stream leaves the rest unknown" {
	make_mbox 3 >m
	start_peer recv 'send:220 x\r\n250-x\r\n250-BSMTP\r\n250 CHUNKING\r\n' recv:QUIT \
		'send:250 a\r\n250 a\r\n250 a\r\n421 bye\r\n' eof
	run -75 --separate-stderr send --to b@example.net --json m
	echo "$output" >sent.json
	assert_equal "$(summary delivered) $(summary unknown)" '1 2'
}

@test "replies without end, and a reply line of 100 MB, are 76" {
	make_message >m
	start_peer recv 'send:220 x\r\n' 'flood:250-more\r\n'
	run -76 send --to b@example.net m
	start_peer recv 'send:220 x\r\n250 x\r\n' 'flood:250 more\r\n'
	run -76 send --to b@example.net m
	start_peer 'send:220 ' big:100000000
	run -76 send --to b@example.net m
}

@test "a server that stops reading is given up, and nothing called delivered" {
	make_mbox 2000 >m
	start_peer 'send:220 x\r\n250-x\r\n250 BSMTP\r\n' recv silent
	[ "${BSMTP_BUILD:-}" != torture ] || make_mbox 100 >m
	run -75 --separate-stderr send --to b@example.net --timeout 1s --json m
	echo "$output" >sent.json
	assert_equal "$(summary delivered)" 0
}

@test "refusals: each recipient has its own verdict, each message its fate" {
	start_listener --maildir in --reply 'RCPT *@no.example=550 5.1.1 no such user' \
		--reply 'BODY#2=451 4.3.0 later' --reply 'MAIL bad@*=553 5.7.1 not you'
	make_message >m
	run -69 --separate-stderr send --to a@x.example,b@no.example --json m
	echo "$output" >sent.json
	assert_equal "$(jq -r 'select(.event=="message")|.fate, .to[].fate, .to[1].code' sent.json | xargs)" \
		'delivered delivered rejected 550'
	run -75 send --to a@x.example m
	assert_output --partial '451 4.3.0 later'
	run -69 send --from bad@x.example --to a@x.example m
	assert_output --partial '553 5.7.1 not you'
	run -69 send --to a@no.example --framing data --mode lockstep m
	assert_equal "$(stored)" 1
}

@test "a refused transaction costs the next one nothing, and RSET goes before it" {
	start_listener --eml out --bsmtp silent --reply 'MAIL#2=550 5.7.1 no'
	make_mbox 4 >m
	run -69 --separate-stderr send --to b@example.net --grace 50ms --json -v m
	echo "$output" >sent.json
	assert_equal "$(summary delivered) $(summary rejected)" '3 1'
	assert_equal "$(grep -c -- '-> RSET' <<<"$stderr")" 3
	assert_equal "$(ls out/*.eml | wc -l)" 3
}

@test "with DATA a body never goes to a server that refused it" {
	start_peer recv 'send:220 x\r\n250 x\r\n' recv:DATA \
		'send:250 a\r\n550 a\r\n554 no valid recipients\r\n' recv:QUIT \
		'send:250 reset\r\n221 bye\r\n' eof
	make_message >m
	run -69 send --to b@example.net --framing data m
	await test -e received
	run -1 grep 'first line' received
}

@test "environment variables set options, the command line wins" {
	start_listener --eml out
	make_message >m
	export BSMTP_SERVER=$address BSMTP_TO=env@example.net
	"$BSMTP" send m
	"$BSMTP" send --to line@example.net m
	assert_equal "$(jq -r '.to[]' out/000001.json out/000002.json | xargs)" \
		'env@example.net line@example.net'
}
