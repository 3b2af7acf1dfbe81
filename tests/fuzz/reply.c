/* Reply lines: what is read lies in the line and says what the line says; what
 * follows does not matter, and no answer is taken back. */
#include "fuzz.h"

static ptrdiff_t parse(struct bsmtp_reply_line *line, const char *in, size_t len)
{
	char *copy = exact(in, len);
	ptrdiff_t n = bsmtp_reply_line_parse(line, copy, len);

	CHECK(n >= BSMTP_BAD && n <= (ptrdiff_t)len && n <= BSMTP_REPLY_LINE_MAX);
	if (n > 0) {
		size_t whole = (size_t)n;
		CHECK(whole >= 5 && memcmp(copy + whole - 2, "\r\n", 2) == 0 && memchr(copy, '\n', whole - 1) == NULL);
		CHECK(memchr(copy, '\0', whole) == NULL && memchr(copy, '\r', whole - 2) == NULL);
		CHECK(line->code >= 100 && line->code <= 599 && line->code / 100 == copy[0] - '0' &&
		    line->code % 100 == (copy[1] - '0') * 10 + copy[2] - '0');
		CHECK(line->more == (copy[3] == '-'));
		CHECK(within(line->text, copy, whole - 2) && within(line->status, copy, whole - 2));
		CHECK(line->status.len == 0 || (line->status.len >= 5 && line->status.len <= 9 &&
		    line->status.at == copy + 4 && *line->status.at == *copy));
	}
	free(copy);
	return n;
}

int LLVMFuzzerTestOneInput(const unsigned char *data, size_t len)
{
	const char *in = (const char *)data;
	struct bsmtp_reply_line line;
	ptrdiff_t whole = parse(&line, in, len), before = BSMTP_MORE;

	for (size_t n = 0; n <= len; n += n < 80 || n + 80 > len ? 1 : 61) {
		ptrdiff_t now = parse(&line, in, n);
		CHECK(before == BSMTP_MORE || now == before);
		CHECK(whole <= 0 || now == ((ptrdiff_t)n < whole ? BSMTP_MORE : whole));
		CHECK(whole != BSMTP_MORE || now == BSMTP_MORE);
		before = now;
	}
	return 0;
}
