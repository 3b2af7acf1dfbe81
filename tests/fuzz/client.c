/* The client engine: any replies, cut anywhere, give the same fates; and none
 * is delivered without a 2yz of its own. */
#include "bsmtp.h"
#include <stdlib.h>
#include <string.h>

struct result { enum bsmtp_fate fates[8]; size_t count; };

static void take(const struct bsmtp_client_event *e, struct result *r)
{
	if (e->type != BSMTP_CLIENT_MESSAGE)
		return;
	if (r->count == 8 || (e->fate == BSMTP_DELIVERED && e->code / 100 != 2))
		abort();
	r->fates[r->count++] = e->fate;
}

static void run(const char *in, size_t len, size_t piece, unsigned mode, struct result *r)
{
	static struct bsmtp_client c;
	static char out[BSMTP_CLIENT_OUT_MIN];
	unsigned char due[64];
	struct bsmtp_client_config config = { .mode = (enum bsmtp_mode)(mode & 3),
		.framing = (enum bsmtp_framing)((mode >> 2) % 3), .no_grace = true, .helo = "c" };
	struct bsmtp_client_event e;
	struct bsmtp_slice box = { "a@b", 3 };
	size_t at = 0, begun = 0, rcpts = 0;

	r->count = 0;
	bsmtp_client_init(&c, &config, out, sizeof out, due, sizeof due);
	for (;;) {
		size_t n, used;
		bool moved = true;
		switch (bsmtp_client_want(&c)) {
		case BSMTP_WANT_MAIL:
			rcpts = 0;
			if (begun++ < 3)
				bsmtp_client_mail(&c, box, false, 0);
			else
				bsmtp_client_quit(&c);
			break;
		case BSMTP_WANT_RCPT:
			if (rcpts++ < 2)
				bsmtp_client_rcpt(&c, box);
			else
				bsmtp_client_data(&c);
			break;
		case BSMTP_WANT_BODY:
			bsmtp_client_body(&c, "x\n", 2);
			if (bsmtp_client_want(&c) == BSMTP_WANT_BODY)
				bsmtp_client_body_end(&c);
			break;
		case BSMTP_WANT_SKIP:
			bsmtp_client_skipped(&c, &e);
			take(&e, r);
			break;
		default:
			moved = false;
		}
		bsmtp_client_out(&c, &n);
		bsmtp_client_sent(&c, n);
		if (moved || n > 0)
			continue;
		if (at == len || bsmtp_client_want(&c) == BSMTP_WANT_NOTHING)
			break;
		used = bsmtp_client_in(&c, in + at, piece < len - at ? piece : len - at, &e);
		if (used == 0 || used > len - at)
			abort();
		at += used;
		take(&e, r);
	}
	bsmtp_client_closed(&c, &e);
	while (bsmtp_client_unsettled(&c, &e))
		take(&e, r);
}

int LLVMFuzzerTestOneInput(const unsigned char *data, size_t len);
int LLVMFuzzerTestOneInput(const unsigned char *data, size_t len)
{
	struct result whole, split;

	if (len < 2 || len > 4000)
		return 0;
	run((const char *)data + 1, len - 1, len, data[0], &whole);
	run((const char *)data + 1, len - 1, 1, data[0], &split);
	if (whole.count != split.count ||
	    memcmp(whole.fates, split.fates, whole.count * sizeof *whole.fates) != 0)
		abort();
	return 0;
}
