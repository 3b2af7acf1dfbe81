# Batches, RFC 2442: the stream at rest.  Written, and read back, also as others
# wrote them on BITNET.
# shellcheck disable=SC2030,SC2031,SC2154 # lib.bash has variables, bats subshells
load lib
load peers/peers

# A batch to read: printf's format.
batch() { printf "$@" >batch; }     # shellcheck disable=SC2059 # the format is the test's
good='MAIL FROM:<a@x.example>\r\nRCPT TO:<b@x.example>\r\nDATA\r\nSubject: good\r\n\r\ntext\r\n.\r\n'

# stands SENDER RECIPIENTS CONTENT N: what message N of the folder eml is.
stands() {
	local n
	n=$(printf %06d "$4")
	assert_equal "$(jq -r '[.from, (.to | join(","))] | join(" ")' "eml/$n.json")" "$1 $2"
	# shellcheck disable=SC2059 # the format is the test's
	printf "$3" | cmp - "eml/$n.eml"
}
messages() { find eml -name '*.eml' | wc -l; }

# --- Written

@test "--output writes the stream: EHLO, envelope, dots doubled, CRLF, QUIT" {
	printf 'Subject: x\n\n.\n..\n.x\nFrom me\nlast line without an end' >m
	run -0 --separate-stderr "$BSMTP" send --helo c.example --from '"a b"@x.example' \
		--to b@x.example,-c@x.example --output out m
	assert_equal "$output$stderr" ''
	printf '%s\r\n' 'EHLO c.example' 'MAIL FROM:<"a b"@x.example>' \
		'RCPT TO:<b@x.example>' 'RCPT TO:<-c@x.example>' 'DATA' 'Subject: x' '' '..' '...' '..x' \
		'From me' 'last line without an end' '.' 'QUIT' | cmp - out
	"$BSMTP" send --helo c.example --from '"a b"@x.example' --to b@x.example,-c@x.example \
		--output - <m | cmp - out
}

@test "--output writes each message of each input, and needs no network" {
	make_mbox 3 >three.mbox
	make_message >m
	export BSMTP_SERVER=nohost.invalid BSMTP_CONNECT_COMMAND='touch connected'
	"$BSMTP" send --to b@x.example --output out three.mbox m three.mbox
	assert_equal "$(grep -cx $'DATA\r' out)" 7
	assert_equal "$(grep -c '^EHLO' out) $(grep -cx $'QUIT\r' out)" '1 1'
	assert_equal "$(tail -n 1 out)" $'QUIT\r'
	refute [ -e connected ]
}

@test "--output names the null sender, asks for SMTPUTF8 where it is needed, takes Bcc out" {
	printf 'To: "Grün" <grün@x.example>\nBcc: hidden@x.example\nSubject: x\n\ntext\n' >m
	"$BSMTP" send --helo c.example --from '<>' --to-headers --output out m
	printf '%s\r\n' 'EHLO c.example' 'MAIL FROM:<> SMTPUTF8' \
		'RCPT TO:<grün@x.example>' 'RCPT TO:<hidden@x.example>' 'DATA' \
		'To: "Grün" <grün@x.example>' 'Subject: x' '' 'text' '.' 'QUIT' | cmp - out
}

@test "--output: a stray CR becomes a space, NUL and 8-bit stay" {
	printf 'Subject: x\n\na\rb\r\n\0\377\n\r' >m
	"$BSMTP" send --helo c.example --from a@x.example --to b@x.example --output out m
	printf '%b' 'EHLO c.example\r\nMAIL FROM:<a@x.example>\r\nRCPT TO:<b@x.example>' \
		'\r\nDATA\r\nSubject: x\r\n\r\na b\r\n\0\0377\r\n \r\n.\r\nQUIT\r\n' | cmp - out
}

@test "--output that cannot be created is 73, that is full 74, and both say so" {
	make_message >m
	run -73 "$BSMTP" send --to b@x.example --output nowhere/out m
	assert_output 'bsmtp: nowhere/out: No such file or directory'
	run -73 "$BSMTP" send --to b@x.example --output . m
	assert_output 'bsmtp: .: Is a directory'
	run -74 "$BSMTP" send --to b@x.example --output /dev/full m
	assert_output 'bsmtp: /dev/full: No space left on device'
	run -74 sh -c '"$@" >/dev/full' sh "$BSMTP" send --to b@x.example --output - m
	assert_output --partial 'No space left on device'
	make_mbox 200 >m
	run -74 "$BSMTP" send --to b@x.example --output /dev/full m
}

@test "--output tells of its errors, and keeps what is good" {
	make_message >m
	run -64 "$BSMTP" send --to b@x.example --output - --json m
	assert_output --partial -- --json
	printf 'Subject: no recipients\n\ntext\n' >none
	run -65 "$BSMTP" send --to-headers --output out m none m
	assert_output --partial 'none: message 2 (offset 0): no recipients'
	assert_equal "$(grep -cx $'DATA\r' out)" 2
	run -66 "$BSMTP" send --to-headers --output out m nonexistent m
	assert_output 'bsmtp: nonexistent: No such file or directory'
	assert_equal "$(grep -cx $'DATA\r' out)" 2
	assert_equal "$(tail -n 1 out)" $'QUIT\r'
}

@test "--output takes out again what breaks off; where it cannot, nothing follows it" {
	batch "$good${good%text*}"
	run -65 "$BSMTP" send --output out batch batch
	assert_output --partial 'batch: line 12: the file ends inside a message'
	assert_equal "$(grep -cx $'DATA\r' out) $(grep -cx '\.'$'\r' out)" '2 2'
	assert_equal "$(tail -n 1 out)" $'QUIT\r'
	# Into a pipe it cannot be taken back: nothing may follow it.
	run sh -c '"$@" | cat >piped' sh "$BSMTP" send --output - batch batch
	assert_equal "$(grep -cx $'DATA\r' piped) $(grep -cx '\.'$'\r' piped)" '2 1'
	run -1 grep QUIT piped
}

# --- Read

@test "a batch is sent to whom it names, and found by content, from a file and a pipe" {
	batch "EHLO c.example\r\n${good}MAIL FROM:<> BODY=8BITMIME\r\nRCPT TO:<c@x.example>\r
RCPT TO:<\"d e\"@x.example>\r\nDATA\r\n..\r\n...x\r\n.\r\nQUIT\r\n"
	start_listener --eml eml
	for how in "batch" "--format batch batch" "<" "-" "|" "--mode lockstep batch" \
		"--mode pipelining --framing data batch"; do
		rm -rf eml/*
		case $how in
		'<') send <batch ;;
		-) send - <batch ;;
		'|') while IFS= read -r line; do printf '%s\n' "$line"; done <batch | send --format batch ;;
		*)
			# shellcheck disable=SC2086 # words
			send $how
			;;
		esac
		n=$(basename "$(find eml -name '*.eml' | sort | head -n 1)" .eml)
		assert_equal "$(messages)" 2
		stands a@x.example b@x.example 'Subject: good\r\n\r\ntext\r\n' "$((10#$n))"
		stands '' 'c@x.example,"d e"@x.example' '.\r\n..x\r\n' "$((10#$n + 1))"
	done
}

@test "a batch as BITNET had them is understood, with LF and with CRLF" {
	start_listener --eml eml
	for end in '\n' '\r\n'; do
		rm -rf eml/*
		printf "%s$end" 'HELO VM1.EXAMPLE' 'VERB ON' 'TICK 0001' 'MAIL FROM:<JOE@VM1.EXAMPLE>' \
			'TICK 0002' 'RCPT TO:<A@VM2.EXAMPLE>' 'NOOP' 'rcpt to:<@gate.example:B@VM3.EXAMPLE>' \
			'DATA' 'Date: Mon, 23 Nov 87 12:00:00 EST' 'From: JOE' '' '..' 'Hello.' '..QUIT' '.' \
			'TICK 0003' 'rset' 'mail from:<OP@VM1.EXAMPLE>' 'Rcpt To:<C@VM2.EXAMPLE>' 'data' \
			'Subject: 2' '' '.' 'QUIT' >batch
		send --json batch >sent.json
		assert_equal "$(summary delivered) $(summary messages) $(messages)" '2 2 2'
		n=$(basename "$(find eml -name '*.eml' | sort | head -n 1)" .eml)
		stands JOE@VM1.EXAMPLE A@VM2.EXAMPLE,B@VM3.EXAMPLE \
			'Date: Mon, 23 Nov 87 12:00:00 EST\r\nFrom: JOE\r\n\r\n.\r\nHello.\r\n.QUIT\r\n' \
			"$((10#$n))"
		stands OP@VM1.EXAMPLE C@VM2.EXAMPLE 'Subject: 2\r\n\r\n' "$((10#$n + 1))"
	done
}

@test "a batch needs no HELO and no QUIT, and may have blank lines and others behind it" {
	start_listener --eml eml
	batch "\r\n\r\n$good"
	send batch
	batch "NOOP\r\n$good\r\nQUIT\r\n\r\nEHLO [IPv6:::1]\r\n${good}QUIT\r\nHELO x\r\n$good$good"
	send --json batch >sent.json
	assert_equal "$(summary delivered)" 4
	batch "$good"
	cat batch batch batch | send
	send batch batch
	send <<<"${good//\\r/}" 2>/dev/null && return 1     # no batch: backslashes, not lines
	assert_equal "$(messages)" 10
	md5sum eml/*.eml | cut -d ' ' -f 1 | sort -u >sums
	assert_equal "$(wc -l <sums)" 1
}

@test "a line with a dot and LF alone is text where lines end in CRLF" {
	start_listener --eml eml
	batch '%b' 'EHLO x\r\nMAIL FROM:<a@x.example>\r\nRCPT TO:<b@x.example>\r\nDATA\r\nSubject: 1\r\n' \
		'\r\none\n.\nMAIL FROM:<evil@x.example>\n.\r\nend\r\n.\r\nQUIT\r\n'
	send --json batch >sent.json
	assert_equal "$(summary delivered)" 1
	# The line with ".CRLF" behind a bare LF is no end either: bare LF ends no line there.
	stands a@x.example b@x.example \
		'Subject: 1\r\n\r\none\r\n.\r\nMAIL FROM:<evil@x.example>\r\n.\r\nend\r\n' 1
}

@test "in a batch NUL, 8-bit, long lines and all that looks like commands are text" {
	start_listener --eml eml
	long=$(printf '%5000s' '' | tr ' ' x)
	text="\\0\\0377\\0001\\r\\n..MAIL FROM:<x>\\r\\nQUIT\\r\\nRSET\\r\\nFrom me\\r\\n$long\\r\\n"
	batch '%b' 'MAIL FROM:<a@x.example>\r\nRCPT TO:<b@x.example>\r\nDATA\r\n' "$text" '.\r\n'
	send batch
	printf '%b' "${text/../.}" | cmp - eml/000001.eml
}

@test "parameters are taken on reading, whatever they are, and kept with --output" {
	mail='MAIL FROM:<a@x.example> SIZE=12345 BODY=8BITMIME ENVID=QQ314159+2B RET=HDRS X-NEW'
	rcpt='RCPT TO:<b@x.example> NOTIFY=SUCCESS,DELAY ORCPT=rfc822;Carol+40Ivory.EDU'
	batch '%s\r\n' 'EHLO c.example' "$mail" "$rcpt" 'RCPT TO:<c@x.example> NOTIFY=NEVER' \
		DATA 'Subject: x' '' x . QUIT
	start_listener --eml eml
	send batch
	stands a@x.example b@x.example,c@x.example 'Subject: x\r\n\r\nx\r\n' 1
	"$BSMTP" send --helo c.example --output - batch | cmp - batch
}

@test "parameters are passed on where the peer offers them, and nowhere else" {
	batch '%s\r\n' 'MAIL FROM:<a@x.example> SIZE=9 ENVID=QQ314159+2B RET=HDRS X-NEW' \
		'RCPT TO:<b@x.example> NOTIFY=SUCCESS,DELAY ORCPT=rfc822;Carol+40Ivory.EDU' \
		'RCPT TO:<c@x.example> NOTIFY=NEVER' DATA 'Subject: x' '' x .
	for without in nothing DSN; do
		if [ $without = DSN ]; then start_smtp_sink -N; else start_smtp_sink; fi
		for mode in early pipelining lockstep; do
			rm -f mail/*
			send --mode $mode batch
			grep -hE '^X-(Mail|Rcpt)-Args: ' mail/* >got
			# Who talks early has not been told yet.
			if [ $without = DSN ] || [ $mode = early ]; then
				printf '%s\n' 'Mail-Args: <a@x.example>' 'Rcpt-Args: <b@x.example>' \
					'Rcpt-Args: <c@x.example>'
			else
				printf '%s\n' 'Mail-Args: <a@x.example> ENVID=QQ314159+2B RET=HDRS' \
					'Rcpt-Args: <b@x.example> NOTIFY=SUCCESS,DELAY ORCPT=rfc822;Carol+40Ivory.EDU' \
					'Rcpt-Args: <c@x.example> NOTIFY=NEVER'
			fi | sed 's/^/X-/' | diff - <(sed 's/ \(SIZE\|BODY\)=[^ ]*//g' got)
		done
		stop_peer
	done
}

@test "what --output writes, it reads to write it again, to the octet" {
	/usr/bin/python3 "$top/tests/tools/store_check.py" hard "$SCALE" hard.mbox
	"$BSMTP" send --helo c.example --to-headers --output one hard.mbox
	"$BSMTP" send --helo c.example --output two one
	"$BSMTP" send --helo c.example --output - <two | cmp - one
	/usr/bin/python3 "$top/tests/tools/store_check.py" same hard.mbox.json batch:one batch:two
}

@test "--from, --to and --to-headers go before the envelope of a batch" {
	batch 'MAIL FROM:<a@x.example> RET=HDRS\r\nRCPT TO:<b@x.example> NOTIFY=NEVER\r\nDATA\r
To: header@x.example\r\nBcc: hidden@x.example\r\n\r\nx\r\n.\r\n'
	start_listener --eml eml
	send --from f@x.example batch
	send --to t@x.example,u@x.example batch
	send --to-headers batch
	send --from '<>' --to-headers --to t@x.example batch
	assert_equal "$(jq -c '[.from, .to]' eml/*.json)" \
		'["f@x.example",["b@x.example"]]
["a@x.example",["t@x.example","u@x.example"]]
["a@x.example",["header@x.example","hidden@x.example"]]
["",["t@x.example","header@x.example","hidden@x.example"]]'
	grep -q hidden eml/000002.eml
	run -1 grep hidden eml/000003.eml
}

@test "a local-part alone is of this host, and postmaster needs no domain" {
	batch 'MAIL FROM:<root>\nRCPT TO:<joe>\nRCPT TO:<Postmaster>\nDATA\nx\n.\n'
	"$BSMTP" send --output out batch
	host=$(sed -n 's/^MAIL FROM:<root@\([^>]*\)>.*/\1/p' out)
	assert [ -n "$host" ]
	assert_equal "$(grep RCPT out)" "$(printf 'RCPT TO:<%s>\r\n' "joe@$host" "Postmaster@$host")"
}

# --- Broken

# breaks LINE REASON TAIL: a good message stands before, which is delivered; the file
# behind it too.
breaks() {
	batch "$good%b" "$3"
	broken=$((broken + 1))
	run -65 --separate-stderr send --json before batch after
	echo "$output" >sent.json
	assert_equal "${stderr_lines[0]}" "bsmtp: batch: line $1: $2"
	assert [ "${#stderr_lines[@]}" -le 2 ]
	run -0 jq -r 'select(.event == "summary") | "\(.delivered) \(.unknown)"' sent.json
	assert_output '3 0'
}

@test "a batch that breaks off or is none: file, line and reason; all else is delivered" {
	make_message >message
	"$BSMTP" send --to b@x.example --output before message
	cp before after
	begin='MAIL FROM:<a@x.example>\r\nRCPT TO:<b@x.example>\r\nDATA\r\n'
	start_listener --discard --json
	broken=0
	breaks 12 'the file ends inside a message' "${begin}Subject: x\r\n\r\n"
	breaks 13 'the file ends inside a message' "${begin}Subject: x\r\n\r\ntext\r\n.."
	breaks 12 'the file ends inside a message' "${begin}Subject: x\r\n\r\n.\r"
	breaks 12 'the file ends inside a message' "${begin}Subject: x\r\n\r\n."
	breaks 10 'the file ends inside a message' "$begin"
	breaks 10 'the file ends inside a message' "${begin%??\\?}"
	breaks 8 'the file ends inside a transaction' 'MAIL FROM:<a@x.example>'
	breaks 9 'the file ends inside a transaction' "${begin%DATA*}"
	breaks 8 'RCPT without MAIL' 'RCPT TO:<b@x.example>\r\n'
	breaks 9 'RCPT without MAIL' 'RSET\r\nRCPT TO:<b@x.example>\r\n'
	breaks 8 'DATA without MAIL' 'DATA\r\nSubject: x\r\n\r\n.\r\n'
	breaks 11 'DATA without MAIL' "${begin%DATA*}RSET\r\nDATA\r\n.\r\n"
	breaks 8 'no command that a batch may have' 'BDAT 3 LAST\r\nx\r\n'
	breaks 9 'no command that a batch may have' '\r\nFrom: a@x.example\r\n\r\ntext\r\n'
	breaks 8 'no command that a batch may have' '\033[31mred\a\r\n'
	breaks 8 'no command that a batch may have' '\0\r\n'
	breaks 8 'MAIL needs FROM:<address>' 'MAIL FROM:a@x.example\r\n'
	breaks 8 'MAIL needs FROM:<address>' 'MAIL\r\n'
	breaks 8 'MAIL needs FROM:<address>' 'MAIL FROM:<a b@x.example>\r\n'
	breaks 9 'RCPT needs TO:<address>' 'MAIL FROM:<>\r\nRCPT TO:<>\r\n'
	breaks 9 'RCPT needs TO:<address>' 'MAIL FROM:<>\r\nRCPT FROM:<b@x.example>\r\n'
	breaks 8 'a parameter is malformed' 'MAIL FROM:<> =x\r\n'
	breaks 9 'a parameter is malformed' 'MAIL FROM:<>\r\nRCPT TO:<b@x.example>NOTIFY=NEVER\r\n'
	breaks 8 'the line is too long' "NOOP $(printf '%3000s')\r\n"
	stop_listener
	assert_equal "$(grep -c '"event":"message"' listener.out)" $((3 * broken))
}

@test "a batch that breaks off ends no message, in any manner and framing" {
	batch "${good}MAIL FROM:<a@x.example>\r\nRCPT TO:<b@x.example>\r\nDATA\r\nSubject: x\r\n\r\n$(
		printf 'text %.0s' {1..20000})"
	start_listener --eml eml
	for mode in bsmtp early pipelining lockstep; do
		for framing in bdat data; do
			rm -rf eml/*
			run -65 --separate-stderr send --mode $mode --framing $framing --json batch
			echo "$output" >sent.json
			assert_equal "$(summary delivered) $(messages)" '1 1'
			run -0 jq -r 'select(.event == "message" and .n == 2).fate' sent.json
			assert_output --regexp '^un(known|sent)$'
		done
	done
}

@test "a transaction without recipients is named and passed over, the rest is delivered" {
	batch "$good%b" "MAIL FROM:<a@x.example>\r\nDATA\r\nx\r\n.\r\n$good"
	start_listener --eml eml
	run -65 --separate-stderr send --json batch
	echo "$output" >sent.json
	assert_equal "$(summary delivered) $(summary unsent) $(messages)" '2 1 2'
	assert_equal "${stderr_lines[0]}" 'bsmtp: batch: message 2 (offset 80): no recipients in its envelope'
}

@test "the first line decides: a message or an mbox that speaks of MAIL is no batch" {
	start_listener --eml eml
	printf 'MAIL: FROM:<a@x.example>\nRCPT: x\n\nDATA\n.\n' >m
	send --to b@x.example m
	printf 'MAIL: FROM:<a@x.example>\r\nRCPT: x\r\n\r\nDATA\r\n.\r\n' | cmp - eml/000001.eml
	printf 'From a@x.example Mon Nov 23 12:00:00 2026\n\nMAIL FROM:<a@x.example>\n\n' >m
	send --to b@x.example m
	printf '\r\nMAIL FROM:<a@x.example>\r\n' | cmp - eml/000002.eml
	batch '%s\n' 'MAIL FROM:a@x.example' 'RCPT TO:b@x.example' 'DATA' . QUIT
	run -65 send batch
	assert_output --partial 'batch: no mail'
	run -65 send --format batch batch
	assert_output 'bsmtp: batch: line 1: MAIL needs FROM:<address>'
	assert_equal "$(messages)" 2
}

# --- Exim's

@test "Exim's -bS takes what --output writes, and send reads what its use_bsmtp writes" {
	/usr/bin/python3 "$tools/mail.py" make 12 >made.mbox
	"$BSMTP" send --to-headers --output batch made.mbox
	for how in bare helo crlf; do
		configure_exim </dev/null
		cat >>root/var/lib/exim4/config <<-END
			begin routers
			batch:
			  driver = accept
			  transport = batch
			begin transports
			batch:
			  driver = appendfile
			  file = $PWD/mail/batch
			  use_bsmtp
			  batch_max = 100
			  $([ $how != helo ] || echo 'message_prefix = "HELO exim.example\n"')
			  $([ $how != crlf ] || echo use_crlf)
		END
		mv root/var/lib/exim4/config root/var/lib/exim4/config.autogenerated
		exim_send -bS <batch
		mv mail/batch exims
		case $how in
		bare) assert_regex "$(head -n 1 exims)" '^MAIL FROM:<a[0-9]+@example\.org>$' ;;
		helo) assert_equal "$(grep -c '^HELO exim.example$' exims)" 12 ;;
		crlf) assert_equal "$(grep -vc $'\r$' exims)" 0 ;;
		esac
		rm -rf mail
		start_listener --maildir mail
		send --json exims >sent.json
		stop_listener
		run -0 /usr/bin/python3 "$tools/mail.py" check sent.json made.mbox mail
		assert_output --regexp "^12 delivered, "
	done
}

# --- A file that others write to

# lock FILE SECONDS: takes the lock of fcntl(2), says so, and appends standard input.
lock() {
	/usr/bin/python3 -c '
import fcntl, os, sys, time
with open(sys.argv[1], "r+b") as f:
    fcntl.lockf(f, fcntl.LOCK_EX)
    print("locked", flush=True)
    rest = sys.stdin.buffer.read()
    time.sleep(float(sys.argv[2]))
    f.seek(0, 2)
    f.write(rest)
' "$@"
}

@test "a file that is being appended to is waited for, and read whole" {
	{ printf 'From a@x.example Mon Nov 23 12:00:00 2026\nSubject: x\n\n'; seq 3000; echo; } >box
	"$BSMTP" send --helo x --to b@x.example --output b box
	for file in box b; do
		cp $file whole
		truncate -s -5000 $file
		tail -c 5000 whole | lock $file 0.5 >locked 3>&- &
		pids+=($!)
		await test -s locked
		run -0 "$BSMTP" send --to b@x.example --output out $file
		body out | cmp - <(seq 3000)
		# so is one that was moved away meanwhile
		cp whole $file
		truncate -s -5000 $file
		tail -c 5000 whole | lock $file 0.5 >locked 3>&- &
		pids+=($!)
		await test -s locked
		mv $file moved
		run -0 "$BSMTP" send --to b@x.example --output out moved
		body out | cmp - <(seq 3000)
		rm -f moved out locked
	done
}
# body BATCH: of its one message.
body() { tr -d '\r' <"$1" | sed '1,/^$/d' | sed '/^\.$/,$d' | sed '$ { /^$/d }'; }

@test "a lock that is never let go is 75, and the other files are sent" {
	printf 'Subject: x\n\nx\n' >m
	cp m n
	lock m 30 </dev/null >locked 3>&- &
	pids+=($!)
	await test -s locked
	run -75 "$BSMTP" send --to b@x.example --output out m n
	assert_output --partial 'm: another process has locked it'
	assert_equal "$(grep -c '^MAIL' out)" 1
}

@test "a file is read as it was when it was opened; one that has become shorter breaks off" {
	/usr/bin/python3 -c 'import sys; print("From a@x.example Mon Nov 23 12:00:00 2026\nSubject: x\n\n" + "x\n" * int(sys.argv[1]) + "\n", end="")' $((SCALE * 10000)) >box
	cp box whole
	for how in 'cat whole >>box' 'truncate -s $((SCALE * 15000)) box'; do
		for framing in bdat data; do
			cp whole box
			start_listener --eml eml
			kill -STOP "$listener_pid"
			"$BSMTP" send --server "$address" --framing $framing --to b@x.example box >said 2>&1 3>&- &
			client=$!
			pids+=($client)
			fd() { readlink /proc/$client/fd/* | grep -q "$PWD/box"; }
			await fd
			eval "$how"
			kill -CONT "$listener_pid"
			status=0
			wait $client || status=$?
			if [ "$how" = 'cat whole >>box' ]; then
				assert_equal "$status $(messages)" '0 1'
			else
				assert_equal "$status $(messages)" '66 0'
				grep -q 'box: it has become shorter' said
			fi
			stop_listener
			rm -rf eml
		done
	done
}

@test "an open transaction that is not dropped by RSET is not lost without a word" {
	may_complain=1
	for next in QUIT 'EHLO x' 'HELO x' 'BSMTP x' 'MAIL FROM:<c@x.example>'; do
		batch "EHLO x\r\n${good}MAIL FROM:<a@x.example>\r\nRCPT TO:<lost@x.example>\r\n$next\r\n$good"
		start_listener --eml eml
		run -65 "$BSMTP" send --server "$address" batch
		assert_output --partial 'line 11: a transaction is open'
		stop_listener
		assert_equal "$(messages)" 1
		rm -rf eml
		run -73 "$BSMTP" listen --batch batch 127.0.0.1:0
	done
	batch "EHLO x\r\nMAIL FROM:<a@x.example>\r\nRCPT TO:<b@x.example>\r\nRSET\r\n$good"
	run -0 "$BSMTP" send --output out batch
	printf 'MAIL FROM:<a@x.example>\r\n' >>batch
	run -73 "$BSMTP" listen --batch batch 127.0.0.1:0
	assert_output --partial 'it ends inside a transaction'
}

@test "a listener appends nothing to a batch that would swallow it" {
	may_complain=1
	batch "EHLO x\r\n$good$good"
	whole=$(stat -c %s batch)
	for cut in 1 3 20; do
		cp batch in
		truncate -s -$cut in
		run -73 "$BSMTP" listen --batch in 127.0.0.1:0
		assert_output --partial 'in: offset '
		assert_equal "$(stat -c %s in)" $((whole - cut))
	done
	# torn while the listener runs, by another program; it lives on
	cp batch in
	start_listener --batch in
	printf 'MAIL FROM:<a@x.example>\r\nRCPT TO:<b@x.example>\r\nDATA\r\ntorn\r\n' >>in
	printf 'Subject: x\n\nx\n' >m
	run -75 "$BSMTP" send --server "$address" --to c@x.example m
	assert_output --partial 451
	grep -q "^bsmtp: in: offset $whole: it ends inside a message" listener.err
	# mended, with foreign mail and line ends, it is appended to
	printf '.\r\nVERB\r\n%b' "$good" >>in
	send --to c@x.example m
	mv in moved
	send --to c@x.example m
	stop_listener
	assert_equal "$("$BSMTP" send --output - moved | grep -c '^MAIL') $(grep -c '^MAIL' in)" '5 1'
}

# --- Large

@test "a message of a batch for thousands of recipients has them all, in order" {
	n=$((50 * SCALE))
	{
		printf 'EHLO x\r\n%bMAIL FROM:<a@x.example>\r\n' "$good"
		seq -f $'RCPT TO:<r%.0f@x.example>\r' $n
		printf 'DATA\r\nx\r\n.\r\n%bQUIT\r\n' "$good"
	} >batch
	"$BSMTP" send --helo x --output out batch
	grep -v '^RCPT' out | cmp - <(grep -v '^RCPT' batch)
	grep '^RCPT' batch | cmp - <(grep '^RCPT' out)
	start_listener --eml eml --max-recipients $((n + 1))
	send --json batch >sent.json
	assert_equal "$(summary delivered) $(messages)" '3 3'
	jq -r '.to[]' eml/000002.json | cmp - <(seq -f 'r%.0f@x.example' $n)
}

@test "an envelope beyond a megabyte is refused, and what is in other files is sent" {
	{
		printf '%bMAIL FROM:<a@x.example>\n' "$good"
		yes "RCPT TO:<$(printf '%60s' '' | tr ' ' x)@$(printf '%60s' '' | tr ' ' y)>" | head -n 20000
		printf 'DATA\nx\n.\n%b' "$good"
	} >batch
	printf '%b' "$good" >after
	start_listener --eml eml
	run -65 --separate-stderr send --json batch after
	echo "$output" >sent.json
	assert_equal "$stderr" 'bsmtp: batch: too many recipients for one message'
	assert_equal "$(summary delivered) $(messages)" '2 2'
}

@test "a batch of many megabytes is read in little memory" {
	n=$((3 * SCALE))
	awk -v n=$n 'BEGIN {
		ORS = "\r\n"
		text = sprintf("%70s", "")
		for (i = 0; i < n; i++) {
			print "MAIL FROM:<a@x.example>\r\nRCPT TO:<b@x.example>\r\nDATA"
			for (k = 0; k < 1000; k++)
				print text
			print "."
		}
	}' >batch
	start_listener --discard
	if [ "${BSMTP_BUILD:-bsmtp}" = bsmtp ]; then
		(
			ulimit -v 30000
			send --json batch >sent.json
		)
	else
		send --json batch >sent.json
	fi
	assert_equal "$(summary delivered) $(summary octets)" "$n $((n * 72000))"
}

@test "--output FILE may be the input; it is whole, or what was there before" {
	make_message >m
	"$BSMTP" send --output q --to r@x.example -f s@x.example m m m
	cp q before
	"$BSMTP" send --output q q
	cmp q before
	ln -s q link
	"$BSMTP" send --output link q q
	[ -L link ]
	assert_equal "$(grep -c '^MAIL' q)" 6
	run -73 "$BSMTP" send --output none/q m --to r@x.example
	( ulimit -f 1; run -74 "$BSMTP" send --output q --to r@x.example <(make_message; seq 1000 9999) )
	assert_equal "$(grep -c '^MAIL' q)" 6
	assert_equal "$(find . -name 'q.*')" ''
}

@test "a device or a pipe in place of a file of ours is left what it is" {
	make_message >m
	mknod null c 1 3 || { echo 'needs root'; return 1; }
	mkfifo pipe
	rm -f addr
	start_listener --discard
	for file in null pipe; do
		[ $file = null ] || { cat pipe >/dev/null 3>&- & pids+=($!); }
		timeout 20 "$BSMTP" send --server "$address" --mode auto --peers $file --to b@example.net m
		[ ! -f $file ]
	done
	timeout 20 "$BSMTP" listen --discard --address-file null --deadline 100ms 127.0.0.1:0
	"$BSMTP" send --output null --to b@example.net m
	[ -c null ]
}

@test "a pipe or a device in a Maildir is no message, and nobody waits for it" {
	mkdir -p md/cur md/new md/tmp
	make_message >md/new/a
	mkfifo md/new/b
	ln -s /dev/zero md/new/c
	run -65 timeout 20 "$BSMTP" send --output o --to b@example.net md
	assert_output --partial 'no regular file'
	assert_equal "$(grep -c '^MAIL' o)" 1
}

@test "a command of --connect-command that stays is ended, its message told before" {
	make_message >m
	run -0 timeout 30 "$BSMTP" send --json --timeout 1s --to b@example.net \
		--connect-command "trap '' TERM; '$BSMTP' listen --stdio --discard; while :; do sleep 0.1; done" m
	assert_output --partial '"fate":"delivered"'
	assert_output --partial 'still there, and ended'
}
