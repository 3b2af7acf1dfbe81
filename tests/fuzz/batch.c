/* Batches at rest: cut anywhere, they give the same transactions. */
#include "fuzz.h"

static void read_batch(const struct input *input, enum cutting cutting, struct log *l)
{
	struct bsmtp_batch b = { 0 };
	enum bsmtp_batch_event e;
	size_t at = 0, end = 0, count = 0, steps = 0;
	bool open = false, inside = false;

	do {
		struct bsmtp_slice text, rest;
		size_t used;
		char *window = exact(input->in + at, end - at);
		bool last = end == input->len;
		e = bsmtp_batch_next(&b, window, end - at, last, &used, &text, &rest);
		CHECK(used <= end - at && ++steps < 4 * input->len + 10);
		at += used;
		if (e == BSMTP_BATCH_NEED) {
			CHECK(!last && end - at <= BSMTP_COMMAND_MAX);
			end = piece_end(input, cutting, end, &count);
		} else {
			addf(l, "%s", e == BSMTP_BATCH_TEXT ? "" : "\n");
			if (e != BSMTP_BATCH_TEXT)
				addf(l, "%d %llu ", (int)e, (unsigned long long)b.line);
			if (e != BSMTP_BATCH_END && e != BSMTP_BATCH_DONE && e != BSMTP_BATCH_BODY)
				add(l, text.at, text.len);
			if (e == BSMTP_BATCH_MAIL || e == BSMTP_BATCH_RCPT)
				add(l, rest.at, rest.len);
		}
		CHECK(!inside || e == BSMTP_BATCH_NEED || e == BSMTP_BATCH_TEXT || e == BSMTP_BATCH_END || e == BSMTP_BATCH_BAD);
		CHECK(open || (e != BSMTP_BATCH_RCPT && e != BSMTP_BATCH_BODY));
		CHECK(inside || (e != BSMTP_BATCH_TEXT && e != BSMTP_BATCH_END));
		CHECK(e != BSMTP_BATCH_DONE || (!inside && at == input->len));
		CHECK(e != BSMTP_BATCH_BAD || text.len > 0);
		open = e == BSMTP_BATCH_MAIL || (open && e != BSMTP_BATCH_END);
		inside = e == BSMTP_BATCH_BODY || (inside && e != BSMTP_BATCH_END);
		free(window);
	} while (e != BSMTP_BATCH_DONE && e != BSMTP_BATCH_BAD);
}

int LLVMFuzzerTestOneInput(const unsigned char *data, size_t len)
{
	struct input input;

	if (input_of(&input, data, len))
		same_however_cut(read_batch, &input);
	return 0;
}
