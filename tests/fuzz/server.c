/* The server engine, fed any octets: cut anywhere they give the same events, the
 * same bodies and the same replies, whatever the queue; and its replies are such. */
#include "fuzz.h"

/* flags: normalize, settled late, a tiny queue, lent more; 3 bits the rules of
 * --reply or an opening; TLS and accounts, what follows STARTTLS being inside */
enum { NORMALIZE = 1, LATE = 2, TINY = 4, LEND = 8, RULES_SHIFT = 4, SECURE = 128, SIZE = 300, RCPTS = 3, TICKETS = 2048 };

static const char *const rules[8][6] = {
	{ NULL }, { NULL }, { NULL },   /* the second and third: other openings */
	{ "MAIL *s*=delay 1", "RCPT n*=550 5.1.1 no", "BODY#2=554 5.6.0 no", "DATA#2=354 now", "BDAT#2=452 4.3.1 full" },
	{ "CONNECT=delay 1", "BODY=delay 1", "BDAT=delay 1", "DATA=delay 1", "RSET=delay 1", "QUIT=delay 1" },
	{ "BSMTP=silent", "RCPT#2=silent", "BODY#2=silent", "BDAT#3=silent", "NOOP=drop", "EHLO=250 custom" },
	{ "DATA=451 4.3.0 no", "MAIL#2=421 4.3.2 stop", "BSMTP=550 no", "BODY=drop", "VRFY=drop" },
	{ "BODY#2=250 2.0.0 taken", "MAIL=250 2.1.0 mine", "BDAT=250 2.0.0 mine", "RSET=500 no" },
};

struct receiver {
	struct bsmtp_server s;
	struct log *l, replies;
	struct bsmtp_held *held;
	size_t held_size, tickets, rcpts, text;
	uint64_t ticket[TICKETS];
	unsigned flags;
	bool open, closed, tls;
};

static void write_replies(struct receiver *r)
{
	char out[BSMTP_SERVER_OUT_MIN];
	size_t n;

	while (!r->closed && (n = bsmtp_server_out(&r->s, out, sizeof out, &r->closed)) > 0)
		add(&r->replies, out, n);
}

static void settle(struct receiver *r)
{
	static const enum bsmtp_answer verdicts[] = { BSMTP_ANSWER_STORED, BSMTP_ANSWER_NO_SPACE, BSMTP_ANSWER_STORE_FAILED };

	while (r->tickets > 0) {
		uint64_t ticket = r->ticket[--r->tickets];
		bsmtp_server_settle(&r->s, ticket, verdicts[r->flags & LATE ? ticket % 3 : 0]);
	}
	write_replies(r);
}

static void event(struct receiver *r, const struct bsmtp_server_event *e)
{
	size_t owed = bsmtp_server_owed(&r->s);

	CHECK(owed <= r->held_size);
	if (e->type == BSMTP_SERVER_TEXT) {
		CHECK(r->open && r->rcpts > 0 && e->text.len > 0);
		r->text += e->text.len;
		/* mended, a bare one counts one and is two */
		CHECK(r->text <= (r->flags & NORMALIZE ? 2 * SIZE : SIZE));
		add(r->l, e->text.at, e->text.len);
		return;
	}
	if (e->type == BSMTP_SERVER_FULL) {
		if ((r->flags & LEND) && r->held_size < 4 * BSMTP_SERVER_HELD_MIN) {
			struct bsmtp_held *more = malloc(2 * r->held_size * sizeof *more);
			CHECK(more != NULL);
			bsmtp_server_lend(&r->s, more, 2 * r->held_size);
			free(r->held);
			r->held = more;
			r->held_size *= 2;
		} else {
			settle(r);
			CHECK(r->closed || bsmtp_server_owed(&r->s) < owed);
		}
	}
	if (e->type == BSMTP_SERVER_MORE || e->type == BSMTP_SERVER_END || e->type == BSMTP_SERVER_FULL)
		return;
	addf(r->l, "\n<%d %llu %d%d ", (int)e->type, (unsigned long long)e->number, e->utf8, e->eightbit);
	add(r->l, e->text.at, e->text.len);
	addf(r->l, ">\n");
	switch (e->type) {
	case BSMTP_SERVER_MAIL:
		CHECK(!(r->flags & SECURE) || r->tls);
		CHECK(!r->open && (e->text.len == 0 || bsmtp_mailbox_valid(e->text, e->utf8)));
		r->open = true;
		r->rcpts = r->text = 0;
		break;
	case BSMTP_SERVER_RCPT:
		CHECK(r->open && r->text == 0 && r->rcpts++ < RCPTS && e->text.len > 0);
		break;
	case BSMTP_SERVER_MESSAGE:
		CHECK(r->open && r->rcpts > 0 && r->tickets < TICKETS);
		r->open = false;
		r->ticket[r->tickets++] = e->ticket;
		if (!(r->flags & LATE))
			settle(r);
		break;
	case BSMTP_SERVER_ABORT:
		CHECK(r->open);
		r->open = false;
		break;
	case BSMTP_SERVER_HELLO:
		CHECK(bsmtp_domain_valid(e->text, true));
		break;
	case BSMTP_SERVER_STARTTLS:
		/* Nothing that was sent in the clear may be left to count. */
		CHECK((r->flags & SECURE) && !r->tls && !r->open);
		r->tls = true;
		settle(r);
		CHECK(r->closed || bsmtp_server_owed(&r->s) == 0);
		bsmtp_server_secured(&r->s, BSMTP_PEER_GUEST);
		break;
	case BSMTP_SERVER_AUTH:
		CHECK((r->flags & SECURE) && r->tls && !r->open && e->text.len > 0);
		add(r->l, e->secret.at, e->secret.len);
		bsmtp_server_settle(&r->s, e->ticket, e->secret.len % 2 ? BSMTP_ANSWER_STORED : BSMTP_ANSWER_AUTH_FAILED);
		break;
	default:
		CHECK(e->type == BSMTP_SERVER_DELAY && e->number == 1);
	}
}

/* All that was written is replies, and no more than were owed. */
static void read_replies(const struct log *l)
{
	size_t at = 0;

	while (at < l->len) {
		struct bsmtp_reply_line line;
		ptrdiff_t n = bsmtp_reply_line_parse(&line, l->text + at, l->len - at);
		CHECK(n > 0);
		at += (size_t)n;
	}
}

static void run(const struct input *input, enum cutting cutting, struct log *l)
{
	static struct receiver r;
	unsigned set = input->flags >> RULES_SHIFT & 7;
	struct bsmtp_fault faults[6];
	struct bsmtp_slice time;
	struct bsmtp_server_config config = { .hostname = "h", .max_size = SIZE, .max_recipients = RCPTS,
		.keywords = BSMTP_KEYS_ALL, .normalize = (input->flags & NORMALIZE) != 0, .faults = faults,
		.starttls = (input->flags & SECURE) != 0, .auth = (input->flags & SECURE) != 0,
		.opening = set == 1 ? BSMTP_OPENING_SILENT : set == 2 ? BSMTP_OPENING_UNKNOWN : BSMTP_OPENING_ACCEPT };
	struct bsmtp_server_event e;
	size_t at = 0, pieces = 0, steps = 0;

	for (size_t i = 0; i < 6 && rules[set][i] != NULL; i++) {
		CHECK(bsmtp_fault_parse(&faults[i], slice(rules[set][i], strlen(rules[set][i])), &time) == NULL);
		faults[i].delay_ms = 1;
		config.fault_count = i + 1;
	}
	memset(&r.s, 0, sizeof r.s);
	r.l = l;
	r.flags = input->flags;
	r.held_size = r.flags & TINY ? BSMTP_SERVER_HELD_MIN : TICKETS;
	r.held = malloc(r.held_size * sizeof *r.held);
	CHECK(r.held != NULL);
	r.replies.len = r.tickets = r.rcpts = r.text = 0;
	r.open = r.closed = r.tls = false;
	bsmtp_server_init(&r.s, &config, input->flags & SECURE ? BSMTP_PEER_GUEST : BSMTP_PEER_ALLOWED, r.held, r.held_size);
	do {
		size_t end = at < input->len ? piece_end(input, cutting, at, &pieces) : at, used = 0;
		char *piece = exact(input->in + at, end - at);
		do {
			size_t n = bsmtp_server_in(&r.s, piece + used, end - at - used, &e);
			CHECK(n <= end - at - used && ++steps < 20 * input->len + 100);
			used += n;
			event(&r, &e);
		} while (!r.closed && e.type != BSMTP_SERVER_MORE && e.type != BSMTP_SERVER_END);
		CHECK(e.type != BSMTP_SERVER_MORE || used == end - at);
		free(piece);
		at += used;
	} while (at < input->len && !r.closed && e.type != BSMTP_SERVER_END);
	bsmtp_server_eof(&r.s, &e);
	CHECK(e.type == (r.open ? BSMTP_SERVER_ABORT : BSMTP_SERVER_END));
	event(&r, &e);
	settle(&r);
	CHECK(r.closed || bsmtp_server_owed(&r.s) == 0);
	free(r.held);
	read_replies(&r.replies);
	addf(l, "\n%s %d %d\n", bsmtp_end_name(bsmtp_server_end(&r.s)), r.closed, (int)bsmtp_server_hello(&r.s));
	add(l, r.replies.text, r.replies.len);
}

/* The queue makes no difference to what is settled at once. */
static void no_queue_matters(const struct input *input)
{
	static struct log one, other;
	struct input tiny = *input, wide = *input;

	if (input->flags & LATE)
		return;
	tiny.flags |= TINY;
	wide.flags &= ~(unsigned)TINY;
	one.len = other.len = 0;
	run(&tiny, WHOLE, &one);
	run(&wide, WHOLE, &other);
	CHECK(same_log(&one, &other));
}

int LLVMFuzzerTestOneInput(const unsigned char *data, size_t len)
{
	struct input input;

	if (!input_of(&input, data, len) || len > 4096)
		return 0;
	same_however_cut(run, &input);
	no_queue_matters(&input);
	return 0;
}
