/* unit.c - the engines through bsmtp.h alone.  TAP on standard output. */
#define _GNU_SOURCE 1          /* memmem() */
#include "bsmtp.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int tests, failures;

static void ok(bool good, const char *name, const char *what)
{
	printf("%sok %d - %s%s%s\n", good ? "" : "not ", ++tests, name, *what ? ": " : "", what);
	failures += !good;
}

static struct bsmtp_slice s_of(const char *text)
{
	return (struct bsmtp_slice){ text, strlen(text) };
}

/* ---- grammar: tables of what is and what is not ---- */

static const struct { const char *text; bool good; } domains[] = {
	{ "example.org", true }, { "a", true }, { "a-b.c", true }, { "[127.0.0.1]", true },
	{ "[IPv6:::1]", true }, { "[IPv6:1:2:3:4:5:6:7:8]", true }, { "[IPv6:1::1.2.3.4]", true },
	{ "[x-tag:abc]", true }, { "", false }, { ".a", false }, { "a.", false }, { "-a", false },
	{ "a-", false }, { "a..b", false }, { "a_b", false }, { "[1.2.3]", false },
	{ "[256.1.1.1]", false }, { "[IPv6:1:2]", false }, { "[IPv6:1::2::3]", false },
	{ "[]", false }, { "a b", false },
}, mailboxes[] = {
	{ "a@b", true }, { "a.b+c@d.e", true }, { "\"a b\"@c", true }, { "\"a\\\"b\"@c", true },
	{ "a@[127.0.0.1]", true }, { "a", false }, { "@b", false }, { "a@", false },
	{ ".a@b", false }, { "a.@b", false }, { "a..b@c", false }, { "\"a@b", false },
	{ "a b@c", false }, { "a@b@c", false }, { "\xC3\xA9@b", false },
}, paths[] = {
	{ "<a@b>", true }, { "<>", true }, { "<@x,@y:a@b>", true }, { "<\">\"@b>", true },
	{ "a@b", false }, { "<a@b", false }, { "<a>", false }, { "<@x:>", false }, { "<<a@b>", false },
}, from_lines[] = {
	{ "From a@b Mon Nov 23 12:00:00 2026\n", true }, { "From a Mon Nov  3 12:00 2026\r\n", true },
	{ "From a b Mon Nov 23 12:00:00 2026 +0100\n", true },
	{ "From a@b Mon Nov 23 12:00:00 CEST 2026\n", true }, { "From me to you\n", false },
	{ "From a@b Nov 23 12:00:00 2026\n", false }, { "from a@b Mon Nov 23 12:00:00 2026\n", false },
}, replies[] = {
	{ "250 ok\r\n", true }, { "250-ok\r\n", true }, { "250\r\n", true }, { "554 5.1.1 no\r\n", true },
	{ "250 ok\n", false }, { "25 ok\r\n", false }, { "999 x\r\n", false }, { "HTTP/1.1\r\n", false },
	{ "250 a\rb\r\n", false }, { "250x\r\n", false },
};

static void grammar(void)
{
	struct bsmtp_slice out;
	struct bsmtp_reply_line line;

	for (size_t i = 0; i < sizeof domains / sizeof *domains; i++)
		ok(bsmtp_domain_valid(s_of(domains[i].text), false) == domains[i].good, "domain", domains[i].text);
	for (size_t i = 0; i < sizeof mailboxes / sizeof *mailboxes; i++)
		ok(bsmtp_mailbox_valid(s_of(mailboxes[i].text), false) == mailboxes[i].good, "mailbox", mailboxes[i].text);
	for (size_t i = 0; i < sizeof paths / sizeof *paths; i++)
		ok((bsmtp_path_parse(&out, paths[i].text, strlen(paths[i].text), BSMTP_PATH_NULL) > 0) ==
		    paths[i].good, "path", paths[i].text);
	ok(bsmtp_path_parse(&out, "<@x:a@b>", 8, 0) == 8 && out.len == 3, "a source route is dropped", "");
	for (size_t i = 0; i < sizeof from_lines / sizeof *from_lines; i++)
		ok((bsmtp_from_line_parse(&out, from_lines[i].text, strlen(from_lines[i].text)) > 0) ==
		    from_lines[i].good, "From_ line", "");
	for (size_t i = 0; i < sizeof replies / sizeof *replies; i++)
		ok((bsmtp_reply_line_parse(&line, replies[i].text, strlen(replies[i].text)) > 0) ==
		    replies[i].good, "reply line", "");
	ok(bsmtp_mailbox_valid(s_of("\xC3\xA9@\xC3\xA9.x"), true), "SMTPUTF8 mailbox", "");
}

static void addresses(void)
{
	struct bsmtp_slice list = s_of(" \"A, B\" <a@b>, c@d (x, (y)), G: e@f,\r\n g@h;, <@r:i@j>");
	char out[BSMTP_MAILBOX_MAX], all[200] = "";
	size_t len;
	int n;

	while ((n = bsmtp_address_next(&list, out, &len)) == 1) {
		strncat(all, out, len);
		strcat(all, " ");
	}
	ok(n == 0 && strcmp(all, "a@b c@d e@f g@h i@j ") == 0, "address list", all);
}

/* ---- split invariance: fed whole, octet by octet, at each two-way split ---- */

struct log { char text[65536]; size_t len; };

static void add(struct log *l, const char *at, size_t len)
{
	if (len > sizeof l->text - l->len)
		abort();
	if (len > 0)
		memcpy(l->text + l->len, at, len);
	l->len += len;
}

static void add_word(struct log *l, const char *word) { add(l, word, strlen(word)); }

/* Feeds in[0..len) in pieces ending at `cut`, or of one octet when cut is 0. */
typedef void run_fn(const char *in, size_t len, size_t cut, struct log *l);

static size_t piece_end(size_t at, size_t len, size_t cut)
{
	return cut == 0 ? at + 1 : at < cut ? cut : len;
}

static void run_decode(const char *in, size_t len, size_t cut, struct log *l)
{
	struct bsmtp_decoder d = { 0 };
	size_t at = 0;

	while (at < len && !d.ended) {
		size_t end = piece_end(at, len, cut);
		while (at < end && !d.ended) {
			struct bsmtp_slice text;
			at += bsmtp_decode(&d, in + at, end - at, &text);
			add(l, text.at, text.len);
		}
	}
	add_word(l, d.ended ? "|ended" : "|open");
	char left[32];
	snprintf(left, sizeof left, " %zu", len - at);
	add_word(l, left);
}

static void run_encode(const char *in, size_t len, size_t cut, struct log *l)
{
	struct bsmtp_encoder e = { .dots = true };
	char out[8];
	size_t at = 0, made;

	while (at < len) {
		size_t end = piece_end(at, len, cut);
		while (at < end) {
			at += bsmtp_encode(&e, out, sizeof out, &made, in + at, end - at);
			add(l, out, made);
		}
	}
	add(l, out, bsmtp_encode_end(&e, out));
}

static void run_newlines(const char *in, size_t len, size_t cut, struct log *l)
{
	struct bsmtp_newlines n = { .normalize = true };
	struct bsmtp_slice text;
	size_t at = 0;

	while (at < len) {
		size_t end = piece_end(at, len, cut);
		while (at < end) {
			at += bsmtp_newlines(&n, in + at, end - at, &text);
			add(l, text.at, text.len);
		}
	}
	bsmtp_newlines_end(&n, &text);
	add(l, text.at, text.len);
	char at_text[40];
	snprintf(at_text, sizeof at_text, "|%d %llu", n.bad, (unsigned long long)n.bad_at);
	add_word(l, at_text);
}

static void run_mbox(const char *in, size_t len, size_t cut, struct log *l)
{
	struct bsmtp_mbox m = { 0 };
	size_t at = 0, end = 0;

	for (;;) {
		struct bsmtp_slice out;
		size_t used;
		enum bsmtp_mbox_event e = bsmtp_mbox_next(&m, in + at, end - at, end == len, &used, &out);
		at += used;
		if (e == BSMTP_MBOX_NEED)
			end = piece_end(end, len, cut);
		else if (e == BSMTP_MBOX_TEXT)
			add(l, out.at, out.len);
		else
			add_word(l, e == BSMTP_MBOX_BEGIN ? "{" : e == BSMTP_MBOX_END ? "}" : "!");
		if (e == BSMTP_MBOX_BEGIN)
			add(l, out.at, out.len);
		if (e == BSMTP_MBOX_DONE || e == BSMTP_MBOX_BAD)
			return;
	}
}

static void run_server(const char *in, size_t len, size_t cut, struct log *l)
{
	static struct bsmtp_server s;
	struct bsmtp_server_config config = { .hostname = "h", .max_size = 100, .max_recipients = 2,
		.keywords = BSMTP_KEYS_ALL };
	struct bsmtp_held held[64];
	struct bsmtp_server_event e;
	char out[8192];
	size_t at = 0;
	bool closed;

	bsmtp_server_init(&s, &config, true, held, 64);
	do {
		size_t end = piece_end(at, len, cut);
		do {
			at += bsmtp_server_in(&s, in + at, end > at ? end - at : 0, &e);
			switch (e.type) {
			case BSMTP_SERVER_TEXT: add(l, e.text.at, e.text.len); break;
			case BSMTP_SERVER_MAIL: add_word(l, "\nM"); add(l, e.text.at, e.text.len); break;
			case BSMTP_SERVER_RCPT: add_word(l, "\nR"); add(l, e.text.at, e.text.len); add_word(l, "\n"); break;
			case BSMTP_SERVER_ABORT: add_word(l, "\nA"); break;
			case BSMTP_SERVER_MESSAGE:
				add_word(l, "\n.");
				bsmtp_server_settle(&s, e.ticket, BSMTP_ANSWER_STORED);
				break;
			default: break;
			}
		} while (e.type != BSMTP_SERVER_MORE && e.type != BSMTP_SERVER_END);
	} while (at < len);
	add(l, out, bsmtp_server_out(&s, out, sizeof out, &closed));
}

static const char *const octets[] = {
	"line\r\n..dot\r\n.\r\nMAIL", "\r\n.\r\n", ".\r\n", ".x\r\n.\r\r\n.\n.\r\n.\r\n", "a\rb\nc\r\n\r\r\n\n\r",
	"From a@b Mon Nov 23 12:00:00 2026\nS: x\n\nText\nFrom me\n>From q\n>>From r\n>x\n\n\n"
	"From c@d Mon Nov 23 12:00:00 2026\r\nT: y\r\n\r\nz\r\n\r\n",
	"From a@b Mon Nov 23 12:00:00 2026\n\nFrom c@d Mon Nov 23 12:00:00 2026\n",
	"BSMTP c\r\nMAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\nRCPT TO:<x>\r\nDATA\r\nhi\r\n..\r\n.\r\n"
	"MAIL FROM:<>\r\nRCPT TO:<c@d>\r\nBDAT 3\r\nx\r\nBDAT 4 LAST\r\ny\nz\nRSET\r\nMAIL FROM:<a@b>\r\n"
	"DATA\r\nMAIL FROM:<evil@b>\r\n.\r\nBDAT 6 LAST\r\nQUIT\r\nNOOP\nFOO\r\nQUIT\r\nNOOP\r\n",
	"EHLO [127.0.0.1]\r\nMAIL FROM:<a@b> SIZE=3 BODY=8BITMIME\r\nRCPT TO:<c@d>\r\nDATA\r\n"
	"0123456789012345678901234567890123456789012345678901234567890123456789012345678901234567890123456789x\r\n"
	".\r\nPOST / HTTP/1.1\r\nMAIL FROM:<a@b>\r\n",
};

static void split_invariance(run_fn *run, const char *name)
{
	static struct log whole, split;

	for (size_t i = 0; i < sizeof octets / sizeof *octets; i++) {
		size_t len = strlen(octets[i]), bad = len + 1;
		whole.len = 0;
		run(octets[i], len, len, &whole);
		for (size_t cut = 0; cut < len && bad > len; cut++) {
			split.len = 0;
			run(octets[i], len, cut, &split);
			if (split.len != whole.len || memcmp(split.text, whole.text, whole.len) != 0)
				bad = cut;
		}
		ok(bad > len, name, "the same however it is split");
	}
}

/* ---- only CRLF.CRLF ends a body ---- */

static void end_of_data(void)
{
	static const char *const before[] = { "\n", "\r", "\r\r", "\n\r", "\r\n ", "\r\n\b", "\v", "\f", "\x85" };
	static const char *const after[] = { "\r\n", "\n", "\r", "\r\r\n", "\n\r", " \r\n", "\t\r\n", "\v", "\x85" };
	bool good = true;

	for (size_t b = 0; b < sizeof before / sizeof *before; b++)
		for (size_t a = 0; a < sizeof after / sizeof *after; a++) {
			static struct log l;
			char in[40];
			l.len = 0;
			snprintf(in, sizeof in, "x%s.%sy", before[b], after[a]);
			run_decode(in, strlen(in), strlen(in), &l);
			good = good && memmem(l.text, l.len, "|open", 5) != NULL;
		}
	for (size_t a = 1; a < sizeof after / sizeof *after; a++) {
		static struct log l;
		char in[40];
		l.len = 0;
		snprintf(in, sizeof in, "x\r\n.%sy", after[a]);
		run_decode(in, strlen(in), strlen(in), &l);
		good = good && memmem(l.text, l.len, "|open", 5) != NULL;
	}
	ok(good, "only CRLF.CRLF ends a body", "");
}

/* ---- both engines, joined by pipes of k octets ---- */

enum { MESSAGES = 5 };

static void join(enum bsmtp_mode mode, enum bsmtp_framing framing, size_t k, bool silent)
{
	static struct bsmtp_client c;
	static struct bsmtp_server s;
	static char out[BSMTP_CLIENT_OUT_MIN];
	unsigned char due[BSMTP_CLIENT_DUE_MIN];
	struct bsmtp_held held[BSMTP_SERVER_HELD_MIN];
	struct bsmtp_fault faults[3];
	struct bsmtp_slice time;
	static const char body[] = "Subject: x\n\n.dot\nMAIL FROM:<evil@x>\nend";
	static const char want[] = "Subject: x\r\n\r\n.dot\r\nMAIL FROM:<evil@x>\r\nend\r\n";
	struct bsmtp_client_config cc = { .mode = mode, .framing = framing, .helo = "c" };
	struct bsmtp_server_config sc = { .hostname = "h", .max_size = 1000, .max_recipients = 9,
		.keywords = BSMTP_KEYS_ALL, .faults = faults, .fault_count = 3,
		.opening = silent ? BSMTP_OPENING_SILENT : BSMTP_OPENING_ACCEPT };
	enum bsmtp_fate fates[MESSAGES] = { BSMTP_UNSENT };
	char replies_buf[BSMTP_SERVER_OUT_MIN], name[80];
	size_t replies_len = 0, replies_at = 0, body_at = 0, sent = 0, settled = 0, stored = 0, rcpt = 0;
	struct log *text = calloc(1, sizeof *text);
	bool good = true, closed = false;

	bsmtp_fault_parse(&faults[0], s_of("MAIL no@x=550 5.7.1 no"), &time);
	bsmtp_fault_parse(&faults[1], s_of("RCPT later@x=450 4.2.0 later"), &time);
	bsmtp_fault_parse(&faults[2], s_of("BODY#2=554 5.6.0 no"), &time);
	bsmtp_client_init(&c, &cc, out, sizeof out, due, sizeof due);
	bsmtp_server_init(&s, &sc, true, held, BSMTP_SERVER_HELD_MIN);
	for (int round = 0; round < 200000 && bsmtp_client_want(&c) != BSMTP_WANT_NOTHING; round++) {
		struct bsmtp_client_event ce = { .type = BSMTP_CLIENT_NONE };
		struct bsmtp_server_event se;
		const char *at;
		size_t len;
		switch (bsmtp_client_want(&c)) {
		case BSMTP_WANT_MAIL:
			rcpt = body_at = 0;
			if (sent == MESSAGES)
				bsmtp_client_quit(&c);
			else
				bsmtp_client_mail(&c, s_of(sent == 1 ? "no@x" : "a@x"), false, 0);
			sent += sent < MESSAGES;
			break;
		case BSMTP_WANT_RCPT:
			if (rcpt++ == 0)
				bsmtp_client_rcpt(&c, s_of(sent == 3 ? "later@x" : "b@x"));
			else
				bsmtp_client_data(&c);
			break;
		case BSMTP_WANT_BODY:
			body_at += bsmtp_client_body(&c, body + body_at, strlen(body) - body_at);
			if (body_at == strlen(body) && bsmtp_client_want(&c) == BSMTP_WANT_BODY)
				bsmtp_client_body_end(&c);
			break;
		case BSMTP_WANT_SKIP:
			bsmtp_client_skipped(&c, &ce);
			break;
		case BSMTP_WANT_GRACE:
			if (silent)
				bsmtp_client_grace_over(&c);
			break;
		default:
			break;
		}
		if (ce.type == BSMTP_CLIENT_MESSAGE && settled < MESSAGES)
			fates[settled++] = ce.fate;
		at = bsmtp_client_out(&c, &len);
		len = len < k ? len : k;
		len = bsmtp_server_in(&s, at, len, &se);
		bsmtp_client_sent(&c, len);
		if (se.type == BSMTP_SERVER_TEXT)
			add(text, se.text.at, se.text.len);
		if (se.type == BSMTP_SERVER_ABORT)
			text->len = 0;
		if (se.type == BSMTP_SERVER_MESSAGE) {
			good = good && text->len == strlen(want) && memcmp(text->text, want, text->len) == 0;
			text->len = 0;
			stored++;
			bsmtp_server_settle(&s, se.ticket, BSMTP_ANSWER_STORED);
		}
		if (replies_at == replies_len) {
			replies_at = 0;
			replies_len = bsmtp_server_out(&s, replies_buf, sizeof replies_buf, &closed);
		}
		len = replies_len - replies_at < k ? replies_len - replies_at : k;
		replies_at += bsmtp_client_in(&c, replies_buf + replies_at, len, &ce);
		if (ce.type == BSMTP_CLIENT_MESSAGE && settled < MESSAGES)
			fates[settled++] = ce.fate;
	}
	free(text);
	/* The second body that comes whole and unrefused is the fourth message. */
	good = good && settled == MESSAGES && stored == 2 && fates[0] == BSMTP_DELIVERED &&
	    fates[1] == BSMTP_REJECTED && fates[2] == BSMTP_DEFERRED && fates[3] == BSMTP_REJECTED &&
	    fates[4] == BSMTP_DELIVERED;
	if (!good)
		printf("# settled %zu stored %zu fates %d %d %d %d %d\n", settled, stored, fates[0],
		    fates[1], fates[2], fates[3], fates[4]);
	snprintf(name, sizeof name, "%s %s k=%zu%s", bsmtp_mode_name(mode), bsmtp_framing_name(framing), k,
	    silent ? " silent" : "");
	ok(good, "joined engines", name);
}

int main(void)
{
	grammar();
	addresses();
	split_invariance(run_decode, "decoder");
	split_invariance(run_encode, "encoder");
	split_invariance(run_newlines, "newlines");
	split_invariance(run_mbox, "mbox");
	split_invariance(run_server, "server engine");
	end_of_data();
	for (int mode = 0; mode < BSMTP_MODES; mode++)
		for (int framing = 0; framing < BSMTP_FRAMINGS; framing++)
			for (size_t k = 1; k <= 64; k++)
				join((enum bsmtp_mode)mode, (enum bsmtp_framing)framing, k, false);
	for (size_t k = 1; k <= 64; k++)
		join(BSMTP_MODE_BSMTP, BSMTP_FRAMING_AUTO, k, true);
	printf("1..%d\n", tests);
	return failures > 0;
}
