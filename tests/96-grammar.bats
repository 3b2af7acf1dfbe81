#!/usr/bin/env bats
# The grammar of bsmtp(7): another program calls it valid, and every stream that the client
# sends, and every batch that either side writes, derives from it.
# shellcheck disable=SC2154 # lib.bash has variables
load lib
load peers/peers

page=$BATS_TEST_DIRNAME/../man/bsmtp.7
abnf() { /usr/bin/python3 "$BATS_TEST_DIRNAME/tools/abnf.py" "$@"; }

# captured OPTION... -- LISTEN-OPTION...: a session of the client, with what comes on standard
# input; what it sends is kept.
captured() {
	local options=() n
	while [ "$1" != -- ]; do
		options+=("$1")
		shift
	done
	shift
	n=$(find . -name 'stream.*' | wc -l)
	printf '%q ' "$BSMTP" listen --stdio --discard "$@" >server
	"$BSMTP" send --helo client.example.org --connect-command "tee stream.$n | sh server 2>server.err" \
		"${options[@]}" 2>>client.err || :
	[ -s "stream.$n" ]
}

@test "the grammar is ABNF, complete, and without contradiction" {
	"$BATS_TEST_DIRNAME/tools/fetch-peers" apg-js
	abnf rules "$page" | sed 's/$/\r/' >grammar
	[ "$(grep -c ' = ' grammar)" -gt 50 ]
	apg() {
		node -e 'require(process.argv[1])(process.argv.slice(2))' \
			"$top/build/peers/apg-js/node_modules/apg-js/src/apg/apg.js" -i "$1" -o out.js 2>&1
	}
	run -0 apg grammar
	assert_output --partial 'grammar object generated'
	# and it would say so
	grep -v '^id-word' grammar >lacking
	run apg lacking
	refute_output --partial 'grammar object generated'
}

@test "every dialogue of the page derives from it" {
	/usr/bin/python3 - "$page" <<-'EOT'
	import re, sys
	page = open(sys.argv[1]).read()
	blocks = re.findall(r'^\.Bd.*\n((?:[CS]: .*\n)+)\.Ed', page, re.M)
	n = 0
	for text in blocks:
	    if "(ClientHello)" in text or "(and so on)" in text:
	        continue
	    stream = b""
	    for line in text.splitlines():
	        who, _, line = line.replace("\\&", "").partition(": ")
	        body = re.fullmatch(r"\((\d+) octets of body\)", line)
	        if who == "C":
	            stream += b"x" * (int(body[1]) - 2) + b"\r\n" if body else line.encode() + b"\r\n"
	    open("dialogue.%d" % n, "wb").write(stream)
	    n += 1
	assert n >= 7, n
	EOT
	abnf derive "$page" session dialogue.*
	[ ! -e dialogue.99 ]
}

@test "every stream of the client derives from it" {
	make_mbox 3 >box
	make_message >m
	to=(--to bob@example.net,carol@example.net)
	for framing in auto bdat data; do
		captured --framing $framing "${to[@]}" box -- --keywords CHUNKING,PIPELINING,8BITMIME,SIZE,SMTPUTF8
		captured --framing $framing "${to[@]}" box --
		captured --framing $framing --grace 0 "${to[@]}" box --
		captured --framing $framing "${to[@]}" box -- --bsmtp silent
		captured --framing $framing "${to[@]}" box -- --bsmtp refuse
		captured --framing $framing "${to[@]}" box -- --reply 'MAIL#2=550 no'
		captured --framing $framing "${to[@]}" box -- --reply 'RCPT=550 no'
		captured --framing $framing "${to[@]}" box -- --reply 'BODY#1=452 no'
		captured --framing $framing "${to[@]}" box -- --keywords PIPELINING --reply 'RCPT=550 no'
		captured --framing $framing "${to[@]}" box -- --keywords PIPELINING --reply 'DATA=451 no'
		captured --framing $framing --transid "${to[@]}" box --
		captured --framing $framing --transid "${to[@]}" box -- --max-recipients 1
	done
	# of unknown length, and one that breaks off
	cat box | captured "${to[@]}" --
	head -c 300000 /dev/zero | tr '\0' x | fold -w 70 >long
	{ make_message; cat long long; } | captured "${to[@]}" --
	{ printf 'HELO x\nMAIL FROM:<a@example.org>\nRCPT TO:<b@example.net>\nDATA\nSubject: x\n\n'; cat long; } |
		captured --format batch --
	{ make_message; cat long; } | captured "${to[@]}" -- --reply 'BDAT#1=452 4.3.1 no'
	# names and words
	printf 'From: "q \\"x\\""@example.org\nTo: gr\xc3\xbcn@b\xc3\xbccher.example, <postmaster@[192.0.2.1]>\nSubject: gr\xc3\xbcn\n\nx\n' |
		captured -t --
	captured --from '<>' --to 'x@[IPv6:2001:db8::1]' m --
	captured --helo '[IPv6:::1]' "${to[@]}" m --
	printf 'EHLO x\nMAIL FROM:<a@example.org> SIZE=3 BODY=7BIT RET=HDRS\nRCPT TO:<b@example.net> NOTIFY=NEVER\nDATA\nx\n.\n' |
		captured --format batch --
	# who it is
	printf 'sesame\n' >password
	(umask 077; "$BSMTP" passwd alice <password >users)
	captured --user alice --password-file password "${to[@]}" box -- --users users
	captured --user alice --password-file password "${to[@]}" box --
	printf 'wrong\n' >password
	captured --user alice --password-file password "${to[@]}" box -- --users users
	[ "$(find . -name 'stream.*' | wc -l)" -ge 45 ]
	grep -q '^RSET' stream.*
	grep -aq $'^BDAT [0-9]*\r$' stream.*
	grep -q '^AUTH' stream.*
	grep -q 'TRANSID=' stream.*
	abnf derive "$page" session stream.*
}

@test "every batch that is written derives from it" {
	make_mbox 3 >box
	make_message >m
	"$BSMTP" send --to b@example.net --output batch.1 box
	"$BSMTP" send --transid --to b@example.net,c@example.net --output batch.2 box m
	"$BSMTP" send --to b@example.net --output batch.3 /dev/null
	start_listener --batch batch.4
	send --to b@example.net box
	send batch.2
	stop_listener
	cat batch.4 batch.1 >batch.5
	printf '%s\r\n' 'HELO x.example' 'VERB ON' 'TICK 0001' 'NOOP' 'NOOP a reply' '' 'RSET' 'MAIL FROM:<a@example.org>' \
		'RCPT TO:<b@example.net>' RSET 'MAIL FROM:<>' 'RCPT TO:<b@example.net>' DATA '' .. . QUIT >batch.6
	"$BSMTP" send --to b@example.net --output batch.7 batch.6
	run -0 abnf derive "$page" batch batch.[1-7]
	assert_output 7
}

@test "what is no stream does not derive from it" {
	n=0
	wrong() { n=$((n + 1)); printf '%b' "$@" >"wrong.$n"; }
	open='BSMTP c.example\r\n'
	mail='MAIL FROM:<a@example.org>\r\n' rcpt='RCPT TO:<b@example.net>\r\n' body='BDAT 3 LAST\r\nx\r\n'
	wrong "BSMTP\r\n"
	wrong "BSMTP -\r\n"
	wrong "EHLO c.example\r\n" "$mail" "$rcpt" "$body"
	wrong "$open" "$rcpt" "$body"
	wrong "$open" "$mail" "$body"
	wrong "$open" "$mail" "$mail" "$rcpt" "$body"
	wrong "$open" "$mail" "$rcpt" 'BDAT 4 LAST\r\nx\r\n'
	wrong "$open" "$mail" "$rcpt" 'BDAT 2 LAST\r\nx\r\n'
	wrong "$open" "$mail" "$rcpt" 'BDAT 3\r\nx\r\n'
	wrong "$open" "$mail" "$rcpt" 'BDAT LAST\r\n'
	wrong "$open" "$mail" "$rcpt" 'DATA\r\nx\r\n'
	wrong "$open" "$mail" "$rcpt" 'DATA\r\n.x\r\n.\r\n'
	wrong "$open" "$mail" "$rcpt" 'DATA\r\nx\n.\r\n'
	wrong "$open" 'MAIL FROM:<a@example.org>\n' "$rcpt" "$body"
	wrong "$open" 'MAIL FROM: <a@example.org>\r\n' "$rcpt" "$body"
	wrong "$open" 'MAIL FROM:<a>\r\n' "$rcpt" "$body"
	wrong "$open" 'MAIL FROM:<a@example.org>SIZE=1\r\n' "$rcpt" "$body"
	wrong "$open" "$mail" 'RCPT TO:<>\r\n' "$body"
	wrong "$open" 'AUTH PLAIN\r\n' "$mail" "$rcpt" "$body"
	wrong "$open" "$mail" "$rcpt" "$body" 'AUTH PLAIN YQBhAGE=\r\n'
	wrong "$open" 'QUIT\r\n' "$mail" "$rcpt" "$body"
	run -0 abnf refuse "$page" session wrong.*
	assert_output 21
	run -1 abnf derive "$page" session wrong.1
	run -0 abnf refuse "$page" batch wrong.*
}
