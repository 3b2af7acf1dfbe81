/* Body codecs.  What is encoded decodes to the text with its lines mended;
 * wire octets, newlines and quoting come to the same however they are cut. */
#include "fuzz.h"

enum { DOTS = 1, LF = 2, MEND = 4, SMALL = 8 };

static void encode(const struct input *input, enum cutting cutting, struct log *l)
{
	struct bsmtp_encoder e = { .dots = (input->flags & DOTS) != 0 };
	size_t cap = input->flags & SMALL ? 4 + (input->flags >> 4) : 1000, at = 0, count = 0, made;
	char end[3];

	while (at < input->len) {
		size_t to = piece_end(input, cutting, at, &count), used = 0;
		char *piece = exact(input->in + at, to - at);
		while (used < to - at) {
			char *out = exact(piece, 0);
			out = realloc(out, cap);
			CHECK(out != NULL);
			size_t n = bsmtp_encode(&e, out, cap, &made, piece + used, to - at - used);
			CHECK(made <= cap && n <= to - at - used && (n > 0 || made > 0));
			add(l, out, made);
			free(out);
			used += n;
		}
		free(piece);
		at = to;
	}
	add(l, end, bsmtp_encode_end(&e, end));
	addf(l, "|%llu", (unsigned long long)e.strays);
}

static void decode(const struct input *input, enum cutting cutting, struct log *l)
{
	struct bsmtp_decoder d = { .lf = (input->flags & LF) != 0 };
	size_t at = 0, count = 0;

	while (at < input->len && !d.ended) {
		size_t to = piece_end(input, cutting, at, &count), used = 0;
		char *piece = exact(input->in + at, to - at);
		while (used < to - at && !d.ended) {
			struct bsmtp_slice text;
			size_t n = bsmtp_decode(&d, piece + used, to - at - used, &text);
			CHECK(n <= to - at - used && (n > 0 || text.len > 0));
			add(l, text.at, text.len);
			used += n;
		}
		free(piece);
		at += used;
	}
	addf(l, "|%d %zu", d.ended, at);
}

static void newlines(const struct input *input, enum cutting cutting, struct log *l)
{
	struct bsmtp_newlines n = { .normalize = (input->flags & MEND) != 0 };
	struct bsmtp_slice text;
	size_t at = 0, count = 0, given = 0;

	while (at < input->len) {
		size_t to = piece_end(input, cutting, at, &count), used = 0;
		char *piece = exact(input->in + at, to - at);
		while (used < to - at) {
			size_t took = bsmtp_newlines(&n, piece + used, to - at - used, &text);
			CHECK(took <= to - at - used && (took > 0 || text.len > 0));
			add(l, text.at, text.len);
			given += text.len;
			used += took;
		}
		free(piece);
		at = to;
	}
	bsmtp_newlines_end(&n, &text);
	add(l, text.at, text.len);
	given += text.len;
	/* Mended text has no fault, and good text is not touched. */
	struct bsmtp_newlines again = { 0 };
	if (n.normalize || !n.bad) {
		bsmtp_newlines(&again, l->text + l->len - given, given, &text);
		bsmtp_newlines_end(&again, &text);
		CHECK(!again.bad);
	}
	if (!n.normalize || !n.bad)
		CHECK(given == input->len && memcmp(l->text + l->len - given, input->in, given) == 0);
	CHECK(!n.bad || input->in[n.bad_at] == '\r' || input->in[n.bad_at] == '\n');
	addf(l, "|%d %llu", n.bad, (unsigned long long)n.bad_at);
}

static void quote(const struct input *input, enum cutting cutting, struct log *l)
{
	struct bsmtp_quoter q = { 0 };
	struct bsmtp_slice text;
	size_t at = 0, count = 0;

	while (at < input->len) {
		size_t to = piece_end(input, cutting, at, &count), used = 0;
		char *piece = exact(input->in + at, to - at);
		while (used < to - at) {
			size_t took = bsmtp_quote(&q, piece + used, to - at - used, &text);
			CHECK(took <= to - at - used && (took > 0 || text.len > 0));
			add(l, text.at, text.len);
			used += took;
		}
		free(piece);
		at = to;
	}
	bsmtp_quote_end(&q, &text);
	add(l, text.at, text.len);
}

/* Encoded with dots, and its end behind it, it decodes to what it is without. */
static void round_trip(const struct input *input)
{
	static struct log wire, plain, back;
	struct input dotted = *input, undotted = *input, received = *input;

	dotted.flags |= DOTS;
	undotted.flags &= ~(unsigned)DOTS;
	wire.len = plain.len = back.len = 0;
	encode(&dotted, CUT, &wire);
	encode(&undotted, WHOLE, &plain);
	while (wire.text[--wire.len] != '|')
		continue;
	while (plain.text[--plain.len] != '|')
		continue;
	add(&wire, ".\r\n", 3);
	received.in = wire.text;
	received.len = wire.len;
	received.flags &= ~(unsigned)LF;
	decode(&received, CUT, &back);
	addf(&plain, "|1 %zu", wire.len);
	CHECK(same_log(&plain, &back));
	/* What was sent has no bare newline, and no end but its own. */
	received.len -= 3;
	received.flags &= ~(unsigned)MEND;
	back.len = 0;
	newlines(&received, WHOLE, &back);
	CHECK(back.len >= 4 && memcmp(back.text + back.len - 4, "|0 0", 4) == 0);
}

int LLVMFuzzerTestOneInput(const unsigned char *data, size_t len)
{
	struct input input;

	if (!input_of(&input, data, len))
		return 0;
	same_however_cut(encode, &input);
	same_however_cut(decode, &input);
	same_however_cut(newlines, &input);
	same_however_cut(quote, &input);
	round_trip(&input);
	return 0;
}
