/* The server engine: any octets, cut anywhere, give the same replies. */
#include "bsmtp.h"
#include <stdlib.h>
#include <string.h>

struct result { char replies[1 << 16]; size_t len, stored; };

static void run(const char *in, size_t len, size_t piece, struct result *r)
{
	static struct bsmtp_server s;
	struct bsmtp_server_config config = { .hostname = "h", .max_size = 1000, .max_recipients = 3,
		.keywords = BSMTP_KEYS_ALL };
	struct bsmtp_held held[BSMTP_SERVER_HELD_MIN];
	struct bsmtp_server_event e = { .type = BSMTP_SERVER_MORE };
	size_t at = 0;
	bool closed = false, open = false;

	r->len = r->stored = 0;
	bsmtp_server_init(&s, &config, true, held, BSMTP_SERVER_HELD_MIN);
	while (e.type != BSMTP_SERVER_END && !closed) {
		size_t end = piece < len - at ? at + piece : len;
		at += bsmtp_server_in(&s, in + at, end - at, &e);
		if (at > end)
			abort();
		if (e.type == BSMTP_SERVER_MAIL && open)
			abort();
		if (e.type == BSMTP_SERVER_MAIL)
			open = true;
		if (e.type == BSMTP_SERVER_MESSAGE) {
			if (!open)
				abort();
			r->stored++;
			bsmtp_server_settle(&s, e.ticket, BSMTP_ANSWER_STORED);
		}
		if (e.type == BSMTP_SERVER_MESSAGE || e.type == BSMTP_SERVER_ABORT)
			open = false;
		if (sizeof r->replies - r->len < BSMTP_SERVER_OUT_MIN)
			break;
		r->len += bsmtp_server_out(&s, r->replies + r->len, sizeof r->replies - r->len, &closed);
		if (e.type == BSMTP_SERVER_MORE && at == len)
			break;
	}
}

int LLVMFuzzerTestOneInput(const unsigned char *data, size_t len);
int LLVMFuzzerTestOneInput(const unsigned char *data, size_t len)
{
	static struct result whole, split;

	if (len == 0 || len > 4000)
		return 0;
	run((const char *)data, len, len, &whole);
	run((const char *)data, len, 1, &split);
	if (whole.len != split.len || memcmp(whole.replies, split.replies, whole.len) != 0 ||
	    whole.stored != split.stored)
		abort();
	return 0;
}
