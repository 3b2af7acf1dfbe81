/* mbox: both variants, cut anywhere; it ends, holds back little, invents nothing,
 * and gives back a text that was quoted. */
#include "fuzz.h"

enum { MBOXO = 1 };

static void split(const struct input *input, enum cutting cutting, struct log *l)
{
	struct bsmtp_mbox m = { .mboxo = (input->flags & MBOXO) != 0 };
	enum bsmtp_mbox_event e;
	size_t at = 0, end = 0, count = 0, given = 0, steps = 0;
	bool open = false;

	do {
		struct bsmtp_slice out;
		size_t used;
		char *window = exact(input->in + at, end - at);
		bool last = end == input->len;
		e = bsmtp_mbox_next(&m, window, end - at, last, &used, &out);
		CHECK(used <= end - at && ++steps < 4 * input->len + 10);
		at += used;
		switch (e) {
		case BSMTP_MBOX_NEED:
			CHECK(!last && end - at <= BSMTP_FROM_LINE_MAX);
			end = piece_end(input, cutting, end, &count);
			break;
		case BSMTP_MBOX_BEGIN:
			CHECK(!open);
			open = true;
			addf(l, "{");
			add(l, out.at, out.len);
			addf(l, ":");
			break;
		case BSMTP_MBOX_TEXT:
			CHECK(open && out.len > 0);
			given += out.len;
			add(l, out.at, out.len);
			break;
		case BSMTP_MBOX_END:
			CHECK(open);
			open = false;
			addf(l, "}");
			break;
		case BSMTP_MBOX_DONE:
		case BSMTP_MBOX_BAD:
			CHECK(!open && (e == BSMTP_MBOX_BAD || at == input->len));
			addf(l, e == BSMTP_MBOX_BAD ? "!" : ".");
			break;
		}
		free(window);
	} while (e != BSMTP_MBOX_DONE && e != BSMTP_MBOX_BAD);
	CHECK(given <= input->len);
}

/* A text of LF lines, quoted behind a From_ line and with a blank line behind. */
static void round_trip(const struct input *input)
{
	static const char from[] = "From a Mon Nov 23 12:00:00 2026\n";
	static struct log file, back, want;
	struct bsmtp_quoter q = { 0 };
	struct bsmtp_slice text;
	size_t quotes = 0, at = 0;
	struct input quoted = *input;

	/* Where quotes are too many the line is left alone: that is the bound. */
	for (size_t i = 0; i < input->len; i++) {
		quotes = input->in[i] == '>' ? quotes + 1 : 0;
		if (quotes > BSMTP_FROM_LINE_MAX - 10)
			return;
	}
	file.len = back.len = want.len = 0;
	add(&file, from, sizeof from - 1);
	addf(&want, "{a:");
	while (at < input->len) {
		at += bsmtp_quote(&q, input->in + at, input->len - at, &text);
		add(&file, text.at, text.len);
	}
	bsmtp_quote_end(&q, &text);
	add(&file, text.at, text.len);
	add(&want, input->in, input->len);
	if (input->len > 0 && input->in[input->len - 1] != '\n') {
		add(&file, "\n", 1);
		add(&want, "\n", 1);
	}
	add(&file, "\n", 1);
	addf(&want, "}.");
	quoted.in = file.text;
	quoted.len = file.len;
	quoted.flags = 0;
	split(&quoted, CUT, &back);
	CHECK(same_log(&want, &back));
}

int LLVMFuzzerTestOneInput(const unsigned char *data, size_t len)
{
	struct input input;

	if (!input_of(&input, data, len))
		return 0;
	same_however_cut(split, &input);
	round_trip(&input);
	return 0;
}
