# The stores: what they hold, who else may write there, what is left by a kill, a
# disk that is full; the command for each message; the doors that are no port.
# shellcheck disable=SC2016,SC2030,SC2031,SC2154 # commands expand; lib.bash has variables
load lib
load peers/peers

eval "$(declare -f teardown | sed '1s/teardown/lib_teardown/')"
teardown() {
	local status=0 left
	lib_teardown || status=1
	for left in small full; do
		! mountpoint -q "$left" 2>/dev/null || umount "$left"
	done
	if [ -z "${may_complain:-}" ] && [ -s other.err ]; then
		cat other.err
		status=1
	fi
	return $status
}

holds() { /usr/bin/python3 "$tools/store_check.py" "$@"; }
talk() { /usr/bin/python3 "$tools/store_talk.py" "$@"; }
lines_of() { if [ -e "$1" ]; then wc -l <"$1"; else echo 0; fi; }
has_lines() { [ "$(lines_of "$1")" -ge "$2" ]; }

# A second listener beside the first.
start_other() {
	rm -f other.addr
	"$BSMTP" listen --address-file other.addr "$@" 127.0.0.1:0 >other.out 2>other.err 3>&- &
	other_pid=$!
	pids+=($!)
	await test -s other.addr
	other=$(cat other.addr)
}

# A disk of 64 KiB on the folder $1.
small_disk() {
	needs_root
	mkdir -p "$1"
	mount -t tmpfs -o size=64k none "$1"
}

# --- What they hold

# through WANT STORE:DEPTH... -- SEND-ARGUMENT...: from WANT through all of the stores,
# each read by other means.  What is in a batch has its envelope there.
through() {
	local want=$1.json from=$1 store kind to stores=()
	shift
	while [ "$1" != -- ]; do
		stores+=("$1")
		shift
	done
	shift
	for store in "${stores[@]}"; do
		kind=${store%%:*}
		start_listener "--$kind" "$kind"
		to=("$@")
		[ "$from" != batch ] || to=()
		send --json "${to[@]}" "$from" >sent.json
		stop_listener
		run -0 holds same "$want" "$kind:$kind:${store#*:}"
		assert_equal "$(summary delivered)" "$output"
		from=$kind
	done
}

@test "hard cases pass through a batch, an mbox, a Maildir and .eml files, to the octet" {
	holds hard $SCALE hard.mbox
	through hard.mbox batch:0 mbox:0 maildir:1 eml:2 -- --to-headers
}

@test "hard cases pass through an mbox first, and in DATA framing" {
	holds hard $SCALE hard.mbox
	through hard.mbox mbox:0 batch:1 maildir:1 eml:2 -- --to-headers --framing data
}

@test "a thousand messages of real mail pass through all stores, to the octet" {
	repo() { git -c safe.directory='*' -C "$top" "$@"; }
	[ "$(repo rev-parse --show-toplevel 2>/dev/null)" = "$top" ] || skip 'no git repository'
	repo format-patch --stdout -$((SCALE / 4)) --root HEAD >series.mbox
	holds real $((10 * SCALE)) b@example.net,c@example.net real.mbox series.mbox \
		/usr/lib/python3.11/test/test_email/data/msg_*.txt
	through real.mbox batch:0 mbox:0 maildir:1 eml:2 -- --to b@example.net,c@example.net
}

@test "--mbox writes mboxrd: From_ line, trace header, quoted text, blank line" {
	start_listener --mbox box
	printf 'Subject: x\n\nFrom me\n>From you\n>>From them\n From in\nFrom\n\nlast' >m
	send --helo c.example --from '"a b"@x.example' --to b@x.example,-c@x.example m
	send --helo c.example --from '<>' --to b@x.example m
	stop_listener
	sed -E 's/(Mon|Tue|Wed|Thu|Fri|Sat|Sun), [ 0-9]+ [A-Z][a-z]{2} [0-9]{4} [0-9:]{8} \+0000$/DATE/
		s/(Mon|Tue|Wed|Thu|Fri|Sat|Sun) [A-Z][a-z]{2} [ 0-9]{2} [0-9:]{8} [0-9]{4}$/CTIME/
		s/127.0.0.1:[0-9]+/PEER/; s/by [^ ]+ with BSMTP id [0-9]+\.M[0-9]{6}P[0-9]+Q[0-9]+\.[^ ]+;$/BY/
		' box >got
	tab=$'\t'
	text=('Subject: x' '' '>From me' '>>From you' '>>>From them' ' From in' 'From' '' 'last' '')
	printf '%s\n' 'From "a b"@x.example CTIME' 'Return-Path: <"a b"@x.example>' \
		'Delivered-To: b@x.example' 'Delivered-To: -c@x.example' \
		'Received: from c.example (PEER)' "${tab}BY" "${tab}DATE" "${text[@]}" \
		'From MAILER-DAEMON CTIME' 'Return-Path: <>' 'Delivered-To: b@x.example' \
		'Received: from c.example (PEER)' "${tab}BY" "${tab}DATE" "${text[@]}" | diff - got
}

@test "--batch writes what --output would, and one EHLO" {
	holds hard $SCALE hard.mbox
	start_listener --batch batch
	send --to-headers hard.mbox
	send --to-headers hard.mbox
	stop_listener
	"$BSMTP" send --to-headers --output want hard.mbox hard.mbox
	assert_regex "$(head -n 1 batch)" '^EHLO [^ ]+.$'
	tail -n +2 want | head -n -1 | cmp - <(tail -n +2 batch)
}

@test "a body of no octets, and one without a last line end, are kept" {
	body=('MAIL FROM:<a@x.example>\r\n' 'RCPT TO:<b@x.example>\r\n' 'BDAT 0 LAST\r\n'
		'MAIL FROM:<a@x.example>\r\n' 'RCPT TO:<b@x.example>\r\n' 'BDAT 6 LAST\r\n' 'x\r\nend'
		'MAIL FROM:<a@x.example>\r\n' 'RCPT TO:<b@x.example>\r\n' 'BDAT 1\r\nF' 'BDAT 4\r\nrom '
		'BDAT 0 LAST\r\n' 'MAIL FROM:<a@x.example>\r\n' 'RCPT TO:<b@x.example>\r\n'
		'BDAT 3 LAST\r\n.\r\n')
	for kind in mbox batch maildir; do
		start_listener "--$kind" $kind
		talk "$address" 'BSMTP c.example\r\n' "${body[@]}" 'QUIT\r\n' >said
		assert_equal "$(grep -c '^250 2.0.0' said)" 6
		stop_listener
		holds dump $kind:$kind | jq -c '.[2] | rtrimstr("\n")' | sort >got
		printf '"%s"\n' '' . 'From ' 'x\nend' | sort | diff - got
	done
	start_listener --eml eml
	talk "$address" 'BSMTP c.example\r\n' "${body[@]}" 'QUIT\r\n' >said
	printf 'x\r\nend' | cmp - eml/000002.eml
	assert_equal "$(cat eml/*.eml | wc -c)" 14
}

@test "--json names the file of each message, or null" {
	make_message >m
	for kind in mbox batch maildir eml exec discard; do
		case $kind in
		exec) set -- --exec 'cat >/dev/null' ;;
		discard) set -- --discard ;;
		*) set -- "--$kind" "here/$kind" ;;
		esac
		mkdir -p here
		start_listener --json "$@"
		send --to b@x.example m
		stop_listener
		file=$(jq -r 'select(.event == "message").file' listener.out)
		case $kind in
		mbox | batch) assert_equal "$file" "here/$kind" ;;
		maildir) assert_equal "$file" "$(echo here/maildir/new/*)" ;;
		eml) assert_equal "$file" here/eml/000001.eml ;;
		*) assert_equal "$file" null ;;
		esac
	done
	assert_equal "$(find . -newer m -name '*discard*')" ''
}

@test "two listeners share a Maildir, and a folder of .eml files" {
	holds numbered $((2 * SCALE)) want
	start_listener --maildir in
	start_other --maildir in
	send --to b@example.net want &
	pids+=($!)
	"$BSMTP" send --server "$other" --to b@example.net want
	wait $!
	stop_listener
	kill "$other_pid"
	wait "$other_pid"
	run -0 holds whole want.json maildir:in <(sed -n p <(for i in 1 2; do ids want; done))
	assert_output $((4 * SCALE))
	start_listener --eml eml
	start_other --eml eml
	send --to b@example.net want &
	pids+=($!)
	"$BSMTP" send --server "$other" --to b@example.net want
	wait $!
	run -0 holds whole want.json eml:eml <(for i in 1 2; do ids want; done)
	assert_output $((4 * SCALE))
	assert_equal "$(find eml -name '*.eml' | sort | tail -n 1)" \
		"$(printf 'eml/%06d.eml' $((4 * SCALE)))"
}
ids() { sed -n 's/^Message-ID: //p' "$1"; }

# --- One file that others write too

two_listeners() {
	holds numbered $((2 * SCALE)) want
	start_listener "--$1" file
	start_other "--$1" file
	for to in "$address" "$other" "$address" "$other"; do
		"$BSMTP" send --server "$to" --to b@example.net want 3>&- &
		pids+=($!)
	done
	for pid in "${pids[@]: -4}"; do
		wait "$pid"
	done
	run -0 holds whole want.json "$1:file" <(for i in 1 2 3 4; do ids want; done)
	assert_output $((8 * SCALE))
	[ "$1" = mbox ] || assert_equal "$(grep -c '^EHLO' file)" 1
}
@test "two listeners append to one mbox at the same time: all is there, whole" { two_listeners mbox; }
@test "two listeners append to one batch at the same time: all is there, whole" { two_listeners batch; }

moved_away() {
	holds numbered $((3 * SCALE)) want
	start_listener "--$1" file --reply "BODY=delay $((100 / SCALE + 1))ms"  # so that there is time
	send --to b@example.net --json want >sent.json 3>&- &
	pids+=($!)
	for n in 1 2 3; do
		await test -s file
		mv file "file.$n"
	done
	wait "${pids[-1]}"
	assert_equal "$(summary delivered)" $((3 * SCALE))
	total=0
	for file in file file.*; do
		[ "$file" != file.journal ] && [ -e "$file" ] || continue
		run -0 holds whole want.json "$1:$file"
		total=$((total + output))
	done
	assert_equal "$total" $((3 * SCALE))
}
@test "a mbox that is moved away while mail comes in gets a successor" { moved_away mbox; }
@test "a batch that is moved away while mail comes in gets a successor" { moved_away batch; }

@test "an mbox that another program has locked is waited for" {
	make_message >m
	start_listener --mbox box -v
	may_complain=1
	touch box
	text='From mda@x.example Mon Nov 23 12:00:00 2026\nSubject: of another\n\ntext of another\n\n'
	/usr/bin/python3 "$tools/store_lock.py" box held release "$text" 3>&- &
	pids+=($!)
	await test -e held
	send --to b@example.net m 3>&- &
	client=$!
	pids+=($!)
	await grep -q 'octets of body' listener.err
	assert_equal "$(grep -c 'Subject: hello' box)" 0
	kill -0 $client
	touch release
	wait $client
	assert_equal "$(grep '^Subject: ' box | xargs)" 'Subject: of another Subject: hello'
	printf '%b' "$text" | cmp - <(head -n 5 box)
	assert_equal "$(grep -c '^From ' box)" 2
}

@test "a lock that does not come in ten seconds gives 451, and the next message is stored" {
	make_message >m
	touch mbox batch
	start_listener --mbox mbox
	start_other --batch batch
	may_complain=1
	for kind in mbox batch; do
		/usr/bin/python3 "$tools/store_lock.py" $kind $kind.held release 3>&- &
		pids+=($!)
		await test -e $kind.held
	done
	begun=$(date +%s)
	"$BSMTP" send --server "$other" --to b@example.net m >other.said 2>&1 3>&- &
	client=$!
	pids+=($!)
	run -75 send --to b@example.net m
	assert_output --partial '451 4.3.0'
	said=0
	wait $client || said=$?
	assert_equal $said 75
	assert [ $(($(date +%s) - begun)) -ge 9 ]
	assert [ $(($(date +%s) - begun)) -le 25 ]
	touch release
	wait "${pids[2]}" "${pids[3]}"
	send --to b@example.net m
	"$BSMTP" send --server "$other" --to b@example.net m
	assert_equal "$(holds dump mbox:mbox | wc -l) $(holds dump batch:batch | wc -l)" '1 1'
}

@test "an mbox that does not end in a blank line is continued as one that does" {
	make_message >m
	for end in '' '\n' '\n\n' '\n\n\n'; do
		printf 'From old@x.example Mon Nov 23 12:00:00 2026\nSubject: old\n\nold text%b' "$end" >box
		cp box before
		start_listener --mbox box
		send --to b@example.net m
		send --to b@example.net m
		stop_listener
		cmp -n "$(wc -c <before)" before box
		# There is one blank line, or what there was.
		wanted=$end
		[ ${#end} -ge 4 ] || wanted='\n\n'
		printf '%b' "old text$wanted" | cmp - <(sed -n '/^old text/,/^From /p' box | sed '$d')
		run -0 "$BSMTP" send --format mbox --to b@example.net --output - box
		assert_equal "$(grep -c '^MAIL' <<<"$output")" 3
		rm box
	done
	: >box
	start_listener --mbox box
	send --to b@example.net m
	assert_equal "$(head -c 5 box)" 'From '
}

@test "a batch of others, with its QUIT and with LF, is continued" {
	make_message >m
	for end in '\r\n' '\n'; do
		printf "%s$end" 'HELO x' 'MAIL FROM:<old@x.example>' 'RCPT TO:<b@x.example>' DATA old .. . \
			QUIT >batch
		cp batch before
		start_listener --batch batch
		send --to b@example.net m
		stop_listener
		cmp -n "$(wc -c <before)" before batch
		rm -rf eml
		start_listener --eml eml
		send batch
		printf 'old\r\n.\r\n' | cmp - eml/000001.eml
		sed 's/$/\r/' m | cmp - eml/000002.eml
		stop_listener
	done
}

@test "a file that cannot be appended to is told at the start, with 73" {
	small_disk full
	mkdir folder
	touch file full/there
	ln -s nowhere/box dangling
	mount -o remount,ro full
	for kind in mbox batch; do
		while read -r path why; do
			run -73 "$BSMTP" listen --$kind "$path" 127.0.0.1:0
			assert_output "bsmtp: $path: $why"
		done <<-END
			folder Is a directory
			nowhere/box No such file or directory
			dangling No such file or directory
			file/box Not a directory
			full/box Read-only file system
			full/there Read-only file system
		END
	done
	for kind in maildir eml; do
		run -73 "$BSMTP" listen --$kind file 127.0.0.1:0
		run -73 "$BSMTP" listen --$kind nowhere/box 127.0.0.1:0
		assert_output 'bsmtp: nowhere/box: No such file or directory'
		run -73 "$BSMTP" listen --$kind full/box 127.0.0.1:0
	done
	run -73 setpriv --reuid nobody --clear-groups "$BSMTP" listen --mbox /root/box 127.0.0.1:0
	assert_output 'bsmtp: /root/box: Permission denied'
}

@test "a file that can no longer be written gives 451, and the listener lives on" {
	make_message >m
	mkdir folder
	start_listener --mbox folder/box
	may_complain=1
	send --to b@example.net m
	mv folder aside
	run -75 send --to b@example.net m
	assert_output --partial '451 4.3.0'
	grep -q '^bsmtp: folder/box: No such file or directory$' listener.err
	mv aside folder
	send --to b@example.net m
	assert_equal "$(holds dump mbox:folder/box | wc -l)" 2
}

full_disk() {
	small_disk small
	make_message >m
	{ make_message; head -c 50000 /dev/zero | tr '\0' 'x' | fold -w 70; } >large
	start_listener "--$1" small/file
	may_complain=1
	send --to b@example.net m
	send --to b@example.net large
	cp small/file before
	run -75 send --to b@example.net large
	assert_output --partial '452 4.3.1'
	cmp before small/file
	send --to b@example.net m               # there is room for this one
	: >small/file
	send --to b@example.net large
	assert_equal "$(holds dump "$1:small/file" | wc -l)" 1
	stop_listener
}
@test "a full disk gives 452, and the mbox stays whole" { full_disk mbox; }
@test "a full disk gives 452, and the batch stays whole" { full_disk batch; }

# --- Crashes

# What is reported delivered is added to the file delivered.
stream() {
	send --to b@example.net --json "$1" >sent.json 2>/dev/null 3>&- &
	client=$!
	pids+=($!)
}
note_delivered() {
	wait "$listener_pid" || :
	wait $client || :
	jq -r 'select(.event == "message" and .fate == "delivered").id' sent.json >>delivered
}

# What is not settled is sent again; were all settled before the last kill, all is.
killed_at_random() {
	local kills=${BSMTP_STORE_KILLS:-$((SCALE > 10 ? 4 : 2))} n=${BSMTP_STORE_MESSAGES:-$((SCALE * 4))}
	may_complain=1          # it tells what it cuts off
	holds numbered "$n" want
	: >delivered
	step=$(($(stat -c %s want) * 2 / kills))
	for ((round = 0; round <= kills; round++)); do
		# Not so fast that all is one group.
		start_listener "--$1" file --reply 'BODY=delay 1ms'
		run -0 holds whole want.json "$1:file" delivered
		awk 'FILENAME == "delivered" { settled["Message-ID: " $0]; next }
			/^From / { head = $0; getline; head = head "\n" $0; getline
				unsettled = !($0 in settled)
				if (unsettled) print head }
			unsettled' delivered want >left
		[ -s left ] || cp want left
		stream left
		[ $round -lt "$kills" ] || break
		/usr/bin/python3 "$tools/store_kill.py" at "$listener_pid" $client file \
			$(($(stat -c %s file) + (RANDOM * 32768 + RANDOM) % step))
		note_delivered
	done
	assert_equal $round "$kills"
	wait $client
	stop_listener
	note_delivered
	run -0 holds whole want.json "$1:file" delivered
	assert_equal "$(sort -u delivered | wc -l)" "$n"
}
@test "kill -9 in mid-stream: the mbox parses and holds what was reported delivered" { killed_at_random mbox; }
@test "kill -9 in mid-stream: the batch parses and holds what was reported delivered" { killed_at_random batch; }

# make_torn KIND [LINES]: the listener is killed when it has appended 1500 octets of a
# message; in $begin where what is torn begins.
make_torn() {
	holds numbered 3 want "${2:-60}"
	ids want >delivered
	start_listener "--$1" file
	send --to b@example.net want
	stop_listener
	begin=$(stat -c %s file)
	program=$BSMTP
	torn() { exec /usr/bin/python3 "$tools/store_kill.py" torn $((begin + 1500)) "$program" "$@"; }
	BSMTP=torn start_listener "--$1" file
	run -75 send --to b@example.net want
	said=0
	wait "$listener_pid" || said=$?
	assert_equal "$(kill -l $said)" SYS
	size=$(stat -c %s file)
	assert_equal "$size" $((begin + 1500))
}

killed_in_an_append() {
	make_torn "$1"
	cp file torn.file
	start_listener "--$1" file
	may_complain=1
	assert_equal "$(cat listener.err)" \
		"bsmtp: file: cut off $((size - begin)) octets of a message that was never whole"
	cmp torn.file file 2>&1 | grep -q '^cmp: EOF on file '
	assert_equal "$(stat -c %s file)" "$begin"
	stop_listener
	# And never again.
	start_listener "--$1" file
	assert_equal "$(cat listener.err)" ''
	send --to b@example.net want
	ids want >>delivered
	run -0 holds whole want.json "$1:file" delivered
}
@test "killed in an append: what is torn of the mbox is cut off, and said so" { killed_in_an_append mbox; }
@test "killed in an append: what is torn of the batch is cut off, and said so" { killed_in_an_append batch; }

torn_by_another() {
	make_torn "$@"
	# The listener's octets are gone, others stand in their place.
	truncate -s "$begin" file
	yes 'octets of another' | head -c $((size - begin)) >>file
	left_alone "$1"
	# What was there before it is gone too.
	truncate -s $((begin / 2)) file
	left_alone "$1"
	# No note, or none that can be read.
	for note in '' x "$(printf '%0200d' 0)"; do
		printf '%s' "$note" >file.tail
		left_alone "$1"
	done
}
left_alone() {
	cp file before
	if [ "$1" = batch ]; then       # nothing is appended to one that would swallow it
		run -73 "$BSMTP" listen --batch file 127.0.0.1:0
		assert_output --partial 'file: offset '
	else
		start_listener "--$1" file
		assert_equal "$(cat listener.err)" ''
		stop_listener
	fi
	cmp before file
}
@test "a torn end of the mbox that somebody else wrote is left alone" { torn_by_another mbox; }
@test "a torn end of the batch that somebody else wrote is left alone" { torn_by_another batch; }
@test "that somebody else wrote in place of a large message too" { torn_by_another mbox 1500; }

# --- A command for each message

@test "--exec: the exit status is the verdict" {
	make_message >m
	may_complain=1
	start_listener --exec '. ./verdict'
	while read -r verdict status reply; do
		printf '%s\n' "${verdict//_/ }" >verdict
		run "-$status" send --to b@example.net m
		assert_output --partial "$reply"
	done <<-'END'
		exit_0 0
		true 0
		exit_75 75 451 4.3.0
		exit_1 69 554 5.3.0
		exit_64 69 554 5.3.0
		exit_67 69 554 5.3.0
		exit_77 69 554 5.3.0
		exit_125 69 554 5.3.0
		exit_2 75 451 4.3.0
		exit_70 75 451 4.3.0
		exit_71 75 451 4.3.0
		exit_73 75 451 4.3.0
		exit_74 75 451 4.3.0
		exit_78 75 451 4.3.0
		exit_126 75 451 4.3.0
		exit_127 75 451 4.3.0
		exec_/nonexistent/command 75 451 4.3.0
		kill_-9_$$ 75 451 4.3.0
		kill_-TERM_$$ 75 451 4.3.0
		kill_-PIPE_$$ 75 451 4.3.0
	END
	printf 'cat >last; exit 0\n' >verdict
	send --to b@example.net m
	cmp m <(sed '1,/^	.* +0000$/d' last)
}

@test "--exec: a command that takes too long is ended with all its children, 451" {
	make_message >m
	start_listener --exec 'echo $$ >pid; sleep 60 & echo $! >child; wait' --timeout 1s
	may_complain=1
	run -75 send --to b@example.net m
	assert_output --partial '451 4.3.0'
	for pid in $(cat pid child); do
		await gone "$pid"
	done
	grep -q 'timed out' listener.err
	kill -0 "$listener_pid"
}
gone() { ! kill -0 "$1" 2>/dev/null || grep -q ' Z ' "/proc/$1/stat"; }

@test "--exec: message, recipients, sender, peer and id; no address is split or run" {
	printf 'Subject: x\n\n.\nFrom me\n\0\377 8-bit\nno end' >m
	start_listener --hostname h.example --exec '
		cat >message
		printf "%s\n" "$#" "$@" >arguments
		printf "%s" "$BSMTP_SENDER" >sender
		printf "%s" "$BSMTP_RECIPIENTS" >recipients
		printf "%s %s" "$BSMTP_PEER" "$BSMTP_ID" >rest'
	hostile=('"a b"@x.example' '"$(touch pwned)"@x.example' '"-leading"@x.example' "o'hara@x.example"
		'"q\"u\\o"@x.example' '"`touch pwned`"@x.example' '*@x.example' '"; touch pwned; "@x.example'
		'$HOME@x.example' '"|touch pwned"@x.example' 'a&b{c|d}~@x.example' '"../../x"@x.example'
		"$(printf '%64s' '' | tr ' ' l)@x.example" 'grün@bücher.example')
	{
		echo EHLO x
		echo 'MAIL FROM:<"$(touch pwned) x"@y.example> SMTPUTF8'
		printf 'RCPT TO:<%s>\n' "${hostile[@]}"
		printf 'DATA\nSubject: x\n\n..\nFrom me\n\0\377 8-bit\nno end\n.\n'
	} >batch
	send --helo c.example batch
	printf '%s\n' "${#hostile[@]}" "${hostile[@]}" | diff - arguments
	assert_equal "$(cat sender)" '"$(touch pwned) x"@y.example'
	assert_equal "$(cat recipients)" "$(printf '%s\n' "${hostile[@]}")"
	refute [ -e pwned ]
	read -r peer id <<<"$(cat rest)"
	assert_regex "$peer" '^127\.0\.0\.1:[0-9]+$'
	assert_equal "$(head -n 1 message)" "Received: from c.example ($peer)"
	assert_regex "$(sed -n 2p message)" "^	by [^ ]+ with BSMTP id $id;\$"
	{ cat m; echo; } | cmp - <(tail -n +4 message)
	send --from '<>' --to b@x.example m
	assert_equal "$(wc -c <sender) $(cat recipients)" '0 b@x.example'
}

@test "--exec: an address with a line end in it reaches no command" {
	make_message >m
	start_listener --exec 'touch run'
	for end in '\n' '\r' '\0'; do
		talk "$address" 'EHLO c.example\r\n' 'MAIL FROM:<a@x.example>\r\n' \
			"RCPT TO:<\"a${end}b\"@x.example>\r\n" 'DATA\r\n' 'x\r\n.\r\n' 'RSET\r\n' \
			"MAIL FROM:<\"a${end}b\"@x.example>\r\n" 'QUIT\r\n' >said
		assert_regex "$(grep -oE '^[0-9]{3} ' said | xargs)" '^220 250 250 50[01] .* 50[01] 221$'
	done
	run -64 send --to $'"a\nb"@x.example' m
	run -64 send --to b@x.example --from $'"a\nb"@x.example' m
	refute [ -e run ]
}

@test "--exec: its output goes to standard error, its descriptors are three" {
	make_message >m
	# Such as the suite's own must not be among them.
	program=$BSMTP
	with_three() {
		exec /usr/bin/python3 -c 'import os, sys
os.closerange(3, 1024)
os.execv(sys.argv[1], sys.argv[1:])' "$program" "$@"
	}
	BSMTP=with_three start_listener --json --exec 'echo out; echo err >&2; ls -l /proc/self/fd |
		sed -n "s/.* \([0-9]*\) -> .*/\1/p" | sort | xargs >fds
		grep -E "^Sig(Blk|Ign)" /proc/self/status >signals'
	may_complain=1
	send --to b@example.net m
	assert_equal "$(sort listener.err | xargs)" 'err out'
	assert_equal "$(jq -s length listener.out)" 3
	assert_equal "$(cat fds)" '0 1 2 3'     # the last is the folder that ls reads
	assert_equal "$(awk '/SigBlk/ { print $2 + 0 }' signals)" 0
	# SIGPIPE, the thirteenth, is as usual
	assert_equal "$((0x$(awk '/SigIgn/ { print $2 }' signals) >> 12 & 1))" 0
}

@test "--exec: many sessions at once, eight commands" {
	mkdir run
	start_listener -v --exec '
		mkdir "run/$BSMTP_ID"
		until [ -e go ]; do sleep 0.02; done
		ls run | wc -l >>seen
		rmdir "run/$BSMTP_ID"
		cat >>all'
	may_complain=1
	make_message >m
	send --to b@example.net m 3>&- &
	pids+=($!)
	await running 1
	for _ in {1..20}; do
		send --to b@example.net m 3>&- &
		pids+=($!)
	done
	await bodies 21
	await running 8         # the others wait for one of these to end
	touch go
	wait "${pids[@]:1}"
	assert_equal "$(wc -l <seen)" 21
	assert [ "$(sort -n seen | tail -n 1)" -le 8 ]
}
running() { [ "$(find run -mindepth 1 | wc -l)" -eq "$1" ]; }
bodies() { [ "$(grep -c 'octets of body' listener.err)" -eq "$1" ]; }

@test "--exec: a disk with no room for the message gives 452, and the listener lives on" {
	small_disk small
	head -c 60000 /dev/zero >small/filler
	make_message >m
	{ make_message; head -c 70000 /dev/zero | tr '\0' 'x' | fold -w 70; } >large
	TMPDIR=$PWD/small start_listener --exec 'cat >got'
	may_complain=1
	run -75 send --to b@example.net large
	assert_output --partial '452 4.3.1'
	refute [ -e got ]
	rm small/filler
	send --to b@example.net m
	cmp m <(tail -n +4 got)
	assert_equal "$(find small -type f | wc -l)" 0
	stop_listener
}

@test "--exec: a large message and one of 1000 recipients reach the command" {
	start_listener --exec 'cat >message; printf "%s\n" "$@" >arguments'
	{ make_message; yes 'a line of a large message' | head -n $((SCALE * 300)); } >large
	seq -f 'r%.0f@example.net' 1000 >recipients
	BSMTP_TO=$(paste -sd , recipients) send large
	cmp large <(tail -n +4 message)
	cmp recipients arguments
}

@test "--exec hands over to a real Postfix: sender and recipients intact, hostile ones too" {
	start_postfix as_it_comes 'allow_min_user = yes' 'recipient_delimiter ='
	postconf -c "$PWD/etc" -e 'virtual_mailbox_maps = static:all/'
	postconf -c "$PWD/etc" -Me 'pickup/unix=pickup unix n - n 60 1 pickup'
	touch -d '1 minute ago' etc/main.cf
	postfix -c "$PWD/etc" reload 2>>said
	MAIL_CONFIG=$PWD/etc start_listener --exec 'sendmail -i -f "$BSMTP_SENDER" -- "$@"'
	hostile=('"a b"@example.net' '"$(touch pwned)"@example.net'
		'"q\"u\\o"@example.net' "o'hara@example.net" '"; touch pwned; "@example.net')
	{
		echo EHLO x
		echo 'MAIL FROM:<"$(touch pwned) x"@example.org>'
		printf 'RCPT TO:<%s>\n' "${hostile[@]}"
		printf 'DATA\nFrom: a@example.org\nMessage-ID: <1@example.org>\nDate: x\n\n..\nFrom me\n.\n'
		printf '%s\n' 'MAIL FROM:<>' 'RCPT TO:<b@example.net>' DATA 'From: a@example.org' '' x .
		printf '%s\n' 'MAIL FROM:<-f@example.org>' 'RCPT TO:<b@example.net>' DATA \
			'From: a@example.org' '' x .
	} >batch
	send --json batch >sent.json
	assert_equal "$(summary delivered)" 3
	await queue_empty
	refute [ -e pwned ]
	assert_equal "$(delivered_files)" 7
	assert_equal "$(sed -n 's/^Delivered-To: //p' mail/all/new/* | sort)" \
		"$(printf '%s\n' "${hostile[@]}" b@example.net b@example.net | sort)"
	assert_equal "$(sed -n 's/^Return-Path: //p' mail/all/new/* | sort | uniq -c | sed 's/^ *//')" \
		"$(printf '%s\n' '5 <"$(touch pwned) x"@example.org>' '1 <-f@example.org>' '1 <>' | sort -k 2)"
	assert_equal "$(grep -lx '\.' mail/all/new/* | wc -l)" 5
	assert_equal "$(grep -lx 'From me' mail/all/new/* | wc -l)" 5
}

# --- Standard input and output, commands, a service manager

@test "--stdio: a session through a pair of pipes, nothing but it on standard output" {
	{
		printf '%s\r\n' 'BSMTP c.example' 'MAIL FROM:<a@x.example>' 'RCPT TO:<b@x.example>' \
			'BDAT 3 LAST' x 'MAIL FROM:<a@x.example>' 'RCPT TO:<b@x.example>' DATA .. . QUIT
	} | "$BSMTP" listen --stdio --maildir in 2>err | cat >said
	assert_equal "$(grep -oE '^[0-9]{3} ' said | xargs)" '220 250 250 250 250 250 250 354 250 221'
	assert_equal "$(holds dump maildir:in | jq -r '.[2]' | sort | xargs)" '. x'
	grep -q '^Received: from c.example (stdio)$' in/new/*
	assert_equal "$(cat err)" ''
}

@test "--stdio: a session through a socket, and one from a file" {
	run -0 talk --stdio "'$BSMTP' listen --stdio --maildir in" 'EHLO c.example\r\n' \
		'MAIL FROM:<a@x.example>\r\n' 'RCPT TO:<b@x.example>\r\n' 'DATA\r\n' 'x\r\n' '.\r\n' 'QUIT\r\n'
	assert_equal "$(grep -oE '^[0-9]{3} ' <<<"$output" | xargs)" '220 250 250 250 354 250 221'
	make_message >m
	"$BSMTP" send --to b@x.example --output batch m
	run -0 --separate-stderr "$BSMTP" listen --stdio --maildir in <batch
	assert_equal "$(grep -oE '^[0-9]{3} ' <<<"$output" | xargs)" '220 250 250 250 354 250 221'
	assert_equal "$(stored)" 2
}

@test "--stdio takes no address and no --json, and an end without QUIT is no error" {
	run -64 "$BSMTP" listen --stdio --json </dev/null
	run -64 "$BSMTP" listen --stdio 127.0.0.1:0 </dev/null
	assert_output --partial -- --stdio
	BSMTP_JSON=1 run -64 "$BSMTP" listen --stdio </dev/null
	run -0 "$BSMTP" listen --stdio --discard </dev/null
	assert_output --regexp '^220 [^ ]+ ESMTP bsmtp.?$'
	# A body cut off is not stored.
	printf '%s\r\n' 'BSMTP c' 'MAIL FROM:<>' 'RCPT TO:<b@x.example>' DATA x |
		"$BSMTP" listen --stdio --maildir in >said
	assert_equal "$(find in -type f | wc -l)" 0
}

@test "--connect-command speaks to a listener on its standard input and output" {
	holds numbered $((SCALE / 2)) want
	for mode in bsmtp early pipelining lockstep; do
		for framing in bdat data; do
			rm -rf in
			run -0 --separate-stderr "$BSMTP" send --mode $mode --framing $framing --json \
				--to b@example.net --connect-command "exec '$BSMTP' listen --stdio --maildir in" want
			echo "$output" >sent.json
			assert_equal "$stderr" ''
			run -0 holds same want.json maildir:in
			assert_equal "$(summary delivered)" "$output"
			[ "${BSMTP_BUILD:-}" != torture ] || break
		done
	done
}

@test "--connect-command goes through real pipes, and connects to nothing else" {
	make_message >m
	export BSMTP_SERVER=nohost.invalid
	"$BSMTP" send --to b@example.net --connect-command \
		"cat | '$BSMTP' listen --stdio --maildir in 2>>err | cat" m
	assert_equal "$(stored)" 1
	assert_equal "$(cat err)" ''
}

@test "--connect-command that fails: nothing is called delivered, and its status is told" {
	make_message >m
	for command in 'exit 3' 'cat >/dev/null; exit 3' 'echo 220 x; exit 3' 'exec /nonexistent'; do
		run ! --separate-stderr "$BSMTP" send --to b@example.net --json --timeout 1s \
			--connect-command "$command" m
		echo "$output" >sent.json
		assert_equal "$(summary delivered)" 0
		assert_regex "$stderr" 'exit status (3|127)'
	done
	run ! "$BSMTP" send --to b@example.net --connect-command 'kill -9 $$' m
	assert_output --partial 'signal 9'
}

@test "--connect-command that dies in mid-stream: delivered is what was stored" {
	holds numbered $((2 * SCALE)) want
	for n in 1 $SCALE; do
		rm -rf in
		run -75 --separate-stderr "$BSMTP" send --to b@example.net --json --connect-command \
			"exec '$BSMTP' listen --stdio --maildir in --cut-after messages:$n" want
		echo "$output" >sent.json
		jq -r 'select(.event == "message" and .fate == "delivered") | .id' sent.json >delivered
		holds whole want.json maildir:in delivered
		assert [ "$(wc -l <delivered)" -le "$n" ]
		assert_equal "$(jq -r 'select(.event == "message").fate' sent.json | sort -u | grep -vc \
			-e delivered -e unknown -e unsent)" 0
	done
}

@test "sockets from a service manager are served, TCP and UNIX, and nothing else is bound" {
	make_message >m
	/usr/bin/python3 "$tools/store_service.py" activate addr "inet,unix:$PWD/s" "$BSMTP" listen \
		--maildir in --address-file told >listener.out 2>listener.err 3>&- &
	pids+=($!)
	await test -s told
	cmp addr told
	while read -r address; do
		send --to b@example.net m
	done <addr
	assert_equal "$(stored)" 2
	kill "${pids[0]}"
	wait "${pids[0]}"
	assert [ -S s ]         # it is not ours to remove
}

@test "sockets meant for another process are not touched" {
	LISTEN_PID=1 LISTEN_FDS=1 start_listener --discard 3</dev/null
	assert_equal "$(wc -l <addr)" 1
	make_message >m
	send --to b@example.net m
	run -69 sh -c 'LISTEN_PID=$$ LISTEN_FDS=1 exec "$@" 3</dev/null' sh "$BSMTP" listen --discard
	assert_output --partial LISTEN_FDS
}

@test "systemd's own activation starts a listener" {
	make_message >m
	systemd-socket-activate --listen "$PWD/s" "$BSMTP" listen --maildir in --once 2>said 3>&- &
	pids+=($!)
	await test -S s
	"$BSMTP" send --server "unix:$PWD/s" --to b@example.net m
	wait "${pids[0]}"
	assert_equal "$(stored)" 1
}

@test "NOTIFY_SOCKET is told READY once it can be connected to, and STOPPING" {
	for path in "$PWD/notify" "@bsmtp-test-$$-$RANDOM"; do
		rm -f told
		/usr/bin/python3 "$tools/store_service.py" notified "$path" told 3>&- &
		manager=$!
		pids+=($!)
		await test -e told
		if [ "${path:0:1}" = / ]; then await test -S "$path"; fi
		NOTIFY_SOCKET=$path start_listener --discard
		await grep -qx READY=1 told
		stop_listener
		wait $manager
		assert_equal "$(xargs <told)" 'READY=1 STOPPING=1'
	done
	for path in /nonexistent/socket relative '' @; do
		NOTIFY_SOCKET=$path start_listener --discard
		stop_listener
	done
}
