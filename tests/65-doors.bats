# Ways in and ways round: raw dialogues, fallback, remembered peers, progress,
# completion, options by environment, addresses.
# shellcheck disable=SC2030,SC2031,SC2034,SC2154 # lib.bash has variables, bats subshells
load lib

on_terminal() { /usr/bin/python3 "$top/tests/tools/sendmail_pty.py" "$@"; }
event() { jq -c "select(.event == \"$1\") | $2" "${3:-sent.json}"; }
# sends [-STATUS] OPTION...: m to Bob, reported in sent.json; diagnostics in $stderr.
sends() {
	local status=-0
	case $1 in -0 | -[67]?) status=$1; shift ;; esac
	run "$status" --separate-stderr send --to bob@example.net --json "$@" m
	echo "$output" >sent.json
}
# How many messages were delivered, rejected, deferred, unknown, unsent.
fates() { jq -r 'select(.event == "summary") | "\(.delivered) \(.rejected) \(.deferred) \(.unknown) \(.unsent)"' sent.json; }
# The milliseconds since the epoch.
now() { echo $((${EPOCHREALTIME/./} / 1000)); }

# --- raw

@test "raw prints each reply with its time, passes LF as it is, and ends when the server closes" {
	start_listener --discard --hostname server.example
	printf 'EHLO x\r\nNOOP\nNOOP\r\nQUIT\r\n' >in.txt
	run -0 --separate-stderr send --format raw in.txt
	assert_equal "$stderr" ''
	for line in "${lines[@]}"; do
		[[ $line =~ ^\ *[0-9]+\.[0-9]{3}\ \<-\ [0-9]{3}[\ -] ]]
	done
	assert_equal "$(cut -c 15-17 <<<"$output" | uniq | xargs)" '220 250 500 250 221'
	assert_equal "${lines[0]#* <- }" '220 server.example ESMTP bsmtp'
	assert_equal "$(cut -c 1-10 <<<"$output" | sort -nc 2>&1)" ''
}

@test "raw sends the octets of all its inputs as they are, and nothing else" {
	printf 'a\nb\r\n.\r\nFrom x\n\0\377\r' >a.txt
	printf QUIT >b.txt
	start_peer recv:QUIT 'send:221 bye\r\n' close
	printf '\n\n' | send --format raw a.txt - b.txt
	await test -s received
	cat a.txt <(printf '\n\n') b.txt | cmp - received
}

@test "raw escapes what is no text in a reply" {
	say() { "$BSMTP" send --format raw --connect-command "printf '$1'" /dev/null; }
	run -0 say '220 a\000b\033[2J\177\t\r\n\377\303\244 \302\233.\r\nno end'
	assert_equal "${lines[0]#* <- }" '220 a\x00b\x1B[2J\x7F\x09'
	assert_equal "${lines[1]#* <- }" '\xFFä \xC2\x9B.'
	assert_equal "${lines[2]#* <- }" 'no end'
	assert_equal ${#lines[@]} 3
}

@test "raw ends behind its input when the server has been silent so long" {
	start_peer 'send:220 x\r\n' recv:b silent
	begin=$(now)
	{
		printf a
		read -rt 0.6 <> <(:) || :       # longer, but the input is not over
		printf b
	} | send --format raw --timeout 300ms >said
	assert [ $(($(now) - begin)) -ge 880 ]
	assert_equal "$(sed 's/.* <- //' said)" '220 x'
}

@test "raw reads while it writes" {
	n=$((SCALE * 200))
	start_listener --discard
	{ yes NOOP | head -n $n; echo QUIT; } | sed 's/$/\r/' >in.txt
	send --format raw in.txt >said
	assert_equal "$(grep -c ' <- 250 ' said) $(tail -n 1 said | cut -c 15-17)" "$n 221"
}

@test "raw: a reply without end is printed in pieces" {
	start_peer 'send:220 ' big:100000 close
	send --format raw /dev/null >said
	assert_equal "$(sed 's/^.* <- //' said | tr -d '\n' | wc -c)" 100004
}

@test "raw: what cannot be read is 66, what cannot be reached 75" {
	start_listener --discard
	printf 'QUIT\r\n' >quit
	run -66 send --format raw missing quit
	assert_output --partial 'missing: No such file'
	assert_output --partial ' <- 221 '
	stop_listener
	run -75 send --format raw quit
}

# --- fallback

@test "a refused, unknown or closed opening falls back, on a new connection, having sent nothing" {
	make_message >m
	for word in refuse unknown close; do
		start_listener --eml in --bsmtp $word --json
		for mode in early pipelining lockstep; do
			sends --fallback $mode
			cat sent.json >>all.json
		done
		stop_listener
		assert_equal "$(event message .protocol listener.out | xargs)" 'ESMTP ESMTP ESMTP'
		assert_equal "$(event session .messages listener.out | xargs)" '0 1 0 1 0 1'
	done
	assert_equal "$(event opening '[.mode, .agreed]' all.json | sort | uniq -c | sed 's/^ *//')" \
		'3 ["early","reply"]
3 ["lockstep","reply"]
3 ["pipelining","reply"]'
	assert_equal "$(event summary '[.delivered, .unknown, .unsent]' all.json | sort | uniq -c |
		sed 's/^ *//')" '9 [1,0,0]'
	sed 's/$/\r/' m | sha1sum - in/*.eml | cut -d ' ' -f 1 | uniq >sums
	assert_equal "$(wc -l <sums)" 1
}

@test "before a fallback no more than the opening was sent" {
	make_message >m
	start_peer recv 'send:220 x\r\n' 'send:500 what\r\n' eof
	# The second connection finds a peer that has left.
	run -75 send --to bob@example.net --helo client.example --fallback lockstep m
	await test -e received
	assert_equal "$(tr -d '\r' <received)" 'BSMTP client.example'
}

@test "what came through a pipe survives a fallback" {
	make_mbox 50 >m
	start_listener --eml in --bsmtp refuse
	# shellcheck disable=SC2002 # a pipe it shall be
	cat m | send --to bob@example.net --fallback pipelining --json >sent.json
	assert_equal "$(summary delivered)" 50
	assert_equal "$(cat in/*.eml | grep -c '^\.dot')" 50
}

@test "without --fallback a refusal is the end; with it too, when that is refused" {
	make_message >m
	start_listener --eml in --bsmtp refuse --reply 'EHLO=550 5.7.1 no EHLO' --json
	sends -69
	assert_equal "$(summary unsent)" 1
	sends -69 --fallback pipelining
	assert_equal "$(summary unsent)" 1
	[[ $stderr = *'550 5.7.1 no EHLO'* ]]
	stop_listener
	assert_equal "$(event session .messages listener.out | xargs)" '0 0 0'
}

@test "no fallback from a 4yz, silence, or garbage" {
	make_message >m
	start_listener --discard --reply 'BSMTP=450 4.7.1 later' --reply 'CONNECT#2=421 4.3.2 busy' --json
	for _ in opening greeting; do
		sends -75 --fallback pipelining
		assert_equal "$(fates)" '0 0 0 0 1'
	done
	stop_listener
	assert_equal "$(event session .messages listener.out | xargs)" '0 0'
	start_listener --discard --bsmtp silent --json
	sends --fallback pipelining
	assert_equal "$(event opening '[.mode, .agreed]')" '["bsmtp","grace"]'
	stop_listener
	assert_equal "$(event session .messages listener.out)" 1
	start_peer 'send:SSH-2.0-foo\r\n' eof
	sends -76 --fallback pipelining
	assert_equal "$(summary unsent)" 1
	run -1 grep 'trying again' <<<"$stderr"
}

@test "no fallback once anything was streamed" {
	make_message >m
	for word in refuse close unknown; do
		start_listener --discard --bsmtp $word --latency 100ms --json
		run -- send --to bob@example.net --json --grace 0 --fallback pipelining m
		assert [ "$status" = 75 -o "$status" = 69 ]
		stop_listener
		assert_equal "$(event session 1 listener.out)" 1
	done
	# Nor behind a grace that was too short.
	start_listener --discard --bsmtp refuse --latency 200ms --json
	sends -75 --grace 20ms --fallback pipelining
	assert_equal "$(summary unknown)" 1
	stop_listener
	assert_equal "$(event session 1 listener.out)" 1
}

@test "an opening that is refused for good is 69, whatever was sent behind it" {
	make_message >m
	for greeting in '554 5.7.1 no' '220 x\r\n554 5.7.1 no'; do
		for end in close eof; do
			start_peer recv:DATA "send:$greeting\r\n" $end
			sends -69 --mode early
			assert_equal "$(fates)" '0 0 0 0 1'
			assert_equal "$(grep -c 'refused the session: 554 5.7.1 no' <<<"$stderr")" 1
			run -1 grep closed <<<"$stderr"
		done
	done
}

# --- peers, remembered

# auto [-STATUS] OPTION...: with ./peers, if no other.
auto() {
	local status=-0
	case ${1:-} in -[67]?) status=$1; shift ;; esac
	sends "$status" --mode auto --peers peers "$@"
}

@test "auto opens with EHLO, learns of BSMTP, and then opens with that and waits for nothing" {
	make_message >m
	start_listener --discard --json
	auto
	assert_equal "$(event opening '[.mode, .agreed]')" '["pipelining","reply"]'
	assert_equal "$(cat peers)" "$address"
	auto
	assert_equal "$(event opening '[.mode, .agreed]')" '["bsmtp","remembered"]'
	[ "${BSMTP_BUILD:-}" = torture ] || assert_equal "$(summary turnarounds)" 1
	assert_equal "$(jq -s '.[-1].grace_seconds' sent.json)" 0
	assert_equal "$(cat peers)" "$address"
	stop_listener
	assert_equal "$(event message .protocol listener.out | xargs)" 'ESMTP BSMTP'
}

@test "auto remembers a peer for itself, not for another" {
	make_message >m
	start_listener --discard
	echo "x$address" >peers
	echo "${address}0" >>peers
	auto
	assert_equal "$(event opening .mode)" '"pipelining"'
	assert_equal "$(xargs <peers)" "x$address ${address}0 $address"
}

@test "auto does not remember who does not offer BSMTP, nor look without being told to" {
	make_message >m
	start_listener --discard --keywords PIPELINING,8BITMIME,CHUNKING
	auto
	assert [ ! -e peers ]
	stop_listener
	start_listener --discard
	echo "$address" >peers
	sends --mode pipelining --peers peers
	assert_equal "$(event opening '[.mode, .agreed]')" '["pipelining","reply"]'
	sends --peers peers
	assert_equal "$(event opening '[.mode, .agreed]')" '["bsmtp","reply"]'
}

@test "a refusal erases the entry, and the next session opens with EHLO again" {
	make_message >m
	for word in refuse unknown; do
		start_listener --discard --bsmtp $word --keywords PIPELINING --latency 50ms
		printf '%s\n' other:1 "$address" '# mine' >peers
		run -- send --to bob@example.net --mode auto --peers peers m
		assert [ "$status" = 75 -o "$status" = 69 ]
		assert_equal "$(cat peers)" "$(printf '%s\n' other:1 '# mine')"
		auto
		assert_equal "$(event opening '[.mode, .agreed]')" '["pipelining","reply"]'
		assert_equal "$(cat peers)" "$(printf '%s\n' other:1 '# mine')"
		stop_listener
	done
}

@test "a remembered peer that refuses at its greeting is fallen back from at once" {
	make_message >m
	start_listener --eml in --reply 'CONNECT#1=554 5.7.1 no' --keywords PIPELINING
	echo "$address" >peers
	auto --await-greeting
	assert_equal "$(event opening .mode) $(summary delivered)" '"pipelining" 1'
	assert_equal "$(cat peers)" ''
}

@test "a remembered peer is not forgotten for a 4yz, or for not being there" {
	make_message >m
	start_listener --discard --reply 'CONNECT=421 4.3.2 busy'
	echo "$address" >peers
	run -- send --to bob@example.net --mode auto --peers peers m
	assert_equal "$status" 75
	stop_listener
	auto -75
	assert_equal "$(cat peers)" "$address"
}

@test "the file of peers is replaced whole, its other lines stay, and no other file does" {
	make_message >m
	start_listener --discard
	mkdir d
	printf '%s\n' '# comment' b.example:2525 a.example:2525 a.example:2525 '[::1]:25' >d/peers
	ln d/peers before
	sends --mode auto --peers d/peers
	cmp d/peers <(cat before; echo "$address")
	assert_equal "$(wc -l <before)" 5
	assert_equal "$(ls -A d)" peers
	# Nothing to change: nothing is written.
	ln -f d/peers before
	sends --mode auto --peers d/peers
	assert [ d/peers -ef before ]
}

@test "sessions at a time leave a file of peers that is whole" {
	make_message >m
	start_listener --discard
	seq -f 'host%g.example:2525' 2000 >peers
	cp peers want
	echo "$address" >>want
	for i in 1 2 3 4 5 6; do
		"$BSMTP" send --server "$address" --to bob@example.net --mode auto --peers peers m 3>&- &
		sending[i]=$!
	done
	for pid in "${sending[@]}"; do
		wait "$pid"
	done
	cmp peers want
	assert_equal "$(echo peers*)" peers
}

@test "peers are kept in XDG_STATE_HOME, else below HOME, else nowhere" {
	make_message >m
	start_listener --discard
	unset BSMTP_PEERS
	XDG_STATE_HOME=$PWD/state/deep HOME=$PWD/home sends --mode auto
	assert_equal "$(cat state/deep/bsmtp/peers)" "$address"
	assert [ ! -e home ]
	for relative in '' relative; do
		rm -rf home
		XDG_STATE_HOME=$relative HOME=$PWD/home sends --mode auto
		assert_equal "$(cat home/.local/state/bsmtp/peers)" "$address"
		assert [ ! -e relative ]
	done
	before=$(find . | sort)
	env -u XDG_STATE_HOME -u HOME "$BSMTP" send --server "$address" --to bob@example.net \
		--mode auto m
	assert_equal "$(find . | sort)" "$before"
}

@test "peers that cannot be written are a diagnostic, and the mail goes" {
	make_message >m
	start_listener --discard
	mkdir folder
	for file in m/peers folder /proc/1/peers; do
		sends --mode auto --peers $file
		assert_equal "$(summary delivered)" 1
		[[ $stderr = "bsmtp: $file: "* ]]
	done
	assert_equal "$(ls -A folder)" ''
	make_message | cmp - m
}

# --- progress

@test "--progress always: a line on standard error, the last one stays" {
	make_mbox 5 >m
	start_listener --discard --reply 'BODY#3=554 5.6.0 no'
	run -69 --separate-stderr send --to bob@example.net --progress always m
	assert_output ''
	# As a terminal shows it.
	run -0 sed $'s/.*\r\033\\[K//' <<<"$stderr"
	[[ ${lines[0]} = 'bsmtp: m: message 3 '*': rejected: 554 5.6.0 no' ]]
	[[ ${lines[1]} =~ ^5\ messages,\ 0\.0\ MB,\ [0-9.]+\ MB/s$ ]]
	assert_equal ${#lines[@]} 2
	# Standard output is for results.
	sends --progress always --mode lockstep
	jq . sent.json >/dev/null
}

@test "no progress where it is unwanted, without a terminal, or within a second" {
	make_message >m
	start_listener --discard --reply 'BODY=delay 1100ms'
	send --to bob@example.net m 2>pipe.err 3>&- &
	first=$!
	on_terminal -- "$BSMTP" send --server "$address" --to bob@example.net --progress never m \
		>never.out 3>&- &
	second=$!
	wait $first
	wait $second
	assert_equal "$(cat pipe.err never.out)" ''
	stop_listener
	start_listener --discard
	run -0 on_terminal -- "$BSMTP" send --server "$address" --to bob@example.net m
	assert_output ''
}

@test "on a terminal progress is shown after a second" {
	make_mbox 3 >m
	start_listener --discard --reply 'BODY#2=delay 1100ms'
	on_terminal -- "$BSMTP" send --server "$address" --to bob@example.net --mode lockstep m >shown
	run -0 sed $'s/.*\r\033\\[K//' shown
	assert_output --regexp $'^3 messages, 0\\.0 MB, [0-9.]+ MB/s\r$'
	grep -qE $'^\r\033\\[K[12] messages' shown
	# Not on standard output.
	BSMTP_PROGRESS=always run -0 --separate-stderr send --to bob@example.net m
	assert_output ''
}

@test "--progress says what is left of files whose size is known" {
	make_mbox 3 >m
	start_listener --discard --reply 'BODY#1=delay 1100ms' --max-size 1g
	# In lockstep, so that most of the second file is not read before the first reply.
	head -c $((SCALE * 100000)) /dev/zero | tr '\0' 'a' | fold -w 70 >long
	{ echo 'Subject: x'; echo; cat long; } >l
	run -0 --separate-stderr send --to bob@example.net --mode lockstep --progress always m l
	[[ $stderr =~ \ MB/s,\ [0-9]+:[0-9][0-9]\ left ]]
	run -0 --separate-stderr send --to bob@example.net --mode lockstep --progress always <l
	[[ $stderr != *left* ]]
}

# --- completion

# completes WANT WORD...: this is what bash offers for the last of them.
completes() {
	local want=$1
	shift
	COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
	_bsmtp
	assert_equal "$* ${COMPREPLY[*]}" "$* $want"
}

# The long options that --help lists.
help_options() { "$BSMTP" "$1" --help | grep -oE '^  .{4}--[a-z0-9-]+' | cut -c 7-; }

@test "completion in bash: verbs, every option, the words of an option" {
	"$BSMTP" completion bash >complete.bash
	shellcheck -s bash complete.bash
	# shellcheck disable=SC1091 # made here
	source complete.bash
	for verb in send listen; do
		completes "$(help_options $verb | xargs)" bsmtp $verb --
		# Each list of words is one that the program takes, and all of it.
		"$BSMTP" $verb --help | grep -oE -- '--[a-z-]+ [a-z]+(\|[a-z]+)+' >worded
		[ -s worded ]
		while read -r option words; do
			completes "${words//|/ }" bsmtp $verb "$option" ''
		done <worded
		completes '' bsmtp $verb --timeout ''
	done
	completes 'send listen version passwd completion' bsmtp ''
	completes listen bsmtp l
	completes --peers bsmtp send --pe
	completes lockstep bsmtp send --mode l
	completes '' bsmtp listen --mode ''
	completes 'bash zsh fish' bsmtp completion ''
}

@test "completion says what shells there are, and is for any name" {
	for shell in bash zsh fish; do
		"$BSMTP" completion $shell >plain
		"$BSMTP" completion $shell bmail >named
		run -1 grep -w 'bsmtp$' named
		grep -qw bmail named
		assert_equal "$(grep -cw bmail named)" "$(diff plain named | grep -c '^>')"
	done
	run -64 "$BSMTP" completion
	run -64 "$BSMTP" completion ksh
	assert_output --partial 'bash, zsh or fish'
}

# What is typed runs this, which says what it got.
make_echo() {
	mkdir -p bin
	printf '#!/bin/sh\nprintf "[%%s]" "$@"\necho .\n' >bin/bmail
	chmod +x bin/bmail
	touch 'file 1.mbox'
	export PATH=$PWD/bin:$PATH TERM=dumb HOME=$PWD INPUTRC=/dev/null
}
typed=('type:bmail send --mo\te\tfil\t\n' 'wait:[send][--mode][early][file 1.mbox].' 'type:exit\n')

@test "bash completes what is typed, files too" {
	make_echo
	"$BSMTP" completion bash bmail >complete.bash
	on_terminal 'wait:$' 'type:source complete.bash; PS1=ready\n' wait:PS1=ready wait:ready \
		"${typed[@]}" -- env PS1='$' bash --norc --noprofile -i
}

@test "zsh completes what is typed, files too" {
	make_echo
	mkdir functions
	"$BSMTP" completion zsh bmail >functions/_bmail
	zsh -n functions/_bmail
	# shellcheck disable=SC2016 # for zsh
	on_terminal 'type:PS1=ready; fpath=(functions $fpath); autoload -U compinit; compinit -u -D\n' \
		wait:PS1=ready wait:ready "${typed[@]}" -- zsh -f -i
}

@test "fish completes verbs, options, words and files" {
	export HOME=$PWD
	"$BSMTP" completion fish bmail >complete.fish
	fish -n complete.fish
	touch 'file 1.mbox'
	# shellcheck disable=SC2016 # for fish
	offers() { fish -N -c 'source complete.fish; complete -C $argv[1]' "$1" | cut -f 1 | xargs; }
	assert_equal "$(offers 'bmail ')" 'completion listen passwd send version'
	assert_equal "$(offers 'bmail send --mode ')" 'auto bsmtp early lockstep pipelining'
	assert_equal "$(offers 'bmail send fil')" 'file 1.mbox'
	assert_equal "$(offers 'bmail send --output fil')" 'file 1.mbox'
	assert_equal "$(offers 'bmail completion ')" 'bash fish zsh'
	for verb in send listen; do
		assert_equal "$(offers "bmail $verb --")" "$(help_options $verb | sort | xargs)"
	done
}

# --- options by environment

@test "every option has its variable, with the same effect and the same complaint" {
	tried=0
	for verb in send listen; do
		# Nothing to send, and no time to listen.
		[ $verb = send ] && rest=(/dev/null) || rest=(--deadline 0 127.0.0.1:0)
		[ $verb = send ] && export BSMTP_TO=b@example.net || unset BSMTP_TO
		"$BSMTP" $verb --help | grep -oE '^  .{4}--[a-z0-9-]+ ?[A-Za-z|]*' | cut -c 7- >options
		while read -r option argument; do
			[ "$option" != --help ] || continue
			name=${option#--}
			name=BSMTP_${name//-/_}
			# A value that is wrong for all but paths and the like.
			value=1x
			[ -n "$argument" ] || value=
			want=0 got=0
			# shellcheck disable=SC2086 # none where the option takes none
			"$BSMTP" $verb "$option" $value "${rest[@]}" </dev/null >/dev/null 2>want.err || want=$?
			(
				export "${name^^}=${value:-1}"
				exec "$BSMTP" $verb "${rest[@]}" </dev/null >/dev/null 2>got.err
			) || got=$?
			# A certificate made for a run has a pin of its own.
			sed -i 's/sha256:[0-9a-f]*$/sha256:/' want.err got.err
			mapfile -t wanted <want.err
			mapfile -t gotten <got.err
			[ "$option" != --trace ] || gotten=() wanted=()         # they have times
			# One says --name, the other environment: name.
			gotten=("${gotten[@]/environment: /}")
			assert_equal "$option $got ${gotten[*]/: --/: }" "$option $want ${wanted[*]/: --/: }"
			tried=$((tried + 1))
		done <options
	done
	assert [ $tried -ge 50 ]
}

@test "a variable that is empty, or 0 for a switch, sets nothing" {
	make_message >m
	start_listener --discard
	BSMTP_JSON=0 BSMTP_MODE='' BSMTP_TRACE='' run -0 send --to bob@example.net m
	assert_output ''
	BSMTP_JSON=1 BSMTP_MODE=lockstep run -0 send --to bob@example.net m
	assert_equal "$(event opening .mode <(echo "$output"))" '"lockstep"'
}

@test "a wrong variable is 64, and says that it is the environment's" {
	make_message >m
	BSMTP_TIMEOUT=never run -64 "$BSMTP" send --to bob@example.net m
	assert_output --partial 'environment: timeout never'
	BSMTP_MAX_SIZE=1q run -64 "$BSMTP" listen 127.0.0.1:0
	assert_output --partial 'environment: max-size 1q'
	# One of the other verb's is none of ours.
	BSMTP_MAX_SIZE=1q run -0 "$BSMTP" send --to bob@example.net /dev/null
}

@test "the listener takes its options from the environment" {
	export BSMTP_EML=in BSMTP_HOSTNAME=env.example BSMTP_MAX_SIZE=1k \
		BSMTP_REPLY='RCPT no@*=550 5.1.1 nobody' BSMTP_KEYWORDS=SIZE BSMTP_SMTP=deny
	start_listener
	printf 'BSMTP x\r\nEHLO x\r\nQUIT\r\n' | send --format raw >said
	assert_equal "$(sed 's/.* <- //' said | head -n 3 | xargs)" \
		'220 env.example ESMTP bsmtp 250-env.example 250 SIZE 1024'
	make_message >m
	sends -69 --to no@example.net
	assert_equal "$(cat in/*.json | jq -c .to)" '["bob@example.net"]'
}

# --- who, and where

@test "--helo is who the listener hears of" {
	make_message >m
	start_listener --eml in
	for name in client.example '[192.0.2.1]' '[IPv6:2001:db8::1]'; do
		for mode in bsmtp lockstep; do
			sends --helo "$name" --mode $mode
		done
	done
	assert_equal "$(jq -r .helo in/*.json | uniq -c | sed 's/^ *//')" \
		'2 client.example
2 [192.0.2.1]
2 [IPv6:2001:db8::1]'
	for name in 'a b' -x.example a..b '[192.0.2]' "a$(printf '\r')"; do
		run -64 send --to bob@example.net --helo "$name" m
	done
}

@test "-4 and -6 are one family only" {
	make_message >m
	start_listener --discard
	local six
	sends -4
	sends --ipv4
	for six in -6 --ipv6; do
		run -68 send --to bob@example.net $six m
	done
	start_listener_at '[::1]:0'
	sends -6
	run -68 send --to bob@example.net -4 m
	BSMTP_IPV6=1 run -0 send --to bob@example.net m
	BSMTP_IPV6=1 run -68 send --to bob@example.net -4 m
}

# start_listener_at ADDRESS: where start_listener has its own.
start_listener_at() {
	rm -f addr
	"$BSMTP" listen --discard --address-file addr "$1" >listener.out 2>listener.err 3>&- &
	listener_pid=$!
	pids+=($!)
	await test -s addr
	address=$(cat addr)
}

# with_hosts CMD...: with ./hosts in place of /etc/hosts.
with_hosts() {
	if unshare -m true 2>/dev/null; then set -- -m sh -c "$*"; else set -- -rm sh -c "$*"; fi
	set -- "$1" "$2" "$3" "mount --bind hosts /etc/hosts && exec $4"
	unshare "$@"
}

@test "of a name's addresses each is tried, and what does not answer costs a moment only" {
	make_message >m
	unshare -m true 2>/dev/null || unshare -rm true || skip 'no namespaces here'
	printf '127.0.0.1 both.test\n::1 both.test\n192.0.2.1 far.test\n127.0.0.1 far.test\n' >hosts
	begin=$(now)
	for at in 127.0.0.1:0 '[::1]:0'; do
		start_listener_at "$at"
		with_hosts "$BSMTP" send --server "both.test:${address##*:}" --to bob@example.net --json m >sent.json
		assert_equal "$(event opening .peer)" "\"$address\""
		stop_listener
	done
	start_listener --discard
	with_hosts "$BSMTP" send --server "far.test:${address##*:}" --to bob@example.net m
	assert [ $(($(now) - begin)) -lt 5000 ]
	stop_listener
	run -75 with_hosts "$BSMTP" send --server "both.test:${address##*:}" --to bob@example.net m
	assert_output --partial 'both.test'
}

@test "--stop-after gives up after so many refused or deferred messages, not recipients" {
	make_mbox 9 >m
	start_listener --discard --reply 'RCPT no@*=550 5.1.1 nobody' --reply 'BODY#2=554 5.6.0 no' \
		--reply 'MAIL#4=451 4.3.0 later'
	sends -75 --mode lockstep --to no@example.net --stop-after 2
	assert_equal "$(fates)" '2 1 1 0 5'
	stop_listener
	start_listener --discard --reply 'BODY=554 5.6.0 no'
	sends -75 --mode lockstep --stop-after 1
	assert_equal "$(fates)" '0 1 0 0 8'
	sends -69 --mode lockstep --stop-after 1 --keep-going
	assert_equal "$(summary rejected)" 9
	BSMTP_STOP_AFTER=3 sends -75 --mode lockstep
	assert_equal "$(fates)" '0 3 0 0 6'
	# In a stream: what comes behind the refusal is not sent.
	line=$(grep -n '^From ' m | sed -n '2s/:.*//p')
	{
		head -n "$line" m
		await grep -q 554 stream.err
		tail -n +$((line + 1)) m
	} | {
		send --to bob@example.net --json --stop-after 1 2>stream.err >sent.json || [ $? = 75 ]
	}
	assert_equal "$(fates)" '0 1 0 0 8'
	run -64 send --to bob@example.net --stop-after 0 m
}
