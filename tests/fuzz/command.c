/* What commands are made of: domains, mailboxes, paths, parameters, numbers, and
 * the rules of --reply. */
#include "fuzz.h"

static void names(struct bsmtp_slice s)
{
	bool domain = bsmtp_domain_valid(s, false), mailbox = bsmtp_mailbox_valid(s, false);
	char path[BSMTP_MAILBOX_MAX + 2];
	struct bsmtp_slice back;

	CHECK(!domain || (s.len > 0 && s.len <= BSMTP_DOMAIN_MAX && !bsmtp_has_8bit(s)));
	CHECK(!mailbox || (s.len >= 3 && s.len <= BSMTP_MAILBOX_MAX && !bsmtp_has_8bit(s)));
	CHECK(!domain || bsmtp_domain_valid(s, true));
	CHECK(!mailbox || bsmtp_mailbox_valid(s, true));
	domain = bsmtp_domain_valid(s, true);
	mailbox = bsmtp_mailbox_valid(s, true);
	CHECK(!domain || s.len <= BSMTP_DOMAIN_MAX);
	CHECK((!domain && !mailbox) || bsmtp_utf8_valid(s));
	CHECK(!mailbox || s.len <= BSMTP_MAILBOX_MAX);
	for (size_t i = 0; i < s.len; i++)
		CHECK((!domain && !mailbox) || !((s.at[i] >= 0 && s.at[i] < ' ') || s.at[i] == 127));
	if (mailbox) {          /* and any is a path, in brackets */
		path[0] = '<';
		memcpy(path + 1, s.at, s.len);
		path[s.len + 1] = '>';
		CHECK(bsmtp_path_parse(&back, path, s.len + 2, BSMTP_PATH_UTF8) == (ptrdiff_t)s.len + 2);
		CHECK(back.len == s.len && memcmp(back.at, s.at, s.len) == 0);
	}
}

static void path(const char *in, size_t len, unsigned flags)
{
	struct bsmtp_slice box;
	ptrdiff_t n = bsmtp_path_parse(&box, in, len, flags);
	bool utf8 = (flags & BSMTP_PATH_UTF8) != 0, postmaster;

	CHECK(n == BSMTP_BAD || (n >= 2 && n <= (ptrdiff_t)len));
	if (n == BSMTP_BAD)
		return;
	postmaster = (flags & BSMTP_PATH_POSTMASTER) && box.len == 10 && (box.at[0] | 32) == 'p';
	CHECK(in[0] == '<' && in[n - 1] == '>' && within(box, in + 1, (size_t)n - 2));
	CHECK(bsmtp_mailbox_valid(box, utf8) || (box.len == 0 && n == 2 && (flags & BSMTP_PATH_NULL)) ||
	    postmaster || (box.len > 0 && (flags & BSMTP_PATH_LOCAL)));
	CHECK(utf8 ? bsmtp_utf8_valid(box) : !bsmtp_has_8bit(box));
}

static void parameters(const char *in, size_t len)
{
	while (len > 0) {
		struct bsmtp_parameter p;
		ptrdiff_t n = bsmtp_parameter_parse(&p, in, len);
		CHECK(n == BSMTP_BAD || (n >= 2 && n <= (ptrdiff_t)len));
		if (n == BSMTP_BAD)
			break;
		CHECK(in[0] == ' ' && p.keyword.len > 0 && within(p.keyword, in, (size_t)n));
		CHECK(p.value.at == NULL || (p.value.len > 0 && within(p.value, in, (size_t)n) && p.value.at[-1] == '='));
		CHECK((size_t)n == len || in[n] == ' ');
		in += n;
		len -= (size_t)n;
	}
}

static void number(const char *in, size_t len)
{
	uint64_t got = 0;
	ptrdiff_t n = bsmtp_number_parse(&got, in, len);
	char back[24];
	size_t digits = 0, zeros = 0;

	while (digits < len && in[digits] >= '0' && in[digits] <= '9')
		digits++;
	while (zeros + 1 < digits && in[zeros] == '0')
		zeros++;
	CHECK(n == (ptrdiff_t)digits || n == BSMTP_BAD);
	CHECK((n == BSMTP_MORE) == (len == 0));
	if (n <= 0)
		return;
	snprintf(back, sizeof back, "%llu", (unsigned long long)got);
	CHECK(strlen(back) == digits - zeros && memcmp(back, in + zeros, digits - zeros) == 0);
}

static void rule(struct bsmtp_slice spec)
{
	struct bsmtp_fault f;
	struct bsmtp_slice time;
	const char *error = bsmtp_fault_parse(&f, spec, &time);

	if (error != NULL) {
		CHECK(*error != '\0');
		return;
	}
	CHECK(f.verb < BSMTP_VERB_FOREIGN && f.seen == 0 && within(f.glob, spec.at, spec.len));
	CHECK((f.action == BSMTP_FAULT_REPLY) == (f.reply.len > 0) && within(f.reply, spec.at, spec.len));
	CHECK((f.action == BSMTP_FAULT_DELAY) == (time.len > 0) && within(time, spec.at, spec.len));
	for (size_t i = 0; i < f.reply.len; i++)
		CHECK(f.reply.at[i] < 0 || f.reply.at[i] >= ' ');
}

int LLVMFuzzerTestOneInput(const unsigned char *data, size_t len)
{
	char *in;

	if (len == 0)
		return 0;
	in = exact((const char *)data + 1, --len);
	names(slice(in, len));
	path(in, len, data[0] & 15);
	parameters(in, len);
	number(in, len);
	rule(slice(in, len));
	free(in);
	return 0;
}
