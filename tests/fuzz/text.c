/* Grammar, header, mbox and codecs: bounds, and what is encoded decodes. */
#include "bsmtp.h"
#include <stdlib.h>
#include <string.h>

static void grammar(const char *in, size_t len)
{
	struct bsmtp_reply_line line;
	struct bsmtp_slice s = { in, len };
	struct bsmtp_parameter parameter;
	struct bsmtp_field field;
	struct bsmtp_fault fault;
	char address[BSMTP_MAILBOX_MAX];
	size_t n;

	if (bsmtp_reply_line_parse(&line, in, len) > (ptrdiff_t)len ||
	    bsmtp_path_parse(&s, in, len, 7) > (ptrdiff_t)len ||
	    bsmtp_parameter_parse(&parameter, in, len) > (ptrdiff_t)len ||
	    bsmtp_field_parse(&field, in, len, true) > (ptrdiff_t)len ||
	    bsmtp_from_line_parse(&s, in, len) > (ptrdiff_t)len)
		abort();
	s = (struct bsmtp_slice){ in, len };
	while (bsmtp_address_next(&s, address, &n) == 1)
		if (n > sizeof address)
			abort();
	(void)bsmtp_fault_parse(&fault, (struct bsmtp_slice){ in, len }, &s);
}

static void mbox(const char *in, size_t len)
{
	struct bsmtp_mbox m = { 0 };
	struct bsmtp_slice out;
	size_t at = 0, used, given = 0;

	for (;;) {
		enum bsmtp_mbox_event e = bsmtp_mbox_next(&m, in + at, len - at, true, &used, &out);
		at += used;
		if (at > len)
			abort();
		if (e == BSMTP_MBOX_TEXT && (given += out.len) > len)
			abort();
		if (e == BSMTP_MBOX_DONE || e == BSMTP_MBOX_BAD)
			return;
	}
}

static void codecs(const char *in, size_t len)
{
	static char wire[20000], back[20000];
	struct bsmtp_encoder e = { .dots = true }, plain = { .dots = false };
	struct bsmtp_decoder d = { 0 };
	struct bsmtp_newlines n = { 0 };
	struct bsmtp_slice text;
	size_t made = 0, at = 0, got = 0, used;

	used = bsmtp_encode(&e, wire, sizeof wire - 10, &made, in, len);
	made += bsmtp_encode_end(&e, wire + made);
	memcpy(wire + made, ".\r\n", 3);
	made += 3;
	while (!d.ended && at < made) {
		at += bsmtp_decode(&d, wire + at, made - at, &text);
		memcpy(back + got, text.at, text.len);
		got += text.len;
	}
	if (used != len || !d.ended || at != made)
		abort();
	bsmtp_encode(&plain, wire, sizeof wire - 10, &made, in, len);
	made += bsmtp_encode_end(&plain, wire + made);
	if (made != got || memcmp(wire, back, got) != 0)
		abort();
	for (at = 0; at < got;)
		at += bsmtp_newlines(&n, back + at, got - at, &text);
	bsmtp_newlines_end(&n, &text);
	if (n.bad)
		abort();
}

int LLVMFuzzerTestOneInput(const unsigned char *data, size_t len);
int LLVMFuzzerTestOneInput(const unsigned char *data, size_t len)
{
	if (len == 0 || len > 5000)
		return 0;
	grammar((const char *)data, len);
	mbox((const char *)data, len);
	codecs((const char *)data, len);
	return 0;
}
