# Called by a name that ends in "sendmail": by the programs that do so, and by hand.
# shellcheck disable=SC2154 # lib.bash has variables
load lib

# start_sendmail LISTENER-OPTION...: ./sendmail sends to a listener that stores in ./in.
start_sendmail() {
	ln -s "$(realpath "$BSMTP")" sendmail
	sendmail=$PWD/sendmail
	host=$(uname -n)
	rm -rf in
	start_listener --eml in "$@"
	export BSMTP_SERVER=$address HOME=$PWD LC_ALL=C.UTF-8
}

# What the program said to sendmail goes to ./said, a line a call.
overhear() {
	cat >overheard-sendmail <<-EOF
	#!/bin/sh
	echo "\$*" >>'$PWD/said'
	exec '$sendmail' "\$@"
	EOF
	chmod +x overheard-sendmail
	sendmail=$PWD/overheard-sendmail
}

# The message that came last, and how many there are.
last() { local f=(in/*.eml); echo "${f[-1]}"; }
count() { compgen -G 'in/*.eml' | wc -l; }
# envelope [N]: of message N, or the last: sender and recipients.
envelope() {
	local f=(in/*.json)
	[ -z "${1:-}" ] || f=("in/$(printf %06d "$1").json")
	jq -c '[.from] + .to' "${f[-1]}"
}
body() { sed '1,/^\r$/d' "${1:-$(last)}" | tr -d '\r'; }
header() { sed '/^\r$/q' "$(last)" | tr -d '\r'; }

text() { printf '%s\n' 'First line' '.' 'From me' '..' '.dot' '' 'last ä'; }

# --- The programs

@test "mutt sends, with DSN and an envelope sender, and no Bcc is seen" {
	start_sendmail
	overhear
	text | mutt -n -F /dev/null -e "set sendmail='$sendmail -oem -oi' copy=no send_charset=utf-8" \
		-e "set from='Alice <alice@example.org>' use_envelope_from dsn_notify='failure,delay'" \
		-e 'set dsn_return=hdrs' -s Süb -c 'Carol <carol@example.net>' -b hidden@example.net \
		-- '"Q, R" <q@example.net>' bob@example.net
	assert_equal "$(cat said)" "-oem -oi -f alice@example.org -N failure,delay -R hdrs --\
 q@example.net bob@example.net carol@example.net hidden@example.net"
	assert_equal "$(envelope)" '["alice@example.org","q@example.net","bob@example.net",'\
'"carol@example.net","hidden@example.net"]'
	body | cmp - <(text)
	header | grep -qx 'Cc: Carol <carol@example.net>'
	run -1 grep -i hidden in/000001.eml
	assert_equal "$(count)" 1
}

@test "mutt's own default options send too, from the header's author" {
	start_sendmail
	text | mutt -n -F /dev/null -e "set sendmail='$sendmail -oem -oi' copy=no" \
		-e "set from=alice@example.org use_envelope_from=no" -s x bob@example.net
	assert_equal "$(envelope)" '["alice@example.org","bob@example.net"]'
}

@test "mutt says what became of a message that was deferred, refused, or has no server" {
	start_sendmail --reply 'RCPT later@*=451 4.3.0 not now' --reply 'RCPT no@*=550 5.1.1 nobody'
	with_mutt() {
		echo x | mutt -n -F /dev/null -e "set sendmail='$sendmail -oem -oi' copy=no" -s x "$1"
	}
	run -1 with_mutt later@example.net
	assert_output --partial '451 4.3.0 not now'
	assert_output --partial 'child exited 75 (Deferred.)'
	run -1 with_mutt no@example.net
	assert_output --partial '550 5.1.1 nobody'
	assert_output --partial 'child exited 69 (Service unavailable.)'
	stop_listener
	run -1 with_mutt bob@example.net
	assert_output --partial 'child exited 75 (Deferred.)'
}

# patches N: a repository with so many commits, all with what a mailer may spoil.
patches() {
	export GIT_CONFIG_NOSYSTEM=1 GIT_AUTHOR_NAME=Alice GIT_AUTHOR_EMAIL=alice@example.org \
		GIT_COMMITTER_NAME=Alice GIT_COMMITTER_EMAIL=alice@example.org
	git init -q repo
	for i in $(seq "$1"); do
		printf 'From %s\n.\n..\n.dot ä\n' "$i" >>repo/f
		git -C repo add f
		git -C repo commit -qm "Change $i" -m . -m 'From here on'
	done
}

# send_email ARGUMENT...: the whole history, to Bob and in secret to another.
send_email() {
	git -C repo "$@" --root --quiet --confirm=never --suppress-cc=all \
		--8bit-encoding=UTF-8 --to='Bob <bob@example.net>' --bcc=hidden@example.net HEAD
}

# The series is in ./in, in order, and git makes the same commits of it.
same_patches() {
	git init -q again
	git -C again am -q "$PWD"/in/*.eml
	assert_equal "$(git -C again rev-parse 'HEAD^{tree}')" "$(git -C repo rev-parse 'HEAD^{tree}')"
	assert_equal "$(git -C again log --format=%an%ae%B)" "$(git -C repo log --format=%an%ae%B)"
	run -1 grep -ir hidden in --include='*.eml'
}

@test "git send-email sends a series of ten by --smtp-server, without -f" {
	start_sendmail
	patches 10
	overhear
	send_email send-email --smtp-server="$sendmail"
	assert_equal "$(sort -u said)" '-i bob@example.net hidden@example.net'
	assert_equal "$(jq -sc 'map([.from] + .to) | unique' in/*.json)" \
		'[["alice@example.org","bob@example.net","hidden@example.net"]]'
	assert_equal "$(count)" 10
	same_patches
}

@test "git send-email sends a series by sendmailcmd, with -f" {
	start_sendmail
	patches 3
	overhear
	send_email -c sendemail.sendmailcmd="$sendmail -oem" send-email \
		--envelope-sender=bounce@example.org
	assert_equal "$(sort -u said)" '-oem -f bounce@example.org -i bob@example.net hidden@example.net'
	assert_equal "$(jq -sc 'map(.from) | unique' in/*.json)" '["bounce@example.org"]'
	assert_equal "$(count)" 3
	same_patches
}

@test "git send-email stops where a patch is refused, and says so" {
	start_sendmail --reply 'BODY#2=554 5.7.1 no more'
	patches 3
	run ! send_email send-email --smtp-server="$sendmail"
	assert_output --partial '554 5.7.1 no more'
	assert_equal "$(count)" 1
}

@test "s-nail sends, and hears of a refusal" {
	start_sendmail --reply 'RCPT no@*=550 5.1.1 nobody'
	overhear
	text | s-nail -:/ -S mta="$sendmail" -S nosave -r alice@example.org -s sub \
		-c carol@example.net -b hidden@example.net bob@example.net
	assert_equal "$(cat said)" \
		'-i -f alice@example.org -- bob@example.net carol@example.net hidden@example.net'
	assert_equal "$(envelope)" \
		'["alice@example.org","bob@example.net","carol@example.net","hidden@example.net"]'
	/usr/bin/python3 - in/000001.eml <<'PY' | cmp - <(text)
import email, sys
with open(sys.argv[1], "rb") as f:
    sys.stdout.buffer.write(email.message_from_binary_file(f).get_payload(decode=True).replace(b"\r\n", b"\n"))
PY
	run -1 grep -i hidden in/000001.eml
	run ! with_nail
	assert_output --partial '550 5.1.1 nobody'
	assert_output --partial 'message not sent'
}

with_nail() { echo x | s-nail -:/ -S mta="$sendmail" -S nosave -s x no@example.net; }

with_mailutils() {
	mail.mailutils --no-config -n -E "set sendmail=sendmail:$sendmail" "$@"
}

@test "mailutils' mail sends by its sendmail: mailer, and Bcc goes" {
	start_sendmail
	overhear
	text | with_mailutils -r alice@example.org -s sub -a 'Bcc: hidden@example.net' \
		-a 'X-Mark: 1' bob@example.net 'Carol <carol@example.net>'
	assert_equal "$(cat said)" '-oi -f alice@example.org -t'
	assert_equal "$(envelope | jq -c 'sort')" \
		'["alice@example.org","bob@example.net","carol@example.net","hidden@example.net"]'
	header | grep -qx 'X-Mark: 1'
	body | cmp - <(text)
	run -1 grep -i hidden in/000001.eml
}

@test "mailutils' mail fails where the message is deferred" {
	start_sendmail --reply 'RCPT=450 4.2.0 not now'
	run ! with_mailutils -s x bob@example.net <<<x
	assert_output --partial 'cannot send message'
}

@test "PHP's mail() sends, with its headers and a sender of its own" {
	start_sendmail --reply 'RCPT no@*=550 5.1.1 nobody'
	php() { command php -n -d sendmail_path="$sendmail -t -i" "$@"; }
	run -0 php -r 'var_dump(mail("bob@example.net, Carol <carol@example.net>", "Sub",
		"Line\n.\nFrom me\n..\nlast ä", "From: Alice <alice@example.org>\r\n" .
		"Bcc: hidden@example.net\r\nX-Mark: 1", "-fbounce@example.org"));'
	assert_output 'bool(true)'
	assert_equal "$(envelope)" \
		'["bounce@example.org","bob@example.net","carol@example.net","hidden@example.net"]'
	body | cmp - <(printf 'Line\n.\nFrom me\n..\nlast ä\n')
	header | grep -qx 'X-Mark: 1'
	run -1 grep -i hidden in/000001.eml
	run -0 php -r 'var_dump(mail("bob@example.net", "Sub", "Line\r\n", "From: a@example.org"));'
	assert_output 'bool(true)'
	assert_equal "$(envelope)" '["a@example.org","bob@example.net"]'
	run -0 --separate-stderr php -r 'var_dump(mail("no@example.net", "Sub", "x"));'
	assert_output 'bool(false)'
	assert_equal "$(count)" 2
}

# symfony TRANSPORT ADDRESS...: Symfony's mailer sends a message to each, over one dialogue.
symfony() {
	cat >symfony.php <<-'EOF'
	<?php
	require '/usr/share/php/Symfony/Component/Mailer/autoload.php';
	use Symfony\Component\Mailer\Exception\TransportException;
	use Symfony\Component\Mailer\Transport\SendmailTransport;
	use Symfony\Component\Mime\Email;
	$mailer = new SendmailTransport($argv[1]);
	foreach (array_slice($argv, 2) as $to) {
		$mail = (new Email())->from('Alice <alice@example.org>')->to($to)
			->subject("to $to")->text("Line\n.\n..\nlast");
		try {
			$mailer->send($mail);
			echo "sent\n";
		} catch (TransportException $e) {
			echo $e->getCode(), ' ', $e->getMessage(), "\n";
		}
	}
	EOF
	php symfony.php "$@"
}

@test "Symfony's dialogue by -bs: each message is sent on, and what the server says goes back" {
	start_sendmail --reply 'RCPT no@*=550 5.1.1 nobody' --reply 'RCPT later@*=450 4.2.0 not now'
	overhear
	run -0 --separate-stderr symfony "$sendmail -bs" a@example.net no@example.net \
		later@example.net b@example.net
	assert_equal "$(cut -c 1-4 <<<"$output" | xargs)" 'sent 554 451 sent'
	assert_equal "$(grep -cx -- -bs said)" 1
	assert_equal "$(jq -sc 'map([.from] + .to)' in/*.json)" \
		'[["alice@example.org","a@example.net"],["alice@example.org","b@example.net"]]'
	body | cmp - <(printf 'Line\n.\n..\nlast\n')
}

@test "Symfony sends by -t too, and hears the exit status" {
	start_sendmail --reply 'RCPT no@*=550 5.1.1 nobody'
	run -0 --separate-stderr symfony "$sendmail -t -i" a@example.net no@example.net
	assert_equal "${lines[0]}" sent
	assert_equal "${lines[1]%%:*}" '0 Process failed with exit code 69'
	assert_equal "$(envelope)" '["alice@example.org","a@example.net"]'
	body | cmp - <(printf 'Line\n.\n..\nlast\n')
}

@test "cron's arguments: a local user gets the host's name, lines are left alone" {
	start_sendmail
	printf '%s\n' 'From: root (Cron Daemon)' 'To: bob' 'Subject: Cron <root@here> ls' \
		'MIME-Version: 1.0' 'Content-Type: text/plain; charset=UTF-8' \
		'Content-Transfer-Encoding: 8bit' 'X-Cron-Env: <SHELL=/bin/sh>' '' >m
	text >>m
	"$sendmail" -FCronDaemon -i -B8BITMIME -oem bob <m
	assert_equal "$(envelope)" "[\"$(id -un)@$host\",\"bob@$host\"]"
	tr -d '\r' <in/000001.eml | cmp - m
}

@test "mdadm's -t: the header says to whom" {
	start_sendmail
	printf '%s\n' "From: mdadm monitoring <root@example.org>" 'To: admin@example.net' \
		'Subject: DegradedArray event' '' 'A DegradedArray event.' | "$sendmail" -t
	assert_equal "$(envelope)" '["root@example.org","admin@example.net"]'
}

# --- The dialogue and the batch, by hand

# codes: of the replies on standard input, a line for each.
codes() { tr -d '\r' | grep -v '^...-' | cut -c 1-3 | xargs; }

@test "-bs is a dialogue: transactions, RSET and mistakes in one session" {
	start_sendmail --reply 'MAIL bad@*=550 5.7.1 no' --reply 'RCPT full@*=452 4.3.1 full'
	transaction() {
		printf 'MAIL FROM:<%s>\r\n' "$1"
		shift
		printf 'RCPT TO:<%s>\r\n' "$@"
		printf 'DATA\r\nSubject: x\r\n\r\n..\r\n.\r\n'
	}
	{
		printf 'EHLO client.example\r\n'
		transaction a@example.org b@example.net c@example.net
		transaction bad@example.org b@example.net
		transaction a@example.org full@example.net
		printf 'MAIL FROM:<x@example.org>\r\nRSET\r\nNOOP\r\nFROB\r\n'
		transaction d@example.org b@example.net
		printf 'QUIT\r\n'
	} | "$sendmail" -bs >replies 2>said
	assert_equal "$(codes <replies)" \
		'220 250 250 250 250 354 250 250 250 354 554 250 250 354 451 250 250 250 500 250 250 354 250 221'
	assert_equal "$(jq -sc 'map([.from] + .to) | sort' in/*.json)" \
		'[["a@example.org","b@example.net","c@example.net"],["d@example.org","b@example.net"]]'
	assert_equal "$(body)" .
	grep -q '550 5.7.1 no' said
	grep -q '452 4.3.1 full' said
}

@test "-bs hands a null sender and an address with a quote through" {
	start_sendmail
	printf '%s\r\n' 'EHLO x' 'MAIL FROM:<>' "RCPT TO:<\"a b;\$(touch hole)'\"@example.net>" \
		'RCPT TO:<-f@example.net>' DATA 'Subject: x' '' 'x' . QUIT | "$sendmail" -bs >replies
	assert_equal "$(codes <replies)" '220 250 250 250 250 354 250 221'
	assert_equal "$(envelope)" "[\"\",\"\\\"a b;\$(touch hole)'\\\"@example.net\",\"-f@example.net\"]"
	assert [ ! -e hole ]
}

@test "-bs with no server to send to defers each message, and the session lives" {
	start_sendmail
	stop_listener
	printf '%s\r\n' 'EHLO x' 'MAIL FROM:<a@example.org>' 'RCPT TO:<b@example.net>' DATA \
		'Subject: x' '' . NOOP QUIT | "$sendmail" -bs >replies 2>said
	assert_equal "$(codes <replies)" '220 250 250 250 354 451 250 221'
	grep -q 'Connection refused' said
}

@test "-bS is a batch: each transaction is sent, in one session, and each has its verdict" {
	start_sendmail --reply 'RCPT no@*=550 5.1.1 nobody' --json
	printf '%s\n' 'MAIL FROM:<a@example.org>' 'RCPT TO:<b@example.net>' 'RCPT TO:<bob>' DATA \
		'Subject: 1' '' '..' . 'MAIL FROM:<a@example.org>' 'RCPT TO:<no@example.net>' DATA \
		'Subject: 2' '' x . 'MAIL FROM:<>' 'RCPT TO:<c@example.net>' DATA 'Subject: 3' '' y . >batch.bsmtp
	run -69 "$sendmail" -bS <batch.bsmtp
	assert_output --partial '550 5.1.1 nobody'
	assert_equal "$(envelope 1) $(envelope)" \
		"[\"a@example.org\",\"b@example.net\",\"bob@$host\"] [\"\",\"c@example.net\"]"
	assert_equal "$(body in/000001.eml)" .
	stop_listener
	assert_equal "$(jq -c 'select(.event == "session") | .messages' listener.out)" 2
}

@test "-bS with a server that defers is 75, and with an empty batch 0" {
	start_sendmail --reply 'BODY=451 4.3.0 later'
	run -75 "$sendmail" -bS <<<$'MAIL FROM:<a@x.example>\nRCPT TO:<b@x.example>\nDATA\nS: x\n\n.'
	run -0 "$sendmail" -bS </dev/null
}

# --- The message on standard input

@test "a lone dot ends the message, but not with -i or -oi" {
	start_sendmail
	printf 'Subject: x\n\na\n.\nb\n' >m
	"$sendmail" b@example.net <m
	assert_equal "$(body)" a
	for ignore in -i -oi '-oem -oi' '-i -f a@example.org'; do
		# shellcheck disable=SC2086 # words
		"$sendmail" $ignore b@example.net <m
		body | cmp - <(printf 'a\n.\nb\n')
	done
	# -om and the like are none of these.
	"$sendmail" -oem -om -odb b@example.net <m
	assert_equal "$(body)" a
}

@test "only a line that is one dot ends it, with LF, CRLF or nothing behind" {
	start_sendmail
	for end in '.' '.\n' '.\r\n' '.\nmore\n' '.\r\nmore\n' '.\n.\n'; do
		printf "Subject: x\n\n..\n. \n.x\nx.\n.\r.\n\n%b" "$end" | "$sendmail" b@example.net
		body | cmp - <(printf '..\n. \n.x\nx.\n. .\n\n')
	done
}

@test "a lone dot is found however it comes, and nothing waits for the end of the pipe" {
	start_sendmail
	mkfifo pipe
	"$sendmail" b@example.net <pipe 3>&- &
	pids+=($!)
	exec 9>pipe
	for part in 'Subj' 'ect: x\n' '\n' 'a\n' '.' 'b\n.' '\r'; do
		printf %b "$part" >&9
		read -rt 0.02 <> <(:) || :
	done
	printf '\n' >&9
	wait "${pids[-1]}"
	exec 9>&-
	assert_equal "$(body)" 'a
.b'
}

@test "a first line that is an mbox's is dropped, one like it further on is not" {
	start_sendmail
	printf '%s\n' 'From a@example.org Mon Nov 23 12:00:00 2026' 'From: f@example.org' 'Subject: x' \
		'' 'From a@example.org Mon Nov 23 12:00:00 2026' >m
	"$sendmail" b@example.net <m
	tr -d '\r' <in/000001.eml | cmp - <(tail -n +2 m)
	assert_equal "$(envelope)" '["f@example.org","b@example.net"]'
	# In pieces, too.
	{
		head -c 3 m
		read -rt 0.02 <> <(:) || :
		tail -c +4 m | head -c 20
		read -rt 0.02 <> <(:) || :
		tail -c +24 m
	} | "$sendmail" b@example.net
	cmp in/000001.eml in/000002.eml
}

@test "what is no mail has a sender and goes as it is" {
	start_sendmail
	printf 'hello world: \377\n\nmore' | "$sendmail" -i b@example.net
	tr -d '\r' <in/000001.eml | cmp - <(printf 'hello world: \377\n\nmore\n')
	assert_equal "$(envelope)" "[\"$(id -un)@$host\",\"b@example.net\"]"
}

@test "a long message passes to the octet" {
	start_sendmail
	make_mbox 1 >m
	for _ in $(seq 10); do
		cat m m >m2
		mv m2 m
	done
	[ "${BSMTP_BUILD:-}" != torture ] || truncate -s 100001 m
	{ printf 'Subject: x\n\n'; cat m; } | "$sendmail" -i b@example.net
	body | head -c "$(stat -c %s m)" | cmp - m
}

# --- Who it is for, who it is from

@test "-t takes the header's recipients, operands are added, each once, and Bcc goes" {
	start_sendmail
	printf '%s\n' 'From: a@example.org' 'To: "Q, R" <q@example.net>, b@example.net' \
		'Cc: c@example.net' 'Bcc: d@example.net' 'Subject: x' '' x >m
	"$sendmail" -t <m
	assert_equal "$(envelope)" \
		'["a@example.org","q@example.net","b@example.net","c@example.net","d@example.net"]'
	"$sendmail" -t e@example.net b@example.net <m
	assert_equal "$(envelope | jq -c '.[1:] | sort')" \
		'["b@example.net","c@example.net","d@example.net","e@example.net","q@example.net"]'
	tr -d '\r' <in/000002.eml | cmp - <(grep -v Bcc m)
	"$sendmail" -t <<<$'Resent-To: r@example.net\nTo: b@example.net\n\nx'
	assert_equal "$(envelope | jq -c '.[1:]')" '["r@example.net"]'
}

@test "without -t the header is left alone, Bcc too" {
	start_sendmail
	printf 'To: t@example.net\nBcc: hidden@example.net\n\nx\n' >m
	"$sendmail" b@example.net <m
	assert_equal "$(envelope | jq -c '.[1:]')" '["b@example.net"]'
	tr -d '\r' <in/000001.eml | cmp - m
}

@test "operands are lists, have display names, and a local part is of this host" {
	start_sendmail
	"$sendmail" -i -- 'a@example.net,b@example.net' 'Carol <c@example.net>' \
		'"Q, R" <q@example.net>, <d@example.net>' root <<<$'Subject: x\n'
	assert_equal "$(envelope | jq -c '.[1:]')" '["a@example.net","b@example.net",'\
"\"c@example.net\",\"q@example.net\",\"d@example.net\",\"root@$host\"]"
}

@test "-f and -r say who it is from, -f '' nobody, a local part is of this host" {
	start_sendmail
	sender() {
		"$sendmail" "$@" b@example.net <<<$'From: h@example.org\n'
		envelope | jq -r '.[0]'
	}
	assert_equal "$(sender)" h@example.org
	assert_equal "$(sender -f a@example.org)" a@example.org
	assert_equal "$(sender -fa@example.org)" a@example.org
	assert_equal "$(sender -r a@example.org -oi)" a@example.org
	assert_equal "$(sender -f '<a@example.org>')" a@example.org
	assert_equal "$(sender -f '' --)" ''
	assert_equal "$(sender -f bob)" "bob@$host"
	assert_equal "$(sender -f first@example.org -f second@example.org)" second@example.org
}

@test "addresses that are none are 64, and nothing is sent" {
	start_sendmail
	for wrong in 'a@b@c' '@example.net' 'a b' '<a@example.net' 'a@example..net' '' ' '; do
		run -64 "$sendmail" "$wrong" <<<$'Subject: x\n'
		run -64 "$sendmail" b@example.net "$wrong" <<<$'Subject: x\n'
	done
	run -64 "$sendmail" -f 'a@b@c' b@example.net <<<$'Subject: x\n'
	assert_equal "$(count)" 0
}

# --- Options and exit statuses

@test "options of which nothing follows are taken" {
	start_sendmail
	run -0 "$sendmail" -Am -Ac -B8BITMIME -B 7BIT -bm -em -odi -odq -oem -oee -om -o i -oMrx \
		-O Timeout=3 -G -h3 -h 3 -m -n -N never -Nfailure,delay -R hdrs -U -V id -X /dev/null \
		-F Daemon -FCronDaemon -p ESMTP -s -- b@example.net <<<$'From: a@example.org\n'
	assert_output ''
	assert_equal "$(envelope)" '["a@example.org","b@example.net"]'
}

@test "-v shows what is said" {
	start_sendmail
	run -0 --separate-stderr "$sendmail" -v b@example.net <<<$'Subject: x\n'
	assert_output ''
	grep -q ' -> RCPT TO:<b@example.net>' <<<"$stderr"
}

@test "what only a queue can do, and what is not known, is 64" {
	start_sendmail
	for option in -bp -bi -bd -bt -bv -bz -q -q1h -Z --to=b@example.net; do
		run -64 "$sendmail" $option b@example.net <<<$'Subject: x\n'
		assert [ -n "$output" ]
	done
	assert_equal "$(count)" 0
}

@test "nobody to send to is 64, with -t 65" {
	start_sendmail
	for options in '' -i '-i --' '-f a@example.org'; do
		# shellcheck disable=SC2086 # words
		run -64 "$sendmail" $options <<<$'To: b@example.net\n'
		assert_output --partial 'no recipients'
	done
	run -65 "$sendmail" -t <<<$'Subject: x\n'
	assert_output --partial 'no recipients'
	assert_equal "$(count)" 0
}

@test "4yz is 75, 5yz is 69, a refused opening 69, no server 75, no such host 68" {
	start_sendmail --reply 'RCPT later@*=450 4.2.0 later' --reply 'RCPT no@*=550 5.1.1 no' \
		--reply 'BODY#1=451 4.3.0 later' --reply 'BODY=554 5.6.0 no'
	one() { "$sendmail" "$@" <<<$'Subject: x\n'; }
	run -75 one later@example.net
	assert_output --partial '450 4.2.0 later'
	run -69 one no@example.net
	run -75 one b@example.net
	run -69 one b@example.net
	stop_listener
	run -75 one b@example.net
	assert_output --partial 'Connection refused'
	BSMTP_SERVER=nohost.invalid run -68 one b@example.net
	start_listener --eml in --bsmtp refuse
	BSMTP_SERVER=$address run -69 one b@example.net
	BSMTP_SERVER=$address BSMTP_FALLBACK=pipelining run -0 one b@example.net
}

@test "one recipient refused: the others have it, and it is 69" {
	start_sendmail --reply 'RCPT no@*=550 5.1.1 nobody'
	run -69 "$sendmail" a@example.net no@example.net b@example.net <<<$'Subject: x\n'
	assert_output --partial '<no@example.net>: rejected: 550 5.1.1 nobody'
	assert_equal "$(envelope | jq -c '.[1:]')" '["a@example.net","b@example.net"]'
}

@test "the environment alone configures it" {
	start_sendmail
	for mode in bsmtp early pipelining lockstep; do
		BSMTP_MODE=$mode BSMTP_HELO=$mode.example.org BSMTP_FRAMING=data BSMTP_FROM=env@example.org \
			"$sendmail" b@example.net <<<$'Subject: x\n'
	done
	assert_equal "$(jq -r '.helo + " " + .protocol + " " + .from' in/*.json)" \
		'bsmtp.example.org BSMTP env@example.org
early.example.org ESMTP env@example.org
pipelining.example.org ESMTP env@example.org
lockstep.example.org ESMTP env@example.org'
	# Nobody is added whom the caller did not name; -f wins.
	BSMTP_TO=env@example.net BSMTP_FROM=env@example.org \
		"$sendmail" -f a@example.org b@example.net <<<$'Subject: x\n'
	assert_equal "$(envelope)" '["a@example.org","b@example.net"]'
	BSMTP_JSON=1 run -0 "$sendmail" b@example.net <<<$'Subject: x\n'
	assert_equal "$(jq -r 'select(.event == "message") | .fate' <<<"$output")" delivered
	BSMTP_MODE=bogus run -64 "$sendmail" b@example.net <<<$'Subject: x\n'
}

@test "any name that ends in sendmail will do, and no other" {
	start_sendmail
	ln -s "$(realpath "$BSMTP")" bsmtp-sendmail
	ln -s "$(realpath "$BSMTP")" sendmailx
	PATH=$PWD:$PATH bsmtp-sendmail b@example.net <<<$'Subject: x\n'
	assert_equal "$(count)" 1
	run -64 ./sendmailx b@example.net <<<$'Subject: x\n'
}
