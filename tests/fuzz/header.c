/* A header, field by field, and address lists. */
#include "fuzz.h"

static ptrdiff_t field_of(struct bsmtp_field *f, const char *in, size_t len, bool last)
{
	char *copy = exact(in, len);
	ptrdiff_t n = bsmtp_field_parse(f, copy, len, last);

	CHECK(n >= BSMTP_BAD && n <= (ptrdiff_t)len && (n != BSMTP_MORE || !last));
	if (n > 0) {
		CHECK(f->name.len > 0 && f->name.at == copy && f->name.len < (size_t)n);
		CHECK(within(f->body, copy, (size_t)n) && f->body.at + f->body.len == copy + n && f->body.at[-1] == ':');
		CHECK(memchr(f->name.at, ' ', f->name.len) == NULL && memchr(f->name.at, '\n', f->name.len) == NULL);
		CHECK(last || f->body.at[f->body.len - 1] == '\n');
		/* valid as long as what it borrows from, that is, of the original */
		f->name.at = in;
		f->body.at = in + (f->body.at - copy);
	}
	free(copy);
	return n;
}

static void addresses(struct bsmtp_slice list)
{
	char out[BSMTP_MAILBOX_MAX];
	size_t len, left = list.len + 1;
	int n;

	while ((n = bsmtp_address_next(&list, out, &len)) == 1) {
		CHECK(len > 0 && len <= sizeof out && list.len < left);
		CHECK(len <= left - list.len);  /* no longer than what it was read from */
		left = list.len;
	}
	CHECK(n == 0 || n == -1);
	CHECK(n == -1 || list.len == 0);
}

int LLVMFuzzerTestOneInput(const unsigned char *data, size_t len)
{
	const char *in = (const char *)data;
	char *copy = exact(in, len);

	addresses(slice(copy, len));
	free(copy);
	while (len > 0) {
		struct bsmtp_field field, again;
		ptrdiff_t n = field_of(&field, in, len, true), before = BSMTP_MORE;
		for (size_t k = 0; k <= len; k += k < 60 || k + 60 > len ? 1 : 37) {
			ptrdiff_t now = field_of(&again, in, k, false);
			CHECK(before == BSMTP_MORE || now == before);
			CHECK(now <= 0 || now == n);
			CHECK(now != BSMTP_BAD || n == BSMTP_BAD);
			before = now;
		}
		if (n <= 0)
			break;
		copy = exact(field.body.at, field.body.len);
		addresses(slice(copy, field.body.len));
		free(copy);
		in += n;
		len -= (size_t)n;
	}
	return 0;
}
