# peers.bash - real servers, each with a configuration, a spool and a port of its
# own in the test's folder.  What they deliver is in the folder mail, what they
# have to say in the file log.  They serve b and c at example.net, refuse any other
# recipient there, put off later@example.net, and take no message with the subject
# "forbidden".
#
# Postfix, Exim and OpenSMTPD want root, as they run under several users.
# shellcheck shell=bash disable=SC2034,SC2154 # lib.bash and the tests share variables
PATH=$PATH:/usr/sbin:/sbin
tools=$top/tests/tools
fetched=$top/build/peers
rows=${BATS_FILE_TMPDIR:-.}/rows    # of the table in bsmtp(7)

needs_root() {
	[ "$(id -u)" = 0 ] || skip 'a mail server is started by root'
}

# What it runs as must be able to reach the folders.
make_spool() {
	needs_root
	chmod a+x "$BATS_RUN_TMPDIR"
	rm -rf spool etc mail log postfix
	mkdir -p spool etc mail log
	chown mail:mail mail log
}

# greets PORT: the server there is the one that was just started.
greets() {
	local line=
	{ exec {there}<>"/dev/tcp/127.0.0.1/$1"; } 2>/dev/null || return 1
	read -rt 5 -u "$there" line || :
	exec {there}>&-
	[[ $line == "220 $peer_name"* ]]
}
greets_or_dead() {
	if greets "$1"; then
		greeted=yes
	else
		! kill -0 "$peer_pid" 2>/dev/null
	fi
}

# serve CMD...: runs a server in the background as "CMD... PORT", with another port
# where that one was taken.
serve() {
	local port try greeted=
	for try in {1..20}; do
		port=$((RANDOM % 22000 + 10000))
		peer_name=peer$RANDOM$try.example
		"$@" "$port" >>said 2>&1 3>&- &
		peer_pid=$!
		pids+=("$peer_pid")
		await greets_or_dead "$port"
		if [ -n "$greeted" ]; then
			address=127.0.0.1:$port
			return
		fi
		wait "$peer_pid" || :
	done
	cat said log/* 2>/dev/null
	return 1
}

# stop_peer: the last one started.
stop_peer() {
	kill "$peer_pid"
	wait "$peer_pid" || :
}

# start_postfix as_it_comes|taught [SETTING...]: taught to take BSMTP for EHLO.
start_postfix() {
	make_spool
	mkdir -p postfix
	chown postfix postfix
	(cd spool && mkdir -p pid {active,bounce,corrupt,defer,deferred,flush,hold,incoming,private} \
		{maildrop,public,saved,trace} && chown postfix [!p]* private public &&
		chgrp postdrop maildrop public && chmod 730 maildrop && chmod 710 public)
	echo '/^Subject: forbidden$/ REJECT no such subjects' >etc/header_checks
	# shellcheck disable=SC2016 # $1 is for pcre
	echo '/^BSMTP\s+(\S+)\s*$/ EHLO $1' >etc/taught
	cat >etc/main.cf <<-END
		compatibility_level = 3.6
		queue_directory = $PWD/spool
		data_directory = $PWD/postfix
		maillog_file = $PWD/log/mail
		maillog_file_prefixes = $PWD
		inet_interfaces = 127.0.0.1
		mydestination =
		alias_maps =
		local_header_rewrite_clients =
		in_flow_delay = 0
		virtual_mailbox_domains = example.net
		virtual_mailbox_base = $PWD/mail
		virtual_mailbox_maps = inline:{ b@example.net=b/, c@example.net=c/ }
		virtual_minimum_uid = 1
		virtual_uid_maps = static:$(id -u mail)
		virtual_gid_maps = static:$(id -g mail)
		header_checks = pcre:$PWD/etc/header_checks
		smtpd_relay_restrictions = reject_unauth_destination
		smtpd_recipient_restrictions = check_recipient_access
		 inline:{ {later@example.net = 450 4.2.1 later} }, reject_unlisted_recipient
	END
	peer_title='Postfix, as installed'
	if [ "$1" = taught ]; then
		echo "smtpd_command_filter = pcre:$PWD/etc/taught" >>etc/main.cf
		peer_title='Postfix, taught BSMTP'
	fi
	shift
	[ $# = 0 ] || printf '%s\n' "$@" >>etc/main.cf
	serve run_postfix
}
run_postfix() {
	echo "myhostname = $peer_name" >>etc/main.cf
	cat >etc/master.cf <<-END
		127.0.0.1:$1 inet n - n - - smtpd
		cleanup unix n - n - 0 cleanup
		qmgr unix n - n 300 1 qmgr
		rewrite unix - - n - - trivial-rewrite
		bounce unix - - n - 0 bounce
		defer unix - - n - 0 bounce
		trace unix - - n - 0 bounce
		proxymap unix - - n - - proxymap
		error unix - - n - - error
		retry unix - - n - - error
		smtp unix - - n - - smtp
		virtual unix - n n - - virtual
		anvil unix - - n - 1 anvil
		tlsmgr unix - - n 1000? 1 tlsmgr
		postlog unix-dgram n - n - 1 postlogd
	END
	touch -d '1 minute ago' etc/main.cf     # it waits while that is new
	exec "$(postconf -dh daemon_directory)/master" -s -c "$PWD/etc"
}

# The others cannot be installed beside Postfix: they are unpacked (fetch-peers), are
# found at /mnt, and see a system where the users that they run as exist.
unpacked() {
	needs_root
	unshare -m true || skip 'no mount namespace to be had'
	"$tools/fetch-peers" "$1"
}

# in_namespace CMD...: with what is below the folder root in place of the system's.
in_namespace() {
	# shellcheck disable=SC2016 # expanded inside
	exec unshare -m sh -ec 'mount --bind "$0" /mnt
		for f in etc/passwd etc/group var/lib var/spool run usr/libexec; do
			[ ! -e "root/$f" ] || mount --bind "root/$f" "/$f"
		done
		exec "$@"' "$fetched" "$@"
}

# make_root USER...
make_root() {
	local user uid=64900
	make_spool
	rm -rf root
	mkdir -p root/etc root/var/lib
	cp /etc/passwd /etc/group root/etc
	for user in "$@"; do
		uid=$((uid + 1))
		echo "$user:x:$uid:$uid::/nonexistent:/bin/false" >>root/etc/passwd
		echo "$user:x:$uid:" >>root/etc/group
	done
}

# configure_exim: main settings from standard input, those of TLS in $exim_tls.
configure_exim() {
	unpacked exim4-daemon-light
	make_root Debian-exim
	chown mail:mail spool
	mkdir root/var/lib/exim4
	{
		cat
		cat <<-END
			exim_path = /mnt/exim4-daemon-light/usr/sbin/exim4
			spool_directory = $PWD/spool
			log_file_path = $PWD/log/%s
			log_selector = +pipelining
			smtp_accept_queue_per_connection = 0
			exim_user = mail
			exim_group = mail
			deliver_drop_privilege
			keep_environment =
			${exim_tls:-tls_advertise_hosts =}
			qualify_domain = example.net
			acl_smtp_rcpt = rcpt
			acl_smtp_data = data
			begin acl
			hesitate:
			  accept delay = 1s
			rcpt:
			  defer recipients = later@example.net
			  message = 450 4.2.1 later
			  deny !domains = example.net
			  accept verify = recipient
			  deny message = 550 5.1.1 no such user
			data:
			  deny condition = \${if eq{\$h_subject:}{forbidden}}
			  message = 554 5.7.1 no such subjects
			  accept
		END
	} >root/var/lib/exim4/config
}

# start_exim: a server; main settings from standard input.
start_exim() {
	configure_exim
	cat >>root/var/lib/exim4/config <<-END
		begin routers
		box:
		  driver = accept
		  domains = example.net
		  local_parts = b : c
		  transport = box
		begin transports
		box:
		  driver = appendfile
		  maildir_format
		  directory = $PWD/mail/\$local_part_data
		  create_directory
		  delivery_date_add
		  envelope_to_add
		  return_path_add
	END
	serve run_exim
	peer_title=Exim
}
run_exim() {
	{ echo "primary_hostname = $peer_name" && cat root/var/lib/exim4/config; } \
		>root/var/lib/exim4/config.autogenerated
	in_namespace "/mnt/exim4-daemon-light/usr/sbin/exim4" -bdf -oX "127.0.0.1:$1"
}

start_opensmtpd() {
	unpacked opensmtpd
	make_root opensmtpd opensmtpq
	mkdir -p root/run root/usr root/var/spool/smtpd root/var/lib/opensmtpd/empty
	chmod 711 root/var/spool/smtpd
	ln -s "$fetched/opensmtpd/usr/libexec" root/usr
	serve run_opensmtpd
	peer_title=OpenSMTPD
}
run_opensmtpd() {
	cat >etc/smtpd.conf <<-END
		table users { "b@example.net" = "mail", "c@example.net" = "mail" }
		listen on 127.0.0.1 port $1 hostname $peer_name
		action "box" maildir "$PWD/mail/%{dest.user}" virtual <users>
		match from any for domain "example.net" action "box"
	END
	in_namespace "/mnt/opensmtpd/usr/sbin/smtpd" -d -f "$PWD/etc/smtpd.conf"
}

# start_smtp_sink [OPTION...]: it dumps each message to a file in mail.
start_smtp_sink() {
	rm -rf mail
	mkdir -p mail log
	[ "$(id -u)" != 0 ] || { chown nobody mail && chmod a+x "$BATS_RUN_TMPDIR"; }
	serve run_smtp_sink "$@"
	peer_title=smtp-sink
}
run_smtp_sink() {
	local options=("${@:1:$#-1}")
	[ "$(id -u)" != 0 ] || options+=(-u nobody)
	exec smtp-sink "${options[@]}" -h "$peer_name" -d "$PWD/mail/" "127.0.0.1:${*: -1}" 100
}

# start_aiosmtpd yes|no: was it taught BSMTP?
start_aiosmtpd() {
	rm -rf mail port
	mkdir mail
	/usr/bin/python3 "$tools/aiosmtpd_peer.py" "$1" mail >port 3>&- &
	peer_pid=$!
	pids+=($!)
	await test -s port
	address=127.0.0.1:$(cat port)
	peer_title='aiosmtpd, as it comes'
	[ "$1" = no ] || peer_title='aiosmtpd, taught BSMTP'
}

# start_nodemailer yes|no [SECONDS]: was it taught BSMTP?  It greets so much later.
start_nodemailer() {
	command -v npm >/dev/null || skip 'no npm'
	"$tools/fetch-peers" nodemailer
	rm -rf mail port
	mkdir mail
	NODE_PATH=$fetched/nodemailer/node_modules node "$top/tests/peers/nodemailer/server.js" \
		"$1" mail "${2:-0}" >port 3>&- &
	peer_pid=$!
	pids+=($!)
	await test -s port
	address=127.0.0.1:$(cat port)
	peer_title='nodemailer, as it comes'
	[ "$1" = no ] || peer_title='nodemailer, taught BSMTP'
}

# start_pipeconnect: stands before the listener at $address, and takes that place.
start_pipeconnect() {
	rm -f port
	/usr/bin/python3 "$tools/pipeconnect.py" "$address" >port 3>&- &
	pids+=($!)
	await test -s port
	address=127.0.0.1:$(cat port)
}

# exim_client [SETTING...]: an Exim that relays to $address what exim_send is given, with
# further settings of its transport.
exim_client() {
	configure_exim </dev/null
	cat >>root/var/lib/exim4/config <<-END
		begin routers
		relay:
		  driver = manualroute
		  route_list = * 127.0.0.1::${address##*:}
		  self = send
		  transport = relay
		begin transports
		relay:
		  driver = smtp
		  hosts_pipe_connect = *
		  allow_localhost
	END
	[ $# = 0 ] || printf '%s\n' "$@" >>root/var/lib/exim4/config
	mv root/var/lib/exim4/config root/var/lib/exim4/config.autogenerated
}
# exim_send OPTION... <MESSAGE
exim_send() { (in_namespace /mnt/exim4-daemon-light/usr/sbin/exim4 -odf -oi "$@"); }

# Nothing is left in a queue to be delivered.
queue_empty() {
	local dirs=() dir
	for dir in spool/{incoming,active,deferred,maildrop,input} root/var/spool/smtpd/{queue,incoming}; do
		[ ! -d "$dir" ] || dirs+=("$dir")
	done
	[ ${#dirs[@]} = 0 ] || [ -z "$(find "${dirs[@]}" -type f 2>/dev/null)" ]
}

# check MBOX: what send --json said, in sent.json, is what the peer delivered.
check() {
	await queue_empty
	/usr/bin/python3 "$tools/mail.py" check sent.json "$1" mail || {
		cat log/* 2>/dev/null
		return 1
	}
}

# --- Rows of the table in bsmtp(7): tests/peers/table makes it of them.

# manner OPTION...: of send, in words.
manner() {
	local mode=bsmtp rest=
	while [ $# -gt 0 ]; do
		case $1 in
		--mode) mode=$2; shift ;;
		--peers) shift ;;
		--*) rest+=", ${1#--}" ;;
		*) rest+=" $1" ;;
		esac
		shift
	done
	echo "$mode$rest"
}

# openings: what each connection got for its opening, by the trace on standard input:
# the reply behind a greeting of 2yz, else the greeting itself.
openings() {
	awk '
		function settle() { if (open) said = said (said ? ", " : "") code }
		$2 == "===" && $3 == "connected" { settle(); open = 1; code = "close"; replies = 0 }
		($2 == "<-" || $2 == "<**") && $3 ~ /^[0-9][0-9][0-9]$/ && code == "close" {
			if (replies++ > 0 || $3 !~ /^2/)
				code = $3
		}
		END { settle(); print said }'
}

# server_row STATUS OPTION...: of what check counted last.
server_row() {
	[ -z "$peer_title" ] || printf 'server\t%s\t%s\t%s\t%s\t%s\n' "$peer_title" "$(manner "${@:2}")" \
		"$(openings <<<"$stderr")" "$(cat sent.json.counts)" "$1" >>"$rows"
}

# client_row CLIENT MANNER SENT STORED IDENTICAL: of the listener.
client_row() { (IFS=$'\t' && echo "client	$*") >>"$rows"; }

delivered_files() { find mail -type f ! -name '*.json' | wc -l; }
