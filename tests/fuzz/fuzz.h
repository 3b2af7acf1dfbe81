/* fuzz.h - what the targets share: findings, cuts of the input, logs to compare. */
#ifndef FUZZ_H
#define FUZZ_H

#include "bsmtp.h"
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const unsigned char *data, size_t len);

/* What must be true; where it is not, that is a finding. */
#define CHECK(truth) \
	do { \
		if (!(truth)) { \
			fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #truth); \
			abort(); \
		} \
	} while (0)

static inline struct bsmtp_slice slice(const char *at, size_t len)
{
	return (struct bsmtp_slice){ at, len };
}

/* Whether a slice handed out lies in the octets given; an empty one may be anywhere. */
static inline bool within(struct bsmtp_slice s, const char *in, size_t len)
{
	return s.len == 0 || (s.at >= in && s.len <= len && s.at + s.len <= in + len);
}

/* A copy of exactly its size, so that the sanitizer sees who reads past it or
 * comes back to it. */
static inline char *exact(const char *at, size_t len)
{
	char *copy = malloc(len > 0 ? len : 1);

	CHECK(copy != NULL);
	if (len > 0)
		memcpy(copy, at, len);
	return copy;
}

struct log { char text[1 << 18]; size_t len; };

static inline void add(struct log *l, const char *at, size_t len)
{
	CHECK(len <= sizeof l->text - l->len);
	if (len > 0)
		memcpy(l->text + l->len, at, len);
	l->len += len;
}

#if defined(__GNUC__)
__attribute__((format(printf, 2, 3)))
#endif
static inline void addf(struct log *l, const char *format, ...)
{
	va_list arguments;
	char text[200];
	int n;

	va_start(arguments, format);
	n = vsnprintf(text, sizeof text, format, arguments);
	va_end(arguments);
	add(l, text, (size_t)n);
}

static inline bool same_log(const struct log *a, const struct log *b)
{
	return a->len == b->len && memcmp(a->text, b->text, a->len) == 0;
}

/* An input begins with an octet of flags, one that has the number of octets which
 * choose the cuts in its low 3 bits, and more flags above, and these octets; the
 * rest is fed to what is tested, in pieces. */
struct input {
	unsigned flags, more;
	const unsigned char *cuts;
	size_t cut_count;
	const char *in;
	size_t len;
};

enum cutting { WHOLE, CUT, OCTETS, CUTTINGS };

static inline bool input_of(struct input *input, const unsigned char *data, size_t len)
{
	if (len < 2 || len < 2 + (size_t)(data[1] & 7))
		return false;
	input->flags = data[0];
	input->more = data[1] >> 3;
	input->cut_count = data[1] & 7;
	input->cuts = data + 2;
	input->in = (const char *)data + 2 + input->cut_count;
	input->len = len - 2 - input->cut_count;
	return true;
}

/* Where the piece ends that begins at `at`; `count` tells the pieces so far. */
static inline size_t piece_end(const struct input *input, enum cutting cutting, size_t at, size_t *count)
{
	size_t left = input->len - at, n = left;

	if (cutting == OCTETS)
		n = 1;
	else if (cutting == CUT && input->cut_count > 0)
		n = 1 + (size_t)input->cuts[(*count)++ % input->cut_count];
	return at + (n < left ? n : left);
}

typedef void run_fn(const struct input *input, enum cutting cutting, struct log *l);

/* However it is cut, the same comes out. */
static inline void same_however_cut(run_fn *run, const struct input *input)
{
	static struct log logs[CUTTINGS];

	for (int c = 0; c < CUTTINGS; c++) {
		logs[c].len = 0;
		run(input, (enum cutting)c, &logs[c]);
		CHECK(same_log(&logs[c], &logs[0]));
	}
}

#endif
